"""Results as JSON."""

from __future__ import annotations

import json
import math

from scalabl_ref.evaluation.metrics import RiskCoverage
from scalabl_ref.support.fields import json_text


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
