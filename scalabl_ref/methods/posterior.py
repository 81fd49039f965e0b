"""Posteriors of finished runs: the protocol, the registry, and loading one from its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ..support.errors import InputError

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama


class Posterior(Protocol):
    """A distribution over the functions of a finished model, to predict with."""

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        """Log-probabilities of the answer classes under each draw, (S, B, C) float64.

        A draw is a function of (seed, its number, the example's id), as in `predict`.
        """
        ...

    def save(self, folder: Path | str) -> None:
        """Write the posterior's own files into a run folder."""
        ...

    @classmethod
    def load(cls, folder: Path | str) -> Posterior:
        """Read the files of `save`. Raises InputError if one is missing, broken or another's."""
        ...


# The class of each kind. The package adds them here.
POSTERIORS: dict[str, type[Posterior]] = {}


def load_posterior(run: Path | str, info: Mapping[str, Any]) -> Posterior | None:
    """The posterior named in a run's facts (of `load_run`); None if the run has only adapters.

    Raises InputError if its file is missing or broken, or if the name is unknown.
    """
    name = info.get("posterior")
    if name is None:
        return None
    if name not in POSTERIORS:
        raise InputError(f"{run}: unknown posterior {name!r}: expected {', '.join(POSTERIORS)}")
    return POSTERIORS[name].load(run)
