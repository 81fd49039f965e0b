"""`scalabl posterior`: what the runs must have, and what the posterior keeps of them."""

from __future__ import annotations

import json

import pytest

from scalabl_ref.app.cli import posterior

from ...ranks import on_ranks
from ..commands import TRAIN, contents, facts, ok, refused, scores


def test_a_posterior_keeps_its_runs_prompt_template(work, capsys):
    """Fitted with it, on any data; runs that differ in it are no ensemble."""
    (work / "own.txt").write_text("{question} Well:")
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    whole = [{**row, "prompt": row["prompt"] + " Well:", "choices": [*"ABC"]} for row in rows]
    (work / "whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    ok(f"{TRAIN} --method mle --prompt-template own.txt", capsys)
    ok(f"{TRAIN} --method mle".replace("train.jsonl", "whole.jsonl") + " --out whole", capsys)
    precisions = [
        ok(f"posterior laplace --run {run} --out {run}{i}{data}", capsys)["precision"]
        for i, data in enumerate(("", " --data {}.jsonl"))
        for run, data in (("run", data.format("train")), ("whole", data.format("whole")))
    ]
    assert len(set(precisions)) == 1
    evaluate = "evaluate --samples 2 --run {}0 --data {}.jsonl"
    pairs = (("run", "train"), ("whole", "whole"))
    ours, theirs = (scores(evaluate.format(*pair), capsys) for pair in pairs)
    assert ours.pop("prompt_template") == "{question} Well:"
    assert theirs.pop("prompt_template") is None and ours == theirs
    ensemble = "posterior ensemble --run run whole --out both"
    assert "differs from run in prompt_template: they make no ensemble" in refused(ensemble, capsys)


def test_draws_of_a_posterior_have_no_design(work, capsys):
    for seed, out in enumerate("ab"):
        ok(f"{TRAIN} --method mle --seed {seed}".replace("run", out), capsys)
    ok("posterior ensemble --run a b --out both", capsys)
    words = refused("evaluate --run both --data test.jsonl --design latin", capsys)
    assert "draws of Ensemble are independent, not latin" in words


def test_a_tokenizer_with_other_letters_is_refused(work, capsys):
    """The head has kept the rows of the letters' tokens, by which nothing else can be answered."""
    ok(f"{TRAIN} --method mle", capsys)
    path = work / "model" / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["vocab"] = {k: 255 - i for k, i in record["model"]["vocab"].items()}
    path.write_text(json.dumps(record))
    for command in (
        "evaluate --data test.jsonl",
        "posterior laplace --out x",
        "posterior tfb --out x",
    ):
        said = refused(f"{command} --run run", capsys)
        assert "the tokenizer gives the class tokens" in said
    assert not (work / "x").exists()


# --- subspace -------------------------------------------------------------------------------------

SUBSPACE = "posterior subspace --run run --out new"
METHODS = ("mle", "map", "dropout", "scalabl", "scalabl --covariance full", "blob", "point")


@pytest.mark.parametrize("method", METHODS)
def test_the_scales_of_any_run_get_a_posterior(method, work, capsys):
    """The mean answers as before, draws as they are integrated, and the run keeps its settings."""
    ok(f"{TRAIN} --method {method} --lr 0.05", capsys)
    before = scores("evaluate --run run --data test.jsonl --samples 0", capsys)
    made = ok(SUBSPACE, capsys)
    assert made["trained_as"] == method.split()[0] and made["scales"] == 10 == made["directions"]
    own, ours = facts(work / "run")["adapter"], facts(work / "new")["adapter"]
    assert ours == own | {"method": "point", "covariance": "diagonal"}
    mean, exact, drawn = (
        scores(f"evaluate --run new --data test.jsonl --samples {n}", capsys)
        for n in ("0", "exact", "4000")
    )
    assert mean["nll"] == pytest.approx(before["nll"], rel=1e-4)
    # 4000 draws of probabilities: their averages are off by at most some 1 / sqrt(4000) each.
    assert drawn["nll"] == pytest.approx(exact["nll"], abs=0.05) and exact["nll"] != mean["nll"]
    answer = ok("predict --run new --prompt x --choices a b c --samples exact", capsys)
    assert 0 < answer["mutual_information"] < answer["entropy"]


def test_the_precision_comes_from_the_evidence_a_number_or_held_out_questions(work, capsys):
    ok(f"{TRAIN} --method mle --lr 0.05 --holdout 0.5", capsys)
    made = {
        name: ok(f"{SUBSPACE}-{name} {more}", capsys)
        for name, more in (
            ("evidence", ""),
            ("target", "--groups target"),
            ("layer", "--groups layer --directions 3"),
            ("number", "--precision 2.5"),
            ("heldout", "--precision validation"),
            ("file", "--precision validation --validation test.jsonl --groups target"),
            ("sampled", "--predicts sampled"),
        )
    }
    counts = {name: len(of["precision"]) for name, of in made.items()}
    assert counts == {"target": 3, "layer": 5, "file": 3} | dict.fromkeys(
        ("evidence", "number", "heldout", "sampled"), 1
    )
    assert made["number"]["precision"] == {"all layers": 2.5}
    evidence = {name: of["log_evidence"] for name, of in made.items()}
    assert evidence["layer"] > evidence["target"] > evidence["evidence"] > evidence["number"]
    assert evidence["heldout"] < evidence["evidence"] == evidence["sampled"]
    factors = {made["file"]["precision"][n] / v for n, v in made["target"]["precision"].items()}
    assert max(factors) == pytest.approx(min(factors)) != 1
    assert made["layer"]["directions"] == 3
    command = "evaluate --data test.jsonl --samples 20 --run new-"
    nlls = {name: scores(command + name, capsys)["nll"] for name in made}
    assert len(set(nlls.values())) == len(nlls)
    words = refused("evaluate --run new-sampled --data test.jsonl --samples exact", capsys)
    assert "exact prediction needs the subspace posterior to predict linear" in words


def test_the_mean_of_a_subspace_posterior_is_exported(work, capsys):
    ok(f"{TRAIN} --method dropout --lr 0.05", capsys)
    ok(SUBSPACE, capsys)
    ok("export --run new --to peft --out peft", capsys)
    card = (work / "peft" / "README.md").read_text()
    assert "the mean of a subspace run" in card and "without its uncertainty" in card
    assert "- method: dropout" in card and "- posterior: subspace" in card
    ok("import peft --from peft --model model --out back --method mle", capsys)
    made = ok(f"{SUBSPACE.replace('run run', 'run back')}2 --data train.jsonl", capsys)
    assert made["log_evidence"] == pytest.approx(facts(work / "new")["log_evidence"], rel=1e-4)
    words = refused("export --run new --to peft --out no --samples 2", capsys)
    assert "export its mean" in words


def test_questions_per_pass_and_the_seed_are_the_commands(work, capsys, monkeypatch):
    ok(f"{TRAIN} --method mle --lr 0.05 --holdout 0.5", capsys)
    sizes, seeds = [], []
    batched, chosen = posterior.evaluation_batches, posterior.validated

    def batches(encoded, size):
        sizes.append(size)
        return batched(encoded, size)

    def validated(made, model, held_out, seed):
        seeds.append(seed)
        return chosen(made, model, held_out, seed)

    monkeypatch.setattr(posterior, "evaluation_batches", batches)
    monkeypatch.setattr(posterior, "validated", validated)
    ok(f"{SUBSPACE} --precision validation --validation test.jsonl --batch 3 --seed 7", capsys)
    assert sizes == [3, 3] and seeds == [7]


def made_on_a_rank(folder):
    import os

    from scalabl_ref.app import cli

    os.chdir(folder)
    return cli.main([*SUBSPACE.split(), "--batch", "5"])


def test_ranks_share_the_questions(work, capsys, threads):
    """Of five batches, three have two and two have one; H is a sum in another order."""
    threads(1)  # as a rank has: with two, sums of float32 round otherwise
    ok(f"{TRAIN} --method mle --lr 0.05", capsys)
    assert on_ranks(3, made_on_a_rank, work) == [0, 0, 0]
    alone = ok(f"{SUBSPACE}-alone --batch 5", capsys)
    shared = facts(work / "new")
    assert shared["log_evidence"] == pytest.approx(alone["log_evidence"], rel=1e-12)
    assert {*contents(work / "new")} == {
        name.replace("-alone", "") for name in contents(work / "new-alone")
    }
