"""The checks of model, training, prediction and scores: each passes, and notices faults."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from scalabl_ref.app import cli
from scalabl_ref.core.objective import class_logits
from scalabl_ref.evaluation import metrics
from scalabl_ref.model.config import RopeConfig
from scalabl_ref.model.inputs import KVCache
from scalabl_ref.model.llama import RMSNorm
from scalabl_ref.training.schedule import kl_weight, warmup_linear
from scalabl_ref.verify.all_checks import run
from scalabl_ref.verify.level_checks import LEVEL_CHECKS, cases_of

from ..patching import replace

CHECKS = {check.name: check for check in LEVEL_CHECKS}
for level in ("llama", "training step", "prediction", "schedules", "metrics"):
    cases_of(level)  # kept from now on: computed without a fault
frequencies, rmsnorm, cached, ece, auroc = (
    RopeConfig.inverse_frequencies, RMSNorm.forward, KVCache.append, metrics.ece, metrics.auroc,
)  # fmt: skip


def reversed_values(self, layer, k, v):
    k, v = cached(self, layer, k, v)
    return k, v.flip(2)


def by_place(model, batch, noise=None, **given):
    ids = torch.arange(len(batch.ids), device=batch.ids.device)
    return class_logits(model, dataclasses.replace(batch, ids=ids), noise, **given)


def of_the_padding(model, batch, noise=None, **given):
    whole = torch.full_like(batch.lengths, batch.tokens.shape[1])
    return class_logits(model, dataclasses.replace(batch, lengths=whole), noise, **given)


# Fault: what is replaced, by what, and the check that must notice.
FAULTS = {
    "RoPE: a thousandth of a percent": (
        "model.config:RopeConfig.inverse_frequencies",
        lambda self, *a: frequencies(self, *a) * (1 + 1e-5), "RoPE"),
    "RoPE: turned backwards": (
        "model.config:RopeConfig.inverse_frequencies",
        lambda self, *a: -frequencies(self, *a), "attention"),
    "RMSNorm: weight + 1": (
        "model.llama:RMSNorm.forward", lambda self, x: rmsnorm(self, x) * (1 + 1 / self.weight),
        "model"),
    "cache: values in the opposite order": (
        "model.inputs:KVCache.append", reversed_values, "cache"),
    "draws by place": ("training.trainer:class_logits", by_place, "accumulation"),
    "last token of the padding": (
        "training.trainer:class_logits", of_the_padding, "training step"),
    "prediction of the padding": ("core.predictive:class_logits", of_the_padding, "prediction"),
    "warm-up rounded": (
        "verify.level_checks:warmup_linear",
        lambda step, steps, warmup: warmup_linear(step, steps, round(warmup * steps) / steps),
        "schedules"),
    "weight of the KL from step 0": (
        "verify.level_checks:kl_weight",
        lambda step, period: kl_weight(step + 1, period), "schedules"),
    "one bin too few": (
        "evaluation.metrics:ece", lambda p, y, bins: ece(p, y, bins - 1), "scores"),
    "ties won": (
        "evaluation.metrics:auroc",
        lambda s, positive: auroc(s + 1e-9 * positive, positive), "scores"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name, monkeypatch):
    target, value, check = FAULTS[name]
    replace(monkeypatch, target, value)
    result = run(CHECKS[check], None, torch.device("cpu"))
    assert result.worst > 1 and "got" in result.note, result  # no exception


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_has_a_fault_and_passes_without(name):
    assert name in {check for *_, check in FAULTS.values()}
    result = run(CHECKS[name], None, torch.device("cpu"))
    assert result.passed and result.cases > 1, result


def test_the_last_line_says_what_is_not_covered(capsys):
    assert cli.main(["verify", "--against", "scalabl_ref:subspace_lora_linear"]) == 0
    assert "Not covered: all but the layer." in capsys.readouterr().out
