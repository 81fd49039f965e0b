"""Held-out rows during training: their NLL on the way, and the step at which it is lowest."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import adapter_state
from ..core.objective import class_logits
from ..data import Encoded, evaluation_batches
from ..model.llama import Llama
from ..support.errors import InputError
from . import ranks as distributed
from .runs import load_adapter_state


class Score(NamedTuple):
    """Of some rows: mean NLL in nats, and accuracy."""

    nll: float
    accuracy: float


@torch.no_grad()
def mean_model_score(model: Llama, data: Encoded, batch: int = 32) -> Score:
    """The score of the mean model (noise=None): one pass over the rows, without draws.

    On several ranks all call it, and share the batches; of a sharded base each has all batches.
    """
    batches = list(evaluation_batches(data, batch))
    spread = not distributed.sharded(model)
    sums = torch.zeros(2, dtype=torch.float64)
    for part in batches[distributed.rank() :: distributed.world()] if spread else batches:
        part = part.to(model.device)
        logits = class_logits(model, part, None).double()
        sums[0] += F.cross_entropy(logits, part.labels, reduction="sum").cpu()
        sums[1] += (logits.argmax(1) == part.labels).sum().cpu()
    if spread:
        distributed.sum_(sums)
    return Score(*(sums / len(data.labels)).tolist())


@dataclass
class Watch:
    """Scores held-out rows every `every` steps and after the last one, see `mean_model_score`.

    keep: remember the adapters of the step with the lowest NLL, the first one of equal ones; `fit`
    ends with them. step, nll: of that step, counted in steps done; 0 and inf before the first.

    Raises InputError if `every` is below 1 or there are no rows.
    """

    data: Encoded
    every: int
    keep: bool = False
    step: int = field(default=0, init=False)
    nll: float = field(default=math.inf, init=False)
    best: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.every < 1 or not self.data.labels:
            raise InputError("watching needs held-out rows, and at least 1 step between two looks")

    def due(self, done: int, steps: int) -> bool:
        return done % self.every == 0 or done == steps

    def look(self, model: Llama, done: int) -> Score:
        """Score the model after `done` steps, and remember it if it is the best so far."""
        score = mean_model_score(model, self.data)
        if score.nll < self.nll:
            self.step, self.nll = done, score.nll
            if self.keep:
                state = adapter_state(model)
                self.best = {n: value.detach().to("cpu", copy=True) for n, value in state.items()}
        return score

    def give_back(self, model: Llama) -> None:
        """Give the model the adapters of the best step, if `keep`."""
        if self.best:
            load_adapter_state(model, self.best, "the best step")

    def identity(self) -> dict[str, object]:
        """What a run must share with the checkpoint that it resumes; JSON."""
        rows = json.dumps([self.data.tokens, self.data.labels])
        return {"every": self.every, "rows": hashlib.sha256(rows.encode()).hexdigest()}

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by name; none without `keep`."""
        if not self.best:
            return {}
        about = {"step": torch.tensor(self.step), "nll": torch.tensor(self.nll, dtype=torch.double)}
        return {f"watch.{key}": value for key, value in about.items()} | {
            f"watch.best.{name}": value for name, value in self.best.items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the result of `state`, which may have other tensors beside it."""
        if self.keep and "watch.step" in tensors:
            self.step, self.nll = int(tensors["watch.step"]), float(tensors["watch.nll"])
            start = "watch.best."
            self.best = {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}


def interval(steps: int, epoch: int) -> int:
    """Steps between two looks: an epoch's, but at least 4 and at most 20 looks in all.

    epoch: steps of an epoch. A look at a fifth of the rows then costs a twelfth of an epoch.
    """
    return max(1, math.ceil(steps / 20), min(epoch, steps // 4))
