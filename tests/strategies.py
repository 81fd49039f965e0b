"""Hypothesis strategies: shapes, strides, dtypes, seeds are drawn; contents follow from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from scalabl_ref import Noise
from scalabl_ref.core.layer import SAMPLING
from scalabl_ref.verify.checks import Case


@dataclass(frozen=True)
class OpCase(Case):
    """Arguments of `subspace_lora_linear`, and what tests know of them by other means."""

    draws: torch.Tensor | None = None

    def arguments(self) -> dict:
        return dict(vars(self))

    def longest_sum(self) -> int:
        """Terms of the longest sum in the op or its gradients, whatever they are summed over."""
        d_out, d_in = self.weight.shape
        return d_in + d_out + len(self.s) + self.x.shape[:-1].numel()

    def row_noise(self) -> torch.Tensor:
        """eps of every row, (rows, r) float64, from the documented meaning of the groups."""
        shape = self.x.shape[:-1]
        index = torch.arange(shape.numel()).reshape(shape)
        rank = len(self.s)
        if self.noise is None:
            return torch.zeros(shape.numel(), rank).double()
        if self.groups is not None:
            ids = self.groups.reshape(*self.groups.shape, *[1] * (len(shape) - self.groups.dim()))
            ids = ids.expand(shape)
        if self.sampling == "batch":
            ids = torch.zeros_like(index)
        elif self.groups is not None:
            pass
        elif self.sampling == "token":
            ids = index
        else:
            ids = index // shape[1:].numel()
        draws = torch.zeros_like(index)
        if self.draws is not None:
            extra = [1] * (len(shape) - self.draws.dim())
            draws = self.draws.reshape(*self.draws.shape, *extra).expand(shape)
        rows = [
            replace(self.noise, draw=self.noise.draw + int(d)).normal(
                self.layer, g.reshape(1), rank
            )
            for g, d in zip(ids.reshape(-1), draws.reshape(-1), strict=True)
        ]
        return torch.cat(rows).double() if rows else torch.zeros(0, rank).double()


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def op_cases(draw, dtype=None, sampling=None, dtypes=DTYPES[:2], widest=17, joint=False) -> OpCase:
    """Shapes up to `widest` columns, any leading dimensions (empty ones too), row strides, dtypes.

    The adapter is in the dtype of x or in float32. joint: rows of several draws, half of the time.
    """
    dtype = dtype or draw(st.sampled_from(dtypes))
    own = draw(st.sampled_from([dtype, torch.float32]))
    rank, d_in, d_out = (draw(st.integers(1, n)) for n in (9, widest, widest - 4))
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size, dtype=dtype):
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(dtype)

    def matrix(*size, dtype=dtype):
        """Contiguous, with gaps between its rows, or with a column stride that is not 1."""
        layout = draw(st.sampled_from(["dense", "gaps", "columns"]))
        if layout == "gaps":
            return normal(*size[:-1], size[-1] + 3, dtype=dtype)[..., 1:-2]
        if layout == "columns":
            return normal(*size[:-1], 2 * size[-1], dtype=dtype)[..., ::2]
        return normal(*size, dtype=dtype)

    groups = None
    if draw(st.booleans()):
        leading = draw(st.integers(1, len(shape)))
        pool = torch.randint(0, 2**32, (draw(st.integers(1, 20)),), generator=generator)
        choice = torch.randint(0, len(pool), shape[:leading], generator=generator)
        groups = pool[choice]
    draws = None
    if joint and draw(st.booleans()):
        draws = torch.randint(0, 3, shape[: draw(st.integers(1, len(shape)))], generator=generator)
    seed = st.integers(0, 2**64 - 1) | st.sampled_from((2**63, 2**64 - 1))
    noise = Noise(draw(seed), draw(st.integers(0, 2**32 - 3)))
    return OpCase(
        x=matrix(*shape, d_in),
        weight=matrix(d_out, d_in),
        bias=normal(d_out) if draw(st.booleans()) else None,
        A=matrix(rank, d_in, dtype=own),
        B=matrix(d_out, rank, dtype=own),
        s=normal(rank, dtype=own).exp(),
        sigma=normal(rank, dtype=own).exp(),
        scaling=draw(st.sampled_from([0.5, 1.0, 2.0])),
        noise=draw(st.sampled_from([noise, noise, None])),
        layer=draw(st.integers(0, 1000)),
        sampling=sampling or draw(st.sampled_from(SAMPLING)),
        groups=groups,
        draws=draws,
    )


# log s and log sigma of three scales
gaussians = st.lists(st.tuples(st.floats(-2, 2), st.floats(-3, 1)), min_size=3, max_size=3)
