"""The threshold keeps its promise: over draws of the rows, and by the exact distribution."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_ref import InputError
from scalabl_ref.evaluation import threshold as module
from scalabl_ref.evaluation.threshold import (
    best_share,
    binomial_tail,
    fewest_rows,
    lower_bound,
    most_wrong,
    rows_needed,
    threshold,
)

from .. import stats
from ..tolerances import rounding

REPEATS, TARGET, LEVEL = 2000, 0.95, 0.95
GRID = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # of confidences
POPULATIONS = {  # rows, and accuracy by confidence, which is uniform but where it has ties
    "flat, just below the target": (300, lambda c: torch.full_like(c, 0.945)),
    "the same, more rows": (1000, lambda c: torch.full_like(c, 0.945)),
    "sure and wrong, 60 % at 1": (300, lambda c: torch.where(c > 0.4, 0.945, 0.7)),
    "falling": (300, lambda c: 0.6 + 0.39 * (c / 0.6).clamp(max=1)),
    "good half": (1000, lambda c: torch.where(c > 0.5, 0.97, 0.8)),
    "calibrated": (1000, lambda c: 0.5 + c / 2),
    "worst at the top": (
        300, lambda c: torch.where(c > 0.9, 0.7, torch.where(c > 0.3, 0.99, 0.85))
    ),
    "a dip": (1000, lambda c: torch.where((c - 0.65).abs() < 0.05, 0.8, 0.955)),
}  # fmt: skip


def confidence_of(name: str, uniform: torch.Tensor) -> torch.Tensor:
    return uniform.masked_fill(uniform > 0.4, 1.0) if "at 1" in name else uniform


def broken(name: str, seed: int, repeats: int, choose=threshold) -> tuple[float, float]:
    """The share of repeats whose threshold misses the target in the population, and coverage."""
    rows, accuracy = POPULATIONS[name]
    generator = torch.Generator().manual_seed(seed)
    grid = confidence_of(name, GRID)
    above = accuracy(GRID).flip(0).cumsum(0).flip(0) / torch.arange(len(GRID), 0, -1)
    misses, answered = 0, 0.0
    for _ in range(repeats):
        draws = torch.rand(2, rows, generator=generator, dtype=torch.float64)
        correct = draws[1] < accuracy(draws[0])
        found = choose(confidence_of(name, draws[0]), correct, TARGET, LEVEL)
        if found is not None:
            place = torch.searchsorted(grid, found.confidence)
            misses += float(above[place]) < TARGET - 1e-9
            answered += found.coverage
    return misses / repeats, answered / repeats


def limit(repeats: int, rate: float) -> float:
    """The share that Binomial(repeats, 1 - LEVEL) exceeds with probability `rate`."""
    count = repeats // 20
    while stats.binomial_tail(repeats, repeats - count - 1, LEVEL) > rate:  # P(X > count)
        count += 1
    return count / repeats


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_promise_is_kept(name):
    """In 95 % of 2,000 repeats. False-failure rate 1e-6 at a true rate of .05; a rate of .11 is
    seen with a probability of .999."""
    assert broken(name, 7, REPEATS)[0] <= limit(REPEATS, 1e-6)


def test_what_the_simulation_can_see():
    seen = round(limit(REPEATS, 1e-6) * REPEATS)
    assert 1 - stats.binomial_tail(REPEATS, seen, 0.11) > 0.999


def best_of_all(confidence, right, accuracy, level):
    """Without a correction for the search: the loosest of all thresholds whose bound is enough."""
    order = confidence.argsort(descending=True)
    wrong = (~right[order]).long().cumsum(0)
    found = [
        k for k in range(59, len(right) + 1)
        if wrong[k - 1] <= most_wrong(k, 1 - accuracy, 1 - level)
    ]  # fmt: skip
    if not found:
        return None
    k = found[-1]
    least = float(confidence[order[k - 1]])
    return module.Threshold(least, k / len(right), k, k - int(wrong[k - 1]), 0.0)


def test_a_search_without_correction_is_seen():
    name = "flat, just below the target"
    assert broken(name, 7, REPEATS, best_of_all)[0] > limit(REPEATS, 1e-6)


def test_the_sequence_answers_more_than_a_union_bound():
    """Which tests each candidate at 1 - level over their number, and takes the loosest."""

    def union(confidence, right, accuracy, level):
        strict, last = 1 - (1 - level) / len(module.COVERAGES), None
        for least, answered, correct in module._candidates(confidence, right, accuracy, level):
            if answered - correct <= most_wrong(answered, 1 - accuracy, 1 - strict):
                last = module.Threshold(least, answered / len(right), answered, correct, 0.0)
        return last

    ours, other = (broken("falling", 7, 300, choose)[1] for choose in (threshold, union))
    assert ours > other + 0.05


# --- what is chosen -------------------------------------------------------------------------------


def test_candidates_are_tested_from_the_strictest_on():
    """A failure ends the sequence, though a looser candidate would pass again."""
    sure = torch.arange(400, 0, -1, dtype=torch.float64) / 400
    right = torch.ones(400, dtype=torch.bool)
    assert threshold(sure, right)[:4] == (1 / 400, 1.0, 400, 400)
    right[120:140] = False
    found = threshold(sure, right)
    assert found[:4] == (281 / 400, 0.3, 120, 120)
    right[120:140], right[:10] = True, False  # among the first 100 as well, and 10 of 400 pass
    assert most_wrong(400, 0.05, 0.05) > 10 and threshold(sure, right) is None


def test_a_candidate_has_its_share_of_the_rows_and_none_more():
    """0.55 * 100 is above 55 in floats."""
    sure = torch.arange(100, 0, -1, dtype=torch.float64)
    assert threshold(sure / 100, sure > 45, 0.9, 0.9)[2:4] == (55, 55)


def test_rows_of_equal_confidence_stay_together():
    sure = torch.tensor([1.0] * 150 + [0.5] * 50, dtype=torch.float64)
    right = torch.ones(200, dtype=torch.bool)
    right[150:] = False
    assert threshold(sure, right)[:4] == (1.0, 0.75, 150, 150)
    assert threshold(torch.ones(200).double(), right) is None


def test_the_bound_is_the_target_or_more():
    sure = torch.arange(400, 0, -1, dtype=torch.float64) / 400
    right = torch.arange(400) % 100 != 7
    found = threshold(sure, right)
    assert found.bound >= 0.95 and found.right < found.answered
    assert found.bound == lower_bound(found.answered, found.right, 0.95)
    harder = threshold(sure, right, accuracy=0.99)
    assert harder is None


def test_how_many_rows_would_do():
    assert fewest_rows(0.95, 0.95) == 59 and 0.95**59 <= 0.05 < 0.95**58
    few = torch.arange(40, dtype=torch.float64)
    assert threshold(few, few >= 0) is None
    assert rows_needed(few, few >= 0) == 59
    sure = torch.arange(100, 0, -1, dtype=torch.float64)
    right = torch.arange(100) != 7
    needed = [rows_needed(sure, right, accuracy) for accuracy in (0.9, 0.95, 0.99)]
    assert needed == [243, 938, module.MOST_ROWS + 1]
    assert [rows_needed(sure, right, accuracy, 0.8) for accuracy in (0.9, 0.95)] == [113, 446]
    assert rows_needed(sure, right, 0.995) is None  # of all of them, .99 are right
    assert rows_needed(sure, torch.arange(100) < 12, 0.5) is None  # of 25, 12 are right
    assert rows_needed(sure, torch.arange(100) < 13, 0.5) == module.MOST_ROWS + 1
    assert rows_needed(sure, torch.arange(100) < 0) is None
    half = torch.arange(100) % 2 == 0
    assert rows_needed(torch.ones(100).double(), half, 0.49) is not None
    assert rows_needed(torch.ones(100).double(), half, 0.51) is None  # all of them are tied


def test_the_best_share_is_named():
    sure = torch.arange(100, 0, -1, dtype=torch.float64)
    assert best_share(sure, torch.arange(100) < 10) == (25, 10)
    assert best_share(sure, (torch.arange(100) >= 20) & (torch.arange(100) < 60)) == (60, 40)
    assert best_share(torch.ones(100).double(), torch.arange(100) < 40) == (100, 40)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_share_parts_no_rows_of_equal_confidence(seed):
    """By a loop over all confidences that there are."""
    generator = torch.Generator().manual_seed(seed)
    sure = torch.randint(9, (50,), generator=generator).double()
    right = torch.rand(50, generator=generator) < 0.3 + 0.07 * sure
    shares = []
    for least in sorted(set(sure.tolist()), reverse=True):
        chosen = [bool(r) for s, r in zip(sure, right, strict=True) if s >= least]
        if len(chosen) >= 13:  # a quarter of them
            shares.append((sum(chosen) / len(chosen), -len(chosen), sum(chosen)))
    _, rows, correct = max(shares)
    assert best_share(sure, right) == (-rows, correct)


TOLD = {  # the accuracy by confidence, which is uniform; the target
    "calibrated": (lambda c: 0.5 + c / 2, 0.8),
    "good half": (lambda c: torch.where(c > 0.5, 0.9, 0.5), 0.8),
}


@pytest.mark.parametrize("name", TOLD)
def test_the_rows_that_are_told_keep_a_threshold(name):
    """In most of 200 repeats: 100 rows that keep none, and then the told number of others.

    False-failure rate 1e-7 at a true rate of .68; a rate of .32 is missed as rarely.
    """
    accuracy, target = TOLD[name]
    assert stats.binomial_tail(200, 100, 0.68) < 1e-7
    generator = torch.Generator().manual_seed(5)

    def drawn(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        sure, luck = torch.rand(2, rows, generator=generator, dtype=torch.float64)
        return sure, luck < accuracy(sure)

    kept = tried = 0
    while tried < 200:
        few = drawn(100)
        if threshold(*few, target) is not None:
            continue
        needed = rows_needed(*few, target)
        tried += 1
        assert needed is None or needed > 100
        if needed is not None and needed <= module.MOST_ROWS:
            kept += threshold(*drawn(needed), target) is not None
    assert kept > 100


@given(
    wrong=st.lists(st.booleans(), min_size=1, max_size=120),
    ties=st.integers(1, 5),
    targets=st.lists(st.floats(0.02, 0.998), min_size=2, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_a_higher_accuracy_needs_no_fewer_rows(wrong, ties, targets):
    sure = torch.arange(len(wrong), 0, -1).div(ties, rounding_mode="floor").double()
    needed = [rows_needed(sure, ~torch.tensor(wrong), target) for target in sorted(targets)]
    numbers = [math.inf if n is None else n for n in needed]
    assert numbers == sorted(numbers) and numbers[0] > len(wrong)


def test_what_cannot_be_a_threshold_is_refused():
    sure, right = torch.ones(3).double(), torch.ones(3, dtype=torch.bool)
    for ask, message in (
        (lambda: threshold(sure, right, 1.0), "accuracy must be between 0 and 1, and is 1.0"),
        (lambda: threshold(sure, right, 0.9, 0.0), "confidence must be between 0 and 1"),
        (lambda: threshold(sure, right, math.nan), "accuracy must be between 0 and 1"),
        (lambda: threshold(sure, right[:2]), "two equally long vectors"),
        (lambda: threshold(sure[None], right[None]), r"the shapes \(1, 3\) and \(1, 3\)"),
        (lambda: rows_needed(sure, right[:2]), r"the shapes \(3,\) and \(2,\)"),
        (lambda: rows_needed(sure, right, 0.9, 1.0), "confidence must be between 0 and 1"),
        (lambda: rows_needed(sure, right, 0.0), "accuracy must be between 0 and 1, and is 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            ask()


# --- the binomial distribution --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "p"), [(1, Fraction(1, 2)), (7, Fraction(1, 20)), (60, Fraction(3, 10))]
)
def test_the_tail_is_exact(n, p):
    """Against sums of fractions."""
    total = Fraction(0)
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        assert abs(binomial_tail(n, k, float(p)) - float(total)) <= rounding(torch.float64, 64 * n)
    assert binomial_tail(n, -1, float(p)) == 0


def test_most_wrong_is_where_the_tail_passes():
    for n in (1, 58, 59, 93, 500, 2000):
        k = most_wrong(n, 0.05, 0.05)
        assert (k >= 0) == (n >= 59)
        assert binomial_tail(n, k, 0.05) <= 0.05 < binomial_tail(n, k + 1, 0.05)


def test_known_bounds():
    """All of n right: .05^(1/n). None right: 0. And the bound is where the tail is .05."""
    assert abs(lower_bound(59, 59, 0.95) - 0.05 ** (1 / 59)) < 1e-12
    assert lower_bound(5, 0, 0.95) == 0
    bound = lower_bound(100, 95, 0.95)
    assert abs(binomial_tail(100, 5, 1 - bound) - 0.05) < 1e-9
    assert 0.89 < bound < 0.91
    assert 0.9496 < lower_bound(1_000_000, 950_000, 0.95) < 0.95
