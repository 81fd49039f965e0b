"""Text to token ids and back: sentencepiece models, and tokenizer.json through `tokenizers`.

Both packages are imported on first use, so that importing this one is quick.
"""

from __future__ import annotations

import itertools
import json
import math
import string
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..support.errors import InputError
from ..support.files import read_json, reading, refuse_pointer
from ..support.hub import model_folder

if TYPE_CHECKING:
    from tokenizers import AddedToken

LETTERS = string.ascii_uppercase  # the answer classes, in order

# The files of a tokenizer in a model folder. They are copied along with a model.
_SENTENCEPIECE, _HUGGING_FACE = "tokenizer.model", "tokenizer.json"
_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FILES = (_SENTENCEPIECE, _HUGGING_FACE, _CONFIG, _SPECIAL, _ADDED, "chat_template.jinja")
# Other files that are copied along with a model.
_COMPANIONS = ("generation_config.json", "vocab.json", "merges.txt")


def letters(count: int) -> str:
    """The first `count` letters. Raises InputError if count is 0 or larger than the alphabet."""
    if not 1 <= count <= len(LETTERS):
        raise InputError(f"{count} answer classes: there are letters for {len(LETTERS)}")
    return LETTERS[:count]


class Tokenizer(ABC):
    """Text to ids and back.

    vocab_size: the largest id plus one. bos_id, eos_id: ids that begin and end a text, None if the
    model has none. eos_ids: all ids that end a text, eos_id first: those of the tokenizer, of
    config.json and of generation_config.json. special: the texts of tokens with a role, such as
    {"eos_token": "</s>"}. files: the tokenizer's files by their names in a model folder, to copy
    along with a model.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]
    special: dict[str, str]
    files: dict[str, Path]
    _prefix: list[int]  # the ids before every text: BOS or none

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of `text`, the same as transformers gives.

        bos: begin with the BOS token if this model's texts do (Llama's do; those of SmolLM2 and
        Qwen2.5 do not). Nothing is added at the end. The name of a special or added token in the
        text, such as "</s>", becomes that token. Raises InputError if `text` is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"the text {text[:40]!r} holds half of a surrogate pair") from None
        return (self._prefix if bos else []) + self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens such as BOS.

        Ids from vocab_size on have no text: many models have more rows than tokens. Raises
        InputError for a negative id.
        """
        if min(ids, default=0) < 0:
            raise InputError(f"token id {min(ids)} is negative")
        return self._decode([i for i in ids if i < self.vocab_size])

    def class_token_ids(self, classes: int | Sequence[str], context: str) -> list[int]:
        """The id of each answer letter directly after `context`.

        classes: the letters, or their number, from "A" on. Raises InputError naming the letter
        unless encode(context + letter) == encode(context) + [id] with different ids.
        """
        if isinstance(classes, int):
            classes = letters(classes)
        before = self.encode(context)
        ids: list[int] = []
        for letter in classes:
            tokens = self.encode(context + letter)
            if not tokens or tokens[:-1] != before:
                raise InputError(f"choice {letter!r} is not a single token after {context[-20:]!r}")
            if tokens[-1] in ids:
                other = classes[ids.index(tokens[-1])]
                raise InputError(f"choices {other!r} and {letter!r} are the same token")
            ids.append(tokens[-1])
        return ids

    def _find_ends(self, settings: _Settings) -> None:
        """Set bos_id, eos_id and eos_ids; a token given by name has precedence over one by id."""
        ids = {}
        for end in ("bos", "eos"):
            named = self.special.get(f"{end}_token")
            own = None if named is None else self.token_id(named)
            ids[end] = tuple(dict.fromkeys([*([] if own is None else [own]), *settings.ids[end]]))
        self.bos_id = next(iter(ids["bos"]), None)
        self.eos_id = next(iter(ids["eos"]), None)
        self.eos_ids = ids["eos"]

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """Id of the vocabulary's entry `piece`, literally; None if there is no such entry.

        "A" in Llama 2 is 29909, the letter within a word; "▁A", at the start of a word, is another.
        """

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
    """A sentencepiece model, and the tokens that a folder's other files add to it."""

    def __init__(self, path: Path, settings: _Settings) -> None:
        data = _read(path)
        self._model = _sentencepiece(path, data)
        # For text behind an added token, unchanged: in a protobuf message a later field overrides.
        # Field 3 (the normaliser) gets add_dummy_prefix and remove_extra_whitespaces 0.
        self._inner = _sentencepiece(path, data + b"\x1a\x04\x18\x00\x20\x00")
        pieces = range(self._model.vocab_size())
        control = [i for i in pieces if self._model.is_control(i) or self._model.is_unknown(i)]
        names = {
            f"{kind}_token": self._model.id_to_piece(i)
            for kind in ("bos", "eos", "unk")
            if (i := getattr(self._model, f"{kind}_id")()) >= 0
        }
        self.special = {**names, **settings.special}
        self._add(settings, {self._model.id_to_piece(i): i for i in control})
        self._find_ends(settings)
        self._prefix = [] if self.bos_id is None or not settings.add_bos else [self.bos_id]
        self._legacy = settings.legacy

    def _add(self, settings: _Settings, control: dict[str, int]) -> None:
        """Give ids to the added tokens, and prepare to find them in a text.

        `tokenizers` finds them, as in transformers, with a vocabulary of the added tokens alone and
        of "" for any other text.
        """
        import tokenizers

        added = [token for _, token in settings.added]
        have = {token.content for token in added}
        added += [
            tokenizers.AddedToken(piece, special=True) for piece in control if piece not in have
        ]
        given = {token.content: i for i, token in settings.added if i is not None}
        self._ids = {**control, **given}
        self.vocab_size = 1 + max([self._model.vocab_size() - 1, *given.values()])
        for token in added:
            if token.content not in self._ids:
                known = self._piece(token.content)
                self._ids[token.content] = self.vocab_size if known is None else known
                self.vocab_size = max(self.vocab_size, self._ids[token.content] + 1)
        self._texts = {i: text for text, i in self._ids.items()}
        self._special = {self._ids[token.content] for token in added if token.special}
        words = tokenizers.models.WordLevel({"": 0}, unk_token="")
        self._splitter = tokenizers.Tokenizer(words)
        self._splitter.add_tokens(added)
        self._found = {i: self._ids[text] for text, i in self._splitter.get_vocab().items() if text}

    def token_id(self, piece: str) -> int | None:
        return self._ids[piece] if piece in self._ids else self._piece(piece)

    def _piece(self, piece: str) -> int | None:
        i = self._model.piece_to_id(piece)  # an unknown piece's is that of <unk>
        known = 0 <= i < self._model.vocab_size() and self._model.id_to_piece(i) == piece
        return i if known else None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        parts = self._splitter.encode(text)
        for part, (start, end) in zip(parts.ids, parts.offsets, strict=True):
            if part in self._found:
                ids.append(self._found[part])
            else:
                begins = start == 0 and text[0] not in " \u2581"  # which is a space, written out
                model = self._model if begins or self._legacy else self._inner
                ids += model.encode(text[start:end])
        return ids

    def _decode(self, ids: list[int]) -> str:
        text = ""
        shown = (i for i in ids if i not in self._special)
        for added, run in itertools.groupby(shown, lambda i: i in self._texts):
            if added:
                text += "".join(self._texts[i] for i in run)
            else:
                pieces = [i for i in run if i < self._model.vocab_size()]
                text += (self._inner if text else self._model).decode(pieces)
        return text


def _sentencepiece(path: Path, data: bytes) -> Any:
    model = import_sentencepiece().SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except (RuntimeError, ValueError):  # the second where its message is not UTF-8
        raise InputError(f"{path}: a damaged sentencepiece model") from None
    return model


class _HuggingFace(Tokenizer):
    """A tokenizer.json, and what a folder's other files add to it."""

    def __init__(self, path: Path, settings: _Settings) -> None:
        self._path = path
        with _named_failures(path, "not a tokenizer.json"):
            self._read(settings)

    def _read(self, settings: _Settings) -> None:
        import tokenizers

        self._model = tokenizers.Tokenizer.from_str(_read(self._path).decode("utf-8"))
        for part in (self._model.normalizer, self._model.decoder):
            if part and (grown := _growth(json.loads(part.__getstate__()))) > _MOST_GROWTH:
                raise InputError(f"{self._path}: could make a text {grown:.0f} times as long: "
                                 f"expected at most {_MOST_GROWTH}")  # fmt: skip
        self._model.no_truncation()  # both can be stored in the file
        self._model.no_padding()
        known = {token.content for token in self._model.get_added_tokens_decoder().values()}
        self._model.add_tokens(
            [
                token
                for i, token in settings.added
                if token.content not in known or (settings.complete and i is not None)
            ]
        )
        self.vocab_size = 1 + max(self._model.get_vocab().values(), default=-1)
        self.special = settings.special
        # The file's post-processor decides whether texts begin with BOS, as in transformers. Find
        # the ids that it puts before a text, and add them here, so that they are never doubled.
        probe = self._model.encode("a")
        self._prefix = probe.ids[: [*probe.special_tokens_mask, 0].index(0)]
        self._find_ends(settings)
        if self._prefix:
            self.bos_id = self._prefix[0]

    def token_id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def _encode(self, text: str) -> list[int]:
        with _named_failures(self._path, "cannot encode a text"):
            return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        with _named_failures(self._path, "cannot decode ids"):
            return self._model.decode(ids)


_MOST_GROWTH = 100  # by all replacements of a tokenizer.json, one after another


def _growth(part: Any) -> float:
    """How many times as long a text can become by a normalizer or a decoder, as JSON."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    own = 1.0
    if part.get("type") == "Replace":
        replaced = part["pattern"].get("String", "")
        own = len(part["content"]) / len(replaced) if replaced else len(part["content"]) + 1
    return max(1, own) * math.prod(_growth(value) for value in part.values())


@contextmanager
def _named_failures(path: Path, what: str) -> Iterator[None]:
    """Within the block any failure of the package `tokenizers` becomes an InputError.

    It raises nothing narrower than Exception, and if it panics not even that.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: {what}: {reason}") from None


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder's tokenizer, by name."""
    return {name: folder / name for name in _FILES if (folder / name).exists()}


def companion_files(folder: Path) -> dict[str, Path]:
    """The files to copy along with a model's weights, by name, the tokenizer's first."""
    files = {name: folder / name for name in _COMPANIONS if (folder / name).exists()}
    return {**tokenizer_files(folder), **files}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model folder (or name on the Hub), or of one file of either kind.

    In a folder, tokenizer.json has precedence over tokenizer.model, as in transformers. Raises
    InputError naming the file if it is absent or damaged.
    """
    path = model_folder(path)
    if path.is_dir():
        file = _choose(path)
        files = tokenizer_files(path)
        settings = _read_settings(path)
    else:
        is_json = path.suffix == ".json"
        file, settings = path, _Settings()
        files = {_HUGGING_FACE if is_json else _SENTENCEPIECE: path}
        if not is_json and not _is_sentencepiece(path):
            raise InputError(f"{path}: expected a sentencepiece model or a tokenizer.json")
    body = _HuggingFace if file.suffix == ".json" else _SentencePiece
    tokenizer = body(file, settings)
    tokenizer.files = files
    return tokenizer


def _choose(folder: Path) -> Path:
    """The tokenizer file of a folder."""
    sentencepiece, hugging_face = folder / _SENTENCEPIECE, folder / _HUGGING_FACE
    if hugging_face.exists():
        return hugging_face
    if not sentencepiece.exists():
        raise InputError(f"{folder}: no tokenizer: expected {_SENTENCEPIECE} or {_HUGGING_FACE}")
    if not _is_sentencepiece(sentencepiece):  # Llama 3's is of another kind
        raise InputError(f"{sentencepiece}: not a sentencepiece model, and no {_HUGGING_FACE}")
    return sentencepiece


def _is_sentencepiece(path: Path) -> bool:
    """A sentencepiece model is a protobuf message that begins with its pieces: field 1, bytes."""
    return _read(path)[:1] == b"\x0a"


@dataclass
class _Settings:
    """The settings of a tokenizer in the smaller files of a folder.

    special: as in Tokenizer. added: tokens that have one id wherever they are in a text, in the
    order in which they get ids, each with its id if a file has it. complete: these settings have
    precedence over those in tokenizer.json. ids: ids of "bos" and "eos" that are given by number.
    add_bos, legacy: for sentencepiece models only. legacy: sentencepiece's space goes before every
    part of a text between added tokens; else only before the first part, if that begins without a
    space.
    """

    special: dict[str, str] = field(default_factory=dict)
    added: list[tuple[int | None, AddedToken]] = field(default_factory=list)
    complete: bool = False
    ids: dict[str, list[int]] = field(default_factory=lambda: {"bos": [], "eos": []})
    add_bos: bool = True
    legacy: bool = True


def _read_settings(folder: Path) -> _Settings:
    """The settings of a folder, read as transformers reads them.

    If tokenizer_config.json lists all added tokens, special_tokens_map.json and added_tokens.json
    are not read.
    """
    own, model = _json_object(folder / _CONFIG), _json_object(folder / "config.json")
    if isinstance(model.get("hf_config"), dict):  # a converted folder keeps the original's
        model = model["hf_config"]
    generation = _json_object(folder / "generation_config.json")
    complete = "added_tokens_decoder" in own
    if not complete:
        own |= _json_object(folder / _SPECIAL)
    roles = {name: value for name, value in own.items() if name.endswith("_token")}
    special = {name: text for name, value in roles.items() if (text := _text(value)) is not None}
    extra = own.get("additional_special_tokens") or own.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        special |= {name: text for name, text in extra.items() if isinstance(text, str)}
        extra = []
    if not isinstance(extra, list):
        raise InputError(f"{folder}: additional_special_tokens must be a list of tokens")
    named = [value for name, value in roles.items() if name in special]
    named += [value for value in [*special.values(), *extra] if _text(value) is not None]
    if complete:
        listed = own["added_tokens_decoder"]
    else:
        numbers = _json_object(folder / _ADDED)
        listed = {i: {"content": text} for text, i in numbers.items()}
    ids: dict[str, list[int]] = {}
    for end in ("bos", "eos"):
        values = (file.get(f"{end}_token_id") for file in (own, generation, model))
        each = [i for value in values for i in (value if isinstance(value, list) else [value])]
        ids[end] = [i for i in each if type(i) is int]
    legacy = own.get("legacy")
    if legacy is None:  # LlamaTokenizer's default since transformers 5
        name = own.get("tokenizer_class") or model.get("tokenizer_class")
        is_llama = str(name).startswith("LlamaTokenizer")
        legacy = not is_llama or model.get("model_type", "llama") != "llama"
    try:
        added = _added(listed, named)
    except (AttributeError, KeyError, TypeError, ValueError):  # no object, number or AddedToken
        name = _CONFIG if complete else _ADDED
        raise InputError(
            f"{folder / name}: expected added tokens as pairs of id and token"
        ) from None
    add_bos = own.get("add_bos_token") is not False
    return _Settings(special, added, complete, ids, add_bos, bool(legacy))


def _added(listed: dict[Any, Any], named: Iterable[Any]) -> list[tuple[int | None, AddedToken]]:
    """The tokens with ids, in the order of ids; then other tokens that only have a role."""
    from tokenizers import AddedToken

    def token(value: Any, **flags: bool) -> AddedToken:
        if not isinstance(value, dict):
            return AddedToken(value, **flags)
        return AddedToken(**{**{key: value[key] for key in _FLAGS if key in value}, **flags})

    added: dict[str, tuple[int | None, AddedToken]] = {}
    for i, value in sorted((int(i), value) for i, value in listed.items()):
        if i < 0:
            raise ValueError("a negative id")
        added[value["content"]] = (i, token(value))
    for value in named:
        text = str(_text(value))
        if text not in added:
            added[text] = (None, token(value, special=True))
        else:
            added[text][1].special = True
    return list(added.values())


_FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")


def _text(token: Any) -> str | None:
    """A token's text, given as a text or as an object with the token's flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if the file is absent."""
    return read_json(path) if path.exists() else {}


def _read(path: Path) -> bytes:
    refuse_pointer(path)
    with reading(path):
        return path.read_bytes()
