"""The checks of files: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.file_checks import FILE_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in FILE_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "columns for rows": (
        "support.tensors:save_tensors", "tensor.detach()",
        "(tensor.mT.reshape(tensor.shape) if tensor.dim() == 2 else tensor).detach()",
        "tensors on disk"),
    "facts are lost": (
        "support.tensors:save_tensors", "metadata=metadata", "metadata=None", "tensors on disk"),
    "one head_dim for all": (
        "model.config:LlamaConfig.from_hf", 'config.get("head_dim") or config',
        'config.get("head_dim") and 4 or config', "folders of models"),
    "no older name of a RoPE scaling": (
        "model.config:RopeConfig.from_hf", ' or given.get("type")', "", "folders of models"),
    "norms exchanged": (
        "support.folders:hf_to_ours", "_HF_TO_OURS.get(part, part)",
        '{**_HF_TO_OURS, "q_norm": "k_norm", "k_norm": "q_norm"}.get(part, part)',
        "folders of models"),
    "alpha for scaling": (
        "interop.peft:write_peft", "config.lora_alpha", "config.scaling", "LoRAs of PEFT"),
    "a draw of another layer": (
        "core.adapter:SubspaceAdapter.lora_A", "noise.normal(self.layer, 1", "noise.normal(0, 1",
        "LoRAs of PEFT"),
    "the scales of the mean": (
        "core.adapter:SubspaceAdapter.lora_A", "if noise is not None:", "if False:",
        "LoRAs of PEFT"),
    "rows of the head reversed": (
        "training.runs:load_run", "model.trim_head(facts.head_tokens)",
        "model.trim_head(facts.head_tokens[::-1])", "runs on disk"),
    "the prior is not kept": (
        "training.runs:load_run", "AdapterConfig(**facts.adapter)",
        "AdapterConfig(**{**facts.adapter, 'prior_std': 1.0})", "runs on disk"),
    "names from the last to the first": (
        "data.formats:_names", "sorted(found)", "sorted(found)[::-1]", "questions"),
    "names of columns in small letters alone": (
        "data.formats:_column", "name.lower() in usual", "name in usual", "questions"),
    "a part of the layers": (
        "interop.importing:start_from", "own.keys() ^ found.keys()", "found.keys() - own.keys()",
        "LoRAs of PEFT"),
    "cut on the right": (
        "data.batches:_rows", "row[len(row) - (limit - start) :]", "row[start:limit]",
        "questions"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
