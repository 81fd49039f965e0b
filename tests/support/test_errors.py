"""What the last line of a command says, and its exit code; signals, and names that are near."""

from __future__ import annotations

import signal
import sys
import threading

import pytest

from scalabl_ref import InputError
from scalabl_ref.support.errors import (
    Interrupted,
    RankLost,
    ending,
    expected,
    leave_command,
    on_signals,
    out_of_memory,
)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("file: is bad"), 2, "error on rank 1: file: is bad"),
        (RankLost("rank 2 ended"), 3, "error on rank 1: rank 2 ended"),
        (FileNotFoundError(2, "No such file", "name"), 2, "error on rank 1: name: No such file"),
        (RuntimeError("can't start new thread"), 2, "error on rank 1: no thread can be started"),
        (MemoryError(), 2, "error on rank 1: out of memory: try"),
        (Interrupted(signal.SIGTERM, 5), 143, "interrupted by SIGTERM after 5 steps"),
        (Interrupted(signal.SIGINT, 0), 130, "interrupted by SIGINT after 0 steps"),
        (Interrupted(signal.SIGINT), 130, "interrupted by SIGINT"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=repr,
)
def test_how_a_command_ends(error, code, line):
    found = ending(error, " on rank 1")
    assert found is not None and found[0] == code and found[1].startswith(line)


def test_a_fault_of_ours_has_no_line():
    assert ending(KeyError("memory")) is None and ending(ValueError("is bad")) is None


@pytest.mark.parametrize(
    "command",
    ["/bin/scalabl info", "-m scalabl_ref info", "-X dev tools/convert_hf.py a", "convert_gguf.py"],
)
def test_what_ends_the_import_of_the_package_is_a_line_of_our_commands(
    capsys, monkeypatch, command
):
    monkeypatch.setattr(sys, "orig_argv", ["python", *command.split()])
    leave_command(KeyError("a fault"))
    with pytest.raises(SystemExit) as left:
        leave_command(RankLost("rank 2 ended"))
    assert left.value.code == 3 and capsys.readouterr() == ("", "error: rank 2 ended\n")


def test_the_import_in_another_program_ends_nothing(capsys, monkeypatch):
    for command in ("mine.py a b c scalabl", "scalabl.py", "-c import_scalabl_ref"):
        monkeypatch.setattr(sys, "orig_argv", ["python", *command.split()])
        leave_command(KeyboardInterrupt())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words",
    ["Cannot allocate memory", "can't allocate memory", "not enough memory: you tried to allocate",
     "CUDA out of memory", "std::bad_alloc", "libx.so: failed to map segment from shared object"],
)  # fmt: skip
def test_memory_that_is_short_is_known_by_words(words):
    assert out_of_memory(RuntimeError(f"error: {words}.")) and not out_of_memory(OSError("memory"))


def test_a_near_name_is_proposed_or_all_are_listed():
    assert expected("stepz", iter(["seed", "steps"])) == ": did you mean steps?"
    assert expected("q", iter(["seed", "steps"])) == ": expected seed, steps"
    many = expected("q", [f"name{i}" for i in range(99)])
    assert many.startswith(": expected name0, name1,") and many.endswith(" ...")
    assert len(many) <= len(": expected ") + 120


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_handled_within_the_block_alone(signum):
    before, caught = signal.getsignal(signum), []
    with pytest.raises(KeyError), on_signals(lambda number, _: caught.append(number)):
        signal.raise_signal(signum)
        raise KeyError
    assert caught == [signum] and signal.getsignal(signum) is before


def test_another_thread_leaves_the_signals_alone():
    before, done = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with on_signals(lambda *_: None):
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]
