"""Questions as prompts: what the model reads before it answers with a letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..tokenizer import LETTERS
from .text import checked_text, one_of, read_text

# What the model reads, by format. {question} is the row's text, {choices} is "A. ...", "B. ...",
# each on a line of its own.
# No prompt ends in a space: tokenizers would join it to the letter. The two sets of short texts
# leave their fixed choices unsaid: they are there to be learnt by very small models.
_MULTIPLE_CHOICE = "{question}\n{choices}\nAnswer:"
TEMPLATES = {
    "jsonl": _MULTIPLE_CHOICE,
    "arc": _MULTIPLE_CHOICE,
    "obqa": _MULTIPLE_CHOICE,
    "winogrande": _MULTIPLE_CHOICE,  # the sentence with its gap "_", then both options
    "boolq": _MULTIPLE_CHOICE,  # the passage, a line break, the question
    "mmlu": _MULTIPLE_CHOICE,
    "sst2": "{question}\nSentiment:",
    "trec": "{question}\nType:",
    "csv": _MULTIPLE_CHOICE,
}
FORMATS = tuple(TEMPLATES)
_PLACE = re.compile(r"\{(\w+)\}")

# Choices that belong to the format and not to the row, in the order of the letters.
FIXED_CHOICES = {
    "boolq": ("No", "Yes"),
    "sst2": ("negative", "positive"),
    "trec": ("abbreviation", "description", "entity", "human", "location", "number"),
}


@dataclass(frozen=True)
class Example:
    """A question. prompt: all that the model reads. label: index of the answer among `choices`."""

    prompt: str
    label: int
    id: str
    choices: tuple[str, ...]


def read_template(path: Path | str) -> str:
    """The prompt template in a text file, without the line break at its end.

    It must hold {question} and may hold {choices}; braces around anything but a word are only
    braces. Raises InputError naming the file if it cannot be read or holds another {word}.
    """
    template = read_text(Path(path)).removesuffix("\n").removesuffix("\r")
    names = _PLACE.findall(template)
    unknown = [name for name in names if name not in ("question", "choices")]
    if unknown or "question" not in names:
        found = f"{{{unknown[0]}}} is neither" if unknown else "there is no {question}"
        raise InputError(f"{path}: a template has {{question}} and may have {{choices}}: {found}")
    return template


def question(
    text: str,
    choices: Sequence[str],
    format: str,
    label: int = 0,
    id: str = "",
    template: str | None = None,
) -> Example:
    """The example that a row of `format` with this text and these choices becomes.

    template: in place of the format's; see `read_template`. Choices that are the letters A, B, ...
    themselves mean that `text` is a whole prompt, and is left as it is; not so in format csv, where
    labels may have such names. Raises InputError for choices that the format cannot have.
    """
    one_of(FORMATS, format, "the format")
    checked_text(text, "the question")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"expected 2 to {len(LETTERS)} choices, found {len(choices)}")
    fixed = FIXED_CHOICES.get(format)
    if fixed and len(choices) != len(fixed):
        raise InputError(f"format {format} has {len(fixed)} choices, not {len(choices)}")
    if format != "csv" and list(choices) == list(LETTERS[: len(choices)]):
        prompt = text
    else:
        pairs = zip(LETTERS, choices, strict=False)  # as many letters as there are choices
        lines = "\n".join(f"{letter}. {choice}" for letter, choice in pairs)
        places = {"question": text, "choices": lines}
        prompt = _PLACE.sub(lambda place: places[place[1]], template or TEMPLATES[format])
    return Example(prompt, label, id, tuple(choices))


def num_classes(examples: Sequence[Example]) -> int:
    """The largest number of choices that any of the examples has."""
    return max((len(example.choices) for example in examples), default=0)
