"""TFB: the rotation keeps the function, the width is as asked, the search ends where it says."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import InputError, Llama, Noise, adapters
from scalabl_ref.core.noise import FIRST_TRAINING_DRAW
from scalabl_ref.core.objective import class_logits
from scalabl_ref.methods import ensemble, fit_tfb
from scalabl_ref.methods.tfb import largest

from ..models import TINY, tiny_batch, tiny_model
from ..tolerances import logits_bound, rounding

SAMPLES, RESOLUTION = 3, 0.01


def converted(change=lambda adapter: None, rank=4, method="mle", **settings):
    """(model before, model after, sigma_q, the calibration batch), with B changed before."""
    before, after = (tiny_model(method=method, rank=rank) for _ in range(2))
    with torch.no_grad():
        for model in (before, after):
            for adapter in adapters(model).values():
                change(adapter)
    batch = tiny_batch(rows=6)
    settings = {"tolerance": 0.1, "samples": SAMPLES, "resolution": RESOLUTION, **settings}
    return before, after, fit_tfb(after, [batch], **settings), batch


def no_change(adapter):
    pass


def dead_row_and_column(adapter):
    adapter.B[1], adapter.B[:, 2] = 0.0, 0.0


def repeated_column(adapter):
    adapter.B[:, 1] = 2 * adapter.B[:, 0]


def tiny_direction(adapter):
    adapter.B[:, 1] *= 1e-3


CHANGES = (no_change, dead_row_and_column, repeated_column, tiny_direction)


@pytest.mark.eq_13
@pytest.mark.parametrize("change", CHANGES)
def test_the_rotation_keeps_the_function(change):
    before, after, _, batch = converted(change)
    expected = before(batch.tokens)
    bound = logits_bound(TINY, expected.abs().max().item())
    assert (after(batch.tokens) - expected).abs().max() <= bound
    for name, adapter in adapters(after).items():
        old = adapters(before)[name]
        update, own = old.B.double() @ old.A.double(), adapter.B.double() @ adapter.A.double()
        assert (own - update).abs().max() <= rounding(torch.float32, 16) * update.norm()
        gram = adapter.B.double().T @ adapter.B.double()
        off = gram - gram.diag().diag()
        assert off.abs().max() <= rounding(torch.float32, 16) * gram.diag().max()


@pytest.mark.eq_13
@pytest.mark.parametrize("change", CHANGES)
def test_the_update_has_the_covariance_intended(change):
    """Of each column of B A: sigma_q^2 times the projector on the columns of B, by pinv(B).

    B has 3 rows in lm_head, fewer than the rank. One of its directions is as uncertain as another,
    however small its d.
    """
    before, after, sigma, _ = converted(change)
    for name, adapter in adapters(after).items():
        B = adapters(before)[name].B.double()
        projector = B @ torch.linalg.pinv(B, rtol=1e-6)  # below: no rank, but float32's rounding
        own = adapter.B.double() * adapter.omega().double().T
        size = rounding(torch.float32, 2**13)  # the smallest direction is 1e-3 of the largest
        assert (own @ own.T / sigma**2 - projector).abs().max() <= size
        assert torch.linalg.matrix_rank(projector) == (adapter.sigma > 0).sum() >= 2


@torch.no_grad()
def relative_change(model, batch, factor=1.0, samples=SAMPLES, seed=0) -> float:
    """Of the NLL of the mean model's answers, under sigma_q times `factor`."""
    answers = range(len(batch.ids)), class_logits(model, batch, None).argmax(-1)
    draws = [Noise(seed, FIRST_TRAINING_DRAW + i) for i in range(samples)]
    for adapter in adapters(model).values():
        adapter.sigma.mul_(factor)
    nlls = []
    for noises in ([None], draws):
        probs = [class_logits(model, batch, noise).double().softmax(-1) for noise in noises]
        nlls.append(-(sum(probs) / len(probs))[answers].log().mean().item())
    for adapter in adapters(model).values():
        adapter.sigma.div_(factor)
    return nlls[1] / nlls[0] - 1


@pytest.mark.eq_14
@pytest.mark.parametrize("method", ["mle", "map"])
def test_sigma_satisfies_the_tolerance_and_the_next_does_not(method):
    _, model, sigma, batch = converted(method=method)
    assert 1e-4 < sigma < 1
    beyond = relative_change(model, batch, 1 + RESOLUTION)
    assert 0 < relative_change(model, batch) <= 0.1 < beyond < 0.11


def test_the_defaults_are_those_of_the_page():
    """docs/method.md."""
    parameters = inspect.signature(fit_tfb).parameters.values()
    defaults = [p.default for p in parameters if p.default is not p.empty]
    assert defaults == [0.003, 10, 0, (1e-4, 1.0), 0.01]


def test_a_change_for_the_better_counts_as_well():
    """By one draw alone the mean model's answers can become more likely."""
    changes = []
    for seed in range(6):
        _, model, _, batch = converted(samples=1, seed=seed)
        changes.append(relative_change(model, batch, samples=1, seed=seed))
    assert min(changes) < -0.09 and all(abs(change) <= 0.1 for change in changes)


def test_labels_are_not_used_and_the_seed_decides():
    model, again, other = (tiny_model(method="mle") for _ in range(3))
    batch = tiny_batch(rows=6)
    found = fit_tfb(model, [batch], 0.1, SAMPLES)
    batch.labels[:] = 0
    assert fit_tfb(again, iter([batch]), 0.1, SAMPLES) == found
    assert fit_tfb(other, [batch], 0.1, SAMPLES, seed=1) != found


@given(st.floats(1e-3, 2.0), st.floats(1e-3, 1.0), st.floats(1e-8, 10.0))
def test_the_search_ends_within_its_resolution_on_the_side_that_fits(edge, low, resolution):
    high = 2 * low
    if edge < low:
        with pytest.raises(InputError, match=r"no sigma in \[.*\] satisfies the tolerance"):
            largest(lambda x: x <= edge, low, high, resolution)
        return
    found = largest(lambda x: x <= edge, low, high, resolution)
    assert found <= edge
    assert found == high if edge >= high else found * (1 + resolution) * (1 + 1e-15) > edge


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_a_search_that_cannot_be_is_refused(bounds):
    with pytest.raises(InputError, match="cannot search"):
        largest(lambda x: True, *bounds, 0.01)
    with pytest.raises(InputError, match="cannot search"):
        largest(lambda x: True, 1.0, 2.0, 0.0)


def test_the_upper_end_is_returned_where_it_fits():
    _, model, sigma, _ = converted(bounds=(1e-4, 1e-3), tolerance=10.0)
    assert sigma == 1e-3
    own = [a.sigma * a.B.norm(dim=0) for a in adapters(model).values()]
    assert all((w.max() / 1e-3 - 1).abs() <= rounding(torch.float32, 8) for w in own)


def test_an_untrained_adapter_has_nothing_to_be_uncertain_about():
    """B = 0: no width, whatever sigma_q is."""
    _, model, sigma, batch = converted(lambda adapter: adapter.B.zero_())
    assert sigma == 1.0
    assert not any(adapter.widths().any() for adapter in adapters(model).values())
    assert torch.equal(model(batch.tokens, noise=Noise(0, 0)), model(batch.tokens))


def test_a_model_that_cannot_be_widened_stays_as_it_was():
    model = tiny_model(method="mle")
    before = adapters(model)
    with pytest.raises(InputError, match=r"no sigma in \[0.0001, 1.0\] satisfies the tolerance"):
        fit_tfb(model, [tiny_batch()], tolerance=0.0, samples=SAMPLES)
    assert all(adapters(model)[name] is adapter for name, adapter in before.items())
    with pytest.raises(InputError, match="samples must be at least 1"):
        fit_tfb(model, [tiny_batch()], samples=0)
    with pytest.raises(InputError, match="q_proj: tfb starts from mle or map, not scalabl"):
        fit_tfb(tiny_model(), [tiny_batch()])
    with pytest.raises(InputError, match="no examples to find the width by"):
        fit_tfb(model, [])
    with pytest.raises(InputError, match="the model has no adapters"):
        fit_tfb(Llama(TINY).init_random_(), [tiny_batch()])
    assert all(adapters(model)[name] is adapter for name, adapter in before.items())


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_model_whose_search_is_cut_short_stays_as_it_was(passes, monkeypatch):
    """Whatever the error, and however far it came."""
    model, left = tiny_model(method="mle"), [None] * passes

    def interrupted(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return class_logits(*arguments)

    before = adapters(model)
    monkeypatch.setattr(ensemble, "class_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_tfb(model, [tiny_batch()], samples=SAMPLES)
    assert not left and all(adapters(model)[name] is adapter for name, adapter in before.items())
