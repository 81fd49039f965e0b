"""The slow truth: the method's formulas as explicit loops over Python floats (float64).

Nothing here is vectorised, fused or clever; every line can be laid beside its equation. `ops` and
`elbo` are tested against this file and never imported by it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .noise import Noise
    from .ops import Sampling


def subspace_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: Tensor,
    sigma: Tensor,
    scaling: float,
    noise: Noise | None,
    layer: int = 0,
    sampling: Sampling = "example",
    groups: Tensor | None = None,
) -> Tensor:
    """y = W x + bias + c B ((A x) * (s + sigma eps)), one output number at a time.

    Same arguments and shapes as `ops.subspace_lora_linear`; computed and returned in float64
    whatever the inputs' dtype, without gradient.
    """
    d_out, rank = len(weight), len(s)
    W, a, b = weight.double().tolist(), A.double().tolist(), B.double().tolist()
    mean, sd = s.double().tolist(), sigma.double().tolist()
    offset = [0.0] * d_out if bias is None else bias.double().tolist()
    out = []
    for row, vector in enumerate(x.double().reshape(-1, x.shape[-1]).tolist()):
        eps = [0.0] * rank
        if noise is not None:
            group = _group_of_row(row, tuple(x.shape[:-1]), sampling, groups)
            eps = noise.normal(layer, torch.tensor([group]), rank)[0].double().tolist()
        h = [_dot(a[k], vector) * (mean[k] + sd[k] * eps[k]) for k in range(rank)]
        out += [
            _dot(W[i], vector) + offset[i] + scaling * sum(b[i][k] * h[k] for k in range(rank))
            for i in range(d_out)
        ]
    return torch.tensor(out, dtype=torch.float64).reshape(*x.shape[:-1], d_out)


def kl_forward(s: Tensor, sigma: Tensor, prior_std: float) -> float:
    """KL(q || p) of q = N(s, diag(sigma^2)) from p = N(0, prior_std^2 I), in nats."""
    total = 0.0
    for mean, sd in zip(s.double().tolist(), sigma.double().tolist(), strict=True):
        total += math.log(prior_std / sd) + (sd**2 + mean**2) / (2 * prior_std**2) - 0.5
    return total


def kl_official(s: Tensor, sigma: Tensor, prior_std: float) -> float:
    """KL(p || q), the direction that the official code computes, in nats."""
    total = 0.0
    for mean, sd in zip(s.double().tolist(), sigma.double().tolist(), strict=True):
        total += math.log(sd / prior_std) + (prior_std**2 + mean**2) / (2 * sd**2) - 0.5
    return total


def _dot(u: list[float], v: list[float]) -> float:
    return sum(p * q for p, q in zip(u, v, strict=True))


def _group_of_row(
    row: int, shape: tuple[int, ...], sampling: Sampling, groups: Tensor | None
) -> int:
    """The group id of row number `row` (row-major over `shape` = x.shape[:-1])."""
    if sampling == "batch":
        return 0
    if groups is not None:
        rows_per_group = math.prod(shape[groups.dim() :])
        return groups.reshape(-1).tolist()[row // rows_per_group]
    if sampling == "token":
        return row
    return row // math.prod(shape[1:])
