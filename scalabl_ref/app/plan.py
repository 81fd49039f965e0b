"""What a training step will take, from the model's shape alone: memory, time, and what fits.

The memory of a step is that of the base's weights, of the adapters with AdamW's two moments, of
what the forward pass keeps for the backward one (`kept`, tensor by tensor), of what one block
needs on the way, and of the program. Its time is that of its products at a rate of FLOP/s, of what
is done value by value at a rate of bytes/s, of unpacking a quantised base, and of what devices
exchange. docs/large.md has both models, and their predictions beside measurements.
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
from torch import Tensor

from ..core.adapter import adapters
from ..core.config import AdapterConfig
from ..fast.quantize import Kind, quantize, quantize_model, whole
from ..fast.rows import SwiGLU
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
    """A step on one device: so many rows at a time (`micro_batch`), all of `tokens` tokens.

    classes: rows that the head is cut down to; None leaves it whole. Raises InputError for a size
    below 1, or more tokens than the model has positions.
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
    """What a device does in a second: FLOP of products with weights and of attention's, bytes read
    and written; the seconds to make a quantised weight whole, for each of its values; and the bytes
    it receives in a second from the others, or from the CPU's memory."""

    flop: float
    attention: float
    bytes: float
    unpack: float = 0.0
    link: float = math.inf


class Work(NamedTuple):
    """What a step has to do: FLOP, FLOP, bytes and values, as in `Rates`."""

    flop: float
    attention: float
    bytes: float
    unpacked: float


class Plan(NamedTuple):
    """A way to do a step on each of so many devices, its memory in bytes, its time in seconds.

    kind: one of `BASES`. checkpointing: whether blocks keep their input alone and run forward once
    more. shards: devices over which FSDP spreads the base. offloaded: whether what it spreads stays
    in the CPU's memory. base: weights that stay on the device. adapters: with AdamW's moments.
    activations: kept for the backward pass. workspace: of the moment when most is needed. peak:
    all, the program included.
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


# --- Memory -----------------------------------------------------------------------------------


def kept(work: Workload, width: int, quantized: bool = False) -> list[float]:
    """Bytes that the forward pass keeps for the backward one: of each block, then of the head.

    width: bytes of a value of the base. What needs no gradient keeps nothing, which is all before
    the first adapter; of the last block, all but keys and values is of the answer's tokens alone.
    """
    c, rank, targets = work.config, work.adapter.rank, set(work.adapter.targets)
    d, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    N, B = work.rows * work.tokens, work.rows
    norm = 4 * (d + 1)  # RMSNorm's input as float32, and one over its root mean square

    def adapted(names: tuple[str, ...], d_in: int, rows: dict[str, int], wide: int = width) -> int:
        """Inputs of layers that share theirs, and A x; without the core also its products."""
        own = [name for name in names if name in targets]
        if quantized and wide < 4:  # each casts its input
            inputs = sum(4 * rows[name] * d_in for name in own)
        else:
            inputs = wide * d_in * sum({rows[name] for name in own})
        return inputs + sum(4 * rank * rows[name] * (3 if quantized else 1) for name in own)

    total: list[float] = []
    live = False
    for i in range(c.num_hidden_layers):
        M = B if i == c.num_hidden_layers - 1 else N  # rows that go on
        some = dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), M)
        some |= {"k_proj": N, "v_proj": N}
        size = N * norm if live else 0
        live = attends = live or bool(targets & {"q_proj", "k_proj", "v_proj"})
        if attends:
            size += adapted(("q_proj", "k_proj", "v_proj"), d, some)
            size += 2 * width * (M * q + N * kv) + 4 * M * c.num_attention_heads
            if c.qk_norm:
                heads = M * c.num_attention_heads + N * c.num_key_value_heads
                size += 4 * heads * (c.head_dim + 1)
        live = live or "o_proj" in targets
        given = attends and not (quantized and width < 4)  # by attention, which has counted it
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
        ends -= 0 if model.tied else model.lm_head.weight.nbytes  # but for a few rows
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
    """A step's memory, its seconds left 0; arguments as in `Plan`.

    Of a base that is spread, two blocks and both ends are whole on each device at the same time.
    """
    dtype, kind = BASES[base]
    width, c = dtype.itemsize, work.config
    blocks, ends, trained = _sizes(work, base)
    stays = blocks + ends
    if shards > 1 or offloaded:
        whole = 2 * blocks / c.num_hidden_layers + ends
        stays = whole if offloaded else stays / shards + whole
    acts = kept(work, width, kind is not None)
    N, activations = work.rows * work.tokens, sum(acts)
    if checkpointing:
        activations = N * c.hidden_size * width * c.num_hidden_layers + max(acts)
    # SwiGLU's backward pass has four tensors of its size, beside three of the stream's.
    passing = float(N * width * (4 * c.intermediate_size + 3 * c.hidden_size))
    if kind:
        passing += c.intermediate_size * c.hidden_size * width
    if not checkpointing:
        passing -= sum(acts[-2:])  # what the last block and the head kept is free by then
    # The optimiser has gradients, and two more of their size on the way, but no activations; an
    # exchange has them in float64, each by itself and end to end.
    workspace = max(passing, (5 if devices > 1 else 3) * trained - activations, 0.0)
    resident = PROGRAM[device] + stays + 3 * trained
    peak = resident + activations + workspace
    return Plan(
        base, checkpointing, devices, shards, offloaded,
        stays, 3 * trained, activations, workspace, peak, 0.0,
    )  # fmt: skip


# --- Time -------------------------------------------------------------------------------------


def work_of(work: Workload, base: str, checkpointing: bool = False) -> Work:
    """What a step has to do.

    A token takes 2 FLOP for each weight forward, and as many backward, where the base is frozen
    and the first block's input needs no gradient. Attention is causal; its gradient has five
    products for two. Bytes are counted operation by operation, each reading and writing memory.
    """
    dtype, kind = BASES[base]
    width, c = dtype.itemsize, work.config
    d, f, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    N, B = work.rows * work.tokens, work.rows
    inner, rest = 2 * d * kv, 2 * d * q + 3 * d * f  # weights: of keys and values; of what follows
    once = 2 * ((layers - 1) * N * (inner + rest) + N * inner + B * rest)
    back = once - 2 * N * (inner + d * q)
    attention = 2 * work.tokens * N * q * (layers - 1)
    again = 1 if checkpointing else 0
    flop = (1 + again) * once + back
    norm, swiglu = _passed(width)
    there = d * (2 * norm[0] + 6 * width) + (q + kv) * 10 * width + f * swiglu[0]
    back_again = d * (2 * norm[1] + 15 * width) + (q + kv) * 12 * width + f * swiglu[1]
    sizes = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d),
             "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}  # fmt: skip
    shapes = [sizes[name] for name in work.adapter.targets if name in sizes]
    update = sum(3 * d_in + 4 * d_out for d_in, d_out in shapes) * width  # read x, add to y; back
    passed = N * (layers - 1) * ((1 + again) * there + back_again + update)
    unpacked = (2 + again) * layers * (inner + rest) if kind else 0.0
    return Work(flop, (3.5 + again) * attention, passed, unpacked)


def _passed(width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes read and written for a value of RMSNorm's and of SwiGLU's: forward, and backward."""
    cast = 0 if width == 4 else 2 * (4 + width)
    return (20 + 2 * width + cast, 40 + 2 * width + cast), (5 * width, 11 * width)


def exchanged(
    work: Workload, base: str, devices: int = 1, shards: int = 1, offloaded: bool = False
) -> tuple[float, float]:
    """Bytes that a device receives in a step, and that it reads and writes to do so.

    A spread base comes in for the forward pass and for the backward one, its ends once; of an
    exchange over N devices a N-th is there already. The gradients of the adapters are added up in
    float64, in a ring: each device sends and receives them twice, but for a N-th.
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
    """A step's time, of which nothing is done at the same time. Weights are read once a pass."""
    todo = work_of(work, base, checkpointing)
    once = 2 * _sizes(work, base)[0]  # bytes
    products = max(todo.flop / rates.flop, once / rates.bytes) + todo.attention / rates.attention
    calls = CALL * CALLS * work.config.num_hidden_layers
    received, copied = exchanged(work, base, devices, shards, offloaded)
    passed = (todo.bytes + copied) / rates.bytes + received / rates.link
    return products + passed + todo.unpacked * rates.unpack + calls


def plans(
    work: Workload, rates: dict[str, Rates], gpus: int = 1, device: str = "cuda"
) -> list[Plan]:
    """Every way to do a step: the bases that have rates, checkpointing or not, the base whole,
    spread, and offloaded, where the rate is known at which it would come back."""
    devices = max(1, gpus)
    ways = []
    for (base, known), again in itertools.product(rates.items(), (False, True)):
        where = [(1, False), *([(devices, False)] if devices > 1 else [])]
        if math.isfinite(known.link) and device != "cpu":
            where.append((devices, True))
        for shards, offloaded in where:
            plan = memory(work, base, again, devices, shards, offloaded, device)
            took = seconds(work, base, known, again, devices, shards, offloaded)
            ways.append(plan._replace(seconds=took))
    return ways


def best(ways: list[Plan], room: float) -> Plan | None:
    """The fastest that fits into `room` bytes, of bfloat16; where none does of int8, then nf4; and
    where none does either, in the same order, of those whose base is offloaded."""
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
    """Of this device, on the workload's sizes as far as those take no more than seconds."""

    def median_seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            started = clock()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            times.append(clock() - started)
        return sorted(times[1:])[2]  # the first gets things ready

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
    bytes_norm, bytes_swiglu = (N * sum(both) for both in _passed(dtype.itemsize))
    grad = torch.autograd.grad
    moved = median_seconds(lambda: grad(SwiGLU.apply(gate, up), (gate, up), gate))
    moved += median_seconds(lambda: grad(norm(stream), stream, stream))
    B, T, heads = min(work.rows, 2), work.tokens, c.num_attention_heads
    asked, keys, values = (
        torch.ones(B, n, T, c.head_dim, **like).requires_grad_()
        for n in (heads, c.num_key_value_heads, c.num_key_value_heads)
    )

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(
            asked, keys, values, is_causal=True, enable_gqa=True
        )  # fmt: skip

    attention = 7.0 * B * T * T * heads * c.head_dim
    attention /= median_seconds(lambda: grad(attend(), (asked, keys, values), asked))
    unpack = 0.0
    if kind:
        codes, scale = quantize(weight, kind)
        unpack = (
            median_seconds(lambda: whole(codes, scale, weight.shape[1], dtype)) / weight.numel()
        )
    return Rates(flop / took, attention, (f * bytes_swiglu + d * bytes_norm) / moved, unpack)


def product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a plain product of two square matrices on this device: the median of five.

    Of matrices as large as take 10 ms to multiply, up to 8192 rows.
    """

    def seconds(n: int) -> float:
        a = torch.ones(n, n, device=device, dtype=dtype)
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        return time.perf_counter() - started

    n = 128
    while max(seconds(n), seconds(n)) < 0.01 and n < 8192:
        n *= 2
    return 2.0 * n**3 / sorted(seconds(n) for _ in range(5))[2]
