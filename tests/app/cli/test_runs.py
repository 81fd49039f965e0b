"""What commands open: runs, their base models, and their data."""

from __future__ import annotations

import json
import os
import shutil

from scalabl_ref import AdapterConfig, Llama, add_adapters, save_run
from scalabl_ref.data import encode, load
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.support.tensors import load_tensors, save_tensors
from scalabl_ref.training import ranks
from scalabl_ref.training.lock import alone

from ..commands import NEXT, TRAIN, contents, ok, refused


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
    assert "does not name the training data: give --data" in refused(laplace, capsys)
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


def test_a_moved_base_is_found_by_model(work, capsys):
    """By every command that opens a run."""
    ok(f"{TRAIN} --method mle --head full --steps 1", capsys)
    (work / "model").rename(work / "elsewhere")
    said = refused("evaluate --run run --data test.jsonl", capsys)
    gone = f"run: its base model {work / 'model'} is not there: give --model FOLDER, its folder now"
    assert said == f"error: {gone}\n"
    assert ok("evaluate --run run --data test.jsonl --model elsewhere", capsys)["n"] == 9
    for command in ("predict --prompt a --choices b c", "generate --prompt a",
                    "calibrate --data test.jsonl", "threshold --data test.jsonl",
                    "posterior laplace --out laplace", "export --to peft --out peft"):  # fmt: skip
        assert refused(f"{command} --run run", capsys) == said
        ok(f"{command} --run run --model elsewhere", capsys)
    config = json.loads((work / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "elsewhere"


def test_a_folder_in_use_is_refused_at_once(work, capsys):
    """Before anything is read, and with nothing changed; then it is free again."""
    ok(f"{TRAIN} --method mle", capsys)
    words = f"is in use by another process (pid {os.getpid()}): wait for it, or give another --out"
    for out, command, new in (
        ("run", f"{TRAIN} --resume", False),
        ("next", TRAIN.replace("--model model --data train.jsonl --out run",
                               "--model model --data absent --out next"), False),
        ("made", "posterior laplace --run run --out made", True),
        ("demo", "demo --out demo", False),
    ):  # fmt: skip
        with alone(out, new):
            before = contents(work)
            assert refused(command, capsys) == f"error: {out}: {words}\n"
            assert contents(work) == before
        assert (work / out).exists() == (out == "run")
    ok(f"{TRAIN} --method mle --resume", capsys)


def test_what_ranks_cannot_do_is_refused(work, capsys, monkeypatch):
    """The ranks are pretended ones."""
    ok(f"{TRAIN} --method mle --steps 1", capsys)
    monkeypatch.setattr(ranks, "need_ranks", lambda: None)
    for option in ("--shard", "--offload-weights"):
        said = refused(f"evaluate --model model --data test.jsonl {option}", capsys)
        assert said == "error: --shard and --offload-weights need a --run\n"
        said = refused(f"{NEXT} --compile {option}", capsys)
        assert "--compile does not work with --shard or --offload-weights yet" in said
    monkeypatch.setattr(ranks, "world", lambda: 2)
    for command, message in (
        ("predict --data test.jsonl --out out.csv", "predict --data works in one process"),
        ("posterior laplace --out out", "posterior laplace takes one process"),
        ("posterior tfb --out out", "posterior tfb takes one process"),
    ):
        said = refused(f"{command} --run run", capsys)
        assert said == f"error: {message}: start it without torchrun\n"


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

    typed = f"`scalabl {TRAIN} --checkpoint-every 4 --head full --json --resume`"
    at = f"training is unfinished, at step 4{{}}: go on with {typed}"
    every = ("predict --prompt a --choices b c", "generate --prompt a", NEXT,
             "posterior laplace --out next", "export --to peft --out next")  # fmt: skip
    says("run", at.format(" of 6"), *every)
    (work / "run" / "checkpoint" / "00000004" / "manifest.json").write_text("{}")
    says("run", at.format(""))
    shutil.rmtree(work / "run" / "checkpoint")
    says("run", f"training is unfinished: go on with {typed}")
    (work / "run" / "command.txt").unlink()
    says("run", "training is unfinished: go on with `train --resume`")
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
    words = f"run: was trained on {work / 'model'}; other is another model: give --model "
    words += f"{work / 'model'}"
    for command in ("evaluate --data test.jsonl", "predict --prompt a --choices b c"):
        assert refused(f"{command} --run run --model other", capsys) == f"error: {words}\n"
    said = refused(NEXT.replace("--model model", "--model other") + " --init run", capsys)
    assert f"run: was trained on another base model, {work / 'model'}" in said
    save_tensors(work / "model" / "model.safetensors", changed.items())
    said = refused("evaluate --data test.jsonl --run run", capsys)
    assert f"was trained on another base model than {work / 'model'} is now: give the" in said
    shutil.move(work / "model", work / "moved")
    words = words.replace(f"--model {work / 'model'}", "--model FOLDER, wherever that is now")
    said = refused("evaluate --data test.jsonl --run run --model other", capsys)
    assert said == f"error: {words}\n"


def test_a_hold_out_is_of_the_rows_that_the_limit_left(work, capsys):
    ok(f"{TRAIN} --method mle --holdout 0.25 --limit 16", capsys)
    told = ok("evaluate --run run --data test.jsonl --temperature", capsys)
    assert told["temperature"]["n_fit"] == 4


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
    gone = "train.jsonl: is not there, and run was trained on it: give --calibrate\n"
    assert refused(temperature, capsys).endswith(gone)
    (work / "train.jsonl").write_text(rows)
    assert ok(temperature, capsys) == before
    record = json.loads((work / "run" / "run.json").read_text())
    del record["data_sha256"]
    (work / "run" / "run.json").write_text(json.dumps(record))
    assert "does not name the training data: give --calibrate" in refused(temperature, capsys)
