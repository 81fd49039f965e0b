"""`scalabl verify`'s checks of the other methods, each against a computation of another kind.

Layers are compared row by row with the matrix of the row's draw, built from the normals of plain
Python. KLs are compared with dense formulas and loops. Posteriors are compared, on a small model,
with copies that have the drawn weights merged into them, and with dense matrices of explicit
gradients. All is in float64, except for TFB, which keeps adapters in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, adapters
from ..core.config import AdapterConfig
from ..core.layer import SAMPLING
from ..core.noise import FIRST_TRAINING_DRAW, Keys, Noise
from ..core.objective import Batch, class_logits, complexity
from ..core.philox import normal_row
from ..evaluation.metrics import fit_temperature
from ..evaluation.predict import predict
from ..methods import Ensemble, Subspace, fit_tfb, to_points
from ..methods.blob import SIGNS
from ..methods.ensemble import State
from ..methods.evidence import GROUPS, Groups
from ..methods.laplace import JOINT, LOGITS_LAYER, CurvatureKind, Laplace, draw_logits
from ..methods.subspace import SCALES_LAYER
from ..methods.swag import FIRST_SWAG_LAYER, Swag
from ..model.attach import Linear, add_adapters
from ..model.config import LlamaConfig
from ..model.llama import Llama
from . import reference
from .check import Check, Errors, Op, exact, ratio

EPS, EPS_32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
# Roundings behind a number of the small model: about five sums of at most 16 terms in its block and
# as many around it. Each at most doubles the error of its input, on both sides.
NETWORK = 2 * 2 * 2 * 5 * 16
NEAR = 4 * NETWORK * EPS_32  # of what is computed in float32
STEP = 2.0**-16  # of differences
CLASSES = (3, 5, 7)


# --- Cases ------------------------------------------------------------------------------------


def draws(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normals(noise: Noise, layer: int, group: int, count: int) -> Tensor:
    """The first components of a group's noise, (count,) float64, from plain Python."""
    z = normal_row(noise.seed, noise.draw, layer, group, count)
    return torch.tensor(z, dtype=torch.float64)


def fill(modules: Iterable[nn.Module], seed: int) -> None:
    """Normals in place of every parameter."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(draws(100 * seed + number, *parameter.shape))


def layers(device: torch.device, seed: int = 0, **config: Any) -> nn.ModuleDict:
    """q_proj (6 -> 5, with a bias) and v_proj (4 -> 7), with adapters of rank 3 and c = 1.5."""
    model = nn.ModuleDict({"q_proj": Linear(6, 5, bias=True), "v_proj": Linear(4, 7)})
    targets = ("q_proj", "v_proj")
    add_adapters(model, AdapterConfig(rank=3, alpha=4.5, targets=targets, **config)).double()
    fill([model], seed)
    return model.to(device)


def small_model(
    device: torch.device,
    targets: tuple[str, ...] = ("q_proj", "v_proj", "up_proj", "lm_head"),
    method: str = "mle",
    rank: int = 2,
    **config: Any,
) -> Llama:
    """A Llama of one block, three classes, and adapters with c = 3 / rank, in float64."""
    shape = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                        max_position_embeddings=8)  # fmt: skip
    model = Llama(shape).init_random_(std=0.4).trim_head(CLASSES)
    adapter = AdapterConfig(method, rank, alpha=3.0, targets=targets, **config)
    add_adapters(model, adapter).double()
    fill(adapters(model).values(), 1)
    return model.to(device)


def prompts(device: torch.device, rows: int, tokens: int, first: int = 0) -> Batch:
    """`rows` prompts of `tokens` tokens, or one fewer (but at least 1); ids count from `first`."""
    lengths = torch.tensor([max(1, tokens - row % 2) for row in range(rows)])
    ids = first + torch.arange(rows)
    text = 1 + (7 * ids[:, None] + 3 * torch.arange(tokens) ** 2) % 10
    text[torch.arange(tokens) >= lengths[:, None]] = 0
    return Batch(text, lengths, ids % len(CLASSES), ids, torch.tensor(CLASSES)).to(device)


def parts(adapter: Adapter) -> dict[str, Tensor]:
    """Parameters by name, float64 copies on the CPU."""
    return {name: p.detach().to("cpu", torch.float64, copy=True)
            for name, p in adapter.named_parameters()}  # fmt: skip


def weights_of(model: Llama) -> State:
    """A and B of every adapter by name, as lm_head.A, float64 copies on the CPU."""
    return {f"{name}.{key}": parts(adapter)[key]
            for name, adapter in adapters(model).items() for key in "AB"}  # fmt: skip


def merged_logits(model: Llama, batch: Batch, weights: State) -> Tensor:
    """Class logits (B, C) on the CPU of a copy whose layers have W + c B A and no adapter."""
    plain = copy.deepcopy(model)
    for name, adapter in adapters(model).items():
        linear = cast(Linear, plain.get_submodule(name))
        A, B = (weights[f"{name}.{key}"].to(linear.weight) for key in "AB")
        linear.weight.data = linear.weight.data + adapter.config.scaling * B @ A
        linear.adapter = None
    with torch.no_grad():
        return class_logits(plain, batch, None).cpu()


def mixed(logits: list[Tensor]) -> Tensor:
    """Average of the draws' probabilities by loops, (B, C)."""
    return torch.tensor(reference.predictive(torch.stack(logits))["probs"], dtype=torch.float64)


def distance(got: Tensor, expected: Tensor, eps: float) -> float:
    """`ratio` to the largest entry, for numbers out of the same sums."""
    got, expected = got.detach().cpu(), expected.cpu()
    return ratio(got, expected, expected.abs().max(), eps)


# --- Layers, row by row -----------------------------------------------------------------------

Terms = Callable[[Adapter, Noise, int], list[Tensor]]


def row_by_row(terms: Terms, **config: Any) -> Callable[[Op, torch.device], Errors]:
    """y = W x + bias + c B M x, M (r, d_in) the sum of what `terms` gives for the row's group.

    Also the gradient, along one direction of x and of all parameters, against differences.
    """
    noise, shape, explicit = Noise(2**40 + 5, 6), (2, 3), torch.tensor([9, 2**32 - 1])

    def outputs(linear: Linear, x: Tensor, ids: Tensor | None) -> Errors:
        adapter = cast(Adapter, linear.adapter)
        keys = Keys(noise, None if ids is None else ids.to(x.device))
        y = linear(x, keys).detach().cpu()
        weight, bias = (cast(Tensor, t).detach().cpu() for t in (linear.weight, linear.bias))
        cB = adapter.config.scaling * parts(adapter)["B"]
        for row, (got, vector) in enumerate(zip(y.view(6, 5), x.cpu().view(6, 6), strict=True)):
            group = reference.group_of_row(row, shape, adapter.config.sampling, ids)
            each = torch.stack(terms(adapter, noise, group))
            expected = weight @ vector + bias + cB @ each.sum(0) @ vector
            size = weight.abs() @ vector.abs() + bias.abs()
            size += cB.abs() @ each.abs().sum(0) @ vector.abs()
            # Sums of d_in, of r, of as many terms, and a few factors, on both sides.
            yield ratio(got, expected, size, 2 * (6 + 2 * 3 + 8) * EPS)

    def gradients(linear: Linear, x: Tensor) -> float:
        leaf, u = x.clone().requires_grad_(), draws(8, 2, 3, 5).to(x)
        tensors = [leaf, *cast(Adapter, linear.adapter).parameters()]
        return slopes(lambda: (u * linear(leaf, Keys(noise))).sum(), tensors)

    def run(_: Op, device: torch.device) -> Errors:
        x = draws(7, *shape, 6).to(device)
        for sampling in SAMPLING:
            linear = cast(Linear, layers(device, sampling=sampling, **config)["q_proj"])
            yield from outputs(linear, x, None)
            yield from outputs(linear, x, explicit)
            yield gradients(linear, x)

    return run


def slopes(function: Callable[[], Tensor], tensors: list[Tensor]) -> float:
    """Autograd's derivative of a scalar along one direction of its arguments, against differences.

    The bound: h^2 / 6 times the third derivative, which is below 1000 times the sizes here, and
    100 roundings of either value over 2 h.
    """
    gradients = torch.autograd.grad(function(), tensors, materialize_grads=True)
    direction = [draws(50 + i, *t.shape).to(t) for i, t in enumerate(tensors)]
    products = [(g * d).flatten() for g, d in zip(gradients, direction, strict=True)]

    @torch.no_grad()
    def at(step: float) -> Tensor:
        before = [tensor.clone() for tensor in tensors]
        for tensor, d in zip(tensors, direction, strict=True):
            tensor.add_(step * d)
        value = function().detach()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        return value

    got, expected = torch.cat(products).sum(), (at(STEP) - at(-STEP)) / (2 * STEP)
    size = torch.cat(products).abs().sum() + at(0.0).abs()
    return ratio(got, expected, size, STEP**2 / 6 * 1000 + 100 * EPS / STEP)


def drawn_by_flipout(adapter: Adapter, noise: Noise, group: int) -> list[Tensor]:
    """A and diag(t) (G^2 * E) diag(u)."""
    p = parts(adapter)
    return [p["A"], flips(adapter, noise, group) * p["G"] ** 2 * entries(adapter, noise)]


def entries(adapter: Adapter, noise: Noise) -> Tensor:
    """E (r, d_in), the same for every group."""
    return normals(noise, adapter.layer, 0, adapter.A.numel()).view(adapter.A.shape)


def flips(adapter: Adapter, noise: Noise, group: int) -> Tensor:
    """t_k u_j of a group, (r, d_in): u comes first, and 0 counts as positive."""
    rank, d_in = adapter.A.shape
    z = normals(noise, SIGNS + adapter.layer, group, d_in + rank).tolist()
    signs = [-1.0 if value < 0 else 1.0 for value in z]
    u, t = signs[:d_in], signs[d_in:]
    return torch.tensor([[a * b for b in u] for a in t], dtype=torch.float64)


def correlated(adapter: Adapter, noise: Noise, group: int) -> list[Tensor]:
    """diag(s) A, and diag(L_l eps_l) A for every column of L."""
    (s, L), A = gaussian(adapter), parts(adapter)["A"]
    eps = normals(noise, adapter.layer, group, len(s))
    return [s[:, None] * A, *((L[:, k] * eps[k])[:, None] * A for k in range(len(s)))]


def thinned(adapter: Adapter, noise: Noise, group: int) -> list[Tensor]:
    """The columns of A that are kept, those with P(Z <= z) >= p, over 1 - p."""
    p, A = adapter.config.dropout, parts(adapter)["A"]
    z = normals(noise, adapter.layer, group, A.shape[1]).tolist()
    kept = [float(math.erfc(-value / math.sqrt(2)) / 2 >= p) / (1 - p) for value in z]
    return [A * torch.tensor(kept, dtype=torch.float64)]


# --- KLs and priors ---------------------------------------------------------------------------


def blob_kl(_: Op, device: torch.device) -> Errors:
    """The sum over entries, and its gradient by hand."""
    for method, width in (("blob", 0.2), ("scalabl", 1.0)):
        yield exact(AdapterConfig(method).sigma_p == width, f"the default prior of {method}")
    for prior_std in (0.2, 1.0):
        model = layers(device, method="blob", prior_std=prior_std)
        kl, expected, size = complexity(model), 0.0, 0.0
        kl.backward()
        for adapter in adapters(model).values():
            A, G = (parts(adapter)[name] for name in "AG")
            for a, g in zip(A.flatten().tolist(), G.flatten().tolist(), strict=True):
                log_ratio = math.log(prior_std / g**2)
                quadratic = (g**4 + a**2) / (2 * prior_std**2)
                expected += log_ratio + quadratic - 0.5
                size += abs(log_ratio) + quadratic + 0.5
            to_A, grow, shrink = A / prior_std**2, 2 * G**3 / prior_std**2, 2 / G
            yield ratio(gradient(adapter, "A"), to_A, to_A.abs(), 16 * EPS)
            to_G, bound = grow - shrink, grow.abs() + shrink.abs()
            yield ratio(gradient(adapter, "G"), to_G, bound, 16 * EPS)
        yield abs(float(kl.detach()) - expected) / (30 * EPS * size)


def gradient(adapter: Adapter, name: str) -> Tensor:
    """The gradient of a parameter, on the CPU; zeros if it has none."""
    leaf = adapter.get_parameter(name)
    return torch.zeros_like(leaf).cpu() if leaf.grad is None else leaf.grad.cpu()


def map_density(_: Op, device: torch.device) -> Errors:
    """The log density of N(0, sigma_p^2) at zero less that at each entry, and its gradient."""
    for prior_std in (0.5, 3.0):
        model = layers(device, method="map", prior_std=prior_std)
        penalty, expected, size = complexity(model), 0.0, 0.0
        penalty.backward()
        norm = math.sqrt(2 * math.pi) * prior_std
        for adapter in adapters(model).values():
            for name, values in parts(adapter).items():
                for w in values.flatten().tolist():
                    log_density = math.log(math.exp(-((w / prior_std) ** 2) / 2) / norm)
                    expected -= log_density + math.log(norm)
                    size += abs(log_density) + abs(math.log(norm)) + 1
                slope = values / prior_std**2
                yield ratio(gradient(adapter, name), slope, slope.abs(), 8 * EPS)
        yield abs(float(penalty.detach()) - expected) / (16 * EPS * size)


def gaussian(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """s (r,) and L (r, r) of q(s~) = N(s, L L^T), entry by entry."""
    p, rank = parts(adapter), adapter.config.rank
    L = torch.diag(p["log_sigma"].exp())
    below = iter(p["lower"].tolist() if "lower" in p else [0.0] * (rank * (rank - 1) // 2))
    for k in range(rank):
        for j in range(k):
            L[k, j] = next(below)
    return p["log_s"].exp(), L


def full_kl(_: Op, device: torch.device) -> Errors:
    """Dense, and the gradient against differences."""
    for seed, prior_std in ((0, 1.0), (1, 0.3)):
        model = layers(device, seed, covariance="full", prior_std=prior_std)
        own = adapters(model).values()
        expected = sum(dense_kl(*gaussian(adapter), prior_std) for adapter in own)
        condition = max(float(torch.linalg.cond(gaussian(adapter)[1])) ** 2 for adapter in own)
        error = abs(float(complexity(model).detach()) - expected)
        yield error / (100 * condition * EPS * expected)
        trained = [adapter.get_parameter(n) for adapter in own for n in type(adapter).variational]
        yield slopes(partial(complexity, model), [*trained])


def dense_kl(s: Tensor, L: Tensor, prior_std: float) -> float:
    """KL of N(s, S) from N(0, P) as textbooks have it: traces, inverses and determinants."""
    S, P = L @ L.T, prior_std**2 * torch.eye(len(s)).double()
    inverse = torch.linalg.inv(P)
    log_ratio = torch.linalg.slogdet(P)[1] - torch.linalg.slogdet(S)[1]
    return float(torch.trace(inverse @ S) + s @ inverse @ s - len(s) + log_ratio) / 2


def fitted_priors(_: Op, device: torch.device) -> Errors:
    """The smallest KL over sigma_p, by golden sections; and (s, sigma) / k has the same one."""
    for covariance in ("diagonal", "full"):
        for prior in ("layer", "component"):
            model = layers(device, covariance=covariance, prior=prior)
            own = adapters(model).values()
            got = float(complexity(model).detach())
            expected = sum(smallest_kl(*gaussian(a), shared=prior == "layer") for a in own)
            with torch.no_grad():
                for adapter in own:
                    adapter.get_parameter("log_s").sub_(math.log(3))
                    adapter.get_parameter("log_sigma").sub_(math.log(3))
                    if covariance == "full":
                        adapter.get_parameter("lower").div_(3)
            scaled = float(complexity(model).detach())
            bound = 1000 * EPS * (10 + abs(expected))
            yield from (abs(got - expected) / bound, abs(got - scaled) / bound)


def smallest_kl(s: Tensor, L: Tensor, shared: bool) -> float:
    """Least KL of N(s, L L^T) from N(0, diag(sigma_p^2)), with one sigma_p or one for each scale.

    For each scale, the part that depends on sigma_p is log sigma_p + E[s~^2] / (2 sigma_p^2).
    """

    def least(moments: list[float]) -> float:
        return golden_section(lambda t: sum(t + m / (2 * math.exp(2 * t)) for m in moments))

    second = (s**2 + (L @ L.T).diagonal()).tolist()
    constant = -len(s) / 2 - float(torch.linalg.slogdet(L)[1])
    return constant + (least(second) if shared else sum(least([m]) for m in second))


def golden_section(function: Callable[[float], float]) -> float:
    """The smallest value on [-8, 8] of a function with one minimum."""
    low, high, golden = -8.0, 8.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-8:  # where a second-order change is below rounding
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if function(a) < function(b) else (a, high)
    return function((low + high) / 2)


# --- Posteriors of a model --------------------------------------------------------------------


def ensemble(_: Op, device: torch.device) -> Errors:
    """The members' mixture; and the model is left with the adapters it had."""
    model, batch, members = small_model(device), prompts(device, 4, 5), []
    for seed in (10, 20, 30):
        fill(adapters(model).values(), seed)
        members.append(weights_of(model))
    fill(adapters(model).values(), 40)
    own = merged_logits(model, batch, weights_of(model))
    got = predict(model, batch, posterior=Ensemble(members)).probs
    expected = mixed([merged_logits(model, batch, member) for member in members])
    yield distance(got, expected, NETWORK * EPS)
    yield distance(class_logits(model, batch, None), own, NETWORK * EPS)


def drawn_ensemble(_: Op, device: torch.device) -> Errors:
    """Of 3 draws of two ScalaBL members, 4: draw i of member i mod 2 under Noise(6, i); of 0, 2."""
    model = small_model(device, method="scalabl", sampling="batch")
    batch, members = prompts(device, 4, 5), []
    for seed in (10, 20):
        fill(adapters(model).values(), seed)
        own = adapters(model).items()
        members.append({f"{n}.{key}": p for n, a in own for key, p in parts(a).items()})
    for samples, width, count in ((3, 1.0, 4), (0, 0.0, 2)):
        logits = []
        for i in range(count):
            state = {}
            for name, adapter in adapters(model).items():
                keys = ("A", "B", "log_s", "log_sigma")
                A, B, log_s, log_sigma = (members[i % 2][f"{name}.{key}"] for key in keys)
                eps = width * normals(Noise(6, i), adapter.layer, 0, len(log_s))
                state[f"{name}.A"] = (log_s.exp() + log_sigma.exp() * eps)[:, None] * A
                state[f"{name}.B"] = B
            logits.append(merged_logits(model, batch, state))
        got = predict(model, batch, samples, seed=6, posterior=Ensemble(members)).probs
        yield distance(got, mixed(logits), 2 * NETWORK * EPS)


def swag(_: Op, device: torch.device) -> Errors:
    """Moments of all iterates at once, draws from plain Python's normals, and their mixture."""
    model, batch, fitted = small_model(device), prompts(device, 4, 5), Swag()
    iterates: list[State] = []
    for seed in (10, 20, 30, 40):
        fill(adapters(model).values(), seed)
        fitted.collect(model)
        iterates.append(weights_of(model))
    states: list[State] = [{}, {}]
    for index, name in enumerate(iterates[0]):
        values = torch.stack([state[name] for state in iterates])
        mean, square = values.mean(0), values.square().mean(0)
        sd = values.std(0, correction=0)
        yield ratio(fitted.mean[name].cpu(), mean, values.abs().mean(0), 16 * EPS)
        yield ratio(fitted.square[name].cpu(), square, square, 16 * EPS)
        for i, state in enumerate(states):
            eps = normals(Noise(8, i), FIRST_SWAG_LAYER + index, 0, mean.numel()).view(mean.shape)
            state[name] = mean + sd * eps
            # A difference of squares has lost the digits that they share.
            size = mean.abs() + square / sd * eps.abs()
            yield ratio(fitted.draw(Noise(8, i))[name].cpu(), state[name], size, 32 * EPS)
    got = predict(model, batch, samples=2, seed=8, posterior=fitted).probs
    expected = mixed([merged_logits(model, batch, state) for state in states])
    yield distance(got, expected, 4 * NETWORK * EPS)


def temperature(_: Op, device: torch.device) -> Errors:
    """The slope of the NLL by 1 / T is zero, in loops."""
    for seed in range(4):
        logits = 4 * draws(seed, 60, 4)
        labels = (logits + 6 * draws(seed + 10, 60, 4)).argmax(1)
        beta = 1 / fit_temperature(logits.to(device), labels.to(device))
        slope, curvature, size = [], [], []
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            weight = [math.exp(beta * (z - max(row))) for z in row]
            mean = math.fsum(w * z for w, z in zip(weight, row, strict=True)) / math.fsum(weight)
            square = math.fsum(w * (z - mean) ** 2 for w, z in zip(weight, row, strict=True))
            slope.append(mean - row[label])
            curvature.append(square / math.fsum(weight))
            size.append(max(row) - min(row))
        # Either side sums 4 products, of exponentials with rounded arguments, and 60 rows; and
        # beta itself is rounded.
        bound = 2 * (4 + 60 + 16) * EPS * math.fsum(size) + 4 * EPS * beta * math.fsum(curvature)
        yield abs(math.fsum(slope)) / bound


# --- TFB --------------------------------------------------------------------------------------

TOLERANCE, RESOLUTION, SAMPLES = 0.1, 0.01, 3


def widened(device: torch.device) -> tuple[Llama, Llama, Batch, float]:
    """A model before and after TFB, its calibration batch, and sigma_q."""
    model, batch = small_model(device), prompts(device, 4, 5)
    before = copy.deepcopy(model)
    sigma = fit_tfb(model, [batch], TOLERANCE, SAMPLES, seed=4, resolution=RESOLUTION)
    return before, model, batch, sigma


def tfb_rotation(_: Op, device: torch.device) -> Errors:
    """B' A' = B A, logits stay, and the columns' covariance is sigma_q^2 B (B^T B)^-1 B^T."""
    before, after, batch, sigma = widened(device)
    logits = merged_logits(before, batch, weights_of(before))
    yield distance(class_logits(after, batch, None), logits, NETWORK * EPS_32)
    for name, adapter in adapters(after).items():
        new, old = parts(adapter), parts(adapters(before)[name])
        A, B = new["A"], new["B"]
        # Both factors are rounded to float32 once, by half a unit.
        size = B.abs() @ A.abs()
        yield ratio(B @ A, old["B"] @ old["A"], size, 1.1 * EPS_32)
        gram = old["B"].T @ old["B"]
        projector = old["B"] @ torch.linalg.solve(gram, old["B"].T)
        spread = B * new["sigma"]
        size = spread.abs() @ spread.abs().T
        yield ratio(spread @ spread.T, sigma**2 * projector, size, 2.2 * EPS_32)


def tfb_width(_: Op, device: torch.device) -> Errors:
    """sigma_q keeps to the tolerance and (1 + resolution) sigma_q does not.

    The change over the tolerance for the one and its inverse for the other, both just below 1.
    """
    before, after, batch, sigma = widened(device)
    means = merged_logits(before, batch, weights_of(before)).softmax(1)
    answers = means.argmax(1)

    def change(width: float) -> float:
        """Of the NLL of the mean model's answers, relative to the tolerance."""
        nlls = [-p[rows, answers].log().mean() for p in (means, drawn(after, batch, width))]
        return float((nlls[1] / nlls[0] - 1).abs()) / TOLERANCE

    rows = torch.arange(len(answers))
    yield change(sigma)
    yield 1 / change(sigma * (1 + RESOLUTION))


def drawn(model: Llama, batch: Batch, width: float) -> Tensor:
    """Mixture (B, C) of copies with each example's own A merged, by draws of training.

    Row k of A' has the standard deviation width / |column k of B'|.
    """
    rows, of_rows = [], ("tokens", "lengths", "labels", "ids")
    for row, group in enumerate(batch.ids.tolist()):
        one = replace(batch, **{name: getattr(batch, name)[row : row + 1] for name in of_rows})
        logits = []
        for i in range(SAMPLES):
            state, noise = weights_of(model), Noise(4, FIRST_TRAINING_DRAW + i)
            for name, adapter in adapters(model).items():
                sd = width / state[f"{name}.B"].norm(dim=0)[:, None]
                state[f"{name}.A"] += sd * flips(adapter, noise, group) * entries(adapter, noise)
            logits.append(merged_logits(model, one, state))
        rows.append(mixed(logits))
    return torch.cat(rows)


# --- Laplace ----------------------------------------------------------------------------------

PRECISION = 0.7
TARGETS = ("q_proj", "v_proj", "up_proj", "lm_head")
# The kind of F, targets, and lengths of training prompts. "last" has those for which a matrix'
# gradient is g a^T, with its input a at the last token: where there is no other token, or only the
# last one reaches the answer.
FITS: list[tuple[CurvatureKind, tuple[str, ...], int]] = [
    ("last", ("v_proj", "up_proj", "lm_head"), 1),
    ("last", ("q_proj", "up_proj", "lm_head"), 5),
    ("expand", TARGETS, 5),
    ("exact", TARGETS, 5),
]


class Fit(NamedTuple):
    """blocks: dense blocks of F, by matrix. log_likelihood: of the five training prompts."""

    model: Llama
    laplace: Laplace
    blocks: dict[str, Tensor]
    log_likelihood: float


def fit(device: torch.device, kind: CurvatureKind, targets: tuple[str, ...], tokens: int) -> Fit:
    model, batch = small_model(device, targets), prompts(device, 5, tokens)
    logits, J = jacobians(model, batch)
    p = logits.softmax(1)
    log_likelihood = sum(math.log(p[i, label]) for i, label in enumerate(batch.labels.tolist()))
    if kind == "exact":
        blocks = {name: gauss_newton(p, each) for name, each in joined(J).items()}
    elif kind == "last":
        blocks = last_blocks(p, J, last_inputs(model, batch))
    else:
        blocks = expanded_blocks(model, batch)
    fitted = Laplace.fit(model, [batch], precision=PRECISION, curvature=kind)
    return Fit(model, fitted, blocks, log_likelihood)


def gauss_newton(p: Tensor, J: Tensor) -> Tensor:
    """Sum over examples of J^T (diag p - p p^T) J, for J (B, C, n)."""
    total = torch.zeros(J.shape[-1], J.shape[-1]).to(J)
    for of_class, weight in zip(J, p, strict=True):  # (C, n), (C,)
        total += of_class.T @ (weight.diag() - torch.outer(weight, weight)) @ of_class
    return total


def joined(J: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by all matrices in one row, (B, C, sum of m n)."""
    return {JOINT: torch.cat([each.flatten(2) for each in J.values()], 2)}


def last_blocks(p: Tensor, J: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """N E[g g^T] x E[a a^T], with g from the gradients by the matrix itself, g a^T."""
    blocks = {}
    for name, gradients in J.items():
        a = inputs[name]
        g = (gradients @ (a / a.square().sum(1, keepdim=True))[:, None, :, None])[..., 0]
        blocks[name] = torch.kron(gauss_newton(p, g), a.T @ a / len(a))
    return blocks


def expanded_blocks(model: Llama, batch: Batch) -> dict[str, Tensor]:
    """T E[g g^T] x E[a a^T] over the T tokens of all prompts, token by token.

    Each prompt goes alone through the model, without padding. g is the gradient by zeros that are
    added to the layer's output.
    """
    own, tokens = adapters(model), dict.fromkeys(adapters(model), 0)
    left = {name: 0 * parts(a)["B"] @ parts(a)["B"].T for name, a in own.items()}
    right = {name: 0 * parts(a)["A"].T @ parts(a)["A"] for name, a in own.items()}
    for row, length in enumerate(batch.lengths.tolist()):
        one = replace(batch.rows(torch.tensor([row])), tokens=batch.tokens[row, None, :length])
        x, each = with_added(model, one)
        for name, adapter in own.items():
            for p, gradients in each:
                for g in adapter.config.scaling * gradients[name]:
                    left[name] += p * torch.outer(g, g)
            for a in x[name]:
                right[name] += torch.outer(a, a)
                tokens[name] += 1
    blocks = {}
    for name, adapter in own.items():
        A, B, T = parts(adapter)["A"], parts(adapter)["B"], tokens[name]
        blocks[f"{name}.A"] = torch.kron(B.T @ left[name] @ B, right[name] / T)
        blocks[f"{name}.B"] = torch.kron(left[name], A @ right[name] @ A.T / T)
    return {name: block.to(batch.tokens.device) for name, block in blocks.items()}


def with_added(
    model: Llama, batch: Batch
) -> tuple[dict[str, Tensor], list[tuple[float, dict[str, Tensor]]]]:
    """Every adapted layer's inputs (T, d_in), for one prompt; and for each class its probability
    and the gradients (T, d_out) of its log by zeros that are added to the layers' outputs."""
    seen: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[name] = inputs[0].detach().flatten(0, -2).cpu()
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        return hook

    handles = [model.get_submodule(n).register_forward_hook(add(n)) for n in adapters(model)]
    [log_p] = class_logits(model, batch, None, padded=True).log_softmax(1)
    for handle in handles:
        handle.remove()
    each = []
    for one in log_p:
        found = torch.autograd.grad(one, list(added.values()), retain_graph=True)
        flat = {name: g.flatten(0, -2).cpu() for name, g in zip(added, found, strict=True)}
        each.append((float(one.detach().exp()), flat))
    return seen, each


def jacobians(model: Llama, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, C) and their gradients by A and B, (B, C, m, n): one example, one class a time."""
    weights = {f"{name}.{key}": adapter.get_parameter(key)
               for name, adapter in adapters(model).items() for key in "AB"}  # fmt: skip
    logits = class_logits(model, batch, None)
    each = [torch.autograd.grad(value, list(weights.values()), retain_graph=True)
            for value in logits.flatten()]  # fmt: skip
    J = {name: torch.stack(found).view(*logits.shape, *weights[name].shape)
         for name, found in zip(weights, zip(*each, strict=True), strict=True)}  # fmt: skip
    return logits.detach(), J


def last_inputs(model: Llama, batch: Batch) -> dict[str, Tensor]:
    """Of every matrix at the last token: x for A and A x for B, (B, n)."""
    seen: dict[str, Tensor] = {}
    inputs = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, x, y: seen.update({name: x[0].detach()})

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in adapters(model)]
    class_logits(model, batch, None)
    for handle in handles:
        handle.remove()
    for name, adapter in adapters(model).items():
        x = seen[name]
        if x.dim() == 3:  # the head sees no other
            ends = zip(x, batch.lengths.tolist(), strict=True)
            x = torch.stack([row[end - 1] for row, end in ends])
        inputs[f"{name}.A"], inputs[f"{name}.B"] = x, x @ adapter.A.detach().T
    return inputs


def laplace_logits(_: Op, device: torch.device) -> Errors:
    """Mean and covariance at other prompts, and draws by the covariance's root."""
    batch = prompts(device, 3, 5, first=20)
    eps = torch.stack([normals(Noise(9, 0), LOGITS_LAYER, id, 3) for id in batch.ids.tolist()])
    for case in FITS:
        model, laplace, blocks, _likelihood = fit(device, *case)
        logits, J = jacobians(model, batch)
        if case[0] == "exact":
            J = joined(J)
        covariance, largest = torch.zeros(3, 3, 3).to(logits), 0.0
        for name, F in blocks.items():
            posterior = torch.linalg.inv(F + PRECISION * torch.eye(len(F)).to(F))
            covariance += J[name].flatten(2) @ posterior @ J[name].flatten(2).mT
            largest = max(largest, float(F.trace()))
        mean, got = laplace.logits(model, batch)
        draw = draw_logits(mean, got, batch.ids, 1, seed=9)[0]
        roots = torch.stack([square_root(c) for c in covariance.cpu()])
        expected = mean.cpu() + (roots @ eps[..., None])[..., 0]
        inverse = NETWORK * (1 + largest / PRECISION) * EPS  # condition of the inverted matrix
        condition = max(float(torch.linalg.cond(c)) for c in covariance.cpu())
        yield distance(mean, logits, NETWORK * EPS)
        yield distance(got, covariance, inverse)
        yield distance(draw, expected, inverse * condition)
        if case[0] == "last":  # two directions of each of five prompts: rank 10 keeps them all
            seen = [prompts(device, 5, case[2])]
            cut = Laplace.fit(model, seen, rank=10, precision=PRECISION, curvature="last")
            yield distance(cut.logits(model, batch)[1], covariance, inverse)


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric positive root, by Denman and Beavers' iteration."""
    root, inverse = matrix, torch.eye(len(matrix)).to(matrix)
    for _ in range(40):
        root, inverse = ((root + torch.linalg.inv(inverse)) / 2,
                         (inverse + torch.linalg.inv(root)) / 2)  # fmt: skip
    return root


def laplace_evidence(_: Op, device: torch.device) -> Errors:
    """By dense determinants; and the best lambda has lambda |theta|^2 = tr (F + lambda I)^-1 F."""
    for case in FITS:
        model, laplace, blocks, log_likelihood = fit(device, *case)
        F = torch.block_diag(*blocks.values())
        unit, theta = torch.eye(len(F)).to(F), weights_of(model).values()
        squares = math.fsum(w * w for values in theta for w in values.flatten().tolist())
        log_ratio = float(torch.linalg.slogdet(unit + F / PRECISION)[1])
        expected = log_likelihood - PRECISION * squares / 2 - log_ratio / 2
        best = laplace.optimise_prior().precision
        determined = float(torch.trace(torch.linalg.solve(F + best * unit, F)))
        eps = NETWORK * (1 + float(F.trace()) / min(PRECISION, best)) * EPS  # by the condition
        size = abs(log_likelihood) + PRECISION * squares + log_ratio
        yield abs(laplace.log_evidence() - expected) / (eps * size)
        yield abs(best * squares - determined) / (eps * determined)


# --- The posterior over the scales ---------------------------------------------------------------


class Scaled(NamedTuple):
    """model: the small one, whose adapters are points. H: from gradients by the matrices alone."""

    model: Llama
    posterior: Subspace
    H: Tensor
    log_likelihood: float


def scaled(device: torch.device, groups: Groups = "all") -> Scaled:
    """A posterior under PRECISION, or with `groups` under the best precisions of these."""
    model, batch = small_model(device, TARGETS), prompts(device, 5, 5)
    to_points(model)
    logits, J = by_scales(model, batch)
    p = logits.softmax(1)
    log_likelihood = sum(math.log(p[i, label]) for i, label in enumerate(batch.labels.tolist()))
    precision = PRECISION if groups == "all" else None
    posterior = Subspace.fit(model, [batch], precision, groups)
    return Scaled(model, posterior, gauss_newton(p, J), log_likelihood)


def by_scales(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and their gradients by s (B, C, D).

    s and the rows of A make up diag(s) A, so that s_k d / d s_k = sum of A_ki d / d A_ki.
    """
    logits, J = jacobians(model, batch)
    columns = [
        (J[f"{name}.A"] * adapter.A.detach()).sum(-1) / adapter.lora_A().norm(dim=1)
        for name, adapter in adapters(model).items()
    ]  # rows of A have length 1, so those of diag(s) A have length s
    return logits, torch.cat(columns, -1).detach()


def subspace_logits(_: Op, device: torch.device) -> Errors:
    """Mean and covariance at other prompts, of logits less their mean; a draw of the scales.

    The draw is in the weights of a copy without adapters.
    """
    batch = prompts(device, 3, 5, first=20)
    model, posterior, H, _likelihood = scaled(device)
    logits, J = by_scales(model, batch)
    Sigma = torch.linalg.inv(H + PRECISION * torch.eye(len(H)).to(H))
    centre = torch.eye(3).to(J) - 1 / 3
    inverse = NETWORK * (1 + float(H.trace()) / PRECISION) * EPS  # condition of the inverted matrix
    mean, factor = posterior.gaussian(model, batch)
    yield distance(mean, logits, NETWORK * EPS)
    yield distance(factor @ factor.mT, centre @ J @ Sigma @ J.mT @ centre, inverse)
    drawing, root = replace(posterior, predicts="sampled"), square_root(Sigma.cpu())
    drawn = drawing.log_probs(model, batch, 1, seed=9)[0].cpu()
    for row, id in enumerate(batch.ids.tolist()):
        moved = weights_of(model)
        delta = root @ normals(Noise(9, 0), SCALES_LAYER, id, len(root))
        for (name, adapter), part in zip(adapters(model).items(), delta.split(2), strict=True):
            A = adapter.lora_A().detach().cpu()  # diag(s) A
            moved[f"{name}.A"] = A * (1 + part / A.norm(dim=1))[:, None]
        [expected] = merged_logits(model, batch.rows(torch.tensor([row])), moved).log_softmax(-1)
        yield distance(drawn[row], expected, 10 * inverse)


def subspace_evidence(_: Op, device: torch.device) -> Errors:
    """By a dense determinant; and lambda_g |s_g|^2 is the trace of group g in Sigma H."""
    for groups in GROUPS:
        _model, fitted, H, log_likelihood = scaled(device, groups)
        best, squares = fitted.precision.to(H), fitted.scales.to(H).square()
        for factor in (1.0, 4.0):
            precision = factor * best
            prior = torch.diag(precision)
            log_ratio = torch.linalg.slogdet(H + prior)[1] - torch.linalg.slogdet(prior)[1]
            subtracted = float((precision * squares).sum() + log_ratio)
            eps = NETWORK * (1 + float(H.trace() / precision.min())) * EPS  # by the condition
            got, expected = fitted.scaled(factor).log_evidence(), log_likelihood - subtracted / 2
            yield abs(got - expected) / (eps * (abs(log_likelihood) + subtracted))
        if groups == "all":
            continue
        determined = torch.linalg.solve(H + torch.diag(best), H).diagonal()
        layers = [name.rpartition(".")[2] if groups == "target" else name
                  for name, count in fitted.sizes.items() for _ in range(count)]  # fmt: skip
        for group in set(layers):
            own = torch.tensor([name == group for name in layers], device=H.device)
            # The search ends with a step of 1e-9 in log lambda.
            yield abs(float((determined - best * squares)[own].sum())) / (1e-8 * int(own.sum()))


METHOD_CHECKS = [
    Check("BLoB", "(11) A + diag(t) (Omega * E) diag(u), row by row",
          row_by_row(drawn_by_flipout, method="blob")),
    Check("BLoB, KL", "(12) entry by entry; its gradient by hand", blob_kl),
    Check("TFB, rotation", "(13) B' A' = B A, sigma_q in every direction of B", tfb_rotation),
    Check("TFB, width", "(14) sigma_q fits the tolerance, 1 % more does not", tfb_width),
    Check("Laplace", "(15) to (17) J (F + lambda I)^-1 J', dense; a draw", laplace_logits),
    Check("Laplace, evidence", "(18) dense; its slope where it is largest", laplace_evidence),
    Check("subspace", "(24), (25), (27) J (H + lambda I)^-1 J', dense; a draw", subspace_logits),
    Check("subspace, evidence", "(26) dense; its slopes where it is largest", subspace_evidence),
    Check("fitted priors", "(19) the least KL, for any scale", fitted_priors),
    Check("full covariance", "(20) diag(s + L eps) A, row by row",
          row_by_row(correlated, covariance="full")),
    Check("full covariance, KL", "(20) by determinants; gradient by differences", full_kl),
    Check("MAP", "MAP: -log N(A, B; 0, sigma_p^2 I), entry by entry", map_density),
    Check("dropout", "dropout: inputs kept with probability 1 - p, row by row",
          row_by_row(thinned, method="dropout", dropout=0.3)),
    Check("ensemble", "ensembles: (8) of models with merged weights", ensemble),
    Check("ensemble, draws", "ensembles: (8) of members' draws, merged", drawn_ensemble),
    Check("SWAG", "SWAG: moments, draws, (8) of merged weights", swag),
    Check("temperature", "temperature: d NLL / d (1 / T) = 0, in loops", temperature),
]  # fmt: skip
