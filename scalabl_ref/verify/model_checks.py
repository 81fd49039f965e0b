"""Checks of a model's parts: padding with a cache, configurations, weights of every layout."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import fast
from ..core.adapter import adapters
from ..core.config import AdapterConfig
from ..core.layer import SAMPLING
from ..core.noise import Noise
from ..fast.quantize import QuantizedLinear, quantize
from ..model.attach import add_adapters, layer_id
from ..model.config import LlamaConfig, RopeConfig
from ..model.inputs import Inputs, KVCache
from ..model.llama import Llama
from ..model.weights import check_model
from ..support.folders import hf_to_ours, ours_to_hf, stored_weights, with_dtype, write_model
from ..support.tensors import Stored, check_tensor, load_tensors, save_tensors, write_tensors
from .check import Check, Errors, Op, exact, ratio, refused
from .file_checks import QWEN, in_hugging_face
from .method_checks import EPS, NETWORK, draws, fill
from .use_checks import SHAPE

# --- Inputs ---------------------------------------------------------------------------------------

PLACES = ((2, 3, 5, 6), (0, 1, 2, 3), (1, 3, 4, 6))  # of four tokens in rows of seven


def sampling_model(device: torch.device, sampling: Any) -> Llama:
    model = Llama(SHAPE).init_random_(std=0.4)
    config = AdapterConfig(rank=2, targets=("q_proj", "v_proj", "lm_head"), sampling=sampling)
    add_adapters(model, config).double()
    fill(adapters(model).values(), 2)
    return model.to(device)


def padded_caches(_: Op, device: torch.device) -> Errors:
    """Padded rows in pieces through a cache, two draws at once: each row alone, draw by draw.

    By the bodies that run, and by the plain ones.
    """
    yield from rows_in_pieces(device, SAMPLING)
    with fast.plain():
        yield from rows_in_pieces(device, ("token", "example"))


@torch.no_grad()
def rows_in_pieces(device: torch.device, samplings: tuple[str, ...]) -> Errors:
    text = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [7, 7, 8, 10]], device=device)
    row, mask = torch.zeros(2, 3, 7, dtype=torch.int64, device=device)
    for i, places in enumerate(PLACES):
        row[i, places], mask[i, places] = text[i], 1
    seen, groups = mask.bool(), torch.tensor([4, 0, 9], device=device)
    for sampling in samplings:
        model = sampling_model(device, sampling)
        right = torch.cat([
            model(text[i : i + 1], noise=Noise(3, draw), groups=groups[i : i + 1])
            for draw in (5, 6) for i in range(3)
        ])  # fmt: skip
        for cuts in ((), (1, 4)):
            cache, got = KVCache(2), []
            for part in row.tensor_split(cuts, 1):
                past = len(cache)
                got.append(model(part, noise=Noise(3, 5), groups=groups, draws=2, cache=cache,
                                 mask=seen[:, : past + part.shape[1]]))  # fmt: skip
            found = torch.cat(got, 1)[seen.repeat(2, 1)].view_as(right)
            size = right.abs().max().expand_as(right)
            yield ratio(found, right, size, 4 * NETWORK * EPS, f"{sampling}, cut at {cuts}")
        last = model(row, noise=Noise(3, 5), groups=groups, draws=2, mask=seen, last_only=True)
        yield ratio(last, right[:, -1], size[:, -1], 4 * NETWORK * EPS, f"{sampling}, last tokens")
        lengths = torch.tensor([2, 4, 1], device=device)
        ends = model(text, noise=Noise(3, 5), groups=groups, lengths=lengths, last_only=True)
        expected = right[torch.arange(3, device=device), lengths - 1]
        yield ratio(ends, expected, size[:3, 0], 4 * NETWORK * EPS, f"{sampling}, ends")
        free = model(text, noise=Noise(3, 5))
        same = model(text, noise=Noise(3, 5), groups=torch.arange(3, device=device))
        yield exact(torch.equal(free, same), f"{sampling}: ids by row")
    yield from inputs_refused(model, row, seen)


def inputs_refused(model: Llama, row: Tensor, seen: Tensor) -> Errors:
    cache = KVCache(2)
    model(row[:, :5], mask=seen[:, :5], cache=cache)
    yield refused(lambda: model(row[:, 5:], cache=cache), "holds padding")
    yield refused(lambda: model(row[:, :4], mask=seen, cache=cache), "9 tokens, but")
    cache = KVCache(2)
    model(row[:, :5], lengths=torch.tensor([5, 4, 5], device=row.device), cache=cache)
    yield exact(cache.padded, "padding by lengths is not noted")
    cache = KVCache(2)
    model(row[:, :5], lengths=torch.tensor([5, 5, 5], device=row.device), cache=cache)
    yield exact(not cache.padded and len(cache) == 5, "no padding, but noted")
    tokens = torch.zeros(1, 9, dtype=torch.int64, device=row.device)
    yield refused(lambda: model(tokens), "9 tokens, but")
    yield exact(model(tokens[:, 1:]).shape == (1, 8, 11), "as many tokens as positions")
    try:
        Inputs(row, lengths=torch.ones(3, device=row.device), mask=seen).check(8)
        yield exact(False, "lengths and mask together")
    except ValueError:
        yield exact(True)


# --- Configurations -------------------------------------------------------------------------------

BASE = {k: v for k, v in QWEN.items() if k != "use_sliding_window"}
OURS = LlamaConfig(11, 8, 12, 1, 2, 2, 4, 32, rope=RopeConfig("default", 1e6), eos_token_id=4)
YARN = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")  # fmt: skip
# Changes of config.json, and what they change of the configuration.
CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"model_type": "mistral", "sliding_window": None}, {}),
    ({"model_type": "mistral", "sliding_window": 32}, {}),
    ({"model_type": "mistral"}, {}),  # the default window, 4096
    ({"sliding_window": 4}, {}),
    ({"model_type": "qwen2", "sliding_window": 4}, {"qkv_bias": True}),
    ({"model_type": "qwen3", "head_dim": 10}, {"qk_norm": True, "head_dim": 10}),
    ({"model_type": "qwen3", "attention_bias": True},
     {"qk_norm": True, "qkv_bias": True, "output_bias": True}),
    ({"model_type": "qwen2", "attention_bias": True}, {"qkv_bias": True}),
    ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    ({"mlp_bias": True, "num_key_value_heads": 1}, {"mlp_bias": True, "num_key_value_heads": 1}),
    ({"num_key_value_heads": None, "head_dim": None}, {}),
    ({"eos_token_id": [7, 8], "bos_token_id": 0}, {"eos_token_id": 7, "bos_token_id": 0}),
    ({"eos_token_id": []}, {"eos_token_id": None}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
     {"rope": RopeConfig("default", 300.0)}),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope": RopeConfig("linear", 1e6, 4.0)}),
    ({"rope_scaling": YARN}, {"rope": RopeConfig("llama3", 1e6, 2.0, 1.0, 4.0, 32)}),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 9}},
     {"rope": RopeConfig("llama3", 1e6, 2.0, 1.0, 4.0, 9)}),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 9},
      "original_max_position_embeddings": 10},
     {"rope": RopeConfig("llama3", 1e6, 2.0, 1.0, 4.0, 10)}),
    ({"rope_scaling": {**YARN, "rope_theta": 5.0}, "rope_parameters": {"rope_theta": 5.0}},
     {"rope": RopeConfig("llama3", 5.0, 2.0, 1.0, 4.0, 32)}),
]  # fmt: skip
UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mistral", "sliding_window": 31}, "sliding-window attention (31"),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8}, "sliding-window"),
    ({"model_type": "gpt2"}, "is not known"),
    ({"hidden_act": "gelu"}, "is not known"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "is not known"),
    ({"rope_scaling": 3}, "must be an object"),
    ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "a number above 0"),
    ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, "layer to layer"),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 3.0}}, "only rope_scaling counts"),
    ({"partial_rotary_factor": 0.5}, "part of each head"),
    ({"num_key_value_heads": 3}, "a multiple"),
    ({"head_dim": 3}, "must be even"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"vocab_size": True}, "positive whole number"),
    ({"rms_norm_eps": -1.0}, "at least 0"),
]


def configurations(_: Op, device: torch.device) -> Errors:
    """config.json of Llama, Mistral and Qwen, older keys and newer; our own; what is refused."""
    for changes, right in CONFIGS:
        got, expected = LlamaConfig.from_hf({**BASE, **changes}), replace(OURS, **right)
        yield exact(got == expected, f"{changes}: {got}")
        yield exact(LlamaConfig.from_hf(got.to_hf()) == got, f"{changes}: written and read")
        cut = replace(got, head_tokens=(5, 3))
        written = json.loads(json.dumps(cut.to_dict()))
        yield exact(LlamaConfig.from_dict(written) == cut, f"{changes}: our own layout")
    for changes, words in UNKNOWN:
        yield refused(partial(LlamaConfig.from_hf, {**BASE, **changes}), words)
    yield refused(lambda: replace(OURS, head_tokens=(1, 2)).to_hf(), "full head is needed")
    yield refused(replace(OURS, qk_norm=True, mlp_bias=True).to_hf, "no Hugging Face architecture")
    least = LlamaConfig.from_hf({key: BASE[key] for key in SIZES})
    plain = LlamaConfig(11, 8, 12, 1, 2, 2, 4, 2048, 1e-6, RopeConfig("default", 1e4))
    yield exact(least == plain, f"defaults: {least}")
    for name, target, id in (("layers.3.attn.v_proj", "v_proj", 26), ("lm_head", "lm_head", 7),
                             ("layers.0.mlp.down_proj", "down_proj", 6)):  # fmt: skip
        yield exact(layer_id(name, target) == id, f"noise id of {name}")
    model = Llama(SHAPE).init_random_(5, 0.5)
    first = torch.randn(11, 8, generator=torch.Generator().manual_seed(5))
    norm = model.get_parameter("layers.1.attn_norm.weight")
    random = torch.equal(model.embed_tokens.weight, first / 2) and bool((norm == 1).all())
    yield exact(random, "random weights")
    config = partial(AdapterConfig, targets=("k_proj", "lm_head"))
    yield refused(lambda: add_adapters(model, config(rank=5)), "rank 5 is larger")
    head = AdapterConfig(rank=9, targets=("lm_head",))
    yield refused(lambda: add_adapters(Llama(SHAPE), head), "rank 9 is larger")
    yield refused(lambda: Llama(SHAPE).trim_head([3, 11]), "token id 11 is outside")
    yield refused(lambda: Llama(SHAPE).trim_head([3]).trim_head([0]), "already cut down")
    found = adapters(add_adapters(Llama(SHAPE), config(rank=4)))
    names = [f"layers.{i}.attn.k_proj" for i in range(2)]
    yield exact([*found] == [*names, "lm_head"], f"adapted layers: {[*found]}")
    yield exact([a.layer for a in found.values()] == [1, 9, 7], "their noise ids")
    frozen = [n for n, p in model.named_parameters() if p.requires_grad and "adapter" not in n]
    yield exact(not frozen, f"trained base: {frozen}")


# --- Weights --------------------------------------------------------------------------------------


def weights_of_hf(device: torch.device, **changes: Any) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """A configuration and its weights by Hugging Face's names, bfloat16 numbers in float32."""
    config = LlamaConfig.from_hf({**BASE, **changes})
    model = Llama(config, torch.bfloat16)
    fill([model], 5)
    names = dict(model.named_parameters(remove_duplicate=False))
    return config, {in_hugging_face(n): p.detach().float() for n, p in names.items()}


def loaded(values: dict[str, Any], tensors: dict[str, Tensor], **options: Any) -> Llama:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**BASE, **values}))
        save_tensors(Path(folder) / "model.safetensors", tensors.items())
        check_model(folder)
        return Llama.from_pretrained(folder, **options)


def has(model: Llama, tensors: dict[str, Tensor], dtype: torch.dtype, case: str) -> float:
    """Whether the model's weights are these, of this dtype, frozen."""
    own = dict(model.named_parameters(remove_duplicate=False))
    right = {hf_to_ours(name): tensor for name, tensor in tensors.items()}
    same = own.keys() == right.keys() and all(
        p.dtype == dtype and not p.requires_grad and torch.equal(p.cpu(), right[n].to(dtype))
        for n, p in own.items()
    )
    return exact(same and not model.training, case)


def folders_of_weights(_: Op, device: torch.device) -> Errors:
    """Dtypes that are mixed or asked for; heads that are tied, or not; pickles; our own layout."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    _config, own = weights_of_hf(device)
    half = {n: t.to(torch.bfloat16) if "mlp" in n else t for n, t in own.items()}
    for stated, dtype in (({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16),
                          ({"torch_dtype": "float16"}, torch.float16)):  # fmt: skip
        got = loaded(stated, half, device=device)
        yield has(got, own, dtype, f"mixed dtypes, {stated}")
        yield has(loaded(stated, own, device=device), own, torch.float32, f"one dtype, {stated}")
        asked = loaded(stated, half, dtype=torch.float64, device=device)
        yield has(asked, own, torch.float64, f"float64, {stated}")
    tied = {"tie_word_embeddings": True}
    got = loaded(tied, own, device=device)
    yield exact(not got.tied and torch.equal(got.lm_head.weight.cpu(), own[head]), "its own head")
    same = {**own, head: own[embedding]}
    for left_out in (head, embedding, ""):
        part = {n: t for n, t in same.items() if n != left_out}
        got = loaded(tied, part, device=device)
        yield has(got, same, torch.float32, f"tied, without {left_out}")
        yield exact(got.tied and got.lm_head.weight is got.embed_tokens.weight, "tied")
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    yield has(loaded({}, own | inverse, device=device), own, torch.float32, "old frequencies")
    name = "model.layers.0.mlp.up_proj.weight"
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({n: t for n, t in own.items() if n != name}, "up_proj.weight is missing"),
        ({**own, "model.layers.0.mlp.up_proj.bias": torch.ones(12)}, "not part of this model"),
        ({**own, name: own[name][:, :7]}, "shape (12, 7), expected (12, 8)"),
        ({**own, name: own[name] / 0}, "NaN or infinite"),
        ({**own, name: own[name].to(torch.int8)}, "floats of 16 bits"),
        ({**own, name.replace(".weight", ".qweight"): own[name]}, "GPTQ or AWQ"),
        ({**own, "x": torch.ones(1)}, "begins with model."),
    ]
    for tensors, words in wrong:
        yield refused(partial(loaded, {}, tensors), words)
    large = {**half, name: own[name] + 1e6}
    yield refused(partial(loaded, {"dtype": "float16"}, large), "too large for")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(BASE))
        torch.save(own, Path(folder) / "pytorch_model.bin")
        got = Llama.from_pretrained(folder, device=device)
        yield has(got, own, torch.float32, "pytorch_model.bin")
        yield from own_layout(Path(folder), own, device)


def own_layout(theirs: Path, tensors: dict[str, Tensor], device: torch.device) -> Errors:
    """A converted folder: the same weights, in a dtype; codes when they are asked for."""
    ours, config = theirs / "ours", LlamaConfig.from_hf(BASE)
    ours.mkdir()
    _weights, stored = stored_weights(theirs)
    found = {name: (t.shape, t.dtype) for name, t in stored.items()}
    right = {hf_to_ours(n): (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    yield exact(found == right, "names and shapes that are stored")
    write_model(ours, config.to_dict(), stored, {}, torch.bfloat16)
    yield has(Llama.from_pretrained(ours, device=device), tensors, torch.bfloat16, "our layout")
    for kind in ("int8", "nf4"):
        got = Llama.from_pretrained(ours, torch.float32, device, kind)
        layers = {n: m for n, m in got.named_modules() if isinstance(m, QuantizedLinear)}
        yield exact(len(layers) == 7 and got.quantized == kind, f"{len(layers)} layers in {kind}")
        for name, layer in layers.items():
            codes, scale = quantize(tensors[ours_to_hf(f"{name}.weight")].to(device), kind)
            same = torch.equal(layer.weight, codes) and torch.equal(layer.scale, scale)
            yield exact(same, f"{kind}: {name}")
        codes_folder = theirs / kind
        codes_folder.mkdir()
        values = {**config.to_dict(), "quantize": kind}
        (codes_folder / "config.json").write_text(json.dumps(values))
        save_tensors(codes_folder / "model.safetensors", got.state_dict().items())
        wide = Llama.from_pretrained(codes_folder, torch.float64, device).state_dict()
        for name, value in got.state_dict().items():
            kept = value.dtype in (torch.int8, torch.uint8) or name.endswith(".scale")
            right = value if kept else value.double()
            same = torch.equal(wide[name], right) and wide[name].dtype == right.dtype
            yield exact(same, f"{kind} from a folder of codes: {name}")
        other = "nf4" if kind == "int8" else "int8"
        again = partial(Llama.from_pretrained, codes_folder, quantize=other)
        yield refused(again, "quantised already")
    stated = {"dtype": "float32", "torch_dtype": "float32", "vocab_size": 3}
    values = with_dtype(stated, torch.float16)
    halves = {"dtype": "float16", "torch_dtype": "float16", "vocab_size": 3}
    yield exact(values == halves and with_dtype(stated, None) == stated, f"dtype: {values}")


def two_writers(_: Op, device: torch.device) -> Errors:
    """A file written tensor by tensor has the bytes of one written at once, in every dtype."""
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    own = {f"{'bdac'[i]}.{n}": draws(i, n, 3).to(kind)
           for i, kind in enumerate(kinds) for n in (4, 0, 1)}  # fmt: skip
    own |= {"scalar": torch.tensor(2.5), "view": draws(9, 4, 5).T[1:]}
    codes = {"code": torch.arange(6, dtype=torch.uint8).view(2, 3), "scale": torch.ones(2).half()}
    for dtype in (None, *kinds):
        stored = {name: Stored.held(tensor) for name, tensor in own.items()}
        stored |= {n: replace(Stored.held(t), packed=True) for n, t in codes.items()}
        whole = {n: t if dtype is None else t.to(dtype) for n, t in own.items()} | codes
        with tempfile.TemporaryDirectory() as folder:
            one, other = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
            told: list[int] = []
            write_tensors(one, stored, dtype, told.append)
            save_tensors(other, whole.items(), {"format": "pt"})
            yield exact(one.read_bytes() == other.read_bytes(), f"bytes in {dtype}")
            yield exact(sum(told) == sum(t.nbytes for t in whole.values()), "bytes told")
            read = load_tensors(one)[0]
        same = all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in whole.items())
        yield exact(same and read.keys() == whole.keys(), f"read back in {dtype}")
    like, number = torch.empty(2, 3, device="meta"), torch.ones(2, 3)
    check: Callable[..., None] = partial(check_tensor, "file", "t")
    for tensor, words in ((number[:1], "shape (1, 3), expected (2, 3)"),
                          (number.int(), "floats of 16 bits"), (number * torch.nan, "NaN"),
                          (number - torch.tensor([0, 0, torch.inf]), "NaN or infinite"),
                          (number.double() * 1e300, "NaN or infinite")):  # fmt: skip
        yield refused(partial(check, tensor, like, torch.float32), words)
    check(number.double() * 1e300, like)  # finite in its own dtype
    with tempfile.TemporaryDirectory() as folder:
        wide = {"t": Stored.held(number.double() * 1e39)}
        yield refused(lambda: write_tensors(Path(folder) / "a.safetensors", wide, torch.float32),
                      "NaN or infinite")  # fmt: skip
        yield exact(not any(Path(folder).iterdir()), "a file is left")


MODEL_CHECKS = [
    Check("padded caches", "pieces, padding and draws at once: rows alone", padded_caches),
    Check("configurations", "config.json: Llama, Mistral, Qwen; refusals", configurations),
    Check("weights", "dtypes, tied heads, pickles, our own layout", folders_of_weights),
    Check("two writers", "safetensors: tensor by tensor, and at once", two_writers),
]
