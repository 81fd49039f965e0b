"""Answer one question: the probability of each choice, and how uncertain the model is. The
entropy is the total uncertainty; the mutual information is the part that more training data could
remove."""

from __future__ import annotations

import argparse
from typing import Any

from ...data import Wording, question
from ...evaluation.answering import answer
from ...support.errors import InputError
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
    model, tokenizer, info, posterior = runs.open_run(args)
    samples = options.default_samples(info) if samples is None else samples
    wording = options.wording(args, Wording.of_run(info))
    choices = args.choices or list(wording.names or ())
    if not choices:
        raise InputError(f"{args.run}: was trained on questions with different choices: give "
                         "--choices")  # fmt: skip
    example = question(args.prompt, choices, info["format"])
    choices = _checked(args, choices, wording, model.config.head_tokens)
    answers = answer(
        model, tokenizer, [example], samples, args.seed, posterior=posterior, design=args.design,
        wording=wording,
    )  # fmt: skip
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


def _checked(args: argparse.Namespace, choices: list[str], wording: Wording, head: Any) -> list:
    """The choices in the order of the run's classes. Raises InputError if it cannot answer them."""
    if head is not None and len(head) < len(choices):
        raise InputError(f"{args.run}: can answer {len(head)} choices, not {len(choices)}")
    if wording.words is None:
        return choices
    if sorted(choices) != sorted(wording.words):
        known = " ".join(map(repr, wording.words))
        raise InputError(f"{args.run}: leave --choices out, or give the run's labels: {known}")
    return list(wording.words)
