"""Both directions of the KL between q = N(s, diag(sigma^2)) and p = N(0, prior_std^2 I)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KL = Literal["forward", "official"]


def kl_forward(s: Tensor, sigma: Tensor, prior_std: float | Tensor) -> Tensor:
    """KL(q || p), q = N(s, diag(sigma^2)), p = N(0, prior_std^2 I): the textbook direction.

    s and sigma (r,), or any one shape that prior_std broadcasts to; returns a float64 scalar in
    nats,
    sum_k log(prior_std / sigma_k) + (sigma_k^2 + s_k^2) / (2 prior_std^2) - 1/2.
    """
    s, sigma = s.double(), sigma.double()
    log_ratio = torch.log(prior_std / sigma)
    return (log_ratio + (sigma**2 + s**2) / (2 * prior_std**2) - 0.5).sum()


def kl_official(s: Tensor, sigma: Tensor, prior_std: float | Tensor) -> Tensor:
    """KL(p || q), the direction that the official code computes; shapes as `kl_forward`.

    sum_k log(sigma_k / prior_std) + (prior_std^2 + s_k^2) / (2 sigma_k^2) - 1/2.
    """
    s, sigma = s.double(), sigma.double()
    log_ratio = torch.log(sigma / prior_std)
    return (log_ratio + (prior_std**2 + s**2) / (2 * sigma**2) - 0.5).sum()


KLS: dict[str, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    "forward": kl_forward,
    "official": kl_official,
}
