"""Meta's own folders: params.json and consolidated.NN.pth, a file for each model-parallel rank.

Every rank holds a slice of each matrix, along its rows or its columns, and all of each norm. RoPE's
pairs are interleaved as in llama2.c. What params.json leaves unsaid, the model's family says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llama2c import half_split
from torch import Tensor

from scalabl_ref.model.config import LlamaConfig, RopeConfig
from scalabl_ref.support.errors import InputError
from scalabl_ref.support.files import read_json
from scalabl_ref.support.tensors import Stored, open_tensors


class Family(NamedTuple):
    """positions: of the published models. factor: of Llama 3.1's RoPE scaling, 0 if there is none.
    bos, eos: token ids.
    """

    positions: int
    factor: float = 0.0
    bos: int = 1
    eos: int = 2


FAMILIES = {
    "llama-1": Family(2048),
    "llama-2": Family(4096),
    "code-llama": Family(16384),
    "llama-3": Family(8192, 0.0, 128000, 128001),
    "llama-3.1": Family(131072, 8.0, 128000, 128001),
    "llama-3.2": Family(131072, 32.0, 128000, 128001),
    "llama-3.3": Family(131072, 8.0, 128000, 128001),
}

# Parts of a tensor's name here and in ours, and the dimension that the ranks divide: None for what
# each holds whole, -1 for the embedding, whose columns Llama 1 and 2 divide and Llama 3 its rows.
NAMES: dict[str, tuple[str, int | None]] = {
    "tok_embeddings": ("embed_tokens", -1),
    "output": ("lm_head", 0),
    "norm": ("norm", None),
    "attention_norm": ("attn_norm", None),
    "ffn_norm": ("mlp_norm", None),
    "attention.wq": ("attn.q_proj", 0),
    "attention.wk": ("attn.k_proj", 0),
    "attention.wv": ("attn.v_proj", 0),
    "attention.wo": ("attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}


def is_meta(folder: Path) -> bool:
    return (folder / "params.json").exists() and not (folder / "config.json").exists()


def read_meta(
    folder: Path, family: str | None
) -> tuple[LlamaConfig, dict[str, Stored], list[Path]]:
    """(configuration, tensors by our names, files read) of the model in a folder.

    family: one of FAMILIES. Raises InputError naming the file, the key or the tensor for anything
    missing or contradictory.
    """
    path = folder / "params.json"
    params = read_json(path)
    files = sorted(folder.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02}.pth" for i in range(max(1, len(files)))]
    absent = sorted(set(expected) - {file.name for file in files})
    if absent:
        raise InputError(f"{folder / absent[0]}: shard is missing")
    if family not in FAMILIES:
        raise InputError(
            f"{path}: does not say how many positions the model has: give --family, one of "
            f"{', '.join(FAMILIES)}"
        )
    ranks = [open_tensors(file, once=True) for file in files]
    for file, rank in zip(files, ranks, strict=True):
        other = sorted(rank.keys() ^ ranks[0].keys())
        if other:
            raise InputError(f"{file}: tensor {other[0]} is in some of the shards and not in all")
    try:
        config = _config(params, FAMILIES[family], ranks)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    tensors = {}
    for name in ranks[0]:
        if name != "rope.freqs":  # which we compute
            ours, axis = _our_name(folder, name)
            tensors[ours] = _merged(folder, name, axis, [rank[name] for rank in ranks], config)
    return config, tensors, [path, *files]


def _config(
    params: dict[str, Any], family: Family, ranks: list[dict[str, Callable[[], Tensor]]]
) -> LlamaConfig:
    for key in ("dim", "n_layers", "n_heads"):
        if not isinstance(params.get(key), int) or params[key] < 1:
            raise InputError(f"key {key!r} must be a positive whole number")
    if bool(params.get("use_scaled_rope", False)) != (family.factor > 0):
        raise InputError(
            f"use_scaled_rope is not as in the family, whose factor is {family.factor}"
        )
    theta = params.get("rope_theta", 10000.0)
    scaled = RopeConfig("llama3", theta, family.factor or 1.0, 1.0, 4.0, 8192)
    heads = params["n_heads"]
    gate = _shape(ranks, "layers.0.feed_forward.w1.weight")
    embedding = _shape(ranks, "tok_embeddings.weight")
    whole_rows = embedding[1] == params["dim"]
    return LlamaConfig(
        vocab_size=embedding[0] * (len(ranks) if whole_rows else 1),
        hidden_size=params["dim"],
        intermediate_size=gate[0] * len(ranks),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        head_dim=params["dim"] // heads,
        max_position_embeddings=family.positions,
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope=scaled if family.factor else RopeConfig(theta=theta),
        tie_word_embeddings="output.weight" not in ranks[0],
        bos_token_id=family.bos,
        eos_token_id=family.eos,
    )


def _shape(ranks: list[dict[str, Callable[[], Tensor]]], name: str) -> tuple[int, int]:
    if name not in ranks[0]:
        raise InputError(f"tensor {name} is missing beside it")
    rows, columns = ranks[0][name]().shape
    return rows, columns


def _our_name(folder: Path, name: str) -> tuple[str, int | None]:
    """Our name of a tensor, and the dimension that the ranks divide."""
    prefix, part = "", name.removesuffix(".weight")
    if part.startswith("layers."):
        _, layer, part = part.split(".", 2)
        prefix = f"layers.{layer}."
    if part not in NAMES or not name.endswith(".weight"):
        raise InputError(f"{folder}: tensor {name} is not part of a llama")
    ours, axis = NAMES[part]
    return f"{prefix}{ours}.weight", axis


def _merged(
    folder: Path, name: str, axis: int | None, parts: list[Callable[[], Tensor]], c: LlamaConfig
) -> Stored:
    first = Stored.of(parts[0])
    shape = list(first.shape)
    if axis == -1:
        axis = 0 if shape[1] == c.hidden_size else 1
    if axis is not None:
        shape[axis] *= len(parts)
    heads = {"wq": c.num_attention_heads, "wk": c.num_key_value_heads}.get(name.split(".")[-2], 0)
    if heads and shape[0] % (2 * heads):
        raise InputError(f"{folder}: tensor {name} has {shape[0]} rows for {heads} heads")
    read = partial(_merge, f"{folder}: tensor {name}", axis, parts, tuple(shape), heads)
    return Stored(first.dtype, tuple(shape), read)


def _merge(
    what: str,
    axis: int | None,
    parts: list[Callable[[], Tensor]],
    shape: tuple[int, ...],
    heads: int,
) -> Tensor:
    """The slices of all ranks as one tensor; beside it, one slice at a time is in memory."""
    merged = parts[0]()
    if axis is None:
        if not all(torch.equal(part(), merged) for part in parts[1:]):
            raise InputError(f"{what} is not the same in all shards")
    elif len(parts) > 1:
        size, expected, dtype = merged.shape[axis], merged.shape, merged.dtype
        merged = torch.empty(shape, dtype=dtype)
        for i, read in enumerate(parts):
            part = read()
            if part.shape != expected or part.dtype != dtype:
                raise InputError(f"{what} is of another shape or dtype in shard {i}")
            merged.narrow(axis, i * size, size).copy_(part)
    return half_split(merged, heads) if heads else merged
