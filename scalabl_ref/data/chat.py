"""Chat templates: a conversation as the text that a model was tuned to read.

A template is a program in jinja2's language that comes with the model. It runs in jinja2's sandbox
with the functions and settings of transformers, and so writes the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.errors import InputError
from .text import read_text
from .tokenizer import tokenizer_files

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# For questions: Qwen3 answers without a draft, and Llama's date is a fixed one, not today.
FIXED: dict[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}

_LONGEST = 10_000_000  # characters; a template can loop for as long as it likes


class ChatTemplate:
    """The template `source`, which came from `file`.

    special: the texts of the tokenizer's special tokens, see Tokenizer; templates write them.
    Raises InputError naming the file if it is not a template.
    """

    def __init__(self, source: str, file: Path, special: Mapping[str, str] | None = None) -> None:
        import jinja2

        self._file, self._special = file, dict(special or {})
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise self._failed(error) from None

    @classmethod
    def load(
        cls, files: Path | Mapping[str, Path], special: Mapping[str, str] | None = None
    ) -> ChatTemplate | None:
        """The template of a model folder, or of a tokenizer's `files`; None if it has none.

        chat_template.jinja has precedence over tokenizer_config.json; of several templates there,
        "default" is taken. Raises InputError naming the file if it cannot be read.
        """
        files = tokenizer_files(files) if isinstance(files, Path) else files
        if file := files.get("chat_template.jinja"):
            return cls(read_text(file), file, special)
        file = files.get("tokenizer_config.json")
        if file is None:
            return None
        try:
            config = json.loads(read_text(file))
            found = config.get("chat_template")
            if isinstance(found, list):
                found = {each["name"]: each["template"] for each in found}["default"]
        except ValueError as error:
            raise InputError(f"{file}: not JSON: {error}") from None
        except (AttributeError, KeyError, TypeError):
            raise InputError(f"{file}: expected a chat_template that is a text") from None
        if not isinstance(found, str | None):
            raise InputError(f"{file}: expected a chat_template that is a text")
        return None if found is None else cls(found, file, special)

    def render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of `messages`, each {"role": ..., "content": ...}, with BOS if the model has it.

        add_generation_prompt: end with the text that precedes an answer. variables: others that the
        template uses, such as `FIXED`. Raises InputError naming the file if the template refuses
        the messages, fails, or does not end.
        """
        given = {**self._special, "tools": None, "documents": None, **variables}
        given.update(messages=messages, add_generation_prompt=add_generation_prompt)
        parts, length = [], 0
        try:
            for part in self._template.generate(given):
                parts.append(part)
                length += len(part)
                if length > _LONGEST:
                    raise ValueError(f"it writes more than {_LONGEST:,} characters")
        except Exception as error:  # a template can make Python raise anything
            raise self._failed(error) from None
        return "".join(parts)

    def _failed(self, error: BaseException) -> InputError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return InputError(f"{self._file}: its chat template fails: {reason[:120]}")


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja2 with the settings and functions that transformers has for templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which only mark a model's text."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's is for HTML

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
