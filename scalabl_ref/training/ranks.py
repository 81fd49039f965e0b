"""Ranks: the processes that torchrun starts. They distribute the work of one run.

Without torchrun there is one rank, and nothing here communicates. Noise depends on the example and
the step, and the order of the data on the step. So the number of ranks changes only which process
adds which numbers, and with it the rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from ..core.adapter import adapters
from ..support.errors import InputError, RankLost

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from ..model.llama import Llama

Item = TypeVar("Item")
TIMEOUT = 600.0  # seconds that a rank waits for the others by default
_timeout = timedelta(seconds=TIMEOUT)


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _are_joined() else 1


def rank() -> int:
    """The number of this process among the ranks, from 0; rank 0 writes and prints."""
    return dist.get_rank() if _are_joined() else 0


def _are_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def own_device(device: torch.device) -> torch.device:
    """The device of this rank: for "cuda" without a number, its own GPU of the machine."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def joined(device: torch.device, timeout: float = TIMEOUT) -> Iterator[None]:
    """Join torchrun's other ranks for as long as the block lasts; without torchrun, do nothing.

    Tensors on the CPU go through gloo, those on a GPU through NCCL. timeout: seconds that a rank
    waits for the others in any exchange. Raises RankLost in the other ranks at once if a rank ends
    before the block does, and after `timeout` if a rank does not answer. Raises InputError for an
    invalid timeout.
    """
    if not 0 < timeout <= 1e6:
        raise InputError(f"timeout must be above 0 s and at most 1e6 s, and is {timeout}")
    if "RANK" not in os.environ or _are_joined():
        yield
        return
    global _timeout
    _timeout, backend = timedelta(seconds=timeout), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=_timeout)
        yield
        dist.barrier()  # nobody leaves while another may still need to be heard
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RankLost(f"another rank ended, or did not answer within {timeout:g} s") from error
    dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        dist.barrier()


def share(items: Sequence[Item]) -> tuple[list[Item], int]:
    """This rank's part of `items`, and how many of it count.

    Every rank gets the same number of items, because all ranks must take part in every exchange of
    a sharded model. A rank with one item too few gets the first item as well, which does not count.
    """
    part = list(items[rank() :: world()])
    own = len(part)
    if own < math.ceil(len(items) / world()):
        part.append(items[0])
    return part, own


def sum_(values: Tensor) -> None:
    """Replace `values` on every rank by their sum over the ranks."""
    if world() > 1:
        dist.all_reduce(values)


def as_first(values: Tensor) -> None:
    """Replace `values` on every rank by those of rank 0."""
    if world() > 1:
        dist.broadcast(values, 0)


def add_up(parameters: Sequence[Parameter], *values: float) -> list[float]:
    """Replace the gradients of `parameters` by sums over the ranks; returns the sums of `values`.

    All go in one exchange of a float64 buffer; the sums are rounded to the gradients' dtype once.
    """
    if world() == 1:
        return list(values)
    gradients = [p.grad for p in parameters if p.grad is not None]
    first = torch.tensor(values, dtype=torch.float64, device=gradients[0].device)
    flat = torch.cat([first, *(g.double().flatten() for g in gradients)])
    sum_(flat)
    totals, *sums = flat.split([len(values), *(g.numel() for g in gradients)])
    for gradient, part in zip(gradients, sums, strict=True):
        gradient.copy_(part.view_as(gradient))
    return totals.tolist()


def largest(number: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest of the ranks' numbers. group: exchanges them; None is the usual group."""
    if world() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return int(value)


def new_group() -> dist.ProcessGroup | None:
    """A group of all ranks, for the exchanges of another thread; None if there is one rank."""
    return dist.new_group(backend="gloo", timeout=_timeout) if world() > 1 else None


# --- a base in pieces ----------------------------------------------------------------------------


def need_ranks() -> None:
    """Raise InputError if torchrun did not start this process."""
    if not _are_joined():
        raise InputError(
            "sharding and offloading weights need ranks: start them with torchrun, a single one "
            "with torchrun --nproc-per-node 1"
        )


def shard(model: Llama, device: torch.device | None = None, offload: bool = False) -> None:
    """Keep on each of N ranks an N-th of every weight of the frozen base (PyTorch's FSDP2).

    Call it after the adapters are added and the head is cut. Weights are gathered while they are
    needed: a block's weights during its forward and backward pass, an untied embedding while it is
    read, the head and the last norm from the first block on. After the call all ranks must make the
    same passes through the model. The adapters stay whole on all ranks.

    device: where the model computes; None is where it is. Weights go there unit by unit, so that a
    base in the CPU's memory need never be whole on a GPU. offload: a unit stays in the CPU's memory
    until it is needed.

    Raises InputError without ranks, or if this PyTorch cannot do it.
    """
    need_ranks()
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    except ImportError:
        raise InputError("sharding needs PyTorch 2.7 or newer") from None
    device = device or model.device
    whole = {p for a in adapters(model).values() for p in a.to(device).parameters()}
    mesh = init_device_mesh(device.type, (world(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    parts = [*model.layers, *([] if model.tied else [model.embed_tokens]), model]
    for part in parts:
        fully_shard(part, mesh=mesh, ignored_params=whole, offload_policy=policy)
    if not model.tied:
        # Gathering ahead would otherwise end the backward pass with the embedding, for nothing.
        cast(Any, model.embed_tokens).set_unshard_in_backward(False)
    model.computes_on = device


def sharded(model: Llama) -> bool:
    """Whether `shard` was called."""
    return hasattr(model, "reshard")  # which makes it an FSDPModule as well


def whole(weight: Tensor) -> Tensor:
    """A weight of a base that may be sharded, gathered; then all ranks must call this."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
