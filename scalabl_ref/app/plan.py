"""An estimate of a training step from the model's shape alone: its memory, its time, what fits.

Memory: the base's weights, the adapters with AdamW's two moments, all tensors that the forward pass
keeps for the backward pass (`kept`), the temporary tensors of one block, and the program. Time:
matrix products at a rate in FLOP/s, elementwise work at a rate in bytes/s, unpacking of a quantised
base, and transfers between devices. docs/large.md derives both and compares them with measurements.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..core.adapter import adapters
from ..core.config import AdapterConfig
from ..fast import native
from ..fast.attention import SHORT, causal_attention
from ..fast.blocks import SwiGLU
from ..fast.quantize import AT_ONCE, Kind, quantize, quantize_model, whole
from ..model.attach import add_adapters
from ..model.config import LlamaConfig
from ..model.llama import Llama, RMSNorm
from ..support.errors import InputError

BASES: dict[str, tuple[torch.dtype, Kind | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, "int8"),
    "nf4": (torch.bfloat16, "nf4"),
}
PROGRAM = {"cpu": 0.30e9, "cuda": 0.6e9}  # Python and PyTorch; a CUDA context
CALLS = 250  # operations of a block, forward and backward
CALL = 6e-6  # seconds of one, however little it does


@dataclass(frozen=True)
class Workload:
    """A step on one device: `rows` rows at a time (`micro_batch`), each of `tokens` tokens.

    classes: rows of the head that are kept; None keeps all. Raises InputError for a size below 1,
    or for more tokens than the model has positions.
    """

    config: LlamaConfig
    rows: int = 8
    tokens: int = 128
    adapter: AdapterConfig = AdapterConfig()
    classes: int | None = 2

    def __post_init__(self) -> None:
        for name in ("rows", "tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.tokens > self.config.max_position_embeddings:
            raise InputError(
                f"{self.tokens} tokens, but the model has only "
                f"{self.config.max_position_embeddings} positions"
            )


class Rates(NamedTuple):
    """A device's speed. flop: FLOP/s of products with weights. attention: FLOP/s of attention.
    bytes: bytes/s read and written. unpack: seconds to unpack one value of a quantised weight.
    link: bytes/s received from other devices or from CPU memory."""

    flop: float
    attention: float
    bytes: float
    unpack: float = 0.0
    link: float = math.inf


class Work(NamedTuple):
    """The work of a step: FLOP, FLOP of attention, bytes, and values to unpack, as in `Rates`."""

    flop: float
    attention: float
    bytes: float
    unpacked: float


class Plan(NamedTuple):
    """A way to do a step on each of `devices` devices: its memory in bytes, its time in seconds.

    kind: one of `BASES`. checkpointing: blocks keep only their input and run forward twice.
    shards: devices over which FSDP spreads the base. offloaded: its parts stay in CPU memory.
    base: weights on the device. adapters: with AdamW's moments. activations: kept for the backward
    pass. workspace: temporary memory at its largest. peak: all of these and the program.
    """

    kind: str
    checkpointing: bool
    devices: int
    shards: int
    offloaded: bool
    base: float
    adapters: float
    activations: float
    workspace: float
    peak: float
    seconds: float


class SubspacePlan(NamedTuple):
    """The posterior over the scales of the base `kind`, whole on one device.

    scales: D. matrix: bytes of H. peak: bytes while it is fitted. seconds: of the forward pass and
    the C - 1 backward passes of `rows` questions. Fitting takes them for every training question,
    and predicting for every question.
    """

    kind: str
    scales: int
    matrix: float
    peak: float
    seconds: float


# --- Memory -----------------------------------------------------------------------------------


def kept(work: Workload, width: int, quantized: bool = False, device: str = "cpu") -> list[float]:
    """Bytes that the forward pass keeps for the backward pass: of each block, then of the head.

    width: bytes of a value of the base. Layers before the first adapter need no gradient and keep
    nothing. In the last block only keys and values have all tokens; the rest has one for each row.
    """
    c, rank, targets = work.config, work.adapter.rank, set(work.adapter.targets)
    d, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    N, B = work.rows * work.tokens, work.rows
    # RMSNorm keeps its input, and one over its root mean square. PyTorch's operations widen it.
    normed = width if device == "cpu" and native.core() else 4
    norm = normed * d + 4

    def adapted(names: tuple[str, ...], d_in: int, rows: dict[str, int], wide: int = width) -> int:
        """Inputs of layers that share an input, and A x; without the core, its products too."""
        own = [name for name in names if name in targets]
        if quantized and wide < 4:  # each casts its input
            inputs = sum(4 * rows[name] * d_in for name in own)
        else:
            inputs = wide * d_in * sum({rows[name] for name in own})
        return inputs + sum(4 * rank * rows[name] * (4 if quantized else 1) for name in own)

    total: list[float] = []
    live, dtype = False, torch.float32 if width == 4 else torch.bfloat16
    for i in range(c.num_hidden_layers):
        last = i == c.num_hidden_layers - 1
        M = B if last else N  # rows that go on
        short = device == "cpu" and not last and work.tokens <= SHORT[dtype]
        some = dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), M)
        some |= {"k_proj": N, "v_proj": N}
        size = N * norm if live else 0
        live = attends = live or bool(targets & {"q_proj", "k_proj", "v_proj"})
        if attends:
            size += adapted(("q_proj", "k_proj", "v_proj"), d, some)
            size += width * (M * q + 2 * N * kv)
            if not short:  # the kernel of PyTorch keeps its output, and a number for each query
                size += width * M * q + 4 * M * c.num_attention_heads
            if c.qk_norm:
                heads = M * c.num_attention_heads + N * c.num_key_value_heads
                size += heads * (normed * c.head_dim + 4)
        live = live or "o_proj" in targets
        given = attends and not short and not (quantized and width < 4)  # by that kernel
        size += adapted(("o_proj",), 0 if given else q, some)
        size += M * norm if live else 0
        live = live or bool(targets & {"gate_proj", "up_proj"})
        size += adapted(("gate_proj", "up_proj"), d, some)
        size += 2 * width * M * f if live else 0
        size += adapted(("down_proj",), f, some)
        live = live or "down_proj" in targets
        total.append(size)
    head = B * norm if live else 0
    head_width = 4 if work.classes else width
    return [*total, head + adapted(("lm_head",), d, {"lm_head": B}, head_width)]


@cache
def _sizes(work: Workload, base: str) -> tuple[float, float, float]:
    """Bytes of the base's blocks, of its ends, and of the adapters, by modules without memory."""
    dtype, kind = BASES[base]
    model = Llama(work.config, dtype=dtype, device="meta")
    if kind:
        quantize_model(model, kind)
    blocks = sum(p.nbytes for p in model.layers.parameters())
    ends = sum(p.nbytes for p in model.parameters()) - blocks
    if work.classes:
        ends -= 0 if model.tied else model.lm_head.weight.nbytes  # a few rows remain
        model.trim_head(list(range(work.classes)))
    add_adapters(model, work.adapter)
    own = adapters(model).values()
    return blocks, ends, 4.0 * sum(p.numel() for a in own for p in a.parameters())


def memory(
    work: Workload,
    base: str,
    checkpointing: bool = False,
    devices: int = 1,
    shards: int = 1,
    offloaded: bool = False,
    device: str = "cpu",
) -> Plan:
    """A step's memory, with 0 for its seconds; arguments as in `Plan`.

    When the base is spread, each device holds two whole blocks and both ends at a time.
    """
    dtype, kind = BASES[base]
    width, c = dtype.itemsize, work.config
    blocks, ends, trained = _sizes(work, base)
    stays = blocks + ends
    if shards > 1 or offloaded:
        whole = 2 * blocks / c.num_hidden_layers + ends
        stays = whole if offloaded else stays / shards + whole
    acts = kept(work, width, kind is not None, device)
    N, activations = work.rows * work.tokens, sum(acts)
    if checkpointing:
        activations = N * c.hidden_size * width * c.num_hidden_layers + max(acts)
    # SwiGLU's backward pass has four tensors of its size, beside three of the stream's.
    passing = float(N * width * (4 * c.intermediate_size + 3 * c.hidden_size))
    if kind:  # a weight, or on the CPU a part of it
        weight = c.intermediate_size * c.hidden_size
        passing += (min(AT_ONCE, weight) if device == "cpu" else weight) * width
    if not checkpointing:
        passing -= sum(acts[-2:])  # what the last block and the head kept is free by then
    # The optimiser needs the gradients and two temporary copies, but no activations. An exchange
    # needs them in float64, one by one and joined.
    workspace = max(passing, (5 if devices > 1 else 3) * trained - activations, 0.0)
    resident = PROGRAM[device] + stays + 3 * trained
    peak = resident + activations + workspace
    return Plan(
        base, checkpointing, devices, shards, offloaded,
        stays, 3 * trained, activations, workspace, peak, 0.0,
    )  # fmt: skip


# --- Time -------------------------------------------------------------------------------------


def work_of(work: Workload, base: str, checkpointing: bool = False) -> Work:
    """The work of a step.

    A token takes 2 FLOP for each weight forward and as many backward (the base is frozen), except
    for the first block's projections, whose input needs no gradient. Attention is causal; its
    gradient has five products where the forward pass has two. Every operation reads and writes
    memory.
    """
    dtype, kind = BASES[base]
    width, c = dtype.itemsize, work.config
    d, f, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    N, B = work.rows * work.tokens, work.rows
    inner, rest = 2 * d * kv, 2 * d * q + 3 * d * f  # weights of keys and values, and all others
    forward = 2 * ((layers - 1) * N * (inner + rest) + N * inner + B * rest)  # FLOP
    backward = forward - 2 * N * (inner + d * q)
    forwards = 2 if checkpointing else 1
    attention = 2 * work.tokens * N * q * (layers - 1)
    norm, swiglu = _value_bytes(width)
    forward_bytes = d * (2 * norm[0] + 6 * width) + (q + kv) * 10 * width + f * swiglu[0]
    backward_bytes = d * (2 * norm[1] + 15 * width) + (q + kv) * 12 * width + f * swiglu[1]
    sizes = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d),
             "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}  # fmt: skip
    shapes = [sizes[name] for name in work.adapter.targets if name in sizes]
    # Forward an adapter reads x and adds to y, backward it does the same with their gradients.
    adapter_bytes = sum(3 * d_in + 4 * d_out for d_in, d_out in shapes) * width
    moved = N * (layers - 1) * (forwards * forward_bytes + backward_bytes + adapter_bytes)
    unpacked = (1 + forwards) * layers * (inner + rest) if kind else 0.0
    return Work(forwards * forward + backward, (2.5 + forwards) * attention, moved, unpacked)


def _value_bytes(width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes read and written for each value of RMSNorm and of SwiGLU: (forward, backward) each."""
    cast = 0 if width == 4 else 2 * (4 + width)
    return (20 + 2 * width + cast, 40 + 2 * width + cast), (5 * width, 11 * width)


def exchanged(
    work: Workload, base: str, devices: int = 1, shards: int = 1, offloaded: bool = False
) -> tuple[float, float]:
    """Bytes that a device receives in a step, and that it reads and writes for that.

    A spread base is received twice, for the forward and the backward pass, and its ends once. Of
    each exchange over N devices, one N-th is there already. The adapters' gradients are summed in
    float64 in a ring: a device receives all but an N-th of them twice.
    """
    blocks, ends, trained = _sizes(work, base)
    gathered = 2 * blocks + ends if shards > 1 or offloaded else 0.0
    others = 1 - 1 / devices
    received = others * (gathered + 2 * 2 * trained)
    received += gathered / shards if offloaded else 0.0
    return received, 2 * gathered * (1 + 1 / shards)


def seconds(
    work: Workload,
    base: str,
    rates: Rates,
    checkpointing: bool = False,
    devices: int = 1,
    shards: int = 1,
    offloaded: bool = False,
) -> float:
    """A step's time if no two parts overlap."""
    took = _computing(work, base, rates, work_of(work, base, checkpointing), passes=2)
    received, copied = exchanged(work, base, devices, shards, offloaded)
    return took + copied / rates.bytes + received / rates.link


def _computing(work: Workload, base: str, rates: Rates, todo: Work, passes: int) -> float:
    """Seconds of the work of so many passes, forward or backward. Each reads the weights once."""
    weights = passes * _sizes(work, base)[0]  # bytes
    products = max(todo.flop / rates.flop, weights / rates.bytes) + todo.attention / rates.attention
    calls = CALL * CALLS * work.config.num_hidden_layers * passes / 2
    return products + todo.bytes / rates.bytes + todo.unpacked * rates.unpack + calls


def subspace(work: Workload, base: str, rates: Rates, device: str = "cpu") -> SubspacePlan:
    """The posterior over the scales: its memory and time, see `methods.subspace`.

    The memory of a training step is an upper bound of that of a pass, less the optimiser's: the
    weights need no gradient. A step with checkpointing has one forward pass more than one without.
    """
    c, adapter, classes = work.config, work.adapter, work.classes or work.config.vocab_size
    blocks = c.num_hidden_layers * len(set(adapter.targets) - {"lm_head"})
    scales = blocks * adapter.rank
    scales += min(adapter.rank, classes) if "lm_head" in adapter.targets else 0
    matrix = 8.0 * scales**2
    step = memory(work, base, device=device)
    jacobian = 8.0 * work.rows * classes * scales
    # The Jacobian has two copies; H, its eigenvectors and two copies in the decomposition.
    peak = step.peak - step.adapters * 2 / 3 + 3 * jacobian + 4 * matrix
    once, again = work_of(work, base), work_of(work, base, checkpointing=True)
    forward = Work(*(b - a for a, b in zip(once, again, strict=True)))
    todo = Work(*(f + (classes - 1) * (a - f) for f, a in zip(forward, once, strict=True)))
    return SubspacePlan(base, scales, matrix, peak, _computing(work, base, rates, todo, classes))


def plans(
    work: Workload, rates: dict[str, Rates], gpus: int = 1, device: str = "cuda"
) -> list[Plan]:
    """Every way to do a step: each base that has rates, with and without checkpointing, whole,
    spread over the GPUs, and, if the link's rate is known, offloaded."""
    devices = max(1, gpus)
    ways = []
    for (base, known), checkpointing in itertools.product(rates.items(), (False, True)):
        where = [(1, False), *([(devices, False)] if devices > 1 else [])]
        if math.isfinite(known.link) and device != "cpu":
            where.append((devices, True))
        for shards, offloaded in where:
            plan = memory(work, base, checkpointing, devices, shards, offloaded, device)
            took = seconds(work, base, known, checkpointing, devices, shards, offloaded)
            ways.append(plan._replace(seconds=took))
    return ways


def best(ways: list[Plan], room: float) -> Plan | None:
    """The fastest plan that fits into `room` bytes, in bfloat16 if one fits, else in int8, else in
    nf4, and else in the same order among those that offload the base."""
    for offloaded, base in itertools.product((False, True), ("bfloat16", "int8", "nf4")):
        same = [plan for plan in ways if (plan.offloaded, plan.kind) == (offloaded, base)]
        fitting = [plan for plan in same if plan.peak <= room]
        if fitting:
            return min(fitting, key=lambda plan: (plan.seconds, plan.shards))
    return None


def measured_rates(
    work: Workload,
    base: str,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """This device's rates, measured on the workload's sizes, cut so that it takes seconds."""

    def median_seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            started = clock()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            times.append(clock() - started)
        return sorted(times[1:])[2]  # the first run is a warm-up

    dtype, kind = BASES[base]
    c, N = work.config, min(work.rows * work.tokens, 512)
    d, f = min(c.hidden_size, 2048), min(c.intermediate_size, 4096)
    q, kv = (min(n * c.head_dim, d) for n in (c.num_attention_heads, c.num_key_value_heads))
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    flop = took = 0.0
    for d_in, d_out, count in ((d, q, 1), (d, kv, 2), (q, d, 1), (d, f, 2), (f, d, 1)):
        x, weight = torch.ones(N, d_in, **like), torch.ones(d_out, d_in, **like)
        y = F.linear(x, weight)
        each = (lambda: F.linear(x, weight), lambda: y @ weight)  # noqa: B023  # called here
        took += count * sum(map(median_seconds, each))
        flop += count * 4.0 * N * weight.numel()
    gate, up = (torch.ones(N, f, **like).requires_grad_() for _ in range(2))
    stream, norm = torch.ones(N, d, **like).requires_grad_(), RMSNorm(d, 1e-6, dtype, device)
    norm.requires_grad_(False)
    bytes_norm, bytes_swiglu = (N * sum(both) for both in _value_bytes(dtype.itemsize))
    grad = torch.autograd.grad
    moved = median_seconds(lambda: grad(SwiGLU.apply(gate, up), (gate, up), gate))
    moved += median_seconds(lambda: grad(norm(stream), stream, stream))
    B, T, heads = min(work.rows, 2), work.tokens, c.num_attention_heads
    of_each = (heads, c.num_key_value_heads, c.num_key_value_heads)
    qkv = [torch.ones(B, n, T, c.head_dim, **like).requires_grad_() for n in of_each]
    attention = 7.0 * B * T * T * heads * c.head_dim
    attention /= median_seconds(lambda: grad(causal_attention(*qkv), qkv, qkv[0]))
    unpack = 0.0
    if kind:
        codes, scale = quantize(weight, kind)
        unpack = (
            median_seconds(lambda: whole(codes, scale, weight.shape[1], dtype)) / weight.numel()
        )
    return Rates(flop / took, attention, (f * bytes_swiglu + d * bytes_norm) / moved, unpack)


def product_rate(
    device: str = "cpu", dtype: torch.dtype = torch.float32, threads: int | None = None
) -> float:
    """FLOP/s of a product of two square matrices on this device: the best of ten.

    The matrices have 1024 rows, or twice as many, at most 8192, until a product takes 10 ms. On a
    busy machine most products wait for a core, so the best one counts. On a CPU, it counts at most
    the time that cores worked on it, for each of `threads` (None: as many as PyTorch uses now).
    """

    def seconds(n: int) -> float:
        a = torch.ones(n, n, device=device, dtype=dtype)
        started, worked = time.perf_counter(), time.process_time()
        (a @ a)[0, 0].item()
        took, worked = time.perf_counter() - started, time.process_time() - worked
        return took if device != "cpu" else min(took, worked / torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        n = 1024
        while min(seconds(n) for _ in range(3)) < 0.01 and n < 8192:
            n *= 2
        return 2.0 * n**3 / min(seconds(n) for _ in range(10))
    finally:
        torch.set_num_threads(before)
