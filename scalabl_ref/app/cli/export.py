"""Write a run for other programs: as a PEFT adapter, or as a Hugging Face model folder with the
adapter merged into the weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...interop.exporting import TO, Trained, export
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_run(parser)
    add("--to", choices=TO, required=True,
        help="peft: an adapter folder; hf: a model folder with the adapter merged")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER", help="new folder to write")
    add("--samples", type=int, default=0, metavar="N",
        help="write N posterior draws, each to its own folder in --out; 0 writes the mean "
        "(default: 0)")  # fmt: skip
    add("--base", metavar="OWNER/NAME",
        help="base model on the Hugging Face Hub, for the adapter to name")  # fmt: skip
    options.add_dtype(parser, "the merged weights (hf)")


def run(args: argparse.Namespace) -> Result:
    model, tokenizer, info, posterior = runs.open_run(args)
    base = args.model or Path(info["model"])
    trained = Trained(args.run, model, info, posterior, base, args.base)
    names = export(
        trained, args.out, args.to, args.samples, args.seed, dtype=runs.dtype_of(args.dtype),
        tokenizer=tokenizer,
    )  # fmt: skip
    folders = [str(args.out / name) for name in names]
    say(args, f"written: {' '.join(folders)}")
    return {"to": args.to, "folders": folders}
