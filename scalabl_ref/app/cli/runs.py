"""Commands open here devices, base models, runs and their data, on one rank or several."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...data import Columns, Example, format_of, load, split
from ...evaluation import classifier
from ...evaluation.classifier import Classifier, Opened
from ...evaluation.rule import read_rule
from ...model.llama import Llama
from ...support.errors import InputError
from ...support.files import sha256
from ...training import ranks
from .options import columns
from .output import Result, say


def dtype_of(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def device_of(args: argparse.Namespace) -> torch.device:
    """The device of --device. Raises InputError if it cannot hold a tensor."""
    kind = args.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        why = {"gpu": "did you mean cuda?", "mps": "Apple GPUs are not supported: use cpu"}
        why[kind] = why.get(kind, "expected cpu, cuda or cuda:1")
        raise InputError(f"device {args.device!r} cannot be used: {why[kind]}")
    if kind == "cuda" and not torch.backends.cuda.is_built():
        raise InputError("this PyTorch is CPU-only: install a CUDA build or drop --device")
    try:
        device = ranks.own_device(torch.device(args.device))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"device {args.device!r} cannot be used: {reason}") from None
    return device


def sharded(args: argparse.Namespace) -> bool:
    """Whether the base model is to be split over the ranks; False for a command without --shard."""
    return getattr(args, "shard", False) or getattr(args, "offload_weights", False)


def load_base(
    args: argparse.Namespace, folder: Path | str, dtype: str | None, quantize: Any
) -> Llama:
    """A base model on --device, or on the CPU if `shard` is to bring its parts to the device."""
    where = "cpu" if sharded(args) else device_of(args)
    return Llama.from_pretrained(folder, dtype_of(dtype), where, quantize)


def shard(args: argparse.Namespace, model: Llama) -> None:
    """Split the base model over the ranks, if --shard or --offload-weights says so."""
    if sharded(args):
        ranks.shard(model, device_of(args), args.offload_weights)


def on_ranks(command: Callable[[argparse.Namespace], Result]) -> Callable[..., Result]:
    """A command that torchrun may start several times: its processes work together."""

    def run(args: argparse.Namespace) -> Result:
        with ranks.joined(device_of(args), args.timeout):
            args.process = ranks.rank()
            if sharded(args):
                ranks.need_ranks()
            return command(args)

    return run


def open_run(args: argparse.Namespace, run: Path | None = None) -> Opened:
    """The model, tokenizer, facts and posterior of `run`, or --run; its base may be in --model."""
    split_base = partial(shard, args) if sharded(args) else None
    return classifier.open_run(run or args.run, args.model, device_of(args), split_base)


def say_rule(args: argparse.Namespace, clf: Classifier) -> None:
    """Tell of a run's temperature, and of a promise that no threshold kept."""
    if clf.temperature is not None:
        say(args, f"the run's temperature {clf.temperature:.4f} is applied")
    if clf.threshold == math.inf:
        accuracy = read_rule(args.run)["threshold"]["accuracy"]
        say(args, f"no threshold kept the promise of {accuracy:g}: every row goes to a human")


def examples_like(
    args: argparse.Namespace, info: Mapping[str, Any], path: Path | None = None
) -> list[Example]:
    """The questions of `path`, or --data, with a run's column names and labels."""
    path = path or args.data
    format, own = args.format or format_of(path), columns(args)
    if format == info["format"]:
        own = Columns(own.text or info["text_column"], own.label or info["label_column"])
    return load(path, format, args.limit, columns=own, names=info["label_names"])


def own_data(
    run: Path, info: Mapping[str, Any], instead: str
) -> tuple[list[Example], list[Example]]:
    """The questions that a run was trained on, and those held out: its file, split again.

    Raises InputError, which asks for the option `instead`, if the file is unknown or has changed.
    """
    data, seed = info["data"], info["train"]["seed"]
    if None in (data, info["data_sha256"], seed):
        raise InputError(f"{run / 'run.json'}: does not name the training data: give {instead}")
    if not Path(data).is_file():
        raise InputError(f"{data}: is not there, and {run} was trained on it: give {instead}")
    if sha256(Path(data)) != info["data_sha256"]:
        raise InputError(f"{data}: has changed since {run} was trained on it: give {instead}")
    own = Columns(info["text_column"], info["label_column"])
    examples = load(data, info["format"], info["limit"], columns=own)
    return split(examples, info["holdout"], seed)
