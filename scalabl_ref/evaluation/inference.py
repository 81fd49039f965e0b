"""Tests of the difference between two methods, over replicates and test questions together.

A replicate is one training: its own subset of the training data, initial values and order. The
scores of a method are a matrix (R replicates, Q questions). All replicates and methods answer the
same questions, and row i of two methods is one replicate (one subset, one seed). So methods are
compared by D = first - second, row by row and question by question:

    D_ij = mu + a_i + b_j + e_ij    mean, replicate, question, and their interaction     (a)

Rows of (a) are exchangeable, and so are its columns: two crossed random effects. The mean of D has
the variance sd(a)^2 / R + sd(b)^2 / Q + sd(e)^2 / (R Q), which is estimated without bias by

    (1/R) var(row means)  +  (1/Q) [var(column means) - residual mean square / R]        (b)

The second term is taken as 0 where it is negative. The first has only R - 1 degrees of freedom, and
R is 3 to 10. So the interval at level 1 - alpha reaches, on both sides of the mean, to

    sqrt(t^2 (1/R) var(row means) + z^2 (1/Q) [...])                                     (c)

with t and z the quantiles at alpha / 2 of Student's t with R - 1 degrees of freedom and of the
normal distribution (for a hundred questions or more). If one of the variances is zero, the coverage
is 1 - alpha; otherwise it is about that or more. p is the alpha at which the interval ends at zero.

A bootstrap over replicates would be too narrow: by sqrt((R - 1) / R), and by normal quantiles in
place of t's. A bootstrap over questions alone leaves out the first term: it describes these trained
networks, not the methods. tests/evaluation/test_inference.py measures error rates and power.

Sources: crossed variance components, Searle, Casella and McCulloch 1992; coverage of (c), Banerjee
1960; Holm 1979; bootstraps of crossed effects, Owen 2007 (arXiv:0707.0564).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor

from ..support.errors import InputError

SMALLEST_TAIL = 1e-16  # below it, a tail is the rounding of 1 minus the rest
LARGEST_T = 1e16


class Difference(NamedTuple):
    """first - second: its mean, the ends of a two-sided interval, and p for a mean of zero."""

    mean: float
    low: float
    high: float
    p: float


class NonInferior(NamedTuple):
    """The one-sided upper limit of first - second, and p for a mean of at least the margin."""

    limit: float
    p: float


def difference(first: Tensor, second: Tensor, level: float = 0.95) -> Difference:
    """Mean of first - second with its interval and two-sided p.

    first, second: scores (R, Q), R >= 2 and Q >= 2; row i of both is replicate i, and column j is
    question j. If a difference is not finite, the interval is infinite and p = 1.

    >>> import torch
    >>> from scalabl_ref.evaluation.inference import difference
    >>> scores = torch.tensor([[0.1, 0.9, 0.4], [0.2, 1.1, 0.3]])
    >>> difference(scores, scores)
    Difference(mean=0.0, low=0.0, high=0.0, p=1.0)
    """
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, and is {level}")
    estimate = _estimate(first, second)
    mean = estimate.mean
    if not estimate.finite:
        return Difference(mean, -math.inf, math.inf, 1.0)
    reach = estimate.reach((1 - level) / 2)
    return Difference(mean, mean - reach, mean + reach, min(1.0, 2 * estimate.tail(abs(mean))))


def non_inferior(
    first: Tensor, second: Tensor, margin: float = 0.03, level: float = 0.95
) -> NonInferior:
    """One-sided test that first is worse than second by less than the margin (small is good).

    A small p is evidence for it, and the limit is below the margin if p < 1 - level. A difference
    that is not significant is no such evidence. Arguments as for `difference`.

    >>> import torch
    >>> from scalabl_ref.evaluation.inference import non_inferior
    >>> scores = torch.tensor([[0.1, 0.9, 0.4], [0.2, 1.1, 0.3]])
    >>> limit, p = non_inferior(scores, scores)
    >>> limit, p < 1e-9
    (0.0, True)
    """
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, and is {level}")
    estimate = _estimate(first, second)
    if not estimate.finite:
        return NonInferior(math.inf, 1.0)
    limit = estimate.mean + estimate.reach(1 - level)
    return NonInferior(limit, estimate.tail(margin - estimate.mean))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in the given order: Holm's step-down procedure.

    The probability that any true hypothesis has an adjusted p below alpha is at most alpha, however
    the p values depend on each other.

    >>> from scalabl_ref.evaluation.inference import holm
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class _Estimate:
    """A mean, and the two terms of (b): by replicates and by questions."""

    mean: float
    by_replicate: float
    by_question: float
    replicates: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.by_replicate)

    def reach(self, alpha: float) -> float:
        """(c) with the quantiles at alpha."""
        return self._reach(student_quantile(1 - alpha, self.replicates - 1))

    def tail(self, distance: float) -> float:
        """The one-sided alpha at which (c) is `distance`; above .5 for a negative distance."""
        if distance < 0:
            return 1 - self.tail(-distance)
        low, high = 0.0, 1.0
        while self._reach(high) < distance and high < LARGEST_T:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._reach(middle) < distance else (low, middle)
        return student_tail(low, self.replicates - 1)

    def _reach(self, t: float) -> float:
        """(c) by Student's quantile t."""
        z = NormalDist().inv_cdf(student_tail(t, self.replicates - 1))
        return math.sqrt(t * t * self.by_replicate + z * z * self.by_question)


def _estimate(first: Tensor, second: Tensor) -> _Estimate:
    if first.shape != second.shape or first.dim() != 2 or min(first.shape) < 2:
        raise InputError(
            f"two methods are compared by two matrices of one shape, of at least 2 replicates and "
            f"2 questions, and these have {tuple(first.shape)} and {tuple(second.shape)}"
        )
    d = first.double() - second.double()
    replicates, questions = d.shape
    if not d.isfinite().all():
        return _Estimate(float(d.mean()), math.inf, math.inf, replicates)
    rows, columns = d.mean(1), d.mean(0)
    rest = (replicates - 1) * (questions - 1)
    residual = float((d - rows[:, None] - columns + d.mean()).square().sum()) / rest
    by_replicate = float(rows.var()) / replicates
    by_question = max(0.0, float(columns.var()) - residual / replicates) / questions
    return _Estimate(float(d.mean()), by_replicate, by_question, replicates)


# --- Student's t ----------------------------------------------------------------------------------


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t, within some 1e-16: Abramowitz and Stegun, 26.7.3 and 26.7.4.

    >>> from scalabl_ref.evaluation.inference import student_tail
    >>> round(student_tail(1.0, 1), 6)
    0.25
    """
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    within = math.sin(angle) * total  # P(-t < T < t)
    if odd:
        within = (within + angle) * 2 / math.pi
    return max((1 - within) / 2, SMALLEST_TAIL)


def student_quantile(p: float, freedom: int) -> float:
    """t with P(T < t) = p, for p in [.5, 1), by bisection.

    >>> from scalabl_ref.evaluation.inference import student_quantile
    >>> round(student_quantile(0.975, 2), 4)
    4.3027
    """
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > 1 - p and high < LARGEST_T:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 1 - p else (low, middle)
    return high
