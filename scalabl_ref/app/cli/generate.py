"""Continue a text, and say how uncertain each new token was: with a run (trained with --head
full), or with a base model alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from ...data.tokenizer import load_tokenizer
from ...evaluation.generate import Token, check_warping, generate, pieces
from ...support.errors import InputError
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_run(
        parser, required=False,
        otherwise="; without --run: the model itself, a folder or OWNER/NAME on the Hugging Face "
        "Hub",
    )  # fmt: skip
    add("--prompt", default="", help="text to continue")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="write at most N tokens")
    add("--samples", type=int, default=0, metavar="N",
        help="posterior draws to average over; 0 uses the mean model (default: 0)")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="T",
        help="draw each token from the probabilities to the power 1/T, a function of --seed; 0 "
        "takes the most probable token (default: 0)")  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="P",
        help="draw from the most probable tokens alone, whose probabilities together reach P; 1 "
        "takes all")  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    check_warping(args.temperature, args.top_p)
    if args.run:
        model, tokenizer, _, posterior = runs.open_run(args)
        if posterior is not None:
            raise InputError(f"{args.run}: its posterior answers questions, it cannot write text")
    elif args.model:
        model = runs.load_base(args, args.model, None, None)
        tokenizer = load_tokenizer(args.model)
    else:
        raise InputError("give --run or --model")
    prompt = tokenizer.encode(args.prompt)
    tokens: list[Token] = []
    written = generate(
        model, prompt, args.max_new_tokens, args.samples, args.seed, tokenizer.eos_ids,
        args.temperature, args.top_p,
    )  # fmt: skip

    def ids() -> Iterator[int]:
        for token in written:
            tokens.append(token)
            yield token.id

    for piece in pieces(tokenizer, prompt, ids()):
        if not args.process:
            print(piece, end="", flush=True, file=sys.stderr if args.json else sys.stdout)
    say(args, "")
    text = tokenizer.decode(prompt + [token.id for token in tokens])
    if tokens:
        entropy = sum(token.entropy for token in tokens) / len(tokens)
        information = sum(token.mutual_information for token in tokens) / len(tokens)
        say(args, f"mean per token: entropy {entropy:.4f}, mutual information {information:.4f} "
            "nats")  # fmt: skip
    return {"text": text, "tokens": [token._asdict() for token in tokens]}
