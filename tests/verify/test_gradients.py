"""`check_grads`: passes what is right, and names the element that is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scalabl_ref import InputError, Noise, subspace_lora_linear
from scalabl_ref.verify import check_grads

AFFINE = ("x", "weight", "bias", "A", "B", "s", "sigma")


def op_inputs() -> dict[str, object]:
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    return {"x": draw(3, 4, 7), "weight": draw(5, 7), "bias": draw(5), "A": draw(2, 7),
            "B": draw(5, 2), "s": draw(2), "sigma": draw(2).exp(), "scaling": 2.0,
            "noise": Noise(1, 2), "layer": 3, "sampling": "token"}  # fmt: skip


@pytest.mark.parametrize("affine", [(), AFFINE])
def test_the_op_passes(affine):
    checks = check_grads(subspace_lora_linear, op_inputs(), affine)
    assert [check.name for check in checks] == list(AFFINE)
    assert all(check.passed and check.element is None for check in checks), checks


class Wrong(torch.autograd.Function):
    """The identity, whose gradient is off by a factor at one place."""

    @staticmethod
    def forward(ctx, value: Tensor, index: tuple[int, ...], factor: float) -> Tensor:
        ctx.where = index, factor
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index, factor), grad = ctx.where, grad.clone()
        grad[index] *= factor
        return grad, None, None


@pytest.mark.parametrize(
    "name, index", [("x", (2, 3, 6)), ("A", (0, 0)), ("sigma", (1,)), ("weight", (4, 2))]
)
@pytest.mark.parametrize("factor, affine", [(0.0, ()), (1 + 1e-7, ()), (1 + 1e-9, AFFINE)])
def test_a_wrong_element_is_named(name, index, factor, affine):
    """An error of 1e-7 of one derivative is seen, and 1e-9 where the op is affine."""

    def faulty(**inputs):
        return subspace_lora_linear(**{**inputs, name: Wrong.apply(inputs[name], index, factor)})

    for check in check_grads(faulty, op_inputs(), affine):
        assert check.passed == (check.name != name)
        if check.name == name:
            assert check.element == index
            assert check.got == pytest.approx(factor * check.expected, rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("function", [torch.exp, torch.sin, torch.tanh, lambda x: x.pow(5) / x])
def test_smooth_functions_pass_and_their_faults_do_not(function):
    x = torch.linspace(0.5, 3, 11, dtype=torch.float64)
    (right,) = check_grads(lambda x: function(x), {"x": x})
    (wrong,) = check_grads(lambda x: function(Wrong.apply(x, (4,), 1 + 1e-6)), {"x": x})
    assert right.passed and not wrong.passed and wrong.element == (4,)


def test_a_steep_function_passes_by_the_bound_on_truncation():
    x = torch.linspace(0.5, 3, 11, dtype=torch.float64)
    (check,) = check_grads(lambda x: torch.sin(40 * x), {"x": x})
    assert 0.1 < check.worst <= 1  # the bound is twice the error's estimate


def test_no_number_is_no_success():
    """In the gradient, or in a value on the way of some directions alone."""
    x = torch.ones(3, dtype=torch.float64)
    (check,) = check_grads(lambda x: Wrong.apply(x, (1,), math.nan) * 2, {"x": x})
    assert not check.passed

    def broken(x, far):
        return torch.where((x - 1).sum().abs() > far, torch.nan, x)

    def passes(far, directions):
        return check_grads(broken, {"x": x, "far": far}, directions=directions)[0].passed

    # Three directions do not come as far as .014, the fourth does.
    assert passes(1.0, 4) and passes(0.014, 3) and not passes(0.014, 4) and not passes(0.002, 4)


def test_what_cannot_be_checked_is_refused():
    x = torch.ones(3, dtype=torch.float64)
    with pytest.raises(InputError, match="x must be float64"):
        check_grads(lambda x: x, {"x": x.float()})
    with pytest.raises(InputError, match="must return one float64"):
        check_grads(lambda x: x.float(), {"x": x})
    with pytest.raises(InputError, match="another result"):
        check_grads(lambda x: x * torch.rand(3, dtype=torch.float64), {"x": x})


def test_an_input_without_a_gradient_fails_alone():
    """Frozen, or cut off by mistake: the others are checked all the same."""
    x = torch.ones(3, dtype=torch.float64)
    for function in (lambda y, x: x + y.detach(), lambda y, x: y.detach() * x):
        y, right = check_grads(function, {"y": x, "x": x})
        assert (y.name, y.worst, y.element) == ("y", math.inf, None) and not y.passed
        assert y.note == "the function gives no gradient of it"
        assert right.name == "x" and right.passed and right.note == ""
    (alone,) = check_grads(lambda y: y.detach(), {"y": x})  # nothing has a gradient
    assert alone.note and not alone.passed
