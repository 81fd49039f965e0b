"""As many draws as an answer needs: the wealth, its martingale, the stop, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from scalabl_ref import InputError, predict
from scalabl_ref.evaluation.sequential import BETS, Auto, Race, predict_auto

from ..models import tiny_batch, tiny_model
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
        for k in range(BETS):
            bet = (k + 0.5) / BETS / (1 - tolerance)
            wealth += math.prod(1 + bet * (p[i] - p[j] + tolerance) for p in draws) / BETS
        got = float(race.wealth[:, 1, i, j].exp().mean())
        assert abs(got - wealth) <= rounding(torch.float64, 64) * max(1.0, wealth)
        wealths[i, j] = wealth
    leader = int(race.total[1].argmax())
    least = min(wealths[leader, j] for j in range(3) if j != leader)
    assume(abs(least / (2 / error) - 1) > 1e-9)
    assert race.settled().tolist() == [False, least >= 2 / error]


def paths(auto: Auto, length: int, worse: float) -> tuple[float, float]:
    """Two classes, of which each draw is sure of one: every outcome of so many draws, exactly.

    E x = worse, the first class' lead. Returns the mean of its wealth at the end, and the
    probability that it was ever declared the leader.
    """
    outcomes = list(itertools.product((0.0, 1.0), repeat=length))
    wins = torch.tensor(outcomes, dtype=torch.float64)  # (2^length, length)
    chance = (1 + worse) / 2
    weight = (wins * chance + (1 - wins) * (1 - chance)).prod(1)
    race, rows = Race(auto, len(wins), 2), torch.arange(len(wins))
    declared = torch.zeros(len(wins), dtype=torch.bool)
    for t in range(length):
        race.add(torch.stack((wins[:, t], 1 - wins[:, t]), -1)[None], rows)
        declared |= race.settled() & (race.total[:, 0] > race.total[:, 1])
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
    # log((C - 1) / error) over the log growth of the best bet: 4.09 / .69 and 4.09 / .051
    assert stops[0] is not None and 6 <= stops[0] <= 10
    assert stops[1] is not None and 80 <= stops[1] <= 140


def test_an_example_gets_the_prediction_of_as_many_draws_whatever_is_beside_it():
    model, batch, auto = tiny_model(init_sigma=1.0), tiny_batch(6), Auto(0.1, 0.2, most=40)
    result, taken = predict_auto(model, batch, auto, seed=3)
    assert len(set(taken.tolist())) > 1 and set(taken.tolist()) <= set(auto.looks())
    for row, draws in enumerate(taken.tolist()):
        alone = batch.rows(torch.tensor([row]))
        again, draws_alone = predict_auto(model, alone, auto, seed=3)
        fixed = predict(model, alone, samples=draws, seed=3)
        assert int(draws_alone) == draws
        for got, one, expected in zip(result, again, fixed, strict=True):
            bound = rounding(torch.float32, 200)
            assert (got[row] - one[0]).abs().max() <= bound
            assert (got[row] - expected[0]).abs().max() <= bound


def test_a_result_does_not_depend_on_the_batch():
    model, batch, auto = tiny_model(init_sigma=1.0), tiny_batch(6), Auto(0.1, 0.2, most=40)
    result, taken = predict_auto(model, batch, auto)
    for rows in ([5, 0], [2, 4, 1], [3]):
        part, draws = predict_auto(model, batch.rows(torch.tensor(rows)), auto)
        assert torch.equal(draws, taken[rows])
        assert (part.probs - result.probs[rows]).abs().max() <= rounding(torch.float32, 200)


def test_nothing_random_takes_no_draws():
    model, batch = tiny_model(method="mle"), tiny_batch()
    result, taken = predict_auto(model, batch)
    assert not taken.any() and torch.equal(result.probs, predict(model, batch, samples=0).probs)


def test_an_open_race_ends_at_the_most():
    model = tiny_model(init_sigma=1.0)
    _, taken = predict_auto(model, tiny_batch(), Auto(0.001, 0.001, most=5))
    assert taken.tolist() == [5] * 4


def test_looks_end_at_the_most():
    assert Auto(most=20).looks() == [4, 6, 9, 13, 20]
    assert Auto(most=3).looks() == [3]


@pytest.mark.parametrize(
    ("field", "value"),
    [("most", 0), *itertools.product(("tolerance", "error"), (0, 1, -0.1, math.nan, 1.5))],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(Auto(), **{field: value})
