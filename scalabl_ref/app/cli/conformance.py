"""Test vectors for an implementation in another framework or language (docs/conformance.md).
`export` writes them, that page and templates of ports to a new folder DIR. `check` grades a port's
OUTPUTS by those in DIR, and names likely faults. `compare` takes a port's intermediate VALUES of
one case, and names the first wrong one."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...support.errors import InputError
from ...verify.conformance import Grade, check, export, identity
from ...verify.diagnosis import Diagnosis, any_of, diagnose, summary
from ...verify.intermediates import compare
from .output import Result, say

USAGE = """scalabl conformance export DIR [--json]
       scalabl conformance check DIR OUTPUTS [--precision P] [--first] [--all] [--json]
       scalabl conformance compare CASE VALUES [--precision P] [--json]"""
NEEDED = {"export": "DIR", "check": "DIR OUTPUTS", "compare": "CASE VALUES"}  # by action
MOST = 6  # of the wrong outputs of a case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    add = parser.add_argument
    add("action", choices=NEEDED)
    add("folder", type=Path, metavar="DIR|CASE",
        help="export: the folder to write; check: the folder of the vectors; compare: no folder "
        "but the id of a case, op-forward-*, op-backward-* or step-*")  # fmt: skip
    add("outputs", type=Path, nargs="?", metavar="OUTPUTS|VALUES",
        help="a safetensors file; check: the port's results, with tensors named CASE/OUTPUT; "
        "compare: its intermediate values, named as in docs/conformance.md")  # fmt: skip
    add("--precision", choices=("float32", "float64"), default="float32",
        help="the port's precision, whose eps (2^-23, 2^-52) sets the bounds")  # fmt: skip
    add("--first", action="store_true", help="check: print the first case that fails, and no other")
    add("--all", action="store_true", help="check: a case without any result is a failure")


def run(args: argparse.Namespace) -> Result:
    if args.action == "export":
        if args.outputs:
            raise InputError(f"conformance export needs DIR alone, and not {args.outputs} too")
        count = export(args.folder, page=True)
        version, sha256 = identity(args.folder)
        say(args, f"written: {count} cases to {args.folder}; kit {version}, SHA-256 {sha256}")
        return {"cases": count, "folder": str(args.folder), "kit": version, "sha256": sha256}
    if args.outputs is None:
        raise InputError(f"conformance {args.action} needs {NEEDED[args.action]}")
    if args.action == "compare":
        return _compare(args)
    grades, left_out = check(args.folder, args.outputs, args.precision)
    failed = [grade for grade in grades if not grade.passed]
    found = Diagnosis({}, [])
    if failed:
        found = diagnose(args.folder, args.outputs, grades, args.precision)
    for line in summary(args.folder, grades, found, args.precision):
        say(args, line)
    say(args, f"{'case':32} error / bound, 1 is the limit")
    for grade in failed[:1] if args.first else grades:
        _say(args, grade, found.alike.get(grade.id, {}))
    missing = f"; {len(left_out)} not attempted" if left_out else ""
    version, sha256 = identity(args.folder)
    passed = f"{len(grades) - len(failed)} of {len(grades)} cases passed, {args.precision}"
    say(args, f"{passed}{missing}; kit {version}, SHA-256 {sha256}")
    if args.all and left_out:
        say(args, f"not attempted, a failure with --all: {', '.join(left_out)}")
    cases = [{**grade._asdict(), "passed": grade.passed, "alike": found.alike.get(grade.id, {})}
             for grade in grades]  # fmt: skip
    return {"kit": version, "sha256": sha256, "cases": cases, "not_attempted": left_out,
            "failed": len(failed),
            "exit_code": int(bool(failed or (args.all and left_out)))}  # fmt: skip


def _compare(args: argparse.Namespace) -> Result:
    """The values of one case in the order of computation, and the first that is wrong."""
    values = compare(str(args.folder), args.outputs, args.precision)
    say(args, f"{'value':44} error / bound, 1 is the limit")
    for name, error, problem in values:
        shown = f"{'-':>10}" if error is None else f"{error:10.2g}"
        say(args, f"{name:44} {shown}  {'WRONG' if problem else '' if error is None else 'ok'}")
    wrong = [value for value in values if value.problem]
    given = sum(value.error is not None for value in values)
    right = f"all {given} values given are right, {len(values) - given} are not given"
    say(args, f"first wrong: {wrong[0].name}{wrong[0].problem}" if wrong else right)
    return {"values": [value._asdict() for value in values],
            "first_wrong": wrong[0].name if wrong else None,
            "exit_code": int(bool(wrong))}  # fmt: skip


def _say(args: argparse.Namespace, grade: Grade, faults: dict[str, list[str]]) -> None:
    """One case. Its error is of no use where an output is missing or has another shape."""
    error = f"{grade.worst:10.2g}" if grade.passed or grade.worst > 1 else f"{'-':>10}"
    say(args, f"{grade.id:32} {error}  {'ok' if grade.passed else 'FAILED'}")
    same: dict[tuple[str, ...], list[str]] = {}
    for output, names in faults.items():
        same.setdefault(tuple(names), []).append(output)
    for likely, outputs in same.items():
        more = f" and {len(outputs) - MOST} others" if len(outputs) > MOST else ""
        verb = "equals" if len(outputs) == 1 else "equal"
        text = f"{', '.join(outputs[:MOST])}{more} {verb}"
        say(args, f"    your {text} what {any_of(list(likely))} gives")
    for problem in grade.problems[:MOST]:
        say(args, f"    {problem}")
    if len(grade.problems) > MOST:
        say(args, f"    and {len(grade.problems) - MOST} more outputs: --json lists them")
    if not grade.passed:
        few = ", ".join(grade.right) if len(grade.right) < 8 else f"{len(grade.right)} others"
        say(args, f"    {grade.covers}{f'; right: {few}' if few else ''}")
