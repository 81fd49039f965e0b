"""RMSNorm, RoPE and SwiGLU in the native core: the fast twins of model/llama.py's functions.

Each is one pass over its rows where PyTorch's operations are two to eight, and keeps its inputs
alone, and a number for each row, for the backward pass. A value is rounded once. The core serves
eager calls on the CPU in float32 and the 16-bit types; `serves` leaves all others, and second
derivatives, to PyTorch's operations.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import llama as plain
from . import native
from .ops import SERVED, serves

MOST_HEAD_DIM = 1024  # of the native core


def sizes(x: Tensor) -> tuple[int, int]:
    """Rows and columns of x (..., n)."""
    return x.shape[:-1].numel(), x.shape[-1]


# --- RMSNorm --------------------------------------------------------------------------------------


plain_norm = plain.RMSNorm.forward


def rms_norm(self: plain.RMSNorm, x: Tensor) -> Tensor:
    """The fast version of `RMSNorm.forward`."""
    if not serves(x, self.weight):
        return plain_norm(self, x)
    x = x.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
        return Norm.apply(x, self.weight, self.eps)
    return normed(x, self.weight, self.eps, 0)


def normed(x: Tensor, weight: Tensor, eps: float, scale: int) -> Tensor:
    """x, normed; scale: the address of one float32 a row, which gets the row's factor, or 0."""
    y = torch.empty_like(x)
    native.core().rms_norm(
        SERVED[x.dtype], sizes(x), x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


class Norm(torch.autograd.Function):
    """`rms_norm` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.empty(sizes(x)[0], dtype=torch.float32)  # (rows,)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return normed(x, weight, eps, scale.data_ptr())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = ctx.needs_input_grad[:2]
            inputs = [t for t, want in zip((x, weight), wanted, strict=True) if want]
            norm: Any = SimpleNamespace(weight=weight, eps=ctx.eps)
            y = plain_norm(norm, x)  # which can be differentiated again
            found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(found) if want else None for want in wanted), None
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            grad, to_x = grad.contiguous(), torch.empty_like(x)
            native.core().rms_norm_backward(
                SERVED[x.dtype], sizes(x), x.data_ptr(), weight.data_ptr(), grad.data_ptr(),
                scale.data_ptr(), to_x.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            rows = x.flatten(0, -2) * scale[:, None]  # (rows, n) float32
            to_weight = (grad.flatten(0, -2) * rows).sum(0).to(weight.dtype)
        return to_x, to_weight, None


# --- RoPE -----------------------------------------------------------------------------------------


class Angles(NamedTuple):
    """How rows (heads, h) are turned: row i by the angles i % len(cos), to the place places[i]."""

    cos: Tensor  # (..., 1, h)
    sin: Tensor  # the same
    places: Tensor | None = None  # (rows,) int64, all different; None: each row stays
    total: int = 0  # number of places


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, places: Tensor | None = None, total: int = 0
) -> Tensor:
    """The fast version of `model.llama.rotate`: x (..., heads, h), cos and sin (..., 1, h).

    One set of angles serves all of x's first dimension if theirs is 1. With `places`, x is
    (rows, heads, h), and its row i becomes row places[i] of (total, heads, h), zeros elsewhere.
    """
    h = x.shape[-1]
    if h > MOST_HEAD_DIM or h % 2 or not serves(x, cos, sin):
        y = plain.rotate(x, cos, sin)
        return y if places is None else y.new_zeros(total, *y.shape[1:]).index_put((places,), y)
    x, angles = x.contiguous(), Angles(cos.contiguous(), sin.contiguous(), places, total)
    if x.requires_grad and torch.is_grad_enabled():
        return Rotation.apply(x, angles)
    return rotated(x, angles, back=False)


def rotated(x: Tensor, angles: Angles, back: bool) -> Tensor:
    """x turned by the angles and put into its places, or all this backwards: the transpose."""
    cos, sin, places, total = angles
    *lead, heads, h = x.shape
    rows, y = math.prod(lead), torch.empty_like(x)
    if places is not None:
        rows = len(places)
        y = x.new_empty(rows, heads, h) if back else x.new_zeros(total, heads, h)
    address = 0 if places is None else places.data_ptr()
    native.core().rotate(
        SERVED[x.dtype], (rows, heads, h, cos.shape[:-2].numel()), cos.data_ptr(), sin.data_ptr(),
        address, back, x.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


class Rotation(torch.autograd.Function):
    """`rotate` with its gradient in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Angles) -> Tensor:
        ctx.save_for_backward(*angles[:3])
        ctx.total = angles.total
        return rotated(x, angles, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cos, sin, places = ctx.saved_tensors
        angles = Angles(cos, sin, places, ctx.total)
        if not torch.is_grad_enabled():
            return rotated(grad.contiguous(), angles, back=True), None
        if angles.places is not None:  # by PyTorch's operations, which have derivatives
            grad = grad.index_select(0, angles.places)
        first, second = (grad * angles.cos).chunk(2, -1), (grad * angles.sin).chunk(2, -1)
        return torch.cat((first[0] + second[1], first[1] - second[0]), -1), None


# --- SwiGLU ---------------------------------------------------------------------------------------


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which saves only these two for its backward pass, not silu(gate)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        if not serves(gate, up):
            return F.silu(gate) * up
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        addresses = gate.data_ptr(), up.data_ptr(), y.data_ptr()
        native.core().swiglu(SERVED[gate.dtype], gate.numel(), *addresses, torch.get_num_threads())
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            p = torch.sigmoid(gate)
            slope = p * (1 + gate * (1 - p))
            return grad * up * slope, grad * F.silu(gate)
        if not serves(gate, up, grad):
            return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        native.core().swiglu_backward(
            SERVED[gate.dtype], gate.numel(), grad.data_ptr(), gate.data_ptr(), up.data_ptr(),
            to_gate.data_ptr(), to_up.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return to_gate, to_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The fast version of `MLP.activation`: silu(gate) * up."""
    # Without gradients, the plain function has half the overhead.
    return SwiGLU.apply(gate, up) if torch.is_grad_enabled() else SwiGLU.forward(gate, up)
