"""What a study takes, told before any of it is done."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.app import cli, plan
from scalabl_ref.app.plan import product_rate
from scalabl_ref.app.study import Study, cost, run_study
from scalabl_ref.app.study.costs import _passes
from scalabl_ref.app.study.sets import encoded_sets
from scalabl_ref.support.progress import duration

from ...models import questions_file
from ...tolerances import rounding
from .studies import config, quick


def test_the_cost_told_first_is_what_is_done(tmp_path):
    """Runs and steps are counted afterwards on disk; FLOP by hand for plain LoRA."""
    methods = [
        "mle",
        "ensemble",
        "tfb",
        "blob",
        "scalabl",
        "scalabl untuned",
        "ensemble of scalabl",
    ]
    path = config(tmp_path, methods=methods, tuning_seeds=[2, 3], finalists=1)
    told = cost(Study.read(path))
    run_study(Study.read(path), tmp_path / "out")
    records = [json.loads(p.read_text()) for p in (tmp_path / "out/runs").glob("*/run.json")]
    assert told["runs"] == len(records)
    assert told["steps"] == sum(record["train"]["steps"] for record in records)
    alone = Study.read(config(tmp_path, methods=["mle"], seeds=[4]))
    sets = encoded_sets(alone, ("validation", "test", "other"))
    tokens = {name: sum(map(len, data.tokens)) for name, data in sets.items()}
    mean = tokens["train"] / len(sets["train"].tokens)
    trained = 2 * mean * 4 * (3 + 3)  # forward and backward, batches of 4; two trials of 3 steps
    answered = 3 * tokens["validation"] + tokens["test"] + tokens["other"]
    shape = (16 * 16 + 2 * 16 * 8 + 16 * 16) + 3 * 16 * 24 + 2 * 16  # q, k, v, o; MLP; norms
    flop = 2 * 2 * shape * (trained + answered)
    assert abs(cost(alone)["flop"] - flop) <= rounding(torch.float64, 64) * flop


@pytest.mark.parametrize(
    ("method", "once", "each"),
    [
        ("mle", {}, 1), ("map", {}, 1), ("point", {}, 1), ("ensemble", {}, 3),
        ("dropout", {}, 7), ("ensemble of dropout", {}, 7), ("swag", {}, 7), ("scalabl", {}, 7),
        ("ensemble of scalabl", {}, 7), ("tfb", {"validation": 15 * 7}, 7),
        ("laplace exact", {"train": 4}, 4), ("subspace", {"train": 4}, 4),
        ("subspace sampled", {"train": 4}, 7), ("ensemble of subspace", {"train": 12}, 12),
    ],
)  # fmt: skip
def test_passes_are_counted_by_method(method, once, each):
    """7 draws, 3 classes: a forward pass for each draw, or one and a backward for each class."""
    assert _passes(method, 7, 3) == (once, each)


def test_a_study_of_float32_has_four_bytes_a_weight(tmp_path):
    study = quick(tmp_path)
    count = sum(p.numel() for p in Llama.from_pretrained(study.model).parameters())
    assert cost(study)["bytes"] == 4 * count


def machine(monkeypatch, others: float, threads: int = 1, first: float = 0.02) -> list[int]:
    """Let products of 1024 rows take `first` s of each thread's time.

    Of ten products, nine wait for other programs, `others` times as long as they compute.
    Returns the sizes that were multiplied.
    """
    sizes: list[int] = []
    clock = SimpleNamespace(wall=0.0, cpu=0.0, calls=0)

    def product(self, other):
        clock.calls += 1
        sizes.append(len(self))
        took = first * (len(self) / 1024) ** 3
        clock.wall += took * (1 + (others if clock.calls % 10 else 0))
        clock.cpu += took * threads
        return torch.zeros(1, 1)

    now = SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu)
    monkeypatch.setattr(plan, "time", now)
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    return sizes


@pytest.mark.parametrize(("first", "last"), [(0.011, 1024), (0.009, 2048), (1e-6, 8192)])
def test_products_grow_until_they_take_10_ms(monkeypatch, first, last):
    """And no further than 8192 rows; then ten of that size are timed."""
    monkeypatch.setattr(torch, "ones", lambda n, *_, **__: torch.empty(1).expand(n, n))
    sizes = machine(monkeypatch, 0.0, first=first)
    assert product_rate() == pytest.approx(2 * 1024**3 / first)
    grown = [n for n in (1024, 2048, 4096, 8192) if n <= last for _ in range(3)]
    assert sizes == grown + 10 * [last]


@pytest.mark.parametrize("others", [0.0, 1.0, 400.0])
def test_other_programs_do_not_change_the_rate(monkeypatch, others):
    """Neither where all products wait, if the cores' time is known, nor where one does not."""
    right = 2 * 1024**3 / 0.02
    machine(monkeypatch, others)
    assert product_rate(threads=1) == pytest.approx(right)
    before = torch.get_num_threads()
    machine(monkeypatch, others, threads=1000)  # spinning threads: only the wall clock tells
    assert product_rate(threads=3) == pytest.approx(right)
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_a_busy_core_changes_the_rate_by_less_than_half():
    """In at least one of three trials: one thread, beside as many busy processes as cores."""
    ratios = []
    for _ in range(3):
        quiet = product_rate(threads=1)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(os.cpu_count() or 1)]  # fmt: skip
        try:
            ratios.append(product_rate(threads=1) / quiet)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    assert any(1 / 1.5 < ratio < 1.5 for ratio in ratios), ratios


def test_a_cost_is_told_in_words(tmp_path, capsys, monkeypatch):
    """At a rate of 1e6 FLOP/s for each job, whatever else this machine does."""
    monkeypatch.setattr(importlib.import_module("scalabl_ref.app.cli.study"), "product_rate",
                        lambda *job: 1e6)  # fmt: skip
    path = config(tmp_path, methods=["mle"], seeds=[0])
    command = ["study", str(path), "--out", str(tmp_path / "out"), "--cost"]
    assert cli.main([*command, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["cost"][str(tmp_path / "out")]
    assert about["hours"] == about["flop"] / 1e6 / 3600
    jobs = min(2, os.cpu_count() or 1)
    assert cli.main([*command, "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert f": about {duration(about['flop'] / 1e6 / jobs)} or more, at the speed" in said


def test_sets_are_held_against_the_model_before_any_training(tmp_path):
    """Labels that no answer can be; prompts that are too long: the file is named."""
    wide, answer = {"prompt": "?", "choices": ["a", "b", "c", "d"], "label": 3}, "its answer is D"

    def file(name, *rows):
        questions_file(tmp_path / name, rows=8)
        with open(tmp_path / name, "a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        return str(tmp_path / name)

    test = file("wide.jsonl", wide)
    long = file("long.jsonl", {**wide, "prompt": 128 * "?", "label": 0})
    narrow = {"test": test, "ood": {"other": {"path": test}}}
    with pytest.raises(InputError, match=f"wide.jsonl: example 8 .*: {answer}, but there are 3"):
        cost(quick(tmp_path, **narrow))
    assert cost(quick(tmp_path, **narrow, train=file("train-4.jsonl", *[wide] * 8)))["runs"] == 1
    assert cost(quick(tmp_path, ood={"other": {"path": test}}))["runs"] == 1
    with pytest.raises(InputError, match=r"long.jsonl: example 8 .*: its prompt has 1\d\d tokens"):
        cost(quick(tmp_path, test=long))
