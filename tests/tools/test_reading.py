"""The count of files and lines on the way through the code: it counts what runs."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest

import scalabl_ref as sr

from ..conftest import ROOT


def counted(**environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "tools" / "reading.py", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def usual() -> dict:
    return counted()


@pytest.fixture(scope="module")
def without_core() -> dict:
    return counted(SCALABL_NATIVE="0")


def file_of(name: object) -> str:
    return os.path.relpath(inspect.getfile(name), ROOT)


def test_each_way_adds_files_to_the_one_before(without_core):
    layer, noise, elbo = (set(way["each"]) for way in without_core["ways"].values())
    assert file_of(sr.Noise) in layer
    assert file_of(sr.Llama) in noise - layer
    assert file_of(sr.elbo) in elbo - noise
    assert layer < noise < elbo


def test_the_core_is_counted_where_it_runs(usual, without_core):
    for way, built in usual["ways"].items():
        assert built["native"] == sr.native_status()["used"]
        assert ("csrc/philox.h" in built["each"]) == built["native"]
        assert not without_core["ways"][way]["native"]
        assert not any(file.startswith("csrc/") for file in without_core["ways"][way]["each"])


def test_lines_are_those_of_the_files(usual):
    for way in usual["ways"].values():
        lines = {file: whole for file, (whole, _) in way["each"].items()}
        texts = {file: (ROOT / file).read_text().splitlines() for file in lines}
        assert lines == {file: len(text) for file, text in texts.items()}
        assert way["lines"] == sum(lines.values()) and way["files"] == len(lines)
        assert way["function_lines"] == sum(ran for _, ran in way["each"].values())
        assert all(ran <= whole for whole, ran in way["each"].values())
