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
from ..core.layer import row_noise
from ..core.noise import Keys, Noise
from ..core.objective import kl_forward
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

    def hidden(self, x: Tensor, A: Tensor, keys: Keys | None) -> Tensor:
        """(10): c (A x + t * (Omega * E) (u * x)), (..., r)."""
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
            raise InputError(f"method blob has the KL 'forward' alone, not {kl!r}")
        A, G = (
            torch.cat([layer.get_parameter(name).flatten() for layer in layers]).double()
            for name in ("A", "G")
        )
        return kl_forward(A, G.square(), layers[0].config.sigma_p)

    @torch.no_grad()
    def bound_(self) -> None:
        """Keep log Omega above MIN_LOG_SIGMA, whatever the sign of G."""
        least = math.exp(MIN_LOG_SIGMA / 2)
        self.G.copy_(self.G.abs().clamp(min=least).copysign(self.G))

    def widths(self) -> Tensor:
        return self.omega().flatten()
