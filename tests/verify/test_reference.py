"""The slow truth has tests of its own: quadrature, and its gradients against differences."""

from __future__ import annotations

import inspect
import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalabl_ref.fast import ops
from scalabl_ref.verify import reference

from ..strategies import op_cases
from ..tolerances import rounding

NAMES = ("x", "weight", "A", "B", "s", "sigma")


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
    assert inspect.signature(reference.expectation).parameters["nodes"].default == 32


def test_quadrature_integrates_polynomials_exactly():
    nodes, weights = reference.gauss_hermite(20)
    for power in range(12):
        exact = 0 if power % 2 else math.prod(range(1, power, 2))  # E eps^power
        assert abs(float(weights @ nodes**power) - exact) <= rounding(torch.float64, 2000) * 1e4


@given(
    st.lists(
        st.tuples(st.floats(-2, 2), st.floats(0.01, 1.0), st.floats(-1, 1)), min_size=1, max_size=2
    )
)
@settings(max_examples=30)
def test_expectations_are_exact_to_ten_digits(columns):
    """E exp(a . s~) = exp(a . s + |a sigma|^2 / 2), in one and two dimensions."""
    s, sigma, a = (torch.tensor(c, dtype=torch.float64) for c in zip(*columns, strict=True))
    slopes = a.tolist()
    exact = math.exp(a @ s + (a * sigma).square().sum() / 2)
    got = reference.expectation(
        lambda at: math.exp(sum(p * q for p, q in zip(slopes, at, strict=True))), s, sigma
    )
    assert abs(got - exact) <= 1e-10 * exact


def test_expectations_of_a_softmax_have_converged_to_ten_digits():
    def nll(at):
        return math.log(1 + math.exp(-1.5 * at[0] + 0.5 * at[1]))

    s, sigma = torch.tensor([0.8, 0.3]), torch.tensor([0.6, 0.4])
    coarse, fine = (reference.expectation(nll, s, sigma, nodes) for nodes in (32, 48))
    assert abs(coarse - fine) <= 1e-10


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
    """First derivatives by hand; their own derivatives are those of `ops`' formulas."""

    @staticmethod
    def forward(ctx, case, grad_y, *tensors):
        ctx.case = case
        ctx.save_for_backward(grad_y, *tensors)
        out = reference.subspace_lora_linear_gradients(grad_y, **arguments(case, tensors))
        return tuple(out[name] for name in NAMES)

    @staticmethod
    def backward(ctx, *upstream):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            a = arguments(ctx.case, leaves[1:])
            draws = ops._draws(a["x"].shape[:-1], a["noise"], a["layer"], a["sampling"],
                               a["groups"])  # fmt: skip
            t = ops.Inputs(*(a[n] for n in ("x", "weight", "bias", "A", "B", "s", "sigma")),
                           a["scaling"])  # fmt: skip
            first = ops._composed_gradients(leaves[0], t, draws, [True] * 2 + [False] + [True] * 4)
            first = [g for g in first if g is not None]
            return None, *torch.autograd.grad(first, leaves, upstream, materialize_grads=True)


def arguments(case, tensors) -> dict:
    return {**case.arguments(), **dict(zip(NAMES, tensors, strict=True))}


@given(op_cases(dtype=torch.float64, widest=6))
@settings(max_examples=10)
def test_gradients_by_hand_equal_differences(case):
    """gradcheck: the derivation against central differences of the loops; gradgradcheck: the
    loops' derivation, differenced, against the second derivatives that `ops` gives."""
    assume(case.x.numel())
    tensors = [getattr(case, name).double().clone().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *t: ByHand.apply(case, *t), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: ByHand.apply(case, *t), tensors, fast_mode=True)
