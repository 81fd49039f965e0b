"""What a check of `scalabl verify` must do: pass on the package, and notice a fault in it."""

from __future__ import annotations

import torch

from scalabl_ref import fast
from scalabl_ref.core.adapter import SubspaceAdapter
from scalabl_ref.verify.all_checks import run

from ..patching import rewrite

CPU = torch.device("cpu")


def passes_on_the_plain_bodies(check):
    """test_checks.py runs the checks on the fast bodies."""
    with fast.plain():
        result = run(check, SubspaceAdapter.op, CPU)
    assert result.passed and result.cases, result


def is_noticed(monkeypatch, checks, target, old, new, name):
    """A fault in a function's text, see `rewrite`, by the check of that name."""
    rewrite(monkeypatch, target, old, new)
    result = run(checks[name], SubspaceAdapter.op, CPU)
    refused = result.note.startswith("InputError")  # of what is right; no other exception counts
    assert not result.passed and (result.cases or refused), result
