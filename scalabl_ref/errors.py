"""What users see when an input is bad, and files that are written whole or not at all."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class InputError(ValueError):
    """Bad input: one sentence naming the file, tensor or row, and what was expected.

    The command line prints it after "error: " and exits with code 2.
    """


class Interrupted(Exception):
    """A signal ended training between two steps, after a checkpoint; `signum` says which.

    The command line exits with code 128 + signum.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name} after {step} steps")
        self.signum = signum


class RankLost(Exception):
    """Another process of a run on several ranks ended, or did not answer in time.

    What happened there that process says itself; the command line exits with code 3.
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
