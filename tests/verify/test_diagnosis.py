"""`conformance check` names the mistake of a port, and says where to start."""

from __future__ import annotations

import json

import pytest

from scalabl_ref import Noise
from scalabl_ref.app import cli
from scalabl_ref.support.tensors import load_tensors, save_tensors
from scalabl_ref.verify import diagnosis, formulas, reference
from scalabl_ref.verify.conformance import check
from scalabl_ref.verify.diagnosis import diagnose, summary
from scalabl_ref.verify.faults import FAULTS, OP, STEP, Fault, _op

from .test_faults import KIT, results

FAULTS_OF = {}  # what `diagnosis.given` gave, by fault and case: the tests share it


@pytest.fixture(autouse=True)
def remembered(monkeypatch):
    right = diagnosis.given

    def given(fault, case):
        key = fault.name, case["id"]
        if key not in FAULTS_OF:
            FAULTS_OF[key] = right(fault, case)
        return FAULTS_OF[key]

    monkeypatch.setattr(diagnosis, "given", given)


CASES = json.loads((KIT / "manifest.json").read_text())["cases"]


def diagnosed(tmp_path, fault, levels, precision):
    out = {}
    for case in CASES:
        if case["level"] in levels:
            at_fault = fault if case["level"] in fault.levels else Fault("none", (), {})
            out.update(results(at_fault, case, precision))
    save_tensors(tmp_path / "out.safetensors", out.items())
    return check(KIT, tmp_path / "out.safetensors", precision)[0], tmp_path / "out.safetensors"


FIND = "to find the first wrong intermediate value: scalabl conformance"
NONE = "no mistake of the catalogue explains it alone; these cases were made to catch:"
NAMED = [
    ("9 rounds of Philox", "philox"), ("group off by one", "normals"),
    ("blocks of the counter counted from 1", "normals"),
    ("angle not reduced as an integer", "normals"), ("layer and draw exchanged", "op forward"),
    ("scaling left out", "op backward"), ("sigma detached", "op backward"),
    ("KL in the other direction", "KL"), ("logarithm of a softmax that is 0", "ELBO"),
    ("start: log sigma uniform", "initialisation"), ("warm-up steps in float32", "schedules"),
    ("0 ln 0 is not 0", "predictive"), ("bins in float32", "metrics"),
    ("q_norm and k_norm: eps left out", "llama"), ("AdamW: eps 1e-5", "training step"),
    ("bound on log sigma before the official step", "training step"),
    ("test-time draws counted from 1", "prediction"),
    ("subspace: derivative by log s", "subspace"),
    ("subspace: evidence, half of the determinant left out", "subspace"),
    ("subspace: lambda taken for a standard deviation", "subspace"),
]  # fmt: skip


BOTH = [(name, level, precision) for name, level in NAMED for precision in ("float32", "float64")]
# Its results differ in digits that float32 does not have.
BOTH.remove(("angle not reduced as an integer", "normals", "float32"))
LONG = {"from step to step", "all but one", "gradients", "subspace: derivative by log s",
        "subspace: lambda taken for a standard deviation"}  # each takes 5 to 10 s  # fmt: skip
# The same faults are named in float32, by the slow tests.
TRIED = [pytest.param(*each, marks=[pytest.mark.slow] * (each[2] == "float32" or each[0] in LONG))
         for each in BOTH]  # fmt: skip


@pytest.mark.parametrize(("name", "level", "precision"), TRIED)
def test_a_fault_is_named(tmp_path, name, level, precision):
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    grades, outputs = diagnosed(tmp_path, fault, [level], precision)
    found = diagnose(KIT, outputs, grades, precision)
    named = {id for id, each in found.alike.items() if any(name in n for n in each.values())}
    assert named == {grade.id for grade in grades if not grade.passed}
    (line,) = (line for line in summary(KIT, grades, found) if line.startswith("most likely: "))
    assert f"*{name}*" in line


SAMPLE = FAULTS[::30]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_nearly_every_fault_is_named_alone(tmp_path, precision):
    """Every thirtieth fault, in a port that does all levels; docs/verification.md has all."""
    levels = {case["level"] for case in CASES}
    alone, tied, failed = [], [], 0
    for fault in SAMPLE:
        grades, outputs = diagnosed(tmp_path, fault, levels, precision)
        failed += any(not grade.passed for grade in grades)
        found = diagnose(KIT, outputs, grades, precision)
        if fault.name in found.likely and not found.spared:
            (tied if found.likely[1:] else alone).append(fault.name)
    assert failed >= len(SAMPLE) - 1
    assert len(alone) + len(tied) == failed and len(alone) >= 0.9 * failed, (alone, tied)


def test_the_summary_says_where_to_start(tmp_path, capsys):
    (fault,) = (fault for fault in FAULTS if fault.name == "group off by one")
    grades, outputs = diagnosed(tmp_path, fault, ["KL", "op forward"], "float32")
    failed = sum(not grade.passed for grade in grades)
    start = f"first failing level: op forward, {failed} of 22 cases, exactly those with noise"
    command = ["conformance", "check", str(KIT), str(outputs)]
    assert cli.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{start}: start there"
    assert lines[1] == f"most likely: *group off by one* gives {failed} of {failed} wrong outputs"
    assert lines[2] == f"{FIND} compare op-forward-batch-1 VALUES.safetensors"
    assert "made to catch" not in "".join(lines)
    first = next(i for i, line in enumerate(lines) if line.endswith("FAILED"))
    assert lines[first + 1] == "    your y equals what *group off by one* gives"
    assert cli.main([*command, "--first"]) == 1
    assert (
        sum(line.endswith(("ok", "FAILED")) for line in capsys.readouterr().out.splitlines()) == 1
    )


def only_if(condition, change):
    """A mistake of the op in some of its calls."""
    return Fault("?", OP, _op(change=lambda c: change(c) if condition(c) and c["noise"] else {}))


def other_seed(c):
    return {"noise": Noise(c["noise"].seed + 3, c["noise"].draw)}


def as_one_draw(c):
    return {"groups": None if c["groups"] is None else 0 * c["groups"], "sampling": "batch"}


adamw, kl_move, found_gradients = formulas.adamw, formulas.kl_move, formulas.nll_and_gradients


def clipped(*given):
    nll, gradients, *sizes = found_gradients(*given)
    norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    return nll, {name: 0.3 * g / norm for name, g in gradients.items()}, *sizes


UPDATE = "look at the update: AdamW, the KL step of the official objective, the bound"
BEFORE = "right: nll, kl, loss, gradient.*, after.exp_avg*"
WHERE = {  # a fault, its level, and the lines that say where it is
    "a branch": (only_if(lambda c: c["sampling"] == "token", other_seed), "op forward", [
        "7 of 22 cases, exactly those with sampling token"]),
    "two branches at once": (
        only_if(lambda c: c["sampling"] == "token" and c["groups"] is not None, other_seed),
        "op forward", ["4 of 22 cases, exactly those with groups given and with sampling token"]),
    "one gradient": (Fault("?", OP[1:], _op(lambda c: c.scaling * (
        c.s + (1.5 * c.sigma - 0.5 * c.sigma.detach()) * c.eps))), "op backward", [
        "19 of 22 cases, exactly those with noise",
        "wrong: sigma; right: x, weight, bias, A, B, s"]),
    "the KL step": (Fault("?", STEP, {"kl_move": lambda *given: {
        n: 1.25 * v for n, v in kl_move(*given).items()}}), "training step", [
        "2 of 6 cases, exactly those with objective official",
        f"wrong: after.*; {BEFORE}: {UPDATE}"]),
    "one case": (Fault("?", STEP, {"kl_move": lambda v, p, rows: {
        n: (1.25 if p["kl"] == "forward" else 1) * x for n, x in kl_move(v, p, rows).items()}}),
        "training step", ["1 of 6 cases (step-official-forward)",
                          f"wrong: after.*; {BEFORE}: {UPDATE}"]),
    "all but one": (Fault("?", STEP, {"adamw": lambda x, m, v, g, rate, p: adamw(
        x, m, v, g, rate,
        p if p["kl_lr"] == 0.25 else {**p, "weight_decay": 3 * p["weight_decay"]})}),
        "training step", ["5 of 6 cases (all but step-official-forward)",
                          f"wrong: after.*; {BEFORE}: {UPDATE}"]),
    "gradients": (Fault("?", STEP, {"nll_and_gradients": clipped}), "training step", [
        "6 of 6 cases", "wrong: gradient.*, after.exp_avg*, after.*; right: nll, kl, loss: "
        "look at the backward pass and the derivative of the KL"]),
    "from step to step": (
        next(f for f in FAULTS if f.name == "the same draw again in the next step"),
        "training step", ["1 of 6 cases (step-three)",
        "single steps are right: look at the values handed on (moments, step, draw)"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * (each in LONG)) for each in WHERE]
)
def test_the_summary_says_what_the_wrong_cases_share(tmp_path, name):
    """And what of their outputs is wrong. None of these mistakes is in the catalogue but one."""
    fault, level, expected = WHERE[name]
    grades, outputs = diagnosed(tmp_path, fault, [level], "float64")
    found = diagnose(KIT, outputs, grades, "float64")
    lines = summary(KIT, grades, found, "float64")
    assert lines[0] == f"first failing level: {level}, {expected[0]}: start there"
    assert lines[1 : len(expected)] == expected[1:]
    known = fault.name != "?"
    assert (fault.name in found.likely) == known and (NONE in lines) != known
    first = next(grade.id for grade in grades if not grade.passed)
    assert lines[-1] == f"{FIND} compare {first} VALUES.safetensors --precision float64"


def test_a_fault_that_right_cases_refute_is_not_likely(tmp_path):
    """It explains part of the cases: their branch has the mistake."""
    fault = only_if(lambda c: c["sampling"] == "token", as_one_draw)
    grades, outputs = diagnosed(tmp_path, fault, ["op forward"], "float32")
    found = diagnose(KIT, outputs, grades, "float32")
    assert found.spared == "op-forward-example-2"
    assert summary(KIT, grades, found)[1] == (
        "perhaps in a part of your code: *one draw for all groups* or *one draw for the batch* "
        "gives 7 of 7 wrong outputs; in all of it, the mistake would spoil a right output of "
        "op-forward-example-2"
    )


def test_a_fault_of_a_later_level_is_not_likely(tmp_path):
    """A seed cut to 60 bits: below 2^32, as those of the op, it equals one that is cut to 32."""
    normal = reference.normal
    fault = Fault("?", ("normals", *OP), {"normal": lambda n, *at: normal(n % 2**60, *at)})
    grades, outputs = diagnosed(tmp_path, fault, ["normals", "op forward"], "float32")
    found = diagnose(KIT, outputs, grades, "float32")
    assert "seed cut to 32 bits" in found.alike["op-forward-batch-1"]["y"]
    assert "noise-615" not in found.alike and found.likely == []
    lines = summary(KIT, grades, found)
    assert lines[0].startswith("first failing level: normals, ") and "(noise-615" in lines[0]
    assert NONE in lines


def test_of_two_mistakes_at_once_each_is_named_but_none_is_likely(tmp_path):
    names = "AUROC reversed", "Brier averaged over the classes"
    wrong = {k: v for f in FAULTS if f.name in names for k, v in f.wrong.items()}
    grades, outputs = diagnosed(tmp_path, Fault("?", ("metrics",), wrong), ["metrics"], "float32")
    found = diagnose(KIT, outputs, grades, "float32")
    assert names[0] in found.alike["auroc"]["auroc"]
    assert found.alike["scores"] == {"brier": [names[1]]} and found.likely == []
    assert NONE in summary(KIT, grades, found)


def test_a_fault_that_moves_a_schedules_steps_is_no_obstacle(tmp_path):
    """Its weights have another shape than those of a port, whose steps are the kit's."""
    _, outputs = diagnosed(tmp_path, Fault("none", (), {}), ["schedules"], "float64")
    tensors, _ = load_tensors(outputs)
    tensors["kl-weight-20-16/period"] += 5
    tensors["kl-weight-20-16/weight"] *= 1.5
    save_tensors(outputs, tensors.items())
    grades, _ = check(KIT, outputs, "float64")
    assert diagnose(KIT, outputs, grades, "float64") == ({}, [], "")


def test_a_few_equal_outputs_are_a_coincidence(tmp_path):
    """Gradients that are nearly 0 anyway equal those of a fault that leaves them out."""
    grades, outputs = diagnosed(tmp_path, WHERE["gradients"][0], ["training step"], "float32")
    assert diagnose(KIT, outputs, grades, "float32") == ({}, [], "")


def test_a_case_of_many_wrong_outputs_is_shown_in_a_few_lines(tmp_path, capsys):
    fault = next(fault for fault in FAULTS if fault.name == "step: beta left out")
    grades, outputs = diagnosed(tmp_path, fault, ["training step"], "float32")
    wrong = len(next(grade.problems for grade in grades if not grade.passed))
    assert cli.main(["conformance", "check", str(KIT), str(outputs), "--first"]) == 1
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index(next(line for line in lines if line.endswith("FAILED"))) + 1 : -1]
    assert lines[0].startswith("    your loss, gradient.") and wrong > 13
    assert lines[0].endswith(f" and {wrong - 6} others equal what *step: beta left out* gives")
    assert sum("beyond the bound" in line for line in lines) == 6
    assert lines[7:] == [
        f"    and {wrong - 6} more outputs: --json lists them",
        f"    (1) to (7), AdamW; right: {83 - wrong} others",
    ]


def test_what_is_not_in_the_catalogue_has_no_name(tmp_path):
    fault = Fault("?", ("KL",), {"kl_forward": lambda *_: 1.25, "kl_official": lambda *_: 1.25})
    grades, outputs = diagnosed(tmp_path, fault, ["KL"], "float32")
    found = diagnose(KIT, outputs, grades, "float32")
    assert found == ({}, [], "")
    start, none, caught = summary(KIT, grades, found)
    assert start == f"first failing level: KL, {len(grades)} of {len(grades)} cases: start there"
    assert none == NONE and caught.startswith(
        "    KL in the other direction; variance for standard"
    )


def test_a_result_that_is_hardly_wrong_has_no_name(tmp_path):
    """Faults that do not change a case are not behind an error of its size of rounding."""
    _, outputs = diagnosed(tmp_path, Fault("none", (), {}), ["KL"], "float64")
    tensors, _ = load_tensors(outputs)
    (case,) = (case for case in CASES if case["id"] == "kl-forward-prior")
    output = case["outputs"]["kl"]
    size = load_tensors(KIT / "vectors.safetensors")[0][output["size"]]
    tensors[output["tensor"]] += 1.5 * output["terms"] * 2.0**-52 * size
    save_tensors(outputs, tensors.items())
    grades, _ = check(KIT, outputs, "float64")
    assert [grade.id for grade in grades if not grade.passed] == ["kl-forward-prior"]
    assert diagnose(KIT, outputs, grades, "float64").alike == {}


def test_levels_left_out_and_shapes(tmp_path, capsys):
    _, outputs = diagnosed(tmp_path, Fault("none", (), {}), ["KL"], "float32")
    command = ["conformance", "check", str(KIT), str(outputs)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--all"]) == 1
    assert "not attempted, a failure with --all: philox-7" in capsys.readouterr().out
    tensors, _ = load_tensors(outputs)
    name = next(iter(tensors))
    save_tensors(outputs, {**tensors, name: tensors[name].reshape(1)}.items())
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    (line,) = (li for li in out.splitlines() if li.endswith("FAILED"))
    assert line.split()[1:] == ["-", "FAILED"] and "catch" not in out  # there is nothing to explain
