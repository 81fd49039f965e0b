"""The methods that a study compares: how each is trained, and what is made of its runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...data import Encoded, evaluation_batches
from ...methods import Laplace, Posterior, Swag, fit_tfb
from ...model.llama import Llama
from ...support.errors import InputError


@dataclass(frozen=True)
class Method:
    """How a method is trained, and how a trained run answers.

    settings: its fields of AdapterConfig and TrainConfig. knob: the name of the setting that is
    tuned beside lr, and its values. members: runs that it needs for one model. after: makes the
    posterior of a finished run, from (model, folder, sets, samples, seed); with None, or if it
    returns None, draws come from the adapters.
    """

    settings: dict[str, Any]
    knob: tuple[str, tuple[float, ...]] = ("share_of_steps", (1.0, 0.25))
    members: int = 1
    after: After | None = None


Sets = dict[str, Encoded]
After = Callable[[Llama, Path, Sets, int, int], Posterior | None]


def _laplace(layers: Literal["all", "last"]) -> After:
    def after(model: Llama, run: Path, sets: Sets, samples: int, seed: int) -> Posterior:
        batches = evaluation_batches(sets["train"], 8)
        return Laplace.fit(model, batches, layers=layers).optimise_prior()

    return after


def _tfb(model: Llama, run: Path, sets: Sets, samples: int, seed: int) -> None:
    """Give the model's adapters a sigma, with the published tolerance of 0.003.

    Where rounding alone exceeds the tolerance, as it can in bfloat16, the mean model answers: the
    study should not end for that.
    """
    try:
        fit_tfb(model, evaluation_batches(sets["validation"], 32), 0.003, samples, seed)
    except InputError as error:
        warnings.warn(f"tfb: {error}: {run.name} answers with its mean", stacklevel=2)


def _swag(model: Llama, run: Path, sets: Sets, samples: int, seed: int) -> Posterior:
    return Swag.load(run)


PLAIN = {"method": "mle", "swag": 0.25}
METHODS: dict[str, Method] = {
    "mle": Method(PLAIN),
    "map": Method({"method": "map"}, ("prior_std", (0.1, 0.3))),
    "dropout": Method({"method": "dropout", "sampling": "token"}, ("dropout", (0.1, 0.3))),
    "ensemble": Method(PLAIN, members=3),
    "laplace": Method({"method": "map"}, ("prior_std", (0.1, 0.3)), after=_laplace("all")),
    "laplace last": Method({"method": "map"}, ("prior_std", (0.1, 0.3)), after=_laplace("last")),
    "blob": Method({"method": "blob"}, ("beta", (0.1, 1.0))),
    "tfb": Method(PLAIN, after=_tfb),
    "swag": Method(PLAIN, after=_swag),
    "scalabl": Method({"method": "scalabl"}, ("beta", (1.0, 5.0))),
    "scalabl official": Method({"method": "scalabl", "kl": "official"}, ("beta", (0.1, 0.5))),
    "scalabl as published": Method(  # the official code's two optimisers, and one draw for a batch
        {"method": "scalabl", "kl": "official", "objective": "official", "sampling": "batch"},
        ("kl_lr", (0.2, 0.02)),
    ),
    "scalabl full": Method({"method": "scalabl", "covariance": "full"}, ("beta", (1.0, 5.0))),
    "scalabl layer prior": Method({"method": "scalabl", "prior": "layer"}, ("beta", (1.0, 5.0))),
    "scalabl scale prior": Method(
        {"method": "scalabl", "prior": "component"}, ("beta", (1.0, 5.0))
    ),
}
OURS = tuple(name for name, method in METHODS.items() if method.settings["method"] == "scalabl")
