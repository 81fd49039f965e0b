"""Two processes in one folder: the second is told at once, and harms nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.training import ranks as distributed
from scalabl_ref.training.lock import alone

from ..ranks import on_ranks


def refused(folder: Path, new: bool = False) -> None:
    with pytest.raises(InputError) as caught, alone(folder, new):
        pass
    words = f"{folder}: is in use by another process (pid {os.getpid()}): wait for it, "
    assert str(caught.value) == words + "or give another --out"


@pytest.mark.parametrize("new", [False, True])
def test_one_at_a_time(tmp_path, new):
    """Nothing is left but what was written meanwhile, by the one that may."""
    folder = tmp_path / "a" / "run"
    with alone(folder, new):
        refused(folder, new)
        assert folder.exists() != new and (tmp_path / "a").exists()
    assert os.listdir(tmp_path) == []
    with alone(folder, new):
        folder.mkdir(exist_ok=True)
        (folder / "file").touch()
        refused(folder, new)
    assert os.listdir(tmp_path / "a") == ["run"] and os.listdir(folder) == ["file"]
    with pytest.raises(KeyError), alone(folder, new):
        raise KeyError
    with alone(folder, new), alone(tmp_path / "a" / "other", new):
        pass


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The holder before unlinked what had just been opened here."""
    real = fcntl.flock

    def flock(*arguments) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        (tmp_path / ".lock").unlink()
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path):
        refused(tmp_path)
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_holder_that_has_not_said_who_it_is_holds_it(tmp_path):
    """A number left in the file is overwritten."""
    (tmp_path / ".lock").write_text("")
    with open(tmp_path / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another process \(pid unknown\)"), alone(tmp_path):
            pass
    (tmp_path / ".lock").write_text("9" * 30)
    with alone(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_without_locks_all_may_go_on(tmp_path, monkeypatch):
    def flock(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path), alone(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be made a folder"), alone(tmp_path / "file"):
        pass
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=".lock: cannot be written"), alone(tmp_path):
        pass


def die_within(folder: Path) -> None:
    with alone(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_holder_that_dies_gives_it_free(tmp_path):
    assert on_ranks(1, die_within, tmp_path) == [-signal.SIGKILL]
    assert (tmp_path / ".lock").exists()
    with alone(tmp_path):
        pass


def enter(folder: Path) -> int:
    """0 if this rank holds the lock, 10 if another does, 2 if it was not let in and prints why."""
    with distributed.joined(torch.device("cpu"), timeout=60):
        try:
            with alone(folder):
                holder = (folder / ".lock").read_text()
                distributed.barrier()
                return 0 if holder == str(os.getpid()) else 10
        except InputError as error:
            print(error)
            return 2


def test_the_first_rank_holds_it_for_all(tmp_path):
    """And if it cannot, none goes on or waits."""
    assert on_ranks(2, enter, tmp_path) == [0, 10]
    with alone(tmp_path):
        assert on_ranks(2, enter, tmp_path, out=tmp_path) == [2, 2]
    assert f"(pid {os.getpid()})" in (tmp_path / "out0").read_text()
    assert "rank 0 cannot" in (tmp_path / "out1").read_text()
