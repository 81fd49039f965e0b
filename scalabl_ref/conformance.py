"""Test vectors for ports: written once, in files that any language reads, and graded here.

    scalabl conformance export DIR          vectors.safetensors, manifest.json, schema.json
    scalabl conformance check DIR OUTPUTS   OUTPUTS: a safetensors file with a port's results

The cases are those of `vectors`. A port stores what it computes for them under the names of the
expected values, "<case>/<output>".
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import load_tensors, new_folder, read_json, save_tensors
from .errors import InputError, atomic_write_text
from .noise import NOISE_VERSION
from .vectors import vectors

FORMAT = "scalabl-conformance"
VERSION = 1
PRECISIONS = {"float32": 2.0**-23, "float64": 2.0**-52}


# --- Files ------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Conformance vectors of ScalaBL",
    "type": "object",
    "required": ["format", "version", "noise_version", "cases"],
    "properties": {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
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


def export(folder: Path | str) -> int:
    """Write the vectors to a new folder; returns how many cases there are.

    Raises InputError if there is something at `folder` already.
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
        "noise_version": NOISE_VERSION,
        "cases": cases,
    }
    with new_folder(folder) as temporary:
        save_tensors(temporary / "vectors.safetensors", tensors.items())
        for name, value in (("manifest.json", manifest), ("schema.json", SCHEMA)):
            atomic_write_text(temporary / name, json.dumps(value, indent=1) + "\n")
    return len(cases)


# --- Grading ----------------------------------------------------------------------------------


class Grade(NamedTuple):
    """worst: the largest error over its bound, of all outputs. problem: what is missing or odd."""

    id: str
    level: str
    covers: str
    catches: list[str]
    worst: float
    problem: str

    @property
    def passed(self) -> bool:
        return not self.problem and self.worst <= 1.0


def check(folder: Path | str, outputs: Path | str, precision: str = "float32") -> list[Grade]:
    """Grade a port's results, case by case.

    outputs: a safetensors file with "<case>/<output>" for the cases that the port does; cases of
    which it has nothing are left out. precision: what the port computed in, float32 or float64.

    Raises InputError for files that are not what they should be, or results for no case at all.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    manifest = read_json(Path(folder) / "manifest.json")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise InputError(f"{folder}: expected vectors of {FORMAT}, version {VERSION}")
    truth, _ = load_tensors(Path(folder) / "vectors.safetensors")
    theirs, _ = load_tensors(Path(outputs))
    known = {o["tensor"] for case in manifest["cases"] for o in case["outputs"].values()}
    for name in theirs:
        if name not in known:
            raise InputError(f"{outputs}: {name} is the result of no case")
    grades = []
    for case in manifest["cases"]:
        if not any(output["tensor"] in theirs for output in case["outputs"].values()):
            continue
        worst, problem = 0.0, ""
        for name, output in case["outputs"].items():
            if output["tensor"] not in theirs:
                problem = problem or f"{name} is missing"
                continue
            size = truth[output["size"]] if isinstance(output["size"], str) else output["size"]
            got, expected = theirs[output["tensor"]], truth[output["tensor"]]
            if got.shape != expected.shape:
                shapes = f"{tuple(got.shape)}, expected {tuple(expected.shape)}"
                problem = problem or f"{name} has shape {shapes}"
                continue
            worst = max(worst, _worst(got, expected, output["terms"] * PRECISIONS[precision], size))
        grades.append(
            Grade(case["id"], case["level"], case["covers"], case["catches"], worst, problem)
        )
    if not grades:
        raise InputError(f"{outputs}: has results for no case")
    return grades


def _worst(got: Tensor, expected: Tensor, relative: float, size: Tensor | float) -> float:
    """Largest error over relative * size; infinite for any difference where that is 0, or NaN."""
    if not expected.is_floating_point() and not got.is_floating_point():
        return 0.0 if torch.equal(got.long(), expected.long()) else math.inf
    error = (got.double() - expected.double()).abs()
    bound = torch.as_tensor(size, dtype=torch.float64) * relative
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(torch.nan_to_num(ratio, nan=math.inf).max()) if ratio.numel() else 0.0
