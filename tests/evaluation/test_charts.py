"""Charts of every kind, over many data sets: no text on another text, none cut off, ticks right."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_ref.evaluation.charts import COLOURS, Axes, ends, environment, fit, width
from scalabl_ref.evaluation.report import document

from .test_report import charts, model, named, ood

# Advances of DejaVu Sans, the widest of the usual fonts, in hundredths of an em, by letter.
ADVANCES = {
    letter: wide / 100
    for wide, letters in {
        27: "'", 28: "ijl", 29: "IJ", 32: " ,.", 34: "/:;\\|", 35: "f", 36: "-", 39: "()[]t",
        40: "!", 41: "r", 46: '"', 50: "*_`–", 52: "sz", 53: "?", 55: "c", 56: "L", 58: "Fk",
        59: "vxy", 60: "P", 61: "TYao", 62: "e", 63: "ESbdghnpqu", 64: "$0123456789{}", 66: "K",
        68: "AV", 69: "BRXZ", 70: "C", 73: "U", 75: "HN", 77: "DG", 78: "&", 79: "OQ", 82: "w",
        84: "#+<=>^~", 86: "M", 95: "%", 97: "m", 99: "W", 100: "@",
    }.items()
    for letter in letters
}  # fmt: skip
RISE, FALL = 0.93, 0.24  # of the same font


def extent(text: str, size: float) -> float:
    return size * sum(ADVANCES.get(letter, 1.0) for letter in text)


Box = tuple[float, float, float, float]


def text_boxes(svg: ElementTree.Element) -> list[tuple[str, Box]]:
    """Each text of a chart with its box (left, top, right, bottom), in the chart's units."""
    found = []
    for text in (e for e in svg.iter() if e.tag.endswith("text")):
        small, place = text.get("class") == "count", (text.get("x"), text.get("y"))
        size, x, y = 8.5 if small else 11.0, *map(float, place)
        wide = extent(text.text or "", size)
        anchor = "middle" if small else text.get("text-anchor", "start")
        left = -wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        box = (left, -RISE * size, left + wide, FALL * size)
        if turn := text.get("transform"):  # a quarter turn to the left about the place
            assert turn == f"rotate(-90 {' '.join(place)})"
            box = (box[1], -box[2], box[3], -box[0])
        found.append((text.text or "", (x + box[0], y + box[1], x + box[2], y + box[3])))
    return found


def meets(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def faults(svg: ElementTree.Element) -> list[str]:
    """Texts on each other or beyond the edge, and lines of the best value through a text."""
    wide, high = (float(size) for size in svg.get("viewBox").split()[2:])
    boxes = text_boxes(svg)
    found = [f"{a!r} is on {b!r}" for i, (a, one) in enumerate(boxes)
             for b, other in boxes[i + 1 :] if meets(one, other)]  # fmt: skip
    found += [f"{t!r} is cut off: {b}" for t, b in boxes
              if b[0] < 0 or b[1] < 0 or b[2] > wide or b[3] > high]  # fmt: skip
    for path in (e for e in svg.iter() if e.get("class") == "best"):
        for x, y, end in re.findall(r"M([\d.-]+) ([\d.-]+)V([\d.-]+)", path.get("d")):
            line = (float(x) - 0.75, float(y), float(x) + 0.75, float(end))
            found += [f"the best value strikes {t!r}" for t, b in boxes if meets(line, b)]
    return found


def check(results: dict) -> None:
    text = document(results)
    for svg in charts(text):
        assert faults(svg) == [], svg.find("title").text


def test_faults_are_found():
    def svg(inside: str) -> ElementTree.Element:
        return ElementTree.fromstring(f'<svg viewBox="0 0 100 50">{inside}</svg>')

    one = '<text x="20" y="20">one</text>'
    assert faults(svg(one)) == []
    assert faults(svg(one + '<text x="30" y="25">two</text>')) == ["'one' is on 'two'"]
    assert faults(svg('<text x="90" y="20">one</text>'))[0].startswith("'one' is cut off")
    turned = '<text x="23" y="30" transform="rotate(-90 23 30)">two</text>'
    assert faults(svg(one + turned)) == ["'one' is on 'two'"]
    assert faults(svg(one + '<path class="best" d="M25.00 5.00V40.00"/>')) == [
        "the best value strikes 'one'"
    ]


names = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), max_size=60)
names |= st.sampled_from(["W" * 60, "a model with a long name, temperature 1.234, and more words"])
values = st.floats(-1e4, 1e4) | st.floats(0, 1) | st.integers(0, 10**6).map(float)


@st.composite
def pages(draw):
    """Results with models, a best value, sets out of distribution and plots."""
    count = draw(st.integers(1, 5))
    rows, classes = draw(st.integers(1, 400)), draw(st.integers(2, 6))
    shift, scale = draw(st.floats(-1, 1e3)), 10 ** draw(st.floats(-6, 2))
    models = []
    for i in range(count):
        one = model(draw(names), rows, classes, i)
        one["metrics"] = {k: shift + scale * v for k, v in one["metrics"].items()}
        one["intervals"] = {k: (shift + scale * v[0], shift + scale * v[1])
                            for k, v in one["intervals"].items()}  # fmt: skip
        models.append(one)
    if draw(st.booleans()):
        models[0]["ood"] = ood(draw(names))
        inside, outside = models[0]["ood"]["scores"]["mutual_information"]
        models[0]["ood"]["scores"] = {draw(names): (scale * inside, scale * outside)}
    bounds = {"label": draw(names), "nll": shift, "acc": shift + scale}
    return {
        "title": "t", "models": models, "bounds": bounds if draw(st.booleans()) else {},
        "about": {"bins": draw(st.integers(1, 120))},
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(pages())
def test_no_text_is_on_another_or_cut_off(results):
    check(results)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(names, st.lists(st.tuples(values, values), min_size=1, max_size=6)),
        min_size=1, max_size=40,
    ),
    names, names, st.booleans(), st.booleans(),
)  # fmt: skip
def test_labels_of_series_keep_apart(series, x, y, log, log_y):
    plot = {"title": "p", "x": x, "y": y, "log": log, "log_y": log_y, "series": series}
    check({"title": "t", "models": [], "plots": [plot]})


def test_every_series_that_has_room_has_its_number():
    """70 methods whose points lie close together, as in a large study."""
    generator = torch.Generator().manual_seed(0)
    points = (torch.randn(70, 2, generator=generator) * 0.01 + 0.5).tolist()
    series = [(f"method {i}", [tuple(point)]) for i, point in enumerate(points)]
    plot = {"title": "p", "x": "ECE", "y": "accuracy", "series": series}
    svg = named(document({"title": "t", "models": [], "plots": [plot]}))["p"]
    assert faults(svg) == []
    shown = [text for text, _ in text_boxes(svg)]
    assert all(str(i + 1) in shown for i in range(70))


def test_counts_of_narrow_bars_are_left_to_the_table():
    many = model("m", rows=2000, classes=3, seed=1)
    for bins, shown in ((5, True), (60, False)):
        text = document({"title": "t", "models": [many], "about": {"bins": bins}})
        svg = named(text)["Confidence of m"]
        assert faults(svg) == []
        assert bool([t for t in svg.iter("text") if t.get("class") == "count"]) == shown


def test_a_model_has_one_colour_and_one_number_on_a_page():
    """Also where a plot leaves out the first models, and names others."""
    some = [model(f"m{i}", seed=i, ood=ood()) for i in range(3)]
    series = [("other", [(0, 1.0)]), ("m2", [(1, 2.0)]), ("m1", [(2, 3.0), (3, 3.0)])]
    plot = {"title": "p", "x": "x", "y": "y", "series": series}
    text = document({"title": "t", "models": some, "plots": [plot, {**plot, "title": "q"}]})
    found = named(text)
    for title in "pq":
        groups = [g for g in found[title].iter("g")]
        assert [g.get("class") for g in groups] == ["c3", "c2", "c1"]
        assert [g.find("text").text for g in groups] == ["4", "3", "2"]
    assert found["Reliability of m2"].get("class") == "c2"
    rows = re.findall(r'<tr class="(c\d)"><th scope="row"><span[^>]*></span>(m\d)', text)
    assert set(rows) == {("c0", "m0"), ("c1", "m1"), ("c2", "m2")}
    legend = re.findall(r"<li>(\d) <span class=\"swatch (c\d)\"[^>]*></span>(\w+)</li>", text)
    assert legend[:3] == [("2", "c1", "m1"), ("3", "c2", "m2"), ("4", "c3", "other")]


def test_24_models_look_different():
    filters = environment().filters
    looks = {(filters["colour"](i), filters["dash"](i)) for i in range(24)}
    marks = {(filters["colour"](i), filters["shape"](i)) for i in range(24)}
    assert len(looks) == len(marks) == 24 and len({i % COLOURS for i in range(24)}) == COLOURS


@given(st.floats(-10, 10), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low, span):
    """Where they say: a label has the digits that tell it from the next."""
    axes = Axes("x", "y", (low, low + span), (low, low + span))
    for ticks in (axes.x_ticks, axes.y_ticks):
        assert 1 <= len(ticks) <= 7
        slack = 1e-8 * span + 1e-15 * abs(low)
        assert all(low - slack <= tick.value <= low + span + slack for tick in ticks)
        step = ticks[1].value - ticks[0].value if len(ticks) > 1 else span
        for tick in ticks:
            assert abs(float(tick.label.text) - tick.value) <= 0.06 * step


@given(st.floats(-8, 8), st.floats(0.05, 12))
def test_logarithmic_ticks_are_in_units(low, decades):
    axes = Axes("x", "y", (10**low, 10 ** (low + decades)), x_log=True)
    ticks = axes.x_ticks
    assert 1 <= len(ticks) <= 7
    for tick in ticks:
        assert math.isclose(float(tick.label.text), tick.value, rel_tol=0.05)
        share = (math.log10(tick.value) - low) / decades
        place = axes.left + share * (axes.width - axes.left - axes.right)
        assert abs(axes.x(tick.value) - place) < 1e-6
        assert -1e-6 <= share <= 1 + 1e-6


@given(names, st.floats(0, 500))
def test_text_is_cut_to_its_room(text, room):
    cut = fit(text, room)
    assert cut == text if width(text) <= room else cut.endswith("…")
    assert width(cut) <= room or cut == "…"
    assert extent(text, 11) <= width(text)  # an upper bound


@given(st.lists(st.floats(-1e300, 1e300), min_size=1), st.floats(0.01, 1))
def test_the_ends_of_an_axis_hold_all_values(numbers, share):
    low, high = ends(numbers, share)
    assert low < min(numbers) and high > max(numbers)


@pytest.mark.parametrize("log", [False, True])
def test_equal_values_have_an_axis(log):
    low, high = ends([3.0, 3.0], 0.06, log)
    assert low < 3 < high and high - low < 1
