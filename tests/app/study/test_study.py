"""Studies as a whole: tuning, tables, interruption, processes."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.app import cli
from scalabl_ref.app import study as study_package
from scalabl_ref.app.study import METHODS, Job, Method, Range, Study, run_study
from scalabl_ref.app.study.methods import random_trials
from scalabl_ref.app.study.sets import encoded_sets
from scalabl_ref.evaluation import comparison, metrics
from scalabl_ref.evaluation.tables import sentences, table
from scalabl_ref.support.tensors import load_tensors
from scalabl_ref.training.lock import alone

from .studies import FEW, LONG, ROUNDING, config

SLOW = pytest.mark.slow


def test_every_method_is_tuned_on_equally_many_trials_and_tested_with_every_seed(done):
    config, out, results = done
    assert {len(trials) for m, trials in results["tuning"].items() if METHODS[m].tuned} == {2}
    names = {name for m in config.methods for name in (m, f"{m} + temperature")}
    assert set(results["methods"]) == names
    for name, row in results["methods"].items():
        assert len(row["replicates"]) == 2 and row["train_seconds"] > 0 and row["peak_bytes"] > 1e6
        for key in ("acc", "ece", "nll", "brier"):
            values = [scores[key] for scores in row["replicates"]]
            assert math.isclose(row[key], sum(values) / 2, rel_tol=ROUNDING), name
            deviation = abs(values[0] - values[1]) / 2**0.5
            assert abs(row["sd"][key] - deviation) <= ROUNDING * max(map(abs, values)), name
    for method, trials in results["tuning"].items():
        best = min(trials, key=lambda trial: trial["nll"])
        assert results["methods"][method]["trial"] == best["trial"]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (out / "results.md").read_text() == table(results)


def test_the_best_trials_are_tried_again_with_other_seeds(tmp_path):
    """The mean over both seeds chooses among them; seeds of tuning are not those of the test."""
    path = config(tmp_path, methods=["mle"], trials=3, finalists=2, tuning_seeds=[5, 6])
    study, out = Study.read(path), tmp_path / "out"
    results = run_study(study, out)
    tried = results["tuning"]["mle"]
    by_rate = sorted(study.tried("mle"), key=lambda trial: trial["lr"])
    edges = [study_package._edges(study, Job(study, "mle", t, 5, (), out)) for t in by_rate]
    assert edges == [["lr"], [], ["lr"]]
    assert results["at_edge"] == {"mle": edges[by_rate.index(tried[0]["trial"])]}
    assert sorted(t["seeds"] for t in tried) == [1, 2, 2] and tried[2]["seeds"] == 1
    nll = {}
    for trial in study.tried("mle"):
        for seed in (5, 6):
            folder = Job(study, "mle", trial, seed, (), out).folder
            if folder.exists():
                nll[trial["lr"], seed] = comparison.scores(folder, "validation", 15)["nll"]
    first = sorted(study.tried("mle"), key=lambda trial: nll[trial["lr"], 5])
    assert {t["trial"]["lr"] for t in tried[:2]} == {trial["lr"] for trial in first[:2]}
    assert tried[2]["trial"] == first[2] and len(nll) == 5
    for t in tried[:2]:
        mean = (nll[t["trial"]["lr"], 5] + nll[t["trial"]["lr"], 6]) / 2
        assert math.isclose(t["nll"], mean, rel_tol=ROUNDING)
    assert tried[0]["nll"] <= tried[1]["nll"]


def test_a_study_takes_the_trials_that_another_chose(tmp_path, done):
    """The same runs are tested, without a trial; other data is answered with the same settings."""
    before, out, results = done
    methods = ["mle", "scalabl", "mle untuned", "ensemble of scalabl"]
    path = config(tmp_path, methods=methods, tuning=str(out / "tuning.json"), limit=12)
    study = Study.read(path)
    chosen = {arm: results["methods"][arm]["trial"] for arm in ("mle", "scalabl")}
    assert study.tried("mle") == [chosen["mle"]] and study.tried("mle untuned") == [{}]
    assert study.tried("ensemble of scalabl") == [chosen["scalabl"]]
    found = run_study(study, tmp_path / "out")
    assert {arm: found["methods"][arm]["trial"] for arm in chosen} == chosen
    assert found["methods"]["ensemble of scalabl"]["trial"] == chosen["scalabl"]
    assert [len(trials) for trials in found["tuning"].values()] == [1, 1, 1]
    only = {"trial": chosen["mle"], "nll": None, "seeds": 0}
    assert found["tuning"]["mle"] == [only] and found["at_edge"]["mle"] == []
    for name in ("tuning.json", "results.json"):
        kept = json.loads((out / name).read_text())
        assert kept["tuning"] == results["tuning"]
        assert kept["study"] == json.loads(json.dumps(dataclasses.asdict(before)))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"tuning": 3}', "tuning.json: tuning must be an object"),
        ("{}", "tuning.json: has no trial of 'mle'"),
        ('{"tuning": {"mle": []}}', "tuning.json: has no trial of 'mle'"),
        ('{"tuning": {"mel": [{}]}}', "has no trial of 'mle': did you mean mel?"),
        ('{"tuning": {"mle": [{"trail": 1}]}}', "mle: trial must be an object"),
        ('{"tuning": {"mle": [{"trial": {"lr": null}}]}}', "mle: trial must be an object"),
        ('{"tuning": {"mle": [{"trial": {}}]}}', "mle: trial must have ['lr'], and has []"),
        ('{"tuning": {"mle": [{"trial": {"lr": -1}}]}}', "lr must"),
        ("[]", "tuning.json: expected a JSON object"),
    ],
)
def test_a_file_of_trials_that_does_not_fit_is_refused(tmp_path, text, message):
    file = tmp_path / "tuning.json"
    file.write_text(text)
    path = config(tmp_path, methods=["mle"], tuning=str(file))
    with pytest.raises(InputError, match=re.escape(message)):
        Study.read(path)


def test_variants_are_compared_with_settings_of_their_own(tmp_path):
    variants = {"small": {"rank": 1}, "large": {"rank": 3}}
    path = config(tmp_path, methods=["mle", "mle untuned"], variants=variants, trials=1, seeds=[0])
    study = Study.read(path)
    assert list(study.arms) == ["mle, small", "mle untuned, small", "mle, large",
                                "mle untuned, large"]  # fmt: skip
    results = run_study(study, tmp_path / "out")
    counts = [results["methods"][arm]["parameters"] for arm in study.arms]
    assert counts[0] == counts[1] and counts[2] == counts[3] == 3 * counts[0]
    assert results["methods"]["mle untuned, small"]["trial"] == {}


def test_ours_are_the_methods_of_this_project():
    ours = {name for name, method in METHODS.items() if method.ours}
    assert ours == {name for name in METHODS if "scalabl" in name or "subspace" in name}


def test_arms_are_compared_within_their_variant_and_kind(tmp_path):
    methods = ["mle", "mle untuned", "ensemble", "ensemble of dropout", "dropout"]
    variants = {"small": {"rank": 1}, "large": {"rank": 3}}
    plain = Study.read(config(tmp_path, methods=methods))
    families = study_package._families(plain.arms, plain)
    assert families == {"all": methods, "single networks": ["mle", "mle untuned", "dropout"],
                        "untuned": ["mle untuned"]}  # fmt: skip
    varied = Study.read(config(tmp_path, methods=methods, variants=variants))
    assert study_package._families(varied.arms, varied) == {
        f"{kind}, {variant}": [f"{method}, {variant}" for method in members]
        for variant in variants
        for kind, members in families.items()
    }


def test_replicates_draw_their_training_rows_anew_and_share_the_test(tmp_path):
    """Of 20 rows 3 are for tuning and 6 for the test; each seed trains on 5 of the other 11."""
    settings = {key: value for key, value in FEW.items() if key != "steps"}
    path = config(tmp_path, held_out=6, validation=3, limit=5, passes=2.4, settings=settings)
    study = Study.read(path)
    sets = [encoded_sets(study, study.sets, replicate) for replicate in (0, 1)]
    prompts = [{n: [e.prompt for e in s.examples] for n, s in each.items()} for each in sets]
    first, second = prompts
    assert list(map(len, first.values())) == [5, 3, 6, 9, 5]
    assert [name for name in first if first[name] != second[name]] == ["train"]
    for each in prompts:
        own = each["train"] + each["validation"] + each["test"]
        assert len(set(own)) == len(own) == 14
    arm = study.configs("mle", {"lr": 0.1}, 0)[1]
    assert arm.steps == 3  # 2.4 passes of 5 rows are 12 rows
    results = run_study(dataclasses.replace(study, methods=("mle",)), tmp_path / "out")
    shifted = Job(study, "mle", results["methods"]["mle"]["trial"], 1, (), tmp_path / "out").folder
    assert len(load_tensors(shifted / "shifted.safetensors")[0]["labels"]) == 9
    row = results["methods"]["mle"]
    assert list(results["shifted"]) == list(row["shifted"]) == ["shifted"]
    assert list(row["ood"]) == ["other"]


def test_an_ensemble_may_take_the_settings_of_its_members(tmp_path, monkeypatch):
    like = Method({"method": "mle"}, like="mle", members=2)
    monkeypatch.setitem(METHODS, "two", like)
    path = config(tmp_path, methods=["mle", "two"])
    results = run_study(Study.read(path), tmp_path / "out")
    assert results["methods"]["two"]["trial"] == results["methods"]["mle"]["trial"]
    assert list(results["tuning"]) == ["mle"]
    with pytest.raises(InputError, match="method 'two' takes its settings from 'mle': add it"):
        Study.read(config(tmp_path, methods=["two"]))


def test_a_range_may_span_all_floats():
    """Its ratio is no float: 616 decades. The middle of the logarithms is 1."""
    whole = Range(1e-308, 1e308)
    assert [whole.at(u) for u in (0.0, 0.25, 0.5, 1.0)] == [1e-308, 1e-154, 1.0, 1e308]
    assert Range(1e-3, 1e-1).at(1 / 3) == 0.00464  # to three digits
    assert Range(0.0, 2.0, log=False).at(1 / 3) == 0.667


def test_trials_cover_the_ranges_and_are_shared(tmp_path):
    """Each of n equal parts of a range, on its scale, has one trial; a name has the same values."""
    tuned = {"lr": Range(1e-3, 1e-1), "dropout": Range(0.0, 0.8, log=False)}
    trials = random_trials(tuned, 8)
    places = (
        [8 * math.log10(t["lr"] / 1e-3) / 2 for t in trials],
        [10 * t["dropout"] for t in trials],
    )
    for place in places:
        assert sorted(int(p) for p in place) == list(range(8))
    assert [t["lr"] for t in random_trials({"lr": tuned["lr"]}, 8)] == [t["lr"] for t in trials]
    assert random_trials({}, 8) == [{}]


def test_trials_and_ranges_are_those_of_finished_studies():
    """With other values a continued study would train again."""
    assert random_trials(METHODS["dropout"].tuned, 3) == [
        {"lr": 0.00136, "dropout": 0.333},
        {"lr": 0.00505, "dropout": 0.442},
        {"lr": 0.0198, "dropout": 0.162},
    ]
    ranges: dict[str, set] = {}
    for method in METHODS.values():
        for name, r in method.tuned.items():
            ranges.setdefault(name, set()).add((r.low, r.high))
            assert r.log == (name != "dropout")
    assert ranges == {
        "lr": {(5e-4, 2e-2)}, "share_of_steps": {(0.05, 1.0)}, "dropout": {(0.1, 0.6)},
        "prior_std": {(0.03, 1.0), (0.05, 1.0)}, "precision": {(0.03, 30.0), (1.0, 1000.0)},
        "variational_ratio": {(0.3, 30.0)}, "beta": {(0.03, 100.0)}, "kl_lr": {(1e-3, 1.0)},
        "init_sigma": {(0.01, 0.2)}, "tolerance": {(0.003, 1.5)}, "swag_lr": {(1e-3, 0.1)},
    }  # fmt: skip


SIZED = {"methods": ["mle", "scalabl", "blob"]}


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """A study of three methods: its folder and results."""
    folder = tmp_path_factory.mktemp("sized")
    return folder, run_study(Study.read(config(folder, **SIZED)), folder / "out")


def test_the_page_shows_every_method_and_every_plot(sized):
    folder, results = sized
    page = (folder / "out" / "results.html").read_text()
    for name, row in results["methods"].items():
        assert f"{row['nll']:.3f} ± {row['sd']['nll']:.3f}" in page, name
        assert f"<td>{row['parameters']:,}</td>" in page
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    verdicts = [
        f"{ours} on the test set, among all" for ours in ("scalabl", "scalabl + temperature")
    ]
    wanted = ["All scores", *verdicts, "All pairs on the test set", "Out of distribution: other",
              "Cost", "Accuracy and ECE", "Sigma by layer"]  # fmt: skip
    assert [h for h in headings if h in wanted] == wanted
    assert page.count('id="reliability-') == 2 * 3 + 3  # title, description and hatching of each
    assert results["verdict"][0]["ours"] == "scalabl"
    assert sentences(results)[1] in html.unescape(page)


def test_the_verdict_compares_ours_of_least_tuning_nll_with_every_rival(done):
    config, out, results = done
    ours = [name for name in config.methods if METHODS[name].ours]
    nll = {}
    for name in ours:
        trial = results["methods"][name]["trial"]
        folders = [Job(config, name, trial, s, (), out).folder for s in config.tuning_seeds]
        each = [comparison.scores(folder, "validation", 15)["nll"] for folder in folders]
        nll[name] = sum(each) / len(each)
    families = {
        "all": list(config.methods),
        "single networks": [name for name in config.methods if METHODS[name].members == 1],
        "untuned": [name for name in config.methods if "untuned" in name],
    }
    wanted = []
    for family, names in families.items():
        mine = [name for name in names if name in ours]
        chosen = min(mine, key=nll.__getitem__) if mine else ""
        wanted += [
            (family, score, chosen + ending, other + ending)
            for score in metrics.SCORES
            for ending in ("", " + temperature")
            for other in names
            if chosen and other not in ours
        ]
    got = [(e["family"], e["score"], e["ours"], e["rival"]) for e in results["verdict"]]
    assert got == wanted
    assert len(results["pairs"]) == 3 * len(ours) * (len(config.methods) - len(ours))
    for entry in results["verdict"]:
        mine, rival = (results["methods"][entry[side]] for side in ("ours", "rival"))
        difference = mine[entry["score"]] - rival[entry["score"]]
        assert abs(entry["difference"] - difference) <= 1e-12 and entry["replicates"] == 2


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


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    path = config(tmp_path, methods=["scalabl"])
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
        assert row["replicates"] == whole["methods"][name]["replicates"]


@SLOW
def test_processes_give_the_same_numbers(tmp_path):
    path = config(tmp_path, methods=["mle"])
    one, two = (run_study(Study.read(path), tmp_path / f"jobs{n}", n) for n in (1, 2))
    for name, row in one["methods"].items():
        for a, b in zip(row["replicates"], two["methods"][name]["replicates"], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_a_bad_run_stops_those_beside_it(tmp_path):
    """One of two processes trains, the other fails at its first step; six more runs wait."""
    settings = {**FEW, "steps": 20_000}
    ranges = {"lr": [0.01, 0.01]}
    path = config(
        tmp_path, methods=["mle untuned", "map"], ranges=ranges, settings=settings, seeds=[0],
        trials=7,
    )  # fmt: skip
    study, out = Study.read(path), tmp_path / "out"
    bad = Job(study, "map", study.tried("map")[0], 0, (), out).fits()[0].folder
    bad.parent.mkdir(parents=True)
    bad.write_text("a file where a folder should be")
    with pytest.raises(InputError, match=f"{bad.name}: cannot be made a folder"):
        run_study(study, out, 2)
    assert len(list((tmp_path / "out/runs").iterdir())) <= 2
    assert not list((tmp_path / "out").glob("runs/*/run.json"))
    assert workers_of(os.getpid()) == []


def test_a_trial_that_diverges_is_the_worst_and_stops_nothing(tmp_path):
    """A prior too narrow for float64 makes the loss infinite at once; the wider one is chosen."""
    path = config(
        tmp_path, methods=["mle untuned", "map"], ranges={"prior_std": [1e-150, 1e150]}, trials=2
    )
    study, out = Study.read(path), tmp_path / "out"
    results = run_study(study, out)
    worst, best = sorted(t["prior_std"] for t in study.tried("map"))
    assert worst < 1 < best and results["methods"]["map"]["trial"]["prior_std"] == best
    assert [t["nll"] for t in results["tuning"]["map"]][1:] == [math.inf]
    assert results["failed"] == {} and len(list(out.glob("runs/map-*/failed.json"))) == 1
    assert run_study(study, out)["methods"] == results["methods"]


def test_a_replicate_that_fails_is_left_out_and_reported(tmp_path, monkeypatch):
    path = config(tmp_path, methods=["mle untuned", "laplace"], trials=1, seeds=[0, 1, 2])
    after = METHODS["laplace"].after

    def fails(made):
        if made.seed == 1:
            raise InputError("no precision of the prior maximises the evidence")
        return after(made)

    monkeypatch.setitem(METHODS, "laplace", dataclasses.replace(METHODS["laplace"], after=fails))
    results = run_study(Study.read(path), tmp_path / "out")
    assert results["failed"] == {"laplace": [1]}
    (note,) = (tmp_path / "out").glob("answers/laplace-*-1/failed.json")
    reason = {"error": "no precision of the prior maximises the evidence"}
    assert json.loads(note.read_text()) == reason
    assert [r["replicate"] for r in results["methods"]["laplace"]["replicates"]] == [0, 2]
    assert len(results["methods"]["mle untuned"]["replicates"]) == 3


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
