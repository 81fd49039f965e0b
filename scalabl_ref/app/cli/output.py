"""The lines that commands print for people, and the values that they return for --json."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ...data import Encoded
from ...data.tokenizer import LETTERS

Result = dict[str, Any]


def say(args: argparse.Namespace, text: str) -> None:
    """Print a line, on rank 0 alone: on standard output, or on standard error under --json."""
    if not args.process:
        print(text, file=sys.stderr if args.json else sys.stdout)


def say_wording(args: argparse.Namespace, data: Encoded) -> None:
    """Which tokens the answers are, and how many prompts were too long."""
    names = data.wording.words or LETTERS[: len(data.classes)]
    space = ", each after a space" if data.wording.answer_tokens == "space" else ""
    shown = ", ".join(f"{n!r} {i}" for n, i in zip(names, data.classes, strict=True))
    say(args, f"answer tokens: {shown}{space}")
    if data.notice:
        say(args, f"note: {data.notice}")
    if data.cut or data.left_out:
        say(args, f"prompts longer than {data.wording.max_length} tokens: {data.cut} cut, "
            f"{data.left_out} dropped")  # fmt: skip
