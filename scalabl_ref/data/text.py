"""Texts of files and rows, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..support.errors import InputError
from ..support.files import reading

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def read_text(path: Path, latin_1: bool = False) -> str:
    """The text of a UTF-8 file; latin_1: or of a Latin-1 one, if it is not valid UTF-8."""
    with reading(path):
        data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: is UTF-16 text: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if latin_1:
            return data.decode("latin-1")
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: expected UTF-8 text") from None


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, read one by one; errors as of `read_text`."""
    with reading(path), open(path, "rb") as file:
        for number, data in enumerate(file, start=1):
            if number == 1 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError(f"{path}: is UTF-16 text: save it as UTF-8")
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path}, line {number}: expected UTF-8 text") from None
            yield from _LINE.findall(text) if "\r" in text[:-2] else (text,)


def shown(value: Any, most: int = 60) -> str:
    """`value` as a message shows it: its repr, or an error's text, cut to `most` characters."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def checked_text(value: Any, what: str) -> str:
    """`value`. Raises InputError unless it is a text, not blank, that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InputError(f"{what} must be a text, not {shown(value)}")
    if not value.strip():
        raise InputError(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} holds half of a surrogate pair") from None
    return value


def one_of(names: tuple[str, ...], name: str, what: str) -> int:
    if name not in names:
        raise InputError(f"{what} must be one of {', '.join(names)}, not {shown(name)}")
    return names.index(name)
