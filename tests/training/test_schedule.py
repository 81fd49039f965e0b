"""Schedules of the learning rates and of the official code's KL weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref.training.schedule import first_held, kl_period, kl_weight, warmup_linear

from ..tolerances import rounding


@pytest.mark.eq_7
def test_periods_of_the_official_schedule():
    """METHOD, section 3: M at batch 4 for each data set's number of training examples."""
    sizes = {
        "winogrande-xs": (160, 183),
        "winogrande-s": (640, 316),
        "winogrande-m": (2558, 544),
        "winogrande-l": (10234, 939),
        "arc-c": (1119, 393),
        "arc-e": (2251, 518),
        "obqa": (4957, 706),
        "boolq": (9427, 909),
    }
    for name, (examples, period) in sizes.items():
        assert kl_period(examples, 4) == period, name
    # BLoB's --bayes-gamma: 100 * 640 ** (3.14159265 / 4) / 8 = 1999.30
    assert kl_period(640, 8, gamma=4.0) == 1999


@given(st.integers(1, 60))
def test_kl_weights_are_the_geometric_round_of_the_official_code(period):
    for step in range(2 * period):
        i = step % period + 1
        literal = 2**i / (2 ** (period + 1) - 1)
        assert abs(kl_weight(step, period) - literal) <= rounding(torch.float64, 8) * literal


def test_kl_weight_does_not_overflow():
    assert 0.0 <= kl_weight(0, 2000) < kl_weight(1999, 2000) <= 0.5 * (1 + 1e-15)


def test_warmup_rises_then_falls_to_zero():
    factors = [warmup_linear(step, 100, 0.06) for step in range(101)]
    assert factors[0] == 0.0 and factors[6] == 1.0 and factors[100] == 0.0
    assert factors[3] == 0.5 and factors[53] == 0.5
    assert all(a < b for a, b in zip(factors[:6], factors[1:7], strict=True))
    assert all(a > b for a, b in zip(factors[6:-1], factors[7:], strict=True))
    assert warmup_linear(0, 10, 0.0) == 1.0
    # Steps of warm-up that are not whole: 3.5 is 3, and .29 * 100 is below 29 in binary64.
    assert warmup_linear(2, 50, 0.07) == 2 / 3 and warmup_linear(3, 50, 0.07) == 1.0
    assert warmup_linear(27, 100, 0.29) == 27 / 28 and warmup_linear(28, 100, 0.29) == 1.0
    # One step after the warm-up, and none.
    assert warmup_linear(9, 10, 0.9) == 1.0 and warmup_linear(9, 10, 1.0) == 0.9


@pytest.mark.parametrize(
    ("steps", "warmup", "share", "first"),
    [(100, 0.06, 0.25, 75), (10, 0.0, 0.25, 7), (10, 0.06, 1.0, 0), (10, 0.5, 1.0, 5),
     (10, 0.06, 0.0, 10), (7, 0.0, 0.5, 3)],
)  # fmt: skip
def test_rates_are_held_from_the_first_step_whose_weights_are_averaged(steps, warmup, share, first):
    assert first_held(steps, warmup, share) == first
