"""PEFT's folders: adapter_config.json and the tensors of a plain LoRA."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.adapter import Adapter
from ..core.config import AdapterConfig
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.files import atomic_write_text, read_json
from ..support.folders import hf_to_ours, ours_to_hf
from ..support.limited import Failed, match
from ..support.tensors import Stored, open_tensors, write_tensors
from .layers import THEIRS, Lora, Readers, read_theirs

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"


def write_peft(folder: Path, lora: Lora, config: AdapterConfig, base: str) -> None:
    """Write a LoRA as PEFT does into a folder that is there. base: the name of its base model."""
    tensors = {
        f"base_model.model.{ours_to_hf(name)}.lora_{side}.weight": Stored.held(value)
        for name, pair in lora.items()
        for side, value in zip("AB", pair, strict=True)
    }
    write_tensors(folder / PEFT_WEIGHTS[0], tensors)
    alpha = config.lora_alpha
    values = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    atomic_write_text(folder / PEFT_CONFIG, json.dumps(values, indent=2) + "\n")


# Settings that do not change what a trained LoRA computes; any other that is set is refused.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def read_peft(folder: Path, model: Llama) -> tuple[Path, dict[str, Adapter], list[str]]:
    """A folder that PEFT saved: its file of weights, plain adapters by layer, and similar layers
    that adapter_config.json leaves out (by layers_to_transform, names or a pattern).

    Each adapter has the rank and the scaling that adapter_config.json gives its layer, by
    use_rslora, rank_pattern and alpha_pattern. Raises InputError for a setting beyond plain LoRA.
    """
    path = folder / PEFT_CONFIG
    values = read_json(path)
    for key, allowed in _REQUIRED.items():
        if values.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise InputError(f"{path}: {key} is {values[key]!r}, expected {expected}")
    for key, value in values.items():
        if value and key not in _HARMLESS and key not in _REQUIRED:
            raise InputError(f"{path}: {key} is set, and is more than a plain LoRA: not supported")
    file = next((folder / name for name in PEFT_WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise InputError(f"{folder}: no {' or '.join(PEFT_WEIGHTS)}")
    tensors = open_tensors(file)
    _check_the_rest(file, tensors, model)
    found = read_theirs(file, tensors, model, "mle", partial(_layer_config, path, values))
    if values.get("ensure_weight_tying") and model.tied and "lm_head" in found:
        raise InputError(
            f"{path}: ensure_weight_tying adapts the embedding with lm_head: not supported"
        )
    chosen = {name: _is_chosen(path, values, name) for name, _ in model.named_modules()}
    for name in found:
        if not chosen[name]:
            raise InputError(
                f"{file}: has an adapter of {name}, which {path.name} does not choose: see its "
                "target_modules, exclude_modules and layers_to_transform"
            )
    ends = {name.rpartition(".")[2] for name in found}
    left_out = (n for n in chosen if n.rpartition(".")[2] in ends and not chosen[n])
    return file, found, list(left_out)


def _is_chosen(path: Path, values: dict[str, Any], layer: str) -> bool:
    """Whether PEFT adapts a layer, which has our name, by adapter_config.json."""
    name = ours_to_hf(layer)
    targets, indices = values.get("target_modules"), values.get("layers_to_transform")

    def is_of(names: Any) -> bool:
        if isinstance(names, str):
            return match(names, name, whole=True) is not None
        return any(name == end or name.endswith(f".{end}") for end in names)

    patterns = values.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    try:
        if values.get("exclude_modules") and is_of(values["exclude_modules"]):
            return False
        if targets is None or targets == "all-linear":
            return True
        if not is_of(targets):
            return False
        if isinstance(targets, str) or name in targets or indices in (None, []):
            return True  # indices choose among layers that are found by the end of their names
        matches = (match(rf"(?:^|.*?\.)(?:{p})\.(\d+)\.", name) for p in patterns)
        index = next((int(found[1]) for found in matches if found), None)
        return index in (indices if isinstance(indices, list) else [indices])
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: PEFT could not choose layers by this: {error}") from None


def _layer_config(path: Path, values: dict[str, Any], layer: str) -> AdapterConfig:
    """Rank and scaling of one layer, found as PEFT finds them."""
    rank = _by_pattern(path, values, "rank_pattern", layer, values.get("r", 8))
    alpha = _by_pattern(path, values, "alpha_pattern", layer, values.get("lora_alpha", 8))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{path}: the rank of {layer} must be a whole number above 0: {rank!r}")
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 < alpha <= sys.float_info.max:
        raise InputError(f"{path}: lora_alpha of {layer} must be a number above 0: {alpha!r}")
    factor = math.sqrt(rank) if values.get("use_rslora") else 1  # c = alpha / sqrt(r), not / r
    return AdapterConfig("mle", rank, alpha * factor)


def _by_pattern(path: Path, values: dict[str, Any], key: str, layer: str, default: Any) -> Any:
    """The value of the first pattern, a regular expression, that the layer's name ends with."""
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: expected an object under {key!r}")
    try:
        found = (v for k, v in patterns.items() if match(rf"(.*\.)?({k})$", layer))
        return next(found, default)
    except Failed as error:
        raise InputError(f"{path}: {key}: not a regular expression that works: {error}") from None


def _check_the_rest(file: Path, tensors: Readers, model: Llama) -> None:
    """PEFT saves embedding and head with an adapter of lm_head: they must be the base's own."""
    base = model.state_dict()
    for name, read in tensors.items():
        if THEIRS.fullmatch(name):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        own = base.get(hf_to_ours(plain)) if plain.startswith(("model.", "lm_head.")) else None
        if own is None:
            raise InputError(f"{file}: tensor {name} is not of a LoRA on a linear layer")
        value = read()
        if value.dim() == 2 and value.shape[1:] == own.shape[1:] and len(value) != len(own):
            raise InputError(
                f"{file}: was made for a vocabulary of {len(value)} tokens, and the base model has "
                f"{len(own)} (tensor {name}): give --model the base as it was resized"
            )
        if not torch.equal(value.to(own), own):
            raise InputError(
                f"{file}: tensor {name} is not the base model's: it was trained as well"
            )
