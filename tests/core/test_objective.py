"""Both KLs, the objective, and its gradients."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as torch_kl

from scalabl_ref import Llama, Noise, adapters, elbo, kl_forward, kl_official, subspace_lora_linear
from scalabl_ref.core.objective import Batch, class_logits
from scalabl_ref.core.objective import complexity as model_kl
from scalabl_ref.support.errors import InputError
from scalabl_ref.verify import reference

from ..models import CLASSES, TINY, tiny_batch, tiny_model
from ..stats import ZTest
from ..tolerances import central_difference, rounding

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


@pytest.mark.eq_5
@pytest.mark.eq_6
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


def test_without_a_posterior_the_complexity_is_zero_in_float64():
    bare = Llama(TINY)
    for model in (bare, tiny_model(method="mle")):
        found = model_kl(model)
        assert (found.item(), found.dtype, found.shape) == (0.0, torch.float64, ())


def test_official_kl_stays_finite_where_float32_overflows():
    """The official code's float32 KL is infinite at log sigma = -44.5 (METHOD, section 5)."""
    s, log_sigma = torch.tensor([1.5]), torch.tensor([-44.5])
    assert torch.isinf((1 + s**2) / (2 * log_sigma.exp() ** 2)).all()
    assert torch.isfinite(kl_official(s, log_sigma.double().exp(), 1.0))


@pytest.mark.eq_4
@given(st.integers(0, 2**32), st.floats(0, 10), st.integers(1, 10_000))
def test_loss_is_nll_plus_beta_kl_over_n(seed, beta, n):
    model, batch = tiny_model(), tiny_batch()
    result = elbo(model, batch, Noise(seed, 0), beta, n)
    logits = class_logits(model, batch, Noise(seed, 0)).double()
    picked = torch.log_softmax(logits, -1)[torch.arange(len(batch.labels)), batch.labels]
    assert abs(result.nll.double() + picked.mean()) <= rounding(torch.float32, 16)
    expected = result.nll.item() + beta * result.kl.item() / n
    assert abs(result.loss.item() - expected) <= rounding(torch.float32, 4) * abs(expected)


@pytest.mark.usefixtures("bodies")
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


def test_what_is_narrow_is_widened_first():
    """KLs are of float64 whatever their arguments are, and class logits of float32 at least."""
    s, sigma = torch.tensor([0.3, 1.7]), torch.tensor([0.05, 0.2])
    for kl in (kl_forward, kl_official):
        value = kl(s, sigma, 1.0)
        assert value.dtype == torch.float64 and value == kl(s.double(), sigma.double(), 1.0)
    for method in ("scalabl", "mle"):
        assert model_kl(tiny_model(method=method)).dtype == torch.float64
    assert elbo(tiny_model(), tiny_batch(), None, 1.0, 10).loss.dtype == torch.float32
    low = Llama(TINY).init_random_(0, std=0.3).to(torch.bfloat16)
    assert class_logits(low, tiny_batch(), None).dtype == torch.float32
    assert class_logits(low.double(), tiny_batch(), None).dtype == torch.float64


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_the_loss_of_a_narrow_base_has_no_error_of_its_own(base):
    """The NLL of its logits is rounded as float32, whose unit is 2^-16 of bfloat16's."""
    model, batch = tiny_model(), tiny_batch()
    model.to(base)
    for adapter in adapters(model).values():
        adapter.float()
    logits = class_logits(model, batch, None).detach().double()
    exact = -logits.log_softmax(-1)[torch.arange(len(batch.labels)), batch.labels].mean()
    found = elbo(model, batch, None, 0.0, 10)
    assert abs(found.nll.item() - exact.item()) <= rounding(torch.float32, 16) * logits.abs().max()


@pytest.mark.usefixtures("bodies")
def test_an_answer_is_read_off_the_last_real_token():
    model, batch = tiny_model(), tiny_batch()
    for row, length in enumerate(batch.lengths.tolist()):
        one = batch.tokens[row : row + 1, :length]
        alone = model(one, noise=Noise(1, 2), groups=batch.ids[row : row + 1])[0, -1]
        together = class_logits(model, batch, Noise(1, 2))[row]
        assert (alone - together).abs().max() <= rounding(torch.float32, 256)


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


@pytest.mark.eq_4
@pytest.mark.parametrize("kl", ["forward", "official"])
def test_objective_equals_the_reference(kl):
    model, batch, noise = tiny_model(), tiny_batch(), Noise(5, 6)
    logits = class_logits(model, batch, noise)
    gaussians = [a.scale() for a in adapters(model).values()]
    expected = reference.elbo(logits, batch.labels, gaussians, 1.0, 0.3, 50, kl)
    for value, slow in zip(elbo(model, batch, noise, 0.3, 50, kl), expected, strict=True):
        assert abs(value.item() - slow) <= rounding(torch.float32, 64) * abs(slow)


# --- convexity ------------------------------------------------------------------------------------

points = st.lists(
    st.tuples(*[st.floats(-5, 5)] * 4, st.floats(0, 1)), min_size=1, max_size=4
)  # s and log sigma at two points, and how far between them


@given(points, st.sampled_from(["s and sigma", "s and log sigma", "s", "log sigma"]))
def test_kl_is_convex_where_it_should_be(pairs, along):
    """KL(q || p) jointly in s and sigma, and in s and log sigma; KL(p || q) in each by itself."""
    s1, u1, s2, u2, _ = torch.tensor(pairs, dtype=torch.float64).T
    t = pairs[0][4]
    if along == "s":
        u2 = u1
    if along == "log sigma":
        s2 = s1
    a, b = (s1, u1.exp()), (s2, u2.exp())
    if along == "s and sigma":
        between = (t * s1 + (1 - t) * s2, t * a[1] + (1 - t) * b[1])
    else:
        between = (t * s1 + (1 - t) * s2, (t * u1 + (1 - t) * u2).exp())
    for kl in [kl_forward] if "and" in along else [kl_forward, kl_official]:
        chord = t * kl(*a, 1.0) + (1 - t) * kl(*b, 1.0)
        size = kl(*a, 1.0) + kl(*b, 1.0) + 10 * len(pairs)
        assert kl(*between, 1.0) <= chord + rounding(torch.float64, 64) * size


# --- a lower bound on the evidence ----------------------------------------------------------------


class LinearGaussian:
    """A layer whose outputs carry noise N(0, tau^2): its evidence is known in closed form.

    y_n = W x_n + c B diag(s~) A x_n + noise is linear in s~, so that y is Gaussian with covariance
    tau^2 I + sigma_p^2 Phi Phi', and the posterior is Gaussian with precision
    I / sigma_p^2 + Phi' Phi / tau^2; both come from torch.distributions and a matrix Phi, not from
    the package. `orthogonal`: columns of B are, which makes the posterior's covariance diagonal.
    """

    def __init__(self, seed: int, rank: int, prior_std: float, orthogonal: bool) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tau, self.prior_std, self.rank = 0.7, prior_std, rank
        self.x, W, A, B, noise = (
            torch.randn(*shape, generator=g).double()
            for shape in ((3, 4), (5, 4), (rank, 4), (5, rank), (3, 5))
        )
        if orthogonal:
            B = torch.linalg.qr(B)[0]
        self.layer = (W, None, A, B)
        self.base = self.x @ W.T
        phi = 1.5 * torch.einsum("nk,ik->nik", self.x @ A.T, B).reshape(15, rank)
        truth = prior_std * torch.randn(rank, generator=g).double()
        self.y = self.base + (phi @ truth).reshape(3, 5) + self.tau * noise
        residual = (self.y - self.base).flatten()
        covariance = self.tau**2 * torch.eye(15).double() + prior_std**2 * phi @ phi.T
        zero = torch.zeros(15).double()
        self.evidence = MultivariateNormal(zero, covariance).log_prob(residual)
        precision = torch.eye(rank).double() / prior_std**2 + phi.T @ phi / self.tau**2
        mean = torch.linalg.solve(precision, phi.T @ residual / self.tau**2)
        self.posterior = MultivariateNormal(mean, precision_matrix=precision)

    def log_likelihood(self, s: torch.Tensor) -> torch.Tensor:
        """At the scales s, by the op's mean model."""
        y = subspace_lora_linear(self.x, *self.layer, s, torch.zeros_like(s), 1.5, None)
        return Normal(y, self.tau).log_prob(self.y).sum()

    def bound(self, s: torch.Tensor, sigma: torch.Tensor, kl=kl_forward) -> torch.Tensor:
        """E_q[log likelihood] - KL; exact, as the likelihood is quadratic along each scale."""
        middle, expected = self.log_likelihood(s), self.log_likelihood(s)
        for k in range(self.rank):
            step = sigma[k] * torch.eye(self.rank).double()[k]
            sides = self.log_likelihood(s + step) + self.log_likelihood(s - step)
            expected = expected + sides / 2 - middle
        return expected - kl(s, sigma, self.prior_std)


@given(
    st.integers(0, 1000),
    st.integers(1, 3),
    st.floats(0.1, 3),
    st.booleans(),
    st.lists(st.tuples(st.floats(-2, 2), st.floats(0.05, 2)), min_size=3, max_size=3),
)
def test_the_elbo_is_below_the_evidence_by_the_distance_to_the_posterior(
    seed, rank, prior_std, orthogonal, q
):
    """log p(y) - ELBO(q) = KL(q || posterior), by torch's own KL of full Gaussians."""
    model = LinearGaussian(seed, rank, prior_std, orthogonal)
    s, sigma = (t[:rank].contiguous() for t in columns(q))
    gap = model.evidence - model.bound(s, sigma)
    q = MultivariateNormal(s, torch.diag(sigma**2))
    distance = torch_kl(q, model.posterior)
    size = model.evidence.abs() + model.log_likelihood(s).abs() + distance
    size = size + sigma.square().sum() * 1000 / model.tau**2
    assert abs(gap - distance) <= rounding(torch.float64, 1000) * size
    assert gap >= -rounding(torch.float64, 1000) * size


@given(st.integers(0, 1000), st.integers(1, 3), st.floats(0.1, 3))
def test_the_bound_is_tight_at_the_exact_posterior(seed, rank, prior_std):
    """Where the posterior is diagonal, q can be it; in the other KL's place nothing is tight."""
    model = LinearGaussian(seed, rank, prior_std, orthogonal=True)
    s, sigma = model.posterior.mean, model.posterior.variance.sqrt()
    assert abs(model.evidence - model.bound(s, sigma)) <= 1e-10 * (1 + model.evidence.abs())
    assert abs(model.evidence - model.bound(s, sigma, kl_official)) > 1e-6


# --- by chance: what one draw estimates, and how far it scatters ---------------------------------

S, SIGMA = torch.tensor([0.5, -0.3]).double(), torch.tensor([0.8, 0.6]).double()


def log_ratio(direction: str):
    """log q - log p at w ~ q, or log p - log q at w ~ p, as sum_k a eps^2 + b eps + constant."""
    if direction == "forward":
        return (SIGMA**2 - 1) / 2, S * SIGMA
    return (1 / SIGMA**2 - 1) / 2, -S / SIGMA**2


def kl_by_sampling(direction: str):
    def sample(seed: int, n: int) -> float:
        eps = Noise(seed, 0).normal(0, n, 2).double()
        q, p = Normal(S, SIGMA), Normal(0.0, 1.0)
        kl, (inner, outer), w = {
            "forward": (kl_forward, (q, p), S + SIGMA * eps),
            "official": (kl_official, (p, q), eps),
        }[direction]
        ratio = (inner.log_prob(w) - outer.log_prob(w)).sum(1)
        return float(ratio.mean() - kl(S, SIGMA, 1.0))

    return sample


SAMPLED_KL = {}
for _direction in ("forward", "official"):
    _a, _b = log_ratio(_direction)
    _variance = float((2 * _a**2 + _b**2).sum())
    SAMPLED_KL[_direction] = ZTest(
        f"KL by sampling, {_direction}",
        kl_by_sampling(_direction),
        n=100_000,
        sd=_variance**0.5,
        skew=float((8 * _a**3 + 6 * _a * _b**2).sum()) / _variance**1.5,
        replay=4000,
    )


@pytest.mark.parametrize("direction", SAMPLED_KL)
def test_kl_equals_the_mean_log_ratio(direction):
    SAMPLED_KL[direction].check(seed=1)


@cache
def head_only():
    """A model whose head alone is adapted, one question of it, and what is certain about it.

    Returns the model, the token, and per value of (log_s, log_sigma, B, one entry of each row of
    A) the expectation, standard deviation and skewness of its gradient under one draw, by
    quadrature over the two scales.
    """
    model = tiny_model(targets=("lm_head",), rank=2, sampling="example").double()
    adapter = adapters(model)["lm_head"]
    with torch.no_grad():
        adapter.log_s.copy_(torch.tensor([0.2, -0.5]))
        adapter.log_sigma.copy_(torch.tensor([-0.4, -0.1]))
    token = torch.tensor([[7]])
    hidden = {}
    hook = model.lm_head.register_forward_pre_hook(lambda _, a: hidden.update(x=a[0]))
    model(token, last_only=True)
    hook.remove()
    nodes, weights = reference.gauss_hermite(32)
    leaves = [p.detach().clone().requires_grad_() for p in trained(adapter)]
    log_s, log_sigma, B, A = leaves
    base = (hidden["x"] @ model.lm_head.weight.T).detach()
    moments = [0.0, 0.0, 0.0]
    for i, j in itertools.product(range(32), repeat=2):
        eps = torch.stack((nodes[i], nodes[j]))
        scale = adapter.config.scaling * (log_s.exp() + log_sigma.exp() * eps)
        logits = base + (hidden["x"].detach() @ A.T * scale) @ B.T
        nll = F.cross_entropy(logits, torch.tensor([1]))
        value = flat(torch.autograd.grad(nll, leaves))
        moments = [m + weights[i] * weights[j] * value ** (k + 1) for k, m in enumerate(moments)]
    mean, square, cube = moments
    variance = square - mean**2
    skew = (cube - 3 * mean * square + 2 * mean**3) / variance**1.5
    return model, token, mean, variance.sqrt(), float(skew.abs().max())


def trained(adapter):
    return [adapter.log_s, adapter.log_sigma, adapter.B, adapter.A]


def flat(gradients):
    """The entries of a row of A's gradient are multiples of one another: one stands for all."""
    *rest, A = gradients
    return torch.cat([g.flatten() for g in rest] + [A[:, 0]])


def head_gradients(seed: int, n: int) -> torch.Tensor:
    """Mean gradient of `elbo` over n examples that differ in their draws alone, less the exact."""
    model, token, mean, sd, _ = head_only()
    batch = Batch(
        token.expand(n, 1), torch.ones(n).long(), torch.ones(n).long(), torch.arange(n),
        torch.tensor(CLASSES),
    )  # fmt: skip
    loss = elbo(model, batch, Noise(seed, 0), beta=0.0, num_examples=n).loss
    return (flat(torch.autograd.grad(loss, trained(adapters(model)["lm_head"]))) - mean) / sd


UNBIASED = ZTest(
    "ELBO: gradient of one draw",
    head_gradients,
    n=20_000,
    count=12,
    skew=head_only()[-1],
    replay=250,
    exact=False,
)


def test_the_gradient_of_one_draw_is_unbiased():
    UNBIASED.check(seed=2)


class TwoRows:
    """Two rows through a layer of rank 1 with a drawn scale, and what quadrature knows of them.

    errors, gradients: the NLL of class 1 and its derivative by s.
    """

    def __init__(self, seed: int = 3, opposite: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        x, other, self.W, self.A, self.B = (
            torch.randn(*shape, generator=g).double()
            for shape in ((1, 4), (1, 4), (3, 4), (1, 4), (3, 1))
        )
        if opposite:
            self.W, other = torch.zeros_like(self.W), -x
        self.x = torch.cat((x, other))
        self.s, self.sigma = torch.tensor([0.4]).double(), torch.tensor([0.9]).double()
        nodes, self.weights = reference.gauss_hermite(64)
        h = (self.x @ self.A.T)[None, :, 0]  # (1, 2)
        update = (h * (self.s + self.sigma * nodes[:, None]))[..., None] * self.B[:, 0]
        self.logits = self.x @ self.W.T + 1.5 * update  # (nodes, 2, 3)
        self.mean = self.weights @ self.gradients(self.logits)

    def errors(self, logits: torch.Tensor) -> torch.Tensor:
        return -logits.log_softmax(-1)[..., 1]

    def gradients(self, logits: torch.Tensor) -> torch.Tensor:
        error = logits.softmax(-1) - F.one_hot(torch.tensor(1), 3)
        return 1.5 * (self.x @ self.A.T)[:, 0] * (error @ self.B)[..., 0]

    def covariance(self, values: torch.Tensor) -> torch.Tensor:
        """Of the two rows' values (nodes, 2) under one draw, (2, 2)."""
        centred = values - self.weights @ values
        return centred.T @ (self.weights[:, None] * centred)

    def product(self, sampling: str):
        """Mean product of both gradients: rows share a draw under "example", not under "token"."""
        known = float(self.covariance(self.gradients(self.logits))[0, 1])
        known = known if sampling == "example" else 0.0

        def sample(seed: int, n: int) -> float:
            y = subspace_lora_linear(
                self.x.expand(n, 2, 4), self.W, None, self.A, self.B, self.s, self.sigma, 1.5,
                Noise(seed, 0), 0, sampling,
            )  # fmt: skip
            centred = self.gradients(y) - self.mean
            return float((centred[:, 0] * centred[:, 1]).mean() - known)

        return sample

    def product_sd(self, sampling: str) -> float:
        centred = self.gradients(self.logits) - self.mean
        squares = self.weights @ centred**2
        if sampling == "token":
            return float(squares.prod().sqrt())
        product = centred.prod(1)
        return float(self.weights @ product**2 - (self.weights @ product) ** 2) ** 0.5


ROWS = TwoRows()
PRODUCTS = {
    sampling: ZTest(
        f"gradients of two rows, {name}", ROWS.product(sampling), n=50_000,
        sd=ROWS.product_sd(sampling), replay=5000, exact=False,
    )
    for sampling, name in (("example", "one draw"), ("token", "a draw each"))
}  # fmt: skip


@pytest.mark.parametrize("sampling", PRODUCTS)
def test_rows_that_share_a_draw_are_correlated_and_others_are_not(sampling):
    """Half the covariance is what one draw for both adds to the variance of the mean gradient."""
    assert ROWS.covariance(ROWS.gradients(ROWS.logits))[0, 1] > 0.1
    PRODUCTS[sampling].check(seed=3)


@given(st.integers(0, 2**31), st.booleans())
def test_a_draw_for_each_row_has_no_more_variance(seed, opposite):
    """Of the gradient by s at rank 1: a convex NLL makes both rows' rise with the scale, and two
    rising functions of one variable are not negatively correlated (Chebyshev)."""
    rows = TwoRows(seed, opposite)
    shared = rows.covariance(rows.gradients(rows.logits))
    assert shared[0, 1] >= -rounding(torch.float64, 1000) * shared.diagonal().max()


def test_it_is_no_theorem_for_the_loss_itself():
    """One row's NLL rises where the other's falls: a shared draw is antithetic for their mean."""
    rows = TwoRows(opposite=True)
    shared = rows.covariance(rows.errors(rows.logits))
    assert shared[0, 1] < -0.1 * shared.diagonal().max()
