"""Processes that do jobs: their answers, their errors, and their end."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.app.workers import Workers
from scalabl_ref.support.errors import Interrupted, RankLost


@dataclass(frozen=True)
class Writes:
    """Writes which process does it, and with how many threads, when a second one is there too."""

    folder: Path
    name: str

    def run(self) -> None:
        print("a line that does not belong among results", flush=True)
        (self.folder / self.name).write_text(f"{os.getpid()} {torch.get_num_threads()}")
        while len(pids(self.folder)) < 2:
            time.sleep(0.01)


def pids(folder: Path) -> set[str]:
    return {text.split()[0] for path in folder.iterdir() if (text := path.read_text())}


@dataclass(frozen=True)
class Fails:
    error: BaseException

    def run(self) -> None:
        raise self.error


@dataclass(frozen=True)
class Sleeps:
    """For a minute, but for what ends it; says that it began."""

    began: Path

    def run(self) -> None:
        self.began.write_text(str(os.getpid()))
        time.sleep(60)


@dataclass(frozen=True)
class Dies:
    """By a signal, once another job has begun."""

    began: Path

    def run(self) -> None:
        while not self.began.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def is_there(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_jobs_are_shared_by_processes_of_one_thread_that_end_with_the_block(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what PyTorch would take
    with Workers(2) as workers:
        for part in ("ab", "cde"):  # the same processes do both
            assert len(list(workers.run([Writes(tmp_path, name) for name in part]))) == len(part)
        assert all(is_there(pid) for pid in pids(tmp_path))
    assert len(pids(tmp_path)) == 2 and str(os.getpid()) not in pids(tmp_path)
    assert all(path.read_text().endswith(" 1") for path in tmp_path.iterdir())
    assert not any(is_there(pid) for pid in pids(tmp_path))
    assert capfd.readouterr().out == ""


def test_one_job_at_a_time_is_done_here(tmp_path):
    (tmp_path / "other").write_text("0")
    with Workers(1) as workers:
        assert len(list(workers.run([Writes(tmp_path, "own")]))) == 1
    assert (tmp_path / "own").read_text().startswith(f"{os.getpid()} ")


@pytest.mark.parametrize(
    "error",
    [InputError("file: is bad"), Interrupted(signal.SIGTERM, 5), Interrupted(signal.SIGINT),
     MemoryError(), FileNotFoundError(2, "No such file", "name")],
    ids=repr,
)  # fmt: skip
def test_an_error_is_the_jobs_own_and_ends_the_others_at_once(tmp_path, error):
    began = tmp_path / "began"
    with pytest.raises(type(error)) as caught, Workers(2) as workers:
        list(workers.run([Sleeps(began), Fails(error), Sleeps(began)]))
    assert str(caught.value) == str(error) and vars(caught.value) == vars(error)
    assert not began.exists() or not is_there(began.read_text())


def test_a_process_that_dies_ends_the_others(tmp_path):
    began = tmp_path / "began"
    with pytest.raises(RankLost, match="perhaps killed for lack of memory"), Workers(2) as workers:
        list(workers.run([Sleeps(began), Dies(began)]))
    assert not is_there(began.read_text())


def test_a_fault_of_ours_is_a_traceback(capfd):
    with pytest.raises(RankLost), Workers(2) as workers:
        list(workers.run([Fails(KeyError("a fault"))]))
    assert "KeyError: 'a fault'" in capfd.readouterr().err


@pytest.mark.parametrize("most", [0, 257])
def test_there_are_limits(most):
    with pytest.raises(InputError, match=f"at least 1 and at most 256, not {most}"):
        Workers(most)


def test_256_jobs_are_allowed():
    assert Workers(256)
