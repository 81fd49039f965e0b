"""Test vectors for ports: written once, in files that any language reads, and graded here.

    scalabl conformance export DIR          the kit: see `export`
    scalabl conformance check DIR OUTPUTS   OUTPUTS: a safetensors file with a port's results

The cases are those of `vectors`. A port stores its results under the names of the expected values,
"<case>/<output>".
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.noise import NOISE_VERSION
from ..support.errors import InputError
from ..support.files import atomic_write_text, copy_file, new_folder, read_json
from ..support.tensors import load_tensors, save_tensors
from .constants import constants
from .vectors import vectors

FORMAT = "scalabl-conformance"
VERSION = 1  # of the files' format
KIT_VERSION = 6  # of the cases: docs/conformance.md, "Changes of the kit"
PAGE = Path(__file__).with_name("conformance.md")  # docs/conformance.md
PORTS = Path(__file__).with_name("ports")  # tests/ports
TEMPLATES = (
    *(f"templates/{name}" for name in ("port.py", "port.rs", "levels.c")),
    *(f"c99/{name}.c" for name in ("port", "case", "json", "support", "tensors")),
    *(f"c99/{name}.h" for name in ("levels", "case", "json", "support", "tensors")),
)
WRITTEN = {f"tests/ports/{Path(name).parent}" for name in TEMPLATES}  # folders of the repository
PRECISIONS = {"float32": 2.0**-23, "float64": 2.0**-52}


# --- Files ------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Conformance vectors of ScalaBL",
    "type": "object",
    "required": ["format", "version", "kit_version", "noise_version", "cases"],
    "properties": {
        "format": {"const": FORMAT},
        "version": {"const": VERSION, "description": "of the files' format"},
        "kit_version": {"type": "integer", "description": "of the cases"},
        "noise_version": {"type": "integer"},
        "cases": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "level", "covers", "catches", "parameters", "inputs", "outputs"],
                "properties": {
                    "id": {"type": "string"},
                    "level": {"type": "string"},
                    "covers": {"type": "string", "description": "equation or section"},
                    "catches": {"type": "array", "items": {"type": "string"}},
                    "parameters": {"type": "object", "description": "64-bit integers as strings"},
                    "inputs": {
                        "description": "name to tensor in vectors.safetensors",
                        "type": "object",
                        "additionalProperties": {"type": "string"},
                    },
                    "outputs": {
                        "type": "object",
                        "additionalProperties": {
                            "type": "object",
                            "required": ["tensor", "terms", "size"],
                            "properties": {
                                "tensor": {"type": "string"},
                                "terms": {"type": "integer", "description": "0: exact"},
                                "size": {"type": ["string", "number"]},
                            },
                        },
                    },
                },
            },
        },
    },
}


def export(folder: Path | str, page: bool = False) -> int:
    """Write the kit to a new folder; returns the number of cases.

    Files: manifest.json, vectors.safetensors, SHA256 (of both, see `identity`), schema.json and
    constants.json. page: conformance.md too, and the templates of ports in the folder `ports`.
    Raises InputError if `folder` exists.
    """
    tensors: dict[str, Tensor] = {}
    cases = []
    for vector in vectors():
        entry: dict[str, Any] = {
            "id": vector.id, "level": vector.level, "covers": vector.covers,
            "catches": vector.catches, "parameters": vector.parameters, "inputs": {}, "outputs": {},
        }  # fmt: skip
        for name, tensor in vector.inputs.items():
            key = entry["inputs"][name] = f"{vector.id}/in/{name}"
            tensors[key] = tensor
        for name, output in vector.outputs.items():
            key = f"{vector.id}/{name}"
            tensors[key] = output.value
            size: str | float = f"{key}.size"
            if isinstance(output.size, Tensor):
                tensors[f"{key}.size"] = output.size.expand(output.value.shape)
            else:
                size = output.size
            entry["outputs"][name] = {"tensor": key, "terms": output.terms, "size": size}
        cases.append(entry)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "kit_version": KIT_VERSION,
        "noise_version": NOISE_VERSION,
        "cases": cases,
    }
    with new_folder(folder) as temporary:
        save_tensors(temporary / "vectors.safetensors", tensors.items())
        texts = {"manifest": manifest, "schema": SCHEMA, "constants": constants()}
        for name, value in texts.items():
            atomic_write_text(temporary / f"{name}.json", json.dumps(value, indent=1) + "\n")
        atomic_write_text(temporary / "SHA256", _sha256(temporary) + "\n")
        if page:
            atomic_write_text(temporary / PAGE.name, _alone(PAGE.read_text(encoding="utf-8")))
            for name in TEMPLATES:
                (temporary / "ports" / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(PORTS / name, temporary / "ports" / name)
    return len(cases)


def _alone(page: str) -> str:
    """The page outside the repository: its links to files there become their paths."""

    def path(link: re.Match[str]) -> str:
        target = posixpath.normpath(f"docs/{link[1]}")
        inside = target.removeprefix("tests/")
        return f"[{inside}]({inside})" if target in WRITTEN else f"`{target}`"

    return re.sub(r"\[[^][\n]+\]\((?!https?:)([^)]+)\)", path, page)


def identity(folder: Path | str) -> tuple[int, str]:
    """The version of a kit and its SHA-256, that of manifest.json followed by vectors.safetensors.

    Raises InputError if the folder has no kit of this format, or if the kit was changed after its
    export: its SHA-256 is not the one in the file SHA256.
    """
    manifest = read_json(Path(folder) / "manifest.json")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise InputError(f"{folder}: expected vectors of {FORMAT}, version {VERSION}")
    try:
        expected = (Path(folder) / "SHA256").read_text(encoding="ascii").strip()
        found = _sha256(Path(folder))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder}: not a whole kit, export it again: {reason}") from None
    if found != expected:
        raise InputError(
            f"{folder}: the kit was changed after its export: the SHA-256 of manifest.json and "
            f"vectors.safetensors is {found}, expected {expected or 'none'}"
        )
    return manifest.get("kit_version", 0), found


def _sha256(folder: Path) -> str:
    parts = (folder / "manifest.json", folder / "vectors.safetensors")
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


# --- Grading ----------------------------------------------------------------------------------


class Grade(NamedTuple):
    """The result of one case. worst: the largest error of its outputs, as a share of its bound.

    problems: a line for each output that is missing, malformed or beyond its bound. right: names of
    the other outputs.
    """

    id: str
    level: str
    covers: str
    catches: list[str]
    worst: float
    problems: list[str]
    right: list[str]

    @property
    def passed(self) -> bool:
        return not self.problems


def check(
    folder: Path | str, outputs: Path | str, precision: str = "float32"
) -> tuple[list[Grade], list[str]]:
    """Grade a port's results, case by case; returns the grades and the ids of cases left out.

    outputs: a safetensors file with "<case>/<output>" for the cases that the port computes. A case
    without any result is left out. precision: of the port's arithmetic, float32 or float64.

    Raises InputError for files of another format, for a kit that was changed (`identity`), or if
    there is no result for any case.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    identity(folder)
    manifest = read_json(Path(folder) / "manifest.json")
    truth, _ = load_tensors(Path(folder) / "vectors.safetensors")
    theirs, _ = load_tensors(Path(outputs))
    known = {name for case in manifest["cases"] for name in _results(case)}
    for name in theirs:
        if name not in known:
            hint = " (results are named CASE/OUTPUT)"
            raise unknown_name(f"{outputs}: no case has a result named {name}", name, known, hint)
    attempted = [c for c in manifest["cases"] if any(n in theirs for n in _results(c))]
    if not attempted:
        raise InputError(f"{outputs}: has no result for any case")
    left_out = [case["id"] for case in manifest["cases"] if case not in attempted]
    return [grade_case(case, truth, theirs, precision) for case in attempted], left_out


def unknown_name(text: str, name: str, known: Iterable[str], hint: str = "") -> InputError:
    """An error about a name, with the known name nearest to it, else with `hint`."""
    nearest = difflib.get_close_matches(name, known, 1)
    return InputError(text + (f": did you mean {nearest[0]}?" if nearest else hint))


def _results(case: dict[str, Any]) -> list[str]:
    """Names of the tensors in which a port stores its results for the case."""
    return [output["tensor"] for output in case["outputs"].values()]


def grade_case(
    case: dict[str, Any], truth: dict[str, Tensor], theirs: dict[str, Tensor], precision: str
) -> Grade:
    """Grade one case of the manifest. truth: exported tensors. theirs: a port's, by name."""
    worst, problems, right = 0.0, [], []
    for name, output in case["outputs"].items():
        if output["tensor"] not in theirs:
            problems.append(f"{name} is missing")
            continue
        got, expected = theirs[output["tensor"]], truth[output["tensor"]]
        size = size_of(output, truth)
        error, problem = grade_output(got, expected, output["terms"], size, precision)
        worst = max(worst, error)
        if problem:
            problems.append(f"{name}{problem}")
        else:
            right.append(name)
    about = (case["id"], case["level"], case["covers"], case["catches"])
    return Grade(*about, worst, problems, right)


def size_of(output: dict[str, Any], truth: dict[str, Tensor]) -> Tensor | float:
    """The size of an output of the manifest."""
    return truth[output["size"]] if isinstance(output["size"], str) else output["size"]


def grade_output(
    got: Tensor, expected: Tensor, terms: int, size: Tensor | float, precision: str
) -> tuple[float, str]:
    """The largest error as a share of its bound, and the problem, to follow the name; or nothing.

    The error is 0 where the shapes differ.
    """
    if got.shape != expected.shape:
        return 0.0, f" has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    bound = torch.as_tensor(size).double() * terms * PRECISIONS[precision]
    share = _share(got, expected, bound.expand(expected.shape))
    error = float(share.max()) if share.numel() else 0.0
    return error, "" if error <= 1 else f": {_report(got, expected, share, bound, precision)}"


def _share(got: Tensor, expected: Tensor, bound: Tensor) -> Tensor:
    """Error over its bound; infinite for NaN, and for any error where the bound is 0."""
    if not expected.is_floating_point() and not got.is_floating_point():
        return torch.where(got.long() == expected.long(), 0.0, math.inf).double()
    error = (got.double() - expected.double()).abs()
    share = torch.where(error == 0, 0.0, error / bound)
    return torch.where(got.double().isfinite(), share, math.inf)


def worst_share(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest error over its bound."""
    return float(_share(got, expected, bound).max()) if got.numel() else 0.0


def _report(got: Tensor, expected: Tensor, share: Tensor, bound: Tensor, precision: str) -> str:
    """The place of the worst error, and a possible explanation."""
    at = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
    limit = float(bound.expand(expected.shape)[at])
    text = (
        f"{int((share > 1).sum())} of {share.numel()} elements beyond the bound; worst at "
        f"{list(at)}: got {got[at].item():.10g}, expected {expected[at].item():.10g}, "
        f"bound {limit:.2g}"
    )
    coarse = not got.is_floating_point() or torch.finfo(got.dtype).eps > PRECISIONS[precision]
    if expected.is_floating_point() and coarse:
        text += f"; stored as {str(got.dtype).removeprefix('torch.')}, graded as {precision}"
    return text
