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

    note: where the largest error of a failed check is; or the message of an exception, if one ended
    the check; or why the check is left out, which has no comparisons.
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


class Error(float):
    """The largest error of a comparison over its bound. place: where it is, in words."""

    place: str

    def __new__(cls, value: float, place: str = "") -> Error:
        error = super().__new__(cls, value)
        error.place = place
        return error


class LeftOut(Exception):
    """A check does not apply to this op; the message says why."""


def ratio(got: Tensor, expected: Tensor, size: Tensor, eps: float, case: object = "") -> Error:
    """Largest error over `eps` times the size; an error where the size is 0 counts as infinite.

    case: what is compared, for the words on the place.
    """
    if got.shape != expected.shape:
        raise ValueError(
            f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}{case and f', for {case}'}"
        )
    error, bound = (got.double() - expected.double()).abs(), eps * size
    if not error.numel():
        return Error(0.0)
    worst = torch.where(error == 0, 0.0, error / bound).nan_to_num(math.inf, math.inf)
    at = int(worst.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), worst.shape))
    element = f"element {index}: " if index else ""
    place = (
        f"{element}got {float(got.flatten()[at]):.9g}, expected {float(expected.flatten()[at]):.9g}"
    )
    return Error(float(worst.flatten()[at]), f"{case}: {place}" if case else place)


def exact(right: bool, place: str = "") -> Error:
    """The error of a claim that has no bound but holds or fails; place: what fails, and where."""
    return Error(0.0 if right else math.inf, place)


def same(got: Tensor, expected: Tensor, case: str) -> Error:
    """The error of tensors that must have the same bits; place: the first element that differs."""
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        kinds = (f"{tuple(t.shape)} of {t.dtype}" for t in (got, expected))
        return exact(False, f"{case}: {', expected '.join(kinds)}")
    bits = {4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = (got.view(bits) != expected.view(bits)).nonzero().tolist()
    if not differ:
        return exact(True)
    at = tuple(differ[0])
    values = f"got {got[at].item()!r}, expected {expected[at].item()!r}"
    return exact(False, f"{case}: element {at}: {values}")


def near(got: float, expected: float, bound: float, case: str) -> Error:
    """The error of one number."""
    return Error(abs(got - expected) / bound, f"{case}: got {got!r}, expected {expected!r}")


def refused(call: Callable[[], object], words: str) -> Error:
    """The error of the claim that a call ends with a ValueError whose message has these words."""
    try:
        call()
    except Exception as error:  # an InputError is a ValueError
        right = isinstance(error, ValueError) and words in str(error)
        return exact(right, f"{type(error).__name__}: {error}, in place of {words!r}")
    return exact(False, f"accepted, in place of {words!r}")


def normal_limit(rate: float) -> float:
    """t with P(|z| > t) = rate for a standard normal z."""
    return -float(torch.special.ndtri(torch.tensor(rate / 2, dtype=torch.float64)))
