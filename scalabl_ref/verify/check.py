"""The checks of `scalabl verify`: their form, and the units of their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Op = Callable[..., Tensor]
Errors = Iterator[float]  # of every comparison, over its bound: above 1 it failed
FALSE_FAILURE = 1e-9  # of each statistical check: how often it fails a right function


class Check(NamedTuple):
    """equation: the claim, as docs/method.md numbers and writes it. run: the errors."""

    name: str
    equation: str
    run: Callable[[Op, torch.device], Errors]


class Result(NamedTuple):
    """worst: the largest error over its bound (above 1: failed); cases: number of comparisons.

    note: the message of an exception, if one ended the check.
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


def exact(right: bool) -> float:
    """The error of a claim that has no bound but holds or fails."""
    return 0.0 if right else math.inf


def normal_limit(rate: float) -> float:
    """t with P(|z| > t) = rate for a standard normal z."""
    return -float(torch.special.ndtri(torch.tensor(rate / 2, dtype=torch.float64)))
