"""Files: read with errors that name them, and written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import InputError

_POINTER = b"version https://git-lfs.github.com/"


def refuse_pointer(path: Path) -> None:
    """Raise InputError if a file holds a git-lfs pointer instead of its contents."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # the caller reports it when it reads the file
    if start == _POINTER:
        raise InputError(f"{path}: is a git-lfs pointer: fetch the file itself with git lfs pull")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Within the block an OSError becomes an InputError: no such file, or it cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if it is absent or is not an object."""
    with reading(path):
        data = Path(path).read_bytes()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad text, a number too long, nesting too deep
        refuse_pointer(path)
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def sha256(path: Path, progress: Callable[[int], Any] = lambda size: None) -> str:
    """SHA-256 of a file. Raises InputError if it cannot be read."""
    digest = hashlib.sha256()
    with reading(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Within the block an OSError becomes an InputError: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


class _Named(io.FileIO):
    """A file whose write errors are InputErrors that name `path`."""

    def __init__(self, file: Path | str, mode: str, path: Path | str) -> None:
        super().__init__(file, mode)
        self._path = path

    def write(self, data: Any) -> int:
        with writing(self._path):
            return super().write(data)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` if the block ends without an error, else is deleted.

    It is written under a temporary name in the same folder, flushed to disk, then renamed: a reader
    sees the old file or the new one. Raises InputError naming `path` if it cannot be written. Other
    errors in the block, such as those of a file that it reads, stay as they are.
    """
    path = Path(path)
    with writing(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        os.close(descriptor)
        with io.BufferedWriter(_Named(name, "wb", path)) as file:
            yield file
            file.flush()
            with writing(path):
                os.fsync(file.fileno())
        with writing(path):
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    atomic_write_texts({path: text})


def atomic_write_texts(texts: Mapping[Path | str, str]) -> None:
    """Write several files, all or none; the first one appears last."""
    with ExitStack() as stack:
        for path, text in texts.items():
            file = stack.enter_context(atomic_write(path))
            file.write(text.encode("utf-8"))
            file.flush()  # a full disk shows before the first of them is renamed


def open_log(path: Path | str) -> IO[str]:
    """A text file to add lines to, each written at once. Raises InputError if writing fails."""
    with writing(path):
        file = _Named(path, "ab", path)
    return io.TextIOWrapper(io.BufferedWriter(file), "utf-8", newline="\n", line_buffering=True)


def make_folder(path: Path | str) -> None:
    """Make the folder `path` and its parents. Raises InputError if that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder: {error.strerror}") from None


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all. Raises InputError if either cannot be read or written."""
    try:
        with open(source, "rb") as file, atomic_write(target) as out:
            shutil.copyfileobj(file, out)
    except OSError as error:
        raise InputError(f"{source}: cannot be copied: {error.strerror}") from None


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block ends without an error, else is deleted.

    Raises InputError if `path` exists already or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        with writing(path):
            temporary.chmod(0o777 & ~_umask())
            os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, InputError):  # the user does not know the temporary name
            raise InputError(str(error).replace(str(temporary), str(path))) from None
        raise


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
