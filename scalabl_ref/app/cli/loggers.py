"""Loggers of other packages that get a training's numbers: `train --log`."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ...support.errors import InputError, to_install

Send = Callable[[dict[str, float], int], Any]  # numbers by name, and the steps done
PROJECT = "scalabl"


def _needed(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"--log {extra} needs a package: {to_install(extra)}") from None


@contextmanager
def _tensorboard(run: Path, settings: Mapping[str, Any], done: int) -> Iterator[Send]:
    """Event files in RUN/tensorboard; those of steps that are done again are hidden."""
    module = _needed("torch.utils.tensorboard", "tensorboard")
    again = done + 1 if done else None
    with module.SummaryWriter(str(run / "tensorboard"), purge_step=again) as writer:
        writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))
        yield lambda values, step: [writer.add_scalar(k, v, step) for k, v in values.items()]


@contextmanager
def _wandb(run: Path, settings: Mapping[str, Any], done: int) -> Iterator[Send]:
    """A run of the project "scalabl"; WANDB_PROJECT and WANDB_MODE=offline are wandb's own."""
    module = _needed("wandb", "wandb")
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    with module.init(project=project, name=run.name, dir=str(run), config=dict(settings)) as one:
        yield lambda values, step: one.log(values, step=step)


@contextmanager
def _mlflow(run: Path, settings: Mapping[str, Any], done: int) -> Iterator[Send]:
    """A run of the experiment and the server that MLflow's own variables name."""
    module = _needed("mlflow", "mlflow")
    with module.start_run(run_name=run.name):
        module.log_params(dict(settings))
        yield lambda values, step: module.log_metrics(values, step=step)


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def need(names: Sequence[str]) -> None:
    """Raise InputError if a logger's package is missing."""
    for name in names:
        _needed("torch.utils.tensorboard" if name == "tensorboard" else name, name)


@contextmanager
def logging(
    names: Sequence[str], run: Path, settings: Mapping[str, Any], done: int
) -> Iterator[Callable[[dict[str, float]], None]]:
    """A hook for `fit` that sends each record to these loggers; with no names, to nobody.

    settings: shown with the numbers. done: steps before this start. Numbers that are not finite are
    left out. Raises InputError as `need` does, or if one cannot start.
    """
    with ExitStack() as stack:
        sends = []
        for name in names:
            try:
                sends.append(stack.enter_context(LOGGERS[name](run, settings, done)))
            except InputError:
                raise
            except Exception as error:  # each package raises its own kinds
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise InputError(f"--log {name} cannot start: {reason[:160]}") from error

        def on_step(record: dict[str, float]) -> None:
            step = int(record["step"]) + 1
            values = {k: v for k, v in record.items() if k != "step" and math.isfinite(v)}
            for send in sends:
                send(values, step)

        yield on_step
