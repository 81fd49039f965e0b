"""Results for the conformance kit's cases, by two ports: the package itself, and the page.

`port` calls the functions that users call. `port_of_the_page` computes schedules, metrics, the
noise, and all of the level subspace but its model, from docs/conformance.md alone: in integers,
fractions and 50 decimal digits or more.
"""

from __future__ import annotations

import itertools
import json
import math
from contextlib import contextmanager
from decimal import Decimal, localcontext
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import torch

from scalabl_ref import (
    AdapterConfig,
    Llama,
    LlamaConfig,
    Noise,
    adapters,
    add_adapters,
    elbo,
    kl_forward,
    kl_official,
)
from scalabl_ref.core import philox
from scalabl_ref.core.adapter import SubspaceAdapter, initial_matrix, initial_values
from scalabl_ref.core.noise import plain_normals
from scalabl_ref.core.objective import Batch
from scalabl_ref.core.predictive import predictive
from scalabl_ref.fast import native, normals
from scalabl_ref.methods import subspace
from scalabl_ref.methods.evidence import best_precision
from scalabl_ref.methods.laplace import LOGITS_LAYER
from scalabl_ref.model.attach import Linear
from scalabl_ref.support.tensors import load_tensors
from scalabl_ref.verify import level_checks
from scalabl_ref.verify.formulas import tensor
from scalabl_ref.verify.level_checks import load

from . import models
from .exact import PI, exact_normals

TENSORS = ("x", "weight", "bias", "A", "B", "s", "sigma")


def cases(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors, _ = load_tensors(folder / "vectors.safetensors")
    for case in manifest["cases"]:
        yield case, {name: tensors[key] for name, key in case["inputs"].items()}


def op(case, t, dtype, bug):
    """The op that is in place, in the part of a port; `bug` changes its arguments."""
    p = dict(case["parameters"])
    noise = Noise(int(p["seed"]), p["draw"]) if p["seed"] else None
    leaves = {name: t[name].to(dtype).requires_grad_() for name in TENSORS if name in t}
    call = {"bias": None, **leaves, "scaling": p["scaling"], "noise": noise, "layer": p["layer"],
            "sampling": p["sampling"], "groups": t.get("groups")}  # fmt: skip
    y = SubspaceAdapter.op(**{**call, **bug(call)})
    if "grad_y" not in t:
        return {"y": y.detach()}
    gradients = torch.autograd.grad(
        y, list(leaves.values()), t["grad_y"].to(dtype), materialize_grads=True
    )
    return dict(zip(leaves, gradients, strict=True))


def noise_body():
    """The functions of words behind the noise that is in place: plain ones, or the core's."""
    return philox if Noise.normals is plain_normals else native.core() or philox


def pairs_of_normals(words):
    """Normals (n, 2) of pairs of words: by the core, on tensors, or by plain Python."""
    if Noise.normals is not plain_normals and native.core() is None:
        return torch.stack(normals.box_muller(*words.cpu().T), 1)
    return tensor([noise_body().box_muller(a, b) for a, b in words.tolist()])


def port(folder, dtype, bug=lambda call: {}, levels=None):
    """Results of the package's own functions, on the device of --device."""
    out = {}
    for case, t in cases(folder):
        p, level = case["parameters"], case["level"]
        if level != "subspace":  # whose curvature stays on the CPU
            t = {name: value.to(models.DEVICE) for name, value in t.items()}
        if levels and level not in levels:
            continue
        if level == "philox":
            rows = zip(t["counter"].tolist(), t["key"].tolist(), strict=True)
            words = [noise_body().philox4x32(c, k, p["rounds"]) for c, k in rows]
            result = {"words": torch.tensor(words)}
        elif case["id"] == "box-muller":
            result = {"normals": pairs_of_normals(t["words"]).to(dtype)}
        elif level == "normals":
            at = (p["layer"], t["groups"], p["rank"], t.get("draws"))
            result = {"eps": Noise(int(p["seed"]), p["draw"]).normal(*at)}
        elif level.startswith("op"):
            result = op(case, t, dtype, bug)
        elif level == "KL":
            function = {"forward": kl_forward, "official": kl_official}[p["kl"]]
            result = {"kl": function(t["s"].to(dtype), t["sigma"].to(dtype), p["prior_std"])}
        elif level == "ELBO":
            result = objective(p, t, dtype)
        elif level in SAME:
            result = SAME[level](case["id"], p, t)
        elif level in OWN:
            result = OWN[level](case["id"], p, {n: v.to(dtype) if v.is_floating_point() else v
                                                for n, v in t.items()})  # fmt: skip
        elif case["id"].startswith("svd"):
            result = svd(t)
        elif level == "initialisation":
            result = initialisation(p, t)
        else:
            assert level == "subspace", level
            result = SUBSPACE[case["id"].split("-")[0]](p, t, dtype)
        out.update({f"{case['id']}/{n}": v.detach().cpu().contiguous() for n, v in result.items()})
    return out


def objective(p, t, dtype):
    """`elbo` on a model whose class logits are given."""
    rank = t["s"].shape[1]
    model = torch.nn.ModuleDict({"q_proj": Linear(rank, rank), "v_proj": Linear(rank, rank)})
    config = AdapterConfig(rank=rank, targets=("q_proj", "v_proj"), prior_std=p["prior_std"])
    add_adapters(model, config).to(models.DEVICE)
    for index, adapter in enumerate(adapters(model).values()):
        adapter.log_s.data = t["s"][index].log().to(dtype)
        adapter.log_sigma.data = t["sigma"][index].log().to(dtype)
    logits, batch = t["logits"].to(dtype), SimpleNamespace(labels=t["labels"])
    with mock.patch("scalabl_ref.core.objective.class_logits", lambda *_: logits):
        return elbo(model, batch, None, p["beta"], p["num_examples"], p["kl"])._asdict()


def initialisation(p, t):
    matrix, uniform = initial_matrix(int(p["seed"]), p["layer"], p["rank"], p["d_in"])
    adapter = SubspaceAdapter(p["d_in"], p["d_out"], AdapterConfig(rank=p["rank"]), p["layer"],
                      int(p["seed"]), torch.device(models.DEVICE))  # fmt: skip
    values = initial_values(t["singular"], t["Vh"], uniform, p["init_sigma"])
    return {"kaiming": matrix, "B": adapter.B, **values}


def svd(t):
    _, singular, A = torch.linalg.svd(t["kaiming"], full_matrices=False)
    values = initial_values(singular, A, torch.full((len(A),), 0.5), 1.0)
    A, s = values["A"], values["log_s"].exp()
    return {"identity": A @ A.T, "gram": (A.T * s**2) @ A}


# Schedules and scores are the same in any precision.
SAME = {"schedules": level_checks.schedule, "metrics": level_checks.scores}
OWN = {
    "predictive": level_checks.averages, "llama": level_checks.llama,
    "training step": level_checks.training_step, "prediction": level_checks.prediction,
}  # fmt: skip


def scales(p, t, dtype):
    """The model with points, its Jacobians, and draws of the scales through it."""
    shape = {k: p[k] for k in vars(LlamaConfig(20, 8, 12, 2, 4, 2, 2)) if k in p}
    classes = torch.arange(len(t["lm_head.weight"]))
    model = Llama(LlamaConfig(**shape)).init_random_().trim_head(classes.tolist())
    add_adapters(model, AdapterConfig(rank=p["rank"], alpha=p["scaling"] * p["rank"],
                                      method="point"))  # fmt: skip
    model.to(models.DEVICE, dtype)
    names = [name for name, _ in model.named_parameters()]
    load(model, {n: t[n.replace("log_s", "s").replace(".adapter.", ".")] for n in names})
    for adapter in adapters(model).values():
        adapter.log_s.data.log_()
    batch = Batch(t["tokens"], t["lengths"], t["labels"], t["ids"], classes).to(models.DEVICE)
    logits, J = subspace.jacobians(model, batch)
    sizes, values = subspace.layout(model)
    curvature = subspace.Curvature(sizes, values, t["H"], 0.0)
    posterior = curvature.posterior(t["precision"], predicts="sampled")
    assert p["layer"] == subspace.SCALES_LAYER
    drawn = posterior.log_probs(model, batch, p["samples"], int(p["seed"]))
    return {"logits": logits, "J": J, "log_probs": drawn}


@contextmanager
def given(logits, J):
    """A model that stands for these logits and derivatives by its scales, which are all 1."""
    D = J.shape[2]
    with mock.patch.multiple(
        subspace, jacobians=lambda *_: (logits, J), layout=lambda _: ({"all": D}, ones(D))
    ):
        yield SimpleNamespace(device=torch.device("cpu"))


def ones(D):
    return torch.ones(D, dtype=torch.float64)


def curvature(p, t, dtype):
    with given(t["logits"], t["J"]) as model:
        found = subspace.Curvature.measure(model, [Batch(*5 * [t["labels"]])])
    return {"H": found.H, "log_likelihood": tensor(found.log_likelihood)}


def evidence(p, t, dtype):
    sizes = {"all": len(t["scales"])}
    found = subspace.Curvature(sizes, t["scales"], t["H"], p["log_likelihood"])
    each = [found.posterior(some[t["group"]]).log_evidence() for some in t["precision"]]
    names = [str(g) for g in range(t["precision"].shape[1])]
    best = best_precision(t["H"], t["scales"], t["group"], names)
    first = [t["group"].tolist().index(g) for g in range(len(names))]
    return {"log_evidence": tensor(each), "best": best[first]}


def gaussian(p, t, dtype):
    D, batch = len(t["H"]), Batch(*5 * [t["ids"]])
    found = subspace.Curvature({"all": D}, ones(D), t["H"], 0.0)
    posterior = found.posterior(t["precision"], directions=p["directions"])
    assert p["layer"] == LOGITS_LAYER
    with given(t["mean"], t["J"]) as model:
        _, factor = posterior.gaussian(model, batch)
        log_probs = posterior.log_probs(model, batch, p["samples"], int(p["seed"]))
    return {"covariance": factor @ factor.mT, "log_probs": log_probs,
            **predictive(log_probs)._asdict()}  # fmt: skip


SUBSPACE = {"scales": scales, "curvature": curvature, "evidence": evidence, "gaussian": gaussian}


# --- the page alone ------------------------------------------------------------------------------


def port_of_the_page(folder):
    """Results for the noise, schedules, metrics and the subspace but its model, by hand."""
    out, levels = {}, ("philox", "normals", "schedules", "metrics", "subspace")
    for case, t in cases(folder):
        p, kind = case["parameters"], case["id"].split("-")[0]
        if case["level"] in levels and kind in PAGE:
            with localcontext() as context:
                context.prec = 50
                result = PAGE[kind](p, {name: value.tolist() for name, value in t.items()})
            out.update({f"{case['id']}/{name}": torch.tensor(value, dtype=torch.float64
                        if isinstance(flat(value)[0], float) else torch.int64)
                        for name, value in result.items()})  # fmt: skip
    return out


def flat(value):
    return [v for part in value for v in flat(part)] if isinstance(value, list) else [value]


def block(counter, key, rounds):
    """Step 1."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        (hi_p, lo_p), (hi_q, lo_q) = divmod(p, 2**32), divmod(q, 2**32)
        c = [hi_q ^ c[1] ^ k[0], lo_q, hi_p ^ c[3] ^ k[1], lo_p]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def page_philox(p, t):
    return {
        "words": [block(c, k, p["rounds"]) for c, k in zip(t["counter"], t["key"], strict=True)]
    }


def page_box_muller(p, t):
    return {"normals": [[float(z) for z in exact_normals(a, b)] for a, b in t["words"]]}


def page_noise(p, t):
    seed, rows = int(p["seed"]), []
    for group, later in zip(t["groups"], t.get("draws", [0] * len(t["groups"])), strict=True):
        row = []
        for j in range(-(-p["rank"] // 4)):
            counter = [j, group, p["layer"], p["draw"] + later]
            w = block(counter, [seed % 2**32, seed // 2**32], 10)
            row += exact_normals(w[0], w[1]) + exact_normals(w[2], w[3])
        rows.append([float32(z) for z in row[: p["rank"]]])
    return {"eps": rows}


def float32(z):
    """The nearest float32 number to a Decimal, by its 24 bits as an integer; ties to even."""
    exponent = math.frexp(z)[1] - 24
    return float(round(Fraction(z) / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def page_warmup(p, t):
    steps, rise = p["steps"], math.floor(p["warmup"] * p["steps"])
    up = {i: Fraction(i, rise) for i in range(rise)}
    down = {i: Fraction(steps - i, steps - rise) for i in range(rise, steps)}
    return {"factor": [float({**up, **down}[i]) for i in t["step"]]}


def page_kl_weight(p, t):
    with localcontext() as context:
        context.prec = 60
        power = (Decimal(PI) / 8 * Decimal(p["num_examples"]).ln()).exp()
        M = max(1, int(100 * power / p["batch"]))
    weights = [Fraction(2 ** (step % M + 1), 2 ** (M + 1) - 1) for step in t["step"]]
    return {"period": M, "weight": [float(weight) for weight in weights]}


def page_ece(p, t):
    bins, N = {}, len(t["labels"])
    for row, label in zip(t["probs"], t["labels"], strict=True):
        confidence = max(row)
        place = min(math.floor(confidence * p["bins"]), p["bins"] - 1)
        right = row.index(confidence) == label
        bins.setdefault(place, []).append((Fraction(right), Fraction(confidence)))
    ece = Fraction(0)
    for rows in bins.values():
        accuracy, mean = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        ece += Fraction(len(rows), N) * abs(accuracy - mean)
    return {"ece": float(ece)}


def page_scores(p, t):
    rows = [([Fraction(v) for v in row], label)
            for row, label in zip(t["probs"], t["labels"], strict=True)]  # fmt: skip
    right = sum(row.index(max(row)) == label for row, label in rows)
    squares = sum((v - (c == label)) ** 2 for row, label in rows for c, v in enumerate(row))
    logs = sum(Decimal(row[label]).ln() for row, label in zip(t["probs"], t["labels"], strict=True))
    n = len(rows)
    return {"acc": float(Fraction(right, n)), "nll": float(-logs / n), "brier": float(squares / n)}


def page_auroc(p, t):
    rows = list(zip(t["scores"], t["positive"], strict=True))
    pairs = [(a, b) for a, is_one in rows if is_one for b, is_other in rows if not is_other]
    won = sum(Fraction(1 if a > b else 0) + Fraction(a == b, 2) for a, b in pairs)
    return {"auroc": float(won / len(pairs))}


# The level "subspace" without its model: matrices as lists of rows of Decimals.


def dot(u, v):
    return sum((a * b for a, b in zip(u, v, strict=True)), Decimal(0))


def times(A, B):
    return [[dot(row, column) for column in zip(*B, strict=True)] for row in A]


def transposed(A):
    return [list(column) for column in zip(*A, strict=True)]


def diagonal(values):
    return [[v if i == j else Decimal(0) for j in range(len(values))] for i, v in enumerate(values)]


def plus(A, B):
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(A, B, strict=True)]


def inverse(A):
    """The inverse and the determinant of a positive definite matrix, by Gauss and Jordan."""
    n, det = len(A), Decimal(1)
    A = [row + unit for row, unit in zip(A, diagonal([Decimal(1)] * n), strict=True)]
    for i in range(n):
        pivot = A[i][i]
        det *= pivot
        A[i] = [a / pivot for a in A[i]]
        for k in range(n):
            if k != i:
                A[k] = [a - A[k][i] * b for a, b in zip(A[k], A[i], strict=True)]
    return [row[n:] for row in A], det


def eigen(A):
    """Eigenvalues and eigenvectors, as rows, the largest first: Jacobi's rotations."""
    n, U = len(A), diagonal([Decimal(1)] * len(A))
    for _ in range(12):
        for i, j in itertools.combinations(range(n), 2):
            if A[i][j]:
                ratio = (A[j][j] - A[i][i]) / (2 * A[i][j])
                t = (1 if ratio >= 0 else -1) / (abs(ratio) + (1 + ratio * ratio).sqrt())
                c = 1 / (1 + t * t).sqrt()
                for rows in (A, U):
                    x, y = rows[i], rows[j]
                    rows[i] = [c * (a - t * b) for a, b in zip(x, y, strict=True)]
                    rows[j] = [c * (b + t * a) for a, b in zip(x, y, strict=True)]
                for row in A:
                    row[i], row[j] = c * (row[i] - t * row[j]), c * (row[j] + t * row[i])
    pairs = sorted(((A[i][i], U[i]) for i in range(n)), reverse=True)
    return [max(Decimal(0), v) for v, _ in pairs], [u for _, u in pairs]


def decimals(value):
    return [decimals(v) for v in value] if isinstance(value, list) else Decimal(value)


def floats(value):
    return [floats(v) for v in value] if isinstance(value, list) else float(value)


def page_curvature(p, t):
    D, labels = len(t["J"][0][0]), t["labels"]
    H, fit = diagonal([Decimal(0)] * D), Decimal(0)
    for z, J, label in zip(decimals(t["logits"]), decimals(t["J"]), labels, strict=True):
        weights = [v.exp() for v in z]
        probs = [w / sum(weights) for w in weights]
        fit += probs[label].ln()
        mean = [dot(probs, column) for column in zip(*J, strict=True)]
        for share, row in zip(probs, J, strict=True):
            off = [a - b for a, b in zip(row, mean, strict=True)]
            H = plus(H, [[share * a * b for b in off] for a in off])
    return {"H": floats(H), "log_likelihood": float(fit)}


def page_evidence(p, t):
    H, s, group = decimals(t["H"]), decimals(t["scales"]), t["group"]
    logs = []
    for some in decimals(t["precision"]):
        each = [some[g] for g in group]
        _, det = inverse(plus(H, diagonal(each)))
        penalty = sum(v * a * a for v, a in zip(each, s, strict=True))
        logs.append(Decimal(p["log_likelihood"]) - (penalty + det.ln() - math.prod(each).ln()) / 2)
    G = range(max(group) + 1)
    squares = [sum(a * a for a, g in zip(s, group, strict=True) if g == own) for own in G]
    best = [Decimal(1) for _ in G]
    for _ in range(400):  # lambda |s|^2 = number of scales - lambda times the trace of Sigma
        sigma, _ = inverse(plus(H, diagonal([best[g] for g in group])))
        known = [sum(1 - best[g] * sigma[i][i] for i, g in enumerate(group) if g == own)
                 for own in G]  # fmt: skip
        best = [a / b for a, b in zip(known, squares, strict=True)]
    return {"log_evidence": floats(logs), "best": floats(best)}


def page_gaussian(p, t):
    H, precision = decimals(t["H"]), decimals(t["precision"])
    roots = [1 / v.sqrt() for v in precision]
    values, U = eigen([[a * h * b for h, b in zip(row, roots, strict=True)]
                       for a, row in zip(roots, H, strict=True)])  # fmt: skip
    inner = diagonal([Decimal(1)] * len(H))
    for v, u in list(zip(values, U, strict=True))[: p["directions"]]:
        inner = plus(inner, [[-v / (1 + v) * a * b for b in u] for a in u])
    sigma = [[a * x * b for x, b in zip(row, roots, strict=True)]
             for a, row in zip(roots, inner, strict=True)]  # fmt: skip
    covariances, log_probs, C = [], [[] for _ in range(p["samples"])], len(t["mean"][0])
    for mean, J, id in zip(decimals(t["mean"]), decimals(t["J"]), t["ids"], strict=True):
        covariances.append(times(times(J, sigma), transposed(J)))
        found, W = eigen([list(row) for row in covariances[-1]])
        root = times(times(transposed(W), diagonal([v.sqrt() for v in found])), W)
        for draw in range(p["samples"]):
            at = {**p, "draw": draw, "rank": C}
            eps = decimals(page_noise(at, {"groups": [id]})["eps"][0])
            z = [m + dot(row, eps) for m, row in zip(mean, root, strict=True)]
            total = sum(v.exp() for v in z).ln()
            log_probs[draw].append([v - total for v in z])
    return {"covariance": floats(covariances), "log_probs": floats(log_probs),
            **page_predictive(log_probs)}  # fmt: skip


def page_predictive(log_probs):
    out = {"probs": [], "entropy": [], "expected_entropy": [], "mutual_information": []}
    for draws in zip(*log_probs, strict=True):
        mean = [sum(v.exp() for v in column) / len(draws) for column in zip(*draws, strict=True)]
        entropy = -sum(m * m.ln() for m in mean)
        expected = -sum(v.exp() * v for draw in draws for v in draw) / len(draws)
        values = (mean, entropy, expected, max(Decimal(0), entropy - expected))
        for name, value in zip(out, values, strict=True):
            out[name].append(floats(value))
    return out


PAGE = {
    "curvature": page_curvature, "evidence": page_evidence, "gaussian": page_gaussian,
    "philox": page_philox, "box": page_box_muller, "noise": page_noise, "warmup": page_warmup,
    "kl": page_kl_weight, "ece": page_ece, "scores": page_scores, "auroc": page_auroc,
}  # fmt: skip
