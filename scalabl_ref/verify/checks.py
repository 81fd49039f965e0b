"""`scalabl verify`: does this build, on this machine, compute the equations?

Every check compares pairs of results that must agree. It gives each error in units of its bound. A
bound follows from the precision, the length of the sums and the data or, for a statistic, from its
false-failure rate. A check whose worst error is above 1 has failed, and its equation is named. The
checks of the op take the op as an argument, so they can check any function with its signature:

    scalabl verify --against module:function

The checks of the other methods are in `method_checks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fast
from ..core import philox
from ..core.adapter import SubspaceAdapter, adapters
from ..core.config import AdapterConfig
from ..core.layer import SAMPLING, Sampling
from ..core.noise import Noise, philox_words
from ..core.objective import kl_forward, kl_official
from ..core.predictive import predictive
from ..fast import native
from ..model.attach import add_adapters
from ..model.config import LlamaConfig
from ..model.inputs import KVCache
from ..model.llama import Llama
from . import reference
from .check import (
    FALSE_FAILURE,
    Check,
    Errors,
    LeftOut,
    Op,
    exact,
    near,
    normal_limit,
    ratio,
    same,
)
from .known_answers import box_muller_answers, philox_answers
from .method_checks import EPS, NETWORK, fill

T = TypeVar("T")

# --- Cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Arguments of the op, fixed by a seed."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    s: Tensor
    sigma: Tensor
    scaling: float
    noise: Noise | None
    layer: int
    sampling: Sampling
    groups: Tensor | None

    def __str__(self) -> str:
        dtype, noise = str(self.x.dtype).removeprefix("torch."), self.noise
        return (
            f"{dtype} x {tuple(self.x.shape)}, d_out {len(self.weight)}, rank {len(self.s)}, "
            f"sampling {self.sampling}{'' if self.groups is None else ' with groups'}, layer "
            f"{self.layer}, {f'draw {noise.draw}' if noise else 'no noise'}"
        )

    def call(self, op: Op, **changes: Any) -> Tensor:
        return op(**{**vars(self), **changes})

    def eps(self) -> Tensor:
        """eps of every row, (rows, r) float64, from the meaning of the groups, row by row."""
        shape, rank = tuple(self.x.shape[:-1]), len(self.s)
        count = math.prod(shape)
        ids = [reference.group_of_row(r, shape, self.sampling, self.groups) for r in range(count)]
        eps = [reference.eps_of_group(self.noise, self.layer, group, rank) for group in ids]
        return torch.tensor(eps, dtype=torch.float64, device=self.x.device).reshape(count, rank)


def cases(device: torch.device, noisy: bool = True) -> Iterator[Case]:
    """Shapes, samplings, groups, strides and dtypes of all kinds; the same on every machine."""
    shapes = [((4,), 7, 5, 3), ((2, 3), 16, 9, 8), ((3, 1, 2), 33, 20, 5), ((1,), 1, 1, 1),
              ((5, 4), 64, 48, 4), ((2, 2), 13, 70, 9)]  # fmt: skip
    for index, (lead, d_in, d_out, rank) in enumerate(shapes):
        for number, sampling in enumerate(SAMPLING):
            g = torch.Generator().manual_seed(100 * index + number)
            dtype = (torch.float32, torch.float64)[(index + number) % 2]

            def draw(*size: int, g: torch.Generator = g, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(size, generator=g, dtype=torch.float64).to(device, dtype)

            wide = draw(*lead, 2 * d_in)
            explicit = torch.randint(0, 2**32, lead[:1], generator=g)
            yield Case(
                x=wide[..., ::2] if index % 3 == 1 else wide[..., :d_in],
                weight=draw(d_out, d_in),
                bias=draw(d_out) if number else None,
                A=draw(rank, d_in),
                B=draw(d_out, rank),
                s=draw(rank).exp(),
                sigma=draw(rank).exp() / 2,
                scaling=(0.5, 2.0)[number % 2],
                noise=Noise(2**64 - 1 - index, 2**32 - 1 - number) if noisy else None,
                layer=17 * index,
                sampling=sampling,
                groups=explicit.to(device) if index in (1, 3) else None,
            )


def sizes(case: Case, grad_y: Tensor) -> dict[str, Tensor]:
    """Sums of the magnitudes of the terms of y and of every gradient, float64."""
    return op_steps(case, case.eps(), grad_y, magnitudes=True)


def op_steps(
    case: Case, eps: Tensor, grad_y: Tensor | None, magnitudes: bool = False
) -> dict[str, Tensor]:
    """(1a) to (1e) in float64, by their letters: those of a row (rows, r), then the gradients.

    eps: (rows, r). grad_y: None is the forward pass alone. magnitudes: of all numbers, so that
    nothing cancels.
    """

    def wide(t: Tensor) -> Tensor:
        return t.double().abs() if magnitudes else t.double()

    names = ("x", "A", "B", "weight", "s", "sigma")
    x, A, B, W, s, sigma = (wide(getattr(case, name)) for name in names)
    x, eps = x.reshape(-1, x.shape[-1]), wide(eps)
    f, h = case.scaling * (s + sigma * eps), x @ A.T
    y = x @ W.T + h * f @ B.T
    if case.bias is not None:
        y = y + wide(case.bias)
    out = {"h": h, "f": f, "u": h * f, "y": y.reshape(*case.x.shape[:-1], -1)}
    if grad_y is not None:
        g = wide(grad_y).reshape(-1, len(W))
        d = g @ B
        out |= {
            "d": d, "dh": d * f, "ds": case.scaling * h * d,
            "x": (g @ W + d * f @ A).reshape(case.x.shape),
            "weight": g.T @ x, "bias": g.sum(0), "A": (d * f).T @ x, "B": g.T @ (h * f),
            "s": case.scaling * (h * d).sum(0), "sigma": case.scaling * (h * d * eps).sum(0),
        }  # fmt: skip
    return out


def terms(case: Case) -> int:
    """Roundings behind any one number of the op: its longest sums, and eight factors."""
    d_out, d_in = case.weight.shape
    return d_in + d_out + len(case.s) + case.x.shape[:-1].numel() + 8


def direction(case: Case) -> Tensor:
    shape = (*case.x.shape[:-1], case.weight.shape[0])
    g = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=g).to(case.x)


def compare(
    op: Op,
    device: torch.device,
    pair: Callable[[Op, Case], tuple[Tensor, Tensor]],
    noisy: bool = True,
) -> Errors:
    """The difference of the two results of `pair` in every case, both of y's shape and size."""
    for case in cases(device, noisy):
        a, b = pair(op, case)
        # Both sides round; sums of up to four results of the op are three times as large.
        eps = 8 * terms(case) * torch.finfo(case.x.dtype).eps
        yield ratio(a, b, sizes(case, direction(case))["y"], eps, case)


# --- Checks of the op -------------------------------------------------------------------------


def forward(op: Op, device: torch.device) -> Errors:
    for noisy in (True, False):
        for case in cases(device, noisy):
            expected = case.call(reference.subspace_lora_linear).to(device)
            eps = 2 * terms(case) * torch.finfo(case.x.dtype).eps
            size = sizes(case, direction(case))["y"]
            yield ratio(case.call(op), expected, size, eps, case)


def gradient(name: str) -> Callable[[Op, torch.device], Errors]:
    """The op's own gradient of one argument against the derivation by hand.

    An op whose weight and bias are frozen gives no gradient of them: the check is left out.
    """

    def run(op: Op, device: torch.device) -> Errors:
        given = 0
        for case in cases(device):
            value = getattr(case, name)
            if value is None:
                continue
            leaf, grad_y = value.detach().clone().requires_grad_(), direction(case)
            y = case.call(op, **{name: leaf})
            got = None
            if y.requires_grad:
                (got,) = torch.autograd.grad(y, leaf, grad_y, allow_unused=True)
            if got is None and not given and name in ("weight", "bias"):
                raise LeftOut(f"{name} is frozen: the op gives no gradient of it")
            if got is None:
                raise ValueError(f"no gradient of {name} in {case}")
            given += 1
            expected = reference.subspace_lora_linear_gradients(grad_y, **vars(case))[name]
            eps = 2 * terms(case) * torch.finfo(case.x.dtype).eps
            yield ratio(got, expected.to(device), sizes(case, grad_y)[name], eps, case)

    return run


def mean_is_lora(op: Op, case: Case) -> tuple[Tensor, Tensor]:
    merged = case.s[:, None] * case.A
    lora = F.linear(F.linear(case.x, merged), case.scaling * case.B)
    return case.call(op), F.linear(case.x, case.weight, case.bias) + lora


def sigma_zero_is_the_mean(op: Op, case: Case) -> tuple[Tensor, Tensor]:
    still = case.call(op, sigma=torch.zeros_like(case.sigma))
    return still, case.call(op, noise=None)


def linear_in_x(op: Op, case: Case) -> tuple[Tensor, Tensor]:
    half, rest = case.x * 0.25, case.x * 0.75
    both = case.call(op, x=half, bias=None) + case.call(op, x=rest, bias=None)
    return case.call(op, bias=None), both


def linear_in_B(op: Op, case: Case) -> tuple[Tensor, Tensor]:
    base = case.call(op, B=torch.zeros_like(case.B))
    parts = case.call(op, B=0.25 * case.B) + case.call(op, B=0.75 * case.B)
    return case.call(op) + base, parts


def affine_in_s(op: Op, case: Case) -> tuple[Tensor, Tensor]:
    none = case.call(op, s=torch.zeros_like(case.s))
    return case.call(op) + none, case.call(op, s=0.25 * case.s) + case.call(op, s=0.75 * case.s)


def ranks_add_up(op: Op, case: Case) -> tuple[Tensor, Tensor]:
    """Leading ranks keep their noise, with or without others behind them."""
    k = (len(case.s) + 1) // 2
    first = case.call(op, A=case.A[:k], B=case.B[:, :k], s=case.s[:k], sigma=case.sigma[:k])
    later = torch.zeros_like(case.B)
    later[:, k:] = case.B[:, k:]
    base = case.call(op, B=torch.zeros_like(case.B))
    return case.call(op) + base, first + case.call(op, B=later)


def rows_are_independent(op: Op, case: Case) -> tuple[Tensor, Tensor]:
    """Split into single examples, in the opposite order, each under its own id."""
    count = case.x.shape[0]
    ids = torch.arange(count, device=case.x.device) if case.groups is None else case.groups
    own = replace(case, sampling="example", groups=ids)
    parts = [
        own.call(op, x=case.x[i : i + 1], groups=ids[i : i + 1]) for i in reversed(range(count))
    ]
    return own.call(op), torch.cat(parts[::-1])


def one_row_a_group(op: Op, case: Case) -> tuple[Tensor, Tensor]:
    flat = case.x.reshape(-1, case.x.shape[-1])
    by_token = case.call(op, x=flat, sampling="token", groups=None)
    by_example = case.call(op, x=flat, sampling="example", groups=None)
    batches = case.call(op, x=flat[:1], sampling="batch", groups=None)
    shape = (*case.x.shape[:-1], -1)
    return by_token.reshape(shape), torch.cat((batches, by_example[1:])).reshape(shape)


def adjoint(op: Op, device: torch.device) -> Errors:
    """<u, J v> = <J' u, v>: the op is linear in x, so J v is the op itself."""
    for case in cases(device):
        u, leaf = direction(case), case.x.detach().clone().requires_grad_()
        (pulled,) = torch.autograd.grad(case.call(op, x=leaf), leaf, u)
        pushed = case.call(op, bias=None)
        left, right = (u * pushed).double().sum(), (pulled * case.x).double().sum()
        size = (u.double().abs() * sizes(case, u)["y"]).sum()
        eps = 4 * terms(case) * torch.finfo(case.x.dtype).eps
        yield ratio(left, right, size, eps, case)


def a_draw_is_a_function(op: Op, device: torch.device) -> Errors:
    """The same coordinates give the same bits; any other seed, draw or layer gives others."""
    for case in cases(device):
        out = case.call(op)
        yield exact(torch.equal(out, case.call(op)), f"{case}: two calls differ")
        assert case.noise is not None
        seed, draw = case.noise.seed, case.noise.draw
        for name, change in (("seed", {"noise": Noise(seed - 1, draw)}),
                             ("draw", {"noise": Noise(seed, draw - 1)}),
                             ("layer", {"layer": case.layer + 1})):  # fmt: skip
            differs = not torch.equal(out, case.call(op, **change))
            yield exact(differs, f"{case}: another {name} gives the same bits")


def pair(
    function: Callable[[Op, Case], tuple[Tensor, Tensor]], noisy: bool = True
) -> Callable[[Op, torch.device], Errors]:
    return lambda op, device: compare(op, device, function, noisy)


def unbiased_gradient(op: Op, device: torch.device) -> Errors:
    """The mean of one-draw gradients against their exact expectation, by quadrature in eps.

    n = 100,000. A bias of 9.3 / sqrt(n) = .03 standard deviations of a single gradient is seen with
    probability .999.
    """
    scores = gradient_scores(op, device, Noise(1, 2), 100_000)
    yield from in_standard_errors(("gradient of s", "gradient of sigma"), scores)


def in_standard_errors(names: tuple[str, ...], scores: Tensor) -> Errors:
    """The errors of deviations given in standard errors, one for each name."""
    limit = normal_limit(FALSE_FAILURE / len(names))
    for name, score in zip(names, scores.tolist(), strict=True):
        yield near(score, 0.0, limit, f"{name}, in standard errors")


def gradient_scores(op: Op, device: torch.device, noise: Noise, n: int) -> Tensor:
    """Mean of n gradients of s and of sigma, minus the exact one, in standard errors: (2,) float64.

    A logistic regression through a layer of rank 1, a draw in each of n rows.
    """
    g = torch.Generator().manual_seed(0)
    x, W, A, B = (
        torch.randn(i, j, generator=g).double() for i, j in ((1, 4), (3, 4), (1, 4), (3, 1))
    )
    s, sigma = torch.tensor([0.8]).double(), torch.tensor([0.6]).double()

    def gradients(factor: Tensor) -> Tensor:
        """d NLL / d (s, sigma) for every value of s + sigma eps, by hand; factor (n,)."""
        eps, h = (factor - s) / sigma, (x @ A.T)[0, 0]
        logits = x @ W.T + 2.0 * (factor * h)[:, None] * B[:, 0]
        d = (torch.softmax(logits, 1) - F.one_hot(torch.tensor(1), 3)) @ B[:, 0]
        return torch.stack((2.0 * h * d, 2.0 * h * d * eps), 1)

    nodes, weights = reference.gauss_hermite(64)
    table = gradients(s + sigma * nodes)
    exact = weights @ table
    deviation = (weights @ table.square() - exact.square()).sqrt() / math.sqrt(n)
    leaves = [t.to(device).requires_grad_() for t in (s, sigma)]
    move = [t.to(device) for t in (x.expand(n, 4), W, A, B)]
    logits = op(move[0], move[1], None, move[2], move[3], *leaves, 2.0, noise, 3, "token", None)
    loss = F.cross_entropy(logits, torch.ones(n, dtype=torch.int64, device=device))
    got = torch.cat([t.cpu() for t in torch.autograd.grad(loss, leaves)])
    return (got - exact) / deviation


OP_CHECKS = [
    Check("forward", "(1a) y = W x + b + c B diag(s + sigma eps) A x", forward),
    Check("gradient of x", "(1c) W' g + A' dh", gradient("x")),
    Check("gradient of weight", "(1d) sum g x'", gradient("weight")),
    Check("gradient of bias", "(1d) sum g", gradient("bias")),
    Check("gradient of A", "(1d) sum dh x'", gradient("A")),
    Check("gradient of B", "(1d) sum g u'", gradient("B")),
    Check("gradient of s", "(1e) sum c h d", gradient("s")),
    Check("gradient of sigma", "(1e) sum c h d eps", gradient("sigma")),
    Check("mean model", "(1) noise=None is LoRA with diag(s) A", pair(mean_is_lora, noisy=False)),
    Check("no width", "(1) sigma = 0 is the mean model", pair(sigma_zero_is_the_mean)),
    Check("linear in x", "(1) y(x1 + x2) = y(x1) + y(x2)", pair(linear_in_x)),
    Check("linear in B", "(1) y(B1 + B2) + y(0) = y(B1) + y(B2)", pair(linear_in_B)),
    Check("affine in s", "(1) y(s1 + s2) + y(0) = y(s1) + y(s2), eps fixed", pair(affine_in_s)),
    Check(
        "ranks add up", "(1) one term for each k; eps_k does not depend on r", pair(ranks_add_up)
    ),
    Check(
        "rows are independent", "sampling: a draw follows its group id", pair(rows_are_independent)
    ),
    Check("one row a group", "sampling: batch = example = token then", pair(one_row_a_group)),
    Check("adjoint", "(1c) <u, J v> = <J' u, v>", adjoint),
    Check(
        "a draw is a function",
        "noise: a function of (seed, draw, layer, group)",
        a_draw_is_a_function,
    ),
    Check("unbiased", "(4) E[gradient of one draw] = gradient of E", unbiased_gradient),
]


# --- Checks of the rest -----------------------------------------------------------------------


def known_answers(_: Op, device: torch.device) -> Errors:
    """The file's answers, in Python and in the native core."""
    for name, body in (("plain Python", philox), ("native core", native.core())):
        if body is None:
            continue
        for p in philox_answers():
            words = torch.tensor(body.philox4x32(p.counter, p.key, p.rounds))
            yield same(words, torch.tensor(p.words), f"{name}: {p}")
        for b in box_muller_answers():
            z = torch.tensor(body.box_muller(*b.words), dtype=torch.float64)
            yield same(z, torch.tensor(b.normals, dtype=torch.float64), f"{name}: {b}")


def normals_bit_for_bit(_: Op, device: torch.device) -> Errors:
    """Noise.normal, whichever path runs, against plain Python; also with a draw for each id."""
    ids, more = torch.tensor([0, 1, 2**32 - 1, 77]), torch.tensor([3, 0, 2**31, 3])
    for seed, draw, layer, draws in (
        (0, 0, 0, None),
        (2**64 - 1, 2**32 - 1, 2**32 - 2, None),
        (12345, 678, 90, None),
        (12345, 678, 90, more),
    ):
        got = Noise(seed, draw).normal(layer, ids, 9, draws)
        each = (more if draws is not None else 0 * ids).tolist()
        for row, g, d in zip(got, ids.tolist(), each, strict=True):
            slow = torch.tensor(philox.normal_row(seed, draw + d, layer, g, 9), dtype=torch.float64)
            at = f"seed {seed}, draw {draw + d}, layer {layer}, group {g}"
            yield same(row, slow.float(), f"{Noise.normals.__module__}: {at}")


def moments(_: Op, device: torch.device) -> Errors:
    """`moment_scores` of 2^20 normals. A deviation of 9.6 / 2^10 of its unit is seen with
    probability .999: .01 in the mean, .013 in the variance, .09 in the fourth moment."""
    names = ("mean", "variance", "third moment", "fourth moment",
             "correlation of components", "correlation of groups")  # fmt: skip
    yield from in_standard_errors(names, moment_scores(Noise(2024, 7), 2**20))


def moment_scores(noise: Noise, n: int) -> Tensor:
    """Mean, variance, third and fourth moment of n normals, and neighbours' correlations along the
    components and the groups, minus their expectations, in standard errors: (6,) float64."""
    z = noise.normal(3, n // 8, 8).double()
    flat = z.flatten()
    deviates = (flat.mean(), (flat**2 - 1).mean() / 2**0.5, (flat**3).mean() / 15**0.5,
                (flat**4 - 3).mean() / 96**0.5, (flat[1:] * flat[:-1]).mean(),
                (z[1:] * z[:-1]).mean())  # fmt: skip
    return torch.stack(deviates) * n**0.5


def kl_values(_: Op, device: torch.device) -> Errors:
    """Check values; loops; zero at the prior; the mean of log q - log p by quadrature."""
    s, sigma = torch.tensor([0.3, -0.4]).double().exp(), torch.tensor([0.05, 0.2]).double()
    yield near(float(kl_forward(s, sigma, 1.0)), 4.762118, 1e-4, "forward: check value")
    yield near(float(kl_official(s, sigma, 1.0)), 576.935180, 1e-2, "official: check value")
    nodes, weights = reference.gauss_hermite(40)
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    pairs = [(s, sigma), (zero, one), (3 * one, 2 * one)]
    for mean, sd in pairs:
        at = f"s {mean.tolist()}, sigma {sd.tolist()}"
        for name, function, slow in (("forward", kl_forward, reference.kl_forward),
                                     ("official", kl_official, reference.kl_official)):  # fmt: skip
            value, expected = float(function(mean, sd, 1.0)), slow(mean, sd, 1.0)
            yield near(value, expected, 1e-14 * (10 + abs(expected)), f"{name}: {at}")
        w = mean + sd * nodes[:, None]  # from q
        log_ratio = -sd.log() - nodes[:, None] ** 2 / 2 + w**2 / 2
        mean_ratio = float((weights @ log_ratio).sum())
        value, bound = float(kl_forward(mean, sd, 1.0)), 1e-12 * (10 + abs(mean_ratio))
        yield near(value, mean_ratio, bound, f"forward, by quadrature: {at}")


def mixture(_: Op, device: torch.device) -> Errors:
    """Probabilities averaged, not logits: against loops."""
    logits = 5 * torch.randn(7, 11, 4, generator=torch.Generator().manual_seed(1)).double()
    expected = reference.predictive(logits)
    for name, value in predictive(torch.log_softmax(logits, -1))._asdict().items():
        right = torch.tensor(expected[name], dtype=torch.float64)
        yield ratio(value, right, torch.ones(()), 1e-14, name)


# --- Checks of the fast bodies against the plain ones ------------------------------------------


def in_both(function: Callable[..., T], *arguments: Any) -> tuple[T, T]:
    """The result with the fast bodies in place, and with the plain ones."""
    with fast.in_place(fast.FAST):
        quick = function(*arguments)
    with fast.plain():
        return quick, function(*arguments)


def same_op(op: Op, device: torch.device) -> Errors:
    """y and all gradients of both bodies."""
    for case in (*cases(device), *cases(device, noisy=False)):
        quick, plain = in_both(op_and_gradients, case)
        eps, size = 4 * terms(case) * torch.finfo(case.x.dtype).eps, sizes(case, direction(case))
        for name, expected in plain.items():
            yield ratio(quick[name], expected, size[name], eps, f"{name} of {case}")


def plain_loops(core: Any) -> SimpleNamespace:
    """The native core with its plain loops, which it keeps as code to read, as its op."""

    def update(**fields: Any) -> SimpleNamespace:
        op = core.update(**fields)
        return SimpleNamespace(forward=op.plain_forward, backward=op.plain_backward)

    return SimpleNamespace(cuda="", normals=core.normals, few_rows=core.few_rows, update=update)


def same_loops(op: Op, device: torch.device) -> Errors:
    """y and all gradients of the core's plain loops."""
    core = native.core()
    if core is None or device.type != "cpu":
        raise LeftOut("it needs the native core, on a CPU")
    loops = plain_loops(core)
    with mock.patch.object(native, "core", lambda: loops):
        yield from same_op(op, device)


def op_and_gradients(case: Case) -> dict[str, Tensor]:
    """y of the op in place, and the gradient of each tensor of the case by its name."""
    names = ("x", "weight", "bias", "A", "B", "s", "sigma")
    values = {name: getattr(case, name) for name in names if getattr(case, name) is not None}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    y = case.call(SubspaceAdapter.op, **leaves)
    gradients = torch.autograd.grad(
        y, list(leaves.values()), direction(case), materialize_grads=True
    )
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def same_noise(_: Op, device: torch.device) -> Errors:
    """Normals of several draws and words of a stream, bit for bit."""
    ids, draws = torch.tensor([5, 2**32 - 1, 5, 0, 77]), torch.tensor([0, 1, 2, 0, 1])
    for seed, draw, layer in ((0, 0, 0), (2**64 - 1, 2**32 - 3, 2**32 - 2), (12345, 678, 90)):
        for rank in (1, 4, 9):
            quick, plain = in_both(Noise(seed, draw).normal, layer, ids, rank, draws)
            at = f"fast body: seed {seed}, draw {draw} + {draws.tolist()}, layer {layer}, groups"
            yield same(quick, plain, f"{at} {ids.tolist()}, rank {rank}")
        quick, plain = in_both(philox_words, seed, 2**62 + draw, 13)
        yield same(quick, plain, f"fast body: words of seed {seed}, stream 2^62 + {draw}")


def same_model(_: Op, device: torch.device) -> Errors:
    """Logits of every kind of call and gradients of the adapters, in float64."""
    for sampling in SAMPLING:
        for call in model_calls(device):
            quick, plain = in_both(logits_and_gradients, device, sampling, call)
            for number, (got, expected) in enumerate(zip(quick, plain, strict=True)):
                what = f"gradient {number}" if number else "logits"
                at = f"{what}, sampling {sampling}, called with {', '.join(call) or 'tokens'}"
                # A second block doubles what it inherits, and so does the backward pass.
                yield ratio(got, expected, expected.abs().max(), 4 * NETWORK * EPS, at)


def model_calls(device: torch.device) -> list[dict[str, Any]]:
    """Arguments of `Llama.forward` beside tokens (3, 5) and noise."""
    lengths = torch.tensor([5, 2, 3], device=device)
    left = torch.arange(5, device=device) >= 5 - lengths[:, None]
    return [
        {},
        {"last_only": True},
        {"lengths": lengths, "last_only": True},
        {"lengths": lengths, "last_only": True, "draws": 2},
        {"mask": left, "last_only": True},
        {"draws": 2, "cache": None},  # filled with the first tokens
        {"noise": None},
    ]


def logits_and_gradients(
    device: torch.device, sampling: Sampling, call: dict[str, Any]
) -> list[Tensor]:
    """Logits of a Llama of two blocks, and the gradients of its adapters' parameters."""
    shape = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                        max_position_embeddings=8)  # fmt: skip
    model = Llama(shape).init_random_(std=0.4)
    targets = ("v_proj", "down_proj", "lm_head")
    add_adapters(model, AdapterConfig(rank=2, sampling=sampling, targets=targets)).double()
    fill(adapters(model).values(), 1)
    model.to(device)
    tokens = torch.arange(15, device=device).view(3, 5) % 11
    call = {"noise": Noise(1, 2), "groups": torch.tensor([7, 0, 3], device=device), **call}
    if "cache" in call:
        call["cache"] = KVCache(2)
        with torch.no_grad():
            model(tokens[:, :2], **call)
        tokens = tokens[:, 2:]
    logits = model(tokens, **call)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, logits.numel(), device=device).view(logits.shape).to(logits)
    gradients = torch.autograd.grad(logits, parameters, weights, materialize_grads=True)
    return [logits.detach(), *gradients]


OWN_CHECKS = [
    Check("Philox", "noise, steps 1 to 5: known answers of Random123 and ours", known_answers),
    Check("normals", "noise, steps 2 to 5: the bits of plain Python", normals_bit_for_bit),
    Check("moments", "noise: standard normal, uncorrelated", moments),
    Check("KL", "(5), (6) KL(q || p) and KL(p || q)", kl_values),
    Check("mixture", "(8), (9) probabilities averaged; entropies", mixture),
    Check("fast op", "(1a) to (1e): the fast body equals the plain one", same_op),
    Check("core's loops", "(1a) to (1e): plain loops in C++ equal the plain op", same_loops),
    Check("fast noise", "noise: the fast bodies have the bits of the plain ones", same_noise),
    Check("fast model", "the model: the fast bodies equal the plain ones", same_model),
]
