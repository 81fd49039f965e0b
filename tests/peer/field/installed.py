"""transformers, PEFT and bayesian-lora, as they are installed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import transformers
from torch import nn

from ..grade import Difference, Program
from .feeding import (
    as_lora,
    case_uniforms,
    kind,
    layers_of,
    left_padded,
    llama,
    lora,
    noisy,
    one_layer,
    op,
    uniforms,
)

# --- transformers and PEFT ------------------------------------------------------------------------


class Transformers(Program):
    """Its Llama, and Qwen3 where the heads of q and k have norms."""

    def llama(self, case):
        from transformers.models.llama import modeling_llama as theirs

        p, t, name = case.p, case.t, case.id.split("-")[0]
        if name == "model":
            return {"logits": llama(case)(t["tokens"]).logits}
        if name == "rmsnorm":
            module = theirs.LlamaRMSNorm(16, p["eps"])
        else:
            config = self.config(p)
            if name == "rope":
                return {"inverse_frequencies": theirs.LlamaRotaryEmbedding(config).inv_freq}
            make = {"swiglu": theirs.LlamaMLP, "attention": theirs.LlamaAttention}[name]
            module = make(config, *([0] if name == "attention" else []))
        module.load_state_dict({n: t[n] for n in module.state_dict()})
        if name != "attention":
            return {"y": module(t["x"])}
        T = t["x"].shape[1]
        angles = theirs.LlamaRotaryEmbedding(config)(t["x"], torch.arange(T)[None])
        mask = torch.full((T, T), -math.inf).triu(1)[None, None]
        return {"y": module(t["x"], position_embeddings=angles, attention_mask=mask)[0]}

    def config(self, p):
        """Of a layer, with the case's RoPE."""
        rope = {"rope_type": p.get("kind", "default"), "rope_theta": p.get("theta", 1e4)}
        if rope["rope_type"] != "default":
            rope["factor"] = p["factor"]
        if rope["rope_type"] == "llama3":
            names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            rope |= {name: p[name] for name in names}
        return transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_attention_heads=p.get("heads", 4),
            num_key_value_heads=p.get("kv_heads", 2), head_dim=p.get("head_dim", 4),
            rope_parameters=rope, max_position_embeddings=4096, attn_implementation="eager",
        )  # fmt: skip


class Peft(Program):
    """Its LoRA, which can be the mean model."""

    def op_forward(self, case):
        return None if noisy(case) else op(case, one_layer(case).base_model.model.linear, as_lora)

    op_backward = op_forward

    def initialisation(self, case):
        if not case.id.startswith("initialisation"):
            return None
        p, seen = case.p, []
        model = lora(nn.ModuleDict({"linear": nn.Linear(p["d_in"], p["d_out"])}), p["rank"], 1.0,
                     "linear")  # fmt: skip
        layer = model.base_model.model.linear
        with uniforms(case_uniforms(case), seen):
            layer.reset_lora_parameters("default", True)
        return {"kaiming": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}

    def model(self, case, **options):
        """The mean model of a case as a LoRA on transformers' model."""
        t, model = case.t, lora(llama(case, **options), case.p["rank"], case.p["scaling"],
                                "q_proj", "v_proj", "lm_head")  # fmt: skip
        for name, layer in layers_of(model).items():
            s = t[f"{name}.s"] if f"{name}.s" in t else t[f"{name}.log_s"].exp()
            layer.lora_A["default"].weight.data = s[:, None] * t[f"{name}.A"]
            layer.lora_B["default"].weight.data = t[f"{name}.B"]
        return model.eval()

    @torch.no_grad()
    def prediction(self, case):
        if case.p["samples"]:
            return None
        return {"logits": self.model(case)(**left_padded(case)).logits[None, :, -1]}


# --- bayesian-lora --------------------------------------------------------------------------------


def whitened(H, precision):
    """Eigenvalues, smallest first, and eigenvectors of Lambda^-1/2 H Lambda^-1/2."""
    root = precision.rsqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * H * root)
    return values.clamp(min=0), vectors


def added_evidence(case):
    """L + |theta| + ln det / 2, with theta in standard deviations of the prior."""
    t, found = case.exact, []
    for some in t["precision"]:
        precision = some[t["group"]]
        norm = (precision * t["scales"].square()).sum().sqrt()
        volume = whitened(t["H"], precision)[0].log1p().sum()
        found.append(case.p["log_likelihood"] + norm + volume / 2)
    return {"log_evidence": torch.stack(found)}


class BayesianLora(Program):
    """Its Jacobians, its variance and its evidence.

    Its prior has one variance, and its curvature is a Kronecker product. So the scales are measured
    in standard deviations of their prior; one factor is a root of H, and the other is 1.
    """

    def subspace(self, case):
        method = getattr(self, case.id.split("-")[0], None)
        return method and method(case)

    def scales(self, case):
        """The derivative by a scale is that by its row of diag(s) A, times the row of A."""
        from bayesian_lora.main import jacobian_mean

        model = Peft().model(case, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A" in name)
        J, logits = jacobian_mean(model, dict(left_padded(case)),
                                  output_callback=lambda out: out.logits[:, -1])  # fmt: skip
        parts = []
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, layer in layers_of(model).items():
            by_A = J[names[id(layer.lora_A["default"].weight)]]  # (B, C, r, d_in)
            kept = (layer.lora_B["default"].weight != 0).any(0)
            parts.append((by_A * case.t[f"{name}.A"]).sum(-1)[..., kept])
        J = torch.cat(parts, -1)
        return {"logits": logits, "J": J - J.mean(1, keepdim=True)}

    def gaussian(self, case):
        from bayesian_lora.main import variance

        t, K = case.t, case.p["directions"]
        values, vectors = whitened(t["H"], t["precision"])
        root = vectors[:, -K:] * values[-K:].sqrt()
        J = t["J"] / t["precision"].sqrt()
        idle = torch.stack((J, torch.zeros_like(J)), -1)  # it cannot have a rank of 1
        factors = {"lora": (root, torch.eye(2))}
        return {"covariance": variance(SimpleNamespace(input_ids=J), {"lora": idle}, factors,
                                       torch.tensor(1.0), J.shape[1], 2, K, "cpu")}  # fmt: skip

    def evidence(self, case):
        from bayesian_lora import model_evidence

        t, found = case.t, []
        for some in t["precision"]:
            precision = some[t["group"]]
            values, vectors = whitened(t["H"], precision)
            model = nn.ParameterDict({"lora": nn.Parameter(t["scales"] * precision.sqrt())})
            factors = {"lora": (vectors * values.sqrt(), torch.ones(1, 1))}
            found.append(model_evidence(model, torch.tensor(case.p["log_likelihood"]), factors, 1,
                                        len(values), torch.tensor(1.0)))  # fmt: skip
        return {"log_evidence": torch.stack(found)}

    differences = (
        Difference(
            "subspace", "the evidence adds the length of the weights and half the log-determinant, "
            "where (26) subtracts half the squared length and half the log-determinant",
            kind("evidence"), added_evidence,
        ),
    )  # fmt: skip
