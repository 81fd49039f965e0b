"""The catalogue of faults: the kit notices each, in either precision."""

from __future__ import annotations

import json

import pytest
import torch

from scalabl_ref.support.tensors import load_tensors
from scalabl_ref.verify.conformance import grade_case
from scalabl_ref.verify.faults import FAULTS, Fault
from scalabl_ref.verify.vectors import one

from ..conftest import ROOT

KIT = ROOT / "tests" / "vectors"
# docs/conformance.md, "What the cases do not notice", has the reasons.
BENIGN = {
    "float32": {
        "normals rounded to float32 before step 5",
        "in the logarithm of the entropy: 1e-12 added to p",
        "in the logarithm of the entropy: 1e-10 added to p",
        "in the logarithm of the entropy: p at least 1e-12",
        "1e-8 added to s and sigma",
        "s and sigma at least 1e-6",
        "s and sigma at least exp(-20)",
        "AdamW: betas rounded to float32",
    },
    "float64": set(),
}


@pytest.fixture(scope="module")
def kit():
    cases = json.loads((KIT / "manifest.json").read_text())["cases"]
    return cases, load_tensors(KIT / "vectors.safetensors")[0]


def results(fault, case, precision):
    """What a port with this fault stores for a case."""
    with fault.applied():
        outputs = one(case["level"], case["id"]).outputs
    dtype = getattr(torch, precision)
    values = {case["outputs"][name]["tensor"]: out.value for name, out in outputs.items()}
    return {
        n: (v.to(dtype) if v.is_floating_point() else v).contiguous() for n, v in values.items()
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_kit_notices(kit, fault):
    cases, truth = kit
    missed = {"float32", "float64"}
    for case in cases:
        if missed and case["level"] in fault.levels:
            missed = {p for p in missed
                      if grade_case(case, truth, results(fault, case, p), p).passed}  # fmt: skip
    assert missed == {p for p in missed if fault.name in BENIGN[p]}
    assert all(fault.name not in BENIGN[p] for p in {"float32", "float64"} - missed)


def test_the_page_counts_them():
    page = " ".join((ROOT / "docs" / "verification.md").read_text(encoding="utf-8").split())
    benign = len(BENIGN["float32"])
    assert (
        f"All {len(FAULTS)} faults fail a case in float64, and all but {benign} in float32" in page
    )
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_no_fault_is_no_fault(kit):
    """A catalogue entry without a change gives the expected values: the method of this file."""
    cases, truth = kit
    for case in cases:
        if case["id"] in ("noise-0", "op-backward-batch-1", "kl-forward-wide", "step-three"):
            right = results(Fault("none", (), {}), case, "float64")
            assert grade_case(case, truth, right, "float64").passed, case["id"]
