"""Every small change of a C++ file of csrc/, and the tests that notice it.

    python tools/cpp_mutants.py FILE... [--jobs 2] [--step N] [--out FILE.jsonl]

Exchanged are operators, related functions and truth values; constants move by 1; conditions are
negated; assignments and calls that are statements are left out. A change that does not compile
does not count. The C++ tests are asked first, then tests of the op and the noise in Python.
A line of --out is a mutant, so that a run that was stopped continues. In a line whose "by" is
empty, "why" says by hand that no test can notice the mutant; it then does not count. Exit code 1
if fewer than 95 % are noticed. It needs cmake, ninja and pybind11.

The text is read as clang-format leaves it: an operator has a space on either side, and a pointer,
a reference or a template has not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "scalabl_ref", "tests", "tools", "docs", "CMakeLists.txt", "pyproject.toml",
          "README.md", "setup.py")  # fmt: skip
PAIRS = (
    "+ -", "* /", "<< >>", "& |", "< <=", "> >=", "== !=", "&& ||", "+= -=", "*= /=", "min max",
    "sin cos", "floor ceil", "true false", "first last", "begin end",
)  # fmt: skip
SWAPS = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
SWAPS |= {"%": "*", "^": "&", "|=": "&="}
OPERATORS = "|".join(re.escape(op) for op in sorted(SWAPS, key=len, reverse=True)
                     if not op.isalpha())  # fmt: skip
TOKEN = re.compile(
    rf"(?<= )(?P<op>{OPERATORS})(?= |$)"
    r"|\b(?P<name>min|max|sin|cos|floor|ceil|true|false|begin|end)\b"
    r"|(?<![\w.])(?P<number>0x[0-9a-fA-F]+|\d+)(?=[uUlL]*\b)(?![.\w]*\.)"
)
DECLARED = "return|using|typedef|template|const |static|typename|constexpr|T |auto "
STATEMENT = re.compile(
    rf"^\s*(?=\S)(?!{DECLARED})"
    r"([\w.>\[\]():, +*-]+ [+*/|-]?= [^;{]+|[\w.:>-]+(<[\w:, ]+>)?\([^;{]*\));$"
)
LIMIT = 200.0  # seconds of a build, and of a test program without a change
PATIENCE = 6  # a program has so many times the seconds that it needs without a change, and ten


class Mutant(NamedTuple):
    """line: from 1. old, new: the text of the line."""

    line: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old.strip()} -> {self.new.strip() or 'left out'}"


def mutants(source: str) -> list[Mutant]:
    """All of them, in the order of the text; comments, strings and directives are left alone."""
    found, inside = [], False
    for number, line in enumerate(source.splitlines(), 1):
        inside = inside or line.rstrip().endswith("\\") and line.lstrip().startswith("#")
        code = line.split("//")[0].rstrip()
        if line.lstrip().startswith(("#", "template", "namespace")) or '"' in code or inside:
            inside = inside and line.rstrip().endswith("\\")
            continue
        found += [Mutant(number, line, new) for new in _variants(code) if new != code]
    return found


def _variants(code: str) -> Iterator[str]:
    for match in TOKEN.finditer(code):
        token = match[0]
        if match["number"]:
            base = 16 if token.startswith("0x") else 10
            value = int(token, base)
            news = [value + 1, value - 1] if value else [1]
            replaced = [hex(v) if base == 16 else str(v) for v in news]
        else:
            replaced = [SWAPS[token]]
        yield from (code[: match.start()] + new + code[match.end() :] for new in replaced)
    condition = re.match(r"^(\s*(?:\} else )?if \()(.*)(\)( \{| [^{]*;)?)$", code)
    if condition and condition[2].count("(") == condition[2].count(")"):
        yield f"{condition[1]}!({condition[2]}){condition[3]}"
    if STATEMENT.match(code):
        yield code[: len(code) - len(code.lstrip())] + ";"


# --- What notices them ------------------------------------------------------------------------


def _pybind11() -> str:
    import pybind11  # not needed by the tests of this file

    return pybind11.get_cmake_dir()


class Tree:
    """A copy of the repository with a build of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.build = folder, folder / "build"
        self.seconds: dict[str, float] = {}  # of each program without a change
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so"))
            else:
                shutil.copy(source, folder)
        self._run("cmake", "-S", str(folder), "-B", str(self.build), "-G", "Ninja",
                  "-DSCALABL_TESTS=ON", "-DSCALABL_CUDA=OFF",
                  f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={_pybind11()}",
                  f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'scalabl_ref'}")  # fmt: skip
        by = self.noticed_by()
        if by:
            raise SystemExit(f"without a change it fails: {by}")

    def _run(self, *command: str) -> bool:
        """Whether it succeeds, in a time that is not much above that of the first call."""
        start, name = time.monotonic(), " ".join(command)
        limit = PATIENCE * self.seconds[name] + 10 if name in self.seconds else LIMIT
        try:
            done = subprocess.run(command, cwd=self.folder, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL, timeout=limit,
                                  env=self._environment())  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        self.seconds.setdefault(name, time.monotonic() - start)
        return not done.returncode

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # waiting threads sleep
        return {**os.environ, "PYTHONPATH": str(self.folder), **threads}

    def noticed_by(self) -> str:
        """The compiler, the C++ tests, the Python tests, or nobody."""
        if not self._run("cmake", "--build", str(self.build)):
            return "compiler"
        programs = [*sorted(self.build.glob("test_*")), self.build / "example_c"]
        if not all(self._run(str(path)) for path in programs):
            return "C++"  # without ctest, which keeps all that a failing test prints
        names = ("native", "ops", "segments", "blocks", "linear", "quantize")
        tests = [f"tests/fast/test_{name}.py" for name in names]
        command = (sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider")
        return "" if self._run(*command, *tests, "tests/core/test_noise.py") else "Python"

    def tried(self, file: str, mutant: Mutant) -> str:
        path = self.folder / file
        source = path.read_text()
        lines = source.splitlines()
        lines[mutant.line - 1] = mutant.new
        try:
            path.write_text("\n".join(lines) + "\n")
            return self.noticed_by()
        finally:
            path.write_text(source)


def run(file: str, jobs: int, step: int, out: Path) -> float:
    """The share of mutants that is noticed; results are added to `out`."""
    found = mutants((ROOT / file).read_text())[::step]
    key = {str(m.line) + str(m): m for m in found}
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = [row for row in done if row["file"] == file and row["key"] in key]
    left = [m for k, m in key.items() if k not in {row["key"] for row in done}]
    local, lock = threading.local(), threading.Lock()

    def work(mutant: Mutant) -> None:
        if not hasattr(local, "tree"):
            local.tree = Tree(Path(tempfile.mkdtemp(dir=folders)))
        row = {"file": file, "key": str(mutant.line) + str(mutant),
               "by": local.tree.tried(file, mutant)}  # fmt: skip
        with lock, out.open("a") as to:
            done.append(row)
            to.write(json.dumps(row) + "\n")
            print(f"{file}:{mutant.line} {row['by'] or 'ALIVE'}: {mutant}", flush=True)

    with tempfile.TemporaryDirectory() as folders, ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, left))
    counted = [row for row in done if row["by"] != "compiler" and not row.get("why")]
    alive = sum(not row["by"] for row in counted)
    print(f"{file}: {len(counted) - alive} of {len(counted)} noticed")
    return 1 - alive / max(1, len(counted))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="such as csrc/philox.h")
    parser.add_argument("--jobs", type=int, default=2, help="builds side by side")
    parser.add_argument("--step", type=int, default=1, help="only every n-th mutant")
    parser.add_argument("--out", type=Path, default=Path("cpp_mutants.jsonl"))
    a = parser.parse_args()
    return int(min(run(file, a.jobs, a.step, a.out) for file in a.files) < 0.95)


if __name__ == "__main__":
    sys.exit(main())
