"""MAP: plain LoRA under a Gaussian prior on every entry of A and B."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.adapter import Adapter


class MapAdapter(Adapter):
    """Plain LoRA under the prior N(0, prior_std^2) on every entry of A and B."""

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """Minus the log prior density, up to its constant: sum of squares / (2 prior_std^2)."""
        squares = torch.stack([p.double().square().sum() for a in layers for p in (a.A, a.B)])
        return squares.sum() / (2 * layers[0].config.sigma_p ** 2)
