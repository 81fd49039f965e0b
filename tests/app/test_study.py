"""Studies: what is tuned on what, what is done again, and what the tables say."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.app import cli
from scalabl_ref.app.plan import product_rate
from scalabl_ref.app.study import METHODS, Fit, Job, Study, cost, paper, run_study
from scalabl_ref.app.study.sets import encoded_sets
from scalabl_ref.evaluation import comparison, metrics
from scalabl_ref.evaluation.comparison import table
from scalabl_ref.methods import Swag
from scalabl_ref.support.lock import alone
from scalabl_ref.support.tensors import load_tensors, save_tensors, sha256
from scalabl_ref.training.trainer import Trainer

from ..models import questions_file, tiny_folder
from ..tickets import QUEUES
from ..tolerances import rounding
from .commands import facts

SLOW = pytest.mark.slow
ROUNDING = rounding(torch.float64, 16)  # of means and deviations over two seeds
FEW = {"steps": 3, "batch": 4, "rank": 2, "targets": ["q_proj", "lm_head"]}


def config(tmp_path, **changes):
    folder = tiny_folder(tmp_path / "model")
    train = questions_file(tmp_path / "train.jsonl", rows=20)
    test = questions_file(tmp_path / "test.jsonl", rows=9)
    values = {
        "model": str(folder), "train": str(train), "test": str(test),
        "ood": {"other": {"path": str(test), "limit": 5}},
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
    return Study.read(path), folder / "out", run_study(Study.read(path), folder / "out")


def test_every_method_is_tuned_on_equally_many_trials_and_tested_with_every_seed(done):
    config, out, results = done
    assert {len(trials) for trials in results["tuning"].values()} == {2}
    names = {name for m in METHODS for name in (m, f"{m} + temperature")}
    assert set(results["methods"]) == names
    for name, row in results["methods"].items():
        assert len(row["seeds"]) == 2 and row["train_seconds"] > 0 and row["peak_bytes"] > 1e6
        for key in ("acc", "ece", "nll", "brier"):
            values = [scores[key] for scores in row["seeds"]]
            assert math.isclose(row[key], sum(values) / 2, rel_tol=ROUNDING), name
            deviation = abs(values[0] - values[1]) / 2**0.5
            assert abs(row["sd"][key] - deviation) <= ROUNDING * max(map(abs, values)), name
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
    fits = job.fits()
    assert len({fit.train.seed for fit in fits}) == 3
    states = [load_tensors(fit.folder / "adapter.safetensors")[0] for fit in fits]
    values = [state["lm_head.A"] for state in states]
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    answers, _ = load_tensors(job.folder / "test.safetensors")
    assert (answers["mutual_information"] > 0).all()


def test_methods_that_start_alike_share_their_runs(done):
    """mle, ensemble, swag and tfb train once for all; so do map and both Laplaces."""
    config, out, results = done
    folders = sorted(path.name.partition("-")[0] for path in (out / "runs").iterdir())
    kinds = {kind: folders.count(kind) for kind in set(folders)}
    # Tuning: 2 trials of seed 0. Then seed 1 of the one chosen, where two methods may disagree.
    assert kinds["dropout"] == kinds["blob"] == 3
    assert 3 <= kinds["map"] <= 4
    assert kinds["scalabl"] == 3 * sum(name.startswith("scalabl") for name in METHODS)
    members = 2 * 3 + 3  # an ensemble's two trials of seed 0, and the chosen one of seed 1
    assert members <= kinds["mle"] <= members + 1
    trial = results["methods"]["tfb"]["trial"]
    tfb, mle = (Job(config, name, trial, 0, (), out) for name in ("tfb", "mle"))
    assert tfb.fits() == mle.fits() and tfb.folder != mle.folder


def test_swag_is_that_of_the_uninterrupted_run(done, tmp_path, monkeypatch):
    """A run stopped among its last steps goes on with the averages that it had."""
    config, out, results = done
    trial = results["methods"]["swag"]["trial"]
    settings = {**config.settings, "steps": 8, "checkpoint_every": 1}
    config = dataclasses.replace(config, settings=settings)
    trial = {**trial, "share_of_steps": 1.0}
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


SIZED = {"methods": ["mle", "scalabl", "blob"], "lr": [0.01], "limit": 16}


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """A study with two other sizes and a sweep: its folder and results."""
    folder = tmp_path_factory.mktemp("sized")
    path = config(folder, **SIZED, sizes=[10, 20], sweep=["scalabl"])
    return folder, run_study(Study.read(path), folder / "out")


def test_sizes_and_sweeps_are_the_studies_of_their_own(sized):
    """Each size is what a study at that limit gives; a sweep has every trial with all seeds."""
    folder, results = sized
    assert list(results["sizes"]) == [10, 20]
    changes = {**SIZED, "methods": ["scalabl"], "limit": 10}
    small = run_study(Study.read(config(folder, **changes)), folder / "small")
    for name, row in small["methods"].items():
        assert results["sizes"][10]["methods"][name]["seeds"] == row["seeds"]
        assert results["methods"][name]["seeds"] != row["seeds"]
    rows = results["sweep"]["scalabl"]
    assert [row["trial"]["beta"] for row in rows] == [1.0, 5.0]
    assert all(len(row["seeds"]) == 2 for row in rows)
    chosen = results["methods"]["scalabl"]
    assert [row["seeds"] for row in rows if row["trial"] == chosen["trial"]] == [chosen["seeds"]]


def test_the_page_shows_every_method_and_every_plot(sized):
    folder, results = sized
    page = (folder / "out" / "results.html").read_text()
    for name, row in results["methods"].items():
        assert f"{row['nll']:.3f} ± {row['sd']['nll']:.3f}" in page, name
        assert f"<td>{row['parameters']:,}</td>" in page
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    wanted = ["All scores", "Out of distribution: other", "Cost", "Accuracy and ECE",
              "NLL and training set", "Sigma by layer", "NLL (nats) and the second knob",
              "ECE and the second knob"]  # fmt: skip
    assert [h for h in headings if h in wanted] == wanted
    assert page.count('id="reliability-') == 2 * 3 + 3  # title, description and hatching of each
    assert results["verdict"][0]["ours"] == "scalabl"
    assert comparison.sentences(results)[1] in html.unescape(page)
    assert "With the first 10 training examples" in (folder / "out" / "results.md").read_text()


def test_the_verdict_is_the_paired_interval():
    """Ours better by a lot, and worse by a lot: the words and the interval say so."""
    results = {"verdict": [
        {"ours": "a", "rival": "b", "difference": [-2.0, -1.0], "no_worse": True},
        {"ours": "a", "rival": "b", "difference": [-1.0, 1.0], "no_worse": True},
        {"ours": "a", "rival": "b", "difference": [1.0, 2.0], "no_worse": False},
    ]}  # fmt: skip
    words = comparison.sentences(results)[1:]
    for sentence, expected in zip(
        words, ("better than", "no worse than", "worse than"), strict=True
    ):
        assert f"is {expected} b" in sentence


def test_the_verdict_chooses_ours_on_validation_and_the_rival_on_the_test(done):
    config, out, results = done
    tuned = {m: min(t["nll"] for t in trials) for m, trials in results["tuning"].items()}
    ours = {name for name in METHODS if METHODS[name].settings["method"] == "scalabl"}
    plain, scaled = results["verdict"]
    assert plain["ours"] == min(ours, key=tuned.__getitem__)
    others = {name: results["methods"][name]["nll"] for name in METHODS if name not in ours}
    assert plain["rival"] == min(others, key=others.__getitem__)
    assert scaled["ours"] == plain["ours"] + " + temperature"
    low, high = plain["difference"]
    nll = {name: results["methods"][name]["nll"] for name in (plain["ours"], plain["rival"])}
    assert low <= nll[plain["ours"]] - nll[plain["rival"]] <= high
    assert plain["no_worse"] == (low <= 0)


def test_parameters_count_all_that_answering_needs(done):
    """An ensemble keeps three models, SWAG two numbers for each, Laplace its curvature as well."""
    config, out, results = done
    counts = {name: row["parameters"] for name, row in results["methods"].items()}
    assert counts["ensemble"] == 3 * counts["mle"] and counts["swag"] == 2 * counts["mle"]
    assert counts["mle"] == counts["map"] == counts["dropout"]
    assert counts["laplace"] > counts["laplace last"] > counts["map"]
    assert counts["mle"] < counts["scalabl"] < counts["blob"]


def test_ood_scores_are_of_the_rows_that_can_be_answered(done):
    config, out, results = done
    trial = results["methods"]["blob"]["trial"]
    values = []
    for seed in config.seeds:
        folder = Job(config, "blob", trial, seed, (), out).folder
        inside, outside = (load_tensors(folder / f"{n}.safetensors")[0] for n in ("test", "other"))
        assert len(outside["labels"]) == 5
        kind = torch.tensor([0] * len(inside["labels"]) + [1] * 5)
        entropy = torch.cat((inside["entropy"], outside["entropy"]))
        values.append(
            (metrics.auroc(entropy, kind), metrics.nll(outside["probs"], outside["labels"]))
        )
    row = results["methods"]["blob"]["ood"]["other"]
    assert row["scored"] == 1
    assert math.isclose(row["auroc_entropy"], sum(v[0] for v in values) / 2, rel_tol=ROUNDING)
    assert math.isclose(row["nll"], sum(v[1] for v in values) / 2, rel_tol=ROUNDING)
    assert f"| blob | {row['auroc_entropy']:.3f}" in (out / "results.md").read_text()


def test_the_cost_told_first_is_what_is_done(tmp_path):
    """Runs and steps are counted afterwards on disk; FLOP by hand for plain LoRA."""
    methods = ["mle", "ensemble", "tfb", "blob"]
    path = config(tmp_path, methods=methods, lr=[0.01], sweep=["blob"])
    told = cost(Study.read(path))
    run_study(Study.read(path), tmp_path / "out")
    records = [json.loads(p.read_text()) for p in (tmp_path / "out/runs").glob("*/run.json")]
    assert told["runs"] == len(records)
    assert told["steps"] == sum(record["train"]["steps"] for record in records)
    alone = Study.read(config(tmp_path, methods=["mle"], lr=[0.01], seeds=[4]))
    sets = encoded_sets(alone, ("train", "validation", "test", "other"))
    tokens = {name: sum(map(len, data.tokens)) for name, data in sets.items()}
    mean = tokens["train"] / len(sets["train"].tokens)
    trained = 2 * mean * 4 * (3 + 1)  # forward and backward, batches of 4; 3 steps, and a quarter
    answered = 2 * tokens["validation"] + tokens["test"] + tokens["other"]
    shape = (16 * 16 + 2 * 16 * 8 + 16 * 16) + 3 * 16 * 24 + 2 * 16  # q, k, v, o; MLP; norms
    flop = 2 * 2 * shape * (trained + answered)
    assert abs(cost(alone)["flop"] - flop) <= rounding(torch.float64, 64) * flop
    assert product_rate() > 1e8


def _arc(path, rows):
    choices = [{"text": f"no {label}", "label": label} for label in "ABCD"]
    lines = [
        {
            "id": str(i),
            "question": {"stem": f"{i}?", "choices": choices},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(rows)
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_papers_protocol(tmp_path, capsys, monkeypatch):
    model = tiny_folder(tmp_path / "model")
    _arc(tmp_path / "data/arc/ARC-Easy-Train.jsonl", 20)
    _arc(tmp_path / "data/arc/ARC-Easy-Test.jsonl", 9)
    command = ["study", "paper", "--model", str(model), "--data", str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "out"), "--json"]
    assert cli.main([*command, "--tasks", "arc_easy", "--cost"]) == 0
    told = json.loads(capsys.readouterr().out)["cost"][str(tmp_path / "out" / "arc_easy")]
    assert told["steps"] > 20 * 5000 and told["bytes"] == 2 * sum(
        p.numel() for p in Llama.from_pretrained(model).parameters()
    )
    assert not (tmp_path / "out").exists()
    assert cli.main(command) == 2
    assert "winogrande/train_s.jsonl: no such file: task winogrande_s" in capsys.readouterr().err
    # And it runs, with its steps cut down.
    full = paper.studies

    def short(*arguments):
        return {
            task: dataclasses.replace(study, settings={**FEW, "steps": 2}, seeds=(0,), samples=2)
            for task, study in full(*arguments).items()
        }

    monkeypatch.setattr(paper, "studies", short)
    with pytest.warns(UserWarning, match="tfb: no sigma in .* satisfies the tolerance: mle-"):
        assert cli.main([*command, "--tasks", "arc_easy"]) == 0
    results = json.loads(capsys.readouterr().out)["results"][str(tmp_path / "out" / "arc_easy")]
    assert set(paper.METHODS) < set(results["methods"])
    assert results["study"]["dtype"] == "bfloat16"


def test_openbookqa_is_tested_on_seven_other_sets(tmp_path):
    for file in ("openbookqa/train.jsonl", "openbookqa/test.jsonl"):
        _arc(tmp_path / file, 4)
    with pytest.raises(InputError, match="ARC-Challenge-Test.jsonl: no such file"):
        paper.studies("model", tmp_path, ("openbookqa",))
    for file, _ in paper.OUT_OF_DISTRIBUTION.values():
        _arc(tmp_path / file, 4)
    studies = paper.studies("model", tmp_path, ("openbookqa",))
    assert set(studies["openbookqa"].ood) == set(paper.OUT_OF_DISTRIBUTION)
    assert studies["openbookqa"].settings == {"steps": 5000, "batch": 4, "rank": 8}
    with pytest.raises(InputError, match="unknown task 'chess'"):
        paper.studies("model", tmp_path, ("chess",))


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    path, out = config(tmp_path, methods=["mle"], lr=[0.01]), tmp_path / "out"
    first = run_study(Study.read(path), out)
    calls = []
    for kind in (Fit, Job):
        monkeypatch.setattr(kind, "run", lambda self: calls.append(self))
    again = run_study(Study.read(path), out)
    assert calls == [] and again == first


def quick(tmp_path, **changes):
    """A study of one run, and of its answers."""
    small = {"methods": ["mle"], "lr": [0.01], "knobs": {"mle": [1.0]}, "seeds": [0]}
    return Study.read(config(tmp_path, **{**small, **changes}))


def relabel(path):
    """Another answer to each question, in a file of the same size."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["label"] = (row["label"] + 1) % 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_has_changed_is_done_again(tmp_path):
    """Same names, other labels: of the test set alone, then of the training set."""
    out, wanted = tmp_path / "out", quick(tmp_path)

    def numbers():
        found = run_study(wanted, out)["methods"]["mle"]
        return found["seeds"], [len(list((out / kind).iterdir())) for kind in ("runs", "answers")]

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
    assert run_study(there, out)["methods"]["mle"]["seeds"] == first["mle"]["seeds"]


def test_data_that_change_while_a_study_runs_stop_it(tmp_path, monkeypatch):
    real = Fit.run

    def edits(fit):
        real(fit)
        relabel(tmp_path / "train.jsonl")

    monkeypatch.setattr(Fit, "run", edits)
    with pytest.raises(InputError, match="train.jsonl: has changed while the study ran"):
        run_study(quick(tmp_path), tmp_path / "out")


def test_sets_are_held_against_the_model_before_any_training(tmp_path):
    """Labels that no answer can be, but out of distribution; prompts too long: the file is named.

    Fewer training examples, of another size, may have fewer classes.
    """
    wide, answer = {"prompt": "?", "choices": ["a", "b", "c", "d"], "label": 3}, "its answer is D"

    def file(name, *rows):
        questions_file(tmp_path / name, rows=8)
        with open(tmp_path / name, "a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        return str(tmp_path / name)

    test = file("wide.jsonl", wide)
    long = file("long.jsonl", {**wide, "prompt": 128 * "?", "label": 0})
    narrow = {"test": test, "ood": {"other": {"path": test}}}
    with pytest.raises(InputError, match=f"wide.jsonl: example 8 .*: {answer}, and there are 3"):
        cost(quick(tmp_path, **narrow))
    assert cost(quick(tmp_path, **narrow, train=file("train-4.jsonl", *[wide] * 8)))["runs"] == 1
    with pytest.raises(InputError, match=f"wide.jsonl: example 8 .*: {answer}, and there are 3"):
        cost(quick(tmp_path, **narrow, train=str(tmp_path / "train-4.jsonl"), sizes=[8]))
    assert cost(quick(tmp_path, ood={"other": {"path": test}}))["runs"] == 1
    with pytest.raises(InputError, match=r"long.jsonl: example 8 .*: its prompt has 1\d\d tokens"):
        cost(quick(tmp_path, test=long))


def test_a_set_out_of_distribution_is_known_by_its_name(tmp_path):
    """Two that change places are two others."""
    files = [{"path": str(tmp_path / name)} for name in ("test.jsonl", "train.jsonl")]
    first, second = (
        quick(tmp_path, ood=dict(zip(names, files, strict=True))) for names in ("ab", "ba")
    )
    jobs = [Job(each, "mle", {"lr": 0.01}, 0, ("test",), tmp_path) for each in (first, second)]
    assert jobs[0].folder != jobs[1].folder


def test_winograndes_labels_are_contents(tmp_path):
    train, labels = tmp_path / "train.jsonl", tmp_path / "train-labels.lst"
    plain = quick(tmp_path)
    labels.write_text("1\n")
    assert dataclasses.replace(plain).contents == plain.contents
    found = []
    for text in ("1\n", "2\n"):
        labels.write_text(text)
        found.append(dataclasses.replace(plain, format="winogrande").contents["train"])
    assert found[0][0] == found[1][0] == sha256(train) and found[0][1] != found[1][1]


def test_a_base_is_known_by_what_is_in_its_folder(tmp_path):
    """Every tensor, the configuration, the tokenizer: a change of any makes another."""
    base, folder = quick(tmp_path).base, tmp_path / "model"
    assert dataclasses.replace(quick(tmp_path), model=str(folder)).base == base
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    tensors, _ = load_tensors(folder / "model.safetensors")

    def changed():
        found = Study.read(tmp_path / "study.json").base != base
        for name, data in kept.items():
            (folder / name).write_bytes(data)
        return found

    assert not changed()
    for name in tensors:
        other = {**tensors, name: 1.5 * tensors[name]}
        save_tensors(folder / "model.safetensors", other.items())
        assert changed(), name
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes(kept[name] + b"\n")
        assert changed(), name
    (folder / "tokenizer_config.json").write_text("{}")
    assert changed()


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    path = config(tmp_path, methods=["scalabl"], lr=[0.01])
    whole = run_study(Study.read(path), tmp_path / "whole")
    real, calls = Job.run, []

    def stops(job):
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(job)

    monkeypatch.setattr(Job, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        run_study(Study.read(path), tmp_path / "out")
    monkeypatch.setattr(Job, "run", real)
    results = run_study(Study.read(path), tmp_path / "out")
    for name, row in results["methods"].items():
        assert row["seeds"] == whole["methods"][name]["seeds"]


@SLOW
def test_processes_give_the_same_numbers(tmp_path):
    path = config(tmp_path, methods=["mle"], lr=[0.01])
    one, two = (run_study(Study.read(path), tmp_path / f"jobs{n}", n) for n in (1, 2))
    for name, row in one["methods"].items():
        for a, b in zip(row["seeds"], two["methods"][name]["seeds"], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_a_bad_run_stops_those_beside_it(tmp_path):
    """One of two processes trains, the other fails at its first step; six more runs wait."""
    knobs = {"mle": [1.0], "map": [1e-200, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    settings = {**FEW, "steps": 20_000}
    path = config(
        tmp_path, methods=["mle", "map"], lr=[0.01], knobs=knobs, settings=settings, seeds=[0]
    )
    with pytest.raises(InputError, match="the loss is inf at step 0"):
        run_study(Study.read(path), tmp_path / "out", 2)
    assert len(list((tmp_path / "out/runs").iterdir())) <= 2
    assert not list((tmp_path / "out").glob("runs/*/run.json"))
    assert workers_of(os.getpid()) == []


def workers_of(process):
    """The processes that it has started to work."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [c for c in children if b"app.workers" in Path(f"/proc/{c}/cmdline").read_bytes()]


def both_train(out, patience=60):
    """Wait until two runs have done a step, but not for ever."""
    for _ in range(50 * patience):
        if sum(log.stat().st_size > 0 for log in out.glob("runs/*/train.jsonl")) == 2:
            return
        time.sleep(0.02)


LONG = {**FEW, "steps": 40_000, "checkpoint_every": 40_000}  # a minute, but for what ends it


@pytest.mark.parametrize(
    ("who", "number", "code", "words"),
    [
        ("study", signal.SIGTERM, 143, "interrupted by SIGTERM\n"),
        ("worker", signal.SIGKILL, 3, "error: a process of the study died, perhaps killed"),
        pytest.param("study", signal.SIGINT, 130, "interrupted by SIGINT\n", marks=SLOW),
        pytest.param("worker", signal.SIGTERM, 143, "interrupted by SIGTERM after", marks=SLOW),
    ],
)
def test_a_study_that_is_stopped_stops_its_processes(tmp_path, capsys, who, number, code, words):
    """One line, the exit code, and a checkpoint of each run that was not killed."""
    path, out = config(tmp_path, settings=LONG), tmp_path / "out"

    def stop():
        both_train(out)
        os.kill(os.getpid() if who == "study" else int(workers_of(os.getpid())[0]), number)

    stopping = threading.Thread(target=stop)
    stopping.start()
    assert cli.main(["study", str(path), "--out", str(out), "--jobs", "2"]) == code
    stopping.join()
    assert workers_of(os.getpid()) == []
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1
    assert len(list(out.glob("runs/*/checkpoint/*"))) == (1 if number == signal.SIGKILL else 2)
    assert not list(out.glob("runs/*/run.json"))


def ended(process):
    """Whether a process does nothing any more: one that nobody waits for stays as a zombie."""
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True


@SLOW
def test_a_study_that_is_killed_leaves_no_process(tmp_path):
    path, out = config(tmp_path, settings=LONG), tmp_path / "out"
    command = [sys.executable, "-m", "scalabl_ref", "study", path, "--out", out, "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    both_train(out)
    left = workers_of(process.pid)
    assert len(left) == 2
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    for _ in range(3000):  # a minute
        left = [child for child in left if not ended(child)]
        if not left:
            break
        time.sleep(0.02)
    for child in left:
        os.kill(int(child), signal.SIGKILL)
    assert left == []
    with alone(out):
        pass  # the folder is free
    assert len(list(out.glob("runs/*/checkpoint/*"))) == 2
    assert not list(out.glob("runs/*/run.json"))


def test_bold_is_only_what_the_bootstrap_tells_apart():
    """Two rows that differ by a lot, and two that do not differ at all."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200,), generator=g)
    right = torch.full((200, 2), 0.2).scatter(1, labels[:, None], 0.8)
    even = torch.full((200, 2), 0.5)
    rows = {"good": {"nll": 0.223}, "bad": {"nll": 0.693}}
    best = comparison._best("nll", rows, {"good": [right], "bad": [even]}, labels, 15)
    assert best["name"] == "good" and best["significant"] and best["difference"][1] < 0
    noise = (right.log() + 0.1 * torch.randn(200, 2, generator=g)).softmax(1)
    rows = {"a": {"nll": metrics.nll(right, labels)}, "b": {"nll": metrics.nll(noise, labels)}}
    best = comparison._best("nll", rows, {"a": [right], "b": [noise]}, labels, 15)
    assert not best["significant"]
    never = torch.zeros_like(even)  # two that are infinitely bad have no difference
    never[torch.arange(len(labels)), 1 - labels] = 1
    rows = {"a": {"nll": math.inf}, "b": {"nll": math.inf}}
    best = comparison._best("nll", rows, {"a": [never], "b": [never]}, labels, 15)
    assert not best["significant"] and math.isnan(best["difference"][0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metods": []}, "unknown field 'metods'"),
        ({"methods": ["magic"]}, "unknown method 'magic'"),
        ({"methods": []}, "methods must have values"),
        ({"methods": "mle"}, "methods must be a list (each a text), not 'mle'"),
        ({"model": 3}, "model must be a text, not 3"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16"),
        ({"format": "xml"}, "format must be one of jsonl, arc"),
        ({"seeds": 3}, "seeds must be a list (each a whole number), not 3"),
        ({"seeds": []}, "seeds must have values"),
        ({"seeds": [1, 1]}, "seeds must have values, each only once"),
        ({"seeds": [-1]}, "seeds must not be negative"),
        ({"seeds": [True]}, "seeds must be a list (each a whole number), not [True]"),
        ({"lr": 0.001}, "lr must be a list (each a finite number), not 0.001"),
        ({"lr": []}, "lr must have values"),
        ({"lr": [-1]}, "lr must be finite and not negative"),
        ({"lr": [10**400]}, "lr must be a list (each a finite number)"),
        ({"limit": "5"}, "limit must be a whole number or null, not '5'"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"test_limit": -1}, "test_limit must be at least 1"),
        ({"sizes": [8, 0]}, "sizes must be at least 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 10**9}, "samples must be at most 100,000"),
        ({"bins": 10**9}, "bins must be at most 10,000"),
        ({"bins": 0}, "bins must be at least 1"),
        ({"validation": 0}, "validation must be in (0, 1)"),
        ({"validation": math.nan}, "validation must be a finite number"),
        ({"ood": ["x"]}, "ood must be an object"),
        ({"ood": {"x": "y"}}, "ood must be an object"),
        ({"ood": {"x": {"file": "y"}}}, "ood: x: unknown field 'file': expected path, format"),
        ({"ood": {"x": {"limit": 3}}}, "ood: x: field 'path' is missing"),
        ({"ood": {"x": {"path": 3}}}, "ood: x: path must be a text"),
        ({"ood": {"x": {"path": "y", "limit": 0}}}, "ood: x: limit must be at least 1"),
        ({"ood": {"x": {"path": "y", "format": "z"}}}, "ood: x: format must be one of"),
        ({"ood": {"../x": {"path": "y"}}}, "cannot be the name of a set"),
        ({"sweep": ["blob"]}, "sweep: 'blob' is not among the study's methods"),
        ({"knobs": {"scalable": [1]}}, "knobs: 'scalable' is not among the study's methods"),
        ({"knobs": {"scalabl": 1.0}}, "knobs must be an object (each a list (each a finite num"),
        ({"knobs": {"scalabl": []}}, "knobs: scalabl must have values"),
        ({"knobs": {"scalabl": [-1]}}, "beta must be finite and not negative"),
        ({"knobs": {"mle": [1.5]}}, "share_of_steps must be in (0, 1], and is 1.5"),
        ({"settings": {"step": 4}}, "settings: unknown field 'step': did you mean steps?"),
        ({"settings": {"steps": "4"}}, "settings: steps must be a whole number, not '4'"),
        ({"settings": {"steps": 10**20}}, "settings: steps must be a whole number"),
        ({"settings": {"steps": 0}}, "steps must be at least 1"),
        ({"settings": {"rank": 0}}, "rank must be at least 1"),
        ({"settings": {"targets": "lm_head"}}, "settings: targets must be a list (each a text)"),
        ({"settings": {"recompute": 1}}, "settings: recompute must be true or false"),
        ({"settings": {"micro_batch": 1.5}}, "micro_batch must be a whole number or null"),
        ({"settings": {"kl": "backward"}}, "settings: kl must be forward or official"),
        ({"settings": {"lr": 0.1}}, "settings: lr has no effect: every method here has its own"),
        ({"settings": {"seed": 1}}, "settings: seed has no effect"),
        ({"settings": {"method": "map"}}, "settings: method has no effect"),
        ({"methods": ["scalabl"], "settings": {"beta": 2.0}}, "settings: beta has no effect"),
    ],
)  # fmt: skip
def test_what_no_study_can_have_is_named_before_any_of_it(tmp_path, changes, message):
    path = config(tmp_path, **changes)
    with pytest.raises(InputError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        Study.read(path)


def test_a_setting_that_some_methods_heed_is_theirs(tmp_path):
    """beta is a knob of scalabl alone; a number may be whole, and null is a default."""
    settings = {"beta": 2, "alpha": None, "sampling": "token"}
    study = Study.read(config(tmp_path, methods=["scalabl", "map", "dropout"], settings=settings))
    trials = {name: study.trials(name)[0] for name in study.methods}
    beta = {name: study.configs(name, trial, 0)[1].beta for name, trial in trials.items()}
    assert beta == {"scalabl": 1.0, "map": 2, "dropout": 2}


def test_a_study_has_templates_and_answers_of_its_own(tickets):
    (tickets / "own.txt").write_text("{question} Queue:\n\n")
    settings = {"steps": 2, "batch": 4, "rank": 2}
    config = Study(
        "model", "tickets.jsonl", "others.jsonl", prompt_template="own.txt", labels="words",
        answer_tokens="bare", methods=("mle",), lr=(1e-3,), seeds=(0,), settings=settings,
        knobs={"mle": [1.0]},
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
