"""Checks of adapters and their layer by hand: start, settings, draws as weights, limits, objective.

The other checks set every parameter. These look at what is there before anything is set, at the
arguments that the other checks leave out, and at what must be refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from statistics import NormalDist
from typing import Any, cast

import torch
from torch import Tensor

from ..core.adapter import Adapter, SubspaceAdapter, adapters, initial_matrix
from ..core.config import ADAPTERS, COVARIANCES, AdapterConfig
from ..core.layer import subspace_lora_linear as plain_op
from ..core.noise import Keys, Noise, philox_words, token_groups
from ..core.objective import KLS, complexity, elbo
from ..core.predictive import predictive
from ..fast.designs import Design, DesignedNoise
from ..methods.full import FullAdapter
from ..methods.tfb import TfbAdapter
from ..model.attach import Linear
from ..model.llama import Llama
from . import reference
from .check import Check, Errors, Op, exact, near, ratio, refused
from .method_checks import (
    EPS,
    EPS_32,
    NETWORK,
    distance,
    draws,
    layers,
    normals,
    parts,
    prompts,
    slopes,
    small_model,
)  # fmt: skip

SUMS = NETWORK * EPS  # of numbers behind which there is a small model
KINDS: list[dict[str, Any]] = [
    {"method": "scalabl"}, {"covariance": "full"}, {"method": "point"}, {"method": "blob"},
    {"method": "mle"}, {"method": "map"}, {"method": "dropout"},
]  # fmt: skip

# --- Settings and start ---------------------------------------------------------------------------


def settings(_: Op, device: torch.device) -> Errors:
    """Defaults by number, c = alpha / r, and values that must be refused."""
    default = AdapterConfig()
    known = ("scalabl", 8, ("q_proj", "v_proj", "lm_head"), "example", "diagonal", "fixed",
             1.0, 0.05, 0.1)  # fmt: skip
    names = ("method", "rank", "targets", "sampling", "covariance", "prior", "prior_std",
             "init_sigma", "dropout")  # fmt: skip
    for name, value in zip(names, known, strict=True):
        yield exact(getattr(default, name) == value, f"the default of {name}")
    for rank, alpha, own, c in ((8, None, 16, 2.0), (5, None, 10, 2.0), (4, 6.0, 6.0, 1.5)):
        config = AdapterConfig(rank=rank, alpha=alpha)
        right = config.lora_alpha == own and config.scaling == c
        yield exact(right, f"scaling {config.scaling} of rank {rank} and alpha {alpha}")
    for method, width in (("blob", 0.2), ("map", 1.0), ("point", 1.0), ("mle", 1.0)):
        yield exact(AdapterConfig(method).sigma_p == width, f"the default prior of {method}")
        given = AdapterConfig(method, prior_std=0.7).sigma_p
        yield exact(given == 0.7, f"the given prior of {method}")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"targets": "q_proj"}, "a list"), ({"targets": ()}, "empty"), ({"targets": ("q",)}, "q"),
        ({"method": "other"}, "method"), ({"sampling": "row"}, "sampling"),
        ({"method": "mle", "covariance": "full"}, "covariance"), ({"prior": "other"}, "prior"),
        ({"method": "blob", "prior": "layer"}, "prior"), ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"), ({"dropout": -0.1}, "dropout"),
        *(({name: value}, name) for name in ("alpha", "prior_std", "init_sigma")
          for value in (0.0, -1.0, math.inf, math.nan)),
    ]  # fmt: skip
    for fields, words in wrong:
        yield refused(partial(AdapterConfig, **fields), words)
    yield exact(AdapterConfig(method="dropout", dropout=0.0).dropout == 0, "dropout of nothing")


def started(_: Op, device: torch.device) -> Errors:
    """Initial values from the words of plain Python, of every method.

    Singular vectors have no sign, so A and s are compared by A' diag(s^2) A = M' M.
    """
    for kind in KINDS:
        for seed, layer, rank, d_in, width in ((0, 0, 3, 5, 0.05), (2**63 + 9, 71, 2, 9, 0.4)):
            case = f"{kind}, seed {seed}"
            config = AdapterConfig(rank=rank, init_sigma=width, **kind)
            make = COVARIANCES[config.covariance][config.method]
            adapter = make(d_in, 4, config, layer, seed, device)
            uniform = reference.uniforms(seed, layer, 2 * rank * d_in)
            M = torch.tensor(reference.kaiming(uniform, rank, d_in), dtype=torch.float64)
            p = parts(adapter)
            both = initial_matrix(seed, layer, rank, d_in)
            flat = torch.cat([part.flatten() for part in both])
            left = torch.tensor(uniform[rank * d_in :][:rank], dtype=torch.float64)
            right = torch.cat((M.flatten(), left))
            yield ratio(flat, right, right.abs(), 4 * EPS, f"{case}: words")
            yield exact(not p["B"].any() and p["B"].shape == (4, rank), f"{case}: B")
            widths = reference.initial_log_sigma(uniform[rank * d_in :], width)
            if config.method in ("scalabl", "point"):
                A, s = p["A"], p["log_s"].exp()
                yield ratio(A @ A.T, torch.eye(rank).double(), torch.ones(()), 8 * EPS_32, case)
                moments = A.T @ (s.square()[:, None] * A)
                yield ratio(moments, M.T @ M, M.square().sum(), 8 * EPS_32, f"{case}: A and s")
                yield exact(s.tolist() == sorted(s.tolist(), reverse=True), f"{case}: order of s")
            else:
                yield ratio(p["A"], M, M.abs(), EPS_32, f"{case}: A")
            if "log_sigma" in p or "G" in p:
                log_sigma = p["log_sigma"] if "log_sigma" in p else p["G"].flatten().log()
                right = torch.tensor(widths[: len(log_sigma)], dtype=torch.float64)
                yield ratio(log_sigma, right, 1 + right.abs(), 2 * EPS_32, f"{case}: widths")
            yield exact("lower" not in p or not p["lower"].any(), f"{case}: lower")


# --- Draws as weights, widths, limits -------------------------------------------------------------


def widened(linear: Linear) -> TfbAdapter:
    """The layer's adapter with widths of its rows, as TFB makes it."""
    old = cast(Adapter, linear.adapter)
    config = AdapterConfig("tfb", rank=3, alpha=4.5, sampling="batch")
    new = TfbAdapter(6, 5, config, old.layer, 0, old.A.device).double()
    new.A.data, new.B.data = old.A.data, old.B.data
    new.sigma.data = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, device=old.A.device)
    return new


def draws_as_weights(_: Op, device: torch.device) -> Errors:
    """W + c B A' of a draw, and of the mean, are the layer with one draw for its batch."""
    x = draws(1, 4, 6).to(device)
    for kind in (*KINDS, {"method": "dropout", "dropout": 0.6}, {"method": "tfb"}):
        made = {"method": "mle"} if kind == {"method": "tfb"} else kind
        linear = cast(Linear, layers(device, sampling="batch", **made)["q_proj"])
        if kind == {"method": "tfb"}:
            linear.adapter = widened(linear)
        adapter, noise = cast(Adapter, linear.adapter), Noise(11, 3)
        W, bias = linear.weight.detach(), cast(Tensor, linear.bias).detach()
        for keys in (None, Keys(noise)):
            A = adapter.lora_A(noise if keys and adapter.random else None).detach()
            y = linear(x, keys).detach()
            cB = adapter.config.scaling * adapter.B.detach()
            right = x @ (W + cB @ A).T + bias
            size = x.abs() @ (W.abs() + cB.abs() @ A.abs()).T + bias.abs()
            yield ratio(y, right, size, 2 * (6 + 3 + 8) * EPS, f"{kind}, {keys}")
    p, z = AdapterConfig("dropout").dropout, draws(2, 400)
    thin = ADAPTERS["dropout"](400, 5, AdapterConfig("dropout"), 0, 0, device)
    kept = cast(Any, thin).kept(z).tolist()
    by_hand = [NormalDist().cdf(value) >= p for value in z.tolist()]
    yield exact(kept == by_hand, "which inputs are kept by default")


def widths_and_limits(_: Op, device: torch.device) -> Errors:
    """Widths by hand; log sigma and log Omega end at -20; settings of no width."""
    for kind in KINDS:
        linear = cast(Linear, layers(device, **kind)["q_proj"])
        adapter = cast(Adapter, linear.adapter)
        p, got = parts(adapter), adapter.widths().detach().cpu()
        right = torch.empty(0, dtype=torch.float64)
        if isinstance(adapter, FullAdapter):
            a, b, c = p["log_sigma"].exp().tolist()
            d, e, f = p["lower"].tolist()  # rows of L: (a), (d, b), (e, f, c)
            squares = a**2, d**2 + b**2, e**2 + f**2 + c**2
            right = torch.tensor(squares, dtype=torch.float64).sqrt()
        elif isinstance(adapter, SubspaceAdapter):
            right = p["log_sigma"].exp()
        elif "G" in p:
            right = p["G"].square().flatten()
        yield ratio(got, right, right, 8 * EPS, f"{kind}: widths")
        with torch.no_grad():
            if "log_sigma" in p:
                adapter.get_parameter("log_sigma").copy_(torch.tensor([-30.0, -20.5, -3.0]))
            if "G" in p:
                adapter.get_parameter("G").flatten()[:3] = torch.tensor([-1e-9, 1e-9, -0.5])
        adapter.bound_()
        if "log_sigma" in p:
            low = parts(adapter)["log_sigma"].tolist()
            yield exact(low == [-20.0, -20.0, -3.0], f"{kind}: bound of {low}")
        if "G" in p:
            low, least = parts(adapter)["G"].flatten()[:3].tolist(), math.exp(-10)
            right = torch.tensor([-least, least, -0.5], dtype=torch.float64)
            yield ratio(torch.tensor(low).double(), right, right.abs(), 4 * EPS_32, "bound of G")
    wide = widened(cast(Linear, layers(device, method="mle")["q_proj"]))
    yield exact(wide.widths().tolist() == [0.5, 0.0, 2.0], "widths of TFB")
    yield refused(lambda: TfbAdapter.complexity([wide], "forward"), "not trained")


# --- The objective --------------------------------------------------------------------------------


def objective(_: Op, device: torch.device) -> Errors:
    """(4) in loops with both KLs, other beta and N; adapters of several kinds; what has no KL."""
    batch = prompts(device, 5, 4)
    for kl, prior_std, beta, count in (("forward", 1.0, 1.0, 50), ("official", 0.6, 0.3, 7)):
        model, noise = small_model(device, method="scalabl", prior_std=prior_std), Noise(3, 4)
        with torch.no_grad():
            found = elbo(model, batch, noise, beta, count, cast(Any, kl))
            logits = by_row(model, batch, noise)
        scales = [cast(SubspaceAdapter, a).scale() for a in adapters(model).values()]
        gaussians = [(s.detach().cpu(), sigma.detach().cpu()) for s, sigma in scales]
        labels = batch.labels.cpu()
        right = reference.elbo(logits, labels, gaussians, prior_std, beta, count, kl)
        for name, got, value in zip(found._fields, found, right, strict=True):
            yield near(float(got), value, SUMS * (1 + sum(map(abs, right))), f"{kl}: {name}")
    s, sigma = draws(1, 9).exp().float(), draws(2, 9).exp().float()
    for kl, slow in (("forward", reference.kl_forward), ("official", reference.kl_official)):
        by_loops = slow(s, sigma, 0.7)
        yield near(
            float(KLS[kl](s, sigma, 0.7)),
            by_loops,
            SUMS * by_loops,
            f"{kl} KL of numbers in float32",
        )
    values = []
    for kind in KINDS:
        pair = layers(device, **kind)
        alone = float(complexity(pair).detach())
        values.append((pair, alone))
        if kind.get("method") in ("mle", "dropout"):
            yield exact(alone == 0, f"{kind}: a KL of {alone}")
        if kind.get("method") == "blob" or "covariance" in kind:
            yield refused(partial(complexity, pair, "official"), "forward")
    for prior_std in (1.0, 0.4):
        pair = layers(device, method="point", prior_std=prior_std)
        own = [v for a in adapters(pair).values() for v in parts(a)["log_s"].tolist()]
        total = sum(math.exp(2 * v) for v in own) / (2 * prior_std**2)
        yield near(
            float(complexity(pair).detach()), total, SUMS * total, "the scales' density of a point"
        )
    fitted = layers(device, method="scalabl", prior="layer")
    yield refused(lambda: complexity(fitted, "official"), "fitted by the forward KL")
    yield refused(lambda: complexity(fitted, cast(Any, "other")), "kl must be one of")
    several = torch.nn.ModuleList(linear for linear, _value in values)
    total = sum(value for _linear, value in values)
    yield near(
        float(complexity(several).detach()), total, SUMS * abs(total), "adapters of all kinds"
    )


def by_row(model: Llama, batch: Any, noise: Noise | None) -> Tensor:
    """Class logits (B, C), each row alone without padding, from the model's call."""
    found = []
    for i, n in enumerate(batch.lengths.tolist()):
        tokens, group = batch.tokens[i : i + 1, :n], batch.ids[i : i + 1]
        found.append(model(tokens, noise=noise, groups=group)[:, -1])
    return torch.cat(found).cpu()


def certain_answers(_: Op, device: torch.device) -> Errors:
    """(8), (9) where probabilities are 0: 0 log 0 = 0, and two sure draws that differ."""
    zero = torch.tensor([[[0.0, -math.inf, -math.inf]], [[-math.inf, 0.0, -math.inf]]])
    found = predictive(zero.double())
    yield exact(found.expected_entropy.tolist() == [0.0], "entropy of sure draws")
    yield near(float(found.entropy), math.log(2), SUMS, "entropy")
    yield near(float(found.mutual_information), math.log(2), SUMS, "mutual information")
    yield near(float(found.probs[0, 0]), 0.5, SUMS, "a half")
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    yield near(float(predictive(zero.double(), weights).probs[0, 1]), 0.75, SUMS, "weighted")


# --- The op ---------------------------------------------------------------------------------------

# Sampling, and the shapes of groups and draws, which lead those of the rows, (2, 3).
NUMBERED: list[tuple[Any, tuple[int, ...] | None, tuple[int, ...] | None]] = [
    ("example", None, (2,)), ("example", (2,), (2, 3)), ("token", (2, 3), (2,)),
    ("token", None, (2, 3)), ("batch", None, (2,)), ("batch", (2,), (2, 3)),
    ("example", (2, 3), None),
]  # fmt: skip


def operands(device: torch.device, rank: int = 3) -> dict[str, Any]:
    shapes = {"x": (2, 3, 6), "weight": (5, 6), "bias": (5,), "A": (rank, 6), "B": (5, rank),
              "s": (rank,), "sigma": (rank,)}  # fmt: skip
    made = {n: draws(20 + i, *shape).to(device) for i, (n, shape) in enumerate(shapes.items())}
    return {**made, "scaling": 0.7}


def numbered(device: torch.device) -> Iterator[dict[str, Any]]:
    ids, later = torch.tensor([9, 0, 2**32 - 1, 7, 7, 1]), torch.tensor([0, 3, 1, 2**31, 5, 3])
    for sampling, groups, more in NUMBERED:
        both = (("groups", ids, groups), ("draws", later, more))
        numbers = {name: shape and values[: math.prod(shape)].view(shape).to(device)
                   for name, values, shape in both}  # fmt: skip
        yield {"noise": Noise(2**64 - 5, 17), "layer": 40, "sampling": sampling, **numbers}


def numbered_draws(_: Op, device: torch.device) -> Errors:
    """y and gradients with a draw's number for each row, in loops; second slopes by differences."""
    t, u = operands(device), draws(30, 2, 3, 5).to(device)
    names = [name for name in t if name != "scaling"]
    for call in numbered(device):
        right = reference.subspace_lora_linear(**t, **call)
        slow = reference.subspace_lora_linear_gradients(u, **t, **call)
        leaves = [t[name].clone().requires_grad_() for name in names]
        y = SubspaceAdapter.op(*leaves, 0.7, *call.values())
        yield distance(y, right, NETWORK * EPS)
        for name, got in zip(names, torch.autograd.grad(y, leaves, u), strict=True):
            yield ratio(got.cpu(), slow[name], slow[name].abs().max(), NETWORK * EPS, name)

    def first(call: dict[str, Any], leaves: list[Tensor]) -> Tensor:
        with torch.enable_grad():
            y = SubspaceAdapter.op(*leaves, 0.7, *call.values())
            found = torch.autograd.grad((u * y).sum(), leaves, create_graph=True)
            each = [(draws(60 + i, *g.shape).to(g) * g).sum() for i, g in enumerate(found)]
            return torch.stack(each).sum()

    for call in list(numbered(device))[::3]:
        leaves = [t[name].clone().requires_grad_() for name in names]
        yield slopes(partial(first, call, leaves), leaves)


def other_dtypes(_: Op, device: torch.device) -> Errors:
    """A wider adapter is not rounded; autocast rounds x, W and bias alone; ranks above 256."""
    half = {n: v.bfloat16() for n, v in operands(device).items() if n in ("x", "weight", "bias")}
    own = {n: v.float() for n, v in operands(device).items() if n in ("A", "B", "s", "sigma")}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        wide = {name: value.float() for name, value in half.items()}
        cast_to = SubspaceAdapter.op(**wide, **own, scaling=0.7, noise=Noise(1, 2))
    for kind, got, tensors in (
        ("autocast", cast_to, {**half, **own}),
        ("a wider adapter", SubspaceAdapter.op(**half, **own, scaling=0.7, noise=Noise(1, 2)),
         {**half, **own}),
    ):  # fmt: skip
        double = {name: value.double() for name, value in tensors.items()}
        right = reference.subspace_lora_linear(**double, scaling=0.7, noise=Noise(1, 2), layer=0,
                                               sampling="example", groups=None)  # fmt: skip
        yield exact(got.dtype == torch.bfloat16, f"{kind}: {got.dtype}")
        yield ratio(got.cpu(), right, right.abs().max(), 2**-7, kind)
    # A = B = 1 + 2^-8 - 2^-12, which is 1 in bfloat16; the product rounds to 1 + 2^-7.
    near_one = torch.full((1, 1), 1 + 2**-8 - 2**-12, device=device)
    one = torch.ones(1, device=device)
    for base in (one[None].bfloat16(), one[None]):
        with torch.autocast(device.type, torch.bfloat16, enabled=base.dtype != torch.bfloat16):
            y = SubspaceAdapter.op(base, 0 * base, None, near_one, near_one, one, one, 1.0, None)
        yield exact(float(y) == 1 + 2**-7, f"an adapter that is rounded: {float(y)}")
    for rank, dtype in ((257, torch.float64), (3, torch.float32)):
        t = operands(device, rank)
        x, W, bias = (t[name].to(dtype) for name in ("x", "weight", "bias"))
        y = SubspaceAdapter.op(**{**t, "x": x, "weight": W, "bias": bias}, noise=None)
        update = 0.7 * x.double() @ (t["s"][:, None] * t["A"]).T @ t["B"].T
        right = x.double() @ W.double().T + bias.double() + update
        yield distance(y.double(), right, 100 * rank * torch.finfo(dtype).eps)


def refusals(_: Op, device: torch.device) -> Errors:
    """Tensors that do not fit, and coordinates out of range."""
    t: dict[str, Any] = {**operands(device), "noise": Noise(0, 0)}
    shapes = {"weight": (5, 7), "bias": (4,), "A": (3, 5), "B": (5, 2), "s": (2,), "sigma": (1, 3)}
    for name, shape in shapes.items():
        wrong = {**t, name: torch.zeros(shape, dtype=t["x"].dtype, device=device)}
        yield refused(partial(SubspaceAdapter.op, **wrong), f"{name} must have shape")
    ids = torch.arange(3, device=device)
    calls: list[tuple[dict[str, Any], str]] = [
        ({"sampling": "row"}, "sampling"), ({"groups": ids}, "groups"), ({"draws": ids}, "draws"),
        ({"groups": ids[:2] / 2}, "groups must be integers"), ({"layer": -1}, "layer"),
        ({"layer": 2**32 - 1}, "layer"), ({"groups": ids[:2] - 1}, "group id"),
        ({"groups": ids[:2] + 2**32 - 1}, "group id"), ({"draws": ids[:2] + 2**32 - 1}, "draw"),
    ]  # fmt: skip
    for body in (SubspaceAdapter.op, plain_op):
        for changes, words in calls:
            if "id" in words or words in ("draw", "layer"):
                continue
            yield refused(partial(body, **{**t, **changes}), words)
    for changes, words in calls:
        yield refused(partial(plain_op, **{**t, **changes}), words)
    for arguments, words in (((-1, 0), "seed"), ((2**64, 0), "seed"), ((0, -1), "draw"),
                             ((0, 2**32), "draw"), ((0.5, 0), "seed")):  # fmt: skip
        yield refused(partial(Noise, *arguments), words)
    noise = Noise(2**64 - 1, 2**32 - 1)
    later: list[tuple[tuple[Any, ...], str]] = [
        ((2**32 - 1, 2, 4), "layer"), ((0, 2, 0), "rank"), ((0, ids - 1, 4), "group id"),
        ((0, ids + 2**32 - 2, 4), "group id"), ((0, ids, 4, ids), "draw"), ((0, -1, 4), "groups"),
        ((0, ids, 4, ids[:2] * 0), "3 entries"), ((0, ids[None], 4), "1-D"),
        ((0, ids.double(), 4), "1-D"),
    ]  # fmt: skip
    for arguments, words in later:
        yield refused(partial(noise.normal, *arguments), words)
    for values, words in (((-1, 0, 1), "seed"), ((0, 2**64, 1), "stream"), ((0, 0, -1), "n ")):
        yield refused(partial(philox_words, *values), words)
    last = torch.tensor([2**32 // 3 - 1])
    yield exact(int(token_groups(last, torch.tensor([2]), 3)) == 2**32 - 2, "the last token")
    yield refused(lambda: token_groups(last + 1, torch.tensor([0]), 3), "token sampling")
    adapter = cast(Adapter, layers(device, method="mle")["q_proj"].adapter)
    A, B = draws(1, 4, 6).to(device), draws(2, 5, 4).to(device)
    yield refused(lambda: adapter.set_lora_(A, B, 1.0), "rank 4 does not fit")


# --- Designs of draws -----------------------------------------------------------------------------


def designs(_: Op, device: torch.device) -> Errors:
    """Antithetic and Latin draws by loops over independent ones, for any draw, id and size."""
    ids, more = torch.tensor([0, 5, 2**32 - 1, 5]), torch.tensor([0, 1, 5, 3])
    for first in (0, 6, 11):
        pair = DesignedNoise(7, first).normal(3, ids, 5, more)
        for row, (id, later) in enumerate(zip(ids.tolist(), more.tolist(), strict=True)):
            z = normals(Noise(7, (first + later) // 2), 3, id, 5)
            right = (z if (first + later) % 2 == 0 else -z).float()
            yield exact(torch.equal(pair[row], right), f"antithetic draw {first + later}")
        for size in (2, 3, 7):
            found = DesignedNoise(7, first, Design.LATIN, size).normal(3, ids, 5, more)
            for row, (id, later) in enumerate(zip(ids.tolist(), more.tolist(), strict=True)):
                right = latin_by_loops(first + later, size, id, 5)
                yield ratio(found[row].double(), right, 1 + right.abs(), 4 * EPS_32,
                            f"draw {first + later} of a cube of {size}")  # fmt: skip
    alone = DesignedNoise(7, 2, Design.LATIN, 3).normal(3, 2, 5)
    right = torch.stack([latin_by_loops(2, 3, id, 5) for id in range(2)])
    yield ratio(alone.double(), right, 1 + right.abs(), 4 * EPS_32, "without later draws")
    yield exact(DesignedNoise(7, 0) == DesignedNoise(7, 0, Design.ANTITHETIC, 2), "the default")
    for fields, words in (((Design.ANTITHETIC, 3), "size"), ((Design.LATIN, 1), "size")):
        yield refused(partial(DesignedNoise, 7, 0, *fields), words)
    yield refused(lambda: DesignedNoise(7, 2**31).normal(3, 1, 5), "last draw")
    edge = DesignedNoise(7, 2**31 - 2, Design.LATIN, 3)  # its cube ends at 2^31
    yield refused(lambda: edge.normal(3, 1, 5), "last draw")


def latin_by_loops(draw: int, size: int, id: int, rank: int) -> Tensor:
    """A draw of the cube that it belongs to, as (21) says it."""
    start, bell, found = draw - draw % size, NormalDist(), []
    cube = [normals(Noise(7, start + i), 3, id, rank).tolist() for i in range(size)]
    for column in zip(*cube, strict=True):
        order = sorted(range(size), key=column.__getitem__)
        k = order.index(draw % size)  # from 0
        above = bell.cdf(column[order[k + 1]]) if k + 1 < size else 1.0
        v = (bell.cdf(column[order[k]]) / above) ** (k + 1)
        found.append(bell.inv_cdf((k + v) / size))
    return torch.tensor(found, dtype=torch.float64)


ADAPTER_CHECKS = [
    Check("settings", "defaults; c = alpha / r; values out of range", settings),
    Check("start", "(2), (3) initial values from plain Python's words", started),
    Check("draws as weights", "a draw is the LoRA W + c B A' of its A'", draws_as_weights),
    Check("widths", "widths by hand; log sigma is at least -20", widths_and_limits),
    Check("objective", "(4) NLL + beta KL / N in loops, both KLs, all methods", objective),
    Check("certain answers", "(8), (9) with 0 log 0 = 0", certain_answers),
    Check("numbered draws", "(1a) to (1e) with a draw for each row; second slopes", numbered_draws),
    Check("other dtypes", "(1a) under autocast, with wider adapters, at high ranks", other_dtypes),
    Check("refusals", "shapes that do not fit, coordinates out of range", refusals),
    Check("designs of draws", "(21) antithetic and Latin draws, in loops", designs),
]
