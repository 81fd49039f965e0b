"""Runs go out as the same function."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from scalabl_ref import AdapterConfig, InputError, Llama, Noise, adapters, add_adapters, save_run
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.objective import complexity
from scalabl_ref.interop.exporting import export
from scalabl_ref.methods import Ensemble, Laplace, Swag
from scalabl_ref.support.files import read_json
from scalabl_ref.support.folders import ours_to_hf
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..app.commands import ok, refused
from ..models import questions_file, tiny_batch, tiny_folder
from ..tolerances import rounding
from .samples import (
    INFO,
    KINDS,
    LETTERS,
    RANDOM,
    TOKENS,
    a_run,
    assert_equal_logits,
    bound,
    merged,
    trained,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", [None, 4])
@torch.no_grad()
def test_a_layer_is_the_lora_that_it_says(base, tmp_path, kind, draw):
    """In float64, layer by layer, for the mean and for a draw that all rows share."""
    model = a_run(base, tmp_path / "run", **KINDS[kind]).double()
    noise = None if draw is None else Noise(2**40 + 1, draw)
    generator = torch.Generator().manual_seed(1)
    for name, adapter in adapters(model).items():
        layer = model.get_submodule(name)
        x = torch.randn(4, 6, layer.weight.shape[1], generator=generator, dtype=torch.float64)
        update = adapter.config.scaling * x @ adapter.lora_A(noise).T @ adapter.B.T
        expected = x @ layer.weight.T + update
        found = layer(x, None if noise is None else Keys(noise))
        size = expected.abs().max() + update.abs().max()
        assert (found - expected).abs().max() <= rounding(torch.float64, 64) * size
        if noise is not None and adapter.random:
            assert (found - layer(x)).abs().max() > 0.01 * update.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trim", [True, False])
@torch.no_grad()
def test_the_mean_goes_out_as_a_peft_folder(base, tmp_path, kind, trim):
    model = a_run(base, tmp_path / "run", trim, **KINDS[kind])
    assert export(trained(base, tmp_path / "run"), tmp_path / "out") == ["."]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    theirs = merged(base, tmp_path / "out")
    assert_equal_logits(model, model(TOKENS), theirs(TOKENS))
    plain = Llama.from_pretrained(base).double().lm_head.weight
    others = [i for i in range(256) if i not in LETTERS]
    changed = (theirs.lm_head.weight - plain)[others].abs().max() > 0
    assert changed == (not trim)


@torch.no_grad()
def test_an_alpha_that_is_no_integer_goes_out(base, tmp_path):
    model = a_run(base, tmp_path / "run", True, **{**KINDS["mle"], "alpha": 4.5})
    export(trained(base, tmp_path / "run"), tmp_path / "out")
    assert_equal_logits(model, model(TOKENS), merged(base, tmp_path / "out")(TOKENS))


@pytest.mark.parametrize("kind", RANDOM)
@torch.no_grad()
def test_draws_go_out_as_the_model_answers_under_them(base, tmp_path, kind):
    model = a_run(base, tmp_path / "run", **KINDS[kind])
    names = export(trained(base, tmp_path / "run"), tmp_path / "out", samples=3, seed=8)
    assert names == ["sample-0", "sample-1", "sample-2"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for i, name in enumerate(names):
        ours = model(TOKENS, noise=Noise(8, i))
        assert_equal_logits(model, ours, merged(base, tmp_path / "out" / name)(TOKENS))
        assert (ours - model(TOKENS)).abs().max() > 100 * bound(model, ours)
        assert f"draw {i} of seed 8" in (tmp_path / "out" / name / "README.md").read_text()


def posteriors(base, tmp_path):
    """An ensemble and a SWAG posterior of plain runs, and the models they are of."""
    models = [a_run(base, tmp_path / f"run{i}", seed=i, method="mle") for i in range(3)]
    swag = Swag()
    for model in models:
        swag.collect(model)
    return models, Ensemble([adapter_state(model) for model in models]), swag


@torch.no_grad()
def test_swag_and_ensembles_go_out(base, tmp_path):
    models, ensemble, swag = posteriors(base, tmp_path)
    for i, name in enumerate(export(trained(base, tmp_path / "run0", ensemble), tmp_path / "e",
                                    samples=3)):  # fmt: skip
        theirs = merged(base, tmp_path / "e" / name)
        assert_equal_logits(models[i], models[i](TOKENS), theirs(TOKENS))
        assert f"member {i}" in (tmp_path / "e" / name / "README.md").read_text()
    batch = dataclasses.replace(tiny_batch(), classes=torch.tensor(LETTERS))
    export(trained(base, tmp_path / "run0", swag), tmp_path / "mean")
    export(trained(base, tmp_path / "run0", swag), tmp_path / "s", samples=2, seed=6)
    for samples, folders in ((0, ["mean"]), (2, ["s/sample-0", "s/sample-1"])):
        expected = swag.log_probs(models[0], batch, samples, 6)
        for i, folder in enumerate(folders):
            logits = merged(base, tmp_path / folder)(
                batch.tokens, lengths=batch.lengths, last_only=True
            )[:, LETTERS]
            difference = (logits.log_softmax(-1) - expected[i]).abs().max()
            assert difference <= 2 * bound(models[0], logits)


@torch.no_grad()
def test_draws_of_an_ensembles_members_go_out_in_turn(base, tmp_path):
    models = [a_run(base, tmp_path / f"run{i}", seed=i) for i in range(2)]
    ensemble = Ensemble([adapter_state(model) for model in models])
    names = export(trained(base, tmp_path / "run0", ensemble), tmp_path / "out", samples=3)
    for i, name in enumerate(names):
        ours = models[i % 2](TOKENS, noise=Noise(0, i))
        assert_equal_logits(models[0], ours, merged(base, tmp_path / "out" / name)(TOKENS))
        text = (tmp_path / "out" / name / "README.md").read_text()
        assert f"# out/{name}: draw {i} of seed 0 of member {i % 2} of a scalabl run" in text
        assert f'PeftModel.from_pretrained(base, "out/{name}")' in text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trim", [True, False])
@torch.no_grad()
def test_the_mean_goes_out_merged(tmp_path, trim, tied):
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=tied)
    if tied:  # a head that is stored again, as tiny_folder does, would not be missed
        tensors, _ = load_tensors(base / "model.safetensors")
        del tensors["lm_head.weight"]
        save_tensors(base / "model.safetensors", tensors.items())
    model = a_run(base, tmp_path / "run", trim)
    export(trained(base, tmp_path / "run"), tmp_path / "out", "hf")
    theirs, before = Llama.from_pretrained(tmp_path / "out"), Llama.from_pretrained(base)
    assert_equal_logits(model, model(TOKENS), theirs(TOKENS))
    values = read_json(tmp_path / "out/config.json")  # as programs read it that trust the flag
    assert values["model_type"] == "llama" and not values["tie_word_embeddings"]
    assert not theirs.tied
    assert torch.equal(theirs.embed_tokens.weight, before.embed_tokens.weight)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "README.md"}


@torch.no_grad()
def test_a_tied_head_that_is_not_adapted_stays_tied(tmp_path):
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True)
    model = a_run(base, tmp_path / "run", targets=("q_proj",))
    export(trained(base, tmp_path / "run"), tmp_path / "out", "hf")
    theirs = Llama.from_pretrained(tmp_path / "out")
    assert theirs.tied and read_json(tmp_path / "out/config.json")["tie_word_embeddings"]
    assert_equal_logits(model, model(TOKENS), theirs(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("targets", [("q_proj",), ("lm_head",)])
def test_a_head_that_differs_though_it_is_said_to_be_tied_goes_out_untied(tmp_path, targets):
    base = tiny_folder(tmp_path / "base")
    values = read_json(base / "config.json")
    assert not values["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    model = a_run(base, tmp_path / "run", targets=targets)
    export(trained(base, tmp_path / "run"), tmp_path / "out", "hf")
    assert not read_json(tmp_path / "out/config.json")["tie_word_embeddings"]
    assert_equal_logits(model, model(TOKENS), Llama.from_pretrained(tmp_path / "out")(TOKENS))


@torch.no_grad()
def test_merged_weights_are_rounded_once_to_the_dtype_asked_for(tmp_path):
    """A bfloat16 base: its own dtype, or float32, where the update is not rounded away."""
    base = tiny_folder(tmp_path / "base")
    tensors, _ = load_tensors(base / "model.safetensors")
    save_tensors(base / "model.safetensors", [(n, t.bfloat16()) for n, t in tensors.items()])
    a_run(base, tmp_path / "run")
    export(trained(base, tmp_path / "run"), tmp_path / "own", "hf")
    export(trained(base, tmp_path / "run"), tmp_path / "wide", "hf", dtype=torch.float32)
    export(trained(base, tmp_path / "run"), tmp_path / "peft")
    exact = merged(base, tmp_path / "peft")
    for folder, dtype in (("own", torch.bfloat16), ("wide", torch.float32)):
        theirs = Llama.from_pretrained(tmp_path / folder)
        for name, weight in theirs.named_parameters():
            assert weight.dtype == dtype
            expected = exact.get_parameter(name)
            assert ((weight - expected).abs() <= torch.finfo(dtype).eps / 2 * 1.001
                    * expected.abs() + 1e-9).all()  # fmt: skip


@pytest.mark.parametrize("layout", ["theirs", "ours"])
def test_the_bases_settings_go_out_with_merged_weights(base, tmp_path, layout):
    """Those that this package does not read too; but the dtype is that of the weights."""
    values = read_json(base / "config.json")
    theirs = Llama.from_pretrained(base).config.to_hf() | {"bos_token_id": 7, "dtype": "float32"}
    tensors, _ = load_tensors(base / "model.safetensors")
    if layout == "theirs":
        values, tensors = theirs, {ours_to_hf(name): value for name, value in tensors.items()}
    else:
        values |= {"format": "scalabl_ref", "hf_config": theirs}
    (base / "config.json").write_text(json.dumps(values))
    save_tensors(base / "model.safetensors", tensors.items())
    a_run(base, tmp_path / "run")
    for dtype in (None, torch.bfloat16):
        export(trained(base, tmp_path / "run"), tmp_path / str(dtype), "hf", dtype=dtype)
        written = read_json(tmp_path / str(dtype) / "config.json")
        assert written == theirs | {"dtype": "bfloat16" if dtype else "float32"}


@torch.no_grad()
def test_a_quantised_base_keeps_its_adapters_apart(base, tmp_path):
    model = add_adapters(Llama.from_pretrained(base, quantize="int8"), AdapterConfig(rank=2))
    save_run(tmp_path / "run", model, {**INFO, "model": str(base), "quantize": "int8"})
    made = trained(base, tmp_path / "run")
    with pytest.raises(InputError, match="merged weights would not be those of its int8 base"):
        export(made, tmp_path / "out", "hf")
    assert export(made, tmp_path / "out") == ["."]


@pytest.mark.parametrize(
    "config, posterior, options, words",
    [
        ({"method": "mle"}, None, {"samples": 1}, "method mle has no draws: leave --samples out"),
        ({"sampling": "token"}, None, {"samples": 1}, "differ from token to token"),
        ({"method": "dropout", "sampling": "token"}, None, {"samples": 2}, "token to token"),
        ({}, None, {"samples": -1}, "must not be negative"),
        ({}, None, {"to": "gguf"}, "to must be one of peft, hf"),
        ({}, None, {"dtype": torch.bfloat16}, "a PEFT adapter is float32"),
        ({"method": "mle"}, "ensemble", {}, "mean of an ensemble is no LoRA"),
        ({"sampling": "token"}, "ensemble", {"samples": 1}, "differ from token to token"),
        ({"method": "mle"}, "ensemble", {"samples": 3}, "samples can be 1 to 2"),
        ({"method": "mle"}, "laplace", {"samples": 1}, "a draw of laplace is of logits"),
    ],
)
def test_what_is_no_lora_is_refused(base, tmp_path, config, posterior, options, words):
    model = a_run(base, tmp_path / "run", **config)
    made = trained(base, tmp_path / "run")
    if posterior == "ensemble":
        made = dataclasses.replace(made, posterior=Ensemble([adapter_state(model)] * 2))
    elif posterior == "laplace":
        batch = dataclasses.replace(tiny_batch(), classes=torch.tensor(LETTERS))
        made = dataclasses.replace(
            made, posterior=Laplace.fit(model, [batch]), info={**made.info, "posterior": posterior}
        )
        assert export(made, tmp_path / "mean") == ["."]  # which is a LoRA
    with pytest.raises(InputError, match=words):
        export(made, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_two_rows_of_one_token_are_refused(base, tmp_path):
    model = Llama.from_pretrained(base).trim_head([5, 6, 5])
    add_adapters(model, AdapterConfig(rank=2))
    save_run(tmp_path / "run", model, {**INFO, "model": str(base)})
    with pytest.raises(InputError, match="two rows of its head are the same token"):
        export(trained(base, tmp_path / "run"), tmp_path / "out")


def test_the_name_of_a_base_is_that_of_the_hub_or_its_folders(base, tmp_path, monkeypatch):
    a_run(base, tmp_path / "run")
    made = trained(base, tmp_path / "run")
    cached = tmp_path / "models--some--model" / "snapshots" / "0f"
    (tmp_path / "link").symlink_to(cached)
    monkeypatch.chdir(base)
    for folder, name, expected in (
        (base, None, "base"), (Path(), None, "base"), (cached, None, "some/model"),
        (tmp_path / "link", None, "some/model"), (cached, "own/name", "own/name"),
    ):  # fmt: skip
        assert dataclasses.replace(made, base=folder, name=name).base_name == expected


@pytest.mark.parametrize("kl", ["forward", "official", None])
def test_the_card_has_the_kl_of_its_run(base, tmp_path, kl):
    """In the direction that was trained, forward if that is not known."""
    model = a_run(base, tmp_path / "run")
    made = trained(base, tmp_path / "run")
    made = dataclasses.replace(made, info={**made.info, "train": {"kl": kl}})
    nats = complexity(model, kl or "forward").item()
    found = made.card(None)
    assert found.kl == f"{kl or 'forward'}, {nats:.6g} nats"
    assert found.answers == [str(token) for token in LETTERS]
    assert dataclasses.replace(made, posterior=Swag()).card(None).kl is None


def test_the_card_says_what_is_known(base, tmp_path, monkeypatch, capsys):
    """Front matter for the Hub; names of files and their hashes, but no place on this machine."""
    monkeypatch.chdir(tmp_path)
    data = questions_file(tmp_path / "train.jsonl")
    command = "train --model base --data train.jsonl --out run --steps 2 --rank 2 --holdout 0.25"
    ok(command + " --kl official --seed 11 --alpha 5 --prior-std 2 --batch 6 --lr 0.01", capsys)
    ok("evaluate --run run --data train.jsonl --samples 2 --temperature", capsys)
    ok("export --run run --to peft --out some/out --base owner/model", capsys)
    ok("export --run run --to hf --out merged", capsys)
    text = (tmp_path / "some" / "out" / "README.md").read_text()
    front = text.split("---\n")[1].splitlines()
    assert front[:2] == ["library_name: peft", 'base_model: "owner/model"']
    assert "base_model_relation: adapter" in front and "- scalabl" in front
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    metrics = read_json(tmp_path / "run" / "metrics.json")
    for words in (
        f"- data: train.jsonl\n- SHA-256 of the data: {digest}\n- examples trained on: 18\n",
        "- KL: official, ", "- seed: 11\n", "- method: scalabl\n- rank, alpha: 2, 5\n",
        "- targets: q_proj v_proj lm_head\n- covariance: diagonal\n",
        "- prior: fixed, standard deviation 2\n", "- objective: elbo\n- beta: 1.0\n"
        "- steps: 2\n- batch: 6\n- lr: 0.01\n",
        f"| train.jsonl | 24 | {metrics['acc']:.4f} | {metrics['ece']:.4f} | "
        f"{metrics['nll']:.4f} | {metrics['brier']:.4f} |\n",
        "| train.jsonl, temperature | 24 |", "2 draws, seed 0, 15 bins", "- scalabl_ref: 0.1.0\n",
        f"- torch: {torch.__version__}", 'PeftModel.from_pretrained(base, "out")',
        f"only for the tokens 'A' ({LETTERS[0]}), 'B' ({LETTERS[1]}), 'C' ({LETTERS[2]}): compare",
    ):  # fmt: skip
        assert words in text, words
    hf = (tmp_path / "merged" / "README.md").read_text()
    assert hf.startswith('---\nlibrary_name: transformers\nbase_model: "base"\n')
    assert 'AutoModelForCausalLM.from_pretrained("merged")' in hf
    assert str(tmp_path) not in text + hf
    assert read_json(tmp_path / "some/out/adapter_config.json")["base_model_name_or_path"] == (
        "owner/model"
    )
    assert refused("export --run run --to hf --out merged", capsys).startswith("error: merged: ")
