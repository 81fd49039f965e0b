"""A study of every method."""

from __future__ import annotations

import pytest

from scalabl_ref.app.study import METHODS, Study, run_study

from .studies import config


@pytest.fixture(scope="package")
def done(tmp_path_factory):
    """A study of every method, and its results."""
    folder = tmp_path_factory.mktemp("study")
    path = config(folder, methods=list(METHODS), ranges={"lr": [0.01, 0.01]})
    return Study.read(path), folder / "out", run_study(Study.read(path), folder / "out")
