"""`scalabl demo`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from scalabl_ref.app import cli, demo


def test_the_demo_runs_without_a_warning(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "scalabl_ref", "demo", "--json"]
    command += ["--steps", "3", "--samples", "2", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    result = json.loads(done.stdout)
    assert [len(model["metrics"]) for model in result["models"]] == [4] * 5
    assert result["best"]["nll"] == demo.best_nll()
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "best possible" in page and page.count("<svg") >= 4
    assert "1000 test questions" in page, "of the model that ships with the package"
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == result


def test_the_demo_speaks(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--steps", "2", "--samples", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for part in (
        "2 steps of 32",
        "best possible",
        "Look at NLL and ECE",
        "Temperature scaling",
        "report.html",
    ):
        assert part in text


def test_the_demo_does_what_its_options_say(capsys, monkeypatch):
    given = []

    def run(out, model, steps, samples, seed, device, say):
        given.append((str(out), model, steps, samples, seed, str(device)))
        say("told")
        return {"best": 1}

    monkeypatch.setattr(demo, "run", run)
    options = "--out there --model smollm2 --steps 7 --samples 3 --seed 5"
    assert cli.main(["demo", *options.split()]) == 0
    assert given == [("there", "smollm2", 7, 3, 5, "cpu")]
    assert capsys.readouterr().out == "told\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "steps must be at least 1"),
        ("--samples 0", "--samples must be at least 1, and is 0"),
        ("--device nonsense", "device 'nonsense' cannot be used"),
        ("--out {file}", "cannot be made a folder"),
        ("--out {file}/below", "cannot be made a folder"),
    ],
)
def test_a_bad_option_is_refused_before_any_work(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["demo", *options.format(file=tmp_path / "file").split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("train.jsonl")), "trained"


def test_ctrl_c_ends_in_one_line(tmp_path, capsys, monkeypatch):
    original = demo.Trainer.step

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(demo.Trainer, "step", interrupted)
    assert cli.main(["demo", "--steps", "2", "--out", str(tmp_path / "demo")]) == 130
    assert capsys.readouterr().err.endswith("interrupted by SIGINT after 1 steps\n")
