"""Checks of training: rates, gradients, interrupted runs, held-out rows, the parts of ranks."""

from __future__ import annotations

import json
import math
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from ..core.adapter import SubspaceAdapter, adapter_state, adapters
from ..core.noise import FIRST_TRAINING_DRAW, Noise
from ..core.objective import class_logits
from ..data import collate
from ..training import ranks, savepoints
from ..training.loop import fit
from ..training.schedule import first_held
from ..training.trainer import TrainConfig, Trainer, mean_sigma, parameter_groups
from ..training.watch import Watch, interval, mean_model_score
from .check import Check, Errors, Op, exact, ratio, refused
from .method_checks import EPS, NETWORK, layers, prompts
from .use_checks import encoded, mean_logits, new_trainer

# --- Rates and gradients --------------------------------------------------------------------------

WIDTHS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"log_s", "log_sigma"}), ({"method": "blob"}, {"G"}), ({"method": "mle"}, set()),
    ({"covariance": "full"}, {"log_s", "log_sigma", "lower"}),
]  # fmt: skip
LIMITS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps must be"), ({"batch": 0}, "batch must"), ({"micro_batch": 0}, "micro"),
    ({"lr": math.inf}, "lr must"), ({"kl_lr": -1.0}, "kl_lr must"), ({"warmup": 1.5}, "warmup"),
    ({"swag": -0.1}, "swag must"), ({"kl_gamma": 0.0}, "kl_gamma"),
    ({"swag_lr": 1.0}, "needs swag"), ({"kl": "backward"}, "kl must be"),
    ({"objective": "map"}, "objective must"),
    ({"beta": math.nan}, "beta must"), ({"weight_decay": -1.0}, "weight_decay"),
]  # fmt: skip


def rates(_: Op, device: torch.device) -> Errors:
    """Groups of parameters, rates of every step with and without SWAG, defaults and limits."""
    for config, widths in WIDTHS:
        own = adapters(layers(device, **config))
        names = {id(p): n for a in own.values() for n, p in a.named_parameters()}
        for given, fast in ((None, 0.08), (0.5, 0.5), (0.0, 0.0)):
            groups = parameter_groups([*own.values()], 0.02, given)
            found = [({names[id(p)] for p in g["params"]}, g["lr"]) for g in groups]
            right = [({"A", "B"}, 0.02), *([(widths, fast)] if widths else [])]
            yield exact(found == right, f"{config}, {given}: {found}")
            yield exact(sum(len(g["params"]) for g in groups) == len(names), f"{config}: all")
    for swag_lr, held in ((None, 6 / 7), (0.005, 0.25)):
        run = new_trainer(device, "mle", steps=10, swag=0.6, swag_lr=swag_lr)
        told = [run.step()["lr"] / 0.02 for _ in range(10)]
        factors = [0.0, 1 / 3, 2 / 3, 1.0, *[held] * 6]
        near = all(abs(a - b) < 1e-12 for a, b in zip(told, factors, strict=True))
        yield exact(near, f"swag_lr {swag_lr}: {told}")
        yield exact(run.collector.count == 6, f"{run.collector.count} weights collected, not 6")
    for arguments, step in (((10, 0.3, 0.6), 4), ((10, 0.5, 0.8), 5), ((10, 0.0, 0.0), 10)):
        yield exact(first_held(*arguments) == step, f"held from {first_held(*arguments)}")
    looks = ((100, 30, 25), (1000, 60, 60), (1000, 10, 50), (3, 9, 1), (8, 9, 2), (30, 1, 2))
    for steps, epoch, right_interval in looks:
        got = interval(steps, epoch)
        yield exact(got == right_interval, f"a look every {got} of {steps} steps")
    for changes, words in LIMITS:
        yield refused(partial(TrainConfig, **changes), words)
    plain = TrainConfig(1000, 8, None, 1e-3, None, 0.06, 1e-6, 0.0, "elbo", "forward", 1.0, 0.2,
                        8.0, 0.0, None, 0, 200)  # fmt: skip
    yield exact(TrainConfig() == plain, f"defaults {TrainConfig()}")
    yield refused(lambda: Trainer(run.model, run.data, TrainConfig(swag=0.5)), "a collector")
    yield from official_rate(device)
    wide = layers(device)
    mean = sum(float(a.scale()[1].detach().sum()) for a in subspaces(wide)) / 6
    yield abs(mean_sigma(wide) - mean) / (16 * EPS * mean)


def official_rate(device: torch.device) -> Errors:
    """The SGD step on the KL alone: kl_lr, warm-up, and pi_i of M = int(100 N^(pi / gamma) / B)."""
    run = new_trainer(device, "scalabl", steps=40, objective="official", kl_gamma=100.0, kl_lr=0.3)
    run.done, M = 34, int(100 * 7 ** (math.pi / 100) / 3)
    run.rates[:] = [0.0, 0.0]
    rate = 0.3 * (40 - 34) / (40 - 12) * 2**35 / (2 ** (M + 1) - 1)
    before = [
        (a.log_s.detach().clone(), a.log_sigma.detach().clone()) for a in subspaces(run.model)
    ]
    run.step()
    for (log_s, log_sigma), a in zip(before, subspaces(run.model), strict=True):
        right = log_s - rate * (2 * log_s).exp(), log_sigma - rate * ((2 * log_sigma).exp() - 1)
        for got, value in zip((a.log_s, a.log_sigma), right, strict=True):
            yield ratio(got.detach(), value, value.abs() + 1, 64 * EPS, f"the KL's step, M = {M}")


def subspaces(model: torch.nn.Module) -> list[SubspaceAdapter]:
    return [a for a in adapters(model).values() if isinstance(a, SubspaceAdapter)]


def gradients_of_steps(_: Op, device: torch.device) -> Errors:
    """A step's gradients: those of (rows / batch) (mean NLL + beta KL / N), row by row.

    One batch of an epoch is short. Recomputed blocks, and activations kept elsewhere, change none.
    """
    settings: tuple[dict[str, Any], ...] = (
        {"beta": 0.5}, {"recompute": True}, {"offload_activations": True, "beta": 0.0},
    )  # fmt: skip
    for setting in settings:
        run = new_trainer(device, "scalabl", steps=4, **{"beta": 2.0, **setting})
        sizes = []
        for step in range(3):
            at = run.order.indices(step)
            noise, loss = Noise(5, FIRST_TRAINING_DRAW + step), torch.zeros((), dtype=torch.float64)
            for i in at:
                one = collate(run.data, [i]).to(device)
                log_p = torch.log_softmax(class_logits(run.model, one, noise), -1)
                loss = loss - log_p[0, run.data.labels[i]].cpu() / len(at)
            for a in subspaces(run.model):
                s, sigma = a.scale()
                kl = (-sigma.log() + (sigma**2 + s**2) / 2 - 0.5).sum().cpu()
                loss = loss + setting.get("beta", 2.0) * kl / 7
            own = [p for a in run.adapters for p in a.parameters()]
            right = torch.autograd.grad(len(at) / 3 * loss, own)
            run.step()
            sizes.append(len(at))
            for p, g in zip(own, right, strict=True):
                got, size = cast(Tensor, p.grad), g.abs().max().expand_as(g)
                yield ratio(got, g, size, 16 * NETWORK * EPS, f"{setting}, step {step}")
        yield exact(sorted(sizes) == [1, 3, 3], f"rows of the steps: {sizes}")


# --- Interrupted runs -----------------------------------------------------------------------------


def log_of(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def stops_after(steps: int) -> Any:
    def stop(record: dict[str, float]) -> None:
        if record["step"] == steps - 1:
            raise KeyboardInterrupt

    return stop


def interrupted(_: Op, device: torch.device) -> Errors:
    """A run that stops between checkpoints, and goes on: log, weights and best step of a whole one.

    Other settings are refused.
    """
    held = encoded(prompts(torch.device("cpu"), 5, 4, first=30))

    def new(**settings: Any) -> tuple[Trainer, Watch]:
        every = {"steps": 7, "checkpoint_every": 2, **settings}
        return new_trainer(device, "scalabl", **every), Watch(held, every=3, keep=True)

    with tempfile.TemporaryDirectory() as name:
        one, other = Path(name) / "one", Path(name) / "other"
        (whole, seen), (first, watch) = new(), new()
        fit(whole, one, watch=seen, beside=True)
        with suppress(KeyboardInterrupt):
            fit(first, other, on_step=stops_after(5), watch=watch)
        kept = [sorted(p.name for p in (run / "checkpoint").iterdir()) for run in (one, other)]
        yield exact(kept[0] == ["00000006", "00000007"], f"checkpoints of 7 steps: {kept[0]}")
        yield exact(kept[1] == ["00000002", "00000004"], f"checkpoints of 5 steps: {kept[1]}")
        yield exact(len(log_of(other)) == 5, "the log before the interruption")
        yield exact(savepoints.progress(other) == "step 4 of 7", savepoints.progress(other))
        (again, last), starts = new(), list[int]()
        fit(again, other, resume=True, watch=last, on_start=starts.append)
        yield exact(starts == [4], f"went on after {starts}")
        yield exact(log_of(other) == log_of(one), "log of a run that was resumed")
        yield exact((last.step, last.nll) == (seen.step, seen.nll), "the best step")
        state = adapter_state(again.model)
        same = [torch.equal(v, state[n]) for n, v in adapter_state(whole.model).items()]
        yield exact(all(same), "weights of a run that was resumed")
        looks = [r["step"] + 1 for r in log_of(one) if "heldout_nll" in r]
        yield exact(looks == [3, 6, 7], f"looks after {looks}")
        best = [r["heldout_nll"] for r in log_of(one) if r["step"] + 1 == seen.step]
        log_p = torch.log_softmax(mean_logits(whole.model, collate(held, range(5)).to(device)), -1)
        nll = -log_p[torch.arange(5), torch.tensor(held.labels)].mean()
        yield abs(best[0] - float(nll)) / (NETWORK * EPS * abs(best[0]))
        for change in ({"beta": 0.5}, {"seed": 6}):
            run = Trainer(new()[0].model, first.data, replace(first.config, **change))
            again_with = partial(fit, run, one, resume=True, watch=new()[1])
            yield refused(again_with, "other settings")


def checkpoints(_: Op, device: torch.device) -> Errors:
    """Two ranks' parts make one checkpoint; the newest whole one counts; later ones are removed."""
    tensors = {name: torch.arange(4.0) + i for i, name in enumerate("dbeac")}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Path(name)
        for done in (8, 99_999_999, 100_000_000):
            for number in (1, 0):
                with as_rank(number, 2):
                    savepoints.Saver(run).save(done, {n: t + done for n, t in tensors.items()}, {})
        files = [p.name for p in sorted((run / "checkpoint" / "99999999").glob("*.safetensors"))]
        right = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        yield exact(files == right, f"files of two ranks: {files}")
        folders = sorted(p.name for p in (run / "checkpoint").iterdir())
        yield exact(folders == ["100000000", "99999999"], f"the two newest: {folders}")
        for done in (100_000_000, 99_999_999):
            found = savepoints.load(run)
            same = {n: torch.equal(found.tensors[n], t + done) for n, t in tensors.items()}
            yield exact(found.done == done and all(same.values()), f"checkpoint {done}: {same}")
            path = run / "checkpoint" / f"{done:08}" / right[1]
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        yield refused(lambda: savepoints.load(run), "has changed since")
        manifest = run / "checkpoint" / "99999999" / "manifest.json"
        kept = json.loads(manifest.read_text())
        changes: tuple[dict[str, Any], ...] = ({"done": 8}, {"files": {}}, {"identity": None})
        for change in changes:
            manifest.write_text(json.dumps({**kept, **change}))
            yield refused(lambda: savepoints._read(manifest.parent), "not written by this program")
        (run / "checkpoint" / ".00000010.tmp").mkdir()
        (run / "checkpoint" / "notes").mkdir()
        savepoints.Saver(run).forget_after(99_999_999)
        left = sorted(p.name for p in (run / "checkpoint").iterdir())
        yield exact(left == ["99999999", "notes"], f"left after a step: {left}")
    with tempfile.TemporaryDirectory() as name:
        saver, value = Late(Path(name), beside=True), torch.zeros(3)
        saver.save(1, {"t": value}, {})
        value += 1
        saver.gate.set()
        saver.wait()
        found = savepoints.load(Path(name))
        yield exact(found.tensors["t"].tolist() == [0.0] * 3, "a snapshot of the moment")


class Late(savepoints.Saver):
    """Its thread waits until the gate is set."""

    def _write(self, *arguments: Any) -> None:
        self.gate.wait()
        super()._write(*arguments)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.gate = threading.Event()


# --- Ranks, without processes ---------------------------------------------------------------------


@contextmanager
def as_rank(number: int, count: int) -> Iterator[None]:
    """Within the block this process is one of several ranks, whose exchanges do nothing."""
    alone: dict[str, Any] = {
        "rank": lambda: number, "world": lambda: count, "barrier": lambda: None,
        "add_up": lambda parameters, *values: [*values], "sum_": lambda values: None,
        "largest": lambda value, group=None: value, "new_group": lambda: None,
    }  # fmt: skip
    with mock.patch.multiple(ranks, **alone):
        yield


def parts_of_ranks(_: Op, device: torch.device) -> Errors:
    """Ranks share rows: their gradients, NLLs and scores add up to those of one rank."""
    for count, rows in ((3, 7), (2, 4), (4, 2)):
        items, parts = list(range(rows)), []
        for number in range(count):
            with as_rank(number, count):
                parts.append(ranks.share(items))
        found = sorted(i for part, own in parts for i in part[:own])
        sizes = {len(part) for part, _own in parts}
        yield exact(found == items and len(sizes) == 1, f"{rows} rows on {count} ranks: {parts}")
    held = encoded(prompts(torch.device("cpu"), 7, 4, first=30))
    model = new_trainer(device, "scalabl", steps=4).model
    log_p = torch.log_softmax(mean_logits(model, collate(held, range(7)).to(device)), -1)
    labels = torch.tensor(held.labels)
    watch = Watch(held, every=1)
    steps = [(watch.look(model, done), watch.step)[1] for done in (1, 2)]
    yield exact(steps == [1, 1], f"the first of equal steps: {steps}")
    nll, hits = -log_p[torch.arange(7), labels].mean(), log_p.argmax(1) == labels
    for count in (1, 2, 3):
        scores = []
        for number in range(count):
            with as_rank(number, count):
                scores.append(torch.tensor(mean_model_score(model, held, 2), dtype=torch.float64))
        got, right = torch.stack(scores).sum(0), torch.stack([nll, hits.double().mean()])
        yield ratio(got, right, right, NETWORK * EPS, f"scores of {count} ranks")
    for step in range(3):
        for one, other in zip(added(device, step, 3), added(device, step, 1), strict=True):
            size = other.abs().max().expand_as(other)
            yield ratio(one, other, size, 16 * NETWORK * EPS, f"3 ranks, step {step}")


def added(device: torch.device, step: int, count: int) -> list[Tensor]:
    """NLL and accuracy of a step's rows, and its gradients, added up over so many ranks."""
    parts = []
    for number in range(count):
        run = new_trainer(device, "scalabl", steps=4)
        with as_rank(number, count):
            sums = run._accumulate_nll(run.order.indices(step), Noise(5, 9), 0.5)
        own = [p.grad for a in run.adapters for p in a.parameters() if p.grad is not None]
        parts.append([torch.tensor(sums, dtype=torch.float64), *own])
    return [torch.stack(each).sum(0) for each in zip(*parts, strict=True)]


TRAINING_CHECKS = [
    Check("rates", "groups of parameters, schedules, SWAG, limits", rates),
    Check("gradients of steps", "(4) of NLL + beta KL / N, row by row", gradients_of_steps),
    Check("interrupted runs", "log, checkpoints, best step of a whole run", interrupted),
    Check("checkpoints", "parts of ranks, damage, the newest two", checkpoints),
    Check("parts of ranks", "rows of ranks add up to those of one", parts_of_ranks),
]
