"""What `train` says: the data before the first step, numbers on the way, and what came of it."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data import Encoded
from ...data.tokenizer import LETTERS, Tokenizer
from ...evaluation.threshold import binomial_tail
from ...training.trainer import Trainer
from ...training.watch import Watch
from .output import say, say_wording

WINDOW = 20  # steps whose mean the bar shows
SURE = 0.01  # a run has learnt if chance gives as many right answers with a lower probability
NEAR = 0.98  # an NLL above this share of ln C is that of guessing
LINES, COLUMNS = 12, 100  # of a prompt that is shown
# Why the settings that matter most have the defaults of TrainConfig.
REASONS = {
    "steps": "the same for {rows} rows as for others",
    "lr": "the same for {rows} rows as for others",
    "beta": "the loss is the evidence lower bound",
}


# --- before the first step ------------------------------------------------------------------------


def say_data(args: argparse.Namespace, data: Encoded, watch: Watch | None, by: Tokenizer) -> None:
    """Rows, labels, lengths, and a prompt with its answer."""
    held = f" (and {len(watch.data.labels)} held out)" if watch else ""
    kind = "labels" if data.wording.names else "choices at most"
    longest = max(map(len, data.tokens))
    say(args, f"{len(data.labels)} rows{held}, {len(data.classes)} {kind}, {longest} tokens at "
        f"most; the prompt as the model sees it (row {data.examples[0].id}):")  # fmt: skip
    for line in _shown(_prompt(data, by)):
        say(args, f"  | {line}")
    names = data.wording.words or LETTERS
    space = " " if data.wording.answer_tokens == "space" else ""
    say(args, f"its answer: {space + names[data.labels[0]]!r}")
    say_wording(args, data)


def _prompt(data: Encoded, tokenizer: Tokenizer) -> str:
    """The first row's prompt, with its special tokens in words; without what was cut off."""
    text, row = data.examples[0].prompt, data.tokens[0]
    whole = tokenizer.encode(text, data.wording.style == "plain")
    return text if len(whole) == len(row) else "... " + tokenizer.decode(row)


def _shown(text: str) -> list[str]:
    lines = [
        line if len(line) <= COLUMNS else f"{line[: COLUMNS - 4]} ..." for line in text.split("\n")
    ]
    if len(lines) <= LINES:
        return lines
    half = LINES // 2
    return [*lines[:half], f"... {len(lines) - 2 * half} more lines ...", *lines[-half:]]


def say_defaults(args: argparse.Namespace, trainer: Trainer) -> None:
    """The settings of REASONS that the user did not give."""
    epochs = trainer.config.steps / trainer.order.steps_per_epoch
    shown = []
    for name, reason in REASONS.items():
        if vars(args)[name] is None and (name != "steps" or args.epochs is None):
            more = f"{epochs:.3g} epochs; " if name == "steps" else ""
            why = reason.format(rows=len(trainer.data.labels))
            shown.append(f"--{name} {getattr(trainer.config, name):g} ({more}{why})")
    if shown:
        say(args, f"defaults: {', '.join(shown)}")


# --- on the way -----------------------------------------------------------------------------------


class Talk:
    """Shows a training's numbers in a progress bar, and warns once where it learns nothing."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer, bar: Any) -> None:
        self.args, self.bar, self.config = args, bar, trainer.config
        self.rows, self.classes = len(trainer.data.labels), len(trainer.data.classes)
        self.recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.held: float | None = None
        self.all: deque[float] = deque(maxlen=max(WINDOW, self.config.steps // 10))

    def on_step(self, record: dict[str, float]) -> None:
        self.recent.append(record)
        self.all.append(record["nll"])
        self.held = record.get("heldout_nll", self.held)
        self.bar.set_postfix(self.numbers(), refresh=False)
        self.bar.update(int(record["step"]) + 1 - self.bar.n)
        done, asked = int(record["step"]) + 1, max(WINDOW, math.ceil(self.config.steps / 4))
        if done == asked and done < self.config.steps and self._as_guessing():
            self.warn(
                f"after {done} of {self.config.steps} steps the NLL is {self.nll:.2f}, no better "
                f"than guessing (ln {self.classes} = {math.log(self.classes):.2f}): check the "
                "prompt above, or try a higher --lr"
            )

    def numbers(self) -> dict[str, str]:
        """What the bar shows. NLL and accuracy are means of the last steps."""
        last = self.recent[-1]
        mean = {k: sum(r[k] for r in self.recent) / len(self.recent) for k in ("nll", "accuracy")}
        shown = {"nll": f"{mean['nll']:.3f}", "acc": f"{mean['accuracy']:.2f}"}
        weight = f" x {self.config.beta:g}" if self.config.objective == "elbo" else ""
        if last["kl"]:
            shown["KL/N"] = f"{last['kl'] / self.rows:.3g}{weight}"
        if last["sigma"]:
            shown["sigma"] = f"{last['sigma']:.3g}"
        if self.held is not None:
            shown["held-out"] = f"{self.held:.3f}"
        return shown

    @property
    def nll(self) -> float:
        return sum(self.all) / len(self.all)

    def _as_guessing(self) -> bool:
        return self.nll >= NEAR * math.log(self.classes)

    def warn(self, text: str) -> None:
        if not self.args.process:
            self.bar.write(f"warning: {text}", file=sys.stderr)


# --- at the end -----------------------------------------------------------------------------------


def say_end(args: argparse.Namespace, trainer: Trainer, watch: Watch | None) -> dict[str, Any]:
    """Whether it has learnt, where things are, and the next command; returns the verdict."""
    records = _records(args.out / "train.jsonl")
    found = verdict(trainer, watch, records)
    if found["rows"]:  # an older log has no accuracies
        say(args, _sentence(found))
    if watch and watch.keep:
        say(args, f"kept: the adapters after step {watch.step} of {trainer.config.steps}, with the "
            f"lowest held-out NLL ({watch.nll:.4f})")  # fmt: skip
    say(args, f"written: {args.out / 'adapter.safetensors'}, run.json, train.jsonl (each step)")
    if found["rows"] and not found["learnt"]:
        say(args, "try other settings: more --steps, another --lr or --prompt-template")
    say(args, f"next: {_next(args)}")
    return found


def verdict(
    trainer: Trainer, watch: Watch | None, records: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Whether a run answers better than chance, by a one-sided binomial test at 1 %.

    The rows are those held out, at the last step or the one that was kept; without them, those of
    the last epoch of training, each before the step that it was in. chance: the share of the most
    frequent label of the training rows, at least 1 / C. p: the probability that answers which are
    right at that rate are right as often.
    """
    labels = trainer.data.labels
    chance = max(max(Counter(labels).values()) / len(labels), 1 / len(trainer.data.classes))
    looks = [r for r in records if "heldout_nll" in r]
    if watch and looks:
        kept = [r for r in looks if int(r["step"]) + 1 == watch.step] if watch.keep else []
        last = (kept or looks)[-1]
        rows, right = len(watch.data.labels), last["heldout_accuracy"] * len(watch.data.labels)
        nll = last["heldout_nll"]
    else:
        epoch = records[-trainer.order.steps_per_epoch :]
        sizes = [len(trainer.order.indices(int(r["step"]))) for r in epoch]
        rows = sum(sizes)
        right = sum(n * r["accuracy"] for n, r in zip(sizes, epoch, strict=True))
        nll = sum(n * r["nll"] for n, r in zip(sizes, epoch, strict=True)) / max(1, rows)
    p = at_least(round(right), rows, chance)
    return {"learnt": p < SURE, "rows": rows, "right": round(right), "chance": chance, "p": p,
            "nll": nll, "guessing": math.log(len(trainer.data.classes)),
            "held_out": bool(watch and looks)}  # fmt: skip


def at_least(right: int, rows: int, chance: float) -> float:
    """The probability of `right` or more successes in `rows` trials, each with `chance`."""
    if right <= 0 or chance >= 1:
        return 1.0
    return binomial_tail(rows, rows - right, 1 - chance)  # so few are wrong


def _sentence(found: dict[str, Any]) -> str:
    share, n = found["right"] / max(1, found["rows"]), found["rows"]
    of = f"{n} held-out rows" if found["held_out"] else f"{n} training rows of the last epoch"
    p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.2g}"
    start = "learnt" if found["learnt"] else "not learnt"
    text = (
        f"{start}: {100 * share:.1f} % of the {of} are answered right, by chance "
        f"{100 * found['chance']:.1f} % ({p}); NLL {found['nll']:.3f}, guessing "
        f"{found['guessing']:.3f}"
    )
    return text if found["held_out"] else f"{text}; --holdout 0.2 would measure new rows"


def _next(args: argparse.Namespace) -> str:
    words = ["scalabl", "evaluate", "--run", str(args.out), "--data", "TEST_FILE"]
    for name in ("format", "text_column", "label_column"):
        value = vars(args)[name]
        words += [f"--{name.replace('_', '-')}", value] if value else []
    words += ["--temperature"] if args.holdout else []
    return shlex.join(words)


def _records(log: Path) -> list[dict[str, float]]:
    """The records of a log, without lines that are none: it may have been damaged."""
    records = []
    for line in log.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if {"step", "nll", "accuracy"} <= record.keys():
                records.append(record)
        except (ValueError, AttributeError):
            continue
    return records
