"""What people use instead of ScalaBL, behind the same two ideas.

A method is either an adapter of its own, trained like ours and listed in `adapters.ADAPTERS`, or a
`Posterior`, made from a finished run without changing how it was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..adapters import ADAPTERS, COVARIANCES
from .blob import BlobAdapter
from .dropout import DropoutAdapter
from .ensemble import Ensemble, Swag
from .full import FullAdapter
from .laplace import Laplace
from .tfb import TfbAdapter, tfb

if TYPE_CHECKING:
    from ..data import Batch
    from ..llama import Llama

__all__ = [
    "BlobAdapter",
    "DropoutAdapter",
    "Ensemble",
    "FullAdapter",
    "Laplace",
    "Posterior",
    "Swag",
    "TfbAdapter",
    "tfb",
]

ADAPTERS.update(blob=BlobAdapter, dropout=DropoutAdapter, tfb=TfbAdapter)
COVARIANCES["full"]["scalabl"] = FullAdapter


class Posterior(Protocol):
    """What a finished model predicts with."""

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        """Log-probabilities of the answer classes under each draw, (S, B, C) float64.

        A draw is a function of (seed, its number, the example's id), as in `predict`.
        """
        ...
