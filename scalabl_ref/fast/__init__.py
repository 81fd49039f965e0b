"""Faster bodies of functions in core/ and model/, each held equal to its plain twin by tests.

`install` puts them in place when the package is imported. The environment variable SCALABL_PLAIN=1
leaves the plain ones there: the package then runs on core/ and model/ alone, to the same results
but for rounding, and slower.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core.adapter import SubspaceAdapter
from ..core.noise import Noise
from ..model import weights
from ..model.llama import MLP, Llama
from . import native, normals, ops, quantize, rows

# The hook, and the fast body that goes there.
HOOKS: tuple[tuple[type, str, Any], ...] = (
    (Noise, "normals", staticmethod(normals.normals)),
    (Noise, "words", staticmethod(normals.words)),
    (SubspaceAdapter, "op", staticmethod(ops.subspace_lora_linear)),
    (Llama, "run", rows.run),
    (Llama, "block", rows.PackedBlock),
    (MLP, "activation", staticmethod(rows.swiglu)),
)
PLAIN = tuple(vars(owner)[name] for owner, name, _ in HOOKS)


def install() -> None:
    """Put the fast bodies in place, unless SCALABL_PLAIN=1."""
    native.core()  # settled before anything is compiled
    weights.quantizer = quantize.Quantizer()  # a format of weights, not a body: in either case
    if os.environ.get("SCALABL_PLAIN") != "1":
        for owner, name, body in HOOKS:
            setattr(owner, name, body)


@contextmanager
def plain() -> Iterator[None]:
    """Within the block the plain bodies are in place. A model keeps the blocks it was made with."""
    before = [vars(owner)[name] for owner, name, _ in HOOKS]
    try:
        for (owner, name, _), body in zip(HOOKS, PLAIN, strict=True):
            setattr(owner, name, body)
        yield
    finally:
        for (owner, name, _), body in zip(HOOKS, before, strict=True):
            setattr(owner, name, body)
