"""Progress bars on standard error, so that standard output stays clean for results."""

from __future__ import annotations

import os
import sys
from typing import Any


def progress_bar(total: int, title: str, unit: str, done: int = 0) -> Any:
    """A tqdm bar with an estimate of the time left; hidden if standard error is not a terminal.

    Of the processes that torchrun starts, only the first shows one.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        leave=False,
        disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0",
    )
