"""The objective: negative log-likelihood plus beta times a KL term over N, one scalar, logged.

    loss = NLL (mean per example) + beta * KL / N

With beta = 1 and the forward KL, -N * loss is an unbiased estimate of the evidence lower bound
E_q[log p(D | s~)] - KL(q || p), with one draw of s~ per sampling group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import adapters
from .errors import InputError
from .llama import Llama
from .noise import Noise

if TYPE_CHECKING:
    from .data import Batch

KL = Literal["forward", "official"]


class Elbo(NamedTuple):
    """loss = nll + beta * kl / num_examples, all scalars; nll in nats per example, kl in nats."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


def kl_forward(s: Tensor, sigma: Tensor, prior_std: float) -> Tensor:
    """KL(q || p), q = N(s, diag(sigma^2)), p = N(0, prior_std^2 I): the textbook direction.

    s and sigma (r,); returns a float64 scalar in nats,
    sum_k log(prior_std / sigma_k) + (sigma_k^2 + s_k^2) / (2 prior_std^2) - 1/2.
    """
    s, sigma = s.double(), sigma.double()
    log_ratio = torch.log(prior_std / sigma)
    return (log_ratio + (sigma**2 + s**2) / (2 * prior_std**2) - 0.5).sum()


def kl_official(s: Tensor, sigma: Tensor, prior_std: float) -> Tensor:
    """KL(p || q), the direction that the official code computes; shapes as `kl_forward`.

    sum_k log(sigma_k / prior_std) + (prior_std^2 + s_k^2) / (2 sigma_k^2) - 1/2.
    """
    s, sigma = s.double(), sigma.double()
    log_ratio = torch.log(sigma / prior_std)
    return (log_ratio + (prior_std**2 + s**2) / (2 * sigma**2) - 0.5).sum()


KLS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward": kl_forward,
    "official": kl_official,
}


def kl_divergence(model: torch.nn.Module, kl: KL = "forward") -> Tensor:
    """Sum of the KL over the model's adapters, a float64 scalar in nats; 0 for method "mle".

    Raises InputError for an unknown `kl`.
    """
    if kl not in KLS:
        raise InputError(f"kl must be one of {', '.join(KLS)}, not {kl!r}")
    gaussian = [a for a in adapters(model).values() if a.config.method == "scalabl"]
    if not gaussian:
        return torch.zeros((), dtype=torch.float64)
    # One call over all layers: the sum over k does not care where one layer ends.
    log_s = torch.cat([a.log_s for a in gaussian])
    log_sigma = torch.cat([a.log_sigma for a in gaussian])
    return KLS[kl](log_s.double().exp(), log_sigma.double().exp(), gaussian[0].config.prior_std)


def class_logits(model: Llama, batch: Batch, noise: Noise | None) -> Tensor:
    """Logits of the answer classes at each row's last token, (B, C) float32 or wider.

    The draw of a row is keyed by its example's index in the data set, `batch.ids`.
    """
    logits = model(
        batch.tokens, noise=noise, groups=batch.ids, lengths=batch.lengths, last_only=True
    )
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
