"""Options that several commands share, and options that are made from a dataclass's fields."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...core.config import ADAPTERS, COVARIANCES, TARGETS, AdapterConfig
from ...data import FORMATS, STYLES, Columns, Wording, format_of, read_template
from ...data.formats import LABEL_COLUMNS, TEXT_COLUMNS
from ...evaluation.answering import Samples
from ...evaluation.predict import DESIGNS, check_samples
from ...evaluation.sequential import Auto
from ...support.errors import InputError
from ...training.ranks import TIMEOUT
from ...training.runs import DTYPES

Parser = argparse._ActionsContainer  # a parser, or a group of its options
_METAVARS = {"targets": "NAME", "checkpoint_every": "STEPS", "max_length": "TOKENS"}
_UNSET = {  # how help words a default of None, by field
    "alpha": "2 * rank",
    "max_length": "no limit",
    "micro_batch": "--batch",
    "prior_std": "1, or 0.2 for blob",
    "swag_lr": "the rate of the first of them",
    "variational_lr": "4 * lr",
}


def add_fields(
    parser: Parser,
    cls: type,
    helps: Mapping[str, str],
    default: str = "{}",
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """An option for each field of the dataclass `cls` that `helps` has a help text for.

    Type, choices and default are the field's; `choices` replaces those of some fields. default: how
    help words the default, {} standing for the field's own. An option that the user leaves out is
    None in the arguments, so `given` returns the user's values alone and `cls` adds its defaults.
    """
    hints, defaults = get_type_hints(cls), {f.name: f.default for f in dataclasses.fields(cls)}
    for name, text in helps.items():
        details = _details(hints[name])
        if choices and name in choices:
            details["choices"] = choices[name]
        if name in _METAVARS:
            details["metavar"] = _METAVARS[name]
        if hints[name] is not bool:
            text = f"{text} (default: {default.format(_shown(name, defaults[name]))})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **details)


def _details(hint: Any) -> dict[str, Any]:
    """A field's type as argparse takes it."""
    if hint is bool:
        return {"action": "store_true", "default": None}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"nargs": "+"}
    return _details(get_args(hint)[0]) if get_args(hint) else {"type": hint}  # T | None: T


def _shown(name: str, value: Any) -> str:
    if value is None:
        return _UNSET[name]
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def given(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """The user's values for the fields of the dataclass `cls`."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {k: v for k, v in vars(args).items() if k in names and v is not None}


# --- data --------------------------------------------------------------------------------------


def add_data(parser: Parser, instead: str = "") -> None:
    """A file of questions. instead: what is used without --data; empty: --data is required."""
    add, default = parser.add_argument, f" (default: {instead})" if instead else ""
    add("--data", type=Path, required=not instead, metavar="FILE",
        help=f"file of questions with their answers{default}")  # fmt: skip
    add_format(parser, "data")
    add_column(parser, "text", TEXT_COLUMNS, "prompt")
    add_column(parser, "label", LABEL_COLUMNS, "label")
    add("--limit", type=int, metavar="ROWS", help="use only the first ROWS questions")


def add_column(parser: Parser, name: str, usual: tuple[str, ...], key: str) -> None:
    """--text-column or --label-column. usual, key: names in csv and in jsonl without the option."""
    one = f"{', '.join(usual[:-1])} or {usual[-1]}"
    parser.add_argument(f"--{name}-column", metavar="NAME",
        help=f"csv column or jsonl key of the {name} (default: the run's; for a new run or another "
        f"format the csv column called {one}, and in jsonl {key})")  # fmt: skip


def add_format(parser: Parser, of: str) -> None:
    """The format of the file that option `of` names."""
    parser.add_argument(
        f"--{'' if of == 'data' else of + '-'}format",
        choices=FORMATS,
        help=f"format of --{of} (default: csv if its name ends in .csv or .tsv, otherwise jsonl)",
    )


def data_format(args: argparse.Namespace) -> str:
    """The format of --data."""
    return args.format or format_of(args.data)


def columns(args: argparse.Namespace) -> Columns:
    return Columns(args.text_column, args.label_column)


# --- prompts and answers -----------------------------------------------------------------------


def add_prompts(parser: Parser, default: str) -> None:
    """How prompts are made. default: how the help words a default; {} is a new run's."""
    add = parser.add_argument
    add("--prompt-template", type=Path, metavar="FILE",
        help="text file from which prompts are made, with {question} and, if wanted, {choices} in "
        "it "
        f"(default: {default.format('the template of --format')})")  # fmt: skip
    add("--prompt-style", choices=STYLES,
        help="plain: the prompt alone; chat: the prompt in the model's chat template "
        f"(default: {default.format('plain')})")  # fmt: skip


def add_wording(parser: Parser, default: str) -> None:
    """How prompts are made and answers chosen; default as in `add_prompts`."""
    add_prompts(parser, default)
    helps = {
        "labels": "answer with letters, or with the words of the choices; auto takes words if all "
        "rows have the same choices",
        "answer_tokens": "token of an answer: after a space (space), without one (bare), or as "
        "this tokenizer needs it (auto)",
        "max_length": "cut longer prompts on the left; without a limit, a prompt that is too long "
        "for the model is an error",
        "drop_long": "drop prompts longer than --max-length instead of cutting them",
    }
    add_fields(parser, Wording, helps, default, {"answer_tokens": ("auto", "space", "bare")})


def with_prompts(args: argparse.Namespace, before: Wording) -> Wording:
    """`before`, changed as the options of `add_prompts` say."""
    template = read_template(args.prompt_template) if args.prompt_template else before.template
    return dataclasses.replace(before, template=template, style=args.prompt_style or before.style)


def wording(args: argparse.Namespace, before: Wording) -> Wording:
    """`before`, changed as the options of `add_wording` say."""
    return dataclasses.replace(with_prompts(args, before), **given(Wording, args))


# --- models, devices and draws -----------------------------------------------------------------


def add_base(parser: Parser) -> None:
    parser.add_argument("--model", type=Path, required=True,
        help="base model: a folder, or OWNER/NAME on the Hugging Face Hub")  # fmt: skip


def add_run(parser: Parser, required: bool = True, otherwise: str = "") -> None:
    """A run, and its base model. otherwise: what --model means without --run."""
    add = parser.add_argument
    add("--run", type=Path, required=required,
        help="run folder that `train`, `posterior` or `import` wrote")  # fmt: skip
    add("--model", type=Path,
        help=f"folder of the run's base model, if it has moved{otherwise}")  # fmt: skip


def add_targets(parser: Parser, default: str = "{}") -> None:
    """Rank and layers of the adapters."""
    helps = {"rank": "rank r of the adapters", "targets": f"layers to adapt: {' '.join(TARGETS)}"}
    add_fields(parser, AdapterConfig, helps, default)


def add_adapter(parser: Parser, method: str = "{}") -> None:
    """Options of an adapter besides rank, scaling and layers. method: words for its default."""
    trained = tuple(name for name, kind in ADAPTERS.items() if kind.trained)
    helps = {
        "method": "scalabl: a distribution over r scales; mle: plain LoRA; map: LoRA with a prior; "
        "blob: a distribution over A; dropout: Monte Carlo dropout; point: scalabl without noise"
    }
    add_fields(parser, AdapterConfig, helps, method, {"method": trained})
    helps = {
        "sampling": "draw noise once for each batch, example or token (with token the loss gives "
        "no evidence lower bound)",
        "covariance": "covariance of the distribution over the scales (scalabl)",
        "prior": "a fixed prior, or one fitted for each layer or each scale (scalabl)",
        "dropout": "dropout rate of the adapters' input (dropout)",
        "prior_std": "standard deviation of the prior",
        "init_sigma": "sigma starts at random between 0.7 and 1 times this",
    }
    add_fields(parser, AdapterConfig, helps, choices={"covariance": tuple(COVARIANCES)})


def add_dtype(parser: Parser, of: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help=f"dtype of {of} (default: as stored)")


def add_ranks(parser: Parser) -> None:
    add = parser.add_argument
    add("--shard", action="store_true",
        help="under torchrun: split the base model over the processes")  # fmt: skip
    add("--offload-weights", action="store_true",
        help="as --shard, and keep the parts in CPU memory")  # fmt: skip
    add_timeout(parser)


def add_timeout(parser: Parser) -> None:
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS",
        help="under torchrun: how long a process waits for the others")  # fmt: skip


def add_samples(parser: Parser, ruled: bool = True) -> None:
    """How many draws. ruled: whether the run's temperature and threshold decide the default."""
    add, rule = parser.add_argument, "those of the run's temperature and threshold; without them "
    add("--samples", metavar="N",
        help="posterior draws for each question, at most 100,000; an ensemble rounds up to a "
        "multiple of its members; 0: use the mean model; auto: draw until the answer is settled, "
        "see --tolerance and --most; exact: integrate (only for scalabl on lm_head alone, or a "
        "linear posterior subspace, and with at most 4 answers or 3 scales) (default: "
        f"{rule if ruled else ''}10, or 1000 for a Laplace or linear subspace posterior, whose "
        "draws need no forward pass)")  # fmt: skip
    helps = {
        "tolerance": "--samples auto: stop when a test at 5 %% shows that no other answer is more "
        "probable by more than this",
        "most": "--samples auto: stop after this many draws, at most 100,000",
    }
    add_fields(parser, Auto, helps)
    add("--design", choices=DESIGNS, default="independent",
        help="how the draws depend on each other: antithetic and latin reduce the error of their "
        "average")  # fmt: skip


def add_raw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--raw", action="store_true",
        help="ignore the temperature and the threshold that `calibrate` and `threshold` kept in "
        "the run")  # fmt: skip


def samples(args: argparse.Namespace) -> Samples | None:
    """The user's choice; None if there is none, see `classifier.default_samples`."""
    if args.samples is None or args.samples == "exact":
        return args.samples
    if args.samples == "auto":
        return Auto(**given(Auto, args))
    try:
        count = int(args.samples)
    except ValueError:
        raise InputError(
            f"--samples must be a number, auto or exact, not {args.samples!r}"
        ) from None
    check_samples(count)
    return count
