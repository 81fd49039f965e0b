"""One process at a time in a run's folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..support.errors import InputError
from ..support.files import make_folder, writing
from . import ranks as distributed


@contextmanager
def alone(folder: Path | str, new: bool = False) -> Iterator[None]:
    """While the block runs, no other process can enter such a block with this folder.

    The lock is a file, FOLDER/.lock, which holds the number of the process. It is removed at the
    end, with the folder if that is empty, and it is released if its holder dies. new: the folder
    must not exist yet, so the file lies beside it. File systems without locks give no protection.
    On several ranks all call it, and rank 0 holds the lock.

    Raises InputError, on all ranks, if another process holds it, or if it cannot be written.
    """
    folder, problem = Path(folder), ""
    path = folder.parent / f".{folder.name}.lock" if new else folder / ".lock"
    with ExitStack() as stack:
        if distributed.rank() == 0:
            try:
                stack.enter_context(_held(path, folder))
            except InputError as error:
                problem = str(error)
        if distributed.largest(int(bool(problem))):
            raise InputError(problem or f"{folder}: rank 0 cannot lock it")
        yield


@contextmanager
def _held(path: Path, folder: Path) -> Iterator[None]:
    made = [p for p in (path.parent, *path.parent.parents) if not os.path.exists(p)]
    make_folder(path.parent)
    try:
        descriptor = _locked(path, folder)
        try:
            with writing(path):
                os.truncate(descriptor, 0)
                os.write(descriptor, b"%d" % os.getpid())
            yield
        finally:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)
    finally:
        for each in made:
            with suppress(OSError):  # it is not empty
                each.rmdir()


def _locked(path: Path, folder: Path) -> int:
    """The open file at `path`, locked by this process."""
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode("ascii", "replace")
            os.close(descriptor)
            raise InputError(
                f"{folder}: is in use by another process (pid {holder or 'unknown'}): wait for it, "
                "or give another --out"
            ) from None
        except OSError:
            pass  # the file system knows no locks
        # The holder before may have removed the file after it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)
