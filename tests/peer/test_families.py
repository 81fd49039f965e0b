"""Every family from every form in which it is published: logits against transformers.

`pytest -s` prints the largest differences, for docs/interop.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from scalabl_ref import Llama
from scalabl_ref.model.config import RopeConfig

from ..tolerances import logits_bound
from .test_gguf import byte_level_vocabulary, sentencepiece_vocabulary

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import convert_gguf  # noqa: E402

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-5}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
FAMILIES = {
    "Llama-3": ("Llama", {"head_dim": 32, "rope_parameters": LLAMA3}, "llama"),
    "Mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}, "llama"),
    "Mistral, architecture mistral": ("Mistral", {"sliding_window": None}, "mistral"),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}, "qwen2"),
    "Qwen3": ("Qwen3", {"head_dim": 32}, "qwen3"),
}
FORMS = ("single", "sharded", "bin", "sharded bin", "gguf", "split gguf")


def a_model(family: str):
    kind, options, architecture = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():  # biases and norms of their own as well
        centre = 1.0 if "norm" in name else 0.0
        parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
    model.tie_weights()
    return model, architecture


def write_bin(model, folder: Path, shards: int) -> None:
    state, files = model.state_dict(), {}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    model.config.save_pretrained(folder)
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1}-of-{shards}.bin"
        part = {n: t.clone() for n, t in list(state.items())[i::shards]}
        torch.save(part, folder / name)
        files |= dict.fromkeys(part, name)
    if shards > 1:
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": files}))


def write_gguf(model, architecture: str, path: Path, split: int) -> None:
    """As llama.cpp's converter: names by the package's own map, q and k of llama interleaved."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kind = getattr(gguf.MODEL_ARCH, architecture.upper(), gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(kind, c.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=split)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    qwen = architecture.startswith("qwen")
    (byte_level_vocabulary("qwen2") if qwen else sentencepiece_vocabulary)(writer, c.vocab_size)
    if c.rope_parameters["rope_type"] == "llama3":
        plain = RopeConfig(theta=5e5).inverse_frequencies(head_dim)
        factors = plain / model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        count = None if qwen else heads.get(name.split(".")[-2])
        if count:
            halves = tensor.view(count, 2, len(tensor) // count // 2, -1)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, family, form):
    theirs, architecture = a_model(family)
    folder = tmp_path / "model"
    folder.mkdir()
    if "gguf" in form:
        write_gguf(theirs, architecture, tmp_path / "m.gguf", 8 if "split" in form else 0)
        parts = sorted(tmp_path.glob("m*.gguf"))
        assert (len(parts) > 1) == ("split" in form)
        folder = tmp_path / "ours"
        convert_gguf.convert(parts[-1], folder)
    elif "bin" in form:
        write_bin(theirs, folder, 3 if "sharded" in form else 1)
    else:
        theirs.save_pretrained(folder, max_shard_size="50KB" if form == "sharded" else "1GB")
        assert (folder / "model.safetensors.index.json").exists() == (form == "sharded")
    ours = Llama.from_pretrained(folder)
    tokens = torch.randint(0, 300, (2, 200), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    difference, size = (ours(tokens) - expected).abs().max().item(), expected.abs().max().item()
    print(f"\n{family}, {form}: differ by {difference:.2g} at most, logits up to {size:.3g}")
    assert difference <= logits_bound(ours.config, size)
