"""The conformance kit's grades of other people's code: the tables of docs/conformance.md.

    python -m tests.peer.grade

prints them, for the programs that are there. `field` has the adapters. A case passes if no compared
output is wrong. Outputs that an adapter does not give are listed. Where a case fails, the kit's
formulas with the program's convention in the place of the kit's must give the program's numbers,
within the bounds of the case.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scalabl_ref.support.tensors import load_tensors, save_tensors
from scalabl_ref.verify.conformance import PRECISIONS, check

from ..conftest import ROOT
from ..own_port import cases

KIT = ROOT / "tests" / "vectors"
HEADING = "## The field, graded"


class Case(NamedTuple):
    """A case of the kit. t: its inputs as float32, exact: as float64, both by the kit's names."""

    id: str
    level: str
    p: dict
    t: dict[str, Tensor]
    exact: dict[str, Tensor]
    outputs: dict[str, dict]  # of the manifest


class Difference(NamedTuple):
    """A convention of a program that is not the kit's, and the cases of a level that it explains.

    expected: the outputs of a case by the kit's formulas with the program's convention; or the
    error that the program raises.
    """

    level: str
    words: str
    explains: Callable[[Case], bool]
    expected: Callable[[Case], dict] | type[ArithmeticError]


class Graded(NamedTuple):
    """What a program's run gives. cells: by level, what the first table says."""

    cells: dict[str, str]
    differences: list[tuple[str, str, list[str]]]  # level, words, ids of the cases
    lacks: list[tuple[str, list[str]]]  # level, outputs
    unexplained: list[str]


@cache
def kit() -> list[Case]:
    """Every case."""
    found = []
    for case, t in cases(KIT):
        single = {n: v.float() if v.is_floating_point() else v for n, v in t.items()}
        about = (case["id"], case["level"], case["parameters"])
        found.append(Case(*about, single, t, case["outputs"]))
    return found


@cache
def levels() -> list[str]:
    return list(dict.fromkeys(case.level for case in kit()))


class Program:
    """Somebody's code. A method for each level that it has something for: `op_forward` and so on.

    A method takes a case and returns the outputs that the program has, by the kit's names; or None
    if the case asks for something that it does not have. An ArithmeticError counts as a failure.
    """

    name = ""  # of its column
    differences: tuple[Difference, ...] = ()

    def answers(self, case: Case) -> dict[str, Tensor] | ArithmeticError | None:
        method = getattr(self, case.level.replace(" ", "_").lower(), None)
        if method is None:
            return None
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                found = method(case)
        except ArithmeticError as error:
            return error
        return found and {n: torch.as_tensor(v).detach().contiguous() for n, v in found.items()}


def grade(program: Program) -> Graded:
    """Run a program on every case, and explain what fails."""
    every = kit()
    answers = {case.id: found for case in every if (found := program.answers(case)) is not None}
    results = {}
    for case in every:
        found = answers.get(case.id, {})
        if isinstance(found, ArithmeticError):
            found = dict.fromkeys(case.outputs, torch.tensor(math.nan))
        results |= {case.outputs[n]["tensor"]: value for n, value in found.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "out.safetensors", results.items())
        grades, _ = check(KIT, Path(folder) / "out.safetensors")
    failed, lacks = set(), {}
    for one in grades:
        missing = {p.removesuffix(" is missing") for p in one.problems if p.endswith("missing")}
        lacks.setdefault(one.level, {}).update(dict.fromkeys(sorted(missing)))
        if len(missing) < len(one.problems):
            failed.add(one.id)
    cells = {}
    for level in levels():
        ids = [one.id for one in grades if one.level == level]
        cells[level] = f"{len(set(ids) - failed)}/{len(ids)}" if ids else "-"
    differences, unexplained = explain(program, [c for c in every if c.id in failed], answers)
    return Graded(cells, differences, [(k, list(v)) for k, v in lacks.items() if v], unexplained)


def explain(program: Program, failed: list[Case], answers: dict) -> tuple[list, list[str]]:
    """The differences with the cases that each explains, and what none explains."""
    found: dict[tuple[str, str], list[str]] = {}
    unexplained = []
    for case in failed:
        wrong = {
            difference.words: disagrees(case, difference, answers[case.id])
            for difference in program.differences
            if difference.level == case.level and difference.explains(case)
        }
        right = [words for words, outputs in wrong.items() if not outputs]
        if len(right) != 1:
            unexplained.append(f"{case.id}: {wrong}")
        for words in right:
            found.setdefault((case.level, words), []).append(short(case))
    return [(*key, ids) for key, ids in found.items()], unexplained


def short(case: Case) -> str:
    """A case's id without the name of its level."""
    return case.id.removeprefix(case.level.lower().replace(" ", "-") + "-")


def disagrees(case: Case, difference: Difference, got: dict | ArithmeticError) -> list[str]:
    """The outputs for which the program's numbers are not those of the difference."""
    if isinstance(difference.expected, type) or isinstance(got, ArithmeticError):
        return [] if type(got) is difference.expected else [repr(got)]
    expected, wrong = difference.expected(case), []
    for name, value in got.items():
        pair = expected[name] if isinstance(expected[name], tuple) else (expected[name], 0.0)
        right, size = (torch.as_tensor(x).double() for x in pair)
        given = case.outputs[name]["size"]
        given = torch.as_tensor(sizes()[given] if isinstance(given, str) else given).double()
        size = torch.maximum(torch.maximum(size, given), right.abs())
        bound = case.outputs[name]["terms"] * PRECISIONS["float32"] * size
        error = (value.double() - right).abs()
        if value.shape != right.shape or not bool((error <= bound).all()):
            wrong.append(f"{name}, off by {float((error / bound).max()):.3g} bounds")
    return wrong


@cache
def sizes() -> dict[str, Tensor]:
    return load_tensors(KIT / "vectors.safetensors")[0]


# --- The page ------------------------------------------------------------------------------------


def section() -> str:
    """Of docs/conformance.md."""
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    return text.split(f"\n{HEADING}\n")[1].split("\n## ")[0]


def tables() -> list[list[list[str]]]:
    """The cells of the section's tables, without the rules under their heads."""
    blocks = [b.splitlines() for b in section().split("\n\n") if b.lstrip().startswith("|")]
    rows = [[line.strip().strip("|").split(" | ") for line in block] for block in blocks]
    return [[[c.strip() for c in row] for row in (t[0], *t[2:])] for t in rows]


def on_page(name: str) -> Graded:
    """What docs/conformance.md says of a program."""
    _, grades, differences, lacks = tables()
    column = grades[0].index(name)
    cells = {row[0]: row[column] for row in grades[1:]}
    found = [(a, b, ids.split(", ")) for program, a, ids, b in differences if program == name]
    left = [(a, names.split(", ")) for program, a, names in lacks if program == name]
    return Graded(cells, found, left, [])


def page(graded: dict[str, Graded]) -> str:
    """The tables of grades, of conventions and of missing outputs, as the page has them."""
    rows = [["level", *graded], ["---"] * (len(graded) + 1)]
    rows += [[level, *(g.cells[level] for g in graded.values())] for level in levels()]
    rows += [[], ["program", "level", "cases that fail", "its convention"], ["---"] * 4]
    for name, g in graded.items():
        rows += [[name, level, ", ".join(ids), words] for level, words, ids in g.differences]
    rows += [[], ["program", "level", "outputs that are not compared"], ["---"] * 3]
    for name, g in graded.items():
        rows += [[name, level, ", ".join(names)] for level, names in g.lacks]
    return "\n".join(f"| {' | '.join(row)} |" if row else "" for row in rows)


def main() -> None:
    from .field import PROGRAMS

    graded, unexplained = {}, []
    for name, start in PROGRAMS.items():
        with start() as program:
            if isinstance(program, str):
                print(f"{name}: {program}")
                continue
            graded[name] = grade(program)
            unexplained += [f"{name}: {line}" for line in graded[name].unexplained]
    print(page(graded))
    print("\n".join(unexplained))


if __name__ == "__main__":
    main()
