"""The methods that a study compares: how each is trained and tuned, and how it answers."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...core.adapter import adapter_state
from ...core.noise import philox_words
from ...data import Batch, Encoded, evaluation_batches
from ...methods import Ensemble, Laplace, Posterior, Subspace, Swag, fit_tfb
from ...methods.laplace import CurvatureKind, Layers
from ...methods.point import to_points
from ...methods.subspace import Groups, Predicts
from ...model.llama import Llama
from ...support.errors import InputError
from ...support.tensors import load_tensors


@dataclass(frozen=True)
class Range:
    """The values that a setting may take in a trial; its logarithm is uniform if `log`."""

    low: float
    high: float
    log: bool = True

    def at(self, u: float) -> float:
        """The value at a share u of the way from low to high, to three digits."""
        if self.log:
            # As a product of powers, because high / low overflows beyond 308 decades.
            return float(f"{self.low ** (1 - u) * self.high**u:.3g}")
        return float(f"{self.low + (self.high - self.low) * u:.3g}")


@dataclass(frozen=True)
class Method:
    """How a method is trained, and how a trained run answers.

    settings: its fields of AdapterConfig and TrainConfig. tuned: the settings that trials draw,
    with their ranges; none means that the method has one trial, at its settings. like: a method
    whose chosen trial it takes, instead of trials of its own. members: number of runs in one model.
    after: makes the posterior of finished runs; if it is None or returns None, the adapters draw.
    draws: draws for an answer, in place of the study's `samples`, for methods whose draws are of
    logits and need no forward pass. ours: whether it is this project's, not a rival.

    A trial may also have `share_of_steps`, which stops early, with the schedule of a shorter run,
    and `variational_ratio`, which is variational_lr / lr. Others, such as `tolerance`, are for
    `after`.
    """

    settings: dict[str, Any]
    tuned: Mapping[str, Range] = field(default_factory=dict)
    like: str | None = None
    members: int = 1
    after: After | None = None
    draws: int | None = None
    ours: bool = False


@dataclass(frozen=True)
class Made:
    """What a posterior is made from. model: of the first run. load: loads the model of any run."""

    model: Llama
    load: Callable[[Path], Llama]
    runs: tuple[Path, ...]
    sets: dict[str, Encoded]
    trial: Mapping[str, float]
    samples: int
    seed: int

    def training_batches(self) -> Iterator[Batch]:
        return evaluation_batches(self.sets["train"], 8)


After = Callable[[Made], Posterior | None]


def _laplace(curvature: CurvatureKind, layers: Layers = "all") -> After:
    """lambda by the evidence, or the trial's."""

    def after(made: Made) -> Posterior:
        batches, precision = made.training_batches(), made.trial.get("precision")
        found = Laplace.fit(made.model, batches, layers, None, precision, curvature)
        return found if precision else found.optimise_prior()

    return after


def _subspace(groups: Groups = "all", predicts: Predicts = "linear") -> After:
    """lambda by the evidence, or the trial's."""

    def after(made: Made) -> Posterior:
        to_points(made.model)
        precision = made.trial.get("precision")
        batches = made.training_batches()
        return Subspace.fit(made.model, batches, precision, groups, predicts=predicts)

    return after


def _ensemble(made: Made) -> Posterior:
    return Ensemble([load_tensors(run / "adapter.safetensors")[0] for run in made.runs])


def _ensemble_of_subspace(made: Made) -> Posterior:
    members, posteriors = [], []
    for run in made.runs:
        model = made.load(run)
        to_points(model)
        members.append(adapter_state(model))
        posteriors.append(Subspace.fit(model, made.training_batches()))
    to_points(made.model)
    return Ensemble(members, posteriors)


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


DRAWS = 1000  # the error of their average is far below the spread between replicates
LR = {"lr": Range(5e-4, 2e-2)}
DROPOUT = {**LR, "dropout": Range(0.1, 0.6, log=False)}
VARIATIONAL = {**LR, "variational_ratio": Range(0.3, 30.0), "beta": Range(0.03, 100.0)}
MASKS = {"method": "dropout", "sampling": "token"}  # Monte Carlo dropout as it is usually built
# BLoB's KL weight, prior and initial width beside the rate of G.
BLOB = {**VARIATIONAL, "prior_std": Range(0.05, 1.0), "init_sigma": Range(0.01, 0.2)}
SCALABL = {"method": "scalabl"}
OFFICIAL = {"method": "scalabl", "kl": "official"}
MLE = {"method": "mle"}
METHODS: dict[str, Method] = {
    "mle": Method(MLE, LR),
    "mle untuned": Method(MLE),
    "mle stopped early": Method(MLE, {**LR, "share_of_steps": Range(0.05, 1.0)}),
    "map": Method({"method": "map"}, {**LR, "prior_std": Range(0.03, 1.0)}),
    "point": Method({"method": "point"}, VARIATIONAL),
    "dropout": Method(MASKS, DROPOUT),
    "dropout untuned": Method(MASKS),
    "ensemble": Method(MLE, LR, members=3, after=_ensemble),
    "ensemble untuned": Method(MLE, members=3, after=_ensemble),
    "ensemble of dropout": Method(MASKS, like="dropout", members=3, after=_ensemble),
    "laplace": Method(MLE, LR, after=_laplace("expand"), draws=DRAWS),
    "laplace tuned": Method(
        MLE,
        {**LR, "precision": Range(1.0, 1000.0)},
        after=_laplace("expand"),
        draws=DRAWS,
    ),
    "laplace exact": Method(MLE, LR, after=_laplace("exact"), draws=DRAWS),
    "laplace last token": Method(MLE, LR, after=_laplace("last"), draws=DRAWS),
    "laplace last layer": Method(MLE, LR, after=_laplace("expand", "last"), draws=DRAWS),
    "blob": Method({"method": "blob"}, BLOB),
    "blob as published": Method(  # its authors' two optimisers, prior and initial width
        {"method": "blob", "objective": "official"}, {**LR, "kl_lr": Range(1e-3, 1.0)}
    ),
    "tfb": Method(MLE, {**LR, "tolerance": Range(0.003, 1.5)}, after=_tfb),
    "swag": Method({**MLE, "swag": 0.25}, {**LR, "swag_lr": Range(1e-3, 1e-1)}, after=_swag),
    "scalabl": Method(SCALABL, VARIATIONAL, ours=True),
    "scalabl untuned": Method(SCALABL, ours=True),
    "scalabl official": Method(OFFICIAL, VARIATIONAL, ours=True),
    "scalabl as published": Method(  # the official code's two optimisers, and one draw for a batch
        {**OFFICIAL, "objective": "official", "sampling": "batch"},
        {**LR, "kl_lr": Range(1e-3, 1.0)},
        ours=True,
    ),
    "scalabl full": Method({**SCALABL, "covariance": "full"}, VARIATIONAL, ours=True),
    "scalabl layer prior": Method({**SCALABL, "prior": "layer"}, VARIATIONAL, ours=True),
    "scalabl scale prior": Method({**SCALABL, "prior": "component"}, VARIATIONAL, ours=True),
    "ensemble of scalabl": Method(SCALABL, like="scalabl", members=3, after=_ensemble, ours=True),
    "subspace": Method(MLE, LR, after=_subspace(), draws=DRAWS, ours=True),
    "subspace untuned": Method(MLE, after=_subspace(), draws=DRAWS, ours=True),
    "subspace by target": Method(MLE, LR, after=_subspace("target"), draws=DRAWS, ours=True),
    "subspace tuned": Method(
        MLE, {**LR, "precision": Range(0.03, 30.0)}, after=_subspace(), draws=DRAWS, ours=True
    ),
    "subspace sampled": Method(MLE, LR, after=_subspace(predicts="sampled"), ours=True),
    "subspace of dropout": Method(MASKS, DROPOUT, after=_subspace(), draws=DRAWS, ours=True),
    "subspace of dropout untuned": Method(MASKS, after=_subspace(), draws=DRAWS, ours=True),
    "ensemble of subspace": Method(
        MLE, like="subspace", members=3, after=_ensemble_of_subspace, draws=DRAWS, ours=True
    ),
    "ensemble of subspace of dropout": Method(
        MASKS,
        like="subspace of dropout",
        members=3,
        after=_ensemble_of_subspace,
        draws=DRAWS,
        ours=True,
    ),
}


def random_trials(tuned: Mapping[str, Range], count: int) -> list[dict[str, float]]:
    """`count` trials by a Latin hypercube: each setting once in each of `count` parts of its range.

    Its values are a pure function of (name, range, count). So methods that tune a setting of the
    same name over the same range try the same values, and methods with the same training share
    runs.
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
