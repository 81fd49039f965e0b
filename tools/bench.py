"""Measurements: ours beside what people would use instead, interleaved, in one run.

    python tools/bench.py op [--threads N] [--rounds N] [--json]

Ratios are of medians over rounds in which every candidate runs once, in turn, so that a machine
that slows down slows all of them. Printed with them: versions, the processor, the threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scalabl_ref

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from scalabl_ref import Noise, native_status, subspace_lora_linear

Step = Callable[[], Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(BENCHMARKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    report = {"machine": machine(), "rows": BENCHMARKS[args.what](args.rounds)}
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), end="\n\n")
    print(table(report["rows"]))
    return 0


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    status = native_status()
    return {
        "scalabl_ref": scalabl_ref.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": model,
        "threads": torch.get_num_threads(),
        "native core": status["isa"] if status["used"] else status["reason"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a row, columns by the first row's keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interleaved(steps: dict[str, Step], rounds: int, inner: int = 1) -> dict[str, float]:
    """Median seconds of one call of each step, over `rounds` rounds of `inner` calls of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # first touches, caches, lazy initialisation
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(inner):
                step()
            times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


# --- op ---------------------------------------------------------------------------------------

SHAPES = [(512, 4096, 4096), (512, 2048, 2048), (2048, 576, 576)]
RANK, SCALING, EXAMPLES = 8, 2.0, 8


class Composition(torch.autograd.Function):
    """The best that PyTorch's own operations do: updates added in place, backward by hand.

    Given eps (examples, r), its noise comes for nothing; our op draws its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: Tensor, sigma: Tensor,
                eps: Tensor) -> Tensor:  # fmt: skip
        rows = x.flatten(0, 1)
        h = rows @ A.t()
        factor = (SCALING * (s + sigma * eps)).repeat_interleave(x.shape[1], 0)
        y = F.linear(rows, W).addmm_(h * factor, B.t())
        ctx.save_for_backward(x, W, A, B, h, factor, eps)
        return y.view(*x.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, W, A, B, h, factor, eps = ctx.saved_tensors
        rows, g = x.flatten(0, 1), grad_y.flatten(0, 1)
        d = g @ B
        dh, ds = d * factor, (SCALING * h * d).view(*x.shape[:2], -1).sum(1)
        grad_x = (g @ W).addmm_(dh, A).view(x.shape)
        return (grad_x, None, dh.t() @ rows, g.t() @ (h * factor), ds.sum(0),
                (ds * eps).sum(0), None)  # fmt: skip


def official(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
    """As the official layer composes it: two matmuls, a draw shared by the batch, autograd."""
    eps = torch.randn_like(s)
    return F.linear(x, W) + F.linear(F.linear(x, A) * (s + sigma * eps), B) * SCALING


def op(rounds: int) -> list[dict[str, Any]]:
    """Forward and backward against the bare frozen linear layer (its forward and grad_x)."""
    return [one_shape(rounds, *shape) for shape in SHAPES]


def one_shape(rounds: int, count: int, d_in: int, d_out: int) -> dict[str, Any]:
    x = torch.randn(EXAMPLES, count // EXAMPLES, d_in, requires_grad=True)
    W, g = torch.randn(d_out, d_in), torch.randn(EXAMPLES, count // EXAMPLES, d_out)
    A, B = torch.randn(RANK, d_in) / d_in**0.5, torch.randn(d_out, RANK)
    own = [t.requires_grad_() for t in (A, B, torch.rand(RANK), torch.rand(RANK))]
    eps = Noise(0, 0).normal(0, EXAMPLES, RANK)

    def both_ways(forward: Callable[[], Tensor]) -> Step:
        def step() -> None:
            forward().backward(g)
            for t in (x, *own):
                t.grad = None

        return step

    noise = Noise(0, 0)
    steps = {
        "bare": lambda: F.linear(x, W),
        "ours": lambda: subspace_lora_linear(x, W, None, *own, SCALING, noise),
        "composition": lambda: Composition.apply(x, W, *own, eps),
        "official": lambda: official(x, W, *own),
    }
    seconds = interleaved({name: both_ways(step) for name, step in steps.items()}, rounds)
    bare = seconds.pop("bare")
    ratios = {f"{name} / bare": value / bare for name, value in seconds.items()}
    return {"rows, d_in, d_out": f"{count}, {d_in}, {d_out}", "bare ms": 1e3 * bare, **ratios}


@torch.no_grad()
def overhead(rounds: int) -> list[dict[str, Any]]:
    """Microseconds of one eager call at (1, 64, 64), without gradient."""
    x, W, A, B = (torch.randn(n, m) for n, m in ((1, 64), (64, 64), (8, 64), (64, 8)))
    s, noise = torch.rand(8), Noise(0, 0)
    seconds = interleaved(
        {
            "F.linear": lambda: F.linear(x, W),
            "mean": lambda: subspace_lora_linear(x, W, None, A, B, s, s, SCALING, None),
            "sampled": lambda: subspace_lora_linear(x, W, None, A, B, s, s, SCALING, noise),
        },
        20 * rounds,
        inner=200,
    )
    base = seconds["F.linear"]
    return [
        {"call": name, "us": 1e6 * value, "us above F.linear": 1e6 * (value - base)}
        for name, value in seconds.items()
    ]


BENCHMARKS: dict[str, Callable[[int], list[dict[str, Any]]]] = {"op": op, "overhead": overhead}


if __name__ == "__main__":
    sys.exit(main())
