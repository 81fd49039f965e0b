"""Choose, on labelled questions, the least confidence at which answers are right at a promised
rate, and keep it in the run (RUN/rule.json): evaluate, predict and serve then say "answer" or
"human". The promise holds for new questions like these, with the probability --confidence. The
questions must be others than those of the training and of `calibrate`: if `calibrate` used those of
`train --holdout`, give --data here. Run `calibrate` first, as a new temperature removes the
threshold. If no threshold keeps the promise, every row goes to a human."""

from __future__ import annotations

import argparse

from ...evaluation import rule
from ...evaluation.classifier import classifier
from ...evaluation.threshold import COVERAGES, MOST_ROWS, Threshold, best_share, check_rates
from . import options, runs
from .calibrate import add_fit, labelled, without_rows
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_fit(parser, "remove the threshold of the run", ruled=True)
    add("--accuracy", type=float, default=0.95, help="promised share of right answers")
    add("--confidence", type=float, default=0.95,
        help="probability that the promise is kept, over the random choice of the "
        "questions")  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    if args.clear:
        cleared = rule.clear_rule(args.run, "threshold")
        say(args, f"{args.run}: {'cleared' if cleared else 'there is nothing to clear'}")
        return {"cleared": cleared}
    check_rates(args.accuracy, args.confidence)
    opened = runs.open_run(args)
    before = rule.read_rule(args.run)
    kept = {"how": before["how"], "temperature": before["temperature"]} if (
        before.get("temperature")) else {}  # fmt: skip
    samples = options.samples(args)
    clf = classifier(opened, args.run, samples, args.seed, args.design, args.batch, rule=kept)
    needs = "the promise needs rows that neither the training nor `calibrate` saw"
    examples, facts = labelled(args, clf, needs)
    shared = rule.seen_in(facts["rows"], kept["temperature"]["rows"]) if kept else 0
    if shared:
        say(args, f"warning: the temperature was fitted on {shared} of {len(examples)} rows: "
            f"{needs}")  # fmt: skip
    answers = clf.ask(examples, "threshold")
    found = rule.thresholded(answers, args.accuracy, args.confidence)
    table = rule.promises(answers, args.accuracy, args.confidence)
    found |= facts
    rule.write_rule(args.run, {"how": rule.how(clf), **kept, "threshold": found})
    for line in _lines(args, table, *best_share(*rule.outcomes(answers))):
        say(args, line)
    return {
        "threshold": without_rows(found) if found["answered"] else None,
        "table": [
            {"accuracy": target, **(one._asdict() if one else {"rows_needed": needed})}
            for target, one, needed in table
        ],
    }


def _lines(
    args: argparse.Namespace,
    table: list[tuple[float, Threshold | None, int | None]],
    best: int,
    best_right: int,
) -> list[str]:
    """What is printed. best, best_right: as `best_share` gives them."""
    lines = [f"{'accuracy':>8}  {'least confidence':>16}  {'answered':>8}  right at least"]
    chosen = None
    for target, one, needed in table:
        if one:
            lines.append(f"{target:8.3g}  {one.confidence:16.4f}  {one.coverage:8.1%}  "
                         f"{one.bound:.4f}")  # fmt: skip
        else:
            about = f"about {needed:,} rows" if needed else "no number of rows"
            about += " like these would do"
            if needed and needed > MOST_ROWS:
                about = "the surest rows are right too little more often"
            lines.append(f"{target:8.3g}  none: {about}")
        if target == args.accuracy:
            chosen = one
    if any(one is None and needed is None for _, one, needed in table):
        lines += [
            f"At best {best_right / best:.1%} are right, among the {best} most confident. More "
            "rows do not raise that.",
            f"A threshold answers at least {COVERAGES[0]}% of the rows.",
        ]
    if chosen:
        lines.append(
            f"kept: {chosen.confidence:.4f}; {chosen.answered} rows are answered, "
            f"{chosen.right} of them right; the promise holds with {args.confidence:.3g} confidence"
        )
        lines.append(f"predict and serve now say \"{rule.ANSWER}\" from that confidence on, and "
                     f"\"{rule.HUMAN}\" below it")  # fmt: skip
    else:
        lines.append(
            f"no threshold keeps the promise of {args.accuracy:g}: predict and serve now send "
            "every row to a human"
        )
    return lines
