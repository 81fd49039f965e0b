"""`scalabl plan` beside what it plans: peak memory and time of training steps, each in a process.

    python tools/plan_check.py [--points N ...] [--heap] [--cpu-time]

Every point is a random model of a shape, a kind of base, and a batch of rows of one length on one
device; two steps are done and the second is timed. Peak memory is VmHWM from just before the
first step, so that it holds the weights but not how they were made. Rates are measured in the same
process, after the steps. Times want a machine that does nothing else; --cpu-time has a thread's CPU
time for both instead, which other processes disturb less.
The processes run with glibc's MALLOC_MMAP_THRESHOLD_ at 64 KiB unless --heap is given: what is
freed then goes back to the system at once, instead of leaving holes between what is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import scalabl_ref

# isort: split
import torch
from bench_worker import memory as resident

from scalabl_ref import AdapterConfig, Llama, LlamaConfig, add_adapters
from scalabl_ref.configs import CONFIGS
from scalabl_ref.data import Encoded
from scalabl_ref.plan import BASES, Workload, measured_rates, memory, seconds
from scalabl_ref.train import TrainConfig, Trainer


def shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(16384, hidden, inner, layers, heads, kv_heads, hidden // heads)


MODELS = {
    "42M": shape(512, 1408, 8, 8, 8),
    "110M": shape(768, 2048, 12, 12, 4),
    "300M": shape(1024, 4096, 16, 16, 4),
    "smollm2-135m": CONFIGS["smollm2-135m"],
}
# model, base, rows, tokens
POINTS = [
    ("42M", "float32", 8, 128),
    ("42M", "float32", 16, 256),
    ("110M", "float32", 4, 256),
    ("110M", "bfloat16", 16, 128),
    ("300M", "float32", 2, 32),
    ("300M", "bfloat16", 8, 256),
    ("smollm2-135m", "float32", 8, 32),
    ("smollm2-135m", "float32", 8, 128),
    ("smollm2-135m", "nf4", 8, 128),
    ("300M", "int8", 8, 128),
]


def measure(number: int, cpu_time: bool) -> dict[str, float]:
    """One point, in this process: bytes and seconds, planned and measured."""
    clock = time.process_time if cpu_time else time.perf_counter
    name, base, rows, tokens = POINTS[number]
    dtype, kind = BASES[base]
    work = Workload(MODELS[name], rows, tokens, AdapterConfig(rank=8))
    model = Llama(work.config, dtype=dtype).init_random_()
    if kind:
        model.quantize_(kind)
    add_adapters(model.trim_head([5, 7]), work.adapter)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(work.config.vocab_size, (rows, tokens), generator=generator).tolist()
    data = Encoded(ids, [i % 2 for i in range(rows)], [5, 7])
    trainer = Trainer(model, data, TrainConfig(steps=2, batch=rows))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    times = []
    for _ in range(2):
        started = clock()
        trainer.step()
        times.append(clock() - started)
    peak = resident("VmHWM")
    rates = measured_rates(work, base, clock=clock)
    return {
        "planned_bytes": memory(work, base).peak,
        "bytes": peak,
        "planned_seconds": seconds(work, base, rates),
        "seconds": times[1],
        "gflop": rates.flop / 1e9,
        "gbytes": rates.bytes / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, nargs="+", default=list(range(len(POINTS))))
    parser.add_argument("--heap", action="store_true", help="leave malloc as it is")
    parser.add_argument("--cpu-time", action="store_true", help="with one thread")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.cpu_time)))
        return
    print(f"scalabl_ref {scalabl_ref.__version__}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads\n")  # fmt: skip
    print("| model | base | rows x tokens | peak planned, GB | measured | ratio "
          "| step planned, s | measured | ratio |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for number in args.points:
        name, base, rows, tokens = POINTS[number]
        command = [sys.executable, __file__, "--measure", str(number)]
        command += ["--cpu-time"] if args.cpu_time else []
        setting = {} if args.heap else {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, env=os.environ | setting)
        r = json.loads(done.stdout)
        more = r["planned_bytes"] / r["bytes"], r["planned_seconds"] / r["seconds"]
        print(f"| {name} | {base} | {rows} x {tokens} | {r['planned_bytes'] / 1e9:.3f} "
              f"| {r['bytes'] / 1e9:.3f} | {more[0]:.2f} | {r['planned_seconds']:.2f} "
              f"| {r['seconds']:.2f} | {more[1]:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
