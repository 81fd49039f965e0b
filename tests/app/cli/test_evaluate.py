"""`scalabl evaluate`: results, where they lie, and whose they are."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

from scalabl_ref.app import cli
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation.evaluate import results_folder
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ...models import questions_file
from ...support.test_fields import strict
from ...tolerances import rounding
from ..commands import TRAIN, contents, ok, refused, run

RESULTS = ("metrics.json", "predictions.jsonl", "report.html")


def results(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.mark.parametrize("method", ["scalabl", "mle", "blob"])
def test_train_evaluate_predict(work, capsys, method):
    result = ok(f"{TRAIN} --method {method} --holdout 0.25", capsys)
    assert result["steps"] == 6 and result["examples"] == 18
    log = [json.loads(line) for line in (work / "run" / "train.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(6))

    metrics = ok(
        "evaluate --run run --data test.jsonl --ood train.jsonl --samples 4 --temperature", capsys
    )
    assert metrics == json.loads((work / "run" / "metrics.json").read_text())
    assert metrics["method"] == method and metrics["n"] == 9 and metrics["bins"] == 15
    assert metrics["kl"] == (None if method == "mle" else "forward")
    assert {"acc", "ece", "nll", "brier", "samples"} <= metrics.keys()
    assert metrics["temperature"]["n_fit"] == 6 and metrics["temperature"]["value"] > 0
    assert metrics["ood"]["n"] == 24
    assert {"auroc_entropy", "auroc_mutual_information", "ece"} <= metrics["ood"].keys()
    for name, (low, high) in metrics["intervals"].items():
        assert low <= high and math.isfinite(high), name

    rows = [json.loads(line) for line in (work / "run/predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(9)]
    right = [row["prediction"] == row["label"] for row in rows]
    assert metrics["acc"] == sum(right) / 9
    nll = -sum(math.log(row["probs"][row["label"]]) for row in rows) / 9
    assert math.isclose(metrics["nll"], nll, rel_tol=rounding(torch.float64, 32))
    if method == "mle":
        assert all(row["mutual_information"] == 0 for row in rows)
    assert "<svg" in (work / "run" / "report.html").read_text()

    answer = ok("predict --run run --prompt hello --choices one two three --samples 4", capsys)
    assert math.isclose(sum(answer["probs"]), 1.0, rel_tol=rounding(torch.float64, 32))
    assert answer["entropy"] >= answer["expected_entropy"]


def test_an_infinite_nll_is_null_in_json(work, capsys):
    """Of a model that is sure and wrong; people read "inf", and the card and the page know it."""
    path = work / "model" / "model.safetensors"
    tensors = dict(load_tensors(path)[0])
    one, *others = load_tokenizer("model").class_token_ids(3, "\nAnswer:")
    head = tensors["lm_head.weight"] * 5000
    head[others] = -head[one]
    save_tensors(path, {**tensors, "lm_head.weight": head}.items())
    ok(TRAIN + " --lr 1e-9", capsys)
    evaluate = "evaluate --run run --data test.jsonl --samples 2 --ood train.jsonl"
    code, out, err = run(evaluate + " --json", capsys)
    assert code == 0, err
    result = strict(out)
    assert result["nll"] is None and result["ood"]["nll"] is None and 0 < result["acc"] < 1
    assert strict((work / "run" / "metrics.json").read_text()) == result
    rows = (work / "run" / "predictions.jsonl").read_text().splitlines()
    assert {strict(row)["entropy"] for row in rows} == {0.0}
    assert "∞" in (work / "run" / "report.html").read_text()
    code, out, _ = run(evaluate, capsys)
    assert code == 0 and " inf [" in out
    ok("export --run run --to peft --out adapter", capsys)
    assert " | inf | " in (work / "adapter" / "README.md").read_text()
    for command in ("predict --run run --prompt hello --choices one two three", evaluate):
        assert "-0.0" not in run(command, capsys)[1]


def test_each_data_set_has_results_of_its_own(work, capsys):
    """In a folder of its name; those of the last evaluation lie in the run as well."""
    ok(TRAIN, capsys)
    for name in ("test", "train", "test"):
        metrics = ok(f"evaluate --run run --data {name}.jsonl --samples 2", capsys)
        digest = hashlib.sha256((work / f"{name}.jsonl").read_bytes()).hexdigest()
        assert (metrics["data"], metrics["data_sha256"]) == (f"{name}.jsonl", digest)
        assert metrics["limit"] is None
        assert json.loads((work / "run" / name / "metrics.json").read_text()) == metrics
        assert results(work / "run" / name) == results(work / "run")
    assert results(work / "run" / "train") != results(work / "run")
    before = contents(work / "run")
    metrics = ok("evaluate --run run --data test.jsonl --out elsewhere --limit 4", capsys)
    assert metrics["limit"] == 4 and contents(work / "run") == before
    assert sorted(path.name for path in (work / "elsewhere").iterdir()) == sorted(RESULTS)


@pytest.mark.parametrize(
    ("data", "name"),
    [("a/b.c.jsonl", "b_c"), ("checkpoint.jsonl", "checkpoint_data"), ("x/..", ".."),
     ("Où  est-ce?.jsonl", "Où_est-ce"), ("....jsonl", "data"), (".lock", "lock")],
)  # fmt: skip
def test_a_data_sets_folder_is_called_as_its_file(tmp_path, monkeypatch, data, name):
    monkeypatch.chdir(tmp_path)
    name = tmp_path.name if name == ".." else name
    assert results_folder("run", data) == Path("run") / name


def test_others_results_are_not_written_over(work, capsys):
    """Which is said before the base is read; --force writes, and --out elsewhere."""
    ok(TRAIN, capsys)
    ok(TRAIN.replace("--out run", "--out next") + " --seed 1", capsys)
    questions_file(work / "other" / "test.jsonl", rows=5)
    evaluate = "evaluate --run run --data test.jsonl --samples 2"
    first = ok(evaluate, capsys)
    before = contents(work)
    (work / "model").rename(work / "gone")
    said = refused(evaluate.replace("test", "other/test"), capsys)
    assert said.startswith("error: run/test: holds results of another data file"), said
    assert said.endswith(": give --force or --out DIR\n")
    said = refused(evaluate.replace("--run run", "--run next --out run/test"), capsys)
    assert said.startswith("error: run/test: holds results of another run"), said
    said = refused("evaluate --model gone --data test.jsonl --out run/test", capsys)
    assert said.startswith("error: run/test: holds results of another run"), said
    (work / "gone").rename(work / "model")
    assert contents(work) == before
    assert ok(evaluate, capsys) == first and contents(work) == before
    assert ok(f"{evaluate} --seed 1 --bins 10", capsys)["seed"] == 1, "its own may be renewed"
    assert ok(evaluate.replace("test", "other/test") + " --force", capsys)["n"] == 5
    ok("evaluate --model model --data test.jsonl --out both", capsys)
    again = "evaluate --model next/../gone --data test.jsonl --out both"
    (work / "model").rename(work / "gone")
    assert "both: holds results of another model" in refused(again, capsys)
    (work / "both" / "metrics.json").write_text("{}")
    assert "both: holds results of another data file" in refused(again, capsys)
    assert ok(f"{again} --force", capsys)["n"] == 9


def test_the_text_has_the_numbers_of_the_json(work, capsys):
    ok(f"{TRAIN} --holdout 0.25", capsys)
    evaluate = "evaluate --run run --data test.jsonl --ood train.jsonl --temperature --samples 3"
    found = ok(f"{evaluate} --bins 7 --batch 5", capsys)
    code, out, _ = run(f"{evaluate} --bins 7 --batch 5", capsys)
    assert code == 0 and found["bins"] == 7
    lines = out.splitlines()[-10:]
    columns = (found, found["temperature"], found["ood"])
    temperature = f"temperature {found['temperature']['value']:.3f}"
    heads = (found["method"], temperature, f"ood ({found['ood']['n_scored']} scored)")
    assert lines[0] == " " * 6 + "".join(f"{head:>24}" for head in heads)
    assert lines[1].split() == ["n", "9", "9", "24"]
    for line, key in zip(lines[2:6], ("acc", "ece", "nll", "brier"), strict=True):
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(part[key], *part["intervals"][key])
            for part in columns
        ]  # fmt: skip
        assert line == f"{key.upper():6}" + "".join(f"{cell:>24}" for cell in cells)
    assert lines[7:] == [
        f"AUROC, entropy: {found['ood']['auroc_entropy']:.4f}",
        f"AUROC, mutual information: {found['ood']['auroc_mutual_information']:.4f}",
        "written: run/test/metrics.json, predictions.jsonl, report.html",
    ]


def test_results_keep_the_settings_that_made_them(work, capsys, monkeypatch):
    ok(TRAIN, capsys)

    def digest(name: str) -> str:
        return hashlib.sha256((work / name).read_bytes()).hexdigest()

    evaluate = "evaluate --run run --data test.jsonl --samples 2 --limit 8 --bins 7 --seed 3"
    evaluate += " --ood train.jsonl --design latin --calibrate train.jsonl --max-length 99"
    found = ok(evaluate, capsys)
    own = {"labels": "letters", "answer_tokens": "bare", "label_names": None}
    wording = {key: found["settings"][key] for key in own}
    whole = {
        "data_sha256": digest("test.jsonl"), "model": None, "dtype": None,
        "adapter_sha256": digest("run/adapter.safetensors"), "posterior": None, "format": "jsonl",
        "limit": 8, "design": "latin", "seed": 3, "bins": 7, "temperature": True, "samples": 2,
        "calibrate_sha256": digest("train.jsonl"), "ood_sha256": digest("train.jsonl"),
        "ood_format": "jsonl", "max_length": 99, "drop_long": False, "prompt_template": None,
        "prompt_style": "plain", **wording,
    }  # fmt: skip
    assert found["settings"] == whole and found["n"] == found["ood"]["n"] == 8
    assert found["temperature"]["n_fit"] == 8
    found = ok("evaluate --model model --data test.jsonl --dtype bfloat16 --limit 7", capsys)
    assert found["settings"]["model"] == "model" and found["settings"]["dtype"] == "bfloat16"
    base = ok("evaluate --model model --data test.jsonl --limit 7 --out base", capsys)
    assert base["settings"]["dtype"] is None and base["nll"] != found["nll"]
    monkeypatch.chdir(work / "run")
    ok("evaluate --run . --data ../test.jsonl --samples 2 --out ../there", capsys)
    facts = re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", (work / "there/report.html").read_text())
    assert ("run", "run") in facts


def test_samples_zero_is_the_mean_model(work, capsys):
    ok(TRAIN + " --init-sigma 1", capsys)
    ok("evaluate --run run --data test.jsonl --samples 0", capsys)
    rows = [json.loads(line) for line in (work / "run/predictions.jsonl").read_text().splitlines()]
    assert all(row["mutual_information"] == 0 for row in rows)


def test_out_of_distribution_with_more_classes_is_scored_on_what_it_can_answer(work, capsys):
    questions_file(work / "wide.jsonl", rows=10, choices=3)
    questions_file(work / "train.jsonl", choices=2)
    questions_file(work / "test.jsonl", rows=9, choices=2)
    ok(TRAIN, capsys)
    ood = ok("evaluate --run run --data test.jsonl --ood wide.jsonl", capsys)["ood"]
    labels = [i * 5 % 3 for i in range(10)]
    assert ood["n"] == 10 and ood["n_scored"] == sum(label < 2 for label in labels)
    for asked in ("wide.jsonl", "test.jsonl --calibrate wide.jsonl"):
        said = refused(f"evaluate --run run --data {asked}", capsys)
        assert "example 1 (id 1): its answer is C, but there are 2 classes, to B" in said


def test_a_base_model_alone_answers_as_a_run_that_learnt_nothing(work, capsys):
    ok(TRAIN + " --lr 0 --method mle", capsys)
    run = ok("evaluate --run run --data test.jsonl", capsys)
    base = ok("evaluate --model model --data test.jsonl", capsys)
    assert base["method"] == "base" and base["samples"] == 0 and run["method"] == "mle"
    for key in ("n", "acc", "ece", "nll", "brier", "labels", "answer_tokens"):
        assert base[key] == run[key], key
    assert (work / "base-model/test/report.html").exists()
    assert "give --run, or --model" in refused("evaluate --data test.jsonl", capsys)
    assert "model: a base model has no held-out questions: give --calibrate" in refused(
        "evaluate --model model --data test.jsonl --temperature --out other", capsys
    )


def test_a_base_model_alone_asks_other_data_as_its_own(tickets, capsys):
    """Labels are words on --data, and so on --ood, where it would choose letters."""
    command = "evaluate --model model --data tickets.jsonl --ood train.jsonl"
    metrics = ok(command, capsys)
    assert metrics["labels"] == "words" and metrics["ood"]["n_scored"] == 0


def test_temperature_needs_held_out_rows(work, capsys):
    ok(TRAIN, capsys)
    command = "evaluate --run run --data test.jsonl --temperature"
    assert "was trained without --holdout" in refused(command, capsys)
    assert ok(command + " --calibrate train.jsonl", capsys)["temperature"]["n_fit"] == 24


def test_draws_of_a_design_and_as_many_as_needed(work, capsys):
    ok(TRAIN + " --init-sigma 2", capsys)
    evaluate = "evaluate --run run --data test.jsonl --force"
    designs = [
        ok(f"{evaluate} --samples 4 --design {design}", capsys)
        for design in ("independent", "antithetic", "latin")
    ]
    assert [result["design"] for result in designs] == ["independent", "antithetic", "latin"]
    assert len({result["nll"] for result in designs}) == 3
    assert "design" not in ok(f"{evaluate} --samples 0", capsys)
    auto = ok(f"{evaluate} --samples auto --tolerance 0.2 --most 5", capsys)
    assert "design" not in auto
    rows = [
        json.loads(row) for row in (work / "run" / "predictions.jsonl").read_text().split("\n")[:-1]
    ]
    draws = [row["draws"] for row in rows]
    assert auto["samples"] == "auto" and auto["auto"]["tolerance"] == 0.2
    assert auto["auto"]["mean_draws"] == sum(draws) / 9 and set(draws) == {4}
    # Four draws multiply no wealth by 2 / .05.
    assert auto["auto"]["open"] == [row["settled"] for row in rows].count(False) == 9
    predict = ["predict", "--run", "run", "--prompt", "3 x", "--choices", "no 0", "no 1", "no 2"]
    assert cli.main([*predict, "--samples", "auto", "--most", "9", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["samples"] == 8 and answer["settled"] in (True, False)
    assert "lm_head alone" in refused(f"{evaluate} --samples exact", capsys)
    ok(TRAIN.replace("run", "head") + " --targets lm_head --init-sigma 0.5", capsys)
    exact, many = (
        ok(f"evaluate --run head --data test.jsonl --samples {n} --design {design}", capsys)
        for n, design in (("exact", "independent"), ("1000", "latin"))
    )
    # 1,000 Latin draws are good to far better than a hundredth; test_quadrature has the bounds.
    assert "design" not in exact and many["design"] == "latin"
    assert exact["samples"] == "exact" and abs(exact["nll"] - many["nll"]) < 0.01 * many["nll"]
    assert "a number, auto or exact" in refused(f"{evaluate} --samples many", capsys)
    assert "need independent draws, not design 'latin'" in refused(
        f"{evaluate} --samples auto --design latin", capsys
    )
    assert "tolerance must lie" in refused(f"{evaluate} --samples auto --tolerance 2", capsys)
