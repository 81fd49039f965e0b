"""Studies as a whole: tuning, tables, interruption, processes."""

from __future__ import annotations

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
from scalabl_ref.app.study import METHODS, Job, Study, run_study
from scalabl_ref.evaluation import comparison, metrics
from scalabl_ref.evaluation.comparison import table
from scalabl_ref.support.tensors import load_tensors
from scalabl_ref.training.lock import alone

from .studies import FEW, LONG, ROUNDING, config

SLOW = pytest.mark.slow


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
