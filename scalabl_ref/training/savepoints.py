"""A run's checkpoints, RUN/checkpoint/STEP: one file of tensors from each rank.

The files are safetensors with the names of Hugging Face's shards; torch.distributed.checkpoint
reads them too. A run can go on with another number of ranks. manifest.json is written last and has
the SHA-256 of every file: without it, or with another digest, a checkpoint is not used. The two
newest checkpoints are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..support.errors import InputError
from ..support.files import atomic_write_text, make_folder, read_json, sha256
from ..support.tensors import load_tensors, save_tensors
from . import ranks as distributed

FOLDER, MANIFEST = "checkpoint", "manifest.json"
KEPT = 2  # checkpoints, the newest
STEP = r"\d{8,}"  # a checkpoint's name


class Savepoint(NamedTuple):
    """A checkpoint: its tensors, the steps done, and the settings of its run, an object of JSON."""

    tensors: dict[str, Tensor]
    done: int
    identity: dict[str, Any]


class Saver:
    """Writes the checkpoints of one run. beside: in a thread, while training goes on.

    On several ranks each has one, with a folder that all ranks see, and all make the same calls.
    """

    def __init__(self, run: Path, beside: bool = False) -> None:
        self.folder = run / FOLDER
        self._thread = ThreadPoolExecutor(1) if beside else None
        self._group = distributed.new_group() if beside else None  # of the threads alone
        self._pending: Future[None] | None = None

    def save(self, done: int, tensors: Mapping[str, Tensor], identity: dict[str, Any]) -> None:
        """Write a `Savepoint`; in background mode, of a snapshot taken now.

        The tensors are the same on every rank. Raises InputError, on every rank, if one of them
        cannot write now, or could not the time before; earlier checkpoints stay.
        """
        self.wait()
        if self._thread is None:
            self._write(done, tensors, identity)
        else:
            copies = {
                name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()
            }
            self._pending = self._thread.submit(self._write, done, copies, identity)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises InputError if it cannot be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def forget_after(self, step: int) -> None:
        """Remove checkpoints of later steps and remains of unfinished ones, nothing else."""
        for path in self.folder.glob("*"):
            unfinished = re.fullmatch(rf"\.{STEP}\.tmp", path.name)
            if unfinished or (_is_checkpoint(path) and int(path.name) > step):
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, done: int, tensors: Mapping[str, Tensor], identity: dict[str, Any]) -> None:
        rank, world = distributed.rank(), distributed.world()
        final = self.folder / f"{done:08}"
        temporary = final.with_name(f".{final.name}.tmp")
        own = [(name, tensors[name]) for name in sorted(tensors)[rank::world]]

        def write_part() -> None:
            make_folder(temporary)
            save_tensors(temporary / f"model-{rank + 1:05}-of-{world:05}.safetensors", own)

        def finish() -> None:
            if rank:
                return
            files = {path.name: sha256(path) for path in sorted(temporary.glob("*.safetensors"))}
            record = {"files": files, "done": done, "identity": identity}
            atomic_write_text(temporary / MANIFEST, json.dumps(record, indent=2) + "\n")
            os.replace(temporary, final)
            for old in _newest_first(self.folder)[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)

        self._together(write_part, temporary)
        self._together(finish, temporary)

    def _together(self, action: Callable[[], None], temporary: Path) -> None:
        """Call `action`; if it fails on any rank, raise InputError on all of them."""
        from safetensors import SafetensorError

        problem = ""
        try:
            action()
        except (InputError, OSError, SafetensorError) as error:
            problem = str(error)
        if distributed.largest(int(bool(problem)), self._group):
            shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
            problem = problem.replace(f"{temporary}{os.sep}", "") or "another rank could not write"
            raise InputError(f"{self.folder}: the checkpoint cannot be written: {problem}")


def exists(run: Path) -> bool:
    """Whether there is a checkpoint in a run folder, whole or not."""
    return bool(_newest_first(run / FOLDER))


def progress(run: Path) -> str:
    """How far a run with checkpoints has come, such as "step 400 of 1000"."""
    newest = _newest_first(run / FOLDER)[0]
    text = f"step {int(newest.name)}"
    try:
        return f"{text} of {read_json(newest / MANIFEST)['identity']['train']['steps']:d}"
    except (InputError, KeyError, TypeError, ValueError):  # damaged, or of another program
        return text


def load(run: Path) -> Savepoint:
    """The newest checkpoint that is whole, on the CPU.

    Warns of newer ones that are not whole. Raises InputError if none is.
    """
    problems: list[InputError] = []
    for folder in _newest_first(run / FOLDER):
        try:
            found = _read(folder)
        except InputError as error:
            problems.append(error)
            continue
        for problem in problems if distributed.rank() == 0 else []:
            warnings.warn(f"{problem}: going back to {folder.name}", stacklevel=2)
        return found
    if problems:
        raise problems[0]
    raise InputError(f"{run / FOLDER}: no checkpoint to resume from")


def _newest_first(folder: Path) -> list[Path]:
    found = filter(_is_checkpoint, folder.glob("*"))
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _is_checkpoint(path: Path) -> bool:
    """By its name: other folders there are somebody else's."""
    return re.fullmatch(STEP, path.name) is not None


def _read(folder: Path) -> Savepoint:
    record = read_json(folder / MANIFEST)
    files, done, identity = (record.get(key) for key in ("files", "done", "identity"))
    if not (isinstance(files, dict) and files and isinstance(identity, dict)) or (
        done != int(folder.name)
    ):
        raise InputError(f"{folder / MANIFEST}: was not written by this program")
    tensors: dict[str, Tensor] = {}
    for name, digest in files.items():
        path = folder / Path(name).name
        if not path.is_file() or sha256(path) != digest:
            raise InputError(f"{path}: has changed since it was written")
        tensors |= load_tensors(path)[0]
    return Savepoint(tensors, done, identity)
