"""As many draws as an answer needs: the wealth, its martingale, the stop, and the average."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from scalabl_ref import InputError, predict
from scalabl_ref.core.objective import Batch
from scalabl_ref.core.predictive import Prediction
from scalabl_ref.evaluation import sequential
from scalabl_ref.evaluation.predict import Draws, log_probs
from scalabl_ref.evaluation.sequential import Auto, Race, predict_auto, wins

from ..models import tiny_batch, tiny_model
from ..stats import ZTest
from ..tolerances import rounding

PROBS = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda p: sum(p) > 0)


@given(st.lists(PROBS, min_size=1, max_size=6), st.floats(0.01, 0.5), st.floats(0.2, 0.99))
def test_wealth_is_the_product_of_what_the_bets_win(draws, tolerance, error):
    race = Race(Auto(tolerance, error), 2, 3)
    draws = [[value / sum(p) for value in p] for p in draws]
    race.add(torch.tensor(draws, dtype=torch.float64)[:, None], torch.tensor([1]))
    assert not race.wealth[:, 0].any()
    wealths = {}
    for i, j in itertools.product(range(3), repeat=2):
        wealth = 0.0
        for k in range(20):
            bet = (k + 0.5) / 20 / (1 - tolerance)
            wealth += math.prod(1 + bet * (p[i] - p[j] + tolerance) for p in draws) / 20
        got = float(race.wealth[:, 1, i, j].exp().mean())
        assert abs(got - wealth) <= rounding(torch.float64, 64) * max(1.0, wealth)
        wealths[i, j] = wealth
    leader = int(race.total[1].argmax())
    least = min(wealths[leader, j] for j in range(3) if j != leader)
    for needed in (2 / error, math.sqrt(2 / error)):
        assume(abs(least / needed - 1) > 1e-9)
        won = wins(race.wealth, race.total.argmax(-1), needed).tolist()
        assert won == [False, least >= needed]
    assert race.settled().tolist() == won


def paths(auto: Auto, length: int, worse: float) -> tuple[float, float]:
    """Two classes, of which each draw is sure of one: every outcome of so many draws, exactly.

    E x = worse, the first class' lead. Returns the mean of its wealth at the end, and the
    probability that it was ever declared the leader.
    """
    outcomes = list(itertools.product((0.0, 1.0), repeat=length))
    won = torch.tensor(outcomes, dtype=torch.float64)  # (2^length, length)
    chance = (1 + worse) / 2
    weight = (won * chance + (1 - won) * (1 - chance)).prod(1)
    race, rows = Race(auto, len(won), 2), torch.arange(len(won))
    declared = torch.zeros(len(won), dtype=torch.bool)
    for t in range(length):
        race.add(torch.stack((won[:, t], 1 - won[:, t]), -1)[None], rows)
        zero = torch.zeros(len(won), dtype=torch.int64)
        declared |= wins(race.wealth, zero, race.needed)
    wealth = race.wealth[:, :, 0, 1].exp().mean(0)
    return float(weight @ wealth), float(weight[declared].sum())


@pytest.mark.eq_22
@pytest.mark.parametrize("auto", [Auto(0.05, 0.3), Auto(0.1, 0.1), Auto(0.3, 0.3)])
def test_a_worse_answer_is_seldom_declared_however_often_one_looks(auto):
    """At E x = -t the wealth is a martingale; its stops, after every draw, keep the error."""
    wealth, wrong = paths(auto, 13, -auto.tolerance)
    assert abs(wealth - 1) <= rounding(torch.float64, 10_000)
    assert 0 < wrong <= auto.error
    assert paths(auto, 13, 0.9)[1] > 0.9  # and what is right is found


def test_a_sure_leader_needs_few_draws_and_a_tie_many():
    race = Race(Auto(), 2, 4)
    sure, tie = [0.94, 0.02, 0.02, 0.02], [0.3, 0.3, 0.2, 0.2]
    drawn = torch.tensor([sure, tie], dtype=torch.float64)[None]
    stops = [None, None]
    for t in range(1, 400):
        race.add(drawn, torch.arange(2))
        for row, done in enumerate(race.settled().tolist()):
            if done and stops[row] is None:
                stops[row] = t
    # log((C - 1) / error) / 2 over the log growth of the best bet: 2.05 / .69 and 2.05 / .051
    assert stops[0] is not None and 3 <= stops[0] <= 6
    assert stops[1] is not None and 40 <= stops[1] <= 90


def as_documented(table: torch.Tensor, auto: Auto) -> tuple[Prediction, int, bool]:
    """What one example gets from its draws' probabilities (S, C), by loops and plain products."""
    S, C = table.shape
    p, t = table.tolist(), auto.tolerance
    bets = [(k + 0.5) / 20 / (1 - t) for k in range(20)]

    def wealth(draws: list[list[float]], i: int, j: int) -> float:
        gains = [d[i] - d[j] + t for d in draws]
        return sum(math.prod(1 + bet * gain for gain in gains) for bet in bets) / 20

    def wins(draws: list[list[float]], i: int, needed: float) -> bool:
        return all(wealth(draws, i, j) >= needed for j in range(C) if j != i)

    stops, needed = [], (C - 1) / auto.error
    for half in (p[0::2], p[1::2]):
        stop = auto.most // 2
        for look in reversed(auto.looks()):
            sums = [sum(d[c] for d in half[:look]) for c in range(C)]
            if wins(half[:look], sums.index(max(sums)), math.sqrt(needed)):
                stop = look
        stops.append(stop)
    evens, odds = p[0::2][: stops[1]], p[1::2][: stops[0]]
    weighted = [(0.5 / len(part), d) for part in (evens, odds) for d in part]
    probs = [sum(w * d[c] for w, d in weighted) for c in range(C)]
    entropy = -sum(x * math.log(x) for x in probs)
    expected = -sum(w * x * math.log(x) for w, d in weighted for x in d)
    taken, answer = 2 * max(stops), probs.index(max(probs))
    numbers = torch.tensor([[entropy], [expected], [entropy - expected]], dtype=torch.float64)
    prediction = Prediction(torch.tensor([probs], dtype=torch.float64), *numbers)
    return prediction, taken, wins(p[:taken], answer, needed)


def test_an_example_gets_what_the_halves_of_its_own_draws_say():
    model, batch, auto = tiny_model(init_sigma=1.0), tiny_batch(12), Auto(0.1, 0.2, most=40)
    result, taken, settled = predict_auto(model, batch, auto, seed=3)
    assert len(set(taken.tolist())) > 2 and len(set(settled.tolist())) == 2
    table = log_probs(model, batch, Draws(40, seed=3)).detach().exp()
    for row in range(12):
        expected, draws, done = as_documented(table[:, row], auto)
        assert (int(taken[row]), bool(settled[row])) == (draws, done)
        for got, one in zip(result, expected, strict=True):
            assert (got[row] - one[0]).abs().max() <= rounding(torch.float32, 200)


class Coins:
    """In place of a model: draws of two classes, whatever their distribution; by the rows' ids."""

    def __init__(self, first: torch.Tensor) -> None:
        self.first = first  # (draws, examples), the first class' probability

    def log_probs(self, model: object, batch: Batch, draws: Draws) -> torch.Tensor:
        drawn = self.first[draws.first : draws.first + draws.samples, batch.ids]
        return torch.stack((drawn, 1 - drawn), -1).log()

    def predict(self, auto: Auto, monkeypatch) -> tuple[Prediction, torch.Tensor, torch.Tensor]:
        rows = self.first.shape[1]
        ones = torch.ones(rows, dtype=torch.int64)
        batch = Batch(ones[:, None], ones, ones, torch.arange(rows), torch.tensor([0, 1]))
        monkeypatch.setattr(sequential, "log_probs", self.log_probs)
        return predict_auto(tiny_model(), batch, auto)


@pytest.mark.eq_22
@pytest.mark.parametrize("chance", [0.66, 0.8])
def test_averages_are_unbiased_over_all_outcomes(chance, monkeypatch):
    """Every outcome of 12 draws of two classes, with its probability: nothing is left to chance.

    The average of the draws that made the halves stop, in the same sum, is biased.
    """
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=12)), dtype=torch.float64)
    weight = (outcomes * chance + (1 - outcomes) * (1 - chance)).prod(1)
    auto = Auto(tolerance=0.3, error=0.3, most=12)
    prediction, taken, settled = Coins(outcomes.T).predict(auto, monkeypatch)
    assert set(taken.tolist()) == {8, 12}
    bound = rounding(torch.float64, len(outcomes))
    assert abs(float(weight @ prediction.probs[:, 0]) - chance) <= bound
    stopped = (outcomes.T * (torch.arange(12)[:, None] < taken)).sum(0) / taken
    assert float(weight @ stopped) - chance > 0.003
    # The first class is better by 2 chance - 1, more than the tolerance.
    wrong = weight @ (settled & (prediction.probs[:, 0] < 0.5)).double()
    right = weight @ (settled & (prediction.probs[:, 0] > 0.5)).double()
    assert 0 < wrong <= auto.error and right > 0.5


def races(seed: int, n: int) -> dict[str, torch.Tensor]:
    """The first class' probability less its mean 2/3, of n examples, (n,); a draw's is sqrt(u).

    "auto": as `predict_auto` has it; "stopped": averaged over all draws that were made.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(100, n, generator=generator, dtype=torch.float64).sqrt()
    with pytest.MonkeyPatch.context() as patch:
        prediction, taken, _ = Coins(drawn).predict(Auto(tolerance=0.1, most=100), patch)
    made = torch.arange(100)[:, None] < taken
    stopped = (drawn * made).sum(0) / taken
    return {"auto": prediction.probs[:, 0] - 2 / 3, "stopped": stopped - 2 / 3}


def studentised(errors: torch.Tensor) -> float:
    return float(errors.mean() / errors.std())


LEADER = ZTest(
    "auto: the leader's probability", lambda seed, n: studentised(races(seed, n)["auto"]),
    n=4000, replay=400, thin=20, exact=False,
)  # fmt: skip


@pytest.mark.eq_22
def test_the_leaders_probability_is_unbiased():
    """With a false-failure rate of 1e-8; a bias of .01 would be seen with power .999."""
    LEADER.check(seed=1)
    errors = races(1, LEADER.n)
    assert LEADER.smallest(LEADER.n) * errors["auto"].std() < 0.01
    assert LEADER.statistic(studentised(errors["stopped"]), LEADER.n) > LEADER.limit(LEADER.n)


def test_a_result_does_not_depend_on_the_batch():
    model, batch, auto = tiny_model(init_sigma=1.0), tiny_batch(6), Auto(0.1, 0.2, most=40)
    result, taken, settled = predict_auto(model, batch, auto)
    for rows in ([5, 0], [2, 4, 1], [3]):
        part, draws, done = predict_auto(model, batch.rows(torch.tensor(rows)), auto)
        assert torch.equal(draws, taken[rows]) and torch.equal(done, settled[rows])
        assert (part.probs - result.probs[rows]).abs().max() <= rounding(torch.float32, 200)


def test_nothing_random_takes_no_draws():
    model, batch = tiny_model(method="mle"), tiny_batch()
    result, taken, settled = predict_auto(model, batch)
    assert not taken.any() and settled.all()
    assert torch.equal(result.probs, predict(model, batch, samples=0).probs)


def test_an_open_race_ends_at_the_most():
    model = tiny_model(init_sigma=1.0)
    _, taken, settled = predict_auto(model, tiny_batch(), Auto(0.001, 0.001, most=11))
    assert taken.tolist() == [10] * 4 and not settled.any()


def test_looks_end_at_the_most():
    assert Auto(most=40).looks() == [4, 6, 9, 13, 20]
    assert Auto(most=7).looks() == [3] and Auto(most=2).looks() == [1]
    assert Auto(most=8).looks() == Auto(most=9).looks() == [4]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("most", 1),
        ("most", 100_001),
        *itertools.product(("tolerance", "error"), (0, 1, -0.1, math.nan, 1.5)),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(InputError, match=f"^{field} must"):
        dataclasses.replace(Auto(), **{field: value})
