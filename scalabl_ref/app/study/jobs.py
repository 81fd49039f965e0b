"""The jobs of a study: training runs, and the answers of trained models. Each has a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.adapter import adapter_state, adapters
from ...core.config import AdapterConfig
from ...data import Encoded, evaluation_batches
from ...evaluation.answering import draws_taken
from ...evaluation.predict import predict_all
from ...methods import Ensemble, Laplace, Posterior, Subspace, Swag
from ...model.attach import add_adapters
from ...model.llama import Llama
from ...support.errors import InputError
from ...support.fields import json_text
from ...support.files import atomic_write_text, make_folder, read_json
from ...support.tensors import save_tensors
from ...training.loop import fit
from ...training.runs import load_run, save_run
from ...training.trainer import Diverged, TrainConfig, Trainer
from .config import Study, digest
from .methods import METHODS, Made, Method
from .sets import base_model, encoded_sets

FAILED = "failed.json"  # in the folder of a run that diverged, or of answers that cannot be had


@dataclass(frozen=True)
class Fit:
    """One training run, in a run folder; methods with the same training share it.

    replicate: the seed of its training rows, if each seed draws its own.
    """

    study: Study
    replicate: int
    adapter: AdapterConfig
    train: TrainConfig
    out: Path
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        about: list[Any] = [self.study.base, self.study.describes("train"), _set(self.adapter)]
        about += [_set(self.train), self.replicate if self.study.held_out else 0]
        about += self.study.code(adapter=self.adapter.method)
        return self.out / "runs" / f"{self.adapter.method}-{digest(about)}"

    @property
    def done(self) -> bool:
        return (self.folder / "run.json").exists() or self.failed

    @property
    def failed(self) -> bool:
        return (self.folder / FAILED).exists()

    def run(self) -> None:
        """Train, from the last checkpoint if there is one."""
        started = time.perf_counter()
        _reset_peak()
        data = encoded_sets(self.study, [], self.replicate)["train"]
        model = base_model(self.study, self.device)
        add_adapters(model.trim_head(data.classes), self.adapter, self.train.seed)
        swag = Swag() if self.train.swag else None
        try:
            fit(Trainer(model, data, self.train, collector=swag), self.folder, resume=True)
        except Diverged as error:
            _fail(self.folder, error)
            return
        if swag:
            swag.save(self.folder)
        info = {
            "model": self.study.model,
            "data": None if self.study.held_out else self.study.train,  # rows of no file
            "format": self.study.format,
            "limit": self.study.limit,
            "holdout": self.study.validation if self.study.validation < 1 else 0.0,
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
    """The answers of one model, an arm with a trial's settings and a seed, to some sets."""

    study: Study
    arm: str
    trial: dict[str, float]
    seed: int
    sets: tuple[str, ...]
    out: Path
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        others = self.study.sets[1:]
        sets = {name: self.study.describes(name) for name in ("train", *others)}
        runs = [fit.folder.name for fit in self.fits()]
        about = [self.study.base, sets, self._samples, runs, self.arm, self.trial]
        about += self.study.code(method=self.study.arms[self.arm][0])
        name = f"{re.sub('[ ,]+', '-', self.arm)}-{digest(about)}-{self.seed}"
        return self.out / "answers" / name

    @property
    def done(self) -> bool:
        return self.failed or (not self.missing() and (self.folder / "answers.json").exists())

    @property
    def failed(self) -> bool:
        """Whether there are no answers: a run diverged, or no posterior can be made of the runs."""
        return (self.folder / FAILED).exists() or any(fit.failed for fit in self.fits())

    def missing(self) -> list[str]:
        return [name for name in self.sets if not (self.folder / f"{name}.safetensors").exists()]

    def fits(self) -> list[Fit]:
        """The runs that must be trained first."""
        return [self._fit(1000 * member + self.seed) for member in range(self._method.members)]

    def run(self) -> None:
        """Answer the sets that have no answers yet, unless a run has diverged."""
        if self.failed:
            return
        _reset_peak()
        make_folder(self.folder)
        fits, wanted = self.fits(), self.missing() or list(self.sets)
        model = self._load(fits[0].folder)
        sets = encoded_sets(self.study, ["validation", *wanted], self.seed)
        loaded = time.perf_counter()
        try:
            posterior = self._posterior(model, fits, sets)
        except InputError as error:
            _fail(self.folder, error)
            return
        ready = time.perf_counter()
        for name in wanted:
            answers = predict_all(
                model,
                evaluation_batches(sets[name], 32),
                self._samples,
                self.seed,
                posterior=posterior,
            )
            tensors = {**answers._asdict(), "labels": torch.tensor(sets[name].labels)}
            save_tensors(self.folder / f"{name}.safetensors", tensors.items())
        answered = sum(len(sets[name].labels) for name in wanted)
        trained = [read_json(f.folder / "run.json") for f in fits]
        about = {
            "method": self.arm,
            "trial": self.trial,
            "seed": self.seed,
            "runs": [f.folder.name for f in fits],
            "parameters": _numbers(model, posterior),
            "draws": draws_taken(model, self._samples, posterior),
            "train_seconds": sum(t["seconds"] for t in trained),
            "fit_seconds": ready - loaded,
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
        if self._method.after is None:
            return None
        runs = tuple(fit.folder for fit in fits)
        made = Made(model, self._load, runs, sets, self.trial, self.study.samples, self.seed)
        return self._method.after(made)

    def _load(self, run: Path) -> Llama:
        return load_run(run, base_model(self.study, self.device))[0]

    @property
    def _samples(self) -> int:
        return self._method.draws or self.study.samples

    @property
    def _method(self) -> Method:
        return METHODS[self.study.arms[self.arm][0]]

    def _fit(self, seed: int) -> Fit:
        configs = self.study.configs(self.arm, self.trial, seed)
        return Fit(self.study, self.seed, *configs, self.out, self.device)


def _set(config: AdapterConfig | TrainConfig) -> dict[str, Any]:
    """The fields that are not at their defaults: a new field changes no folder's name."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return {k: v for k, v in dataclasses.asdict(config).items() if v != defaults[k]}


def _fail(folder: Path, error: InputError) -> None:
    """Note that a job has failed for its settings: they are not tried again."""
    atomic_write_text(folder / FAILED, json_text({"error": str(error)}) + "\n")


def _numbers(model: Llama, posterior: Posterior | None) -> int:
    """How many numbers a model needs for its answers, in addition to the base model."""
    own = list(adapter_state(model).values())
    if isinstance(posterior, Ensemble):
        members = [p for state in posterior.members for p in state.values()]
        return sum(p.numel() for p in members) + sum(map(_stored, posterior.posteriors))
    if isinstance(posterior, Swag):
        own = []  # its averages take their place
    return sum(p.numel() for p in own) + _stored(posterior)


def _stored(posterior: Posterior | None) -> int:
    """How many numbers a posterior of one run keeps."""
    own: list[torch.Tensor] = []
    if isinstance(posterior, Swag):
        own = [p for state in (posterior.mean, posterior.square) for p in state.values()]
    elif isinstance(posterior, Laplace):
        own = [p for curvature in posterior.curvature.values() for p in curvature]
    elif isinstance(posterior, Subspace):
        own = [posterior.precision, posterior.values, posterior.vectors]
    elif posterior is not None:  # of a plugin
        own = [p for p in vars(posterior).values() if isinstance(p, torch.Tensor)]
    return sum(p.numel() for p in own)


def _reset_peak() -> None:
    """Start this process's count of peak memory anew, where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Peak resident memory since `_reset_peak`, or since the process began if that is unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
