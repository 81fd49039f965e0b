"""Adapters through PEFT, on tiny transformers models: the same logits.

`pytest -s` prints the largest differences.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_ref import Noise
from scalabl_ref.interop.exporting import export

from ..interop.samples import (
    KINDS,
    RANDOM,
    TARGETS,
    TOKENS,
    a_run,
    bound,
    bring,
    trained,
)
from ..models import tiny_folder
from ..tools.test_convert import convert_hf

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    """A model folder of ours, and beside it base-hf as tools/convert_hf.py --to-hf writes it."""
    folder = tiny_folder(tmp_path / "base", tie_word_embeddings=request.param)
    convert_hf.convert(folder, tmp_path / "base-hf", to_hf=True)
    return folder


def theirs(base):
    return transformers.AutoModelForCausalLM.from_pretrained(f"{base}-hf").eval()


@torch.no_grad()
def compare(name, model, ours, theirs):
    """Print and bound the difference of logits; ours, and maybe theirs, of the answers alone."""
    if ours.shape != theirs.shape:
        theirs = theirs[..., list(model.config.head_tokens)]
    difference = (ours - theirs).abs().max().item()
    print(f"{name}: differ by {difference:.3g} at most, logits up to {ours.abs().max():.3g}")
    assert difference <= bound(model, ours)


# --- out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trim", [True, False])
@torch.no_grad()
def test_peft_loads_the_mean(base, tmp_path, kind, trim):
    model = a_run(base, tmp_path / "run", trim, **KINDS[kind])
    export(trained(base, tmp_path / "run"), tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "out").eval()
    compare(f"mean of {kind}", model, model(TOKENS), wrapped(TOKENS).logits)
    plain = theirs(base)(TOKENS).logits
    assert (wrapped(TOKENS).logits - plain).abs().max() > 100 * bound(model, plain)


@pytest.mark.parametrize("kind", RANDOM)
@torch.no_grad()
def test_peft_switches_between_draws(base, tmp_path, kind):
    """As a multi-LoRA server does: one base, an adapter a draw."""
    model = a_run(base, tmp_path / "run", **KINDS[kind])
    names = export(trained(base, tmp_path / "run"), tmp_path / "out", samples=3, seed=21)
    wrapped = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "out" / names[0], names[0])
    for name in names[1:]:
        wrapped.load_adapter(tmp_path / "out" / name, name)
    for i, name in enumerate(names):
        wrapped.set_adapter(name)
        ours = model(TOKENS, noise=Noise(21, i))
        compare(f"draw {i} of {kind}", model, ours, wrapped.eval()(TOKENS).logits)


@pytest.mark.parametrize("trim", [True, False])
@torch.no_grad()
def test_transformers_loads_the_merged_model(base, tmp_path, trim):
    model = a_run(base, tmp_path / "run", trim)
    export(trained(base, tmp_path / "run"), tmp_path / "out", "hf")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    compare("merged", model, model(TOKENS), merged(TOKENS).logits)
    embedding = merged.get_input_embeddings().weight
    assert torch.equal(embedding, theirs(base).get_input_embeddings().weight)


@pytest.mark.parametrize("to", ["peft", "hf"])
def test_the_hub_reads_the_card(base, tmp_path, to):
    hub = pytest.importorskip("huggingface_hub")
    a_run(base, tmp_path / "run")
    export(trained(base, tmp_path / "run", name='own: "er"/model #1'), tmp_path / "out", to)
    data = hub.ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data["library_name"] == {"peft": "peft", "hf": "transformers"}[to]
    assert data["base_model"] == 'own: "er"/model #1' and "scalabl" in data["tags"]


# --- in ------------------------------------------------------------------------------------------


@st.composite
def lora_configs(draw):
    targets = draw(st.lists(st.sampled_from(TARGETS), min_size=1, unique=True))
    values = {"r": draw(st.integers(1, 5)), "lora_alpha": draw(st.integers(1, 20))}
    if draw(st.booleans()):
        values["alpha_pattern"] = {draw(st.sampled_from(targets)): draw(st.integers(1, 20)),
                                   r"layers\.0\.self_attn\.q_proj": 3}  # fmt: skip
    if draw(st.booleans()):
        values["rank_pattern"] = {draw(st.sampled_from(targets)): draw(st.integers(1, 5))}
    values["use_rslora"] = draw(st.booleans())
    if set(targets) != {"lm_head"} and draw(st.booleans()):
        values["layers_to_transform"] = draw(st.sampled_from([0, [1], [0, 1]]))
        values["layers_pattern"] = draw(st.sampled_from([None, "layers"]))
    return peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **values)


@given(lora_configs(), st.booleans(), st.sampled_from(["scalabl", "mle"]), st.booleans())
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_what_peft_saves_comes_in(tmp_path_factory, config, tied, method, safe):
    folder = tmp_path_factory.mktemp("in")
    base = tiny_folder(folder / "base", tie_word_embeddings=tied)
    convert_hf.convert(base, folder / "base-hf", to_hf=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of adapters on tied heads
        wrapped = peft.get_peft_model(theirs(base), config).eval()
        randomise(wrapped)
        wrapped.save_pretrained(folder / "peft", safe_serialization=safe)
        path = folder / "peft" / "adapter_config.json"  # what PEFT itself resets on nn.Linear
        path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": True}))
        # As it is on disk: PEFT sorts the patterns there, and the first that fits counts.
        wrapped = peft.PeftModel.from_pretrained(theirs(base), folder / "peft").eval()
    model = bring(base, folder / "peft", folder / "run", options={"method": method})
    compare(f"PEFT's, as {method}", model, model(TOKENS), wrapped(TOKENS).logits)


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
