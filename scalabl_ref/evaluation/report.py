"""One HTML file with a model's scores and charts: no script, no plotting library, no network.

Here are the numbers of every table, charts.py has those of the charts; templates/ has the page, the
charts as SVG and the style. The same results give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..data.tokenizer import LETTERS
from ..support.files import atomic_write_text
from . import decisions, metrics
from .charts import (
    Bin,
    Chart,
    bins_of,
    brackets,
    colour,
    confidence_chart,
    environment,
    interval_chart,
    number,
    ood_chart,
    printable,
    reliability_chart,
    risk_chart,
    rows_of,
    series_chart,
)
from .threshold import USUAL

# key, heading, unit or direction
_COLUMNS = (
    ("acc", "ACC", "higher is better"),
    ("ece", "ECE", "lower is better"),
    ("nll", "NLL", "nats, lower is better"),
    ("brier", "Brier", "0 to 2, lower is better"),
    ("aurc", "AURC", "lower is better"),
)
_AUROC = (
    ("auroc_entropy", "AUROC, entropy", "0.5 is chance"),
    ("auroc_mutual_information", "AUROC, mutual information", "0.5 is chance"),
)
_NBSP = "\xa0"
_NAME = 40  # letters of a label's name
_MOST_CLASSES = 30  # of a confusion matrix
# The least AUROC, and what it means.
_NOTICED = ((0.9, "noticed"), (0.7, "often noticed"), (0.6, "hardly noticed"), (0, "not noticed"))
BOOTSTRAP = "95 % bootstrap interval over the test questions, for this training alone"


def write_report(path: Path | str, results: Mapping[str, Any]) -> None:
    """Write `results` to `path` as one self-contained HTML file, whole or not at all.

    results:
        title     heading
        subtitle  sentence under it (optional)
        about     {fact: value}; "bins" sets the bins of the charts, 15 without it (optional)
        models    list of {name, probs (N, C), labels (N,), metrics {acc, ece, nll, brier, aurc},
                  intervals {metric: (low, high)}, ood (optional)}, shown side by side; if it is
                  empty, the page has only notes, tables and plots
        rows      {ids, texts, choices: lists of N} of the rows that the first model answered: the
                  page then says what to decide with it, see decisions.py (optional)
        decision  {threshold, answered, right, accuracy, level}: what the run's own threshold does
                  on these rows, and the accuracy that it promises with that confidence; an
                  infinite one answers nothing, as none kept the promise (optional)
        bounds    {label, nll, acc, ...}: the best possible values, where known (optional)
        notes     sentences for the reader (optional)
        spread    meaning of the intervals, in words (optional: bootstrap intervals without it)
        tables    list of {title, words, heads, rows: (name, cells)} (optional)
        plots     list of {title, x, y, series: (name, points), log, log_y: whether the axis is
                  logarithmic}; a series of one point is a dot, a longer one a line (optional). A
                  name has one number and one colour on the whole page, that of its model if any
    ood:
        name, metrics {n, acc, ..., auroc_entropy, auroc_mutual_information, intervals}, and scores
        {name of the score: (values inside (N,), values outside (M,))} for histograms (optional)

    Raises InputError for probabilities or labels that `metrics` refuses, or an unwritable path.
    """
    atomic_write_text(path, document(results))


def document(results: Mapping[str, Any]) -> str:
    """The text of the file that `write_report` writes."""
    about, models, rows = results.get("about", {}), results["models"], results.get("rows")
    plots, numbers = results.get("plots", ()), _numbers(results)
    page = {
        "title": results["title"],
        "subtitle": results.get("subtitle"),
        "facts": {key: value for key, value in about.items() if value is not None},
        "notes": results.get("notes", ()),
        "tables": [(_given_table(t), t["words"]) for t in results.get("tables", ())],
        "plots": [_plot(f"plot-{i}", plot, numbers) for i, plot in enumerate(plots)],
    }
    if models:
        page["decisions"] = _decisions(models, rows, results.get("decision")) if rows else None
        page["scores"] = _scores(models, results.get("bounds", {}), results.get("spread"))
        page["calibration"] = _calibration(models, int(about.get("bins", 15)))
        page["risk"] = {"names": [m["name"] for m in models], "chart": risk_chart(models)}
        page["foreign"] = _out_of_distribution(models)
    text = environment().get_template("page.html").render(page)
    return printable(text)


def _numbers(results: Mapping[str, Any]) -> dict[str, int]:
    """Of each name: first the models, in their order, then the other series."""
    found: dict[str, int] = {}
    for i, model in enumerate(results["models"]):
        found.setdefault(model["name"], i)
    others = [name for plot in results.get("plots", ()) for name, _ in plot["series"]]
    for name in others:
        found.setdefault(name, max([*found.values(), len(results["models"]) - 1]) + 1)
    return found


# Tables ------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """small: a second line in smaller letters. css: its class. heat: how strong its colour is."""

    text: str
    small: str = ""
    css: str = ""
    heat: int | None = None


class Row(NamedTuple):
    """css: the class that colours the swatch before the name; without it there is none."""

    name: str
    cells: list[Cell]
    css: str = ""


class Table(NamedTuple):
    caption: str
    heads: list[Cell]
    rows: list[Row]


def _scores_table(caption: str, keys: Sequence[tuple], lines: Sequence[tuple]) -> Table:
    """lines: (name, {key: value}, {key: (low, high)}, css); of `keys`, those that any line has."""
    columns = [key for key in keys if any(key[0] in values for _, values, *_ in lines)]
    heads = [Cell("Model"), *(Cell(heading, unit) for _, heading, unit in columns)]
    rows = []
    for name, values, intervals, css in lines:
        cells = []
        for key, *_ in columns:
            value, interval = values.get(key), intervals.get(key)
            text = "–" if value is None else number(value)
            cells.append(Cell(text, brackets(interval) if interval else ""))
        rows.append(Row(name, cells, css))
    return Table(caption, heads, rows)


def _given_table(table: Mapping[str, Any]) -> Table:
    """A table of words and numbers that are formatted already."""
    rows = [Row(name, [Cell(cell) for cell in cells]) for name, cells in table["rows"]]
    return Table(table["title"], [Cell("Model"), *map(Cell, table["heads"])], rows)


def _bin_table(name: str, bins: Sequence[Bin]) -> Table:
    """The numbers of two charts, for readers who cannot see the charts or copy the numbers."""
    heads = ("Confidence", "Rows", "Mean confidence", "Accuracy", "Gap")
    rows = []
    for b in bins:
        numbers = (b.confidence, b.accuracy, b.accuracy - b.confidence)
        cells = [Cell(str(b.rows)), *(Cell(f"{number:.3f}") for number in numbers)]
        rows.append(Row(f"{b.low:.3f}–{b.high:.3f}", cells))
    return Table(f"Calibration of {name}", [Cell(head) for head in heads], rows)


# Sections ----------------------------------------------------------------------------------------


def _decisions(
    models: Sequence[Mapping], rows: Mapping[str, Sequence], own: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What to decide with the first model, which gave these rows their answers.

    own: "decision" of `write_report`.
    """
    probs, labels = models[0]["probs"], models[0]["labels"]
    shared = len(set(map(tuple, rows["choices"]))) == 1
    names = [_cut(name, _NAME) for name in rows["choices"][0]] if shared else []
    kept = own if own and own["threshold"] < math.inf else None
    page: dict[str, Any] = {
        "sentences": [*([_kept(own, len(labels))] if own else ()), *_sentences(models[0])],
        "thresholds": [_threshold_table(m, None if i else kept) for i, m in enumerate(models)],
        "own": bool(kept),
        "sure": decisions.SURE,
        "errors": _error_table(probs, labels, rows),
    }
    if names:
        counts = decisions.confusion(probs, labels)
        if len(names) <= _MOST_CLASSES:
            page["confusion"] = _confusion_table(counts, names)
        page["classes"] = _class_table(counts, names)
    return page


def _kept(own: Mapping[str, Any], total: int) -> str:
    """What the threshold that the run keeps does on these rows, and what it promised."""
    promise = f"{100 * own['accuracy']:.6g} % right, with {100 * own['level']:.6g} % confidence."
    if own["threshold"] == math.inf:
        return (
            f"The run answers none of the {rows_of(total)}: every row goes to a human, because "
            f"no threshold kept the promise of {promise}"
        )
    answered = own["answered"]
    right = f", {100 * own['right'] / answered:.1f} % of them right" if answered else ""
    return (
        f"The run's threshold, a confidence of {_floored(own['threshold'])}, answers {answered} of "
        f"the {rows_of(total)} ({100 * answered / total:.0f} %){right}; the others go to a human. "
        f"It was chosen for {promise}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.6g}{_NBSP}%"


def _sentences(model: Mapping[str, Any]) -> list[str]:
    """How much can be answered, what is wrong and sure, and whether foreign text is noticed."""
    probs, labels = model["probs"], model["labels"]
    total, found = rows_of(len(labels)), decisions.answered_at(probs, labels, 0.95)
    sure = decisions.wrong_and_sure(probs, labels)
    if found is None:
        first = f"On these rows, at 95 % accuracy, it can answer none of the {total}."
    else:
        first = (
            f"On these rows, at 95 % accuracy, it can answer {found.rows} of the {total} "
            f"({100 * found.rows / len(labels):.0f} %): those with a confidence of at least "
            f"{_floored(found.confidence)}."
        )
    are, share = "is" if sure == 1 else "are", 100 * sure / len(labels)
    second = f"{sure} of the {total} ({share:.1f} %) {are} wrong and sure: wrong with a "
    return [first, f"{second}confidence of at least {decisions.SURE:g}.", _foreign(model)]


def _foreign(model: Mapping[str, Any]) -> str:
    ood = model.get("ood", {})
    values = {**ood, **ood.get("metrics", {})}
    if "auroc_entropy" not in values:
        return "Whether foreign text is noticed was not measured: --ood FILE does."
    value = values["auroc_entropy"]
    how = next(words for least, words in _NOTICED if value >= least)
    other = values.get("auroc_mutual_information")
    more = "" if other is None else f", {other:.2f} by mutual information"
    return (
        f"Foreign text is {how}: it is more uncertain than a familiar one with a probability of "
        f"{value:.2f} by entropy{more} (AUROC; 0.5 is chance)."
    )


def _threshold_table(model: Mapping[str, Any], own: Mapping[str, Any] | None) -> Table:
    """Read off these rows; first the run's own threshold, if there is one."""
    probs, labels = model["probs"], model["labels"]
    heads = ("Accuracy wanted", "Confidence from", "Answered", "Coverage", "Right", "Wrong")
    asked: list[tuple[str, decisions.Answered | None]] = [
        (_percent(target), decisions.answered_at(probs, labels, target)) for target in USUAL
    ]
    if own:
        kept = decisions.Answered(own["threshold"], own["answered"], own["right"])
        asked.insert(0, (f"{_percent(own['accuracy'])}, kept in the run", kept))
    lines = []
    for name, found in asked:
        cells = ["not reached", "0", f"0.0{_NBSP}%", "–", "–"]
        if found:
            share = f"{100 * found.rows / len(labels):.1f}{_NBSP}%"
            right = f"{100 * found.accuracy:.1f}{_NBSP}%" if found.rows else "–"
            wrong = str(found.rows - found.right)
            cells = [_floored(found.confidence), str(found.rows), share, right, wrong]
        lines.append(Row(name, list(map(Cell, cells))))
    return Table(f"Thresholds of {model['name']}", list(map(Cell, heads)), lines)


def _confusion_table(counts: Tensor, names: Sequence[str]) -> Table:
    """The darker, the larger its share of the row."""
    lines = []
    for i, (name, row) in enumerate(zip(names, counts.tolist(), strict=True)):
        heats = [round(60 * n / max(1, sum(row))) for n in row]
        cells = [
            Cell(str(n) if n else "·", "", "hit" if i == k else "miss", heat)
            for k, (n, heat) in enumerate(zip(row, heats, strict=True))
        ]
        lines.append(Row(name, cells))
    heads = [Cell("Label \\ answer"), *map(Cell, names)]
    return Table("Confusion matrix", heads, lines)


def _class_table(counts: Tensor, names: Sequence[str]) -> Table:
    scores = decisions.class_scores(counts)
    heads = ("Label", "Precision", "Recall", "F1", "Rows")
    columns = (scores.precision, scores.recall, scores.f1)
    each = zip(names, scores.rows.tolist(), *(c.tolist() for c in columns), strict=True)
    lines = [Row(name, [*map(_score, values), Cell(str(n))]) for name, n, *values in each]
    means = [c[~c.isnan()].mean().item() for c in columns]  # over the classes that have the score
    lines.append(Row("mean", [*map(_score, means), Cell(str(int(counts.sum())))]))
    return Table("Scores of each label", list(map(Cell, heads)), lines)


def _error_table(probs: Tensor, labels: Tensor, rows: Mapping[str, Sequence]) -> Table:
    confidence, chosen = decisions.most_probable(probs)
    lines = []
    for i in decisions.worst_errors(probs, labels):
        # A row may have fewer choices than there are classes.
        choices = [*rows["choices"][i], *LETTERS[len(rows["choices"][i]) :]]
        names = [_cut(choices[int(k)], _NAME) for k in (labels[i], chosen[i])]
        cells = [Cell(_cut(rows["texts"][i], 240), css="text"), *map(Cell, names)]
        lines.append(Row(_cut(str(rows["ids"][i]), _NAME), [*cells, Cell(f"{confidence[i]:.3f}")]))
    heads = [Cell("Row"), Cell("Text", css="text"), *map(Cell, ("Label", "Answer", "Confidence"))]
    return Table("The worst errors", heads, lines)


def _score(value: float) -> Cell:
    return Cell("–" if math.isnan(value) else f"{value:.3f}")


def _cut(text: str, most: int) -> str:
    """In one line of at most `most` letters."""
    text = " ".join(text[: 20 * most].split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _floored(confidence: float) -> str:
    """To three digits, and not above the row that is just answered."""
    return f"{math.floor(1000 * confidence) / 1000:.3f}"


def _scores(models: Sequence[Mapping], bounds: Mapping, spread: str | None) -> dict[str, Any]:
    lines = [(m["name"], m["metrics"], m.get("intervals", {}), f"c{colour(i)}")
             for i, m in enumerate(models)]  # fmt: skip
    if bounds:
        lines.append((bounds.get("label", "best possible"), bounds, {}, "bound"))
    charts = [_interval_chart(models, bounds, spread, column) for column in _COLUMNS[:4]]
    return {
        "table": _scores_table("Scores of each model", _COLUMNS, lines),
        "spread": spread or BOOTSTRAP,
        "bootstrap": spread is None,
        "charts": [chart for chart in charts if chart],
    }


def _interval_chart(
    models: Sequence[Mapping], bounds: Mapping[str, Any], spread: str | None, column: tuple
) -> Chart | None:
    """One score of all models. None where no model has a finite value."""
    key, heading, unit = column
    rows = []
    for i, model in enumerate(models):
        value = model["metrics"].get(key)
        if value is not None and math.isfinite(value):
            low, high = model.get("intervals", {}).get(key) or (value, value)
            rows.append((i, model["name"], value, low, high))
    if not rows:
        return None
    best = (bounds.get("label", "best possible"), bounds[key]) if key in bounds else None
    title = f"{heading} with {spread or '95 % intervals'}"
    return interval_chart(rows, key, f"{heading} ({unit})", best, title)


def _calibration(models: Sequence[Mapping], bins: int) -> list[dict[str, Any]]:
    every = [bins_of(metrics.reliability(m["probs"], m["labels"], bins)) for m in models]
    tallest = max(b.rows for bins in every for b in bins)
    return [
        {
            "name": m["name"],
            "reliability": reliability_chart(i, m["name"], found),
            "confidence": confidence_chart(i, m["name"], found, tallest),
            "table": _bin_table(m["name"], found),
        }
        for i, (m, found) in enumerate(zip(models, every, strict=True))
    ]


def _out_of_distribution(models: Sequence[Mapping]) -> dict[str, Any] | None:
    lines, charts = [], []
    for i, model in enumerate(models):
        ood = model.get("ood")
        if not ood:
            continue
        values = {**ood.get("metrics", {})}
        values.update({key: ood[key] for key, *_ in _AUROC if key in ood})
        label = f"{model['name']}: {ood['name']}" if ood.get("name") else model["name"]
        lines.append((label, values, values.get("intervals", {}), f"c{colour(i)}"))
        for k, (score, sides) in enumerate(ood.get("scores", {}).items()):
            chart = ood_chart(f"ood-{i}-{k}", model["name"], score, sides, colour(i))
            charts.append((model["name"], chart))
    if not lines:
        return None
    table = _scores_table("Scores out of distribution", (*_AUROC, *_COLUMNS), lines)
    return {"table": table, "charts": charts}


def _plot(id: str, plot: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    names = sorted((numbers[name], name) for name, _ in plot["series"])
    return {"title": plot["title"], "names": names, "chart": series_chart(id, plot, numbers)}
