"""Predictions from draws of a model's adapters, or from a posterior made of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import random_adapters
from ..core.noise import Noise
from ..core.objective import Batch, class_logits
from ..core.predictive import Prediction, predictive
from ..fast.designs import Design, DesignedNoise
from ..fast.rows import shared_blocks
from ..model.llama import Llama
from ..support.errors import InputError

if TYPE_CHECKING:
    from ..methods import Posterior

# Tokens that go through the model at once, at most: many enough that reading the weights no longer
# matters, few enough that their hidden states stay small.
TOKENS_AT_ONCE = 2048

# Draws at most. All of a batch are kept until they are averaged, in float64: of 32 rows with 4
# classes so many take 100 MB. Their average is good to 0.002 then.
MOST_SAMPLES = 100_000

DESIGNS = tuple(design.value for design in Design)


class Draws(NamedTuple):
    """The draws of an average: `samples` of them, numbered from `first`, under a seed and a design.

    design: "independent"; "antithetic": pairs eps, -eps; "latin": one Latin hypercube of all
    `samples`. See `designs.DesignedNoise`.
    """

    samples: int
    seed: int = 0
    design: str = "independent"
    first: int = 0

    def passes(
        self, model: nn.Module, tokens: int = TOKENS_AT_ONCE
    ) -> Iterator[tuple[Noise | None, int]]:
        """The first noise of each pass through the model, and its number of draws.

        The mean model, once, for no samples or with nothing to sample. tokens: of one draw; by
        default so many that each draw has a pass of its own.

        Raises InputError as `check_samples` does, or for an unknown design.
        """
        check_samples(self.samples)
        if self.design not in DESIGNS:
            raise InputError(f"design must be one of {', '.join(DESIGNS)}, not {self.design!r}")
        random = random_adapters(model)
        if not random or self.samples == 0:
            yield None, 1
            return
        joint = all(adapter.joint for adapter in random)
        at_once = max(1, TOKENS_AT_ONCE // max(1, tokens)) if joint else 1
        for done in range(0, self.samples, at_once):
            yield self.noise(self.first + done), min(at_once, self.samples - done)

    def noise(self, draw: int) -> Noise:
        """The noise of one of these draws."""
        design = Design(self.design)
        size = 2 if design == Design.ANTITHETIC else self.samples
        if design == Design.INDEPENDENT or size < 2:
            return Noise(self.seed, draw)
        return DesignedNoise(self.seed, draw, design, size)

    def passes_over(self, model: Llama, batch: Batch) -> Iterator[tuple[Noise | None, int]]:
        """`passes` with as many draws at once as suits this batch."""
        only_head = shared_blocks(model) == len(model.layers)  # which sees last tokens alone
        tokens = len(batch.labels) if only_head else int(batch.lengths.sum())
        return self.passes(model, tokens)


def pass_log_probs(model: Llama, batch: Batch, noise: Noise | None, draws: int) -> Tensor:
    """Log-probabilities (draws, B, C) float64 of the answer classes, by one pass."""
    logits = class_logits(model, batch, noise, draws).unflatten(0, (draws, -1))
    return torch.log_softmax(logits.double(), dim=-1)


def log_probs(model: Llama, batch: Batch, draws: Draws) -> Tensor:
    """Log-probabilities (S, B, C) float64 of the answer classes; S is 1 for the mean model."""
    passes = draws.passes_over(model, batch)
    return torch.cat([pass_log_probs(model, batch, noise, n) for noise, n in passes])


def check_samples(samples: int, name: str = "samples") -> None:
    """Raise InputError for a number of draws below 0 or above MOST_SAMPLES."""
    if samples < 0:
        raise InputError(f"{name} must not be negative, and is {samples}")
    if samples > MOST_SAMPLES:
        raise InputError(f"{name} must be at most {MOST_SAMPLES:,}, and is {samples:,}")


@torch.no_grad()
def predict(
    model: Llama,
    batch: Batch,
    samples: int = 10,
    seed: int = 0,
    posterior: Posterior | None = None,
    design: str = "independent",
) -> Prediction:
    """Predictive distribution over the answer classes, from `samples` draws.

    Draw i is Noise(seed, i), keyed per example by `batch.ids`: the result for an example does not
    depend on the other examples of the batch. samples = 0 is the mean model. posterior: a
    distribution other than the adapters' own; see `methods`. design: "antithetic" draws come in
    pairs eps, -eps; "latin" ones are a Latin hypercube of all `samples`: of the same distribution,
    with less error of their average, see `Draws`.

    Raises InputError as `check_samples` does, for an unknown `design`, or one with a posterior.

    Example: draws disagree as soon as B is not 0.

    >>> import torch
    >>> from scalabl_ref import AdapterConfig, Llama, LlamaConfig, adapters, add_adapters, predict
    >>> from scalabl_ref.core.objective import Batch
    >>> model = Llama(LlamaConfig(32, 8, 16, 1, 2, 1, 4)).init_random_(seed=0)
    >>> model = add_adapters(model.trim_head([5, 7]), AdapterConfig(rank=2, init_sigma=1.0))
    >>> batch = Batch(
    ...     tokens=torch.tensor([[3, 1, 4], [1, 5, 0]]), lengths=torch.tensor([3, 2]),
    ...     labels=torch.tensor([0, 1]), ids=torch.tensor([0, 1]), classes=torch.tensor([5, 7]),
    ... )
    >>> predict(model, batch, samples=10).mutual_information.max().item() < 1e-12
    True
    >>> with torch.no_grad():
    ...     adapters(model)["lm_head"].B[0] = 1.0
    >>> prediction = predict(model, batch, samples=10)
    >>> prediction.probs.shape, bool((prediction.mutual_information > 0.01).all())
    (torch.Size([2, 2]), True)
    """
    check_samples(samples)
    if posterior is not None:
        if design != "independent":
            raise InputError(f"draws of {type(posterior).__name__} are independent, not {design}")
        return predictive(posterior.log_probs(model, batch, samples, seed))
    return predictive(log_probs(model, batch, Draws(samples, seed, design)))


def predict_all(
    model: Llama,
    batches: Iterable[Batch],
    samples: int = 10,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
    posterior: Posterior | None = None,
    design: str = "independent",
) -> Prediction:
    """`predict` over a whole data set, put back in the order of the examples' ids.

    Needs each id 0 .. N-1 exactly once. `progress` is told the rows done after each batch.
    """

    parts, ids = [], []
    for batch in batches:
        part = predict(model, batch.to(model.device), samples, seed, posterior, design)
        parts.append([tensor.cpu() for tensor in part])
        ids.append(batch.ids.cpu())
        progress(len(batch.labels))
    order = torch.argsort(torch.cat(ids))
    return Prediction(*(torch.cat(column)[order] for column in zip(*parts, strict=True)))
