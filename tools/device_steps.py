"""Steps of device_check.py that are no program of their own; each prints a Markdown table.

python tools/device_steps.py {card,build,model,nf4,offload,nccl,graph} DEVICE FOLDER [--tiny]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scalabl_ref

# isort: split
import torch
import torch.distributed as dist
from bench import table
from torch import Tensor

from scalabl_ref import AdapterConfig, Llama, LlamaConfig, Noise, adapters, add_adapters
from scalabl_ref.data import Encoded
from scalabl_ref.fast.quantize import quantize_model
from scalabl_ref.support.tensors import save_tensors
from scalabl_ref.training import ranks
from scalabl_ref.training.trainer import TrainConfig, Trainer

ROOT = Path(__file__).resolve().parent.parent
CLASSES = [300, 301]
# The extension, as a new process finds it.
BUILT = """
import scalabl_ref; from scalabl_ref.fast import native
status, core = scalabl_ref.native_status(), native.core()
print(f"core: {status['reason'] or 'used'}; {status['compiler']}; CUDA for {core and core.cuda!r}")
raise SystemExit(core is None or not core.cuda)"""


def run(*command: Any, **environment: str) -> str:
    """What the command prints. Its errors go to ours; if it fails, so do we."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{done.stdout}{' '.join(map(str, command))}: status {done.returncode}")
    return done.stdout


def shape(tiny: bool) -> LlamaConfig:
    """That of Llama 3.2 1B with a smaller vocabulary, or a tiny one."""
    if tiny:
        return LlamaConfig(1000, 64, 128, 2, 4, 2, 16, max_position_embeddings=256)
    return LlamaConfig(32000, 2048, 8192, 16, 32, 8, 64, max_position_embeddings=2048)


def random_model(args: argparse.Namespace) -> Llama:
    """In bfloat16, on the device."""
    torch.manual_seed(0)
    model = Llama(shape(args.tiny), torch.bfloat16, args.device).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(std=0.02)
    return model


def trainer(args: argparse.Namespace, model: Llama, **config: Any) -> Trainer:
    """On 16 random rows of equal length, in batches of 8; `adapted` first."""
    length = 16 if args.tiny else 512
    rows = torch.randint(400, 900, (16, length), generator=torch.Generator().manual_seed(0))
    data = Encoded(rows.tolist(), [i % 2 for i in range(16)], CLASSES)
    return Trainer(model, data, TrainConfig(steps=8, batch=8, **config))


def adapted(model: Llama) -> Llama:
    """The model with a head of two classes and adapters that do something."""
    add_adapters(model.trim_head(CLASSES), AdapterConfig(rank=8))
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.B.normal_(std=0.01)
    return model


class Peak:
    """Milliseconds and MiB at most on the device, since this object was made or last asked."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        self.start = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def __call__(self) -> dict[str, Any]:
        mib = "-"
        if self.cuda:
            torch.cuda.synchronize()
            mib = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
        milliseconds = 1e3 * (time.perf_counter() - self.start)
        self.start = self._now()
        return {"ms": milliseconds, "peak MiB": mib}


def two_steps(device: str, made: Trainer) -> tuple[list[float], dict[str, Any]]:
    """Losses of two steps, and the second one's time and memory."""
    first, peak = made.step()["loss"], Peak(device)
    return [first, made.step()["loss"]], peak()


# --- The steps ------------------------------------------------------------------------------------


def card(args: argparse.Namespace) -> None:
    """Facts as JSON. Fails if the device cannot compute."""
    assert float((torch.ones(64, 64, device=args.device) @ torch.ones(64, 1).to(args.device)).sum())
    facts = {"torch": torch.__version__, "CUDA of torch": torch.version.cuda or "none"}
    if args.device != "cpu":
        found = torch.cuda.get_device_properties(args.device)
        query = "--query-gpu=driver_version", "--format=csv,noheader"
        smi = shutil.which("nvidia-smi")
        facts = {
            "card": found.name,
            "memory": f"{found.total_memory / 2**30:.0f} GiB",
            "capability": f"{found.major}.{found.minor}",
            "driver": run(smi, *query).split("\n")[0] if smi else "unknown",
            **facts,
        }
    nvcc = shutil.which("nvcc")
    facts["nvcc"] = run(nvcc, "--version").strip().split("\n")[-1] if nvcc else "none"
    print(json.dumps(facts))


def build(args: argparse.Namespace) -> None:
    """The extension in place, with CUDA for this card."""
    ready = all(importlib.util.find_spec(name) for name in ("pybind11", "cmake", "ninja"))
    how = ["--quiet", "--no-deps", *(["--no-build-isolation"] if ready else [])]
    major, minor = torch.cuda.get_device_capability(args.device)
    install = [sys.executable, "-m", "pip", "install", *how, "--editable", "."]
    run(*install, SCALABL_CUDA="1", CUDAARCHS=f"{major}{minor}")
    print(run(sys.executable, "-c", BUILT))


def model(args: argparse.Namespace) -> None:
    """A random model in Hugging Face's layout, for both sides of the benchmarks."""
    ours, made = args.folder / "ours", random_model(args)
    ours.mkdir()
    save_tensors(ours / "model.safetensors", made.state_dict().items())
    (ours / "config.json").write_text(json.dumps(made.config.to_dict()))
    convert = Path(__file__).with_name("convert_hf.py")
    run(sys.executable, convert, ours, args.folder / "model", "--to-hf")
    shutil.rmtree(ours)
    print(f"{sum(p.numel() for p in made.parameters()) / 1e6:.1f} million parameters")


def nf4(args: argparse.Namespace) -> None:
    """A step of training with the blocks' weights in bfloat16 and in nf4."""
    rows = []
    for kind in ("bfloat16", "nf4"):
        base = random_model(args)
        if kind == "nf4":
            quantize_model(base, kind)
        held = sum(t.numel() * t.element_size() for t in base.state_dict().values())
        made = trainer(args, adapted(base), recompute=True)
        losses, step = two_steps(args.device, made)
        assert all(map(math.isfinite, losses)), losses
        rows.append({"base": kind, "weights MiB": f"{held / 2**20:.0f}", "loss": losses[0], **step})
        del made, base
    print(table(rows))


def offload(args: argparse.Namespace) -> None:
    """Ways to keep activations for the backward pass; the first loss is the same to the bit."""
    rows, base = [], adapted(random_model(args))
    before = {n: p.detach().clone() for n, p in base.named_parameters() if p.requires_grad}
    for name, config in {
        "all on the device": {},
        "recompute": {"recompute": True},
        "offload_activations": {"offload_activations": True},
    }.items():
        with torch.no_grad():
            for parameter, value in before.items():
                base.get_parameter(parameter).copy_(value)
        losses, step = two_steps(args.device, trainer(args, base, **config))
        rows.append({"activations": name, "first loss": repr(losses[0]), **step})
    assert len({row["first loss"] for row in rows}) == 1, rows
    print(table(rows))


def nccl(args: argparse.Namespace) -> None:
    """One rank: a sum through NCCL (gloo on the CPU), and a sharded base whose weights wait on the
    CPU. Its first loss is that of the whole base to one rounding of bfloat16: a product may round
    in another way where its weight lies elsewhere.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    device, rows, first = ranks.own_device(torch.device(args.device)), [], []
    with ranks.joined(device, timeout=30):
        values = torch.arange(4.0, device=device)
        dist.all_reduce(values)
        assert values.tolist() == [0.0, 1.0, 2.0, 3.0]
        for name in ("whole", "sharded, weights on the CPU"):
            base = adapted(random_model(args))
            if name != "whole":
                ranks.shard(base.to("cpu"), device, offload=True)
            losses, step = two_steps(args.device, trainer(args, base))
            rows.append({"base": name, "first loss": repr(losses[0]), **step})
            first.append(losses[0])
            del base
        backend = dist.get_backend()
    assert math.isclose(*first, rel_tol=torch.finfo(torch.bfloat16).eps), rows
    print(f"backend: {backend}\n\n{table(rows)}")


def graph(args: argparse.Namespace) -> None:
    """A CUDA graph of the op, forwards and backwards, gives the bits of eager calls."""
    x, W, A, B = (torch.randn(n, m, device=args.device) for n, m in
                  ((64, 128), (96, 128), (8, 128), (96, 8)))  # fmt: skip
    leaves = [x, A, B, *torch.rand(2, 8, device=args.device)]
    leaves = [t.detach().requires_grad_() for t in leaves]

    def once() -> list[Tensor]:
        x, A, B, s, sigma = leaves
        y = scalabl_ref.subspace_lora_linear(x, W, None, A, B, s, sigma, 2.0, Noise(1, 2))
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    eager, stream = once(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        once()  # PyTorch asks for a call on another stream before a capture
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = once()
    for _ in range(3):
        captured.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(results, eager, strict=True):
            assert torch.equal(ours, theirs)
    print(f"{len(eager)} tensors have the same bits in 3 replays")


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    step.__name__: step for step in (card, build, model, nf4, offload, nccl, graph)
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("device")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    found = parser.parse_args()
    STEPS[found.step](found)
