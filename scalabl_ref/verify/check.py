"""What a check of `scalabl verify` is, and the units it answers in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Op = Callable[..., Tensor]
FALSE_FAILURE = 1e-9  # of each statistical check: how often it fails what is right


class Check(NamedTuple):
    """equation: what must hold, as docs/method.md numbers and writes it. run: worst, cases."""

    name: str
    equation: str
    run: Callable[[Op, torch.device], tuple[float, int]]


class Result(NamedTuple):
    """worst: the largest error over its bound (above 1: failed); cases: how many were compared.

    note: what an exception said, if one ended the check.
    """

    name: str
    equation: str
    worst: float
    cases: int
    seconds: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.worst <= 1.0


def ratio(got: Tensor, expected: Tensor, size: Tensor, eps: float) -> float:
    """Largest error over `eps` times the size; an error where the size is 0 counts as infinite."""
    if got.shape != expected.shape:
        raise ValueError(f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    error, bound = (got.double() - expected.double()).abs(), eps * size
    if not error.numel():
        return 0.0
    worst = torch.where(error == 0, 0.0, error / bound)
    return math.inf if not worst.isfinite().all() else float(worst.max())


def normal_limit(rate: float) -> float:
    """t with P(|z| > t) = rate for a standard normal z."""
    return -float(torch.special.ndtri(torch.tensor(rate / 2, dtype=torch.float64)))
