"""Deep ensembles and SWAG: predictions averaged over several settings of the adapters' weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.adapter import adapters
from ..core.noise import Noise
from ..core.objective import class_logits
from ..support.errors import InputError
from ..support.files import make_folder
from ..support.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama

State = dict[str, Tensor]  # adapter parameters by name, as `train.adapter_state` gives them
ENSEMBLE_FILE = "ensemble.safetensors"
SWAG_FILE = "swag.safetensors"
FIRST_SWAG_LAYER = 2**31  # layer ids of SWAG's noise: parameter i has this one plus i


@dataclass
class Ensemble:
    """Members trained apart, from different seeds (Lakshminarayanan et al. 2017).

    members: the adapters' state of each. All of them predict, whatever `samples` says, but that
    samples = 0 is the first alone.
    """

    members: list[State]

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/ensemble.safetensors. Raises InputError if it cannot be written."""
        make_folder(folder)
        tensors = [(f"{i}.{name}", v) for i, m in enumerate(self.members) for name, v in m.items()]
        save_tensors(Path(folder) / ENSEMBLE_FILE, tensors)

    @classmethod
    def load(cls, folder: Path | str) -> Ensemble:
        """What `save` wrote. Raises InputError if the file is missing, broken or another's."""
        path = Path(folder) / ENSEMBLE_FILE
        members: dict[str, State] = {}
        for name, value in load_tensors(path)[0].items():
            number, _, rest = name.partition(".")
            members.setdefault(number, {})[rest] = value
        if set(members) != {str(i) for i in range(len(members))} or not members:
            raise InputError(f"{path}: not written by this program: members {sorted(members)}")
        return cls([members[str(i)] for i in range(len(members))])

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        chosen = self.members if samples else self.members[:1]
        return torch.stack([_mean_log_probs(model, batch, state) for state in chosen])


@dataclass
class Swag:
    """SWAG-diagonal (Maddox et al. 2019): a Gaussian through the iterates of the last steps.

    `collect` after a step adds the adapters' state as it is; count, mean and square are running
    averages, by name, in float64: the width is what a difference of squares leaves. A draw is one
    setting of all weights, shared by all examples.
    """

    count: int = 0
    mean: State = field(default_factory=dict)
    square: State = field(default_factory=dict)

    def __post_init__(self) -> None:  # they may come of a file that has them in float32
        self.mean = {name: value.double() for name, value in self.mean.items()}
        self.square = {name: value.double() for name, value in self.square.items()}

    @torch.no_grad()
    def collect(self, model: Llama) -> None:
        self.count += 1
        for name, value in _state(model).items():
            value = value.double()
            for kept, new in ((self.mean, value), (self.square, value.square())):
                old = kept.get(name, torch.zeros_like(new))
                kept[name] = old + (new - old) / self.count

    def state(self) -> State:
        """The averages and their count by name, for a training's checkpoint."""
        parts = {"mean": self.mean, "square": self.square}
        averages = {f"{key}.{name}": v for key, part in parts.items() for name, v in part.items()}
        return {"count": torch.tensor(self.count), **averages}

    def restore(self, state: State) -> None:
        """Go on from what `state` returned."""
        for key, part in (("mean", self.mean), ("square", self.square)):
            part.clear()
            start = f"{key}."
            part.update((n.removeprefix(start), v) for n, v in state.items() if n.startswith(start))
        self.count = int(state["count"])

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/swag.safetensors. Raises InputError if it cannot be written."""
        make_folder(folder)
        averages = self.state()
        count = averages.pop("count")
        save_tensors(Path(folder) / SWAG_FILE, averages.items(), {"count": str(count.item())})

    @classmethod
    def load(cls, folder: Path | str) -> Swag:
        """What `save` wrote. Raises InputError if the file is missing, broken or another's."""
        path = Path(folder) / SWAG_FILE
        tensors, metadata = load_tensors(path)
        parts: dict[str, State] = {"mean": {}, "square": {}}
        try:
            for name, value in tensors.items():
                key, _, rest = name.partition(".")
                parts[key][rest] = value
            return cls(int(metadata["count"]), **parts)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: not written by this program: {error}") from None

    def draw(self, noise: Noise) -> State:
        """One setting of the weights: mean + sd * eps."""
        out = {}
        for index, name in enumerate(sorted(self.mean)):  # of a file and of a model alike
            mean = self.mean[name]
            sd = (self.square[name] - mean.square()).clamp(min=0).sqrt()
            eps = noise.normal(FIRST_SWAG_LAYER + index, 1, mean.numel()).view(mean.shape)
            out[name] = mean + sd * eps.to(mean)
        return out

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        if not self.count:
            raise InputError("SWAG has collected no iterate")
        states = [self.draw(Noise(seed, i)) for i in range(samples)] or [self.mean]
        return torch.stack([_mean_log_probs(model, batch, state) for state in states])


def _state(model: Llama) -> State:
    return {
        f"{name}.{key}": parameter.detach().clone()
        for name, adapter in adapters(model).items()
        for key, parameter in adapter.named_parameters()
    }


def _mean_log_probs(model: Llama, batch: Batch, state: State) -> Tensor:
    with _weights(model, state):
        return torch.log_softmax(class_logits(model, batch, None).double(), dim=-1)


@contextmanager
@torch.no_grad()
def _weights(model: Llama, state: State) -> Iterator[None]:
    """The model with these adapters for as long as the block lasts."""
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
