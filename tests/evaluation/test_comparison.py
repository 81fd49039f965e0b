"""Results of a study: replicates are paired, and words follow the tests."""

from __future__ import annotations

import json
import math

import pytest
import torch

from scalabl_ref import InputError, metrics
from scalabl_ref.evaluation import tables
from scalabl_ref.evaluation.comparison import summary
from scalabl_ref.evaluation.inference import difference, holm, non_inferior
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..tolerances import rounding

QUESTIONS, CLASSES = 150, 3
SETS = ("validation", "test", "harder", "other")


def replicate(folder, number, noise, gain, luck=0):
    """A folder of answers: evidence for the label, seen with `noise`, times a confidence `gain`."""
    folder.mkdir(parents=True)
    for k, name in enumerate(SETS):
        shared, own = (torch.Generator().manual_seed(seed) for seed in (k, 100 * number + k + luck))
        labels = torch.randint(CLASSES, (QUESTIONS,), generator=shared)
        evidence = torch.randn(QUESTIONS, CLASSES, generator=shared).double()
        evidence += 2 * torch.eye(CLASSES)[labels]
        evidence += noise * torch.randn(QUESTIONS, CLASSES, generator=own)
        probs = (gain * evidence).softmax(1)
        tensors = {"probs": probs, "entropy": metrics.entropy(probs), "labels": labels,
                   "mutual_information": metrics.entropy(probs) / 2}  # fmt: skip
        save_tensors(folder / f"{name}.safetensors", tensors.items())
    about = {"seed": number, "trial": {"lr": 0.01}, "parameters": 10 + number, "draws": 4,
             "train_seconds": 3.0 + number, "fit_seconds": 0.5 + number,
             "answer_seconds": 0.1 + number, "peak_bytes": 5 - number,
             "widths": {"lm_head": 0.25 * number}}  # fmt: skip
    (folder / "answers.json").write_text(json.dumps(about))
    return folder


def method(folder, noise, gain=1.0, numbers=(0, 1, 2), luck=0):
    return [replicate(folder / str(n), n, noise, gain + 0.02 * n, luck) for n in numbers]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of ours and three rivals: much worse, hardly different, and overconfident."""
    folder = tmp_path_factory.mktemp("answers")
    return {
        "ours": method(folder / "ours", 0.5),
        "wild": method(folder / "wild", 2.0),
        "twin": method(folder / "twin", 0.5, numbers=(2, 0, 1), luck=10),
        "sure": method(folder / "sure", 0.5, 4.0, numbers=(0, 2)),
        "second": method(folder / "second", 0.6),
    }


VALIDATION = {"second": 0.5, "ours": 0.4}
FAMILIES = {
    "all": ["ours", "wild", "twin", "sure", "second"],
    "few": ["second", "twin", "wild"],
    "the same": ["wild", "ours", "twin", "sure", "second"],
    "rivals": ["wild", "twin"],
}


@pytest.fixture(scope="module")
def results(models):
    found = summary(models, VALIDATION, 15, ("other",), ("harder",), FAMILIES)
    return {"study": {"ood": ["other"]}, **found}


def matrix(folders, name, score, numbers):
    by_number = {json.loads((f / "answers.json").read_text())["seed"]: f for f in folders}
    rows = []
    for number in numbers:
        answers = load_tensors(by_number[number] / f"{name}.safetensors")[0]
        rows.append(metrics.per_question(answers["probs"], answers["labels"])[score])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["test", "harder"])
@pytest.mark.parametrize("score", metrics.SCORES)
def test_a_verdict_is_the_test_of_common_replicates_after_holm(models, results, name, score):
    part = results if name == "test" else results["shifted"][name]
    entries = [e for e in part["verdict"] if e["score"] == score][:3]
    assert [e["rival"] for e in entries] == ["wild", "twin", "sure"]
    assert [e["replicates"] for e in entries] == [3, 3, 2]
    p, p_margin = [], []
    for entry in entries:
        numbers = (0, 2) if entry["rival"] == "sure" else (0, 1, 2)
        pair = [matrix(models[m], name, score, numbers) for m in ("ours", entry["rival"])]
        d = difference(*pair)
        assert (entry["difference"], entry["low"], entry["high"]) == d[:3]
        p.append(d.p)
        if score == "nll":
            assert entry["limit"] == non_inferior(*pair).limit
            p_margin.append(non_inferior(*pair, 0.03).p)
    assert [e["p"] for e in entries] == holm(p)
    assert [e["p_margin"] for e in entries if "p_margin" in e] == holm(p_margin)


def test_words_follow_the_tests(results):
    words = {(e["ours"], e["rival"]): e["word"] for e in results["verdict"] if e["score"] == "nll"}
    assert words["ours", "wild"] == "better" and words["ours", "twin"] == "no worse"
    assert words["ours", "sure"] == "not told apart"  # two replicates: t is 12.7
    assert words["ours + temperature", "sure + temperature"] == "no worse"
    better = {e["rival"]: e for e in results["verdict"] if e["score"] == "acc"}["wild"]
    assert better["difference"] > 0 and better["word"] == "better"
    said = tables.sentences(results)[1]
    assert said == (
        "Among all: ours, chosen on the validation split, is in NLL better than wild; no worse "
        "than twin; not told apart from sure."
    )


def test_a_family_has_its_own_choice_and_its_own_correction(models, results):
    """Each by the least NLL in it, against its rivals alone; the same comparison only once."""
    found = [
        (e["family"], e["ours"], e["rival"]) for e in results["verdict"] if e["score"] == "nll"
    ]
    plain = [(family, ours, rival) for family, ours, rival in found if "temp" not in ours]
    assert plain == [("all", "ours", "wild"), ("all", "ours", "twin"), ("all", "ours", "sure"),
                     ("few", "second", "twin"), ("few", "second", "wild")]  # fmt: skip
    assert len(found) == 2 * len(plain)
    p = [
        difference(*(matrix(models[m], "test", "nll", (0, 1, 2)) for m in ("second", rival))).p
        for rival in ("twin", "wild")
    ]
    got = [e["p"] for e in results["verdict"] if e["family"] == "few" and e["score"] == "nll"]
    assert got[:2] == holm(p)


def test_a_rival_that_is_better_makes_ours_worse(models):
    found = summary({"wild": models["wild"], "ours": models["ours"]}, {"wild": 0.1}, 15)
    assert {e["word"] for e in found["verdict"] if e["score"] in ("acc", "nll")} == {"worse"}


def test_all_pairs_are_one_family(models, results):
    """Six pairs of ours and rivals without temperature: their p is that of six tests."""
    plain = [e for e in results["pairs"] if "temperature" not in e["ours"]]
    pairs = [e for e in plain if "temperature" not in e["rival"]]
    assert (
        len(plain) == 2 * len(pairs) and len(pairs) == 6 and {e["score"] for e in pairs} == {"nll"}
    )
    p = []
    for e in pairs:
        numbers = (0, 2) if e["rival"] == "sure" else (0, 1, 2)
        p.append(
            difference(*(matrix(models[e[m]], "test", "nll", numbers) for m in ("ours", "rival"))).p
        )
    assert [e["p"] for e in pairs] == holm(p)


def test_one_common_replicate_or_question_is_no_test(models, tmp_path):
    one = {"ours": models["ours"], "rival": method(tmp_path / "rival", 2.0, numbers=(1,))}
    found = summary(one, {"ours": 0.1}, 15)
    assert {e["word"] for e in found["verdict"]} == {"untested"}
    assert all("p" not in e and e["replicates"] == 1 for e in found["verdict"])
    assert "untested against rival" in tables.sentences(found)[1]
    assert "untested" in tables.table({"study": {"ood": []}, **found})


def test_replicates_of_other_questions_are_refused(models, tmp_path):
    strange = replicate(tmp_path / "x", 7, 0.5, 1.0)
    answers = {"probs": torch.full((5, 2), 0.5), "labels": torch.zeros(5).long()}
    save_tensors(strange / "test.safetensors", answers.items())
    with pytest.raises(InputError, match="answer different questions of 'test'"):
        summary({"ours": [models["ours"][0], strange]}, {}, 15)
    with pytest.raises(InputError, match="'a' and 'b' answered different questions"):
        summary({"a": models["ours"], "b": [strange]}, {"a": 0.1}, 15)


def test_a_row_is_the_mean_over_replicates(models, results):
    for name, wanted in (("test", results["methods"]["sure"]),
                         ("harder", results["methods"]["sure"]["shifted"]["harder"])):  # fmt: skip
        each = [matrix(models["sure"], name, "nll", (n,)).mean() for n in (0, 2)]
        assert [r["replicate"] for r in wanted["replicates"]] == [0, 2]
        near = 8 * rounding(torch.float64, QUESTIONS)
        assert math.isclose(wanted["nll"], float(sum(each)) / 2, rel_tol=near)
        assert math.isclose(wanted["sd"]["nll"], abs(float(each[0] - each[1])) / 2**0.5,
                            rel_tol=1e-9)  # fmt: skip  # a difference loses some of 16 digits
    about = results["methods"]["ours"]
    cost = (about["draws"], about["train_seconds"], about["fit_seconds"], about["answer_seconds"])
    assert cost == (4, 4.0, 1.5, pytest.approx(1.1))
    assert about["peak_bytes"] == 5 and about["widths"] == {"lm_head": 0.25}
    assert about["parameters"] == 10 and about["trial"] == {"lr": 0.01}


def test_temperature_is_fitted_on_the_validation_answers_of_each_replicate(models, results):
    scaled = results["methods"]["sure + temperature"]["replicates"]
    for folder, got in zip(models["sure"], scaled, strict=True):
        held, test = (load_tensors(folder / f"{n}.safetensors")[0] for n in ("validation", "test"))
        temperature = metrics.fit_temperature(held["probs"].log(), held["labels"])
        probs = metrics.apply_temperature(test["probs"], temperature)
        assert got["nll"] == metrics.nll(probs, test["labels"]) and temperature > 2


def test_rows_that_cannot_be_answered_are_not_scored(models, tmp_path):
    """Those with a label that is none of the model's classes: a third of them, then all."""
    (folder,) = method(tmp_path / "ours", 0.5, numbers=(0,))
    answers = load_tensors(folder / "other.safetensors")[0]
    rows = []
    for strange in (slice(0, 50), slice(0, 150)):
        labels = answers["labels"].clone()
        labels[strange] = CLASSES
        save_tensors(folder / "other.safetensors", {**answers, "labels": labels}.items())
        rows.append(summary({"ours": [folder]}, {}, 15, ("other",))["methods"]["ours"]["ood"])
    first, second = (row["other"] for row in rows)
    assert first["scored"] == pytest.approx(2 / 3) and second["scored"] == 0
    assert first["nll"] == metrics.nll(answers["probs"][50:], answers["labels"][50:])
    assert set(second) == {"auroc_entropy", "auroc_mutual_information", "scored"}
    inside = load_tensors(folder / "test.safetensors")[0]["entropy"]
    foreign = torch.arange(2 * QUESTIONS) // QUESTIONS
    auroc = metrics.auroc(torch.cat((inside, answers["entropy"])), foreign)
    assert first["auroc_entropy"] == second["auroc_entropy"] == auroc != 0.5


def test_the_tables_have_every_part(results):
    text = tables.table(results)
    for part in ("Shifted, harder:", "Out of distribution, other:", "Among few, second less"):
        assert part in text
    assert "**" not in text and text.count("): no worse |") >= 2
