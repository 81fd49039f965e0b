"""What the documents name exists: code, tests, files, commands, vectors."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import math
import re

import pytest
import torch

from scalabl_ref import adapters
from scalabl_ref.app import cli
from scalabl_ref.app.study import Study
from scalabl_ref.core.objective import complexity
from scalabl_ref.data import TEMPLATES
from scalabl_ref.evaluation.threshold import fewest_rows
from scalabl_ref.fast import HOOKS
from scalabl_ref.verify.vectors import vectors

from .conftest import ROOT
from .models import tiny_model
from .test_layout import BUDGETS, RANK
from .tolerances import rounding

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def audit_rows() -> list[list[str]]:
    """The cells of the table "Equation, code, test, vector", row by row."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    table = text.split("## Equation, code, test, vector")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_audit_table_names_what_exists():
    rows = audit_rows()
    assert len(rows) >= 12
    levels = {vector.level for vector in vectors()}
    for equation, code, tests, vector in rows:
        assert names(code) and names(tests), equation
        for name in names(code):
            if "/" in name:
                assert (ROOT / name).is_file(), name
                continue
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(f"scalabl_ref.{module}"), attribute), name
        for name in names(tests):
            file, _, function = name.partition("::")
            path = ROOT / file if file.startswith(("tests/", "csrc/")) else ROOT / "tests" / file
            assert path.is_file(), name
            assert not function or f"def {function}(" in path.read_text(encoding="utf-8"), name
        assert set(names(vector)) <= levels, equation
    covered = {name for row in rows for name in names(row[3])}
    assert covered == levels


def test_every_equation_has_a_row():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    body = text.split("## Equation, code, test, vector")[0]
    displayed = [line for line in body.splitlines() if "$$" in line]
    numbers = [re.fullmatch(r"\$\$ .+ \\tag\{(\d+[a-e]?)\} \$\$", line) for line in displayed]
    assert None not in numbers, displayed[numbers.index(None)]
    numbered = {f"({number[1]})" for number in numbers if number}
    assert {"(1)", "(1e)", "(27)"} <= numbered and len(numbered) == len(displayed)
    listed = " ".join(row[0] for row in audit_rows()).replace("(1b) to (1e)", "(1b) (1c) (1d) (1e)")
    assert {number for number in numbered if number not in listed} == set()


def equations(cell: str) -> set[int]:
    """The numbers of the equations in a cell, such as 1 for "(1b) to (1e)"."""
    return {int(number) for number in re.findall(r"\((\d+)[a-e]?\)", cell)}


def marked() -> set[tuple[int, str]]:
    """Every mark eq_N of a test in the tree: N, and the test as the table names it."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                name = f"{path.relative_to(ROOT / 'tests')}::{node.name}"
                marks = (re.fullmatch(r"pytest\.mark\.eq_(\d+)", ast.unparse(decorator))
                         for decorator in node.decorator_list)  # fmt: skip
                found |= {(int(mark[1]), name) for mark in marks if mark}
    return found


def test_each_equation_has_its_tests_marked():
    """`pytest -m eq_5` runs the tests that the table names for (5), and no others."""
    listed = {
        (number, name)
        for equation, _, tests, _ in audit_rows()
        for number in equations(equation)
        for name in names(tests)
        if "::" in name
    }
    assert marked() == listed
    assert {number for number, _ in listed} == set(range(1, 28))


def test_the_prompts_are_those_of_the_code():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.split("| format | prompt |")[1].split("\n\n")[0]
    rows = [[cell.strip(" `") for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    assert {name: prompt.replace("\\n", "\n") for name, prompt in rows} == TEMPLATES


def test_the_kl_starts_where_the_method_says():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"the forward KL is about (\S+) nats per dimension", text)
    model = tiny_model(rank=8, layers=12, trim=False, wake=False)
    start = complexity(model).item() / (8 * len(adapters(model)))
    assert f"{start:.1f}" == said


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_commands_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    for command in re.findall(r"^ {4}scalabl (\w+)", text, re.MULTILINE):
        assert command in cli.COMMANDS, command
    for tool in re.findall(r"python (tools/\w+\.py)", text):
        assert (ROOT / tool).is_file(), tool


STUDIES = sorted((ROOT / "docs" / "studies").glob("*.json"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.name)
def test_the_studies_can_be_read_and_are_reported(file, monkeypatch):
    """Each is a valid study, and docs/results.md names it beside its figures."""
    monkeypatch.chdir(file.parent)
    study = Study.read(file)
    assert all(study.tried(arm) for arm in study.arms)
    assert f"studies/{file.name}" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_plots_of_scaling_have_the_figures_of_its_table():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    lines = text.split("\n## Scaling\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    page = (ROOT / "docs" / "scaling.html").read_text(encoding="utf-8")
    shown = re.findall(r"measured (\(.+?\)); predicted", page)
    expected = [
        ", ".join(f"({x}, {float(y):.3g})" for x, y in zip(row[2].split(), ys.split(), strict=True))
        for row in rows[2:]
        for ys in (row[3], row[6])
    ]
    assert shown == expected and len(shown) == 18


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def test_the_fewest_rows_of_a_threshold_are_those_of_the_code():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"If all answers are right, ([^.]+)\.", text)
    pairs = re.findall(r"(\d+)(?: rows\sare\senough)?\sfor\s(\d+)\s%", sentence)
    assert [rate for _, rate in pairs] == ["80", "90", "95", "99"]
    for rows, rate in pairs:
        assert int(rows) == fewest_rows(int(rate) / 100, 0.95)


def figures(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_example_of_the_readme_prints_its_output():
    """To its four digits and the rounding of 100 steps, in chains of at most 100 roundings each."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example, printed = re.findall(r"```(?:python)?\n(.+?)```", text, re.DOTALL)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(example, {})
    bound = 0.5e-4 + rounding(torch.float32, 100 * 100)
    assert re.findall(r"[a-z_]+ tensor", output.getvalue()) == re.findall("[a-z_]+ tensor", printed)
    assert figures(output.getvalue()) == pytest.approx(figures(printed), rel=0, abs=bound)
    assert min(figures(printed)[-3:]) > 4 * bound  # the uncertainty of each question


def reading_rows() -> list[tuple[str, int, int]]:
    """File, lines and minutes of every row in the tables of docs/reading.md."""
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    return [(file, int(lines), int(minutes)) for file, lines, minutes in rows]


@pytest.mark.parametrize("file, lines, minutes", reading_rows())
def test_the_lines_to_read_are_those_of_the_file(file, lines, minutes):
    counted = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines == pytest.approx(counted, rel=0.05)
    assert minutes == math.ceil(lines / 25)


def test_the_reading_path_adds_up():
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    ((lines, minutes),) = re.findall(r"Together: (\d+) lines, (\d+) minutes", text)
    section = text.split("## The plain bodies")[1].split("\n## ")[0]
    plain = [row for row in reading_rows() if f"| `{row[0]}` | {row[1]} |" in section]
    assert len(plain) == 11
    assert int(lines) == sum(row[1] for row in plain)
    assert int(minutes) == sum(row[2] for row in plain)


def test_files_that_the_reading_path_names_exist():
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:csrc|tests|core|tools)/[\w/]+\.\w+)`", text):
        assert any((room / name).is_file() for room in (ROOT, ROOT / "scalabl_ref")), name


def structure(title: str) -> list[list[str]]:
    """The cells of a table in docs/structure.md, row by row."""
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" `/") for cell in row.strip("|").split("|")] for row in rows]


def test_the_structure_has_the_rooms_hooks_and_budgets_of_the_code():
    assert {row[0] for row in structure("Rooms")} == {*RANK, "verify"}
    hooks = [f"{owner.__name__}.{name}" for owner, name, _ in HOOKS]
    assert [row[0] for row in structure("Hooks")] == hooks
    for _, plain, fast in structure("Hooks"):
        for name in (plain, fast):
            room, module, *attributes = name.split(".")
            found = importlib.import_module(f"scalabl_ref.{room}.{module}")
            for attribute in attributes:
                found = getattr(found, attribute)
    budgets = [f"{files}: {budget} lines" for files, _, budget in structure("Budgets")]
    assert budgets == BUDGETS
