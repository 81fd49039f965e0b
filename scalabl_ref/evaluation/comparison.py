"""The results of a study: scores by replicate, costs, and verdicts. `tables` prints them.

The input is folders of answers, one for each replicate: a training with its own subset, initial
values and order. A folder has answers.json, with facts about the model (its "seed" is the number of
the replicate), and a file for each data set with the labels and the tensors of `predict`.

Each verdict is the result of a test. Ours is "better" or "worse" than a rival if the p of their
difference, over replicates and questions (see `inference`) and after Holm's correction, is below
ALPHA. It is "no worse" if the test rejects that its NLL is higher by MARGIN or more, with a p below
ALPHA after Holm's correction. Otherwise they are "not told apart".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..support.errors import InputError
from ..support.files import read_json
from ..support.tensors import load_tensors
from . import metrics
from .inference import difference, holm, non_inferior

Row = dict[str, Any]
SCALED = " + temperature"
KINDS = ("", ""), (SCALED, SCALED)  # ours and the rival, without and with temperatures
ALPHA = 0.05
MARGIN = 0.03  # nats


class Answers(NamedTuple):
    """One method's answers to one set: by replicate, its number and probabilities; the labels."""

    numbers: list[int]
    probs: list[Tensor]
    labels: Tensor

    def per_question(self, bins: int) -> dict[str, Tensor]:
        """The scores of each replicate (row) and question (column), by name."""
        rows = [metrics.per_question(p, self.labels, bins) for p in self.probs]
        return {key: torch.stack([row[key] for row in rows]) for key in metrics.SCORES}

    def averages(self, bins: int) -> Row:
        """The scores by replicate, their means, and their standard deviations under "sd"."""
        each = [metrics.scores(p, self.labels, bins) for p in self.probs]
        return {
            "replicates": [{"replicate": n, **s} for n, s in zip(self.numbers, each, strict=True)],
            **{key: fmean([s[key] for s in each]) for key in metrics.SCORES},
            "sd": {key: _sd([s[key] for s in each]) for key in metrics.SCORES},
        }


def scores(folder: Path, name: str, bins: int) -> dict[str, float]:
    """acc, ece, nll and brier of one folder's answers to one set."""
    answers = _load(folder, name)
    return metrics.scores(answers["probs"], answers["labels"], bins)


def summary(
    models: Mapping[str, Sequence[Path]],
    validation: Mapping[str, float],
    bins: int,
    ood: Iterable[str] = (),
    shifted: Iterable[str] = (),
    families: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Rows of all methods, with and without temperature, and the verdicts.

    models: folders by method; methods are compared on the replicates that both have. validation:
    the NLL on the validation split of each of our methods; it should come from runs that are not
    replicates. shifted: further labelled sets, scored and compared like the test set. ood: names of
    the sets out of distribution. families: groups of methods, by name, that are compared within the
    group; all methods if not given.

    In each family, our method with the lowest NLL in `validation` is compared with every rival
    ("verdict"), without and with temperatures. "pairs" compares the NLL of each of our methods with
    each rival's, also ours without a temperature with the rival's with one, which needs labels.

    Raises InputError if replicates answered different questions of one set.
    """
    sets = ("test", *shifted)
    rows: dict[str, Row] = {}
    tested: dict[str, dict[str, Answers]] = {name: {} for name in sets}
    for method, folders in models.items():
        for name, temperatures in ((method, None), (method + SCALED, _temperatures(folders))):
            for each in sets:
                tested[each][name] = answers_of(folders, each, temperatures)
            averages = {each: tested[each][name].averages(bins) for each in sets}
            rows[name] = {**_about(folders), **averages.pop("test"), "shifted": averages}
        rows[method]["ood"] = {name: _out_of_distribution(folders, name, bins) for name in ood}
    families = families or {"all": list(models)}
    verdicts = {name: _verdicts(tested[name], validation, families, bins) for name in sets}
    return {"methods": rows, **verdicts.pop("test"), "shifted": verdicts}


def _verdicts(
    tested: Mapping[str, Answers],
    validation: Mapping[str, float],
    families: Mapping[str, Sequence[str]],
    bins: int,
) -> dict[str, list[Row]]:
    """ "verdict" and "pairs" of `summary`, on one set."""
    per_question = {name: answers.per_question(bins) for name, answers in tested.items()}

    def compared(
        score: str, ours: Sequence[str], others: Sequence[str], kinds: Sequence[tuple[str, str]]
    ) -> list[Row]:
        found = []
        for own, theirs in kinds:
            pairs = [(name + own, other + theirs) for name in ours for other in others]
            found += _compared(score, pairs, tested, per_question)
        return found

    verdict, seen = [], []
    for family, names in families.items():
        ours = sorted((name for name in names if name in validation), key=validation.__getitem__)
        others = [name for name in names if name not in validation]
        if (ours, others) in seen:
            continue
        seen.append((ours, others))
        for score in metrics.SCORES:
            verdict += [{"family": family, **e} for e in compared(score, ours[:1], others, KINDS)]
    ours = [name for name in tested if name in validation]
    others = [n for n in tested if n not in validation and not n.endswith(SCALED)]
    return {"verdict": verdict, "pairs": compared("nll", ours, others, (*KINDS, ("", SCALED)))}


def _compared(
    score: str,
    pairs: Sequence[tuple[str, str]],
    tested: Mapping[str, Answers],
    per_question: Mapping[str, Mapping[str, Tensor]],
) -> list[Row]:
    """The verdict on each pair (ours, rival) in one score. Holm's correction is over these pairs.

    An entry has ours minus the rival's with the ends of its interval, p after Holm's correction,
    and the number of replicates that both have. With fewer than two replicates or questions, the
    pair is "untested".
    """
    found = []
    for first, second in pairs:
        if not torch.equal(tested[first].labels, tested[second].labels):
            raise InputError(f"{first!r} and {second!r} answered different questions")
        numbers = sorted(set(tested[first].numbers) & set(tested[second].numbers))
        a, b = (
            per_question[name][score][[tested[name].numbers.index(n) for n in numbers]]
            for name in (first, second)
        )
        entry: Row = {"score": score, "ours": first, "rival": second, "replicates": len(numbers)}
        if min(a.shape) < 2:
            found.append({**entry, "word": "untested"})
            continue
        d = difference(a, b)
        entry |= {"difference": d.mean, "low": d.low, "high": d.high, "p": d.p}
        if score == "nll":
            entry["limit"], entry["p_margin"] = non_inferior(a, b, MARGIN)
        found.append(entry)
    for key in ("p", "p_margin"):
        family = [entry for entry in found if key in entry]
        for entry, p in zip(family, holm([entry[key] for entry in family]), strict=True):
            entry[key] = p
    return [entry if "word" in entry else {**entry, "word": _word(entry)} for entry in found]


def _word(entry: Row) -> str:
    """The verdict on ours that the tests of a pair allow."""
    if entry["p"] < ALPHA:
        return "better" if (entry["difference"] > 0) == (entry["score"] == "acc") else "worse"
    return "no worse" if entry.get("p_margin", 1.0) < ALPHA else "not told apart"


def _load(folder: Path, name: str) -> dict[str, Tensor]:
    return load_tensors(folder / f"{name}.safetensors")[0]


def _facts(folders: Sequence[Path]) -> list[dict[str, Any]]:
    return [read_json(folder / "answers.json") for folder in folders]


def answers_of(
    folders: Sequence[Path], name: str, temperatures: Sequence[float] | None = None
) -> Answers:
    found = [_load(folder, name) for folder in folders]
    labels = found[0]["labels"]
    for folder, answers in zip(folders, found, strict=True):
        if not torch.equal(answers["labels"], labels):
            raise InputError(f"{folder} and {folders[0]} answer different questions of {name!r}")
    probs = [answers["probs"] for answers in found]
    if temperatures is not None:
        probs = [metrics.apply_temperature(p, t) for p, t in zip(probs, temperatures, strict=True)]
    return Answers([about["seed"] for about in _facts(folders)], probs, labels)


def _temperatures(folders: Sequence[Path]) -> list[float]:
    """Of each replicate, fitted on its validation answers."""
    held = [_load(folder, "validation") for folder in folders]
    return [metrics.fit_temperature(h["probs"].log(), h["labels"]) for h in held]


def _about(folders: Sequence[Path]) -> Row:
    """The cost of one model, averaged over replicates.

    parameters: all numbers stored beside the base model. draws: averaged for an answer. Seconds:
    training; fitting a posterior to a trained run (in older folders a part of the training); one
    answer.
    """
    about = _facts(folders)
    widths = about[0]["widths"]
    return {
        "trial": about[0]["trial"],
        "parameters": about[0]["parameters"],
        "draws": about[0].get("draws"),
        "train_seconds": fmean([a["train_seconds"] for a in about]),
        "fit_seconds": fmean([a.get("fit_seconds", 0.0) for a in about]),
        "answer_seconds": fmean([a["answer_seconds"] for a in about]),
        "peak_bytes": max(a["peak_bytes"] for a in about),
        "widths": {name: fmean([a["widths"][name] for a in about]) for name in widths},
    }


def _out_of_distribution(folders: Sequence[Path], name: str, bins: int) -> dict[str, float]:
    """Means over the replicates, for one data set out of distribution.

    The AUROC of telling it from the test set by each uncertainty, the share of its rows whose label
    is among the model's classes ("scored"), and the scores over these rows.
    """
    out: dict[str, list[float]] = {}
    for folder in folders:
        inside, outside = _load(folder, "test"), _load(folder, name)
        known = metrics.answerable(outside["probs"], outside["labels"])
        values = {**metrics.separation(inside, outside), "scored": known.double().mean().item()}
        if known.any():
            values |= metrics.scores(outside["probs"][known], outside["labels"][known], bins)
        for key, value in values.items():
            out.setdefault(key, []).append(value)
    return {key: fmean(values) for key, values in out.items()}


def _sd(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of one value."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else 0.0
