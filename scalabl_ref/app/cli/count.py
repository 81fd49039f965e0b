"""Count a model's parameters and those of its adapters, from the model's shape alone: no weights
are read."""

from __future__ import annotations

import argparse

from ...core.config import AdapterConfig
from ..configs import count_parameters, find_config
from . import options
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="MODEL",
        help="a name such as qwen2.5-7b, or a model's folder or config.json")  # fmt: skip
    options.add_targets(parser)


def run(args: argparse.Namespace) -> Result:
    adapter = AdapterConfig(**options.given(AdapterConfig, args))
    result = count_parameters(find_config(args.config), adapter.rank, adapter.targets)
    say(args, f"{args.config}, rank {adapter.rank}, {' '.join(adapter.targets)}")
    base, layers = result["base_parameters"], result["adapted_layers"]
    say(args, f"base       {base:>16,}  ({base * 2 / 2**30:.2f} GiB in bfloat16)")
    say(args, f"adapted layers {layers:>12,}")
    for method in ("lora", "scalabl", "blob"):
        count = result[method]
        more = f"  (+{count - result['lora']:,})" if method != "lora" else ""
        say(args, f"{method:10} {count:>16,}  ({count * 4 / 2**20:.2f} MiB in float32){more}")
    return result
