"""Fit a temperature on labelled questions and keep it in the run (RUN/rule.json). It corrects
confidences that are too high or too low: evaluate, predict, serve and scalabl_ref.load then apply
it. The questions must be others than those of the training. A threshold of the run is removed,
because it is for confidences without this temperature."""

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
    add_fit(parser, "remove the temperature and the threshold of the run", ruled=False)


def add_fit(parser: argparse.ArgumentParser, clear: str, ruled: bool) -> None:
    """The options of `calibrate` and `threshold`. ruled: as in `options.add_samples`."""
    add = parser.add_argument
    options.add_run(parser)
    options.add_data(parser, "those that `train --holdout` left out")
    options.add_samples(parser, ruled)
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
    return {"temperature": without_rows(fit)}


def without_rows(fit: Result) -> Result:
    """A part of a rule without its digests of rows, which tell a reader nothing."""
    return {key: value for key, value in fit.items() if key != "rows"}


def labelled(
    args: argparse.Namespace, clf: Classifier, needs: str = "give others"
) -> tuple[list[Example], Result]:
    """The questions of --data, or those held out, and what a rule keeps of them; with warnings.

    needs: what to say where the training saw some of them.
    """
    info, trained = clf.facts, None
    if not args.data and not info["holdout"]:
        raise InputError(f"{args.run}: was trained without --holdout: give --data")
    try:
        trained, examples = runs.own_data(args.run, info, "--data")
    except InputError:
        if not args.data:
            raise
        say(args, "note: the training data cannot be read or has changed: whether it has some of "
            "these rows is not known")  # fmt: skip
    if args.data:
        examples = runs.examples_like(args, info)
    if len(examples) < rule.FEW:
        say(args, f"warning: {len(examples)} rows are few: {rule.FEW} or more make a better fit")
    digests, data = rule.row_digests(examples), args.data or info["data"]
    seen = rule.seen_in(digests, rule.row_digests(trained or ()))
    if seen:
        say(args, f"warning: {seen} of {len(examples)} rows were trained on: their answers look "
            f"better than those to new texts: {needs}")  # fmt: skip
    return examples, {"data": str(data), "data_sha256": sha256(data), "rows": digests}
