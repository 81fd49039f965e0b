"""Estimate memory and time of a training step, from the model's shape alone, for each dtype or
quantisation of the base model: whole on each GPU, split over the GPUs, or kept in CPU memory. An
arrow marks the best plan that fits. The last lines are for `posterior subspace`."""

from __future__ import annotations

import argparse
import math

from ...core.config import AdapterConfig
from ...support.errors import InputError
from ..configs import find_config
from ..plan import BASES, Plan, Rates, Workload, best, measured_rates, plans, subspace
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="MODEL",
        help="a name such as qwen2.5-7b, or a model's folder or config.json")  # fmt: skip
    add("--gpus", type=int, default=1, metavar="N", help="number of GPUs; 0 plans for a CPU")
    add("--memory", type=float, required=True, metavar="GB",
        help="memory of each GPU, or of the CPU, in 1e9 bytes")  # fmt: skip
    helps = {"rows": "questions per forward pass on each device", "tokens": "tokens per question",
             "classes": "possible answers of a question"}  # fmt: skip
    options.add_fields(parser, Workload, helps)
    options.add_targets(parser)
    add("--rate", type=float, metavar="TFLOPS",
        help="TFLOP/s of matrix products (default: measured on --device)")  # fmt: skip
    add("--bandwidth", type=float, metavar="GB/s",
        help="memory bandwidth in GB/s (needed with --rate)")  # fmt: skip
    add("--link", type=float, metavar="GB/s",
        help="rate at which a GPU receives data from other GPUs or from CPU memory, in GB/s; "
        "adds the time of transfers, and plans that keep the base in CPU memory")  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    _check(args)
    adapter = AdapterConfig(**options.given(AdapterConfig, args))
    known = {"config": find_config(args.config), "adapter": adapter}
    work = Workload(**options.given(Workload, args) | known)
    rates, device = _rates(args, work), "cuda" if args.gpus else "cpu"
    ways = plans(work, rates, args.gpus, device)
    room = args.memory * 1e9
    chosen = best(ways, room)
    devices = args.gpus or 1
    say(args, f"{args.config}: {work.rows} rows of {work.tokens} tokens per step and device\n"
        f"rank {adapter.rank}, {' '.join(adapter.targets)}; GB on each of {devices},\n"
        f"of which adapters with AdamW's moments have {ways[0].adapters / 1e9:.2f}\n")  # fmt: skip
    columns = ("base", "kept", "working", "peak", "s/step")
    say(args, f"{'':9}{'blocks':10}{'':11}" + "".join(f"{column:>8}" for column in columns))
    for plan in ways:
        fits = "fits" if plan.peak <= room else ""
        say(args, f"{_row(plan)} {fits}{' <-' * (plan is chosen)}".rstrip())
    if chosen is None:
        say(args, f"\nnothing fits into {args.memory:g} GB: try fewer --rows or --tokens, or more "
            "--gpus")  # fmt: skip
    posteriors = [subspace(work, base, known, device) for base, known in rates.items()]
    say(args, f"\nposterior subspace: {posteriors[0].scales:,} scales, a matrix of "
        f"{posteriors[0].matrix / 1e6:,.1f} MB;\nto fit and to predict, on one device")  # fmt: skip
    for made in posteriors:
        say(args, f"{made.kind:12} {made.peak / 1e9:8.2f} GB, {made.seconds / work.rows:.3g} s for "
            "each question")  # fmt: skip
    return {
        "subspace": [made._asdict() for made in posteriors],
        "plans": [{**plan._asdict(), "fits": plan.peak <= room} for plan in ways],
        "best": chosen and chosen._asdict(),
    }


def _check(args: argparse.Namespace) -> None:
    if (args.rate is None) != (args.bandwidth is None):
        raise InputError("give both --rate and --bandwidth, or neither")
    numbers = [args.memory, args.rate, args.bandwidth, args.link]
    if args.gpus < 0 or not all(0 < n < math.inf for n in numbers if n is not None):
        raise InputError("--gpus must not be negative, and other numbers must be above 0")
    if args.gpus and args.rate is None and args.device == "cpu":
        raise InputError(
            "the rates of a GPU cannot be measured on a CPU: give --rate and --bandwidth, --device "
            "cuda, or --gpus 0"
        )
    if args.link is not None and not args.gpus:
        raise InputError("--link is for GPUs, and --gpus 0 plans for a CPU")


def _rates(args: argparse.Namespace, work: Workload) -> dict[str, Rates]:
    """The device's rates for each base, as given or as measured."""
    if args.rate is None:
        runs.device_of(args)
        rates = {base: measured_rates(work, base, args.device) for base in BASES}
    else:
        flop, moved = args.rate * 1e12, args.bandwidth * 1e9
        # A quantised value: one byte read at most, and two written, then read again.
        rates = dict.fromkeys(BASES, Rates(flop, flop, moved, 5 / moved))
    if args.link is None:
        return rates
    return {base: known._replace(link=args.link * 1e9) for base, known in rates.items()}


def _row(plan: Plan) -> str:
    blocks = "offloaded" if plan.offloaded else "spread" if plan.shards > 1 else "whole"
    again = "recomputed" if plan.checkpointing else ""
    sizes = (plan.base, plan.activations, plan.workspace, plan.peak)
    cells = "".join(f"{size / 1e9:8.2f}" for size in sizes)
    return f"{plan.kind:9}{blocks:10}{again:11}{cells}{plan.seconds:8.3g}"
