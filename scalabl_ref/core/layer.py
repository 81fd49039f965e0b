"""Equation (1), the subspace-sampled LoRA linear layer, as five lines of PyTorch with autograd.

    y = W x + bias + c * B ((A x) * (s + sigma * eps)),    eps ~ N(0, I_r)                   (1)

This is the layer to read and to port. fast/ops.py computes the same in C++ and CUDA.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support.errors import InputError
from .noise import Keys, Noise

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
    draws: Tensor | None = None,
) -> Tensor:
    """Frozen linear layer plus a low-rank update whose r scales are drawn from N(s, sigma^2).

    Shapes: x (..., d_in), weight (d_out, d_in), bias (d_out,) or None, A (r, d_in), B (d_out, r),
    s and sigma (r,). Returns (..., d_out) in the dtype of the frozen layer's output. The update is
    computed in the dtype of A, or in float32 where that is wider, and rounded once. Under autocast
    x, weight and bias are cast, the adapter is not.

    `noise=None` is the mean model: plain LoRA with diag(s) A. Otherwise the eps of a row is row g
    of `noise.normal(layer, groups, r)` where g is, by `sampling`,

    - "batch": 0 for every row,
    - "example": the row's index in x's first dimension,
    - "token": the row's index in x flattened to (rows, d_in), row-major. Every token then has its
      own scales: a network with noise in each token, and not one draw from the posterior.

    groups: int64 ids that replace these indices under "example" and "token", of a shape that is a
    leading part of x.shape[:-1]. A draw then follows the example rather than its place in memory.
    draws: int64 of such a shape, added to `noise.draw`: one pass can serve several draws.

    Differentiable to any order in all tensors. Works with autocast; the fast version also works
    with torch.compile and torch.func. Source: docs/method.md, equation (1), which is exact because
    B diag(s~) A x = B ((A x) * s~).

    Raises ValueError for an unknown `sampling`, and for `groups` or `draws` of a wrong shape;
    InputError (a ValueError too) for tensors that do not fit together, and for a layer, group or
    draw out of range.

    >>> import torch
    >>> from scalabl_ref import Noise, subspace_lora_linear
    >>> x, A, B, one = torch.ones(1, 3), torch.ones(1, 3), torch.ones(3, 1), torch.ones(1)
    >>> subspace_lora_linear(x, torch.eye(3), None, A, B, one, one, 2.0, None)  # 1 + 2 * 3 * 1
    tensor([[7., 7., 7.]])
    """
    check_shapes(x, weight, bias, A, B, s, sigma)
    y = F.linear(x, weight, bias)  # (..., d_out)
    eps: Tensor | float = 0.0  # of the mean model
    if noise is not None:
        keys = Keys(noise, groups, draws)
        eps = row_noise(x.shape[:-1], keys, layer, sampling, len(s))  # (..., r)
    with torch.autocast(x.device.type, enabled=False):
        wide = low_rank_dtype(y, A)
        f = scale_factors(s.to(wide), sigma.to(wide), scaling, eps)  # (r,) or (..., r)
        h = F.linear(x.to(y.dtype).to(wide), A.to(wide))  # (..., r)
        u = h * f  # (..., r)
        return y + F.linear(u, B.to(wide)).to(y.dtype)  # (..., d_out)


def scale_factors(s: Tensor, sigma: Tensor, scaling: float, eps: Tensor | float) -> Tensor:
    """f = c * (s + sigma * eps), the factor between h and u; eps is 0 for the mean model."""
    return scaling * (s + sigma * (eps.to(s) if isinstance(eps, Tensor) else eps))


def low_rank_dtype(y: Tensor, A: Tensor) -> torch.dtype:
    """The dtype in which the update is computed: that of A or y, at least float32."""
    return torch.promote_types(torch.promote_types(A.dtype, y.dtype), torch.float32)


def row_noise(shape: torch.Size, keys: Keys, layer: int, sampling: Sampling, rank: int) -> Tensor:
    """eps of every row of an x whose leading dimensions are `shape`: (*shape, rank) float32.

    Rows share their eps as in `subspace_lora_linear`, which states the arguments and errors.
    """
    groups, draws = row_keys(shape, keys, sampling)
    draws = None if draws is None else draws.flatten()
    return keys.noise.normal(layer, groups.flatten(), rank, draws).view(*shape, rank)


def row_keys(shape: torch.Size, keys: Keys, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Each row's group id, and the number added to the noise's draw: both of shape `shape`."""
    if sampling not in SAMPLING:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, not {sampling!r}")
    device = None if keys.groups is None else keys.groups.device
    draws = None if keys.draws is None else spread("draws", keys.draws, shape)
    if sampling == "batch":
        return torch.zeros(shape, dtype=torch.int64, device=device), draws
    if keys.groups is not None:
        return spread("groups", keys.groups, shape), draws
    places = torch.arange(shape.numel(), device=device).view(shape)
    if sampling == "example" and len(shape):
        places = places // max(1, shape[1:].numel())
    return places if len(shape) else places * 0, draws


def spread(name: str, values: Tensor, shape: torch.Size) -> Tensor:
    """Integers whose shape is a leading part of `shape`, repeated over its other dimensions."""
    if values.is_floating_point() or values.is_complex():
        raise InputError(f"{name} must be integers, not {values.dtype}")
    if values.shape == shape:
        return values
    if values.shape != shape[: values.dim()]:
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} do not fit rows of shape {tuple(shape)}"
        )
    return values.view(*values.shape, *[1] * (len(shape) - values.dim())).expand(shape)


def check_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: Tensor, sigma: Tensor
) -> None:
    """Raise InputError naming a tensor that does not fit the others."""
    d_in, d_out, rank = x.shape[-1], weight.shape[0], A.shape[0]
    expected = (
        ("weight", weight, (d_out, d_in)), ("bias", bias, (d_out,)), ("A", A, (rank, d_in)),
        ("B", B, (d_out, rank)), ("s", s, (rank,)), ("sigma", sigma, (rank,)),
    )  # fmt: skip
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise InputError(
                f"{name} must have shape {shape}, not {tuple(tensor.shape)}: x has {d_in} "
                f"columns, weight has {d_out} rows, A has {rank}"
            )
