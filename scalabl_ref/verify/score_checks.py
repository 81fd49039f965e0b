"""Checks of scores and decisions by loops over rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.noise import Noise
from ..core.objective import class_logits
from ..evaluation import decisions, metrics
from ..evaluation.inference import difference, holm, non_inferior, student_quantile
from ..evaluation.quadrature import integrate
from ..evaluation.sequential import Auto, predict_auto
from ..evaluation.threshold import lower_bound, threshold
from . import reference
from .check import Check, Errors, Op, exact, ratio
from .method_checks import EPS, draws, prompts, small_model

WIDE = torch.float64


def predictions() -> tuple[Tensor, Tensor]:
    """60 rows of three probabilities, whole hundredths with many ties, and labels."""
    rows = [[20 + 7 * i % 41, 5 + 11 * i % 35] for i in range(60)]
    probs = torch.tensor([[a, b, 100 - a - b] for a, b in rows], dtype=WIDE) / 100
    return probs, torch.tensor([max(0, 2 - i % 4) if i % 5 else i % 3 for i in range(60)])


Row = tuple[list[float], int, float, int]  # probabilities, label, confidence, answer


def by_rows(probs: Tensor, labels: Tensor) -> list[Row]:
    return [(p, label, max(p), reference.answer(p))
            for p, label in zip(probs.tolist(), labels.tolist(), strict=True)]  # fmt: skip


def near(got: float, expected: float, case: str) -> float:
    """Numbers of about size 1: two sums of 60 rounded terms, on both sides."""
    one, other = (torch.tensor(t, dtype=WIDE) for t in (got, expected))
    return ratio(one, other, torch.ones((), dtype=WIDE), 2 * 2 * 60 * EPS, case)


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
            sure, right = sum(r[2] for r in own), sum(r[3] == r[1] for r in own)
            yield near(float(bins.confidence[b]), sure / len(own), "confidence")
            yield near(float(bins.accuracy[b]), right / len(own), f"accuracy of bin {b}")
    expected = reference.scores(probs, labels) | {"ece": reference.ece(probs, labels, 5)}
    values, each = metrics.scores(probs, labels, 5), metrics.per_question(probs, labels, 5)
    for name, value in expected.items():
        yield near(values[name], value, name)
        yield near(float(each[name].mean()), value, f"{name}, mean over rows")
    for entropy, row in zip(metrics.entropy(probs).tolist(), rows, strict=True):
        yield near(entropy, -sum(p * math.log(p) for p in row[0] if p), "entropy")
    warm = metrics.apply_temperature(probs, 2.5)
    for got, row in zip(warm.tolist(), rows, strict=True):
        powers = [p**0.4 for p in row[0]]
        for one, power in zip(got, powers, strict=True):
            yield near(one, power / sum(powers), "temperature")
    columns = probs[:, 0], labels.clamp(max=1)
    yield near(metrics.auroc(*columns), reference.auroc(*columns), "AUROC")


def intervals(_: Op, device: torch.device) -> Errors:
    """Percentiles of resampled rows: one score at a time, and all at once; the normal's width.

    Resampled means of 60 NLLs are about normal, so the half width is about 1.96 standard errors.
    From 4,000 replicates it has a standard error of 1.5 % of itself, and so has the middle; the
    bounds are five of them, with 1 % more for the factor sqrt(59 / 60).
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
    yield abs((high - low) / 2 / width - 1) / 0.085
    yield abs((high + low) / 2 - float(each.mean())) / (0.085 * width)


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
        given, there = sum(r[3] == c for r in rows), sum(r[1] == c for r in rows)
        expected = there, hits / given, hits / there, 2 * hits / (given + there)
        for name, column, value in zip(scores._fields, scores, expected, strict=True):
            yield near(float(column[c]), value, f"{name} of class {c}")
    worst = sorted((i for i, r in enumerate(rows) if r[1] != r[3]), key=lambda i: -rows[i][2])
    yield exact(decisions.worst_errors(probs, labels, 6) == worst[:6], "worst errors")
    yield exact(lower_bound(40, 0, 0.9) == 0, "the bound of none right")
    for hits in range(8, 41, 8):
        bound = lower_bound(40, hits, 0.9)
        yield near(at_most(40, 40 - hits, 1 - bound), 0.1, "Clopper-Pearson")
    with_ties = [i % 67 / 67 for i in range(200)], [i % 67 > 14 or i % 3 == 0 for i in range(200)]
    late_errors = [1 - i / 200 for i in range(200)], [not 50 < i < 58 for i in range(200)]
    for confidence, correct in (with_ties, late_errors):
        for accuracy in (0.6, 0.85, 0.95, 0.999):
            columns = torch.tensor(confidence, dtype=WIDE), torch.tensor(correct)
            found = threshold(*columns, accuracy, 0.9)
            best = strictest_first(confidence, correct, accuracy, 0.9)
            got = found and (found.confidence, found.answered, found.right)
            if found:
                tail = at_most(found.answered, found.answered - found.right, 1 - found.bound)
                yield near(tail, 0.1, "bound")
                yield near(found.coverage, found.answered / 200, "coverage")
            yield exact(got == best, f"threshold of {accuracy}: {got}, expected {best}")


def at_most(n: int, k: int, p: float) -> float:
    """P(X <= k) of a binomial X."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def strictest_first(
    confidence: list[float], right: list[bool], accuracy: float, level: float
) -> tuple[float, int, int] | None:
    """From 25 % of the rows on, the last share before the first that fails its exact test."""
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
    for p, right in (([0.02, 0.3, 0.004, 0.9, 0.01], [0.06, 0.6, 0.02, 0.9, 0.04]),
                     ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.6, 0.7], [1, 1])):  # fmt: skip
        for got, expected in zip(holm(p), right, strict=True):
            yield near(got, expected, f"Holm of {p}")
    tables = ((0.975, 4, 2.776445), (0.95, 1, 6.313752), (0.975, 30, 2.042272), (0.9, 2, 1.885618))
    for q, freedom, value in tables:
        yield abs(student_quantile(q, freedom) - value) / 1e-6
    both = draws(1, 1, 50) + draws(2, 4, 1)
    for case, d in (("questions", draws(1, 1, 50).expand(4, -1)), ("both", both),
                    ("replicates", draws(2, 4, 1).expand(-1, 50)),
                    ("rest", both + draws(3, 4, 50))):  # fmt: skip
        found = difference(d + 3, 0 * d, 0.95)
        mean, reach = reach_by_loops(d.tolist(), 3.182446, 1.959964)
        yield near(found.mean, 3 + mean, f"{case}: mean")
        for end in (found.high - found.mean, found.mean - found.low):
            yield abs(end / reach - 1) / 1e-6
        one, other = non_inferior(d, 0 * d, 0.5, 0.95), difference(d, 0 * d, 0.9)
        yield near(one.limit, other.high, f"{case}: limit of non-inferiority")


def reach_by_loops(d: list[list[float]], t: float, z: float) -> tuple[float, float]:
    """The mean of d (R, Q), and (b), (c): sqrt(t^2 V_replicates + z^2 V_questions)."""
    R, Q = len(d), len(d[0])
    rows, columns = (
        [statistics.mean(row) for row in d],
        [statistics.mean(c) for c in zip(*d, strict=True)],
    )
    mean = statistics.mean(rows)
    rest = sum((d[i][j] - rows[i] - columns[j] + mean) ** 2 for i in range(R) for j in range(Q))
    rest /= (R - 1) * (Q - 1)
    by_question = max(0.0, statistics.variance(columns) - rest / R) / Q
    return mean, math.sqrt(t * t * statistics.variance(rows) / R + z * z * by_question)


def as_many_as_needed(_: Op, device: torch.device) -> Errors:
    """Draws of each half until its leader has the wealth, and the average of the halves."""
    model, batch = small_model(device, method="scalabl"), prompts(device, 4, 4)
    with torch.no_grad():
        logits = [class_logits(model, batch, Noise(2, i)).double().cpu() for i in range(40)]
    each = torch.softmax(torch.stack(logits), -1)
    for error in (0.3, 1e-12):
        found, taken, settled = predict_auto(model, batch, Auto(0.3, error, most=40), seed=2)
        for row in range(4):
            own, case = each[:, row].tolist(), f"row {row}, error {error}"
            even, odd = (stop_of(own[half::2], math.sqrt(2 / error)) for half in (0, 1))
            count = 2 * max(even, odd)
            yield exact(int(taken[row]) == count, f"{case}: {int(taken[row])} draws, not {count}")
            pairs = zip(each[0::2, row][:odd].mean(0), each[1::2, row][:even].mean(0), strict=True)
            for c, (one, other) in enumerate(pairs):
                yield near(float(found.probs[row, c]), float(one + other) / 2, f"{case}: class {c}")
            wealth = least_wealth(own[:count], int(found.probs[row].argmax()))
            yield exact(bool(settled[row]) == (wealth >= 2 / error), f"{case}: wealth {wealth:.3g}")


def stop_of(own: list[list[float]], needed: float) -> int:
    """The first look of a half, of 4, 6, 9, 13 and 20 draws, at which its leader has enough."""
    for look in (4, 6, 9, 13, 20):
        total = [sum(p[c] for p in own[:look]) for c in range(3)]
        if least_wealth(own[:look], total.index(max(total))) >= needed:
            break
    return look


def least_wealth(own: list[list[float]], leader: int, tolerance: float = 0.3) -> float:
    """(22): the leader's mean wealth over 20 bets, against the class where it is smallest."""
    found = []
    for other in {0, 1, 2} - {leader}:
        wealth = [1.0] * 20
        for p in own:
            for i in range(20):
                bet = (i + 0.5) / 20 / (1 - tolerance)
                wealth[i] *= 1 + bet * (p[leader] - p[other] + tolerance)
        found.append(sum(wealth) / 20)
    return min(found)


def exact_prediction(_: Op, device: torch.device) -> Errors:
    """Averages over a fine grid of the logits' two differences, whose tails weigh below 1e-14."""
    mean, factor = draws(3, 3, 3), 0.4 * draws(4, 3, 3, 4) + 1
    found = integrate(mean.to(device), factor.to(device))
    axis = torch.linspace(-8, 8, 129, dtype=WIDE)
    grid = torch.cartesian_prod(axis, axis)
    weight = (-grid.square().sum(1) / 2).exp()
    weight /= weight.sum()
    for row in range(3):
        moved = factor[row, 1:] - factor[row, :1]
        moves = grid @ torch.linalg.cholesky(moved @ moved.T).T
        logits = F.pad(mean[row, 1:] - mean[row, 0] + moves, (1, 0))
        each = logits.log_softmax(1)
        probs = weight @ each.exp()
        within = weight @ -(each.exp() * each).sum(1)
        got = torch.cat([found.probs[row].cpu(), found.expected_entropy[row].cpu()[None]])
        yield ratio(got, torch.cat([probs, within[None]]), torch.ones(4), 5e-5, f"row {row}")


SCORE_CHECKS = [
    Check(
        "scores by loops", "risk by coverage, bins, entropy, AUROC, temperature", scores_by_loops
    ),
    Check("intervals", "bootstrap: one score at a time, and all at once", intervals),
    Check("decisions", "tables of answers; thresholds by exact binomial tests", decided_by_loops),
    Check("comparisons", "Holm, Student, two-way intervals of a difference", compared),
    Check("as many as needed", "(22) draws until an answer is settled", as_many_as_needed),
    Check("exact prediction", "(8) the softmax averaged over a grid of logits", exact_prediction),
]
