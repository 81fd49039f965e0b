"""The native core with sizes that its segments, blocks, tiles and threads do not divide evenly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scalabl_ref import Noise, subspace_lora_linear

from ..strategies import DTYPES, OpCase
from ..tolerances import no_worse_than, op_sizes
from .test_ops import (
    assert_near,
    composition,
    direction_of,
    needs_core,
    outputs_and_gradients,
)

pytestmark = needs_core
# Rows, sampling and ids: 2, 2, 2, 5 and 1 segments, of rows that no tile of rows divides.
ROWS = {
    "257 tokens": ((257,), "token", None),
    "301 examples of 1": ((301, 1), "example", torch.arange(301) * 13_999_711 % 2**32),
    "43 examples of 7": ((43, 7), "example", torch.arange(43) // 2),
    "701 tokens": ((701,), "token", None),
    "50 tokens": ((50,), "token", None),
}


def case_of(rows: str, dtype: torch.dtype, d_in=130, d_out=97, rank=13) -> OpCase:
    """Sizes that no tile divides. The adapter is of the dtype of x."""
    shape, sampling, groups = ROWS[rows]
    g = torch.Generator().manual_seed(11)

    def normal(*size, times=1.0):
        return (times * torch.randn(size, generator=g)).to(dtype)

    return OpCase(
        x=normal(*shape, d_in), weight=normal(d_out, d_in, times=0.1), bias=normal(d_out),
        A=normal(rank, d_in, times=0.1), B=normal(d_out, rank), s=normal(rank).exp(),
        sigma=normal(rank).exp(), scaling=0.75, noise=Noise(3, 4), layer=9, sampling=sampling,
        groups=groups, draws=None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_uneven_sizes_are_as_accurate_with_any_threads(rows, dtype, isa, threads):
    """Against float64, with one rounding beside the composition's error; and the same bits with
    1, 2 and 7 threads, where W = 0 leaves the core's sums alone."""
    case = case_of(rows, dtype)
    direction = direction_of(case)
    threads(1)
    truth = outputs_and_gradients(case, composition, direction, torch.float64)
    plain = outputs_and_gradients(case, composition, direction)
    sizes = op_sizes(case, direction)
    bare = replace(case, weight=torch.zeros_like(case.weight), bias=None)
    kept = {}
    for count in (1, 2, 7):
        threads(count)
        ours = outputs_and_gradients(case, subspace_lora_linear, direction)
        about = f"{rows}, {dtype}, rank 13, {isa}, {count} threads"
        for name, expected in truth.items():
            terms = case.longest_sum() if dtype == torch.float64 else 1
            allowed = no_worse_than(plain[name], expected, dtype, terms, sizes[name])
            assert_near(ours[name], expected, allowed, f"{name}, {about}")
        for name, value in outputs_and_gradients(bare, subspace_lora_linear, direction).items():
            if name != "weight":  # that one is PyTorch's
                assert torch.equal(value, kept.setdefault(name, value)), f"{name}, {about}"


# Of 50 rows, the last stretch that is widened to float32 is a short one. Of 257 rows, the sums of
# two segments for A and B have more than 4096 values, and are added up in panels.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [("50 tokens", 736, 739, 8), ("257 tokens", 701, 577, 13)])
def test_long_rows_are_as_accurate(sizes, dtype, isa, threads):
    rows, d_in, d_out, rank = sizes
    case = case_of(rows, dtype, d_in, d_out, rank)
    direction = direction_of(case)
    truth = outputs_and_gradients(case, composition, direction, torch.float64)
    plain = outputs_and_gradients(case, composition, direction)
    scale = op_sizes(case, direction)
    for count in (1, 2):
        threads(count)
        ours = outputs_and_gradients(case, subspace_lora_linear, direction)
        for name, expected in truth.items():
            terms = case.longest_sum() if dtype == torch.float64 else 1
            allowed = no_worse_than(plain[name], expected, dtype, terms, scale[name])
            about = f"{name}, {rows}, {dtype}, {isa}, {count} threads"
            assert_near(ours[name], expected, allowed, about)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_between_the_rows_of_a_view_is_not_read(dtype, isa):
    case = case_of("257 tokens", dtype)
    case = replace(case, weight=torch.zeros_like(case.weight), bias=None)
    direction = direction_of(case)

    def gapped(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 9), torch.nan, dtype=t.dtype)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]

    views = {name: gapped(getattr(case, name)) for name in ("x", "A", "B")}
    expected = outputs_and_gradients(case, subspace_lora_linear, direction)
    found = outputs_and_gradients(replace(case, **views), subspace_lora_linear, gapped(direction))
    for name, value in expected.items():
        if name != "weight":  # that one is PyTorch's
            assert torch.equal(found[name], value), f"{name}, {dtype}, {isa}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_out", [1, 7, 40])
def test_ties_round_to_even(dtype, d_out, isa):
    """y is 1 + half an ulp and 1 + three halves, exactly, in every column and place of a row."""
    half = torch.finfo(dtype).eps / 2
    x = torch.ones(9, 1, dtype=dtype)
    for value, rounded in ((1 + half, 1.0), (1 + 3 * half, 1 + 4 * half)):
        for sign in (1.0, -1.0):
            B = torch.full((d_out, 1), sign)
            s = torch.tensor([value])
            y = subspace_lora_linear(
                x,
                torch.zeros(d_out, 1, dtype=dtype),
                None,
                torch.ones(1, 1),
                B,
                s,
                0 * s,
                1.0,
                None,
            )
            assert (y == sign * rounded).all(), (value, sign)
