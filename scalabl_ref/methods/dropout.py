"""Monte Carlo dropout on the adapters' inputs (Gal and Ghahramani 2016), drawn by `Noise`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import Adapter
from ..core.layer import row_noise
from ..core.noise import Keys, Noise


class DropoutAdapter(Adapter):
    """Plain LoRA whose input is thinned out, in training and in every draw of a prediction.

    y = W x + bias + c B A (m * x) / (1 - p), m_j = 1 with probability 1 - p, independently for the
    rows that `sampling` tells apart. `noise=None` is x itself.
    """

    random = True

    def hidden(self, x: Tensor, A: Tensor, keys: Keys | None) -> Tensor:
        p, sampling = self.config.dropout, self.config.sampling
        if keys is None or p == 0:
            return super().hidden(x, A, None)
        z = row_noise(x.shape[:-1], keys, self.layer, sampling, x.shape[-1])  # (..., d_in)
        kept = self.kept(z).to(x) * (self.config.scaling / (1 - p))
        return F.linear(x * kept, A)

    def kept(self, z: Tensor) -> Tensor:
        """m of standard normals z, of their shape, bool."""
        p = torch.tensor(self.config.dropout, dtype=torch.float64)
        return z >= torch.special.ndtri(p).item()  # P(z < that) = p

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        A = self.A.double()
        if noise is None:
            return A
        m = self.kept(noise.normal(self.layer, 1, A.shape[1])[0]).to(A)
        return A * m / (1 - self.config.dropout)
