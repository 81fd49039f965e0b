"""The predictive integrated rather than sampled, where the logits of a row are Gaussian.

There are two cases. If only the head is random, then with the hidden state h (23)

    z = W h + c B diag(s) A h + F eps,    F = c B diag(A h) L

with L L^T the covariance of the scales. In the linearised prediction of the subspace posterior (27)
F = J R with R R^T the covariance of all scales. The softmax of z is averaged over the few
directions in which F moves differences of logits: min(r, C - 1) of them for C classes and r columns
of F. Gauss-Hermite quadrature integrates along each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.adapter import SubspaceAdapter, adapters
from ..core.objective import Batch, class_logits
from ..core.predictive import Prediction, predictive
from ..methods import Subspace
from ..model.llama import Llama
from ..support.errors import InputError

NODES = (96, 48, 32)  # along each direction, where there are one, two or three


@torch.no_grad()
def predict_exact(model: Llama, batch: Batch, posterior: Subspace | None = None) -> Prediction:
    """The predictive distribution that `predict` has with infinitely many samples.

    Its error, in probability and in nats, is below 5e-5 while no difference of logits has a
    standard deviation above 2. For larger ones the softmax is too steep for this number of nodes,
    and many draws are better.

    Raises InputError for a posterior that is not linear; without one, unless lm_head alone is
    adapted, by scalabl; and for more than 4 classes, unless there are at most 3 scales.
    """
    if posterior is None:
        mean, factor = head_gaussian(model, batch)
    elif posterior.predicts == "linear":
        mean, factor = posterior.gaussian(model, batch)
    else:
        raise InputError("exact prediction needs the subspace posterior to predict linear")
    return integrate(mean, factor)


def head_gaussian(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean (B, C) and factor F (B, C, r) of the logits, float64. Errors as of `predict_exact`."""
    own = adapters(model)
    head = own.get("lm_head")
    if len(own) != 1 or not isinstance(head, SubspaceAdapter):
        raise InputError("exact prediction needs lm_head alone to be adapted, by scalabl")
    hidden: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    try:
        mean = class_logits(model, batch, None).double()
    finally:
        hook.remove()
    B = head.B.double()
    if model.config.head_tokens is None:
        B = B[batch.classes]
    L = torch.stack([head.deviation(e) for e in torch.eye(B.shape[1]).to(B)], dim=1)  # (r, r)
    h = hidden[0].double() @ head.A.double().T  # (B, r)
    return mean, head.config.scaling * (B * h[:, None]) @ L


def integrate(mean: Tensor, factor: Tensor, counts: Sequence[int] = NODES) -> Prediction:
    """The mixture of softmax(mean + factor eps), eps ~ N(0, I); shapes as of `head_gaussian`.

    counts: nodes along each direction, if there are one, two or three directions.
    Raises InputError for more than 4 classes, unless factor has at most 3 columns.
    """
    moved = factor - factor.mean(1, keepdim=True)  # the softmax sees no more than this
    U, S, _ = torch.linalg.svd(moved, full_matrices=False)
    directions = min(factor.shape[2], factor.shape[1] - 1)
    if directions == 0:  # of one class the softmax is 1
        return predictive(torch.log_softmax(mean, -1)[None])
    if directions > len(NODES):
        most = len(NODES)
        raise InputError(f"exact prediction takes at most {most + 1} classes, or {most} scales")
    axes = (U * S[:, None])[..., :directions]  # (B, C, directions)
    nodes, weights = gauss_hermite(counts[directions - 1])
    grid = torch.cartesian_prod(*[nodes] * directions).view(-1, directions).to(mean)
    weight = torch.cartesian_prod(*[weights] * directions).view(-1, directions).prod(1).to(mean)
    logits = mean + torch.einsum("qk,bck->qbc", grid, axes)
    return predictive(torch.log_softmax(logits, -1), weight)


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(eps), eps ~ N(0, 1): Golub and Welsch's eigenvalues, (n,) each.

    Exact for polynomials of degree up to 2n - 1.
    """
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors[0].square()
