"""Adapters through PEFT and the official code, on tiny transformers models: the same logits.

The official code, SRI-CSL/BayesAdapt, cannot be installed by name: SCALABL_BAYESADAPT names a
checkout of it. `pytest -s` prints the largest differences.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_ref import Noise, adapters
from scalabl_ref.interop.exporting import export

from ..interop.samples import (
    KINDS,
    LETTERS,
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


# --- the official code ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    """Its modules of wrappers, loaded from their files: the package's __init__ needs much more."""
    folder = os.environ.get("SCALABL_BAYESADAPT")
    if not folder:
        pytest.skip("SCALABL_BAYESADAPT names no checkout of SRI-CSL/BayesAdapt")
    place = Path(folder) / "bayesadapt" / "lorawrappers"
    package = ModuleType("official_lorawrappers")
    package.__path__ = [str(place)]
    sys.modules[package.__name__] = package
    out = SimpleNamespace()
    for name in ("lorawrapper", "viwrapper", "scalabl", "blob"):
        full = f"{package.__name__}.{name}"
        spec = importlib.util.spec_from_file_location(full, place / f"{name}.py")
        try:
            module = importlib.util.module_from_spec(spec)
            sys.modules[full] = module
            spec.loader.exec_module(module)
        except (ImportError, OSError) as error:
            pytest.skip(f"BayesAdapt at {folder} cannot be imported: {error}")
        setattr(out, name, module)
    return out


def official_model(base, official, method, classes):
    """As their Trainer makes it: head untied and cut to the classes, LoRA, then the wrapper."""
    model = theirs(base)
    head = model.lm_head.weight.detach().clone()
    if classes is not None:
        head = head[classes]
    model.lm_head = torch.nn.Linear(head.shape[1], head.shape[0], bias=False)
    model.lm_head.weight.data = head
    model.config.tie_word_embeddings = False
    targets = ["lm_head", "q_proj", "v_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=targets)
    wrapped = peft.get_peft_model(model, config)
    wrapper = {
        "scalabl": official.scalabl.ScalablLoraWrapper,
        "blob": official.blob.BlobLoraWrapper,
        "mle": official.lorawrapper.LoraWrapper,
    }[method]
    for parent in list(wrapped.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, peft.tuners.lora.LoraLayer):
                parent._modules[name] = wrapper(child)
    return wrapped.eval()


def test_the_prior_of_the_official_scalabl_is_another(official):
    """Why it is not taken: it is made of the memory into which the starting widths are drawn."""
    linear = official.scalabl.ScalaBLLinear(16, 4, s_sigma_init_eps=0.05)
    width = linear.log_s_sigma.detach().exp()
    for name, value in (("log_p_mu", width), ("log_p_sigma", 1 + width)):
        error = (getattr(linear, name).exp() / value - 1).abs().max()
        assert error <= 1e-8 / 0.035 + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", ["scalabl", "blob", "mle"])
@pytest.mark.parametrize("classes", [LETTERS, None], ids=["classes", "vocabulary"])
@torch.no_grad()
def test_an_official_state_comes_in(base, tmp_path, official, method, classes):
    """The mean's logits: their wrapper with blobsample off."""
    wrapped = official_model(base, official, method, classes)
    randomise(wrapped)
    state = {k: v for k, v in wrapped.state_dict().items() if "lora_" in k}
    torch.save(state, tmp_path / "state_dict.pt")
    layers = [m for m in wrapped.modules() if isinstance(m, official.viwrapper.VILoraWrapper)]
    for layer in layers:
        layer.sample(False)
    model = bring(base, tmp_path, tmp_path / "run", "bayesadapt", {"sampling": "batch"})
    assert model.config.head_tokens == (None if classes is None else tuple(classes))
    name = f"official {method}"
    compare(name, model, model(TOKENS), wrapped(TOKENS).logits)


@torch.no_grad()
def test_a_draw_of_the_official_scalabl(base, tmp_path, official, monkeypatch):
    """The widths come in too: the same noise in both, the same logits."""
    wrapped = official_model(base, official, "scalabl", LETTERS)
    randomise(wrapped)
    state = {k: v for k, v in wrapped.state_dict().items() if "lora_" in k}
    torch.save(state, tmp_path / "state_dict.pt")
    model = bring(base, tmp_path, tmp_path / "run", "bayesadapt", {"sampling": "batch"})
    noise, order = Noise(5, 2), []
    for name, adapter in adapters(model).items():
        hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
        layer = wrapped.get_submodule(f"base_model.model.{hf}")
        layer.register_forward_pre_hook(lambda *_, a=adapter: order.append(a))

    def draw(like):
        return noise.normal(order[-1].layer, 1, len(like))[0]

    monkeypatch.setattr(torch, "randn_like", draw)
    logits = wrapped(TOKENS).logits
    monkeypatch.undo()
    assert len(order) == len(adapters(model)) == 5
    compare("draw of official scalabl", model, model(TOKENS, noise=noise), logits)
    assert (logits - model(TOKENS)).abs().max() > 100 * bound(model, logits)
