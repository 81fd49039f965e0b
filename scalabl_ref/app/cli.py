"""The `scalabl` command: arguments in, library calls, results out. No method lives here.

Exit codes: 0 done, 1 a check of `verify` or `conformance` failed, 2 bad input, or no memory, room
or permission (one line on standard error), 3 another process of the run ended or is silent, 128 + n
ended by signal n.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.errors import InputError, Interrupted, ending
from ..support.hub import model_folder
from .arguments import Parser

if TYPE_CHECKING:
    from ..core.config import AdapterConfig
    from ..data import Columns, Encoded, Example, Wording
    from ..data.tokenizer import Tokenizer
    from ..evaluation.answering import Answers, Samples
    from ..methods import Posterior
    from ..model.llama import Llama
    from ..training.trainer import TrainConfig

Result = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = argparse.Namespace(process=0)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may have no letter for a choice
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _parsed(arguments)
        if isinstance(getattr(args, "model", None), Path):
            args.model = model_folder(args.model)  # so that a run keeps a folder, not a name
        result = args.command(args)
        if args.json and not args.process:
            from ..support.fields import json_text

            print(json_text(result, indent=2))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 141
    except (Exception, KeyboardInterrupt) as error:
        said = ending(error, f" on rank {args.process}" if args.process else "")
        if said is None:
            raise
        print(said[1], file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # no room for it: Python would try once more at its end, and say so
            with suppress(OSError):
                sys.stdout.close()
        return said[0]
    return int(result.get("exit_code", 0))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says an option's default, but for one of None, which says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parsed(arguments: list[str]) -> argparse.Namespace:
    args, rest = _parser(next(iter(arguments), "")).parse_known_args(arguments)
    if rest:
        raise InputError(f"{rest[0][:60]!r} belongs to no option: a text with spaces needs quotes")
    return args


def _parser(chosen: str) -> Parser:
    """All commands by name; the arguments of the one chosen, whose modules alone are imported."""
    from .. import __version__

    parser = Parser(
        prog="scalabl",
        description="Bayesian low-rank adaptation of Llama in an r-dimensional subspace",
    )
    parser.add_argument("--version", action="version", version=f"scalabl_ref {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (help_text, add_arguments, command) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            formatter_class=_Help,
        )
        if name == chosen:
            add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
        sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
        sub.set_defaults(command=command, process=0)
    return parser


def _say(args: argparse.Namespace, text: str) -> None:
    """A line for people, of rank 0: on standard output, unless that is kept for JSON."""
    if not args.process:
        print(text, file=sys.stderr if args.json else sys.stdout)


_BY_ENDING = "(default: csv if its name ends in .csv or .tsv, otherwise jsonl)"


def _add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    from ..data import FORMATS

    parser.add_argument("--data", type=Path, required=required, help="file of examples")
    add = parser.add_argument
    add("--format", choices=FORMATS, help=f"format of --data {_BY_ENDING}")
    for name in ("text", "label"):
        add(f"--{name}-column", metavar="NAME",
            help=f"csv column or jsonl key of the {name} (default: see docs/data.md)")  # fmt: skip
    add("--limit", type=int, help="use only the first LIMIT examples")


def _format(args: argparse.Namespace) -> str:
    from ..data import format_of

    return args.format or format_of(args.data)


def _columns(args: argparse.Namespace) -> Columns:
    from ..data import Columns

    return Columns(args.text_column, args.label_column)


def _examples(
    args: argparse.Namespace, info: Mapping[str, Any], data: Path | None = None
) -> list[Example]:
    """What is in --data, or in `data`, as the run whose facts these are reads it."""
    from ..data import Columns, format_of, load

    path = data or args.data
    format = args.format or format_of(path)
    columns = _columns(args)
    if format == info["format"]:
        text, label = info["text_column"], info["label_column"]
        columns = Columns(columns.text or text, columns.label or label)
    return load(path, format, args.limit, columns=columns, names=info["label_names"])


def _add_prompts(parser: argparse.ArgumentParser, default: str) -> None:
    """How prompts are made. default: how help says a default, {} standing for a new run's."""
    from ..data import STYLES

    add = parser.add_argument
    add("--prompt-template", type=Path, metavar="FILE",
        help="text file with {question} and perhaps {choices} "
        f"(default: {default.format('that of --format')})")  # fmt: skip
    add("--prompt-style", choices=STYLES,
        help="chat: use the model's own chat template "
        f"(default: {default.format('plain')})")  # fmt: skip


def _add_wording(parser: argparse.ArgumentParser, default: str) -> None:
    """How prompts are made and answers chosen."""
    from ..data import LABELS

    add = parser.add_argument
    _add_prompts(parser, default)
    add("--labels", choices=LABELS,
        help="answers are letters, or the words of the choices if every row has the same choices "
        f"(default: {default.format('auto')})")  # fmt: skip
    add("--answer-tokens", choices=("auto", "space", "bare"),
        help="token of an answer: ' A' (space), 'A' (bare), or the one that the tokenizer allows "
        f"(auto) (default: {default.format('auto')})")  # fmt: skip
    add("--max-length", type=int, metavar="TOKENS",
        help="cut longer prompts on the left; without a limit, a prompt that is too long is an "
        f"error (default: {default.format('no limit')})")  # fmt: skip
    add("--drop-long", action="store_true", default=None,
        help="drop prompts that are longer than --max-length")  # fmt: skip


def _with_prompts(args: argparse.Namespace, before: Wording) -> Wording:
    """`before`, with what `_add_prompts`' options say in its place."""
    from ..data import read_template

    template = read_template(args.prompt_template) if args.prompt_template else before.template
    return dataclasses.replace(before, template=template, style=args.prompt_style or before.style)


def _wording(args: argparse.Namespace, before: Wording) -> Wording:
    """`before`, with what `_add_wording`'s options say in its place."""
    given = {k: getattr(args, k) for k in ("labels", "answer_tokens", "max_length", "drop_long")}
    given = {k: v for k, v in given.items() if v is not None}
    return dataclasses.replace(_with_prompts(args, before), **given)


def _say_wording(args: argparse.Namespace, data: Encoded) -> None:
    """What the answers' tokens are, and what became of prompts that are too long."""
    from ..data.tokenizer import LETTERS

    names = data.wording.words or LETTERS[: len(data.classes)]
    behind = " behind a space" if data.wording.answer_tokens == "space" else ""
    shown = ", ".join(f"{n!r} {i}" for n, i in zip(names, data.classes, strict=True))
    _say(args, f"answers are the tokens of {shown}{behind}")
    if data.notice:
        _say(args, f"note: {data.notice}")
    if data.cut or data.left_out:
        _say(args, f"{data.cut} prompts were cut, and {data.left_out} left out, at "
             f"{data.wording.max_length} tokens")  # fmt: skip


def _add_dtype(
    parser: argparse.ArgumentParser,
    of: str = "of the base model; adapters are always float32",
) -> None:
    from ..training.runs import DTYPES

    parser.add_argument("--dtype", choices=DTYPES, help=f"dtype {of} (default: as stored)")


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, args.dtype) if args.dtype else None


def _device(args: argparse.Namespace) -> Any:
    """The torch device, checked: a clear error instead of a traceback at the first tensor."""
    import torch

    from ..training.ranks import own_device

    kind = args.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device {args.device!r} cannot be used: expected cpu, cuda or cuda:1")
    if kind == "cuda" and not torch.backends.cuda.is_built():
        raise InputError("this PyTorch is CPU-only: install a CUDA build or drop --device")
    try:
        device = own_device(torch.device(args.device))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"device {args.device!r} cannot be used: {reason}") from None
    return device


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    from ..training.ranks import TIMEOUT

    parser.add_argument(
        "--shard", action="store_true", help="under torchrun, store a part of the base on each rank"
    )
    parser.add_argument(
        "--offload-weights",
        action="store_true",
        help="as --shard, but store it in the CPU's memory",
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="SECONDS",
        help="time that a rank under torchrun waits for the others",
    )  # fmt: skip


def _shards(args: argparse.Namespace) -> bool:
    """Whether the base is to be spread over the ranks; no, for a command that knows none."""
    return getattr(args, "shard", False) or getattr(args, "offload_weights", False)


def _load_on(args: argparse.Namespace) -> Any:
    """Where a base is loaded: where it computes, unless it goes there in pieces."""
    return "cpu" if _shards(args) else _device(args)


def _on_ranks(command: Callable[[argparse.Namespace], Result]) -> Callable[..., Result]:
    """A command that torchrun may start several times: joined while it runs."""

    def run(args: argparse.Namespace) -> Result:
        from ..training import ranks as distributed

        with distributed.joined(_device(args), args.timeout):
            args.process = distributed.rank()
            if _shards(args):
                distributed.need_ranks()
            return command(args)

    return run


# --- train -------------------------------------------------------------------------------------


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from ..core.config import TARGETS, AdapterConfig

    adapter = AdapterConfig()
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        help="the base model: a folder, or OWNER/NAME on the Hub",
    )
    _add_data(parser)
    add("--out", type=Path, required=True, help="run folder to write")
    add("--init", type=Path, metavar="RUN",
        help="start from this run: all its values, or its mean if method, covariance, rank or "
        "scaling differ")  # fmt: skip
    add("--resume", action="store_true",
        help="continue from the checkpoint in the run folder; begin if there is none")  # fmt: skip
    _add_optimiser(parser)
    add("--rank", type=int, help=f"rank r (default: {adapter.rank}, or --init's)")
    add("--alpha", type=float, help="scaling is alpha / rank (default: 2 * rank, or --init's)")
    add(
        "--targets",
        nargs="+",
        metavar="NAME",
        help=f"layers to adapt, of {' '.join(TARGETS)} "
        f"(default: {' '.join(adapter.targets)}, or --init's)",
    )
    _add_adapter(parser, f"default: {adapter.method}")
    add("--head", choices=("classes", "full"), default="classes",
        help="rows of lm_head to keep: those of the answers, or all")  # fmt: skip
    _add_wording(parser, "{}")
    add("--holdout", type=float, default=0.0,
        help="fraction of the rows to hold out from training, to fit a temperature")  # fmt: skip
    _add_memory(parser)
    _add_ranks(parser)


def _add_optimiser(parser: argparse.ArgumentParser) -> None:
    """Steps, learning rates and the objective."""
    from ..core.objective import KLS
    from ..training.runs import OBJECTIVES
    from ..training.trainer import TrainConfig

    train, add = TrainConfig(), parser.add_argument
    add("--steps", type=int, default=train.steps, help="optimiser steps")
    add("--batch", type=int, default=train.batch, help="examples per step")
    add("--micro-batch", type=int, help="examples computed at a time (gradient accumulation)")
    add("--lr", type=float, default=train.lr, help="AdamW learning rate of A and B")
    add(
        "--variational-lr",
        type=float,
        help="AdamW learning rate of log s and log sigma (blob: of G) (default: 4 * lr)",
    )
    add("--warmup", type=float, default=train.warmup,
        help="fraction of the steps in which learning rates rise")  # fmt: skip
    add("--weight-decay", type=float, default=train.weight_decay, help="weight decay of AdamW")
    add("--beta", type=float, default=train.beta, help="weight of KL / N; 1 is the ELBO")
    add("--kl", choices=tuple(KLS), default=train.kl,
        help="direction of the KL: forward is KL(q||p), official is KL(p||q)")  # fmt: skip
    add(
        "--objective",
        choices=OBJECTIVES,
        default=train.objective,
        help="elbo: AdamW on NLL and KL together; official: AdamW on the NLL, then SGD on the KL",
    )
    add("--swag", type=float, default=train.swag,
        help="last fraction of the steps, whose weights SWAG averages (mle, map)")  # fmt: skip
    add("--kl-lr", type=float, default=train.kl_lr,
        help="SGD learning rate of the KL (objective official)")  # fmt: skip


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """Checkpoints, and what training keeps where and in how many bits."""
    from ..fast.quantize import KINDS
    from ..training.trainer import TrainConfig

    train, add = TrainConfig(), parser.add_argument
    add("--checkpoint-every", type=int, default=train.checkpoint_every, metavar="STEPS",
        help="steps between checkpoints")  # fmt: skip
    add(
        "--recompute",
        action="store_true",
        help="store only each block's input for the backward pass: less memory, more time",
    )
    add(
        "--offload-activations",
        action="store_true",
        help="store activations for the backward pass in the CPU's memory",
    )
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add(
        "--checkpoints-beside",
        action="store_true",
        help="write checkpoints while training continues",
    )
    add("--quantize", choices=KINDS, help="load the base's blocks in 8 or 4 bits")
    _add_dtype(parser)


def _add_adapter(parser: argparse.ArgumentParser, method: str) -> None:
    """What an adapter is, beside rank, alpha and targets. method: what is said of its default."""
    from ..core.config import ADAPTERS, COVARIANCES, PRIORS, AdapterConfig
    from ..core.layer import SAMPLING

    default, add = AdapterConfig(), parser.add_argument
    trained = tuple(name for name, kind in ADAPTERS.items() if kind.trained)
    add("--method", choices=trained, help=f"scalabl, plain LoRA (mle), ... ({method})")
    add(
        "--sampling",
        choices=SAMPLING,
        default=default.sampling,
        help="one draw for each batch, example or token",
    )
    add("--covariance", choices=tuple(COVARIANCES), default=default.covariance,
        help="covariance of the Gaussian over the scales (scalabl)")  # fmt: skip
    add("--prior", choices=PRIORS, default=default.prior,
        help="fixed prior, or one fitted for each layer or each component (scalabl)")  # fmt: skip
    add("--dropout", type=float, default=default.dropout, help="dropout rate of inputs (dropout)")
    add(
        "--prior-std",
        type=float,
        help="standard deviation of the prior (default: 1; for blob 0.2)",
    )
    add("--init-sigma", type=float, default=default.init_sigma, help="largest initial sigma")


def _given(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are named as fields of a configuration dataclass; not those left out."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {k: v for k, v in vars(args).items() if k in names and v is not None}


def _train(args: argparse.Namespace) -> Result:
    from ..training.lock import alone

    with alone(args.out):
        return _trained(args)


def _trained(args: argparse.Namespace) -> Result:
    from ..data import Wording, encode, load, num_classes, split
    from ..data.tokenizer import load_tokenizer
    from ..methods import Swag
    from ..model.llama import Llama
    from ..support.progress import progress_bar
    from ..training.loop import fit
    from ..training.ranks import shard
    from ..training.runs import save_run
    from ..training.trainer import Trainer

    adapter, config = _configs(args)
    _check_out(args)
    wording = _wording(args, Wording())
    examples = load(args.data, _format(args), args.limit, columns=_columns(args))
    classes = num_classes(examples)
    examples, _ = split(examples, args.holdout, args.seed)
    model = Llama.from_pretrained(args.model, _dtype(args), _load_on(args), args.quantize)
    longest = model.config.max_position_embeddings
    data = encode(examples, load_tokenizer(args.model), classes, longest, wording=wording)
    if args.head == "classes":
        model.trim_head(data.classes)
    init = _start(args, model, adapter)
    if _shards(args):
        shard(model, _device(args), args.offload_weights)
    swag = Swag() if config.swag else None
    trainer = Trainer(model, data, config, collector=swag, init=init["sha256"] if init else None)
    info = _training_facts(args, data) | {"init": init, "train": dataclasses.asdict(config)}
    try:
        with progress_bar(config.steps, "train", "step") as bar:
            said: list[bool] = []

            def show(record: dict[str, float]) -> None:
                if not said:  # it begins: nothing was refused
                    said.append(True)
                    _say_wording(args, data)
                shown = {key: record[key] for key in ("loss", "kl", "sigma")}
                bar.set_postfix(shown, refresh=False)
                bar.update(int(record["step"]) + 1 - bar.n)

            fit(trainer, args.out, args.resume, show, args.checkpoints_beside)
    except Interrupted as error:
        if not args.process:
            print(f"{error}: continue with --resume", file=sys.stderr)
        return {"run": str(args.out), "steps": trainer.done, "exit_code": 128 + error.signum}
    save_run(args.out, model, info)
    if swag and not args.process:
        swag.save(args.out)
    log = args.out / "train.jsonl"
    try:
        last = json.loads(log.read_bytes().splitlines()[-1])
    except (ValueError, IndexError):  # of a run that was finished already
        raise InputError(f"{log}: its last line is not a record of a step") from None
    _say(args, f"trained {trainer.done} steps on {len(data.labels)} examples: {args.out}")
    return {"run": str(args.out), "steps": trainer.done, "examples": len(data.labels), "last": last}


def _configs(args: argparse.Namespace) -> tuple[AdapterConfig, TrainConfig]:
    """What the options say of the adapters, as --init has them else, and of the training."""
    from ..core.config import AdapterConfig
    from ..training.runs import run_facts
    from ..training.trainer import TrainConfig

    given = _given(AdapterConfig, args)
    if args.init:
        before = AdapterConfig(**run_facts(args.init)["adapter"])
        given = {name: getattr(before, name) for name in ("rank", "alpha", "targets")} | given
    adapter, config = AdapterConfig(**given), TrainConfig(**_given(TrainConfig, args))
    if not 0 <= args.holdout < 1:
        raise InputError(f"--holdout must be in [0, 1), and is {args.holdout}")
    if args.compile and _shards(args):
        raise InputError("--compile does not work with --shard or --offload-weights yet: give one")
    return adapter, config


def _start(args: argparse.Namespace, model: Llama, adapter: AdapterConfig) -> dict[str, str] | None:
    """Put adapters on the model, with --init's values if it is given; returns what that is."""
    from ..interop.importing import read_run, start_from
    from ..model.attach import add_adapters
    from ..support.files import sha256

    add_adapters(model, adapter, args.seed)
    if not args.init:
        return None
    start_from(model, read_run(args.init, model), args.init)
    return {"run": args.init.name, "sha256": sha256(args.init / "adapter.safetensors")}


def _training_facts(args: argparse.Namespace, data: Encoded) -> dict[str, Any]:
    """What a run keeps of its base, its data, and how it was asked."""
    from ..support.files import sha256

    return {
        "model": str(args.model.resolve()),
        "data": str(args.data.resolve()),
        "data_sha256": sha256(args.data),
        "examples": len(data.labels),
        "format": _format(args),
        "text_column": args.text_column,
        "label_column": args.label_column,
        "limit": args.limit,
        "holdout": args.holdout,
        **data.wording.facts(),
        "dtype": args.dtype,
        "quantize": args.quantize,
    }


def _check_out(args: argparse.Namespace) -> None:
    """Raise InputError rather than write over a run; --resume may, over one that has no end."""
    from ..training import savepoints

    resuming = args.resume and savepoints.exists(args.out)
    if not resuming and (args.out / "run.json").exists():
        raise InputError(f"{args.out}: holds a finished run: give another --out")
    if not args.resume and (args.out / "train.jsonl").exists():
        raise InputError(f"{args.out}: holds a run already: give --resume or another --out")
    if args.resume and not resuming:
        _say(args, f"{args.out}: no checkpoint to resume from: beginning")


# --- posterior ---------------------------------------------------------------------------------


def _posterior_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "method",
        choices=("laplace", "tfb", "swag", "ensemble"),
        help="posterior to make from the runs",
    )
    add(
        "--run",
        type=Path,
        nargs="+",
        required=True,
        help="finished run of mle or map (ensemble: two or more; swag: trained with --swag)",
    )
    add("--model", type=Path, help="folder of the base model, if it has moved")
    add("--out", type=Path, required=True, help="new run folder to write")
    _add_data(parser, required=False)
    add("--layers", choices=("all", "last"), default="all", help="layers that are random (laplace)")
    add("--kron-rank", type=int, help="eigenvectors kept of each factor (laplace; default: all)")
    add("--tolerance", type=float, default=0.003, help="relative change of the NLL allowed (tfb)")
    add("--samples", type=int, default=10, help="draws to measure the change with (tfb)")
    add("--batch", type=int, default=8, help="examples computed at a time")


def _posterior(args: argparse.Namespace) -> Result:
    from ..support.files import new_folder
    from ..training.lock import alone
    from ..training.runs import save_run

    runs = args.run
    _check_plain(runs, args.method)
    with alone(args.out, new=True), new_folder(args.out) as folder:
        args.run = runs[0]
        model, tokenizer, info, _ = _open_run(args)
        posterior, found = _made(args, runs, model, tokenizer, info)
        facts = {"made_by": args.method, "from": [str(run) for run in runs], **found}
        name = None if posterior is None else args.method
        save_run(folder, model, {**info, "posterior": name, **facts})
        if posterior is not None:
            posterior.save(folder)
    _say(args, f"written: {args.out}, a run to evaluate and predict with")
    return {"run": str(args.out), **facts}


def _made(
    args: argparse.Namespace,
    runs: list[Path],
    model: Llama,
    tokenizer: Tokenizer,
    info: Mapping[str, Any],
) -> tuple[Posterior | None, dict[str, Any]]:
    """The posterior of the runs, None if it is in the model's adapters now, and what was found.

    Without --data, laplace and tfb see what the run was trained on, its hold-out left out.
    """
    from ..data import Wording, evaluation_batches
    from ..evaluation.answering import encode_for
    from ..methods import Ensemble, Laplace, Swag, fit_tfb
    from ..support.tensors import load_tensors

    if args.method == "ensemble":
        return Ensemble([load_tensors(run / "adapter.safetensors")[0] for run in runs]), {}
    if args.method == "swag":
        if not (args.run / "swag.safetensors").exists():
            raise InputError(f"{args.run}: has no swag.safetensors, which train --swag writes")
        return Swag.load(args.run), {}
    if args.data:
        examples = _examples(args, info)
    else:
        examples, _ = _own_data(args.run, info, "--data")
    encoded = encode_for(model, tokenizer, examples, Wording.of_run(info))
    batches = evaluation_batches(encoded, args.batch)
    if args.method == "tfb":
        sigma = fit_tfb(model, batches, args.tolerance, args.samples, args.seed)
        return None, {"sigma": sigma}
    laplace = Laplace.fit(model, batches, args.layers, args.kron_rank).optimise_prior()
    return laplace, {"precision": laplace.precision}


def _check_plain(runs: list[Path], method: str) -> None:
    """Raise InputError unless `method` can be made of these runs.

    All are plain LoRA, which is what it predicts with, and nothing was made of them; several are
    alike, and no two the same.
    """
    from ..data import Wording
    from ..support.files import sha256
    from ..training.runs import run_facts

    if (len(runs) > 1) != (method == "ensemble"):
        count = "two runs or more" if method == "ensemble" else "one run"
        raise InputError(f"posterior {method} takes {count} in --run, not {len(runs)}")
    facts = [run_facts(run) for run in runs]
    by_weights: dict[str, Path] = {}
    for run, info in zip(runs, facts, strict=True):
        trained, posterior = info["adapter"]["method"], info["posterior"]
        if posterior is not None:
            raise InputError(f"{run}: has a posterior already, {posterior}")
        if trained not in ("mle", "map"):
            raise InputError(f"{run}: {method} is made of runs of mle or map, not of {trained}")
        alike, first = (
            {key: of[key] for key in ("fingerprint", "adapter", "head_tokens")}
            | Wording.of_run(of).facts()
            for of in (info, facts[0])
        )
        for key in alike:
            if alike[key] != first[key]:
                raise InputError(f"{run}: differs from {runs[0]} in {key}: no ensemble")
        same = by_weights.setdefault(sha256(run / "adapter.safetensors"), run)
        if same is not run:
            raise InputError(f"{run}: has the same weights as {same}: no ensemble")


# --- evaluate ----------------------------------------------------------------------------------


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    from ..data import FORMATS

    add = parser.add_argument
    add("--run", type=Path, help="run folder that `scalabl train` wrote")
    add("--model", type=Path, help="folder of the base model, if it has moved; without --run, the "
        "model to evaluate")  # fmt: skip
    _add_data(parser)
    add("--ood", type=Path, help="file of out-of-distribution examples")
    add("--ood-format", choices=FORMATS, help=f"format of --ood {_BY_ENDING}")
    _add_samples(parser)
    add("--bins", type=int, default=15,
        help="bins of the expected calibration error, at most 10,000")  # fmt: skip
    add("--batch", type=int, default=32, help="examples computed at a time")
    add(
        "--temperature",
        action="store_true",
        help="also fit a temperature on the rows of train --holdout, or on --calibrate",
    )
    add("--calibrate", type=Path,
        help="file of held-out examples, in --format; implies --temperature")  # fmt: skip
    add("--out", type=Path, help="folder for the results (default: in RUN, or base-MODEL, "
        "named after --data)")  # fmt: skip
    add("--force", action="store_true", help="overwrite other results in that folder")
    _add_wording(parser, "the run's, or {} without --run")
    _add_dtype(parser, "of a base model without --run")
    _add_ranks(parser)


def _add_samples(parser: argparse.ArgumentParser) -> None:
    from ..evaluation.predict import DESIGNS

    add = parser.add_argument
    add(
        "--samples",
        default="10",
        metavar="N",
        help="number of posterior draws, at most 100,000 (an ensemble uses all members); "
        "0: the mean model; "
        "auto: for each example, until more cannot change its answer by more than --tolerance; "
        "exact: the integral, if only lm_head is adapted, for at most 4 classes or rank 3",
    )
    add("--tolerance", type=float, default=0.05, help="tolerance of --samples auto, in probability")
    add("--most", type=int, default=1000,
        help="limit on the draws per example with --samples auto, at most 100,000")  # fmt: skip
    add("--design", choices=DESIGNS, default="independent", help="how draws depend on each other: "
        "antithetic and latin reduce the error of the average")  # fmt: skip


def _samples(args: argparse.Namespace) -> Samples:
    from ..evaluation.predict import check_samples
    from ..evaluation.sequential import Auto

    if args.samples == "exact":
        return "exact"
    if args.samples == "auto":
        return Auto(tolerance=args.tolerance, most=args.most)
    try:
        samples = int(args.samples)
    except ValueError:
        raise InputError(
            f"--samples must be a number, auto or exact, not {args.samples!r}"
        ) from None
    check_samples(samples)
    return samples


def _evaluate(args: argparse.Namespace) -> Result:
    from ..evaluation.evaluate import check_results, results_folder
    from ..evaluation.metrics import checked_bins
    from ..training.lock import alone
    from ..training.runs import run_facts

    if not (args.run or args.model):
        raise InputError("give --run, or --model for a base model alone")
    samples, _ = _samples(args), checked_bins(args.bins)
    info = run_facts(args.run) if args.run else _base_facts(args)
    settings = _evaluation(args, samples, info)
    of = args.run or Path(f"base-{args.model.resolve().name}")
    folder = args.out or results_folder(of, args.data)
    with alone(folder):
        if not args.force:
            check_results(folder, settings)
        return _evaluated(args, samples, info, folder, settings)


def _base_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What a run's facts would be, for a base model without one."""
    from ..data import Wording
    from ..evaluation.evaluate import BASE

    return {
        "model": str(args.model),
        "adapter": {"method": BASE},
        "posterior": None,
        "dtype": args.dtype,
        "quantize": None,
        "format": _format(args),
        "text_column": None,
        "label_column": None,
        **Wording().facts(),
        "holdout": 0.0,
        "train": {"kl": None, "objective": None},
    }


def _evaluation(args: argparse.Namespace, samples: Samples, info: Mapping[str, Any]) -> Result:
    """What decides an evaluation's results, by the names of the options."""
    from ..data import Wording, format_of
    from ..support.files import sha256

    given = ("limit", "design", "seed", "bins")
    return {
        "data_sha256": sha256(args.data),
        "model": None if args.run else info["model"],
        "dtype": info["dtype"],
        "adapter_sha256": args.run and sha256(args.run / "adapter.safetensors"),
        "posterior": info["posterior"],
        "format": _format(args),
        **_wording(args, Wording.of_run(info)).facts(),
        **{name: vars(args)[name] for name in given},
        "temperature": bool(args.temperature or args.calibrate),
        "samples": samples if isinstance(samples, (int, str)) else dataclasses.asdict(samples),
        "calibrate_sha256": args.calibrate and sha256(args.calibrate),
        "ood_sha256": args.ood and sha256(args.ood),
        "ood_format": args.ood and (args.ood_format or format_of(args.ood)),
    }


def _evaluated(
    args: argparse.Namespace,
    samples: Samples,
    info: Mapping[str, Any],
    folder: Path,
    settings: Result,
) -> Result:
    from ..data import Wording, format_of, load
    from ..evaluation.answering import answer, encode_for
    from ..evaluation.evaluate import score

    wording = _wording(args, Wording.of_run(info))
    if args.run:
        model, tokenizer, info, posterior = _open_run(args)
        examples = _examples(args, info)
    else:
        model, tokenizer = _open_base(args)
        posterior, examples = None, _examples(args, info)
        encoded = encode_for(model, tokenizer, examples, wording)
        wording = encoded.wording  # one for --calibrate and --ood as well
        model.trim_head(encoded.classes)

    def ask(examples: list[Example], title: str) -> Answers:
        return answer(
            model, tokenizer, examples, samples, args.seed, args.batch, title, posterior,
            design=args.design, answerable=title != "ood", wording=wording,
        )  # fmt: skip

    calibration = ood = None
    if args.temperature or args.calibrate:
        calibration = ask(_held_out(args, info), "calibrate")
    if args.ood:
        ood_format = args.ood_format or format_of(args.ood)
        columns = _columns(args) if ood_format in ("csv", "jsonl") else None
        ood = ask(load(args.ood, ood_format, args.limit, columns=columns), "ood")
    answers = ask(examples, "evaluate")
    results = score(
        {**info, "data": str(args.data)},
        answers,
        seed=args.seed,
        design=args.design,
        bins=args.bins,
        calibration=calibration,
        ood=ood,
        settings=settings,
    )
    results.write(folder, *([args.run] if args.run and not args.out else []))
    if answers.encoded:
        _say_wording(args, answers.encoded)
    _say(args, _metrics_table(results.metrics))
    _say(args, f"written: {folder / 'metrics.json'}, predictions.jsonl, report.html")
    return results.metrics


def _open_base(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    """The model of --model by itself, without adapters."""
    from ..data.tokenizer import load_tokenizer
    from ..model.llama import Llama

    if _shards(args):
        raise InputError("--shard and --offload-weights need a --run")
    model = Llama.from_pretrained(args.model, _dtype(args), _device(args))
    return model, load_tokenizer(args.model)


def _open_run(
    args: argparse.Namespace,
) -> tuple[Llama, Tokenizer, Mapping[str, Any], Posterior | None]:
    """(model, tokenizer, facts, posterior) of --run; its base is --model's if that is given."""
    import torch

    from ..data.tokenizer import load_tokenizer
    from ..methods import load_posterior
    from ..model.llama import Llama
    from ..training import ranks as distributed
    from ..training.runs import load_run, run_facts

    info = run_facts(args.run)
    folder = args.model or info["model"]
    dtype = getattr(torch, info["dtype"]) if info["dtype"] else None
    base = Llama.from_pretrained(folder, dtype, _load_on(args), info["quantize"])
    model, _ = load_run(args.run, base, base=folder)
    posterior = load_posterior(args.run, info)
    if _shards(args):
        if posterior is not None:
            raise InputError(f"{args.run}: posterior {info['posterior']} needs a whole base")
        distributed.shard(model, _device(args), args.offload_weights)
    return model, load_tokenizer(folder), info, posterior


def _held_out(args: argparse.Namespace, info: Mapping[str, Any]) -> list[Example]:

    if args.calibrate:
        return _examples(args, info, args.calibrate)
    if not info["holdout"]:
        why = "was trained without --holdout" if args.run else "is a model without a hold-out"
        raise InputError(f"{args.run or args.model}: {why}: give --calibrate")
    return _own_data(args.run, info, "--calibrate")[1]


def _own_data(
    run: Path, info: Mapping[str, Any], instead: str
) -> tuple[list[Example], list[Example]]:
    """What a run was trained on, and what was held out: its file, split again.

    Raises InputError, which asks for the option `instead`, if that file is not known, or another.
    """
    from ..data import Columns, load, split
    from ..support.files import sha256

    data, seed = info["data"], info["train"]["seed"]
    if None in (data, info["data_sha256"], seed):
        raise InputError(
            f"{run / 'run.json'}: does not say what file it was trained on: give {instead}"
        )
    if sha256(Path(data)) != info["data_sha256"]:
        raise InputError(f"{data}: has changed since {run} was trained on it: give {instead}")
    columns = Columns(info["text_column"], info["label_column"])
    examples = load(data, info["format"], info["limit"], columns=columns)
    return split(examples, info["holdout"], seed)


def _metrics_table(result: Result) -> str:
    rows = [("", result)]
    if "temperature" in result:
        rows.append((f"temperature {result['temperature']['value']:.3f}", result["temperature"]))
    if "ood" in result and "acc" in result["ood"]:
        rows.append((f"ood ({result['ood']['n_scored']} scored)", result["ood"]))
    lines = [
        f"{'':24}{'n':>7}" + "".join(f"{key.upper():>25}" for key in ("acc", "ece", "nll", "brier"))
    ]
    for name, values in rows:
        cells = []
        for key in ("acc", "ece", "nll", "brier"):
            low, high = values["intervals"][key]
            cells.append(f"{values[key]:.4f} [{low:.4f}, {high:.4f}]".rjust(25))
        lines.append(f"{name or result['method']:24}{values['n']:>7}" + "".join(cells))
    if "ood" in result:
        for key in ("entropy", "mutual_information"):
            lines.append(f"AUROC, {key.replace('_', ' ')}: {result['ood'][f'auroc_{key}']:.4f}")
    return "\n".join(lines)


# --- predict, generate -------------------------------------------------------------------------


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder that `scalabl train` wrote")
    add("--model", type=Path, help="folder of the base model, if it has moved")
    add("--prompt", required=True, help="the question")
    add("--choices", nargs="+", metavar="TEXT",
        help="answers to choose from (default: those that all rows of the run share)")  # fmt: skip
    _add_samples(parser)
    _add_wording(parser, "the run's")
    _add_ranks(parser)


def _predict(args: argparse.Namespace) -> Result:
    from ..data import Wording, question
    from ..evaluation.answering import answer

    samples = _samples(args)
    model, tokenizer, info, posterior = _open_run(args)
    wording = _wording(args, Wording.of_run(info))
    choices = args.choices or list(wording.names or ())
    if not choices:
        raise InputError(f"{args.run}: its rows had choices of their own: give --choices")
    example = question(args.prompt, choices, info["format"])
    head = model.config.head_tokens
    if head is not None and len(head) < len(choices):
        raise InputError(f"{args.run}: answers {len(head)} choices, not {len(choices)}")
    if wording.words is not None and sorted(choices) != sorted(wording.words):
        known = " ".join(map(repr, wording.words))
        raise InputError(f"{args.run}: --choices must be its labels, or left out: {known}")
    choices = list(wording.words or choices)
    answers = answer(
        model, tokenizer, [example], samples, args.seed, posterior=posterior, design=args.design,
        wording=wording,
    )  # fmt: skip
    p, draws = answers.prediction, answers.draws
    probs, others = p.probs[0, : len(choices)], p.probs[0, len(choices) :]
    for choice, value in zip(choices, probs.tolist(), strict=True):
        _say(args, f"{value:.4f}  {choice}")
    result: Result = {"choices": choices, "probs": probs.tolist()}
    if len(others):
        result["others"] = others.sum().item()
        _say(args, f"{result['others']:.4f}  other classes of the run")
    result["samples"] = answers.samples if draws is None else int(draws[0])
    for name in ("entropy", "expected_entropy", "mutual_information"):
        result[name] = getattr(p, name)[0].item()
        _say(args, f"{name.replace('_', ' ')}: {result[name]:.4f} nats")
    return result


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=Path, help="run folder, trained with --head full")
    add("--model", type=Path, help="a folder, or OWNER/NAME on the Hub (needed without --run)")
    add("--prompt", default="", help="text to continue")
    add("--max-new-tokens", type=int, default=100, help="tokens to write at most")
    add("--samples", type=int, default=0, help="draws of the posterior; 0 is the mean model")


def _generate(args: argparse.Namespace) -> Result:
    from ..data.tokenizer import load_tokenizer
    from ..evaluation.generate import generate
    from ..model.llama import Llama

    if args.run:
        model, tokenizer, _, posterior = _open_run(args)
        if posterior is not None:
            raise InputError(f"{args.run}: its posterior answers questions, it cannot write text")
    elif args.model:
        model = Llama.from_pretrained(args.model, device=_device(args))
        tokenizer = load_tokenizer(args.model)
    else:
        raise InputError("give --run or --model")
    prompt = tokenizer.encode(args.prompt)
    stop = tokenizer.eos_ids
    tokens = list(generate(model, prompt, args.max_new_tokens, args.samples, args.seed, stop=stop))
    text = tokenizer.decode(prompt + [token.id for token in tokens])
    _say(args, text)
    if tokens:
        count = len(tokens)
        entropy = sum(token.entropy for token in tokens) / count
        information = sum(token.mutual_information for token in tokens) / count
        _say(
            args,
            f"mean per token: entropy {entropy:.4f}, mutual information {information:.4f} nats",
        )
    return {"text": text, "tokens": [token._asdict() for token in tokens]}


# --- export, import ----------------------------------------------------------------------------


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    from ..interop.exporting import TO

    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder")
    add("--model", type=Path, help="folder of the base model, if it has moved")
    add("--to", choices=TO, required=True,
        help="peft: an adapter folder; hf: a model folder with the adapter merged")  # fmt: skip
    add("--out", type=Path, required=True, help="folder to write")
    add("--samples", type=int, default=0,
        help="draws to write, each to its own folder in --out; 0 writes the mean")  # fmt: skip
    add("--base", metavar="NAME", help="name of the base model, as owner/model on the Hub")
    _add_dtype(parser, "of the merged weights (hf)")


def _export(args: argparse.Namespace) -> Result:
    from ..interop.exporting import Trained, export

    dtype = _dtype(args)
    model, tokenizer, info, posterior = _open_run(args)
    base = args.model or Path(info["model"])
    trained = Trained(args.run, model, info, posterior, base, args.base)
    names = export(
        trained, args.out, args.to, args.samples, args.seed, dtype=dtype, tokenizer=tokenizer
    )
    folders = [str(args.out / name) for name in names]
    _say(args, f"written: {' '.join(folders)}")
    return {"to": args.to, "folders": folders}


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    from ..data import FORMATS
    from ..interop.importing import FROM

    add = parser.add_argument
    add("source", type=Path, metavar="SRC",
        help="PEFT's folder; the official code's state_dict.pt, or its folder")  # fmt: skip
    add("--from", dest="kind", choices=FROM, required=True, help="program that wrote SRC")
    add(
        "--model",
        type=Path,
        required=True,
        help="the base model: a folder, or OWNER/NAME on the Hub",
    )
    add("--out", type=Path, required=True, help="run folder to write")
    _add_adapter(parser, "default: SRC's if it has a distribution, else scalabl")
    add("--alpha", type=float, help="bayesadapt: scaling is alpha / rank (default: 2 * rank)")
    add("--labels", nargs="+", metavar="TEXT",
        help="bayesadapt: the answer of each row of its head (default: A B ...)")  # fmt: skip
    add("--format", choices=FORMATS, default="jsonl", help="format of the questions for `predict`")
    _add_prompts(parser, "{}")
    _add_dtype(parser)


def _import(args: argparse.Namespace) -> Result:
    from ..core.config import AdapterConfig
    from ..data import Wording
    from ..interop.importing import import_adapter

    wording = Wording()
    if args.kind == "bayesadapt":  # its answers are what its head's rows are
        names = tuple(args.labels) if args.labels else None
        wording = Wording(
            labels="words" if names else "letters", answer_tokens="alone", names=names
        )
    wording = _with_prompts(args, wording)
    info = {
        "model": str(args.model.resolve()),
        "format": args.format,
        **wording.facts(),
        "dtype": args.dtype,
    }
    options = _given(AdapterConfig, args)
    options.pop("alpha", None)  # what SRC is, not what it becomes
    facts = import_adapter(
        args.kind,
        args.source,
        args.model,
        args.out,
        options,
        info,
        alpha=args.alpha,
        labels=args.labels,
        seed=args.seed,
        dtype=_dtype(args),
        device=_device(args),
    )
    _say(args, f"written: {args.out}, {facts['layers']} layers of {facts['method']}")
    if "layers_without" in facts:
        _say(args, f"{facts['layers_without']} more layers have none in SRC: there B starts at 0")
    return {"run": str(args.out), **facts}


# --- count, info, demo -------------------------------------------------------------------------


def _count_arguments(parser: argparse.ArgumentParser) -> None:
    from ..core.config import TARGETS, AdapterConfig

    add = parser.add_argument
    add("--config", required=True, help="name such as qwen2.5-7b, or a config.json")
    add("--rank", type=int, default=8, help="r")
    add(
        "--targets",
        nargs="+",
        default=list(AdapterConfig().targets),
        metavar="NAME",
        help=f"layers to adapt, of {' '.join(TARGETS)}",
    )


def _count(args: argparse.Namespace) -> Result:
    from .configs import count_parameters, find_config

    result = count_parameters(find_config(args.config), args.rank, tuple(args.targets))
    _say(args, f"{args.config}, rank {args.rank}, {' '.join(args.targets)}")
    base, layers = result["base_parameters"], result["adapted_layers"]
    _say(args, f"base       {base:>16,}  ({base * 2 / 2**30:.2f} GiB in bfloat16)")
    _say(args, f"adapted layers {layers:>12,}")
    for method in ("lora", "scalabl", "blob"):
        count = result[method]
        extra = f"  (+{count - result['lora']:,})" if method != "lora" else ""
        _say(args, f"{method:10} {count:>16,}  ({count * 4 / 2**20:.2f} MiB in float32){extra}")
    return result


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from ..core.config import TARGETS, AdapterConfig
    from .plan import Workload

    add = parser.add_argument
    add("--config", required=True, help="name such as qwen2.5-7b, or a model's folder")
    add("--gpus", type=int, default=1, help="devices; 0 plans for a CPU")
    add(
        "--memory",
        type=float,
        required=True,
        metavar="GB",
        help="memory of each device, in 1e9 bytes",
    )
    add("--rows", type=int, default=Workload.rows, help="examples at a time on each device")
    add("--tokens", type=int, default=Workload.tokens, help="tokens of the longest example")
    add("--rank", type=int, default=AdapterConfig.rank, help="r")
    add("--targets", nargs="+", default=list(AdapterConfig.targets), metavar="NAME",
        help=f"layers to adapt, of {' '.join(TARGETS)}")  # fmt: skip
    add("--rate", type=float, help="TFLOP/s of matrix products (default: measured on --device)")
    add("--bandwidth", type=float, help="GB/s of memory (needed with --rate)")
    add("--link", type=float,
        help="GB/s that a device receives from others or the CPU's memory: plans then count this "
        "traffic, and may offload weights (default: no limit)")  # fmt: skip


def _plan(args: argparse.Namespace) -> Result:
    from ..core.config import AdapterConfig
    from .configs import find_config
    from .plan import BASES, Rates, Workload, best, measured_rates, plans

    if (args.rate is None) != (args.bandwidth is None):
        raise InputError("give both of --rate and --bandwidth, or neither")
    numbers = (args.memory, args.rate, args.bandwidth, args.link)
    given_numbers = [n for n in numbers if n is not None]
    if args.gpus < 0 or not all(0 < n < math.inf for n in given_numbers):
        raise InputError("--gpus must not be negative, and other numbers must be above 0")
    if args.gpus and args.rate is None and args.device == "cpu":
        raise InputError(
            "the rates of a GPU cannot be measured on a CPU: give --rate and --bandwidth, --device "
            "cuda, or --gpus 0"
        )
    if args.link is not None and not args.gpus:
        raise InputError("--link is of GPUs, and --gpus 0 plans for a CPU")
    adapter = AdapterConfig(rank=args.rank, targets=tuple(args.targets))
    work = Workload(find_config(args.config), args.rows, args.tokens, adapter)
    if args.rate is not None:
        # To unpack a value is to read a byte at most and to write two, and to read them again.
        flop, moved = args.rate * 1e12, args.bandwidth * 1e9
        given = Rates(flop, flop, moved, 5 / moved)
        rates = dict.fromkeys(BASES, given)
    else:
        _device(args)
        rates = {base: measured_rates(work, base, args.device) for base in BASES}
    if args.link is not None:
        rates = {base: known._replace(link=args.link * 1e9) for base, known in rates.items()}
    ways = plans(work, rates, args.gpus, "cuda" if args.gpus else "cpu")
    chosen = best(ways, args.memory * 1e9)
    _say(args, f"{args.config}: {args.rows} rows of {args.tokens} tokens a step and device, rank "
         f"{args.rank}, {' '.join(args.targets)}; GB on each of {args.gpus or 1}\n")  # fmt: skip
    columns = ("base", "adapters", "kept", "working", "peak", "s/step")
    _say(args, f"{'':44}" + "".join(f"{column:>10}" for column in columns))
    for plan in ways:
        name = plan.kind + ", spread" * (plan.shards > 1) + ", offloaded" * plan.offloaded
        name += ", checkpointing" * plan.checkpointing
        sizes = (plan.base, plan.adapters, plan.activations, plan.workspace, plan.peak)
        cells = "".join(f"{size / 1e9:10.2f}" for size in sizes) + f"{plan.seconds:10.3g}"
        fits = "fits" if plan.peak <= args.memory * 1e9 else ""
        _say(args, f"{name:44}{cells}  {fits}{' <-' * (plan is chosen)}")
    if chosen is None:
        _say(args, f"\nnothing fits into {args.memory:g} GB: fewer --rows or --tokens, more --gpus")
    return {
        "plans": [{**p._asdict(), "fits": p.peak <= args.memory * 1e9} for p in ways],
        "best": chosen and chosen._asdict(),
    }


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", metavar="MODULE:FUNCTION", help="check this function instead of our op"
    )


def _verify(args: argparse.Namespace) -> Result:
    from ..verify.checks import load_op, path_of, verify

    sys.path.insert(0, "")  # modules of the current folder, as under python -m
    op = load_op(args.against) if args.against else None
    device, path = _device(args), path_of(op)
    results = verify(op, device)
    _say(args, f"path: {path}, on {device}\n")
    _say(args, f"{'check':22} {'error / bound':>13} {'cases':>6} {'s':>6}  equation")
    for result in results:
        verdict = "" if result.passed else "   FAILED"
        _say(
            args,
            f"{result.name:22} {result.worst:13.2g} {result.cases:6} {result.seconds:6.1f}  "
            f"{result.equation}{verdict}",
        )
        if result.note:
            _say(args, f"{'':22} {result.note}")
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(f"failed: {result.name}: {result.equation}", file=sys.stderr)
    if not failed:
        _say(args, f"\nall {len(results)} checks passed")
    checks = [{**result._asdict(), "passed": result.passed} for result in results]
    return {"path": path, "device": str(device), "checks": checks, "exit_code": int(bool(failed))}


def _conformance_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("export", "check"))
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder of the vectors: export writes it, check reads it",
    )
    parser.add_argument(
        "outputs", type=Path, nargs="?", metavar="OUTPUTS",
        help="check: a port's .safetensors, with tensors named CASE/OUTPUT",
    )  # fmt: skip
    parser.add_argument(
        "--precision",
        choices=("float32", "float64"),
        default="float32",
        help="check: precision of the port; eps of the bounds is 2^-23 or 2^-52",
    )


def _conformance(args: argparse.Namespace) -> Result:
    from ..verify.conformance import check, export

    if args.action == "export":
        count = export(args.folder)
        _say(args, f"written: {count} cases to {args.folder}")
        return {"cases": count, "folder": str(args.folder)}
    if args.outputs is None:
        raise InputError("conformance check needs a file of OUTPUTS")
    grades, left_out = check(args.folder, args.outputs, args.precision)
    _say(args, f"{'case':32} error / bound, 1 is the limit")
    for grade in grades:
        _say(args, f"{grade.id:32} {grade.worst:10.2g}  {'ok' if grade.passed else 'FAILED'}")
        for problem in grade.problems:
            _say(args, f"    {problem}")
        if not grade.passed:
            few = ", ".join(grade.right) if len(grade.right) < 8 else f"{len(grade.right)} others"
            right = f"; right: {few}" if grade.right else ""
            _say(args, f"    {grade.covers}; it catches {', '.join(grade.catches)}{right}")
    failed = sum(not grade.passed for grade in grades)
    missing = f"; {len(left_out)} not attempted" if left_out else ""
    _say(args, f"{len(grades) - failed} of {len(grades)} cases passed, {args.precision}{missing}")
    cases = [{**grade._asdict(), "passed": grade.passed} for grade in grades]
    return {"cases": cases, "not_attempted": left_out, "failed": failed,
            "exit_code": int(failed > 0)}  # fmt: skip


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    from .protocol import TASKS

    add = parser.add_argument
    add("config", metavar="FILE", help="JSON: the fields of study.Study; or the word paper")
    add("--out", type=Path, required=True, help="folder for runs and results")
    add("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    add("--cost", action="store_true", help="only print the cost")
    add("--model", type=Path, help="folder of the base model (paper)")
    add("--data", type=Path, help="folder of the published data sets (paper)")
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="tasks (paper)")


def _study(args: argparse.Namespace) -> Result:
    import torch

    from ..evaluation.comparison import table
    from .plan import product_rate
    from .protocol import paper
    from .study import Study, cost, study

    if args.config == "paper":
        if not (args.model and args.data):
            raise InputError("study paper needs --model and --data")
        todo = {
            args.out / task: config
            for task, config in paper(args.model, args.data, tuple(args.tasks)).items()
        }
    else:
        todo = {args.out: Study.read(Path(args.config))}
    _device(args)
    costs = {}
    for out, config in todo.items():
        dtype = getattr(torch, config.dtype or "float32")
        about = cost(config)
        about["hours"] = about["flop"] / product_rate(args.device, dtype) / 3600
        _say(
            args,
            f"{out}: {about['runs']:,.0f} training runs, {about['steps']:,.0f} steps in all, "
            f"{about['flop']:.2g} FLOP: at least {about['hours']:.2g} hours at the rate of a plain "
            f"matrix product here; {about['bytes'] / 1e9:.2g} GB of base weights",
        )
        costs[str(out)] = about
    if args.cost:
        return {"cost": costs}
    results = {}
    for out, config in todo.items():
        results[str(out)] = study(config, out, args.jobs, args.device)
        _say(args, table(results[str(out)]))
        _say(args, f"results: {out}/results.md, results.json, results.html")
    return {"cost": costs, "results": results}


def _info(args: argparse.Namespace) -> Result:
    import platform

    import torch

    from .. import __version__
    from ..fast.native import native_status

    status = native_status()
    result: Result = {
        "scalabl_ref": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "native": status,
        "path": f"native core, {status['isa']}" if status["used"] else "PyTorch",
    }
    for key, value in result.items():
        if key == "native":
            value = ", ".join(f"{name}: {item}" for name, item in status.items())
        _say(args, f"{key:12} {value}")
    return result


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    from .demo import add_arguments

    add_arguments(parser)


def _demo(args: argparse.Namespace) -> Result:
    from ..training.lock import alone
    from .demo import run

    args.device = _device(args)
    with alone(args.out):
        return run(args)


Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Result]
]

_COMMANDS: dict[str, Command] = {
    "demo": ("the whole story in about a minute", _demo_arguments, _demo),
    "train": ("fine-tune a model", _train_arguments, _on_ranks(_train)),
    "posterior": (
        "laplace, tfb, swag or an ensemble from finished runs",
        _posterior_arguments,
        _posterior,
    ),
    "evaluate": (
        "accuracy, calibration and uncertainty of a run",
        _evaluate_arguments,
        _on_ranks(_evaluate),
    ),
    "predict": (
        "probabilities of the answers to one question",
        _predict_arguments,
        _on_ranks(_predict),
    ),
    "generate": ("text, with the uncertainty of each token", _generate_arguments, _generate),
    "export": ("a run as a PEFT adapter or a merged model", _export_arguments, _export),
    "import": (
        "a run from a PEFT adapter or the official code's weights",
        _import_arguments,
        _import,
    ),
    "count": ("parameters and memory of a model, without weights", _count_arguments, _count),
    "plan": ("what fits: memory and time of a training step", _plan_arguments, _plan),
    "verify": ("check this build against the equations", _verify_arguments, _verify),
    "conformance": (
        "test vectors for ports: export them, or check a port's results",
        _conformance_arguments,
        _conformance,
    ),
    "study": ("compare methods on one task, tuned alike", _study_arguments, _study),
    "info": ("versions, build, and whether the native core runs", lambda parser: None, _info),
}
