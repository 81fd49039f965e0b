"""Make a posterior from trained runs, after training: a Laplace approximation, TFB (training-free
Bayesianization), SWAG or an ensemble. The result is a run for `evaluate` and `predict`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data import Wording, evaluation_batches
from ...data.tokenizer import Tokenizer
from ...evaluation.answering import encode_for
from ...methods import Ensemble, Laplace, Posterior, Swag, fit_tfb, load_posterior
from ...methods.laplace import CURVATURES
from ...model.llama import Llama
from ...support.errors import InputError
from ...support.files import new_folder, sha256
from ...support.tensors import load_tensors
from ...training.lock import alone
from ...training.runs import run_facts, save_run
from . import options, runs
from .output import Result, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("method", choices=("laplace", "tfb", "swag", "ensemble"), help="posterior to make")
    add("--run", type=Path, nargs="+", required=True,
        help="trained run of method mle or map; swag: one trained with --swag; ensemble: two runs "
        "or more of any one method, or of one posterior made of such runs")  # fmt: skip
    add("--model", type=Path, help="folder of the runs' base model, if it has moved")
    add("--out", type=Path, required=True, metavar="NEW", help="new run folder to write")
    options.add_data(parser, "the training data of the run; laplace and tfb use it")
    add("--layers", choices=("all", "last"), default="all",
        help="laplace: layers that become random")  # fmt: skip
    add("--curvature", choices=CURVATURES, default="expand",
        help="laplace: Kronecker factors over all tokens (expand) or over the last token of each "
        "question (last, as in bayesian_lora: it leaves out how earlier tokens reach the answer), "
        "or the whole matrix (exact, for a few thousand questions times answers)")  # fmt: skip
    add("--kron-rank", type=int, metavar="N",
        help="laplace: keep N eigenvectors of each factor (default: all)")  # fmt: skip
    add("--tolerance", type=float, default=0.003, help="tfb: allowed relative change of the NLL")
    add("--samples", type=int, default=10, metavar="N", help="tfb: draws to measure the NLL with")
    add("--batch", type=int, default=8, help="laplace, tfb: questions per forward pass")


def run(args: argparse.Namespace) -> Result:
    _check_plain(args.run, args.method)
    with alone(args.out, new=True), new_folder(args.out) as folder:
        model, tokenizer, info, _ = runs.open_run(args, args.run[0])
        posterior, found = _made(args, model, tokenizer, info)
        facts = {"made_by": args.method, "from": [str(run) for run in args.run], **found}
        name = None if posterior is None else args.method
        save_run(folder, model, {**info, "posterior": name, **facts})
        if posterior is not None:
            posterior.save(folder)
    say(args, f"written: {args.out}, a run for `evaluate` and `predict`")
    return {"run": str(args.out), **facts}


def _made(
    args: argparse.Namespace, model: Llama, tokenizer: Tokenizer, info: Mapping[str, Any]
) -> tuple[Posterior | None, dict[str, Any]]:
    """The posterior of the runs, None if the model's adapters now hold it, and facts about it.

    Without --data, laplace and tfb use the questions that the run was trained on.
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
    if args.data:
        examples = runs.examples_like(args, info)
    else:
        examples, _ = runs.own_data(run, info, "--data")
    encoded = encode_for(model, tokenizer, examples, Wording.of_run(info))
    batches = evaluation_batches(encoded, args.batch)
    if args.method == "tfb":
        sigma = fit_tfb(model, batches, args.tolerance, args.samples, args.seed)
        return None, {"sigma": sigma}
    kind = args.curvature
    fitted = Laplace.fit(model, batches, args.layers, args.kron_rank, curvature=kind)
    fitted = fitted.optimise_prior()
    return fitted, {"curvature": kind, "precision": fitted.precision}


def _check_plain(runs: list[Path], method: str) -> None:
    """Raise InputError unless `method` can use these runs.

    Each must be plain LoRA without a posterior of its own. Those of an ensemble may be of any
    method and have any posterior but another ensemble. They must agree in all but their weights,
    and no two may have the same weights.
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
        if trained not in ("mle", "map") and method != "ensemble":
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
