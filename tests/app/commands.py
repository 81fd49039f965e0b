"""Commands as a user types them, and what they answer; `work` in conftest.py is where they run."""

from __future__ import annotations

import json
from pathlib import Path

from scalabl_ref.app import cli

TRAIN = "train --model model --data train.jsonl --out run --steps 6 --batch 4 --rank 2"
NEXT = TRAIN.replace("--out run", "--out next")


def run(command: str, capsys) -> tuple[int, str, str]:
    code = cli.main(command.split())
    out, err = capsys.readouterr()
    return code, out, err


def ok(command: str, capsys) -> dict:
    """The JSON result of a command that must succeed, with nothing else on standard output."""
    code, out, err = run(command + " --json", capsys)
    assert code == 0, err
    return json.loads(out)


def scores(command: str, capsys) -> dict:
    """The results of `evaluate`, without what they are of."""
    about = ("data", "data_sha256", "label_names", "settings")
    return {key: value for key, value in ok(command, capsys).items() if key not in about}


def refused(command: str, capsys) -> str:
    """The message of a command that must fail: one line, exit code 2, no traceback."""
    code, out, err = run(command, capsys)
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def facts(folder: Path) -> dict:
    """What a run records."""
    return json.loads((folder / "run.json").read_text())
