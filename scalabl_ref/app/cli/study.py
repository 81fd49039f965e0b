"""Compare methods on one task: tune each with equally many trials on a validation set, then train
the best trial with every seed and test it. The same command continues a study that was stopped.
With --table or --figures alone, write the results of a finished study for a paper."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch

from ...evaluation import papers
from ...evaluation.tables import table
from ...support.errors import InputError
from ...support.fields import json_text
from ...support.files import atomic_write_text
from ...support.progress import duration
from ..plan import product_rate
from ..study import Study, cost, paper, run_study
from . import runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="FILE", nargs="?",
        help="JSON file of the study, see docs/own_method.md; or the word paper for the published "
        "comparison; --table and --figures need none")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for runs and results")
    add("--jobs", type=int, default=1, metavar="N", help="train N runs at a time, one thread each")
    add("--cost", action="store_true", help="print the cost of the study, and stop")
    add("--plugin", type=Path, action="append", default=[], metavar="FILE",
        help="a Python file with methods of your own, which is run; see docs/own_method.md; may be "
        "given again")  # fmt: skip
    add("--table", metavar="KIND",
        help="of a finished study, run nothing and print a table for a paper: latex, csv or "
        "markdown; or a file to write, .tex, .csv or .md")  # fmt: skip
    add("--figures", type=Path, metavar="FOLDER",
        help="of a finished study, run nothing and write its reliability diagrams and the NLL by "
        "method as .svg")  # fmt: skip
    add("--pdf", action="store_true",
        help="--figures: also as .pdf; needs pip install -e "
        "'.[figures]'")  # fmt: skip
    add("--model", type=Path, help="paper: folder of the base model")
    add("--data", type=Path, metavar="FOLDER", help="paper: folder of the published data sets")
    add("--tasks", nargs="+", choices=tuple(paper.TASKS), metavar="TASK",
        help=f"paper: tasks, out of {' '.join(paper.TASKS)} (default: all)")  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    if args.table or args.figures:
        return _for_paper(args)
    if not args.config:
        raise InputError("give the study's FILE, or --table or --figures for a finished one")
    if args.config == "paper":
        if args.plugin:
            raise InputError("--plugin needs a study's FILE, and not the word paper")
        if not (args.model and args.data):
            raise InputError("study paper needs --model and --data")
        studies = paper.studies(args.model, args.data, tuple(args.tasks or paper.TASKS))
        todo = {args.out / task: config for task, config in studies.items()}
    else:
        todo = {args.out: Study.read(Path(args.config), args.plugin)}
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


def _for_paper(args: argparse.Namespace) -> Result:
    """The table and the figures of a finished study."""
    results = papers.read_results(args.out)
    found: Result = {}
    if args.config:
        _check_same(Study.read(Path(args.config), args.plugin), results, args)
    if args.table:
        path = Path(args.table)
        ends = {end: kind for kind, end in papers.KINDS.items()}
        kind = args.table if args.table in papers.KINDS else ends.get(path.suffix)
        if kind is None:
            names = ", ".join([*papers.KINDS, *(f"FILE{end}" for end in ends)])
            raise InputError(f"--table must be one of {names}, not {args.table!r:.60}")
        found["table"] = papers.paper_table(results, kind)
        if args.table in papers.KINDS:
            say(args, found["table"].rstrip("\n"))
        else:
            atomic_write_text(path, found["table"])
            say(args, f"written: {path}")
    if args.figures:
        paths = papers.write_figures(args.out, results, args.figures, args.pdf)
        found["figures"] = [str(path) for path in paths]
        say(args, f"written: {len(paths)} figures in {args.figures}")
    return found


def _check_same(config: Study, results: Result, args: argparse.Namespace) -> None:
    """Raise InputError if the results are of another study. Files may have moved."""
    ours, theirs = json.loads(json_text(dataclasses.asdict(config))), results["study"]
    moved = ("model", "train", "test", "prompt_template", "plugins")
    for name, value in ours.items():
        other = theirs.get(name, value)
        if name == "ood":
            value, other = ({k: {**about, "path": ""} for k, about in part.items()}
                            for part in (value, other))  # fmt: skip
        if name not in moved and value != other:
            raise InputError(
                f"{args.out}: holds results of another study than {args.config}: {name} differs; "
                "leave the file out, or run the study"
            )


def _rate(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """FLOP/s of all jobs together: each has a thread if there are several."""
    if args.jobs < 2 or args.device != "cpu":
        return product_rate(args.device, dtype)
    return product_rate(args.device, dtype, 1) * min(args.jobs, os.cpu_count() or 1)
