"""Model folders on disk: config.json and tensors, in Hugging Face's layout or in ours.

Our layout is one `model.safetensors` with this package's tensor names and a `config.json` that
says "format": "scalabl_ref" and keeps the original configuration, so that the way back is exact.
Nothing here knows the model; `llama` reads its configuration and weights through these functions.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, atomic_write, atomic_write_text, out_of_memory, writing

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


_POINTER = b"version https://git-lfs.github.com/"


def refuse_pointer(path: Path) -> None:
    """Raise InputError if a file holds not its contents but git-lfs's note of where they are."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # whoever reads it says so
    if start == _POINTER:
        raise InputError(f"{path}: is a git-lfs pointer: fetch the file itself with git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if it is absent or is not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of the text, of a long number, of a deep nest
        refuse_pointer(path)
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# How tensors are called that only folders have whose weights were quantised, and by what.
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
    pytorch_model.bin.index.json, in this order; `files` are those that hold tensors. once: memory
    that a tensor took is given back with it, where else a file's pages stay as long as this object.
    Raises InputError naming the file for a missing shard, a broken header, a pickle that holds
    anything but tensors, or the codes of weights that were quantised elsewhere.
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
                    f"{by}: take the same model in 16 bits or more"
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


def open_tensors(path: Path, once: bool = False) -> dict[str, Callable[[], Tensor]]:
    """A function for each tensor of one file, by name, that reads it; `once` as in Weights."""
    readers = _open_file(path, mmap=once)
    # torch's oldest format cannot be mapped: its tensors were all read just now.
    if once and (path.suffix == ".safetensors" or zipfile.is_zipfile(path)):
        return {name: partial(_read_once, path, name) for name in readers}
    return readers


def _read_once(path: Path, name: str) -> Tensor:
    """A tensor in a mapping of the file that is its own, and so ends with it."""
    return _open_file(path, mmap=True)[name]()


def _open_file(path: Path, mmap: bool = False) -> dict[str, Callable[[], Tensor]]:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    tensors = load_pickle(path, mmap)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{path}: expected a dictionary of tensors")
    return {name: partial(tensors.__getitem__, name) for name in tensors}


def _open_safetensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    from safetensors import safe_open

    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a safetensors file")
    try:  # safetensors takes a file that may not be read for one that is not there
        open(path, "rb").close()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
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
        if out_of_memory(error):
            raise
        refuse_pointer(path)
        raise InputError(f"{path}: not a valid safetensors file: {error}") from None


def _fits(path: Path) -> bool:
    """Whether there is memory for twice what a file holds."""
    try:
        bytearray(2 * path.stat().st_size)
    except (MemoryError, OSError):
        return False
    return True


def load_pickle(path: Path, mmap: bool = False) -> Any:
    """What torch.save wrote to `path`, tensors and plain containers only; never runs code.

    mmap: read a tensor's values when they are used, if the file's format allows that.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it has to say of a damaged file, the error says
            mmap = _is_plain_zip(path) and mmap
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        refuse_pointer(path)
        reason = str(error).splitlines()[0] if str(error) else "unreadable"
        raise InputError(
            f"{path}: refused: a pickle may hold only tensors and plain containers ({reason})"
        ) from None
    except Exception as error:  # a damaged stream makes the reader raise almost anything
        # A damaged pickle can ask for any amount: that is a fault of the file's.
        if out_of_memory(error) and not (isinstance(error, MemoryError) and _fits(path)):
            raise
        refuse_pointer(path)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a file written by torch.save: {reason}") from None


def _is_plain_zip(path: Path) -> bool:
    """Whether torch.save wrote a zip file. Raises InputError for one that would unfold in memory.

    torch.save stores its members as they are, so that together they are no larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > path.stat().st_size
    ):
        raise InputError(f"{path}: refused: its members are compressed, as torch.save's never are")
    return True


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
    from safetensors import SafetensorError, TensorSpec, serialize_file

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
        try:
            serialize_file(specs, file.name, metadata=metadata)
        except (SafetensorError, OSError) as error:
            known = re.search(r"I/O error: (.*) \(os error", str(error))  # as Rust words them
            reason = known[1] if known else error
            raise InputError(f"{path}: cannot be written: {reason}") from None


# --- tensor by tensor, for models that do not fit into memory ----------------------------------

PIECE = 1 << 22  # values looked at, converted and written at a time

# Names in a safetensors header, in the order in which its writers lay dtypes out.
_FLOATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_DTYPES = {**_FLOATS, torch.int8: "I8", torch.uint8: "U8"}
FLOATS = tuple(_FLOATS)  # dtypes of weights; those of 8 bits mean nothing without scales


@dataclass(frozen=True)
class Stored:
    """A tensor that is not in memory yet: dtype and shape, and the function that reads it.

    packed: codes or scales of a quantised weight, which are written as they are.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    packed: bool = False

    def written(self, dtype: torch.dtype | None) -> torch.dtype:
        """Its dtype in a file whose tensors are to be of `dtype`; None: as they are."""
        return self.dtype if dtype is None or self.packed else dtype

    def nbytes(self, dtype: torch.dtype | None) -> int:
        """Its size in such a file."""
        return torch.Size(self.shape).numel() * self.written(dtype).itemsize

    @staticmethod
    def held(tensor: Tensor) -> Stored:
        """One that is in memory after all."""
        return Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @staticmethod
    def of(read: Callable[[], Tensor]) -> Stored:
        """dtype and shape are those of `read()`, which must cost little."""
        tensor = read()
        return Stored(tensor.dtype, tuple(tensor.shape), read)


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
    """A config.json of Hugging Face's layout that says `dtype`, if it says any."""
    if dtype is None:
        return values
    name = str(dtype).removeprefix("torch.")
    return {key: name if key in ("dtype", "torch_dtype") else v for key, v in values.items()}


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in no memory beside the tensor's."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def check_names(source: Any, found: Collection[str], expected: Collection[str]) -> None:
    """Raise InputError, naming `source` and the tensor, for one that is missing or unexpected."""
    for name in expected:
        if name not in found:
            raise InputError(f"{source}: tensor {name} is missing")
    for name in found:
        if name not in expected:
            raise InputError(f"{source}: tensor {name} is unexpected")


def check_tensor(
    source: Any, name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise InputError, naming `source` and the tensor, unless it can take the place of `like`.

    It must have the shape of `like`, the same dtype or, for floats, any of 16 bits or more, and
    values that are finite in `dtype`; None is its own. `like` may be on the meta device.
    """
    if tensor.shape != like.shape:
        shapes = f"shape {tuple(tensor.shape)}, expected {tuple(like.shape)}"
        raise InputError(f"{source}: tensor {name} has {shapes}")
    floats = like.is_floating_point()
    if tensor.dtype not in (FLOATS if floats else (like.dtype,)):
        kind = "floats of 16 bits or more" if floats else like.dtype
        raise InputError(f"{source}: tensor {name} is {tensor.dtype}, expected {kind}")
    if not is_finite(tensor if dtype is None else tensor.to(dtype)):
        raise InputError(f"{source}: tensor {name} has NaN or infinite values")


def buffer(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, shared and not copied; `tensor` must outlive them."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Stored],
    dtype: torch.dtype | None = None,
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time, read in the order given.

    dtype: of all tensors written that are not packed; None keeps each one's own. The bytes are
    those that `save_tensors` writes. `progress` is told of bytes as they are written. Raises
    InputError for a tensor that is not of floats (unless packed), or (what was given or what
    `dtype` makes of it) not finite.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (_DTYPES if tensor.packed else FLOATS):
            raise InputError(f"tensor {name} is {tensor.dtype}, expected floats of 16 bits or more")
    place = list(_DTYPES).index
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin, end = {}, 0
    for name in sorted(tensors, key=lambda name: (place(tensors[name].written(dtype)), name)):
        tensor = tensors[name]
        begin[name], end = end, end + tensor.nbytes(dtype)
        header[name] = {
            "dtype": _DTYPES[tensor.written(dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin[name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            file.seek(8 + len(text) + begin[name])
            for part in tensor.read().flatten().split(PIECE):
                part = part.to(tensor.written(dtype))
                if not is_finite(part):
                    raise InputError(f"tensor {name} has NaN or infinite values as {part.dtype}")
                file.write(buffer(part))
                progress(part.nbytes)


def sha256(path: Path, progress: Callable[[int], Any] = lambda size: None) -> str:
    """SHA-256 of a file. Raises InputError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                progress(len(block))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all. Raises InputError if either cannot be read or written."""
    try:
        with open(source, "rb") as file, atomic_write(target) as out:
            shutil.copyfileobj(file, out)
    except OSError as error:
        raise InputError(f"{source}: cannot be copied: {error.strerror}") from None


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and nothing otherwise.

    Raises InputError if there is something at `path` already, or if it cannot be written there.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        with writing(path):
            temporary.chmod(0o755)
            os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, InputError):  # in the words of who knows no temporary name
            raise InputError(str(error).replace(str(temporary), str(path))) from None
        raise


def write_model(
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Stored],
    files: Mapping[str, Path],
    dtype: torch.dtype | None = None,
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """Fill a model folder: model.safetensors, copies of `files` by their name, config.json.

    The last is what makes it a model: whatever stops this leaves a folder that no one can load.
    dtype and progress as in `write_tensors`.
    """
    write_tensors(folder / WEIGHTS, tensors, dtype, progress)
    for name, source in files.items():
        copy_file(source, folder / name)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    atomic_write_text(folder / "config.json", text)
