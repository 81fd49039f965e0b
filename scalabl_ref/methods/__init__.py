"""The rivals of ScalaBL, and methods that go beyond it: one file each.

A method is an adapter of its own, trained like ours and listed in `ADAPTERS`, or a `Posterior`,
made from a finished run. Every method must pass tests/methods/test_contract.py.
"""

from __future__ import annotations

from ..core.config import ADAPTERS, COVARIANCES
from .blob import BlobAdapter
from .dropout import DropoutAdapter
from .ensemble import Ensemble
from .full import FullAdapter
from .laplace import Laplace
from .map import MapAdapter
from .point import PointAdapter, to_points
from .posterior import POSTERIORS, Posterior, load_posterior
from .subspace import Subspace
from .swag import Swag
from .tfb import TfbAdapter, fit_tfb

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

POSTERIORS.update(laplace=Laplace, swag=Swag, ensemble=Ensemble, subspace=Subspace)
