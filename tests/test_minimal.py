"""The listing in minimal.py: every part equals the package's, to rounding."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from scalabl_ref import (
    AdapterConfig,
    Noise,
    adapters,
    add_adapters,
    elbo,
    kl_forward,
    kl_official,
    minimal,
    subspace_lora_linear,
)
from scalabl_ref.core import objective
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.predictive import predictive
from scalabl_ref.model.attach import Linear
from scalabl_ref.training.trainer import parameter_groups
from scalabl_ref.verify.known_answers import philox_answers

from .conftest import ROOT
from .exact import exact_normals
from .strategies import OpCase
from .tolerances import op_bound, op_sizes, rounding

IDS = [7, 2**32 - 1, 0, 7, 12]  # a number twice: the same draw
SEED, N = 2**63 + 5, 40


def test_the_listing_is_short_and_needs_torch_alone():
    text = Path(minimal.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    tree = ast.parse(text)
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for name in node.names}  # fmt: skip
    assert modules == {"math", "torch"}


def test_it_runs_as_a_script():
    """The seed is fixed. A draw's accuracy by chance is one half."""
    done = subprocess.run([sys.executable, "-m", "scalabl_ref.minimal"],
                          capture_output=True, text=True, check=True, cwd=ROOT)  # fmt: skip
    found = re.fullmatch(r"accuracy (\S+), mutual information (\S+) nats\n", done.stdout)
    assert float(found[1]) > 0.85 and float(found[2]) > 0.001


def test_philox_known_answers():
    for answer in philox_answers():
        assert tuple(minimal.philox4x32(answer.counter, answer.key, answer.rounds)) == answer.words


def test_normals_are_those_of_the_package():
    """2^14 normals. `reference.normal` says when bits may differ: once in 2^28 normals."""
    groups = (2**32 - 1 - 100_003 * torch.arange(2**10)).tolist()
    for rank in (1, 6, 16):
        theirs = Noise(SEED, 2**32 - 1).normal(3, torch.tensor(groups), rank)
        assert torch.equal(minimal.normal(SEED, 2**32 - 1, 3, groups, rank), theirs)


def test_awkward_words_have_their_normals():
    """Radii near 0, and angles at and beside the quarter turns and their halves."""
    ends = [0, 1, 2**29 - 1, 2**29, 2**30, 3 * 2**29, 2**31 - 1, 2**32 - 2**29, 2**32 - 1]
    for a in ends:
        for b in ends:
            with mock.patch.object(minimal, "philox4x32", lambda *_, words=(a, b, b, a): words):
                got = minimal.normal(0, 0, 0, [0], 4)[0]
            exact = [float(z) for z in exact_normals(a, b) + exact_normals(b, a)]
            assert torch.equal(got, torch.tensor(exact, dtype=torch.float64).float()), (a, b)


def layer_and_case(noise):
    """An adapted layer in float64, and the arguments of the package's layer."""
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 5).double()
    layer = minimal.Adapted(base, layer=9, rank=3, c=1.5).double()
    with torch.no_grad():
        for parameter in (base.weight, base.bias, layer.B, layer.log_s, layer.log_sigma):
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    case = OpCase(
        x=torch.randn(len(IDS), 6, generator=g, dtype=torch.float64), weight=base.weight,
        bias=base.bias, A=layer.A, B=layer.B, s=layer.log_s.exp(), sigma=layer.log_sigma.exp(),
        scaling=1.5, noise=noise, layer=9, sampling="example", groups=torch.tensor(IDS),
    )  # fmt: skip
    return layer, case


@pytest.mark.parametrize("noise", [None, Noise(SEED, 4)])
def test_the_layer_is_the_packages_with_its_gradients(noise):
    layer, case = layer_and_case(noise)
    x = case.x.clone().requires_grad_()
    own = layer(x, None if noise is None else (noise.seed, noise.draw), IDS)
    y = subspace_lora_linear(**{**vars(case), "x": x})
    assert ((own - y).abs() <= 2 * op_bound(case)).all()  # both round
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    leaves = {"x": x, "A": layer.A, "B": layer.B, "s": layer.log_s, "sigma": layer.log_sigma}
    ours, theirs = (torch.autograd.grad(out, list(leaves.values()), direction, retain_graph=True,
                                        materialize_grads=True) for out in (own, y))  # fmt: skip
    sizes = op_sizes(case, direction)
    bound = rounding(torch.float64, 4 * case.longest_sum())
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        size = sizes[name] * (case.s.max() if name == "s" else 1) * (
            case.sigma.max() if name == "sigma" else 1)  # fmt: skip
        assert ((a - b).abs() <= bound * size.max()).all(), name


@pytest.mark.parametrize("own, theirs", [(minimal.kl_forward, kl_forward),
                                         (minimal.kl_official, kl_official)])  # fmt: skip
def test_both_kls_are_the_packages(own, theirs):
    s = torch.tensor([1.3, 0.1, 2.0]).double().requires_grad_()
    sigma = torch.tensor([0.05, 0.4, 1.5]).double().requires_grad_()
    for prior in (1.0, 0.3):
        a, b = own(s, sigma, prior), theirs(s, sigma, prior)
        assert abs(a - b) <= rounding(torch.float64, 32) * b
        for p, q in zip(*(torch.autograd.grad(kl, (s, sigma)) for kl in (a, b)), strict=True):
            assert ((p - q).abs() <= rounding(torch.float64, 32) * q.abs().max()).all()


class Theirs(nn.Module):
    """The network of the listing, of the package's layers; its last outputs are the logits."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = Linear(6, 5, bias=True), Linear(5, 3, bias=True)

    def forward(self, x, noise, groups):
        keys = Keys(noise, groups)
        return self.v_proj(self.q_proj(x, keys).tanh(), keys)


def networks(wake=True):
    """The same network twice, in float64: the listing's layers, and a module of the package's."""
    torch.manual_seed(0)
    layers = [minimal.Adapted(nn.Linear(6, 5), 0, 2, c=1.5, seed=SEED),
              minimal.Adapted(nn.Linear(5, 3), 2, 2, c=1.5, seed=SEED)]  # fmt: skip
    model = Theirs()
    config = AdapterConfig(rank=2, alpha=3.0, targets=("q_proj", "v_proj"))
    for layer, linear in zip(layers, (model.q_proj, model.v_proj), strict=True):
        linear.weight.data, linear.bias.data = layer.base.weight.data, layer.base.bias.data
    add_adapters(model, config, SEED)
    if wake:
        for layer, adapter in zip(layers, adapters(model).values(), strict=True):
            layer.B.data.normal_()
            adapter.B.data = layer.B.data.clone()
    return [layer.double() for layer in layers], model.double()


def test_a_layer_starts_as_the_packages():
    layers, model = networks(wake=False)
    assert [adapter.layer for adapter in adapters(model).values()] == [0, 2]
    for layer, adapter in zip(layers, adapters(model).values(), strict=True):
        for name in ("A", "B", "log_s", "log_sigma"):
            own, theirs = getattr(layer, name), getattr(adapter, name)
            assert (own - theirs).abs().max() <= rounding(torch.float32, 2), name
            assert own.shape == theirs.shape


def data():
    g = torch.Generator().manual_seed(3)
    return torch.randn(len(IDS), 6, generator=g).double(), torch.tensor([2, 0, 1, 1, 0])


@pytest.mark.parametrize("official", [False, True])
def test_a_step_is_the_packages(official):
    """Loss, then every parameter after the first and the second step of AdamW."""
    layers, model = networks()
    slow = [p for a in layers for p in (a.A, a.B)]
    fast = [p for a in layers for p in (a.log_s, a.log_sigma)]
    if not official:  # one width below its bound; the official KL would be 1e17 there
        layers[0].log_sigma.data[1] = model.q_proj.adapter.log_sigma.data[1] = -20.5
    ours = torch.optim.AdamW([{"params": slow, "lr": 0.01}, {"params": fast, "lr": 0.04}],
                             eps=1e-6, weight_decay=0.0)  # fmt: skip
    own = list(adapters(model).values())
    theirs = torch.optim.AdamW(parameter_groups(own, 0.01), eps=1e-6, weight_decay=0.0)
    x, labels = data()
    batch = SimpleNamespace(labels=labels, ids=torch.tensor(IDS))
    for step in range(2):
        noise = Noise(SEED, 2**31 + step)
        loss = minimal.training_step(layers, ours, x, labels, IDS, (noise.seed, noise.draw), N,
                                     beta=0.7, official=official)  # fmt: skip
        with mock.patch.object(objective, "class_logits", lambda m, b, n: m(x, n, b.ids)):
            expected = elbo(model, batch, noise, 0.7, N, "official" if official else "forward").loss
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        for adapter in own:
            adapter.bound_()
        assert abs(loss - expected.item()) <= rounding(torch.float64, 64) * abs(loss)
        for layer, adapter in zip(layers, own, strict=True):
            for name in ("A", "B", "log_s", "log_sigma"):
                a, b = getattr(layer, name), getattr(adapter, name)
                # AdamW divides a gradient's error by adam_eps at least, in either step.
                bound = 2 * 0.04 / 1e-6 * rounding(torch.float64, 64) * b.grad.abs().max()
                assert (a - b).abs().max() <= bound, name
    assert layers[0].log_sigma.min() >= -20


def test_a_prediction_is_the_packages():
    layers, model = networks()
    for a, adapter in zip(layers, adapters(model).values(), strict=True):
        a.log_sigma.data += 3  # wide, so that the draws disagree
        adapter.log_sigma.data += 3
    x, _ = data()
    got = minimal.predict(layers, x, IDS, 6, SEED)
    logits = [model(x, Noise(SEED, draw), torch.tensor(IDS)) for draw in range(6)]
    expected = predictive(torch.stack(logits).log_softmax(-1))
    for own, theirs, name in zip(got, expected, expected._fields, strict=True):
        assert (own - theirs).abs().max() <= rounding(torch.float64, 128), name
    assert got[-1].min() > 0.001
