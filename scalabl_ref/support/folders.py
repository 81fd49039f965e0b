"""Model folders: config.json and tensors, in Hugging Face's layout or in ours.

Our layout is one `model.safetensors` with this package's tensor names and a `config.json` that
says "format": "scalabl_ref" and keeps the original configuration, so that the way back is exact.
Nothing here knows the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .files import atomic_write_text, copy_file, read_json
from .tensors import Stored, open_tensors, write_tensors

FORMAT = "scalabl_ref"

WEIGHTS = "model.safetensors"

# Parts of a tensor's name in Hugging Face's layout and in ours. A name is mapped part by
# part; the inverse is the same table read from right to left.
_HF_TO_OURS = {
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}

_OURS_TO_HF = {ours: hf for hf, ours in _HF_TO_OURS.items()}


def hf_to_ours(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> layers.0.attn.q_proj.weight

    Raises InputError for a name that no causal language model of this layout has.
    """
    if not name.startswith(("model.", "lm_head.")):
        raise InputError(f"tensor {name}: expected a name that begins with model. or lm_head.")
    parts = name.removeprefix("model.").split(".")
    return ".".join(_HF_TO_OURS.get(part, part) for part in parts)


def ours_to_hf(name: str) -> str:
    """layers.0.attn.q_proj.weight -> model.layers.0.self_attn.q_proj.weight"""
    parts = [_OURS_TO_HF.get(part, part) for part in name.split(".")]
    prefix = [] if parts[0] == "lm_head" else ["model"]
    return ".".join(prefix + parts)


# Endings of tensors' names that show weights quantised by another program, and its method.
_CODES = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or in FP8",
    ".weight_scale_inv": "an FP8 method",
    ".scales": "MLX, or another method",
}


class Weights(Mapping[str, Tensor]):
    """The tensors of a model folder by name, each read from its file when it is asked for.

    Finds model.safetensors, model.safetensors.index.json, pytorch_model.bin or
    pytorch_model.bin.index.json, in this order; `files` are the files of tensors. once: a tensor's
    memory is freed with it; otherwise a file's pages stay as long as this object. Raises InputError
    naming the file for a missing shard, a broken header, a pickle with anything but tensors, or
    codes of weights that were quantised elsewhere.
    """

    def __init__(self, folder: Path | str, once: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        self.files: list[Path] = []
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for file, names in self._files():
            self.files.append(file)
            found = open_tensors(file, once)
            absent = [name for name in names or () if name not in found]
            if absent:
                raise InputError(
                    f"{file}: tensor {absent[0]} is missing, though the index names it"
                )
            self._readers.update(found)
        for name in self._readers:
            by = next((by for end, by in _CODES.items() if name.endswith(end)), None)
            if by:
                raise InputError(
                    f"{self.folder}: tensor {name} is of weights that were quantised elsewhere, by "
                    f"{by}: use the same model in 16 bits or more"
                )

    def _files(self) -> Iterator[tuple[Path, list[str] | None]]:
        """Each weight file with the tensors that the index expects in it (None: no index)."""
        for single in (WEIGHTS, "pytorch_model.bin"):
            if (self.folder / single).exists():
                yield self.folder / single, None
                return
            index = self.folder / f"{single}.index.json"
            if not index.exists():
                continue
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{index}: expected a non-empty object under 'weight_map'")
            for shard in dict.fromkeys(weight_map.values()):
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise InputError(f"{index}: {shard!r} is not the name of a file in the folder")
                if not (self.folder / shard).exists():
                    raise InputError(f"{self.folder / shard}: shard is missing")
                yield (
                    self.folder / shard,
                    [name for name, where in weight_map.items() if where == shard],
                )
            return
        raise InputError(
            f"{self.folder}: no weights: expected model.safetensors, pytorch_model.bin, "
            "or the index.json of their shards"
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def stored_weights(folder: Path) -> tuple[Weights, dict[str, Stored]]:
    """A model folder's tensors by our names, each read when it is asked for, in either layout."""
    weights = Weights(folder, once=True)
    converted = read_json(folder / "config.json").get("format") == FORMAT
    tensors = {
        (name if converted else hf_to_ours(name)): Stored.of(partial(weights.__getitem__, name))
        for name in weights
    }
    return weights, tensors


def with_dtype(values: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A config.json of Hugging Face's layout, with `dtype` in place of the dtype that it states."""
    if dtype is None:
        return values
    name = str(dtype).removeprefix("torch.")
    return {key: name if key in ("dtype", "torch_dtype") else v for key, v in values.items()}


def write_model(
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Stored],
    files: Mapping[str, Path],
    dtype: torch.dtype | None = None,
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """Fill a model folder: model.safetensors, copies of `files` by their name, config.json.

    config.json comes last, so that an incomplete folder cannot be loaded. dtype and progress: as in
    `write_tensors`.
    """
    write_tensors(folder / WEIGHTS, tensors, dtype, progress)
    for name, source in files.items():
        copy_file(source, folder / name)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    atomic_write_text(folder / "config.json", text)
