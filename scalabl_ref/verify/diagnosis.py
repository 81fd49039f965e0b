"""What a port that fails may have wrong: its results beside those of the catalogue of faults."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..support.files import read_json
from ..support.tensors import load_tensors
from .conformance import PRECISIONS, Grade, grade_output, size_of, worst_share
from .faults import FAULTS, Fault
from .vectors import one

Case = dict[str, Any]
Alike = dict[str, dict[str, list[str]]]  # faults by case and output, the likeliest first
SEARCHES = 2  # cases of a level that are compared with all faults; others, with those found
SHARE = 0.8  # of the wrong outputs of the first failing level, which a likely fault gives


class Diagnosis(NamedTuple):
    """alike: the faults that give a port's wrong outputs.

    likely: those that give nearly all wrong outputs of the first failing level. spared: a case of
    that level with a right output that the first of them would spoil; empty if there is none.
    """

    alike: Alike
    likely: list[str]
    spared: str = ""


def diagnose(
    folder: Path | str, outputs: Path | str, grades: list[Grade], precision: str = "float32"
) -> Diagnosis:
    """Compare a port's wrong outputs with those of every fault of the catalogue.

    Arguments as those of `conformance.check`, and its grades.
    """
    cases = {case["id"]: case for case in read_json(Path(folder) / "manifest.json")["cases"]}
    truth, _ = load_tensors(Path(folder) / "vectors.safetensors")
    theirs, _ = load_tensors(Path(outputs))
    found, suspects = _search(cases, grades, truth, theirs, precision)
    level = next((grade.level for grade in grades if not grade.passed), "")
    first = [grade for grade in grades if grade.level == level]
    here, counts = _counts(found, first), _counts(found, grades)
    enough = SHARE * sum(map(_comparable, first))

    def spared(fault: Fault, by: list[Grade]) -> str:
        of = ((grade, cases[grade.id]) for grade in by)
        return next((grade.id for grade, case in of
                     if _spoils(given(fault, case), case, grade, truth)), "")  # fmt: skip

    likely = [f for f in suspects if 0 < here[f.name] >= enough]
    likely = [f for f in likely if not spared(f, first)] or likely
    most = max(((here[f.name], counts[f.name]) for f in likely), default=(0, 0))
    likely = [f for f in likely if (here[f.name], counts[f.name]) == most]
    if len(likely) > 1:  # some may spoil what is right at other levels
        likely = [f for f in likely if not spared(f, grades)] or likely
    order = [f.name for f in likely]
    for each in found.values():
        for names in each.values():
            names.sort(key=lambda name: (name not in order, -counts[name]))
    return Diagnosis(found, order, spared(likely[0], first) if likely else "")


def _search(
    cases: dict[str, Case],
    grades: list[Grade],
    truth: dict[str, Tensor],
    theirs: dict[str, Tensor],
    precision: str,
) -> tuple[Alike, list[Fault]]:
    """The faults of `Diagnosis.alike`, by case and output, and all of them.

    At each level a fault must give half of what it spoils there: a few equal outputs, such as
    gradients near 0, are a coincidence.
    """
    found: Alike = {}
    suspects: list[Fault] = []
    searches, balance = Counter[str](), Counter[tuple[str, str]]()
    for grade in grades:
        case = cases[grade.id]
        wrong = _wrong(case, grade, truth, theirs)
        same = {f.name: _same(f, case, grade, truth, wrong, precision) for f in suspects if wrong}
        if wrong and not any(names for names, _ in same.values()):
            if searches[grade.level] < SEARCHES:
                same = {f.name: _same(f, case, grade, truth, wrong, precision) for f in FAULTS}
            searches[grade.level] += 1
        for name, (names, others) in same.items():
            balance[grade.level, name] += len(names) - others
        of = {n: [name for name, (names, _) in same.items() if n in names] for n in wrong}
        found[grade.id] = {n: names for n, names in of.items() if names}
        known = {name for name, (names, _) in same.items() if names} | {f.name for f in suspects}
        suspects = [fault for fault in FAULTS if fault.name in known]
    for grade in grades:
        kept = {n: [name for name in names if balance[grade.level, name] >= 0]
                for n, names in found[grade.id].items()}  # fmt: skip
        found[grade.id] = {n: names for n, names in kept.items() if names}
    return {id: each for id, each in found.items() if each}, suspects


def _counts(found: Alike, grades: list[Grade]) -> Counter[str]:
    """How many outputs of these cases each fault gives."""
    cases = [found.get(grade.id, {}) for grade in grades]
    return Counter(name for case in cases for names in case.values() for name in names)


def _comparable(grade: Grade) -> int:
    """How many wrong outputs are there and have the right shape: their problems give numbers."""
    return sum(problem.split()[0].endswith(":") for problem in grade.problems)


def given(fault: Fault, case: Case) -> dict[str, Tensor]:
    """What a port with this fault stores for a case; nothing for a case of another kit."""
    if case["level"] not in fault.levels:
        return {}
    try:
        with fault.applied():
            outputs = one(case["level"], case["id"]).outputs
    except StopIteration:
        return {}
    return {case["outputs"][name]["tensor"]: out.value for name, out in outputs.items()}


def _spoils(values: dict[str, Tensor], case: Case, grade: Grade, truth: dict[str, Tensor]) -> bool:
    """Whether a fault's values are wrong where the port is right, by the bounds of float32."""
    for name in grade.right if values else ():
        output = case["outputs"][name]
        value, expected = values[output["tensor"]], truth[output["tensor"]]
        if grade_output(value, expected, output["terms"], size_of(output, truth), "float32")[1]:
            return True
    return False


Wrong = dict[str, tuple[Tensor, Tensor, Tensor]]  # got, expected, terms times size


def _wrong(case: Case, grade: Grade, truth: dict[str, Tensor], theirs: dict[str, Tensor]) -> Wrong:
    """The wrong outputs of a case whose shapes are right."""
    out = {}
    for name, output in case["outputs"].items():
        got, expected = theirs.get(output["tensor"]), truth[output["tensor"]]
        if name in grade.right or got is None or got.shape != expected.shape:
            continue
        bound = torch.as_tensor(size_of(output, truth)).double() * output["terms"]
        out[name] = got.double(), expected.double(), bound.expand(expected.shape)
    return out


def _same(
    fault: Fault, case: Case, grade: Grade, truth: dict[str, Tensor], wrong: Wrong, precision: str
) -> tuple[list[str], int]:
    """The wrong outputs that this fault gives, and the number of others that it would spoil.

    None, and one, if it would spoil an output that is right.
    """
    values = given(fault, case)
    if not values or _spoils(values, case, grade, truth):
        return [], int(bool(values))
    names, others = [], 0
    for name, (got, expected, bound) in wrong.items():
        value = values[case["outputs"][name]["tensor"]].double()
        if value.shape != expected.shape:  # a fault may move the steps of a schedule
            others += 1
            continue
        times = max(1.0, float(value.abs().max() / expected.abs().max().clamp(min=1e-300)))
        bound = PRECISIONS[precision] * bound
        near = 2 * (times * bound + PRECISIONS[precision] * value.abs())
        equal = _close(got, value, near) and (
            worst_share(got, value, bound) <= worst_share(got, expected, bound) / 2
        )
        if equal or worst_share(value, expected, bound) > 1:
            names += [name] * equal
            others += not equal
    return names, others


def _close(a: Tensor, b: Tensor, bound: Tensor) -> bool:
    """Within the bound where both are finite, and both NaN or infinite elsewhere."""
    finite = a.isfinite() & b.isfinite()
    near = (a - b).abs() <= bound
    return bool(torch.where(finite, near, a.isfinite() == b.isfinite()).all())


# --- Words ------------------------------------------------------------------------------------

WAY = ("op", "training step")  # levels with intermediate values
STEP = {  # kinds of a step's outputs in the order of computation, and what to look at
    "nll": "the forward pass",
    "kl": "the KL",
    "loss": "how nll and kl are joined",
    "gradient.*": "the backward pass and the derivative of the KL",
    "after.exp_avg*": "the moments of AdamW",
    "after.*": "the update: AdamW, the KL step of the official objective, the bound",
}


def summary(
    folder: Path | str, grades: list[Grade], found: Diagnosis, precision: str = "float32"
) -> list[str]:
    """Lines: where a port fails first, what is wrong there, and what explains it."""
    failed = [grade for grade in grades if not grade.passed]
    if not failed:
        return []
    cases = {case["id"]: case for case in read_json(Path(folder) / "manifest.json")["cases"]}
    level = failed[0].level
    wrong = [grade for grade in failed if grade.level == level]
    right = [grade for grade in grades if grade.level == level and grade.passed]
    text = f"first failing level: {level}, {len(wrong)} of {len(wrong) + len(right)} cases"
    fact = _fact([cases[grade.id] for grade in wrong], [cases[grade.id] for grade in right])
    if fact:
        text += f", exactly those {fact}"
    elif right and min(len(wrong), len(right)) < 4:
        few = min(wrong, right, key=len)
        text += f" ({'all but ' * (few is right)}{', '.join(grade.id for grade in few)})"
    lines = [f"{text}: start there"]
    lines += _outputs(wrong, bool(right), cases) + _causes(wrong, failed, found)
    if level.startswith(WAY):
        option = "" if precision == "float32" else f" --precision {precision}"
        lines.append("to find the first wrong intermediate value: scalabl conformance "
                     f"compare {wrong[0].id} VALUES.safetensors{option}")  # fmt: skip
    return lines


def _causes(wrong: list[Grade], failed: list[Grade], found: Diagnosis) -> list[str]:
    """The likely faults; without one, what the wrong cases were made to catch."""
    total = sum(map(_comparable, wrong))
    if not total:  # outputs are missing, or have another shape
        return []
    if not found.likely:
        caught = "; ".join(dict.fromkeys(fault for grade in wrong for fault in grade.catches))
        return ["no mistake of the catalogue explains it alone; these cases were made to catch:",
                f"    {caught}"]  # fmt: skip
    here, everywhere = _counts(found.alike, wrong), _counts(found.alike, failed)
    name = found.likely[0]
    gives = f"{any_of(found.likely)} gives {here[name]} of {total} wrong outputs"
    if found.spared:
        return [f"perhaps in a part of your code: {gives}; in all of it, the mistake would spoil "
                f"a right output of {found.spared}"]  # fmt: skip
    if len(failed) > len(wrong):
        gives += f" of this level, {everywhere[name]} of {sum(map(_comparable, failed))} in all"
    return [f"most likely: {gives}"]


def _outputs(wrong: list[Grade], some_right: bool, cases: dict[str, Case]) -> list[str]:
    """Which outputs are wrong in some of these cases, and which in none."""
    step = wrong[0].level == "training step"
    once = [grade for grade in wrong if cases[grade.id]["parameters"].get("repeat", 1) == 1]
    if step and some_right and not once:
        return ["single steps are right: look at the values handed on (moments, step, draw)"]
    kinds = {
        grade.id: {name: _kind(name) if step else name for name in cases[grade.id]["outputs"]}
        for grade in once or wrong
    }
    every = [kind for kinds_ in kinds.values() for kind in kinds_.values()]
    bad = {k for grade in once or wrong for n, k in kinds[grade.id].items() if n not in grade.right}
    order = [k for k in (STEP if step else dict.fromkeys(every)) if k in every]
    good = [kind for kind in order if kind not in bad]
    first = next(kind for kind in order if kind in bad)
    text = f"wrong: {', '.join(kind for kind in order if kind in bad)}"
    text += f"; right: {', '.join(good)}" if good else ""
    return [f"{text}: look at {STEP[first]}" if step else text] if len(order) > 1 else []


def _kind(name: str) -> str:
    """The kind of a step's output."""
    return next(kind for kind in STEP if name.startswith(kind.rstrip("*")))


def any_of(names: list[str]) -> str:
    """The first three names."""
    return " or ".join(f"*{name}*" for name in names[:3])


def _fact(wrong: list[Case], right: list[Case]) -> str:
    """What sets two or more wrong cases apart from all right ones, in words, or nothing."""
    if len(wrong) < 2 or not right:
        return ""
    facts = _facts(wrong[0])
    for some in (*((fact,) for fact in facts), *combinations(facts, 2)):
        if all(set(some) <= set(_facts(case)) for case in wrong) and not any(
            set(some) <= set(_facts(case)) for case in right
        ):
            return " and ".join(some)
    return ""


def _facts(case: Case) -> list[str]:
    """What can set some cases of a level apart from others."""
    p = case["parameters"]
    facts = ["without noise" if p["seed"] is None else "with noise"] if "seed" in p else []
    facts += ["with groups given"] if "groups" in case["inputs"] else []
    facts += ["with qk_norm"] if p.get("qk_norm") else []
    return facts + [
        f"with {name} {p[name]}" for name in ("sampling", "objective", "kl") if name in p
    ]
