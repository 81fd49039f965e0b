"""tools/convert_hf.py: exact both ways, and llama2.c files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.model.config import LlamaConfig, RopeConfig
from scalabl_ref.support.folders import Weights, ours_to_hf
from scalabl_ref.support.tensors import Stored, load_tensors, save_tensors, write_tensors

from ..conftest import ROOT
from ..models import CLASSES, TINY
from ..tolerances import rounding

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import convert_hf


def hf_folder(folder, config, extra=(), dtype=torch.float32, shards=1):
    folder.mkdir()
    model = Llama(config, dtype=dtype).init_random_(0, std=0.3)
    state = {ours_to_hf(name): tensor for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    values = {**config.to_hf(), "torch_dtype": "float32", "something_new": [1, {"a": None}]}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text("{}")
    state.update(extra)
    if shards == 1:
        save_tensors(folder / "model.safetensors", state.items())
    else:
        in_shards(folder, state, shards)
    return folder


def in_shards(folder, state, shards):
    """Write tensors by turns into so many files, and their index."""
    where = {name: f"{i % shards}.safetensors" for i, name in enumerate(state)}
    for shard in set(where.values()):
        part = [(name, state[name]) for name in state if where[name] == shard]
        save_tensors(folder / shard, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


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
        in_shards(source, state, 2)
    convert_hf.convert(source, tmp_path / "ours")
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    back = Weights(tmp_path / "back")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name


@torch.no_grad()
def test_a_head_that_differs_from_the_embedding_it_is_tied_to(tmp_path):
    """What PEFT's merge leaves: the file's head goes there and back, and into a llama2.c file."""
    change = {"intermediate_size": 32, "rms_norm_eps": 1e-5}
    source = hf_folder(tmp_path / "hf", dataclasses.replace(TINY, **change))
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    expected = Llama.from_pretrained(source)(torch.arange(5)[None])
    convert_hf.convert(source, tmp_path / "ours")
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    convert_hf.convert(source, tmp_path / "m.bin", to_llama2c=True)
    convert_hf.convert(tmp_path / "m.bin", tmp_path / "again")
    for name in ("ours", "back", "again"):
        model = Llama.from_pretrained(tmp_path / name)
        assert not model.tied and torch.equal(model(torch.arange(5)[None]), expected)
    before, back = Weights(source), Weights(tmp_path / "back")
    assert before.keys() == back.keys()
    assert all(torch.equal(before[name], back[name]) for name in before)


def test_a_folder_of_several_dtypes_keeps_its_bytes(tmp_path):
    source = hf_folder(tmp_path / "hf", TINY)
    tensors, _ = load_tensors(source / "model.safetensors")
    tensors = {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}
    save_tensors(source / "model.safetensors", tensors.items())
    convert_hf.convert(source, tmp_path / "ours")
    before, after = Weights(source), Weights(tmp_path / "ours")
    assert all(torch.equal(before[ours_to_hf(name)], after[name]) for name in after)
    assert before["model.norm.weight"].dtype == after["norm.weight"].dtype == torch.float32
    expected = Llama.from_pretrained(source).state_dict()  # whose config.json says float32
    ours = Llama.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(ours[name], t) for name, t in expected.items())
    assert {t.dtype for t in (*ours.values(), *expected.values())} == {torch.float32}


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    source = hf_folder(tmp_path / "hf", TINY)

    def refused(*arguments) -> str:
        assert convert_hf.main([str(a) for a in arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    assert "config.json: no such file" in refused(tmp_path / "absent", tmp_path / "x")
    assert "is in Hugging Face's layout already" in refused(source, tmp_path / "x", "--to-hf")
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
    convert_hf.convert(tmp_path / "ours", tmp_path / "back.bin", to_llama2c=True)
    written = torch.frombuffer(bytearray((tmp_path / "back.bin").read_bytes()), dtype=torch.int32)
    given = torch.frombuffer(bytearray((tmp_path / "m.bin").read_bytes()), dtype=torch.int32)
    tables = torch.zeros_like(given, dtype=torch.bool)  # ours are not zeros
    end = len(given) - (0 if tied else config.vocab_size * config.hidden_size)
    tables[end - 2 * config.max_position_embeddings * config.head_dim // 2 : end] = True
    assert torch.equal(written[~tables], given[~tables])
    convert_hf.convert(tmp_path / "ours", tmp_path / "hf", to_hf=True)
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["architectures"] == ["LlamaForCausalLM"] and values["model_type"] == "llama"
    assert Llama.from_pretrained(tmp_path / "hf").config == loaded.config


def test_stories260k_there_and_back_is_the_same_file(assets, tmp_path):
    source = assets / "stories260K" / "stories260K.bin"
    convert_hf.convert(source, tmp_path / "ours")
    convert_hf.convert(tmp_path / "ours", tmp_path / "back.bin", to_llama2c=True)
    assert (tmp_path / "back.bin").read_bytes() == source.read_bytes()
    manifest = json.loads((tmp_path / "back.bin.manifest.json").read_text())
    assert manifest["written"]["back.bin"].startswith("b0a507e7")
    with pytest.raises(InputError, match="back.bin: exists already"):
        convert_hf.convert(tmp_path / "ours", tmp_path / "back.bin", to_llama2c=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rms_norm_eps": 1e-6}, "cannot say rms_norm_eps = 1e-06: it has 1e-05"),
        ({"rope": RopeConfig(theta=5e5)}, "cannot say rope = {'rope_theta': 500000.0}"),
        ({"qkv_bias": True}, "cannot say qkv_bias = True"),
        ({"head_dim": 8}, "has heads of hidden_size / num_attention_heads"),
    ],
)
def test_what_a_llama2c_file_cannot_say(tmp_path, change, message):
    config = dataclasses.replace(TINY, **{"rms_norm_eps": 1e-5, **change})
    source = hf_folder(tmp_path / "hf", config)
    with pytest.raises(InputError, match=message):
        convert_hf.convert(source, tmp_path / "m.bin", to_llama2c=True)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_broken_llama2c_files_are_named(tmp_path):
    path = llama2c_file(tmp_path / "m.bin", Llama(TINY).init_random_(0))
    data = path.read_bytes()
    for broken, message in (
        (data[:20], "too short for a llama2.c header"),
        (data[:-4], "bytes, and its header makes"),
        (data + b"\0", "bytes, and its header makes"),
        (b"\xff" * 28 + data[28:], "its header makes no sense"),
        (
            struct.pack("<Ii", 0x616B3432, 1) + bytes(248),
            "of version 1, and only version 0 is read",
        ),
        (
            struct.pack("<Ii", 0x616B3432, 2) + bytes(248),
            "of version 2, and only version 0 is read",
        ),
        (struct.pack("<7i", 16, 24, 2, 4, 3, 40, 64) + data[28:], "must be a multiple"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            convert_hf.convert(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# --- Meta's folders ------------------------------------------------------------------------------

META = {
    "attn_norm": "attention_norm",
    "mlp_norm": "ffn_norm",
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def meta_folder(folder, model: Llama, ranks: int, llama3: bool) -> Path:
    """Meta's layout, divided among `ranks` as its code's parallel layers divide it."""
    folder.mkdir()
    c = model.config
    whole = {"tok_embeddings.weight": (model.embed_tokens.weight, 0 if llama3 else 1)}
    whole["norm.weight"] = (model.norm.weight, None)
    whole["output.weight"] = (model.lm_head.weight, 0)
    for i, block in enumerate(model.layers):
        for ours, theirs in META.items():
            weight = block.get_parameter(f"{ours}.weight")
            if theirs[-2:] in ("wq", "wk"):
                heads = c.num_attention_heads if theirs[-2:] == "wq" else c.num_key_value_heads
                weight = interleave(weight, heads)
            axis = None if "norm" in theirs else int(theirs[-2:] in ("wo", "w2"))
            whole[f"layers.{i}.{theirs}.weight"] = (weight, axis)
    for rank in range(ranks):
        part = {"rope.freqs": torch.ones(c.head_dim // 2)}
        for name, (weight, axis) in whole.items():
            piece = weight if axis is None else weight.chunk(ranks, axis)[rank]
            part[name] = piece.detach().clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "vocab_size": -1}
    params |= {"n_heads": c.num_attention_heads, "norm_eps": c.rms_norm_eps, "multiple_of": 8}
    if c.num_key_value_heads != c.num_attention_heads:
        params["n_kv_heads"] = c.num_key_value_heads
    if llama3:
        params |= {"rope_theta": c.rope.theta, "use_scaled_rope": True}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


LLAMA2 = dataclasses.replace(
    TINY, max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2
)
LLAMA32 = dataclasses.replace(
    LLAMA2,
    max_position_embeddings=131072,
    rope=RopeConfig("llama3", 5e5, 32.0),
    bos_token_id=128000,
    eos_token_id=128001,
)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family, config", [("llama-2", LLAMA2), ("llama-3.2", LLAMA32)])
def test_meta_folders_are_merged(tmp_path, ranks, family, config):
    model = Llama(config).init_random_(0, std=0.3)
    source = meta_folder(tmp_path / "meta", model, ranks, llama3=family != "llama-2")
    convert_hf.convert(source, tmp_path / "ours", family=family)
    loaded = Llama.from_pretrained(tmp_path / "ours")
    assert loaded.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert len(manifest["read"]) == ranks + 1


def test_broken_meta_folders_are_named(tmp_path):
    model = Llama(LLAMA2).init_random_(0)
    source = meta_folder(tmp_path / "meta", model, 2, llama3=False)
    second = source / "consolidated.01.pth"
    whole = torch.load(second, weights_only=True)

    def refused(message, family="llama-2"):
        with pytest.raises(InputError, match=message):
            convert_hf.convert(source, tmp_path / "out", family=family)
        assert not (tmp_path / "out").exists()

    refused("params.json: does not say how many positions.*--family", None)
    refused("params.json: use_scaled_rope is not as in the family", "llama-3.1")
    for change, message in (
        ({"norm.weight": whole["norm.weight"] + 1}, "norm.weight is not the same in all shards"),
        ({"extra.weight": torch.ones(1)}, "consolidated.01.pth: tensor extra.weight is in some"),
        ({"output.weight": torch.ones(3, 16)}, "output.weight is of another shape or dtype"),
    ):
        torch.save({**whole, **change}, second)
        refused(message)
    second.rename(source / "consolidated.02.pth")
    refused("consolidated.01.pth: shard is missing")
    (source / "consolidated.02.pth").unlink()
    refused("has shape")  # half a model


# --- Hugging Face's hub --------------------------------------------------------------------------


def test_a_name_on_the_hub_is_found_in_its_cache(tmp_path):
    """The real package, offline: a cache laid out by hand, in a process of its own."""
    pytest.importorskip("huggingface_hub", reason="needs the extra hf")
    repository, commit = tmp_path / "hub" / "models--some--model", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    source = hf_folder(repository / "snapshots" / commit, TINY)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}

    def run(name):
        command = [sys.executable, ROOT / "tools" / "convert_hf.py", name, "ours"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run("some/other")
    assert (
        done.returncode == 2
        and "some/other: no such folder, and the Hub download failed" in done.stderr
    )
    done = run("some/model")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ours/manifest.json").read_text())["source"].endswith(commit)
    before, after = Weights(source), Weights(tmp_path / "ours")
    assert all(torch.equal(before[ours_to_hf(name)], after[name]) for name in after)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as the real client needs, over one model's folder."""

    folder: Path
    asked: list[str]
    COMMIT = "fedcba9876" * 4

    def do_GET(self):
        path = unquote(self.path).split("?")[0]
        if path.startswith("/api/models/some/model/revision/main"):
            files = [{"rfilename": str(p.relative_to(self.folder))} for p in self.files()]
            body, name = json.dumps({"id": "some/model", "sha": self.COMMIT, "siblings": files}), ""
        elif path.startswith("/api/models/some/model/tree/"):
            found = [{"type": "file", "path": str(p.relative_to(self.folder)), "oid": "0" * 40,
                      "size": p.stat().st_size} for p in self.files()]  # fmt: skip
            body, name = json.dumps(found), ""
        elif path.startswith(f"/some/model/resolve/{self.COMMIT}/"):
            name = path.split("/", 5)[5]
            body = (self.folder / name).read_bytes()
            self.asked.append(name)
        else:
            return self.send_error(404)
        body = body.encode() if isinstance(body, str) else body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def files(self):
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
def test_a_name_on_the_hub_is_downloaded(tmp_path, old):
    """The real package and a server of ours; no more is asked for than the model needs."""
    pytest.importorskip("huggingface_hub", reason="needs the extra hf")
    source = hf_folder(tmp_path / "hf", TINY)
    tensors, _ = load_tensors(source / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin")
    if old:
        (source / "model.safetensors").unlink()
    (source / "original").mkdir()
    for name in ("original/params.json", "consolidated.safetensors", "picture.png"):
        (source / name).write_text("{}")

    handler = type("Handler", (Hub,), {"folder": source, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, ROOT / "tools" / "convert_hf.py", "some/model", "ours"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    weights = "pytorch_model.bin" if old else "model.safetensors"
    assert set(handler.asked) == {"config.json", "tokenizer.json", weights}
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert manifest["source"] == f"some/model@{Hub.COMMIT}"
    after = Weights(tmp_path / "ours")
    assert all(torch.equal(tensors[ours_to_hf(name)], after[name]) for name in after)


# --- what every conversion does ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_can_be_chosen(tmp_path, dtype):
    source = hf_folder(tmp_path / "hf", TINY)
    convert_hf.convert(source, tmp_path / "ours", dtype=dtype)
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    before, after = Weights(source), Weights(tmp_path / "back")
    assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)
    assert all(after[name].dtype == dtype for name in before)
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert values["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_dtype_that_is_too_small_is_refused(tmp_path):
    source = hf_folder(tmp_path / "hf", TINY)
    tensors, _ = load_tensors(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_tensors(source / "model.safetensors", tensors.items())
    with pytest.raises(InputError, match="norm.weight has NaN or infinite values as torch.float16"):
        convert_hf.convert(source, tmp_path / "ours", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_the_manifest_holds_what_was_read_and_written(tmp_path):
    source = hf_folder(tmp_path / "hf", TINY)
    convert_hf.convert(source, tmp_path / "ours")
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    for part, folder in (("read", source), ("written", tmp_path / "ours")):
        names = {file.name for file in folder.iterdir()} - {"manifest.json"}
        assert manifest[part] == {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names
        }
    (tmp_path / "ours" / "tokenizer.json").write_text("{ }")
    with pytest.raises(InputError, match=r"tokenizer\.json: is not the file of manifest\.json"):
        convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)


def test_generation_settings_travel_along(tmp_path):
    source = hf_folder(tmp_path / "hf", TINY)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    convert_hf.convert(source, tmp_path / "ours")
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    assert (tmp_path / "back/generation_config.json").read_text() == '{"temperature": 0.6}'


@pytest.mark.parametrize(
    "change, window",
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, 4096),  # transformers' default
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 63}, 63),
        ({"model_type": "mistral", "sliding_window": 64}, None),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen3", "use_sliding_window": False, "sliding_window": 16}, None),
        ({"sliding_window": 16}, None),  # a Llama has none
    ],
)
def test_a_sliding_window_that_matters_is_refused_or_kept_away(tmp_path, change, window):
    """TINY has 64 positions; a query sees `sliding_window` tokens, itself among them."""
    is_qwen3 = change.get("model_type") == "qwen3"
    source = hf_folder(tmp_path / "hf", dataclasses.replace(TINY, qk_norm=is_qwen3))
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, **change}))
    if window is None:
        convert_hf.convert(source, tmp_path / "ours")
        assert Llama.from_pretrained(tmp_path / "ours").config.max_position_embeddings == 64
        return
    with pytest.raises(InputError, match=rf"sliding-window attention \({window} tokens\)"):
        convert_hf.convert(source, tmp_path / "ours")
    with pytest.raises(InputError, match="sliding-window attention"):
        convert_hf.convert(source, tmp_path / "ours", positions=window + 1)
    convert_hf.convert(source, tmp_path / "ours", positions=window)
    assert Llama.from_pretrained(tmp_path / "ours").config.max_position_embeddings == window
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {**values, **change}


def test_more_positions_than_there_are_are_refused(tmp_path):
    source = hf_folder(tmp_path / "hf", TINY)
    with pytest.raises(InputError, match=r"--positions must be in \[1, 64\], and is 65"):
        convert_hf.convert(source, tmp_path / "ours", positions=65)


def test_without_transformers_verify_says_so_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="--verify needs the transformers package"):
        convert_hf.convert(tmp_path / "absent", tmp_path / "ours", verify=True)


SLOWED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # off in jobs that a shell put behind
sys.path.insert(0, "tools")
import convert_hf
from scalabl_ref.support import tensors
buffer, count = tensors.buffer, 0
def slow(tensor):
    global count
    count += 1
    if count == 5:
        print("now", flush=True)
        time.sleep(60)
    return buffer(tensor)
tensors.buffer = slow
convert_hf.run([*sys.argv[1:]])
"""


@pytest.mark.parametrize(
    "signum, options",
    [(signal.SIGINT, ["--quantize", "nf4"]), (signal.SIGTERM, []), (signal.SIGKILL, [])],
)
def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(tmp_path, signum, options):
    """A real process, stopped between two tensors. After SIGKILL a temporary folder may stay."""
    source = hf_folder(tmp_path / "hf", TINY)
    command = [sys.executable, "-c", SLOWED, str(source), str(tmp_path / "ours"), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    assert b"Traceback" not in err
    left = [path for path in tmp_path.iterdir() if path.name != "hf"]
    assert len(left) == (signum == signal.SIGKILL)
    for path in left:
        assert path.name.startswith(".ours.") and path.name.endswith(".tmp")
        with pytest.raises(InputError, match="config.json: no such file"):
            Llama.from_pretrained(path)
    convert_hf.convert(source, tmp_path / "ours")


# --- memory ------------------------------------------------------------------------------------

MEASURED = """
import re, sys
from pathlib import Path
sys.path.insert(0, "tools")
import convert_hf, torch
def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kib("VmRSS")
key, value = sys.argv[3].split("=")
kinds = {"None": None, "bfloat16": torch.bfloat16}
convert_hf.convert(sys.argv[1], Path(sys.argv[2]), **{key: kinds.get(value, value)})
print(before, kib("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_two_gigabytes_pass_through_little_memory(tmp_path):
    """Above what the program itself takes: at most the largest tensor and 200 MB.

    Seen: 271 MB, 278 to bfloat16 and 363 to int8. Three shards of float32, 2.1 GB; the largest
    tensor has 262 MB.
    """
    config = LlamaConfig(32000, 2048, 8192, 6, 16, 16, 128)
    state = Llama(config, device="meta").state_dict()
    generator = torch.Generator().manual_seed(0)

    def random(shape):
        return lambda: torch.empty(shape).uniform_(-0.1, 0.1, generator=generator)

    tensors = {ours_to_hf(n): Stored(t.dtype, t.shape, random(t.shape)) for n, t in state.items()}
    source = tmp_path / "hf"
    source.mkdir()
    where = {name: f"{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        write_tensors(source / shard, {n: t for n, t in tensors.items() if where[n] == shard})
    index = json.dumps({"weight_map": where})
    (source / "model.safetensors.index.json").write_text(index)
    (source / "config.json").write_text(json.dumps(config.to_hf()))
    assert sum(file.stat().st_size for file in source.glob("*.safetensors")) > 2e9

    largest = 4 * max(tensor.numel() for tensor in state.values())
    for option in ("dtype=None", "dtype=bfloat16", "quantize=int8"):
        command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "ours"), option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        before, peak = (1024 * int(number) for number in done.stdout.split()[-2:])
        assert peak - before <= largest + 200e6, (option, before, peak, largest)
        shutil.rmtree(tmp_path / "ours")
