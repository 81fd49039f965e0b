"""Frozen weights in 8 or 4 bits: dequantised for a product, again for its gradient, never kept.

    int8    W[o, i] = code[o, i] * scale[o]                       code in -127 .. 127
    nf4     W[o, i] = LEVELS[code[o, i]] * scale[o, i // 64]      code in 0 .. 15, two in a byte

Each code is that of the nearest value. A scale is the largest magnitude of its weights (int8: over
127), in bfloat16. The levels of nf4 (QLoRA, arXiv:2305.14314, appendix E) are quantiles of a normal
distribution, which weights resemble. Rows of nf4 are padded with zeros to a multiple of 64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.noise import Keys
from ..model.attach import Linear
from ..model.llama import Llama
from ..model.weights import block_linears
from ..support.errors import InputError
from .native import core
from .ops import SERVED, serves

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "nf4")
GROUP = 64  # nf4: weights of a row that share a scale
ROWS = 32  # at a time, so that intermediate values fit into a cache
AT_ONCE = 1 << 22  # weights that a product has at a time: more are slow to get memory for
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Codes(NamedTuple):
    """A weight (d_out, d_in) in codes; shapes and dtypes are those of `QuantizedLinear`."""

    codes: Tensor
    scale: Tensor


class QuantizedLinear(Linear):
    """A frozen linear layer whose weight is kept as codes, and dequantised only for a product.

    weight: the codes, (d_out, d_in) int8, or nf4's (d_out, padded d_in / 2) uint8, where a byte's
    low half is the first of its two. scale: (d_out, 1), or (d_out, padded d_in / 64), bfloat16.
    """

    def __init__(self, like: Linear, codes: Tensor, scale: Tensor) -> None:
        super().__init__(like.d_in, like.d_out, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias, self.adapter = like.bias, like.adapter

    def forward(self, x: Tensor, keys: Keys | None = None) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise InputError(f"x has {x.shape[-1]} columns, and the layer {self.d_in}")
        if not torch.is_grad_enabled():
            if self.adapter is None:
                return _product(x.to(product_dtype(x)), self.weight, self.scale, self.bias)
            weight = whole(self.weight, self.scale, self.d_in, product_dtype(x))
            return self.adapter(x, weight, self.bias, keys)
        y = _Product.apply(x.to(product_dtype(x)), self.weight, self.scale)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if self.adapter is None else y + self.adapter.update(x.to(y.dtype), keys)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: its own, or the one that autocast gives it."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def whole(codes: Tensor, scale: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    """The weight (d_out, d_in) in a floating-point dtype, in which scales are multiplied.

    The native core makes the same bits, where it serves (`ops.serves`). Raises InputError if
    codes or scales are not those of d_in columns.
    """
    nf4, scale = codes.dtype == torch.uint8, scale.to(dtype)
    groups = -(-d_in // GROUP) if nf4 else 1
    width = groups * GROUP if nf4 else d_in  # of a row of codes
    if codes.shape[1] != (width // 2 if nf4 else width) or scale.shape[1] != groups:
        raise InputError(f"codes {list(codes.shape)} and scales {list(scale.shape)} do not fit "
                         f"{d_in} columns")  # fmt: skip
    if codes.is_cpu and codes.stride(1) == scale.stride(1) == 1 and serves(scale):
        sizes = len(codes), d_in, codes.stride(0), scale.stride(0)
        weight = codes.new_empty(sizes[:2], dtype=dtype)
        core().dequantize(
            SERVED[dtype], sizes, codes.data_ptr(), scale.data_ptr(),
            _levels(dtype).data_ptr() if nf4 else 0, weight.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return weight
    weight = torch.empty(len(codes), width, dtype=dtype, device=codes.device)
    parts = (t.split(ROWS) for t in (weight, codes, scale))
    for part, code, factor in zip(*parts, strict=True):
        if nf4:
            pairs = _pairs(dtype, codes.device)
            into = part.view(pairs.dtype).view(-1)
            torch.index_select(pairs, 0, code.flatten().int(), out=into)
            part.view(len(part), -1, GROUP).mul_(factor[..., None])
        else:
            part.copy_(code).mul_(factor)
    return weight[:, :d_in]


def quantize_model(model: Llama, kind: str) -> Llama:
    """Every linear layer of the blocks in 8 or 4 bits, see `quantize`; returns the model.

    Embedding, head, norms and biases stay as they are. Raises InputError for another kind, or
    if the model is quantised already.
    """
    if model.quantized:
        raise InputError(f"the base is quantised already, to {model.quantized}")
    for name, linear in block_linears(model):
        parent, _, child = name.rpartition(".")
        codes, scale = quantize(linear.weight.detach(), kind)
        setattr(model.layers.get_submodule(parent), child, QuantizedLinear(linear, codes, scale))
    model.quantized = kind
    return model


def quantize(weight: Tensor, kind: str) -> Codes:
    """Codes and scales of the nearest weight of that kind; see `QuantizedLinear` for the shapes.

    weight: (d_out, d_in) of any floating-point dtype, quantised a few rows at a time.

    A weight on the meta device gives codes and scales without values. Raises InputError for another
    kind.
    """
    if kind not in KINDS:
        raise InputError(f"quantize must be one of {', '.join(KINDS)}, not {kind!r}")
    d_out, d_in = weight.shape
    groups, group = (1, d_in) if kind == "int8" else (-(-d_in // GROUP), GROUP)
    shape, dtype = (d_out, d_in), torch.int8
    if kind == "nf4":
        shape, dtype = (d_out, groups * GROUP // 2), torch.uint8
    codes = torch.empty(shape, dtype=dtype, device=weight.device)
    scale = torch.empty(d_out, groups, dtype=torch.bfloat16, device=weight.device)
    if weight.is_meta:
        return Codes(codes, scale)
    between = [(low + high) / 2 for low, high in itertools.pairwise(LEVELS)]
    for w, code, top in zip(weight.split(ROWS), codes.split(ROWS), scale.split(ROWS), strict=True):
        w = F.pad(w.float(), (0, groups * group - d_in)).view(len(w), groups, group)
        top.copy_(w.abs().amax(-1) / (127 if kind == "int8" else 1))
        w = w / torch.where(top == 0, 1, top.float())[..., None]
        if kind == "int8":
            code.copy_(w.round().clamp(-127, 127).view(code.shape))
        else:
            level = torch.zeros(len(w), groups * group, dtype=torch.uint8, device=w.device)
            for threshold in between:  # many times faster than a search for each weight
                level += (w > threshold).view(level.shape)
            code.copy_(level[:, ::2] | level[:, 1::2] << 4)
    return Codes(codes, scale)


class _Product(torch.autograd.Function):
    """x W^T of a quantised W, which saves only codes and scales for its backward pass.

    Both passes make some outputs, or some columns, of W at a time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return _product(x, codes, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.d_in = inputs[0].shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        columns = GROUP * max(1, _at_once(codes) // GROUP // max(1, len(codes)))

        def product(first: int) -> Tensor:
            after = min(first + columns, ctx.d_in)
            if codes.dtype == torch.uint8:
                groups = slice(first // GROUP, -(-after // GROUP))
                byte = slice(first // 2, groups.stop * GROUP // 2)
                part = codes[:, byte], scale[:, groups]
            else:
                part = codes[:, first:after], scale
            return grad @ whole(*part, after - first, grad.dtype)

        return _joined(product(first) for first in range(0, max(1, ctx.d_in), columns)), None, None


def _at_once(codes: Tensor) -> int:
    return AT_ONCE if codes.is_cpu else 2 * codes.numel()


def _product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, some outputs at a time."""
    d_in = x.shape[-1]
    rows = max(1, _at_once(codes) // max(1, d_in))
    biases = itertools.repeat(None) if bias is None else bias.to(x.dtype).split(rows)
    return _joined(
        F.linear(x, whole(code, factor, d_in, x.dtype), b)
        for code, factor, b in zip(codes.split(rows), scale.split(rows), biases, strict=False)
    )


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Side by side."""
    first, *others = parts
    return torch.cat((first, *others), -1) if others else first


@cache
def _levels(dtype: torch.dtype) -> Tensor:
    """The levels, rounded to dtype, as the native core reads them: (16,) float32."""
    return torch.tensor(LEVELS, dtype=dtype, device="cpu").float()


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two levels of each byte of nf4 as one integer as wide as both: (256,)."""
    levels = torch.tensor(LEVELS, dtype=dtype)
    both = torch.stack((levels.repeat(16), levels.repeat_interleave(16)), -1)
    as_one = {2: torch.int32, 4: torch.int64}.get(dtype.itemsize, torch.complex128)
    return both.view(as_one).flatten().to(device)
