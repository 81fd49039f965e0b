"""Runs as PEFT's LoRA folders or as merged models.

A run's mean, and each draw that all rows share, is the plain LoRA c B A' x with A' = diag(s~) A, or
with the A' that another method draws. Other programs know plain LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import adapters, random_adapters
from ..core.config import ADAPTERS, AdapterConfig
from ..core.noise import Noise
from ..core.objective import KL, complexity
from ..data.tokenizer import Tokenizer, companion_files
from ..evaluation.predict import check_samples
from ..methods import Ensemble, Posterior, Swag
from ..model.llama import Llama
from ..model.weights import as_stored, check_model, read_config
from ..support.errors import InputError
from ..support.files import atomic_write_text, make_folder, new_folder, read_json
from ..support.folders import FORMAT, ours_to_hf, stored_weights, with_dtype, write_model
from ..support.hub import hub_name
from ..support.tensors import Stored
from ..training.runs import load_adapter_state
from .card import Card
from .layers import Lora
from .peft import write_peft

TO = ("peft", "hf")


@dataclass(frozen=True)
class Trained:
    """A finished run to export.

    model, info: from `load_run`. posterior: from `methods.load_posterior`. base: the folder of the
    base model. name: the base's name on the Hub; None takes it from the Hub's cache, else from the
    folder.
    """

    run: Path
    model: Llama
    info: Mapping[str, Any]
    posterior: Posterior | None
    base: Path
    name: str | None = None

    @property
    def base_name(self) -> str:
        folder = self.base.resolve()
        return self.name or hub_name(folder) or folder.name

    @torch.no_grad()
    def card(self, tokenizer: Tokenizer | None) -> Card:
        """The facts of README.md; `tokenizer` decodes the answer tokens."""
        kl: KL = (self.info.get("train") or {}).get("kl") or "forward"
        drawn = ADAPTERS[self.config.method].variational and self.posterior is None
        metrics = self.run / "metrics.json"
        head = self.model.config.head_tokens or ()
        return Card(
            base=self.base_name,
            config=self.config,
            info=self.info,
            kl=f"{kl}, {complexity(self.model, kl).item():.6g} nats" if drawn else None,
            metrics=read_json(metrics) if metrics.exists() else None,
            answers=[f"{tokenizer.decode([i])!r} ({i})" if tokenizer else str(i) for i in head],
        )

    @property
    def config(self) -> AdapterConfig:
        return next(iter(adapters(self.model).values())).config

    def loras(self, samples: int, seed: int) -> list[Callable[[], Lora]]:
        """Functions that give the LoRAs to write: draws Noise(seed, i); the mean for samples = 0.

        For an ensemble they give its members, or draw i of member i mod M if members are random.
        Raises InputError for a model that is no LoRA.
        """
        check_samples(samples)
        draws: list[Noise | None] = [Noise(seed, i) for i in range(samples)]
        if isinstance(self.posterior, Ensemble):
            return self._members(self.posterior, draws)
        if isinstance(self.posterior, Swag):
            swag = self.posterior
            states = [swag.mean if noise is None else swag.draw(noise) for noise in draws or [None]]
            return [partial(self._setting, state, None) for state in states]
        if samples:
            self._check_draws()
        return [partial(self._lora, noise) for noise in draws or [None]]

    def _members(self, ensemble: Ensemble, draws: list[Noise | None]) -> list[Callable[[], Lora]]:
        count = len(ensemble.members)
        if ensemble.posteriors:
            raise InputError(f"{self.run}: draws of its members' posteriors are no LoRAs")
        if not draws or (len(draws) > count and not random_adapters(self.model)):
            raise InputError(
                f"{self.run}: the mean of an ensemble is no LoRA: samples can be 1 to {count}, "
                "one for each member"
            )
        if random_adapters(self.model):
            self._check_sampling()
        return [
            partial(self._setting, ensemble.members[i % count], noise)
            for i, noise in enumerate(draws)
        ]

    def _check_draws(self) -> None:
        if self.posterior is not None:
            name = self.info["posterior"]
            raise InputError(
                f"{self.run}: a draw of {name} is of logits and no LoRA: export its mean"
            )
        if not random_adapters(self.model):
            raise InputError(
                f"{self.run}: method {self.config.method} has no draws: leave --samples out"
            )
        self._check_sampling()

    def _check_sampling(self) -> None:
        if self.config.sampling == "token":
            raise InputError(
                f"{self.run}: its draws differ from token to token, so they are no LoRAs: export "
                "its mean"
            )

    def _setting(self, state: dict[str, Tensor], noise: Noise | None) -> Lora:
        load_adapter_state(self.model, state, self.run)
        return self._lora(noise)

    @torch.no_grad()
    def _lora(self, noise: Noise | None) -> Lora:
        head = self.model.config.head_tokens
        out = {}
        for name, adapter in adapters(self.model).items():
            A, B = adapter.lora_A(noise).float().cpu(), adapter.B.detach().cpu()
            if name == "lm_head" and head is not None:  # other tokens keep the base's logits
                rows = torch.zeros(self.model.config.vocab_size, B.shape[1])
                B = rows.index_copy(0, torch.tensor(head), B)
            out[name] = A, B
        return out


def export(
    trained: Trained,
    target: Path | str,
    to: str = "peft",
    samples: int = 0,
    seed: int = 0,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[str]:
    """Write the new folder `target` and return the names of the folders that hold models.

    to: "peft" writes adapter_model.safetensors and adapter_config.json, "hf" a model in Hugging
    Face's layout with the adapter merged into its weights; both write a README.md. samples = 0
    writes the mean into `target`; else draw i is in target/sample-i and answers as the model does
    under Noise(seed, i) with sampling "batch". dtype: of merged weights, None is the base's own.
    tokenizer: decodes the answer tokens in README.md.

    An adapted head that was cut down to class tokens gets the base's rows for all other tokens. One
    that is tied to the embedding is merged into a separate head.

    Raises InputError for a model that is no LoRA, and leaves nothing half-written.
    """
    if to not in TO:
        raise InputError(f"to must be one of {', '.join(TO)}, not {to!r}")
    if dtype is not None and to != "hf":
        raise InputError("a PEFT adapter is float32: only merged weights have another dtype")
    if to == "hf" and trained.model.quantized:
        kind = trained.model.quantized
        raise InputError(f"{trained.run}: merged weights would not be those of its {kind} base")
    head = trained.model.config.head_tokens or ()
    if len(set(head)) < len(head):
        raise InputError(f"{trained.run}: two rows of its head are the same token")
    loras, card = trained.loras(samples, seed), trained.card(tokenizer)
    names = [f"sample-{i}" for i in range(samples)] or ["."]
    with new_folder(target) as folder:
        for i, (name, lora) in enumerate(zip(names, loras, strict=True)):
            out = folder / name
            make_folder(out)
            if to == "peft":
                write_peft(out, lora(), trained.config, trained.base_name)
            else:
                _write_merged(out, lora(), trained, dtype)
            place = Path(target).resolve().name
            what = f"draw {i} of seed {seed}" if samples else "the mean"
            if isinstance(trained.posterior, Ensemble):
                member = f"member {i % len(trained.posterior.members)}"
                what = f"{what} of {member}" if random_adapters(trained.model) else member
            text = card.text(to, what, place if name == "." else f"{place}/{name}")
            atomic_write_text(out / "README.md", text)
    return names


def _write_merged(folder: Path, lora: Lora, trained: Trained, dtype: torch.dtype | None) -> None:
    config, values = read_config(trained.base / "config.json")
    hf = values.get("hf_config") if values.get("format") == FORMAT else values
    hf = with_dtype(hf or config.to_hf(), dtype)
    _, tensors = stored_weights(trained.base)
    config = as_stored(config, tensors, lambda tensor: tensor.read())
    if not config.tie_word_embeddings:
        hf = {**hf, "tie_word_embeddings": False}
    if config.tie_word_embeddings and "lm_head" in lora:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
        hf = {**hf, "tie_word_embeddings": False}
    for name, (A, B) in lora.items():
        base = tensors[f"{name}.weight"]
        of = dtype or base.dtype
        merge = partial(_merged, base, A, B, trained.config.scaling, of)
        tensors[f"{name}.weight"] = Stored(of, base.shape, merge)
    theirs = {ours_to_hf(name): tensor for name, tensor in tensors.items()}
    write_model(folder, hf, theirs, companion_files(trained.base), dtype)
    check_model(folder)


def _merged(base: Stored, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W + c B A, in float64 until it is rounded to `dtype` once."""
    return torch.addmm(base.read().double(), B.double(), A.double(), alpha=scaling).to(dtype)
