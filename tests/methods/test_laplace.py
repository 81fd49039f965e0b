"""Laplace-LoRA against dense matrices: explicit Jacobians, inverses, determinants, quadrature."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest
import torch
from torch._subclasses import FakeTensorMode

from scalabl_ref import InputError, Noise, adapters, predict
from scalabl_ref.core.config import TARGETS
from scalabl_ref.core.objective import Batch, class_logits
from scalabl_ref.methods import laplace as laplace_module
from scalabl_ref.methods.laplace import (
    CURVATURES,
    FILE,
    JOINT,
    LOGITS_LAYER,
    Curvature,
    Laplace,
    draw_logits,
)
from scalabl_ref.support.tensors import load_tensors, save_tensors
from scalabl_ref.verify import reference

from ..models import CLASSES, tiny_batch, tiny_model
from ..stats import ZTest
from ..tolerances import rounding
from .jacobians import logits_and_jacobians

# A number of these tests is a chain of sums as long as the model is deep: two blocks of some five
# sums over at most 24 terms, and then sums over 64 weights or eigenvalues.
TERMS = 2 * 5 * 24 + 64


def plain(**config):
    return tiny_model(method="mle", **config).double()


def one_token(rows: int, seed: int = 0) -> Batch:
    return dataclasses.replace(
        batch := tiny_batch(rows, seed), tokens=batch.tokens[:, :1], lengths=torch.ones(rows).long()
    )


def part(batch: Batch, rows: list[int]) -> Batch:
    picked = [t[rows] for t in (batch.tokens, batch.lengths, batch.labels, batch.ids)]
    return Batch(*picked, batch.classes)


def jacobians(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (B, C) and their Jacobians by every matrix, (B, C, m, n), from torch.func."""
    parameters = {
        f"{layer}.adapter.{key}": getattr(adapter, key).detach()
        for layer, adapter in adapters(model).items()
        for key in ("A", "B")
    }
    logits, found = logits_and_jacobians(model, batch, parameters)
    return logits, {n.replace(".adapter", ""): J.detach() for n, J in found.items()}


def ggn(logits, J) -> torch.Tensor:
    """Sum over examples of J^T (diag(p) - p p^T) J, (m n, m n)."""
    p = logits.softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("bcp,bcd,bdq->pq", J.flatten(2), curvature, J.flatten(2))


def dense(curvature) -> torch.Tensor:
    """The block of F that a `Curvature` stands for, (m n, m n), row-major in the matrix."""
    u = torch.einsum("ik,jl->ijkl", curvature.left, curvature.right)
    u = u.reshape(len(curvature.left) * len(curvature.right), -1)
    return (u * curvature.values.flatten()) @ u.T


each_kind = pytest.mark.parametrize("kind", CURVATURES)


def close(got, expected, terms: int = TERMS) -> None:
    """To rounding, relative to the largest entry: what the sums of a matrix' entries share."""
    got, expected = (torch.as_tensor(t, dtype=torch.float64) for t in (got, expected))
    assert got.shape == expected.shape
    error, size = (got - expected).abs().max(), expected.abs().max()
    assert error <= rounding(torch.float64, terms) * size, f"{error:.3g} of {size:.3g}"


# --- curvature ------------------------------------------------------------------------------------


@pytest.mark.eq_15
@pytest.mark.eq_16
@pytest.mark.parametrize("layers, count", [("all", 2 * (2 * 7 + 1)), ("last", 2)])
def test_one_token_of_one_example_has_an_exact_kronecker_product(layers, count):
    """Block by block it is the GGN of explicit Jacobians."""
    model, batch = plain(targets=TARGETS), one_token(1)
    curvature = Laplace.fit(model, [batch], layers).curvature
    logits, J = jacobians(model, batch)
    assert len(curvature) == count and "lm_head.B" in curvature
    expected = {name: ggn(logits, J[name]) for name in curvature}
    for name, block in curvature.items():
        if "q_proj" in name or "k_proj" in name:  # a softmax over one key has no gradient
            largest = max(block.abs().max() for block in expected.values())
            assert (expected[name] == 0).all()
            assert dense(block).abs().max() <= rounding(torch.float64, TERMS) * largest
        else:
            close(dense(block), expected[name])


def test_the_query_of_the_last_block_is_exact_for_longer_prompts():
    """Its last token is the only one that reaches the answer."""
    model, batch = plain(targets=("q_proj",)), part(tiny_batch(), [2])
    logits, J = jacobians(model, batch)
    fitted = Laplace.fit(model, [batch], "last", curvature="last").curvature
    assert batch.lengths > 2 and fitted.keys() == {f"layers.1.attn.q_proj.{key}" for key in "AB"}
    for name, block in fitted.items():
        close(dense(block), ggn(logits, J[name]))


@pytest.mark.parametrize("layers", ["all", "last"])
def test_a_frozen_model_has_the_same_curvature(layers):
    model, batch = plain(), tiny_batch()
    laplace = Laplace.fit(model, [batch], layers)
    covariance = laplace.logits(model, batch)[1]
    frozen = Laplace.fit(model.requires_grad_(False), [batch], layers)
    for name, block in laplace.curvature.items():
        close(dense(frozen.curvature[name]), dense(block))
    assert covariance.abs().max() > 0
    close(frozen.logits(model, batch)[1], covariance)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.eq_15
@pytest.mark.eq_16
def test_several_examples_give_the_product_of_their_means():
    """N E[g g^T] x E[a a^T] of the last tokens, from a layer's input and a shift of its output."""
    model, batch = plain(), tiny_batch(5)
    laplace = Laplace.fit(model, [part(batch, [3, 0]), part(batch, [1, 2, 4])], curvature="last")
    assert len(laplace.curvature) == 2 * 5
    for layer, adapter in adapters(model).items():
        A, B = adapter.A.detach(), adapter.B.detach()
        x, logits, J = last_token(model, batch, layer)
        left = adapter.config.scaling**2 * ggn(logits, J[..., None])
        right = x.T @ x / 5
        close(dense(laplace.curvature[f"{layer}.A"]), torch.kron(B.T @ left @ B, right))
        close(dense(laplace.curvature[f"{layer}.B"]), torch.kron(left, A @ right @ A.T))
    expected = logits.log_softmax(-1)[torch.arange(5), batch.labels].sum()
    close(laplace.log_likelihood, expected)


@pytest.mark.eq_15
@pytest.mark.eq_16
def test_expand_is_a_sum_over_tokens():
    """sum of g g^T x mean of a a^T over real tokens: one example, one class, one token a time."""
    model, batch = plain(targets=TARGETS), tiny_batch(4)
    laplace = Laplace.fit(model, [part(batch, [2, 0]), part(batch, [1, 3])])
    assert len(set(batch.lengths.tolist())) > 1  # so that some rows have padding
    for layer, adapter in adapters(model).items():
        c, A, B = adapter.config.scaling, adapter.A.detach(), adapter.B.detach()
        (m, n), tokens = (len(B), A.shape[1]), 0
        left, right = torch.zeros(m, m).double(), torch.zeros(n, n).double()
        for row, length in enumerate(batch.lengths.tolist()):
            one = part(batch, [row])
            one = dataclasses.replace(one, tokens=one.tokens[:, :length])  # without padding
            seen, shift, logits = shifted(model, one, layer)
            log_p = logits.log_softmax(-1)[0]
            for value in log_p:
                [g] = torch.autograd.grad(value, shift, retain_graph=True)
                for token in g.reshape(-1, m):
                    left += value.exp().item() * c * c * torch.outer(token, token)
            for x in seen.reshape(-1, n):
                right += torch.outer(x, x)
                tokens += 1
        assert tokens == (4 if layer == "lm_head" else batch.lengths.sum())
        right /= tokens
        close(dense(laplace.curvature[f"{layer}.A"]), torch.kron(B.T @ left @ B, right))
        close(dense(laplace.curvature[f"{layer}.B"]), torch.kron(left, A @ right @ A.T))


def shifted(model, batch, layer: str):
    """A layer's input, something that is added to its output, and the logits."""
    seen, shift = [], []

    def add(module, inputs, output):
        seen.append(inputs[0].detach())
        shift.append(torch.zeros_like(output, requires_grad=True))
        return output + shift[0]

    with model.get_submodule(layer).register_forward_hook(add):
        logits = class_logits(model, batch, None, padded=True)
    return seen[0], shift[0], logits


@pytest.mark.eq_15
@pytest.mark.eq_16
@pytest.mark.parametrize("layers, examples", [("all", 4), ("last", 4), ("last", 30)])
def test_exact_is_the_ggn_of_explicit_jacobians(layers, examples):
    """With fewer rows than weights, and with more; a batch at a time."""
    model, batch = plain(), tiny_batch(examples)
    laplace = Laplace.fit(
        model, [part(batch, [3, 0]), part(batch, [1, 2, *range(4, examples)])], layers,
        curvature="exact",
    )  # fmt: skip
    logits, J = jacobians(model, batch)
    size = sum(m * n for m, n in laplace.shapes.values())
    assert (3 * examples > size) == (examples == 30) and laplace.curvature.keys() == {JOINT}
    assert len(laplace.curvature[JOINT].left) == size
    close(dense(laplace.curvature[JOINT]), ggn(logits, joined(J, laplace)))


def joined(J, laplace) -> torch.Tensor:
    """Jacobians by all matrices in one column, (B, C, m n, 1)."""
    return torch.cat([J[name].flatten(2) for name in laplace.shapes], 2)[..., None]


def test_an_exact_curvature_that_needs_too_much_memory_is_refused(monkeypatch):
    """Before it is there: of each row as many numbers as there are weights."""
    model, batch = plain(), tiny_batch(4)
    size = sum(m * n for m, n in Laplace.fit(model, [batch]).shapes.values())
    monkeypatch.setattr(laplace_module, "MOST_NUMBERS", 12 * size)
    Laplace.fit(model, [batch], curvature="exact")
    monkeypatch.setattr(laplace_module, "MOST_NUMBERS", 12 * size - 1)
    with pytest.raises(InputError, match=f"exact has at least 12 x {size:,} numbers, more than"):
        Laplace.fit(model, [batch], curvature="exact")
    Laplace.fit(model, [batch])


def last_token(model, batch, layer: str):
    """A layer's input at the last tokens (B, d_in), logits, and their Jacobians by its output there
    (B, C, d_out): those by something that is added to it."""
    shift = torch.zeros(len(batch.labels), len(model.get_submodule(layer).weight)).double()
    shift.requires_grad_()
    at, seen = batch.lengths - 1, []

    def add(module, inputs, output):
        x = inputs[0] if inputs[0].dim() == 3 else inputs[0][:, None]
        rows = torch.arange(len(x)), at.clamp(max=x.shape[1] - 1)
        seen.append(x[rows].detach())
        whole = torch.zeros(*x.shape[:2], output.shape[-1]).double().index_put(rows, shift)
        return output + whole.view(output.shape)

    handle = model.get_submodule(layer).register_forward_hook(add)
    logits = class_logits(model, batch, None, padded=True)
    handle.remove()
    J = [torch.autograd.grad(logits[:, c].sum(), shift, retain_graph=True)[0] for c in range(3)]
    return seen[0], logits.detach(), torch.stack(J, 1)


def test_a_rank_that_suffices_changes_nothing_and_a_smaller_one_leaves_the_prior():
    """Last tokens of four examples: inputs of rank 4, gradients of rank 8, of sides of 16."""
    model, batch = plain(), tiny_batch()
    batches = [part(batch, [i]) for i in range(4)]
    whole, cut, small = (
        Laplace.fit(model, batches, rank=rank, curvature="last") for rank in (None, 8, 1)
    )
    assert whole.curvature["layers.0.attn.q_proj.B"].left.shape == (16, 16)
    assert cut.curvature["layers.0.attn.q_proj.B"].left.shape == (16, 8)
    close(cut.logits(model, batch)[1], whole.logits(model, batch)[1])
    close(cut.log_evidence(), whole.log_evidence())
    variance = small.logits(model, batch)[1] - whole.logits(model, batch)[1]
    assert (variance.diagonal(dim1=1, dim2=2) > 0).all()


# --- the posterior --------------------------------------------------------------------------------


@pytest.mark.eq_17
@pytest.mark.eq_18
@each_kind
@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("precision", [0.01, 1.0, 30.0])
def test_logits_and_evidence_equal_dense_algebra(layers, precision, kind):
    model, batch, other = plain(), tiny_batch(5), tiny_batch(3, seed=1)
    laplace = Laplace.fit(model, [batch], layers, precision=precision, curvature=kind)
    logits, J = jacobians(model, other)
    if kind == "exact":
        J = {JOINT: joined(J, laplace)}
    covariance = torch.zeros(3, 3, 3).double()
    evidence, squares, largest = laplace.log_likelihood, 0.0, 0.0
    for name, block in laplace.curvature.items():
        F = dense(block)
        posterior = F + precision * torch.eye(len(F)).double()
        flat = J[name].flatten(2)
        covariance += flat @ torch.linalg.inv(posterior) @ flat.mT
        evidence += len(F) / 2 * math.log(precision) - float(torch.logdet(posterior)) / 2
        largest = max(largest, float(block.values.max()))
    for name in laplace.shapes:
        layer, _, key = name.rpartition(".")
        squares += float(getattr(adapters(model)[layer], key).detach().square().sum())
    evidence -= precision / 2 * squares
    mean, got = laplace.logits(model, other)
    condition = 1 + largest / precision  # of the matrix that is inverted
    close(mean, logits)
    close(got, covariance, math.ceil(TERMS * condition))
    close(laplace.log_evidence(), evidence)
    close(laplace.squares, squares)


def test_equal_examples_and_three_equal_classes_have_a_posterior_in_closed_form():
    """With B = 0, a head of zeros and N equal examples, logits are c B h and all p are 1 / C.

    F = N c^2 h h^T x (I - 1 1^T / C) / C is a Kronecker product exactly, so with a = |c h|^2 the
    covariance is a / lambda along 1 and a / (lambda + N a / C) across, and the evidence follows.
    """
    model, copies, precision = plain(wake=False, targets=("lm_head",)), 7, 0.4
    with torch.no_grad():
        model.lm_head.weight.zero_()
    batch = part(tiny_batch(), [1] * copies)
    laplace = Laplace.fit(model, [batch], precision=precision)
    h = adapters(model)["lm_head"].A.detach() @ last_token(model, batch, "lm_head")[0][0]
    a = float(h.square().sum()) * adapters(model)["lm_head"].config.scaling ** 2
    one = torch.ones(3, 3).double() / 3
    across = (torch.eye(3).double() - one) * a / (precision + copies * a / 3)
    mean, covariance = laplace.logits(model, part(batch, [0]))
    assert (mean == 0).all()
    close(covariance[0], one * a / precision + across)
    squares = float(adapters(model)["lm_head"].A.detach().square().sum())
    evidence = -copies * math.log(3) - precision * squares / 2
    close(laplace.log_evidence(), evidence - math.log1p(copies * a / 3 / precision))
    # lambda S = 2 v / (lambda + v) with v = N a / C: the positive root of a quadratic.
    v = copies * a / 3
    best = (-squares * v + math.sqrt((squares * v) ** 2 + 8 * squares * v)) / (2 * squares)
    close(laplace.optimise_prior().precision, best)


@pytest.mark.eq_18
@each_kind
def test_the_optimised_prior_has_the_largest_evidence(kind):
    laplace = Laplace.fit(plain(), [tiny_batch(6)], curvature=kind)
    best = laplace.optimise_prior()
    grid = [best.precision * math.exp(step / 8) for step in range(-80, 81)]
    assert max(map(laplace.log_evidence, grid)) == laplace.log_evidence(grid[80])
    effective = sum(
        float(torch.trace(torch.linalg.solve(F + best.precision * torch.eye(len(F)).double(), F)))
        for F in map(dense, laplace.curvature.values())
    )
    close(best.precision * best.squares, effective, TERMS * len(laplace.curvature))
    assert best.log_evidence() > laplace.log_evidence()


def test_a_prior_that_the_evidence_does_not_decide_is_an_error():
    laplace = Laplace.fit(plain(), [tiny_batch()])
    with pytest.raises(InputError, match="no precision of the prior"):
        dataclasses.replace(laplace, squares=0.0).optimise_prior()


def test_the_covariance_is_on_the_jacobians_device():
    """The curvature stays on the CPU. Fake tensors, without numbers, need no such device."""
    block = Curvature(torch.eye(3).double(), torch.eye(4).double(), torch.ones(3, 4).double())
    with FakeTensorMode(allow_non_fake_inputs=True):
        J = torch.zeros(2, 3, 3, 4, dtype=torch.float64, device="cuda")
        covariance = block.covariance(J, 0.5)
    assert covariance.shape == (2, 3, 3) and covariance.device.type == "cuda"


# --- the predictive -------------------------------------------------------------------------------


def test_no_samples_or_a_certain_prior_are_the_mean_model():
    model, batch = plain(), tiny_batch()
    laplace = Laplace.fit(model, [batch])
    expected = predict(model, batch, samples=0).probs
    close(laplace.log_probs(model, batch, 0, seed=0).exp()[0], expected)
    certain = dataclasses.replace(laplace, precision=math.inf)
    assert (certain.logits(model, batch)[1] == 0).all()
    for probs in certain.log_probs(model, batch, 3, seed=0).exp():
        close(probs, expected)
    close(certain.probit(model, batch).exp(), expected)


def test_draws_are_the_noise_of_their_example_through_a_root_of_the_covariance():
    model, batch = plain(), tiny_batch()
    mean, covariance = Laplace.fit(model, [batch]).logits(model, batch)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    draws = draw_logits(mean, covariance, batch.ids, 2, seed=9)
    for i, row in ((0, 0), (1, 3)):
        eps = Noise(9, i).normal(LOGITS_LAYER, torch.tensor([row]), 3)[0]
        close(draws[i, row], mean[row] + root[row] @ eps.double())
    assert max(8 * 10**6, *(a.layer for a in adapters(model).values())) < LOGITS_LAYER


@cache
def wide_logits():
    """Mean (3,) and covariance of one row's logits, and for the first two classes' probabilities
    their means, standard deviations and largest skewness, by quadrature."""
    model, batch = plain(), tiny_batch()
    mean, covariance = (t[1] for t in Laplace.fit(model, [batch]).logits(model, batch))
    nodes, weights = reference.gauss_hermite(40)
    eps, weight = torch.cartesian_prod(*[nodes] * 3), torch.cartesian_prod(*[weights] * 3).prod(1)
    p = (mean + eps @ torch.linalg.cholesky(covariance).T).softmax(-1)[:, :2]
    expected = weight @ p
    sd = (weight @ (p - expected).square()).sqrt()
    return mean, covariance, expected, sd, float((weight @ ((p - expected) / sd) ** 3).abs().max())


def average(seed: int, n: int) -> torch.Tensor:
    """Averages of the probabilities over n / 4 examples and 4 draws, less expectations, in sds."""
    mean, covariance, expected, sd, _ = wide_logits()
    rows = n // 4
    logits = draw_logits(
        mean.expand(rows, -1), covariance.expand(rows, -1, -1), torch.arange(rows), 4, seed
    )
    return (logits.softmax(-1)[..., :2].mean((0, 1)) - expected) / sd


AVERAGE = ZTest(
    "laplace: averaged probabilities", average, n=40_000, count=2, skew=wide_logits()[-1],
    replay=4000, exact=False,
)  # fmt: skip


@pytest.mark.eq_17
def test_the_average_over_draws_is_the_gaussian_integral():
    AVERAGE.check(seed=2)
    mean, _, expected, sd, _ = wide_logits()
    change = (mean.softmax(-1)[:2] - expected).abs() / sd
    assert change.max() > 3 * AVERAGE.smallest(AVERAGE.n)  # so that a lost covariance is seen


def test_probit_is_nearer_to_the_integral_than_the_mean_model():
    model, batch = plain(), tiny_batch()
    laplace = Laplace.fit(model, [batch])
    mean, covariance = laplace.logits(model, batch)
    probs = laplace.probit(model, batch).exp()
    for row in range(len(mean)):
        v = covariance[row].diag().tolist()
        scaled = [m / math.sqrt(1 + math.pi * v[c] / 8) for c, m in enumerate(mean[row].tolist())]
        close(probs[row], torch.tensor(scaled, dtype=torch.float64).softmax(-1))
    expected = wide_logits()[2]
    assert (probs[1, :2] - expected).abs().max() < (mean[1].softmax(-1)[:2] - expected).abs().max()


# --- files and errors -----------------------------------------------------------------------------


@each_kind
def test_it_comes_back_from_its_file(tmp_path, kind):
    """To the bit: in a file's order the layers are not in the model's."""
    model, batch = tiny_model(method="map", prior_std=0.5, targets=TARGETS), tiny_batch()
    laplace = Laplace.fit(model, [batch], curvature=kind)
    assert laplace.precision == 4.0
    laplace.save(tmp_path / "run")
    loaded = Laplace.load(tmp_path / "run")
    assert list(loaded.shapes.items()) == list(laplace.shapes.items())
    for name, curvature in laplace.curvature.items():
        assert all(map(torch.equal, curvature, loaded.curvature[name]))
    assert loaded.log_evidence() == laplace.log_evidence()
    expected = laplace.log_probs(model, batch, 3, seed=1)
    assert torch.equal(loaded.log_probs(model, batch, 3, seed=1), expected)
    assert expected.shape == (3, 4, len(CLASSES)) and expected.dtype == torch.float64


def test_the_whole_head_gives_the_classes_logits():
    """In float32, as a run's adapters are; a trimmed head is the same model."""
    batch = tiny_batch()
    found = [
        Laplace.fit(model, [batch]).logits(model, batch)
        for model in (tiny_model(method="mle", trim=trim, targets=("q_proj",)) for trim in (0, 1))
    ]
    for whole, trimmed in zip(*found, strict=True):
        assert (whole - trimmed).abs().max() <= rounding(torch.float32, TERMS) * whole.abs().max()


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=f"{FILE}: no such file"):
        Laplace.load(tmp_path)
    Laplace.fit(plain(), [tiny_batch()], "last").save(tmp_path)
    tensors, metadata = load_tensors(tmp_path / FILE)

    def written(change, facts=metadata):
        save_tensors(tmp_path / FILE, {**tensors, **change}.items(), facts)
        return Laplace.load(tmp_path)

    with pytest.raises(InputError, match="not written by this program: 'precision'"):
        written({}, {})
    with pytest.raises(InputError, match="its curvature and its matrices differ"):
        written({}, {**metadata, "shapes": '{"lm_head.A": [2, 2]}'})
    with pytest.raises(InputError, match="precision must be positive"):
        written({}, {**metadata, "precision": "-1.0"})
    with pytest.raises(InputError, match=r"lm_head\.A: shapes do not fit"):
        written({"lm_head.A.values": torch.zeros(2, 2)})
    with pytest.raises(InputError, match=r"lm_head\.B: has NaN"):
        written({"lm_head.B.left": tensors["lm_head.B.left"] * math.nan})
    with pytest.raises(InputError, match=r"not written by this program: 'layer\.A\.left'"):
        written({"layer.A.what": torch.zeros(1)})


def test_bad_arguments_are_refused():
    model, batch = plain(), tiny_batch()
    for arguments, message in (
        ({"layers": "first"}, "layers must be one of all, last"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"precision": 0.0}, "precision must be positive"),
        ({"curvature": "reduce"}, "curvature must be one of expand, last, exact, not 'reduce'"),
        ({"curvature": "exact", "rank": 2}, "has no factors to cut to a rank"),
    ):
        with pytest.raises(InputError, match=message):
            Laplace.fit(model, [batch], **arguments)
    with pytest.raises(InputError, match="no examples"):
        Laplace.fit(model, [])
    for method in ("scalabl", "dropout", "point"):
        with pytest.raises(InputError, match="plain LoRA"):
            Laplace.fit(tiny_model(method=method), [batch])
    laplace = Laplace.fit(model, [batch])
    with pytest.raises(InputError, match="samples must not be negative"):
        laplace.log_probs(model, batch, -1, seed=0)
    with pytest.raises(InputError, match="other adapters"):
        laplace.logits(plain(targets=("q_proj",)), batch)
    with pytest.raises(InputError, match="around other weights"):
        laplace.logits(plain(seed=1), batch)
