"""Values of JSON: their types, and as text."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import pytest

from scalabl_ref import InputError
from scalabl_ref.evaluation.metrics import RiskCoverage
from scalabl_ref.support.fields import check, json_text


def strict(text: str):
    """What the text says, if it is JSON: Python itself also reads and writes more than that."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null():
    value = {"a": [math.inf, (1.5, -math.inf)], "b": {"c": math.nan, "d": "NaN", "e": None}, "f": 1}
    expected = {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN", "e": None}, "f": 1}
    assert strict(json_text(value)) == strict(json_text(value, indent=2)) == expected
    assert value["a"][0] == math.inf
    assert strict(json_text(RiskCoverage(1, 2, math.inf))) == [1, 2, None]
    assert json_text([True, "\u0434"]) == '[true, "\\u0434"]'
    assert json_text([1], indent=2) == "[\n  1\n]"


LARGE, BEYOND = 2**63 - 1, 2**63
KINDS: dict[str, tuple[Any, list[Any], list[Any]]] = {  # words: a type, values of it, and others
    "true or false": (bool, [True, False], [0, 1, "true", None]),
    "a whole number": (int, [0, -3, LARGE], [True, 1.0, BEYOND, -BEYOND, "1", None]),
    "a finite number": (
        float, [0, 1.5, -3, 10**300], [False, math.inf, math.nan, 10**309, "1", None]
    ),
    "a text": (str, ["", "a"], [1, None, ["a"]]),
    "a text or null": (str | None, ["a", None], [0, False]),
    "anything": (Any, [1, True, "a", None, [1]], []),
    "a or b": (Literal["a", "b"], ["a", "b"], ["c", None, 1, ["a"]]),
    "a list (each a whole number)": (tuple[int, ...], [[], [1, 2], (1,)], [[1.5], 1, {1: 1}, "1"]),
    "a list (each a text)": (list[str], [[], ["a"]], [["a", 1], "a", None]),
    "an object (each a finite number)": (
        dict[str, float], [{}, {"a": 1}, {"a": 1.5, "b": 0}], [{"a": "1"}, [1.0], 1.0]
    ),
    "a list (each a text) or null": (list[str] | None, [None, ["a"]], [[1], "a"]),
}  # fmt: skip


@pytest.mark.parametrize("words", KINDS)
def test_values_have_the_types_of_their_fields(words):
    kind, values, others = KINDS[words]
    for value in values:
        check({"x": value}, {"x": kind, "y": int})
    for value in others:
        with pytest.raises(InputError) as caught:
            check({"y": 3, "x": value}, {"x": kind, "y": int}, "file: ")
        assert str(caught.value) == f"file: x must be {words}, not {value!r}"


def test_fields_that_are_not_there_are_named():
    with pytest.raises(InputError, match=r"^file: unknown field 'stepz'.*steps"):
        check({"steps": 3, "stepz": 3}, {"steps": int}, "file: ")
