"""ScalaBL with all correlations: a full Gaussian over the r scales, by its Cholesky factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, SubspaceAdapter
from ..core.layer import row_noise
from ..core.noise import Keys
from ..core.objective import fitted_prior_std
from ..support.errors import InputError


class FullAdapter(SubspaceAdapter):
    """q(s~) = N(s, L L^T): L (r, r) has exp(log_sigma) on its diagonal and `lower` below it.

    `lower` starts at 0, so the start is that of the diagonal covariance. `lower` adds r (r - 1) / 2
    parameters to each layer, and each row costs a product with L.
    """

    variational = ("log_s", "log_sigma", "lower")

    def _add_parameters(self) -> None:
        super()._add_parameters()
        rank = self.config.rank
        self.lower = nn.Parameter(torch.zeros(rank * (rank - 1) // 2, dtype=torch.float32))

    def factor(self) -> Tensor:
        """L, (r, r)."""
        rank = self.config.rank
        row, column = torch.tril_indices(rank, rank, -1)
        L = torch.diag(self.log_sigma.exp())
        return L.index_put((row, column), self.lower)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, keys: Keys | None) -> Tensor:
        if keys is None:
            return super().forward(x, weight, bias, None)
        return Adapter.forward(self, x, weight, bias, keys)

    def hidden(self, x: Tensor, A: Tensor, keys: Keys | None) -> Tensor:
        if keys is None:
            return super().hidden(x, A, None)
        eps = row_noise(x.shape[:-1], keys, self.layer, self.config.sampling, self.config.rank)
        s, L = self.log_s.exp().to(x), self.factor().to(x)
        return F.linear(x, A) * (self.config.scaling * (s + eps.to(x) @ L.T))

    def deviation(self, eps: Tensor) -> Tensor:
        return self.factor().double() @ eps

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """(20): KL(q || p) of Gaussians with covariances L L^T and sigma_p^2 I.

        Raises InputError for the other direction.
        """
        if kl != "forward":
            raise InputError(f"a full covariance has only the forward KL, not {kl!r}")
        own = [layer for layer in layers if isinstance(layer, FullAdapter)]
        s = torch.stack([layer.log_s for layer in own]).double().exp()  # (layers, r)
        L = torch.stack([layer.factor() for layer in own]).double()  # (layers, r, r)
        second = s.square() + L.square().sum(-1)  # E s~_k^2
        prior = fitted_prior_std(second, own[0].config, kl)
        log_ratio = torch.log(prior / L.diagonal(dim1=-2, dim2=-1))
        return (log_ratio + second / (2 * prior**2) - 0.5).sum()

    def widths(self) -> Tensor:
        """Marginal standard deviations."""
        return self.factor().square().sum(1).sqrt()
