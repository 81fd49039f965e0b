"""The results of a model on a data set: metrics.json, predictions.jsonl and report.html."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.config import ADAPTERS
from ..support.errors import InputError
from ..support.fields import json_text
from ..support.files import atomic_write_texts, read_json
from ..training import ranks as distributed
from ..training import savepoints
from . import metrics
from .answering import Answers, chosen
from .report import document
from .rule import Rule, answered, decided
from .sequential import Auto

BASE = "base"  # the method of a model without adapters
# Two results that differ in one of these must not overwrite each other.
_WHOSE = {"data_sha256": "data file", "adapter_sha256": "run", "model": "model"}


def results_folder(run: Path | str, data: Path | str) -> Path:
    """RUN/NAME for the results of a run on one data set; NAME is the name of its file."""
    name = re.sub(r"[^\w-]+", "_", Path(data).resolve().stem).strip("_") or "data"
    return Path(run) / (name if name != savepoints.FOLDER else f"{name}_data")


def check_results(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if FOLDER has results of another data file, or of another model.

    settings: those of `score`. Results of the same model on the same file may be overwritten,
    whatever the other settings were.
    """
    path = folder / "metrics.json"
    if not path.exists():
        return
    theirs = read_json(path).get("settings")
    theirs = theirs if isinstance(theirs, dict) else {}
    for key, whose in _WHOSE.items():
        if theirs.get(key) != settings[key]:
            raise InputError(
                f"{folder}: holds results of another {whose}: give --force or --out DIR"
            )


@dataclass(frozen=True)
class Results:
    """metrics: the content of metrics.json. report: what `document` takes. threshold: the
    least confidence that is answered."""

    answers: Answers
    metrics: dict[str, Any]
    report: dict[str, Any]
    threshold: float | None = None

    def write(self, *folders: Path) -> None:
        """Write metrics.json, predictions.jsonl and report.html to all folders, or nothing.

        Of several ranks, the first writes. Raises InputError if a file cannot be written.
        """
        if distributed.rank():
            return
        texts = {
            "metrics.json": json_text(self.metrics, indent=2) + "\n",
            "predictions.jsonl": "".join(_rows(self.answers, self.threshold)),
            "report.html": document(self.report),
        }
        # The first file is written last: where there is a metrics.json, the others are there too.
        atomic_write_texts({f / name: text for name, text in texts.items() for f in folders})


def score(
    info: Mapping[str, Any],
    answers: Answers,
    *,
    seed: int,
    design: str = "independent",
    bins: int = 15,
    calibration: Answers | None = None,
    ood: Answers | None = None,
    settings: Mapping[str, Any] | None = None,
    run: str | None = None,
    rule: Rule | None = None,
) -> Results:
    """All scores of `answers`, with the facts that they depend on.

    info: facts of the run, as of `run_facts`, with the data's file as "data". design: the one of
    `answers`, reported where the adapters drew. calibration: held-out answers to fit a temperature
    on; "temperature" then holds it and the metrics after scaling. ood: answers to another data set;
    "ood" then holds how well entropy and mutual information tell it from this one, and the other
    metrics over its rows whose label the head has ("n_scored" of "n"). settings: everything that
    decides the results, kept for `check_results`. run: its name, for the report. rule: the run's,
    whose temperature the answers have; "stored_temperature" then holds it, and "decision" coverage
    and accuracy at its threshold.
    """
    settings = dict(settings or {})
    result = _facts(info, answers, seed, design, bins, settings)
    result.update(summarise(answers.prediction.probs, answers.labels, bins))
    draws, settled = answers.draws, answers.settled
    if isinstance(answers.samples, Auto) and draws is not None and settled is not None:
        result["auto"] = {
            **dataclasses.asdict(answers.samples),
            "mean_draws": draws.double().mean().item(),
            "open": int((~settled).sum()),
        }
    models = [_report_model(result["method"], answers.prediction.probs, answers.labels, result)]
    if calibration is not None:
        scaled, result["temperature"] = _calibrated(answers, calibration, bins)
        name = f"{result['method']}, temperature {result['temperature']['value']:.3f}"
        models.append(_report_model(name, scaled, answers.labels, result["temperature"]))
    if ood is not None:
        shared = {key: result[key] for key in ("method", "kl", "samples", "bins")}
        result["ood"] = {**shared, **_out_of_distribution(answers, ood, bins)}
        scores = {
            name: (getattr(answers.prediction, name), getattr(ood.prediction, name))
            for name in metrics.UNCERTAINTIES
        }
        models[0]["ood"] = {
            "name": "out of distribution", "metrics": result["ood"], "scores": scores
        }  # fmt: skip
    rule = rule or {}
    if rule.get("temperature"):
        result["stored_temperature"] = rule["temperature"]["value"]
    least = rule.get("threshold", {}).get("value")
    if least is not None:
        result["decision"] = answered(answers, least)
    result["settings"] = settings
    return Results(answers, result, _report(info, answers, result, models, run, rule), least)


def _report(
    info: Mapping[str, Any],
    answers: Answers,
    result: Mapping[str, Any],
    models: list[dict[str, Any]],
    run: str | None,
    rule: Rule,
) -> dict[str, Any]:
    """What `document` takes."""
    about = {
        "run": run,
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "model": Path(info["model"]).name,
        **{key: result[key] for key in ("data", "method", "kl", "samples", "bins", "seed", "n")},
    }
    rows = {
        "ids": [example.id for example in answers.examples],
        "texts": [example.question or example.prompt for example in answers.examples],
        "choices": [example.choices for example in answers.examples],
    }
    title = "Evaluation of a fine-tuned Llama"
    own = result.get("decision") and {**rule["threshold"], **result["decision"]}
    return {"title": title, "about": about, "models": models, "rows": rows, "decision": own}


def _facts(
    info: Mapping[str, Any],
    answers: Answers,
    seed: int,
    design: str,
    bins: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    samples, method, posterior = answers.samples, info["adapter"]["method"], info.get("posterior")
    variational = method != BASE and ADAPTERS[method].variational
    drawn = isinstance(samples, int) and samples > 0 and not posterior
    wording = answers.encoded.wording.facts() if answers.encoded else {}
    return {
        "data": Path(info["data"] or "").name,
        "data_sha256": settings.get("data_sha256"),
        "limit": settings.get("limit"),
        "method": posterior or method,
        "kl": info["train"]["kl"] if variational else None,
        "objective": info["train"]["objective"],
        "prompt_template": info.get("prompt_template"),
        **wording,
        "samples": "auto" if isinstance(samples, Auto) else samples,
        **({"design": design} if drawn else {}),
        "seed": seed,
        "bins": bins,
    }


def summarise(probs: Tensor, labels: Tensor, bins: int) -> dict[str, Any]:
    """n, acc, ece, nll, brier, aurc, and 95 % bootstrap intervals under "intervals".

    The intervals cover the choice of test questions: they describe this run and not its method.
    """
    return {
        "n": len(labels),
        **metrics.scores(probs, labels, bins),
        "aurc": metrics.risk_coverage(probs, labels).area,
        "intervals": metrics.bootstrap_intervals(probs, labels, bins=bins),
    }


def _calibrated(answers: Answers, held_out: Answers, bins: int) -> tuple[Tensor, dict[str, Any]]:
    """Probabilities after scaling by a temperature fitted on `held_out`, and their scores."""
    temperature = metrics.fit_temperature(held_out.prediction.probs.log(), held_out.labels)
    scaled = metrics.apply_temperature(answers.prediction.probs, temperature)
    fitted = {"value": temperature, "n_fit": len(held_out.labels)}
    return scaled, {**fitted, **summarise(scaled, answers.labels, bins)}


def _out_of_distribution(inside: Answers, outside: Answers, bins: int) -> dict[str, Any]:
    probs, labels = outside.prediction.probs, outside.labels
    known = metrics.answerable(probs, labels)
    scored = summarise(probs[known], labels[known], bins) if known.any() else {}
    return {
        **scored,
        "n": len(labels),
        "n_scored": int(known.sum()),
        **metrics.separation(inside.prediction._asdict(), outside.prediction._asdict()),
    }


def _report_model(
    name: str, probs: Tensor, labels: Tensor, values: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "probs": probs,
        "labels": labels,
        "metrics": {key: values[key] for key in (*metrics.SCORES, "aurc")},
        "intervals": values["intervals"],
    }


def _rows(answers: Answers, threshold: float | None = None) -> Iterator[str]:
    """One JSON line per example, in the data set's order."""
    p = answers.prediction
    columns = (p.probs, p.entropy, p.expected_entropy, p.mutual_information, answers.labels)
    auto = {"draws": answers.draws, "settled": answers.settled}
    more = {name: column.tolist() for name, column in auto.items() if column is not None}
    if threshold is not None:
        more["decision"] = [decided(c, threshold) for c in chosen(answers)[1].tolist()]
    lists = [c.tolist() for c in columns]
    for i, (example, *row) in enumerate(zip(answers.examples, *lists, strict=True)):
        probs, entropy, expected, information, label = row
        record = {
            "id": example.id,
            "label": label,
            "prediction": max(range(len(probs)), key=probs.__getitem__),
            "probs": probs,
            "entropy": entropy,
            "expected_entropy": expected,
            "mutual_information": information,
            **{name: column[i] for name, column in more.items()},
        }
        yield json_text(record) + "\n"
