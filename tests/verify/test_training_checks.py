"""The checks of training: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.training_checks import TRAINING_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in TRAINING_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "one rate for all": (
        "training.trainer:parameter_groups", "4 * lr if", "lr if", "rates"),
    "SWAG's rate times lr": (
        "training.trainer:Trainer._factor", "c.swag_lr / c.lr", "c.swag_lr", "rates"),
    "held too early": (
        "training.schedule:first_held", "int((1 - share) * steps)", "int(share * steps)", "rates"),
    "one weight more": (
        "training.trainer:Trainer.step", "self.done > (1 - c.swag) * c.steps",
        "self.done >= (1 - c.swag) * c.steps", "rates"),
    "ten looks": (
        "training.watch:interval", "steps / 20", "steps / 10", "rates"),
    "gamma is not read": (
        "training.trainer:Trainer._official_kl_step", ", c.kl_gamma)", ")", "rates"),
    "the median": (
        "training.trainer:mean_sigma", "widths.mean()", "widths.median()", "rates"),
    "rows of a short batch count more": (
        "training.trainer:Trainer.step", "len(indices) / min(c.batch, size)", "1.0",
        "gradients of steps"),
    "the KL of a short batch counts more": (
        "training.trainer:Trainer.step", "(weight * c.beta * kl / size).backward()",
        "(c.beta * kl / size).backward()", "gradients of steps"),
    "beta is lost": (
        "training.trainer:Trainer.step", "(weight * c.beta * kl / size).backward()",
        "(weight * kl / size).backward()", "gradients of steps"),
    "KL / B": (
        "training.trainer:Trainer.step", "self.order.indices(step), len(self.data.labels)",
        "self.order.indices(step), c.batch", "gradients of steps"),
    "the NLL's weight is lost": (
        "training.trainer:Trainer._accumulate_nll", "(weight * nll).backward()", "nll.backward()",
        "gradients of steps"),
    "a line twice": (
        "training.loop:_keep_lines", "islice(file, count)", "islice(file, count + 1)",
        "interrupted runs"),
    "no look at the end": (
        "training.watch:Watch.due", " or done == steps", "", "interrupted runs"),
    "the best NLL is forgotten": (
        "training.watch:Watch.restore", 'float(tensors["watch.nll"])', "math.inf",
        "interrupted runs"),
    "other settings": (
        "training.loop:_restore", "if differing", "if False", "interrupted runs"),
    "checkpoints one step early": (
        "training.loop:fit", "due = trainer.done % config.checkpoint_every == 0",
        "due = (trainer.done + 1) % config.checkpoint_every == 0", "interrupted runs"),
    "the last step for the best": (
        "training.loop:fit", "watch.give_back(trainer.model)", "pass", "interrupted runs"),
    "three are kept": (
        "training.savepoints:Saver._write", "[KEPT:]", "[KEPT + 1 :]", "checkpoints"),
    "ordered by name": (
        "training.savepoints:_newest_first", "key=lambda path: int(path.name), ", "",
        "checkpoints"),
    "damage is not seen": (
        "training.savepoints:_read", " or sha256(path) != digest", "", "checkpoints"),
    "the step itself is removed": (
        "training.savepoints:Saver.forget_after", "int(path.name) > step",
        "int(path.name) >= step", "checkpoints"),
    "a later moment": (
        "training.savepoints:Saver.save", 'tensor.detach().to("cpu", copy=True)',
        "tensor.detach()", "checkpoints"),
    "another step's manifest": (
        "training.savepoints:_read", "done != int(folder.name)", "False", "checkpoints"),
    "the last of equal steps": (
        "training.watch:Watch.look", "score.nll < self.nll", "score.nll <= self.nll",
        "parts of ranks"),
    "rows count twice": (
        "training.trainer:Trainer._accumulate_nll", "max(0, own - start)", "len(share)",
        "parts of ranks"),
    "every rank scores all": (
        "training.watch:mean_model_score",
        "batches[distributed.rank() :: distributed.world()] if spread else batches", "batches",
        "parts of ranks"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
