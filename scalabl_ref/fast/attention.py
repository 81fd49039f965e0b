"""Causal attention of short rows as matrix products: the fast twin of PyTorch's kernel on the CPU.

That kernel's backward pass is slow for rows of some ten tokens, above all in 16 bits. Here the
query heads that share a key head are rows of one product. Scores are float32, or float64, and are
never rounded to 16 bits. Nothing of T x T is kept for the backward pass: the probabilities are
computed again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .ops import PLAIN_TYPES, transformed

# The longest rows for which this is faster, by measurement (docs/performance.md).
SHORT = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64, torch.float64: 64}


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(h)) v over the tokens up to the query's: (B, H, T, h).

    q: (B, H, T, h); k and v: (B, K, T, h). Query head i reads kv head i // (H / K).
    """
    if serves(q, k, v):
        result: Tensor = Causal.apply(q, k, v)
        return result
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `Causal` computes with these: for gradients, short rows of one dtype, on the CPU."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (q, k, v)):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or transformed():
        return False
    plain = all(t.is_cpu and t.dtype == q.dtype and type(t) in PLAIN_TYPES for t in (q, k, v))
    return plain and 0 < q.shape[2] == k.shape[2] <= SHORT.get(q.dtype, 0)


class Causal(torch.autograd.Function):
    """`causal_attention` with its gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        rows, keys, values = grouped(q, k), grouped(k, k), grouped(v, k)
        y = torch.bmm(probabilities(rows, keys), values)  # (B K, R T, h)
        return y.view(q.shape).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        if torch.is_grad_enabled():  # with operations that can be differentiated again
            q, k, v = q.view_as(q), k.view_as(k), v.view_as(v)  # which share no history
            with sdpa_kernel(SDPBackend.MATH):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            inputs = [t for t, want in zip((q, k, v), ctx.needs_input_grad, strict=True) if want]
            each = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return tuple(next(each) if want else None for want in ctx.needs_input_grad)
        rows, keys, values, g = (grouped(t, k) for t in (q, k, v, grad))
        p = probabilities(rows, keys)
        to_values = torch.bmm(p.transpose(1, 2), g)  # (B K, T, h)
        to_p = torch.bmm(g, values.transpose(1, 2))  # (B K, R T, T)
        to_scores = to_p.sub_((p * to_p).sum(-1, keepdim=True)).mul_(p).mul_(q.shape[-1] ** -0.5)
        to_rows, to_keys = torch.bmm(to_scores, keys), torch.bmm(to_scores.transpose(1, 2), rows)
        found = ((to_rows, q), (to_keys, k), (to_values, v))
        return tuple(gradient.view(t.shape).to(t.dtype) for gradient, t in found)


def grouped(t: Tensor, k: Tensor) -> Tensor:
    """(B, H or K, T, h) as (B K, R T or T, h) of float32 or float64: R heads to a kv head."""
    wide = t.dtype if t.dtype == torch.float64 else torch.float32
    B, K, _, h = k.shape
    return t.to(wide).reshape(B * K, t.shape[1] // K * t.shape[2], h)


def probabilities(rows: Tensor, keys: Tensor) -> Tensor:
    """Each query's probabilities of the tokens up to its own: (B K, R T, T)."""
    T = keys.shape[1]
    later = rows.new_full((T, T), -math.inf).triu(1).repeat(rows.shape[1] // T, 1)  # (R T, T)
    scores = torch.baddbmm(later, rows, keys.transpose(1, 2), alpha=rows.shape[-1] ** -0.5)
    return scores.softmax(-1)
