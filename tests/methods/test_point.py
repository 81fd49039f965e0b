"""Point estimates of the scales: ScalaBL's start, and the mean of ScalaBL without its width."""

from __future__ import annotations

import torch

from scalabl_ref import adapters, elbo
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.core.objective import class_logits, complexity

from ..models import tiny_batch, tiny_model
from ..tolerances import rounding


def test_it_starts_as_scalabl_does_but_for_the_width():
    ours, point = (adapter_state(tiny_model(method=m, wake=False)) for m in ("scalabl", "point"))
    assert ours.keys() - point.keys() == {n for n in ours if n.endswith("log_sigma")}
    assert all(torch.equal(value, ours[name]) for name, value in point.items())


def test_it_is_the_mean_of_scalabl_with_its_gradients():
    ours, point = tiny_model(method="scalabl"), tiny_model(method="point")
    state = adapter_state(ours)
    with torch.no_grad():
        for name, adapter in adapters(point).items():
            for key, parameter in adapter.named_parameters():
                parameter.copy_(state[f"{name}.{key}"])
    gradients = []
    for model in (ours, point):
        elbo(model, tiny_batch(), None, 0.0, 10).nll.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(
        class_logits(ours, tiny_batch(), None), class_logits(point, tiny_batch(), None)
    )
    shared = gradients[1]
    assert any(n.endswith("log_s") and g.abs().max() > 0 for n, g in shared.items())
    for name, gradient in shared.items():
        theirs = gradients[0][name]
        assert (gradient - theirs).abs().max() <= rounding(torch.float32, 64) * theirs.abs().max()


def test_it_adds_minus_the_log_prior_of_the_scales():
    model = tiny_model(method="point", prior_std=0.5)
    scales = torch.cat([adapter.log_s.double().exp() for adapter in adapters(model).values()])
    prior = torch.distributions.Normal(0.0, 0.5)
    constant = len(scales) * prior.log_prob(torch.tensor(0.0)).double()
    expected = constant - prior.log_prob(scales).sum()
    assert abs(complexity(model) - expected) <= rounding(torch.float32, 64) * expected
