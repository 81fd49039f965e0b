"""How a run is asked, by the commands: words, chats, tables, lengths, and a base model alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from scalabl_ref.app.study import Study, study

from ..data.test_answers import CHAT
from ..tickets import QUEUES, write_tickets
from .test_cli import TRAIN, ok, refused, work  # noqa: F401  the last is a fixture

TICKETS = TRAIN.replace("train.jsonl", "tickets.jsonl")


@pytest.fixture
def tickets(work):  # noqa: F811
    write_tickets(work / "tickets.jsonl", 24, 0)
    write_tickets(work / "others.jsonl", 9, 1)
    return work


def facts(folder):
    return json.loads((folder / "run.json").read_text())


def test_labels_are_words_from_training_to_predict(tickets, capsys):
    ok(TICKETS, capsys)
    info = facts(tickets / "run")
    assert (info["labels"], info["answer_tokens"]) == ("words", "bare")
    assert info["label_names"] == list(QUEUES) and len(info["head_tokens"]) == 5
    metrics = ok("evaluate --run run --data others.jsonl --samples 2 --ood train.jsonl", capsys)
    assert metrics["n"] == 9 and metrics["labels"] == "words"
    assert metrics["ood"]["n"] == 24 and metrics["ood"]["n_scored"] == 0, "their labels are others"
    answer = ok("predict --run run --prompt help --samples 2", capsys)
    assert answer["choices"] == list(QUEUES) and len(answer["probs"]) == 5
    message = refused("predict --run run --prompt help --choices x y", capsys)
    assert (
        "--choices must be its labels" in message and "'Invoices, payments and refunds'" in message
    )


def test_letters_can_be_asked_for_and_are_remembered(tickets, capsys):
    ok(TICKETS + " --labels letters --max-length 120", capsys)
    info = facts(tickets / "run")
    assert info["labels"] == "letters" and info["label_names"] == list(QUEUES)
    assert ok("evaluate --run run --data others.jsonl --samples 0", capsys)["labels"] == "letters"
    assert ok("predict --run run --prompt help", capsys)["choices"] == list(QUEUES)
    assert "the head was cut down to" in refused(
        "evaluate --run run --data others.jsonl --labels words --out other", capsys
    )


def test_a_table_that_lacks_a_label_is_asked_with_all(work, capsys):  # noqa: F811
    """The classes are those of the training file, in its order."""
    rows = ["id,body,queue", *(f"r{i},text {i},{'xyz'[i % 3]} queue" for i in range(12))]
    (work / "train.csv").write_text("\n".join(rows) + "\n")
    (work / "few.csv").write_text("\n".join([rows[0], rows[2], rows[3]]) + "\n")
    table = TRAIN.replace("train.jsonl", "train.csv") + " --holdout 0.25"
    ok(f"{table} --text-column body --label-column queue", capsys)
    metrics = ok("evaluate --run run --data few.csv --samples 0 --temperature", capsys)
    assert metrics["n"] == 2 and metrics["temperature"]["n_fit"] == 3
    answers = (work / "run/predictions.jsonl").read_text().splitlines()
    assert [json.loads(a)["label"] for a in answers] == [1, 2]
    assert [json.loads(a)["id"] for a in answers] == ["r1", "r2"]
    (work / "new.csv").write_text("body,queue\nt,w queue\n")
    assert "'w queue' is not one of" in refused("evaluate --run run --data new.csv", capsys)


def test_a_base_model_alone_answers_as_a_run_that_learnt_nothing(work, capsys):  # noqa: F811
    ok(TRAIN + " --lr 0 --method mle", capsys)
    run = ok("evaluate --run run --data test.jsonl", capsys)
    base = ok("evaluate --model model --data test.jsonl", capsys)
    assert base["method"] == "base" and base["samples"] == 0 and run["method"] == "mle"
    for key in ("n", "acc", "ece", "nll", "brier", "labels", "answer_tokens"):
        assert base[key] == run[key], key
    assert (work / "base-model/test/report.html").exists()
    assert "give --run, or --model" in refused("evaluate --data test.jsonl", capsys)
    assert "without a hold-out: give --calibrate" in refused(
        "evaluate --model model --data test.jsonl --temperature --out other", capsys
    )


def test_a_base_model_alone_asks_other_data_as_its_own(tickets, capsys):
    """Labels are words on --data, and so on --ood, where it would choose letters."""
    command = "evaluate --model model --data tickets.jsonl --ood train.jsonl"
    metrics = ok(command, capsys)
    assert metrics["labels"] == "words" and metrics["ood"]["n_scored"] == 0


def test_a_chat_is_remembered(work, capsys):  # noqa: F811
    (work / "model/chat_template.jinja").write_text(CHAT)
    ok(TRAIN + " --prompt-style chat --max-length 120 --drop-long", capsys)
    assert facts(work / "run")["prompt_style"] == "chat"
    chat = ok("evaluate --run run --data test.jsonl --samples 0", capsys)
    plain = ok(
        "evaluate --run run --data test.jsonl --samples 0 --prompt-style plain --out p", capsys
    )
    assert chat["prompt_style"] == "chat" and plain["prompt_style"] == "plain"
    assert chat["nll"] != plain["nll"]


def test_long_prompts_in_training_and_evaluation(work, capsys):  # noqa: F811
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    rows[3]["prompt"] += " word" * 40
    (work / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = TRAIN.replace("train.jsonl", "long.jsonl")
    message = refused(long, capsys)
    assert "example 3 (id 3)" in message and "--max-length 128" in message
    assert not (work / "run/run.json").exists()
    assert ok(f"{long} --max-length 100", capsys)["examples"] == 24
    assert ok(f"{long} --max-length 100 --drop-long --out short", capsys)["examples"] == 23
    assert ok("evaluate --run run --data long.jsonl --samples 0", capsys)["n"] == 24
    assert ok("evaluate --run short --data long.jsonl --samples 0", capsys)["n"] == 23
    answers = (work / "short/predictions.jsonl").read_text().splitlines()
    assert [json.loads(a)["id"] for a in answers] == [str(i) for i in range(24) if i != 3]


def test_a_study_has_templates_and_answers_of_its_own(tickets):
    (tickets / "own.txt").write_text("{question} Queue:\n\n")
    settings = {"steps": 2, "batch": 4, "rank": 2}
    config = Study(
        "model", "tickets.jsonl", "others.jsonl", prompt_template="own.txt", labels="words",
        answer_tokens="bare", methods=("mle",), lr=(1e-3,), seeds=(0,), settings=settings,
        knobs={"mle": [1.0]},
    )  # fmt: skip
    study(config, tickets / "out")
    (run,) = (tickets / "out/runs").iterdir()
    info = facts(run)
    assert info["prompt_template"] == "{question} Queue:\n" and info["labels"] == "words"
    assert info["label_names"] == list(QUEUES) and len(info["head_tokens"]) == 5
    # Other prompts are another run, though files and settings are the same.
    study(dataclasses.replace(config, labels="letters"), tickets / "out")
    kinds = sorted(facts(run)["labels"] for run in (tickets / "out/runs").iterdir())
    assert kinds == ["letters", "words"]
