"""From a run to decisions: `calibrate`, `threshold`, and `predict` of a file."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
from argparse import Namespace

import pytest

import scalabl_ref
from scalabl_ref.app import cli
from scalabl_ref.app.cli.threshold import _lines
from scalabl_ref.data import load, split
from scalabl_ref.evaluation import classifier, metrics, rule, stream
from scalabl_ref.evaluation.sequential import Auto
from scalabl_ref.evaluation.threshold import MOST_ROWS, Threshold

from ...models import questions_file, tiny_folder
from ..commands import TRAIN, ok, refused, run

PREDICT = "predict --run run --samples 3 --data test.jsonl --out out.csv"


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A run whose rows all have the same choices, and files of 60 and 90 further rows."""
    folder = tmp_path_factory.mktemp("decisions")
    tiny_folder(folder / "model")
    for name, count in (("train", 24), ("test", 9), ("fit", 60), ("choose", 90)):
        questions_file(folder / f"{name}.jsonl", rows=count)
    train = TRAIN.replace("--steps 6", "--steps 40 --lr 0.02")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(f"{train} --labels letters --holdout 0.25".split()) == 0
    return folder


@pytest.fixture
def trained(once, tmp_path, monkeypatch):
    """A copy of it, as the current directory."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    facts = tmp_path / "run" / "run.json"
    facts.write_text(facts.read_text().replace(str(once), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fits(part: str) -> dict:
    return rule.read_rule("run")[part]


# --- calibrate and threshold ----------------------------------------------------------------------


def test_a_temperature_is_kept_and_applied(trained, capsys):
    plain = scalabl_ref.load("run", samples=3)
    told = ok("calibrate --run run --data fit.jsonl --samples 3", capsys)["temperature"]
    answers = plain.ask(load("fit.jsonl", "jsonl"))
    fitted = metrics.fit_temperature(answers.prediction.probs.log(), answers.labels)
    assert abs(told["value"] - fitted) < 1e-4 and told["n"] == 60  # batches of 32 and of 1
    assert told["nll"][1] <= told["nll"][0]
    digest = hashlib.sha256((trained / "fit.jsonl").read_bytes()).hexdigest()
    assert (told["data"], told["data_sha256"]) == ("fit.jsonl", digest)
    _, out, _ = run("calibrate --run run --data fit.jsonl --samples 3", capsys)
    assert out.splitlines()[-3:] == [  # the second fit does not apply the first
        f"temperature {told['value']:.4f}, fitted on 60 rows of fit.jsonl",
        *(f"{name.upper()} {told[name][0]:.4f} before, {told[name][1]:.4f} after"
          for name in ("nll", "ece")),
    ]  # fmt: skip
    assert "rows" not in told and len(fits("temperature")["rows"].split()) == 60
    clf = scalabl_ref.load("run")
    assert (clf.samples, clf.temperature, clf.threshold) == (3, told["value"], None)
    before = plain.predict_proba(["5 x"])
    assert clf.predict_proba(["5 x"]).equal(metrics.apply_temperature(before, told["value"]))
    assert scalabl_ref.load("run", raw=True, samples=3).predict_proba(["5 x"]).equal(before)
    asked = ["predict", "--run", "run", "--prompt", "5 x", "--json"]
    assert cli.main(asked) == 0
    assert json.loads(capsys.readouterr().out)["probs"] == list(clf("5 x").probs)
    scores = ok("evaluate --run run --data test.jsonl --batch 1", capsys)
    assert scores["stored_temperature"] == told["value"] and scores["samples"] == 3
    lines = (trained / "run/predictions.jsonl").read_text().splitlines()
    assert json.loads(lines[5])["probs"] == list(
        clf.decisions(load("test.jsonl", "jsonl"))[5].probs
    )
    for option in ("--calibrate fit.jsonl", "--temperature"):
        said = refused(f"evaluate --run run --data test.jsonl {option}", capsys)
        assert "has a temperature already" in said
    both = "evaluate --run run --data test.jsonl --raw --calibrate fit.jsonl --samples 3"
    both = ok(both, capsys)
    assert "stored_temperature" not in both
    assert both["temperature"]["value"] == pytest.approx(told["value"], abs=1e-4)
    own = "warning: the run's temperature was fitted on this file"
    for name, warns in (("fit", True), ("test", False)):
        assert (own in run(f"evaluate --run run --data {name}.jsonl", capsys)[1]) == warns
    _, out, _ = run("predict --run run --prompt hello", capsys)
    assert out.startswith(f"the run's temperature {told['value']:.4f} is applied\n")
    assert ok("calibrate --run run --clear", capsys) == {"cleared": True}
    assert not (trained / "run" / rule.FILE).exists()
    assert ok("calibrate --run run --clear", capsys) == {"cleared": False}
    assert run("threshold --run run --clear", capsys)[1] == "run: there is nothing to clear\n"


def test_a_threshold_is_kept_and_decides(trained, capsys):
    told = ok("threshold --run run --data choose.jsonl --samples 3 --accuracy 0.1", capsys)
    kept = told["threshold"]
    assert kept["bound"] >= 0.1 and kept["n"] == 90 and 0 < kept["coverage"] <= 1
    assert (kept["accuracy"], kept["level"]) == (0.1, 0.95) and "rows" not in kept
    assert [entry["accuracy"] for entry in told["table"]] == [0.1, 0.9, 0.95, 0.99]
    first = told["table"][0]
    assert first["confidence"] == kept["value"] and first["bound"] == kept["bound"]
    bold = "threshold --run run --data choose.jsonl --samples 3 --accuracy 0.1 --confidence 0.2"
    less = ok(bold, capsys)["threshold"]
    assert less["level"] == 0.2 and less["bound"] > kept["bound"]
    assert "confidence must be between 0 and 1, and is 1.0" in refused(
        bold.replace("0.2", "1"), capsys
    )
    _, out, _ = run(bold.removesuffix(" --confidence 0.2"), capsys)
    lines = out.splitlines()
    assert lines[2].split() == [  # after a warning and the column heads
        "0.1", f"{kept['value']:.4f}", f"{kept['coverage']:.1%}", f"{kept['bound']:.4f}"
    ]  # fmt: skip
    assert lines[-2:] == [
        f"kept: {kept['value']:.4f}; {kept['answered']} rows are answered, {kept['right']} of them "
        "right; the promise holds with 0.95 confidence",
        'predict and serve now say "answer" from that confidence on, and "human" below it',
    ]
    clf = scalabl_ref.load("run")
    assert clf.threshold == kept["value"] and clf.temperature is None
    decisions = clf.decisions(load("choose.jsonl", "jsonl"))
    answered = [d.decision == "answer" for d in decisions]
    assert answered == [d.confidence >= clf.threshold for d in decisions]
    command = "evaluate --run run --data choose.jsonl --batch 1"
    assert "warning: the run's threshold was chosen on this file" in run(command, capsys)[1]
    scores = ok(f"{command} --force", capsys)["decision"]
    assert scores["answered"] == sum(answered) == kept["answered"]
    assert scores["right"] == kept["right"]
    assert scores["coverage"] == sum(answered) / 90
    report = (trained / "run/report.html").read_text()
    assert f"answers {sum(answered)} of the 90 rows" in report
    assert f"{100 * scores['right'] / scores['answered']:.1f} % of them right" in report
    assert "It was chosen for 10 % right, with 95 % confidence." in report
    lines = (trained / "run/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["decision"] == "answer" for line in lines] == answered


def test_where_no_threshold_keeps_its_promise_all_go_to_a_human(trained, capsys):
    command = "threshold --run run --data choose.jsonl --samples 3 --accuracy 0.999"
    told = ok(command, capsys)
    assert told["threshold"] is None
    assert told["table"][-1] == {"accuracy": 0.999, "rows_needed": None}
    _, out, _ = run(command, capsys)
    assert "no threshold keeps the promise of 0.999: predict and serve now send every row" in out
    assert "   0.999  none: no number of rows like these would do" in out
    assert re.search(r"At best \d\d\.\d% are right, among the \d+ most confident\. More rows", out)
    assert fits("threshold")["value"] == math.inf
    clf = scalabl_ref.load("run")
    assert clf.threshold == math.inf and clf("5 x").decision == "human"
    _, out, _ = run(PREDICT, capsys)
    assert "no threshold kept the promise of 0.999: every row goes to a human" in out
    assert {row["decision"] for row in rows("out.csv")} == {"human"}
    assert ok("predict --run run --prompt hello", capsys)["decision"] == "human"
    scores = ok("evaluate --run run --data test.jsonl", capsys)["decision"]
    assert scores == {"threshold": None, "coverage": 0, "answered": 0, "right": 0, "acc": None}
    report = (trained / "run/report.html").read_text()
    first = report.index("The run answers none of the 9 rows: every row goes to a human, because")
    assert (
        first < report.index("On these rows, at 95 % accuracy") and "kept in the run" not in report
    )
    code, out, _ = run("evaluate --run run --data test.jsonl --force", capsys)
    assert code == 0 and "No threshold kept its promise: every row goes to a human." in out
    ok("threshold --run run --clear", capsys)
    assert scalabl_ref.load("run").threshold is None
    _, out, _ = run(PREDICT.replace("out.csv", "next.csv"), capsys)
    assert "the decisions are empty: `scalabl threshold --run run --data FILE` chooses" in out
    assert {row["decision"] for row in rows("next.csv")} == {""}


def test_rows_that_a_promise_would_need_are_told():
    args = Namespace(accuracy=0.9, confidence=0.95)
    table = [(0.8, Threshold(0.7, 0.5, 20, 18, 0.81), None), (0.9, None, 1234),
             (0.99, None, MOST_ROWS + 1)]  # fmt: skip
    assert _lines(args, table, 40, 37)[1:] == [
        "     0.8            0.7000     50.0%  0.8100",
        "     0.9  none: about 1,234 rows like these would do",
        "    0.99  none: the surest rows are right too little more often",
        "no threshold keeps the promise of 0.9: predict and serve now send every row to a human",
    ]
    lines = _lines(args, [*table, (0.999, None, None)], 40, 37)
    assert lines[5:7] == [
        "At best 92.5% are right, among the 40 most confident. More rows do not raise that.",
        "A threshold answers at least 25% of the rows.",
    ]


def test_an_interrupted_file_does_not_go_on_without_the_rule(trained, capsys, monkeypatch):
    """An infinite threshold and no threshold at all are two rules."""
    ok("threshold --run run --data choose.jsonl --samples 3 --accuracy 0.999", capsys)
    monkeypatch.setattr(stream, "CHUNK", 4)
    real, calls = classifier.Classifier.decisions, []

    def counted(self, examples, title=""):
        calls.append(len(examples))
        if len(calls) == 2:
            raise Stop
        return real(self, examples, title)

    with monkeypatch.context() as patch:
        patch.setattr(classifier.Classifier, "decisions", counted)
        with pytest.raises(Stop):
            cli.main(PREDICT.split())
    capsys.readouterr()
    ok("threshold --run run --clear", capsys)
    assert "was begun with another threshold" in refused(PREDICT, capsys)


def test_draws_are_as_many_as_by_default_or_as_the_rule_has(trained, capsys):
    assert scalabl_ref.load("run").samples == scalabl_ref.load("run", raw=True).samples == 10
    for given, kept in (("", 10), ("--samples auto", {"tolerance": 0.05, "error": 0.05,
                                                      "most": 1000})):  # fmt: skip
        ok(f"calibrate --run run --data fit.jsonl {given}", capsys)
        assert json.loads((trained / "run" / rule.FILE).read_text())["how"]["samples"] == kept
        asked = ok("predict --run run --prompt hello", capsys)
        assert ("settled" in asked) == bool(given)
        assert scalabl_ref.load("run").samples == (Auto() if given else 10)
    auto = "--samples auto --tolerance 0.05 --most 1000"
    assert f"give {auto}, or" in refused("predict --run run --prompt hello --samples 3", capsys)
    assert "settled" in ok(f"predict --run run --prompt hello {auto}", capsys)


def test_seed_and_design_are_those_of_the_fit(trained, capsys):
    """`calibrate` and `threshold` keep them; the later commands give the same."""
    draws = "--samples 3 --seed 5 --design latin"
    told = ok(f"calibrate --run run --data fit.jsonl {draws}", capsys)["temperature"]
    how = rule.read_rule("run")["how"]
    assert (how["samples"], how["seed"], how["design"]) == (3, 5, "latin")
    plain = scalabl_ref.load("run", samples=3, seed=5, design="latin", batch=32, raw=True)
    answers = plain.ask(load("fit.jsonl", "jsonl"))
    assert told["value"] == metrics.fit_temperature(answers.prediction.probs.log(), answers.labels)
    ok(f"threshold --run run --data choose.jsonl --accuracy 0.1 {draws}", capsys)
    assert rule.read_rule("run")["how"] == how and fits("temperature")["value"] == told["value"]
    clf = scalabl_ref.load("run")
    assert clf.threshold is not None
    asked = ok(f"predict --run run --prompt hello {draws}", capsys)
    assert asked["probs"] == list(clf("hello").probs) and asked["decision"] == clf("hello").decision
    _, out, _ = run(f"predict --run run --prompt hello {draws}", capsys)
    assert out.endswith(f"\ndecision: {asked['decision']}\n")
    scores = ok(f"evaluate --run run --data test.jsonl {draws}", capsys)
    assert (scores["seed"], scores["design"], scores["samples"]) == (5, "latin", 3)
    ok("threshold --run run --clear", capsys)
    ok("calibrate --run run --clear", capsys)
    ok(f"threshold --run run --data choose.jsonl --accuracy 0.1 {draws}", capsys)
    assert rule.read_rule("run")["how"] == how


def test_a_new_temperature_removes_the_threshold(trained, capsys):
    ok("calibrate --run run --data fit.jsonl --samples 3", capsys)
    ok("threshold --run run --data choose.jsonl --samples 3 --accuracy 0.1", capsys)
    clf = scalabl_ref.load("run")
    assert clf.temperature is not None and clf.threshold is not None
    code, out, _ = run("calibrate --run run --data fit.jsonl --samples 3", capsys)
    assert code == 0 and "the threshold is removed: choose one again" in out
    assert scalabl_ref.load("run").threshold is None
    ok("threshold --run run --data choose.jsonl --samples 3 --accuracy 0.1", capsys)
    assert ok("threshold --run run --clear", capsys) == {"cleared": True}
    clf = scalabl_ref.load("run")
    assert clf.temperature is not None and clf.threshold is None


def test_a_rule_is_of_its_draws_and_weights(trained, capsys):
    ok("calibrate --run run --data fit.jsonl --samples 3", capsys)
    for option, message in (
        ("--samples 4", "give --samples 3, or fit again"),
        ("--seed 1", "give --seed 0, or fit again"),
        ("--max-length 100", "of the run's own prompts: leave their options out"),
    ):
        said = refused(f"predict --run run --prompt hello {option}", capsys)
        assert message in said
        ok(f"predict --run run --prompt hello {option} --raw", capsys)
    assert "give --samples 3" in refused(
        "threshold --run run --data choose.jsonl --samples 4", capsys
    )
    ok(f"{TRAIN} --labels letters --seed 1".replace("--out run", "--out other"), capsys)
    shutil.copy("other/adapter.safetensors", "run/adapter.safetensors")
    said = refused("predict --run run --prompt hello", capsys)
    assert "is of other weights" in said and "calibrate --run run --clear" in said


def test_rows_that_are_not_fit_for_it_are_told(trained, capsys):
    for command in ("calibrate", "threshold"):
        _, out, _ = run(f"{command} --run run --data train.jsonl --samples 2", capsys)
        assert "warning: 24 rows are few" in out
        assert "warning: 18 of 24 rows were trained on" in out
    _, out, _ = run("calibrate --run run --samples 2", capsys)  # those held out
    assert "fitted on 6 rows" in out and "were trained on" not in out
    _, out, _ = run("threshold --run run --samples 2", capsys)
    assert "warning: the temperature was fitted on 6 of 6 rows: the promise needs rows that" in out
    few = "rows are few: 50 or more make a better fit"
    for limit, warns in ((49, True), (50, False)):
        for command in ("calibrate", "threshold"):
            options = f"--run run --data choose.jsonl --limit {limit} --samples 0"
            _, out, _ = run(f"{command} {options}", capsys)
            assert (f"warning: {limit} {few}" in out) == warns == ("are few" in out)
            assert fits("temperature" if command == "calibrate" else "threshold")["n"] == limit
    clf, end = scalabl_ref.load("run", samples=0, raw=True), "warning: this is the end of the range"
    assert end not in out
    questions = [json.loads(row) for row in (trained / "fit.jsonl").read_text().splitlines()]
    answers = clf.predict([row["prompt"] for row in questions])
    rows = [{**row, "label": row["choices"].index(answer)}
            for row, answer in zip(questions, answers, strict=True)]  # fmt: skip
    (trained / "right.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert end in run("calibrate --run run --data right.jsonl --samples 0", capsys)[1]


def test_rows_that_the_promise_cannot_use_are_counted(trained, capsys):
    """Some of the training's, some of the calibration's: whatever their order and their labels."""
    own = [json.loads(line) for line in (trained / "train.jsonl").read_text().splitlines()]
    left, held = split(own, 0.25, 0)
    more = [{**row, "prompt": f"new {row['prompt']}"} for row in left]
    other = {**more[7], "label": (more[7]["label"] + 1) % 3, "id": "x"}
    for name, chosen in (("fit", [*held, *more[:9]]), ("choose", [*left[:5], *more[10:], other,
                                                                  more[0], held[1]]),
                         ("new", more[10:])):  # fmt: skip
        (trained / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))
    _, out, _ = run("calibrate --run run --data fit.jsonl --samples 2", capsys)
    assert "fitted on 15 rows" in out and "were trained on" not in out
    _, out, _ = run("threshold --run run --data choose.jsonl --samples 2", capsys)
    promise = "the promise needs rows that neither the training nor `calibrate` saw"
    assert "warning: 5 of 16 rows were trained on: " in out and out.count(promise) == 2
    assert f"warning: the temperature was fitted on 3 of 16 rows: {promise}" in out
    _, out, _ = run("threshold --run run --data new.jsonl --samples 2", capsys)
    assert "trained on" not in out and "was fitted on" not in out
    (trained / "train.jsonl").unlink()
    _, out, _ = run("threshold --run run --data choose.jsonl --samples 2", capsys)
    assert "note: the training data cannot be read or has changed: whether it has some of" in out
    assert "was fitted on 3 of 16 rows" in out and "were trained on" not in out


@pytest.mark.parametrize("text", ["{", "[]", '{"how": 3}', '{"how": {"seed": "a"}}',
                                  '{"how": {}, "temperature": {"value": 0}}'])  # fmt: skip
def test_a_broken_rule_is_named(trained, capsys, text):
    (trained / "run" / rule.FILE).write_text(text)
    assert "run/rule.json: " in refused("predict --run run --prompt hello", capsys)
    assert ok("calibrate --run run --clear", capsys) == {"cleared": True}
    ok("predict --run run --prompt hello", capsys)


def test_weights_are_hashed_once(trained, capsys, monkeypatch):
    """By `predict --data`, with a rule and without one."""
    real, hashed = rule.weights_sha256, []
    monkeypatch.setattr(rule, "weights_sha256", lambda run: hashed.append(run) or real(run))
    ok(PREDICT, capsys)
    assert len(hashed) == 1
    ok("calibrate --run run --data fit.jsonl --samples 3", capsys)
    hashed.clear()
    ok(PREDICT.replace("out.csv", "again.csv"), capsys)
    assert len(hashed) == 1


# --- a file of texts ------------------------------------------------------------------------------


def test_a_file_is_answered_as_its_texts_are(trained, capsys):
    ok("threshold --run run --data choose.jsonl --samples 3 --accuracy 0.1", capsys)
    assert ok(f"{PREDICT} --probs", capsys) == {"out": "out.csv", "rows": 9}
    clf = scalabl_ref.load("run")
    found, expected = rows("out.csv"), clf.decisions(load("test.jsonl", "jsonl"))
    assert [row["id"] for row in found] == [str(i) for i in range(9)]
    for row, d in zip(found, expected, strict=True):
        assert row["answer"] == d.answer and row["decision"] == d.decision
        for name in ("confidence", "entropy", "mutual_information"):
            assert row[name] == f"{getattr(d, name):.6g}"
        assert [row[f"prob:{name}"] for name in clf.classes_] == [f"{p:.6g}" for p in d.probs]
    ok(PREDICT.replace("out.csv", "out.jsonl"), capsys)
    lines = [json.loads(line) for line in (trained / "out.jsonl").read_text().splitlines()]
    assert [line["confidence"] for line in lines] == [d.confidence for d in expected]
    assert not {"probs", "choices"} & lines[0].keys()
    few = PREDICT.replace("out.csv", "few.csv") + " --limit 4"
    assert run(few, capsys)[:2] == (0, "written: few.csv, 4 rows\n")
    assert [row["id"] for row in rows("few.csv")] == ["0", "1", "2", "3"]
    ok(PREDICT.replace("out.csv", "again.CSV"), capsys)
    assert rows("again.CSV")[3]["confidence"] == found[3]["confidence"]
    assert sorted(p.name for p in trained.glob("out*")) == ["out.csv", "out.jsonl"]
    assert "exists already" in refused(PREDICT, capsys)
    assert "key 'body' is missing" in refused(f"{PREDICT} --text-column body", capsys)


def test_labels_are_not_needed(trained, capsys):
    texts = [
        json.loads(line)["prompt"] for line in (trained / "test.jsonl").read_text().splitlines()
    ]
    (trained / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (trained / "b.json").write_text(json.dumps([{"prompt": t} for t in texts], indent=1))
    (trained / "c.csv").write_text(
        "id,text\n" + "".join(f"n{i},{t}\n" for i, t in enumerate(texts))
    )
    (trained / "d.tsv").write_text("what\tx\n" + "".join(f"{t}\t1\n" for t in texts))
    ok(PREDICT, capsys)
    same = [row["confidence"] for row in rows("out.csv")]
    for name, more in (("a.jsonl", ""), ("b.json", ""), ("c.csv", ""),
                       ("d.tsv", "--text-column what")):  # fmt: skip
        out = f"{name}.csv"
        ok(f"predict --run run --samples 3 --data {name} --out {out} {more}", capsys)
        assert [row["confidence"] for row in rows(out)] == same
    assert rows("c.csv.csv")[3]["id"] == "n3"


class Stop(BaseException):
    """In place of kill -9."""


@pytest.mark.parametrize("out", ["out.csv", "out.jsonl"])
def test_an_interrupted_file_goes_on(trained, capsys, monkeypatch, out):
    """To the same bytes, wherever it was stopped; also where a line was written in part."""
    monkeypatch.setattr(stream, "CHUNK", 4)
    command = f"predict --run run --samples 3 --data fit.jsonl --probs --out {out}"
    ok(command, capsys)
    whole = (trained / out).read_bytes()
    (trained / out).unlink()
    real, calls = classifier.Classifier.decisions, []

    def counted(self, examples, title=""):
        calls.append(len(examples))
        if len(calls) == 6:
            raise Stop
        return real(self, examples, title)

    with monkeypatch.context() as patch:
        patch.setattr(classifier.Classifier, "decisions", counted)
        with pytest.raises(Stop):
            cli.main(command.split())
    partial = trained / f"{out}.partial"
    assert not (trained / out).exists() and whole.startswith(partial.read_bytes())
    with partial.open("ab") as file:
        file.write(b"17,no 0,0.4")
    said = refused(f"{command} --batch 2", capsys)
    assert f"{out}.partial: was begun with another batch" in said and f"rm {out}.partial" in said
    code, said, _ = run(command, capsys)
    assert code == 0 and "going on after 20 of 60 rows" in said
    assert (trained / out).read_bytes() == whole
    assert [p.name for p in trained.glob("*.partial*")] == []


def test_a_bad_row_stops_it_before_it_starts(trained, capsys):
    lines = (trained / "test.jsonl").read_text().splitlines()
    for bad, message in (
        ('{"prompt": ""}', "line 4: 'prompt' is empty"),
        ("not json", "line 4: not JSON"),
        ('{"prompt": 5}', "line 4: 'prompt' must be a text"),
        (json.dumps({"prompt": "x" * 300}), "line 4: example 0 (id 3): its prompt has"),
        (json.dumps({"prompt": "x", "choices": list("abcd")}), "line 4: run: can answer 3 choices"),
    ):
        (trained / "bad.jsonl").write_text("\n".join([*lines[:3], bad, *lines[3:]]) + "\n")
        said = refused("predict --run run --data bad.jsonl --out out.csv", capsys)
        assert f"bad.jsonl, {message}" in said, said
        assert not (trained / "out.csv").exists()
    for command, message in (
        ("predict --run run", "give --prompt TEXT, or --data FILE"),
        ("predict --run run --data test.jsonl", "belong together"),
        (f"{PREDICT} --prompt x", "give --prompt TEXT, or --data FILE"),
        (f"{PREDICT} --batch 0", "batch must be at least 1"),
        (f"{PREDICT} --limit 0", "the limit must be at least 1 example, and is 0"),
    ):
        assert message in refused(command, capsys)


def test_memory_does_not_grow_with_the_rows(trained, capsys, monkeypatch):
    """No more than a chunk of rows is asked at once, and the file is read line by line."""
    monkeypatch.setattr(stream, "CHUNK", 8)
    seen = []
    real = classifier.Classifier.decisions

    def counted(self, examples, title=""):
        seen.append(len(examples))
        return real(self, examples, title)

    monkeypatch.setattr(classifier.Classifier, "decisions", counted)
    ok(PREDICT.replace("test.jsonl", "choose.jsonl"), capsys)
    assert max(seen) == 8 and sum(seen) == 90
