"""A model's weights: read from a folder, every tensor checked on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..support.errors import InputError
from ..support.files import read_json
from ..support.folders import FORMAT, Weights, hf_to_ours
from ..support.hub import model_folder
from ..support.tensors import FLOATS, check_tensor, is_finite
from .attach import Device, Linear
from .config import LlamaConfig
from .llama import Llama

Item = TypeVar("Item")
quantizer: Any = None  # the module fast/quantize.py, which the package sets


def block_linears(model: Llama) -> list[tuple[str, Linear]]:
    """The linear layers of the blocks by name, such as 0.attn.q_proj."""
    return [(n, m) for n, m in model.layers.named_modules() if isinstance(m, Linear)]


def load_model(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    device: Device = None,
    quantize: str | None = None,
) -> Llama:
    """The model in a folder of Hugging Face's layout or of the converted one.

    folder: its path, or a name on the Hub, OWNER/NAME: see `hub.model_folder`.

    dtype: of the loaded weights, except the scales of codes. None keeps the file's dtype, and the
    weights are then mapped, not copied: their pages are read when they are first used, and may
    be dropped and read again where memory is short. Weights of several dtypes take the one that
    config.json states (dtype or torch_dtype), else the embedding's. quantize: "int8" or "nf4", see
    fast/quantize.py, tensor by tensor as they are read; a folder whose config.json says "quantize"
    is read as it is. A head that differs from the embedding is used, whatever tie_word_embeddings
    says. Returns the model frozen, in evaluation mode. Raises InputError naming the file or tensor
    for anything missing, misshapen, unexpected or not finite.
    """
    folder = model_folder(folder)
    model, tensors = _open_model(folder)
    if quantize == model.quantized:
        quantize = None
    if quantize and model.quantized:
        raise InputError(f"{folder}: is quantised already, to {model.quantized}")
    linears = {f"layers.{name}.weight" for name, _ in block_linears(model)}
    state = {}
    for name, tensor in tensors:
        if quantize and quantizer and name in linears:
            codes, scale = quantizer.quantize(tensor, quantize)
            state[name] = codes.to(device)
            state[name.removesuffix("weight") + "scale"] = scale.to(device)
        else:
            cast = tensor.is_floating_point() and not name.endswith(".scale")
            state[name] = tensor.to(dtype=dtype if cast else None, device=device)
    if quantize and quantizer:
        quantizer.quantize_model(model, quantize)
    _to_one_dtype(folder, state)
    if model.tied:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.tied:
        model.tie_head()
    return model.requires_grad_(False).eval()


def _to_one_dtype(folder: Path, state: dict[str, Tensor]) -> None:
    """Cast weights of several dtypes to the one that config.json says, else the embedding's.

    Raises InputError for a tensor that has a value too large for that dtype.
    """
    floats = [n for n, t in state.items() if t.is_floating_point() and not n.endswith(".scale")]
    if len({state[name].dtype for name in floats}) < 2:
        return
    values = read_json(folder / "config.json")
    values = values.get("hf_config") or values
    stated = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    names = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    dtype = names.get(stated, state["embed_tokens.weight"].dtype)
    for name in floats:
        if state[name].dtype != dtype:
            state[name] = state[name].to(dtype)
            if not is_finite(state[name]):
                raise InputError(f"{folder}: tensor {name} has values too large for {dtype}")


def as_stored(
    config: LlamaConfig, tensors: dict[str, Item], read: Callable[[Item], Tensor]
) -> LlamaConfig:
    """`config`, with tie_word_embeddings as the tensors, by our names, have it.

    As in transformers 5, a head that differs from the embedding is used, whatever
    tie_word_embeddings says. A tied head without an embedding is the embedding, and is renamed.
    """
    head, embedding = "lm_head.weight", "embed_tokens.weight"
    if not config.tie_word_embeddings or config.head_tokens is not None or head not in tensors:
        return config
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        return config
    ours, theirs = read(tensors[embedding]), read(tensors[head])
    if ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.dtype)):
        return config
    return dataclasses.replace(config, tie_word_embeddings=False)


def check_model(folder: Path | str, config: LlamaConfig | None = None) -> None:
    """Raise InputError for all that `load_model` refuses, with one tensor in memory at a time.

    config: the configuration, if config.json has features that are not implemented here.
    """
    _, tensors = _open_model(folder, config)
    for pair in tensors:
        del pair  # before the next is read


def read_config(path: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """A config.json of either layout, and the JSON object it holds.

    Raises InputError naming the file if it is absent, not JSON, or of an unknown model.
    """
    values = read_json(path)
    try:
        return LlamaConfig.from_dict(values), values
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _refuse_what_is_no_model(path: Path) -> None:
    """Raise InputError for a path that is easily mistaken for a model's folder; say what it is."""
    if path.suffix == ".gguf" and path.is_file():
        raise InputError(f"{path}: is a GGUF file: tools/convert_gguf.py makes a folder of it")
    if path.is_file():
        raise InputError(f"{path}: is a file: give the folder of config.json and the weights")
    if (path / "adapter_config.json").exists():
        raise InputError(
            f"{path}: is a PEFT adapter, not a model: `scalabl import --from peft` makes it a run"
        )
    if (path / "run.json").exists():
        raise InputError(f"{path}: is a run, not a model: give it as --run")


def _open_model(
    folder: Path | str, config: LlamaConfig | None = None
) -> tuple[Llama, Iterator[tuple[str, Tensor]]]:
    """The model in a folder without its weights, and its weights by our names, read one by one.

    A tied head is not among them. config: as in `check_model`. Raises the errors of
    `load_model`, at once or while the weights are read.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        _refuse_what_is_no_model(Path(folder))
    values = read_json(path)
    converted = values.get("format") == FORMAT
    config = config or read_config(path)[0]
    weights = Weights(folder, once=True)
    names = {(name if converted else hf_to_ours(name)): name for name in weights}
    layers = len({name.split(".")[1] for name in names if name.startswith("layers.")})
    if layers < config.num_hidden_layers:  # before a wrong file makes us build very many
        raise InputError(
            f"{weights.folder}: has tensors of {layers} layers, expected {config.num_hidden_layers}"
        )
    model = Llama(as_stored(config, names, weights.__getitem__), device="meta")
    if quantizer and converted and values.get("quantize") is not None:
        quantizer.quantize_model(model, values["quantize"])
    return model, _checked(model, weights, names)


def _checked(model: Llama, weights: Weights, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `model` read from `weights`, every one checked on the way.

    names: our tensor name -> the file's.
    """
    expected = model.state_dict()
    if model.tied:
        del expected["lm_head.weight"]
    for name, empty in expected.items():
        if name not in names:
            raise InputError(f"{weights.folder}: tensor {name} is missing")
        tensor = weights[names[name]]
        check_tensor(weights.folder, names[name], tensor, empty)
        del tensor  # frees the pages that were read
        yield name, weights[names[name]]
    # Old checkpoints store RoPE's frequencies, which we compute; a tied head may be stored twice.
    ignored = ("rotary_emb.inv_freq", *(["lm_head.weight"] if model.tied else []))
    for name, original in names.items():
        if name not in expected and not name.endswith(ignored):
            raise InputError(f"{weights.folder}: tensor {original} is not part of this model")
