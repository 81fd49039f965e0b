"""`scalabl predict`: choices, and the run's labels."""

from __future__ import annotations

from ..commands import TRAIN, ok, refused


def test_more_choices_and_fewer_than_the_head_has(work, capsys):
    """A run of three: a fourth has no probability, and of two the rest is given."""
    ok(TRAIN, capsys)
    predict = "predict --run run --prompt hello --samples 3 --choices"
    assert "can answer 3 choices, not 4" in refused(f"{predict} a b c d", capsys)
    two, three = (ok(f"{predict} {choices}", capsys) for choices in ("A B", "A B C"))
    assert "others" not in three and two["probs"] == three["probs"][:2]
    assert two["others"] == three["probs"][2] > 0
