"""Shapes of public models by name, from their own config.json, and what adapters add to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.adapter import adapters
from ..core.config import AdapterConfig
from ..model.attach import add_adapters
from ..model.config import LlamaConfig, RopeConfig
from ..model.llama import Llama
from ..model.weights import read_config
from ..support.errors import InputError, expected

_LLAMA3_ROPE = RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192)


def _llama(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> LlamaConfig:
    return LlamaConfig(vocab, hidden, inner, layers, heads, kv_heads, hidden // heads, **more)


def _llama2(*sizes: int) -> LlamaConfig:
    return _llama(32000, *sizes, max_position_embeddings=4096, rms_norm_eps=1e-5)


def _llama31(*sizes: int) -> LlamaConfig:
    return _llama(
        128256, *sizes, max_position_embeddings=131072, rms_norm_eps=1e-5, rope=_LLAMA3_ROPE
    )


def _qwen25(vocab: int, *sizes: int, tied: bool = False) -> LlamaConfig:
    return _llama(
        vocab,
        *sizes,
        max_position_embeddings=32768 if tied else 131072,
        rope=RopeConfig(theta=1000000.0),
        qkv_bias=True,
        tie_word_embeddings=tied,
    )


# Sizes: hidden, intermediate, layers, heads, key-value heads.
CONFIGS: dict[str, LlamaConfig] = {
    "llama-2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _llama31(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _llama31(8192, 28672, 80, 64, 8),
    "qwen2.5-0.5b": _qwen25(151936, 896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen25(151936, 1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _qwen25(151936, 2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7b": _qwen25(152064, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen25(152064, 5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _qwen25(152064, 5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen25(152064, 8192, 29568, 80, 64, 8),
    "smollm2-135m": _llama(
        49152, 576, 1536, 30, 9, 3, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope=RopeConfig(theta=100000.0), tie_word_embeddings=True,
    ),
}  # fmt: skip


def find_config(name: str) -> LlamaConfig:
    """A model's shape, by its name above, or from a config.json or the folder that has one.

    Raises InputError for any other name.
    """
    if name.lower() in CONFIGS:
        return CONFIGS[name.lower()]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise InputError(f"{name!r} is neither a file nor a known model{expected(name, CONFIGS)}")
    return read_config(path)[0]


def count_parameters(config: LlamaConfig, rank: int, targets: tuple[str, ...]) -> dict[str, int]:
    """Parameters of the base and of the adapters, counted on modules built without memory.

    Keys: base_parameters, adapted_layers, and the trained parameters of lora (A and B), scalabl
    (A, B, log s, log sigma) and blob (A's mean and standard deviation, and B).
    """
    model = Llama(config, device="meta")
    base = sum(parameter.numel() for parameter in model.parameters())
    add_adapters(model, AdapterConfig(rank=rank, targets=targets))
    own = adapters(model).values()
    A, B = sum(a.A.numel() for a in own), sum(a.B.numel() for a in own)
    trained = sum(p.numel() for a in own for p in a.parameters())
    return {
        "base_parameters": base,
        "adapted_layers": len(own),
        "lora": A + B,
        "scalabl": trained,
        "blob": 2 * A + B,
    }
