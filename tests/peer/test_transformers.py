"""Logits against transformers, on tiny random models of every kind that we read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalabl_ref import Llama, LlamaConfig
from scalabl_ref.support.folders import ours_to_hf
from scalabl_ref.support.tensors import save_tensors

from ..model.test_llama import HF, ROPES_IN_FILES
from ..tolerances import logits_bound, rounding

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")

ROPES = [
    {"rope_type": "default", "rope_theta": 1000.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    },
]


@st.composite
def models(draw):
    """A random tiny model of transformers, with weights large enough for the logits to differ."""
    kind = draw(st.sampled_from(["Llama", "Llama", "Mistral", "Qwen2", "Qwen3"]))
    kv_heads, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([2, 4, 8]))
    heads = kv_heads * repeats
    options = {
        "vocab_size": draw(st.integers(5, 60)),
        "hidden_size": heads * (head_dim if kind == "Qwen2" else draw(st.sampled_from([2, 4, 6]))),
        "intermediate_size": draw(st.sampled_from([7, 24])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "max_position_embeddings": 64,
        "rope_parameters": dict(draw(st.sampled_from(ROPES))),
    }
    if kind in ("Llama", "Qwen3"):
        options["attention_bias"] = draw(st.booleans())
    if kind == "Mistral":
        options["sliding_window"] = draw(st.sampled_from([None, 64, 4096]))  # of 64 positions
    if kind == "Llama":
        options["mlp_bias"] = draw(st.booleans())
    config = getattr(transformers, f"{kind}Config")(**options)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return theirs


def save(model, folder: Path, layout: str) -> None:
    size = "2KB" if layout == "sharded" else "1GB"
    model.save_pretrained(folder, max_shard_size=size)
    if layout == "bin":
        state = {k: v.clone() for k, v in model.state_dict().items()}
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


@given(models(), st.sampled_from(["single", "sharded", "bin"]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_logits_equal_transformers(theirs, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False  # left padding
    mask[2, 6:] = False  # right padding
    with tempfile.TemporaryDirectory() as name:
        save(theirs, Path(name), layout)
        ours = Llama.from_pretrained(name)
    expected = theirs(tokens).logits
    bound = logits_bound(ours.config, expected.abs().max().item())
    assert (ours(tokens) - expected).abs().max() <= bound
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    padded = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    difference = (ours(tokens, mask=mask) - padded)[mask].abs().max()
    assert difference <= bound


@given(models(), st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_greedy_text_equals_transformers(theirs, seed):
    from scalabl_ref.evaluation.generate import generate

    prompt = torch.randint(
        0, theirs.config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(seed)
    )
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(name)
        ours = Llama.from_pretrained(name)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    everything = torch.ones_like(prompt)  # or 0 in the prompt would be taken for padding
    options = {"attention_mask": everything, "max_new_tokens": 12, "do_sample": False}
    expected = theirs.generate(prompt, **options)[0, 5:].tolist()
    assert [token.id for token in generate(ours, prompt[0].tolist(), 12)] == expected


@given(
    st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=40, unique=True),
    st.floats(0.2, 3.0), st.floats(0.01, 1.0),
)  # fmt: skip
def test_temperature_and_top_p_equal_transformers(values, temperature, top_p):
    """Their warpers, in their order, on the same logits in float64; no two are equal.

    Where the mass of some first tokens is top_p to rounding, either number of tokens is right.
    """
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    from scalabl_ref.evaluation.generate import warped

    logits = torch.tensor(values, dtype=torch.float64)
    cooler = torch.softmax(logits / temperature, 0).sort(descending=True).values.cumsum(0)
    assume((cooler - top_p).abs().min() > rounding(torch.float64, 4 * len(values)))
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    expected = TopPLogitsWarper(top_p)(None, scores)[0].softmax(0)
    got = warped(logits.softmax(0), temperature, top_p)
    assert torch.equal(got > 0, expected > 0)
    # log p is off by the rounding of p, log p and z / T, each relative to numbers up to 100.
    assert (got - expected).abs().max() <= rounding(torch.float64, 100 * len(values))


@pytest.mark.parametrize("change", [change for change, _ in ROPES_IN_FILES])
@torch.no_grad()
def test_keys_of_rope_mean_what_they_mean_to_transformers(tmp_path, change):
    """On the files of tests/model/test_llama.py, which says what we make of them."""
    config = {**HF, "max_position_embeddings": 512}
    model = Llama(LlamaConfig.from_hf(config)).init_random_(0, std=0.3)
    state = {ours_to_hf(name): tensor for name, tensor in model.state_dict().items()}
    save_tensors(tmp_path / "model.safetensors", state.items())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    tokens = torch.randint(0, 40, (2, 300), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits
    ours = Llama.from_pretrained(tmp_path)
    bound = logits_bound(ours.config, theirs.abs().max().item())
    assert (ours(tokens) - theirs).abs().max() <= bound
    if ours.config.rope.kind != "default":
        assert (model(tokens) - theirs).abs().max() > 10 * bound


@given(models())
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_what_we_write_transformers_reads(theirs):
    """HF -> ours -> HF, loaded by transformers: the same logits to the bit."""
    from ..tools.test_convert import convert_hf

    tokens = torch.arange(5)[None] % theirs.config.vocab_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs.save_pretrained(folder / "hf")
        convert_hf.convert(folder / "hf", folder / "ours")
        convert_hf.convert(folder / "ours", folder / "back", to_hf=True)
        back = type(theirs).from_pretrained(folder / "back").eval()
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)


@given(models(), st.sampled_from([None, torch.bfloat16]))
@settings(max_examples=10, deadline=None)
def test_verify_agrees(theirs, dtype):
    """The converter's own comparison, with its own bound."""
    from ..tools.test_convert import convert_hf

    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(Path(name) / "hf")
        convert_hf.convert(Path(name) / "hf", Path(name) / "ours", dtype=dtype, verify=True)


def test_verify_notices_a_wrong_row(tmp_path, monkeypatch):
    """Two rows of one q_proj exchanged on the way: refused, and nothing is written."""
    from scalabl_ref import InputError

    from ..tools.test_convert import TINY, convert_hf, hf_folder

    source, load = hf_folder(tmp_path / "hf", TINY), Llama.from_pretrained

    def wrong(*args, **options):
        model = load(*args, **options)
        rows = model.layers[0].attn.q_proj.weight
        rows[[0, 1]] = rows[[1, 0]]
        return model

    monkeypatch.setattr(convert_hf.Llama, "from_pretrained", wrong)
    with pytest.raises(InputError, match="logits differ from transformers' by .* rounding allows"):
        convert_hf.convert(source, tmp_path / "ours", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["LLAMA2", "LLAMA32"])
@torch.no_grad()
def test_a_merged_meta_folder_is_read_by_transformers(tmp_path, ranks, name):
    from ..tools import test_convert

    config = getattr(test_convert, name)
    model = Llama(config).init_random_(0, std=0.3)
    source = test_convert.meta_folder(tmp_path / "meta", model, ranks, name == "LLAMA32")
    family = {"LLAMA2": "llama-2", "LLAMA32": "llama-3.2"}[name]
    test_convert.convert_hf.convert(source, tmp_path / "hf", to_hf=True, family=family, verify=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(1, 9)[None]
    difference = (theirs(tokens).logits - model(tokens)).abs().max()
    assert difference <= logits_bound(config, model(tokens).abs().max().item())


@torch.no_grad()
def test_a_converted_llama2c_file_is_read_by_transformers(tmp_path):
    from ..models import TINY
    from ..tools.test_convert import convert_hf, llama2c_file

    ours = Llama(TINY).init_random_(0, std=0.3)
    convert_hf.convert(llama2c_file(tmp_path / "m.bin", ours), tmp_path / "ours")
    convert_hf.convert(tmp_path / "ours", tmp_path / "hf", to_hf=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(1, 9)[None]
    ours = Llama.from_pretrained(tmp_path / "ours")
    difference = (theirs(tokens).logits - ours(tokens)).abs().max()
    assert difference <= logits_bound(TINY, ours(tokens).abs().max().item())
