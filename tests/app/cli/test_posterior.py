"""`scalabl posterior`: what the runs must have, and what the posterior keeps of them."""

from __future__ import annotations

import json

from ..commands import TRAIN, ok, refused, scores


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
