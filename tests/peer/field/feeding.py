"""The kit's inputs for other people's modules, and conventions that several of them share."""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import peft
import torch
import transformers
from torch import nn
from torch.func import functional_call

from scalabl_ref import Noise
from scalabl_ref.support.folders import ours_to_hf
from scalabl_ref.verify import reference
from scalabl_ref.verify.vectors import STEP_LAYERS

from ..grade import Case, Difference

INPUTS = ("x", "weight", "bias", "A", "B", "s", "sigma")


# --- The kit's numbers for a program --------------------------------------------------------------


def draw(case: Case, layer: int | None = None, i: int | None = None) -> torch.Tensor:
    """eps (r,) of group 0: what a program gets that asks for one vector for a whole batch."""
    p = case.p
    noise = Noise(int(p.get("seed") or 0), (p.get("draw") or 0) if i is None else i)
    rank = p["rank"] if "rank" in p else len(case.t["s"])
    return noise.normal(p["layer"] if layer is None else layer, 1, rank)[0]


def answered(source: str, values) -> mock._patch:
    """torch's random function of this name answers with these values, one at a time."""
    values = iter(values)

    def take(like, *_, **__):
        value = next(values)
        assert value.shape == like.shape
        return value

    return mock.patch.object(torch, source, take)


def llama(case: Case, w=None, **options) -> nn.Module:
    """transformers' model with the weights of a case; Qwen3's where heads of q and k have norms."""
    p, kind = case.p, "Qwen3" if case.p["qk_norm"] else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        **{n: p[n] for n in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                             "num_attention_heads", "num_key_value_heads", "head_dim",
                             "rms_norm_eps", "tie_word_embeddings")},
        attention_bias=p["qkv_bias"], **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    names = {n.removesuffix(".weight"): v for n, v in case.t.items() if n.endswith(".weight")}
    if "lm_head" in names:  # of the classes alone, in some levels
        model.lm_head = nn.Linear(p["hidden_size"], len(names["lm_head"]), bias=False)
    state = {ours_to_hf(n): v for n, v in case.t.items() if n.endswith((".weight", ".bias"))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    for name in missing:
        assert name.endswith("o_proj.bias") or name == "lm_head.weight", name
        if name.endswith("o_proj.bias"):
            model.get_parameter(name).data.zero_()
    return model


def left_padded(case: Case) -> transformers.BatchEncoding:
    """The batch with its padding before the tokens: these programs read the last column."""
    tokens, lengths = case.t["tokens"], case.t["lengths"].tolist()
    ids, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, n in enumerate(lengths):
        ids[row, len(ids[row]) - n :], mask[row, len(ids[row]) - n :] = tokens[row, :n], 1
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})


def lora(model: nn.Module, rank: int, scaling: float, *targets: str) -> nn.Module:
    """PEFT's LoRA on the layers of these names."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank * scaling, target_modules=list(targets))
    return peft.get_peft_model(model, config)


def one_layer(case: Case) -> nn.Module:
    """A model of one layer of the sizes of an op case, with PEFT's LoRA on it."""
    (d_out, d_in), rank = case.t["weight"].shape, len(case.t["s"])
    linear = nn.Linear(d_in, d_out, bias="bias" in case.t)
    return lora(nn.ModuleDict({"linear": linear}), rank, case.p["scaling"], "linear")


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers by our names."""
    found = {}
    for name in STEP_LAYERS:
        hf = ours_to_hf(f"{name}.weight").removesuffix(".weight")
        found[name] = model.get_submodule(f"base_model.model.{hf}")
    return found


def op(case: Case, layer: nn.Module, names) -> dict[str, torch.Tensor]:
    """y of a layer, or the gradients of the kit's inputs.

    names: from the leaves to the layer's tensors, which take their place.
    """
    leaves = {n: case.t[n].clone().requires_grad_() for n in INPUTS if n in case.t}
    tensors = {"base_layer.weight": leaves["weight"], "lora_B.default.weight": leaves["B"]}
    if "bias" in leaves:
        tensors["base_layer.bias"] = leaves["bias"]
    y = functional_call(layer, {**tensors, **names(leaves)}, leaves["x"])
    if "grad_y" not in case.t:
        return {"y": y}
    gradients = torch.autograd.grad(y, list(leaves.values()), case.t["grad_y"], allow_unused=True)
    return {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}


def as_lora(leaves) -> dict[str, torch.Tensor]:
    """The mean model as a LoRA: its first factor is diag(s) A."""
    return {"lora_A.default.weight": leaves["s"][:, None] * leaves["A"]}


@contextmanager
def uniforms(values, seen: list):
    """Tensor.uniform_ answers with these numbers of (0, 1), in order; `seen` gets the results."""
    values = iter(values)

    def fill(tensor, low=0.0, high=1.0, **_):
        u = torch.tensor([next(values) for _ in range(tensor.numel())], dtype=torch.float64)
        tensor.data.copy_((low + (high - low) * u).reshape(tensor.shape))
        seen.append(tensor.detach().clone())
        return tensor

    with mock.patch.object(torch.Tensor, "uniform_", fill):
        yield


def case_uniforms(case: Case) -> list[float]:
    p = case.p
    return reference.uniforms(int(p["seed"]), p["layer"], p["rank"] * (p["d_in"] + 1))


# --- Differences that several programs share ------------------------------------------------------


def noisy(case: Case) -> bool:
    return case.p["seed"] is not None


def one_draw(case: Case, noise: Noise | None = None) -> dict:
    """The op with the draw of group 0 for all rows."""
    named = {n: case.exact.get(n) for n in INPUTS}
    p = case.p
    noise = noise or Noise(int(p["seed"]), p["draw"])
    about = {"scaling": p["scaling"], "noise": noise, "layer": p["layer"], "sampling": "batch"}
    if "grad_y" not in case.t:
        return {"y": reference.subspace_lora_linear(**named, **about)}
    return reference.subspace_lora_linear_gradients(case.exact["grad_y"], **named, **about)


def other_kl(name: str):
    function = {"forward": reference.kl_forward, "official": reference.kl_official}[name]
    return lambda case: {"kl": function(case.exact["s"], case.exact["sigma"], case.p["prior_std"])}


def plain_sum(kl: str):
    """nll + KL in a direction, neither weighted nor divided."""

    def expected(case: Case) -> dict:
        t, pairs = case.exact, list(zip(case.exact["s"], case.exact["sigma"], strict=True))
        found = reference.elbo(t["logits"], t["labels"], pairs, case.p["prior_std"], 1.0, 1, kl)
        return dict(zip(("loss", "nll", "kl"), found, strict=True))

    return expected


def warmup_by(factor):
    return lambda case: {"factor": [factor(i, case.p) for i in case.t["step"].tolist()]}


def rise_of_a_fraction(step: int, p: dict) -> float:
    rise = p["warmup"] * p["steps"]
    return step / max(1, rise) if step < rise else (p["steps"] - step) / (p["steps"] - rise)


def kind(prefix: str):
    return lambda case: case.id.startswith(prefix)


def ece_by(place):
    """The ECE with another bin of a confidence."""

    def expected(case: Case) -> dict:
        with mock.patch.object(reference, "bin_of", place):
            return {"ece": reference.ece(case.exact["probs"], case.exact["labels"], case.p["bins"])}

    return expected


def single_edges(confidence: float, bins: int) -> int:
    return int((torch.linspace(0, 1, bins + 1) <= confidence).sum()) - 1


LAST_BIN = Difference("metrics", "a confidence of 1 has a bin of its own", kind("ece"),
                      ece_by(lambda confidence, bins: math.floor(confidence * bins)))  # fmt: skip
SINGLE_EDGES = Difference("metrics", "the edges of ECE's bins are float32 numbers",
                          kind("ece-edges"), ece_by(single_edges))  # fmt: skip
NO_ROUNDING = Difference("schedules", "the rise takes warmup times steps steps, not rounded down",
                         kind("warmup"), warmup_by(rise_of_a_fraction))  # fmt: skip
NO_PERIOD = Difference("schedules", "M has no lower bound of 1: ZeroDivisionError where it is 0",
                       kind("kl-weight"), ZeroDivisionError)  # fmt: skip
ONE_DRAW = "one draw for all rows of a call"
