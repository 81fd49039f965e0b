"""Deep ensembles: predictions averaged over separately trained adapters, or over their draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.adapter import adapters, random_adapters
from ..core.noise import Noise
from ..core.objective import class_logits
from ..support.errors import InputError
from ..support.files import make_folder
from ..support.tensors import load_tensors, save_tensors
from .posterior import POSTERIORS, Posterior, load_posterior

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama

State = dict[str, Tensor]  # adapter parameters by name, as `adapter_state` gives them
FILE = "ensemble.safetensors"


@dataclass
class Ensemble:
    """Members trained from different seeds (Lakshminarayanan et al. 2017), of equal weights.

    members: the state of each member's adapters, for a model with adapters of the same kind.
    posteriors: one for each member, all of one class; or none, and random adapters then draw.

    Each of M members gets the same number of the `samples` draws, rounded up: draw i is the draw
    Noise(seed, i) of member i mod M. Members without draws answer once each, whatever `samples` is.
    With samples = 0, every member answers once, without noise.
    """

    members: list[State]
    posteriors: Sequence[Posterior] = ()

    def __post_init__(self) -> None:
        kinds = {type(posterior) for posterior in self.posteriors}
        if len(kinds) > 1 or len(self.posteriors) not in (0, len(self.members)):
            raise InputError("an ensemble needs posteriors of one kind for all members, or none")

    def draws(self, model: Llama, samples: int) -> int:
        """Number of draws that `samples` become; 0 if the members draw nothing."""
        if not self.posteriors and not random_adapters(model):
            return 0
        return len(self.members) * -(-samples // len(self.members))

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/ensemble.safetensors, and posteriors into FOLDER/member-0 and so on.

        Raises InputError if they cannot be written.
        """
        make_folder(folder)
        for i, posterior in enumerate(self.posteriors):
            posterior.save(Path(folder) / f"member-{i}")
        tensors = [(f"{i}.{name}", v) for i, m in enumerate(self.members) for name, v in m.items()]
        names = {kind: name for name, kind in POSTERIORS.items()}
        kind = {"posterior": names[type(self.posteriors[0])]} if self.posteriors else {}
        save_tensors(Path(folder) / FILE, tensors, kind)

    @classmethod
    def load(cls, folder: Path | str) -> Ensemble:
        """Read the files of `save`. Raises InputError if one is missing, broken or another's."""
        path = Path(folder) / FILE
        tensors, metadata = load_tensors(path)
        members: dict[str, State] = {}
        for name, value in tensors.items():
            number, _, rest = name.partition(".")
            members.setdefault(number, {})[rest] = value
        if set(members) != {str(i) for i in range(len(members))} or not members:
            raise InputError(f"{path}: not written by this program: members {sorted(members)}")
        each = [load_posterior(path.parent / f"member-{i}", metadata) for i in range(len(members))]
        posteriors = [posterior for posterior in each if posterior is not None]
        return cls([members[str(i)] for i in range(len(members))], posteriors)

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        count, total = len(self.members), self.draws(model, samples)
        found = []  # of each member, (draws, B, C)
        for m, state in enumerate(self.members):
            with _weights(model, state):
                if self.posteriors:
                    each = self.posteriors[m].log_probs(model, batch, total, seed)
                    found.append(each[m::count] if total else each)
                else:
                    noises = [Noise(seed, i) for i in range(m, total, count)]
                    found.append(own_log_probs(model, batch, noises))
        return torch.stack(found, 1).flatten(0, 1)


def mean_log_probs(model: Llama, batch: Batch, state: State) -> Tensor:
    """Log-probabilities (B, C) float64 of the mean model with these adapters."""
    with _weights(model, state):
        return own_log_probs(model, batch, [])[0]


@torch.no_grad()
def own_log_probs(model: Llama, batch: Batch, noises: Sequence[Noise | None]) -> Tensor:
    """Log-probabilities (S, B, C) float64 of the model's own draws; of its mean for no noises."""
    logits = [class_logits(model, batch, noise) for noise in noises or [None]]
    return torch.stack(logits).double().log_softmax(-1)


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
