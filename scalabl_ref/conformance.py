"""Test vectors for ports: written once, in files that any language reads, and graded here.

    scalabl conformance export DIR          vectors.safetensors, manifest.json, schema.json
    scalabl conformance check DIR OUTPUTS   OUTPUTS: a safetensors file with a port's results

A case has inputs, and outputs that a port computes from them and stores under the same names, as
"<case>/<output>". Inputs are float64 numbers that float32 holds exactly, so that a port may work in
either. An output's bound is terms * eps * size: `terms` roundings of numbers as large as `size`,
the sum of the magnitudes behind it; eps is that of --precision. Where terms is 0 it is exact.
Every case says which equation of docs/method.md it is of and which faults it was made to catch.

Expected values come from `reference`, in loops over float64, wherever that has the formula.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import metrics, reference
from .checkpoint import load_tensors, new_folder, read_json, save_tensors
from .errors import InputError, atomic_write_text
from .llama import MLP, Attention, Context, Llama, LlamaConfig, RMSNorm, RopeConfig
from .noise import NOISE_VERSION, Noise
from .ops import SAMPLING
from .philox import box_muller, philox4x32
from .train import kl_period, kl_weight, warmup_linear
from .verify import Case, sizes, terms

FORMAT = "scalabl-conformance"
VERSION = 1
PRECISIONS = {"float32": 2.0**-23, "float64": 2.0**-52}


class Output(NamedTuple):
    """What a port must compute. size: the magnitudes behind it, value's shape or one for all."""

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


def _random(seed: int, *shape: int) -> Tensor:
    """Standard normals that float32 holds exactly, from the package's own noise."""
    return Noise(seed, 0).normal(0, 1, math.prod(shape)).double().reshape(shape)


def _double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _philox() -> Iterator[Vector]:
    big = 2**32 - 1
    counters = [(0, 0, 0, 0), (big,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    keys = [(0, 0), (big, big), (0xA4093822, 0x299F31D0)]
    for rounds in (7, 10):
        words = [philox4x32(c, k, rounds) for c, k in zip(counters, keys, strict=True)]
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
    z = torch.tensor([box_muller(a, b) for a, b in pairs], dtype=torch.float64)
    yield Vector(
        "box-muller", "normals", "docs/conformance.md, steps 2 to 5",
        ["biased uniform", "sine and cosine exchanged", "quadrants", "degrees of the series"],
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
        z = Noise(seed, draw).normal(layer, groups, 10)
        yield Vector(
            f"noise-{seed % 1000}", "normals", "docs/conformance.md: coordinates to normals",
            ["order of the counter", "seed cut to 32 bits", "a group's rank changes its noise"],
            {"seed": str(seed), "draw": draw, "layer": layer, "rank": 10},
            {"groups": groups},
            {"eps": Output(z.double(), 2, z.double().abs())},
        )  # fmt: skip


OP_SHAPES = [((4,), 7, 5, 3), ((2, 3), 16, 9, 8), ((3, 1, 2), 33, 20, 5)]


def _op() -> Iterator[Vector]:
    """Forward and backward of the layer, for every sampling, with groups, and the mean model."""
    number = 0
    for lead, d_in, d_out, rank in OP_SHAPES:
        for sampling in (*SAMPLING, "groups", "mean"):
            number += 1
            case = Case(
                x=_random(number, *lead, d_in),
                weight=_random(number + 100, d_out, d_in),
                bias=_random(number + 200, d_out),
                A=_random(number + 300, rank, d_in),
                B=_random(number + 400, d_out, rank),
                s=_random(number + 600, rank).exp().float().double(),
                sigma=(_random(number + 700, rank).exp() / 2).float().double(),
                scaling=1.5,
                noise=None if sampling == "mean" else Noise(2**63 + number, number),
                layer=number,
                sampling=next((known for known in SAMPLING if known == sampling), "example"),
                groups=torch.tensor([7, 2**32 - 1, 0, 3][: lead[0]])
                if sampling == "groups"
                else None,
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
                f"op-forward-{number}", "op forward", "(1a)",
                ["variance for standard deviation", "scaling left out or squared", "bias left out",
                 "noise shared where it should not be, or not shared where it should",
                 "A and B exchanged"],
                parameters, inputs, {"y": Output(y, roundings, size["y"])},
            )  # fmt: skip
            gradients = reference.subspace_lora_linear_gradients(grad_y, **vars(case))
            yield Vector(
                f"op-backward-{number}", "op backward", "(1b) to (1e)",
                ["gradient of sigma without eps", "scaling left out",
                 "base's share of grad x left out"],
                parameters, {**inputs, "grad_y": grad_y},
                {name: Output(g, roundings, size[name]) for name, g in gradients.items()},
            )  # fmt: skip


def _kl() -> Iterator[Vector]:
    points = {
        "check": ([0.3, -0.4], [math.log(0.05), math.log(0.2)], 1.0),
        "prior": ([-30.0, -30.0], [0.0, 0.0], 1.0),
        "wide": ([1.0, 0.0, -1.0], [0.5, 0.0, -3.0], 0.25),
    }
    for name, (log_s, log_sigma, prior) in points.items():
        s, sigma = _double(log_s), _double(log_sigma)
        s, sigma = s.exp().float().double(), sigma.exp().float().double()
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
    logits, labels = 3 * _random(900, 6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
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
    for examples, batch in ((640, 4), (20, 16)):
        period = kl_period(examples, batch)
        at = list(range(0, 3 * period, max(1, period // 7)))
        weight = _double([kl_weight(i, period) for i in at])
        yield Vector(
            f"kl-weight-{examples}", "schedules", "(7)", ["off by one in i", "period", "overflow"],
            {"num_examples": examples, "batch": batch}, {"step": torch.tensor(at)},
            {"period": Output(torch.tensor(period)),
             "weight": Output(weight, 8, weight.clamp(min=1e-30))},
        )  # fmt: skip


def _predictive() -> Iterator[Vector]:
    for draws in (1, 7):
        logits = 4 * _random(800 + draws, draws, 5, 3)
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
    values = {"acc": metrics.accuracy(safe, labels), "nll": metrics.nll(safe, labels),
              "brier": metrics.brier(safe, labels)}  # fmt: skip
    yield Vector(
        "scores", "metrics", "Prediction: accuracy, NLL, Brier summed over classes",
        ["Brier averaged over classes", "sum for mean", "ties to the last class"],
        {}, {"probs": safe, "labels": labels},
        {n: Output(_double(v), 32, 1.0) for n, v in values.items()},
    )  # fmt: skip


def _llama() -> Iterator[Vector]:
    x = _random(1000, 2, 5, 16)
    norm = RMSNorm(16, 1e-5).double()
    norm.weight.data = _random(1001, 16)
    yield Vector(
        "rmsnorm", "llama", "RMSNorm", ["mean subtracted", "eps outside the root"],
        {"eps": 1e-5}, {"x": x, "weight": norm.weight.detach()},
        {"y": Output(norm(x).detach(), 64, norm(x).detach().abs() + 1e-3)},
    )  # fmt: skip
    ropes = {
        "default": RopeConfig(), "linear": RopeConfig("linear", factor=4.0),
        "llama3": RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 64),
    }  # fmt: skip
    for name, rope in ropes.items():
        config = LlamaConfig(40, 16, 24, 1, 4, 2, 4, rope=rope)
        frequencies = rope.inverse_frequencies(16).double()
        yield Vector(
            f"rope-{name}", "llama", "RoPE's frequencies", ["base", "scaling left out"],
            {"head_dim": 16, **{k: v for k, v in vars(rope).items()}}, {},
            {"inverse_frequencies": Output(frequencies, 64, frequencies)},
        )  # fmt: skip
        layer = Attention(config, 0).double()
        weights = {}
        for index, part in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            linear = getattr(layer, part)
            linear.weight.data = _random(1100 + index, *linear.weight.shape) / 4
            weights[part] = linear.weight.detach()
        angles = torch.arange(5)[:, None] * rope.inverse_frequencies(4).double().repeat(2)
        context = Context(
            angles.cos()[None, None], angles.sin()[None, None], None, None, None, None
        )
        y = layer(x, context).detach()
        yield Vector(
            f"attention-{name}", "llama", "causal attention, grouped queries, RoPE half-split",
            ["interleaved pairs", "kv heads repeated in the wrong order", "mask", "no 1/sqrt(h)"],
            {"heads": 4, "kv_heads": 2, "head_dim": 4, **vars(rope)}, {"x": x, **weights},
            {"y": Output(y, 512, float(y.abs().max()))},
        )  # fmt: skip
    mlp = MLP(LlamaConfig(40, 16, 24, 1, 4, 2, 4)).double()
    parts = {}
    for index, part in enumerate(("gate_proj", "up_proj", "down_proj")):
        linear = getattr(mlp, part)
        linear.weight.data = _random(1200 + index, *linear.weight.shape) / 4
        parts[part] = linear.weight.detach()
    y = mlp(x, Context(x, x, None, None, None, None)).detach()
    yield Vector(
        "swiglu", "llama", "down(silu(gate x) * up x)", ["gate and up exchanged", "gelu for silu"],
        {}, {"x": x, **parts}, {"y": Output(y, 256, float(y.abs().max()))},
    )  # fmt: skip


def _model() -> Iterator[Vector]:
    """A whole tiny model, weights and all, in both kinds of head."""
    for tied in (False, True):
        config = LlamaConfig(20, 8, 12, 2, 4, 2, 2, tie_word_embeddings=tied, rms_norm_eps=1e-5)
        model = Llama(config).init_random_(0, std=0.3).double()
        tokens = torch.tensor([[1, 5, 19, 7, 2]])
        logits = model(tokens).detach()
        weights = {n: t.float().double() for n, t in model.state_dict().items()}
        if tied:
            del weights["lm_head.weight"]
        shape = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, bool))}
        yield Vector(
            f"model-{'tied' if tied else 'untied'}", "llama", "logits of a whole model",
            ["norms exchanged", "residual left out", "head not tied", "final norm left out"],
            shape, {"tokens": tokens, **weights},
            {"logits": Output(logits, 4096, float(logits.abs().max()))},
        )  # fmt: skip


LEVELS = (
    _philox,
    _normals,
    _op,
    _kl,
    _objective,
    _schedules,
    _predictive,
    _metrics,
    _llama,
    _model,
)


def vectors() -> list[Vector]:
    """All cases, the same on every machine."""
    return [vector for level in LEVELS for vector in level()]


# --- Files ------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Conformance vectors of ScalaBL",
    "type": "object",
    "required": ["format", "version", "noise_version", "cases"],
    "properties": {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "noise_version": {"type": "integer"},
        "cases": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "level", "covers", "catches", "parameters", "inputs", "outputs"],
                "properties": {
                    "id": {"type": "string"},
                    "level": {"type": "string"},
                    "covers": {"type": "string", "description": "equation or section"},
                    "catches": {"type": "array", "items": {"type": "string"}},
                    "parameters": {"type": "object", "description": "64-bit integers as strings"},
                    "inputs": {
                        "description": "name to tensor in vectors.safetensors",
                        "type": "object",
                        "additionalProperties": {"type": "string"},
                    },
                    "outputs": {
                        "type": "object",
                        "additionalProperties": {
                            "type": "object",
                            "required": ["tensor", "terms", "size"],
                            "properties": {
                                "tensor": {"type": "string"},
                                "terms": {"type": "integer", "description": "0: exact"},
                                "size": {"type": ["string", "number"]},
                            },
                        },
                    },
                },
            },
        },
    },
}


def export(folder: Path | str) -> int:
    """Write the vectors to a new folder; returns how many cases there are.

    Raises InputError if there is something at `folder` already.
    """
    tensors: dict[str, Tensor] = {}
    cases = []
    for vector in vectors():
        entry: dict[str, Any] = {
            "id": vector.id, "level": vector.level, "covers": vector.covers,
            "catches": vector.catches, "parameters": vector.parameters, "inputs": {}, "outputs": {},
        }  # fmt: skip
        for name, tensor in vector.inputs.items():
            key = entry["inputs"][name] = f"{vector.id}/in/{name}"
            tensors[key] = tensor
        for name, output in vector.outputs.items():
            key = f"{vector.id}/{name}"
            tensors[key] = output.value
            size: str | float = f"{key}.size"
            if isinstance(output.size, Tensor):
                tensors[f"{key}.size"] = output.size.expand(output.value.shape)
            else:
                size = output.size
            entry["outputs"][name] = {"tensor": key, "terms": output.terms, "size": size}
        cases.append(entry)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "noise_version": NOISE_VERSION,
        "cases": cases,
    }
    with new_folder(folder) as temporary:
        save_tensors(temporary / "vectors.safetensors", tensors.items())
        for name, value in (("manifest.json", manifest), ("schema.json", SCHEMA)):
            atomic_write_text(temporary / name, json.dumps(value, indent=1) + "\n")
    return len(cases)


# --- Grading ----------------------------------------------------------------------------------


class Grade(NamedTuple):
    """worst: the largest error over its bound, of all outputs. problem: what is missing or odd."""

    id: str
    level: str
    covers: str
    catches: list[str]
    worst: float
    problem: str

    @property
    def passed(self) -> bool:
        return not self.problem and self.worst <= 1.0


def check(folder: Path | str, outputs: Path | str, precision: str = "float32") -> list[Grade]:
    """Grade a port's results, case by case.

    outputs: a safetensors file with "<case>/<output>" for the cases that the port does; cases of
    which it has nothing are left out. precision: what the port computed in, float32 or float64.

    Raises InputError for files that are not what they should be, or results for no case at all.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    manifest = read_json(Path(folder) / "manifest.json")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise InputError(f"{folder}: expected vectors of {FORMAT}, version {VERSION}")
    truth, _ = load_tensors(Path(folder) / "vectors.safetensors")
    theirs, _ = load_tensors(Path(outputs))
    known = {o["tensor"] for case in manifest["cases"] for o in case["outputs"].values()}
    for name in theirs:
        if name not in known:
            raise InputError(f"{outputs}: {name} is the result of no case")
    grades = []
    for case in manifest["cases"]:
        if not any(output["tensor"] in theirs for output in case["outputs"].values()):
            continue
        worst, problem = 0.0, ""
        for name, output in case["outputs"].items():
            if output["tensor"] not in theirs:
                problem = problem or f"{name} is missing"
                continue
            size = truth[output["size"]] if isinstance(output["size"], str) else output["size"]
            got, expected = theirs[output["tensor"]], truth[output["tensor"]]
            if got.shape != expected.shape:
                shapes = f"{tuple(got.shape)}, expected {tuple(expected.shape)}"
                problem = problem or f"{name} has shape {shapes}"
                continue
            worst = max(worst, _worst(got, expected, output["terms"] * PRECISIONS[precision], size))
        grades.append(
            Grade(case["id"], case["level"], case["covers"], case["catches"], worst, problem)
        )
    if not grades:
        raise InputError(f"{outputs}: has results for no case")
    return grades


def _worst(got: Tensor, expected: Tensor, relative: float, size: Tensor | float) -> float:
    """Largest error over relative * size; infinite for any difference where that is 0, or NaN."""
    if not expected.is_floating_point() and not got.is_floating_point():
        return 0.0 if torch.equal(got.long(), expected.long()) else math.inf
    error = (got.double() - expected.double()).abs()
    bound = torch.as_tensor(size, dtype=torch.float64) * relative
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(torch.nan_to_num(ratio, nan=math.inf).max()) if ratio.numel() else 0.0
