"""Fine-tuning: the one-objective form and the official split optimisation, resumable to the bit.

Everything a step does is a pure function of (seed, step): its examples, its noise, its learning
rates. So a run stopped at any step and resumed from its checkpoint repeats the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import Adapter, AdapterConfig, Device, adapters, add_adapters
from .checkpoint import load_pickle, load_tensors, read_json, save_tensors
from .data import Encoded, TrainingOrder, collate
from .elbo import KL, KLS, class_logits, kl_divergence
from .errors import InputError, Interrupted, atomic_write, atomic_write_text, make_folder
from .llama import Llama
from .methods.ensemble import Swag
from .noise import FIRST_TRAINING_DRAW, Noise

Objective = Literal["elbo", "official"]
OBJECTIVES: tuple[Objective, ...] = ("elbo", "official")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    steps: optimiser steps, of `batch` examples each, computed `micro_batch` at a time (gradient
        accumulation; None is all at once).
    lr: AdamW's rate for A and B. variational_lr: for the parameters of a width (scalabl: log_s and
        log_sigma; blob: G), None is 4 * lr (at equal rates the width hardly leaves its starting
        value, since AdamW is scale-free).
    warmup: fraction of the steps in which rates rise linearly to full, then fall linearly to 0.
    kl: direction, see `elbo`. beta: weight of KL / N in the one objective.
    objective: "elbo" steps AdamW on NLL + beta KL / N. "official" does, per batch, an AdamW step on
        the NLL and then an SGD step on the sum of KLs, at rate kl_lr * schedule * pi_i.
    kl_lr: that SGD rate. seed: of data order, noise and initial values.
    swag: share of the steps, the last ones, whose weights are collected for `methods.Swag`.
    checkpoint_every: steps between checkpoints.

    Raises InputError for a value outside its range.
    """

    steps: int = 1000
    batch: int = 8
    micro_batch: int | None = None
    lr: float = 1e-3
    variational_lr: float | None = None
    warmup: float = 0.06
    adam_eps: float = 1e-6
    weight_decay: float = 0.0
    objective: Objective = "elbo"
    kl: KL = "forward"
    beta: float = 1.0
    kl_lr: float = 0.2
    swag: float = 0.0
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"micro_batch must be at least 1, not {self.micro_batch}")
        for name in ("lr", "beta", "kl_lr", "weight_decay", "warmup"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be finite and not negative, and is {value}")
        if not 0 <= self.swag <= 1:
            raise InputError(f"swag must lie between 0 and 1, and is {self.swag}")
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}")
        if self.kl not in KLS:
            raise InputError(f"kl must be one of {', '.join(KLS)}, not {self.kl!r}")


# --- schedules ---------------------------------------------------------------------------------


def warmup_linear(step: int, steps: int, warmup: float) -> float:
    """Factor on a learning rate at `step` of 0 .. steps - 1: linear up, then linear down to 0.

    As transformers' get_linear_schedule_with_warmup: the first step's factor is 0 if there is any
    warm-up.
    """
    rise = int(warmup * steps)
    if step < rise:
        return step / max(1, rise)
    return max(0.0, (steps - step) / max(1, steps - rise))


def kl_period(num_examples: int, batch: int) -> int:
    """M = int(100 N^(pi/8) / batch): the official code's number of KL weights in a round."""
    return max(1, int(100 * num_examples ** (math.pi / 8) / batch))


def kl_weight(step: int, period: int) -> float:
    """pi_i = 2^i / (2^(M+1) - 1), i = (step mod M) + 1: the official code's KL weight."""
    i = step % period + 1
    # 2^i / (2^(M+1) - 1) without the big powers: M reaches several hundred.
    return 2.0 ** (i - period - 1) / (1.0 - 2.0 ** (-period - 1))


# --- one step ----------------------------------------------------------------------------------


def parameter_groups(
    own: Sequence[Adapter], lr: float, variational_lr: float | None = None
) -> list[dict[str, Any]]:
    """What an optimiser of these adapters is given: A and B, then what sets the widths, if any.

    lr, variational_lr: the rates of either, as in TrainConfig.
    """
    variational = [a.get_parameter(name) for a in own for name in a.variational]
    fast = set(variational)
    slow = [p for a in own for p in a.parameters() if p not in fast]
    fast_lr = 4 * lr if variational_lr is None else variational_lr
    groups: list[dict[str, Any]] = [{"params": slow, "lr": lr}]
    if variational:
        groups.append({"params": variational, "lr": fast_lr})
    return groups


@dataclass
class Trainer:
    """Model, data and optimisers of one run; `step()` does one optimiser step.

    The model carries adapters. data: the encoded training set. Its N is the N of KL / N.
    swag: the weights collected so far, if the configuration asks for any.
    """

    model: Llama
    data: Encoded
    config: TrainConfig
    done: int = 0  # steps finished
    swag: Swag = field(default_factory=Swag)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.adapters = list(adapters(self.model).values())
        groups = parameter_groups(self.adapters, c.lr, c.variational_lr)
        self.variational = [p for group in groups[1:] for p in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, eps=c.adam_eps, weight_decay=c.weight_decay, foreach=True
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.order = TrainingOrder([len(t) for t in self.data.tokens], c.batch, c.seed)

    def step(self) -> dict[str, float]:
        """One step; returns what the log records of it: step, loss, nll, kl, sigma, lr.

        Raises InputError if the loss is not finite.
        """
        c, step = self.config, self.done
        factor = warmup_linear(step, c.steps, c.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        nll = self._accumulate_nll(
            self.order.indices(step), Noise(c.seed, FIRST_TRAINING_DRAW + step)
        )
        kl = kl_divergence(self.model, c.kl)
        loss = nll
        if kl.requires_grad and c.objective == "elbo":
            loss = nll + c.beta * kl.item() / len(self.data.labels)
            (c.beta * kl / len(self.data.labels)).backward()
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {step}: try a smaller learning rate")
        self.optimizer.step()
        if self.variational and c.objective == "official":
            self._official_kl_step(factor)
        for adapter in self.adapters:
            adapter.bound_()
        self.done += 1
        if self.done > (1 - c.swag) * c.steps:
            self.swag.collect(self.model)
        return {
            "step": step,
            "loss": loss,
            "nll": nll,
            "kl": kl.item(),
            "sigma": mean_sigma(self.model),
            "lr": c.lr * factor,
        }

    def _accumulate_nll(self, indices: list[int], noise: Noise) -> float:
        """Gradient of the batch's mean NLL, a micro-batch at a time; returns the NLL."""
        size, device = (
            self.config.micro_batch or len(indices),
            self.model.embed_tokens.weight.device,
        )
        total = 0.0
        for start in range(0, len(indices), size):
            batch = collate(self.data, indices[start : start + size]).to(device)
            logits = class_logits(self.model, batch, noise)
            nll = F.cross_entropy(logits, batch.labels, reduction="sum") / len(indices)
            nll.backward()
            total += nll.item()
        return total

    def _official_kl_step(self, factor: float) -> None:
        """SGD on the sum of KLs, after AdamW's step on the NLL, at the official rate."""
        c = self.config
        period = kl_period(len(self.data.labels), c.batch)
        rate = c.kl_lr * factor * kl_weight(self.done, period)
        parameters = [p for adapter in self.adapters for p in adapter.parameters()]
        kl = kl_divergence(self.model, c.kl)
        gradients = torch.autograd.grad(kl, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(rate * gradient)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: step count, adapters, optimiser moments, SWAG's averages."""
        return {
            "done": self.done,
            "adapters": adapter_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "swag": vars(self.swag),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned. Raises InputError if it is of another run."""
        load_adapter_state(self.model, state["adapters"], "checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.swag = Swag(**state["swag"])
        self.done = state["done"]


@torch.no_grad()
def mean_sigma(model: nn.Module) -> float:
    """Mean standard deviation of what the adapters draw; 0 where nothing is drawn."""
    widths = torch.cat([adapter.widths() for adapter in adapters(model).values()])
    return widths.mean().item() if len(widths) else 0.0


# --- runs on disk ------------------------------------------------------------------------------


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter parameter by name, such as layers.0.attn.q_proj.log_s."""
    return {
        f"{name}.{key}": parameter.detach()
        for name, adapter in adapters(model).items()
        for key, parameter in adapter.named_parameters()
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor], source: Any) -> None:
    """Copy `state` into the adapters. Raises InputError for a wrong name, shape or value."""
    own = adapter_state(model)
    for name in own.keys() ^ state.keys():
        raise InputError(f"{source}: tensor {name} is {'missing' if name in own else 'unexpected'}")
    for name, parameter in own.items():
        if state[name].shape != parameter.shape:
            raise InputError(
                f"{source}: tensor {name} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(parameter.shape)}"
            )
        if not torch.isfinite(state[name]).all():
            raise InputError(f"{source}: tensor {name} has NaN or infinite values")
        parameter.copy_(state[name])


def fingerprint(model: Llama) -> str:
    """A digest of the base model: configuration, norms, and the first row of each q projection.

    Enough to notice that an adapter meets another base, at no cost for a large one.
    """
    config = dataclasses.replace(model.config, head_tokens=None).to_dict()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    firsts = [w[0] for name, w in model.named_parameters() if name.endswith("q_proj.weight")]
    for part in (model.norm.weight, *firsts):
        digest.update(json.dumps(part.detach().double().tolist()).encode())
    return digest.hexdigest()


def save_run(run: Path | str, model: Llama, info: dict[str, Any]) -> None:
    """Write RUN/adapter.safetensors and RUN/run.json; `load_run` reads them back.

    info: facts to keep, "model" (the base's folder) among them; must be JSON.
    """
    run = Path(run)
    make_folder(run)
    config = next(iter(adapters(model).values())).config
    save_tensors(run / "adapter.safetensors", adapter_state(model).items())
    record = {
        **info,
        "adapter": dataclasses.asdict(config),
        "head_tokens": model.config.head_tokens,
        "fingerprint": fingerprint(model),
    }
    atomic_write_text(run / "run.json", json.dumps(record, indent=2) + "\n")


def load_run(
    run: Path | str,
    model: Llama | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> tuple[Llama, dict[str, Any]]:
    """The trained model and the facts that `save_run` kept.

    model: the base, already loaded and untrimmed; None loads it from where run.json says.
    Raises InputError if a file is missing or broken, or if the base is not the one trained on.
    """
    run = Path(run)
    info = read_json(run / "run.json")
    missing = [key for key in ("adapter", "model", "head_tokens", "fingerprint") if key not in info]
    if missing:
        raise InputError(f"{run / 'run.json'}: key {missing[0]!r} is missing")
    if model is None:
        model = Llama.from_pretrained(info["model"], dtype, device, info.get("quantize"))
    if fingerprint(model) != info["fingerprint"]:
        raise InputError(f"{run}: was trained on another base model than {info['model']}")
    if info["head_tokens"] is not None:
        model.trim_head(info["head_tokens"])
    try:
        config = AdapterConfig(**info["adapter"])
    except TypeError as error:
        raise InputError(f"{run / 'run.json'}: adapter: {error}") from None
    add_adapters(model, config)
    tensors, _ = load_tensors(run / "adapter.safetensors")
    load_adapter_state(model, tensors, run / "adapter.safetensors")
    return model.eval(), info


# --- the loop ----------------------------------------------------------------------------------


def fit(
    trainer: Trainer,
    run: Path | str,
    resume: bool = False,
    progress: Callable[[dict[str, float]], None] = lambda record: None,
) -> None:
    """Train to the end, writing RUN/train.jsonl and RUN/checkpoint.pt on the way.

    resume: go on from RUN/checkpoint.pt. `progress` is told each step's log record.
    On SIGINT or SIGTERM the step in hand is finished, a checkpoint written and Interrupted raised.
    Raises InputError if there is nothing to resume, or if the run there has other settings.
    """
    run = Path(run)
    make_folder(run)
    if resume:
        _restore(trainer, run)
    log_path = run / "train.jsonl"
    _keep_lines(log_path, trainer.done)
    with _deferred_signals() as caught, open(log_path, "a", 1, "utf-8") as log:
        while trainer.done < trainer.config.steps:
            started = time.perf_counter()
            record = trainer.step()
            record["seconds"] = time.perf_counter() - started
            log.write(json.dumps(record) + "\n")
            progress(record)
            stop = bool(caught)
            if stop or trainer.done % trainer.config.checkpoint_every == 0:
                _save_checkpoint(trainer, run)
            if stop:
                raise Interrupted(caught[0], trainer.done)
        _save_checkpoint(trainer, run)


def _identity(trainer: Trainer) -> str:
    """Settings and data that a checkpoint must share with the run that resumes it, as JSON."""
    config = dataclasses.asdict(trainer.config)
    del config["checkpoint_every"], config["micro_batch"]  # neither changes the function computed
    data = hashlib.sha256(json.dumps([trainer.data.tokens, trainer.data.labels]).encode())
    adapter = dataclasses.asdict(trainer.adapters[0].config)
    record = {"train": config, "adapter": adapter, "data": data.hexdigest()}
    record["model"] = fingerprint(trainer.model)
    return json.dumps(record, sort_keys=True)


def _save_checkpoint(trainer: Trainer, run: Path) -> None:
    buffer = io.BytesIO()
    torch.save({**trainer.state(), "identity": _identity(trainer)}, buffer)
    with atomic_write(run / "checkpoint.pt") as file:
        file.write(buffer.getbuffer())


def _restore(trainer: Trainer, run: Path) -> None:
    path = run / "checkpoint.pt"
    if not path.exists():
        raise InputError(f"{path}: no checkpoint to resume from")
    state = load_pickle(path)
    expected = {"done", "adapters", "optimizer", "swag", "identity"}
    if not isinstance(state, dict) or not expected <= state.keys():
        raise InputError(f"{path}: not a checkpoint of this program")
    theirs, ours = json.loads(state["identity"]), json.loads(_identity(trainer))
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if differing:
        detail = _first_difference(theirs.get(differing[0]), ours[differing[0]])
        raise InputError(f"{path}: is of a run with other settings: {differing[0]}{detail}")
    trainer.restore(state)


def _first_difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in ours:
            if ours[key] != theirs.get(key):
                return f".{key} was {theirs.get(key)!r} and now is {ours[key]!r}"
    return " differs"


def _keep_lines(path: Path, count: int) -> None:
    """Cut a log to its first `count` lines: steps after the checkpoint will be done again."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() and count else []
    atomic_write_text(path, "".join(lines[:count]))


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list yielded instead of ending the step in hand."""
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's to handle
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
