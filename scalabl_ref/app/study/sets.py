"""The sets of a study in token ids, and its base model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ...data import Columns, Encoded, Example, Wording, encode, hold_out, load, num_classes
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


def _parts(study: Study, rows: list[Example], replicate: int) -> dict[str, list[Example]]:
    """The sets that are parts of the training file. Raises InputError if it has too few rows."""
    held, limit = study.validation_rows(len(rows)), study.limit or 0
    others = study.held_out + limit if study.held_out else 1
    if not held or len(rows) < held + others:
        raise InputError(f"{study.train}: {len(rows)} rows are too few for the study's sets")
    parts: dict[str, list[Example]] = {}
    parts["train"], parts["validation"] = hold_out(rows, held, 0)
    if study.held_out:
        rest, parts["test"] = hold_out(parts["train"], study.held_out, 1)
        _, parts["train"] = hold_out(rest, limit, 2 + replicate)
    return parts


def encoded_sets(study: Study, names: Iterable[str], replicate: int = 0) -> dict[str, Encoded]:
    """The sets of these names, and the training set, in token ids.

    "validation" is a part of the training file, and so is "test" if `study.held_out` is set; the
    training set is then that of `replicate`. Raises InputError, naming the file, for a set that
    cannot be encoded, or that has labels other than the training set's (unless it is out of
    distribution).
    """
    model = Path(study.model)
    tokenizer = load_tokenizer(model)
    length = read_config(model / "config.json")[0].max_position_embeddings
    rows = _load(study, "train")
    classes, parts = num_classes(rows), _parts(study, rows, replicate)

    def encoded(name: str, examples: list[Example], wording: Wording) -> Encoded:
        try:
            return encode(
                examples, tokenizer, classes, length, answerable=name not in study.ood,
                wording=wording,
            )  # fmt: skip
        except InputError as error:
            file = study.source("train" if name in parts else name)[0]
            raise InputError(f"{file}: {error}") from None

    # The training set decides what "auto" means for all sets.
    sets = {"train": encoded("train", parts["train"], study.wording)}
    wording = sets["train"].wording
    for name in names:
        if name in parts:
            sets[name] = sets.get(name) or encoded(name, parts[name], wording)
        else:
            labels = None if name in study.ood else wording.names
            sets[name] = encoded(name, _load(study, name, labels), wording)
    return sets
