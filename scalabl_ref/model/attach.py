"""The frozen linear layer that can carry an adapter, and attaching adapters to a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, adapters
from ..core.config import COVARIANCES, TARGETS, AdapterConfig
from ..core.noise import Keys
from ..support.errors import InputError

Device = torch.device | str | None


class Linear(nn.Module):
    """A frozen linear layer, y = W x + bias, that can carry an adapter.

    weight (d_out, d_in), bias (d_out,) or None.
    """

    adapter: Adapter | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device)) if bias else None
        self.d_in, self.d_out, self.adapter = d_in, d_out, None

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # hook, see fast/
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor, keys: Keys | None = None) -> Tensor:
        """x (..., d_in) -> (..., d_out); `keys=None` is the mean model."""
        if self.adapter is None:
            return self.product(x, self.weight, self.bias)
        return self.adapter(x, self.weight, self.bias, keys)


def add_adapters(model: nn.Module, config: AdapterConfig, seed: int = 0) -> nn.Module:
    """Freeze `model` and attach an adapter to each `Linear` that `config.targets` names.

    A layer's noise id is 8 * block + (position of its name in TARGETS), with lm_head in block 0:
    it depends on the layer's place, not on which other layers are adapted. Returns the model.

    Raises InputError if the model has adapters already, if no layer has a target's name, or if
    the rank is larger than a dimension of a layer (naming the layer).

    Example: B starts at 0, so that the model computes the same as before.

    >>> import torch
    >>> from scalabl_ref import AdapterConfig, Llama, LlamaConfig, Noise, add_adapters
    >>> tokens, model = torch.tensor([[3, 1, 4]]), Llama(LlamaConfig(32, 8, 16, 1, 2, 1, 4))
    >>> before = model.init_random_(seed=0)(tokens)
    >>> model = add_adapters(model, AdapterConfig(rank=2))
    >>> torch.equal(model(tokens, noise=Noise(seed=0, draw=0)), before)
    True
    """
    if adapters(model):
        raise InputError("the model already has adapters")
    model.requires_grad_(False)
    found = set()
    for name, module in model.named_modules():
        target = name.rpartition(".")[2]
        if isinstance(module, Linear) and target in config.targets:
            size = module.d_out, module.d_in
            layer, head = layer_id(name, target), target == "lm_head"
            module.adapter = new_adapter(
                name, size, config, layer, seed, head, module.weight.device
            )
            found.add(target)
    missing = [target for target in config.targets if target not in found]
    if missing:
        raise InputError(f"the model has no layer named {' or '.join(missing)}")
    return model


def new_adapter(
    name: str,
    size: tuple[int, int],
    config: AdapterConfig,
    layer: int,
    seed: int,
    head: bool,
    device: torch.device,
) -> Adapter:
    """The adapter of a layer called `name`, whose weight has the size (d_out, d_in).

    layer: its noise id. head: whether it is the output layer, which may have fewer rows than the
    rank, once it is cut down to class tokens. Raises InputError if the rank is too large.
    """
    d_out, d_in = size
    if config.rank > d_in or (config.rank > d_out and not head):
        raise InputError(f"rank {config.rank} is larger than a dimension of {name} {d_out, d_in}")
    return COVARIANCES[config.covariance][config.method](d_in, d_out, config, layer, seed, device)


def layer_id(name: str, target: str) -> int:
    """Noise id of the layer `name`, whose last part is `target`; see `add_adapters`."""
    block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return len(TARGETS) * block + TARGETS.index(target)
