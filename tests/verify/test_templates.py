"""The templates of ports build, and compute the level philox of the kit."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from scalabl_ref.verify.conformance import check, export

from ..conftest import ROOT

KIT = ROOT / "tests" / "vectors"
PORTS = ROOT / "tests" / "ports"
READERS = [str(PORTS / "c99" / f"{n}.c") for n in ("port", "case", "json", "support", "tensors")]
C99 = ["cc", "-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-ffp-contract=off",
       f"-I{PORTS / 'c99'}", str(PORTS / "templates" / "levels.c"), *READERS, "-lm"]  # fmt: skip
RUST = ["rustc", "--edition", "2021", "-O", "-D", "warnings", str(PORTS / "templates" / "port.rs")]


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def passes(tmp_path, *port):
    out = tmp_path / "results.safetensors"
    run(*port, str(KIT), str(out))
    grades, _ = check(KIT, out, "float64")
    assert [grade.id for grade in grades if grade.passed] == ["philox-7", "philox-10"]
    assert len(grades) == 2


def test_python(tmp_path):
    """By the standard library alone: no package of this environment can be imported."""
    passes(tmp_path, sys.executable, "-S", "-E", str(PORTS / "templates" / "port.py"))


@pytest.mark.parametrize("build", [C99, RUST], ids=["c99", "rust"])
def test_compiled(tmp_path, build):
    if shutil.which(build[0]) is None:
        pytest.skip(f"{build[0]} is not installed")
    run(*build, "-o", str(tmp_path / "port"))
    passes(tmp_path, str(tmp_path / "port"))


def test_the_export_has_all_that_a_template_needs(tmp_path):
    """Each is built as its first lines say, and reads the kit beside it."""
    export(tmp_path / "kit", page=True)
    folder = tmp_path / "kit" / "ports" / "templates"
    assert {file.name for file in folder.iterdir()} == {"levels.c", "port.py", "port.rs"}
    ports = [(sys.executable, "-S", "-E", str(folder / "port.py"))]
    for name in ("levels.c", "port.rs"):
        comment = "".join((folder / name).read_text().splitlines(keepends=True)[:6])
        command = re.search(r"((?:cc|rustc) (?:.*\\\n)*.*)", comment)[1]
        words = re.sub(r"\\\n \*", "", command).split()
        if shutil.which(words[0]):
            words += ["-o", "port"] if words[0] == "rustc" else []
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            (folder / "port").rename(tmp_path / words[0])
            ports.append((str(tmp_path / words[0]),))
    for port in ports:
        passes(tmp_path, *port)
