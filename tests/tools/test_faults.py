"""The tools that put faults into the package: their catalogue fits it, and they do notice."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools import mutants, seeded

from ..conftest import ROOT


@pytest.mark.parametrize("fault", seeded.FAULTS, ids=lambda fault: fault.name)
def test_a_seeded_fault_fits_the_package(fault):
    """Its text is there once, what it becomes can be compiled, and there is a test of that name."""
    fault.change()
    file, _, name = fault.property.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text()


def test_the_catalogue_is_large_and_its_names_are_different():
    names = [fault.name for fault in seeded.FAULTS]
    assert len(names) == len(set(names)) >= 270
    assert {fault.module for fault in seeded.FAULTS} >= {
        "core.philox", "core.noise", "core.layer", "core.adapter", "core.objective",
        "core.predictive", "fast.normals", "fast.ops", "fast.rows", "model.llama", "model.inputs",
        "evaluation.metrics", "training.trainer", "methods.subspace", "methods.evidence"
    }  # fmt: skip


SOURCE = '''
"""A docstring."""
from math import exp
SAMPLING = Literal["a", "b"]
def f(x: int = 1, *, y=None) -> int:
    """Another."""
    if x < 2 and not y:
        raise ValueError("wrong" + str(x))
    return max(x * 2.0, g(x, y, z=True))[1:]
'''


def test_mutants_are_the_small_changes_of_a_source():
    found = mutants.mutants(SOURCE)
    assert len({str(m) for m in found}) == len(found)
    twice = [str(m) for m in mutants.mutants("a(1, 1)")]
    assert twice[1::2] == ["1 -> 2 in a(1, 1)", "1 -> 2 (2) in a(1, 1)"]
    texts = {m.what for m in found}
    assert texts == {
        "1 -> 2", "1 -> 0", "x < 2 -> x <= 2", "2 -> 3", "2 -> 1", "not y -> y",
        "x < 2 and (not y) -> x < 2 or not y",
        "if x < 2 and (not y): -> if not (x < 2 and (not y)):",
        "if x < 2 and (not y): -> left out", "raise ValueError('wrong' + str(x)) -> left out",
        "return max(x * 2.0, g(x, y, z=True))[1:] -> return None", "x * 2.0 -> x / 2.0",
        "x * 2.0 -> x", "2.0 -> 3.0", "2.0 -> 2.002", "max -> min", "True -> False",
        "g(x, y, z=True) -> g(x, y)", "g(x, y, z=True) -> g(y, x, z=True)", "1: -> :",
    }  # fmt: skip


def test_a_changed_module_is_served_and_its_file_is_not_touched():
    """In a process of its own: the runner puts a hook into the import system."""
    text = (ROOT / "scalabl_ref" / "evaluation" / "metrics.py").read_text()
    program = """
from tools import faults, seeded
fault = next(f for f in seeded.FAULTS if f.name == "AUROC: ties won")
test = [fault.property]
tasks = (faults.Task(name, change, lambda: faults.run_tests(test, "faults")["caught"])
         for name, change in (("with", fault.change), ("without", None)))
print(dict(faults.in_processes(tasks, 2)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    name = "evaluation/test_metrics.py::test_auroc_equals_all_pairs"
    assert done.stdout.strip().splitlines()[-1] in (
        f"{{'with': '{name}', 'without': ''}}", f"{{'without': '', 'with': '{name}'}}"
    )  # fmt: skip
    assert (ROOT / "scalabl_ref" / "evaluation" / "metrics.py").read_text() == text
