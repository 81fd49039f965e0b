"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: a thread for each of the processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import scalabl_ref  # noqa: F401  before torch, whose warning about a missing NumPy it keeps away

# isort: split
import pytest
import torch
from hypothesis import Phase, settings

from scalabl_ref import fast

from . import models, pretend

ROOT = Path(__file__).resolve().parent.parent

# Other examples in every run, but where the run decides something.
settings.register_profile("suite", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.register_profile(  # of tools/faults.py: quick, and the same every time
    "faults", settings.get_profile("suite"), max_examples=20, derandomize=True, database=None,
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="device of the tests that can use one; pretend: see pretend.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    models.DEVICE = config.getoption("--device")
    if models.DEVICE == "pretend":
        pretend.enter()


@pytest.fixture(params=["fast", "plain"])
def bodies(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test twice: with the fast bodies in place, and with the plain ones."""
    with fast.plain() if request.param == "plain" else nullcontext():
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads PyTorch has, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real data and weights, which are not part of the repository."""
    folder = Path(os.environ.get("SCALABL_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no test assets at {folder}; SCALABL_ASSETS names another folder")
    return folder
