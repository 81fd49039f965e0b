"""Files of questions: every format's rows, and what each of them must be."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .prompts import FIXED_CHOICES, FORMATS, Example, question
from .text import checked_text, one_of, read_text

TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")  # as its files write them
MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def load(
    path: Path | str, format: str, limit: int | None = None, template: str | None = None
) -> list[Example]:
    """The examples of a file, in its order; only the first `limit` if that is given.

    format: one of FORMATS. template: as in `question`. Raises InputError naming the file,
    the line and what was expected there if the file is absent, empty or not of this format.
    """
    path = Path(path)
    one_of(FORMATS, format, "the format")
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
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if reader.line_num > 1 or row != MMLU_HEADER:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _text_rows(path: Path, latin_1: bool = False) -> Rows:
    """The lines that are not blank."""
    for line, text in enumerate(read_text(path, latin_1).split("\n"), start=1):
        if text.strip():
            yield line, text.strip()


def _old_text_rows(path: Path) -> Rows:
    return _text_rows(path, latin_1=True)


# --- rows: each function takes one apart, or raises InputError saying what was expected -----------


def _jsonl(row: dict[str, Any]) -> Parsed:
    choices = [checked_text(choice, "a choice") for choice in _get(row, "choices", list)]
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
    label = one_of(("1", "2"), _get(row, "answer", str), "the answer")
    return _get(row, "sentence", str), choices, label, _get(row, "qID", str)


def _boolq(row: dict[str, Any]) -> Parsed:
    text = f"{_get(row, 'passage', str)}\n{_get(row, 'question', str)}?"
    return text, FIXED_CHOICES["boolq"], int(_get(row, "answer", bool)), ""


def _mmlu(row: list[str]) -> Parsed:
    """MMLU: its authors' files answer A to D and have no header; those with one answer 0 to 3."""
    if len(row) != len(MMLU_HEADER):
        raise InputError(f"expected {len(MMLU_HEADER)} columns, found {len(row)}")
    text, *choices, answer = row
    label = one_of(("A", "B", "C", "D", "0", "1", "2", "3"), answer, "the answer") % len(choices)
    return checked_text(text, "the question"), choices, label, ""


def _sst2(row: str) -> Parsed:
    label, _, text = row.partition(" ")
    index = one_of(("0", "1"), label, "the label before the text")
    return checked_text(text, "the text"), FIXED_CHOICES["sst2"], index, ""


def _trec(row: str) -> Parsed:
    name, _, text = row.partition(" ")
    index = one_of(TREC_CLASSES, name.partition(":")[0], "the type before the question")
    return checked_text(text, "the question"), FIXED_CHOICES["trec"], index, ""


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
    return checked_text(value, repr(key)) if kind is str else value


def _index(label: int, choices: Sequence[str]) -> int:
    if not 0 <= label < len(choices):
        raise InputError(f"'label' must be in [0, {len(choices)}), the choices, and is {label}")
    return label
