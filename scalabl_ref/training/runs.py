"""Runs on disk: RUN/adapter.safetensors and RUN/run.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

from ..core.adapter import AdapterConfig, Device, adapters, add_adapters
from ..core.objective import KL
from ..data import FORMATS, AnswerTokens, Labels, Style
from ..fast.quantize import Kind
from ..model.llama import Llama
from ..support.errors import InputError, atomic_write_text, make_folder
from ..support.fields import check
from ..support.tensors import check_names, check_tensor, load_tensors, read_json, save_tensors
from . import ranks as distributed
from . import savepoints

Objective = Literal["elbo", "official"]
OBJECTIVES: tuple[Objective, ...] = ("elbo", "official")
DType = Literal["float32", "bfloat16"]  # that a run's base can be asked for in
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter parameter by name, such as layers.0.attn.q_proj.log_s."""
    return {
        f"{name}.{key}": parameter.detach()
        for name, adapter in adapters(model).items()
        for key, parameter in adapter.named_parameters()
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor], source: Any) -> None:
    """Copy `state` into the adapters. Raises InputError, naming `source`, if it is not theirs."""
    own = adapter_state(model)
    check_names(source, state, own)
    for name, parameter in own.items():
        check_tensor(source, name, state[name], parameter, parameter.dtype)
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
