"""The noise, version 1, one number at a time and in plain Python: the definition to port from.

    coordinates --philox4x32--> four 32-bit words --box_muller--> four standard normals

docs/conformance.md says the same in words. Every step is either an integer operation or one of the
IEEE 754 double operations + - * / sqrt, in a fixed order and never fused. So this file, the
vectorised PyTorch code (fast/normals.py) and the C++ core (csrc/normal.h) agree bit for bit, and
agree with the exact mathematics within (1/2 + 2^-25) ulp of float32.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from operator import index
from typing import Any

from ..support.errors import InputError

WORD = 1 << 32  # words, counters and keys are integers in [0, WORD)

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of counter words 0 and 2
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, added to the key each round
ROUNDS, MAX_ROUNDS = 10, 16

SQRT_HALF = 0.7071067811865476  # 0x1.6a09e667f3bcdp-1
LN_2 = 0.6931471805599453  # 0x1.62e42fefa39efp-1
TURN = 1.4629180792671596e-09  # 2 pi / 2^32 = 0x1.921fb54442d18p-30
# atanh(f) / f = sum f^2k / (2k + 1); sin(x) / x and cos(x) in powers of x^2
ATANH = tuple(1.0 / (2 * k + 1) for k in range(11))
SIN = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9))
COS = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9))


def philox4x32(
    counter: Sequence[int], key: Sequence[int], rounds: int = ROUNDS
) -> tuple[int, int, int, int]:
    """The Philox 4x32 block function: four and two 32-bit words in, four out.

    Random123's known answers hold for 7 and 10 rounds; the noise uses 10. Raises InputError unless
    there are four counter and two key words in [0, 2^32) and 1 to 16 rounds.

    Example: the first known answer of Random123.

    >>> from scalabl_ref import philox4x32
    >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = _words("counter", counter, 4)
    k0, k1 = _words("key", key, 2)
    for _ in range(in_range("rounds", rounds, 1, MAX_ROUNDS + 1)):
        hi0, lo0 = divmod(MULTIPLIERS[0] * c0, WORD)
        hi1, lo1 = divmod(MULTIPLIERS[1] * c2, WORD)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + KEY_STEPS[0]) % WORD, (k1 + KEY_STEPS[1]) % WORD
    return c0, c1, c2, c3


def box_muller(word_a: int, word_b: int) -> tuple[float, float]:
    """Two words to two independent standard normals, in double precision.

    radius = sqrt(-2 ln((a + 1/2) / 2^32)), angle = 2 pi b / 2^32; (radius cos, radius sin).
    """
    radius = math.sqrt(-2.0 * _ln((word_a + 0.5) * 2.0**-32))
    cos, sin = _cos_sin(word_b)
    return radius * cos, radius * sin


def normal_block(seed: int, draw: int, layer: int, group: int, j: int) -> list[float]:
    """Components 4j .. 4j + 3 of eps of one group, each rounded to float32 (and a Python float).

    Words 0 and 1 of counter (j, group, layer, draw) give the first two, words 2 and 3 the last two.
    """
    w = philox4x32((j, group, layer, draw), (seed % WORD, seed // WORD))
    doubles = (*box_muller(w[0], w[1]), *box_muller(w[2], w[3]))
    return list(struct.unpack("4f", struct.pack("4f", *doubles)))


def normal_row(seed: int, draw: int, layer: int, group: int, rank: int) -> list[float]:
    """eps of one group: its first `rank` components."""
    blocks = (normal_block(seed, draw, layer, group, j) for j in range((rank + 3) // 4))
    return [z for block in blocks for z in block][:rank]


def word_stream(seed: int, stream: int, layer: int, n: int) -> list[int]:
    """n words; 4j .. 4j + 3 are of counter (j, stream mod 2^32, layer, stream div 2^32)."""
    words: list[int] = []
    for j in range((n + 3) // 4):
        counter = (j, stream % WORD, layer, stream // WORD)
        words += philox4x32(counter, (seed % WORD, seed // WORD))
    return words[:n]


def _ln(u: float) -> float:
    """ln u of u = m 2^e with m in [sqrt 1/2, sqrt 2): e ln 2 + 2 atanh((m - 1) / (m + 1))."""
    m, e = math.frexp(u)
    if m < SQRT_HALF:
        m, e = m + m, e - 1
    f = (m - 1.0) / (m + 1.0)  # both exact: m has 33 significant bits
    return e * LN_2 + (f + f) * polynomial(ATANH, f * f)


def _cos_sin(word: int) -> tuple[float, float]:
    """cos and sin of 2 pi word / 2^32: whole quarter turns are subtracted exactly, as integers."""
    quarter = (word + (1 << 29)) >> 30  # the nearest one, 0 to 4
    x = (word - (quarter << 30)) * TURN  # in [-pi / 4, pi / 4)
    cos, sin = polynomial(COS, x * x), x * polynomial(SIN, x * x)
    return ((cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos))[quarter % 4]


def polynomial(coefficients: Sequence[float], z: Any) -> Any:
    """sum_k coefficients[k] z^k by Horner's rule, highest power first; z: a number or a tensor."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * z + coefficient
    return value


def in_range(name: str, value: int, low: int, high: int) -> int:
    """`value` as an int in [low, high), or an InputError that names it."""
    try:
        number = index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number < high:
        raise InputError(f"{name} must be in [{low}, {high}), not {number}")
    return number


def _words(name: str, values: Sequence[int], count: int) -> list[int]:
    if len(values) != count:
        raise InputError(f"{name} must have {count} words, not {len(values)}")
    return [in_range(f"{name} word", value, 0, WORD) for value in values]
