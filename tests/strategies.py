"""Hypothesis strategies: shapes, strides, dtypes, seeds are drawn; contents follow from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from scalabl_ref import Noise
from scalabl_ref.ops import SAMPLING


@dataclass
class OpCase:
    """Arguments of `subspace_lora_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    s: Tensor
    sigma: Tensor
    scaling: float
    noise: Noise | None
    layer: int
    sampling: str
    groups: Tensor | None

    def arguments(self) -> dict:
        return dict(vars(self))

    def row_noise(self) -> Tensor:
        """eps of every row, (rows, r) float64, from the documented meaning of the groups."""
        shape = self.x.shape[:-1]
        index = torch.arange(shape.numel()).reshape(shape)
        rank = len(self.s)
        if self.noise is None:
            return torch.zeros(shape.numel(), rank).double()
        if self.sampling == "batch":
            ids = torch.zeros_like(index)
        elif self.groups is not None:
            ids = self.groups.reshape(*self.groups.shape, *[1] * (len(shape) - self.groups.dim()))
            ids = ids.expand(shape)
        elif self.sampling == "token":
            ids = index
        else:
            ids = index // shape[1:].numel()
        return torch.cat(
            [self.noise.normal(self.layer, g.reshape(1), rank) for g in ids.reshape(-1)]
        ).double()


@st.composite
def op_cases(draw, dtype=None, sampling=None) -> OpCase:
    dtype = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    rank, d_in, d_out = (draw(st.integers(1, n)) for n in (9, 17, 11))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(*shape, 2 * d_in)[..., ::2] if draw(st.booleans()) else normal(*shape, d_in)
    groups = None
    if draw(st.booleans()):
        leading = draw(st.integers(1, len(shape)))
        groups = torch.randint(0, 2**32, shape[:leading], generator=generator)
    noise = Noise(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**32 - 1)))
    return OpCase(
        x=x,
        weight=normal(d_out, d_in),
        bias=normal(d_out) if draw(st.booleans()) else None,
        A=normal(rank, d_in),
        B=normal(d_out, rank),
        s=normal(rank).exp(),
        sigma=normal(rank).exp(),
        scaling=draw(st.sampled_from([0.5, 1.0, 2.0])),
        noise=draw(st.sampled_from([noise, noise, None])),
        layer=draw(st.integers(0, 1000)),
        sampling=sampling or draw(st.sampled_from(SAMPLING)),
        groups=groups,
    )
