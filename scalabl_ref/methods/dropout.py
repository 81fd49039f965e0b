"""Monte Carlo dropout on the adapters' inputs (Gal and Ghahramani 2016), drawn by `Noise`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import Adapter
from ..core.layer import row_noise
from ..core.noise import Keys, Noise


class DropoutAdapter(Adapter):
    """Plain LoRA with dropout on its input, in training and in every draw of a prediction.

    y = W x + bias + c B A (m * x) / (1 - p), where m_j = 1 with probability 1 - p, else 0. Each
    group of rows, as `sampling` forms them, has its own m. `noise=None` keeps all of x.
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
        """m from standard normals z, bool, of the shape of z."""
        p = torch.tensor(self.config.dropout, dtype=torch.float64)
        return z >= torch.special.ndtri(p).item()  # P(z < that) = p

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        A = self.A.double()
        if noise is None:
            return A
        m = self.kept(noise.normal(self.layer, 1, A.shape[1])[0]).to(A)
        return A * m / (1 - self.config.dropout)
