"""Fit a temperature on labelled questions and keep it in the run (RUN/rule.json): predict,
evaluate and scalabl_ref.load then apply it. The questions must be others than those of the
training. A threshold of the run is removed, because it is of other confidences."""

from __future__ import annotations

import argparse

from ...data import Example
from ...evaluation import rule
from ...evaluation.classifier import Classifier, classifier
from ...evaluation.metrics import TEMPERATURE_RANGE
from ...support.errors import InputError
from ...support.files import sha256
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_fit(parser, "remove the temperature and the threshold of the run")


def add_fit(parser: argparse.ArgumentParser, clear: str) -> None:
    """The options of `calibrate` and `threshold`."""
    add = parser.add_argument
    options.add_run(parser)
    options.add_data(parser, "those that `train --holdout` left out")
    options.add_samples(parser)
    add("--batch", type=int, default=32, help="questions per forward pass")
    add("--clear", action="store_true", help=clear)


def run(args: argparse.Namespace) -> Result:
    if args.clear:
        cleared = rule.clear_rule(args.run)
        say(args, f"{args.run}: {'cleared' if cleared else 'there is nothing to clear'}")
        return {"cleared": cleared}
    opened = runs.open_run(args)
    samples = options.samples(args)
    clf = classifier(opened, args.run, samples, args.seed, args.design, args.batch, raw=True)
    examples, facts = labelled(args, clf)
    answers = clf.ask(examples, "calibrate")
    fit = {**rule.calibrated(answers), **facts}
    before = rule.read_rule(args.run)
    rule.write_rule(args.run, {"how": rule.how(clf), "temperature": fit})
    say(args, f"temperature {fit['value']:.4f}, fitted on {fit['n']} rows of {fit['data']}")
    for name in ("nll", "ece"):
        say(args, f"{name.upper()} {fit[name][0]:.4f} before, {fit[name][1]:.4f} after")
    if fit["value"] in TEMPERATURE_RANGE:
        say(args, "warning: this is the end of the range: the rows are too few, or all right or "
            "all wrong")  # fmt: skip
    if before.get("threshold"):
        say(args, "the threshold is removed: choose one again with `scalabl threshold --run "
            f"{args.run} --data FILE`")  # fmt: skip
    return {"temperature": fit}


def labelled(args: argparse.Namespace, clf: Classifier) -> tuple[list[Example], Result]:
    """The questions of --data, or those held out, and what a rule keeps of them; with warnings."""
    info = clf.facts
    data = args.data
    if data:
        examples = runs.examples_like(args, info)
    elif info["holdout"]:
        data = info["data"]
        examples = runs.own_data(args.run, info, "--data")[1]
    else:
        raise InputError(f"{args.run}: was trained without --holdout: give --data")
    if len(examples) < rule.FEW:
        say(args, f"warning: {len(examples)} rows are few: {rule.FEW} or more make a better fit")
    if args.data:
        _warn_of_training_rows(args, clf, examples)
    return examples, {
        "data": str(data),
        "data_sha256": sha256(data),
        "rows_sha256": rule.rows_sha256(examples),
    }


def _warn_of_training_rows(
    args: argparse.Namespace, clf: Classifier, examples: list[Example]
) -> None:
    try:
        trained, _ = runs.own_data(args.run, clf.facts, "--data")
    except InputError:  # the training file is unknown, has changed, or is not there
        return
    seen = rule.seen_in(examples, trained)
    if seen:
        say(args, f"warning: {seen} of {len(examples)} rows were trained on: their answers look "
            "better than those to new texts: give others")  # fmt: skip
