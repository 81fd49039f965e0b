"""Examples as token ids, and batches of them in an order that the seed fixes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..core.noise import philox_words
from ..core.objective import Batch
from ..support.errors import InputError
from .answers import Answers, answer_tokens
from .chat import ChatTemplate
from .prompts import Example, Wording, num_classes
from .tokenizer import LETTERS, Tokenizer, letters


@dataclass(frozen=True)
class Encoded:
    """A data set in token ids; example i is the one with `Batch.ids` i, whatever batch it is in.

    tokens: ids of each prompt. labels: class of each. classes: token id of each class.
    examples: the rows, with the prompts that were encoded. wording: how the prompts were made; no
    setting is "auto". notice: a warning about the answers' tokens, for the user.
    cut, left_out: how many prompts longer than wording.max_length were cut, or left out.
    """

    tokens: list[list[int]]
    labels: list[int]
    classes: list[int]
    examples: list[Example] = field(default_factory=list)
    wording: Wording = field(default_factory=Wording)
    notice: str | None = None
    cut: int = 0
    left_out: int = 0


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    classes: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    answerable: bool = True,
    wording: Wording | None = None,
) -> Encoded:
    """Prompts and answers as token ids.

    classes: how many letters, by default num_classes(examples). max_length: the model's longest
    prompt in tokens. truncate: cut longer prompts on the left, behind BOS. answerable: every label
    must be one of the classes; False for out-of-distribution data, which may have more choices than
    the model's head. wording: how prompts are made and answers chosen; None takes the examples' own
    prompts and letters.

    Raises InputError if there are no examples or if an answer has no token after a prompt, and,
    naming the row, if a label is no class or a prompt is too long.
    """
    if not examples:
        raise InputError("there are no examples")
    asked = _ask(examples, tokenizer, wording, classes)
    for i, example in enumerate(asked.examples):
        if answerable and example.label >= len(asked.names):
            raise InputError(
                f"example {i} (id {example.id}): its answer is {asked.answer(examples[i])}, but "
                f"there are {len(asked.names)} classes, to {asked.names[-1]}"
            )
    rows, cut = _rows(asked, tokenizer, max_length, truncate)
    kept = [asked.examples[i] for i in rows]
    return Encoded(
        list(rows.values()),
        [example.label for example in kept],
        asked.answers.ids,
        kept,
        asked.wording,
        asked.answers.notice,
        cut,
        len(asked.examples) - len(kept),
    )


class _Asked(NamedTuple):
    """Examples with their prompts, the classes' names and tokens, and the wording of all."""

    examples: list[Example]
    names: Sequence[str]
    answers: Answers
    wording: Wording

    def answer(self, example: Example) -> str:
        """The name of the answer of an example from a file, whether it is a class or not."""
        in_words = self.wording.words is not None
        return repr(example.choices[example.label]) if in_words else LETTERS[example.label]


def _ask(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    wording: Wording | None,
    classes: int | None,
) -> _Asked:
    """The examples with labels in words or letters; for "auto" see `Wording`."""
    wanted = wording or Wording(labels="letters")
    chat = ChatTemplate.load(tokenizer.files, tokenizer.special) if wanted.style == "chat" else None
    notice = None
    if wanted.could_be_words(examples):
        try:
            words = wanted.in_words(examples)
            worded = [words.word(example, chat) for example in examples]
            return _answered(worded, tokenizer, words, words.words or (), None)
        except InputError as error:
            if wanted.labels == "words":
                raise
            notice = f"labels are letters, not words: {error}"
    lettered = wanted.in_letters(examples)
    # Without a wording the examples' prompts are taken as they are.
    worded = [lettered.word(e, chat) for e in examples] if wording else list(examples)
    return _answered(worded, tokenizer, lettered, letters(classes or num_classes(examples)), notice)


def _answered(
    examples: list[Example],
    tokenizer: Tokenizer,
    wording: Wording,
    names: Sequence[str],
    notice: str | None,
) -> _Asked:
    prompts = (example.prompt for example in examples)
    words = wording.words is not None
    answers = answer_tokens(tokenizer, prompts, names, wording.answer_tokens, words)
    wording = replace(wording, answer_tokens=answers.kind)
    return _Asked(examples, names, answers._replace(notice=notice or answers.notice), wording)


def _rows(
    asked: _Asked, tokenizer: Tokenizer, max_length: int | None, truncate: bool
) -> tuple[dict[int, list[int]], int]:
    """Token ids by the example's place, without those left out; and how many were cut.

    max_length: the model's limit; the wording may have another.
    """
    wording = asked.wording
    limits = (n for n in (max_length, wording.max_length) if n is not None)
    limit = min(limits, default=None)
    bos = wording.style == "plain"  # a chat template writes its own
    start = len(tokenizer.encode("", bos))  # 1 with a BOS
    rows: dict[int, list[int]] = {}
    cut = 0
    for i, example in enumerate(asked.examples):
        row = tokenizer.encode(example.prompt, bos)
        if limit is not None and len(row) > limit:
            if wording.drop_long:
                continue
            if not truncate and wording.max_length is None:
                raise InputError(
                    f"example {i} (id {example.id}): its prompt has {len(row)} tokens, but the "
                    f"model takes at most {limit}: --max-length {limit} cuts it, or leaves it out "
                    "with --drop-long"
                )
            row, cut = row[:start] + row[len(row) - (limit - start) :], cut + 1
        rows[i] = row
    if not rows:
        raise InputError(f"all {len(asked.examples)} prompts are longer than {limit} tokens")
    return rows, cut


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
    """Every example once, the longest prompts first: little padding, and the peak of memory is at
    the start.

    Raises InputError for a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch must be at least 1, and is {batch_size}")
    order = sorted(range(len(data.tokens)), key=lambda i: -len(data.tokens[i]))
    starts = range(0, len(order), batch_size)
    return (collate(data, order[start : start + batch_size]) for start in starts)


# --- order, a pure function of the seed -----------------------------------------------------------

# Streams of philox_words: each purpose has its own base, to which it adds the epoch.
_EXAMPLES, _BATCHES, _SPLIT = 1 << 48, 2 << 48, 3 << 48
_WINDOW = 16  # batches, at most, among which examples are sorted by length


class TrainingOrder:
    """Which examples each training step sees, as a pure function of (seed, step).

    Every epoch shows every example once. The examples are shuffled, then sorted by length within
    windows of max(1, min(16, batches // 4)) batches; then the batches are shuffled. So a batch has
    little padding, and differs from epoch to epoch. One batch of an epoch is short if batch_size
    does not divide the number of examples.

    lengths: of all prompts, in tokens. Raises InputError if there are none, or no batch_size.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if not lengths or batch_size < 1:
            raise InputError(f"cannot make batches of {batch_size} from {len(lengths)} examples")
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._made: tuple[int, list[list[int]]] = (-1, [])  # the latest epoch

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
    """(rest, held_out): the seed chooses a `fraction` to hold out; both keep the examples' order.

    Raises InputError unless 0 <= fraction < 1, or if one part of a real split would be empty.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"the fraction held out must be in [0, 1), and is {fraction}")
    count = round(fraction * len(examples))
    if fraction > 0 and not 0 < count < len(examples):
        raise InputError(f"a fraction of {fraction} does not split {len(examples)} examples")
    return hold_out(examples, count, seed)


def hold_out(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """As `split`, by the number of examples to hold out. Raises InputError if there are fewer."""
    if count > len(examples):
        raise InputError(f"{len(examples)} examples are too few to hold out {count}")
    held = set(_permutation(len(examples), seed, _SPLIT)[:count]) if count else set()
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def _permutation(n: int, seed: int, stream: int) -> list[int]:
    """0 .. n - 1 sorted by random words (by index where two words are equal)."""
    return torch.argsort(philox_words(seed, stream, n), stable=True).tolist()
