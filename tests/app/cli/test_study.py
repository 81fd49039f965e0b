"""`scalabl study`."""

from __future__ import annotations

import json
import os
import sys

from scalabl_ref.app import cli
from scalabl_ref.training.lock import alone

from ..commands import ok, refused, run
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
    assert cli.main(command) == 0
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


def test_a_finished_study_is_written_for_a_paper(tmp_path, capsys, monkeypatch):
    """Also with its FILE, whose paths may have moved and whose settings may not have changed."""
    monkeypatch.chdir(tmp_path)
    path = config(tmp_path, methods=["mle"], trials=1, seeds=[0])
    done = ok(f"study {path} --out out", capsys)
    assert list(done["results"]) == list(done["cost"]) == ["out"]
    code, text, _ = run("study --out out --table csv", capsys)
    assert code == 0 and text.startswith("method,replicates,acc,")
    assert ok("study --out out --table csv", capsys) == {"table": text}
    assert run("study --out out --table t.csv", capsys)[1] == "written: t.csv\n"
    assert (tmp_path / "t.csv").read_text() == text
    figures = ["f/nll.svg", "f/reliability-mle.svg"]
    assert ok("study --out out --figures f", capsys) == {"figures": figures}
    assert run("study --out out --figures f", capsys)[1] == "written: 2 figures in f\n"
    monkeypatch.setitem(sys.modules, "svglib.svglib", None)
    assert "PDF needs svglib" in refused("study --out out --figures f --pdf", capsys)
    study = json.loads(path.read_text())
    ood = {"other": {"path": "gone.jsonl", "limit": 5}}
    path.write_text(json.dumps({**study, "model": "gone", "train": "gone.jsonl", "ood": ood}))
    assert ok(f"study {path} --out out --table csv", capsys) == {"table": text}
    for changed in ({"samples": 3}, {"ood": {"other": {"path": "gone.jsonl", "limit": 4}}}):
        path.write_text(json.dumps({**study, **changed}))
        said = refused(f"study {path} --out out --table csv", capsys)
        assert f"another study than {path}: {next(iter(changed))} differs" in said
