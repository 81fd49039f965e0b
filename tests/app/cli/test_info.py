"""`scalabl info`."""

from __future__ import annotations

import torch

from ..commands import ok, run


def test_versions_and_the_native_core(capsys):
    info = ok("info", capsys)
    assert info["torch"] == torch.__version__ and isinstance(info["native"]["built"], bool)
    code, out, _ = run("info", capsys)
    assert code == 0 and f"torch        {torch.__version__}\n" in out
