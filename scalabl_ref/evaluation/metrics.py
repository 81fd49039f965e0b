"""Accuracy, calibration and other scores of probabilities, with their intervals.

The functions take probs (N, C), whose rows sum to one, and labels (N,), integers in [0, C), and
compute in float64. Bad input raises InputError naming the row. The predicted class is the most
probable class, the first one of a tie; its probability is the confidence.

Sources: ECE, reliability and temperature scaling, Guo et al. 2017 (arXiv:1706.04599); Brier 1950,
summed over classes; risk and coverage, Geifman and El-Yaniv 2017 (arXiv:1705.08500); percentile
bootstrap, Efron 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.errors import InputError

# The bounds of `fit_temperature`. If all answers of a split are right, the best temperature is 0;
# if they are worse than chance, it is infinite. Neither is useful on other data.
TEMPERATURE_RANGE = (0.05, 20.0)

MOST_BINS = 10_000  # because each replicate of the bootstrap has a table of all bins

SCORES = ("acc", "ece", "nll", "brier")
UNCERTAINTIES = ("entropy", "mutual_information")  # of a predictive distribution, in nats


class Reliability(NamedTuple):
    """Per confidence bin, (bins,): rows in it (int64), and their mean confidence and accuracy.

    The two means are NaN where the bin is empty.
    """

    rows: Tensor
    confidence: Tensor
    accuracy: Tensor


class RiskCoverage(NamedTuple):
    """coverage (N,) = k / N and risk (N,): the error rate on the k most confident rows.

    area is the mean risk over k = 1 .. N (AURC). Smaller is better; it is smallest when all right
    answers are more confident than all wrong ones.
    """

    coverage: Tensor
    risk: Tensor
    area: float


def scores(probs: Tensor, labels: Tensor, bins: int = 15) -> dict[str, float]:
    """The four SCORES by name."""
    values = accuracy(probs, labels), ece(probs, labels, bins), nll(probs, labels)
    return dict(zip(SCORES, (*values, brier(probs, labels)), strict=True))


def per_question(probs: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Tensor]:
    """The four SCORES as means over rows: by name, (N,) whose mean is the score.

    ECE is no mean of independent terms. Its terms here are (confidence - correctness) times the
    sign that their sum has in the row's bin, so that they vary as ECE does, to first order.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> metrics.per_question(probs, labels)["acc"].tolist()
    [1.0, 0.0, 1.0, 1.0]
    """
    probs, labels = _checked(probs, labels)
    index, gap = _gaps(probs, labels, checked_bins(bins))
    _, correct = _confidence(probs, labels)
    sign = _bin_sums(index, gap, bins).sign()
    columns = correct, sign[index] * gap, _nll_rows(probs, labels), _brier_rows(probs, labels)
    return dict(zip(SCORES, columns, strict=True))


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of rows whose predicted class is the label, in [0, 1].

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> metrics.accuracy(probs, labels)
    0.75
    """
    _, correct = _confidence(*_checked(probs, labels))
    return float(correct.mean())


def nll(probs: Tensor, labels: Tensor) -> float:
    """Mean of -log(probability of the label), in nats. A probability of zero makes it infinite.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> round(metrics.nll(probs, labels), 4)
    0.4004
    """
    return float(_nll_rows(*_checked(probs, labels)).mean())


def brier(probs: Tensor, labels: Tensor) -> float:
    """Mean squared distance of probabilities to the one-hot label, summed over classes (0..2).

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> round(metrics.brier(probs, labels), 4)
    0.25
    """
    return float(_brier_rows(*_checked(probs, labels)).mean())


def ece(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of (rows in it / N) |accuracy - confidence|.

    Top-1 confidence, l1, equal widths. A row is in bin min(floor(confidence * bins), bins - 1), so
    bins are [lower, upper), and the last one includes its upper end. ECE depends on the number of
    bins, and published tables use 15 or 10: report it.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> round(metrics.ece(probs, labels, bins=5), 4)
    0.15
    """
    index, gap = _gaps(*_checked(probs, labels), checked_bins(bins))
    return _ece(index, gap, bins)


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Rows, mean confidence and accuracy of each bin of `ece`.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> metrics.reliability(probs, labels, bins=4).rows
    tensor([0, 0, 2, 2])
    """
    confidence, correct = _confidence(*_checked(probs, labels))
    index = _bin_index(confidence, checked_bins(bins))
    count = index.bincount(minlength=bins)
    confidence, correct = (
        index.bincount(weights=column, minlength=bins) / count  # 0 / 0 is NaN: nothing there
        for column in (confidence, correct)
    )
    return Reliability(count, confidence, correct)


def entropy(probs: Tensor) -> Tensor:
    """-sum p log p of each row, (N,) float64 in nats, with 0 log 0 = 0.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> metrics.entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist()
    [0.0, 0.6931471805599453]
    """
    probs = _checked_probs(probs)
    return 0.0 - torch.special.xlogy(probs, probs).sum(1).clamp(max=0)  # neither rounded below 0


def risk_coverage(probs: Tensor, labels: Tensor) -> RiskCoverage:
    """Error rate when only the most confident rows are answered, for every number of them.

    Rows of equal confidence have no order, so each counts as the mean error of its tie. That is the
    expectation over all orders, and it does not depend on the order of the rows.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> metrics.risk_coverage(probs, labels).risk.tolist()
    [0.0, 0.0, 0.0, 0.25]
    """
    confidence, correct = _confidence(*_checked(probs, labels))
    confidence, order = confidence.sort(descending=True)
    _, tie, size = confidence.unique_consecutive(return_inverse=True, return_counts=True)
    error = (tie.bincount(weights=1 - correct[order]) / size)[tie]
    answered = torch.arange(1, len(error) + 1, dtype=error.dtype, device=error.device)
    risk = error.cumsum(0) / answered
    return RiskCoverage(answered / len(error), risk, float(risk.mean()))


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting one half, in [0, 1].

    scores: (N,), larger for rows that seem positive. labels: (N,), 1 for positive (here: out of
    distribution) and 0 for negative. Raises InputError unless both labels occur.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> metrics.auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
    0.75
    """
    if scores.dim() != 1 or scores.shape != labels.shape:
        raise InputError(
            f"scores and labels must be two equally long vectors, and have the shapes "
            f"{tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if scores.isnan().any():
        raise InputError(f"row {_first(scores.isnan())}: the score is NaN")
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise InputError(f"row {_first(~positive & (labels != 0))}: the label must be 0 or 1")
    if positive.all() or not positive.any():
        raise InputError("an AUROC needs rows of both kinds: label 0 and label 1")
    # Counted per distinct score, in integers (twice the pairs won): exact with any ties.
    _, value = scores.unique(return_inverse=True)
    ahead = value[positive].bincount(minlength=int(value.max()) + 1)
    behind = value[~positive].bincount(minlength=len(ahead))
    twice_won = (ahead * (2 * (behind.cumsum(0) - behind) + behind)).sum()
    return int(twice_won) / (2 * int(ahead.sum()) * int(behind.sum()))


def separation(inside: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> dict[str, float]:
    """The AUROC of telling two data sets apart by each of the UNCERTAINTIES, as "auroc_...".

    inside, outside: the uncertainties (N,) and (M,) by name; outside counts as positive.
    """
    return {
        f"auroc_{name}": auroc(
            torch.cat((inside[name], outside[name])),
            torch.cat((torch.zeros(len(inside[name])), torch.ones(len(outside[name])))).long(),
        )
        for name in UNCERTAINTIES
    }


def answerable(probs: Tensor, labels: Tensor) -> Tensor:
    """Which rows have a label among the classes, (N,) bool: of another data set, not all may."""
    return labels < probs.shape[1]


def bootstrap_interval(
    fn: Callable[[Tensor, Tensor], float],
    probs: Tensor,
    labels: Tensor,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of fn(probs, labels) over resampled rows; a pure function of `seed`.

    It covers the choice of test examples, but not the choice of training data or noise. ECE is
    biased upwards in small samples, and more in resamples, so its interval may lie above its value.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> low, high = metrics.bootstrap_interval(metrics.accuracy, probs, labels)
    >>> low <= metrics.accuracy(probs, labels) <= high
    True
    """
    probs, labels = _checked(probs, labels)
    values = [
        fn(probs[rows], labels[rows]) for rows in _resamples(len(labels), replicates, level, seed)
    ]
    return _percentiles(torch.tensor(values, dtype=torch.float64), level)


def bootstrap_intervals(
    probs: Tensor,
    labels: Tensor,
    bins: int = 15,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """`bootstrap_interval` of "acc", "ece", "nll" and "brier" at once, with the same values.

    It is faster: rows are scored once, and only their scores are resampled.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    >>> labels = torch.tensor([0, 1, 1, 1])
    >>> list(metrics.bootstrap_intervals(probs, labels))
    ['acc', 'ece', 'nll', 'brier']
    """
    columns = _replicates(probs, labels, bins, replicates, level, seed)
    return {name: _percentiles(c, level) for name, c in zip(SCORES, columns, strict=True)}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in TEMPERATURE_RANGE that minimises the NLL of softmax(logits / T).

    logits: (N, C), up to a constant per row, so log-probabilities will do; for a sampled
    predictive, take the log of the averaged probabilities. The rows must be neither training nor
    test rows. The NLL is convex in 1 / T, so bisection on the sign of its slope finds the minimum
    to the last bit.

    Raises InputError if a label has probability zero, because the NLL is infinite at every T.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> logits, labels = torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    >>> round(metrics.fit_temperature(logits, labels), 4)  # 3 of 4 are right: 4 / ln 3
    3.641
    """
    logits, labels = _checked_logits(logits, labels)
    logits = logits - logits.amax(1, keepdim=True)
    # Classes of probability zero keep it at every T; 0 times -inf would be NaN.
    finite = logits.masked_fill(logits.isneginf(), 0)
    target = finite.gather(1, labels[:, None])

    def slope(inverse: float) -> float:
        """d NLL / d(1 / T) = mean of E[logit] - logit of the label, under softmax(logits / T)."""
        weight = torch.softmax(inverse * logits, dim=1)
        return float(((weight * finite).sum(1, keepdim=True) - target).mean())

    low, middle, high = 1 / TEMPERATURE_RANGE[1], 1.0, 1 / TEMPERATURE_RANGE[0]
    while low < middle < high:
        steepness = slope(middle)
        if steepness == 0:
            break
        low, high = (middle, high) if steepness < 0 else (low, middle)
        middle = (low + high) / 2
    return min(max(1 / middle, TEMPERATURE_RANGE[0]), TEMPERATURE_RANGE[1])


def apply_temperature(probs: Tensor, temperature: float) -> Tensor:
    """softmax(log(probs) / temperature), (N, C) float64: the probabilities after scaling.

    >>> import torch
    >>> from scalabl_ref import metrics
    >>> metrics.apply_temperature(torch.tensor([[0.2, 0.8]]), temperature=0.5)
    tensor([[0.0588, 0.9412]], dtype=torch.float64)
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"a temperature must be positive and finite, and is {temperature}")
    return torch.softmax(_checked_probs(probs).log() / temperature, dim=1)


def _confidence(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability of each row, and 1.0 where its class is the label: both (N,)."""
    # A stable sort, because argmax leaves open which of several equal classes it names.
    ordered, classes = probs.sort(dim=1, descending=True, stable=True)
    return ordered[:, 0], (classes[:, 0] == labels).double()


def _nll_rows(probs: Tensor, labels: Tensor) -> Tensor:
    return -probs.gather(1, labels[:, None])[:, 0].log()


def _brier_rows(probs: Tensor, labels: Tensor) -> Tensor:
    return (probs - torch.nn.functional.one_hot(labels, probs.shape[1])).square().sum(1)


def _bin_index(confidence: Tensor, bins: int) -> Tensor:
    return (confidence * bins).floor().long().clamp(max=bins - 1)


def _gaps(probs: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Bin of each row, and its confidence less its correctness."""
    confidence, correct = _confidence(probs, labels)
    return _bin_index(confidence, bins), confidence - correct


def _bin_sums(index: Tensor, gap: Tensor, bins: int) -> Tensor:
    return index.bincount(weights=gap, minlength=bins)


def _ece(index: Tensor, gap: Tensor, bins: int) -> float:
    # (n_b / N) |mean gap| = |sum of gaps| / N, so an empty bin adds 0.
    return float(_bin_sums(index, gap, bins).abs().sum()) / len(gap)


def _resamples(n: int, replicates: int, level: float, seed: int) -> Iterator[Tensor]:
    """`replicates` times n row numbers drawn with replacement."""
    if replicates < 1 or not 0 < level < 1:
        raise InputError(
            f"a bootstrap needs at least one replicate and a level between 0 and 1, and was given "
            f"{replicates} and {level}"
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(replicates):
        yield torch.randint(n, (n,), generator=generator)


def _replicates(
    probs: Tensor, labels: Tensor, bins: int, replicates: int, level: float, seed: int
) -> Tensor:
    """SCORES of resampled rows, (4, replicates)."""
    probs, labels = _checked(probs, labels)
    index, gap = _gaps(probs, labels, checked_bins(bins))
    _, correct = _confidence(probs, labels)
    scores = torch.stack((correct, _nll_rows(probs, labels), _brier_rows(probs, labels)))  # (3, N)
    values = []
    for rows in _resamples(len(labels), replicates, level, seed):
        acc, surprise, distance = scores[:, rows].mean(1).tolist()
        values.append((acc, _ece(index[rows], gap[rows], bins), surprise, distance))
    return torch.tensor(values, dtype=torch.float64).T


def _percentiles(values: Tensor, level: float) -> tuple[float, float]:
    """Central interval holding `level` of the values (R,).

    Order statistics, rounded outwards. Nothing is interpolated, so values may be infinite.
    """
    values = values.sort().values
    tail = (1 - level) / 2 * (len(values) - 1)
    return float(values[math.floor(tail)]), float(values[math.ceil(len(values) - 1 - tail)])


def _checked(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    probs = _checked_probs(probs)
    return probs, _checked_labels(labels, probs)


def _checked_probs(probs: Tensor) -> Tensor:
    """probs in float64. Raises InputError unless every row is a distribution over the classes."""
    _check_matrix("probs", probs)
    # The C terms and the sum that normalised them were rounded, in their dtype or in float32.
    dtypes = [torch.float32] + ([probs.dtype] if probs.dtype.is_floating_point else [])
    slack = (probs.shape[1] + 8) * max(torch.finfo(dtype).eps for dtype in dtypes)
    probs = probs.double()
    if (probs < 0).any():
        raise InputError(f"probs, row {_first((probs < 0).any(1))}: a probability is negative")
    off = (probs.sum(1) - 1).abs() > slack
    if off.any():
        row = _first(off)
        raise InputError(
            f"probs, row {row}: must sum to one, and sums to {float(probs[row].sum()):.6g}"
        )
    return probs


def _checked_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_matrix("logits", logits)
    logits = logits.double()
    labels = _checked_labels(labels, logits)
    infinite = logits.isposinf().any(1)
    if infinite.any():
        raise InputError(f"logits, row {_first(infinite)}: +infinity is no logit")
    impossible = logits.gather(1, labels[:, None])[:, 0].isneginf()
    if impossible.any():
        raise InputError(
            f"logits, row {_first(impossible)}: the label has probability zero, so that no "
            f"temperature gives a finite NLL"
        )
    return logits, labels


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2 or not matrix.numel():
        raise InputError(f"{name} must be (rows, classes), and has the shape {tuple(matrix.shape)}")
    if matrix.isnan().any():
        raise InputError(f"{name}, row {_first(matrix.isnan().any(1))}: holds a NaN")


def _checked_labels(labels: Tensor, scores: Tensor) -> Tensor:
    rows, classes = scores.shape
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise InputError(f"labels must be integers, and are {labels.dtype}")
    if labels.shape != (rows,):
        raise InputError(
            f"labels must have the shape ({rows},), one for each row of probabilities, and have "
            f"{tuple(labels.shape)}"
        )
    labels = labels.long().to(scores.device)
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = _first(outside)
        raise InputError(
            f"labels, row {row}: must be in 0..{classes - 1}, and is {int(labels[row])}"
        )
    return labels


def checked_bins(bins: int) -> int:
    """`bins`. Raises InputError for a number below 1 or above MOST_BINS."""
    if bins < 1:
        raise InputError(f"bins must be at least 1, and is {bins}")
    if bins > MOST_BINS:
        raise InputError(f"bins must be at most {MOST_BINS:,}, and is {bins:,}")
    return bins


def _first(rows: Tensor) -> int:
    return int(rows.nonzero()[0, 0])
