"""BLoB and TFB against their authors' code, on a tiny Llama, with the same noise fed in.

That code, Wang-ML-Lab/bayesian-peft, cannot be installed by name: SCALABL_BAYESIAN_PEFT names a
checkout of its commit bc6a4a7. It needs peft, bitsandbytes, torchmetrics, accelerate and ipdb.
`pytest -s` prints the largest differences.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from scalabl_ref import AdapterConfig, Llama, Noise, adapters, add_adapters
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.objective import complexity
from scalabl_ref.methods.tfb import _rotate

from ..tolerances import logits_bound, rounding

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")
TARGETS = ("q_proj", "v_proj", "lm_head")
RANK = 3


@pytest.fixture(scope="module")
def official():
    """Their modules `blob` and `tfblora`."""
    folder = os.environ.get("SCALABL_BAYESIAN_PEFT")
    if not folder:
        pytest.skip("SCALABL_BAYESIAN_PEFT names no checkout of Wang-ML-Lab/bayesian-peft")
    sys.path.insert(0, folder)
    try:
        modules = [importlib.import_module(f"modelwrappers.{name}") for name in ("blob", "tfblora")]
    except ImportError as error:
        pytest.skip(f"bayesian-peft at {folder} cannot be imported: {error}")
    finally:
        sys.path.remove(folder)
    return SimpleNamespace(blob=modules[0], tfb=modules[1])


def pair(official, folder, dtype=torch.float64, method="blob"):
    """(their tiny Llama with LoRA, its adapted layers by our names, ours with the same weights)."""
    import peft

    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)

    def fill(parameters):
        with torch.no_grad():
            for p in parameters:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))

    fill(theirs.parameters())
    theirs.save_pretrained(folder)
    ours = Llama.from_pretrained(folder)
    settings = AdapterConfig(method, RANK, targets=TARGETS, sampling="token")
    ours = add_adapters(ours, settings).to(dtype)
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
    ).to(dtype)
    layers = {}
    for name, module in wrapped.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            ours_name = name.removeprefix("base_model.model.").removeprefix("model.")
            layers[ours_name.replace("self_attn", "attn")] = module
    assert layers.keys() == adapters(ours).keys()
    for name, adapter in adapters(ours).items():
        A, B = layers[name].lora_A["default"].weight, layers[name].lora_B["default"].weight
        fill((A, B))
        adapter.A.data, adapter.B.data = A.detach().clone(), B.detach().clone()
    if method == "blob":
        wrapper = official.blob.BLoB.__new__(official.blob.BLoB)
        torch.nn.Module.__init__(wrapper)
        wrapper.blobconfig = official.blob.BLoBConfig(bayes_eps=0.05, bayes_beta=0.2)
        wrapper._modify_lora_layers(wrapped)
        for name, adapter in adapters(ours).items():
            fill([adapter.G])
            layers[name].lora_A_rho["default"].data = adapter.G.detach().clone()
    return wrapped, layers, ours


def feed(monkeypatch, layers, ours, noise, groups):
    """Make their layers draw what ours do: signs by two calls of uniform_, E by randn_like."""
    waiting = []

    def enter(adapter):
        def hook(module, inputs):
            (x,), (rank, d_in) = inputs, adapter.A.shape
            E = noise.normal(adapter.layer, 1, rank * d_in).view(rank, d_in)
            signs = adapter.signs(x.shape[:-1], Keys(noise, groups)).split([d_in, rank], dim=-1)
            waiting.extend(value.to(x.dtype) for value in (*signs, E))

        return hook

    def take(like, *arguments):
        value = waiting.pop(0)
        assert value.shape == like.shape
        return value

    for name, layer in layers.items():
        layer.register_forward_pre_hook(enter(adapters(ours)[name]))
    monkeypatch.setattr(torch.Tensor, "uniform_", take)
    monkeypatch.setattr(torch, "randn_like", take)
    return waiting


def differences(name, pairs):
    """(largest difference, largest value) of pairs of tensors; prints them."""
    found = max((a - b).abs().max().item() for a, b in pairs)
    size = max(b.abs().max().item() for _, b in pairs)
    print(f"{name}: differ by {found:.3g} at most, values up to {size:.3g}")
    return found, size


def compare_gradients(layers, ours, bound):
    """Of A, G and B: largest differences at most bound(largest value)."""
    for name, of in (
        ("A", lambda layer: layer.lora_A["default"].weight),
        ("G", lambda layer: layer.lora_A_rho["default"]),
        ("B", lambda layer: layer.lora_B["default"].weight),
    ):
        own = adapters(ours)
        grads = [(getattr(own[n], name).grad, of(layer).grad) for n, layer in layers.items()]
        found, size = differences(f"gradient of {name}", grads)
        assert found <= bound(size)


def test_blob_model(official, tmp_path, monkeypatch):
    """Logits and gradients of the whole model, in float32."""
    theirs, layers, ours = pair(official, tmp_path, torch.float32)
    noise, tokens = Noise(3, 4), torch.arange(1, 21).view(2, 10)
    groups = ours.config.max_position_embeddings * torch.arange(2)[:, None] + torch.arange(10)
    waiting = feed(monkeypatch, layers, ours, noise, groups)
    logits = [ours(tokens, noise=noise), theirs(tokens).logits]
    assert not waiting
    found, size = differences("logits", [logits])
    assert found <= logits_bound(ours.config, size)
    assert (logits[0] - ours(tokens)).abs().max() > 0.01 * size  # the noise matters
    for values in logits:
        F.cross_entropy(values.flatten(0, 1), tokens.flatten() + 5).backward()
    compare_gradients(layers, ours, lambda size: logits_bound(ours.config, size))


def test_blob_layers(official, tmp_path, monkeypatch):
    """Each layer by itself in float64, which transformers does not keep through a whole model."""
    _, layers, ours = pair(official, tmp_path)
    noise, generator = Noise(5, 6), torch.Generator().manual_seed(1)
    feed(monkeypatch, layers, ours, noise, None)
    for name, layer in layers.items():
        x = torch.randn(2, 7, layer.in_features, generator=generator, dtype=torch.float64)
        y = ours.get_submodule(name)(x, Keys(noise)), layer(x)
        found, size = differences(name, [y])
        assert found <= rounding(torch.float64, layer.in_features + RANK) * size
        direction = torch.randn(y[0].shape, generator=generator, dtype=torch.float64)
        for values in y:
            (values * direction).sum().backward()
    compare_gradients(layers, ours, lambda size: rounding(torch.float64, 2**6) * size)


def test_blob_kl(official, tmp_path):
    """Theirs adds 1e-6 to both standard deviations in the logarithm and to 2 sigma_p^2."""
    _, layers, ours = pair(official, tmp_path)
    expected = sum(layer.div_posterior_prior() for layer in layers.values())
    found, _ = differences("KL", [(complexity(ours), expected)])
    M, omega = (
        torch.cat([value(a).flatten() for a in adapters(ours).values()])
        for value in (lambda a: a.A, lambda a: a.omega())
    )
    square = omega**2 + M**2
    # Each 1e-6 times a bound of the derivative by it.
    assert found <= 1e-6 * (1 / 0.2 + 1 / omega + square / (4 * 0.2**4)).sum()
    shifted = torch.log((0.2 + 1e-6) / (omega + 1e-6)) + square / (2 * 0.2**2 + 1e-6) - 0.5
    found, size = differences("KL, 1e-6 added to ours as well", [(shifted.sum(), expected)])
    assert found <= rounding(torch.float64, 2**8) * size


def test_tfb_rotation_and_widths(official, tmp_path):
    """U and V up to the signs of their columns; their 1e-6 beside d moves a width by 1e-6 / d."""
    _, layers, ours = pair(official, tmp_path, torch.float32, method="mle")
    wrapper = official.tfb.TFBLoRA.__new__(official.tfb.TFBLoRA)
    torch.nn.Module.__init__(wrapper)
    wrapper.blobconfig = official.blob.BLoBConfig(bayes_eps=0.05, bayes_beta=0.015)
    wrapper._modify_lora_layers(layers.values())
    found = {"A": [], "B": [], "Omega": []}
    for name, layer in layers.items():
        adapter, inverse = _rotate(adapters(ours)[name])
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found["A"].append((adapter.A.abs(), A.abs()))
        found["B"].append((adapter.B.abs(), B.abs()))
        omega = (0.015 * inverse[:, None]).expand(A.shape)
        found["Omega"].append((omega, layer.lora_A_rho["default"] ** 2))
    for name, pairs in found.items():
        difference, size = differences(f"TFB's {name}", pairs)
        assert difference <= rounding(torch.float32, 2**6) * size


def test_tfb_search(official):
    """It takes the end that exceeds the tolerance, and divides the change by N: 0.003 is 150 %.

    Its search runs as it is, on answers whose NLL rises by 150 % at sigma = 0.0077.
    """
    examples, nll, edge = 500, 0.1, 0.0077

    def answers(sigma):
        p = math.exp(-nll * (1 + 1.5 * sigma / edge))
        return torch.tensor([[p, 1 - p]]).log().double().expand(examples, 2)

    search = SimpleNamespace(
        args=SimpleNamespace(bayes_beta=0.015), train_n_samples=1, lora_layers=[],
        _update_lora_layers=lambda *_: None,
        all_ori_probs=answers(0).exp(), all_ori_predicted_classes=torch.zeros(examples).long(),
    )  # fmt: skip
    search.forward_logits = lambda *_, **__: answers(search.args.bayes_beta)[:, None]
    official.tfb.TFBLoRA.fit(search, [None], 0.003, 5)
    spacing = (0.015 - 0.001) / 2**5
    assert edge < search.args.bayes_beta <= edge + spacing
    assert f"{spacing:.1e}" == "4.4e-04"
