"""`scalabl conformance`: what its options do. tests/verify has the rest."""

from __future__ import annotations

import json

import pytest
import torch

from scalabl_ref.support.tensors import save_tensors
from scalabl_ref.verify.conformance import identity
from scalabl_ref.verify.intermediates import intermediates

from ...own_port import port
from ...verify.test_faults import KIT
from ..commands import run


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_port_is_held_to_the_precision_that_is_given(tmp_path, capsys, precision):
    """An error of 1e-9 is far below float32's eps, and far above float64's."""
    option, right = f"--precision {precision}", precision == "float32"
    results = port(KIT, torch.float64, levels={"KL"})
    file = tmp_path / "results.safetensors"
    save_tensors(file, {name: value * (1 + 1e-9) for name, value in results.items()}.items())
    code, out, _ = run(f"conformance check {KIT} {file} {option}", capsys)
    total = len(results)
    passed, last = total if right else 2, out.splitlines()[-1]
    assert code == (not right) and last.startswith(
        f"{passed} of {total} cases passed, {precision}; "
    )
    code, out, _ = run(f"conformance check {KIT} {file} {option} --json", capsys)
    report = json.loads(out)
    assert report["failed"] == total - passed and len(report["cases"]) == total
    assert sum(case["passed"] for case in report["cases"]) == passed
    assert (report["kit"], report["sha256"]) == identity(KIT)
    name = "op-backward-example-9"
    values = {key: made.value.contiguous() for key, made in intermediates(name).items()}
    save_tensors(file, {"u": values["u"], "h": values["h"] * (1 + 1e-9)}.items())
    code, out, _ = run(f"conformance compare {name} {file} {option} --json", capsys)
    assert code == (not right) and json.loads(out)["first_wrong"] == (None if right else "h")


def test_help_has_a_line_for_each_action(capsys):
    with pytest.raises(SystemExit):
        run("conformance --help", capsys)
    usage = capsys.readouterr().out.partition("\n\n")[0].split("scalabl conformance ")[1:]
    precision = "[--precision P]"
    assert [" ".join(line.split()) for line in usage] == [
        "export DIR [--json]",
        f"check DIR OUTPUTS {precision} [--first] [--all] [--json]",
        f"compare CASE VALUES {precision} [--json]",
    ]
