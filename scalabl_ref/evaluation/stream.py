"""The answers to a file of texts, written row by row.

OUT.partial grows by CHUNK rows at a time, and OUT.partial.json says what it is and how many bytes
of it are whole; at the end OUT.partial becomes OUT. After an interruption, even in the middle of a
line, the same call goes on behind the last whole chunk, and OUT is the same to the byte. Rows are
read twice, first to check them all; neither the rows nor the answers are kept in memory.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ..data import Columns, Example, texts
from ..support.errors import InputError
from ..support.fields import json_text
from ..support.files import atomic_write_text, read_json, sha256, writing
from ..support.progress import progress_bar
from .classifier import Classifier, Decision
from .rule import how

CHUNK = 64  # rows between two notes of how far it is, at least
COLUMNS = ("id", "answer", "confidence", "entropy", "mutual_information", "decision")


@dataclass(frozen=True)
class Texts:
    """A file of texts as it is to be read: see `data.texts`. limit: the first rows alone."""

    path: Path
    format: str
    columns: Columns
    names: tuple[str, ...] = ()
    limit: int | None = None

    def rows(self) -> Iterator[tuple[str, Example]]:
        return islice(texts(self.path, self.format, self.columns, self.names), self.limit)


def predict_file(
    clf: Classifier,
    source: Texts,
    out: Path,
    probs: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Write the answers to `source` into OUT, a .csv or a .jsonl file; returns how many there are.

    Columns: COLUMNS, and with `probs` the probability of each choice. say: is told where it goes
    on. Raises InputError before anything is answered if a row cannot be asked, naming it, if OUT
    exists, or if OUT.partial is of another call.
    """
    if out.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"{out}: must end in .csv or .jsonl")
    next(source.rows())  # for columns that are not there: the mistake to mend first
    if out.exists():
        raise InputError(f"{out}: exists already: remove it, or give another --out")
    if probs and out.suffix.lower() == ".csv" and not source.names:
        raise InputError("--probs in a .csv file needs the same choices in all rows: give "
                         "--choices, or an --out that ends in .jsonl")  # fmt: skip
    partial = out.with_name(out.name + ".partial")
    with writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
    with open_binary(partial) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{partial}: another process is writing it: wait, or give another "
                             "--out") from None  # fmt: skip
        settings = _settings(clf, source, probs)
        done = _done(partial, settings)
        total = _check(clf, source)
        if done["rows"]:
            say(f"going on after {done['rows']:,} of {total:,} rows")
        _write(clf, source, file, partial, settings, done, total, probs, out)
        with writing(out):
            os.replace(partial, out)
    _note(partial).unlink(missing_ok=True)
    return total


def open_binary(path: Path) -> IO[bytes]:
    """A file to go on writing. Raises InputError if that is not possible."""
    with writing(path):
        return open(path, "ab")


def _note(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _settings(clf: Classifier, source: Texts, probs: bool) -> dict[str, Any]:
    """All that decides the bytes of OUT."""
    return {
        **how(clf),
        **clf.wording.facts(),
        "temperature": clf.temperature,
        "threshold": "infinite" if clf.threshold == math.inf else clf.threshold,
        "batch": clf.batch,
        "data_sha256": sha256(source.path),
        "format": source.format,
        "text_column": source.columns.text,
        "choices": list(source.names),
        "limit": source.limit,
        "probs": probs,
    }


def _done(partial: Path, settings: dict[str, Any]) -> dict[str, int]:
    """How many rows and bytes of the partial file are whole."""
    note = _note(partial)
    if not note.exists():
        return {"rows": 0, "bytes": 0}
    found = read_json(note)
    theirs, ours = found.get("settings"), json_safe(settings)
    if theirs != ours:
        theirs = theirs if isinstance(theirs, dict) else {}
        other = ", ".join(key for key in ours if theirs.get(key) != ours[key])
        raise InputError(
            f"{partial}: was begun with another {other[:200]}: give another --out, or remove it "
            f"with `rm {partial} {note}`"
        )
    done = {key: found.get(key) for key in ("rows", "bytes")}
    size = partial.stat().st_size
    if not all(isinstance(v, int) and v >= 0 for v in done.values()) or found["bytes"] > size:
        raise InputError(f"{partial}: does not fit its note {note.name}: remove both with "
                         f"`rm {partial} {note}`")  # fmt: skip
    return done  # type: ignore[return-value]


def json_safe(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    return json.loads(json_text(value))


def _check(clf: Classifier, source: Texts) -> int:
    """The number of rows. Raises InputError naming the first that cannot be asked."""
    count = 0
    for chunk in _chunks(source, clf.batch):
        try:
            clf.encode([example for _, example in chunk])
        except InputError:
            for place, example in chunk:
                try:
                    clf.encode([example])
                except InputError as error:
                    raise InputError(f"{source.path}, {place}: {error}") from None
            raise
        count += len(chunk)
    return count


def _chunks(source: Texts, batch: int) -> Iterator[list[tuple[str, Example]]]:
    """The rows, a whole number of batches at a time."""
    rows, size = source.rows(), max(1, batch) * max(1, CHUNK // max(1, batch))
    while chunk := list(islice(rows, size)):
        yield chunk


def _write(
    clf: Classifier,
    source: Texts,
    file: IO[bytes],
    partial: Path,
    settings: dict[str, Any],
    done: dict[str, int],
    total: int,
    probs: bool,
    out: Path,
) -> None:
    """Append the rows that are missing, and note after each chunk how far it is."""
    line = _csv_line if out.suffix.lower() == ".csv" else _json_line
    with writing(partial):
        file.truncate(done["bytes"])
        if not done["bytes"] and line is _csv_line:
            names = [f"prob:{name}" for name in source.names] if probs else []
            file.write(_row([*COLUMNS, *names]))
    at = 0
    with progress_bar(total, "predict", "row", done["rows"]) as bar:
        for chunk in _chunks(source, clf.batch):
            at += len(chunk)
            if at <= done["rows"]:
                continue
            examples = [example for _, example in chunk]
            found = clf.decisions(examples)
            with writing(partial):
                for example, decision in zip(examples, found, strict=True):
                    file.write(line(example, decision, probs))
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            note = {"settings": settings, "rows": at, "bytes": size}
            atomic_write_text(_note(partial), json_text(note) + "\n")
            bar.update(len(chunk))


def _values(example: Example, decision: Decision) -> list[Any]:
    d = decision
    return [example.id, d.answer, d.confidence, d.entropy, d.mutual_information, d.decision]


def _csv_line(example: Example, decision: Decision, probs: bool) -> bytes:
    return _row([*_values(example, decision), *(decision.probs if probs else ())])


def _row(cells: list[Any]) -> bytes:
    """A line of CSV, its numbers with 6 significant digits; .jsonl has all of them."""
    cells = [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8")


def _json_line(example: Example, decision: Decision, probs: bool) -> bytes:
    record = dict(zip(COLUMNS, _values(example, decision), strict=True))
    if probs:
        record |= {"choices": list(example.choices), "probs": list(decision.probs)}
    return (json_text(record) + "\n").encode("utf-8")
