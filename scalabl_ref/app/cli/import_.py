"""Make a run from an adapter that another program trained. A plain LoRA becomes the mean of a
ScalaBL run, which `train --init` can train further; --method mle or map keeps it plain."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ...core.config import AdapterConfig
from ...data import FORMATS, Wording
from ...interop.importing import FROM, import_adapter
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC",
        help="a PEFT folder; or the official code's state_dict.pt, or its folder")  # fmt: skip
    add("--from", dest="kind", choices=FROM, required=True,
        help="format of SRC: peft, or bayesadapt (the official code)")  # fmt: skip
    options.add_base(parser)
    add("--out", type=Path, required=True, metavar="RUN", help="new run folder to write")
    options.add_adapter(parser, "SRC's if it has a distribution, otherwise {}")
    add("--alpha", type=float,
        help="bayesadapt: scaling was alpha / rank (default: 2 * rank)")  # fmt: skip
    add("--labels", nargs="+", metavar="TEXT",
        help="bayesadapt: answers, one for each row of its head (default: A B ...)")  # fmt: skip
    add("--format", choices=FORMATS, default="jsonl",
        help="format whose prompts `predict` will use")  # fmt: skip
    options.add_prompts(parser, "{}")
    options.add_dtype(parser, "the base model; adapters are always float32")


def run(args: argparse.Namespace) -> Result:
    wording = Wording()
    if args.kind == "bayesadapt":  # the rows of its head are the answers
        wording = Wording(labels="letters", answer_tokens="alone")
        if args.labels:
            wording = replace(wording, labels="words", names=tuple(args.labels))
    wording = options.with_prompts(args, wording)
    adapter = options.given(AdapterConfig, args)
    adapter.pop("alpha", None)  # it says how to read SRC
    facts = import_adapter(
        args.kind,
        args.source,
        args.model,
        args.out,
        adapter,
        {
            "model": str(args.model.resolve()),
            "format": args.format,
            **wording.facts(),
            "dtype": args.dtype,
        },
        alpha=args.alpha,
        labels=args.labels,
        seed=args.seed,
        dtype=runs.dtype_of(args.dtype),
        device=runs.device_of(args),
    )
    say(args, f"written: {args.out}, {facts['layers']} layers of {facts['method']}")
    if "layers_without" in facts:
        count = facts["layers_without"]
        say(args, f"SRC has no adapter for {count} more layers: theirs start with B = 0")
    return {"run": str(args.out), **facts}
