"""Check this installation against the equations: the noise, the layer, its gradients, the KL and
the method. Each check compares an error with a bound that follows from rounding or statistics."""

from __future__ import annotations

import argparse
import sys

from ...verify.checks import load_op, path_of, verify
from . import runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", metavar="MODULE:FUNCTION",
        help="check this function in place of the package's layer; it takes the same arguments "
        "as scalabl_ref.subspace_lora_linear")  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    sys.path.insert(0, "")  # modules of the current folder, as under python -m
    op = load_op(args.against) if args.against else None
    device, path = runs.device_of(args), path_of(op)
    results = verify(op, device)
    say(args, f"path: {path}, on {device}\n")
    say(args, f"{'check':22} {'error / bound':>13} {'cases':>6} {'s':>6}  equation")
    for result in results:
        verdict = "" if result.passed else "   FAILED"
        say(args, f"{result.name:22} {result.worst:13.2g} {result.cases:6} {result.seconds:6.1f}  "
            f"{result.equation}{verdict}")  # fmt: skip
        if result.note:
            say(args, f"{'':22} {result.note}")
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(f"failed: {result.name}: {result.equation}", file=sys.stderr)
    if not failed:
        say(args, f"\nall {len(results)} checks passed")
    checks = [{**result._asdict(), "passed": result.passed} for result in results]
    return {"path": path, "device": str(device), "checks": checks, "exit_code": int(bool(failed))}
