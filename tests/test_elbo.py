"""Both KLs, the objective, and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from scalabl_ref import Noise, adapters, elbo, kl_forward, kl_official, reference
from scalabl_ref.elbo import class_logits
from scalabl_ref.elbo import kl_divergence as model_kl
from scalabl_ref.errors import InputError

from .models import tiny_batch, tiny_model
from .tolerances import central_difference, rounding

positive = st.floats(1e-3, 1e3)
gaussians = st.lists(st.tuples(st.floats(-1e3, 1e3), positive), min_size=1, max_size=8)


def columns(pairs):
    s, sigma = zip(*pairs, strict=True)
    return torch.tensor(s).double(), torch.tensor(sigma).double()


def close(a, b, terms: int) -> bool:
    """Equal to float64 rounding of a sum of `terms` terms no larger than 1e12 each."""
    return abs(a - b) <= rounding(torch.float64, 8 * terms) * max(1.0, abs(b))


def test_check_values():
    """METHOD, section 2: s = (e^.3, e^-.4), sigma = (.05, .2), prior sd 1."""
    s = torch.tensor([0.3, -0.4]).double().exp()
    sigma = torch.tensor([0.05, 0.2]).double()
    assert round(float(kl_official(s, sigma, 1.0)), 4) == 576.9352
    assert round(float(kl_forward(s, sigma, 1.0)), 4) == 4.7621


@given(gaussians, positive)
def test_both_directions_equal_torch_distributions_and_the_reference(pairs, prior_std):
    s, sigma = columns(pairs)
    q = Normal(s, sigma)
    p = Normal(torch.zeros_like(s), torch.full_like(s, prior_std))
    forward, official = torch_kl(q, p), torch_kl(p, q)
    # torch's own formula cancels near zero: compare against the size of what it subtracts.
    for ours, slow, theirs in (
        (kl_forward, reference.kl_forward, forward),
        (kl_official, reference.kl_official, official),
    ):
        value, size = ours(s, sigma, prior_std), theirs.abs().sum() + 20 * len(pairs)
        assert abs(value - theirs.sum()) <= rounding(torch.float64, 16) * size
        assert abs(value - slow(s, sigma, prior_std)) <= rounding(torch.float64, 16) * size


@given(gaussians, positive)
def test_kl_is_non_negative(pairs, prior_std):
    s, sigma = columns(pairs)
    for kl in (kl_forward, kl_official):
        assert kl(s, sigma, prior_std) >= -rounding(torch.float64, 64) * len(pairs)


@given(st.integers(1, 8), positive)
def test_kl_is_zero_at_the_prior(rank, prior_std):
    s, sigma = torch.zeros(rank), torch.full((rank,), prior_std, dtype=torch.float64)
    for kl in (kl_forward, kl_official):
        assert abs(kl(s, sigma, prior_std)) <= rounding(torch.float64, 8) * rank


@given(gaussians, positive)
def test_kl_gradients_equal_the_closed_forms(pairs, prior_std):
    s, sigma = (t.requires_grad_() for t in columns(pairs))
    p2 = prior_std**2
    got = torch.autograd.grad(kl_forward(s, sigma, prior_std), (s, sigma))
    expected = (s / p2, sigma / p2 - 1 / sigma)
    for a, b in zip(got, expected, strict=True):
        size = (sigma / p2 + 1 / sigma + s.abs() / p2).abs()
        assert ((a - b).abs() <= rounding(torch.float64, 16) * size).all()
    got = torch.autograd.grad(kl_official(s, sigma, prior_std), (s, sigma))
    expected = (s / sigma**2, 1 / sigma - (p2 + s**2) / sigma**3)
    for a, b in zip(got, expected, strict=True):
        size = 1 / sigma + (p2 + s**2) / sigma**3 + (s / sigma**2).abs()
        assert ((a - b).abs() <= rounding(torch.float64, 16) * size).all()


def test_model_kl_sums_over_the_layers():
    model = tiny_model()
    for name, one in (("forward", kl_forward), ("official", kl_official)):
        total = sum(
            (one(a.log_s.double().exp(), a.log_sigma.double().exp(), 1.0)).item()
            for a in adapters(model).values()
        )
        assert close(model_kl(model, name).item(), total, 15)
    assert float(model_kl(tiny_model(method="mle"))) == 0.0
    with pytest.raises(InputError, match="kl must be one of forward, official"):
        model_kl(model, "reverse")


def test_official_kl_stays_finite_where_float32_overflows():
    """The official code's float32 KL is infinite at log sigma = -44.5 (METHOD, section 5)."""
    s, log_sigma = torch.tensor([1.5]), torch.tensor([-44.5])
    assert torch.isinf((1 + s**2) / (2 * log_sigma.exp() ** 2)).all()
    assert torch.isfinite(kl_official(s, log_sigma.double().exp(), 1.0))


@given(st.integers(0, 2**32), st.floats(0, 10), st.integers(1, 10_000))
def test_loss_is_nll_plus_beta_kl_over_n(seed, beta, n):
    model, batch = tiny_model(), tiny_batch()
    result = elbo(model, batch, Noise(seed, 0), beta, n)
    logits = class_logits(model, batch, Noise(seed, 0)).double()
    picked = torch.log_softmax(logits, -1)[torch.arange(len(batch.labels)), batch.labels]
    assert abs(result.nll.double() + picked.mean()) <= rounding(torch.float32, 16)
    expected = result.nll.item() + beta * result.kl.item() / n
    assert abs(result.loss.item() - expected) <= rounding(torch.float32, 4) * abs(expected)


def test_the_draw_follows_the_example_through_the_whole_model():
    """Same ids, another order and another batch: the same logits per example."""
    model, batch = tiny_model(), tiny_batch(rows=5)
    whole = class_logits(model, batch, Noise(1, 2))
    order = [3, 0, 4]
    part = type(batch)(
        batch.tokens[order],
        batch.lengths[order],
        batch.labels[order],
        batch.ids[order],
        batch.classes,
    )
    assert (class_logits(model, part, Noise(1, 2)) - whole[order]).abs().max() <= rounding(
        torch.float32, 256
    )


def test_full_head_and_trimmed_head_give_the_same_class_logits():
    full, trimmed, batch = tiny_model(trim=False, wake=False), tiny_model(wake=False), tiny_batch()
    difference = class_logits(full, batch, None) - class_logits(trimmed, batch, None)
    assert difference.abs().max() <= rounding(torch.float32, 64)


def test_gradient_of_the_loss_equals_a_finite_difference():
    """Central differences in float64 along one random direction, at fixed noise.

    The direction has unit variance in every parameter, so derivatives along it are large.
    """
    model, batch = tiny_model(seed=3).double(), tiny_batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator).double() for p in trained]
    value = elbo(model, batch, Noise(0, 0), 1.0, 100).loss
    gradient = torch.autograd.grad(value, trained)
    slope = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))

    def moved(h):
        with torch.no_grad():
            for p, d in zip(trained, direction, strict=True):
                p += h * d
            result = elbo(model, batch, Noise(0, 0), 1.0, 100).loss.item()
            for p, d in zip(trained, direction, strict=True):
                p -= h * d
        return result

    h = 1e-5
    numeric = (moved(h) - moved(-h)) / (2 * h)
    size = max(value.item(), abs(slope))
    assert abs(numeric - slope) <= central_difference(h) * size


@pytest.mark.parametrize("kl", ["forward", "official"])
def test_objective_equals_the_reference(kl):
    model, batch, noise = tiny_model(), tiny_batch(), Noise(5, 6)
    logits = class_logits(model, batch, noise)
    gaussians = [a.scale() for a in adapters(model).values()]
    expected = reference.elbo(logits, batch.labels, gaussians, 1.0, 0.3, 50, kl)
    for value, slow in zip(elbo(model, batch, noise, 0.3, 50, kl), expected, strict=True):
        assert abs(value.item() - slow) <= rounding(torch.float32, 64) * abs(slow)
