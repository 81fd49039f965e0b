"""Check this installation against the equations: the noise, the layer, its gradients, the KL and
the method. Each check compares an error with a bound that follows from rounding or statistics.

--against checks a layer of your own: a function of PyTorch tensors, with gradients by autograd. It
computes y = W x + b + c B diag(s + sigma eps) A x in the dtype of x. For each check that fails, the
worst case is named, with the element, its value and the right one. For instance, with mine.py:

    from torch.nn.functional import linear
    from scalabl_ref.core.layer import Keys, row_noise

    def op(x, weight, bias, A, B, s, sigma, scaling, noise,
           layer=0, sampling="example", groups=None):
        eps = 0.0  # of the mean model; else (..., r), see docs/conformance.md
        if noise is not None:
            keys = Keys(noise, groups)
            eps = row_noise(x.shape[:-1], keys, layer, sampling, len(s)).to(x)
        u = linear(x, A) * (scaling * (s + sigma * eps))
        return linear(x, weight, bias) + linear(u, B)

    scalabl verify --against mine:op

x is (..., d_in), weight (d_out, d_in), bias (d_out,) or None, A (r, d_in), B (d_out, r), s and
sigma (r,). A function that gives no gradient of weight and bias, as of frozen ones, passes too.

On a machine with other work, set OMP_WAIT_POLICY=passive in the environment: GNU's OpenMP threads
then sleep while they wait, and do not spin. This can make the checks four times as fast.
"""

from __future__ import annotations

import argparse
import sys
import textwrap

from ...verify.all_checks import load_op, path_of, verify
from . import runs
from .output import Result, say

NOT_COVERED = (
    "Not covered: charts, models of the library transformers, several processes, how studies run, "
    "the server, the command line. The test suite covers them."
)
NOT_OF_OP = "Not covered: all but the layer. `scalabl conformance` has cases for the rest."


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
    say(args, f"{'check':21} {'error / bound':>13} {'cases':>5} {'s':>4}  equation")
    for result in results:
        verdict = "" if result.passed else "   FAILED"
        if result.passed and not result.cases:
            verdict = "   left out"
        numbers = f"{result.worst:13.2g} {result.cases:5} {result.seconds:4.1f}"
        _say_row(args, f"{result.name:21} {numbers}  ", f"{result.equation}{verdict}")
        if result.note:
            _say_row(args, " " * 22, result.note)
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(f"failed: {result.name}: {result.equation}", file=sys.stderr)
    left = sum(not result.cases for result in results)
    if not failed:
        say(
            args, f"\nall {len(results) - left} checks passed{f'; {left} left out' if left else ''}"
        )
    say(args, textwrap.fill(NOT_OF_OP if op else NOT_COVERED, 80))
    checks = [{**result._asdict(), "passed": result.passed} for result in results]
    return {"path": path, "device": str(device), "checks": checks, "exit_code": int(bool(failed))}


def _say_row(args: argparse.Namespace, start: str, text: str) -> None:
    """`start` and then `text`, in lines of 80 columns."""
    indent = " " * len(start)
    say(
        args,
        start + textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=indent).lstrip(),
    )
