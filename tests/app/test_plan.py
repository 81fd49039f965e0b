"""Plans: what a pass keeps, tensor by tensor, and which bases fit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from scalabl_ref import AdapterConfig, InputError, Llama, LlamaConfig, Noise, add_adapters
from scalabl_ref.app.configs import CONFIGS
from scalabl_ref.app.plan import (
    BASES,
    PROGRAM,
    Plan,
    Rates,
    Workload,
    best,
    exchanged,
    kept,
    measured_rates,
    memory,
    plans,
    seconds,
    subspace,
    work_of,
)
from scalabl_ref.core.adapter import adapters
from scalabl_ref.core.config import TARGETS
from scalabl_ref.core.objective import Batch, class_logits
from scalabl_ref.fast.offload import KeptOnCpu
from scalabl_ref.fast.quantize import quantize_model
from scalabl_ref.methods import to_points
from scalabl_ref.methods.subspace import jacobians, layout

from ..models import fill

SHAPE = LlamaConfig(100, 64, 160, 4, 8, 4, 8)
ALL = tuple(TARGETS)


def prepared(work: Workload, base: str, padded: int = 0) -> tuple[Llama, Batch]:
    """The model, and rows of which one is `padded` tokens shorter, so that rows are packed."""
    dtype, kind = BASES[base]
    model = Llama(work.config, dtype=dtype).init_random_()
    if kind:
        quantize_model(model, kind)
    add_adapters(model.trim_head([1, 2]), work.adapter)
    lengths = torch.full((work.rows,), work.tokens)
    lengths[0] -= padded
    labels = torch.zeros(work.rows, dtype=torch.long)
    tokens = torch.ones(work.rows, work.tokens, dtype=torch.long)
    return model, Batch(tokens, lengths, labels, torch.arange(work.rows), torch.tensor([1, 2]))


def measured(work: Workload, base: str, padded: int = 0) -> float:
    """Bytes that a pass keeps, by the tensors it saves: each storage once, parameters left out."""
    model, batch = prepared(work, base, padded)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        class_logits(model, batch, Noise(0, 0))
    return sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in own)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "lm_head"), ("o_proj",), ALL])
@pytest.mark.parametrize("tokens", [64, 130])
@pytest.mark.parametrize("base", list(BASES))
def test_what_is_kept_is_what_the_model_says(base, tokens, targets):
    """To 2 %: masks, cosines, and scales are left out, a few vectors each. A short row has 64."""
    shape = dataclasses.replace(SHAPE, qk_norm=targets is ALL, qkv_bias=targets is ALL)
    work = Workload(shape, 4, tokens, AdapterConfig(rank=4, targets=targets))
    model = sum(kept(work, BASES[base][0].itemsize, BASES[base][1] is not None))
    assert model == pytest.approx(measured(work, base), rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_what_is_kept_can_wait_on_the_cpu(base, recompute):
    """All of it goes there, what `kept` counts or, computed again, blocks' inputs; no weight."""
    work = Workload(SHAPE, 4, 32, AdapterConfig(rank=4, targets=ALL))
    model, batch = prepared(work, base)
    model.recompute = recompute
    hooks, sizes, stayed = KeptOnCpu(torch.device("cpu")), [], []
    pack = hooks.pack_hook

    def copy(tensor):  # as to another device, where this CPU's would be the tensor itself
        sizes.append(tensor.nbytes)
        return tensor.device, tensor.clone()

    def note(tensor):
        packed = pack(tensor)
        if isinstance(packed, torch.Tensor):
            stayed.append(packed)
        return packed

    hooks.copy, hooks.pack_hook = copy, note
    parameters = [p for adapter in adapters(model).values() for p in adapter.parameters()]
    expected = torch.autograd.grad(class_logits(model, batch, Noise(0, 0)).sum(), parameters)
    with hooks:
        logits = class_logits(model, batch, Noise(0, 0))
    for ours, theirs in zip(torch.autograd.grad(logits.sum(), parameters), expected, strict=True):
        assert torch.equal(ours, theirs)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert stayed and {t.untyped_storage().data_ptr() for t in stayed} <= own
    width, rows = BASES[base][0].itemsize, work.rows * work.tokens
    size = sum(kept(work, width, base == "nf4"))
    if recompute:
        size = SHAPE.num_hidden_layers * rows * SHAPE.hidden_size * width
    assert sum(sizes) == pytest.approx(size, rel=0.05 if recompute else 0.02)


def test_packed_rows_keep_no_more():
    """Of 3 tokens of padding in 128: attention alone has them."""
    work = Workload(SHAPE, 4, 32, AdapterConfig(rank=4))
    assert measured(work, "float32", padded=3) <= measured(work, "float32")


def test_a_pass_keeps_less_of_what_needs_no_gradient():
    """The block below the first adapter's products keeps nothing, nor does one of nothing."""
    none = Workload(SHAPE, 4, 32, AdapterConfig(rank=4, targets=("lm_head",)))
    assert not any(kept(none, 4)[:-1]) and kept(none, 4)[-1] > 0
    work = Workload(SHAPE, 4, 32, AdapterConfig(rank=4))
    first, second, third, last, head = kept(work, 4)
    assert head < last < first < second == third


@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_the_sum_of_its_parts(tied):
    """The base's bytes by its parameters; sharding and checkpointing take away what they should."""
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    work = Workload(shape, 4, 32, AdapterConfig(rank=4))
    for base, (dtype, kind) in BASES.items():
        model = Llama(shape, dtype=dtype).init_random_()
        if kind:
            quantize_model(model, kind)
        model.trim_head([1, 2])
        plan = memory(work, base)
        own = sum(p.nbytes for p in model.parameters()) - model.lm_head.weight.nbytes
        assert plan.base == own
        parts = plan.base + plan.adapters + plan.activations + plan.workspace
        assert 0 < plan.peak - parts < 1e9  # the program
        assert memory(work, base, checkpointing=True).activations < plan.activations
        assert memory(work, base, shards=4).base < plan.base + 3 * shape.vocab_size * 64 * 4
        offloaded, spread = memory(work, base, offloaded=True), memory(work, base, shards=4)
        assert 4 * (spread.base - offloaded.base) == own
    sizes = [memory(work, base).base for base in BASES]
    assert sizes == sorted(sizes, reverse=True)


def test_the_parts_of_memory_are_counted_by_hand():
    """As docs/large.md lists them: rank 2 on q alone, of 4 blocks; the head's rows are cut off."""
    work = Workload(SHAPE, 4, 32, AdapterConfig(rank=2, targets=("q_proj",)))
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64  # q, o; k, v; MLP; norms
    ends = 100 * 64 + 64
    parts = 4 * (2 * block + ends)  # two whole blocks, the embedding and the last norm
    assert memory(work, "float32", shards=4).base == block * 4 + ends + parts
    for n in (1, 4):
        assert memory(work, "float32", devices=n, shards=n, offloaded=True).base == parts
    plan, again = memory(work, "float32"), memory(work, "float32", checkpointing=True)
    assert plan.adapters == 3 * 4 * 4 * 2 * (64 + 64 + 2)  # three float32 for each number
    acts = kept(work, 4)
    assert plan.activations == sum(acts)
    assert again.activations == 4 * 4 * 32 * 64 * 4 + max(acts)
    working = 4 * 32 * (4 * 160 + 3 * 64)  # SwiGLU's tensors and the residual stream's
    assert plan.workspace == 4 * working - sum(acts[-2:]) and again.workspace == 4 * working
    for device, program in (("cpu", 0.3e9), ("cuda", 0.6e9)):
        found = memory(work, "nf4", True, device=device)
        assert found.workspace == 2 * (working + 64 * 160)  # and a whole weight
        sizes = found.base, found.adapters, found.activations, found.workspace
        assert found.peak == program + sum(sizes)
    large = Workload(dataclasses.replace(SHAPE, intermediate_size=80_000), 1, 1, work.adapter)
    cpu, cuda = (memory(large, "nf4", True, device=device).workspace for device in PROGRAM)
    assert cuda - cpu == 2 * (80_000 * 64 - 2**22)  # a CPU unpacks 4 million values at a time


# Llama-2-7B on two GPUs. Recorded from this package, not derived. Columns: recomputed, shards,
# offloaded, peak GB, s per step.
LLAMA2_7B = {
    "bfloat16": [
        (False, 1, False, 17.709, 0.2774), (False, 2, False, 12.173, 0.8792),
        (False, 2, True, 5.566, 1.4025), (True, 1, False, 14.370, 0.3833),
        (True, 2, False, 8.834, 0.9852), (True, 2, True, 2.227, 1.5085),
    ],
    "nf4": [
        (False, 1, False, 9.073, 0.3421), (False, 2, False, 7.699, 0.5064),
        (False, 2, True, 5.847, 0.6493), (True, 1, False, 4.974, 0.4805),
        (True, 2, False, 3.600, 0.6448), (True, 2, True, 1.748, 0.7877),
    ],
}  # fmt: skip


def test_the_plans_of_a_large_model_are_as_they_were():
    work = Workload(CONFIGS["llama-2-7b"])
    assert work == Workload(work.config, 8, 128, AdapterConfig(), 2)
    rates = dict.fromkeys(LLAMA2_7B, Rates(150e12, 150e12, 1e12, 5e-12, 25e9))
    found: dict[str, list[tuple]] = {base: [] for base in rates}
    for p in plans(work, rates, gpus=2):
        figures = round(p.peak / 1e9, 3), round(p.seconds, 4)
        found[p.kind].append((p.checkpointing, p.shards, p.offloaded, *figures))
        assert p.devices == 2 or p.shards == 1
    assert found == LLAMA2_7B
    on_cpu = plans(work, rates, 0, "cpu")
    assert {(p.kind, p.devices, p.shards, p.offloaded) for p in on_cpu} == {
        ("bfloat16", 1, 1, False), ("nf4", 1, 1, False)}  # fmt: skip
    made = [subspace(work, base, known, "cuda") for base, known in rates.items()]
    assert [m.scales for m in made] == [64 * 8 + 2] * 2
    assert [m.peak for m in made] == pytest.approx([17683335680, 9048115712])
    assert [m.seconds for m in made] == pytest.approx([0.27600370761728, 0.34076376137728])


def test_the_best_plan_is_the_fastest_of_the_first_base_that_fits():
    def plan(kind: str, seconds: float, shards: int = 1, offloaded=False, again=False) -> Plan:
        room = {"float32": 40, "bfloat16": 20, "int8": 10, "nf4": 5}[kind] / shards - again
        size = 1 if offloaded else room
        return Plan(kind, again, shards, shards, offloaded, 0, 0, 0, 0, size, seconds)

    full, spread, again = (
        plan("float32", 1),
        plan("bfloat16", 3, 2),
        plan("bfloat16", 3, again=True),
    )
    eight, four, away = plan("int8", 2), plan("nf4", 1), plan("bfloat16", 1, 2, True)
    ways = [away, four, eight, spread, again, plan("bfloat16", 4), full]
    assert best(ways, 100) == again  # as fast as the spread one, on fewer devices
    assert best(ways, 19) == again and best(ways, 18) == spread
    assert best([w for w in ways if w != spread], 10) == eight  # 10 GB fit into 10
    assert best(ways, 5) == four and best(ways, 4) == away and best(ways, 0.5) is None
    assert best([full], 100) is None


def test_an_exchange_has_the_gradients_in_double_precision():
    """Twice their size for each of two copies, beside themselves: more than the optimiser has."""
    work = Workload(SHAPE, 1, 1, AdapterConfig(rank=8, targets=ALL))
    alone, shared = memory(work, "float32"), memory(work, "float32", devices=2)
    assert alone.workspace + alone.activations == alone.adapters  # gradients and two copies
    assert shared.workspace - alone.workspace == pytest.approx(2 / 3 * alone.adapters)


def test_flop_are_counted_by_hand():
    """Of a model whose products can be written down: two blocks, one token of one row each way."""
    shape = LlamaConfig(10, 4, 6, 2, 2, 1, 2)
    work = Workload(shape, 1, 1, AdapterConfig(rank=1))
    q, kv, o, mlp = 4 * 4, 2 * 4 * 2, 4 * 4, 3 * 4 * 6
    forward = 2 * 2 * (q + kv + o + mlp)
    backward = forward - 2 * (q + kv)  # the embedding needs no gradient
    attention = 2 * 1 * 4 * (1 + 2.5)  # of the first block; one query's is nothing
    once = work_of(work, "float32")
    assert once[:2] == (forward + backward, attention) and once.unpacked == 0
    assert work_of(work, "nf4").unpacked == 2 * 2 * (q + kv + o + mlp)
    again = work_of(work, "float32", checkpointing=True)
    assert again.flop == once.flop + forward and again.bytes > once.bytes
    assert again.attention == attention + 2 * 1 * 4


def test_the_subspace_posterior_is_counted_by_hand():
    """For three classes one pass forward and two backward; q, v and the head have a scale each."""
    shape = LlamaConfig(10, 4, 6, 2, 2, 1, 2)
    work = Workload(shape, 1, 1, AdapterConfig(rank=1), classes=3)
    q, kv, o, mlp = 4 * 4, 2 * 4 * 2, 4 * 4, 3 * 4 * 6
    forward = 2 * 2 * (q + kv + o + mlp)
    backward = forward - 2 * (q + kv)
    slow = Rates(2.0, math.inf, math.inf)
    made = subspace(work, "float32", slow)
    calls = 3 / 2 * (seconds(work, "float32", Rates(math.inf, math.inf, math.inf)))
    assert made.seconds == pytest.approx((forward + 2 * backward) / 2 + calls)
    assert made.scales == 2 * 2 + 1 and made.matrix == 8 * 25
    wide = Workload(shape, 2, 1, AdapterConfig(rank=2, targets=ALL), classes=3)
    model = Llama(shape).init_random_().trim_head([1, 2, 3])
    add_adapters(model, wide.adapter)
    fill(model)
    to_points(model)
    assert subspace(wide, "float32", slow).scales == len(layout(model)[1])


def test_the_subspace_posteriors_memory_covers_a_pass():
    """The plan is no less than the weights and the tensors that the pass keeps, nor twice that."""
    work = Workload(SHAPE, 4, 32, AdapterConfig(rank=4, targets=ALL))
    model, batch = prepared(work, "float32")
    fill(model)
    to_points(model)
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    own = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        jacobians(model, batch)
    used = sum(own.values())
    used += sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in own)
    planned = subspace(work, "float32", Rates(1, 1, 1)).peak - PROGRAM["cpu"]
    assert used <= planned <= 2 * used


def test_exchanges_are_counted_by_hand():
    """Gradients go round in float64; a spread base comes in twice, and its ends once."""
    shape = LlamaConfig(10, 4, 6, 2, 2, 1, 2)
    work = Workload(shape, 1, 1, AdapterConfig(rank=1))
    blocks = 2 * 4 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6 + 2 * 4)
    ends = memory(work, "float32").base - blocks
    q, v, head = (d_in + d_out + 2 for d_in, d_out in ((4, 4), (4, 2), (4, 2)))
    ring = 2 * 8 * (2 * q + 2 * v + head)
    base = 2 * blocks + ends
    assert exchanged(work, "float32") == (0, 0)
    assert exchanged(work, "float32", devices=4) == (0.75 * ring, 0)
    assert exchanged(work, "float32", 4, 4) == (0.75 * (base + ring), 2.5 * base)
    assert exchanged(work, "float32", offloaded=True) == (base, 4 * base)
    offloaded = 0.75 * (base + ring) + base / 4
    assert exchanged(work, "float32", 4, 4, True) == (offloaded, 2.5 * base)
    slow = Rates(math.inf, math.inf, math.inf, link=2.0)
    free = seconds(work, "float32", slow)
    assert seconds(work, "float32", slow, devices=4) == free + 0.75 * ring / 2
    narrow = Rates(math.inf, math.inf, 2.0)  # the base is read twice, whatever its products take
    read = 2 * blocks + work_of(work, "float32").bytes
    assert seconds(work, "float32", narrow) == pytest.approx(free + read / 2)


def test_time_follows_the_rates():
    work = Workload(SHAPE, 4, 32)
    fast = Rates(1e10, 1e10, 1e9, 1e-9)
    for slow in (fast._replace(flop=1e9), fast._replace(attention=1e9), fast._replace(bytes=1e8)):
        assert seconds(work, "float32", slow) > seconds(work, "float32", fast)
    measured = measured_rates(Workload(SHAPE, 2, 8), "nf4")
    assert all(0 < rate < math.inf for rate in measured[:4]) and measured.link == math.inf
    assert seconds(work, "nf4", fast) > seconds(work, "nf4", fast._replace(unpack=0.0))


def test_rates_are_medians_after_a_warm_up():
    """Of five runs that take 1, 1, 3, 9 and 9 s; the first, of half a second, does not count."""
    shape, now, runs = LlamaConfig(10, 4, 6, 2, 2, 1, 2), [0.0], [0.5, 9, 1, 3, 1, 9]
    calls: list[float] = []

    def clock() -> float:
        if len(calls) % 2:
            now[0] += runs[len(calls) // 2 % 6]
        calls.append(now[0])
        return now[0]

    found = measured_rates(Workload(shape, 2, 3), "nf4", clock=clock)
    products = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6  # q; k, v; o; MLP
    # Seven products and their gradients; attention's two products and their five gradients.
    assert found.flop == 4 * 6 * products / (7 * 2 * 3)
    assert found.attention == 7 * 2 * 3 * 3 * 4 / 3
    assert found.bytes == 6 * (4 * 92 + 6 * 32) / (2 * 3)  # 92 a value of RMSNorm, 32 of SwiGLU
    assert found.unpack == pytest.approx(3 / 24)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"tokens": 11}, "11 tokens, but the model has only 10 positions"),
    ],
)
def test_a_workload_has_rows_and_tokens_that_fit(sizes, message):
    shape = dataclasses.replace(SHAPE, max_position_embeddings=10)
    with pytest.raises(InputError, match=message):
        Workload(shape, **{"tokens": 10, **sizes})
    assert Workload(shape, 1, 10).tokens == 10
