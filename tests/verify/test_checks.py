"""The self-audit passes on what is right, and names what is wrong in an op with a fault."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from scalabl_ref import InputError, Noise, fast, subspace_lora_linear
from scalabl_ref.app import cli
from scalabl_ref.core import philox
from scalabl_ref.core.adapter import SubspaceAdapter
from scalabl_ref.core.layer import subspace_lora_linear as plain_op
from scalabl_ref.fast import native
from scalabl_ref.fast.rows import PackedBlock
from scalabl_ref.verify import checks
from scalabl_ref.verify.all_checks import load_op, run, verify
from scalabl_ref.verify.check import FALSE_FAILURE, Check
from scalabl_ref.verify.checks import (
    OP_CHECKS,
    OWN_CHECKS,
    gradient_scores,
    moment_scores,
    moments,
)

from ..stats import ZTest

CPU = torch.device("cpu")


def failed(results) -> set[str]:
    return {result.name for result in results if not result.passed}


@pytest.mark.slow
def test_what_is_right_passes_without_the_core(monkeypatch):
    """With it: `test_command`."""
    monkeypatch.setattr(native, "core", lambda: None)
    results = verify()
    assert failed(results) == set(), [r for r in results if not r.passed]
    assert {result.name for result in results if not result.cases} == {"core's loops"}


@pytest.mark.slow
def test_what_is_right_passes_on_the_plain_bodies():
    with fast.plain():
        assert failed(results := verify()) == set(), [r for r in results if not r.passed]


# The statistics of verify, under other seeds; verify itself checks them at the seeds it has.
ZTest(
    "verify: moments",
    lambda seed, n: moment_scores(Noise(seed, 0), n) / n**0.5,
    n=2**20,
    rate=FALSE_FAILURE,
    count=6,
    replay=2**15,
    exact=False,
)
ZTest(
    "verify: unbiased",
    lambda seed, n: gradient_scores(subspace_lora_linear, CPU, Noise(seed, 0), n) / n**0.5,
    n=100_000,
    rate=FALSE_FAILURE,
    count=2,
    replay=2**13,
    exact=False,
)


class DropsEps(torch.autograd.Function):
    """The identity on s + sigma eps whose gradient of sigma forgets eps."""

    @staticmethod
    def forward(ctx, s, sigma, eps):
        return s + sigma * eps

    @staticmethod
    def backward(ctx, grad):
        while grad.dim() > 1:
            grad = grad.sum(0)
        return grad, grad, None


def faulty(change=lambda a: None, combine=None, bias=True, after=lambda y: y, **fixed):
    """An op with one fault: its arguments changed, or its formula."""

    def op(x, weight, bias_, A, B, s, sigma, scaling, noise, layer=0, sampling="example",
           groups=None):  # fmt: skip
        a = {"x": x, "weight": weight, "bias": bias_ if bias else None, "A": A, "B": B, "s": s,
             "sigma": sigma, "scaling": scaling, "noise": noise, "layer": layer,
             "sampling": sampling, "groups": groups, **fixed}  # fmt: skip
        a.update(change(a) or {})
        if combine is not None:
            return combine(a)
        return after(subspace_lora_linear(**a))

    return op


def without_base_gradient(a):
    """grad x lacks W' g."""
    with torch.no_grad():
        base = F.linear(a["x"], a["weight"], a["bias"])
    update = subspace_lora_linear(**{**a, "bias": None, "weight": torch.zeros_like(a["weight"])})
    return base + update


def eps_forgotten(a):
    if a["noise"] is None or a["x"].dim() < 2 or a["sampling"] != "batch":
        return subspace_lora_linear(**a)
    eps = a["noise"].normal(a["layer"], 1, len(a["s"]))[0].to(a["x"].dtype)
    scale = DropsEps.apply(a["s"], a["sigma"], eps)
    update = F.linear(F.linear(a["x"], a["A"]) * (a["scaling"] * scale), a["B"])
    return F.linear(a["x"], a["weight"], a["bias"]) + update


def previous_draw(a):
    noise = a["noise"]
    return noise and {"noise": Noise(noise.seed, noise.draw - 1)}


FAULTS = {
    "variance for standard deviation": (faulty(lambda a: {"sigma": a["sigma"] ** 2}), "forward"),
    "scaling left out": (faulty(scaling=1.0), "forward"),
    "scaling squared": (faulty(lambda a: {"scaling": a["scaling"] ** 2}), "mean model"),
    "noise left out": (faulty(noise=None), "a draw is a function"),
    "noise without s": (faulty(lambda a: {"s": 0 * a["s"]}), "gradient of s"),
    "one draw for the batch": (faulty(sampling="batch"), "rows are independent"),
    "a draw for every token": (faulty(sampling="token", groups=None), "rows are independent"),
    "group ids ignored": (faulty(groups=None), "forward"),
    "layer ignored": (faulty(layer=0), "a draw is a function"),
    "draw off by one": (faulty(previous_draw), "forward"),
    "bias left out": (faulty(bias=False), "mean model"),
    "s in place of log s": (faulty(lambda a: {"s": a["s"].abs().log()}), "affine in s"),
    "ranks in the opposite order": (
        faulty(lambda a: {k: a[k].flip(-1) for k in ("s", "B")} | {"A": a["A"].flip(0)}),
        "ranks add up",
    ),
    "A detached": (faulty(lambda a: {"A": a["A"].detach()}), "gradient of A"),
    "sigma detached": (faulty(lambda a: {"sigma": a["sigma"].detach()}), "unbiased"),
    "grad x without the base": (faulty(combine=without_base_gradient), "adjoint"),
    "grad sigma without eps": (faulty(combine=eps_forgotten), "gradient of sigma"),
    "computed in bfloat16": (
        faulty(lambda a: {"x": a["x"].bfloat16().to(a["x"].dtype)}), "linear in x"
    ),
    "nonlinear in x": (faulty(after=torch.tanh), "linear in B"),
    "wrong shape": (faulty(after=lambda y: y[..., :-1]), "forward"),
}  # fmt: skip


def test_the_worst_element_is_named():
    """A failed check says the case, the element, what it got and what is right."""

    def op(x, *arguments, **named):
        y = subspace_lora_linear(x, *arguments, **named)
        if y.shape == (2, 3, 9):
            y = y + 5.0 * F.one_hot(torch.tensor(4), 9) * F.one_hot(torch.tensor(1), 3)[:, None]
        return y

    (forward,) = (result for result in verify(op) if result.name == "forward")
    found = re.fullmatch(
        r"float(32|64) x \(2, 3, 16\), d_out 9, rank 8, sampling \w+ with groups, layer 17, "
        r".*: element \([01], 1, 4\): got (\S+), expected (\S+)",
        forward.note,
    )
    assert found, forward.note
    assert float(found[2]) - float(found[3]) == pytest.approx(5.0, abs=1e-4)


def last_bit(body):
    """The last number of what the body gives, one unit in the last place too large."""

    def wrong(*arguments):
        *others, last = body(*arguments)
        return *others, last + 1 if isinstance(last, int) else math.nextafter(last, math.inf)

    return wrong


def next_normal(body):
    def wrong(*arguments):
        z = body(*arguments).clone()
        z[-1, -1] = z[-1, -1].nextafter(torch.tensor(9.0))
        return z

    return wrong


NUMBERS = r"got (nan|-?[\d.e-]+), expected (-?[\d.e-]+)"
# A fault in a body, the check, and its words: the body, the coordinates, the element.
WORDS = {
    "philox4x32": (
        philox, "philox4x32", last_bit, "Philox",
        r"plain Python: PhiloxAnswer\(rounds=\d+, counter=.*, key=.*\): element \(3,\): ",
    ),
    "box_muller": (
        philox, "box_muller", last_bit, "Philox",
        r"plain Python: BoxMullerAnswer\(words=\(\d+, \d+\), .*\): element \(1,\): ",
    ),
    "normals": (
        Noise, "normals", next_normal, "normals",
        r"tests\S+: seed 0, draw 0, layer 0, group 77: element \(8,\): ",
    ),
    "fast normals": (
        fast, None, next_normal, "fast noise",
        r"fast body: seed 0, draw 0 \+ .*, layer 0, groups .*, rank 1: element \(4, 0\): ",
    ),
    "op": (
        checks, "op_and_gradients", lambda body: lambda *a: body(*a) | {
            "sigma": body(*a)["sigma"] * (2 if SubspaceAdapter.op is plain_op else 1)}, "fast op",
        r"sigma of float\d\d x \(.*\), d_out \d+, .*: element \(\d+,\): ",
    ),
    "model": (
        checks, "logits_and_gradients", lambda body: lambda device, sampling, call: [
            t * (2 if SubspaceAdapter.op is plain_op and i == 2 and "mask" in call else 1)
            for i, t in enumerate(body(device, sampling, call))], "fast model",
        r"gradient 2, sampling \w+, called with mask, last_only: element \(.*\): ",
    ),
    "moments": (
        Noise, "normals", lambda body: lambda *a: body(*a) + 1, "moments",
        r"third moment, in standard errors: ",
    ),
    "forward KL": (
        checks, "kl_forward", lambda body: lambda *a: body(*a) + 1, "KL",
        r"forward: s \[0.0, 0.0\], sigma \[1.0, 1.0\]: ",
    ),
    "official KL": (
        checks, "kl_official", lambda body: lambda *a: body(*a) * (1 + 1e-9), "KL",
        r"official: s \[.*\], sigma \[.*\]: ",
    ),
    "no number": (
        checks, "kl_official", lambda body: lambda *a: math.nan, "KL",
        r"official: check value: ",
    ),
    "mixture": (
        checks, "predictive", lambda body: lambda logits: body(logits)._replace(
            entropy=body(logits).entropy + F.one_hot(torch.tensor(3), 11)), "mixture",
        r"entropy: element \(3,\): ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_a_failure_says_body_place_and_values(name, monkeypatch):
    owner, attribute, fault, check, words = WORDS[name]
    if attribute is None:
        wrong = staticmethod(fault(fast.FAST[0].__func__))
        monkeypatch.setattr(fast, "FAST", (wrong, *fast.FAST[1:]))
    elif owner is Noise:
        monkeypatch.setattr(Noise, attribute, staticmethod(fault(getattr(Noise, attribute))))
    else:
        monkeypatch.setattr(owner, attribute, fault(getattr(owner, attribute)))
    (check,) = (own for own in OWN_CHECKS if own.name == check)
    result = run(check, None, CPU)
    assert not result.passed and result.cases
    found = re.fullmatch(words + NUMBERS, result.note)
    assert found and found[1] != found[2], result.note


def test_a_frozen_weight_needs_no_gradient():
    """Of weight and bias alone; and not if other cases have a gradient."""

    def frozen(*names, but=None):
        signature = inspect.signature(subspace_lora_linear)

        def op(*arguments, **named):
            a = signature.bind(*arguments, **named).arguments
            if len(a["x"]) != but:
                a.update({name: a[name].detach() for name in names if a[name] is not None})
            return subspace_lora_linear(**a)

        return verify(op)

    results = frozen("weight", "bias")
    assert failed(results) == set()
    left = {result.name for result in results if not result.cases}
    assert left == {"gradient of weight", "gradient of bias"}
    assert failed(frozen("weight", but=4)) == {"gradient of weight"}
    assert failed(frozen("s")) == {"gradient of s", "unbiased"}


def test_the_example_of_the_help_passes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(SystemExit):
        cli.main(["verify", "--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    start, end = (next(i for i, line in enumerate(lines) if line.startswith(f"    {word}"))
                  for word in ("from", "scalabl"))  # fmt: skip
    Path("mine.py").write_text(textwrap.dedent("\n".join(lines[start:end])))
    assert cli.main(["verify", "--against", "mine:op"]) == 0
    assert "all 19 checks passed" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_the_property_it_breaks(name):
    op, expected = FAULTS[name]
    assert expected in failed(verify(op))


@pytest.mark.parametrize(
    "change", [lambda z: z + 0.02, lambda z: 1.02 * z, lambda z: z.clamp(-2.5, 2.5)]
)
def test_normals_that_are_not_are_caught(change, monkeypatch):
    original = Noise.normal
    monkeypatch.setattr(Noise, "normal", lambda *a: change(original(*a)))
    assert max(moments(subspace_lora_linear, CPU)) > 1


@pytest.mark.parametrize("errors", [[], [0.5, math.nan, 0.25], [0.5, 1.5]])
def test_nothing_compared_and_no_number_are_failures(errors):
    result = run(Check("c", "(1)", lambda op, device: iter(errors)), subspace_lora_linear, CPU)
    assert not result.passed and result.cases == len(errors)


class WithoutResidual(PackedBlock):
    def forward(self, x, ctx):
        return super().forward(x, ctx) - (x if ctx.last is None else x[ctx.last.chosen])


# A fault in the fast body of each hook, and the checks that must see it.
FAST_FAULTS = {
    "normals": (lambda body: lambda *a: body(*a).nextafter(torch.tensor(9.0)), {"fast noise"}),
    "words": (lambda body: lambda *a: body(*a) ^ 1, {"fast noise"}),
    "op": (
        lambda body: lambda x, W, b, A, B, s, sigma, *a, **k: (
            body(x, W, b, A, B, s, sigma.detach(), *a, **k)
        ),
        {"fast op", "fast model"},
    ),
    "run": (lambda body: lambda *a: body(*a) * (1 + 1e-9), {"fast model"}),
    "block": (lambda body: WithoutResidual, {"fast model"}),
    "activation": (
        lambda body: lambda gate, up: body(gate, up * (1 + 1e-9)), {"fast model"}
    ),
    "product": (lambda body: lambda *a: body(*a) * (1 + 1e-9), {"fast model"}),
    "forward": (lambda body: lambda norm, x: body(norm, x) * (1 + 1e-9), {"fast model"}),
}  # fmt: skip


@pytest.mark.parametrize("hook", FAST_FAULTS)
def test_a_fault_in_a_fast_body_is_caught(hook, monkeypatch):
    """By the checks against the plain bodies, whichever bodies are in place."""
    fault, expected = FAST_FAULTS[hook]
    checks = [check for check in OWN_CHECKS if check.name.startswith("fast ")]
    assert len(checks) == 3 and FAST_FAULTS.keys() == {name for _, name, _ in fast.HOOKS}
    wrong = []
    for _, name, body in fast.HOOKS:
        if name == hook:
            faulty_body = fault(getattr(body, "__func__", body))
            body = staticmethod(faulty_body) if isinstance(body, staticmethod) else faulty_body
        wrong.append(body)
    for bodies in (fast.FAST, fast.PLAIN):
        with fast.in_place(bodies):
            assert not failed(run(check, None, CPU) for check in checks)
            with monkeypatch.context() as patch:
                patch.setattr(fast, "FAST", wrong)
                assert failed(run(check, None, CPU) for check in checks) >= expected


@pytest.mark.skipif(native.core() is None, reason="the native core was not built")
@pytest.mark.parametrize("call", ["plain_forward", "plain_backward"])
def test_a_fault_in_the_loops_of_the_core_is_caught(call, monkeypatch):
    """The faulty loop returns without a result; the fast passes of the same core stay right."""
    core = native.core()
    check = next(check for check in OWN_CHECKS if check.name == "core's loops")
    assert not failed([run(check, None, CPU)])

    def update(**fields):
        op = core.update(**fields)
        return SimpleNamespace(**{
            name: (lambda *a, **k: None) if name == call else getattr(op, name)
            for name in ("forward", "backward", "plain_forward", "plain_backward")
        })  # fmt: skip

    faulty_core = SimpleNamespace(cuda="", normals=core.normals, few_rows=core.few_rows,
                                  update=update)  # fmt: skip
    monkeypatch.setattr(native, "core", lambda: faulty_core)
    assert failed([run(check, None, CPU)])


def test_every_check_of_the_op_catches_something():
    """No check is there for show: each fails for at least one of the faults."""
    caught = set()
    for op, _ in FAULTS.values():
        caught |= failed(verify(op))
    assert caught == {check.name for check in OP_CHECKS}


def test_command(tmp_path, monkeypatch, capsys):
    assert cli.main(["verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(check["passed"] for check in report["checks"]) and report["path"]
    left = {check["name"] for check in report["checks"] if not check["cases"]}
    assert left == ({"core's loops"} if native.core() is None else set())
    (tmp_path / "theirs.py").write_text(
        "from scalabl_ref import subspace_lora_linear as ours\n"
        "def op(*a, **k):\n    k['scaling'] = 1.0\n    return ours(*a, **k)\n"
        "def broken(*a, **k):\n    raise RuntimeError('no such kernel')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["verify", "--against", "theirs:op"]) == 1
    out, err = capsys.readouterr()
    assert "theirs.op" in out and "failed: forward: (1a)" in err
    assert cli.main(["verify", "--against", "theirs:broken"]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
    for name in ("theirs", "theirs:none", "nowhere:op"):
        assert cli.main(["verify", "--against", name]) == 2
    with pytest.raises(InputError, match="is not callable"):
        load_op("math:pi")


WANTED = (
    "; it must take x, weight, bias, A, B, s, sigma, scaling, noise, layer, sampling, groups, in"
)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("x, weight, bias, A, B, s, sigma, scaling, noise, layer=0, sampling=''",
         "got an unexpected keyword argument 'groups'"),
        ("x, weight, bias, A, B, s, sigma, scaling, noise, layer, sampling, groups, more",
         "missing a required argument: 'more'"),
        ("x, weight, bias, A, B, s, sigma, scaling, noise, *, layer=0, sampling='', groups=None",
         "too many positional arguments"),
        ("x, weight, bias, B, A, s, sigma, scaling, noise, layer=0, sampling='', groups=None",
         "B is in another place"),
    ],
)  # fmt: skip
def test_another_signature_is_refused_at_once(tmp_path, monkeypatch, capsys, arguments, problem):
    """And not by every check, one after the other."""
    (tmp_path / "mistaken.py").write_text(f"def op({arguments}): raise AssertionError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mistaken", raising=False)
    assert cli.main(["verify", "--against", "mistaken:op"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"--against mistaken:op: {problem}{WANTED}" in err


@pytest.mark.parametrize("arguments", ["*given, **more", "x, weight, *rest, **more"])
def test_an_op_that_takes_anything_is_not_refused(tmp_path, monkeypatch, arguments):
    (tmp_path / "anything.py").write_text(f"def op({arguments}): return 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "anything", raising=False)
    assert load_op("anything:op")(1, 2) == 1
