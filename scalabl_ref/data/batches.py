"""Examples as token ids, and batches of them in an order that the seed fixes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import philox_words
from ..tokenizer import LETTERS, Tokenizer
from .prompts import Example, num_classes


@dataclass(frozen=True)
class Encoded:
    """A data set in token ids; example i is the one with `Batch.ids` i, whatever batch it is in.

    tokens: ids of each prompt. labels: class of each. classes: token id of each class.
    """

    tokens: list[list[int]]
    labels: list[int]
    classes: list[int]


@dataclass(frozen=True)
class Batch:
    """Prompts side by side. tokens (B, T), padded on the right with 0; lengths, labels (class
    indices) and ids (indices in the data set) (B,); classes (C,) token ids. All int64.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    ids: Tensor
    classes: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def rows(self, index: Tensor) -> Batch:
        """The examples at `index`, (b,) int64."""
        at = index.to(self.tokens.device)
        return Batch(self.tokens[at], self.lengths[at], self.labels[at], self.ids[at], self.classes)


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    classes: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    answerable: bool = True,
) -> Encoded:
    """Prompts and answer letters as token ids.

    classes: how many letters, by default num_classes(examples). max_length: longest prompt in
    tokens that the model takes. truncate: cut longer ones on the left, behind BOS. answerable:
    every label must be one of the classes; those of a set out of distribution, which may have more
    choices than the head that meets it, stay as they are.

    Raises InputError if there are no examples, if a letter is not one token after a prompt, or
    naming the row whose label is no class or whose prompt is too long.
    """
    if not examples:
        raise InputError("there are no examples")
    count = classes or num_classes(examples)
    for i, example in enumerate(examples):
        if answerable and example.label >= count:
            raise InputError(
                f"example {i} (id {example.id}): its answer is {LETTERS[example.label]}, and there "
                f"are {count} classes, to {LETTERS[count - 1]}"
            )
    ids = _class_ids(examples, tokenizer, count)
    start = len(tokenizer.encode("")) - len(tokenizer.encode("", bos=False))  # 1 if there is a BOS
    tokens = []
    for i, example in enumerate(examples):
        row = tokenizer.encode(example.prompt)
        if max_length is not None and len(row) > max_length:
            if not truncate:
                raise InputError(
                    f"example {i} (id {example.id}): its prompt has {len(row)} tokens, and the "
                    f"model takes at most {max_length}"
                )
            row = row[:start] + row[len(row) - (max_length - start) :]
        tokens.append(row)
    return Encoded(tokens, [example.label for example in examples], ids)


def _class_ids(examples: Sequence[Example], tokenizer: Tokenizer, classes: int) -> list[int]:
    """Token ids of the letters, checked once for every way in which the prompts end."""
    ends: dict[tuple[str, str], Example] = {}
    for example in examples:
        stripped = example.prompt.rstrip()
        word = stripped[-40:].split()[-1:]
        ends.setdefault(("".join(word), example.prompt[len(stripped) :]), example)
    found: list[int] = []
    for example in ends.values():
        ids = tokenizer.class_token_ids(classes, example.prompt)
        if found and ids != found:
            raise InputError(
                f"the letters are other tokens at the end of example {example.id} "
                f"({example.prompt[-20:]!r}) than at the end of example {examples[0].id}"
            )
        found = ids
    return found


def collate(data: Encoded, indices: Sequence[int]) -> Batch:
    """The examples with these indices as one batch, T being the longest prompt among them."""
    rows = [data.tokens[i] for i in indices]
    longest = max(map(len, rows))
    return Batch(
        tokens=torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        lengths=torch.tensor([len(row) for row in rows]),
        labels=torch.tensor([data.labels[i] for i in indices]),
        ids=torch.tensor(list(indices)),
        classes=torch.tensor(data.classes),
    )


def evaluation_batches(data: Encoded, batch_size: int) -> Iterator[Batch]:
    """Every example once, longest prompts first: little padding, and memory peaks at the start.

    Raises InputError for a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch must be at least 1, and is {batch_size}")
    order = sorted(range(len(data.tokens)), key=lambda i: -len(data.tokens[i]))
    starts = range(0, len(order), batch_size)
    return (collate(data, order[start : start + batch_size]) for start in starts)


# --- order, a pure function of the seed -----------------------------------------------------------

# Streams of philox_words: each purpose adds the epoch to a number of its own.
_EXAMPLES, _BATCHES, _SPLIT = 1 << 48, 2 << 48, 3 << 48
_WINDOW = 16  # batches, at most, among which examples are sorted by length


class TrainingOrder:
    """Which examples each training step sees, as a pure function of (seed, step).

    Every epoch shows every example once. Shuffled examples are sorted by length within windows of
    max(1, min(16, batches // 4)) batches, so that a batch has little padding and yet is another set
    in every epoch, then the batches are shuffled. One batch per epoch is short where batch_size
    does not divide the number of examples.

    lengths: of all prompts, in tokens. Raises InputError if there are none, or no batch_size.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if not lengths or batch_size < 1:
            raise InputError(f"cannot make batches of {batch_size} from {len(lengths)} examples")
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._made: tuple[int, list[list[int]]] = (-1, [])  # the epoch last asked for

    def indices(self, step: int) -> list[int]:
        """Indices of the examples of this step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._made[0] != epoch:
            self._made = epoch, self._batches(epoch)
        return self._made[1][place]

    def _batches(self, epoch: int) -> list[list[int]]:
        examples = _permutation(len(self.lengths), self.seed, _EXAMPLES + epoch)
        window = max(1, min(_WINDOW, self.steps_per_epoch // 4)) * self.batch_size
        bucketed: list[int] = []
        for start in range(0, len(examples), window):
            bucketed += sorted(examples[start : start + window], key=self.lengths.__getitem__)
        places = _permutation(self.steps_per_epoch, self.seed, _BATCHES + epoch)
        return [bucketed[p * self.batch_size :][: self.batch_size] for p in places]


def split(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(rest, held_out): a random `fraction` set apart by the seed, both in their first order.

    Raises InputError unless 0 <= fraction < 1, or if one part of a real split would be empty.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"the fraction held out must be in [0, 1), and is {fraction}")
    count = round(fraction * len(examples))
    if fraction > 0 and not 0 < count < len(examples):
        raise InputError(f"a fraction of {fraction} does not split {len(examples)} examples")
    held = set(_permutation(len(examples), seed, _SPLIT)[:count]) if count else set()
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def _permutation(n: int, seed: int, stream: int) -> list[int]:
    """0 .. n - 1 sorted by random words (by index where two words are equal)."""
    return torch.argsort(philox_words(seed, stream, n), stable=True).tolist()
