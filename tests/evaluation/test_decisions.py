"""Thresholds, confusions and worst errors, held to sums by hand and to a slow search."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_ref import InputError
from scalabl_ref.evaluation.decisions import (
    Answered,
    answered_at,
    class_scores,
    confusion,
    worst_errors,
    wrong_and_sure,
)

# Answers 0 0 1 1 0, of confidence .95 .9 .8 .8 .6.
PROBS = torch.tensor(
    [[0.95, 0.05], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64
)
LABELS = torch.tensor([0, 1, 1, 0, 0])  # right, wrong, right, wrong, right


def test_thresholds_by_hand():
    """Of the first 1, 2, 4 (a tie) and 5 rows, 1, 1, 2 and 3 are right."""
    assert answered_at(PROBS, LABELS, 0.95) == Answered(0.95, 1, 1)
    assert answered_at(PROBS, LABELS, 0.6) == Answered(0.6, 5, 3)
    assert answered_at(PROBS, LABELS, 0.5) == Answered(0.6, 5, 3)
    assert answered_at(PROBS, 1 - LABELS, 0.95) is None
    for share, count in ((0.56, 14), (0.6, 15)):  # .56 times 25 rounds to above 14
        tied, right = PROBS[[0]].expand(25, 2), (torch.arange(25) >= count).long()
        assert answered_at(tied, right, share) == Answered(0.95, 25, count)
    assert wrong_and_sure(PROBS, LABELS) == 1 and wrong_and_sure(PROBS, LABELS, 0.8) == 2
    assert worst_errors(PROBS, LABELS) == [1, 3] and worst_errors(PROBS, LABELS, 1) == [1]
    many = PROBS[[0]].expand(12, 2), torch.ones(12).long()
    assert worst_errors(*many) == list(range(10)) and worst_errors(*many, 12)[11] == 11
    assert wrong_and_sure(PROBS, 1 - LABELS, 0.95) == 1  # as sure as asked for
    with pytest.raises(InputError, match="must sum to one"):
        answered_at(2 * PROBS, LABELS, 0.9)


def test_confusion_and_scores_by_hand():
    table = confusion(PROBS, LABELS)
    assert table.tolist() == [[2, 1], [1, 1]]
    scores = class_scores(table)
    assert scores.rows.tolist() == [3, 2]
    for found, expected in ((scores.precision, [2 / 3, 1 / 2]), (scores.recall, [2 / 3, 1 / 2]),
                            (scores.f1, [4 / 6, 2 / 4])):  # fmt: skip
        assert found.tolist() == pytest.approx(expected, rel=1e-15)
    never = class_scores(torch.tensor([[0, 2, 0], [0, 3, 0], [0, 0, 0]]))
    assert math.isnan(never.precision[0]) and never.recall[0] == 0 and never.f1[0] == 0
    assert math.isnan(never.recall[2]) and math.isnan(never.f1[2])


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(5, 10), st.booleans()), min_size=1, max_size=30),
    st.floats(0.01, 1),
)
def test_no_lower_threshold_keeps_the_accuracy(rows, accuracy):
    """Against a search over every confidence that occurs."""
    probs = torch.tensor([[n / 10, 1 - n / 10] for n, _ in rows], dtype=torch.float64)
    labels = torch.tensor([0 if right else 1 for _, right in rows])
    best = None
    for level in {n / 10 for n, _ in rows}:
        kept = [right for n, right in rows if n / 10 >= level]
        good = sum(kept) >= accuracy * len(kept) - 1e-9
        if good and (best is None or len(kept) > best.rows):
            best = Answered(level, len(kept), sum(kept))
    assert answered_at(probs, labels, accuracy) == best
