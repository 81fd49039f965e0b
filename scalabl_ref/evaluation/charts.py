"""The charts of a report and of a paper: their axes, and places for all text where none overlaps.

The fonts of a reader are not known. So widths of text are upper bounds for the usual sans-serif
fonts, and what has no room is cut, moved or left out. templates/charts.html draws the charts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from . import metrics

if TYPE_CHECKING:
    from jinja2 import Environment

COLOURS = 6  # of style.css; numbers beyond have another dash and another shape
# Neither HTML nor XML can hold any other character.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TEMPLATES = Path(__file__).parent / "templates"
_SIZE, _SMALL = 11.0, 8.5  # px: letters of a chart, and those of the counts
_RISE, _FALL = 1.0, 0.3  # ems above and below the baseline


@cache
def environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader  # slow, and most commands write no report

    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["place"] = lambda value: f"{value:.2f}"
    found.filters["colour"] = colour
    found.filters["dash"] = lambda number: (number + number // 12) % 4
    found.filters["shape"] = lambda number: number // COLOURS % 4
    return found


def colour(number: int) -> int:
    return number % COLOURS


# Text --------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with a mark in place of each character that no file may hold."""
    return _FORBIDDEN.sub("\ufffd", text)


def width(text: str, size: float = _SIZE) -> float:
    """An upper bound of a text's width in px, in the usual sans-serif fonts."""
    return size * sum(map(_ems, text))


def _ems(letter: str) -> float:
    if letter in " .,:;'|!ijlfrtI()[]/-–":
        return 0.5
    if letter.isdigit() or "a" <= letter <= "z" and letter not in "mw":
        return 0.65
    if letter.isascii() and letter not in "mwMW@%+=<>~^#&":
        return 0.8
    return 1.0 if letter < "\U00010000" else 1.5


def fit(text: str, room: float) -> str:
    """The text, cut to `room` px."""
    if width(text) <= room:
        return text
    room -= width("…")
    kept = ""
    for letter in text:
        room -= width(letter)
        if room < 0:
            break
        kept += letter
    return kept.rstrip() + "…"


class Box(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float

    def meets(self, other: Box) -> bool:
        across = self.x0 < other.x1 and other.x0 < self.x1
        return across and self.y0 < other.y1 and other.y0 < self.y1

    def within(self, other: Box) -> bool:
        across = self.x0 >= other.x0 and self.x1 <= other.x1
        return across and self.y0 >= other.y0 and self.y1 <= other.y1


class Label(NamedTuple):
    """A text and the place of its baseline. anchor: start, middle or end of the text is at x."""

    x: float
    y: float
    text: str
    anchor: str = "middle"

    @property
    def box(self) -> Box:
        wide = width(self.text)
        x = self.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor] * wide
        return Box(x, self.y - _RISE * _SIZE, x + wide, self.y + _FALL * _SIZE)


class Mark(NamedTuple):
    """A label beside a point, and the line that leads there if it is not close."""

    label: Label
    leader: tuple[float, float, float, float] | None


def beside(points: Sequence[tuple[float, float, str]], area: Box) -> list[Mark | None]:
    """Labels close to points, within `area`, none on another or on a point.

    points: (x, y, text). A label is as near as the earlier ones allow. None where there is no room.
    """
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y, _ in points]
    marks: list[Mark | None] = []
    for x, y, text in points:
        half, high = width(text) / 2, (_RISE + _FALL) * _SIZE / 2
        for step in range(160):
            ring, turn = divmod(step, 16)
            far, angle = 5 + 1.6 ** (ring + 2), math.tau * (turn - 2) / 16
            dx, dy = math.cos(angle), math.sin(angle)
            at_x, at_y = x + dx * (far + half), y + dy * (far + high)
            box = Box(at_x - half, at_y - high, at_x + half, at_y + high)
            if box.within(area) and not any(box.meets(other) for other in taken):
                taken.append(box)
                leader = (x, y, x + dx * far, y + dy * far) if ring > 1 else None
                marks.append(Mark(Label(at_x, box.y0 + _RISE * _SIZE, text), leader))
                break
        else:
            marks.append(None)
    return marks


# Axes --------------------------------------------------------------------------------------------


class Tick(NamedTuple):
    value: float
    label: Label


@dataclass(frozen=True)
class Axes:
    """A plot area, the values at the ends of its two axes, and titles.

    A logarithmic axis has positive ends. Without `y_title` the y axis has no ticks. margin: at the
    left, if it is not to follow from the ticks.
    """

    x_title: str
    y_title: str = ""
    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)
    x_log: bool = False
    y_log: bool = False
    width: int = 360
    height: int = 280
    margin: int | None = None
    right: int = 12
    top: int = 14
    bottom: int = 46

    @cached_property
    def left(self) -> float:
        if self.margin is not None:
            return self.margin
        return 24 + max((width(t.label.text) for t in self.y_ticks), default=24.0)

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def x(self, value: float) -> float:
        span = self.width - self.left - self.right
        return self.left + _share(value, self.x_range, self.x_log) * span

    def y(self, value: float) -> float:
        return self.floor - _share(value, self.y_range, self.y_log) * (self.floor - self.top)

    @property
    def area(self) -> Box:
        return Box(self.left, self.top, self.width - 1.0, self.floor)

    @cached_property
    def x_ticks(self) -> list[Tick]:
        def label(value: float, text: str) -> Label:
            half = width(text) / 2 + 1
            x = max(half, min(self.x(value), self.width - half))
            return Label(x, self.floor + 19, text)

        return _ticks(*self.x_range, self.x_log, label)

    @cached_property
    def y_ticks(self) -> list[Tick]:
        def label(value: float, text: str) -> Label:  # its x is known later: it decides the margin
            return Label(0, self.y(value) + 4, text, "end")

        return _ticks(*self.y_range, self.y_log, label) if self.y_title else []

    @property
    def titles(self) -> tuple[Label, Label]:
        """Of the x axis; and of the y axis, which is turned about its place."""
        middle_x, middle_y = (self.left + self.width - self.right) / 2, (self.top + self.floor) / 2
        room_x = 2 * min(middle_x, self.width - middle_x) - 4
        room_y = 2 * min(middle_y, self.height - middle_y) - 4
        return (
            Label(middle_x, self.height - 5.0, fit(self.x_title, room_x)),
            Label(13, middle_y, fit(self.y_title, room_y)),
        )


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    low, high = ends
    if log:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    return (value - low) / (high - low)


def _ticks(low: float, high: float, log: bool, label: Callable[[float, str], Label]) -> list[Tick]:
    """The most round numbers in [low, high], up to 7, whose labels do not meet."""
    choices = [*(_log_steps(low, high) if log else ()), *_steps(low, high)]
    for values, texts in choices:
        ticks = [Tick(v, label(v, text)) for v, text in zip(values, texts, strict=True)]
        boxes = [tick.label.box for tick in ticks]
        close = any(a.meets(b) for a, b in zip(boxes, boxes[1:], strict=False))
        if 0 < len(ticks) <= 7 and not close and len(set(texts)) == len(texts):
            return ticks
    return []


def _steps(low: float, high: float) -> Iterable[tuple[list[float], list[str]]]:
    """Multiples of ever larger steps."""
    scale = 10.0 ** math.floor(math.log10(high - low))
    for factor in (0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        step = factor * scale
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < 7:
            values = [k * step for k in range(first, last + 1)]
            yield values, _texts(values, step)


def _texts(values: Sequence[float], step: float) -> list[str]:
    """Numbers with the digits that tell them apart."""
    digits = -math.floor(math.log10(step) + 1e-9)
    largest = max(map(abs, values), default=1.0)
    if digits <= 4 and largest < 1e6:
        return [f"{value:.{max(0, digits)}f}" for value in values]
    exact = max(0, math.floor(math.log10(largest or 1.0) + 1e-9) + digits)
    return [_short(f"{value:.{exact}e}") for value in values]


def _short(text: str) -> str:
    """1e+06 and 2.0e-07 as 1e6 and 2e-7."""
    number, _, power = text.partition("e")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    if not float(number):
        return "0"
    return f"{number}e{int(power)}" if int(power) else number


def _log_steps(low: float, high: float) -> Iterable[tuple[list[float], list[str]]]:
    """1, 2 and 5 times powers of ten; powers of ten; every second power, and so on."""
    first, last = math.floor(math.log10(low)), min(308, math.ceil(math.log10(high)))
    for factors, every in ((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 5), ((1,), 20), ((1,), 100):
        places = [
            (f * 10.0**k, f, k)
            for k in range(first, last + 1)
            for f in factors
            if k % every == 0 and low <= f * 10.0**k <= high
        ]
        if len(places) > 1:
            texts = [f"{v:g}" if -5 < k < 6 else f"{f}e{k}" for v, f, k in places]
            yield [v for v, _, _ in places], texts


def ends(values: Sequence[float], share: float, log: bool = False) -> tuple[float, float]:
    """The range of an axis: that of the values, and a margin of `share` of it at both ends."""
    if log:
        low, high = ends([math.log10(value) for value in values], share)
        return 10.0 ** max(low, -307.0), 10.0 ** min(high, 308.0)
    largest = max(map(abs, values))
    margin = share * (max(values) - min(values))
    if margin <= 1e-9 * largest:
        margin = 0.05 * max(1.0, largest)
    return min(values) - margin, max(values) + margin


# Charts ------------------------------------------------------------------------------------------


class Chart(NamedTuple):
    """title, words: for screen readers. marks: what the chart's macro in charts.html draws.

    alone: whether it is a file of its own, and so brings its style.
    """

    kind: str
    id: str
    axes: Axes
    title: str
    words: str
    marks: Any
    colour: int | None = None
    alone: bool = False


class Bin(NamedTuple):
    """Answers whose confidence is in [low, high): how many, mean confidence, accuracy."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


def bins_of(table: metrics.Reliability) -> list[Bin]:
    """The bins that are not empty."""
    n, columns = len(table.rows), (column.tolist() for column in table)
    every = (Bin(k / n, (k + 1) / n, *row) for k, row in enumerate(zip(*columns, strict=True)))
    return [found for found in every if found.rows]


def reliability_chart(index: int, name: str, bins: Sequence[Bin], head: str = "") -> Chart:
    """head: a line above the chart."""
    marks = [
        (b, f"confidence {b.confidence:.3f}, accuracy {b.accuracy:.3f}, {rows_of(b.rows)}")
        for b in bins
    ]
    gap, worst = max(((abs(b.confidence - b.accuracy), words) for b, words in marks),
                     key=lambda pair: pair[0])  # fmt: skip
    words = (
        "Accuracy and mean confidence in each bin of confidence. "
        f"Widest gap: {worst if gap else 'no gap'}."
    )
    axes = Axes("confidence", "accuracy", top=30 if head else 14, height=296 if head else 280)
    above = Label(axes.left, 15, fit(head, axes.width - axes.left - 4), "start") if head else None
    return Chart("reliability", f"reliability-{index}", axes, f"Reliability of {name}", words,
                 (marks, above), colour(index))  # fmt: skip


def confidence_chart(index: int, name: str, bins: Sequence[Bin], tallest: int) -> Chart:
    """tallest: largest count among the models, so that their charts share one scale."""
    axes = Axes("confidence", "rows", y_range=(0, tallest * 1.15), height=180)
    room = axes.x(bins[0].high) - axes.x(bins[0].low)
    counted = all(width(str(b.rows), _SMALL) <= room for b in bins)  # the table has them as well
    marks = counted, [(b, f"{b.low:.3f}–{b.high:.3f}: {rows_of(b.rows)}") for b in bins]
    total = rows_of(sum(b.rows for b in bins))
    title, words = f"Confidence of {name}", f"Histogram of the confidence of the {total}."
    return Chart("confidence", f"confidence-{index}", axes, title, words, marks, colour(index))


def risk_chart(models: Sequence[Mapping]) -> Chart:
    curves = [metrics.risk_coverage(m["probs"], m["labels"]) for m in models]
    highest = max(float(curve.risk.max()) for curve in curves)
    axes = Axes("coverage", "risk (error rate)", y_range=(0, max(highest * 1.05, 0.05)), width=380)
    marks = [
        (_thinned(curve.coverage, curve.risk), f"{m['name']}: area {curve.area:.3f}")
        for m, curve in zip(models, curves, strict=True)
    ]
    areas = "; ".join(words for _, words in marks)
    words = f"Error rate on the most confident share of the rows. {areas}."
    return Chart("risk", "risk-coverage", axes, "Risk and coverage", words, marks)


def interval_chart(
    rows: Sequence[tuple[int, str, float, float, float]],
    key: str,
    heading: str,
    best: tuple[str, float] | None,
    title: str,
) -> Chart:
    """A score of several models. rows: (number, name, value, low, high). best: (label, value)."""
    numbers = [v for row in rows for v in row[2:] if math.isfinite(v)]
    numbers += [] if best is None else [best[1]]
    axes = Axes(heading, x_range=ends(numbers, 0.08), y_range=(len(rows), 0),
                height=34 * len(rows) + 60, margin=10)  # fmt: skip
    words = [f"{name} {number(v)} {brackets(span)}" for _, name, v, *span in rows]
    line = None
    if best is not None:
        words.append(f"{best[0]} {number(best[1])}")
        line = {"value": best[1], "words": words[-1]}
    room = axes.width - axes.left - 4
    marks = line, [(n, fit(name, room), *values) for n, name, *values in rows]
    return Chart("intervals", f"interval-{key}", axes, title, "; ".join(words) + ".", marks)


def ood_chart(
    id: str, name: str, score: str, sides: Sequence[Tensor], colour: int, bins: int = 30
) -> Chart:
    """Histograms of an uncertainty; sides: its values for familiar and for foreign examples."""
    top = max(*(float(side.max()) for side in sides), 1e-9)
    shares = [[int(n) / len(side) for n in side.double().histc(bins, 0, top)] for side in sides]
    label = score.replace("_", " ")
    y_range = (0, 1.1 * max(map(max, shares)))
    axes = Axes(f"{label} (nats)", "share of rows", (0, top), y_range, height=206)
    words = f"Filled for familiar examples, outlined for foreign ones: {label} of {name}."
    title = f"{label} inside and outside"
    return Chart("densities", id, axes, title, words, shares, colour)


def series_chart(id: str, plot: Mapping[str, Any], number_of: Mapping[str, int]) -> Chart | None:
    """Series of points without the infinite ones. None if no point is left.

    A logarithmic axis needs positive values: if any is not, the axis is linear. number_of: of each
    name, which decides its colour and its label.
    """
    kept = [
        (number_of[name], name, [point for point in points if all(map(math.isfinite, point))])
        for name, points in plot["series"]
    ]
    kept = [series for series in kept if series[2]]
    if not kept:
        return None
    xs, ys = zip(*(point for *_, points in kept for point in points), strict=True)
    x_log = plot.get("log", False) and min(xs) > 1e-300
    y_log = plot.get("log_y", False) and min(ys) > 1e-300
    axes = Axes(plot["x"], plot["y"], ends(xs, 0.06, x_log), ends(ys, 0.06, y_log), x_log, y_log,
                width=400, height=300)  # fmt: skip
    last = [(axes.x(p[-1][0]), axes.y(p[-1][1]), str(number + 1)) for number, _, p in kept]
    texts = [f"{name} {', '.join(f'({x:g}, {y:.3g})' for x, y in p)}" for _, name, p in kept]
    marks = [
        (number, points, words, mark)
        for (number, _, points), words, mark in zip(
            kept, texts, beside(last, axes.area), strict=True
        )
    ]
    return Chart("series", id, axes, plot["title"], "; ".join(texts) + ".", marks)


def rows_of(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def number(value: float) -> str:
    return "∞" if value == math.inf else f"{value:.3f}"


def brackets(interval: Sequence[float]) -> str:
    return f"[{', '.join(map(number, interval))}]"


def _thinned(xs: Tensor, ys: Tensor, most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points, evenly spaced, the last one among them."""
    step = max(1, len(xs) // most)
    return list(zip(xs.flip(0)[::step].tolist(), ys.flip(0)[::step].tolist(), strict=True))[::-1]
