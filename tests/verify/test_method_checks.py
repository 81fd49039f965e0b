"""Verify's checks of the other methods: each notices the faults that it is there for."""

from __future__ import annotations

import dataclasses
import math
import re
from contextlib import contextmanager

import pytest
import torch

from scalabl_ref import Noise, adapters, kl_forward, kl_official, methods, subspace_lora_linear
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.core.objective import class_logits, fitted_prior_std
from scalabl_ref.evaluation import metrics
from scalabl_ref.methods import blob, ensemble, full, laplace, subspace, swag, tfb
from scalabl_ref.methods.map import MapAdapter
from scalabl_ref.verify.all_checks import run
from scalabl_ref.verify.method_checks import METHOD_CHECKS, distance, golden_section, slopes

from ..patching import replace

normal = Noise.normal
CHECKS = {check.name: check for check in METHOD_CHECKS}
FAULTS = {}


def fault(name: str, target: str, check: str):
    """`target`, module:attribute of the package, becomes what is decorated; `check` must notice."""

    def register(value):
        assert name not in FAULTS
        FAULTS[name] = (target, value, check)
        return value

    return register


def with_config(function, **changes):
    """A method of an adapter under another configuration: each field what `changes` makes of it."""

    def call(self, *a, **k):
        before = self.config
        fields = {name: change(getattr(before, name)) for name, change in changes.items()}
        self.config = dataclasses.replace(before, **fields)
        try:
            return function(self, *a, **k)
        finally:
            self.config = before

    return call


# --- BLoB -----------------------------------------------------------------------------------------

fault("BLoB: a prior of 1", "methods.blob:BlobAdapter.prior_std", "BLoB, KL")(1.0)

ONE_FOR_ALL = {"sampling": lambda sampling: "batch"}
flipout, signs = blob.FlipoutAdapter.forward, blob.FlipoutAdapter.signs
fault("one sign pattern", "methods.blob:FlipoutAdapter.signs", "BLoB")(
    with_config(signs, **ONE_FOR_ALL)
)
fault("flipout: scaling", "methods.blob:FlipoutAdapter.forward", "BLoB")(
    with_config(flipout, alpha=lambda alpha: 2 * alpha)
)


@fault("signs the other way round", "methods.blob:FlipoutAdapter.signs", "BLoB")
def _(self, *a):
    return -signs(self, *a).flip(-1)


@fault("G not squared", "methods.blob:BlobAdapter.omega", "BLoB")
def _(self):
    return self.G.abs()


@fault("G detached", "methods.blob:BlobAdapter.omega", "BLoB")
def _(self):
    return self.G.detach().square()


fault("BLoB: the other KL", "methods.blob:kl_forward", "BLoB, KL")(kl_official)


@fault("BLoB: the published 1e-6", "methods.blob:kl_forward", "BLoB, KL")
def _(s, sigma, prior_std):
    return kl_forward(s, sigma + 1e-6, prior_std + 1e-6)


@fault("BLoB: A detached in the KL", "methods.blob:kl_forward", "BLoB, KL")
def _(s, sigma, prior_std):
    return kl_forward(s.detach(), sigma, prior_std)


# --- TFB ------------------------------------------------------------------------------------------

rotate, largest = tfb._rotate, tfb.largest
fault("TFB: draws of prediction", "methods.tfb:FIRST_TRAINING_DRAW", "TFB, width")(0)


@fault("TFB: d for 1 / d", "methods.tfb:_rotate", "TFB, rotation")
def _(point):
    adapter, inverse = rotate(point)
    return adapter, 1 / inverse


@fault("TFB: another mean", "methods.tfb:_rotate", "TFB, rotation")
def _(point):
    adapter, inverse = rotate(point)
    adapter.A.mul_(1 + 1e-6)
    return adapter, inverse


@fault("TFB: one width for all rows", "methods.tfb:_rotate", "TFB, rotation")
def _(point):
    adapter, inverse = rotate(point)
    return adapter, torch.ones_like(inverse)


@fault("TFB: the end that does not fit", "methods.tfb:largest", "TFB, width")
def _(*a):
    return 1.01 * largest(*a)


@fault("TFB: too narrow", "methods.tfb:largest", "TFB, width")
def _(*a):
    return 0.98 * largest(*a)


@fault("TFB: variance for standard deviation", "methods.tfb:TfbAdapter.omega", "TFB, width")
def _(self):
    return self.sigma[:, None].square()


@fault("TFB: logits averaged", "methods.tfb:_probs", "TFB, width")
def _(model, batches, draws):
    each = [[class_logits(model, batch, noise) for noise in draws] for batch in batches]
    return torch.cat([torch.stack(logits).mean(0) for logits in each]).softmax(-1)


# --- Laplace --------------------------------------------------------------------------------------

covariance, fit = laplace.Curvature.covariance, laplace.Laplace.fit
matrices, tokens = laplace._matrices, laplace._tokens
eigen = laplace._Moments.eigen
optimise = laplace.Laplace.optimise_prior


@fault("Laplace: half the precision", "methods.laplace:Curvature.covariance", "Laplace")
def _(self, J, precision):
    return covariance(self, J, precision / 2)


@fault("Laplace: the prior alone", "methods.laplace:Curvature.covariance", "Laplace")
def _(self, J, precision):
    return J.flatten(2) @ J.flatten(2).mT / precision


@fault("Laplace: scores not centred", "methods.laplace:_scores", "Laplace")
def _(log_p):
    return log_p.exp().T.sqrt()[..., None] * torch.eye(log_p.shape[1]).to(log_p)[:, None]


@fault("Laplace: the first token", "methods.laplace:_tokens", "Laplace")
def _(batch, curvature):
    return lambda x: x if x.dim() == 2 else x[:, 0]


@fault("Laplace: padding counts as tokens", "methods.laplace:_tokens", "Laplace")
def _(batch, curvature):
    if curvature == "last":
        return tokens(batch, curvature)
    return lambda x: x if x.dim() == 2 else x.flatten(0, 1)


@fault("Laplace: an exact F without what matrices share", "methods.laplace:_Joint.eigen", "Laplace")
def _(self):
    root, first = torch.cat(self.rows), 16  # the first matrix has 16 numbers
    F = root.T @ root
    F[:first, first:], F[first:, :first] = 0.0, 0.0
    values, vectors = torch.linalg.eigh(F)
    one = torch.ones(1, 1).double()
    return {laplace.JOINT: laplace.Curvature(vectors, one, values.clamp(min=0)[:, None])}


@fault("Laplace: roots of a cut factor's eigenvalues", "methods.laplace:_Moments.eigen", "Laplace")
def _(self):
    vectors, values = eigen(self)
    return vectors, values.sqrt() if self.rank < len(self.sum) else values


@fault("Laplace: scaling left out", "methods.laplace:_matrices", "Laplace")
def _(chosen, passes, gradients):
    of_one = {name: g / chosen[name].config.scaling for name, g in gradients.items()}
    return matrices(chosen, passes, of_one)


@fault("Laplace: curvature without N", "methods.laplace:Laplace.fit", "Laplace")
def _(*a, **k):
    found = fit(*a, **k)
    parts = {name: c._replace(values=c.values / 5) for name, c in found.curvature.items()}
    return dataclasses.replace(found, curvature=parts)


@fault("Laplace: another root", "verify.method_checks:draw_logits", "Laplace")
def _(mean, covariance, ids, samples, seed):
    eps = Noise(seed, 0).normal(laplace.LOGITS_LAYER, ids, mean.shape[1]).double()
    return mean + (torch.linalg.cholesky(covariance) @ eps[..., None])[None, ..., 0]


@fault("evidence: half the determinant", "methods.laplace:Laplace._values", "Laplace, evidence")
def _(self):
    return torch.cat([c.values.flatten() for c in self.curvature.values()]) / 2


@fault("evidence: norms not squared", "methods.laplace:_squares", "Laplace, evidence")
def _(weights):
    return math.fsum(float(weight.double().norm()) for weight in weights.values())


@fault("evidence: the best prior 0.01 % off", "methods.laplace:Laplace.optimise_prior",
       "Laplace, evidence")  # fmt: skip
def _(self):
    best = optimise(self)
    return dataclasses.replace(best, precision=1.0001 * best.precision)


# --- the posterior over the scales ----------------------------------------------------------------

jacobians, spread, best_precision = (
    subspace.jacobians,
    subspace.Subspace.spread,
    subspace.best_precision,
)


@fault("subspace: J without the scaling", "methods.subspace:jacobians", "subspace")
def _(model, batch):
    logits, J = jacobians(model, batch)
    return logits, J / 1.5


@fault("subspace: J of padding too", "methods.subspace:class_logits", "subspace")
def _(model, batch, noise, padded=False):
    whole = dataclasses.replace(
        batch, lengths=torch.full_like(batch.lengths, batch.tokens.shape[1])
    )
    return class_logits(model, whole, noise, padded=padded)


@fault("subspace: Sigma for its root", "methods.subspace:Subspace.spread", "subspace")
def _(self, x):
    return spread(self, spread(self, x))


@fault("subspace: one draw for all", "methods.subspace:Noise.normal", "subspace")
def _(self, layer, groups, rank, draws=None):
    return normal(self, layer, torch.zeros_like(groups), rank, draws)


@fault("subspace: eigenvalues times the factor", "methods.subspace:Subspace.scaled",
       "subspace, evidence")  # fmt: skip
def _(self, factor):
    precision, values = self.precision * factor, self.values * factor
    return dataclasses.replace(self, precision=precision, values=values)


@fault("subspace: the layers apart", "methods.subspace:whitened", "subspace, evidence")
def _(H, precision):
    blocks = torch.block_diag(*[torch.ones(2, 2).to(H)] * (len(H) // 2))
    return blocks * H / precision.sqrt() / precision.sqrt()[:, None]


@fault("subspace: lambda 0.01 % off", "methods.subspace:best_precision", "subspace, evidence")
def _(*a):
    return 1.0001 * best_precision(*a)


@fault("subspace: one lambda for all", "methods.subspace:groups_of", "subspace, evidence")
def _(sizes, groups):
    return torch.zeros(sum(sizes.values()), dtype=torch.int64), ["all"]


# --- variants of ours -----------------------------------------------------------------------------

factor = full.FullAdapter.factor
FULL = "methods.full:FullAdapter.factor"


@fault("prior not the best", "core.adapter:fitted_prior_std", "fitted priors")
def _(second, config, kl):
    return 1.0001 * fitted_prior_std(second, config, kl)


@fault("one prior for all layers", "core.adapter:fitted_prior_std", "fitted priors")
def _(second, config, kl):
    return second.mean().sqrt()


@fault("priors of a full covariance fixed", "methods.full:fitted_prior_std", "fitted priors")
def _(second, config, kl):
    return config.prior_std


@fault("L transposed", FULL, "full covariance")
def _(self):
    return factor(self).T


@fault("L by columns", FULL, "full covariance")
def _(self):
    places = torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1])
    return torch.diag(self.log_sigma.exp()).index_put(places, self.lower.flip(0))


@fault("full KL: lower left out", FULL, "full covariance, KL")
def _(self):
    return torch.diag(self.log_sigma.exp())


@fault("full KL: lower detached", FULL, "full covariance, KL")
def _(self):
    L = factor(self)
    return L.detach().tril(-1) + L.diagonal().diag()


# --- MAP, dropout, ensembles, SWAG, temperature ---------------------------------------------------

MAP, DROPOUT = "methods.map:MapAdapter.complexity", "methods.dropout:DropoutAdapter.hidden"
drop, penalty = methods.DropoutAdapter.hidden, MapAdapter.complexity
fault("dropout: 1 - p for p", DROPOUT, "dropout")(with_config(drop, dropout=lambda p: 1 - p))
fault("dropout: one mask", DROPOUT, "dropout")(with_config(drop, **ONE_FOR_ALL))
fault("dropout: not scaled", DROPOUT, "dropout")(with_config(drop, alpha=lambda alpha: 0.7 * alpha))


@fault("MAP: variance for standard deviation", MAP, "MAP")
@classmethod
def _(cls, layers, kl):
    return penalty(layers, kl) * layers[0].config.prior_std


@fault("MAP: A alone", MAP, "MAP")
@classmethod
def _(cls, layers, kl):
    return sum(a.A.double().square().sum() for a in layers) / (2 * layers[0].config.prior_std ** 2)


@fault("ensemble: logits averaged", "methods.ensemble:Ensemble.log_probs", "ensemble")
def _(self, model, batch, samples, seed):
    with torch.no_grad():
        each = [ensemble.mean_log_probs(model, batch, member) for member in self.members]
    return torch.stack(each).mean(0).log_softmax(-1)[None]


@fault("ensemble: one noise for all members", "methods.ensemble:Noise", "ensemble, draws")
def _(seed, draw):
    return Noise(seed, draw // 2)


@fault("ensemble: draws rounded down", "methods.ensemble:Ensemble.draws", "ensemble, draws")
def _(self, model, samples):
    return samples - samples % 2


@fault("ensemble: weights left there", "methods.ensemble:_weights", "ensemble")
@contextmanager
def _(model, state):
    for name, adapter in adapters(model).items():
        for key, parameter in adapter.named_parameters():
            parameter.data = state[f"{name}.{key}"].to(parameter)
    yield


def swag_draw(sd):
    """`Swag.draw` with sd(variance, count) for its standard deviations."""

    def draw(self, noise):
        out = {}
        for index, (name, mean) in enumerate(self.mean.items()):
            eps = noise.normal(swag.FIRST_SWAG_LAYER + index, 1, mean.numel())
            variance = self.square[name] - mean.square()
            out[name] = mean + sd(variance, self.count) * eps.view(mean.shape)
        return out

    return draw


fault("SWAG: variance for sd", "methods.swag:Swag.draw", "SWAG")(swag_draw(lambda v, n: v))
fault("SWAG: n - 1", "methods.swag:Swag.draw", "SWAG")(
    swag_draw(lambda v, n: (v * n / (n - 1)).sqrt())
)


@fault("SWAG: an average that forgets", "methods.swag:Swag.collect", "SWAG")
def _(self, model):
    self.count += 1
    for name, value in adapter_state(model).items():
        for kept, new in ((self.mean, value), (self.square, value.square())):
            kept[name] = 0.9 * kept[name] + 0.1 * new if name in kept else new


@fault("temperature: 0.01 % off", "verify.method_checks:fit_temperature", "temperature")
def _(logits, labels):
    return 1.0001 * metrics.fit_temperature(logits, labels)


@fault("temperature: 1 / T", "verify.method_checks:fit_temperature", "temperature")
def _(logits, labels):
    return 1 / metrics.fit_temperature(logits, labels)


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_its_methods_check(name, monkeypatch):
    target, value, check = FAULTS[name]
    replace(monkeypatch, target, value)
    result = run(CHECKS[check], subspace_lora_linear, torch.device("cpu"))
    ended = re.match(r"\w+: ", result.note)  # an exception
    assert result.worst > 1 and not ended, result


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_has_a_fault_and_passes_without(name):
    assert name in {check for *_, check in FAULTS.values()}
    result = run(CHECKS[name], subspace_lora_linear, torch.device("cpu"))
    assert result.passed and result.cases > 1, result


def test_the_measures_measure():
    """A slope that is wrong in one place is seen; the smallest value is found; so is a distance."""

    class Halves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 1 * x

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.tensor([1.0, 1.0, 1 + 1e-5]).double()

    x = torch.tensor([1.0, 2.0, 3.0]).double().requires_grad_()
    before = x.detach().clone()
    assert slopes(lambda: x.exp().sum(), [x]) <= 1 and torch.equal(x, before)
    assert slopes(lambda: Halves.apply(x).exp().sum(), [x]) > 1
    assert abs(golden_section(lambda t: math.cosh(t - 1.5)) - 1) <= 1e-15
    one = torch.tensor([1.0, 2.0]).double()
    assert abs(distance(one + 0.25, one, 0.25) - 0.5) <= 1e-15
