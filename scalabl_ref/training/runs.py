"""Runs on disk: RUN/adapter.safetensors and RUN/run.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from ..core.adapter import adapter_state, adapters
from ..core.config import AdapterConfig
from ..core.objective import KL
from ..data import FORMATS, AnswerTokens, Labels, Style
from ..fast.quantize import Kind
from ..model.attach import Device, add_adapters
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.fields import check
from ..support.files import atomic_write_text, make_folder, read_json
from ..support.hub import hub_name
from ..support.tensors import check_names, check_tensor, load_tensors, save_tensors
from . import ranks as distributed
from . import savepoints

Objective = Literal["elbo", "official"]
COMMAND = "command.txt"  # in the folder of a run
OBJECTIVES: tuple[Objective, ...] = ("elbo", "official")
DType = Literal["float32", "bfloat16"]  # that a run's base can be asked for in
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor], source: Any) -> None:
    """Copy `state` into the adapters. Raises InputError, naming `source`, if it is not theirs."""
    own = adapter_state(model)
    check_names(source, state, own)
    for name, parameter in own.items():
        check_tensor(source, name, state[name], parameter, parameter.dtype)
        parameter.copy_(state[name])


def fingerprint(model: Llama) -> str:
    """A digest of the base model: configuration, last norm, and the first row of each q projection.

    It tells bases apart without reading much of them. All ranks call it if the base is sharded.
    """
    about = dataclasses.replace(model.config, head_tokens=None).to_dict()
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    weights = dict(model.named_parameters())

    def whole(name: str) -> Tensor:
        return distributed.whole(weights[name].detach())

    layers = range(model.config.num_hidden_layers)
    parts = [whole("norm.weight"), *(whole(f"layers.{i}.attn.q_proj.weight")[0] for i in layers)]
    for part in parts:
        digest.update(json.dumps(part.double().tolist()).encode())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class RunFacts(Mapping[str, Any]):
    """What run.json says. Each fact is an attribute, and a key as well: facts["model"].

    model: folder or name of the base. adapter: the fields of AdapterConfig. head_tokens: those that
    the head was cut down to. fingerprint: of the base. quantize, dtype: how the base was loaded.
    posterior: the method of a posterior that was made of the run. format to drop_long: how the data
    were read and worded, see `data.load` and `data.Wording`. data, data_sha256, limit, holdout: the
    training file, its digest, how many of its rows were read, and the share that was held out.
    train: the fields of TrainConfig; kl, objective and seed are there, None where it is not known.
    others: facts that only people read; they are keys too.
    """

    model: str
    adapter: dict[str, Any]
    head_tokens: list[int] | None
    fingerprint: str
    quantize: Kind | None = None
    dtype: DType | None = None
    posterior: str | None = None
    format: str = "jsonl"
    prompt_template: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    prompt_style: Style | None = None
    labels: Labels | None = None
    answer_tokens: AnswerTokens | None = None
    label_names: list[str] | None = None
    max_length: int | None = None
    drop_long: bool | None = None
    data: str | None = None
    data_sha256: str | None = None
    limit: int | None = None
    holdout: float = 0.0
    train: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key) if key in _FACTS else self.others[key]

    def __iter__(self) -> Iterator[str]:
        return iter([*_FACTS, *self.others])

    def __len__(self) -> int:
        return len(_FACTS) + len(self.others)


_FACTS = {name: kind for name, kind in get_type_hints(RunFacts).items() if name != "others"}
_TRAIN_FACTS: dict[str, Any] = {"kl": KL | None, "objective": Objective | None, "seed": int | None}


def base_of(run: Path | str, facts: Mapping[str, Any]) -> str:
    """The folder of a run's base model. Raises InputError, with a remedy, if it has moved."""
    folder: str = facts["model"]
    if Path(folder).exists() or not Path(folder).is_absolute():  # it may be a name on the Hub
        return folder
    where = hub_name(Path(folder)) or "FOLDER, its folder now"
    raise InputError(f"{run}: its base model {folder} is not there: give --model {where}")


class Run(NamedTuple):
    """A trained model, and what its run.json says."""

    model: Llama
    facts: RunFacts


def save_run(run: Path | str, model: Llama, info: Mapping[str, Any]) -> None:
    """Write RUN/adapter.safetensors and RUN/run.json; `load_run` reads them back.

    On several ranks all call it, and rank 0 writes.
    info: facts to keep, "model" (the base's folder) among them; must be JSON. `RunFacts` lists
    those that are read. `Encoded.wording.facts()` are those that `evaluate` and `predict` need to
    ask as the run was trained.

    Example:

    >>> import os, tempfile
    >>> from scalabl_ref import AdapterConfig, Llama, LlamaConfig, add_adapters, save_run
    >>> model = add_adapters(Llama(LlamaConfig(32, 8, 16, 1, 2, 1, 4)), AdapterConfig(rank=2))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     save_run(run, model, {"model": "the base's folder"})
    ...     sorted(os.listdir(run))
    ['adapter.safetensors', 'run.json']
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


def run_facts(run: Path | str) -> RunFacts:
    """What RUN/run.json says.

    Raises InputError naming the file and the key that is missing or has an invalid value.
    """
    path = Path(run) / "run.json"
    if not os.path.exists(path):
        raise InputError(_why_no_run(path.parent))
    info = read_json(path)
    try:
        for key in ("model", "adapter", "head_tokens", "fingerprint"):
            if key not in info:
                raise InputError(f"key {key!r} is missing")
        known = {key: value for key, value in info.items() if key in _FACTS}
        check(known, _FACTS)
        facts = RunFacts(**known, others={k: v for k, v in info.items() if k not in _FACTS})
        check(facts.adapter, get_type_hints(AdapterConfig), "adapter: ")
        AdapterConfig(**facts.adapter)
        train = {**dict.fromkeys(_TRAIN_FACTS), **facts.train}
        check({key: train[key] for key in _TRAIN_FACTS}, _TRAIN_FACTS, "train: ")
        if facts.format not in FORMATS:
            raise InputError(f"format must be {' or '.join(FORMATS)}, not {facts.format!r}")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return dataclasses.replace(facts, train=train)


def _why_no_run(folder: Path) -> str:
    """What is in a folder that has no run.json, and what to do then."""
    if not folder.is_dir():
        return f"{folder}: no such folder: expected a run, which `scalabl train` writes"
    if savepoints.exists(folder) or (folder / "train.jsonl").exists():
        return f"{folder}: training is unfinished{_how_far(folder)}: {resume_command(folder)}"
    if (folder / "adapter_config.json").exists():
        return f"{folder}: is a PEFT adapter and no run: `scalabl import --from peft` makes it one"
    if (folder / "config.json").exists():
        return (
            f"{folder}: is a model and no run: give it as --model alone (a trained adapter becomes "
            "a run by `scalabl import`)"
        )
    return f"{folder}: no run: run.json, which `scalabl train` writes at its end, is not there"


def _how_far(folder: Path) -> str:
    return f", at {savepoints.progress(folder)}" if savepoints.exists(folder) else ""


def keep_command(run: Path, command: Sequence[str]) -> None:
    """Write RUN/command.txt: how a run is trained, for `resume_command`."""
    words = [word for word in command if word != "--resume"]
    atomic_write_text(run / COMMAND, shlex.join(words) + "\n")


def resume_command(run: Path) -> str:
    """What to type to go on with an unfinished run."""
    try:
        return f"go on with `{(run / COMMAND).read_text(encoding='utf-8').strip()} --resume`"
    except (OSError, ValueError):  # of Python alone, or of an older version
        return "go on with `train --resume`"


def load_run(
    run: Path | str,
    model: Llama | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    base: Path | str | None = None,
) -> Run:
    """The trained model, and the facts that `save_run` kept: `model, facts = load_run(folder)`.

    model: the base, already loaded and untrimmed; None loads it from where run.json says. base: the
    folder of `model`, to be named in errors.
    Raises InputError if a file is missing or broken, or if the base is not the one trained on.

    Example: it gives back the model of `save_run`, given the same base model.

    >>> import tempfile
    >>> from scalabl_ref import AdapterConfig, Llama, LlamaConfig, adapters, add_adapters
    >>> from scalabl_ref import load_run, save_run
    >>> def base():
    ...     return Llama(LlamaConfig(32, 8, 16, 1, 2, 1, 4)).init_random_(seed=0)
    >>> trained = add_adapters(base(), AdapterConfig(rank=2), seed=1)
    >>> with tempfile.TemporaryDirectory() as run:
    ...     save_run(run, trained, {"model": "the base's folder"})
    ...     model, facts = load_run(run, model=base())
    >>> adapters(model)["lm_head"].A.equal(adapters(trained)["lm_head"].A)
    True
    """
    run = Path(run)
    facts = run_facts(run)
    given = base or (facts.model if model is None else "the model given")
    if model is None:
        model = Llama.from_pretrained(base_of(run, facts), dtype, device, facts.quantize)
    if fingerprint(model) != facts.fingerprint:
        if Path(given).resolve() == Path(facts.model).resolve():
            raise InputError(
                f"{run}: was trained on another base model than {facts.model} is now: give the one "
                "that it was trained on as --model FOLDER, or train again"
            )
        there = facts.model if Path(facts.model).exists() else "FOLDER, wherever that is now"
        raise InputError(
            f"{run}: was trained on {facts.model}; {given} is another model: give --model {there}"
        )
    if facts.head_tokens is not None:
        model.trim_head(facts.head_tokens)
    add_adapters(model, AdapterConfig(**facts.adapter))
    tensors, _ = load_tensors(run / "adapter.safetensors")
    load_adapter_state(model, tensors, run / "adapter.safetensors")
    return Run(model.eval(), facts)
