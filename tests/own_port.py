"""Our own fast paths in the part of a port: results for the conformance kit's cases.

Expected values come from `reference`, closed forms and float64 models; the code here calls what
users call, and shares none of that.
"""

from __future__ import annotations

import json
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
    philox4x32,
    subspace_lora_linear,
)
from scalabl_ref.core.adapter import Linear, SubspaceAdapter, initial_matrix, initial_values
from scalabl_ref.core.philox import box_muller
from scalabl_ref.data import Encoded
from scalabl_ref.evaluation import metrics
from scalabl_ref.evaluation.predict import predictive
from scalabl_ref.model.llama import MLP, Context, RMSNorm, RopeConfig, Rows
from scalabl_ref.support.tensors import load_tensors
from scalabl_ref.training.trainer import TrainConfig, Trainer, kl_period, kl_weight, warmup_linear

TENSORS = ("x", "weight", "bias", "A", "B", "s", "sigma")


def cases(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors, _ = load_tensors(folder / "vectors.safetensors")
    for case in manifest["cases"]:
        yield case, {name: tensors[key] for name, key in case["inputs"].items()}


def op(case, t, dtype, bug):
    """Our fast op in the part of a port; `bug` changes its arguments."""
    p = dict(case["parameters"])
    noise = Noise(int(p["seed"]), p["draw"]) if p["seed"] else None
    leaves = {name: t[name].to(dtype).requires_grad_() for name in TENSORS if name in t}
    call = {"bias": None, **leaves, "scaling": p["scaling"], "noise": noise, "layer": p["layer"],
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
            result = objective(p, t, dtype)
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
            result = {"ece": double(metrics.ece(t["probs"], t["labels"], p["bins"]))}
        elif case["id"] == "auroc":
            result = {"auroc": double(metrics.auroc(t["scores"], t["positive"]))}
        elif level == "metrics":
            functions = {"acc": metrics.accuracy, "nll": metrics.nll, "brier": metrics.brier}
            result = {n: double(f(t["probs"], t["labels"])) for n, f in functions.items()}
        elif level == "initialisation":
            result = initialisation(p, t)
        elif level == "training step":
            result = training_step(p, t, dtype)
        else:
            assert level == "llama", level
            result = llama(case["id"], p, {n: v.to(dtype) if v.is_floating_point() else v
                                           for n, v in t.items()})  # fmt: skip
        out.update({f"{case['id']}/{n}": v.detach().contiguous() for n, v in result.items()})
    return out


def objective(p, t, dtype):
    """`elbo` on a model whose class logits are given."""
    rank = t["s"].shape[1]
    model = torch.nn.ModuleDict({"q_proj": Linear(rank, rank), "v_proj": Linear(rank, rank)})
    config = AdapterConfig(rank=rank, targets=("q_proj", "v_proj"), prior_std=p["prior_std"])
    for index, adapter in enumerate(adapters(add_adapters(model, config)).values()):
        adapter.log_s.data = t["s"][index].log().to(dtype)
        adapter.log_sigma.data = t["sigma"][index].log().to(dtype)
    logits, batch = t["logits"].to(dtype), SimpleNamespace(labels=t["labels"])
    with mock.patch("scalabl_ref.core.objective.class_logits", lambda *_: logits):
        return elbo(model, batch, None, p["beta"], p["num_examples"], p["kl"])._asdict()


def initialisation(p, t):
    matrix, uniform = initial_matrix(int(p["seed"]), p["layer"], p["rank"], p["d_in"])
    adapter = SubspaceAdapter(p["d_in"], p["d_out"], AdapterConfig(rank=p["rank"]), p["layer"],
                      int(p["seed"]), torch.device("cpu"))  # fmt: skip
    values = initial_values(t["singular"], t["Vh"], uniform, p["init_sigma"])
    return {"kaiming": matrix, "B": adapter.B, **values}


def rope_of(p):
    return RopeConfig(**{name: p[name] for name in vars(RopeConfig())})


def llama(id, p, t):
    if id.startswith("rmsnorm"):
        norm = RMSNorm(16, p["eps"])
        norm.weight.data = t["weight"]
        return {"y": norm(t["x"])}
    if id.startswith("rope"):
        return {"inverse_frequencies": rope_of(p).inverse_frequencies(p["head_dim"])}
    if id.startswith("attention"):
        config = LlamaConfig(40, 16, 24, 1, p["heads"], p["kv_heads"], p["head_dim"],
                             rope=rope_of(p))  # fmt: skip
        model = Llama(config).to(t["x"].dtype)
        layer = model.layers[0].attn
        load(layer, t)
        return {"y": layer(t["x"], model._context(Rows(*t["x"].shape[:2])))}
    if id == "swiglu":
        mlp = MLP(LlamaConfig(40, 16, 24, 1, 4, 2, 4)).to(t["x"].dtype)
        load(mlp, t)
        return {"y": mlp(t["x"], Context(Rows(*t["x"].shape[:2]), t["x"], t["x"]))}
    model = Llama(LlamaConfig(**p)).to(t["norm.weight"].dtype)
    load(model, t)
    return {"logits": model(t["tokens"])}


def load(module, t):
    """The tensors that are the module's parameters, every one of them."""
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        parameter.data = t[name].to(parameter.dtype)


def training_step(p, t, dtype):
    """The trainer itself, given a data set in which the batch's examples have their ids."""
    shape = {k: p[k] for k in vars(LlamaConfig(20, 8, 12, 2, 4, 2, 2)) if k in p}
    classes = list(range(len(t["lm_head.weight"])))
    model = Llama(LlamaConfig(**shape)).init_random_().trim_head(classes)
    add_adapters(model, AdapterConfig(rank=p["rank"], alpha=p["scaling"] * p["rank"],
                                      prior_std=p["prior_std"]))  # fmt: skip
    model.to(dtype)
    own = {f"{n}.{k}": v for n, a in adapters(model).items() for k, v in a.named_parameters()}
    layers = {n: a.layer for n, a in adapters(model).items()}
    assert layers == p["layers"]
    for name, parameter in model.named_parameters():
        parameter.data = t[name.replace(".adapter.", ".")].to(dtype)
    tokens, labels = [[0]] * p["num_examples"], [0] * p["num_examples"]
    for row, id in enumerate(t["ids"].tolist()):
        tokens[id] = t["tokens"][row, : t["lengths"][row]].tolist()
        labels[id] = int(t["labels"][row])
    config = TrainConfig(
        **{k: p[k] for k in ("steps", "lr", "variational_lr", "warmup", "adam_eps", "weight_decay",
                             "objective", "kl", "beta", "kl_lr")},
        batch=len(t["ids"]), seed=int(p["seed"]),
    )  # fmt: skip
    trainer = Trainer(model, Encoded(tokens, labels, classes), config, done=p["step"])
    trainer.order.indices = lambda step: t["ids"].tolist()
    for name, parameter in own.items():
        trainer.optimizer.state[parameter] = {
            "step": torch.tensor(float(p["step"])),
            "exp_avg": t[f"exp_avg.{name}"].to(dtype),
            "exp_avg_sq": t[f"exp_avg_sq.{name}"].to(dtype),
        }
    record = trainer.step()
    out = {name: double(record[name]) for name in ("loss", "nll", "kl")}
    for name, parameter in own.items():
        out[f"gradient.{name}"], out[f"after.{name}"] = parameter.grad, parameter
    return out


def double(value):
    return torch.tensor(value, dtype=torch.float64)
