"""The objective: negative log-likelihood plus beta times a KL term over N.

    loss = NLL (mean per example) + beta * KL / N                                            (4)

With beta = 1 and the forward KL, -N * loss is an unbiased estimate of the evidence lower bound
E_q[log p(D | s~)] - KL(q || p), if sampling is "batch" or "example": each likelihood then belongs
to a network with one s~. Under "token" every token has its own s~, which is another model: the loss
then does not bound the evidence of the paper's model.

The NLL is a mean over the batch. In training, the loss of a batch with fewer rows than the others
is multiplied by its share of a whole batch, so that all examples weigh the same in an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support.errors import InputError
from .noise import Noise

if TYPE_CHECKING:
    from .adapter import Adapter
    from .config import AdapterConfig

KL = Literal["forward", "official"]


def kl_forward(s: Tensor, sigma: Tensor, prior_std: float | Tensor) -> Tensor:
    """(5): KL(q || p), q = N(s, diag(sigma^2)), p = N(0, prior_std^2 I): the textbook direction.

    s and sigma (r,), or any one shape that prior_std broadcasts to. Returns a float64 scalar in
    nats, sum_k log(prior_std / sigma_k) + (sigma_k^2 + s_k^2) / (2 prior_std^2) - 1/2.

    Example:

    >>> import torch
    >>> from scalabl_ref import kl_forward
    >>> s, sigma = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    >>> kl_forward(s, sigma, prior_std=1.0).item()
    0.5
    """
    s, sigma = s.double(), sigma.double()
    log_ratio = torch.log(prior_std / sigma)
    return (log_ratio + (sigma**2 + s**2) / (2 * prior_std**2) - 0.5).sum()


def kl_official(s: Tensor, sigma: Tensor, prior_std: float | Tensor) -> Tensor:
    """(6): KL(p || q), the direction that the official code computes; shapes as `kl_forward`.

    sum_k log(sigma_k / prior_std) + (prior_std^2 + s_k^2) / (2 sigma_k^2) - 1/2.

    Example: it differs from the forward KL where sigma is not prior_std.

    >>> import torch
    >>> from scalabl_ref import kl_forward, kl_official
    >>> s, sigma = torch.zeros(1), torch.tensor([0.5])
    >>> round(kl_official(s, sigma, 1.0).item(), 4), round(kl_forward(s, sigma, 1.0).item(), 4)
    (0.8069, 0.3181)
    """
    s, sigma = s.double(), sigma.double()
    log_ratio = torch.log(sigma / prior_std)
    return (log_ratio + (prior_std**2 + s**2) / (2 * sigma**2) - 0.5).sum()


KLS: dict[str, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    "forward": kl_forward,
    "official": kl_official,
}


def fitted_prior_std(second: Tensor, config: AdapterConfig, kl: str) -> float | Tensor:
    """sigma_p: the fixed one, or (19), from the second moments (layers, r) of the scales under q.

    The forward KL is smallest where sigma_p^2 is the mean of E_q[s~_k^2]. This smallest KL does not
    change when (s, sigma) is divided by a and B multiplied by a: that arbitrary scale is gone.

    Raises InputError for the official direction, which has another minimum.
    """
    if config.prior == "fixed":
        return config.sigma_p
    if kl != "forward":
        raise InputError(f"prior {config.prior!r} is fitted by the forward KL, not by {kl!r}")
    return second.mean(1, keepdim=True).sqrt() if config.prior == "layer" else second.sqrt()


@dataclass(frozen=True)
class Batch:
    """A batch of prompts. tokens (B, T), padded on the right with 0; lengths, labels (class
    indices) and ids (indices in the data set) (B,); classes (C,) token ids. All int64.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    ids: Tensor
    classes: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def rows(self, index: Tensor) -> Batch:
        """The examples at `index`, (b,) int64."""
        at = index.to(self.tokens.device)
        return Batch(self.tokens[at], self.lengths[at], self.labels[at], self.ids[at], self.classes)


class Elbo(NamedTuple):
    """loss = nll + beta * kl / num_examples, all scalars; nll in nats per example, kl in nats."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


def elbo(
    model: nn.Module,
    batch: Batch,
    noise: Noise | None,
    beta: float,
    num_examples: int,
    kl: KL = "forward",
) -> Elbo:
    """(4): one-sample estimate of the objective on a batch, differentiable.

    model: a `Llama`. beta: weight of the KL (1 is the ELBO). num_examples: N, size of the training
    set. Raises InputError for an unknown `kl`.

    Example: two prompts whose answers are tokens 5 and 7.

    >>> import torch
    >>> from scalabl_ref import AdapterConfig, Llama, LlamaConfig, Noise, add_adapters, elbo
    >>> from scalabl_ref.core.objective import Batch
    >>> model = Llama(LlamaConfig(32, 8, 16, 1, 2, 1, 4)).init_random_(seed=0)
    >>> model = add_adapters(model.trim_head([5, 7]), AdapterConfig(rank=2))
    >>> batch = Batch(
    ...     tokens=torch.tensor([[3, 1, 4], [1, 5, 0]]), lengths=torch.tensor([3, 2]),
    ...     labels=torch.tensor([0, 1]), ids=torch.tensor([0, 1]), classes=torch.tensor([5, 7]),
    ... )
    >>> loss, nll, kl = elbo(model, batch, Noise(seed=0, draw=0), beta=1.0, num_examples=2)
    >>> torch.allclose(loss.double(), nll + kl / 2)
    True
    >>> loss.backward()
    """
    nll = F.cross_entropy(class_logits(model, batch, noise), batch.labels)
    divergence = complexity(model, kl)
    return Elbo(nll + beta * divergence.to(nll) / num_examples, nll, divergence)


def class_logits(
    model: nn.Module, batch: Batch, noise: Noise | None, draws: int = 1, padded: bool = False
) -> Tensor:
    """Logits of the answer classes at each row's last token, (draws B, C) float32 or wider.

    The draw of a row is keyed by its example's index in the data set, `batch.ids`. draws, padded:
    as in `model.inputs.Inputs`.
    """
    logits = model(
        batch.tokens, noise=noise, groups=batch.ids, lengths=batch.lengths, draws=draws,
        last_only=True, padded=padded,
    )  # fmt: skip
    if model.config.head_tokens is None:  # type: ignore[union-attr]
        logits = logits[:, batch.classes]
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def complexity(model: nn.Module, kl: KL = "forward") -> Tensor:
    """The KL term of (4) without its weight, a float64 scalar in nats, over all adapters.

    The KL of the methods that have a posterior, minus the log prior density (up to a constant) for
    methods "map" and "point", 0 for method "mle". Raises InputError for an unknown `kl`.
    """
    if kl not in KLS:
        raise InputError(f"kl must be one of {', '.join(KLS)}, not {kl!r}")
    kinds: dict[type[Adapter], list[Adapter]] = {}
    for module in model.modules():
        if (adapter := getattr(module, "adapter", None)) is not None:
            kinds.setdefault(type(adapter), []).append(adapter)
    parts = [kind.complexity(layers, kl) for kind, layers in kinds.items()]
    return sum(parts, torch.zeros((), dtype=torch.float64))
