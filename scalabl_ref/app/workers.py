"""Processes that do jobs, one at a time each. A job is an object with `run()` that can be pickled.

A process receives jobs through a pipe and answers each with None or with the error that ended it.
The pipe closes when this process ends, however that is; then the others end as well.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from ..support.errors import InputError, RankLost, ending

MOST_JOBS = 256


class Job(Protocol):
    def run(self) -> Any: ...


class Workers:
    """At most `most` processes, started when there are jobs for them; with 1, this process works.

    Used in a `with` block. At its end the processes end; those that train write a checkpoint first.
    """

    def __init__(self, most: int) -> None:
        if not 1 <= most <= MOST_JOBS:
            raise InputError(f"jobs must be at least 1 and at most {MOST_JOBS}, not {most}")
        self._most = most
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Do these jobs, in any order; yields after each.

        Raises the error of the first job that fails, or RankLost if a process dies.
        """
        if self._most == 1:
            yield from (job.run() for job in jobs)
            return
        while len(self._processes) < min(self._most, len(jobs)):
            self._start()
        rest = iter(jobs)
        with _alive():
            for job, pipe in zip(islice(rest, self._most), self._processes, strict=False):
                pipe.send(job)
        for _ in jobs:
            pipe = wait(self._processes)[0]  # type: ignore[assignment]
            with _alive():
                error = pipe.recv()
            if error is not None:
                raise error
            yield
            with _alive():
                for job in islice(rest, 1):
                    pipe.send(job)

    def _start(self) -> None:
        """A process that finds modules where this one does, and that ctrl-C does not reach."""
        ours, theirs = Pipe()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self._processes[ours] = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is for results
                start_new_session=True,
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._processes:
            pipe.close()
        for process in self._processes.values():
            process.wait()


@contextmanager
def _alive() -> Iterator[None]:
    """Within the block, the end of a pipe is that of the process behind it."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise RankLost(
            "a process of the study died, perhaps killed for lack of memory (fewer --jobs need "
            "less): finished runs are kept"
        ) from None


def _work(pipe: Connection) -> None:
    """The life of such a process."""
    torch.set_num_threads(1)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    while job := jobs.get():
        answer = None
        try:
            pickle.loads(job).run()
        except Exception as error:
            if ending(error) is None:
                raise  # a fault of ours, whose traceback says where
            answer = error
        with suppress(ConnectionError):  # nobody listens any more
            pipe.send(answer)


def _receive(pipe: Connection, jobs: queue.SimpleQueue[bytes]) -> None:
    """Pass on jobs; when the pipe closes, end this process, even in the middle of a job.

    Training heeds SIGTERM after its step, when it has written a checkpoint: one may not be enough.
    """
    with suppress(EOFError, ConnectionError):
        while True:
            jobs.put(pipe.recv_bytes())
    jobs.put(b"")
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
