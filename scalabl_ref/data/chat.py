"""Chat templates: a conversation as the text that a model was tuned to read.

A template is a program in jinja2's language that comes with the model. It runs in jinja2's sandbox
with the functions and settings of transformers, and so writes the same text.

The sandbox keeps a template from Python's objects. It bounds neither time nor memory: loops can
be nested, and 'a' * 10**10 is one step. So templates run in the process of support/limited.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..support import limited
from ..support.errors import InputError
from .text import read_text
from .tokenizer import tokenizer_files

# For questions: Qwen3 answers without a draft, and Llama's date is a fixed one, not today.
FIXED: dict[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}


class ChatTemplate:
    """The template `source`, which came from `file`.

    special: the texts of the tokenizer's special tokens, see Tokenizer; templates write them.
    Raises InputError naming the file if it is not a template.
    """

    def __init__(self, source: str, file: Path, special: Mapping[str, str] | None = None) -> None:
        self._source, self._file, self._special = source, file, dict(special or {})
        self._ask({"source": source})

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
        except (ValueError, RecursionError) as error:
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
        return self._ask({"source": self._source, "given": given})

    def _ask(self, request: Mapping[str, Any]) -> str:
        try:
            return limited.ask(request)
        except limited.Failed as error:
            raise InputError(f"{self._file}: its chat template fails: {error}") from None
