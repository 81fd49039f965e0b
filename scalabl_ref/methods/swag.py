"""SWAG: predictions averaged over a Gaussian through the iterates of the last training steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.adapter import adapter_state
from ..core.noise import Noise
from ..support.errors import InputError
from ..support.files import make_folder
from ..support.tensors import load_tensors, save_tensors
from .ensemble import State, mean_log_probs

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama

FILE = "swag.safetensors"
FIRST_SWAG_LAYER = 2**31  # layer ids of SWAG's noise: parameter i has this one plus i


@dataclass
class Swag:
    """SWAG-diagonal (Maddox et al. 2019): independent Gaussians, one for each adapter weight.

    `collect`, called after a training step, adds the adapters' state. mean and square are running
    averages of `count` states and of their squares, by name. They are in float64, because the
    variance is a small difference of the two. All examples share a draw.
    """

    count: int = 0
    mean: State = field(default_factory=dict)
    square: State = field(default_factory=dict)

    @torch.no_grad()
    def collect(self, model: Llama) -> None:
        """Add the state of the model's adapters to the averages."""
        self.count += 1
        for name, value in adapter_state(model).items():
            value = value.double()
            for kept, new in ((self.mean, value), (self.square, value.square())):
                old = kept.get(name, torch.zeros_like(new))
                kept[name] = old + (new - old) / self.count

    def state(self) -> State:
        """The averages and their count by name, for a checkpoint of the training."""
        parts = {"mean": self.mean, "square": self.square}
        averages = {f"{key}.{name}": v for key, part in parts.items() for name, v in part.items()}
        return {"count": torch.tensor(self.count), **averages}

    def restore(self, state: State) -> None:
        """Go on from the result of `state`."""
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
        save_tensors(Path(folder) / FILE, averages.items(), {"count": str(count.item())})

    @classmethod
    def load(cls, folder: Path | str) -> Swag:
        """Read the file of `save`. Raises InputError if it is missing, broken or another's."""
        path = Path(folder) / FILE
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
        for index, name in enumerate(sorted(self.mean)):  # a file has another order than a model
            mean = self.mean[name]
            sd = (self.square[name] - mean.square()).clamp(min=0).sqrt()
            eps = noise.normal(FIRST_SWAG_LAYER + index, 1, mean.numel()).view(mean.shape)
            out[name] = mean + sd * eps.to(mean)
        return out

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        if not self.count:
            raise InputError("SWAG has collected no iterate")
        states = [self.draw(Noise(seed, i)) for i in range(samples)] or [self.mean]
        return torch.stack([mean_log_probs(model, batch, state) for state in states])
