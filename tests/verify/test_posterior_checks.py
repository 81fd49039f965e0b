"""The checks of posteriors by their options: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.posterior_checks import POSTERIOR_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in POSTERIOR_CHECKS}


LAPLACE, SUBSPACE = "methods.laplace:", "methods.subspace:"
# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "the first layer for the last": (
        LAPLACE + "_chosen", "dict([own.popitem()])", "dict([next(iter(own.items()))])",
        "Laplace, parts"),
    "the variance for the precision": (
        LAPLACE + "Laplace.fit", ".config.sigma_p ** -2", ".config.sigma_p ** 2",
        "Laplace, parts"),
    "the last batch's likelihood": (
        LAPLACE + "Laplace.fit", "log_likelihood +=", "log_likelihood =", "Laplace, parts"),
    "F of the first rows": (
        LAPLACE + "_Joint.add", "self.rows = []", "self.moments.sum.zero_()", "Laplace, parts"),
    "the precision that was kept": (
        LAPLACE + "Laplace.log_evidence", "if precision is None else precision", "",
        "Laplace, parts"),
    "the smallest directions": (
        LAPLACE + "_Moments.add", "(U * S)[:, : self.rank]", "(U * S)[:, -self.rank :]",
        "Laplace, cut"),
    "roots of singular values": (
        LAPLACE + "_Moments.eigen", "singular.square()", "singular", "Laplace, cut"),
    "pi / 4": (LAPLACE + "Laplace.probit", "math.pi / 8", "math.pi / 4", "Laplace, answers"),
    "draws from 1": (
        LAPLACE + "draw_logits", "Noise(seed, i)", "Noise(seed, i + 1)", "Laplace, answers"),
    "any weights": (
        LAPLACE + "Laplace._layers_of", "if not math.isclose", "if False and not math.isclose",
        "Laplace, answers"),
    "the last batch": (
        SUBSPACE + "Curvature.measure", "H += root.T", "H = root.T", "subspace, parts"),
    "the smallest eigenvalues": (
        SUBSPACE + "Curvature.posterior", "values.flip(0).clamp(min=0), vectors.flip(1)",
        "values.flip(0).clamp(min=0), vectors", "subspace, parts"),
    "eigenvalues of the old precision": (
        SUBSPACE + "Subspace.scaled", "self.values / factor", "self.values", "subspace, parts"),
    "a draw of another seed": (
        SUBSPACE + "Subspace.log_probs", "samples, seed)", "samples, seed + 1)",
        "subspace, parts"),
    "the highest NLL": (
        SUBSPACE + "validated", "min(values)", "max(values)", "subspace, validated"),
    "tenths of decades": (
        SUBSPACE + "validated", "10 ** (i / 8)", "10 ** (i / 10)", "subspace, validated"),
    "probabilities multiplied": (
        SUBSPACE + "validated", "right.logsumexp(0)", "right.mean(0)", "subspace, validated"),
    "kinds of whole names": (
        "methods.evidence:groups_of", "layer.rpartition(\".\")[2]", "layer", "subspace, refusals"),
    "any model": (SUBSPACE + "Subspace.check", "rtol=1e-9", "rtol=1e-1", "subspace, refusals"),
    "no direction": (
        SUBSPACE + "Curvature.posterior", "if directions < 1:", "if directions < 0:",
        "subspace, refusals"),
    "scaled twice": (
        "methods.point:to_points", "adapter.lora_A(), adapter.B, config.scaling",
        "adapter.lora_A(), adapter.B, config.scaling**2", "points"),
    "s to the square": (
        "core.adapter:to_scales", "factor * singular[:k]", "factor * singular[:k] ** 2", "points"),
    "the upper end": ("methods.tfb:largest", "    return low", "    return high", "TFB, parts"),
    "a search by halves": (
        "methods.tfb:largest", "high > low * (1 + resolution)", "high > 2 * low", "TFB, parts"),
    "widths where B is 0": (
        "methods.tfb:_rotate", "d > least, 1 / d, 0.0", "d > least, 1 / d, 1.0", "TFB, parts"),
    "the labels in place of the answers": (
        "methods.tfb:fit_tfb", "mean.argmax(-1, keepdim=True)",
        "torch.cat([b.labels for b in batches])[:, None]", "TFB, parts"),
    "left half done": (
        "methods.tfb:fit_tfb", "_attach(model, points)", "pass", "TFB, parts"),
    "the variance below 0": (
        "methods.swag:Swag.draw", "sd = (", "sd = (1e-9 + ", "SWAG, parts"),
    "no count": (
        "methods.swag:Swag.restore", 'int(state["count"])', "self.count", "SWAG, parts"),
    "member i draws i": (
        "methods.ensemble:Ensemble.log_probs", "each[m::count]", "each[: len(each) // count]",
        "ensemble, parts"),
    "members one by one": (
        "methods.ensemble:Ensemble.log_probs", "torch.stack(found, 1)", "torch.stack(found)",
        "ensemble, parts"),
    "kinds that differ": (
        "methods.ensemble:Ensemble.__post_init__", "len(kinds) > 1", "len(kinds) > 2",
        "ensemble, parts"),
    "members in the order of texts": (
        "methods.ensemble:Ensemble.load", "[members[str(i)] for i in range(len(members))]",
        "[members[key] for key in sorted(members)]", "posteriors on disk"),
    "facts are rounded": (
        LAPLACE + "Laplace.save", "repr(getattr(self, key))", 'f"{getattr(self, key):.3g}"',
        "posteriors on disk"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
