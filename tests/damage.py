"""Damage to small valid files: to bytes anywhere, and to values where their format has meaning."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

INTEGERS = (0, 1, -1, 2, 3, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1,
            2**63 - 1, 2**63, -(2**63), 2**64, 10**30)  # fmt: skip
TEXTS = ("", "a", "F32", "I64", "../../escape", "/etc/passwd", "\x00", "\ud800", "é" * 50,
         "9" * 400, "x" * 5000, "nan", "True", "null", "__metadata__", "os.system")  # fmt: skip


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """One to four cuts, repeats, overwritings or flips, anywhere."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        kind = rng.randrange(7)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            del out[at:end]
        elif kind == 2:
            out[at:at] = out[at:end]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == 4:
            out[at:end] = bytes([rng.choice((0, 255, 128, 10, 34, 46, 123))]) * (end - at)
        elif kind == 5:
            number = rng.choice(INTEGERS) % 2**64
            out[at : at + 8] = struct.pack("<Q", number)
        else:
            for i in range(at, end):
                out[i] ^= 1 << rng.randrange(8)
    return bytes(out)


def damaged_value(rng: Random, value: Any) -> Any:
    """A JSON value with one node of it replaced, renamed, removed, doubled or buried."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != key}
        kind = rng.random()
        if kind < 0.1:
            return rest
        if kind < 0.2:
            return {**rest, rng.choice(TEXTS): value[key]}
        return {**value, key: damaged_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return value + value[at:]
        return [*value[:at], damaged_value(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice((-1, 1, 4, -4, 8))
    new = (rng.choice(INTEGERS), rng.choice(TEXTS), None, True, 0.5, float("nan"), float("inf"),
           1e308, [], {}, [value], {"a": value}, [[0]] * 100)  # fmt: skip
    return rng.choice(new)


def written(rng: Random, value: Any) -> bytes:
    """The value as JSON, now and then with a doubled key, a deep nest or bytes that are no text."""
    text = json.dumps(value)
    kind = rng.random()
    if kind < 0.03:
        text = text.replace(text[1 : len(text) // 2], text[1 : len(text) // 2] * 2, 1)
    elif kind < 0.06:
        depth = rng.choice((50, 5000, 100_000))
        text = "[" * depth + text + "]" * depth
    data = text.encode("utf-8", "surrogatepass")
    return data + rng.choice((b"\xff", b"\x00", b"\xed\xa0\x80")) if kind > 0.97 else data
