"""Encoding, batches, and their order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref.core.philox import philox4x32
from scalabl_ref.data import (
    Encoded,
    Example,
    TrainingOrder,
    Wording,
    batches,
    collate,
    encode,
    evaluation_batches,
    hold_out,
    split,
)
from scalabl_ref.data.tokenizer import Tokenizer
from scalabl_ref.support.errors import InputError


class Characters(Tokenizer):
    """One token per character, 0 for BOS; but a space and a letter together are one token."""

    bos_id, eos_id, files, _prefix = 0, None, {}, [0]

    def token_id(self, piece):
        return ord(piece) if len(piece) == 1 else None

    def _encode(self, text):
        tokens = text.replace(" A", "\ue000").replace(" B", "\ue001")
        return [ord(character) for character in tokens]

    def _decode(self, ids):
        return "".join(map(chr, ids))


def prompts(*texts, label=0):
    return [Example(text, label, f"id{i}", ("A", "B")) for i, text in enumerate(texts)]


def test_encode():
    examples = prompts("ab:", "c:", label=1)
    encoded = encode(examples, Characters())
    assert encoded.tokens == [[0, 97, 98, 58], [0, 99, 58]] and encoded.labels == [1, 1]
    assert encoded.classes == [0xE000, 0xE001] and encoded.examples == examples
    assert encode(examples, Characters(), classes=4, wording=BARE).classes == [65, 66, 67, 68]
    with pytest.raises(InputError, match=r"example 0 \(id id0\): its answer is B.*1 classes, to A"):
        encode(examples, Characters(), classes=1)
    assert encode(examples, Characters(), classes=1, answerable=False).labels == [1, 1]
    with pytest.raises(InputError, match=r"example 2 \(id id1\): its answer is B, but there are 1"):
        encode([*prompts("a:"), *prompts("b:", "c:")[:1], *prompts("b:", "c:", label=1)[1:]],
               Characters(), classes=1)  # fmt: skip
    with pytest.raises(InputError, match="27 answer classes: there are letters for 26"):
        encode(examples, Characters(), classes=27)


BARE = Wording(labels="letters", answer_tokens="bare")


def test_prompts_that_are_too_long():
    examples = prompts("abcd:", "abcdefg:")
    assert len(encode(examples, Characters(), max_length=9).tokens[1]) == 9
    with pytest.raises(InputError, match=r"id1\).* 9 tokens.*at most 8: --max-length 8"):
        encode(examples, Characters(), max_length=8)
    cut = encode(examples, Characters(), max_length=8, truncate=True)
    assert cut.tokens[0] == [0, *map(ord, "abcd:")] and cut.tokens[1] == [0, *map(ord, "bcdefg:")]


def test_nothing_to_encode():
    with pytest.raises(InputError, match="no examples"):
        encode([], Characters())


def some_encoded(lengths):
    return Encoded(
        [[1 + i] * n for i, n in enumerate(lengths)],
        [i % 3 for i in range(len(lengths))],
        [7, 8, 9],
    )


some_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=200)
seeds = st.integers(0, 2**64 - 1)


def test_collate():
    batch = collate(some_encoded([1, 3, 2]), [2, 0, 1])
    assert batch.tokens.tolist() == [[3, 3, 0], [1, 0, 0], [2, 2, 2]]
    assert batch.lengths.tolist() == [2, 1, 3]
    assert batch.labels.tolist() == [2, 0, 1] and batch.ids.tolist() == [2, 0, 1]
    assert batch.classes.tolist() == [7, 8, 9]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}
    assert batch.to("meta").tokens.is_meta


@given(lengths=some_lengths, size=st.integers(1, 50))
def test_evaluation_drops_nothing_and_pads_least(lengths, size):
    encoded = some_encoded(lengths)
    batches = list(evaluation_batches(encoded, size))
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    assert sorted(ids) == list(range(len(lengths)))
    assert [lengths[i] for i in ids] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch.ids) <= size
        for i, row, n in zip(batch.ids, batch.tokens, batch.lengths, strict=True):
            assert row.tolist() == encoded.tokens[i] + [0] * (len(row) - int(n))
            assert batch.tokens.shape[1] == batch.lengths.max()


def epoch_of(order, epoch):
    steps = order.steps_per_epoch
    return [order.indices(epoch * steps + i) for i in range(steps)]


@given(lengths=some_lengths, size=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 2**20))
def test_every_epoch_shows_every_example_once(lengths, size, seed, epoch):
    order = TrainingOrder(lengths, size, seed)
    batches = epoch_of(order, epoch)
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    sizes = sorted(map(len, batches), reverse=True)
    assert sizes[:-1] == [size] * (len(sizes) - 1) and 1 <= sizes[-1] <= size


@given(
    lengths=some_lengths,
    size=st.integers(1, 8),
    seed=seeds,
    steps=st.lists(st.integers(0, 1000), min_size=1, max_size=8),
)
def test_a_step_depends_on_nothing_but_seed_and_step(lengths, size, seed, steps):
    """Asked in any order, by a fresh object or one that has served other steps: the same."""
    served = TrainingOrder(lengths, size, seed)
    first = [served.indices(step) for step in steps]
    for step, indices in zip(steps, first, strict=True):
        assert TrainingOrder(lengths, size, seed).indices(step) == indices
    assert [served.indices(step) for step in reversed(steps)] == first[::-1]


def test_epochs_and_seeds_differ():
    orders = [
        tuple(map(tuple, epoch_of(TrainingOrder([5] * 40, 4, seed), epoch)))
        for seed in (0, 1, 2**63)
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_batches_are_other_examples_in_another_epoch_or_seed():
    """Not merely the same batches in another order, however few they are."""
    for examples in (20, 160):
        lengths = list(range(1, examples + 1))
        batches = [
            frozenset(map(frozenset, epoch_of(TrainingOrder(lengths, 4, seed), epoch)))
            for seed in (0, 1)
            for epoch in (0, 1)
        ]
        assert len(set(batches)) == len(batches)


def test_the_order_is_pinned():
    """A change here breaks the resumption of runs that earlier versions began."""
    order = TrainingOrder([3, 1, 2, 5, 4, 9, 7, 8], 3, seed=1)
    assert epoch_of(order, 0) == [[1, 3, 7], [0, 5], [2, 4, 6]]
    assert epoch_of(order, 1) == [[1, 2, 5], [0, 4], [3, 6, 7]]


@given(lengths=some_lengths, size=st.integers(1, 4), seed=seeds, epoch=st.integers(0, 9))
def test_the_order_is_the_documented_one(lengths, size, seed, epoch):
    """Against the definition, in plain Python on the block function."""

    def permutation(n, stream):
        words = []
        for block in range(0, n, 4):
            words += philox4x32((block // 4, stream % 2**32, 2**32 - 1, stream >> 32), key)
        return sorted(range(n), key=words.__getitem__)

    key = (seed % 2**32, seed >> 32)
    shuffled = permutation(len(lengths), 2**48 + epoch)
    window = max(1, min(16, -(-len(lengths) // size) // 4)) * size
    windows = [shuffled[i : i + window] for i in range(0, len(lengths), window)]
    examples = [i for window in windows for i in sorted(window, key=lengths.__getitem__)]
    batches = [examples[i : i + size] for i in range(0, len(lengths), size)]
    expected = [batches[i] for i in permutation(len(batches), 2 * 2**48 + epoch)]
    assert epoch_of(TrainingOrder(lengths, size, seed), epoch) == expected


def padding(lengths, batches):
    return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)


@given(seed=seeds, size=st.integers(2, 16))
def test_bucketing_reduces_padding(seed, size):
    """Against the same shuffle cut into batches unsorted; on 64 batches, to a third or less."""
    lengths = [1 + (37 * i) % (64 * size) for i in range(64 * size)]
    order = TrainingOrder(lengths, size, seed)
    shuffled = batches._permutation(len(lengths), seed, batches._EXAMPLES)
    plain = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    assert padding(lengths, epoch_of(order, 0)) * 3 <= padding(lengths, plain)


def test_batches_come_in_mixed_order_of_length():
    lengths = list(range(1, 65))
    longest = [max(lengths[i] for i in b) for b in epoch_of(TrainingOrder(lengths, 4, 0), 0)]
    assert longest != sorted(longest)


@pytest.mark.parametrize("lengths, size", [([], 4), ([1], 0), ([1], -1)])
def test_impossible_orders(lengths, size):
    with pytest.raises(InputError, match="cannot make batches"):
        TrainingOrder(lengths, size, 0)


@given(n=st.integers(2, 300), percent=st.integers(0, 99), seed=seeds)
def test_split(n, percent, seed):
    examples = [Example(str(i), 0, str(i), ("A", "B")) for i in range(n)]
    fraction = percent / 100
    if percent and not 0 < round(fraction * n) < n:
        with pytest.raises(InputError, match="does not split"):
            split(examples, fraction, seed)
        return
    rest, held_out = split(examples, fraction, seed)
    assert (rest, held_out) == split(examples, fraction, seed)
    assert len(held_out) == round(fraction * n)
    assert sorted(rest + held_out, key=examples.index) == examples
    for part in (rest, held_out):
        assert part == sorted(part, key=examples.index)


def test_orders_and_splits_are_those_of_earlier_versions():
    """A resumed run goes on in its order; a run's own held-out examples stay held out."""
    order = TrainingOrder([5, 3, 4, 8, 1, 9, 2], 2, seed=7)
    steps = [order.indices(step) for step in range(8)]
    assert steps == [[0, 3], [6, 2], [4, 1], [5], [3], [6, 5], [1, 2], [4, 0]]
    examples = [Example(str(i), 0, str(i), ("A", "B")) for i in range(12)]
    _, held_out = split(examples, 1 / 3, seed=7)
    assert [int(example.id) for example in held_out] == [2, 4, 9, 10]


def test_hold_out_takes_the_number_asked_for():
    """That may be all examples, or none."""
    examples = prompts(*"abcde")
    assert [len(part) for part in hold_out(examples, 2, 0)] == [3, 2]
    assert hold_out(examples, 5, 0) == ([], examples) and hold_out(examples, 0, 0) == (examples, [])
    with pytest.raises(InputError, match="5 examples are too few to hold out 6"):
        hold_out(examples, 6, 0)


def test_a_batch_has_a_row_at_least():
    with pytest.raises(InputError, match="batch must be at least 1, and is 0"):
        evaluation_batches(some_encoded([1]), 0)


def test_split_depends_on_the_seed():
    examples = [Example(str(i), 0, str(i), ("A", "B")) for i in range(40)]
    assert split(examples, 0.5, 0) != split(examples, 0.5, 1)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="fraction held out must be in"):
            split(examples, fraction, 0)
