"""The slow truth: the method's formulas as explicit loops over Python floats (float64).

`tolist` gives these from any dtype. Nothing here is vectorised, fused or clever; every line can be
laid beside its equation in docs/method.md. `ops`, `elbo` and `predict` are tested against this file
and never imported by it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..core.noise import Noise
    from ..fast.ops import Sampling


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
    W, a, b = weight.tolist(), A.tolist(), B.tolist()
    mean, sd = s.tolist(), sigma.tolist()
    offset = [0.0] * d_out if bias is None else bias.tolist()
    out = []
    for row, vector in enumerate(x.reshape(-1, x.shape[-1]).tolist()):
        eps = [0.0] * rank
        if noise is not None:
            group = group_of_row(row, tuple(x.shape[:-1]), sampling, groups)
            eps = noise.normal(layer, torch.tensor([group]), rank)[0].tolist()
        h = [_dot(a[k], vector) * (mean[k] + sd[k] * eps[k]) for k in range(rank)]
        out += [
            _dot(W[i], vector) + offset[i] + scaling * sum(b[i][k] * h[k] for k in range(rank))
            for i in range(d_out)
        ]
    return torch.tensor(out, dtype=torch.float64).reshape(*x.shape[:-1], d_out)


def subspace_lora_linear_gradients(
    grad_y: Tensor,
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
) -> dict[str, Tensor]:
    """Gradients of sum(grad_y * y), by hand: docs/method.md, equations (1b) to (1e).

    grad_y (..., d_out); the rest as `subspace_lora_linear`. Returns float64 tensors under the names
    x, weight, bias, A, B, s, sigma, each of its argument's shape (bias (d_out,) in any case).
    """
    (d_out, d_in), rank = weight.shape, len(s)
    W, a, b = weight.tolist(), A.tolist(), B.tolist()
    mean, sd = s.tolist(), sigma.tolist()
    to_x: list[list[float]] = []
    to_W, to_A, to_B = _zeros(d_out, d_in), _zeros(rank, d_in), _zeros(d_out, rank)
    to_bias, to_s, to_sigma = [0.0] * d_out, [0.0] * rank, [0.0] * rank
    rows = zip(
        x.reshape(math.prod(x.shape[:-1]), d_in).tolist(),
        grad_y.reshape(math.prod(x.shape[:-1]), d_out).tolist(),
        strict=True,
    )
    for row, (vector, g) in enumerate(rows):
        eps = [0.0] * rank
        if noise is not None:
            group = group_of_row(row, tuple(x.shape[:-1]), sampling, groups)
            eps = noise.normal(layer, torch.tensor([group]), rank)[0].tolist()
        dh = [0.0] * rank
        for k in range(rank):
            h = _dot(a[k], vector)
            factor = scaling * (mean[k] + sd[k] * eps[k])
            d = sum(b[i][k] * g[i] for i in range(d_out))  # (1b)
            dh[k] = factor * d
            to_s[k] += scaling * h * d  # (1e)
            to_sigma[k] += scaling * h * d * eps[k]
            for j in range(d_in):
                to_A[k][j] += dh[k] * vector[j]  # (1d)
            for i in range(d_out):
                to_B[i][k] += g[i] * factor * h
        for i in range(d_out):
            to_bias[i] += g[i]
            for j in range(d_in):
                to_W[i][j] += g[i] * vector[j]
        to_x.append(
            [
                sum(W[i][j] * g[i] for i in range(d_out))
                + sum(a[k][j] * dh[k] for k in range(rank))  # (1c)
                for j in range(d_in)
            ]
        )
    lists = {
        "x": (to_x, x), "weight": (to_W, weight), "A": (to_A, A), "B": (to_B, B),
        "s": (to_s, s), "sigma": (to_sigma, sigma),
    }  # fmt: skip
    out = {n: torch.tensor(v, dtype=torch.float64).reshape(t.shape) for n, (v, t) in lists.items()}
    return {**out, "bias": torch.tensor(to_bias, dtype=torch.float64)}


def kl_forward(s: Tensor, sigma: Tensor, prior_std: float) -> float:
    """KL(q || p) of q = N(s, diag(sigma^2)) from p = N(0, prior_std^2 I), in nats."""
    total = 0.0
    for mean, sd in zip(s.tolist(), sigma.tolist(), strict=True):
        total += math.log(prior_std / sd) + (sd**2 + mean**2) / (2 * prior_std**2) - 0.5
    return total


def kl_official(s: Tensor, sigma: Tensor, prior_std: float) -> float:
    """KL(p || q), the direction that the official code computes, in nats."""
    total = 0.0
    for mean, sd in zip(s.tolist(), sigma.tolist(), strict=True):
        total += math.log(sd / prior_std) + (prior_std**2 + mean**2) / (2 * sd**2) - 0.5
    return total


def elbo(
    logits: Tensor,
    labels: Tensor,
    gaussians: list[tuple[Tensor, Tensor]],
    prior_std: float,
    beta: float,
    num_examples: int,
    kl: str = "forward",
) -> tuple[float, float, float]:
    """(loss, nll, kl) of docs/method.md, equation (4), from the class logits of one draw.

    logits (B, C), labels (B,); gaussians: (s, sigma) of every adapted layer, each (r,).
    """
    nll = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        nll -= (row[label] - _log_sum_exp(row)) / len(labels)
    function = {"forward": kl_forward, "official": kl_official}[kl]
    divergence = sum(function(s, sigma, prior_std) for s, sigma in gaussians)
    return nll + beta * divergence / num_examples, nll, divergence


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(eps), eps ~ N(0, 1): Golub and Welsch's eigenvalues, (n,) each.

    Exact for polynomials of degree up to 2n - 1.
    """
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors[0].square()


def expectation(
    function: Callable[[list[float]], float], s: Tensor, sigma: Tensor, nodes: int = 32
) -> float:
    """E function(s~), s~ ~ N(s, diag(sigma^2)), as the literal sum over a grid of nodes^r points.

    For small r. The error falls with `nodes` as fast as that of a polynomial's approximation to
    the function: tests hold 1e-10 for exponentials and softmaxes at 32 nodes.
    """
    points, weights = (t.tolist() for t in gauss_hermite(nodes))
    mean, sd = s.tolist(), sigma.tolist()
    total = 0.0
    for index in itertools.product(range(nodes), repeat=len(mean)):
        at = [mean[k] + sd[k] * points[i] for k, i in enumerate(index)]
        total += math.prod(weights[i] for i in index) * function(at)
    return total


def predictive(logits: Tensor) -> dict[str, list]:
    """The mixture over draws and its uncertainty, equations (8) and (9); logits (S, B, C).

    Keys probs (B, C), entropy, expected_entropy, mutual_information (B,), in nats.
    """
    out: dict[str, list] = {
        "probs": [], "entropy": [], "expected_entropy": [], "mutual_information": []
    }  # fmt: skip
    draws, rows, classes = logits.shape
    for b in range(rows):
        each = []
        for draw in range(draws):
            row = logits[draw, b].tolist()
            each.append([math.exp(value - _log_sum_exp(row)) for value in row])
        mixture = [sum(p[c] for p in each) / draws for c in range(classes)]
        expected = sum(_entropy(p) for p in each) / draws
        out["probs"].append(mixture)
        out["entropy"].append(_entropy(mixture))
        out["expected_entropy"].append(expected)
        out["mutual_information"].append(max(0.0, _entropy(mixture) - expected))
    return out


def _entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def _log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def _zeros(rows: int, columns: int) -> list[list[float]]:
    return [[0.0] * columns for _ in range(rows)]


def _dot(u: list[float], v: list[float]) -> float:
    return sum(p * q for p, q in zip(u, v, strict=True))


def group_of_row(
    row: int, shape: tuple[int, ...], sampling: Sampling, groups: Tensor | None
) -> int:
    """The group id of row number `row` (row-major over `shape` = x.shape[:-1])."""
    if groups is not None:
        group = groups.reshape(-1).tolist()[row // math.prod(shape[groups.dim() :])]
        return group - group % 2**32 if sampling == "batch" else group
    if sampling == "batch":
        return 0
    if sampling == "token":
        return row
    return row // math.prod(shape[1:])
