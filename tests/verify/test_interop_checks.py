"""The checks of other programs' adapters: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.interop_checks import INTEROP_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in INTEROP_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "scaled by the rank": (
        "interop.peft:_layer_config", "math.sqrt(rank) if", "rank if", "PEFT's settings"),
    "another alpha by default": (
        "interop.peft:_layer_config", 'values.get("lora_alpha", 8)',
        'values.get("lora_alpha", 16)', "PEFT's settings"),
    "a pattern's alternatives": (
        "interop.peft:_by_pattern", "({k})$", "{k}$", "PEFT's settings"),
    "a pattern anywhere": (
        "interop.peft:_by_pattern", "({k})$", "({k})", "PEFT's settings"),
    "layers that are not chosen": (
        "interop.peft:_is_chosen", "return index in (", "return True or (", "PEFT's settings"),
    "settings beyond plain LoRA": (
        "interop.peft:read_peft", "if value and key not in _HARMLESS",
        "if False and key not in _HARMLESS", "PEFT's settings"),
    "other weights were trained": (
        "interop.peft:_check_the_rest", "if not torch.equal(value.to(own), own)", "if False",
        "PEFT's settings"),
    "another vocabulary": (
        "interop.peft:_check_the_rest", "and len(value) != len(own)", "and False",
        "PEFT's settings"),
    "alpha for scaling": (
        "interop.exporting:_write_merged", "trained.config.scaling", "trained.config.alpha",
        "exports"),
    "tied still": (
        "interop.exporting:_write_merged",
        '["embed_tokens.weight"]\n        hf = {**hf, "tie_word_embeddings": False}',
        '["embed_tokens.weight"]', "exports"),
    "rows of the head sorted": (
        "interop.exporting:Trained._lora", "torch.tensor(head)", "torch.tensor(sorted(head))",
        "exports"),
    "members one after another": (
        "interop.exporting:Trained._members", "ensemble.members[i % count]",
        "ensemble.members[i // 2]", "exports"),
    "SWAG's mean for a draw": (
        "interop.exporting:Trained.loras", "swag.mean if noise is None else swag.draw(noise)",
        "swag.mean", "exports"),
    "the dtype of before": (
        "interop.exporting:_write_merged", "with_dtype(hf or config.to_hf(), dtype)",
        "hf or config.to_hf()", "exports"),
    "scaling for alpha": (
        "interop.card:Card._training", "config.scaling * config.rank", "config.scaling",
        "there and back"),
    "the other KL": (
        "interop.exporting:Trained.card", "complexity(self.model, kl)",
        "complexity(self.model, 'official')", "there and back"),
    "alpha by default": (
        "interop.importing:_run_config", '"alpha": theirs.alpha', '"alpha": None',
        "there and back"),
    "the first rows of a head": (
        "interop.importing:start_from", 'values["B"][list(head)]', 'values["B"][: len(head)]',
        "there and back"),
    "the scaling is lost": (
        "interop.importing:start_from", "if alike and config.scaling == other.scaling", "if alike",
        "there and back"),
    "another base": (
        "interop.importing:read_run", 'info["fingerprint"] != fingerprint(model)', "False",
        "there and back"),
    "alpha is r": (
        "interop.official:read_official", "AdapterConfig(method, rank, alpha)",
        "AdapterConfig(method, rank, alpha or rank)", "official states"),
    "letters for labels": (
        "interop.official:_cut_head", "labels or letters(rows)", "letters(rows)",
        "official states"),
    "the other KL by default": (
        "interop.importing:import_adapter", '{"scalabl": "official", "blob": "forward"}',
        '{"scalabl": "forward", "blob": "forward"}', "official states"),
    "no widths for a plain LoRA": (
        "interop.importing:_run_config", 'theirs.method if random else "scalabl"', "theirs.method",
        "official states"),
    "positions by the length": (
        "interop.hf:_begin", "token_groups(ids[:, None], positions, span)",
        "token_groups(ids[:, None], positions, T)", "other models"),
    "ids are lost": (
        "interop.hf:_begin", "call.given.to(rows.device)", "None", "other models"),
    "rows of a cut head sorted": (
        "interop.hf:_cut", "rows = list(classes)", "rows = sorted(classes)", "other models"),
    "labels are not shifted": (
        "interop.hf:Objective.__call__", "labels[:, 1:]", "labels[:, :-1]", "other models"),
    "the whole KL for every batch": (
        "interop.hf:Objective.__call__", "count * self.beta", "self.beta", "other models"),
    "the last token of the padding": (
        "interop.hf:predict", "torch.where(mask, torch.arange(T, device=mask.device), -1).amax(1)",
        "torch.full((B,), T - 1)", "other models"),
    "any base": (
        "interop.hf:load", "if not all(_same", "if not True and all(_same", "other models"),
    "ids token by token": (
        "interop.hf:_Call.groups", "ids.repeat_interleave(self.T)", "ids.repeat(self.T)",
        "other models"),
    "one id for all": (
        "interop.hf:_Call.groups", "torch.arange(self.B, device=x.device)",
        "torch.zeros(self.B).long()", "other models"),
    "places for positions": (
        "interop.hf:_positions", "((mask != 0).long().cumsum(1) - 1).clamp(min=0)[:, -T:]",
        "torch.arange(T)[None]", "other models"),
    "the head as well": (
        "interop.hf:_names", "and m is not head", "", "other models"),
    "two batches of one draw": (
        "interop.hf:_Draws._draw", "step * self.args.gradient_accumulation_steps + self._at[1]",
        "step + self._at[1]", "other models"),
    "batches of one step alike": (
        "interop.hf:_Draws._draw", "place if step == self._at[0] else 0", "0", "other models"),
    "Llama's names are not known": (
        "interop.hf:layer_ids",
        "layer_id(name, target) if target in TARGETS else ELSEWHERE + place", "ELSEWHERE + place",
        "other models"),
    "a truth is a number": (
        "support.fields:_is", "if isinstance(value, bool)", "if False", "files and fields"),
    "infinite is a number": (
        "support.fields:_is", "<= sys.float_info.max", "<= math.inf", "files and fields"),
    "a byte order mark": (
        "support.files:read_json", "utf-8-sig", "utf-8", "files and fields"),
    "half a file": (
        "support.files:atomic_write", "Path(name).unlink(missing_ok=True)",
        "os.replace(name, path)", "files and fields"),
    "lines wait": (
        "support.files:open_log", "line_buffering=True", "line_buffering=False",
        "files and fields"),
    "lines are lost": (
        "support.files:open_log", '"ab"', '"wb"', "files and fields"),
    "programs in pickles": (
        "support.tensors:load_pickle", "weights_only=True", "weights_only=False",
        "files and fields"),
    "the first block": (
        "support.files:sha256", "while block :=", "if block :=", "files and fields"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
