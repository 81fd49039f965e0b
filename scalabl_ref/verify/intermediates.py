"""The values on the way to a case's outputs, for a port that fails a case to find its first error.

`scalabl conformance compare NAME FILE` prints them; docs/conformance.md lists their names.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.noise import Noise
from ..model.config import LlamaConfig
from ..support.errors import InputError
from ..support.tensors import load_tensors
from . import formulas, reference
from .checks import Case, op_steps, terms
from .conformance import grade_output, unknown_name
from .formulas import Weights
from .vectors import LEVELS, Output, Vector

TRAINED = (".A", ".B", ".log_s", ".log_sigma")
WAY = 512  # roundings behind a value on the way through the model, as behind its logits


class Compared(NamedTuple):
    """One value. error: over its bound; None if the port does not give the value.

    problem: what is wrong, or empty.
    """

    name: str
    error: float | None
    problem: str = ""


def compare(name: str, file: Path | str, precision: str = "float32") -> list[Compared]:
    """A port's intermediate values of the case `name`, in the order of computation.

    file: safetensors with any of the values under their names. precision: as in `check`.

    Raises InputError for a case without intermediate values, for a name that is none of theirs, or
    if there is no value.
    """
    expected = intermediates(name)
    theirs, _ = load_tensors(Path(file))
    for given in theirs:
        if given not in expected:
            raise unknown_name(f"{file}: case {name} has no value named {given}", given, expected)
    if not theirs:
        raise InputError(f"{file}: has no values")
    out = []
    for key, (value, roundings, size) in expected.items():
        if key not in theirs:
            out.append(Compared(key, None))
            continue
        got = theirs[key]
        if got.shape == value.shape and value.is_floating_point():  # NaN: padding, of any value
            got, value = (torch.where(value.isnan(), 0.0, v) for v in (got, value))
        out.append(Compared(key, *grade_output(got, value, roundings, size, precision)))
    return out


def intermediates(name: str) -> dict[str, Output]:
    """The values of a case in the order of computation, its outputs among them.

    Raises InputError unless it is a case of the op, or a training step.
    """
    for level, of in (("op", _op), ("training step", _step)):
        for vector in (v for make in LEVELS[level] for v in make(name)):
            if vector.id == name:
                return of(vector)
    known = "op-forward-*, op-backward-* and step-*"
    raise InputError(f"{name}: no case with intermediate values; those are {known}")


def _op(vector: Vector) -> dict[str, Output]:
    """h, f, u, d, dh, ds of every row, (rows, r), then the outputs."""
    t, p = vector.inputs, vector.parameters
    noise = Noise(int(p["seed"]), p["draw"]) if p["seed"] else None
    given: dict[str, Any] = {"bias": None, "groups": None, **t, **p, "noise": noise}
    case = Case(**{f.name: given[f.name] for f in fields(Case)})
    eps, grad_y = case.eps(), t.get("grad_y")
    values, sizes = op_steps(case, eps, grad_y), op_steps(case, eps, grad_y, magnitudes=True)
    out = {"eps": Output(eps, 2, eps.abs())}
    for name in ("h", "f", "u", "d", "dh", "ds"):
        if name in values:
            out[name] = Output(values[name], 2 * terms(case), sizes[name])
    return {**out, **vector.outputs}


def _step(vector: Vector) -> dict[str, Output]:
    """Of the last of the steps: what goes into and out of every linear layer, then the outputs."""
    p, t = vector.parameters, vector.inputs
    config = LlamaConfig(**{f.name: p[f.name] for f in fields(LlamaConfig) if f.name in p})
    state = {n: v for n, v in t.items() if n.endswith(TRAINED)}
    for _ in range(p["repeat"] - 1):
        _, state = formulas.training_step(config, t, t, state, p)
        p = formulas.next_step(p)
    noise = Noise(int(p["seed"]), p["draw"])
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    values = {n: v for n, v in state.items() if not n.startswith("exp_avg")}
    scales = formulas.drawn_scales(values, t, noise, p)
    formulas.class_logits(t, config, t, values, scales, p["scaling"], seen=seen)
    out = {}
    for name, (x, y) in seen.items():
        if name in scales:
            rows = [reference.eps_of_group(noise, p["layers"][name], i, p["rank"])
                    for i in formulas.group_ids(t)]  # fmt: skip
            eps = formulas.tensor(rows)
            out[f"{name}.eps"] = Output(eps, 2, eps.abs())
            out[f"{name}.scales"] = _on_the_way(scales[name], t)
        out |= {f"{name}.x": _on_the_way(x, t), f"{name}.y": _on_the_way(y, t)}
    return {**out, **{name: vector.outputs[name] for name in _in_order(vector.outputs)}}


def _on_the_way(value: Tensor, batch: Weights) -> Output:
    """value (B, r) or (B, T, d), with NaN at padding, where a port may have anything; or (B, d)."""
    size = float(value.abs().max())
    if value.dim() == 3 and value.shape[1] == 1:  # the head's, of the last token
        value = value[:, 0]
    elif value.dim() == 3:
        padding = torch.arange(value.shape[1]) >= batch["lengths"][:, None]
        value = value.masked_fill(padding[..., None], torch.nan)
    return Output(value, WAY, size)


def _in_order(outputs: dict[str, Output]) -> list[str]:
    """nll, kl, loss; gradients, the last layer's first; moments; trained tensors."""
    gradients = [name for name in outputs if name.startswith("gradient.")]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in gradients))
    gradients.sort(key=lambda name: -layers.index(name.rpartition(".")[0]))
    others = [name for name in outputs if name not in gradients]
    kinds = [name.startswith("after.") + name.startswith("after.exp_avg") for name in others]
    losses, after, moments = ([n for n, k in zip(others, kinds, strict=True) if k == kind]
                              for kind in range(3))  # fmt: skip
    return [*losses, *gradients, *moments, *after]
