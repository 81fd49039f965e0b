"""The predictive distribution: probabilities averaged over draws, and how uncertain they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import random_adapters
from ..core.noise import ANTITHETIC, INDEPENDENT, Noise
from ..core.objective import class_logits
from ..model.llama import KVCache, Llama
from ..support.errors import InputError

if TYPE_CHECKING:
    from ..data import Batch
    from ..methods import Posterior


class Prediction(NamedTuple):
    """probs (B, C); entropy, expected_entropy, mutual_information (B,), in nats; float64.

    mutual_information = entropy - expected_entropy: what the draws disagree about (epistemic);
    expected_entropy is what every draw is unsure of (aleatoric).
    """

    probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor


def predictive(log_probs: Tensor, weights: Tensor | None = None) -> Prediction:
    """From log-probabilities of S draws, (S, B, C), to the distribution of their mixture.

    Probabilities are averaged, not logits or logs: logsumexp over draws minus log S, in float64.
    weights: (S,) that add up to 1, of draws that do not count alike.
    """
    log_probs = log_probs.double()
    if weights is None:
        mixture = torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))  # (B, C)
        expected = _entropy(log_probs).mean(0)
    else:
        mixture = torch.logsumexp(log_probs + weights.log()[:, None, None], dim=0)
        expected = torch.einsum("s,sb->b", weights, _entropy(log_probs))
    entropy = _entropy(mixture)
    # Jensen makes the difference non-negative; rounding alone can take it below.
    information = (entropy - expected).clamp(min=0)
    return Prediction(mixture.exp(), entropy, expected, information)


def _entropy(log_probs: Tensor) -> Tensor:
    """-sum p log p over the last dimension, with 0 log 0 = 0; never below 0, nor -0."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 times -inf would be NaN
    return 0.0 - (log_probs.exp() * finite).sum(-1).clamp(max=0)


Design = Literal["independent", "antithetic", "latin"]
DESIGNS: tuple[Design, ...] = ("independent", "antithetic", "latin")

# Tokens that go through the model at once, at most: many enough that reading the weights no longer
# matters, few enough that their hidden states stay small.
TOKENS_AT_ONCE = 2048


def passes(
    model: nn.Module,
    samples: int,
    seed: int,
    tokens: int = TOKENS_AT_ONCE,
    design: Design = "independent",
    first: int = 0,
) -> Iterator[tuple[Noise | None, int]]:
    """The first noise of each pass through the model, and how many draws it has.

    The mean model, once, for no samples or with nothing to sample. tokens: of one draw; by default
    so many that each draw has a pass of its own. design: how the draws depend on each other, as in
    `predict`. first: number of the first draw.

    Raises InputError as `check_samples` does, or for an unknown `design`.
    """
    check_samples(samples)
    if design not in DESIGNS:
        raise InputError(f"design must be one of {', '.join(DESIGNS)}, not {design!r}")
    random = random_adapters(model)
    if not random or samples == 0:
        yield None, 1
        return
    joint = all(adapter.joint for adapter in random)
    at_once = max(1, TOKENS_AT_ONCE // max(1, tokens)) if joint else 1
    number = {"independent": INDEPENDENT, "antithetic": ANTITHETIC, "latin": samples}[design]
    for done in range(0, samples, at_once):
        yield Noise(seed, first + done, number), min(at_once, samples - done)


# Draws at most. All of a batch are kept until they are averaged, in float64: of 32 rows with 4
# classes so many take 100 MB. Their average is good to 0.002 then.
MOST_SAMPLES = 100_000


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
    design: Design = "independent",
) -> Prediction:
    """Predictive distribution over the answer classes, from `samples` draws.

    Draw i is Noise(seed, i), keyed per example by `batch.ids`: the result for an example does not
    depend on what else is in the batch. samples = 0 is the mean model. posterior: what is drawn, if
    it is not what the adapters themselves have; see `methods`. design: "antithetic" draws come in
    pairs eps, -eps; "latin" ones are a Latin hypercube of all `samples`: of the same distribution,
    with less error of their average, see `Noise`.

    Raises InputError as `check_samples` does, for an unknown `design`, or one with a posterior.
    """
    check_samples(samples)
    if posterior is not None:
        if design != "independent":
            raise InputError(f"draws of {type(posterior).__name__} are independent, not {design}")
        return predictive(posterior.log_probs(model, batch, samples, seed))
    return predictive(log_probs(model, batch, samples, seed, design))


def log_probs(
    model: Llama,
    batch: Batch,
    samples: int,
    seed: int,
    design: Design = "independent",
    first: int = 0,
) -> Tensor:
    """Log-probabilities (S, B, C) float64 of the answer classes under draws `first` and on.

    Arguments and errors as of `predict`; S is `samples`, or 1 for the mean model.
    """
    drawn = passes_over(model, batch, samples, seed, design, first)
    return torch.cat([pass_log_probs(model, batch, noise, draws) for noise, draws in drawn])


def passes_over(
    model: Llama,
    batch: Batch,
    samples: int,
    seed: int,
    design: Design = "independent",
    first: int = 0,
) -> Iterator[tuple[Noise | None, int]]:
    """`passes` with as many draws at once as suits this batch; what one pass does is the next."""
    only_head = model.shared_blocks() == len(model.layers)  # of which the rows' ends are all
    tokens = len(batch.labels) if only_head else int(batch.lengths.sum())
    return passes(model, samples, seed, tokens, design, first)


def pass_log_probs(model: Llama, batch: Batch, noise: Noise | None, draws: int) -> Tensor:
    """Log-probabilities (draws, B, C) float64 of the answer classes, by one pass."""
    logits = class_logits(model, batch, noise, draws).unflatten(0, (draws, -1))
    return torch.log_softmax(logits.double(), dim=-1)


def predict_all(
    model: Llama,
    batches: Iterable[Batch],
    samples: int = 10,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
    posterior: Posterior | None = None,
    design: Design = "independent",
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


class Token(NamedTuple):
    """One generated token: its id, the mixture's probability of it, and uncertainty in nats."""

    id: int
    probability: float
    entropy: float
    mutual_information: float


@torch.no_grad()
def generate(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    samples: int = 0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterable[Token]:
    """Greedy decoding from the predictive mixture of `samples` draws (0: the mean model).

    Yields tokens until an id of `stop` (not yielded), the model's last position, or
    `max_new_tokens`. Draw i is Noise(seed, i) with a cache of its own, so that each draw is one
    function from the first token to the last; the next token is the argmax of the averaged
    probabilities.

    Raises InputError if the prompt is empty or longer than the model's positions, if
    `max_new_tokens` is negative, or if the head was cut down to class tokens.
    """
    if model.config.head_tokens is not None:
        raise InputError(
            "the head was cut down to class tokens: it can answer; to write text train with "
            "--head full"
        )
    if not prompt:
        raise InputError("the prompt is empty")
    room = model.config.max_position_embeddings - len(prompt)
    if room < 0:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and the model takes at most {len(prompt) + room}"
        )
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must not be negative, and is {max_new_tokens}")
    device = model.device
    drawn = [
        (noise, draws, KVCache(model.config.num_hidden_layers))
        for noise, draws in passes(model, samples, seed, len(prompt))
    ]
    tokens = torch.tensor([prompt], device=device)
    for _ in range(min(max_new_tokens, room + 1)):
        logits = [
            model(tokens, noise=noise, draws=draws, cache=cache, last_only=True)
            for noise, draws, cache in drawn
        ]  # (draws, V) each
        mixture = predictive(torch.log_softmax(torch.cat(logits).double(), dim=-1)[:, None])
        chosen = int(mixture.probs[0].argmax())
        if chosen in stop:
            return
        yield Token(
            chosen,
            float(mixture.probs[0, chosen]),
            float(mixture.entropy[0]),
            float(mixture.mutual_information[0]),
        )
        tokens = torch.tensor([[chosen]], device=device)
