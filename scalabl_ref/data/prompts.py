"""Questions as prompts.

A row's question and choices fill a template. The answer is a letter, "A" for the first choice, or
the choice's own words. The prompt is plain text, or a user's message in the model's chat template.
`Wording` holds these settings. A run stores them, and its evaluation uses the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..support.errors import InputError
from .chat import FIXED, ChatTemplate
from .text import checked_text, one_of, read_text
from .tokenizer import LETTERS

# The prompt's template by format. {question} is the row's text, {choices} is "A. ...", "B. ...",
# one on each line.
# No prompt ends in a space, because tokenizers would join it to the letter. The prompts of the two
# sets of short texts leave out their fixed choices: very small models learn them.
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
# In a chat the prompt is a sentence. With labels as words, {choices} is "one, two, three".
_CHAT_TEMPLATES = {
    "letters": "{question}\n{choices}\nAnswer with the letter of the right choice alone.",
    "words": "{question}\nAnswer with one of: {choices}.",
}
# Formats in which labels "auto" may be words: those of the user's own data.
_OWN_DATA = ("jsonl", "csv")
_PLACE = re.compile(r"\{(\w+)\}")

# Choices that are the same for all rows of a format, in the order of the letters.
FIXED_CHOICES = {
    "boolq": ("No", "Yes"),
    "sst2": ("negative", "positive"),
    "trec": ("abbreviation", "description", "entity", "human", "location", "number"),
}

Style = Literal["plain", "chat"]
Labels = Literal["auto", "letters", "words"]
AnswerTokens = Literal["auto", "space", "bare", "alone"]
STYLES: tuple[Style, ...] = ("plain", "chat")
LABELS: tuple[Labels, ...] = ("auto", "letters", "words")


@dataclass(frozen=True)
class Example:
    """A question. prompt: the whole text for the model. label: index of the answer in `choices`.

    question, format: the row's own text and its format, from which another prompt can be made.
    """

    prompt: str
    label: int
    id: str
    choices: tuple[str, ...]
    question: str = field(default="", compare=False)
    format: str = field(default="jsonl", compare=False)

    @property
    def lettered(self) -> bool:
        """Whether the choices are the letters themselves; the question is then a whole prompt."""
        letters = tuple(LETTERS[: len(self.choices)])
        return self.format != "csv" and self.choices == letters


@dataclass(frozen=True)
class Wording:
    """How questions become prompts, and which tokens are their answers.

    template: text with {question} and {choices} in it; None is the format's own.
    style: "plain", or "chat": the prompt is a user's message in the model's chat template.
    labels: "letters", "words" (the choices' own words, the same for every row), or "auto": words
        for rows of jsonl and csv that all have the same choices, if each begins with another token;
        else letters.
    answer_tokens: "space", "bare", "alone" or "auto", see `answers.answer_tokens`.
    names: the choices of every row, in the order of the classes; None if rows differ.
    max_length: longest prompt in tokens; longer prompts are cut on the left behind BOS, or left out
        with drop_long, which a chat needs. None: a prompt that is too long for the model is an
        error.

    Raises InputError for an invalid value.
    """

    template: str | None = None
    style: Style = "plain"
    labels: Labels = "auto"
    answer_tokens: AnswerTokens = "auto"
    names: tuple[str, ...] | None = None
    max_length: int | None = None
    drop_long: bool = False

    def __post_init__(self) -> None:
        one_of(STYLES, self.style, "the prompt style")
        one_of(LABELS, self.labels, "the kind of labels")
        one_of(("auto", "space", "bare", "alone"), self.answer_tokens, "the answer tokens")
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"max_length must be at least 1 token, and is {self.max_length}")
        if self.drop_long and self.max_length is None:
            raise InputError("drop_long needs a max_length (--drop-long needs --max-length)")
        if self.style == "chat" and self.max_length is not None and not self.drop_long:
            raise InputError(
                "a prompt in a chat template cannot be cut, because its beginning would be lost: "
                "give --max-length together with --drop-long"
            )

    @staticmethod
    def of_run(info: Mapping[str, Any]) -> Wording:
        """From the facts of a run; the defaults are plain prompts and bare letters."""
        names = info.get("label_names")
        return Wording(
            info.get("prompt_template"),
            info.get("prompt_style") or "plain",
            info.get("labels") or "letters",
            info.get("answer_tokens") or "bare",
            None if names is None else tuple(names),
            info.get("max_length"),
            bool(info.get("drop_long")),
        )

    def facts(self) -> dict[str, Any]:
        """The settings as a run stores them; `of_run` reads them back."""
        facts = asdict(self)
        names = {"template": "prompt_template", "style": "prompt_style", "names": "label_names"}
        return {names.get(key, key): value for key, value in facts.items()}

    def in_letters(self, examples: Sequence[Example]) -> Wording:
        """The same with letters, and with the examples' choices if all have the same choices."""
        same = None if examples[0].lettered else label_names(examples)
        return replace(self, labels="letters", names=self.names or same)

    def in_words(self, examples: Sequence[Example]) -> Wording:
        """The same with the examples' own labels. Raises InputError if the examples' labels differ.

        Their order may differ: the order is that of `names`, or of the first example.
        """
        if self.names is not None:
            return replace(self, labels="words")
        first = examples[0]
        for example in examples:
            if set(example.choices) != set(first.choices):
                raise InputError(
                    f"labels as words need the same choices in every row: row {example.id} has "
                    f"{_few(example.choices)}, row {first.id} has {_few(first.choices)}"
                )
        if first.lettered:
            raise InputError("the choices are letters, A, B, ...: they cannot be labels as words")
        return replace(self, labels="words", names=first.choices)

    def could_be_words(self, examples: Sequence[Example]) -> bool:
        """Whether `labels` "auto" should try words: see the class."""
        if self.labels != "auto":
            return self.labels == "words"
        names, first = self.names, examples[0]
        return names is not None or all(
            e.format in _OWN_DATA and set(e.choices) == set(first.choices) and not e.lettered
            for e in examples
        )

    @property
    def words(self) -> tuple[str, ...] | None:
        """The labels if they are words, else None."""
        return self.names if self.labels == "words" else None

    def word(self, example: Example, chat: ChatTemplate | None) -> Example:
        """The example with its prompt and, if labels are words, its label as an index in `names`.

        A label that is not in `names` becomes len(names). Raises InputError if the style is "chat"
        and the model has no template.
        """
        text, names = self._text(example), self.words
        if self.style == "chat":
            if chat is None:
                raise InputError("this model has no chat template: use --prompt-style plain")
            text = chat.render([{"role": "user", "content": text}], **FIXED)
        if names is None:
            return replace(example, prompt=text)
        answer = example.choices[example.label]
        label = names.index(answer) if answer in names else len(names)
        return replace(example, prompt=text, choices=names, label=label)

    def _text(self, example: Example) -> str:
        if example.lettered or not example.question:
            return example.question or example.prompt
        names, template = self.words, self.template
        if template is None and self.style == "chat":
            template = _CHAT_TEMPLATES["letters" if names is None else "words"]
        elif template is None:
            template = TEMPLATES[example.format]
            if names is not None:  # training teaches the labels: prompts need not list them
                template = template.replace("{choices}\n", "")
        return _filled(template, example.question, example.choices, names)


def _filled(
    template: str, question: str, choices: Sequence[str], names: Sequence[str] | None = None
) -> str:
    """The template with its places filled; braces in a row's text are only braces."""
    pairs = zip(LETTERS, choices, strict=False)  # as many letters as there are choices
    lettered = "\n".join(f"{letter}. {choice}" for letter, choice in pairs)
    places = {"question": question, "choices": lettered if names is None else ", ".join(names)}
    return _PLACE.sub(lambda place: places[place[1]], template)


def _few(choices: Sequence[str]) -> str:
    return ", ".join(repr(choice[:20]) for choice in choices[:3]) + ", ..." * (len(choices) > 3)


def read_template(path: Path | str) -> str:
    """The prompt template in a text file.

    One line break at the end of the file is not part of it. It must have {question} and may have
    {choices}; braces around anything but a word are only braces. Raises InputError naming the file
    if it cannot be read or has another {word}.
    """
    template = read_text(Path(path)).removesuffix("\n").removesuffix("\r")
    names = _PLACE.findall(template)
    unknown = [name for name in names if name not in ("question", "choices")]
    if unknown or "question" not in names:
        found = "there is no {question}"
        if unknown:
            near = difflib.get_close_matches(unknown[0], ("question", "choices"), n=1)
            found = f"{{{unknown[0]:.40}}} is neither"
            found += f": did you mean {{{near[0]}}}?" if near else ""
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
    """The example for a row of `format` with this text and these choices.

    Its prompt is plain, with lettered choices; `encode` can make another. template: replaces the
    format's, see `read_template`. If the choices are the letters A, B, ... themselves, `text` is a
    whole prompt and stays as it is, except in format csv, whose labels may have such names. Raises
    InputError for choices that the format cannot have.
    """
    one_of(FORMATS, format, "the format")
    checked_text(text, "the question")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"expected 2 to {len(LETTERS)} choices, found {len(choices)}")
    fixed = FIXED_CHOICES.get(format)
    if fixed and len(choices) != len(fixed):
        raise InputError(f"format {format} has {len(fixed)} choices, not {len(choices)}")
    example = Example(text, label, id, tuple(choices), text, format)
    if example.lettered:
        return example
    return replace(example, prompt=_filled(template or TEMPLATES[format], text, choices))


def num_classes(examples: Sequence[Example]) -> int:
    """The largest number of choices that any of the examples has."""
    return max((len(example.choices) for example in examples), default=0)


def label_names(examples: Sequence[Example]) -> tuple[str, ...] | None:
    """The choices of all the examples, for `load` of another file; None if they differ."""
    found = {example.choices for example in examples}
    return found.pop() if len(found) == 1 else None
