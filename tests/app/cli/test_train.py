"""`scalabl train`: what it writes, refuses, and continues."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.data import split
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..commands import NEXT, TRAIN, contents, facts, ok, refused, run


def test_seeds_decide_everything(work, capsys):
    losses = []
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        losses.append(ok(f"{TRAIN} --seed {seed}".replace("run", out), capsys)["last"]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_seed_decides_which_rows_are_held_out(work, capsys):
    """Training and later fits use the rows that two separate files would have."""
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    for name, part in zip(("rest", "held"), split(rows, 0.25, 3), strict=True):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    train = f"{TRAIN.replace('--steps 6', '--steps 16')} --seed 3 --lr 0.05"
    whole = ok(f"{train} --holdout 0.25", capsys)
    parts = ok(train.replace("--out run", "--out parts").replace("train.jsonl", "rest.jsonl"),
               capsys)  # fmt: skip
    assert whole["examples"] == parts["examples"] == 18
    assert whole["last"]["nll"] == parts["last"]["nll"]
    fits = [ok(f"evaluate --run run --data test.jsonl --force {more}", capsys)["temperature"]
            for more in ("--temperature", "--calibrate held.jsonl")]  # fmt: skip
    assert fits[0] == fits[1] and fits[0]["n_fit"] == 6 and 0.1 < fits[0]["value"] < 19


def test_a_run_records_the_settings_that_are_given(work, capsys):
    adapter = {"method": "scalabl", "rank": 3, "alpha": 5.0, "targets": ["v_proj", "lm_head"],
               "sampling": "batch", "covariance": "full", "prior": "layer", "prior_std": 2.0,
               "init_sigma": 0.2, "dropout": 0.3}  # fmt: skip
    train = {"steps": 4, "batch": 6, "micro_batch": 2, "lr": 0.01, "variational_lr": 0.02,
             "warmup": 0.25, "weight_decay": 0.1, "beta": 0.5, "kl_lr": 0.03, "kl_gamma": 4.0,
             "checkpoint_every": 3, "seed": 7, "swag": 0.5, "swag_lr": 0.005}  # fmt: skip
    command = "train --model model --data train.jsonl --out run --recompute --offload-activations"
    for name, value in {**adapter, **train}.items():
        text = " ".join(value) if isinstance(value, list) else value
        command += f" --{name.replace('_', '-')} {text}"
    ok(f"{command} --limit 12 --answer-tokens bare --labels letters", capsys)
    record = facts(work / "run")
    assert record["adapter"] == adapter
    flags = {"recompute": True, "offload_activations": True, "compile": False}
    same = {"kl": "forward", "objective": "elbo", "adam_eps": 1e-6}
    assert record["train"] == {**train, **flags, **same}
    assert (record["limit"], record["holdout"], record["examples"]) == (12, 0, 12)
    assert (record["labels"], record["answer_tokens"]) == ("letters", "bare")
    assert record["model"] == str(work / "model") and record["data"] == str(work / "train.jsonl")
    official = ("official", "official", 1, False)
    ok(f"{NEXT} --kl official --objective official", capsys)
    keys = ("kl", "objective", "beta", "recompute")
    assert tuple(facts(work / "next")["train"][key] for key in keys) == official


def test_checkpoints_are_written_beside_if_asked(work, capsys, monkeypatch):
    module, asked = importlib.import_module("scalabl_ref.app.cli.train"), []
    parameters = inspect.signature(module.fit)

    def stops(*given):
        asked.append(parameters.bind(*given).arguments["beside"])
        raise InputError("stop")

    monkeypatch.setattr(module, "fit", stops)
    for option in ("", " --checkpoints-beside"):
        assert refused(TRAIN + option, capsys) == "error: stop\n"
    assert asked == [False, True]


def test_a_bfloat16_base_keeps_float32_adapters(work, capsys):
    ok(TRAIN + " --dtype bfloat16", capsys)
    tensors, _ = load_tensors(work / "run" / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert ok("evaluate --run run --data test.jsonl", capsys)["n"] == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model absent", "absent: no such folder: --model takes a folder, or OWNER/NAME"),
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


def test_options_come_before_those_of_the_run_it_starts_from(work, capsys):
    ok(f"{TRAIN} --alpha 3 --targets q_proj v_proj --steps 1", capsys)
    begun = NEXT.replace("--rank 2", "--rank 4")
    ok(f"{begun} --init run --targets q_proj v_proj --steps 1", capsys)
    adapter = facts(work / "next")["adapter"]
    assert (adapter["rank"], adapter["alpha"]) == (4, 3.0)
    assert adapter["targets"] == ["q_proj", "v_proj"]


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
    typed = f"go on with `scalabl {TRAIN} --method mle --json --resume`, or give another --out"
    assert f"holds a run already: {typed}" in refused(TRAIN, capsys)
    ok(f"{TRAIN} --method mle --resume", capsys)
    assert contents(work) == before


def test_a_run_that_ended_early_can_be_done_again(work, capsys):
    """Wrong settings leave nothing; one killed before a checkpoint is begun anew."""
    official = f"{TRAIN} --method blob --kl official"
    assert "method blob has only the KL 'forward'" in refused(official, capsys)
    assert not (work / "run").exists()
    (work / "run").mkdir()
    (work / "run" / "train.jsonl").write_text('{"step": 0, "loss": 7.0}\n{"st')
    assert "go on with `train --resume`, or give another --out" in refused(TRAIN, capsys)
    code, out, _ = run(f"{TRAIN} --resume", capsys)
    assert code == 0 and out.startswith("run: no checkpoint to resume from: starting at step 0\n")
    assert (work / "run" / "command.txt").read_text() == f"scalabl {TRAIN}\n"
    whole = ok(TRAIN.replace("--out run", "--out whole"), capsys)
    logs = [(work / name / "train.jsonl").read_text().splitlines() for name in ("run", "whole")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == whole["steps"] == 6


def test_what_is_not_trained_is_no_method_of_train(work, capsys):
    assert "--method must be one of scalabl, mle" in refused(f"{TRAIN} --method tfb", capsys)
    assert not (work / "run").exists()


@pytest.mark.parametrize(
    "signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
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
    assert f"go on with `scalabl {long} --resume`" in err and "Traceback" not in err
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
