"""The methods that a study compares: how each is trained, tuned, and made to answer."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ...core.noise import philox_words
from ...data import Encoded, evaluation_batches
from ...methods import Laplace, Posterior, Swag, fit_tfb
from ...model.llama import Llama
from ...support.errors import InputError


@dataclass(frozen=True)
class Range:
    """The values that a setting may take in a trial; its logarithm is uniform if `log`."""

    low: float
    high: float
    log: bool = True

    def at(self, u: float) -> float:
        """The value at a share u of the way from low to high, to three digits."""
        if self.log:
            return float(f"{self.low * (self.high / self.low) ** u:.3g}")
        return float(f"{self.low + (self.high - self.low) * u:.3g}")


@dataclass(frozen=True)
class Method:
    """How a method is trained, and how a trained run answers.

    settings: its fields of AdapterConfig and TrainConfig. tuned: the settings that trials draw,
    with their ranges; none means that the method has one trial, at its settings. like: a method
    whose chosen trial it takes, instead of trials of its own. members: runs that it needs for one
    model. after: makes the posterior of finished runs; with None, or if it returns None, draws
    come from the adapters.

    Besides those fields, `share_of_steps` stops early, with the schedule of a shorter run, and
    `variational_ratio` is variational_lr / lr. Others, such as `tolerance`, are for `after`.
    """

    settings: dict[str, Any]
    tuned: Mapping[str, Range] = field(default_factory=dict)
    like: str | None = None
    members: int = 1
    after: After | None = None


@dataclass(frozen=True)
class Made:
    """What a posterior is made of. runs: the first is the model's. trial: its settings."""

    model: Llama
    runs: tuple[Path, ...]
    sets: dict[str, Encoded]
    trial: Mapping[str, float]
    samples: int
    seed: int


After = Callable[[Made], Posterior | None]


def _laplace(layers: Literal["all", "last"]) -> After:
    def after(made: Made) -> Posterior:
        batches = evaluation_batches(made.sets["train"], 8)
        return Laplace.fit(made.model, batches, layers=layers).optimise_prior()

    return after


def _tfb(made: Made) -> None:
    """Give the model's adapters a sigma.

    Where rounding alone exceeds the tolerance, as it can in bfloat16, the mean model answers: the
    study should not end for that.
    """
    batches = evaluation_batches(made.sets["validation"], 32)
    try:
        fit_tfb(made.model, batches, made.trial["tolerance"], made.samples, made.seed)
    except InputError as error:
        name = made.runs[0].name
        warnings.warn(f"tfb: {error}: {name} answers with its mean", stacklevel=2)


def _swag(made: Made) -> Posterior:
    return Swag.load(made.runs[0])


LR = {"lr": Range(5e-4, 2e-2)}
DROPOUT = {**LR, "dropout": Range(0.1, 0.6, log=False)}
VARIATIONAL = {**LR, "variational_ratio": Range(0.3, 30.0), "beta": Range(0.03, 100.0)}
MASKS = {"method": "dropout", "sampling": "token"}  # Monte Carlo dropout as it is usually built
SCALABL = {"method": "scalabl"}
OFFICIAL = {"method": "scalabl", "kl": "official"}
METHODS: dict[str, Method] = {
    "mle": Method({"method": "mle"}, LR),
    "mle untuned": Method({"method": "mle"}),
    "mle stopped early": Method({"method": "mle"}, {**LR, "share_of_steps": Range(0.05, 1.0)}),
    "map": Method({"method": "map"}, {**LR, "prior_std": Range(0.03, 1.0)}),
    "point": Method({"method": "point"}, VARIATIONAL),
    "dropout": Method(MASKS, DROPOUT),
    "dropout untuned": Method(MASKS),
    "ensemble": Method({"method": "mle"}, LR, members=3),
    "ensemble untuned": Method({"method": "mle"}, members=3),
    "laplace": Method({"method": "mle"}, LR, after=_laplace("all")),
    "laplace last layer": Method({"method": "mle"}, LR, after=_laplace("last")),
    "blob": Method({"method": "blob"}, VARIATIONAL),
    "tfb": Method({"method": "mle"}, {**LR, "tolerance": Range(0.003, 1.5)}, after=_tfb),
    "swag": Method({"method": "mle", "swag": 0.25}, LR, after=_swag),
    "scalabl": Method(SCALABL, VARIATIONAL),
    "scalabl untuned": Method(SCALABL),
    "scalabl official": Method(OFFICIAL, VARIATIONAL),
    "scalabl as published": Method(  # the official code's two optimisers, and one draw for a batch
        {**OFFICIAL, "objective": "official", "sampling": "batch"},
        {**LR, "kl_lr": Range(1e-3, 1.0)},
    ),
    "scalabl full": Method({**SCALABL, "covariance": "full"}, VARIATIONAL),
    "scalabl layer prior": Method({**SCALABL, "prior": "layer"}, VARIATIONAL),
    "scalabl scale prior": Method({**SCALABL, "prior": "component"}, VARIATIONAL),
}
OURS = tuple(name for name, m in METHODS.items() if m.settings["method"] == "scalabl")


def random_trials(tuned: Mapping[str, Range], count: int) -> list[dict[str, float]]:
    """`count` settings by a Latin hypercube: each setting once in each of `count` equal parts.

    Places are a pure function of (name, count). So the trials of methods that tune a setting of
    the same name over the same range share its values, and methods that train alike share runs.
    """
    if not tuned:
        return [{}]
    trials: list[dict[str, float]] = [{} for _ in range(count)]
    for name, values in tuned.items():
        words = philox_words(zlib.crc32(name.encode()), 0, 2 * count)
        parts = torch.argsort(words[:count], stable=True).tolist()
        within = ((words[count:].double() + 0.5) / 2**32).tolist()
        for trial, part, share in zip(trials, parts, within, strict=True):
            trial[name] = values.at((part + share) / count)
    return trials
