"""`conformance check` names the mistake of a port, and says where to start."""

from __future__ import annotations

import json

import pytest

from scalabl_ref.app import cli
from scalabl_ref.support.tensors import load_tensors, save_tensors
from scalabl_ref.verify.conformance import check
from scalabl_ref.verify.diagnosis import alike, summary
from scalabl_ref.verify.faults import FAULTS, Fault

from .test_faults import KIT, results

CASES = json.loads((KIT / "manifest.json").read_text())["cases"]


def diagnosed(tmp_path, fault, levels, precision):
    out = {}
    for case in CASES:
        if case["level"] in levels:
            at_fault = fault if case["level"] in fault.levels else Fault("none", (), {})
            out.update(results(at_fault, case, precision))
    save_tensors(tmp_path / "out.safetensors", out.items())
    return check(KIT, tmp_path / "out.safetensors", precision)[0], tmp_path / "out.safetensors"


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
# The same faults are named in float32, by the slow tests.
TRIED = [pytest.param(*each, marks=[pytest.mark.slow] * (each[2] == "float32")) for each in BOTH]


@pytest.mark.parametrize(("name", "level", "precision"), TRIED)
def test_a_fault_is_named(tmp_path, name, level, precision):
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    grades, outputs = diagnosed(tmp_path, fault, [level], precision)
    found = alike(KIT, outputs, grades, precision)
    assert {id for id, each in found.items() if any(name in names for names in each.values())} == {
        grade.id for grade in grades if not grade.passed
    }
    assert f"*{name}*" in summary(KIT, grades, found)[1]


def test_the_summary_says_where_to_start(tmp_path, capsys):
    (fault,) = (fault for fault in FAULTS if fault.name == "group off by one")
    grades, outputs = diagnosed(tmp_path, fault, ["KL", "op forward"], "float32")
    failed = sum(not grade.passed for grade in grades)
    start = f"first failing level: op forward, {failed} of 22 cases, all with noise; without it all"
    command = ["conformance", "check", str(KIT), str(outputs)]
    assert cli.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{start} are right: start there"
    assert lines[1] == f"most likely: *group off by one* gives {failed} of {failed} wrong outputs"
    first = next(i for i, line in enumerate(lines) if line.endswith("FAILED"))
    assert lines[first + 1] == "    your y equals what *group off by one* gives"
    assert cli.main([*command, "--first"]) == 1
    assert (
        sum(line.endswith(("ok", "FAILED")) for line in capsys.readouterr().out.splitlines()) == 1
    )


def test_what_is_not_in_the_catalogue_has_no_name(tmp_path):
    fault = Fault("?", ("KL",), {"kl_forward": lambda *_: 1.25, "kl_official": lambda *_: 1.25})
    grades, outputs = diagnosed(tmp_path, fault, ["KL"], "float32")
    found = alike(KIT, outputs, grades, "float32")
    assert found == {} and len(summary(KIT, grades, found)) == 1


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
    assert alike(KIT, outputs, grades, "float64") == {}


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
    (line,) = (li for li in capsys.readouterr().out.splitlines() if li.endswith("FAILED"))
    assert line.split()[1:] == ["-", "FAILED"]
