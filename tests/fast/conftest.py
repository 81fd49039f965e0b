"""Fixtures of the tests of the native core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scalabl_ref.fast import native


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with the kernels of each instruction set that the machine has."""
    core = native.core()
    best = core.isa()
    try:
        core.use_isa(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    core.use_isa(best)
