"""A tiny batch from its tokens to AdamW's update: plain Python against a step of the Trainer."""

from __future__ import annotations

import math
import re

import pytest
import torch

from scalabl_ref import (
    AdapterConfig,
    Llama,
    LlamaConfig,
    Noise,
    adapters,
    add_adapters,
    philox4x32,
    reference,
)
from scalabl_ref.core import objective
from scalabl_ref.data import Encoded
from scalabl_ref.training.trainer import TrainConfig, Trainer
from tools import one_step

from .tolerances import rounding

TERMS = 64  # roundings in the longest chain of sums, products and functions


@pytest.fixture(scope="module")
def numbers():
    return one_step.walk()


def the_model():
    """The page's model in float64: its block's output projections are 0."""
    shape = LlamaConfig(4, 3, 3, 1, 1, 1, 2, rms_norm_eps=one_step.RMS_EPS)
    model = Llama(shape).init_random_().trim_head(range(3))
    config = AdapterConfig(rank=2, alpha=2 * one_step.SCALING, targets=("lm_head",))
    add_adapters(model, config).double()
    values = {
        "embed_tokens.weight": one_step.EMBEDDING, "norm.weight": one_step.NORM,
        "lm_head.weight": one_step.W,
        **{f"lm_head.adapter.{name}": value for name, value in one_step.TRAINED.items()},
    }  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(torch.tensor(value, dtype=torch.float64))
        for name in ("attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"layers.0.{name}.weight").zero_()
    return model


def the_step(model, monkeypatch):
    """The record of the Trainer's step, and what lm_head took and gave."""
    tokens, labels = [[0]] * one_step.N, [0] * one_step.N
    for row, id in enumerate(one_step.IDS):
        tokens[id] = one_step.TOKENS[row][: one_step.LENGTHS[row]]
        labels[id] = one_step.LABELS[row]
    config = TrainConfig(
        steps=one_step.STEPS, batch=len(one_step.IDS), lr=one_step.LR["A"],
        variational_lr=one_step.LR["log_s"], warmup=0.0, adam_eps=one_step.ADAM_EPS,
        weight_decay=one_step.DECAY, beta=one_step.BETA, seed=one_step.SEED,
    )  # fmt: skip
    trainer = Trainer(model, Encoded(tokens, labels, [0, 1, 2]), config, done=one_step.STEP)
    monkeypatch.setattr(trainer.order, "indices", lambda step: one_step.IDS)
    for parameter in adapters(model)["lm_head"].parameters():
        trainer.optimizer.state[parameter] = {
            "step": torch.tensor(float(one_step.STEP)),
            "exp_avg": torch.full_like(parameter, one_step.M),
            "exp_avg_sq": torch.full_like(parameter, one_step.V),
        }
    seen = {}

    def keep(module, inputs, output):
        seen["x"], seen["y"] = inputs[0].detach(), output.detach()
        output.register_hook(lambda gradient: seen.update(g=gradient))

    handle = model.lm_head.register_forward_hook(keep)
    record = trainer.step()
    handle.remove()
    state = {name: trainer.optimizer.state[p]
             for name, p in adapters(model)["lm_head"].named_parameters()}  # fmt: skip
    return record, seen, state


def close(got, expected) -> bool:
    got, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (got, expected))
    got = got.reshape(expected.shape)
    bound = rounding(torch.float64, TERMS) * expected.abs().max()
    return bool(((got - expected).abs() <= bound).all())


def test_every_number_is_the_packages(numbers, monkeypatch):
    n, model = numbers, the_model()
    adapter = adapters(model)["lm_head"]
    noise = Noise(one_step.SEED, one_step.DRAW)
    assert adapter.layer == one_step.LAYER
    for id, words in zip(one_step.IDS, n["words"], strict=True):
        block = philox4x32([0, id, adapter.layer, noise.draw], [one_step.SEED, 0])
        assert [int(word, 16) for word in words] == list(block[:2])
    assert noise.normal(adapter.layer, torch.tensor(one_step.IDS), 2).tolist() == n["eps"]
    kl = objective.complexity(model)
    record, seen, state = the_step(model, monkeypatch)
    for name in ("x", "y", "g"):
        assert close(seen[name], n[name]), name
    for name in ("loss", "nll", "kl"):
        assert close(record[name], n[name]), name
    assert close(kl.detach(), n["kl"]) and record["lr"] == one_step.LR["A"] * n["factor"]
    for name, parameter in adapter.named_parameters():
        assert close(parameter.grad, n[f"grad {name}"]), name
        assert close(state[name]["exp_avg"], n[f"m {name}"]), name
        assert close(state[name]["exp_avg_sq"], n[f"v {name}"]), name
        assert close(parameter.detach(), n[f"new {name}"]), name


def test_the_layer_is_the_slow_references(numbers):
    """Gradients of the NLL by everything that (1) has, x among them."""
    n = numbers
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in (
        ("x", n["x"]), ("weight", one_step.W), ("A", one_step.TRAINED["A"]),
        ("B", one_step.TRAINED["B"]), ("s", n["s"]), ("sigma", n["sigma"]))}  # fmt: skip
    call = {
        **tensors,
        "bias": None,
        "scaling": one_step.SCALING,
        "layer": one_step.LAYER,
        "noise": Noise(one_step.SEED, one_step.DRAW),
        "groups": torch.tensor(one_step.IDS),
    }
    assert close(reference.subspace_lora_linear(**call), n["y"])
    g = torch.tensor(n["g"], dtype=torch.float64)
    gradients = reference.subspace_lora_linear_gradients(g, **call)
    for name in ("x", "A", "B", "s", "sigma"):
        assert close(gradients[name], n[f"grad {name}"]), name
    logits, labels = torch.tensor(n["y"], dtype=torch.float64), torch.tensor(one_step.LABELS)
    got = reference.elbo(logits, labels, [(tensors["s"], tensors["sigma"])], one_step.PRIOR,
                         one_step.BETA, one_step.N)  # fmt: skip
    for value, name in zip(got, ("loss", "nll", "kl"), strict=True):
        assert close(value, n[name]), name


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])")


def test_the_page_is_what_the_tool_writes():
    """Words exactly; numbers to one unit of the sixth digit, for libraries differ in last bits."""
    kept, made = one_step.PAGE.read_text(encoding="utf-8"), one_step.page()
    assert NUMBER.sub("#", kept) == NUMBER.sub("#", made)
    pairs = list(zip(NUMBER.findall(kept), NUMBER.findall(made), strict=True))
    assert len(pairs) > 200
    for a, b in pairs:
        unit = 10.0 ** (math.floor(math.log10(abs(float(b)))) - 5) if float(b) else 0.0
        assert abs(float(a) - float(b)) <= unit * (1 + 1e-9), (a, b)
    assert "<<" not in kept


def test_the_template_asks_for_every_number(numbers):
    asked = set(re.findall(r"<<(.+?)(?: \d)?>>", one_step.TEMPLATE.read_text(encoding="utf-8")))
    assert asked == numbers.keys() | one_step.given().keys()
