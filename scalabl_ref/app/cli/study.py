"""Compare methods on one task: tune each with equally many trials on a validation split, then train
the best trial with every seed and test it. A study that was stopped continues."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from ...evaluation.tables import table
from ...support.errors import InputError
from ...support.progress import duration
from ..plan import product_rate
from ..study import Study, cost, paper, run_study
from . import runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="FILE",
        help="JSON file with the fields of scalabl_ref.app.study.Study; or the word paper for the "
        "published comparison")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for runs and results")
    add("--jobs", type=int, default=1, metavar="N", help="train N runs at a time, one thread each")
    add("--cost", action="store_true", help="print the cost of the study, and stop")
    add("--model", type=Path, help="paper: folder of the base model")
    add("--data", type=Path, metavar="FOLDER", help="paper: folder of the published data sets")
    add("--tasks", nargs="+", choices=tuple(paper.TASKS), metavar="TASK",
        help=f"paper: tasks, out of {' '.join(paper.TASKS)} (default: all)")  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    if args.config == "paper":
        if not (args.model and args.data):
            raise InputError("study paper needs --model and --data")
        studies = paper.studies(args.model, args.data, tuple(args.tasks or paper.TASKS))
        todo = {args.out / task: config for task, config in studies.items()}
    else:
        todo = {args.out: Study.read(Path(args.config))}
    runs.device_of(args)
    costs = {}
    for out, config in todo.items():
        dtype = getattr(torch, config.dtype or "float32")
        about = cost(config)
        about["hours"] = about["flop"] / _rate(args, dtype) / 3600
        say(args, f"{out}: {about['runs']:,.0f} training runs, {about['steps']:,.0f} steps in all, "
            f"{about['flop']:.2g} FLOP: about {duration(3600 * about['hours'])} or more, at the "
            f"speed of matrix products here without other work; {about['bytes'] / 1e9:.2g} GB of "
            "base weights")  # fmt: skip
        costs[str(out)] = about
    if args.cost:
        return {"cost": costs}
    results = {}
    for out, config in todo.items():
        results[str(out)] = run_study(config, out, args.jobs, args.device)
        say(args, table(results[str(out)]))
        say(args, f"written: {out / 'results.md'}, results.json, results.html")
    return {"cost": costs, "results": results}


def _rate(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """FLOP/s of all jobs together: each has a thread if there are several."""
    if args.jobs < 2 or args.device != "cpu":
        return product_rate(args.device, dtype)
    return product_rate(args.device, dtype, 1) * min(args.jobs, os.cpu_count() or 1)
