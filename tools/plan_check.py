"""`scalabl plan` beside what it plans: peak memory and time of training steps, each in a process.

    python tools/plan_check.py [--points N ...] [--heap] [--cpu-time]

Every point is a random model of a shape, a kind of base, and so many rows of one length on each of
so many ranks, the base whole or spread over them; three steps are done, and the last is timed.
Ranks have one thread each, and what they exchange is planned at the rate of gathering a block. Peak
memory is VmHWM from just before the first step, so that it holds the weights but not how they were
made. Rates are measured in the same process, after the steps. Times want a machine that does
nothing else; --cpu-time has a thread's CPU time for both instead, which other processes disturb
less.
The processes run with glibc's MALLOC_MMAP_THRESHOLD_ at 64 KiB unless --heap is given: what is
freed then goes back to the system at once, instead of leaving holes between what is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import scalabl_ref

# isort: split
import torch
import torch.distributed as dist
from bench_worker import memory as resident

from scalabl_ref import AdapterConfig, Llama, LlamaConfig, add_adapters
from scalabl_ref.app.configs import CONFIGS
from scalabl_ref.app.plan import BASES, Workload, measured_rates, memory, seconds
from scalabl_ref.data import Encoded
from scalabl_ref.fast.quantize import quantize_model
from scalabl_ref.training import ranks as distributed
from scalabl_ref.training.trainer import TrainConfig, Trainer


def shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(16384, hidden, inner, layers, heads, kv_heads, hidden // heads)


MODELS = {
    "42M": shape(512, 1408, 8, 8, 8),
    "110M": shape(768, 2048, 12, 12, 4),
    "300M": shape(1024, 4096, 16, 16, 4),
    "smollm2-135m": CONFIGS["smollm2-135m"],
}
# model, base, rows, tokens, ranks, and over how many of them the base is spread
POINTS = [
    ("42M", "float32", 8, 128, 1, 1),
    ("42M", "float32", 16, 256, 1, 1),
    ("110M", "float32", 4, 256, 1, 1),
    ("110M", "bfloat16", 16, 128, 1, 1),
    ("300M", "float32", 2, 32, 1, 1),
    ("300M", "bfloat16", 8, 256, 1, 1),
    ("smollm2-135m", "float32", 8, 32, 1, 1),
    ("smollm2-135m", "float32", 8, 128, 1, 1),
    ("smollm2-135m", "nf4", 8, 128, 1, 1),
    ("300M", "int8", 8, 128, 1, 1),
    ("42M", "float32", 4, 128, 2, 1),
    ("42M", "float32", 8, 256, 2, 2),
    ("110M", "bfloat16", 4, 256, 2, 2),
    ("300M", "int8", 8, 128, 2, 2),
    ("smollm2-135m", "float32", 4, 128, 2, 1),
    ("smollm2-135m", "float32", 8, 128, 2, 2),
]


def measure(number: int, cpu_time: bool) -> dict[str, float]:
    """One point, in this process: bytes and seconds, planned and measured."""
    with distributed.joined(torch.device("cpu")):
        return _measure(number, time.process_time if cpu_time else time.perf_counter)


def _measure(number: int, clock: Callable[[], float]) -> dict[str, float]:
    name, base, rows, tokens, ranks, shards = POINTS[number]
    dtype, kind = BASES[base]
    work = Workload(MODELS[name], rows, tokens, AdapterConfig(rank=8))
    model = Llama(work.config, dtype=dtype).init_random_()
    if kind:
        quantize_model(model, kind)
    add_adapters(model.trim_head([5, 7]), work.adapter)
    block = sum(p.nbytes for p in model.layers[0].parameters() if not p.requires_grad)
    if shards > 1:
        distributed.shard(model)
    generator, count = torch.Generator().manual_seed(0), rows * ranks
    ids = torch.randint(work.config.vocab_size, (count, tokens), generator=generator).tolist()
    data = Encoded(ids, [i % 2 for i in range(count)], [5, 7])
    trainer = Trainer(model, data, TrainConfig(steps=3, batch=count))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    times = []
    for _ in range(3):
        started = clock()
        trainer.step()
        times.append(clock() - started)
    peak = resident("VmHWM")
    rates = measured_rates(work, base, clock=clock)._replace(link=link_rate(block, clock))
    how = {"devices": ranks, "shards": shards}
    return {
        "planned_bytes": memory(work, base, **how).peak,
        "bytes": peak,
        "planned_seconds": seconds(work, base, rates, **how),
        "seconds": times[2],
        "gflop": rates.flop / 1e9,
        "gbytes": rates.bytes / 1e9,
        "link": rates.link / 1e9,
    }


def link_rate(size: int, clock: Callable[[], float]) -> float:
    """Bytes/s that a rank receives while so many bytes are gathered on all; inf for one rank."""
    ranks = distributed.world()
    if ranks == 1:
        return math.inf
    part = torch.ones(size // ranks, dtype=torch.uint8)
    whole = [torch.empty_like(part) for _ in range(ranks)]
    times = []
    for _ in range(6):
        started = clock()
        dist.all_gather(whole, part)
        times.append(clock() - started)
    return len(part) * (ranks - 1) / sorted(times[1:])[2]


def run(number: int, more: list[str], setting: dict[str, str]) -> dict[str, float]:
    """`measure` in processes of their own, one a rank: what the first rank finds."""
    command = [sys.executable, __file__, "--measure", str(number), *more]
    ranks = POINTS[number][4]
    started = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    for rank in range(ranks):
        join = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", **address}
        environment = os.environ | setting | (join if ranks > 1 else {})
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
    results = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"point {number} failed")
    return json.loads(results[0])


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
          f"{torch.get_num_threads()} threads, of several ranks one each\n")  # fmt: skip
    print("| model | base | rows x tokens | ranks | peak planned, GB | measured | ratio "
          "| step planned, s | measured | ratio |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for number in args.points:
        name, base, rows, tokens, ranks, shards = POINTS[number]
        setting = {} if args.heap else {"MALLOC_MMAP_THRESHOLD_": "65536"}
        r = run(number, ["--cpu-time"] if args.cpu_time else [], setting)
        where = f"{ranks}, base spread" if shards > 1 else str(ranks)
        more = r["planned_bytes"] / r["bytes"], r["planned_seconds"] / r["seconds"]
        print(f"| {name} | {base} | {rows} x {tokens} | {where} | {r['planned_bytes'] / 1e9:.3f} "
              f"| {r['bytes'] / 1e9:.3f} | {more[0]:.2f} | {r['planned_seconds']:.2f} "
              f"| {r['seconds']:.2f} | {more[1]:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
