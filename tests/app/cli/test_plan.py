"""`scalabl plan`."""

from __future__ import annotations

import json

import pytest

from scalabl_ref import AdapterConfig
from scalabl_ref.app import cli
from scalabl_ref.app.configs import find_config
from scalabl_ref.app.plan import BASES, Rates, Workload, plans, subspace

PLAN = "plan --config llama-2-7b --rate 500 --bandwidth 2000 --json"


def plan(arguments: str, capsys) -> dict:
    assert cli.main([*PLAN.split(), *arguments.split()]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_says_what_fits(capsys):
    assert plan("--memory 80", capsys)["best"]["kind"] == "bfloat16"
    small = plan("--memory 10 --rows 1", capsys)
    assert small["best"]["kind"] in ("int8", "nf4")
    assert {p["kind"] for p in small["plans"] if not p["fits"]} >= {"float32", "bfloat16"}
    spread = plan("--memory 10 --rows 1 --gpus 8", capsys)["best"]
    assert spread["kind"] == "bfloat16" and spread["shards"] == 8
    assert plan("--memory 1", capsys)["best"] is None
    linked = [plan(f"--memory {room} --rows 1 --link 25", capsys)["best"] for room in (10, 3)]
    assert [p["offloaded"] for p in linked] == [False, True]
    assert linked[0]["kind"] in ("int8", "nf4") and linked[1]["kind"] == "bfloat16"
    both = plan("--memory 80 --gpus 4 --link 25", capsys)["plans"]
    ways = {(p["shards"], p["offloaded"]) for p in both}
    assert ways == {(1, False), (4, False), (4, True)}
    took = {(p["shards"], p["offloaded"]): p["seconds"] for p in both if p["kind"] == "bfloat16"}
    assert took[1, False] < took[4, False] < took[4, True]


def without_fits(plan: dict) -> dict:
    return {key: value for key, value in plan.items() if key != "fits"}


def test_a_plan_is_for_the_work_and_the_rates_that_are_given(capsys):
    adapter = AdapterConfig(rank=4, targets=("q_proj", "lm_head"))
    work = Workload(find_config("llama-2-7b"), rows=3, tokens=50, adapter=adapter, classes=7)
    rates = dict.fromkeys(BASES, Rates(500e12, 500e12, 2000e9, 5 / 2000e9, link=25e9))
    given = "--memory 13.8 --rows 3 --tokens 50 --classes 7 --rank 4 --targets q_proj lm_head"
    for gpus in (2, 1):
        found = plan(f"{given} --gpus {gpus} --link 25", capsys)
        ways = [made._asdict() for made in plans(work, rates, gpus)]
        assert [without_fits(each) for each in found["plans"]] == ways
        assert [each["fits"] for each in found["plans"]] == [
            made["peak"] <= 13.8e9 for made in ways
        ]
        posteriors = [subspace(work, base, rates[base], "cuda") for base in BASES]
        assert found["subspace"] == [made._asdict() for made in posteriors]
    assert cli.main([*PLAN.removesuffix(" --json").split(), *given.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama-2-7b: 3 rows of 50 tokens per step and device"
    assert lines[1] == "rank 4, q_proj lm_head; GB on each of 1,"
    found = plan(given, capsys)
    rows = lines[5 : 5 + len(found["plans"])]
    for line, each in zip(rows, found["plans"], strict=True):
        sizes = (each[name] / 1e9 for name in ("base", "activations", "workspace", "peak"))
        marks = ["fits"] * each["fits"] + ["<-"] * (found["best"] == without_fits(each))
        cells = [*(f"{size:.2f}" for size in sizes), f"{each['seconds']:.3g}", *marks]
        assert line.split()[0] == each["kind"] and line.split()[-len(cells) :] == cells
        assert ("recomputed" in line) == each["checkpointing"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--memory 1 --tokens 5000", "5000 tokens, but the model has only 4096 positions"),
        ("--memory 1 --rows 0", "rows must be at least 1"),
        ("--memory 0", "other numbers must be above 0"),
        ("--memory 1 --link 0", "other numbers must be above 0"),
        ("--memory 1 --gpus 0 --link 1", "--link is for GPUs"),
        ("--memory 1 --bandwidth -1", "other numbers must be above 0"),
        ("--memory 1 --config nothing", "'nothing' is neither a file nor a known model"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message, capsys):
    assert cli.main([*PLAN.split(), *arguments.split()]) == 2
    assert message in capsys.readouterr().err
