"""Checks of scores and decisions by loops over rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.noise import Noise
from ..core.objective import class_logits
from ..core.predictive import predictive
from ..evaluation import decisions, metrics
from ..evaluation.inference import difference, holm, non_inferior, student_quantile
from ..evaluation.predict import Draws, predict
from ..evaluation.sequential import Auto, predict_auto
from ..evaluation.threshold import lower_bound, threshold
from .check import Check, Errors, Op, exact, ratio
from .method_checks import draws, prompts, small_model

WIDE = torch.float64


def predictions() -> tuple[Tensor, Tensor]:
    """60 rows of three probabilities, whole hundredths with many ties, and labels."""
    rows = [[20 + 7 * i % 41, 5 + 11 * i % 35] for i in range(60)]
    probs = torch.tensor([[a, b, 100 - a - b] for a, b in rows], dtype=WIDE) / 100
    return probs, torch.tensor([max(0, 2 - i % 4) if i % 5 else i % 3 for i in range(60)])


Row = tuple[list[float], int, float, int]  # probabilities, label, confidence, answer


def by_rows(probs: Tensor, labels: Tensor) -> list[Row]:
    return [(p, label, max(p), p.index(max(p)))
            for p, label in zip(probs.tolist(), labels.tolist(), strict=True)]  # fmt: skip


def near(got: float, expected: float, case: str) -> float:
    one, other = (torch.tensor(t, dtype=WIDE) for t in (got, expected))
    return ratio(one, other, torch.ones((), dtype=WIDE), 1e-12, case)


# --- Scores ---------------------------------------------------------------------------------------


def scores_by_loops(_: Op, device: torch.device) -> Errors:
    """Risk by coverage, bins, means over rows, entropy, AUROC, temperature, in loops."""
    probs, labels = predictions()
    rows, n = by_rows(probs, labels), len(labels)
    wrong_at: dict[float, list[int]] = {}
    for _p, label, confidence, answer in rows:
        wrong_at.setdefault(confidence, []).append(int(answer != label))
    order = sorted((r[2] for r in rows), reverse=True)
    wrong = [sum(wrong_at[c]) / len(wrong_at[c]) for c in order]
    curve = metrics.risk_coverage(probs, labels)
    risks = [sum(wrong[: k + 1]) / (k + 1) for k in range(n)]
    for k, risk in enumerate(risks):
        yield near(float(curve.risk[k]), risk, f"risk of {k + 1} rows")
        yield near(float(curve.coverage[k]), (k + 1) / n, "coverage")
    yield near(curve.area, sum(risks) / n, "area under it")
    bins = metrics.reliability(probs, labels, 5)
    for b in range(5):
        own = [r for r in rows if b / 5 <= r[2] < (b + 1) / 5]
        yield exact(int(bins.rows[b]) == len(own), f"rows of bin {b}")
        if own:
            yield near(float(bins.confidence[b]), sum(r[2] for r in own) / len(own), "confidence")
            right = sum(r[3] == r[1] for r in own) / len(own)
            yield near(float(bins.accuracy[b]), right, f"accuracy of bin {b}")
    values, columns = metrics.scores(probs, labels), metrics.per_question(probs, labels)
    for name, value in values.items():
        yield near(float(columns[name].mean()), value, f"{name}, mean over rows")
    for entropy, row in zip(metrics.entropy(probs).tolist(), rows, strict=True):
        yield near(entropy, -sum(p * math.log(p) for p in row[0] if p), "entropy")
    warm = metrics.apply_temperature(probs, 2.5)
    for got, row in zip(warm.tolist(), rows, strict=True):
        powers = [p**0.4 for p in row[0]]
        yield near(got[1], powers[1] / sum(powers), "temperature")
    yield near(metrics.auroc(probs[:, 0], labels.clamp(max=1)), pairs_won(rows), "AUROC")


def pairs_won(rows: list[Row]) -> float:
    """The share of pairs where the row with label 1 or 2 has more of class 0; ties are halves."""
    ahead, behind = ([r[0][0] for r in rows if (r[1] > 0) == yes] for yes in (True, False))
    won = sum((a > b) + (a == b) / 2 for a in ahead for b in behind)
    return won / len(ahead) / len(behind)


def intervals(_: Op, device: torch.device) -> Errors:
    """Percentiles of resampled rows: one score at a time, and all at once; the normal's width.

    A mean NLL lies within 1.96 standard errors; percentiles of 4,000 replicates give them to 2 %.
    """
    probs, labels = predictions()
    at_once = metrics.bootstrap_intervals(probs, labels, replicates=200, seed=3)
    functions: dict[str, Callable[[Tensor, Tensor], float]] = {
        "acc": metrics.accuracy, "ece": metrics.ece, "nll": metrics.nll, "brier": metrics.brier,
    }  # fmt: skip
    for name, function in functions.items():
        one = metrics.bootstrap_interval(function, probs, labels, replicates=200, seed=3)
        for a, b in zip(at_once[name], one, strict=True):
            yield near(a, b, f"interval of {name}")
    low, high = metrics.bootstrap_intervals(probs, labels, replicates=4000)["nll"]
    each = metrics.per_question(probs, labels)["nll"]
    width = 1.96 * float(each.std()) / math.sqrt(len(each))
    yield abs((high - low) / 2 / width - 1) / 0.08
    yield abs((high + low) / 2 - float(each.mean())) / (0.1 * width)


def decided_by_loops(_: Op, device: torch.device) -> Errors:
    """Tables of answers, and thresholds by the binomial distribution in whole numbers."""
    probs, labels = predictions()
    rows = by_rows(probs, labels)
    table = decisions.confusion(probs, labels)
    for label in range(3):
        for answer in range(3):
            count = sum(r[1] == label and r[3] == answer for r in rows)
            yield exact(int(table[label, answer]) == count, f"confusion {label}, {answer}")
    yield exact(decisions.wrong_and_sure(probs, labels, 0.7)
                == sum(r[3] != r[1] and r[2] >= 0.7 for r in rows), "wrong and sure")  # fmt: skip
    scores = decisions.class_scores(table)
    for c in range(3):
        hits = sum(r[1] == r[3] == c for r in rows)
        yield near(float(scores.precision[c]), hits / sum(r[3] == c for r in rows), "precision")
        yield near(float(scores.recall[c]), hits / sum(r[1] == c for r in rows), "recall")
    worst = sorted((i for i, r in enumerate(rows) if r[1] != r[3]), key=lambda i: -rows[i][2])
    yield exact(decisions.worst_errors(probs, labels, 6) == worst[:6], "worst errors")
    for right in range(0, 41, 8):
        bound = lower_bound(40, right, 0.9)
        yield near(at_most(40, 40 - right, 1 - bound) if right else 0.1, 0.1, "Clopper-Pearson")
    with_ties = [i % 67 / 67 for i in range(200)], [i % 67 > 14 or i % 3 == 0 for i in range(200)]
    late_errors = [1 - i / 200 for i in range(200)], [not 50 < i < 58 for i in range(200)]
    for confidence, correct in (with_ties, late_errors):
        for accuracy in (0.6, 0.85, 0.95, 0.999):
            columns = torch.tensor(confidence, dtype=WIDE), torch.tensor(correct)
            found = threshold(*columns, accuracy, 0.9)
            best = strictest_first(confidence, correct, accuracy, 0.9)
            got = found and (found.confidence, found.answered, found.right)
            yield exact(got == best, f"threshold of {accuracy}: {got}, expected {best}")


def at_most(n: int, k: int, p: float) -> float:
    """P(X <= k) of a binomial X."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def strictest_first(
    confidence: list[float], right: list[bool], accuracy: float, level: float
) -> tuple[float, int, int] | None:
    """The last of 25 %, 30 %, ... of the rows before the first that fails its exact test."""
    n, best, fewest = len(right), None, 1
    while accuracy**fewest > 1 - level:
        fewest += 1
    for percent in range(25, 101, 5):
        place = max(-(-percent * n // 100), fewest)
        if place > n:
            break
        least = sorted(confidence, reverse=True)[place - 1]
        own = [r for c, r in zip(confidence, right, strict=True) if c >= least]
        if at_most(len(own), own.count(False), 1 - accuracy) > 1 - level:
            break
        best = least, len(own), own.count(True)
    return best


def compared(_: Op, device: torch.device) -> Errors:
    """Holm's p values, Student's quantiles from tables, and intervals of a difference."""
    p = [0.02, 0.3, 0.004, 0.9, 0.01]
    right = [0.06, 0.6, 0.02, 0.9, 0.04]
    for got, expected in zip(holm(p), right, strict=True):
        yield near(got, expected, "Holm")
    tables = ((0.975, 4, 2.776445), (0.95, 1, 6.313752), (0.975, 30, 2.042272), (0.9, 2, 1.885618))
    for q, freedom, value in tables:
        yield abs(student_quantile(q, freedom) - value) / 1e-6
    # Replicates that agree: only questions vary, and the interval is the normal one.
    d = draws(1, 1, 50).expand(4, -1)
    found, error = difference(d + 3, 0 * d, 0.9), float(d.var(1)[0] / 50) ** 0.5
    yield near(found.mean, 3 + float(d.mean()), "mean")
    yield abs(found.high - found.mean - 1.644854 * error) / (1e-4 * error)
    yield near(found.high - found.mean, found.mean - found.low, "symmetry")
    # Questions that agree: only replicates vary, by Student's t of 3 degrees.
    e = draws(2, 4, 1).expand(-1, 50)
    found, error = difference(e, 0 * e, 0.95), float(e[:, 0].var() / 4) ** 0.5
    yield abs(found.high - found.mean - 3.182446 * error) / (1e-4 * error)
    one, other = non_inferior(e, 0 * e, 0.5, 0.95), difference(e, 0 * e, 0.9)
    yield near(one.limit, other.high, "limit of non-inferiority")


def as_many_as_needed(_: Op, device: torch.device) -> Errors:
    """Draws until the leader has the wealth: the bets of each example, one after the other."""
    model, batch = small_model(device, method="scalabl"), prompts(device, 4, 4)
    found, taken, settled = predict_auto(model, batch, Auto(0.3, 0.3, most=40), seed=2)
    with torch.no_grad():
        logits = [class_logits(model, batch, Noise(2, i)).double().cpu() for i in range(40)]
    each = torch.softmax(torch.stack(logits), -1)
    for row, (count, done) in enumerate(zip(taken.tolist(), settled.tolist(), strict=True)):
        wealth = least_wealth(each[:count, row].tolist(), int(found.probs[row].argmax()), 0.3)
        yield exact(done == (wealth >= 2 / 0.3), f"row {row}: wealth {wealth:.3g}, settled: {done}")
        yield exact(8 <= count <= 40, f"row {row}: {count} draws")
    yield exact(bool(settled.any()) and not bool(settled.all()), f"settled: {settled.tolist()}")
    every, many, _done = predict_auto(model, batch, Auto(0.1, 1e-12, most=10), seed=2)
    yield exact(many.tolist() == [10] * 4, "all draws")
    whole = predict(model, batch, samples=10, seed=2)
    yield ratio(every.probs, whole.probs.cpu(), torch.ones(4, 3), 1e-12, "all draws")
    first, second = (Draws(3, 2, first=f).noise(f) for f in (0, 1))
    yield exact((first.draw, second.draw) == (0, 1), "numbers of draws")
    two = predictive(torch.log_softmax(draws(5, 2, 3, 4), -1))
    gap = two.entropy - two.expected_entropy - two.mutual_information
    yield ratio(gap, 0 * gap, torch.ones(3), 1e-12, "(9)")


def least_wealth(draws: list[list[float]], leader: int, tolerance: float) -> float:
    """(22): the leader's mean wealth over 20 bets, against the class where it is smallest."""
    found = []
    for other in {0, 1, 2} - {leader}:
        wealth = [1.0] * 20
        for p in draws:
            for i in range(20):
                bet = (i + 0.5) / 20 / (1 - tolerance)
                wealth[i] *= 1 + bet * (p[leader] - p[other] + tolerance)
        found.append(sum(wealth) / 20)
    return min(found)


SCORE_CHECKS = [
    Check(
        "scores by loops", "risk by coverage, bins, entropy, AUROC, temperature", scores_by_loops
    ),
    Check("intervals", "bootstrap: one score at a time, and all at once", intervals),
    Check("decisions", "tables of answers; thresholds by exact binomial tests", decided_by_loops),
    Check("comparisons", "Holm, Student, two-way intervals of a difference", compared),
    Check("as many as needed", "(22) draws until an answer is settled", as_many_as_needed),
]
