"""Deep ensembles: the average of their members, and of their members' draws."""

from __future__ import annotations

import copy

import pytest
import torch

from scalabl_ref import InputError, Noise, predict
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.core.objective import class_logits
from scalabl_ref.methods import Ensemble, Laplace, Swag
from scalabl_ref.methods.ensemble import mean_log_probs
from scalabl_ref.training.runs import load_adapter_state

from ..models import fill, tiny_batch, tiny_model
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
    for samples in (0, 1, 5):  # there is nothing to draw
        again = predict(host, batch, samples=samples, posterior=ensemble)
        assert torch.equal(again.probs, both.probs)


def test_random_members_share_the_draws_out(tmp_path):
    """Draw i is of member i mod 3 under Noise(seed, i); 4 draws become 6; 0 are three means."""
    host, batch = tiny_model(method="scalabl"), tiny_batch()
    members = [adapter_state(tiny_model(seed, method="scalabl")) for seed in range(3)]
    ensemble = Ensemble(members)
    assert ensemble.draws(host, 4) == 6 and ensemble.draws(host, 3) == 3
    ensemble.save(tmp_path)
    for made in (ensemble, Ensemble.load(tmp_path)):
        for samples, noises in ((0, [None] * 3), (4, [Noise(5, i) for i in range(6)])):
            found = made.log_probs(host, batch, samples, seed=5)
            assert len(found) == len(noises)
            for i, noise in enumerate(noises):
                member = tiny_model(method="scalabl")
                load_adapter_state(member, members[i % 3], "the test")
                with torch.no_grad():
                    expected = class_logits(member, batch, noise).double().log_softmax(-1)
                assert torch.equal(found[i], expected)
    assert (predict(host, batch, 6, posterior=ensemble).mutual_information > 0).all()


def test_members_answer_by_their_own_posteriors(tmp_path):
    """Laplace's draw i, of member i mod 2, as that member's own posterior has it."""
    host, batch = tiny_model(method="mle"), tiny_batch()
    models = [host, copy.deepcopy(host)]
    fill(models[1], seed=1)
    own = [Laplace.fit(model, [tiny_batch(6)]) for model in models]
    ensemble = Ensemble([adapter_state(model) for model in models], own)
    ensemble.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "ensemble.safetensors", "member-0", "member-1"
    }  # fmt: skip
    for made in (ensemble, Ensemble.load(tmp_path)):
        for samples, total in ((3, 4), (0, 2)):
            found = made.log_probs(host, batch, samples, seed=2)
            each = [
                laplace.log_probs(model, batch, total if samples else 0, seed=2)
                for model, laplace in zip(models, own, strict=True)
            ]
            assert len(found) == total and ensemble.draws(host, 3) == 4
            for i in range(total):
                assert torch.equal(found[i], each[i % 2][i if samples else 0])
    (tmp_path / "member-1" / "laplace.safetensors").unlink()
    with pytest.raises(InputError, match="member-1/laplace.safetensors: no such file"):
        Ensemble.load(tmp_path)


def test_members_with_other_kinds_of_posteriors_are_refused():
    model = tiny_model(method="mle")
    laplace, state = Laplace.fit(model, [tiny_batch()]), adapter_state(model)
    for posteriors in ([laplace], [laplace, Swag()]):
        with pytest.raises(InputError, match="posteriors of one kind for all members, or none"):
            Ensemble([state, state], posteriors)


def test_a_members_weights_are_used_in_the_adapters_dtype():
    """SWAG's averages are float64, and the adapters stay in float32."""
    model, seen = tiny_model(method="mle"), []
    kept = {name: value.clone() for name, value in adapter_state(model).items()}
    wide = {name: value.double() + 1 for name, value in kept.items()}
    model.lm_head.register_forward_hook(lambda *_: seen.append(adapter_state(model)))
    mean_log_probs(model, tiny_batch(), wide)
    for name, value in adapter_state(model).items():
        assert seen[0][name].dtype == value.dtype == torch.float32
        assert torch.equal(seen[0][name], kept[name] + 1) and torch.equal(value, kept[name])


def test_more_than_ten_members_keep_their_order(tmp_path):
    """Member i is beside the posterior of folder member-i."""
    state = adapter_state(tiny_model(method="mle"))
    members = [{name: value + i for name, value in state.items()} for i in range(12)]
    Ensemble(members).save(tmp_path)
    for one, other in zip(members, Ensemble.load(tmp_path).members, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
