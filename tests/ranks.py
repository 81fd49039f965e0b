"""Processes as torchrun would start them, quickly: forked off one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["scalabl_ref.app.cli.train", "scalabl_ref.app.cli.evaluate", "scalabl_ref.training.loop",
     "scalabl_ref.data.tokenizer", "torch._dynamo", "torch.distributed.fsdp",
     "tests.training.test_savepoints"]
)  # fmt: skip
PATIENCE = 120.0  # seconds until a job counts as hung


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, out: Path | None = None):
    """`function(*arguments)` on so many ranks; their exit codes, in order.

    function: importable, of a module. out: a folder for what rank i prints, as the file outi.
    Raises TimeoutError, and ends them, if they do not end by themselves.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        process = CONTEXT.Process(target=_run, args=(environment, out, function, arguments))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [process for process in processes if process.exitcode is None]
    for process in hung:
        process.kill()
        process.join()
    if hung:
        raise TimeoutError(f"{len(hung)} of {world} ranks did not end within {PATIENCE} s")
    return [process.exitcode for process in processes]


def _run(
    environment: dict[str, str], out: Path | None, function: Callable[..., Any], arguments: tuple
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    if out is not None:
        with open(out / f"out{environment['RANK']}", "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code or 0)
