"""The checks of the bodies that run: each passes on either body, and notices faults."""

from __future__ import annotations

import pytest
import torch

from scalabl_ref import fast
from scalabl_ref.core.adapter import SubspaceAdapter
from scalabl_ref.core.layer import subspace_lora_linear as plain_op
from scalabl_ref.core.noise import Noise
from scalabl_ref.core.predictive import predictive
from scalabl_ref.evaluation import metrics
from scalabl_ref.fast import blocks, native
from scalabl_ref.model.inputs import Inputs
from scalabl_ref.model.llama import Llama
from scalabl_ref.verify.all_checks import run
from scalabl_ref.verify.body_checks import BODY_CHECKS

from ..patching import replace

CHECKS = {check.name: check for check in BODY_CHECKS}
CPU = torch.device("cpu")
THREADS = torch.get_num_threads()
cos_sin, positions, curve = Llama.cos_sin, Inputs.positions, metrics.risk_coverage


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes(name):
    result = run(CHECKS[name], SubspaceAdapter.op, CPU)
    assert result.passed and result.cases, result


def truncated(x, weight, bias, *own):
    """16-bit results without their last bits instead of rounded ones."""
    y = plain_op(x.float(), weight.float(), bias, *(t.float() for t in own[:4]), *own[4:])
    return (y.view(torch.int32) & -(2**16)).view(torch.float32).to(x.dtype)


def flushed(*arguments):
    """Without the numbers below the smallest normal one."""
    y = plain_op(*arguments)
    return torch.where(y.abs() < torch.finfo(y.dtype).tiny, 0, y)


def saturated(*arguments):
    """The largest number in place of infinity."""
    y = plain_op(*arguments)
    return y.clamp(max=torch.finfo(y.dtype).max)


def narrow(x, weight, bias, A, *rest):
    """A x without the columns from 2048 on."""
    return plain_op(x, weight, bias, torch.cat((A[:, :2048], 0 * A[:, 2048:]), 1), *rest)


def independent(*arguments):
    *tensors, noise = arguments
    return plain_op(*tensors, noise and Noise(noise.seed, noise.draw))


def with_threads(*arguments):
    """Wrong with another number of threads than the process has."""
    factor = 1 if torch.get_num_threads() == THREADS else 2
    return plain_op(*arguments[:4], factor * arguments[4], *arguments[5:])


OPS = {
    "truncated": (truncated, "16-bit results"),
    "flushed to zero": (flushed, "16-bit results"),
    "no infinity": (saturated, "16-bit results"),
    "columns left out": (narrow, "large layers"),
    "depends on threads": (with_threads, "large layers"),
    "independent draws": (independent, "antithetic draws"),
}


@pytest.mark.parametrize("fault", OPS)
def test_a_faulty_op_is_noticed(fault):
    op, name = OPS[fault]
    assert run(CHECKS[name], plain_op, CPU).passed
    assert not run(CHECKS[name], op, CPU).passed


def ties_in_order(probs, labels):
    """The risk by coverage with ties in the order of the rows."""
    confidence, classes = probs.max(1)
    wrong = (classes != labels).double()[confidence.argsort(descending=True, stable=True)]
    covered = torch.arange(1, len(wrong) + 1)
    return metrics.RiskCoverage(covered / len(wrong), wrong.cumsum(0) / covered, 0.0)


# Fault: what is replaced, by what, and the check that must notice.
FAULTS = {
    "positions in the dtype of the weights": (
        "model.llama:Llama.cos_sin",
        lambda self, p: cos_sin(self, p.to(self.embed_tokens.weight.dtype)), "far positions"),
    "positions count padding": (
        "model.inputs:Inputs.positions",
        lambda self: torch.arange(self.tokens.shape[1])[None].expand(len(self.tokens), -1),
        "padding"),
    "unweighted": (
        "verify.body_checks:predictive", lambda logs, weights=None: predictive(logs),
        "weighted draws"),
    "ties in the order of rows": (
        "evaluation.metrics:risk_coverage", ties_in_order, "order of rows"),
    "gate and up exchanged": (
        "model.llama:MLP.activation",
        staticmethod(lambda gate, up: torch.nn.functional.silu(up) * gate), "block functions"),
    "gates overflow": (
        "model.llama:MLP.activation",
        staticmethod(lambda gate, up: gate * gate.exp() / (1 + gate.exp()) * up),
        "block functions"),
    "eps left out": (
        "model.llama:RMSNorm.forward",
        lambda self, x: x * x.square().mean(-1, keepdim=True).rsqrt() * (self.weight + 1e-3),
        "block functions"),
    "no bias": (
        "model.attach:Linear.product",
        staticmethod(lambda x, weight, bias: torch.nn.functional.linear(x, weight)), "few rows"),
    "the last column left out": (
        "model.attach:Linear.product",
        staticmethod(lambda x, weight, bias: torch.nn.functional.linear(
            x[:, :-1], weight[:, :-1], bias)), "few rows"),
    "turned backwards": (
        "fast.blocks:rotate", lambda x, cos, sin: blocks.plain.rotate(x, cos, -sin),
        "block functions"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    where, faulty, name = FAULTS[fault]
    replace(monkeypatch, where, faulty)
    result = run(CHECKS[name], SubspaceAdapter.op, CPU)
    assert result.worst > 1 and "Error" not in result.note, result  # no exception


@pytest.mark.skipif(native.core() is None, reason="the native core was not built")
def test_the_gradients_of_the_core_are_checked(monkeypatch):
    """The core's backward pass, not only its forward one."""
    monkeypatch.setattr(blocks.Rotation, "backward", lambda ctx, g: (g, None))
    with fast.in_place(fast.FAST):
        assert not run(CHECKS["block functions"], SubspaceAdapter.op, CPU).passed
