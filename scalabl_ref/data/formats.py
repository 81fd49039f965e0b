"""Files of questions: the rows of every format, checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..support.errors import InputError
from .prompts import FIXED_CHOICES, FORMATS, Example, question
from .rows import (
    Rows,
    is_json,
    json_rows,
    nested,
    records,
    streamed_json_rows,
    table,
    table_of,
    text_rows,
)
from .text import checked_text, lines_of, one_of, read_text, shown
from .tokenizer import LETTERS

TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")  # as its files write them
TREC_HUB = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")  # 0 to 5 in the Hub's coarse_label
MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]

# The usual names of a CSV file's columns, in upper or lower case.
TEXT_COLUMNS = ("text", "sentence", "prompt", "question")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True)
class Columns:
    """The columns of a row's text and its label, in formats csv and jsonl.

    None: in a table its only column out of TEXT_COLUMNS or LABEL_COLUMNS, in jsonl "prompt" and
    "label".
    """

    text: str | None = None
    label: str | None = None


def format_of(path: Path | str) -> str:
    """The format by the ending of a file's name: csv for .csv and .tsv, otherwise jsonl."""
    return "csv" if Path(path).suffix.lower() in (".csv", ".tsv") else "jsonl"


def load(
    path: Path | str,
    format: str,
    limit: int | None = None,
    template: str | None = None,
    columns: Columns | None = None,
    names: Sequence[str] | None = None,
) -> list[Example]:
    """The examples of a file, in its order; only the first `limit` if that is given.

    format: one of FORMATS. template: as in `question`. names: the labels that the model was trained
    on, in order: the choices of every row of a csv file, or of a jsonl file without "choices"; None
    takes all labels of the whole file, sorted. columns: for these two formats. Raises InputError
    naming the file, the line and the expected content if the file is absent, empty or of another
    format.
    """
    path = Path(path)
    one_of(FORMATS, format, "the format")
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be at least 1 example, and is {limit}")
    rows, parse = _reader(path, format, columns or Columns(), names)
    examples: list[Example] = []
    for place, row in rows:
        if len(examples) == limit:
            break
        try:
            text, choices, label, id = parse(row)
            id = id or str(len(examples))
            examples.append(question(text, choices, format, label(), id, template))
        except InputError as error:
            raise InputError(f"{path}, {place}: {error}") from None
    if not examples:
        raise InputError(f"{path}: holds no examples")
    return examples


def texts(
    path: Path | str,
    format: str,
    columns: Columns | None = None,
    names: Sequence[str] = (),
) -> Iterator[tuple[str, Example]]:
    """The rows of a file as questions, with or without their labels: (place, example), in order.

    Files of csv and jsonl are read row by row, and take no more memory if they have more rows.
    names: the choices of a row that has none of its own. A label is not read, and is 0 here. In
    jsonl the text is "prompt" or "text". Raises InputError as `load` does.
    """
    path = Path(path)
    one_of(FORMATS, format, "the format")
    if format in ("csv", "jsonl"):
        rows, parse = _streamed(path, format, columns or Columns(), names)
    else:
        rows, parse = _reader(path, format, columns or Columns(), names)
    empty = True
    for number, (place, row) in enumerate(rows):
        empty = False
        try:
            text, choices, _, id = parse(row)
            example = question(text, choices or names, format, 0, id or str(number))
        except InputError as error:
            raise InputError(f"{path}, {place}: {error}") from None
        yield place, example
    if empty:
        raise InputError(f"{path}: holds no texts")


def _streamed(
    path: Path, format: str, columns: Columns, names: Sequence[str]
) -> tuple[Rows, Callable[[Any], Parsed]]:
    lines = partial(lines_of, path)
    if format == "jsonl":
        return streamed_json_rows(path, lines()), partial(_text_of, key=columns.text, names=names)
    if is_json(next(iter(lines()), "")):
        raise InputError(f"{path}: holds JSON, not a table: give --format jsonl")
    header, rows = table_of(path, lines)
    if not header:
        raise InputError(f"{path}: holds no texts")
    key = _column(path, header, columns.text, TEXT_COLUMNS, "--text-column")
    return rows, partial(_csv, keys=(key, ""), names=names)


def _text_of(row: dict[str, Any], key: str | None, names: Sequence[str]) -> Parsed:
    """A row of jsonl whose label may be missing."""
    key = key or ("text" if "text" in row and "prompt" not in row else "prompt")
    return _jsonl(row, (key, "label"), names or None if "choices" not in row else None)


def files(path: Path | str, format: str) -> list[Path]:
    """The files that hold a set: `path`, and Winogrande's NAME-labels.lst beside NAME.jsonl."""
    path = Path(path)
    beside = path.with_name(f"{path.stem}-labels.lst")
    return [path, beside] if format == "winogrande" and beside.exists() else [path]


# Text, choices, the label (a row without one has no use for it), id or "".
Parsed = tuple[str, Sequence[str], Callable[[], int], str]


def _reader(
    path: Path, format: str, columns: Columns, names: Sequence[str] | None
) -> tuple[Rows, Callable[[Any], Parsed]]:
    if format in ("csv", "jsonl"):
        return _own(path, format, columns, names)
    if columns != Columns():
        raise InputError(
            f"--text-column and --label-column are for formats csv and jsonl, not for {format}"
        )
    parse, header, other = _READERS[format]
    text = read_text(path, latin_1=other is text_rows)
    if is_json(text):
        rows = json_rows(path, text)
    else:
        found, rows = table(path, text)
        if not header & set(found):
            rows = other(path, text)
    return _with_labels_beside(path, rows) if format == "winogrande" else rows, parse


def _with_labels_beside(path: Path, rows: Rows) -> Rows:
    """Rows with "answer", taken from the second of Winogrande's files if it exists."""
    kept = list(rows)
    for beside in files(path, "winogrande")[1:]:
        labels = [label for _, label in text_rows(beside, read_text(beside))]
        if len(labels) != len(kept):
            raise InputError(f"{beside}: {len(labels)} labels for the {len(kept)} rows of {path}")
        for (place, row), label in zip(kept, labels, strict=True):
            if row.setdefault("answer", label) != label:
                raise InputError(f"{path}, {place}: {beside.name} gives another answer")
    return iter(kept)


def _mmlu_records(path: Path, text: str) -> Rows:
    found = enumerate(records(path, text, ","))
    return (record for i, record in found if i or record[1] != MMLU_HEADER)


# --- the user's own files: the labels of all rows are the choices of each -------------------------


def _own(
    path: Path, format: str, columns: Columns, names: Sequence[str] | None
) -> tuple[Rows, Callable[[Any], Parsed]]:
    text = read_text(path)
    if format == "jsonl":
        keys = columns.text or "prompt", columns.label or "label"
    elif is_json(text):
        raise InputError(f"{path}: holds JSON, not a table: give --format jsonl")
    else:
        header = table(path, text)[0]
        if not header:
            raise InputError(f"{path}: holds no examples")
        text_key = _column(path, header, columns.text, TEXT_COLUMNS, "--text-column")
        others = {text_key, "id"}
        label_key = _column(path, header, columns.label, LABEL_COLUMNS, "--label-column", others)
        keys = text_key, label_key

    def rows() -> Rows:
        return json_rows(path, text) if format == "jsonl" else table(path, text)[1]

    if names is None:
        names = _names(path, rows(), keys[1], format)
    if format == "jsonl":
        return rows(), partial(_jsonl, keys=keys, names=names)
    return rows(), partial(_csv, keys=keys, names=names or ())


def _column(
    path: Path,
    header: list[str],
    asked: str | None,
    usual: tuple[str, ...],
    option: str,
    others: Collection[str] = (),
) -> str:
    """The column with the name `asked`; without it, the only one with a usual name.

    others: columns that an error does not propose, as they have other uses.
    """
    found = [name for name in header if (name == asked if asked else name.lower() in usual)]
    if len(found) != 1:
        kind = repr(asked) if asked else ", ".join(usual)
        count = f"{len(found)} columns are" if found else "no column is"
        free = [name for name in header if name not in others]
        if not free:
            raise InputError(f"{path}: has no column of labels: there are {shown(header, 100)}")
        have = shown(free, 100)
        raise InputError(f"{path}: {count} called {kind}: give {option} one of {have}")
    return found[0]


def _names(path: Path, rows: Rows, key: str, format: str) -> Sequence[str] | None:
    """All labels of these rows, sorted; None if the rows have choices of their own."""
    found: set[str] = set()
    for place, row in rows:
        try:
            if format == "jsonl" and "choices" in row:
                if not found:
                    return None
                raise InputError("has 'choices', and the rows before have none")
            found.add(_name(row, key, format))
        except InputError as error:
            raise InputError(f"{path}, {place}: {error}") from None
    names: list[str] = sorted(found)
    if found and all(map(_NUMBER.fullmatch, found)):
        names.sort(key=float)
        parts = [name for name in names if float(name) % 1]
        if parts:
            raise InputError(f"{path}: {key!r} must have names or whole numbers, not {parts[0]}")
    if found and not 2 <= len(names) <= len(LETTERS):
        some = shown(names[:4], 100)
        expected = f"expected 2 to {len(LETTERS)} different labels in {key!r}"
        without = ", as no row has 'choices'" if format == "jsonl" else ""
        raise InputError(f"{path}: {expected}{without}, found {len(names)}: {some}")
    return names


_LONGEST_LABEL = 1000  # characters: each row's prompt lists all labels
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)


def _name(row: Any, key: str, format: str) -> str:
    """The label of a row: a text, or a whole number as its digits."""
    value = _get(row, key, None, "--label-column" if format == "jsonl" else "")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    name = checked_text(value, repr(key)).strip()
    if len(name) > _LONGEST_LABEL:
        raise InputError(
            f"{key!r} has {len(name):,} characters: expected a label of at most {_LONGEST_LABEL:,}"
        )
    return name


def _csv(row: dict[str, Any], keys: tuple[str, str], names: Sequence[str]) -> Parsed:
    text = _get(row, keys[0], str)
    return text, names, lambda: _known(_name(row, keys[1], "csv"), names), row.get("id", "")


def _jsonl(row: dict[str, Any], keys: tuple[str, str], names: Sequence[str] | None) -> Parsed:
    text = _get(row, keys[0], str, "--text-column")
    id = row.get("id", "")
    if not isinstance(id, (str, int)):
        raise InputError(f"'id' must be a text or a number, not {shown(id)}")
    if names is not None and "choices" not in row:
        known = names
        return text, known, lambda: _known(_name(row, keys[1], "jsonl"), known), str(id)
    choices = [checked_text(choice, "a choice") for choice in _get(row, "choices", list)]
    if not choices:
        raise InputError("'choices' is empty")
    return (
        text, choices, lambda: _place(_get(row, keys[1], None, "--label-column"), choices), str(id)
    )  # fmt: skip


def _known(label: str, names: Sequence[str]) -> int:
    if label in names:
        return list(names).index(label)
    near = _near(label, names)
    hint = f": did you mean {shown(near)}?" if near else ""
    raise InputError(f"label {shown(label)} is not one of {shown(list(names), 80)}{hint}")


def _place(label: Any, choices: list[str]) -> int:
    """The index in `choices` of a label, which is an index or a name."""
    places = f"0 to {len(choices) - 1}"
    hint = ""
    if isinstance(label, str):
        if choices.count(label) == 1:
            return choices.index(label)
        near = _near(label, choices)
        if label.strip() in map(str, range(len(choices))):
            places = label.strip()
        elif near and choices.count(near) == 1:
            places, hint = str(choices.index(near)), f": did you mean {shown(near)}?"
    elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
        return label
    raise InputError(
        f"label must be the place in choices, from 0 (here {places}), or one of their names, "
        f"not {shown(label)}{hint}"
    )


def _near(name: str, names: Sequence[str]) -> str | None:
    """The most similar of `names`, if one is similar, by their first hundred letters."""
    starts = {other.lower()[:100]: other for other in names}
    found = difflib.get_close_matches(name.lower()[:100], starts, n=1)
    return starts[found[0]] if found else None


# --- public sets: each function takes a row apart, as published or as the Hub's datasets has it,
# or raises InputError saying what was expected ----------------------------------------------------


def _arc(row: dict[str, Any]) -> Parsed:
    """ARC and OpenBookQA: the choices carry labels, A to E or 1 to 5; answerKey names one.

    As published, they are a list of {"text", "label"} under "question"; on the Hub, two lists.
    """
    id = _get(row, "id", str)
    if isinstance(row.get("question"), dict):
        row = row["question"] | {k: v for k, v in row.items() if k == "answerKey"}
        stem, choices = _get(row, "stem", str), _get(row, "choices", list)
        names = [_get(choice, "label", str) for choice in choices]
        texts = [_get(choice, "text", str) for choice in choices]
    else:
        stem = _get(row, "question_stem" if "question_stem" in row else "question", str)
        choices = _get(_unnested(row), "choices", dict)
        names, texts = (
            [checked_text(item, f"{key!r} of a choice") for item in _get(choices, key, list)]
            for key in ("label", "text")
        )
        if len(names) != len(texts):
            raise InputError(f"'choices' has {len(names)} labels for {len(texts)} texts")
    return stem, texts, partial(_answer, row, "answerKey", names), id


def _winogrande(row: dict[str, Any]) -> Parsed:
    choices = [_get(row, name, str) for name in ("option1", "option2")]
    id = _get(row, "qID", str) if "qID" in row else ""
    return _get(row, "sentence", str), choices, partial(_answer, row, "answer", ("1", "2")), id


def _boolq(row: dict[str, Any]) -> Parsed:
    """BoolQ: "answer" is true or false, or, as in SuperGLUE, "label" is 0 or 1."""
    text = f"{_get(row, 'passage', str)}\n{_get(row, 'question', str)}?"
    if "label" in row and "answer" not in row:
        label = partial(_answer, row, "label", ("0", "1"))
    else:
        label = partial(_answer, row, "answer", ("false", "true"))
    return text, FIXED_CHOICES["boolq"], label, ""


def _mmlu(row: list[str] | dict[str, Any]) -> Parsed:
    """MMLU: its authors' files have answers A to D and no header; others 0 to 3 and a header."""
    if isinstance(row, list):
        if len(row) != len(MMLU_HEADER):
            raise InputError(f"expected {len(MMLU_HEADER)} columns, found {len(row)}")
        row = {"question": row[0], "choices": row[1:5], "answer": row[5]}
    text, choices = _get(row, "question", str), _get(_unnested(row), "choices", list)
    choices = [checked_text(choice, "a choice") for choice in choices]
    if len(choices) != 4:
        raise InputError(f"expected 4 choices, found {len(choices)}")
    names = ("A", "B", "C", "D", "0", "1", "2", "3")
    return text, choices, lambda: _answer(row, "answer", names) % 4, ""


def _sst2(row: str | dict[str, Any]) -> Parsed:
    if isinstance(row, dict):
        text = _get(row, "sentence" if "sentence" in row else "text", str)
        label = partial(_answer, row, "label", ("0", "1"))
        return text.strip(), FIXED_CHOICES["sst2"], label, ""
    return _line(row, ("0", "1"), "sst2", "the label before the text")


def _line(row: str, names: tuple[str, ...], format: str, what: str) -> Parsed:
    """A line "LABEL text", or "LABEL:part text"; a line without a label is all text."""
    name, _, text = row.partition(" ")
    if format == "trec":
        name = name.partition(":")[0]
    if name not in names:
        return row, FIXED_CHOICES[format], lambda: one_of(names, name, what), ""
    label = names.index(name)
    whole = checked_text(text, "the question" if format == "trec" else "the text")
    return whole, FIXED_CHOICES[format], lambda: label, ""


def _trec(row: str | dict[str, Any]) -> Parsed:
    if isinstance(row, dict):
        text = _get(row, "text", str).strip()
        names = (*TREC_HUB, *"012345")

        def label() -> int:
            place = _answer(row, "coarse_label", names)
            return TREC_CLASSES.index(TREC_HUB[place % len(TREC_HUB)])

        return text, FIXED_CHOICES["trec"], label, ""
    return _line(row, TREC_CLASSES, "trec", "the type before the question")


# By format: the function that parses a row; columns of which a table must have one; the reader of a
# file that is neither JSON nor such a table.
_READERS: dict[str, tuple[Callable[[Any], Parsed], set[str], Callable[[Path, str], Rows]]] = {
    "arc": (_arc, {"answerKey"}, json_rows),
    "obqa": (_arc, {"answerKey"}, json_rows),
    "winogrande": (_winogrande, {"option1"}, json_rows),
    "boolq": (_boolq, {"passage"}, json_rows),
    "mmlu": (_mmlu, {"choices"}, _mmlu_records),
    "sst2": (_sst2, {"sentence", "label"}, text_rows),
    "trec": (_trec, {"coarse_label"}, text_rows),
}

_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def _get(row: Any, key: str, kind: type | None = None, option: str = "") -> Any:
    """row[key]. Raises InputError if it is missing or not a `kind`; `option` names another key."""
    if not isinstance(row, dict):
        raise InputError(f"expected an object with the key {key!r}, found {shown(row)}")
    if key not in row:
        other = f" ({option} names another)" if option else ""
        raise InputError(f"key {key!r} is missing{other}: there are {shown(list(row), 100)}")
    value = row[key]
    if kind and not isinstance(value, kind):
        raise InputError(f"{key!r} must be {_KINDS[kind]}, not {shown(value)}")
    return checked_text(value, repr(key)) if kind is str else value


def _unnested(row: dict[str, Any]) -> dict[str, Any]:
    """The row, with its choices as a list if they are the cell of a table."""
    choices = row.get("choices")
    return row | {"choices": nested(choices)} if isinstance(choices, str) else row


def _answer(row: dict[str, Any], key: str, names: Sequence[str]) -> int:
    """The index in `names` of row[key]; numbers and booleans count as their texts."""
    value = _get(row, key)
    if value in (None, "", -1, "-1"):
        raise InputError(f"{key!r} is {value!r}: this split has no labels, take another")
    text = str(value)
    text = text.lower() if text in ("True", "False", "TRUE", "FALSE") else text
    if isinstance(value, (list, dict)) or list(names).count(text) != 1:
        raise InputError(f"{key!r} must be one of {', '.join(names)}, not {shown(value)}")
    return list(names).index(text)
