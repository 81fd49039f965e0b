"""Files that are written whole or not at all, and what is said of those that cannot be."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.support.files import (
    atomic_write,
    atomic_write_text,
    atomic_write_texts,
    copy_file,
    make_folder,
    new_folder,
    open_log,
    read_json,
    sha256,
)
from scalabl_ref.support.tensors import Stored, load_tensors, save_tensors, write_tensors

ROOM = 4096  # bytes that a file may have where `full_disk` is on
LARGE = torch.zeros(ROOM)


@contextmanager
def full_disk(room: int = ROOM) -> Iterator[None]:
    """No file may have more than so many bytes: a full disk, but for the reason that it gives."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who is not root, whom no permission binds."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def write_log(path: Path) -> None:
    with open_log(path) as log:
        for _ in range(ROOM):
            log.write("a line\n")


def copy(path: Path) -> None:
    source = path.with_name("source")
    source.write_bytes(bytes(2 * ROOM))
    with full_disk():
        copy_file(source, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "save_tensors": lambda path: save_tensors(path, [("a", LARGE)]),
    "write_tensors": lambda path: write_tensors(path, {"a": Stored.held(LARGE)}),
    "atomic_write_text": lambda path: atomic_write_text(path, "x" * 2 * ROOM),
    "open_log": write_log,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, name):
    path = tmp_path / "out"
    with full_disk(), pytest.raises(InputError, match="/out: cannot be written: File too large"):
        WRITERS[name](path)
    assert os.listdir(tmp_path) == (["out"] if name == "open_log" else [])


def test_a_copy_names_the_file_that_is_at_fault(tmp_path):
    with pytest.raises(InputError, match="/copy: cannot be written: File too large"):
        copy(tmp_path / "copy")
    assert os.listdir(tmp_path) == ["source"]
    with pytest.raises(InputError, match="/absent: cannot be copied: No such file"):
        copy_file(tmp_path / "absent", tmp_path / "copy")


def test_a_log_goes_on_where_it_was_and_each_line_is_there_at_once(tmp_path):
    path = tmp_path / "log"
    path.write_text("one\n")
    with open_log(path) as log:
        log.write("zwölf\n")
        assert path.read_bytes() == b"one\nzw\xc3\xb6lf\n"


def test_a_folder_is_made_with_its_parents_unless_it_is_there(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()


def test_the_digest_of_a_file(tmp_path):
    """The digests are those of the SHA-256 standard; progress is told after each block."""
    path, told = tmp_path / "file", []
    path.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(path, told.append) == abc and told == [3]
    path.write_bytes(b"a" * 1_000_000)
    million = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert sha256(path) == million
    path.write_bytes(bytes(2**20 + 5))
    sha256(path, told.append)
    assert told == [3, 2**20, 5]
    with pytest.raises(InputError, match="/gone: no such file"):
        sha256(tmp_path / "gone")


def test_a_blocks_own_errors_are_not_those_of_the_file_it_writes(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "out"):
        (tmp_path / "absent").read_bytes()
    assert os.listdir(tmp_path) == []


def test_a_file_cannot_become_a_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        atomic_write_text(tmp_path, "text")
    atomic_write_text(tmp_path / "file", "text")
    for path in ("file/out", "file/more/out"):
        with pytest.raises(InputError, match="cannot be written: Not a directory"):
            atomic_write_text(tmp_path / path, "text")
    with pytest.raises(InputError, match="file: cannot be made a folder"):
        make_folder(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"


def test_several_files_are_written_or_none(tmp_path):
    """The first one appears last: where it is, all are."""
    one, two = tmp_path / "one", tmp_path / "two"
    atomic_write_texts({one: "é", two: ""})
    assert (one.read_bytes(), two.read_bytes()) == (b"\xc3\xa9", b"")
    atomic_write_texts({one: "1", two: "2"})
    for texts in ({one: "3", two: "4" * 2 * ROOM}, {one: "3" * 2 * ROOM, two: "4"}):
        with full_disk(), pytest.raises(InputError, match="cannot be written"):
            atomic_write_texts(texts)
    assert (one.read_text(), two.read_text()) == ("1", "2")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    with pytest.raises(InputError, match="cannot be written"):
        atomic_write_texts({tmp_path: "3", two: "4"})
    assert two.read_text() == "4"


def test_a_new_folder_is_named_as_it_will_be(tmp_path):
    with (
        pytest.raises(InputError, match="/new/file: cannot be written"),
        new_folder(tmp_path / "new") as folder,
        full_disk(),
    ):
        atomic_write_text(folder / "file", "x" * 2 * ROOM)
    assert os.listdir(tmp_path) == []
    with (
        pytest.raises(InputError, match="/new: cannot be written: Directory not empty"),
        new_folder(tmp_path / "new") as folder,
    ):
        make_folder(tmp_path / "new" / "of another process")
    assert os.listdir(tmp_path) == ["new"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "deep" / "new" / "file").read_text() == "whole"
    with pytest.raises(InputError, match="exists already"), new_folder(tmp_path / "deep" / "new"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), new_folder(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    """As those that open() makes: colleagues may read the results, if the user lets them."""
    before = os.umask(umask)
    try:
        atomic_write_text(tmp_path / "a.json", "{}")
        save_tensors(tmp_path / "a.safetensors", [("a", torch.zeros(1))])
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        most = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == most & ~umask, path


@pytest.fixture
def shut(tmp_path_factory) -> Iterator[Path]:
    """A folder that others than root may list, with files that they may not read."""
    folder = tmp_path_factory.mktemp("shut")
    parents = [path for path in folder.parents if path.stat().st_mode & 0o005 != 0o005]
    modes = [path.stat().st_mode for path in parents]
    for path in (*parents, folder):
        path.chmod(0o755)
    save_tensors(folder / "a.safetensors", [("a", torch.zeros(1))])
    (folder / "a.json").write_text("{}")
    for path in folder.iterdir():
        path.chmod(0)
    if os.geteuid():
        folder.chmod(0o555)
    yield folder
    for path, mode in zip(parents, modes, strict=True):
        path.chmod(mode)
    folder.chmod(0o755)


def test_no_permission_is_said_to_be_the_reason(shut):
    for read, name in ((load_tensors, "a.safetensors"), (read_json, "a.json")):
        with unprivileged(), pytest.raises(InputError, match="cannot be read: Permission denied"):
            read(shut / name)
    for write in (lambda path: atomic_write_text(path, "text"), open_log):
        with unprivileged(), pytest.raises(InputError, match="cannot be written: Permission"):
            write(shut / "out")
    with unprivileged(), pytest.raises(InputError, match="made a folder: Permission denied"):
        make_folder(shut / "more")


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": "é"}


def test_what_is_no_json_object_is_refused(tmp_path):
    path, pointer = tmp_path / "a.json", "version https://git-lfs.github.com/spec/v1\nsize 3\n"
    for text, reason in (("[1]", "expected a JSON object, found list"), ("{", "not JSON: "),
                         (pointer, "is a git-lfs pointer")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError, match=f"a.json: {reason}"):
            read_json(path)
    with pytest.raises(InputError, match="gone.json: no such file"):
        read_json(tmp_path / "gone.json")
