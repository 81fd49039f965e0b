"""Progress on standard error, so that standard output stays clean for results.

A terminal gets a bar, anything else a line every 30 s.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

EVERY = 30.0  # seconds between the lines of a program without a terminal

_UNITS = (  # seconds of each, from which on it is used, and its name
    (1.0, 0.0, "second"),
    (60.0, 90.0, "minute"),
    (3600.0, 5400.0, "hour"),
    (86400.0, 129600.0, "day"),
    (31557600.0, 63115200.0, "year"),
)


def duration(seconds: float) -> str:
    """A time in the unit that a person would choose, rounded to 5 %: "40 seconds", "3 days"."""
    size, _, name = [unit for unit in _UNITS if seconds >= unit[1] or unit is _UNITS[0]][-1]
    count = seconds / size
    shown = f"{count:,.0f}" if count >= 9.95 else f"{count:.2g}"
    return f"{shown} {name}{'' if shown == '1' else 's'}"


def progress_bar(total: int, title: str, unit: str, done: int = 0) -> Any:
    """A tqdm bar with an estimate of the time left, or `Lines` without a terminal.

    The terminal is that of standard error. Of the processes that torchrun starts, only the first
    shows one. Without a title there is none.
    """
    shown = title != "" and os.environ.get("RANK", "0") == "0"
    if shown and not sys.stderr.isatty():
        return Lines(total, title, unit, done)
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        leave=False,
        disable=not shown,
    )


class Lines:
    """What a program without a terminal shows in place of a bar: a line every 30 s.

    It has those methods of a tqdm bar that this package calls.
    """

    def __init__(self, total: int, title: str, unit: str, done: int = 0) -> None:
        self.total, self.title, self.unit, self.n = total, title, unit, done
        self._first, self._began = done, time.monotonic()
        self._said, self._postfix = self._began, ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        """Says nothing: the command prints its result."""

    def set_postfix(self, values: Mapping[str, object], refresh: bool = True) -> None:
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def write(self, text: str, file: Any = None) -> None:
        """Print a line, as a bar does without harm to itself."""
        print(text, file=file or sys.stdout, flush=True)

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if now - self._said < EVERY or self.n >= self.total:
            return
        self._said = now
        left = (now - self._began) * (self.total - self.n) / max(1, self.n - self._first)
        print(
            f"{self.title}: {self.unit} {self.n:,} of {self.total:,}{self._postfix}, "
            f"about {duration(left)} left",
            file=sys.stderr,
            flush=True,
        )
