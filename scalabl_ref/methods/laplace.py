"""Laplace-LoRA: a Gaussian around a trained plain LoRA, from Kronecker-factored curvature.

Around the weights theta* of a finished "mle" or "map" run, with F the Fisher information of the
training set and lambda the prior's precision,

    q(theta) = N(theta*, Sigma),   Sigma = (F + lambda I)^-1
    f(x) ~ N(f*(x), J Sigma J^T),  J = df / dtheta, the logits linearised around theta*

F is block-diagonal over the matrices A (r, d_in) and B (d_out, r) of the layers. For a matrix with
inputs a and gradients g = d log p(y) / d output, the block is N E[g g^T] x E[a a^T], a Kronecker
product of means over the N examples. The mean of g g^T is over the classes too, weighted by the
model's probabilities. a and g are those of the last token, as in the authors' code (Yang, Robeyns,
Wang, Aitchison, ICLR 2024; bayesian_lora); this is neither KFAC-expand nor KFAC-reduce. J includes
every token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.adapter import Adapter, adapters
from ..core.noise import RESERVED_LAYER, Noise
from ..core.objective import class_logits
from ..support.errors import InputError
from ..support.files import make_folder
from ..support.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from ..core.objective import Batch
    from ..model.llama import Llama

Layers = Literal["all", "last"]
LAYERS: tuple[Layers, ...] = ("all", "last")
LOGITS_LAYER = RESERVED_LAYER - 1  # a noise id that no adapter has
FILE = "laplace.safetensors"
FACTS = ("precision", "log_likelihood", "squares")  # in the file's metadata
Passes = dict[str, tuple[Tensor, Tensor]]  # a layer's input (B, T, d_in) and output (B, T, d_out)


class Curvature(NamedTuple):
    """Eigenvectors and eigenvalues of F's block for one matrix (m, n), float64.

    left (m, k): eigenvectors of N E[g g^T]. right (n, l): eigenvectors of E[a a^T]. values (k, l):
    products of their eigenvalues. Directions orthogonal to all of them have the eigenvalue 0.
    """

    left: Tensor
    right: Tensor
    values: Tensor

    def covariance(self, J: Tensor, precision: float) -> Tensor:
        """J Sigma J^T, (B, C, C), for Jacobians J (B, C, m, n).

        Sigma = (I - sum of v / (v + lambda) u u^T) / lambda over the eigenvectors u of values v.
        """
        shrink = (self.values / (self.values + precision)).sqrt().to(J)
        flat = J.flatten(2)
        learnt = (shrink * (self.left.to(J).T @ J @ self.right.to(J))).flatten(2)
        return (flat @ flat.mT - learnt @ learnt.mT) / precision


@dataclass(frozen=True)
class Laplace:
    """The posterior of a run; a `methods.Posterior`.

    curvature: by the name of the matrix, such as layers.0.attn.q_proj.A. log_likelihood: of the
    training set, in nats. squares: ||theta*||^2 over the same matrices. precision: lambda.
    """

    curvature: dict[str, Curvature]
    log_likelihood: float
    squares: float
    precision: float

    def __post_init__(self) -> None:
        if not self.precision > 0:
            raise InputError(f"the prior's precision must be positive, not {self.precision}")

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        model: Llama,
        batches: Iterable[Batch],
        layers: Layers = "all",
        rank: int | None = None,
        precision: float | None = None,
    ) -> Laplace:
        """The posterior of a trained model, from its training set, every example once.

        layers: "all", or "last" for only the last adapted layer; the others are then constants.
        rank: number of eigenvectors to keep of each factor. None keeps all; a factor of d x d then
        needs d^2 numbers. precision: None is 1 / prior_std^2 of the model's configuration.

        Raises InputError for a model without plain LoRA, and for a wrong `layers` or `rank`.
        """
        chosen = _chosen(model, layers)
        if rank is not None and rank < 1:
            raise InputError(f"rank must be at least 1, not {rank}")
        weights = _weights(chosen)
        moments = {
            name: [_Moments(d, rank, w.device) for d in w.shape] for name, w in weights.items()
        }
        examples, log_likelihood = 0, 0.0
        for batch in batches:
            batch = batch.to(model.device)
            log_p = _observe(model, batch, chosen, moments)
            log_likelihood += float(log_p.gather(1, batch.labels[:, None]).sum())
            examples += len(log_p)
        if not examples:
            raise InputError("no examples to take the curvature from")
        curvature = {}
        for name, (left, right) in sorted(moments.items()):
            (U, of_gradients), (V, of_inputs) = left.eigen(), right.eigen()
            curvature[name] = Curvature(U, V, torch.outer(of_gradients, of_inputs / examples))
        if precision is None:
            precision = next(iter(chosen.values())).config.sigma_p ** -2
        return cls(curvature, log_likelihood, _squares(weights), precision)

    @torch.no_grad()
    def logits(self, model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (B, C) and covariance (B, C, C) of the class logits, float64.

        Raises InputError if the posterior was made from another model.
        """
        chosen = self._layers_of(model)
        logits, passes = _forward(model, batch, chosen)
        J: dict[str, list[Tensor]] = {name: [] for name in self.curvature}
        for of_class in _gradients(logits, passes):
            for name, adapter in chosen.items():
                parts = _matrices(adapter, passes[name][0], of_class[name])
                for key, (a, g) in parts.items():
                    # The sum over tokens, (B, m, n); the head sees one, without a dimension.
                    J[f"{name}.{key}"].append(torch.einsum("b...m,b...n->bmn", g, a))
        covariances = [
            curvature.covariance(torch.stack(J[name], 1), self.precision)
            for name, curvature in self.curvature.items()
        ]
        return logits.detach().double(), torch.stack(covariances).sum(0)

    def log_probs(self, model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
        """Log-probabilities of the classes under each draw of the logits, (S, B, C) float64.

        Draw i of an example is Noise(seed, i) with the layer LOGITS_LAYER, keyed by `batch.ids`.
        samples = 0 gives the mean model, once. Raises InputError for negative `samples`.
        """
        if samples < 0:
            raise InputError(f"samples must not be negative, and is {samples}")
        mean, covariance = self.logits(model, batch)
        if samples == 0:
            return mean.log_softmax(-1)[None]
        return draw_logits(mean, covariance, batch.ids, samples, seed).log_softmax(-1)

    def probit(self, model: Llama, batch: Batch) -> Tensor:
        """Log-probabilities without draws, (B, C) float64: MacKay's probit approximation.

        softmax(mean / sqrt(1 + pi / 8 variance)), class by class. It ignores correlations.
        """
        mean, covariance = self.logits(model, batch)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        return (mean / (1 + math.pi / 8 * variance).sqrt()).log_softmax(-1)

    def log_evidence(self, precision: float | None = None) -> float:
        """log p(D | lambda) in Laplace's approximation, in nats; None is `self.precision`.

        log p(D | theta*) - lambda ||theta*||^2 / 2 - sum of log(1 + v / lambda) / 2, over the
        eigenvalues v of F. theta* stays fixed as lambda changes.
        """
        precision = self.precision if precision is None else precision
        penalty = precision * self.squares + float((self._values() / precision).log1p().sum())
        return self.log_likelihood - penalty / 2

    def optimise_prior(self) -> Laplace:
        """The same posterior with the precision that maximises the evidence.

        It solves lambda ||theta*||^2 = sum of v / (v + lambda), the number of parameters that the
        data determine. The left side rises with lambda and the right side falls, so bisection
        finds lambda. Raises InputError if there is none: all weights or all eigenvalues are 0.
        """
        values = self._values()

        def excess(log_precision: float) -> float:
            precision = math.exp(log_precision)
            return precision * self.squares - float((values / (values + precision)).sum())

        low, high = -50.0, 50.0
        if not excess(low) < 0 < excess(high):
            raise InputError("no precision of the prior maximises the evidence")
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return dataclasses.replace(self, precision=math.exp(high))

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/laplace.safetensors. Raises InputError if it cannot be written."""
        make_folder(folder)
        tensors = [
            (f"{name}.{key}", tensor)
            for name, curvature in self.curvature.items()
            for key, tensor in curvature._asdict().items()
        ]
        facts = {key: repr(getattr(self, key)) for key in FACTS}
        save_tensors(Path(folder) / FILE, tensors, facts)

    @classmethod
    def load(cls, folder: Path | str) -> Laplace:
        """Read the file of `save`. Raises InputError if it is missing, broken or another's."""
        path = Path(folder) / FILE
        tensors, metadata = load_tensors(path)
        try:
            facts = {key: float(metadata[key]) for key in FACTS}
            names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
            curvature = {
                name: Curvature(*(tensors.pop(f"{name}.{key}") for key in Curvature._fields))
                for name in sorted(names)
            }
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: not written by this program: {error}") from None
        if not curvature:
            raise InputError(f"{path}: holds no curvature")
        for name, c in curvature.items():
            ranks = (c.left.shape[-1], c.right.shape[-1])
            if c.left.dim() != 2 or c.right.dim() != 2 or c.values.shape != ranks:
                raise InputError(f"{path}: {name}: shapes do not fit each other")
            if not all(torch.isfinite(tensor).all() for tensor in c):
                raise InputError(f"{path}: {name}: has NaN or infinite values")
        return cls(curvature, **facts)

    def _values(self) -> Tensor:
        return torch.cat([curvature.values.flatten() for curvature in self.curvature.values()])

    def _layers_of(self, model: Llama) -> dict[str, Adapter]:
        """The layers of `model` in the posterior. Raises InputError if it is of another model."""
        names = {name.rpartition(".")[0] for name in self.curvature}
        chosen = {name: a for name, a in _chosen(model, "all").items() if name in names}
        weights = _weights(chosen)
        shapes = {name: (len(c.left), len(c.right)) for name, c in self.curvature.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
            raise InputError("the Laplace approximation is of a model with other adapters")
        if not math.isclose(_squares(weights), self.squares, rel_tol=1e-9):
            raise InputError("the Laplace approximation is around other weights than the model's")
        return chosen


def draw_logits(mean: Tensor, covariance: Tensor, ids: Tensor, samples: int, seed: int) -> Tensor:
    """(S, B, C) draws from N(mean, covariance), of shapes (B, C) and (B, C, C), float64.

    By the symmetric square root. It is unique, and continuous where the covariance is singular, so
    a draw does not jump when rounding moves an eigenvector.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT  # (B, C, C)
    eps = [Noise(seed, i).normal(LOGITS_LAYER, ids, mean.shape[1]) for i in range(samples)]
    return mean + (root @ torch.stack(eps).to(mean)[..., None]).squeeze(-1)


# --- one pass through the model -------------------------------------------------------------------


def _chosen(model: Llama, layers: Layers) -> dict[str, Adapter]:
    own = adapters(model)
    if layers not in LAYERS:
        raise InputError(f"layers must be one of {', '.join(LAYERS)}, not {layers!r}")
    if not own or any(adapter.random for adapter in own.values()):
        raise InputError("Laplace needs a model with plain LoRA: method mle or map")
    return own if layers == "all" else dict([own.popitem()])


def _weights(chosen: dict[str, Adapter]) -> dict[str, Tensor]:
    return {f"{name}.{key}": w for name, a in chosen.items() for key, w in (("A", a.A), ("B", a.B))}


def _squares(weights: dict[str, Tensor]) -> float:
    return math.fsum(float(weight.double().square().sum()) for weight in weights.values())


def _forward(model: Llama, batch: Batch, chosen: dict[str, Adapter]) -> tuple[Tensor, Passes]:
    """Class logits (B, C) of the mean model with their graph, and the layers' `Passes`."""
    passes: Passes = {}

    def watch(name: str) -> RemovableHandle:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # The outputs require gradients themselves, so the model may be frozen.
            passes[name] = inputs[0].detach(), output.requires_grad_()

        return model.get_submodule(name).register_forward_hook(keep)

    handles = [watch(name) for name in chosen]
    try:
        with torch.enable_grad():
            return class_logits(model, batch, None, padded=True), passes
    finally:
        for handle in handles:
            handle.remove()


def _gradients(logits: Tensor, passes: Passes) -> Iterator[dict[str, Tensor]]:
    """For each class, d logit / d output of every layer, each (B, T, d_out).

    Rows are independent, so one backward pass of their sum gives the gradients of every row.
    """
    outputs = [output for _, output in passes.values()]
    for unit in torch.eye(logits.shape[1]).to(logits):
        gradients = torch.autograd.grad(logits, outputs, unit.expand_as(logits), retain_graph=True)
        yield dict(zip(passes, gradients, strict=True))


def _last(x: Tensor, batch: Batch) -> Tensor:
    """x (B, T, d) at each row's last real token, (B, d). The head's input is (B, d) already."""
    if x.dim() == 2:
        return x
    return x[torch.arange(len(x), device=x.device), batch.lengths - 1]


def _scores(g: Tensor, log_p: Tensor) -> Tensor:
    """Gradients of log p_c from those of the logits, (C, B, d), times sqrt(p_c): (C B, d).

    The sum of their squares over classes is J^T (diag(p) - p p^T) J.
    """
    p = log_p.exp().T[..., None]  # (C, B, 1)
    g = g.double()
    return (p.sqrt() * (g - (p * g).sum(0))).flatten(0, 1)


def _matrices(adapter: Adapter, x: Tensor, g: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of A and B, from those of their layer, W x + c B A x."""
    A, B, x, g = (tensor.double() for tensor in (adapter.A, adapter.B, x, g))
    g = adapter.config.scaling * g
    return {"A": (x, g @ B), "B": (x @ A.T, g)}


def _observe(
    model: Llama, batch: Batch, chosen: dict[str, Adapter], moments: dict[str, list[_Moments]]
) -> Tensor:
    """Add a batch to the moments [of g, of a] of each matrix; returns log-probabilities (B, C)."""
    logits, passes = _forward(model, batch, chosen)
    log_p = logits.detach().double().log_softmax(-1)
    classes = [
        {name: _last(g, batch) for name, g in of_class.items()}
        for of_class in _gradients(logits, passes)
    ]
    for name, adapter in chosen.items():
        x = _last(passes[name][0], batch)
        scores = _scores(torch.stack([of_class[name] for of_class in classes]), log_p)
        for key, (a, g) in _matrices(adapter, x, scores).items():
            for moment, rows in zip(moments[f"{name}.{key}"], (g, a), strict=True):
                moment.add(rows)
    return log_p


class _Moments:
    """Sum of v v^T over vectors of length d, or its best approximation of a lower rank."""

    def __init__(self, d: int, rank: int | None, device: torch.device) -> None:
        self.rank = d if rank is None else min(rank, d)
        self.sum = torch.zeros(d, self.rank, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows (n, d). For a lower rank, `sum` is a root R of R R^T, cut by an SVD."""
        if self.rank == len(self.sum):
            self.sum += rows.T @ rows
        else:
            U, S, _ = torch.linalg.svd(torch.cat((self.sum, rows.T), 1), full_matrices=False)
            self.sum = (U * S)[:, : self.rank]

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors (d, k) and eigenvalues (k,), on the CPU."""
        if self.rank == len(self.sum):
            values, vectors = torch.linalg.eigh(self.sum)
            return vectors.cpu().contiguous(), values.clamp(min=0).cpu()
        vectors, singular, _ = torch.linalg.svd(self.sum, full_matrices=False)
        return vectors.cpu().contiguous(), singular.square().cpu()
