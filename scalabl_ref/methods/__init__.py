"""The rivals of ScalaBL, and methods that go beyond it: one file each.

A method is an adapter of its own, trained like ours and listed in `ADAPTERS`, or a `Posterior`,
made from a finished run. Every method must pass tests/methods/test_contract.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ..core.config import ADAPTERS, COVARIANCES
from ..support.errors import InputError
from .blob import BlobAdapter
from .dropout import DropoutAdapter
from .ensemble import Ensemble
from .full import FullAdapter
from .laplace import Laplace
from .map import MapAdapter
from .point import PointAdapter, to_points
from .subspace import Subspace
from .swag import Swag
from .tfb import TfbAdapter, fit_tfb

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama

__all__ = [
    "BlobAdapter",
    "DropoutAdapter",
    "Ensemble",
    "FullAdapter",
    "Laplace",
    "MapAdapter",
    "POSTERIORS",
    "PointAdapter",
    "Posterior",
    "Subspace",
    "Swag",
    "TfbAdapter",
    "fit_tfb",
    "load_posterior",
    "to_points",
]

ADAPTERS.update(
    map=MapAdapter, blob=BlobAdapter, dropout=DropoutAdapter, point=PointAdapter, tfb=TfbAdapter
)
COVARIANCES["full"]["scalabl"] = FullAdapter


class Posterior(Protocol):
    """A distribution over the functions of a finished model, to predict with."""

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        """Log-probabilities of the answer classes under each draw, (S, B, C) float64.

        A draw is a function of (seed, its number, the example's id), as in `predict`.
        """
        ...

    def save(self, folder: Path | str) -> None:
        """Write the posterior's own file into a run folder."""
        ...


POSTERIORS: dict[str, type[Laplace] | type[Swag] | type[Ensemble] | type[Subspace]] = {
    "laplace": Laplace,
    "swag": Swag,
    "ensemble": Ensemble,
    "subspace": Subspace,
}


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
