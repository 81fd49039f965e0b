"""The predictive distribution: probabilities averaged over draws, and how uncertain they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .noise import Noise
from .objective import Batch, class_logits


class Prediction(NamedTuple):
    """probs (B, C); entropy, expected_entropy, mutual_information (B,), in nats; float64.

    mutual_information = entropy - expected_entropy is the disagreement of the draws (epistemic);
    expected_entropy is the uncertainty that every draw has by itself (aleatoric).
    """

    probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor


def predictive(log_probs: Tensor, weights: Tensor | None = None) -> Prediction:
    """(8), (9): from log-probabilities of S draws, (S, B, C), to the mixture and its uncertainty.

    Probabilities are averaged, not logits or logs: logsumexp over draws minus log S, in float64.
    weights: (S,) with sum 1, for draws that do not count equally.

    >>> logits = torch.tensor([[[0.0, 2.0]], [[0.0, -2.0]]])
    >>> predictive(torch.log_softmax(logits, dim=-1)).probs
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    log_probs = log_probs.double()
    if weights is None:
        mixture = torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))  # (B, C)
        expected = entropy_of(log_probs).mean(0)  # (B,)
    else:
        mixture = torch.logsumexp(log_probs + weights.log()[:, None, None], dim=0)
        expected = torch.einsum("s,sb->b", weights, entropy_of(log_probs))
    entropy = entropy_of(mixture)
    # By Jensen's inequality the difference is at least 0; only rounding can make it negative.
    information = (entropy - expected).clamp(min=0)
    return Prediction(mixture.exp(), entropy, expected, information)


def entropy_of(log_probs: Tensor) -> Tensor:
    """-sum p log p over the last dimension, with 0 log 0 = 0; never below 0, nor -0."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 times -inf would be NaN
    return 0.0 - (log_probs.exp() * finite).sum(-1).clamp(max=0)


@torch.no_grad()
def plain_predict(model: nn.Module, batch: Batch, samples: int = 10, seed: int = 0) -> Prediction:
    """The predictive distribution over the answer classes, with one pass for each draw.

    Draw i is Noise(seed, i), keyed per example by `batch.ids`; samples = 0 is the mean model. This
    is the definition; evaluation/predict.py gives the same with fewer passes.
    """
    draws: list[Noise | None] = [Noise(seed, i) for i in range(samples)]
    logits = torch.stack([class_logits(model, batch, noise) for noise in draws or [None]])
    return predictive(torch.log_softmax(logits.double(), dim=-1))  # of (S, B, C)
