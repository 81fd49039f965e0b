"""One HTML file that shows how far to trust a model: no script, no plotting library, no network.

The charts are SVG written by hand: `_tag` makes an element, `_Axes` turns numbers into places, and
each chart is one function. The same results give the same bytes.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..support.files import atomic_write_text
from . import metrics

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
_COLOURS = 6  # as many as _STYLE defines; then they repeat with another dash


def write_report(path: Path | str, results: Mapping[str, Any]) -> None:
    """Write `results` to `path` as one self-contained HTML file, whole or not at all.

    results:
        title     heading
        subtitle  sentence under it (optional)
        about     {fact: value}; "bins" sets the bins of the charts, 15 without it (optional)
        models    list of {name, probs (N, C), labels (N,), metrics {acc, ece, nll, brier, aurc},
                  intervals {metric: (low, high)}, ood (optional)}, shown side by side; with none
                  of them the page has notes, tables and plots alone
        bounds    {label, nll, acc, ...}: the best possible values, where known (optional)
        notes     sentences for the reader (optional)
        spread    what a model's interval is, in words (optional: a bootstrap interval without it)
        tables    list of {title, words, heads, rows: (name, cells, which of them are bold)}
                  (optional)
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
    title = results["title"]
    about, models = results.get("about", {}), results["models"]
    bins = int(about.get("bins", 15))
    body = [_header(title, results.get("subtitle"), about)]
    body += _notes(results.get("notes", ()))
    if models:
        body += _scores(models, results.get("bounds", {}), results.get("spread"))
    body += [_cells(table) for table in results.get("tables", ())]
    body += [_plot(f"plot-{i}", plot) for i, plot in enumerate(results.get("plots", ()))]
    if models:
        body += _calibration(models, bins)
        body += _risk(models)
        body += _out_of_distribution(models)
    head = (
        '<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Nothing is loaded and nothing runs, even if a name slipped through unescaped.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}</head>\n<body>\n<main>\n'
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


# Sections ----------------------------------------------------------------------------------------


def _header(title: str, subtitle: str | None, about: Mapping[str, Any]) -> str:
    facts = "".join(
        _tag("div", _tag("dt", _escape(key)), _tag("dd", _escape(value)))
        for key, value in about.items()
        if value is not None
    )
    return _tag(
        "header",
        _tag("h1", _escape(title)),
        _tag("p", _escape(subtitle), class_="subtitle") if subtitle else "",
        _tag("dl", facts) if facts else "",
    )


def _notes(notes: Sequence[str]) -> list[str]:
    paragraphs = "".join(_tag("p", _escape(note)) for note in notes)
    return [_section("What to look at", paragraphs, class_="notes")] if notes else []


BOOTSTRAP = "95 % bootstrap interval over the test examples"


def _scores(models: Sequence[Mapping], bounds: Mapping[str, Any], spread: str | None) -> list[str]:
    rows = [(m["name"], m["metrics"], m.get("intervals", {}), f"c{_colour(i)}")
            for i, m in enumerate(models)]  # fmt: skip
    if bounds:
        rows.append((bounds.get("label", "best possible"), bounds, {}, "bound"))
    columns = [c for c in _COLUMNS if any(c[0] in values for _, values, *_ in rows)]
    words = f"In brackets: {spread or BOOTSTRAP}."
    if spread is None:
        words += " Resampling raises an ECE, so that its interval may lie above its value."
    charts = [_interval_chart(models, bounds, spread, column) for column in columns[:4]]
    return [
        _section("Scores", _table("Scores of each model", columns, rows), _caption(words)),
        _tag("div", *charts, class_="grid pairs"),
    ]


def _cells(table: Mapping[str, Any]) -> str:
    """A table of words and numbers that are formatted already."""
    heads = (_tag("th", _escape(head), scope="col") for head in table["heads"])
    lines = [_tag("tr", _tag("th", "Model", scope="col"), *heads)]
    for name, cells, bold in table["rows"]:
        parts = [
            _tag("td", _tag("strong", _escape(cell)) if strong else _escape(cell))
            for cell, strong in zip(cells, bold, strict=True)
        ]
        lines.append(_tag("tr", _tag("th", _escape(name), scope="row"), *parts))
    title = table["title"]
    return _section(_escape(title), _scrolling(title, lines), _caption(table["words"]))


def _plot(id: str, plot: Mapping[str, Any]) -> str:
    names = [{"name": name} for name, _ in plot["series"]]
    return _section(_escape(plot["title"]), _numbered(names), _series_chart(id, plot))


def _calibration(models: Sequence[Mapping], bins: int) -> list[str]:
    words = (
        "Bars: how often answers of that confidence are right. Ticks: their mean confidence. "
        "Hatched: the gap between the two, which ECE averages with the counts as weights. A tick "
        "above its bar is overconfidence. Right on the dashed diagonal is perfectly calibrated."
    )
    tables = [metrics.reliability(m["probs"], m["labels"], bins) for m in models]
    tallest = max(int(t.rows.max()) for t in tables)
    figures = [
        _tag(
            "div",
            _tag("h3", _swatch(i), _escape(m["name"])),
            _reliability_chart(f"reliability-{i}", m["name"], table, _colour(i)),
            _confidence_chart(f"confidence-{i}", m["name"], table, _colour(i), tallest),
            _bin_table(m["name"], table),
        )
        for i, (m, table) in enumerate(zip(models, tables, strict=True))
    ]
    return [
        _section("Calibration", _caption(words)),
        _tag("div", *figures, class_="grid"),
    ]


def _risk(models: Sequence[Mapping]) -> list[str]:
    words = (
        "Answer only the most confident share of the questions (coverage): this is the error rate "
        "on them. A model that knows when it is wrong rises late."
    )
    return [_section("Risk and coverage", _caption(words), _legend(models), _risk_chart(models))]


def _out_of_distribution(models: Sequence[Mapping]) -> list[str]:
    with_ood = [(i, m["name"], m["ood"]) for i, m in enumerate(models) if m.get("ood")]
    if not with_ood:
        return []
    rows, charts = [], []
    for i, name, ood in with_ood:
        values = {**ood.get("metrics", {})}
        values.update({key: ood[key] for key, *_ in _AUROC if key in ood})
        label = f"{name}: {ood['name']}" if ood.get("name") else name
        rows.append((label, values, values.get("intervals", {}), f"c{_colour(i)}"))
        for k, (score, (inside, outside)) in enumerate(ood.get("scores", {}).items()):
            charts.append(_ood_chart(f"ood-{i}-{k}", name, score, inside, outside, _colour(i)))
    columns = [c for c in (*_AUROC, *_COLUMNS) if any(c[0] in values for _, values, *_ in rows)]
    words = (
        "AUROC: the probability that a foreign example is more uncertain than a familiar one. The "
        "other scores are over those foreign examples whose label the model can name."
    )
    if charts:
        words += " In the histograms familiar examples are filled, foreign ones outlined."
    return [
        _section(
            "Out of distribution",
            _table("Scores out of distribution", columns, rows),
            _caption(words),
        ),
        _tag("div", *charts, class_="grid") if charts else "",
    ]


# Tables ------------------------------------------------------------------------------------------


def _table(caption: str, columns: Sequence[tuple], rows: Iterable[tuple]) -> str:
    """rows: (name, {key: value}, {key: (low, high)}, CSS class); columns: (key, heading, unit)."""
    heads = [
        _tag("th", _escape(head), _tag("small", _escape(unit)), scope="col")
        for _, head, unit in columns
    ]
    lines = [_tag("tr", _tag("th", "Model", scope="col"), *heads)]
    for name, values, intervals, css in rows:
        swatch = _tag("span", class_="swatch", aria_hidden="true")
        cells = [
            _tag("td", _number(values.get(key)), _interval(intervals.get(key)))
            for key, *_ in columns
        ]
        lines.append(_tag("tr", _tag("th", swatch, _escape(name), scope="row"), *cells, class_=css))
    return _scrolling(caption, lines)


def _bin_table(name: str, table: metrics.Reliability) -> str:
    """The numbers behind the two charts, for those who cannot see them or want to copy them."""
    heads = ("Confidence", "Rows", "Mean confidence", "Accuracy", "Gap")
    lines = [_tag("tr", *(_tag("th", head, scope="col") for head in heads))]
    for low, high, rows, confidence, accuracy in _bins(table):
        if rows:
            values = (rows, *(f"{v:.3f}" for v in (confidence, accuracy, accuracy - confidence)))
            edges = _tag("th", f"{low:.3f}–{high:.3f}", scope="row")
            lines.append(_tag("tr", edges, *(_tag("td", _escape(v)) for v in values)))
    return _tag("details", _tag("summary", "Numbers"), _scrolling(f"Calibration of {name}", lines))


def _scrolling(caption: str, lines: Sequence[str]) -> str:
    """A table that scrolls by itself where the screen is narrow, by keyboard as well."""
    table = _tag(
        "table",
        _tag("caption", _escape(caption)),
        _tag("thead", lines[0]),
        _tag("tbody", *lines[1:]),
    )
    return _tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return "∞" if value == math.inf else f"{value:.3f}"


def _interval(interval: Sequence[float] | None) -> str:
    return _tag("small", _brackets(interval)) if interval else ""


def _brackets(interval: Sequence[float]) -> str:
    return f"[{', '.join(map(_number, interval))}]"


# Charts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """A plot area of `width` by `height` and what the ends of its two axes stand for."""

    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)
    width: float = 360
    height: float = 280
    left: float = 54
    right: float = 10
    top: float = 14
    bottom: float = 40

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return (
            self.height
            - self.bottom
            - (value - low) / (high - low) * (self.height - self.top - self.bottom)
        )

    def bar(self, left: float, right: float, low: float, high: float, **attributes: str) -> str:
        """The rectangle between two x and two y, a hair narrower so that neighbours stay apart."""
        x, top, bottom = self.x(left) + 0.75, self.y(high), self.y(low)
        return _tag("rect", x=x, y=top, width=max(self.x(right) - 0.75 - x, 0.5),
                    height=bottom - top, **attributes)  # fmt: skip

    def line(self, x1: float, y1: float, x2: float, y2: float, **attributes: str) -> str:
        ends = {"x1": self.x(x1), "y1": self.y(y1), "x2": self.x(x2), "y2": self.y(y2)}
        return _tag("line", **ends, **attributes)

    def frame(self, x_label: str, y_label: str = "") -> str:
        """Grid lines, tick labels and axis titles; the y axis only where it has a title."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        floor, middle = self.height - self.bottom, (self.top + self.height - self.bottom) / 2
        parts = [self.line(x0, y0, x1, y0, class_="axis")]
        for tick, label in _ticks(x0, x1):
            parts.append(self.line(tick, y0, tick, y1, class_="grid-line"))
            parts.append(_text(self.x(tick), floor + 14, label, text_anchor="middle"))
        centre = (self.left + self.width - self.right) / 2
        parts.append(_text(centre, self.height - 6, x_label, text_anchor="middle"))
        for tick, label in _ticks(y0, y1) if y_label else ():
            parts.append(self.line(x0, tick, x1, tick, class_="grid-line"))
            parts.append(_text(self.left - 6, self.y(tick) + 4, label, text_anchor="end"))
        if y_label:
            turn = f"rotate(-90 12 {middle:.2f})"
            parts.append(_text(12, middle, y_label, text_anchor="middle", transform=turn))
        return "".join(parts)


def _reliability_chart(id: str, name: str, table: metrics.Reliability, colour: int) -> str:
    axes = _Axes()
    hatch = _tag(
        "pattern",
        _tag("path", d="M0 6L6 0", class_="hatch"),
        id=f"{id}-hatch", width="6", height="6", patternUnits="userSpaceOnUse",
    )  # fmt: skip
    parts = [_tag("defs", hatch), axes.frame("confidence", "accuracy")]
    worst = (0.0, "no gap")
    for low, high, rows, confidence, accuracy in _bins(table):
        if not rows:
            continue
        words = f"confidence {confidence:.3f}, accuracy {accuracy:.3f}, {_rows(rows)}"
        ends = sorted((confidence, accuracy))
        bar = axes.bar(low, high, 0, accuracy, class_="fill")
        gap = axes.bar(low, high, *ends, class_="gap", fill=f"url(#{id}-hatch)")
        tick = axes.line(low, confidence, high, confidence, class_="tick")
        parts.append(_tag("g", _tag("title", words), bar, gap, tick))
        worst = max(worst, (ends[1] - ends[0], words))
    parts.append(axes.line(0, 0, 1, 1, class_="diagonal"))
    words = f"Accuracy and mean confidence in each bin of confidence. Widest gap: {worst[1]}."
    return _svg(id, axes, f"Reliability of {name}", words, parts, f"c{colour}")


def _confidence_chart(
    id: str, name: str, table: metrics.Reliability, colour: int, tallest: int
) -> str:
    """tallest: largest count among the models, so that their charts share one scale."""
    axes = _Axes(y_range=(0, tallest * 1.1), height=170)
    parts = [axes.frame("confidence", "rows")]
    for low, high, rows, *_ in _bins(table):
        if rows:
            label = _text(axes.x((low + high) / 2), axes.y(rows) - 3, str(rows), class_="count")
            bar = axes.bar(low, high, 0, rows, class_="fill")
            words = _tag("title", f"{low:.3f}–{high:.3f}: {_rows(rows)}")
            parts.append(_tag("g", words, bar, label))
    total = int(table.rows.sum())
    words = f"How many of the {_rows(total)} were answered with which confidence."
    return _svg(id, axes, f"Confidence of {name}", words, parts, f"c{colour}")


def _risk_chart(models: Sequence[Mapping]) -> str:
    curves = [metrics.risk_coverage(m["probs"], m["labels"]) for m in models]
    highest = max(float(curve.risk.max()) for curve in curves)
    axes = _Axes(y_range=(0, max(highest * 1.05, 0.05)), width=420)
    parts = [axes.frame("coverage", "risk (error rate)")]
    summary = []
    for i, (model, curve) in enumerate(zip(models, curves, strict=True)):
        points = " ".join(
            f"{axes.x(c):.1f},{axes.y(r):.1f}" for c, r in _thinned(curve.coverage, curve.risk)
        )
        words = f"{model['name']}: area {curve.area:.3f}"
        line = _tag("polyline", points=points, class_="curve", stroke_dasharray=_dash(i))
        parts.append(_tag("g", _tag("title", _escape(words)), line, class_=f"c{_colour(i)}"))
        summary.append(words)
    words = f"Error rate on the most confident share of the rows. {'; '.join(summary)}."
    return _svg("risk-coverage", axes, "Risk and coverage", words, parts)


def _interval_chart(
    models: Sequence[Mapping], bounds: Mapping[str, Any], spread: str | None, column: tuple
) -> str:
    """One metric: a dot and its interval for each model, and a line at the best possible value."""
    key, heading, unit = column
    rows = []
    for i, model in enumerate(models):
        value = model["metrics"].get(key)
        if value is not None and math.isfinite(value):
            low, high = model.get("intervals", {}).get(key) or (value, value)
            rows.append((i, model["name"], value, low, high))
    if not rows:
        return ""
    best = bounds.get(key)
    numbers = [v for row in rows for v in row[2:] if math.isfinite(v)]
    numbers += [] if best is None else [best]
    margin = 0.08 * (max(numbers) - min(numbers)) or 0.05
    left, right = min(numbers) - margin, max(numbers) + margin
    axes = _Axes((left, right), (len(rows), 0), height=34 * len(rows) + 54, left=10)
    parts = [axes.frame(f"{heading} ({unit})")]
    words = [f"{name} {_number(v)} {_brackets(ends)}" for _, name, v, *ends in rows]
    if best is not None:
        words.append(f"{bounds.get('label', 'best possible')} {_number(best)}")
        label = _tag("title", _escape(words[-1]))
        parts.append(_tag("g", label, axes.line(best, 0, best, len(rows), class_="best")))
    for place, (i, name, value, low, high) in enumerate(rows):
        y = place + 0.72
        parts.append(
            _tag(
                "g",
                _text(axes.left, axes.y(place + 0.4), _short(name)),
                axes.line(
                    low, y, min(high, right), y, class_="whisker"
                ),  # an infinite end: the edge
                _tag("circle", cx=axes.x(value), cy=axes.y(y), r="4.5", class_="dot"),
                class_=f"c{_colour(i)}",
            )
        )
    title = f"{heading} with {spread or '95 % intervals'}"
    return _svg(f"interval-{key}", axes, title, "; ".join(words) + ".", parts)


def _ood_chart(
    id: str, name: str, score: str, inside: Tensor, outside: Tensor, colour: int, bins: int = 30
) -> str:
    """Two densities of an uncertainty, filled for familiar and outlined for foreign examples."""
    top = max(float(inside.max()), float(outside.max()), 1e-9)
    shares = [
        [int(n) / len(values) for n in values.double().histc(bins, 0, top)]
        for values in (inside, outside)
    ]
    axes = _Axes((0, top), (0, 1.1 * max(map(max, shares))), height=200)
    label = score.replace("_", " ")
    parts = [axes.frame(f"{label} (nats)", "share of rows")]
    for css, heights in zip(("fill", "outline"), shares, strict=True):
        for k, share in enumerate(heights):
            if share:
                parts.append(axes.bar(top * k / bins, top * (k + 1) / bins, 0, share, class_=css))
    words = f"Filled for familiar examples, outlined for foreign ones: {label} of {name}."
    chart = _svg(id, axes, f"{label} inside and outside", words, parts, f"c{colour}")
    return _tag("div", _tag("h3", _swatch(colour), _escape(name)), chart)


def _series_chart(id: str, plot: Mapping[str, Any]) -> str:
    """Series of points, each with its number in the legend at its end; infinite ones are left out.

    A logarithmic axis needs positive x: with any other it is a linear one.
    """
    places = [(x, y) for _, points in plot["series"] for x, y in points if math.isfinite(y)]
    if not places:
        return ""
    log = plot.get("log", False) and all(x > 0 for x, _ in places)

    def across(x: float) -> float:
        return math.log10(x) if log else x

    def ends(values: list[float]) -> tuple[float, float]:
        margin = 0.06 * (max(values) - min(values)) or 0.05
        return min(values) - margin, max(values) + margin

    x_range, y_range = ends([across(x) for x, _ in places]), ends([y for _, y in places])
    axes = _Axes(x_range, y_range, width=560, height=360)
    label = f"log10 of the {plot['x']}" if log else plot["x"]
    parts = [axes.frame(label, plot["y"])]
    words = []
    for i, (name, points) in enumerate(plot["series"]):
        kept = [(across(x), y) for x, y in points if math.isfinite(y)]
        if not kept:
            continue
        said = ", ".join(f"({x:g}, {y:.3g})" for x, y in points)
        words.append(f"{name} {said}")
        line = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in kept)
        marks = [_tag("circle", cx=axes.x(x), cy=axes.y(y), r="3.5", class_="dot") for x, y in kept]
        if len(kept) > 1:
            marks.insert(
                0, _tag("polyline", points=line, class_="curve", stroke_dasharray=_dash(i))
            )
        x, y = kept[-1]
        number = _text(axes.x(x) + 6, axes.y(y) - 4, str(i + 1))
        title = _tag("title", _escape(words[-1]))
        parts.append(_tag("g", title, *marks, number, class_=f"c{_colour(i)}"))
    return _svg(id, axes, plot["title"], "; ".join(words) + ".", parts)


# Pieces ------------------------------------------------------------------------------------------


def _svg(id: str, axes: _Axes, title: str, words: str, parts: Sequence[str], css: str = "") -> str:
    return _tag(
        "svg",
        _tag("title", _escape(title), id=f"{id}-title"),
        _tag("desc", _escape(words), id=f"{id}-desc"),
        *parts,
        viewBox=f"0 0 {axes.width:g} {axes.height:g}",
        style=f"max-width:{axes.width * 1.3:g}px",
        role="img",
        aria_labelledby=f"{id}-title {id}-desc",
        class_=css,
    )


def _tag(name: str, *children: str, **attributes: Any) -> str:
    """One element; children are markup already, attribute values are escaped here.

    class_ stands for class, aria_label for aria-label; numbers get two decimals; "" is left out.
    """
    words = []
    for key, value in attributes.items():
        value = f"{value:.2f}" if isinstance(value, float) else value
        if value != "":
            words.append(f' {key.rstrip("_").replace("_", "-")}="{_escape(value)}"')
    return f"<{name}{''.join(words)}>{''.join(children)}</{name}>"


def _escape(value: Any) -> str:
    """Text for HTML and XML alike; what XML cannot hold becomes a replacement character."""
    allowed = "\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff"
    return html.escape(re.sub(f"[^{allowed}]", "\ufffd", str(value)), quote=True)


def _text(x: float, y: float, words: str, **attributes: str) -> str:
    return _tag("text", _escape(words), x=float(x), y=float(y), **attributes)


def _section(heading: str, *children: str, class_: str = "") -> str:
    return _tag("section", _tag("h2", heading), *children, class_=class_)


def _caption(words: str) -> str:
    return _tag("p", _escape(words), class_="caption")


def _legend(models: Sequence[Mapping]) -> str:
    """Names beside a piece of their line: colour and dash, for those who cannot tell colours."""
    items = []
    for i, model in enumerate(models):
        line = _tag("line", x1="0", y1="5", x2="30", y2="5", class_="curve",
                    stroke_dasharray=_dash(i))  # fmt: skip
        piece = _tag("svg", line, viewBox="0 0 30 10", aria_hidden="true", class_=f"c{_colour(i)}")
        items.append(_tag("li", piece, _escape(model["name"])))
    return _tag("ul", *items, class_="legend")


def _numbered(models: Sequence[Mapping]) -> str:
    """The legend of charts with many series: what each number stands for."""
    items = [_tag("li", f"{i + 1} ", _swatch(i), _escape(m["name"])) for i, m in enumerate(models)]
    return _tag("ul", *items, class_="legend")


def _swatch(index: int) -> str:
    return _tag("span", class_=f"swatch c{_colour(index)}", aria_hidden="true")


def _colour(index: int) -> int:
    return index % _COLOURS


def _dash(index: int) -> str:
    return ("", "7 3", "2 3", "9 3 2 3")[index % 4]


def _short(name: str, limit: int = 48) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _bins(table: metrics.Reliability) -> list[tuple[float, float, int, float, float]]:
    """(lower edge, upper edge, rows, mean confidence, accuracy) of every bin."""
    n = len(table.rows)
    columns = (column.tolist() for column in table)
    return [(k / n, (k + 1) / n, *row) for k, row in enumerate(zip(*columns, strict=True))]


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


_STYLE = """
:root{--paper:#fff;--ink:#1d2330;--soft:#5a6375;--rule:#d9dde5;--panel:#f5f6f9;--gap:#b3261e;
--c0:#2f6fb3;--c1:#c96a12;--c2:#23856d;--c3:#9a4f96;--c4:#7a6a00;--c5:#596273}
@media (prefers-color-scheme:dark){:root{--paper:#14171d;--ink:#e6e9ef;--soft:#a3acbd;
--rule:#353c49;--panel:#1c2028;--gap:#ff9b8f;
--c0:#6fa8e6;--c1:#eb9a4c;--c2:#5cc2a6;--c3:#cf8fcb;--c4:#cdbb4a;--c5:#a9b3c6}}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}
.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:68rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1rem 0 .25rem}
p{margin:.4rem 0;max-width:44rem}
.subtitle,.caption,small,dt{color:var(--soft)}
.caption{font-size:.875rem}
dl{display:flex;flex-wrap:wrap;gap:.5rem 2rem;margin:1rem 0 0}
dt{font-size:.8rem}dd{margin:0;font-weight:600}
.notes{background:var(--panel);border-radius:.5rem;margin-top:1.5rem;padding:.25rem 1.25rem .75rem}
.notes h2{border:0;margin:0;padding-top:.75rem}
.grid{display:grid;gap:1rem 2rem;
grid-template-columns:repeat(auto-fill,minmax(min(19rem,100%),1fr))}
.pairs{grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%),1fr))}
.grid>*{min-width:0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
th,td{padding:.45rem .9rem .45rem 0;text-align:right;vertical-align:top;
border-bottom:1px solid var(--rule)}
th{font-weight:600}tr>:first-child{text-align:left}
tbody th{min-width:8rem;max-width:18rem;overflow-wrap:break-word}
th small,td small{display:block;font-weight:400;font-size:.75rem;white-space:nowrap}
thead th small{white-space:normal}
.bound th,.bound td{font-style:italic}
.swatch{display:inline-block;width:.7rem;height:.7rem;border-radius:.15rem;margin-right:.5rem;
background:var(--c,transparent)}
.bound .swatch{border:1.5px dashed var(--ink)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;margin:.5rem 0;padding:0}
.legend svg{display:inline-block;width:30px;height:10px;margin-right:.5rem}
details{font-size:.875rem;margin:.25rem 0}summary{cursor:pointer;color:var(--soft)}
details table{font-size:.8rem}details th,details td{padding:.2rem .7rem .2rem 0}
details tbody th{min-width:0;font-weight:400}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11px;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.axis{stroke:var(--soft)}.grid-line{stroke:var(--rule);stroke-width:.75}
.fill{fill:var(--c);fill-opacity:.75}.outline{fill:none;stroke:var(--ink);stroke-width:1.25}
.hatch{stroke:var(--gap);stroke-width:1.25}.gap{stroke:var(--gap);stroke-width:.75}
.tick{stroke:var(--ink);stroke-width:2}
.diagonal{stroke:var(--soft);stroke-dasharray:4 4}
.best{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 3}
svg .count{text-anchor:middle;font-size:8.5px}
.curve{fill:none;stroke:var(--c);stroke-width:2}
.whisker{stroke:var(--c);stroke-width:2.5;stroke-linecap:round}.dot{fill:var(--c)}
@media print{.notes{border:1px solid var(--rule)}svg,tr{break-inside:avoid}}
"""
