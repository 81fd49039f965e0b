"""The subspace posterior against dense matrices, torch.func, integrals and exact posteriors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from scalabl_ref import InputError, Noise, adapters, predict
from scalabl_ref.core.config import TARGETS
from scalabl_ref.core.objective import class_logits
from scalabl_ref.methods import to_points
from scalabl_ref.methods.evidence import GROUPS, best_precision, groups_of
from scalabl_ref.methods.laplace import LOGITS_LAYER, draw_logits
from scalabl_ref.methods.subspace import (
    FILE,
    SCALES_LAYER,
    Curvature,
    Subspace,
    jacobians,
    layout,
    row_logits,
    validated,
)
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..models import tiny_batch, tiny_model
from ..tolerances import rounding
from .jacobians import logits_and_jacobians

# A chain of sums as long as the model is deep: two blocks of some five sums over at most 24 terms,
# and then sums over 45 scales.
TERMS = 2 * 5 * 24 + 45


def points(method="mle", **config):
    """A tiny model in float64 whose adapters are points."""
    model = tiny_model(method=method, **config).double()
    to_points(model)
    return model


def parts(batch, *pieces):
    return [batch.rows(torch.tensor(piece)) for piece in pieces]


def truth(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C) and their derivatives by all scales (B, C, D), from torch.func.

    By log s, times 1 / s: it goes through the adapters' usual forward pass.
    """
    own = {f"{n}.adapter.log_s": a.log_s.detach() for n, a in adapters(model).items()}
    logits, found = logits_and_jacobians(model, batch, own)
    columns = [
        (found[f"{n}.adapter.log_s"] / a.log_s.exp())[..., (a.B != 0).any(0)]
        for n, a in adapters(model).items()
    ]
    return logits.detach(), torch.cat(columns, -1).detach()


def close(got, expected, terms: int = TERMS) -> None:
    """To rounding, relative to the largest entry: what the sums of a matrix' entries share."""
    got, expected = (torch.as_tensor(t, dtype=torch.float64) for t in (got, expected))
    assert got.shape == expected.shape
    error, size = (got - expected).abs().max(), expected.abs().max()
    assert error <= rounding(torch.float64, terms) * size, f"{error:.3g} of {size:.3g}"


def ggn(logits, J):
    p = logits.softmax(-1)
    return torch.einsum("bcp,bcd,bdq->pq", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)


# --- the model with points ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mle", "map", "dropout", "scalabl", "blob", "point"])
def test_points_are_the_mean_model(method):
    model = tiny_model(method=method, alpha=5.0).double()
    before = class_logits(model, tiny_batch(), None)
    to_points(model)
    close(class_logits(model, tiny_batch(), None), before)
    for adapter in adapters(model).values():
        assert adapter.config.method == "point" and adapter.config.scaling == 5.0 / 3
        close(adapter.A @ adapter.A.T, torch.eye(3))


def test_points_leave_out_what_the_update_does_not_have():
    """The head of three classes has rank three at most, an update of rank one has one scale."""
    model = tiny_model(method="mle", rank=4).double()
    with torch.no_grad():
        adapters(model)["layers.0.attn.q_proj"].B[:, 1:] = 0
    to_points(model)
    sizes, scales = layout(model)
    assert list(sizes.values()) == [1, 4, 4, 4, 3] and len(scales) == 16
    with pytest.raises(InputError, match="all of their updates are 0"):
        layout(points(wake=False))


@pytest.mark.usefixtures("bodies")
def test_an_offset_of_a_row_is_its_own_scales():
    """Example by example the model is that with the offset added to s, whatever the ids are."""
    model = points(targets=TARGETS)
    batch = dataclasses.replace(tiny_batch(), ids=torch.tensor([7, 7, 0, 2]))
    generator = torch.Generator().manual_seed(3)
    offsets = {n: torch.randn(4, 3, generator=generator) for n in adapters(model)}
    for name, adapter in adapters(model).items():
        adapter.offset = offsets[name]
    found = row_logits(model, batch)
    with pytest.raises(ValueError, match="offsets need noise keys"):
        class_logits(model, batch, None)
    for row in range(4):
        moved = points(targets=TARGETS)
        with torch.no_grad():
            for name, adapter in adapters(moved).items():
                s = adapter.log_s.exp() + offsets[name][row]
                adapter.B *= (s / adapter.log_s.exp()).to(adapter.B)  # s may be negative
        [alone] = parts(batch, [row])
        close(found[row], class_logits(moved, alone, None)[0])


# --- (24) -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("config", [{"targets": TARGETS}, {"rank": 4}, {"trim": False}])
def test_jacobians_are_those_of_torch_func(config):
    model, batch = points(**config), tiny_batch()
    logits, J = truth(model, batch)
    got, centred = jacobians(model, batch)
    close(got, logits)
    close(centred, J - J.mean(1, keepdim=True))


@pytest.mark.eq_24
def test_H_is_the_gauss_newton_matrix_in_any_batches():
    model, batch = points(targets=TARGETS), tiny_batch(6)
    curvature = Curvature.measure(model, parts(batch, [0, 3], [5], [1, 2, 4]))
    logits, J = truth(model, batch)
    close(curvature.H, ggn(logits, J))
    fit = logits.log_softmax(-1).gather(1, batch.labels[:, None]).sum()
    close(curvature.log_likelihood, fit)
    assert sum(curvature.sizes.values()) == len(curvature.H) == 3 * 15


@pytest.mark.eq_24
def test_H_is_the_hessian_where_the_logits_are_linear():
    """With the head alone adapted, minus the log-likelihood has no other second derivative."""
    model, batch = points(targets=("lm_head",)), tiny_batch(6)
    s = adapters(model)["lm_head"].log_s.exp().detach()
    [hidden] = hidden_states(model, batch)
    head, adapter = model.lm_head, adapters(model)["lm_head"]

    def loss(scales):
        low = adapter.config.scaling * (hidden @ adapter.A.T) * scales
        logits = hidden @ head.weight.T + low @ adapter.B.T
        return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")

    expected = torch.autograd.functional.hessian(loss, s).detach()
    close(Curvature.measure(model, [batch]).H, expected)


def hidden_states(model, batch):
    seen = []
    with model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach())):
        class_logits(model, batch, None)
    return seen


# --- (25), (26) -----------------------------------------------------------------------------------


def precisions(curvature, groups):
    """Some lambda for each group."""
    group, names = groups_of(curvature.sizes, groups)
    return torch.linspace(-1.0, 2.0, len(names), dtype=torch.float64).exp()[group]


@pytest.mark.eq_25
@pytest.mark.eq_26
@pytest.mark.eq_27
@pytest.mark.parametrize("precision", [0.01, 1.0, 30.0])
def test_logits_and_evidence_equal_dense_algebra(precision):
    model, batch, other = points(), tiny_batch(6), tiny_batch(3, seed=1)
    curvature = Curvature.measure(model, [batch])
    posterior = curvature.posterior(precision)
    logits, J = truth(model, other)
    D = len(curvature.H)
    dense = curvature.H + precision * torch.eye(D).double()
    covariance = J @ torch.linalg.inv(dense) @ J.mT
    centre = torch.eye(3).double() - 1 / 3
    condition = 1 + float(posterior.values[0])  # of the matrix that is inverted
    mean, factor = posterior.gaussian(model, other)
    close(mean, logits)
    close(factor @ factor.mT, centre @ covariance @ centre, math.ceil(TERMS * condition))
    s = curvature.scales
    evidence = curvature.log_likelihood - precision / 2 * float(s.square().sum())
    evidence += D / 2 * math.log(precision) - float(torch.logdet(dense)) / 2
    close(posterior.log_evidence(), evidence)
    again = curvature.posterior(1.0).scaled(precision)
    close(again.log_evidence(), posterior.log_evidence())
    close(again.gaussian(model, other)[1], factor, math.ceil(TERMS * condition))


def at_the_mode(copies: int, precision: float):
    """A model whose head alone has two scales, at their mode under the prior and the data.

    Also its data, and the log-likelihood (n,) as a function of the scales (n, 2).
    """
    model, batch = points(targets=("lm_head",), rank=2), tiny_batch(6)
    head, adapter = model.lm_head, adapters(model)["lm_head"]
    [hidden] = hidden_states(model, batch)
    low = adapter.config.scaling * (hidden @ adapter.A.T)  # (B, 2)

    def fit(theta, B):
        logits = hidden @ head.weight.T + torch.einsum("br,nr,cr->nbc", low, theta, B)
        return copies * logits.log_softmax(-1)[:, torch.arange(6), batch.labels].sum(1)

    def loss(theta):
        return precision / 2 * theta.square().sum() - fit(theta[None], adapter.B)[0]

    theta = adapter.log_s.exp().detach()
    for _ in range(50):
        slope = torch.autograd.functional.jacobian(loss, theta)
        theta = theta - torch.linalg.solve(torch.autograd.functional.hessian(loss, theta), slope)
    assert slope.abs().max() <= rounding(torch.float64, TERMS) * copies
    with torch.no_grad():
        adapter.B *= theta.sign()
        adapter.log_s.copy_(theta.abs().log())
    return model, parts(batch, *[range(6)] * copies), lambda t: fit(t, adapter.B.detach())


@pytest.mark.eq_26
def test_the_evidence_nears_the_integral_over_the_scales():
    """At the mode Laplace's error is of the order 1 / N: four times the data, a quarter of it.

    The integral of prior times likelihood is a sum over a grid; for a smooth function that ends
    within it, its error falls faster than any power of the spacing.
    """
    precision, errors = 0.7, []
    axis = torch.linspace(-12, 12, 241, dtype=torch.float64)
    theta = torch.cartesian_prod(axis, axis)
    for copies in (4, 16, 64):
        model, batches, fit = at_the_mode(copies, precision)
        posterior = Curvature.measure(model, batches).posterior(precision)
        log_prior = math.log(precision / 2 / math.pi) - precision * theta.square().sum(1) / 2
        joint = torch.cat([fit(part) for part in theta.split(10**5)]).detach() + log_prior
        exact = torch.logsumexp(joint, 0) + 2 * math.log(float(axis[1] - axis[0]))
        errors.append(abs(float(exact) - posterior.log_evidence()))
        volume = posterior.values.log1p().sum() / 2
        assert errors[-1] < volume / copies
    assert errors[2] < errors[1] / 3 < errors[0] / 9


@pytest.mark.eq_26
@pytest.mark.parametrize("groups", GROUPS)
def test_the_best_precision_has_the_largest_evidence(groups):
    """In each group lambda |s|^2 is the number of scales that the data determine."""
    curvature = Curvature.measure(points(targets=TARGETS), [tiny_batch(12)])
    group, names = groups_of(curvature.sizes, groups)
    assert len(names) == {"all": 1, "target": 8, "layer": 15}[groups]
    best = curvature.posterior(groups=groups)
    dense = curvature.H + torch.diag(best.precision)
    determined = torch.linalg.solve(dense, curvature.H).diagonal()
    for g in range(len(names)):
        own = group == g
        assert len(best.precision[own].unique()) == 1
        penalty = float((best.precision * curvature.scales.square())[own].sum())
        # Newton's method stops at steps of 1e-9.
        assert abs(float(determined[own].sum()) - penalty) <= 1e-8 * int(own.sum())
        for factor in (0.9, 1.1):
            other = torch.where(own, factor * best.precision, best.precision)
            assert evidence(curvature, other) < best.log_evidence()
    close(best.log_evidence(), evidence(curvature, best.precision))
    if groups != "all":
        fewer = {"target": "all", "layer": "target"}[groups]
        assert best.log_evidence() > curvature.posterior(groups=fewer).log_evidence()


def evidence(curvature, precision):
    """(26) as it stands."""
    s, root = curvature.scales, precision.rsqrt()
    inner = torch.eye(len(s)).double() + root[:, None] * curvature.H * root
    return curvature.log_likelihood - float(s @ (precision * s) + torch.logdet(inner)) / 2


def test_the_best_precision_of_one_scale_is_the_root_of_a_quadratic():
    """lambda s^2 = h / (lambda + h), for scales that H does not join; over 12 orders."""
    h, s = torch.logspace(-6, 6, 7).double(), torch.linspace(0.3, 3.0, 7).double()
    found = best_precision(torch.diag(h), s, torch.arange(7), list("abcdefg"))
    expected = 2 * h / (h * s.square() + (h.square() * s**4 + 4 * h * s.square()).sqrt())
    assert ((found / expected).log().abs() <= 1e-8).all()  # steps of log lambda stop at 1e-9
    h[3] = 0.0
    with pytest.raises(InputError, match="no precision .* the evidence: d"):
        best_precision(torch.diag(h), s, torch.arange(7), list("abcdefg"))


@pytest.mark.parametrize("seed", [2, 37, 76, 80, 443])
def test_the_best_precision_of_scales_of_very_different_sizes(seed):
    """The precisions of three examples lie between 1e-12 and 1e5."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(3, 4, generator=g).double() * 10 ** (3 * torch.randn(4, generator=g).double())
    s = torch.randn(4, generator=g).double().abs() * 10 ** (
        2 * torch.randn(4, generator=g).double()
    )
    group = torch.tensor([0, 0, 1, 1] if seed % 2 else [0, 0, 0, 0])
    found = best_precision(X.T @ X, s, group, ["first", "second"])
    Y = X * found.rsqrt()  # 1 - M_ii without M, which rounding spoils here
    determined = (Y * torch.linalg.solve(torch.eye(3).double() + Y @ Y.T, Y)).sum(0)
    for own in (group == 0, group == 1)[: int(group.max()) + 1]:
        error = (found * s.square())[own].sum() - determined[own].sum()
        # Newton's method stops at steps of 1e-9.
        assert abs(error) <= rounding(torch.float64, 64) * Y.square().sum() + 1e-8


def test_validation_finds_the_factor_that_predicts_best():
    """From any start the same precision is found, and neighbours predict worse."""
    model, batch, other = points(), tiny_batch(12), tiny_batch(20, seed=3)
    first = Curvature.measure(model, [batch]).posterior(1.0)
    found = validated(first, model, parts(other, range(8), range(8, 20)), seed=2)

    def nll(posterior):
        probs = predict(model, other, 100, 2, posterior=posterior).probs
        return -probs.gather(1, other.labels[:, None]).log().sum()

    step = 10 ** (1 / 8)
    assert all(nll(found) < nll(found.scaled(factor)) for factor in (step, 1 / step))
    again = validated(first.scaled(step**5), model, [other], seed=2)
    close(again.precision, found.precision)
    with pytest.raises(InputError, match="no examples to choose the precision by"):
        validated(first, model, [])
    for factor in (1e12, 1e-12):
        with pytest.raises(InputError, match="no precision between 1e-4 and 1e4 times the first"):
            validated(first.scaled(factor), model, [other])


def test_directions_that_are_not_kept_have_the_prior():
    curvature = Curvature.measure(points(), [tiny_batch(2)])
    D, rank = len(curvature.H), 4  # (C - 1) times two examples
    precision = precisions(curvature, "layer")
    whole, enough, few = (curvature.posterior(precision, directions=K) for K in (D, rank, 2))
    eye = torch.eye(D).double()
    H = torch.linalg.inv(whole_covariance(whole)) - torch.diag(precision)
    close(H, curvature.H, 10 * TERMS)
    close(whole_covariance(enough), whole_covariance(whole))
    values, U = torch.linalg.eigh(precision.rsqrt()[:, None] * curvature.H * precision.rsqrt())
    values, U = values[-2:], U[:, -2:]
    inner = eye - (U * (values / (1 + values))) @ U.T
    close(whole_covariance(few), precision.rsqrt()[:, None] * inner * precision.rsqrt())
    assert few.log_evidence() == enough.log_evidence() == whole.log_evidence()


def whole_covariance(posterior):
    R = posterior.precision.rsqrt()[:, None] * posterior.spread(
        torch.eye(len(posterior.precision)).double()
    )
    return R @ R.T


# --- (27): predictions ----------------------------------------------------------------------------


def test_no_samples_are_the_mean_model():
    model, batch = points(), tiny_batch()
    posterior = Subspace.fit(model, [batch])
    expected = predict(model, batch, samples=0).probs
    close(posterior.log_probs(model, batch, 0, seed=0).exp()[0], expected)
    certain = posterior.scaled(1e40)
    close(certain.log_probs(model, batch, 2, seed=0).exp(), expected.expand(2, -1, -1))


@pytest.mark.eq_27
def test_linear_draws_are_keyed_normals_through_the_root_of_the_covariance():
    model, batch = points(), tiny_batch()
    posterior = Subspace.fit(model, [batch])
    mean, factor = posterior.gaussian(model, batch)
    expected = draw_logits(mean, factor @ factor.mT, batch.ids, 3, seed=5).log_softmax(-1)
    assert torch.equal(posterior.log_probs(model, batch, 3, seed=5), expected)
    assert max(a.layer for a in adapters(model).values()) < SCALES_LAYER < LOGITS_LAYER


@pytest.mark.eq_25
def test_sampled_draws_are_of_the_posterior_and_go_through_the_model():
    """An example's draw is R eps, whatever is beside it; the head's logits are linear in it."""
    model, batch = points(targets=("lm_head",), rank=4), tiny_batch()
    posterior = dataclasses.replace(Subspace.fit(model, [batch]), predicts="sampled")
    found = posterior.log_probs(model, batch, 2, seed=5)
    mean, factor = posterior.gaussian(model, batch)
    for i in range(2):
        eps = Noise(5, i).normal(SCALES_LAYER, batch.ids, 3).double()
        close(found[i], (mean + torch.einsum("bcd,bd->bc", factor, eps)).log_softmax(-1))
    [part] = parts(batch, [2, 0])
    close(posterior.log_probs(model, part, 2, seed=5), found[:, [2, 0]])


def test_linear_and_sampled_draws_agree_where_the_posterior_is_narrow():
    """Their difference is of the second order in the posterior's width."""
    model, batch = points(), tiny_batch()
    posterior, gaps = Subspace.fit(model, [batch]), []
    for factor in (1e6, 4e6):
        narrow = dataclasses.replace(posterior.scaled(factor), predicts="sampled")
        mean, factor = narrow.gaussian(model, batch)
        eps = Noise(1, 0).normal(SCALES_LAYER, batch.ids, len(posterior.scales)).double()
        linear = (mean + torch.einsum("bcd,bd->bc", factor, eps)).log_softmax(-1)
        moved = narrow.log_probs(model, batch, 1, seed=1)[0]
        gaps.append((moved - linear).abs().max() / (linear - mean.log_softmax(-1)).abs().max())
    assert gaps[0] < 0.01 and 0.45 < gaps[1] / gaps[0] < 0.55


# --- files and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["linear", "sampled"])
def test_it_comes_back_from_its_file(predicts, tmp_path):
    model, batch = points(targets=TARGETS), tiny_batch()
    posterior = Subspace.fit(model, [batch], groups="layer", directions=5, predicts=predicts)
    posterior.save(tmp_path / "run")
    loaded = Subspace.load(tmp_path / "run")
    assert loaded.log_evidence() == posterior.log_evidence() and loaded.predicts == predicts
    assert list(loaded.sizes.items()) == list(posterior.sizes.items())
    expected = posterior.log_probs(model, batch, 3, seed=1)
    assert torch.equal(loaded.log_probs(model, batch, 3, seed=1), expected)


def test_bad_files_are_refused(tmp_path):
    Subspace.fit(points(), [tiny_batch()]).save(tmp_path)
    tensors, facts = load_tensors(tmp_path / FILE)

    def written(change, facts=facts):
        save_tensors(tmp_path / FILE, {**tensors, **change}.items(), facts)
        return Subspace.load(tmp_path)

    for change, changed, message in (
        ({}, {}, "not written by this program: 'sizes'"),
        ({}, {**facts, "sizes": "[]"}, "not written by this program"),
        ({}, {**facts, "predicts": "both"}, "predicts must be one of linear, sampled: 'both'"),
        ({"values": tensors["values"][1:]}, facts, "shapes do not fit each other"),
        ({"vectors": tensors["vectors"] * math.nan}, facts, "has NaN or infinite values"),
        ({"precision": -tensors["precision"]}, facts, "precision or an eigenvalue"),
    ):
        with pytest.raises(InputError, match=message):
            written(change, changed)


def test_bad_arguments_are_refused():
    model, batch = points(), tiny_batch()
    for arguments, message in (
        ({"groups": "one"}, "groups must be one of all, target, layer"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"precision": 0.0}, "precision must be positive"),
        ({"predicts": "both"}, "predicts must be one of linear, sampled"),
    ):
        with pytest.raises(InputError, match=message):
            Subspace.fit(model, [batch], **arguments)
    with pytest.raises(InputError, match="no examples"):
        Subspace.fit(model, [])
    mixed = points(targets=("q_proj",))
    mixed.layers[0].attn.v_proj.adapter = tiny_model(method="mle").layers[0].attn.v_proj.adapter
    with pytest.raises(InputError, match="needs adapters of method point"):
        layout(mixed)
    with pytest.raises(InputError, match="needs adapters of method point"):
        Subspace.fit(tiny_model(method="mle"), [batch])
    posterior = Subspace.fit(model, [batch])
    for samples, other, message in (
        (-1, model, "samples must not be negative"),
        (2, points(seed=1), "of a model with other adapters"),
        (0, points(targets=("q_proj",)), "of a model with other adapters"),
    ):
        with pytest.raises(InputError, match=message):
            posterior.log_probs(other, batch, samples, seed=0)
