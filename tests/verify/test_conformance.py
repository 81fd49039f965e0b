"""The kit: what it writes, and that it grades a right port as right and a wrong one as wrong."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from fractions import Fraction

import pytest
import torch

from scalabl_ref import InputError, Noise
from scalabl_ref.app import cli
from scalabl_ref.core import philox
from scalabl_ref.core.noise import NOISE_VERSION
from scalabl_ref.support.tensors import load_tensors, save_tensors
from scalabl_ref.verify import reference
from scalabl_ref.verify.conformance import KIT_VERSION, check, export, grade_case, identity
from scalabl_ref.verify.known_answers import PhiloxAnswer, box_muller_answers, philox_answers

from ..conftest import ROOT
from ..own_port import cases, port, port_of_the_page
from ..tolerances import rounding


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit") / "vectors"
    assert export(folder) >= 60
    return folder


def grade(folder, tmp_path, results, precision="float32"):
    save_tensors(tmp_path / "out.safetensors", results.items())
    return check(folder, tmp_path / "out.safetensors", precision)[0]


def bad(kit, tmp_path, results, precision="float32"):
    """The one case that fails."""
    (grade_,) = (g for g in grade(kit, tmp_path, results, precision) if not g.passed)
    return grade_


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_right_port_passes_every_case(kit, tmp_path, precision):
    results = port(kit, getattr(torch, precision))
    if precision == "float64":  # RoPE's frequencies are float32 numbers, whatever the port
        results = {name: t for name, t in results.items() if not name.startswith("rope-")}
    grades = grade(kit, tmp_path, results, precision)
    assert [g for g in grades if not g.passed] == []
    left_out = 0 if precision == "float32" else 4
    assert len(grades) == sum(1 for _ in cases(kit)) - left_out


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_port_of_the_page_alone_passes(kit, tmp_path, precision):
    """Noise, schedules, metrics and most of the subspace, by other means."""
    grades = grade(kit, tmp_path, port_of_the_page(kit), precision)
    assert [g for g in grades if not g.passed] == []
    levels = {"philox", "normals", "schedules", "metrics"}
    assert sum(case["level"] in levels for case, _ in cases(kit)) == 22
    assert sum(case["level"] == "subspace" for case, _ in cases(kit)) == 8
    assert len(grades) == 22 + 7  # its model is left out


def moved(noise, seed=0, draw=0):
    return noise and Noise(noise.seed + seed, noise.draw + draw)


BUGS = {
    "variance for standard deviation": lambda c: {"sigma": c["sigma"] ** 2},
    "scaling left out": lambda c: {"scaling": 1.0},
    "noise left out": lambda c: {"noise": None},
    "one draw for all": lambda c: {"sampling": "batch"},
    "groups ignored": lambda c: {"groups": None},
    "layer off by one": lambda c: {"layer": c["layer"] + 1},
    "draw off by one": lambda c: {"noise": moved(c["noise"], draw=1)},
    "seed cut to 32 bits": lambda c: {"noise": moved(c["noise"], seed=-(2**63))},
    "bias left out": lambda c: {"bias": None},
    "s detached": lambda c: {"s": c["s"].detach()},
    "sigma detached": lambda c: {"sigma": c["sigma"].detach()},
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_a_port_is_seen(kit, tmp_path, name):
    results = port(kit, torch.float32, BUGS[name], {"op forward", "op backward"})
    assert any(not g.passed for g in grade(kit, tmp_path, results))


def test_the_vectors_in_the_repository_are_these(kit, tmp_path):
    """Outputs within their own bounds: the rounding of a matrix product is the machine's."""
    kept = ROOT / "tests" / "vectors"
    assert {file.name for file in kept.iterdir()} == {file.name for file in kit.iterdir()}
    for name in ("schema.json", "constants.json"):
        assert (kept / name).read_text() == (kit / name).read_text()
    described = [
        [(c["id"], c["parameters"], sorted(c["outputs"])) for c, _ in cases(f)] for f in (kit, kept)
    ]
    assert described[0] == described[1]
    ours, theirs = (load_tensors(f / "vectors.safetensors")[0] for f in (kit, kept))
    assert ours.keys() == theirs.keys()
    outputs = {o["tensor"] for case, _ in cases(kept) for o in case["outputs"].values()}
    grades = grade(kept, tmp_path, {name: ours[name] for name in outputs}, "float64")
    assert [g for g in grades if not g.passed] == []
    for name in ours.keys() - outputs:
        value, right = ours[name], theirs[name]
        if not value.is_floating_point():
            assert torch.equal(value, right), name
        else:  # an input, or the scale of a bound, which needs no more
            allowed = 2.0**-20 if name.endswith(".size") else rounding(torch.float64, 64)
            assert (value - right).abs().max() <= allowed * value.abs().max(), name
    assert sum(f.stat().st_size for f in kept.iterdir()) < 3_000_000


def test_the_page_lists_the_kit_in_the_repository():
    """A change of the cases needs a row of its own under "Changes of the kit"."""
    version, sha256 = identity(ROOT / "tests" / "vectors")
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| 2\S+ \| (\d+) \| ([0-9a-f]{16}) \|", page, re.M)
    assert [int(row[0]) for row in rows] == list(range(1, KIT_VERSION + 1))
    total = sum(1 for _ in cases(ROOT / "tests" / "vectors"))
    assert rows[-1] == (str(version), str(total), sha256[:16])


@pytest.mark.parametrize("name", ["manifest.json", "vectors.safetensors"])
def test_a_changed_kit_is_refused(kit, tmp_path, name):
    changed = shutil.copytree(kit, tmp_path / "changed")
    assert identity(changed) == identity(kit)
    hashed = hashlib.sha256()
    for file in ("manifest.json", "vectors.safetensors"):
        hashed.update((kit / file).read_bytes())
    assert identity(kit) == (KIT_VERSION, hashed.hexdigest())
    with open(changed / name, "r+b") as file:
        data = file.read()
        at = data.rindex(b"0.1" if name.endswith("json") else bytes(4))
        file.seek(at)
        file.write(b"0.2" if name.endswith("json") else bytes([0, 0, 0, 1]))
    with pytest.raises(InputError, match="the kit was changed after its export: the SHA-256 of"):
        check(changed, tmp_path / "none.safetensors")
    (changed / "SHA256").unlink()
    with pytest.raises(InputError, match="not a whole kit, export it again: No such file"):
        check(changed, tmp_path / "none.safetensors")


def test_the_constants_are_those_of_the_code(kit):
    """And of their definitions: each text reads back to the same number."""
    found = json.loads((kit / "constants.json").read_text())

    def doubles(entries):
        assert all(float(e["decimal"]) == float.fromhex(e["hex"]) for e in entries)
        return tuple(float.fromhex(e["hex"]) for e in entries)

    assert found["noise_version"] == NOISE_VERSION
    assert found["philox"] == {
        "multipliers": [0xD2511F53, 0xCD9E8D57], "key_steps": [0x9E3779B9, 0xBB67AE85], "rounds": 10
    }  # fmt: skip
    assert found["reserved_layer"] == 2**32 - 1 and found["first_training_draw"] == 2**31
    singles = doubles([found[name] for name in ("sqrt_half", "ln_2", "turn")])
    assert singles == (math.sqrt(0.5), math.log(2), 2 * math.pi / 2**32)
    assert singles == (philox.SQRT_HALF, philox.LN_2, philox.TURN)
    series = [doubles(found[letter]) for letter in "LCS"]
    assert series == [philox.ATANH, philox.COS, philox.SIN]
    assert series[0] == tuple(float(Fraction(1, 2 * k + 1)) for k in range(11))
    assert series[1] == tuple(float(Fraction((-1) ** k, math.factorial(2 * k))) for k in range(9))
    odd = (float(Fraction((-1) ** k, math.factorial(2 * k + 1))) for k in range(9))
    assert series[2] == tuple(odd)
    answers = found["known_answers"]
    assert [PhiloxAnswer(a["rounds"], *(tuple(a[n]) for n in ("counter", "key", "words")))
            for a in answers["philox4x32"]] == philox_answers()  # fmt: skip
    assert [(tuple(a["words"]), doubles(a["normals"])) for a in answers["box_muller"]] == [
        tuple(answer) for answer in box_muller_answers()
    ]


def test_the_manifest_follows_its_schema(kit):
    """By hand, as far as the schema goes: the package does without a validator."""
    manifest = json.loads((kit / "manifest.json").read_text())
    schema = json.loads((kit / "schema.json").read_text())
    assert set(schema["required"]) == set(manifest)
    case_schema = schema["properties"]["cases"]["items"]
    seen = set()
    for case in manifest["cases"]:
        assert set(case) == set(case_schema["required"]) and case["id"] not in seen
        seen.add(case["id"])
        assert case["catches"] and all(isinstance(c, str) for c in case["catches"])
        for output in case["outputs"].values():
            assert set(output) == {"tensor", "terms", "size"} and output["terms"] >= 0


def test_the_quick_start_counts_the_cases(kit):
    """docs/conformance.md: the levels that each goal needs, and how many cases they have."""
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| (philox[^|]+|the same[^|]+) \| (\d+) \|$", page, re.M)
    levels = [case["level"] for case, _ in cases(kit)]
    wanted: set[str] = set()
    for names, count in rows:
        listed = names.split(", ")
        wanted = wanted if listed[0] == "the same" else set()
        wanted = wanted | set(listed) - {"the same"}
        assert sum(level in wanted for level in levels) == int(count), names
    assert len(rows) == 5 and wanted == set(levels)


def test_results_are_written_as_interop_says(kit, tmp_path, monkeypatch):
    """Its example runs; its zeros are no normals, but check can read them."""
    page = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    section = page.split("\n## Tensors from PyTorch, without NumPy\n")[1]
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(re.search(r"```python\n(.+?)```", section, re.S)[1], found)
    assert torch.equal(found["tensors"]["noise-0/eps"], torch.zeros(4, 10))
    (result,), _ = check(kit, tmp_path / "results.safetensors")
    assert result.problems[0].startswith("eps: 40 of 40 elements beyond the bound")


def test_every_output_is_graded(kit, tmp_path):
    """A thousandth more in any one output fails its case, and names the output.

    In the largest case of the op it is a tenth: its bound allows for 916 roundings.
    """
    right = port(kit, torch.float32)
    truth, _ = load_tensors(kit / "vectors.safetensors")
    tried = 0
    for case, _ in cases(kit):
        for output, entry in case["outputs"].items():
            value = right[entry["tensor"]]
            part = 0.1 if case["id"].endswith("-22") else 1e-3
            wrong = value * (1 + part) + part if value.is_floating_point() else value + 1
            result = grade_case(case, truth, {**right, entry["tensor"]: wrong}, "float32")
            assert [p.split(":")[0] for p in result.problems] == [output], case["id"]
            tried += 1
    assert tried == len(right)


def test_edges_in_binary64_give_the_bins_of_every_case(kit):
    """docs/conformance.md, "What the cases do not notice"."""

    def by_edges(confidence, bins):
        return sum(i / bins <= confidence for i in range(1, bins))

    for case, t in cases(kit):
        if case["id"].startswith("ece"):
            for confidence in t["probs"].amax(1).tolist():
                at = confidence, case["parameters"]["bins"]
                assert by_edges(*at) == reference.bin_of(*at), (case["id"], at)
    assert (by_edges(0.57, 100), reference.bin_of(0.57, 100)) == (57, 56)


def test_inputs_are_numbers_that_float32_holds(kit):
    for case, inputs in cases(kit):
        for name, t in inputs.items():
            if t.is_floating_point():
                assert t.dtype == torch.float64 and torch.equal(t, t.float().double()), case["id"]
            else:
                assert t.dtype == torch.int64, (case["id"], name)


def test_what_is_odd_is_named(kit, tmp_path):
    right = port(kit, torch.float32, levels={"op backward"})
    name = next(iter(right))
    case, output = name.rsplit("/", 1)
    missing = {k: v for k, v in right.items() if k != name}
    assert bad(kit, tmp_path, missing).problems == [f"{output} is missing"]
    cut = {**right, name: right[name][..., :-1].contiguous()}
    assert "has shape" in bad(kit, tmp_path, cut).problems[0]
    for odd in (math.nan, math.inf):
        assert bad(kit, tmp_path, {**right, name: right[name] * odd}).worst == math.inf
    with pytest.raises(InputError, match=f"a result named {case}/Z: did you mean {case}/"):
        grade(kit, tmp_path, {**right, f"{case}/Z": torch.zeros(1)})
    with pytest.raises(InputError, match=r"no case has a result named \? \(results are named CASE"):
        grade(kit, tmp_path, {**right, "?": torch.zeros(1)})
    with pytest.raises(InputError, match="has no result for any case"):
        grade(kit, tmp_path, {})
    with pytest.raises(InputError, match="exists already"):
        export(kit)


def test_a_failure_says_where_and_how_much(kit, tmp_path):
    right = port(kit, torch.float64, levels={"op backward"})
    name = next(name for name in right if name.endswith("/sigma") and "mean" not in name)
    wrong = right[name].clone()
    wrong[1] += 1
    result = bad(kit, tmp_path, {**right, name: wrong}, "float64")
    assert result.id == name.rsplit("/", 1)[0] and "x" in result.right
    (problem,) = result.problems
    assert problem.startswith("sigma: 1 of 3 elements beyond the bound; worst at [1]: got ")
    assert f"expected {right[name][1].item():.10g}" in problem
    result = bad(kit, tmp_path, {**right, name: right[name].float()}, "float64")
    assert result.problems[0].endswith("stored as float32, graded as float64")


def test_command(kit, tmp_path, capsys):
    assert cli.main(["conformance", "export", str(tmp_path / "v"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cases"] >= 60 and (report["kit"], report["sha256"]) == identity(kit)
    for file in kit.iterdir():
        assert (tmp_path / "v" / file.name).read_bytes() == file.read_bytes()
    page = (tmp_path / "v" / "conformance.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links and all((tmp_path / "v" / link).is_dir() for link in links)
    assert "those of `docs/method.md`" in page
    original = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    changed = {a for a, b in zip(page.split("\n"), original.split("\n"), strict=True) if a != b}
    assert len(changed) == sum("](" in line for line in original.split("\n"))
    for path in re.findall(r"`((?:docs|scalabl_ref|tests)/[\w/.]+)`", "\n".join(changed)):
        assert (ROOT / path).exists(), path
    results = port(kit, torch.float32, levels={"KL"})
    save_tensors(tmp_path / "o.safetensors", results.items())
    assert cli.main(["conformance", "check", str(kit), str(tmp_path / "o.safetensors")]) == 0
    total = sum(1 for _ in cases(kit))
    expected = f"8 of 8 cases passed, float32; {total - 8} not attempted; kit {KIT_VERSION}, SHA"
    assert expected in capsys.readouterr().out
    swapped = {k: results[k.replace("forward", "official")] for k in results if "forward" in k}
    save_tensors(tmp_path / "o.safetensors", swapped.items())
    assert cli.main(["conformance", "check", str(kit), str(tmp_path / "o.safetensors")]) == 1
    assert "KL in the other direction" in capsys.readouterr().out
    save_tensors(tmp_path / "o.safetensors", {k: v * math.nan for k, v in results.items()}.items())
    assert (
        cli.main(["conformance", "check", str(kit), str(tmp_path / "o.safetensors"), "--json"]) == 1
    )
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["cases"][0]["worst"] is None and len(report["not_attempted"]) == total - 8
    capsys.readouterr()
    assert cli.main(["conformance", "check", str(kit)]) == 2
    assert "conformance check needs DIR OUTPUTS" in capsys.readouterr().err
