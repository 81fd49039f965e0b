"""As many draws as an answer needs: a sequential test of which class leads, valid at every stop.

More draws can change the answer only while it is open which class has the largest probability under
the posterior. For classes i and j let x = p_i - p_j of one draw. A gambler bets that j is not
better than i by more than the tolerance t. The gambler's wealth (22) is

    W_ij = mean over bets b of  product over draws of (1 + b (x + t)),    0 < b < 1 / (1 - t).

If j is better by more than t, then E x < -t, and W_ij is a non-negative supermartingale that starts
at 1. It ever reaches w with probability 1 / w at most (Ville), however often one looks and for
whatever reason one stops. An answer is settled when its class has W >= (C - 1) / error against each
of the C - 1 others. So the probability that an answer is settled although another class is better
by more than t is at most `error`. It is over all examples; among the settled ones the share of
wrong answers may be larger. The only assumption is that the draws are independent. Source:
Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, J. R. Stat. Soc. B
86 (2024).

The average of the draws that stop a test is biased: the test stops when they favour the leader. So
the draws are split into two halves, those of even and those of odd numbers. Each half has its own
race, and settles after N of its own draws. The N of the even half says how many draws of the odd
half are averaged, and the reverse. N is independent of the draws that it counts, so both averages
are unbiased, and so is their mean. A half settles at W >= sqrt((C - 1) / error): the wealth of all
draws is about the product of the wealths of the halves.
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
FIRST_LOOK, GROWTH = 4, 1.5  # a half's draws at its first look, and at each look over the last


@dataclass(frozen=True)
class Auto:
    """When to stop drawing for an example: see `predict_auto`.

    tolerance: t above, a difference of probabilities. error: bound on the probability that an
    answer is settled although another is better by more. most: draws of one example at most; it
    then stays open.

    Raises InputError for a value outside its range.
    """

    tolerance: float = 0.05
    error: float = 0.05
    most: int = 1000

    def __post_init__(self) -> None:
        for name in ("tolerance", "error"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie between 0 and 1, and is {getattr(self, name)}")
        if self.most < 2:
            raise InputError(f"most must be at least 2, and is {self.most}")
        check_samples(self.most, "most")

    def looks(self) -> list[int]:
        """Numbers of draws after which the race of a half is looked at; the last is `most` / 2."""
        numbers, at, last = [], float(FIRST_LOOK), self.most // 2
        while int(at) < last:
            numbers.append(int(at))
            at *= GROWTH
        return [*numbers, last]


class Race:
    """Which class leads, for each of B examples: the wealth W_ij of all pairs of C classes."""

    def __init__(self, auto: Auto, examples: int, classes: int) -> None:
        self.auto, self.needed = auto, max(1, classes - 1) / auto.error
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
        """Whether each example's leader has won this half, (B,) bool."""
        return wins(self.wealth, self.total.argmax(-1), math.sqrt(self.needed))


def wins(log_wealth: Tensor, answer: Tensor, needed: float) -> Tensor:
    """Whether the class `answer` (B,) has `needed` against all others, (B,) bool.

    log_wealth: of each bet, (BETS, B, C, C).
    """
    wealth = torch.logsumexp(log_wealth, 0) - math.log(BETS)
    beaten = wealth[torch.arange(len(answer)), answer] >= math.log(needed)  # (B, C)
    return (beaten | (torch.arange(wealth.shape[-1]) == answer[:, None])).all(-1)


@torch.no_grad()
def predict_auto(
    model: Llama, batch: Batch, auto: Auto | None = None, seed: int = 0
) -> tuple[Prediction, Tensor, Tensor]:
    """The predictive distribution; each example's number of draws, int64; whether it is settled.

    Draw i is Noise(seed, i) by the example's id, as in `predict`: an example's draws do not depend
    on the rest of the batch. probs and expected_entropy are unbiased. The number of draws is 0 if
    nothing is random. An example is settled if its answer, the class with the largest probability,
    has enough wealth from all draws of both halves together.
    """
    auto = auto or Auto()
    B = len(batch.labels)
    taken, settled = torch.zeros(B, dtype=torch.int64), torch.ones(B, dtype=torch.bool)
    if not B or not random_adapters(model):
        return predictive(log_probs(model, batch, Draws(0, seed)).cpu()), taken, settled
    parts: list[list[Tensor]] = [[] for _ in range(B)]  # of each example, (S, C)
    races: list[Race] = []
    stops = torch.zeros(2, B, dtype=torch.int64)  # N of the even half, and of the odd; 0: it runs
    open_rows, done = torch.arange(B), 0
    for look in auto.looks():
        draws = Draws(2 * (look - done), seed, first=2 * done)
        drawn = log_probs(model, batch.rows(open_rows), draws).cpu()
        if distributed.sharded(model):
            distributed.as_first(drawn)  # rounding must not tell ranks to make other passes
        races = races or [Race(auto, B, drawn.shape[-1]) for _ in range(2)]
        for half, race in enumerate(races):
            race.add(drawn[half::2].exp(), open_rows)
            stops[half, (stops[half] == 0) & race.settled()] = look
        for place, row in enumerate(open_rows.tolist()):
            parts[row].append(drawn[:, place])
        taken[open_rows], done = 2 * look, look
        open_rows = open_rows[(stops[:, open_rows] == 0).any(0)]
        if not len(open_rows):
            break
    stops[stops == 0] = done
    each = [_average(torch.cat(part), *n) for part, n in zip(parts, stops.T.tolist(), strict=True)]
    prediction = Prediction(*(torch.cat(column) for column in zip(*each, strict=True)))
    together = races[0].wealth + races[1].wealth
    return prediction, taken, wins(together, prediction.probs.argmax(-1), races[0].needed)


def _average(drawn: Tensor, even: int, odd: int) -> Prediction:
    """The prediction from one example's draws (S, C): of each half, the other half's number."""
    used = drawn[0::2][:odd], drawn[1::2][:even]
    weights = [torch.full((len(part),), 0.5 / len(part), dtype=torch.float64) for part in used]
    return predictive(torch.cat(used)[:, None], torch.cat(weights))
