"""A study of many methods."""

from __future__ import annotations

import pytest

from scalabl_ref.app.study import Study, run_study

from .studies import config

METHODS = [  # each way to train, and each way to answer
    "mle", "mle untuned", "mle stopped early", "map", "point", "dropout", "ensemble",
    "ensemble of dropout", "laplace", "laplace exact", "laplace tuned", "laplace last layer",
    "blob", "tfb", "swag", "scalabl", "scalabl official", "scalabl as published", "scalabl full",
    "scalabl layer prior",
    "subspace", "subspace tuned", "subspace sampled", "subspace of dropout", "ensemble of subspace",
]  # fmt: skip


@pytest.fixture(scope="package")
def done(tmp_path_factory):
    """A study of many methods, and its results."""
    folder = tmp_path_factory.mktemp("study")
    path = config(folder, methods=METHODS, ranges={"lr": [0.01, 0.01]})
    return Study.read(path), folder / "out", run_study(Study.read(path), folder / "out")
