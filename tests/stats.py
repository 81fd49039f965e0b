"""Limits of statistical tests, each from its false-failure rate: how often it fails what is right.

The seeds are fixed, so a test that passes once always passes; the rate says how likely a right
program was to be stuck with an unlucky seed. Each test says what it is able to see.
"""

from __future__ import annotations

import math

import torch


def normal_limit(rate: float) -> float:
    """t with P(|z| > t) = rate for a standard normal z."""
    return -float(torch.special.ndtri(torch.tensor(rate / 2, dtype=torch.float64)))


def ks_limit(n: int, rate: float) -> float:
    """Kolmogorov-Smirnov distance of n independent values from their own distribution.

    By the Dvoretzky-Kiefer-Wolfowitz inequality with Massart's constant, for every n. A
    distribution further away than twice this is caught with probability 1 - rate.
    """
    return math.sqrt(math.log(2 / rate) / (2 * n))


def chi_square_limit(freedom: int, rate: float) -> float:
    """Upper limit of a chi-square variable (Laurent and Massart 2000, lemma 1)."""
    x = math.log(1 / rate)
    return freedom + 2 * math.sqrt(freedom * x) + 2 * x
