"""The results of a data set: what is computed, apart from the files that hold it."""

from __future__ import annotations

import json

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.core.predictive import predictive
from scalabl_ref.data import Example
from scalabl_ref.evaluation import metrics
from scalabl_ref.evaluation.answering import Answers
from scalabl_ref.evaluation.evaluate import score, summarise

FILES = {"metrics.json", "predictions.jsonl", "report.html"}
INFO = {
    "adapter": {"method": "scalabl"},
    "train": {"kl": "forward", "objective": "elbo"},
    "data": "somewhere/test.jsonl",
    "model": "somewhere/base",
}


def answers(seed: int, rows: int = 12, classes: int = 3, labels_from: int = 3) -> Answers:
    """Of four draws; labels may be outside the classes."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(4, rows, classes, generator=generator)).double().log_softmax(-1)
    labels = torch.randint(labels_from, (rows,), generator=generator)
    examples = [Example(f"question {i}", 0, str(i), ("a", "b", "c")) for i in range(rows)]
    return Answers(examples, labels, predictive(log_probs), samples=4)


def test_scores_are_those_of_the_metrics():
    own, ood = answers(0), answers(1, labels_from=5)
    held_out = answers(2)
    found = score(INFO, own, seed=7, bins=10, calibration=held_out, ood=ood).metrics
    assert {name: found[name] for name in metrics.SCORES} == metrics.scores(
        own.prediction.probs, own.labels, 10
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
    known = ood.labels < 3
    assert 0 < found["ood"]["n_scored"] == int(known.sum()) < found["ood"]["n"] == 12
    assert found["ood"]["acc"] == metrics.accuracy(ood.prediction.probs[known], ood.labels[known])
    uncertain = torch.cat((own.prediction.entropy, ood.prediction.entropy))
    outside = (torch.arange(24) >= 12).long()
    assert found["ood"]["auroc_entropy"] == metrics.auroc(uncertain, outside)


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
