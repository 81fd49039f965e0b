"""RMSNorm, RoPE and SwiGLU of the native core against the plain functions in float64.

A bound is a number of float32 roundings, relative to the sum of the magnitudes of the terms, and
half a unit of the dtype in which the result is stored.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scalabl_ref.fast import blocks, native
from scalabl_ref.model import llama as plain
from scalabl_ref.model.llama import RMSNorm

from ..tolerances import rounding
from .test_ops import needs_core

pytestmark = needs_core
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = (1, 7, 33, 576, 1025, 2100)  # one piece of half precision has 1024
EPS = 1e-5


def normal(*shape: int, dtype: torch.dtype, seed: int, times: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (times * torch.randn(shape, generator=g)).to(dtype)


def assert_near(got: Tensor, truth: Tensor, size: Tensor, terms: int, about: str) -> None:
    """|got - truth| <= `terms` float32 roundings of `size`, then one of got's dtype."""
    allowed = rounding(torch.float32, terms) * size
    if got.dtype != torch.float32:
        info = torch.finfo(got.dtype)
        allowed = allowed + info.eps / 2 * (truth.abs() + allowed) + info.tiny * info.eps
    wrong = ((got.double() - truth).abs() > allowed).nonzero()
    first = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), f"{about}: {len(wrong)} wrong, the first at {first}"


def norm_of(weight: Tensor) -> RMSNorm:
    module = RMSNorm(len(weight), EPS)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", COLUMNS)
def test_rms_norm_and_its_gradients(n, dtype, isa):
    x, g = normal(13, n, dtype=dtype, seed=1), normal(13, n, dtype=dtype, seed=2)
    weight = normal(n, dtype=dtype, seed=3)
    module = norm_of(weight).requires_grad_()
    y = blocks.rms_norm(module, x.requires_grad_())
    y.backward(g)
    xd, gd, wd = x.detach().double(), g.double(), weight.double()
    scale = (xd.square().mean(-1, keepdim=True) + EPS).rsqrt()
    unit = xd * scale
    inner = wd * gd * unit
    terms = n // 32 + 16  # of a sum: 32 partial ones, and their sum
    assert_near(y, unit * wd, (unit * wd).abs(), terms, "y")
    truth = scale * (wd * gd - inner.mean(-1, keepdim=True) * unit)
    size = scale * ((wd * gd).abs() + inner.abs().mean(-1, keepdim=True) * unit.abs())
    assert_near(x.grad, truth, size, 4 * terms, "grad x")
    assert_near(module.weight.grad, (gd * unit).sum(0), (gd * unit).abs().sum(0), 64, "grad weight")
    with torch.no_grad():
        assert torch.equal(blocks.rms_norm(module, x), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", COLUMNS)
def test_swiglu_and_its_gradients(n, dtype, isa):
    """Gates up to 30, where silu is a straight line or nearly 0."""
    gate, up, g = (normal(13, n, dtype=dtype, seed=seed, times=seed) for seed in (7, 2, 1))
    y = blocks.swiglu(gate.requires_grad_(), up.requires_grad_())
    y.backward(g)
    gated, upd, gd = gate.detach().double(), up.detach().double(), g.double()
    p = gated.sigmoid()
    assert_near(y, gated * p * upd, (gated * p * upd).abs(), 12, "y")
    slope, bound = p * (1 + gated * (1 - p)), p * (1 + gated.abs())
    assert_near(gate.grad, gd * upd * slope, (gd * upd).abs() * bound, 12, "grad gate")
    assert_near(up.grad, gd * gated * p, (gd * gated * p).abs(), 12, "grad up")
    with torch.no_grad():
        assert torch.equal(blocks.swiglu(gate, up), y)


@pytest.mark.parametrize("gate", [0.0, -0.0, 100.0, -100.0, 88.0, -88.0, float("inf")])
def test_swiglu_of_awkward_gates(gate, isa):
    x, up = torch.full((40,), gate), torch.full((40,), 2.0)
    with torch.no_grad():
        got = blocks.swiglu(x, up)
    # exp stops at 87: silu(-100) is -2e-36 in the core, and 0 in PyTorch.
    near = rounding(torch.float32, 8)
    assert torch.allclose(got, plain.swiglu(x, up), rtol=near, atol=1e-35)  # 2e-36, see above


def test_not_a_number_stays_one(isa):
    nan = torch.full((40,), float("nan"))
    with torch.no_grad():
        assert blocks.swiglu(nan, torch.ones(40)).isnan().all()
        assert blocks.rms_norm(norm_of(torch.ones(40)), nan[None]).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 3, 64), (3, 7, 9, 10), (2, 301, 2, 6)], ids=str)
@pytest.mark.parametrize("each", [False, True], ids=["shared angles", "angles of each row"])
def test_rope_and_its_gradient(each, shape, dtype, isa):
    B, T, heads, h = shape
    x, g = normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=2)
    cos, sin = (normal(B if each else 1, T, 1, h, dtype=dtype, seed=seed) for seed in (3, 4))
    y = blocks.rotate(x.requires_grad_(), cos, sin)
    y.backward(g)
    xd = x.detach().double().requires_grad_()
    truth = plain.rotate(xd, cos.double(), sin.double())
    truth.backward(g.double())
    size = xd.detach().abs().roll(h // 2, -1) * sin.double().abs() + xd.abs() * cos.double().abs()
    assert_near(y, truth.detach(), size.detach(), 4, "y")
    turned = (g.double() * sin.double()).abs().roll(h // 2, -1)
    assert_near(x.grad, xd.grad, turned + (g.double() * cos.double()).abs(), 4, "grad x")
    with torch.no_grad():
        assert torch.equal(blocks.rotate(x, cos, sin), y)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rope_into_places(dtype, isa):
    """Rows go to their places, zeros to the others; gradients come back from there."""
    x, g = normal(5, 3, 8, dtype=dtype, seed=1), normal(9, 3, 8, dtype=dtype, seed=2)
    cos, sin = (normal(5, 1, 8, dtype=dtype, seed=seed) for seed in (3, 4))
    places = torch.tensor([0, 2, 3, 7, 8])
    y = blocks.rotate(x.requires_grad_(), cos, sin, places, 9)
    alone = blocks.rotate(x, cos, sin)
    assert torch.equal(y[places], alone) and not y[[1, 4, 5, 6]].any()
    both = (torch.autograd.grad(out, x, to)[0] for out, to in ((y, g), (alone, g[places])))
    assert torch.equal(*both)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype, threads):
    """Also with as many rows as keep 7 threads busy, which divide them unevenly."""
    x, g = normal(301, 1030, dtype=dtype, seed=1), normal(301, 1030, dtype=dtype, seed=2)
    module, cos = (
        norm_of(normal(1030, dtype=dtype, seed=3)),
        normal(301, 1, 10, dtype=dtype, seed=4),
    )
    heads = x.view(301, 103, 10)
    found = []
    for number in (1, 2, 7):
        threads(number)
        leaf, other = x.clone().requires_grad_(), g.clone().requires_grad_()
        out = blocks.rms_norm(module, leaf), blocks.swiglu(leaf, other)
        turned = blocks.rotate(leaf.view_as(heads), cos, cos)
        gradients = [torch.autograd.grad(y, leaf, g.view_as(y))[0] for y in (*out, turned)]
        found.append([*out, turned, *gradients])
    for name in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[name], strict=True))


def test_gaps_between_rows_are_not_read():
    """Views whose gaps are NaN, and gradients that are views."""
    wide = torch.full((6, 2, 40), float("nan"))
    wide[:, 0, :20] = normal(6, 20, dtype=torch.float32, seed=1)
    x = wide[:, 0, :20]
    module, angles, ones = norm_of(torch.ones(20)), torch.ones(6, 1, 10), torch.ones(6, 20)
    one = torch.full((120,), float("nan"))
    one[0] = 1
    for function in (
        lambda x: blocks.rms_norm(module, x),
        lambda x: blocks.swiglu(x, x),
        lambda x: blocks.rotate(x.unflatten(-1, (2, 10)), angles, angles).flatten(1),
    ):
        leaf, packed = x.detach().requires_grad_(), x.contiguous().requires_grad_()
        assert torch.equal(function(leaf), function(packed))
        gradient = torch.autograd.grad(function(leaf), leaf, one.as_strided((6, 20), (0, 0)))[0]
        assert torch.equal(gradient, torch.autograd.grad(function(packed), packed, ones)[0])


def test_angles_may_be_views():
    x = normal(6, 2, 10, dtype=torch.float32, seed=1)
    wide = torch.full((2, 6, 1, 30), float("nan"))
    wide[..., :10] = normal(2, 6, 1, 10, dtype=torch.float32, seed=2)
    cos, sin = wide[..., :10]
    right = blocks.rotate(x, cos.contiguous(), sin.contiguous())
    assert torch.equal(blocks.rotate(x, cos, sin.contiguous()), right)
    assert torch.equal(blocks.rotate(x, cos.contiguous(), sin), right)


def test_leading_dimensions_of_a_norm_change_nothing():
    x, g = (normal(6, 20, dtype=torch.float32, seed=seed) for seed in (1, 2))
    found = []
    for shape in ((6, 20), (2, 3, 20), (6, 1, 20)):
        leaf, module = x.view(shape).requires_grad_(), norm_of(torch.ones(20)).requires_grad_()
        y = blocks.rms_norm(module, leaf)
        gradients = torch.autograd.grad(y, (leaf, module.weight), g.view(shape))
        found.append([t.reshape(-1, 20) for t in (y, *gradients)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_second_derivatives():
    """Of the fast functions in float32, near those of the plain functions in float64."""
    module, g = (
        norm_of(normal(6, dtype=torch.float32, seed=3)),
        normal(4, 6, dtype=torch.float32, seed=5),
    )
    cos, sin = (normal(4, 1, 6, dtype=torch.float32, seed=seed) for seed in (6, 7))
    places = torch.tensor([1, 2, 4, 5])
    functions = {
        "norm": (blocks.rms_norm, blocks.plain_norm, lambda norm, x, _: norm(module, x)),
        "swiglu": (blocks.swiglu, plain.swiglu, lambda swiglu, x, _: swiglu(x, x.flip(0))),
        "rotate": (lambda x, *angles: blocks.rotate(x, *angles, places, 7)[places], plain.rotate,
                   lambda rotate, x, angles: rotate(x[:, None], *angles).square()[:, 0]),
    }  # fmt: skip
    x = normal(4, 6, dtype=torch.float32, seed=1)
    for name, (fast, slow, of) in functions.items():
        second = []
        for function, dtype in ((fast, torch.float32), (slow, torch.float64)):
            leaf = x.to(dtype).requires_grad_()
            module.to(dtype)
            y = of(function, leaf, (cos.to(dtype), sin.to(dtype)))
            (first,) = torch.autograd.grad(y, leaf, g.to(dtype), create_graph=True)
            second.append(torch.autograd.grad(first.square().sum(), leaf)[0].double())
        error = (second[0] - second[1]).abs().max()
        assert error <= rounding(torch.float32, 64) * second[1].abs().max(), name


def test_what_the_core_does_not_serve_goes_to_the_plain_functions():
    x = normal(4, 6, dtype=torch.float32, seed=1)
    assert blocks.serves(x, x) and not blocks.serves(x.double(), x.double())
    assert not blocks.serves(x, x.bfloat16()) and not blocks.serves(x.to("meta"))
    module = norm_of(torch.ones(6))
    seen = []
    torch.func.vmap(lambda row: seen.append(blocks.serves(row)) or blocks.rms_norm(module, row))(x)
    assert seen == [False]
    mixed = norm_of(torch.ones(6, dtype=torch.float64))
    assert blocks.rms_norm(mixed, x).dtype == torch.float64


def test_bad_arguments_of_the_core():
    core, x = native.core(), torch.ones(4)
    at = x.data_ptr()
    with pytest.raises(ValueError, match="dtype"):
        core.swiglu(1, 4, at, at, at, 1)
    with pytest.raises(ValueError, match="null"):
        core.swiglu(0, 4, 0, at, at, 1)
    with pytest.raises(ValueError, match="threads"):
        core.swiglu(0, 4, at, at, at, 0)
    with pytest.raises(ValueError, match="negative"):
        core.rms_norm(0, (-1, 4), at, at, 1e-5, at, 0, 1)
    with pytest.raises(ValueError, match="size"):
        core.rotate(0, (1, 1, 3, 1), at, at, 0, False, at, at, 1)
    with pytest.raises(ValueError, match="size"):
        core.rotate(0, (1, 1, 4, 0), at, at, 0, False, at, at, 1)
