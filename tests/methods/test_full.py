"""The full covariance: its KL by another's, its layer by the definition, its start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal
from torch.distributions import kl_divergence as torch_kl

from scalabl_ref import Noise, elbo
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.objective import complexity

from ..models import linear_layer, tiny_batch, tiny_model
from ..strategies import gaussians
from ..tolerances import rounding


@pytest.mark.eq_20
@given(gaussians, st.floats(0.1, 3), st.integers(0, 1000))
def test_full_kl_equals_torch_distributions(pairs, prior_std, seed):
    linear, model = linear_layer(seed, covariance="full", prior_std=prior_std)
    log_s, log_sigma = (torch.tensor(c, dtype=torch.float64) for c in zip(*pairs, strict=True))
    linear.adapter.log_s.data, linear.adapter.log_sigma.data = log_s, log_sigma
    q = MultivariateNormal(log_s.exp(), scale_tril=linear.adapter.factor())
    p = MultivariateNormal(torch.zeros(3).double(), prior_std**2 * torch.eye(3).double())
    expected = torch_kl(q, p)
    assert abs(complexity(model) - expected) <= rounding(torch.float64, 500) * (10 + expected)


@torch.no_grad()
def test_the_factor_has_free_entries_below_its_diagonal():
    adapter = tiny_model(covariance="full").layers[0].attn.q_proj.adapter
    adapter.lower.copy_(torch.tensor([1.0, 2.0, 3.0]))
    adapter.log_sigma.copy_(torch.tensor([4.0, 5.0, 6.0]).log())
    right = torch.tensor([[4.0, 0, 0], [1, 5, 0], [2, 3, 6]])
    assert (adapter.factor() - right).abs().max() <= rounding(torch.float32, 16)
    assert adapter.lora_A(Noise(1, 2)).dtype == torch.float64
    assert len(tiny_model(covariance="full", rank=5).layers[0].attn.q_proj.adapter.lower) == 10


def test_full_covariance_starts_as_the_diagonal_one():
    diagonal, full = tiny_model(), tiny_model(covariance="full")
    batch = tiny_batch()
    for noise in (None, Noise(1, 2)):
        one, other = (elbo(m, batch, noise, 1.0, 10) for m in (diagonal, full))
        for a, b in zip(one, other, strict=True):
            assert abs(a - b) <= rounding(torch.float32, 64) * abs(a)


def test_full_forward_is_the_definition_row_by_row():
    linear, _ = linear_layer(3, covariance="full", alpha=4.5)
    adapter, x = linear.adapter, torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    x = x.double()
    ids = torch.tensor([9, 4])
    y = linear(x, Keys(Noise(5, 6), ids))
    for row, id in enumerate(ids):
        eps = Noise(5, 6).normal(adapter.layer, id[None], 3)[0].double()
        drawn = adapter.log_s.exp() + adapter.factor() @ eps
        matrix = linear.weight + 1.5 * adapter.B @ torch.diag(drawn) @ adapter.A
        assert (y[row] - x[row] @ matrix.T).abs().max() <= rounding(torch.float64, 200)
