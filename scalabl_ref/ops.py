"""The subspace-sampled LoRA linear layer, as a composition of PyTorch operations.

    y = W x + bias + c * B ((A x) * (s + sigma * eps)),    eps ~ N(0, I_r)

`reference.subspace_lora_linear` is the slow twin of the function here: same arguments, explicit
loops. The two never import each other, so that agreement between them means something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .noise import Noise

Sampling = Literal["batch", "example", "token"]
SAMPLING: tuple[Sampling, ...] = ("batch", "example", "token")


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
    """Frozen linear layer plus a low-rank update whose r scales are drawn from N(s, sigma^2).

    Shapes: x (..., d_in), weight (d_out, d_in), bias (d_out,) or None, A (r, d_in), B (d_out, r),
    s and sigma (r,). Returns (..., d_out) in x's dtype. The low-rank part is computed in the
    dtype of A, so float32 adapters on a bfloat16 base are not rounded to bfloat16 on the way.

    `noise=None` is the mean model: plain LoRA with diag(s) A. Otherwise the eps of a row is row g
    of `noise.normal(layer, groups, r)` where g is, by `sampling`,

    - "batch": 0 for every row,
    - "example": the row's index in x's first dimension,
    - "token": the row's index in x flattened to (rows, d_in), row-major.

    `groups` replaces these indices under "example" and "token": int64 ids whose shape is a
    leading part of x.shape[:-1], so that a draw follows the example rather than its place in
    memory. Source: METHOD, equation (1); exact because B diag(s~) A x = B ((A x) * s~).

    Raises ValueError for an unknown `sampling` and for `groups` of a wrong shape.
    """
    y = F.linear(x, weight, bias)
    h = F.linear(x.to(A.dtype), A)  # (..., r)
    scale = s if noise is None else _draw_scale(h, s, sigma, noise, layer, sampling, groups)
    update = F.linear(h * (scaling * scale), B)
    return y + update.to(y.dtype)


def _draw_scale(
    h: Tensor,
    s: Tensor,
    sigma: Tensor,
    noise: Noise,
    layer: int,
    sampling: Sampling,
    groups: Tensor | None,
) -> Tensor:
    """s + sigma * eps for every row of h, in a shape that broadcasts against h (..., r)."""
    ids, shape = row_groups(h.shape[:-1], sampling, groups)
    eps = noise.normal(layer, ids, h.shape[-1]).to(device=h.device, dtype=h.dtype)
    return s + sigma * eps.view(*shape, h.shape[-1])


def row_groups(
    rows: torch.Size, sampling: Sampling, groups: Tensor | None
) -> tuple[int | Tensor, tuple[int, ...]]:
    """Group ids for x.shape[:-1] = `rows`, and the shape that lays them out against the rows.

    Returns (ids, shape): ids as `Noise.normal` takes them (a count, or a flat int64 tensor), shape
    with as many dimensions as `rows`, of size 1 where all rows share a draw.
    """
    if sampling not in SAMPLING:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, not {sampling!r}")
    if sampling == "batch":
        return 1, (1,) * len(rows)
    if groups is not None:
        if groups.shape != rows[: groups.dim()]:
            raise ValueError(
                f"groups of shape {tuple(groups.shape)} do not lead the rows {tuple(rows)}"
            )
        return groups.reshape(-1), (*groups.shape, *(1,) * (len(rows) - groups.dim()))
    if sampling == "token":
        return rows.numel(), tuple(rows)
    if not rows:  # a single vector is its own only example
        return 1, ()
    return rows[0], (rows[0], *(1,) * (len(rows) - 1))
