"""The rooms of the package: which one may import which, and how long files and functions may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "scalabl_ref"

# A room may import those of the rows above its own, and verify.
ROWS = (
    ("support",),
    ("core",),
    ("model",),
    ("fast", "data", "training", "methods"),
    ("evaluation", "interop"),
    ("app",),
)
RANK = {room: rank for rank, rooms in enumerate(ROWS) for room in rooms}
ROOMS = (*RANK, "verify")

# Of two rooms in one row the first may import the second, because:
BESIDE = {
    ("training", "data"): "a trainer is given encoded rows, and makes batches of them",
    ("training", "fast"): "a training can offload activations and compile blocks",
    ("interop", "evaluation"): "a model of another package predicts as ours do",
}

BUDGETS = [
    "scalabl_ref/__init__.py: 70 lines",
    "scalabl_ref/minimal.py: 120 lines",
    "scalabl_ref/core/*.py: 1080 lines",
    "scalabl_ref/model/llama.py: 300 lines",
    "scalabl_ref/model/attach.py: 110 lines",
    "scalabl_ref/model/*.py: 1080 lines",
    "csrc/plain.cpp: 100 lines",
    "csrc/philox.h csrc/normal.h csrc/subspace_lora.h: 220 lines",
]
LONGEST = 60  # lines of a function, from its first line to its last

# Cases that do not hold yet. One that holds must leave: the marks are strict.
WAITING: dict[str, str] = {}

PYTHON = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")])
CXX = sorted(
    file
    for suffix in ("h", "cpp", "cu")
    for file in (ROOT / "csrc").rglob(f"*.{suffix}")
    if not {"tests", "third_party"} & set(file.parts)
)


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def cases(names: Iterable[str]) -> list:
    """The cases by name, those of WAITING marked."""
    return [
        pytest.param(name, id=name, marks=[pytest.mark.xfail(reason=WAITING[name], strict=True)])
        if name in WAITING
        else pytest.param(name, id=name)
        for name in names
    ]


# --- arrows ---------------------------------------------------------------------------------------


def allowed(importer: str, imported: str) -> bool:
    if importer == "verify":
        return imported != "app"
    if imported == "verify":
        return importer == "app"
    return RANK[imported] < RANK[importer] or (importer, imported) in BESIDE


FORBIDDEN = [
    f"{one} -> {other}"
    for one in ROOMS
    for other in ROOMS
    if one != other and not allowed(one, other)
]


def named(node: ast.AST, file: Path) -> Iterator[str]:
    """The full names that an import statement in `file` imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = list(file.relative_to(ROOT).parts[: -node.level]) if node.level else []
        yield from (".".join([*parts, *filter(None, [node.module]), a.name]) for a in node.names)


def imports(room: str) -> Iterator[tuple[str, str]]:
    """(full name, where and how) of each import in a room's files, wherever it stands in them."""
    for file in sorted((PACKAGE / room).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        guards = [
            (node.lineno, node.end_lineno or 0)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        for node in ast.walk(tree):
            for name in named(node, file):
                types = any(first < node.lineno <= last for first, last in guards)
                yield name, f"{name_of(file)}:{node.lineno}{' (for types)' if types else ''}"


@pytest.mark.parametrize("arrow", cases(FORBIDDEN))
def test_no_room_imports_one_that_is_not_below_it(arrow):
    """Types count, and so do imports within functions: neither can be read without the other."""
    importer, imported = arrow.split(" -> ")
    below = f"scalabl_ref.{imported}."
    found = [
        f"{where}: {name}" for name, where in imports(importer) if f"{name}.".startswith(below)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_the_public_names(room):
    """They are above all rooms. The version alone stands nowhere else."""
    inside = tuple(f"scalabl_ref.{other}." for other in ROOMS)
    ours = [(name, where) for name, where in imports(room) if name.startswith("scalabl_ref")]
    public = [(name, where) for name, where in ours if not f"{name}.".startswith(inside)]
    assert [where for name, where in public if name != "scalabl_ref.__version__"] == []


def test_every_folder_of_code_is_a_room():
    assert {file.relative_to(PACKAGE).parts[0] for file in PACKAGE.rglob("*/*.py")} == set(ROOMS)


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", cases(BUDGETS))
def test_files_are_no_longer_than_their_budget(budget):
    files, _, limit = budget.partition(": ")
    found = [file for pattern in files.split() for file in ROOT.glob(pattern)]
    assert len(found) >= len(files.split()), "a file is missing"
    lines = {name_of(file): len(file.read_text().splitlines()) for file in found}
    assert sum(lines.values()) <= int(limit.removesuffix(" lines")), lines


@pytest.mark.parametrize("file", cases(map(name_of, PYTHON)))
def test_no_function_is_long(file):
    lengths = {
        f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def blocks(source: str) -> Iterator[tuple[str, int]]:
    """(text before its brace, number of lines) of each function in C++.

    A brace after a parenthesis opens a function, unless it is in another function. Comments, texts
    and preprocessor lines are blanked first.
    """
    blank = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.DOTALL)
    source = blank.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    source = re.sub(
        r"^[ \t]*#(?:.*\\\n)*.*", lambda found: "\n" * found[0].count("\n"), source, flags=re.M
    )
    head, start, depth, inside = "", 0, 0, None
    for at, char in enumerate(source):
        if inside is None and char in ";{}":
            if char == "{" and ")" in head and not re.search(r"=\s*$", head):
                inside, start, depth = head, at - len(head.lstrip()), 0
            head = ""
        elif inside is None:
            head += char
        if inside is not None and char in "{}":
            depth += 1 if char == "{" else -1
            if depth == 0:
                yield " ".join(inside.split()), source.count("\n", start, at) + 1
                inside = None


@pytest.mark.parametrize("file", cases(map(name_of, CXX)))
def test_no_function_of_the_core_is_long(file):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert {head: n for head, n in blocks(source) if n > LONGEST} == {}


def test_functions_of_cxx_are_found():
    source = """
    #define MACRO(x) {
    namespace a {
    struct S { int f(int x) const { return x; }  int y = 0; };  // f { }
    int table[] = {1, 2};
    template <typename T>
    int g(T t)
    {
        for (;;) { if (t) { return '{'; } }
    }
    }  // namespace a
    """
    assert list(blocks(source)) == [
        ("int f(int x) const", 1),
        ("template <typename T> int g(T t)", 5),
    ]


def test_every_case_that_waits_is_there():
    every = {*FORBIDDEN, *BUDGETS, *map(name_of, PYTHON), *map(name_of, CXX)}
    assert set(WAITING) <= every
