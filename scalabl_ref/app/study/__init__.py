"""`scalabl study`: methods side by side, on the same model, data, seeds and budget.

A study is a JSON file with the fields of `Study`. An arm is a method under a variant, such as one
choice of adapted layers. A trial is a value for each setting that a method tunes. The trials of an
arm are trained with the first tuning seed and scored by their NLL on the validation set; the best
are also trained with the other tuning seeds. The trial with the lowest mean NLL is trained with all
seeds and tested. All arms have the same training rows. They have equally many trials, unless they
tune nothing or take the trial of another arm. Temperatures (rows "+ temperature") are fitted on the
validation set.

A trial that diverges, or whose run allows no posterior, counts as the worst. A replicate of that
kind is left out, and reported under "failed".

OUT/runs holds the training runs and OUT/answers the answers of each model. Methods with the same
training share runs. Finished work is not repeated. A folder's name is a digest of all that its
content depends on: settings, and the contents of data files and base model, but not their paths. So
moved files are recognised, and changed ones lead to new work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from ...evaluation.comparison import scores, summary
from ...evaluation.tables import table, write_page
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
from .methods import METHODS, Method, Range

__all__ = [
    "METHODS",
    "Fit",
    "Job",
    "Method",
    "Range",
    "Study",
    "cost",
    "paper",
    "run_study",
]


def run_study(config: Study, out: Path, jobs: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Run the missing parts of the study under `out`; returns its results and writes them.

    jobs: runs at a time, each in a process of its own with one thread; one runs in this process.
    Writes OUT/tuning.json once the trials are chosen, and at the end OUT/results.json,
    OUT/results.md and OUT/results.html. Called again, it continues.

    Raises InputError as loading and training do, at once, even while other jobs run; InputError if
    another process runs a study in that folder; Interrupted on SIGINT or SIGTERM; RankLost if one
    of the processes dies.
    """
    config = dataclasses.replace(config)  # a copy that has not read its files yet
    with Workers(jobs) as workers, on_signals(_interrupt), alone(out):
        tuning = _tune(config, out, workers, device)
        about = {"study": dataclasses.asdict(config), "tuning": _table_of(tuning)}
        atomic_write_text(out / "tuning.json", json_text(about, indent=2) + "\n")
        arms = {arm: _with_seeds(_chosen(trials), config) for arm, trials in tuning.items()}
        for arm in config.arms:
            if like := config.like(arm):
                arms[arm] = [dataclasses.replace(job, arm=arm) for job in arms[like]]
        arms = {arm: arms[arm] for arm in config.arms}
        _run_all([job for runs in arms.values() for job in runs], workers, "test")
        models = {arm: [job.folder for job in runs if not job.failed] for arm, runs in arms.items()}
        models = {arm: folders for arm, folders in models.items() if folders}
        tried = _validation(arms, config, workers)
        validation = {arm: nll for arm, nll in tried.items() if arm in models}
        shifted = [name for name in config.sets[2:] if name not in config.ood]
        families = _families(models, config)
        results = {
            "study": dataclasses.asdict(config),
            **summary(models, validation, config.bins, config.ood, shifted, families),
            "failed": {
                arm: [job.seed for job in runs if job.failed]
                for arm, runs in arms.items()
                if any(job.failed for job in runs)
            },
            "tuning": _table_of(tuning),
            "at_edge": {arm: _edges(config, arms[arm][0]) for arm in tuning},
        }
        atomic_write_text(out / "results.json", json_text(results, indent=2) + "\n")
        atomic_write_text(out / "results.md", table(results))
        write_page(out / "results.html", results, models)
    return results


Trials = list[list[Job]]  # of each trial, a job for each seed it has been tried with


def _tune(config: Study, out: Path, workers: Workers, device: str) -> dict[str, Trials]:
    """The trials of every arm that has its own, in the order of their validation NLL.

    The first `config.finalists` of the first seed are tried with all tuning seeds, and come first.
    An only trial is not tried.
    """
    first, *others = config.tuning_seeds
    tuning: dict[str, Trials] = {
        arm: [
            [Job(config, arm, trial, first, ("validation",), out, device)]
            for trial in config.tried(arm)
        ]
        for arm in config.arms
        if not config.like(arm)
    }
    several = [trials for trials in tuning.values() if len(trials) > 1]
    _run_all([job for trials in several for runs in trials for job in runs], workers, "tune")
    for trials in several:
        trials.sort(key=_nll)
        for runs in trials[: config.finalists]:
            runs += [dataclasses.replace(runs[0], seed=seed) for seed in others]
    _run_all([job for trials in several for runs in trials for job in runs], workers, "tune again")
    for trials in several:
        most = len(trials[0])
        trials.sort(key=lambda runs: (len(runs) < most, _nll(runs)))
    return tuning


def _table_of(tuning: dict[str, Trials]) -> dict[str, list[dict[str, Any]]]:
    """Of each arm its trials, the chosen one first. Field `tuning` of another study reads it.

    An only trial has no NLL.
    """
    table: dict[str, list[dict[str, Any]]] = {}
    for arm, trials in tuning.items():
        scored = [(_nll(runs), len(runs)) for runs in trials] if len(trials) > 1 else [(None, 0)]
        table[arm] = [
            {"trial": runs[0].trial, "nll": nll, "seeds": seeds}
            for runs, (nll, seeds) in zip(trials, scored, strict=True)
        ]
    return table


def _nll(runs: list[Job]) -> float:
    """Mean NLL of an arm's runs on the validation set; infinite if one of them failed."""
    config = runs[0].study
    if any(job.failed for job in runs):
        return math.inf
    return sum(scores(job.folder, "validation", config.bins)["nll"] for job in runs) / len(runs)


def _validation(arms: dict[str, list[Job]], config: Study, workers: Workers) -> dict[str, float]:
    """NLL of our arms on the validation set, by runs with the tuning seeds.

    A choice among our arms by the runs that are tested would favour an arm whose runs were lucky.
    """
    ours = [arm for arm, (method, _) in config.arms.items() if METHODS[method].ours]
    tried = {
        arm: [
            dataclasses.replace(arms[arm][0], seed=seed, sets=("validation",))
            for seed in config.tuning_seeds
        ]
        for arm in ours
    }
    _run_all([job for runs in tried.values() for job in runs], workers, "validate")
    return {arm: _nll(runs) for arm, runs in tried.items()}


def _families(models: Iterable[str], config: Study) -> dict[str, list[str]]:
    """Arms that are compared with each other, by the name of their family."""
    families: dict[str, list[str]] = {}
    for arm in models:
        name, variant = config.arms[arm]
        method = METHODS[name]
        kinds = {
            "all": True,
            "single networks": method.members == 1,
            "untuned": not method.tuned and not method.like,
        }
        for kind in (kind for kind, member in kinds.items() if member):
            families.setdefault(f"{kind}, {variant}" if variant else kind, []).append(arm)
    return families


def _chosen(trials: Trials) -> Job:
    return trials[0][0]


def _with_seeds(job: Job, config: Study) -> list[Job]:
    return [dataclasses.replace(job, seed=seed, sets=config.sets) for seed in config.seeds]


def _edges(config: Study, job: Job) -> list[str]:
    """The tuned settings whose chosen value is the lowest or the highest of all trials."""
    tried = config.tried(job.arm)
    ends = {name: [f(t[name] for t in tried) for f in (min, max)] for name in job.trial}
    return [name for name, value in job.trial.items() if value in ends[name] and len(tried) > 1]


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
