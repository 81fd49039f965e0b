"""The objective: negative log-likelihood plus beta times a KL term over N, one scalar, logged.

    loss = NLL (mean per example) + beta * KL / N

With beta = 1 and the forward KL, -N * loss is an unbiased estimate of the evidence lower bound
E_q[log p(D | s~)] - KL(q || p), with one draw of s~ per sampling group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.llama import Llama
from ..support.errors import InputError
from .adapter import Adapter, adapters
from .divergence import KL, KLS, kl_forward, kl_official
from .noise import Noise

if TYPE_CHECKING:
    from ..data import Batch

__all__ = [
    "KL",
    "KLS",
    "Elbo",
    "class_logits",
    "elbo",
    "kl_divergence",
    "kl_forward",
    "kl_official",
]


class Elbo(NamedTuple):
    """loss = nll + beta * kl / num_examples, all scalars; nll in nats per example, kl in nats."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


def kl_divergence(model: torch.nn.Module, kl: KL = "forward") -> Tensor:
    """Sum of the KL over the model's adapters, a float64 scalar in nats; 0 for method "mle".

    For method "map" it is minus the log prior density, up to a constant.

    Raises InputError for an unknown `kl`.
    """
    if kl not in KLS:
        raise InputError(f"kl must be one of {', '.join(KLS)}, not {kl!r}")
    kinds: dict[type[Adapter], list[Adapter]] = {}
    for adapter in adapters(model).values():
        kinds.setdefault(type(adapter), []).append(adapter)
    parts = [kind.complexity(layers, kl) for kind, layers in kinds.items()]
    return sum(parts, torch.zeros((), dtype=torch.float64))


def class_logits(
    model: Llama, batch: Batch, noise: Noise | None, draws: int = 1, padded: bool = False
) -> Tensor:
    """Logits of the answer classes at each row's last token, (draws B, C) float32 or wider.

    The draw of a row is keyed by its example's index in the data set, `batch.ids`. draws, padded:
    as in `Llama.forward`.
    """
    logits = model(
        batch.tokens, noise=noise, groups=batch.ids, lengths=batch.lengths, draws=draws,
        last_only=True, padded=padded,
    )  # fmt: skip
    if model.config.head_tokens is None:
        logits = logits[:, batch.classes]
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def elbo(
    model: Llama,
    batch: Batch,
    noise: Noise | None,
    beta: float,
    num_examples: int,
    kl: KL = "forward",
) -> Elbo:
    """One-sample estimate of the objective on a batch, differentiable.

    beta: weight of the KL (1 is the ELBO). num_examples: N, size of the training set.
    """
    nll = F.cross_entropy(class_logits(model, batch, noise), batch.labels)
    divergence = kl_divergence(model, kl)
    return Elbo(nll + beta * divergence.to(nll) / num_examples, nll, divergence)
