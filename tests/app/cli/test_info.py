"""`scalabl info`."""

from __future__ import annotations

import platform

import pytest
import torch

from scalabl_ref import __version__
from scalabl_ref.app.cli import info
from scalabl_ref.fast.native import native_status

from ..commands import ok, run


def test_versions_and_the_native_core(capsys):
    found, status = ok("info", capsys), native_status()
    expected = {"scalabl_ref": __version__, "python": platform.python_version(),
                "torch": torch.__version__, "threads": torch.get_num_threads(),
                "cuda": torch.cuda.is_available(), "path": found["path"]}  # fmt: skip
    assert found == {**expected, "native": status} and isinstance(status["built"], bool)
    code, out, _ = run("info", capsys)
    lines = out.splitlines()
    assert code == 0 and lines[:6] == [f"{key:12} {value}" for key, value in expected.items()]
    told = [f"native {name:9} {value}" for name, value in status.items() if value != ""]
    assert lines[6:] == told


@pytest.mark.parametrize(("used", "path"), [(True, "native core, avx2"), (False, "PyTorch")])
def test_the_path_is_the_native_core_if_it_is_used(capsys, monkeypatch, used, path):
    status = {"built": True, "used": used, "isa": "avx2"}
    monkeypatch.setattr(info, "native_status", lambda: status)
    assert ok("info", capsys)["path"] == path
