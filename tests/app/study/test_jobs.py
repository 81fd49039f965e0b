"""Runs and answers: what they share, and when they are made again."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.app.study import METHODS, Fit, Job, Study, run_study
from scalabl_ref.app.study.methods import Made
from scalabl_ref.app.study.sets import base_model, encoded_sets
from scalabl_ref.evaluation import metrics
from scalabl_ref.methods import Swag
from scalabl_ref.support.tensors import load_tensors
from scalabl_ref.training.runs import load_run
from scalabl_ref.training.trainer import Trainer

from ...tickets import QUEUES
from ..commands import facts
from .studies import config, quick, relabel


def test_scores_are_those_of_the_kept_answers(done):
    config, out, results = done
    trial = results["methods"]["scalabl"]["trial"]
    for seed, scores in zip(config.seeds, results["methods"]["scalabl"]["replicates"], strict=True):
        folder = Job(config, "scalabl", trial, seed, ("test",), out).folder
        answers, _ = load_tensors(folder / "test.safetensors")
        assert scores["nll"] == metrics.nll(answers["probs"], answers["labels"])


def test_members_of_an_ensemble_differ_and_are_averaged(done):
    config, out, results = done
    trial = results["methods"]["ensemble"]["trial"]
    job = Job(config, "ensemble", trial, 1, ("test",), out)
    fits = job.fits()
    assert len({fit.train.seed for fit in fits}) == 3
    states = [load_tensors(fit.folder / "adapter.safetensors")[0] for fit in fits]
    values = [state["lm_head.A"] for state in states]
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    answers, _ = load_tensors(job.folder / "test.safetensors")
    assert (answers["mutual_information"] > 0).all()


def test_methods_that_start_alike_share_their_runs(done):
    """Plain LoRA is trained once for its posteriors, its ensemble and itself."""
    config, out, results = done
    trial = {**results["methods"]["mle"]["trial"], "tolerance": 0.1}
    mle, *others = (
        Job(config, name, trial, 0, (), out) for name in ("mle", "tfb", "laplace", "ensemble")
    )
    for other in others:
        assert other.fits()[0] == mle.fits()[0] and other.folder != mle.folder
    folders = sorted(path.name.partition("-")[0] for path in (out / "runs").iterdir())
    # Tuning: 2 trials of seed 0. Then seed 1 of the one chosen.
    assert folders.count("map") == folders.count("blob") == folders.count("point") == 3


def test_trials_that_share_a_training_do_not_share_their_answers(done):
    """The precision of Laplace's prior is set after the training."""
    config, out, results = done
    trial = results["methods"]["laplace tuned"]["trial"]
    one, other = (
        Job(config, "laplace tuned", {**trial, "precision": value}, 0, ("test",), out)
        for value in (1.0, 2.0)
    )
    assert one.fits() == other.fits() and one.folder != other.folder


def test_swag_is_that_of_the_uninterrupted_run(done, tmp_path, monkeypatch):
    """A run stopped among its last steps goes on with the averages that it had."""
    config, out, results = done
    trial = results["methods"]["swag"]["trial"]
    settings = {**config.settings, "steps": 8, "checkpoint_every": 1}
    config = dataclasses.replace(config, settings=settings)
    whole, cut = (
        Job(config, "swag", trial, 0, ("test",), tmp_path / name).fits()[0] for name in ("a", "b")
    )
    whole.run()
    real, calls = Trainer.step, []

    def stops(trainer):
        calls.append(trainer)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(trainer)

    monkeypatch.setattr(Trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert not cut.done
    monkeypatch.setattr(Trainer, "step", real)
    cut.run()
    ours, theirs = Swag.load(whole.folder), Swag.load(cut.folder)
    assert ours.count == theirs.count == 2
    for name, value in ours.mean.items():
        assert torch.equal(value, theirs.mean[name])
        assert torch.equal(ours.square[name], theirs.square[name])
    assert any((ours.square[n] - ours.mean[n].square()).abs().max() > 0 for n in ours.mean)


def test_parameters_count_all_that_answering_needs(done):
    """An ensemble keeps three models, SWAG two numbers for each, Laplace its curvature as well."""
    config, out, results = done
    counts = {name: row["parameters"] for name, row in results["methods"].items()}
    assert counts["ensemble"] == 3 * counts["mle"] and counts["swag"] == 2 * counts["mle"]
    assert counts["mle"] == counts["map"] == counts["dropout"]
    assert counts["ensemble of subspace"] == 3 * counts["subspace"] > counts["ensemble"]
    assert counts["laplace"] > counts["laplace last layer"] > counts["map"]
    assert counts["mle"] < counts["scalabl"] < counts["blob"]


def test_the_precision_of_laplaces_prior_is_the_trials_or_the_evidences(done):
    config, out, results = done
    trial = results["methods"]["laplace tuned"]["trial"]
    run = Job(config, "laplace tuned", trial, 0, (), out).fits()[0].folder
    model, _ = load_run(run, base_model(config, "cpu"))
    sets = encoded_sets(config, ["train"])

    def precision(method, trial):
        made = Made(model, lambda run: model, (run,), sets, trial, samples=4, seed=0)
        return METHODS[method].after(made).precision

    assert precision("laplace tuned", trial) == trial["precision"]
    assert precision("laplace", {}) == precision("laplace tuned", {}) != trial["precision"]


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    path, out = config(tmp_path, methods=["mle"], trials=1), tmp_path / "out"
    first = run_study(Study.read(path), out)
    calls = []
    for kind in (Fit, Job):
        monkeypatch.setattr(kind, "run", lambda self: calls.append(self))
    again = run_study(Study.read(path), out)
    assert calls == [] and again == first


def test_what_has_changed_is_done_again(tmp_path):
    """Same names, other labels: of the test set alone, then of the training set."""
    out, wanted = tmp_path / "out", quick(tmp_path)

    def numbers():
        found = run_study(wanted, out)["methods"]["mle"]
        counts = [len(list((out / kind).iterdir())) for kind in ("runs", "answers")]
        return found["replicates"], counts

    first, counts = numbers()
    assert counts == [1, 1]
    relabel(tmp_path / "test.jsonl")
    second, counts = numbers()
    assert counts == [1, 2] and second != first
    relabel(tmp_path / "train.jsonl")
    third, counts = numbers()
    assert counts == [2, 3] and third != second


def test_what_has_moved_is_not_done_again(tmp_path, monkeypatch):
    """And what is still to be answered is answered by the base where it now lies."""
    out = tmp_path / "out"
    first = run_study(quick(tmp_path), out)["methods"]
    moved = {name: str(tmp_path / f"moved-{name}") for name in ("model", "train", "test")}
    there = quick(tmp_path, **moved, ood={"other": {"path": moved["test"], "limit": 5}})
    for name, path in moved.items():
        (tmp_path / (name if name == "model" else f"{name}.jsonl")).rename(path)
    monkeypatch.setattr(Fit, "run", lambda self: pytest.fail(f"{self.folder} is trained again"))
    with monkeypatch.context() as patch:
        patch.setattr(Job, "run", lambda self: pytest.fail(f"{self.folder} answers again"))
        assert run_study(there, out)["methods"] == first
    shutil.rmtree(out / "answers")
    assert run_study(there, out)["methods"]["mle"]["replicates"] == first["mle"]["replicates"]


def test_data_that_change_while_a_study_runs_stop_it(tmp_path, monkeypatch):
    real = Fit.run

    def edits(fit):
        real(fit)
        relabel(tmp_path / "train.jsonl")

    monkeypatch.setattr(Fit, "run", edits)
    with pytest.raises(InputError, match="train.jsonl: has changed while the study ran"):
        run_study(quick(tmp_path), tmp_path / "out")


def test_a_set_out_of_distribution_is_known_by_its_name(tmp_path):
    """Two that change places are two others."""
    files = [{"path": str(tmp_path / name)} for name in ("test.jsonl", "train.jsonl")]
    first, second = (
        quick(tmp_path, ood=dict(zip(names, files, strict=True))) for names in ("ab", "ba")
    )
    jobs = [Job(each, "mle", {"lr": 0.01}, 0, ("test",), tmp_path) for each in (first, second)]
    assert jobs[0].folder != jobs[1].folder


def test_a_study_has_templates_and_answers_of_its_own(tickets):
    (tickets / "own.txt").write_text("{question} Queue:\n\n")
    settings = {"steps": 2, "batch": 4, "rank": 2}
    config = Study(
        "model", "tickets.jsonl", "others.jsonl", prompt_template="own.txt", labels="words",
        answer_tokens="bare", methods=("mle",), trials=1, seeds=(0,), settings=settings,
    )  # fmt: skip
    run_study(config, tickets / "out")
    (run,) = (tickets / "out/runs").iterdir()
    info = facts(run)
    assert info["prompt_template"] == "{question} Queue:\n" and info["labels"] == "words"
    assert info["label_names"] == list(QUEUES) and len(info["head_tokens"]) == 5
    # Other prompts are another run, though files and settings are the same.
    run_study(dataclasses.replace(config, labels="letters"), tickets / "out")
    kinds = sorted(facts(run)["labels"] for run in (tickets / "out/runs").iterdir())
    assert kinds == ["letters", "words"]
