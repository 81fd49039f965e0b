"""Laplace-LoRA against bayesian_lora, its authors' package: same model, same inputs, in float64.

The package is fed what its own conventions need: one example a batch, since its factors depend on
how examples are batched; the label that it samples dictated, since ours is the expectation; and
factors whose larger side is a root, which is what its `variance` and `model_evidence` take.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalabl_ref import adapters
from scalabl_ref.methods.laplace import Laplace

from ..methods.test_laplace import TERMS, close, dense, part
from ..models import CLASSES, tiny_batch, tiny_model

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
pytest.importorskip(
    "bayesian_lora",
    reason="pip install bayesian-lora transformers, in an environment of its own",
    exc_type=ImportError,
)

RANK = 3


class TheirLinear(nn.Module):
    """W x + c lora_B(lora_A(x)) with the two as layers of their own, as in PEFT."""

    def __init__(self, weight: torch.Tensor, adapter) -> None:
        super().__init__()
        self.register_buffer("base", weight.detach())
        self.lora_A, self.lora_B = (
            nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
            for w in adapter.parameters()
        )
        self.lora_A.weight, self.lora_B.weight = adapter.A, adapter.B
        self.scaling = adapter.config.scaling

    def forward(self, x, noise=None, groups=None):
        return nn.functional.linear(x, self.base) + self.scaling * self.lora_B(self.lora_A(x))


class TheirModel(nn.Module):
    """Logits of every token, as transformers returns them."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        for name, adapter in adapters(model).items():
            linear = model.get_submodule(name)
            model.set_submodule(name, TheirLinear(linear.weight, adapter))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.model(input_ids))


def models():
    options = {"method": "mle", "rank": RANK, "targets": ("q_proj", "v_proj", "down_proj")}
    return tiny_model(**options).double(), TheirModel(tiny_model(**options).double())


def same_length(rows: int, seed: int = 0):
    """Their convention is the last column, ours the last real token: no padding, and they agree."""
    batch = tiny_batch(rows, seed)
    tokens = batch.tokens.clamp(min=1)
    return dataclasses.replace(batch, tokens=tokens, lengths=torch.full((rows,), tokens.shape[1]))


def our_name(theirs: str) -> str:
    return theirs.removeprefix("model.").replace(".lora_", ".")


def their_factors(theirs, batch, monkeypatch, **options):
    """Sums over examples and classes of their (activations, output gradients), by our names."""
    from bayesian_lora import kfac

    total: dict[str, list[torch.Tensor]] = {}
    for row in range(len(batch.labels)):
        tokens = batch.tokens[row : row + 1]
        probs = theirs(tokens).logits[0, -1].softmax(-1).detach()
        for label, p in enumerate(probs):
            monkeypatch.setattr(torch, "multinomial", lambda *_, label=label: torch.tensor([label]))
            found = kfac.calculate_kronecker_factors(
                theirs, lambda m, t: m(t).logits[:, -1], [tokens],
                target_module_keywords=["lora"], **options,
            )  # fmt: skip
            for name, (A, S) in found.items():
                sums = total.setdefault(our_name(name), [torch.zeros_like(A), torch.zeros_like(S)])
                sums[0] += A / len(probs)  # the same for every label
                sums[1] += p * S
    return total


def test_kronecker_factors(monkeypatch):
    ours, theirs = models()
    batch = same_length(4)
    curvature = Laplace.fit(ours, [batch], curvature="last").curvature
    found = their_factors(theirs, batch, monkeypatch)
    assert found.keys() == curvature.keys()
    for name, (A, S) in found.items():
        close(dense(curvature[name]), torch.kron(S, A / 4))


def test_a_low_rank_factor(monkeypatch):
    """Cut to rank 2 as the examples come, one at a time."""
    from bayesian_lora import calculate_kronecker_factors

    ours, theirs = models()
    batch = same_length(4)
    each = [part(batch, [i]) for i in range(4)]
    curvature = Laplace.fit(ours, each, rank=2, curvature="last").curvature
    found = calculate_kronecker_factors(
        theirs, lambda m, t: m(t).logits[:, -1], batch.tokens[:, None],
        n_kfac=2, lr_threshold=4, target_module_keywords=["lora_A"],
    )  # fmt: skip
    for name, (root, _) in found.items():
        c = curvature[our_name(name)]
        got = (c.right * c.values.sum(0) / c.values.sum()) @ c.right.T  # of trace 1
        close(got, root @ root.T / root.square().sum())


def their_curvature(curvature, width: int = 24):
    """Ours as their functions take it: a Cholesky factor of the small side, which is as long as the
    rank, and for the other a root of `width` columns, which the scale of both goes into."""
    out = {}
    for name, c in curvature.items():
        of_A = name.endswith("A")
        small, large = (c.left, c.right) if of_A else (c.right, c.left)
        values = c.values if of_A else c.values.T
        # A softmax over C classes has C - 1 directions: the factor may be singular, to rounding.
        root = small * (values.sum(1) / values.sum()).clamp(min=0).sqrt()
        L = torch.linalg.qr(root.T)[1].T  # L L^T = root root^T, L lower triangular
        L = L * torch.where(L.diagonal() < 0, -1.0, 1.0)
        root = torch.zeros(len(large), width).double()
        root[:, : large.shape[1]] = large * values.sum(0).sqrt()
        out[f"model.{name[:-1]}lora_{name[-1]}"] = (root, L) if of_A else (L, root)
    return out, width


@pytest.fixture
def double():
    """Their sums start from zeros of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("precision", [0.1, 1.0, 10.0])
def test_logits_and_their_variance(double, precision):
    from bayesian_lora import main

    ours, theirs = models()
    other = same_length(3, seed=1)
    laplace = Laplace.fit(ours, [same_length(4)], precision=precision, curvature="last")
    factors, width = their_curvature(laplace.curvature)
    inputs = {"input_ids": other.tokens}
    with sdpa_kernel(SDPBackend.MATH):
        J, mean = main.jacobian_mean(theirs, inputs, output_callback=lambda o: o.logits[:, -1])
    variance = main.variance(
        SimpleNamespace(**inputs), J, factors, torch.tensor(1 / precision), len(CLASSES), RANK,
        width, "cpu",
    )  # fmt: skip
    got_mean, got = laplace.logits(ours, other)
    largest = max(float(c.values.max()) for c in laplace.curvature.values())
    close(got_mean, mean.detach())
    close(got, variance.detach(), round(TERMS * (1 + largest / precision)))


@pytest.mark.parametrize("precision", [0.1, 1.0, 10.0])
def test_the_determinant_in_the_evidence(double, precision):
    """What is left of their evidence without data, weights and the term in log s2 by itself."""
    from bayesian_lora import model_evidence

    ours, _ = models()
    laplace = Laplace.fit(ours, [same_length(4)], precision=precision, curvature="last")
    factors, width = their_curvature(laplace.curvature)
    s2, d = torch.tensor(1 / precision), max(f.shape[0] for f in [*factors.values()][-1])
    theirs = model_evidence(nn.Module(), torch.tensor(0.0), factors, RANK, width, s2)
    half = theirs + RANK * max(d, width) * s2.log() / 2
    penalty = laplace.log_evidence() - laplace.log_likelihood + precision * laplace.squares / 2
    close(half, -penalty)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("rank", [None, 2], ids=["whole", "low-rank"])
def test_the_factors_lack_n_or_depend_on_the_batch(monkeypatch, size, rank):
    """Eight copies of an example: the product of the factors is that of one, or 8 / size of it."""
    from bayesian_lora import calculate_kronecker_factors

    _, theirs = models()
    tokens = same_length(1).tokens
    monkeypatch.setattr(torch, "multinomial", lambda p, _: torch.ones(len(p), 1).long())

    def product(loader):
        found = calculate_kronecker_factors(
            theirs, lambda m, t: m(t).logits[:, -1], loader, n_kfac=rank, lr_threshold=4,
            target_module_keywords=["lora_A"],
        )  # fmt: skip
        if rank:  # the larger factor, which is that of the input, is a root
            return {name: (A @ A.T).trace() * S.trace() for name, (A, S) in found.items()}
        return {name: A.trace() * S.trace() for name, (A, S) in found.items()}

    one, found = product([tokens]), product([tokens.expand(size, -1)] * (8 // size))
    for name, value in found.items():
        close(value, (8 / size if rank else 1) * one[name])


def test_the_weights_and_the_likelihood_in_the_evidence(double):
    """The norms of the weights are not squared, and are added, as the likelihood is."""
    from bayesian_lora import model_evidence

    ours, theirs = models()
    laplace = Laplace.fit(ours, [same_length(4)], curvature="last")
    factors, width = their_curvature(laplace.curvature)
    s2, likelihood = torch.tensor(0.5), torch.tensor(-7.0)
    with_both = model_evidence(theirs, likelihood, factors, RANK, width, s2)
    without = model_evidence(nn.Module(), torch.tensor(0.0), factors, RANK, width, s2)
    norms = [p.norm() for name, p in theirs.named_parameters() if "lora" in name]
    assert len(norms) == len(factors) and min(norms) > 0
    close(with_both - without, likelihood + sum(norms) / s2)
