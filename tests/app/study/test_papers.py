"""Tables and figures of a finished study for a paper, by the command, without running anything."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from xml.etree import ElementTree

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.app import cli
from scalabl_ref.app.study import Study, run_study
from scalabl_ref.evaluation import metrics, papers
from scalabl_ref.evaluation.tables import table
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..commands import ok, refused, run
from .studies import config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two methods and two seeds, after which its model and its data are gone."""
    folder = tmp_path_factory.mktemp("papers")
    path = config(folder)
    run_study(Study.read(path), folder / "out")
    shutil.rmtree(folder / "model")
    for file in folder.glob("*.jsonl"):
        file.unlink()
    return path, folder / "out"


def said(capsys, *command) -> str:
    assert cli.main(list(map(str, command))) == 0
    return capsys.readouterr().out


def test_a_latex_table(finished, capsys):
    path, out = finished
    text = said(capsys, "study", path, "--out", out, "--table", "latex")
    results = json.loads((out / "results.json").read_text())
    assert text.count("{") == text.count("}") and "\\usepackage{booktabs}" in text
    begun = re.findall(r"\\begin{(\w+)}", text)
    assert begun == ["table", "tabular"] and re.findall(r"\\end{(\w+)}", text) == begun[::-1]
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert [line.split(" & ")[0] for line in body] == list(results["methods"])
    for line, row in zip(body, results["methods"].values(), strict=True):
        cells = line.removesuffix(r" \\").split(" & ")
        assert len(cells) == 6 and line.endswith(r" \\")
        assert cells[3] == f"${row['nll']:.3f} \\pm {row['sd']['nll']:.3f}$"
    (entry,) = (e for e in results["verdict"] if e["score"] == "nll" and e["rival"] == "mle")
    assert f"${entry['difference']:+.3f}$" in body[0] and body[0].endswith(
        f": {entry['word']} \\\\"
    )
    ours = list(results["methods"]).index("scalabl")
    assert body[ours].endswith(r"& ours \\")


def test_letters_that_latex_takes_for_its_own_are_escaped():
    assert papers.latex("a_b & 50 % {#$}\n~^\\") == (
        r"a\_b \& 50 \% \{\#\$\} \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


def test_a_csv_table_has_all_digits(finished, tmp_path, capsys):
    _, out = finished
    text = said(capsys, "study", "--out", out, "--table", "csv")
    results = json.loads((out / "results.json").read_text())
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in rows] == list(results["methods"])
    for row in rows:
        expected = results["methods"][row["method"]]
        assert {key: float(row[key]) for key in metrics.SCORES} == {
            key: expected[key] for key in metrics.SCORES
        }
        assert float(row["nll_sd"]) == expected["sd"]["nll"] and row["replicates"] == "2"
    assert rows[0]["ours"] == "scalabl" and float(rows[0]["nll_p"]) <= 1
    file = tmp_path / "table.csv"
    said(capsys, "study", "--out", out, "--table", file)
    assert file.read_text() == text


def test_a_markdown_table_has_the_verdicts_of_the_page(finished, capsys):
    _, out = finished
    text = said(capsys, "study", "--out", out, "--table", "markdown")
    results = json.loads((out / "results.json").read_text())
    long = table(results)
    cell = text.splitlines()[2].strip("| ").split(" | ")[-1]
    assert cell in long and "(" in cell
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {7}


def test_figures_show_all_replicates(finished, tmp_path, capsys):
    _, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said(capsys, "study", "--out", out, "--figures", tmp_path / "figures")
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["nll.svg", "reliability-mle.svg", "reliability-scalabl.svg"]
    for name in names:
        ElementTree.fromstring((tmp_path / "figures" / name).read_text())
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    results = json.loads((out / "results.json").read_text())
    probs, labels = [], []
    for replicate in results["methods"]["scalabl"]["replicates"]:
        (found,) = (
            folder
            for folder in out.glob("answers/scalabl-*")
            if (folder / "test.safetensors").exists()
            and json.loads((folder / "answers.json").read_text())["seed"] == replicate["replicate"]
        )
        answers = load_tensors(found / "test.safetensors")[0]
        probs.append(answers["probs"])
        labels.append(answers["labels"])
    ece = metrics.ece(torch.cat(probs), torch.cat(labels), 15)
    assert f"scalabl: ECE {ece:.3f}" in (tmp_path / "figures/reliability-scalabl.svg").read_text()


def test_the_command_says_what_it_made(finished, tmp_path, capsys, monkeypatch):
    """And --json has the table, or the files of the figures."""
    monkeypatch.chdir(tmp_path)
    study = f"study --out {finished[1]}"
    text = said(capsys, *study.split(), "--table", "csv")
    assert ok(f"{study} --table csv", capsys) == {"table": text}
    assert run(f"{study} --table t.csv", capsys)[1] == "written: t.csv\n"
    figures = ["f/nll.svg", "f/reliability-mle.svg", "f/reliability-scalabl.svg"]
    assert ok(f"{study} --figures f", capsys) == {"figures": figures}
    assert run(f"{study} --figures f", capsys)[1] == "written: 3 figures in f\n"
    monkeypatch.setitem(sys.modules, "svglib.svglib", None)
    assert "PDF needs svglib" in refused(f"{study} --figures f --pdf", capsys)


def test_settings_of_the_file_must_be_those_of_the_results(finished, tmp_path, capsys):
    """FILE may be given too. Its paths may be gone; its settings must be the same."""
    path, out = finished
    study, other = json.loads(path.read_text()), tmp_path / "study.json"
    moved = {**study, "model": "gone", "train": "gone.jsonl"}
    for changes, differs in (
        ({"ood": {"other": {"path": "gone.jsonl", "limit": 5}}}, ""),
        ({"ood": {"other": {"path": "gone.jsonl", "limit": 4}}}, "ood differs"),
        ({"samples": 3}, "samples differs"),
    ):
        other.write_text(json.dumps({**moved, **changes}))
        command = f"study {other} --out {out} --table csv"
        if differs:
            assert f"another study than {other}: {differs}" in refused(command, capsys)
        else:
            assert run(command, capsys)[0] == 0


def test_figures_are_of_the_answers_that_were_scored(finished, tmp_path, monkeypatch):
    """Not of others with the same method, settings and seed; in the study's bins."""
    out, name = tmp_path / "out", "mle, (small)"
    shutil.copytree(finished[1], out)
    results = papers.read_results(out)
    results["methods"] = {name: results["methods"]["mle"]}
    results["study"]["bins"] = 4
    probs, labels = [], []
    for i, file in enumerate(list(out.glob("answers/mle-*/test.safetensors"))):
        folder = file.parent
        about = json.loads((folder / "answers.json").read_text())
        (folder / "answers.json").write_text(json.dumps({**about, "method": name}))
        answers = load_tensors(file)[0]
        probs.append(answers["probs"])
        labels.append(answers["labels"])
        other = shutil.copytree(folder, out / "answers" / f"a-{i}")
        answers["probs"] = answers["probs"].flip(1)
        save_tensors(other / "test.safetensors", answers.items())
    saved = []
    monkeypatch.setattr(papers.plots.Figure, "save", lambda *about: saved.append(about))
    paths = papers.write_figures(out, results, tmp_path / "figures", pdf=True)
    stems = ["nll", "reliability-mle-small"]
    wanted = [tmp_path / "figures" / f"{stem}{end}" for stem in stems for end in (".svg", ".pdf")]
    assert paths == wanted == [path for _, path in saved]
    assert len(probs) == 2
    ece = metrics.ece(torch.cat(probs), torch.cat(labels), 4)
    assert f"{name}: ECE {ece:.3f}" in str(saved[-1][0])
    results["methods"][name]["replicates"] = [{"replicate": 0}]  # whose NLL is not known
    with pytest.raises(InputError, match=r"has no answers of 'mle, \(small\)', replicate 0"):
        papers.write_figures(out, results, tmp_path / "figures", pdf=False)


def test_what_is_not_there_is_said_in_a_line(finished, tmp_path, capsys):
    path, out = finished

    def error(*command) -> str:
        assert cli.main(["study", *map(str, command)]) == 2
        return capsys.readouterr().err

    assert "has no results.json: run `scalabl study FILE" in error(
        "--out", tmp_path, "--table", "csv"
    )
    assert "--table must be one of latex, csv, markdown, FILE.tex" in error(
        "--out", out, "--table", "word"
    )
    assert "give the study's FILE" in error("--out", tmp_path)
    other = tmp_path / "study.json"
    other.write_text(json.dumps({**json.loads(path.read_text()), "seeds": [0, 1, 2]}))
    assert "results of another study" in error(other, "--out", out, "--table", "csv")
    (tmp_path / "out").mkdir()
    for text in ("[]", "{}", '{"methods": {"a": 1}, "verdict": [], "study": {"bins": 5}}'):
        (tmp_path / "out/results.json").write_text(text)
        said = error("--out", tmp_path / "out", "--table", "latex")
        assert said.startswith("error: ") and "results.json" in said and said.count("\n") == 1
    shutil.copy(out / "results.json", tmp_path / "out")
    assert "has no answers of 'mle', replicate 0" in error(
        "--out", tmp_path / "out", "--figures", tmp_path / "figures"
    )
    assert not (tmp_path / "figures").exists()


def test_infinite_scores_are_said(finished):
    _, out = finished
    results = papers.read_results(out)
    results["methods"]["mle"]["nll"] = results["methods"]["mle"]["sd"]["nll"] = None
    assert "$\\infty$" in papers.paper_table(results, "latex")
    assert "inf" in papers.paper_table(results, "markdown")
