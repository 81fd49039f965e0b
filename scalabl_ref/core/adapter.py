"""Low-rank adapters with a Gaussian over the r scales, and the linear layer that carries them.

y = W x + bias + c B diag(s~) A x,    q(s~) = N(s, diag(sigma^2)),    c = alpha / r
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fast.ops import SAMPLING, Sampling, subspace_lora_linear
from ..fast.quantize import Kind, Quantized, quantize
from ..support.errors import InputError, expected
from .divergence import KLS
from .noise import Noise, philox_words

Device = torch.device | str | None
Prior = Literal["fixed", "layer", "component"]
PRIORS: tuple[Prior, ...] = ("fixed", "layer", "component")

TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
)

# log sigma is kept above this by `Adapter.bound_`: far below any useful width, and far enough from
# log(sqrt(float32's smallest normal)) that 1 / sigma^2 in the official KL stays finite.
MIN_LOG_SIGMA = -20.0

# Initial values of layer n come from `philox_words` stream INIT_STREAM + n.
INIT_STREAM = 2**62


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how.

    method: a name in `ADAPTERS`: "scalabl" (Gaussian over s), "mle" (plain LoRA: A and B alone),
        "map" (the same with the prior on A and B), and those that `methods` adds.
    rank: r. alpha: the scaling is c = alpha / rank; None means 2 * rank.
    targets: names of linear layers, out of `TARGETS`.
    sampling: which rows share a draw, see `ops.subspace_lora_linear`.
    covariance: "diagonal" or, for "scalabl", "full": of the Gaussian over the scales.
    prior: "fixed" is N(0, prior_std^2 I). "layer" and "component" are empirical Bayes, for
        "scalabl": sigma_p is what minimises the forward KL, for each layer or for each scale.
    prior_std: sigma_p of the fixed prior; None becomes the method's own: 1, blob's 0.2.
    init_sigma: sigma starts uniform in [init_sigma / sqrt 2, init_sigma] (blob: its root G does).
    dropout: share of inputs dropped, of method "dropout".

    Raises InputError for a value outside its range.
    """

    method: str = "scalabl"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj", "lm_head")
    sampling: Sampling = "example"
    covariance: str = "diagonal"
    prior: Prior = "fixed"
    prior_std: float = None  # type: ignore[assignment]  # a float once it is made
    init_sigma: float = 0.05
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise InputError(f"targets must be a list of names, not the text {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.method not in ADAPTERS:
            raise InputError(f"method must be one of {', '.join(ADAPTERS)}, not {self.method!r}")
        if self.prior_std is None:
            object.__setattr__(self, "prior_std", ADAPTERS[self.method].prior_std)
        if self.sampling not in SAMPLING:
            raise InputError(
                f"sampling must be one of {', '.join(SAMPLING)}, not {self.sampling!r}"
            )
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, not {self.rank}")
        if self.method not in COVARIANCES.get(self.covariance, {}):
            possible = [name for name, kinds in COVARIANCES.items() if self.method in kinds]
            raise InputError(
                f"covariance of method {self.method} must be one of {', '.join(possible)}, "
                f"not {self.covariance!r}"
            )
        if self.prior not in PRIORS:
            raise InputError(f"prior must be one of {', '.join(PRIORS)}, not {self.prior!r}")
        if self.prior != "fixed" and self.method != "scalabl":
            raise InputError(f"prior {self.prior!r} is for scalabl: {self.method} has a fixed one")
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
            raise InputError(f"no targets: expected some of {' '.join(TARGETS)}")

    @property
    def scaling(self) -> float:
        """c = alpha / rank."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


class Adapter(nn.Module):
    """What every adapted layer has, A (r, d_in) and B (d_out, r), in float32: plain LoRA.

    Subclasses add what is random about it. Initial values are a pure function of (seed, layer),
    drawn from Philox words: here A is Kaiming-uniform and B = 0.
    """

    trained = True  # else made of a trained one
    random = False  # whether draws differ
    joint = True  # whether rows of several draws may go through the layer together
    variational: tuple[str, ...] = ()  # names of the parameters of a distribution's width
    prior_std = 1.0  # unless the configuration says otherwise

    def __init__(
        self,
        d_in: int,
        d_out: int,
        config: AdapterConfig,
        layer: int,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        with torch.device(device):
            self.A = nn.Parameter(torch.empty(config.rank, d_in, dtype=torch.float32))
            self.B = nn.Parameter(torch.zeros(d_out, config.rank, dtype=torch.float32))
            self._add_parameters()
        if self.A.device.type != "meta":
            with torch.no_grad():
                widths = self.widths().numel()
                self._initialise(*initial_matrix(seed, layer, config.rank, d_in, widths))

    def _add_parameters(self) -> None:
        """Create what a subclass trains besides A and B."""

    def _initialise(self, matrix: Tensor, uniform: Tensor) -> None:
        """Fill the parameters from what `initial_matrix` gives; B is zero already."""
        self.A.copy_(matrix)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        noise: Noise | None,
        groups: Tensor | None,
    ) -> Tensor:
        """The adapted layer: x (..., d_in) -> (..., d_out); `noise=None` is the mean model."""
        one = self.A.new_ones(self.config.rank)
        return subspace_lora_linear(
            x, weight, bias, self.A, self.B, one, one, self.config.scaling, None
        )

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        """A', (r, d_in) float64: the layer is the plain LoRA W x + bias + c B A' x.

        `noise=None` is the mean; a draw is what the layer does under it with sampling "batch".
        """
        return self.A.double()

    @torch.no_grad()
    def set_lora_(self, A: Tensor, B: Tensor, scaling: float) -> None:
        """Take the mean function scaling * B A, of A (k, d_in) and B (d_out, k) with k <= r.

        What there is beyond the k components keeps its start, with columns of B that are 0.
        Raises InputError if k > r.
        """
        k = len(A)
        if k > self.config.rank:
            raise InputError(f"a LoRA of rank {k} does not go into one of rank {self.config.rank}")
        self.A[:k] = A
        self.B.zero_()[:, :k] = scaling / self.config.scaling * B

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """What the objective adds for all layers of this class, a float64 scalar in nats.

        A KL divergence in the direction `kl`, or minus a log prior density; 0 for a point estimate.
        """
        return torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def bound_(self) -> None:
        """Keep parameters where they are usable (call after an optimiser step)."""

    def widths(self) -> Tensor:
        """Standard deviations of what is drawn, flat; empty if nothing is."""
        return self.A.new_empty(0)


class MapAdapter(Adapter):
    """Plain LoRA under the prior N(0, prior_std^2) on every entry of A and B."""

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """Minus the log prior density, up to its constant: sum of squares / (2 prior_std^2)."""
        squares = torch.stack([p.double().square().sum() for a in layers for p in (a.A, a.B)])
        return squares.sum() / (2 * layers[0].config.prior_std ** 2)


class SubspaceAdapter(Adapter):
    """ScalaBL's: a Gaussian over the r scales, whose log_s and log_sigma (r,) are trained.

    Initial values are those of the official code: the thin SVD of a Kaiming-uniform r x d_in
    matrix gives A (orthonormal rows) and s (its singular values), B = 0, and sigma is uniform in
    [init_sigma / sqrt 2, init_sigma].
    """

    random = True
    variational: tuple[str, ...] = ("log_s", "log_sigma")

    def _add_parameters(self) -> None:
        self.log_s = nn.Parameter(torch.empty(self.config.rank, dtype=torch.float32))
        self.log_sigma = nn.Parameter(torch.empty(self.config.rank, dtype=torch.float32))

    def _initialise(self, matrix: Tensor, uniform: Tensor) -> None:
        _, singular, Vh = torch.linalg.svd(matrix, full_matrices=False)
        for name, value in initial_values(singular, Vh, uniform, self.config.init_sigma).items():
            self.get_parameter(name).copy_(value)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        noise: Noise | None,
        groups: Tensor | None,
    ) -> Tensor:
        s, sigma = self.scale()
        config = self.config
        return subspace_lora_linear(
            x, weight, bias, self.A, self.B, s, sigma, config.scaling, noise, self.layer,
            config.sampling, groups,
        )  # fmt: skip

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        s = self.log_s.double().exp()
        if noise is not None:
            s = s + self.deviation(noise.normal(self.layer, 1, self.config.rank)[0].to(s))
        return s[:, None] * self.A.double()

    def deviation(self, eps: Tensor) -> Tensor:
        """s~ - s of standard normals eps (r,), in float64."""
        return self.log_sigma.double().exp() * eps

    @torch.no_grad()
    def set_lora_(self, A: Tensor, B: Tensor, scaling: float) -> None:
        """As `Adapter.set_lora_`, from the thin SVD of scaling / c * B A in float64.

        B takes the left vectors, s the singular values, A the right vectors: function and rank are
        kept. A singular value that is 0 to rounding has no logarithm: its component keeps its
        start, with a column of B that is 0.
        """
        U, singular, Vh = product_svd(B, A)
        singular = scaling / self.config.scaling * singular
        least = torch.finfo(torch.float64).eps * max(len(B), A.shape[1]) * singular[0]
        k = int((singular > least).sum())
        super().set_lora_(Vh[:k], U[:, :k], self.config.scaling)
        self.log_s[:k] = singular[:k].log()

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """(5) or (6), summed over layers and scales; (19) where the prior is fitted."""
        log_s, log_sigma = (
            torch.stack([layer.get_parameter(name) for layer in layers]).double()
            for name in ("log_s", "log_sigma")
        )  # (layers, r)
        s, sigma, config = log_s.exp(), log_sigma.exp(), layers[0].config
        return KLS[kl](s, sigma, fitted_prior_std(s.square() + sigma.square(), config, kl))

    @torch.no_grad()
    def bound_(self) -> None:
        """Keep log sigma above MIN_LOG_SIGMA."""
        self.log_sigma.clamp_(min=MIN_LOG_SIGMA)

    def scale(self) -> tuple[Tensor, Tensor]:
        """(s, sigma), each (r,): mean and standard deviation of the subspace Gaussian."""
        return self.log_s.exp(), self.log_sigma.exp()

    def widths(self) -> Tensor:
        return self.log_sigma.exp()


def fitted_prior_std(second: Tensor, config: AdapterConfig, kl: str) -> float | Tensor:
    """sigma_p: the fixed one, or (19), from the second moments (layers, r) of the scales under q.

    The forward KL is smallest over sigma_p where sigma_p^2 is the mean of E_q[s~_k^2]. What is left
    of it does not change with (s, sigma) / a and a B: that arbitrary scale is gone.

    Raises InputError for the official direction, whose minimum over sigma_p is another.
    """
    if config.prior == "fixed":
        return config.prior_std
    if kl != "forward":
        raise InputError(f"prior {config.prior!r} is fitted by the forward KL, not by {kl!r}")
    return second.mean(1, keepdim=True).sqrt() if config.prior == "layer" else second.sqrt()


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B A in float64, which is not formed: U (d_out, k), singular values, Vh (k, d_in).

    B (d_out, r), A (r, d_in); k = min(d_out, r, d_in).
    """
    left, R = torch.linalg.qr(B.double())
    right, S = torch.linalg.qr(A.double().T)
    U, singular, Vh = torch.linalg.svd(R @ S.T, full_matrices=False)
    return left @ U, singular, Vh @ right.T


# Every method's adapter by name; `methods` adds its own.
ADAPTERS: dict[str, type[Adapter]] = {
    "scalabl": SubspaceAdapter,
    "mle": Adapter,
    "map": MapAdapter,
}
COVARIANCES: dict[str, dict[str, type[Adapter]]] = {"diagonal": ADAPTERS, "full": {}}


def initial_matrix(
    seed: int, layer: int, rank: int, d_in: int, widths: int | None = None
) -> tuple[Tensor, Tensor]:
    """A layer's Kaiming-uniform matrix (rank, d_in) and uniforms in (0, 1) for its widths.

    widths: how many of these, None is rank. The matrix is uniform in +-1 / sqrt(d_in), which is
    kaiming_uniform_ with a = sqrt(5); both float64.
    """
    count = rank * d_in + (rank if widths is None else widths)
    words = philox_words(seed, INIT_STREAM + layer, count).double()
    uniform = (words + 0.5) / 2**32
    matrix = (2 * uniform[: rank * d_in] - 1).view(rank, d_in) / math.sqrt(d_in)
    return matrix, uniform[rank * d_in :]


def initial_values(
    singular: Tensor, Vh: Tensor, uniform: Tensor, init_sigma: float
) -> dict[str, Tensor]:
    """A, log_s and log_sigma from the matrix' singular values (r,) and right vectors (r, d_in)."""
    sigma = initial_widths(uniform, init_sigma)
    return {"A": Vh, "log_s": singular.log(), "log_sigma": sigma.log()}


def initial_widths(uniform: Tensor, init_sigma: float) -> Tensor:
    """Uniforms in (0, 1) moved to [init_sigma / sqrt 2, init_sigma]."""
    low = init_sigma / math.sqrt(2)
    return low + (init_sigma - low) * uniform


class Linear(nn.Module):
    """A frozen linear layer, y = W x + bias, that can carry an adapter.

    weight (d_out, d_in), bias (d_out,) or None. After `quantize_`, weight and scale are the codes
    and scales of a `Quantized`; scale is None before.
    """

    adapter: Adapter | None
    scale: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device)) if bias else None
        self.register_parameter("scale", None)
        self.d_in, self.adapter = d_in, None

    @property
    def frozen(self) -> Tensor:
        """W in the form that `F.linear` takes: the weight, or its `Quantized`."""
        if self.scale is None:
            return self.weight
        return Quantized(self.weight, self.scale, self.d_in)  # type: ignore[return-value]

    def quantize_(self, kind: Kind) -> None:
        """Put the nearest weight of that kind in the weight's place."""
        packed = quantize(self.weight.detach(), kind)
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        self.scale = nn.Parameter(packed.scale, requires_grad=False)

    def forward(
        self, x: Tensor, noise: Noise | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """x (..., d_in) -> (..., d_out); `noise=None` is the mean; group ids as in `ops`."""
        weight = self.frozen
        if isinstance(weight, Quantized) and not torch.is_grad_enabled():
            weight = weight.whole(x.dtype)  # nothing keeps it
        if self.adapter is None:
            return F.linear(x, weight, self.bias)
        return self.adapter(x, weight, self.bias, noise, groups)


def add_adapters(model: nn.Module, config: AdapterConfig, seed: int = 0) -> nn.Module:
    """Freeze `model` and attach an adapter to each `Linear` that `config.targets` names.

    A layer's noise id is 8 * block + (position of its name in TARGETS), with lm_head in block 0:
    it depends on where the layer is, not on which others are adapted. Returns the model.

    Raises InputError if the model has adapters already, if no layer has a target's name, or if
    the rank is larger than a dimension of a layer (naming the layer).
    """
    if adapters(model):
        raise InputError("the model already has adapters")
    model.requires_grad_(False)
    found = set()
    for name, module in model.named_modules():
        target = name.rpartition(".")[2]
        if not isinstance(module, Linear) or target not in config.targets:
            continue
        layer, head = layer_id(name, target), target == "lm_head"
        module.adapter = new_adapter(name, module.frozen, config, layer, seed, head)
        found.add(target)
    missing = [target for target in config.targets if target not in found]
    if missing:
        raise InputError(f"the model has no layer named {' or '.join(missing)}")
    return model


def new_adapter(
    name: str, weight: Tensor, config: AdapterConfig, layer: int, seed: int, head: bool
) -> Adapter:
    """The adapter of a layer called `name`, whose weight is (d_out, d_in), on the weight's device.

    layer: its noise id. head: whether it is the output layer, which may have fewer rows than the
    rank, cut down as it may be to a few class tokens. Raises InputError if the rank is too large.
    """
    d_out, d_in = weight.shape
    if config.rank > d_in or (config.rank > d_out and not head):
        raise InputError(f"rank {config.rank} is larger than a dimension of {name} {d_out, d_in}")
    kind = COVARIANCES[config.covariance][config.method]
    return kind(d_in, d_out, config, layer, seed, weight.device)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The model's adapters by the name of the layer that carries them, in model order."""
    return {
        name: module.adapter
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module.adapter is not None
    }


def random_adapters(model: nn.Module) -> list[Adapter]:
    """Those of the model's adapters whose draws differ, in model order."""
    return [adapter for adapter in adapters(model).values() if adapter.random]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter parameter by name, such as layers.0.attn.q_proj.log_s."""
    return {
        f"{name}.{key}": parameter.detach()
        for name, adapter in adapters(model).items()
        for key, parameter in adapter.named_parameters()
    }


def layer_id(name: str, target: str) -> int:
    """Noise id of the layer `name`, whose last part is `target`; see `add_adapters`."""
    block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return len(TARGETS) * block + TARGETS.index(target)
