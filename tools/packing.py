"""For the converters: the weights of a model's blocks as codes and scales, one at a time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import lru_cache

import scalabl_ref  # noqa: F401  before torch, whose warning about a missing NumPy it keeps away

# isort: split
import torch
from torch import Tensor

from scalabl_ref.fast.quantize import Codes, Kind, quantize
from scalabl_ref.model.config import LlamaConfig
from scalabl_ref.model.llama import Llama
from scalabl_ref.model.weights import block_linears
from scalabl_ref.support.errors import InputError
from scalabl_ref.support.tensors import FLOATS, Stored, is_finite


def packed(tensors: Mapping[str, Stored], config: LlamaConfig, kind: Kind) -> dict[str, Stored]:
    """A model's tensors, by our names, with the weights packed that `quantize_model` packs.

    A weight's codes and scale come one after the other; read so, they are of one computation.
    Raises InputError for another kind, and for a weight of another shape (codes no longer tell how
    wide it was), not of floats or, when it is read, not finite.
    """

    @lru_cache(maxsize=1)
    def pack(name: str) -> Codes:
        weight = tensors[name].read()
        if not is_finite(weight):
            raise InputError(f"tensor {name} has NaN or infinite values")
        return quantize(weight, kind)

    def stored(name: str, part: str, like: Tensor) -> Stored:
        return Stored(like.dtype, tuple(like.shape), lambda: getattr(pack(name), part), packed=True)

    one = Llama(dataclasses.replace(config, num_hidden_layers=1), device="meta")
    shapes = {name.removeprefix("0."): linear.weight.shape for name, linear in block_linears(one)}
    out: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        layer = re.sub(r"^layers\.\d+\.(.+)\.weight$", r"\1", name)
        if layer not in shapes:
            out[name] = tensor
            continue
        scale = name.removesuffix("weight") + "scale"
        if scale in tensors:
            raise InputError(f"tensor {scale} is not part of this model")
        if tensor.dtype not in FLOATS:
            raise InputError(f"tensor {name} is {tensor.dtype}, expected floats of 16 bits or more")
        if tensor.shape != shapes[layer]:
            expected = tuple(shapes[layer])
            raise InputError(f"tensor {name} has shape {tensor.shape}, expected {expected}")
        empty = quantize(torch.empty(tensor.shape, device="meta"), kind)
        out[name] = stored(name, "codes", empty.codes)
        out[scale] = stored(name, "scale", empty.scale)
    return out
