"""The subspace-sampled LoRA linear layer: a PyTorch composition, or the native core.

    y = W x + bias + c * B ((A x) * (s + sigma * eps)),    eps ~ N(0, I_r)

`reference.subspace_lora_linear` is the slow twin of the function here: same arguments, explicit
loops. The two never import each other, so that agreement between them means something.

Which body runs is decided in `subspace_lora_linear` and nowhere else. The native one computes the
base layer with PyTorch and lets csrc/ add the update to it in place; its backward regenerates the
noise and keeps, beyond references to its inputs, only A x of (rows, r). Second derivatives go
through the composition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..core.noise import RESERVED_LAYER, Noise
from ..core.philox import in_range
from ..support.errors import InputError
from . import native

Sampling = Literal["batch", "example", "token"]
SAMPLING: tuple[Sampling, ...] = ("batch", "example", "token")
MAX_RANK = 256  # of the native core
MASK = 2**64 - 1
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PLAIN = (Tensor, torch.nn.Parameter, type(None))  # subclasses may mean anything


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
    dtype of A, or in float32 where that is wider: float32 adapters on a bfloat16 base are not
    rounded to bfloat16 on the way. Under autocast x, weight and bias are cast, the adapter is not.

    `noise=None` is the mean model: plain LoRA with diag(s) A. Otherwise the eps of a row is row g
    of `noise.normal(layer, groups, r)` where g is, by `sampling`,

    - "batch": 0 for every row,
    - "example": the row's index in x's first dimension,
    - "token": the row's index in x flattened to (rows, d_in), row-major.

    `groups` replaces these indices under "example" and "token": int64 ids whose shape is a
    leading part of x.shape[:-1], so that a draw follows the example rather than its place in
    memory. The high word of an id counts draws further on, under "batch" too: rows of several draws
    can go through the layer together, see `noise.later`. Source: METHOD, equation (1);
    exact because B diag(s~) A x = B ((A x) * s~).

    Differentiable in everything but the noise, to any order; composes with torch.compile,
    torch.func (vmap over `groups` gives independent draws) and autocast.

    Raises ValueError for an unknown `sampling`, for `groups` of a wrong shape, and InputError (a
    ValueError too) for tensors that do not fit together, and for a layer or group id out of range
    (ids on a GPU are not looked at).
    """
    if low := _autocast_dtype(x):
        bias = bias if bias is None else bias.to(low)
        with torch.autocast(x.device.type, enabled=False):
            return subspace_lora_linear(
                x.to(low), weight.to(low), bias, A, B, s, sigma, scaling, noise, layer, sampling,
                groups,
            )  # fmt: skip
    t = Inputs(x, weight, bias, A, B, s, sigma, float(scaling))
    _check_shapes(t)
    draws = _draws(x.shape[:-1], noise, layer, sampling, groups)
    if torch.compiler.is_compiling():
        if isinstance(weight, Tensor):
            return torch.ops.scalabl_ref.subspace_lora_linear(*t, *draws)
        return _composition(t, draws)  # codes are no argument of an operator
    core = _core_for(t, draws)
    if core is None:
        return _composition(t, draws)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in t[:7]):
        return _Native.apply(core, draws, *t)
    return _native_forward(core, t, draws, keep=False)[0]


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    hidden: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """W x + bias + B hidden(x, A), for adapters of other kinds: shapes and dtypes as above.

    hidden: of x (..., d_in) and A (r, d_in), both in the dtype of the low-rank part and outside
    autocast, to (..., r).
    """
    if low := _autocast_dtype(x):
        bias = bias if bias is None else bias.to(low)
        with torch.autocast(x.device.type, enabled=False):
            return adapted_linear(x.to(low), weight.to(low), bias, A, B, hidden)
    y, wide = F.linear(x, weight, bias), _wide(x, A)
    update = F.linear(hidden(x.to(wide), A.to(wide)), B.to(wide))
    return y + update.to(y.dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to; None where it does not."""
    device = "cpu" if x.is_cpu else x.device.type  # the short way is worth half a microsecond
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def _wide(x: Tensor, A: Tensor) -> torch.dtype:
    """What the low-rank part is computed in."""
    return torch.promote_types(torch.promote_types(A.dtype, x.dtype), torch.float32)


# --- The arguments, as every body takes them ------------------------------------------------------


class Inputs(NamedTuple):
    """The tensors of a call, and the scaling."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    s: Tensor
    sigma: Tensor
    scaling: float


class Draws(NamedTuple):
    """The noise of a call, in numbers.

    Rows i with the same i // rows_per_group share the draw of group ids[i // rows_per_group], or
    of i // rows_per_group itself where ids is None. noisy False is the mean model. seed is the
    Noise's as a signed 64-bit integer, which is what a registered op can take.
    """

    noisy: bool
    seed: int
    draw: int
    layer: int
    ids: Tensor | None  # (count,) int64
    rows_per_group: int
    design: int = 0  # Noise.design


_MEAN = Draws(False, 0, 0, 0, None, 1)


def _check_shapes(t: Inputs) -> None:
    """Raise InputError naming a tensor that does not fit; a body is given none that do not."""
    d_in, d_out, rank = t.x.shape[-1], t.weight.shape[0], t.A.shape[0]
    shapes = ((d_out, d_in), (d_out,), (rank, d_in), (d_out, rank), (rank,), (rank,))
    for name, p, shape in zip(Inputs._fields[1:7], t[1:7], shapes, strict=True):
        if p is not None and p.shape != shape:
            raise InputError(
                f"{name} must be {shape}, and is {tuple(p.shape)}: x has {d_in} columns, weight "
                f"{d_out} rows, A {rank}"
            )


def _draws(
    shape: torch.Size, noise: Noise | None, layer: int, sampling: Sampling, groups: Tensor | None
) -> Draws:
    ids, per_group = row_groups(shape, sampling, groups)
    if noise is None:
        return _MEAN
    if not torch.compiler.is_compiling():
        in_range("layer", layer, 0, RESERVED_LAYER)
    seed = noise.seed
    signed = seed if seed < 2**63 else seed - 2**64
    return Draws(True, signed, noise.draw, layer, ids, per_group, noise.design)


def row_groups(
    shape: torch.Size, sampling: Sampling, groups: Tensor | None
) -> tuple[Tensor | None, int]:
    """Which rows of x, whose leading dimensions are `shape`, share a draw: (ids, rows_per_group).

    As in `Draws`. Raises ValueError as `subspace_lora_linear` says.
    """
    if sampling not in SAMPLING:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, not {sampling!r}")
    shared = shape[1:]  # the dimensions along which rows share a draw
    if groups is not None:
        if groups.is_floating_point() or groups.is_complex():
            raise InputError(f"groups must be integers, not {groups.dtype}")
        if groups.shape != shape[: groups.dim()]:
            raise ValueError(
                f"groups of shape {tuple(groups.shape)} do not lead the rows {tuple(shape)}"
            )
        shared = shape[groups.dim() :]
    if groups is not None:
        groups = groups.reshape(-1)
        if sampling == "batch":
            groups = groups & ~0xFFFFFFFF
    elif sampling == "batch":
        shared = shape
    elif sampling == "token":
        shared = shape[:0]
    return groups, (max(1, shared.numel()) if shared else 1)


def row_noise(
    shape: torch.Size,
    noise: Noise,
    layer: int,
    sampling: Sampling,
    groups: Tensor | None,
    rank: int,
) -> Tensor:
    """eps of every row of an x whose leading dimensions are `shape`: (*shape, rank) float32.

    Rows share their eps as in `subspace_lora_linear`, which see for the arguments and errors.
    """
    draws = _draws(shape, noise, layer, sampling, groups)
    eps = _eps(draws, shape.numel(), rank).repeat_interleave(draws.rows_per_group, 0)
    return eps[: shape.numel()].view(*shape, rank)


def _eps(draws: Draws, rows: int, rank: int) -> Tensor:
    """eps of every group, (count, rank) float32."""
    ids = draws.ids
    if ids is None:
        ids = torch.arange(-(-rows // draws.rows_per_group))
    numbers = (draws.seed, draws.draw, draws.layer, draws.design, rank)
    return torch.ops.scalabl_ref.normals(ids, *numbers)


# --- Body 1: a composition of PyTorch operations --------------------------------------------------


def _composition(t: Inputs, draws: Draws) -> Tensor:
    def hidden(x: Tensor, A: Tensor) -> Tensor:
        h, rows = F.linear(x, A), math.prod(x.shape[:-1])  # (..., r)
        factor, _ = _factors(t, draws, rows)
        return h * factor.expand(rows, -1).view(h.shape)

    return adapted_linear(t.x, t.weight, t.bias, t.A, t.B, hidden)


def _composed_gradients(
    grad_y: Tensor, t: Inputs, draws: Draws, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the seven tensors, None where `wanted` is False; docs/method.md derives them.

    Differentiable in turn, by whoever calls this with grad mode on.
    """
    wide, x, g = _wide(t.x, t.A), _rows(t.x), _rows(grad_y)
    A, B = t.A.to(wide), t.B.to(wide)
    h, d = x.to(wide) @ A.t(), g.to(wide) @ B  # (rows, r)
    factor, eps = _factors(t, draws, x.shape[0])
    u, dh, ds = h * factor, d * factor, t.scaling * h * d
    gradients = (
        lambda: (g @ t.weight + (dh @ A).to(g.dtype)).view(t.x.shape),
        lambda: g.t() @ x,
        lambda: g.sum(0),
        lambda: (dh.t() @ x.to(wide)).to(t.A.dtype),
        lambda: (g.to(wide).t() @ u).to(t.B.dtype),
        lambda: ds.sum(0).to(t.s.dtype),
        lambda: (ds * eps).sum(0).to(t.sigma.dtype),
    )
    return [gradient() if w else None for gradient, w in zip(gradients, wanted, strict=True)]


def _factors(t: Inputs, draws: Draws, rows: int) -> tuple[Tensor, Tensor]:
    """scaling * (s + sigma * eps) and eps, each (rows, r), or (1, r) for the mean model."""
    wide = _wide(t.x, t.A)
    s, sigma = t.s.to(wide), t.sigma.to(wide)
    if not draws.noisy:
        return t.scaling * s[None], torch.zeros_like(sigma)[None]
    eps = _eps(draws, rows, s.shape[0]).to(device=s.device, dtype=wide)  # (groups, r)

    def spread(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(draws.rows_per_group, 0)[:rows]

    return spread(t.scaling * (s + sigma * eps)), spread(eps)


# --- Body 2: the native core ----------------------------------------------------------------------


def _core_for(t: Inputs, draws: Draws) -> Any:
    """The native core if it serves this call, else None."""
    core = native.core()
    x, weight, bias, A, B, s, sigma, _ = t
    dtype, own = x.dtype, A.dtype
    if (
        core is None
        or draws.design
        or dtype not in _DTYPES
        or not (x.is_cpu or (x.is_cuda and core.cuda))
    ):
        return None
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return None
    if (own != dtype and own != torch.float32) or not 0 < A.shape[0] <= MAX_RANK:
        return None
    if B.dtype != own or s.dtype != own or sigma.dtype != own:
        return None
    if type(x) not in _PLAIN or type(draws.ids) not in _PLAIN:
        return None
    cpu = x.is_cpu
    for p in (weight, A, B, s, sigma):
        if type(p) not in _PLAIN or p.is_cpu is not cpu or (not cpu and p.device != x.device):
            return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    return core


def _rows(x: Tensor) -> Tensor:
    """x as (rows, columns) with unit column stride; a copy only where it must be."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _update(core: Any, x: Tensor, t: Inputs, draws: Draws) -> tuple[Any, Any]:
    """The core's argument block for x (rows, d_in), and the tensors that must outlive it."""
    _, _, _, A, B, s, sigma, scaling = t
    noisy, seed, draw, layer, ids, per_group, _ = draws
    A, B, s, sigma = _rows(A), _rows(B), s.contiguous(), sigma.contiguous()
    later = None
    if ids is not None:
        ids = ids.to(x.device, torch.int64)
        ids, later = (ids & 0xFFFFFFFF).contiguous(), (ids >> 32).contiguous()
    rows, d_in = x.shape
    d_out, rank = B.shape
    op = core.update(
        dtypes=(_DTYPES[x.dtype], _DTYPES[A.dtype]),
        sizes=(rows, d_in, d_out, rank),
        x=(x.data_ptr(), x.stride(0)),
        A=(A.data_ptr(), A.stride(0)),
        B=(B.data_ptr(), B.stride(0)),
        s=s.data_ptr(),
        sigma=sigma.data_ptr(),
        scaling=scaling,
        noise=(seed & MASK, draw, layer) if noisy else None,
        groups=(_address(ids), _address(later), per_group),
        threads=torch.get_num_threads(),
    )
    return op, (x, A, B, s, sigma, ids, later)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _native_forward(core: Any, t: Inputs, draws: Draws, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(y, h): h = A x, (rows, r), if it is to be kept for the backward pass."""
    y = F.linear(t.x, t.weight, t.bias).contiguous()
    x = _rows(t.x)
    op, alive = _update(core, x, t, draws)
    h = None
    if keep:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        h = torch.empty(x.shape[0], t.s.shape[0], dtype=wide, device=x.device)
    arguments = (y.data_ptr(), y.shape[-1], 0 if h is None else h.data_ptr())
    if x.is_cpu:
        op.forward(*arguments)
    else:
        _on_stream(op.cuda_forward, arguments, x.device)
    return y, h


def _on_stream(function: Any, arguments: tuple[int, ...], device: torch.device) -> None:
    """Enqueue on the device's current stream, with scratch space from PyTorch's allocator."""
    size = function(*arguments, 0, 0, 0)
    scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        function(*arguments, scratch.data_ptr(), size, stream)


def _native_gradients(
    core: Any, grad_y: Tensor, t: Inputs, h: Tensor | None, draws: Draws, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """As `_composed_gradients`; h is what `_native_forward` kept, or None."""
    x, grad_rows = _rows(t.x), _rows(grad_y)
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
        op, alive = _update(core, x, t, draws)
        to = [0 if gradient is None else gradient.data_ptr() for gradient in out]
        arguments = (
            grad_rows.data_ptr(), grad_rows.stride(0), 0 if h is None else h.data_ptr(),
            to[0], x.shape[1], *to[3:],
        )  # fmt: skip
        if x.is_cpu:
            op.backward(*arguments)
        else:
            _on_stream(op.cuda_backward, arguments, x.device)
    return out


class _Native(torch.autograd.Function):
    """The native core with its own backward, for eager mode: a few microseconds a call."""

    @staticmethod
    def forward(ctx: Any, core: Any, draws: Draws, *inputs: Any) -> Tensor:
        t = Inputs(*inputs)
        needs_h = any(p.requires_grad for p in (t.B, t.s, t.sigma))
        y, h = _native_forward(core, t, draws, needs_h)
        ctx.save_for_backward(*t[:7], h, draws.ids)
        ctx.core, ctx.draws, ctx.scaling = core, draws._replace(ids=None), t.scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, bias, A, B, s, sigma, h, ids = ctx.saved_tensors
        t = Inputs(x, weight, bias, A, B, s, sigma, ctx.scaling)
        draws = ctx.draws._replace(ids=ids)
        wanted = ctx.needs_input_grad[2:9]
        if torch.is_grad_enabled():  # these gradients are to be differentiated once more
            out = _composed_gradients(grad_y, t, draws, wanted)
        else:
            out = _native_gradients(ctx.core, grad_y, t, h, draws, wanted)
        return None, None, *out, None


# --- Registered operators, for torch.compile and torch.func ---------------------------------------

_NOISE = (
    "bool noisy, SymInt seed, SymInt draw, SymInt layer, Tensor? ids, SymInt rows_per_group, "
    "SymInt design"
)
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor s, Tensor sigma"


@torch.library.custom_op(
    "scalabl_ref::normals",
    mutates_args=(),
    schema="(Tensor ids, SymInt seed, SymInt draw, SymInt layer, SymInt design, SymInt rank) "
    "-> Tensor",
)
def _normals(ids: Tensor, seed: int, draw: int, layer: int, design: int, rank: int) -> Tensor:
    """Noise(seed, draw, design).normal(layer, ids, rank), ids of any shape: (*ids.shape, rank)."""
    eps = Noise(seed & MASK, draw, design).normal(layer, ids.reshape(-1), rank)
    return eps.view(*ids.shape, rank).to(ids.device)


@_normals.register_fake
def _(ids: Tensor, seed: int, draw: int, layer: int, design: int, rank: int) -> Tensor:
    return ids.new_empty(*ids.shape, rank, dtype=torch.float32)


@_normals.register_vmap
def _(info: Any, in_dims: Any, ids: Tensor, *numbers: int) -> tuple[Tensor, int]:
    return torch.ops.scalabl_ref.normals(ids.movedim(in_dims[0], 0), *numbers), 0


@torch.library.custom_op(
    "scalabl_ref::subspace_lora_linear",
    mutates_args=(),
    schema=f"({_INPUTS}, float scaling, {_NOISE}) -> Tensor",
)
def _registered(*arguments: Any) -> Tensor:
    """`subspace_lora_linear` with its noise in numbers: the fields of `Inputs` and of `Draws`."""
    t, draws = Inputs(*arguments[:8]), Draws(*arguments[8:])
    core = _core_for(t, draws)
    return _composition(t, draws) if core is None else _native_forward(core, t, draws, False)[0]


@_registered.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(
    "scalabl_ref::subspace_lora_linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, {_INPUTS}, float scaling, {_NOISE}, bool[] wanted) -> Tensor[]",
)
def _registered_backward(grad_y: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of the seven inputs; an empty tensor for one that is not wanted."""
    t, draws, wanted = Inputs(*arguments[:8]), Draws(*arguments[8:-1]), arguments[-1]
    core = _core_for(t, draws)
    if core is None:
        out = _composed_gradients(grad_y, t, draws, wanted)
    else:
        out = _native_gradients(core, grad_y, t, None, draws, wanted)
    return [grad_y.new_empty(0) if g is None else g for g in out]


@_registered_backward.register_fake
def _(grad_y: Tensor, *arguments: Any) -> list[Tensor]:
    inputs, wanted = arguments[:7], arguments[-1]
    return [
        t.new_empty(t.shape) if w else grad_y.new_empty(0)
        for t, w in zip(inputs, wanted, strict=True)
    ]


def _remember(ctx: Any, inputs: Any, output: Tensor) -> None:
    t, draws = Inputs(*inputs[:8]), Draws(*inputs[8:])
    ctx.save_for_backward(*t[:7], draws.ids)
    ctx.scaling, ctx.draws = t.scaling, draws._replace(ids=None)


def _differentiate(ctx: Any, grad_y: Tensor) -> Any:
    *tensors, ids = ctx.saved_tensors
    draws, wanted = ctx.draws._replace(ids=ids), list(ctx.needs_input_grad[:7])
    out = torch.ops.scalabl_ref.subspace_lora_linear_backward(
        grad_y, *tensors, ctx.scaling, *draws, wanted
    )
    return *(g if w else None for g, w in zip(out, wanted, strict=True)), *[None] * 8


_registered.register_autograd(_differentiate, setup_context=_remember)
