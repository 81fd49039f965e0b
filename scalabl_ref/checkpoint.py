"""Model folders on disk: config.json and tensors, in Hugging Face's layout or in ours.

Our layout is one `model.safetensors` with this package's tensor names and a `config.json` that
says "format": "scalabl_ref" and keeps the original configuration, so that the way back is exact.
Nothing here knows the model; `llama` reads its configuration and weights through these functions.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, atomic_write

FORMAT = "scalabl_ref"
WEIGHTS = "model.safetensors"

# Parts of a tensor's name in Hugging Face's layout and in ours. Applied part by part, so the map
# is its own documentation and its inverse is the same table read the other way.
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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if it is absent or is not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Weights(Mapping[str, Tensor]):
    """The tensors of a model folder by name, each read from its file when it is asked for.

    Finds model.safetensors, model.safetensors.index.json, pytorch_model.bin or
    pytorch_model.bin.index.json, in this order. Raises InputError naming the file for a missing
    shard, a broken header, or a pickle that holds anything but tensors.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for file, names in self._files():
            found = _open_file(file)
            absent = [name for name in names or () if name not in found]
            if absent:
                raise InputError(
                    f"{file}: tensor {absent[0]} is missing, though the index names it"
                )
            self._readers.update(found)

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


def _open_file(path: Path) -> dict[str, Callable[[], Tensor]]:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    tensors = load_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{path}: expected a dictionary of tensors")
    return {name: partial(tensors.__getitem__, name) for name in tensors}


def _open_safetensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    from safetensors import safe_open

    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a safetensors file")
    with _named_errors(path):
        file = safe_open(str(path), framework="pt")
        names = list(file.keys())

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with _named_errors(path):
                return file.get_tensor(name)

        return read

    return {name: reader(name) for name in names}


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a valid safetensors file: {error}") from None


def load_pickle(path: Path) -> Any:
    """What torch.save wrote to `path`, tensors and plain containers only; never runs code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it has to say of a damaged file, the error says
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "unreadable"
        raise InputError(
            f"{path}: refused: a pickle may hold only tensors and plain containers ({reason})"
        ) from None
    except Exception as error:  # a damaged stream makes the reader raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a file written by torch.save: {reason}") from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file, and its metadata."""
    from safetensors import safe_open

    readers = _open_safetensors(path)
    with _named_errors(path), safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    return {name: read() for name, read in readers.items()}, metadata


def save_tensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors to a safetensors file, whole or not at all.

    Goes through safetensors' own pointer interface, since its torch front end needs NumPy.
    """
    from safetensors import TensorSpec, serialize_file

    # The contiguous CPU copies must outlive the call: the library sees only their addresses.
    alive = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in alive.items()
    }
    with atomic_write(path) as file:
        serialize_file(specs, file.name, metadata=metadata)


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and nothing otherwise.

    Raises InputError if there is something at `path` already, or if it cannot be written there.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_model(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    files: Mapping[str, Path],
) -> None:
    """Fill a model folder: config.json, model.safetensors, and copies of `files` by their name."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})
    for name, source in files.items():
        shutil.copyfile(source, folder / name)
