"""Deep ensembles: the average of their members."""

from __future__ import annotations

import torch

from scalabl_ref import predict
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.methods import Ensemble

from ..models import tiny_batch, tiny_model
from ..tolerances import rounding


def test_an_ensemble_averages_its_members():
    models, batch = [tiny_model(seed, method="mle") for seed in (0, 1)], tiny_batch()
    each = [predict(model, batch, samples=0).probs for model in models]
    host = tiny_model(0, method="mle")
    base = {n: p.clone() for n, p in host.named_parameters()}
    ensemble = Ensemble([adapter_state(m) for m in models])
    # The members' bases differ in the trimmed head; predict with each on its own base.
    ours = predict(models[0], batch, posterior=Ensemble([adapter_state(models[0])] * 2))
    assert (ours.probs - each[0]).abs().max() <= rounding(torch.float64, 64)
    both = predict(host, batch, posterior=ensemble)
    singles = [predict(host, batch, posterior=Ensemble([s])).probs for s in ensemble.members]
    assert (both.probs - (singles[0] + singles[1]) / 2).abs().max() <= rounding(torch.float64, 64)
    assert (singles[0] - singles[1]).abs().max() > 1e-3
    assert all(torch.equal(p, base[n]) for n, p in host.named_parameters())
    first = predict(host, batch, samples=0, posterior=ensemble)
    assert torch.equal(first.probs, singles[0])
