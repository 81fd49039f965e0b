"""`scalabl study`: methods side by side, on the same model, data, seeds and budget.

A study is one JSON file, the fields of `Study`. Every trial of a method, a setting of its knobs,
is trained with the first seed and scored by its NLL on a validation split; the best one then is
trained with all seeds and scored on the test set. All methods train on the same part of the data
and have equally many trials; the validation split also gives the temperature of the scaled rows.

Everything lies under OUT/runs/METHOD/TRIAL-SEED: what is there already is not done again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import metrics
from .adapters import AdapterConfig, adapters, add_adapters
from .checkpoint import load_tensors, read_json, save_tensors
from .data import Encoded, Example, encode, evaluation_batches, load, num_classes, split
from .errors import InputError, atomic_write_text, make_folder
from .llama import Llama
from .methods import Laplace, Posterior, tfb
from .methods.ensemble import Ensemble, Swag
from .predict import Prediction, predict_all
from .progress import progress_bar
from .tokenizer import load_tokenizer
from .train import TrainConfig, Trainer, adapter_state, fit

SETS = ("validation", "test", "ood")


@dataclass(frozen=True)
class Method:
    """How a method is trained and what is made of the run.

    settings: changes to AdapterConfig and TrainConfig. knob: the second knob beside lr, its name
    and its values. members: runs that one model takes. after: makes the posterior of a finished run
    from (model, training data, validation data, samples, seed); None draws from the adapters.
    """

    settings: dict[str, Any]
    knob: tuple[str, tuple[float, ...]] = ("share_of_steps", (1.0, 0.25))
    members: int = 1
    after: Callable[..., Posterior | None] | None = None
    collects: bool = False  # SWAG's iterates


def _laplace(layers: Literal["all", "last"]) -> Callable[..., Posterior]:
    def after(model: Llama, train: Encoded, held: Encoded, samples: int, seed: int) -> Posterior:
        return Laplace.fit(model, evaluation_batches(train, 8), layers=layers).optimise_prior()

    return after


def _tfb(model: Llama, train: Encoded, held: Encoded, samples: int, seed: int) -> None:
    """Turns the model into one that draws; 0.003 is the published tolerance."""
    tfb(model, list(evaluation_batches(held, 32)), 0.003, samples=samples, seed=seed)


METHODS: dict[str, Method] = {
    "mle": Method({"method": "mle"}),
    "map": Method({"method": "map"}, ("prior_std", (0.1, 0.3))),
    "dropout": Method({"method": "dropout", "sampling": "token"}, ("dropout", (0.1, 0.3))),
    "ensemble": Method({"method": "mle"}, members=3),
    "laplace": Method({"method": "map"}, ("prior_std", (0.1, 0.3)), after=_laplace("all")),
    "laplace last": Method({"method": "map"}, ("prior_std", (0.1, 0.3)), after=_laplace("last")),
    "blob": Method({"method": "blob"}, ("beta", (0.1, 1.0))),
    "tfb": Method({"method": "mle"}, after=_tfb),
    "swag": Method({"method": "mle"}, collects=True),
    "scalabl": Method({"method": "scalabl"}, ("beta", (1.0, 5.0))),
    "scalabl official": Method({"method": "scalabl", "kl": "official"}, ("beta", (0.1, 0.5))),
    "scalabl full": Method({"method": "scalabl", "covariance": "full"}, ("beta", (1.0, 5.0))),
    "scalabl layer prior": Method({"method": "scalabl", "prior": "layer"}, ("beta", (1.0, 5.0))),
    "scalabl scale prior": Method(
        {"method": "scalabl", "prior": "component"}, ("beta", (1.0, 5.0))
    ),
}


@dataclass(frozen=True)
class Study:
    """model: folder. train, test, ood: files, in `format` and `ood_format`; the limits cut them.

    validation: share of the training examples set apart. lr: rates that every method tries.
    settings: of AdapterConfig and TrainConfig, for all methods. knobs: other values of a method's
    second knob, by method. seeds: of data order, initial values and noise.
    """

    model: str
    train: str
    test: str
    format: str = "jsonl"
    ood: str | None = None
    ood_format: str = "jsonl"
    limit: int | None = None
    test_limit: int | None = None
    ood_limit: int | None = None
    validation: float = 0.2
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: tuple[float, ...] = (1e-3, 3e-3)
    knobs: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    samples: int = 10
    bins: int = 15

    @staticmethod
    def read(path: Path) -> Study:
        """Raises InputError for an unknown field or method, naming it."""
        values = read_json(path)
        known = {f.name for f in dataclasses.fields(Study)}
        for name in values:
            if name not in known:
                raise InputError(f"{path}: unknown field {name!r}: expected {', '.join(known)}")
        for name in ("model", "train", "test"):
            if name not in values:
                raise InputError(f"{path}: field {name!r} is missing")
        for name in ("methods", "seeds", "lr"):
            if name in values:
                values[name] = tuple(values[name])
        study = Study(**values)
        for name in study.methods:
            if name not in METHODS:
                raise InputError(f"{path}: unknown method {name!r}: expected {', '.join(METHODS)}")
        return study

    def trials(self, method: str) -> list[dict[str, float]]:
        """Every pair of a rate and a value of the method's second knob."""
        knob, values = METHODS[method].knob
        return [
            {"lr": lr, knob: value}
            for lr, value in itertools.product(self.lr, self.knobs.get(method, values))
        ]


# --- One run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One model: a method with one trial's settings and a seed, and the sets that it answers."""

    study: Study
    method: str
    trial: dict[str, float]
    seed: int
    sets: tuple[str, ...]
    out: Path

    @property
    def folder(self) -> Path:
        about = [dataclasses.asdict(self.study), self.method, self.trial]
        for irrelevant in ("methods", "seeds", "knobs", "lr"):
            del about[0][irrelevant]  # type: ignore[attr-defined]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]
        return self.out / "runs" / self.method.replace(" ", "-") / f"{digest}-{self.seed}"

    def configs(self, member: int) -> tuple[AdapterConfig, TrainConfig]:
        values = {**self.study.settings, **METHODS[self.method].settings, **self.trial}
        values["seed"] = 1000 * member + self.seed
        share = values.pop("share_of_steps", 1.0)  # stopping early, with a schedule to match
        values["steps"] = max(1, round(share * values.get("steps", TrainConfig.steps)))
        return _config(AdapterConfig, values), _config(TrainConfig, values)

    def missing(self) -> list[str]:
        return [name for name in self.sets if not (self.folder / f"{name}.safetensors").exists()]


def _config(cls: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def run(job: Job) -> None:
    """Train what is not trained, and answer the sets that are not answered, into job.folder."""
    wanted = job.missing()
    if not wanted:
        return
    method, started = METHODS[job.method], time.perf_counter()
    sets, tokenizer = _sets(job.study), load_tokenizer(Path(job.study.model))
    classes = num_classes(sets["train"])
    states, swag, model = [], Swag(), None
    for member in range(method.members):
        model = Llama.from_pretrained(job.study.model)
        encoded = {
            name: encode(
                rows, tokenizer, classes=classes, max_length=model.config.max_position_embeddings
            )
            for name, rows in sets.items()
            if name == "train" or name in (*wanted, "validation")
        }
        adapter, config = job.configs(member)
        add_adapters(model.trim_head(encoded["train"].classes), adapter, config.seed)
        trainer, folder = Trainer(model, encoded["train"], config), job.folder / f"member-{member}"
        collect = _collector(swag, model, config.steps) if method.collects else lambda record: None
        resume = (folder / "checkpoint.pt").exists() and not method.collects
        fit(trainer, folder, resume, collect)
        states.append({name: t.clone() for name, t in adapter_state(model).items()})
    assert model is not None
    model.eval()
    posterior: Posterior | None = swag if method.collects else None
    if method.members > 1:
        posterior = Ensemble(states)
    if method.after is not None:
        posterior = method.after(
            model, encoded["train"], encoded["validation"], job.study.samples, job.seed
        )
    trained = time.perf_counter()
    for name in wanted:
        answers = _answers(model, encoded[name], job.study.samples, job.seed, posterior)
        tensors = {**answers._asdict(), "labels": torch.tensor(encoded[name].labels)}
        save_tensors(job.folder / f"{name}.safetensors", tensors.items())
    about = {
        "method": job.method,
        "trial": job.trial,
        "seed": job.seed,
        "parameters": method.members * sum(p.numel() for p in adapter_state(model).values()),
        "train_seconds": trained - started,
        "answer_seconds": time.perf_counter() - trained,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "widths": {name: a.widths().mean().item() for name, a in adapters(model).items()
                   if len(a.widths())},
    }  # fmt: skip
    atomic_write_text(job.folder / "run.json", json.dumps(about, indent=2) + "\n")


def _sets(study: Study) -> dict[str, list[Example]]:
    rest, held = split(load(study.train, study.format, study.limit), study.validation, 0)
    sets = {"train": rest, "validation": held}
    sets["test"] = load(study.test, study.format, study.test_limit)
    if study.ood is not None:
        sets["ood"] = load(study.ood, study.ood_format, study.ood_limit)
    return sets


def _collector(swag: Swag, model: Llama, steps: int) -> Callable[[dict[str, float]], None]:
    """Collects the iterates of the last quarter of the steps."""

    def collect(record: dict[str, float]) -> None:
        if record["step"] + 1 > 0.75 * steps:
            swag.collect(model)

    return collect


def _answers(
    model: Llama, data: Encoded, samples: int, seed: int, posterior: Posterior | None
) -> Prediction:
    return predict_all(model, evaluation_batches(data, 32), samples, seed, posterior=posterior)


# --- The whole study ------------------------------------------------------------------------------


def study(config: Study, out: Path, jobs: int = 1) -> dict[str, Any]:
    """Run what is missing of the study under `out`; returns, and writes, its results.

    jobs: runs side by side, each in a process of its own with one thread.
    Writes OUT/results.json and OUT/results.md. Raises InputError as loading and training do.
    """
    make_folder(out)
    sets = tuple(name for name in SETS if name != "ood" or config.ood is not None)
    tuning = {
        method: [
            Job(config, method, trial, config.seeds[0], ("validation",), out)
            for trial in config.trials(method)
        ]
        for method in config.methods
    }
    _run_all([job for trials in tuning.values() for job in trials], jobs, "tune")
    chosen = {
        method: min(trials, key=lambda job: _scores(job, "validation", config.bins)["nll"]).trial
        for method, trials in tuning.items()
    }
    finals = {
        method: [Job(config, method, trial, seed, sets, out) for seed in config.seeds]
        for method, trial in chosen.items()
    }
    _run_all([job for runs in finals.values() for job in runs], jobs, "test")
    results = summary(config, finals)
    results["tuning"] = {
        method: [{**job.trial, **_scores(job, "validation", config.bins)} for job in tuning[method]]
        for method in config.methods
    }
    atomic_write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    atomic_write_text(out / "results.md", table(results))
    return results


def _run_all(todo: list[Job], jobs: int, title: str) -> None:
    todo = [job for job in todo if job.missing()]
    with progress_bar(len(todo), title, "run") as bar:
        if jobs == 1:
            for job in todo:
                run(job)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            jobs, context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for done in concurrent.futures.as_completed([pool.submit(run, job) for job in todo]):
                done.result()
                bar.update()


# --- Results --------------------------------------------------------------------------------------


def _load(job: Job, name: str) -> dict[str, Tensor]:
    return load_tensors(job.folder / f"{name}.safetensors")[0]


def _scores(job: Job, name: str, bins: int) -> dict[str, float]:
    answers = _load(job, name)
    return _metrics(answers["probs"], answers["labels"], bins)


def _metrics(probs: Tensor, labels: Tensor, bins: int) -> dict[str, float]:
    return {
        "acc": metrics.accuracy(probs, labels),
        "ece": metrics.ece(probs, labels, bins),
        "nll": metrics.nll(probs, labels),
        "brier": metrics.brier(probs, labels),
    }


def summary(config: Study, finals: dict[str, list[Job]]) -> dict[str, Any]:
    """Of every method, with and without temperature: each seed's scores, mean and sd; the best."""
    rows: dict[str, dict[str, Any]] = {}
    probs: dict[str, list[Tensor]] = {}
    labels = _load(next(iter(finals.values()))[0], "test")["labels"]
    for method, runs in finals.items():
        plain = [_load(job, "test")["probs"] for job in runs]
        scaled = []
        for job, p in zip(runs, plain, strict=True):
            held = _load(job, "validation")
            temperature = metrics.fit_temperature(held["probs"].log(), held["labels"])
            scaled.append(metrics.apply_temperature(p, temperature))
        about = [read_json(job.folder / "run.json") for job in runs]
        for name, each in ((method, plain), (f"{method} + temperature", scaled)):
            probs[name] = each
            scores = [_metrics(p, labels, config.bins) for p in each]
            rows[name] = {
                "trial": runs[0].trial,
                "parameters": about[0]["parameters"],
                "train_seconds": _mean([a["train_seconds"] for a in about]),
                "answer_seconds": _mean([a["answer_seconds"] for a in about]),
                "peak_bytes": max(a["peak_bytes"] for a in about),
                "widths": about[0]["widths"],
                "seeds": scores,
                **{key: _mean([s[key] for s in scores]) for key in metrics.SCORES},
                "sd": {key: _sd([s[key] for s in scores]) for key in metrics.SCORES},
            }
        if config.ood is not None:
            rows[method].update(_out_of_distribution(runs))
    best = {key: _best(key, rows, probs, labels, config.bins) for key in metrics.SCORES}
    return {"study": dataclasses.asdict(config), "methods": rows, "best": best}


def _out_of_distribution(runs: list[Job]) -> dict[str, float]:
    """Mean AUROC over the seeds of telling the ood set from the test set, by both uncertainties."""
    out: dict[str, list[float]] = {"auroc_entropy": [], "auroc_mutual_information": []}
    for job in runs:
        inside, outside = _load(job, "test"), _load(job, "ood")
        kind = torch.cat((torch.zeros(len(inside["labels"])), torch.ones(len(outside["labels"]))))
        for name, values in out.items():
            score = name.removeprefix("auroc_")
            both = torch.cat((inside[score], outside[score]))
            values.append(metrics.auroc(both, kind.long()))
    return {name: _mean(values) for name, values in out.items()}


def _best(
    key: str,
    rows: dict[str, dict[str, Any]],
    probs: dict[str, list[Tensor]],
    labels: Tensor,
    bins: int,
) -> dict[str, Any]:
    """The best row by `key`, and whether a paired bootstrap over the test set tells it apart.

    The runner-up is resampled with the same rows, seeds averaged; significant says that the 95 %
    interval of the difference does not hold 0.
    """
    sign = -1.0 if key == "acc" else 1.0
    first, second = sorted(rows, key=lambda name: sign * rows[name][key])[:2]
    low, high = metrics.paired_intervals(probs[first], probs[second], labels, bins)[key]
    return {"name": first, "runner_up": second, "difference": [low, high],
            "significant": not low <= 0 <= high}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results in Markdown: mean and sd over the seeds; bold where the best is told apart."""
    ood = any("auroc_entropy" in row for row in results["methods"].values())
    heads = ["method", "trial", "ACC", "ECE", "NLL", "Brier", "parameters", "train s", "answer s"]
    heads += ["AUROC entropy", "AUROC information"] if ood else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in results["methods"].items():
        trial = ", ".join(f"{key} {value:g}" for key, value in row["trial"].items())
        cells = [name, trial]
        for key in metrics.SCORES:
            best = results["best"][key]
            value = f"{row[key]:.3f}"
            if best["significant"] and best["name"] == name:
                value = f"**{value}**"
            cells.append(f"{value} ± {row['sd'][key]:.3f}")
        cells += [f"{row['parameters']:,}", f"{row['train_seconds']:.0f}"]
        cells.append(f"{row['answer_seconds']:.0f}")
        if ood:
            for key in ("auroc_entropy", "auroc_mutual_information"):
                cells.append(f"{row[key]:.3f}" if key in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _sd(values: list[float]) -> float:
    """Sample standard deviation; 0 of one value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
