"""The slow truth has tests of its own: noise, quadrature, and gradients against differences."""

from __future__ import annotations

import ast
import inspect
import math
import struct
from decimal import Decimal
from pathlib import Path

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from scalabl_ref import Noise, philox4x32
from scalabl_ref.fast import ops
from scalabl_ref.verify import reference

from ..exact import exact_normals
from ..strategies import op_cases
from ..tolerances import rounding

NAMES = ("x", "weight", "A", "B", "s", "sigma")
WORDS = st.integers(0, 2**32 - 1)
MATH = 7 * 2.0**-53  # relative error of reference.box_muller, which its docstring derives
DEFINITION = 11 * 2.0**-53  # of the package's, which docs/conformance.md derives


# --- noise ---------------------------------------------------------------------------------------


@given(WORDS, WORDS)
@example(0, 0)
@example(2**32 - 1, 2**32 - 1)
@example(2**32 - 1, 2**30)
@example(0, 2**31 + 1)
@example(2**31, 3 * 2**29)
def test_normals_are_the_exact_mathematics(a, b):
    for got, exact in zip(reference.box_muller(a, b), exact_normals(a, b), strict=True):
        assert abs(Decimal(got) - exact) <= Decimal(MATH) * abs(exact)


def same_normal(ours: float, theirs: float, double: float) -> bool:
    """Whether two float32 normals are equal, or neighbours about a tie that `double` is close to.

    double: `ours` before it was rounded.
    """
    tie = (ours + theirs) / 2
    close = abs(double - tie) <= (MATH + DEFINITION) * abs(tie)
    return ours == theirs or (close and abs(ours - theirs) <= 2.0**-23 * abs(tie))


def test_the_noise_is_that_of_the_package():
    """2^17 normals. Unequal bits are expected in one normal out of about 2^28."""
    seed, draw, layer = 2**64 - 12345, 2**32 - 7, 2**32 - 2
    groups = 2**32 - 1 - 1_000_003 * torch.arange(2**12)
    theirs = Noise(seed, draw).normal(layer, groups, 32)
    key = [seed % 2**32, seed // 2**32]
    for group, row in zip(groups.tolist(), theirs.tolist(), strict=True):
        for k in range(0, 32, 2):
            words = reference.philox4x32([k // 4, group, layer, draw], key)[k % 4 :][:2]
            for i, double in enumerate(reference.box_muller(*words)):
                ours = reference.normal(seed, draw, layer, group, k + i)
                assert ours == struct.unpack("f", struct.pack("f", double))[0]
                assert same_normal(ours, row[k + i], double), (group, k + i)


def test_neighbours_count_as_equal_near_a_tie_alone():
    below, above = 1.0, 1.0 + 2.0**-23
    assert same_normal(below, above, 1.0 + 2.0**-24)
    assert same_normal(above, below, 1.0 + 2.0**-24 + 2.0**-49)
    assert not same_normal(above, below, 1.0 + 2.0**-24 + 2.0**-48)
    assert not same_normal(below, above + 2.0**-23, 1.0 + 2.0**-23)


@given(st.lists(WORDS, min_size=4, max_size=4), st.lists(WORDS, min_size=2, max_size=2),
       st.integers(1, 16))  # fmt: skip
def test_words_are_those_of_the_package(counter, key, rounds):
    assert tuple(reference.philox4x32(counter, key, rounds)) == philox4x32(counter, key, rounds)


def test_draws_are_added_to_the_noises_own():
    now, later = Noise(5, 6), Noise(5, 9)
    eps = reference.eps_of_group(now, 2, 11, 7, later=3)
    assert eps == reference.eps_of_group(later, 2, 11, 7) != reference.eps_of_group(now, 2, 11, 7)
    assert reference.eps_of_group(None, 2, 11, 7) == [0.0] * 7


def test_the_reference_owes_the_package_nothing():
    """Nothing of the package is imported when it runs."""
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in tree.body if isinstance(node, ast.Import)
                for name in node.names}  # fmt: skip
    assert modules == {"__future__", "itertools", "math", "struct", "fractions", "collections.abc",
                       "typing", "torch"}  # fmt: skip


# --- the layer and the prediction ----------------------------------------------------------------


@given(op_cases(dtype=torch.float32))
@settings(max_examples=10)
def test_narrow_numbers_are_widened_before_anything_else(case):
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for n, v in case.arguments().items()}  # fmt: skip
    narrow_y = reference.subspace_lora_linear(**case.arguments())
    assert torch.equal(narrow_y, reference.subspace_lora_linear(**wide))
    got, expected = (
        reference.subspace_lora_linear_gradients(torch.ones_like(y), **a)
        for y, a in ((narrow_y.float(), case.arguments()), (narrow_y, wide))
    )
    assert all(torch.equal(got[name], expected[name]) for name in got)
    if narrow_y.numel():
        logits = narrow_y.float().reshape(1, -1, narrow_y.shape[-1])
        assert reference.predictive(logits) == reference.predictive(logits.double())


def test_logits_far_apart_are_no_trouble():
    far = torch.tensor([[[1e4, -1e4, 0.0]], [[1e4, -1e4, 0.0]]])
    assert reference.predictive(far) == {
        "probs": [[1.0, 0.0, 0.0]], "entropy": [0.0], "expected_entropy": [0.0],
        "mutual_information": [0.0],
    }  # fmt: skip
    loss, nll, kl = reference.elbo(far[0], torch.tensor([2]), [], 1.0, 1.0, 1)
    assert (loss, nll, kl) == (1e4, 1e4, 0.0)


def test_the_group_of_a_row_is_a_number():
    groups = torch.tensor([[7, 8], [9, 10]])
    rows = [reference.group_of_row(r, (2, 2, 3), "example", groups) for r in range(12)]
    assert rows == [7] * 3 + [8] * 3 + [9] * 3 + [10] * 3 and type(rows[0]) is int


def test_defaults_are_those_of_the_op():
    ours = inspect.signature(ops.subspace_lora_linear).parameters
    for fn in (reference.subspace_lora_linear, reference.subspace_lora_linear_gradients):
        for name in ("layer", "sampling", "groups"):
            assert inspect.signature(fn).parameters[name].default == ours[name].default
    defaults = (ours[name].default for name in ("layer", "sampling", "groups"))
    assert tuple(defaults) == (0, "example", None)


def test_quadrature_integrates_polynomials_exactly():
    nodes, weights = reference.gauss_hermite(20)
    for power in range(12):
        exact = 0 if power % 2 else math.prod(range(1, power, 2))  # E eps^power
        assert abs(float(weights @ nodes**power) - exact) <= rounding(torch.float64, 2000) * 1e4


class ByHand(torch.autograd.Function):
    """The reference as autograd sees it: its own forward and, below, its own backward."""

    @staticmethod
    def forward(ctx, case, *tensors):
        ctx.case = case
        ctx.save_for_backward(*tensors)
        return reference.subspace_lora_linear(**arguments(case, tensors))

    @staticmethod
    def backward(ctx, grad_y):
        return None, *ByHandGradients.apply(ctx.case, grad_y, *ctx.saved_tensors)


class ByHandGradients(torch.autograd.Function):
    """First derivatives by hand; their own derivatives are those of `composed`."""

    @staticmethod
    def forward(ctx, case, grad_y, *tensors):
        ctx.case = case
        ctx.save_for_backward(grad_y, *tensors)
        out = reference.subspace_lora_linear_gradients(grad_y, **arguments(case, tensors))
        return tuple(out[name] for name in NAMES)

    @staticmethod
    def backward(ctx, *upstream):
        with torch.enable_grad():
            grad_y, *leaves = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            y = composed(ctx.case, *leaves)
            first = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
            every = torch.autograd.grad(first, [grad_y, *leaves], upstream, materialize_grads=True)
            return None, *every


def composed(case, x, weight, A, B, s, sigma):
    """Equation (1) in PyTorch, for autograd, with the reference's noise in every row."""
    lead = x.shape[:-1]
    groups = [reference.group_of_row(row, tuple(lead), case.sampling, case.groups)
              for row in range(lead.numel())]  # fmt: skip
    eps = [reference.eps_of_group(case.noise, case.layer, group, len(s)) for group in groups]
    eps = torch.tensor(eps, dtype=torch.float64).reshape(*lead, len(s))
    return x @ weight.T + case.scaling * (x @ A.T * (s + sigma * eps)) @ B.T


def arguments(case, tensors) -> dict:
    return {**case.arguments(), **dict(zip(NAMES, tensors, strict=True))}


@given(op_cases(dtype=torch.float64, widest=6))
@settings(max_examples=10)
def test_gradients_by_hand_equal_differences(case):
    """gradcheck: the derivation against central differences of the loops; gradgradcheck: the
    loops' derivation, differenced, against autograd's second derivatives of equation (1)."""
    assume(case.x.numel())
    tensors = [getattr(case, name).double().clone().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *t: ByHand.apply(case, *t), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: ByHand.apply(case, *t), tensors, fast_mode=True)
