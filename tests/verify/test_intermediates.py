"""Values on the way to a case's outputs: right ones pass, and the first wrong one is named."""

from __future__ import annotations

import json

import pytest
import torch

from scalabl_ref import InputError, Noise, fast
from scalabl_ref.app import cli
from scalabl_ref.core.objective import Batch, class_logits
from scalabl_ref.model.attach import Linear
from scalabl_ref.support.tensors import save_tensors
from scalabl_ref.verify.conformance import grade_output
from scalabl_ref.verify.faults import FAULTS
from scalabl_ref.verify.intermediates import compare, intermediates
from scalabl_ref.verify.level_checks import adapted, training_step
from scalabl_ref.verify.vectors import vectors

CASES = {vector.id: vector for vector in vectors()}
OPS = [id for id in CASES if id.startswith("op-")]
STEPS = [id for id in CASES if id.startswith("step-")]


def graded(name, values, tmp_path, precision="float64"):
    save_tensors(tmp_path / "values.safetensors", values.items())
    return compare(name, tmp_path / "values.safetensors", precision)


def first_wrong(name, values, tmp_path, precision="float64"):
    return next((v.name for v in graded(name, values, tmp_path, precision) if v.problem), None)


@pytest.mark.parametrize("name", OPS)
def test_the_letters_of_the_op_are_derivatives(name, tmp_path):
    """d, dh and ds by autograd, from (1a) alone; then the op's outputs, which the kit has."""
    vector, expected = CASES[name], intermediates(name)
    t, p, letters = vector.inputs, vector.parameters, ["eps", "h", "f", "u"]
    x = t["x"].flatten(0, -2)
    eps = expected["eps"].value
    values = {"eps": eps, "h": x @ t["A"].T, "f": p["scaling"] * (t["s"] + t["sigma"] * eps)}
    f, h = (values[n].clone().requires_grad_() for n in "fh")
    u = f * h
    if "grad_y" in t:
        g = t["grad_y"].flatten(0, -2)
        dh, df, d = torch.autograd.grad(u @ t["B"].T, (h, f, u), g)
        values |= {"d": d, "dh": dh, "ds": p["scaling"] * df}
        letters += ["d", "dh", "ds"]
    values |= {"u": u.detach(), **{n: out.value for n, out in vector.outputs.items()}}
    assert list(expected) == [*letters, *vector.outputs] and set(values) == set(expected)
    found = graded(name, values, tmp_path)
    assert [v for v in found if v.problem] == [] and {v.name for v in found} == set(values)


def test_eps_of_the_op_is_that_of_the_package(tmp_path):
    """Groups given and numbered: a row of the first dimension has the eps of its group."""
    for name in (n for n in OPS if n.startswith("op-forward-example")):
        p, t = CASES[name].parameters, CASES[name].inputs
        n = len(t["x"])
        groups = t.get("groups", torch.arange(n))
        eps = Noise(int(p["seed"]), p["draw"]).normal(p["layer"], groups, len(t["s"])).double()
        rows = t["x"].shape[:-1].numel() // n
        assert first_wrong(name, {"eps": eps.repeat_interleave(rows, 0)}, tmp_path) is None


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in STEPS if name != "step-three"])
def test_the_package_on_the_way_through_its_model(name, precision, tmp_path):
    """Inputs and outputs of the package's own layers, and the outputs of its trainer."""
    dtype, values = getattr(torch, precision), {}
    p, t = CASES[name].parameters, CASES[name].inputs
    t = {n: v.to(dtype) if v.is_floating_point() else v for n, v in t.items()}
    with fast.plain(), torch.no_grad():
        model, _ = adapted(p, t)
        for layer, module in model.named_modules():
            if isinstance(module, Linear):

                def keep(_, given, y, layer=layer):
                    values.update({f"{layer}.x": given[0], f"{layer}.y": y})

                module.register_forward_hook(keep)
        classes = torch.arange(len(t["lm_head.weight"]))
        batch = Batch(t["tokens"], t["lengths"], t["labels"], t["ids"], classes)
        class_logits(model, batch, Noise(int(p["seed"]), p["draw"]))
    values |= {n: v.reshape(len(t["ids"]), -1) for n, v in values.items() if "lm_head" in n}
    values |= training_step(name, p, t)
    found = graded(
        name, {n: v.detach().contiguous() for n, v in values.items()}, tmp_path, precision
    )
    assert [v for v in found if v.problem] == []
    missing = {v.name.rpartition(".")[2] for v in found if v.error is None}
    assert missing == {"eps", "scales"} and len(found) > 100


FIRST = {
    "group off by one": "layers.0.attn.q_proj.eps",
    "log s for s": "layers.0.attn.q_proj.scales",
    "the last column, though it is padding": "lm_head.x",
    "KL in the other direction": "kl",
    "step: beta left out": "loss",
    "dropped Jacobian of exp": "gradient.lm_head.log_s",
    "AdamW: moments not stored": "after.exp_avg.layers.0.attn.q_proj.A",
    "rates constant": "after.layers.0.attn.q_proj.A",
    "bound on log sigma left out": "after.lm_head.log_sigma",
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_first_wrong_value_is_that_of_the_fault(name, precision, tmp_path):
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    with fault.applied():
        values = {
            n: out.value.contiguous() for n, out in intermediates("step-elbo-forward").items()
        }
    assert first_wrong("step-elbo-forward", values, tmp_path, precision) == FIRST[name]


def test_every_value_is_graded(tmp_path):
    """A thousandth more in any one value is wrong, and no other value is."""
    for name in ("op-backward-token-10", "step-three"):
        expected = intermediates(name)
        values = {n: out.value.contiguous() for n, out in expected.items()}
        assert first_wrong(name, values, tmp_path) is None
        for key, value in values.items():
            out = expected[key]
            right = value.nan_to_num(0.0)
            assert grade_output(right * 1.001 + 1e-3, right, out.terms, out.size, "float32")[1]
    key = "layers.1.mlp.up_proj.y"  # rows of 3, 4 and 1 tokens: the last one of a row is real
    wrong = values[key].clone()
    wrong[0, 3], wrong[2, 1:] = 7.0, torch.nan
    assert first_wrong(name, {key: wrong}, tmp_path) is None
    wrong[0, 2] += 1
    assert first_wrong(name, {key: wrong}, tmp_path) == key


def test_command(tmp_path, capsys):
    name, file = "op-backward-example-9", tmp_path / "values.safetensors"
    values = {n: out.value.contiguous() for n, out in intermediates(name).items()}
    save_tensors(file, {n: values[n] for n in ("eps", "h", "dh")}.items())
    assert cli.main(["conformance", "compare", name, str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(values)
    assert lines[1].endswith("ok") and lines[3].split() == ["f", "-"]
    assert lines[-1] == f"all 3 values given are right, {len(values) - 3} are not given"
    save_tensors(file, {"dh": values["d"], "ds": values["ds"][:1], "u": values["u"]}.items())
    assert cli.main(["conformance", "compare", name, str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("WRONG")] == ["dh", "ds"]
    assert lines[-1].startswith("first wrong: dh: 48 of 48 elements beyond the bound; worst at [")
    assert cli.main(["conformance", "compare", name, str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["first_wrong"] == "dh"
    save_tensors(file, {"sigm": values["sigma"]}.items())
    with pytest.raises(InputError, match="has no value named sigm: did you mean sigma?"):
        compare(name, file)
    save_tensors(file, {}.items())
    with pytest.raises(InputError, match="has no values"):
        compare(name, file)
    for absent in ("kl-forward-check", "op-forward-example", "step-", "op"):
        with pytest.raises(InputError, match=f"{absent}: no case with intermediate values; those"):
            compare(absent, file)
    assert cli.main(["conformance", "compare", name]) == 2
    assert "conformance compare needs CASE VALUES" in capsys.readouterr().err
