"""Build, check and measure on one GPU, in 8 minutes at most; writes one Markdown file.

    python tools/device_check.py [--out FILE.md] [--only STEP ...] [--model DIR]
        [--peer-python PYTHON] [--official CHECKOUT] [--device cpu]

Each step is a process of its own with a limit of seconds: one that fails, crashes or hangs is
recorded, and the next one begins. The file is written anew after each step. Exit code 1 if a step
failed. The peer of the benchmarks is transformers with peft, of --peer-python or of this Python if
it has them; with --official also the official wrapper. --model is a model in either layout; without
it there is a random one, of the shape of Llama 3.2 1B. --device cpu is the dry run: with tiny
sizes, whose figures mean nothing, and without the steps that need CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(__file__).resolve().parent
PATIENCE = 5  # times the limit has the dry run, whose machine may be shared
TAIL = 30  # lines of a failed step's output that the file keeps


@dataclass(frozen=True)
class Settings:
    """device: cpu or cuda. folder: for what the steps leave to each other."""

    device: str
    folder: Path
    model: Path | None = None
    peer: Path | None = None
    official: Path | None = None

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def base(self) -> Path:
        """The folder of the model that is measured."""
        return self.model or self.folder / "model"


class Skip(Exception):
    """A step cannot run here; the message says why."""


@dataclass(frozen=True)
class Step:
    """limit: seconds on a GPU. command: of the process; it raises Skip. figures: whether the file
    keeps all that it prints."""

    name: str
    limit: float
    command: Callable[[Settings], list[Any]]
    figures: bool = False


class Result(NamedTuple):
    """What became of a step. verdict: passed, failed or skipped. why: its last line, or the reason.
    text: its figures, or the end of what it printed if it failed."""

    name: str
    verdict: str
    seconds: float
    why: str
    text: str = ""


# --- The steps ------------------------------------------------------------------------------------


def own(name: str) -> Callable[[Settings], list[Any]]:
    """A step of device_steps.py."""

    def command(s: Settings) -> list[Any]:
        tiny = ["--tiny"] if s.tiny else []
        return [sys.executable, TOOLS / "device_steps.py", name, s.device, s.folder, *tiny]

    return command


def build(s: Settings) -> list[Any]:
    if s.device == "cpu":
        raise Skip("needs CUDA")
    if not shutil.which("nvcc"):
        raise Skip("no nvcc here: the extension stays as it is")
    return own("build")(s)


def model(s: Settings) -> list[Any]:
    if s.model:
        raise Skip(f"--model {s.model}")
    return own("model")(s)


def graph(s: Settings) -> list[Any]:
    if s.device == "cpu":
        raise Skip("needs CUDA")
    return own("graph")(s)


def verify(s: Settings) -> list[Any]:
    return [sys.executable, "-m", "scalabl_ref", "verify", "--device", s.device]


def tests(s: Settings, *chosen: str, tiny: str = "") -> list[Any]:
    """pytest on the device; in the dry run with fewer examples, of the tests named `tiny`."""
    few = ["--hypothesis-profile", "faults", "-k", tiny] if s.tiny else []
    return [sys.executable, "-m", "pytest", "-q", "-n", 0, "--device", s.device, *chosen, *few]


def kit(s: Settings) -> list[Any]:
    test = "tests/verify/test_conformance.py::test_a_right_port_passes_every_case"
    return tests(s, test, tiny="fast and float32")


def device_tests(s: Settings) -> list[Any]:
    return tests(s, "tests/fast/test_ops.py", "tests/test_device.py", tiny="equals_the_reference")


def bench(what: str) -> Callable[[Settings], list[Any]]:
    def command(s: Settings) -> list[Any]:
        options: list[Any] = ["--rounds", 1, "--threads", 1] if s.tiny else []
        if what == "op":
            options += ["--shape", 64, 128, 64] if s.tiny else []
        else:
            if not (s.base() / "config.json").exists():
                raise Skip("no model: the step `model` makes one")
            if s.peer is None:
                raise Skip("no transformers and peft: --peer-python names a Python that has them")
            options += ["--model", s.base(), "--peer-python", s.peer]
            options += ["--official", s.official] if s.official else []
        return [sys.executable, TOOLS / "bench.py", what, "--device", s.device, "--busy",
                "--dtype", "bfloat16", *options]  # fmt: skip

    return command


STEPS = [
    Step("card", 30, own("card")),
    Step("build", 100, build),
    Step("verify", 40, verify),
    Step("kit", 40, kit),
    Step("tests", 90, device_tests),
    Step("op", 20, bench("op"), figures=True),
    Step("model", 30, model),
    Step("train-step", 35, bench("train-step"), figures=True),
    Step("predict", 35, bench("predict"), figures=True),
    Step("nf4", 15, own("nf4"), figures=True),
    Step("offload", 15, own("offload"), figures=True),
    Step("nccl", 15, own("nccl"), figures=True),
    Step("graph", 15, graph),
]  # 480 seconds together


# --- Running them ---------------------------------------------------------------------------------


def run(step: Step, settings: Settings) -> Result:
    """Run a step to its end or its limit, and end all processes that it started."""
    start, limit = time.monotonic(), step.limit * (PATIENCE if settings.tiny else 1)
    try:
        command = [str(part) for part in step.command(settings)]
    except Skip as reason:
        return Result(step.name, "skipped", 0.0, str(reason))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            why = f"status {status}" if status else ""
        except subprocess.TimeoutExpired:
            why = f"no end within {limit:g} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, or what it left behind
        process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").strip())
    seconds = time.monotonic() - start
    if why:
        lines = "\n".join(texts).strip().splitlines()
        return Result(step.name, "failed", seconds, why, "\n".join(lines[-TAIL:]))
    if step.figures:
        return Result(step.name, "passed", seconds, "", texts[0])
    return Result(step.name, "passed", seconds, texts[0].rpartition("\n")[2])


def run_all(steps: list[Step], settings: Settings, out: Path) -> list[Result]:
    """All steps in their order; none after a `card` that fails. The file is written after each."""
    results: list[Result] = []
    for step in steps:
        if results and results[0].name == "card" and results[0].verdict == "failed":
            results.append(Result(step.name, "skipped", 0.0, "the device cannot compute"))
        else:
            results.append(run(step, settings))
        last = results[-1]
        print(f"{last.name:10} {last.verdict:7} {last.seconds:6.1f} s  {last.why}", flush=True)
        out.write_text(page(settings, results))
    return results


def page(settings: Settings, results: list[Result]) -> str:
    """The Markdown file."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    facts = {"date": now, "commit": commit(), "device": settings.device}
    for result in results:
        if result.name == "card" and result.verdict == "passed":
            facts |= json.loads(result.why)
    lines = ["# Device check", ""]
    if settings.tiny:
        lines += ["A dry run on the CPU: sizes are tiny, and figures mean nothing.", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())]
    lines += ["", "| step | result | s | |", "| --- | --- | --- | --- |"]
    for r in results:
        why = "" if r.name == "card" and r.verdict == "passed" else r.why.replace("|", "\\|")
        lines.append(f"| {r.name} | {r.verdict} | {r.seconds:.1f} | {why} |")
    for r in results:
        if r.text:
            text = r.text if r.verdict == "passed" else f"```text\n{r.text}\n```"
            lines += ["", f"## {r.name}{'' if r.verdict == 'passed' else ', failed'}", "", text]
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Of the tree, with "and changes" if files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty= and changes"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("device.md"), help="file to write")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP",
        help=f"these steps alone; of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--model", type=Path, help="folder of a model to measure")
    parser.add_argument("--peer-python", type=Path, help="of an environment with the peers")
    parser.add_argument("--official", type=Path, help="checkout of SRI-CSL/BayesAdapt")
    args = parser.parse_args(arguments)
    peer = args.peer_python
    if peer is None and all(map(importlib.util.find_spec, ("transformers", "peft"))):
        peer = Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(args.device, Path(folder), args.model, peer, args.official)
        results = run_all([step for step in STEPS if step.name in args.only], settings, args.out)
    return int(any(result.verdict == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
