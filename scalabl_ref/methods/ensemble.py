"""Deep ensembles: predictions averaged over adapters that were trained apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.adapter import adapters
from ..core.objective import class_logits
from ..support.errors import InputError
from ..support.files import make_folder
from ..support.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama

State = dict[str, Tensor]  # adapter parameters by name, as `adapter_state` gives them
FILE = "ensemble.safetensors"


@dataclass
class Ensemble:
    """Members trained from different seeds (Lakshminarayanan et al. 2017).

    members: the adapters' state of each. All members predict, whatever `samples` is, except for
    samples = 0: then only the first member does.
    """

    members: list[State]

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/ensemble.safetensors. Raises InputError if it cannot be written."""
        make_folder(folder)
        tensors = [(f"{i}.{name}", v) for i, m in enumerate(self.members) for name, v in m.items()]
        save_tensors(Path(folder) / FILE, tensors)

    @classmethod
    def load(cls, folder: Path | str) -> Ensemble:
        """Read the file of `save`. Raises InputError if it is missing, broken or another's."""
        path = Path(folder) / FILE
        members: dict[str, State] = {}
        for name, value in load_tensors(path)[0].items():
            number, _, rest = name.partition(".")
            members.setdefault(number, {})[rest] = value
        if set(members) != {str(i) for i in range(len(members))} or not members:
            raise InputError(f"{path}: not written by this program: members {sorted(members)}")
        return cls([members[str(i)] for i in range(len(members))])

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        chosen = self.members if samples else self.members[:1]
        return torch.stack([mean_log_probs(model, batch, state) for state in chosen])


@torch.no_grad()
def mean_log_probs(model: Llama, batch: Batch, state: State) -> Tensor:
    """Log-probabilities (B, C) float64 of the mean model with these adapters."""
    with _weights(model, state):
        return torch.log_softmax(class_logits(model, batch, None).double(), dim=-1)


@contextmanager
@torch.no_grad()
def _weights(model: Llama, state: State) -> Iterator[None]:
    """Give the model these adapters until the block ends."""
    parameters = {
        f"{name}.{key}": parameter
        for name, adapter in adapters(model).items()
        for key, parameter in adapter.named_parameters()
    }
    for name in state.keys() ^ parameters.keys():
        raise InputError(f"the model and the posterior do not both have the tensor {name}")
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = state[name].to(parameter)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]
