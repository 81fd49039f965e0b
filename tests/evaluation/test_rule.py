"""The rule of a run: its file, whose answers it is of, and what is fitted."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from scalabl_ref import InputError, metrics
from scalabl_ref.data import Example, Wording
from scalabl_ref.evaluation import rule
from scalabl_ref.evaluation.classifier import Classifier
from scalabl_ref.evaluation.sequential import Auto
from scalabl_ref.evaluation.threshold import threshold

from .test_evaluate import answers

HOW = {"weights_sha256": "w", "samples": 3, "seed": 1, "design": "latin"}
FIT = {"n": 1, "data": "d", "data_sha256": "s", "rows": "r"}
TEMPERATURE = {**FIT, "value": 2.0, "nll": [2.0, 1.0], "ece": [0.2, 0.1]}
THRESHOLD = {**FIT, "value": 0.5, "accuracy": 0.9, "level": 0.95, "coverage": 1.0, "answered": 1,
             "right": 1, "bound": 0.9}  # fmt: skip
BOTH = {"how": HOW, "temperature": TEMPERATURE, "threshold": THRESHOLD}


def clf(**changes) -> Classifier:
    """A classifier that answers nothing: a rule needs only its settings."""
    settings = {"samples": 3, "seed": 1, "design": "latin", "run": "r", "weights_sha256": "w"}
    return Classifier(None, None, {}, None, Wording(), **{**settings, **changes})


# --- its file -------------------------------------------------------------------------------------


def test_a_rule_comes_back_as_it_was_written(tmp_path):
    assert rule.read_rule(tmp_path) == {}
    endless = {**BOTH, "threshold": {**THRESHOLD, "value": math.inf}}
    for given in (BOTH, endless, {"how": HOW, "temperature": TEMPERATURE}):
        rule.write_rule(tmp_path, given)
        assert rule.read_rule(tmp_path) == given
    rule.write_rule(tmp_path, endless)
    text = (tmp_path / "rule.json").read_text()
    assert json.loads(text)["threshold"]["value"] is None and text.endswith("\n}\n")


@pytest.mark.parametrize(
    ("part", "change"),
    [("how", {}), ("how", None), ("how", {**HOW, "more": 1}), ("how", {**HOW, "seed": "1"}),
     ("how", {**HOW, "samples": "auto"}), ("how", {**HOW, "samples": {"error": "0.1"}}),
     ("how", {**HOW, "samples": {"most": 10.5}}), ("how", {**HOW, "samples": {"least": 2}}),
     ("temperature", {**TEMPERATURE, "nll": 1.0}), ("temperature", {"value": 1.0}),
     ("threshold", {**THRESHOLD, "answered": None}), ("threshold", {**THRESHOLD, "more": 1}),
     ("threshold", {"value": 0.5}), ("more", {})],
)  # fmt: skip
def test_a_broken_part_is_named(tmp_path, part, change):
    rule.write_rule(tmp_path, {**BOTH, part: change})
    with pytest.raises(InputError, match=f"rule.json: .*{part}.*: remove it with `scalabl calib"):
        rule.read_rule(tmp_path)


def test_a_rule_is_removed_in_whole_or_in_part(tmp_path):
    path = tmp_path / "rule.json"
    assert not rule.clear_rule(tmp_path) and not rule.clear_rule(tmp_path, "threshold")
    rule.write_rule(tmp_path, BOTH)
    assert rule.clear_rule(tmp_path, "threshold")
    assert rule.read_rule(tmp_path) == {"how": HOW, "temperature": TEMPERATURE}
    assert not rule.clear_rule(tmp_path, "threshold") and path.exists()
    assert rule.clear_rule(tmp_path) and not path.exists()
    rule.write_rule(tmp_path, {"how": HOW, "threshold": THRESHOLD})
    assert rule.clear_rule(tmp_path, "threshold") and not path.exists()


# --- whose answers it is of -----------------------------------------------------------------------


def test_a_classifier_of_the_same_answers_gets_the_rule():
    found = rule.ruled(clf(), BOTH)
    assert (found.temperature, found.threshold, found.weights_sha256) == (2.0, 0.5, "w")
    found = rule.ruled(clf(), {"how": HOW, "threshold": THRESHOLD})
    assert (found.temperature, found.threshold) == (None, 0.5)
    assert rule.ruled(clf(samples=9), {}).samples == 9 and rule.ruled(clf(), None) == clf()


def test_a_classifier_of_other_answers_is_refused():
    auto = {"tolerance": 0.1, "error": 0.2, "most": 30}
    for given, kept, message in (
        (clf(weights_sha256="v"), BOTH, "^r: its temperature and threshold in rule.json is of oth"),
        (clf(samples=4), BOTH, "^r: its temperature and threshold is of other draws: give "
         "--samples 3, or fit again with `scalabl calibrate --run r --data FILE`"),
        (clf(seed=0, design="independent"), {"how": HOW, "temperature": TEMPERATURE},
         "^r: its temperature is of other draws: give --seed 1 --design latin, or"),
        (clf(), {"how": {**HOW, "samples": auto}, "threshold": THRESHOLD},
         "^r: its threshold is of other draws: give --samples auto --tolerance 0.1 --most 30, or"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            rule.ruled(given, kept)
    with pytest.raises(InputError, match="is of the run's own prompts: leave their options out"):
        rule.ruled(clf(), BOTH, own_wording=False)
    own = Auto(0.1, 0.2, 30)
    assert rule.how(clf(samples=own))["samples"] == auto
    assert rule.samples_of({"how": {"samples": auto}}) == own and rule.samples_of(None) is None
    assert rule.samples_of({"how": {"samples": 0}}) == 0 and rule.samples_of({}) is None


def test_weights_are_those_of_adapter_posterior_and_members(tmp_path):
    names = ["adapter.safetensors", "posterior.safetensors", "member-1/adapter.safetensors"]
    (tmp_path / "member-1").mkdir()
    for name in names:
        (tmp_path / name).write_text("one")
    first = rule.weights_sha256(tmp_path)
    assert rule.how(clf(weights_sha256="", run=tmp_path))["weights_sha256"] == first
    (tmp_path / "metrics.json").write_text("{}")
    assert rule.weights_sha256(tmp_path) == first
    found = {first}
    for name in names:
        (tmp_path / name).write_text("two")
        found.add(rule.weights_sha256(tmp_path))
    (tmp_path / "member-1").rename(tmp_path / "member-2")
    assert len(found | {rule.weights_sha256(tmp_path)}) == 5


def test_rows_are_known_by_question_and_choices():
    """rule.json keeps these digests: every version must make the same."""
    one = Example("A prompt", 0, "1", ("b", "a"), "é?")
    digest = rule.row_digests([one])
    assert digest == "273de7d0b852328d"
    assert rule.row_digests([replace(one, label=1, id="2", choices=("a", "b"))]) == digest
    bare = replace(one, question="")
    others = [bare, replace(bare, prompt="x"), replace(one, choices=("a", "c"))]
    found = rule.row_digests([*others, replace(one, prompt="x"), one, one])
    assert len(found.split()) == 6 and len(set(found.split())) == 4
    assert rule.seen_in(found, digest) == 3 and rule.seen_in(digest, found) == 1
    assert rule.seen_in("", found) == rule.seen_in(found, "") == 0


# --- fits -----------------------------------------------------------------------------------------


def test_a_temperature_has_its_scores_before_and_after():
    own = answers(2)
    probs, labels = own.prediction.probs, own.labels
    value = metrics.fit_temperature(probs.log(), labels)
    cooled = metrics.apply_temperature(probs, value)
    assert rule.calibrated(own) == {
        "value": value, "n": 12, "nll": [metrics.nll(probs, labels), metrics.nll(cooled, labels)],
        "ece": [metrics.ece(probs, labels, 15), metrics.ece(cooled, labels, 15)],
    }  # fmt: skip
    assert rule.calibrated(own, bins=5)["ece"][0] == metrics.ece(probs, labels, 5)


def test_a_threshold_is_that_of_the_confidences():
    own = answers(1, rows=40)
    confidence, right = rule.outcomes(own)
    assert confidence.equal(own.prediction.probs.amax(1))
    assert right.tolist() == (own.prediction.probs.argmax(1) == own.labels).tolist()
    found = threshold(confidence, right, 0.4, 0.9)
    kept = found._asdict()
    assert rule.thresholded(own, 0.4, 0.9) == {
        "value": kept.pop("confidence"), **kept, "accuracy": 0.4, "level": 0.9, "n": 40
    }  # fmt: skip
    none = {"value": math.inf, "coverage": 0.0, "answered": 0, "right": 0, "bound": 0.0}
    assert rule.thresholded(own, 0.99, 0.9) == {**none, "accuracy": 0.99, "level": 0.9, "n": 40}
    table = [(target, None, None) for target in (0.9, 0.95, 0.99)]
    assert rule.promises(own, 0.4, 0.9) == [(0.4, found, None), *table]
    assert rule.promises(own, 0.5, 0.9) == [(0.5, None, 53), *table]
    assert rule.promises(own, 0.95, 0.9) == table


def test_a_human_gets_what_is_below_the_threshold():
    found = [rule.decided(0.5, least) for least in (None, 0.5, 0.51, 0.0, math.inf)]
    assert found == [None, "answer", "human", "answer", "human"]
    own = answers(0)
    kept = rule.answered(own, 0.0)
    assert kept == {"threshold": 0.0, "coverage": 1.0, "answered": 12, "right": 6, "acc": 0.5}
    none = {"threshold": 2.0, "coverage": 0.0, "answered": 0, "right": 0, "acc": None}
    assert rule.answered(own, 2.0) == none
