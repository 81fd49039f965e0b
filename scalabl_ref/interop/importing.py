"""Adapters that were trained elsewhere become runs, and runs the start of a training.

A plain LoRA becomes the start of a run, for ScalaBL by the thin SVD of B A. State dictionaries of
the official code keep their values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.adapter import Adapter, adapters
from ..core.config import TARGETS, AdapterConfig
from ..model.attach import Device, add_adapters
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
    """Give the model's adapters the values of other adapters, by layer.

    without: layers for which there may be no other adapter; theirs keep their start, with B = 0.

    If method, covariance, rank and scaling are the same, all values are taken; else only those of
    the mean function, see `Adapter.set_lora_`. A head that was cut down takes the rows of its own
    tokens from a head for all tokens.

    Raises InputError, naming `source`, if the layers differ or if the rank is too large.
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

    Raises InputError if the base or the answer tokens differ.
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
    """Write the new run folder `target` with adapters trained elsewhere; returns facts about it.

    kind: "peft" for a folder that PEFT saved, "bayesadapt" for a state_dict.pt of the official code
    or its folder. options: fields of AdapterConfig; rank, alpha and targets are the source's. The
    default method is the source's, and "scalabl" for a plain LoRA. alpha, labels: missing in a
    state_dict.pt; by default 2 * rank, and answers A, B, .... info: facts for run.json.

    Raises InputError naming the file and the tensor if it is not such an adapter of this base.
    """
    if kind not in FROM:
        raise InputError(f"from must be one of {', '.join(FROM)}, not {kind!r}")
    with new_folder(target) as folder:
        model = Llama.from_pretrained(base, dtype=dtype, device=device)
        if kind == "peft":
            if alpha is not None or labels is not None:
                raise InputError("alpha and labels are for bayesadapt: a PEFT folder has its own")
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
        # The official code's way of training is known, nobody else's is.
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
    """The configuration of a run made of adapters of the configuration `theirs` on these layers."""
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
