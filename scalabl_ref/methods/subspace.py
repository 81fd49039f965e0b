"""Laplace in the subspace: an exact Gaussian over all scales of a trained adapter, after training.

`to_points` writes each layer's update as B diag(s) A by a thin SVD. Let theta be the scales s of
all layers, D numbers, and theta* their trained values. Let J_n (C, D) be the derivatives of example
n's logits by theta at theta*, p_n its probabilities and y_n its label. Lambda = diag(lambda) has
the prior's precisions, one lambda for each group of scales (all scales, those of a kind of layer
such as q_proj, or those of a layer). Then

    H     = sum of J_n^T (diag(p_n) - p_n p_n^T) J_n                                            (24)
    Sigma = (H + Lambda)^-1,    theta ~ N(theta*, Sigma),    prior N(0, Lambda^-1)              (25)
    log evidence = sum of log p(y_n) - theta*^T Lambda theta* / 2
                   - log det(I + Lambda^-1/2 H Lambda^-1/2) / 2                                 (26)
    logits(x) ~ N(f(x), J(x) Sigma J(x)^T)                                                      (27)

H is dense: it has entries between layers. A constant added to all logits of an example changes
neither its probabilities nor H, because (diag(p) - p p^T) 1 = 0. So the derivatives of C - 1
differences of logits suffice. They take one forward pass and C - 1 backward passes for a whole
batch, because each row has its own offset, which is added to s. The weights need no gradient.

Earlier work: exact Laplace in a subnetwork (Daxberger et al., ICML 2021), inference in a subspace
(Izmailov et al., UAI 2019), the linearised predictive (Immer et al., AISTATS 2021), the evidence
(MacKay 1992), a posterior between fixed projections (B-LoRA-XS, arXiv 2502.12122).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import adapters
from ..core.noise import Noise
from ..core.objective import class_logits
from ..support.errors import InputError
from ..support.files import make_folder
from ..support.tensors import load_tensors, save_tensors
from .evidence import Groups, best_precision, groups_of, whitened
from .laplace import LOGITS_LAYER, draw_logits
from .point import PointAdapter

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama

Predicts = Literal["linear", "sampled"]
PREDICTS: tuple[Predicts, ...] = ("linear", "sampled")
SCALES_LAYER = LOGITS_LAYER - 1  # the noise id of the scales' draws, which no adapter has
FILE = "subspace.safetensors"


@dataclass(frozen=True)
class Curvature:
    """The curvature of a training set's log-likelihood by the scales, and that log-likelihood.

    sizes: number of scales of each adapted layer, in the model's order. scales: theta* (D,).
    H: (D, D). Both float64, on the CPU. log_likelihood: of the training set, in nats.
    """

    sizes: dict[str, int]
    scales: Tensor
    H: Tensor
    log_likelihood: float

    @classmethod
    def measure(
        cls,
        model: Llama,
        batches: Iterable[Batch],
        sum_: Callable[[Tensor], None] = lambda values: None,
    ) -> Curvature:
        """(24), from the training set, every example once, for a model of `PointAdapter`s.

        sum_: replaces a tensor by its sum over all processes, where each has a part of the batches.
        Raises InputError for other adapters (`to_points` converts them), for a model without
        scales, and without examples.
        """
        sizes, scales = layout(model)
        D = len(scales)
        H = torch.zeros(D, D, dtype=torch.float64, device=model.device)
        totals = torch.zeros(2, dtype=torch.float64)  # examples, log-likelihood
        for batch in batches:
            batch = batch.to(model.device)
            logits, J = jacobians(model, batch)
            log_p = logits.log_softmax(-1)
            p = log_p.exp()[..., None]  # (B, C, 1)
            root = (p.sqrt() * (J - (p * J).sum(1, keepdim=True))).flatten(0, 1)  # (B C, D)
            H += root.T @ root
            fit = float(log_p.gather(1, batch.labels[:, None]).sum())
            totals += torch.tensor([len(p), fit], dtype=torch.float64)
        sum_(H)
        sum_(totals)
        if not totals[0]:
            raise InputError("no examples to take the curvature from")
        return cls(sizes, scales, H.cpu(), float(totals[1]))

    def posterior(
        self,
        precision: float | Tensor | None = None,
        groups: Groups = "all",
        directions: int | None = None,
        predicts: Predicts = "linear",
    ) -> Subspace:
        """The posterior under a precision lambda, or one for each scale (D,).

        None takes those that maximise the evidence; groups then says which scales share one:
        "all", "target" (those of a kind of layer) or "layer". directions: number of eigenvectors of
        Lambda^-1/2 H Lambda^-1/2 to keep, those of the largest eigenvalues; the other directions
        keep the prior. None keeps all. predicts: see `Subspace`. Raises InputError for a wrong
        argument, or if no precision maximises the evidence.
        """
        D = len(self.scales)
        directions = D if directions is None else directions
        if directions < 1:
            raise InputError(f"directions must be at least 1, not {directions}")
        if precision is None:
            precisions = best_precision(self.H, self.scales, *groups_of(self.sizes, groups))
        else:
            precisions = torch.as_tensor(precision, dtype=torch.float64).expand(D).contiguous()
        if not (precisions > 0).all():
            raise InputError(f"the prior's precision must be positive, not {precision}")
        values, vectors = torch.linalg.eigh(whitened(self.H, precisions))
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :directions].contiguous()
        return Subspace(
            self.sizes, self.scales, precisions, values, vectors, self.log_likelihood, predicts
        )


@dataclass(frozen=True)
class Subspace:
    """The posterior of a run; a `methods.Posterior`. All tensors are float64, on the CPU.

    sizes, scales, log_likelihood: as of `Curvature`. precision: lambda of each scale (D,).
    values: eigenvalues v of Lambda^-1/2 H Lambda^-1/2, (D,), the largest first. vectors: the first
    K eigenvectors U, (D, K). The covariance is R R^T with

        R = Lambda^-1/2 (I - U diag(1 - 1 / sqrt(1 + v)) U^T)

    which is (25) for K = D. For K < D the other directions keep the prior's variance.
    predicts: "linear" draws the linearised logits, (27), after one forward pass and C - 1 backward
    passes; "sampled" draws the scales, and each draw takes a forward pass.
    """

    sizes: dict[str, int]
    scales: Tensor
    precision: Tensor
    values: Tensor
    vectors: Tensor
    log_likelihood: float
    predicts: Predicts = "linear"

    def __post_init__(self) -> None:
        if self.predicts not in PREDICTS:
            raise InputError(f"predicts must be one of {', '.join(PREDICTS)}: {self.predicts!r}")

    @classmethod
    def fit(
        cls,
        model: Llama,
        batches: Iterable[Batch],
        precision: float | Tensor | None = None,
        groups: Groups = "all",
        directions: int | None = None,
        predicts: Predicts = "linear",
    ) -> Subspace:
        """The posterior of a model whose adapters are `PointAdapter`s, from its training set.

        See `Curvature.measure` for batches and `Curvature.posterior` for the rest.
        """
        curvature = Curvature.measure(model, batches)
        return curvature.posterior(precision, groups, directions, predicts)

    def scaled(self, factor: float) -> Subspace:
        """The same posterior with `factor` times every lambda."""
        return dataclasses.replace(
            self, precision=self.precision * factor, values=self.values / factor
        )

    def log_evidence(self) -> float:
        """(26), in nats, from all eigenvalues, whether their vectors are kept or not."""
        penalty = (self.precision * self.scales.square()).sum() + self.values.log1p().sum()
        return self.log_likelihood - float(penalty) / 2

    def spread(self, x: Tensor) -> Tensor:
        """x (..., D) times (I - U diag(1 - 1 / sqrt(1 + v)) U^T)."""
        U = self.vectors.to(x)
        lost = 1 - (1 + self.values[: U.shape[1]].to(x)).rsqrt()
        return x - (x @ U * lost) @ U.T

    def gaussian(self, model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean f (B, C) and factor J R (B, C, D) of the logits of (27), float64.

        Raises InputError if the posterior was made from another model.
        """
        self.check(model)
        mean, J = jacobians(model, batch)
        return mean, self.spread(J * self.precision.rsqrt().to(J))

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        """Log-probabilities of the classes under each draw, (S, B, C) float64.

        Draw i of an example is Noise(seed, i) with the layer LOGITS_LAYER ("linear") or
        SCALES_LAYER ("sampled"), keyed by `batch.ids`. samples = 0 gives the mean model, once.
        Raises InputError for negative `samples`, or for another model.
        """
        if samples < 0:
            raise InputError(f"samples must not be negative, and is {samples}")
        if samples == 0:
            self.check(model)
            with torch.no_grad():
                return class_logits(model, batch, None).double().log_softmax(-1)[None]
        if self.predicts == "linear":
            mean, factor = self.gaussian(model, batch)
            draws = draw_logits(mean, factor @ factor.mT, batch.ids, samples, seed)
        else:
            draws = torch.stack([self._pass(model, batch, Noise(seed, i)) for i in range(samples)])
        return draws.log_softmax(-1)

    @torch.no_grad()
    def _pass(self, model: Llama, batch: Batch, noise: Noise) -> Tensor:
        """Logits (B, C) float64, each example under its own draw of the scales."""
        self.check(model)
        eps = noise.normal(SCALES_LAYER, batch.ids, len(self.scales)).double()  # (B, D)
        moved = self.precision.rsqrt() * self.spread(eps)
        parts = moved.split(list(self.sizes.values()), 1)
        points, offsets = points_of(model).values(), []
        for point, part in zip(points, parts, strict=True):
            offset = torch.zeros(len(part), point.config.rank, dtype=part.dtype)
            offset[:, kept(point).cpu()] = part
            offsets.append(offset.to(model.device))
        with offset_by(list(points), offsets):
            return row_logits(model, batch).double()

    def check(self, model: Llama) -> None:
        """Raise InputError unless the posterior is of this model."""
        sizes, scales = layout(model)
        if sizes != self.sizes or not torch.allclose(scales, self.scales, rtol=1e-9, atol=0):
            raise InputError("the subspace posterior is of a model with other adapters")

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/subspace.safetensors. Raises InputError if it cannot be written."""
        make_folder(folder)
        tensors = ((name, getattr(self, name)) for name in TENSORS)
        facts = {
            "sizes": json.dumps(self.sizes),
            "log_likelihood": repr(self.log_likelihood),
            "predicts": self.predicts,
        }
        save_tensors(Path(folder) / FILE, tensors, facts)

    @classmethod
    def load(cls, folder: Path | str) -> Subspace:
        """Read the file of `save`. Raises InputError if it is missing, broken or another's."""
        path = Path(folder) / FILE
        tensors, facts = load_tensors(path)
        try:
            sizes = {str(name): int(size) for name, size in json.loads(facts["sizes"]).items()}
            scales, precision, values, vectors = (tensors[name] for name in TENSORS)
            fit, predicts = float(facts["log_likelihood"]), facts["predicts"]
        except (KeyError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not written by this program: {error}") from None
        D = sum(sizes.values())
        if not scales.shape == precision.shape == values.shape == vectors.shape[:1] == (D,):
            raise InputError(f"{path}: shapes do not fit each other")
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise InputError(f"{path}: has NaN or infinite values")
        if not ((precision > 0).all() and (values >= 0).all()):
            raise InputError(f"{path}: has a precision or an eigenvalue that is not positive")
        return cls(sizes, scales, precision, values, vectors, fit, predicts)  # type: ignore[arg-type]


TENSORS = ("scales", "precision", "values", "vectors")


# --- the model ------------------------------------------------------------------------------------


def points_of(model: nn.Module) -> dict[str, PointAdapter]:
    """The model's adapters. Raises InputError unless all are `PointAdapter`s."""
    points = {n: a for n, a in adapters(model).items() if isinstance(a, PointAdapter)}
    if not points or len(points) != len(adapters(model)):
        raise InputError("the subspace posterior needs adapters of method point, see to_points")
    return points


def kept(point: PointAdapter) -> Tensor:
    """(r,) bool: the scales that change the function, those with a column of B that is not 0."""
    return (point.B != 0).any(0)


def layout(model: nn.Module) -> tuple[dict[str, int], Tensor]:
    """Number of scales of each layer, and all scales (D,) float64 on the CPU."""
    own = {
        name: point.log_s.detach().double().exp()[kept(point)].cpu()
        for name, point in points_of(model).items()
    }
    if not any(len(scales) for scales in own.values()):
        raise InputError("the adapters have no scales: all of their updates are 0")
    return {name: len(scales) for name, scales in own.items()}, torch.cat(list(own.values()))


@contextmanager
def offset_by(points: Sequence[PointAdapter], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Add offsets (B, r) to the scales of each example, and freeze the weights, within the block.

    Call the model by `row_logits`.
    """
    frozen = [p for point in points for p in point.parameters() if p.requires_grad]
    try:
        for point, offset in zip(points, offsets, strict=True):
            point.offset = offset
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for point in points:
            point.offset = None
        for parameter in frozen:
            parameter.requires_grad_(True)


def row_logits(model: Llama, batch: Batch) -> Tensor:
    """Logits (B, C) under the offsets of `offset_by`: example b takes row b of each."""
    places = torch.arange(len(batch.ids), device=model.device)
    # The adapters find a row's example by its noise key. They draw no noise.
    return class_logits(model, dataclasses.replace(batch, ids=places), Noise(0, 0))


def jacobians(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (B, C) of the mean model and their derivatives by theta, J (B, C, D), float64.

    J has the mean 0 over the classes: it is that of the logits less their mean. It comes from
    derivatives of differences to the last class, and does not depend on which class that is.
    """
    points = points_of(model)
    masks = [kept(point) for point in points.values()]
    offsets = [
        torch.zeros(
            len(batch.labels), len(mask), dtype=torch.float64, device=model.device,
            requires_grad=True,
        )
        for mask in masks
    ]  # fmt: skip
    with torch.enable_grad(), offset_by(list(points.values()), offsets):
        logits = row_logits(model, batch)
        rows = []
        for difference in (logits[:, :-1] - logits[:, -1:]).sum(0):
            found = torch.autograd.grad(difference, offsets, retain_graph=True)
            rows.append(torch.cat([g[:, m] for g, m in zip(found, masks, strict=True)], 1))
    last = torch.zeros(len(batch.labels), sum(int(m.sum()) for m in masks)).to(offsets[0])
    J = torch.stack([*rows, last], 1).detach()
    return logits.detach().double(), J - J.mean(1, keepdim=True)


def validated(
    posterior: Subspace, model: Llama, batches: Iterable[Batch], seed: int = 0, samples: int = 100
) -> Subspace:
    """The posterior with every lambda times one factor, the best for these examples.

    It has the lowest NLL of the linearised prediction by `samples` draws, among the factors
    10^(i / 8) from 1e-4 to 1e4. Raises InputError without examples, and if the best factor is the
    first or the last.
    """
    found = []
    for batch in batches:
        batch = batch.to(model.device)
        found.append((batch, *jacobians(model, batch)))
    if not found:
        raise InputError("no examples to choose the precision by")

    def nll(candidate: Subspace) -> float:
        total = 0.0
        for batch, mean, J in found:
            factor = candidate.spread(J * candidate.precision.rsqrt().to(J))
            draws = draw_logits(mean, factor @ factor.mT, batch.ids, samples, seed)
            right = draws.log_softmax(-1)[:, torch.arange(len(mean)), batch.labels]
            total -= float((right.logsumexp(0) - math.log(samples)).sum())
        return total

    candidates = [posterior.scaled(10 ** (i / 8)) for i in range(-32, 33)]
    values = [nll(candidate) for candidate in candidates]
    best = values.index(min(values))
    if best in (0, len(values) - 1):
        raise InputError("no precision between 1e-4 and 1e4 times the first predicts these best")
    return candidates[best]
