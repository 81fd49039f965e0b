"""Measure a run on a file of questions: accuracy, calibration (ECE), NLL, Brier score and
uncertainty. Writes metrics.json, predictions.jsonl and report.html."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from ...data import Example, Wording, format_of, load
from ...data.tokenizer import Tokenizer, load_tokenizer
from ...evaluation.answering import Answers, Samples, encode_for
from ...evaluation.classifier import Classifier, classifier, draws_of
from ...evaluation.evaluate import BASE, check_results, results_folder, score
from ...evaluation.metrics import checked_bins
from ...evaluation.rule import read_rule
from ...model.llama import Llama
from ...support.errors import InputError
from ...support.files import sha256
from ...training.lock import alone
from ...training.runs import RunFacts, run_facts
from . import options, runs
from .output import Result, say, say_wording


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_run(
        parser, required=False, otherwise="; without --run: the model to evaluate, without adapters"
    )
    options.add_data(parser)
    add("--ood", type=Path, metavar="FILE",
        help="questions of another kind (out of distribution): also measure how well the "
        "uncertainty separates them from --data")  # fmt: skip
    options.add_format(parser, "ood")
    options.add_samples(parser)
    options.add_raw(parser)
    add("--bins", type=int, default=15,
        help="bins of the expected calibration error, at most 10,000")  # fmt: skip
    add("--batch", type=int, default=32, help="questions per forward pass")
    add("--temperature", action="store_true",
        help="also score with a temperature, fitted on --calibrate or on the questions that `train "
        "--holdout` left out, and not kept; not for a run with a temperature of `calibrate`, "
        "unless --raw")  # fmt: skip
    add("--calibrate", type=Path, metavar="FILE",
        help="held-out questions in --format to fit a temperature on; implies "
        "--temperature")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER",
        help="folder for the results (default: a folder named after --data in RUN, or in "
        "base-MODEL without --run)")  # fmt: skip
    add("--force", action="store_true",
        help="overwrite results of another run or another data file in that folder")  # fmt: skip
    options.add_wording(parser, "the run's, or {} without --run")
    options.add_dtype(parser, "the model that is evaluated without --run")
    options.add_ranks(parser)


@runs.on_ranks
def run(args: argparse.Namespace) -> Result:
    if not (args.run or args.model):
        raise InputError("give --run, or --model to evaluate a model without adapters")
    samples, _ = options.samples(args), checked_bins(args.bins)
    info = run_facts(args.run) if args.run else _base_facts(args)
    rule = read_rule(args.run) if args.run and not args.raw else {}
    if rule.get("temperature") and (args.temperature or args.calibrate):
        raise InputError(f"{args.run}: has a temperature already: leave --temperature and "
                         "--calibrate out, or give --raw")  # fmt: skip
    samples = draws_of(info, rule, samples)
    settings = _settings(args, samples, info)
    of = args.run or Path(f"base-{args.model.resolve().name}")
    folder = args.out or results_folder(of, args.data)
    with alone(folder):
        if not args.force:
            check_results(folder, settings)
        answers, calibration, ood = _asked(args, samples, info)
        results = score(
            {**info, "data": str(args.data)},
            answers,
            seed=args.seed,
            design=args.design,
            bins=args.bins,
            calibration=calibration,
            ood=ood,
            settings=settings,
            run=args.run and args.run.resolve().name,
            rule=rule,
        )
        results.write(folder, *([args.run] if args.run and not args.out else []))
    if answers.encoded:
        say_wording(args, answers.encoded)
    for part, words in (
        ("temperature", "temperature was fitted"),
        ("threshold", "threshold was chosen"),
    ):
        if (rule.get(part) or {}).get("data_sha256") == settings["data_sha256"]:
            say(args, f"warning: the run's {words} on this file: on new texts it does less well")
    say(args, _table(results.metrics))
    say(args, f"written: {folder / 'metrics.json'}, predictions.jsonl, report.html")
    return results.metrics


def _base_facts(args: argparse.Namespace) -> RunFacts:
    """A model without adapters, described in the form of a run."""
    return RunFacts(
        model=str(args.model),
        adapter={"method": BASE},
        head_tokens=None,
        fingerprint="",
        dtype=args.dtype,
        format=options.data_format(args),
        **Wording().facts(),
        train={"kl": None, "objective": None},
    )


def _settings(args: argparse.Namespace, samples: Samples, info: RunFacts) -> Result:
    """Everything that determines the results, by the names of the options."""
    return {
        "data_sha256": sha256(args.data),
        "model": None if args.run else info["model"],
        "dtype": info["dtype"],
        "adapter_sha256": args.run and sha256(args.run / "adapter.safetensors"),
        "posterior": info["posterior"],
        "format": options.data_format(args),
        **options.wording(args, Wording.of_run(info)).facts(),
        **{name: vars(args)[name] for name in ("limit", "design", "seed", "bins")},
        "temperature": bool(args.temperature or args.calibrate),
        "samples": samples if isinstance(samples, (int, str)) else dataclasses.asdict(samples),
        "calibrate_sha256": args.calibrate and sha256(args.calibrate),
        "ood_sha256": args.ood and sha256(args.ood),
        "ood_format": args.ood and (args.ood_format or format_of(args.ood)),
    }


def _asked(
    args: argparse.Namespace, samples: Samples, info: RunFacts
) -> tuple[Answers, Answers | None, Answers | None]:
    """The model's answers to --data, to the held-out questions, and to --ood."""
    wording = options.wording(args, Wording.of_run(info))
    if args.run:
        opened = runs.open_run(args)
        clf = classifier(
            opened, args.run, samples, args.seed, args.design, args.batch, wording, args.raw
        )
        info = opened.facts
        examples = runs.examples_like(args, info)
    else:
        model, tokenizer = _open_base(args)
        examples = runs.examples_like(args, info)
        encoded = encode_for(model, tokenizer, examples, wording)
        wording = encoded.wording  # for the held-out questions and --ood as well
        model.trim_head(encoded.classes)
        clf = Classifier(
            model, tokenizer, info, None, wording, samples, args.seed, args.design, args.batch
        )
    calibration = ood = None
    if args.temperature or args.calibrate:
        calibration = clf.ask(_held_out(args, info), "calibrate")
    if args.ood:
        format = args.ood_format or format_of(args.ood)
        columns = options.columns(args) if format in ("csv", "jsonl") else None
        others = load(args.ood, format, args.limit, columns=columns)
        ood = clf.ask(others, "ood", answerable=False)
    return clf.ask(examples, "evaluate"), calibration, ood


def _open_base(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    if runs.sharded(args):
        raise InputError("--shard and --offload-weights need a --run")
    return runs.load_base(args, args.model, args.dtype, None), load_tokenizer(args.model)


def _held_out(args: argparse.Namespace, info: RunFacts) -> list[Example]:
    if args.calibrate:
        return runs.examples_like(args, info, args.calibrate)
    if not args.run:
        raise InputError(f"{args.model}: a base model has no held-out questions: give --calibrate")
    if not info["holdout"]:
        raise InputError(f"{args.run}: was trained without --holdout: give --calibrate")
    return runs.own_data(args.run, info, "--calibrate")[1]


def _table(result: Result) -> str:
    rows = [(result["method"], result)]
    if "temperature" in result:
        rows.append((f"temperature {result['temperature']['value']:.3f}", result["temperature"]))
    if "ood" in result and "acc" in result["ood"]:
        rows.append((f"ood ({result['ood']['n_scored']} scored)", result["ood"]))
    lines = [f"{'':6}" + "".join(f"{name:>24}" for name, _ in rows)]
    lines.append(f"{'n':6}" + "".join(f"{values['n']:>24}" for _, values in rows))
    for key in ("acc", "ece", "nll", "brier"):
        cells = ""
        for _, values in rows:
            low, high = values["intervals"][key]
            cells += f"{values[key]:.3f} [{low:.3f}, {high:.3f}]".rjust(24)
        lines.append(f"{key.upper():6}{cells}")
    lines.append("In brackets: 95 % over the test questions, for this training alone.")
    if "ood" in result:
        for key in ("entropy", "mutual_information"):
            lines.append(f"AUROC, {key.replace('_', ' ')}: {result['ood'][f'auroc_{key}']:.4f}")
    if "stored_temperature" in result:
        lines.append(f"The run's temperature {result['stored_temperature']:.4f} is applied.")
    if "decision" in result:
        d = result["decision"]
        right = "none" if d["acc"] is None else f"{d['acc']:.4f} right"
        if d["threshold"] == math.inf:
            lines.append("No threshold kept its promise: every row goes to a human.")
        else:
            lines.append(f"At least {d['threshold']:.4f} sure: {d['coverage']:.1%} answered, "
                         f"{right}; the others go to a human.")  # fmt: skip
    return "\n".join(lines)
