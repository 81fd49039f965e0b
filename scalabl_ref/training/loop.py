"""The training loop: a log, checkpoints on the way, and going on from them to the bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ..support.errors import InputError, Interrupted, on_signals
from ..support.fields import json_text
from ..support.files import atomic_write, make_folder, open_log
from . import ranks as distributed
from . import savepoints
from .runs import fingerprint
from .trainer import Trainer
from .watch import Watch


def fit(
    trainer: Trainer,
    run: Path | str,
    resume: bool = False,
    on_step: Callable[[dict[str, float]], None] = lambda record: None,
    beside: bool = False,
    watch: Watch | None = None,
    on_start: Callable[[int], None] = lambda done: None,
) -> None:
    """Train to the end, writing RUN/train.jsonl and checkpoints (`savepoints`) on the way.

    resume: go on from the newest checkpoint that is whole, or begin if there is no checkpoint.
    on_step: a hook, called after each step with its record, the line that train.jsonl has got: see
    `Trainer.step`, and "seconds" and, where `watch` has looked, "heldout_nll" and
    "heldout_accuracy". It may raise; then training ends without a further checkpoint. On several
    ranks it is called on each. on_start: called once, before the first step, with the number of
    steps that are done. beside: write checkpoints while training goes on.
    watch: scores held-out rows on the way; with `keep` the model ends with the adapters of its best
    step, and a checkpoint has them too.
    SIGINT and SIGTERM let the current step end, write a checkpoint, and raise Interrupted.
    On several ranks all call it, with a folder that all ranks see. Rank 0 writes the log; a signal
    to one rank ends all of them.
    Raises InputError if all checkpoints are damaged, if they are of a run with other settings, or
    if one cannot be written.
    """
    run = Path(run)
    make_folder(run)
    identity, config = _identity(trainer, watch), trainer.config
    saver = savepoints.Saver(run, beside)
    if resume and savepoints.exists(run):
        _restore(trainer, run, identity, watch)
    distributed.barrier()  # every rank has seen the run as it was
    if distributed.rank() == 0:
        saver.forget_after(trainer.done)
    caught: list[int] = []  # signals, which wait for the end of the step
    with on_signals(lambda number, _: caught.append(number)), _open_log(run, trainer.done) as log:
        on_start(trainer.done)
        while trainer.done < config.steps:
            started = time.perf_counter()
            record = trainer.step()
            record["seconds"] = time.perf_counter() - started
            if watch and watch.due(trainer.done, config.steps):
                score = watch.look(trainer.model, trainer.done)
                record |= {"heldout_nll": score.nll, "heldout_accuracy": score.accuracy}
            log.write(json_text(record) + "\n")
            on_step(record)
            signum = distributed.largest(caught[0] if caught else 0)
            due = trainer.done % config.checkpoint_every == 0
            if signum or due or trainer.done == config.steps:
                tensors = trainer.state() | (watch.state() if watch else {})
                saver.save(trainer.done, tensors, identity)
            if signum:
                saver.wait()
                raise Interrupted(signum, trainer.done)
        saver.wait()
    distributed.barrier()  # all of it is written
    if watch:
        watch.give_back(trainer.model)


def _identity(trainer: Trainer, watch: Watch | None) -> dict[str, Any]:
    """The settings and data that a run must share with the checkpoint it resumes; JSON."""
    config = dataclasses.asdict(trainer.config)
    for name in ("checkpoint_every", "micro_batch", "recompute", "offload_activations", "compile"):
        del config[name]  # none changes the function computed
    config["dtype"] = str(trainer.model.embed_tokens.weight.dtype).removeprefix("torch.")
    config["init"] = trainer.init
    data = hashlib.sha256(json.dumps([trainer.data.tokens, trainer.data.labels]).encode())
    adapter = dataclasses.asdict(trainer.adapters[0].config)
    record = {"train": config, "adapter": adapter, "data": data.hexdigest()}
    record["model"] = fingerprint(trainer.model)
    if watch and watch.keep:
        record["keep"] = watch.identity()
    return json.loads(json.dumps(record))


def _restore(trainer: Trainer, run: Path, identity: dict[str, Any], watch: Watch | None) -> None:
    saved = savepoints.load(run)
    theirs = saved.identity
    differing = [key for key in identity if identity[key] != theirs.get(key)]
    if differing:
        detail = _first_difference(theirs.get(differing[0]), identity[differing[0]])
        raise InputError(
            f"{run / savepoints.FOLDER}: is of a run with other settings: {differing[0]}{detail}"
        )
    trainer.restore(saved.tensors, saved.done)
    if watch:
        watch.restore(saved.tensors)


def _first_difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in ours:
            if ours[key] != theirs.get(key):
                return f".{key} was {theirs.get(key)!r} and now is {ours[key]!r}"
    return " differs"


@contextmanager
def _open_log(run: Path, count: int) -> Iterator[IO[str]]:
    """RUN/train.jsonl, open for adding lines; on ranks other than 0 the null device.

    It is cut to its first `count` lines: the steps after the checkpoint are done again.
    """
    if distributed.rank() == 0:
        _keep_lines(run / "train.jsonl", count)
    path = os.devnull if distributed.rank() else run / "train.jsonl"
    with open_log(path) as log:
        yield log


def _keep_lines(path: Path, count: int) -> None:
    """Cut a file to its first `count` lines, whatever their bytes, and end each in a line break."""
    lines: list[bytes] = []
    with suppress(FileNotFoundError), open(path, "rb") as file:
        lines = list(islice(file, count))
    with atomic_write(path) as kept:
        kept.writelines(line.removesuffix(b"\n") + b"\n" for line in lines)
