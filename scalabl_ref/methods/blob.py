"""BLoB: every entry of A Gaussian and drawn by flipout, B a point.

Wang, Shi, Han, Metaxas, Wang, "BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large
Language Models", NeurIPS 2024. "The official code" is Wang-ML-Lab/bayesian-peft (bc6a4a7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import MIN_LOG_SIGMA, Adapter, initial_widths
from ..core.layer import row_noise
from ..core.noise import Keys, Noise
from ..core.objective import kl_forward
from ..support.errors import InputError

# Added to a layer's id for its signs: they and E then use different noise numbers.
SIGNS = 2**31


class FlipoutAdapter(Adapter):
    """Plain LoRA whose A has independent entries N(A_kj, Omega_kj^2), drawn by flipout.

        y = W x + bias + c B (A x + t * (Omega * E) (u * x))

    E (r, d_in) is standard normal, and all rows share it. Each group of rows has its own signs u
    (d_in,) and t (r,), +-1; `config.sampling` says which rows form a group. The draw of a group,
    diag(t) (Omega * E) diag(u), is Gaussian with the standard deviations Omega, and the draws of
    two groups are uncorrelated.

    The normals of E, row-major, are those of group 0 under the layer's id. The normals of u and
    then t are components 0 .. d_in + r - 1 of the row's group under the id plus SIGNS; a sign is -1
    where the normal is negative, else 1.
    """

    random = True
    joint = False  # because all rows share one E

    def omega(self) -> Tensor:
        """Standard deviations of A's entries, (r, d_in) or (r, 1)."""
        raise NotImplementedError

    def hidden(self, x: Tensor, A: Tensor, keys: Keys | None) -> Tensor:
        """(11): c (A x + t * (Omega * E) (u * x)), (..., r)."""
        if keys is None:
            return super().hidden(x, A, None)
        rank, d_in = A.shape
        u, t = self.signs(x.shape[:-1], keys).to(x).split([d_in, rank], dim=-1)  # (..., d_in or r)
        E = keys.noise.normal(self.layer, 1, rank * d_in).view(rank, d_in).to(x)
        drawn = F.linear(x, A) + t * F.linear(u * x, self.omega().to(x) * E)
        return self.config.scaling * drawn

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        A = self.A.double()
        if noise is None:
            return A
        rank, d_in = A.shape
        u, t = self.signs(torch.Size([1]), Keys(noise))[0].to(A).split([d_in, rank])  # group 0's
        E = noise.normal(self.layer, 1, rank * d_in).view(rank, d_in).to(A)
        return A + torch.outer(t, u) * self.omega().double() * E

    def signs(self, shape: torch.Size, keys: Keys) -> Tensor:
        """u and t of every row, (*shape, d_in + r) float32."""
        sampling, count = self.config.sampling, sum(self.A.shape)
        z = row_noise(shape, keys, SIGNS + self.layer, sampling, count)
        return torch.where(z < 0, -1.0, 1.0)


class BlobAdapter(FlipoutAdapter):
    """BLoB's: q(A_kj) = N(A_kj, Omega_kj^2), Omega = G^2, with G (r, d_in) trained.

    Initial values are the official code's: A is Kaiming-uniform, G uniform in [init_sigma / sqrt 2,
    init_sigma], B = 0. The prior's standard deviation is 0.2 unless the configuration sets another.
    """

    variational = ("G",)
    prior_std = 0.2

    def _add_parameters(self) -> None:
        self.G = nn.Parameter(torch.empty_like(self.A))

    def _initialise(self, matrix: Tensor, uniform: Tensor) -> None:
        super()._initialise(matrix, uniform)
        self.G.copy_(initial_widths(uniform, self.config.init_sigma).view_as(matrix))

    def omega(self) -> Tensor:
        return self.G.square()

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """KL(q || p) of all entries of all A. Raises InputError for another direction."""
        if kl != "forward":
            raise InputError(f"method blob has only the KL 'forward', not {kl!r}")
        A, G = (
            torch.cat([layer.get_parameter(name).flatten() for layer in layers]).double()
            for name in ("A", "G")
        )
        return kl_forward(A, G.square(), layers[0].config.sigma_p)

    @torch.no_grad()
    def bound_(self) -> None:
        """Keep log Omega above MIN_LOG_SIGMA; G keeps its sign."""
        least = math.exp(MIN_LOG_SIGMA / 2)
        self.G.copy_(self.G.abs().clamp(min=least).copysign(self.G))

    def widths(self) -> Tensor:
        return self.omega().flatten()
