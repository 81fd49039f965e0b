"""The checks of the package in use: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.use_checks import USE_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in USE_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "moments are not restored": (
        "training.trainer:Trainer.restore", "int(index), {})[key] = value", "int(index), {})",
        "continued training"),
    "the collector is not restored": (
        "training.trainer:Trainer.restore", "if self.collector:", "if False:",
        "continued training"),
    "a step is forgotten": (
        "training.trainer:Trainer.restore", "self.done = done", "self.done = done - 1",
        "continued training"),
    "sum for mean in the record": (
        "training.trainer:Trainer._accumulate_nll", "total += nll.item()",
        "total += nll.item() * len(indices)", "records of steps"),
    "accuracy of the last micro-batch": (
        "training.trainer:Trainer._accumulate_nll", "right += ", "right = ", "records of steps"),
    "the rate of the next step": (
        "training.trainer:Trainer.step", "factor = self._factor(step)",
        "factor = self._factor(step + 1)", "records of steps"),
    "a batch twice": (
        "data.batches:TrainingOrder._batches", "bucketed[p * self.batch_size :]",
        "bucketed[max(1, p) * self.batch_size :]", "order of data"),
    "one order for all epochs": (
        "data.batches:TrainingOrder._batches", "_EXAMPLES + epoch", "_EXAMPLES", "order of data"),
    "padding with ones": (
        "data.batches:collate", "row + [0] *", "row + [1] *", "order of data"),
    "draws counted from one": (
        "evaluation.predict:Draws.passes", "self.first + done", "self.first + done + 1",
        "draw by draw"),
    "rows in the order of the batches": (
        "evaluation.predict:predict_all", "torch.argsort(torch.cat(ids))", "torch.arange(len(ids))",
        "draw by draw"),
    "noise by the place in the batch": (
        "core.objective:class_logits", "groups=batch.ids", "groups=None", "draw by draw"),
    "one draw's text": (
        "evaluation.generate:_tokens", "torch.cat(logits)", "torch.cat(logits)[:1]", "text"),
    "temperature of the logarithm's square": (
        "evaluation.generate:warped", "- logs.max()) / temperature",
        "- logs.max()) / temperature**2", "text"),
    "top_p leaves the last token out": (
        "evaluation.generate:warped", "before < top_p", "before + ordered < top_p", "text"),
    "a stop token is written": (
        "evaluation.generate:_tokens", "if chosen in stop:", "if False:", "text"),
    "one token fewer": (
        "evaluation.generate:_room", "return room + 1", "return room", "text"),
    "rounded down": (
        "fast.quantize:quantize", "w.round()", "w.floor()", "quantised weights"),
    "halves of a byte exchanged": (
        "fast.quantize:quantize", "level[:, ::2] | level[:, 1::2] << 4",
        "level[:, 1::2] | level[:, ::2] << 4", "quantised weights"),
    "bias left out": (
        "fast.quantize:_product", "whole(code, factor, d_in, x.dtype), b)",
        "whole(code, factor, d_in, x.dtype), None)", "quantised weights"),
    "thresholds nearer to the higher level": (
        "fast.quantize:quantize", "(low + high) / 2", "(low + 2 * high) / 3", "quantised weights"),
    "slopes of the first columns": (
        "fast.quantize:_Product.backward", "part = codes[:, first:after], scale",
        "part = codes[:, : after - first], scale", "quantised weights"),
    "one group too few": (
        "fast.quantize:_Product.backward", "slice(first // GROUP, -(-after // GROUP))",
        "slice(0, -(-(after - first) // GROUP))", "quantised weights"),
    "one bias for all outputs": (
        "fast.quantize:_product", "bias.to(x.dtype).split(rows)", "itertools.repeat(bias[:1])",
        "quantised weights"),
    "a model that does not say so": (
        "fast.quantize:quantize_model", "model.quantized = kind", "pass", "quantised model"),
    "the best step is not copied": (
        "training.watch:Watch.look", 'value.detach().to("cpu", copy=True)', "value.detach().cpu()",
        "best step"),
    "the last of equal steps, and the worst": (
        "training.watch:Watch.look", "score.nll < self.nll", "score.nll > -self.nll", "best step"),
    "tokens of two rows share ids": (
        "core.noise:token_groups", "groups * span + positions", "groups + positions",
        "draw by draw"),
    "no rank above the tokens of a head": (
        "model.attach:new_adapter", "config.rank > d_out and not head", "config.rank > d_out",
        "cut heads"),
    "a head of sorted tokens": (
        "model.llama:Llama.trim_head", "[list(token_ids)]", "[sorted(token_ids)]",
        "cut heads"),
    "a head in 16 bits": (
        "model.llama:Llama.trim_head", ".float()", ".bfloat16()", "cut heads"),
    "the other scaling is lost": (
        "core.adapter:Adapter.set_lora_", "scaling / self.config.scaling * B", "B",
        "means taken over"),
    "old columns of B stay": (
        "core.adapter:Adapter.set_lora_", "self.B.zero_()[:, :k]", "self.B.fill_(1)[:, :k]",
        "means taken over"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
