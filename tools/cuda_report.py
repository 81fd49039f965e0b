"""Compile csrc/fast/cuda.cu for each architecture and report registers and spills.

    python tools/cuda_report.py [ARCHITECTURE ...]       default: 80 90 100

Prints a Markdown table, which docs/cuda.md holds for the compiler named there: for each kernel the
most registers over its dtypes, and its shared memory. Exit code 1 if a register was spilled or the
compiler complained: warnings are errors. No GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
KERNEL = re.compile(r"Compiling entry function '\S*?device\d*(\d+[A-Z]\w*?)I\S*' for")
FIGURES = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def compile_for(architecture: str) -> dict[str, tuple[int, int, int]]:
    """Kernel -> most registers of a thread, bytes of shared memory, bytes spilled.

    Raises SystemExit with the compiler's words if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            ["nvcc", "-std=c++17", "-fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v",
             "--generate-code", f"arch=compute_{architecture},code=sm_{architecture}",
             "-I", str(CSRC), "-c", str(CSRC / "fast" / "cuda.cu"),
             "-o", str(Path(folder) / "cuda.o")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    most: dict[str, tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    name, spilled = "", 0
    for line in (result.stdout + result.stderr).splitlines():
        if found := KERNEL.search(line):
            name = found[1].lstrip("0123456789")
        elif found := FIGURES.search(line):
            spilled = int(found[1]) + int(found[2])
        elif found := USED.search(line):
            registers, shared, spills = most[name]
            most[name] = (
                max(registers, int(found[1])),
                max(shared, int(found[2] or 0)),
                spills + spilled,
            )
    if not most or "" in most:
        raise SystemExit(f"the compiler's report was not understood:\n{result.stderr}")
    return dict(most)


def main(architectures: list[str]) -> int:
    reports = {a: compile_for(a) for a in architectures or ["80", "90", "100"]}
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release [\d.]+, V[\d.]+", version.stdout)
    print(f"nvcc {release[0] if release else ''}; 256 threads a block\n")
    print("| kernel | " + " | ".join(f"sm_{a} registers" for a in reports) + " | shared, bytes |")
    print("| --- " * (len(reports) + 2) + "|")
    for name in sorted(next(iter(reports.values()))):
        figures = [report[name] for report in reports.values()]
        registers = " | ".join(str(f[0]) for f in figures)
        print(f"| {name} | {registers} | {max(f[1] for f in figures)} |")
    spilled = sum(f[2] for report in reports.values() for f in report.values())
    print(f"\nspilled: {spilled} bytes")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
