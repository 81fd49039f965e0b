"""Settings for those who give none, by the number of training rows: the one place of them."""

from __future__ import annotations

from typing import NamedTuple

from .trainer import TrainConfig


class Default(NamedTuple):
    """A value, and why it is the default."""

    value: int | float
    reason: str


def defaults(rows: int) -> dict[str, Default]:
    """Defaults for a training set of so many rows, by the names of `TrainConfig`'s fields.

    They are the same for every number of rows: no study has shown better ones yet. `train` prints
    those that the user did not give, with their reasons.
    """
    every = f"the same for {rows} rows as for others"
    return {
        "steps": Default(TrainConfig.steps, every),
        "lr": Default(TrainConfig.lr, every),
        "beta": Default(TrainConfig.beta, "the loss is the evidence lower bound"),
    }
