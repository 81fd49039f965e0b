"""Fine-tuning: the one-objective form and the official split optimisation, resumable to the bit.

Everything a step does is a pure function of (seed, step): its examples, its noise, its learning
rates. So a run stopped at any step and resumed from its checkpoint repeats the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, adapter_state, adapters
from ..core.noise import FIRST_TRAINING_DRAW, Noise
from ..core.objective import KL, KLS, class_logits, complexity
from ..data import Encoded, TrainingOrder, collate
from ..fast.offload import KeptOnCpu
from ..fast.rows import compile_blocks
from ..model.llama import Llama
from ..support.errors import InputError
from . import ranks as distributed
from .runs import OBJECTIVES, Objective, load_adapter_state
from .schedule import first_held, kl_period, kl_weight, warmup_linear


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
    objective: "elbo" steps AdamW on NLL + beta KL / N, times rows / batch on an epoch's short
        batch, so that an epoch's sum is N / batch times (4). "official" does, per batch, an AdamW
        step on the NLL and then an SGD step on the sum of KLs, at rate kl_lr * schedule * pi_i.
    kl_lr: that SGD rate. kl_gamma: sets the number of weights pi_i in a round,
        M = int(100 N^(pi / kl_gamma) / batch). seed: of data order, noise and initial values.
    recompute: store only each block's input, and compute the rest again in the backward pass: less
        memory, a third more time. offload_activations: activations wait in the CPU's memory for the
        backward pass. compile: compile the blocks, see `rows.compile_blocks`.
    swag: share of the steps, the last ones; the trainer's collector is called after each. The
        rates are constant there: swag_lr for A and B, the others in proportion; None keeps the
        rates of the first of these steps.
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
    kl_gamma: float = 8.0
    swag: float = 0.0
    swag_lr: float | None = None
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
        rates = ("lr", "variational_lr", "swag_lr", "kl_lr")
        for name in (*rates, "beta", "weight_decay", "adam_eps"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be finite and not negative, and is {value}")
        for name in ("warmup", "swag"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, and is {getattr(self, name)}")
        if not self.kl_gamma > 0:
            raise InputError(f"kl_gamma must be positive, and is {self.kl_gamma}")
        if self.swag_lr is not None and not (self.swag and self.lr):
            raise InputError("swag_lr needs swag and lr above 0")
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}")
        if self.kl not in KLS:
            raise InputError(f"kl must be one of {', '.join(KLS)}, not {self.kl!r}")
        if self.compile and self.offload_activations:
            raise InputError("offload_activations does not work with compiled blocks")


def parameter_groups(
    own: Sequence[Adapter], lr: float, variational_lr: float | None = None
) -> list[dict[str, Any]]:
    """An optimiser's groups of parameters: A and B, then the parameters of the widths, if any.

    lr, variational_lr: their rates, as in TrainConfig.
    """
    variational = [a.get_parameter(name) for a in own for name in a.variational]
    fast = set(variational)
    slow = [p for a in own for p in a.parameters() if p not in fast]
    fast_lr = 4 * lr if variational_lr is None else variational_lr
    groups: list[dict[str, Any]] = [{"params": slow, "lr": lr}]
    if variational:
        groups.append({"params": variational, "lr": fast_lr})
    return groups


class Diverged(InputError):
    """The loss is not finite: the settings do not suit the model and its data."""


@dataclass
class Trainer:
    """Model, data and optimisers of one run; `step()` does one optimiser step.

    On several ranks each does a part of a step's examples, and all end the step with the same
    adapters.

    model: has adapters. data: the encoded training set, whose size is the N of KL / N. collector:
    follows the weights through the last steps, a share `swag` of all, as `methods.Swag` does.
    `collect(model)` is called after each of them; `state()` gives the tensors of a checkpoint, by
    name, and `restore(state)` goes on from them. init: the SHA-256 of the file that the adapters'
    values come from; None if they come from the seed.

    Raises InputError if the adapters have no KL in the configuration's direction, or if only one
    of a collector and `swag` is given.
    """

    model: Llama
    data: Encoded
    config: TrainConfig
    done: int = 0  # steps finished
    collector: Any = None
    init: str | None = None
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.model.recompute = c.recompute
        if c.compile:
            compile_blocks(self.model)
        self.adapters = list(adapters(self.model).values())
        complexity(self.model, c.kl)  # raises now, not at the first step
        if (c.swag > 0) != (self.collector is not None):
            raise InputError(f"swag is {c.swag}: a collector is needed if it is above 0, else none")
        groups = parameter_groups(self.adapters, c.lr, c.variational_lr)
        self.variational = [p for group in groups[1:] for p in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, eps=c.adam_eps, weight_decay=c.weight_decay, foreach=True
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.order = TrainingOrder([len(t) for t in self.data.tokens], c.batch, c.seed)

    def step(self) -> dict[str, float]:
        """Do one step. Returns its record for the log: step, loss, nll, accuracy, kl, sigma, lr.

        loss, nll and accuracy are of the step's rows with its noise, before the step changes them.

        Raises Diverged if the loss is not finite.
        """
        c, step = self.config, self.done
        factor = self._factor(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        indices, size = self.order.indices(step), len(self.data.labels)
        # So that each example has the same weight in an epoch.
        weight = len(indices) / min(c.batch, size) if c.objective == "elbo" else 1.0
        nll, accuracy = self._accumulate_nll(
            indices, Noise(c.seed, FIRST_TRAINING_DRAW + step), weight
        )
        kl = complexity(self.model, c.kl)
        loss = nll
        if kl.requires_grad and c.objective == "elbo":
            loss = nll + c.beta * kl.item() / size
            (weight * c.beta * kl / size).backward()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {step}: try a smaller learning rate")
        self.optimizer.step()
        if self.variational and c.objective == "official":
            self._official_kl_step(factor)
        for adapter in self.adapters:
            adapter.bound_()
        self.done += 1
        if self.collector and self.done > (1 - c.swag) * c.steps:
            self.collector.collect(self.model)
        return {
            "step": step,
            "loss": loss,
            "nll": nll,
            "accuracy": accuracy,
            "kl": kl.item(),
            "sigma": mean_sigma(self.model),
            "lr": c.lr * factor,
        }

    def _factor(self, step: int) -> float:
        """Of the learning rates at a step."""
        c = self.config
        held = first_held(c.steps, c.warmup, c.swag)
        if c.swag_lr is not None and step >= held:
            return c.swag_lr / c.lr
        return warmup_linear(min(step, held), c.steps, c.warmup)

    def _accumulate_nll(self, indices: list[int], noise: Noise, weight: float) -> list[float]:
        """Gradient of weight times the mean NLL, a micro-batch at a time; mean NLL and accuracy."""
        share, own = distributed.share(indices)
        size = self.config.micro_batch or len(share)
        offload = self.config.offload_activations
        kept = KeptOnCpu(self.model.device) if offload else nullcontext()
        total = right = 0.0
        for start in range(0, len(share), size):
            batch = collate(self.data, share[start : start + size]).to(self.model.device)
            n = max(0, own - start)  # rows that count, if fewer than all
            with kept:
                logits, labels = class_logits(self.model, batch, noise), batch.labels
            nll = F.cross_entropy(logits[:n], labels[:n], reduction="sum") / len(indices)
            (weight * nll).backward()
            total += nll.item()
            right += (logits[:n].argmax(1) == labels[:n]).sum().item() / len(indices)
        return distributed.add_up([p for a in self.adapters for p in a.parameters()], total, right)

    def _official_kl_step(self, factor: float) -> None:
        """SGD on the sum of KLs, after AdamW's step on the NLL, at the official rate."""
        c = self.config
        period = kl_period(len(self.data.labels), c.batch, c.kl_gamma)
        rate = c.kl_lr * factor * kl_weight(self.done, period)
        parameters = [p for adapter in self.adapters for p in adapter.parameters()]
        kl = complexity(self.model, c.kl)
        gradients = torch.autograd.grad(kl, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(rate * gradient)

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by name: adapters, optimiser, and what was collected."""
        tensors = {f"adapters.{name}": value for name, value in adapter_state(self.model).items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        if self.collector:
            tensors |= {f"collected.{name}": v for name, v in self.collector.state().items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor], done: int) -> None:
        """Continue from what `state` returned after `done` steps.

        Raises InputError if it is of another run.
        """

        def below(prefix: str) -> dict[str, Tensor]:
            """The tensors whose names begin with `prefix`, by the rest of their names."""
            start = len(prefix)
            return {name[start:]: t for name, t in tensors.items() if name.startswith(prefix)}

        load_adapter_state(self.model, below("adapters."), "checkpoint")
        if self.collector:
            device = self.adapters[0].A.device
            self.collector.restore({k: v.to(device) for k, v in below("collected.").items()})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in below("optimizer.").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.done = done


@torch.no_grad()
def mean_sigma(model: nn.Module) -> float:
    """Mean standard deviation of the adapters' draws; 0 if they draw nothing."""
    widths = torch.cat([adapter.widths() for adapter in adapters(model).values()])
    return widths.mean().item() if len(widths) else 0.0
