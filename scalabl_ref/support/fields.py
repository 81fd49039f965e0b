"""Values of JSON: checked against type annotations, and written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from .errors import InputError, expected

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "null",
    Any: "anything",
}


def check(values: Mapping[str, Any], types: Mapping[str, Any], where: str = "") -> None:
    """Raise InputError for a key that is not in `types`, or whose value has another type.

    types: by name, as from typing.get_type_hints: types of JSON's values, also in tuples, lists,
    dictionaries, literals and unions. where: text before the names in errors.
    """
    for name, value in values.items():
        if name not in types:
            raise InputError(f"{where}unknown field {name!r}{expected(name, types)}")
        if not _is(value, types[name]):
            raise InputError(f"{where}{name} must be {_words(types[name])}, not {value!r}")


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON. A number that is not finite becomes null, because JSON has none."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is(value: Any, kind: Any) -> bool:
    """Numbers must fit into 64 bits; a float may be a whole number; a boolean is neither."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(_is(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(item, parts[1]) for item in value.values())
    if parts:
        return any(_is(value, part) for part in parts)
    if isinstance(value, bool):
        return kind in (bool, Any)
    if kind is int:
        return isinstance(value, int) and abs(value) < 1 << 63
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return kind is Any or isinstance(value, kind)


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (tuple, list):
        return f"a list (each {_words(parts[0])})"
    if origin is dict:
        return f"an object (each {_words(parts[1])})"
    if origin is Literal:
        return " or ".join(parts)
    return " or ".join(map(_words, parts)) if parts else _WORDS[kind]
