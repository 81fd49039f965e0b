"""Figures for papers: SVG by itself, with the numbers of `metrics`; PDF where svglib is."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import pytest
import torch

from scalabl_ref import InputError, metrics, plots
from scalabl_ref.evaluation import charts

from .test_charts import faults
from .test_report import model

SVG = "{http://www.w3.org/2000/svg}"


def figure(**more) -> plots.Figure:
    one = model("m", rows=200, seed=3)
    return plots.reliability(one["probs"], one["labels"], **more)


def test_a_reliability_diagram_has_the_bins_and_the_ece_of_the_metrics():
    one = model("m", rows=200, seed=3)
    for bins in (4, 15):
        found = figure(n_bins=bins, name="<LoRA> & co")
        svg = ElementTree.fromstring(found)
        assert svg.tag == f"{SVG}svg" and faults(svg) == []
        assert found.ece == metrics.ece(one["probs"], one["labels"], bins)
        texts = [text.text for text in svg.iter(f"{SVG}text")]
        assert f"<LoRA> & co: ECE {found.ece:.3f}" in texts
        filled = int((metrics.reliability(one["probs"], one["labels"], bins).rows > 0).sum())
        assert sum(e.get("class") == "fill" for e in svg.iter()) == filled
    found = figure()
    assert found.ece == metrics.ece(one["probs"], one["labels"], 15)
    svg = ElementTree.fromstring(found)
    assert f"ECE {found.ece:.3f}" in [text.text for text in svg.iter(f"{SVG}text")]
    assert svg.find(f"{SVG}title").text == "Reliability of the answers"
    assert found._repr_svg_() == found and found.endswith("</svg>\n")


def test_a_figure_needs_no_other_file_and_has_the_colours_of_the_page():
    text = figure()
    assert not re.search(r"url\(|var\(|@import|<script|https?:(?!//www.w3.org/2000/svg)", text)
    page = (charts._TEMPLATES / "style.css").read_text()
    light = re.findall(r"--c\d: (#\w{6})", page)[: charts.COLOURS]
    assert re.findall(r"\.c\d \.dot { fill: (#\w{6}) }", text) == light


def test_a_figure_of_intervals_stands_where_the_numbers_are():
    rows = [("a", 1.0, 0.0, 2.0), ("b", 3.0, 2.0, 4.0), ("W" * 90, 2.0, 2.0, 2.0)]
    svg = ElementTree.fromstring(plots.intervals(rows, "NLL", [0, 4, 9]))
    assert faults(svg) == []
    lines = [e for e in svg.iter() if e.get("class") == "whisker"]
    (a0, a1), (b0, b1), (c0, c1) = [(float(e.get("x1")), float(e.get("x2"))) for e in lines]
    assert abs(a1 - b0) <= 0.02 and abs((a1 - a0) - (b1 - b0)) <= 0.02 and c0 == c1
    assert [g.get("class") for g in svg.iter(f"{SVG}g")] == ["c0", "c4", "c3"]
    assert svg.find(f"{SVG}desc").text.startswith("a 1.000 [0.000, 2.000]; b 3.000 [2.000, 4.000];")
    assert svg.find(f"{SVG}title").text == "NLL"
    plain = plots.intervals(rows, "NLL")
    assert [g.get("class") for g in ElementTree.fromstring(plain).iter(f"{SVG}g")] == [
        "c0", "c1", "c2"
    ]  # fmt: skip
    assert plain.ece is None
    with pytest.raises(InputError, match="needs rows"):
        plots.intervals([], "NLL")


def test_bad_answers_have_no_figure():
    with pytest.raises(InputError, match="must sum to one"):
        plots.reliability(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))


def test_figures_are_saved_by_their_ends(tmp_path, monkeypatch):
    figure().save(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == figure()
    with pytest.raises(InputError, match="cannot be written"):
        figure().save(tmp_path / "no" / "a.svg")
    monkeypatch.setitem(sys.modules, "svglib.svglib", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[figures\]' in the clone"):
        figure().save(tmp_path / "a.pdf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_a_figure_as_pdf():
    pytest.importorskip("svglib", reason="svglib is in the extra figures")
    assert plots.pdf(figure(name="±")).startswith(b"%PDF-")
    assert "numpy" not in sys.modules
