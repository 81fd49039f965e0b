"""Rows of files: lines, JSON objects, CSV and TSV. Each has its place in the file, for errors."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..support.errors import InputError
from .text import shown

Lines = Callable[[], Iterable[str]]
Rows = Iterator[tuple[str, Any]]  # "line 3" or, in a JSON array, "entry 3"; and the row there

_BLANK = re.compile(r"\s*")
_OBJECT = re.compile(r'\s*(\[\s*)?\{\s*"')
# Parts of a list or a dictionary as Python writes it, with or without NumPy's arrays: a text in
# quotes with the white space before the next text; the beginning and the end of an array. A quote
# without its pair reaches to the end, so that the search takes linear time.
_PYTHON = re.compile(
    r"""(?P<text>'(?:[^'\\]|\\.)*(?:'|\Z)|"(?:[^"\\]|\\.)*(?:"|\Z))(?P<next>\s+(?=['"]))?|"""
    r"""array\(|(?:,\s*dtype=\w+)?\)""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x(..)|u(.{4})|U(.{8})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}


def text_rows(path: Path, text: str) -> Rows:
    """The lines that are not blank. path: the file's name in errors, as for all readers here."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line.strip()


def is_json(text: str) -> bool:
    """Whether it begins like a JSON object, or an array of them."""
    return _OBJECT.match(text) is not None


def json_rows(path: Path, text: str, line: int = 1, entry: int = 0) -> Rows:
    """JSON objects, one after another on lines of their own, or all in one array.

    line, entry: of the first line of the text, and how many objects of the file are before it.
    """
    decode = json.JSONDecoder().raw_decode
    at = _after_blank(text, 0)
    array = text.startswith("[", at)
    at = _after_blank(text, at + array)
    counted = 0
    while at < len(text) and not (array and entry == 0 and text[at] == "]"):
        entry, line, counted = entry + 1, line + text.count("\n", counted, at), at
        place = f"entry {entry}" if array else f"line {line}"
        hint = ": is --format right?" if entry == 1 else ""
        try:
            row, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, {place}: not JSON: {shown(error)}{hint}") from None
        if not isinstance(row, dict):
            found = f"found {shown(row)}{hint}"
            raise InputError(f"{path}, {place}: expected a JSON object, {found}")
        yield place, row
        at = _after_blank(text, end)
        if array and text[at : at + 1] != ",":
            break
        at = _after_blank(text, at + array)
    if array and text[at:].rstrip() != "]":
        raise InputError(f"{path}: not JSON: expected , or ] and no more after entry {entry}")


def streamed_json_rows(path: Path, lines: Iterable[str]) -> Rows:
    """`json_rows` of a file that is not in memory, as long as each object is on a line of its own.

    From a line on that is no object by itself, the rest is read into memory.
    """
    entry, rest = 0, iter(lines)
    for number, line in enumerate(rest, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            yield from json_rows(path, line + "".join(rest), number, entry)
            return
        entry += 1
        yield f"line {number}", row


def _after_blank(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


def table(path: Path, text: str) -> tuple[list[str], Rows]:
    """The header of a CSV or TSV file, and the rows below it as {column: cell}.

    The separator is a tab if the name ends in .tsv, else the one of comma, tab and semicolon that
    is most frequent in the header.
    """
    return table_of(path, lambda: io.StringIO(text, newline=""))


def table_of(path: Path, lines: Lines) -> tuple[list[str], Rows]:
    """`table` of a file that is not in memory. lines: gives all its lines, each time anew."""
    first = next((line for line in lines() if line.strip()), "").strip()
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",", "\t", ";", key=first.count)
    quotes = delimiter != "\t" or _quotes_pair(lines())
    found = records(path, lines(), delimiter, quotes)
    header = [name.strip() for name in next(found, ("", []))[1]]

    def rows() -> Rows:
        for place, cells in found:
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, {place}: expected {len(header)} columns, found {len(cells)}"
                    + (": a text with a comma must be in quotes" if delimiter == "," else "")
                )
            yield place, dict(zip(header, cells, strict=True))

    return header, rows()


def records(path: Path, text: str | Iterable[str], delimiter: str, quotes: bool = True) -> Rows:
    """The cells of the rows of a CSV file that are not blank; the place is a row's first line."""
    line = 1
    reader = _reader(text, delimiter, quotes)
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield f"line {line}", cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not CSV: {error}") from None


def _reader(text: str | Iterable[str], delimiter: str, quotes: bool) -> Any:
    class Dialect(csv.excel):
        strict = True
        quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE

    lines = io.StringIO(text, newline="") if isinstance(text, str) else text
    return csv.reader(lines, Dialect, delimiter=delimiter)


def _quotes_pair(text: str | Iterable[str]) -> bool:
    """Whether quotes in a TSV file have the meaning that they have in CSV.

    In many files, such as GLUE's, a quote is an ordinary letter. A quote at the start of a cell
    would then reach to another one rows later, across tabs and line breaks.
    """
    try:
        cells = (cell for row in _reader(text, "\t", True) for cell in row)
        return not any("\t" in cell and "\n" in cell for cell in cells)
    except csv.Error:
        return False


def nested(cell: str) -> Any:
    """The list or object in a cell of a table, as JSON or as pandas writes it (its repr).

    Returns any other cell unchanged.
    """
    for text in (cell, _PYTHON.sub(_as_json, cell)):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            continue
    return cell


def _as_json(found: re.Match[str]) -> str:
    if not found["text"]:
        return ""
    text = _ESCAPE.sub(_unescaped, found["text"][1:-1])
    return json.dumps(text) + (", " if found["next"] else "")


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    try:
        return chr(int(code, 16)) if code else _ESCAPED.get(found[4], found[0])
    except (ValueError, OverflowError):
        return found[0]
