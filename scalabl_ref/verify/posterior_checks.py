"""Checks of posteriors by their options, by dense matrices: parts, cuts, several batches, files.

`method_checks` looks at each posterior with its usual settings, fitted to one batch.
"""

from __future__ import annotations

import math
import operator
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor

from ..core.adapter import adapter_state, adapters
from ..core.noise import Noise
from ..core.objective import Batch, class_logits
from ..methods import Ensemble, Subspace, Swag, fit_tfb, to_points
from ..methods import laplace as laplace_module
from ..methods.ensemble import State
from ..methods.evidence import groups_of
from ..methods.laplace import CURVATURES, LAYERS, LOGITS_LAYER, CurvatureKind, Laplace
from ..methods.posterior import POSTERIORS, load_posterior
from ..methods.subspace import Curvature, points_of, validated
from ..methods.tfb import TfbAdapter, largest
from ..model.llama import Llama
from .adapter_checks import KINDS
from .check import Check, Errors, Op, exact, near, ratio, refused
from .method_checks import (
    EPS,
    EPS_32,
    NETWORK,
    TARGETS,
    by_scales,
    distance,
    expanded_blocks,
    fill,
    gauss_newton,
    jacobians,
    joined,
    last_blocks,
    last_inputs,
    merged_logits,
    normals,
    parts,
    prompts,
    small_model,
    weights_of,
    with_added,
)  # fmt: skip


def split(batch: Batch, *at: int) -> list[Batch]:
    """The batch in pieces that begin at these rows."""
    edges = [0, *at, len(batch.ids)]
    return [batch.rows(torch.arange(a, b)) for a, b in zip(edges, edges[1:], strict=False)]


def root(matrix: Tensor) -> Tensor:
    """The symmetric root of matrices that may be singular."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


# --- Laplace --------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """blocks: of F by matrix. J: gradients at other prompts. log_likelihood, squares: as (18)."""

    blocks: dict[str, Tensor]
    J: dict[str, Tensor]
    log_likelihood: float
    squares: float


def dense(model: Llama, seen: Batch, other: Batch, kind: CurvatureKind) -> dict[str, Dense]:
    """By the layers: of all, and of the last alone, which is the head."""
    logits, J = jacobians(model, seen)
    p, later = logits.softmax(1), jacobians(model, other)[1]
    fit = sum(math.log(p[i, label]) for i, label in enumerate(seen.labels.tolist()))
    if kind == "last":
        every = last_blocks(p, J, last_inputs(model, seen))
    else:
        every = expanded_blocks(model, seen) if kind == "expand" else {}
    found: dict[str, Dense] = {}
    for layers in LAYERS:
        own = [name for name in J if layers == "all" or name.startswith("lm_head.")]
        squares = sum(float(weights_of(model)[name].square().sum()) for name in own)
        blocks, at = {name: every.get(name) for name in own}, {name: later[name] for name in own}
        if kind == "exact":
            whole = joined({name: J[name] for name in own})
            blocks, at = {name: gauss_newton(p, each) for name, each in whole.items()}, joined(at)
        found[layers] = Dense(cast(dict[str, Tensor], blocks), at, fit, squares)
    return found


def covariance_of(found: Dense, precision: float) -> Tensor:
    total: Tensor | float = 0.0
    for name, F in found.blocks.items():
        J = found.J[name].flatten(2)
        total = total + J @ torch.linalg.inv(F + precision * torch.eye(len(F)).to(F)) @ J.mT
    return cast(Tensor, total)


def laplace_options(_: Op, device: torch.device) -> Errors:
    """Each F of all layers and of the head alone, from batches of 5, 1 and 3 rows; the prior."""
    seen, other = prompts(device, 9, 4), prompts(device, 3, 5, first=20)
    for kind in CURVATURES:
        # "last" is g a^T where there is one token, or only the last one reaches the answer
        targets = ("q_proj", "up_proj", "lm_head") if kind == "last" else TARGETS
        model = small_model(device, targets, "map", prior_std=0.5)
        for layers, found in dense(model, seen, other, kind).items():
            case, eps = f"{kind}, {layers}", 0.0
            fitted = Laplace.fit(model, split(seen, 5, 6), cast(Any, layers), curvature=kind)
            yield exact(fitted.precision == 4.0, f"{case}: precision {fitted.precision}")
            eps = max(float(F.trace()) for F in found.blocks.values())
            eps = NETWORK * (1 + eps / 3) * EPS  # by the condition
            right = covariance_of(found, 4.0).cpu()
            got = fitted.logits(model, other)[1].cpu()
            yield ratio(got, right, right.abs().max(), eps, f"{case}: covariance")
            for at in (4.0, 3.0):
                each = [torch.eye(len(F)).to(F) + F / at for F in found.blocks.values()]
                log_ratio = sum(float(torch.linalg.slogdet(one)[1]) for one in each)
                value = found.log_likelihood - at * found.squares / 2 - log_ratio / 2
                size = abs(found.log_likelihood) + at * found.squares + log_ratio
                given = fitted.log_evidence(None if at == 4.0 else at)
                yield near(given, value, eps * size, f"{case}: evidence")
    yield exact(Laplace.fit(small_model(device), [seen]).precision == 1, "the precision of mle")
    by_default = Laplace.fit(model, [seen]).logits(model, other)[1]
    expand = Laplace.fit(model, [seen], "all", curvature="expand").logits(model, other)[1]
    yield exact(torch.equal(by_default, expand), "the default layers and F")


def laplace_cut(_: Op, device: torch.device) -> Errors:
    """Factors cut to rank 2 after each piece that is added, by dense eigenvectors."""
    pieces, other = split(prompts(device, 5, 4), 3), prompts(device, 3, 5, first=20)
    model = small_model(device, TARGETS)
    J = jacobians(model, other)[1]
    blocks = cut_blocks(model, pieces, 2)
    right = covariance_of(Dense(blocks, J, 0.0, 0.0), 0.7)
    got = Laplace.fit(model, pieces, rank=2, precision=0.7).logits(model, other)[1]
    trace = max(float(F.trace()) for F in blocks.values())
    yield distance(got, right, 100 * NETWORK * (1 + trace / 0.7) * EPS)


def cut_blocks(model: Llama, batches: list[Batch], rank: int) -> dict[str, Tensor]:
    """As `expanded_blocks`, with each moment cut to its largest eigenvalues as it grows: that of
    the gradients after each class of a batch, that of the inputs after each batch."""

    def cut(moment: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moment)
        kept = values.argsort()[max(0, len(values) - rank) :]
        return (vectors[:, kept] * values[kept]) @ vectors[:, kept].T

    own, tokens = adapters(model), dict.fromkeys(adapters(model), 0)
    A, B = ({name: parts(a)[key] for name, a in own.items()} for key in "AB")
    moments = {(name, i): torch.zeros(d, d, dtype=torch.float64)
               for name in own for i, d in enumerate((*A[name].shape, *B[name].shape))}  # fmt: skip
    for batch in batches:
        rows = []
        for row, length in enumerate(batch.lengths.tolist()):
            one = batch.rows(torch.tensor([row]))
            rows.append(with_added(model, replace(one, tokens=one.tokens[:, :length])))
        for name, adapter in own.items():
            x = torch.cat([inputs[name] for inputs, _ in rows])
            tokens[name] += len(x)
            new = [(1, x), (3, x @ A[name].T)]
            for c in range(len(batch.classes)):
                each = [math.sqrt(of[c][0]) * of[c][1][name] for _, of in rows]
                g = adapter.config.scaling * torch.cat(each)
                new += [(0, g @ B[name]), (2, g)]
            for i, vectors in new:
                moments[name, i] = cut(moments[name, i] + vectors.T @ vectors)
    blocks = {}
    for name, T in tokens.items():
        blocks[f"{name}.A"] = torch.kron(moments[name, 0], moments[name, 1] / T)
        blocks[f"{name}.B"] = torch.kron(moments[name, 2], moments[name, 3] / T)
    return {name: block.to(model.device) for name, block in blocks.items()}


def laplace_answers(_: Op, device: torch.device) -> Errors:
    """Draws by id, the mean, probit by hand; and what must be refused."""
    seen, other = prompts(device, 5, 4), prompts(device, 3, 5, first=20)
    model = small_model(device, TARGETS)
    fitted = Laplace.fit(model, [seen], precision=0.7)
    mean, covariance = (t.cpu() for t in fitted.logits(model, other))
    eps = NETWORK * EPS
    for i, found in enumerate(fitted.log_probs(model, other, 2, seed=9).cpu()):
        z = torch.stack([normals(Noise(9, i), LOGITS_LAYER, id, 3) for id in other.ids.tolist()])
        right = (mean + (root(covariance) @ z[..., None])[..., 0]).log_softmax(1)
        yield distance(found, right, 100 * eps)
    [still] = fitted.log_probs(model, other, 0, seed=9).cpu()
    yield distance(still, mean.log_softmax(1), eps)
    for row, found in enumerate(fitted.probit(model, other).exp().cpu().tolist()):
        each = [math.exp(m / math.sqrt(1 + math.pi * float(covariance[row, c, c]) / 8))
                for c, m in enumerate(mean[row].tolist())]  # fmt: skip
        for got, value in zip(found, each, strict=True):
            yield near(got, value / sum(each), 100 * EPS, f"probit of row {row}")
    fit = partial(Laplace.fit, model)
    calls: list[tuple[Callable[[], object], str]] = [
        (partial(fit, [seen], cast(Any, "first")), "layers"),
        (partial(fit, [seen], rank=0), "rank"),
        (partial(fit, [seen], curvature=cast(Any, "other")), "curvature"),
        (partial(fit, [seen], rank=2, curvature="exact"), "leave rank out"),
        (partial(fit, []), "no examples"), (partial(fit, [seen], precision=0.0), "precision"),
        (partial(fitted.log_probs, model, other, -1, 0), "negative"),
        (partial(Laplace.fit, small_model(device, method="scalabl"), [seen]), "plain LoRA"),
        (partial(fitted.logits, small_model(device, ("q_proj",)), other), "other adapters"),
        (replace(fitted, squares=0.0).optimise_prior, "no precision"),
    ]  # fmt: skip
    for call, words in calls:
        yield refused(call, words)
    numbers = 15 * sum(weight.numel() for weight in weights_of(model).values())
    with mock.patch.object(laplace_module, "MOST_NUMBERS", numbers):
        fit([seen], curvature="exact")
    yield exact(fit([seen], rank=1, precision=1e-9).precision == 1e-9, "the least rank")
    with mock.patch.object(laplace_module, "MOST_NUMBERS", numbers - 1):
        yield refused(partial(fit, [seen], curvature="exact"), "more than")
    with torch.no_grad():
        adapters(model)["lm_head"].A.mul_(1.001)
    yield refused(partial(fitted.logits, model, other), "other weights")


# --- The posterior over the scales ----------------------------------------------------------------


def point_model(device: torch.device) -> Llama:
    """Four adapters of rank 2, one of which has one scale: its other column of B is 0."""
    model = small_model(device, TARGETS)
    with torch.no_grad():
        B = adapters(model)["layers.0.attn.v_proj"].B
        B[:, 1] = 2 * B[:, 0]
    to_points(model)
    return model


def kept_scales(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    """`by_scales` without the scale that has no effect, and without the mean over classes."""
    logits, J = by_scales(model, batch)
    none = 2 * list(adapters(model)).index("layers.0.attn.v_proj") + 1
    chosen = [i for i in range(8) if i != none]
    J = J[..., chosen]
    return logits, J - J.mean(1, keepdim=True)


def posterior_covariance(H: Tensor, precision: Tensor, directions: int) -> Tensor:
    """(25); with fewer directions than scales the others have the prior's variance."""
    std = precision.rsqrt().to(H)
    values, U = torch.linalg.eigh(std[:, None] * H * std)
    values, U = values[-directions:], U[:, -directions:]
    inner = torch.eye(len(H)).to(H) - (U * (values / (1 + values))) @ U.T
    return std[:, None] * inner * std


def subspace_options(_: Op, device: torch.device) -> Errors:
    """Directions, a precision of each scale, factors, draws of scales, batches, the mean."""
    seen, other = prompts(device, 7, 4), prompts(device, 3, 5, first=20)
    model = point_model(device)
    logits, J = kept_scales(model, seen)
    H = gauss_newton(logits.softmax(1), J)
    mean, J = kept_scales(model, other)
    D = len(H)
    curvature = Curvature.measure(model, split(seen, 4, 5))
    yield exact(D == 7 and len(curvature.scales) == D, f"{len(curvature.scales)} scales")
    yield distance(curvature.H, H, NETWORK * EPS)
    log_p = logits.log_softmax(1)[torch.arange(7), seen.labels].sum()
    yield near(curvature.log_likelihood, float(log_p), 7 * NETWORK * EPS, "log-likelihood")
    some = torch.linspace(0.3, 2.0, D, dtype=torch.float64)
    for precision, directions in ((0.7, None), (0.7, 3), (some, None), (some, 1), (some, 99)):
        posterior = curvature.posterior(precision, directions=directions)
        each = torch.as_tensor(precision, dtype=torch.float64).expand(D)
        eps = NETWORK * (1 + float(H.trace() / each.min())) * EPS
        for factor in (1.0, 2.5):
            f, root_of = posterior.scaled(factor).gaussian(model, other)
            yield distance(f, mean, NETWORK * EPS)
            Sigma = posterior_covariance(H, factor * each, min(D, directions or D))
            yield distance(root_of @ root_of.mT, J @ Sigma @ J.mT, 100 * eps)
        for predicts in ("linear", "sampled"):
            drawing = replace(posterior, predicts=predicts)
            [still] = drawing.log_probs(model, other, 0, seed=1)
            yield distance(still, mean.log_softmax(1), NETWORK * EPS)
    linear = curvature.posterior(some, directions=3)
    f, root_of = linear.gaussian(model, other)
    moves = root((root_of @ root_of.mT).cpu())
    for i, found in enumerate(linear.log_probs(model, other, 2, seed=9).cpu()):
        z = torch.stack([normals(Noise(9, i), LOGITS_LAYER, id, 3) for id in other.ids.tolist()])
        right = (f.cpu() + (moves @ z[..., None])[..., 0]).log_softmax(1)
        yield distance(found, right, 100 * NETWORK * EPS)
    whole = curvature.posterior()
    yield exact(len(set(whole.precision.tolist())) == 1, "one precision for all by default")
    M = torch.linalg.solve(H.cpu() + whole.precision.diag(), H.cpu()).diagonal()
    left = (M - whole.precision * whole.scales.square()).sum()
    yield near(float(left), 0.0, 1e-8 * D, "slope of the evidence")
    yield exact(whole.predicts == "linear", "linear by default")


def validated_width(_: Op, device: torch.device) -> Errors:
    """The best of 65 factors by the NLL of keyed draws, in dense algebra."""
    model, seen, held = point_model(device), prompts(device, 7, 4), prompts(device, 9, 4, first=40)
    logits, J = kept_scales(model, seen)
    H = gauss_newton(logits.softmax(1), J).cpu()
    mean, J = (t.cpu() for t in kept_scales(model, held))
    z = torch.stack([torch.stack([normals(Noise(5, i), LOGITS_LAYER, id, 3)
                                  for id in held.ids.tolist()]) for i in range(10)])  # fmt: skip
    posterior = Subspace.fit(model, [seen], 0.02)
    values = []
    for i in range(-32, 33):
        precision = torch.full((len(H),), 0.02 * 10 ** (i / 8), dtype=torch.float64)
        Sigma = posterior_covariance(H, precision, len(H))
        moves = root(J @ Sigma @ J.mT)
        logs = (mean + (moves @ z[..., None])[..., 0]).log_softmax(-1)
        right = logs[:, torch.arange(9), held.labels.cpu()].exp().mean(0)
        values.append(-float(right.log().sum()))
    best = 0.02 * 10 ** ((values.index(min(values)) - 32) / 8)
    found = validated(posterior, model, split(held, 4), seed=5, samples=10)
    got = float(found.precision[0])
    yield exact(abs(got / best - 1) < 1e-9, f"precision {got}, the best is {best}")
    yield refused(partial(validated, posterior, model, []), "no examples")


def subspace_refusals(_: Op, device: torch.device) -> Errors:
    model, seen = point_model(device), prompts(device, 4, 4)
    curvature = Curvature.measure(model, [seen])
    posterior = curvature.posterior(0.7)
    still = small_model(device)
    with torch.no_grad():
        for adapter in adapters(still).values():
            adapter.B.zero_()
    to_points_alone = small_model(device)
    calls: list[tuple[Callable[[], object], str]] = [
        (partial(curvature.posterior, 0.7, directions=0), "directions"),
        (partial(curvature.posterior, 0.0), "precision must be positive"),
        (partial(curvature.posterior, groups=cast(Any, "other")), "groups"),
        (partial(curvature.posterior, 0.7, predicts=cast(Any, "other")), "predicts"),
        (partial(Curvature.measure, to_points_alone, [seen]), "method point"),
        (partial(Curvature.measure, model, []), "no examples"),
        (partial(posterior.log_probs, model, seen, -1, 0), "negative"),
        (partial(replace(curvature, H=0 * curvature.H).posterior), "no precision"),
    ]  # fmt: skip
    for call, words in calls:
        yield refused(call, words)
    sizes = {"layers.0.a.q_proj": 2, "layers.1.a.q_proj": 1, "lm_head": 1}
    for groups, right in (("all", [0, 0, 0, 0]), ("target", [0, 0, 0, 1]), ("layer", [0, 0, 1, 2])):
        yield exact(groups_of(sizes, cast(Any, groups))[0].tolist() == right, f"groups {groups}")
    with torch.no_grad():
        cast(Any, points_of(model)["lm_head"]).log_s.add_(1e-3)
    for predicts in ("linear", "sampled"):
        for samples in (0, 1):
            other = replace(posterior, predicts=predicts)
            yield refused(partial(other.log_probs, model, seen, samples, 0), "other adapters")


# --- Points, TFB, SWAG, ensembles -----------------------------------------------------------------


def points(_: Op, device: torch.device) -> Errors:
    """`to_points` keeps the mean function of every method; A has orthonormal rows; s falls."""
    batch = prompts(device, 4, 4)
    for kind in KINDS:
        model = small_model(device, **{"method": "scalabl", **kind})
        state: State = {}
        for name, adapter in adapters(model).items():
            state |= {
                f"{name}.A": adapter.lora_A().detach().cpu(),
                f"{name}.B": parts(adapter)["B"],
            }
        right = merged_logits(model, batch, state)
        to_points(model)
        yield distance(class_logits(model, batch, None), right, 4 * NETWORK * EPS)
        for adapter in adapters(model).values():
            p = parts(adapter)
            gram, unit = p["A"] @ p["A"].T, torch.eye(2).double()
            yield ratio(gram, unit, torch.ones(()), NETWORK * EPS, f"{kind}: rows of A")
            squares = p["B"].square().sum(0)
            yield ratio(squares, torch.ones(2).double(), torch.ones(2), NETWORK * EPS, "B")
            first, second = p["log_s"].tolist()
            yield exact(first >= second, f"{kind}: order of s")
            same = adapter.config.method == "point" and adapter.config.scaling == 1.5
            yield exact(same, f"{kind}: {adapter.config}")


def tfb_options(_: Op, device: torch.device) -> Errors:
    """The search on a step; B without full rank; labels that are not used; batches; bounds."""
    for edge, low, high, by in (
        (0.3, 1e-4, 1.0, 0.01),
        (0.02, 1e-3, 5.0, 0.3),
        (0.9, 0.5, 1.0, 0.1),
    ):
        found = largest(partial(operator.ge, edge), low, high, by)
        yield exact(found <= edge < found * (1 + by), f"{found} of {edge} by {by}")
    yield exact(largest(lambda x: x != 0.5, 0.25, 2.0, 0.1) == 2.0, "the upper end fits")
    for bounds, words in (((0.0, 1.0, 0.1), "search"), ((2.0, 1.0, 0.1), "search"),
                          ((0.1, 1.0, 0.0), "search"), ((0.4, 1.0, 0.1), "no sigma")):  # fmt: skip
        yield refused(partial(largest, lambda x: x < 0.3, *bounds), words)
    batch, sigmas = prompts(device, 2, 5), []
    cases = [batch], split(batch, 1), [replace(batch, labels=(batch.labels + 1) % 3)]
    for batches in cases:
        model = small_model(device, ("q_proj", "lm_head"), rank=4)  # the head has 3 rows
        with torch.no_grad():  # of rank 3
            B = adapters(model)["layers.0.attn.q_proj"].B
            B[:, 3] = B[:, 0] - B[:, 1]
        old = weights_of(model)
        sigmas.append(fit_tfb(model, batches, 0.1, 2, 4, (0.01, 1.0), 0.1))
        for name, adapter in adapters(model).items():
            p, old_A, old_B = parts(adapter), old[f"{name}.A"], old[f"{name}.B"]
            bound = p["B"].abs() @ p["A"].abs() + old_B.abs() @ old_A.abs()
            yield ratio(p["B"] @ p["A"], old_B @ old_A, bound, 4 * EPS_32, f"{name}: B A")
            d = torch.linalg.svdvals(old_B)[:3]
            right = torch.cat((sigmas[-1] / d, torch.zeros(1)))
            yield ratio(p["sigma"], right, right.max(), 8 * EPS_32, f"{name}: widths")
            yield exact(isinstance(adapter, TfbAdapter) and adapter.config.scaling == 0.75, name)
    yield exact(len(set(sigmas)) == 1, f"widths of the same answers: {sigmas}")
    for ends in ((1e-4, 1.0), (0.1, 0.7)):
        width = fit_tfb(small_model(device), [batch], 100.0, 2, 0, ends)
        yield exact(width == ends[1], f"width {width} within {ends}")
    model = small_model(device)
    at_first = adapters(model)
    for given, samples, tolerance, words in (([batch], 2, 1e-15, "no sigma"), ([], 2, 0.1, "no ex"),
                                             ([batch], 0, 0.1, "samples")):  # fmt: skip
        yield refused(partial(fit_tfb, model, given, tolerance, samples), words)
        now = adapters(model)
        yield exact(all(now[n] is a for n, a in at_first.items()), f"{words}: left as it was")
    yield refused(partial(fit_tfb, small_model(device, method="blob"), [batch]), "mle or map")


def fitted_swags(model: Llama, count: int, steps: int = 3) -> tuple[list[State], list[Swag]]:
    """Members, and their averages over a few iterates."""
    members, averages = [], []
    for member in range(count):
        swag = Swag()
        for step in range(steps):
            fill(adapters(model).values(), 10 * member + step)
            swag.collect(model)
        members.append({n: t.clone() for n, t in adapter_state(model).items()})
        averages.append(swag)
    return members, averages


def swag_options(_: Op, device: torch.device) -> Errors:
    """Iterates that are equal, an average that is put away and resumed, the mean, and none."""
    model, batch = small_model(device), prompts(device, 4, 5)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.A.fill_(0.1)
    still, resumed, whole = Swag(), Swag(), Swag()
    yield refused(partial(still.log_probs, model, batch, 1, 0), "no iterate")
    for _step in range(7):
        still.collect(model)
    for name, value in still.draw(Noise(1, 2)).items():
        yield ratio(value, still.mean[name], torch.ones(()), 1e-7, f"{name} of equal iterates")
    for step in range(4):
        fill(adapters(model).values(), step)
        whole.collect(model)
        if step == 2:
            halfway = {name: t.clone() for name, t in whole.state().items()}
            resumed.collect(model)
            resumed.restore(halfway)
    resumed.collect(model)
    for got, right in ((resumed.mean, whole.mean), (resumed.square, whole.square)):
        same = got.keys() == right.keys() and all(torch.equal(got[n], right[n]) for n in right)
        yield exact(same and resumed.count == 4, "an average that goes on")
    own = weights_of(model)
    [still_probs] = whole.log_probs(model, batch, 0, 3).exp()
    mean = {name: t.cpu() for name, t in whole.mean.items()}
    yield distance(still_probs, merged_logits(model, batch, mean).softmax(1), NETWORK * EPS)
    for name, value in weights_of(model).items():
        yield exact(torch.equal(value, own[name]), f"{name} after a prediction")


def ensemble_options(_: Op, device: torch.device) -> Errors:
    """Posteriors of members share the draws out: draw i is that of member i mod M."""
    model, batch = small_model(device), prompts(device, 4, 5)
    members, averages = fitted_swags(model, 3)
    own = Ensemble(members, averages)
    for samples, count in ((4, 6), (0, 3)):
        logits = []
        for i in range(count):
            swag = averages[i % 3]
            state = swag.draw(Noise(8, i)) if samples else swag.mean
            logits.append(merged_logits(model, batch, {n: t.cpu() for n, t in state.items()}))
        found = own.log_probs(model, batch, samples, 8)
        right = torch.stack(logits).log_softmax(-1)
        yield distance(found, right, 4 * NETWORK * EPS)
        yield exact(own.draws(model, samples) == (count if samples else 0), f"{samples} samples")
    plain = Ensemble(members)
    yield exact(plain.draws(model, 5) == 0, "draws of members that draw nothing")
    right = torch.stack([merged_logits(model, batch, {n: t.cpu() for n, t in m.items()})
                         for m in members]).log_softmax(-1)  # fmt: skip
    yield distance(plain.log_probs(model, batch, 5, 8), right, NETWORK * EPS)
    yield refused(lambda: Ensemble(members, averages[:2]), "one kind")
    laplace = Laplace.fit(model, [batch])
    yield refused(lambda: Ensemble(members, [*averages[:2], laplace]), "one kind")
    part = dict(list(members[0].items())[1:])
    yield refused(partial(Ensemble([part]).log_probs, model, batch, 1, 0), "tensor")


def posteriors_on_disk(_: Op, device: torch.device) -> Errors:
    """Each posterior that is written and read predicts the same; what is broken is refused."""
    batch = prompts(device, 3, 4)
    plain, pointed = small_model(device), point_model(device)
    members, averages = fitted_swags(plain, 2)
    many = [{n: t + i for n, t in members[0].items()} for i in range(12)]
    seen = Subspace.fit(pointed, split(prompts(device, 7, 4), 3), 0.7, "layer", 3)
    made: list[tuple[str, Any, Llama]] = [
        ("laplace", Laplace.fit(plain, [batch], rank=3, precision=0.4), plain),
        ("laplace", Laplace.fit(plain, [batch], precision=0.4, curvature="exact"), plain),
        ("laplace", Laplace.fit(plain, [batch], "last", precision=0.4), plain),
        ("subspace", seen, pointed), ("subspace", replace(seen, predicts="sampled"), pointed),
        ("swag", averages[0], plain), ("ensemble", Ensemble(many), plain),
        ("ensemble", Ensemble(members, averages), plain),
    ]  # fmt: skip
    for name, posterior, model in made:
        case = f"{name}, {type(posterior)}"
        with tempfile.TemporaryDirectory() as folder:
            posterior.save(folder)
            back = load_posterior(folder, {"posterior": name})
            yield exact(type(back) is POSTERIORS[name], f"{case}: {type(back)}")
            got, right = (cast(Any, p).log_probs(model, batch, 3, 5) for p in (back, posterior))
            yield exact(torch.equal(got, right), f"{case}: predictions")
            if hasattr(posterior, "log_evidence"):
                same = cast(Any, back).log_evidence() == posterior.log_evidence()
                yield exact(same, f"{case}: evidence")
            if hasattr(posterior, "predicts"):
                yield exact(cast(Any, back).predicts == posterior.predicts, f"{case}: predicts")
            file = next(Path(folder).glob("*.safetensors"))
            for other in POSTERIORS.keys() - {name}:
                file.rename(file.with_name(f"{other}.safetensors"))
                file = file.with_name(f"{other}.safetensors")
                yield refused(partial(load_posterior, folder, {"posterior": other}), str(file))
            file.write_bytes(file.read_bytes()[:-1])
            yield refused(partial(load_posterior, folder, {"posterior": file.stem}), str(file))
    yield exact(load_posterior("nowhere", {}) is None, "a run of adapters alone")
    yield refused(partial(load_posterior, "nowhere", {"posterior": "other"}), "unknown posterior")


POSTERIOR_CHECKS = [
    Check("Laplace, parts", "(15), (16), (18) layers, batches, priors; dense", laplace_options),
    Check("Laplace, cut", "(16) factors cut to a rank as they grow, dense", laplace_cut),
    Check("Laplace, answers", "(17) draws by id, the mean, probit; refusals", laplace_answers),
    Check("subspace, parts", "(24) to (27) directions, precisions, batches", subspace_options),
    Check("subspace, validated", "(27) the factor of the lowest NLL, dense", validated_width),
    Check("subspace, refusals", "(25) groups; wrong arguments; other models", subspace_refusals),
    Check("points", "c B A as B diag(s) A, of every method", points),
    Check("TFB, parts", "(13), (14) the search, ranks, bounds, refusals", tfb_options),
    Check("SWAG, parts", "SWAG: equal iterates, resumed averages, the mean", swag_options),
    Check("ensemble, parts", "ensembles: members' posteriors share the draws", ensemble_options),
    Check("posteriors on disk", "written and read, they predict the same", posteriors_on_disk),
]
