"""`scalabl study`."""

from __future__ import annotations

import os

from scalabl_ref.app import cli
from scalabl_ref.training.lock import alone

from ..commands import ok
from ..study.studies import config


def test_two_studies_in_one_folder_do_not_meet(tmp_path, capsys):
    path, out = config(tmp_path, methods=["mle"], trials=1, seeds=[0]), tmp_path / "out"
    out.mkdir()
    command = ["study", str(path), "--out", str(out)]
    with alone(out):
        assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert f"error: {out}: is in use by another process (pid {os.getpid()})" in said
    assert list(out.iterdir()) == []
    done = ok(" ".join(command), capsys)
    assert list(done["results"]) == list(done["cost"]) == [str(out)]
    (out / ".lock").mkdir()
    assert cli.main(command) == 2 and ".lock: cannot be written" in capsys.readouterr().err


def test_command_and_bad_files(tmp_path, capsys):
    path = config(tmp_path, methods=["mle"], trials=1, seeds=[0])
    assert cli.main(["study", str(path), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "| mle | lr 0.0" in out and "results.md" in out
    assert f"{tmp_path / 'out'}: 1 training runs, 3 steps in all, " in out
    for jobs in (0, 10**9):
        command = ["study", str(path), "--out", str(tmp_path / "out"), "--jobs", str(jobs)]
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert said == f"error: jobs must be at least 1 and at most 256, not {jobs}\n"
    path.write_text('{"model": "m"}')
    assert cli.main(["study", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {path}: field 'train' is missing\n"
