"""`scalabl verify` prints the results of its checks; tests/verify tests the checks."""

from __future__ import annotations

import importlib
import json

import pytest

from scalabl_ref.verify.check import Result

from ..commands import run

RIGHT = Result("forward", "(1a)", 0.25, 12, 1.26)
LEFT_OUT = Result("gradient of bias", "(1d)", 0.0, 0, 0.0, "it gives none")
WRONG = Result("KL", "(5)", 3.5, 4, 0.0, "at [2]: got 1, expected 2")
HEAD = "check                 error / bound cases    s  equation"
LINES = {
    RIGHT: ["forward                        0.25    12  1.3  (1a)"],
    LEFT_OUT: ["gradient of bias                  0     0  0.0  (1d)   left out",
               " " * 22 + "it gives none"],
    WRONG: ["KL                              3.5     4  0.0  (5)   FAILED",
            " " * 22 + "at [2]: got 1, expected 2"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("results", "end"),
    [
        ([RIGHT], "all 1 checks passed"),
        ([RIGHT, LEFT_OUT], "all 1 checks passed; 1 left out"),
        ([WRONG, LEFT_OUT, RIGHT], None),
    ],
)
def test_verify_prints_each_check_and_fails_if_one_fails(capsys, monkeypatch, results, end):
    module, given = importlib.import_module("scalabl_ref.app.cli.verify"), []
    monkeypatch.setattr(
        module, "verify", lambda op, device: given.append((op, str(device))) or results
    )
    failed = "" if end else "failed: KL: (5)\n"
    code, out, err = run("verify", capsys)
    assert (code, err, given) == (int(not end), failed, [(None, "cpu")])
    lines = out.splitlines()
    table = [line for result in results for line in LINES[result]]
    assert lines[0].endswith(", on cpu") and lines[2 : 3 + len(table)] == [HEAD, *table]
    assert lines[3 + len(table) : -2] == (["", end] if end else [])
    assert lines[-2].startswith("Not covered: charts")
    code, out, err = run("verify --json", capsys)
    report = json.loads(out)
    assert code == int(not end) and err.count("failed: ") == (end is None)
    assert report["device"] == "cpu"
    assert lines[0] == f"path: {report['path']}, on cpu"
    checks = [{**result._asdict(), "passed": result is not WRONG} for result in results]
    assert report["checks"] == checks
