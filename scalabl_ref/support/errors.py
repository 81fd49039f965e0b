"""What users see when an input is bad or work ends early, and files written whole or not at all."""

from __future__ import annotations

import difflib
import io
import os
import re
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any


class InputError(ValueError):
    """Bad input: one sentence naming the file, tensor or row, and what was expected.

    The command line prints it after "error: " and exits with code 2.
    """


def expected(name: str, names: Iterable[str]) -> str:
    """The end of a message about `name`, which is not among `names`.

    ": did you mean NAME?" where one of them is much like it, else ": expected ...", which is cut.
    """
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    listed = textwrap.shorten(", ".join(known), 120, placeholder=" ...")
    return f": did you mean {near[0]}?" if near else f": expected {listed}"


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


_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc"
    r"|failed to map segment",  # the last of a library, while it is imported
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was wanting: libraries say so in errors of many kinds."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def ending(error: BaseException, where: str = "") -> tuple[int, str] | None:
    """Exit code and line with which the command line ends; None for what is a fault of ours.

    where: what comes between "error" and its colon.
    """
    if isinstance(error, (InputError, RankLost)):
        return (2 if isinstance(error, InputError) else 3), f"error{where}: {error}"
    if isinstance(error, Interrupted):
        return 128 + error.signum, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if out_of_memory(error):
        size = re.search(r"(?:allocate|mmap) (\d+ bytes|[\d.]+ [KMGT]iB)", str(error))
        asked = f" ({size[1]} were asked for at once)" if size else ""
        return 2, (
            f"error{where}: out of memory{asked}: less is needed with a smaller --batch or "
            "--micro-batch, --dtype bfloat16, or --quantize nf4"
        )
    if "can't start new thread" in str(error):
        return 2, f"error{where}: no thread can be started: a limit is reached (ulimit -u, -v)"
    if isinstance(error, OSError):  # of files that are read, or of the standard output
        named = f"{error.filename}: " if error.filename else ""
        return 2, f"error{where}: {named}{error.strerror or error}"
    return None


_COMMANDS = ("scalabl", "scalabl_ref", "convert_hf.py", "convert_gguf.py")


def leave_command(error: BaseException) -> None:
    """End this process as `ending` says, if it is one of the project's commands."""
    said = ending(error)
    if said and any(Path(word).name in _COMMANDS for word in sys.orig_argv[:5]):
        print(said[1], file=sys.stderr)
        raise SystemExit(said[0]) from None


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Within the block an OSError is an InputError that names `path`, which cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


class _Named(io.FileIO):
    """A file whose own errors name `path`: what else the block around it raises is not meant."""

    def __init__(self, file: Path | str, mode: str, path: Path | str) -> None:
        super().__init__(file, mode)
        self._path = path

    def write(self, data: Any) -> int:
        with writing(self._path):
            return super().write(data)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well, and nothing otherwise.

    Written under a temporary name in the same folder, flushed to disk, then renamed: a reader sees
    the old file or the new one. Raises InputError naming `path` if it cannot be written; an OSError
    of the block's own, as of a file that it reads, stays as it is.
    """
    path = Path(path)
    with writing(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        os.close(descriptor)
        with io.BufferedWriter(_Named(name, "wb", path)) as file:
            yield file
            file.flush()
            with writing(path):
                os.fsync(file.fileno())
        with writing(path):
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    atomic_write_texts({path: text})


def atomic_write_texts(texts: Mapping[Path | str, str]) -> None:
    """Write several files by their paths, the first one last; none, if one cannot be written."""
    with ExitStack() as stack:
        for path, text in texts.items():
            file = stack.enter_context(atomic_write(path))
            file.write(text.encode("utf-8"))
            file.flush()  # a full disk is noticed before the first of them is renamed


def open_log(path: Path | str) -> IO[str]:
    """A text file to add lines to, each written at once; InputError if one cannot be."""
    with writing(path):
        file = _Named(path, "ab", path)
    return io.TextIOWrapper(io.BufferedWriter(file), "utf-8", newline="\n", line_buffering=True)


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
