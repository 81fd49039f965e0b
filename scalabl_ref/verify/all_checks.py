"""All checks of `scalabl verify`, and how each is run."""

from __future__ import annotations

import importlib
import inspect
import math
import time
from dataclasses import fields

import torch

from ..core.adapter import SubspaceAdapter
from ..core.layer import subspace_lora_linear as plain_op
from ..fast import native
from ..support.errors import InputError
from .adapter_checks import ADAPTER_CHECKS
from .answer_checks import ANSWER_CHECKS
from .body_checks import BODY_CHECKS
from .check import Check, Error, LeftOut, Op, Result
from .checks import OP_CHECKS, OWN_CHECKS, Case
from .data_checks import DATA_CHECKS
from .file_checks import FILE_CHECKS
from .interop_checks import INTEROP_CHECKS
from .level_checks import LEVEL_CHECKS
from .method_checks import METHOD_CHECKS
from .model_checks import MODEL_CHECKS
from .posterior_checks import POSTERIOR_CHECKS
from .score_checks import SCORE_CHECKS
from .study_checks import STUDY_CHECKS
from .training_checks import TRAINING_CHECKS
from .use_checks import USE_CHECKS

ARGUMENTS = tuple(field.name for field in fields(Case))  # of the op, in their order


def verify(op: Op | None = None, device: torch.device | str = "cpu") -> list[Result]:
    """Run every check of `op`; without one, check ours, the rest and the other methods.

    op: a function with the signature of `subspace_lora_linear`. If it raises an exception, the
    check has failed. Gradients of weight and bias are left out if it gives none.
    """
    own = OWN_CHECKS + BODY_CHECKS + LEVEL_CHECKS + ADAPTER_CHECKS + METHOD_CHECKS
    own += POSTERIOR_CHECKS + USE_CHECKS + FILE_CHECKS + SCORE_CHECKS + STUDY_CHECKS
    own += MODEL_CHECKS + TRAINING_CHECKS + DATA_CHECKS + ANSWER_CHECKS + INTEROP_CHECKS
    checks = OP_CHECKS + (own if op is None else [])
    return [run(check, op or SubspaceAdapter.op, torch.device(device)) for check in checks]


def run(check: Check, op: Op, device: torch.device) -> Result:
    start, errors, note = time.perf_counter(), [], ""
    try:
        errors = list(check.run(op, device))
        # No NaN is the largest of others, and no comparison is no success.
        worst = max(errors, key=lambda e: math.inf if math.isnan(e) else e, default=math.inf)
        worst = Error(math.inf, getattr(worst, "place", "")) if math.isnan(worst) else worst
        note = getattr(worst, "place", "") if worst > 1 else ""
    except LeftOut as reason:
        worst, note = 0.0, f"left out: {reason}"
    except Exception as error:  # somebody else's function may raise anything
        worst, note = math.inf, f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    return Result(check.name, check.equation, float(worst), len(errors), seconds, note)


def load_op(name: str) -> Op:
    """The function that "module:function" names.

    Raises InputError if there is none, or if it cannot be called as the checks call it.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"--against {name}: expected module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--against {name}: {error}") from None
    if not callable(function):
        raise InputError(f"--against {name}: is not callable")
    try:
        parameters = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin: its calls will tell
        return function
    try:
        parameters.bind(**dict.fromkeys(ARGUMENTS))
        places = parameters.bind(*ARGUMENTS).arguments
        swapped = [at for at, given in places.items() if isinstance(given, str) and at != given]
        problem = f"{swapped[0]} is in another place" if swapped else ""
    except TypeError as error:
        problem = str(error)
    if problem:
        wanted = ", ".join(ARGUMENTS)
        raise InputError(f"--against {name}: {problem}; it must take {wanted}, in this order")
    return function


def path_of(op: Op | None) -> str:
    """The body that runs, in words."""
    if op is not None:
        return f"{op.__module__}.{getattr(op, '__name__', op)}"
    if SubspaceAdapter.op is plain_op:
        return "plain bodies (SCALABL_PLAIN=1)"
    status = native.native_status()
    return f"native core, {status['isa']}" if status["used"] else f"PyTorch ({status['reason']})"
