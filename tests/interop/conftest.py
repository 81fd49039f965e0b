"""Fixtures of the tests of adapters out and in."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..models import tiny_folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "base")
