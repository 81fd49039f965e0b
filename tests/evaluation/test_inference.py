"""Differences of methods over replicates and questions: error rates by simulation, exact cases.

`python -m tests.evaluation.test_inference 2000` prints the table of docs/verification.md.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalabl_ref import InputError, metrics
from scalabl_ref.evaluation.inference import (
    difference,
    holm,
    non_inferior,
    student_quantile,
    student_tail,
)

from ..conftest import ROOT
from ..stats import ZTest, binomial_tail
from ..tolerances import rounding

TEN_DIGITS = 1e-9  # of a printed quantile; the tail, good to 1e-16, moves a quantile far less

# Simulated methods -------------------------------------------------------------------------------


def normals(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def nll_pair(
    generator: torch.Generator,
    replicates: int,
    questions: int,
    sd: float,
    mean: float = 0.0,
    own: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """NLL of two methods that differ by `mean`: shares of questions, replicates and both together.

    A question's NLL is exponential with sd 1, and both methods see its difficulty. sd: of a
    method's mean NLL over replicates; half of its variance is that of the replicate's training
    subset, which both methods share. own: sd over questions of how the methods differ on them.
    """
    difficulty = -torch.rand(1, questions, generator=generator, dtype=torch.float64).log()
    subset = normals(generator, replicates, 1)

    def method() -> Tensor:
        luck = sd * (subset + normals(generator, replicates, 1)) / math.sqrt(2)
        return difficulty + luck + 0.5 * normals(generator, replicates, questions)

    return mean + method() + own * normals(generator, 1, questions), method()


def answers(
    generator: torch.Generator, replicates: int, questions: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Probabilities of three classes by two equal methods, for each replicate; the label is 2.

    Both see a question's evidence, with noise of their own. They are overconfident, by a factor
    whose logarithm has mean .5 and sd .3 over replicates and methods.
    """
    evidence = normals(generator, questions, 3)
    evidence[:, 2] += 1
    for _ in range(replicates):
        logits = evidence + 0.5 * normals(generator, 2, questions, 3)
        factor = (0.5 + 0.3 * normals(generator, 2, 1, 1)).exp()
        first, second = (factor * logits).softmax(2)
        yield first, second


def score_pair(
    generator: torch.Generator, score: str, replicates: int, questions: int
) -> tuple[Tensor, Tensor]:
    """A score of two equal methods, of answers; see `answers`."""
    labels = torch.full((questions,), 2)
    pairs = list(answers(generator, replicates, questions))
    first, second = (
        torch.stack([metrics.per_question(pair[side], labels)[score] for pair in pairs])
        for side in (0, 1)
    )
    return first, second


def by_questions(first: Tensor, second: Tensor) -> bool:
    """Whether the replaced test tells the two apart: replicates fixed, questions resampled.

    The interval of a mean by bootstrap is normal in large samples, with the width used here.
    """
    columns = (first - second).mean(0)
    return bool(columns.mean().abs() > 1.959964 * columns.std() / math.sqrt(len(columns)))


# Rates -------------------------------------------------------------------------------------------

BOUND = 0.06  # of a rate of .05: (c) is approximate where questions and replicates both matter
RATE_SD = (BOUND * (1 - BOUND)) ** 0.5


def too_often(hits: int, n: int) -> float:
    """By how much `hits` of n exceed the share BOUND, as an exact z, in units of a mean of n."""
    p = torch.tensor(binomial_tail(n, n - hits, 1 - BOUND), dtype=torch.float64)
    return max(0.0, -float(torch.special.ndtri(p))) * RATE_SD / n**0.5


def false_positives(seed: int, n: int) -> Tensor:
    """Of identical methods with 2, 3 and 10 replicates whose sd of NLL is .07."""
    generator = torch.Generator().manual_seed(seed)
    hits = [0, 0, 0]
    for _ in range(n):
        for k, replicates in enumerate((2, 3, 10)):
            first, second = nll_pair(generator, replicates, 200, 0.07)
            hits[k] += difference(first, second).p < 0.05
    return torch.tensor([too_often(h, n) for h in hits])


def misses(seed: int, n: int) -> Tensor:
    """Intervals that miss a true difference of .1, where questions matter as much as replicates.

    With 3, 5 and 10 replicates; and one-sided limits at the margin that lie below it, with 3.
    """
    generator = torch.Generator().manual_seed(seed)
    hits = [0, 0, 0, 0]
    for _ in range(n):
        for k, replicates in enumerate((3, 5, 10)):
            own = 0.07 * math.sqrt(200 / replicates)
            pair = nll_pair(generator, replicates, 200, 0.07, 0.1, own)
            low, high = difference(*pair)[1:3]
            hits[k] += not low <= 0.1 <= high
            if k == 0:
                hits[3] += non_inferior(*pair, margin=0.1).p < 0.05
    return torch.tensor([too_often(h, n) for h in hits])


def false_positives_of_scores(seed: int, n: int) -> Tensor:
    """Of identical methods in acc, ece and brier, with 5 replicates."""
    generator = torch.Generator().manual_seed(seed)
    hits = dict.fromkeys(("acc", "ece", "brier"), 0)
    for _ in range(n):
        for score in hits:
            hits[score] += difference(*score_pair(generator, score, 5, 200)).p < 0.05
    return torch.tensor([too_often(h, n) for h in hits.values()])


ERRORS = ZTest("difference: false positives", false_positives, 500, count=3, replay=20, thin=20,
               sd=RATE_SD, exact=False)  # fmt: skip
COVERAGE = ZTest("difference: coverage", misses, 500, count=4, replay=20, thin=20, sd=RATE_SD,
                 exact=False)  # fmt: skip
OTHERS = ZTest("difference: other scores", false_positives_of_scores, 200, count=3, replay=20,
               thin=20, sd=RATE_SD, exact=False)  # fmt: skip


@pytest.mark.parametrize("record", [ERRORS, COVERAGE, OTHERS], ids=lambda record: record.name)
def test_error_rates_are_those_stated(record):
    record.check(seed=3)


# Rows of the table: replicates, sd of NLL over replicates, difference, own (sd over questions).
CASES = [
    (replicates, sd, mean, own)
    for mean, own in ((0.0, 0.0), (0.03, 0.3), (0.1, 0.3))
    for replicates in (3, 5, 10)
    for sd in (0.03, 0.1)
]
QUESTIONS = 2000


def rates(case: tuple[int, float, float, float], seed: int, n: int) -> list[float]:
    """Shares told apart, by the old test too; of intervals that cover; and found no worse."""
    replicates, sd, mean, own = case
    generator = torch.Generator().manual_seed(seed)
    found = [0, 0, 0, 0]
    for _ in range(n):
        first, second = nll_pair(generator, replicates, QUESTIONS, sd, mean, own)
        _, low, high, p = difference(first, second)
        found[0] += p < 0.05
        found[1] += by_questions(first, second)
        found[2] += low <= mean <= high
        found[3] += non_inferior(first, second).p < 0.05
    return [count / n for count in found]


def printed_table(n: int) -> str:
    lines = ["| replicates | sd of NLL | difference | told apart | questions alone | covered | "
             "no worse |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for case in CASES:
        shares = " | ".join(f"{share:.3f}" for share in rates(case, 0, n))
        lines.append(f"| {case[0]} | {case[1]:g} | {case[2]:g} | {shares} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_printed_table_holds_under_another_seed():
    """Two shares of 2000 and 300 simulations differ by less than 6.5 standard errors."""
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    for case in CASES:
        line = re.search(rf"^\| {case[0]} \| {case[1]:g} \| {case[2]:g} \| (.*) \|$", text, re.M)
        for share, again in zip(line[1].split(" | "), rates(case, 1, 300), strict=True):
            middle = (2000 * float(share) + 300 * again + 1) / 2302
            error = math.sqrt(middle * (1 - middle) * (1 / 2000 + 1 / 300))
            assert abs(float(share) - again) <= 6.5 * error, case


# Exact cases -------------------------------------------------------------------------------------


def test_student_equals_its_closed_forms():
    for t in (0.0, 0.3, 1.0, 2.5, 40.0, -1.5):
        forms = {
            1: 0.5 - math.atan(t) / math.pi,
            2: (1 - t / math.sqrt(2 + t * t)) / 2,
            4: 0.5 - 0.5 * (s := t / math.sqrt(4 + t * t)) * (1 + (1 - s * s) / 2),
        }
        for freedom, tail in forms.items():
            assert abs(student_tail(t, freedom) - tail) <= rounding(torch.float64, 16)
    for freedom, t in ((3, 3.182446305), (9, 2.262157163), (30, 2.042272456)):  # from tables
        assert math.isclose(student_quantile(0.975, freedom), t, rel_tol=TEN_DIGITS)


def test_where_only_replicates_vary_it_is_the_paired_t_test():
    """Differences 1, 2, 6 of whole replicates: mean 3, standard error sqrt(7 / 3), 2 degrees."""
    first = torch.tensor([[1.0], [2.0], [6.0]]).expand(3, 50)
    got = difference(first, torch.zeros(3, 50))
    reach = 4.302652729911275 * math.sqrt(7 / 3)
    assert math.isclose(got.mean, 3) and math.isclose(got.high - 3, reach, rel_tol=TEN_DIGITS)
    t = 3 / math.sqrt(7 / 3)
    assert math.isclose(got.p, 1 - t / math.sqrt(2 + t * t), rel_tol=TEN_DIGITS)
    limit, p = non_inferior(first, torch.zeros(3, 50), margin=10.0)
    assert math.isclose(limit, 3 + 2.919985580353726 * math.sqrt(7 / 3), rel_tol=TEN_DIGITS)
    assert math.isclose(p, student_tail(7 / math.sqrt(7 / 3), 2), rel_tol=TEN_DIGITS)
    standard = non_inferior(first, torch.zeros(3, 50))  # of the margin .03
    assert standard.limit == limit and math.isclose(
        standard.p, 1 - student_tail(2.97 / math.sqrt(7 / 3), 2), rel_tol=TEN_DIGITS
    )
    _, worse = non_inferior(first, torch.zeros(3, 50), margin=-4.0)  # as far beyond the margin
    assert math.isclose(worse, 1 - p, rel_tol=TEN_DIGITS)


def test_where_only_questions_vary_it_is_the_z_test():
    d = normals(torch.Generator().manual_seed(0), 1, 400)
    got = difference(d.expand(4, 400), torch.zeros(4, 400))
    reach = 1.959963984540054 * float(d.std()) / 20
    assert math.isclose(got.high - got.mean, reach, rel_tol=TEN_DIGITS)


def test_the_interval_is_made_of_two_variances_by_loops():
    d = [[0.3, 1.0, 0.2, 2.0], [0.1, 1.4, 0.9, 2.5], [0.9, 1.1, 0.3, 2.2]]
    rows = [sum(row) / 4 for row in d]
    columns = [sum(row[j] for row in d) / 3 for j in range(4)]
    mean = sum(rows) / 3
    rest = sum((d[i][j] - rows[i] - columns[j] + mean) ** 2 for i in range(3) for j in range(4)) / 6
    by_rows = sum((x - mean) ** 2 for x in rows) / 2 / 3
    by_columns = (sum((x - mean) ** 2 for x in columns) / 3 - rest / 3) / 4
    reach = math.sqrt(4.302652729911275**2 * by_rows + 1.959963984540054**2 * by_columns)
    got = difference(torch.tensor(d, dtype=torch.float64), torch.zeros(3, 4))
    assert math.isclose(got.mean, mean) and math.isclose(got.high - mean, reach, rel_tol=TEN_DIGITS)


@given(st.integers(2, 6), st.integers(2, 30), st.floats(0, 2), st.floats(-1, 1), st.integers(0, 99))
def test_p_and_interval_agree_and_turn_with_the_sides(replicates, questions, sd, mean, seed):
    g = torch.Generator().manual_seed(seed)
    first = mean + sd * normals(g, replicates, 1) + normals(g, replicates, questions)
    second = normals(g, 1, questions).expand(replicates, questions)
    for level in (0.9, 0.95, 0.99):
        _, low, high, p = difference(first, second, level)
        if abs(p - (1 - level)) > 1e-9:
            assert (p < 1 - level) == (low > 0 or high < 0)
        limit, p = non_inferior(first, second, 0.3, level)
        if abs(p - (1 - level)) > 1e-9:
            assert (p < 1 - level) == (limit < 0.3)
    got, turned = difference(first, second), difference(second, first)
    assert math.isclose(got.low, -turned.high, abs_tol=TEN_DIGITS) and math.isclose(got.p, turned.p)


def test_identical_answers_and_infinite_ones():
    scores = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    assert difference(scores, scores) == (0, 0, 0, 1)
    endless = scores.clone()
    endless[1, 2] = math.inf
    for first, second in ((endless, scores), (scores, endless), (endless, endless)):
        assert difference(first, second)[1:] == (-math.inf, math.inf, 1)
        assert non_inferior(first, second) == (math.inf, 1)


def test_holm_steps_down():
    """The least of four times 4, the next times 3, ...; never less than one before it."""
    assert holm([0.04, 0.01, 0.03, 0.005]) == [0.06, 0.03, 0.06, 0.02]
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_what_cannot_be_compared_is_refused():
    for shapes in (((1, 5), (1, 5)), ((2, 1), (2, 1)), ((2, 5), (3, 5)), ((5,), (5,))):
        with pytest.raises(InputError, match="at least 2 replicates and 2 questions"):
            difference(*(torch.zeros(shape) for shape in shapes))
    for level in (0.0, 1.0):
        for test in (difference, non_inferior):
            with pytest.raises(InputError, match="level must be between 0 and 1"):
                test(torch.zeros(2, 2), torch.zeros(2, 2), level=level)


if __name__ == "__main__":
    print(printed_table(int(sys.argv[1])))
