"""Studies: what is tuned on what, what is done again, and what the tables say."""

from __future__ import annotations

import json
import math

import pytest
import torch

from scalabl_ref import InputError, cli, metrics
from scalabl_ref import study as module
from scalabl_ref.checkpoint import load_tensors
from scalabl_ref.study import METHODS, Job, Study, study, table

from .models import questions_file, tiny_folder

FEW = {"steps": 3, "batch": 4, "rank": 2, "targets": ["q_proj", "lm_head"]}


def config(tmp_path, **changes):
    folder = tiny_folder(tmp_path / "model")
    train = questions_file(tmp_path / "train.jsonl", rows=20)
    test = questions_file(tmp_path / "test.jsonl", rows=9)
    values = {
        "model": str(folder), "train": str(train), "test": str(test), "ood": str(test),
        "seeds": [0, 1], "samples": 2, "lr": [0.01, 0.02], "settings": FEW,
        "methods": ["mle", "scalabl"], **changes,
    }  # fmt: skip
    path = tmp_path / "study.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study of every method, and its results."""
    folder = tmp_path_factory.mktemp("study")
    path = config(folder, methods=list(METHODS), lr=[0.01])
    return Study.read(path), folder / "out", study(Study.read(path), folder / "out")


def test_every_method_is_tuned_on_equally_many_trials_and_tested_with_every_seed(done):
    config, out, results = done
    assert {len(trials) for trials in results["tuning"].values()} == {2}
    names = {name for m in METHODS for name in (m, f"{m} + temperature")}
    assert set(results["methods"]) == names
    for name, row in results["methods"].items():
        assert len(row["seeds"]) == 2 and row["train_seconds"] > 0 and row["peak_bytes"] > 1e6
        for key in ("acc", "ece", "nll", "brier"):
            values = [scores[key] for scores in row["seeds"]]
            assert math.isclose(row[key], sum(values) / 2, abs_tol=1e-12), name
            deviation = abs(values[0] - values[1]) / 2**0.5
            assert math.isclose(row["sd"][key], deviation, abs_tol=1e-9), name
    for method, trials in results["tuning"].items():
        best = min(trials, key=lambda trial: trial["nll"])
        trial = results["methods"][method]["trial"]
        assert trial == {key: best[key] for key in trial}
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (out / "results.md").read_text() == table(results)


def test_scores_are_those_of_the_kept_answers(done):
    config, out, results = done
    trial = results["methods"]["scalabl"]["trial"]
    for seed, scores in zip(config.seeds, results["methods"]["scalabl"]["seeds"], strict=True):
        folder = Job(config, "scalabl", trial, seed, ("test",), out).folder
        answers, _ = load_tensors(folder / "test.safetensors")
        assert scores["nll"] == metrics.nll(answers["probs"], answers["labels"])


def test_members_of_an_ensemble_differ_and_are_averaged(done):
    config, out, results = done
    trial = results["methods"]["ensemble"]["trial"]
    job = Job(config, "ensemble", trial, 1, ("test",), out)
    seeds = {job.configs(member)[1].seed for member in range(3)}
    assert len(seeds) == 3
    members = [
        torch.load(job.folder / f"member-{i}" / "checkpoint.pt", weights_only=True)
        for i in range(3)
    ]
    values = [m["adapters"]["lm_head.A"] for m in members]
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    answers, _ = load_tensors(job.folder / "test.safetensors")
    assert (answers["mutual_information"] > 0).all()


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    path, out = config(tmp_path, methods=["mle"], lr=[0.01]), tmp_path / "out"
    first = study(Study.read(path), out)
    calls = []
    monkeypatch.setattr(module, "run", lambda job: calls.append(job))
    again = study(Study.read(path), out)
    assert calls == [] and again == first


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    path = config(tmp_path, methods=["scalabl"], lr=[0.01])
    whole = study(Study.read(path), tmp_path / "whole")
    real, calls = module.run, []

    def stops(job):
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(job)

    monkeypatch.setattr(module, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        study(Study.read(path), tmp_path / "out")
    monkeypatch.setattr(module, "run", real)
    results = study(Study.read(path), tmp_path / "out")
    for name, row in results["methods"].items():
        assert row["seeds"] == whole["methods"][name]["seeds"]


@pytest.mark.slow
def test_processes_give_the_same_numbers(tmp_path):
    path = config(tmp_path, methods=["mle"], lr=[0.01])
    one, two = (study(Study.read(path), tmp_path / f"jobs{n}", n) for n in (1, 2))
    for name, row in one["methods"].items():
        for a, b in zip(row["seeds"], two["methods"][name]["seeds"], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_bold_is_only_what_the_bootstrap_tells_apart():
    """Two rows that differ by a lot, and two that do not differ at all."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200,), generator=g)
    right = torch.full((200, 2), 0.2).scatter(1, labels[:, None], 0.8)
    even = torch.full((200, 2), 0.5)
    rows = {"good": {"nll": 0.223}, "bad": {"nll": 0.693}}
    best = module._best("nll", rows, {"good": [right], "bad": [even]}, labels, 15)
    assert best["name"] == "good" and best["significant"] and best["difference"][1] < 0
    noise = (right.log() + 0.1 * torch.randn(200, 2, generator=g)).softmax(1)
    rows = {"a": {"nll": metrics.nll(right, labels)}, "b": {"nll": metrics.nll(noise, labels)}}
    best = module._best("nll", rows, {"a": [right], "b": [noise]}, labels, 15)
    assert not best["significant"]


def test_command_and_bad_files(tmp_path, capsys):
    path = config(tmp_path, methods=["mle"], lr=[0.01], seeds=[0])
    assert cli.main(["study", str(path), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "| mle | lr 0.01, share_of_steps" in out and "results.md" in out
    for changes, message in (
        ({"metods": []}, "unknown field 'metods'"),
        ({"methods": ["magic"]}, "unknown method 'magic'"),
    ):
        with pytest.raises(InputError, match=message):
            Study.read(config(tmp_path, **changes))
    path.write_text('{"model": "m"}')
    with pytest.raises(InputError, match="field 'train' is missing"):
        Study.read(path)
