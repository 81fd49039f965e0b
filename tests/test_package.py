"""What a user meets at the door: a quick, quiet import that needs PyTorch and nothing else."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import requires, version

import pytest

import scalabl_ref

from .conftest import ROOT
from .models import tiny_folder

PACKAGE = sorted((ROOT / "scalabl_ref").rglob("*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if "peer" not in path.parts)


def python(code: str) -> str:
    """All that a fresh interpreter prints, with every warning an error; it must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_import_prints_nothing():
    assert python("import scalabl_ref") == ""


def test_import_and_noise_load_nothing_but_torch():
    """Not NumPy, and none of the packages that only some commands need."""
    loaded = python(
        """if True:
        import sys, warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
        before = {name.split(".")[0] for name in sys.modules}
        import scalabl_ref
        scalabl_ref.Noise(1, 2).normal(3, 4, 5)
        after = {name.split(".")[0] for name in sys.modules}
        print(*sorted(after - before - set(sys.stdlib_module_names)))
        """
    )
    assert loaded.split() == ["scalabl_ref"]


def test_a_model_answers_without_the_compiler(tmp_path):
    """Importing torch._dynamo takes a second, as long as all the rest."""
    tiny_folder(tmp_path)
    loaded = python(
        f"""if True:
        import sys
        from scalabl_ref import AdapterConfig, Llama, Noise, add_adapters
        import torch
        tokens = torch.ones(2, 3, dtype=torch.int64)
        for kind in (None, "nf4"):
            model = Llama.from_pretrained({str(tmp_path)!r}, quantize=kind).trim_head([5, 7])
            with torch.no_grad():
                add_adapters(model, AdapterConfig(rank=2))(tokens, noise=Noise(0, 0))
        print(*[name for name in ("torch._dynamo", "sympy") if name in sys.modules])
        """
    )
    assert loaded.split() == []


@pytest.mark.parametrize("path", PACKAGE + TESTS, ids=lambda path: path.name)
def test_no_numpy(path):
    """No import of NumPy and no call of Tensor.numpy(), in the package and in its tests."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] == "numpy" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "numpy"
        elif isinstance(node, ast.Attribute):
            assert node.attr != "numpy"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.name)
def test_only_users_import_hf(path):
    """In the package verify alone does, and it needs transformers in one function alone."""
    found = [
        (node, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if alias.name in ("hf", "transformers", "scalabl_ref.hf")
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == "hf")
    ]
    if path.name == "hf.py" and path.parent.name == "scalabl_ref":  # the public name
        assert [name for _, name in found] == ["*"]
    elif path.name == "hf.py":
        assert [(name, node.col_offset > 0) for node, name in found] == [("transformers", True)]
    elif path.parent.name == "verify":
        assert {name for _, name in found} <= {"hf"}
    else:
        assert not found


def test_metadata():
    assert version("scalabl_ref") == scalabl_ref.__version__
    assert "torch>=2.5" in requires("scalabl_ref")


USER = """
import scalabl_ref as sr
from scalabl_ref.data import Batch
from torch import Tensor
from typing_extensions import assert_type

model = sr.Llama.from_pretrained("folder")
assert_type(model, sr.Llama)
trained, facts = sr.load_run("run")
assert_type(trained, sr.Llama)


def answer(batch: Batch) -> None:
    prediction = sr.predict(trained, batch, samples=10)
    assert_type(prediction, sr.Prediction)
    assert_type(prediction.mutual_information, Tensor)


assert_type(sr.Noise(seed=0, draw=1).normal(2, 3, 4), Tensor)
assert_type(sr.metrics.ece(Tensor(), Tensor(), bins=10), float)
sr.Noise("zero", 1)  # the one mistake
"""


@pytest.mark.slow
def test_a_users_type_checker_sees_the_types(tmp_path):
    """Of the package as it is installed, in a folder that is none of the repository's.

    A name that the checker cannot find is Any there, which no `assert_type` lets pass.
    """
    pytest.importorskip("mypy", reason="mypy is in the extra dev")
    (tmp_path / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", ROOT / ".mypy_cache", "user.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    wrong = USER.splitlines().index('sr.Noise("zero", 1)  # the one mistake') + 1
    assert done.stdout.startswith(f'user.py:{wrong}: error: Argument 1 to "Noise"'), done.stdout
    assert done.stdout.endswith("Found 1 error in 1 file (checked 1 source file)\n")


def test_every_public_name_exists():
    assert [name for name in scalabl_ref.__all__ if not hasattr(scalabl_ref, name)] == []


def test_no_function_hides_a_module():
    """`from scalabl_ref.methods import tfb` gives the module of that name, as every other does."""
    for path in PACKAGE:
        if path.name in ("__init__.py", "__main__.py"):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module, (parent, _, last) = importlib.import_module(name), name.rpartition(".")
        assert getattr(sys.modules[parent], last) is module, name
