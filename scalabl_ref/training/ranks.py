"""Ranks: the processes that torchrun starts, which share the work of one run.

Without torchrun there is one rank, and nothing here communicates. Noise is keyed by example and
step and the order of the data by the step, so a share of the work is the same work wherever it is
done: ranks change which process adds which numbers up, and with that the rounding alone.
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
TIMEOUT = 600.0  # seconds that a rank waits for the others, unless told otherwise
_timeout = timedelta(seconds=TIMEOUT)


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _are_joined() else 1


def rank() -> int:
    """Which of them this process is; 0 writes and prints."""
    return dist.get_rank() if _are_joined() else 0


def _are_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def own_device(device: torch.device) -> torch.device:
    """A plain "cuda" as this rank's own GPU of its machine; any other device as it is."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def joined(device: torch.device, timeout: float = TIMEOUT) -> Iterator[None]:
    """Join torchrun's other ranks for as long as the block lasts; without torchrun, do nothing.

    Tensors on the CPU go through gloo, those on a GPU through NCCL. timeout: seconds that a rank
    waits for the others in any exchange. Raises RankLost in the others, at once, when a rank ends
    before the block does, and after `timeout` when one does not answer; InputError for a timeout
    that is none.
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

    Every rank gets equally many, since all must take part in every exchange of a sharded model:
    where there are too few, the first of all stands in at the end, and does not count.
    """
    part = list(items[rank() :: world()])
    own = len(part)
    if own < math.ceil(len(items) / world()):
        part.append(items[0])
    return part, own


def sum_(values: Tensor) -> None:
    """Add the ranks' `values` up, in place, on all of them."""
    if world() > 1:
        dist.all_reduce(values)


def as_first(values: Tensor) -> None:
    """Make `values`, in place, those of the first rank."""
    if world() > 1:
        dist.broadcast(values, 0)


def add_up(parameters: Sequence[Parameter], value: float) -> float:
    """Add the ranks' gradients of `parameters` up, in place, and their `value`, which it returns.

    One buffer of float64 in one exchange; its sums are rounded to the gradients' dtype once.
    """
    if world() == 1:
        return value
    gradients = [p.grad for p in parameters if p.grad is not None]
    first = torch.tensor([value], dtype=torch.float64, device=gradients[0].device)
    flat = torch.cat([first, *(g.double().flatten() for g in gradients)])
    sum_(flat)
    total, *sums = flat.split([1, *(g.numel() for g in gradients)])
    for gradient, part in zip(gradients, sums, strict=True):
        gradient.copy_(part.view_as(gradient))
    return total.item()


def largest(number: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest of the ranks' numbers, which `group` exchange, by default as everything else."""
    if world() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return int(value)


def new_group() -> dist.ProcessGroup | None:
    """All ranks once more, for the exchanges of another thread; None for one rank."""
    return dist.new_group(backend="gloo", timeout=_timeout) if world() > 1 else None


# --- a base in pieces ----------------------------------------------------------------------------


def need_ranks() -> None:
    """Raise InputError without ranks over which a base could be spread."""
    if not _are_joined():
        raise InputError(
            "a base is spread, or offloaded, over ranks: start them with torchrun, one with "
            "torchrun --nproc-per-node 1"
        )


def shard(model: Llama, device: torch.device | None = None, offload: bool = False) -> None:
    """Keep one part of N of every weight of the frozen base on each rank (PyTorch's FSDP2).

    Call it when adapters and head are what they will be. Whole, plain tensors they are only while
    they are needed: a block's while it is computed, forwards and backwards, an untied embedding's
    while it is read, the head's and the last norm's from the first block on. From then on all ranks
    must make the same passes through the model. The adapters stay whole on all ranks.

    device: where it computes, if not where it is; weights go there unit by unit, and a base in the
    CPU's memory need never be whole on a GPU. offload: the parts stay in the CPU's memory, and a
    unit goes over when it is needed.

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
    """A weight of a base that may be sharded; if it is, all ranks must ask for it."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
