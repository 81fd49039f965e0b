"""The cases of the conformance kit: inputs, expected outputs and the bounds of their errors.

Inputs are float64 numbers that float32 holds exactly, so a port may work in either. The bound of an
output is terms * eps * size: `terms` roundings of numbers as large as `size`, the sum of the
magnitudes behind the output. An output with terms = 0 must be exact. Every case names its equation
of docs/method.md and the faults that it was made to catch. docs/conformance.md explains each level.

Expected values come from `reference`, in loops over float64, wherever that has the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.layer import SAMPLING
from ..core.noise import FIRST_TRAINING_DRAW, Noise
from ..methods.laplace import LOGITS_LAYER
from ..methods.subspace import SCALES_LAYER
from ..model.config import LlamaConfig, RopeConfig
from ..model.llama import Llama
from . import formulas, reference
from .checks import Case, sizes, terms
from .formulas import Weights, tensor
from .known_answers import philox_answers


class Output(NamedTuple):
    """An expected output. size: the magnitudes behind it, of the shape of value or one number."""

    value: Tensor
    terms: int = 0
    size: Tensor | float = 1.0


@dataclass
class Vector:
    """One case. parameters: numbers and words; inputs: tensors."""

    id: str
    level: str
    covers: str
    catches: list[str]
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)


# --- The cases --------------------------------------------------------------------------------


def _random(seed: int, *shape: int, times: float = 1.0, plus: float = 0.0) -> Tensor:
    """plus + times * standard normals of the package's noise, rounded to float32."""
    normal = Noise(seed, 0).normal(0, 1, math.prod(shape)).double().reshape(shape)
    return _single(plus + times * normal)


def _single(values: Tensor) -> Tensor:
    """The nearest numbers that float32 holds, in float64."""
    return values.float().double()


def _philox() -> Iterator[Vector]:
    for rounds in (7, 10):
        answers = [answer for answer in philox_answers() if answer.rounds == rounds]
        counters, keys = [a.counter for a in answers], [a.key for a in answers]
        words = [reference.philox4x32(c, k, rounds) for c, k in zip(counters, keys, strict=True)]
        yield Vector(
            f"philox-{rounds}", "philox", "docs/conformance.md, step 1",
            ["key schedule", "order of words", "number of rounds", "signed multiplication"],
            {"rounds": rounds},
            {"counter": torch.tensor(counters), "key": torch.tensor(keys)},
            {"words": Output(torch.tensor(words))},
        )  # fmt: skip


def _normals() -> Iterator[Vector]:
    words = [0, 1, 2**29, 2**30 - 1, 2**30, 3 * 2**29, 2**31, 2**32 - 2**29, 2**32 - 1, 123456789]
    pairs = [(a, b) for a in words for b in words]
    z = torch.tensor([reference.box_muller(a, b) for a, b in pairs], dtype=torch.float64)
    yield Vector(
        "box-muller", "normals", "docs/conformance.md, steps 2 to 5",
        ["biased uniform", "sine and cosine exchanged", "quadrants", "rounded to float32 already"],
        inputs={"words": torch.tensor(pairs)},
        # The float32 normal: half a unit in its last place, and the radius' size where cos is 0.
        outputs={"normals": Output(z, 2, z.abs().clamp(min=1e-9))},
    )  # fmt: skip
    for seed, draw, layer in (
        (0, 0, 0),
        (2**64 - 1, 2**32 - 1, 2**32 - 2),
        (0x123456789ABCDEF, 7, 9),
    ):
        groups = torch.tensor([0, 1, 2**32 - 1, 5])
        noise = Noise(seed, draw)
        z = tensor([reference.eps_of_group(noise, layer, g, 10) for g in groups.tolist()])
        yield Vector(
            f"noise-{seed % 1000}", "normals", "docs/conformance.md: coordinates to normals",
            ["order of the counter", "seed cut to 32 bits", "a group's rank changes its noise"],
            {"seed": str(seed), "draw": draw, "layer": layer, "rank": 10},
            {"groups": groups},
            {"eps": Output(z, 2, z.abs())},
        )  # fmt: skip
    yield _draws()


def _draws() -> Vector:
    """Rows of several draws in one call; two rows have one group, and two have one draw."""
    seed, draw, layer, rank = 2**63 + 11, 3, 9, 5
    groups, draws = torch.tensor([7, 7, 0, 2**32 - 1]), torch.tensor([0, 5, 2**31, 5])
    pairs = zip(groups.tolist(), draws.tolist(), strict=True)
    z = tensor([reference.eps_of_group(Noise(seed, draw), layer, g, rank, d) for g, d in pairs])
    return Vector(
        "noise-draws", "normals", "docs/conformance.md: a draw for each row",
        ["draws ignored", "draws for draw, and not added to it"],
        {"seed": str(seed), "draw": draw, "layer": layer, "rank": rank},
        {"groups": groups, "draws": draws},
        {"eps": Output(z, 2, z.abs())},
    )  # fmt: skip


# Leading dimensions, d_in, d_out, rank, scaling, whether there is a bias.
OP_SHAPES = [
    ((4,), 7, 5, 3, 1.5, True),
    ((2, 3), 16, 9, 8, 0.75, False),
    ((3, 1, 2), 33, 20, 5, 2.0, True),
]
LARGE = ((2, 3), 301, 130, 13, 1.25, True)  # many vectors of any processor, and a remainder


def _op(only: str = "") -> Iterator[Vector]:
    """Forward and backward of the layer, for every sampling, with groups, and the mean model.

    only: one case's id. Layer and draw differ, so that they cannot be exchanged.
    """
    kinds = [(sampling, True, grouped) for grouped in (False, True) for sampling in SAMPLING]
    kinds.append(("example", False, False))
    made = [(shape, kind) for shape in OP_SHAPES for kind in kinds]
    made.append((LARGE, ("token", True, True)))
    for number, (shape, (sampling, noisy, grouped)) in enumerate(made, 1):
        lead, d_in, d_out, rank, scaling, biased = shape
        kind = f"{sampling if noisy else 'mean'}{'-groups' if grouped else ''}-{number}"
        if only not in ("", f"op-forward-{kind}", f"op-backward-{kind}"):
            continue
        case = Case(
            x=_random(number, *lead, d_in),
            weight=_random(number + 100, d_out, d_in),
            bias=_random(number + 200, d_out) if biased else None,
            A=_random(number + 300, rank, d_in),
            B=_random(number + 400, d_out, rank),
            s=_single(_random(number + 600, rank).exp()),
            sigma=_single(_random(number + 700, rank).exp() / 2),
            scaling=scaling,
            noise=Noise(2**63 + number, number) if noisy else None,
            layer=number + 40,
            sampling=sampling,
            groups=torch.tensor([7, 2**32 - 1, 0, 3][: lead[0]]) if grouped else None,
        )
        grad_y = _random(number + 500, *lead, d_out)
        parameters = {
            "scaling": case.scaling,
            "layer": case.layer,
            "sampling": case.sampling,
            "seed": str(case.noise.seed) if case.noise else None,
            "draw": case.noise.draw if case.noise else None,
        }
        inputs = {name: t for name, t in vars(case).items() if isinstance(t, Tensor)}
        size, roundings = sizes(case, grad_y), 2 * terms(case)
        y = case.call(reference.subspace_lora_linear)
        yield Vector(
            f"op-forward-{kind}", "op forward", "(1a)",
            ["variance for standard deviation", "scaling left out or squared", "bias left out",
             "noise shared where it should not be, or not shared where it should",
             "A and B exchanged"],
            parameters, inputs, {"y": Output(y, roundings, size["y"])},
        )  # fmt: skip
        gradients = reference.subspace_lora_linear_gradients(grad_y, **vars(case))
        yield Vector(
            f"op-backward-{kind}", "op backward", "(1b) to (1e)",
            ["gradient of sigma without eps", "scaling left out",
             "base's share of grad x left out"],
            parameters, {**inputs, "grad_y": grad_y},
            {n: Output(gradients[n], roundings, size[n]) for n in inputs if n in gradients},
        )  # fmt: skip


def _kl() -> Iterator[Vector]:
    points = {
        "check": ([0.3, -0.4], [math.log(0.05), math.log(0.2)], 1.0),
        "prior": ([-30.0, -30.0], [0.0, 0.0], 1.0),
        "wide": ([1.0, 0.0, -1.0], [0.5, 0.0, -3.0], 0.25),
        "narrow": ([-0.5, 0.0], [-28 * math.log(2), -20 * math.log(2)], 1.0),  # bound: e^-20
    }
    for name, (log_s, log_sigma, prior) in points.items():
        s, sigma = tensor(log_s), tensor(log_sigma)
        s, sigma = _single(s.exp()), _single(sigma.exp())
        for kl, function in (
            ("forward", reference.kl_forward),
            ("official", reference.kl_official),
        ):
            value = function(s, sigma, prior)
            magnitude = ((sigma.log() - math.log(prior)).abs() + 0.5).sum() + (
                (sigma**2 + s**2) / prior**2 if kl == "forward" else (prior**2 + s**2) / sigma**2
            ).sum()
            yield Vector(
                f"kl-{kl}-{name}", "KL", "(5)" if kl == "forward" else "(6)",
                ["KL in the other direction", "variance for standard deviation", "half left out",
                 "a small number added to sigma, or to a denominator"],
                {"prior_std": prior, "kl": kl}, {"s": s, "sigma": sigma},
                {"kl": Output(tensor(value), 16, magnitude)},
            )  # fmt: skip


FAR = [1000.0, 0.0, -1000.0, 30.0]  # logits: a softmax needs its maximum, and has zeros


def _objective() -> Iterator[Vector]:
    cases = {"": (_random(900, 6, 4, times=3), torch.tensor([0, 3, 1, 2, 2, 0])),
             "-far": (tensor([FAR, FAR[::-1]]), torch.tensor([1, 3]))}  # fmt: skip
    s, sigma = (
        tensor([[0.5, 1.25], [2.0, 0.75]]),
        torch.tensor([[0.0625, 0.5], [0.25, 1.0]]),
    )
    for kl, far in (("forward", ""), ("official", ""), ("forward", "-far")):
        (logits, labels), pairs = cases[far], list(zip(s, sigma.double(), strict=True))
        loss, nll, divergence = reference.elbo(logits, labels, pairs, 1.0, 0.5, 40, kl)
        outputs = {"loss": loss, "nll": nll, "kl": divergence}
        yield Vector(
            f"objective-{kl}{far}", "ELBO", "(4)",
            ["-ln of a softmax that is 0",
             "KL not divided by N", "beta left out", "sum for mean", "KL of one layer only"],
            {"beta": 0.5, "num_examples": 40, "prior_std": 1.0, "kl": kl},
            {"logits": logits, "labels": labels, "s": s, "sigma": sigma.double()},
            {n: Output(tensor(v), 64, abs(v) + 10) for n, v in outputs.items()},
        )  # fmt: skip


# A rise of 3 steps; of 3.5 in binary64; of 28.99... in binary64 and 29 in binary32; of none.
WARMUPS = {"warmup": (50, 0.06), "warmup-part": (50, 0.07), "warmup-below": (100, 0.29),
           "warmup-none": (20, 0.0)}  # fmt: skip


def _schedules() -> Iterator[Vector]:
    for id, (steps, share) in WARMUPS.items():
        factor = tensor([reference.warmup(i, steps, share) for i in range(steps)])
        yield Vector(
            id, "schedules", "linear warm-up and fall",
            ["off by one", "warm-up left out", "rounded to the nearest step", "binary32"],
            {"steps": steps, "warmup": share}, {"step": torch.arange(steps)},
            {"factor": Output(factor, 4, 1.0)},
        )  # fmt: skip
    for examples, batch in ((640, 4), (640, 1), (20, 16), (1, 200)):
        period = reference.kl_period(examples, batch)
        at = list(range(0, 3 * period, max(1, period // 7)))
        weight = tensor([reference.kl_weight(i, period) for i in at])
        yield Vector(
            f"kl-weight-{examples}-{batch}", "schedules", "(7)",
            ["off by one in i", "period", "overflow", "period 0", "2^(M + 1) for 2^(M + 1) - 1"],
            {"num_examples": examples, "batch": batch}, {"step": torch.tensor(at)},
            {"period": Output(torch.tensor(period)),
             "weight": Output(weight, 8, weight.clamp(min=1e-30))},
        )  # fmt: skip


def _predictive() -> Iterator[Vector]:
    cases = {str(draws): _random(800 + draws, draws, 5, 3, times=4) for draws in (1, 7)}
    far = tensor([FAR[:3], FAR[1:]])
    cases["far"] = torch.stack((far, far[[1, 0]], far.flip(1)))
    for name, logits in cases.items():
        expected = {n: tensor(v) for n, v in reference.predictive(logits).items()}
        yield Vector(
            f"predictive-{name}", "predictive", "(8), (9)",
            ["0 ln 0", "softmax without its maximum", "logits averaged",
             "log-probabilities averaged", "entropies exchanged"],
            {}, {"logits": logits}, {n: Output(v, 64, 1.0) for n, v in expected.items()},
        )  # fmt: skip


def _metrics() -> Iterator[Vector]:
    """Exact numbers: powers of two, so that a bin's edge is met and not nearly met."""
    first = tensor([1.0, 0.0, 0.5, 0.75, 0.25, 0.875, 0.625, 1.0])
    probs = torch.stack((first, 1 - first), 1)
    labels = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0])
    safe = probs * 0.5 + 0.25  # no zero under the logarithm
    for bins in (4, 8, 15):
        yield Vector(
            f"ece-{bins}", "metrics", "Prediction: ECE, top-1, equal widths [lo, hi), last closed",
            ["confidence 1 dropped", "edges in the lower bin", "empty bins counted"],
            {"bins": bins}, {"probs": probs, "labels": labels},
            {"ece": Output(tensor(reference.ece(probs, labels, bins)), 16, 1.0)},
        )  # fmt: skip
    logits = _random(950, 60, 4, times=2)
    many, picked = _single(logits.softmax(-1)), (logits + _random(951, 60, 4)).argmax(-1)
    yield Vector(
        "ece-many", "metrics", "Prediction: ECE",
        ["bins weighted alike", "confidence of the label's class"],
        {"bins": 10}, {"probs": many, "labels": picked},
        {"ece": Output(tensor(reference.ece(many, picked, 10)), 64, 1.0)},
    )  # fmt: skip
    # .7 and .9 in binary32 lie below their edges, and their products with 10 round to 7 and 9.
    first = _single(tensor([0.7, 0.7, 0.75, 0.9, 0.9, 0.95, 0.65, 0.85]))
    probs, answers = torch.stack((first, 1 - first), 1), torch.tensor([0, 0, 1, 0, 0, 1, 0, 0])
    yield Vector(
        "ece-edges", "metrics", "Prediction: ECE", ["bins in binary32", "edges in binary32"],
        {"bins": 10}, {"probs": probs, "labels": answers},
        {"ece": Output(tensor(reference.ece(probs, answers, 10)), 16, 1.0)},
    )  # fmt: skip
    scores, positive = tensor([0.5, 0.5, 0.25, 0.75, 1.0, 0.25]), torch.tensor([1, 0, 0, 1, 0, 1])
    yield Vector(
        "auroc", "metrics", "area under the ROC curve, ties count half", ["ties", "reversed"],
        {}, {"scores": scores, "positive": positive},
        {"auroc": Output(tensor(reference.auroc(scores, positive)), 16, 1.0)},
    )  # fmt: skip
    yield Vector(
        "scores", "metrics", "Prediction: accuracy, NLL, Brier summed over classes",
        ["Brier averaged over classes", "sum for mean", "ties to the last class"],
        {}, {"probs": safe, "labels": labels},
        {n: Output(tensor(v), 32, 1.0) for n, v in reference.scores(safe, labels).items()},
    )  # fmt: skip


# --- The model --------------------------------------------------------------------------------


def _llama() -> Iterator[Vector]:
    x, weight = _random(1000, 2, 5, 16), _random(1001, 16)
    y = formulas.norm({"norm.weight": weight}, "norm", x, 1e-5)
    yield Vector(
        "rmsnorm", "llama", "RMSNorm", ["mean subtracted", "eps outside the root"],
        {"eps": 1e-5}, {"x": x, "weight": weight}, {"y": Output(y, 64, y.abs() + 1e-3)},
    )  # fmt: skip
    small = x / 256
    y = formulas.norm({"norm.weight": weight}, "norm", small, 1e-3)
    yield Vector(
        "rmsnorm-small", "llama", "RMSNorm where eps counts", ["eps outside the root", "eps"],
        {"eps": 1e-3}, {"x": small, "weight": weight}, {"y": Output(y, 64, y.abs() + 1e-3)},
    )  # fmt: skip
    ropes = {
        "default": RopeConfig(), "linear": RopeConfig("linear", factor=4.0),
        "llama3": RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 64),
        "llama3-other": RopeConfig("llama3", 10000.0, 4.0, 2.0, 16.0, 256),
    }  # fmt: skip
    for name, rope in ropes.items():
        frequencies = formulas.frequencies(16, rope)
        yield Vector(
            f"rope-{name}", "llama", "RoPE's frequencies", ["base", "scaling left out"],
            {"head_dim": 16, **vars(rope)}, {},
            {"inverse_frequencies": Output(frequencies, 64, frequencies)},
        )  # fmt: skip
        w = {f"{part}_proj.weight": _random(1100 + index, *shape) / 4
             for index, (part, shape) in enumerate(
                 {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}.items())}  # fmt: skip
        q, k, v = (formulas.linear(w, f"{part}_proj", x).unflatten(-1, (-1, 4)) for part in "qkv")
        frequencies = rope.inverse_frequencies(4).double()
        y = formulas.linear(w, "o_proj", formulas.attention(q, k, v, frequencies))
        yield Vector(
            f"attention-{name}", "llama", "causal attention, grouped queries, RoPE half-split",
            ["interleaved pairs", "kv heads repeated in the wrong order", "mask", "no 1/sqrt(h)"],
            {"heads": 4, "kv_heads": 2, "head_dim": 4, **vars(rope)},
            {"x": x, "inverse_frequencies": frequencies, **w},
            {"y": Output(y, 512, float(y.abs().max()))},
        )  # fmt: skip
    w = {f"{part}_proj.weight": _random(1200 + index, *shape) / 4
         for index, (part, shape) in enumerate(
             {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}.items())}  # fmt: skip
    y = formulas.linear(
        w,
        "down_proj",
        formulas.swiglu(*(formulas.linear(w, f"{p}_proj", x) for p in ("gate", "up"))),
    )
    yield Vector(
        "swiglu", "llama", "down(silu(gate x) * up x)", ["gate and up exchanged", "gelu for silu"],
        {}, {"x": x, **w}, {"y": Output(y, 256, float(y.abs().max()))},
    )  # fmt: skip


def _tiny_weights(seed: int, **options: Any) -> tuple[LlamaConfig, Weights]:
    """A configuration, and weights that float32 holds exactly; all norms differ."""
    config = LlamaConfig(20, 8, 12, 2, 4, 2, 4, **{"rms_norm_eps": 1e-5, **options})
    weights = {}
    for index, (name, shape) in enumerate(
        (n, p.shape) for n, p in Llama(config, device="meta").named_parameters()
    ):
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        weights[name] = _random(seed + index, *shape, times=0.25, plus=mean)
    return config, weights


def _shape(config: LlamaConfig) -> dict[str, Any]:
    """The facts that a port needs of a model, flat."""
    return {k: v for k, v in vars(config).items() if isinstance(v, (int, float, bool))}


def _model() -> Iterator[Vector]:
    """A whole tiny model, weights and all: both kinds of head, Qwen2's biases, Qwen3's norms."""
    kinds: dict[str, dict[str, Any]] = {
        "untied": {}, "tied": {"tie_word_embeddings": True},
        "biases": {"qkv_bias": True},
        "head-norms": {"qk_norm": True, "rms_norm_eps": 0.05},
    }  # fmt: skip
    for name, options in kinds.items():
        config, w = _tiny_weights(1300, **options)
        tokens = torch.tensor([[1, 5, 19, 7, 2]])
        head = w["embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
        logits = formulas.llama(w, config, tokens) @ head.T
        yield Vector(
            f"model-{name}", "llama", "logits of a whole model",
            ["norms exchanged", "residual left out", "head not tied", "final norm left out"],
            _shape(config),
            {"tokens": tokens,
             "inverse_frequencies": config.rope.inverse_frequencies(config.head_dim).double(), **w},
            {"logits": Output(logits, 512, float(logits.abs().max()))},
        )  # fmt: skip


def _initialisation() -> Iterator[Vector]:
    """From words to the matrix, and from its SVD, which is given, to the adapter."""
    for layer, rank, d_in, width in ((2, 3, 5, 0.05), (87, 4, 9, 0.5)):
        seed = 2**63 + layer
        uniform = reference.uniforms(seed, layer, rank * d_in + rank)
        kaiming = tensor(reference.kaiming(uniform, rank, d_in))
        U, singular, Vh = torch.linalg.svd(kaiming, full_matrices=False)
        U, singular, Vh = (_single(part) for part in (U, singular, Vh))
        outputs = {
            "kaiming": (kaiming, 1.0), "A": (Vh, 1.0), "B": (torch.zeros(6, rank).double(), 1.0),
            "log_s": (singular.log(), 4.0),
            "log_sigma": (tensor(reference.initial_log_sigma(uniform[rank * d_in :], width)), 4.0),
        }  # fmt: skip
        yield Vector(
            f"initialisation-{layer}", "initialisation", "(2), (3), start",
            ["U for V", "log of a uniform for a uniform log", "B not zero", "fan-in",
             "words of another stream"],
            {"seed": str(seed), "layer": layer, "rank": rank, "d_in": d_in, "d_out": 6,
             "init_sigma": width},
            {"U": U, "singular": singular, "Vh": Vh},
            {name: Output(value, 8, size) for name, (value, size) in outputs.items()},
        )  # fmt: skip
        matrix = _single(kaiming)
        A, s = formulas.thin_svd(matrix)
        yield Vector(
            f"svd-{layer}", "initialisation", "(2), start",
            ["U for V", "singular values in another order than A's rows", "squared", "not thin"],
            {}, {"kaiming": matrix},
            {"identity": Output(A @ A.T, 64, 1.0),
             "gram": Output((A.T * s**2) @ A, 64, float(s.max()) ** 2)},
        )  # fmt: skip


# One step of a run: a batch of three prompts, the adapted layers by noise id, the settings.
STEP_BATCH = {
    "tokens": torch.tensor([[3, 9, 14, 0], [7, 2, 18, 11], [6, 0, 0, 0]]),
    "lengths": torch.tensor([3, 4, 1]),
    "labels": torch.tensor([1, 0, 1]),
    "ids": torch.tensor([11, 4, 9]),
}
STEP_CLASSES = torch.tensor([5, 12])
STEP_LAYERS = {
    "layers.0.attn.q_proj": 0, "layers.0.attn.v_proj": 2,
    "layers.1.attn.q_proj": 8, "layers.1.attn.v_proj": 10, "lm_head": 7,
}  # fmt: skip
STEP_SEED = 2**40 + 5
STEP_SETTINGS: dict[str, Any] = {
    "seed": str(STEP_SEED), "step": 2, "steps": 50, "repeat": 1, "objective": "elbo",
    "kl": "forward", "warmup": 0.1, "num_examples": 12, "lr": 0.01, "variational_lr": 0.05,
    "adam_eps": 1e-6, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "beta": 0.5,
    "prior_std": 1.5, "kl_lr": 0.002, "rank": 2, "scaling": 1.5,
}  # fmt: skip
# Other settings than these, for a constant in their place to show.
STEP_OTHERS: dict[str, Any] = {
    "adam_eps": 0.01, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.03, "warmup": 0.07,
}  # fmt: skip
# Name, settings that differ, options of the model. The official weight of the KL, pi, is 2^-M at
# the start of a round, so its cases are near the end of one: M = 88.
STEP_KINDS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("elbo-forward", {}, {}),
    ("elbo-official", {"kl": "official", **STEP_OTHERS}, {}),
    ("official", {"objective": "official", "kl": "official", "step": 86, "steps": 100}, {}),
    ("official-forward",
     {"objective": "official", "step": 86, "steps": 100, **STEP_OTHERS, "kl_lr": 0.25}, {}),
    ("qwen", {"adam_eps": 0.01}, {"qkv_bias": True, "qk_norm": True, "rms_norm_eps": 0.05}),
    ("three", {"repeat": 3, **STEP_OTHERS}, {}),
)  # fmt: skip


def _training_step(only: str = "") -> Iterator[Vector]:
    """One step of a run, or three: gradients, then AdamW by its formula. only: one case's id."""
    for id, changes, options in STEP_KINDS:
        if only not in ("", f"step-{id}"):
            continue
        config, w = _tiny_weights(1500, **options)
        w["lm_head.weight"] = w["lm_head.weight"][STEP_CLASSES]
        p = {**STEP_SETTINGS, **changes, "layers": STEP_LAYERS}
        p["draw"] = FIRST_TRAINING_DRAW + p["step"]
        trained = _adapter_values(w, p["kl"])
        moments = _adam_moments(trained)
        yield Vector(
            f"step-{id}", "training step", "(1) to (7), AdamW",
            ["bias correction off by one", "decay coupled to the gradient", "KL / N left out",
             "the draw follows the row and not the example", "last token of the padding",
             "dropped Jacobian of exp", "one rate for all", "log sigma not bounded",
             "log sigma bounded above", "log s bounded too"],
            {**p, **_shape(config)},
            {**STEP_BATCH,
             "inverse_frequencies": config.rope.inverse_frequencies(config.head_dim).double(),
             **w, **trained, **moments},
            _after_steps(config, w, {**trained, **moments}, p),
        )  # fmt: skip


def _after_steps(
    config: LlamaConfig, w: Weights, state: Weights, p: dict[str, Any]
) -> dict[str, Output]:
    """Outputs of the last of the steps. What is passed on has the magnitudes of all steps."""
    size: dict[str, Any] = {}
    for _ in range(p["repeat"]):
        found, state = formulas.training_step(config, w, STEP_BATCH, state, p)
        passed = {n: size.get(n, 0.0) if n.startswith("after.") else 0.0 for n in found}
        size = {name: passed[name] + part for name, (_, part) in found.items()}
        p = formulas.next_step(p)
    return {n: Output(v, 64 if n == "kl" else 512, size[n]) for n, (v, _) in found.items()}


def _prediction(only: str = "") -> Iterator[Vector]:
    """From tokens to the averaged probabilities: S draws of a model with adapters, and its mean."""
    config, w = _tiny_weights(1550)
    w["lm_head.weight"] = w["lm_head.weight"][SCALES_CLASSES]
    values = _adapter_values(w, "official")
    for name, samples in (("draws", 4), ("mean", 0)):
        if only not in ("", f"prediction-{name}"):
            continue
        p = {"seed": str(STEP_SEED), "samples": samples, "rank": 2, "scaling": 1.5,
             "layers": STEP_LAYERS}  # fmt: skip
        logits = torch.stack(formulas.predicted_logits(config, w, STEP_BATCH, values, p))
        expected = {n: tensor(v) for n, v in reference.predictive(logits).items()}
        size = float(logits.abs().max())
        yield Vector(
            f"prediction-{name}", "prediction", "(1), (8), (9)",
            ["draws counted from 1", "the draws of training", "one draw for all examples",
             "sigma in the mean model", "logits averaged"],
            {**p, **_shape(config)},
            {**{n: STEP_BATCH[n] for n in ("tokens", "lengths", "ids")},
             "inverse_frequencies": config.rope.inverse_frequencies(config.head_dim).double(),
             **w, **values},
            {"logits": Output(logits, 512, size),
             **{n: Output(v, 512, max(1.0, size)) for n, v in expected.items()}},
        )  # fmt: skip


def _adapter_values(w: Weights, kl: str) -> Weights:
    """A, B, log_s and log_sigma of every adapted layer."""
    values = {}
    for index, (name, part) in enumerate(
        (n, p) for n in STEP_LAYERS for p in ("A", "B", "log_s", "log_sigma")
    ):
        d_out, d_in = w[f"{name}.weight"].shape
        shape = {"A": (2, d_in), "B": (d_out, 2)}.get(part, (2,))
        mean = -1.5 if part == "log_sigma" else 0.0
        values[f"{name}.{part}"] = _random(1600 + index, *shape, times=0.5, plus=mean)
    values["layers.0.attn.v_proj.log_sigma"][1] = 1.0  # log sigma has no upper bound,
    values["layers.0.attn.v_proj.log_s"][1] = -21.0  # and log s no lower one
    if kl == "forward":  # widths below their bound, and less below it than a KL step may bring
        values["lm_head.log_sigma"][0] = -20.5
        values["layers.1.attn.v_proj.log_sigma"][1] = _single(torch.tensor(-20.0 - 1 / 256))
    return values


def _adam_moments(values: Weights) -> Weights:
    """Moments as after some steps: exp_avg and exp_avg_sq of every value."""
    moments = {}
    for index, (name, value) in enumerate(values.items()):
        moments[f"exp_avg.{name}"] = _random(1700 + index, *value.shape) / 16
        second = _random(1800 + index, *value.shape).square() / 64
        moments[f"exp_avg_sq.{name}"] = _single(second)
    return moments


# Laplace in the subspace, (24) to (27).

SUBSPACE_SEED = 2**33 + 17
SCALES_CLASSES = torch.tensor([5, 12, 17])


def _gram(seed: int, rows: int, D: int) -> Tensor:
    """A matrix (D, D) of this rank at most, with eigenvalues >= 0, that float32 holds exactly."""
    factor = (2 * _random(seed, rows, D)).round() / 2
    return factor.T @ factor


def _scales() -> Iterator[Vector]:
    """Logits and their derivatives by the scales, and logits under drawn scales."""
    config, w = _tiny_weights(1900)
    w["lm_head.weight"] = w["lm_head.weight"][SCALES_CLASSES]
    values: Weights = {}
    for index, name in enumerate(STEP_LAYERS):
        d_out, d_in = w[f"{name}.weight"].shape
        values[f"{name}.A"] = _random(2000 + 3 * index, 2, d_in, times=0.5)
        values[f"{name}.B"] = _random(2001 + 3 * index, d_out, 2, times=0.5)
        values[f"{name}.s"] = _single(_random(2002 + 3 * index, 2, times=0.5).exp())
    values["layers.1.attn.v_proj.B"][:, 0] = 0
    p = {"seed": str(SUBSPACE_SEED), "layer": SCALES_LAYER, "samples": 2, "rank": 2,
         "scaling": 1.5, "layers": STEP_LAYERS}  # fmt: skip
    kept = formulas.kept_scales(values, STEP_LAYERS)
    s = torch.cat([values[f"{name}.s"] for name in STEP_LAYERS])
    D, ids = int(kept.sum()), formulas.group_ids(STEP_BATCH)

    def logits_of(scales: Tensor) -> Tensor:  # (B, r layers) -> (B, C)
        return formulas.logits_under(scales, config, w, STEP_BATCH, values, p)

    logits = logits_of(s.expand(3, -1))
    J = formulas.centred(formulas.jacobian(logits_of, s, 3)[..., kept])
    H, precision = _gram(2100, 4, D), _single(_random(2101, D, times=0.5).exp())
    offsets = torch.zeros(2, 3, len(s)).double()
    offsets[..., kept] = formulas.normals(p, ids, D) @ formulas.posterior_root(H, precision).T
    drawn = [logits_of(formulas.moved_scales(s, offset)) for offset in offsets]
    log_probs = torch.stack(drawn).log_softmax(-1)
    yield Vector(
        "scales-model", "subspace", "(25), (27)",
        ["derivative by log s", "one Jacobian for the whole batch", "class mean left in J",
         "scales without effect kept", "one draw for all examples", "transposed or other root",
         "variance of the prior in the directions of H", "last token of the padding"],
        {**p, **_shape(config)},
        {**STEP_BATCH,
         "inverse_frequencies": config.rope.inverse_frequencies(config.head_dim).double(),
         **w, **values, "H": H, "precision": precision},
        {"logits": Output(logits, 512, float(logits.abs().max())),
         "J": Output(J, 512, float(J.abs().max())),
         "log_probs": Output(log_probs, 1024, float(log_probs.abs().max()))},
    )  # fmt: skip


def _curvature() -> Iterator[Vector]:
    for name, N, C, D in (("few", 3, 2, 5), ("many", 7, 4, 6)):
        logits, J = _random(2200 + C, N, C, times=2), _random(2210 + C, N, C, D)
        labels = torch.arange(N) * 3 % C
        p = logits.softmax(-1)
        size = torch.einsum(
            "nci,nck,nkj->ij", J.abs(), torch.diag_embed(p) + p[:, :, None] * p[:, None], J.abs()
        )
        yield Vector(
            f"curvature-{name}", "subspace", "(24)",
            ["p p^T left out", "mean for sum", "blocks or the diagonal of H alone",
             "classes weighted alike"],
            {}, {"logits": logits, "J": J, "labels": labels},
            {"H": Output(formulas.curvature(logits, J, labels), 64, size),
             "log_likelihood": Output(formulas.log_likelihood(logits, labels), 64, 4.0 * N)},
        )  # fmt: skip


def _evidence() -> Iterator[Vector]:
    """H has directions without any data, so that the prior alone decides along them."""
    groups = {"all": [0] * 6, "layers": [0, 0, 1, 1, 1, 2, 2]}
    for index, (name, group) in enumerate(groups.items()):
        D, of = len(group), torch.tensor(group)
        H, scales = _gram(2300 + index, 5, D), _single(_random(2310 + index, D).exp())
        some = (
            tensor([0.0625, 1.0, 24.0])[:, None] * torch.tensor([1.0, 0.5, 4.0])[: max(group) + 1]
        )
        one_hot = torch.nn.functional.one_hot(of).double()
        found = torch.stack([formulas.log_evidence(-9.5, H, scales, row[of]) for row in some])
        size = torch.stack(
            [D + formulas.penalty(scales, row[of]) + formulas.volume(H, row[of]) for row in some]
        )
        best = formulas.best_precision(H, scales, one_hot)
        yield Vector(
            f"evidence-{name}", "subspace", "(26)",
            ["half left out", "determinant of the covariance", "the prior's determinant left out",
             "penalty left out", "one lambda for all", "1 - M for M in the number of scales"],
            {"log_likelihood": -9.5},
            {"H": H, "scales": scales, "group": of, "precision": some},
            {"log_evidence": Output(found, 64, size),
             "best": Output(best, 256, _slack(H, scales, one_hot, best))},
        )  # fmt: skip


def _slack(H: Tensor, scales: Tensor, one_hot: Tensor, best: Tensor) -> Tensor:
    """How far rounding moves the best lambda (G,).

    The evidence's second derivatives by log lambda, times -2. M is good to eps times the largest
    eigenvalue of Lambda^-1/2 H Lambda^-1/2, below 256 in these cases.
    """
    M, squares = formulas.free_shares(H, one_hot @ best), scales.square() @ one_hot
    curved = torch.diag(M.diagonal() @ one_hot + best * squares) - one_hot.T @ (M * M.T) @ one_hot
    return best * torch.linalg.inv(curved).abs().sum(1) * (len(H) + best * squares).sum()


def _gaussian() -> Iterator[Vector]:
    """The linearised logits, drawn and averaged: all directions, and the leading ones."""
    for name, C, D, K, S in (
        ("all", 3, 6, 6, 5),
        ("two-classes", 2, 4, 4, 3),
        ("leading", 4, 7, 2, 4),
    ):
        p = {"seed": str(SUBSPACE_SEED), "layer": LOGITS_LAYER, "samples": S, "directions": K}
        ids = torch.tensor([0, 2**32 - 1, 17, 4])
        H, precision = _gram(2400 + C, D - 1, D), _single(_random(2410 + C, D, times=0.5).exp())
        mean, J = _random(2420 + C, 4, C, times=2), _random(2430 + C, 4, C, D)
        covariance = formulas.logit_covariance(H, precision, J, K)
        size = (J.abs() @ (J.abs() / precision).mT).amax((1, 2))
        eps = formulas.normals(p, formulas.group_ids({"ids": ids}), C)
        logits = formulas.drawn_logits(mean, covariance, eps)
        expected = {n: tensor(x) for n, x in reference.predictive(logits).items()}
        smallest = torch.linalg.eigvalsh(covariance)[:, 0]
        rounded = float(logits.abs().max() + (size / smallest.sqrt()).max())
        outputs = {"log_probs": logits.log_softmax(-1), **expected}
        yield Vector(
            f"gaussian-{name}", "subspace", "(25), (27), (8), (9)",
            ["standard deviation for variance", "correlations of logits left out",
             "Cholesky's root for the symmetric one", "smallest directions kept",
             "directions that are not kept get no variance", "one draw for all examples"],
            p,
            {"H": H, "precision": precision, "mean": mean, "J": J, "ids": ids},
            {"covariance": Output(covariance, 64, size[:, None, None]),
             **{n: Output(x, 64, rounded) for n, x in outputs.items()}},
        )  # fmt: skip


LEVELS: dict[str, tuple[Callable[..., Iterator[Vector]], ...]] = {
    "philox": (_philox,),
    "normals": (_normals,),
    "op": (_op,),  # op forward and op backward
    "KL": (_kl,),
    "ELBO": (_objective,),
    "initialisation": (_initialisation,),
    "schedules": (_schedules,),
    "predictive": (_predictive,),
    "metrics": (_metrics,),
    "llama": (_llama, _model),
    "training step": (_training_step,),
    "prediction": (_prediction,),
    "subspace": (_scales, _curvature, _evidence, _gaussian),
}
SLOW = (_op, _training_step, _prediction)  # they can make one case alone


def vectors() -> list[Vector]:
    """All cases, the same on every machine."""
    return [vector for level in LEVELS for vector in level_of(level)]


def level_of(name: str) -> Iterator[Vector]:
    """The cases of a level of `LEVELS`."""
    for make in LEVELS[name]:
        yield from make()


def one(level: str, id: str) -> Vector:
    """The case of this id."""
    makers = LEVELS[level.split()[0] if level.startswith("op") else level]
    makers = tuple(m for m in makers if id.startswith(m.__name__[1:])) or makers
    cases = (v for make in makers for v in (make(id) if make in SLOW else make()))
    return next(vector for vector in cases if vector.id == id)
