"""`scalabl count`."""

from __future__ import annotations

from ..commands import ok, run


def test_counts(capsys):
    count = ok("count --config llama-2-7b", capsys)
    assert count["scalabl"] - count["lora"] == 1040
    code, out, _ = run("count --config smollm2-135m --rank 4 --targets q_proj", capsys)
    assert code == 0 and "134,515,008" in out
