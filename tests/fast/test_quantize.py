"""Bases in 8 and 4 bits: codes against a search, products against the dequantised model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from scalabl_ref import AdapterConfig, InputError, Llama, Noise, adapters, add_adapters
from scalabl_ref.app import cli
from scalabl_ref.core.config import ADAPTERS
from scalabl_ref.core.noise import Keys
from scalabl_ref.core.objective import class_logits
from scalabl_ref.fast import quantize as quantized
from scalabl_ref.fast.quantize import (
    GROUP,
    KINDS,
    LEVELS,
    QuantizedLinear,
    quantize,
    quantize_model,
    whole,
)
from scalabl_ref.model.attach import Linear
from scalabl_ref.model.weights import block_linears
from scalabl_ref.support.tensors import save_tensors

from ..models import CLASSES, TINY, fill, questions_file, tiny_batch, tiny_folder
from ..tolerances import logits_bound, rounding

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_weight(d_out: int = 37, d_in: int = 2 * GROUP + 6, dtype=torch.float32):
    """Not a multiple of anything; with a row of zeros, and one of large values."""
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    weight[3], weight[5] = 0, 1e4 * weight[5]
    return weight.to(dtype)


def values(packed, d_in=2 * GROUP + 6) -> torch.Tensor:
    """What the codes stand for by definition, one by one, in float64."""
    scale, rows = packed.scale.double(), []
    for i, codes in enumerate(packed.codes.tolist()):
        if packed.codes.dtype == torch.uint8:
            halves = [half for code in codes for half in (code % 16, code // 16)]
            row = [LEVELS[half] * scale[i, j // GROUP].item() for j, half in enumerate(halves)]
        else:
            row = [code * scale[i, 0].item() for code in codes]
        rows.append(row[:d_in])
    return torch.tensor(rows, dtype=torch.float64)


def test_levels_are_quantiles_of_a_normal():
    """As QLoRA builds them: 8 above 0 and 7 below, over the largest."""
    end = 0.9677083
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((above, below, torch.zeros(1, dtype=torch.float64))).sort().values
    expected = levels / levels.max()
    # They were computed in float32, and the quantile was written down to seven digits.
    assert (torch.tensor(LEVELS, dtype=torch.float64) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_codes_are_the_nearest(kind, dtype):
    weight = random_weight(dtype=dtype)
    packed = quantize(weight, kind)
    groups = packed.scale.shape[1]
    codes = torch.arange(-127, 128) if kind == "int8" else torch.tensor(LEVELS)
    widths = (GROUP,) if kind == "nf4" else (weight.shape[1],)
    scale = packed.scale.double().repeat_interleave(widths[0], 1)[:, : weight.shape[1]]
    off = (weight.double()[..., None] - scale[..., None] * codes.double()).abs().amin(-1)
    error = (weight.double() - values(packed)).abs()
    assert (error <= off + rounding(torch.float32, 2) * weight.double().abs()).all()
    top = F.pad(weight.double().abs(), (0, groups * widths[0] - weight.shape[1]))
    top = top.view(len(weight), groups, -1).amax(-1) / (127 if kind == "int8" else 1)
    assert ((packed.scale.double() - top).abs() <= rounding(torch.bfloat16, 1) / 2 * top).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_whole_weight_is_what_the_codes_say(kind, dtype):
    """Rounded to dtype: a level, a scale and their product."""
    weight = random_weight()
    packed = quantize(weight, kind)
    made, expected = whole(*packed, weight.shape[1], dtype), values(packed)
    assert made.shape == expected.shape == weight.shape and made.dtype == dtype
    least = torch.finfo(dtype).smallest_normal  # below it float16 rounds to a fixed step
    bound = rounding(dtype, 2) * expected.abs() + least
    assert ((made.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("d_in", [1, 2 * GROUP + 6, 1100])
def test_the_core_makes_the_same_weight_to_the_bit(kind, dtype, d_in, isa, monkeypatch):
    """On every instruction set, of all columns, and of some where codes and scales have gaps."""
    packed = quantize(random_weight(301, d_in), kind)
    served = count_calls(monkeypatch, quantized, "core")
    some = packed.codes[:, : GROUP // 2], packed.scale[:, :1]
    width = min(d_in, GROUP)
    if kind == "int8":
        some = packed.codes[:, :width], packed.scale
    mine = whole(*packed, d_in, dtype), whole(*some, width, dtype)
    assert len(served) == 2
    monkeypatch.setattr(quantized, "serves", lambda *tensors: False)
    assert torch.equal(mine[0], whole(*packed, d_in, dtype))
    assert torch.equal(mine[1], mine[0][:, :width])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_product_by_parts_is_that_of_the_whole(kind, grad, monkeypatch):
    """Parts that do not divide the outputs (37), and columns that fill the last group or not."""
    monkeypatch.setattr(quantized, "AT_ONCE", 37 * GROUP)
    for d_in, groups in ((2 * GROUP + 6, 3), (3 * GROUP, 3)):
        like = Linear(d_in, 37, bias=True)
        like.bias.data = torch.linspace(-1, 1, 37)
        layer = QuantizedLinear(like, *quantize(random_weight(37, d_in), kind))
        parts = count_calls(monkeypatch, quantized, "whole")
        x = torch.randn(5, d_in, generator=torch.Generator().manual_seed(1)).requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            y = layer(x)
        assert len(parts) == -(-37 // (37 * GROUP // d_in)) > 1
        weight = whole(layer.weight, layer.scale, d_in, torch.float32)
        bound = rounding(torch.float32, d_in + 2) * (x.abs() @ weight.abs().T + 1)
        assert ((y - (x @ weight.T + like.bias)).abs() <= bound).all()
        if grad:
            parts.clear()
            g = torch.randn(5, 37, generator=torch.Generator().manual_seed(2))
            (mine,) = torch.autograd.grad(y, x, g)
            assert len(parts) == groups and mine.shape == x.shape
            assert ((mine - g @ weight).abs() <= rounding(torch.float32, 37) * (
                g.abs() @ weight.abs())).all()  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_not_the_codes_are_refused(kind):
    """In all paths: the core would read what lies behind a row."""
    layer = QuantizedLinear(Linear(100, 7, bias=False), *quantize(random_weight(7, 100), kind))
    for width in (30, 99, 129, 300):
        with pytest.raises(InputError, match=f"x has {width} columns, and the layer 100"):
            layer(torch.ones(2, width))
    for width in (30, 129):
        with pytest.raises(InputError, match=f"do not fit {width} columns"):
            whole(layer.weight, layer.scale, width, torch.float32)


@pytest.mark.parametrize(
    "kind, d_out, d_in", [("int8", 0, 5), ("nf4", 0, 5), ("nf4", 5, 0), ("nf4", 0, 0)]
)
def test_an_empty_layer(kind, d_out, d_in):
    like = Linear(d_in, d_out, bias=False)
    layer = QuantizedLinear(like, *quantize(torch.ones(d_out, d_in), kind))
    x = torch.ones(3, d_in, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (3, d_out) and not y.any() and x.grad.shape == x.shape


def count_calls(monkeypatch, module, name: str) -> list[tuple]:
    """The arguments of the calls of module.name from now on."""
    calls: list[tuple] = []
    function = getattr(module, name)

    def counted(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_sizes_are_those_of_four_and_eight_bits():
    weight = torch.zeros(64, 4 * GROUP)
    sizes = {k: (q := quantize(weight, k)).codes.nbytes + q.scale.nbytes for k in KINDS}
    assert sizes == {"int8": 64 * 4 * GROUP + 2 * 64, "nf4": 64 * 2 * GROUP + 2 * 64 * 4}


BIASED = dataclasses.replace(TINY, qkv_bias=True, output_bias=True, mlp_bias=True)


def pair(kind: str, dtype=torch.float64, **config) -> tuple[Llama, Llama]:
    """A quantised model, and the same with its weights made whole: plain linear layers."""
    models = []
    for _ in range(2):
        model = Llama(BIASED, dtype=dtype).init_random_(0, std=0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data += torch.linspace(-0.5, 0.5, len(parameter)).to(dtype)
        quantize_model(model, kind)
        models.append(model.trim_head(CLASSES))
    dense = Llama(BIASED, dtype=dtype).trim_head(CLASSES)
    weights = dict(models[1].state_dict())
    for name, linear in block_linears(models[1]):
        weights[f"layers.{name}.weight"] = whole(linear.weight, linear.scale, linear.d_in, dtype)
        del weights[f"layers.{name}.scale"]
    dense.load_state_dict(weights)
    models[1] = dense.requires_grad_(False)
    for model in models:
        targets = ("q_proj", "v_proj", "down_proj", "lm_head")
        add_adapters(model, AdapterConfig(**{"rank": 2, "targets": targets, **config}))
        fill(model)
    return models[0], models[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", list(ADAPTERS))
def test_gradients_are_those_of_the_dequantised_model(kind, method):
    """Every method's, in float64, where W is rounded once, the same way on both sides."""
    ours, theirs = pair(kind, method=method)
    results = []
    for model in (ours, theirs):
        loss = class_logits(model, tiny_batch(), Noise(0, 0)).square().sum()
        loss.backward()
        gradients = [p.grad for a in adapters(model).values() for p in a.parameters()]
        results.append([loss.detach(), *(g for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1]) > 8
    for mine, other in zip(*results, strict=True):
        # The adapters are float32: what they compute, and their gradients, are rounded to that.
        bound = logits_bound(TINY, other.abs().max().item(), torch.float32)
        assert (mine - other).abs().max() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_is_the_dequantised_model_s_to_the_bit(kind):
    """Without gradients the same operations run on the same weights."""
    ours, theirs = pair(kind, torch.float32)
    batch = tiny_batch()
    with torch.no_grad():
        mine, other = (
            m(batch.tokens, lengths=batch.lengths, noise=Noise(0, 0), draws=3)
            for m in (ours, theirs)
        )
    assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_whole_is_kept_for_the_backward_pass(kind):
    ours, theirs = pair(kind, torch.float32)
    kept: list[torch.Tensor] = []
    shapes = {(linear.d_out, linear.d_in) for _, linear in block_linears(ours)}
    shapes |= {shape[::-1] for shape in shapes}

    def keep(tensor):
        kept.append(tensor)
        return tensor

    for model, some in ((theirs, True), (ours, False)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            class_logits(model, tiny_batch(6, longest=7), Noise(0, 0))
        floats = [t for t in kept if t.is_floating_point() and tuple(t.shape) in shapes]
        assert bool(floats) == some


def test_autocast_and_vmap_take_a_quantised_layer():
    ours, theirs = pair("nf4", torch.float32)
    x = torch.randn(5, 3, TINY.hidden_size, generator=torch.Generator().manual_seed(1))
    layers = [m.layers[0].attn.q_proj for m in (ours, theirs)]
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = (layer(x) for layer in layers)
    assert mine.dtype == other.dtype == torch.bfloat16
    # Products of bfloat16 are exact in float32; the levels and scales on one side are rounded.
    bound = rounding(torch.bfloat16, 6) * (x.abs() @ layers[1].weight.abs().T + other.abs().max())
    assert ((mine - other).abs() <= bound).all()
    rows = torch.func.vmap(layers[0])(x)
    assert (rows - layers[0](x)).abs().max() <= logits_bound(TINY, rows.abs().max().item())


@pytest.mark.filterwarnings(  # the tracer's own, and of the cached table of levels
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*lru_cache:UserWarning",
)
def test_an_adapted_layer_of_codes_compiles():
    """As one graph, the noise and gradients those of the layer as it is."""
    ours, _ = pair("nf4", torch.float32)
    layer = ours.layers[0].attn.q_proj
    x = torch.randn(5, 3, TINY.hidden_size, generator=torch.Generator().manual_seed(1))
    leaf = next(p for name, p in layer.named_parameters() if name.endswith("log_s"))
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = function(x, Keys(Noise(0, 1)))
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    for mine, other in zip(*found, strict=True):
        assert (mine - other).abs().max() <= rounding(torch.float32, 512) * other.abs().max()


# --- folders and commands ----------------------------------------------------------------------


def stored(folder: Path, kind: str) -> Llama:
    """The model in `folder`, whose weights become codes in place."""
    model = quantize_model(Llama.from_pretrained(folder), kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = {**json.loads((folder / "config.json").read_text()), "quantize": kind}
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(folder / "model.safetensors", state.items())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_quantised_on_the_way_in(tmp_path, kind):
    """The same from a file of floats as of a model in memory, and from a file of codes."""
    folder = tiny_folder(tmp_path)
    ours = Llama.from_pretrained(folder, quantize=kind)
    expected = stored(folder, kind)
    again = Llama.from_pretrained(folder, dtype=torch.float16)
    assert ours.quantized == again.quantized == kind
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
        if not tensor.is_floating_point() or name.endswith("scale"):
            assert again.state_dict()[name].dtype == tensor.dtype, name
            assert torch.equal(again.state_dict()[name], tensor), name
        else:
            assert again.state_dict()[name].dtype == torch.float16, name
    assert Llama.from_pretrained(folder, quantize=kind).quantized == kind


def test_wrong_kinds_are_refused(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(InputError, match="quantize must be one of int8, nf4, not 'int3'"):
        Llama.from_pretrained(folder, quantize="int3")
    with pytest.raises(InputError, match="the base is quantised already, to int8"):
        quantize_model(Llama.from_pretrained(folder, quantize="int8"), "nf4")
    with pytest.raises(InputError, match="model: is quantised already, to int8"):
        stored(folder, "int8")
        Llama.from_pretrained(folder, quantize="nf4")
    tiny_folder(tmp_path / "floats")
    (tmp_path / "floats" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"q_proj\.weight is torch\.float32, expected torch\.int8"):
        Llama.from_pretrained(folder)


def test_a_run_remembers_its_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    questions_file(tmp_path / "train.jsonl")

    def command(text: str) -> int:
        return cli.main(text.split())

    train = "train --model model --data train.jsonl --out run --steps 3 --batch 4 --rank 2"
    assert command(f"{train} --quantize nf4") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["quantize"] == "nf4"
    assert command("evaluate --run run --data train.jsonl --samples 2") == 0
    assert command("predict --run run --prompt a --choices b c --samples 2") == 0
    assert command("export --run run --to peft --out peft") == 0
    capsys.readouterr()
    assert command("export --run run --to hf --out hf") == 2
    assert "would not be those of its nf4 base" in capsys.readouterr().err
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**info, "quantize": "int8"}))
    assert command("evaluate --run run --data train.jsonl --samples 2") == 2
    assert "was trained on another base model" in capsys.readouterr().err
