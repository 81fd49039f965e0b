"""Checks of the bodies that run, in the dtypes, sizes and orders that people have.

`checks` compares small cases in float32 and float64. These are the larger and the narrower ones:
16-bit results, layers of several stretches of columns, views, far positions, single padded rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..core import layer as plain_layer
from ..core.noise import Noise
from ..core.predictive import predictive
from ..evaluation import metrics
from ..fast import blocks
from ..fast.designs import DesignedNoise
from ..model import llama
from ..model.attach import Linear
from ..model.config import LlamaConfig
from .check import Check, Errors, Op, exact, ratio

HALVES = (torch.bfloat16, torch.float16)
WIDE = torch.float64
Function = Callable[[Tensor], Tensor]


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- The op ---------------------------------------------------------------------------------------


def to_nearest_even(op: Op, device: torch.device) -> Errors:
    """y = x b with ties of the last place, of the smallest and the largest numbers, at rank 1."""
    for dtype, largest in zip(HALVES, (255, 2047), strict=True):  # its bits, a whole number
        # odd / 2^k times b: many products lie halfway between two numbers of the dtype
        x = torch.arange(1, 2048, 2).to(device, dtype)[:, None]
        scale = torch.finfo(dtype).tiny / 64
        most = torch.finfo(dtype).max / largest
        for b in (1.5, 1.25, scale, 3 * scale, most, 4 * most):  # 4 most: infinite in float16 too
            A, B = (torch.tensor([[t]], device=device).to(dtype) for t in (1.0, b))
            one, zero = (torch.tensor([t], device=device).to(dtype) for t in (1.0, 0.0))
            y = op(x, zero[:, None], None, A, B, one, zero, 1.0, None)
            right = (x.double() * B.double()).to(dtype)
            yield exact(torch.equal(y, right), f"{dtype}, b = {b:.3g}")


def large_operands(device: torch.device) -> list[Tensor]:
    """x, W, A, B, s and sigma: more columns than a block, none of which a tile divides; views."""
    rows, d_in, d_out, rank = 301, 2101, 901, 13
    sizes = (rows, d_in), (d_out, d_in), (rank, d_in), (d_out, rank)
    found = []
    for i, (m, n) in enumerate(sizes):
        gaps = torch.full((m, n + 3), float("nan"))
        gaps[:, :n] = normal(m, n, seed=i) / (1, 50, 50, 1)[i]
        found.append(gaps.to(device)[:, :n])
    return [*found, normal(rank, seed=7).exp().to(device), normal(rank, seed=8).exp().to(device)]


def values_and_gradients(op: Op, operands: list[Tensor], noise: Noise) -> Iterator[Tensor]:
    x, W, *own = (t.detach().requires_grad_() for t in operands)
    y = op(x, W, None, *own, 0.5, noise, 3, "token")
    g = normal(*y.shape, seed=9).to(y)
    yield y.detach()
    yield from torch.autograd.grad(y, (x, *own), g)


def large_layers(op: Op, device: torch.device) -> Errors:
    """301 x 2101 to 901 at rank 13, in float32, near float64 with the given and other threads."""
    operands, noise = large_operands(device), Noise(5, 6)
    wide = [t.double() for t in operands]
    truth = list(values_and_gradients(plain_layer.subspace_lora_linear, wide, noise))
    threads = torch.get_num_threads()
    for count in (threads, 1 if threads > 1 else 2):
        try:
            torch.set_num_threads(count)
            found = list(values_and_gradients(op, operands, noise))
        finally:
            torch.set_num_threads(threads)
        for got, right in zip(found, truth, strict=True):
            # sums of up to 2101 terms, whose errors are of random sign: 46 last places, times 8
            size = right.square().mean().sqrt()
            yield ratio(got, right, size, 370 * torch.finfo(torch.float32).eps)


def mirrored(op: Op, device: torch.device) -> Errors:
    """An antithetic pair of draws: y(draw 0) + y(draw 1) = 2 y(mean), and the draws differ."""
    x, W, A, B, s, sigma = (t[..., :8].double()[:13] for t in large_operands(device))
    s, sigma = s[:8], sigma[:8]
    x, W, A, B = x[:, :7], W[:5, :7], A[:8, :7], B[:5, :8]
    first, second, mean = (
        op(x, W, None, A, B, s, sigma, 1.0, noise)
        for noise in (DesignedNoise(3, 0), DesignedNoise(3, 1), None)
    )
    yield ratio(first + second, 2 * mean, 100 * mean.abs().max(), torch.finfo(WIDE).eps)
    yield exact(not torch.equal(first, second), "both draws are the same")


# --- The model ------------------------------------------------------------------------------------


def block_functions(_: Op, device: torch.device) -> Errors:
    """RMSNorm, RoPE and SwiGLU and their gradients in float32 and 16 bits, near float64.

    Of normal values, and of values up to 120: exp of their negatives overflows.
    """
    for dtype, size in itertools.product((torch.float32, *HALVES), (1, 40)):
        x = size * normal(13, 70, seed=2, dtype=dtype).to(device)
        for quick, plain in twins(dtype, device):
            found, truth = value_and_slope(quick, x), value_and_slope(plain, x.double())
            for got, right in zip(found, truth, strict=True):
                yield ratio(got, right, right.abs().max(), 8 * torch.finfo(dtype).eps)


def twins(dtype: torch.dtype, device: torch.device) -> list[tuple[Function, Function]]:
    """The functions of x (13, 70) that run in a dtype, and the plain ones in float64."""
    other = normal(13, 70, seed=3, dtype=dtype).to(device)
    cos, sin = (normal(13, 1, 10, seed=i, dtype=dtype).to(device) for i in (4, 5))
    norm, wide = (llama.RMSNorm(70, 1e-5).requires_grad_(False) for _ in range(2))
    norm.weight.data = normal(70, seed=1, dtype=dtype).to(device)
    wide.weight.data = norm.weight.double()
    swiglu = llama.MLP.activation
    return [
        (lambda x: norm(x), lambda x: blocks.plain_norm(wide, x)),
        (lambda x: swiglu(x, other), lambda x: llama.swiglu(x, other.double())),
        (lambda x: swiglu(other, x), lambda x: llama.swiglu(other.double(), x)),
        (lambda x: blocks.rotate(x.view(13, 7, 10), cos, sin),
         lambda x: llama.rotate(x.view(13, 7, 10), cos.double(), sin.double())),
    ]  # fmt: skip


def few_rows(_: Op, device: torch.device) -> Errors:
    """Linear layers of one to eight rows, as in decoding, with and without bias."""
    weight, bias = normal(302, 577, seed=2) / 24, normal(302, seed=3)
    for dtype in (torch.float32, *HALVES):
        W, b = weight.to(device, dtype), bias.to(device, dtype)
        near = torch.finfo(dtype).eps + 128 * torch.finfo(torch.float32).eps
        for rows in (1, 2, 5, 8):
            x = normal(rows, 577, seed=rows, dtype=dtype).to(device)
            size = x.double().abs() @ W.double().abs().T / 16
            for start in (None, b):
                right = x.double() @ W.double().T + (0 if start is None else start.double())
                got = Linear.product(x, W, start)
                yield ratio(got, right, right.abs() + size, near, f"{dtype}, {rows} rows")


def value_and_slope(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf)
    g = normal(y.numel(), seed=6).view(y.shape).to(y)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


SHAPE = LlamaConfig(vocab_size=20, hidden_size=12, intermediate_size=16, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=4,
                    max_position_embeddings=8192)  # fmt: skip


def far_positions(_: Op, device: torch.device) -> Errors:
    """Cosines and sines of positions that are no bfloat16, rounded once, in every dtype."""
    positions = torch.tensor([[0, 257, 1023, 4097, 8191]], device=device)
    inverse = SHAPE.rope.inverse_frequencies(SHAPE.head_dim, device).double()
    angles = positions[..., None, None].double() * inverse
    angles = torch.cat((angles, angles), -1)
    for dtype in (torch.float32, *HALVES):
        model = llama.Llama(SHAPE, dtype, device)
        near = 2 * torch.finfo(torch.float32).eps * angles + torch.finfo(dtype).eps
        for got, right in zip(model.cos_sin(positions), (angles.cos(), angles.sin()), strict=True):
            yield ratio(got, right, near, 1.0)


def padding_is_not_seen(_: Op, device: torch.device) -> Errors:
    """A row alone, and the same row padded on the left, on the right and in the middle."""
    model = llama.Llama(SHAPE, WIDE, device).init_random_(std=0.3).requires_grad_(False)
    tokens = torch.tensor([[3, 1, 4, 15]], device=device)
    alone = model(tokens, last_only=True)
    for places in ((2, 3, 4, 5), (0, 1, 2, 3), (0, 2, 3, 5)):
        row = torch.zeros(1, 6, dtype=torch.int64, device=device)
        mask = torch.zeros(1, 6, dtype=torch.bool, device=device)
        row[:, places], mask[:, places] = tokens, True
        for rows in (1, 3):
            got = model(row.expand(rows, -1), mask=mask.expand(rows, -1), last_only=True)
            size = alone.abs().max().expand(rows, alone.shape[1])
            yield ratio(got, alone.expand_as(got), size, 1000 * torch.finfo(WIDE).eps,
                        f"{rows} rows, tokens at {places}")  # fmt: skip


# --- Scores ---------------------------------------------------------------------------------------


def weights_count(_: Op, device: torch.device) -> Errors:
    """(8), (9) with weights 1/4, 1/4, 1/2: as with the third draw twice."""
    logs = torch.log_softmax(3 * normal(3, 7, 4, seed=1, dtype=WIDE), -1)
    weights = torch.tensor([0.25, 0.25, 0.5], dtype=WIDE)
    found = predictive(logs, weights)._asdict()
    for name, right in predictive(logs[[0, 1, 2, 2]])._asdict().items():
        yield ratio(found[name], right, torch.ones_like(right), 1e-14, name)


def order_of_rows(_: Op, device: torch.device) -> Errors:
    """Scores of rows in another order, with many equal confidences."""
    probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]], dtype=WIDE).repeat(5, 1)
    labels = torch.arange(15) * 7 % 5 % 2
    turned = torch.arange(15).flip(0)
    for p, y in ((probs[turned], labels[turned]), (probs.roll(4, 0), labels.roll(4, 0))):
        before, after = metrics.scores(probs, labels), metrics.scores(p, y)
        for name, value in before.items():
            yield abs(after[name] - value) / 1e-14
        curves = (metrics.risk_coverage(a, b) for a, b in ((probs, labels), (p, y)))
        one, other = (curve.risk for curve in curves)
        yield ratio(other, one, torch.ones_like(one), 1e-14, "risk by coverage")
        yield abs(metrics.auroc(p[:, 0], y) - metrics.auroc(probs[:, 0], labels)) / 1e-14


BODY_CHECKS = [
    Check("16-bit results", "(1a) rounded to nearest, ties to even, in 16 bits", to_nearest_even),
    Check("large layers", "(1a) to (1e) with many columns, views, other threads", large_layers),
    Check("antithetic draws", "a draw and its mirror image", mirrored),
    Check("block functions", "RMSNorm, RoPE, SwiGLU in float32 and 16 bits", block_functions),
    Check("few rows", "y = W x + bias for as few rows as in decoding", few_rows),
    Check("far positions", "RoPE: angles of positions beyond 256, in 16 bits", far_positions),
    Check("padding", "a padded row has the logits of the row alone", padding_is_not_seen),
    Check("weighted draws", "(8), (9) with weights", weights_count),
    Check("order of rows", "scores do not depend on it, nor on how ties stand", order_of_rows),
]  # fmt: skip
