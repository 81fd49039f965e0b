"""The results of a study (`comparison.summary`) as Markdown tables and as an HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import metrics
from .comparison import ALPHA, MARGIN, SCALED, Row, answers_of
from .report import write_report

OOD = (
    ("auroc_entropy", "AUROC entropy"),
    ("auroc_mutual_information", "AUROC information"),
    ("acc", "ACC"),
    ("ece", "ECE"),
    ("nll", "NLL"),
    ("brier", "Brier"),
)


def table(results: Mapping[str, Any]) -> str:
    """All results of a study in Markdown."""
    parts = [_scores_table(results), *(f"{sentence}\n" for sentence in sentences(results))]
    parts += _verdict_tables(results)
    for name, part in results["shifted"].items():
        rows = {method: row["shifted"][name] for method, row in results["methods"].items()}
        parts.append(f"Shifted, {name}:\n\n{markdown(SCORE_HEADS, _score_cells(rows))}")
        parts += _verdict_tables(part)
    for name in results["study"]["ood"]:
        parts.append(f"Out of distribution, {name}:\n\n{_ood_table(results, name)}")
    return "\n".join(parts)


MEANINGS = (
    "Scores are means over replicates ± their standard deviation. Differences are ours minus the "
    "rival's, with 95 % intervals over replicates and questions, and p after Holm's correction for "
    f"the number of rivals. Better, worse: p < {ALPHA}. No worse: p < {ALPHA} that NLL is higher "
    f"by {MARGIN} nats or more."
)
WORDS = (("better", "than"), ("no worse", "than"), ("not told apart", "from"), ("worse", "than"),
         ("untested", "against"))  # fmt: skip


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The meaning of the tables, and the verdicts on NLL in words."""
    out = [MEANINGS]
    for (family, ours), entries in _by_family(results["verdict"]).items():
        rivals: dict[str, list[str]] = {word: [] for word, _ in WORDS}
        for e in entries:
            if e["score"] == "nll":
                rivals[e["word"]].append(e["rival"])
        parts = [f"{word} {link} {', '.join(rivals[word])}" for word, link in WORDS if rivals[word]]
        out.append(f"Among {family}: {ours}, chosen on the validation split, is in NLL "
                   f"{'; '.join(parts)}.")  # fmt: skip
    return out


def _by_family(verdict: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The entries by family and our method."""
    found: dict[tuple[str, str], list[Row]] = {}
    for entry in verdict:
        found.setdefault((entry["family"], entry["ours"]), []).append(entry)
    return found


SCORE_HEADS = ["method", "ACC", "ECE", "NLL", "Brier"]


def _score_cells(rows: Mapping[str, Row]) -> list[list[str]]:
    return [
        [name, *(f"{row[key]:.3f} ± {row['sd'][key]:.3f}" for key in metrics.SCORES)]
        for name, row in rows.items()
    ]


def _scores_table(results: Mapping[str, Any]) -> str:
    rows = results["methods"]
    lines = [
        [name, _trial(row), *cells, *_cost_cells(row)]
        for (name, *cells), row in zip(_score_cells(rows), rows.values(), strict=True)
    ]
    return markdown(["method", "trial", *SCORE_HEADS[1:], *COST_HEADS], lines)


COST_HEADS = ["parameters", "draws", "train s", "fit s", "answer ms", "peak MB"]


def _cost_cells(row: Row) -> list[str]:
    return [
        f"{row['parameters']:,}",
        f"{row['draws'] or ''}",
        f"{row['train_seconds']:.1f}",
        f"{row['fit_seconds']:.1f}",
        f"{1000 * row['answer_seconds']:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
    ]


VERDICT_HEADS = ["rival", "replicates", "ACC", "ECE", "NLL", "Brier"]


def _verdict_tables(part: Mapping[str, Any]) -> list[str]:
    return [
        f"Among {family}, {ours} less each rival:\n\n"
        + markdown(VERDICT_HEADS, _verdict_cells(entries))
        for (family, ours), entries in _by_family(part["verdict"]).items()
    ]


def _verdict_cells(entries: Sequence[Row]) -> list[list[str]]:
    """A line for each rival."""
    lines: dict[str, dict[str, Row]] = {}
    for e in entries:
        lines.setdefault(e["rival"], {})[e["score"]] = e
    return [
        [rival, str(each["nll"]["replicates"]), *(verdict_cell(each[k]) for k in metrics.SCORES)]
        for rival, each in lines.items()
    ]


def verdict_cell(e: Row) -> str:
    if "p" not in e:
        return str(e["word"])
    ends = f"{e['low']:+.3f} to {e['high']:+.3f}"
    return f"{e['difference']:+.3f} ({ends}; p {e['p']:.2g}): {e['word']}"


def _ood_table(results: Mapping[str, Any], name: str) -> str:
    return markdown(["method", *(head for _, head in OOD)], _ood_cells(results, name))


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


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _trial(row: Row) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in row["trial"].items())


# --- HTML -----------------------------------------------------------------------------------------


def write_page(
    path: Path, results: Mapping[str, Any], models: Mapping[str, Sequence[Path]]
) -> None:
    """The results as one HTML file, with the charts of `models`, all their replicates together.

    Raises InputError if it cannot be written.
    """
    study = results["study"]
    shown = []
    for name, folders in models.items():
        _, each, labels = answers_of(folders, "test")
        probs, labels = torch.cat(each), labels.repeat(len(each))
        row = results["methods"][name]
        values = {key: row[key] for key in metrics.SCORES}
        spread = {
            key: (min(s[key] for s in row["replicates"]), max(s[key] for s in row["replicates"]))
            for key in metrics.SCORES
        }
        area = metrics.risk_coverage(probs, labels).area
        shown.append(
            {
                "name": name,
                "probs": probs,
                "labels": labels,
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
                "replicates": max(len(row["replicates"]) for row in results["methods"].values()),
                "samples": study["samples"],
                "bins": study["bins"],
            },
            "notes": sentences(results)[1:],
            "spread": "the least and the greatest of the replicates",
            "models": shown,
            "tables": _page_tables(results),
            "plots": _plots(results),
        },
    )


def _page_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = results["methods"]
    tables = [_sheet("All scores", SCORE_HEADS[1:], _score_cells(rows), MEANINGS)]
    tables += _verdict_sheets(results, "test set")
    for name, part in results["shifted"].items():
        lines = _score_cells({method: row["shifted"][name] for method, row in rows.items()})
        words = "A labelled set of another distribution than the training set's."
        tables.append(_sheet(f"Shifted: {name}", SCORE_HEADS[1:], lines, words))
        tables += _verdict_sheets(part, name)
    words = "AUROC of telling this set from the test set by the uncertainty; 0.5 is chance."
    heads = [head for _, head in OOD]
    tables += [
        _sheet(f"Out of distribution: {name}", heads, _ood_cells(results, name), words)
        for name in results["study"]["ood"]
    ]
    costs = [[name, _trial(row), *_cost_cells(row)]
             for name, row in rows.items() if not name.endswith(SCALED)]  # fmt: skip
    words = "Parameters: the numbers kept beside the base model, of adapters and posterior."
    return [*tables, _sheet("Cost", ["chosen", *COST_HEADS], costs, words)]


def _verdict_sheets(part: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    sheets = [
        _sheet(
            f"{ours} on the {name}, among {family}",
            VERDICT_HEADS,
            _verdict_cells(entries),
            MEANINGS,
        )  # fmt: skip
        for (family, ours), entries in _by_family(part["verdict"]).items()
    ]
    pairs = [[e["ours"], e["rival"], str(e["replicates"]), verdict_cell(e)] for e in part["pairs"]]
    words = (
        "Here p is corrected for the number of all pairs of one kind: without temperatures, with "
        "them, or with one for the rival alone."
    )
    if pairs:
        heads = ["rival", "replicates", "NLL"]
        sheets.append(_sheet(f"All pairs on the {name}", heads, pairs, words))
    return sheets


def _sheet(
    title: str, heads: Sequence[str], lines: Iterable[Sequence[str]], words: str
) -> dict[str, Any]:
    """A table for `write_report` from lines whose first cell is their name."""
    rows = [(name, cells) for name, *cells in lines]
    return {"title": title, "heads": heads, "rows": rows, "words": words}


def _plots(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy against ECE, and sigma by layer."""
    rows = results["methods"]
    plots: list[dict[str, Any]] = [
        {
            "title": "Accuracy and ECE",
            "x": "ECE",
            "y": "accuracy",
            "series": [(name, [(row["ece"], row["acc"])]) for name, row in rows.items()],
        }
    ]
    widths = [
        (name, list(enumerate(row["widths"].values())))
        for name, row in rows.items()
        if row["widths"] and not name.endswith(SCALED)
    ]
    if widths:
        plots.append({"title": "Sigma by layer", "x": "adapted layer, from the first to the head",
                      "y": "mean standard deviation", "series": widths})  # fmt: skip
    return plots
