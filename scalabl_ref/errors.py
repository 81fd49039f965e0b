"""What users see when an input is bad or work ends early, and files written whole or not at all."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO


class InputError(ValueError):
    """Bad input: one sentence naming the file, tensor or row, and what was expected.

    The command line prints it after "error: " and exits with code 2.
    """


class Interrupted(Exception):
    """A signal ended the work; `signum` says which. step: of training, which had a checkpoint then.

    The command line exits with code 128 + signum.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        super().__init__(signum, step)  # what it is made of again in another process
        self.signum, self.step = signum, step

    def __str__(self) -> str:
        after = "" if self.step is None else f" after {self.step} steps"
        return f"interrupted by {signal.Signals(self.signum).name}{after}"


@contextmanager
def on_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM are `handle`'s.

    Not outside the main thread: there they are somebody else's to handle.
    """
    try:
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class RankLost(Exception):
    """Another process of the run, a rank or a study's, ended, or did not answer in time.

    What happened there that process says itself, if it can; the command line exits with code 3.
    """


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well, and nothing otherwise.

    Written under a temporary name in the same folder, flushed to disk, then renamed: a reader sees
    the old file or the new one. Raises InputError naming `path` if it cannot be written.
    """
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        os.close(descriptor)
        with open(name, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def make_folder(path: Path | str) -> None:
    """The folder `path`, with its parents. Raises InputError if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder: {error.strerror}") from None


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
