"""The commands as a user types them: results, files, exit codes, and what bad input says."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scalabl_ref import AdapterConfig, Llama, add_adapters, save_run
from scalabl_ref.app import cli
from scalabl_ref.data import encode, load
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation.evaluate import results_folder
from scalabl_ref.evaluation.predict import MOST_SAMPLES
from scalabl_ref.support.tensors import load_pickle, load_tensors, save_tensors
from scalabl_ref.training.lock import alone

from ..conftest import ROOT
from ..models import TINY, questions_file, tiny_folder
from ..support.test_fields import strict
from ..support.test_files import full_disk
from ..tolerances import rounding


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a model and two data files in it, as the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    questions_file(tmp_path / "train.jsonl")
    questions_file(tmp_path / "test.jsonl", rows=9)
    return tmp_path


TRAIN = "train --model model --data train.jsonl --out run --steps 6 --batch 4 --rank 2"

RESULTS = ("metrics.json", "predictions.jsonl", "report.html")
NEXT = TRAIN.replace("--out run", "--out next")


def run(command: str, capsys) -> tuple[int, str, str]:
    code = cli.main(command.split())
    out, err = capsys.readouterr()
    return code, out, err


def ok(command: str, capsys) -> dict:
    """The JSON result of a command that must succeed, with nothing else on standard output."""
    code, out, err = run(command + " --json", capsys)
    assert code == 0, err
    return json.loads(out)


def scores(command: str, capsys) -> dict:
    """The results of `evaluate`, without what they are of."""
    about = ("data", "data_sha256", "label_names", "settings")
    return {key: value for key, value in ok(command, capsys).items() if key not in about}


def refused(command: str, capsys) -> str:
    """The message of a command that must fail: one line, exit code 2, no traceback."""
    code, out, err = run(command, capsys)
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("method", ["scalabl", "mle", "blob"])
def test_train_evaluate_predict(work, capsys, method):
    result = ok(f"{TRAIN} --method {method} --holdout 0.25", capsys)
    assert result["steps"] == 6 and result["examples"] == 18
    log = [json.loads(line) for line in (work / "run" / "train.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(6))

    metrics = ok(
        "evaluate --run run --data test.jsonl --ood train.jsonl --samples 4 --temperature", capsys
    )
    assert metrics == json.loads((work / "run" / "metrics.json").read_text())
    assert metrics["method"] == method and metrics["n"] == 9 and metrics["bins"] == 15
    assert metrics["kl"] == (None if method == "mle" else "forward")
    assert {"acc", "ece", "nll", "brier", "samples"} <= metrics.keys()
    assert metrics["temperature"]["n_fit"] == 6 and metrics["temperature"]["value"] > 0
    assert metrics["ood"]["n"] == 24
    assert {"auroc_entropy", "auroc_mutual_information", "ece"} <= metrics["ood"].keys()
    for name, (low, high) in metrics["intervals"].items():
        assert low <= high and math.isfinite(high), name

    rows = [json.loads(line) for line in (work / "run/predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(9)]
    right = [row["prediction"] == row["label"] for row in rows]
    assert metrics["acc"] == sum(right) / 9
    nll = -sum(math.log(row["probs"][row["label"]]) for row in rows) / 9
    assert math.isclose(metrics["nll"], nll, rel_tol=rounding(torch.float64, 32))
    if method == "mle":
        assert all(row["mutual_information"] == 0 for row in rows)
    assert "<svg" in (work / "run" / "report.html").read_text()

    answer = ok("predict --run run --prompt hello --choices one two three --samples 4", capsys)
    assert math.isclose(sum(answer["probs"]), 1.0, rel_tol=rounding(torch.float64, 32))
    assert answer["entropy"] >= answer["expected_entropy"]


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


def test_a_posterior_keeps_its_runs_prompt_template(work, capsys):
    """Fitted with it, on any data; runs that differ in it are no ensemble."""
    (work / "own.txt").write_text("{question} Well:")
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    whole = [{**row, "prompt": row["prompt"] + " Well:", "choices": [*"ABC"]} for row in rows]
    (work / "whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    ok(f"{TRAIN} --method mle --prompt-template own.txt", capsys)
    ok(f"{TRAIN} --method mle".replace("train.jsonl", "whole.jsonl") + " --out whole", capsys)
    precisions = [
        ok(f"posterior laplace --run {run} --out {run}{i}{data}", capsys)["precision"]
        for i, data in enumerate(("", " --data {}.jsonl"))
        for run, data in (("run", data.format("train")), ("whole", data.format("whole")))
    ]
    assert len(set(precisions)) == 1
    evaluate = "evaluate --samples 2 --run {}0 --data {}.jsonl"
    pairs = (("run", "train"), ("whole", "whole"))
    ours, theirs = (scores(evaluate.format(*pair), capsys) for pair in pairs)
    assert ours.pop("prompt_template") == "{question} Well:"
    assert theirs.pop("prompt_template") is None and ours == theirs
    ensemble = "posterior ensemble --run run whole --out both"
    assert "differs from run in prompt_template: no ensemble" in refused(ensemble, capsys)


def test_a_run_that_a_program_saved_is_one(work, capsys):
    """With no fact but the base's folder, which is all that `save_run` asks for."""
    data = encode(load("train.jsonl", "jsonl"), load_tokenizer("model"))
    for out, method in (("ours", "scalabl"), ("plain", "mle")):
        model = Llama.from_pretrained("model").trim_head(data.classes)
        add_adapters(model, AdapterConfig(method, rank=2))
        save_run(out, model, {"model": "model"})
    metrics = ok("evaluate --run ours --data test.jsonl --samples 2", capsys)
    assert (metrics["kl"], metrics["objective"], metrics["prompt_template"]) == (None,) * 3
    answer = ok("predict --run ours --prompt hello --choices one two three", capsys)
    assert answer["entropy"] > 0
    assert ok("export --run ours --to peft --out adapter", capsys)["folders"] == ["adapter"]
    assert ok(TRAIN.replace("--out run", "--init ours --out next"), capsys)["steps"] == 6
    temperature = "evaluate --run ours --data test.jsonl --temperature --force"
    assert "was trained without --holdout" in refused(temperature, capsys)
    laplace = "posterior laplace --run plain --out laplace"
    assert "does not say what file it was trained on: give --data" in refused(laplace, capsys)
    ok(f"{laplace} --data train.jsonl", capsys)
    assert ok("evaluate --run laplace --data test.jsonl", capsys)["method"] == "laplace"


def test_a_runs_facts_are_checked_before_its_base_is_read(work, capsys):
    ok(TRAIN, capsys)
    record = json.loads((work / "run" / "run.json").read_text())
    for key, value in (("dtype", "float99"), ("model", 5), ("head_tokens", "abc")):
        (work / "run" / "run.json").write_text(json.dumps({**record, key: value}))
        for command in ("evaluate --data test.jsonl", "predict --prompt a --choices b", TRAIN):
            out = "--init" if command == TRAIN else "--run"
            said = refused(command.replace("--out run", "--out x") + f" {out} run", capsys)
            assert f"run/run.json: {key} must be " in said and f", not {value!r}" in said


def test_draws_of_a_posterior_have_no_design(work, capsys):
    for seed, out in enumerate("ab"):
        ok(f"{TRAIN} --method mle --seed {seed}".replace("run", out), capsys)
    ok("posterior ensemble --run a b --out both", capsys)
    words = refused("evaluate --run both --data test.jsonl --design latin", capsys)
    assert "draws of Ensemble are independent, not latin" in words


def test_commands_speak_to_people_too(work, capsys):
    code, out, _ = run(TRAIN, capsys)
    assert code == 0 and "trained 6 steps on 24 examples" in out
    code, out, _ = run("evaluate --run run --data test.jsonl --samples 2", capsys)
    assert code == 0 and "ACC" in out and "report.html" in out
    code, out, _ = run("predict --run run --prompt hello --choices one two three", capsys)
    assert code == 0 and "mutual information:" in out


def test_seeds_decide_everything(work, capsys):
    losses = []
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        losses.append(ok(f"{TRAIN} --seed {seed}".replace("run", out), capsys)["last"]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_an_infinite_nll_is_null_in_json(work, capsys):
    """Of a model that is sure and wrong; people read "inf", and the card and the page know it."""
    path = work / "model" / "model.safetensors"
    tensors = dict(load_tensors(path)[0])
    one, *others = load_tokenizer("model").class_token_ids(3, "\nAnswer:")
    head = tensors["lm_head.weight"] * 5000
    head[others] = -head[one]
    save_tensors(path, {**tensors, "lm_head.weight": head}.items())
    ok(TRAIN + " --lr 1e-9", capsys)
    evaluate = "evaluate --run run --data test.jsonl --samples 2 --ood train.jsonl"
    code, out, err = run(evaluate + " --json", capsys)
    assert code == 0, err
    result = strict(out)
    assert result["nll"] is None and result["ood"]["nll"] is None and 0 < result["acc"] < 1
    assert strict((work / "run" / "metrics.json").read_text()) == result
    rows = (work / "run" / "predictions.jsonl").read_text().splitlines()
    assert {strict(row)["entropy"] for row in rows} == {0.0}
    assert "∞" in (work / "run" / "report.html").read_text()
    code, out, _ = run(evaluate, capsys)
    assert code == 0 and " inf [" in out
    ok("export --run run --to peft --out adapter", capsys)
    assert " | inf | " in (work / "adapter" / "README.md").read_text()
    for command in ("predict --run run --prompt hello --choices one two three", evaluate):
        assert "-0.0" not in run(command, capsys)[1]


def results(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def test_each_data_set_has_results_of_its_own(work, capsys):
    """In a folder of its name; those of the last evaluation lie in the run as well."""
    ok(TRAIN, capsys)
    for name in ("test", "train", "test"):
        metrics = ok(f"evaluate --run run --data {name}.jsonl --samples 2", capsys)
        digest = hashlib.sha256((work / f"{name}.jsonl").read_bytes()).hexdigest()
        assert (metrics["data"], metrics["data_sha256"]) == (f"{name}.jsonl", digest)
        assert metrics["limit"] is None
        assert json.loads((work / "run" / name / "metrics.json").read_text()) == metrics
        assert results(work / "run" / name) == results(work / "run")
    assert results(work / "run" / "train") != results(work / "run")
    before = contents(work / "run")
    metrics = ok("evaluate --run run --data test.jsonl --out elsewhere --limit 4", capsys)
    assert metrics["limit"] == 4 and contents(work / "run") == before
    assert sorted(path.name for path in (work / "elsewhere").iterdir()) == sorted(RESULTS)


@pytest.mark.parametrize(
    ("data", "name"),
    [("a/b.c.jsonl", "b_c"), ("checkpoint.jsonl", "checkpoint_data"), ("x/..", ".."),
     ("Où  est-ce?.jsonl", "Où_est-ce"), ("....jsonl", "data"), (".lock", "lock")],
)  # fmt: skip
def test_a_data_sets_folder_is_called_as_its_file(tmp_path, monkeypatch, data, name):
    monkeypatch.chdir(tmp_path)
    name = tmp_path.name if name == ".." else name
    assert results_folder("run", data) == Path("run") / name


def test_others_results_are_not_written_over(work, capsys):
    """Which is said before the base is read; --force writes, and --out elsewhere."""
    ok(TRAIN, capsys)
    ok(TRAIN.replace("--out run", "--out next") + " --seed 1", capsys)
    questions_file(work / "other" / "test.jsonl", rows=5)
    evaluate = "evaluate --run run --data test.jsonl --samples 2"
    first = ok(evaluate, capsys)
    before = contents(work)
    (work / "model").rename(work / "gone")
    said = refused(evaluate.replace("test", "other/test"), capsys)
    assert said.startswith("error: run/test: holds results of another data file"), said
    assert said.endswith(": give --force or --out DIR\n")
    said = refused(evaluate.replace("--run run", "--run next --out run/test"), capsys)
    assert said.startswith("error: run/test: holds results of another run"), said
    said = refused("evaluate --model gone --data test.jsonl --out run/test", capsys)
    assert said.startswith("error: run/test: holds results of another run"), said
    (work / "gone").rename(work / "model")
    assert contents(work) == before
    assert ok(evaluate, capsys) == first and contents(work) == before
    assert ok(f"{evaluate} --seed 1 --bins 10", capsys)["seed"] == 1, "its own may be renewed"
    assert ok(evaluate.replace("test", "other/test") + " --force", capsys)["n"] == 5
    ok("evaluate --model model --data test.jsonl --out both", capsys)
    again = "evaluate --model next/../gone --data test.jsonl --out both"
    (work / "model").rename(work / "gone")
    assert "both: holds results of another model" in refused(again, capsys)
    (work / "both" / "metrics.json").write_text("{}")
    assert "both: holds results of another data file" in refused(again, capsys)
    assert ok(f"{again} --force", capsys)["n"] == 9


FULL = "cannot be written: File too large"


@pytest.mark.parametrize(
    ("command", "rooms", "message"),
    [
        (TRAIN.replace("--out run", "--out next"), (0, 400, 4000), FULL),
        ("export --run run --to hf --out next", (0, 4000), f"next/model.safetensors: {FULL}"),
        ("export --run run --to peft --out next", (0, 1000), FULL),
        ("import --from peft peft --model model --out next", (0, 1000), FULL),
        ("posterior laplace --run run --out next", (0, 1000), FULL),
        ("evaluate --run run --data test.jsonl", (0, 400, 4000), FULL),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    work, capsys, command, rooms, message
):
    ok(f"{TRAIN} --method mle", capsys)
    ok("export --run run --to peft --out peft", capsys)
    before = contents(work)
    for room in rooms:
        with full_disk(room):
            code, _, said = run(command, capsys)  # training may have begun, and said so
        assert code == 2 and said.count("\n") == 1, (room, said)
        assert said.startswith("error: ") and message in said, (room, said)
        new = contents(work).keys() - before.keys()
        assert {Path(path).name for path in new} <= {"train.jsonl"}, (room, new)
        assert {path: data for path, data in contents(work).items() if path in before} == before
        (work / "next" / "train.jsonl").unlink(missing_ok=True)


def test_samples_zero_is_the_mean_model(work, capsys):
    ok(TRAIN + " --init-sigma 1", capsys)
    ok("evaluate --run run --data test.jsonl --samples 0", capsys)
    rows = [json.loads(line) for line in (work / "run/predictions.jsonl").read_text().splitlines()]
    assert all(row["mutual_information"] == 0 for row in rows)


def test_a_bfloat16_base_keeps_float32_adapters(work, capsys):
    ok(TRAIN + " --dtype bfloat16", capsys)
    tensors, _ = load_tensors(work / "run" / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert ok("evaluate --run run --data test.jsonl", capsys)["n"] == 9


def test_out_of_distribution_with_more_classes_is_scored_on_what_it_can_answer(work, capsys):
    questions_file(work / "wide.jsonl", rows=10, choices=3)
    questions_file(work / "train.jsonl", choices=2)
    questions_file(work / "test.jsonl", rows=9, choices=2)
    ok(TRAIN, capsys)
    ood = ok("evaluate --run run --data test.jsonl --ood wide.jsonl", capsys)["ood"]
    labels = [i * 5 % 3 for i in range(10)]
    assert ood["n"] == 10 and ood["n_scored"] == sum(label < 2 for label in labels)
    for asked in ("wide.jsonl", "test.jsonl --calibrate wide.jsonl"):
        said = refused(f"evaluate --run run --data {asked}", capsys)
        assert "example 1 (id 1): its answer is C, but there are 2 classes, to B" in said


def test_generation(work, capsys):
    ok(TRAIN + " --head full", capsys)
    result = ok("generate --run run --prompt hello --max-new-tokens 5 --samples 3", capsys)
    assert len(result["tokens"]) == 5 and result["text"].startswith("hello")
    plain = ok("generate --model model --prompt hello --max-new-tokens 5", capsys)
    assert all(token["mutual_information"] == 0 for token in plain["tokens"])
    ids = [token["id"] for token in plain["tokens"]]
    config = {"eos_token_id": [next(i for i in range(256) if i not in ids), ids[-1]]}
    (work / "model" / "generation_config.json").write_text(json.dumps(config))
    stopped = ok("generate --model model --prompt hello --max-new-tokens 5", capsys)
    assert [token["id"] for token in stopped["tokens"]] == ids[: ids.index(ids[-1])]
    assert len(stopped["tokens"]) < 5


def test_a_moved_base_is_found_by_model(work, capsys):
    ok(TRAIN, capsys)
    (work / "model").rename(work / "elsewhere")
    assert "model: no such file" in refused(
        "evaluate --run run --data test.jsonl", capsys
    ) or "config.json: no such file" in refused("evaluate --run run --data test.jsonl", capsys)
    assert ok("evaluate --run run --data test.jsonl --model elsewhere", capsys)["n"] == 9


def test_count_and_info(capsys):
    count = ok("count --config llama-2-7b", capsys)
    assert count["scalabl"] - count["lora"] == 1040
    code, out, _ = run("count --config smollm2-135m --rank 4 --targets q_proj", capsys)
    assert code == 0 and "134,515,008" in out
    info = ok("info", capsys)
    assert info["torch"] == torch.__version__ and isinstance(info["native"]["built"], bool)


def test_every_command_has_help(capsys):
    for name in cli._COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        out, _ = capsys.readouterr()
        assert caught.value.code == 0
        assert all(option in out for option in ("--json", "--seed", "--device"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model absent", "absent/config.json: no such file"),
        ("--data absent.jsonl", "absent.jsonl: no such file"),
        ("--rank 99", "rank 99 is larger than a dimension of layers.0.attn.q_proj"),
        ("--targets q_porj", "unknown target 'q_porj'"),
        ("--steps 0", "steps must be at least 1"),
        ("--lr nan", "lr must be finite"),
        ("--holdout 1.5", "--holdout must be in [0, 1)"),
        ("--limit 0", "the limit must be at least 1"),
        ("--device nonsense", "device 'nonsense' cannot be used"),
        ("--shard", "start them with torchrun"),
        ("--offload-weights", "torchrun --nproc-per-node 1"),
        ("--timeout 0", "timeout must be above 0 s"),
        ("--seed -1", "seed must be"),
        ("--format sst2", "train.jsonl, line 1"),
        ("--prompt-template absent.txt", "absent.txt: no such file"),
    ],
)
def test_bad_arguments_end_in_one_line(work, capsys, change, message):
    assert message in refused(f"{TRAIN} {change}", capsys)
    assert not (work / "run" / "run.json").exists()


def test_a_bad_row_is_named(work, capsys):
    with open(work / "train.jsonl", "a") as file:
        file.write('{"prompt": "x", "choices": ["a", "b"], "label": 2}\n')
    assert "train.jsonl, line 25: label must be the place in choices" in refused(TRAIN, capsys)


def test_a_table_of_texts_and_labels(work, capsys):
    """Its format follows from its name, its columns from two options."""
    rows = "".join(f"text {i},{'ab'[i % 2]},x\n" for i in range(8))
    for name in ("set.csv", "set.txt"):
        (work / name).write_text("body,label,sort\n" + rows)
    (work / "sst2").write_text("0 poor\n1 fine\n")
    train = TRAIN.replace("train.jsonl", "set.csv --text-column body")
    unnamed = train.replace(" --text-column body", "")
    assert "set.csv: no column is called text, " in refused(unnamed, capsys)
    assert "2 to 26 different labels in 'sort', found 1" in refused(
        f"{train} --label-column sort", capsys
    )
    assert ok(train, capsys)["examples"] == 8
    assert json.loads((work / "run" / "run.json").read_text())["format"] == "csv"
    evaluate = "evaluate --run run --text-column body --samples 2 --data"
    metrics = ok(f"{evaluate} set.csv --ood set.csv", capsys)
    assert metrics["n"] == metrics["ood"]["n"] == 8
    assert ok(f"{evaluate} set.txt --format csv", capsys)["acc"] == metrics["acc"]
    assert "set.txt, line 1: not JSON" in refused(f"{evaluate} set.txt", capsys)
    assert ok(f"{evaluate} set.csv --ood sst2 --ood-format sst2", capsys)["ood"]["n"] == 2


def test_columns_are_not_for_a_format_that_has_its_own(work, capsys):
    command = f"{TRAIN} --format arc --text-column body"
    assert "--text-column and --label-column are for formats csv and jsonl, not for arc" in refused(
        command, capsys
    )


def test_a_prompt_that_is_too_long_is_named(work, capsys):
    with open(work / "train.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "x" * 200, "choices": ["a", "b"], "label": 0}) + "\n")
    assert "example 24 (id 24)" in refused(TRAIN, capsys)


def test_bad_weights_are_named(work, capsys):
    path = work / "model" / "model.safetensors"
    tensors, _ = load_tensors(path)
    spoilt = {**tensors, "norm.weight": torch.full_like(tensors["norm.weight"], math.nan)}
    save_tensors(path, spoilt.items())
    assert "tensor norm.weight has NaN or infinite values" in refused(TRAIN, capsys)
    path.write_bytes(path.read_bytes()[:100])
    assert "model.safetensors: not a valid safetensors file" in refused(TRAIN, capsys)


def contents(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_not_overwritten(work, capsys):
    """Trained, or made otherwise: by training, from its own values, or by making a posterior."""
    ok(f"{TRAIN} --method mle", capsys)
    ok("posterior laplace --run run --out made", capsys)
    before = contents(work)
    made = TRAIN.replace("--out run", "--out made")
    for command in (TRAIN, made, f"{made} --resume", f"{made} --init made"):
        assert "holds a finished run: give another --out" in refused(command, capsys)
    for out in ("run", "made", "model"):
        said = refused(f"posterior laplace --run run --out {out}", capsys)
        assert said == f"error: {out}: exists already\n"
    assert contents(work) == before
    (work / "run" / "run.json").unlink()  # as before its end
    assert "holds a run already: give --resume or another" in refused(TRAIN, capsys)
    ok(f"{TRAIN} --method mle --resume", capsys)
    assert contents(work) == before


def test_a_folder_in_use_is_refused_at_once(work, capsys):
    """Before anything is read, and with nothing changed; then it is free again."""
    ok(f"{TRAIN} --method mle", capsys)
    words = f"is in use by another process (pid {os.getpid()}): wait for it, or give another --out"
    for out, command, new in (
        ("run", f"{TRAIN} --resume", False),
        ("next", TRAIN.replace("--model model --data train.jsonl --out run",
                               "--model absent --data absent --out next"), False),
        ("made", "posterior laplace --run run --out made", True),
        ("demo", "demo --out demo", False),
    ):  # fmt: skip
        with alone(out, new):
            before = contents(work)
            assert refused(command, capsys) == f"error: {out}: {words}\n"
            assert contents(work) == before
        assert (work / out).exists() == (out == "run")
    ok(f"{TRAIN} --method mle --resume", capsys)


def test_a_run_that_ended_early_can_be_done_again(work, capsys):
    """Wrong settings leave nothing; one killed before a checkpoint is begun anew."""
    official = f"{TRAIN} --method blob --kl official"
    assert "method blob has only the KL 'forward'" in refused(official, capsys)
    assert not (work / "run").exists()
    (work / "run").mkdir()
    (work / "run" / "train.jsonl").write_text('{"step": 0, "loss": 7.0}\n{"st')
    assert "give --resume or another --out" in refused(TRAIN, capsys)
    code, out, _ = run(f"{TRAIN} --resume", capsys)
    assert code == 0 and out.startswith("run: no checkpoint to resume from: beginning\n")
    whole = ok(TRAIN.replace("--out run", "--out whole"), capsys)
    logs = [(work / name / "train.jsonl").read_text().splitlines() for name in ("run", "whole")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == whole["steps"] == 6


def test_a_tokenizer_with_other_letters_is_refused(work, capsys):
    """The head has kept the rows of the letters' tokens, by which nothing else can be answered."""
    ok(f"{TRAIN} --method mle", capsys)
    path = work / "model" / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["vocab"] = {k: 255 - i for k, i in record["model"]["vocab"].items()}
    path.write_text(json.dumps(record))
    for command in (
        "evaluate --data test.jsonl",
        "posterior laplace --out x",
        "posterior tfb --out x",
    ):
        said = refused(f"{command} --run run", capsys)
        assert "the tokenizer gives the class tokens" in said
    assert not (work / "x").exists()


def test_temperature_needs_held_out_rows(work, capsys):
    ok(TRAIN, capsys)
    command = "evaluate --run run --data test.jsonl --temperature"
    assert "was trained without --holdout" in refused(command, capsys)
    assert ok(command + " --calibrate train.jsonl", capsys)["temperature"]["n_fit"] == 24


def test_more_choices_and_fewer_than_the_head_has(work, capsys):
    """A run of three: a fourth has no probability, and of two the rest is given."""
    ok(TRAIN, capsys)
    predict = "predict --run run --prompt hello --samples 3 --choices"
    assert "answers 3 choices, not 4" in refused(f"{predict} a b c d", capsys)
    two, three = (ok(f"{predict} {choices}", capsys) for choices in ("A B", "A B C"))
    assert "others" not in three and two["probs"] == three["probs"][:2]
    assert two["others"] == three["probs"][2] > 0


def test_what_is_no_finished_run_is_said_to_be_what_it_is(work, capsys):
    """By every command that reads one."""
    ok(f"{TRAIN} --checkpoint-every 4 --head full", capsys)
    ok("export --run run --to peft --out peft", capsys)
    (work / "run" / "run.json").unlink()
    shutil.rmtree(work / "run" / "checkpoint" / "00000006")
    (work / "empty").mkdir()

    def says(folder: str, message: str, *more: str) -> None:
        for command in ("evaluate --data test.jsonl", *more):
            name = "--init" if command == NEXT else "--run"
            said = refused(f"{command} {name} {folder}", capsys)
            assert said == f"error: {folder}: {message}\n", command
        assert not (work / "next").exists()

    at = "training is unfinished, at step 4{}: go on with train --resume"
    every = ("predict --prompt a --choices b c", "generate --prompt a", NEXT,
             "posterior laplace --out next", "export --to peft --out next")  # fmt: skip
    says("run", at.format(" of 6"), *every)
    (work / "run" / "checkpoint" / "00000004" / "manifest.json").write_text("{}")
    says("run", at.format(""))
    shutil.rmtree(work / "run" / "checkpoint")
    says("run", "training ended before its first checkpoint: begin with train --resume")
    model = "is a model and no run: give it as --model alone (a trained adapter becomes a run by "
    says("model", model + "`scalabl import`)", NEXT)
    peft = "is a PEFT adapter and no run: `scalabl import --from peft` makes it one"
    says("peft", peft, NEXT)
    says("empty", "no run: run.json, which `scalabl train` writes at its end, is not there")
    says("absent", "no such folder: expected a run, which `scalabl train` writes")


def test_another_base_is_named(work, capsys):
    ok(TRAIN, capsys)
    tensors = dict(load_tensors(work / "model" / "model.safetensors")[0])
    shutil.copytree(work / "model", work / "other")
    changed = {**tensors, "norm.weight": 2 * tensors["norm.weight"]}
    save_tensors(work / "other" / "model.safetensors", changed.items())
    words = f"run: was trained on {work / 'model'}; other is another model"
    for command in ("evaluate --data test.jsonl", "predict --prompt a --choices b c"):
        assert refused(f"{command} --run run --model other", capsys) == f"error: {words}\n"
    said = refused(NEXT.replace("--model model", "--model other") + " --init run", capsys)
    assert f"run: was trained on another base model, {work / 'model'}" in said
    save_tensors(work / "model" / "model.safetensors", changed.items())
    said = refused("evaluate --data test.jsonl --run run", capsys)
    assert f"was trained on another base model than {work / 'model'} is now" in said


def test_what_is_not_trained_is_no_method_of_train(work, capsys):
    assert "--method must be one of scalabl, mle" in refused(f"{TRAIN} --method tfb", capsys)
    assert not (work / "run").exists()


def test_a_hold_out_is_of_the_file_that_was_trained_on(work, capsys):
    """Split again, another file would give back rows that the run has seen."""
    ok(f"{TRAIN} --method mle --holdout 0.25", capsys)
    temperature = "evaluate --run run --data test.jsonl --temperature"
    before = ok(temperature, capsys)
    rows = (work / "train.jsonl").read_text()
    (work / "train.jsonl").write_text("".join(rows.splitlines(True)[:5]) + rows)
    changed = "train.jsonl: has changed since run was trained on it: give "
    assert changed + "--calibrate" in refused(temperature, capsys)
    for method in ("laplace", "tfb"):
        assert changed + "--data" in refused(f"posterior {method} --run run --out x", capsys)
    told = ok(f"{temperature} --calibrate train.jsonl --out calibrated", capsys)
    assert told["temperature"]["n_fit"] == 29
    (work / "train.jsonl").unlink()
    assert "train.jsonl: no such file" in refused(temperature, capsys)
    (work / "train.jsonl").write_text(rows)
    assert ok(temperature, capsys) == before
    record = json.loads((work / "run" / "run.json").read_text())
    del record["data_sha256"]
    (work / "run" / "run.json").write_text(json.dumps(record))
    assert "does not say what file it was trained on: give --calibrate" in refused(
        temperature, capsys
    )


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
MEMORY = (
    "error: out of memory{}: less is needed with a smaller --batch or --micro-batch, --dtype "
    "bfloat16, or --quantize nf4\n"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), MEMORY.format("")),
        (RuntimeError("std::bad_alloc"), MEMORY.format("")),
        (RuntimeError(ALLOCATOR), MEMORY.format(" (8000000000000 bytes were asked for at once)")),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
         MEMORY.format(" (2.00 GiB were asked for at once)")),
        (RuntimeError("unable to mmap 404 bytes from file <x>: Cannot allocate memory (12)"),
         MEMORY.format(" (404 bytes were asked for at once)")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY.format("")),
        (ImportError("libx.so: failed to map segment from shared object"), MEMORY.format("")),
        (RuntimeError("can't start new thread"),
         "error: no thread can be started: a limit is reached (ulimit -u, -v)\n"),
        (PermissionError(errno.EACCES, "Permission denied", "some/file"),
         "error: some/file: Permission denied\n"),
        (OSError("no number"), "error: no number\n"),
    ],
)  # fmt: skip
def test_what_the_machine_refuses_is_one_line(capsys, monkeypatch, error, said):
    def fail(args):
        raise error

    monkeypatch.setitem(cli._COMMANDS, "info", ("", lambda parser: None, fail))
    assert refused("info", capsys) == said


def test_memory_ends_while_weights_are_read(work, capsys, monkeypatch):
    """Which is not for want of a valid file."""
    import safetensors

    def fail(*_, **__):
        raise safetensors.SafetensorError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(safetensors, "safe_open", fail)
    assert refused(TRAIN, capsys) == MEMORY.format("")
    torch.save(dict(Llama(TINY).init_random_(0).state_dict()), work / "a.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: fail())
    with pytest.raises(safetensors.SafetensorError):
        load_pickle(work / "a.bin")


def test_a_fault_of_ours_is_a_traceback(monkeypatch):
    def fail(args):
        raise KeyError("x")

    monkeypatch.setitem(cli._COMMANDS, "info", ("", lambda parser: None, fail))
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_a_terminal_without_the_letters_is_told_their_numbers(work, capsys, monkeypatch):
    ok(TRAIN, capsys)
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    command = ["predict", "--run", "run", "--prompt", "x", "--choices", "да", "нет", "c"]
    assert cli.main(command) == 0
    assert "  \\u0434\\u0430\n" in screen.buffer.getvalue().decode("ascii")
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict"))
    assert cli.main(["predict", "--run", "да", *command[3:]]) == 2
    sys.stderr.flush()
    assert b"\\u0434\\u0430: no such folder" in sys.stderr.buffer.getvalue()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_room_for_the_output_is_one_line(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["count", "--config", "llama-2-7b"]) == 2
        assert capsys.readouterr().err == "error: No space left on device\n" and full.closed


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise MemoryError", 2, MEMORY.format("")),
        ("raise ImportError('libtorch.so: failed to map segment from shared object')", 2,
         MEMORY.format("")),
        ("raise ImportError('something else')", 1, None),
    ],
)  # fmt: skip
def test_what_ends_the_import_of_torch_is_one_line_too(tmp_path, body, code, said):
    """Of the command alone: whoever imports the package gets the error itself."""
    (tmp_path / "torch.py").write_text(body)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for command in (["-m", "scalabl_ref", "info"], ["-c", "import scalabl_ref"]):
        done = subprocess.run(
            [sys.executable, *command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        if command[0] == "-m" and said is not None:
            assert (done.returncode, done.stderr) == (code, said)
        else:
            assert done.returncode not in (0, 2) and "Traceback" in done.stderr


def test_a_closed_pipe_is_no_traceback(work):
    command = [sys.executable, "-m", "scalabl_ref", "count", "--config", "llama-2-7b"]
    reader = subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE)
    reader.wait()
    result = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
    reader.stdin.close()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_where_it_was(work, capsys, signum):
    """A real process, a real signal: exit code 128 + n, a checkpoint, and then --resume."""
    long = TRAIN.replace("--steps 6", "--steps 150")
    command = [sys.executable, "-m", "scalabl_ref", *long.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    log = work / "run" / "train.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert "continue with --resume" in err and "Traceback" not in err
    done = len(log.read_text().splitlines())
    assert 0 < done < 150
    ok(long + " --resume", capsys)
    whole = ok(long.replace("--out run", "--out whole"), capsys)
    resumed = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    straight = (work / "whole" / "train.jsonl").read_text().splitlines()
    assert resumed == [json.loads(line)["loss"] for line in straight]
    assert len(resumed) == whole["steps"] == 150


@pytest.mark.parametrize(
    ("option", "others", "message"),
    [
        ("", ["--dtype bfloat16"], "train.dtype was 'float32' and now is 'bfloat16'"),
        ("--dtype bfloat16", [""], "train.dtype was 'bfloat16' and now is 'float32'"),
        ("--init start", ["", "--init another"], "train.init was "),
        ("", ["--init start"], "train.init was None and now is "),
    ],
)
def test_a_run_goes_on_with_its_dtype_and_its_start(work, capsys, option, others, message):
    for seed, out in enumerate(("start", "another")):
        ok(f"{TRAIN} --seed {seed}".replace("--out run", f"--out {out}"), capsys)
    whole = f"{TRAIN} --checkpoint-every 3 {option}"
    last = ok(whole, capsys)["last"]
    before = contents(work / "run")
    shutil.rmtree(work / "run" / "checkpoint" / "00000006")
    for other in others:
        said = refused(f"{TRAIN} --resume {other}", capsys)
        assert "is of a run with other settings: " + message in said
    again = ok(f"{whole} --resume", capsys)["last"]
    assert again["loss"] == last["loss"]
    for name in ("run/run.json", "run/adapter.safetensors"):
        assert (work / name).read_bytes() == before[str(work / name)]


def test_a_finished_run_with_a_damaged_log_resumes_to_nothing(work, capsys):
    """Its last record is asked for: only a damaged one is an error, which names the file."""
    last, log = ok(TRAIN, capsys)["last"], work / "run" / "train.jsonl"
    lines = log.read_bytes().splitlines(True)
    log.write_bytes(b"\xff\n" + b"".join(lines[1:]))
    assert ok(TRAIN + " --resume", capsys)["last"] == last
    for damaged in (b"".join(lines[:5]) + b"\xff\n", b""):
        log.write_bytes(damaged)
        said = refused(TRAIN + " --resume", capsys)
        assert "train.jsonl: its last line is not a record of a step" in said


def test_draws_of_a_design_and_as_many_as_needed(work, capsys):
    ok(TRAIN + " --init-sigma 2", capsys)
    evaluate = "evaluate --run run --data test.jsonl --force"
    designs = [
        ok(f"{evaluate} --samples 4 --design {design}", capsys)
        for design in ("independent", "antithetic", "latin")
    ]
    assert [result["design"] for result in designs] == ["independent", "antithetic", "latin"]
    assert len({result["nll"] for result in designs}) == 3
    assert "design" not in ok(f"{evaluate} --samples 0", capsys)
    auto = ok(f"{evaluate} --samples auto --tolerance 0.2 --most 5", capsys)
    assert "design" not in auto
    rows = [
        json.loads(row) for row in (work / "run" / "predictions.jsonl").read_text().split("\n")[:-1]
    ]
    draws = [row["draws"] for row in rows]
    assert auto["samples"] == "auto" and auto["auto"]["tolerance"] == 0.2
    assert auto["auto"]["mean_draws"] == sum(draws) / 9 and set(draws) <= {4, 5}
    assert auto["auto"]["stopped_at_most"] == draws.count(5) > 0
    predict = ["predict", "--run", "run", "--prompt", "3 x", "--choices", "no 0", "no 1", "no 2"]
    assert cli.main([*predict, "--samples", "auto", "--most", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] in (4, 6, 9)
    assert "lm_head alone" in refused(f"{evaluate} --samples exact", capsys)
    ok(TRAIN.replace("run", "head") + " --targets lm_head --init-sigma 0.5", capsys)
    exact, many = (
        ok(f"evaluate --run head --data test.jsonl --samples {n} --design {design}", capsys)
        for n, design in (("exact", "independent"), ("1000", "latin"))
    )
    # 1,000 Latin draws are good to far better than a hundredth; test_quadrature has the bounds.
    assert "design" not in exact and many["design"] == "latin"
    assert exact["samples"] == "exact" and abs(exact["nll"] - many["nll"]) < 0.01 * many["nll"]
    assert "a number, auto or exact" in refused(f"{evaluate} --samples many", capsys)
    assert "know independent draws, not design 'latin'" in refused(
        f"{evaluate} --samples auto --design latin", capsys
    )
    assert "tolerance must lie" in refused(f"{evaluate} --samples auto --tolerance 2", capsys)


def test_numbers_that_are_none_are_refused(work, capsys):
    ok(TRAIN, capsys)
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
