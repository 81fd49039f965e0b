"""Schedules of a training: of the learning rates, and of the KL's weight in the official code."""

from __future__ import annotations

import math


def warmup_linear(step: int, steps: int, warmup: float) -> float:
    """Factor on a learning rate at `step` of 0 .. steps - 1: linear up, then linear down to 0.

    As transformers' get_linear_schedule_with_warmup: the first step's factor is 0 if there is any
    warm-up.
    """
    rise = int(warmup * steps)
    if step < rise:
        return step / max(1, rise)
    return max(0.0, (steps - step) / max(1, steps - rise))


def first_held(steps: int, warmup: float, share: float) -> int:
    """The first step whose learning rate all later ones have, `steps` if there is none.

    It is the first of the last `share` of the steps, whose weights SWAG averages, but not in the
    warm-up.
    """
    return max(int((1 - share) * steps), int(warmup * steps))


def kl_period(num_examples: int, batch: int, gamma: float = 8.0) -> int:
    """M = int(100 N^(pi/gamma) / batch): the official code's number of KL weights in a round."""
    return max(1, int(100 * num_examples ** (math.pi / gamma) / batch))


def kl_weight(step: int, period: int) -> float:
    """pi_i = 2^i / (2^(M+1) - 1), i = (step mod M) + 1: the official code's KL weight."""
    i = step % period + 1
    # 2^i / (2^(M+1) - 1) without the big powers: M reaches several hundred.
    return 2.0 ** (i - period - 1) / (1.0 - 2.0 ** (-period - 1))
