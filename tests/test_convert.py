"""tools/convert_hf.py: exact both ways, and llama2.c files."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.checkpoint import Weights, load_tensors, ours_to_hf, save_tensors
from scalabl_ref.llama import RopeConfig

from .models import CLASSES, TINY
from .tolerances import rounding

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import convert_hf


def hf_folder(folder, config, extra=(), dtype=torch.float32):
    folder.mkdir()
    model = Llama(config, dtype=dtype).init_random_(0, std=0.3)
    state = {ours_to_hf(name): tensor for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    values = {**config.to_hf(), "torch_dtype": "float32", "something_new": [1, {"a": None}]}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text("{}")
    save_tensors(folder / "model.safetensors", [*state.items(), *extra])
    return folder


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, tie_word_embeddings=True, rope=RopeConfig("llama3", 5e5, 8.0)),
        dataclasses.replace(TINY, qkv_bias=True),
        dataclasses.replace(TINY, qk_norm=True),
        dataclasses.replace(TINY, qkv_bias=True, output_bias=True, mlp_bias=True),
    ],
    ids=["llama", "tied-llama3", "qwen2", "qwen3", "biases"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_exact(tmp_path, config, dtype):
    """Same names, same bytes per tensor, same config.json; old RoPE buffers too."""
    buffer = ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2))
    source = hf_folder(tmp_path / "hf", config, [buffer], dtype)
    convert_hf.convert(source, tmp_path / "ours")
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    before, after = Weights(source), Weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        a, b = before[name], after[name]
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    for file in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads(
            (source / file).read_text()
        )
    tokens = torch.arange(1, 9)[None]
    models = [Llama.from_pretrained(tmp_path / name) for name in ("hf", "ours", "back")]
    assert models[0].config == models[1].config == models[2].config
    assert all(torch.equal(m(tokens), models[0](tokens)) for m in models[1:])


@pytest.mark.parametrize("layout", ["single", "bin", "sharded"])
def test_a_tied_head_that_was_stored_survives(tmp_path, layout):
    """Some old checkpoints hold the tied head a second time; every layout of the source is read."""
    config = dataclasses.replace(TINY, tie_word_embeddings=True)
    state = Llama(config).init_random_(0, std=0.3).state_dict()
    state = {ours_to_hf(name): tensor for name, tensor in state.items()}
    assert "lm_head.weight" in state
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config.to_hf()))
    if layout == "bin":
        torch.save(state, source / "pytorch_model.bin")
    elif layout == "single":
        save_tensors(source / "model.safetensors", state.items())
    else:
        where = {name: f"{i % 2}.safetensors" for i, name in enumerate(state)}
        for shard in set(where.values()):
            part = [(name, state[name]) for name in state if where[name] == shard]
            save_tensors(source / shard, part)
        index = {"weight_map": where}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_hf.convert(source, tmp_path / "ours")
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    back = Weights(tmp_path / "back")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    source = hf_folder(tmp_path / "hf", TINY)

    def refused(*arguments) -> str:
        assert convert_hf.main([str(a) for a in arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    assert "config.json: no such file" in refused(tmp_path / "absent", tmp_path / "x")
    assert "is not of the converted layout" in refused(source, tmp_path / "x", "--to-hf")
    assert "no such file" in refused(source, tmp_path / "x", "--tokenizer", tmp_path / "none")
    assert convert_hf.main([str(source), str(tmp_path / "ours")]) == 0
    assert "exists already" in refused(source, tmp_path / "ours")
    assert "is converted already" in refused(tmp_path / "ours", tmp_path / "x")
    tensors, _ = load_tensors(source / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_tensors(source / "model.safetensors", tensors.items())
    assert "tensor norm.weight has NaN" in refused(source, tmp_path / "x")
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "ours"}


def test_a_cut_head_has_no_hugging_face_layout(tmp_path):
    model = Llama(TINY).init_random_(0).trim_head(CLASSES)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_tensors(tmp_path / "cut" / "model.safetensors", model.state_dict().items())
    assert Llama.from_pretrained(tmp_path / "cut").config.head_tokens == CLASSES
    with pytest.raises(InputError, match="cut down to class tokens"):
        convert_hf.convert(tmp_path / "cut", tmp_path / "hf", to_hf=True)


# --- llama2.c ----------------------------------------------------------------------------------


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from half-split order to llama2.c's: written out, row by row, for every head."""
    head_dim = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(head_dim // 2):
            rows += [weight[head * head_dim + i], weight[head * head_dim + i + head_dim // 2]]
    return torch.stack(rows)


def llama2c_file(path, model: Llama) -> Path:
    """The legacy format as llama2.c's export writes it."""
    c, layers = model.config, list(model.layers)
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    columns = [
        lambda b: b.attn_norm.weight,
        lambda b: interleave(b.attn.q_proj.weight, heads),
        lambda b: interleave(b.attn.k_proj.weight, kv_heads),
        lambda b: b.attn.v_proj.weight,
        lambda b: b.attn.o_proj.weight,
        lambda b: b.mlp_norm.weight,
        lambda b: b.mlp.gate_proj.weight,
        lambda b: b.mlp.down_proj.weight,
        lambda b: b.mlp.up_proj.weight,
    ]
    tensors = [model.embed_tokens.weight]
    tensors += [column(block) for column in columns for block in layers]
    tensors += [model.norm.weight, torch.zeros(2, c.max_position_embeddings, c.head_dim // 2)]
    if not c.tie_word_embeddings:
        tensors.append(model.lm_head.weight)
    numbers = [v for tensor in tensors for v in tensor.detach().flatten().tolist()]
    vocab = c.vocab_size if c.tie_word_embeddings else -c.vocab_size
    sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, heads, kv_heads, vocab)
    header = struct.pack("<7i", *sizes, c.max_position_embeddings)
    path.write_bytes(header + struct.pack(f"<{len(numbers)}f", *numbers))
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_files(tmp_path, tied):
    config = dataclasses.replace(TINY, tie_word_embeddings=tied, rms_norm_eps=1e-5)
    model = Llama(config).init_random_(0, std=0.3)
    convert_hf.convert(llama2c_file(tmp_path / "m.bin", model), tmp_path / "ours")
    loaded, tokens = Llama.from_pretrained(tmp_path / "ours"), torch.arange(1, 9)[None]
    difference = (loaded(tokens) - model(tokens)).abs().max()
    assert difference <= rounding(torch.float32, 256) * model(tokens).abs().max()
    convert_hf.convert(tmp_path / "ours", tmp_path / "hf", to_hf=True)
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["architectures"] == ["LlamaForCausalLM"] and values["model_type"] == "llama"
    assert Llama.from_pretrained(tmp_path / "hf").config == loaded.config


def test_broken_llama2c_files_are_named(tmp_path):
    path = llama2c_file(tmp_path / "m.bin", Llama(TINY).init_random_(0))
    data = path.read_bytes()
    for broken, message in (
        (data[:20], "too short for a llama2.c header"),
        (data[:-4], "bytes, and its header makes"),
        (data + b"\0", "bytes, and its header makes"),
        (b"\xff" * 28 + data[28:], "its header makes no sense"),
        (struct.pack("<7i", 16, 24, 2, 4, 3, 40, 64) + data[28:], "must be a multiple"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            convert_hf.convert(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
