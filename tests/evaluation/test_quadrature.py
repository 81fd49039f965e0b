"""The predictive integrated: nodes, the logits' Gaussian, and against very many draws."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import InputError, Noise, predict
from scalabl_ref.core.objective import class_logits
from scalabl_ref.evaluation.quadrature import NODES, head_gaussian, integrate, predict_exact
from scalabl_ref.verify.reference import gauss_hermite

from ..models import tiny_batch, tiny_model
from ..stats import ZTest
from ..tolerances import rounding

ERROR = 5e-5  # that predict_exact states, for widths up to 2


@pytest.mark.parametrize("n", [1, 2, 5, 24, 96])
def test_nodes_integrate_polynomials_exactly(n):
    """E z^p = (p - 1)!! for even p below 2 n."""
    nodes, weights = gauss_hermite(n)
    for power in range(min(2 * n, 12)):
        expected = 0 if power % 2 else math.prod(range(1, power, 2))
        size = float(weights @ nodes.abs() ** power)
        assert abs(float(weights @ nodes**power) - expected) <= rounding(torch.float64, 64) * size


@pytest.mark.eq_23
@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_gaussian_is_what_draws_are_made_of(trim, covariance):
    """z of a draw is the mean plus the factor times that draw's eps."""
    options = {"targets": ("lm_head",), "init_sigma": 1.0, "covariance": covariance}
    model, batch, noise = tiny_model(trim=trim, **options), tiny_batch(), Noise(3, 1)
    if covariance == "full":
        model.lm_head.adapter.lower.data.copy_(torch.tensor([0.5, -0.7, 0.9]))
    mean, factor = head_gaussian(model, batch)
    assert not model.lm_head._forward_pre_hooks  # which would keep every hidden state
    eps = noise.normal(model.lm_head.adapter.layer, batch.ids, 3).double()
    drawn = class_logits(model, batch, noise).double()
    expected = mean + torch.einsum("bcr,br->bc", factor, eps)
    assert (drawn - mean).abs().max() > 0.1
    assert (drawn - expected).abs().max() <= rounding(torch.float32, 64) * drawn.abs().max()


@pytest.mark.eq_23
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 5), st.floats(0.01, 2))
def test_quadrature_has_converged(seed, classes, rank, width):
    """Against twice as many nodes; and in one direction against sums over a fine grid."""
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, classes, generator=g).double()
    factor = torch.randn(2, classes, rank, generator=g).double()
    moved = factor - factor.mean(1, keepdim=True)
    factor = factor * width / torch.linalg.svdvals(moved).amax(1)[:, None, None].clamp(min=1e-9)
    got = integrate(mean, factor)
    finer = integrate(mean, factor, [2 * n for n in NODES])
    for one, other in zip(got, finer, strict=True):
        assert (one - other).abs().max() <= ERROR
    eps = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    if min(rank, classes - 1) == 1:
        U, S, _ = torch.linalg.svd(factor - factor.mean(1, keepdim=True), full_matrices=False)
        density = torch.exp(-eps.square() / 2)
        weights = density / density.sum()
        z = mean + eps[:, None, None] * (U * S[:, None])[..., 0]
        fine = torch.einsum("s,sbc->bc", weights, z.softmax(-1))
        assert (got.probs - fine).abs().max() <= ERROR
        p = z.softmax(-1)
        entropy = -torch.special.xlogy(p, p).sum(-1)
        assert (got.expected_entropy - weights @ entropy).abs().max() <= ERROR
    assert (got.probs.sum(-1) - 1).abs().max() <= rounding(torch.float64, 256)


@cache
@torch.no_grad()
def head_alone():
    """A model whose head alone draws, with its batch and, exactly, the mean and sd of a draw."""
    model, batch = tiny_model(targets=("lm_head",), init_sigma=0.5), tiny_batch()
    mean, factor = head_gaussian(model, batch)
    nodes, weights = gauss_hermite(24)
    eps, weight = torch.cartesian_prod(*[nodes] * 3), torch.cartesian_prod(*[weights] * 3).prod(1)
    p = (mean + torch.einsum("bcr,qr->qbc", factor, eps)).softmax(-1)
    first = torch.einsum("q,qbc->bc", weight, p)
    second = torch.einsum("q,qbc->bc", weight, (p - first) ** 2)
    return model, batch, first, second.sqrt()


def averages(seed: int, n: int) -> torch.Tensor:
    """Averages of n draws, less what `predict_exact` says, in sds of a draw."""
    model, batch, _, sd = head_alone()
    exact = predict_exact(model, batch).probs
    return ((predict(model, batch, n, seed).probs - exact) / sd).flatten()


AVERAGES = ZTest("exact: averages of draws", averages, n=20_000, count=12, replay=500, exact=False)


def test_very_many_draws_come_to_the_integral():
    """Of which the hidden states are computed once."""
    AVERAGES.check(seed=8)
    model, batch, mean, _ = head_alone()
    assert (predict_exact(model, batch).probs - mean).abs().max() <= ERROR


def test_what_is_not_the_heads_alone_is_refused():
    for model in (tiny_model(), tiny_model(targets=("lm_head",), method="blob")):
        with pytest.raises(InputError, match="lm_head alone"):
            predict_exact(model, tiny_batch())
    with pytest.raises(InputError, match="at most 4 classes, or 3 scales"):
        integrate(torch.zeros(1, 5), torch.ones(1, 5, 4))


@pytest.mark.parametrize("classes, rank", [(1, 3), (6, 3)])
def test_one_class_is_certain_and_a_small_rank_may_have_many(classes, rank):
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(2, classes, generator=g).double()
    got = integrate(mean, torch.randn(2, classes, rank, generator=g).double())
    assert (got.probs.sum(-1) - 1).abs().max() <= rounding(torch.float64, 2**16)
    assert bool((got.mutual_information > 0).all()) == (classes > 1)
