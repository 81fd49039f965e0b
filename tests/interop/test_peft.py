"""PEFT's folders come in as the same function; hostile ones are refused by name."""

from __future__ import annotations

import json
import math

import pytest
import torch

from scalabl_ref import AdapterConfig, InputError, Llama, adapters, add_adapters
from scalabl_ref.interop.exporting import export
from scalabl_ref.interop.peft import read_peft, write_peft
from scalabl_ref.support.files import read_json
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..models import tiny_folder
from ..tolerances import rounding
from .samples import (
    KINDS,
    Q0,
    TARGETS,
    TOKENS,
    Evil,
    assert_equal_logits,
    bring,
    merged,
    peft_folder,
    trained,
)


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
    for name, adapter in adapters(model).items():
        hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
        rank = len(tensors[f"base_model.model.{hf}.lora_A.weight"])
        assert adapter.config.rank == 4 and (adapter.B[:, rank:] == 0).all()
        assert adapter.A.abs().sum(1).min() > 0  # the rest can learn
    alphas = {"lm_head": 9.5, "layers.0.attn.o_proj": 1, "layers.1.attn.o_proj": 6}
    expected = merged(base, source, lambda name, rank: alphas.get(name, 5) / math.sqrt(rank))
    assert_equal_logits(model, model(TOKENS), expected(TOKENS))


@torch.no_grad()
def test_a_pattern_may_have_alternatives(base, tmp_path):
    """Each of them ends the name, as PEFT reads it, and none is found within a name."""
    source, _ = peft_folder(
        tmp_path / "peft", base,
        ranks={"q_proj": 2, "down_proj": 2, "layers.0.self_attn.o_proj": 2},
        rank_pattern={r"q_proj|down_proj|0\.self_attn\.o_proj": 2}, alpha_pattern={"v|lm_head": 9},
    )  # fmt: skip
    model = bring(base, source, tmp_path / "run", options={"method": "mle"})
    expected = merged(base, source, lambda name, rank: (9 if name == "lm_head" else 5) / rank)
    assert_equal_logits(model, model(TOKENS), expected(TOKENS))


UNSET = (
    "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules"
    " kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config"
    " megatron_config modules_to_save monteclora_config revision target_parameters"
    " trainable_token_indices use_bdlora velora_config"
)
AS_PEFT_WRITES = {  # what peft 0.21.2 saves besides rank, alpha and targets
    **dict.fromkeys(UNSET.split()), "alpha_pattern": {}, "base_model_name_or_path": "gone",
    "bias": "none", "ensure_weight_tying": False, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.1,
    "megatron_core": "megatron.core", "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "rank_pattern": {}, "task_type": "CAUSAL_LM", "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip


@torch.no_grad()
def test_the_settings_of_a_folder_are_pefts(base, tmp_path):
    """All that it writes is read; what we write are names and values of its own."""
    source, _ = peft_folder(tmp_path / "peft", base, **AS_PEFT_WRITES)
    model = bring(base, source, tmp_path / "run", options={"method": "mle"})
    assert_equal_logits(model, model(TOKENS), merged(base, source)(TOKENS))
    export(trained(base, tmp_path / "run"), tmp_path / "back")
    written = read_json(tmp_path / "back/adapter_config.json")
    settings = ("r", "lora_alpha", "target_modules", "base_model_name_or_path", "lora_dropout")
    assert [written.pop(name) for name in settings] == [3, 5, list(TARGETS), base.name, 0.0]
    assert written == {name: AS_PEFT_WRITES[name] for name in written} and len(written) == 9


@pytest.mark.parametrize(
    "values",
    [
        *({"init_lora_weights": how} for how in (False, None, "gaussian", "eva", "orthogonal")),
        {"task_type": None, "bias": None, "rank_pattern": None, "alpha_pattern": None},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "revision": "main"},
        {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "megatron_core": "mine"},
        {"ensure_weight_tying": True},  # the head is not tied to the embedding
        {"exclude_modules": ["proj", "head"]},  # parts of names, which are those of no layer
    ],
)
def test_settings_that_change_nothing_are_taken(base, tmp_path, values):
    """Of two files of weights PEFT's usual one is read."""
    source, _ = peft_folder(tmp_path / "peft", base, **values)
    (source / "adapter_model.bin").touch()
    file, found, left_out = read_peft(source, Llama.from_pretrained(base))
    assert file.name == "adapter_model.safetensors" and len(found) == 9 and left_out == []


def test_only_an_adapter_of_the_head_ties_the_embedding(tmp_path):
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True)
    config = {"targets": ("q_proj",), "ensure_weight_tying": True}
    source, _ = peft_folder(tmp_path / "peft", base, **config)
    found = read_peft(source, Llama.from_pretrained(base))[1]
    assert list(found) == ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]


def test_settings_that_are_not_told_are_pefts(base, tmp_path):
    source, _ = peft_folder(tmp_path / "peft", base)
    (source / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    found = read_peft(source, Llama.from_pretrained(base))[1]
    assert {adapter.config for adapter in found.values()} == {AdapterConfig("mle", 3, 6)}


@pytest.mark.parametrize(
    ("rank", "alpha", "written"), [(49, 16.0, "16"), (3, 4.5, "4.5"), (5, None, "10")]
)
def test_alpha_goes_out_as_it_was_given(tmp_path, rank, alpha, written):
    """Not as a product of the scaling, which is rounded: 16 / 49 * 49 is not 16."""
    lora = {"lm_head": (torch.ones(rank, 2), torch.ones(2, rank))}
    write_peft(tmp_path, lora, AdapterConfig("mle", rank, alpha), "base")
    assert f'"lora_alpha": {written},' in (tmp_path / "adapter_config.json").read_text()


@torch.no_grad()
def test_a_rank_and_an_alpha_that_are_not_told_are_eight(base, tmp_path):
    source, _ = peft_folder(tmp_path / "peft", base, rank=8, alpha=8)
    values = read_json(source / "adapter_config.json")
    (source / "adapter_config.json").write_text(
        json.dumps({n: v for n, v in values.items() if n not in ("r", "lora_alpha")})
    )
    model = bring(base, source, tmp_path / "run")
    (source / "adapter_config.json").write_text(json.dumps(values))
    assert_equal_logits(model, model(TOKENS), merged(base, source)(TOKENS))


@pytest.mark.parametrize(("rank", "targets"), [(1, TARGETS), (16, ("q_proj", "lm_head"))])
@torch.no_grad()
def test_the_smallest_and_the_largest_rank_come_in(base, tmp_path, rank, targets):
    source, _ = peft_folder(tmp_path / "peft", base, rank=rank, targets=targets)
    model = bring(base, source, tmp_path / "run")
    assert {adapter.config.rank for adapter in adapters(model).values()} == {rank}
    assert_equal_logits(model, model(TOKENS), merged(base, source)(TOKENS))


@pytest.mark.parametrize("targets", [None, "all-linear"])
@torch.no_grad()
def test_targets_that_are_not_listed_are_those_that_are_there(base, tmp_path, targets):
    source, _ = peft_folder(tmp_path / "peft", base, target_modules=targets)
    model = bring(base, source, tmp_path / "run")
    assert_equal_logits(model, model(TOKENS), merged(base, source)(TOKENS))


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
    half = Llama.from_pretrained(base, torch.bfloat16)
    assert len(read_peft(source, half)[1]) == 9  # the same to the rounding of its dtype
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
        {"exclude_modules": r".*(layers\.1\.self|layers\.0\..*)"},  # the first is no whole name
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
    "too large for float32": (
        _tensor(lambda t: t.update({f"{Q0}.lora_A.weight": 1e300 * torch.ones(3, 16).double()})),
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
    "alpha True": (_config(lora_alpha=True), "must be a number above 0: True"),
    "not the first layer": (
        _config(layers_to_transform=0), r"has an adapter of layers\.1\.\S+, which adapter_config"
    ),
    "not chosen": (
        _config(layers_to_transform=[1]),
        r"has an adapter of layers\.0\.\S+, which adapter_config.json does not choose",
    ),
    "a slow pattern": (_config(rank_pattern={"(.+)+!": 1}), "rank_pattern: .* too long"),
    "a slow choice": (_config(target_modules="(.?){50}!"), "PEFT could not .* for too long"),
    "a slow layer": (
        _config(layers_pattern="(.|..)+!", layers_to_transform=[0]), "PEFT could not .* too long"
    ),
    "a layer without a number": (
        _config(layers_pattern="(.+)", layers_to_transform=[0]), "PEFT could not choose layers by"
    ),
    "a bad choice": (_config(target_modules="("), "PEFT could not choose layers by this"),
    "a choice of no names": (_config(target_modules=3), "PEFT could not choose layers by this"),
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
