"""A study's results: every cell of the tables, also those for papers, and the page's contents."""

from __future__ import annotations

import json

import pytest
import torch

from scalabl_ref import InputError, metrics
from scalabl_ref.evaluation import papers, tables
from scalabl_ref.support.tensors import save_tensors

SPREAD = {"acc": 0.01, "ece": 0.02, "nll": 0.03, "brier": 0.04}


def row(acc: float, draws: int, trial: dict, **more) -> dict:
    scores = {"acc": acc, "ece": 0.1234, "nll": 0.5678, "brier": 0.25}
    near = {**scores, "acc": acc - 0.5, "sd": SPREAD}
    each = [{"replicate": n, **scores, "nll": nll} for n, nll in ((0, 0.6), (3, 0.5), (4, 0.55))]
    return {**scores, "sd": SPREAD, "trial": trial, "parameters": 1234567, "draws": draws,
            "train_seconds": 12.34, "fit_seconds": 0.56, "answer_seconds": 0.00789,
            "peak_bytes": 345_678_901, "widths": {}, "shifted": {"near": near},
            "replicates": each, **more}  # fmt: skip


def entries(family: str, rival: str, nll: dict, ours: str = "ours") -> list[dict]:
    """The verdicts on one rival, in every score."""
    about = {"family": family, "ours": ours, "rival": rival, "replicates": 3}
    same = {
        "difference": -0.0125,
        "low": -0.025,
        "high": 0.0,
        "p": 0.0625,
        "word": "not told apart",
    }
    return [{**about, "score": key, **(nll if key == "nll" else same)} for key in metrics.SCORES]


BETTER = {"difference": -0.5, "low": -0.625, "high": -0.375, "p": 1e-4, "word": "better"}
WORSE = {"difference": 0.5, "low": 0.375, "high": 0.625, "p": 0.0123, "word": "worse"}
UNTESTED = {"word": "untested"}
VERDICT = [*entries("all", "mle", BETTER), *entries("all", "map", BETTER),
           *entries("all", "swag", WORSE), *entries("few", "mle", UNTESTED)]  # fmt: skip
FAR = {"auroc_entropy": 0.75, "auroc_mutual_information": 0.625, "scored": 0.5}
RESULTS = {
    "study": {"ood": ["far"], "model": "models/tiny", "train": "data/train.jsonl", "limit": 50,
              "samples": 7, "bins": 5},
    "methods": {
        "mle": row(0.75, 0, {"lr": 0.0123, "beta": 20.0}, ood={"far": FAR}),
        "ours": row(0.875, 10, {}, ood={"far": {**FAR, "acc": 0.5, "ece": 0.1, "nll": 2.0,
                                                "brier": 1.0}}, widths={"a": 0.5, "b": 0.25}),
        "ours + temperature": row(0.875, 10, {}, widths={"a": 0.5, "b": 0.25}),
    },
    "verdict": VERDICT,
    "pairs": [e for e in entries("all", "mle", BETTER) if e["score"] == "nll"],
    "shifted": {"near": {"verdict": entries("all", "mle", UNTESTED), "pairs": []}},
}  # fmt: skip
COSTS = "1,234,567 | {} | 12.3 | 0.6 | 7.9 | 346 |"
SAME = "-0.013 (-0.025 to +0.000; p 0.062): not told apart"
TABLE = f"""\
| method | trial | ACC | ECE | NLL | Brier | parameters | draws | train s | fit s | answer ms | peak MB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| mle | lr 0.0123, beta 20 | 0.750 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 | {COSTS.format("")}
| ours |  | 0.875 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 | {COSTS.format(10)}
| ours + temperature |  | 0.875 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 | {COSTS.format(10)}

Scores are means over replicates ± their standard deviation. Differences are ours minus the rival's, with 95 % intervals over replicates and questions, and p after Holm's correction for the number of rivals. Better, worse: p < 0.05. No worse: p < 0.05 that NLL is higher by 0.03 nats or more.

Among all: ours, chosen on the validation split, is in NLL better than mle, map; worse than swag.

Among few: ours, chosen on the validation split, is in NLL untested against mle.

Among all, ours less each rival:

| rival | replicates | ACC | ECE | NLL | Brier |
| --- | --- | --- | --- | --- | --- |
| mle | 3 | {SAME} | {SAME} | -0.500 (-0.625 to -0.375; p 0.0001): better | {SAME} |
| map | 3 | {SAME} | {SAME} | -0.500 (-0.625 to -0.375; p 0.0001): better | {SAME} |
| swag | 3 | {SAME} | {SAME} | +0.500 (+0.375 to +0.625; p 0.012): worse | {SAME} |

Among few, ours less each rival:

| rival | replicates | ACC | ECE | NLL | Brier |
| --- | --- | --- | --- | --- | --- |
| mle | 3 | {SAME} | {SAME} | untested | {SAME} |

Shifted, near:

| method | ACC | ECE | NLL | Brier |
| --- | --- | --- | --- | --- |
| mle | 0.250 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 |
| ours | 0.375 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 |
| ours + temperature | 0.375 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 |

Among all, ours less each rival:

| rival | replicates | ACC | ECE | NLL | Brier |
| --- | --- | --- | --- | --- | --- |
| mle | 3 | {SAME} | {SAME} | untested | {SAME} |

Out of distribution, far:

| method | AUROC entropy | AUROC information | ACC | ECE | NLL | Brier |
| --- | --- | --- | --- | --- | --- | --- |
| mle | 0.750 | 0.625 |  |  |  |  |
| ours | 0.750 | 0.625 | 0.500 | 0.100 | 2.000 | 1.000 |
"""  # noqa: E501


def test_every_cell_of_the_tables():
    assert tables.table(RESULTS) == TABLE


@pytest.fixture
def page(tmp_path, monkeypatch):
    """What the report is given: a method of two replicates, whose answers differ."""
    shown: dict = {}
    monkeypatch.setattr(tables, "write_report", lambda path, about: shown.update(about, path=path))
    probs = [torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.7, 0.3], [0.2, 0.8]])]
    folders = [tmp_path / str(n) for n in range(2)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        tensors = {"probs": probs[number].double(), "labels": torch.tensor([0, 1])}
        save_tensors(folder / "test.safetensors", tensors.items())
        (folder / "answers.json").write_text(json.dumps({"seed": number}))
    tables.write_page(tmp_path / "page.html", RESULTS, {"ours": folders})
    assert shown["path"] == tmp_path / "page.html"
    return shown


def test_the_page_has_the_answers_of_all_replicates(page):
    assert page["about"] == {
        "model": "tiny", "data": "train.jsonl", "training examples": 50, "replicates": 3,
        "samples": 7, "bins": 5,
    }  # fmt: skip
    assert page["notes"] == tables.sentences(RESULTS)[1:]
    (ours,) = page["models"]
    assert ours["name"] == "ours" and ours["labels"].tolist() == [0, 1, 0, 1]
    assert ours["probs"][:, 0].tolist() == pytest.approx([0.9, 0.4, 0.7, 0.2])
    row = RESULTS["methods"]["ours"]
    area = metrics.risk_coverage(ours["probs"], ours["labels"]).area
    assert ours["metrics"] == {**{key: row[key] for key in metrics.SCORES}, "aurc": area}
    assert ours["intervals"]["nll"] == (0.5, 0.6) and ours["intervals"]["acc"] == (0.875, 0.875)


def test_the_page_has_every_table_and_plot(page):
    sheets = {sheet["title"]: sheet for sheet in page["tables"]}
    assert list(sheets) == [
        "All scores", "ours on the test set, among all", "ours on the test set, among few",
        "All pairs on the test set", "Shifted: near", "ours on the near, among all",
        "Out of distribution: far", "Cost",
    ]  # fmt: skip
    names = [name for name, _ in sheets["Cost"]["rows"]]
    assert names == ["mle", "ours"]  # a temperature costs nothing
    cost = ["lr 0.0123, beta 20", "1,234,567", "", "12.3", "0.6", "7.9", "346"]
    assert sheets["Cost"]["rows"][0][1] == cost
    assert sheets["Cost"]["heads"][0] == "chosen" and len(sheets["Cost"]["heads"]) == len(cost)
    pair = ["mle", "3", "-0.500 (-0.625 to -0.375; p 0.0001): better"]
    assert sheets["All pairs on the test set"]["rows"] == [("ours", pair)]
    near = sheets["Shifted: near"]["rows"]
    assert near[0] == ("mle", ["0.250 ± 0.010", "0.123 ± 0.020", "0.568 ± 0.030", "0.250 ± 0.040"])
    assert sheets["All scores"]["rows"][1][1][0] == "0.875 ± 0.010"
    assert [name for name, _ in sheets["ours on the test set, among all"]["rows"]] == [
        "mle", "map", "swag"]  # fmt: skip
    accuracy, sigma = page["plots"]
    assert accuracy["series"] == [("mle", [(0.1234, 0.75)]), ("ours", [(0.1234, 0.875)]),
                                  ("ours + temperature", [(0.1234, 0.875)])]  # fmt: skip
    assert (accuracy["x"], accuracy["y"]) == ("ECE", "accuracy")
    assert sigma["series"] == [("ours", [(0, 0.5), (1, 0.25)])]


# A method of a name with letters of their own in LaTeX and Markdown, and of infinite NLL.
PAPER = {
    **RESULTS,
    "methods": {
        "ours": RESULTS["methods"]["ours"],
        "mle": RESULTS["methods"]["mle"],
        "a|b_c": {**row(0.5, 0, {}), "nll": None, "sd": {**SPREAD, "nll": None}},
        "few": row(0.25, 0, {}),
    },
    "verdict": [*VERDICT, *entries("few", "a|b_c", UNTESTED)],
}
MEANINGS = (
    "Scores are means over replicates ± their standard deviation. Differences are ours minus the "
    "rival's, with 95 % intervals over replicates and questions, and p after Holm's correction for "
    "the number of rivals. Better, worse: p < 0.05. No worse: p < 0.05 that NLL is higher by 0.03 "
    "nats or more."
)
LATEX = r"""% needs \usepackage{booktabs}
\begin{table}
\centering
\caption{tiny on train.jsonl, 50 training rows. MEANINGS}
\begin{tabular}{lccccl}
\toprule
method & ACC & ECE & NLL & Brier & NLL of ours less its \\
\midrule
ours & $0.875 \pm 0.010$ & $0.123 \pm 0.020$ & $0.568 \pm 0.030$ & $0.250 \pm 0.040$ & ours \\
mle & $0.750 \pm 0.010$ & $0.123 \pm 0.020$ & $0.568 \pm 0.030$ & $0.250 \pm 0.040$ & BETTER \\
a|b\_c & $0.500 \pm 0.010$ & $0.123 \pm 0.020$ & $\infty$ & $0.250 \pm 0.040$ & untested \\
few & $0.250 \pm 0.010$ & $0.123 \pm 0.020$ & $0.568 \pm 0.030$ & $0.250 \pm 0.040$ &  \\
\bottomrule
\end{tabular}
\end{table}
"""
CSV = """\
method,replicates,acc,acc_sd,ece,ece_sd,nll,nll_sd,brier,brier_sd,ours,nll_difference,nll_low,\
nll_high,nll_p,nll_word
ours,3,0.875,0.01,0.1234,0.02,0.5678,0.03,0.25,0.04,ours,,,,,
mle,3,0.75,0.01,0.1234,0.02,0.5678,0.03,0.25,0.04,ours,-0.5,-0.625,-0.375,0.0001,better
a|b_c,3,0.5,0.01,0.1234,0.02,inf,inf,0.25,0.04,ours,,,,,untested
few,3,0.25,0.01,0.1234,0.02,0.5678,0.03,0.25,0.04,,,,,,
"""
MARKDOWN = """\
| method | ACC | ECE | NLL | Brier | NLL of ours less its |
| --- | --- | --- | --- | --- | --- |
| ours | 0.875 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 | ours |
| mle | 0.750 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 | \
-0.500 (-0.625 to -0.375; p 0.0001): better |
| a\\|b_c | 0.500 ± 0.010 | 0.123 ± 0.020 | inf ± inf | 0.250 ± 0.040 | untested |
| few | 0.250 ± 0.010 | 0.123 ± 0.020 | 0.568 ± 0.030 | 0.250 ± 0.040 |  |

"""


def test_every_cell_of_the_tables_for_papers():
    better = "$-0.500$ $[-0.625, -0.375]$, $p < 0.001$: better"
    meanings = MEANINGS.replace("%", r"\%")
    latex = LATEX.replace("MEANINGS", meanings).replace("BETTER", better)
    assert papers.paper_table(PAPER, "latex") == latex
    assert papers.paper_table(PAPER, "csv") == CSV
    caption = f"tiny on train.jsonl, 50 training rows. {MEANINGS}\n"
    assert papers.paper_table(PAPER, "markdown") == MARKDOWN + caption
    whole = {**PAPER, "study": {**PAPER["study"], "limit": None}}
    assert "train.jsonl, all training rows." in papers.paper_table(whole, "markdown")


@pytest.mark.parametrize(
    ("p", "told"), [(0.00099, "p < 0.001"), (0.001, "p = 0.001"), (0.0316, "p = 0.032")]
)
def test_a_small_p_is_no_zero_in_latex(p, told):
    verdict = [{**entry, "p": p} if "p" in entry else entry for entry in VERDICT]
    assert f", ${told}$: better" in papers.paper_table({**PAPER, "verdict": verdict}, "latex")


def test_results_that_lack_what_a_table_needs_are_refused(tmp_path):
    path = tmp_path / "results.json"

    def reads(results: dict) -> bool:
        path.write_text(json.dumps(results))
        try:
            return papers.read_results(tmp_path) == results
        except InputError as error:
            assert str(error) == f"{path}: is not the results of a study"
            return False

    assert reads(PAPER)
    mle, entry = PAPER["methods"]["mle"], VERDICT[0]
    bad = [{"methods": {"mle": {**mle, key: value}}} for key, value in (
        ("sd", None), ("nll", "1"), ("sd", {**SPREAD, "acc": "1"}), ("replicates", {}),
        ("replicates", [{}]), ("replicates", [3]), ("trial", None),
    )]  # fmt: skip
    bad += [{"verdict": [{**entry, key: value}]} for key, value in (
        ("score", 1), ("ours", None), ("rival", None), ("word", 2), ("low", "1"), ("p", None),
    )]  # fmt: skip
    bad += [{"verdict": [{k: v for k, v in entry.items() if k != "low"}]}, {"verdict": {}},
            {"study": {"bins": "5"}}, {"study": {}}, {"methods": []}]  # fmt: skip
    assert not any(reads({**PAPER, **part}) for part in bad)


def test_the_figure_of_nll_has_the_least_and_the_greatest_replicate(monkeypatch):
    """A method of infinite NLL is left out, and the others keep their colours."""
    shown: list[tuple] = []
    monkeypatch.setattr(papers.plots, "intervals", lambda *about: shown.append(about))
    papers._nll_figure(PAPER, ["ours", "a|b_c", "few"])
    rows = [("ours", 0.5678, 0.5, 0.6), ("few", 0.5678, 0.5, 0.6)]
    assert shown == [(rows, "NLL (nats, lower is better)", [0, 2])]
