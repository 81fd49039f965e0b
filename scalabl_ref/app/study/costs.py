"""The cost of a study: runs, steps, FLOP and memory, estimated before it starts."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from ...model.llama import Llama
from ...model.weights import read_config
from .config import Study
from .jobs import Fit, Job
from .methods import METHODS
from .sets import encoded_sets


def cost(config: Study) -> dict[str, float]:
    """An estimate of the cost of a study.

    runs, steps: training runs and their steps; a run that methods share counts once. flop: products
    with the base model's weights, 2 FLOP for each weight and token forward and as many backward (it
    is not trained); attention, adapters and padding are left out. bytes: of the base model. The
    trials that will be tried again are not known yet, so the first ones stand for them; lengths may
    differ. Raises InputError if the data cannot be loaded.
    """
    config = dataclasses.replace(config)  # a copy that has not read its files yet
    shape, _ = read_config(Path(config.model) / "config.json")
    weights = {name: p.numel() for name, p in Llama(shape, device="meta").named_parameters()}
    inner = sum(n for name, n in weights.items() if name.startswith("layers."))
    sets = encoded_sets(config, config.sets, config.seeds[0])
    tokens = {name: sum(map(len, data.tokens)) for name, data in sets.items()}
    fits: dict[Any, Fit] = {}
    passes = 0.0  # token passes through the base, forward or backward
    for arm in config.arms:
        ready, each = _passes(config.arms[arm][0], config.samples, len(sets["train"].classes))
        trials = config.tried(arm)
        first, *others = config.tuning_seeds
        tuned = [] if config.like(arm) else [(trial, first) for trial in trials]
        if len(tuned) > 1:
            tuned += itertools.product(trials[: config.finalists], others)
        tested = [Job(config, arm, trials[0], s, config.sets, Path()) for s in config.seeds]
        if METHODS[
            config.arms[arm][0]
        ].ours:  # the best of ours is chosen by runs with all tuning seeds
            tuned += [(trials[0], s) for s in config.tuning_seeds if (trials[0], s) not in tuned]
        tuned_jobs = [Job(config, arm, t, s, ("validation",), Path()) for t, s in tuned]
        for job in tuned_jobs + tested:
            fits.update({(fit.adapter, fit.train, fit.replicate): fit for fit in job.fits()})
            passes += sum(n * tokens[name] for name, n in ready.items())
            passes += each * sum(tokens[name] for name in job.sets)
    steps = [fit.train.steps for fit in fits.values()]
    length = tokens["train"] / len(sets["train"].labels)
    passes += sum(2 * length * fit.train.steps * fit.train.batch for fit in fits.values())
    size = 2 if config.dtype == "bfloat16" else 4
    return {"runs": len(fits), "steps": sum(steps), "flop": 2 * inner * passes,
            "bytes": size * sum(weights.values())}  # fmt: skip


def _passes(method: str, samples: int, classes: int) -> tuple[dict[str, int], int]:
    """Passes (backward ones cost as much as forward ones): over sets beforehand, and per answer."""
    about = METHODS[method]
    if "subspace" in method or method.startswith("laplace"):
        each = 1 + classes
        return {"train": each * about.members}, (
            samples if "sampled" in method else each
        ) * about.members
    if method == "tfb":
        return {"validation": 15 * samples}, samples  # about as many steps of the bisection
    if about.settings["method"] in ("mle", "map", "point") and method != "swag":
        return {}, about.members
    return {}, samples
