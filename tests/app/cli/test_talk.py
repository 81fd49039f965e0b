"""What `train` says to people: before the first step, on the way, and at its end."""

from __future__ import annotations

import argparse
import json
import math
import sys
from fractions import Fraction
from math import comb
from types import ModuleType

import pytest

from scalabl_ref import InputError
from scalabl_ref.app.cli import loggers, talk
from scalabl_ref.data.batches import Encoded
from scalabl_ref.training.watch import Watch

from ...models import tiny_data, trainer
from ..commands import TRAIN, facts, ok, refused, run

ARGS = argparse.Namespace(process=0, json=False)


class Bar:
    """Remembers what a progress bar is told."""

    def __init__(self) -> None:
        self.n, self.shown, self.said = 0, {}, []

    def set_postfix(self, values, refresh=True):
        self.shown = values

    def update(self, count=1):
        self.n += count

    def write(self, text, file=None):
        self.said.append(text)


def test_a_run_is_told_from_its_data_to_the_next_command(work, capsys):
    code, out, err = run(f"{TRAIN} --holdout 0.25 --batch 6 --lr 0.01 --keep best", capsys)
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert lines[0].startswith("18 rows (and 6 held out), 3 labels, ")
    assert lines[0].endswith("tokens at most; the prompt as the model sees it (row 0):")
    row = json.loads((work / "train.jsonl").read_text().splitlines()[0])
    choices = [f"  | {letter}. {text}" for letter, text in zip("ABC", row["choices"], strict=True)]
    assert lines[1:6] == [f"  | {row['prompt']}", *choices, "  | Answer:"]
    assert lines[6] == f"its answer: {'ABC'[row['label']]!r}"
    assert lines[7] == "answer tokens: 'A' 32, 'B' 33, 'C' 34"
    assert "defaults: --beta 1 (the loss is the evidence lower bound)" in lines
    assert any(line.startswith(("learnt: ", "not learnt: ")) and "6 held-out rows" in line
               for line in lines)  # fmt: skip
    kept = facts(work / "run")["kept"]
    best = f"with the lowest held-out NLL ({kept['heldout_nll']:.4f})"
    assert f"kept: the adapters after step {kept['step']} of 6, {best}" in lines
    assert "trained 6 steps on 18 examples: run" in lines
    assert "written: run/adapter.safetensors, run.json, train.jsonl (each step)" in lines
    assert lines[-1] == "next: scalabl evaluate --run run --data TEST_FILE --temperature"


def test_the_longest_of_the_rows_is_counted_and_a_cut_prompt_is_shown_cut(work, capsys):
    long = {"prompt": "x" * 90, "choices": ["a", "b"], "label": 1}
    rows = (long, {**long, "label": 0})
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = run(f"{TRAIN} --max-length 50", capsys)
    assert out.startswith("2 rows, 2 labels, 50 tokens at most; ")
    first = out.splitlines()[1]
    assert first == f"  | ... {'x' * (50 - len(chr(10) + 'Answer:'))}"
    assert "its answer: 'b'" in out or "its answer: 'B'" in out
    assert "\nprompts longer than 50 tokens: 2 cut, 0 dropped\n" in out


def test_the_verdict_is_a_sentence():
    found = {"learnt": True, "rows": 40, "right": 30, "chance": 0.5, "p": 0.0009, "nll": 0.51234,
             "guessing": math.log(3), "held_out": True}  # fmt: skip
    assert talk._sentence(found) == (
        "learnt: 75.0 % of the 40 held-out rows are answered right, by chance 50.0 % "
        "(p < 0.001); NLL 0.512, guessing 1.099"
    )
    assert "(p = 0.002); NLL" in talk._sentence({**found, "p": 0.002})
    assert talk._sentence({**found, "learnt": False, "p": 0.0342, "held_out": False}) == (
        "not learnt: 75.0 % of the 40 training rows of the last epoch are answered right, by "
        "chance 50.0 % (p = 0.034); NLL 0.512, guessing 1.099; --holdout 0.2 would measure new rows"
    )


def test_the_verdict_is_in_the_json_too(work, capsys):
    told = ok(f"{TRAIN} --lr 0", capsys)
    found, log = told["verdict"], (work / "run" / "train.jsonl").read_text().splitlines()
    assert (found["learnt"], found["rows"], found["held_out"]) == (False, 24, False)
    assert found["guessing"] == math.log(3) and found["chance"] == 1 / 3
    assert told["last"] == json.loads(log[-1]) and told["run"] == "run"
    records = [json.loads(line) for line in log]
    assert found["right"] == round(sum(4 * each["accuracy"] for each in records))
    assert found["nll"] == pytest.approx(sum(each["nll"] for each in records) / 6)
    _, out, _ = run(f"{TRAIN} --lr 0".replace("--out run", "--out next"), capsys)
    assert f"\n{talk._sentence(found)}\n" in out
    assert "\ntry other settings: more --steps, another --lr or --prompt-template\nnext: " in out


def test_long_prompts_are_shown_in_part():
    text = "\n".join(f"line {i}" for i in range(40)) + "\n" + "y" * 300
    shown = talk._shown(text)
    assert len(shown) == talk.LINES + 1 and shown[talk.LINES // 2] == "... 29 more lines ..."
    assert max(map(len, shown)) == talk.COLUMNS and shown[-1].endswith("y ...")


@pytest.mark.parametrize(("epochs", "steps"), [("2", 12), ("0.5", 3), ("0.01", 1), ("1.5", 9)])
def test_epochs_are_passes_over_the_rows_that_are_left(work, capsys, epochs, steps):
    train = TRAIN.replace("--steps 6 ", "") + f" --holdout 0.1 --epochs {epochs}"
    assert ok(train, capsys)["steps"] == steps  # 22 rows in batches of 4
    assert facts(work / "run")["train"]["steps"] == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 6 --epochs 2", "--epochs and --steps: give one of them"),
        ("--epochs 0", "--epochs must be above 0 and at most 1e6, not 0.0"),
        ("--epochs nan", "--epochs must be above 0"),
        ("--steps 6 --keep best", "--keep best needs held-out questions"),
        ("--steps 6 --keep best --holdout 0.5 --method mle --swag 0.5", "--keep best and --swag"),
    ],
)
def test_options_that_exclude_each_other(work, capsys, options, message):
    assert message in refused(f"{TRAIN.replace('--steps 6 ', '')} {options}", capsys)
    assert not (work / "run").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "--steps 30 (6 epochs; {every}), --lr 0.001 ({every}), --beta 1 ({bound})"),
        ({"epochs": 6}, "--lr 0.001 ({every}), --beta 1 ({bound})"),
        ({"steps": 30, "beta": 1.0}, "--lr 0.001 ({every})"),
        ({"steps": 30, "lr": 0.001, "beta": 1.0}, None),
    ],
)
def test_settings_that_are_not_given_are_told_with_their_reasons(capsys, given, told):
    missing = dict.fromkeys(("steps", "epochs", "lr", "beta"))
    args = argparse.Namespace(**{**vars(ARGS), **missing, **given})
    talk.say_defaults(args, trainer(tiny_data(20), steps=30, batch=4, lr=1e-3))
    reasons = {
        "every": "the same for 20 rows as for others",
        "bound": "the loss is the evidence lower bound",
    }
    assert capsys.readouterr().out == (f"defaults: {told.format(**reasons)}\n" if told else "")


def record(step: int, nll: float, **more: float) -> dict[str, float]:
    return {"step": step, "nll": nll, "accuracy": 0.25, "kl": 40.0, "sigma": 0.05, **more}


def test_the_bar_shows_the_terms_of_the_loss():
    bar = Bar()
    told = talk.Talk(ARGS, trainer(tiny_data(20), beta=2.0, steps=100), bar)
    for step in range(30):
        told.on_step(record(step, 1.0 + (step < 10)))
    assert bar.shown == {
        "nll": "1.000", "acc": "0.25", "KL/N": "2 x 2", "sigma": "0.05"
    }  # fmt: skip
    other = Bar()
    talk.Talk(ARGS, trainer(tiny_data(20), objective="official"), other).on_step(record(0, 1.0))
    assert other.shown["KL/N"] == "2", "its weight is not beta"
    talk.Talk(ARGS, trainer(), other).on_step({**record(0, 1.0), "kl": 0.0, "sigma": 0.0})
    assert other.shown == {"nll": "1.000", "acc": "0.25"}
    told.on_step(record(30, 1.2, heldout_nll=1.5))
    told.on_step(record(31, 1.0))
    assert bar.shown["held-out"] == "1.500" and bar.shown["nll"] == "1.010" and bar.n == 32


@pytest.mark.parametrize(("share", "warns"), [(1.0, True), (0.985, True), (0.9, False)])
def test_an_nll_of_guessing_is_warned_of_once(share, warns):
    bar = Bar()
    told = talk.Talk(ARGS, trainer(steps=200), bar)
    for step in range(200):
        told.on_step(record(step, share * math.log(3)))
    assert len(bar.said) == warns
    if warns:
        assert bar.said[0].startswith("warning: after 50 of 200 steps the NLL is 1.")
        assert "no better than guessing (ln 3 = 1.10)" in bar.said[0]


@pytest.mark.parametrize(("right", "rows", "chance"), [(0, 9, 0.3), (9, 9, 0.3), (7, 20, 0.25),
                                                       (60, 100, 0.5)])  # fmt: skip
def test_the_tail_of_the_binomial_is_exact(right, rows, chance):
    p = Fraction(chance)
    exact = sum(comb(rows, k) * p**k * (1 - p) ** (rows - k) for k in range(right, rows + 1))
    assert talk.at_least(right, rows, chance) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(("accuracy", "learnt"), [(0.5, False), (0.9, True)])
def test_the_verdict_is_against_the_most_frequent_label(accuracy, learnt):
    """Half of 40 rows right is far above 1 / 3, but no better than always the same label."""
    labels = [0] * 20 + [1] * 10 + [2] * 10
    data = tiny_data(40)
    made = trainer(Encoded(data.tokens, labels, data.classes), steps=10)
    records = [{**record(step, 1.0), "accuracy": accuracy} for step in range(10)]
    found = talk.verdict(made, None, records)
    assert (found["learnt"], found["rows"], found["chance"]) == (learnt, 40, 0.5)
    assert found["right"] == round(40 * accuracy) and not found["held_out"]
    watch = Watch(tiny_data(30), 5)
    records[4] |= {"heldout_nll": 0.5, "heldout_accuracy": 1.0}
    records[9] |= {"heldout_nll": 0.9, "heldout_accuracy": accuracy}
    found = talk.verdict(made, watch, records)
    assert (found["learnt"], found["rows"], found["nll"]) == (learnt, 30, 0.9)
    watch.keep, watch.step = True, 5
    assert talk.verdict(made, watch, records)["right"] == 30


# --- loggers --------------------------------------------------------------------------------------


def fake_modules(monkeypatch) -> list:
    """Stand-ins of the three packages, and the list of what they are told."""
    told: list = []

    class Logger:
        """Ended by the end of its block, as those of all three packages are."""

        def __init__(self, package, /, **start):
            self.name = package
            told.append((f"{package} starts", start))

        def __enter__(self):
            return self

        def __exit__(self, kind, *error):
            told.append((f"{self.name} ends", kind))

        def log(self, values, step):
            told.append((self.name, values, step))

        def add_text(self, name, text):
            told.append((name, text))

        def add_scalar(self, name, value, step):
            self.log({name: value}, step)

    parts = {
        "torch.utils.tensorboard": {
            "SummaryWriter": lambda folder, **start: Logger("tensorboard", folder=folder, **start)
        },
        "wandb": {"init": lambda **start: Logger("wandb", **start)},
        "mlflow": {
            "start_run": lambda **start: Logger("mlflow", **start),
            "log_params": lambda params: told.append(("mlflow params", params)),
            "log_metrics": lambda values, step: told.append(("mlflow", values, step)),
        },
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_loggers_get_each_record(work, capsys, monkeypatch):
    """And the settings; those that are ours have the run's name."""
    told = fake_modules(monkeypatch)
    ok(f"{TRAIN} --log tensorboard wandb mlflow", capsys)
    records = [json.loads(line) for line in (work / "run" / "train.jsonl").read_text().splitlines()]
    expected = [({k: v for k, v in r.items() if k != "step"}, i + 1) for i, r in enumerate(records)]
    for name in ("wandb", "mlflow"):
        assert [entry[1:] for entry in told if entry[0] == name] == expected
    sent = [entry[1:] for entry in told if entry[0] == "tensorboard"]
    assert sent == [({k: v}, step) for values, step in expected for k, v in values.items()]
    started = {entry[0].split()[0]: entry[1] for entry in told if entry[0].endswith(" starts")}
    settings = started["wandb"].pop("config")
    assert (settings["rank"], settings["steps"], settings["method"]) == (2, 6, "scalabl")
    assert started == {
        "tensorboard": {"folder": "run/tensorboard", "purge_step": None},
        "wandb": {"project": "scalabl", "name": "run", "dir": "run"},
        "mlflow": {"run_name": "run"},
    }
    texts = dict(entry for entry in told if entry[0] in ("settings", "mlflow params"))
    assert texts["mlflow params"] == settings and "    rank: 2\n" in texts["settings"]
    assert told[-3:] == [(f"{name} ends", None) for name in ("mlflow", "wandb", "tensorboard")]


def test_a_logger_goes_on_behind_the_steps_that_are_done(work, capsys, monkeypatch):
    told = fake_modules(monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    names = ["tensorboard", "wandb"]
    with pytest.raises(MemoryError), loggers.logging(names, work, {}, 7) as hook:
        hook({"step": 7, "nll": 1.0, "loss": math.inf})
        raise MemoryError
    start = {"project": "mine", "name": work.name, "dir": str(work), "config": {}}
    assert told == [
        ("tensorboard starts", {"folder": f"{work}/tensorboard", "purge_step": 8}),
        ("settings", ""),
        ("wandb starts", start),
        ("tensorboard", {"nll": 1.0}, 8),
        ("wandb", {"nll": 1.0}, 8),
        ("wandb ends", MemoryError),
        ("tensorboard ends", MemoryError),
    ]


def test_a_training_that_goes_on_tells_its_logger(work, capsys, monkeypatch):
    """And does not tell its data again once it has no step to do."""
    told = fake_modules(monkeypatch)
    real = talk.Talk.on_step

    def stopped(self, record):
        if record["step"] == 5:
            raise MemoryError
        real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(talk.Talk, "on_step", stopped)
        run(f"{TRAIN} --checkpoint-every 2 --log tensorboard", capsys)
    assert told[-1] == ("tensorboard ends", MemoryError)
    told.clear()
    code, out, _ = run(f"{TRAIN} --checkpoint-every 2 --resume --log tensorboard", capsys)
    assert code == 0 and told[0][1]["purge_step"] == 5 and "24 rows" in out
    (work / "run/run.json").unlink()
    code, out, _ = run(f"{TRAIN} --checkpoint-every 2 --resume", capsys)
    assert code == 0 and "24 rows" not in out and "next: scalabl evaluate" in out


def test_a_logger_that_cannot_start_is_one_line(work, capsys, monkeypatch):
    def init(**settings):
        raise OSError("no server\nwith details")

    fake_modules(monkeypatch)
    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(InputError, match="^--log wandb cannot start: no server$"):
        loggers.logging(["wandb"], work, {}, 0).__enter__()


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_a_logger_that_is_not_installed_is_named_with_its_extra(work, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name[0] == "t" else name, None)
    said = refused(f"{TRAIN} --log {name}", capsys)
    assert said == f"error: --log {name} needs a package: pip install -e '.[{name}]' in the clone\n"
    assert not (work / "run").exists()
