"""Texts of files: read whole, and line by line."""

from __future__ import annotations

import pytest

from scalabl_ref import InputError
from scalabl_ref.data.text import lines_of, read_text, shown

FILES = [b"", b"a", b"a\nb\n", b"a\r\nb", b"a\rb\r\n\rc\r", b"abc\rdef\n", b"abc\rdef", b"\n\na",
         "é\n\u2028x\x85\n".encode(), "a\n\ufeffb".encode()]  # fmt: skip


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("data", FILES)
def test_lines_join_to_the_text_and_end_where_lines_do(tmp_path, data, mark):
    """Only \\n, \\r and \\r\\n end a line; a byte order mark at the start is not of the text."""
    (tmp_path / "file").write_bytes(mark + data)
    lines = list(lines_of(tmp_path / "file"))
    assert "".join(lines) == read_text(tmp_path / "file") == data.decode()
    for i, line in enumerate(lines):
        inside = line.removesuffix("\n").removesuffix("\r")
        assert "\n" not in inside and "\r" not in inside
        assert inside != line or i == len(lines) - 1


@pytest.mark.parametrize("read", [read_text, lambda path: list(lines_of(path))])
def test_what_is_no_utf_8_is_named(tmp_path, read):
    path = tmp_path / "file"
    for data, reason in (("a".encode("utf-16"), "file: is UTF-16 text"),
                         ("\ufeffa".encode("utf-16-be"), "file: is UTF-16 text"),
                         (b"a\n\nb\xff\n", "file, line 3: expected UTF-8 text"),
                         (b"\n\xff", "file, line 2: expected UTF-8 text")):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(InputError, match=reason):
            read(path)
    with pytest.raises(InputError, match="gone: no such file"):
        read(tmp_path / "gone")


def test_values_are_shown_in_sixty_characters():
    for n in range(50, 70):
        whole = f"'{'x' * (n - 2)}'"
        assert shown("x" * (n - 2)) == (whole if n <= 60 else whole[:57] + "...")
    assert shown(ValueError("no 'quotes'")) == "no 'quotes'" and shown(None) == "None"
    assert shown([1, 2], 5) == "[1..." and shown([1, 2], 6) == "[1, 2]"
