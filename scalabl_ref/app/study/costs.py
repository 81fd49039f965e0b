"""What a study takes: runs, steps, FLOP and memory, before any of it is done."""

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
    """An estimate of what a study takes at `config.limit`.

    runs, steps: training runs and their steps; a run that methods share counts once. flop: products
    with the base model's weights, 2 FLOP for each weight and token forward and as many backward (it
    is not trained); attention, adapters and padding are left out. bytes: of the base model.
    Raises InputError if the data cannot be loaded, at any of the sizes.
    """
    config = dataclasses.replace(config)  # a copy that has not read its files yet
    for size in config.sizes:  # fewer examples may have fewer classes
        encoded_sets(dataclasses.replace(config, limit=size), ("train", "validation", "test"))
    shape, _ = read_config(Path(config.model) / "config.json")
    weights = {name: p.numel() for name, p in Llama(shape, device="meta").named_parameters()}
    inner = sum(n for name, n in weights.items() if name.startswith("layers."))
    sets = encoded_sets(config, ("train", "validation", "test", *config.ood))
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
    """Passes (backward ones cost as much as forward ones): over sets beforehand, and per answer."""
    if method.startswith("laplace"):
        return {"train": 1 + classes}, 1 + classes
    if method == "tfb":
        return {"validation": 15 * samples}, samples  # about as many steps of the bisection
    if method == "ensemble":
        return {}, METHODS[method].members
    return {}, 1 if method in ("mle", "map", "point") else samples
