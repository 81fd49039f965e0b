"""The checks of a model's parts: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.model_checks import MODEL_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in MODEL_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "positions of padding": (
        "model.inputs:Inputs.positions", "self.mask.long().cumsum(1) - 1",
        "torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask)",
        "padded caches"),
    "padding is seen": (
        "model.inputs:Inputs.attention_mask", "before & self.mask[:, None, None]", "before",
        "padded caches"),
    "padding is forgotten": (
        "model.inputs:Inputs.check", "self.lengths < T", "self.lengths > T", "padded caches"),
    "one position fewer": (
        "model.inputs:Inputs.check", "self.past + T > limit", "self.past + T >= limit",
        "padded caches"),
    "rows in the order of the draws": (
        "model.inputs:Inputs.for_each_draw", "draws.repeat_interleave(len(self.tokens))",
        "draws.repeat(len(self.tokens))", "padded caches"),
    "ids by place": (
        "model.inputs:Inputs.for_each_draw", "groups=repeated(self.row_groups(), self.draws)",
        "groups=torch.arange(self.draws*len(self.tokens))", "padded caches"),
    "tokens of two rows share a draw": (
        "model.llama:Llama.row_keys", "self.config.max_position_embeddings",
        "self.config.vocab_size", "padded caches"),
    "a window as long as the model": (
        "model.config:LlamaConfig.from_hf", "window < positions", "window <= positions",
        "configurations"),
    "a short window by default": (
        "model.config:_sliding_window", "4096", "16", "configurations"),
    "no bias in Qwen2": (
        "model.config:LlamaConfig.from_hf", 'kind == "qwen2" or bias', "bias", "configurations"),
    "a bias of the output in Qwen2": (
        "model.config:LlamaConfig.from_hf", 'kind != "qwen2" and bias', "bias", "configurations"),
    "null is a number": (
        "model.config:LlamaConfig.from_hf", 'config.get("num_key_value_heads") or heads',
        'config.get("num_key_value_heads", heads)', "configurations"),
    "the inner theta is lost": (
        "model.config:RopeConfig.from_hf",
        'given.get("rope_theta", config.get("rope_theta", 10000.0))',
        'config.get("rope_theta", 10000.0)', "configurations"),
    "the newer key first": (
        "model.config:_rope_values",
        '"rope_scaling" if found["rope_scaling"] else "rope_parameters"',
        '"rope_parameters" if found["rope_parameters"] else "rope_scaling"', "configurations"),
    "the inner length is lost": (
        "model.config:RopeConfig.from_hf",
        'given.get(original, config.get("max_position_embeddings"))',
        'config.get("max_position_embeddings")', "configurations"),
    "written, but another model": (
        "model.config:LlamaConfig.to_hf", "if LlamaConfig.from_hf(values) != self", "if False",
        "configurations"),
    "tokens of a head sorted": (
        "model.config:LlamaConfig.from_dict", "tuple(head_tokens)", "tuple(sorted(head_tokens))",
        "configurations"),
    "blocks share noise": (
        "model.attach:layer_id", "len(TARGETS) * block", "block", "configurations"),
    "the stated dtype is lost": (
        "model.weights:_to_one_dtype", 'names.get(stated, state["embed_tokens.weight"].dtype)',
        'state["embed_tokens.weight"].dtype', "weights"),
    "infinite in 16 bits": (
        "model.weights:_to_one_dtype", "if not is_finite(state[name])", "if False", "weights"),
    "a head of its own is tied": (
        "model.weights:as_stored", "torch.equal(ours, theirs.to(ours.dtype))", "True", "weights"),
    "a head without an embedding": (
        "model.weights:as_stored", "tensors[embedding] = tensors.pop(head)", "pass", "weights"),
    "a tensor too many": (
        "model.weights:_checked", "if name not in expected and", "if False and", "weights"),
    "scales in another dtype": (
        "model.weights:load_model", 'tensor.is_floating_point() and not name.endswith(".scale")',
        "True", "weights"),
    "an older key keeps its dtype": (
        "support.folders:with_dtype", '("dtype", "torch_dtype")', '("dtype",)', "weights"),
    "infinite in float32": (
        "support.tensors:check_tensor", "tensor if dtype is None else tensor.to(dtype)", "tensor",
        "two writers"),
    "one end is finite": (
        "support.tensors:is_finite", "all(bool(", "any(bool(", "two writers"),
    "in the order of names": (
        "support.tensors:write_tensors", "(place(tensors[name].written(dtype)), name)", "name",
        "two writers"),
    "codes in another dtype": (
        "support.tensors:Stored.written", "dtype is None or self.packed", "dtype is None",
        "two writers"),
    "values for bytes": (
        "support.tensors:write_tensors", "progress(part.nbytes)", "progress(part.numel())",
        "two writers"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
