"""Draws that depend on each other, so that their average has less error.

Each single draw is still standard normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..core.noise import FIRST_TRAINING_DRAW, Noise
from ..core.philox import WORD, in_range


class Design(Enum):
    """How the draws of an average depend on each other: see `DesignedNoise`."""

    INDEPENDENT = "independent"
    ANTITHETIC = "antithetic"
    LATIN = "latin"


def designed_normals(
    noise: DesignedNoise, layer: int, groups: Tensor, draws: Tensor | None, rank: int
) -> Tensor:
    """`Noise.normal` for dependent draws, made from independent ones."""
    size, later = noise.size, torch.zeros_like(groups) if draws is None else draws
    draws = noise.draw + later
    if len(draws):
        last = int(draws.max()) // size * size + size - 1
        in_range("last draw of a design", last, 0, FIRST_TRAINING_DRAW)
    independent, place = Noise(noise.seed, 0), draws % size
    if noise.design == Design.ANTITHETIC:
        z = independent.normal(layer, groups, rank, draws // size)
        return torch.where(place[:, None] == 0, z, -z)
    cubes, where = (groups + (draws - place) * WORD).unique(return_inverse=True)  # (U,), (G,)
    members = cubes // WORD + torch.arange(size)[:, None]  # (n, U) draws
    group = (cubes % WORD).expand(size, -1)
    z = independent.normal(layer, group.flatten(), rank, members.flatten())
    return latin(z.view(size, -1, rank))[place, where]


@dataclass(frozen=True)
class DesignedNoise(Noise):
    """A `Noise` whose draws depend on each other.

    ANTITHETIC: draw 2i + 1 is minus draw 2i, size is 2. LATIN: draws kn to kn + n - 1 form one
    Latin hypercube of size n >= 2, see `latin`. Raises InputError for another size, and, when
    drawn, for draws of 2^31 and more.
    """

    design: Design = Design.ANTITHETIC
    size: int = 2

    normals = staticmethod(designed_normals)

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = 2 if self.design == Design.ANTITHETIC else FIRST_TRAINING_DRAW - 1
        in_range("size of a design", self.size, 2, largest + 1)


def latin(z: Tensor) -> Tensor:
    """n independent standard normals (n, ...) -> n that cover the line evenly, float32.

    Each of the n intervals of equal probability gets one. The k-th lowest z moves into the k-th
    lowest interval, to Phi^-1((k - 1 + v_k) / n). The v_k = (u_k / u_(k+1))^k, of the ordered
    u = Phi(z) and u_(n+1) = 1, are n independent uniforms, and independent of the order (Renyi's
    representation of order statistics). So no further noise is needed.
    """
    u, order = torch.special.ndtr(z.double()).sort(dim=0)
    k = torch.arange(1, len(z) + 1, device=z.device).view(-1, *[1] * (z.dim() - 1))
    v = (u / torch.cat((u[1:], torch.ones_like(u[:1])))) ** k
    even = torch.special.ndtri((k - 1 + v) / len(z))
    return even.gather(0, order.argsort(dim=0)).float()
