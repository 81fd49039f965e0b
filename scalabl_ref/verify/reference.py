"""The slow truth: the method's formulas as explicit loops over Python floats (float64).

`tolist` gives these from any dtype. Nothing here is vectorised, fused or clever; every line can be
laid beside its equation in docs/method.md. The package's own code is tested against this file. This
file shares no line with that code: it has its own noise too, from Python integers and `math`.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..core.layer import Sampling
    from ..core.noise import Noise


# --- Noise ------------------------------------------------------------------------------------


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> list[int]:
    """Four words from four counter words and two key words: docs/conformance.md, step 1."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(rounds):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ k, q & 0xFFFFFFFF, p >> 32 ^ d ^ m, p & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def box_muller(a: int, b: int) -> tuple[float, float]:
    """sqrt(-2 ln u) (cos, sin) of the angle 2 pi b / 2^32, u = (a + 1/2) / 2^32, in float64.

    The whole quarter turns come off as integers, because a rounded pi / 2 is not a zero of the
    cosine. If `math` has ln, cos and sin to one unit in the last place, a relative 2 * 2^-53, and a
    correctly rounded root, then the relative error is at most 7 * 2^-53: root 1 + 1, angle 1.4,
    cosine or sine 2, product 1.
    """
    radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
    quarter = (b + 2**29) // 2**30
    x = (b - quarter * 2**30) * math.pi / 2**31  # within an eighth of a turn of 0
    cos, sin = math.cos(x), math.sin(x)
    for _ in range(quarter):
        cos, sin = -sin, cos
    return radius * cos, radius * sin


def normal(seed: int, draw: int, layer: int, group: int, k: int) -> float:
    """The k-th component of eps of one group, rounded to float32 once.

    Equal to the noise of the package unless the exact value is within 2^-25 of a float32's last
    place of a tie between two float32 numbers. Then the two may round to different sides.
    """
    words = philox4x32([k // 4, group, layer, draw], [seed % 2**32, seed // 2**32])
    pair = words[:2] if k % 4 < 2 else words[2:]
    return float(struct.unpack("<f", struct.pack("<f", box_muller(*pair)[k % 2]))[0])


def eps_of_group(
    noise: Noise | None, layer: int, group: int, rank: int, later: int = 0
) -> list[float]:
    """eps (r,) of a group under draw `noise.draw` + later; zeros without noise."""
    if noise is None:
        return [0.0] * rank
    return [normal(noise.seed, noise.draw + later, layer, group, k) for k in range(rank)]


def group_of_row(
    row: int, shape: tuple[int, ...], sampling: Sampling, groups: Tensor | None
) -> int:
    """The group id of row number `row` (row-major over `shape` = x.shape[:-1])."""
    if sampling == "batch":
        return 0
    if groups is not None:
        return entry_of_row(row, shape, groups)
    if sampling == "token":
        return row
    return row // math.prod(shape[1:])


def entry_of_row(row: int, shape: tuple[int, ...], values: Tensor | None) -> int:
    """The entry that row number `row` takes of integers that lead the rows; 0 without any."""
    if values is None:
        return 0
    entries: list[int] = values.reshape(-1).tolist()
    return entries[row // math.prod(shape[values.dim() :])]


# --- The layer --------------------------------------------------------------------------------


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
    """y = W x + bias + c B ((A x) * (s + sigma eps)), one output number at a time: (1a).

    Same arguments and shapes as `scalabl_ref.subspace_lora_linear`; computed and returned in
    float64 whatever the inputs' dtype, without gradient.
    """
    W, b = weight.tolist(), B.tolist()
    offset = [0.0] * len(W) if bias is None else bias.tolist()
    rows = _rows(x, None, A, B, s, sigma, scaling, noise, layer, sampling, groups, draws)
    y = [[_dot(W[i], row.x) + offset[i] + _dot(b[i], row.u) for i in range(len(W))] for row in rows]
    return _tensor(y, (*x.shape[:-1], len(W)))


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
    draws: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients of sum(grad_y * y), by hand: docs/method.md, equations (1b) to (1e).

    grad_y (..., d_out); the rest as `subspace_lora_linear`. Returns float64 tensors under the names
    x, weight, bias, A, B, s, sigma, each of its argument's shape (bias (d_out,) in any case).
    """
    W_columns, A_columns = weight.T.tolist(), A.T.tolist()
    (d_out, d_in), rank = weight.shape, len(s)
    rows = _rows(x, grad_y, A, B, s, sigma, scaling, noise, layer, sampling, groups, draws)

    def over_rows(term: Callable[..., float], *sizes: int) -> Tensor:
        """sum_i term(row i, index, ...) for every index below the sizes."""
        indices = itertools.product(*map(range, sizes))
        return _tensor([sum(term(row, *index) for row in rows) for index in indices], sizes)

    to_x = [
        [_dot(W_columns[j], row.g) + _dot(A_columns[j], row.dh) for j in range(d_in)]
        for row in rows
    ]
    return {
        "x": _tensor(to_x, x.shape),  # (1c)
        "A": over_rows(lambda row, k, j: row.dh[k] * row.x[j], rank, d_in),  # (1d)
        "B": over_rows(lambda row, i, k: row.g[i] * row.u[k], d_out, rank),
        "weight": over_rows(lambda row, i, j: row.g[i] * row.x[j], d_out, d_in),
        "bias": over_rows(lambda row, i: row.g[i], d_out),
        "s": over_rows(lambda row, k: row.ds[k], rank),  # (1e)
        "sigma": over_rows(lambda row, k: row.ds[k] * row.eps[k], rank),
    }


class _Row(NamedTuple):
    """A row of the layer's input, its upstream gradient, and its symbols in (1a) to (1e)."""

    x: list[float]  # (d_in,)
    g: list[float]  # (d_out,); zeros in the forward pass
    eps: list[float]  # (r,), like u, dh and ds
    u: list[float]
    dh: list[float]
    ds: list[float]


def _rows(
    x: Tensor, grad_y: Tensor | None, A: Tensor, B: Tensor, s: Tensor, sigma: Tensor,
    scaling: float, noise: Noise | None, layer: int, sampling: Sampling, groups: Tensor | None,
    draws: Tensor | None,
) -> list[_Row]:  # fmt: skip
    """(1a) and (1b) of every row, up to the products with W and B."""
    lead, rank = tuple(x.shape[:-1]), len(s)
    A_rows, B_columns, mean, sd = A.tolist(), B.T.tolist(), s.tolist(), sigma.tolist()
    upstream = torch.zeros(*lead, len(B)) if grad_y is None else grad_y
    vectors = x.reshape(math.prod(lead), x.shape[-1]).tolist()
    gradients = upstream.reshape(math.prod(lead), len(B)).tolist()
    rows = []
    for number, (vector, g) in enumerate(zip(vectors, gradients, strict=True)):
        group = group_of_row(number, lead, sampling, groups)
        eps = eps_of_group(noise, layer, group, rank, entry_of_row(number, lead, draws))
        h = [_dot(A_rows[k], vector) for k in range(rank)]
        f = [scaling * (mean[k] + sd[k] * eps[k]) for k in range(rank)]
        u = [f[k] * h[k] for k in range(rank)]
        d = [_dot(B_columns[k], g) for k in range(rank)]
        dh = [f[k] * d[k] for k in range(rank)]
        ds = [scaling * h[k] * d[k] for k in range(rank)]
        rows.append(_Row(vector, g, eps, u, dh, ds))
    return rows


# --- The objective and the prediction ---------------------------------------------------------


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


# --- Start, schedules, metrics ----------------------------------------------------------------


def uniforms(seed: int, layer: int, count: int) -> list[float]:
    """The numbers u_i in (0, 1) behind a layer's start: words of stream 2^62 + layer."""
    stream, words = 2**62 + layer, list[int]()
    for j in range(-(-count // 4)):
        counter = [j, stream % 2**32, 2**32 - 1, stream // 2**32]
        words += philox4x32(counter, [seed % 2**32, seed // 2**32])
    return [(word + 0.5) / 2**32 for word in words[:count]]


def kaiming(uniform: Sequence[float], rank: int, d_in: int) -> list[list[float]]:
    """The matrix (r, d_in) whose SVD starts an adapter."""
    flat = [(2 * u - 1) / math.sqrt(d_in) for u in uniform[: rank * d_in]]
    return [flat[k * d_in : (k + 1) * d_in] for k in range(rank)]


def initial_log_sigma(uniform: Sequence[float], init_sigma: float) -> list[float]:
    """log sigma (r,), sigma uniform between init_sigma / sqrt 2 and init_sigma."""
    low = init_sigma / math.sqrt(2)
    return [math.log(low + (init_sigma - low) * u) for u in uniform]


def warmup(step: int, steps: int, share: float) -> float:
    """The share of a rate at this step: a rise over floor(share * steps) steps, then a fall."""
    rise = math.floor(share * steps)
    return step / rise if step < rise else (steps - step) / (steps - rise)


def kl_period(num_examples: int, batch: int) -> int:
    """M of (7)."""
    return max(1, math.floor(100 * num_examples ** (math.pi / 8) / batch))


def kl_weight(step: int, period: int) -> float:
    """pi_i of (7), from exact integers."""
    return float(Fraction(2 ** (step % period + 1), 2 ** (period + 1) - 1))


def answer(row: list[float]) -> int:
    """The first of the largest."""
    return row.index(max(row))


def bin_of(confidence: float, bins: int) -> int:
    return min(math.floor(confidence * bins), bins - 1)


def ece(probs: Tensor, labels: Tensor, bins: int) -> float:
    """The sum over bins of |right answers - sum of confidences| / N."""
    gaps = [0.0] * (bins + 1)
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        gaps[bin_of(max(row), bins)] += (answer(row) == label) - max(row)
    return sum(map(abs, gaps)) / len(labels)


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """acc, nll, brier: means over the rows."""
    out = {"acc": 0.0, "nll": 0.0, "brier": 0.0}
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        out["acc"] += (answer(row) == label) / len(labels)
        out["nll"] -= math.log(row[label]) / len(labels)
        out["brier"] += sum((p - (c == label)) ** 2 for c, p in enumerate(row)) / len(labels)
    return out


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs (a positive, another) that the scores order rightly; a tie is half."""
    rows = list(zip(scores.tolist(), positive.tolist(), strict=True))
    pairs = [(a, b) for a, one in rows if one for b, other in rows if not other]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def _entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def _log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def _dot(u: list[float], v: list[float]) -> float:
    return sum(p * q for p, q in zip(u, v, strict=True))


def _tensor(values: list, shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(shape)
