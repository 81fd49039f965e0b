"""tools/cpp_mutants.py: which changes it makes, and which it leaves alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import cpp_mutants


def changes(line: str) -> list[str]:
    return [mutant.new.strip() for mutant in cpp_mutants.mutants(line)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("    h = a * b - c;", ["h = a / b - c;", "h = a * b + c;", ";"]),
        ("    if (op.noisy && g > 0) return;", [
            "if (op.noisy || g > 0) return;", "if (op.noisy && g >= 0) return;",
            "if (op.noisy && g > 1) return;", "if (!(op.noisy && g > 0)) return;"]),
        ("    const T *u = &x[2];", ["const T *u = &x[3];", "const T *u = &x[1];"]),
        ("    k0 += 0x9E3779B9u;", [
            "k0 -= 0x9E3779B9u;", "k0 += 0x9e3779bau;", "k0 += 0x9e3779b8u;", ";"]),
        ("    std::fill(s, s + rank, 0.0);", ["std::fill(s, s - rank, 0.0);", ";"]),
        ("    rows = std::min(most, left);", ["rows = std::max(most, left);", ";"]),
    ],
)  # fmt: skip
def test_changes(line, expected):
    assert changes(line) == expected


@pytest.mark.parametrize(
    "line",
    ["// a + b", "#define TWICE(a) a + a", "template <int64_t N = 4>", "    return &x;",
     '    fail("a + b > 2");', "    const Rows<P, T> A;"],
)  # fmt: skip
def test_lines_that_are_left_alone(line):
    assert changes(line) == []


def test_every_file_of_the_core_has_changes_and_the_lines_are_its_own():
    for file in sorted((cpp_mutants.ROOT / "csrc").rglob("*.[ch]*")):
        lines = file.read_text().splitlines()
        found = cpp_mutants.mutants(file.read_text())
        assert all(lines[m.line - 1] == m.old != m.new for m in found)
    assert len(cpp_mutants.mutants((cpp_mutants.ROOT / "csrc/fast/cpu.cpp").read_text())) > 300
