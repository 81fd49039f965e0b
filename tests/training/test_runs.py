"""Runs on disk: what comes back, and how broken ones are refused."""

from __future__ import annotations

import json
import re

import pytest
import torch

from scalabl_ref import AdapterConfig, InputError, Llama, Noise, add_adapters, load_run, save_run
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.support.folders import ours_to_hf
from scalabl_ref.support.tensors import save_tensors
from scalabl_ref.training.runs import fingerprint, keep_command, resume_command, run_facts

from ..models import TINY, tiny_folder, tiny_model


def saved_run(tmp_path):
    base = Llama(TINY).init_random_(0, std=0.3)
    model = tiny_model()
    save_run(tmp_path, model, {"model": "base", "note": 1})
    return base, model


def test_a_run_comes_back_as_it_was(tmp_path):
    base, model = saved_run(tmp_path)
    loaded, info = load_run(tmp_path, base)
    assert info["note"] == 1 and not loaded.training
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(loaded(tokens, noise=Noise(1, 1)), model(tokens, noise=Noise(1, 1)))


def test_a_runs_base_has_the_dtype_and_device_given(tmp_path):
    base = tiny_folder(tmp_path / "base")
    model = add_adapters(Llama.from_pretrained(base, torch.bfloat16), AdapterConfig(rank=2))
    save_run(tmp_path / "run", model, {"model": str(base)})
    assert (
        load_run(tmp_path / "run", dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16
    )
    with pytest.raises(RuntimeError, match="nowhere"):
        load_run(tmp_path / "run", device="nowhere")


def test_a_base_that_has_left_the_hubs_cache_is_asked_for_by_name(tmp_path):
    folder = tmp_path / "models--some--model" / "snapshots" / "0f"
    save_run(tmp_path / "run", tiny_model(), {"model": str(folder)})
    words = f"its base model {folder} is not there: give --model some/model"
    with pytest.raises(InputError, match=words):
        load_run(tmp_path / "run")


def test_facts_of_another_run_do_not_stand_for_a_models_own(tmp_path):
    saved_run(tmp_path / "first")
    first = run_facts(tmp_path / "first")
    save_run(tmp_path / "second", tiny_model(rank=2, trim=False), first)
    second = run_facts(tmp_path / "second")
    assert (second.adapter["rank"], second.head_tokens, second["note"]) == (2, None, 1)


def test_a_command_is_repeated_as_it_was_typed(tmp_path):
    keep_command(tmp_path, ["scalabl", "train", "--resume", "--out", "my run", "--lr", "0.1"])
    expected = "go on with `scalabl train --out 'my run' --lr 0.1 --resume`"
    assert resume_command(tmp_path) == expected
    (tmp_path / "command.txt").write_bytes(b"\xff")
    assert resume_command(tmp_path) == "go on with `train --resume`"


def test_another_base_is_refused(tmp_path):
    saved_run(tmp_path)
    other = Llama(TINY).init_random_(1, std=0.3)
    for folder, words in (
        (None, "was trained on base; the model given is another model"),
        ("other", "was trained on base; other is another model"),
        ("./base", "was trained on another base model than base is now"),
    ):
        with pytest.raises(InputError, match=words):
            load_run(tmp_path, other, base=folder)


def test_broken_runs_are_named(tmp_path):
    base, model = saved_run(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    for key in ("model", "adapter", "head_tokens", "fingerprint"):
        rest = {name: value for name, value in record.items() if name != key}
        (tmp_path / "run.json").write_text(json.dumps(rest))
        with pytest.raises(InputError, match=f"key '{key}' is missing"):
            load_run(tmp_path, Llama(TINY).init_random_(0, std=0.3))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="run.json: not JSON"):
        load_run(tmp_path, Llama(TINY).init_random_(0, std=0.3))
    with pytest.raises(InputError, match="absent: no such folder: expected a run"):
        load_run(tmp_path / "absent", base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 5}, "model must be a text, not 5"),
        ({"model": None}, "model must be a text, not None"),
        ({"fingerprint": []}, "fingerprint must be a text, not []"),
        ({"head_tokens": "abc"}, "head_tokens must be a list (each a whole number) or null, not"),
        ({"head_tokens": [5, 7, 1.5]}, "head_tokens must be a list (each a whole number) or null"),
        ({"dtype": "float99"}, "dtype must be float32 or bfloat16 or null, not 'float99'"),
        ({"quantize": True}, "quantize must be int8 or nf4 or null, not True"),
        ({"format": None}, "format must be a text, not None"),
        ({"format": "xml"}, "format must be jsonl or arc or"),
        ({"limit": "3"}, "limit must be a whole number or null, not '3'"),
        ({"holdout": [0.5]}, "holdout must be a finite number, not [0.5]"),
        ({"train": "long"}, "train must be an object"),
        ({"train": {"kl": "sideways"}}, "train: kl must be forward or official or null, not"),
        (
            {"train": {"objective": "best"}},
            "train: objective must be elbo or official or null, not 'best'",
        ),
        ({"train": {"seed": 0.5}}, "train: seed must be a whole number or null, not 0.5"),
        ({"adapter": []}, "adapter must be an object"),
        ({"adapter": {"method": "mle", "rank": 2.5}}, "adapter: rank must be a whole number, not"),
        ({"adapter": {"method": "mle", "rank": 3, "size": 1}}, "adapter: unknown field 'size'"),
        ({"adapter": {"method": "magic", "rank": 3}}, "method must be one of scalabl, mle"),
        (
            {"adapter": {"method": "mle", "rank": 3, "targets": 4}},
            "adapter: targets must be a list",
        ),
    ],
)
def test_facts_that_cannot_be_are_named(tmp_path, change, message):
    base, _ = saved_run(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=re.escape(f"run.json: {message}")):
        load_run(tmp_path, base)


def test_facts_that_nobody_told_are_the_usual_ones(tmp_path):
    """And those of a part of a run's record are completed, with the rest kept."""
    saved_run(tmp_path)
    info = run_facts(tmp_path)
    assert (info["format"], info["holdout"], info["note"]) == ("jsonl", 0, 1)
    for key in ("data", "data_sha256", "dtype", "limit", "posterior", "prompt_template"):
        assert info[key] is None, key
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**info, "train": {"kl": "official", "lr": 0.5}}))
    assert run_facts(tmp_path)["train"] == {
        "kl": "official", "lr": 0.5, "objective": None, "seed": None
    }  # fmt: skip


def test_facts_are_attributes_and_keys(tmp_path):
    saved_run(tmp_path)
    facts = run_facts(tmp_path)
    written = json.loads((tmp_path / "run.json").read_text())
    assert {key: facts[key] for key in written} == written
    assert facts.adapter == written["adapter"] and facts.fingerprint == written["fingerprint"]
    assert dict(facts) == {**facts} and len(facts) == len(list(facts))
    assert "note" in facts and "others" not in facts and facts.others == {"note": 1}
    with pytest.raises(KeyError):
        facts["absent"]


def test_a_run_is_a_model_and_facts(tmp_path):
    base, _ = saved_run(tmp_path)
    run = load_run(tmp_path, base)
    model, facts = run
    assert run.model is model is base and run.facts is facts and facts.model == "base"


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_has_the_same_fingerprint_in_either_layout(tmp_path, tied):
    """And whatever the model became after it was loaded."""
    ours = tiny_folder(tmp_path / "ours", tie_word_embeddings=tied)
    model = Llama.from_pretrained(ours)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    state = {ours_to_hf(name): tensor for name, tensor in model.state_dict().items()}
    save_tensors(theirs / "model.safetensors", state.items())
    config = {**model.config.to_hf(), "tie_word_embeddings": True}  # the weights decide
    (theirs / "config.json").write_text(json.dumps(config))
    expected = fingerprint(model)
    assert fingerprint(Llama.from_pretrained(theirs)) == expected
    assert fingerprint(add_adapters(model.trim_head([1, 2]), AdapterConfig(rank=2))) == expected
    for weight in ("norm.weight", "layers.1.attn.q_proj.weight"):
        other = Llama.from_pretrained(ours)
        other.get_parameter(weight).view(-1)[0] += 1
        assert fingerprint(other) != expected


def test_a_folder_of_codes_has_the_fingerprint_of_its_model(tmp_path):
    folder = tiny_folder(tmp_path / "base")
    model = Llama.from_pretrained(folder, quantize="int8")
    plain = fingerprint(Llama.from_pretrained(folder))
    save_tensors(folder / "model.safetensors", model.state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantize": "int8"}))
    assert fingerprint(Llama.from_pretrained(folder)) == fingerprint(model) != plain


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("lm_head.A"), "tensor lm_head.A is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is unexpected"),
        (lambda t: t.update({"lm_head.B": torch.zeros(2, 2)}), r"lm_head.B has shape \(2, 2\)"),
        (lambda t: t["lm_head.B"].fill_(float("nan")), "lm_head.B has NaN"),
        (lambda t: t.update({"lm_head.B": t["lm_head.B"].double() * 1e300}), "lm_head.B has NaN"),
        (lambda t: t.update({"lm_head.B": t["lm_head.B"].int()}), "lm_head.B is torch.int32"),
    ],
)
def test_broken_adapters_are_named(tmp_path, spoil, message):
    base, model = saved_run(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    spoil(tensors)
    save_tensors(tmp_path / "adapter.safetensors", tensors.items())
    with pytest.raises(InputError, match=message):
        load_run(tmp_path, base)
