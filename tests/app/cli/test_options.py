"""Options that commands share: prompts, answers, columns, numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest

from scalabl_ref import InputError
from scalabl_ref.app import cli
from scalabl_ref.app.cli import options
from scalabl_ref.app.cli.parser import Parser
from scalabl_ref.evaluation.predict import MOST_SAMPLES

from ...data.test_answers import CHAT
from ...tickets import QUEUES
from ..commands import NEXT, TRAIN, facts, ok, refused, run, scores


@dataclass(frozen=True)
class Settings:
    """A field of each kind."""

    kind: Literal["plain", "fancy"] = "plain"
    maybe: Literal["a", "b"] | None = "a"
    name: str = "x"
    count: int = 3
    rate: float = 1e-3
    alpha: float | None = None
    parts: tuple[str, ...] = ("p", "q")
    fast: bool = False


HELPS = {field.name: f"the {field.name}" for field in dataclasses.fields(Settings)}


def settings_parser(**more) -> Parser:
    parser = Parser("prog")
    options.add_fields(parser, Settings, HELPS, **more)
    return parser


def test_options_of_fields_give_only_what_the_user_gave():
    for given in (
        {},
        {"kind": "fancy", "maybe": "b", "name": "y", "count": 4, "rate": 0.5, "alpha": 2.0,
         "parts": ["r", "s"], "fast": True},
    ):  # fmt: skip
        words = []
        for name, value in given.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)]
        assert options.given(Settings, settings_parser().parse_args(words)) == given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kind good", "--kind must be one of plain, fancy, not 'good'"),
        ("--maybe c", "--maybe must be one of a, b, not 'c'"),
        ("--count 1.5", "--count must be a whole number, not '1.5'"),
        ("--rate fast", "--rate must be a number, not 'fast'"),
        ("--name z", "--name must be one of x, y, not 'z'"),
    ],
)
def test_options_of_fields_have_the_fields_types_and_choices(words, message):
    with pytest.raises(InputError, match=message):
        settings_parser(choices={"name": ("x", "y")}).parse_args(words.split())


def test_help_of_fields_has_their_defaults():
    text = " ".join(settings_parser(default="{}, or the run's").format_help().split())
    for name, value in (("kind", "plain"), ("maybe", "a"), ("count", "3"), ("rate", "0.001"),
                        ("alpha", "2 * rank"), ("parts", "p q")):  # fmt: skip
        assert f"the {name} (default: {value}, or the run's)" in text
    assert "--fast the fast" in text and "the fast (" not in text


TICKETS = TRAIN.replace("train.jsonl", "tickets.jsonl")


@pytest.mark.parametrize("option", ["", " --prompt-template other.txt"])
def test_a_prompt_template_is_recorded_and_used_again(work, capsys, option):
    """In training, on held-out, test and other data, and in predict: as prompts written out."""
    (work / "own.txt").write_text("[{choices}] {question}\nI say:\n")
    (work / "other.txt").write_text("{question} Well:")
    shape = "[A. {}\nB. {}\nC. {}] {q}\nI say:"
    other = "{q} Well:" if option else shape
    questions = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    for name, form in (("whole.jsonl", shape), ("other.jsonl", other)):
        rows = [
            {**row, "prompt": form.format(*row["choices"], q=row["prompt"]), "choices": [*"ABC"]}
            for row in questions
        ]
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok(TRAIN + " --holdout 0.25 --prompt-template own.txt", capsys)
    whole = TRAIN.replace("train.jsonl", "whole.jsonl").replace("--out run", "--out whole")
    ok(whole + " --holdout 0.25", capsys)
    losses = [(work / name / "train.jsonl").read_text().split('"seconds"')[0] for name in
              ("run", "whole")]  # fmt: skip
    assert losses[0] == losses[1]
    given = json.loads((work / "run" / "run.json").read_text())["prompt_template"]
    assert given == "[{choices}] {question}\nI say:"

    evaluate = "evaluate --samples 3 --temperature --calibrate {0} --ood {0} --data {0} --run "
    ours = scores(evaluate.format("train.jsonl") + "run" + option, capsys)
    theirs = scores(evaluate.format("other.jsonl") + "whole", capsys)
    assert ours.pop("prompt_template") == ("{question} Well:" if option else given)
    assert theirs.pop("prompt_template") is None and ours == theirs
    assert (work / "run/predictions.jsonl").read_text() == (
        work / "whole/predictions.jsonl"
    ).read_text()
    if not option:  # held-out rows go through the template too
        ours = ok("evaluate --run run --data train.jsonl --temperature --force", capsys)
        theirs = ok("evaluate --run whole --data whole.jsonl --temperature", capsys)
        assert ours["temperature"] == theirs["temperature"]
    else:  # its prompts leave the choices out, which are too long for the model
        rows = [{**row, "choices": ["x" * 99, "y" * 99, "z"]} for row in questions]
        (work / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluate = "evaluate --run run --data train.jsonl --calibrate long.jsonl --force"
        assert "its prompt has" in refused(evaluate, capsys)
        assert ok(evaluate + option, capsys)["temperature"]["n_fit"] == len(rows)

    command = ["predict", "--run", "run", *option.split(), "--json", "--samples", "3"]
    prompt = other.format("x", "y", "z", q="Is it?")
    answers = []
    for text, choices in (("Is it?", "xyz"), (prompt, "ABC")):
        assert cli.main([*command, "--prompt", text, "--choices", *choices]) == 0
        answers.append(json.loads(capsys.readouterr().out)["probs"])
    assert answers[0] == answers[1]


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
        "leave --choices out, or give the run's labels" in message
        and "'Invoices, payments and refunds'" in message
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


def test_a_chat_is_remembered(work, capsys):
    (work / "model/chat_template.jinja").write_text(CHAT)
    ok(TRAIN + " --prompt-style chat --max-length 120 --drop-long", capsys)
    assert facts(work / "run")["prompt_style"] == "chat"
    chat = ok("evaluate --run run --data test.jsonl --samples 0", capsys)
    plain = ok(
        "evaluate --run run --data test.jsonl --samples 0 --prompt-style plain --out p", capsys
    )
    assert chat["prompt_style"] == "chat" and plain["prompt_style"] == "plain"
    assert chat["nll"] != plain["nll"]


def test_long_prompts_in_training_and_evaluation(work, capsys):
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
    _, said, _ = run("evaluate --run short --data long.jsonl --samples 0", capsys)
    assert "\nprompts longer than 100 tokens: 0 cut, 1 dropped\n" in said
    answers = (work / "short/predictions.jsonl").read_text().splitlines()
    assert [json.loads(a)["id"] for a in answers] == [str(i) for i in range(24) if i != 3]


def test_a_table_of_texts_and_labels(work, capsys):
    """Its format follows from its name, its columns from two options."""
    rows = "".join(f"text {i},{'ab'[i % 2]},x\n" for i in range(8))
    for name in ("set.csv", "set.txt"):
        (work / name).write_text("body,label,sort\n" + rows)
    (work / "sst2").write_text("0 poor\n1 fine\n")
    train = TRAIN.replace("train.jsonl", "set.csv --text-column body") + " --steps 1"
    unnamed = train.replace(" --text-column body", "")
    assert "set.csv: no column is called text, " in refused(unnamed, capsys)
    assert "2 to 26 different labels in 'sort', found 1" in refused(
        f"{train} --label-column sort", capsys
    )
    assert ok(train, capsys)["examples"] == 8
    named = train.replace("--out run", "--out next").replace("set.csv", "set.txt --format csv")
    told = run(named, capsys)[1].splitlines()[-1]
    more = "--format csv --text-column body"
    assert told == f"next: scalabl evaluate --run next --data TEST_FILE {more}"
    assert facts(work / "next")["format"] == "csv"
    assert json.loads((work / "run" / "run.json").read_text())["format"] == "csv"
    evaluate = "evaluate --run run --text-column body --samples 2 --data"
    metrics = ok(f"{evaluate} set.csv --ood set.csv", capsys)
    assert metrics["n"] == metrics["ood"]["n"] == 8
    assert ok(f"{evaluate} set.txt --format csv", capsys)["acc"] == metrics["acc"]
    assert "set.txt, line 1: not JSON" in refused(f"{evaluate} set.txt", capsys)
    assert ok(f"{evaluate} set.csv --ood sst2 --ood-format sst2", capsys)["ood"]["n"] == 2
    (work / "set.jsonl").write_text('{"prompt": "text 3"}\n')
    answers = []
    for data in ("set.csv", "set.txt --format csv", "set.jsonl"):  # only csv uses the column
        ok(f"predict --run run --samples 2 --data {data} --out {len(answers)}.csv", capsys)
        answers.append((work / f"{len(answers)}.csv").read_text().splitlines()[1:])
    assert len(answers[0]) == 8 and answers[0] == answers[1]
    assert answers[2][0].partition(",")[2] == answers[0][3].partition(",")[2]


def test_a_table_that_lacks_a_label_is_asked_with_all(work, capsys):
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
    (work / "one.jsonl").write_text('{"prompt": "text 1", "label": "y queue"}\n')
    ok("evaluate --run run --data one.jsonl --samples 0", capsys)  # only csv uses the columns
    (row,) = (work / "run/predictions.jsonl").read_text().splitlines()
    assert json.loads(row)["label"] == 1
    (work / "new.csv").write_text("body,queue\nt,w queue\n")
    assert "'w queue' is not one of" in refused("evaluate --run run --data new.csv", capsys)


def test_numbers_that_are_none_are_refused(work, capsys):
    ok(TRAIN + " --steps 1", capsys)
    evaluate = "evaluate --run run --data test.jsonl"
    for batch in ("0", "-3"):
        assert "batch must be at least 1" in refused(f"{evaluate} --batch {batch}", capsys)
    many = "2000000000"
    most = f"must be at most {MOST_SAMPLES:,}, and is 2,000,000,000"
    ask = "--run run --prompt a --choices b"
    for command in (f"{evaluate} --samples", f"predict {ask} --samples", "demo --samples",
                    "generate --model model --prompt a --samples",
                    "export --run run --to peft --out x --samples"):  # fmt: skip
        assert f"samples {most}" in refused(f"{command} {many}", capsys)
    assert f"most {most}" in refused(f"{evaluate} --samples auto --most {many}", capsys)
    assert "bins must be at most 10,000" in refused(f"{evaluate} --bins {many}", capsys)
    assert "rank 2000000000 is larger" in refused(f"{NEXT} --rank {many}", capsys)
    for option in ("--batch", "--micro-batch", "--limit", "--checkpoint-every"):
        command = NEXT.replace("--out next", f"--out next{option} {option} {many}")
        assert ok(command, capsys)["steps"] == 6
    assert ok(f"{evaluate} --batch {many} --limit {many}", capsys)["n"] == 9
    plan = "plan --config llama-2-7b"
    for numbers in ("--memory nan", "--memory 16 --rate 0 --bandwidth 9", "--memory inf"):
        assert "above 0" in refused(f"{plan} {numbers}", capsys)
    assert "cannot be measured on a CPU" in refused(f"{plan} --memory 16", capsys)
