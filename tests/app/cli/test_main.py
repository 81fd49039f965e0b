"""What every command has in common: help, output, exit codes, and the end of errors."""

from __future__ import annotations

import errno
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scalabl_ref import Llama, __version__
from scalabl_ref.app import cli
from scalabl_ref.app.cli import info
from scalabl_ref.support.tensors import load_pickle
from scalabl_ref.verify import all_checks
from scalabl_ref.verify.check import Result

from ...conftest import ROOT
from ...models import TINY
from ...support.test_files import full_disk
from ..commands import TRAIN, contents, ok, refused, run

MODULES = {"import": "import_"}  # of commands whose module has another name


def test_every_command_has_help(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        out, _ = capsys.readouterr()
        assert caught.value.code == 0
        assert all(option in out for option in ("--json", "--device"))
        module = importlib.import_module(f"scalabl_ref.app.cli.{MODULES.get(name, name)}")
        draws = re.search(r"args\.seed|\"seed\"", inspect.getsource(module))
        assert ("--seed" in out) == bool(draws), f"{name}: --seed must be there if it is used"


DRAWS = "tolerance 0.05, most 1000, design independent"
PROMPTS = "prompt-style plain, labels auto, answer-tokens auto"
ADAPTER = "sampling example, covariance diagonal, prior fixed, dropout 0.1, init-sigma 0.05"
DEFAULTS = {  # of options, where they are one word
    "demo": "out scalabl-demo, model tiny, samples 10",
    "train": f"holdout 0, keep last, {PROMPTS}, method scalabl, {ADAPTER}, head classes, "
    "steps 1000, batch 8, micro-batch --batch, lr 0.001, warmup 0.06, weight-decay 0, beta 1, "
    "kl forward, objective elbo, swag 0, kl-lr 0.2, kl-gamma 8, checkpoint-every 200, "
    "timeout 600.0",
    "evaluate": f"{DRAWS}, bins 15, batch 32, timeout 600.0",
    "calibrate": f"{DRAWS}, batch 32",
    "threshold": f"{DRAWS}, batch 32, accuracy 0.95, confidence 0.95",
    "predict": f"batch 1, {DRAWS}, timeout 600.0",
    "serve": "host 127.0.0.1, port 8000, batch 8, max-waiting 256, max-characters 20000, " + DRAWS,
    "posterior": "precision evidence, groups all, directions all, predicts linear, layers all, "
    "curvature expand, kron-rank all, tolerance 0.003, samples 10, batch 8, timeout 600.0",
    "generate": "max-new-tokens 100, samples 0, temperature 0, top-p 1.0",
    "export": "samples 0",
    "import": f"{ADAPTER}, format jsonl, prompt-style plain",
    "count": "rank 8",
    "plan": "gpus 1, rows 8, tokens 128, classes 2, rank 8",
    "conformance": "precision float32",
    "study": "jobs 1, tasks all",
}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_options_have_the_defaults_that_their_help_tells(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    (commands,) = cli._parser(name)._subparsers._group_actions
    actions, found = commands.choices[name]._option_string_actions, {}
    for option in re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.M)[1:]:
        told = re.findall(r"\(default: (.*?)\)", option)
        assert len(told) < 2, option
        if told and " " not in told[0]:
            key = re.findall(r"--([\w-]+)", option)[0]
            found[key], default = told[0], actions[f"--{key}"].default
            assert default is None or type(default)(told[0]) == default, key
    assert found.pop("device") == "cpu" and found.pop("seed", "0") == "0"
    assert found == dict(pair.split() for pair in DEFAULTS.get(name, "").split(", ") if pair)


@pytest.mark.parametrize(
    "command",
    [
        "verify", "count --config llama-2-70b",
        "plan --config llama-2-70b --memory 16 --rate 150 --bandwidth 1000 --gpus 2 --link 50",
        "evaluate --run run --data test.jsonl --temperature --ood test.jsonl --samples 2",
    ],
)  # fmt: skip
def test_tables_fit_eighty_columns(work, capsys, monkeypatch, command):
    if "--run run" in command:
        ok(f"{TRAIN} --holdout 0.25", capsys)
    done = (0.5, 1, 0.1)  # a check's error, comparisons and seconds: its table is looked at alone
    monkeypatch.setattr(all_checks, "run", lambda check, *_: Result(*check[:2], *done))
    code, out, _ = run(command, capsys)
    assert code == 0 and "[" in out or "evaluate" not in command
    table = [line for line in out.splitlines() if not line.startswith(("written", "answer tokens"))]
    assert len(table) > 3 and [line for line in table if len(line) > 80] == []


def test_the_options_of_train_are_in_groups(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out, _ = capsys.readouterr()
    found = re.findall(r"^(\w[^\n]*):$", out, re.M)
    assert found == [
        "options",
        "model, data and run",
        "prompts and answers",
        "method and adapters",
        "optimiser",
        "memory, checkpoints and processes",
    ]
    first = out.partition("model, data and run:")[0]
    assert len(re.findall(r"^  -", first, re.M)) == 4, "help, json, seed and device stand alone"


def test_commands_speak_to_people_too(work, capsys):
    code, out, _ = run(TRAIN, capsys)
    assert code == 0 and "trained 6 steps on 24 examples" in out
    code, out, _ = run("evaluate --run run --data test.jsonl --samples 2", capsys)
    assert code == 0 and "ACC" in out and "report.html" in out
    code, out, _ = run("predict --run run --prompt hello --choices one two three", capsys)
    assert code == 0 and "mutual information:" in out


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
        assert {Path(path).name for path in new} <= {"train.jsonl", "command.txt"}, (room, new)
        assert {path: data for path, data in contents(work).items() if path in before} == before
        for path in new:
            Path(path).unlink()


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


MEMORY = (
    "error: out of memory{}: try a smaller --batch or --micro-batch, --dtype "
    "bfloat16, or --quantize nf4\n"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), MEMORY.format("")),
        (RuntimeError("std::bad_alloc"), MEMORY.format("")),
        (RuntimeError(ALLOCATOR), MEMORY.format(" (8000000000000 bytes were needed at once)")),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
         MEMORY.format(" (2.00 GiB were needed at once)")),
        (RuntimeError("unable to mmap 404 bytes from file <x>: Cannot allocate memory (12)"),
         MEMORY.format(" (404 bytes were needed at once)")),
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

    monkeypatch.setattr(info, "run", fail)
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

    monkeypatch.setattr(info, "run", fail)
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
    assert (result.returncode, result.stderr) == (141, "")


def test_the_version_and_all_commands_are_told(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as caught:
            cli.main([option])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        if option == "--version":
            assert out == f"scalabl_ref {__version__}\n"
    told = dict(re.findall(r"^    (\w+)\s+(\S.*(?:\n {10,}\S.*)*)$", out, re.M))
    assert {name: " ".join(words.split()) for name, words in told.items()} == cli.COMMANDS
