"""The native core: built, fresh, switched off, stale or absent, and free of any framework."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys

import pytest
import torch

from scalabl_ref import Noise, native_status
from scalabl_ref.fast import native

from ..conftest import ROOT

SOURCES = sorted((ROOT / "csrc").rglob("*.*"))


@pytest.fixture
def undecided():
    """The settled answer is forgotten before and after the test."""

    def forget():
        native.native_status.cache_clear()
        native.SETTLED.clear()

    forget()
    yield
    forget()


def need_build():
    if not native_status()["built"]:
        pytest.skip(f"native core: {native_status()['reason']}")


def test_core_is_built_from_these_sources():
    need_build()
    status = native_status()
    assert not status["stale"], status["reason"]
    assert status["digest"] == native.source_digest(ROOT)
    assert status["compiler"]


def test_stale_core_is_reported_and_not_used(tmp_path, monkeypatch, undecided):
    need_build()
    expected = Noise(1, 2).normal(3, 4, 5)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert native.source_digest(tmp_path) == native_status()["digest"]
    with (tmp_path / "csrc" / "normal.h").open("a") as header:
        header.write("// one line more\n")
    monkeypatch.setattr(native, "ROOT", tmp_path)
    native.native_status.cache_clear()
    native.SETTLED.clear()
    status = native_status()
    assert status["built"] and status["stale"] and not status["used"]
    assert "pip install" in status["reason"]
    assert native.core() is None
    assert torch.equal(Noise(1, 2).normal(3, 4, 5), expected)


@pytest.mark.parametrize(
    "change", ["CMakeLists.txt", "csrc/api.cpp", "csrc/fast/cpu.cpp", "new file", "renamed"]
)
def test_digest_sees_every_change(tmp_path, change):
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = native.source_digest(tmp_path)
    if change == "new file":
        (tmp_path / "csrc" / "fast" / "new.cu").write_text("")
    elif change == "renamed":
        (tmp_path / "csrc" / "fast" / "cpu.cpp").rename(tmp_path / "csrc" / "fast" / "host.cpp")
    else:
        (tmp_path / change).write_text((tmp_path / change).read_text() + "\n")
    assert native.source_digest(tmp_path) != before
    assert native.source_digest(tmp_path / "csrc") is None  # a wheel has no sources beside it


def test_core_can_be_switched_off(monkeypatch, undecided):
    need_build()
    expected = Noise(1, 2).normal(3, 4, 5)
    native.native_status.cache_clear()
    native.SETTLED.clear()
    monkeypatch.setenv("SCALABL_NATIVE", "0")
    assert native.core() is None
    assert "SCALABL_NATIVE" in native_status()["reason"]
    assert torch.equal(Noise(1, 2).normal(3, 4, 5), expected)


def test_absent_core_is_reported(monkeypatch, undecided):
    monkeypatch.setitem(sys.modules, "scalabl_ref._native", None)
    status = native_status()
    assert not status["built"] and not status["stale"] and not status["used"]
    assert "pip install" in status["reason"]
    assert native.core() is None
    assert Noise(1, 2).normal(3, 4, 5).shape == (4, 5)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_framework_header(source):
    """Only bindings.cpp may know Python, and nothing may know PyTorch."""
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)', source.read_text())
    assert not [name for name in included if re.match(r"torch/|ATen/|c10/", name)]
    if source.name != "bindings.cpp":
        assert not [name for name in included if re.match(r"pybind11/|Python\.h", name)]


def test_files_of_other_projects_are_unchanged():
    """Their README names the release and the digest of each."""
    folder = ROOT / "csrc" / "third_party"
    digests = dict(re.findall(r"\| (\S+) \|.*`([0-9a-f]{64})`", (folder / "README.md").read_text()))
    assert sorted(digests) == sorted(file.name for file in folder.glob("*.h"))
    for name, digest in digests.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
