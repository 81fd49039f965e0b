"""Answer one question: the probability of each choice, and how uncertain the model is. The
entropy is the total uncertainty; the mutual information is the part that more training data could
remove."""

from __future__ import annotations

import argparse

from ...data import Wording
from ...evaluation.answering import Answers
from ...evaluation.classifier import classifier
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_run(parser)
    add("--prompt", required=True, help="question to answer")
    add("--choices", nargs="+", metavar="TEXT",
        help="answers to choose from (default: those of the training data, if all its rows have "
        "the same)")  # fmt: skip
    options.add_samples(parser)
    options.add_wording(parser, "the run's")
    options.add_ranks(parser)


@runs.on_ranks
def run(args: argparse.Namespace) -> Result:
    samples = options.samples(args)
    opened = runs.open_run(args)
    wording = options.wording(args, Wording.of_run(opened.facts))
    clf = classifier(opened, args.run, samples, args.seed, args.design, wording=wording)
    examples = clf.examples([args.prompt], args.choices)
    return _one(args, clf.ask(examples), list(examples[0].choices))


def _one(args: argparse.Namespace, answers: Answers, choices: list[str]) -> Result:
    """The answer to --prompt, printed."""
    p, draws, settled = answers.prediction, answers.draws, answers.settled
    probs, others = p.probs[0, : len(choices)], p.probs[0, len(choices) :]
    for choice, value in zip(choices, probs.tolist(), strict=True):
        say(args, f"{value:.4f}  {choice}")
    result: Result = {"choices": choices, "probs": probs.tolist()}
    if len(others):
        result["others"] = others.sum().item()
        say(args, f"{result['others']:.4f}  all other answers of the run")
    result["samples"] = answers.samples if draws is None else int(draws[0])
    if settled is not None:
        result["settled"] = bool(settled[0])
        if not result["settled"]:
            say(args, f"open after {result['samples']} draws: more could change the answer")
    for name in ("entropy", "expected_entropy", "mutual_information"):
        result[name] = getattr(p, name)[0].item()
        say(args, f"{name.replace('_', ' ')}: {result[name]:.4f} nats")
    return result
