"""The checks of a study's results: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.study_checks import STUDY_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in STUDY_CHECKS}
OF = "evaluation.comparison:"
# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "replicates in the order of the folders": (
        OF + "_compared", "[[tested[name].numbers.index(n) for n in numbers]]",
        "[: len(numbers)]", "a study"),
    "no correction": (
        OF + "_compared", "holm([entry[key] for entry in family])",
        "[entry[key] for entry in family]", "a study"),
    "the highest NLL is chosen": (
        OF + "_verdicts", "key=validation.__getitem__", "key=lambda n: -validation[n]",
        "a study"),
    "the rival less ours": (OF + "_compared", "difference(a, b)", "difference(b, a)", "a study"),
    "no correction of the margin": (
        OF + "_compared", '("p", "p_margin")', '("p",)', "a study"),
    "a high NLL is good": (
        OF + "_word", '== (entry["score"] == "acc")', "", "a study"),
    "one question is enough": (
        OF + "_compared", "min(a.shape) < 2", "False and min(a.shape) < 2", "a study"),
    "the temperature of another": (
        OF + "answers_of", "zip(probs, temperatures, strict=True)",
        "zip(probs, reversed(temperatures), strict=True)", "a study"),
    "deviations of the population": (OF + "_sd", ".std()", ".std(correction=0)", "a study"),
    "the least memory": (OF + "_about", 'max(a["peak_bytes"]', 'min(a["peak_bytes"]', "a study"),
    "all rows of another set": (
        OF + "_out_of_distribution", "known.double().mean()", "(known | True).double().mean()",
        "a study"),
    "other bins": (OF + "Answers.averages", "self.labels, bins)", "self.labels)", "a study"),
    "seconds for milliseconds": (
        "evaluation.tables:_cost_cells", "{1000 * row", "{row", "tables of a study"),
    "worse for better": (
        "evaluation.tables:sentences", 'rivals[e["word"]].append', 'rivals["worse"].append',
        "tables of a study"),
    "ends exchanged": (
        "evaluation.tables:verdict_cell", "{e['low']:+.3f} to {e['high']:+.3f}",
        "{e['high']:+.3f} to {e['low']:+.3f}", "tables of a study"),
    "the test set's scores": (
        "evaluation.tables:table", '{method: row["shifted"][name] for',
        "{method: row for", "tables of a study"),
    "labels of one replicate": (
        "evaluation.tables:write_page", "labels.repeat(len(each))", "labels", "a study"),
    "the least for the greatest": (
        "evaluation.tables:write_page", "max(s[key] for s", "min(s[key] for s", "a study"),
    "accuracy against itself": (
        "evaluation.tables:_plots", '(row["ece"], row["acc"])', '(row["acc"], row["acc"])',
        "a study"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
