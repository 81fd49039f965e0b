"""A training starts where a run ended; the commands that bring in and take out."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import pytest
import torch

from scalabl_ref import AdapterConfig, InputError, Llama, Noise, adapters, add_adapters
from scalabl_ref.app import cli
from scalabl_ref.core.config import COVARIANCES
from scalabl_ref.interop.importing import import_adapter, read_run, start_from
from scalabl_ref.support.files import read_json
from scalabl_ref.support.tensors import load_tensors, save_tensors
from scalabl_ref.training.runs import fingerprint, run_facts

from ..app.commands import ok, refused
from ..models import questions_file, tiny_folder
from ..tolerances import rounding
from .samples import KINDS, LETTERS, TARGETS, TOKENS, a_run, bound, official_state, peft_folder


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
    words = "run: layers.0.attn.q_proj: a LoRA of rank 3 does not fit into one of rank 2"
    with pytest.raises(InputError, match=words):
        start_from(small, read_run(tmp_path / "run", small), "run")


def test_a_start_from_another_base_head_or_layers_is_refused(base, tmp_path):
    a_run(base, tmp_path / "run")
    for model, words in (
        (
            Llama.from_pretrained(tiny_folder(tmp_path / "b", rms_norm_eps=1e-3)),
            f"another base model, {base}",
        ),
        (Llama.from_pretrained(base), "its head has the tokens .*, and the model's all"),
        (Llama.from_pretrained(base).trim_head([3, 4, 5]), r"and the model's \(3, 4, 5\)"),
        (Llama.from_pretrained(base).trim_head(LETTERS[::-1]), "its head has the tokens"),
    ):
        with pytest.raises(InputError, match=words):
            read_run(tmp_path / "run", model)
    model = Llama.from_pretrained(base).trim_head(LETTERS)
    add_adapters(model, AdapterConfig(rank=3, targets=("q_proj",)))
    with pytest.raises(InputError, match="run: has an adapter of "):
        start_from(model, read_run(tmp_path / "run", model), "run")


def test_a_start_without_one_of_its_tensors_is_refused(base, tmp_path):
    model = a_run(base, tmp_path / "run")
    tensors, _ = load_tensors(tmp_path / "run" / "adapter.safetensors")
    del tensors["layers.1.attn.q_proj.log_s"]
    save_tensors(tmp_path / "run" / "adapter.safetensors", tensors.items())
    words = "adapter.safetensors: tensor layers.1.attn.q_proj.log_s is missing"
    with pytest.raises(InputError, match=words):
        read_run(tmp_path / "run", model)


def test_a_run_says_what_it_was_made_of(base, tmp_path):
    source, _ = peft_folder(tmp_path / "peft", base)
    info = {"model": str(base), "format": "arc", "note": 1}
    # The rank, alpha and targets of SRC count.
    options = {"method": None, "rank": 9, "alpha": 1.0, "targets": ("k_proj",)}
    facts = import_adapter("peft", source, base, tmp_path / "run", options, info)
    weights = (source / "adapter_model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    made = {"from": "peft", "file": "adapter_model.safetensors", "sha256": digest, "method": "mle"}
    written = read_json(tmp_path / "run/run.json")
    assert written["imported"] == made and {key: written[key] for key in info} == info
    assert written["train"] == {"kl": None, "objective": None, "seed": None}
    adapter = AdapterConfig("scalabl", 3, 5, TARGETS)
    assert facts.pop("adapter") == dataclasses.asdict(adapter) and facts == {**made, "layers": 9}


def test_an_imports_base_has_the_dtype_and_device_given(base, tmp_path):
    source, _ = peft_folder(tmp_path / "peft", base)
    given = ("peft", source, base, tmp_path / "run", {}, {"model": str(base)})
    with pytest.raises(RuntimeError, match="nowhere"):
        import_adapter(*given, device="nowhere")
    import_adapter(*given, dtype=torch.bfloat16)
    half = Llama.from_pretrained(base, torch.bfloat16)
    assert run_facts(tmp_path / "run").fingerprint == fingerprint(half)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("lora", {}, "from must be one of peft, bayesadapt, not 'lora'"),
        ("peft", {"labels": []}, "alpha and labels are for bayesadapt"),
        ("peft", {"alpha": 0.0}, "alpha and labels are for bayesadapt"),
    ],
)
def test_what_cannot_be_imported_is_refused(base, tmp_path, kind, options, words):
    source, _ = peft_folder(tmp_path / "peft", base)
    with pytest.raises(InputError, match=words):
        import_adapter(kind, source, base, tmp_path / "run", {}, {}, **options)


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
