"""What a port that fails may have wrong: its results beside those of the catalogue of faults."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.files import read_json
from ..support.tensors import load_tensors
from .conformance import PRECISIONS, Grade, grade_case
from .faults import FAULTS, Fault
from .vectors import one

Case = dict[str, Any]
Alike = dict[str, dict[str, list[str]]]  # faults by case and output, the likeliest first
SEARCHES = 2  # cases of a level that are compared with all faults; others, with those found


def alike(
    folder: Path | str, outputs: Path | str, grades: list[Grade], precision: str = "float32"
) -> Alike:
    """The faults of the catalogue that give a port's wrong outputs, for each case and output.

    Arguments as those of `conformance.check`, and its grades.
    """
    cases = {case["id"]: case for case in read_json(Path(folder) / "manifest.json")["cases"]}
    truth, _ = load_tensors(Path(folder) / "vectors.safetensors")
    theirs, _ = load_tensors(Path(outputs))
    found: Alike = {}
    suspects: list[Fault] = []
    searches = Counter[str]()
    for grade in grades:
        case = cases[grade.id]
        wrong = _wrong(case, grade, truth, theirs)
        same = [(f, _same(f, case, grade, truth, wrong, precision)) for f in suspects if wrong]
        if wrong and not any(names for _, names in same) and searches[grade.level] < SEARCHES:
            searches[grade.level] += 1
            same = [(f, _same(f, case, grade, truth, wrong, precision)) for f in FAULTS]
        if any(names for _, names in same):
            of = {n: [f.name for f, names in same if n in names] for n in wrong}
            found[grade.id] = {n: names for n, names in of.items() if names}
            known = {f.name for f, names in same if names} | {f.name for f in suspects}
            suspects = [fault for fault in FAULTS if fault.name in known]
    counts = _counts(found)
    tied = [fault for fault in suspects if counts[fault.name] == max(counts.values())]
    refuted: set[str] = set()
    if len(tied) > 1:  # they may give a wrong result in a case that the port has right
        right = [cases[grade.id] for grade in grades if grade.passed]
        refuted = {f.name for f in tied if any(_fails(f, case, truth) for case in right)}
    for each in found.values():
        for output, names in each.items():
            left = [name for name in names if name not in refuted] or names
            each[output] = sorted(left, key=lambda name: -counts[name])
    return found


def _counts(found: Alike) -> Counter[str]:
    """How many outputs each fault gives."""
    return Counter(name for case in found.values() for names in case.values() for name in names)


def _fails(fault: Fault, case: Case, truth: dict[str, Tensor]) -> bool:
    """Whether a case notices a fault, by the bounds of float32."""
    if case["level"] not in fault.levels:
        return False
    with fault.applied():
        outputs = one(case["level"], case["id"]).outputs
    values = {case["outputs"][name]["tensor"]: out.value for name, out in outputs.items()}
    return not grade_case(case, truth, values, "float32").passed


Wrong = dict[str, tuple[Tensor, Tensor, Tensor]]  # got, expected, terms times size


def _wrong(case: Case, grade: Grade, truth: dict[str, Tensor], theirs: dict[str, Tensor]) -> Wrong:
    """The wrong outputs of a case whose shapes are right."""
    out = {}
    for name, output in case["outputs"].items():
        got, expected = theirs.get(output["tensor"]), truth[output["tensor"]]
        if name in grade.right or got is None or got.shape != expected.shape:
            continue
        size = truth[output["size"]] if isinstance(output["size"], str) else output["size"]
        bound = torch.as_tensor(size).double() * output["terms"]
        out[name] = got.double(), expected.double(), bound.expand(expected.shape)
    return out


def _same(
    fault: Fault, case: Case, grade: Grade, truth: dict[str, Tensor], wrong: Wrong, precision: str
) -> list[str]:
    """The wrong outputs that this fault gives; none if it would spoil an output that is right."""
    if grade.level not in fault.levels:
        return []
    try:
        with fault.applied():
            outputs = one(grade.level, grade.id).outputs
    except StopIteration:  # a case of another version of the kit
        return []
    values = {case["outputs"][name]["tensor"]: out.value for name, out in outputs.items()}
    if set(grade.right) - set(grade_case(case, truth, values, "float32").right):
        return []
    names = []
    for name, (got, expected, bound) in wrong.items():
        value = outputs[name].value.double()
        times = max(1.0, float(value.abs().max() / expected.abs().max().clamp(min=1e-300)))
        near = 2 * times * PRECISIONS[precision] * bound
        if _close(got, value, near) and not _close(value, expected, near):
            names.append(name)
    return names


def _close(a: Tensor, b: Tensor, bound: Tensor) -> bool:
    """Within the bound where both are finite, and both NaN or infinite elsewhere."""
    finite = a.isfinite() & b.isfinite()
    near = (a - b).abs() <= bound
    return bool(torch.where(finite, near, a.isfinite() == b.isfinite()).all())


# --- Words ------------------------------------------------------------------------------------


def summary(folder: Path | str, grades: list[Grade], found: Alike) -> list[str]:
    """Lines: where a port fails first, and what explains most."""
    failed = [grade for grade in grades if not grade.passed]
    if not failed:
        return []
    cases = {case["id"]: case for case in read_json(Path(folder) / "manifest.json")["cases"]}
    level = failed[0].level
    graded = [grade for grade in grades if grade.level == level]
    wrong = [grade for grade in graded if not grade.passed]
    text = f"first failing level: {level}, {len(wrong)} of {len(graded)} cases"
    right = [_facts(cases[grade.id]) for grade in graded if grade.passed]
    common = set.intersection(*(_facts(cases[grade.id]) for grade in wrong)) - set().union(*right)
    if common and right:
        fact = min(common, key=lambda fact: (fact != "noise", fact))
        text += f", all with {fact}; without it all are right"
    lines = [f"{text}: start there"]
    counts = _counts(found)
    if counts:
        most = max(counts.values())
        names = [name for name, count in counts.items() if count == most]
        total = sum(len(cases[grade.id]["outputs"]) - len(grade.right) for grade in failed)
        lines.append(f"most likely: {any_of(names)} gives {most} of {total} wrong outputs")
    return lines


def any_of(names: list[str]) -> str:
    """The first three names."""
    return " or ".join(f"*{name}*" for name in names[:3])


def _facts(case: Case) -> set[str]:
    """What can set some cases of a level apart from others."""
    p = {k: v for k, v in case["parameters"].items() if k not in ("seed", "draw", "layer")}
    facts = {f"{k} {v}" for k, v in p.items() if isinstance(v, (str, float, int))}
    facts |= {f"an input {name}" for name in case["inputs"]}
    return facts | ({"noise"} if case["parameters"].get("seed") is not None else {"no noise"})
