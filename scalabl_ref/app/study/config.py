"""What a study is: the fields of its JSON file, checked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ...core.config import AdapterConfig
from ...data import FORMATS, Labels, Style, Wording, files, read_template
from ...data.tokenizer import tokenizer_files
from ...evaluation.metrics import checked_bins
from ...evaluation.predict import check_samples
from ...support.errors import InputError, expected
from ...support.fields import check
from ...support.files import read_json, sha256
from ...support.folders import Weights
from ...training.runs import DType
from ...training.trainer import TrainConfig
from .methods import METHODS


@dataclass(frozen=True)
class Study:
    """Fields of the JSON file; `model`, `train` and `test` must be there.

    model: folder of the base model. dtype: of the base model. train, test: files in `format`, of
        which `limit` and `test_limit` rows are used. text_column, label_column: see `data.Columns`.
    ood: sets out of distribution, by name: {"path": file}, with "format" and "limit" if wanted.
    prompt_template (a file), prompt_style, labels, answer_tokens, max_length, drop_long: how
        prompts are made and answers chosen, see `data.Wording`.
    validation: fraction of the training rows that is set apart for tuning.
    methods: names in `METHODS`. lr: learning rates that every method tries. knobs: values of a
        method's second knob, by method, in place of those in `METHODS`.
    settings: fields of AdapterConfig and TrainConfig for all methods; a method's own settings in
        `METHODS` and its trials take precedence.
    seeds: of data order, initial values and noise; tuning uses the first.
    sizes: other values of `limit` at which the study is repeated.
    sweep: methods of which every trial, not only the best, is trained with all seeds and tested.
    samples: draws for each question. bins: of the expected calibration error.

    Raises InputError, naming the field, for a value that no study can have.
    """

    model: str
    train: str
    test: str
    format: str = "jsonl"
    prompt_template: str | None = None
    prompt_style: Style = "plain"
    labels: Labels = "auto"
    answer_tokens: Literal["auto", "space", "bare"] = "auto"
    max_length: int | None = None
    drop_long: bool = False
    text_column: str | None = None
    label_column: str | None = None
    ood: dict[str, dict[str, Any]] = field(default_factory=dict)
    limit: int | None = None
    test_limit: int | None = None
    dtype: DType | None = None
    validation: float = 0.2
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: tuple[float, ...] = (1e-3, 3e-3)
    knobs: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    sweep: tuple[str, ...] = ()
    samples: int = 10
    bins: int = 15

    def __post_init__(self) -> None:
        lists = {"methods": self.methods, "seeds": self.seeds, "lr": self.lr}
        lists |= {f"knobs: {method}": tuple(values) for method, values in self.knobs.items()}
        for name, values in lists.items():
            if not 0 < len(values) == len(set(values)):
                raise InputError(f"{name} must have values, each only once")
        for name in self.methods:
            if name not in METHODS:
                raise InputError(f"unknown method {name!r}{expected(name, METHODS)}")
        for field_name, names in (("knobs", self.knobs), ("sweep", self.sweep)):
            for name in names:
                if name not in self.methods:
                    raise InputError(f"{field_name}: {name!r} is not among the study's methods")
        if not 0 < self.validation < 1:
            raise InputError(f"validation must be in (0, 1), and is {self.validation}")
        if min(self.seeds) < 0:
            raise InputError(f"seeds must not be negative, and one is {min(self.seeds)}")
        self._check_sets()
        self._check_settings()

    def _check_sets(self) -> None:
        formats = {"format": self.format}
        counts = {"limit": self.limit, "test_limit": self.test_limit, "samples": self.samples,
                  "bins": self.bins, "sizes": min(self.sizes, default=None)}  # fmt: skip
        for name, about in self.ood.items():
            check(about, {"path": str, "format": str, "limit": int | None}, f"ood: {name}: ")
            if "path" not in about:
                raise InputError(f"ood: {name}: field 'path' is missing")
            if name in ("train", "validation", "test") or not name.isidentifier():
                raise InputError(f"ood: {name!r} cannot be the name of a set")
            _, formats[f"ood: {name}: format"], counts[f"ood: {name}: limit"] = self.source(name)
        for name, format in formats.items():
            if format not in FORMATS:
                raise InputError(f"{name} must be one of {', '.join(FORMATS)}, not {format!r}")
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1, and is {count}")
        check_samples(self.samples)
        checked_bins(self.bins)

    def _check_settings(self) -> None:
        """Raise InputError unless all settings exist, have an effect, and allow every trial."""
        known = get_type_hints(AdapterConfig) | get_type_hints(TrainConfig)
        check(self.settings, known, "settings: ")
        methods = [METHODS[name] for name in self.methods]
        own = set.intersection(*({"lr", "seed", m.knob[0], *m.settings} for m in methods))
        for name in self.settings:
            if name in own:
                raise InputError(f"settings: {name} has no effect: every method here has its own")
        _config(TrainConfig, self.settings)  # its steps, before a share of them is taken
        for name in self.methods:
            for trial in self.trials(name):
                self.configs(name, trial, self.seeds[0])

    @staticmethod
    def read(path: Path) -> Study:
        """A study from its file. Raises InputError, naming the file and the field."""
        values = read_json(path)
        try:
            check(values, get_type_hints(Study))
            for name in ("model", "train", "test"):
                if name not in values:
                    raise InputError(f"field {name!r} is missing")
            for name in ("methods", "seeds", "lr", "sizes", "sweep"):
                if name in values:
                    values[name] = tuple(values[name])
            return Study(**values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @functools.cached_property
    def contents(self) -> dict[str, list[str]]:
        """SHA-256 of each set's files, as they are at the first use."""
        return {name: self.content(name) for name in ("train", "test", *self.ood)}

    def content(self, name: str) -> list[str]:
        """SHA-256 of a set's files as they are now."""
        path, format, _ = self.source(name)
        return [sha256(file) for file in files(path, format)]

    def source(self, name: str) -> tuple[str, str, int | None]:
        """A set's file, format and limit."""
        if name == "train":
            return self.train, self.format, self.limit
        if name == "test":
            return self.test, self.format, self.test_limit
        about = self.ood[name]
        return about["path"], about.get("format", "jsonl"), about.get("limit")

    def describes(self, name: str) -> list[Any]:
        """All that decides a set's tokens, and for the training set, how it is split."""
        columns = [self.text_column, self.label_column]
        about = [self.contents[name], *self.source(name)[1:], columns, self.wording.facts()]
        return [*about, self.validation, self.dtype] if name == "train" else about

    @functools.cached_property
    def wording(self) -> Wording:
        """How prompts are made; raises InputError if the template's file cannot be read."""
        template = read_template(self.prompt_template) if self.prompt_template else None
        return Wording(
            template, self.prompt_style, self.labels, self.answer_tokens, None, self.max_length,
            self.drop_long,
        )  # fmt: skip

    @functools.cached_property
    def base(self) -> str:
        """A digest of the base model: configuration, tokenizer, and some values of every tensor.

        It tells models apart, at little cost even for a large one.
        """
        folder = Path(self.model)
        about: dict[str, Any] = {"config.json": sha256(folder / "config.json")}
        about |= {name: sha256(path) for name, path in tokenizer_files(folder).items()}
        for name, tensor in Weights(folder, once=True).items():
            some = tensor.flatten()[:: max(1, tensor.numel() // 16)]
            about[name] = [list(tensor.shape), some.double().tolist()]
        return digest(about)

    def trials(self, method: str) -> list[dict[str, float]]:
        """Every pair of a learning rate and a value of the method's second knob."""
        knob, values = METHODS[method].knob
        return [
            {"lr": lr, knob: value}
            for lr, value in itertools.product(self.lr, self.knobs.get(method, values))
        ]

    def configs(
        self, method: str, trial: dict[str, float], seed: int
    ) -> tuple[AdapterConfig, TrainConfig]:
        """How a method is trained: the study's settings, then the method's, then the trial's."""
        values = {**self.settings, **METHODS[method].settings, **trial, "seed": seed}
        share = values.pop(
            "share_of_steps", 1.0
        )  # early stopping, with the schedule of a shorter run
        if not 0 < share <= 1:
            raise InputError(f"share_of_steps must be in (0, 1], and is {share}")
        values["steps"] = max(1, round(share * values.get("steps", TrainConfig.steps)))
        return _config(AdapterConfig, values), _config(TrainConfig, values)


def _config(cls: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def digest(about: Any) -> str:
    """A short name for a JSON value."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]
