"""The device check survives steps that fail, crash, hang or cannot run, and records them."""

from __future__ import annotations

import sys
import time

import pytest

from ..conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from device_check import STEPS, Settings, Skip, Step, main, run, run_all  # noqa: E402


def python(name: str, code: str, limit: float = 30.0, figures: bool = False) -> Step:
    return Step(name, limit, lambda settings: [sys.executable, "-c", code], figures)


def unable(settings: Settings) -> list:
    raise Skip("needs CUDA")


def leaves_a_process(path, parent: str) -> str:
    """Code whose child writes to `path` two seconds later, if it lives."""
    child = f"import time; time.sleep(2); open({str(path)!r}, 'w')"
    return f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); {parent}"  # noqa: E501


@pytest.fixture
def settings(tmp_path):
    return Settings("cuda", tmp_path)


def test_every_step_is_recorded_whatever_becomes_of_it(settings, tmp_path):
    out, left = tmp_path / "device.md", tmp_path / "left"
    steps = [
        python("card", 'print(\'{"card": "A100", "driver": "580.1"}\')'),
        python("wrong", "print('1 | 2'); raise SystemExit(3)"),
        python("crash", "import os; os.kill(os.getpid(), 11)"),
        python("hang", leaves_a_process(left, "time.sleep(60)"), limit=1.0),
        Step("unable", 1, unable),
        python("right", "print('one'); print('all 44 checks passed')"),
        python("table", "print('| a |\\n| --- |\\n| 7 |')", figures=True),
    ]
    results = run_all(steps, settings, out)
    verdicts = [(r.name, r.verdict, r.why) for r in results[1:]]
    assert verdicts == [
        ("wrong", "failed", "status 3"),
        ("crash", "failed", "status -11"),
        ("hang", "failed", "no end within 1 s"),
        ("unable", "skipped", "needs CUDA"),
        ("right", "passed", "all 44 checks passed"),
        ("table", "passed", ""),
    ]
    page = out.read_text()
    for part in ("| card | A100 |", "| driver | 580.1 |", "| commit | ", "| hang | failed | ",
                 "| unable | skipped | 0.0 | needs CUDA |", "## wrong, failed\n\n```text\n1 |",
                 "## table\n\n| a |\n| --- |\n| 7 |\n"):  # fmt: skip
        assert part in page, page
    time.sleep(2.5)
    assert not left.exists()  # a step that hangs leaves no process


def test_a_step_leaves_no_process(settings, tmp_path):
    step = python("left", leaves_a_process(tmp_path / "left", "print('done')"))
    assert run(step, settings).verdict == "passed"
    time.sleep(2.5)
    assert not (tmp_path / "left").exists()


def test_what_is_done_is_in_the_file_before_the_next_step(settings, tmp_path):
    out = tmp_path / "device.md"
    seen = f"assert '| first | passed |' in open({str(out)!r}).read()"
    results = run_all([python("first", "print(1)"), python("second", seen)], settings, out)
    assert results[1].verdict == "passed", results[1].text


def test_without_the_device_nothing_else_begins(settings, tmp_path):
    steps = [python("card", "raise SystemExit('no GPU')"), python("next", "print(1)")]
    results = run_all(steps, settings, tmp_path / "device.md")
    assert [r.verdict for r in results] == ["failed", "skipped"] and results[0].text == "no GPU"


def test_the_command(tmp_path, monkeypatch, capsys):
    """One step of the dry run; a step that fails gives exit code 1."""
    out = tmp_path / "device.md"
    arguments = ["--device", "cpu", "--out", str(out), "--only"]
    assert main([*arguments, "card", "graph"]) == 0
    assert "dry run" in out.read_text() and "| graph | skipped | 0.0 | needs CUDA |" in (
        out.read_text()
    )
    monkeypatch.setattr("device_check.STEPS", [python("card", "raise SystemExit(1)")])
    assert main([*arguments, "card"]) == 1
    with pytest.raises(SystemExit):
        main([*arguments, "no such step"])


def test_all_steps_together_take_eight_minutes_at_most():
    assert sum(step.limit for step in STEPS) <= 8 * 60
