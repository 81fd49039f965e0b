"""What a check of `scalabl verify` must do: notice a fault of the package."""

from __future__ import annotations

import torch

from scalabl_ref.core.adapter import SubspaceAdapter
from scalabl_ref.verify.all_checks import run

from ..patching import rewrite

CPU = torch.device("cpu")


def is_noticed(monkeypatch, checks, target, old, new, name):
    """A fault in a function's text, see `rewrite`, by the check of that name."""
    rewrite(monkeypatch, target, old, new)
    result = run(checks[name], SubspaceAdapter.op, CPU)
    refused = result.note.startswith("InputError")  # of what is right; no other exception counts
    assert not result.passed and (result.cases or refused), result
