"""Which noise each row of a layer takes; the layer itself is tested in fast/test_ops.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from scalabl_ref import Noise
from scalabl_ref.core.layer import SAMPLING, row_keys
from scalabl_ref.core.noise import Keys
from scalabl_ref.verify import reference

SHAPES = ((), (1,), (4,), (2, 3), (3, 1), (3, 2, 4), (0, 3), (2, 0))


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_takes_the_ids_of_its_group(shape, sampling):
    """Row by row against the reference, for ids and draws of every leading part of the shape."""
    generator = torch.Generator().manual_seed(0)
    leading = [shape[:n] for n in range(1, len(shape) + 1)]
    rows = range(torch.Size(shape).numel())
    for lead, later in itertools.product([None, *leading], repeat=2):
        groups, draws = (
            None if size is None else torch.randint(0, 2**32, size, generator=generator)
            for size in (lead, later)
        )
        got, added = row_keys(torch.Size(shape), Keys(Noise(0, 0), groups, draws), sampling)
        assert got.shape == shape and got.dtype == torch.int64
        ids = [reference.group_of_row(row, shape, sampling, groups) for row in rows]
        assert got.flatten().tolist() == ids
        assert (added is None) == (draws is None)
        if draws is not None:
            share = len(rows) // max(1, draws.numel())  # rows that follow each other
            numbers = draws.flatten().tolist()
            assert added.flatten().tolist() == [numbers[row // share] for row in rows]
