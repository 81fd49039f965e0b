"""MAP: the penalty is minus the log density of the prior."""

from __future__ import annotations

import torch

from scalabl_ref import adapters
from scalabl_ref.core.objective import complexity

from ..models import tiny_model
from ..tolerances import rounding


def test_map_adds_minus_the_log_prior():
    model = tiny_model(method="map", prior_std=0.5)
    own = [p for a in adapters(model).values() for p in (a.A, a.B)]
    prior = torch.distributions.Normal(0.0, 0.5)
    density = sum(prior.log_prob(p.double()).sum() for p in own)
    constant = sum(p.numel() for p in own) * prior.log_prob(torch.tensor(0.0)).double()
    expected = constant - density
    assert abs(complexity(model) - expected) <= rounding(torch.float32, 64) * expected
