"""Train adapters on a file of questions and answers. The base model itself does not change. The
run folder in --out then has the adapters and all that `evaluate` and `predict` need to know."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...core.config import AdapterConfig
from ...data import Encoded, Wording, encode, load, num_classes, split
from ...data.tokenizer import load_tokenizer
from ...fast.quantize import KINDS
from ...interop.importing import read_run, start_from
from ...methods import Swag
from ...model.attach import add_adapters
from ...model.llama import Llama
from ...support.errors import InputError, Interrupted
from ...support.files import sha256
from ...support.progress import progress_bar
from ...training import savepoints
from ...training.lock import alone
from ...training.loop import fit
from ...training.runs import keep_command, resume_command, run_facts, save_run
from ...training.trainer import TrainConfig, Trainer
from ...training.watch import Watch, interval
from . import options, runs, talk
from .loggers import LOGGERS, logging, need
from .output import Result, say

OPTIMISER = {
    "steps": "optimiser steps",
    "batch": "questions per optimiser step",
    "micro_batch": "questions per forward pass; their gradients are accumulated",
    "lr": "AdamW learning rate of A and B",
    "variational_lr": "AdamW learning rate of log s and log sigma, or of blob's G",
    "warmup": "fraction of the steps over which learning rates rise from 0",
    "weight_decay": "weight decay of AdamW",
    "beta": "weight of KL / N in the loss, for N training questions; 1 is the ELBO",
    "kl": "direction of the KL divergence: forward is KL(q||p), official is KL(p||q)",
    "objective": "elbo: AdamW on NLL and KL together; official: AdamW on the NLL, then SGD on the "
    "KL, as in the official code",
    "swag": "fit a Gaussian to the weights over this last fraction of the steps, at constant "
    "rates, for `posterior swag` (mle, map)",
    "swag_lr": "AdamW learning rate of A and B in the steps of --swag",
    "kl_lr": "--objective official: SGD learning rate of the KL",
    "kl_gamma": "--objective official: the KL's weights repeat after 100 N^(pi / kl_gamma) / batch "
    "steps",
}
MEMORY = {
    "checkpoint_every": "steps between checkpoints",
    "recompute": "store only each block's input for the backward pass and compute the rest again: "
    "less memory, more time",
    "offload_activations": "store activations for the backward pass in CPU memory",
    "compile": "compile the transformer blocks with torch.compile",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model, data and run")
    options.add_base(group)
    options.add_data(group)
    group.add_argument("--holdout", type=float, default=0.0, metavar="FRACTION",
        help="fraction of the questions to leave out of training, such as 0.2: their NLL is shown "
        "on the way. `calibrate` or `threshold` without --data, --keep best, `evaluate "
        "--temperature` and `posterior subspace --precision validation` use them "
        "(default: 0)")  # fmt: skip
    group.add_argument("--keep", choices=("last", "best"), default="last",
        help="adapters to keep: of the last step, or of the step with the lowest NLL on the "
        "questions of --holdout")  # fmt: skip
    group.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to write")
    group.add_argument("--init", type=Path, metavar="RUN",
        help="start from this run: from all its values, or only from its mean if method, "
        "covariance, rank or scaling differ")  # fmt: skip
    group.add_argument("--resume", action="store_true",
        help="continue from the last checkpoint in --out; start anew if there is none")  # fmt: skip
    options.add_wording(parser.add_argument_group("prompts and answers"), "{}")
    group = parser.add_argument_group("method and adapters")
    options.add_adapter(group)
    options.add_targets(group, "{}, or --init's")
    helps = {"alpha": "scaling of the adapters is alpha / rank"}
    options.add_fields(group, AdapterConfig, helps, "{}, or --init's")
    group.add_argument("--head", choices=("classes", "full"), default="classes",
        help="rows of lm_head to keep: classes keeps the answers' tokens; full keeps all, which "
        "`generate` needs")  # fmt: skip
    group = parser.add_argument_group("optimiser")
    group.add_argument("--epochs", type=float, metavar="N",
        help="passes over the questions, in place of --steps")  # fmt: skip
    options.add_fields(group, TrainConfig, OPTIMISER)
    group = parser.add_argument_group("memory, checkpoints and processes")
    options.add_fields(group, TrainConfig, MEMORY)
    group.add_argument("--checkpoints-beside", action="store_true",
        help="write checkpoints in the background while training continues")  # fmt: skip
    group.add_argument("--log", nargs="+", choices=tuple(LOGGERS), default=[],
        help="also send each step's numbers to TensorBoard, Weights & Biases or MLflow, each an "
        "extra of this package")  # fmt: skip
    group.add_argument("--quantize", choices=KINDS,
        help="store the base model's blocks in 8 or 4 bits (default: not quantised)")  # fmt: skip
    options.add_dtype(group, "the base model; adapters are always float32")
    options.add_ranks(group)


@runs.on_ranks
def run(args: argparse.Namespace) -> Result:
    with alone(args.out):
        adapter, config = _configs(args)
        _check_out(args)
        model, (data, held), init = _prepared(args, adapter)
        if args.epochs is not None:
            steps = round(args.epochs * math.ceil(len(data.labels) / config.batch))
            config = dataclasses.replace(config, steps=max(1, steps))
        swag = Swag() if config.swag else None
        start = init["sha256"] if init else None
        trainer = Trainer(model, data, config, collector=swag, init=start)
        info = _facts(args, data) | {"init": init, "train": dataclasses.asdict(config)}
        watch = None
        if held:
            every = interval(config.steps, trainer.order.steps_per_epoch)
            watch = Watch(held, every, args.keep == "best")
        try:
            _fit(args, trainer, watch)
        except Interrupted as error:
            if not args.process:
                print(f"{error}: {resume_command(args.out)}", file=sys.stderr)
            return {"run": str(args.out), "steps": trainer.done, "exit_code": 128 + error.signum}
        if watch and watch.keep:
            info |= {"kept": {"step": watch.step, "heldout_nll": watch.nll}}
        save_run(args.out, model, info)
        if swag and not args.process:
            swag.save(args.out)
        last = _last_record(args.out / "train.jsonl")
    count = len(data.labels)
    say(args, f"trained {trainer.done} steps on {count} examples: {args.out}")
    found = {} if args.process else talk.say_end(args, trainer, watch)
    return {"run": str(args.out), "steps": trainer.done, "examples": count, "last": last,
            "verdict": found}  # fmt: skip


def _configs(args: argparse.Namespace) -> tuple[AdapterConfig, TrainConfig]:
    """The options for adapters and for training. Missing adapter options are --init's."""
    given = options.given(AdapterConfig, args)
    if args.init:
        before = AdapterConfig(**run_facts(args.init)["adapter"])
        given = {name: getattr(before, name) for name in ("rank", "alpha", "targets")} | given
    adapter = AdapterConfig(**given)
    config = TrainConfig(**options.given(TrainConfig, args))
    if not 0 <= args.holdout < 1:
        raise InputError(f"--holdout must be in [0, 1), not {args.holdout}")
    if args.epochs is not None and args.steps is not None:
        raise InputError("--epochs and --steps: give one of them")
    if args.epochs is not None and not 0 < args.epochs <= 1e6:
        raise InputError(f"--epochs must be above 0 and at most 1e6, not {args.epochs}")
    if args.keep == "best" and not args.holdout:
        raise InputError("--keep best needs held-out questions: give --holdout, such as 0.2")
    if args.keep == "best" and config.swag:
        raise InputError("--keep best and --swag: give one, as SWAG averages the last steps")
    need(args.log)
    if config.compile and runs.sharded(args):
        raise InputError("--compile does not work with --shard or --offload-weights yet: give one")
    return adapter, config


def _check_out(args: argparse.Namespace) -> None:
    """Raise InputError rather than overwrite a run; --resume may continue an unfinished one."""
    resuming = args.resume and savepoints.exists(args.out)
    if not resuming and (args.out / "run.json").exists():
        raise InputError(f"{args.out}: holds a finished run: give another --out")
    if not args.resume and (args.out / "train.jsonl").exists():
        raise InputError(
            f"{args.out}: holds a run already: {resume_command(args.out)}, or give another --out"
        )
    if args.resume and not resuming:
        say(args, f"{args.out}: no checkpoint to resume from: starting at step 0")


def _prepared(
    args: argparse.Namespace, adapter: AdapterConfig
) -> tuple[Llama, tuple[Encoded, Encoded | None], dict[str, str] | None]:
    """The model with its adapters, the rows to train on and those held out, and --init's run."""
    wording = options.wording(args, Wording())
    examples = load(args.data, options.data_format(args), args.limit, columns=options.columns(args))
    classes = num_classes(examples)
    examples, others = split(examples, args.holdout, args.seed)
    model = runs.load_base(args, args.model, args.dtype, args.quantize)
    longest = model.config.max_position_embeddings
    tokenizer = load_tokenizer(args.model)
    data = encode(examples, tokenizer, classes, longest, wording=wording)
    held = encode(others, tokenizer, classes, longest, wording=data.wording) if others else None
    if args.head == "classes":
        model.trim_head(data.classes)
    add_adapters(model, adapter, args.seed)
    init = None
    if args.init:
        start_from(model, read_run(args.init, model), args.init)
        init = {"run": args.init.name, "sha256": sha256(args.init / "adapter.safetensors")}
    runs.shard(args, model)
    return model, (data, held), init


def _fit(args: argparse.Namespace, trainer: Trainer, watch: Watch | None) -> None:
    steps, hooks = trainer.config.steps, []
    settings = dataclasses.asdict(trainer.config) | dataclasses.asdict(trainer.adapters[0].config)
    names = args.log if not args.process else []
    with progress_bar(steps, "train", "step") as bar, ExitStack() as stack:

        def on_start(done: int) -> None:  # no setting was refused
            hooks.append(stack.enter_context(logging(names, args.out, settings, done)))
            if not args.process:
                keep_command(args.out, args.typed)
            if done < steps:
                talk.say_data(args, trainer.data, watch, load_tokenizer(args.model))
                talk.say_defaults(args, trainer)
            bar.update(done)
            hooks.append(talk.Talk(args, trainer, bar).on_step)

        def on_step(record: dict[str, float]) -> None:
            for hook in hooks:
                hook(record)

        fit(trainer, args.out, args.resume, on_step, args.checkpoints_beside, watch, on_start)


def _facts(args: argparse.Namespace, data: Encoded) -> dict[str, Any]:
    """A run's record of its base model, its data and its prompts."""
    return {
        "model": str(args.model.resolve()),
        "data": str(args.data.resolve()),
        "data_sha256": sha256(args.data),
        "examples": len(data.labels),
        "format": options.data_format(args),
        **{name: vars(args)[name] for name in ("text_column", "label_column", "limit", "holdout")},
        **data.wording.facts(),
        "dtype": args.dtype,
        "quantize": args.quantize,
    }


def _last_record(log: Path) -> Any:
    try:
        return json.loads(log.read_bytes().splitlines()[-1])
    except (ValueError, IndexError):  # the log of a run that was finished before
        raise InputError(f"{log}: its last line is not a record of a step") from None
