"""Reproducible noise: a pure function of (seed, draw, layer, group), on any machine, in any order.

philox.py defines the numbers. No global generator is used and nothing is stored: the coordinates of
a draw are enough to make it again, as the backward pass does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..support.errors import InputError
from .philox import WORD, in_range, normal_row, word_stream

NOISE_VERSION = 1  # of the map from coordinates to normals: docs/conformance.md
SEED_END = 1 << 64
RESERVED_LAYER = WORD - 1  # the layer word of philox_words: no layer of a model may use it
# Draws 0, 1, ... belong to prediction; training's start here, so that the two share no counter.
FIRST_TRAINING_DRAW = 2**31


def plain_normals(
    noise: Noise, layer: int, groups: Tensor, draws: Tensor | None, rank: int
) -> Tensor:
    """eps, row by row: groups (G,) int64, draws (G,) int64 or None -> (G, rank) float32, CPU."""
    later = [0] * len(groups) if draws is None else draws.tolist()
    coordinates = [(noise.draw + d, g) for d, g in zip(later, groups.tolist(), strict=True)]
    row = {at: normal_row(noise.seed, at[0], layer, at[1], rank) for at in set(coordinates)}
    rows = [row[at] for at in coordinates]
    return torch.tensor(rows, dtype=torch.float32, device="cpu").view(len(rows), rank)


def plain_words(seed: int, stream: int, n: int) -> Tensor:
    """The words of `philox_words`, (n,) int64, CPU."""
    words = word_stream(seed, stream, RESERVED_LAYER, n)
    return torch.tensor(words, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Noise:
    """One draw of the weights: eps of every layer and group, as a pure function.

    seed: integer in [0, 2^64), the Philox key. draw: integer in [0, 2^32), for example the step or
    the sample. Raises InputError for anything else.

    Example: row g belongs to group g, whichever other groups are in the call.

    >>> import torch
    >>> from scalabl_ref import Noise
    >>> eps = Noise(seed=0, draw=1).normal(layer=2, groups=3, rank=4)
    >>> eps.shape
    torch.Size([3, 4])
    >>> Noise(seed=0, draw=1).normal(2, torch.tensor([2]), 4).equal(eps[2:])
    True
    """

    seed: int
    draw: int

    # Hooks: the package puts faster functions here, which give the same bits.
    normals: ClassVar[Callable[..., Tensor]] = staticmethod(plain_normals)
    words: ClassVar[Callable[..., Tensor]] = staticmethod(plain_words)

    def __post_init__(self) -> None:
        in_range("seed", self.seed, 0, SEED_END)
        in_range("draw", self.draw, 0, WORD)

    def normal(
        self, layer: int, groups: int | Tensor, rank: int, draws: Tensor | None = None
    ) -> Tensor:
        """Standard normals of one layer, (G, rank) float32 on the CPU; row g belongs to group g.

        layer: id in [0, 2^32 - 1). groups: the number G of groups, which then have the ids
        0 .. G-1, or a 1-D integer tensor of G ids in [0, 2^32), in any order, repeats allowed.
        rank: >= 1. draws: (G,) integers >= 0, added to `draw` for each row, so that one call can
        serve several draws; None adds 0.

        Raises InputError for anything else, such as a draw that reaches 2^32.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.normals(self, layer, groups, draws, rank)  # values are not known yet
        in_range("layer", layer, 0, RESERVED_LAYER)
        in_range("rank", rank, 1, 4 * WORD + 1)
        if not isinstance(groups, Tensor):
            groups = torch.arange(in_range("groups", groups, 0, WORD + 1), device="cpu")
        ids = _integers("groups", "group id", groups, WORD)
        if draws is not None:
            draws = _integers("draws", "draw", draws, WORD - self.draw)
            if len(draws) != len(ids):
                raise InputError(
                    f"draws must have {len(ids)} entries, one for each group, not {len(draws)}"
                )
        return self.normals(self, layer, ids, draws, rank)


class Keys(NamedTuple):
    """The eps that each row of a layer's input takes, as a model passes it to its layers.

    groups: int64 ids whose shape is a leading part of the rows' shape; None numbers the rows by
    their place. draws: int64 of such a shape, added to `noise.draw`; None adds 0.
    """

    noise: Noise
    groups: Tensor | None = None
    draws: Tensor | None = None


def philox_words(seed: int, stream: int, n: int) -> Tensor:
    """n uniform 32-bit words, (n,) int64, for everything that is random besides the noise.

    seed, stream: integers in [0, 2^64). Streams of one seed are independent of each other and of
    its noise: their counters carry a layer word that no layer may use. Words i = 4j .. 4j + 3
    are the block of counter (j, stream mod 2^32, 2^32 - 1, stream div 2^32).
    """
    in_range("seed", seed, 0, SEED_END)
    in_range("stream", stream, 0, SEED_END)
    in_range("n", n, 0, 4 * WORD + 1)
    return Noise.words(seed, stream, n)


def token_groups(groups: Tensor, positions: Tensor, span: int) -> Tensor:
    """A group id for every token: id * span + position, below 2^32.

    groups, positions: int64 that broadcast, positions below `span`. Raises InputError for an id
    that leaves no room for its tokens.
    """
    if not torch.compiler.is_compiling() and (groups >= WORD // span).any():
        raise InputError(
            f"under token sampling, group ids must be below {WORD // span} with {span} positions, "
            f"not {int(groups.max())}"
        )
    return groups * span + positions


def _integers(name: str, entry: str, values: Tensor, end: int) -> Tensor:
    """`values` as (G,) int64, contiguous, on the CPU; InputError unless each is in [0, end)."""
    if values.ndim != 1 or values.is_floating_point() or values.is_complex():
        raise InputError(f"{name} must be a 1-D integer tensor, not {values.ndim}-D {values.dtype}")
    values = values.to("cpu", torch.int64).contiguous()
    for extreme in values.aminmax() if len(values) else ():
        in_range(entry, int(extreme), 0, end)
    return values
