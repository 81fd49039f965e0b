"""Attention of short rows: against float64, its gradients, and where PyTorch's kernel runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalabl_ref.fast import attention
from scalabl_ref.fast.attention import SHORT, Causal, causal_attention

from ..tolerances import rounding

SHAPES = [(1, 1, 1, 1, 2), (3, 6, 2, 17, 10), (2, 9, 3, 64, 64), (5, 4, 4, 2, 7)]  # B, H, K, T, h


def inputs(shape, dtype, length: int | None = None) -> list[torch.Tensor]:
    """q, k, v with the strides that the model gives them, and a gradient of the result."""
    B, H, K, T, h = shape
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(B, length or T, n, h, generator=generator) for n in (H, K, K, H)]
    q, k, v, g = (t.to(dtype).transpose(1, 2) for t in made)
    return [*(t.requires_grad_() for t in (q, k, v)), g]


def loops(q, k, v, grad) -> list[torch.Tensor]:
    """The result and its gradients by the formula, in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    kv = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    scores = torch.einsum("bhid,bhjd->bhij", q, k[:, kv]) / q.shape[-1] ** 0.5
    later = torch.arange(q.shape[2])[:, None] < torch.arange(q.shape[2])
    y = scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, kv]
    return [y, *torch.autograd.grad(y, (q, k, v), grad.double())]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", SHORT)
def test_result_and_gradients_equal_the_formula(shape, dtype):
    """Within some float32 roundings of a sum over the tokens, and one of the dtype."""
    *qkv, g = inputs(shape, dtype)
    y = causal_attention(*qkv)
    assert type(y.grad_fn).__name__ == "CausalBackward"
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for mine, right in zip((y, *torch.autograd.grad(y, qkv, g)), loops(*qkv, g), strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        bound = rounding(wide, 32 + shape[3]) * right.abs().max().clamp(min=1)
        bound = bound + rounding(dtype, 1) * right.abs()
        assert ((mine.double() - right).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_rows_are_pytorchs(dtype):
    for length, own in ((SHORT[dtype], True), (SHORT[dtype] + 1, False)):
        *qkv, _ = inputs((1, 2, 1, 1, 8), dtype, length)
        assert (type(causal_attention(*qkv).grad_fn).__name__ == "CausalBackward") == own


def test_other_calls_are_pytorchs():
    """Without gradients its kernel is as fast. Autocast and transforms change the products."""
    *qkv, _ = inputs(SHAPES[1], torch.float32)
    assert attention.serves(*qkv)
    assert not attention.serves(*(t.detach() for t in qkv))
    with torch.no_grad():
        assert not attention.serves(*qkv)
    with torch.autocast("cpu", torch.bfloat16):
        assert not attention.serves(*qkv)
    assert not attention.serves(qkv[0].bfloat16(), *qkv[1:])
    seen = []

    def look(q: torch.Tensor) -> torch.Tensor:
        seen.append((q.requires_grad, attention.serves(q, *qkv[1:])))
        return q.sum()

    torch.func.grad(look)(qkv[0])
    assert seen == [(True, False)]


def test_nothing_of_the_squared_length_is_kept():
    *qkv, _ = inputs(SHAPES[2], torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        causal_attention(*qkv)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in qkv]


@pytest.mark.parametrize("B, T", [(0, 5), (3, 0)])
def test_no_rows_and_no_tokens(B, T):
    *qkv, g = inputs((B, 4, 2, T, 2), torch.float32)
    y = causal_attention(*qkv)
    assert y.shape == g.shape
    assert [t.shape for t in torch.autograd.grad(y.sum(), qkv)] == [t.shape for t in qkv]


def test_second_derivatives():
    """The kernel of PyTorch has none on the CPU."""
    *qkv, _ = inputs((2, 4, 2, 3, 2), torch.float64)
    assert torch.autograd.gradgradcheck(Causal.apply, qkv)
    x = qkv[1].detach().requires_grad_()
    y = causal_attention(x, x, x)
    (once,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert (once - again).abs().max() <= rounding(torch.float64, 32)
    some = [qkv[0].detach(), qkv[1], qkv[2].detach()]
    assert torch.autograd.gradgradcheck(Causal.apply, some)
    with sdpa_kernel(SDPBackend.MATH):
        right = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    assert (right - causal_attention(*qkv)).abs().max() <= rounding(torch.float64, 32)
