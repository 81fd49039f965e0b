"""The soak: it finds nothing in a short time, and finds what is broken."""

from __future__ import annotations

import json
import sys

import pytest

from ..conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import soak  # noqa: E402


@pytest.fixture(autouse=True)
def package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.slow
def test_a_short_soak_and_a_round_that_goes_on_with_another_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "MOST", 2)
    out = tmp_path / "soak"
    arguments = ["--minutes", "0", "--steps", "6", "--seed", "1", "--out", str(out)]
    assert soak.main(arguments) == 0, capsys.readouterr().out
    assert "broken                         0" in capsys.readouterr().out
    state = soak.State(**json.loads((out / "state.json").read_text()))
    assert (state.seed, state.rounds, state.broken) == (1, 1, [])
    assert not (out / "round0").exists() and state.memory["records"] > 0
    work = soak.Soak(out, soak.ASSETS, 6, state)
    state.seed = 2
    with pytest.raises(soak.Broken, match=r"round1/run/adapter\.safetensors differs"):
        work.round(1, out / "first")


def test_what_is_unexpected_ends_a_soak(tmp_path, capsys):
    assert soak.main(["--minutes", "0", "--model", "gone", "--out", str(tmp_path / "x")]) == 1
    assert "train: exit code 2: error: " in capsys.readouterr().out


def test_growth():
    flat = [1000, 2000] + [3000 + i % 7 for i in range(100)]
    assert abs(soak.growth(flat)) < soak.GROWTH
    assert soak.growth([3000 + i for i in range(100)]) > 0.015
    assert soak.growth([3000 + 2 * i for i in range(100)]) > soak.GROWTH
    assert soak.growth(flat[:10]) is None


def test_growth_is_broken(tmp_path):
    record = tmp_path / "memory"
    record.write_text("".join(f"{3000 + 2 * i}\n" for i in range(100)) + "31")
    state = soak.State(0, "tiny")
    soak.judge_memory(state, record)
    assert "resident memory grew by 3" in state.broken[0] and state.memory["records"] == 100
