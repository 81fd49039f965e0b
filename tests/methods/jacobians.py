"""Class logits and their derivatives by torch.func, for the tests of linearised posteriors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalabl_ref.core.objective import class_logits


def logits_and_jacobians(model, batch, parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, C) of the mean model, and their derivatives (B, C, ...) by each parameter.

    parameters: values by their names in the model.
    """

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return class_logits(self.model, batch, None)

    def call(values):
        return functional_call(Logits(), {f"model.{n}": v for n, v in values.items()}, ())

    with sdpa_kernel(SDPBackend.MATH):  # vmap warns of the others
        return call(parameters), jacrev(call)(parameters)
