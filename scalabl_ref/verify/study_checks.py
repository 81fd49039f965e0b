"""Checks of a study's results: scores by replicate, verdicts, costs, tables; all by loops.

The tests behind a verdict are those of `score_checks`. Here they meet folders of answers, whose
replicates are in different orders.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..evaluation import metrics, tables
from ..evaluation.comparison import SCALED, summary
from ..evaluation.inference import difference, holm, non_inferior
from ..support.tensors import save_tensors
from . import reference
from .check import Check, Errors, Op, exact, refused
from .method_checks import draws
from .score_checks import near_sum

SETS = ("validation", "test", "harder", "other")
ROWS, CLASSES = 40, 3
# By method: the noise of its answers, a factor of its logits, and its replicates in their order.
MADE = {"ours": (0.5, 1.0, (0, 1, 2)), "wild": (3.0, 1.0, (2, 0, 1)), "sure": (0.5, 4.0, (0, 2)),
        "twin": (0.5, 1.01, (1, 2, 0)), "second": (0.9, 1.0, (0, 1, 2)),
        "alone": (0.5, 1.0, (5,))}  # fmt: skip
VALIDATION = {"second": 0.7, "ours": 0.4}
FAMILIES = {"all": ["ours", "wild", "sure", "twin", "second"], "few": ["second", "wild", "alone"]}
Found = dict[str, dict[int, dict[str, tuple[Tensor, Tensor]]]]  # by method, replicate and set


def answers(method: str, number: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Probabilities and labels of each set; the questions are the same for all."""
    noise, factor, _numbers = MADE[method]
    found = {}
    for k, name in enumerate(SETS):
        labels = (7 * torch.arange(ROWS) + torch.arange(ROWS) // (k + 2)) % CLASSES
        evidence = draws(k, ROWS, CLASSES) + 1.5 * torch.eye(CLASSES).double()[labels]
        evidence += noise * draws(1000 * len(method) + 10 * number + k, ROWS, CLASSES)
        if name == "other":
            labels = labels + (torch.arange(ROWS) % 2) * CLASSES  # half are no class
        found[name] = (factor * evidence).softmax(1), labels
    return found


def about(number: int) -> dict[str, Any]:
    cost = {"train_seconds": 3.0 + number, "answer_seconds": 0.01 * (1 + number)}
    later = {"fit_seconds": 0.5 + number} if number != 1 else {}  # an older folder has none
    return {"seed": number, "trial": {"lr": 0.01}, "parameters": 1200, "draws": 4, **cost, **later,
            "peak_bytes": (7 - number) * 10**6, "widths": {"lm_head": 0.25 * number}}  # fmt: skip


def write(folder: Path) -> tuple[dict[str, list[Path]], Found]:
    """Folders of answers by method, and what they hold."""
    folders: dict[str, list[Path]] = {}
    found: Found = {}
    for method, (_noise, _factor, numbers) in MADE.items():
        for number in numbers:
            path = folder / method / str(number)
            path.mkdir(parents=True)
            (path / "answers.json").write_text(json.dumps(about(number)))
            own = answers(method, number)
            for name, (probs, labels) in own.items():
                surprise = metrics.entropy(probs)
                tensors = {"probs": probs, "labels": labels, "entropy": surprise,
                           "mutual_information": surprise.square()}  # fmt: skip
                save_tensors(path / f"{name}.safetensors", tensors.items())
            folders.setdefault(method, []).append(path)
            found.setdefault(method, {})[number] = own
    for method in MADE:  # with the temperature that fits the replicate's own validation split
        for number, own in list(found[method].items()):
            probs, labels = own["validation"]
            T = metrics.fit_temperature(probs.log(), labels)
            warm = {n: (metrics.apply_temperature(p, T), y) for n, (p, y) in own.items()}
            found.setdefault(method + SCALED, {})[number] = warm
    return folders, found


def scores_of(probs: Tensor, labels: Tensor, bins: int) -> dict[str, float]:
    return reference.scores(probs, labels) | {"ece": reference.ece(probs, labels, bins)}


def study(_: Op, device: torch.device) -> Errors:
    """A study's averages and verdicts; and sets that replicates answered differently."""
    with tempfile.TemporaryDirectory() as name:
        with mock.patch.object(os, "fsync"):  # which is slow, and these files are read at once
            folders, found = write(Path(name))
        results = summary(folders, VALIDATION, 6, ("other",), ("harder",), FAMILIES)
        yield from page(folders, found, results)
        probs, labels = found["ours"][1]["harder"]
        others = {"probs": probs, "labels": (labels + 1) % CLASSES}
        save_tensors(Path(name) / "ours/1/harder.safetensors", others.items())
        for ours in (folders["ours"], folders["ours"][1:2]):  # of one method, and of two
            both = {"ours": ours, "wild": folders["wild"]}
            yield refused(partial(summary, both, VALIDATION, 6, (), ["harder"]), "different quest")
    yield from averages(found, results["methods"])
    yield from verdicts(found, results)


def averages(found: Found, rows: dict[str, Any]) -> Errors:
    """Means, deviations, costs and other sets of each method, over its replicates."""
    yield exact(rows.keys() == found.keys(), f"methods {sorted(rows)}")
    for method, row in rows.items():
        for told, part in (("test", row), ("harder", row["shifted"]["harder"])):
            each = {n: scores_of(*own[told], 6) for n, own in found[method].items()}
            for score in metrics.SCORES:
                case, values = f"{method}, {told}: {score}", [s[score] for s in each.values()]
                yield near_sum(part[score], fmean(values), case)
                deviation = stdev(values) if len(values) > 1 else 0.0
                yield near_sum(part["sd"][score], deviation, f"{case}, deviation")
                for one in part["replicates"]:
                    yield near_sum(one[score], each[one["replicate"]][score], f"{case}, {one}")
        numbers = list(found[method])
        costs = {"parameters": 1200, "draws": 4, "peak_bytes": (7 - min(numbers)) * 10**6,
                 "train_seconds": 3 + fmean(numbers),
                 "fit_seconds": fmean([0.0 if n == 1 else 0.5 + n for n in numbers]),
                 "answer_seconds": 0.01 * (1 + fmean(numbers))}  # fmt: skip
        for key, value in costs.items():
            yield near_sum(row[key], value, f"{method}: {key}")
        yield near_sum(row["widths"]["lm_head"], 0.25 * fmean(numbers), f"{method}: widths")
        yield exact(("ood" in row) == (SCALED not in method), f"{method}: other sets")
        for key, value in (apart(found[method]) if "ood" in row else {}).items():
            yield near_sum(row["ood"]["other"][key], value, f"{method}: {key}")


def apart(own: dict[int, dict[str, tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """Means over replicates of a set of which half of the labels are classes."""
    each = []
    for sets in own.values():
        inside, (outside, labels) = sets["test"][0], sets["other"]
        surprise = metrics.entropy(torch.cat((inside, outside)))
        area = reference.auroc(surprise, torch.arange(2 * ROWS) >= ROWS)
        known = [i for i, label in enumerate(labels.tolist()) if label < CLASSES]
        scores = scores_of(outside[known], labels[known], 6)
        both = dict.fromkeys(("auroc_entropy", "auroc_mutual_information"), area)
        each.append({**both, "scored": len(known) / ROWS, **scores})
    return {key: fmean([values[key] for values in each]) for key in each[0]}


def verdicts(found: Found, results: dict[str, Any]) -> Errors:
    """Who is compared, on which replicates, Holm's correction over whom, and in which words."""
    chosen = {"all": ("ours", ["wild", "sure", "twin"]), "few": ("second", ["wild", "alone"])}
    for on, part in (("test", results), ("harder", results["shifted"]["harder"])):
        place = iter(part["verdict"])
        for family, (ours, rivals) in chosen.items():
            for score, t in itertools.product(metrics.SCORES, ("", SCALED)):
                pairs = [(ours + t, rival + t) for rival in rivals]
                told = [next(place) for _ in pairs]
                yield exact(all(e["family"] == family for e in told), f"{on}: family {family}")
                yield from as_tested(found, on, score, pairs, told)
        yield exact(next(place, None) is None, f"{on}: more verdicts")
        place = iter(part["pairs"])
        own, others = ("ours", "second"), ("wild", "sure", "twin", "alone")
        for s, t in (("", ""), (SCALED, SCALED), ("", SCALED)):
            pairs = [(a + s, b + t) for a in own for b in others]
            yield from as_tested(found, on, "nll", pairs, [next(place) for _ in pairs])
        yield exact(next(place, None) is None, f"{on}: more pairs")
    words = {e["word"] for e in results["verdict"] + results["pairs"]}
    yield exact(words >= {"better", "not told apart", "untested"}, f"words {words}")


def as_tested(
    found: Found, on: str, score: str, pairs: Sequence[tuple[str, str]], told: Sequence[dict]
) -> Errors:
    """Each entry is the test of a pair on the replicates that both have, after Holm."""
    tests = []
    for first, second in pairs:
        numbers = sorted(found[first].keys() & found[second].keys())
        a, b = (torch.stack([metrics.per_question(*found[name][n][on], 6)[score] for n in numbers])
                if numbers else torch.zeros(0, ROWS) for name in (first, second))  # fmt: skip
        enough = len(numbers) > 1
        tests.append((difference(a, b), non_inferior(a, b, 0.03)) if enough else None)
        entry = told[len(tests) - 1]
        right = entry["ours"], entry["rival"], entry["score"], entry["replicates"]
        case = f"{on}, {score}: {first} and {second}"
        yield exact(right == (first, second, score, len(numbers)), f"{case}: {right}")
    done = [i for i, test in enumerate(tests) if test]
    p = holm([tests[i][0].p for i in done])  # type: ignore[index]
    within = holm([tests[i][1].p for i in done])  # type: ignore[index]
    after = {i: both for i, *both in zip(done, p, within, strict=True)}
    for i, (entry, test) in enumerate(zip(told, tests, strict=True)):
        case = f"{on}, {score}: {entry['ours']} and {entry['rival']}"
        if test is None:
            yield exact(entry["word"] == "untested" and "p" not in entry, f"{case}: {entry}")
            continue
        of_p, of_margin = after[i]
        values = {"difference": test[0].mean, "low": test[0].low, "high": test[0].high, "p": of_p}
        if score == "nll":
            values |= {"limit": test[1].limit, "p_margin": of_margin}
        for key, value in values.items():
            yield near_sum(entry[key], value, f"{case}: {key}")
        larger = test[0].mean > 0
        word = "better" if larger == (score == "acc") else "worse"
        if of_p >= 0.05:
            word = "no worse" if score == "nll" and of_margin < 0.05 else "not told apart"
        yield exact(entry["word"] == word, f"{case}: {entry['word']}, not {word}")


def page(folders: dict[str, list[Path]], found: Found, results: dict[str, Any]) -> Errors:
    """What the page of a study is given: all replicates together, spreads, tables, plots."""
    facts = {"model": "a/base", "train": "a/rows.csv", "limit": 9, "samples": 4, "bins": 6,
             "ood": ["other"]}  # fmt: skip
    given: list[dict[str, Any]] = []
    with mock.patch.object(tables, "write_report", lambda path, page: given.append(page)):
        own = {name: folders[name] for name in ("ours", "sure")}
        tables.write_page(Path("page.html"), {**results, "study": facts}, own)
    about = {"model": "base", "data": "rows.csv", "training examples": 9, "replicates": 3,
             "samples": 4, "bins": 6}  # fmt: skip
    yield exact(given[0]["about"] == about, f"facts {given[0]['about']}")
    for model in given[0]["models"]:
        each = [found[model["name"]][n]["test"] for n in MADE[model["name"]][2]]
        yield exact(torch.equal(model["probs"], torch.cat([p for p, _ in each])), "all answers")
        yield exact(torch.equal(model["labels"], torch.cat([y for _, y in each])), "all labels")
        scores = [scores_of(p, y, 6) for p, y in each]
        for name in metrics.SCORES:
            values = [one[name] for one in scores]
            yield near_sum(model["metrics"][name], fmean(values), f"{name} of {model['name']}")
            ends = zip(model["intervals"][name], (min(values), max(values)), strict=True)
            for got, right in ends:
                yield near_sum(got, right, f"spread of {name}")
    parts = (["All scores"], "test set"), (["Shifted: harder"], "harder")
    titles = []
    for begin, on in parts:
        titles += begin
        for ours, family in (("ours", "all"), ("second", "few")):
            titles += [f"{ours}{t} on the {on}, among {family}" for t in ("", SCALED)]
        titles += [f"All pairs on the {on}"]
    titles += ["Out of distribution: other", "Cost"]
    sheets = {sheet["title"]: sheet for sheet in given[0]["tables"]}
    yield exact(list(sheets) == titles, f"tables {list(sheets)}")
    some = [title for title in (*titles[:6], *titles[-2:]) if title in sheets]
    lengths = [len(sheets[title]["rows"]) for title in some]
    yield exact(lengths == [12, 3, 3, 2, 2, 24, 6, 6], f"rows {lengths}")
    first, second = given[0]["plots"]
    rows = results["methods"]
    yield exact(first["series"] == [(n, [(r["ece"], r["acc"])]) for n, r in rows.items()], "ECE")
    widths = [(name, [(0, rows[name]["widths"]["lm_head"])]) for name in MADE]
    yield exact(second["series"] == widths, f"widths {second['series']}")


def printed(_: Op, device: torch.device) -> Errors:
    """Tables of numbers that are given: cells, the sentence of a family, and what is left out."""
    each = {"acc": 0.75, "ece": 0.0625, "nll": 0.5, "brier": 0.25}
    row = {"trial": {"lr": 0.01}, "parameters": 12345, "draws": None, "train_seconds": 61.25,
           "fit_seconds": 0.0, "answer_seconds": 0.0123, "peak_bytes": 5_600_000,
           **each, "sd": {key: value / 100 for key, value in each.items()}}  # fmt: skip
    other = {"auroc_entropy": 0.625, "auroc_mutual_information": 0.5, "acc": 0.25}
    shifted = {"harder": {**{k: v / 2 for k, v in each.items()}, "sd": each}}
    rows = {"ours": {**row, "shifted": shifted, "ood": {"far": other}},
            "ours + temperature": {**row, "shifted": shifted}}  # fmt: skip
    pair = {"family": "all", "ours": "ours", "replicates": 3, "difference": -0.125, "low": -0.25,
            "high": 0.0625, "p": 0.0123}  # fmt: skip
    words = {"one": "better", "two": "worse", "three": "not told apart", "four": "better"}
    verdict = [{**pair, "rival": rival, "score": score, "word": word}
               for score in metrics.SCORES for rival, word in words.items()]  # fmt: skip
    verdict += [{"family": "all", "ours": "ours", "rival": "none", "replicates": 1, "score": score,
                 "word": "untested"} for score in metrics.SCORES]  # fmt: skip
    results = {"methods": rows, "verdict": verdict, "study": {"ood": ["far"]},
               "shifted": {"harder": {"verdict": verdict[:1] * 0}}}  # fmt: skip
    text = tables.table(results)
    scores = "0.750 ± 0.007 | 0.062 ± 0.001 | 0.500 ± 0.005 | 0.250 ± 0.003"
    cell = "-0.125 (-0.250 to +0.062; p 0.012): "
    for line in (
        "| method | trial | ACC | ECE | NLL | Brier | parameters | draws | train s | fit s | "
        "answer ms | peak MB |",
        f"| ours | lr 0.01 | {scores} | 12,345 |  | 61.2 | 0.0 | 12.3 | 6 |",
        "| ours | 0.375 ± 0.750 | 0.031 ± 0.062 | 0.250 ± 0.500 | 0.125 ± 0.250 |",
        f"| one | 3 | {' | '.join([cell + 'better'] * 4)} |",
        f"| none | 1 | {' | '.join(['untested'] * 4)} |",
        "| ours | 0.625 | 0.500 | 0.250 |  |  |  |",
        "Among all: ours, chosen on the validation split, is in NLL better than one, four; "
        "not told apart from three; worse than two; untested against none.",
    ):
        yield exact(line in text.splitlines(), f"the line {line!r}")
    yield exact(text.count("| ours + temperature |") == 2, "temperatures stand in two tables")


STUDY_CHECKS = [
    Check("a study", "means over replicates, costs; Holm within a family, words", study),
    Check("tables of a study", "cells and sentences of given numbers", printed),
]
