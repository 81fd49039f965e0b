"""Adapters of other people's code to the conformance kit, for `grade`.

The numbers come from their modules, unedited and in float32. Replaced are their random source,
which answers with the kit's noise, and what comes before the part that a level grades: the SVD
where the kit gives it, and the model's logits where the kit gives them.
"""

from __future__ import annotations

import importlib
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch

from ..grade import Program
from ..test_bayesadapt import NEEDS, Clock, modules_of
from .installed import BayesianLora, Peft, Transformers
from .official import First, Gym
from .wrapper import BayesianPeft


@contextmanager
def installed(program: type[Program], package: str):
    """A program that is installed, or why it is not there."""
    try:
        importlib.import_module(package)
    except ImportError:
        yield f"{package} is not installed"
        return
    yield program()


def nothing(*_) -> int:
    """In place of what needs a GPU."""
    return 0


@contextmanager
def checkout(variable: str, commit: str, needs, make):
    """A program in a folder that a variable of the environment names, or why it is not there."""
    folder = Path(os.environ.get(variable, "/nowhere")) / commit
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing or not folder.is_dir():
        yield f"{variable} names no folder with it" if not missing else f"needs {missing}"
        return
    with ExitStack() as stack:
        stack.enter_context(modules_of(folder))
        stack.enter_context(mock.patch.dict(os.environ, WANDB_ENTITY="nobody"))
        stack.enter_context(
            mock.patch.multiple(torch.cuda, Event=Clock, synchronize=nothing,
                                reset_peak_memory_stats=nothing, max_memory_allocated=nothing)
        )  # fmt: skip
        yield make(folder)


def bayesian_peft(_):
    module = importlib.import_module("modelwrappers.blob")
    return BayesianPeft(module, module.BLoB)


def first(_):
    return First(importlib.import_module("modelwrappers.scalabl"))


BLOB_NEEDS = ("peft", "bitsandbytes", "torchmetrics", "accelerate", "ipdb")
PROGRAMS = {
    "ef51e8a": lambda: checkout("SCALABL_BAYESADAPT", "ef51e8a", NEEDS, first),
    "3843000": lambda: checkout("SCALABL_BAYESADAPT", "3843000", NEEDS, Gym),
    "bayesian-peft": lambda: checkout("SCALABL_BAYESIAN_PEFT", "", BLOB_NEEDS, bayesian_peft),
    "bayesian-lora": lambda: installed(BayesianLora, "bayesian_lora"),
    "PEFT": lambda: installed(Peft, "peft"),
    "transformers": lambda: installed(Transformers, "transformers"),
}
