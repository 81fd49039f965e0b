"""The whole product on the plain bodies of core/ and model/, against the fast ones, to rounding."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from scalabl_ref import Noise, adapters, fast, load_run, predict
from scalabl_ref.app import cli
from scalabl_ref.core.config import ADAPTERS, COVARIANCES
from scalabl_ref.core.layer import SAMPLING
from scalabl_ref.core.noise import FIRST_TRAINING_DRAW
from scalabl_ref.core.objective import class_logits, elbo
from scalabl_ref.core.predictive import plain_predict
from scalabl_ref.data import Encoded
from scalabl_ref.evaluation.generate import generate
from scalabl_ref.evaluation.predict import DESIGNS
from scalabl_ref.fast import native
from scalabl_ref.model.inputs import KVCache
from scalabl_ref.model.llama import Attention
from scalabl_ref.training.trainer import TrainConfig, Trainer

from ..conftest import ROOT
from ..models import CLASSES, TINY, questions_file, tiny_batch, tiny_folder, tiny_model
from ..tolerances import curve_bound, logits_bound, rounding

KINDS = [(method, covariance) for covariance, kinds in COVARIANCES.items() for method in kinds]
each_kind = pytest.mark.parametrize("kind", KINDS, ids="-".join)


def in_both(compute):
    """What `compute` returns with the fast bodies in place, and with the plain ones."""
    ours = compute()
    with fast.plain():
        return ours, compute()


def assert_close(ours, plain, bound):
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() <= bound


def awake(kind=("scalabl", "diagonal"), **config):
    """A tiny model of that kind whose draws differ visibly."""
    method, covariance = kind
    config = {"init_sigma": 1.0, "dropout": 0.3, **config}
    return tiny_model(method=method, covariance=covariance, **config)


# --- one call of the model ------------------------------------------------------------------------


LENGTHS = torch.tensor([6, 2, 4])
LEFT = torch.arange(6) >= 6 - LENGTHS[:, None]
CALLS = {
    "whole rows": {},
    "lengths": {"lengths": LENGTHS},
    "mask": {"mask": LEFT},
    "padded": {"lengths": LENGTHS, "padded": True},
    "last": {"last_only": True},
    "last by lengths": {"lengths": LENGTHS, "last_only": True},
    "last by mask": {"mask": LEFT, "last_only": True},
    "draws": {"draws": 3},
    "draws by lengths": {"lengths": LENGTHS, "draws": 3},
    "draws by mask": {"mask": LEFT, "draws": 3},
    "last of draws": {"lengths": LENGTHS, "draws": 3, "last_only": True},
    "last of draws by mask": {"mask": LEFT, "draws": 3, "last_only": True},
}
TARGETS = (("q_proj", "v_proj", "lm_head"), ("down_proj", "k_proj"), ("lm_head",))


def some_tokens(rows=3, length=6):
    return torch.randint(1, TINY.vocab_size, (rows, length), generator=torch.manual_seed(0))


def real(call, logits):
    """The logits at real tokens; those at padding have no meaning."""
    if call.get("last_only"):
        return logits
    mask = torch.arange(6) < LENGTHS[:, None] if "lengths" in call else call.get("mask")
    return logits if mask is None else logits[mask.repeat(call.get("draws", 1), 1)]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
@pytest.mark.parametrize("sampling", SAMPLING)
@torch.no_grad()
def test_logits_of_every_call_agree(sampling, targets, call):
    for noise in (None, Noise(1, 5)):
        ours, plain = in_both(
            lambda noise=noise: awake(sampling=sampling, targets=targets, trim=False)(
                some_tokens(), noise=noise, groups=torch.tensor([7, 2, 9]), **call
            )
        )
        ours, plain = real(call, ours), real(call, plain)
        assert_close(ours, plain, logits_bound(TINY, plain.abs().max().item()))


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("sampling", SAMPLING)
@torch.no_grad()
def test_logits_through_a_cache_agree(sampling, draws):
    """Tokens come in pieces, after left padding: a mask, a cache and positions at once."""

    def pieces():
        model, cache = awake(sampling=sampling, trim=False), KVCache(TINY.num_hidden_layers)
        parts, done = [], 0
        for tokens in some_tokens().split([3, 1, 2], dim=1):
            done += tokens.shape[1]
            mask = LEFT[:, :done] | (torch.arange(done) >= 2)  # no row of padding alone
            options = {"mask": mask, "draws": draws, "cache": cache}
            logits = model(tokens, noise=Noise(1, 5), **options)
            parts.append(logits[mask[:, -tokens.shape[1] :].repeat(draws, 1)])
        return torch.cat(parts)

    ours, plain = in_both(pieces)
    assert_close(ours, plain, logits_bound(TINY, plain.abs().max().item()))


@each_kind
@torch.no_grad()
def test_logits_of_every_method_agree(kind):
    ours, plain = in_both(lambda: class_logits(awake(kind), tiny_batch(), Noise(1, 5), draws=2))
    assert_close(ours, plain, logits_bound(TINY, plain.abs().max().item()))


def test_plain_bodies_need_no_native_core(monkeypatch):
    """Neither do they call a fast body: none of them is in the model or in the adapters."""

    def refuse():
        raise AssertionError("the native core was asked for")

    monkeypatch.setattr(native, "core", refuse)
    with fast.plain():
        model = awake()
        elbo(model, tiny_batch(), Noise(0, 3), 1.0, 10).loss.backward()
        assert {type(block.attn) for block in model.layers} == {Attention}
    with pytest.raises(AssertionError, match="was asked for"):
        elbo(awake(), tiny_batch(), Noise(0, 3), 1.0, 10)


def rooms(bodies):
    """The folders that the bodies are from."""
    return [getattr(body, "__func__", body).__module__.split(".")[1] for body in bodies]


def test_the_bodies_are_back_after_the_block():
    """After an error too."""
    before = [vars(owner)[name] for owner, name, _ in fast.HOOKS]
    assert rooms(before) == ["fast"] * len(before)
    with contextlib.suppress(ZeroDivisionError), fast.plain():
        assert set(rooms(vars(owner)[name] for owner, name, _ in fast.HOOKS)) == {"core", "model"}
        raise ZeroDivisionError
    assert [vars(owner)[name] for owner, name, _ in fast.HOOKS] == before


# --- training, prediction, generation -------------------------------------------------------------


def one_step(kind, **config):
    """The record of a step of training, and the gradient of every trained parameter by name."""
    rows = [[i + 1, 2, 3, *range(i)] for i in range(10)]
    data = Encoded(rows, [i % len(CLASSES) for i in range(10)], list(CLASSES))
    trainer = Trainer(awake(kind), data, TrainConfig(steps=3, batch=4, warmup=0.0, **config))
    record = trainer.step()
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return record, {name: p.grad for name, p in parameters.items() if p.grad is not None}


STEPS = [pytest.param(kind, {}, id="-".join(kind)) for kind in KINDS if ADAPTERS[kind[0]].trained]
STEPS += [
    pytest.param(("scalabl", "diagonal"), options, id=name)
    for name, options in {
        "official": {"objective": "official", "kl": "official"},
        "accumulated": {"micro_batch": 3},
        "recomputed": {"recompute": True},
    }.items()
]


@pytest.mark.parametrize(("kind", "options"), STEPS)
def test_a_training_step_agrees(kind, options):
    (ours, gradients), (plain, expected) = in_both(lambda: one_step(kind, **options))
    for name in ("loss", "nll", "kl"):
        assert abs(ours[name] - plain[name]) <= rounding(torch.float32, 512) * abs(plain[name])
    assert gradients.keys() == expected.keys() and len(expected) >= 2
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        size = gradient.abs().max().clamp(min=1e-3).item()
        assert_close(gradients[name], gradient, rounding(torch.float32, 512) * size)


@pytest.mark.parametrize("design", DESIGNS)
def test_predictions_agree(design):
    """Each body by `predict`; the plain definition too, which knows independent draws alone."""
    batch = tiny_batch()
    ours, plain = in_both(lambda: predict(awake(), batch, 6, seed=3, design=design))
    bound = logits_bound(TINY, class_logits(awake(), batch, None).abs().max().item())
    assert_close(ours.probs, plain.probs, bound)  # a probability moves less than its logit
    assert ours.mutual_information.min() > 1e-3
    if design == "independent":
        with fast.plain():
            assert_close(ours.probs, plain_predict(awake(), batch, 6, seed=3).probs, bound)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_generated_text_agrees(sampling):
    ours, plain = in_both(
        lambda: list(generate(awake(sampling=sampling, trim=False), [3, 1, 4], 8, samples=3))
    )
    assert [token.id for token in ours] == [token.id for token in plain] and len(ours) == 8
    size = awake(trim=False)(torch.tensor([[3, 1, 4]])).abs().max().item()
    for a, b in zip(ours, plain, strict=True):
        assert abs(a.probability - b.probability) <= logits_bound(TINY, size)


# --- the commands ---------------------------------------------------------------------------------


# Wide and fast, so that draws differ by much more than rounding.
TRAIN = "train --model model --data train.jsonl --steps 6 --batch 4 --rank 2 --lr 0.05 \
--init-sigma 2 --out"


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    questions_file(tmp_path / "train.jsonl")
    questions_file(tmp_path / "test.jsonl", rows=9)
    return tmp_path


def run(line, capsys):
    """The JSON result of a command with the bodies that are in place."""
    assert cli.main([*line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def run_apart(*arguments):
    """What a process with SCALABL_PLAIN=1 prints."""
    environment = {**os.environ, "SCALABL_PLAIN": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.check_output([sys.executable, *arguments], env=environment, text=True)


def answers_bound(folder):
    """How far a probability may be off: less than a logit of the run's model."""
    model, _ = load_run(folder)
    with torch.no_grad():
        size = model(torch.arange(32, 128)[None]).abs().max().item()  # the printable bytes
    return logits_bound(model.config, size)


def assert_same_answers(folders, metrics, bound):
    """Probabilities and scores that are smooth in them to rounding; the answers themselves."""
    ours, plain = (
        [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for folder in folders
    )
    for a, b in zip(ours, plain, strict=True):
        assert a["prediction"] == b["prediction"]
        assert_close(torch.tensor(a["probs"]), torch.tensor(b["probs"]), bound)
        assert a["mutual_information"] > 10 * bound
    assert metrics[0]["acc"] == metrics[1]["acc"]
    assert abs(metrics[0]["nll"] - metrics[1]["nll"]) <= 2 * bound
    assert abs(metrics[0]["brier"] - metrics[1]["brier"]) <= 4 * bound  # of probabilities below 1


def curve(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_the_environment_variable_leaves_the_plain_bodies(work, capsys):
    """Training from the command line, and evaluating the same run: as with the fast bodies."""
    program = (
        "from scalabl_ref import fast\n"
        "bodies = [vars(owner)[name] for owner, name, _ in fast.HOOKS]\n"
        "print(*(getattr(body, '__func__', body).__module__ for body in bodies))"
    )
    modules = run_apart("-c", program).split()
    assert len(modules) == len(fast.HOOKS)
    assert {module.split(".")[1] for module in modules} == {"core", "model"}

    run(f"{TRAIN} ours", capsys)
    run_apart("-m", "scalabl_ref", *f"{TRAIN} plain".split())
    model, _ = load_run(work / "ours")
    parameters = [p for adapter in adapters(model).values() for p in adapter.parameters()]
    elbo(model, tiny_batch(), Noise(0, FIRST_TRAINING_DRAW), 1.0, 24).loss.backward()
    largest = max(p.grad.abs().max().item() for p in parameters)
    ours, plain = curve(work / "ours"), curve(work / "plain")
    count, loss = sum(p.numel() for p in parameters), max(record["loss"] for record in ours)
    bound = curve_bound(6, 4 * 0.05, count, largest, loss, terms=512)
    for a, b in zip(ours, plain, strict=True):
        assert abs(a["loss"] - b["loss"]) <= bound and abs(a["nll"] - b["nll"]) <= bound

    line = "evaluate --run ours --data test.jsonl --samples 4 --json --out"
    metrics = [run(f"{line} quick", capsys)]
    metrics.append(json.loads(run_apart("-m", "scalabl_ref", *f"{line} slow".split())))
    assert_same_answers((work / "quick", work / "slow"), metrics, answers_bound(work / "ours"))


def test_commands_agree_in_one_process(work, capsys):
    """Evaluation and an answer on the same run, with the bodies changed under the commands."""
    run(f"{TRAIN} run", capsys)
    names, bound = iter(("quick", "slow")), answers_bound(work / "run")
    line = "evaluate --run run --data test.jsonl --samples 4 --out"
    metrics = in_both(lambda: run(f"{line} {next(names)}", capsys))
    assert_same_answers((work / "quick", work / "slow"), metrics, bound)
    ask = "predict --run run --prompt hello --choices one two three --samples 4"
    ours, plain = (torch.tensor(a["probs"]) for a in in_both(lambda: run(ask, capsys)))
    assert_close(ours, plain, bound)
