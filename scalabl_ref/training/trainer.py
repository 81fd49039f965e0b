"""Fine-tuning: the one-objective form and the official split optimisation, resumable to the bit.

Everything a step does is a pure function of (seed, step): its examples, its noise, its learning
rates. So a run stopped at any step and resumed from its checkpoint repeats the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..core.adapter import Adapter, adapter_state, adapters
from ..core.config import AdapterConfig
from ..core.noise import FIRST_TRAINING_DRAW, Noise
from ..core.objective import KL, KLS, class_logits, complexity
from ..data import FORMATS, AnswerTokens, Encoded, Labels, Style, TrainingOrder, collate
from ..fast.quantize import Kind
from ..fast.rows import compile_blocks
from ..methods.swag import Swag
from ..model.attach import Device, add_adapters
from ..model.llama import Llama
from ..support.errors import (
    InputError,
    Interrupted,
    atomic_write,
    atomic_write_text,
    make_folder,
    on_signals,
    open_log,
)
from ..support.fields import check, json_text
from ..support.tensors import load_tensors, read_json, save_tensors
from . import ranks as distributed
from . import savepoints

Objective = Literal["elbo", "official"]
OBJECTIVES: tuple[Objective, ...] = ("elbo", "official")
DType = Literal["float32", "bfloat16"]  # that a run's base can be asked for in
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


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
    recompute: of each block keep its input alone, and compute the rest again in the backward pass:
        less memory, a third more time. offload_activations: what is kept waits in the CPU's memory.
        compile: the blocks, see `rows.compile_blocks`.
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
    recompute: bool = False
    offload_activations: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"micro_batch must be at least 1, not {self.micro_batch}")
        for name in ("lr", "variational_lr", "beta", "kl_lr", "weight_decay", "adam_eps"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be finite and not negative, and is {value}")
        for name in ("warmup", "swag"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, and is {getattr(self, name)}")
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}")
        if self.kl not in KLS:
            raise InputError(f"kl must be one of {', '.join(KLS)}, not {self.kl!r}")
        if self.compile and self.offload_activations:
            raise InputError("compiled blocks do not take part in offload_activations")


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


class KeptOnCpu(torch.autograd.graph.save_on_cpu):
    """PyTorch's `save_on_cpu`: what the forward pass in this context keeps for the backward one
    waits in the CPU's memory, pinned if `device` is a GPU.

    Other than there, weights stay where they are, what several operations keep is copied once, and
    a tensor comes back with the strides it had, for kernels that want rows to start at a multiple
    of some bytes, or that repeat one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(pin_memory=device.type == "cuda")
        self.copy, self.fetch = self.pack_hook, self.unpack_hook
        self.pack_hook, self.unpack_hook = self._pack, self._unpack
        self.copied: dict[tuple[Any, ...], tuple[StorageWeakRef, Any]] = {}  # by what they copy

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.copied.clear()

    def _pack(self, tensor: Tensor) -> Any:
        if _is_weight(tensor):
            return tensor
        shape, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if not tensor.numel() or span > 2 * tensor.numel():  # a part of much
            return self.copy(tensor), None, None
        storage = StorageWeakRef(tensor.untyped_storage())
        key = storage.cdata, offset, span, tensor.dtype, tensor._version
        if key not in self.copied or self.copied[key][0].expired():
            self.copied[key] = storage, self.copy(tensor.detach().as_strided((span,), (1,)))
        return self.copied[key][1], shape, stride

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        copy, shape, stride = packed
        return self.fetch(copy) if shape is None else self.fetch(copy).as_strided(shape, stride)


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


@dataclass
class Trainer:
    """Model, data and optimisers of one run; `step()` does one optimiser step.

    On several ranks (`distributed`) each does its share of a step's examples, and all end the step
    with the same adapters.

    The model carries adapters. data: the encoded training set. Its N is the N of KL / N.
    swag: the weights collected so far, if the configuration asks for any. init: what the adapters'
    values come from, if not from their seed: the SHA-256 of a file.

    Raises InputError if the adapters have no KL in the configuration's direction.
    """

    model: Llama
    data: Encoded
    config: TrainConfig
    done: int = 0  # steps finished
    swag: Swag = field(default_factory=Swag)
    init: str | None = None
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.model.recompute = c.recompute
        if c.compile:
            compile_blocks(self.model)
        self.adapters = list(adapters(self.model).values())
        complexity(self.model, c.kl)  # raises now what else the first step would
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
        kl = complexity(self.model, c.kl)
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
        share, own = distributed.share(indices)
        size = self.config.micro_batch or len(share)
        offload = self.config.offload_activations
        kept = KeptOnCpu(self.model.device) if offload else nullcontext()
        total = 0.0
        for start in range(0, len(share), size):
            batch = collate(self.data, share[start : start + size]).to(self.model.device)
            n = max(0, own - start)  # how many of its rows count, if not all
            with kept:
                logits, labels = class_logits(self.model, batch, noise), batch.labels
            nll = F.cross_entropy(logits[:n], labels[:n], reduction="sum") / len(indices)
            nll.backward()
            total += nll.item()
        return distributed.add_up([p for a in self.adapters for p in a.parameters()], total)

    def _official_kl_step(self, factor: float) -> None:
        """SGD on the sum of KLs, after AdamW's step on the NLL, at the official rate."""
        c = self.config
        period = kl_period(len(self.data.labels), c.batch)
        rate = c.kl_lr * factor * kl_weight(self.done, period)
        parameters = [p for adapter in self.adapters for p in adapter.parameters()]
        kl = complexity(self.model, c.kl)
        gradients = torch.autograd.grad(kl, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(rate * gradient)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds: tensors by name (adapters, optimiser, SWAG), and counts."""
        tensors = {f"adapters.{name}": value for name, value in adapter_state(self.model).items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        for part in ("mean", "square"):
            averages = getattr(self.swag, part).items()
            tensors |= {f"swag.{part}.{name}": value for name, value in averages}
        return tensors, {"done": self.done, "swag": self.swag.count}

    def restore(self, tensors: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Continue from what `state` returned. Raises InputError if it is of another run."""

        def below(prefix: str) -> dict[str, Tensor]:
            """The tensors whose names begin so, by what comes after."""
            start = len(prefix)
            return {name[start:]: t for name, t in tensors.items() if name.startswith(prefix)}

        load_adapter_state(self.model, below("adapters."), "checkpoint")
        device = self.adapters[0].A.device
        averages = (
            {k: v.to(device) for k, v in below(f"swag.{part}.").items()}
            for part in ("mean", "square")
        )
        self.swag = Swag(counts["swag"], *averages)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in below("optimizer.").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.done = counts["done"]


@torch.no_grad()
def mean_sigma(model: nn.Module) -> float:
    """Mean standard deviation of what the adapters draw; 0 where nothing is drawn."""
    widths = torch.cat([adapter.widths() for adapter in adapters(model).values()])
    return widths.mean().item() if len(widths) else 0.0


# --- runs on disk ------------------------------------------------------------------------------


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

    Enough to notice that an adapter meets another base, at no cost for a large one. All ranks call
    it if the base is sharded.
    """
    config = dataclasses.replace(model.config, head_tokens=None).to_dict()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    projections = [w for name, w in model.named_parameters() if name.endswith("q_proj.weight")]
    for weight in (model.norm.weight, *projections):
        part = distributed.whole(weight.detach())
        part = part if weight is model.norm.weight else part[0]
        digest.update(json.dumps(part.double().tolist()).encode())
    return digest.hexdigest()


def save_run(run: Path | str, model: Llama, info: dict[str, Any]) -> None:
    """Write RUN/adapter.safetensors and RUN/run.json; `load_run` reads them back.

    On several ranks all call it, and rank 0 writes.
    info: facts to keep, "model" (the base's folder) among them; must be JSON. `run_facts` says
    which others are read, and what is taken without them. `Encoded.wording.facts()` are those that
    `evaluate` and `predict` need to ask as the run was trained.
    """
    run = Path(run)
    config = next(iter(adapters(model).values())).config
    record = {
        **info,
        "adapter": dataclasses.asdict(config),
        "head_tokens": model.config.head_tokens,
        "fingerprint": fingerprint(model),
    }
    if distributed.rank():
        return
    make_folder(run)
    save_tensors(run / "adapter.safetensors", adapter_state(model).items())
    atomic_write_text(run / "run.json", json.dumps(record, indent=2) + "\n")


# Facts of a run.json that are read, and what those that can be left out are then.
_FACTS: dict[str, Any] = {
    "model": str,
    "adapter": dict[str, Any],
    "head_tokens": list[int] | None,
    "fingerprint": str,
    "quantize": Kind | None,
    "dtype": DType | None,
    "posterior": str | None,
    "format": str,
    "prompt_template": str | None,
    "text_column": str | None,
    "label_column": str | None,
    "prompt_style": Style | None,
    "labels": Labels | None,
    "answer_tokens": AnswerTokens | None,
    "label_names": list[str] | None,
    "max_length": int | None,
    "drop_long": bool | None,
    "data": str | None,
    "data_sha256": str | None,
    "limit": int | None,
    "holdout": float,
    "train": dict[str, Any],
}
_NEEDED = ("model", "adapter", "head_tokens", "fingerprint")
_USUAL: dict[str, Any] = {"format": "jsonl", "holdout": 0.0, "train": {}}
_TRAIN_FACTS: dict[str, Any] = {"kl": KL | None, "objective": Objective | None, "seed": int | None}


def run_facts(run: Path | str) -> dict[str, Any]:
    """What RUN/run.json says, completed: format is "jsonl", holdout 0, other facts None.

    Facts that only people read are there if `save_run` was told them. Raises InputError naming the
    file and the key that is missing or cannot be what it is.
    """
    path = Path(run) / "run.json"
    if not os.path.exists(path):
        raise InputError(_why_no_run(path.parent))
    info = read_json(path)
    try:
        for key in _NEEDED:
            if key not in info:
                raise InputError(f"key {key!r} is missing")
        info = _completed(info, _FACTS, _USUAL)
        check(info["adapter"], get_type_hints(AdapterConfig), "adapter: ")
        AdapterConfig(**info["adapter"])
        info["train"] = _completed(info["train"], _TRAIN_FACTS, {}, "train: ")
        if info["format"] not in FORMATS:
            raise InputError(f"format must be {' or '.join(FORMATS)}, not {info['format']!r}")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return info


def _why_no_run(folder: Path) -> str:
    """What is in a folder that has no run.json, and what to do then."""
    if not folder.is_dir():
        return f"{folder}: no such folder: expected a run, which `scalabl train` writes"
    if savepoints.exists(folder):
        step = savepoints.progress(folder)
        return f"{folder}: training is unfinished, at {step}: go on with train --resume"
    if (folder / "train.jsonl").exists():
        return f"{folder}: training ended before its first checkpoint: begin with train --resume"
    if (folder / "adapter_config.json").exists():
        return f"{folder}: is a PEFT adapter and no run: `scalabl import --from peft` makes it one"
    if (folder / "config.json").exists():
        return (
            f"{folder}: is a model and no run: give it as --model alone (a trained adapter becomes "
            "a run by `scalabl import`)"
        )
    return f"{folder}: no run: run.json, which `scalabl train` writes at its end, is not there"


def _completed(
    values: dict[str, Any], types: dict[str, Any], usual: dict[str, Any], where: str = ""
) -> dict[str, Any]:
    """`values` with those of `types` that they leave out: `usual`, or None. Others can be there."""
    check({key: value for key, value in values.items() if key in types}, types, where)
    return {**dict.fromkeys(types), **usual, **values}


def load_run(
    run: Path | str,
    model: Llama | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    base: Path | str | None = None,
) -> tuple[Llama, dict[str, Any]]:
    """The trained model and the facts that `save_run` kept, as of `run_facts`.

    model: the base, already loaded and untrimmed; None loads it from where run.json says. base: the
    folder of `model`, to be named in errors.
    Raises InputError if a file is missing or broken, or if the base is not the one trained on.
    """
    run = Path(run)
    info = run_facts(run)
    given = base or (info["model"] if model is None else "the model given")
    if model is None:
        model = Llama.from_pretrained(info["model"], dtype, device, info["quantize"])
    if fingerprint(model) != info["fingerprint"]:
        if Path(given).resolve() == Path(info["model"]).resolve():
            raise InputError(
                f"{run}: was trained on another base model than {info['model']} is now"
            )
        raise InputError(f"{run}: was trained on {info['model']}; {given} is another model")
    if info["head_tokens"] is not None:
        model.trim_head(info["head_tokens"])
    add_adapters(model, AdapterConfig(**info["adapter"]))
    tensors, _ = load_tensors(run / "adapter.safetensors")
    load_adapter_state(model, tensors, run / "adapter.safetensors")
    return model.eval(), info


# --- the loop ----------------------------------------------------------------------------------


def fit(
    trainer: Trainer,
    run: Path | str,
    resume: bool = False,
    progress: Callable[[dict[str, float]], None] = lambda record: None,
    beside: bool = False,
) -> None:
    """Train to the end, writing RUN/train.jsonl and checkpoints (`savepoints`) on the way.

    resume: go on from the newest checkpoint that is whole, or begin if there is none at all.
    `progress` is told each step's log record. beside: write checkpoints while training goes on.
    On SIGINT or SIGTERM the step in hand is finished, a checkpoint written and Interrupted raised.
    On several ranks all call it, with a folder that all of them see; rank 0 writes the log, and a
    signal to one of them is a signal to all.
    Raises InputError if all checkpoints there are damaged, or of a run with other settings, or if
    one cannot be written.
    """
    run = Path(run)
    make_folder(run)
    identity, config = _identity(trainer), trainer.config
    saver = savepoints.Saver(run, beside)
    if resume and savepoints.exists(run):
        _restore(trainer, run, identity)
    distributed.barrier()  # every rank has seen the run as it was
    if distributed.rank() == 0:
        saver.forget_after(trainer.done)
    caught: list[int] = []  # the step in hand is finished first
    with on_signals(lambda number, _: caught.append(number)), _open_log(run, trainer.done) as log:
        while trainer.done < config.steps:
            started = time.perf_counter()
            record = trainer.step()
            record["seconds"] = time.perf_counter() - started
            log.write(json_text(record) + "\n")
            progress(record)
            signum = distributed.largest(caught[0] if caught else 0)
            due = trainer.done % config.checkpoint_every == 0
            if signum or due or trainer.done == config.steps:
                tensors, counts = trainer.state()
                saver.save(trainer.done, tensors, {**counts, "identity": identity})
            if signum:
                saver.wait()
                raise Interrupted(signum, trainer.done)
        saver.wait()
    distributed.barrier()  # all of it is written


def _identity(trainer: Trainer) -> dict[str, Any]:
    """Settings and data that a checkpoint must share with the run that resumes it, as of JSON."""
    config = dataclasses.asdict(trainer.config)
    for name in ("checkpoint_every", "micro_batch", "recompute", "offload_activations", "compile"):
        del config[name]  # none changes the function computed
    config["dtype"] = str(trainer.model.embed_tokens.weight.dtype).removeprefix("torch.")
    config["init"] = trainer.init
    data = hashlib.sha256(json.dumps([trainer.data.tokens, trainer.data.labels]).encode())
    adapter = dataclasses.asdict(trainer.adapters[0].config)
    record = {"train": config, "adapter": adapter, "data": data.hexdigest()}
    record["model"] = fingerprint(trainer.model)
    return json.loads(json.dumps(record))


def _restore(trainer: Trainer, run: Path, identity: dict[str, Any]) -> None:
    tensors, facts = savepoints.load(run)
    theirs = facts.get("identity", {})
    differing = [key for key in identity if identity[key] != theirs.get(key)]
    if differing:
        detail = _first_difference(theirs.get(differing[0]), identity[differing[0]])
        raise InputError(
            f"{run / savepoints.FOLDER}: is of a run with other settings: {differing[0]}{detail}"
        )
    trainer.restore(tensors, facts)


def _first_difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in ours:
            if ours[key] != theirs.get(key):
                return f".{key} was {theirs.get(key)!r} and now is {ours[key]!r}"
    return " differs"


@contextmanager
def _open_log(run: Path, count: int) -> Iterator[IO[str]]:
    """RUN/train.jsonl, to add to; for ranks other than 0 a file that keeps nothing.

    It is cut to its first `count` lines: steps after the checkpoint will be done again.
    """
    if distributed.rank() == 0:
        _keep_lines(run / "train.jsonl", count)
    path = os.devnull if distributed.rank() else run / "train.jsonl"
    with open_log(path) as log:
        yield log


def _keep_lines(path: Path, count: int) -> None:
    """Cut a file to its first `count` lines, whatever their bytes; each has its end then."""
    lines: list[bytes] = []
    with suppress(FileNotFoundError), open(path, "rb") as file:
        lines = list(islice(file, count))
    with atomic_write(path) as kept:
        kept.writelines(line.removesuffix(b"\n") + b"\n" for line in lines)
