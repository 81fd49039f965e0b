"""Metrics against their definitions in plain Python, closed forms, and the edges of the bins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalabl_ref import InputError
from scalabl_ref.evaluation import metrics

from ..stats import ZTest, binomial_tail
from ..tolerances import rounding

# A row's score is a handful of operations on numbers below 1 (logs: below 40).
ROW_TERMS = 64


@st.composite
def predictions(draw, max_rows: int = 40, min_classes: int = 1) -> tuple[Tensor, Tensor]:
    """probs (N, C) and labels (N,); often coarse, so that confidences tie and sit on bin edges."""
    rows, classes = draw(st.integers(1, max_rows)), draw(st.integers(min_classes, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        probs = torch.randn(rows, classes, generator=generator).double().mul(3).softmax(1)
    else:
        parts = draw(st.sampled_from([1, 2, 10, 15, 20]))
        picks = torch.randint(classes, (rows, parts), generator=generator)
        probs = torch.nn.functional.one_hot(picks, classes).sum(1).double() / parts
    return probs, torch.randint(classes, (rows,), generator=generator)


def top(row: list[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)  # the first of several


def bin_of(confidence: float, bins: int) -> int:
    return min(math.floor(confidence * bins), bins - 1)


def close(a: float, b: float, rows: int) -> bool:
    return abs(a - b) <= rounding(torch.float64, rows + ROW_TERMS) * max(1.0, abs(b))


# Definitions -------------------------------------------------------------------------------------


@given(predictions())
def test_accuracy_nll_brier_and_entropy_equal_loops(case):
    probs, labels = case
    rows, n = probs.tolist(), len(labels)
    hits, surprise, distance = 0, 0.0, 0.0
    for row, label in zip(rows, labels.tolist(), strict=True):
        hits += top(row) == label
        surprise += -math.log(row[label]) if row[label] else math.inf
        distance += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
    assert metrics.accuracy(probs, labels) == hits / n
    assert close(metrics.brier(probs, labels), distance / n, n)
    result = metrics.nll(probs, labels)
    assert result == surprise if math.isinf(surprise) else close(result, surprise / n, n)
    assert list(metrics.scores(probs, labels).items()) == [
        ("acc", metrics.accuracy(probs, labels)),
        ("ece", metrics.ece(probs, labels)),
        ("nll", result),
        ("brier", metrics.brier(probs, labels)),
    ]
    entropies = [-sum(p * math.log(p) for p in row if p) for row in rows]
    for a, b in zip(metrics.entropy(probs).tolist(), entropies, strict=True):
        assert close(a, b, 1)


@given(predictions(), st.integers(1, 20))
def test_ece_and_reliability_equal_loops(case, bins):
    probs, labels = case
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        members[bin_of(max(row), bins)].append((max(row), top(row) == label))
    table, expected, n = metrics.reliability(probs, labels, bins), 0.0, len(labels)
    for k, inside in enumerate(members):
        assert table.rows[k] == len(inside)
        if not inside:
            assert table.confidence[k].isnan() and table.accuracy[k].isnan()
            continue
        confidence, right = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        assert close(float(table.confidence[k]), confidence, n)
        assert close(float(table.accuracy[k]), right, n)
        expected += len(inside) / n * abs(right - confidence)
    assert close(metrics.ece(probs, labels, bins), expected, n)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, 1e300, math.inf]), st.booleans()), min_size=2
    )
)
def test_auroc_equals_all_pairs(pairs):
    positive = [score for score, label in pairs if label]
    negative = [score for score, label in pairs if not label]
    scores = torch.tensor([score for score, _ in pairs], dtype=torch.float64)
    labels = torch.tensor([int(label) for _, label in pairs])
    if not positive or not negative:
        with pytest.raises(InputError, match="both kinds"):
            metrics.auroc(scores, labels)
        return
    won = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    assert metrics.auroc(scores, labels) == won / (len(positive) * len(negative))


def test_data_sets_are_told_apart_by_each_uncertainty():
    """Outside is the positive kind: all of its entropies are larger, one information in four is."""
    inside = {"entropy": torch.tensor([0.0, 1.0]), "mutual_information": torch.tensor([0.2, 0.4])}
    outside = {"entropy": torch.tensor([2.0, 3.0]), "mutual_information": torch.tensor([0.1, 0.3])}
    expected = {"auroc_entropy": 1.0, "auroc_mutual_information": 0.25}
    assert metrics.separation(inside, outside) == expected
    probs = torch.full((3, 2), 0.5)
    assert metrics.answerable(probs, labels(0, 2, 1)).tolist() == [True, False, True]


@given(predictions())
def test_risk_coverage_equals_a_loop_over_ties(case):
    """m tied rows with e errors: j of them hold j e / m on average over their orders."""
    probs, labels = case
    ties: dict[float, list[bool]] = {}
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        ties.setdefault(max(row), []).append(top(row) != label)
    risks, errors = [], 0.0
    for _, wrong in sorted(ties.items(), reverse=True):
        for j in range(1, len(wrong) + 1):
            risks.append((errors + j * sum(wrong) / len(wrong)) / (len(risks) + 1))
        errors += sum(wrong)
    result, n = metrics.risk_coverage(probs, labels), len(labels)
    assert result.coverage.tolist() == [k / n for k in range(1, n + 1)]
    assert all(close(a, b, n) for a, b in zip(result.risk.tolist(), risks, strict=True))
    assert close(result.area, sum(risks) / n, n)


# Closed forms and edges --------------------------------------------------------------------------


def two_classes(confidences: list[float]) -> Tensor:
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack((p, 1 - p), 1)


@pytest.mark.parametrize("bins", [1, 2, 4, 8, 10, 15])
def test_a_confidence_on_an_edge_opens_its_bin(bins):
    for k in range(math.ceil(bins / 2), bins):
        edge = k / bins
        assert math.floor(edge * bins) == k  # the product is exact: the edge itself is meant
        table = metrics.reliability(
            two_classes([edge, math.nextafter(edge, 1)]), labels(0, 0), bins
        )
        assert table.rows[k] == 2
        below = math.nextafter(edge, 0)
        if below > 0.5 and below * bins < k:  # where the product does not round up to the edge
            table = metrics.reliability(two_classes([below]), labels(0), bins)
            assert table.rows[k - 1] == 1


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


def test_confidence_one_is_in_the_last_bin():
    """The official code's bins lose it. Rounding may even take it above one."""
    probs = torch.tensor([[1.0, 0.0], [1 + 2**-52, 0.0]], dtype=torch.float64)
    assert metrics.reliability(probs, labels(0, 1)).rows.tolist() == [0] * 14 + [2]
    assert metrics.ece(probs, labels(1, 1)) == 1 + 2**-53


def test_one_example():
    probs = torch.tensor([[0.2, 0.5, 0.3]])
    assert metrics.accuracy(probs, labels(1)) == 1
    assert close(metrics.ece(probs, labels(1)), 0.5, 1)
    assert close(metrics.nll(probs, labels(1)), math.log(2), 1)
    exact = 2 * rounding(torch.float32, 1)  # the row was given in float32
    assert abs(metrics.brier(probs, labels(1)) - (0.04 + 0.25 + 0.09)) <= exact
    assert metrics.risk_coverage(probs, labels(0)).area == 1
    intervals = metrics.bootstrap_intervals(probs, labels(1), replicates=3)
    assert intervals["acc"] == (1, 1)


def test_extremes():
    certain = torch.eye(3)
    assert metrics.brier(certain, labels(0, 1, 2)) == metrics.nll(certain, labels(0, 1, 2)) == 0
    assert metrics.brier(certain, labels(1, 2, 0)) == 2
    assert metrics.nll(certain, labels(0, 1, 0)) == math.inf  # not clamped
    assert metrics.bootstrap_intervals(certain, labels(0, 1, 0))["nll"] == (0, math.inf)
    assert metrics.entropy(certain).tolist() == [0, 0, 0]
    assert not metrics.entropy(certain).signbit().any()
    uniform = torch.full((1, 8), 1 / 8)
    assert close(float(metrics.entropy(uniform)), math.log(8), 1)


def test_the_first_of_tied_classes_is_predicted():
    wide = torch.full((2, 100), 0.01)
    assert metrics.accuracy(wide, labels(0, 0)) == 1 and metrics.accuracy(wide, labels(1, 99)) == 0


def test_calibrated_predictions_have_no_ece():
    """Confidence .75 and three in four right, .5 and one in two: accurate in each bin, so zero."""
    probs = two_classes([0.75] * 4 + [0.5] * 2)
    assert metrics.ece(probs, labels(0, 0, 0, 1, 0, 1)) == 0
    assert metrics.ece(probs, labels(1, 1, 1, 1, 1, 1)) == (0.75 * 4 + 0.5 * 2) / 6


def test_area_under_perfect_and_worst_order():
    """Errors last: risks 0, 0, 1/3, 2/4. Errors first: 1, 1, 2/3, 2/4."""
    probs = two_classes([0.9, 0.8, 0.7, 0.6])
    best = metrics.risk_coverage(probs, labels(0, 0, 1, 1))
    assert close(best.area, (0 + 0 + 1 / 3 + 1 / 2) / 4, 4)
    worst = metrics.risk_coverage(probs, labels(1, 1, 0, 0))
    assert close(worst.area, (1 + 1 + 2 / 3 + 1 / 2) / 4, 4)
    assert worst.risk[-1] == best.risk[-1] == 0.5


@given(predictions(), st.integers(0, 2**32))
def test_the_order_of_rows_does_not_matter(case, seed):
    probs, target = case
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    area = lambda p, y: metrics.risk_coverage(p, y).area  # noqa: E731
    for fn in (metrics.accuracy, metrics.ece, metrics.nll, metrics.brier, area):
        a, b = fn(probs, target), fn(probs[order], target[order])
        assert a == b or close(a, b, len(target))


def test_low_precision_is_accepted_and_computed_in_float64():
    probs = torch.softmax(torch.randn(64, 50, generator=torch.Generator().manual_seed(0)), 1)
    target = torch.arange(64) % 50
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = probs.to(dtype)
        picked = rounded.double()[torch.arange(64), target].log()
        assert close(metrics.nll(rounded, target), -float(picked.mean()), 64)


def test_rows_may_miss_one_by_their_rounding_and_no_more():
    """(classes + 8) units of float32, on either side."""
    for units, fine in ((10, True), (10.5, False), (9.5, True)):
        for sign in (-1, 1):
            probs = two_classes([0.5] * 3)
            probs[1, 0] += sign * units * 2.0**-23
            if fine:
                assert metrics.entropy(probs).isfinite().all()
                continue
            with pytest.raises(InputError, match="row 1: must sum to one"):
                metrics.entropy(probs)


def test_whole_numbers_are_accepted():
    certain = torch.eye(3).long()
    assert metrics.accuracy(certain, torch.tensor([0, 1, 0], dtype=torch.int32)) == 2 / 3
    assert metrics.brier(certain, torch.tensor([0, 1, 0], dtype=torch.uint8)) == 2 / 3
    assert metrics.nll(certain, torch.tensor([0, 1, 2], dtype=torch.int32)) == 0


def test_a_temperature_is_found_in_float64():
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    target = torch.arange(40) % 3
    assert metrics.fit_temperature(logits, target) == metrics.fit_temperature(
        logits.double(), target
    )
    with pytest.raises(InputError, match="logits, row 1: .infinity is no logit"):
        metrics.fit_temperature(torch.tensor([[0, 1], [math.inf, 0]]), labels(0, 1))


# Bootstrap ---------------------------------------------------------------------------------------


@given(predictions(), st.integers(1, 20), st.sampled_from([0.5, 0.95]), st.integers(0, 2**32))
def test_the_fast_bootstrap_equals_the_literal_one(case, bins, level, seed):
    probs, target = case
    fast = metrics.bootstrap_intervals(probs, target, bins, 7, level, seed)
    literal = {
        "acc": metrics.accuracy,
        "ece": lambda p, y: metrics.ece(p, y, bins),
        "nll": metrics.nll,
        "brier": metrics.brier,
    }
    for name, fn in literal.items():
        slow = metrics.bootstrap_interval(fn, probs, target, 7, level, seed)
        for a, b in zip(fast[name], slow, strict=True):
            assert a == b or close(a, b, len(target))


def test_bootstrap_follows_its_seed_and_level():
    probs = two_classes([0.6] * 50)
    target = torch.arange(50) % 3 % 2
    first, again, other = (
        metrics.bootstrap_interval(metrics.accuracy, probs, target, 200, seed=s) for s in (1, 1, 2)
    )
    torch.manual_seed(5)
    assert (
        first == again == metrics.bootstrap_interval(metrics.accuracy, probs, target, 200, seed=1)
    )
    assert first != other
    narrow = metrics.bootstrap_interval(metrics.accuracy, probs, target, 200, level=0.5, seed=1)
    assert first[0] < narrow[0] <= metrics.accuracy(probs, target) <= narrow[1] < first[1]


@pytest.mark.parametrize(
    ("replicates", "level", "expected"),
    [(100, 0.9, (4, 95)), (41, 0.5, (10, 30)), (1, 0.9, (0, 0))],
)
def test_the_ends_of_an_interval_are_order_statistics_rounded_outwards(replicates, level, expected):
    """The values 0 .. R - 1, in another order: 5 % from either end of 0 .. 99 is 4.95 and 94.05."""
    values = iter(torch.randperm(replicates, generator=torch.Generator().manual_seed(0)).tolist())
    interval = metrics.bootstrap_interval(
        lambda probs, target: next(values), two_classes([0.5]), labels(0), replicates, level
    )
    assert interval == expected


def test_bins_of_ece_are_15_unless_told():
    """Of confidences .51, .55 and .58, 10 bins hold all in one, 15 bins part them."""
    probs, target = two_classes([0.51, 0.55, 0.58]), labels(0, 1, 0)
    default, coarse = metrics.ece(probs, target), metrics.ece(probs, target, 10)
    assert default == metrics.ece(probs, target, 15) != coarse
    assert metrics.scores(probs, target)["ece"] == default
    assert metrics.reliability(probs, target).rows.shape == (15,)


def missed(seed: int, n: int) -> float:
    """By how much n 95 % intervals of the NLL miss the true NLL too often, as an exact z.

    Data sets of 100 rows whose labels follow p, 100 replicates each: percentile intervals of a mean
    of 100 bounded scores cover at least .92 of the time. Intervals that are too wide are for the
    test of the width.
    """
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    truth = float(metrics.entropy(p[None]))  # E[-log p(label)] where labels are drawn from p
    covered, probs = 0, p.expand(100, 3)
    for trial in range(n):
        target = torch.multinomial(p, 100, replacement=True, generator=generator)
        low, high = metrics.bootstrap_intervals(
            probs, target, replicates=100, seed=seed * 1000 + trial
        )["nll"]
        covered += low <= truth <= high
    return max(0.0, -normal_score(binomial_tail(n, covered, 0.92))) * COVERAGE_SD / n**0.5


COVERAGE_SD = (0.92 * 0.08) ** 0.5
COVERAGE = ZTest("bootstrap coverage", missed, 200, replay=20, thin=20, sd=COVERAGE_SD, exact=False)


def interval_ends(seed: int, n: int) -> torch.Tensor:
    """Share of the replicates that lie beyond each end of a mean's interval, less .025.

    Of n replicates of 3 n rows, and as an exact z, in units of the share's standard error.

    The interval's low end is the order statistic k = floor(.025 (n - 1)) of n means, which are
    normal; it lies below x when more than k of them do. So does the high end, counted from above.
    """
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(3 * n, 4, generator=generator).double().softmax(1)
    target = torch.randint(4, (3 * n,), generator=generator)
    ends = metrics.bootstrap_intervals(probs, target, replicates=n, seed=seed)["brier"]
    rows = (probs - torch.eye(4)[target].double()).square().sum(1)
    mean, error = float(rows.mean()), float(rows.std()) / math.sqrt(3 * n)
    beyond = [(mean - ends[0]) / error, (ends[1] - mean) / error]
    fractions = torch.special.ndtr(-torch.tensor(beyond, dtype=torch.float64)).tolist()
    k = math.floor(0.025 * (n - 1))
    scores = [normal_score(binomial_tail(n, k, f)) for f in fractions]
    return torch.tensor(scores, dtype=torch.float64) * END_SD / n**0.5


def normal_score(p: float) -> float:
    return float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))


END_SD = (0.025 * 0.975) ** 0.5
WIDTH = ZTest(
    "bootstrap width", interval_ends, 1000, count=2, replay=200, thin=20, sd=END_SD, exact=False
)


def test_bootstrap_intervals_cover():
    COVERAGE.check(seed=0)


def test_bootstrap_width_is_the_standard_error():
    WIDTH.check(seed=1)


@given(predictions(), st.integers(1, 20))
def test_the_terms_of_each_question_average_to_the_scores(case, bins):
    probs, target = case
    terms, scores = metrics.per_question(probs, target, bins), metrics.scores(probs, target, bins)
    assert list(terms) == list(scores)
    for key, column in terms.items():
        assert column.shape == target.shape
        mean = float(column.mean())
        assert mean == scores[key] or close(mean, scores[key], len(target))  # both may be infinite


# Temperature -------------------------------------------------------------------------------------


def nll_at(logits: Tensor, target: Tensor, inverse: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits * inverse, target)


@given(st.integers(20, 60), st.integers(2, 6), st.floats(0.2, 5.0), st.integers(0, 2**32))
def test_the_fitted_temperature_is_a_minimum(rows, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator).double()
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    t = metrics.fit_temperature(logits, target)
    assert isinstance(t, float)
    inverse = torch.tensor(1 / t, dtype=torch.float64, requires_grad=True)
    fitted = nll_at(logits, target, inverse)
    (slope,) = torch.autograd.grad(fitted, inverse, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, inverse)
    low, high = metrics.TEMPERATURE_RANGE
    slope, curvature = float(slope.detach()), float(curvature.detach())
    # What is left of the slope: rounding of its terms, and of 1 / T (twice) times the curvature.
    size = float(logits.abs().max())
    left = rounding(torch.float64, rows + ROW_TERMS) * size
    left += rounding(torch.float64, 4) * curvature / t
    assert abs(slope) <= left or (t == low and slope < 0) or (t == high and slope > 0)
    unscaled = nll_at(logits, target, torch.tensor(1.0))
    assert fitted <= unscaled + rounding(torch.float64, rows + ROW_TERMS) * size
    probs = logits.softmax(1)
    assert close(
        metrics.nll(metrics.apply_temperature(probs, t), target), float(fitted.detach()), rows
    )
    shifted = probs.log()  # the same up to a constant per row
    again = metrics.fit_temperature(shifted, target)
    # The two slopes differ by their rounding; a slope's error moves the root by error / curvature.
    moved = left / curvature * t * t
    assert abs(again - t) <= 4 * moved + rounding(torch.float64, 4) * t or t in (low, high)


@pytest.mark.parametrize("true", [0.25, 1.0, 3.0])
def test_a_known_temperature_is_recovered(true):
    """Logits (g, 0) and a share q right: the best temperature is g / log(q / (1 - q))."""
    gap, right, wrong = true * math.log(3), 75, 25  # softmax of (gap, 0) / true is (.75, .25)
    logits = torch.tensor([[gap, 0.0]], dtype=torch.float64).expand(right + wrong, 2)
    target = labels(*[0] * right, *[1] * wrong)
    t = metrics.fit_temperature(logits, target)
    assert abs(t / true - 1) <= rounding(torch.float64, right + wrong + ROW_TERMS)
    probs = metrics.apply_temperature(logits.softmax(1), t)
    assert close(float(probs[0, 0]), 0.75, right + wrong)


def test_temperature_limits_and_no_information():
    low, high = metrics.TEMPERATURE_RANGE
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert metrics.fit_temperature(logits, labels(0, 1)) == low  # all right: the sharper the better
    assert metrics.fit_temperature(logits, labels(1, 0)) == high
    assert metrics.fit_temperature(torch.zeros(2, 3), labels(1, 0)) == 1


def test_impossible_classes_do_not_disturb_the_temperature():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    target = labels(0, 1, 1)
    wider = torch.cat((logits, torch.full((3, 1), -math.inf)), 1)
    assert metrics.fit_temperature(wider, target) == metrics.fit_temperature(logits, target)
    with pytest.raises(InputError, match="row 2: the label has probability zero"):
        metrics.fit_temperature(wider, labels(0, 1, 2))
    scaled = metrics.apply_temperature(wider.softmax(1), 2.5)
    assert (scaled[:, 2] == 0).all() and close(float(scaled.sum()), 3, 1)


@given(predictions(), st.floats(0.1, 10))
def test_temperature_keeps_the_ranking(case, t):
    probs, target = case
    scaled = metrics.apply_temperature(probs, t)
    assert (scaled.sum(1) - 1).abs().max() <= rounding(torch.float64, ROW_TERMS)
    chosen = scaled.gather(1, probs.argmax(1, keepdim=True))[:, 0]
    assert (chosen == scaled.amax(1)).all()
    assert (metrics.apply_temperature(probs, 1.0) - probs).abs().max() <= rounding(
        torch.float64, ROW_TERMS
    )


# Bad input ---------------------------------------------------------------------------------------

GOOD, TARGET = [[0.5, 0.5], [0.25, 0.75]], [0, 1]


@pytest.mark.parametrize(
    ("probs", "target", "message"),
    [
        ([0.5, 0.5], TARGET, r"must be \(rows, classes\), and has the shape \(2,\)"),
        (torch.zeros(0, 2), [], r"must be \(rows, classes\), and has the shape \(0, 2\)"),
        ([[0.5, 0.5], [math.nan, 1]], TARGET, "probs, row 1: holds a NaN"),
        ([[0.5, 0.5], [0.5, 0.6]], TARGET, "probs, row 1: must sum to one, and sums to 1.1"),
        ([[0.5, 0.5], [-0.5, 1.5]], TARGET, "probs, row 1: a probability is negative"),
        ([[0.5, 0.5], [math.inf, 0]], TARGET, "probs, row 1: must sum to one"),
        (GOOD, [0, 2], r"labels, row 1: must be in 0\.\.1, and is 2"),
        (GOOD, [-100, 1], r"labels, row 0: must be in 0\.\.1, and is -100"),
        (GOOD, [0, 1, 1], r"labels must have the shape \(2,\)"),
        (GOOD, [0.0, 1.0], "labels must be integers"),
        (GOOD, [True, False], "labels must be integers"),
    ],
)
def test_bad_predictions_are_refused(probs, target, message):
    probs, target = torch.as_tensor(probs), torch.as_tensor(target)
    functions = (
        metrics.accuracy,
        metrics.ece,
        metrics.reliability,
        metrics.nll,
        metrics.brier,
        metrics.risk_coverage,
        metrics.bootstrap_intervals,
        lambda p, y: metrics.bootstrap_interval(metrics.nll, p, y),
    )
    for fn in functions:
        with pytest.raises(InputError, match=message):
            fn(probs, target)


def test_bad_arguments_are_refused():
    probs, target = torch.tensor(GOOD), torch.tensor(TARGET)
    for fn in (metrics.ece, metrics.reliability, metrics.bootstrap_intervals):
        with pytest.raises(InputError, match="bins must be at least 1, and is 0"):
            fn(probs, target, 0)
    for arguments in ({"replicates": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(InputError, match="bootstrap needs"):
            metrics.bootstrap_intervals(probs, target, **arguments)
    for t in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="temperature must be positive and finite"):
            metrics.apply_temperature(probs, t)
    with pytest.raises(InputError, match="logits, row 1: holds a NaN"):
        metrics.fit_temperature(torch.tensor([[0, 1], [math.nan, 0]]), target)
    with pytest.raises(InputError, match="logits, row 0: .infinity is no logit"):
        metrics.fit_temperature(torch.tensor([[math.inf, 1], [0, 0]]), target)
    with pytest.raises(InputError, match="labels, row 1: must be in"):
        metrics.fit_temperature(torch.zeros(2, 2), labels(0, 5))
    with pytest.raises(InputError, match="row 1: the score is NaN"):
        metrics.auroc(torch.tensor([0, math.nan]), labels(0, 1))
    with pytest.raises(InputError, match="row 1: the label must be 0 or 1"):
        metrics.auroc(torch.zeros(2), labels(0, 2))
    with pytest.raises(InputError, match="two equally long vectors"):
        metrics.auroc(torch.zeros(2), labels(0, 1, 1))
