"""The results of a data set: what is computed, apart from the files that hold it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.core.predictive import predictive
from scalabl_ref.data import Example
from scalabl_ref.evaluation import metrics
from scalabl_ref.evaluation.answering import Answers
from scalabl_ref.evaluation.evaluate import BASE, check_results, score, summarise
from scalabl_ref.evaluation.report import document

FILES = {"metrics.json", "predictions.jsonl", "report.html"}
INFO = {
    "adapter": {"method": "scalabl"},
    "train": {"kl": "forward", "objective": "elbo"},
    "data": "somewhere/test.jsonl",
    "model": "somewhere/base",
}


def answers(seed: int, rows: int = 12, classes: int = 3, labels_from: int = 3) -> Answers:
    """Answers of four draws. Every second row is right; other labels may be outside the classes."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(4, rows, classes, generator=generator)).double().log_softmax(-1)
    labels = torch.randint(labels_from, (rows,), generator=generator)
    prediction = predictive(log_probs)
    labels[::2] = prediction.probs.argmax(1)[::2]
    examples = [Example(f"question {i}", 0, str(i), ("a", "b", "c")) for i in range(rows)]
    return Answers(examples, labels, prediction, samples=4)


def test_scores_are_those_of_the_metrics():
    own, ood = answers(0), answers(1, labels_from=5)
    held_out = answers(2)
    found = score(INFO, own, seed=7, bins=5, calibration=held_out, ood=ood).metrics
    assert {name: found[name] for name in metrics.SCORES} == metrics.scores(
        own.prediction.probs, own.labels, 5
    )
    assert (found["n"], found["seed"], found["samples"], found["design"]) == (
        12,
        7,
        4,
        "independent",
    )
    temperature = metrics.fit_temperature(held_out.prediction.probs.log(), held_out.labels)
    assert found["temperature"]["value"] == temperature and found["temperature"]["n_fit"] == 12
    scaled = metrics.apply_temperature(own.prediction.probs, temperature)
    assert found["temperature"]["nll"] == metrics.nll(scaled, own.labels)
    assert found["temperature"]["ece"] == metrics.ece(scaled, own.labels, 5)
    assert found["aurc"] == metrics.risk_coverage(own.prediction.probs, own.labels).area
    known = ood.labels < 3
    assert 0 < found["ood"]["n_scored"] == int(known.sum()) < found["ood"]["n"] == 12
    assert found["ood"]["acc"] == metrics.accuracy(ood.prediction.probs[known], ood.labels[known])
    assert found["ood"]["ece"] == metrics.ece(ood.prediction.probs[known], ood.labels[known], 5)
    about = {"method": "scalabl", "kl": "forward", "samples": 4, "bins": 5}
    assert {key: found["ood"][key] for key in about} == about
    outside = (torch.arange(24) >= 12).long()
    for name in ("entropy", "mutual_information"):
        uncertain = torch.cat([getattr(side.prediction, name) for side in (own, ood)])
        assert found["ood"][f"auroc_{name}"] == metrics.auroc(uncertain, outside)


def test_results_say_what_they_are_of():
    found = score(INFO, answers(0), seed=3).metrics
    about = {"data": "test.jsonl", "data_sha256": None, "limit": None, "method": "scalabl",
             "kl": "forward", "objective": "elbo", "prompt_template": None, "samples": 4,
             "design": "independent", "seed": 3, "bins": 15, "settings": {}}  # fmt: skip
    assert {key: found[key] for key in about} == about
    settings = {"data_sha256": "abc", "limit": 0, "more": 1}
    info = {**INFO, "data": None, "prompt_template": "{question}", "posterior": "swag"}
    found = score(info, answers(0), seed=3, design="latin", settings=settings).metrics
    about = {"data": "", "data_sha256": "abc", "limit": 0, "method": "swag", "kl": "forward",
             "prompt_template": "{question}", "settings": settings}  # fmt: skip
    assert {key: found[key] for key in about} == about and "design" not in found
    for method in ("mle", BASE):
        info = {**INFO, "adapter": {"method": method}}
        found = score(info, replace(answers(0), samples=0), seed=3).metrics
        assert found["kl"] is None and found["samples"] == 0 and "design" not in found
    assert score(INFO, answers(0), seed=3, design="latin").metrics["design"] == "latin"


def test_the_page_says_what_it_is_of():
    own = answers(0)
    own.examples[1] = replace(own.examples[1], question="the text alone")
    rule = {"temperature": {"value": 2.0}}
    found = score(INFO, own, seed=3, calibration=answers(2), ood=answers(1), run="my run",
                  rule=rule)  # fmt: skip
    page = document(found.report)
    facts = re.findall(r"<dt>(\w+)</dt><dd>(.*?)</dd>", page)
    assert [facts[0], *facts[2:]] == [
        ("run", "my run"), ("model", "base"), ("data", "test.jsonl"), ("method", "scalabl"),
        ("kl", "forward"), ("samples", "4"), ("bins", "15"), ("seed", "3"), ("n", "12"),
    ]  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", facts[1][1])
    value = found.metrics["temperature"]["value"]
    names = re.findall(r"<h3>.*?</span>(.*?)</h3>", page)
    assert names == ["scalabl", f"scalabl, temperature {value:.3f}", "scalabl", "scalabl"]
    assert found.metrics["stored_temperature"] == 2.0
    assert "scalabl: out of distribution" in page
    wrong = own.prediction.probs.argmax(1) != own.labels
    for example, listed in zip(own.examples, wrong.tolist(), strict=True):
        assert (f'<td class="text">{example.question or example.prompt}</td>' in page) == listed
    assert "<dt>run</dt>" not in document(score(INFO, own, seed=3).report)


def test_a_row_has_its_answer_and_its_uncertainty(tmp_path):
    own = replace(
        answers(0, rows=2), draws=torch.tensor([4, 6]), settled=torch.tensor([True, False])
    )
    kept = {"value": float(own.prediction.probs[1].max()), "accuracy": 0.9, "level": 0.95}
    score(INFO, own, seed=0, rule={"threshold": kept}).write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    p = own.prediction
    for i, row in enumerate(rows):
        assert row == {
            "id": str(i), "label": int(own.labels[i]), "prediction": int(p.probs[i].argmax()),
            "probs": p.probs[i].tolist(), "entropy": float(p.entropy[i]),
            "expected_entropy": float(p.expected_entropy[i]),
            "mutual_information": float(p.mutual_information[i]), "draws": [4, 6][i],
            "settled": i == 0,
            "decision": "answer" if p.probs[i].max() >= p.probs[1].max() else "human",
        }  # fmt: skip
    assert list(rows[0]) == list(rows[1]) and (tmp_path / "metrics.json").read_text()[-2:] == "}\n"


def test_results_without_settings_are_refused(tmp_path):
    for text in ('{"settings": ["data_sha256"]}', "{}"):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(InputError, match="holds results of another data file"):
            check_results(tmp_path, {"data_sha256": "a", "adapter_sha256": None, "model": "m"})


def test_all_files_are_written_or_none(tmp_path):
    results = score(INFO, answers(0), seed=0)
    assert not list(tmp_path.iterdir())  # computing writes nothing
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    results.write(*folders)
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == FILES
    assert (
        json.loads((tmp_path / "two" / "metrics.json").read_text())["acc"] == results.metrics["acc"]
    )
    lines = (tmp_path / "one" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [str(i) for i in range(12)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        results.write(tmp_path / "empty", tmp_path / "missing")
    assert not list((tmp_path / "empty").iterdir())
    (tmp_path / "empty" / "predictions.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        results.write(tmp_path / "empty")
    assert not (tmp_path / "empty" / "metrics.json").exists()  # it says that the others are there


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
def test_intervals_have_the_bins_that_were_asked_for(bins):
    generator = torch.Generator().manual_seed(5)
    probs = torch.randn(301, 3, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.randint(3, (301,), generator=generator)

    def ece(p, y):
        return metrics.ece(p, y, bins)

    found = summarise(probs, labels, bins)
    assert found["ece"] == ece(probs, labels)
    expected = metrics.bootstrap_interval(ece, probs, labels)
    for a, b in zip(found["intervals"]["ece"], expected, strict=True):
        assert abs(a - b) <= 1e-12
