"""Weights that are mapped from files and larger than the memory: read one block ahead.

A mapped page is read when it is first used, and the computation waits. Here a thread asks the
system for the pages of the next block while a block computes, forward and in the backward pass.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..model.llama import Llama
from .ops import PLAIN_TYPES

SHARE = 0.5  # of the machine's memory: a smaller model stays in the page cache


class Ahead:
    """Reads the blocks of one pass ahead if they are large, else does nothing."""

    def __init__(self, model: Llama) -> None:
        self.blocks: list[nn.Module] = []
        if not torch.compiler.is_compiling() and is_large(model):
            self.blocks = list(model.layers)

    def ask(self, i: int) -> None:
        """Have the pages of block i read."""
        if 0 <= i < len(self.blocks):
            with suppress(RuntimeError):  # the interpreter ends
                reader().submit(will_need, self.blocks[i])

    def ask_in_backward(self, x: Tensor, i: int) -> None:
        """The same as soon as the gradient of x is known."""
        if self.blocks and x.requires_grad:
            x.register_hook(lambda grad: self.ask(i))


def is_large(model: Llama) -> bool:
    """Whether the blocks, were they all like the first, have more than SHARE of the memory."""
    on_cpu = sum(p.nbytes for p in mapped(model.layers[0]))
    return on_cpu * len(model.layers) > SHARE * memory()


@cache
def memory() -> float:
    """Bytes of the machine; infinite where the system does not tell, or has no `madvise`."""
    try:
        advise()
        return float(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE)
    except (AttributeError, ValueError, OSError):
        return float("inf")


def will_need(block: nn.Module) -> None:
    """Tell the system that the pages of the block's weights will be read soon."""
    for p in mapped(block):
        start = p.data_ptr() - p.data_ptr() % mmap.PAGESIZE
        size = ctypes.c_size_t(p.data_ptr() + p.nbytes - start)
        advise()(ctypes.c_void_p(start), size, mmap.MADV_WILLNEED)


def mapped(block: nn.Module) -> list[Tensor]:
    """The block's parameters that can be mapped from a file."""
    return [p for p in block.parameters() if p.is_cpu and type(p) in PLAIN_TYPES]


@cache
def advise() -> Any:
    return ctypes.CDLL(None).madvise


@cache
def reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "scalabl-ahead")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reader.cache_clear)  # the thread is not in the child
