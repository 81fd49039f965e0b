"""The least confidence at which the answered rows are right at a promised rate.

A row is answered if its confidence is at least t; the others go to a human. A(t) is the accuracy
among the answered rows of the population. From n labelled rows, drawn from it at random and used
for nothing else, `threshold` chooses t so that

    P(A(t) >= target) >= level                                                              (a)

over the draw of the rows; where no t is chosen, nothing is answered and nothing is promised.

The candidates are fixed beforehand, as shares of the rows: the most confident 25 %, 30 %, ...,
100 % (COVERAGES), where the first has at least so many rows as could show the target with no error
among them. A candidate passes if so few errors among its N rows would have a probability of at most
1 - level at the target: a Clopper-Pearson lower bound of at least the target. They are tested from
the strictest on, each at the full 1 - level, up to the first that fails; the last one that passes
is taken. This is fixed-sequence testing, as in Learn then Test. The order costs nothing: let t* be
the first threshold, from the strictest on, below which the target is missed. A broken promise needs
a pass of the first candidate at or below t*. Given their number, the answered rows above t* are
independent draws with the accuracy A(t*) <= target, so that this one test passes with a probability
of at most 1 - level. Rows between the candidate and t* do not help it, if A falls with t, as a
confidence that is worth having makes it. If it does not, (a) holds to the error of one step of the
candidates; tests/evaluation/test_threshold.py measures it there as well.

A union bound over the candidates would need fewer assumptions and more rows. The strictest
candidate is not smaller than 25 % because a sequence that starts with few rows ends at their
first error.

Sources: Clopper and Pearson 1934; Angelopoulos et al. 2021 (arXiv:2110.01052), Learn then Test;
Geifman and El-Yaniv 2017 (arXiv:1705.08500), which takes the union bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.errors import InputError

COVERAGES = range(25, 101, 5)  # percent
USUAL = (0.9, 0.95, 0.99)  # accuracies of which reports and `scalabl threshold` tell
MOST_ROWS = 1_000_000  # that `rows_needed` proposes
POWER = 0.8  # probability of a threshold with as many rows as `rows_needed` proposes


class Threshold(NamedTuple):
    """confidence: the least one that is answered. coverage: the share of the rows so confident.

    answered, right: how many of the rows that are, and how many of those are right. bound: the
    Clopper-Pearson lower bound of their accuracy, at the level.
    """

    confidence: float
    coverage: float
    answered: int
    right: int
    bound: float


def threshold(
    confidence: Tensor, right: Tensor, accuracy: float = 0.95, level: float = 0.95
) -> Threshold | None:
    """(a): the threshold that answers most among those that pass; None if none does.

    confidence: (N,) float64. right: (N,) bool. accuracy: the target. level: of the promise. Raises
    InputError for a target or level outside (0, 1), or if the two vectors do not fit.

    >>> import torch
    >>> from scalabl_ref.evaluation.threshold import threshold
    >>> sure = torch.arange(200, 0, -1) / 200
    >>> found = threshold(sure, torch.arange(200) < 175, accuracy=0.9)
    >>> found.coverage, found.right, round(found.bound, 3)
    (0.9, 175, 0.942)
    """
    best = None
    for least, answered, correct in _candidates(confidence, right, accuracy, level):
        if answered - correct > most_wrong(answered, 1 - accuracy, 1 - level):
            break
        best = least, answered, correct
    if best is None:
        return None
    least, answered, correct = best
    bound = lower_bound(answered, correct, level)
    return Threshold(least, answered / len(right), answered, correct, bound)


def rows_needed(
    confidence: Tensor, right: Tensor, accuracy: float = 0.95, level: float = 0.95
) -> int | None:
    """About how many rows in all, more than these, give a threshold with the probability POWER.

    It is assumed that the same share of more rows, the most confident first, is right about as
    often as here, and at least as often as a larger share. One wrong answer is added to each share:
    among few rows, the share without errors is the one with most luck. The sequence ends at its
    first failure, so that its first candidate must pass. Returns None if no number would do: no
    share from the first of COVERAGES on is right more often than `accuracy`. A number above
    MOST_ROWS means no more than that. A higher accuracy never needs fewer rows. Arguments as for
    `threshold`.
    """
    _check(confidence, right, accuracy, level)
    rows, fewest = len(right), fewest_rows(accuracy, level)
    if right.all():
        return max(rows + 1, fewest)
    wrong, least = _wrong(confidence, right), _rows_of(COVERAGES[0], rows)
    counts = torch.arange(1, rows + 1)
    if (wrong / counts)[least - 1 :].min() >= 1 - accuracy:
        return None
    rates = ((wrong + 1) / (counts + 1)).flip(0).cummin(0).values.flip(0)
    for count in _proposals(rows, fewest) if rates[least - 1] < 1 - accuracy else ():
        first = max(_rows_of(COVERAGES[0], count), fewest)
        rate = float(rates[-(-first * rows // count) - 1])  # of the same share of these rows
        if binomial_tail(first, most_wrong(first, 1 - accuracy, 1 - level), rate) >= POWER:
            return count
    return max(rows, MOST_ROWS) + 1


def _proposals(rows: int, fewest: int) -> list[int]:
    """Numbers of rows above `rows`, about 5 % apart, from the fewest on, with that one."""
    count, found = rows + 1, {max(rows + 1, fewest)}
    while count <= MOST_ROWS:
        found.add(max(count, fewest))
        count = math.ceil(1.05 * count)
    return sorted(found)


def best_share(confidence: Tensor, right: Tensor) -> tuple[int, int]:
    """The most confident rows that are right most often, at least the first of COVERAGES: how many
    they are, and how many of them are right. Arguments as for `threshold`."""
    wrong, least = _wrong(confidence, right), _rows_of(COVERAGES[0], len(right))
    rows = least + int((wrong / torch.arange(1, len(right) + 1))[least - 1 :].argmin())
    return rows, rows - int(wrong[rows - 1])


def _wrong(confidence: Tensor, right: Tensor) -> Tensor:
    """(N,) float64: how many of the k + 1 most confident rows are wrong; infinite for a k that
    would part rows of equal confidence."""
    confidence, order = confidence.double().sort(descending=True)
    wrong = (~right[order]).double().cumsum(0)
    wrong[:-1][confidence[:-1] == confidence[1:]] = math.inf
    return wrong


def fewest_rows(accuracy: float, level: float) -> int:
    """How many rows, all of them right, show that the accuracy is at least this."""
    return math.ceil(math.log1p(-level) / math.log(accuracy))


def check_rates(accuracy: float, level: float) -> None:
    """Raise InputError unless both are between 0 and 1."""
    for name, value in (("accuracy", accuracy), ("confidence", level)):
        if not 0 < value < 1:
            raise InputError(f"{name} must be between 0 and 1, and is {value}")


def _check(confidence: Tensor, right: Tensor, accuracy: float, level: float) -> None:
    check_rates(accuracy, level)
    if confidence.dim() != 1 or confidence.shape != right.shape:
        raise InputError(
            f"confidence and right must be two equally long vectors, and have the shapes "
            f"{tuple(confidence.shape)} and {tuple(right.shape)}"
        )


def _rows_of(percent: int, rows: int) -> int:
    """At least this share of the rows, and exactly it where it is a whole number."""
    return math.ceil(percent * rows / 100)


def _candidates(
    confidence: Tensor, right: Tensor, accuracy: float, level: float
) -> Iterator[tuple[float, int, int]]:
    """The least confidence, the rows, and the right ones of each candidate, the strictest first.

    Rows of equal confidence are answered together or not at all.
    """
    _check(confidence, right, accuracy, level)
    confidence, order = confidence.double().sort(descending=True)
    correct, rows = right[order].long().cumsum(0), len(right)
    last = None
    for percent in COVERAGES:
        place = max(_rows_of(percent, rows), fewest_rows(accuracy, level))
        if place > rows:
            return
        least = float(confidence[place - 1])
        if least != last:
            answered = int((confidence >= least).sum())
            yield least, answered, int(correct[answered - 1])
        last = least


# --- the binomial distribution --------------------------------------------------------------------


def binomial_tail(n: int, k: int, p: float) -> float:
    """P(X <= k) of X ~ Binomial(n, p), 0 < p < 1, summed in logs."""
    if k < 0:
        return 0.0
    i = torch.arange(min(k, n) + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    logs = ways + i * math.log(p) + (n - i) * math.log1p(-p)
    return min(1.0, float(torch.logsumexp(logs, 0).exp()))


@lru_cache(maxsize=100_000)
def most_wrong(n: int, rate: float, alpha: float) -> int:
    """The largest k with P(X <= k) <= alpha of X ~ Binomial(n, rate); -1 if there is none."""
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if binomial_tail(n, middle, rate) <= alpha else (low, middle)
    return low


def lower_bound(n: int, right: int, level: float) -> float:
    """The p at which `right` or more of n are right with the probability 1 - level.

    Clopper and Pearson's one-sided bound. 0 if none is right.
    """
    if right == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        less = binomial_tail(n, n - right, 1 - middle) <= 1 - level  # so few wrong is improbable
        low, high = (middle, high) if less else (low, middle)
    return low
