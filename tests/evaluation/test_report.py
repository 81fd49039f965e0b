"""The report: well formed, self-contained, reproducible, and showing what it was given."""

from __future__ import annotations

import math
import re
from functools import cache
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_ref import InputError
from scalabl_ref.evaluation import metrics
from scalabl_ref.evaluation.report import write_report

VOID = {"meta"}
PLACES = {"x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "points", "viewbox"}


class Page(HTMLParser):
    """Checks that tags nest and close; keeps what the tests ask about."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []  # (enclosing tag, text)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)  # no attribute twice
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.words.append((self.open[-1], data))

    def text(self, *within: str) -> str:
        return " ".join(words for tag, words in self.words if not within or tag in within)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@cache
def _model(rows: int, classes: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(rows, classes, generator=generator)).double().softmax(1)
    labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
    values = {name: getattr(metrics, name)(probs, labels) for name in ("ece", "nll", "brier")}
    values["acc"] = metrics.accuracy(probs, labels)
    values["aurc"] = metrics.risk_coverage(probs, labels).area
    intervals = metrics.bootstrap_intervals(probs, labels, replicates=50)
    return {"probs": probs, "labels": labels, "metrics": values, "intervals": intervals}


def model(name: str = "mle", rows: int = 60, classes: int = 4, seed: int = 0, **more) -> dict:
    return {"name": name, **_model(rows, classes, seed), **more}


def ood(name: str = "elsewhere") -> dict:
    scores = (torch.linspace(0, 1, 30), torch.linspace(0.5, 1.5, 20))
    values = {"n": 20, "acc": 0.25, "intervals": {"acc": (0.125, 0.375)}}
    values["auroc_entropy"] = 0.8125
    return {
        "name": name,
        "metrics": values,
        "auroc_mutual_information": 0.6875,
        "scores": {"mutual_information": scores},
    }


def full() -> dict:
    return {
        "title": "Report",
        "subtitle": "Of a test",
        "about": {"model": "tiny", "kl": None, "bins": 10, "n": 60, "seed": 0},
        "models": [model("mle", ood=ood()), model("scalabl", seed=1), model("mle, T = 2", seed=2)],
        "bounds": {"label": "the best", "nll": 0.4321, "acc": 0.8765},
        "notes": ["Look at the gaps.", "Then at the line."],
    }


@pytest.fixture
def render(tmp_path):
    def write(results: dict) -> str:
        write_report(tmp_path / "report.html", results)
        assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # no temporary file is left
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def charts(text: str) -> list[ElementTree.Element]:
    """Every SVG, parsed by a strict XML parser."""
    parts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(parts) == text.count("<svg")
    return [ElementTree.fromstring(part) for part in parts]


def named(text: str) -> dict[str, ElementTree.Element]:
    """Charts by title; pieces of a legend have none."""
    found = {c.find("title").text: c for c in charts(text) if c.get("role") == "img"}
    assert None not in found
    return found


def check(text: str) -> Page:
    page = Page(text)
    charts(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for target in (attributes.get("aria-labelledby") or "").split():
            assert target in ids
        for value in attributes.values():
            reference = re.fullmatch(r"url\(#(.*)\)", value or "")
            assert reference is None or reference[1] in ids
        for key in PLACES & attributes.keys():
            numbers = re.split(r"[ ,]", attributes[key])
            assert all(math.isfinite(float(number)) for number in numbers)
            assert key not in ("width", "height") or float(numbers[0]) >= 0
    return page


def cells(page: Page) -> list[str]:
    """All cells of all tables with their heads, without the small print below."""
    return [words.replace("\xa0", " ") for tag, words in page.words if tag in ("td", "th")]


def test_it_holds_everything_it_was_given(render):
    results = full()
    page = check(render(results))
    text = page.text()
    for words in ("Report", "Of a test", "tiny", *results["notes"], "the best", "elsewhere"):
        assert words in text
    assert "kl" not in page.text("dt")  # a fact without a value is left out
    assert [words for tag, words in page.words if tag == "dd"] == ["tiny", "10", "60", "0"]
    for m in results["models"]:
        assert m["name"] in page.text("th")
        for value in m["metrics"].values():
            assert f"{value:.3f}" in page.text("td")
        for low, high in m["intervals"].values():
            assert f"[{low:.3f}, {high:.3f}]" in page.text("small")
    for words in ("0.432", "0.876", "0.812", "0.688", "0.250"):
        assert words in page.text("td")
    assert "[0.125, 0.375]" in page.text("small")


def test_scores_say_which_way_is_better(render):
    results = full()
    results["models"][1]["metrics"] = {**results["models"][1]["metrics"], "acc": 0.0}
    page = check(render(results))
    below = ["higher is better", "lower is better", "nats, lower is better",
             "0 to 2, lower is better", "lower is better"]  # fmt: skip
    small = [words for tag, words in page.words if tag == "small" and words[0] != "["]
    assert small == [*below, *["0.5 is chance"] * 2, "higher is better"]
    found, names = cells(page), ["ACC", "ECE", "NLL", "Brier", "AURC"]
    assert found[:6] == ["Model", *names]
    assert found[6] == "mle" and found[12:14] == ["scalabl", "0.000"]
    assert found[24:30] == ["the best", "0.876", "–", "0.432", "–", "–"]
    start = found.index("AUROC, entropy")
    assert found[start - 1 : start + 7] == [
        "Model", "AUROC, entropy", "AUROC, mutual information", "ACC",
        "mle: elsewhere", "0.812", "0.688", "0.250",
    ]  # fmt: skip
    del results["bounds"]["label"], results["models"][0]["ood"]["name"]
    found = cells(check(render(results)))
    assert found[24] == "best possible" and found[found.index("AUROC, entropy") + 3] == "mle"


def test_intervals_are_drawn_for_all_scores_except_aurc(render):
    page = check(render(full()))
    assert "; the best 0.432." in page.text("desc")
    titles = [words for tag, words in page.words if tag == "title" and "intervals" in words]
    assert titles == [f"{name} with 95 % intervals" for name in ("ACC", "ECE", "NLL", "Brier")]
    assert "NLL (nats, lower is better)" in page.text("text")
    assert (
        "In brackets: 95 % bootstrap interval over the test questions, for this training alone. "
        "Resampling raises an ECE, so its interval may lie above its value."
    ) in page.text("p")
    one = {"name": "m", **_model(20, 3, 0), "intervals": {}}
    text = render({"title": "t", "models": [one], "spread": "of replicates"})
    assert "NLL with of replicates" in named(text) and "Resampling" not in text
    value = f"{one['metrics']['nll']:.3f}"
    desc = named(text)["NLL with of replicates"].find("desc").text
    assert desc == f"m {value} [{value}, {value}]."


def test_charts(render):
    results = full()
    text = render(results)
    found = named(text)
    assert all(c.find("desc").text for c in found.values())
    names = [m["name"] for m in results["models"]]
    assert re.findall(r"</svg>([^<]+)</li>", text) == names  # beside the risk's lines
    for m in results["models"]:
        area = f"{m['name']}: area {m['metrics']['aurc']:.3f}"
        assert area in found["Risk and coverage"].find("desc").text
        table = metrics.reliability(m["probs"], m["labels"], 10)
        filled = int((table.rows > 0).sum())
        for kind in ("Reliability", "Confidence"):
            bars = found[f"{kind} of {m['name']}"].findall(".//rect[@class='fill']")
            assert len(bars) == filled
        chart = found[f"Reliability of {m['name']}"]
        assert len(chart.findall(".//rect[@class='gap']")) == filled
        counts = [t.text for t in found[f"Confidence of {m['name']}"].iter("text")
                  if t.get("class") == "count"]  # fmt: skip
        assert counts == [str(n) for n in table.rows.tolist() if n]
    assert len(found["Risk and coverage"].findall(".//polyline")) == 3
    assert "mutual information inside and outside" in found
    assert len(found["NLL with 95 % intervals"].findall(".//path[@class='best']")) == 1
    assert not found["ECE with 95 % intervals"].findall(".//path[@class='best']")


def test_bars_stand_where_the_numbers_are(render):
    """One bin, [.5, 1]: confidence .75, accuracy .5, read back from the SVG through its axes."""
    probs = torch.tensor([[0.75, 0.25]] * 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    only = {"name": "m", "probs": probs, "labels": labels, "metrics": {}}
    text = render({"title": "t", "about": {"bins": 2}, "models": [only]})
    assert cells(check(text)) == [
        "Model", "m", "Confidence", "Rows", "Mean confidence", "Accuracy", "Gap",
        "0.500–1.000", "4", "0.750", "0.500", "-0.250",
    ]  # fmt: skip
    found = named(text)
    assert [found[title].find("desc").text for title in (
        "Reliability of m", "Confidence of m", "Risk and coverage")] == [
        "Accuracy and mean confidence in each bin of confidence. Widest gap: confidence 0.750, "
        "accuracy 0.500, 4 rows.",
        "Histogram of the confidence of the 4 rows.",
        "Error rate on the most confident share of the rows. m: area 0.500.",
    ]  # fmt: skip
    assert found["Confidence of m"].find("g/title").text == "0.500–1.000: 4 rows"
    chart = found["Reliability of m"]
    diagonal = chart.find(".//line[@class='diagonal']")
    x0, y0, x1, y1 = (float(diagonal.get(k)) for k in ("x1", "y1", "x2", "y2"))
    assert x0 < x1 and y0 > y1  # to the right and up

    def place(rect, key):
        start, size = (
            float(rect.get(k)) for k in (("x", "width") if key == "x" else ("y", "height"))
        )
        low, high = (x0, x1) if key == "x" else (y0, y1)
        return sorted((v - low) / (high - low) for v in (start, start + size))

    # Places are written with two decimals; bars are 0.75 units narrower at either side.
    rounding, hair = 0.02 / abs(y1 - y0), 0.8 / (x1 - x0)
    fill, gap = (chart.find(f".//rect[@class='{css}']") for css in ("fill", "gap"))
    tick = chart.find(".//line[@class='tick']")
    for found, expected, slack in (
        (place(fill, "y"), (0, 0.5), rounding),
        (place(gap, "y"), (0.5, 0.75), rounding),
        (place(fill, "x"), (0.5, 1), hair),
    ):
        assert all(abs(a - b) <= slack for a, b in zip(found, expected, strict=True))
    assert abs((float(tick.get("y1")) - y0) / (y1 - y0) - 0.75) <= rounding


def test_histograms_stand_where_the_uncertainties_are(render):
    """Familiar ones fill 0 to 1 of an axis that ends at 1.5, foreign ones .5 to 1.5, empty at 0."""
    chart = named(render(full()))["mutual information inside and outside"]
    about = "Filled for familiar examples, outlined for foreign ones: mutual information of mle."
    assert chart.find("desc").text == about
    assert "mutual information (nats)" in [text.text for text in chart.iter("text")]
    axis = chart.find(".//line[@class='axis']")
    x0, x1 = float(axis.get("x1")), float(axis.get("x2"))
    heights = []
    for css, low, high in (("fill", 0, 2 / 3), ("outline", 1 / 3, 1)):
        bars = chart.findall(f".//rect[@class='{css}']")
        heights.append(sum(float(bar.get("height")) for bar in bars))
        left = min(float(bar.get("x")) for bar in bars)
        right = max(float(bar.get("x")) + float(bar.get("width")) for bar in bars)
        bin = (x1 - x0) / 30  # the value at the edge of two bins may be in either
        assert all(abs(float(bar.get("width")) - (bin - 1.5)) <= 0.02 for bar in bars)
        assert abs(left - (x0 + low * (x1 - x0))) <= bin + 0.76
        assert abs(right - (x0 + high * (x1 - x0))) <= bin + 0.76
    assert abs(heights[0] / heights[1] - 1) < 0.01  # shares, of 30 values and of 20


def test_there_are_15_bins_and_all_models_have_one_scale(render):
    models = [model("m", rows=30), model("n", rows=300, seed=1)]
    found, heights = named(render({"title": "t", "models": models})), []
    for m in models:
        counts = [n for n in metrics.reliability(m["probs"], m["labels"], 15).rows.tolist() if n]
        bars = found[f"Confidence of {m['name']}"].findall(".//rect[@class='fill']")
        assert len(bars) == len(counts) and all(float(bar.get("y")) > 0 for bar in bars)
        heights += [float(bar.get("height")) / n for bar, n in zip(bars, counts, strict=True)]
    assert max(heights) - min(heights) <= 0.02


def test_nothing_is_loaded_and_nothing_runs(render):
    text = render(full())
    page = check(text)
    assert not re.search(r"https?:|//\w|@import|<script|javascript:|\bon\w+=", text)
    assert not {name for name, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_it_can_be_read_by_a_screen_reader(render):
    page = check(render(full()))
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("meta")[0] == {"charset": "utf-8"}
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or svg["role"] == "img" and svg["aria-labelledby"]


def test_the_same_results_give_the_same_bytes(tmp_path):
    results = full()
    for name in ("a", "b"):
        write_report(tmp_path / name, results)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def rows(labels: torch.Tensor, names: tuple[str, ...], text: str = "question") -> dict:
    ids = [f"id{i}" for i in range(len(labels))]
    texts = [f"{text} {i}" for i in range(len(labels))]
    return {"ids": ids, "texts": texts, "choices": [names] * len(labels)}


NAMES = ("red", "green", "blue", "black")


def ten_rows() -> dict:
    """Confidence .99 down to .45: two are wrong, one of them is sure."""
    confidence = torch.tensor(
        [0.99, 0.97, 0.95, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.45], dtype=torch.float64
    )
    labels = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 2])
    probs = torch.stack([confidence, *[(1 - confidence) / 3] * 3], 1)
    one = {"name": "m", "probs": probs, "labels": labels, "metrics": {"acc": 0.8}}
    return {"title": "t", "models": [one], "rows": rows(labels, NAMES)}


def test_a_report_says_first_what_to_decide(render):
    text = render(ten_rows())
    page = check(text)
    sentences = [words for tag, words in page.words if tag == "p"][:3]
    assert sentences == [
        "On these rows, at 95 % accuracy, it can answer 4 of the 10 rows (40 %): those with a "
        "confidence of at least 0.940.",
        "1 of the 10 rows (10.0 %) is wrong and sure: wrong with a confidence of at least 0.9.",
        "Whether foreign text is noticed was not measured: --ood FILE does.",
    ]
    found = cells(page)
    start = found.index("90 %")
    assert found[start : start + 6] == ["90 %", "0.940", "4", "40.0 %", "100.0 %", "0"]
    assert [found[start + 6 * i] for i in (1, 2, 3)] == ["95 %", "99 %", "Label \\ answer"]
    matrix = found[found.index("Label \\ answer") :]
    assert matrix[1:15] == [*NAMES, "red", "8", "·", "·", "·", "green", "1", "·", "·", "·"]
    scores = found[found.index("Precision") - 1 :]
    assert scores[:5] == ["Label", "Precision", "Recall", "F1", "Rows"]
    assert scores[5:10] == ["red", "0.800", "1.000", "0.889", "8"]
    assert scores[10:15] == ["green", "–", "0.000", "0.000", "1"]
    assert scores[20:30] == ["black", "–", "–", "–", "0", "mean", "0.800", "0.333", "0.296", "10"]
    errors = found[found.index("Text") - 1 :]
    assert errors[:5] == ["Row", "Text", "Label", "Answer", "Confidence"]
    assert errors[5:15] == ["id4", "question 4", "green", "red", "0.900",
                            "id9", "question 9", "blue", "red", "0.450"]  # fmt: skip
    assert text.index("On these rows, at 95 % accuracy") < text.index("<h2>Scores")


def test_the_threshold_of_the_run_comes_first(render):
    decision = {"threshold": 0.7, "answered": 8, "right": 7, "accuracy": 0.875, "level": 0.95}
    page = check(render({**ten_rows(), "decision": decision}))
    sentences = [words for tag, words in page.words if tag == "p"]
    assert sentences[0] == (
        "The run's threshold, a confidence of 0.700, answers 8 of the 10 rows (80 %), 87.5 % of "
        "them right; the others go to a human. It was chosen for 87.5 % right, with 95 % "
        "confidence."
    )
    assert sentences[1].startswith(
        "On these rows, at 95 % accuracy, it can answer 4 of the 10 rows"
    )
    found = cells(page)
    start = found.index("Accuracy wanted") + 6
    own = ["87.5 %, kept in the run", "0.700", "8", "80.0 %", "87.5 %", "1"]
    assert found[start : start + 7] == [*own, "90 %"]
    assert "The first threshold is the one that the run keeps." in page.text("p")
    none = {**decision, "threshold": 0.995, "answered": 0, "right": 0}
    page = check(render({**ten_rows(), "decision": none}))
    assert "answers 0 of the 10 rows (0 %); the others go to a human" in page.text("p")
    page = check(render(ten_rows()))
    assert "kept in the run" not in page.text("th", "p")
    assert "These thresholds were read off these rows." in page.text("p")


def test_the_foreign_sentence_says_what_was_measured(render):
    for value, words in ((0.9, "is noticed"), (0.8999, "is often noticed"),
                         (0.7, "is often noticed"), (0.6999, "is hardly noticed"),
                         (0.6, "is hardly noticed"), (0.5999, "is not noticed"),
                         (0.0, "is not noticed")):  # fmt: skip
        one = model("m", ood={"metrics": {"auroc_entropy": value}})
        page = check(render({"title": "t", "models": [one], "rows": rows(one["labels"], NAMES)}))
        assert f"Foreign text {words}: " in page.text("p")
        assert f"with a probability of {value:.2f} by entropy (AUROC" in page.text("p")
    page = check(render({**ten_rows(), "models": [{**ten_rows()["models"][0], "ood": ood()}]}))
    assert "of 0.81 by entropy, 0.69 by mutual information (AUROC;" in page.text("p")


def test_thresholds_that_are_not_there_are_said(render):
    """m is wrong and sure in two of three rows; the threshold of n, 0.9996, is shown as 0.999."""
    probs = torch.tensor([[0.9996, 0.0004], [0.95, 0.05], [0.6, 0.4]], dtype=torch.float64)
    some = [{"name": name, "probs": probs, "labels": torch.tensor(labels), "metrics": {}}
            for name, labels in (("m", [1, 1, 0]), ("n", [0, 1, 0]))]  # fmt: skip
    given = {"title": "t", "models": some, "rows": rows(some[0]["labels"], ("a", "b"))}
    page = check(render(given))
    assert [words for tag, words in page.words if tag == "p"][:2] == [
        "On these rows, at 95 % accuracy, it can answer none of the 3 rows.",
        "2 of the 3 rows (66.7 %) are wrong and sure: wrong with a confidence of at least 0.9.",
    ]
    none, found = ["not reached", "0", "0.0 %", "–", "–"], cells(page)
    heads = ["Accuracy wanted", "Confidence from", "Answered", "Coverage", "Right", "Wrong"]
    start = found.index("Accuracy wanted") + 6
    assert found[start - 6 : start] == heads
    assert found[start : start + 18] == ["90 %", *none, "95 %", *none, "99 %", *none]
    start = found.index("Accuracy wanted", start) + 7
    assert found[start : start + 5] == ["0.999", "1", "33.3 %", "100.0 %", "0"]  # not 1.000
    captions = [words for tag, words in page.words if tag == "h3"]
    assert captions[:2] == ["Thresholds of m", "Thresholds of n"]
    one = {"name": "m", "probs": probs[:1], "labels": torch.tensor([0]), "metrics": {}}
    given = {"title": "t", "models": [one], "rows": rows(one["labels"], ("a", "b"))}
    page = check(render(given))
    assert "it can answer 1 of the 1 row (100 %): those" in page.text("p")
    assert "0 of the 1 row (0.0 %) are wrong and sure" in page.text("p")
    assert "Thresholds of m" not in page.text("h3")


@pytest.mark.parametrize("classes", [30, 31])
def test_a_confusion_matrix_has_30_classes_at_most(render, classes):
    """Its cells are the darker, the larger their share of the row; all classes have scores."""
    probs = torch.full((4, classes), 0.01, dtype=torch.float64)
    probs[:3, 0] = probs[3, 1] = 1 - 0.01 * (classes - 1)
    one = {"name": "m", "probs": probs, "labels": torch.zeros(4).long(), "metrics": {}}
    names = tuple(f"class {i}" for i in range(classes))
    page = check(render({"title": "t", "models": [one], "rows": rows(one["labels"], names)}))
    found = cells(page)
    assert found[found.index("Precision") + 4 :][5 * classes - 5] == f"class {classes - 1}"
    shades = [(td["class"], td["style"]) for td in page.all("td") if "style" in td]
    assert len(shades) == (900 if classes == 30 else 0)
    first = [("hit", "--heat:45%"), ("miss", "--heat:15%"), ("miss", "--heat:0%")]
    assert shades[:3] == (first if classes == 30 else [])


def test_rows_with_choices_of_their_own_have_no_confusion_matrix(render):
    one = model("m")
    given = rows(one["labels"], NAMES)
    given["choices"][3] = ("red", "green", "blue", "white")
    page = check(render({"title": "t", "models": [one], "rows": given}))
    assert "Confusion matrix" not in page.text("h2") and "Precision" not in page.text("th")
    assert "The worst errors" in page.text("h2")


def test_an_answer_beyond_a_rows_own_choices_is_its_letter(render):
    probs = torch.tensor([[0.1, 0.2, 0.7], [0.9, 0.1, 0.0]], dtype=torch.float64)
    given = rows(torch.tensor([0, 0]), ("red", "green", "blue"))
    given["choices"][0] = ("red", "green")
    one = {**model("m"), "probs": probs, "labels": torch.tensor([0, 0])}
    page = check(render({"title": "t", "models": [one], "rows": given}))
    assert "question 0 red C 0.700" in page.text("td")


def test_long_texts_are_cut_and_no_error_is_said(render):
    probs = torch.tensor([[0.8, 0.2]] * 3, dtype=torch.float64)
    one = {"name": "m", "probs": probs, "labels": torch.tensor([0, 1, 0]), "metrics": {}}
    given = rows(one["labels"], ("a" * 5000, "b" * 40), text="word  \n" * 10**5)
    text = render({"title": "t", "models": [one], "rows": given})
    assert "word word" in text and "…" in text and len(text) < 60_000
    start = cells(check(text)).index("Confidence") + 1
    assert cells(check(text))[start : start + 5] == [
        "id1", "word " * 47 + "word…", "b" * 40, "a" * 39 + "…", "0.800"
    ]  # fmt: skip
    right = {**one, "labels": torch.tensor([0, 0, 0]), "probs": probs.round()}
    page = check(render({"title": "t", "models": [right], "rows": rows(one["labels"], ("a", "b"))}))
    assert "No answer is wrong." in page.text("p")
    assert "Widest gap: no gap." in page.text("desc")


HOSTILE = "</title></style><script>alert(1)</script>\"'><img src=x onerror=y>&amp; \x00\x1b\x85"


def hostile(words: str) -> dict:
    results = full()
    results.update(title=words, subtitle=words, notes=[words], about={words: words})
    results["bounds"]["label"] = words
    results["models"] = [model(words, rows=5, ood=ood(words))]
    scores = results["models"][0]["ood"]["scores"]
    scores[words] = scores.pop("mutual_information")
    labels = results["models"][0]["labels"]
    results["rows"] = rows(labels, (words,) * 4, words)
    results["rows"]["ids"] = [words] * len(labels)
    return results


def test_hostile_words_stay_words(render):
    page = check(render(hostile(HOSTILE)))
    assert not {name for name, _ in page.tags} & {"script", "img"}
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\x85", "\ufffd")
    for tag in ("title", "h1", "p", "dt", "dd", "th"):
        assert shown in page.text(tag)
    assert f"Calibration of {shown}" in [div.get("aria-label") for div in page.all("div")]
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=20))
def test_any_words_give_a_well_formed_page(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("report") / "r.html"
    write_report(path, hostile(words))
    check(path.read_text(encoding="utf-8"))


def test_little_and_infinite_results(render):
    """One row, one model, an infinite NLL, no intervals, no facts."""
    one = {
        "name": "m",
        "probs": torch.tensor([[1.0, 0.0]]),
        "labels": torch.tensor([1]),
        "metrics": {"acc": 0.0, "nll": math.inf},
    }
    page = check(render({"title": "t", "models": [one]}))
    assert "∞" in page.text("td")
    assert "confidence 1.000, accuracy 0.000, 1 row." in page.text("desc")
    assert "NLL with 95 % intervals" not in page.text("title")
    two = model("finite", intervals={"nll": (0.5, math.inf)})
    page = check(render({"title": "t", "models": [one, two]}))
    assert "[0.500, ∞]" in page.text("desc")


def test_many_models_and_rows(render):
    """Eight models share six colours but no line; a long curve is thinned, its end kept."""
    models = [model(f"model {i}", rows=5000 if i == 0 else 20, seed=i) for i in range(8)]
    text = render({"title": "t", "models": models})
    check(text)
    chart = named(text)["Risk and coverage"]
    groups = [g for g in chart.findall("g") if g.find("polyline") is not None]
    looks = [(g.get("class"), g.find("polyline").get("stroke-dasharray")) for g in groups]
    assert len(set(looks)) == 8
    points = groups[0].find("polyline").get("points").split()
    assert 400 <= len(points) < 500
    ends = [g.find("polyline").get("points").split()[-1].split(",")[0] for g in groups]
    assert len(set(ends)) == 1  # all reach coverage 1


def test_bad_predictions_write_nothing(tmp_path):
    bad = model()
    bad["probs"] = bad["probs"] * 2
    with pytest.raises(InputError, match="must sum to one"):
        write_report(tmp_path / "report.html", {"title": "t", "models": [bad]})
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "missing" / "report.html", full())
    assert list(tmp_path.iterdir()) == []


def _series(**changes):
    series = [("one", [(10, 2.0), (100, 1.0)]), ("two", [(10, 3.0)])]
    plot = {"title": "NLL and size", "x": "examples", "y": "NLL", "log": True, "series": series}
    return {**plot, **changes}


def _circles(tmp_path, plot) -> list[tuple[float, float]]:
    results = {"title": "t", "models": [{"name": "m", **_model(20, 3, 0)}], "plots": [plot]}
    write_report(tmp_path / "r.html", results)
    text = (tmp_path / "r.html").read_text()
    found = re.search(r'<svg[^>]*aria-labelledby="plot-0-title.*?</svg>', text, re.DOTALL)
    if found is None:
        return []
    svg = ElementTree.fromstring(found[0])
    return [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]


def test_series_stand_where_their_numbers_say(tmp_path):
    """On a logarithmic axis equal ratios are equal distances; y grows upwards."""
    points = [(1, 1.0), (10, 2.0), (100, 4.0)]
    (x0, y0), (x1, y1), (x2, y2) = _circles(tmp_path, _series(series=[("a", points)]))
    assert abs((x1 - x0) - (x2 - x1)) <= 0.02 and x0 < x1
    assert abs(2 * (y0 - y1) - (y1 - y2)) <= 0.02 and y0 > y1
    linear = _circles(tmp_path, _series(series=[("a", points)], log=False))
    assert abs((linear[2][0] - linear[1][0]) - 10 * (linear[1][0] - linear[0][0])) <= 0.1
    (_, y0), (_, y1), (_, y2) = _circles(tmp_path, _series(series=[("a", points)], log_y=True))
    assert abs((y0 - y1) - (y1 - y2)) <= 0.02 and y0 > y1
    zero = [(0, 1.0), (10, 2.0)]
    assert len(_circles(tmp_path, _series(series=[("a", zero)]))) == 2  # no logarithm of 0
    infinite = [(1, math.inf), (10, 2.0)]
    assert len(_circles(tmp_path, _series(series=[("a", infinite)]))) == 1
    assert _circles(tmp_path, _series(series=[("a", [(1, math.inf)])])) == []


def test_a_series_has_one_number_on_all_plots(tmp_path):
    """Numbers go on after the models', in order, even if two models have the same name."""
    pair = [model("m"), model("m", seed=1)]
    plots = [_series(), _series(series=[("three", [(1, 1.0)]), ("m", [(1, 2.0)]),
                                        ("two", [(10, 3.0)])])]  # fmt: skip
    for models, legends in ((pair, ["3 one", "4 two", "1 m", "4 two", "5 three"]),
                            ([], ["1 one", "2 two", "2 two", "3 three", "4 m"])):  # fmt: skip
        write_report(tmp_path / "r.html", {"title": "t", "models": models, "plots": plots})
        page = Page((tmp_path / "r.html").read_text())
        found = [words for tag, words in page.words if tag == "li"]
        names = [f"{number}{name}" for number, name in zip(found[::2], found[1::2], strict=False)]
        assert names[:5] == legends


def test_tables_plots_and_the_word_for_intervals(tmp_path):
    rows = [("mle", ["0.5 ± 0.1", "<b>"])]
    table = {"title": "All", "heads": ["ACC", "x"], "rows": rows, "words": "What it is."}
    model = {"name": "m", "intervals": {"acc": (0.1, 0.2)}, **_model(20, 3, 0)}
    results = {"title": "t", "models": [model], "tables": [table], "plots": [_series()],
               "spread": "least and greatest replicate"}  # fmt: skip
    write_report(tmp_path / "r.html", results)
    page = Page((tmp_path / "r.html").read_text())
    assert "0.5 ± 0.1 <b>" in page.text("td")
    assert "What it is." in page.text("p")
    assert "In brackets: least and greatest replicate." in page.text("p")
    assert "bootstrap" not in page.text()
    assert [w for tag, w in page.words if tag == "li" and w in ("one", "two")] == ["one", "two"]
    assert "one (10, 2), (100, 1); two (10, 3)." in page.text("desc")
    texts = [text.text for text in named((tmp_path / "r.html").read_text())["NLL and size"].iter()]
    assert [words for words in texts if words in ("examples", "NLL")] == ["examples", "NLL"]


def test_a_page_without_models_has_its_plots(tmp_path):
    write_report(tmp_path / "r.html", {"title": "t", "models": [], "plots": [_series()]})
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 1 and "<table" not in page
