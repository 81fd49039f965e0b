"""Test vectors for an implementation in another framework or language (docs/conformance.md).
`export DIR` writes them and that page; `check DIR OUTPUTS` grades a port's results and names likely
faults."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...support.errors import InputError
from ...verify.conformance import Grade, check, export, identity
from ...verify.diagnosis import alike, any_of, summary
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
    add("--first", action="store_true", help="check: print the first case that fails, and no other")
    add("--all", action="store_true", help="check: a case without any result is a failure")


def run(args: argparse.Namespace) -> Result:
    if args.action == "export":
        count = export(args.folder, page=True)
        version, sha256 = identity(args.folder)
        say(args, f"written: {count} cases to {args.folder}; kit {version}, SHA-256 {sha256}")
        return {"cases": count, "folder": str(args.folder), "kit": version, "sha256": sha256}
    if args.outputs is None:
        raise InputError("conformance check needs a file of OUTPUTS")
    grades, left_out = check(args.folder, args.outputs, args.precision)
    failed = [grade for grade in grades if not grade.passed]
    found = alike(args.folder, args.outputs, grades, args.precision) if failed else {}
    for line in summary(args.folder, grades, found):
        say(args, line)
    say(args, f"{'case':32} error / bound, 1 is the limit")
    for grade in failed[:1] if args.first else grades:
        _say(args, grade, found.get(grade.id, {}))
    missing = f"; {len(left_out)} not attempted" if left_out else ""
    version, sha256 = identity(args.folder)
    passed = f"{len(grades) - len(failed)} of {len(grades)} cases passed, {args.precision}"
    say(args, f"{passed}{missing}; kit {version}, SHA-256 {sha256}")
    if args.all and left_out:
        say(args, f"not attempted, a failure with --all: {', '.join(left_out)}")
    cases = [{**grade._asdict(), "passed": grade.passed, "alike": found.get(grade.id, {})}
             for grade in grades]  # fmt: skip
    return {"kit": version, "sha256": sha256, "cases": cases, "not_attempted": left_out,
            "failed": len(failed),
            "exit_code": int(bool(failed or (args.all and left_out)))}  # fmt: skip


def _say(args: argparse.Namespace, grade: Grade, faults: dict[str, list[str]]) -> None:
    """One case. Its error is of no use where an output is missing or has another shape."""
    error = f"{grade.worst:10.2g}" if grade.passed or grade.worst > 1 else f"{'-':>10}"
    say(args, f"{grade.id:32} {error}  {'ok' if grade.passed else 'FAILED'}")
    for output, names in faults.items():
        say(args, f"    your {output} equals what {any_of(names)} gives")
    for problem in grade.problems:
        say(args, f"    {problem}")
    if not grade.passed:
        few = ", ".join(grade.right) if len(grade.right) < 8 else f"{len(grade.right)} others"
        right = f"; right: {few}" if grade.right else ""
        say(args, f"    {grade.covers}; it catches {', '.join(grade.catches)}{right}")
