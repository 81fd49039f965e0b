"""One HTML file with a model's scores and charts: no script, no plotting library, no network.

Here are the numbers of every table and chart; templates/ has the page, the charts as SVG and the
style. The same results give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..support.files import atomic_write_text
from . import metrics

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
# Neither HTML nor XML can hold any other character.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
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
_COLOURS = 6  # of style.css; a seventh model has the first colour and another dash
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
        bounds    {label, nll, acc, ...}: the best possible values, where known (optional)
        notes     sentences for the reader (optional)
        spread    meaning of the intervals, in words (optional: bootstrap intervals without it)
        tables    list of {title, words, heads, rows: (name, cells)} (optional)
        plots     list of {title, x, y, series: (name, points), log: whether x is logarithmic};
                  a series of one point is a dot, a longer one a line (optional)
    ood:
        name, metrics {n, acc, ..., auroc_entropy, auroc_mutual_information, intervals}, and scores
        {name of the score: (values inside (N,), values outside (M,))} for histograms (optional)

    Raises InputError for probabilities or labels that `metrics` refuses, or an unwritable path.
    """
    atomic_write_text(path, document(results))


def document(results: Mapping[str, Any]) -> str:
    """The text of the file that `write_report` writes."""
    about, models = results.get("about", {}), results["models"]
    page = {
        "title": results["title"],
        "subtitle": results.get("subtitle"),
        "facts": {key: value for key, value in about.items() if value is not None},
        "notes": results.get("notes", ()),
        "tables": [(_given_table(t), t["words"]) for t in results.get("tables", ())],
        "plots": [_plot(f"plot-{i}", plot) for i, plot in enumerate(results.get("plots", ()))],
    }
    if models:
        page["scores"] = _scores(models, results.get("bounds", {}), results.get("spread"))
        page["calibration"] = _calibration(models, int(about.get("bins", 15)))
        page["risk"] = {"names": [m["name"] for m in models], "chart": _risk_chart(models)}
        page["foreign"] = _out_of_distribution(models)
    text = _environment().get_template("page.html").render(page)
    return _FORBIDDEN.sub("\ufffd", text)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader  # slow, and most commands write no report

    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["place"] = lambda value: f"{value:.2f}"
    found.filters["colour"] = _colour
    return found


def _colour(index: int) -> int:
    return index % _COLOURS


# Tables ------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """small: a second line in smaller letters."""

    text: str
    small: str = ""


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
            text = "–" if value is None else _number(value)
            cells.append(Cell(text, _brackets(interval) if interval else ""))
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


def _number(value: float) -> str:
    return "∞" if value == math.inf else f"{value:.3f}"


def _brackets(interval: Sequence[float]) -> str:
    return f"[{', '.join(map(_number, interval))}]"


# Sections ----------------------------------------------------------------------------------------


def _scores(models: Sequence[Mapping], bounds: Mapping, spread: str | None) -> dict[str, Any]:
    lines = [(m["name"], m["metrics"], m.get("intervals", {}), f"c{_colour(i)}")
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


def _calibration(models: Sequence[Mapping], bins: int) -> list[dict[str, Any]]:
    every = [_bins(metrics.reliability(m["probs"], m["labels"], bins)) for m in models]
    tallest = max(b.rows for bins in every for b in bins)
    return [
        {
            "name": m["name"],
            "reliability": _reliability_chart(i, m["name"], found),
            "confidence": _confidence_chart(i, m["name"], found, tallest),
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
        lines.append((label, values, values.get("intervals", {}), f"c{_colour(i)}"))
        for k, (score, sides) in enumerate(ood.get("scores", {}).items()):
            chart = _ood_chart(f"ood-{i}-{k}", model["name"], score, sides, _colour(i))
            charts.append((model["name"], chart))
    if not lines:
        return None
    table = _scores_table("Scores out of distribution", (*_AUROC, *_COLUMNS), lines)
    return {"table": table, "charts": charts}


# Charts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """A plot area of `width` by `height`, the values at the ends of its two axes, and titles."""

    x_title: str
    y_title: str = ""
    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)
    width: int = 360
    height: int = 280
    left: int = 54
    right: int = 10
    top: int = 14
    bottom: int = 40

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        span = self.height - self.top - self.bottom
        return self.height - self.bottom - (value - low) / (high - low) * span

    def ticks(self, ends: tuple[float, float]) -> list[tuple[float, str]]:
        return _ticks(*ends)


class Chart(NamedTuple):
    """title, words: for screen readers. marks: what the chart's macro in charts.html draws."""

    id: str
    axes: Axes
    title: str
    words: str
    marks: Any
    colour: int | None = None


class Bin(NamedTuple):
    """Answers whose confidence is in [low, high): how many, mean confidence, accuracy."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


def _bins(table: metrics.Reliability) -> list[Bin]:
    """The bins that are not empty."""
    n, columns = len(table.rows), (column.tolist() for column in table)
    every = (Bin(k / n, (k + 1) / n, *row) for k, row in enumerate(zip(*columns, strict=True)))
    return [found for found in every if found.rows]


def _reliability_chart(index: int, name: str, bins: Sequence[Bin]) -> Chart:
    marks = [
        (b, f"confidence {b.confidence:.3f}, accuracy {b.accuracy:.3f}, {_rows(b.rows)}")
        for b in bins
    ]
    gap, worst = max(((abs(b.confidence - b.accuracy), words) for b, words in marks),
                     key=lambda pair: pair[0])  # fmt: skip
    words = (
        "Accuracy and mean confidence in each bin of confidence. "
        f"Widest gap: {worst if gap else 'no gap'}."
    )
    title, axes = f"Reliability of {name}", Axes("confidence", "accuracy")
    return Chart(f"reliability-{index}", axes, title, words, marks, _colour(index))


def _confidence_chart(index: int, name: str, bins: Sequence[Bin], tallest: int) -> Chart:
    """tallest: largest count among the models, so that their charts share one scale."""
    axes = Axes("confidence", "rows", y_range=(0, tallest * 1.1), height=170)
    marks = [(b, f"{b.low:.3f}–{b.high:.3f}: {_rows(b.rows)}") for b in bins]
    total = _rows(sum(b.rows for b in bins))
    title, words = f"Confidence of {name}", f"Histogram of the confidence of the {total}."
    return Chart(f"confidence-{index}", axes, title, words, marks, _colour(index))


def _risk_chart(models: Sequence[Mapping]) -> Chart:
    curves = [metrics.risk_coverage(m["probs"], m["labels"]) for m in models]
    highest = max(float(curve.risk.max()) for curve in curves)
    top = max(highest * 1.05, 0.05)
    axes = Axes("coverage", "risk (error rate)", y_range=(0, top), width=420)
    marks = [
        (_thinned(curve.coverage, curve.risk), f"{m['name']}: area {curve.area:.3f}")
        for m, curve in zip(models, curves, strict=True)
    ]
    areas = "; ".join(words for _, words in marks)
    words = f"Error rate on the most confident share of the rows. {areas}."
    return Chart("risk-coverage", axes, "Risk and coverage", words, marks)


def _interval_chart(
    models: Sequence[Mapping], bounds: Mapping[str, Any], spread: str | None, column: tuple
) -> Chart | None:
    """One score of all models. None where no model has a finite value."""
    key, heading, unit = column
    rows = []
    for i, model in enumerate(models):
        value = model["metrics"].get(key)
        if value is not None and math.isfinite(value):
            rows.append((i, model["name"], value, *(model.get("intervals", {}).get(key)
                                                    or (value, value))))  # fmt: skip
    if not rows:
        return None
    best = bounds.get(key)
    numbers = [v for row in rows for v in row[2:] if math.isfinite(v)]
    numbers += [] if best is None else [best]
    axes = Axes(f"{heading} ({unit})", x_range=_ends(numbers, 0.08), y_range=(len(rows), 0),
                height=34 * len(rows) + 54, left=10)  # fmt: skip
    words = [f"{name} {_number(v)} {_brackets(ends)}" for _, name, v, *ends in rows]
    line = None
    if best is not None:
        words.append(f"{bounds.get('label', 'best possible')} {_number(best)}")
        line = {"value": best, "words": words[-1]}
    title = f"{heading} with {spread or '95 % intervals'}"
    return Chart(f"interval-{key}", axes, title, "; ".join(words) + ".", (line, rows))


def _ood_chart(
    id: str, name: str, score: str, sides: Sequence[Tensor], colour: int, bins: int = 30
) -> Chart:
    """Histograms of an uncertainty; sides: its values for familiar and for foreign examples."""
    top = max(*(float(side.max()) for side in sides), 1e-9)
    shares = [[int(n) / len(side) for n in side.double().histc(bins, 0, top)] for side in sides]
    label = score.replace("_", " ")
    y_range = (0, 1.1 * max(map(max, shares)))
    axes = Axes(f"{label} (nats)", "share of rows", (0, top), y_range, height=200)
    words = f"Filled for familiar examples, outlined for foreign ones: {label} of {name}."
    return Chart(id, axes, f"{label} inside and outside", words, shares, colour)


def _plot(id: str, plot: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name, _ in plot["series"]]
    return {"title": plot["title"], "names": names, "chart": _series_chart(id, plot)}


def _series_chart(id: str, plot: Mapping[str, Any]) -> Chart | None:
    """Series of points without the infinite ones. None if no point is left.

    A logarithmic axis needs positive x: if any x is not, the axis is linear.
    """
    places = [(x, y) for _, points in plot["series"] for x, y in points if math.isfinite(y)]
    if not places:
        return None
    log = plot.get("log", False) and all(x > 0 for x, _ in places)

    def across(x: float) -> float:
        return math.log10(x) if log else x

    ranges = _ends([across(x) for x, _ in places], 0.06), _ends([y for _, y in places], 0.06)
    title = f"log10 of the {plot['x']}" if log else plot["x"]
    marks = []
    for i, (name, points) in enumerate(plot["series"]):
        kept = [(across(x), y) for x, y in points if math.isfinite(y)]
        if kept:
            words = ", ".join(f"({x:g}, {y:.3g})" for x, y in points)
            marks.append((i, kept, f"{name} {words}"))
    words = "; ".join(words for *_, words in marks) + "."
    axes = Axes(title, plot["y"], *ranges, width=560, height=360)
    return Chart(id, axes, plot["title"], words, marks)


def _ends(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of an axis: that of the values, and a margin of `share` of it at both ends."""
    margin = share * (max(values) - min(values)) or 0.05
    return min(values) - margin, max(values) + margin


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers in [low, high], 2 to 7 of them, with their labels."""
    span = high - low
    scale = 10 ** math.floor(math.log10(span))
    step = next(m * scale for m in (0.2, 0.5, 1.0, 2.0) if span / (m * scale) <= 6.5)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(k * step, f"{k * step:.{digits}f}") for k in range(first, last + 1)]


def _thinned(xs: Tensor, ys: Tensor, most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points, evenly spaced, the last one among them."""
    step = max(1, len(xs) // most)
    return list(zip(xs.flip(0)[::step].tolist(), ys.flip(0)[::step].tolist(), strict=True))[::-1]
