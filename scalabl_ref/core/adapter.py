"""Low-rank adapters: plain LoRA, and ScalaBL's with a Gaussian over the r scales.

y = W x + bias + c B diag(s~) A x,    q(s~) = N(s, diag(sigma^2)),    c = alpha / r
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support.errors import InputError
from .config import ADAPTERS, AdapterConfig
from .layer import low_rank_dtype, row_noise, scale_factors, subspace_lora_linear
from .noise import Keys, Noise, philox_words
from .objective import KLS, fitted_prior_std

# `bound_` keeps log sigma above this: far below any useful width, and far enough from
# log(sqrt(float32's smallest normal)) that 1 / sigma^2 in the official KL stays finite.
MIN_LOG_SIGMA = -20.0
INIT_STREAM = 2**62  # initial values of layer n come from `philox_words` stream INIT_STREAM + n


class Adapter(nn.Module):
    """Plain LoRA, the base of every adapter: A (r, d_in) and B (d_out, r), in float32.

    Subclasses add the random part. Adapters differ in one equation, `hidden`. Initial values are a
    pure function of (seed, layer): here A is Kaiming-uniform and B = 0.
    """

    trained = True  # False for an adapter that is made from a trained one
    random = False  # whether draws differ
    joint = True  # whether rows of several draws may go through the layer together
    variational: tuple[str, ...] = ()  # names of the parameters that set a distribution's width
    prior_std = 1.0  # sigma_p, unless the configuration says otherwise
    # Hook: the package puts the native function here; both agree to rounding.
    op: ClassVar[Callable[..., Tensor]] = staticmethod(subspace_lora_linear)

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
        """Create the parameters that a subclass trains besides A and B."""

    def _initialise(self, matrix: Tensor, uniform: Tensor) -> None:
        """Fill the parameters from the values of `initial_matrix`; B is zero already."""
        self.A.copy_(matrix)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, keys: Keys | None) -> Tensor:
        """The adapted layer: x (..., d_in) -> (..., d_out); `keys=None` is the mean model."""
        if keys is None or not self.random:  # plain LoRA: equation (1) with s = 1 and no noise
            one = self.A.new_ones(self.config.rank)
            return self.op(x, weight, bias, self.A, self.B, one, one, self.config.scaling, None)
        y = F.linear(x, weight, bias)  # (..., d_out)
        return y + self.update(x.to(y.dtype), keys)

    def update(self, x: Tensor, keys: Keys | None) -> Tensor:
        """B times `hidden`: x (..., d_in) -> (..., d_out) in x's dtype, rounded once."""
        with torch.autocast(x.device.type, enabled=False):
            wide = low_rank_dtype(x, self.A)
            u = self.hidden(x.to(wide), self.A.to(wide), keys)  # (..., r)
            return F.linear(u, self.B.to(wide)).to(x.dtype)

    def hidden(self, x: Tensor, A: Tensor, keys: Keys | None) -> Tensor:
        """u of y = W x + bias + B u: x (..., d_in) and A (r, d_in) of one dtype -> (..., r)."""
        return self.config.scaling * F.linear(x, A)

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        """A', (r, d_in) float64: the layer is the plain LoRA W x + bias + c B A' x.

        `noise=None` gives the mean; a draw gives the layer under that draw, with sampling "batch".
        """
        return self.A.double()

    @torch.no_grad()
    def set_lora_(self, A: Tensor, B: Tensor, scaling: float) -> None:
        """Set the mean function to scaling * B A, for A (k, d_in) and B (d_out, k) with k <= r.

        The other r - k components keep their initial values, and their columns of B become 0.
        Raises InputError if k > r.
        """
        k = len(A)
        if k > self.config.rank:
            raise InputError(f"a LoRA of rank {k} does not fit into one of rank {self.config.rank}")
        self.A[:k] = A
        self.B.zero_()[:, :k] = scaling / self.config.scaling * B

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """The term that the objective adds for all layers of this class, a float64 scalar in nats.

        A KL divergence in the direction `kl`, or minus a log prior density; 0 for a point estimate.
        """
        return torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def bound_(self) -> None:
        """Keep parameters in their usable range (call after each optimiser step)."""

    def widths(self) -> Tensor:
        """Standard deviations of the drawn numbers, flat; empty if nothing is drawn."""
        return self.A.new_empty(0)


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

    def scale(self) -> tuple[Tensor, Tensor]:
        """(s, sigma), each (r,): mean and standard deviation of the subspace Gaussian."""
        return self.log_s.exp(), self.log_sigma.exp()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, keys: Keys | None) -> Tensor:
        """Equation (1)."""
        s, sigma = self.scale()
        noise, groups, draws = (None, None, None) if keys is None else keys
        c = self.config
        return self.op(
            x, weight, bias, self.A, self.B, s, sigma, c.scaling, noise, self.layer, c.sampling,
            groups, draws,
        )  # fmt: skip

    def hidden(self, x: Tensor, A: Tensor, keys: Keys | None) -> Tensor:
        eps: Tensor | float = 0.0
        config = self.config
        if keys is not None:
            eps = row_noise(x.shape[:-1], keys, self.layer, config.sampling, config.rank)
        s, sigma = (value.to(x.dtype) for value in self.scale())
        return F.linear(x, A) * scale_factors(s, sigma, config.scaling, eps)

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        s = self.log_s.double().exp()
        if noise is not None:
            s = s + self.deviation(noise.normal(self.layer, 1, self.config.rank)[0].to(s))
        return s[:, None] * self.A.double()

    def deviation(self, eps: Tensor) -> Tensor:
        """s~ - s for standard normals eps (r,), in float64."""
        return self.log_sigma.double().exp() * eps

    @torch.no_grad()
    def set_lora_(self: Adapter, A: Tensor, B: Tensor, scaling: float) -> None:
        """As `Adapter.set_lora_`, in the form of `to_scales`: of any adapter with a log_s (r,)."""
        Vh, B, singular = to_scales(A, B, scaling / self.config.scaling)
        Adapter.set_lora_(self, Vh, B, self.config.scaling)
        self.get_parameter("log_s")[: len(singular)] = singular.log()

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """(5) or (6), summed over layers and scales; a fitted prior uses (19)."""
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

    def widths(self) -> Tensor:
        return self.log_sigma.exp()


ADAPTERS.update(scalabl=SubspaceAdapter, mle=Adapter)


def to_scales(A: Tensor, B: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """A' (k, d_in), B' (d_out, k) and s (k,) of factor * B A = B' diag(s) A', float64.

    The thin SVD: s are the singular values, A' has orthonormal rows and B' orthonormal columns.
    Values that are 0 to rounding have no logarithm and are left out, so k is the rank.
    """
    left, R = torch.linalg.qr(B.detach().double())
    right, S = torch.linalg.qr(A.detach().double().T)
    U, singular, Vh = torch.linalg.svd(R @ S.T, full_matrices=False)  # B A is not formed
    least = torch.finfo(torch.float64).eps * max(len(B), A.shape[1]) * singular[0]
    k = int((singular > least).sum())
    return (Vh @ right.T)[:k], (left @ U)[:, :k], factor * singular[:k]


def initial_matrix(
    seed: int, layer: int, rank: int, d_in: int, widths: int | None = None
) -> tuple[Tensor, Tensor]:
    """A layer's Kaiming-uniform matrix (rank, d_in) and uniforms in (0, 1) for its widths.

    widths: how many uniforms; None means rank. The matrix is uniform in +-1 / sqrt(d_in),
    which is kaiming_uniform_ with a = sqrt(5); both float64.
    """
    count = rank * d_in + (rank if widths is None else widths)
    words = philox_words(seed, INIT_STREAM + layer, count).double()
    uniform = (words + 0.5) / 2**32
    matrix = (2 * uniform[: rank * d_in] - 1).view(rank, d_in) / math.sqrt(d_in)
    return matrix, uniform[rank * d_in :]


def initial_values(
    singular: Tensor, Vh: Tensor, uniform: Tensor, init_sigma: float
) -> dict[str, Tensor]:
    """A, log_s and log_sigma from the matrix's singular values (r,) and right vectors (r, d_in)."""
    sigma = initial_widths(uniform, init_sigma)
    return {"A": Vh, "log_s": singular.log(), "log_sigma": sigma.log()}


def initial_widths(uniform: Tensor, init_sigma: float) -> Tensor:
    """Map uniforms from (0, 1) to [init_sigma / sqrt 2, init_sigma]."""
    low = init_sigma / math.sqrt(2)
    return low + (init_sigma - low) * uniform


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The model's adapters by the name of the layer that carries them, in model order.

    Example:

    >>> from scalabl_ref import AdapterConfig, Llama, LlamaConfig, adapters, add_adapters
    >>> model = add_adapters(Llama(LlamaConfig(32, 8, 16, 1, 2, 1, 4)), AdapterConfig(rank=2))
    >>> list(adapters(model))
    ['layers.0.attn.q_proj', 'layers.0.attn.v_proj', 'lm_head']
    """
    return {
        name: module.adapter
        for name, module in model.named_modules()
        if isinstance(getattr(module, "adapter", None), Adapter)
    }


def random_adapters(model: nn.Module) -> list[Adapter]:
    """The model's adapters whose draws differ, in model order."""
    return [adapter for adapter in adapters(model).values() if adapter.random]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter parameter by name, such as layers.0.attn.q_proj.log_s."""
    return {
        f"{name}.{key}": parameter.detach()
        for name, adapter in adapters(model).items()
        for key, parameter in adapter.named_parameters()
    }
