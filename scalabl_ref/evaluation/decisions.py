"""What a model's answers are good for: thresholds, confusions, and errors that it is sure of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import metrics

SURE = 0.9  # the confidence from which a wrong answer counts as wrong and sure


class Answered(NamedTuple):
    """The rows that are answered from a confidence on: their number, and how many are right."""

    confidence: float
    rows: int
    right: int

    @property
    def accuracy(self) -> float:
        return self.right / self.rows


class ClassScores(NamedTuple):
    """Per class, (C,): rows with that label, and precision, recall and F1.

    Precision is NaN of a class that is never the answer, recall of one without rows, and F1 of one
    with neither.
    """

    rows: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor


def most_probable(probs: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of each row and its class, the first of several: both (N,)."""
    # A stable sort, because argmax leaves open which of several equal classes it names.
    ordered, classes = probs.sort(dim=1, descending=True, stable=True)
    return ordered[:, 0], classes[:, 0]


def answered_at(probs: Tensor, labels: Tensor, accuracy: float) -> Answered | None:
    """As many rows as can be answered so that `accuracy` of them are right. None if there are none.

    The most confident rows are answered, those of equal confidence together. This describes these
    rows: it was chosen on them, so it promises nothing of others. Raises InputError for
    probabilities or labels that `metrics` refuses.

    >>> import torch
    >>> from scalabl_ref.evaluation.decisions import answered_at
    >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    >>> answered_at(probs.double(), torch.tensor([0, 1, 1, 1]), 0.95)
    Answered(confidence=0.7, rows=3, right=3)
    """
    metrics.accuracy(probs, labels)  # checks both
    confidence, chosen = most_probable(probs)
    levels, level, rows = torch.unique(confidence, return_inverse=True, return_counts=True)
    right = level[chosen == labels].bincount(minlength=len(levels))
    rows, right = (counts.flip(0).cumsum(0).flip(0) for counts in (rows, right))  # at least so sure
    enough = (right >= accuracy * rows.double() - 1e-9).nonzero()[:, 0]
    if not len(enough):
        return None
    first = int(enough[0])
    return Answered(levels[first].item(), int(rows[first]), int(right[first]))


def wrong_and_sure(probs: Tensor, labels: Tensor, sure: float = SURE) -> int:
    """The number of rows that are answered wrongly with a confidence of at least `sure`."""
    confidence, chosen = most_probable(probs)
    return int(((chosen != labels) & (confidence >= sure)).sum())


def confusion(probs: Tensor, labels: Tensor) -> Tensor:
    """(C, C) int64: how many rows of a label (first index) get which answer (second index)."""
    count = probs.shape[1]
    return (
        (labels * count + most_probable(probs)[1]).bincount(minlength=count**2).view(count, count)
    )


def class_scores(table: Tensor) -> ClassScores:
    """Scores per class of a confusion table."""
    right, rows, given = table.diagonal().double(), table.sum(1), table.sum(0)
    return ClassScores(rows, right / given, right / rows, 2 * right / (rows + given))


def worst_errors(probs: Tensor, labels: Tensor, most: int = 10) -> list[int]:
    """The rows with wrong answers, the most confident first, of equal ones in their order."""
    confidence, chosen = most_probable(probs)
    order = confidence.sort(descending=True, stable=True).indices
    return order[(chosen != labels)[order]][:most].tolist()
