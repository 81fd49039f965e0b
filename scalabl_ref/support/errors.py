"""Errors for users: bad input, work that ends early, and the messages that report them."""

from __future__ import annotations

import difflib
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class InputError(ValueError):
    """Bad input: one sentence naming the file, tensor or row, and what was expected.

    The command line prints it after "error: " and exits with code 2.
    """


def expected(name: str, names: Iterable[str]) -> str:
    """The end of a message about `name`, which is not among `names`.

    ": did you mean NAME?" if one of them is similar, else ": expected ..." and the first names.
    """
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    listed = textwrap.shorten(", ".join(known), 120, placeholder=" ...")
    return f": did you mean {near[0]}?" if near else f": expected {listed}"


def to_install(extra: str) -> str:
    """The command that brings an extra."""
    return f"pip install -e '.[{extra}]' in the clone"


class Interrupted(Exception):
    """The signal `signum` ended the work. step: of the checkpoint that training wrote, if any.

    The command line exits with code 128 + signum.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        super().__init__(signum, step)  # pickle sends these to another process
        self.signum, self.step = signum, step

    def __str__(self) -> str:
        after = "" if self.step is None else f" after {self.step} steps"
        return f"interrupted by {signal.Signals(self.signum).name}{after}"


@contextmanager
def on_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While the block runs, `handle` handles SIGINT and SIGTERM.

    Only in the main thread: Python allows no other thread to set handlers.
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
    """Another process of a run or a study ended, or did not answer in time.

    That process prints the reason itself, if it can; the command line exits with code 3.
    """


_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc"
    r"|failed to map segment",  # the last: a library that is being imported
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: libraries report it in errors of many kinds."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def ending(error: BaseException, where: str = "") -> tuple[int, str] | None:
    """Exit code and last line of the command line; None for a bug, which needs a traceback.

    where: text between "error" and its colon.
    """
    if isinstance(error, (InputError, RankLost)):
        return (2 if isinstance(error, InputError) else 3), f"error{where}: {error}"
    if isinstance(error, Interrupted):
        return 128 + error.signum, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if out_of_memory(error):
        size = re.search(r"(?:allocate|mmap) (\d+ bytes|[\d.]+ [KMGT]iB)", str(error))
        asked = f" ({size[1]} were needed at once)" if size else ""
        return 2, (
            f"error{where}: out of memory{asked}: try a smaller --batch or "
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
    """End this process with the code and line of `ending`, if it is one of our commands."""
    said = ending(error)
    if said and any(Path(word).name in _COMMANDS for word in sys.orig_argv[:5]):
        print(said[1], file=sys.stderr)
        raise SystemExit(said[0]) from None
