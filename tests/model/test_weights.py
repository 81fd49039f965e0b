"""Model folders: every layout gives the same model, and what is wrong with one is named."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import InputError, Llama, LlamaConfig
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.support.folders import Weights, hf_to_ours, ours_to_hf, with_dtype, write_model
from scalabl_ref.support.tensors import Stored, save_tensors

from ..conftest import ROOT
from ..models import TINY


def base() -> Llama:
    """Frozen, as a loaded model is: attention has another kernel where gradients are wanted."""
    return Llama(TINY).init_random_(0, std=0.3).requires_grad_(False)


def hf_state() -> dict[str, torch.Tensor]:
    return {ours_to_hf(name): tensor for name, tensor in base().state_dict().items()}


def write_config(folder, **change):
    (folder / "config.json").write_text(json.dumps({**TINY.to_hf(), **change}))


def single(folder):
    save_tensors(folder / "model.safetensors", hf_state().items())


def pickled(folder):
    torch.save(hf_state(), folder / "pytorch_model.bin")


def sharded(folder, suffix="safetensors"):
    state, stem = hf_state(), "model" if suffix == "safetensors" else "pytorch_model"
    names = list(state)
    shards = {f"{stem}-00001-of-00002.{suffix}": names[:7]}
    shards[f"{stem}-00002-of-00002.{suffix}"] = names[7:]
    for file, part in shards.items():
        if suffix == "safetensors":
            save_tensors(folder / file, [(name, state[name]) for name in part])
        else:
            torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


LAYOUTS = [single, pickled, sharded, lambda folder: sharded(folder, "bin")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["single", "bin", "sharded", "sharded-bin"])
def test_every_layout_gives_the_same_model(tmp_path, layout):
    write_config(tmp_path)
    layout(tmp_path)
    tokens = torch.arange(1, 9)[None]
    model = Llama.from_pretrained(tmp_path)
    assert torch.equal(model(tokens), base()(tokens))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert Llama.from_pretrained(tmp_path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_safetensors_go_before_pickles_and_one_file_before_its_shards(tmp_path):
    def names() -> list[str]:
        return [file.name for file in Weights(tmp_path).files]

    sharded(tmp_path, "bin")
    assert names() == [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    pickled(tmp_path)
    assert names() == ["pytorch_model.bin"]
    sharded(tmp_path)
    assert names() == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    single(tmp_path)
    assert names() == ["model.safetensors"]


def test_a_folder_of_a_model_is_filled(tmp_path):
    """With its configuration last: where it is, all is."""
    tensors, told = {"a": Stored.held(torch.ones(3))}, []
    source = tmp_path / "source"
    with pytest.raises(InputError, match="/source: cannot be copied"):
        write_model(tmp_path, {}, tensors, {"merges.txt": source})
    assert not (tmp_path / "config.json").exists()
    source.write_text("a b")
    write_model(tmp_path, {"é": [1]}, tensors, {"merges.txt": source}, torch.half, told.append)
    assert (tmp_path / "config.json").read_text("utf-8") == '{\n  "é": [\n    1\n  ]\n}\n'
    assert (tmp_path / "merges.txt").read_text() == "a b" and told == [6]
    assert Weights(tmp_path)["a"].dtype == torch.float16


def test_a_configuration_states_the_dtype_of_its_weights_under_either_key():
    values = {"torch_dtype": "float32", "x": 1, "dtype": "float16"}
    expected = {"torch_dtype": "bfloat16", "x": 1, "dtype": "bfloat16"}
    assert with_dtype(values, torch.bfloat16) == expected
    assert with_dtype(values, None) == values and with_dtype({"x": 1}, torch.half) == {"x": 1}


def test_a_lying_layer_count_is_refused_at_once(tmp_path):
    """Before a module is built for each: a million layers would take minutes."""
    single(tmp_path)
    write_config(tmp_path, num_hidden_layers=10**6)
    with pytest.raises(InputError, match="has tensors of 2 layers, expected 1000000"):
        Llama.from_pretrained(tmp_path)


def test_old_rope_buffers_are_passed_over(tmp_path):
    write_config(tmp_path)
    buffer = ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2))
    save_tensors(tmp_path / "model.safetensors", [*hf_state().items(), buffer])
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), base()(tokens))


parts = st.sampled_from(
    ["layers", "0", "17", "self_attn", "q_proj", "mlp", "input_layernorm", "weight", "norm", "bias"]
)


@given(st.lists(parts, min_size=1, max_size=6), st.booleans())
def test_name_maps_are_inverse(middle, head):
    name = ".".join(["lm_head" if head else "model", *middle])
    assert ours_to_hf(hf_to_ours(name)) == name


def test_names_are_those_of_the_same_place():
    """Literally: a map that swaps two names is its own inverse, and must not pass."""
    layer = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.o_proj": "attn.o_proj",
        "self_attn.k_norm": "attn.k_norm",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    for theirs, ours in layer.items():
        assert hf_to_ours(f"model.layers.3.{theirs}.weight") == f"layers.3.{ours}.weight"
    assert hf_to_ours("model.embed_tokens.weight") == "embed_tokens.weight"
    assert hf_to_ours("model.norm.weight") == "norm.weight"
    assert hf_to_ours("lm_head.weight") == "lm_head.weight"


def test_names_of_another_kind_are_refused():
    with pytest.raises(InputError, match=r"transformer\.h\.0: expected a name that begins with"):
        hf_to_ours("transformer.h.0")


def header_of(path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(path, header: dict | bytes, body: bytes, size: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def truncate_header(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def header_longer_than_file(path):
    header, body = header_of(path)
    with_header(path, header, body, size=2**40)


def header_not_json(path):
    with_header(path, b"{" * 50, b"")


def offsets_past_the_end(path):
    header, body = header_of(path)
    header["model.norm.weight"]["data_offsets"][1] += 2**40
    with_header(path, header, body)


def offsets_that_lie(path):
    header, body = header_of(path)
    header["model.norm.weight"]["shape"] = [1000]
    with_header(path, header, body)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        truncate_header,
        empty,
        header_longer_than_file,
        header_not_json,
        offsets_past_the_end,
        offsets_that_lie,
    ],
)
def test_a_damaged_safetensors_file_is_named(tmp_path, damage):
    write_config(tmp_path)
    single(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: not a valid safetensors file"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "tensor norm.weight is missing"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(3)}),
            r"tensor model.norm.weight has shape \(3,\), expected \(16,\)",
        ),
        (
            lambda s: s.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3)}),
            "tensor model.layers.2.mlp.up_proj.weight is not part of this model",
        ),
        (
            lambda s: s["model.norm.weight"].fill_(float("nan")),
            "tensor model.norm.weight has NaN or infinite values",
        ),
        (
            lambda s: s["lm_head.weight"].fill_(float("-inf")),
            "tensor lm_head.weight has NaN or infinite values",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(16, dtype=torch.int32)}),
            "tensor model.norm.weight is torch.int32, expected floats of 16 bits or more",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}),
            "tensor model.norm.weight is torch.float8_e4m3fn, expected floats of 16 bits or more",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path, spoil, message):
    state = hf_state()
    spoil(state)
    write_config(tmp_path)
    save_tensors(tmp_path / "model.safetensors", state.items())
    with pytest.raises(InputError, match=message):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "method"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        ("quantization_config", {"load_in_4bit": True}, "bitsandbytes"),
        ("compression_config", {"format": "pack-quantized"}, "compressed-tensors"),
        ("quantization", {"bits": 4, "group_size": 64}, "MLX"),
    ],
)
def test_a_folder_that_was_quantised_elsewhere_is_refused_by_its_method(
    tmp_path, key, value, method
):
    """Before any tensor is looked at: there is none here."""
    write_config(tmp_path, **{key: value})
    with pytest.raises(
        InputError, match=f"config.json: {key}: .* quantised elsewhere, by {method}:"
    ):
        Llama.from_pretrained(tmp_path)
    write_config(tmp_path, **{key: None})
    single(tmp_path)
    Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_map", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("qweight", "GPTQ or AWQ"),
        ("qzeros", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale", "compressed-tensors or in FP8"),
        ("weight_scale_inv", "an FP8 method"),
        ("scales", "MLX, or another method"),
    ],
)
def test_codes_that_no_configuration_tells_of_are_known_by_their_names(tmp_path, name, method):
    full = f"model.layers.0.self_attn.q_proj.{name}"
    state = {**hf_state(), full: torch.zeros(3, dtype=torch.uint8)}
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(8, 1, dtype=torch.uint8)
    write_config(tmp_path)
    save_tensors(tmp_path / "model.safetensors", state.items())
    with pytest.raises(InputError, match=f"tensor {full} is of weights that were .* by {method}:"):
        Llama.from_pretrained(tmp_path)


TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@torch.no_grad()
def test_a_head_that_differs_counts_whatever_the_configuration_says(tmp_path):
    write_config(tmp_path, tie_word_embeddings=True)
    single(tmp_path)
    model = Llama.from_pretrained(tmp_path)
    assert not model.config.tie_word_embeddings and model.config == TINY
    assert torch.equal(model(TOKENS), base()(TOKENS))
    head = base().lm_head.weight
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(
        head, base().embed_tokens.weight
    )


@pytest.mark.parametrize("stored", ["both", "head"])
def test_a_head_that_is_the_embedding_is_tied(tmp_path, stored):
    state = hf_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if stored == "head":
        del state["model.embed_tokens.weight"]
    write_config(tmp_path, tie_word_embeddings=True)
    save_tensors(tmp_path / "model.safetensors", state.items())
    model = Llama.from_pretrained(tmp_path)
    assert model.tied and model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, base().embed_tokens.weight)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("wide", ["norm", "lm_head"])
@torch.no_grad()
def test_weights_of_several_dtypes_become_one(tmp_path, key, wide):
    """As k-bit training leaves them: that of config.json, else the embedding's."""
    state = {n: t if wide in n else t.bfloat16() for n, t in hf_state().items()}
    for tensor in state.values():
        tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    save_tensors(tmp_path / "model.safetensors", state.items())
    write_config(tmp_path, **({key: "bfloat16"} if key else {}))
    model = Llama.from_pretrained(tmp_path)
    assert all(
        torch.equal(tensor, state[ours_to_hf(name)].bfloat16())
        for name, tensor in model.state_dict().items()
    )
    assert model(TOKENS).dtype == torch.bfloat16
    write_config(tmp_path, dtype="float32")
    wider = Llama.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(t, state[ours_to_hf(name)].float()) for name, t in wider.items())
    asked = Llama.from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    assert all(tensor.dtype == torch.float64 for tensor in asked.values())


def test_a_value_too_large_for_the_common_dtype_is_named(tmp_path):
    state = {n: t if "norm" in n else t.half() for n, t in hf_state().items()}
    state["model.norm.weight"][0] = 1e6
    save_tensors(tmp_path / "model.safetensors", state.items())
    write_config(tmp_path, dtype="float16")
    with pytest.raises(
        InputError, match="tensor norm.weight has values too large for torch.float16"
    ):
        Llama.from_pretrained(tmp_path)


def test_missing_shards_and_lying_indices_are_named(tmp_path):
    write_config(tmp_path)
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]

    def refused(weight_map, message):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            Weights(tmp_path)

    first = next(iter(good.values()))
    refused({**good, "extra": first}, "tensor extra is missing, though the index names it")
    refused({**good, "extra": "../model.safetensors"}, "is not the name of a file in the folder")
    refused({**good, "extra": 3}, "is not the name of a file in the folder")
    refused({}, "expected a non-empty object under 'weight_map'")
    refused([], "expected a non-empty object under 'weight_map'")
    (tmp_path / first).unlink()
    refused(good, f"{first}: shard is missing")


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    write_config(tmp_path)
    torch.save({"model.norm.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: refused: a pickle may hold only"):
        Llama.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize("read", [Llama.from_pretrained, load_tokenizer])
def test_a_git_lfs_pointer_is_told_from_the_file(tmp_path, name, read):
    if read is load_tokenizer:
        name = "tokenizer.model" if name.endswith("bin") else "tokenizer.json"
    write_config(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(InputError, match=f"{name}: is a git-lfs pointer: fetch the file itself"):
        read(tmp_path)


def test_a_pickle_of_something_else_is_named(tmp_path):
    write_config(tmp_path)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="expected a dictionary of tensors"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ('"\\ud800', "not JSON"),
        ('{"model_type": "llama"}', "config.json: key 'vocab_size' is missing"),
        ('{"model_type": "bert"}', "config.json: model_type 'bert' is not known"),
        ('{"format": "scalabl_ref"}', "config.json: .*missing"),
        ('{"format": "scalabl_ref", "rope": 3}', "config.json: .*"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    single(tmp_path)
    with pytest.raises(InputError, match=message):
        Llama.from_pretrained(tmp_path)


def test_an_empty_folder_says_what_it_needs(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        Llama.from_pretrained(tmp_path)
    write_config(tmp_path)
    with pytest.raises(InputError, match="no weights: expected model.safetensors"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        Weights(tmp_path / "absent")


@pytest.mark.parametrize("old", [False, True])
def test_memory_of_a_tensor_read_once_is_its_own(tmp_path, old):
    """Each read gives another mapping, where the format allows one: nothing keeps the pages."""
    state = {name: tensor.clone() for name, tensor in hf_state().items()}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    weights = Weights(tmp_path, once=True)
    for name, tensor in state.items():
        first, second = weights[name], weights[name]
        assert torch.equal(first, tensor)
        assert (first.data_ptr() == second.data_ptr()) == old


MEASURED = """
import ctypes, sys, torch
from pathlib import Path
from scalabl_ref import Llama
trim = getattr(ctypes.CDLL(None), "malloc_trim", int)
def mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024
for dtype, kind in ((None, None), (torch.float32, None), (None, "nf4")):
    trim(0)  # what is given back later would count as never taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, copied = mib("VmRSS"), mib("RssAnon")
    model = Llama.from_pretrained(sys.argv[1], dtype=dtype, quantize=kind)
    loaded = mib("VmHWM") - before
    for weight in model.parameters():
        weight.amax()  # reads it all
    print(loaded, mib("VmHWM") - before, mib("RssAnon") - copied)
    del model, weight
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_weights_are_in_memory_once(tmp_path):
    """88 MiB of bfloat16 weights, the largest tensor 12: mapped, copied wider, in 4 bits.

    For the last, 64 MiB of linear layers become 64 (4 + 16 / 64) / 16 = 17.
    """
    shape = LlamaConfig(6144, 1024, 4096, 2, 8, 8, 128)
    model = Llama(shape, dtype=torch.bfloat16)
    for weight in model.parameters():
        torch.nn.init.ones_(weight)
    save_tensors(tmp_path / "model.safetensors", model.state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps(shape.to_dict()))
    sizes = [weight.nbytes / 2**20 for weight in model.parameters()]
    total, room = sum(sizes), max(sizes) + 12  # a tensor, and what the program takes on the way
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    mapped, wider, narrow = ([float(n) for n in line.split()] for line in done.stdout.splitlines())
    loaded, used, copied = mapped
    assert max(sizes) <= loaded <= room  # none is in memory yet
    assert total <= used <= total + room and copied <= 12
    loaded, used, copied = wider
    assert 2 * total <= copied <= loaded <= used <= 2 * total + room
    loaded, used, copied = narrow
    assert 17 <= copied <= 17 + 12 and copied <= loaded <= 17 + room and used <= 17 + 24 + room
