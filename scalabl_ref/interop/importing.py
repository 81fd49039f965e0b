"""Adapters trained elsewhere as runs, or as the start of a training.

A plain LoRA becomes the start of a run, for ScalaBL through the thin SVD of B A; state dictionaries
of the official code are read as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.adapter import (
    TARGETS,
    Adapter,
    AdapterConfig,
    Device,
    adapters,
    add_adapters,
)
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.files import new_folder, sha256
from ..support.tensors import open_tensors
from ..training.runs import fingerprint, run_facts, save_run
from .layers import OWN, build, by_layer
from .official import read_official
from .peft import read_peft

FROM = ("peft", "bayesadapt")


@torch.no_grad()
def start_from(
    model: Llama, found: Mapping[str, Adapter], source: Any, without: Collection[str] = ()
) -> None:
    """Give the model's adapters the values of others, by layer.

    without: layers that need have none, whose adapters keep their start, with B = 0.

    Where method, covariance, rank and scaling are the same, these are all the values; else the mean
    function's alone, see `Adapter.set_lora_`. Of a head for all tokens, one that was cut down takes
    its own tokens' rows.

    Raises InputError, which names `source`, if the layers are others, or if the rank is too large.
    """
    own = adapters(model)
    for name in (own.keys() ^ found.keys()) - set(without):
        has = "has no" if name in own else "has an"
        raise InputError(f"{source}: {has} adapter of {name}, expected {' '.join(own)}")
    for name, adapter in own.items():
        if name not in found:
            continue
        values = found[name].state_dict()
        head = model.config.head_tokens
        if name == "lm_head" and head is not None and len(values["B"]) != len(head):
            values["B"] = values["B"][list(head)]
        config, other = adapter.config, found[name].config
        alike = type(found[name]) is type(adapter) and config.rank == other.rank
        if alike and config.scaling == other.scaling:
            adapter.load_state_dict(values)
            continue
        try:
            adapter.set_lora_(found[name].lora_A(), values["B"].double(), other.scaling)
        except InputError as error:
            raise InputError(f"{source}: {name}: {error}") from None


def read_run(run: Path | str, model: Llama) -> dict[str, Adapter]:
    """The adapters of a run on the same base as `model`, by layer, for `start_from`.

    Raises InputError if the base or the answer tokens are others.
    """
    info, path = run_facts(run), Path(run) / "adapter.safetensors"
    config = AdapterConfig(**info["adapter"])
    if info["fingerprint"] != fingerprint(model):
        raise InputError(f"{run}: was trained on another base model, {info['model']}")
    head, own = info["head_tokens"], model.config.head_tokens
    if head is not None and (own is None or list(own) != head):
        raise InputError(f"{run}: its head has the tokens {head}, and the model's {own or 'all'}")
    rows = model.config.vocab_size if head is None else len(head)
    tensors = open_tensors(path)
    return {
        layer: build(path, config, model, layer, parts, tensors, rows)
        for layer, parts in by_layer(tensors, OWN).items()
    }


def import_adapter(
    kind: str,
    source: Path | str,
    base: Path | str,
    target: Path | str,
    options: Mapping[str, Any],
    info: Mapping[str, Any],
    *,
    alpha: float | None = None,
    labels: list[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> dict[str, Any]:
    """Make the new run folder `target` of adapters trained elsewhere; returns facts about it.

    kind: "peft", `source` a folder as PEFT saves it, or "bayesadapt", a state_dict.pt of the
    official code or the folder that it lies in. options: fields of AdapterConfig; rank, alpha and
    targets are the source's. Without a method it is the source's if that has a distribution, and
    "scalabl" if it is a plain LoRA. alpha, labels: what a state_dict.pt does not say; 2 * rank,
    and answers A, B, ..., by default. info: facts for run.json.

    Raises InputError naming the file and tensor for what is not such an adapter of this base.
    """
    if kind not in FROM:
        raise InputError(f"from must be one of {', '.join(FROM)}, not {kind!r}")
    with new_folder(target) as folder:
        model = Llama.from_pretrained(base, dtype=dtype, device=device)
        if kind == "peft":
            if alpha is not None or labels is not None:
                raise InputError("alpha and labels are for bayesadapt: a PEFT folder says them")
            file, found, without = read_peft(Path(source), model)
        else:
            file, found = read_official(Path(source), model, base, alpha, labels)
            without = []
        theirs = max((adapter.config for adapter in found.values()), key=lambda c: c.rank)
        config = _run_config(theirs, set(found), options)
        try:
            add_adapters(model, config, seed)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        start_from(model, found, file, without)
        kept = (config.method, config.covariance) == (theirs.method, theirs.covariance)
        # Of how it was trained we know what the official code does, and nothing else.
        kl = {"scalabl": "official", "blob": "forward"}.get(theirs.method) if kept else None
        train = {"kl": kl, "objective": "official" if kl else None, "seed": None}
        facts: dict[str, Any] = {
            "from": kind,
            "file": file.name,
            "sha256": sha256(file),
            "method": theirs.method,
        }
        if without:
            facts["layers_without"] = len(without)
        save_run(folder, model, {**info, "train": train, "imported": facts})
    return {**facts, "adapter": dataclasses.asdict(config), "layers": len(found)}


def _run_config(
    theirs: AdapterConfig, layers: set[str], options: Mapping[str, Any]
) -> AdapterConfig:
    """Of the run that adapters of the configuration `theirs` on these layers become."""
    random = theirs.method not in ("mle", "map")
    given = {key: value for key, value in options.items() if value is not None}
    ends = {layer.rpartition(".")[2] for layer in layers}
    return AdapterConfig(
        **{
            "method": theirs.method if random else "scalabl",
            **given,
            "rank": theirs.rank,
            "alpha": theirs.alpha,
            "targets": tuple(target for target in TARGETS if target in ends),
        }
    )
