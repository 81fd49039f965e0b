"""Equation (1) in the native core: the fast twin of core/layer.py, equal to it to rounding.

The base layer is PyTorch's; csrc/ adds the update to it in place. The backward pass draws the noise
again and keeps only A x, (rows, r), besides references to its inputs. Second derivatives and the
calls that `unserved` names use the plain version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..core import layer as plain
from ..core.layer import SAMPLING, Sampling, check_shapes, row_keys
from ..core.noise import RESERVED_LAYER, Keys, Noise
from ..core.philox import in_range
from . import native
from .normals import MASK, signed

MAX_RANK = 256  # of the native core
FEW_ROWS = {torch.float32: 10, torch.bfloat16: 2, torch.float16: 2}  # the core's product is faster
SMALL = 1 << 16  # values of a weight that caches hold: PyTorch's product is as fast
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SERVED = {dtype: number for dtype, number in DTYPES.items() if dtype != torch.float64}
PLAIN_TYPES = (Tensor, torch.nn.Parameter, type(None))  # subclasses may redefine operations


class Operands(NamedTuple):
    """The tensors of a call and the scaling, shapes as in `subspace_lora_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    s: Tensor
    sigma: Tensor
    scaling: float


class DrawNumbers(NamedTuple):
    """The noise of a call as numbers, which a registered operator can take.

    Rows i with the same i // rows_per_group share the draw of groups[i // rows_per_group], with
    draws[...] added to `draw`. groups None: the group i // rows_per_group. draws None: add 0. noisy
    False: the mean model. seed is the Noise's as a signed 64-bit integer.
    """

    noisy: bool
    seed: int
    draw: int
    layer: int
    groups: Tensor | None  # (count,) int64
    draws: Tensor | None  # (count,) int64
    rows_per_group: int


MEAN = DrawNumbers(False, 0, 0, 0, None, None, 1)


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
    # The docstring is that of the plain version: see the end of this file.
    if low := autocast_dtype(x):
        bias = bias if bias is None else bias.to(low)
        with torch.autocast(x.device.type, enabled=False):
            return subspace_lora_linear(
                x.to(low), weight.to(low), bias, A, B, s, sigma, scaling, noise, layer, sampling,
                groups, draws,
            )  # fmt: skip
    t = Operands(x, weight, bias, A, B, s, sigma, float(scaling))
    if not fitting(t):
        check_shapes(*t[:7])
    core = native.core()
    if core is None or unserved(core, t, noise, groups, draws):
        return plain.subspace_lora_linear(*t, noise, layer, sampling, groups, draws)
    d = MEAN if noise is None else draws_of(x.shape[:-1], noise, layer, sampling, groups, draws)
    if torch.compiler.is_compiling():
        return torch.ops.scalabl_ref.subspace_lora_linear(*t, *d)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in t[:7]):
        return Native.apply(core, d, *t)
    return forward(core, t, d, keep=False)[0]


def fitting(t: Operands) -> bool:
    """Whether `check_shapes` accepts the operands, in half its time."""
    d_in, d_out, rank = t.x.shape[-1], t.weight.shape[0], t.A.shape[0]
    return (
        t.weight.shape == (d_out, d_in)
        and t.A.shape == (rank, d_in)
        and t.B.shape == (d_out, rank)
        and t.s.shape == t.sigma.shape == (rank,)
        and (t.bias is None or t.bias.shape == (d_out,))
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts x; None where it does not."""
    device = "cpu" if x.is_cpu else x.device.type  # is_cpu saves half a microsecond
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def unserved(
    core: Any, t: Operands, noise: Noise | None, groups: Tensor | None, draws: Tensor | None
) -> str:
    """Why the native core cannot serve this call; "" if it can."""
    x, weight, bias, A, B, s, sigma, _ = t
    dtype, own, cpu = x.dtype, A.dtype, x.is_cpu
    if type(noise) is not Noise and noise is not None:
        return "a design of draws"
    if dtype not in DTYPES or weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return "dtypes of the base layer"
    if (own != dtype and own != torch.float32) or not own == B.dtype == s.dtype == sigma.dtype:
        return "dtypes of the adapter"
    if not 0 < A.shape[0] <= MAX_RANK:
        return "rank"
    if not (cpu or (x.is_cuda and core.cuda)):
        return "device"
    for p in (weight, A, B, s, sigma):
        if type(p) not in PLAIN_TYPES or p.is_cpu is not cpu or (not cpu and p.device != x.device):
            return "another kind of tensor, or another device"
    for value in (x, groups, draws):
        if type(value) not in PLAIN_TYPES:
            return "another kind of tensor"
    return "a transform of functions" if transformed() else ""


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def serves(*tensors: Tensor) -> bool:
    """Whether the native core computes with these: plain CPU tensors of one dtype, eagerly."""
    dtype = tensors[0].dtype
    if dtype not in SERVED or torch.compiler.is_compiling() or native.core() is None:
        return False
    for t in tensors:
        if t.dtype != dtype or not t.is_cpu or type(t) not in PLAIN_TYPES:
            return False
    return not transformed()


def draws_of(
    shape: torch.Size,
    noise: Noise,
    layer: int,
    sampling: Sampling,
    groups: Tensor | None,
    draws: Tensor | None,
) -> DrawNumbers:
    """`DrawNumbers` of rows whose leading dimensions are `shape`, in as few groups as possible."""
    if not torch.compiler.is_compiling():
        in_range("layer", layer, 0, RESERVED_LAYER)
    seed = signed(noise.seed)
    if sampling == "batch":
        groups, lead = None, 0
    elif groups is not None:
        lead = groups.dim()
    else:
        lead = 1 if sampling == "example" else len(shape)
    lead = lead if draws is None else max(lead, draws.dim())
    if groups is not None or draws is not None or sampling not in SAMPLING:
        ids, draws = row_keys(shape[:lead], Keys(noise, groups, draws), sampling)
        groups, draws = ids.reshape(-1), None if draws is None else draws.reshape(-1)
    per_group = max(1, math.prod(shape[lead:]))
    return DrawNumbers(True, seed, noise.draw, layer, groups, draws, per_group)


# --- The native core ------------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, columns) with unit column stride; copied only if necessary."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def arguments(core: Any, x: Tensor, t: Operands, d: DrawNumbers) -> tuple[Any, Any]:
    """The core's argument block for x (rows, d_in), and the tensors that must outlive it."""
    A, B, s, sigma = t.A.contiguous(), t.B.contiguous(), t.s.contiguous(), t.sigma.contiguous()
    groups = d.groups if d.groups is None else ids_on(x.device, d.groups)
    draws = d.draws if d.draws is None else ids_on(x.device, d.draws)
    rows, d_in = x.shape
    d_out, rank = B.shape
    op = core.update(
        dtypes=(DTYPES[x.dtype], DTYPES[A.dtype]),
        sizes=(rows, d_in, d_out, rank),
        x=(x.data_ptr(), x.stride(0)),
        A=(A.data_ptr(), d_in),
        B=(B.data_ptr(), rank),
        s=s.data_ptr(),
        sigma=sigma.data_ptr(),
        scaling=t.scaling,
        noise=(d.seed & MASK, d.draw, d.layer) if d.noisy else None,
        groups=(address(groups), address(draws), d.rows_per_group),
        threads=torch.get_num_threads(),
    )
    return op, (x, A, B, s, sigma, groups, draws)


def ids_on(device: torch.device, ids: Tensor) -> Tensor:
    return ids.to(device, torch.int64).contiguous()


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(core: Any, t: Operands, d: DrawNumbers, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(y, h): h = A x, (rows, r), if it is to be kept for the backward pass."""
    y = linear(t.x, t.weight, t.bias).contiguous()
    x = rows_of(t.x)
    op, alive = arguments(core, x, t, d)
    h = None
    if keep:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        h = torch.empty(x.shape[0], t.s.shape[0], dtype=wide, device=x.device)
    to = (y.data_ptr(), y.shape[-1], 0 if h is None else h.data_ptr())
    if x.is_cpu:
        op.forward(*to)
    else:
        on_stream(op.cuda_forward, to, x.device)
    return y, h


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The fast version of `Linear.product`: few rows without gradients go to the core.

    Their product is limited by reading the weight, which the core does once and ahead of time.
    """
    if weight.numel() < SMALL or not few(x, weight, bias):
        return F.linear(x, weight, bias)
    d_out, d_in = weight.shape
    y = x.new_empty(*x.shape[:-1], d_out)
    native.core().few_rows(
        SERVED[x.dtype], (x.numel() // d_in, d_in, d_out), x.data_ptr(), weight.data_ptr(),
        address(bias), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def few(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the core serves the product of these, and is faster."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not serves(*tensors) or not 0 < x.numel() <= FEW_ROWS[x.dtype] * x.shape[-1]:
        return False
    d_out = weight.shape[0]
    if weight.shape != (d_out, x.shape[-1]) or (bias is not None and bias.shape != (d_out,)):
        return False  # PyTorch says so
    if autocast_dtype(x) or not all(t.is_contiguous() for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def on_stream(function: Any, to: tuple[int, ...], device: torch.device) -> None:
    """Call on the device's current stream, with scratch space from PyTorch's allocator."""
    size = function(*to, 0, 0, 0)
    scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        function(*to, scratch.data_ptr(), size, stream)


def gradients(
    core: Any, grad_y: Tensor, t: Operands, h: Tensor | None, d: DrawNumbers, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients (1b) to (1e) of the seven tensors, None where `wanted` is False.

    h: the value that `forward` kept, or None.
    """
    x, grad_rows = rows_of(t.x), rows_of(grad_y)
    out: list[Tensor | None] = [None] * 7
    if wanted[0]:
        out[0] = (grad_rows @ t.weight).view(t.x.shape)
    if wanted[1]:
        out[1] = grad_rows.t() @ x
    if wanted[2]:
        out[2] = grad_rows.sum(0)
    for i, parameter in enumerate((t.A, t.B, t.s, t.sigma), 3):
        if wanted[i]:
            out[i] = torch.empty(parameter.shape, dtype=parameter.dtype, device=x.device)
    if wanted[0] or any(wanted[3:]):
        op, alive = arguments(core, x, t, d)
        to = [0 if gradient is None else gradient.data_ptr() for gradient in out]
        addresses = (
            grad_rows.data_ptr(), grad_rows.stride(0), 0 if h is None else h.data_ptr(),
            to[0], x.shape[1], *to[3:],
        )  # fmt: skip
        if x.is_cpu:
            op.backward(*addresses)
        else:
            on_stream(op.cuda_backward, addresses, x.device)
    return out


def differentiable_gradients(
    grad_y: Tensor, t: Operands, d: DrawNumbers, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """As `gradients`, but differentiable again: through the plain version."""
    noise = None if not d.noisy else Noise(d.seed & MASK, d.draw)
    shape = torch.Size((t.x.shape[:-1].numel(),))

    def spread(ids: Tensor | None) -> Tensor | None:
        return None if ids is None else ids.repeat_interleave(d.rows_per_group)[: shape[0]]

    groups = d.groups
    if groups is None:
        groups = torch.arange(-(-shape[0] // d.rows_per_group), device=t.x.device)
    x = t.x.reshape(*shape, t.x.shape[-1])
    y = plain.subspace_lora_linear(
        x, *t[1:], noise, d.layer, "example", spread(groups), spread(d.draws)
    )
    chosen = [p for p, want in zip(t[:7], wanted, strict=True) if want and p is not None]
    found = iter(torch.autograd.grad(y, chosen, rows_of(grad_y), create_graph=True))
    return [next(found) if want else None for want in wanted]


class Native(torch.autograd.Function):
    """The native core with its own backward, for eager mode: a few microseconds per call."""

    @staticmethod
    def forward(ctx: Any, core: Any, d: DrawNumbers, *inputs: Any) -> Tensor:
        t = Operands(*inputs)
        needs_h = any(p.requires_grad for p in (t.B, t.s, t.sigma))
        y, h = forward(core, t, d, needs_h)
        ctx.save_for_backward(*t[:7], h, d.groups, d.draws)
        ctx.core, ctx.draws, ctx.scaling = core, d._replace(groups=None, draws=None), t.scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, bias, A, B, s, sigma, h, groups, draws = ctx.saved_tensors
        t = Operands(x, weight, bias, A, B, s, sigma, ctx.scaling)
        d = ctx.draws._replace(groups=groups, draws=draws)
        wanted = ctx.needs_input_grad[2:9]
        if torch.is_grad_enabled():
            out = differentiable_gradients(grad_y, t, d, wanted)
        else:
            out = gradients(ctx.core, grad_y, t, h, d, wanted)
        return None, None, *out, None


# --- Registered operators, for torch.compile ------------------------------------------------------

DRAWS = (
    "bool noisy, SymInt seed, SymInt draw, SymInt layer, Tensor? groups, Tensor? draws, "
    "SymInt rows_per_group"
)
TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor s, Tensor sigma"


@torch.library.custom_op(
    "scalabl_ref::subspace_lora_linear",
    mutates_args=(),
    schema=f"({TENSORS}, float scaling, {DRAWS}) -> Tensor",
)
def registered_forward(*values: Any) -> Tensor:
    """The layer with its noise as numbers: the fields of `Operands` and of `DrawNumbers`."""
    return forward(native.core(), Operands(*values[:8]), DrawNumbers(*values[8:]), False)[0]


@registered_forward.register_fake
def forward_shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(
    "scalabl_ref::subspace_lora_linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, {TENSORS}, float scaling, {DRAWS}, bool[] wanted) -> Tensor[]",
)
def registered_backward(grad_y: Tensor, *values: Any) -> list[Tensor]:
    """Gradients of the seven inputs; an empty tensor for one that is not wanted."""
    t, d, wanted = Operands(*values[:8]), DrawNumbers(*values[8:-1]), values[-1]
    out = gradients(native.core(), grad_y, t, None, d, wanted)
    return [grad_y.new_empty(0) if g is None else g for g in out]


@registered_backward.register_fake
def backward_shapes(grad_y: Tensor, *values: Any) -> list[Tensor]:
    inputs, wanted = values[:7], values[-1]
    return [
        t.new_empty(t.shape) if w else grad_y.new_empty(0)
        for t, w in zip(inputs, wanted, strict=True)
    ]


def remember(ctx: Any, inputs: Any, output: Tensor) -> None:
    t, d = Operands(*inputs[:8]), DrawNumbers(*inputs[8:])
    ctx.save_for_backward(*t[:7], d.groups, d.draws)
    ctx.scaling, ctx.draws = t.scaling, d._replace(groups=None, draws=None)


def differentiate(ctx: Any, grad_y: Tensor) -> Any:
    *tensors, groups, draws = ctx.saved_tensors
    d, wanted = ctx.draws._replace(groups=groups, draws=draws), list(ctx.needs_input_grad[:7])
    out = torch.ops.scalabl_ref.subspace_lora_linear_backward(
        grad_y, *tensors, ctx.scaling, *d, wanted
    )
    return *(g if w else None for g, w in zip(out, wanted, strict=True)), *[None] * 8


registered_forward.register_autograd(differentiate, setup_context=remember)

subspace_lora_linear.__doc__ = plain.subspace_lora_linear.__doc__
