"""Test vectors for an implementation in another framework or language (docs/conformance.md).
`export DIR` writes them; `check DIR OUTPUTS` grades a port's results and names likely faults."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...support.errors import InputError
from ...verify.conformance import check, export
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("export", "check"),
        help="export: write the vectors to DIR; check: grade OUTPUTS by those in DIR")  # fmt: skip
    add("folder", type=Path, metavar="DIR", help="folder of the vectors")
    add("outputs", type=Path, nargs="?", metavar="OUTPUTS",
        help="check: the port's results, safetensors with tensors named CASE/OUTPUT")  # fmt: skip
    add("--precision", choices=("float32", "float64"), default="float32",
        help="check: the port's precision, whose eps (2^-23, 2^-52) sets the bounds")  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    if args.action == "export":
        count = export(args.folder)
        say(args, f"written: {count} cases to {args.folder}")
        return {"cases": count, "folder": str(args.folder)}
    if args.outputs is None:
        raise InputError("conformance check needs a file of OUTPUTS")
    grades, left_out = check(args.folder, args.outputs, args.precision)
    say(args, f"{'case':32} error / bound, 1 is the limit")
    for grade in grades:
        say(args, f"{grade.id:32} {grade.worst:10.2g}  {'ok' if grade.passed else 'FAILED'}")
        for problem in grade.problems:
            say(args, f"    {problem}")
        if not grade.passed:
            few = ", ".join(grade.right) if len(grade.right) < 8 else f"{len(grade.right)} others"
            right = f"; right: {few}" if grade.right else ""
            say(args, f"    {grade.covers}; it catches {', '.join(grade.catches)}{right}")
    failed = sum(not grade.passed for grade in grades)
    missing = f"; {len(left_out)} not attempted" if left_out else ""
    say(args, f"{len(grades) - failed} of {len(grades)} cases passed, {args.precision}{missing}")
    cases = [{**grade._asdict(), "passed": grade.passed} for grade in grades]
    return {"cases": cases, "not_attempted": left_out, "failed": failed,
            "exit_code": int(failed > 0)}  # fmt: skip
