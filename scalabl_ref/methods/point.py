"""ScalaBL without noise: a control for the effect of its initial values and learning rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, SubspaceAdapter, adapters
from ..core.layer import spread
from ..core.noise import Keys, Noise


class PointAdapter(Adapter):
    """Point estimates of ScalaBL's A, B and s, from ScalaBL's initial values.

    y = W x + bias + c B diag(s) A x, with log_s (r,) trained at the rate of ScalaBL's widths. The
    prior N(0, prior_std^2) on s is that of ScalaBL: the objective is MAP's, for the scales.
    """

    variational = ("log_s",)
    offset: Tensor | None = None  # (n, r): an input row of noise key g adds offset[g] to its s

    def _add_parameters(self) -> None:
        self.log_s = nn.Parameter(torch.empty(self.config.rank, dtype=torch.float32))

    def _initialise(self, matrix: Tensor, uniform: Tensor) -> None:
        _, singular, Vh = torch.linalg.svd(matrix, full_matrices=False)
        self.A.copy_(Vh)
        self.log_s.copy_(singular.log())

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, keys: Keys | None) -> Tensor:
        if self.offset is not None:  # the native op has one s for all rows
            y = F.linear(x, weight, bias)
            return y + self.update(x.to(y.dtype), keys)
        s, c = self.log_s.exp(), self.config.scaling
        return self.op(x, weight, bias, self.A, self.B, s, s, c, None)

    def hidden(self, x: Tensor, A: Tensor, keys: Keys | None) -> Tensor:
        s = self.log_s.exp().to(x)
        if self.offset is not None:
            if keys is None or keys.groups is None:
                raise ValueError("offsets need noise keys, by which a row's own is found")
            groups = spread("groups", keys.groups, x.shape[:-1])
            s = s + F.embedding(groups, self.offset).to(x)
        return super().hidden(x, A, keys) * s

    def lora_A(self, noise: Noise | None = None) -> Tensor:
        return self.log_s.double().exp()[:, None] * self.A.double()

    set_lora_ = SubspaceAdapter.set_lora_

    @classmethod
    def complexity(cls, layers: Sequence[Adapter], kl: str) -> Tensor:
        """Minus the log prior density of s, up to its constant: sum of s^2 / (2 prior_std^2)."""
        log_s = torch.stack([layer.get_parameter("log_s") for layer in layers]).double()
        return log_s.exp().square().sum() / (2 * layers[0].config.sigma_p ** 2)


@torch.no_grad()
def to_points(model: nn.Module) -> None:
    """Replace every adapter of `model` by a `PointAdapter` with the same mean function.

    The thin SVD of its update gives A, s and B, see `to_scales`. Components beyond the update's
    rank have a zero column in B. Layers, rank and alpha stay the same.
    """
    for name, adapter in adapters(model).items():
        config = dataclasses.replace(
            adapter.config, method="point", covariance="diagonal", prior="fixed"
        )
        d_in, d_out = adapter.A.shape[1], len(adapter.B)
        point = PointAdapter(d_in, d_out, config, adapter.layer, 0, adapter.A.device)
        point.to(adapter.A.dtype).set_lora_(adapter.lora_A(), adapter.B, config.scaling)
        model.get_submodule(name).adapter = point
