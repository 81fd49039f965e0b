"""Models from Hugging Face's layout, or from llama2.c's .bin, into this package's, and back.

    python tools/convert_hf.py SRC DST                 SRC a Hugging Face folder or a llama2.c file
    python tools/convert_hf.py SRC DST --to-hf         SRC a converted folder

Both ways every tensor keeps its bytes; the original config.json travels along. DST must not exist:
it appears whole, or not at all. `Llama.from_pretrained` reads either layout.
"""

from __future__ import annotations

import argparse
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scalabl_ref  # noqa: F401  before torch, whose warning about a missing NumPy it keeps away

# isort: split
import torch
from torch import Tensor

from scalabl_ref.checkpoint import (
    FORMAT,
    Weights,
    hf_to_ours,
    new_folder,
    ours_to_hf,
    write_model,
)
from scalabl_ref.errors import InputError
from scalabl_ref.llama import Llama, LlamaConfig, read_config
from scalabl_ref.tokenizer import tokenizer_files

HEADER = struct.Struct("<7i")  # llama2.c's legacy header


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="model folder or .bin file")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--to-hf", action="store_true", help="back to Hugging Face's layout")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer file to add")
    args = parser.parse_args(arguments)
    try:
        convert(args.source, args.target, args.to_hf, args.tokenizer)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.target}")
    return 0


def convert(source: Path, target: Path, to_hf: bool = False, tokenizer: Path | None = None) -> None:
    """Write the model at `source` to the new folder `target`, in the other layout.

    Raises InputError for anything that `Llama.from_pretrained` would refuse in the result.
    """
    files: dict[str, Path] = {}
    if source.is_file():
        if to_hf:
            raise InputError(f"{source}: --to-hf converts a folder")
        config, tensors = _llama2c(source)
    else:
        config, tensors = _from_ours(source) if to_hf else _from_hf(source)
        files = tokenizer_files(source)
    if tokenizer is not None:
        if not tokenizer.is_file():
            raise InputError(f"{tokenizer}: no such file")
        name = "tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"
        files[name] = tokenizer
    with new_folder(target) as folder:
        write_model(folder, config, tensors, files)
        Llama.from_pretrained(folder)  # everything there, in shape, and finite


def _from_hf(source: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    path = source / "config.json"
    config, values = read_config(path)
    if values.get("format") == FORMAT:
        raise InputError(f"{path}: is converted already; --to-hf goes back")
    weights = Weights(source)
    tensors = ((hf_to_ours(name), weights[name]) for name in weights)
    return {**config.to_dict(), "hf_config": values}, tensors


def _from_ours(source: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    path = source / "config.json"
    config, values = read_config(path)
    if values.get("format") != FORMAT:
        raise InputError(f"{path}: is not of the converted layout")
    try:
        made = config.to_hf()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    weights = Weights(source)
    return values.get("hf_config") or made, ((ours_to_hf(name), weights[name]) for name in weights)


# --- llama2.c ----------------------------------------------------------------------------------


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, (heads * h, D), from interleaved RoPE pairs (2i, 2i + 1) to (i, i + h/2)."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, h/2, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _llama2c(source: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """The legacy format: seven int32 (vocab negative if the head is its own), then float32."""
    data = source.read_bytes()
    if len(data) < HEADER.size:
        raise InputError(f"{source}: too short for a llama2.c header")
    dim, hidden, layers, heads, kv_heads, vocab, positions = HEADER.unpack_from(data)
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), positions) < 1 or dim % heads:
        raise InputError(f"{source}: not a llama2.c file: its header makes no sense")
    try:
        config = LlamaConfig(
            vocab_size=abs(vocab),
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
    shapes = _llama2c_shapes(config)
    expected = HEADER.size + 4 * sum(math.prod(shape) for _, shape in shapes)
    if len(data) != expected:
        raise InputError(f"{source}: has {len(data)} bytes, and its header makes {expected}")
    return config.to_dict(), _llama2c_tensors(data, config, shapes)


def _llama2c_shapes(c: LlamaConfig) -> list[tuple[str, tuple[int, ...]]]:
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
        ("", (2, c.max_position_embeddings, c.head_dim // 2)),  # cos and sin, which we compute
    ]
    return shapes if c.tie_word_embeddings else [*shapes, ("lm_head.weight", (c.vocab_size, D))]


def _llama2c_tensors(
    data: bytes, c: LlamaConfig, shapes: list[tuple[str, tuple[int, ...]]]
) -> Iterator[tuple[str, Tensor]]:
    numbers = torch.frombuffer(bytearray(data), dtype=torch.float32, offset=HEADER.size)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, shape in shapes:
        count = math.prod(shape)
        block, numbers = numbers[:count].view(shape), numbers[count:]
        if "{}" not in name:
            if name:
                yield name, block
            continue
        rotated = heads.get(name.split(".")[-2])
        for layer, tensor in enumerate(block):
            yield name.format(layer), half_split(tensor, rotated) if rotated else tensor


if __name__ == "__main__":
    sys.exit(main())
