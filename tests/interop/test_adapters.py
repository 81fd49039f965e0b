"""Adapters out and in: the same function on the other side, and hostile files refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os

import pytest
import torch

from scalabl_ref import (
    AdapterConfig,
    InputError,
    Llama,
    Noise,
    adapters,
    add_adapters,
    load_run,
    save_run,
)
from scalabl_ref.app import cli
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.core.config import COVARIANCES
from scalabl_ref.core.noise import Keys
from scalabl_ref.interop.adapters import Trained, export, import_adapter, read_run, start_from
from scalabl_ref.methods import Ensemble, Laplace, Swag
from scalabl_ref.support.tensors import load_tensors, read_json, save_tensors

from ..app.commands import ok, refused
from ..models import questions_file, tiny_batch, tiny_folder
from ..tolerances import logits_bound, rounding

LETTERS = [ord(letter) - 33 for letter in "ABC"]  # ids in tiny_folder's tokenizer
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj", "lm_head")
KINDS = {  # settings of every method whose mean is a LoRA
    "scalabl": {},
    "full": {"covariance": "full", "prior": "component"},
    "layer": {"prior": "layer"},
    "mle": {"method": "mle"},
    "map": {"method": "map"},
    "blob": {"method": "blob"},
    "dropout": {"method": "dropout", "dropout": 0.3},
    "tfb": {"method": "tfb"},
}
RANDOM = [kind for kind in KINDS if kind not in ("mle", "map")]
INFO = {"train": {"kl": "forward", "objective": "elbo", "seed": 3, "steps": 7}, "format": "jsonl"}
TOKENS = torch.tensor([[3, 250, 7, 99, 41, 8], [5, 5, 0, 17, 200, 31]])


@pytest.fixture
def base(tmp_path):
    return tiny_folder(tmp_path / "base")


def a_run(base, run, trim=True, seed=0, **config):
    """A model on `base` with all adapter parameters random, saved as a run; returns the model."""
    model = Llama.from_pretrained(base)
    if trim:
        model.trim_head(LETTERS)
    settings = {"rank": 3, "alpha": 5.0, "targets": TARGETS, "sampling": "batch", **config}
    add_adapters(model, AdapterConfig(**settings), seed)
    shake(model, seed)
    save_run(run, model, {**INFO, "model": str(base)})
    return model


@torch.no_grad()
def shake(model, seed=0):
    """Random values in every parameter of the adapters, of sizes that matter."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model).values():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def trained(base, run, posterior=None, name=None):
    model, info = load_run(run)
    return Trained(run, model, info, posterior, base, name)


@torch.no_grad()
def merged(base, folder):
    """A plain Llama with the LoRA of a PEFT folder merged by hand, in float64."""
    config = read_json(folder / "adapter_config.json")
    tensors, _ = load_tensors(folder / "adapter_model.safetensors")
    model = Llama.from_pretrained(base).double()
    if model.tied:
        head = model.embed_tokens.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(head)
    names = {name.rpartition(".lora_")[0] for name in tensors}
    assert len(tensors) == 2 * len(names)
    for name in names:
        ours = name.removeprefix("base_model.model.").removeprefix("model.")
        layer = model.get_submodule(ours.replace("self_attn", "attn"))
        A, B = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        assert A.dtype == B.dtype and len(A) == config["r"] == B.shape[1]
        layer.weight += config["lora_alpha"] / config["r"] * B @ A
    return model


def bound(model, logits):
    return logits_bound(model.config, logits.abs().max().item())


def assert_equal_logits(model, ours, theirs):
    """ours: of a run, maybe of its answers alone; theirs: of all tokens."""
    head = model.config.head_tokens
    theirs = theirs if head is None else theirs[..., list(head)]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= bound(model, ours)


# --- out -----------------------------------------------------------------------------------------


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
                                    samples=2)):  # fmt: skip
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
    assert not theirs.tied and read_json(tmp_path / "out/config.json")["model_type"] == "llama"
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


def test_the_card_says_what_is_known(base, tmp_path, monkeypatch, capsys):
    """Front matter for the Hub; names of files and their hashes, but no place on this machine."""
    monkeypatch.chdir(tmp_path)
    data = questions_file(tmp_path / "train.jsonl")
    command = "train --model base --data train.jsonl --out run --steps 2 --rank 2 --holdout 0.25"
    ok(command + " --kl official --seed 11", capsys)
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
        "- KL: official, ", "- seed: 11\n", "- method: scalabl\n", "- beta: 1.0\n",
        f"| train.jsonl | 24 | {metrics['acc']:.4f} | {metrics['ece']:.4f} | "
        f"{metrics['nll']:.4f} | {metrics['brier']:.4f} |\n",
        "| train.jsonl, temperature | 24 |", "2 draws, seed 0, 15 bins", "- scalabl_ref: 0.1.0\n",
        f"- torch: {torch.__version__}", 'PeftModel.from_pretrained(base, "out")',
        f"'A' ({LETTERS[0]}), 'B' ({LETTERS[1]}), 'C' ({LETTERS[2]}) alone",
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


# --- in: PEFT ------------------------------------------------------------------------------------


def bring(base, source, target, kind="peft", options=None, **more):
    """Import and load again; returns the model of the run."""
    import_adapter(kind, source, base, target, options or {}, {"model": str(base)}, **more)
    return load_run(target)[0]


def peft_folder(folder, base, seed=0, rank=3, alpha=5, targets=TARGETS, ranks=None, **values):
    """A folder as PEFT writes it, of random values; ranks: of layers, by their names' ends."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in Llama.from_pretrained(base).named_modules():
        if name.rpartition(".")[2] in targets:
            hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
            ends = (r for end, r in (ranks or {}).items() if hf.endswith(end))
            r, (d_out, d_in) = next(ends, rank), module.weight.shape
            for side, shape in (("A", (r, d_in)), ("B", (d_out, r))):
                value = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{hf}.lora_{side}.weight"] = value
    folder.mkdir()
    save_tensors(folder / "adapter_model.safetensors", tensors.items())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
              "target_modules": list(targets), "bias": "none", "peft_version": "0.21.2",
              "loftq_config": {}, "megatron_core": "megatron.core", **values}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, tensors


@pytest.mark.parametrize("method", ["scalabl", "full", "mle", "map", "blob", "dropout"])
@torch.no_grad()
def test_a_peft_folder_comes_in_as_the_same_function(base, tmp_path, method):
    source, _ = peft_folder(tmp_path / "peft", base)
    model = bring(base, source, tmp_path / "run", options=KINDS[method])
    assert model.config.head_tokens is None
    assert_equal_logits(model, model(TOKENS), merged(base, source)(TOKENS))
    export(trained(base, tmp_path / "run"), tmp_path / "back")
    assert_equal_logits(model, model(TOKENS), merged(base, tmp_path / "back")(TOKENS))
    if method in ("mle", "map"):  # to the bit
        ours, theirs = (load_tensors(f / "adapter_model.safetensors")[0] for f in
                        (tmp_path / "back", source))  # fmt: skip
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs | ours)


@torch.no_grad()
def test_scalabl_starts_from_the_singular_vectors(base, tmp_path):
    """B and A^T orthonormal, s the singular values of B A, in order; widths as at any start."""
    source, tensors = peft_folder(tmp_path / "peft", base)
    model = bring(base, source, tmp_path / "run", seed=4)
    fresh = add_adapters(Llama.from_pretrained(base), AdapterConfig(rank=3, targets=TARGETS), 4)
    for name, adapter in adapters(model).items():
        hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
        A, B = (tensors[f"base_model.model.{hf}.lora_{side}.weight"].double() for side in "AB")
        for Q in (adapter.B.double(), adapter.A.double().T):
            eye = torch.eye(3, dtype=torch.float64)
            assert (Q.T @ Q - eye).abs().max() <= rounding(torch.float32, 4)
        expected = torch.linalg.svdvals(B @ A)[:3]
        s, sigma = (value.double() for value in adapter.scale())
        assert ((s - expected).abs() <= rounding(torch.float32, 16) * expected).all()
        assert (sigma - adapters(fresh)[name].scale()[1]).abs().max() == 0
        product = adapter.B.double() * s @ adapter.A.double()
        assert (product - B @ A).abs().max() <= rounding(torch.float32, 16) * expected[0]
        assert adapter.config.scaling == 5 / 3


@pytest.mark.parametrize("deficient", ["zero", "repeated", "tiny"])
@torch.no_grad()
def test_a_lora_of_lower_rank_keeps_function_and_rank(base, tmp_path, deficient):
    """Components without a singular value start with B = 0; those of 1e-6 of another stay."""
    source, tensors = peft_folder(tmp_path / "peft", base)
    for name, value in tensors.items():
        if ".lora_B." in name:
            value[:, 1] *= {"zero": 0, "repeated": 1, "tiny": 1e-6}[deficient]
            if deficient == "repeated":
                value[:, 1:] = value[:, :1]
    save_tensors(source / "adapter_model.safetensors", tensors.items())
    model = bring(base, source, tmp_path / "run")
    assert_equal_logits(model, model(TOKENS), merged(base, source)(TOKENS))
    alive = {"zero": 2, "repeated": 1, "tiny": 3}[deficient]
    for adapter in adapters(model).values():
        assert [bool(column.any()) for column in adapter.B.T] == [i < alive for i in range(3)]
        assert adapter.log_s.isfinite().all() and adapter.A.abs().sum(1).min() > 0


@torch.no_grad()
def test_an_untrained_lora_comes_in(base, tmp_path):
    source, tensors = peft_folder(tmp_path / "peft", base)
    for name, value in tensors.items():
        if ".lora_B." in name:
            value.zero_()
    save_tensors(source / "adapter_model.safetensors", tensors.items())
    model = bring(base, source, tmp_path / "run")
    assert torch.equal(model(TOKENS), Llama.from_pretrained(base)(TOKENS))


@pytest.mark.parametrize("method", ["scalabl", "mle"])
@torch.no_grad()
def test_rslora_and_patterns_are_honoured(base, tmp_path, method):
    """c = alpha / sqrt(r), or another alpha or rank for some layers, as PEFT finds these."""
    ranks = {"layers.1.self_attn.q_proj": 2, "down_proj": 4}
    source, tensors = peft_folder(
        tmp_path / "peft", base, ranks=ranks, use_rslora=True, rank_pattern={
            r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 4},
        alpha_pattern={"lm_head": 9.5, r".*\.0\.self_attn\.o_proj": 1, "proj": 77, "o_proj": 6},
    )  # fmt: skip
    model = bring(base, source, tmp_path / "run", options={"method": method})
    expected = Llama.from_pretrained(base).double()
    for name, adapter in adapters(model).items():
        hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
        A, B = (tensors[f"base_model.model.{hf}.lora_{side}.weight"].double() for side in "AB")
        alphas = {"lm_head": 9.5, "layers.0.attn.o_proj": 1, "layers.1.attn.o_proj": 6}
        alpha = alphas.get(name, 5)
        expected.get_submodule(name).weight += alpha / math.sqrt(len(A)) * B @ A
        assert adapter.config.rank == 4 and (adapter.B[:, len(A) :] == 0).all()
        assert adapter.A.abs().sum(1).min() > 0  # the rest can learn
    assert_equal_logits(model, model(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_head_that_peft_keeps_must_be_the_bases(tmp_path, tied):
    """PEFT writes the base's embedding and head beside an adapter of lm_head."""
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=tied)
    source, tensors = peft_folder(tmp_path / "peft", base)
    own = Llama.from_pretrained(base)
    tensors["base_model.model.lm_head.base_layer.weight"] = own.lm_head.weight.clone()
    tensors["base_model.model.model.embed_tokens.weight"] = own.embed_tokens.weight.clone()
    save_tensors(source / "adapter_model.safetensors", tensors.items())
    model = bring(base, source, tmp_path / "run")
    assert_equal_logits(model, model(TOKENS), merged_without_extras(base, source)(TOKENS))
    tensors["base_model.model.model.embed_tokens.weight"][7, 2] += 1
    save_tensors(source / "adapter_model.safetensors", tensors.items())
    with pytest.raises(InputError, match="embed_tokens.weight is not the base model's"):
        bring(base, source, tmp_path / "other")


def merged_without_extras(base, source):
    tensors, _ = load_tensors(source / "adapter_model.safetensors")
    plain = source.with_name("plain")
    plain.mkdir()
    (plain / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_tensors(plain / "adapter_model.safetensors",
                 [(n, t) for n, t in tensors.items() if ".lora_" in n])  # fmt: skip
    return merged(base, plain)


@torch.no_grad()
def test_an_old_pickled_adapter_of_another_dtype_comes_in(base, tmp_path):
    source, tensors = peft_folder(tmp_path / "peft", base)
    (source / "adapter_model.safetensors").unlink()
    torch.save({n: t.half() for n, t in tensors.items()}, source / "adapter_model.bin")
    model = bring(base, source, tmp_path / "run", options={"method": "mle"})
    adapter = adapters(model)["lm_head"]
    assert torch.equal(adapter.B, tensors["base_model.model.lm_head.lora_B.weight"].half().float())


NAMES = ["layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize(
    "choice",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers", "ensure_weight_tying": True},
        {"layers_to_transform": [1, 7], "layers_pattern": ["blocks", "layers"]},
        {"exclude_modules": r".*layers\.0\..*", "fan_in_fan_out": True},
        {"exclude_modules": ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]},
        {"target_modules": NAMES},
        {"target_modules": r".*\.1\.self_attn\.[qv]_proj", "layers_to_transform": []},
    ],
)
@pytest.mark.parametrize("method", ["scalabl", "mle"])
@torch.no_grad()
def test_an_adapter_of_some_layers_comes_in(base, tmp_path, choice, method):
    """Layers that PEFT does not choose have a B of 0; function and ranks are kept."""
    targets = ("q_proj", "v_proj")
    whole, tensors = peft_folder(tmp_path / "whole", base, targets=targets)
    zero = {n: t * 0 if ".0." in n and "lora_B" in n else t for n, t in tensors.items()}
    save_tensors(whole / "adapter_model.safetensors", zero.items())
    some, _ = peft_folder(tmp_path / "some", base, targets=targets, **choice)
    rest = [(n, t) for n, t in tensors.items() if ".0." not in n]
    save_tensors(some / "adapter_model.safetensors", rest)
    expected = bring(base, whole, tmp_path / "a", options={"method": method})
    model = bring(base, some, tmp_path / "b", options={"method": method})
    assert torch.equal(model(TOKENS), expected(TOKENS))
    assert {a.config.rank for a in adapters(model).values()} == {3} and len(adapters(model)) == 4
    assert read_json(tmp_path / "b/run.json")["imported"]["layers_without"] == 2
    assert "layers_without" not in read_json(tmp_path / "a/run.json")["imported"]


def test_an_adapter_for_another_vocabulary_names_the_sizes(base, tmp_path):
    source, tensors = peft_folder(tmp_path / "peft", base)
    tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(260, 16)
    save_tensors(source / "adapter_model.safetensors", tensors.items())
    with pytest.raises(InputError, match="for a vocabulary of 260 tokens, and the base .* has 256"):
        bring(base, source, tmp_path / "run")


def test_an_adapter_that_ties_the_embedding_to_the_head_is_refused(tmp_path):
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True)
    source, _ = peft_folder(tmp_path / "peft", base, ensure_weight_tying=True)
    with pytest.raises(InputError, match="ensure_weight_tying adapts the embedding with lm_head"):
        bring(base, source, tmp_path / "run")


# --- hostile files -------------------------------------------------------------------------------

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def _tensor(change):
    """Damage to the file of tensors: change(tensors) in place."""

    def damage(source):
        tensors, _ = load_tensors(source / "adapter_model.safetensors")
        change(tensors)
        save_tensors(source / "adapter_model.safetensors", tensors.items())

    return damage


def _config(**values):
    def damage(source):
        path = source / "adapter_config.json"
        path.write_text(json.dumps({**read_json(path), **values}))

    return damage


def truncated(source):
    path = source / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def a_pickle_that_runs_code(source):
    (source / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, source / "adapter_model.bin")


def no_weights(source):
    (source / "adapter_model.safetensors").unlink()


def of_rank(r):
    """Valid but for the rank, in both files."""

    def widen(tensors):
        for name, value in list(tensors.items()):
            side = (r, value.shape[1]) if ".lora_A." in name else (value.shape[0], r)
            tensors[name] = torch.ones(side)

    return lambda source: (_tensor(widen)(source), _config(r=r)(source))


HOSTILE = {
    "truncated": (truncated, "adapter_model.safetensors: not a valid safetensors file"),
    "pickle": (a_pickle_that_runs_code, "adapter_model.bin: refused: a pickle may hold only"),
    "no weights": (no_weights, "no adapter_model.safetensors or adapter_model.bin"),
    "no config": (lambda s: (s / "adapter_config.json").unlink(), "adapter_config.json: no such"),
    "not JSON": (lambda s: (s / "adapter_config.json").write_text("{"), "config.json: not JSON"),
    "shape of A": (
        _tensor(lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(3, 5)})),
        r"q_proj.lora_A.weight has shape \(3, 5\), expected \(3, 16\)",
    ),
    "dimensions of B": (
        _tensor(lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(3)})),
        r"q_proj.lora_B.weight has shape \(3,\), expected \(16, 3\)",
    ),
    "another rank": (
        _config(r=4), r"lora_A.weight has shape \(3, \d+\), expected \(4, \d+\)",
    ),
    "no lora_B": (
        _tensor(lambda t: t.pop(f"{Q0}.lora_B.weight")),
        "tensor lora_B.weight of model.layers.0.self_attn.q_proj is missing",
    ),
    "a layer left out": (
        _tensor(lambda t: [t.pop(f"{Q0}.lora_{side}.weight") for side in "AB"]),
        "has no adapter of layers.0.attn.q_proj",
    ),
    "NaN": (
        _tensor(lambda t: t[f"{Q0}.lora_A.weight"].fill_(float("nan"))),
        "q_proj.lora_A.weight has NaN or infinite values",
    ),
    "integers": (
        _tensor(lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(3, 16).int()})),
        "q_proj.lora_A.weight is torch.int32, expected floats",
    ),
    "unknown target": (
        _tensor(lambda t: t.update({
            "base_model.model.model.layers.0.mlp.router.lora_A.weight": torch.ones(3, 16),
            "base_model.model.model.layers.0.mlp.router.lora_B.weight": torch.ones(16, 3)})),
        "mlp.router.lora_A.weight: the model has no layer layers.0.mlp.router",
    ),
    "another model": (
        _tensor(lambda t: t.update({
            "base_model.model.transformer.h.0.lora_A.weight": torch.ones(3, 16),
            "base_model.model.transformer.h.0.lora_B.weight": torch.ones(16, 3)})),
        "transformer.h.0.lora_B.weight: no layer transformer.h.0 is known",
    ),
    "an embedding": (
        _tensor(lambda t: t.update(
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 256)})),
        "embed_tokens.lora_embedding_A is not of a LoRA",
    ),
    "a bias of B": (
        _tensor(lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(16)})),
        "q_proj.lora_B.bias is unexpected",
    ),
    "empty": (_tensor(lambda t: t.clear()), "holds no LoRA"),
    "rank over d_in": (of_rank(20), r"rank 20 is larger than a dimension of \S+ \(\d+, 16\)"),
    "rank over d_out": (of_rank(12), r"rank 12 is larger than a dimension of \S+v_proj \(8, 16\)"),
    "huge rank": (_config(r=10**30), r"rank 1000\d+ is larger than a dimension of \S+ \(\d+, 16"),
    "huge alpha": (_config(lora_alpha=10**400), "must be a number above 0: 1000"),
    "a long number": (lambda s: (s / "adapter_config.json").write_text("9" * 5000), "not JSON"),
    "a deep nest": (lambda s: (s / "adapter_config.json").write_text("[" * 10**5), "not JSON"),
    "rank of text": (_config(r="8"), "the rank of .* must be a whole number above 0: '8'"),
    "rank 0": (_config(r=0), "must be a whole number above 0: 0"),
    "rank True": (_config(r=True), "must be a whole number above 0: True"),
    "alpha NaN": (_config(lora_alpha=float("nan")), "must be a number above 0: nan"),
    "alpha 0": (_config(lora_alpha=0), "must be a number above 0: 0"),
    "alpha of text": (_config(lora_alpha="1"), "must be a number above 0: '1'"),
    "patterns": (_config(rank_pattern=[1]), "expected an object under 'rank_pattern'"),
    "a bad pattern": (_config(alpha_pattern={"(": 1}), "alpha_pattern: not a regular expression"),
    "another method": (_config(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    "a classifier": (_config(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
    "dora": (_config(use_dora=True), "use_dora is set, and is more than a plain LoRA"),
    "bias": (_config(bias="lora_only"), "bias is 'lora_only', expected 'none'"),
    "modules_to_save": (_config(modules_to_save=["embed_tokens"]), "modules_to_save is set"),
    "not chosen": (
        _config(layers_to_transform=[1]),
        r"has an adapter of layers\.0\.\S+, which adapter_config.json does not choose",
    ),
    "a bad choice": (_config(target_modules="("), "layers are not chosen as PEFT does"),
    "a choice of no names": (_config(target_modules=3), "layers are not chosen as PEFT does"),
    "lora_bias": (_config(lora_bias=True), "lora_bias is set"),
    "new tokens": (_config(trainable_token_indices=[1]), "trainable_token_indices is set"),
    "of tomorrow": (_config(use_something_new=True), "use_something_new is set"),
    "pissa": (_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa', expected"),
    "an unhashable": (_config(task_type=["CAUSAL_LM"]), r"task_type is \['CAUSAL_LM'\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_peft_folder_is_refused_by_name(base, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    source, _ = peft_folder(tmp_path / "peft", base)
    damage, words = HOSTILE[what]
    damage(source)
    with pytest.raises(InputError, match=words) as caught:
        bring(base, source, tmp_path / "run")
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "peft"]


# --- in: the official code -----------------------------------------------------------------------


def official_state(base, method="scalabl", rows=3, seed=0, rank=2, targets=None):
    """What the official trainer saves: `lora_` entries of PEFT's model with its modules in it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in Llama.from_pretrained(base).named_modules():
        if name.rpartition(".")[2] in (targets or ("q_proj", "v_proj", "lm_head")):
            hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
            d_out, d_in = module.weight.shape
            d_out = rows if name == "lm_head" else d_out

            def new(*shape):
                return 0.3 * torch.randn(shape, generator=generator)

            width = 0.04 + 0.01 * torch.rand(rank, generator=generator)
            A = {
                "scalabl": {
                    "log_s": new(rank),
                    "Vh": new(rank, d_in),
                    "log_s_sigma": new(rank) - 3,
                    "log_p_mu": width.log(),  # not log 1e-8 and log 1: read_official says why
                    "log_p_sigma": (1 + width).log(),
                },
                "blob": {"weight": new(rank, d_in), "lora_A_rho": new(rank, d_in)},
                "mle": {"weight": new(rank, d_in)},
            }[method]
            prefix = f"base_model.model.{hf}.lora_"
            state |= {f"{prefix}A.default.{key}": value for key, value in A.items()}
            state[f"{prefix}B.default.weight"] = new(d_out, rank)
    return state


@pytest.mark.parametrize("method", ["scalabl", "blob", "mle"])
@pytest.mark.parametrize("where", ["file", "folder"])
@torch.no_grad()
def test_an_official_state_comes_in_with_all_its_values(base, tmp_path, method, where):
    state = official_state(base, method)
    folder = tmp_path / "arc"
    folder.mkdir()
    torch.save(state, folder / "state_dict.pt")
    source = folder if where == "folder" else folder / "state_dict.pt"
    model = bring(base, source, tmp_path / "run", "bayesadapt", {"sampling": "batch"})
    assert model.config.head_tokens == tuple(LETTERS)
    expected = Llama.from_pretrained(base).trim_head(LETTERS).double()
    for name, adapter in adapters(model).items():
        hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
        part = f"base_model.model.{hf}.lora_{{}}.default.{{}}".format
        B = state[part("B", "weight")]
        if method == "scalabl":
            A = state[part("A", "log_s")].double().exp()[:, None] * state[part("A", "Vh")]
            assert torch.equal(adapter.log_sigma, state[part("A", "log_s_sigma")])
            assert torch.equal(adapter.A, state[part("A", "Vh")])
        else:
            A = state[part("A", "weight")].double()
        if method == "blob":
            assert torch.equal(adapter.G, state[part("A", "lora_A_rho")])
        expected.get_submodule(name).weight += 2 * B.double() @ A
    logits = model(TOKENS)
    assert (logits - expected(TOKENS)).abs().max() <= bound(model, logits)
    config, info = next(iter(adapters(model).values())).config, read_json(
        tmp_path / "run/run.json")  # fmt: skip
    assert config.method == ("scalabl" if method == "mle" else method)
    assert config.prior_std == (0.2 if method == "blob" else 1.0)
    kl = {"scalabl": "official", "blob": "forward", "mle": None}[method]
    assert info["train"]["kl"] == kl and info["imported"]["method"] == method


@torch.no_grad()
def test_an_official_state_with_other_labels_alpha_or_a_whole_head(base, tmp_path):
    torch.save(official_state(base), tmp_path / "state_dict.pt")
    options = {"labels": ["y", "n", "?"], "alpha": 1.0}
    model = bring(base, tmp_path, tmp_path / "run", "bayesadapt", **options)
    assert model.config.head_tokens == tuple(ord(letter) - 33 for letter in "yn?")
    assert adapters(model)["lm_head"].config.scaling == 0.5
    torch.save(official_state(base, rows=256), tmp_path / "state_dict.pt")
    model = bring(base, tmp_path, tmp_path / "whole", "bayesadapt")
    assert model.config.head_tokens is None and adapters(model)["lm_head"].B.shape == (256, 2)


def _first(state, end):
    return next(name for name in state if name.endswith(end))


OFFICIAL = {
    "no B": (lambda s: s.pop(_first(s, "q_proj.lora_B.default.weight")),
             "tensor lora_B.weight of model.layers.0.self_attn.q_proj is missing"),
    "no Vh": (lambda s: s.pop(_first(s, "Vh")), "tensor lora_A.Vh of .* is missing"),
    "shape": (lambda s: s.update({_first(s, "log_s"): torch.ones(5)}),
              r"log_s has shape \(5,\), expected \(2,\)"),
    "a scalar head": (lambda s: s.update({_first(s, "lm_head.lora_B.default.weight"):
                                          torch.tensor(1.0)}),
                      r"lm_head.lora_B.default.weight has shape \(\), expected"),
    "NaN": (lambda s: s[_first(s, "Vh")].fill_(float("nan")), "Vh has NaN or infinite values"),
    "rank 0": (lambda s: s.update({_first(s, "q_proj.lora_A.default.Vh"): torch.ones(0, 16)}),
               "has an adapter of rank 0"),
    "another method": (lambda s: s.update({Q0 + ".lora_A.default.members": torch.ones(2)}),
                       "lora_A.default.members is unexpected"),
    "not a LoRA": (lambda s: s.update({"model.norm.weight": torch.ones(2)}),
                   "tensor model.norm.weight is not of a LoRA"),
    "many answers": (lambda s: s.update({_first(s, "lm_head.lora_B.default.weight"):
                                         torch.ones(27, 2)}),
                     "the 27 rows of its head: 27 answer classes: there are letters for 26"),
    "empty": (lambda s: s.clear(), "holds no LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("what", OFFICIAL)
def test_a_hostile_official_state_is_refused_by_name(base, tmp_path, what):
    change, words = OFFICIAL[what]
    state = official_state(base)
    change(state)
    torch.save(state, tmp_path / "state_dict.pt")
    with pytest.raises(InputError, match=words) as caught:
        bring(base, tmp_path / "state_dict.pt", tmp_path / "run", "bayesadapt")
    assert "\n" not in str(caught.value) and "state_dict.pt: " in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_official_pickle_that_runs_code_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "state_dict.pt")
    with pytest.raises(InputError, match="refused: a pickle may hold only"):
        bring(base, tmp_path, tmp_path / "run", "bayesadapt")
    assert not (tmp_path / "ran").exists()


# --- starting from a run -------------------------------------------------------------------------


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", ["scalabl", "full", "mle", "blob"])
@torch.no_grad()
def test_a_run_starts_where_another_ended(base, tmp_path, before, after):
    """The same mean; of the same method every value; from a whole head to the answers' rows."""
    old = a_run(base, tmp_path / "run", trim=False, **KINDS[before])
    new = Llama.from_pretrained(base).trim_head(LETTERS)
    settings = {"rank": 3, "alpha": 5.0, "targets": TARGETS, "sampling": "batch", **KINDS[after]}
    add_adapters(new, AdapterConfig(**settings), 9)
    start_from(new, read_run(tmp_path / "run", new), "run")
    expected = old(TOKENS)
    assert (new(TOKENS) - expected[..., LETTERS]).abs().max() <= bound(old, expected)
    kinds = (COVARIANCES[a.config.covariance][a.config.method] for a in
             (adapters(old)["lm_head"], adapters(new)["lm_head"]))  # fmt: skip
    if len(set(kinds)) == 1:
        noise = Noise(1, 2)
        difference = (new(TOKENS, noise=noise) - old(TOKENS, noise=noise)[..., LETTERS]).abs()
        assert difference.max() <= bound(old, expected)


def test_a_start_can_widen_the_rank_and_change_alpha(base, tmp_path):
    old = a_run(base, tmp_path / "run", **KINDS["scalabl"])
    for method, rank in (("scalabl", 3), ("scalabl", 4), ("mle", 4)):
        new = Llama.from_pretrained(base).trim_head(LETTERS)
        add_adapters(new, AdapterConfig(method, rank=rank, alpha=1.0, targets=TARGETS))
        start_from(new, read_run(tmp_path / "run", new), "run")
        assert (new(TOKENS) - old(TOKENS)).abs().max() <= bound(old, old(TOKENS))
    small = Llama.from_pretrained(base).trim_head(LETTERS)
    add_adapters(small, AdapterConfig("mle", rank=2, targets=TARGETS))
    with pytest.raises(InputError, match="run: .*a LoRA of rank 3 does not go into one of rank 2"):
        start_from(small, read_run(tmp_path / "run", small), "run")


def test_a_start_from_another_base_head_or_layers_is_refused(base, tmp_path):
    a_run(base, tmp_path / "run")
    for model, words in (
        (Llama.from_pretrained(tiny_folder(tmp_path / "b", rms_norm_eps=1e-3)), "another base"),
        (Llama.from_pretrained(base), "its head has the tokens .*, and the model's all"),
        (Llama.from_pretrained(base).trim_head([3, 4, 5]), r"and the model's \(3, 4, 5\)"),
    ):
        with pytest.raises(InputError, match=words):
            read_run(tmp_path / "run", model)
    model = Llama.from_pretrained(base).trim_head(LETTERS)
    add_adapters(model, AdapterConfig(rank=3, targets=("q_proj",)))
    with pytest.raises(InputError, match="run: has an adapter of "):
        start_from(model, read_run(tmp_path / "run", model), "run")


# --- the commands --------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "base")
    questions_file(tmp_path / "train.jsonl")
    return tmp_path


def test_import_evaluate_train_export(work, capsys):
    """From a PEFT folder to a trained ScalaBL run and out again, by commands alone."""
    peft_folder(work / "peft", work / "base")
    facts = ok("import --from peft peft --model base --out start --init-sigma 0.1", capsys)
    assert facts["adapter"]["method"] == "scalabl" and facts["adapter"]["init_sigma"] == 0.1
    assert facts["layers"] == 9 and facts["adapter"]["alpha"] == 5
    metrics = ok("evaluate --run start --data train.jsonl --samples 0", capsys)
    assert metrics["kl"] is None and metrics["objective"] is None
    ok("predict --run start --prompt hello --choices one two", capsys)
    command = "train --model base --data train.jsonl --steps 2 --init start --out run"
    first = ok(f"{command} --lr 0 --variational-lr 0", capsys)
    assert first["last"]["step"] == 1
    again = ok("evaluate --run run --data train.jsonl --samples 0", capsys)
    assert math.isclose(again["nll"], metrics["nll"], rel_tol=rounding(torch.float32, 64))
    info = read_json(work / "run" / "run.json")
    assert (info["adapter"]["rank"], info["adapter"]["alpha"]) == (3, 5)
    assert set(info["adapter"]["targets"]) == set(TARGETS) and info["init"]["run"] == "start"
    ok("export --run run --to peft --out adapter --samples 2 --seed 5", capsys)
    assert "started from" in (work / "adapter/sample-1/README.md").read_text()
    ok("export --run start --to hf --out merged --dtype float32", capsys)
    assert '"file": "adapter_model.safetensors"' in (work / "merged/README.md").read_text()

    # The other methods that start from a plain LoRA.
    ok("import --from peft peft --model base --out plain --method mle", capsys)
    words = refused("posterior laplace --run plain --out laplace", capsys)
    assert "plain/run.json: does not name the training data: give --data" in words
    ok("posterior tfb --run plain --out tfb --data train.jsonl --tolerance 1", capsys)
    ok("export --run tfb --to peft --out tfb-out --samples 1", capsys)


def test_official_import_by_command(work, capsys):
    torch.save(official_state(work / "base"), work / "state_dict.pt")
    command = "import --from bayesadapt . --model base --out"
    facts = ok(f"{command} run --sampling batch", capsys)
    assert facts["method"] == "scalabl" and facts["adapter"]["prior_std"] == 1.0
    metrics = ok("evaluate --run run --data train.jsonl --samples 2", capsys)
    assert (metrics["kl"], metrics["objective"]) == ("official", "official")
    assert "there are 2 labels" in refused(f"{command} b --labels x y", capsys)
    assert "are for bayesadapt" in refused(
        "import --from peft . --model base --out b --alpha 3", capsys
    )
    assert refused(f"{command} run", capsys) == "error: run: exists already\n"
    assert cli.main(["import", "--from", "peft", "nowhere", "--model", "base", "--out", "b"]) == 2
    assert "nowhere/adapter_config.json: no such file" in capsys.readouterr().err
