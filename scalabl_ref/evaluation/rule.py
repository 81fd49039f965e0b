"""The decision rule of a run, RUN/rule.json: its temperature and its threshold.

Both belong to answers that are made in one way: by these weights, with these draws, seed and
design, and the run's own prompts. `ruled` gives them to a classifier that answers in this way, and
refuses another one. The temperature is applied to the averaged probabilities; the threshold is of
the confidence after it. So a new temperature removes the threshold. Where no threshold keeps the
promise, it is infinite, null in the file: every answer goes to a human.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from torch import Tensor

from ..data import Example
from ..support.errors import InputError
from ..support.fields import check, json_text
from ..support.files import atomic_write_text, read_json, sha256
from . import metrics
from .answering import Answers, Samples, chosen
from .sequential import Auto
from .threshold import USUAL, Threshold, rows_needed, threshold

if TYPE_CHECKING:
    from .classifier import Classifier

FILE = "rule.json"
ANSWER, HUMAN = "answer", "human"
FEW = 50  # rows, fewer than which are worth a warning
_DRAWS = int | Literal["exact"] | dict[str, float]  # the last are the fields of an `Auto`
_HOW: dict[str, Any] = {"weights_sha256": str, "samples": _DRAWS, "seed": int, "design": str}
_FIT = {"n": int, "data": str, "data_sha256": str, "rows": str}  # rows: `row_digests` of them
_PARTS: dict[str, dict[str, Any]] = {
    "temperature": {**_FIT, "value": float, "nll": list[float], "ece": list[float]},
    "threshold": {**_FIT, "value": float | None, "accuracy": float, "level": float,
                  "coverage": float, "answered": int, "right": int, "bound": float},
}  # fmt: skip

Rule = dict[str, Any]  # "how", and "temperature" and "threshold", each absent or as in _PARTS


def read_rule(run: Path | str) -> Rule:
    """What RUN/rule.json says; {} without one. Raises InputError if it is broken."""
    path = Path(run) / FILE
    if not path.exists():
        return {}
    rule = read_json(path)
    try:
        check(rule, {"how": dict[str, Any], **dict.fromkeys(_PARTS, dict[str, Any])})
        for name, types in {"how": _HOW, **_PARTS}.items():
            part = rule.get(name, {})
            if (part or name == "how") and set(part) != set(types):
                raise InputError(f"{name} must have the keys {', '.join(types)}")
            check(part, types, f"{name}: ")
        samples_of(rule)
    except InputError as error:
        raise InputError(f"{path}: {error}: remove it with `scalabl calibrate --run {run} "
                         "--clear`") from None  # fmt: skip
    if rule.get("threshold", {}).get("value", 0) is None:
        rule["threshold"]["value"] = math.inf
    return rule


def write_rule(run: Path | str, rule: Rule) -> None:
    atomic_write_text(Path(run) / FILE, json_text(rule, indent=2) + "\n")


def clear_rule(run: Path | str, part: str | None = None) -> bool:
    """Remove the rule, or one `part` of it; returns whether there was one. A file that cannot be
    read is removed as well."""
    path = Path(run) / FILE
    if not path.exists():
        return False
    rule: Rule = {}
    if part == "threshold":
        rule = read_rule(run)
        if rule.pop(part, None) is None:
            return False
    if rule.get("temperature"):
        write_rule(run, rule)
    else:
        path.unlink()
    return True


def how(clf: Classifier) -> dict[str, Any]:
    """All that decides a classifier's answers besides its wording, as rule.json keeps it."""
    samples = clf.samples
    return {
        "weights_sha256": clf.weights_sha256 or weights_sha256(clf.run),
        "samples": dataclasses.asdict(samples) if isinstance(samples, Auto) else samples,
        "seed": clf.seed,
        "design": clf.design,
    }


def weights_sha256(run: Path | str) -> str:
    """Of the names and contents of the tensors of a run: its adapters, posterior and members."""
    digest = hashlib.sha256()
    for path in sorted(
        [*Path(run).glob("*.safetensors"), *Path(run).glob("member-*/*.safetensors")]
    ):
        digest.update(f"{path.relative_to(run).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def samples_of(rule: Rule | None) -> Samples | None:
    """The draws that a rule was fitted with; None without a rule. Raises InputError for those of
    an `Auto` that cannot be one."""
    if not rule:
        return None
    samples = rule["how"]["samples"]
    if not isinstance(samples, dict):
        return samples
    check(samples, get_type_hints(Auto), "how: samples: ")
    return Auto(**samples)


def ruled(clf: Classifier, rule: Rule | None, own_wording: bool = True) -> Classifier:
    """The classifier with the temperature and the threshold of `rule`.

    own_wording: whether it asks with the run's own prompts. Raises InputError if it answers in
    another way than the one that the rule was fitted to.
    """
    if not rule:
        return clf
    theirs, ours = rule["how"], how(clf)
    parts = " and ".join(name for name in _PARTS if rule.get(name))
    again = f"fit again with `scalabl calibrate --run {clf.run} --data FILE`"
    if theirs["weights_sha256"] != ours["weights_sha256"]:
        raise InputError(
            f"{clf.run}: its {parts} in {FILE} is of other weights: {again}, or remove it with "
            f"`scalabl calibrate --run {clf.run} --clear`"
        )
    if not own_wording:
        raise InputError(f"{clf.run}: its {parts} is of the run's own prompts: leave their options "
                         "out, or give --raw")  # fmt: skip
    if theirs != ours:
        given = " ".join(
            f"--{key} {_option(theirs[key])}"
            for key in ("samples", "seed", "design")
            if theirs[key] != ours[key]
        )
        raise InputError(f"{clf.run}: its {parts} is of other draws: give {given}, or {again}; "
                         "with --raw, predict and evaluate answer without it")  # fmt: skip
    return dataclasses.replace(
        clf,
        weights_sha256=ours["weights_sha256"],
        temperature=rule.get("temperature", {}).get("value"),
        threshold=rule.get("threshold", {}).get("value"),
    )


def _option(value: Any) -> str:
    if isinstance(value, Mapping):  # Auto, whose error is no option
        return f"auto --tolerance {value['tolerance']} --most {value['most']}"
    return str(value)


# --- fits -----------------------------------------------------------------------------------------


def row_digests(examples: Sequence[Example]) -> str:
    """Of each row the first 8 bytes of a SHA-256, in hexadecimal, with spaces between them.

    A row is its question and its choices in any order, whatever its label.
    """
    rows = (json.dumps([e.question or e.prompt, *sorted(e.choices)]).encode() for e in examples)
    return " ".join(hashlib.sha256(row).hexdigest()[:16] for row in rows)


def seen_in(digests: str, others: str) -> int:
    """How many of the rows are among `others`; both as `row_digests` gives them."""
    known = set(others.split())
    return sum(row in known for row in digests.split())


def calibrated(answers: Answers, bins: int = 15) -> Rule:
    """The "temperature" of a rule: fitted on these answers, with NLL and ECE before and after."""
    probs, labels = answers.prediction.probs, answers.labels
    value = metrics.fit_temperature(probs.log(), labels)
    scaled = metrics.apply_temperature(probs, value)
    return {
        "value": value,
        "nll": [metrics.nll(p, labels) for p in (probs, scaled)],
        "ece": [metrics.ece(p, labels, bins) for p in (probs, scaled)],
        "n": len(labels),
    }


def outcomes(answers: Answers) -> tuple[Tensor, Tensor]:
    """Confidence (N,) of each answer, and whether it is right (N,) bool."""
    place, confidence = chosen(answers)
    return confidence, place == answers.labels


def thresholded(answers: Answers, accuracy: float, level: float) -> Rule:
    """The "threshold" of a rule: the one that `threshold` chooses; infinite if it chooses none."""
    confidence, right = outcomes(answers)
    found = threshold(confidence, right, accuracy, level)
    value = (found or Threshold(math.inf, 0.0, 0, 0, 0.0))._asdict()
    return {
        "value": value.pop("confidence"), **value, "accuracy": accuracy, "level": level,
        "n": len(right),
    }  # fmt: skip


def promises(
    answers: Answers, accuracy: float, level: float
) -> list[tuple[float, Threshold | None, int | None]]:
    """For each of the USUAL accuracies and `accuracy`: its threshold, and the rows needed if there
    is none."""
    confidence, right = outcomes(answers)
    found = []
    for target in sorted({*USUAL, accuracy}):
        chosen_one = threshold(confidence, right, target, level)
        needed = None if chosen_one else rows_needed(confidence, right, target, level)
        found.append((target, chosen_one, needed))
    return found


def decided(confidence: float, least: float | None) -> str | None:
    """ "answer" or "human"; None without a threshold."""
    return None if least is None else ANSWER if confidence >= least else HUMAN


def answered(answers: Answers, least: float) -> dict[str, Any]:
    """What the threshold does on labelled rows: coverage, and the accuracy among the answered."""
    confidence, right = outcomes(answers)
    kept = confidence >= least
    count, hits = int(kept.sum()), int(right[kept].sum())
    return {
        "threshold": least,
        "coverage": count / len(right),
        "answered": count,
        "right": hits,
        "acc": hits / count if count else None,
    }
