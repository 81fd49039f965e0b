"""Runs and answers: what they share, and when they are made again."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from scalabl_ref import InputError, Llama, adapters
from scalabl_ref.app.study import METHODS, Fit, Job, Study, run_study
from scalabl_ref.app.study.jobs import _set
from scalabl_ref.app.study.methods import Made
from scalabl_ref.app.study.sets import base_model, encoded_sets
from scalabl_ref.data import evaluation_batches
from scalabl_ref.evaluation import metrics
from scalabl_ref.evaluation.predict import predict_all
from scalabl_ref.methods import Laplace, Subspace, Swag, fit_tfb, to_points
from scalabl_ref.support.tensors import load_tensors
from scalabl_ref.training.runs import load_run
from scalabl_ref.training.trainer import TrainConfig, Trainer

from ...tickets import QUEUES
from ..commands import facts
from .studies import FEW, config, quick, relabel


def test_scores_are_those_of_the_kept_answers(done):
    config, out, results = done
    trial = results["methods"]["scalabl"]["trial"]
    data = encoded_sets(config, ["test"])["test"]
    for seed, scores in zip(config.seeds, results["methods"]["scalabl"]["replicates"], strict=True):
        job = Job(config, "scalabl", trial, seed, ("test",), out)
        answers, _ = load_tensors(job.folder / "test.safetensors")
        assert scores["nll"] == metrics.nll(answers["probs"], answers["labels"])
        model, _ = load_run(job.fits()[0].folder, base_model(config, "cpu"))
        again = predict_all(model, evaluation_batches(data, 32), config.samples, seed)
        assert torch.equal(answers["probs"], again.probs)


def test_members_of_an_ensemble_differ_and_are_averaged(done):
    config, out, results = done
    trial = results["methods"]["ensemble"]["trial"]
    job = Job(config, "ensemble", trial, 1, ("test",), out)
    fits = job.fits()
    assert [fit.train.seed for fit in fits] == [1, 1001, 2001]
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
    A, B = 2 * (2 * 16) + 2 * 16, 2 * (16 * 2) + 3 * 2  # rank 2 on two layers and the head
    assert counts["mle"] == counts["map"] == counts["dropout"] == A + B
    assert counts["scalabl"] == counts["scalabl layer prior"] == A + B + 2 * 2 * 3  # s and sigma
    assert counts["scalabl full"] == A + B + (2 + 2 + 1) * 3
    assert counts["blob"] == 2 * A + B and counts["tfb"] == counts["point"] == A + B + 2 * 3
    assert counts["subspace"] == A + B + 3 * 6 + 6 * 6  # s, precision, values; vectors
    assert counts["ensemble of subspace"] == 3 * counts["subspace"] > counts["ensemble"]
    assert counts["laplace"] > counts["laplace last layer"] > counts["map"]
    assert counts["mle"] < counts["scalabl"] < counts["blob"]


def test_draws_are_those_of_the_method(done):
    """1000 of logits; of models as many as the study says; of an ensemble, one for each member."""
    config, out, results = done
    draws = dict.fromkeys(config.methods, 2)
    draws |= {name: 1000 for name in draws if name.startswith(("laplace", "subspace"))}
    draws |= {name: 0 for name in draws if name.startswith(("mle", "map", "point"))}
    draws |= {"subspace sampled": 2, "ensemble": 3, "ensemble of dropout": 3}
    draws["ensemble of subspace"] = 1002  # equally many of each of three
    assert {name: results["methods"][name]["draws"] for name in draws} == draws


def test_posteriors_are_of_the_kind_that_a_methods_name_says(done):
    config, out, results = done
    job = Job(config, "mle", results["methods"]["mle"]["trial"], 0, (), out)
    run, sets = job.fits()[0].folder, encoded_sets(config, ["train"])

    def batches():
        return evaluation_batches(sets["train"], 8)

    def made(method):
        model, _ = load_run(run, base_model(config, "cpu"))
        return METHODS[method].after(Made(model, None, (run,), sets, {}, samples=4, seed=0))

    model, _ = load_run(run, base_model(config, "cpu"))
    for method, kind in {"laplace": ("all", "expand"), "laplace exact": ("all", "exact"),
                         "laplace last token": ("all", "last"),
                         "laplace last layer": ("last", "expand")}.items():  # fmt: skip
        found = Laplace.fit(model, batches(), kind[0], curvature=kind[1]).optimise_prior()
        assert made(method).precision == found.precision, method
    to_points(model)
    for method, groups, predicts in (("subspace", "all", "linear"),
                                     ("subspace by target", "target", "linear"),
                                     ("subspace sampled", "all", "sampled")):  # fmt: skip
        found, wanted = made(method), Subspace.fit(model, batches(), groups=groups)
        assert torch.equal(found.precision, wanted.precision), method
        assert found.predicts == predicts
    sets = encoded_sets(config, ["validation"])
    first, second = (load_run(run, base_model(config, "cpu"))[0] for _ in range(2))
    sigma = fit_tfb(second, evaluation_batches(sets["validation"], 32), 0.05, samples=3, seed=5)
    METHODS["tfb"].after(Made(first, None, (run,), sets, {"tolerance": 0.05}, samples=3, seed=5))
    assert 1e-4 < sigma < 1
    for ours, theirs in zip(adapters(first).values(), adapters(second).values(), strict=True):
        assert torch.equal(ours.widths(), theirs.widths()) and len(ours.widths())


def test_what_a_run_and_its_answers_record(tmp_path):
    """As much as `evaluate` needs to find a run's data again, and what the tables are made of."""
    study = quick(tmp_path, limit=15, validation=0.4, dtype="bfloat16", methods=["ensemble"])
    out = tmp_path / "out"
    results = run_study(study, out)
    (answers,) = (out / "answers").iterdir()
    about = json.loads((answers / "answers.json").read_text())
    assert answers.name.startswith("ensemble-") and answers.name.endswith("-0")
    runs = [facts(out / "runs" / name) for name in about["runs"]]
    for info, seed in zip(runs, (0, 1000, 2000), strict=True):
        place = info["model"], info["data"], info["format"], info["limit"], info["holdout"]
        assert place == (study.model, study.train, "jsonl", 15, 0.4)
        assert (info["text_column"], info["label_column"], info["dtype"]) == (
            None,
            None,
            "bfloat16",
        )
        assert info["train"]["seed"] == seed and info["train"]["steps"] == 3
        assert info["adapter"]["rank"] == 2 and info["peak_bytes"] > 1e7
    (trial,) = study.tried("ensemble")
    assert (about["method"], about["trial"], about["seed"]) == ("ensemble", trial, 0)
    assert about["train_seconds"] == sum(info["seconds"] for info in runs)
    assert about["fit_seconds"] > 0 and about["answer_seconds"] > 0 and about["widths"] == {}
    assert about["peak_bytes"] >= max(info["peak_bytes"] for info in runs)
    row = results["methods"]["ensemble"]
    for key in ("train_seconds", "fit_seconds", "answer_seconds", "peak_bytes", "parameters"):
        assert row[key] == about[key]
    held = quick(tmp_path, limit=5, held_out=6, validation=3)
    (fit,) = Job(held, "mle", {"lr": 0.01}, 0, (), out).fits()
    fit.run()
    info = facts(fit.folder)
    assert (info["data"], info["limit"], info["holdout"], info["dtype"]) == (None, 5, 0.0, None)


# Fields of a study, and whether a change makes another run and other answers.
IDENTITY = [
    ({"limit": 10}, True, True), ({"validation": 0.3}, True, True),
    ({"dtype": "bfloat16"}, True, True),
    ({"labels": "letters"}, True, True), ({"answer_tokens": "bare"}, True, True),
    ({"max_length": 99}, True, True), ({"drop_long": False}, True, True),
    ({"text_column": "prompt"}, True, True), ({"label_column": "label"}, True, True),
    ({"prompt_style": "chat"}, True, True), ({"limit": 10, "held_out": 5}, True, True),
    ({"settings": {**FEW, "rank": 3}}, True, True), ({"settings": {**FEW, "batch": 5}}, True, True),
    ({"test_limit": 4}, False, True), ({"samples": 3}, False, True), ({"ood": {}}, False, True),
    ({"ood": {"other": {"path": "test.jsonl", "limit": 4}}}, False, True),
    ({"bins": 5}, False, False), ({"methods": ("mle", "map")}, False, False),
    ({"seeds": (0, 1)}, False, False), ({"trials": 3}, False, False),
]  # fmt: skip


def test_a_change_makes_anew_what_depends_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = quick(tmp_path, max_length=100, drop_long=True)

    def folders(study):
        job = Job(study, "mle", {"lr": 0.01}, 0, ("test",), tmp_path)
        return job.fits()[0].folder, job.folder

    run, answers = folders(study)
    for changes, other_run, other_answers in IDENTITY:
        after = folders(dataclasses.replace(study, **changes))
        assert (run != after[0], answers != after[1]) == (other_run, other_answers), changes


def test_only_settings_that_differ_from_their_defaults_make_a_name():
    """So a new setting renames no finished run."""
    assert _set(TrainConfig(steps=TrainConfig.steps, lr=0.5)) == {"lr": 0.5}


def test_replicates_have_runs_of_their_own_where_they_draw_rows(tmp_path):
    """A run's name always has its seed, and its rows' seed only if replicates draw rows."""

    def names(**changes):
        study = quick(tmp_path, **changes)
        fits = [Job(study, "mle", {"lr": 0.01}, seed, (), tmp_path).fits()[0] for seed in (0, 1)]
        return {dataclasses.replace(fit, train=fits[0].train).folder for fit in fits}

    assert len(names()) == 1 and len(names(limit=5, held_out=6)) == 2


def test_the_base_is_loaded_as_the_study_and_its_command_say(tmp_path, monkeypatch):
    asked = []

    def stops(folder, dtype, device):
        asked.append((folder, dtype, device))
        raise InputError("stop")

    monkeypatch.setattr(Llama, "from_pretrained", stops)
    study, out = quick(tmp_path, dtype="bfloat16"), tmp_path / "out"
    with pytest.raises(InputError, match="stop"):  # to train
        run_study(study, out, device="cuda:1")
    with pytest.raises(InputError, match="stop"):  # to answer
        Job(study, "mle", {"lr": 0.01}, 0, ("test",), out, "cuda:1").run()
    assert asked == [(study.model, torch.bfloat16, "cuda:1")] * 2


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
    with monkeypatch.context() as patch:
        for kind in (Fit, Job):
            patch.setattr(kind, "run", lambda self: calls.append(self))
        again = run_study(Study.read(path), out)
    assert calls == [] and again == first
    abouts = list(out.glob("answers/*/answers.json"))
    assert abouts
    for about in abouts:  # as if killed before it was written
        about.unlink()
    third = run_study(Study.read(path), out)["methods"]["mle"]
    assert third["replicates"] == first["methods"]["mle"]["replicates"]


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
