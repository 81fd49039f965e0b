"""tools/convert_gguf.py, the order of q's and k's rows: in the suite that needs no gguf package."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import convert_gguf
from llama2c import interleaved


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_rows_of_q_and_k_by_their_own_numbers_of_heads(architecture, monkeypatch):
    """6 heads of q, 2 of k and v. llama's and mistral's files have neighbouring pairs of rows."""
    heads = {"attn_q": 6, "attn_k": 2, "attn_v": 2}
    right = {f"blk.0.{part}.weight": torch.randn(8 * n, 5) for part, n in heads.items()}
    stored = {}
    for name, weight in right.items():
        turned = architecture in ("llama", "mistral") and "attn_v" not in name
        data = interleaved(weight, heads[name.split(".")[2]]) if turned else weight
        stored[name] = SimpleNamespace(name=name, shape=data.shape[::-1], data=data)
    monkeypatch.setattr(convert_gguf, "_expanded", lambda tensor, rows=None: tensor.data[:rows])
    monkeypatch.setattr(convert_gguf, "_get", lambda fields, key, *_: fields[key])
    sizes = {f"{architecture}.attention.head_count": 6,
             f"{architecture}.attention.head_count_kv": 2}  # fmt: skip
    read = dict(convert_gguf._weights(stored, architecture, sizes, torch.float32))
    for name, weight in right.items():
        part = convert_gguf.NAMES[name.split(".")[2]]
        found = read[f"layers.0.{part}.weight"]
        assert found.shape == weight.shape and torch.equal(found.read(), weight), name
