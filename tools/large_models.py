"""Large models on a small machine: random weights of a public shape, one training step, one answer.

    python tools/large_models.py write llama-2-7b FOLDER
    python tools/large_models.py write qwen2.5-32b FOLDER --quantize nf4 [--alike]
    python tools/large_models.py run FOLDER [--batch 1] [--tokens 32] [--samples 4]
    python tools/large_models.py write llama-2-7b FOLDER --layers 2      # a part, to try it

`write` makes a shard for each block, one in memory at a time, in the converted layout; `run` maps
them, does a ScalaBL step (rank 8, targets q_proj, v_proj and lm_head, two answers) and a
prediction, and prints after each phase the seconds and the memory in GiB: its peak (VmHWM), and
what of it is the process's own (anon) and what is mapped from the shards (file) at the end of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import scalabl_ref

# isort: split
import torch
from bench_worker import memory
from torch import Tensor, nn

from scalabl_ref import AdapterConfig, Llama, add_adapters, predict
from scalabl_ref.app.configs import find_config
from scalabl_ref.data import Encoded, collate
from scalabl_ref.fast.quantize import KINDS, quantize_model
from scalabl_ref.support.tensors import save_tensors
from scalabl_ref.training.trainer import TrainConfig, Trainer


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Print what the block took."""
    started = time.perf_counter()
    yield
    took = time.perf_counter() - started
    peak, anon, file = (memory(key) / 2**30 for key in ("VmHWM", "RssAnon", "RssFile"))
    print(f"{name:12}{took:9.1f} s   peak {peak:6.2f}   anon {anon:6.2f}   file {file:6.2f}",
          flush=True)  # fmt: skip


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Uniform with the standard deviation 0.02; norms 1, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(float(name.endswith("norm.weight")))
        else:
            parameter.uniform_(-0.02 * 3**0.5, 0.02 * 3**0.5, generator=generator)


def write(args: argparse.Namespace) -> None:
    """The folder, shard by shard; config.json, which makes it a model, comes last."""
    config = find_config(args.config)
    if args.layers:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    args.folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}

    def save(shard: str, tensors: dict[str, Tensor]) -> None:
        save_tensors(args.folder / shard, tensors.items())
        where.update(dict.fromkeys(tensors, shard))

    ends = dataclasses.replace(config, num_hidden_layers=1)
    with phase("write"):
        for i in range(config.num_hidden_layers):
            if i == 0 or not args.alike:
                one = Llama(dataclasses.replace(ends, vocab_size=1), dtype=torch.bfloat16)
                fill(one.layers, generator)
                if args.quantize:
                    quantize_model(one, args.quantize)
            block = one.layers[0].state_dict()
            save(f"block-{i:03}.safetensors", {f"layers.{i}.{k}": v for k, v in block.items()})
        with torch.device("meta"):
            rest = Llama(ends, dtype=torch.bfloat16)
        del rest.layers
        for name, module in list(rest.named_children()):
            part = module.to_empty(device="cpu")
            nn.init.ones_(part.weight) if name == "norm" else fill(part, generator)
            if name != "lm_head" or not rest.tied:
                save(f"{name}.safetensors", {f"{name}.weight": part.weight})
            delattr(rest, name)
            del part, module
    index = {"weight_map": where}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = {**config.to_dict(), "quantize": args.quantize}
    (args.folder / "config.json").write_text(json.dumps(values))
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    print(f"{args.folder}: {size / 2**30:.2f} GiB")


def run(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.batch} rows of "
          f"{args.tokens} tokens; rank 8; {args.samples} samples")  # fmt: skip
    with phase("load"):
        model = Llama.from_pretrained(args.folder).trim_head([5, 7])
        add_adapters(model, AdapterConfig(rank=8))
    generator = torch.Generator().manual_seed(0)
    size = (args.batch, args.tokens)
    tokens = torch.randint(model.config.vocab_size, size, generator=generator).tolist()
    data = Encoded(tokens, [i % 2 for i in range(args.batch)], [5, 7])
    trainer = Trainer(model, data, TrainConfig(steps=2, batch=args.batch, warmup=0.0))
    for i in range(args.steps):
        with phase(f"step {i}"):
            record = trainer.step()
        print({key: round(value, 4) for key, value in record.items()}, flush=True)
    with phase("predict"):
        answer = predict(model, collate(data, range(args.batch)), samples=args.samples)
    print(answer.probs.tolist(), answer.mutual_information.tolist())
    if not answer.probs.isfinite().all():
        raise SystemExit("the prediction is not finite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("write")
    sub.add_argument("config", help="a name of `scalabl count`, or a config.json")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--layers", type=int, help="only so many")
    sub.add_argument("--quantize", choices=KINDS, help="write codes, not bfloat16")
    sub.add_argument("--alike", action="store_true", help="the same numbers in every block")
    sub.set_defaults(command=write)
    sub = commands.add_parser("run")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--batch", type=int, default=1)
    sub.add_argument("--tokens", type=int, default=32)
    sub.add_argument("--samples", type=int, default=4)
    sub.add_argument("--steps", type=int, default=1)
    sub.set_defaults(command=run)
    args = parser.parse_args()
    print(f"scalabl_ref {scalabl_ref.__version__}")
    args.command(args)


if __name__ == "__main__":
    main()
