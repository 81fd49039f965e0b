"""Products of few rows in the native core, against float64; and which products go there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scalabl_ref.fast import native, ops
from scalabl_ref.model.attach import Linear

from .test_blocks import DTYPES, assert_near, normal
from .test_ops import needs_core

pytestmark = needs_core


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The arguments of the core's calls."""
    seen, core = [], native.core()
    own = core.few_rows
    monkeypatch.setattr(core, "few_rows", lambda *a: seen.append(a) or own(*a))
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (577, 302), (2100, 40)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_are_those_of_float64(sizes, with_bias, dtype, isa, threads, calls):
    d_in, d_out = sizes
    weight = normal(d_out, d_in, dtype=dtype, seed=1)
    bias = normal(d_out, dtype=dtype, seed=2) if with_bias else None
    start = 0 if bias is None else bias.double()
    for rows in range(1, ops.FEW_ROWS[dtype] + 1):
        x = normal(rows, d_in, dtype=dtype, seed=3)
        truth = x.double() @ weight.double().T + start
        size = x.double().abs() @ weight.double().abs().T + abs(start)
        for count in (1, 2, 7):
            threads(count)
            y = ops.linear(x, weight, bias)
            assert_near(y, truth, size, d_in // 16 + 16, f"{rows} rows, {count} threads")
    assert len(calls) == 3 * ops.FEW_ROWS[dtype]


def test_shapes_are_those_of_pytorch(calls):
    weight = normal(5, 3, dtype=torch.float32, seed=1)
    for shape in ((3,), (1, 3), (2, 2, 3), (1, 1, 8, 3)):
        x = normal(*shape, dtype=torch.float32, seed=2)
        assert torch.allclose(ops.linear(x, weight, None), F.linear(x, weight), atol=1e-5)
    assert len(calls) == 4
    assert ops.linear(torch.ones(0, 3), weight, None).shape == (0, 5)
    with pytest.raises(RuntimeError, match="shape"):
        ops.linear(torch.ones(2, 4), weight, None)
    with pytest.raises(RuntimeError, match="expand"):
        ops.linear(torch.ones(2, 3), weight, torch.ones(4))


def test_other_calls_stay_with_pytorch(calls):
    """Gradients, many rows, other dtypes and layouts, autocast, transforms; Linear."""
    x, weight = (normal(n, 6, dtype=torch.float32, seed=n) for n in (2, 4))
    bias = torch.ones(4)
    leaf = weight.clone().requires_grad_()
    ops.linear(x, leaf, None).sum().backward()
    assert torch.equal(leaf.grad, x.sum(0).expand(4, 6))
    other = bias.clone().requires_grad_()
    ops.linear(x, weight, other).sum().backward()
    ops.linear(x.clone().requires_grad_(), weight, None).sum().backward()
    ops.linear(x.repeat(5, 1), weight, None)
    ops.linear(x.double(), weight.double(), None)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(x, weight.bfloat16(), None)
    torch.testing.assert_close(ops.linear(x, weight.T.contiguous().T, None), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight, None).dtype == torch.bfloat16
    torch.func.vmap(lambda row: ops.linear(row, weight, None))(x)
    assert ops.linear(x.to("meta"), weight.to("meta"), None).is_meta
    assert not calls
    layer = Linear(6, 4).requires_grad_(False)
    layer(x)
    with torch.no_grad():
        ops.linear(x, leaf, other)
    assert len(calls) == 2
