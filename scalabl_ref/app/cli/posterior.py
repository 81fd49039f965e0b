"""Make a posterior from trained runs, after training: a Gaussian over the scales of any adapter
(subspace), a Laplace approximation for plain LoRA (laplace), TFB (training-free Bayesianization),
SWAG or an ensemble. The result is a run for `evaluate` and `predict`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ...core.adapter import adapters
from ...core.objective import Batch
from ...data import Example, Wording, evaluation_batches
from ...data.tokenizer import Tokenizer
from ...evaluation.answering import encode_for
from ...methods import (
    Ensemble,
    Laplace,
    Posterior,
    Subspace,
    Swag,
    fit_tfb,
    load_posterior,
    to_points,
)  # fmt: skip
from ...methods.evidence import GROUPS, groups_of
from ...methods.laplace import CURVATURES
from ...methods.subspace import PREDICTS, Curvature, validated
from ...model.llama import Llama
from ...support.errors import InputError
from ...support.files import new_folder, sha256
from ...support.tensors import load_tensors
from ...training import ranks
from ...training.lock import alone
from ...training.runs import run_facts, save_run
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("method", choices=("subspace", "laplace", "tfb", "swag", "ensemble"),
        help="posterior to make")  # fmt: skip
    add("--run", type=Path, nargs="+", required=True,
        help="trained run of method mle or map; subspace: of any method; swag: one trained with "
        "--swag; ensemble: two or more runs of one method, or with posteriors of one "
        "kind")  # fmt: skip
    add("--model", type=Path, help="folder of the runs' base model, if it has moved")
    add("--out", type=Path, required=True, metavar="NEW", help="new run folder to write")
    options.add_data(parser, "the training data of the run; subspace, laplace and tfb use it")
    add("--precision", default="evidence", metavar="LAMBDA",
        help="subspace, laplace: precision (1 / variance) of the prior: a number; evidence: the "
        "value that maximises the evidence; validation (subspace only): that value times the "
        "factor with the lowest NLL on --validation, or on the questions that `train --holdout` "
        "left out")  # fmt: skip
    add("--groups", choices=GROUPS, default="all",
        help="subspace: scales that share a precision: all; those of a kind of layer, such as "
        "q_proj (target); or those of one layer (layer)")  # fmt: skip
    add("--validation", type=Path, metavar="FILE",
        help="subspace: file of held-out questions, in --format, for --precision "
        "validation")  # fmt: skip
    add("--directions", type=int, metavar="K",
        help="subspace: keep the K directions that the data determine best; the others keep the "
        "prior (default: all)")  # fmt: skip
    add("--predicts", choices=PREDICTS, default="linear",
        help="subspace: linear draws the logits of the linearised model; sampled draws scales and "
        "runs the model with them")  # fmt: skip
    add("--layers", choices=("all", "last"), default="all",
        help="laplace: layers that become random")  # fmt: skip
    add("--curvature", choices=CURVATURES, default="expand",
        help="laplace: Kronecker factors over all tokens (expand) or over the last token of each "
        "question (last, as in bayesian_lora: it leaves out the influence of earlier tokens), or "
        "the whole matrix (exact, for a few thousand questions times answers)")  # fmt: skip
    add("--kron-rank", type=int, metavar="N",
        help="laplace: keep N eigenvectors of each factor (default: all)")  # fmt: skip
    add("--tolerance", type=float, default=0.003, help="tfb: allowed relative change of the NLL")
    add("--samples", type=int, default=10, metavar="N", help="tfb: draws for the NLL")
    add("--batch", type=int, default=8, help="subspace, laplace, tfb: questions per pass")
    options.add_timeout(parser)


@runs.on_ranks
def run(args: argparse.Namespace) -> Result:
    _check_runs(args.run, args.method)
    if args.method != "subspace" and ranks.world() > 1:
        raise InputError(f"posterior {args.method} takes one process: start it without torchrun")
    writes = not args.process
    with alone(args.out, new=True), new_folder(args.out) if writes else nullcontext() as folder:
        model, tokenizer, info, _ = runs.open_run(args, args.run[0])
        posterior, found = _made(args, model, tokenizer, info)
        facts = {"made_by": args.method, "from": [str(run) for run in args.run], **found}
        name = None if posterior is None else args.method
        if folder is not None:
            save_run(folder, model, {**info, "posterior": name, **facts})
            if posterior is not None:
                posterior.save(folder)
    say(args, f"written: {args.out}, a run for `evaluate` and `predict`")
    return {"run": str(args.out), **facts}


def _made(
    args: argparse.Namespace, model: Llama, tokenizer: Tokenizer, info: Mapping[str, Any]
) -> tuple[Posterior | None, dict[str, Any]]:
    """The posterior of the runs, None if the model's adapters now hold it, and facts about it.

    Without --data, subspace, laplace and tfb use the questions that the run was trained on.
    """
    run: Path = args.run[0]
    if args.method == "ensemble":
        members = [load_tensors(run / "adapter.safetensors")[0] for run in args.run]
        own = [load_posterior(run, run_facts(run)) for run in args.run]
        return Ensemble(members, [posterior for posterior in own if posterior]), {}
    if args.method == "swag":
        if not (run / "swag.safetensors").exists():
            raise InputError(f"{run}: has no swag.safetensors, which `train --swag` writes")
        return Swag.load(run), {}

    def batched(examples: list[Example]) -> list[Batch]:
        encoded = encode_for(model, tokenizer, examples, Wording.of_run(info))
        return list(evaluation_batches(encoded, args.batch))

    if args.data:
        examples = runs.examples_like(args, info)
    else:
        examples, _ = runs.own_data(run, info, "--data")
    batches = batched(examples)
    if args.method == "subspace":
        held_out = batched(_held_out(args, info)) if args.precision == "validation" else []
        return _subspace(args, model, batches, held_out)
    if args.method == "tfb":
        sigma = fit_tfb(model, batches, args.tolerance, args.samples, args.seed)
        return None, {"sigma": sigma}
    if args.precision == "validation":
        raise InputError("posterior laplace takes --precision evidence or a number")
    precision = _precision(args.precision)
    fitted = Laplace.fit(model, batches, args.layers, args.kron_rank, precision, args.curvature)
    if args.precision == "evidence":
        fitted = fitted.optimise_prior()
    return fitted, {"curvature": args.curvature, "precision": fitted.precision}


def _subspace(
    args: argparse.Namespace, model: Llama, batches: list[Batch], held_out: list[Batch]
) -> tuple[Subspace, dict[str, Any]]:
    """The posterior over the scales, and facts about it; the model's adapters become points."""
    before = next(iter(adapters(model).values())).config.method
    precision = _precision(args.precision)
    to_points(model)
    mine = batches[ranks.rank() :: ranks.world()]
    curvature = Curvature.measure(model, mine, ranks.sum_)
    made = curvature.posterior(precision, args.groups, args.directions, args.predicts)
    if args.precision == "validation":
        made = validated(made, model, held_out, args.seed)
    group, names = groups_of(curvature.sizes, args.groups)
    return made, {
        "trained_as": before,
        "scales": len(made.scales),
        "directions": made.vectors.shape[1],
        "precision": {n: float(made.precision[group == i][0]) for i, n in enumerate(names)},
        "log_evidence": made.log_evidence(),
        "predicts": made.predicts,
    }


def _precision(given: str) -> float | None:
    """The number of --precision; None if it is to be found."""
    if given in ("evidence", "validation"):
        return None
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(
            f"--precision must be a number above 0, evidence or validation, not {given!r}"
        )
    return number


def _held_out(args: argparse.Namespace, info: Mapping[str, Any]) -> list[Example]:
    """The held-out questions for --precision validation."""
    if args.validation:
        return runs.examples_like(args, info, args.validation)
    if not info["holdout"]:
        raise InputError(f"{args.run[0]}: was trained without --holdout: give --validation")
    return runs.own_data(args.run[0], info, "--validation")[1]


def _check_runs(runs: list[Path], method: str) -> None:
    """Raise InputError unless `method` can use these runs.

    Each must be plain LoRA (for subspace of any method) without a posterior of its own. Those of
    an ensemble may be of any method and have any posterior but another ensemble. They must agree in
    all but their weights, and no two may have the same weights.
    """
    if (len(runs) > 1) != (method == "ensemble"):
        count = "two runs or more" if method == "ensemble" else "one run"
        raise InputError(f"posterior {method} takes {count} in --run, not {len(runs)}")
    facts = [run_facts(run) for run in runs]
    by_weights: dict[str, Path] = {}
    for run, info in zip(runs, facts, strict=True):
        trained, posterior = info["adapter"]["method"], info["posterior"]
        if posterior is not None and (method != "ensemble" or posterior == method):
            raise InputError(f"{run}: already has a posterior: {posterior}")
        if trained not in ("mle", "map") and method not in ("ensemble", "subspace"):
            raise InputError(f"{run}: {method} needs a run of method mle or map, not {trained}")
        ours, first = _must_agree(info), _must_agree(facts[0])
        for key in ours:
            if ours[key] != first[key]:
                raise InputError(f"{run}: differs from {runs[0]} in {key}: they make no ensemble")
        same = by_weights.setdefault(sha256(run / "adapter.safetensors"), run)
        if same is not run:
            raise InputError(f"{run}: has the same weights as {same}: they make no ensemble")


def _must_agree(info: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in which all runs of an ensemble agree."""
    own = {key: info[key] for key in ("fingerprint", "adapter", "head_tokens", "posterior")}
    return own | Wording.of_run(info).facts()
