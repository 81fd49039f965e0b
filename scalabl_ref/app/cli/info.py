"""Show the versions of this package, Python and PyTorch, and whether the native core is used."""

from __future__ import annotations

import argparse
import platform

import torch

from ... import __version__
from ...fast.native import native_status
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Has no options of its own."""


def run(args: argparse.Namespace) -> Result:
    status = native_status()
    result: Result = {
        "scalabl_ref": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "native": status,
        "path": f"native core, {status['isa']}" if status["used"] else "PyTorch",
    }
    for key, value in result.items():
        if key != "native":
            say(args, f"{key:12} {value}")
    for name, item in status.items():
        if item != "":
            say(args, f"{'native ' + name:16} {item}")
    return result
