"""Answer one question (--prompt), or each text of a file (--data, with --out): the probability of
each choice, and how uncertain the model is. The entropy is the total uncertainty; the mutual
information is the part that more training data could remove. The file needs no labels. OUT has a
row for each text: id, answer, confidence, entropy, mutual_information and, with a threshold,
"answer" or "human". After an interruption the same command goes on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...data import Columns, Wording, format_of
from ...data.formats import TEXT_COLUMNS
from ...evaluation.answering import Answers, chosen
from ...evaluation.classifier import Classifier, classifier
from ...evaluation.rule import decided
from ...evaluation.stream import Texts, predict_file
from ...support.errors import InputError
from ...training import ranks
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_run(parser)
    add("--prompt", metavar="TEXT", help="question to answer")
    add("--data", type=Path, metavar="FILE", help="file of texts to answer, with or without labels")
    options.add_format(parser, "data")
    options.add_column(parser, "text", TEXT_COLUMNS, "prompt or text")
    add("--limit", type=int, metavar="ROWS", help="answer only the first ROWS texts")
    add("--out", type=Path, metavar="FILE", help="file of answers to --data: .csv or .jsonl")
    add("--probs", action="store_true", help="in --out, also the probability of each choice")
    add("--batch", type=int, default=1,
        help="texts of --data per forward pass; more are faster, above all on a GPU; with 1 an "
        "answer does not depend on the other texts, to the bit")  # fmt: skip
    add("--choices", nargs="+", metavar="TEXT",
        help="answers to choose from; needed if the rows of the training data had different ones "
        "(default: those of the training data)")  # fmt: skip
    options.add_samples(parser)
    options.add_raw(parser)
    options.add_wording(parser, "the run's")
    options.add_ranks(parser)


@runs.on_ranks
def run(args: argparse.Namespace) -> Result:
    if (args.prompt is None) == (args.data is None):
        raise InputError("give --prompt TEXT, or --data FILE with --out FILE")
    if (args.data is None) != (args.out is None):
        raise InputError("--data FILE and --out FILE belong together: give both")
    if args.batch < 1:
        raise InputError(f"batch must be at least 1, and is {args.batch}")
    samples = options.samples(args)
    if args.data and ranks.world() > 1:
        raise InputError("predict --data works in one process: start it without torchrun")
    opened = runs.open_run(args)
    wording = options.wording(args, Wording.of_run(opened.facts))
    clf = classifier(
        opened, args.run, samples, args.seed, args.design, args.batch, wording, args.raw
    )
    runs.say_rule(args, clf)
    if args.data:
        return _file(args, clf)
    examples = clf.examples([args.prompt], args.choices)
    answers = clf.ask(examples)
    return _one(args, clf, answers, list(examples[0].choices))


def _file(args: argparse.Namespace, clf: Classifier) -> Result:
    """The answers to --data, in --out."""
    if args.limit is not None and args.limit < 1:
        raise InputError(f"the limit must be at least 1 example, and is {args.limit}")
    info, format = clf.facts, args.format or format_of(args.data)
    own = args.text_column or (info["text_column"] if format == info["format"] else None)
    names = tuple(clf.choices(args.choices)) if args.choices or clf.wording.names else ()
    source = Texts(args.data, format, Columns(own), names, args.limit)
    try:
        count = predict_file(clf, source, args.out, args.probs, lambda line: say(args, line))
    except KeyboardInterrupt:
        print("what is done is kept: the same command goes on", file=sys.stderr)
        raise
    say(args, f"written: {args.out}, {count:,} rows")
    if clf.threshold is None and not args.raw:
        say(args, f"the decisions are empty: `scalabl threshold --run {args.run} --data FILE` "
            "chooses a threshold for them")  # fmt: skip
    return {"out": str(args.out), "rows": count}


def _one(args: argparse.Namespace, clf: Classifier, answers: Answers, choices: list[str]) -> Result:
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
    if clf.threshold is not None:
        confidence = chosen(answers)[1][0].item()
        result["decision"] = decided(confidence, clf.threshold)
        say(args, f"decision: {result['decision']}")
    return result
