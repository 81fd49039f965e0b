"""llama2.c's legacy .bin, both ways: seven int32, then float32 tensors one kind after the other.

The file pairs RoPE's dimensions as (2i, 2i + 1), this package as (i, i + h/2): the rows of q and k
are in another order, and `half_split` and `interleaved` are each other's inverse.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalabl_ref.model.config import LlamaConfig, RopeConfig
from scalabl_ref.support.errors import InputError
from scalabl_ref.support.files import atomic_write, reading
from scalabl_ref.support.tensors import PIECE, Stored, buffer

HEADER = struct.Struct("<7i")
MAGIC = b"24ka"  # of llama2.c's later formats, before the number of the version


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, (heads * h, D), from interleaved RoPE pairs (2i, 2i + 1) to (i, i + h/2)."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, h/2, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, (heads * h, D), from RoPE pairs (i, i + h/2) to interleaved (2i, 2i + 1)."""
    halves = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, h/2, D)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def read_llama2c(source: Path) -> tuple[LlamaConfig, dict[str, Stored]]:
    """The model in a file, by our tensor names. Raises InputError if it is no such file."""
    with reading(source), open(source, "rb") as file:
        size = source.stat().st_size
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise InputError(f"{source}: too short for a llama2.c header")
    if head.startswith(MAGIC):
        version = int.from_bytes(head[4:8], "little")
        raise InputError(
            f"{source}: is llama2.c's format of version {version}, and only version 0 is read: "
            "export it with --version 0"
        )
    dim, hidden, layers, heads, kv_heads, vocab, positions = HEADER.unpack(head)
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), positions) < 1 or dim % heads:
        raise InputError(f"{source}: not a llama2.c file: its header makes no sense")
    try:
        config = LlamaConfig(
            vocab_size=abs(vocab),  # negative if the head is its own
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim // heads,
            max_position_embeddings=positions,
            rms_norm_eps=1e-5,
            tie_word_embeddings=vocab > 0,
            bos_token_id=1,
            eos_token_id=2,
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    expected = HEADER.size + 4 * sum(math.prod(shape) for _, shape in _layout(config))
    if size != expected:
        raise InputError(f"{source}: has {size} bytes, and its header makes {expected}")
    tensors = {}
    for name, shape, offset in _places(config):
        if name:
            read = partial(_read, source, offset, shape, _heads(name, config))
            tensors[name] = Stored(torch.float32, shape, read)
    return config, tensors


def write_llama2c(
    target: Path,
    config: LlamaConfig,
    tensors: Mapping[str, Stored],
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write a model to a new file, as float32. Raises InputError for what the format cannot say."""
    told = LlamaConfig(
        **{name: getattr(config, name) for name in list(vars(config))[:7]},
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=1e-5,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    for name, value in vars(config).items():
        if value != getattr(told, name):
            raise InputError(
                f"a llama2.c file cannot say {name} = {_short(value)}: it has "
                f"{_short(getattr(told, name))}"
            )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise InputError("a llama2.c file has heads of hidden_size / num_attention_heads")
    c = config
    vocab = c.vocab_size if c.tie_word_embeddings else -c.vocab_size
    sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers)
    sizes += (c.num_attention_heads, c.num_key_value_heads, vocab, c.max_position_embeddings)
    with atomic_write(target) as file:
        file.write(HEADER.pack(*sizes))
        for name, shape, _ in _places(config):
            tensor = tensors[name].read() if name else _tables(config)
            heads = _heads(name, config)
            if heads:
                tensor = interleaved(tensor, heads)
            if tensor.shape != shape:
                raise InputError(f"tensor {name} has shape {tuple(tensor.shape)}, not {shape}")
            for part in tensor.flatten().split(PIECE):
                part = part.float()
                file.write(buffer(part))
                progress(part.nbytes)


def _short(value: Any) -> Any:
    return value.to_hf() or {"rope_theta": value.theta} if isinstance(value, RopeConfig) else value


def _layout(c: LlamaConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the file's order; {} is the layer, the first dimension its number."""
    L, D, F = c.num_hidden_layers, c.hidden_size, c.intermediate_size
    kv = c.num_key_value_heads * c.head_dim
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("embed_tokens.weight", (c.vocab_size, D)),
        ("layers.{}.attn_norm.weight", (L, D)),
        ("layers.{}.attn.q_proj.weight", (L, D, D)),
        ("layers.{}.attn.k_proj.weight", (L, kv, D)),
        ("layers.{}.attn.v_proj.weight", (L, kv, D)),
        ("layers.{}.attn.o_proj.weight", (L, D, D)),
        ("layers.{}.mlp_norm.weight", (L, D)),
        ("layers.{}.mlp.gate_proj.weight", (L, F, D)),
        ("layers.{}.mlp.down_proj.weight", (L, D, F)),
        ("layers.{}.mlp.up_proj.weight", (L, F, D)),
        ("norm.weight", (D,)),
        ("", (2, c.max_position_embeddings, c.head_dim // 2)),  # RoPE's tables: see _tables
    ]
    return shapes if c.tie_word_embeddings else [*shapes, ("lm_head.weight", (c.vocab_size, D))]


def _places(c: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, offset in bytes) of every tensor in the file's order, one layer at a time."""
    offset = HEADER.size
    for name, shape in _layout(c):
        layers, one = (shape[0], shape[1:]) if "{}" in name else (1, shape)
        for layer in range(layers):
            yield name.format(layer), one, offset
            offset += 4 * math.prod(one)


def _heads(name: str, c: LlamaConfig) -> int:
    """Number of heads in a tensor whose rows RoPE turns, else 0."""
    if name.endswith("q_proj.weight"):
        return c.num_attention_heads
    return c.num_key_value_heads if name.endswith("k_proj.weight") else 0


def _read(source: Path, offset: int, shape: tuple[int, ...], heads: int) -> Tensor:
    """One tensor of a file, rows in our order. Its numbers are little-endian, as this machine's."""
    data = bytearray(4 * math.prod(shape))
    with open(source, "rb") as file:
        file.seek(offset)
        if file.readinto(data) != len(data):
            raise InputError(f"{source}: became shorter while it was read")
    tensor = torch.frombuffer(data, dtype=torch.float32).view(shape)
    return half_split(tensor, heads) if heads else tensor


def _tables(c: LlamaConfig) -> Tensor:
    """cos and sin of RoPE's angles, (2, positions, h/2): what llama2.c's export stores."""
    positions = torch.arange(c.max_position_embeddings).float()
    angles = torch.outer(positions, c.rope.inverse_frequencies(c.head_dim))
    return torch.stack((angles.cos(), angles.sin()))
