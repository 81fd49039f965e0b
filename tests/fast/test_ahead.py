"""Large blocks are asked for one ahead, forward and backward, and by their whole pages."""

from __future__ import annotations

import mmap

import pytest
import torch

from scalabl_ref import Llama, Noise
from scalabl_ref.core.objective import class_logits
from scalabl_ref.fast import ahead

from ..models import tiny_batch, tiny_folder, tiny_model


@pytest.fixture
def asked(monkeypatch):
    """A function that gives the blocks asked for since its last call, on a machine of 1 byte."""
    blocks: list = []
    monkeypatch.setattr(ahead, "memory", lambda: 1)
    monkeypatch.setattr(ahead, "will_need", blocks.append)

    def found() -> list:
        ahead.reader().submit(int).result()  # the requests before this one are done
        taken = blocks.copy()
        blocks.clear()
        return taken

    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_are_asked_for_in_the_order_of_their_use(asked, recompute):
    model = tiny_model(layers=4)
    model.recompute = recompute
    loss = class_logits(model, tiny_batch(), Noise(0, 0)).sum()
    assert asked() == list(model.layers)[1:]
    loss.backward()
    assert asked() == list(model.layers)[2::-1]
    with torch.no_grad():
        class_logits(model, tiny_batch(), Noise(0, 0))
    assert asked() == list(model.layers)[1:]


def test_a_small_model_is_not_asked_for(asked, monkeypatch):
    model = tiny_model(layers=4)
    size = sum(p.nbytes for p in model.layers.parameters())
    for memory, large in ((2 * size + 1, False), (2 * size - 1, True)):
        monkeypatch.setattr(ahead, "memory", lambda memory=memory: memory)
        class_logits(model, tiny_batch(), None)
        assert bool(asked()) == large
    monkeypatch.undo()
    assert size < ahead.SHARE * ahead.memory()


def test_the_system_is_told_all_pages_of_mapped_weights(tmp_path, monkeypatch):
    model = Llama.from_pretrained(tiny_folder(tmp_path))
    advise, told = ahead.advise(), []

    def tell(address, size, advice):
        told.append((address.value, address.value + size.value))
        return failed.append(advise(address, size, advice))

    failed: list[int] = []
    monkeypatch.setattr(ahead, "advise", lambda: tell)
    block = model.layers[0]
    ahead.will_need(block)
    assert failed == [0] * len(list(block.parameters())), "madvise refused an address"
    for p in block.parameters():
        inside = [a <= p.data_ptr() and p.data_ptr() + p.nbytes <= b for a, b in told]
        assert any(inside) and all(a % mmap.PAGESIZE == 0 for a, _ in told)
