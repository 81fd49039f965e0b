"""Adapters in and out: runs as PEFT's LoRA folders or merged models, and back without loss.

Out: with A' = diag(s~) A (or what another method draws), a run's mean and each draw that all rows
share is the plain LoRA c B A' x, which other programs know. In: a LoRA that was trained elsewhere
becomes the start of a run, for ScalaBL through the thin SVD of B A; and the official code's state
dictionaries are read as they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, adapters, random_adapters
from ..core.config import ADAPTERS, COVARIANCES, TARGETS, AdapterConfig
from ..core.noise import Noise
from ..core.objective import KL, complexity
from ..data.answers import answer_tokens
from ..data.tokenizer import Tokenizer, companion_files, letters, load_tokenizer
from ..evaluation.predict import check_samples
from ..methods import Ensemble, Posterior, Swag
from ..model.attach import Device, Linear, add_adapters
from ..model.llama import Llama
from ..model.weights import as_stored, check_model, read_config
from ..support.errors import InputError, atomic_write_text, make_folder
from ..support.hub import hub_name
from ..support.tensors import (
    FORMAT,
    Stored,
    check_names,
    check_tensor,
    hf_to_ours,
    new_folder,
    open_tensors,
    ours_to_hf,
    read_json,
    sha256,
    stored_weights,
    with_dtype,
    write_model,
    write_tensors,
)
from ..training.runs import fingerprint, load_adapter_state, run_facts, save_run
from .card import Card

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"
OFFICIAL_FILE = "state_dict.pt"
TO = ("peft", "hf")
FROM = ("peft", "bayesadapt")

Lora = dict[str, tuple[Tensor, Tensor]]  # A' (r, d_in) and B (d_out, r), float32, by layer
Readers = Mapping[str, Callable[[], Tensor]]


# --- out ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A finished run to export.

    model, info: `load_run`'s. posterior: `methods.load_posterior`'s. base: the folder of the base
    model. name: what the base is called, as on the Hub; None is the folder's name there, or here.
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
        """What README.md says; `tokenizer` names the answer tokens."""
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
        """What to write: draw i of `samples`, which is Noise(seed, i), or for 0 the mean.

        Members, of an ensemble. Raises InputError for what is no LoRA.
        """
        check_samples(samples)
        draws: list[Noise | None] = [Noise(seed, i) for i in range(samples)]
        if isinstance(self.posterior, Ensemble):
            count = len(self.posterior.members)
            if not 0 < samples <= count:
                raise InputError(
                    f"{self.run}: the mean of an ensemble is no LoRA: samples can be 1 to {count}, "
                    "for its members"
                )
            return [partial(self._setting, state) for state in self.posterior.members[:samples]]
        if isinstance(self.posterior, Swag):
            swag = self.posterior
            states = [swag.mean if noise is None else swag.draw(noise) for noise in draws or [None]]
            return [partial(self._setting, state) for state in states]
        if samples:
            self._check_draws()
        return [partial(self._lora, noise) for noise in draws or [None]]

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
        if self.config.sampling == "token":
            raise InputError(
                f"{self.run}: its draws differ from token to token, as no LoRA's do: export its "
                "mean"
            )

    def _setting(self, state: dict[str, Tensor]) -> Lora:
        load_adapter_state(self.model, state, self.run)
        return self._lora(None)

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

    to: "peft" writes adapter_model.safetensors and adapter_config.json, "hf" a model of Hugging
    Face's layout with the adapter merged into its weights; either with a README.md. samples = 0
    writes the mean into `target`; else draw i is in target/sample-i and is what the model answers
    under Noise(seed, i) with sampling "batch". dtype: of merged weights, None is the base's own.
    tokenizer: to name the answer tokens by.

    An adapted head that was cut down to class tokens becomes one whose other rows are the base's;
    one that is tied to the embedding is merged into a head of its own.

    Raises InputError for what cannot be said as a LoRA, and leaves nothing half-written.
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
                _write_peft(out, lora(), trained)
            else:
                _write_merged(out, lora(), trained, dtype)
            place = Path(target).resolve().name
            what = f"draw {i} of seed {seed}" if samples else "the mean"
            if isinstance(trained.posterior, Ensemble):
                what = f"member {i}"
            text = card.text(to, what, place if name == "." else f"{place}/{name}")
            atomic_write_text(out / "README.md", text)
    return names


def _write_peft(folder: Path, lora: Lora, trained: Trained) -> None:
    tensors = {
        f"base_model.model.{ours_to_hf(name)}.lora_{side}.weight": Stored.held(value)
        for name, pair in lora.items()
        for side, value in zip("AB", pair, strict=True)
    }
    write_tensors(folder / PEFT_WEIGHTS[0], tensors)
    config = trained.config
    alpha = config.scaling * config.rank
    values = {
        "base_model_name_or_path": trained.base_name,
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


# --- in ----------------------------------------------------------------------------------------


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
    kind = COVARIANCES[config.covariance][config.method]
    rows = model.config.vocab_size if head is None else len(head)
    tensors = open_tensors(path)
    return {
        layer: _built(path, kind, config, model, layer, parts, tensors, rows)
        for layer, parts in _by_layer(tensors, _OWN).items()
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


# --- one file of tensors -------------------------------------------------------------------------

# Names of a layer's tensors, in a file and in our adapters, method by method.
_LORA = {"lora_A.weight": "A", "lora_B.weight": "B"}
_FORMS: dict[str, dict[str, str]] = {
    "mle": _LORA,
    "scalabl": {
        "lora_A.Vh": "A",
        "lora_B.weight": "B",
        "lora_A.log_s": "log_s",
        "lora_A.log_s_sigma": "log_sigma",
    },
    "blob": {**_LORA, "lora_A.lora_A_rho": "G"},
}
_PRIOR = (".lora_A.default.log_p_mu", ".lora_A.default.log_p_sigma")  # of the official ScalaBL
_THEIRS = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])(?:\.default)?\.(\w+)")
_OWN = re.compile(r"(.+)\.()(\w+)")


def _by_layer(names: Readers, pattern: re.Pattern[str]) -> dict[str, dict[str, str]]:
    """For each layer the names of its tensors by what they are, as lora_A.weight."""
    out: dict[str, dict[str, str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            layer, side, part = match.groups()
            out.setdefault(layer, {})[f"{side}.{part}".lstrip(".")] = name
    return out


def _built(
    file: Path,
    kind: type[Adapter],
    config: AdapterConfig,
    model: Llama,
    layer: str,
    names: Mapping[str, str],
    tensors: Readers,
    rows: int | None = None,
) -> Adapter:
    """An adapter of `model`'s layer, our name, from tensors of a file, by our parameters' names.

    rows: of lm_head, where the model's are others. Raises InputError naming the tensor.
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
    adapter = kind(d_in, d_out, config, 0, 0, torch.device("meta"))
    own = dict(adapter.named_parameters())
    check_names(file, names.values(), [names.get(part, f"{layer}.{part}") for part in own])
    values = {part: tensors[names[part]]() for part in own}
    for part, value in values.items():
        check_tensor(file, names[part], value, own[part], torch.float32)
        values[part] = value.float().to(linear.weight.device)
    adapter.load_state_dict(values, assign=True)
    return adapter


def _read_theirs(
    file: Path,
    tensors: Readers,
    model: Llama,
    method: str,
    config_of: Callable[[str], AdapterConfig],
) -> dict[str, Adapter]:
    """The adapters in a file whose names are PEFT's. config_of: a layer's, by PEFT's name."""
    form, found = _FORMS[method], {}
    for layer, parts in _by_layer(tensors, _THEIRS).items():
        for theirs in form:
            if theirs not in parts:
                raise InputError(f"{file}: tensor {theirs} of {layer} is missing")
        names = {form.get(theirs, theirs): name for theirs, name in parts.items()}
        try:
            ours = hf_to_ours(f"{layer}.weight").removesuffix(".weight")
        except InputError:
            raise InputError(f"{file}: tensor {names['B']}: no layer {layer} is known") from None
        config = config_of(layer)
        found[ours] = _built(file, ADAPTERS[method], config, model, ours, names, tensors)
    if not found:
        raise InputError(f"{file}: holds no LoRA: expected tensors such as {_EXAMPLE}")
    return found


_EXAMPLE = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


# --- PEFT ----------------------------------------------------------------------------------------

# Settings that do not change what a trained LoRA computes; any other that is set is refused.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def read_peft(folder: Path, model: Llama) -> tuple[Path, dict[str, Adapter], list[str]]:
    """The file of weights in a folder that PEFT saved, plain adapters by layer, and the layers
    beside them that adapter_config.json leaves out (layers_to_transform, names or a pattern).

    Each has the rank and the scaling that adapter_config.json gives its layer, by use_rslora,
    rank_pattern and alpha_pattern. Raises InputError for any setting that is more than a LoRA.
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
    found = _read_theirs(file, tensors, model, "mle", partial(_layer_config, path, values))
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
    """Whether PEFT adapts that layer, our name, as it reads adapter_config.json."""
    name = ours_to_hf(layer)
    targets, indices = values.get("target_modules"), values.get("layers_to_transform")

    def is_of(names: Any) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
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
        matches = (re.match(rf"(?:^|.*?\.)(?:{p})\.(\d+)\.", name) for p in patterns)
        index = next((int(match[1]) for match in matches if match), None)
        return index in (indices if isinstance(indices, list) else [indices])
    except (re.error, TypeError) as error:
        raise InputError(f"{path}: layers are not chosen as PEFT does: {error}") from None


def _layer_config(path: Path, values: dict[str, Any], layer: str) -> AdapterConfig:
    """Rank and scaling of one layer, as PEFT finds them."""
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
    """The value of the first pattern that is the end of the layer's name; a regular expression."""
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: expected an object under {key!r}")
    try:
        found = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", layer))
        return next(found, default)
    except re.error as error:
        raise InputError(f"{path}: {key}: not a regular expression: {error}") from None


def _check_the_rest(file: Path, tensors: Readers, model: Llama) -> None:
    """PEFT keeps embedding and head beside an adapter of lm_head: they must be the base's own."""
    base = model.state_dict()
    for name, read in tensors.items():
        if _THEIRS.fullmatch(name):
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


# --- the official code ---------------------------------------------------------------------------


def read_official(
    source: Path,
    model: Llama,
    base: Path | str,
    alpha: float | None = None,
    labels: list[str] | None = None,
) -> tuple[Path, dict[str, Adapter]]:
    """The official code's state_dict.pt, and adapters of its method by layer.

    It holds parameters under PEFT's names: of ScalaBL Vh, log_s, log_s_sigma and B, of BLoB A, its
    root rho and B, of plain LoRA A and B. Its alpha is 2 r. Its head has the answers' rows alone,
    to which `model`'s head is cut down here; it never is tied. The prior is not taken: there,
    log_p_mu and log_p_sigma share memory with the starting widths sigma_0 where they should be 0,
    so that it is N(sigma_0, (1 + sigma_0)^2) and not N(0, 1).
    """
    file = source / OFFICIAL_FILE if source.is_dir() else source
    tensors = {n: t for n, t in open_tensors(file).items() if not n.endswith(_PRIOR)}
    layers = _by_layer(tensors, _THEIRS)
    unknown = tensors.keys() - {name for parts in layers.values() for name in parts.values()}
    if unknown:
        raise InputError(f"{file}: tensor {min(unknown)} is not of a LoRA")
    extra = {part for names in layers.values() for part in names} - _LORA.keys()
    method = next((name for name, form in _FORMS.items() if form.keys() & extra), "mle")
    A = next(theirs for theirs, ours in _FORMS[method].items() if ours == "A")
    head = layers.get("lm_head", {}).get("lora_B.weight")
    if head is not None and tensors[head]().dim() == 2:  # what else it is, is told below
        _cut_head(file, model, len(tensors[head]()), base, labels)

    def config_of(layer: str) -> AdapterConfig:
        rank = tensors[layers[layer][A]]().shape[:1].numel()
        if rank < 1:
            raise InputError(f"{file}: {layer} has an adapter of rank 0")
        return AdapterConfig(method, rank, alpha)

    return file, _read_theirs(file, tensors, model, method, config_of)


def _cut_head(
    file: Path, model: Llama, rows: int, base: Path | str, labels: list[str] | None
) -> None:
    if labels is not None and len(labels) != rows:
        raise InputError(f"{file}: its head has {rows} answers, and there are {len(labels)} labels")
    if rows == model.config.vocab_size:
        return
    try:
        names = labels or letters(rows)
        # The official code takes the vocabulary's own entries, whatever comes before them.
        model.trim_head(answer_tokens(load_tokenizer(base), [], names, "alone").ids)
    except InputError as error:
        raise InputError(f"{file}: the {rows} rows of its head: {error}") from None
