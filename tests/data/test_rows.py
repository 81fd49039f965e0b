"""Lists in a cell of a table."""

from __future__ import annotations

import time

import pytest

from scalabl_ref.data.rows import nested


@pytest.mark.parametrize(
    "cell, value",
    [
        ('["a", 1]', ["a", 1]),
        ("['a' 'b']", ["a", "b"]),
        ("['a',\n 'b', \"c's\"]", ["a", "b", "c's"]),
        ("{'t': array(['x) array(', 'y'], dtype=object)}", {"t": ["x) array(", "y"]}),
        (
            r"['\\ \n \' \" \x41 \u00fc \U0001f600 \q \xzz']",
            ["\\ \n ' \" A ü \U0001f600 \\q \\xzz"],
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
