"""The fields of a study's JSON file, checked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
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
from .methods import METHODS, random_trials
from .plugins import is_added, load_plugins


@dataclass(frozen=True)
class Study:
    """Fields of the JSON file; `model`, `train` and `test` are required.

    model: folder of the base model. dtype: of the base model. train, test: files in `format`, of
        which `limit` and `test_limit` rows are used. text_column, label_column: see `data.Columns`.
    ood: sets out of distribution, by name: {"path": file}, with "format" and "limit" if wanted.
    prompt_template (a file), prompt_style, labels, answer_tokens, max_length, drop_long: how
        prompts are made and answers chosen, see `data.Wording`.
    validation: rows of the training file that are set apart for tuning and temperatures: a
        fraction, or a number.
    held_out: rows of the training file that become the test set, of the same distribution as the
        training set; `test` is then answered as the set "shifted". Each seed draws its own `limit`
        training rows from the rest, so a seed is a replicate: subset, initial values and order.
    methods: names in `METHODS`. variants: settings by name; a method is then compared under each,
        as "METHOD, VARIANT".
    trials: settings of each method that are tried, see `random_trials`. ranges: the lowest and the
        highest value of a tuned setting, in place of those in `METHODS`.
    tuning_seeds: all trials are trained with the first of these, and the best `finalists` also with
        the others. By default the first of `seeds`; other seeds keep the choice of the trials, and
        of the best of our methods, apart from the runs that are tested.
    tuning: the file tuning.json or results.json of another study. An arm of its name has one trial
        here, at the settings that were chosen there.
    settings: fields of AdapterConfig and TrainConfig for all methods. A variant's settings replace
        them, a method's own in `METHODS` replace both, and those of its trials replace all.
    passes: length of a training in passes over its rows, in place of `steps`; needs `limit`.
    seeds: of data order, initial values and noise, for the runs that are tested.
    samples: draws for each question. bins: of the expected calibration error.
    plugins: Python files with methods of one's own, see `plugins`. They are not in the JSON file,
        because a file of data runs no code.

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
    held_out: int = 0
    methods: tuple[str, ...] = tuple(METHODS)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: int = 4
    finalists: int = 4
    ranges: dict[str, list[float]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] = ()
    tuning: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    passes: float | None = None
    samples: int = 10
    bins: int = 15
    plugins: tuple[str, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process of the study: load the plugins that it was made with."""
        self.__dict__.update(state)
        if load_plugins(self.plugins) != self.plugin_digests:
            raise InputError(f"{', '.join(self.plugins)}: has changed while the study ran")

    def __post_init__(self) -> None:
        object.__setattr__(self, "plugins", tuple(self.plugin_digests))
        if not self.tuning_seeds:
            object.__setattr__(self, "tuning_seeds", self.seeds[:1])
        lists = {"methods": self.methods, "seeds": self.seeds, "tuning_seeds": self.tuning_seeds}
        for name, values in lists.items():
            if not 0 < len(values) == len(set(values)):
                raise InputError(f"{name} must have values, each only once")
        for name in self.methods:
            if name not in METHODS:
                raise InputError(f"unknown method {name!r}{expected(name, METHODS)}")
            like = METHODS[name].like
            if like is not None and like not in self.methods:
                raise InputError(f"method {name!r} takes its settings from {like!r}: add it")
        known = {name for method in self.methods for name in METHODS[method].tuned}
        for name, ends in self.ranges.items():
            if name not in known:
                raise InputError(f"ranges: no method tunes {name!r}{expected(name, known)}")
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                raise InputError(f"ranges: {name} must be two positive numbers, the lower first")
        if not (0 < self.validation < 1 or self.validation >= 1 == self.validation % 1 + 1):
            raise InputError(
                f"validation must be a fraction or a number of rows, and is {self.validation}"
            )
        if (least := min(*self.seeds, *self.tuning_seeds)) < 0:
            raise InputError(f"seeds must not be negative, and one is {least}")
        self._check_sets()
        self._check_settings()

    def _check_sets(self) -> None:
        formats = {"format": self.format}
        counts = {"limit": self.limit, "test_limit": self.test_limit, "samples": self.samples,
                  "bins": self.bins, "trials": self.trials, "finalists": self.finalists,
                  "held_out": self.held_out or None}  # fmt: skip
        for name, about in self.ood.items():
            check(about, {"path": str, "format": str, "limit": int | None}, f"ood: {name}: ")
            if "path" not in about:
                raise InputError(f"ood: {name}: field 'path' is missing")
            if name in ("train", "validation", "test", "shifted") or not name.isidentifier():
                raise InputError(f"ood: {name!r} cannot be the name of a set")
            _, formats[f"ood: {name}: format"], counts[f"ood: {name}: limit"] = self.source(name)
        for name, format in formats.items():
            if format not in FORMATS:
                raise InputError(f"{name} must be one of {', '.join(FORMATS)}, not {format!r}")
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1, and is {count}")
        if self.limit is None and (self.held_out or self.passes):
            raise InputError("held_out and passes need a limit")
        if self.passes is not None and self.passes <= 0:
            raise InputError(f"passes must be above 0, and is {self.passes:g}")
        check_samples(self.samples)
        checked_bins(self.bins)

    def _check_settings(self) -> None:
        """Raise InputError unless all settings exist, have an effect, and allow every trial."""
        known = get_type_hints(AdapterConfig) | get_type_hints(TrainConfig)
        for name, settings in (("", self.settings), *self.variants.items()):
            check(settings, known, f"variants: {name}: " if name else "settings: ")
        methods = [METHODS[name] for name in self.methods]
        own = set.intersection(*({"seed", *m.tuned, *m.settings} for m in methods))
        own |= {"steps"} if self.passes else set()
        for name in {**self.settings, **{n: 0 for v in self.variants.values() for n in v}}:
            if name in own:
                raise InputError(f"settings: {name} has no effect: every method here has its own")
        _config(TrainConfig, self.settings)  # its steps, before a share of them is taken
        for arm in self.arms:
            for trial in self.tried(arm):
                self.configs(arm, trial, self.seeds[0])

    @staticmethod
    def read(path: Path, plugins: Iterable[Path | str] = ()) -> Study:
        """A study from its file, and plugins. Raises InputError, naming the file and the field."""
        values = read_json(path)
        load_plugins(plugins)  # an error there names the plugin
        try:
            if isinstance(values, dict) and "plugins" in values:
                raise InputError("plugins cannot stand in a file: give --plugin FILE")
            check(values, get_type_hints(Study))
            for name in ("model", "train", "test"):
                if name not in values:
                    raise InputError(f"field {name!r} is missing")
            for name in ("methods", "seeds", "tuning_seeds"):
                if name in values:
                    values[name] = tuple(values[name])
            return Study(**values, plugins=tuple(map(str, plugins)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @functools.cached_property
    def plugin_digests(self) -> dict[str, str]:
        """SHA-256 of each plugin by its path, when it was loaded; the first use loads it."""
        return load_plugins(self.plugins)

    @functools.cached_property
    def contents(self) -> dict[str, list[str]]:
        """SHA-256 of each set's files, as they are at the first use."""
        return {name: self.content(name) for name in ("train", *self.sets[1:])}

    def content(self, name: str) -> list[str]:
        """SHA-256 of a set's files as they are now."""
        path, format, _ = self.source(name)
        return [sha256(file) for file in files(path, format)]

    def source(self, name: str) -> tuple[str, str, int | None]:
        """A set's file, format and limit."""
        if name == "train":
            return self.train, self.format, None if self.held_out else self.limit
        if name == "test" and self.held_out:
            return self.train, self.format, None
        if name in ("test", "shifted"):
            return self.test, self.format, self.test_limit
        about = self.ood[name]
        return about["path"], about.get("format", "jsonl"), about.get("limit")

    def code(self, **names: str) -> list[str]:
        """What plugins add to a folder's name: nothing, unless one defines a method or adapter.

        names: such as method="mle".
        """
        if not any(is_added(kind, name) for kind, name in names.items()):
            return []
        return sorted(self.plugin_digests.values())

    def describes(self, name: str) -> list[Any]:
        """All that decides a set's tokens, and for the training set, how it is split."""
        columns = [self.text_column, self.label_column]
        about: list[Any] = [self.contents[name], *self.source(name)[1:], columns]
        about.append(self.wording.facts())
        if name in ("train", "test") and self.held_out:
            about += [self.held_out, self.validation]
        return [*about, self.validation, self.limit, self.dtype] if name == "train" else about

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets that a chosen model answers."""
        return ("validation", "test", *(["shifted"] if self.held_out else []), *self.ood)

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

    @property
    def arms(self) -> dict[str, tuple[str, str]]:
        """All that is compared, by name: a method and a variant ("" if there are none)."""
        pairs = itertools.product(self.variants or [""], self.methods)
        return {f"{method}, {v}" if v else method: (method, v) for v, method in pairs}

    def like(self, arm: str) -> str | None:
        """The arm whose chosen trial this one takes; None if it has trials of its own."""
        method, variant = self.arms[arm]
        like = METHODS[method].like
        return f"{like}, {variant}" if like and variant else like

    def tried(self, arm: str) -> list[dict[str, float]]:
        """The settings of an arm's trials."""
        if self.tuning is not None:
            return [self.chosen_before[self.like(arm) or arm]]
        tuned = dict(METHODS[self.arms[self.like(arm) or arm][0]].tuned)
        for name, (low, high) in self.ranges.items():
            if name in tuned:
                tuned[name] = dataclasses.replace(tuned[name], low=low, high=high)
        return random_trials(tuned, self.trials)

    @functools.cached_property
    def chosen_before(self) -> dict[str, dict[str, float]]:
        """The trial of each arm that the study of `tuning` chose.

        Raises InputError, naming the file, if it has none for an arm, or one of other settings.
        """
        assert self.tuning is not None
        found = read_json(Path(self.tuning)).get("tuning", {})
        check({"tuning": found}, {"tuning": dict[str, list[dict[str, Any]]]}, f"{self.tuning}: ")
        chosen = {}
        for arm in (arm for arm in self.arms if not self.like(arm)):
            tuned, where = METHODS[self.arms[arm][0]].tuned, f"{self.tuning}: {arm}: "
            if tuned and not found.get(arm):
                raise InputError(f"{self.tuning}: has no trial of {arm!r}{expected(arm, found)}")
            trial = found[arm][0].get("trial") if tuned else {}
            check({"trial": trial}, {"trial": dict[str, float]}, where)
            if set(trial) != set(tuned):
                raise InputError(f"{where}trial must have {list(tuned)}, and has {list(trial)}")
            chosen[arm] = trial
        return chosen

    def configs(
        self, arm: str, trial: dict[str, float], seed: int
    ) -> tuple[AdapterConfig, TrainConfig]:
        """How an arm is trained: settings of study, variant, method and trial, in this order."""
        method, variant = self.arms[arm]
        varied = self.variants.get(variant, {})
        values = {**self.settings, **varied, **METHODS[method].settings, **trial, "seed": seed}
        if self.passes is not None:
            batch = values.get("batch", TrainConfig.batch)
            values["steps"] = max(1, round(self.passes * self._training_rows / batch))
        share = values.pop("share_of_steps", 1.0)
        if not 0 < share <= 1:
            raise InputError(f"share_of_steps must be in (0, 1], and is {share}")
        values["steps"] = max(1, round(share * values.get("steps", TrainConfig.steps)))
        if (ratio := values.pop("variational_ratio", None)) is not None:
            values["variational_lr"] = ratio * values.get("lr", TrainConfig.lr)
        return _config(AdapterConfig, values), _config(TrainConfig, values)

    @property
    def _training_rows(self) -> int:
        assert self.limit is not None  # _check_sets
        if self.held_out:
            return self.limit
        return self.limit - self.validation_rows(self.limit)

    def validation_rows(self, rows: int) -> int:
        """How many of so many rows are set apart for tuning."""
        return round(self.validation if self.validation >= 1 else self.validation * rows)


def _config(cls: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def digest(about: Any) -> str:
    """A short name for a JSON value."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]
