"""BLoB: flipout against explicit loops, its distribution, its KL, and training by it."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from scalabl_ref import (
    AdapterConfig,
    InputError,
    Llama,
    Noise,
    adapters,
    add_adapters,
)
from scalabl_ref.app.configs import find_config
from scalabl_ref.core.adapter import MIN_LOG_SIGMA, initial_matrix
from scalabl_ref.core.layer import SAMPLING
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.objective import complexity
from scalabl_ref.data import evaluation_batches
from scalabl_ref.evaluation.predict import predict_all
from scalabl_ref.methods.blob import BlobAdapter
from scalabl_ref.training.schedule import kl_weight, warmup_linear

from ..models import tiny_data, tiny_model, trainer
from ..stats import KSTest, ZTest
from ..tolerances import rounding


def random_adapter(seed=0, rank=3, d_in=5, d_out=4, layer=9, dtype=torch.float64, **config):
    """An adapter with normal A, B and G, in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    config = AdapterConfig(method="blob", rank=rank, **config)
    adapter = BlobAdapter(d_in, d_out, config, layer, 0, torch.device("cpu")).to(dtype)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


def random_input(seed=0, shape=(3, 2), d_in=5, d_out=4, dtype=torch.float64):
    """x of leading dimensions `shape`, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (*shape, d_in), (d_out, d_in), (d_out,)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.eq_10
@pytest.mark.eq_11
@given(
    st.integers(0, 2**31),
    st.sampled_from(SAMPLING),
    st.sampled_from([(3,), (3, 2), (2, 1, 3)]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_flipout_equals_a_loop_over_rows(seed, sampling, shape, with_groups, dtype):
    """Each row's A is A + diag(t) (G^2 * E) diag(u), with normals from their documented places."""
    adapter = random_adapter(seed, sampling=sampling, dtype=dtype)
    x, weight, bias = random_input(seed, shape, dtype=dtype)
    groups = torch.tensor([7, 2**32 - 1, 7][: shape[0]]) if with_groups else None
    noise = Noise(seed, 5)
    got = adapter(x, weight, bias, Keys(noise, groups)).reshape(-1, 4)
    A, B, G = (p.detach().double() for p in (adapter.A, adapter.B, adapter.G))
    E = noise.normal(9, 1, 15).view(3, 5).double()
    rows = x.reshape(-1, 5).double()
    for i, row in enumerate(rows):
        example = i // (len(rows) // shape[0])
        index = {"batch": 0, "example": example, "token": i}[sampling]
        if with_groups and sampling != "batch":
            index = groups[example]
        z = noise.normal(9 + 2**31, torch.tensor([index]), 5 + 3)[0].double()
        u, t = (1 - 2 * (z < 0).double()).split([5, 3])
        drawn = A + torch.diag(t) @ (G**2 * E) @ torch.diag(u)
        expected = weight.double() @ row + bias.double() + 2 * B @ drawn @ row
        size = weight.abs().double() @ row.abs() + bias.abs().double()
        size += 2 * B.abs() @ (A.abs() + G**2 * E.abs()) @ row.abs()
        assert ((got[i] - expected).abs() <= rounding(dtype, 5 + 3 + 8) * size).all()


def test_a_low_precision_base_does_not_round_the_adapter():
    """bfloat16 x and weight: three roundings to it, of half a unit: mean, noise, and their sum."""
    sizes = {"d_in": 32, "d_out": 64}
    adapter = random_adapter(rank=8, dtype=torch.float32, **sizes)
    x, weight, bias = random_input(dtype=torch.bfloat16, **sizes)
    weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
    got = adapter(x, weight, bias, Keys(Noise(0, 0)))
    arguments = x.double(), weight.double(), bias.double()
    exact, mean = (adapter.double()(*arguments, keys) for keys in (Keys(Noise(0, 0)), None))
    assert got.dtype == torch.bfloat16
    size = exact.abs() + mean.abs() + (exact - mean).abs()
    bound = rounding(torch.bfloat16, 1) / 2 * size * 1.05  # second order, and float32's own
    assert ((got - exact).abs() <= bound).all()


def test_no_sign_is_used_twice_and_none_is_an_entry_of_E(monkeypatch):
    """In a run E belongs to a draw and a layer, for all batches; signs are asked for once."""
    used, original = {"E": Counter(), "signs": Counter()}, Noise.normal

    def record(self, layer, groups, rank, draws=None):
        one = isinstance(groups, int)
        kind, ids = ("E", range(groups)) if one else ("signs", groups.unique_consecutive().tolist())
        used[kind].update((self.draw, layer, g) for g in ids)
        assert draws is None  # flipout's draws never go through a layer together
        return original(self, layer, groups, rank)

    monkeypatch.setattr(Noise, "normal", record)
    t = trainer(model={"method": "blob"})
    for _ in range(5):
        t.step()
    predict_all(t.model, evaluation_batches(tiny_data(), 4), samples=3)
    layers = len(t.adapters)
    assert len(used["E"]) == (5 + 3) * layers and len(used["signs"]) > 40 * layers
    assert set(used["signs"].values()) == {1}
    assert not used["E"].keys() & used["signs"].keys()


# --- distribution --------------------------------------------------------------------------------

SPREAD = torch.tensor([0.5, 2.0, 1.0, 0.25, 1.5, 0.75, 1.0, 3.0])
TWO = torch.tensor(
    [[1.0, -0.5, 2.0, 1.5, -1.0, 0.5, 1.0, 0.25], [0.5, 1.0, -1.0, 1, 1, 2, 0.5, 0.5]]
)
ROWS = 256


@lru_cache(maxsize=1)
def two_examples(seed: int, n: int) -> torch.Tensor:
    """The r scaled updates of A x in n / r draws, for two examples: (2, n), N(0, 1) if right."""
    config = AdapterConfig(method="blob", rank=ROWS, alpha=ROWS)
    adapter = BlobAdapter(8, ROWS, config, 3, 0, torch.device("cpu"))
    with torch.no_grad():
        adapter.A.zero_()
        adapter.B.copy_(torch.eye(ROWS))
        adapter.G.copy_(SPREAD.sqrt().expand(ROWS, 8))
        weight = torch.zeros(ROWS, 8)
        draws = [adapter(TWO, weight, None, Keys(Noise(seed, i))) for i in range(n // ROWS)]
    sd = (TWO * SPREAD).double().square().sum(1).sqrt()
    return torch.cat(draws, dim=1).double() / sd[:, None]


UPDATES = KSTest(
    "blob: distribution of an update",
    lambda seed, n: torch.special.ndtr(two_examples(seed, n)[0]),
    n=2**16,
    replay=2**10,
)

# Of one product: E[a^2 b^2] = 1 + 2 E[rho^2], where rho is the correlation given the signs.
SQUARES = (TWO * SPREAD).double().square()
PRODUCT_SD = float(1 + 2 * SQUARES.prod(0).sum() / SQUARES.sum(1).prod()) ** 0.5

EXAMPLES = ZTest(
    "blob: correlation of two examples",
    lambda seed, n: float(two_examples(seed, n).prod(0).mean()),
    n=2**16,
    replay=2**10,
    sd=PRODUCT_SD,
)


@pytest.mark.eq_10
@pytest.mark.eq_11
def test_an_examples_update_has_the_distribution_intended():
    UPDATES.check(seed=0)


def test_two_examples_of_a_draw_are_uncorrelated():
    """Though they share E: what the signs are for."""
    EXAMPLES.check(seed=0)


# --- KL ------------------------------------------------------------------------------------------


@pytest.mark.eq_12
@given(st.integers(0, 2**31), st.sampled_from([0.01, 0.2, 1.0, 30.0]), st.integers(1, 3))
def test_kl_equals_torch_distributions_and_its_gradient_the_closed_form(seed, prior_std, count):
    layers = [random_adapter(seed + i, d_in=4 + i, prior_std=prior_std) for i in range(count)]
    kl = BlobAdapter.complexity(layers, "forward")
    expected, size = 0.0, 0.0
    p = Normal(*torch.tensor([0.0, prior_std], dtype=torch.float64))
    for layer in layers:
        terms = torch_kl(Normal(layer.A, layer.G**2), p)
        expected, size = expected + terms.sum(), size + terms.abs().sum() + 20 * terms.numel()
    assert abs(kl - expected) <= rounding(torch.float64, 16) * size
    kl.backward()
    for A, G in ((layer.A, layer.G) for layer in layers):
        a, g = A.detach(), G.detach()
        parts = 2 / g, 2 * g**3 / prior_std**2
        near = rounding(torch.float64, 16)
        assert ((A.grad - a / prior_std**2).abs() <= near * a.abs() / prior_std**2).all()
        bound = near * (parts[0].abs() + parts[1].abs())
        assert ((G.grad - (parts[1] - parts[0])).abs() <= bound).all()


def test_the_models_kl_is_in_float64_and_has_one_direction():
    model = tiny_model(method="blob")
    kl = complexity(model)
    assert kl.dtype == torch.float64 and kl > 0
    with pytest.raises(InputError, match="method blob has only the KL 'forward', not 'official'"):
        complexity(model, "official")


# --- start, bounds, training ---------------------------------------------------------------------


def test_the_start_is_the_official_codes():
    """A Kaiming-uniform, G uniform in [.05 / sqrt 2, .05], each entry its own; B = 0; prior 0.2."""
    model = tiny_model(method="blob", wake=False, seed=4)
    entries = []
    for adapter in adapters(model).values():
        assert adapter.config.prior_std == 0.2 and not adapter.B.any()
        matrix, _ = initial_matrix(4, adapter.layer, *adapter.A.shape)
        assert torch.equal(adapter.A, matrix.float())
        assert (adapter.G >= 0.05 / 2**0.5 * (1 - 1e-6)).all() and (adapter.G <= 0.05).all()
        assert torch.equal(adapter.widths(), adapter.G.square().flatten())
        entries += adapter.G.flatten().tolist()
    assert len(set(entries)) == len(entries)
    assert AdapterConfig(method="blob", prior_std=0.7).prior_std == 0.7
    assert AdapterConfig(method="map").prior_std == AdapterConfig().prior_std == 1.0


def test_the_count_is_the_papers():
    model = Llama(find_config("llama-2-7b"), device="meta")
    own = adapters(add_adapters(model, AdapterConfig("blob"))).values()
    assert sum(p.numel() for adapter in own for p in adapter.parameters()) == 6_612_992


def test_omega_is_bounded_below_on_either_side():
    adapter = random_adapter(dtype=torch.float32)
    before = adapter.G.detach().clone()
    with torch.no_grad():
        adapter.G[0, :2] = torch.tensor([0.0, -1e-9])
    adapter.bound_()
    least = torch.tensor(MIN_LOG_SIGMA / 2).exp()
    expected = before.clone()
    expected[0, :2] = torch.stack([least, -least])
    assert (adapter.G - expected).abs().max() <= rounding(torch.float32, 4) * least
    assert torch.isfinite(BlobAdapter.complexity([adapter], "forward"))


def test_training_learns_means_and_widths():
    t = trainer(steps=60, lr=3e-2, beta=0.001, model={"method": "blob"})
    before = [(a.A.clone(), a.G.clone()) for a in t.adapters]
    assert len(t.variational) == len(t.adapters)
    records = [t.step() for _ in range(60)]
    losses = [record["nll"] for record in records]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]) and records[-1]["sigma"] > 0
    for adapter, (A, G) in zip(t.adapters, before, strict=True):
        assert not torch.equal(adapter.A, A) and not torch.equal(adapter.G, G)


def test_the_official_objective_steps_the_kl_of_mean_and_width(monkeypatch):
    """With lr = 0 only SGD is left: A and G move by kl_lr * pi * gradient of the KL, B stays."""
    model = {"method": "blob", "prior_std": 0.5}
    settings = {"objective": "official", "kl_lr": 1e-3, "kl_gamma": 3.0}
    t = trainer(steps=6, lr=0.0, warmup=0.0, model=model, **settings)
    monkeypatch.setattr("scalabl_ref.training.trainer.kl_period", lambda n, b, gamma: 2 * gamma)
    before = [[p.detach().double() for p in (a.A, a.G, a.B)] for a in t.adapters]
    t.done = 5  # where the weight is not negligible
    t.step()
    rate = 1e-3 * warmup_linear(5, 6, 0.0) * kl_weight(5, 6)
    for adapter, (A, G, B) in zip(t.adapters, before, strict=True):
        moved = A - rate * A / 0.25, G - rate * (2 * G**3 / 0.25 - 2 / G)
        for new, old in zip((adapter.A, adapter.G), moved, strict=True):
            assert ((new - old).abs() <= rounding(torch.float32, 4) * old.abs()).all()
        assert torch.equal(adapter.B.double(), B)
        assert (moved[1] != G).all()
