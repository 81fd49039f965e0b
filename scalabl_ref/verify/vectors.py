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

from ..core.adapter import INIT_STREAM, MIN_LOG_SIGMA
from ..core.layer import SAMPLING
from ..core.noise import FIRST_TRAINING_DRAW, Noise
from ..evaluation import metrics
from ..methods.laplace import LOGITS_LAYER
from ..methods.subspace import SCALES_LAYER
from ..model.config import LlamaConfig, RopeConfig
from ..model.llama import Llama
from ..training.schedule import kl_period, kl_weight, warmup_linear
from . import reference
from .checks import Case, sizes, terms
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


def _double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _philox() -> Iterator[Vector]:
    for rounds in (7, 10):
        answers = [answer for answer in philox_answers() if answer.rounds == rounds]
        counters, keys, words = ([a[i] for a in answers] for i in (1, 2, 3))
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
        z = _double([reference.eps_of_group(noise, layer, g, 10) for g in groups.tolist()])
        yield Vector(
            f"noise-{seed % 1000}", "normals", "docs/conformance.md: coordinates to normals",
            ["order of the counter", "seed cut to 32 bits", "a group's rank changes its noise"],
            {"seed": str(seed), "draw": draw, "layer": layer, "rank": 10},
            {"groups": groups},
            {"eps": Output(z, 2, z.abs())},
        )  # fmt: skip


# Leading dimensions, d_in, d_out, rank, scaling, whether there is a bias.
OP_SHAPES = [
    ((4,), 7, 5, 3, 1.5, True),
    ((2, 3), 16, 9, 8, 0.75, False),
    ((3, 1, 2), 33, 20, 5, 2.0, True),
]


def _op() -> Iterator[Vector]:
    """Forward and backward of the layer, for every sampling, with groups, and the mean model."""
    kinds = [(sampling, True, grouped) for grouped in (False, True) for sampling in SAMPLING]
    number = 0
    for lead, d_in, d_out, rank, scaling, biased in OP_SHAPES:
        for sampling, noisy, grouped in [*kinds, ("example", False, False)]:
            number += 1
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
                layer=number,
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
            kind = f"{sampling if noisy else 'mean'}{'-groups' if grouped else ''}-{number}"
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
    }
    for name, (log_s, log_sigma, prior) in points.items():
        s, sigma = _double(log_s), _double(log_sigma)
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
                ["KL in the other direction", "variance for standard deviation", "half left out"],
                {"prior_std": prior, "kl": kl}, {"s": s, "sigma": sigma},
                {"kl": Output(_double(value), 16, magnitude)},
            )  # fmt: skip


def _objective() -> Iterator[Vector]:
    logits, labels = _random(900, 6, 4, times=3), torch.tensor([0, 3, 1, 2, 2, 0])
    s, sigma = (
        _double([[0.5, 1.25], [2.0, 0.75]]),
        torch.tensor([[0.0625, 0.5], [0.25, 1.0]]),
    )
    for kl in ("forward", "official"):
        pairs = list(zip(s, sigma.double(), strict=True))
        loss, nll, divergence = reference.elbo(logits, labels, pairs, 1.0, 0.5, 40, kl)
        outputs = {"loss": loss, "nll": nll, "kl": divergence}
        yield Vector(
            f"objective-{kl}", "ELBO", "(4)",
            ["KL not divided by N", "beta left out", "sum for mean", "KL of one layer only"],
            {"beta": 0.5, "num_examples": 40, "prior_std": 1.0, "kl": kl},
            {"logits": logits, "labels": labels, "s": s, "sigma": sigma.double()},
            {n: Output(_double(v), 64, abs(v) + 10) for n, v in outputs.items()},
        )  # fmt: skip


def _schedules() -> Iterator[Vector]:
    steps = list(range(50))
    factor = _double([warmup_linear(i, 50, 0.06) for i in steps])
    yield Vector(
        "warmup", "schedules", "linear warm-up and fall", ["off by one", "warm-up left out"],
        {"steps": 50, "warmup": 0.06}, {"step": torch.tensor(steps)},
        {"factor": Output(factor, 4, 1.0)},
    )  # fmt: skip
    for examples, batch in ((640, 4), (640, 1), (20, 16)):
        period = kl_period(examples, batch)
        at = list(range(0, 3 * period, max(1, period // 7)))
        weight = _double([kl_weight(i, period) for i in at])
        yield Vector(
            f"kl-weight-{examples}-{batch}", "schedules", "(7)",
            ["off by one in i", "period", "overflow"],
            {"num_examples": examples, "batch": batch}, {"step": torch.tensor(at)},
            {"period": Output(torch.tensor(period)),
             "weight": Output(weight, 8, weight.clamp(min=1e-30))},
        )  # fmt: skip


def _predictive() -> Iterator[Vector]:
    for draws in (1, 7):
        logits = _random(800 + draws, draws, 5, 3, times=4)
        expected = {n: _double(v) for n, v in reference.predictive(logits).items()}
        yield Vector(
            f"predictive-{draws}", "predictive", "(8), (9)",
            ["logits averaged", "log-probabilities averaged", "entropies exchanged"],
            {}, {"logits": logits}, {n: Output(v, 64, 1.0) for n, v in expected.items()},
        )  # fmt: skip


def _metrics() -> Iterator[Vector]:
    """Exact numbers: powers of two, so that a bin's edge is met and not nearly met."""
    first = _double([1.0, 0.0, 0.5, 0.75, 0.25, 0.875, 0.625, 1.0])
    probs = torch.stack((first, 1 - first), 1)
    labels = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0])
    safe = probs * 0.5 + 0.25  # no zero under the logarithm
    for bins in (4, 8, 15):
        yield Vector(
            f"ece-{bins}", "metrics", "Prediction: ECE, top-1, equal widths [lo, hi), last closed",
            ["confidence 1 dropped", "edges in the lower bin", "empty bins counted"],
            {"bins": bins}, {"probs": probs, "labels": labels},
            {"ece": Output(_double(metrics.ece(probs, labels, bins)), 16, 1.0)},
        )  # fmt: skip
    logits = _random(950, 60, 4, times=2)
    many, picked = _single(logits.softmax(-1)), (logits + _random(951, 60, 4)).argmax(-1)
    yield Vector(
        "ece-many", "metrics", "Prediction: ECE",
        ["bins weighted alike", "confidence of the label's class"],
        {"bins": 10}, {"probs": many, "labels": picked},
        {"ece": Output(_double(metrics.ece(many, picked, 10)), 64, 1.0)},
    )  # fmt: skip
    scores, positive = _double([0.5, 0.5, 0.25, 0.75, 1.0, 0.25]), torch.tensor([1, 0, 0, 1, 0, 1])
    yield Vector(
        "auroc", "metrics", "area under the ROC curve, ties count half", ["ties", "reversed"],
        {}, {"scores": scores, "positive": positive},
        {"auroc": Output(_double(metrics.auroc(scores, positive)), 16, 1.0)},
    )  # fmt: skip
    values = {"acc": metrics.accuracy(safe, labels), "nll": metrics.nll(safe, labels),
              "brier": metrics.brier(safe, labels)}  # fmt: skip
    yield Vector(
        "scores", "metrics", "Prediction: accuracy, NLL, Brier summed over classes",
        ["Brier averaged over classes", "sum for mean", "ties to the last class"],
        {}, {"probs": safe, "labels": labels},
        {n: Output(_double(v), 32, 1.0) for n, v in values.items()},
    )  # fmt: skip


# A Llama in plain formulas: the expected outputs of the model do not come from llama.py.

Weights = dict[str, Tensor]


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    bias = w.get(f"{name}.bias")
    return x @ w[f"{name}.weight"].T + (0.0 if bias is None else bias)


def _norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor
) -> Tensor:  # (B, T, H, h), (B, T, K, h) twice, (h / 2,) -> (B, T, H h)
    """Rotation as multiplication of complex numbers, head by head and query by query."""
    B, T, heads, size = q.shape
    angles = torch.arange(T)[:, None] * frequencies.double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, h / 2)

    def rotated(x: Tensor) -> Tensor:
        z = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat((z.real, z.imag), -1)

    q, k, shared = rotated(q), rotated(k), heads // k.shape[2]
    rows = []
    for t in range(T):
        for head in range(heads):
            keys, values = (x[:, : t + 1, head // shared] for x in (k, v))  # (B, t + 1, h)
            scores = (keys @ q[:, t, head, :, None])[..., 0] / math.sqrt(size)
            rows.append((scores.softmax(-1)[:, None] @ values)[:, 0])
    return torch.stack(rows, 1).reshape(B, T, heads * size)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def _plain_llama(
    w: Weights,
    config: LlamaConfig,
    tokens: Tensor,
    linear: Callable[[Weights, str, Tensor], Tensor] = _linear,
) -> Tensor:
    """tokens (B, T) -> normed hidden states (B, T, D). linear: the function of a layer."""
    frequencies, eps = config.rope.inverse_frequencies(config.head_dim), config.rms_norm_eps
    x = w["embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        normed = _norm(w, f"{attn}_norm", x, eps)
        q, k, v = (
            linear(w, f"{attn}.{part}_proj", normed).unflatten(-1, (-1, config.head_dim))
            for part in "qkv"
        )
        if config.qk_norm:
            q, k = _norm(w, f"{attn}.q_norm", q, eps), _norm(w, f"{attn}.k_norm", k, eps)
        x = x + linear(w, f"{attn}.o_proj", _attention(q, k, v, frequencies))
        normed = _norm(w, f"{mlp}_norm", x, eps)
        inner = _swiglu(*(linear(w, f"{mlp}.{part}_proj", normed) for part in ("gate", "up")))
        x = x + linear(w, f"{mlp}.down_proj", inner)
    return _norm(w, "norm", x, eps)


def _llama() -> Iterator[Vector]:
    x, weight = _random(1000, 2, 5, 16), _random(1001, 16)
    y = _norm({"norm.weight": weight}, "norm", x, 1e-5)
    yield Vector(
        "rmsnorm", "llama", "RMSNorm", ["mean subtracted", "eps outside the root"],
        {"eps": 1e-5}, {"x": x, "weight": weight}, {"y": Output(y, 64, y.abs() + 1e-3)},
    )  # fmt: skip
    small = x / 256
    y = _norm({"norm.weight": weight}, "norm", small, 1e-3)
    yield Vector(
        "rmsnorm-small", "llama", "RMSNorm where eps counts", ["eps outside the root", "eps"],
        {"eps": 1e-3}, {"x": small, "weight": weight}, {"y": Output(y, 64, y.abs() + 1e-3)},
    )  # fmt: skip
    ropes = {
        "default": RopeConfig(), "linear": RopeConfig("linear", factor=4.0),
        "llama3": RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 64),
    }  # fmt: skip
    for name, rope in ropes.items():
        frequencies = _frequencies(16, rope)
        yield Vector(
            f"rope-{name}", "llama", "RoPE's frequencies", ["base", "scaling left out"],
            {"head_dim": 16, **vars(rope)}, {},
            {"inverse_frequencies": Output(frequencies, 64, frequencies)},
        )  # fmt: skip
        w = {f"{part}_proj.weight": _random(1100 + index, *shape) / 4
             for index, (part, shape) in enumerate(
                 {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}.items())}  # fmt: skip
        q, k, v = (_linear(w, f"{part}_proj", x).unflatten(-1, (-1, 4)) for part in "qkv")
        frequencies = rope.inverse_frequencies(4).double()
        y = _linear(w, "o_proj", _attention(q, k, v, frequencies))
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
    y = _linear(w, "down_proj", _swiglu(*(_linear(w, f"{p}_proj", x) for p in ("gate", "up"))))
    yield Vector(
        "swiglu", "llama", "down(silu(gate x) * up x)", ["gate and up exchanged", "gelu for silu"],
        {}, {"x": x, **w}, {"y": Output(y, 256, float(y.abs().max()))},
    )  # fmt: skip


def _frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """The angle per token of each pair, (head_dim / 2,), pair by pair."""
    out = []
    for pair in range(head_dim // 2):
        frequency = rope.theta ** (-2 * pair / head_dim)
        if rope.kind == "linear":
            frequency /= rope.factor
        elif rope.kind == "llama3":
            turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)
            if turns < rope.low_freq_factor:
                frequency /= rope.factor
            elif turns < rope.high_freq_factor:
                keep = (turns - rope.low_freq_factor) / (
                    rope.high_freq_factor - rope.low_freq_factor
                )
                frequency = keep * frequency + (1 - keep) * frequency / rope.factor
        out.append(frequency)
    return _double(out)


def _tiny_weights(seed: int, **options: Any) -> tuple[LlamaConfig, Weights]:
    """A configuration, and weights that float32 holds exactly; all norms differ."""
    config = LlamaConfig(20, 8, 12, 2, 4, 2, 4, rms_norm_eps=1e-5, **options)
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
        "biases": {"qkv_bias": True}, "head-norms": {"qk_norm": True},
    }  # fmt: skip
    for name, options in kinds.items():
        config, w = _tiny_weights(1300, **options)
        tokens = torch.tensor([[1, 5, 19, 7, 2]])
        head = w["embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
        logits = _plain_llama(w, config, tokens) @ head.T
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
        seed, stream = 2**63 + layer, INIT_STREAM + layer
        words: list[int] = []
        for j in range(-(-(rank * d_in + rank) // 4)):
            counter = [j, stream % 2**32, 2**32 - 1, stream // 2**32]
            words += reference.philox4x32(counter, [seed % 2**32, seed // 2**32])
        uniform = [(word + 0.5) / 2**32 for word in words[: rank * d_in + rank]]
        kaiming = _double([(2 * u - 1) / math.sqrt(d_in) for u in uniform[: rank * d_in]])
        kaiming = kaiming.reshape(rank, d_in)
        U, singular, Vh = torch.linalg.svd(kaiming, full_matrices=False)
        U, singular, Vh = (_single(part) for part in (U, singular, Vh))
        low = width / math.sqrt(2)
        sigma = [low + (width - low) * u for u in uniform[rank * d_in :]]
        outputs = {
            "kaiming": (kaiming, 1.0), "A": (Vh, 1.0), "B": (torch.zeros(6, rank).double(), 1.0),
            "log_s": (_double([math.log(v) for v in singular.tolist()]), 4.0),
            "log_sigma": (_double([math.log(v) for v in sigma]), 4.0),
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
    "seed": str(STEP_SEED), "warmup": 0.1, "num_examples": 12, "lr": 0.01,
    "variational_lr": 0.05, "adam_eps": 1e-6, "beta1": 0.9, "beta2": 0.999,
    "weight_decay": 0.1, "beta": 0.5, "prior_std": 1.5,
    "kl_lr": 0.002, "rank": 2, "scaling": 1.5,
}  # fmt: skip
# Name, objective, direction of the KL, step, steps, options of the model. The official weight of
# the KL, pi, is 2^-M at the start of a round, so its case is near the end of one: M = 88.
STEP_KINDS: tuple[tuple[str, str, str, int, int, dict[str, Any]], ...] = (
    ("elbo-forward", "elbo", "forward", 2, 50, {}),
    ("elbo-official", "elbo", "official", 2, 50, {}),
    ("official", "official", "official", 86, 100, {}),
    ("qwen", "elbo", "forward", 2, 50, {"qkv_bias": True, "qk_norm": True}),
)


def _training_step() -> Iterator[Vector]:
    """One step of a run, both objectives: gradients, then AdamW by its formula."""
    for id, objective, kl, step, steps, options in STEP_KINDS:
        p = {**STEP_SETTINGS, "step": step, "steps": steps, "draw": FIRST_TRAINING_DRAW + step}
        config, w = _tiny_weights(1500, **options)
        w["lm_head.weight"] = w["lm_head.weight"][STEP_CLASSES]
        trained = _adapter_values(w, kl)
        moments = _adam_moments(trained)
        nll, gradients, logits_size = _nll_and_gradients(config, w, trained, p)
        divergence = _divergence(trained, kl, p["prior_std"])
        share = p["beta"] / p["num_examples"] if objective == "elbo" else 0.0
        if objective == "elbo":
            for name, value in _kl_gradients(trained, kl, p["prior_std"]).items():
                gradients[name] = gradients[name] + share * value
        after, scale = _adamw(trained, moments, gradients, p)
        if objective == "official":
            _sgd_on_the_kl(after, scale, kl, p)
        for name in after:
            if name.endswith("log_sigma"):
                after[name] = after[name].clamp(min=MIN_LOG_SIGMA)
        outputs = {
            "nll": Output(nll, 512, logits_size),
            "kl": Output(_double(divergence), 64, float(divergence)),
            "loss": Output(nll + share * divergence, 512, 1 + share * divergence),
        }
        for name, g in gradients.items():
            outputs[f"gradient.{name}"] = Output(g, 512, _largest(gradients))
            outputs[f"after.{name}"] = Output(after[name], 512, scale[name])
        yield Vector(
            f"step-{id}", "training step", "(1) to (7), AdamW",
            ["bias correction off by one", "decay coupled to the gradient", "KL / N left out",
             "the draw follows the row and not the example", "last token of the padding",
             "dropped Jacobian of exp", "one rate for all", "log sigma not bounded"],
            {**p, "objective": objective, "kl": kl, "layers": STEP_LAYERS, **_shape(config)},
            {**STEP_BATCH,
             "inverse_frequencies": config.rope.inverse_frequencies(config.head_dim).double(),
             **w, **trained, **moments},
            outputs,
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
    if kl == "forward":  # one width below its bound, which the step brings back to it
        values["lm_head.log_sigma"][0] = -20.5
    return values


def _adam_moments(values: Weights) -> Weights:
    """Moments as after some steps: exp_avg and exp_avg_sq of every value."""
    moments = {}
    for index, (name, value) in enumerate(values.items()):
        moments[f"exp_avg.{name}"] = _random(1700 + index, *value.shape) / 16
        second = _random(1800 + index, *value.shape).square() / 64
        moments[f"exp_avg_sq.{name}"] = _single(second)
    return moments


def _nll_and_gradients(
    config: LlamaConfig, w: Weights, trained: Weights, p: dict[str, Any]
) -> tuple[Tensor, Weights, float]:
    """The mean NLL of the batch, its gradient by every value, and the largest logit."""
    labels, ids = STEP_BATCH["labels"], STEP_BATCH["ids"]
    leaves = {name: value.clone().requires_grad_() for name, value in trained.items()}
    noise = Noise(STEP_SEED, p["draw"])
    scales = {}
    for name, layer in STEP_LAYERS.items():
        eps = _double([reference.eps_of_group(noise, layer, id, 2) for id in ids.tolist()])
        scales[name] = leaves[f"{name}.log_s"].exp() + leaves[f"{name}.log_sigma"].exp() * eps
    logits = _class_logits(w, config, leaves, scales, p["scaling"])
    nll = -torch.log_softmax(logits, -1)[torch.arange(3), labels].mean()
    gradients = torch.autograd.grad(nll, list(leaves.values()))
    size = float(logits.detach().abs().max())
    return nll.detach(), dict(zip(trained, gradients, strict=True)), size


def _divergence(values: Weights, kl: str, prior_std: float) -> float:
    slow = {"forward": reference.kl_forward, "official": reference.kl_official}[kl]
    return sum(
        slow(values[f"{n}.log_s"].exp(), values[f"{n}.log_sigma"].exp(), prior_std)
        for n in STEP_LAYERS
    )


def _largest(gradients: Weights) -> float:
    """Of all gradients: a small one that cancels, as q's in an even softmax, rounds as much."""
    return max(float(g.abs().max()) for g in gradients.values())


def _warmed_up(step: int, steps: int) -> float:
    """The share of a rate at this step: a rise over a tenth of the steps, then a fall to 0."""
    rise = steps // 10
    return step / rise if step < rise else (steps - step) / (steps - rise)


def _adamw(
    values: Weights, moments: Weights, gradients: Weights, p: dict[str, Any]
) -> tuple[Weights, Weights]:
    """The values after AdamW's step, and the magnitudes behind them."""
    after, scale, step = {}, {}, p["step"]
    factor, largest = _warmed_up(step, p["steps"]), _largest(gradients)
    for name, g in gradients.items():
        rate = factor * (p["variational_lr"] if ".log_" in name else p["lr"])
        m = 0.9 * moments[f"exp_avg.{name}"] + 0.1 * g
        v = 0.999 * moments[f"exp_avg_sq.{name}"] + 0.001 * g**2
        denominator = (v / (1 - 0.999 ** (step + 1))).sqrt() + p["adam_eps"]
        shrunk = values[name] * (1 - rate * p["weight_decay"])
        after[name] = shrunk - rate * (m / (1 - 0.9 ** (step + 1))) / denominator
        scale[name] = after[name].abs() / 64 + rate * largest / denominator
    return after, scale


def _sgd_on_the_kl(after: Weights, scale: Weights, kl: str, p: dict[str, Any]) -> None:
    """The official objective's second step, in place."""
    step, factor = p["step"], _warmed_up(p["step"], p["steps"])
    period = kl_period(p["num_examples"], len(STEP_BATCH["ids"]))
    rate = factor * p["kl_lr"] * 2.0 ** (step % period + 1) / (2.0 ** (period + 1) - 1)
    for name, value in _kl_gradients(after, kl, p["prior_std"]).items():
        after[name] = after[name] - rate * value
        scale[name] = scale[name] + rate * value.abs()


def _class_logits(
    w: Weights, config: LlamaConfig, leaves: Weights, scales: Weights, scaling: float
) -> Tensor:
    """Logits (B, C) of `STEP_BATCH`; (1) for the layers that `scales` has, s~ (B, r) by rows.

    The matrix of each row of the batch is written out.
    """

    def linear(w: Weights, name: str, x: Tensor) -> Tensor:
        y = _linear(w, name, x)
        if name not in scales:
            return y
        A, B = leaves[f"{name}.A"], leaves[f"{name}.B"]
        return y + torch.stack(
            [x[b] @ (scaling * B @ torch.diag(scales[name][b]) @ A).T for b in range(len(x))]
        )

    hidden = _plain_llama(w, config, STEP_BATCH["tokens"], linear)
    last = torch.stack([hidden[b, n - 1] for b, n in enumerate(STEP_BATCH["lengths"].tolist())])
    return linear(w, "lm_head", last[:, None])[:, 0]


def _kl_gradients(values: dict[str, Tensor], kl: str, prior_std: float) -> dict[str, Tensor]:
    """Derivatives of (5) or (6) by log_s and log_sigma, adapter by adapter, in closed form."""
    out, p2 = {}, prior_std**2
    for name in values:
        if name.endswith(".log_s"):
            width = name.replace("log_s", "log_sigma")
            s2, v2 = ((2 * values[n]).exp() for n in (name, width))
            out[name] = s2 / p2 if kl == "forward" else s2 / v2
            out[width] = v2 / p2 - 1 if kl == "forward" else 1 - (p2 + s2) / v2
    return out


# Laplace in the subspace, (24) to (27), in dense algebra: inverses, determinants, eigenvectors.

SUBSPACE_SEED = 2**33 + 17
SCALES_CLASSES = torch.tensor([5, 12, 17])


def _gram(seed: int, rows: int, D: int) -> Tensor:
    """A matrix (D, D) of this rank at most, with eigenvalues >= 0, that float32 holds exactly."""
    factor = (2 * _random(seed, rows, D)).round() / 2
    return factor.T @ factor


def _whitened(H: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) and eigenvectors (D, D) of Lambda^-1/2 H Lambda^-1/2, smallest first."""
    root = precision.rsqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * H * root)
    return values.clamp(min=0), vectors


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
    kept = torch.cat([(values[f"{name}.B"] != 0).any(0) for name in STEP_LAYERS])
    s = torch.cat([values[f"{name}.s"] for name in STEP_LAYERS])
    D, ids, scaling = int(kept.sum()), STEP_BATCH["ids"], 1.5

    def logits_of(scales: Tensor) -> Tensor:  # (B, r layers) -> (B, C)
        by_layer = dict(zip(STEP_LAYERS, scales.split(2, 1), strict=True))
        return _class_logits(w, config, values, by_layer, scaling)

    logits = logits_of(s.expand(3, -1))
    J = torch.autograd.functional.jacobian(lambda s: logits_of(s.expand(3, -1)), s)[..., kept]
    J = J - J.mean(1, keepdim=True)
    H, precision = _gram(2100, 4, D), _single(_random(2101, D, times=0.5).exp())
    found, U = _whitened(H, precision)
    root = precision.rsqrt()[:, None] * ((U / (1 + found).sqrt()) @ U.T)
    drawn = []
    for draw in range(2):
        noise = Noise(SUBSPACE_SEED, draw)
        eps = [reference.eps_of_group(noise, SCALES_LAYER, id, D) for id in ids.tolist()]
        offset = torch.zeros(3, len(s)).double()
        offset[:, kept] = _double(eps) @ root.T
        drawn.append(logits_of(s + offset).log_softmax(-1))
    log_probs = torch.stack(drawn)
    yield Vector(
        "scales-model", "subspace", "(25), (27)",
        ["derivative by log s", "one Jacobian for the whole batch", "class mean left in J",
         "scales without effect kept", "one draw for all examples", "transposed or other root",
         "variance of the prior in the directions of H", "last token of the padding"],
        {"seed": str(SUBSPACE_SEED), "layer": SCALES_LAYER, "samples": 2, "rank": 2,
         "scaling": scaling, "layers": STEP_LAYERS, **_shape(config)},
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
        H = torch.einsum("nci,nck,nkj->ij", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)
        size = torch.einsum(
            "nci,nck,nkj->ij", J.abs(), torch.diag_embed(p) + p[:, :, None] * p[:, None], J.abs()
        )
        fit = logits.log_softmax(-1)[torch.arange(N), labels].sum()
        yield Vector(
            f"curvature-{name}", "subspace", "(24)",
            ["p p^T left out", "mean for sum", "blocks or the diagonal of H alone",
             "classes weighted alike"],
            {}, {"logits": logits, "J": J, "labels": labels},
            {"H": Output(H, 64, size), "log_likelihood": Output(fit, 64, 4.0 * N)},
        )  # fmt: skip


def _evidence() -> Iterator[Vector]:
    """H has directions without any data, so that the prior alone decides along them."""
    groups = {"all": [0] * 6, "layers": [0, 0, 1, 1, 1, 2, 2]}
    for index, (name, group) in enumerate(groups.items()):
        D, of = len(group), torch.tensor(group)
        H, scales = _gram(2300 + index, 5, D), _single(_random(2310 + index, D).exp())
        some = (
            _double([0.0625, 1.0, 24.0])[:, None] * torch.tensor([1.0, 0.5, 4.0])[: max(group) + 1]
        )
        volume = torch.stack([torch.logdet(torch.diag(precision) + H) - precision.log().sum()
                              for precision in some[:, of]])  # fmt: skip
        penalty = (some[:, of] * scales.square()).sum(1)
        best, slack = _best(H, scales, of)
        yield Vector(
            f"evidence-{name}", "subspace", "(26)",
            ["half left out", "determinant of the covariance", "the prior's determinant left out",
             "penalty left out", "one lambda for all", "1 - M for M in the number of scales"],
            {"log_likelihood": -9.5},
            {"H": H, "scales": scales, "group": of, "precision": some},
            {"log_evidence": Output(-9.5 - (penalty + volume) / 2, 64, D + penalty + volume),
             "best": Output(best, 256, slack)},
        )  # fmt: skip


def _best(H: Tensor, scales: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """lambda (G,) where the evidence is largest, and how far rounding moves it.

    MacKay's fixed point: lambda |s|^2 is the number of scales of the group that data determine.
    """
    one_hot = torch.nn.functional.one_hot(group).double()
    squares, best = scales.square() @ one_hot, torch.ones(one_hot.shape[1]).double()
    for _ in range(10_000):
        M = torch.linalg.inv(torch.eye(len(H)) + H / best[group])  # of Lambda^-1 H, not symmetric
        found = (1 - M.diagonal()) @ one_hot / squares
        moved, best = (found / best - 1).abs().max(), found
        if moved <= 4 * torch.finfo(torch.float64).eps:
            break
    # The evidence's second derivatives by log lambda, times -2. M is good to eps times the largest
    # eigenvalue of Lambda^-1/2 H Lambda^-1/2, below 256 in these cases.
    curved = torch.diag(M.diagonal() @ one_hot + best * squares) - one_hot.T @ (M * M.T) @ one_hot
    size = torch.linalg.inv(curved).abs().sum(1) * (len(H) + best * squares).sum()
    return best, best * size


def _gaussian() -> Iterator[Vector]:
    """The linearised logits, drawn and averaged: all directions, and the leading ones."""
    for name, C, D, K, S in (
        ("all", 3, 6, 6, 5),
        ("two-classes", 2, 4, 4, 3),
        ("leading", 4, 7, 2, 4),
    ):
        ids = torch.tensor([0, 2**32 - 1, 17, 4])
        H, precision = _gram(2400 + C, D - 1, D), _single(_random(2410 + C, D, times=0.5).exp())
        mean, J = _random(2420 + C, 4, C, times=2), _random(2430 + C, 4, C, D)
        values, U = _whitened(H, precision)
        values, U = values[-K:], U[:, -K:]
        inner = torch.eye(D).double() - (U * (values / (1 + values))) @ U.T
        covariance = J @ (precision.rsqrt()[:, None] * inner * precision.rsqrt()) @ J.mT
        size = (J.abs() @ (J.abs() / precision).mT).amax((1, 2))
        v, W = torch.linalg.eigh(covariance)
        root = (W * v.sqrt()[:, None]) @ W.mT
        eps = []
        for draw in range(S):
            noise = Noise(SUBSPACE_SEED, draw)
            eps.append([reference.eps_of_group(noise, LOGITS_LAYER, id, C) for id in ids.tolist()])
        logits = mean + torch.einsum("bcd,sbd->sbc", root, _double(eps))
        expected = {n: _double(x) for n, x in reference.predictive(logits).items()}
        rounded = float(logits.abs().max() + (size / v[:, 0].sqrt()).max())
        outputs = {"log_probs": logits.log_softmax(-1), **expected}
        yield Vector(
            f"gaussian-{name}", "subspace", "(25), (27), (8), (9)",
            ["standard deviation for variance", "correlations of logits left out",
             "Cholesky's root for the symmetric one", "smallest directions kept",
             "directions that are not kept get no variance", "one draw for all examples"],
            {"seed": str(SUBSPACE_SEED), "layer": LOGITS_LAYER, "samples": S, "directions": K},
            {"H": H, "precision": precision, "mean": mean, "J": J, "ids": ids},
            {"covariance": Output(covariance, 64, size[:, None, None]),
             **{n: Output(x, 64, rounded) for n, x in outputs.items()}},
        )  # fmt: skip


LEVELS = (
    _philox,
    _normals,
    _op,
    _kl,
    _objective,
    _initialisation,
    _schedules,
    _predictive,
    _metrics,
    _llama,
    _model,
    _training_step,
    _scales,
    _curvature,
    _evidence,
    _gaussian,
)


def vectors() -> list[Vector]:
    """All cases, the same on every machine."""
    return [vector for level in LEVELS for vector in level()]
