"""Faster versions of functions in core/ and model/; tests compare each with its plain twin.

`install` puts them in place when the package is imported. The environment variable SCALABL_PLAIN=1
keeps the plain ones: the package then runs on core/ and model/ alone, more slowly, and gives the
same results to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..core.adapter import Adapter
from ..core.noise import Noise
from ..model import weights
from ..model.attach import Linear
from ..model.llama import MLP, Llama, RMSNorm
from . import blocks, native, normals, ops, quantize, rows

# Each hook, and its fast version.
HOOKS: tuple[tuple[type, str, Any], ...] = (
    (Noise, "normals", staticmethod(normals.normals)),
    (Noise, "words", staticmethod(normals.words)),
    (Adapter, "op", staticmethod(ops.subspace_lora_linear)),
    (Llama, "run", rows.run),
    (Llama, "block", rows.PackedBlock),
    (MLP, "activation", staticmethod(blocks.swiglu)),
    (RMSNorm, "forward", blocks.rms_norm),
    (Linear, "product", staticmethod(ops.linear)),
)
FAST = tuple(body for *_, body in HOOKS)
PLAIN = tuple(vars(owner)[name] for owner, name, _ in HOOKS)


def install() -> None:
    """Put the fast versions in place, unless SCALABL_PLAIN=1."""
    native.core()  # decided before anything is compiled
    weights.quantizer = quantize  # a weight format: needed in both cases
    if os.environ.get("SCALABL_PLAIN") != "1":
        put(FAST)


def put(bodies: Sequence[Any]) -> None:
    """Put these versions in place, one for each hook."""
    for (owner, name, _), body in zip(HOOKS, bodies, strict=True):
        setattr(owner, name, body)


@contextmanager
def in_place(bodies: Sequence[Any]) -> Iterator[None]:
    """Use these versions within the block: FAST or PLAIN.

    A model keeps the kind of blocks that it was made with.
    """
    before = [vars(owner)[name] for owner, name, _ in HOOKS]
    try:
        put(bodies)
        yield
    finally:
        put(before)


def plain() -> AbstractContextManager[None]:
    """Use the plain versions within the block, see `in_place`."""
    return in_place(PLAIN)
