"""The settings of an adapter: which layers carry one, and which distribution it has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from ..support.errors import InputError, expected
from .layer import SAMPLING, Sampling

if TYPE_CHECKING:
    from .adapter import Adapter

Prior = Literal["fixed", "layer", "component"]
PRIORS: tuple[Prior, ...] = ("fixed", "layer", "component")
TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"
)  # fmt: skip
# The adapter class of each covariance and method. The module of a class adds it here.
ADAPTERS: dict[str, type[Adapter]] = {}
COVARIANCES: dict[str, dict[str, type[Adapter]]] = {"diagonal": ADAPTERS, "full": {}}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which layers to adapt and how.

    method: a name in `ADAPTERS`: "scalabl" (Gaussian over s), "mle" (plain LoRA: A and B alone),
        and those that `methods` adds.
    rank: r. alpha: the scaling is c = alpha / rank; None means 2 * rank.
    targets: names of linear layers, from `TARGETS`.
    sampling: which rows share a draw, see `layer.subspace_lora_linear`.
    covariance: of the Gaussian over the scales: "diagonal" or, for "scalabl", "full".
    prior: "fixed" is N(0, prior_std^2 I). "layer" and "component" are empirical Bayes, for
        "scalabl": sigma_p minimises the forward KL, for each layer or for each scale.
    prior_std: sigma_p of the fixed prior; None means the method's default: 1, or 0.2 for blob.
    init_sigma: sigma (for blob its root G) starts uniform in [init_sigma / sqrt 2, init_sigma].
    dropout: fraction of the inputs that method "dropout" drops.

    Raises InputError for a value outside its range.

    Example:

    >>> from scalabl_ref import AdapterConfig
    >>> AdapterConfig(rank=4, targets=("q_proj", "v_proj")).scaling  # alpha / rank
    2.0
    """

    method: str = "scalabl"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj", "lm_head")
    sampling: Sampling = "example"
    covariance: str = "diagonal"
    prior: Prior = "fixed"
    prior_std: float | None = None
    init_sigma: float = 0.05
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise InputError(f"targets must be a list of names, not the text {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        _one_of("method", self.method, ADAPTERS)
        if self.prior_std is None:
            object.__setattr__(self, "prior_std", ADAPTERS[self.method].prior_std)
        _one_of("sampling", self.sampling, SAMPLING)
        possible = [name for name, kinds in COVARIANCES.items() if self.method in kinds]
        _one_of(f"covariance of method {self.method}", self.covariance, possible)
        _one_of("prior", self.prior, PRIORS)
        if self.prior != "fixed" and self.method != "scalabl":
            raise InputError(f"prior {self.prior!r} needs method scalabl, not {self.method}")
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), not {self.dropout}")
        for name in ("alpha", "prior_std", "init_sigma"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be positive and finite, not {value}")
        for target in self.targets:
            if target not in TARGETS:
                hint = ": put spaces between names" if "," in target else expected(target, TARGETS)
                raise InputError(f"unknown target {target!r:.60}{hint}")
        if not self.targets:
            raise InputError(f"targets is empty: expected some of {' '.join(TARGETS)}")

    @property
    def lora_alpha(self) -> float:
        """alpha, as given or by default."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """c = alpha / rank."""
        return self.lora_alpha / self.rank

    @property
    def sigma_p(self) -> float:
        """Standard deviation of the fixed prior."""
        assert self.prior_std is not None  # __post_init__ filled it in
        return self.prior_std


def _one_of(name: str, value: str, possible: Iterable[str]) -> None:
    names = tuple(possible)
    if value not in names:
        raise InputError(f"{name} must be one of {', '.join(names)}, not {value!r}")
