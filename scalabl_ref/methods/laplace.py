"""Laplace-LoRA: a Gaussian around a trained plain LoRA, from the curvature of its training set.

Let theta* be the weights of a finished "mle" or "map" run, F the Fisher information of the training
set, and lambda the prior's precision. Then

    q(theta) = N(theta*, Sigma),   Sigma = (F + lambda I)^-1
    f(x) ~ N(f*(x), J Sigma J^T),  J = df / dtheta, the logits linearised around theta*

There are three kinds of F, over the matrices A (r, d_in) and B (d_out, r) of the layers:

"expand": block-diagonal. A matrix with inputs a and gradients g = d log p_c / d output has the
    block T E[g g^T] (x) E[a a^T], a Kronecker product of means over all T tokens that pass through
    it: KFAC-expand (Eschenhagen et al., NeurIPS 2023; laplace-torch).
"last": the same with the last token of each example alone, T = N, as in bayesian_lora, the code of
    Yang, Robeyns, Wang, Aitchison, ICLR 2024. It leaves out the influence of earlier tokens.
"exact": sum of J^T (diag p - p p^T) J, over all matrices jointly.

The mean of g g^T is over the classes c too, weighted by the model's probabilities p.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
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
CurvatureKind = Literal["expand", "last", "exact"]
CURVATURES: tuple[CurvatureKind, ...] = ("expand", "last", "exact")
JOINT = "all matrices"  # the name of the one block of an exact F
MOST_NUMBERS = 2**28  # of an exact F or its root: 2 GiB, and fitting takes about three times that
LOGITS_LAYER = RESERVED_LAYER - 1  # a noise id that no adapter has
FILE = "laplace.safetensors"
FACTS = ("precision", "log_likelihood", "squares")  # in the file's metadata
Passes = dict[str, tuple[Tensor, Tensor]]  # a layer's input (B, T, d_in) and output (B, T, d_out)


class Curvature(NamedTuple):
    """Eigenvectors and eigenvalues of F's block for one matrix (m, n), float64.

    left (m, k): eigenvectors of E[g g^T]. right (n, l): eigenvectors of E[a a^T]. values (k, l):
    products of their eigenvalues and T. Directions orthogonal to all of them have the eigenvalue 0.
    An exact F is one block: all matrices in one column (m, 1), and right is 1.
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
        # J^T left: torch folds the examples into one product of two matrices.
        learnt = (shrink * ((J.mT @ self.left.to(J)).mT @ self.right.to(J))).flatten(2)
        return (flat @ flat.mT - learnt @ learnt.mT) / precision


@dataclass(frozen=True)
class Laplace:
    """The posterior of a run; a `methods.Posterior`.

    shapes: of the matrices, by a name such as layers.0.attn.q_proj.A, in the order of F. curvature:
    by the same names, or only JOINT. log_likelihood: of the training set, in nats. squares:
    ||theta*||^2 over the same matrices. precision: lambda.
    """

    shapes: dict[str, tuple[int, int]]
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
        curvature: CurvatureKind = "expand",
    ) -> Laplace:
        """The posterior of a trained model, from its training set, every example once.

        layers: "all", or "last" for only the last adapted layer; the others are then constants.
        rank: number of eigenvectors to keep of each factor. None keeps all; a factor of d x d then
        needs d^2 numbers. precision: None is 1 / prior_std^2 of the model's configuration.
        curvature: the kind of F, see the module.

        Raises InputError for a model without plain LoRA, for a wrong `layers`, `rank` or
        `curvature`, and for an exact F that needs more than MOST_NUMBERS numbers.
        """
        chosen = _chosen(model, layers)
        if curvature not in CURVATURES:
            raise InputError(f"curvature must be one of {', '.join(CURVATURES)}, not {curvature!r}")
        if rank is not None and rank < 1:
            raise InputError(f"rank must be at least 1, not {rank}")
        if rank is not None and curvature == "exact":
            raise InputError("curvature exact has no factors to cut to a rank: leave rank out")
        weights = _weights(chosen)
        sums = _Joint(weights) if curvature == "exact" else _Factors(weights, rank)
        examples, log_likelihood = 0, 0.0
        for batch in batches:
            batch = batch.to(model.device)
            logits, passes = _forward(model, batch, chosen)
            log_p = logits.detach().double().log_softmax(-1)
            gradients = _gradients(logits, passes, _scores(log_p))
            sums.add((_matrices(chosen, passes, g) for g in gradients), _tokens(batch, curvature))
            log_likelihood += float(log_p.gather(1, batch.labels[:, None]).sum())
            examples += len(log_p)
        if not examples:
            raise InputError("no examples to take the curvature from")
        if precision is None:
            precision = next(iter(chosen.values())).config.sigma_p ** -2
        shapes = {name: (len(w), w.shape[1]) for name, w in weights.items()}
        return cls(shapes, sums.eigen(), log_likelihood, _squares(weights), precision)

    @torch.no_grad()
    def logits(self, model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean (B, C) and covariance (B, C, C) of the class logits, float64.

        Raises InputError if the posterior was made from another model.
        """
        chosen = self._layers_of(model)
        logits, passes = _forward(model, batch, chosen)
        each = [
            {name: _products(a, g) for name, (a, g) in _matrices(chosen, passes, of_class).items()}
            for of_class in _gradients(logits, passes, _units(logits))
        ]
        J = {name: torch.stack([rows[name] for rows in each], 1) for name in self.shapes}
        if JOINT in self.curvature:
            J = {JOINT: torch.cat([part.flatten(2) for part in J.values()], 2)[..., None]}
        covariances = [c.covariance(J[name], self.precision) for name, c in self.curvature.items()]
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
        """The log evidence (18) in Laplace's approximation, in nats; None is `self.precision`.

        log p(labels | theta*) - lambda ||theta*||^2 / 2 - sum of log(1 + v / lambda) / 2, over the
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
        facts["shapes"] = json.dumps(self.shapes)
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
            shapes = {name: (m, n) for name, (m, n) in json.loads(metadata["shapes"]).items()}
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: not written by this program: {error}") from None
        if not curvature:
            raise InputError(f"{path}: holds no curvature")
        if curvature.keys() not in (shapes.keys(), {JOINT}):
            raise InputError(f"{path}: its curvature and its matrices differ")
        for name, c in curvature.items():
            ranks = (c.left.shape[-1], c.right.shape[-1])
            if c.left.dim() != 2 or c.right.dim() != 2 or c.values.shape != ranks:
                raise InputError(f"{path}: {name}: shapes do not fit each other")
            if not all(torch.isfinite(tensor).all() for tensor in c):
                raise InputError(f"{path}: {name}: has NaN or infinite values")
        return cls(shapes, curvature, **facts)

    def _values(self) -> Tensor:
        return torch.cat([curvature.values.flatten() for curvature in self.curvature.values()])

    def _layers_of(self, model: Llama) -> dict[str, Adapter]:
        """The layers of `model` in the posterior. Raises InputError if it is of another model."""
        names = {name.rpartition(".")[0] for name in self.shapes}
        chosen = {name: a for name, a in _chosen(model, "all").items() if name in names}
        weights = _weights(chosen)
        if self.shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
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
    if not own or any(adapter.config.method not in ("mle", "map") for adapter in own.values()):
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


def _units(logits: Tensor) -> Tensor:
    """Directions (C, B, C) of the logits: each class by itself."""
    return torch.eye(logits.shape[1]).to(logits)[:, None].expand(-1, *logits.shape)


def _scores(log_p: Tensor) -> Tensor:
    """Directions (C, B, C) in which the logits' gradients are those of log p_c, times sqrt(p_c).

    The sum of their squares over classes is J^T (diag(p) - p p^T) J.
    """
    p = log_p.exp()
    return p.T.sqrt()[..., None] * (torch.eye(p.shape[1]).to(p)[:, None] - p)


def _gradients(logits: Tensor, passes: Passes, directions: Tensor) -> Iterator[dict[str, Tensor]]:
    """For each direction (B, C), d (direction . logits) / d output of every layer, (B, T, d_out).

    Rows are independent, so one backward pass of their sum gives the gradients of every row.
    """
    outputs = [output for _, output in passes.values()]
    for direction in directions.to(logits):
        gradients = torch.autograd.grad(logits, outputs, direction, retain_graph=True)
        yield dict(zip(passes, gradients, strict=True))


Pairs = dict[str, tuple[Tensor, Tensor]]  # of a matrix: inputs (..., n), output gradients (..., m)
Pick = Callable[[Tensor], Tensor]


def _matrices(chosen: dict[str, Adapter], passes: Passes, gradients: dict[str, Tensor]) -> Pairs:
    """Inputs and output gradients of A and B, from those of their layer, W x + c B A x."""
    pairs: Pairs = {}
    for name, adapter in chosen.items():
        tensors = adapter.A, adapter.B, passes[name][0], gradients[name]
        A, B, x, g = (tensor.double() for tensor in tensors)
        g = adapter.config.scaling * g
        pairs |= {f"{name}.A": (x, g @ B), f"{name}.B": (x @ A.T, g)}
    return pairs


def _products(a: Tensor, g: Tensor) -> Tensor:
    """Gradients by a matrix, the sum over tokens, (B, m, n); the head sees one token a row."""
    return torch.einsum("b...m,b...n->bmn", g, a)


def _tokens(batch: Batch, curvature: CurvatureKind) -> Pick:
    """Picks rows (n, d) of x (B, T, d): of all real tokens or each row's last one.

    The head's x is (B, d): it sees no other token.
    """
    place = torch.arange(batch.tokens.shape[1], device=batch.lengths.device)
    ends = batch.lengths[:, None]
    wanted = place == ends - 1 if curvature == "last" else place < ends
    return lambda x: x if x.dim() == 2 else x[wanted]


class _Factors:
    """Both factors of every block: moments of output gradients and of inputs."""

    def __init__(self, weights: dict[str, Tensor], rank: int | None) -> None:
        self.moments = {
            name: [_Moments(d, rank, w.device) for d in w.shape] for name, w in weights.items()
        }

    def add(self, each: Iterable[Pairs], pick: Pick) -> None:
        """Add a batch, from the pairs of each class; a class has its own gradients only."""
        for number, pairs in enumerate(each):
            for name, (a, g) in pairs.items():
                left, right = self.moments[name]
                left.add(pick(g))
                if number == 0:
                    right.add(pick(a))

    def eigen(self) -> dict[str, Curvature]:
        found = {}
        for name, (left, right) in sorted(self.moments.items()):
            (U, of_gradients), (V, of_inputs) = left.eigen(), right.eigen()
            found[name] = Curvature(U, V, torch.outer(of_gradients, of_inputs / right.count))
        return found


class _Joint:
    """An exact F: as rows of a root R, F = R^T R, while R has fewer rows than F; then F itself."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.size, self.count = sum(w.numel() for w in weights.values()), 0
        self.rows: list[Tensor] = []
        self.moments: _Moments | None = None

    def add(self, each: Iterable[Pairs], pick: Pick) -> None:
        for pairs in each:
            parts = [_products(a, g).flatten(1) for a, g in pairs.values()]
            self.rows.append(torch.cat(parts, 1))
            self.count += len(parts[0])
            height = min(self.count, self.size)
            if height * self.size > MOST_NUMBERS:
                raise InputError(
                    f"curvature exact has at least {height:,} x {self.size:,} numbers, more than "
                    f"{MOST_NUMBERS:,}: give fewer questions or adapted layers, or curvature expand"
                )
            if height == self.size:
                if self.moments is None:
                    self.moments = _Moments(self.size, None, parts[0].device)
                self.moments.add(torch.cat(self.rows))
                self.rows = []

    def eigen(self) -> dict[str, Curvature]:
        if self.moments is not None:
            vectors, values = self.moments.eigen()
        else:  # eigenvectors of R R^T, less those that may be its rounding
            root = torch.cat(self.rows)
            values, U = torch.linalg.eigh(root @ root.T)
            kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
            vectors, values = root.T @ (U[:, kept] / values[kept].sqrt()), values[kept]
        one = torch.ones(1, 1, dtype=torch.float64)
        return {JOINT: Curvature(vectors.cpu(), one, values.cpu()[:, None])}


class _Moments:
    """Sum of v v^T over vectors of length d, or its best approximation of a lower rank."""

    def __init__(self, d: int, rank: int | None, device: torch.device) -> None:
        self.rank = d if rank is None else min(rank, d)
        self.sum = torch.zeros(d, self.rank, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add rows (n, d). For a lower rank, `sum` is a root R of R R^T, cut by an SVD."""
        self.count += len(rows)
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
