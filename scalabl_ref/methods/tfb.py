"""TFB: a posterior over A for adapters that are trained already, with one width to be found.

Shi, Wang, Han, Zhang, Wang, "Training-Free Bayesianization for Low-Rank Adapters of Large Language
Models", 2024, arXiv 2412.05723. "The official code" is Wang-ML-Lab/bayesian-peft (bc6a4a7).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, adapters
from ..core.noise import FIRST_TRAINING_DRAW, Noise
from ..core.predictive import predictive
from ..support.errors import InputError
from .blob import FlipoutAdapter
from .ensemble import own_log_probs

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama


class TfbAdapter(FlipoutAdapter):
    """Made by `fit_tfb`: the entries of row k of A have the standard deviation sigma_k; (r,)."""

    trained = False

    def _add_parameters(self) -> None:
        self.sigma = nn.Parameter(torch.zeros(self.config.rank, dtype=torch.float32))

    def omega(self) -> Tensor:
        return self.sigma[:, None]

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """Raises InputError: there is no objective."""
        raise InputError(
            "method tfb is not trained: make it from a run of mle or map (scalabl posterior tfb)"
        )

    def widths(self) -> Tensor:
        return self.sigma


@torch.no_grad()
def fit_tfb(
    model: Llama,
    batches: Iterable[Batch],
    tolerance: float = 0.003,
    samples: int = 10,
    seed: int = 0,
    bounds: tuple[float, float] = (1e-4, 1.0),
    resolution: float = 0.01,
) -> float:
    """Make the model's adapters Bayesian in place, as wide as the answers allow; returns sigma_q.

    With the thin SVD B = U diag(d) V^T, an adapter becomes B' = U diag(d) and A' = V^T A, the same
    function. The entries of row k of A' get the standard deviation sigma_q / d_k; where d_k = 0,
    they get none, because B' ignores the row. sigma_q is the largest within `bounds` for which

        |NLL(sigma_q) - NLL(0)| <= tolerance NLL(0)

    where the NLL is that of the mean model's own answers to `batches` (labels are not used), under
    the mixture of `samples` draws. Bisection of log sigma_q ends with an interval whose ends are a
    factor of at most 1 + resolution apart. The lower end satisfies the tolerance and is returned;
    the upper end does not. If the upper end of `bounds` satisfies it, that is returned.

    All sigma_q share the same draws. They are draws of training, so prediction has others.

    Raises InputError if there is no adapter or no example, if an adapter is not a point estimate
    (method "mle" or "map") or if the lower end of `bounds` does not satisfy the tolerance. After
    any error the model is as it was.
    """
    points, device = _points(model), model.device
    if samples < 1:
        raise InputError(f"samples must be at least 1, not {samples}")
    batches = [batch.to(device) for batch in batches]
    if not any(len(batch.labels) for batch in batches):
        raise InputError("no examples to find the width by")
    draws = [Noise(seed, FIRST_TRAINING_DRAW + i) for i in range(samples)]
    rotated = {name: _rotate(point) for name, point in points.items()}

    def widen(sigma: float) -> None:
        for adapter, inverse in rotated.values():
            adapter.sigma.copy_(sigma * inverse)

    def nll(probs: Tensor) -> float:
        return -probs.gather(1, answers).log().mean().item()

    def fits(sigma: float) -> bool:
        widen(sigma)
        return abs(nll(_probs(model, batches, draws)) - nll(mean)) <= tolerance * nll(mean)

    try:
        _attach(model, {name: adapter for name, (adapter, _) in rotated.items()})
        # Of the rotated model: the draws share its rounding, which in bfloat16 is near `tolerance`.
        mean = _probs(model, batches, [None])
        answers = mean.argmax(-1, keepdim=True)
        found = largest(fits, *bounds, resolution)
        widen(found)
    except BaseException:
        _attach(model, points)
        raise
    return found


def _points(model: Llama) -> dict[str, Adapter]:
    """The model's adapters. Raises InputError unless all are point estimates."""
    points = adapters(model)
    if not points:
        raise InputError("the model has no adapters to widen")
    for name, point in points.items():
        if point.config.method not in ("mle", "map"):
            raise InputError(f"{name}: tfb starts from mle or map, not {point.config.method}")
    return points


def largest(fits: Callable[[float], bool], low: float, high: float, resolution: float) -> float:
    """`high` if it fits; else x that fits, while some x' in (x, x (1 + resolution)] does not.

    Raises InputError if `low` does not fit, or if 0 < low < high and 1e-9 < resolution do not hold.
    """
    if not (0 < low < high < math.inf and resolution > 1e-9):
        raise InputError(f"cannot search [{low}, {high}] to a resolution of {resolution}")
    if fits(high):
        return high
    if not fits(low):
        raise InputError(f"no sigma in [{low}, {high}] satisfies the tolerance")
    while high > low * (1 + resolution):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@torch.no_grad()
def _rotate(point: Adapter) -> tuple[TfbAdapter, Tensor]:
    """The same function with orthogonal columns in B, and 1 / d of each (r,), 0 where d = 0.

    d counts as 0 where it may be rounding to float32, as in torch.linalg.matrix_rank. If B has
    fewer rows than the rank, it has fewer d: zeros are added.
    """
    rank, d_in = point.A.shape
    config = dataclasses.replace(point.config, method="tfb")
    adapter = TfbAdapter(d_in, len(point.B), config, point.layer, 0, point.A.device)
    U, d, Vh = torch.linalg.svd(point.B.double(), full_matrices=False)
    adapter.A.zero_()[: len(d)] = Vh @ point.A.double()
    adapter.B.zero_()[:, : len(d)] = U * d
    least = torch.finfo(torch.float32).eps * max(point.B.shape) * d.max()
    inverse = torch.zeros(rank, dtype=d.dtype, device=d.device)
    inverse[: len(d)] = torch.where(d > least, 1 / d, 0.0)
    return adapter, inverse


def _attach(model: Llama, chosen: dict[str, Adapter] | dict[str, TfbAdapter]) -> None:
    for name, adapter in chosen.items():
        model.get_submodule(name).adapter = adapter


def _probs(model: Llama, batches: list[Batch], draws: Sequence[Noise | None]) -> Tensor:
    """Probabilities of the answers, averaged over draws: (examples, C) float64."""
    return torch.cat([predictive(own_log_probs(model, b, draws)).probs for b in batches])
