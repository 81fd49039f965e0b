"""A test of the tests: every assertion about chance keeps its two rates when it is replayed.

`python -m tests.test_stats 10000` replays each so often and prints the table of
docs/verification.md; a word after it chooses the assertions that have it in their names.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import scalabl_ref  # noqa: F401  before torch, whose warning about a missing NumPy it keeps away

# isort: split
import pytest
import torch

from scalabl_ref import Noise

from . import stats
from .ranks import CONTEXT
from .stats import BUDGET, POWER, REGISTRY, Assertion, ChiSquare, KSTest, ZTest, binomial_tail

for path in sorted(Path(__file__).parent.rglob("test_*.py")):
    name = ".".join(path.relative_to(Path(__file__).parent).with_suffix("").parts)
    if name != "test_stats" and not name.startswith("peer."):
        importlib.import_module(f"tests.{name}")  # registers its assertions

RATES = (0.1, 0.01, 0.001)
REPLAY_RATE = 1e-10  # of one comparison of a count with its binomial distribution
FIRST_SEED = 1000  # of the replays; the assertions themselves use smaller ones
ASSERTIONS = list(REGISTRY.values())


class Replays(NamedTuple):
    """How many; how many exceeded the limits of RATES and their own; and saw the discrepancy."""

    count: int
    exceeded: list[int]
    seen: int


def replay(assertions: Iterable[Assertion], count: int, jobs: int = 1) -> dict[str, Replays]:
    """Replays of the null and of the smallest discrepancy, by so many processes."""
    parts = [range(count * i // jobs, count * (i + 1) // jobs) for i in range(jobs)]
    if jobs == 1:
        found = [_pairs(assertions, part) for part in parts]
    else:
        with ProcessPoolExecutor(jobs, CONTEXT) as pool:
            found = list(pool.map(_named_pairs, [[a.name for a in assertions]] * jobs, parts))
    return {
        a.name: _count(a, [pair for part in found for pair in part[a.name]]) for a in assertions
    }


def _pairs(assertions: Iterable[Assertion], seeds: range) -> dict[str, list[tuple[float, float]]]:
    """By name, the statistic without and with the smallest discrepancy for each seed.

    Seeds are outermost, since assertions share samples.
    """
    found: dict[str, list[tuple[float, float]]] = {a.name: [] for a in assertions}
    for seed in seeds:
        for a in assertions:
            if seed % a.thin == 0:
                n = a.replay or a.n
                data = a.sample(FIRST_SEED + seed, n)
                other = a.inject(data, a.smallest(n))
                found[a.name].append((a.statistic(data, n), a.statistic(other, n)))
    return found


def _named_pairs(names: list[str], seeds: range) -> dict[str, list[tuple[float, float]]]:
    """`_pairs` in a process of its own, whose registry was filled as this module was imported."""
    torch.set_num_threads(1)
    return _pairs([REGISTRY[name] for name in names], seeds)


def _count(a: Assertion, pairs: list[tuple[float, float]]) -> Replays:
    limits = [a.limit(a.replay or a.n, rate) for rate in (*RATES, a.rate)]
    exceeded = [sum(null > limit for null, _ in pairs) for limit in limits]
    return Replays(len(pairs), exceeded, sum(other > limits[-1] for _, other in pairs))


def faults(a: Assertion, found: Replays) -> list[str]:
    """In words, what does not agree with the rates that `a` states."""

    def few(k: int, p: float) -> bool:
        return binomial_tail(found.count, k, p) < REPLAY_RATE

    said = []
    for rate, k in zip((*RATES, a.rate), found.exceeded, strict=True):
        if few(found.count - k, 1 - rate):
            said.append(f"{k} of {found.count} beyond the limit for {rate}")
        if a.exact and few(k, rate):
            said.append(f"only {k} of {found.count} beyond the limit for {rate}")
    if few(found.seen, POWER):
        said.append(f"{found.seen} of {found.count} see the smallest discrepancy")
    return said


def agree(count: int, jobs: int) -> None:
    found = replay(ASSERTIONS, count, jobs)
    assert {a.name: said for a in ASSERTIONS if (said := faults(a, found[a.name]))} == {}


def test_the_rates_of_the_suite_fit_its_budget():
    """The comparisons of the replays count as well: at most nine for each assertion."""
    rates = [a.rate for a in ASSERTIONS]
    assert len(rates) >= 40 and math.fsum(rates) + 9 * REPLAY_RATE * len(rates) <= BUDGET


def test_replays_agree_with_the_rates():
    agree(40, jobs=1)


@pytest.mark.slow
def test_many_replays_agree_with_the_rates():
    agree(1000, jobs=os.cpu_count() or 1)


@pytest.mark.slow
def test_processes_share_the_replays_out():
    """Each seed is one's: the same counts, also of an assertion that skips nineteen of twenty."""
    chosen = [a for a in ASSERTIONS if a.name.startswith(("bootstrap coverage", "normals"))]
    assert {a.thin for a in chosen} == {1, 20}
    assert replay(chosen, 50, jobs=3) == replay(chosen, 50)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Assertions made in a test are not part of the suite."""
    monkeypatch.setattr(stats, "REGISTRY", {})


# --- limits against other sources ----------------------------------------------------------------


def test_limits_are_those_of_tables():
    """Of the normal, Kolmogorov's and chi-square distributions, to the digits that tables print."""
    none = partial(torch.empty, 0)
    assert abs(ZTest("normal", none, 1).limit(1, 0.05) - 1.959964) < 1e-6
    assert abs(KSTest("Kolmogorov", none, 1).limit(100, 0.05) - 0.1358) < 1e-4
    assert abs(ChiSquare("chi-square", none, 1, cells=11).limit(1, 0.05) - 18.307) < 1e-3
    assert abs(ChiSquare("wide", none, 1, cells=101).limit(1, 0.001) - 149.449) < 1e-3


def test_the_skewed_limit_keeps_its_rate():
    """Of a mean of n squares of normals, exactly a chi-square: 17 % too often without the skewness,
    and with it between 0 and 5 % too seldom."""
    n, rate = 20_000, 1e-8
    plain, skewed = (ZTest(f"skewness {s}", torch.empty, n, skew=s) for s in (0.0, 8**0.5))

    def true_rate(limit: float) -> float:
        ends = torch.tensor([1.0, -1.0], dtype=torch.float64) * limit * math.sqrt(n / 2) + n / 2
        half = torch.full_like(ends, n / 2)
        return float(torch.special.gammaincc(half, ends)[0] + torch.special.gammainc(half, ends)[1])

    assert true_rate(plain.limit(n)) > 1.15 * rate
    assert 0.95 * rate <= true_rate(skewed.limit(n)) <= rate


def mean_of_normals(seed: int, n: int, bias: float = 0.0) -> float:
    return float(Noise(seed, 0).normal(0, 1, n).double().mean()) + bias


class Optimist(ZTest):
    """States four fifths of the smallest discrepancy."""

    def smallest(self, n: int) -> float:
        return 0.8 * super().smallest(n)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (partial(ZTest, sample=mean_of_normals, sd=0.8), "beyond the limit for 0.1"),
        (partial(ZTest, sample=mean_of_normals, sd=1.3), "only"),
        (partial(ZTest, sample=partial(mean_of_normals, bias=0.3)), "beyond the limit for 1e-08"),
        (partial(Optimist, sample=mean_of_normals), "see the smallest discrepancy"),
    ],
)
def test_a_wrong_rate_is_noticed(make, complaint):
    a = make(name="wrong", n=400)
    assert any(complaint in said for said in faults(a, replay([a], 2000)[a.name]))


def test_a_failure_says_what_was_seen():
    a = ZTest("biased", partial(mean_of_normals, bias=0.3), 10_000)
    with pytest.raises(AssertionError, match="biased: .* above the limit 5.73.*n = 10000.* 0.088"):
        a.check(seed=1)


# --- the table -----------------------------------------------------------------------------------


def row(a: Assertion) -> str:
    """The stated part of its row in docs/verification.md."""
    return f"| {a.name} | {a.n} | {a.rate:g} | {a.smallest(a.n):.2g} |"


def test_the_documents_state_every_assertion():
    text = (Path(__file__).parent.parent / "docs" / "verification.md").read_text(encoding="utf-8")
    assert [row(a) for a in ASSERTIONS if row(a) not in text] == []


def main(count: int, word: str = "") -> int:
    chosen = [a for a in ASSERTIONS if word in a.name]
    found = replay(chosen, count, os.cpu_count() or 1)
    print("| assertion | n | rate | sees | replays, n | > .1 | > .01 | > .001 | > rate | saw |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for a in chosen:
        got = found[a.name]
        shares = " | ".join(f"{k / got.count:.4f}" for k in got.exceeded)
        replays = f"{got.count}, {a.replay or a.n}"
        print(f"{row(a)} {replays} | {shares} | {got.seen / got.count:.4f} |")
    wrong = [f"{a.name}: {said}" for a in chosen for said in faults(a, found[a.name])]
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
