"""The op against its slow twin, and the properties that need no twin."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalabl_ref import InputError, Noise, subspace_lora_linear
from scalabl_ref.core import layer
from scalabl_ref.core.layer import SAMPLING
from scalabl_ref.fast import native, ops
from scalabl_ref.fast.designs import Design, DesignedNoise
from scalabl_ref.verify import checks as verify
from scalabl_ref.verify import reference

from .. import models
from ..strategies import DTYPES, OpCase, op_cases
from ..tolerances import no_worse_than, op_bound, op_sizes, rounding

TENSORS = ("x", "weight", "bias", "A", "B", "s", "sigma")
needs_core = pytest.mark.skipif(
    native.core() is None, reason=f"native core: {native.native_status()['reason']}"
)


def double_leaf(tensor):
    return None if tensor is None else tensor.detach().double().clone().requires_grad_()


def call(case: OpCase, function=subspace_lora_linear, **changes):
    """The op on the device under test, its result back on the CPU."""
    arguments = {**case.arguments(), **changes}
    placed = {
        name: value.to(models.DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    return function(**placed).cpu()


def call_op(**arguments):
    return call(OpCase(**arguments))


def composition(*arguments, **named):
    """The op with the native core out of the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "core", lambda: None)
        return subspace_lora_linear(*arguments, **named)


def plain_loops(*arguments, **named):
    """The op with the loops of csrc/plain.cpp in place of the fast native passes."""
    loops = verify.plain_loops(native.core())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "core", lambda: loops)
        return subspace_lora_linear(*arguments, **named)


BODIES = [
    pytest.param(composition, id="composition"),
    pytest.param(subspace_lora_linear, id="native", marks=needs_core),
    pytest.param(plain_loops, id="plain loops", marks=needs_core),
]


@pytest.mark.eq_1
@pytest.mark.parametrize("body", BODIES)
@given(op_cases(joint=True, dtypes=DTYPES))
def test_equals_the_reference(body, case):
    expected = call(case, reference.subspace_lora_linear)
    out = call(case, body)
    assert out.dtype == case.x.dtype and out.shape == expected.shape
    assert ((out.double() - expected).abs() <= op_bound(case)).all()


@given(op_cases())
def test_sigma_zero_is_the_mean_model(case):
    still = call(case, sigma=torch.zeros_like(case.sigma))
    assert torch.equal(still, call(case, noise=None))


@pytest.mark.eq_1
@given(op_cases())
def test_mean_is_plain_lora_with_diag_s_A(case):
    merged = case.s[:, None].double() * case.A.double()
    lora = case.x.double() @ (case.weight.double() + case.scaling * case.B.double() @ merged).T
    if case.bias is not None:
        lora = lora + case.bias.double()
    assert ((call(case, noise=None).double() - lora).abs() <= op_bound(case)).all()


@pytest.mark.parametrize("body", BODIES)
@given(op_cases(dtype=torch.float64))
def test_gradients_equal_those_through_the_definition(body, case):
    """The same noise as an explicit matrix, one row at a time, in float64."""
    assume(case.x.numel())
    leaves = {name: double_leaf(getattr(case, name)) for name in TENSORS}
    out = call(case, body, **leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    got = torch.autograd.grad((out * direction).sum(), wanted, materialize_grads=True)

    eps = case.row_noise()  # (rows, r)
    x = leaves["x"].reshape(-1, leaves["x"].shape[-1])
    rows = [
        case.scaling * leaves["B"] @ torch.diag(leaves["s"] + leaves["sigma"] * e) @ leaves["A"] @ v
        + leaves["weight"] @ v
        for v, e in zip(x, eps, strict=True)
    ]
    literal = (torch.stack(rows) * direction.reshape(len(rows), -1)).sum()
    if leaves["bias"] is not None:
        literal = literal + (leaves["bias"] * direction.reshape(len(rows), -1)).sum()
    expected = torch.autograd.grad(literal, wanted, materialize_grads=True)
    for a, b in zip(got, expected, strict=True):
        scale = b.abs().max().clamp(min=1.0)
        assert (a - b).abs().max() <= rounding(torch.float64, 1000) * scale


@pytest.mark.eq_1
@pytest.mark.parametrize("body", BODIES)
@given(op_cases(joint=True, dtype=torch.float64, widest=9))
def test_gradients_equal_the_reference(body, case):
    """Every gradient against the derivation by hand, in loops."""
    check_against_the_reference(body, case)


@given(op_cases(joint=True, dtype=torch.float64, widest=9), st.integers(1, 5))
def test_dependent_draws_are_the_noise_of_their_design(case, size):
    assume(case.noise is not None)
    design = (Design.ANTITHETIC, 2) if size == 1 else (Design.LATIN, size)
    noise = DesignedNoise(case.noise.seed, case.noise.draw % 2**30, *design)

    def eps_of_group(noise, layer, group, rank, later):
        return noise.normal(layer, torch.tensor([group]), rank, torch.tensor([later]))[0].tolist()

    with pytest.MonkeyPatch.context() as patch:  # the loops, with the normals of the design
        patch.setattr(reference, "eps_of_group", eps_of_group)
        check_against_the_reference(subspace_lora_linear, replace(case, noise=noise))


def check_against_the_reference(body, case):
    direction = direction_of(case)
    expected = reference.subspace_lora_linear_gradients(direction, **case.arguments())
    expected["y"] = call(case, reference.subspace_lora_linear)
    got = outputs_and_gradients(case, body, direction)
    sizes = op_sizes(case, direction)
    for name in got:
        if expected[name].numel():
            bound = rounding(torch.float64, 2 * case.longest_sum()) * sizes[name].max()
            stored = rounding(got[name].dtype, 1) / 2 * expected[name].abs()  # rounded once
            assert ((got[name] - expected[name]).abs() <= bound + stored).all(), name


@pytest.mark.parametrize("body", BODIES)
@given(op_cases(sampling="example"), st.data())
def test_a_draw_follows_the_group_and_not_the_place(body, case, data):
    count = case.x.shape[0]
    order = torch.tensor(data.draw(st.permutations(range(count))), dtype=torch.int64)
    plain = call(case, body, groups=None)
    moved = call(case, body, x=case.x[order], groups=order)
    bound = op_bound(case)
    error = (moved.double() - plain[order].double()).abs()
    assert (error <= 2 * bound.amax()).all() if error.numel() else True


@pytest.mark.parametrize(
    "identity",
    [
        verify.linear_in_x,
        verify.linear_in_B,
        verify.affine_in_s,
        verify.ranks_add_up,
        verify.rows_are_independent,
        verify.one_row_a_group,
    ],
    ids=lambda identity: identity.__name__,
)
@given(op_cases())
def test_algebra(identity, case):
    """Two ways to the same y, for whatever shape, stride, sampling and groups."""
    assume(case.x.numel() and case.A.dtype == case.x.dtype)
    left, right = identity(call_op, case)
    size = verify.sizes(case, direction_of(case))["y"]
    bound = rounding(case.x.dtype, 8 * verify.terms(case))
    assert verify.ratio(left, right, size, bound) <= 1


@given(op_cases(), st.integers(0, 2**31))
def test_the_backward_pass_is_the_adjoint(case, seed):
    """<u, J v> = <J' u, v>, J being linear in x."""
    assume(case.x.numel())
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(*case.x.shape[:-1], len(case.weight), generator=generator).to(case.x)
    leaf = case.x.detach().clone().requires_grad_()
    (pulled,) = torch.autograd.grad(call(case, x=leaf), leaf, u)
    left = (u.double() * call(case, bias=None).double()).sum()
    right = (pulled.double() * case.x.double()).sum()
    size = (u.double().abs() * verify.sizes(case, u)["y"]).sum()
    assert abs(left - right) <= rounding(case.x.dtype, 4 * verify.terms(case)) * size


@pytest.mark.parametrize("body", BODIES)
def test_sampling_groups_share_what_they_should(body):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 8, generator=generator).expand(3, 2, 8)
    A, B = torch.randn(4, 8, generator=generator), torch.randn(5, 4, generator=generator)
    weight, ones = torch.zeros(5, 8), torch.ones(4)

    def rows(sampling):
        out = body(x, weight, None, A, B, ones, ones, 1.0, Noise(3, 1), sampling=sampling)
        return len({tuple(row) for row in out.reshape(6, 5).tolist()})

    assert [rows(sampling) for sampling in SAMPLING] == [1, 3, 6]


@pytest.mark.parametrize("body", BODIES)
def test_adapters_stay_float32_on_a_bfloat16_base(body):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, generator=generator).bfloat16()
    A, B = torch.randn(2, 16, generator=generator), torch.randn(3, 2, generator=generator)
    ones, weight = torch.ones(2), torch.zeros(3, 16, dtype=torch.bfloat16)
    out = body(x, weight, None, A, B, ones, ones, 1.0, None)
    assert out.dtype == torch.bfloat16
    # W = 0, so the only rounding to bfloat16 is that of the sum: half a unit in the last place.
    exact = x.double() @ A.double().T @ B.double().T
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert ((out.double() - exact).abs() <= 1.01 * half_ulp * exact.abs()).all()


def test_without_more_the_layer_is_0_and_examples_have_a_draw_each():
    case = wide_case((3, 2), 6, 5, 2)
    short = [getattr(case, name) for name in TENSORS] + [case.scaling, Noise(3, 4)]
    y = subspace_lora_linear(*short)
    assert torch.equal(y, subspace_lora_linear(*short, 0, "example", None))
    assert not torch.equal(y, subspace_lora_linear(*short, 1))
    assert not torch.equal(y, subspace_lora_linear(*short, 0, "token"))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": "row"}, "sampling must be one of"),
        ({"groups": torch.arange(3)}, "groups of shape"),
        ({"groups": torch.tensor([0.5, 1.5])}, "groups must be integers"),
        ({"layer": -1}, "layer must be in"),
        ({"layer": 2**32 - 1}, "layer must be in"),
        ({"layer": 0.5}, "layer must be an integer"),
        ({"x": torch.zeros(2, 3, 6)}, r"weight must have shape \(5, 6\), not \(5, 4\)"),
        ({"weight": torch.zeros(5, 8)}, r"weight must have shape \(5, 4\), not \(5, 8\)"),
        ({"bias": torch.zeros(1)}, r"bias must have shape \(5,\), not \(1,\)"),
        ({"A": torch.zeros(2, 6)}, r"A must have shape \(2, 4\), not \(2, 6\)"),
        ({"A": torch.zeros(1, 4)}, r"B must have shape \(5, 1\), not \(5, 2\)"),
        ({"B": torch.zeros(9, 2)}, r"B must have shape \(5, 2\), not \(9, 2\)"),
        ({"B": torch.zeros(1, 5, 2)}, r"B must have shape \(5, 2\), not \(1, 5, 2\)"),
        ({"s": torch.zeros(1)}, r"s must have shape \(2,\), not \(1,\)"),
        ({"sigma": torch.zeros(2, 1)}, r"sigma must have shape \(2,\), not \(2, 1\)"),
    ],
)
def test_bad_arguments_are_named(body, change, message):
    """Before anything is read: the native core is told addresses, and takes shapes on trust."""
    case = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(5, 4), "bias": torch.zeros(5)}
    case |= {"A": torch.zeros(2, 4), "B": torch.zeros(5, 2)}
    case |= {"s": torch.zeros(2), "sigma": torch.zeros(2), "scaling": 1.0, "noise": Noise(0, 0)}
    body(**case)
    with pytest.raises(ValueError, match=message):
        body(**{**case, **change})


@pytest.mark.parametrize("body", BODIES)
def test_ids_that_change_before_the_backward_pass_are_noticed(body):
    """A backward pass draws again: with other ids its gradients would be another function's."""
    case, groups = wide_case((4, 3), 12, 10, 4), torch.arange(4)
    leaf = case.B.clone().requires_grad_()
    out = call(case, body, B=leaf, groups=groups, sampling="example")
    groups += 5
    if body is composition:  # keeps what it drew
        expected = call(case, body, B=leaf, groups=torch.arange(4), sampling="example")
        got, want = (torch.autograd.grad(y.sum(), leaf)[0] for y in (out, expected))
        assert torch.equal(got, want)
    elif models.DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), leaf)


# --- The native core ------------------------------------------------------------------------------


def leaves_of(case: OpCase, wanted=TENSORS) -> dict:
    """The case's tensors as leaves that keep their strides; those in `wanted` require gradients."""
    given_ = {name: getattr(case, name) for name in TENSORS}
    return {
        name: t if t is None else t.detach().requires_grad_(name in wanted)
        for name, t in given_.items()
    }


def outputs_and_gradients(case: OpCase, body, direction, dtype=None, wanted=TENSORS):
    """y and the gradients of every tensor in `wanted`, by name."""
    leaves = leaves_of(case, wanted)
    if dtype is not None:
        leaves = {n: t if t is None else t.detach().to(dtype) for n, t in leaves.items()}
        leaves = {n: t if t is None else t.requires_grad_(n in wanted) for n, t in leaves.items()}
    y = call(case, body, **leaves)
    sources = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(
        y, list(sources.values()), direction.to(y.dtype), materialize_grads=True
    )
    return {"y": y.detach(), **dict(zip(sources, gradients, strict=True))}


def direction_of(case: OpCase) -> torch.Tensor:
    shape = (*case.x.shape[:-1], case.weight.shape[0])
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator).to(case.x.dtype)


@needs_core
@given(
    op_cases(joint=True, dtypes=DTYPES, widest=90), st.sets(st.sampled_from(TENSORS), min_size=1)
)
@settings(max_examples=300)
def test_native_is_as_accurate_as_the_composition(case, wanted):
    """For the output and every gradient asked for: at most twice the error, against float64."""
    wanted = wanted - ({"bias"} if case.bias is None else set())
    assume(wanted - (set() if case.noise else {"sigma"}))  # the mean does not depend on sigma
    direction = direction_of(case)
    truth = outputs_and_gradients(case, composition, direction, torch.float64, wanted)
    plain = outputs_and_gradients(case, composition, direction, None, wanted)
    ours = outputs_and_gradients(case, subspace_lora_linear, direction, None, wanted)
    assert ours.keys() == truth.keys()
    sizes = op_sizes(case, direction)
    for name, value in ours.items():
        expected = truth[name]
        assert value.dtype == plain[name].dtype and value.shape == expected.shape, name
        if expected.numel():
            error = (value.double() - expected).abs().max()
            terms = case.longest_sum()
            allowed = no_worse_than(plain[name], expected, value.dtype, terms, sizes[name])
            assert error <= allowed, name


def wide_case(rows=(3, 50), d_in=1500, d_out=1100, rank=8, dtype=torch.float32, seed=0) -> OpCase:
    """Large enough for several blocks, panels and threads."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g).to(dtype)

    return OpCase(
        x=normal(*rows, d_in), weight=normal(d_out, d_in) / 40, bias=None,
        A=normal(rank, d_in) / 40, B=normal(d_out, rank), s=normal(rank).exp(),
        sigma=normal(rank).exp(), scaling=2.0, noise=Noise(3, 4), layer=5, sampling="token",
        groups=None, draws=None,
    )  # fmt: skip


def assert_near(got, expected, allowed, about: str) -> None:
    """A failure names the place of the first wrong element, and both values there."""
    wrong = (~((got.double() - expected).abs() <= allowed)).nonzero()  # NaN is wrong too
    for first in map(tuple, wrong[:1].tolist()):
        values = f"{got[first].item():.9g}, expected {expected[first].item():.9g}"
        raise AssertionError(f"{about}: {len(wrong)} wrong, the first at {first}: {values}")


@needs_core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 13, 256])
def test_large_shapes_are_as_accurate(dtype, rank):
    case = wide_case(dtype=dtype, rank=rank)
    direction = direction_of(case)
    truth = outputs_and_gradients(case, composition, direction, torch.float64)
    plain = outputs_and_gradients(case, composition, direction)
    ours = outputs_and_gradients(case, subspace_lora_linear, direction)
    sizes = op_sizes(case, direction)
    shapes = f"{tuple(case.x.shape)} to {len(case.weight)}, rank {rank}"
    for name, expected in truth.items():
        # So many elements leave little to luck: one rounding is all that is allowed beside.
        terms = case.longest_sum() if dtype == torch.float64 else 1
        allowed = no_worse_than(plain[name], expected, dtype, terms, sizes[name])
        about = f"{name}, {dtype}, {shapes}, {native.core().isa()}"
        assert_near(ours[name], expected, allowed, about)


@needs_core
def test_result_does_not_depend_on_the_threads(threads):
    """Bit for bit, what the core adds: y starts from zero, grad_x too, for W = 0."""
    case = wide_case()
    case = replace(case, weight=torch.zeros_like(case.weight))
    direction = direction_of(case)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(outputs_and_gradients(case, subspace_lora_linear, direction))
    for other in results[1:]:
        for name, value in results[0].items():
            if name != "weight":  # that one is PyTorch's
                assert torch.equal(other[name], value), name


@needs_core
def test_every_instruction_set_is_as_accurate(isa):
    for dtype in DTYPES:
        test_large_shapes_are_as_accurate(dtype, 13)
    with pytest.raises(ValueError, match="instruction set unknown"):
        native.core().use_isa("abacus")


@needs_core
def test_native_body_runs_where_it_should(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the composition ran")

    monkeypatch.setattr(layer, "subspace_lora_linear", refuse)
    case = wide_case((2, 3), 20, 10)
    outputs_and_gradients(case, subspace_lora_linear, direction_of(case))
    with pytest.raises(AssertionError, match="the composition ran"):
        call(case, A=case.A.double(), B=case.B.double())  # adapters wider than x


@needs_core
def test_nothing_large_is_kept_for_the_backward_pass():
    """Beyond references to the inputs, h of (rows, r)."""
    case = wide_case()
    leaves = leaves_of(case, ("x", "A", "B", "s", "sigma"))
    own = {t.untyped_storage().data_ptr() for t in leaves.values() if t is not None}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(case, **leaves)
    assert kept == [150 * 8 * 4]


@needs_core
@given(op_cases(joint=True, dtype=torch.float64))
def test_gradients_that_will_be_differentiated_are_the_same_ones(case):
    direction = direction_of(case)
    named = {n: leaf for n, leaf in leaves_of(case).items() if leaf is not None}
    leaves = list(named.values())
    once = torch.autograd.grad(call(case, **named), leaves, direction)
    more = torch.autograd.grad(call(case, **named), leaves, direction, create_graph=True)
    sizes = op_sizes(case, direction)
    for name, a, b in zip(named, once, more, strict=True):
        if a.numel():
            bound = rounding(torch.float64, 2 * case.longest_sum()) * sizes[name].max()
            stored = rounding(a.dtype, 1) * a.abs()  # rounded once, to either side
            assert ((a - b).abs() <= bound + stored).all(), name


@needs_core
@given(op_cases(joint=True, dtype=torch.float64, widest=6))
@settings(max_examples=10)
def test_second_derivatives(case):
    assume(case.x.numel())
    tensors = [double_leaf(getattr(case, name)) for name in ("x", "weight", "A", "B", "s", "sigma")]

    def function(x, weight, A, B, s, sigma):
        return call(case, x=x, weight=weight, A=A, B=B, s=s, sigma=sigma)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# --- The rest of PyTorch --------------------------------------------------------------------------


def op_arguments(case: OpCase, wanted=()) -> tuple:
    shape, *rest = case.x.shape[:-1], case.noise, case.layer, case.sampling
    draws = ops.draws_of(shape, *rest, case.groups, case.draws)
    return (*leaves_of(case, wanted).values(), case.scaling, *draws)


@pytest.mark.parametrize("groups", [None, torch.tensor([7, 2**32 - 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(groups, dtype):
    case = replace(wide_case((2, 3), 12, 10, 4, dtype), groups=groups, sampling="example")
    registered = torch.ops.scalabl_ref
    arguments = op_arguments(case, ("x", "A", "B", "s", "sigma"))
    torch.library.opcheck(registered.subspace_lora_linear.default, arguments)
    wanted = [True, False, False, True, True, True, True]
    backward = (direction_of(case), *op_arguments(case), wanted)
    torch.library.opcheck(registered.subspace_lora_linear_backward.default, backward)
    ids = torch.tensor([[1, 2, 3]])
    for draws in (None, torch.tensor([[0, 7, 0]])):
        for design in ((0, 1), (1, 2), (2, 3)):
            numbers = (-1, 2, *design, 4, 5)
            torch.library.opcheck(registered.normals.default, (ids, draws, *numbers))


@pytest.mark.parametrize("body", ["native", "composition"])
def test_compiles_whole(body, monkeypatch):
    """One graph, for any draw: a new Noise is not a new program (after the second)."""
    if body == "composition":
        monkeypatch.setattr(native, "core", lambda: None)
    case = replace(
        wide_case((2, 3), 12, 10, 4), sampling="example", groups=torch.tensor([2**32 - 1, 4])
    )
    names = ("x", "A", "B", "s", "sigma")
    direction = direction_of(case)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(subspace_lora_linear, fullgraph=True, backend=backend)
    trained = torch.compile(subspace_lora_linear, fullgraph=True, backend="aot_eager")
    for draw in range(6):
        noise = Noise(2**64 - 1 - draw, draw)
        expected = call(case, noise=noise)
        assert torch.equal(call(case, compiled, noise=noise), expected)
        leaves = leaves_of(case, names)
        eager = torch.autograd.grad(
            call(case, noise=noise, **leaves), [leaves[n] for n in names], direction
        )
        got = torch.autograd.grad(
            call(case, trained, noise=noise, **leaves), [leaves[n] for n in names], direction
        )
        for name, a, b in zip(names, got, eager, strict=True):
            assert (a - b).abs().max() <= rounding(torch.float32, 64) * b.abs().max(), name
    assert len(graphs) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
def test_compiles_with_inductor():
    case = wide_case((2, 3), 12, 10, 4)
    compiled = torch.compile(subspace_lora_linear, fullgraph=True)
    for draw in range(3):
        noise = Noise(0, draw)
        leaf = case.A.clone().requires_grad_()
        out = call(case, compiled, A=leaf, noise=noise)
        error = (out - call(case, noise=noise)).abs().max()
        assert error <= rounding(torch.float32, 64) * out.abs().max()
        assert torch.autograd.grad(out.sum(), leaf)[0].abs().sum() > 0


@pytest.mark.parametrize("body", BODIES)
def test_autocast_rounds_the_base_and_not_the_adapter(body):
    case = wide_case((2, 3), 64, 10, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(case, body)
    low = {n: getattr(case, n).bfloat16() for n in ("x", "weight")}
    assert out.dtype == torch.bfloat16 and torch.equal(out, call(case, body, **low))
    biased = replace(case, bias=torch.randn(10, generator=torch.Generator().manual_seed(1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(biased, body)
        wide = call(biased, body, **{n: getattr(biased, n).double() for n in TENSORS})
    low["bias"] = biased.bias.bfloat16()
    assert out.dtype == torch.bfloat16 and torch.equal(out, call(biased, body, **low))
    assert wide.dtype == torch.float64  # which autocast leaves alone
    leaves = leaves_of(case, ("x", "A"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(case, body, **leaves)
    for gradient in torch.autograd.grad(out.sum(), [leaves["x"], leaves["A"]]):
        assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


def test_per_example_gradients_by_vmap_equal_a_loop():
    """torch.func.vmap(grad): each example with the group of its own."""
    case = wide_case((5, 3), 12, 10, 4)
    ids = torch.tensor([9, 0, 9, 4, 2**31])

    def loss(A, B, s, sigma, x, group):
        y = call(case, x=x, A=A, B=B, s=s, sigma=sigma, sampling="example", groups=group)
        return y.square().sum()

    own = (case.A, case.B, case.s, case.sigma)
    arguments = (case.x[:, None], ids[:, None])
    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    batched = torch.func.vmap(gradient, in_dims=(None, None, None, None, 0, 0))(*own, *arguments)
    for i in range(5):
        single = gradient(*own, *(a[i] for a in arguments))
        for a, b in zip(batched, single, strict=True):
            assert (a[i] - b).abs().max() <= rounding(torch.float32, 256) * b.abs().max()


def test_vmap_over_group_ids_gives_independent_draws():
    case = wide_case((2, 3), 12, 10, 4)
    ids = torch.arange(8).view(4, 2)

    def draw(groups):
        return call(case, sampling="example", groups=groups)

    drawn = torch.func.vmap(draw)(ids)
    each = torch.arange(24).view(4, 2, 3)
    last = torch.func.vmap(draw, in_dims=2)(each.permute(1, 2, 0))
    assert torch.equal(last, torch.func.vmap(draw)(each))
    for i in range(4):
        error = (drawn[i] - draw(ids[i])).abs().max()
        assert error <= rounding(torch.float32, 64) * drawn.abs().max()
    assert len({float(value) for value in drawn[:, 0, 0, 0]}) == 4


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_equals_reverse_mode():
    case = wide_case((2, 3), 12, 10, 4)
    tangent = torch.randn(case.A.shape, generator=torch.Generator().manual_seed(0))
    _, pushed = torch.func.jvp(lambda A: call(case, A=A), (case.A,), (tangent,))
    leaf = case.A.clone().requires_grad_()
    direction = direction_of(case)
    (pulled,) = torch.autograd.grad(call(case, A=leaf), leaf, direction)
    a, b = (pushed * direction).sum(), (pulled * tangent).sum()
    assert abs(a - b) <= rounding(torch.float32, 256) * pushed.abs().max() * 100
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.A, tangent)
        out = torch.autograd.forward_ad.unpack_dual(call(case, A=dual))
        assert (out.tangent - pushed).abs().max() <= rounding(
            torch.float32, 64
        ) * pushed.abs().max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_gradient_modes_give_the_same_numbers(mode):
    case = wide_case((2, 3), 12, 10, 4)
    expected = call(case)
    with mode():
        out = call(case, **leaves_of(case, ("A", "B")))
    assert torch.equal(out, expected)
    assert out.requires_grad == (mode is contextlib.nullcontext)


def test_half_precision_conversions_are_exact(threads):
    """Through the op with W = 0, A = B = 1: every float16 and bfloat16, and what rounds to them."""
    one = torch.ones(1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(2**16).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        x = every[:, None]
        out = subspace_lora_linear(
            x, torch.zeros(1, 1, dtype=dtype), None, one, one, one[0], 0 * one[0], 1.0, None
        )
        assert torch.equal(out[:, 0], every + 0)
        scale = torch.tensor([1.0 + 2.0**-7 * 0.7])  # falls between, on every side
        out = subspace_lora_linear(
            x, torch.zeros(1, 1, dtype=dtype), None, one, one, scale, 0 * scale, 1.0, None
        )
        assert torch.equal(out[:, 0], (every.float() * scale).to(dtype))


def unserved(t, noise=None, groups=None, draws=None):
    return ops.unserved(native.core(), t, noise, groups, draws)


@needs_core
def test_tensors_of_another_device_never_reach_the_core():
    case = wide_case((2, 3), 12, 10, 4)
    for name in ("weight", "A", "B", "s", "sigma"):
        elsewhere = {name: getattr(case, name).to("meta")}
        t = ops.Operands(*({**vars(case), **elsewhere}[n] for n in (*TENSORS, "scaling")))
        assert unserved(t)
    assert not unserved(ops.Operands(*(vars(case)[n] for n in (*TENSORS, "scaling"))))


@needs_core
def test_what_the_core_does_not_serve_is_left_to_the_composition():
    case = wide_case((2, 3), 12, 10, 4)
    bias, low = torch.zeros(10), torch.float16
    t = ops.Operands(*({**vars(case), "bias": bias}[n] for n in (*TENSORS, "scaling")))
    assert not unserved(t)
    for name in ("weight", "bias", "A", "B", "s", "sigma"):
        assert "dtypes" in unserved(t._replace(**{name: getattr(t, name).to(low)}))
    narrow = {name: getattr(t, name).to(low) for name in ("A", "B", "s", "sigma")}
    assert "dtypes" in unserved(t._replace(**narrow))
    number = {n: v.to(torch.complex64) for n, v in t._asdict().items() if n != "scaling"}
    assert "dtypes" in unserved(t._replace(**number))
    for rank in (0, 1):
        assert bool(unserved(t._replace(A=t.A[:rank], B=t.B[:, :rank]))) == (rank == 0)

    class Other(torch.Tensor):
        pass

    for name in ("x", "weight", "A", "B", "s", "sigma"):
        other = getattr(t, name).as_subclass(Other)
        assert "kind of tensor" in unserved(t._replace(**{name: other}))
    ids = torch.arange(2)
    assert not unserved(t, groups=ids, draws=ids)
    assert "kind of tensor" in unserved(t, groups=ids.as_subclass(Other))
    assert "kind of tensor" in unserved(t, draws=ids.as_subclass(Other))
    assert unserved(t, noise=DesignedNoise(1, 2)) == "a design of draws"


@pytest.mark.parametrize("body", BODIES)
def test_any_strides_will_do(body):
    case = wide_case((2, 3), 12, 10, 4, torch.float64)
    case = replace(case, sampling="example", groups=torch.tensor([7, 4]))
    wide = {n: torch.stack((getattr(case, n), 1 + getattr(case, n)), 1)[:, 0]
            for n in ("s", "sigma", "groups")}  # fmt: skip
    for name in ("x", "A", "B"):  # neighbours in memory are neighbours in a column
        wide[name] = getattr(case, name).transpose(0, -1).contiguous().transpose(0, -1)
        assert wide[name].stride(-1) != 1
    direction = direction_of(case)
    plain, sizes = outputs_and_gradients(case, body, direction), op_sizes(case, direction)
    for changes in (wide, {"groups": case.groups.int()}):
        strided = outputs_and_gradients(replace(case, **changes), body, direction)
        for name, value in plain.items():
            bound = rounding(torch.float64, 2 * case.longest_sum()) * sizes[name].max()
            assert (strided[name] - value).abs().max() <= bound, name


@needs_core
@pytest.mark.parametrize("base", [torch.float64, torch.bfloat16, torch.float16])
def test_registered_gradients_have_the_dtypes_of_their_inputs(base):
    """And are as near as that to those of the numbers themselves."""
    own = torch.float32
    case = replace(wide_case((2, 3), 12, 10, 4), bias=torch.zeros(10))
    dtypes = {name: base if name in ("x", "weight", "bias") else own for name in TENSORS}
    case = replace(case, **{name: getattr(case, name).to(dtypes[name]) for name in TENSORS})
    backward, direction = torch.ops.scalabl_ref.subspace_lora_linear_backward, direction_of(case)
    got = backward(direction, *op_arguments(case), [True] * 7)
    sizes = op_sizes(case, direction)
    expected = reference.subspace_lora_linear_gradients(direction, **case.arguments())
    for name, gradient in zip(TENSORS, got, strict=True):
        assert gradient.dtype == dtypes[name], name
        error = (gradient.double() - expected[name]).abs().max()
        worst = max(torch.finfo(torch.promote_types(base, torch.float32)).eps,
                    torch.finfo(dtypes[name]).eps)  # fmt: skip
        assert error <= case.longest_sum() * worst * sizes[name].max(), name


@needs_core
@pytest.mark.parametrize("rank", [256, 257])
def test_ranks_beyond_the_cores_take_the_composition(rank):
    case = wide_case((2, 3), 12, 10, rank, torch.float64)
    t = ops.Operands(*(vars(case)[n] for n in (*TENSORS, "scaling")))
    assert unserved(t) == ("rank" if rank > 256 else "")
    error = (call(case) - call(case, reference.subspace_lora_linear)).abs()
    assert (error <= op_bound(case)).all()


@needs_core
def test_the_core_names_what_is_wrong():
    case = wide_case((2, 3), 12, 10, 4)
    top = 2**32 - 1 - case.noise.draw
    for groups, draws in (([0, -1], [0, 0]), ([0, 2**32], [0, 0]), ([0, 5], [0, top + 1])):
        good = {"groups": torch.tensor([0, 2**32 - 1]), "draws": torch.tensor([0, top])}
        call(case, sampling="example", **good)
        bad = {"groups": torch.tensor(groups), "draws": torch.tensor(draws)}
        with pytest.raises(InputError, match="group id|draw"):
            call(case, sampling="example", **bad)
