"""The checks of scores and decisions: each notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.score_checks import SCORE_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in SCORE_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "ties in the order of the rows": (
        "evaluation.metrics:risk_coverage",
        "(tie.bincount(weights=1 - correct[order]) / size)[tie]", "1 - correct[order]",
        "scores by loops"),
    "coverage from 0": (
        "evaluation.metrics:risk_coverage", "RiskCoverage(answered /",
        "RiskCoverage((answered - 1) /", "scores by loops"),
    "an upper end belongs to the bin": (
        "evaluation.metrics:_bin_index", ".floor()", ".ceil().sub(1)", "scores by loops"),
    "ties are lost": (
        "evaluation.metrics:auroc", "+ behind)", ")", "scores by loops"),
    "temperature of the probabilities": (
        "evaluation.metrics:apply_temperature", ".log() / temperature", "/ temperature",
        "scores by loops"),
    "one sided": (
        "evaluation.metrics:_percentiles", "(1 - level) / 2", "(1 - level)", "intervals"),
    "rows are drawn once": (
        "evaluation.metrics:bootstrap_interval", "probs[rows], labels[rows]",
        "probs[:9], labels[:9]", "intervals"),
    "labels and answers exchanged": (
        "evaluation.decisions:confusion", "labels * count + most_probable(probs)[1]",
        "labels + count * most_probable(probs)[1]", "decisions"),
    "precision for recall": (
        "evaluation.decisions:class_scores", "right / given, right / rows",
        "right / rows, right / given", "decisions"),
    "the least sure errors": (
        "evaluation.decisions:worst_errors", "descending=True", "descending=False", "decisions"),
    "a tail without its end": (
        "evaluation.threshold:binomial_tail", "min(k, n) + 1", "min(k, n)", "decisions"),
    "goes on behind a failure": (
        "evaluation.threshold:threshold", "            break", "            continue", "decisions"),
    "one row fewer": (
        "evaluation.threshold:_candidates", "confidence[place - 1]", "confidence[place - 2]",
        "decisions"),
    "the smallest p by one fewer": (
        "evaluation.inference:holm", "(len(p) - rank)", "(len(p) - rank - 1)", "comparisons"),
    "a variance for an error": (
        "evaluation.inference:_Estimate._reach", "math.sqrt(", "abs(", "comparisons"),
    "as many degrees as replicates": (
        "evaluation.inference:_Estimate.reach", "self.replicates - 1", "self.replicates",
        "comparisons"),
    "never settled": (
        "evaluation.sequential:wins", ">= math.log(needed)", ">= math.inf", "as many as needed"),
    "half of the draws": (
        "evaluation.sequential:Auto.looks", "self.most // 2", "self.most // 4",
        "as many as needed"),
    "directions that the softmax does not see": (
        "evaluation.quadrature:integrate", "factor - factor.mean(1, keepdim=True)", "factor",
        "exact prediction"),
    "0 log 0": (
        "evaluation.metrics:entropy", "torch.special.xlogy(probs, probs)", "(probs * probs.log())",
        "edges of scores"),
    "the mean of the classes": (
        "evaluation.metrics:_brier_rows", ".square().sum(1)", ".square().mean(1)",
        "edges of scores"),
    "the last bin is open": (
        "evaluation.metrics:_bin_index", "max=bins - 1", "max=bins - 2", "edges of scores"),
    "inside counts as outside": (
        "evaluation.metrics:separation", "inside[name], outside[name]",
        "outside[name], inside[name]", "edges of scores"),
    "one label too many": (
        "evaluation.metrics:answerable", "labels < probs.shape[1]", "labels <= probs.shape[1]",
        "edges of scores"),
    "one over the temperature": (
        "evaluation.metrics:fit_temperature", "return min(max(1 / middle,",
        "return min(max(middle,", "edges of scores"),
    "ends rounded inwards": (
        "evaluation.metrics:_percentiles", "math.floor(tail)", "math.ceil(tail)",
        "edges of scores"),
    "any bins": ("evaluation.metrics:checked_bins", "bins < 1", "bins < 0", "refused scores"),
    "sums of any size": (
        "evaluation.metrics:_checked_probs", "if off.any():", "if False:", "refused scores"),
    "one label too many is taken": (
        "evaluation.metrics:_checked_labels", "labels >= classes", "labels > classes",
        "refused scores"),
    "answered from above": (
        "evaluation.decisions:answered_at", "flip(0).cumsum(0).flip(0)", "cumsum(0)", "decisions"),
    "the fewest rows": (
        "evaluation.decisions:answered_at", "int(enough[0])", "int(enough[-1])", "decisions"),
    "sure from above": (
        "evaluation.decisions:wrong_and_sure", "confidence >= sure", "confidence > sure + 0.05",
        "decisions"),
    "a row fewer, all right": (
        "evaluation.threshold:fewest_rows", "math.ceil(", "math.floor(", "rows of thresholds"),
    "as many errors as here": (
        "evaluation.threshold:rows_needed", "(wrong + 1) / (counts + 1)", "wrong / counts",
        "rows of thresholds"),
    "power of a half": (
        "evaluation.threshold:rows_needed", ">= POWER", ">= POWER / 2", "rows of thresholds"),
    "wrong for right": (
        "evaluation.threshold:best_share", "rows - int(wrong[rows - 1])", "int(wrong[rows - 1])",
        "rows of thresholds"),
    "ties are parted": (
        "evaluation.threshold:_wrong", "confidence[:-1] == confidence[1:]",
        "confidence[:-1] != confidence[:-1]", "rows of thresholds"),
    "one-sided p": (
        "evaluation.inference:difference", "2 * estimate", "1 * estimate", "comparisons"),
    "the mean for the margin": (
        "evaluation.inference:non_inferior", "estimate.tail(margin - estimate.mean)",
        "estimate.tail(estimate.mean)", "comparisons"),
    "both tails in one": (
        "evaluation.inference:student_tail", "(1 - within) / 2", "1 - within", "comparisons"),
    "a negative distance is a positive one": (
        "evaluation.inference:_Estimate.tail", "return 1 - self.tail", "return self.tail",
        "comparisons"),
    "looks that double": (
        "evaluation.sequential:Auto.looks", "at *= GROWTH", "at *= 2 * GROWTH", "draws at most"),
    "one draw is enough": (
        "evaluation.sequential:Auto.__post_init__", "self.most < 2", "self.most < 1",
        "draws at most"),
    "the order of the cut head": (
        "evaluation.quadrature:head_gaussian", "B = B[batch.classes]",
        "B = B[batch.classes.sort().values]", "exact heads"),
    "the scaling left out": (
        "evaluation.quadrature:head_gaussian", "head.config.scaling * ", "", "exact heads"),
    "L transposed": (
        "evaluation.quadrature:head_gaussian", "dim=1)", "dim=0)", "exact heads"),
    "an average of the nodes": (
        "evaluation.quadrature:gauss_hermite", "vectors[0].square()", "vectors[0].abs()",
        "exact heads"),
    "more directions than nodes": (
        "evaluation.quadrature:integrate", "min(factor.shape[2], factor.shape[1] - 1)",
        "factor.shape[2]", "exact prediction"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
