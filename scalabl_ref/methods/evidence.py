"""The precision of the scales' prior that maximises the evidence, equation (26) of `subspace`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..support.errors import InputError

Groups = Literal["all", "target", "layer"]
GROUPS: tuple[Groups, ...] = ("all", "target", "layer")
MOST_STEPS = 200  # of Newton's method; some ten are usual


def groups_of(sizes: dict[str, int], groups: Groups) -> tuple[Tensor, list[str]]:
    """The group of each scale, (D,) int64, and the groups' names."""
    if groups not in GROUPS:
        raise InputError(f"groups must be one of {', '.join(GROUPS)}, not {groups!r}")
    name_in: dict[str, Callable[[str], str]] = {
        "all": lambda layer: "all layers",
        "target": lambda layer: layer.rpartition(".")[2],
        "layer": lambda layer: layer,
    }
    of_layer = [name_in[groups](layer) for layer, size in sizes.items() for _ in range(size)]
    names = list(dict.fromkeys(of_layer))
    return torch.tensor([names.index(name) for name in of_layer]), names


def whitened(H: Tensor, precision: Tensor) -> Tensor:
    """Lambda^-1/2 H Lambda^-1/2, (D, D)."""
    root = precision.rsqrt()
    return root[:, None] * H * root


def best_precision(H: Tensor, scales: Tensor, group: Tensor, names: Sequence[str]) -> Tensor:
    """lambda of each scale, (D,), that maximises the evidence (26), one lambda for each group.

    With u = log lambda and M = (I + Lambda^-1/2 H Lambda^-1/2)^-1, the gradient by u_g is half of

        sum of (1 - M_ii) - lambda_g |s_g|^2    over the scales i of group g

    The first term counts the scales that the data determine, and s_g are the trained values of the
    group. The evidence is concave in u: det(H + Lambda) is a sum of products of lambdas with
    coefficients >= 0, so its log is convex in u. If there is a maximum, Newton's method with halved
    steps therefore finds it.

    Raises InputError if a group has no maximum, as when the data say nothing about its scales.
    """
    one_hot = nn.functional.one_hot(group).to(H)  # (D, G)
    squares = scales.square() @ one_hot  # (G,)

    def at(u: Tensor) -> tuple[Tensor, Tensor]:
        """The evidence up to a constant, times two, and M."""
        precision = u.exp()[group]
        root = torch.linalg.cholesky(torch.eye(len(H)).to(H) + whitened(H, precision))
        value = -(precision * scales.square()).sum() - 2 * root.diagonal().log().sum()
        return value, torch.cholesky_inverse(root)

    u = torch.zeros_like(squares)
    value, M = at(u)
    for _ in range(MOST_STEPS):
        penalty, own = u.exp() * squares, M.diagonal()
        gradient = (1 - own) @ one_hot - penalty
        minus_hessian = torch.diag(own @ one_hot) - one_hot.T @ M.square() @ one_hot
        minus_hessian += torch.diag(penalty)
        step = torch.linalg.solve(minus_hessian, gradient)
        step = step * (2 / step.abs().max()).clamp(max=1)
        if float(u.abs().max()) > 50:
            lost = names[int(u.abs().argmax())]
            raise InputError(f"no precision of the prior maximises the evidence: {lost}")
        found, inverse = at(u + step)
        while found < value and float(step.abs().max()) > 1e-6:  # less, and rounding decides
            step = step / 2
            found, inverse = at(u + step)
        u, value, M = u + step, found, inverse
        if float(step.abs().max()) < 1e-9:
            break
    return u.exp()[group]
