"""The results of a finished study for a paper: one table, and figures. Nothing is run."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..support.errors import InputError
from ..support.files import make_folder, read_json
from . import metrics, plots
from .comparison import SCALED, Row, answers_of, scores
from .tables import MEANINGS, markdown, verdict_cell

KINDS = {"latex": ".tex", "csv": ".csv", "markdown": ".md"}  # and the ends of their files' names
HEADS = ["method", "ACC", "ECE", "NLL", "Brier", "NLL of ours less its"]
_LETTERS = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
}  # fmt: skip


def read_results(out: Path) -> dict[str, Any]:
    """OUT/results.json. Raises InputError if it is missing or not the results of a study."""
    path = out / "results.json"
    if not path.exists():
        raise InputError(f"{out}: has no results.json: run `scalabl study FILE --out {out}` first")
    results = read_json(path)
    rows: Any = results.get("methods")
    study = results.get("study")
    known = isinstance(rows, dict) and all(map(_is_row, rows.values()))
    known = known and isinstance(study, dict) and isinstance(study.get("bins"), int)
    verdict = results.get("verdict")
    if not known or not isinstance(verdict, list) or not all(map(_is_verdict, verdict)):
        raise InputError(f"{path}: is not the results of a study")
    return results


def _is_verdict(entry: Any) -> bool:
    names = ("score", "ours", "rival", "word")
    numbers = ("difference", "low", "high", "p")
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), str) for name in names)
        and all(isinstance(entry.get(name, 0.0), (int, float)) for name in numbers)
        and ("p" not in entry or all(name in entry for name in numbers))
    )


def _is_row(row: Any) -> bool:
    """Whether all that a table and a figure need is there, as numbers or null (infinite)."""
    if not isinstance(row, dict) or not isinstance(row.get("sd"), dict):
        return False
    some = [part.get(key) for part in (row, row["sd"]) for key in metrics.SCORES]
    replicates = row.get("replicates")
    return (
        all(value is None or isinstance(value, (int, float)) for value in some)
        and isinstance(replicates, list)
        and all(isinstance(each, dict) and "replicate" in each for each in replicates)
        and isinstance(row.get("trial"), dict)
    )


def paper_table(results: Mapping[str, Any], kind: str) -> str:
    """One line for each method: its scores over replicates, and the verdict on ours against it.

    kind: "latex" (needs the package booktabs), "csv" (all digits) or "markdown". The verdict is
    that on NLL in the first family that has the method, as on the study's page.
    """
    if kind == "csv":
        return _csv(results)
    verdicts = _verdicts(results)
    lines = []
    for name, row in results["methods"].items():
        pairs = [(_value(row[key]), _value(row["sd"][key])) for key in metrics.SCORES]
        lines.append((name, pairs, verdicts.get(name)))
    return _latex(results, lines) if kind == "latex" else _markdown(results, lines)


def _verdicts(results: Mapping[str, Any]) -> dict[str, Row | str]:
    """By method: the verdict on ours against it, or "ours"."""
    found: dict[str, Row | str] = {}
    for entry in results["verdict"]:
        if entry["score"] == "nll":
            found.setdefault(entry["ours"], "ours")
            found.setdefault(entry["rival"], entry)
    return found


def _value(number: float | None) -> float:
    return math.inf if number is None else number  # JSON has no infinity


def _markdown(results: Mapping[str, Any], lines: Sequence[tuple]) -> str:
    cells = []
    for name, pairs, verdict in lines:
        word = verdict if isinstance(verdict, str) else verdict_cell(verdict) if verdict else ""
        scores = [f"{value:.3f} ± {sd:.3f}" for value, sd in pairs]
        cells.append([name.replace("|", "\\|"), *scores, word])
    return f"{markdown(HEADS, cells)}\n{_caption(results)}\n"


def _latex(results: Mapping[str, Any], lines: Sequence[tuple]) -> str:
    rows = [
        [latex(name), *(_number(v, sd) for v, sd in pairs), _latex_verdict(verdict)]
        for name, pairs, verdict in lines
    ]
    head, *body = (" & ".join(row) + r" \\" for row in [[*map(latex, HEADS)], *rows])
    start = ["% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering"]
    caption = f"\\caption{{{latex(_caption(results))}}}"
    table = [r"\begin{tabular}{lccccl}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*start, caption, *table, r"\end{tabular}", r"\end{table}", ""])


def _latex_verdict(verdict: Row | str | None) -> str:
    if not isinstance(verdict, dict):
        return verdict or ""
    if "p" not in verdict:
        return latex(verdict["word"])
    difference, low, high = (f"{verdict[key]:+.3f}" for key in ("difference", "low", "high"))
    p = "p < 0.001" if verdict["p"] < 0.001 else f"p = {verdict['p']:.3f}"
    return f"${difference}$ $[{low}, {high}]$, ${p}$: {latex(verdict['word'])}"


def _number(value: float, sd: float) -> str:
    spread = f"{sd:.3f}" if math.isfinite(sd) else "\\infty"
    return f"${value:.3f} \\pm {spread}$" if math.isfinite(value) else "$\\infty$"


def latex(text: str) -> str:
    """A text in LaTeX, with its special letters escaped."""
    return "".join(_LETTERS.get(letter, letter) for letter in " ".join(text.split()))


def _caption(results: Mapping[str, Any]) -> str:
    about = results.get("study", {})
    model, data = (Path(str(about.get(key, ""))).name for key in ("model", "train"))
    return f"{model} on {data}, {about.get('limit') or 'all'} training rows. {MEANINGS}"


def _csv(results: Mapping[str, Any]) -> str:
    verdicts, text = _verdicts(results), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [f"{key}{end}" for key in metrics.SCORES for end in ("", "_sd")]
    ends = ("difference", "low", "high", "p", "word")
    writer.writerow(["method", "replicates", *heads, "ours", *(f"nll_{end}" for end in ends)])
    for name, row in results["methods"].items():
        values = [_value(part[key]) for key in metrics.SCORES for part in (row, row["sd"])]
        verdict = verdicts.get(name)
        entry: Row = verdict if isinstance(verdict, dict) else {}
        ours = entry.get("ours", verdict or "")
        more = [entry.get(end, "") for end in ends]
        writer.writerow([name, len(row["replicates"]), *values, ours, *more])
    return text.getvalue()


# Figures -----------------------------------------------------------------------------------------


def write_figures(out: Path, results: Mapping[str, Any], folder: Path, pdf: bool) -> list[Path]:
    """FOLDER/nll.svg, the NLL by method, and FOLDER/reliability-METHOD.svg; returns the paths.

    pdf: also as PDF. The intervals are the least and the greatest of the replicates, and a
    reliability diagram has the answers of all replicates. Raises InputError if OUT no longer has
    the answers that the results are of, or if a file cannot be written.
    """
    names = [name for name in results["methods"] if not name.endswith(SCALED)]
    figures = {"nll": _nll_figure(results, names)}
    folders = {name: list(_folders(out, name, results)) for name in names}
    for name in names:
        _, each, labels = answers_of(folders[name], "test")
        figure = plots.reliability(
            torch.cat(each), labels.repeat(len(each)), n_bins=results["study"]["bins"], name=name
        )
        figures[f"reliability-{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')}"] = figure
    make_folder(folder)
    paths = []
    for stem, figure in figures.items():
        for suffix in (".svg", ".pdf") if pdf else (".svg",):
            figure.save(folder / f"{stem}{suffix}")
            paths.append(folder / f"{stem}{suffix}")
    return paths


def _nll_figure(results: Mapping[str, Any], names: Sequence[str]) -> plots.Figure:
    rows, numbers = [], []
    for number, name in enumerate(names):
        row = results["methods"][name]
        each = [_value(replicate.get("nll")) for replicate in row["replicates"]]
        if math.isfinite(_value(row["nll"])):
            rows.append((name, row["nll"], min(each), max(each)))
            numbers.append(number)
    return plots.intervals(rows, "NLL (nats, lower is better)", numbers)


def _folders(out: Path, method: str, results: Mapping[str, Any]) -> Iterator[Path]:
    """Of each replicate, the folder of answers with its method, trial, seed and NLL on the test."""
    row, bins = results["methods"][method], results["study"]["bins"]
    for replicate in row["replicates"]:
        for path in sorted((out / "answers").glob("*/answers.json")):
            facts, folder = read_json(path), path.parent
            same = (facts.get("method"), facts.get("trial"), facts.get("seed")) == (
                method, row["trial"], replicate["replicate"]
            )  # fmt: skip
            if same and (folder / "test.safetensors").exists():
                nll = scores(folder, "test", bins)["nll"]
                if nll == _value(replicate.get("nll")):
                    yield folder
                    break
        else:
            number = replicate["replicate"]
            raise InputError(
                f"{out}: has no answers of {method!r}, replicate {number}: run the study again"
            )
