"""Text to token ids and back: sentencepiece models, and tokenizer.json through `tokenizers`.

Both packages are imported where they are first needed, so that importing this one stays quick and
the second, which is in the extra `hf`, may be absent.
"""

from __future__ import annotations

import json
import re
import string
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .checkpoint import refuse_pointer
from .errors import InputError
from .hub import model_folder

LETTERS = string.ascii_uppercase  # the answer classes, in order

# What a model folder may hold of its tokenizer. All that is there travels with a model.
_SENTENCEPIECE, _HUGGING_FACE = "tokenizer.model", "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_FILES = (_SENTENCEPIECE, _HUGGING_FACE, _CONFIG, "special_tokens_map.json", "added_tokens.json")
# What it may hold beside those and its weights.
_COMPANIONS = ("generation_config.json", "chat_template.jinja", "vocab.json", "merges.txt")


class Tokenizer(ABC):
    """Text to ids and back.

    vocab_size: number of ids. bos_id, eos_id: ids that begin and end a text, None where the model
    has none. files: name in a model folder -> where the file lies, to copy along with a model.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    files: dict[str, Path]
    _prefix: list[int]  # what goes before every text: the BOS id, or nothing

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of `text`, as the model saw text in its pre-training; transformers' ids.

        bos: begin with the BOS token if this model's texts do (Llama's do; those of SmolLM2 and
        Qwen2.5 do not). Nothing is put at the end. The name of a control token in the text, such as
        "</s>", is that token. Raises InputError if `text` is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"the text {text[:40]!r} holds half of a surrogate pair") from None
        return (self._prefix if bos else []) + self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens such as BOS.

        Raises InputError for an id outside [0, vocab_size).
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token id {i} is outside the tokenizer's {self.vocab_size} ids")
        return self._decode(list(ids))

    def class_token_ids(self, classes: int | Sequence[str], context: str) -> list[int]:
        """The id of each answer letter where it follows `context` directly.

        classes: the letters, or how many of them, from "A" on. Raises InputError naming the letter
        unless encode(context + letter) == encode(context) + [id], each id another.
        """
        if isinstance(classes, int):
            if not 1 <= classes <= len(LETTERS):
                raise InputError(f"{classes} answer classes: there are letters for {len(LETTERS)}")
            classes = LETTERS[:classes]
        before = self.encode(context)
        ids: list[int] = []
        for letter in classes:
            tokens = self.encode(context + letter)
            if tokens[:-1] != before:
                raise InputError(
                    f"choice {letter!r} is not one token of its own after {context[-20:]!r}"
                )
            if tokens[-1] in ids:
                other = classes[ids.index(tokens[-1])]
                raise InputError(f"choices {other!r} and {letter!r} are the same token")
            ids.append(tokens[-1])
        return ids

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def import_sentencepiece() -> ModuleType:
    """The sentencepiece package, imported without the warnings that it gives from Python 3.12 on.

    (Its SWIG types have no __module__, which is deprecated.)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import sentencepiece
    return sentencepiece


class _SentencePiece(Tokenizer):
    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._model = import_sentencepiece().SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(_read(path))
        except (RuntimeError, ValueError):  # the second where its message is not UTF-8
            raise InputError(f"{path}: a damaged sentencepiece model") from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = (
            i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id())
        )
        has_bos = self.bos_id is not None and config.get("add_bos_token") is not False
        self._prefix = [self._model.bos_id()] if has_bos else []
        # The package takes the names of control tokens for text; everyone else does not.
        ids = (
            i
            for i in range(self.vocab_size)
            if self._model.is_control(i) or self._model.is_unknown(i)
        )
        self._control = {self._model.id_to_piece(i): i for i in ids}
        names = sorted(self._control, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, names))})")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            ids += [self._control[part]] if part in self._control else self._model.encode(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class _HuggingFace(Tokenizer):
    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        try:
            import tokenizers
        except ImportError:
            raise InputError(
                f"{path}: reading it needs the tokenizers package: pip install 'scalabl_ref[hf]'"
            ) from None
        try:
            self._model = tokenizers.Tokenizer.from_str(_read(path).decode("utf-8"))
        except Exception as error:  # the package raises nothing narrower
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: not a tokenizer.json: {reason}") from None
        self._model.no_truncation()  # both can be stored in the file
        self._model.no_padding()
        self.vocab_size = 1 + max(self._model.get_vocab().values(), default=-1)
        # Whether texts begin with BOS is for the file's post-processor to say, as in transformers:
        # see what it puts before a text, and put that there ourselves, so that it is never doubled.
        probe = self._model.encode("a")
        self._prefix = probe.ids[: [*probe.special_tokens_mask, 0].index(0)]
        self.bos_id = self._prefix[0] if self._prefix else self._special("bos", config)
        self.eos_id = self._special("eos", config)

    def _special(self, kind: str, config: dict[str, Any]) -> int | None:
        """Id of the "bos" or "eos" token that the configuration names by text or by id."""
        token = config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            return self._model.token_to_id(text)
        number = config.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number  # Llama 3 has several
        return number if isinstance(number, int) else None

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder's tokenizer, by name."""
    return {name: folder / name for name in _FILES if (folder / name).exists()}


def companion_files(folder: Path) -> dict[str, Path]:
    """The files that travel with a model's weights, by name: the tokenizer's first."""
    files = {name: folder / name for name in _COMPANIONS if (folder / name).exists()}
    return {**tokenizer_files(folder), **files}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model folder (or name on the Hub), or of one file of either kind.

    In a folder, tokenizer.model is preferred where it is a sentencepiece model (Llama 3's is not).
    Raises InputError naming the file if it is absent or damaged, or if a package is missing.
    """
    path = model_folder(path)
    if path.is_dir():
        file = _choose(path)
        files = tokenizer_files(path)
        config = _config(path)
    else:
        is_json = path.suffix == ".json"
        file, config = path, {}
        files = {_HUGGING_FACE if is_json else _SENTENCEPIECE: path}
        if not is_json and not _is_sentencepiece(path):
            raise InputError(f"{path}: expected a sentencepiece model or a tokenizer.json")
    body = _HuggingFace if file.suffix == ".json" else _SentencePiece
    tokenizer = body(file, config)
    tokenizer.files = files
    return tokenizer


def _choose(folder: Path) -> Path:
    """The tokenizer file of a folder."""
    sentencepiece, hugging_face = folder / _SENTENCEPIECE, folder / _HUGGING_FACE
    if sentencepiece.exists() and _is_sentencepiece(sentencepiece):
        return sentencepiece
    if hugging_face.exists():
        return hugging_face
    if sentencepiece.exists():
        raise InputError(f"{sentencepiece}: not a sentencepiece model, and no {_HUGGING_FACE}")
    raise InputError(f"{folder}: no tokenizer: expected {_SENTENCEPIECE} or {_HUGGING_FACE}")


def _is_sentencepiece(path: Path) -> bool:
    """A sentencepiece model is a protobuf message that begins with its pieces: field 1, bytes."""
    return _read(path)[:1] == b"\x0a"


def _config(folder: Path) -> dict[str, Any]:
    """What the folder's files say about special tokens, the most specific file winning."""
    merged: dict[str, Any] = {}
    for name in ("config.json", "special_tokens_map.json", _CONFIG):
        path = folder / name
        if not path.exists():
            continue
        try:
            value = json.loads(_read(path))
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
        merged.update(value)
    return merged


def _read(path: Path) -> bytes:
    refuse_pointer(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
