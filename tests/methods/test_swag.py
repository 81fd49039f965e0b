"""SWAG: a Gaussian through the iterates, in float64, the same from its file."""

from __future__ import annotations

import pytest
import torch

from scalabl_ref import InputError, Noise, adapters, predict
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.methods import Swag
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..models import tiny_batch, tiny_model
from ..tolerances import rounding


def test_swag_is_a_gaussian_through_the_iterates():
    model, swag, seen = tiny_model(method="mle"), Swag(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for adapter in adapters(model).values():
            adapter.A.data += torch.randn(adapter.A.shape, generator=generator)
        swag.collect(model)
        seen.append(adapter_state(model)["lm_head.A"].clone().double())
    mean, sd = torch.stack(seen).mean(0), torch.stack(seen).std(0, correction=0)
    assert (swag.mean["lm_head.A"] - mean).abs().max() <= rounding(torch.float32, 64)
    draws = [swag.draw(Noise(7, i))["lm_head.A"].double() for i in range(2)]
    eps = [(draw - mean) / sd for draw in draws]
    index = sorted(swag.mean).index("lm_head.A")
    for i in range(2):
        z = Noise(7, i).normal(2**31 + index, 1, mean.numel()).view(mean.shape)
        assert (eps[i] - z).abs().max() <= rounding(torch.float32, 1e4)
    unmoved = swag.draw(Noise(7, 0))["lm_head.B"]
    assert torch.equal(unmoved, swag.mean["lm_head.B"])
    prediction = predict(model, tiny_batch(), samples=4, posterior=swag)
    assert (prediction.mutual_information > 0).all()
    with pytest.raises(InputError, match="no iterate"):
        predict(model, tiny_batch(), posterior=Swag())


def test_swag_draws_the_same_once_it_is_loaded(tmp_path):
    """Of more layers than ten, whose names are not in the order of their numbers."""
    model, swag = tiny_model(method="mle", layers=11), Swag()
    for step in range(2):
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.A.add_(step)
        swag.collect(model)
    swag.save(tmp_path / "swag")
    drawn, again = (s.draw(Noise(0, 0)) for s in (swag, Swag.load(tmp_path / "swag")))
    assert drawn.keys() == again.keys()
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_swag_keeps_a_width_far_below_its_mean(tmp_path):
    """Of 3e-5 of it, whose square float32 would round away."""
    model, swag, seen = tiny_model(method="mle", targets=("q_proj",)), Swag(), []
    generator = torch.Generator().manual_seed(0)
    [*_, (layer, adapter)] = adapters(model).items()
    for _ in range(5):
        adapter.A.data = 3 + 1e-4 * torch.randn(adapter.A.shape, generator=generator)
        swag.collect(model)
        seen.append(adapter.A.detach().double())
    swag.save(tmp_path)
    expected, name = torch.stack(seen).std(0, correction=0), f"{layer}.A"
    z = Noise(7, 0).normal(2**31 + sorted(swag.mean).index(name), 1, expected.numel())
    z = z.view(expected.shape).double()
    for made in (swag, Swag.load(tmp_path)):
        width = (made.draw(Noise(7, 0))[name] - made.mean[name]) / z
        bound = rounding(torch.float64, 64) * 9 / expected + rounding(torch.float64, 9) / z.abs()
        assert ((width - expected).abs() <= bound).all()


def test_swag_goes_on_from_its_state():
    """As a training that was stopped does: into a SWAG that has collected something else."""
    model, swag, other = tiny_model(method="mle"), Swag(), Swag()
    swag.collect(model)
    swag.collect(model)
    other.collect(tiny_model(seed=1, method="mle"))
    other.mean["gone"] = other.square["gone"] = torch.zeros(1)
    other.restore(swag.state())
    for adapter in adapters(model).values():
        adapter.A.data += 1
    for each in (swag, other):
        each.collect(model)
    assert other.count == 3 and other.mean.keys() == swag.mean.keys()
    for part in ("mean", "square"):
        for name, value in getattr(swag, part).items():
            assert torch.equal(getattr(other, part)[name], value), name


@pytest.mark.parametrize("change", ["count", "name"])
def test_a_file_of_another_program_is_refused(change, tmp_path):
    swag = Swag()
    swag.collect(tiny_model(method="mle"))
    swag.save(tmp_path)
    tensors, metadata = load_tensors(file := tmp_path / "swag.safetensors")
    if change == "count":
        metadata = {}
    else:
        tensors["median.x"] = torch.zeros(1)
    save_tensors(file, tensors.items(), metadata)
    with pytest.raises(InputError, match="not written by this program"):
        Swag.load(tmp_path)
