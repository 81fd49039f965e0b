"""Calibrated statistics: every assertion of the suite about chance is a record of one registry.

A record states n, its false-failure rate (how often it fails what is right) and the smallest
discrepancy that it sees with power .999; limit and discrepancy are computed from n and the rate.
Seeds are fixed, so that a test that passes once always passes; the rate says how likely a right
program was to be stuck with an unlucky seed. test_stats.py holds the sum of all rates below BUDGET
and replays every record under other seeds, with and without its smallest discrepancy.

To add one, write a function of (seed, n), register it where it stands, and check it in a test:

    def products(seed: int, n: int) -> float:
        a, b = Noise(seed, 0).normal(0, n, 2).double().T
        return float((a * b).mean())

    PRODUCTS = ZTest("products of two normals", products, n=100_000, sd=1.0)

    def test_products():
        PRODUCTS.check(seed=6)

The function must use independent draws for different seeds. What it returns is said by each class.
`python -m tests.test_stats 10000 products` then prints its row of docs/verification.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from scalabl_ref.verify.checks import normal_limit

BUDGET = 1e-6  # of the whole suite: the sum of the false-failure rates of its assertions
RATE = 1e-8  # of one assertion, unless it says otherwise
POWER = 0.999
Z_POWER = normal_limit(2 * (1 - POWER))  # P(z < -Z_POWER) = 1 - POWER

REGISTRY: dict[str, Assertion] = {}


@dataclass(frozen=True)
class Assertion:
    """One assertion about chance: its statistic must not exceed its limit.

    sample: (seed, n) to the data. count: comparisons in it, which share the rate.
    replay: the n of replays, where that of the assertion takes too long (a small n is the harder
    case, since limits rest on what holds for large n). thin: one replay for so many of the others.
    exact: the rate is met, not only kept.
    """

    name: str
    sample: Callable[[int, int], Any]
    n: int
    rate: float = RATE
    count: int = 1
    replay: int | None = None
    thin: int = 1
    exact: bool = True

    def __post_init__(self) -> None:
        assert self.name not in REGISTRY, f"two assertions are called {self.name}"
        REGISTRY[self.name] = self

    def check(self, seed: int) -> None:
        got, limit = self.statistic(self.sample(seed, self.n), self.n), self.limit(self.n)
        assert got <= limit, (
            f"{self.name}: {got:.4g} is above the limit {limit:.4g} (n = {self.n}, false-failure "
            f"rate {self.rate:g}, sees {self.smallest(self.n):.2g} with power {POWER})"
        )

    def limit(self, n: int, rate: float | None = None) -> float:
        """What the statistic of n values exceeds with probability `rate`."""
        return self._limit(n, (self.rate if rate is None else rate) / self.count)

    def smallest(self, n: int) -> float:
        """The smallest discrepancy that n values show with power .999."""
        raise NotImplementedError

    def statistic(self, data: Any, n: int) -> float:
        raise NotImplementedError

    def inject(self, data: Any, discrepancy: float) -> Any:
        """The data with a discrepancy in the first of the comparisons."""
        raise NotImplementedError

    def _limit(self, n: int, rate: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class ZTest(Assertion):
    """Means of n values against their expectations.

    sample returns mean minus expectation, a number or (count,) of them. sd, skew: of one value.
    The discrepancy is that of the mean.
    """

    sd: float = 1.0
    skew: float = 0.0

    def statistic(self, data: float | Tensor, n: int) -> float:
        means = torch.as_tensor(data, dtype=torch.float64)
        assert means.numel() == self.count
        return float(means.abs().max()) * math.sqrt(n) / self.sd

    def smallest(self, n: int) -> float:
        return (self.limit(n) + Z_POWER) * self.sd / math.sqrt(n)

    def inject(self, data: float | Tensor, discrepancy: float) -> Tensor:
        means = torch.as_tensor(data, dtype=torch.float64).flatten().clone()
        means[0] += discrepancy
        return means

    def _limit(self, n: int, rate: float) -> float:
        return _skewed_limit(self.skew / math.sqrt(n), rate)


@dataclass(frozen=True)
class KSTest(Assertion):
    """Kolmogorov-Smirnov distance of n values from their distribution; sample returns F(value).

    The limit is that of Dvoretzky, Kiefer and Wolfowitz with Massart's constant, for every n. At
    the point where two distributions differ by D the empirical one is binomial, with a standard
    deviation of at most 1 / (2 sqrt n).
    """

    def statistic(self, data: Tensor, n: int) -> float:
        cdf, steps = data.sort().values, torch.arange(n + 1, dtype=torch.float64) / n
        return float(torch.maximum((cdf - steps[:-1]).abs().max(), (cdf - steps[1:]).abs().max()))

    def smallest(self, n: int) -> float:
        return self.limit(n) + Z_POWER / (2 * math.sqrt(n))

    def inject(self, data: Tensor, discrepancy: float) -> Tensor:
        """All of [1/2 - D, 1/2] moved to 1/2: a distribution at distance D, hard to see there."""
        return torch.where((data > 0.5 - discrepancy) & (data < 0.5), 0.5, data)

    def _limit(self, n: int, rate: float) -> float:
        return math.sqrt(math.log(2 / rate) / (2 * n))


@dataclass(frozen=True)
class ChiSquare(Assertion):
    """Pearson's statistic of n cell numbers against their probabilities; sample: (count, n) int64.

    shares: the probabilities, if they are not equal; each odd cell's is at least that of the even
    one before it. The discrepancy w is the root mean square of the cells' relative errors. The
    statistic is then chi-square with noncentrality n w^2; a normal of its mean and variance stands
    in for it, whose lower tail is the heavier one.
    """

    cells: int = 256
    shares: tuple[float, ...] = ()

    def statistic(self, data: Tensor, n: int) -> float:
        rows = data.reshape(self.count, n)
        counts = torch.stack([torch.bincount(row, minlength=self.cells) for row in rows]).double()
        assert counts.shape == (self.count, self.cells)
        shares = self.shares or [1 / self.cells] * self.cells
        expected = n * torch.tensor(shares, dtype=torch.float64)
        return float(((counts - expected).square() / expected).sum(1).max())

    def smallest(self, n: int) -> float:
        """With excess = limit - freedom: x - z sqrt(2 freedom + 4 x) = excess, solved for x."""
        freedom, z = self.cells - 1, Z_POWER
        excess = self.limit(n) - freedom
        x = excess + 2 * z * z + z * math.sqrt(4 * z * z + 4 * excess + 2 * freedom)
        return math.sqrt(x / n)

    def inject(self, data: Tensor, discrepancy: float) -> Tensor:
        """The share w of every odd cell moved to the even one before it."""
        rows = data.reshape(self.count, -1).clone()
        chosen = torch.arange(rows.shape[1], dtype=torch.float64) * 0.6180339887498949 % 1
        rows[0] -= (chosen < discrepancy) * (rows[0] % 2)
        return rows

    def _limit(self, n: int, rate: float) -> float:
        return _chi_square_limit(self.cells - 1, rate)


@cache
def _chi_square_limit(freedom: int, rate: float) -> float:
    """x with P(chi-square > x) = rate; Laurent and Massart (2000), lemma 1, bounds it."""
    bound, half = math.log(1 / rate), torch.tensor(freedom / 2, dtype=torch.float64)

    def tail(x: float) -> float:
        return float(torch.special.gammaincc(half, torch.tensor(x / 2, dtype=torch.float64)))

    return _root(tail, rate, 0.0, freedom + 2 * math.sqrt(freedom * bound) + 2 * bound)


@cache
def _skewed_limit(skew: float, rate: float) -> float:
    """t with P(|z| > t) = rate for a nearly normal z: Cramer's first correction for skewness.

    The upper tail is that of a normal times exp(skew t^3 / 6), the lower one times its inverse.
    """

    def tail(t: float) -> float:
        return math.erfc(t / math.sqrt(2)) * math.cosh(skew * t**3 / 6)

    return _root(tail, rate, 0.0, 2 * normal_limit(rate))


def _root(tail: Callable[[float], float], rate: float, low: float, high: float) -> float:
    """x in [low, high] where a falling function takes the value `rate`, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > rate else (low, middle)
    return high


def binomial_tail(n: int, k: int, p: float) -> float:
    """P(X <= k) of X ~ Binomial(n, p), 0 < p < 1."""
    top, odds = math.lgamma(n + 1) + n * math.log1p(-p), math.log(p) - math.log1p(-p)
    terms = (
        top - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * odds for i in range(min(k, n) + 1)
    )
    return math.fsum(math.exp(term) for term in terms)
