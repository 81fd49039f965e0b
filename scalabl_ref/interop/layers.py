"""Adapters in files that have PEFT's names, or ours, for their tensors: each layer's, checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.config import COVARIANCES, TARGETS, AdapterConfig
from ..model.attach import Linear
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.folders import hf_to_ours
from ..support.tensors import check_names, check_tensor

Lora = dict[str, tuple[Tensor, Tensor]]  # A' (r, d_in) and B (d_out, r), float32, by layer
Readers = Mapping[str, Callable[[], Tensor]]

# Names of a layer's tensors, in a file and in our adapters, method by method.
LORA = {"lora_A.weight": "A", "lora_B.weight": "B"}
FORMS: dict[str, dict[str, str]] = {
    "mle": LORA,
    "scalabl": {
        "lora_A.Vh": "A",
        "lora_B.weight": "B",
        "lora_A.log_s": "log_s",
        "lora_A.log_s_sigma": "log_sigma",
    },
    "blob": {**LORA, "lora_A.lora_A_rho": "G"},
}
THEIRS = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])(?:\.default)?\.(\w+)")
OWN = re.compile(r"(.+)\.()(\w+)")


def by_layer(names: Readers, pattern: re.Pattern[str]) -> dict[str, dict[str, str]]:
    """For each layer the names of its tensors, by their last parts, such as lora_A.weight."""
    out: dict[str, dict[str, str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            layer, side, part = match.groups()
            out.setdefault(layer, {})[f"{side}.{part}".lstrip(".")] = name
    return out


def build(
    file: Path,
    config: AdapterConfig,
    model: Llama,
    layer: str,
    names: Mapping[str, str],
    tensors: Readers,
    rows: int | None = None,
) -> Adapter:
    """The adapter of a layer, which has our name, from the tensors of a file.

    names: those of the tensors, by our parameters' names. rows: of lm_head, if not the model's.
    Raises InputError naming the tensor that is missing, unexpected, or has an invalid value.
    """
    linear = dict(model.named_modules()).get(layer)
    if not isinstance(linear, Linear) or layer.rpartition(".")[2] not in TARGETS:
        raise InputError(
            f"{file}: tensor {next(iter(names.values()))}: the model has no layer {layer}"
        )
    d_out, d_in = linear.d_out, linear.d_in
    if config.rank > d_in:
        raise InputError(
            f"{file}: rank {config.rank} is larger than a dimension of {layer} {d_out, d_in}"
        )
    d_out = rows if rows and layer == "lm_head" else d_out
    kind = COVARIANCES[config.covariance][config.method]
    adapter = kind(d_in, d_out, config, 0, 0, torch.device("meta"))
    own = dict(adapter.named_parameters())
    check_names(file, names.values(), [names.get(part, f"{layer}.{part}") for part in own])
    values = {part: tensors[names[part]]() for part in own}
    for part, value in values.items():
        check_tensor(file, names[part], value, own[part], torch.float32)
        values[part] = value.float().to(linear.weight.device)
    adapter.load_state_dict(values, assign=True)
    return adapter


def read_theirs(
    file: Path,
    tensors: Readers,
    model: Llama,
    method: str,
    config_of: Callable[[str], AdapterConfig],
) -> dict[str, Adapter]:
    """The adapters of a file with PEFT's names, by layer.

    method: that of the file's tensors. config_of: the configuration of a layer, by PEFT's name.
    """
    form, found = FORMS[method], {}
    for layer, parts in by_layer(tensors, THEIRS).items():
        for theirs in form:
            if theirs not in parts:
                raise InputError(f"{file}: tensor {theirs} of {layer} is missing")
        names = {form.get(theirs, theirs): name for theirs, name in parts.items()}
        try:
            ours = hf_to_ours(f"{layer}.weight").removesuffix(".weight")
        except InputError:
            raise InputError(f"{file}: tensor {names['B']}: no layer {layer} is known") from None
        found[ours] = build(file, config_of(layer), model, ours, names, tensors)
    if not found:
        example = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        raise InputError(f"{file}: holds no LoRA: expected tensors such as {example}")
    return found
