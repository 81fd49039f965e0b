"""Noise: the three bodies against each other, known answers, exact mathematics and chance."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections import Counter
from decimal import Decimal
from functools import lru_cache, partial
from statistics import NormalDist

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from scalabl_ref import InputError, Noise, fast, native_status, philox4x32
from scalabl_ref.core import noise, philox
from scalabl_ref.core.adapter import SubspaceAdapter
from scalabl_ref.data import Encoded, batches, evaluation_batches, split
from scalabl_ref.evaluation.predict import predict_all
from scalabl_ref.fast import normals, ops
from scalabl_ref.fast.designs import Design, DesignedNoise
from scalabl_ref.fast.native import core
from scalabl_ref.model import attach
from scalabl_ref.model.inputs import Inputs
from scalabl_ref.training.trainer import TrainConfig, Trainer
from scalabl_ref.verify import reference
from scalabl_ref.verify.known_answers import box_muller_answers, philox_answers

from ..conftest import ROOT
from ..exact import exact_normals
from ..models import CLASSES, tiny_model
from ..stats import ChiSquare, KSTest, ZTest
from ..tolerances import normal_double, normal_ulps, rounding

WORDS = st.integers(0, 2**32 - 1)
SEEDS = st.integers(0, 2**64 - 1)
LAYERS = st.integers(0, 2**32 - 2)


@pytest.fixture
def native():
    """The native core, or a skip that says why it is not used."""
    if core() is None:
        pytest.skip(f"native core: {native_status()['reason']}")
    return core()


def native_normals(native, seed, draw, layer, groups, rank, draws=None):
    out = torch.empty(len(groups), rank)
    lists = groups.data_ptr(), 0 if draws is None else draws.data_ptr(), len(groups)
    native.normals(seed, draw, layer, *lists, rank, out.data_ptr())
    return out


def vectorised(seed, draw, layer, groups, rank, draws=None):
    return normals.vectorised_normals(Noise(seed, draw), layer, groups, draws, rank)


def bits(z: torch.Tensor) -> list:
    """Bit patterns, so that -0.0 is not 0.0."""
    return z.view(torch.int32 if z.dtype == torch.float32 else torch.int64).tolist()


# --- known answers -------------------------------------------------------------------------------


def bodies():
    """The definition in Python, and the native core if there is one."""
    return [body for body in (philox, core()) if body is not None]


def test_philox_known_answers():
    assert len(philox_answers()) == 6
    for answer in philox_answers():
        for body in [*bodies(), reference]:
            words = body.philox4x32(answer.counter, answer.key, answer.rounds)
            assert tuple(words) == answer.words, body


def test_box_muller_known_answers():
    """To the last bit, which a fused multiply-add changes in three of them."""
    assert len(box_muller_answers()) == 7
    for words, answer in box_muller_answers():
        for body in bodies():
            assert tuple(body.box_muller(*words)) == answer, body


def test_the_porting_guide_prints_the_known_answers():
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (7|10) \| ([0-9a-f ]+) \| ([0-9a-f ]+) \| ([0-9a-f ]+) \|$", text, re.M)
    printed = [(int(rounds), *(tuple(int(word, 16) for word in cell.split()) for cell in cells))
               for rounds, *cells in rows]  # fmt: skip
    assert printed == philox_answers()
    doubles = re.findall(r"^\| \d+ \| ([0-9a-f]{8}) \| (\S+) \| [0-9a-f]{8} \|$", text, re.M)
    words, normals = zip(*((int(w, 16), float.fromhex(z)) for w, z in doubles), strict=True)
    pairs = [(words[i : i + 2], normals[i : i + 2]) for i in range(0, 8, 2)]
    assert pairs == box_muller_answers()[:4]


def test_worked_example_of_the_porting_guide():
    """docs/conformance.md prints words and normals: they are what the code gives."""
    text = (ROOT / "docs" / "conformance.md").read_text()
    seed, draw, layer, group = (
        int(value) for value in re.search(r"seed (\d+), draw (\d+), layer (\d+), group (\d+)", text)
        .groups()
    )  # fmt: skip
    rows = re.findall(r"^\| (\d+) \| ([0-9a-f]{8}) \| (\S+) \| ([0-9a-f]{8}) \|$", text, re.M)
    assert [int(k) for k, *_ in rows] == list(range(8))
    z = Noise(seed, draw).normal(layer, torch.tensor([group]), 8)[0]
    for k, word, double, single in rows:
        k = int(k)
        words = philox4x32((k // 4, group, layer, draw), (seed % 2**32, seed // 2**32))
        assert words[k % 4] == int(word, 16)
        assert philox.box_muller(*words[k % 4 // 2 * 2 :][:2])[k % 2] == float.fromhex(double)
        assert struct.pack(">f", z[k]).hex() == single


# --- the bodies agree bit for bit ----------------------------------------------------------


GROUPS = st.tuples(WORDS, st.integers(0, 3), st.integers(1, 3))  # group, draws later, repeats


@given(SEEDS, st.integers(0, 2**32 - 4), LAYERS, st.lists(GROUPS, max_size=5), st.integers(1, 19))
def test_three_bodies_agree(seed, draw, layer, groups, rank):
    rows = [(group, i) for group, i, repeats in groups for _ in range(repeats)]
    ids, draws = torch.tensor(rows, dtype=torch.int64).view(-1, 2).T.contiguous()
    scalar = [philox.normal_row(seed, draw + i, layer, g, rank) for g, i in rows]
    expected = bits(torch.tensor(scalar, dtype=torch.float32).reshape(len(rows), rank))
    assert bits(vectorised(seed, draw, layer, ids, rank, draws)) == expected
    assert bits(Noise(seed, draw).normal(layer, ids, rank, draws)) == expected
    with fast.plain():
        assert bits(Noise(seed, draw).normal(layer, ids, rank, draws)) == expected
    if core() is not None:
        assert bits(native_normals(core(), seed, draw, layer, ids, rank, draws)) == expected


def test_many_normals_agree(native):
    """200,000 at once, so that whatever differs in one case of thousands shows."""
    ids = torch.arange(25_000)
    assert torch.equal(native_normals(native, 3, 1, 4, ids, 8), vectorised(3, 1, 4, ids, 8))


def test_doubles_agree_before_rounding():
    """Rounding to float32 hides almost every difference of a last bit: compare the doubles."""
    words = noise.philox_words(seed=11, stream=0, n=40_000).reshape(2, -1)
    doubles = torch.stack(normals.box_muller(words[0], words[1]), dim=1)
    scalar = [philox.box_muller(a, b) for a, b in words.T.tolist()]
    assert bits(doubles) == bits(torch.tensor(scalar, dtype=torch.float64))


def test_doubles_agree_before_rounding_native(native):
    """Sees a fused multiply-add, which the float32 normals show once in 2^28."""
    for a, b in noise.philox_words(seed=12, stream=0, n=10_000).reshape(-1, 2).tolist():
        assert tuple(native.box_muller(a, b)) == philox.box_muller(a, b)


@given(SEEDS, SEEDS, st.integers(0, 13))
def test_philox_words_are_blocks_of_the_reserved_layer(seed, stream, n):
    key = (seed % 2**32, seed // 2**32)
    counters = [(j, stream % 2**32, 2**32 - 1, stream // 2**32) for j in range(4)]
    expected = [word for counter in counters for word in philox4x32(counter, key)]
    assert noise.philox_words(seed, stream, n).tolist() == expected[:n]
    with fast.plain():
        assert noise.philox_words(seed, stream, n).tolist() == expected[:n]


# --- a pure function of its coordinates ----------------------------------------------------------


@given(SEEDS, WORDS, LAYERS, st.integers(0, 9), st.integers(1, 9), st.data())
def test_rows_follow_the_group_id(seed, draw, layer, G, rank, data):
    """Not the place in the list, the length of the list, the rank asked for, or the strides."""
    whole = Noise(seed, draw).normal(layer, G, rank)
    assert whole.shape == (G, rank) and whole.dtype == torch.float32
    order = data.draw(st.lists(st.integers(0, max(G - 1, 0)), max_size=9 if G else 0))
    ids = torch.tensor(order, dtype=torch.int64)
    strided = torch.stack([ids, ids + 1], dim=1)[:, 0]
    for explicit in (ids, strided, ids.int()):
        assert torch.equal(Noise(seed, draw).normal(layer, explicit, rank), whole[ids])
    assert torch.equal(Noise(seed, draw).normal(layer, G, rank + 5)[:, :rank], whole)


@given(SEEDS, WORDS, LAYERS, WORDS, st.integers(0, 4), st.integers(0, 63))
def test_every_bit_of_every_coordinate_counts(seed, draw, layer, group, which, bit):
    """Flipping one bit of one coordinate changes all four normals of a block."""
    here = [seed, draw, layer, group, 0]
    there = list(here)
    there[which] ^= 1 << (bit if which == 0 else bit % 32)
    if there[2] == 2**32 - 1:  # reserved
        return
    rows = [philox.normal_block(*at) for at in (here, there)]
    assert all(a != b for a, b in zip(*rows, strict=True))


def test_noise_ignores_and_leaves_alone_the_global_state():
    expected = Noise(1, 2).normal(3, 4, 5)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = Noise(1, 2).normal(3, 4, 5)
            slow = vectorised(1, 2, 3, torch.arange(4, device="cpu"), 5)
            words = noise.philox_words(1, 2, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, expected) and torch.equal(slow, expected)
    assert words.tolist() == noise.philox_words(1, 2, 3).tolist()
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_immutable_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Noise(1, 2).seed = 3
    assert Noise(1, 2) == Noise(1, 2) and hash(Noise(1, 2)) == hash(Noise(1, 2))
    assert Noise(1, 2) != Noise(2, 1)


# --- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda: Noise(-1, 0), "seed must be in"),
        (lambda: Noise(2**64, 0), "seed must be in"),
        (lambda: Noise(1.5, 0), "seed must be an integer"),
        (lambda: Noise(0, 2**32), "draw must be in"),
        (lambda: Noise(0, 0).normal(2**32 - 1, 1, 1), "layer must be in"),
        (lambda: Noise(0, 0).normal(-1, 1, 1), "layer must be in"),
        (lambda: Noise(0, 0).normal(0, -1, 1), "groups must be in"),
        (lambda: Noise(0, 0).normal(0, 1, 0), "rank must be in"),
        (lambda: Noise(0, 0).normal(0, torch.tensor([0, -1]), 1), "group id must be in"),
        (lambda: Noise(0, 2**32 - 1).normal(0, torch.tensor([0, 2**32]), 1), "group id must be in"),
        (
            lambda: Noise(0, 1).normal(0, torch.tensor([7]), 1, torch.tensor([2**32 - 1])),
            "draw must be",
        ),
        (
            lambda: Noise(0, 0).normal(0, torch.tensor([7]), 1, torch.tensor([-1])),
            "draw must be in",
        ),
        (
            lambda: Noise(0, 0).normal(0, 2, 1, torch.tensor([1])),
            "draws must have 2 entries, one for each group, not 1",
        ),
        (lambda: Noise(0, 0).normal(0, torch.zeros(2), 1), "1-D integer tensor"),
        (lambda: Noise(0, 0).normal(0, torch.zeros(2, 2).long(), 1), "1-D integer tensor"),
        (lambda: philox4x32((0, 0, 0), (0, 0)), "counter must have 4 words"),
        (lambda: philox4x32((0, 0, 0, 2**32), (0, 0)), "counter word must be in"),
        (lambda: philox4x32((0, 0, 0, 0), (0, -1)), "key word must be in"),
        (lambda: philox4x32((0, 0, 0, 0), (0, 0), 0), "rounds must be in"),
        (lambda: noise.philox_words(0, 0, -1), "n must be in"),
    ],
)
def test_bad_arguments(call, complaint):
    with pytest.raises(InputError, match=complaint):
        call()


LARGEST = 2**32, 2**34, 2**64  # words, components, seeds


@pytest.mark.parametrize("body", ["native", "PyTorch"])
@pytest.mark.parametrize(
    "call, name, low, high, wrong",
    [
        (lambda n: Noise(n, 0), "seed", 0, LARGEST[2], (-1, LARGEST[2])),
        (lambda n: Noise(0, n), "draw", 0, LARGEST[0], (-1, LARGEST[0])),
        (lambda n: Noise(0, 0).normal(n, 1, 1), "layer", 0, LARGEST[0] - 1, (-1, LARGEST[0] - 1)),
        (lambda n: Noise(0, 0).normal(0, 0, n), "rank", 1, LARGEST[1] + 1, (0, LARGEST[1] + 1)),
        (lambda n: Noise(0, 0).normal(0, n, 1), "groups", 0, LARGEST[0] + 1, (-1, LARGEST[0] + 1)),
        (lambda n: Noise(0, 2**32 - 1).normal(0, torch.tensor([1, n]), 1),
         "group id", 0, LARGEST[0], (-1, LARGEST[0])),
        (lambda n: noise.philox_words(n, 0, 1), "seed", 0, LARGEST[2], (-1, LARGEST[2])),
        (lambda n: noise.philox_words(0, n, 1), "stream", 0, LARGEST[2], (-1, LARGEST[2])),
        (lambda n: noise.philox_words(0, 0, n), "n", 0, LARGEST[1] + 1, (-1, LARGEST[1] + 1)),
        (lambda n: philox4x32((0,) * 4, (0,) * 2, n), "rounds", 1, 17, (0, 17)),
        (lambda n: philox4x32((n, 0, 0, 0), (0,) * 2), "counter word", 0, LARGEST[0], (-1, 2**32)),
        (lambda n: philox4x32((0,) * 4, (0, n)), "key word", 0, LARGEST[0], (-1, LARGEST[0])),
    ],
)  # fmt: skip
def test_every_range_is_checked_and_stated(call, name, low, high, wrong, body, monkeypatch):
    """What is refused says what would do; the ends themselves do, where they are no trouble."""
    if body == "PyTorch":
        monkeypatch.setattr("scalabl_ref.fast.native.core", lambda: None)
    for n in wrong:
        with pytest.raises(InputError) as error:
            call(n)
        assert str(error.value) == f"{name} must be in [{low}, {high}), not {n}"
    if name not in ("groups", "rank", "n"):
        call(high - 1)
    call(low)


def test_the_version_and_the_series_are_the_documented_ones():
    text = (ROOT / "docs" / "conformance.md").read_text()
    assert f"## Noise, version {noise.NOISE_VERSION}\n" in text
    degrees = [int(re.search(rf"p = {name}\[(\d+)\]", text)[1]) for name in "LSC"]
    assert degrees == [len(c) - 1 for c in (philox.ATANH, philox.SIN, philox.COS)]


def test_native_core_checks_for_itself(native):
    ids = torch.tensor([-1])
    with pytest.raises(ValueError, match="group id must be in"):
        native_normals(native, 0, 0, 0, ids, 1)
    with pytest.raises(ValueError, match="rounds must be in"):
        native.philox4x32([0] * 4, [0] * 2, 17)


# --- accuracy ------------------------------------------------------------------------------------


@given(WORDS, WORDS)
@example(0, 0)
@example(2**32 - 1, 2**32 - 1)
@example(2**32 - 1, 2**30)
@example(0, 2**31 - 1)
@example(2**31, 2**29)
@example(2**31 - 1, 2**29 - 1)
@example(3037000500, 3 * 2**29)  # u1 about sqrt(1/2), where ln changes its exponent
@example(3037000499, 2**30 + 1)
def test_normals_are_accurate(word_a, word_b):
    rounded = struct.unpack("2f", struct.pack("2f", *philox.box_muller(word_a, word_b)))
    exact = exact_normals(word_a, word_b)
    for double, single, z in zip(philox.box_muller(word_a, word_b), rounded, exact, strict=True):
        assert abs(Decimal(double) - z) <= Decimal(normal_double()) * abs(z)
        ulp = 2.0 ** (math.frexp(z)[1] - 24) if z else 0.0
        assert abs(Decimal(single) - z) <= Decimal(normal_ulps() * ulp)


# --- no counter serves twice ---------------------------------------------------------------------


@pytest.fixture(params=["native", "PyTorch"])
def counters(request, monkeypatch):
    """How often each counter (seed, draw, layer, group, block) was used.

    first: by philox_words and by forward passes. again: by backward passes.
    """
    if request.param == "native":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr("scalabl_ref.fast.native.core", lambda: None)
    used = {"first": Counter(), "again": Counter()}
    inside = []

    def record(kind, seed, layer, coordinates, blocks):
        """coordinates: pairs of draw and group, each once."""
        used[kind].update((seed, d, layer, g, j) for d, g in coordinates for j in range(blocks))

    def normals_(at, layer, groups, draws, rank):
        later = torch.zeros_like(groups) if draws is None else draws
        pairs = set(zip((at.draw + later).tolist(), groups.tolist(), strict=True))
        record("first", at.seed, layer, pairs, -(-rank // 4))
        return original["normals"](at, layer, groups, draws, rank)

    def words(seed, stream, n):
        pairs = {(stream // 2**32, stream % 2**32)}
        record("first", seed, noise.RESERVED_LAYER, pairs, -(-n // 4))
        return original["words"](seed, stream, n)

    def arguments(core, x, t, d):
        if d.noisy:
            count = -(-len(x) // d.rows_per_group)
            groups = torch.arange(count) if d.groups is None else d.groups
            draws = torch.zeros_like(groups) if d.draws is None else d.draws
            pairs = set(zip((d.draw + draws).tolist(), groups.tolist(), strict=True))
            kind = "first" if inside else "again"
            record(kind, d.seed, d.layer, pairs, -(-len(t.s) // 4))
        return original["arguments"](core, x, t, d)

    def op(*values):
        inside.append(True)
        try:
            return original["op"](*values)
        finally:
            inside.pop()

    original = {"normals": Noise.normals, "words": Noise.words, "arguments": ops.arguments,
                "op": SubspaceAdapter.op}  # fmt: skip
    monkeypatch.setattr(Noise, "normals", staticmethod(normals_))
    monkeypatch.setattr(Noise, "words", staticmethod(words))
    monkeypatch.setattr(ops, "arguments", arguments)
    monkeypatch.setattr(SubspaceAdapter, "op", staticmethod(op))
    return used


def whole_run(sampling: str, steps: int = 8) -> None:
    """Split, initial values, training at 3 steps an epoch, and prediction, under one seed."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 40, (n,), generator=generator).tolist() for n in range(2, 12)]
    data = Encoded(tokens, [i % 3 for i in range(10)], list(CLASSES))
    split(list(range(10)), 0.3, seed=1)
    model = tiny_model(seed=1, wake=False, rank=6, sampling=sampling)
    trainer = Trainer(model, data, TrainConfig(steps=steps, batch=4, micro_batch=3, seed=1))
    for _ in range(steps):
        trainer.step()
    predict_all(model, evaluation_batches(data, 4), samples=3, seed=1)


@pytest.mark.parametrize("sampling", ["example", "token"])
def test_no_counter_is_used_twice_in_a_run(counters, sampling):
    """And the backward pass uses none but those of its forward pass."""
    whole_run(sampling)
    first, again = counters.values()
    assert len(first) > 500 and set(first.values()) == {1}
    assert {draw for _, draw, *_ in first} >= {0, 1, 2, *range(2**31, 2**31 + 8)}
    assert again.keys() <= first.keys()


def constant_draw(monkeypatch):
    monkeypatch.setattr("scalabl_ref.training.trainer.Noise", lambda seed, draw: Noise(seed, 7))


def prediction_among_the_steps(monkeypatch):
    monkeypatch.setattr("scalabl_ref.training.trainer.FIRST_TRAINING_DRAW", 0)


def one_layer_id(monkeypatch):
    monkeypatch.setattr(attach, "layer_id", lambda name, target: 3)


def one_stream(monkeypatch):
    monkeypatch.setattr("scalabl_ref.data.batches._EXAMPLES", batches._BATCHES)


def examples_share(monkeypatch):
    """Every row of a batch draws as example 0 does, though each is told to draw its own."""
    original = Inputs.row_groups
    monkeypatch.setattr(Inputs, "row_groups", lambda self: torch.zeros_like(original(self)))


@pytest.mark.parametrize(
    "fault",
    [constant_draw, prediction_among_the_steps, one_layer_id, one_stream, examples_share],
)
def test_a_counter_used_twice_is_noticed(counters, fault, monkeypatch):
    fault(monkeypatch)
    whole_run("example", steps=4)
    assert max(counters["first"].values()) > 1


# --- statistics ----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def sampled(seed: int, n: int) -> torch.Tensor:
    return Noise(seed, 0).normal(0, n // 8, 8).flatten()


def moment(power: int, seed: int, n: int) -> float:
    """Mean of z^power minus its expectation."""
    expected = 0 if power % 2 else math.prod(range(1, power, 2))
    return float((sampled(seed, n).double() ** power).mean()) - expected


MOMENTS = [
    ZTest(f"moment {power}", partial(moment, power), 2**18, replay=2**15, sd=sd, skew=skew)
    for power, sd, skew in (
        (1, 1, 0), (2, 2**0.5, 8**0.5), (3, 15**0.5, 0), (4, 96**0.5, 9504 / 96**1.5)
    )
]  # fmt: skip

KOLMOGOROV = KSTest(
    "normal distribution",
    lambda seed, n: torch.special.ndtr(sampled(seed, n).double()),
    n=2**18,
    replay=2**15,
)

NORMAL_BINS = ChiSquare(
    "normals in 256 bins",
    lambda seed, n: cells(sampled(seed, n), 256),
    n=2**18,
    replay=2**15,
)


def word_bytes(seed: int, n: int) -> torch.Tensor:
    """The four bytes of every word, (4, n)."""
    words = noise.philox_words(seed, stream=0, n=n)
    return torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)])


BYTES = ChiSquare("bytes of the words", word_bytes, n=2**18, count=4, replay=2**15)


def cells(z: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers 0 .. count - 1 of the cells, equally probable for a normal, that hold z."""
    edges = torch.special.ndtri(torch.arange(1, count, dtype=torch.float64) / count)
    return torch.bucketize(z, edges.float())


PAIRS = ("seed", "draw", "layer", "group", "component", "block", "draw and layer",
         "layer and group", "draw and group", "seed and draw")  # fmt: skip


@lru_cache(maxsize=1)
def pairs(kind: str, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n disjoint pairs of normals: neighbours along a coordinate, or two coordinates exchanged."""
    seed <<= 8

    def row(seed: int = seed, draw: int = 0, layer: int = 0, group: int = 0) -> torch.Tensor:
        return Noise(seed, draw).normal(layer, torch.tensor([group]), -(-n // 8))[0]

    if kind in ("component", "block"):  # k with k + 1 (same or next two words), or with k + 4
        z = Noise(seed, 0).normal(0, n // 8, 18)
        if kind == "block":
            blocks = z[:, :16].reshape(-1, 2, 4)
            return blocks[:, 0].flatten(), blocks[:, 1].flatten()
        even, odd = z[::2], z[1::2]
        first = torch.cat([even[:, 0:16:2], odd[:, 1:17:2]])
        return first.flatten(), torch.cat([even[:, 1:17:2], odd[:, 2:18:2]]).flatten()
    base = {"seed": seed, "draw": 0, "layer": 0, "group": 0}
    one, _, two = kind.partition(" and ")
    a, b = [], []
    for i in range(0, 16, 2):
        here, there = ({one: base[one] + i}, {one: base[one] + i + 1})
        if two:
            here[two], there[two] = base[two] + i + 1, base[two] + i
        a.append(row(**here))
        b.append(row(**there))
    return torch.cat(a)[:n], torch.cat(b)[:n]


def correlation(power: int, kind: str, seed: int, n: int) -> float:
    """Of z for power 1, of z^2 for power 2."""
    a, b = (z.double() for z in pairs(kind, seed, n))
    if power == 2:
        a, b = (a * a - 1) / 2**0.5, (b * b - 1) / 2**0.5
    return float((a * b).mean())


def pair_cells(kind: str, seed: int, n: int) -> torch.Tensor:
    """Cells of the plane, 8 along each axis."""
    a, b = (cells(z, 8) for z in pairs(kind, seed, n))
    return 8 * a + b


INDEPENDENCE = {
    kind: (
        ZTest(f"correlation, {kind}", partial(correlation, 1, kind), 2**17, replay=2**14),
        ZTest(
            f"correlation of squares, {kind}",
            partial(correlation, 2, kind),
            2**17,
            replay=2**14,
            skew=8,
        ),
        ChiSquare(
            f"pairs in 8 x 8 cells, {kind}",
            partial(pair_cells, kind),
            2**17,
            replay=2**14,
            cells=64,
        ),
    )
    for kind in PAIRS
}


@pytest.mark.parametrize("assertion", [*MOMENTS, KOLMOGOROV, NORMAL_BINS], ids=lambda a: a.name)
def test_normals_are_normal(assertion):
    assertion.check(seed=5)


def test_bytes_of_the_words_are_uniform():
    BYTES.check(seed=7)


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_independent(kind):
    for assertion in INDEPENDENCE[kind]:
        assertion.check(seed=6)


# --- a broken generator is noticed ---------------------------------------------------------------

SAMPLER = [
    *MOMENTS,
    KOLMOGOROV,
    NORMAL_BINS,
    BYTES,
    *(a for kind in PAIRS for a in INDEPENDENCE[kind]),
]


def values(change):
    """The normals changed after they were made."""
    return lambda normal, at, rank: change(normal(at, rank))


def odd_ones(change):
    """Every second normal replaced by a function of the one before it and of itself."""

    def faulty(normal, at, rank):
        z = normal(at, rank + rank % 2)
        z[:, 1::2] = change(z[:, ::2], z[:, 1::2])
        return z[:, :rank]

    return faulty


def one_block(normal, at, rank):
    """The four normals of a block, again and again."""
    return normal(at, 4).repeat(1, -(-rank // 4))[:, :rank]


def shared(coordinate):
    """Two neighbours along a coordinate have the same noise."""
    return lambda normal, at, rank: normal({**at, coordinate: at[coordinate] // 2 * 2}, rank)


def confused(one, two):
    """The noise depends on the sum of two coordinates."""
    return lambda normal, at, rank: normal({**at, one: 0, two: at[one] + at[two]}, rank)


FAULTS = {
    "shifted": (values(lambda z: z + 0.06), "moment 1"),
    "shifted further": (values(lambda z: z + 0.1), "normal distribution"),
    "too wide": (values(lambda z: 1.05 * z), "moment 2"),
    "skewed": (values(lambda z: z + 0.04 * (z * z - 1)), "moment 3"),
    "without tails": (values(lambda z: z.clamp(-2.5, 2.5)), "moment 4"),
    "coarse": (values(lambda z: (8 * z).round() / 8), "normals in 256 bins"),
    "no block": (one_block, "correlation, block"),
    "sine is cosine": (odd_ones(lambda a, b: a), "correlation, component"),
    "one radius": (odd_ones(lambda a, b: a.abs() * b.sign()), "correlation of squares, component"),
    "signs by size": (
        odd_ones(lambda a, b: b.abs() * (a.abs() - 0.6745).sign()),
        "pairs in 8 x 8 cells, component",
    ),
    **{f"{c} halved": (shared(c), f"correlation, {c}") for c in ("seed", "draw", "layer", "group")},
    **{
        f"{pair} confused": (confused(*pair.split(" and ")), f"pairs in 8 x 8 cells, {pair}")
        for pair in ("draw and layer", "layer and group", "draw and group", "seed and draw")
    },
}  # fmt: skip


def failing(monkeypatch, faulty) -> set[str]:
    """Names of the sampler's assertions that fail, at the n of their replays."""
    original = Noise.normal

    def normal(at, rank):
        return original(Noise(at["seed"], at["draw"]), at["layer"], at["group"], rank)

    def broken(self, layer, groups, rank):
        ids = groups if isinstance(groups, torch.Tensor) else torch.arange(groups)
        return faulty(
            normal, {"seed": self.seed, "draw": self.draw, "layer": layer, "group": ids}, rank
        )

    with monkeypatch.context() as patch:
        patch.setattr(Noise, "normal", broken)
        for cached in (sampled, pairs):
            cached.cache_clear()
        found = {
            a.name
            for a in SAMPLER
            if a.statistic(a.sample(8, a.replay), a.replay) > a.limit(a.replay)
        }
    for cached in (sampled, pairs):
        cached.cache_clear()
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_generator_is_noticed(name, monkeypatch):
    faulty, expected = FAULTS[name]
    assert expected in failing(monkeypatch, faulty)


def test_broken_words_are_noticed(monkeypatch):
    original = noise.philox_words
    monkeypatch.setattr(noise, "philox_words", lambda *a, **k: original(*a, **k) & ~1)
    assert BYTES.statistic(BYTES.sample(8, 2**15), 2**15) > BYTES.limit(2**15)


def test_every_assertion_of_the_sampler_catches_something(monkeypatch):
    """And none fails what is right, at the same seed."""
    assert failing(monkeypatch, values(lambda z: z)) == set()
    caught = set().union(*(failing(monkeypatch, faulty) for faulty, _ in FAULTS.values()))
    assert caught == {a.name for a in SAMPLER} - {BYTES.name}


# --- draws that depend on each other --------------------------------------------------------------


def designed(size, draws, seed=0, layer=3, groups=5, rank=4):
    """Draws 0 .. draws - 1 of all groups at once: (draws, groups, rank); size 1: independent."""
    at = Noise(seed, 0) if size == 1 else DesignedNoise(seed, 0, Design.LATIN, size)
    return all_draws(at, draws, layer, groups, rank)


def all_draws(at, draws, layer=3, groups=5, rank=4):
    number = torch.arange(draws).repeat_interleave(groups)
    ids = torch.arange(groups).repeat(draws)
    return at.normal(layer, ids, rank, number).view(draws, groups, rank)


@given(SEEDS, st.integers(0, 2**30), LAYERS, st.integers(1, 7), st.integers(0, 7))
def test_designs_give_a_draw_whatever_is_drawn_with_it(seed, draw, layer, rank, size):
    """One call for two draws of three groups, or six calls; with repeats, in any order."""
    groups = torch.tensor([4, 0, 2**32 - 1])

    def at(draw):
        if size < 2:
            return DesignedNoise(seed, draw, Design.ANTITHETIC) if size else Noise(seed, draw)
        return DesignedNoise(seed, draw, Design.LATIN, size)

    both, draws = torch.cat((groups, groups, groups[:1])), torch.tensor([1] * 3 + [0] * 4)
    together = at(draw).normal(layer, both, rank, draws)
    alone = [at(draw + i).normal(layer, groups, rank) for i in (1, 0)]
    assert bits(together) == bits(torch.cat((*alone, alone[1][:1])))


def test_antithetic_draws_come_in_pairs():
    z, independent = all_draws(DesignedNoise(0, 0, Design.ANTITHETIC), 6), designed(1, 3)
    assert bits(z[::2]) == bits(independent)
    assert bits(z[1::2]) == bits(-independent)


@given(SEEDS, st.integers(2, 12))
def test_latin_draws_lie_one_in_each_interval_in_the_order_of_independent_ones(seed, n):
    z, independent = (designed(size, 2 * n, seed) for size in (n, 1))
    u = torch.special.ndtr(z.double())
    for block in (slice(0, n), slice(n, 2 * n)):
        intervals = (n * u[block]).floor().long()
        assert torch.equal(intervals, independent[block].argsort(0).argsort(0))


@pytest.mark.eq_21
def test_latin_draws_equal_the_definition():
    """Worked out with Python's own normal distribution, value by value."""
    normal, n = NormalDist(), 4
    z, independent = (designed(size, n, groups=1, rank=3)[:, 0] for size in (n, 1))
    for k in range(3):
        column = [float(value) for value in independent[:, k]]
        u = [*sorted(normal.cdf(value) for value in column), 1.0]
        for value, got in zip(column, z[:, k].tolist(), strict=True):
            low = sorted(column).index(value)
            v = (u[low] / u[low + 1]) ** (low + 1)
            expected = normal.inv_cdf((low + v) / n)
            assert abs(got - expected) <= rounding(torch.float32, 2) * max(1, abs(expected))


def latin_place(seed: int, n: int) -> torch.Tensor:
    """Phi of one draw of Latin hypercubes of 5, n components in all."""
    at, draws = DesignedNoise(seed, 0, Design.LATIN, 5), torch.full((n // 8,), 7)
    return torch.special.ndtr(at.normal(0, n // 8, 8, draws).flatten().double())


def latin_inside(seed: int, n: int) -> torch.Tensor:
    """Where in its interval each of the draws of Latin hypercubes of 5 lies, from 0 to 1."""
    return (
        5 * torch.special.ndtr(designed(5, 5, seed, groups=n // 40, rank=8).flatten().double()) % 1
    )


def latin_correlations(seed: int, n: int) -> torch.Tensor:
    """Of components, of places inside the interval, of draws of different hypercubes."""
    z = designed(5, 6, seed, groups=n, rank=2).double()
    inside = (5 * torch.special.ndtr(z) % 1 - 0.5) * 12**0.5
    pairs = ((z[1, :, 0], z[1, :, 1]), (inside[0, :, 0], inside[1, :, 0]), (z[0, :, 0], z[5, :, 0]))
    return torch.stack([(a * b).mean() for a, b in pairs])


LATIN = [
    KSTest("latin: one draw", latin_place, n=2**17, replay=2**12),
    KSTest("latin: inside an interval", latin_inside, n=40 * 2**12, replay=40 * 2**7),
    ZTest("latin: correlations", latin_correlations, n=2**15, count=3, replay=2**11),
]


@pytest.mark.eq_21
@pytest.mark.parametrize("record", LATIN, ids=lambda record: record.name)
def test_latin_draws_are_normal_each_and_independent_otherwise(record):
    record.check(seed=21)


def test_designs_end_where_training_begins():
    last = DesignedNoise(0, noise.FIRST_TRAINING_DRAW - 1, Design.LATIN, 4)
    assert last.normal(0, 1, 1).shape == (1, 1)
    with pytest.raises(InputError, match="last draw of a design"):
        DesignedNoise(0, noise.FIRST_TRAINING_DRAW, Design.LATIN, 4).normal(0, 1, 1)
    for design, size in ((Design.LATIN, 1), (Design.ANTITHETIC, 3), (Design.LATIN, 2**31)):
        with pytest.raises(InputError, match="size of a design must be in"):
            DesignedNoise(0, 0, design, size)
