"""A device computes as the CPU does. On a machine with a GPU:

    pytest tests/fast/test_ops.py tests/test_device.py --device cuda

Elsewhere one test runs the others on a device that is not there (pretend.py): it finds tensors that
are left on the CPU.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from scalabl_ref.evaluation.generate import generate
from scalabl_ref.evaluation.predict import predict
from scalabl_ref.fast.quantize import KINDS, quantize_model
from scalabl_ref.support.tensors import save_tensors
from scalabl_ref.training.trainer import TrainConfig, Trainer
from scalabl_ref.verify.checks import EPS, NETWORK, SAMPLING, logits_and_gradients, model_calls
from scalabl_ref.verify.conformance import check

from . import models
from .conftest import ROOT
from .own_port import port
from .tolerances import logits_bound

CPU = torch.device("cpu")
STEPS, RATE = 6, 1e-2
on_device = pytest.mark.skipif(models.DEVICE == "cpu", reason="needs --device")


def device() -> torch.device:
    return torch.device(models.DEVICE)


@pytest.mark.slow
@pytest.mark.skipif(models.DEVICE != "cpu", reason="a device is given")
def test_on_a_device_that_is_not_there():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--device", "pretend", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 deselected" in done.stdout, done.stdout[-4000:]


@on_device
def test_a_tensor_left_on_the_cpu_is_an_error():
    with pytest.raises(RuntimeError, match="on the CPU|same device"):
        torch.ones(2, device=device()) + torch.ones(2)


@on_device
def test_the_kit_passes(tmp_path):
    kit = ROOT / "tests" / "vectors"
    save_tensors(tmp_path / "out.safetensors", port(kit, torch.float32).items())
    grades, left_out = check(kit, tmp_path / "out.safetensors")
    assert [g for g in grades if not g.passed] == [] and left_out == []


@on_device
@pytest.mark.parametrize("sampling", SAMPLING if models.DEVICE == "cuda" else SAMPLING[-1:])
def test_logits_and_gradients(sampling):
    for call, there in zip(model_calls(CPU), model_calls(device()), strict=True):
        expected = logits_and_gradients(CPU, sampling, call)
        got = logits_and_gradients(device(), sampling, there)
        for ours, theirs in zip(got, expected, strict=True):
            bound = 4 * NETWORK * EPS * theirs.abs().max()
            assert ((ours.cpu() - theirs).abs() <= bound).all()


def trained(where: torch.device, **config) -> tuple[list[dict[str, float]], float]:
    """The curve, and how far that of another order of sums may be off."""
    settings = {"steps": STEPS, "batch": 4, "lr": RATE, **config}
    model = models.tiny_model(wake=False).to(where)
    made = Trainer(model, models.tiny_data(), TrainConfig(**settings))
    return models.steps_and_bound(made, STEPS, RATE)


@on_device
@pytest.mark.parametrize(
    "config", [{}, {"recompute": True}, {"offload_activations": True}], ids=str
)
def test_a_curve(config):
    (ours, _), (theirs, bound) = trained(device(), **config), trained(CPU)
    for got, expected in zip(ours, theirs, strict=True):
        assert abs(got["loss"] - expected["loss"]) <= bound


@on_device
@pytest.mark.parametrize("base", ["", *KINDS])
def test_predictions(base):
    """Probabilities move by no more than the logits do."""
    probs, sizes = [], []
    for where in (CPU, device()):
        model = models.tiny_model()
        if base:
            quantize_model(model, base)
        batch = models.tiny_batch().to(where)
        probs.append(predict(model.to(where), batch, samples=3).probs.cpu())
        with torch.no_grad():
            sizes.append(float(model(batch.tokens, lengths=batch.lengths).abs().max()))
    assert (probs[0] - probs[1]).abs().max() <= logits_bound(models.TINY, max(sizes))


@on_device
def test_a_text():
    texts = []
    for where in (CPU, device()):
        model = models.tiny_model(trim=False).to(where)
        texts.append([token.id for token in generate(model, [1, 2, 3], 8, samples=3)])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
