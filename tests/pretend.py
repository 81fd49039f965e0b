"""A device that is not there: tensors that say they are on it, and compute on the CPU.

    pytest tests/test_device.py --device pretend

An operation on tensors of both devices fails as it would between a GPU and the CPU: "tensors on
pretend:0 and on the CPU". So a tensor that code forgets on the CPU is found without a GPU. The
device is of PyTorch's type privateuse1, so no code takes it for CUDA: the native core is not asked,
and the plain operations run. Numbers are those of the CPU. `enter` is for a whole process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

# Operations whose tensors may be on both devices, as with CUDA: copies, and indices on the CPU.
EITHER = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")


class Pretended(Tensor):
    """On the device; `inner` has the numbers, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("pretend", 0),
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Pretended):
            raise RuntimeError("data on the CPU of a tensor on pretend:0")
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"pretended {self.inner}"


class Mode(TorchDispatchMode):
    """Also for operations without a tensor of the device, such as those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU; its results are on the device that PyTorch would give them."""
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, Pretended)]
    others = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if ours and others and name not in EITHER:
        raise RuntimeError(f"{name}: tensors on pretend:0 and on the CPU")
    if name == "copy_":
        inner(args[0]).copy_(*map(inner, args[1:]))
        return args[0]
    on = bool(ours)
    if ours and name.startswith("index") and not isinstance(args[0], Pretended):
        raise RuntimeError(f"{name}: indices on pretend:0 of a tensor on the CPU")
    if kwargs.get("device") is not None:
        on = torch.device(kwargs["device"]).type == "pretend"
    result = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    known = {id(t.inner): t for t in ours}  # an operation in place returns what it was given

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or not on:
            return value
        return known[id(value)] if id(value) in known else Pretended(value)

    return tree_map(outer, result)


def inner(value: Any) -> Any:
    if isinstance(value, Pretended):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


class Module(_DummyBackendModule):
    """What PyTorch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def enter() -> None:
    """Give this process the device, until it ends."""
    _setup_privateuseone_for_python_backend("pretend", Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps a tied weight
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) moves what it made
    Mode().__enter__()
