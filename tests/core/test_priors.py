"""Priors of the scales: a fitted one is the best, and the scale has no say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import AdapterConfig, InputError, Noise, adapters, kl_forward
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.objective import complexity

from ..models import linear_layer, tiny_model
from ..strategies import gaussians
from ..tolerances import rounding


@pytest.mark.eq_19
@given(gaussians, gaussians, st.sampled_from(["layer", "component"]), st.booleans())
def test_the_fitted_prior_is_the_best_one(pairs, others, prior, full):
    """No other sigma_p, of each layer or of each scale, gives a smaller forward KL."""
    covariance = "full" if full else "diagonal"
    linear, model = linear_layer(0, prior=prior, covariance=covariance)
    log_s, log_sigma = (torch.tensor(c, dtype=torch.float64) for c in zip(*pairs, strict=True))
    linear.adapter.log_s.data, linear.adapter.log_sigma.data = log_s, log_sigma
    a = linear.adapter
    L = a.factor() if full else torch.diag(a.log_sigma.exp())
    second = second_moments(a)

    def kl_with(prior_std):
        return (torch.log(prior_std / L.diagonal()) - 0.5 + second / (2 * prior_std**2)).sum()

    best, bound = complexity(model), rounding(torch.float64, 500)
    fitted = second.sqrt() if prior == "component" else second.mean().sqrt()
    assert abs(best - kl_with(fitted)) <= bound * (10 + best.abs())
    tried = torch.tensor([value for value, _ in others], dtype=torch.float64).exp()
    worse = kl_with(tried if prior == "component" else tried[0])
    assert best <= worse + bound * (10 + worse.abs())


@pytest.mark.eq_19
def test_each_layer_has_a_prior_of_its_own():
    """Scales of the second layer are ten times those of the first: each sigma_p follows its own."""
    model = tiny_model(prior="layer").double()
    parts = []
    for i, a in enumerate(adapters(model).values()):
        a.log_s.data += 2.3 * i
        second = second_moments(a).mean()
        parts.append((second.log() / 2 - a.log_sigma).sum())
    assert len(parts) > 1
    total = torch.stack(parts).sum()
    assert (complexity(model) - total).abs() <= rounding(torch.float64, 500) * (10 + total.abs())


def second_moments(adapter):
    """E s~_k^2, (r,)."""
    own = hasattr(adapter, "factor")
    L = adapter.factor() if own else torch.diag(adapter.log_sigma.exp())
    return adapter.log_s.exp().square() + L.square().sum(1)


@pytest.mark.eq_19
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@given(st.floats(-3, 3), st.integers(0, 1000))
def test_with_a_fitted_prior_the_scale_has_no_say(covariance, log_k, seed):
    """(s, sigma) / k with k B is the same function at the same KL; with a fixed prior it is not."""
    k = torch.tensor(log_k, dtype=torch.float64).exp()
    for prior in ("layer", "component", "fixed"):
        linear, model = linear_layer(seed, prior=prior, covariance=covariance)
        adapter, x, noise = linear.adapter, torch.ones(2, 6).double(), Noise(3, 4)
        with torch.no_grad():
            before = linear(x, Keys(noise)), complexity(model)
            squares = second_moments(adapter).sum()
            adapter.log_s -= log_k
            adapter.log_sigma -= log_k
            adapter.B *= k
            if covariance == "full":
                adapter.lower /= k
            after = linear(x, Keys(noise)), complexity(model)
        assert (before[0] - after[0]).abs().max() <= rounding(torch.float64, 2000) * 10
        expected = 0.0
        if prior == "fixed":
            expected = adapter.config.rank * log_k + squares * (k**-2 - 1) / 2
        size = 10 + before[1].abs() + after[1].abs()
        assert abs(after[1] - before[1] - expected) <= rounding(torch.float64, 2000) * size


def test_one_prior_for_each_scale_is_half_the_log_of_one_plus_the_squared_signal_to_noise():
    linear, model = linear_layer(prior="component")
    s, sigma = linear.adapter.scale()
    expected = (1 + (s / sigma) ** 2).log().sum() / 2
    assert abs(complexity(model) - expected) <= rounding(torch.float64, 64) * expected


@pytest.mark.parametrize("change", [{"prior": "layer"}, {"covariance": "full"}])
def test_the_official_direction_has_neither(change):
    with pytest.raises(InputError, match="the forward KL"):
        complexity(tiny_model(**change), "official")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prior": "flat"}, "prior must be one of fixed, layer, component, not 'flat'"),
        ({"covariance": "banded"}, "covariance of method scalabl must be one of diagonal, full"),
        ({"covariance": "full", "method": "mle"}, "of method mle must be one of diagonal, not"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        AdapterConfig(**change)


def test_each_scale_may_have_its_own_prior():
    s, sigma = torch.ones(2).double(), torch.ones(2).double()
    both = kl_forward(s, sigma, torch.tensor([1.0, 2.0]).double())
    apart = kl_forward(s[:1], sigma[:1], 1.0) + kl_forward(s[1:], sigma[1:], 2.0)
    assert both == apart
