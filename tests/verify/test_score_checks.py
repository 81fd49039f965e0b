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
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
