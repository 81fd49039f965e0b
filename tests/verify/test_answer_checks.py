"""The checks of answers: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.answer_checks import ANSWER_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in ANSWER_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "noise of the digest's end": (
        "evaluation.answering:text_keys", "[:8]", "[-8:]", "texts answered"),
    "room for no tokens": (
        "evaluation.answering:text_keys", "if by_token else WORD", "", "texts answered"),
    "noise by the place": (
        "evaluation.answering:answer_encoded", "ids=keys[b.ids]", "ids=b.ids", "texts answered"),
    "draws in one place": (
        "evaluation.answering:_share_draws", "slice(done, done + draws)", "slice(0, draws)",
        "texts answered"),
    "choices for labels": (
        "evaluation.classifier:Classifier.decisions", "self.wording.words or example.choices",
        "example.choices", "texts answered"),
    "uncertainties exchanged": (
        "evaluation.classifier:Classifier.decisions", "p.expected_entropy, p.mutual_information)",
        "p.mutual_information, p.expected_entropy)", "texts answered"),
    "never cut": (
        "evaluation.classifier:Classifier.encode", "if wording.drop_long", "if True",
        "texts answered"),
    "labels in the order given": (
        "evaluation.classifier:Classifier.choices", "return list(words)", "return names",
        "texts answered"),
    "letters as choices of a table": (
        "evaluation.classifier:Classifier.examples", 'self.facts["format"]', '"jsonl"',
        "texts answered"),
    "the entropy before the temperature": (
        "evaluation.classifier:cooled", ", entropy=metrics.entropy(probs)", "", "texts answered"),
    "above the threshold alone": (
        "evaluation.rule:decided", "confidence >= least", "confidence > least", "rules"),
    "draws by default": (
        "evaluation.classifier:draws_of", "samples = samples_of(rule)", "pass", "rules"),
    "the temperature is lost": (
        "evaluation.rule:ruled", 'temperature=rule.get("temperature", {}).get("value")',
        "temperature=None", "rules"),
    "other draws": (
        "evaluation.rule:ruled", "if theirs != ours", "if False", "rules"),
    "infinite is one": (
        "evaluation.rule:read_rule", "= math.inf", "= 1.0", "rules"),
    "the temperature goes as well": (
        "evaluation.rule:clear_rule", 'if rule.get("temperature")', "if False", "rules"),
    "choices in another order": (
        "evaluation.rule:row_digests", "*sorted(e.choices)", "*e.choices", "rules"),
    "rows counted once": (
        "evaluation.rule:seen_in", "digests.split())", "set(digests.split()))", "rules"),
    "before and after exchanged": (
        "evaluation.rule:calibrated", "metrics.ece(p, labels, bins) for p in (probs, scaled)",
        "metrics.ece(p, labels, bins) for p in (scaled, probs)", "rules"),
    "a temperature of probabilities": (
        "evaluation.rule:calibrated", "probs.log(), labels", "probs, labels", "rules"),
    "classes that a row has not": (
        "evaluation.rule:outcomes", "place == answers.labels",
        "answers.prediction.probs.argmax(1) == answers.labels", "rules"),
    "level and accuracy exchanged": (
        "evaluation.rule:thresholded", "threshold(confidence, right, accuracy, level)",
        "threshold(confidence, right, level, accuracy)", "rules"),
    "right for answered": (
        "evaluation.rule:answered", "count / len(right)", "hits / len(right)", "rules"),
    "four digits": (
        "evaluation.stream:_row", ":.6g", ":.4g", "files of answers"),
    "a chunk twice": (
        "evaluation.stream:_write", 'if at <= done["rows"]', 'if at < done["rows"]',
        "files of answers"),
    "half a line stays": (
        "evaluation.stream:_write", 'file.truncate(done["bytes"])', "pass", "files of answers"),
    "another call's file": (
        "evaluation.stream:_done", "if theirs != ours", "if False", "files of answers"),
    "columns exchanged": (
        "evaluation.stream:_values", "d.entropy, d.mutual_information",
        "d.mutual_information, d.entropy", "files of answers"),
    "the least probable": (
        "evaluation.evaluate:_rows", "key=probs.__getitem__", "key=lambda k: -probs[k]",
        "results"),
    "fitted on the test rows": (
        "evaluation.evaluate:_calibrated", "held_out.prediction.probs.log(), held_out.labels",
        "answers.prediction.probs.log(), answers.labels", "results"),
    "settled for open": (
        "evaluation.evaluate:score", "(~settled).sum()", "settled.sum()", "results"),
    "inside and outside exchanged": (
        "evaluation.evaluate:_out_of_distribution",
        "inside.prediction._asdict(), outside.prediction._asdict()",
        "outside.prediction._asdict(), inside.prediction._asdict()", "results"),
    "bins by default": (
        "evaluation.evaluate:summarise", "metrics.scores(probs, labels, bins)",
        "metrics.scores(probs, labels)", "results"),
    "another run's results": (
        "evaluation.evaluate:check_results", "!= settings[key]", "is None", "results"),
    "the folder of checkpoints": (
        "evaluation.evaluate:results_folder", "if name != savepoints.FOLDER", "if True",
        "results"),
    "other prompts": (
        "evaluation.rule:ruled", "if not own_wording", "if False", "rules"),
    "a part of a rule": (
        "evaluation.rule:read_rule", "set(part) != set(types)", "False", "rules"),
    "draws in other places": (
        "evaluation.answering:answer_encoded", "counts[:, ids] = counted",
        "counts[:, : len(ids)] = counted", "whole sets"),
    "draws for settled": (
        "evaluation.answering:_whole_batch", "torch.stack((taken, settled.long()))",
        "torch.stack((settled.long(), taken))", "whole sets"),
    "another seed": (
        "evaluation.answering:_whole_batch", "predict_auto(model, batch, samples, seed)",
        "predict_auto(model, batch, samples, 0)", "whole sets"),
    "no posterior": (
        "evaluation.answering:_whole_batch", "seed, posterior, design), 0",
        "seed, None, design), 0", "whole sets"),
    "answers and labels exchanged": (
        "evaluation.decisions:confusion", "labels * count + most_probable(probs)[1]",
        "labels + count * most_probable(probs)[1]", "pages"),
    "recall for precision": (
        "evaluation.report:_class_table", "(scores.precision, scores.recall, scores.f1)",
        "(scores.recall, scores.precision, scores.f1)", "pages"),
    "label and answer exchanged": (
        "evaluation.report:_error_table", "(labels[i], chosen[i])", "(chosen[i], labels[i])",
        "pages"),
    "as few rows as possible": (
        "evaluation.decisions:answered_at", "first = int(enough[0])", "first = int(enough[-1])",
        "pages"),
    "wrong and unsure": (
        "evaluation.decisions:wrong_and_sure", "confidence >= sure", "confidence <= sure",
        "pages"),
    "half a character": (
        "evaluation.generate:pieces", 'and not text.endswith("\\ufffd")', "", "text in pieces"),
    "beyond the model": (
        "evaluation.generate:_room", "if room < 0", "if room < -5", "text in pieces"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
