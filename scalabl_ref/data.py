"""Data sets as questions with lettered answers; their encoding; batches in a reproducible order.

Every example is a prompt and the index of its answer: class 0 is the token "A", class 1 "B", and so
on, directly after the prompt's last character.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .noise import philox_words
from .tokenizer import LETTERS, Tokenizer

# What the model reads, by format. {question} is the row's text, {choices} is "A. ...", "B. ...",
# each on a line of its own.
# No prompt ends in a space: tokenizers would join it to the letter. The two sets of short texts
# leave their fixed choices unsaid: they are there to be learnt by very small models.
_MULTIPLE_CHOICE = "{question}\n{choices}\nAnswer:"
TEMPLATES = {
    "jsonl": _MULTIPLE_CHOICE,
    "arc": _MULTIPLE_CHOICE,
    "obqa": _MULTIPLE_CHOICE,
    "winogrande": _MULTIPLE_CHOICE,  # the sentence with its gap "_", then both options
    "boolq": _MULTIPLE_CHOICE,  # the passage, a line break, the question
    "mmlu": _MULTIPLE_CHOICE,
    "sst2": "{question}\nSentiment:",
    "trec": "{question}\nType:",
}
FORMATS = tuple(TEMPLATES)
_PLACE = re.compile(r"\{(\w+)\}")

# Choices that belong to the format and not to the row, in the order of the letters.
FIXED_CHOICES = {
    "boolq": ("No", "Yes"),
    "sst2": ("negative", "positive"),
    "trec": ("abbreviation", "description", "entity", "human", "location", "number"),
}
TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")  # as its files write them
MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


@dataclass(frozen=True)
class Example:
    """A question. prompt: all that the model reads. label: index of the answer among `choices`."""

    prompt: str
    label: int
    id: str
    choices: tuple[str, ...]


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


# --- prompts -----------------------------------------------------------------------------------


def read_template(path: Path | str) -> str:
    """The prompt template in a text file, without the line break at its end.

    It must hold {question} and may hold {choices}; braces around anything but a word are only
    braces. Raises InputError naming the file if it cannot be read or holds another {word}.
    """
    template = _read(Path(path)).removesuffix("\n").removesuffix("\r")
    names = _PLACE.findall(template)
    unknown = [name for name in names if name not in ("question", "choices")]
    if unknown or "question" not in names:
        found = f"{{{unknown[0]}}} is neither" if unknown else "there is no {question}"
        raise InputError(f"{path}: a template has {{question}} and may have {{choices}}: {found}")
    return template


def question(
    text: str,
    choices: Sequence[str],
    format: str,
    label: int = 0,
    id: str = "",
    template: str | None = None,
) -> Example:
    """The example that a row of `format` with this text and these choices becomes.

    template: in place of the format's; see `read_template`. Choices that are the letters A, B, ...
    themselves mean that `text` is a whole prompt, and is left as it is. Raises InputError for
    choices that the format cannot have.
    """
    _one_of(FORMATS, format, "the format")
    _text(text, "the question")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"expected 2 to {len(LETTERS)} choices, found {len(choices)}")
    fixed = FIXED_CHOICES.get(format)
    if fixed and len(choices) != len(fixed):
        raise InputError(f"format {format} has {len(fixed)} choices, not {len(choices)}")
    if list(choices) == list(LETTERS[: len(choices)]):
        prompt = text
    else:
        pairs = zip(LETTERS, choices, strict=False)  # as many letters as there are choices
        lines = "\n".join(f"{letter}. {choice}" for letter, choice in pairs)
        places = {"question": text, "choices": lines}
        prompt = _PLACE.sub(lambda place: places[place[1]], template or TEMPLATES[format])
    return Example(prompt, label, id, tuple(choices))


def num_classes(examples: Sequence[Example]) -> int:
    """The largest number of choices that any of the examples has."""
    return max((len(example.choices) for example in examples), default=0)


# --- files -------------------------------------------------------------------------------------


def load(
    path: Path | str, format: str, limit: int | None = None, template: str | None = None
) -> list[Example]:
    """The examples of a file, in its order; only the first `limit` if that is given.

    format: one of FORMATS. template: as in `question`. Raises InputError naming the file,
    the line and what was expected there if the file is absent, empty or not of this format.
    """
    path = Path(path)
    _one_of(FORMATS, format, "the format")
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be at least 1 example, and is {limit}")
    rows, parse = _READERS[format]
    examples: list[Example] = []
    for line, row in rows(path):
        if len(examples) == limit:
            break
        try:
            text, choices, label, id = parse(row)
            id = id or str(len(examples))
            examples.append(question(text, choices, format, label, id, template))
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
    if not examples:
        raise InputError(f"{path}: holds no examples")
    return examples


def files(path: Path | str, format: str) -> list[Path]:
    """The files that hold a set: `path`, and Winogrande's NAME-labels.lst beside NAME.jsonl."""
    path = Path(path)
    beside = path.with_name(f"{path.stem}-labels.lst")
    return [path, beside] if format == "winogrande" and beside.exists() else [path]


Rows = Iterator[tuple[int, Any]]  # line number, counted from 1, and what stands there
Parsed = tuple[str, Sequence[str], int, str]  # text, choices, label, id or ""


def _json_rows(path: Path) -> Rows:
    for line, text in _text_rows(path):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {line}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {line}: expected a JSON object, found {text[:40]}")
        yield line, row


def _winogrande_rows(path: Path) -> Rows:
    """Rows with "answer", from the second of their files where there is such a file."""
    rows = list(_json_rows(path))
    for beside in files(path, "winogrande")[1:]:
        labels = [label for _, label in _text_rows(beside)]
        if len(labels) != len(rows):
            raise InputError(f"{beside}: {len(labels)} labels for the {len(rows)} rows of {path}")
        for (line, row), label in zip(rows, labels, strict=True):
            if row.setdefault("answer", label) != label:
                raise InputError(f"{path}, line {line}: {beside.name} gives another answer")
    return iter(rows)


def _csv_rows(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        for row in reader:
            if reader.line_num > 1 or row != MMLU_HEADER:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _text_rows(path: Path, latin_1: bool = False) -> Rows:
    """The lines that are not blank."""
    for line, text in enumerate(_read(path, latin_1).split("\n"), start=1):
        if text.strip():
            yield line, text.strip()


def _old_text_rows(path: Path) -> Rows:
    return _text_rows(path, latin_1=True)


def _read(path: Path, latin_1: bool = False) -> str:
    """The text of a UTF-8 file; latin_1: or of a Latin-1 one, if it is not valid UTF-8."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if latin_1:
            return data.decode("latin-1")
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: expected UTF-8 text") from None


# --- rows: each function takes one apart, or raises InputError saying what was expected -----------


def _jsonl(row: dict[str, Any]) -> Parsed:
    choices = [_text(choice, "a choice") for choice in _get(row, "choices", list)]
    id = row.get("id", "")
    if not isinstance(id, (str, int)):
        raise InputError(f"'id' must be a text or a number, not {id!r}")
    return _get(row, "prompt", str), choices, _index(_get(row, "label", int), choices), str(id)


def _arc(row: dict[str, Any]) -> Parsed:
    """ARC and OpenBookQA: the choices carry labels, A to E or 1 to 5; answerKey names one."""
    stem = _get(row, "question", dict)
    choices = _get(stem, "choices", list)
    names = [_get(choice, "label", str) for choice in choices]
    key = _get(row, "answerKey", str)
    if names.count(key) != 1:
        raise InputError(f"'answerKey' must be one of the labels {', '.join(names)}, not {key!r}")
    texts = [_get(choice, "text", str) for choice in choices]
    return _get(stem, "stem", str), texts, names.index(key), _get(row, "id", str)


def _winogrande(row: dict[str, Any]) -> Parsed:
    choices = [_get(row, name, str) for name in ("option1", "option2")]
    label = _one_of(("1", "2"), _get(row, "answer", str), "the answer")
    return _get(row, "sentence", str), choices, label, _get(row, "qID", str)


def _boolq(row: dict[str, Any]) -> Parsed:
    text = f"{_get(row, 'passage', str)}\n{_get(row, 'question', str)}?"
    return text, FIXED_CHOICES["boolq"], int(_get(row, "answer", bool)), ""


def _mmlu(row: list[str]) -> Parsed:
    """MMLU: its authors' files answer A to D and have no header; those with one answer 0 to 3."""
    if len(row) != len(MMLU_HEADER):
        raise InputError(f"expected {len(MMLU_HEADER)} columns, found {len(row)}")
    text, *choices, answer = row
    label = _one_of(("A", "B", "C", "D", "0", "1", "2", "3"), answer, "the answer") % len(choices)
    return _text(text, "the question"), choices, label, ""


def _sst2(row: str) -> Parsed:
    label, _, text = row.partition(" ")
    index = _one_of(("0", "1"), label, "the label before the text")
    return _text(text, "the text"), FIXED_CHOICES["sst2"], index, ""


def _trec(row: str) -> Parsed:
    name, _, text = row.partition(" ")
    index = _one_of(TREC_CLASSES, name.partition(":")[0], "the type before the question")
    return _text(text, "the question"), FIXED_CHOICES["trec"], index, ""


_READERS: dict[str, tuple[Callable[[Path], Rows], Callable[[Any], Parsed]]] = {
    "jsonl": (_json_rows, _jsonl),
    "arc": (_json_rows, _arc),
    "obqa": (_json_rows, _arc),
    "winogrande": (_winogrande_rows, _winogrande),
    "boolq": (_json_rows, _boolq),
    "mmlu": (_csv_rows, _mmlu),
    "sst2": (_old_text_rows, _sst2),
    "trec": (_old_text_rows, _trec),
}

_KINDS = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _get(row: Any, key: str, kind: type) -> Any:
    """row[key], which must be there and be of this kind."""
    if not isinstance(row, dict):
        raise InputError(f"expected an object with the key {key!r}, found {row!r}")
    if key not in row:
        raise InputError(f"key {key!r} is missing")
    value = row[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{key!r} must be {_KINDS[kind]}, not {value!r}")
    return _text(value, repr(key)) if kind is str else value


def _text(value: Any, what: str) -> str:
    """`value`, which must be a text with something in it that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InputError(f"{what} must be a text, not {value!r}")
    if not value.strip():
        raise InputError(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} holds half of a surrogate pair") from None
    return value


def _index(label: int, choices: Sequence[str]) -> int:
    if not 0 <= label < len(choices):
        raise InputError(f"'label' must be in [0, {len(choices)}), the choices, and is {label}")
    return label


def _one_of(names: tuple[str, ...], name: str, what: str) -> int:
    if name not in names:
        raise InputError(f"{what} must be one of {', '.join(names)}, not {name!r}")
    return names.index(name)


# --- token ids and batches ---------------------------------------------------------------------


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
