"""A run as a classifier: one answer to a text, whichever way it is asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scalabl_ref
from scalabl_ref import InputError, Llama
from scalabl_ref.app import cli
from scalabl_ref.core.objective import Batch
from scalabl_ref.core.philox import WORD
from scalabl_ref.core.predictive import predictive
from scalabl_ref.data import label_names, load, question
from scalabl_ref.evaluation import metrics
from scalabl_ref.evaluation.answering import Answers, chosen, text_keys
from scalabl_ref.evaluation.classifier import classifier, cooled, default_samples, open_run
from scalabl_ref.evaluation.predict import predict
from scalabl_ref.evaluation.rule import answered, decided

from ..app.commands import TRAIN, ok
from ..models import tiny_folder, tiny_model
from ..tickets import write_tickets
from ..tolerances import rounding

TICKETS = "train --model model --data tickets.jsonl --steps 6 --batch 4 --rank 2"


@pytest.fixture
def tickets(tmp_path, monkeypatch):
    """A folder with a model and two files of tickets, as the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    write_tickets(tmp_path / "tickets.jsonl", 24, 0)
    write_tickets(tmp_path / "others.jsonl", 9, 1)
    return tmp_path


@pytest.fixture
def texts(tickets) -> list[str]:
    lines = (tickets / "others.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


@pytest.mark.parametrize("method", ["scalabl", "mle", "dropout", "laplace"])
def test_a_text_has_one_answer(tickets, texts, capsys, method):
    """From predict --prompt, evaluate and Python, alone and among others, to the bit."""
    trained = "mle" if method == "laplace" else method
    ok(f"{TICKETS} --method {trained} --out run", capsys)
    if method == "laplace":
        ok("posterior laplace --run run --out laplace", capsys)
    run = "laplace" if method == "laplace" else "run"
    clf = scalabl_ref.load(run, samples=3, seed=5)
    ok(f"evaluate --run {run} --data others.jsonl --samples 3 --seed 5 --batch 1", capsys)
    lines = (tickets / run / "predictions.jsonl").read_text().splitlines()
    together, alone = clf.predict_proba(texts), [clf(text) for text in texts]
    reverse = clf.predict_proba(texts[::-1])
    larger = replace(clf, batch=4).predict_proba(texts)
    for i, (text, line) in enumerate(zip(texts, lines, strict=True)):
        assert tuple(json.loads(line)["probs"]) == alone[i].probs
        assert together[i].tolist() == reverse[-1 - i].tolist() == list(alone[i].probs)
        asked = question(text, clf.classes_, "jsonl")
        assert alone[i] == clf.decisions([asked])[0]
    for text in texts[:2]:
        command = ["predict", "--run", run, "--prompt", text, "--samples", "3", "--seed", "5"]
        assert cli.main([*command, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert tuple(answer["probs"]) == clf(text).probs
        assert answer["mutual_information"] == clf(text).mutual_information
    assert (larger - together).abs().max() <= rounding(torch.float32, 256)
    assert (clf(texts[0]).mutual_information == 0) == (method == "mle")
    other = replace(clf, seed=6)(texts[0])
    assert (other.probs == clf(texts[0]).probs) == (method == "mle")


def test_answers_are_those_of_the_probabilities(tickets, texts, capsys):
    ok(f"{TICKETS} --out run", capsys)
    clf = scalabl_ref.load("run", samples=4)
    names = label_names(load("tickets.jsonl", "jsonl"))
    assert clf.wording.words is not None and sorted(clf.classes_) == sorted(names)
    probs, decisions = clf.predict_proba(texts), clf.decide(texts)
    assert probs.shape == (len(texts), len(names)) and probs.dtype == torch.float64
    assert (probs.sum(1) - 1).abs().max() <= rounding(torch.float64, 16)
    for row, decision, answer in zip(probs, decisions, clf.predict(texts), strict=True):
        assert decision.probs == tuple(row.tolist()) and decision.decision is None
        assert decision.answer == answer == clf.classes_[int(row.argmax())]
        assert decision.confidence == max(decision.probs)
        parts = decision.expected_entropy + decision.mutual_information
        assert abs(decision.entropy - parts) <= rounding(torch.float64, 16)
    turned = clf.predict_proba(iter(texts), clf.classes_[::-1])
    assert turned.equal(probs)  # in the order of the classes, whatever the order of the choices
    assert clf.decide([]) == [] and clf.predict_proba([]).shape == (0, len(names))
    middle = sorted(d.confidence for d in decisions)[4]
    decided = replace(clf, threshold=middle).decide(texts)
    assert [d.decision == "answer" for d in decided] == [d.confidence >= middle for d in decided]
    assert {d.decision for d in decided} == {"answer", "human"}


def test_a_temperature_is_of_the_average(tickets, texts, capsys):
    ok(f"{TICKETS} --out run", capsys)
    clf = scalabl_ref.load("run", samples=4)
    hot = replace(clf, temperature=2.0)
    plain, warm = clf.decide(texts), hot.decide(texts)
    expected = metrics.apply_temperature(clf.predict_proba(texts), 2.0)
    assert hot.predict_proba(texts).equal(expected)
    for i, (before, after) in enumerate(zip(plain, warm, strict=True)):
        assert after.entropy == metrics.entropy(expected)[i].item() > before.entropy
        assert after.mutual_information == before.mutual_information
        assert after.expected_entropy == before.expected_entropy
        assert after.answer == before.answer and after.confidence < before.confidence


def test_a_run_of_different_choices_needs_them(tickets, capsys):
    rows = [{"prompt": f"{i} x", "choices": [f"a{i}", "b", "c"], "label": i % 3} for i in range(9)]
    (tickets / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok(TRAIN, capsys)
    clf = scalabl_ref.load("run", samples=2)
    for ask in (lambda: clf.classes_, lambda: clf("hello"), lambda: clf.predict(["hello"])):
        with pytest.raises(InputError, match=r"different choices: give --choices \(choices=\["):
            ask()
    assert clf("hello", ["one", "two", "three"]).answer in ("one", "two", "three")
    two = clf("hello", ["one", "two"])
    assert len(two.probs) == 2 and sum(two.probs) < 1 and two.confidence == max(two.probs)
    assert clf.predict_proba(["hello"], ["one", "two"]).tolist() == [list(two.probs)]
    assert clf.predict_proba([], ["one", "two"]).shape == (0, 2)
    assert clf.predict(iter(["hello"]), ["one", "two"]) == [two.answer]
    with pytest.raises(InputError, match="run: can answer 3 choices, not 4"):
        clf.predict(["hello"], ["a", "b", "c", "d"])


def test_mistakes_are_named(tickets, capsys):
    ok(f"{TICKETS} --out run", capsys)
    clf = scalabl_ref.load("run", samples=2)
    tiny_folder(tickets / "other", rms_norm_eps=1e-3)
    for ask, message in (
        (lambda: clf.predict("help"), "expected a list of texts, not one text"),
        (lambda: clf.predict_proba("help"), "expected a list of texts, not one text"),
        (lambda: clf(["help"]), "expected one text, not list"),
        (lambda: clf.decisions(["help"]), r"for texts call clf\.decide\(texts\)"),
        (lambda: clf.predict(["help", " "]), "text 1: the question is empty"),
        (lambda: clf.predict([" "]), "^the question is empty"),
        (lambda: clf.predict(["help", None]), "text 1: the question must be a text, not None"),
        (lambda: clf.predict(["help"], "ab"), "choices must be a list of texts"),
        (lambda: clf.predict(["help"], ["x", "y"]), "or give the run's labels: .*'Network, Wi-Fi"),
        (lambda: clf.predict(["x", "x" * 200]), "its prompt has 208 tokens"),
        (
            lambda: scalabl_ref.load("run", "other"),
            "trained on .*model; other is another model: gi",
        ),
        (lambda: scalabl_ref.load("absent"), "absent: no such folder: expected a run"),
    ):
        with pytest.raises(InputError, match=message):
            ask()


def test_a_run_is_opened_as_it_was_trained(tickets, capsys, monkeypatch):
    """It keeps dtype and quantisation. It goes to the given device, or to the CPU to be sharded."""
    ok(f"{TICKETS} --steps 1 --dtype bfloat16 --quantize int8 --out run", capsys)
    (tickets / "model").rename("moved")
    real, asked = Llama.from_pretrained, []

    def opened(*arguments):
        asked.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(Llama, "from_pretrained", opened)
    base, device = Path("moved"), torch.device("cpu")
    found = scalabl_ref.load("run", base, device=device).model
    assert found.norm.weight.dtype == torch.bfloat16
    open_run("run", base, torch.device("meta"), shard=lambda model: None)
    assert asked == [(base, torch.bfloat16, where, "int8") for where in (device, "cpu")]


def test_a_run_is_asked_as_its_rule_was_fitted(tickets, capsys):
    ok(f"{TICKETS} --steps 1 --out run", capsys)
    clf = scalabl_ref.load("run")
    assert (clf.samples, clf.seed, clf.design, clf.batch) == (10, 0, "independent", 1)
    fit = "calibrate --run run --data others.jsonl --samples 4 --seed 5 --design latin"
    value = ok(fit, capsys)["temperature"]["value"]
    clf = scalabl_ref.load("run", batch=7)
    assert (clf.samples, clf.seed, clf.design, clf.batch) == (4, 5, "latin", 7)
    assert clf.temperature == value and clf.run == "run"
    raw = scalabl_ref.load("run", raw=True)
    assert (raw.samples, raw.seed, raw.design, raw.temperature) == (10, 0, "independent", None)
    raw = scalabl_ref.load("run", samples=0, seed=3, design="antithetic", raw=True)
    assert (raw.samples, raw.seed, raw.design) == (0, 3, "antithetic")
    for given, message in (({"seed": 0}, "give --seed 5, or"), ({"samples": 0}, "give --samples 4"),
                           ({"design": "independent"}, "give --design latin")):  # fmt: skip
        with pytest.raises(InputError, match=f"is of other draws: {message}"):
            scalabl_ref.load("run", **given)
    opened, other = open_run("run"), replace(clf.wording, max_length=50)
    own = classifier(opened, "run", None, 5, "latin", wording=replace(clf.wording))
    assert own.temperature == value and own.wording == clf.wording
    assert classifier(opened, "run", wording=other, raw=True).wording == other
    with pytest.raises(InputError, match="is of the run's own prompts"):
        classifier(opened, "run", None, 5, "latin", wording=other)


def test_draws_of_a_gaussian_over_logits_are_a_thousand_by_default():
    kinds = {None: 10, "swag": 10, "ensemble": 10, "laplace": 1000, "subspace": 1000}
    for posterior, samples in kinds.items():
        assert default_samples({"posterior": posterior}) == samples
    assert default_samples({"posterior": "subspace", "predicts": "sampled"}) == 10


def test_a_posterior_does_not_work_with_a_split_base(tickets, capsys):
    ok(f"{TICKETS} --method mle --out run", capsys)
    ok("posterior laplace --run run --out laplace", capsys)
    split = []
    assert open_run("run", shard=split.append).posterior is None and len(split) == 1
    with pytest.raises(InputError, match="^laplace: posterior laplace does not work with --shard"):
        open_run("laplace", shard=split.append)
    assert len(split) == 1


def test_prompts_that_training_left_out_are_refused(tickets, capsys):
    ok(f"{TICKETS} --max-length 100 --drop-long --out run", capsys)
    clf = scalabl_ref.load("run", samples=2)
    with pytest.raises(InputError, match="row 1: its prompt has 110 tokens, and the run leaves"):
        clf.predict(["x", "x" * 102])
    with pytest.raises(InputError, match="row 0: its prompt has 101 tokens, and the run leaves"):
        clf.predict(["x" * 93])
    assert len(clf.predict(["x" * 92])) == 1  # as long as the run takes


def test_a_row_chooses_among_its_own_choices():
    probs = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]], dtype=torch.float64)
    examples = [question("q", names, "jsonl") for names in ("ab", "abc", "xyz")]
    found = Answers(examples, torch.zeros(3).long(), predictive(probs.log()[None]), 1)
    places, confidence = chosen(found)
    assert places.tolist() == [1, 2, 0]
    assert (confidence - torch.tensor([0.2, 0.7, 0.4])).abs().max() < 1e-7


def test_a_row_as_sure_as_the_threshold_is_answered():
    probs = torch.tensor([[0.75, 0.25], [0.625, 0.375], [0.125, 0.875]], dtype=torch.float64)
    examples = [question("q", "ab", "jsonl")] * 3
    prediction = predictive(probs.log()[None])._replace(probs=probs)
    found = Answers(examples, torch.tensor([0, 1, 0]), prediction, 1)
    kept = {"threshold": 0.75, "coverage": 2 / 3, "answered": 2, "right": 1, "acc": 0.5}
    assert answered(found, 0.75) == kept
    asked = [decided(confidence, 0.75) for confidence in (0.75, 0.7499)]
    assert asked == ["answer", "human"] and decided(0.1, None) is None


def test_cooling_by_one_changes_nothing():
    probs = torch.tensor([[0.1, 0.9], [0.5, 0.5]], dtype=torch.float64)
    before = predictive(probs.log()[None])
    after = cooled(before, 1.0)
    assert (after.probs - probs).abs().max() <= rounding(torch.float64, 16)
    assert (after.entropy - before.entropy).abs().max() <= rounding(torch.float64, 16)


# --- the key of the noise -------------------------------------------------------------------------


def test_keys_are_of_the_text_alone():
    """The last 32 of the first 64 bits of a SHA-256."""
    model = tiny_model()
    keys = text_keys(model, [[1, 2, 3], [4], [1, 2, 3], [12, 3]])
    assert keys[0] == keys[2] and len(set(keys.tolist())) == 3
    assert keys[0] == int(hashlib.sha256(b"1,2,3").hexdigest()[8:16], 16)
    assert text_keys(model, [[4]]).tolist() == keys[1:2].tolist()
    assert int(keys.min()) >= 0 and int(keys.max()) < WORD


def test_keys_leave_room_for_tokens():
    """Under token sampling each token has a group of its own, below 2^32."""
    model = tiny_model(sampling="token")
    keys = text_keys(model, [[i] for i in range(200)])
    assert int(keys.max()) < WORD // 64
    batch = Batch(torch.ones(200, 3).long(), torch.full((200,), 3), torch.zeros(200).long(), keys,
                  torch.tensor([5, 7, 11]))  # fmt: skip
    assert predict(model, batch, samples=2).probs.shape == (200, 3)
