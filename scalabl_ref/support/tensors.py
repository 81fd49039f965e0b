"""Files of tensors: safetensors and what torch.save writes, whole or tensor by tensor."""

from __future__ import annotations

import ctypes
import json
import pickle
import re
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

from .errors import InputError, out_of_memory
from .files import atomic_write, reading, refuse_pointer


def open_tensors(path: Path, once: bool = False) -> dict[str, Callable[[], Tensor]]:
    """Functions that read the tensors of one file, by name. once: as in folders.Weights."""
    readers = _open_file(path, mmap=once)
    # torch's oldest format cannot be mapped: its tensors were all read just now.
    if once and (path.suffix == ".safetensors" or zipfile.is_zipfile(path)):
        return {name: partial(_read_once, path, name) for name in readers}
    return readers


def _read_once(path: Path, name: str) -> Tensor:
    """A tensor in its own mapping of the file, which is freed with the tensor."""
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
    with reading(path):  # safetensors reports an unreadable file as missing
        open(path, "rb").close()
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
    """Whether there is memory for twice the size of a file."""
    try:
        bytearray(2 * path.stat().st_size)
    except (MemoryError, OSError):
        return False
    return True


def load_pickle(path: Path, mmap: bool = False) -> Any:
    """The object that torch.save wrote: tensors and plain containers only; never runs code.

    mmap: read a tensor's values when they are used, if the file's format allows that.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error for a damaged file says enough
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
        # A damaged pickle can ask for any amount of memory: that is an error in the file.
        if out_of_memory(error) and not (isinstance(error, MemoryError) and _fits(path)):
            raise
        refuse_pointer(path)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a file written by torch.save: {reason}") from None


def _is_plain_zip(path: Path) -> bool:
    """Whether torch.save wrote a zip file. Raises InputError for one that would grow in memory.

    torch.save does not compress the members, so together they are no larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > path.stat().st_size
    ):
        raise InputError(f"{path}: refused: torch.save never compresses its members")
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

PIECE = 1 << 22  # values checked, converted and written at a time

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
        """Its dtype in a file written with `dtype`; None keeps its own."""
        return self.dtype if dtype is None or self.packed else dtype

    def nbytes(self, dtype: torch.dtype | None) -> int:
        """Its size in such a file."""
        return torch.Size(self.shape).numel() * self.written(dtype).itemsize

    @staticmethod
    def held(tensor: Tensor) -> Stored:
        """A tensor that is already in memory."""
        return Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @staticmethod
    def of(read: Callable[[], Tensor]) -> Stored:
        """dtype and shape are those of `read()`, which must cost little."""
        tensor = read()
        return Stored(tensor.dtype, tuple(tensor.shape), read)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; makes no copy of the tensor."""
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
    those that `save_tensors` writes. `progress` gets the number of bytes as they are
    written. Raises InputError for a tensor that is not of floats (unless packed), or has values
    that are not finite, as given or in `dtype`.
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
