"""What every adapter and every posterior must do: a new one that is listed is tested by itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from scalabl_ref import InputError, Llama, Noise, adapters, elbo, load_run, predict, save_run
from scalabl_ref.core.adapter import SubspaceAdapter, adapter_state
from scalabl_ref.core.config import ADAPTERS, COVARIANCES
from scalabl_ref.core.layer import SAMPLING
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.objective import class_logits
from scalabl_ref.methods import POSTERIORS, Ensemble, Laplace, Subspace, Swag, load_posterior
from scalabl_ref.training.runs import load_adapter_state

from ..models import CLASSES, TINY, tiny_batch, tiny_model
from ..tolerances import central_difference, logits_bound, rounding

KINDS = [(method, covariance) for covariance, kinds in COVARIANCES.items() for method in kinds]
TRAINED = [kind for kind in KINDS if ADAPTERS[kind[0]].trained]
SCALABL = ("scalabl", "diagonal")

each_kind = pytest.mark.parametrize("kind", KINDS, ids="-".join)
each_trained_kind = pytest.mark.parametrize("kind", TRAINED, ids="-".join)
each_sampling = pytest.mark.parametrize("sampling", SAMPLING)


@torch.no_grad()
def made(kind, seed=0, **config) -> Llama:
    """A tiny model of that kind whose parameters are off their start, where zeros hide faults."""
    method, covariance = kind
    config = {"init_sigma": 1.0, "dropout": 0.3, **config}
    model = tiny_model(seed, method=method, covariance=covariance, **config)
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model).values():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return model


@each_kind
def test_parameters_are_float32_whatever_the_default(kind):
    """So that steps of 1e-3 change them, even where bfloat16 is the default."""
    right = [p for adapter in adapters(made(kind)).values() for p in adapter.parameters()]
    torch.set_default_dtype(torch.bfloat16)
    try:
        adapter_list = adapters(tiny_model(method=kind[0], covariance=kind[1])).values()
    finally:
        torch.set_default_dtype(torch.float32)
    found = [p for adapter in adapter_list for p in adapter.parameters()]
    assert [(p.shape, p.dtype) for p in found] == [(p.shape, torch.float32) for p in right]


def kind_of(kind):
    return COVARIANCES[kind[1]][kind[0]]


@torch.no_grad()
def logits(model, noise, batch=None):
    return class_logits(model, batch or tiny_batch(), noise)


@torch.no_grad()
def merged(model, noise) -> Llama:
    """The model whose weights are W + c B A', without adapters; A' is the export of `noise`."""
    plain = copy.deepcopy(model)
    for name, adapter in adapters(model).items():
        linear = plain.get_submodule(name)
        linear.weight += adapter.config.scaling * adapter.B @ adapter.lora_A(noise)
        linear.adapter = None
    return plain


def rows(batch, order):
    names = ("tokens", "lengths", "labels", "ids")
    return replace(batch, **{name: getattr(batch, name)[order] for name in names})


def close(a, b) -> bool:
    """Equal to rounding, of float32 models."""
    return bool((a - b).abs().max() <= logits_bound(TINY, b.abs().max().item()))


def apart(a, b) -> bool:
    return bool((a - b).abs().max() > 1e-3 * b.abs().max())


# --- adapters: the start --------------------------------------------------------------------------


@each_kind
def test_a_fresh_adapter_changes_nothing(kind):
    method, covariance = kind
    fresh = tiny_model(method=method, covariance=covariance, wake=False)
    base = tiny_model(method="mle", wake=False)
    for noise in (None, Noise(0, 0)):
        assert torch.equal(logits(fresh, noise), logits(base, None))


@each_kind
def test_the_start_is_a_pure_function_of_seed_and_layer(kind):
    method, covariance = kind
    same, again, other = (tiny_model(s, method=method, covariance=covariance) for s in (0, 0, 1))
    first, second, third = map(adapter_state, (same, again, other))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    matrices = [name for name in first if name.endswith(".A")]
    assert not any(torch.equal(first[name], third[name]) for name in matrices)
    assert not torch.equal(*(first[name] for name in matrices[:2]))


# --- adapters: the mean and the draws ------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("noise", [None, Noise(3, 4)], ids=["mean", "draw"])
def test_the_export_is_the_function(kind, noise):
    """The mean model, and under sampling "batch" each draw, is a plain LoRA."""
    model = made(kind, sampling="batch").double()
    expected = logits(merged(model, noise), None)
    bound = logits_bound(TINY, expected.abs().max().item(), torch.float64)
    assert (logits(model, noise) - expected).abs().max() <= bound


@each_kind
@each_sampling
def test_draws_differ_iff_they_are_random(kind, sampling):
    model, random = made(kind, sampling=sampling), kind_of(kind).random
    draw, mean = logits(model, Noise(1, 2)), logits(model, None)
    assert torch.equal(draw, logits(model, Noise(1, 2)))
    assert torch.equal(mean, logits(model, None))
    for other in (mean, logits(model, Noise(1, 3)), logits(model, Noise(2, 2))):
        assert apart(draw, other) if random else torch.equal(draw, other)


@each_kind
@each_sampling
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(kind, sampling):
    """It depends on the example's id, where examples do not share a draw."""
    model, batch, order = made(kind, sampling=sampling), tiny_batch(), torch.tensor([2, 0, 3])
    whole, part = logits(model, Noise(1, 2), batch)[order], rows(batch, order)
    assert close(logits(model, Noise(1, 2), part), whole)
    other = logits(model, Noise(1, 2), replace(part, ids=part.ids + 7))
    own = kind_of(kind).random and sampling != "batch"
    assert apart(other, whole) if own else close(other, whole)


@each_kind
@each_sampling
def test_sampling_says_which_rows_share_a_draw(kind, sampling):
    """A layer is given the same input in 2 x 3 rows: the first one, before any position is seen."""
    model, seen = made(kind, sampling=sampling), []
    layer = model.layers[0].attn.q_proj
    with layer.register_forward_hook(lambda module, inputs, y: seen.append(y)), torch.no_grad():
        model(torch.full((2, 3), 7), noise=Noise(1, 2))
    y = seen[0].reshape(2, 3, -1)
    random = kind_of(kind).random
    of_tokens, of_examples = (y[:, :1].expand_as(y), y), (y[:1].expand_as(y), y)
    assert apart(*of_tokens) if random and sampling == "token" else close(*of_tokens)
    assert apart(*of_examples) if random and sampling != "batch" else close(*of_examples)


@each_kind
def test_draw_i_of_a_prediction_is_noise_seed_i(kind):
    """Whether the draws go through the model together or one by one."""
    model = made(kind)
    each = [logits(model, Noise(9, i)).double().softmax(-1) for i in range(3)]
    expected = torch.stack(each).mean(0)
    found = predict(model, tiny_batch(), samples=3, seed=9)
    assert close(found.probs, expected)
    assert (found.mutual_information > 0).all() == kind_of(kind).random
    mean = predict(model, tiny_batch(), samples=0, seed=9)
    assert close(mean.probs, logits(model, None).double().softmax(-1))


@each_kind
def test_all_kinds_round_alike(kind):
    """The low-rank part is as wide as the input and the adapter, with autocast or without."""
    linear = made(kind).layers[0].attn.q_proj
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


@each_kind
@each_sampling
def test_the_update_is_that_of_the_layer(kind, sampling):
    """`update`, which quantised layers add, is the adapted layer less the base."""
    linear = made(kind, sampling=sampling).layers[0].attn.q_proj
    x = torch.randn(2, 3, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    groups, draws = (torch.tensor(v) for v in ([7, 4], [0, 1]))
    noise = Noise(1, 2)
    for keys in (None, Keys(noise), Keys(noise, groups), Keys(noise, groups, draws)):
        if keys is None or keys.draws is None or linear.adapter.joint:
            with torch.no_grad():
                y, base = linear(x, keys), torch.nn.functional.linear(x, linear.weight)
                found = linear.adapter.update(x, keys)
            assert (found - (y - base)).abs().max() <= rounding(torch.float32, 64) * y.abs().max()


# --- adapters: training ---------------------------------------------------------------------------


@pytest.mark.eq_20
@each_trained_kind
@each_sampling
def test_gradients_are_the_slopes_of_the_objective(kind, sampling):
    """By every name of a parameter, along one unit direction, against central differences."""
    model = made(kind, sampling=sampling).double()
    step, batch = 1e-5, tiny_batch()

    def objective():
        return elbo(model, batch, Noise(1, 2), 1.0, 10).loss

    objective().backward()
    generator, by_name = torch.Generator().manual_seed(5), {}
    for adapter in adapters(model).values():
        for name, parameter in adapter.named_parameters():
            direction = torch.randn(parameter.shape, generator=generator).double()
            by_name.setdefault(name, []).append((parameter, direction))
    for name, pairs in by_name.items():
        length = sum(v.square().sum() for _, v in pairs) ** 0.5
        pairs = [(p, v / length) for p, v in pairs]
        slope = float(sum((p.grad * v).sum() for p, v in pairs))
        values = []
        with torch.no_grad():
            for move in (step, -2 * step, step):  # the last one back to the start
                for p, v in pairs:
                    p += move * v
                values.append(float(objective()))
        expected = (values[0] - values[1]) / (2 * step)
        bound = central_difference(step) * (abs(values[2]) + abs(slope))
        assert abs(slope - expected) <= bound, name
        assert abs(slope) > 100 * bound and all(p.grad.any() for p, _ in pairs), name


@each_kind
def test_the_complexity_is_a_number_or_there_is_no_training(kind):
    model = made(kind)
    if not kind_of(kind).trained:
        with pytest.raises(InputError, match="is not trained"):
            elbo(model, tiny_batch(), None, 1.0, 10)
        return
    kl = elbo(model, tiny_batch(), None, 1.0, 10).kl
    assert kl.dtype == torch.float64 and kl.shape == () and kl.isfinite() and kl >= 0
    assert (kl > 0) == (bool(kind_of(kind).variational) or kind[0] == "map")


@each_kind
def test_widths_are_standard_deviations_and_stay_usable(kind):
    model = made(kind)
    for adapter in adapters(model).values():
        widths = adapter.widths()
        assert widths.dim() == 1 and widths.isfinite().all() and (widths >= 0).all()
        assert widths.numel() or not (adapter.variational and adapter.random)
    for value in (-1e3, 0.0):
        with torch.no_grad():
            for adapter in adapters(model).values():
                for name in adapter.variational:
                    adapter.get_parameter(name).fill_(value)
                adapter.bound_()
                assert (adapter.widths() > 0).all() or not adapter.variational
            if kind_of(kind).trained:
                assert elbo(model, tiny_batch(), None, 1.0, 10).kl.isfinite()


@each_trained_kind
@pytest.mark.parametrize("k", [2, 3])
def test_it_takes_the_function_of_a_plain_lora(kind, k):
    adapter = made(kind).layers[0].attn.q_proj.adapter
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(k, adapter.A.shape[1], generator=generator)
    B = torch.randn(len(adapter.B), k, generator=generator)
    adapter.set_lora_(A, B, 1.5)
    expected = 1.5 * B.double() @ A.double()
    got = adapter.config.scaling * adapter.B.double() @ adapter.lora_A()
    assert (got - expected).abs().max() <= rounding(torch.float32, 32) * expected.abs().max()
    with pytest.raises(InputError, match="does not fit into one of rank 3"):
        adapter.set_lora_(torch.randn(4, A.shape[1]), torch.randn(len(B), 4), 1.0)


@each_kind
def test_a_run_comes_back_as_it_was(kind, tmp_path):
    model = made(kind)
    save_run(tmp_path, model, {"model": "base"})
    loaded, info = load_run(tmp_path, Llama(TINY).init_random_(0, std=0.3))
    assert (info["adapter"]["method"], info["adapter"]["covariance"]) == kind
    assert {type(adapter) for adapter in adapters(loaded).values()} == {kind_of(kind)}
    for noise in (None, Noise(1, 1)):
        assert torch.equal(logits(loaded, noise), logits(model, noise))


# --- posteriors -----------------------------------------------------------------------------------


PLAIN, POINT = ("mle", "diagonal"), ("point", "diagonal")


def plain(seed: int = 0, **config) -> Llama:
    return made(PLAIN, seed, **config)


def states(kind=PLAIN) -> list[dict[str, torch.Tensor]]:
    """Three settings of the weights of `made(kind)`."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: value + 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in adapter_state(made(kind)).items()
        }
        for _ in range(3)
    ]


@torch.no_grad()
def swag() -> Swag:
    model, found = plain(), Swag()
    for state in states():
        for name, parameter in adapter_state(model).items():
            parameter.copy_(state[name])
        found.collect(model)
    return found


def ensemble_of(posterior, kind=PLAIN) -> Ensemble:
    """Members of a kind, with a posterior of each."""
    model, members, own = made(kind), states(kind), []
    for state in members:
        load_adapter_state(model, state, "the test")
        own.append(posterior.fit(model, [tiny_batch()]))
    return Ensemble(members, own)


# By the posterior's name in POSTERIORS, and more words for its variants.
MAKERS = {
    "laplace": lambda: Laplace.fit(plain(), [tiny_batch()]),
    "laplace exact": lambda: Laplace.fit(plain(), [tiny_batch()], curvature="exact"),
    "swag": swag,
    "ensemble": lambda: Ensemble(states()),
    "ensemble of scalabl": lambda: Ensemble(states(SCALABL)),
    "ensemble of laplace": lambda: ensemble_of(Laplace),
    "ensemble of subspace": lambda: ensemble_of(Subspace, POINT),
    "subspace": lambda: Subspace.fit(made(POINT), [tiny_batch()]),
}
each_posterior = pytest.mark.parametrize("name", MAKERS)


def test_each_posterior_is_tested():
    assert {name.split()[0] for name in MAKERS} == set(POSTERIORS)


def model_of(posterior, **config) -> Llama:
    """The model that the posterior of MAKERS was made from."""
    if isinstance(posterior, Ensemble):
        kinds = {"log_sigma": SCALABL, "log_s": POINT, "A": PLAIN}
        own = (kind for key, kind in kinds.items() if f"lm_head.{key}" in posterior.members[0])
        return made(next(own), **config)
    return made(POINT if isinstance(posterior, Subspace) else PLAIN, **config)


def log_probs(posterior, samples, seed=0, batch=None):
    return posterior.log_probs(model_of(posterior), batch or tiny_batch(), samples, seed)


@each_posterior
@pytest.mark.parametrize("samples", [0, 1, 4])
def test_draws_are_distributions(name, samples):
    found = log_probs(MAKERS[name](), samples)
    draws = samples or 1
    if name.startswith("ensemble"):  # of three members
        draws = 6 if samples == 4 and name != "ensemble" else 3
    assert found.shape == (draws, 4, len(CLASSES)) and found.dtype == torch.float64
    assert not found.requires_grad
    assert (found.exp().sum(-1) - 1).abs().max() <= rounding(torch.float64, 16)
    if draws > 1:
        assert apart(found[0], found[1])


@each_posterior
def test_a_draw_is_a_function_of_seed_and_number(name):
    posterior = MAKERS[name]()
    few, many = log_probs(posterior, 2, seed=1), log_probs(posterior, 4, seed=1)
    assert torch.equal(many, log_probs(posterior, 4, seed=1))
    assert close(few[:2], many[:2])
    other = log_probs(posterior, 4, seed=2)
    assert apart(other, many) if name != "ensemble" else torch.equal(other, many)
    assert torch.equal(log_probs(posterior, 0, seed=1), log_probs(posterior, 0, seed=2))


@each_posterior
def test_a_draw_does_not_depend_on_what_else_is_in_the_batch(name):
    posterior, batch = MAKERS[name](), tiny_batch()
    for order in (torch.tensor([2, 0, 3]), torch.tensor([1])):
        part = log_probs(posterior, 3, seed=1, batch=rows(batch, order))
        assert close(part, log_probs(posterior, 3, seed=1)[:, order])


@each_posterior
def test_the_prediction_is_the_mixture(name):
    posterior = MAKERS[name]()
    model = model_of(posterior)
    found = predict(model, tiny_batch(), samples=4, seed=1, posterior=posterior)
    expected = log_probs(posterior, 4, seed=1).exp().mean(0)
    assert (found.probs - expected).abs().max() <= rounding(torch.float64, 64)
    assert (found.mutual_information > 0).all()
    with pytest.raises(InputError, match="samples must not be negative"):
        predict(model, tiny_batch(), samples=-1, posterior=posterior)


@each_posterior
def test_it_comes_back_from_its_file(name, tmp_path):
    posterior = MAKERS[name]()
    posterior.save(tmp_path / "run")
    info = {"posterior": name.split()[0]}
    loaded = load_posterior(tmp_path / "run", info)
    assert type(loaded) is POSTERIORS[info["posterior"]]
    for samples in (0, 3):
        assert torch.equal(
            log_probs(loaded, samples, seed=1), log_probs(posterior, samples, seed=1)
        )
    for file in (tmp_path / "run").rglob("*.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-8])
        with pytest.raises(InputError, match=file.name):
            load_posterior(tmp_path / "run", info)
        file.write_bytes(whole)
    with pytest.raises(InputError, match=r"safetensors: no such file"):
        load_posterior(tmp_path, info)


@each_posterior
def test_the_model_stays_as_it_was(name):
    posterior = MAKERS[name]()
    model = model_of(posterior)
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    posterior.log_probs(model, tiny_batch(), 2, 0)
    for n, p in model.named_parameters():
        same, place, value = before[n]
        assert p is same and p.data_ptr() == place and torch.equal(p, value) and p.grad is None


@each_posterior
def test_another_models_posterior_is_refused(name):
    posterior = MAKERS[name]()
    other = model_of(posterior, targets=("q_proj",))
    with pytest.raises(InputError, match="other adapters|do not both have"):
        posterior.log_probs(other, tiny_batch(), 2, 0)


# --- the contract itself --------------------------------------------------------------------------

forward, subspace_lora_A = SubspaceAdapter.forward, SubspaceAdapter.lora_A
laplace_log_probs, draw_swag = Laplace.log_probs, Swag.draw


def no_gradient_of_sigma(self):
    return self.log_s.exp(), self.log_sigma.detach().exp()


def mean_of_double_width(self, noise=None):
    return 2.0 * subspace_lora_A(self, noise)


def seed_ignored(self, model, batch, samples, seed):
    return laplace_log_probs(self, model, batch, samples, 0)


def place_for_id(self, model, batch, samples, seed):
    moved = replace(batch, ids=torch.arange(len(batch.ids)))
    return laplace_log_probs(self, model, moved, samples, seed)


def member_left_in_the_model(self, model, batch, samples, seed):
    with torch.no_grad():
        for name, parameter in adapter_state(model).items():
            parameter.copy_(self.members[0][name])
    return torch.stack([class_logits(model, batch, None).double().log_softmax(-1)] * 3).detach()


FAULTS = [
    (SubspaceAdapter, "random", False, test_draws_differ_iff_they_are_random, (SCALABL, "example")),
    (SubspaceAdapter, "scale", no_gradient_of_sigma,
     test_gradients_are_the_slopes_of_the_objective, (SCALABL, "token")),
    (SubspaceAdapter, "lora_A", mean_of_double_width, test_the_export_is_the_function,
     (SCALABL, None)),
    (SubspaceAdapter, "bound_", lambda self: None,
     test_widths_are_standard_deviations_and_stay_usable, (SCALABL,)),
    (Laplace, "log_probs", seed_ignored, test_a_draw_is_a_function_of_seed_and_number,
     ("laplace",)),
    (Laplace, "log_probs", place_for_id,
     test_a_draw_does_not_depend_on_what_else_is_in_the_batch, ("laplace",)),
    (Swag, "draw", lambda self, noise: draw_swag(self, Noise(noise.seed, 0)),
     test_draws_are_distributions, ("swag", 4)),
    (Ensemble, "log_probs", member_left_in_the_model, test_the_model_stays_as_it_was,
     ("ensemble",)),
    (Ensemble, "draws", lambda self, model, samples: 0, test_draws_are_distributions,
     ("ensemble of scalabl", 4)),
]  # fmt: skip


NAMES = [f"{owner.__name__}.{name}, {test.__name__}" for owner, name, _, test, _ in FAULTS]


@pytest.mark.parametrize("owner, name, value, test, arguments", FAULTS, ids=NAMES)
def test_a_broken_one_is_noticed(owner, name, value, test, arguments, monkeypatch):
    test(*arguments)
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(AssertionError):
        test(*arguments)
