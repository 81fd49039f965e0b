"""Reproducible noise: a pure function of (seed, draw, layer, group), on any machine, in any order.

philox.py defines it. Here are the two fast bodies, vectorised PyTorch and the native core; all
three agree bit for bit. No global generator is read and nothing is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fast import native
from ..support.errors import InputError
from .philox import (
    ATANH,
    COS,
    KEY_STEPS,
    LN_2,
    MULTIPLIERS,
    SIN,
    SQRT_HALF,
    TURN,
    WORD,
    in_range,
    philox4x32,
)

__all__ = ["NOISE_VERSION", "Noise", "philox4x32", "philox_words"]

NOISE_VERSION = 1  # of the map from coordinates to normals: docs/conformance.md
SEED_END = 1 << 64
Word = int | Tensor
RESERVED_LAYER = WORD - 1  # the layer word of philox_words: no layer of a model may use it
# Draws 0, 1, ... belong to prediction; training's start here, so that no counter serves both.
FIRST_TRAINING_DRAW = 2**31
INDEPENDENT, ANTITHETIC = 0, 1  # values of Noise.design


@dataclass(frozen=True)
class Noise:
    """One draw of the weights: eps of every layer and group, as a pure function.

    seed: integer in [0, 2^64), the Philox key. draw: integer in [0, 2^32), for example the step or
    the sample. design: how draws depend on each other, for an average over draws 0, 1, ... with
    less error. INDEPENDENT: not at all. ANTITHETIC: draw 2i + 1 is minus draw 2i. n >= 2: each n
    draws from a multiple of n on are a Latin hypercube, see `latin`. Any one draw is standard
    normal all the same. Raises InputError for anything else.
    """

    seed: int
    draw: int
    design: int = INDEPENDENT

    def __post_init__(self) -> None:
        in_range("seed", self.seed, 0, SEED_END)
        in_range("draw", self.draw, 0, WORD)
        in_range("design", self.design, 0, FIRST_TRAINING_DRAW)

    def normal(self, layer: int, groups: int | Tensor, rank: int) -> Tensor:
        """Standard normals of one layer, (G, rank) float32 on the CPU; row g belongs to group g.

        layer: id in [0, 2^32 - 1). groups: the number G of groups, which then have the ids
        0 .. G-1, or a 1-D integer tensor of G ids, in any order, repeats allowed. Id g < 2^32 is
        group g; id g + 2^32 i is group g of draw + i, so that one call can serve several draws:
        see `later`. rank: >= 1.

        Raises InputError for anything else, such as an id whose draw is not below 2^32; where
        draws depend on each other, for one that is not below 2^31.
        """
        in_range("layer", layer, 0, RESERVED_LAYER)
        in_range("rank", rank, 1, 4 * WORD + 1)
        ids = _group_ids(groups, self.draw)
        if self.design != INDEPENDENT and len(ids):
            return self._designed(layer, ids, rank)
        core = native.core()
        if core is None:
            return _normals(self.seed, self.draw, layer, ids, rank)
        out = torch.empty(len(ids), rank, dtype=torch.float32, device="cpu")
        groups, draws = ids & 0xFFFFFFFF, ids >> 32
        lists = groups.data_ptr(), draws.data_ptr(), len(ids)
        core.normals(self.seed, self.draw, layer, *lists, rank, out.data_ptr())
        return out

    def _designed(self, layer: int, ids: Tensor, rank: int) -> Tensor:
        """`normal` for ids (G,) of dependent draws, made of independent ones."""
        draws, size = self.draw + ids // WORD, max(2, self.design)
        last = int(draws.max()) // size * size + size - 1
        in_range("last draw of a design", last, 0, FIRST_TRAINING_DRAW)
        independent, place = Noise(self.seed, 0), draws % size
        if self.design == ANTITHETIC:
            z = independent.normal(layer, later(ids % WORD, draws // size), rank)
            return torch.where(place[:, None] == 0, z, -z)
        first, where = later(ids % WORD, draws - place).unique(return_inverse=True)
        members = later(first, _arange(size)[:, None])  # (n, unique)
        z = independent.normal(layer, members.flatten(), rank).view(size, -1, rank)
        return latin(z)[place, where]


def philox_words(seed: int, stream: int, n: int) -> Tensor:
    """n uniform 32-bit words, (n,) int64, for whatever is random besides the noise.

    seed, stream: integers in [0, 2^64); streams of one seed are independent of each other and of
    its noise, since their counters carry a layer word that no layer may use. Words i = 4j .. 4j + 3
    are the block of counter (j, stream mod 2^32, 2^32 - 1, stream div 2^32).
    """
    in_range("seed", seed, 0, SEED_END)
    in_range("stream", stream, 0, SEED_END)
    in_range("n", n, 0, 4 * WORD + 1)
    block = _arange((n + 3) // 4)
    words = _philox(block, stream % WORD, RESERVED_LAYER, stream // WORD, seed)
    return torch.stack(words, dim=-1).reshape(-1)[:n]


def later(groups: Tensor, draws: int | Tensor) -> Tensor:
    """Ids of the same groups so many draws further on, int64; the two broadcast."""
    return groups + draws * WORD


def latin(z: Tensor) -> Tensor:
    """n independent standard normals (n, ...) -> n that cover the line evenly, float32.

    One of them lies in each of the n intervals of equal probability: in the k-th lowest of them the
    one whose z is the k-th lowest, at Phi^-1((k - 1 + v_k) / n). The v_k = (u_k / u_(k+1))^k, of
    the ordered u = Phi(z) and u_(n+1) = 1, are n independent uniforms, and independent of the
    order: Renyi's representation of order statistics. So no further noise is needed.
    """
    u, order = torch.special.ndtr(z.double()).sort(dim=0)
    k = torch.arange(1, len(z) + 1, device=z.device).view(-1, *[1] * (z.dim() - 1))
    v = (u / torch.cat((u[1:], torch.ones_like(u[:1])))) ** k
    even = torch.special.ndtri((k - 1 + v) / len(z))
    return even.gather(0, order.argsort(dim=0)).float()


def token_groups(ids: Tensor, positions: Tensor, span: int) -> Tensor:
    """Ids of a group for every token: id * span + position, under the draws that the ids carry.

    ids, positions: int64 that broadcast, positions below `span`. Raises InputError for an id so
    large that its tokens would reach into the word of the draws.
    """
    low = ids % WORD
    if not torch.compiler.is_compiling() and (low >= WORD // span).any():
        raise InputError(
            f"under token sampling, group ids must be below {WORD // span} with {span} positions, "
            f"not {int(low.max())}"
        )
    return ids - low + low * span + positions


def _group_ids(groups: int | Tensor, draw: int) -> Tensor:
    """Group ids (G,), int64, contiguous, on the CPU."""
    if not isinstance(groups, Tensor):
        return _arange(in_range("groups", groups, 0, WORD + 1))
    if groups.ndim != 1 or groups.is_floating_point() or groups.is_complex():
        raise InputError(f"groups must be a 1-D integer tensor, not {groups.ndim}-D {groups.dtype}")
    ids = groups.to("cpu", torch.int64).contiguous()
    if len(ids):
        low, high = (int(end) for end in ids.aminmax())
        end = min(1 << 63, (WORD - draw) * WORD)  # the draw of an id is a word too
        in_range("group id", low, 0, end)
        in_range("group id", high, 0, end)
    return ids


def _normals(seed: int, draw: int, layer: int, ids: Tensor, rank: int) -> Tensor:
    """philox.normal for all groups and components: ids (G,) -> (G, rank) float32."""
    ids, place = torch.unique_consecutive(ids, return_inverse=True)
    group, draws = ids[:, None] % WORD, draw + ids[:, None] // WORD
    words = _philox(_arange((rank + 3) // 4), group, layer, draws, seed)
    pairs = [z for a in (0, 2) for z in _box_muller(words[a], words[a + 1])]
    z = torch.stack(pairs, dim=-1)  # (G, blocks, 4)
    return z.flatten(1)[:, :rank].to(torch.float32)[place]


def _arange(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int64, device="cpu")


def _philox(block: Tensor, group: Word, layer: Word, draw: Word, seed: int) -> tuple[Tensor, ...]:
    """philox4x32 with 10 rounds on int64 tensors of counter words, broadcast against each other."""
    c0, c1, c2, c3 = torch.broadcast_tensors(
        block, *(torch.as_tensor(w, dtype=torch.int64, device="cpu") for w in (group, layer, draw))
    )
    k0, k1 = seed % WORD, seed // WORD
    for _ in range(10):
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


def _box_muller(word_a: Tensor, word_b: Tensor) -> tuple[Tensor, Tensor]:
    """philox.box_muller, the same operations in the same order on float64 tensors."""
    radius = _sqrt(-2.0 * _ln((word_a.double() + 0.5) * 2.0**-32))
    cos, sin = _cos_sin(word_b)
    return radius * cos, radius * sin


def _ln(u: Tensor) -> Tensor:
    m, e = torch.frexp(u)
    small = m < SQRT_HALF
    m, e = torch.where(small, m + m, m), e - small.int()
    f = (m - 1.0) / (m + 1.0)
    return e.double() * LN_2 + (f + f) * _polynomial(ATANH, f * f)


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    quarter = (word + (1 << 29)) >> 30
    x = (word - (quarter << 30)).double() * TURN
    cos, sin = _polynomial(COS, x * x), x * _polynomial(SIN, x * x)
    odd, upper = quarter & 1 == 1, quarter & 2 == 2
    cos, sin = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    return torch.where(upper, -cos, cos), torch.where(upper, -sin, sin)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, as IEEE 754 has it: torch.sqrt misses the last bit in one case of 80."""
    roots = [math.sqrt(value) for value in x.flatten().tolist()]
    return torch.tensor(roots, dtype=torch.float64, device="cpu").view(x.shape)


def _polynomial(coefficients: tuple[float, ...], z: Tensor) -> Tensor:
    value = torch.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * z + coefficient
    return value
