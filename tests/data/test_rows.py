"""Lists in a cell of a table; blank lines and cells; the lines that errors name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from scalabl_ref.data.rows import is_json, json_rows, nested, streamed_json_rows, table
from scalabl_ref.support.errors import InputError

FILE = Path("file")


@pytest.mark.parametrize(
    "cell, value",
    [
        ('["a", 1]', ["a", 1]),
        ("['a' 'b']", ["a", "b"]),
        ("['a',\n 'b', \"c's\"]", ["a", "b", "c's"]),
        ("{'t': array(['x) array(', 'y'], dtype=object)}", {"t": ["x) array(", "y"]}),
        (
            r"['\\ \n\t \' \" \x41 \u00fc \U0001f600 \q \xzz']",
            ["\\ \n\t ' \" A ü \U0001f600 \\q \\xzz"],
        ),
        ("['a", "['a"),
        ("plain", "plain"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_lists_in_a_cell(cell, value):
    assert nested(cell) == value


def test_a_cell_of_quotes_takes_no_long_time():
    cell = "['" + "\\'" * 30_000  # every quote could begin a text that never ends
    start = time.process_time()
    assert nested(cell) == cell
    assert time.process_time() - start < 5  # under 0.1 s; looked at from each quote on: some 20 s


def test_the_format_is_doubted_at_the_first_entry_alone():
    """And a line that is no object is counted from the start of the file."""
    for rows in (json_rows, lambda path, text: streamed_json_rows(path, text.splitlines(True))):
        with pytest.raises(InputError, match=r"^file, line 1: .*: is --format right\?$"):
            list(rows(FILE, "1\n"))
        for second in ("1", "{"):
            found = rows(FILE, '{"a": 1}\n\n' + second + "\n")
            assert next(found) == ("line 1", {"a": 1})
            with pytest.raises(InputError, match=r"^file, line 3: (?!.*--format)"):
                next(found)


def test_the_separator_is_looked_for_in_the_first_line_that_is_not_blank():
    names, rows = table(FILE, "\n \na;b\n1;2\n")
    assert (names, list(rows)) == (["a", "b"], [("line 4", {"a": "1", "b": "2"})])


def test_json_is_known_by_its_first_object():
    """Blank lines may come first. Other text in braces or brackets does not count."""
    assert all(map(is_json, ['{"a": 1}', '\n {\n "a', '[{"a"', '\r\n [\n {"a"']))
    assert not any(map(is_json, ["", "{a}", '["a"]', "[1]", 'a,"{""b"": 1}"', "{'a'"]))


def test_a_tsv_file_is_known_by_its_name():
    """Its header may have more commas than tabs."""
    for name in ("a.tsv", "a.TSV"):
        names, rows = table(Path(name), "x, y, z\tn\n1, 2\t3\n")
        assert names == ["x, y, z", "n"]
        assert list(rows) == [("line 2", {"x, y, z": "1, 2", "n": "3"})]


def test_a_row_of_empty_cells_is_a_row():
    _, rows = table(FILE, "a,b\n,\n\n1,2\n")
    assert list(rows) == [("line 2", {"a": "", "b": ""}), ("line 4", {"a": "1", "b": "2"})]
