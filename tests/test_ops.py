"""The op against its slow twin, and the properties that need no twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import Noise, reference, subspace_lora_linear
from scalabl_ref.ops import SAMPLING

from .strategies import OpCase, op_cases
from .tolerances import op_bound


def call(case: OpCase, function=subspace_lora_linear, **changes):
    return function(**{**case.arguments(), **changes})


@given(op_cases())
def test_equals_the_reference(case):
    expected = call(case, reference.subspace_lora_linear)
    error = (call(case).double() - expected).abs()
    assert (error <= op_bound(case)).all()


@given(op_cases())
def test_sigma_zero_is_the_mean_model(case):
    still = call(case, sigma=torch.zeros_like(case.sigma))
    assert torch.equal(still, call(case, noise=None))


@given(op_cases())
def test_mean_is_plain_lora_with_diag_s_A(case):
    merged = case.s[:, None].double() * case.A.double()
    lora = case.x.double() @ (case.weight.double() + case.scaling * case.B.double() @ merged).T
    if case.bias is not None:
        lora = lora + case.bias.double()
    assert ((call(case, noise=None).double() - lora).abs() <= op_bound(case)).all()


@given(op_cases(dtype=torch.float64))
def test_gradients_equal_those_through_the_definition(case):
    """The same noise as an explicit matrix, one row at a time, in float64."""
    names = ("x", "A", "B", "s", "sigma")
    leaves = {n: getattr(case, n).clone().requires_grad_() for n in names}
    out = call(case, **leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = list(leaves.values())
    got = torch.autograd.grad((out * direction).sum(), wanted, materialize_grads=True)

    eps = case.row_noise()  # (rows, r)
    x = leaves["x"].reshape(-1, leaves["x"].shape[-1])
    rows = [
        case.scaling * leaves["B"] @ torch.diag(leaves["s"] + leaves["sigma"] * e) @ leaves["A"] @ v
        + case.weight @ v
        for v, e in zip(x, eps, strict=True)
    ]
    literal = (torch.stack(rows) * direction.reshape(len(rows), -1)).sum()
    expected = torch.autograd.grad(literal, wanted, materialize_grads=True)
    for name, a, b in zip(names, got, expected, strict=True):
        scale = b.abs().max().clamp(min=1.0)
        assert (a - b).abs().max() <= 1e3 * torch.finfo(torch.float64).eps * scale, name


@given(op_cases(sampling="example"), st.data())
def test_a_draw_follows_the_group_and_not_the_place(case, data):
    count = case.x.shape[0]
    order = torch.tensor(data.draw(st.permutations(range(count))))
    plain = call(case, groups=None)
    moved = call(case, x=case.x[order], groups=order)
    assert torch.equal(moved, plain[order]) or torch.allclose(
        moved.double(), plain[order].double(), rtol=0, atol=float(op_bound(case).max())
    )


def test_sampling_groups_share_what_they_should():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 8, generator=generator).expand(3, 2, 8)
    A, B = torch.randn(4, 8, generator=generator), torch.randn(5, 4, generator=generator)
    weight, ones = torch.zeros(5, 8), torch.ones(4)

    def rows(sampling):
        out = subspace_lora_linear(
            x, weight, None, A, B, ones, ones, 1.0, Noise(3, 1), sampling=sampling
        )
        return len({tuple(row) for row in out.reshape(6, 5).tolist()})

    assert [rows(sampling) for sampling in SAMPLING] == [1, 3, 6]


def test_adapters_stay_float32_on_a_bfloat16_base():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, generator=generator).bfloat16()
    A, B = torch.randn(2, 16, generator=generator), torch.randn(3, 2, generator=generator)
    ones, weight = torch.ones(2), torch.zeros(3, 16, dtype=torch.bfloat16)
    out = subspace_lora_linear(x, weight, None, A, B, ones, ones, 1.0, None)
    assert out.dtype == torch.bfloat16
    # W = 0, so the only rounding to bfloat16 is that of the sum: half a unit in the last place.
    exact = x.double() @ A.double().T @ B.double().T
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert ((out.double() - exact).abs() <= 1.01 * half_ulp * exact.abs()).all()


def test_bad_arguments_are_named():
    x = torch.zeros(2, 3, 4)
    A, B, r = torch.zeros(1, 4), torch.zeros(5, 1), torch.zeros(1)
    arguments = (x, torch.zeros(5, 4), None, A, B, r, r, 1.0, Noise(0, 0), 0)
    with pytest.raises(ValueError, match="sampling must be one of"):
        subspace_lora_linear(*arguments, "row")
    with pytest.raises(ValueError, match="groups of shape"):
        subspace_lora_linear(*arguments, "example", torch.arange(3))
