"""BLoB: every entry of A Gaussian and drawn by flipout, B a point.

Wang, Shi, Han, Metaxas, Wang, "BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large
Language Models", NeurIPS 2024. "The official code" is Wang-ML-Lab/bayesian-peft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import MIN_LOG_SIGMA, Adapter, initial_widths
from ..core.divergence import kl_forward
from ..core.noise import Noise
from ..fast.ops import adapted_linear, row_noise
from ..support.errors import InputError

# Added to a layer's id for the counters of its signs, so that none of them is one of E's.
SIGNS = 2**31


class FlipoutAdapter(Adapter):
    """Plain LoRA whose A has independent entries N(A_kj, Omega_kj^2), drawn by flipout.

        y = W x + bias + c B (A x + t * (Omega * E) (u * x))

    E (r, d_in) is standard normal and one for all rows; the signs u (d_in,) and t (r,), +-1, are a
    group's own, where groups are those of `config.sampling`. Each group's draw diag(t) (Omega * E)
    diag(u) has the distribution intended, and two groups' draws are uncorrelated.

    Of a `Noise`, a layer uses group 0 of its own id for E, row-major, and components 0 .. d_in + r
    - 1 of its group of id + SIGNS for u and then t: 1 where the normal is not negative, else -1.
    """

    random = True
    joint = False  # as all rows share one E

    def omega(self) -> Tensor:
        """Standard deviations of A's entries, (r, d_in) or (r, 1)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        noise: Noise | None,
        groups: Tensor | None,
    ) -> Tensor:
        if noise is None:
            return super().forward(x, weight, bias, None, groups)
        rank, d_in = self.A.shape
        signs = self.signs(x.shape[:-1], noise, groups)
        E = noise.normal(self.layer, 1, rank * d_in).view(rank, d_in)

        def hidden(x: Tensor, A: Tensor) -> Tensor:
            u, t = signs.to(x).split([d_in, rank], dim=-1)  # (..., d_in), (..., r)
            drawn = F.linear(x, A) + t * F.linear(u * x, self.omega().to(x) * E.to(x))
            return self.config.scaling * drawn

        return adapted_linear(x, weight, bias, self.A, self.B, hidden)

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        A = self.A.double()
        if noise is None:
            return A
        rank, d_in = A.shape
        u, t = self.signs(torch.Size([1]), noise, None)[0].to(A).split([d_in, rank])  # group 0's
        E = noise.normal(self.layer, 1, rank * d_in).view(rank, d_in).to(A)
        return A + torch.outer(t, u) * self.omega().double() * E

    def signs(self, shape: torch.Size, noise: Noise, groups: Tensor | None) -> Tensor:
        """u and t of every row, (*shape, d_in + r) float32."""
        sampling, count = self.config.sampling, sum(self.A.shape)
        z = row_noise(shape, noise, SIGNS + self.layer, sampling, groups, count)
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
            raise InputError(f"method blob has the KL 'forward' alone, not {kl!r}")
        A, G = (
            torch.cat([layer.get_parameter(name).flatten() for layer in layers]).double()
            for name in ("A", "G")
        )
        return kl_forward(A, G.square(), layers[0].config.prior_std)

    @torch.no_grad()
    def bound_(self) -> None:
        """Keep log Omega above MIN_LOG_SIGMA, whatever the sign of G."""
        least = math.exp(MIN_LOG_SIGMA / 2)
        self.G.copy_(self.G.abs().clamp(min=least).copysign(self.G))

    def widths(self) -> Tensor:
        return self.omega().flatten()
