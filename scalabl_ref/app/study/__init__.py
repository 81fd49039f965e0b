"""`scalabl study`: methods side by side, on the same model, data, seeds and budget.

A study is a JSON file with the fields of `Study`. A trial is a setting of a method's two knobs.
Each trial is trained with the first seed and scored by its NLL on a validation set. The best trial
is then trained with all seeds and scored on the test set. All methods train on the same rows and
have equally many trials. The validation set also gives the temperature of rows "+ temperature".

OUT/runs holds the training runs and OUT/answers the answers of each model. Methods that train alike
share runs (mle, ensemble, swag, tfb; map, laplace). Nothing that is there is done again. A folder's
name digests all that its content depends on: settings, and the contents of data files and base
model, but not their paths. So moved files are recognised, and changed ones lead to new work.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import FrameType
from typing import Any

from ...evaluation.comparison import row, scores, summary, table, write_page
from ...support.errors import Interrupted, on_signals
from ...support.fields import json_text
from ...support.files import atomic_write_text
from ...support.progress import progress_bar
from ...training.lock import alone
from ..workers import Workers
from . import paper
from .config import Study
from .costs import cost
from .jobs import Fit, Job
from .methods import METHODS, Method

__all__ = ["METHODS", "Fit", "Job", "Method", "Study", "cost", "paper", "run_study"]

OURS = tuple(name for name, method in METHODS.items() if method.settings["method"] == "scalabl")


def run_study(config: Study, out: Path, jobs: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Do what is missing of the study under `out`; returns its results and writes them.

    jobs: runs at a time, each in a process of its own with one thread; one runs in this process.
    Writes OUT/results.json, OUT/results.md and OUT/results.html. Called again, it continues.

    Raises InputError as loading and training do, at once, whatever else is running; InputError if
    another process runs a study in that folder; Interrupted on SIGINT or SIGTERM; RankLost if one
    of the processes dies.
    """
    config = dataclasses.replace(config)  # a copy that has not read its files yet
    with Workers(jobs) as workers, on_signals(_interrupt), alone(out):
        results, models = _of_size(config, out, workers, device)
        results["sizes"] = {}
        for size in config.sizes:
            smaller = dataclasses.replace(config, limit=size, sweep=())
            results["sizes"][size], _ = _of_size(smaller, out, workers, device)
        atomic_write_text(out / "results.json", json_text(results, indent=2) + "\n")
        atomic_write_text(out / "results.md", table(results))
        write_page(out / "results.html", results, models)
    return results


def _of_size(
    config: Study, out: Path, workers: Workers, device: str
) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """Tune, then test, with the training set at `config.limit`: results and folders of answers."""
    tuning = {
        method: [
            Job(config, method, trial, config.seeds[0], ("validation",), out, device)
            for trial in config.trials(method)
        ]
        for method in config.methods
    }
    _run_all([job for trials in tuning.values() for job in trials], workers, "tune")
    validation = {
        method: [scores(job.folder, "validation", config.bins) for job in trials]
        for method, trials in tuning.items()
    }
    chosen = {method: _least([s["nll"] for s in tried]) for method, tried in validation.items()}
    finals = {
        method: _with_seeds(trials[chosen[method]], ("validation", "test", *config.ood))
        for method, trials in tuning.items()
    }
    _run_all([job for runs in finals.values() for job in runs], workers, "test")
    sweeps = {
        method: [_with_seeds(job, ("test",)) for job in tuning[method]] for method in config.sweep
    }
    swept = [job for trials in sweeps.values() for runs in trials for job in runs]
    _run_all(swept, workers, "sweep")
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


def _run_all(wanted: list[Job], workers: Workers, title: str) -> None:
    """Train the runs that are missing, then let the models answer."""
    todo = [job for job in wanted if not job.done]
    fits = {fit.folder: fit for job in todo for fit in job.fits() if not fit.done}
    stages: list[tuple[str, list[Any]]] = [("train", list(fits.values())), ("answer", todo)]
    for stage, some in stages:
        with progress_bar(len(some), f"{title}: {stage}", "run") as bar:
            for _ in workers.run(some):
                bar.update()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)
