"""Runs to take out and adapters to bring in, which several test files share."""

from __future__ import annotations

import json
import os

import torch

from scalabl_ref import AdapterConfig, Llama, adapters, add_adapters, load_run, save_run
from scalabl_ref.interop.exporting import Trained
from scalabl_ref.interop.importing import import_adapter
from scalabl_ref.support.files import read_json
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..tolerances import logits_bound

LETTERS = [ord(letter) - 33 for letter in "ABC"]  # ids in tiny_folder's tokenizer
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj", "lm_head")
KINDS = {  # settings of every method whose mean is a LoRA
    "scalabl": {},
    "full": {"covariance": "full", "prior": "component"},
    "layer": {"prior": "layer"},
    "mle": {"method": "mle"},
    "map": {"method": "map"},
    "blob": {"method": "blob"},
    "dropout": {"method": "dropout", "dropout": 0.3},
    "tfb": {"method": "tfb"},
}
RANDOM = [kind for kind in KINDS if kind not in ("mle", "map")]
INFO = {"train": {"kl": "forward", "objective": "elbo", "seed": 3, "steps": 7}, "format": "jsonl"}
TOKENS = torch.tensor([[3, 250, 7, 99, 41, 8], [5, 5, 0, 17, 200, 31]])
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def a_run(base, run, trim=True, seed=0, **config):
    """A model on `base` with all adapter parameters random, saved as a run; returns the model."""
    model = Llama.from_pretrained(base)
    if trim:
        model.trim_head(LETTERS)
    settings = {"rank": 3, "alpha": 5.0, "targets": TARGETS, "sampling": "batch", **config}
    add_adapters(model, AdapterConfig(**settings), seed)
    shake(model, seed)
    save_run(run, model, {**INFO, "model": str(base)})
    return model


@torch.no_grad()
def shake(model, seed=0):
    """Random values in every parameter of the adapters, of sizes that matter."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model).values():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def trained(base, run, posterior=None, name=None):
    model, info = load_run(run)
    return Trained(run, model, info, posterior, base, name)


@torch.no_grad()
def merged(base, folder, scaling=None):
    """A plain Llama with the LoRA of a PEFT folder merged by hand, in float64.

    scaling: of a layer, by its name and rank; without it all have the folder's r and lora_alpha.
    """
    config = read_json(folder / "adapter_config.json")
    tensors, _ = load_tensors(folder / "adapter_model.safetensors")
    model = Llama.from_pretrained(base).double()
    if model.tied:
        head = model.embed_tokens.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(head)
    names = {name.rpartition(".lora_")[0] for name in tensors}
    assert len(tensors) == 2 * len(names)
    for name in names:
        ours = name.removeprefix("base_model.model.").removeprefix("model.")
        ours = ours.replace("self_attn", "attn")
        A, B = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        assert A.dtype == B.dtype and len(A) == B.shape[1]
        if scaling is None:
            assert len(A) == config["r"]
            factor = config["lora_alpha"] / config["r"]
        else:
            factor = scaling(ours, len(A))
        model.get_submodule(ours).weight += factor * B @ A
    return model


def bound(model, logits):
    return logits_bound(model.config, logits.abs().max().item())


def assert_equal_logits(model, ours, theirs):
    """ours: of a run, maybe of its answers alone; theirs: of all tokens."""
    head = model.config.head_tokens
    theirs = theirs if head is None else theirs[..., list(head)]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= bound(model, ours)


def bring(base, source, target, kind="peft", options=None, **more):
    """Import and load again; returns the model of the run."""
    import_adapter(kind, source, base, target, options or {}, {"model": str(base)}, **more)
    return load_run(target)[0]


def peft_folder(folder, base, seed=0, rank=3, alpha=5, targets=TARGETS, ranks=None, **values):
    """A folder as PEFT writes it, of random values; ranks: of layers, by their names' ends."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in Llama.from_pretrained(base).named_modules():
        if name.rpartition(".")[2] in targets:
            hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
            ends = (r for end, r in (ranks or {}).items() if hf.endswith(end))
            r, (d_out, d_in) = next(ends, rank), module.weight.shape
            for side, shape in (("A", (r, d_in)), ("B", (d_out, r))):
                value = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{hf}.lora_{side}.weight"] = value
    folder.mkdir()
    save_tensors(folder / "adapter_model.safetensors", tensors.items())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
              "target_modules": list(targets), "bias": "none", "peft_version": "0.21.2",
              "loftq_config": {}, "megatron_core": "megatron.core", **values}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, tensors


def official_state(base, method="scalabl", rows=3, seed=0, rank=2, targets=None):
    """What the official trainer saves: `lora_` entries of PEFT's model with its modules in it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in Llama.from_pretrained(base).named_modules():
        if name.rpartition(".")[2] in (targets or ("q_proj", "v_proj", "lm_head")):
            hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
            d_out, d_in = module.weight.shape
            d_out = rows if name == "lm_head" else d_out

            def new(*shape):
                return 0.3 * torch.randn(shape, generator=generator)

            width = 0.04 + 0.01 * torch.rand(rank, generator=generator)
            A = {
                "scalabl": {
                    "log_s": new(rank),
                    "Vh": new(rank, d_in),
                    "log_s_sigma": new(rank) - 3,
                    "log_p_mu": width.log(),  # not log 1e-8 and log 1: read_official says why
                    "log_p_sigma": (1 + width).log(),
                },
                "blob": {"weight": new(rank, d_in), "lora_A_rho": new(rank, d_in)},
                "mle": {"weight": new(rank, d_in)},
            }[method]
            prefix = f"base_model.model.{hf}.lora_"
            state |= {f"{prefix}A.default.{key}": value for key, value in A.items()}
            state[f"{prefix}B.default.weight"] = new(d_out, rank)
    return state


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)
