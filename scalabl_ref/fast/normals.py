"""The noise of core/noise.py, faster and with the same bits: in the native core, or in PyTorch.

For torch.compile and torch.func it is a registered operator, which both support.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.noise import RESERVED_LAYER, Noise
from ..core.philox import (
    ATANH,
    COS,
    KEY_STEPS,
    LN_2,
    MULTIPLIERS,
    ROUNDS,
    SIN,
    SQRT_HALF,
    TURN,
    WORD,
    polynomial,
)
from . import native
from .designs import Design, DesignedNoise

MASK = 2**64 - 1
Word = int | Tensor


def normals(noise: Noise, layer: int, groups: Tensor, draws: Tensor | None, rank: int) -> Tensor:
    """The fast version of `plain_normals`: groups (G,), draws (G,) or None -> (G, rank) float32."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.ops.scalabl_ref.normals(groups, draws, *numbers(noise), layer, rank)
    core = native.core()
    if core is None:
        return vectorised_normals(noise, layer, groups, draws, rank)
    out = torch.empty(len(groups), rank, dtype=torch.float32, device="cpu")
    core.normals(
        noise.seed, noise.draw, layer, groups.data_ptr(), 0 if draws is None else draws.data_ptr(),
        len(groups), rank, out.data_ptr(),
    )  # fmt: skip
    return out


def vectorised_normals(
    noise: Noise, layer: int, groups: Tensor, draws: Tensor | None, rank: int
) -> Tensor:
    """`philox.normal_row` for all groups and components at once."""
    both = groups if draws is None else groups + draws * WORD  # distinct even if it wraps
    _, place = torch.unique_consecutive(both, return_inverse=True)
    count = int(place.max()) + 1 if len(place) else 0
    first = torch.zeros(count, dtype=torch.int64, device="cpu")
    first[place] = _arange(len(place))  # equal neighbours are computed once
    group, draw = groups[first, None], torch.full_like(first, noise.draw)[:, None]
    draw = draw if draws is None else draw + draws[first, None]
    words = _philox(_arange((rank + 3) // 4), group, layer, draw, noise.seed)
    z = torch.stack([z for a in (0, 2) for z in box_muller(words[a], words[a + 1])], dim=-1)
    return z.flatten(1)[:, :rank].to(torch.float32)[place]  # of (G, blocks, 4)


def words(seed: int, stream: int, n: int) -> Tensor:
    """The fast version of `plain_words`: (n,) int64."""
    block = _arange((n + 3) // 4)
    four = _philox(block, stream % WORD, RESERVED_LAYER, stream // WORD, seed)
    return torch.stack(four, dim=-1).reshape(-1)[:n]


# --- The registered operator ----------------------------------------------------------------------


def signed(seed: int) -> int:
    """A seed as the signed 64-bit integer of the same bits, which an operator can take."""
    return seed if seed < 2**63 else seed - 2**64


def numbers(noise: Noise) -> tuple[int, int, int, int]:
    """A noise as numbers that an operator takes: seed (signed), draw, design and its size."""
    seed = signed(noise.seed)
    if isinstance(noise, DesignedNoise):
        return seed, noise.draw, list(Design).index(noise.design), noise.size
    return seed, noise.draw, 0, 1


def from_numbers(seed: int, draw: int, design: int, size: int) -> Noise:
    """The noise of these `numbers`."""
    if design == 0:
        return Noise(seed & MASK, draw)
    return DesignedNoise(seed & MASK, draw, list(Design)[design], size)


@torch.library.custom_op(
    "scalabl_ref::normals",
    mutates_args=(),
    schema="(Tensor groups, Tensor? draws, SymInt seed, SymInt draw, SymInt design, SymInt size, "
    "SymInt layer, SymInt rank) -> Tensor",
)
def registered_normals(groups: Tensor, draws: Tensor | None, *rest: int) -> Tensor:
    """`Noise.normal` for groups and draws of any one shape: (*groups.shape, rank)."""
    *noise, layer, rank = rest
    later = None if draws is None else draws.reshape(-1)
    eps = from_numbers(*noise).normal(layer, groups.reshape(-1), rank, later)
    return eps.view(*groups.shape, rank).to(groups.device)


@registered_normals.register_fake
def normals_shape(groups: Tensor, draws: Tensor | None, *rest: int) -> Tensor:
    return groups.new_empty(*groups.shape, rest[-1], dtype=torch.float32)


@registered_normals.register_vmap
def normals_over_a_batch(
    info: Any, in_dims: Any, groups: Tensor, draws: Tensor | None, *rest: int
) -> tuple[Tensor, int]:
    def whole(values: Tensor, dim: int | None) -> Tensor:
        batched = values.movedim(dim, 0) if dim is not None else values[None]
        return batched.expand(info.batch_size, *batched.shape[1:])

    groups = whole(groups, in_dims[0])
    draws = None if draws is None else whole(draws, in_dims[1])
    return torch.ops.scalabl_ref.normals(groups, draws, *rest), 0


# --- Philox and Box-Muller on tensors -------------------------------------------------------------


def _arange(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int64, device="cpu")


def _philox(block: Tensor, group: Word, layer: Word, draw: Word, seed: int) -> tuple[Tensor, ...]:
    """philox4x32 with 10 rounds on int64 tensors of counter words, broadcast against each other."""
    c0, c1, c2, c3 = torch.broadcast_tensors(
        block, *(torch.as_tensor(w, dtype=torch.int64, device="cpu") for w in (group, layer, draw))
    )
    k0, k1 = seed % WORD, seed // WORD
    for _ in range(ROUNDS):
        hi0, lo0 = _multiply(c0, MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + KEY_STEPS[0]) % WORD, (k1 + KEY_STEPS[1]) % WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product, by halves of the factor: int64 must not overflow."""
    low = word * (factor & 0xFFFF)
    high = word * (factor >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def box_muller(word_a: Tensor, word_b: Tensor) -> tuple[Tensor, Tensor]:
    """philox.box_muller, the same operations in the same order on float64 tensors."""
    radius = _sqrt(-2.0 * _ln((word_a.double() + 0.5) * 2.0**-32))
    cos, sin = _cos_sin(word_b)
    return radius * cos, radius * sin


def _ln(u: Tensor) -> Tensor:
    m, e = torch.frexp(u)
    small = m < SQRT_HALF
    m, e = torch.where(small, m + m, m), e - small.int()
    f = (m - 1.0) / (m + 1.0)
    return e.double() * LN_2 + (f + f) * polynomial(ATANH, f * f)


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    quarter = (word + (1 << 29)) >> 30
    x = (word - (quarter << 30)).double() * TURN
    cos, sin = polynomial(COS, x * x), x * polynomial(SIN, x * x)
    odd, upper = quarter & 1 == 1, quarter & 2 == 2
    cos, sin = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    return torch.where(upper, -cos, cos), torch.where(upper, -sin, sin)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded as in IEEE 754: torch.sqrt has a wrong last bit in one case of 80."""
    roots = [math.sqrt(value) for value in x.flatten().tolist()]
    return torch.tensor(roots, dtype=torch.float64, device="cpu").view(x.shape)
