"""Variants of our method and the small baselines: covariance, fitted priors, MAP, dropout."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal
from torch.distributions import kl_divergence as torch_kl

from scalabl_ref import AdapterConfig, InputError, Noise, adapters, elbo, kl_forward, predict
from scalabl_ref.core.config import ADAPTERS
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.objective import complexity
from scalabl_ref.methods import Ensemble, Swag
from scalabl_ref.model.attach import Linear, add_adapters
from scalabl_ref.support.tensors import load_tensors, save_tensors
from scalabl_ref.training.runs import adapter_state

from ..models import TINY, tiny_batch, tiny_model
from ..stats import ZTest
from ..tolerances import rounding

gaussians = st.lists(st.tuples(st.floats(-2, 2), st.floats(-3, 1)), min_size=3, max_size=3)


def layer(seed: int = 0, **config):
    """A linear layer 6 -> 5 with an adapter of rank 3 whose B is awake, in float64."""
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.ModuleDict({"q_proj": Linear(6, 5)})
    model["q_proj"].weight.data = torch.randn(5, 6, generator=g)
    add_adapters(model, AdapterConfig(rank=3, targets=("q_proj",), **config), seed)
    adapter = model["q_proj"].adapter
    adapter.B.data = torch.randn(5, 3, generator=g)
    if hasattr(adapter, "lower"):
        adapter.lower.data = torch.randn(3, generator=g) / 4
    return model.double()["q_proj"], model


# --- full covariance ------------------------------------------------------------------------------


@given(gaussians, st.floats(0.1, 3), st.integers(0, 1000))
def test_full_kl_equals_torch_distributions(pairs, prior_std, seed):
    linear, model = layer(seed, covariance="full", prior_std=prior_std)
    log_s, log_sigma = (torch.tensor(c, dtype=torch.float64) for c in zip(*pairs, strict=True))
    linear.adapter.log_s.data, linear.adapter.log_sigma.data = log_s, log_sigma
    q = MultivariateNormal(log_s.exp(), scale_tril=linear.adapter.factor())
    p = MultivariateNormal(torch.zeros(3).double(), prior_std**2 * torch.eye(3).double())
    expected = torch_kl(q, p)
    assert abs(complexity(model) - expected) <= rounding(torch.float64, 500) * (10 + expected)


def test_full_covariance_starts_as_the_diagonal_one():
    diagonal, full = tiny_model(), tiny_model(covariance="full")
    batch = tiny_batch()
    for noise in (None, Noise(1, 2)):
        one, other = (elbo(m, batch, noise, 1.0, 10) for m in (diagonal, full))
        for a, b in zip(one, other, strict=True):
            assert abs(a - b) <= rounding(torch.float32, 64) * abs(a)


def test_full_forward_is_the_definition_row_by_row():
    linear, _ = layer(3, covariance="full", alpha=4.5)
    adapter, x = linear.adapter, torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    x = x.double()
    ids = torch.tensor([9, 4])
    y = linear(x, Keys(Noise(5, 6), ids))
    for row, id in enumerate(ids):
        eps = Noise(5, 6).normal(adapter.layer, id[None], 3)[0].double()
        drawn = adapter.log_s.exp() + adapter.factor() @ eps
        matrix = linear.weight + 1.5 * adapter.B @ torch.diag(drawn) @ adapter.A
        assert (y[row] - x[row] @ matrix.T).abs().max() <= rounding(torch.float64, 200)


def test_full_gradients_equal_differences():
    linear, model = layer(4, covariance="full")
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).double()
    names = ("A", "B", "log_s", "log_sigma", "lower")
    values = [linear.adapter.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def function(*tensors):
        named = {f"adapter.{n}": t for n, t in zip(names, tensors, strict=True)}
        return torch.func.functional_call(linear, named, (x, Keys(Noise(1, 2))))

    assert torch.autograd.gradcheck(function, values)


# --- fitted priors --------------------------------------------------------------------------------


@given(gaussians, gaussians, st.sampled_from(["layer", "component"]), st.booleans())
def test_the_fitted_prior_is_the_best_one(pairs, others, prior, full):
    """No other sigma_p, of each layer or of each scale, gives a smaller forward KL."""
    covariance = "full" if full else "diagonal"
    linear, model = layer(0, prior=prior, covariance=covariance)
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


def second_moments(adapter):
    """E s~_k^2, (r,)."""
    own = hasattr(adapter, "factor")
    L = adapter.factor() if own else torch.diag(adapter.log_sigma.exp())
    return adapter.log_s.exp().square() + L.square().sum(1)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@given(st.floats(-3, 3), st.integers(0, 1000))
def test_with_a_fitted_prior_the_scale_has_no_say(covariance, log_k, seed):
    """(s, sigma) / k with k B is the same function at the same KL; with a fixed prior it is not."""
    k = torch.tensor(log_k, dtype=torch.float64).exp()
    for prior in ("layer", "component", "fixed"):
        linear, model = layer(seed, prior=prior, covariance=covariance)
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
    linear, model = layer(prior="component")
    s, sigma = linear.adapter.scale()
    expected = (1 + (s / sigma) ** 2).log().sum() / 2
    assert abs(complexity(model) - expected) <= rounding(torch.float64, 64) * expected


KINDS_OF_ADAPTER = [{"method": name} for name in ADAPTERS] + [{"covariance": "full"}]


@pytest.mark.parametrize("kind", KINDS_OF_ADAPTER, ids=lambda kind: "".join(kind.values()))
def test_all_kinds_round_alike(kind):
    """The low-rank part is as wide as the input and the adapter, with autocast or without."""
    linear = tiny_model(**kind).layers[0].attn.q_proj
    with torch.no_grad():
        for name, parameter in linear.adapter.named_parameters():
            if name not in ("A", "B"):  # with exact exponentials and squares
                parameter.fill_(0.0 if name.startswith("log") else 0.5)

    def on(dtype: torch.dtype):
        layer = copy.deepcopy(linear)
        layer.weight.data = layer.weight.data.to(dtype)
        return layer

    x = torch.randn(2, 3, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    noise = Keys(Noise(1, 2))
    exact = copy.deepcopy(linear).double()(x.double(), noise)
    wide = on(torch.float64)(x.double(), noise)
    assert wide.dtype == torch.float64
    assert (wide - exact).abs().max() <= rounding(torch.float64, 512) * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        low = linear(x, noise)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, on(torch.bfloat16)(x.bfloat16(), noise))


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


# --- MAP ------------------------------------------------------------------------------------------


def test_map_adds_minus_the_log_prior():
    model = tiny_model(method="map", prior_std=0.5)
    own = [p for a in adapters(model).values() for p in (a.A, a.B)]
    prior = torch.distributions.Normal(0.0, 0.5)
    density = sum(prior.log_prob(p.double()).sum() for p in own)
    constant = sum(p.numel() for p in own) * prior.log_prob(torch.tensor(0.0)).double()
    expected = constant - density
    assert abs(complexity(model) - expected) <= rounding(torch.float32, 64) * expected
    assert torch.equal(
        predict(model, tiny_batch(), samples=3).probs, predict(model, tiny_batch(), samples=0).probs
    )


# --- dropout --------------------------------------------------------------------------------------


def kept_inputs(seed: int, n: int) -> float:
    """Share of inputs that pass a layer which copies them, less 1 - p; by 30 columns a row."""
    model = torch.nn.ModuleDict({"q_proj": Linear(30, 30)})
    model["q_proj"].weight.data = torch.zeros(30, 30)
    config = AdapterConfig("dropout", rank=30, alpha=30.0, targets=("q_proj",), dropout=0.3)
    adapter = add_adapters(model, config)["q_proj"].adapter
    adapter.A.data = adapter.B.data = torch.eye(30)
    y = model["q_proj"](torch.ones(n // 30, 30), Keys(Noise(seed, 0)))
    scaled = torch.unique(y.detach())
    assert len(scaled) == 2 and scaled[0] == 0 and abs(scaled[1] * 0.7 - 1) < 1e-6
    return float((y > 0).double().mean()) - 0.7


KEPT = ZTest(
    "dropout: share kept", kept_inputs, n=120_000, sd=0.21**0.5, skew=-0.4 / 0.21**0.5, replay=3000
)


def test_dropout_keeps_the_share_it_should():
    KEPT.check(seed=1)


def test_dropout_is_plain_lora_on_thinned_inputs():
    linear, _ = layer(2, method="dropout", dropout=0.4)
    plain, _ = layer(2, method="mle")
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).double()
    ids = torch.tensor([8, 1])
    z = Noise(3, 4).normal(linear.adapter.layer, ids, 6).double()
    mask = (torch.special.ndtr(z) >= 0.4).double() / 0.6  # (2, 6): for all tokens of an example
    update = plain(x * mask[:, None], None) - (x * mask[:, None]) @ plain.weight.T
    expected = x @ linear.weight.T + update
    got = linear(x, Keys(Noise(3, 4), ids))
    assert (got - expected).abs().max() <= rounding(torch.float64, 200)
    assert torch.equal(linear(x, None), plain(x, None))


def test_dropout_masks_follow_the_token_where_asked():
    model = tiny_model(method="dropout", sampling="token", dropout=0.5)
    prediction = predict(model, tiny_batch(), samples=5)
    assert (prediction.mutual_information > 0).all()
    again = predict(model, tiny_batch(), samples=5)
    assert torch.equal(prediction.probs, again.probs)


def test_each_scale_may_have_its_own_prior():
    s, sigma = torch.ones(2).double(), torch.ones(2).double()
    both = kl_forward(s, sigma, torch.tensor([1.0, 2.0]).double())
    apart = kl_forward(s[:1], sigma[:1], 1.0) + kl_forward(s[1:], sigma[1:], 2.0)
    assert both == apart


# --- ensembles and SWAG ---------------------------------------------------------------------------


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


def test_swag_draws_the_same_once_it_is_loaded(tmp_path):
    """Of more layers than ten, whose names are not in the order of their numbers."""
    model, swag = tiny_model(method="mle", layers=11), Swag()
    for step in range(2):
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.A.add_(step)
        swag.collect(model)
    swag.save(tmp_path / "swag")
    drawn, again = (s.draw(Noise(0, 0)) for s in (swag, Swag.load(tmp_path / "swag")))
    assert drawn.keys() == again.keys()
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_swag_keeps_a_width_far_below_its_mean(tmp_path):
    """Of 3e-5 of it, whose square float32 would round away; a float32 file can still be read."""
    model, swag, seen = tiny_model(method="mle", targets=("q_proj",)), Swag(), []
    generator = torch.Generator().manual_seed(0)
    [*_, (layer, adapter)] = adapters(model).items()
    for _ in range(5):
        adapter.A.data = 3 + 1e-4 * torch.randn(adapter.A.shape, generator=generator)
        swag.collect(model)
        seen.append(adapter.A.detach().double())
    swag.save(tmp_path)
    expected, name = torch.stack(seen).std(0, correction=0), f"{layer}.A"
    z = Noise(7, 0).normal(2**31 + sorted(swag.mean).index(name), 1, expected.numel())
    z = z.view(expected.shape).double()
    for made in (swag, Swag.load(tmp_path)):
        width = (made.draw(Noise(7, 0))[name] - made.mean[name]) / z
        bound = rounding(torch.float64, 64) * 9 / expected + rounding(torch.float64, 9) / z.abs()
        assert ((width - expected).abs() <= bound).all()
    tensors, metadata = load_tensors(file := tmp_path / "swag.safetensors")
    save_tensors(file, ((n, tensor.float()) for n, tensor in tensors.items()), metadata)
    old = Swag.load(tmp_path)
    old.collect(model)
    drawn = old.draw(Noise(7, 0))
    assert old.count == 6 and {value.dtype for value in drawn.values()} == {torch.float64}


def test_swag_is_a_gaussian_through_the_iterates():
    model, swag, seen = tiny_model(method="mle"), Swag(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for adapter in adapters(model).values():
            adapter.A.data += torch.randn(adapter.A.shape, generator=generator)
        swag.collect(model)
        seen.append(adapter_state(model)["lm_head.A"].clone().double())
    mean, sd = torch.stack(seen).mean(0), torch.stack(seen).std(0, correction=0)
    assert (swag.mean["lm_head.A"] - mean).abs().max() <= rounding(torch.float32, 64)
    draws = [swag.draw(Noise(7, i))["lm_head.A"].double() for i in range(2)]
    eps = [(draw - mean) / sd for draw in draws]
    index = sorted(swag.mean).index("lm_head.A")
    for i in range(2):
        z = Noise(7, i).normal(2**31 + index, 1, mean.numel()).view(mean.shape)
        assert (eps[i] - z).abs().max() <= rounding(torch.float32, 1e4)
    unmoved = swag.draw(Noise(7, 0))["lm_head.B"]
    assert torch.equal(unmoved, swag.mean["lm_head.B"])
    prediction = predict(model, tiny_batch(), samples=4, posterior=swag)
    assert (prediction.mutual_information > 0).all()
    with pytest.raises(InputError, match="no iterate"):
        predict(model, tiny_batch(), posterior=Swag())
