"""Tiny models and data that several test files share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from scalabl_ref import AdapterConfig, Llama, LlamaConfig, adapters, add_adapters
from scalabl_ref.core.objective import Batch
from scalabl_ref.data import Encoded
from scalabl_ref.model.attach import Linear
from scalabl_ref.support.tensors import save_tensors
from scalabl_ref.training.trainer import TrainConfig, Trainer
from scalabl_ref.verify.file_checks import write_byte_tokenizer

from .tolerances import curve_bound

TINY = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
)
CLASSES = (5, 7, 11)
DEVICE = "cpu"  # where tests that can use a device put their tensors: --device


def tiny_model(
    seed: int = 0,
    trim: bool = True,
    std: float = 0.3,
    wake: bool = True,
    layers: int = TINY.num_hidden_layers,
    **config,
) -> Llama:
    """A random tiny Llama with adapters; `wake` fills B, so that the adapters do something."""
    shape = dataclasses.replace(TINY, num_hidden_layers=layers)
    model = Llama(shape).init_random_(seed, std=std)
    if trim:
        model.trim_head(CLASSES)
    add_adapters(model, AdapterConfig(**{"rank": 3, **config}), seed)
    if wake:
        fill(model, seed, std)
    return model


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Give every B random entries, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model).values():
        adapter.B.copy_(torch.randn(adapter.B.shape, generator=generator) * std)


def linear_layer(seed: int = 0, **config):
    """A linear layer 6 -> 5 with an adapter of rank 3 whose B is awake, in float64."""
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.ModuleDict({"q_proj": Linear(6, 5)})
    model["q_proj"].weight.data = torch.randn(5, 6, generator=g)
    add_adapters(model, AdapterConfig(rank=3, targets=("q_proj",), **config), seed)
    adapter = model["q_proj"].adapter
    adapter.B.data = torch.randn(5, 3, generator=g)
    if hasattr(adapter, "lower"):
        adapter.lower.data = torch.randn(3, generator=g) / 4
    return model.double()["q_proj"], model


def tiny_batch(rows: int = 4, seed: int = 0, longest: int = 9) -> Batch:
    """Random right-padded rows with labels out of CLASSES."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (rows,), generator=generator)
    tokens = torch.randint(1, TINY.vocab_size, (rows, int(lengths.max())), generator=generator)
    tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    labels = torch.randint(0, len(CLASSES), (rows,), generator=generator)
    return Batch(tokens, lengths, labels, torch.arange(rows), torch.tensor(CLASSES))


def tiny_data(rows: int = 10, seed: int = 0) -> Encoded:
    """Random prompts with labels out of CLASSES."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (rows,), generator=generator).tolist()
    tokens = [torch.randint(1, 40, (n,), generator=generator).tolist() for n in lengths]
    labels = torch.randint(0, len(CLASSES), (rows,), generator=generator).tolist()
    return Encoded(tokens, labels, list(CLASSES))


def trainer(
    data: Encoded | None = None,
    model: dict | None = None,
    collector=None,
    **config,
) -> Trainer:
    """Of a tiny model with B = 0, on ten rows, for 12 steps."""
    settings = {"steps": 12, "batch": 4, "lr": 1e-2, "checkpoint_every": 5, **config}
    return Trainer(
        tiny_model(wake=False, **(model or {})),
        data or tiny_data(),
        TrainConfig(**settings),
        collector=collector,
    )


def tiny_folder(folder: Path, **config) -> Path:
    """A model folder in the converted layout: one id a byte, ids 0 .. 255, and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = dataclasses.replace(TINY, vocab_size=256, max_position_embeddings=128, **config)
    model = Llama(shape).init_random_(0, std=0.3)
    save_tensors(folder / "model.safetensors", model.state_dict().items())
    (folder / "config.json").write_text(json.dumps(shape.to_dict()))
    write_byte_tokenizer(folder)
    return folder


def questions_file(path: Path, rows: int = 24, choices: int = 3) -> Path:
    """A JSONL file of questions whose answer can be read off their text."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for i in range(rows):
        label = i * 5 % choices
        names = [f"no {c}" for c in range(choices)]
        lines.append(
            json.dumps({"prompt": f"{i} {'xyz'[label]}", "choices": names, "label": label})
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def steps_and_bound(made: Trainer, steps: int, rate: float) -> tuple[list[dict], float]:
    """The records of so many steps, and how far those of another order of sums may be off.

    rate: the learning rate of A and B; the bound is for variational rates up to 4 times as large.
    """
    records, largest = [], 0.0
    parameters = [p for adapter in made.adapters for p in adapter.parameters()]
    for _ in range(steps):
        records.append(made.step())
        largest = max(largest, *(float(p.grad.abs().max()) for p in parameters))
    count, loss = sum(p.numel() for p in parameters), max(r["loss"] for r in records)
    return records, curve_bound(steps, 4 * rate, count, largest, loss, terms=512)
