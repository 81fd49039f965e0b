"""Plausible mistakes of a port, and the results that each gives: `conformance check` names them.

A fault puts wrong functions in the place of right ones of `reference` and `formulas`, from which
the expected values of the kit come. The cases computed again are then what a port with this mistake
stores. Every fault must be beyond the bounds of a case, in either precision (tests/verify).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.noise import FIRST_TRAINING_DRAW, Noise
from . import formulas, reference

WORD = 2**32
NOISE = ("normals", "op forward", "op backward", "training step", "prediction", "subspace")
OP = ("op forward", "op backward")
STEP = ("training step",)
SUBSPACE = ("subspace",)


class Fault(NamedTuple):
    """levels: where it shows. wrong: what replaces the function of this name, by module."""

    name: str
    levels: tuple[str, ...]
    wrong: dict[str, Callable[..., Any]]

    @contextmanager
    def applied(self) -> Iterator[None]:
        kept = {}
        for name, function in self.wrong.items():
            module = _home(name)
            kept[name] = getattr(module, name)
            setattr(module, name, function)
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(_home(name), name, function)


def _home(name: str) -> ModuleType:
    return reference if hasattr(reference, name) else formulas


# --- Noise ------------------------------------------------------------------------------------


def _rounds(count: int) -> dict[str, Callable[..., Any]]:
    right = reference.philox4x32
    return {"philox4x32": lambda c, k, rounds=10: right(c, k, count if rounds == 10 else rounds)}


def _normal(change: Callable[[int, int, int, int, int], tuple[int, ...]]) -> dict[str, Any]:
    """The normals of other coordinates (seed, draw, layer, group, k)."""
    right = reference.normal
    return {"normal": lambda *at: right(*change(*at))}


def _pair(change: Callable[[int, int], tuple[float, float]]) -> dict[str, Any]:
    """Another pair of normals from the words (a, b)."""
    return {"box_muller": change}


def _plain_angle(a: int, b: int) -> tuple[float, float]:
    radius, angle = math.sqrt(-2 * math.log((a + 0.5) / WORD)), 2 * math.pi * b / WORD
    return radius * math.cos(angle), radius * math.sin(angle)


def _noise_faults() -> Iterator[Fault]:
    box_muller, half = reference.box_muller, 2**31
    for rounds in (7, 9, 11):
        yield Fault(f"{rounds} rounds of Philox", ("philox", *NOISE), _rounds(rounds))
    changes: dict[str, Callable[[int, int, int, int, int], tuple[int, ...]]] = {
        "blocks of the counter counted from 1": lambda n, d, i, g, k: (n, d, i, g, k + 4),
        "components counted from 1": lambda n, d, i, g, k: (n, d, i, g, k + 1),
        "group off by one": lambda n, d, i, g, k: (n, d, i, (g + 1) % WORD, k),
        "layer off by one": lambda n, d, i, g, k: (n, d, (i + 1) % WORD, g, k),
        "draw off by one": lambda n, d, i, g, k: (n, (d + 1) % WORD, i, g, k),
        "layer and draw exchanged": lambda n, d, i, g, k: (n, i, d, g, k),
        "layer and group exchanged": lambda n, d, i, g, k: (n, d, g, i, k),
        "draw and group exchanged": lambda n, d, i, g, k: (n, g, i, d, k),
        "seed cut to 32 bits": lambda n, d, i, g, k: (n % WORD, d, i, g, k),
        "halves of the seed exchanged": lambda n, d, i, g, k: (
            n % WORD * WORD + n // WORD, d, i, g, k),
        "one draw for all groups": lambda n, d, i, g, k: (n, d, i, 0, k),
        "one draw for all layers": lambda n, d, i, g, k: (n, d, 0, g, k),
        "one draw for all steps": lambda n, d, i, g, k: (n, 0, i, g, k),
        "the same block again": lambda n, d, i, g, k: (n, d, i, g, k % 4),
        "sine and cosine exchanged": lambda n, d, i, g, k: (n, d, i, g, k ^ 1),
        "pairs of words exchanged": lambda n, d, i, g, k: (n, d, i, g, k ^ 2),
    }  # fmt: skip
    for name, change in changes.items():
        yield Fault(name, NOISE, _normal(change))
    pairs: dict[str, Callable[[int, int], tuple[float, float]]] = {
        "words of a pair exchanged": lambda a, b: box_muller(b, a),
        "uniform (a + 1) 2^-32": lambda a, b: box_muller(a + 0.5, b),  # type: ignore[arg-type]
        "uniform of 24 bits": lambda a, b: box_muller(a // 256 * 256, b),
        "angle turned by half": lambda a, b: box_muller(a, (b + half) % WORD),
        "normals rounded to float32 before step 5": lambda a, b: _single(*box_muller(a, b)),
    }
    for name, pair in pairs.items():
        levels = NOISE[:1] if "rounded" in name else NOISE
        yield Fault(name, levels, _pair(pair))
    yield Fault("angle not reduced as an integer", NOISE[:1], _pair(_plain_angle))


def _single(*values: float) -> tuple[float, float]:
    first, second = torch.tensor(values, dtype=torch.float32).double().tolist()
    return first, second


# --- The op -----------------------------------------------------------------------------------

Call = SimpleNamespace  # the op's arguments, and eps (rows, r)


def _factor(c: Call) -> Tensor:
    return c.scaling * (c.s + c.sigma * c.eps)


def _sum(base: Tensor, bias: Tensor, update: Tensor) -> Tensor:
    return base + bias + update


def _op(
    factor: Callable[[Call], Tensor] = _factor,
    join: Callable[[Tensor, Tensor, Tensor], Tensor] = _sum,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda c: {},
) -> dict[str, Any]:
    """The op, and its gradients by autograd, with another factor, other terms or arguments."""

    def y(given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        c = Call(**{**given, **(change(given) or {})})
        lead, rank = tuple(c.x.shape[:-1]), len(c.s)
        leaves = {n: getattr(c, n).double().clone().requires_grad_()
                  for n in ("x", "weight", "bias", "A", "B", "s", "sigma")
                  if getattr(c, n) is not None}  # fmt: skip
        rows = range(math.prod(lead))
        groups = [reference.group_of_row(row, lead, c.sampling, c.groups) for row in rows]
        eps = [reference.eps_of_group(c.noise, c.layer, group, rank) for group in groups]
        c = Call(**{**vars(c), **leaves, "eps": formulas.tensor(eps)})
        x = c.x.reshape(-1, c.x.shape[-1])
        bias = torch.zeros(len(c.weight)).double() if c.bias is None else c.bias
        out = join(x @ c.weight.T, bias, (x @ c.A.T * factor(c)) @ c.B.T)
        return out.reshape(*lead, -1), leaves

    def gradients(grad_y: Tensor, **given: Any) -> dict[str, Tensor]:
        out, leaves = y(given)
        found = torch.autograd.grad(out, list(leaves.values()), grad_y.double(),
                                    allow_unused=True, materialize_grads=True)  # fmt: skip
        return dict(zip(leaves, found, strict=True))

    return {
        "subspace_lora_linear": lambda **given: y(given)[0].detach(),
        "subspace_lora_linear_gradients": gradients,
    }


def _op_faults() -> Iterator[Fault]:
    factors: dict[str, Callable[[Call], Tensor]] = {
        "variance for standard deviation": lambda c: c.scaling * (c.s + c.sigma**2 * c.eps),
        "noise multiplied with s": lambda c: c.scaling * c.s * (1 + c.sigma * c.eps),
        "noise without the mean": lambda c: c.scaling * c.sigma * c.eps,
        "noise left out": lambda c: c.scaling * (c.s + 0 * c.eps),
        "noise subtracted": lambda c: c.scaling * (c.s - c.sigma * c.eps),
        "scaling left out": lambda c: c.s + c.sigma * c.eps,
        "scaling left out of the mean": lambda c: c.s + c.scaling * c.sigma * c.eps,
        "scaling left out of the noise": lambda c: c.scaling * c.s + c.sigma * c.eps,
        "scaling squared": lambda c: c.scaling**2 * (c.s + c.sigma * c.eps),
        "scaling inverted": lambda c: (c.s + c.sigma * c.eps) / c.scaling,
        "s and sigma exchanged": lambda c: c.scaling * (c.sigma + c.s * c.eps),
    }
    for name, factor in factors.items():
        yield Fault(name, OP, _op(factor))
    held: dict[str, Callable[[Call], Tensor]] = {
        "s detached": lambda c: c.scaling * (c.s.detach() + c.sigma * c.eps),
        "sigma detached": lambda c: c.scaling * (c.s + c.sigma.detach() * c.eps),
        "gradient of sigma without eps": lambda c: (
            c.scaling * (c.s + c.sigma - c.sigma.detach() + c.sigma.detach() * c.eps)
        ),
        "scaling left out of the gradients of s and sigma": lambda c: (
            (c.scaling - 1) * (c.s + c.sigma * c.eps).detach() + c.s + c.sigma * c.eps
        ),
    }
    for name, factor in held.items():
        yield Fault(name, OP[1:], _op(factor))
    joins: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "bias left out": lambda base, bias, update: base + update,
        "update without the base": lambda base, bias, update: bias + update,
        "update subtracted": lambda base, bias, update: base + bias - update,
        "bias scaled with the update": lambda base, bias, update: base + 2 * bias + update,
    }
    for name, join in joins.items():
        yield Fault(name, OP, _op(join=join))
    yield Fault("base's share of grad x left out", OP[1:],
                _op(join=lambda base, bias, update: base.detach() + bias + update))  # fmt: skip
    yield Fault("update's share of the gradients left out", OP[1:],
                _op(join=lambda base, bias, update: base + bias + update.detach()))  # fmt: skip
    changes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "a draw for every row": lambda c: {"sampling": "token", "groups": None},
        "one draw for the batch": lambda c: {"sampling": "batch"},
        "one draw for each example": lambda c: {"sampling": "example"},
        "group ids ignored": lambda c: {"groups": None},
        "rows of A in the opposite order": lambda c: {"A": c["A"].flip(0)},
        "layer and draw exchanged at the op's call": lambda c: c["noise"] and {
            "noise": Noise(c["noise"].seed, c["layer"]), "layer": c["noise"].draw},
    }  # fmt: skip
    for name, change in changes.items():
        yield Fault(name, OP, _op(change=change))


# --- KL, ELBO, start, schedules ---------------------------------------------------------------


def _kl(**terms: Callable[[float, float, float], float]) -> dict[str, Any]:
    """The sum over components of these functions of s, sigma and the prior's, by direction."""

    def total(term: Callable[[float, float, float], float]) -> Callable[..., float]:
        return lambda s, sigma, p: sum(
            term(a, b, p) for a, b in zip(s.tolist(), sigma.tolist(), strict=True)
        )

    return {f"kl_{direction}": total(term) for direction, term in terms.items()}


def _kl_faults() -> Iterator[Fault]:
    log, levels = math.log, ("KL", "ELBO")
    forward, official = reference.kl_forward, reference.kl_official
    gradients = formulas.kl_gradients
    other = {"forward": "official", "official": "forward"}
    yield Fault("KL in the other direction", (*levels, *STEP), {
        "kl_forward": official, "kl_official": forward,
        "kl_gradients": lambda values, kl, prior: gradients(values, other[kl], prior)})  # fmt: skip
    for name, first, second in (
        ("half of the KL left out",
         lambda s, v, p: log(p / v) + (v**2 + s**2) / (2 * p**2),
         lambda s, v, p: log(v / p) + (p**2 + s**2) / (2 * v**2)),
        ("KL: logarithm of the ratio upside down",
         lambda s, v, p: log(v / p) + (v**2 + s**2) / (2 * p**2) - 0.5,
         lambda s, v, p: log(p / v) + (p**2 + s**2) / (2 * v**2) - 0.5),
        ("KL: standard deviation for variance",
         lambda s, v, p: log(p / v) + (v + s**2) / (2 * p) - 0.5,
         lambda s, v, p: log(v / p) + (p + s**2) / (2 * v) - 0.5),
        ("KL: the prior's variance is prior_std",
         lambda s, v, p: log(p**0.5 / v) + (v**2 + s**2) / (2 * p) - 0.5,
         lambda s, v, p: log(v / p**0.5) + (p + s**2) / (2 * v**2) - 0.5),
        ("KL: prior_std taken as 1",
         lambda s, v, p: -log(v) + (v**2 + s**2) / 2 - 0.5,
         lambda s, v, p: log(v) + (1 + s**2) / (2 * v**2) - 0.5),
        ("KL without the mean",
         lambda s, v, p: log(p / v) + v**2 / (2 * p**2) - 0.5,
         lambda s, v, p: log(v / p) + p**2 / (2 * v**2) - 0.5),
        ("KL: 2 left out of the denominator",
         lambda s, v, p: log(p / v) + (v**2 + s**2) / p**2 - 0.5,
         lambda s, v, p: log(v / p) + (p**2 + s**2) / v**2 - 0.5),
    ):  # fmt: skip
        yield Fault(name, levels, _kl(forward=first, official=second))
    yield Fault("KL: mean over the components", levels, {
        "kl_forward": lambda s, sigma, p: forward(s, sigma, p) / len(s),
        "kl_official": lambda s, sigma, p: official(s, sigma, p) / len(s)})  # fmt: skip


def _elbo(change: Callable[..., tuple[float, float, float]]) -> dict[str, Any]:
    """Another (loss, nll, kl) of the right nll and kl, beta, N and the number of rows."""
    right = reference.elbo

    def wrong(logits: Tensor, labels: Tensor, pairs: Any, prior: float, beta: float, n: int,
              kl: str = "forward") -> tuple[float, float, float]:  # fmt: skip
        _, nll, divergence = right(logits, labels, pairs, prior, beta, n, kl)
        return change(nll, divergence, beta, n, len(labels))

    return {"elbo": wrong}


def _log_of_softmax(logits: Tensor, labels: Tensor, pairs: Any, prior: float, beta: float, n: int,
                    kl: str = "forward") -> tuple[float, float, float]:  # fmt: skip
    p = logits.softmax(-1)[torch.arange(len(labels)), labels]
    nll = float(-p.log().mean())
    divergence = sum(getattr(reference, f"kl_{kl}")(s, v, prior) for s, v in pairs)
    return nll + beta * divergence / n, nll, divergence


def _objective_faults() -> Iterator[Fault]:
    changes: dict[str, Callable[..., tuple[float, float, float]]] = {
        "KL not divided by N": lambda nll, kl, beta, n, rows: (nll + beta * kl, nll, kl),
        "KL divided by the batch": lambda nll, kl, beta, n, rows: (nll + beta * kl / rows, nll, kl),
        "beta left out": lambda nll, kl, beta, n, rows: (nll + kl / n, nll, kl),
        "NLL summed over the rows": lambda nll, kl, beta, n, rows: (
            rows * nll + beta * kl / n, rows * nll, kl),
        "KL subtracted": lambda nll, kl, beta, n, rows: (nll - beta * kl / n, nll, kl),
    }  # fmt: skip
    for name, change in changes.items():
        yield Fault(name, ("ELBO",), _elbo(change))
    yield Fault("logarithm of a softmax that is 0", ("ELBO",), {"elbo": _log_of_softmax})
    right = reference.elbo
    yield Fault("KL of one layer only", ("ELBO",), {
        "elbo": lambda logits, labels, pairs, *rest: right(logits, labels, pairs[:1], *rest)
    })  # fmt: skip


def _start_faults() -> Iterator[Fault]:
    levels, uniforms, kaiming = ("initialisation",), reference.uniforms, reference.kaiming

    def sigma(low: Callable[[float, float], float]) -> dict[str, Any]:
        return {"initial_log_sigma": lambda uniform, top: [math.log(low(top, u)) for u in uniform]}

    yield Fault("start: words of another layer", levels,
                {"uniforms": lambda seed, layer, n: uniforms(seed, layer + 1, n)})  # fmt: skip
    yield Fault("start: stream of the layer alone", levels,
                {"uniforms": lambda seed, layer, n: uniforms(seed, layer - 2**62, n)})  # fmt: skip
    yield Fault("start: uniform not centred", levels, {
        "kaiming": lambda u, r, n: kaiming([(v + 1) / 2 for v in u], r, n)})  # fmt: skip
    yield Fault("start: fan-out for fan-in", levels, {
        "kaiming": lambda u, r, n: [[v * math.sqrt(n / r) for v in row] for row in kaiming(u, r, n)]
    })  # fmt: skip
    yield Fault("start: column by column", levels, {
        "kaiming": lambda u, r, n: list(map(list, zip(*kaiming(u, n, r), strict=True)))
        if r == n else [[kaiming(u, r * n, 1)[j * r + k][0] / math.sqrt(n) for j in range(n)]
                        for k in range(r)]})  # fmt: skip
    yield Fault("start: sigma from 0", levels, sigma(lambda top, u: top * u))
    yield Fault("start: log sigma uniform", levels, sigma(lambda top, u: top * 2 ** ((u - 1) / 2)))
    yield Fault("start: init_sigma for sigma", levels, sigma(lambda top, u: top))
    thin_svd = formulas.thin_svd
    starts: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "start: singular values in another order than A's rows": lambda A, s: (A, s.flip(0)),
        "start: squared singular values": lambda A, s: (A, s**2),
        "start: A with the lengths of the singular values": lambda A, s: (s[:, None] * A, s),
        "start: s of 1": lambda A, s: (A, torch.ones_like(s)),
    }
    for name, start in starts.items():
        yield Fault(name, levels, {"thin_svd": lambda M, start=start: start(*thin_svd(M))})


def _schedule_faults() -> Iterator[Fault]:
    right, weight = reference.warmup, reference.kl_weight

    def rise(count: Callable[[int, float], int]) -> dict[str, Any]:
        """The factor with another number of steps of the rise."""

        def factor(step: int, steps: int, share: float) -> float:
            up = count(steps, share)
            return step / up if step < up else (steps - step) / max(1, steps - up)

        return {"warmup": factor}

    def single(steps: int, share: float) -> int:
        return int(float(torch.tensor(share, dtype=torch.float32) * steps))

    levels = ("schedules", *STEP)
    yield Fault("warm-up steps rounded to the nearest", levels, rise(lambda n, w: round(n * w)))
    yield Fault("warm-up steps rounded up", levels, rise(lambda n, w: math.ceil(n * w)))
    yield Fault("warm-up steps in float32", levels[:1], rise(single))
    yield Fault("warm-up left out", levels, rise(lambda n, w: 0))
    functions: dict[str, Callable[[int, int, float], float]] = {
        "warm-up off by one": lambda i, n, w: right(i + 1, n, w),
        "rates without a fall": lambda i, n, w: min(1.0, i / max(1, math.floor(n * w))),
        "rates constant": lambda i, n, w: 1.0,
        "fall as if there were no warm-up": lambda i, n, w: (
            right(i, n, w) if i < math.floor(n * w) else (n - i) / n),
    }  # fmt: skip
    for name, function in functions.items():
        yield Fault(name, levels, {"warmup": function})

    def period(n: int, batch: int, power: float = 8.0) -> int:
        return math.floor(100 * n ** (math.pi / power) / batch)

    yield Fault("period of 0: max(1, M) left out", levels[:1], {
        "kl_period": period,
        "kl_weight": lambda i, M: weight(i, M) if M else math.nan})  # fmt: skip
    yield Fault("period not divided by the batch", levels,
                {"kl_period": lambda n, batch: period(n, 1)})  # fmt: skip
    yield Fault("period with another power of N", levels,
                {"kl_period": lambda n, batch: max(1, period(n, batch, 4.0))})  # fmt: skip
    weights: dict[str, Callable[[int, int], float]] = {
        "KL weights counted from 0": lambda i, M: weight(i, M) / 2,
        "KL weight of the next step": lambda i, M: weight(i + 1, M),
        "KL weights falling": lambda i, M: weight(M - 1 - i % M, M),
        "2^(M + 1) for 2^(M + 1) - 1": lambda i, M: math.ldexp(1.0, i % M - M),
        "2^M - 1 for 2^(M + 1) - 1": lambda i, M: (
            math.ldexp(1.0, i % M + 1 - M) / (1 - math.ldexp(1.0, -M))),
        "2^M + 1 for 2^(M + 1) - 1": lambda i, M: (
            math.ldexp(1.0, i % M + 1 - M) / (1 + math.ldexp(1.0, -M))),
    }  # fmt: skip
    for name, function_ in weights.items():
        exact = name.startswith("2^(M")
        yield Fault(name, levels[:1] if exact else levels, {"kl_weight": function_})


# --- Prediction and metrics -------------------------------------------------------------------


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def _entropy(log_p: Tensor) -> Tensor:
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)


def _predictive(
    log_softmax: Callable[[Tensor], Tensor] = _log_softmax,
    mean: Callable[[Tensor], Tensor] = lambda log_p: log_p.exp().mean(0),
    entropy: Callable[[Tensor], Tensor] = _entropy,
    after: Callable[[dict[str, Any]], dict[str, Any]] = lambda found: {},
) -> dict[str, Any]:
    def wrong(logits: Tensor) -> dict[str, Any]:
        log_p = log_softmax(logits.double())
        probs = mean(log_p)
        total, expected = entropy(probs.log()), entropy(log_p).mean(0)
        found = {"probs": probs, "entropy": total, "expected_entropy": expected,
                 "mutual_information": (total - expected).clamp(min=0)}  # fmt: skip
        return {name: v.tolist() for name, v in {**found, **after(found)}.items()}

    return {"predictive": wrong}


def _predictive_faults() -> Iterator[Fault]:
    levels = ("predictive", "prediction", "subspace")
    yield Fault("logits averaged", levels,
                _predictive(lambda z: _log_softmax(z.mean(0, keepdim=True))))  # fmt: skip
    means: dict[str, Callable[[Tensor], Tensor]] = {
        "log-probabilities averaged": lambda log_p: log_p.mean(0).exp(),
        "log-probabilities averaged and normalised": lambda log_p: log_p.mean(0).softmax(-1),
        "probabilities summed over the draws": lambda log_p: log_p.exp().sum(0),
        "the first draw for all": lambda log_p: log_p[0].exp(),
    }
    for name, mean in means.items():
        yield Fault(name, levels, _predictive(mean=mean))
    yield Fault("entropy in bits", levels, _predictive(entropy=lambda p: _entropy(p) / math.log(2)))
    yield Fault("entropies exchanged", levels, _predictive(after=lambda f: {
        "entropy": f["expected_entropy"], "expected_entropy": f["entropy"]}))  # fmt: skip
    yield Fault("mutual information with the other sign", levels[:1], _predictive(
        after=lambda f: {"mutual_information": f["expected_entropy"] - f["entropy"]}))  # fmt: skip
    yield Fault("0 ln 0 is not 0", levels[:1],
                _predictive(entropy=lambda log_p: -(log_p.exp() * log_p).sum(-1)))  # fmt: skip
    yield Fault("softmax without its maximum", levels[:1],
                _predictive(lambda z: (z.exp() / z.exp().sum(-1, keepdim=True)).log()))  # fmt: skip


def _metric_faults() -> Iterator[Fault]:
    levels, ece, scores = ("metrics",), reference.ece, reference.scores

    def single(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32)

    bins: dict[str, Callable[[float, int], int]] = {
        "bins in float32": lambda c, n: min(math.floor(float(single(c) * n)), n - 1),
        "edges of bins in float32": lambda c, n: min(
            sum(c >= float(single(i / n)) for i in range(1, n)), n - 1),
        "an edge belongs to the bin below": lambda c, n: max(0, math.ceil(c * n) - 1),
        "confidence 1 in a bin of its own": lambda c, n: math.floor(c * n),
        "one bin too few": lambda c, n: min(math.floor(c * (n - 1)), n - 2),
    }  # fmt: skip
    for name, bin_of in bins.items():
        yield Fault(name, levels, {"bin_of": bin_of})
    yield Fault("ECE in one bin", levels, {"bin_of": lambda c, n: 0})
    yield Fault("ECE without division by N", levels,
                {"ece": lambda p, labels, n: ece(p, labels, n) * len(labels)})  # fmt: skip
    yield Fault("ECE: the mean over bins", levels,
                {"ece": lambda p, labels, n: ece(p, labels, n) * len(labels) / n})  # fmt: skip
    yield Fault("ties to the last class", levels,
                {"answer": lambda row: len(row) - 1 - row[::-1].index(max(row))})  # fmt: skip

    def scored(**changes: Callable[[float, Tensor], float]) -> dict[str, Any]:
        def wrong(p: Tensor, labels: Tensor) -> dict[str, float]:
            right = scores(p, labels)
            return {**right, **{n: change(right[n], p) for n, change in changes.items()}}

        return {"scores": wrong}

    yield Fault("Brier averaged over the classes", levels,
                scored(brier=lambda v, p: v / p.shape[1]))  # fmt: skip
    yield Fault("NLL of the metrics summed", levels, scored(nll=lambda v, p: v * len(p)))
    yield Fault("NLL in bits", levels, scored(nll=lambda v, p: v / math.log(2)))

    def pairs(won: Callable[[float, float], float]) -> dict[str, Any]:
        def auroc(found: Tensor, positive: Tensor) -> float:
            ones, others = found[positive == 1].tolist(), found[positive == 0].tolist()
            return sum(won(a, b) for a in ones for b in others) / (len(ones) * len(others))

        return {"auroc": auroc}

    yield Fault("AUROC: ties won", levels, pairs(lambda a, b: a >= b))
    yield Fault("AUROC: ties lost", levels, pairs(lambda a, b: a > b))
    yield Fault("AUROC reversed", levels, pairs(lambda a, b: (a < b) + (a == b) / 2))


# --- The model --------------------------------------------------------------------------------


def _model_faults() -> Iterator[Fault]:
    levels, norm, rotate = ("llama",), formulas.norm, formulas.rotate
    frequency, kv_head = formulas.frequency, formulas.kv_head

    def interleaved(x: Tensor, f: Tensor) -> Tensor:
        halves = rotate(torch.cat((x[..., ::2], x[..., 1::2]), -1), f).chunk(2, -1)
        return torch.stack(halves, -1).flatten(-2)

    def ramp(change: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {"frequency": lambda pair, size, rope: frequency(
            pair, size, rope.__class__(**{**vars(rope), **change(rope)}))}  # fmt: skip

    yield Fault("RMSNorm: mean subtracted", levels, {
        "norm": lambda w, n, x, eps: norm(w, n, x - x.mean(-1, keepdim=True), eps)})  # fmt: skip
    yield Fault("RMSNorm: eps outside the root", levels, {
        "norm": lambda w, n, x, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps)
        * w[f"{n}.weight"]})  # fmt: skip
    yield Fault("RMSNorm: eps 1e-6", levels,
                {"norm": lambda w, n, x, eps: norm(w, n, x, 1e-6)})  # fmt: skip
    for name, other in (("left out", 0.0), ("1e-6", 1e-6), ("1e-5", 1e-5)):
        yield Fault(f"q_norm and k_norm: eps {name}", (*levels, *STEP), {
            "head_norm": lambda w, n, x, eps, other=other: norm(w, n, x, other)})  # fmt: skip
    yield Fault("RoPE: neighbouring pairs", levels, {"rotate": interleaved})
    yield Fault("RoPE: turned backwards", levels, {"rotate": lambda x, f: rotate(x, -f)})
    yield Fault("RoPE: left out", levels, {"rotate": lambda x, f: x})
    yield Fault("RoPE: scaling left out", levels, ramp(lambda r: {"kind": "default"}))
    yield Fault("RoPE: theta 10000", levels, ramp(lambda r: {"theta": 1e4}))
    yield Fault("RoPE: low_freq_factor 1", levels, ramp(lambda r: {"low_freq_factor": 1.0}))
    yield Fault("RoPE: high_freq_factor 4", levels, ramp(lambda r: {"high_freq_factor": 4.0}))
    yield Fault("RoPE: context of 8192", levels,
                ramp(lambda r: {"original_max_position_embeddings": 8192}))  # fmt: skip
    yield Fault("attention: kv heads in turn", levels,
                {"kv_head": lambda head, heads, kv: head % kv})  # fmt: skip
    yield Fault("attention: the first kv head for all", levels,
                {"kv_head": lambda head, heads, kv: 0 * kv_head(head, heads, kv)})  # fmt: skip
    yield Fault("SwiGLU: gate and up exchanged", levels,
                {"swiglu": lambda gate, up: up / (1 + (-up).exp()) * gate})  # fmt: skip
    gelu = torch.nn.functional.gelu
    yield Fault("SwiGLU: gelu for silu", levels, {"swiglu": lambda gate, up: gelu(gate) * up})


# --- The training step and the prediction -----------------------------------------------------


def _adamw(change: Callable[..., Any]) -> dict[str, Any]:
    return {"adamw": change}


def _optimizer_faults() -> Iterator[Fault]:
    right = formulas.adamw

    def settings(**values: Any) -> dict[str, Any]:
        return _adamw(lambda x, m, v, g, rate, p: right(x, m, v, g, rate, {**p, **values}))

    for name, values in (
        ("AdamW: eps 0", {"adam_eps": 0.0}), ("AdamW: eps 1e-8", {"adam_eps": 1e-8}),
        ("AdamW: eps 1e-6", {"adam_eps": 1e-6}), ("AdamW: eps 1e-5", {"adam_eps": 1e-5}),
        ("AdamW: beta1 .9", {"beta1": 0.9}), ("AdamW: beta2 .999", {"beta2": 0.999}),
        ("AdamW: weight decay left out", {"weight_decay": 0.0}),
        ("AdamW: weight decay .1", {"weight_decay": 0.1}),
        ("AdamW: weight decay .01", {"weight_decay": 0.01}),
    ):  # fmt: skip
        yield Fault(name, STEP, settings(**values))

    def moved(update: Callable[..., Tensor], decay: float = 1.0) -> dict[str, Any]:
        def wrong(x: Tensor, m: Tensor, v: Tensor, g: Tensor, rate: float, p: Any) -> Any:
            _, m, v = right(x, m, v, g, rate, p)
            one, two = (1 - p[f"beta{i}"] ** (p["step"] + 1) for i in (1, 2))
            x = x * (1 - decay * rate * p["weight_decay"])
            return x - rate * update(m, v, one, two, p["adam_eps"]), m, v

        return _adamw(wrong)

    updates: dict[str, Callable[..., Tensor]] = {
        "AdamW: eps added before the bias correction": lambda m, v, one, two, eps: (
            m / one / ((v.sqrt() + eps) / two**0.5)),
        "AdamW: eps under the root": lambda m, v, one, two, eps: m / one / (v / two + eps).sqrt(),
        "AdamW: no bias correction": lambda m, v, one, two, eps: m / (v.sqrt() + eps),
    }  # fmt: skip
    for name, update in updates.items():
        yield Fault(name, STEP, moved(update))
    yield Fault("AdamW: t is the step, not the step + 1", STEP, _adamw(lambda x, m, v, g, rate, p: (
            *right(x, m, v, g, rate, {**p, "step": p["step"] - 1}),)))  # fmt: skip
    yield Fault("AdamW: decay in the gradient", STEP, _adamw(lambda x, m, v, g, rate, p: right(
            x, m, v, g + p["weight_decay"] * x, rate, {**p, "weight_decay": 0.0})))  # fmt: skip
    yield Fault("AdamW: decay not times the rate", STEP, _adamw(lambda x, m, v, g, rate, p: right(
            x, m, v, g, rate, {**p, "weight_decay": p["weight_decay"] / rate})))  # fmt: skip

    def kept(x: Tensor, m: Tensor, v: Tensor, g: Tensor, rate: float, p: Any) -> Any:
        return right(x, m, v, g, rate, p)[0], m, v

    def corrected(x: Tensor, m: Tensor, v: Tensor, g: Tensor, rate: float, p: Any) -> Any:
        x, m, v = right(x, m, v, g, rate, p)
        return x, m / (1 - p["beta1"] ** (p["step"] + 1)), v / (1 - p["beta2"] ** (p["step"] + 1))

    yield Fault("AdamW: moments not stored", STEP, _adamw(kept))
    yield Fault("AdamW: moments stored with their bias corrected", STEP, _adamw(corrected))
    next_step = formulas.next_step
    for name in ("step", "draw"):
        yield Fault(f"the same {name} again in the next step", STEP, {
            "next_step": lambda p, name=name: {**next_step(p), name: p[name]}})  # fmt: skip


def _step_faults() -> Iterator[Fault]:
    share, rate_of = formulas.kl_share, formulas.rate_of
    kl_move, bounded, gradients = formulas.kl_move, formulas.bounded, formulas.kl_gradients
    yield from _optimizer_faults()
    yield Fault("step: KL not divided by N", STEP,
                {"kl_share": lambda p: share(p) * p["num_examples"]})  # fmt: skip
    yield Fault("step: beta left out", STEP, {"kl_share": lambda p: share({**p, "beta": 1.0})})
    yield Fault("step: KL in the gradients of the official objective", STEP,
                {"kl_share": lambda p: share({**p, "objective": "elbo"})})  # fmt: skip
    yield Fault("step: KL left out of the loss", STEP, {"kl_share": lambda p: 0.0})
    yield Fault("step: NLL summed over the batch", STEP, {"mean_of_rows": lambda nll: nll.sum()})
    yield Fault("step: one rate for all", STEP, {
        "rate_of": lambda n, p: rate_of(n, {**p, "variational_lr": p["lr"]})})  # fmt: skip
    yield Fault("step: rates exchanged", STEP, {
        "rate_of": lambda n, p: rate_of(n, {**p, "variational_lr": p["lr"],
                                            "lr": p["variational_lr"]})})  # fmt: skip
    for name, change in (
        ("ascends the KL", lambda f: -f), ("left out", lambda f: 0 * f),
    ):  # fmt: skip
        yield Fault(f"official step {name}", STEP, {
            "kl_move": lambda values, p, rows, change=change: {
                n: change(v) for n, v in kl_move(values, p, rows).items()}})  # fmt: skip
    settings = {"kl_lr .002": {"kl_lr": 0.002},
                "the official derivative for either KL": {"kl": "official"}}  # fmt: skip
    for name, setting in settings.items():
        yield Fault(f"official step: {name}", STEP, {
            "kl_move": lambda values, p, rows, setting=setting: (
                kl_move(values, {**p, **setting}, rows))})  # fmt: skip
    yield Fault("official step: without the warm-up factor", STEP, {
        "kl_move": lambda values, p, rows: {
            n: v / reference.warmup(p["step"], p["steps"], p["warmup"])
            for n, v in kl_move(values, p, rows).items()}})  # fmt: skip
    yield Fault("official step: without pi", STEP, {
        "kl_move": lambda values, p, rows: {
            n: v / reference.kl_weight(p["step"], reference.kl_period(p["num_examples"], rows))
            for n, v in kl_move(values, p, rows).items()}})  # fmt: skip
    yield Fault("official step: period of N alone", STEP, {
        "kl_move": lambda values, p, rows: kl_move(values, p, 1)})  # fmt: skip

    def moved(values: Any, p: Any, rows: int) -> Any:
        move = kl_move(values, p, rows)
        return {n: v - move.get(n, 0.0) for n, v in values.items()}

    yield Fault("bound on log sigma left out", STEP, {"finish": moved})
    yield Fault("bound on log sigma before the official step", STEP,
                {"finish": lambda values, p, rows: moved(bounded(values, p), p, rows)})  # fmt: skip
    for other in ("elbo", "official"):
        yield Fault(f"bound on log sigma under objective {other} alone", STEP, {
            "bounded": lambda values, p, other=other: (
                bounded(values, p) if p["objective"] == other else values)})  # fmt: skip
    yield Fault("bound on log s too", STEP, {
        "bounded": lambda values, p: {
            n: v.clamp(min=-20 if n.endswith("log_sigma") else 0) if ".log_" in n else v
            for n, v in values.items()}})  # fmt: skip
    yield Fault("dropped Jacobian of exp", STEP, {
        "positive": lambda v: v + (v.exp() - v).detach(),
        "kl_gradients": lambda values, kl, prior: {
            n: g / values[n].exp() for n, g in gradients(values, kl, prior).items()}})  # fmt: skip


def _gradient_faults() -> Iterator[Fault]:
    found = formulas.nll_and_gradients

    def zeroed(part: str) -> Callable[..., Any]:
        def wrong(*given: Any) -> Any:
            nll, gradients, *sizes = found(*given)
            left = {n: 0 * g if n.endswith(part) else g for n, g in gradients.items()}
            return nll, left, *sizes

        return wrong

    for part in (".A", ".B", ".log_s", ".log_sigma"):
        yield Fault(f"step: no gradient of the NLL by {part[1:]}", STEP,
                    {"nll_and_gradients": zeroed(part)})  # fmt: skip


def _draw_faults() -> Iterator[Fault]:
    both = (*STEP, "prediction")
    each = (*both, *SUBSPACE)
    yield Fault("the draw follows the row, not the example", each,
                {"group_ids": lambda batch: list(range(len(batch["ids"])))})  # fmt: skip
    yield Fault("the last column, though it is padding", each, {
        "last_places": lambda batch: [batch["tokens"].shape[1] - 1] * len(batch["lengths"])
    })  # fmt: skip
    yield Fault("the token before the last", each, {
        "last_places": lambda batch: [max(0, n - 2) for n in batch["lengths"].tolist()]
    })  # fmt: skip
    yield Fault("log s for s", both, {"positive": lambda v: v})
    yield Fault("log variance for log sigma", both, {"positive": lambda v: (v / 2).exp()})
    right = formulas.draws_of

    def draws(change: Callable[[int], int]) -> dict[str, Any]:
        return {"draws_of": lambda p: [
            noise and Noise(noise.seed, change(noise.draw)) for noise in right(p)]}  # fmt: skip

    last = both[1:]
    yield Fault("test-time draws counted from 1", last, draws(lambda i: i + 1))
    yield Fault("the draws of training", last, draws(lambda i: FIRST_TRAINING_DRAW + i))
    yield Fault("one test-time draw for all", last, draws(lambda i: 0))
    yield Fault("noise in the mean model", last,
                {"draws_of": lambda p: right({**p, "samples": max(1, p["samples"])})})  # fmt: skip


# --- The subspace -----------------------------------------------------------------------------


def _scale_faults() -> Iterator[Fault]:
    """Derivatives by the scales, and the model with drawn scales."""
    jacobian, logits_under = formulas.jacobian, formulas.logits_under

    def derivatives(change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        return {"jacobian": lambda logits_of, s, rows: change(jacobian(logits_of, s, rows), s)}

    yield Fault("subspace: derivative by log s", SUBSPACE, derivatives(lambda J, s: J * s))
    yield Fault("subspace: one Jacobian for the whole batch", SUBSPACE,
                derivatives(lambda J, s: J.sum(0, keepdim=True).expand_as(J)))  # fmt: skip
    yield Fault("subspace: derivative of the log-softmax", SUBSPACE, {
        "jacobian": lambda logits_of, s, rows: (
            jacobian(lambda s: logits_of(s).log_softmax(-1), s, rows)),
        "centred": lambda J: J})  # fmt: skip
    yield Fault("subspace: class mean left in J", SUBSPACE, {"centred": lambda J: J})
    yield Fault("subspace: J less that of the first class", SUBSPACE,
                {"centred": lambda J: J - J[:, :1]})  # fmt: skip
    yield Fault("subspace: scaling left out", SUBSPACE, {
        "logits_under": lambda s, c, w, batch, values, p: (
            logits_under(s, c, w, batch, values, {**p, "scaling": 1.0}))})  # fmt: skip
    yield Fault("subspace: drawn scales not below 0", SUBSPACE,
                {"moved_scales": lambda s, offset: (s + offset).clamp(min=0)})  # fmt: skip
    yield Fault("subspace: draws multiply the scales", SUBSPACE,
                {"moved_scales": lambda s, offset: s * (1 + offset)})  # fmt: skip


def _curvature_faults() -> Iterator[Fault]:
    right, curvature_of = formulas.curvature, formulas.curvature_of

    def empirical(logits: Tensor, J: Tensor, labels: Tensor) -> Tensor:
        error = logits.softmax(-1) - torch.nn.functional.one_hot(labels, logits.shape[1])
        slopes = torch.einsum("nc,ncd->nd", error, J)
        return slopes.T @ slopes

    changes: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "mean for sum": lambda z, J, labels: right(z, J, labels) / len(z),
        "its diagonal alone": lambda z, J, labels: right(z, J, labels).diagonal().diag(),
        "the labels' gradients squared": empirical,
        "2 times too large": lambda z, J, labels: 2 * right(z, J, labels),
        "the first example alone": lambda z, J, labels: right(z[:1], J[:1], labels[:1]),
    }
    for name, change in changes.items():
        yield Fault(f"subspace: H, {name}", SUBSPACE, {"curvature": change})
    weights: dict[str, Callable[[Tensor], Tensor]] = {
        "p p^T left out": torch.diag_embed,
        "classes weighted alike": lambda p: curvature_of(torch.full_like(p, 1 / p.shape[1])),
        "classes apart": lambda p: torch.diag_embed(p * (1 - p)),
        "p left out": lambda p: torch.eye(p.shape[1]).double().expand(len(p), -1, -1),
    }
    for name, weigh in weights.items():
        yield Fault(f"subspace: H, {name}", SUBSPACE, {"curvature_of": weigh})
    fit = formulas.log_likelihood
    yield Fault("subspace: log-likelihood averaged", SUBSPACE,
                {"log_likelihood": lambda z, labels: fit(z, labels) / len(z)})  # fmt: skip
    yield Fault("subspace: log-likelihood with the other sign", SUBSPACE,
                {"log_likelihood": lambda z, labels: -fit(z, labels)})  # fmt: skip


def _evidence_faults() -> Iterator[Fault]:
    penalty, volume, best = formulas.penalty, formulas.volume, formulas.best_precision
    free = formulas.free_shares
    penalties: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "penalty left out": lambda s, precision: 0 * penalty(s, precision),
        "half of the penalty left out": lambda s, precision: 2 * penalty(s, precision),
        "penalty of the scales' distance from 1": lambda s, precision: penalty(s - 1, precision),
        "penalty divided by lambda": lambda s, precision: penalty(s, 1 / precision),
    }
    for name, wrong in penalties.items():
        yield Fault(f"subspace: evidence, {name}", SUBSPACE, {"penalty": wrong})
    volumes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "determinant left out": lambda H, precision: 0 * volume(H, precision),
        "half of the determinant left out": lambda H, precision: 2 * volume(H, precision),
        "determinant of the covariance": lambda H, precision: -volume(H, precision),
        "the prior's determinant left out": lambda H, precision: (
            torch.logdet(torch.diag(precision) + H)),
        "the diagonal of H alone": lambda H, precision: volume(H.diagonal().diag(), precision),
        "one lambda for all": lambda H, precision: volume(H, precision[:1].expand_as(precision)),
    }  # fmt: skip
    for name, change in volumes.items():
        yield Fault(f"subspace: evidence, {name}", SUBSPACE, {"volume": change})
    shares: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "1 - M for M in the number of scales": lambda H, a: torch.eye(len(H)) - free(H, a),
        "the diagonal of H alone": lambda H, a: free(H.diagonal().diag(), a),
        "every scale counted": lambda H, a: 0 * free(H, a),
    }
    for name, share in shares.items():
        yield Fault(f"subspace: best lambda, {name}", SUBSPACE, {"free_shares": share})
    yield Fault("subspace: best lambda, one for all", SUBSPACE, {
        "best_precision": lambda H, s, of: (
            best(H, s, of.sum(1, keepdim=True)).expand(of.shape[1]))})  # fmt: skip
    yield Fault("subspace: best lambda, one step of the iteration", SUBSPACE, {
        "best_precision": lambda H, s, of: (
            (1 - free(H, torch.ones(len(s)).double()).diagonal()) @ of / (s.square() @ of))
    })  # fmt: skip


def _posterior_faults() -> Iterator[Fault]:
    std, whitened, root = formulas.prior_std, formulas.whitened, formulas.posterior_root
    yield Fault("subspace: lambda taken for a standard deviation", SUBSPACE,
                {"prior_std": lambda precision: precision})  # fmt: skip
    yield Fault("subspace: lambda taken for a variance", SUBSPACE,
                {"prior_std": lambda precision: precision.sqrt()})  # fmt: skip
    yield Fault("subspace: lambda taken for the root of a precision", SUBSPACE,
                {"prior_std": lambda precision: std(precision**2)})  # fmt: skip
    yield Fault("subspace: posterior without the data", SUBSPACE,
                {"whitened": lambda H, precision: whitened(0 * H, precision)})  # fmt: skip
    yield Fault("subspace: posterior of the diagonal of H", SUBSPACE, {
        "whitened": lambda H, precision: whitened(H.diagonal().diag(), precision)})  # fmt: skip
    yield Fault("subspace: Sigma for its root", SUBSPACE, {
        "posterior_root": lambda H, a: root(H, a) @ root(H, a).T})  # fmt: skip
    yield Fault("subspace: root of Sigma transposed", SUBSPACE,
                {"posterior_root": lambda H, a: root(H, a).T})  # fmt: skip
    yield Fault("subspace: Cholesky's root of Sigma", SUBSPACE, {
        "posterior_root": lambda H, a: torch.linalg.cholesky(root(H, a) @ root(H, a).T)
    })  # fmt: skip


def _covariance_faults() -> Iterator[Fault]:
    std, whitened, covariance = formulas.prior_std, formulas.whitened, formulas.logit_covariance

    def without_rest(H: Tensor, precision: Tensor, J: Tensor, directions: int) -> Tensor:
        values, U = whitened(H, precision)
        Q = J * std(precision) @ U[:, -directions:]
        return Q / (1 + values[-directions:]) @ Q.mT

    def smallest(H: Tensor, precision: Tensor, J: Tensor, directions: int) -> Tensor:
        values, U = whitened(H, precision)
        Q, P = J * std(precision) @ U[:, :directions], J * std(precision) @ U[:, directions:]
        return Q / (1 + values[:directions]) @ Q.mT + P @ P.mT

    covariances: dict[str, Callable[..., Tensor]] = {
        "other directions get no variance": without_rest,
        "smallest directions kept": smallest,
        "all directions kept": lambda H, a, J, k: covariance(H, a, J, len(H)),
        "correlations of logits left out": lambda H, a, J, k: torch.diag_embed(
            covariance(H, a, J, k).diagonal(dim1=1, dim2=2)),
        "J centred": lambda H, a, J, k: covariance(H, a, formulas.centred(J), k),
        "noise of the labels added": lambda H, a, J, k: (
            covariance(H, a, J, k) + torch.eye(J.shape[1])),
    }  # fmt: skip
    for name, wrong in covariances.items():
        yield Fault(f"subspace: {name}", SUBSPACE, {"logit_covariance": wrong})


def _draw_of_logits_faults() -> Iterator[Fault]:
    normals, drawn = formulas.normals, formulas.drawn_logits
    roots: dict[str, Callable[[Tensor], Tensor]] = {
        "Cholesky's root of the logits' covariance": torch.linalg.cholesky,
        "the logits' covariance for its root": lambda c: c,
        "the logits' covariances ignored": lambda c: torch.diag_embed(
            c.diagonal(dim1=1, dim2=2).sqrt()),
    }  # fmt: skip
    for name, other in roots.items():
        yield Fault(f"subspace: {name}", SUBSPACE, {"symmetric_root": other})
    yield Fault("subspace: noise left out", SUBSPACE,
                {"normals": lambda p, ids, width: 0 * normals(p, ids, width)})  # fmt: skip
    yield Fault("subspace: one draw for all examples", SUBSPACE, {
        "normals": lambda p, ids, width: normals(p, [ids[0]] * len(ids), width)})  # fmt: skip
    yield Fault("subspace: draws counted from 1", SUBSPACE, {
        "normals": lambda p, ids, width: (
            normals({**p, "samples": p["samples"] + 1}, ids, width)[1:])})  # fmt: skip
    yield Fault("subspace: noise without the mean", SUBSPACE, {
        "drawn_logits": lambda mean, c, eps: drawn(0 * mean, c, eps)})  # fmt: skip


FAULTS = (
    *_noise_faults(), *_op_faults(), *_kl_faults(), *_objective_faults(), *_start_faults(),
    *_schedule_faults(), *_predictive_faults(), *_metric_faults(), *_model_faults(),
    *_step_faults(), *_gradient_faults(), *_draw_faults(), *_scale_faults(), *_curvature_faults(),
    *_evidence_faults(), *_posterior_faults(), *_covariance_faults(), *_draw_of_logits_faults(),
)  # fmt: skip
