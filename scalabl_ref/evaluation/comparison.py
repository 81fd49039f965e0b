"""The results of a study: scores by seed, significant differences, the tables and the page.

The input are folders of answers, one for each seed. A folder has answers.json, with facts about the
model, and a file for each data set with the labels and the tensors of `predict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.files import read_json
from ..support.tensors import load_tensors
from . import metrics
from .report import write_report

Row = dict[str, Any]
SCALED = " + temperature"


def scores(folder: Path, name: str, bins: int) -> dict[str, float]:
    """acc, ece, nll and brier of one folder's answers to one set."""
    answers = _load(folder, name)
    return metrics.scores(answers["probs"], answers["labels"], bins)


def row(folders: Sequence[Path], bins: int) -> Row:
    """Scores and cost of one model on the test set, by seed and averaged."""
    return _row(folders, _probs(folders), bins)


def summary(
    models: Mapping[str, Sequence[Path]],
    validation: Mapping[str, float],
    ours: Iterable[str],
    bins: int,
    ood: Iterable[str],
) -> dict[str, Any]:
    """Rows of all methods, with and without temperature; the best of each score; the verdict.

    models: folders by method, equally many for each. validation: each method's NLL on the
    validation split. ours: methods of this project; the best of them is compared with the best of
    the others. ood: names of the data sets out of distribution.
    """
    rows: dict[str, Row] = {}
    probs: dict[str, list[Tensor]] = {}
    for method, folders in models.items():
        plain = _probs(folders)
        for name, each in ((method, plain), (method + SCALED, _scaled(folders, plain))):
            probs[name] = each
            rows[name] = _row(folders, each, bins)
        rows[method]["ood"] = {name: _out_of_distribution(folders, name, bins) for name in ood}
    labels = _load(next(iter(models.values()))[0], "test")["labels"]
    best = {key: _best(key, rows, probs, labels, bins) for key in metrics.SCORES}
    verdicts = []
    mine, others = set(ours) & models.keys(), models.keys() - set(ours)
    if mine and others:
        chosen = min(sorted(mine), key=lambda name: validation[name])
        for ending in ("", SCALED):
            rival = min(sorted(others), key=lambda name: rows[name + ending]["nll"]) + ending
            first = chosen + ending
            low, high = metrics.paired_intervals(probs[first], probs[rival], labels, bins)["nll"]
            verdicts.append(
                {"ours": first, "rival": rival, "difference": [low, high], "no_worse": not low > 0}
            )
    return {"methods": rows, "best": best, "verdict": verdicts}


def _load(folder: Path, name: str) -> dict[str, Tensor]:
    return load_tensors(folder / f"{name}.safetensors")[0]


def _probs(folders: Sequence[Path]) -> list[Tensor]:
    return [_load(folder, "test")["probs"] for folder in folders]


def _scaled(folders: Sequence[Path], probs: Sequence[Tensor]) -> list[Tensor]:
    """probs after scaling by each seed's temperature, fitted on its validation answers."""
    out = []
    for folder, p in zip(folders, probs, strict=True):
        held = _load(folder, "validation")
        temperature = metrics.fit_temperature(held["probs"].log(), held["labels"])
        out.append(metrics.apply_temperature(p, temperature))
    return out


def _row(folders: Sequence[Path], probs: Sequence[Tensor], bins: int) -> Row:
    """answer_seconds: for one example. parameters: all numbers stored beside the base model."""
    about = [read_json(folder / "answers.json") for folder in folders]
    labels = _load(folders[0], "test")["labels"]
    seeds = [metrics.scores(p, labels, bins) for p in probs]
    widths = about[0]["widths"]
    return {
        "trial": about[0]["trial"],
        "parameters": about[0]["parameters"],
        "train_seconds": _mean([a["train_seconds"] for a in about]),
        "answer_seconds": _mean([a["answer_seconds"] for a in about]),
        "peak_bytes": max(a["peak_bytes"] for a in about),
        "widths": {name: _mean([a["widths"][name] for a in about]) for name in widths},
        "seeds": seeds,
        **{key: _mean([s[key] for s in seeds]) for key in metrics.SCORES},
        "sd": {key: _sd([s[key] for s in seeds]) for key in metrics.SCORES},
    }


def _out_of_distribution(folders: Sequence[Path], name: str, bins: int) -> dict[str, float]:
    """Means over the seeds, for one data set out of distribution.

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
    return {key: _mean(values) for key, values in out.items()}


def _best(
    key: str,
    rows: Mapping[str, Row],
    probs: Mapping[str, Sequence[Tensor]],
    labels: Tensor,
    bins: int,
) -> dict[str, Any]:
    """The best row by `key`, the runner-up, and whether the difference is significant.

    It is if its 95 % interval, from a paired bootstrap over the test set with seeds averaged, does
    not contain 0.
    """
    sign = -1.0 if key == "acc" else 1.0
    first, second = sorted(rows, key=lambda name: sign * rows[name][key])[:2]
    low, high = metrics.paired_intervals(probs[first], probs[second], labels, bins)[key]
    return {"name": first, "runner_up": second, "difference": [low, high],
            "significant": low > 0 or high < 0}  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sd(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of one value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


# --- Markdown -------------------------------------------------------------------------------------


OOD = (
    ("auroc_entropy", "AUROC entropy"),
    ("auroc_mutual_information", "AUROC information"),
    ("acc", "ACC"),
    ("ece", "ECE"),
    ("nll", "NLL"),
    ("brier", "Brier"),
)


def table(results: Mapping[str, Any]) -> str:
    """All results of a study in Markdown; a score is bold where it is significantly the best."""
    parts = [_scores_table(results)]
    parts += [f"{sentence}\n" for sentence in sentences(results)]
    for name in results["study"]["ood"]:
        parts.append(f"Out of distribution, {name}:\n\n{_ood_table(results, name)}")
    for size, part in results.get("sizes", {}).items():
        parts.append(f"With the first {size} training examples:\n\n{_scores_table(part)}")
    for method, rows in results.get("sweep", {}).items():
        parts.append(f"Every trial of {method}:\n\n{_sweep_table(rows)}")
    return "\n".join(parts)


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The verdict in words, and the meaning of bold."""
    out = ["Means over seeds ± their standard deviations. Bold: better than the runner-up, by a "
           "paired bootstrap of the test set at 95 %."]  # fmt: skip
    for v in results["verdict"]:
        low, high = v["difference"]
        word = "better than" if high < 0 else "no worse than" if v["no_worse"] else "worse than"
        out.append(
            f"{v['ours']} (chosen on the validation split) is {word} {v['rival']} (the best of the "
            f"others on the test set) in NLL: difference {low:+.3f} to {high:+.3f}."
        )
    return out


def _scores_table(results: Mapping[str, Any]) -> str:
    heads = ["method", "trial", "ACC", "ECE", "NLL", "Brier", "parameters", "train s", "answer ms",
             "peak MB"]  # fmt: skip
    lines = []
    for name, row in results["methods"].items():
        cells = [name, _trial(row)]
        for key in metrics.SCORES:
            best = results["best"][key]
            bold = "**" if best["significant"] and best["name"] == name else ""
            cells.append(f"{bold}{row[key]:.3f}{bold} ± {row['sd'][key]:.3f}")
        cells += [f"{row['parameters']:,}", f"{row['train_seconds']:.0f}"]
        cells += [f"{1000 * row['answer_seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}"]
        lines.append(cells)
    return _markdown(heads, lines)


def _ood_table(results: Mapping[str, Any], name: str) -> str:
    return _markdown(["method", *(head for _, head in OOD)], _ood_cells(results, name))


def _ood_cells(results: Mapping[str, Any], name: str) -> list[list[str]]:
    """A line for each method that answered the set: its name, then the columns of OOD."""
    return [
        [
            method,
            *(f"{row['ood'][name][key]:.3f}" if key in row["ood"][name] else "" for key, _ in OOD),
        ]
        for method, row in results["methods"].items()
        if "ood" in row
    ]


def _sweep_table(rows: Sequence[Row]) -> str:
    lines = [
        [_trial(row), *(f"{row[key]:.3f} ± {row['sd'][key]:.3f}" for key in metrics.SCORES)]
        + [f"{_width(row):.3g}"]
        for row in rows
    ]
    return _markdown(["trial", "ACC", "ECE", "NLL", "Brier", "mean sigma"], lines)


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _trial(row: Row) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in row["trial"].items())


def _width(row: Row) -> float:
    return _mean(list(row["widths"].values()) or [0.0])


# --- HTML -----------------------------------------------------------------------------------------


def write_page(
    path: Path, results: Mapping[str, Any], models: Mapping[str, Sequence[Path]]
) -> None:
    """The results as one HTML file, with the charts of `models`, all their seeds together.

    Raises InputError if it cannot be written.
    """
    study = results["study"]
    shown = []
    for name, folders in models.items():
        labels = _load(folders[0], "test")["labels"]
        row = results["methods"][name]
        probs = torch.cat(_probs(folders))
        area = metrics.risk_coverage(probs, labels.repeat(len(folders))).area
        values = {key: row[key] for key in metrics.SCORES}
        spread = {
            key: (min(s[key] for s in row["seeds"]), max(s[key] for s in row["seeds"]))
            for key in metrics.SCORES
        }
        shown.append(
            {
                "name": name,
                "probs": probs,
                "labels": labels.repeat(len(folders)),
                "metrics": {**values, "aurc": area},
                "intervals": spread,
            }
        )
    write_report(
        path,
        {
            "title": "Methods side by side",
            "about": {
                "model": Path(study["model"]).name,
                "data": Path(study["train"]).name,
                "training examples": study["limit"],
                "seeds": len(study["seeds"]),
                "samples": study["samples"],
                "bins": study["bins"],
            },
            "notes": sentences(results)[1:],
            "spread": "the least and the greatest of the seeds",
            "models": shown,
            "tables": [
                _all_scores(results),
                *(_ood_scores(results, name) for name in study["ood"]),
                _cost(results),
            ],
            "plots": _plots(results),
        },
    )


def _all_scores(results: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for name, row in results["methods"].items():
        cells = [f"{row[key]:.3f} ± {row['sd'][key]:.3f}" for key in metrics.SCORES]
        best = [results["best"][key] for key in metrics.SCORES]
        bold = [b["significant"] and b["name"] == name for b in best]
        rows.append((name, cells, bold))
    heads = ["ACC", "ECE", "NLL", "Brier"]
    return {"title": "All scores", "heads": heads, "rows": rows, "words": sentences(results)[0]}


def _ood_scores(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    rows = [(method, cells, [False] * len(cells)) for method, *cells in _ood_cells(results, name)]
    words = "AUROC of telling this set from the test set by the uncertainty; 0.5 is chance."
    return {"title": f"Out of distribution: {name}", "heads": [head for _, head in OOD],
            "rows": rows, "words": words}  # fmt: skip


def _cost(results: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        (
            name,
            [
                _trial(row),
                f"{row['parameters']:,}",
                f"{row['train_seconds']:.1f}",
                f"{1000 * row['answer_seconds']:.1f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
            ],
            [False] * 5,
        )
        for name, row in results["methods"].items()
        if not name.endswith(SCALED)
    ]
    heads = ["Chosen", "Numbers kept", "Training, s", "Answer, ms per example", "Peak memory, MB"]
    words = "Numbers kept beside the base model: the adapters' and their posterior's."
    return {"title": "Cost", "heads": heads, "rows": rows, "words": words}


def _plots(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy against ECE; NLL against training size; sigma by layer; scores against the knob."""
    rows = results["methods"]
    plots: list[dict[str, Any]] = [
        {
            "title": "Accuracy and ECE",
            "x": "ECE",
            "y": "accuracy",
            "series": [(name, [(row["ece"], row["acc"])]) for name, row in rows.items()],
        }
    ]
    sizes = {int(size): part["methods"] for size, part in results.get("sizes", {}).items()}
    if sizes:
        if results["study"]["limit"]:
            sizes[results["study"]["limit"]] = rows
        series = [
            (name, [(size, sizes[size][name]["nll"]) for size in sorted(sizes)]) for name in rows
        ]
        plots.append({"title": "NLL and training set", "x": "training examples", "y": "NLL (nats)",
                      "log": True, "series": series})  # fmt: skip
    widths = [
        (name, list(enumerate(row["widths"].values())))
        for name, row in rows.items()
        if row["widths"] and not name.endswith(SCALED)
    ]
    if widths:
        plots.append({"title": "Sigma by layer", "x": "adapted layer, from the first to the head",
                      "y": "mean standard deviation", "series": widths})  # fmt: skip
    swept = results.get("sweep", {})
    for key, label in (("nll", "NLL (nats)"), ("ece", "ECE"), ("sigma", "mean sigma")):
        series = [
            (
                method,
                sorted(
                    (list(row["trial"].values())[1], _width(row) if key == "sigma" else row[key])
                    for row in trials
                ),
            )
            for method, trials in swept.items()
            if key != "sigma" or _width(trials[0]) > 0
        ]
        if series:
            plots.append({"title": f"{label} and the second knob", "x": "value of the knob",
                          "y": label, "log": True, "series": series})  # fmt: skip
    return plots
