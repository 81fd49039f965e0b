"""As many draws as an answer needs: a sequential test of which class leads, valid at every stop.

More draws can change the answer only while it is open which class has the largest probability under
the posterior. For classes i and j let x = p_i - p_j of one draw. While j is better by more than the
tolerance t, E x < -t, and the wealth of a gambler who bets that it is not,

    W_ij = mean over bets b of  product over draws of (1 + b (x + t)),    0 < b < 1 / (1 - t),

is a non-negative supermartingale that starts at 1. It ever reaches w with probability 1 / w at most
(Ville), however often one looks and whatever makes one stop. An example stops when its leader has
beaten each of the C - 1 others with W >= (C - 1) / error: then, but with probability `error`, no
class is better than the answer by more than t. Nothing is assumed of the draws but that they are
independent. Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by
betting, J. R. Stat. Soc. B 86 (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import random_adapters
from ..core.objective import Batch
from ..core.predictive import Prediction, predictive
from ..model.llama import Llama
from ..support.errors import InputError
from ..training import ranks as distributed
from .predict import Draws, check_samples, log_probs

BETS = 20  # equally spaced sizes of a bet, over which the wealth is averaged
FIRST_LOOK, GROWTH = 4, 1.5  # draws before the first look, and before each look over the last


@dataclass(frozen=True)
class Auto:
    """When to stop drawing for an example: see `predict_auto`.

    tolerance: in probability, t above. error: the probability, of each example, that its answer is
    worse by more. most: draws of one example, which then stays open.

    Raises InputError for a value outside its range.
    """

    tolerance: float = 0.05
    error: float = 0.05
    most: int = 1000

    def __post_init__(self) -> None:
        for name in ("tolerance", "error"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie between 0 and 1, and is {getattr(self, name)}")
        if self.most < 1:
            raise InputError(f"most must be at least 1, and is {self.most}")
        check_samples(self.most, "most")

    def looks(self) -> list[int]:
        """Numbers of draws after which it is asked whether to stop, the last of them `most`."""
        numbers, at = [], float(FIRST_LOOK)
        while int(at) < self.most:
            numbers.append(int(at))
            at *= GROWTH
        return [*numbers, self.most]


class Race:
    """Which class leads, for each of B examples: the wealth W_ij of all pairs of C classes."""

    def __init__(self, auto: Auto, examples: int, classes: int) -> None:
        self.auto, self.classes = auto, classes
        bets = (torch.arange(BETS, dtype=torch.float64) + 0.5) / BETS / (1 - auto.tolerance)
        self.bets = bets[:, None, None, None]
        self.wealth = torch.zeros(BETS, examples, classes, classes, dtype=torch.float64)  # its log
        self.total = torch.zeros(examples, classes, dtype=torch.float64)

    def add(self, probs: Tensor, rows: Tensor) -> None:
        """Take the next draws' probabilities (S, b, C) of the examples `rows`, (b,)."""
        self.total[rows] += probs.sum(0)
        for p in probs:
            gain = p[:, :, None] - p[:, None, :] + self.auto.tolerance
            self.wealth[:, rows] += torch.log1p(self.bets * gain)

    def settled(self) -> Tensor:
        """Whether each example's leader has beaten all others, (B,) bool."""
        wealth = torch.logsumexp(self.wealth, 0) - math.log(BETS)  # (B, C, C)
        leader = self.total.argmax(-1)
        of_leader = wealth[torch.arange(len(leader)), leader]  # (B, C)
        beaten = of_leader >= math.log(max(1, self.classes - 1) / self.auto.error)
        return (beaten | (torch.arange(self.classes) == leader[:, None])).all(-1)


@torch.no_grad()
def predict_auto(
    model: Llama, batch: Batch, auto: Auto | None = None, seed: int = 0
) -> tuple[Prediction, Tensor]:
    """The predictive distribution, and how many draws each example took, (B,) int64.

    Draw i is Noise(seed, i) by the example's id, as in `predict`, of which an example's result is
    that with so many samples: neither depends on what else is in the batch. The number is 0 where
    nothing is random. An example that took `auto.most` may still be open.
    """
    auto = auto or Auto()
    B = len(batch.labels)
    taken = torch.zeros(B, dtype=torch.int64)
    if not B or not random_adapters(model):
        return predictive(log_probs(model, batch, Draws(0, seed)).cpu()), taken
    parts: list[list[Tensor]] = [[] for _ in range(B)]  # of each example, (S, C)
    race, open_rows, done = None, torch.arange(B), 0
    for look in auto.looks():
        draws = Draws(look - done, seed, first=done)
        drawn = log_probs(model, batch.rows(open_rows), draws).cpu()
        if distributed.sharded(model):
            distributed.as_first(drawn)  # rounding must not tell ranks to make other passes
        race = race or Race(auto, B, drawn.shape[-1])
        race.add(drawn.exp(), open_rows)
        for place, row in enumerate(open_rows.tolist()):
            parts[row].append(drawn[:, place])
        taken[open_rows], done = look, look
        open_rows = open_rows[~race.settled()[open_rows]]
        if not len(open_rows):
            break
    each = [predictive(torch.cat(part)[:, None]) for part in parts]
    return Prediction(*(torch.cat(column) for column in zip(*each, strict=True))), taken
