"""Gradients of anybody's function against central differences, with bounds that follow from them.

For each input v of a function f, directions d and u are drawn. By the adjoint identity

    <u, J d> = <J' u, d>

the left side is the directional derivative of <u, f>, here by central differences, and J' u is the
gradient that the function gives. Where the two differ, bisection finds an element that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..support.errors import InputError

EPS = torch.finfo(torch.float64).eps


class GradientCheck(NamedTuple):
    """The gradient of one input.

    worst: the largest error over its bound; above 1 the check has failed. element: an index whose
    derivative is wrong; got and expected: the function's derivative there, and the right one. The
    three are None if the check passed. They are None too if the function gives no gradient of the
    input: then worst is infinite, and note says so.
    """

    name: str
    worst: float
    element: tuple[int, ...] | None = None
    got: float | None = None
    expected: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.worst <= 1.0


def check_grads(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    affine: tuple[str, ...] = (),
    roundings: int = 1000,
    directions: int = 4,
    seed: int = 0,
) -> list[GradientCheck]:
    """Check the gradient of `function(**inputs)` by autograd for each floating-point tensor.

    inputs: arguments by name; those that are checked are float64. The function returns one float64
    tensor, is smooth near the inputs, and gives equal bits for equal inputs (noise by `Noise`, not
    by a global generator). affine: names of inputs in which it is affine, such as x, B and s of
    `subspace_lora_linear`: their differences have no error of truncation, so the bound is that of
    rounding alone. roundings: a bound on the error of each element of the result, in units of
    2^-52 times its largest magnitude. directions: pairs (d, u) for each input.

    The bound. The difference quotients D(h) and D(2h) of fourth order have truncation errors e and
    about 16 e. So e is about |D(2h) - D(h)| / 15; the bound has twice that. Rounding adds at most
    1.5 / h times the error of <u, f>. h is 2^-9 of the largest magnitude of the input, or that
    magnitude where the function is affine. A relative error of 1e-7 of one of some dozens of
    derivatives is seen, and of 1e-9 where the function is affine.

    Raises InputError for inputs that are not float64, and for a function that is not deterministic,
    or whose result is not a float64 tensor.

    >>> import torch
    >>> from scalabl_ref.verify.gradients import check_grads
    >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> [check.passed for check in check_grads(lambda x: x.sin() * 3, {"x": x})]
    [True]
    """
    named = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    for name, value in named.items():
        if value.dtype != torch.float64:
            raise InputError(f"{name} must be float64, not {value.dtype}")
    first = function(**inputs)
    if not isinstance(first, Tensor) or first.dtype != torch.float64:
        raise InputError("the function must return one float64 tensor")
    if not torch.equal(first, function(**inputs)):
        raise InputError("the function gives another result when it is called again")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, value in named.items():
        line = _Line(function, inputs, name, roundings, name in affine)
        checks = []
        for _ in range(directions):
            u = torch.randn(first.shape, generator=generator, dtype=torch.float64).to(first)
            d = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            checks.append(line.check(u, d))
        # No NaN is the largest of others.
        found.append(max(checks, key=lambda c: c.worst if c.worst == c.worst else torch.inf))
    return found


class _Line:
    """One input of a function, along which it is differentiated."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: Mapping[str, Any], name: str,
        roundings: int, affine: bool,
    ) -> None:  # fmt: skip
        self.function, self.inputs, self.name = function, inputs, name
        self.at: Tensor = inputs[name].detach()
        self.roundings, self.affine = roundings, affine

    def value(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(**{**self.inputs, self.name: v})

    def gradient(self, u: Tensor) -> Tensor | None:
        """J' u, as the function gives it; None if it gives none."""
        leaf = self.at.clone().requires_grad_()
        y = self.function(**{**self.inputs, self.name: leaf})
        return torch.autograd.grad(y, leaf, u, allow_unused=True)[0] if y.requires_grad else None

    def slope(self, u: Tensor, d: Tensor) -> tuple[float, float]:
        """<u, J d> by differences, and a bound on its error."""
        largest = float(self.at.abs().max()) or 1.0
        h = (1.0 if self.affine else 2.0**-9) * largest / (float(d.abs().max()) or 1.0)
        noise, quotients = 0.0, []
        for step in (h,) if self.affine else (h, 2 * h):
            odd = []
            for k in (1, 2):
                ahead, behind = (
                    self.value(self.at + k * step * d),
                    self.value(self.at - k * step * d),
                )
                odd.append(float((u * (ahead - behind)).sum()))
                largest = max(float(ahead.abs().max()), float(behind.abs().max()))
                noise = max(noise, EPS * self.roundings * largest * float(u.abs().sum()))
            quotients.append((8 * odd[0] - odd[1]) / (12 * step))
        truncation = 2 * abs(quotients[-1] - quotients[0]) / 15
        return quotients[0], truncation + 1.5 * noise / h

    def error(self, u: Tensor, d: Tensor, gradient: Tensor) -> float:
        """The difference of the two sides over its bound."""
        slope, bound = self.slope(u, d)
        terms = (gradient * d).abs().sum()
        return abs(float((gradient * d).sum()) - slope) / (
            bound + EPS * self.roundings * float(terms) or torch.finfo(torch.float64).tiny
        )

    def check(self, u: Tensor, d: Tensor) -> GradientCheck:
        gradient = self.gradient(u)
        if gradient is None:
            return GradientCheck(self.name, torch.inf, note="the function gives no gradient of it")
        worst = self.error(u, d, gradient)
        if worst <= 1:
            return GradientCheck(self.name, worst)
        places = torch.arange(d.numel(), device=d.device)
        while len(places) > 1:  # the half whose error is larger
            halves = places[: len(places) // 2], places[len(places) // 2 :]
            errors = []
            for half in halves:
                part = torch.zeros_like(d).flatten()
                part[half] = d.flatten()[half]
                errors.append(self.error(u, part.view(d.shape), gradient))
            places = halves[0] if errors[0] >= errors[1] else halves[1]
        index = tuple(int(i) for i in torch.unravel_index(places[0], d.shape))
        alone = torch.zeros_like(d)
        alone[index] = 1.0
        return GradientCheck(self.name, worst, index, float(gradient[index]),
                             self.slope(u, alone)[0])  # fmt: skip
