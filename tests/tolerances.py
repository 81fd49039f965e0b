"""Every tolerance of the suite, derived from the precision, the length of sums, and the data."""

from __future__ import annotations

import torch


def rounding(dtype: torch.dtype, terms: int) -> float:
    """Largest relative error of a chain of `terms` roundings: terms * eps, to first order.

    Relative to the size of what is summed; callers multiply by that where it is not about 1.
    """
    return terms * torch.finfo(dtype).eps


def op_bound(case) -> torch.Tensor:
    """Largest rounding error of each output of `subspace_lora_linear`, (..., d_out) float64.

    Standard model of floating point: a sum of n products is off by at most n eps times the sum of
    their magnitudes. W x has n = d_in; the update is a sum over r of d_in-long sums, each then
    multiplied by three more factors: n = d_in + r + 4; one more addition joins the two. Sums are
    of float32 at least; what is stored in x's dtype (W x, the update, their sum) is rounded to it.
    An adapter of x's own low dtype is exact in float32.
    """
    x, A, B, W = (getattr(case, name).double().abs() for name in ("x", "A", "B", "weight"))
    rank, d_in = A.shape
    eps = case.row_noise().abs()
    scale = case.s.double().abs() + case.sigma.double().abs() * eps  # (rows, r)
    h = (x.reshape(-1, d_in) @ A.T) * scale
    size = x.reshape(-1, d_in) @ W.T + case.scaling * h @ B.T
    if case.bias is not None:
        size = size + case.bias.double().abs()
    wide = torch.promote_types(case.x.dtype, torch.float32)
    rounded = 2 if case.x.dtype == torch.float64 else 1  # the float64 reference rounds as well
    relative = rounded * rounding(wide, d_in + rank + 5)
    if case.x.dtype != wide:
        relative += rounding(case.x.dtype, 2)  # three stores, half a unit each, and one to spare
    return (relative * size).reshape(*case.x.shape[:-1], len(W))


def op_sizes(case, direction: torch.Tensor) -> dict[str, torch.Tensor]:
    """Root of the summed squares of the terms of y and of each gradient, by name, in float64.

    What a sum comes to when signs are random; a result that cancels is smaller, its rounding
    errors are not.
    """
    names = ("x", "A", "B", "weight", "s", "sigma")
    x, A, B, W, s, sigma = (getattr(case, name).double().square() for name in names)
    x, g = x.reshape(-1, x.shape[-1]), direction.double().square().reshape(-1, len(W))
    eps = case.row_noise().square()
    factor = case.scaling**2 * (s + sigma * eps)
    h, d = x @ A.T, g @ B
    y = x @ W.T + h * factor @ B.T
    squares = {
        "y": y if case.bias is None else y + case.bias.double().square(),
        "x": g @ W + d * factor @ A,
        "weight": g.T @ x,
        "bias": g.sum(0),
        "A": (d * factor).T @ x,
        "B": g.T @ (h * factor),
        "s": case.scaling**2 * (h * d).sum(0),
        "sigma": case.scaling**2 * (h * d * eps).sum(0),
    }
    return {name: square.sqrt() for name, square in squares.items()}


def no_worse_than(
    baseline: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    terms: int,
    size: torch.Tensor,
) -> torch.Tensor:
    """Twice the largest error of an honest same-precision computation against float64.

    Where luck made that one small: twice the standard error of `terms` roundings, each half a unit
    of what the terms come to (`size`, from `op_sizes`). In float64 the truth rounds as well, so
    that only the second counts, and for both sides.
    """
    typical = torch.finfo(dtype).eps / 2 * terms**0.5 * size.max()
    if dtype == torch.float64:
        return 4 * typical
    error = (baseline.double() - expected).abs().max()
    return 2 * torch.maximum(error, typical)


def central_difference(step: float) -> float:
    """Largest error of (f(x + h) - f(x - h)) / 2h in float64, relative to the size of f and f'.

    Truncation, h^2 / 6 times the third derivative along the direction, which for the directions
    used here stays below 1000 times that size; and rounding of the two values, 100 eps each, over
    2 h.
    """
    return step**2 / 6 * 1e3 + 100 * torch.finfo(torch.float64).eps / step


def normal_ulps() -> float:
    """Largest error of a normal, in units in the last place of float32: rounding once, 1/2, and
    what `normal_double` allows before that, 2^-49 |z|, where an ulp is at least 2^-24 |z|."""
    return 0.5 + 2.0**-25


def normal_double() -> float:
    """Largest relative error of a normal before it is rounded to float32: 16 roundings of 2^-53.

    docs/conformance.md counts 11.
    """
    return 16 * 2.0**-53


def logits_bound(config, size: float, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference of two orders of evaluation of a Llama's logits whose size is `size`.

    Each block is a handful of sums: two of hidden_size products, one over the heads' dimensions,
    one over the MLP's, and a softmax, added to the stream. Rounding errors of independent sign
    grow with the root of the number of terms; a block multiplies what it inherits by about two.
    Doubled for the two sides, and again for the largest of many logits against a typical one.
    """
    terms = 3 * config.hidden_size + config.head_dim + config.intermediate_size
    blocks = config.num_hidden_layers + 1
    return 4 * blocks * 2**blocks * terms**0.5 * torch.finfo(dtype).eps * size


def curve_bound(
    steps: int, rate: float, parameters: int, gradient: float, loss: float, terms: int
) -> float:
    """Largest difference of two float32 loss curves whose gradients are one sum in two orders.

    An entry of the gradient is off by e = sqrt(terms) eps times the largest one, `gradient`. Adam
    moves its parameter by `rate` times a ratio that knows no scale: an error e of an entry g turns
    that by 2 e / |g| at most, and the loss by |g| times so much, which is 2 rate e, however small g
    is. Errors of independent sign grow with the root of the number of parameters; those of the
    steps, which Adam's averages carry on, add up. The losses themselves are sums as well.
    """
    typical = terms**0.5 * torch.finfo(torch.float32).eps
    return typical * (2 * steps * rate * parameters**0.5 * gradient + loss)
