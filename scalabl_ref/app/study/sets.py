"""The sets of a study in token ids, and its base model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ...data import Columns, Encoded, Example, Wording, encode, load, num_classes, split
from ...data.tokenizer import load_tokenizer
from ...model.llama import Llama
from ...model.weights import read_config
from ...support.errors import InputError
from .config import Study


def _load(study: Study, name: str, names: Sequence[str] | None = None) -> list[Example]:
    """The rows of a set. names: its labels, if known.

    Raises InputError if its files have changed since the study began.
    """
    path, format, limit = study.source(name)
    own = format == study.format and name not in study.ood
    columns = Columns(study.text_column, study.label_column) if own else None
    examples = load(path, format, limit, columns=columns, names=names)
    if study.content(name) != study.contents[name]:
        raise InputError(f"{path}: has changed while the study ran")
    return examples


def base_model(study: Study, device: str) -> Llama:
    dtype = getattr(torch, study.dtype) if study.dtype else None
    return Llama.from_pretrained(study.model, dtype, device)


def encoded_sets(study: Study, names: Iterable[str]) -> dict[str, Encoded]:
    """The sets of these names, and the training set, in token ids.

    "validation" is a part of the training file. Raises InputError, naming the file, for a set that
    cannot be encoded, or that has labels other than the training set's (unless it is out of
    distribution).
    """
    model = Path(study.model)
    tokenizer = load_tokenizer(model)
    length = read_config(model / "config.json")[0].max_position_embeddings
    train = _load(study, "train")
    classes, (rest, held) = num_classes(train), split(train, study.validation, 0)

    def encoded(name: str, examples: list[Example], wording: Wording) -> Encoded:
        try:
            return encode(
                examples, tokenizer, classes, length, answerable=name not in study.ood,
                wording=wording,
            )  # fmt: skip
        except InputError as error:
            known = name in ("train", "validation")
            file = study.source("train" if known else name)[0]
            raise InputError(f"{file}: {error}") from None

    # The training set decides what "auto" means for all sets.
    sets = {"train": encoded("train", rest, study.wording)}
    wording = sets["train"].wording
    for name in names:
        if name == "validation":
            sets[name] = encoded(name, held, wording)
        elif name != "train":
            labels = None if name in study.ood else wording.names
            sets[name] = encoded(name, _load(study, name, labels), wording)
    return sets
