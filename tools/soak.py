"""Work for long, be interrupted, and compare: is everything the same, to the byte, in flat memory?

    python tools/soak.py --minutes 60 --model tiny

One run is trained, evaluated and asked without interruptions. Then each round does the same in
child processes that it ends at random times by SIGINT, SIGTERM or SIGKILL and starts again until
they are done: `train --resume`, `evaluate`, and `predict --data`. The adapters, the metrics and the
answers must equal the first ones. Beside the rounds one process, which has loaded the run,
predicts again and again. Its resident memory must not grow by more than 2 % from the first quarter
of its records, after a warm-up, to the last. It loads the run once, because safetensors 0.8.0 keeps
about 64 bytes of each tensor that it has read, for ever: docs/verification.md.

OUT/state.json has the seed and the figures so far; the folders of a failed round stay beside it.
The exit code is 1 if anything differs, ends in an unexpected way, or grows.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scalabl_ref.app.demo import ASSETS, PLACES, sentence
from scalabl_ref.evaluation.classifier import load

# The exit codes of a process that a signal ended: while it works, and before it has handlers.
ENDED = {
    signal.SIGINT: (130, -signal.SIGINT),
    signal.SIGTERM: (143, -signal.SIGTERM),
    signal.SIGKILL: (-signal.SIGKILL,),
}
MOST = 6  # interruptions of one command; then it may finish
LATEST = 1.2  # when the last of them come, in units of the command's usual time
GROWTH = 0.02
WARM, FEWEST = 0.2, 20  # part of the memory records that is warm-up; how many are a measurement
TEXTS = 200


class Broken(Exception):
    """A command ended in an unexpected way, or its result is not that of the first run."""


@dataclass
class State:
    """What the soak has done; `save` writes it. seconds: a command's usual time."""

    seed: int
    model: str
    rounds: int = 0
    signals: dict[str, int] = field(default_factory=lambda: {s.name: 0 for s in ENDED})
    seconds: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)

    def save(self, out: Path) -> None:
        (out / "state.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def write_data(path: Path, rows: int, seed: int) -> None:
    """Sentences about four places, and their place as the label."""
    source = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for _ in range(rows):
            place = source.choice(list(PLACES))
            table.writerow([sentence(place, source), place])


class Soak:
    """The commands on one folder `out`, as often as asked."""

    def __init__(self, out: Path, model: Path, steps: int, state: State) -> None:
        self.out, self.model, self.steps, self.state = out, model, steps, state
        for name, rows in (("train", 48), ("test", TEXTS)):
            write_data(out / f"{name}.csv", rows, state.seed)

    def commands(self, folder: Path) -> list[tuple[str, list[Any], Path, Callable[[], bool]]]:
        """Name, words, result and whether it is done, of the commands of a round."""
        run, answers = folder / "run", folder / "answers.csv"
        data = ["--data", self.out / "test.csv"]
        train = ["--model", self.model, "--data", self.out / "train.csv", "--out", run, "--resume",
                 "--steps", self.steps, "--batch", 4, "--checkpoint-every", 3,
                 "--seed", self.state.seed]  # fmt: skip
        evaluate = ["--run", run, *data, "--limit", 40, "--out", folder / "scores"]
        return [
            ("train", train, run / "adapter.safetensors", (run / "run.json").exists),
            ("evaluate", evaluate, folder / "scores" / "metrics.json", lambda: False),
            ("predict", ["--run", run, *data, "--out", answers], answers, answers.exists),
        ]

    def start(self, folder: Path, name: str, words: list[Any]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "scalabl_ref", name, *map(str, words)]
        with open(folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def first(self) -> Path:
        """The folder of the run that nobody interrupts."""
        folder = self.out / "first"
        folder.mkdir()
        for name, words, _, _ in self.commands(folder):
            begun = time.monotonic()
            code = self.start(folder, name, words).wait()
            if code:
                raise Broken(f"{name}: exit code {code}: {last_line(folder / f'{name}.log')}")
            self.state.seconds[name] = time.monotonic() - begun
        return folder

    def round(self, number: int, first: Path) -> None:
        """One round. Raises Broken."""
        folder, rng = self.out / f"round{number}", random.Random(f"{self.state.seed}-{number}")
        folder.mkdir()
        for name, words, result, done in self.commands(folder):
            self.until_done(folder, name, words, done, rng)
            if result.read_bytes() != (first / result.relative_to(folder)).read_bytes():
                raise Broken(f"{result} differs from that of the first run")
        shutil.rmtree(folder)

    def until_done(
        self, folder: Path, name: str, words: list[Any], done: Callable[[], bool],
        rng: random.Random,
    ) -> None:  # fmt: skip
        """Run a command, interrupt it and run it again, until it is done."""
        left = rng.randint(1, MOST)
        while not done():
            process, signum = self.start(folder, name, words), None
            try:
                wait = rng.uniform(0, LATEST * self.state.seconds[name]) if left else None
                process.wait(wait)
            except subprocess.TimeoutExpired:
                signum = rng.choice(list(ENDED))
                process.send_signal(signum)
                self.state.signals[signum.name] += 1
                left -= 1
            code = process.wait()
            if code == 0:
                return
            if signum is None or code not in ENDED[signum]:
                why = f"after {signum.name}" if signum else "without a signal"
                said = last_line(folder / f"{name}.log")
                raise Broken(f"{folder}: {name} ended with {code} {why}: {said}")


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


# --- memory ---------------------------------------------------------------------------------------


def predict_for_ever(run: Path) -> None:
    """Load the run; then predict and write the resident bytes on a line, until the parent ends."""
    texts = [sentence(place, random.Random(0)) for place in PLACES]
    clf, parent = load(run, samples=4), os.getppid()
    while os.getppid() == parent:
        for _ in range(5):
            clf.predict(texts)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(pages * os.sysconf("SC_PAGESIZE"), flush=True)


def growth(sizes: list[int]) -> float | None:
    """From the first quarter after the warm-up to the last, as a fraction; None if too few."""
    if len(sizes) < FEWEST:
        return None
    kept = sizes[int(WARM * len(sizes)) :]
    quarter = len(kept) // 4
    return statistics.median(kept[-quarter:]) / statistics.median(kept[:quarter]) - 1


def judge_memory(state: State, record: Path) -> None:
    sizes = [int(line) for line in record.read_text().split("\n")[:-1]]
    grown = growth(sizes)
    state.memory = {"records": len(sizes), "bytes": sizes[-1:], "growth": grown}
    if grown is not None and grown > GROWTH:
        state.broken.append(f"resident memory grew by {grown:.1%}, see {record}")


# --- the command ----------------------------------------------------------------------------------


def soak(out: Path, model: Path, minutes: float, seed: int, steps: int) -> State:
    """Rounds until the time is over, at least one."""
    state = State(seed, str(model))
    work, end = Soak(out, model, steps, state), time.monotonic() + 60 * minutes
    signal.signal(signal.SIGINT, signal.default_int_handler)  # off in jobs behind a shell
    try:
        first = work.first()
    except Broken as error:
        state.broken.append(str(error))
        state.save(out)
        return state
    command = [sys.executable, __file__, "--predict-for-ever", str(first / "run")]
    with open(out / "memory", "wb") as record:
        beside = subprocess.Popen(command, stdout=record)
    try:
        while state.rounds == 0 or time.monotonic() < end:
            try:
                work.round(state.rounds, first)
            except Broken as error:
                state.broken.append(str(error))
            state.rounds += 1
            state.save(out)
            print(f"round {state.rounds}: {len(state.broken)} broken", file=sys.stderr, flush=True)
        if beside.poll() is not None:
            state.broken.append(f"the process that predicts ended with {beside.returncode}")
    finally:
        beside.kill()
        beside.wait()
    judge_memory(state, out / "memory")
    state.save(out)
    return state


def table(state: State, out: Path) -> str:
    memory, grown = state.memory, state.memory.get("growth")
    rows = {
        "seed": state.seed,
        "rounds": state.rounds,
        **{f"ended by {name}": count for name, count in state.signals.items()},
        "records of the process beside": memory.get("records", 0),
        "growth of resident memory": "too few to judge" if grown is None else f"{grown:+.2%}",
        "broken": len(state.broken),
        "state": out / "state.json",
    }
    lines = [f"{name:30} {value}" for name, value in rows.items()]
    return "\n".join([*lines, *state.broken])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--model", default="tiny", help="tiny, or a model folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of a training")
    parser.add_argument("--out", type=Path, help="a new folder (default: a temporary one)")
    parser.add_argument("--predict-for-ever", type=Path, metavar="RUN", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.predict_for_ever:
        predict_for_ever(args.predict_for_ever)
        return 0
    if args.out:
        args.out.mkdir(parents=True)
    out = (args.out or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    model = ASSETS if args.model == "tiny" else Path(args.model).resolve()
    state = soak(out, model, args.minutes, args.seed, args.steps)
    print(table(state, out))
    return 1 if state.broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
