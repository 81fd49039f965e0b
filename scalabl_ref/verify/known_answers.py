"""Known answers of the noise, read from known_answers.txt, which the C++ tests read too."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class PhiloxAnswer(NamedTuple):
    """Random123's answer: the words that Philox4x32 makes of a counter and a key."""

    rounds: int
    counter: tuple[int, ...]  # 4 words
    key: tuple[int, ...]  # 2 words
    words: tuple[int, ...]  # 4 words


class BoxMullerAnswer(NamedTuple):
    """Two words and their two normals before the last rounding, to the last bit of float64."""

    words: tuple[int, int]
    normals: tuple[float, float]


def philox_answers() -> list[PhiloxAnswer]:
    answers = []
    for rounds, *fields in _lines("philox4x32"):
        words = tuple(int(word, 16) for word in fields)
        answers.append(PhiloxAnswer(int(rounds), words[:4], words[4:6], words[6:]))
    return answers


def box_muller_answers() -> list[BoxMullerAnswer]:
    return [
        BoxMullerAnswer((int(a, 16), int(b, 16)), (float.fromhex(cos), float.fromhex(sin)))
        for a, b, cos, sin in _lines("box_muller")
    ]


def _lines(name: str) -> list[list[str]]:
    """The fields of the lines that begin with `name`."""
    text = Path(__file__).with_name("known_answers.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines()]
    return [fields for first, *fields in filter(None, lines) if first == name]
