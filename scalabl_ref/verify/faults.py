"""Plausible mistakes of a port, and the results that each gives: `conformance check` names them.

A fault puts wrong functions in the place of right ones of `reference` and `formulas`, from which
the expected values of the kit come. The cases computed again are then what a port with this mistake
stores. Every fault must be beyond the bounds of a case, in either precision but for a list of those
that float32 does not tell from its own rounding (tests/verify/test_faults.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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


def _each(
    levels: tuple[str, ...],
    make: str | Callable[[Any], dict[str, Any]],
    table: Mapping[str, Any],
    prefix: str = "",
) -> Iterator[Fault]:
    """A fault for each value of a table, by name.

    make: the function that the value replaces, or what makes `Fault.wrong` of the value.
    """
    for name, value in table.items():
        wrong = {make: value} if isinstance(make, str) else make(value)
        yield Fault(prefix + name, levels, wrong)


# --- Noise ------------------------------------------------------------------------------------


def _rounds(count: int) -> dict[str, Callable[..., Any]]:
    right = reference.philox4x32
    return {"philox4x32": lambda c, k, rounds=10: right(c, k, count if rounds == 10 else rounds)}


def _normal(change: Callable[[int, int, int, int, int], tuple[int, ...]]) -> dict[str, Any]:
    """The normals of other coordinates (seed, draw, layer, group, k)."""
    right = reference.normal
    return {"normal": lambda *at: right(*change(*at))}


def _plain_angle(a: int, b: int) -> tuple[float, float]:
    radius, angle = math.sqrt(-2 * math.log((a + 0.5) / WORD)), 2 * math.pi * b / WORD
    return radius * math.cos(angle), radius * math.sin(angle)


def _noise_faults() -> Iterator[Fault]:
    box_muller, half = reference.box_muller, 2**31
    for rounds in (7, 9, 11):
        yield Fault(f"{rounds} rounds of Philox", ("philox", *NOISE), _rounds(rounds))
    yield from _each(NOISE, _normal, {
        "blocks of the counter counted from 1": lambda n, d, i, g, k: (n, d, i, g, k + 4),
        "components counted from 1": lambda n, d, i, g, k: (n, d, i, g, k + 1),
        "group off by one": lambda n, d, i, g, k: (n, d, i, (g + 1) % WORD, k),
        "layer off by one": lambda n, d, i, g, k: (n, d, (i + 1) % WORD, g, k),
        "draw off by one": lambda n, d, i, g, k: (n, (d + 1) % WORD, i, g, k),
        "layer and draw exchanged": lambda n, d, i, g, k: (n, i, d, g, k),
        "layer and group exchanged": lambda n, d, i, g, k: (n, d, g, i, k),
        "draw and group exchanged": lambda n, d, i, g, k: (n, g, i, d, k),
        "seed cut to 32 bits": lambda n, d, i, g, k: (n % WORD, d, i, g, k),
        "seed cut to 63 bits": lambda n, d, i, g, k: (n % 2**63, d, i, g, k),
        "seed rounded to a double": lambda n, d, i, g, k: (int(float(n)) % WORD**2, d, i, g, k),
        "group rounded to float32": lambda n, d, i, g, k: (
            n, d, i, int(_single(float(g))[0]) % WORD, k),
        "halves of the seed exchanged": lambda n, d, i, g, k: (
            n % WORD * WORD + n // WORD, d, i, g, k),
        "one draw for all groups": lambda n, d, i, g, k: (n, d, i, 0, k),
        "one draw for all layers": lambda n, d, i, g, k: (n, d, 0, g, k),
        "one draw for all steps": lambda n, d, i, g, k: (n, 0, i, g, k),
        "the same block again": lambda n, d, i, g, k: (n, d, i, g, k % 4),
        "sine and cosine exchanged": lambda n, d, i, g, k: (n, d, i, g, k ^ 1),
        "pairs of words exchanged": lambda n, d, i, g, k: (n, d, i, g, k ^ 2),
    })  # fmt: skip
    yield from _each(NOISE, "box_muller", {
        "words of a pair exchanged": lambda a, b: box_muller(b, a),
        "uniform (a + 1) 2^-32": lambda a, b: box_muller(a + 0.5, b),
        "uniform of 24 bits": lambda a, b: box_muller(a // 256 * 256, b),
        "angle turned by half": lambda a, b: box_muller(a, (b + half) % WORD),
    })  # fmt: skip
    eps = reference.eps_of_group
    yield from _each(NOISE[:1], "eps_of_group", {
        "draws of rows ignored": lambda noise, i, g, rank, later=0: eps(noise, i, g, rank),
        "draws of rows in the place of the draw": lambda noise, i, g, rank, later=0: (
            eps(Noise(noise.seed, later), i, g, rank) if later else eps(noise, i, g, rank)),
    })  # fmt: skip
    yield from _each(NOISE[:1], "box_muller", {
        "normals rounded to float32 before step 5": lambda a, b: _single(*box_muller(a, b)),
        "angle not reduced as an integer": _plain_angle,
        "normals in float32, angle not reduced as an integer": _single_normals(quarters=False),
        "normals in float32": _single_normals(quarters=True),
    })  # fmt: skip


def _single(*values: float) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


def _single_normals(quarters: bool) -> Callable[[int, int], list[float]]:
    """Two normals, every operation in float32. quarters: they are subtracted as integers."""

    def box_muller(a: int, b: int) -> list[float]:
        quarter = (b + 2**29) // 2**30 if quarters else 0
        u, rest = torch.tensor([float(a), float(b - quarter * 2**30)], dtype=torch.float32)
        radius, x = (-2 * ((u + 0.5) / WORD).log()).sqrt(), rest * (2 * math.pi / WORD)
        cos, sin = x.cos(), x.sin()
        for _ in range(quarter):
            cos, sin = -sin, cos
        return [float(radius * cos), float(radius * sin)]

    return box_muller


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
    yield from _each(OP, _op, {
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
    })  # fmt: skip
    yield from _each(OP[1:], _op, {
        "s detached": lambda c: c.scaling * (c.s.detach() + c.sigma * c.eps),
        "sigma detached": lambda c: c.scaling * (c.s + c.sigma.detach() * c.eps),
        "gradient of sigma without eps": lambda c: (
            c.scaling * (c.s + c.sigma - c.sigma.detach() + c.sigma.detach() * c.eps)),
        "scaling left out of the gradients of s and sigma": lambda c: (
            (c.scaling - 1) * (c.s + c.sigma * c.eps).detach() + c.s + c.sigma * c.eps),
    })  # fmt: skip
    yield from _each(OP, lambda join: _op(join=join), {
        "bias left out": lambda base, bias, update: base + update,
        "update without the base": lambda base, bias, update: bias + update,
        "update subtracted": lambda base, bias, update: base + bias - update,
        "bias scaled with the update": lambda base, bias, update: base + 2 * bias + update,
    })  # fmt: skip
    yield from _each(OP[1:], lambda join: _op(join=join), {
        "base's share of grad x left out": lambda base, bias, update: base.detach() + bias + update,
        "update's share of the gradients left out": lambda base, bias, update: (
            base + bias + update.detach()),
    })  # fmt: skip
    yield from _each(OP, lambda change: _op(change=change), {
        "a draw for every row": lambda c: {"sampling": "token", "groups": None},
        "one draw for the batch": lambda c: {"sampling": "batch"},
        "one draw for each example": lambda c: {"sampling": "example"},
        "group ids ignored": lambda c: {"groups": None},
        "rows of A in the opposite order": lambda c: {"A": c["A"].flip(0)},
        "layer and draw exchanged at the op's call": lambda c: c["noise"] and {
            "noise": Noise(c["noise"].seed, c["layer"]), "layer": c["noise"].draw},
    })  # fmt: skip


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
    yield from _each(levels, lambda terms: _kl(forward=terms[0], official=terms[1]), {
        "half of the KL left out": (
         lambda s, v, p: log(p / v) + (v**2 + s**2) / (2 * p**2),
         lambda s, v, p: log(v / p) + (p**2 + s**2) / (2 * v**2)),
        "KL: logarithm of the ratio upside down": (
         lambda s, v, p: log(v / p) + (v**2 + s**2) / (2 * p**2) - 0.5,
         lambda s, v, p: log(p / v) + (p**2 + s**2) / (2 * v**2) - 0.5),
        "KL: standard deviation for variance": (
         lambda s, v, p: log(p / v) + (v + s**2) / (2 * p) - 0.5,
         lambda s, v, p: log(v / p) + (p + s**2) / (2 * v) - 0.5),
        "KL: the prior's variance is prior_std": (
         lambda s, v, p: log(p**0.5 / v) + (v**2 + s**2) / (2 * p) - 0.5,
         lambda s, v, p: log(v / p**0.5) + (p + s**2) / (2 * v**2) - 0.5),
        "KL: prior_std taken as 1": (
         lambda s, v, p: -log(v) + (v**2 + s**2) / 2 - 0.5,
         lambda s, v, p: log(v) + (1 + s**2) / (2 * v**2) - 0.5),
        "KL without the mean": (
         lambda s, v, p: log(p / v) + v**2 / (2 * p**2) - 0.5,
         lambda s, v, p: log(v / p) + p**2 / (2 * v**2) - 0.5),
        "KL: 2 left out of the denominator": (
         lambda s, v, p: log(p / v) + (v**2 + s**2) / p**2 - 0.5,
         lambda s, v, p: log(v / p) + (p**2 + s**2) / v**2 - 0.5),
    })  # fmt: skip
    for small in (1e-6, 1e-8, 1e-12):
        yield from _each(levels, lambda terms: _kl(forward=terms[0], official=terms[1]), {
            f"KL: {small:g} added to sigma in the logarithm": (
             lambda s, v, p, e=small: log(p / (v + e)) + (v**2 + s**2) / (2 * p**2) - 0.5,
             lambda s, v, p, e=small: log((v + e) / p) + (p**2 + s**2) / (2 * v**2) - 0.5),
            f"KL: {small:g} added to the denominator": (
             lambda s, v, p, e=small: log(p / v) + (v**2 + s**2) / (2 * p**2 + e) - 0.5,
             lambda s, v, p, e=small: log(v / p) + (p**2 + s**2) / (2 * v**2 + e) - 0.5),
        })  # fmt: skip
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


def _log_of_softmax(small: float) -> Callable[..., tuple[float, float, float]]:
    """The NLL from the logarithm of a softmax and a small number."""

    def elbo(logits: Tensor, labels: Tensor, pairs: Any, prior: float, beta: float, n: int,
             kl: str = "forward") -> tuple[float, float, float]:  # fmt: skip
        p = logits.softmax(-1)[torch.arange(len(labels)), labels]
        nll = float(-(p + small).log().mean())
        divergence = sum(getattr(reference, f"kl_{kl}")(s, v, prior) for s, v in pairs)
        return nll + beta * divergence / n, nll, divergence

    return elbo


def _objective_faults() -> Iterator[Fault]:
    yield from _each(("ELBO",), _elbo, {
        "KL not divided by N": lambda nll, kl, beta, n, rows: (nll + beta * kl, nll, kl),
        "KL divided by the batch": lambda nll, kl, beta, n, rows: (nll + beta * kl / rows, nll, kl),
        "beta left out": lambda nll, kl, beta, n, rows: (nll + kl / n, nll, kl),
        "NLL summed over the rows": lambda nll, kl, beta, n, rows: (
            rows * nll + beta * kl / n, rows * nll, kl),
        "KL subtracted": lambda nll, kl, beta, n, rows: (nll - beta * kl / n, nll, kl),
    })  # fmt: skip
    right = reference.elbo
    yield from _each(("ELBO",), "elbo", {
        "logarithm of a softmax that is 0": _log_of_softmax(0.0),
        "logarithm of a softmax + 1e-12": _log_of_softmax(1e-12),
        "KL of one layer only": lambda logits, labels, pairs, *rest: (
            right(logits, labels, pairs[:1], *rest)),
    })  # fmt: skip


def _start_faults() -> Iterator[Fault]:
    levels, uniforms, kaiming = ("initialisation",), reference.uniforms, reference.kaiming

    def sigma(low: Callable[[float, float], float]) -> dict[str, Any]:
        return {"initial_log_sigma": lambda uniform, top: [math.log(low(top, u)) for u in uniform]}

    yield from _each(levels, "uniforms", {
        "words of another layer": lambda seed, layer, n: uniforms(seed, layer + 1, n),
        "stream of the layer alone": lambda seed, layer, n: uniforms(seed, layer - 2**62, n),
    }, "start: ")  # fmt: skip
    yield from _each(levels, "kaiming", {
        "uniform not centred": lambda u, r, n: kaiming([(v + 1) / 2 for v in u], r, n),
        "fan-out for fan-in": lambda u, r, n: [
            [v * math.sqrt(n / r) for v in row] for row in kaiming(u, r, n)],
        "column by column": lambda u, r, n: list(map(list, zip(*kaiming(u, n, r), strict=True)))
        if r == n else [[kaiming(u, r * n, 1)[j * r + k][0] / math.sqrt(n) for j in range(n)]
                        for k in range(r)],
    }, "start: ")  # fmt: skip
    yield from _each(levels, sigma, {
        "sigma from 0": lambda top, u: top * u,
        "log sigma uniform": lambda top, u: top * 2 ** ((u - 1) / 2),
        "init_sigma for sigma": lambda top, u: top,
    }, "start: ")  # fmt: skip
    thin_svd = formulas.thin_svd
    yield from _each(levels, lambda start: {"thin_svd": lambda M: start(*thin_svd(M))}, {
        "singular values in another order than A's rows": lambda A, s: (A, s.flip(0)),
        "squared singular values": lambda A, s: (A, s**2),
        "A with the lengths of the singular values": lambda A, s: (s[:, None] * A, s),
        "s of 1": lambda A, s: (A, torch.ones_like(s)),
    }, "start: ")  # fmt: skip


def _schedule_faults() -> Iterator[Fault]:
    right = reference.warmup

    def rise(count: Callable[[int, float], float]) -> dict[str, Any]:
        """The factor with another number of steps of the rise."""

        def factor(step: int, steps: int, share: float) -> float:
            up = count(steps, share)
            return step / max(1, up) if step < up else (steps - step) / max(1, steps - up)

        return {"warmup": factor}

    def single(steps: int, share: float) -> int:
        return int(float(torch.tensor(share, dtype=torch.float32) * steps))

    levels = ("schedules", *STEP)
    yield Fault("warm-up steps rounded to the nearest", levels, rise(lambda n, w: round(n * w)))
    yield Fault("warm-up steps rounded up", levels, rise(lambda n, w: math.ceil(n * w)))
    yield Fault("warm-up steps not rounded", levels, rise(lambda n, w: n * w))
    yield Fault("warm-up steps in float32", levels[:1], rise(single))
    yield Fault("one warm-up step at least", levels[:1],
                rise(lambda n, w: max(1, math.floor(n * w))))  # fmt: skip
    yield Fault("warm-up left out", levels, rise(lambda n, w: 0))
    yield from _each(levels, "warmup", {
        "warm-up off by one": lambda i, n, w: right(i + 1, n, w),
        "rates without a fall": lambda i, n, w: min(1.0, i / max(1, math.floor(n * w))),
        "rates constant": lambda i, n, w: 1.0,
        "fall as if there were no warm-up": lambda i, n, w: (
            right(i, n, w) if i < math.floor(n * w) else (n - i) / n),
    })  # fmt: skip

    yield from _weight_faults(levels)


def _weight_faults(levels: tuple[str, ...]) -> Iterator[Fault]:
    weight = reference.kl_weight

    def period(
        n: int, batch: int, power: float = 8.0, whole: Callable[..., int] = math.floor
    ) -> int:
        return whole(100 * n ** (math.pi / power) / batch)

    yield Fault("period of 0: max(1, M) left out", levels[:1], {
        "kl_period": period,
        "kl_weight": lambda i, M: weight(i, M) if M else math.nan})  # fmt: skip
    yield from _each(levels, "kl_period", {
        "period not divided by the batch": lambda n, batch: period(n, 1),
        "period with another power of N": lambda n, batch: max(1, period(n, batch, 4.0)),
        "period rounded to the nearest": lambda n, batch: max(1, period(n, batch, whole=round)),
        "period rounded up": lambda n, batch: max(1, period(n, batch, whole=math.ceil)),
    })  # fmt: skip
    yield from _each(levels, "kl_weight", {
        "KL weights counted from 0": lambda i, M: weight(i, M) / 2,
        "KL weight of the next step": lambda i, M: weight(i + 1, M),
        "KL weights falling": lambda i, M: weight(M - 1 - i % M, M),
    })  # fmt: skip
    yield Fault("2^(M + 1) for 2^(M + 1) - 1", levels[:1],
                {"kl_weight": lambda i, M: math.ldexp(1.0, i % M - M)})  # fmt: skip
    yield from _each(levels, "kl_weight", {
        "2^M - 1 for 2^(M + 1) - 1": lambda i, M: (
            math.ldexp(1.0, i % M + 1 - M) / (1 - math.ldexp(1.0, -M))),
        "2^M + 1 for 2^(M + 1) - 1": lambda i, M: (
            math.ldexp(1.0, i % M + 1 - M) / (1 + math.ldexp(1.0, -M))),
    })  # fmt: skip


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
    yield from _each(levels, lambda mean: _predictive(mean=mean), {
        "log-probabilities averaged": lambda log_p: log_p.mean(0).exp(),
        "log-probabilities averaged and normalised": lambda log_p: log_p.mean(0).softmax(-1),
        "probabilities summed over the draws": lambda log_p: log_p.exp().sum(0),
        "the first draw for all": lambda log_p: log_p[0].exp(),
    })  # fmt: skip
    yield Fault("entropy in bits", levels, _predictive(entropy=lambda p: _entropy(p) / math.log(2)))
    yield Fault("entropies exchanged", levels, _predictive(after=lambda f: {
        "entropy": f["expected_entropy"], "expected_entropy": f["entropy"]}))  # fmt: skip
    yield Fault("mutual information with the other sign", levels[:1], _predictive(
        after=lambda f: {"mutual_information": f["expected_entropy"] - f["entropy"]}))  # fmt: skip
    yield Fault("0 ln 0 is not 0", levels[:1],
                _predictive(entropy=lambda log_p: -(log_p.exp() * log_p).sum(-1)))  # fmt: skip

    def entropy(log: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return _predictive(entropy=lambda log_p: -(log_p.exp() * log(log_p)).sum(-1))

    yield from _each(levels, entropy, {
        "1e-12 added to p": lambda log_p: (log_p.exp() + 1e-12).log(),
        "1e-10 added to p": lambda log_p: (log_p.exp() + 1e-10).log(),
        "p at least 1e-12": lambda log_p: log_p.clamp(min=math.log(1e-12)),
    }, "in the logarithm of the entropy: ")  # fmt: skip
    yield Fault("softmax without its maximum", levels[:1],
                _predictive(lambda z: (z.exp() / z.exp().sum(-1, keepdim=True)).log()))  # fmt: skip


def _metric_faults() -> Iterator[Fault]:
    levels, ece, scores = ("metrics",), reference.ece, reference.scores

    def single(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32)

    yield from _each(levels, "bin_of", {
        "bins in float32": lambda c, n: min(math.floor(float(single(c) * n)), n - 1),
        "edges of bins in float32": lambda c, n: min(
            sum(c >= float(single(i / n)) for i in range(1, n)), n - 1),
        "an edge belongs to the bin below": lambda c, n: max(0, math.ceil(c * n) - 1),
        "confidence 1 in a bin of its own": lambda c, n: math.floor(c * n),
        "one bin too few": lambda c, n: min(math.floor(c * (n - 1)), n - 2),
        "ECE in one bin": lambda c, n: 0,
    })  # fmt: skip
    yield from _each(levels, "ece", {
        "ECE without division by N": lambda p, labels, n: ece(p, labels, n) * len(labels),
        "ECE always in 10 bins": lambda p, labels, n: ece(p, labels, 10),
        "ECE always in 15 bins": lambda p, labels, n: ece(p, labels, 15),
        "ECE: the mean over bins": lambda p, labels, n: ece(p, labels, n) * len(labels) / n,
    })  # fmt: skip
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

    yield from _each(levels, pairs, {
        "AUROC: ties won": lambda a, b: a >= b,
        "AUROC: ties lost": lambda a, b: a > b,
        "AUROC reversed": lambda a, b: (a < b) + (a == b) / 2,
    })  # fmt: skip


# --- The model --------------------------------------------------------------------------------


def _model_faults() -> Iterator[Fault]:
    levels, norm, rotate = ("llama",), formulas.norm, formulas.rotate
    frequency, kv_head = formulas.frequency, formulas.kv_head

    def interleaved(x: Tensor, f: Tensor) -> Tensor:
        halves = rotate(torch.cat((x[..., ::2], x[..., 1::2]), -1), f).chunk(2, -1)
        return torch.stack(halves, -1).flatten(-2)

    def ramp(change: dict[str, Any]) -> dict[str, Any]:
        return {"frequency": lambda pair, size, rope: frequency(
            pair, size, rope.__class__(**{**vars(rope), **change}))}  # fmt: skip

    yield from _each(levels, "norm", {
        "mean subtracted": lambda w, n, x, eps: norm(w, n, x - x.mean(-1, keepdim=True), eps),
        "eps outside the root": lambda w, n, x, eps: (
            x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w[f"{n}.weight"]),
        "eps 1e-6": lambda w, n, x, eps: norm(w, n, x, 1e-6),
        "weight 1 + w": lambda w, n, x, eps: norm(
            {f"{n}.weight": 1 + w[f"{n}.weight"]}, n, x, eps),
    }, "RMSNorm: ")  # fmt: skip

    def head_eps(names: tuple[str, ...]) -> Callable[[float], dict[str, Any]]:
        return lambda other: {"head_norm": lambda w, n, x, eps: norm(
            w, n, x, other if n.endswith(names) else eps)}  # fmt: skip

    others = {"left out": 0.0, "1e-6": 1e-6, "1e-5": 1e-5}
    for names in (("q_norm", "k_norm"), ("q_norm",), ("k_norm",)):
        prefix = f"{' and '.join(names)}: eps "
        yield from _each((*levels, *STEP), head_eps(names), others, prefix)
    yield from _each(levels, "rotate", {
        "neighbouring pairs": interleaved,
        "turned backwards": lambda x, f: rotate(x, -f),
        "left out": lambda x, f: x,
    }, "RoPE: ")  # fmt: skip
    yield from _each(levels, ramp, {
        "scaling left out": {"kind": "default"},
        "theta 10000": {"theta": 1e4},
        "low_freq_factor 1": {"low_freq_factor": 1.0},
        "high_freq_factor 4": {"high_freq_factor": 4.0},
        "context of 8192": {"original_max_position_embeddings": 8192},
    }, "RoPE: ")  # fmt: skip
    yield from _each(levels, "kv_head", {
        "kv heads in turn": lambda head, heads, kv: head % kv,
        "the first kv head for all": lambda head, heads, kv: 0 * kv_head(head, heads, kv),
    }, "attention: ")  # fmt: skip
    gelu = torch.nn.functional.gelu
    yield from _each(levels, "swiglu", {
        "gate and up exchanged": lambda gate, up: up / (1 + (-up).exp()) * gate,
        "gelu for silu": lambda gate, up: gelu(gate) * up,
    }, "SwiGLU: ")  # fmt: skip


# --- The training step and the prediction -----------------------------------------------------


def _optimizer_faults() -> Iterator[Fault]:
    right = formulas.adamw

    def settings(values: dict[str, Any]) -> dict[str, Any]:
        return {"adamw": lambda x, m, v, g, rate, p: right(x, m, v, g, rate, {**p, **values})}

    yield from _each(STEP, settings, {
        "eps 0": {"adam_eps": 0.0}, "eps 1e-8": {"adam_eps": 1e-8},
        "eps 1e-6": {"adam_eps": 1e-6}, "eps 1e-5": {"adam_eps": 1e-5},
        "beta1 .9": {"beta1": 0.9}, "beta2 .999": {"beta2": 0.999},
        "weight decay left out": {"weight_decay": 0.0},
        "weight decay .1": {"weight_decay": 0.1}, "weight decay .01": {"weight_decay": 0.01},
    }, "AdamW: ")  # fmt: skip

    def moved(update: Callable[..., Tensor]) -> dict[str, Any]:
        def wrong(x: Tensor, m: Tensor, v: Tensor, g: Tensor, rate: float, p: Any) -> Any:
            _, m, v = right(x, m, v, g, rate, p)
            one, two = (1 - p[f"beta{i}"] ** (p["step"] + 1) for i in (1, 2))
            x = x * (1 - rate * p["weight_decay"])
            return x - rate * update(m, v, one, two, p["adam_eps"]), m, v

        return {"adamw": wrong}

    yield from _each(STEP, moved, {
        "eps added before the bias correction": lambda m, v, one, two, eps: (
            m / one / ((v.sqrt() + eps) / two**0.5)),
        "eps under the root": lambda m, v, one, two, eps: m / one / (v / two + eps).sqrt(),
        "no bias correction": lambda m, v, one, two, eps: m / (v.sqrt() + eps),
    }, "AdamW: ")  # fmt: skip

    def corrected(x: Tensor, m: Tensor, v: Tensor, g: Tensor, rate: float, p: Any) -> Any:
        x, m, v = right(x, m, v, g, rate, p)
        return x, m / (1 - p["beta1"] ** (p["step"] + 1)), v / (1 - p["beta2"] ** (p["step"] + 1))

    yield from _each(STEP, "adamw", {
        "t is the step, not the step + 1": lambda x, m, v, g, rate, p: right(
            x, m, v, g, rate, {**p, "step": p["step"] - 1}),
        "decay in the gradient": lambda x, m, v, g, rate, p: right(
            x, m, v, g + p["weight_decay"] * x, rate, {**p, "weight_decay": 0.0}),
        "decay not times the rate": lambda x, m, v, g, rate, p: right(
            x, m, v, g, rate, {**p, "weight_decay": p["weight_decay"] / rate}),
        "moments not stored": lambda x, m, v, g, rate, p: (right(x, m, v, g, rate, p)[0], m, v),
        "moments stored with their bias corrected": corrected,
    }, "AdamW: ")  # fmt: skip
    yield from _decay_faults()
    yield Fault("AdamW: betas rounded to float32", STEP, {
        "adamw": lambda x, m, v, g, rate, p: right(x, m, v, g, rate, {
            **p, "beta1": _single(p["beta1"])[0], "beta2": _single(p["beta2"])[0]})})  # fmt: skip
    next_step = formulas.next_step
    yield Fault("AdamW: t counted from the step at which it starts", STEP, {
        "next_step": lambda p: {**next_step(p), "taken": p.get("taken", 0) + 1},
        "adamw": lambda x, m, v, g, rate, p: right(
            x, m, v, g, rate, {**p, "step": p.get("taken", 0)})})  # fmt: skip
    for name in ("step", "draw"):
        yield Fault(f"the same {name} again in the next step", STEP, {
            "next_step": lambda p, name=name: {**next_step(p), name: p[name]}})  # fmt: skip


def _decay_faults() -> Iterator[Fault]:
    right, rate_of = formulas.adamw, formulas.rate_of

    def decayed(scales: bool) -> Callable[..., Any]:
        """The decay of log_s and log_sigma alone, or of A and B alone."""

        def adamw(x: Tensor, m: Tensor, v: Tensor, g: Tensor, rate: float, p: Any) -> Any:
            of_scales = rate == rate_of(".log_", p)  # their rate is another than that of A and B
            return right(x, m, v, g, rate, p if of_scales == scales else {**p, "weight_decay": 0.0})

        return adamw

    def after(x: Tensor, m: Tensor, v: Tensor, g: Tensor, rate: float, p: Any) -> Any:
        x, m, v = right(x, m, v, g, rate, {**p, "weight_decay": 0.0})
        return x * (1 - rate * p["weight_decay"]), m, v

    yield from _each(STEP, "adamw", {
        "decay after the step": after,
        "decay of A and B alone": decayed(scales=False),
        "decay of log s and log sigma alone": decayed(scales=True),
    }, "AdamW: ")  # fmt: skip


def _step_faults() -> Iterator[Fault]:
    share, rate_of = formulas.kl_share, formulas.rate_of
    kl_move, gradients = formulas.kl_move, formulas.kl_gradients
    yield from _optimizer_faults()
    yield from _each(STEP, "kl_share", {
        "KL not divided by N": lambda p: share(p) * p["num_examples"],
        "beta left out": lambda p: share({**p, "beta": 1.0}),
        "KL in the gradients of the official objective": lambda p: (
            share({**p, "objective": "elbo"})),
        "KL left out of the loss": lambda p: 0.0,
    }, "step: ")  # fmt: skip
    yield Fault("step: NLL summed over the batch", STEP, {"mean_of_rows": lambda nll: nll.sum()})
    yield from _each(STEP, "rate_of", {
        "one rate for all": lambda n, p: rate_of(n, {**p, "variational_lr": p["lr"]}),
        "rates exchanged": lambda n, p: rate_of(
            n, {**p, "variational_lr": p["lr"], "lr": p["variational_lr"]}),
    }, "step: ")  # fmt: skip

    def divided(by: Callable[..., float]) -> Callable[..., Any]:
        return lambda values, p, rows: {
            n: v / by(p, rows) for n, v in kl_move(values, p, rows).items()
        }

    yield from _each(STEP, "kl_move", {
        " ascends the KL": lambda values, p, rows: {
            n: -v for n, v in kl_move(values, p, rows).items()},
        " left out": lambda values, p, rows: {
            n: 0 * v for n, v in kl_move(values, p, rows).items()},
        ": kl_lr .002": lambda values, p, rows: kl_move(values, {**p, "kl_lr": 0.002}, rows),
        ": the official derivative for either KL": lambda values, p, rows: (
            kl_move(values, {**p, "kl": "official"}, rows)),
        ": the forward derivative for either KL": lambda values, p, rows: (
            kl_move(values, {**p, "kl": "forward"}, rows)),
        ": without the warm-up factor": divided(lambda p, rows: (
            reference.warmup(p["step"], p["steps"], p["warmup"]))),
        ": without pi": divided(lambda p, rows: (
            reference.kl_weight(p["step"], reference.kl_period(p["num_examples"], rows)))),
        ": period of N alone": lambda values, p, rows: kl_move(values, p, 1),
    }, "official step")  # fmt: skip
    yield Fault("dropped Jacobian of exp", STEP, {
        "positive": lambda v: v + (v.exp() - v).detach(),
        "kl_gradients": lambda values, kl, prior: {
            n: g / values[n].exp() for n, g in gradients(values, kl, prior).items()}})  # fmt: skip
    yield from _bound_faults()


def _bound_faults() -> Iterator[Fault]:
    kl_move, bounded = formulas.kl_move, formulas.bounded

    def moved(values: Any, p: Any, rows: int) -> Any:
        move = kl_move(values, p, rows)
        return {n: v - move.get(n, 0.0) for n, v in values.items()}

    yield from _each(STEP, "finish", {
        "left out": moved,
        "before the official step": lambda values, p, rows: moved(bounded(values, p), p, rows),
    }, "bound on log sigma ")  # fmt: skip
    for other in ("elbo", "official"):
        yield Fault(f"bound on log sigma under objective {other} alone", STEP, {
            "bounded": lambda values, p, other=other: (
                bounded(values, p) if p["objective"] == other else values)})  # fmt: skip
    yield Fault("bound on log s too", STEP, {
        "bounded": lambda values, p: {
            n: v.clamp(min=-20) if ".log_" in n else v for n, v in values.items()}})  # fmt: skip
    for high in (0.0, 0.5):
        yield Fault(f"log sigma at most {high:g}", STEP, {
            "bounded": lambda values, p, high=high: {
                n: v.clamp(max=high) if n.endswith("log_sigma") else v
                for n, v in bounded(values, p).items()}})  # fmt: skip


def _gradient_faults() -> Iterator[Fault]:
    found, move = formulas.nll_and_gradients, formulas.kl_move
    before: dict[str, Tensor] = {}

    def kept(config: Any, w: Any, batch: Any, values: dict[str, Tensor], p: Any) -> Any:
        before.update(values)
        return found(config, w, batch, values, p)

    yield Fault("official step: at the values before AdamW's step", STEP, {
        "nll_and_gradients": kept,
        "kl_move": lambda values, p, rows: move(dict(before), p, rows)})  # fmt: skip
    yield from _clipping_faults()

    def zeroed(part: str) -> Callable[..., Any]:
        def wrong(*given: Any) -> Any:
            nll, gradients, *sizes = found(*given)
            left = {n: 0 * g if n.endswith(part) else g for n, g in gradients.items()}
            return nll, left, *sizes

        return wrong

    for part in (".A", ".B", ".log_s", ".log_sigma"):
        yield Fault(f"step: no gradient of the NLL by {part[1:]}", STEP,
                    {"nll_and_gradients": zeroed(part)})  # fmt: skip


def _clipping_faults() -> Iterator[Fault]:
    found, right, of_kl = formulas.nll_and_gradients, formulas.adamw, formulas.kl_gradients
    times = [1.0]

    def clipped(config: Any, w: Any, batch: Any, values: Any, p: Any) -> Any:
        nll, gradients, *sizes = kept(config, w, batch, values, p)
        added = _kl_part(values, p, of_kl)
        return nll, {n: times[0] * (g + added[n]) - added[n] for n, g in gradients.items()}, *sizes

    def kept(config: Any, w: Any, batch: Any, values: Any, p: Any) -> Any:
        nll, gradients, *sizes = found(config, w, batch, values, p)
        added = _kl_part(values, p, of_kl)
        norm = sum(float((g + added[n]).square().sum()) for n, g in gradients.items()) ** 0.5
        times[0] = min(1.0, 1 / (norm + 1e-6))
        return nll, gradients, *sizes

    yield Fault("step: gradients clipped at norm 1", STEP, {"nll_and_gradients": clipped})
    yield Fault("step: gradients clipped at norm 1 before AdamW alone", STEP, {
        "nll_and_gradients": kept,
        "adamw": lambda x, m, v, g, rate, p: right(x, m, v, times[0] * g, rate, p)})  # fmt: skip


def _kl_part(values: Any, p: Any, of_kl: Callable[..., Any]) -> dict[str, Any]:
    """What the KL adds to each gradient."""
    share = formulas.kl_share(p)
    found = of_kl(values, p["kl"], p["prior_std"])
    return {name: share * found.get(name, 0.0) for name in values}


def _draw_faults() -> Iterator[Fault]:
    both = (*STEP, "prediction")
    each = (*both, *SUBSPACE)
    yield Fault("the draw follows the row, not the example", each,
                {"group_ids": lambda batch: list(range(len(batch["ids"])))})  # fmt: skip
    yield from _each(each, "last_places", {
        "the last column, though it is padding": lambda batch: (
            [batch["tokens"].shape[1] - 1] * len(batch["lengths"])),
        "the token before the last": lambda batch: (
            [max(0, n - 2) for n in batch["lengths"].tolist()]),
    })  # fmt: skip
    yield from _each(both, "positive", {
        "log s for s": lambda v: v,
        "log variance for log sigma": lambda v: (v / 2).exp(),
        "1e-8 added to s and sigma": lambda v: v.exp() + 1e-8,
        "s and sigma at least 1e-6": lambda v: v.exp().clamp(min=1e-6),
        "s and sigma at least exp(-20)": lambda v: v.clamp(min=-20).exp(),
    })  # fmt: skip
    right = formulas.draws_of

    def draws(change: Callable[[int], int]) -> dict[str, Any]:
        return {"draws_of": lambda p: [
            noise and Noise(noise.seed, change(noise.draw)) for noise in right(p)]}  # fmt: skip

    last = both[1:]
    yield from _each(last, draws, {
        "test-time draws counted from 1": lambda i: i + 1,
        "the draws of training": lambda i: FIRST_TRAINING_DRAW + i,
        "one test-time draw for all": lambda i: 0,
    })  # fmt: skip
    yield Fault("noise in the mean model", last,
                {"draws_of": lambda p: right({**p, "samples": max(1, p["samples"])})})  # fmt: skip


# --- The subspace -----------------------------------------------------------------------------


def _scale_faults() -> Iterator[Fault]:
    """Derivatives by the scales, and the model with drawn scales."""
    jacobian, logits_under = formulas.jacobian, formulas.logits_under

    def derivatives(change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        return {"jacobian": lambda logits_of, s, rows: change(jacobian(logits_of, s, rows), s)}

    yield from _each(SUBSPACE, derivatives, {
        "derivative by log s": lambda J, s: J * s,
        "one Jacobian for the whole batch": lambda J, s: J.sum(0, keepdim=True).expand_as(J),
    }, "subspace: ")  # fmt: skip
    yield Fault("subspace: derivative of the log-softmax", SUBSPACE, {
        "jacobian": lambda logits_of, s, rows: (
            jacobian(lambda s: logits_of(s).log_softmax(-1), s, rows)),
        "centred": lambda J: J})  # fmt: skip
    yield from _each(SUBSPACE, "centred", {
        "class mean left in J": lambda J: J,
        "J less that of the first class": lambda J: J - J[:, :1],
    }, "subspace: ")  # fmt: skip
    yield Fault("subspace: scaling left out", SUBSPACE, {
        "logits_under": lambda s, c, w, batch, values, p: (
            logits_under(s, c, w, batch, values, {**p, "scaling": 1.0}))})  # fmt: skip
    yield from _each(SUBSPACE, "moved_scales", {
        "drawn scales not below 0": lambda s, offset: (s + offset).clamp(min=0),
        "draws multiply the scales": lambda s, offset: s * (1 + offset),
    }, "subspace: ")  # fmt: skip


def _curvature_faults() -> Iterator[Fault]:
    right, curvature_of = formulas.curvature, formulas.curvature_of

    def empirical(logits: Tensor, J: Tensor, labels: Tensor) -> Tensor:
        error = logits.softmax(-1) - torch.nn.functional.one_hot(labels, logits.shape[1])
        slopes = torch.einsum("nc,ncd->nd", error, J)
        return slopes.T @ slopes

    yield from _each(SUBSPACE, "curvature", {
        "mean for sum": lambda z, J, labels: right(z, J, labels) / len(z),
        "its diagonal alone": lambda z, J, labels: right(z, J, labels).diagonal().diag(),
        "the labels' gradients squared": empirical,
        "2 times too large": lambda z, J, labels: 2 * right(z, J, labels),
        "the first example alone": lambda z, J, labels: right(z[:1], J[:1], labels[:1]),
    }, "subspace: H, ")  # fmt: skip
    yield from _each(SUBSPACE, "curvature_of", {
        "p p^T left out": torch.diag_embed,
        "classes weighted alike": lambda p: curvature_of(torch.full_like(p, 1 / p.shape[1])),
        "classes apart": lambda p: torch.diag_embed(p * (1 - p)),
        "p left out": lambda p: torch.eye(p.shape[1]).double().expand(len(p), -1, -1),
    }, "subspace: H, ")  # fmt: skip
    fit = formulas.log_likelihood
    yield from _each(SUBSPACE, "log_likelihood", {
        "averaged": lambda z, labels: fit(z, labels) / len(z),
        "with the other sign": lambda z, labels: -fit(z, labels),
    }, "subspace: log-likelihood ")  # fmt: skip


def _evidence_faults() -> Iterator[Fault]:
    penalty, volume, best = formulas.penalty, formulas.volume, formulas.best_precision
    free = formulas.free_shares
    yield from _each(SUBSPACE, "penalty", {
        "penalty left out": lambda s, precision: 0 * penalty(s, precision),
        "half of the penalty left out": lambda s, precision: 2 * penalty(s, precision),
        "penalty of the scales' distance from 1": lambda s, precision: penalty(s - 1, precision),
        "penalty divided by lambda": lambda s, precision: penalty(s, 1 / precision),
    }, "subspace: evidence, ")  # fmt: skip
    yield from _each(SUBSPACE, "volume", {
        "determinant left out": lambda H, precision: 0 * volume(H, precision),
        "half of the determinant left out": lambda H, precision: 2 * volume(H, precision),
        "determinant of the covariance": lambda H, precision: -volume(H, precision),
        "the prior's determinant left out": lambda H, precision: (
            torch.logdet(torch.diag(precision) + H)),
        "the diagonal of H alone": lambda H, precision: volume(H.diagonal().diag(), precision),
        "one lambda for all": lambda H, precision: volume(H, precision[:1].expand_as(precision)),
    }, "subspace: evidence, ")  # fmt: skip
    yield from _each(SUBSPACE, "free_shares", {
        "1 - M for M in the number of scales": lambda H, a: torch.eye(len(H)) - free(H, a),
        "the diagonal of H alone": lambda H, a: free(H.diagonal().diag(), a),
        "every scale counted": lambda H, a: 0 * free(H, a),
    }, "subspace: best lambda, ")  # fmt: skip
    yield from _each(SUBSPACE, "best_precision", {
        "one for all": lambda H, s, of: best(H, s, of.sum(1, keepdim=True)).expand(of.shape[1]),
        "one step of the iteration": lambda H, s, of: (
            (1 - free(H, torch.ones(len(s)).double()).diagonal()) @ of / (s.square() @ of)),
    }, "subspace: best lambda, ")  # fmt: skip


def _posterior_faults() -> Iterator[Fault]:
    std, whitened, root = formulas.prior_std, formulas.whitened, formulas.posterior_root
    yield from _each(SUBSPACE, "prior_std", {
        "a standard deviation": lambda precision: precision,
        "a variance": lambda precision: precision.sqrt(),
        "the root of a precision": lambda precision: std(precision**2),
    }, "subspace: lambda taken for ")  # fmt: skip
    yield from _each(SUBSPACE, "whitened", {
        "without the data": lambda H, precision: whitened(0 * H, precision),
        "of the diagonal of H": lambda H, precision: whitened(H.diagonal().diag(), precision),
    }, "subspace: posterior ")  # fmt: skip
    yield from _each(SUBSPACE, "posterior_root", {
        "Sigma for its root": lambda H, a: root(H, a) @ root(H, a).T,
        "root of Sigma transposed": lambda H, a: root(H, a).T,
        "Cholesky's root of Sigma": lambda H, a: (
            torch.linalg.cholesky(root(H, a) @ root(H, a).T)),
    }, "subspace: ")  # fmt: skip


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

    yield from _each(SUBSPACE, "logit_covariance", {
        "other directions get no variance": without_rest,
        "smallest directions kept": smallest,
        "all directions kept": lambda H, a, J, k: covariance(H, a, J, len(H)),
        "correlations of logits left out": lambda H, a, J, k: torch.diag_embed(
            covariance(H, a, J, k).diagonal(dim1=1, dim2=2)),
        "J centred": lambda H, a, J, k: covariance(H, a, formulas.centred(J), k),
        "noise of the labels added": lambda H, a, J, k: (
            covariance(H, a, J, k) + torch.eye(J.shape[1])),
    }, "subspace: ")  # fmt: skip


def _draw_of_logits_faults() -> Iterator[Fault]:
    normals, drawn = formulas.normals, formulas.drawn_logits
    yield from _each(SUBSPACE, "symmetric_root", {
        "Cholesky's root of the logits' covariance": torch.linalg.cholesky,
        "the logits' covariance for its root": lambda c: c,
        "the logits' covariances ignored": lambda c: torch.diag_embed(
            c.diagonal(dim1=1, dim2=2).sqrt()),
    }, "subspace: ")  # fmt: skip
    yield from _each(SUBSPACE, "normals", {
        "noise left out": lambda p, ids, width: 0 * normals(p, ids, width),
        "one draw for all examples": lambda p, ids, width: normals(p, [ids[0]] * len(ids), width),
        "draws counted from 1": lambda p, ids, width: (
            normals({**p, "samples": p["samples"] + 1}, ids, width)[1:]),
    }, "subspace: ")  # fmt: skip
    yield Fault("subspace: noise without the mean", SUBSPACE, {
        "drawn_logits": lambda mean, c, eps: drawn(0 * mean, c, eps)})  # fmt: skip


FAULTS = (
    *_noise_faults(), *_op_faults(), *_kl_faults(), *_objective_faults(), *_start_faults(),
    *_schedule_faults(), *_predictive_faults(), *_metric_faults(), *_model_faults(),
    *_step_faults(), *_gradient_faults(), *_draw_faults(), *_scale_faults(), *_curvature_faults(),
    *_evidence_faults(), *_posterior_faults(), *_covariance_faults(), *_draw_of_logits_faults(),
)  # fmt: skip
