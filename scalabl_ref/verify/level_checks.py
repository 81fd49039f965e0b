"""The model, training, prediction and scores of the package, graded by the kit's formulas.

The functions here compute the outputs of the kit's cases as users do: by the model, the trainer and
the metrics. p: the parameters of a case; t: its inputs, on the device, in any float dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..core.adapter import AdapterConfig
from ..core.noise import Noise
from ..core.objective import Batch, class_logits
from ..core.predictive import plain_predict, predictive
from ..data import Encoded
from ..evaluation import metrics
from ..fast.rows import PackedAttention, Rows, packed_context
from ..model.attach import adapters, add_adapters
from ..model.config import LlamaConfig, RopeConfig
from ..model.inputs import Inputs, KVCache
from ..model.llama import MLP, Context, Llama, RMSNorm
from ..training.schedule import kl_period, kl_weight, warmup_linear
from ..training.trainer import TrainConfig, Trainer
from .check import Check, Errors, Op, ratio
from .formulas import Parameters, Weights, tensor
from .vectors import Vector, level_of

# --- Schedules and scores ---------------------------------------------------------------------


def schedule(id: str, p: Parameters, t: Weights) -> Weights:
    steps = t["step"].tolist()
    if id.startswith("warmup"):
        return {"factor": tensor([warmup_linear(i, p["steps"], p["warmup"]) for i in steps])}
    period = kl_period(p["num_examples"], p["batch"])
    return {"period": torch.tensor(period), "weight": tensor([kl_weight(i, period) for i in steps])}


def scores(id: str, p: Parameters, t: Weights) -> Weights:
    if id.startswith("ece"):
        return {"ece": tensor(metrics.ece(t["probs"], t["labels"], p["bins"]))}
    if id == "auroc":
        return {"auroc": tensor(metrics.auroc(t["scores"], t["positive"]))}
    functions = {"acc": metrics.accuracy, "nll": metrics.nll, "brier": metrics.brier}
    return {name: tensor(score(t["probs"], t["labels"])) for name, score in functions.items()}


def averages(id: str, p: Parameters, t: Weights) -> Weights:
    return predictive(torch.log_softmax(t["logits"], -1))._asdict()


# --- The model --------------------------------------------------------------------------------


def load(module: torch.nn.Module, t: Weights) -> None:
    """The tensors that are the module's parameters, every one of them."""
    for name, parameter in dict(module.named_parameters()).items():
        parameter.data = t[name].to(parameter, copy=True)


def rope_of(p: Parameters) -> RopeConfig:
    return RopeConfig(**{name: p[name] for name in vars(RopeConfig())})


def llama(id: str, p: Parameters, t: Weights) -> Weights:
    device = next(iter(t.values())).device if t else torch.device("cpu")
    if id.startswith("rmsnorm"):
        norm = RMSNorm(len(t["weight"]), p["eps"], device=device)
        norm.weight.data = t["weight"].clone()
        return {"y": norm(t["x"])}
    if id.startswith("rope"):
        return {"inverse_frequencies": rope_of(p).inverse_frequencies(p["head_dim"], device)}
    if id.startswith("attention"):
        return {"y": attention(p, t)}
    if id == "swiglu":
        mlp = MLP(LlamaConfig(40, 16, 24, 1, 4, 2, 4)).to(t["x"])
        load(mlp, t)
        return {"y": mlp(t["x"], Context(t["x"], t["x"], None, None))}
    model = Llama(LlamaConfig(**p)).to(t["norm.weight"])
    load(model, t)
    return {"logits": model(t["tokens"])}


def attention(p: Parameters, t: Weights) -> Tensor:
    config = LlamaConfig(40, 16, 24, 1, p["heads"], p["kv_heads"], p["head_dim"], rope=rope_of(p))
    model = Llama(config).to(t["x"])
    layer = cast(torch.nn.Module, model.layers[0].attn)
    load(layer, t)
    B, T = t["x"].shape[:2]
    inputs = Inputs(torch.zeros(B, T, dtype=torch.int64, device=t["x"].device))
    if isinstance(layer, PackedAttention):
        return layer(t["x"], packed_context(model, inputs, Rows(B, T)))
    return layer(t["x"], model.context(inputs, None))


def cached(id: str, p: Parameters, t: Weights) -> Weights:
    """Logits of a model that reads a token, then two, and then the rest."""
    model = Llama(LlamaConfig(**p)).to(t["norm.weight"])
    load(model, t)
    cache, parts = KVCache(p["num_hidden_layers"]), t["tokens"].tensor_split((1, 3), 1)
    with torch.no_grad():
        return {"logits": torch.cat([model(part, cache=cache) for part in parts], 1)}


def adapted(p: Parameters, t: Weights) -> tuple[Llama, Weights]:
    """A model with the case's adapters, and their parameters by the page's names."""
    shape = {k: p[k] for k in vars(LlamaConfig(20, 8, 12, 2, 4, 2, 2)) if k in p}
    model = Llama(LlamaConfig(**shape)).init_random_().trim_head([*range(len(t["lm_head.weight"]))])
    config = AdapterConfig(rank=p["rank"], alpha=p["scaling"] * p["rank"],
                           prior_std=p.get("prior_std", 1.0))  # fmt: skip
    add_adapters(model, config).to(t["lm_head.weight"])
    if {name: adapter.layer for name, adapter in adapters(model).items()} != p["layers"]:
        raise ValueError("the ids of the layers in the noise are not those of the case")
    load(model, {n: t[n.replace(".adapter.", ".")] for n, _ in model.named_parameters()})
    own: Weights = {}
    for name, adapter in adapters(model).items():
        own |= {f"{name}.{part}": value for part, value in adapter.named_parameters()}
    return model, own


# --- Training and prediction ------------------------------------------------------------------


def training_step(id: str, p: Parameters, t: Weights, micro_batch: int | None = None) -> Weights:
    """The trainer itself, given a data set in which the batch's examples have their ids."""
    model, own = adapted(p, t)
    tokens, labels = [[0]] * p["num_examples"], [0] * p["num_examples"]
    for row, example in enumerate(t["ids"].tolist()):
        tokens[example] = t["tokens"][row, : t["lengths"][row]].tolist()
        labels[example] = int(t["labels"][row])
    config = TrainConfig(
        **{k: p[k] for k in ("steps", "lr", "variational_lr", "warmup", "adam_eps", "weight_decay",
                             "objective", "kl", "beta", "kl_lr")},
        batch=len(t["ids"]), seed=int(p["seed"]), micro_batch=micro_batch,
    )  # fmt: skip
    classes = list(range(len(t["lm_head.weight"])))
    trainer = Trainer(model, Encoded(tokens, labels, classes), config, done=p["step"])
    trainer.order.indices = lambda step: t["ids"].tolist()  # type: ignore[method-assign]
    state = trainer.optimizer.state
    for group in trainer.optimizer.param_groups:
        group["betas"] = (p["beta1"], p["beta2"])
    for name, parameter in own.items():
        moments = {m: t[f"{m}.{name}"].to(parameter, copy=True) for m in ("exp_avg", "exp_avg_sq")}
        state[parameter] = {"step": torch.tensor(float(p["step"])), **moments}
    for _ in range(p["repeat"]):
        record = trainer.step()
    out = {name: tensor(record[name]) for name in ("loss", "nll", "kl")}
    for name, parameter in own.items():
        assert parameter.grad is not None
        out[f"gradient.{name}"], out[f"after.{name}"] = parameter.grad, parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            out[f"after.{moment}.{name}"] = state[parameter][moment]
    return out


def prediction(id: str, p: Parameters, t: Weights) -> Weights:
    """Draws through the whole model, and the average that `predict` gives its users."""
    model, _ = adapted(p, t)
    classes = torch.arange(len(t["lm_head.weight"]), device=t["tokens"].device)
    batch = Batch(t["tokens"], t["lengths"], 0 * t["ids"], t["ids"], classes)
    draws: list[Noise | None] = [Noise(int(p["seed"]), i) for i in range(p["samples"])]
    draws = draws or [None]
    with torch.no_grad():
        logits = torch.stack([class_logits(model, batch, noise) for noise in draws])
    return {"logits": logits, **plain_predict(model, batch, p["samples"], int(p["seed"]))._asdict()}


# --- The checks -------------------------------------------------------------------------------


def graded(
    level: str, results: Callable[[str, Parameters, Weights], Weights], *begins: str
) -> Callable[[Op, torch.device], Errors]:
    """Every output of the level's cases, or of those whose ids begin so, in float64."""

    def check(_: Op, device: torch.device) -> Errors:
        for vector in cases_of(level):
            if vector.id.startswith(begins or ("",)):
                t = {name: value.to(device) for name, value in vector.inputs.items()}
                yield from _errors(vector, results(vector.id, vector.parameters, t))

    return check


def _errors(vector: Vector, found: Weights) -> Errors:
    for name, output in vector.outputs.items():
        eps = torch.finfo(torch.float32 if vector.id.startswith("rope") else torch.float64).eps
        size = torch.as_tensor(output.size).double() * output.terms
        got = found[name].detach().cpu()
        yield ratio(got, output.value, size.expand(output.value.shape), eps, f"{vector.id}, {name}")


@functools.cache
def cases_of(level: str) -> tuple[Vector, ...]:
    return tuple(level_of(level))


accumulated = functools.partial(training_step, micro_batch=2)

LEVEL_CHECKS = [
    Check("RoPE", "frequencies: default, linear, llama3", graded("llama", llama, "rope")),
    Check("attention", "grouped heads, positions, the causal mask",
          graded("llama", llama, "attention")),
    Check("model", "RMSNorm, SwiGLU, biases, norms of heads, tied embeddings",
          graded("llama", llama, "rmsnorm", "swiglu", "model")),
    Check("cache", "the model, token by token", graded("llama", cached, "model")),
    Check("training step", "(1) to (7), AdamW, padding", graded("training step", training_step)),
    Check("accumulation", "the step, two examples and then one",
          graded("training step", accumulated)),
    Check("schedules", "warm-up; (7) the weights of the official KL",
          graded("schedules", schedule)),
    Check("prediction", "(8), (9) draws through the model", graded("prediction", prediction)),
    Check("scores", "ECE at the edges of bins, AUROC with ties, NLL, Brier",
          graded("metrics", scores)),
]  # fmt: skip
