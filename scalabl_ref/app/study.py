"""`scalabl study`: methods side by side, on the same model, data, seeds and budget.

A study is one JSON file, the fields of `Study`. Every trial of a method, a setting of its knobs,
is trained with the first seed and scored by its NLL on a validation split; the best one then is
trained with all seeds and scored on the test set. All methods train on the same part of the data
and have equally many trials; the validation split also gives the temperature of the scaled rows.

OUT/runs holds what was trained, shared by the methods that start alike (mle, ensemble, swag, tfb;
map, laplace), and OUT/answers what each method answered: what is there is not done again. Their
names digest what they were made of: settings, and what is in the files of the data and the base,
not where these lie. So what was moved is known again, and what was changed is another.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_type_hints

import torch

from ..core.adapter import adapter_state, adapters
from ..core.config import AdapterConfig
from ..data import (
    FORMATS,
    Columns,
    Encoded,
    Example,
    Labels,
    Style,
    Wording,
    encode,
    evaluation_batches,
    files,
    load,
    num_classes,
    read_template,
    split,
)
from ..data.tokenizer import load_tokenizer, tokenizer_files
from ..evaluation.comparison import row, scores, summary, table, write_page
from ..evaluation.metrics import checked_bins
from ..evaluation.predict import check_samples, predict_all
from ..methods import Ensemble, Laplace, Posterior, Swag, fit_tfb
from ..model.attach import add_adapters
from ..model.llama import Llama
from ..model.weights import read_config
from ..support.errors import InputError, Interrupted, RankLost, expected, on_signals
from ..support.fields import check, json_text
from ..support.files import atomic_write_text, make_folder, read_json, sha256
from ..support.folders import Weights
from ..support.progress import progress_bar
from ..support.tensors import load_tensors, save_tensors
from ..training.lock import alone
from ..training.loop import fit
from ..training.runs import DType, load_run, save_run
from ..training.trainer import TrainConfig, Trainer

MOST_JOBS = 256  # processes, which a study starts all at once


@dataclass(frozen=True)
class Method:
    """How a method is trained and what is made of the run.

    settings: changes to AdapterConfig and TrainConfig. knob: the second knob beside lr, its name
    and its values. members: runs that one model takes. after: makes the posterior of a finished run
    from (model, its folder, sets, samples, seed); None draws from the adapters.
    """

    settings: dict[str, Any]
    knob: tuple[str, tuple[float, ...]] = ("share_of_steps", (1.0, 0.25))
    members: int = 1
    after: After | None = None


Sets = dict[str, Encoded]
After = Callable[[Llama, Path, Sets, int, int], Posterior | None]


def _laplace(layers: Literal["all", "last"]) -> After:
    def after(model: Llama, run: Path, sets: Sets, samples: int, seed: int) -> Posterior:
        batches = evaluation_batches(sets["train"], 8)
        return Laplace.fit(model, batches, layers=layers).optimise_prior()

    return after


def _tfb(model: Llama, run: Path, sets: Sets, samples: int, seed: int) -> None:
    """Turns the model into one that draws; 0.003 is the published tolerance.

    Where rounding alone exceeds it, as a bfloat16 model's can, the mean model answers: a study is
    not to end for that.
    """
    try:
        fit_tfb(model, evaluation_batches(sets["validation"], 32), 0.003, samples, seed)
    except InputError as error:
        warnings.warn(f"tfb: {error}: {run.name} answers as it is", stacklevel=2)


def _swag(model: Llama, run: Path, sets: Sets, samples: int, seed: int) -> Posterior:
    return Swag.load(run)


PLAIN = {"method": "mle", "swag": 0.25}
METHODS: dict[str, Method] = {
    "mle": Method(PLAIN),
    "map": Method({"method": "map"}, ("prior_std", (0.1, 0.3))),
    "dropout": Method({"method": "dropout", "sampling": "token"}, ("dropout", (0.1, 0.3))),
    "ensemble": Method(PLAIN, members=3),
    "laplace": Method({"method": "map"}, ("prior_std", (0.1, 0.3)), after=_laplace("all")),
    "laplace last": Method({"method": "map"}, ("prior_std", (0.1, 0.3)), after=_laplace("last")),
    "blob": Method({"method": "blob"}, ("beta", (0.1, 1.0))),
    "tfb": Method(PLAIN, after=_tfb),
    "swag": Method(PLAIN, after=_swag),
    "scalabl": Method({"method": "scalabl"}, ("beta", (1.0, 5.0))),
    "scalabl official": Method({"method": "scalabl", "kl": "official"}, ("beta", (0.1, 0.5))),
    "scalabl as published": Method(  # the official code's two optimisers and shared draw
        {"method": "scalabl", "kl": "official", "objective": "official", "sampling": "batch"},
        ("kl_lr", (0.2, 0.02)),
    ),
    "scalabl full": Method({"method": "scalabl", "covariance": "full"}, ("beta", (1.0, 5.0))),
    "scalabl layer prior": Method({"method": "scalabl", "prior": "layer"}, ("beta", (1.0, 5.0))),
    "scalabl scale prior": Method(
        {"method": "scalabl", "prior": "component"}, ("beta", (1.0, 5.0))
    ),
}
OURS = tuple(name for name, method in METHODS.items() if method.settings["method"] == "scalabl")


@dataclass(frozen=True)
class Study:
    """model: folder. train, test: files, in `format`; the limits cut them. dtype: of the base.

    prompt_template (a file), prompt_style, labels, answer_tokens: how prompts are made and answers
    chosen, see `data.Wording`. max_length, drop_long: longer prompts are cut or left out there.
    text_column, label_column: of formats csv and jsonl, see `data.Columns`.
    ood: sets out of distribution, by name, each {"path": file} with "format" and "limit" if wanted.
    validation: share of the training examples set apart. lr: rates that every method tries.
    settings: of AdapterConfig and TrainConfig, for all methods but those that have their own in
    `METHODS`. knobs: other values of a method's second knob, by method. seeds: of data order,
    initial values and noise. sizes: other limits of the training set at which all of it is done
    again. sweep: methods of which every trial, and not the chosen one alone, is trained with all
    seeds and tested.

    Raises InputError, naming the field, for what no study can have.
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
                raise InputError(f"{name} must have values, and none of them twice")
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
            _, formats[f"ood: {name}: format"], counts[f"ood: {name}: limit"] = _source(self, name)
        for name, format in formats.items():
            if format not in FORMATS:
                raise InputError(f"{name} must be one of {', '.join(FORMATS)}, not {format!r}")
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1, and is {count}")
        check_samples(self.samples)
        checked_bins(self.bins)

    def _check_settings(self) -> None:
        """That they are settings, each with an effect, of which every trial can be made."""
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
        """Raises InputError, naming the file and the field, for what is no study."""
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
        """SHA-256 of each set's files, as they are when this is first asked for."""
        return {name: _content(self, name) for name in ("train", "test", *self.ood)}

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
        """A digest of the base model: configuration, tokenizer, some values of every tensor.

        Enough to notice another one, at little cost for a large one.
        """
        folder = Path(self.model)
        about: dict[str, Any] = {"config.json": sha256(folder / "config.json")}
        about |= {name: sha256(path) for name, path in tokenizer_files(folder).items()}
        for name, tensor in Weights(folder, once=True).items():
            some = tensor.flatten()[:: max(1, tensor.numel() // 16)]
            about[name] = [list(tensor.shape), some.double().tolist()]
        return _digest(about)

    def trials(self, method: str) -> list[dict[str, float]]:
        """Every pair of a rate and a value of the method's second knob."""
        knob, values = METHODS[method].knob
        return [
            {"lr": lr, knob: value}
            for lr, value in itertools.product(self.lr, self.knobs.get(method, values))
        ]

    def configs(
        self, method: str, trial: dict[str, float], seed: int
    ) -> tuple[AdapterConfig, TrainConfig]:
        """How a method is trained: settings of all, then its own, then the trial's."""
        values = {**self.settings, **METHODS[method].settings, **trial, "seed": seed}
        share = values.pop("share_of_steps", 1.0)  # stopping early, with a schedule to match
        if not 0 < share <= 1:
            raise InputError(f"share_of_steps must be in (0, 1], and is {share}")
        values["steps"] = max(1, round(share * values.get("steps", TrainConfig.steps)))
        return _config(AdapterConfig, values), _config(TrainConfig, values)


# --- One run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One training run, in a folder that `load_run` reads; methods that start alike share it."""

    study: Study
    adapter: AdapterConfig
    train: TrainConfig
    out: Path
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        configs = [dataclasses.asdict(self.adapter), dataclasses.asdict(self.train)]
        about = [self.study.base, _data(self.study, "train"), configs]
        return self.out / "runs" / f"{self.adapter.method}-{_digest(about)}"

    @property
    def done(self) -> bool:
        return (self.folder / "run.json").exists()

    def run(self) -> None:
        """Train from where an interrupted run stopped."""
        started = time.perf_counter()
        _reset_peak()
        data = _encoded(self.study, ["train"])["train"]
        model = _base_model(self.study, self.device)
        add_adapters(model.trim_head(data.classes), self.adapter, self.train.seed)
        swag = Swag() if self.train.swag else None
        fit(Trainer(model, data, self.train, collector=swag), self.folder, resume=True)
        if swag:
            swag.save(self.folder)
        info = {
            "model": self.study.model,
            "data": self.study.train,
            "format": self.study.format,
            "limit": self.study.limit,
            "holdout": self.study.validation,
            "text_column": self.study.text_column,
            "label_column": self.study.label_column,
            **data.wording.facts(),
            "dtype": self.study.dtype,
            "train": dataclasses.asdict(self.train),
            "seconds": time.perf_counter() - started,
            "peak_bytes": _peak_bytes(),
        }
        save_run(self.folder, model, info)


@dataclass(frozen=True)
class Job:
    """One model: a method with one trial's settings and a seed, and the sets that it answers."""

    study: Study
    method: str
    trial: dict[str, float]
    seed: int
    sets: tuple[str, ...]
    out: Path
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        sets = {name: _data(self.study, name) for name in ("train", "test", *self.study.ood)}
        how = [self.study.samples, self.study.settings, self.method, self.trial]
        about = [self.study.base, sets, *how]
        name = f"{self.method.replace(' ', '-')}-{_digest(about)}-{self.seed}"
        return self.out / "answers" / name

    @property
    def done(self) -> bool:
        return not self.missing() and (self.folder / "answers.json").exists()

    def missing(self) -> list[str]:
        return [name for name in self.sets if not (self.folder / f"{name}.safetensors").exists()]

    def fits(self) -> list[Fit]:
        """What has to be trained first."""
        return [self._fit(1000 * member + self.seed) for member in range(self._method.members)]

    def run(self) -> None:
        """Answer the sets that are not answered."""
        started = time.perf_counter()
        _reset_peak()
        make_folder(self.folder)
        fits, wanted = self.fits(), self.missing() or list(self.sets)
        model, _ = load_run(fits[0].folder, _base_model(self.study, self.device))
        sets = _encoded(self.study, ["train", "validation", *wanted])
        posterior = self._posterior(model, fits, sets)
        ready = time.perf_counter()
        for name in wanted:
            answers = predict_all(
                model,
                evaluation_batches(sets[name], 32),
                self.study.samples,
                self.seed,
                posterior=posterior,
            )
            tensors = {**answers._asdict(), "labels": torch.tensor(sets[name].labels)}
            save_tensors(self.folder / f"{name}.safetensors", tensors.items())
        answered = sum(len(sets[name].labels) for name in wanted)
        trained = [read_json(f.folder / "run.json") for f in fits]
        about = {
            "method": self.method,
            "trial": self.trial,
            "seed": self.seed,
            "runs": [f.folder.name for f in fits],
            "parameters": _numbers(model, posterior),
            "train_seconds": sum(t["seconds"] for t in trained) + ready - started,
            "answer_seconds": (time.perf_counter() - ready) / answered,
            "peak_bytes": max([_peak_bytes(), *(t["peak_bytes"] for t in trained)]),
            "widths": {
                name: a.widths().mean().item()
                for name, a in adapters(model).items()
                if len(a.widths())
            },
        }
        atomic_write_text(self.folder / "answers.json", json_text(about, indent=2) + "\n")

    def _posterior(
        self, model: Llama, fits: list[Fit], sets: dict[str, Encoded]
    ) -> Posterior | None:
        if len(fits) > 1:
            return Ensemble([load_tensors(f.folder / "adapter.safetensors")[0] for f in fits])
        if self._method.after is None:
            return None
        return self._method.after(model, fits[0].folder, sets, self.study.samples, self.seed)

    @property
    def _method(self) -> Method:
        return METHODS[self.method]

    def _fit(self, seed: int) -> Fit:
        configs = self.study.configs(self.method, self.trial, seed)
        return Fit(self.study, *configs, self.out, self.device)


def _numbers(model: Llama, posterior: Posterior | None) -> int:
    """How many numbers answering needs beside the base model."""
    own = list(adapter_state(model).values())
    if isinstance(posterior, Ensemble):
        own = [p for state in posterior.members for p in state.values()]
    elif isinstance(posterior, Swag):
        own = [p for state in (posterior.mean, posterior.square) for p in state.values()]
    elif isinstance(posterior, Laplace):
        own += [p for curvature in posterior.curvature.values() for p in curvature]
    return sum(p.numel() for p in own)


def _config(cls: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def _data(study: Study, name: str) -> list[Any]:
    """What decides a set and its tokens; of the training set, how much is set apart as well."""
    columns = [study.text_column, study.label_column]
    about = [study.contents[name], *_source(study, name)[1:], columns, study.wording.facts()]
    return [*about, study.validation, study.dtype] if name == "train" else about


def _source(study: Study, name: str) -> tuple[str, str, int | None]:
    """File, format and limit."""
    if name == "train":
        return study.train, study.format, study.limit
    if name == "test":
        return study.test, study.format, study.test_limit
    about = study.ood[name]
    return about["path"], about.get("format", "jsonl"), about.get("limit")


def _content(study: Study, name: str) -> list[str]:
    path, format, _ = _source(study, name)
    return [sha256(file) for file in files(path, format)]


def _load(study: Study, name: str, names: Sequence[str] | None = None) -> list[Example]:
    """A set; names: its labels, where they are known. Raises InputError if it is no longer what the
    names of runs and answers say it is."""
    path, format, limit = _source(study, name)
    own = format == study.format and name not in study.ood
    columns = Columns(study.text_column, study.label_column) if own else None
    examples = load(path, format, limit, columns=columns, names=names)
    if _content(study, name) != study.contents[name]:
        raise InputError(f"{path}: was changed while the study ran")
    return examples


def _base_model(study: Study, device: str) -> Llama:
    dtype = getattr(torch, study.dtype) if study.dtype else None
    return Llama.from_pretrained(study.model, dtype, device)


def _encoded(study: Study, names: Iterable[str]) -> dict[str, Encoded]:
    """Sets in token ids. The validation split comes from the training file.

    Raises InputError naming the file of a set that cannot be encoded, or whose labels, if it is not
    out of distribution, are not all among the training set's classes.
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
            file = _source(study, "train" if known else name)[0]
            raise InputError(f"{file}: {error}") from None

    # What "auto" comes to is settled by the training set, for all sets.
    sets = {"train": encoded("train", rest, study.wording)}
    wording = sets["train"].wording
    for name in names:
        if name == "validation":
            sets[name] = encoded(name, held, wording)
        elif name != "train":
            labels = None if name in study.ood else wording.names
            sets[name] = encoded(name, _load(study, name, labels), wording)
    return sets


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]


def _reset_peak() -> None:
    """Start counting this process's peak memory anew, where the system lets it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Peak resident memory since `_reset_peak`, or of the whole process where that is not known."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- What it takes --------------------------------------------------------------------------------


def cost(config: Study) -> dict[str, float]:
    """About what a study takes at `config.limit`, before any of it is done.

    runs, steps: of training, those shared between methods once. flop: of the products with the base
    model's weights. A token takes 2 FLOP for each of them forward, and as many backward, as the
    base itself is not trained; attention, adapters and padding are not counted. bytes: of the base.
    Raises InputError as loading does, at every one of the sizes.
    """
    config = dataclasses.replace(config)  # one that knows no files yet
    for size in config.sizes:  # fewer examples may have fewer classes
        _encoded(dataclasses.replace(config, limit=size), ("train", "validation", "test"))
    shape, _ = read_config(Path(config.model) / "config.json")
    weights = {name: p.numel() for name, p in Llama(shape, device="meta").named_parameters()}
    inner = sum(n for name, n in weights.items() if name.startswith("layers."))
    sets = _encoded(config, ("train", "validation", "test", *config.ood))
    tokens = {name: sum(map(len, data.tokens)) for name, data in sets.items()}
    fits: dict[Any, Fit] = {}
    passes = 0.0  # token passes through the base, forward or backward
    for method in config.methods:
        ready, each = _passes(method, config.samples, len(sets["train"].classes))
        trials = config.trials(method)
        first, *others = config.seeds
        tuned = [Job(config, method, t, first, ("validation",), Path()) for t in trials]
        tested = [Job(config, method, trials[0], s, tuple(sets)[1:], Path()) for s in others]
        tested.append(Job(config, method, trials[0], first, tuple(sets)[2:], Path()))
        if method in config.sweep:
            seeded = itertools.product(trials, config.seeds)
            tested += [Job(config, method, t, s, ("test",), Path()) for t, s in seeded]
        for job in tuned + tested:
            fits.update({(fit.adapter, fit.train): fit for fit in job.fits()})
            passes += sum(n * tokens[name] for name, n in ready.items())
            passes += each * sum(tokens[name] for name in job.sets)
    steps = [fit.train.steps for fit in fits.values()]
    length = tokens["train"] / len(sets["train"].labels)
    passes += sum(2 * length * fit.train.steps * fit.train.batch for fit in fits.values())
    size = 2 if config.dtype == "bfloat16" else 4
    return {"runs": len(fits), "steps": sum(steps), "flop": 2 * inner * passes,
            "bytes": size * sum(weights.values())}  # fmt: skip


def _passes(method: str, samples: int, classes: int) -> tuple[dict[str, int], int]:
    """Forward passes, or backward ones as dear: over which sets to get ready, and of an answer."""
    if method.startswith("laplace"):
        return {"train": 1 + classes}, 1 + classes
    if method == "tfb":
        return {"validation": 15 * samples}, samples  # about as many steps of the bisection
    if method == "ensemble":
        return {}, METHODS[method].members
    return {}, 1 if method in ("mle", "map") else samples


# --- The whole study ------------------------------------------------------------------------------


def study(config: Study, out: Path, jobs: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Run what is missing of the study under `out`; returns, and writes, its results.

    jobs: runs side by side, each in a process of its own with one thread.
    Writes OUT/results.json, OUT/results.md and OUT/results.html. Raises InputError as loading and
    training do, at once, whatever is run beside, or if another process runs a study there;
    Interrupted on SIGINT or SIGTERM; RankLost if one of the processes ends by itself. Called again,
    it goes on from there.
    """
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, and are {jobs}")
    if jobs > MOST_JOBS:
        raise InputError(f"jobs must be at most {MOST_JOBS}, and are {jobs}")
    config = dataclasses.replace(config)  # one that knows no files yet
    with on_signals(_interrupt), alone(out):
        results, models = _of_size(config, out, jobs, device)
        results["sizes"] = {
            size: _of_size(dataclasses.replace(config, limit=size, sweep=()), out, jobs, device)[0]
            for size in config.sizes
        }
        atomic_write_text(out / "results.json", json_text(results, indent=2) + "\n")
        atomic_write_text(out / "results.md", table(results))
        write_page(out / "results.html", results, models)
    return results


def _of_size(
    config: Study, out: Path, jobs: int, device: str
) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """Tune, then test, with the training set at `config.limit`: results and folders of answers."""
    tuning = {
        method: [
            Job(config, method, trial, config.seeds[0], ("validation",), out, device)
            for trial in config.trials(method)
        ]
        for method in config.methods
    }
    _run_all([job for trials in tuning.values() for job in trials], jobs, "tune")
    validation = {
        method: [scores(job.folder, "validation", config.bins) for job in trials]
        for method, trials in tuning.items()
    }
    chosen = {method: _least([s["nll"] for s in tried]) for method, tried in validation.items()}
    finals = {
        method: _with_seeds(trials[chosen[method]], ("validation", "test", *config.ood))
        for method, trials in tuning.items()
    }
    _run_all([job for runs in finals.values() for job in runs], jobs, "test")
    sweeps = {
        method: [_with_seeds(job, ("test",)) for job in tuning[method]] for method in config.sweep
    }
    swept = [job for trials in sweeps.values() for runs in trials for job in runs]
    _run_all(swept, jobs, "sweep")
    models = {method: _folders(runs) for method, runs in finals.items()}
    reached = {method: validation[method][trial]["nll"] for method, trial in chosen.items()}
    results = {
        "study": dataclasses.asdict(config),
        **summary(models, reached, OURS, config.bins, tuple(config.ood)),
        "tuning": {
            method: [{**job.trial, **s} for job, s in zip(trials, validation[method], strict=True)]
            for method, trials in tuning.items()
        },
        "sweep": {
            method: [row(_folders(runs), config.bins) for runs in trials]
            for method, trials in sweeps.items()
        },
    }
    return results, models


def _folders(runs: list[Job]) -> list[Path]:
    return [job.folder for job in runs]


def _with_seeds(job: Job, sets: tuple[str, ...]) -> list[Job]:
    return [dataclasses.replace(job, seed=seed, sets=sets) for seed in job.study.seeds]


def _least(values: list[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _run_all(wanted: list[Job], jobs: int, title: str) -> None:
    """Train what is not trained, then answer what is not answered."""
    todo = [job for job in wanted if not job.done]
    fits = {fit.folder: fit for job in todo for fit in job.fits() if not fit.done}
    with _workers(jobs) as run:
        for what, some in (("train", list(fits.values())), ("answer", todo)):
            with progress_bar(len(some), f"{title}: {what}", "run") as bar:
                for _ in run(some):
                    bar.update()


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Callable[[Sequence[Fit | Job]], Iterator[None]]]:
    """What runs the things it is given, in any order, and yields as each is finished.

    The processes end with the block, however it ends, and with this process: they hold one end of a
    pipe whose other end is here alone. Raises RankLost if one of them ends by itself.
    """
    if jobs == 1:
        yield lambda todo: (each.run() for each in todo)
        return
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)

    def run(todo: Sequence[Fit | Job]) -> Iterator[None]:
        rest = iter(todo)  # none is given out before there is a process for it
        pending = {pool.submit(each.run) for each in itertools.islice(rest, jobs)}
        while pending:
            done, pending = concurrent.futures.wait(pending, return_when="FIRST_COMPLETED")
            for future in done:
                yield future.result()
            pending |= {pool.submit(each.run) for each in itertools.islice(rest, len(done))}

    with concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, (theirs,)) as pool:
        try:
            # The pool watches those processes that were there at its last answer: here, all.
            list(pool.map(abs, range(jobs)))
            yield run
        except BaseException as error:
            ours.close()  # what they are at can wait
            if isinstance(error, BrokenProcessPool):
                raise RankLost(
                    "a process of the study died, perhaps killed for want of memory (fewer --jobs "
                    "take less); what is done is kept"
                ) from None
            raise


def _begin(end: Connection) -> None:
    """Start of a worker: one thread, and another that ends it with the other end of the pipe."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent has it as well
    threading.Thread(target=_end_with, args=(end,), daemon=True).start()


def _end_with(end: Connection) -> None:
    """SIGTERM to this process once nobody holds the other end, until it has ended.

    Training finishes its step and writes a checkpoint before it heeds one.
    """
    end.poll(None)
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)
