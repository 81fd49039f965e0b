"""Checks of scores and decisions by loops over rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import SubspaceAdapter, adapters
from ..core.config import AdapterConfig
from ..core.noise import Noise
from ..core.objective import class_logits
from ..evaluation import decisions, metrics
from ..evaluation.inference import difference, holm, non_inferior, student_quantile, student_tail
from ..evaluation.quadrature import head_gaussian, integrate, predict_exact
from ..evaluation.sequential import Auto, predict_auto
from ..evaluation.threshold import (
    best_share,
    binomial_tail,
    fewest_rows,
    lower_bound,
    most_wrong,
    rows_needed,
    threshold,
)
from ..methods import Subspace, to_points
from ..model.attach import add_adapters
from ..model.config import LlamaConfig
from ..model.llama import Llama
from . import reference
from .check import Check, Errors, Op, exact, ratio, refused
from .method_checks import EPS, draws, fill, gaussian, parts, prompts, small_model

WIDE = torch.float64
HEAD = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                   num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                   max_position_embeddings=8)  # fmt: skip


def predictions() -> tuple[Tensor, Tensor]:
    """60 rows of three probabilities, whole hundredths with many ties, and labels."""
    rows = [[20 + 7 * i % 41, 5 + 11 * i % 35] for i in range(60)]
    probs = torch.tensor([[a, b, 100 - a - b] for a, b in rows], dtype=WIDE) / 100
    return probs, torch.tensor([max(0, 2 - i % 4) if i % 5 else i % 3 for i in range(60)])


Row = tuple[list[float], int, float, int]  # probabilities, label, confidence, answer


def by_rows(probs: Tensor, labels: Tensor) -> list[Row]:
    return [(p, label, max(p), reference.answer(p))
            for p, label in zip(probs.tolist(), labels.tolist(), strict=True)]  # fmt: skip


def near_sum(got: float, expected: float, case: str) -> float:
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
        yield near_sum(float(curve.risk[k]), risk, f"risk of {k + 1} rows")
        yield near_sum(float(curve.coverage[k]), (k + 1) / n, "coverage")
    yield near_sum(curve.area, sum(risks) / n, "area under it")
    bins = metrics.reliability(probs, labels, 5)
    for b in range(5):
        own = [r for r in rows if b / 5 <= r[2] < (b + 1) / 5]
        yield exact(int(bins.rows[b]) == len(own), f"rows of bin {b}")
        if own:
            sure, right = sum(r[2] for r in own), sum(r[3] == r[1] for r in own)
            yield near_sum(float(bins.confidence[b]), sure / len(own), "confidence")
            yield near_sum(float(bins.accuracy[b]), right / len(own), f"accuracy of bin {b}")
    expected = reference.scores(probs, labels) | {"ece": reference.ece(probs, labels, 5)}
    values, each = metrics.scores(probs, labels, 5), metrics.per_question(probs, labels, 5)
    for name, value in expected.items():
        yield near_sum(values[name], value, name)
        yield near_sum(float(each[name].mean()), value, f"{name}, mean over rows")
    for entropy, row in zip(metrics.entropy(probs).tolist(), rows, strict=True):
        yield near_sum(entropy, -sum(p * math.log(p) for p in row[0] if p), "entropy")
    warm = metrics.apply_temperature(probs, 2.5)
    for got, row in zip(warm.tolist(), rows, strict=True):
        powers = [p**0.4 for p in row[0]]
        for one, power in zip(got, powers, strict=True):
            yield near_sum(one, power / sum(powers), "temperature")
    columns = probs[:, 0], labels.clamp(max=1)
    yield near_sum(metrics.auroc(*columns), reference.auroc(*columns), "AUROC")


def edges_of_scores(_: Op, device: torch.device) -> Errors:
    """Sure rows, edges of bins, empty bins, other data sets, temperatures at the bounds; refusals.

    The numbers are worked out by hand.
    """
    probs = torch.tensor([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0.4, 0.2, 0.4]], dtype=WIDE)
    labels = torch.tensor([0, 2, 1, 0])
    yield exact(metrics.entropy(probs)[:2].tolist() == [0.0, 0.0], "entropy of sure rows")
    yield near_sum(float(metrics.entropy(probs)[2]), math.log(2), "entropy")
    for name, right in (("acc", 0.5), ("brier", (0 + 2 + 0.5 + 0.56) / 4), ("nll", math.inf)):
        got = metrics.scores(probs, labels)[name]
        yield near_sum(got, right, name) if name != "nll" else exact(got == math.inf, "no answer")
    narrow, answers = predictions()[0].float(), predictions()[1]
    for name, value in reference.scores(narrow.double(), answers).items():
        yield near_sum(metrics.scores(narrow, answers)[name], value, f"{name} of float32")
    bins = metrics.reliability(probs, labels, 4)
    yield exact(bins.rows.tolist() == [0, 1, 1, 2], f"bins {bins.rows.tolist()}")
    yield exact(bool(bins.accuracy[0].isnan()), "an empty bin")
    yield near_sum(metrics.ece(probs, labels, 4), (0.6 + 0.5 + 1) / 4, "ECE")
    by_default = metrics.ece(probs, labels, 15)
    for got in (metrics.ece(probs, labels), metrics.scores(probs, labels)["ece"],
                float(metrics.per_question(probs, labels)["ece"].mean())):  # fmt: skip
        yield near_sum(got, by_default, "fifteen bins by default")
    known = metrics.answerable(probs, torch.tensor([0, 3, 2, 4]))
    yield exact(known.tolist() == [True, False, True, False], "answers among the classes")
    inside = {"entropy": torch.tensor([1.0, 2.0]), "mutual_information": torch.tensor([0.1, 0.5])}
    outside = {"entropy": torch.tensor([2.0, 3.0, 0.0]), "mutual_information": torch.tensor([0.2])}
    apart = {"auroc_entropy": 3.5 / 6, "auroc_mutual_information": 0.5}
    told = metrics.separation(inside, outside)
    yield exact(told.keys() == apart.keys(), f"separation of {sorted(told)}")
    for name, value in apart.items():
        yield near_sum(told[name], value, name)
    sure = torch.tensor([[4.0, 0.0]] * 4, dtype=WIDE)
    for hits, right_one in ((4, 0.05), (1, 20.0), (3, 4 / math.log(3))):
        fitted = metrics.fit_temperature(sure, (torch.arange(4) >= hits).long())
        yield abs(fitted / right_one - 1) / (100 * EPS)
    impossible = torch.tensor([[0.0, 1.0, -math.inf]] * 3, dtype=WIDE)
    fitted = metrics.fit_temperature(impossible, torch.tensor([0, 1, 1]))
    yield abs(fitted * math.log(2) - 1) / (100 * EPS)
    replicates = torch.arange(100, dtype=WIDE).flip(0)
    for level, ends in ((0.9, (4.0, 95.0)), (0.5, (24.0, 75.0)), (0.98, (0.0, 99.0))):
        found_ends = metrics._percentiles(replicates, level)
        yield exact(found_ends == ends, f"{level} of a hundred: {found_ends}")


def refused_scores(_: Op, device: torch.device) -> Errors:
    """Rows that are no distributions, labels outside, and numbers out of range."""
    probs, labels = predictions()
    scores = (metrics.scores, metrics.per_question, metrics.accuracy, metrics.nll, metrics.brier,
              metrics.ece, metrics.reliability, metrics.risk_coverage,
              metrics.bootstrap_intervals)  # fmt: skip
    more, less, nan = probs.clone(), probs.clone(), probs.clone()
    more[3, 0] += 1e-4
    less[3, 0], less[3, 1] = -0.1, less[3, :2].sum() + 0.1
    nan[3, 0] = math.nan
    for score in scores:
        for p, words in ((more, "row 3"), (less, "row 3"), (nan, "row 3"), (probs[:, 0], "rows")):
            yield refused(partial(score, p, labels), words)
        far = labels.clone()
        far[5] = 3
        for y, words in ((far, "row 5"), (labels - 1, "row"), (labels[1:], "shape"),
                         (labels.double(), "integers")):  # fmt: skip
            yield refused(partial(score, probs, y), words)
    for score in (metrics.ece, metrics.reliability, metrics.per_question):
        for bins in (0, 10_001):
            yield refused(partial(score, probs, labels, bins), "bins")
    for replicates, level in ((0, 0.9), (9, 0.0), (9, 1.0)):
        call = partial(metrics.bootstrap_intervals, probs, labels, 15, replicates, level)
        yield refused(call, "bootstrap")
    for temperature in (0.0, -1.0, math.inf):
        yield refused(partial(metrics.apply_temperature, probs, temperature), "temperature")
    zero = torch.tensor([[0.0, -math.inf]], dtype=WIDE)
    yield refused(partial(metrics.fit_temperature, zero, torch.tensor([1])), "probability zero")
    yield refused(partial(metrics.fit_temperature, -zero, torch.tensor([0])), "infinity")
    one, some = torch.ones(3, dtype=torch.int64), torch.tensor([0.1, 0.2, 0.3])
    for values, y, words in ((some, one, "both kinds"), (some, 0 * one, "both kinds"),
                             (some, one.cumsum(0), "0 or 1"), (some[1:], one, "long"),
                             (some / 0 * 0, one, "NaN")):  # fmt: skip
        yield refused(partial(metrics.auroc, values, y), words)


def intervals(_: Op, device: torch.device) -> Errors:
    """Percentiles of resampled rows: one score at a time, and all at once; the normal's width.

    Resampled means of 60 NLLs are about normal, so the half width is about 1.96 standard errors.
    From 4,000 replicates it has a standard error of 1.5 % of itself, and so has the middle; the
    bounds are five of them, with 1 % more for the factor sqrt(59 / 60).
    """
    probs, labels = predictions()
    at_once = metrics.bootstrap_intervals(probs, labels, replicates=200, seed=3)
    other = metrics.bootstrap_intervals(probs, labels, replicates=200, seed=4)
    yield exact(at_once != other, "another seed has the same interval")
    fewer = metrics.bootstrap_intervals(probs, labels, replicates=200, level=0.5, seed=3)
    for name, (low, high) in fewer.items():
        yield exact(at_once[name][0] < low < high < at_once[name][1], f"half of {name}")
    again = metrics.bootstrap_intervals(probs, labels, bins=3, replicates=200, seed=3)
    yield exact(again["ece"] != at_once["ece"], "bins of the interval")
    functions: dict[str, Callable[[Tensor, Tensor], float]] = {
        "acc": metrics.accuracy, "ece": metrics.ece, "nll": metrics.nll, "brier": metrics.brier,
    }  # fmt: skip
    for name, function in functions.items():
        one = metrics.bootstrap_interval(function, probs, labels, replicates=200, seed=3)
        for a, b in zip(at_once[name], one, strict=True):
            yield near_sum(a, b, f"interval of {name}")
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
            yield near_sum(float(column[c]), value, f"{name} of class {c}")
    for accuracy in (0.3, 0.62, 0.8, 0.95, 1.0):
        best = None
        for least in sorted({r[2] for r in rows}):
            own = [r[1] == r[3] for r in rows if r[2] >= least]
            if sum(own) >= accuracy * len(own) - 1e-9:
                best = least, len(own), sum(own)
                break
        told = decisions.answered_at(probs, labels, accuracy)
        yield exact((told and tuple(told)) == best, f"answered at {accuracy}: {told}, {best}")
        if told:
            yield near_sum(told.accuracy, told.right / told.rows, "accuracy of the answered")
    sure = decisions.wrong_and_sure(probs, labels)
    yield exact(sure == sum(r[3] != r[1] and r[2] >= 0.9 for r in rows), "sure from 0.9 on")
    yield refused(lambda: decisions.answered_at(2 * probs, labels, 0.9), "sum")
    worst = sorted((i for i, r in enumerate(rows) if r[1] != r[3]), key=lambda i: -rows[i][2])
    yield exact(decisions.worst_errors(probs, labels, 6) == worst[:6], "worst errors")
    most = decisions.worst_errors(probs, labels)
    yield exact(most == worst[:10], "ten worst errors by default")
    yield exact(lower_bound(40, 0, 0.9) == 0, "the bound of none right")
    for hits in range(8, 41, 8):
        bound = lower_bound(40, hits, 0.9)
        yield near_sum(at_most(40, 40 - hits, 1 - bound), 0.1, "Clopper-Pearson")
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
                yield near_sum(tail, 0.1, "bound")
                yield near_sum(found.coverage, found.answered / 200, "coverage")
            yield exact(got == best, f"threshold of {accuracy}: {got}, expected {best}")


def rows_of_thresholds(_: Op, device: torch.device) -> Errors:
    """Shares, the least numbers of rows, and proposals, from binomial sums in whole numbers."""
    for accuracy, level, fewest in ((0.95, 0.95, 59), (0.9, 0.95, 29), (0.99, 0.95, 299),
                                    (0.5, 0.9, 4)):  # fmt: skip
        yield exact(fewest_rows(accuracy, level) == fewest, f"{fewest} rows, all right")
    for n in (1, 7, 40):
        for rate in (0.05, 0.4):
            for alpha in (0.02, 0.05, 0.3):
                allowed = [k for k in range(n + 1) if at_most(n, k, rate) <= alpha]
                right = max(allowed, default=-1)
                yield exact(most_wrong(n, rate, alpha) == right, f"{n} rows at {rate}: {alpha}")
            for k in (-1, 0, n // 2, n, n + 3):
                yield near_sum(binomial_tail(n, k, rate), at_most(n, min(k, n), rate), "a tail")
    confidence, correct = [i // 2 / 40 for i in range(80)], [i % 9 != 0 for i in range(80)]
    columns = torch.tensor(confidence, dtype=WIDE), torch.tensor(correct)
    shares = []
    for least in sorted(set(confidence), reverse=True):
        own = [r for c, r in zip(confidence, correct, strict=True) if c >= least]
        if len(own) >= 20:
            shares.append((-sum(own) / len(own), len(own), sum(own)))
    yield exact(best_share(*columns) == min(shares)[1:], "the share that is right most often")
    for accuracy in (0.6, 0.75, 0.8):
        found, told = rows_needed(*columns, accuracy), needed(confidence, correct, accuracy)
        yield exact(found == told, f"{found} rows for {accuracy}, and {told}")
    yield exact(rows_needed(*columns, 0.97) is None, "no share is right so often")
    yield exact(rows_needed(columns[0], columns[1] | True, 0.95) == 81, "all are right")
    few = columns[0][:30], columns[1][:30] | True
    yield exact(rows_needed(*few, 0.95) == 59, "too few, and all right")
    by_default = threshold(*columns)
    yield exact(by_default == threshold(*columns, 0.95, 0.95), "the default target and level")
    for target, level in ((0.0, 0.9), (1.0, 0.9), (0.9, 0.0), (0.9, 1.0)):
        for function in (threshold, rows_needed):
            yield refused(partial(function, *columns, target, level), "between 0 and 1")
    yield refused(lambda: threshold(columns[0], columns[1][1:]), "equally long")


def needed(confidence: list[float], right: list[bool], accuracy: float) -> int | None:
    """The first proposal whose first candidate passes with the probability 0.8, at the level 0.95.

    Its rows are wrong as often as the same share here, with one more error, but never more seldom
    than a smaller share.
    """
    n, alpha, fewest = len(right), 0.05, 1
    while accuracy**fewest > alpha:
        fewest += 1
    order = sorted(range(n), key=lambda i: -confidence[i])
    rates = []
    for k in range(1, n + 1):
        parted = k < n and confidence[order[k - 1]] == confidence[order[k]]
        wrong = sum(not right[i] for i in order[:k])
        rates.append(math.inf if parted else (wrong + 1) / (k + 1))
    count, proposals = n + 1, {max(n + 1, fewest)}
    while count <= 1_000_000:
        proposals.add(max(count, fewest))
        count = math.ceil(1.05 * count)
    for count in sorted(proposals):
        first = max(math.ceil(count / 4), fewest)
        if first > 400:  # a binomial sum in whole numbers is slow, and the cases here end before
            raise ValueError(f"{count} rows are too many for this check")
        rate = min(rates[-(-first * n // count) - 1 :])
        ways = (math.comb(first, k) * (1 - accuracy) ** k * accuracy ** (first - k)
                for k in range(first + 1))  # fmt: skip
        allowed = sum(tail <= alpha for tail in itertools.accumulate(ways))
        if allowed and at_most(first, allowed - 1, rate) >= 0.8:
            return count
    return None


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
            yield near_sum(got, expected, f"Holm of {p}")
    tables = ((0.975, 4, 2.776445), (0.95, 1, 6.313752), (0.975, 30, 2.042272), (0.9, 2, 1.885618))
    for q, freedom, value in tables:
        yield abs(student_quantile(q, freedom) - value) / 1e-6
        yield abs(student_tail(value, freedom) - (1 - q)) / 1e-6
    both = draws(1, 1, 50) + draws(2, 4, 1)
    for case, d in (("questions", draws(1, 1, 50).expand(4, -1)), ("both", both),
                    ("replicates", draws(2, 4, 1).expand(-1, 50)),
                    ("rest", both + draws(3, 4, 50))):  # fmt: skip
        found = difference(d + 3, 0 * d, 0.95)
        mean, reach = reach_by_loops(d.tolist(), 3.182446, 1.959964)
        yield near_sum(found.mean, 3 + mean, f"{case}: mean")
        for end in (found.high - found.mean, found.mean - found.low):
            yield abs(end / reach - 1) / 1e-6
        one, other = non_inferior(d, 0 * d, 0.5, 0.95), difference(d, 0 * d, 0.9)
        yield near_sum(one.limit, other.high, f"{case}: limit of non-inferiority")
        for shift in (0.0, 0.3, -0.6):
            there = difference(d + shift, 0 * d)
            ends = difference(d + shift, 0 * d, 1 - there.p)
            nearest = min(abs(ends.low), abs(ends.high))
            yield abs(nearest) / (1e-6 * (1 + abs(there.mean)))
        within = non_inferior(d, 0 * d, 0.5)
        limit = non_inferior(d, 0 * d, 0.0, 1 - within.p).limit if within.p < 0.5 else 0.5
        yield abs(limit - 0.5) / 1e-6
        far = non_inferior(d, 0 * d, found.mean - 3 - 1.0)  # a margin below the mean
        yield exact(far.p > 0.5, f"{case}: worse by more than the margin, p {far.p}")
    d = draws(1, 3, 9)
    yield exact(difference(d, 0 * d) == difference(d, 0 * d, 0.95), "the level is 95 %")
    yield exact(non_inferior(d, 0 * d) == non_inferior(d, 0 * d, 0.03, 0.95), "a margin of 0.03")
    yield exact(difference(d, d) == (0.0, 0.0, 0.0, 1.0), "no difference")
    endless = torch.where(torch.arange(9) == 4, math.inf, d)
    told = difference(endless, d)
    yield exact(told[1:] == (-math.inf, math.inf, 1.0), f"a score that is infinite: {told}")
    yield exact(non_inferior(endless, d) == (math.inf, 1.0), "no limit")
    for one_d, other_d, words in ((d[:1], d[:1], "at least 2"), (d[:, :1], d[:, :1], "at least 2"),
                                  (d, d[1:], "one shape")):  # fmt: skip
        for function in (difference, non_inferior):
            yield refused(partial(function, one_d, other_d), words)
    for level in (0.0, 1.0):
        yield refused(partial(difference, d, d, level), "level")
        yield refused(partial(non_inferior, d, d, 0.03, level), "level")


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
                average = float(one + other) / 2
                yield near_sum(float(found.probs[row, c]), average, f"{case}: class {c}")
            wealth = least_wealth(own[:count], int(found.probs[row].argmax()))
            yield exact(bool(settled[row]) == (wealth >= 2 / error), f"{case}: wealth {wealth:.3g}")


def auto_settings(_: Op, device: torch.device) -> Errors:
    """When a race is looked at, models that draw nothing, and values out of range."""
    default = Auto()
    known = default.tolerance, default.error, default.most
    yield exact(known == (0.05, 0.05, 1000), f"defaults {known}")
    for most, looks in ((40, [4, 6, 9, 13, 20]), (12, [4, 6]), (13, [4, 6]), (2, [1]), (9, [4])):
        yield exact(Auto(most=most).looks() == looks, f"looks of {most}: {Auto(most=most).looks()}")
    batch = prompts(device, 3, 4)
    model = small_model(device)
    found, taken, settled = predict_auto(model, batch)
    with torch.no_grad():
        right = class_logits(model, batch, None).softmax(1)
    yield ratio(found.probs.cpu(), right.cpu(), torch.ones(3), 1000 * EPS, "nothing is drawn")
    yield exact(not taken.any() and bool(settled.all()), "settled at once")
    random = small_model(device, method="scalabl")
    one, other = (predict_auto(random, batch, auto, 2) for auto in (None, Auto(0.05, 0.05, 1000)))
    yield exact(torch.equal(one[1], other[1]), "by default")
    for name, values in (("tolerance", (0.0, 1.0)), ("error", (0.0, 1.0)), ("most", (1, 100_001))):
        for value in values:
            yield refused(partial(Auto, **{name: value}), name)  # type: ignore[arg-type]


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
    for classes, columns in ((4, 5), (6, 1), (2, 3), (3, 1)):
        mean, factor = draws(5, 2, classes), draws(6, 2, classes, columns) / 3 + 1
        found = integrate(mean, factor)
        yield exact(len(found.probs) == 2, "rows")
        for row in range(2):
            yield ratio(found.probs[row], on_a_grid(mean[row], factor[row]), torch.ones(classes),
                        5e-5, f"{classes} classes, {columns} scales")  # fmt: skip
    one = integrate(draws(5, 2, 1), draws(6, 2, 1, 3))
    yield exact(one.probs.tolist() == [[1.0], [1.0]], "one class")
    yield refused(lambda: integrate(draws(5, 2, 5), draws(6, 2, 5, 4)), "at most 4 classes")


def on_a_grid(mean: Tensor, factor: Tensor) -> Tensor:
    """The mean softmax over a grid of the directions that move differences of logits, (C,)."""
    U, S, _ = torch.linalg.svd(factor - factor.mean(0), full_matrices=False)
    own = (U * S)[:, 1e-9 * S[0] < S]
    axis = torch.linspace(-6, 6, (0, 481, 121, 49)[own.shape[1]], dtype=WIDE)
    grid = torch.cartesian_prod(*[axis] * own.shape[1]).view(-1, own.shape[1])
    weight = (-grid.square().sum(1) / 2).exp()
    return (weight / weight.sum()) @ (mean + grid @ own.T).softmax(1)


def keep_input(kept: list[Tensor], module: Any, given: tuple[Tensor, ...]) -> None:
    kept.append(given[0].detach().cpu())


def exact_heads(_: Op, device: torch.device) -> Errors:
    """(23) for a head alone: the Gaussian of its logits, whole or cut; and what must be refused."""
    batch = replace(prompts(device, 3, 4), classes=torch.tensor([7, 3, 5], device=device))
    for cut, covariance in itertools.product((False, True), ("diagonal", "full")):
        model = Llama(HEAD, WIDE).init_random_(std=0.5)
        if cut:
            model = model.trim_head([7, 3, 5])
        config = AdapterConfig(rank=3, alpha=0.2, targets=("lm_head",), covariance=covariance)
        add_adapters(model, config).double()
        fill(adapters(model).values(), 3)
        model.to(device)
        head = cast(SubspaceAdapter, adapters(model)["lm_head"])
        (_s, L), own = gaussian(head), parts(head)
        hidden: list[Tensor] = []
        hook = model.lm_head.register_forward_pre_hook(partial(keep_input, hidden))
        with torch.no_grad():
            right = class_logits(model, batch, None)
        hook.remove()
        B = own["B"] if cut else own["B"][[7, 3, 5]]
        h = hidden[0] @ own["A"].T
        F_rows = torch.stack([config.scaling * B @ torch.diag(row) @ L for row in h])
        mean, factor = (t.detach().cpu() for t in head_gaussian(model, batch))
        case = f"{'cut' if cut else 'whole'}, {covariance}"
        yield ratio(mean, right.cpu(), right.abs().max().cpu(), 100 * EPS, f"{case}: mean")
        size = F_rows.abs().max()
        yield ratio(factor, F_rows, size, 100 * EPS, f"{case}: factor")
        found = predict_exact(model, batch).probs.cpu()
        for row in range(3):
            grid = on_a_grid(right[row].cpu(), F_rows[row])
            yield ratio(found[row], grid, torch.ones(3), 5e-5, f"{case}: row {row}")
    for method in ("mle", "scalabl"):
        other = small_model(device, method=method)
        yield refused(partial(predict_exact, other, prompts(device, 3, 4)), "lm_head alone")
    points = small_model(device)
    to_points(points)
    seen, later = prompts(device, 5, 4), prompts(device, 2, 4, first=9)
    posterior = Subspace.fit(points, [seen], 0.7)
    mean, factor = (t.cpu() for t in posterior.gaussian(points, later))
    found = predict_exact(points, later, posterior).probs.cpu()
    for row in range(2):
        grid = on_a_grid(mean[row], factor[row])
        yield ratio(found[row], grid, torch.ones(3), 5e-5, f"scales, row {row}")
    sampled = replace(posterior, predicts="sampled")
    yield refused(partial(predict_exact, points, later, sampled), "linear")


SCORE_CHECKS = [
    Check(
        "scores by loops", "risk by coverage, bins, entropy, AUROC, temperature", scores_by_loops
    ),
    Check("edges of scores", "sure rows, empty bins, temperatures at bounds", edges_of_scores),
    Check("refused scores", "rows that are no distributions, labels outside", refused_scores),
    Check("intervals", "bootstrap: one score at a time, and all at once", intervals),
    Check("decisions", "tables of answers; thresholds by exact binomial tests", decided_by_loops),
    Check("rows of thresholds", "binomial tails, shares, rows needed", rows_of_thresholds),
    Check("comparisons", "Holm, Student, two-way intervals of a difference", compared),
    Check("as many as needed", "(22) draws until an answer is settled", as_many_as_needed),
    Check("draws at most", "(22) looks, nothing to draw, values out of range", auto_settings),
    Check("exact heads", "(23) the Gaussian of a head's logits, and of scales", exact_heads),
    Check("exact prediction", "(8) the softmax averaged over a grid of logits", exact_prediction),
]
