"""The fuzzer of the file readers: what it finds nothing in, and that it finds what is there."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from random import Random

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.support.tensors import load_tensors

from . import fuzz
from .conftest import ROOT

KINDS = {  # the inputs of a long run; gguf: tests/peer/test_gguf.py
    **dict.fromkeys(("safetensors", "pth", "llama2c", "examples", "sentencepiece"), 5000),
    **dict.fromkeys(("rows", "tokenizer", "peft", "chat"), 20_000),
}


def outcome(kind: str, count: int, seed: int, folder) -> dict:
    """The result of a fuzzing process, which must not crash."""
    command = [sys.executable, "-m", "tests.fuzz", kind, str(count), str(seed), str(folder)]
    # Without the trace of a panic of `tokenizers`, which reads its symbols: 50 MiB.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    last = (folder / "now").read_text() if (folder / "now").exists() else "none"
    assert done.returncode == 0, (last, done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def check(result: dict, count: int) -> None:
    """No fault; and the inputs were neither all refused nor all taken, nor for one reason."""
    assert result["faults"] == [] and result["fault"] == 0
    assert result["accepted"] + result["refused"] == count
    assert result["accepted"] >= count // 100 and result["refused"] >= count // 4
    assert result["messages"] >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_files(kind, tmp_path):
    count = KINDS[kind] // 50  # 100, and 400 of the kinds that have more
    check(outcome(kind, count, 1, tmp_path), count)


@pytest.mark.slow
@pytest.mark.parametrize("kind, count", KINDS.items())
def test_many_damaged_files(kind, count, tmp_path):
    check(outcome(kind, count, 0, tmp_path), count)


# --- What the fuzzer would notice -----------------------------------------------------------------

trim = getattr(ctypes.CDLL(None), "malloc_trim", int)  # of glibc alone


@pytest.fixture
def watch(tmp_path, monkeypatch):
    def late(signum, frame):
        raise fuzz.TooLong

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    before = [signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "input").write_bytes(b"x" * 1000)
    watch = fuzz.Watch(tmp_path / "work")
    trim(0)  # memory that is given back later would hide what a reader takes
    yield watch
    watch.on = False
    for number, handler in zip((signal.SIGALRM, signal.SIGPROF), before, strict=True):
        signal.signal(number, handler)


def waits(path):
    try:
        time.sleep(5)
    except Exception:  # as a reader that takes every exception for the file's
        raise InputError(f"{path}: broken") from None


def works_for_ever(path):
    while True:
        pass


def hoards(path):
    torch.ones(16 << 20)  # 64 MiB


def escapes(path):
    (path.parent.parent / "escape").write_text("x")


def removes(path):
    victim = path.parent.parent / "victim"
    with contextlib.suppress(FileNotFoundError):
        os.remove(victim)


def runs(path):
    os.system("true")


def leaks_an_exception(path):
    raise ValueError("index 3")


class Panic(BaseException):
    """As of a library in Rust."""


def panics(path):
    raise Panic("no entry found for key")


def explains_nothing(path):
    raise InputError("something is wrong")


def explains_too_much(path):
    raise InputError(f"{path}:\n a\n b")


@pytest.mark.parametrize(
    "reader, words",
    [
        (waits, "took more than"),
        (works_for_ever, "took more than"),
        (hoards, "MiB for a file of 1000 bytes"),
        (escapes, "did open"),
        (removes, "did os.remove"),
        (runs, "did os.system"),
        (leaks_an_exception, "ValueError: index 3"),
        (panics, "Panic: no entry found"),
        (explains_nothing, "not one line that names the file"),
        (explains_too_much, "not one line that names the file"),
    ],
)
def test_every_kind_of_fault_is_noticed(watch, tmp_path, reader, words):
    verdict, said = fuzz.attempt(reader, tmp_path / "work" / "input", watch)
    assert verdict == "fault" and words in said


def test_what_is_right_is_no_fault(watch, tmp_path):
    def refuses(path):
        path.with_name("scratch").write_text("x")  # its own folder it may use
        raise InputError(f"{path}: broken")

    path = tmp_path / "work" / "input"
    assert fuzz.attempt(refuses, path, watch)[0] == "refused"
    assert fuzz.attempt(lambda path: path.read_bytes(), path, watch) == ("accepted", "")


def test_a_crash_names_its_input(tmp_path):
    """A process that dies leaves the name of the input that it was at."""
    script = (
        "import ctypes, sys; from tests import fuzz;"
        "fuzz.KINDS['x'] = (lambda r, l, f: b'x', lambda path: ctypes.string_at(0));"
        f"fuzz.main(['x', '5', '7', {str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert done.returncode < 0 and (tmp_path / "now").read_text() == f"x-7-{-fuzz.WARM}"


def test_inputs_are_the_same_for_the_same_seed(tmp_path):
    for kind in KINDS:
        make, _ = fuzz.KINDS[kind]
        one, two, other = (make(Random(seed), False, tmp_path) for seed in ("a", "a", "b"))
        assert one == two != other, kind


def test_an_undamaged_file_is_accepted(tmp_path):
    (tmp_path / "base").touch()
    fuzz.make_safetensors(Random(0), False, tmp_path)
    tensors, _ = load_tensors(tmp_path / "base")
    assert set(tensors) == set(fuzz._tensors(False))
