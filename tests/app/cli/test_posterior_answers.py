"""`scalabl posterior`: what it writes answers as the method itself would, from the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from scalabl_ref import Noise, adapters, load_run
from scalabl_ref.core.objective import Batch, class_logits
from scalabl_ref.data import collate, encode, evaluation_batches, load, split
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation.answering import text_keys
from scalabl_ref.evaluation.predict import predict
from scalabl_ref.methods import Laplace, Swag, fit_tfb, load_posterior

from ...models import questions_file, tiny_folder
from ..commands import ok, refused
from ..commands import run as ran

TRAIN = "train --model model --data train.jsonl --steps 8 --batch 4 --rank 2 --lr 0.02"


@pytest.fixture
def work(tmp_path, monkeypatch, capsys):
    """Two runs of mle from different seeds, with SWAG's averages, and a test set."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    questions_file(tmp_path / "train.jsonl")
    questions_file(tmp_path / "test.jsonl", rows=9)
    for seed in (0, 1):
        ok(f"{TRAIN} --method mle --swag 0.5 --holdout 0.25 --seed {seed} --out run{seed}", capsys)
    return tmp_path


def probabilities(folder, capsys) -> torch.Tensor:
    """What `scalabl evaluate` writes for a run folder, with 4 draws of seed 0."""
    ok(f"evaluate --run {folder} --data test.jsonl --samples 4", capsys)
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["probs"] for line in lines], dtype=torch.float64)


def data(work, name: str, batch: int):
    encoded = encode(load(work / name, "jsonl"), load_tokenizer(work / "model"), classes=3)
    return list(evaluation_batches(encoded, batch))


def questions(work, model) -> Batch:
    """The test set as `evaluate` asks it: one batch, in the file's order, keyed by the texts."""
    encoded = encode(load(work / "test.jsonl", "jsonl"), load_tokenizer(work / "model"), classes=3)
    batch = collate(encoded, range(len(encoded.tokens)))
    return replace(batch, ids=text_keys(model, encoded.tokens))


def expected(work, model, posterior=None) -> torch.Tensor:
    return predict(model, questions(work, model), 4, 0, posterior=posterior).probs


def test_laplace(work, capsys):
    told = ok("posterior laplace --run run0 --data train.jsonl --out made", capsys)
    model, _ = load_run("run0")
    posterior = Laplace.fit(model, data(work, "train.jsonl", 8)).optimise_prior()
    assert told["precision"] == posterior.precision
    assert torch.equal(probabilities(work / "made", capsys), expected(work, model, posterior))
    assert json.loads((work / "made/metrics.json").read_text())["method"] == "laplace"
    assert told["curvature"] == "expand"
    precisions = {told["precision"]}
    for kind in ("last", "exact"):
        command = (
            f"posterior laplace --run run0 --data train.jsonl --curvature {kind} --out {kind}-token"
        )
        posterior = Laplace.fit(model, data(work, "train.jsonl", 8), curvature=kind)
        precision = ok(command, capsys)["precision"]
        assert precision == posterior.optimise_prior().precision
        precisions.add(precision)
    assert len(precisions) == 3
    given = ok("posterior laplace --run run0 --precision 2.5 --out given", capsys)
    assert given["precision"] == load_posterior("given", {"posterior": "laplace"}).precision == 2.5
    for precision, said in (("validation", "evidence or a number"), ("0", "a number above 0")):
        command = f"posterior laplace --run run0 --precision {precision} --out no"
        assert said in refused(command, capsys)
    rest, _ = split(load(work / "train.jsonl", "jsonl"), 0.25, 0)
    encoded = encode(rest, load_tokenizer(work / "model"), classes=3)
    for layers, rank in (("last", None), ("last", 2), ("all", 2)):
        more = f"--layers {layers} --out {layers}{rank}" + (f" --kron-rank {rank}" if rank else "")
        part = ok(f"posterior laplace --run run0 {more}", capsys)
        batches = list(evaluation_batches(encoded, 8))
        posterior = Laplace.fit(model, batches, layers, rank).optimise_prior()
        assert part["precision"] == posterior.precision not in precisions
        precisions.add(part["precision"])
    assert set(load_posterior("last2", {"posterior": "laplace"}).curvature) == {
        "lm_head.A", "lm_head.B"
    }  # fmt: skip


def test_a_posterior_names_the_runs_it_was_made_from(work, capsys):
    told = ok("posterior ensemble --run run0 run1 --out both", capsys)
    assert told == {"run": "both", "made_by": "ensemble", "from": ["run0", "run1"]}
    record = json.loads((work / "both" / "run.json").read_text())
    assert record["posterior"] == record["made_by"] == "ensemble"
    assert record["from"] == ["run0", "run1"]
    _, said, _ = ran("posterior swag --run run1 --out swag", capsys)
    assert said == "written: swag, a run for `evaluate` and `predict`\n"
    assert json.loads((work / "swag" / "run.json").read_text())["from"] == ["run1"]


def test_without_data_it_is_the_runs_own_less_its_hold_out(work, capsys):
    told = ok("posterior laplace --run run0 --out made", capsys)
    whole = ok("posterior laplace --run run0 --data train.jsonl --out whole", capsys)
    kept = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    rest, _ = split(kept, 0.25, 0)
    (work / "rest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest))
    same = ok("posterior laplace --run run0 --data rest.jsonl --out same", capsys)
    assert told["precision"] == same["precision"] != whole["precision"]


def test_swag(work, capsys):
    ok("posterior swag --run run0 --out made", capsys)
    model, _ = load_run("run0")
    posterior = Swag.load("run0")
    assert posterior.count == 4
    assert torch.equal(probabilities(work / "made", capsys), expected(work, model, posterior))


def test_ensemble(work, capsys):
    ok("posterior ensemble --run run0 run1 --out made", capsys)
    parts = [expected(work, load_run(name)[0]) for name in ("run0", "run1")]
    assert not torch.equal(*parts)
    both = torch.stack(parts).mean(0)
    assert (probabilities(work / "made", capsys) - both).abs().max() < 1e-12


def test_metrics_say_how_many_draws_there_were(work, capsys):
    """Not how many were asked for: of plain LoRA none, of an ensemble its members."""
    ok("posterior ensemble --run run0 run1 --out ensemble", capsys)
    ok("posterior swag --run run0 --out swag", capsys)
    ok("posterior tfb --run run0 --tolerance 0.05 --out tfb", capsys)
    for run, draws in (("run0", 0), ("ensemble", 2), ("swag", 5), ("tfb", 5)):
        for asked in (5, 0):
            expected = draws if asked else 0
            command = f"evaluate --run {run} --data test.jsonl --ood train.jsonl --samples {asked}"
            metrics = ok(command, capsys)
            assert metrics["samples"] == metrics["ood"]["samples"] == expected
            assert metrics["method"] == ("mle" if run == "run0" else run)
            assert ("design" in metrics) == (run == "tfb" and asked > 0)
            command = f"predict --run {run} --prompt hello --choices a b c --samples {asked}"
            assert ok(command, capsys)["samples"] == expected


def test_draws_of_logits_are_many_by_default(work, capsys):
    """They cost no pass: 1000 for Laplace and the linear subspace posterior, 10 for all others."""
    ok("posterior laplace --run run0 --data train.jsonl --out laplace", capsys)
    ok("posterior subspace --run run0 --data train.jsonl --out linear", capsys)
    ok("posterior subspace --run run0 --data train.jsonl --predicts sampled --out drawn", capsys)
    ok("posterior swag --run run0 --out swag", capsys)
    for run, draws in (("laplace", 1000), ("linear", 1000), ("drawn", 10), ("swag", 10)):
        assert ok(f"evaluate --run {run} --data test.jsonl", capsys)["samples"] == draws
        command = f"predict --run {run} --prompt hello --choices a b c"
        assert ok(command, capsys)["samples"] == draws


def test_tfb(work, capsys):
    told = ok("posterior tfb --run run0 --data train.jsonl --tolerance 0.05 --out made", capsys)
    model, _ = load_run("run0")
    assert told["sigma"] == fit_tfb(model, data(work, "train.jsonl", 8), 0.05)
    draws = "--samples 2 --seed 1 --data train.jsonl --out drawn"
    drawn = ok(f"posterior tfb --run run0 --tolerance 0.05 {draws}", capsys)
    other, _ = load_run("run0")
    assert drawn["sigma"] == fit_tfb(other, data(work, "train.jsonl", 8), 0.05, 2, 1)
    assert torch.equal(probabilities(work / "made", capsys), expected(work, model))
    kinds = {type(adapter).__name__ for adapter in adapters(load_run("made")[0]).values()}
    assert kinds == {"TfbAdapter"}
    assert json.loads((work / "made/metrics.json").read_text())["design"] == "independent"
    assert "design" not in ok("evaluate --run run0 --data test.jsonl --samples 4", capsys)


def test_predict_uses_it(work, capsys):
    ok("posterior ensemble --run run0 run1 --out made", capsys)
    ask = "predict --prompt hello --choices one two three --run"
    plain, both = ok(f"{ask} run0", capsys), ok(f"{ask} made", capsys)
    assert plain["mutual_information"] == 0 < both["mutual_information"]


def test_what_cannot_be_made_is_refused(work, capsys):
    ok(f"{TRAIN} --method mle --rank 3 --out wide", capsys)
    shutil.copytree(work / "run0", work / "again")
    for command, message in (
        (
            "posterior swag --run wide --out x",
            "wide: has no swag.safetensors",
        ),
        ("posterior ensemble --run run0 run1 run0 --out x", "run0: has the same weights as run0"),
        ("posterior ensemble --run run0 ./again --out x", "again: has the same weights as run0"),
        (
            "posterior ensemble --run run0 --out x",
            "takes two runs or more in --run, not 1",
        ),
        ("posterior swag --run run0 run1 --out x", "swag takes one run in --run, not 2"),
        ("posterior ensemble --run run0 wide --out x", "wide: differs from run0 in adapter"),
        ("posterior laplace --run nowhere --out x", "nowhere: no such folder: expected a run"),
    ):
        assert message in refused(command, capsys)
        assert not (work / "x").exists()
    ok("posterior swag --run run0 --out made", capsys)
    assert "already has a posterior: swag" in refused("posterior swag --run made --out x", capsys)
    last = refused("posterior ensemble --run run0 run1 made --out x", capsys)
    assert "made: differs from run0 in posterior: they make no ensemble" in last
    assert "cannot write text" in refused("generate --run made --prompt a", capsys)


@pytest.mark.parametrize("method", ["scalabl", "blob", "dropout", "tfb"])
def test_what_draws_by_itself_is_not_made_into_another(work, capsys, method):
    """Only its mean model would predict."""
    if method == "tfb":
        ok("posterior tfb --run run0 --tolerance 0.05 --out ours", capsys)
        shutil.copy(work / "run0/swag.safetensors", work / "ours")
    else:
        ok(f"{TRAIN} --method {method} --swag 0.5 --out ours", capsys)
    for name in ("laplace", "tfb", "swag"):
        said = refused(f"posterior {name} --run ours --out x", capsys)
        assert f"ours: {name} needs a run of method mle or map, not {method}" in said
    said = refused("posterior ensemble --run run0 run1 ours --out x", capsys)
    assert "ours: differs from run0 in adapter: they make no ensemble" in said
    assert not (work / "x").exists()


def test_an_ensemble_of_runs_that_draw(work, capsys):
    """Two draws of each member, under noise of their own."""
    for seed in (0, 1):
        ok(f"{TRAIN} --method dropout --dropout 0.5 --seed {seed} --out drop{seed}", capsys)
    ok("posterior ensemble --run drop0 drop1 --out made", capsys)
    found = []
    for i in range(4):
        model, _ = load_run(f"drop{i % 2}")
        with torch.no_grad():
            logits = class_logits(model, questions(work, model), Noise(0, i))
            found.append(logits.double().softmax(-1))
    both = torch.stack(found).mean(0)
    assert (probabilities(work / "made", capsys) - both).abs().max() < 1e-12
    asked = ok("evaluate --run made --data test.jsonl --samples 3", capsys)
    assert asked["samples"] == 4
    files = ok("export --run made --to peft --samples 3 --out out", capsys)
    assert len(files) > 0 and "draw 2 of seed 0 of member 0" in (
        (work / "out/sample-2/README.md").read_text()
    )


def test_an_ensemble_of_posteriors(work, capsys):
    for i in (0, 1):
        ok(f"posterior laplace --run run{i} --data train.jsonl --out laplace{i}", capsys)
    ok("posterior ensemble --run laplace0 laplace1 --out made", capsys)
    found = []
    for i in (0, 1):
        model, info = load_run(f"laplace{i}")
        posterior = load_posterior(f"laplace{i}", info)
        found.append(posterior.log_probs(model, questions(work, model), 4, 0).exp()[i::2].mean(0))
    both = torch.stack(found).mean(0)
    assert (probabilities(work / "made", capsys) - both).abs().max() < 1e-12
    said = refused("posterior ensemble --run laplace0 run1 --out x", capsys)
    assert "run1: differs from laplace0 in posterior: they make no ensemble" in said
    said = refused("posterior ensemble --run made made --out x", capsys)
    assert "made: already has a posterior: ensemble" in said
    said = refused("export --run made --to peft --samples 2 --out y", capsys)
    assert "draws of its members' posteriors are no LoRAs" in said


def test_broken_files_are_named(work, capsys):
    ok("posterior ensemble --run run0 run1 --out made", capsys)
    path = work / "made" / "ensemble.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "ensemble.safetensors" in refused("evaluate --run made --data test.jsonl", capsys)
    info = json.loads((work / "made/run.json").read_text())
    (work / "made/run.json").write_text(json.dumps({**info, "posterior": "magic"}))
    assert "unknown posterior 'magic'" in refused("evaluate --run made --data test.jsonl", capsys)
    (work / "run0/swag.safetensors").write_bytes((work / "run0/adapter.safetensors").read_bytes())
    assert "swag.safetensors: not written by this program" in refused(
        "posterior swag --run run0 --out x", capsys
    )
