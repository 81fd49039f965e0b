"""Programs that come with other people's files run in a process that the system limits.

They are chat templates and regular expressions. Either can take for ever, within one step of
Python's, and a template any memory. The process is one for all; after its end another one starts.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from . import limited_process

# The processor's time for a template and for a regular expression, the memory of the process, and
# the characters of a text.
SECONDS, MATCHING, MEMORY, LONGEST = 5.0, 0.1, 256 << 20, 10_000_000


class Failed(ValueError):
    """The program failed, or reached a limit: the reason, in one line."""


_lock = threading.Lock()
_processes: dict[int, subprocess.Popen[bytes]] = {}  # by the process that started it: one may fork


def ask(request: Mapping[str, Any]) -> Any:
    """What the process answers to a request, see limited_process. Raises Failed."""
    try:
        answer = _answer(json.dumps(request).encode() + b"\n")
    except (TypeError, ValueError, RecursionError) as error:
        raise Failed(f"it is given a value that JSON has not: {error}") from None
    if "error" in answer:
        raise Failed(answer["error"][:120])
    return answer["answer"]


def match(pattern: str, text: str, whole: bool = False) -> Sequence[Any] | None:
    """The groups of re.match, or re.fullmatch if `whole`, the whole match first. Raises Failed."""
    return ask({"pattern": pattern, "text": text, "whole": whole})


def _answer(request: bytes) -> dict[str, Any]:
    """What the process answers. It starts with the first request, or after its end."""
    with _lock:
        process = _processes.get(os.getpid())
        if process and process.poll() is not None:
            _stop(process)  # closes its pipes
            process = None
        if process is None:
            process = _processes[os.getpid()] = _started()
        assert process.stdin and process.stdout
        line = b""
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not line.endswith(b"\n"):  # the process ended, or this one was interrupted
                code = _stop(process)
        if line.endswith(b"\n"):
            return json.loads(line.decode("utf-8", "surrogatepass"))
    if code == -signal.SIGPROF:
        return {"error": "it runs for too long"}
    return {"error": f"it ended the process that ran it (exit status {code})"}


def _started() -> subprocess.Popen[bytes]:
    settings = json.dumps([sys.path, SECONDS, MATCHING, MEMORY, LONGEST])
    command = [sys.executable, "-I", limited_process.__file__, settings]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)


def _stop(process: subprocess.Popen[bytes]) -> int:
    """End the process, if it has not ended; returns its exit status."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            pipe and pipe.close()
    return process.wait()


@atexit.register
def _at_exit() -> None:
    if process := _processes.pop(os.getpid(), None):
        _stop(process)
