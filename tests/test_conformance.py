"""The kit: what it writes, and that it grades a right port as right and a wrong one as wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from scalabl_ref import (
    InputError,
    LlamaConfig,
    Noise,
    cli,
    kl_forward,
    kl_official,
    metrics,
    philox4x32,
    subspace_lora_linear,
)
from scalabl_ref.checkpoint import load_tensors, save_tensors
from scalabl_ref.conformance import check, export
from scalabl_ref.llama import Llama, RMSNorm, RopeConfig
from scalabl_ref.philox import box_muller
from scalabl_ref.predict import predictive
from scalabl_ref.train import kl_period, kl_weight, warmup_linear

from .conftest import ROOT
from .tolerances import rounding

TENSORS = ("x", "weight", "bias", "A", "B", "s", "sigma")


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit") / "vectors"
    assert export(folder) >= 60
    return folder


def cases(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors, _ = load_tensors(folder / "vectors.safetensors")
    for case in manifest["cases"]:
        yield case, {name: tensors[key] for name, key in case["inputs"].items()}


def op(case, t, dtype, bug):
    """Our fast op in the part of a port; `bug` changes its arguments."""
    p = dict(case["parameters"])
    noise = Noise(int(p["seed"]), p["draw"]) if p["seed"] else None
    leaves = {name: t[name].to(dtype).requires_grad_() for name in TENSORS}
    call = {**leaves, "scaling": p["scaling"], "noise": noise, "layer": p["layer"],
            "sampling": p["sampling"], "groups": t.get("groups")}  # fmt: skip
    y = subspace_lora_linear(**{**call, **bug(call)})
    if "grad_y" not in t:
        return {"y": y.detach()}
    gradients = torch.autograd.grad(
        y, list(leaves.values()), t["grad_y"].to(dtype), materialize_grads=True
    )
    return dict(zip(leaves, gradients, strict=True))


def port(folder, dtype, bug=lambda call: {}, levels=None):
    """Results of the package's fast paths, which share no code with `reference`."""
    out = {}
    for case, t in cases(folder):
        p, level = case["parameters"], case["level"]
        if levels and level not in levels:
            continue
        if level == "philox":
            rows = zip(t["counter"].tolist(), t["key"].tolist(), strict=True)
            result = {"words": torch.tensor([philox4x32(c, k, p["rounds"]) for c, k in rows])}
        elif case["id"] == "box-muller":
            z = [box_muller(a, b) for a, b in t["words"].tolist()]
            result = {"normals": torch.tensor(z, dtype=torch.float64).to(dtype)}
        elif level == "normals":
            eps = Noise(int(p["seed"]), p["draw"]).normal(p["layer"], t["groups"], p["rank"])
            result = {"eps": eps}
        elif level.startswith("op"):
            result = op(case, t, dtype, bug)
        elif level == "KL":
            function = {"forward": kl_forward, "official": kl_official}[p["kl"]]
            result = {"kl": function(t["s"].to(dtype), t["sigma"].to(dtype), p["prior_std"])}
        elif level == "ELBO":
            function = {"forward": kl_forward, "official": kl_official}[p["kl"]]
            nll = F.cross_entropy(t["logits"].to(dtype), t["labels"])
            kl = function(t["s"].flatten(), t["sigma"].flatten(), p["prior_std"])
            result = {"loss": nll + p["beta"] * kl / p["num_examples"], "nll": nll, "kl": kl}
        elif case["id"] == "warmup":
            values = [warmup_linear(i, p["steps"], p["warmup"]) for i in t["step"].tolist()]
            result = {"factor": torch.tensor(values, dtype=torch.float64)}
        elif level == "schedules":
            period = kl_period(p["num_examples"], p["batch"])
            weights = [kl_weight(i, period) for i in t["step"].tolist()]
            result = {"period": torch.tensor(period),
                      "weight": torch.tensor(weights, dtype=torch.float64)}  # fmt: skip
        elif level == "predictive":
            result = predictive(torch.log_softmax(t["logits"].to(dtype), -1))._asdict()
        elif case["id"].startswith("ece"):
            result = {
                "ece": torch.tensor(
                    metrics.ece(t["probs"], t["labels"], p["bins"]), dtype=torch.float64
                )
            }
        elif level == "metrics":
            functions = {"acc": metrics.accuracy, "nll": metrics.nll, "brier": metrics.brier}
            result = {
                n: torch.tensor(f(t["probs"], t["labels"]), dtype=torch.float64)
                for n, f in functions.items()
            }
        elif case["id"] == "rmsnorm":
            norm = RMSNorm(16, p["eps"])
            norm.weight.data = t["weight"].to(dtype)
            result = {"y": norm(t["x"].to(dtype)).detach()}
        elif case["id"].startswith("rope"):
            names = ("kind", "theta", "factor", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings")  # fmt: skip
            rope = RopeConfig(**{name: p[name] for name in names})
            result = {"inverse_frequencies": rope.inverse_frequencies(p["head_dim"])}
        elif case["id"].startswith("model"):
            model = Llama(LlamaConfig(**p)).to(dtype)
            tokens = t.pop("tokens")
            if p["tie_word_embeddings"]:
                t["lm_head.weight"] = t["embed_tokens.weight"]
            model.load_state_dict({n: w.to(dtype) for n, w in t.items()})
            result = {"logits": model(tokens).detach()}
        elif case["id"] == "swiglu":
            w = {n: v.to(dtype) for n, v in t.items()}
            inner = F.silu(w["x"] @ w["gate_proj"].T) * (w["x"] @ w["up_proj"].T)
            result = {"y": inner @ w["down_proj"].T}
        else:
            assert case["id"].startswith("attention"), case["id"]
            result = {"y": attention(p, {n: v.to(dtype) for n, v in t.items()})}
        out.update({f"{case['id']}/{name}": value.contiguous() for name, value in result.items()})
    return out


def attention(p, t):
    """By complex rotation and an explicit softmax, unlike the model's own."""
    rope = RopeConfig(**{k: p[k] for k in vars(RopeConfig())})
    T, h = t["x"].shape[1], p["head_dim"]
    angles = torch.arange(T)[:, None] * rope.inverse_frequencies(h).double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, h / 2)

    def heads(name, count, turned):
        v = (t["x"] @ t[name].T).unflatten(-1, (count, h))  # (B, T, count, h)
        if not turned:
            return v
        a, b = v.double().chunk(2, -1)
        z = torch.complex(a, b) * turn
        return torch.cat((z.real, z.imag), -1).to(v.dtype)

    q, k = heads("q_proj", p["heads"], True), heads("k_proj", p["kv_heads"], True)
    v = heads("v_proj", p["kv_heads"], False)
    group = p["heads"] // p["kv_heads"]
    out = []
    for head in range(p["heads"]):
        scores = q[:, :, head] @ k[:, :, head // group].mT / math.sqrt(h)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ v[:, :, head // group])
    return torch.cat(out, -1) @ t["o_proj"].T


def grade(folder, tmp_path, results, precision="float32"):
    save_tensors(tmp_path / "out.safetensors", results.items())
    return check(folder, tmp_path / "out.safetensors", precision)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_right_port_passes_every_case(kit, tmp_path, precision):
    levels = None
    if precision == "float64":  # frequencies and the noise are of float32, whatever the port
        levels = {"op forward", "op backward", "KL", "ELBO", "schedules", "predictive", "metrics"}
    grades = grade(kit, tmp_path, port(kit, getattr(torch, precision), levels=levels), precision)
    assert [g for g in grades if not g.passed] == []
    total = sum(1 for _ in cases(kit))
    assert len(grades) == total if levels is None else len(grades) > 40


def moved(noise, seed=0, draw=0):
    return noise and Noise(noise.seed + seed, noise.draw + draw)


BUGS = {
    "variance for standard deviation": lambda c: {"sigma": c["sigma"] ** 2},
    "scaling left out": lambda c: {"scaling": 1.0},
    "noise left out": lambda c: {"noise": None},
    "one draw for all": lambda c: {"sampling": "batch"},
    "groups ignored": lambda c: {"groups": None},
    "layer off by one": lambda c: {"layer": c["layer"] + 1},
    "draw off by one": lambda c: {"noise": moved(c["noise"], draw=1)},
    "seed cut to 32 bits": lambda c: {"noise": moved(c["noise"], seed=-(2**63))},
    "bias left out": lambda c: {"bias": 0 * c["bias"]},
    "s detached": lambda c: {"s": c["s"].detach()},
    "sigma detached": lambda c: {"sigma": c["sigma"].detach()},
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_a_port_is_seen(kit, tmp_path, name):
    results = port(kit, torch.float32, BUGS[name], {"op forward", "op backward"})
    assert any(not g.passed for g in grade(kit, tmp_path, results))


def test_the_vectors_in_the_repository_are_these(kit):
    """To the last bit but one: logarithms and exponentials are the machine's."""
    kept = ROOT / "tests" / "vectors"
    assert (kept / "schema.json").read_text() == (kit / "schema.json").read_text()
    identity = [
        [(c["id"], c["parameters"], sorted(c["outputs"])) for c, _ in cases(f)] for f in (kit, kept)
    ]
    assert identity[0] == identity[1]
    ours, theirs = (load_tensors(f / "vectors.safetensors")[0] for f in (kit, kept))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not value.is_floating_point():
            assert torch.equal(value, theirs[name]), name
        else:
            size = value.abs().max().clamp(min=1e-300)
            assert (value - theirs[name]).abs().max() <= rounding(torch.float64, 64) * size, name
    written = [f.stat().st_size for f in kept.iterdir()]
    assert len(written) == 3 and sum(written) < 3_000_000


def test_the_manifest_follows_its_schema(kit):
    """By hand, as far as the schema goes: the package does without a validator."""
    manifest = json.loads((kit / "manifest.json").read_text())
    schema = json.loads((kit / "schema.json").read_text())
    assert set(schema["required"]) == set(manifest)
    case_schema = schema["properties"]["cases"]["items"]
    seen = set()
    for case in manifest["cases"]:
        assert set(case) == set(case_schema["required"]) and case["id"] not in seen
        seen.add(case["id"])
        assert case["catches"] and all(isinstance(c, str) for c in case["catches"])
        for output in case["outputs"].values():
            assert set(output) == {"tensor", "terms", "size"} and output["terms"] >= 0


def test_every_output_is_graded(kit, tmp_path):
    """A thousandth more in any one output fails its case."""
    right = port(kit, torch.float32)
    for name, value in right.items():
        wrong = value + 1 if not value.is_floating_point() else value * 1.001 + 1e-3
        case = name.rsplit("/", 1)[0]
        (result,) = (g for g in grade(kit, tmp_path, {**right, name: wrong}) if g.id == case)
        assert not result.passed, name


def test_what_is_odd_is_named(kit, tmp_path):
    right = port(kit, torch.float32, levels={"op backward"})
    name = next(iter(right))
    missing = {k: v for k, v in right.items() if k != name}
    (bad,) = (g for g in grade(kit, tmp_path, missing) if not g.passed)
    assert bad.problem == f"{name.rsplit('/', 1)[1]} is missing"
    (bad,) = (g for g in grade(kit, tmp_path, {**right, name: right[name][..., :-1].contiguous()})
              if not g.passed)  # fmt: skip
    assert "has shape" in bad.problem
    (bad,) = (g for g in grade(kit, tmp_path, {**right, name: right[name] * math.nan})
              if not g.passed)  # fmt: skip
    assert bad.worst == math.inf
    with pytest.raises(InputError, match="stranger is the result of no case"):
        grade(kit, tmp_path, {**right, "stranger": torch.zeros(1)})
    with pytest.raises(InputError, match="has results for no case"):
        grade(kit, tmp_path, {})
    with pytest.raises(InputError, match="exists already"):
        export(kit)


def test_command(kit, tmp_path, capsys):
    assert cli.main(["conformance", "export", str(tmp_path / "v"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"] >= 60
    for file in ("manifest.json", "schema.json", "vectors.safetensors"):
        assert (tmp_path / "v" / file).read_bytes() == (kit / file).read_bytes()
    results = port(kit, torch.float32, levels={"KL"})
    save_tensors(tmp_path / "o.safetensors", results.items())
    assert cli.main(["conformance", "check", str(kit), str(tmp_path / "o.safetensors")]) == 0
    assert "6 of 6 cases passed" in capsys.readouterr().out
    swapped = {k: results[k.replace("forward", "official")] for k in results if "forward" in k}
    save_tensors(tmp_path / "o.safetensors", swapped.items())
    assert cli.main(["conformance", "check", str(kit), str(tmp_path / "o.safetensors")]) == 1
    assert "KL in the other direction" in capsys.readouterr().out
    assert cli.main(["conformance", "check", str(kit)]) == 2
