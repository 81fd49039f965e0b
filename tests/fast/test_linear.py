"""Products of few rows in the native core, against float64; and which products go there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """The product is near that of float64, and of its shape."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    truth, size = F.linear(*wide), F.linear(*(None if t is None else t.abs() for t in wide))
    about = f"{tuple(x.shape)}, {torch.get_num_threads()} threads"
    assert_near(ops.linear(x, weight, bias), truth, size, x.shape[-1] // 16 + 16, about)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 65537), (7, 9999), (577, 302), (2100, 40)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_are_those_of_float64(sizes, with_bias, dtype, isa, threads, calls):
    d_in, d_out = sizes
    weight = normal(d_out, d_in, dtype=dtype, seed=1)
    bias = normal(d_out, dtype=dtype, seed=2) if with_bias else None
    for rows in range(1, ops.FEW_ROWS[dtype] + 1):
        x = normal(rows, d_in, dtype=dtype, seed=3)
        for count in (1, 2, 7):
            threads(count)
            check(x, weight, bias)
    assert len(calls) == 3 * ops.FEW_ROWS[dtype]


def test_shapes_are_those_of_pytorch(calls):
    weight = normal(501, 301, dtype=torch.float32, seed=1)
    for lead in ((), (1,), (2, 2), (1, 1, 8)):
        x = normal(*lead, 301, dtype=torch.float32, seed=2)
        check(x, weight)
    assert len(calls) == 4
    assert ops.linear(torch.ones(0, 301), weight, None).shape == (0, 501)
    with pytest.raises(RuntimeError, match="shape"):
        ops.linear(torch.ones(2, 302), weight, None)
    with pytest.raises(RuntimeError, match="expand"):
        ops.linear(torch.ones(2, 301), weight, torch.ones(500))


def test_other_calls_stay_with_pytorch(calls):
    """Small weights, many rows, gradients, other dtypes and layouts, autocast, transforms."""
    x, weight = (normal(n, 300, dtype=torch.float32, seed=n) for n in (2, 400))
    bias = torch.ones(400)
    ops.linear(x, weight[:200], None)
    leaf = weight.clone().requires_grad_()
    ops.linear(x, leaf, None).sum().backward()
    assert torch.equal(leaf.grad, x.sum(0).expand(400, 300))
    other = bias.clone().requires_grad_()
    ops.linear(x, weight, other).sum().backward()
    ops.linear(x.clone().requires_grad_(), weight, None).sum().backward()
    ops.linear(torch.ones(ops.FEW_ROWS[torch.float32] + 1, 300), weight, None)
    ops.linear(x.double(), weight.double(), None)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(x, weight.bfloat16(), None)
    check(x, weight.T.contiguous().T)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight, None).dtype == torch.bfloat16
    torch.func.vmap(lambda row: ops.linear(row, weight, None))(x)
    assert ops.linear(x.to("meta"), weight.to("meta"), None).is_meta
    assert not calls
    layer = Linear(300, 400).requires_grad_(False)
    layer(x)
    with torch.no_grad():
        ops.linear(x, leaf, other)
    assert len(calls) == 2
