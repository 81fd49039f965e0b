"""Activations that wait in the CPU's memory for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class KeptOnCpu(torch.autograd.graph.save_on_cpu):
    """PyTorch's `save_on_cpu`: tensors that autograd saves in this context wait on the CPU, in
    pinned memory if `device` is a GPU.

    There are three differences. Weights stay where they are. A tensor that several operations save
    is copied once. A tensor comes back with its strides, because kernels may need aligned rows, or
    read one row many times.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(pin_memory=device.type == "cuda")
        self.copy, self.fetch = self.pack_hook, self.unpack_hook
        self.pack_hook, self.unpack_hook = self._pack, self._unpack
        self.copied: dict[tuple[Any, ...], tuple[StorageWeakRef, Any]] = {}  # by their source

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.copied.clear()

    def _pack(self, tensor: Tensor) -> Any:
        if _is_weight(tensor):
            return tensor
        shape, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if not tensor.numel() or span > 2 * tensor.numel():  # a small part of its memory
            return self.copy(tensor), None, None
        storage = StorageWeakRef(tensor.untyped_storage())
        key = storage.cdata, offset, span, tensor.dtype, tensor._version
        if key not in self.copied or self.copied[key][0].expired():
            self.copied[key] = storage, self.copy(tensor.detach().as_strided((span,), (1,)))
        return self.copied[key][1], shape, stride

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        copy, shape, stride = packed
        return self.fetch(copy) if shape is None else self.fetch(copy).as_strided(shape, stride)


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
