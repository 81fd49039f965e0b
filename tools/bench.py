"""Measurements: ours beside what people would use instead, interleaved, in one run.

    python tools/bench.py {op,overhead} [--threads N] [--rounds N] [--json]
        op: [--device cuda] [--dtype float32|bfloat16] [--shape ROWS D_IN D_OUT]
    python tools/bench.py {forward,train-step,predict,generate,memory} --model DIR
        [--device cuda] [--dtype float32|bfloat16] [--data FILE --format F] [--official CHECKOUT]
        [--peer-python PYTHON]
    python tools/bench.py {scaling,subspace} --model DIR [--page FILE.html]
    python tools/bench.py roofline --model DIR
    python tools/bench.py draws --run RUN --data FILE --format F [--examples N]

Ratios are of medians over rounds in which every candidate runs once, in turn, so that a machine
that slows down slows all of them. Printed with them: versions, the processor, its instruction
sets, the threads, and the cores that others took meanwhile: other processes, or other machines on
the same processor. If they took more than OTHERS of a core, there are no figures but an error,
unless --busy is given.

The peer of the model benchmarks is transformers with peft, and, with --official, the wrapper of a
checkout of SRI-CSL/BayesAdapt; weights, token ids, dtype and threads are the same. It lives in an
environment of its own, made for the run unless --peer-python names one. --data gives the prompts
of a real data set, by default lengths are drawn. A folder in our own layout is written in Hugging
Face's for the peer. --dtype is that of the base weights of both; adapters are float32.

`draws` is the error of a trained run's averages, by design and number of draws, against 1,000
others. `roofline` counts what each part of a step must compute and move, and compares its time with
the rates of a large matrix product and of a large addition, measured beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import scalabl_ref

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from scalabl_ref import Noise, native_status, subspace_lora_linear
from scalabl_ref.fast import blocks, rows
from scalabl_ref.model.inputs import Inputs
from scalabl_ref.support.folders import FORMAT

Step = Callable[[], Any]
OTHERS = 0.1  # cores that others may take during a measurement
ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # of matrix products


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted({**OWN, **MODEL_BENCHMARKS}))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", type=Path, help="folder of a model")
    parser.add_argument("--data", type=Path, help="file of examples")
    parser.add_argument("--format", default="sst2", help="of --data")
    parser.add_argument("--run", type=Path, help="run folder, for draws")
    parser.add_argument("--examples", type=int, default=32, help="of --data, for draws")
    parser.add_argument("--official", type=Path, help="checkout of SRI-CSL/BayesAdapt")
    parser.add_argument("--peer-python", type=Path, help="of an environment with the peers")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", type=int, nargs=3, action="append", help="of op, repeatable")
    parser.add_argument("--busy", action="store_true", help="print figures of a busy machine too")
    parser.add_argument("--page", type=Path, help="HTML page of scaling's plots to write")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    others = Others()
    if args.what in OWN:
        report = {"machine": machine(args.device), "rows": OWN[args.what](args)}
    else:
        if args.model is None:
            parser.error(f"{args.what} needs --model")
        names = ["ours"] if args.what in ("scaling", "subspace") else ["ours", "peer"]
        with sides(args, names) as both:
            rows = MODEL_BENCHMARKS[args.what](args, both)
            report = {"machine": both["ours"].versions, "rows": rows}
            if "peer" in both:
                report["peer"] = both["peer"].versions
    taken = others.cores()
    if taken > OTHERS and not args.busy:
        print(f"error: others took {taken:.2f} cores of this machine meanwhile: repeat this on a "
              "quiet machine, or add --busy", file=sys.stderr)  # fmt: skip
        return 1
    report["machine"]["cores that others took"] = f"{taken:.2f}"
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for name in ("machine", "peer"):
        if name in report:
            print(", ".join(f"{key} {value}" for key, value in report[name].items()), end="\n\n")
    print(table(report["rows"]))
    return 0


class Others:
    """Processors that others take: of the system's busy and stolen time, what is not ours."""

    def __init__(self) -> None:
        self.start = self._now()

    def _now(self) -> tuple[float, float]:
        """Seconds of the clock, and of the processors for others. Children count once they end."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return time.monotonic(), 0.0
        ticks = [int(t) for t in stat.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = ticks
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            used = resource.getrusage(who)
            busy -= used.ru_utime + used.ru_stime
        return time.monotonic(), busy

    def cores(self) -> float:
        """How many they took on average, since this object was made."""
        (begin, before), (end, after) = self.start, self._now()
        return max(0.0, (after - before) / (end - begin))


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on."""
    model, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        facts = {name.strip().lower(): value.strip() for name, _, value in lines}
        model = facts.get("model name", model)
        flags = set((facts.get("flags") or facts.get("features", "")).split())
    model = " ".join(re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b", " ", model).split())
    status = native_status()
    return {
        "scalabl_ref": scalabl_ref.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": model,
        "instruction sets": " ".join(name for name in ISA if name in flags) or "unknown",
        "threads": torch.get_num_threads(),
        "native core": status["isa"] if status["used"] else status["reason"],
        **({} if device == "cpu" else {"device": torch.cuda.get_device_name(device)}),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a row, columns by the first row's keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interleaved(
    steps: dict[str, Step], rounds: int, inner: int = 1, wait: Step = lambda: None
) -> dict[str, float]:
    """Median seconds of one call of each step, over `rounds` rounds of `inner` calls of each.

    wait: returns when the device has done all that it was told.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # first touches, caches, lazy initialisation
        wait()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(inner):
                step()
            wait()
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


def autograd(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
    """The shortest form under autograd: two low-rank products, a draw shared by the batch."""
    eps = torch.randn_like(s)
    return F.linear(x, W) + F.linear(F.linear(x, A) * (s + sigma * eps), B) * SCALING


def op(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward against the bare frozen linear layer (its forward and grad_x)."""
    return [one_shape(args, *shape) for shape in args.shape or SHAPES]


def one_shape(args: argparse.Namespace, count: int, d_in: int, d_out: int) -> dict[str, Any]:
    base: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = torch.randn(EXAMPLES, count // EXAMPLES, d_in, requires_grad=True, **base)
    W = torch.randn(d_out, d_in, **base)
    g = torch.randn(EXAMPLES, count // EXAMPLES, d_out, **base)
    A, B = torch.randn(RANK, d_in) / d_in**0.5, torch.randn(d_out, RANK)
    own = [t.to(args.device).requires_grad_() for t in (A, B, torch.rand(RANK), torch.rand(RANK))]
    theirs = [t.detach().to(x).requires_grad_() for t in own]  # no float32 beside bfloat16
    eps = Noise(0, 0).normal(0, EXAMPLES, RANK).to(x)

    def both_ways(forward: Callable[[], Tensor]) -> Step:
        def step() -> None:
            forward().backward(g)
            for t in (x, *own, *theirs):
                t.grad = None

        return step

    noise = Noise(0, 0)
    steps = {
        "bare": lambda: F.linear(x, W),
        "ours": lambda: subspace_lora_linear(x, W, None, *own, SCALING, noise),
        "composition": lambda: Composition.apply(x, W, *theirs, eps),
        "autograd": lambda: autograd(x, W, *theirs),
    }
    both = {name: both_ways(step) for name, step in steps.items()}
    wait = torch.cuda.synchronize if args.device != "cpu" else lambda: None
    seconds = interleaved(both, args.rounds, wait=wait)
    bare = seconds.pop("bare")
    ratios = {f"{name} / bare": value / bare for name, value in seconds.items()}
    return {"rows, d_in, d_out": f"{count}, {d_in}, {d_out}", "bare ms": 1e3 * bare, **ratios}


@torch.no_grad()
def overhead(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of one eager call at (1, 64, 64), without gradient."""
    x, W, A, B = (torch.randn(n, m) for n, m in ((1, 64), (64, 64), (8, 64), (64, 8)))
    s, noise = torch.rand(8), Noise(0, 0)
    seconds = interleaved(
        {
            "F.linear": lambda: F.linear(x, W),
            "mean": lambda: subspace_lora_linear(x, W, None, A, B, s, s, SCALING, None),
            "sampled": lambda: subspace_lora_linear(x, W, None, A, B, s, s, SCALING, noise),
        },
        20 * args.rounds,
        inner=200,
    )
    base = seconds["F.linear"]
    return [
        {"call": name, "us": 1e6 * value, "us above F.linear": 1e6 * (value - base)}
        for name, value in seconds.items()
    ]


# --- Our model alone --------------------------------------------------------------------------

TRUTH = 1000  # draws that others are measured against
REPEATS = 16  # independent averages of so many draws, whose errors are squared and averaged


def draws(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Root mean square error, over examples and classes, of averaged probabilities; and its price.

    "of ten" is its square relative to that of ten independent draws, "like ten" how many draws of
    the design have the error of ten independent ones, if it goes on as here with their number.
    """
    from scalabl_ref.data import collate, encode, load
    from scalabl_ref.data.tokenizer import load_tokenizer
    from scalabl_ref.evaluation.predict import DESIGNS, predict
    from scalabl_ref.evaluation.sequential import Auto, predict_auto
    from scalabl_ref.training.runs import load_run

    if args.run is None or args.data is None:
        raise SystemExit("draws needs --run and --data")
    model, info = load_run(args.run)
    examples = load(args.data, args.format, limit=args.examples)
    encoded = encode(examples, load_tokenizer(info["model"]))
    batch = collate(encoded, range(len(examples)))
    truth = predict(model, batch, TRUTH, seed=10**6).probs
    of_ten = 0.0  # the variance of ten independent draws
    rows: list[dict[str, Any]] = []
    for design in DESIGNS:
        for count in (2, 4, 10):
            start = time.perf_counter()
            each = [predict(model, batch, count, i, design=design).probs for i in range(REPEATS)]
            seconds = (time.perf_counter() - start) / REPEATS
            # Of independent repeats: what they differ by holds no error of the truth.
            error = torch.stack(each).var(0).mean().item()
            of_ten = of_ten or error * count / 10
            far = (torch.stack(each).mean(0) - truth).square().mean().sqrt().item()
            rows.append({
                "draws": count, "design": design, "rms error": math.sqrt(error),
                "of ten": error / of_ten, "like ten": count * error / of_ten,
                "against the truth": far, "ms": 1e3 * seconds,
            })  # fmt: skip
    for tolerance in (0.2, 0.05):
        start = time.perf_counter()
        result, taken, settled = predict_auto(model, batch, Auto(tolerance))
        seconds = time.perf_counter() - start
        same = (result.probs.argmax(-1) == truth.argmax(-1)).double().mean().item()
        quartiles = taken.double().quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        rows.append({
            "draws": f"auto {tolerance}: {taken.double().mean():.1f} in the mean, quartiles "
            f"{quartiles}, {int((~settled).sum())} open",
            "design": f"{same:.3f} of the answers those of the truth",
            "rms error": "", "of ten": "", "like ten": "",
            "against the truth": (result.probs - truth).square().mean().sqrt().item(),
            "ms": 1e3 * seconds,
        })  # fmt: skip
    return rows


def measured_rates(dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """FLOP a second of a product of 2048 x 2048, and numbers moved a second by an addition."""
    a, b = torch.randn(2, 1 << 24).to(dtype).unbind()
    square = torch.randn(2048, 2048).to(dtype)
    own = {"product": lambda: square @ square, "addition": lambda: torch.add(a, b, out=a)}
    seconds = interleaved(own, rounds)
    flop, moved = 2 * 2048**3 / seconds["product"], 3 * len(a) / seconds["addition"]
    size = dtype.itemsize
    print(f"product {flop / 1e9:.0f} GFLOP/s, addition {size * moved / 1e9:.1f} GB/s, {dtype}\n")
    return flop, moved


def roofline(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each part's time beside the least that the machine's own rates allow, forwards.

    A part must do its FLOP at the rate of a large matrix product and move its numbers (each weight
    and each input and output once) at that of a large addition; the larger time is its roof.
    """
    if args.model is None:
        raise SystemExit("roofline needs --model")
    model = scalabl_ref.Llama.from_pretrained(args.model)
    flop_rate, move_rate = measured_rates(torch.float32, args.rounds)
    rows = []
    for count, length in ((1, 1), (1, 8), (1, 128), (8, 32)):
        tokens = torch.arange(count * length).view(count, length)
        parts = parts_of(model, count, length)
        steps = {name: part.step for name, part in parts.items()}
        with torch.no_grad():
            seconds = interleaved({**steps, "all": lambda t=tokens: model(t)}, args.rounds)
        for part in parts.values():
            part.seconds = part.times * seconds[part.name]
            part.roof = part.times * max(part.flop / flop_rate, part.moved / move_rate)
        whole = Part("all", lambda: None, 0, 0, 1, seconds["all"])
        whole.flop = sum(part.times * part.flop for part in parts.values())
        whole.moved = sum(part.times * part.moved for part in parts.values())
        whole.roof = sum(part.roof for part in parts.values())
        rows += [
            {
                "rows x tokens": f"{count} x {length}", "part": part.name,
                "GFLOP": part.times * part.flop / 1e9, "MB": part.times * part.moved * 4 / 1e6,
                "ms": 1e3 * part.seconds, "roof ms": 1e3 * part.roof,
                "roof / time": part.roof / part.seconds,
            }
            for part in (*parts.values(), whole)
        ]  # fmt: skip
    return rows


@dataclass
class Part:
    """Of a forward pass: FLOP and float32 numbers moved by one call, and how often it is called."""

    name: str
    step: Step
    flop: float
    moved: float
    times: int
    seconds: float = 0.0
    roof: float = 0.0


def parts_of(model: scalabl_ref.Llama, count: int, length: int) -> dict[str, Part]:
    """The parts of a pass over `count` rows of `length` tokens, by name."""
    c, (attn, mlp) = model.config, (model.layers[0].attn, model.layers[0].mlp)
    N, D, inner, L = count * length, c.hidden_size, c.intermediate_size, c.num_hidden_layers
    H, K = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    dtype = model.lm_head.weight.dtype
    x, gate, attended = (torch.randn(count, length, n).to(dtype) for n in (D, inner, H))
    q, k = (torch.randn(count, n // c.head_dim, length, c.head_dim).to(dtype) for n in (H, K))
    heads = q.transpose(1, 2).contiguous()
    inputs = Inputs(torch.zeros(count, length, dtype=torch.int64))
    ctx = rows.packed_context(model, inputs, rows.Rows(count, length))

    def attention() -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    found = (
        Part("q, k, v", lambda: (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)),
             2 * N * D * (H + 2 * K), (D + N) * (H + 2 * K) + N * D, L),
        Part("RoPE", lambda: blocks.rotate(heads, ctx.cos, ctx.sin), 3 * N * H, 2 * N * H, 2 * L),
        Part("attention", attention, 2 * N * length * H, 2 * N * (H + K), L),
        Part("o", lambda: attn.o_proj(attended), 2 * N * H * D, H * D + N * (H + D), L),
        Part("gate, up", lambda: (mlp.gate_proj(x), mlp.up_proj(x)),
             4 * N * D * inner, 2 * (D + N) * inner + N * D, L),
        Part("SwiGLU", lambda: blocks.SwiGLU.apply(gate, gate), 5 * N * inner, 3 * N * inner, L),
        Part("down", lambda: mlp.down_proj(gate),
             2 * N * D * inner, inner * D + N * (inner + D), L),
        Part("RMSNorm", lambda: model.norm(x), 4 * N * D, 2 * N * D, 2 * L + 1),
        Part("head", lambda: model.lm_head(x),
             2 * N * D * c.vocab_size, c.vocab_size * D + N * (D + c.vocab_size), 1),
    )  # fmt: skip
    return {part.name: part for part in found}


OWN: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "op": op,
    "overhead": overhead,
    "draws": draws,
    "roofline": roofline,
}


# --- Models, ours and the peer's in processes of their own ------------------------------------

Task = dict[str, Any]
PEERS = (f"torch=={torch.__version__.partition('+')[0]}", "transformers", "peft", "numpy")
CLASSES = 2


class Side:
    """A process of bench_worker.py, which does one task at a time."""

    def __init__(self, name: str, python: Path, args: argparse.Namespace) -> None:
        command = [python, Path(__file__).with_name("bench_worker.py"), name, args.model]
        command += ["--threads", args.threads, "--dtype", args.dtype, "--device", args.device]
        if args.official:
            command += ["--official", args.official]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions: dict[str, Any] = self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def __call__(self, **task: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._answer()


@contextlib.contextmanager
def sides(args: argparse.Namespace, names: list[str]) -> Iterator[dict[str, Side]]:
    """Both sides by name; the peer's environment is made where none is named."""
    with tempfile.TemporaryDirectory() as folder:
        python = args.peer_python
        if "peer" in names and python is None:
            print(f"installing {' '.join(PEERS)}", file=sys.stderr)
            venv.create(folder, with_pip=True)
            python = Path(folder) / "bin" / "python"
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        made: dict[str, Side] = {}
        try:
            for name in names:
                if name == "peer":
                    args.model = in_their_layout(args.model, Path(folder) / "model")
                made[name] = Side(name, Path(sys.executable) if name == "ours" else python, args)
            yield made
        finally:
            for side in made.values():
                side.process.kill()
                side.process.wait()


def in_their_layout(folder: Path, copy: Path) -> Path:
    """The folder of a model in Hugging Face's layout: `folder`, or a copy of it."""
    if json.loads((folder / "config.json").read_text()).get("format") != FORMAT:
        return folder
    convert = Path(__file__).with_name("convert_hf.py")
    subprocess.run(
        [sys.executable, convert, folder, copy, "--to-hf"], check=True, stdout=sys.stderr
    )
    return copy


def prompts(args: argparse.Namespace, count: int) -> list[list[int]]:
    """Token ids of so many prompts, in their order."""
    if args.data is None:
        lengths = torch.randint(10, 45, (count,), generator=torch.Generator().manual_seed(0))
        return [list(range(100, 100 + n)) for n in lengths.tolist()]
    from scalabl_ref.data import encode, load
    from scalabl_ref.data.tokenizer import load_tokenizer

    examples = load(args.data, args.format, limit=count)
    return encode(examples, load_tokenizer(args.model)).tokens


def compare(
    both: Mapping[str, Callable[..., dict[str, Any]]],
    rounds: int,
    tasks: list[Task],
    what: str = "seconds",
) -> dict[str, float]:
    """Medians over rounds of ours, the peer's, and ours / peer; round i takes task i of those."""
    found: dict[str, list[float]] = {name: [] for name in both}
    for side in both.values():
        for task in tasks[:2]:  # loads the model, touches the memory, fills the caches
            side(**task)
    for i in range(rounds):
        for name in both if i % 2 else reversed(both):
            found[name].append(both[name](**tasks[i % len(tasks)])[what])
    ours, peer = (statistics.median(found[name]) for name in ("ours", "peer"))
    return {"ours": ours, "peer": peer, "ours / peer": ours / peer}


def forward(args: argparse.Namespace, both: dict[str, Side]) -> list[dict[str, Any]]:
    rows = []
    for count, length in ((1, 8), (1, 128), (8, 32)):
        tokens = [[(7 * i + 13 * j) % 1000 + 100 for j in range(length)] for i in range(count)]
        task = {"do": "forward", "rows": tokens}
        values = [both[name](**task)["value"] for name in both]
        near = 1e-4 if args.dtype == "float32" else 0.03
        assert math.isclose(*values, rel_tol=near), values  # the same model
        rows.append(
            {
                "plain model, rows x tokens": f"{count} x {length}",
                **compare(both, args.rounds, [task]),
            }
        )
    return rows


def generation(args: argparse.Namespace, both: dict[str, Side]) -> list[dict[str, Any]]:
    task = {"do": "generate", "rows": [prompts(args, 1)[0]], "count": 128}
    texts = [both[name](**task)["value"] for name in both]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), 128)
    result = compare(both, max(3, args.rounds // 3), [task])
    return [{"greedy, batch 1": f"128 tokens, the first {same} the same", **result}]


def train_tasks(args: argparse.Namespace, method: str) -> list[Task]:
    """Batches of 8 as they come."""
    rows = prompts(args, 80)
    return [
        {"do": "train", "method": method, "rows": rows[8 * i : 8 * i + 8], "number": i,
         "classes": list(range(300, 300 + CLASSES))}
        for i in range(10)
    ]  # fmt: skip


def steps(args: argparse.Namespace, both: dict[str, Side], what: str) -> list[dict[str, Any]]:
    """Ours against the official wrapper where it is given, and against plain LoRA of peft.

    what: "seconds" of a step, or "bytes", by which the peak of resident memory grows during it.
    """
    rows = []
    ours = train_tasks(args, "scalabl")
    for method in ("scalabl", "lora") if args.official else ("lora",):
        peers = {
            "ours": lambda **t: both["ours"](**{**t, "method": "scalabl"}),
            "peer": both["peer"],
        }
        tasks = [{**task, "method": method} for task in ours]
        rows.append(
            {f"scalabl, {what}, against": method, **compare(peers, args.rounds, tasks, what)}
        )
    return rows


def profile(args: argparse.Namespace, both: dict[str, Side]) -> list[dict[str, Any]]:
    """A training step by part, ours and the peer's, forward and backward; see bench_profile.py."""
    found = {}
    for name, side in both.items():
        method = "scalabl" if name == "ours" or args.official else "lora"
        tasks = train_tasks(args, method)
        for task in tasks[:2]:
            side(**task)
        each = [side(**task, profile=1)["parts"] for task in tasks * max(1, args.rounds // 10)]
        parts = {part for times in each for part in times}
        found[name] = {
            part: [statistics.fmean(times.get(part, (0, 0))[i] for times in each) for i in (0, 1)]
            for part in parts
        }
    found["roof"] = training_roofs(args)
    found = {name: {**parts, "all": _sums(parts)} for name, parts in found.items()}
    rows = []
    for part in sorted({*found["ours"], *found["peer"]}, key=lambda part: (part == "all", part)):
        ours, peer, roof = (found[name].get(part, [0.0, 0.0]) for name in ("ours", "peer", "roof"))
        rows.append({
            "part": part, "ours forward, ms": ours[0], "backward": ours[1],
            "peer forward, ms": peer[0], "backward ": peer[1],
            "ours / peer": sum(ours) / sum(peer) if sum(peer) else math.inf,
            "roof, ms": sum(roof), "roof / ours": sum(roof) / sum(ours) if sum(ours) else math.inf,
        })  # fmt: skip
    return rows


def _sums(parts: dict[str, list[float]]) -> list[float]:
    return [sum(times[i] for times in parts.values()) for i in (0, 1)]


# Work of the backward pass over that of the forward pass, where it differs: no base weight has a
# gradient, the attention is computed again, and gradients are read besides the inputs.
BACKWARD = {"attention": 2.5, "SwiGLU": 5 / 3, "RMSNorm": 1.5}


def training_roofs(args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds, forward and backward, that our step's parts need at the machine's rates.

    In the last block what follows the attention is left out: it has one token of a row. The rest of
    that block, and the first block's gradients, are counted in full, a few percent too much.
    """
    model = scalabl_ref.Llama.from_pretrained(args.model, getattr(torch, args.dtype))
    flop_rate, move_rate = measured_rates(getattr(torch, args.dtype), args.rounds)
    lengths = [len(row) for task in train_tasks(args, "scalabl") for row in task["rows"]]
    parts = parts_of(model, 8, round(statistics.fmean(lengths)))
    found = {}
    for name, part in parts.items():
        if name != "head":
            last = name in ("o", "gate, up", "SwiGLU", "down")
            seconds = max(part.flop / flop_rate, part.moved / move_rate) * (part.times - last)
            key = "RoPE and packing" if name == "RoPE" else name
            found[key] = [1e3 * seconds, 1e3 * seconds * BACKWARD.get(name, 1)]
    return found


def ten_draws(args: argparse.Namespace, method: str, classes: int) -> dict[str, list[Task]]:
    """The tasks of predictions, by their rows and tokens."""
    base = {"do": "predict", "method": method, "classes": list(range(300, 300 + classes))}
    rows = {
        "1 x 8": [[list(range(100, 108))]],
        "1 x 32": [[list(range(100, 132))]],
        "8 as they come": [task["rows"] for task in train_tasks(args, "scalabl")],
    }
    return {name: [{**base, "rows": r, "samples": 10} for r in each] for name, each in rows.items()}


def prediction(args: argparse.Namespace, both: dict[str, Side]) -> list[dict[str, Any]]:
    """Ten draws; the last column is ours for ten over ours for one."""
    method = "scalabl" if args.official else "lora"  # of the peer
    rows = []
    for name, tasks in ten_draws(args, method, CLASSES).items():
        ten = compare(both, args.rounds, tasks)
        one = {"ours": both["ours"], "peer": both["ours"]}
        alone = compare(one, args.rounds, [{**t, "samples": 1} for t in tasks])
        rows.append(
            {
                "ten draws, rows x tokens": name,
                "against": method,
                **ten,
                "ten / one": ten["ours"] / alone["ours"],
            }
        )
    return rows


def linearised(args: argparse.Namespace, both: dict[str, Side]) -> list[dict[str, Any]]:
    """The prediction of a subspace posterior beside ten draws of ScalaBL, both ours."""
    ours, rows = both["ours"], []
    for count in (2, 4):
        cases = ten_draws(args, "scalabl", count)
        for name in ("1 x 32", "8 as they come"):
            turns = {"ours": lambda **t: ours(**{**t, "do": "subspace"}), "peer": ours}
            found = compare(turns, args.rounds, cases[name])
            rows.append({
                "subspace posterior, rows x tokens": name, "classes": count,
                "seconds": found["ours"], "ten draws": found["peer"],
                "ratio": found["ours / peer"],
            })  # fmt: skip
    return rows


def scaling(args: argparse.Namespace, both: dict[str, Side]) -> list[dict[str, Any]]:
    """Exponents of seconds and bytes, fitted to the upper half of each range."""
    ours, classes = both["ours"], list(range(300, 300 + CLASSES))
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    whole = {"batch": 4, "length": 32, "rank": RANK, "layers": layers, "samples": 4}
    ranges = {
        "samples": [1, 2, 4, 8, 16, 32], "rank": [2, 4, 8, 16, 32, 64],
        "batch": [1, 2, 4, 8, 16], "length": [16, 32, 64, 128, 256],
        "layers": sorted({max(1, layers * k // 6) for k in range(1, 7)}),
    }  # fmt: skip
    rows = []
    for name, values in ranges.items():
        for do in ("predict", "train") if name != "samples" else ("predict",):
            points = []
            for value in values:
                at = {**whole, name: value}
                task = {
                    "do": do, "method": "scalabl", "classes": classes, "number": 0,
                    "rank": at["rank"], "layers": at["layers"], "samples": at["samples"],
                    "rows": [list(range(100, 100 + at["length"]))] * at["batch"],
                }  # fmt: skip
                ours(**task)
                each = [ours(**task) for _ in range(max(3, args.rounds // 3))]
                points.append(
                    [statistics.median(e[key] for e in each) for key in ("seconds", "bytes")]
                )
            seconds, sizes = zip(*points, strict=True)
            rows.append({
                "against": name, "of": do, "values": " ".join(map(str, values)),
                "ms": " ".join(f"{1e3 * s:.0f}" for s in seconds),
                "exponent": exponent(values, seconds), "predicted": EXPONENTS[name],
                "MB": " ".join(f"{b / 1e6:.0f}" for b in sizes),
                "exponent of MB": exponent(values, sizes),
            })  # fmt: skip
    if args.page:
        scaling_page(args.page, ours.versions, rows)
    return rows


# What the work grows with. A rank's share of it is small; attention's, quadratic in length, too.
EXPONENTS = {"samples": 1, "rank": 0, "batch": 1, "length": 1, "layers": 1}


WORDS = {"ms": "time", "MB": "memory above the weights"}
UNITS = {
    "samples": "draws",
    "batch": "rows",
    "length": "tokens",
    "layers": "layers",
    "rank": "rank",
}


def scaling_page(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Both axes logarithmic, and beside what was measured what is predicted, through its end."""
    from scalabl_ref.evaluation.report import write_report

    plots = []
    for row in rows:
        values = [int(x) for x in row["values"].split()]
        power, x = EXPONENTS[row["against"]], UNITS[row["against"]]
        for unit, words in WORDS.items():
            sizes = tuple(max(float(y), 1.0) for y in row[unit].split())
            line = [(value, sizes[-1] * (value / values[-1]) ** power) for value in values]
            measured = list(zip(values, sizes, strict=True))
            found = exponent(values, sizes)
            plots.append({
                "title": f"{row['of']}: {words} against {x}, exponent {found:.2f} ({power})",
                "x": x, "y": f"{words} ({unit})", "log": True, "log_y": True,
                "series": [("measured", measured), ("predicted", line)],
            })  # fmt: skip
    subtitle = (
        "In brackets: the exponent of the work. The predicted line has it, and goes through the "
        "last point. Both axes are logarithmic."
    )
    page = {"title": "Time and memory against sizes", "subtitle": subtitle, "about": about}
    write_report(path, {**page, "models": [], "plots": plots})


def exponent(x: list[int], y: tuple[float, ...]) -> float:
    """Slope of log y against log x by least squares, over the upper half of the points."""
    half = len(x) // 2
    u, v = ([math.log(t) for t in values[half:]] for values in (x, y))
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return covariance / sum((a - mean_u) ** 2 for a in u)


MODEL_BENCHMARKS: dict[
    str, Callable[[argparse.Namespace, dict[str, Side]], list[dict[str, Any]]]
] = {
    "forward": forward,
    "train-step": partial(steps, what="seconds"),
    "predict": prediction,
    "subspace": linearised,
    "generate": generation,
    "memory": partial(steps, what="bytes"),
    "profile": profile,
    "scaling": scaling,
}


if __name__ == "__main__":
    sys.exit(main())
