"""The `scalabl` command: it reads arguments, calls the library and prints results.

Each command is a module here with `add_arguments(parser)` and `run(args)`; its docstring describes
the command to users. Exit codes: 0 done; 1 a check of `verify` or `conformance` failed; 2 bad
input, or no memory, disk space or permission (one line on standard error); 3 another process of the
run ended or is silent; 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from contextlib import suppress
from pathlib import Path

from ... import __version__
from ...support.errors import InputError, ending
from ...support.fields import json_text
from ...support.hub import model_folder
from .parser import Parser

COMMANDS = {
    "demo": "compare plain LoRA and ScalaBL on a small made-up task, in about a minute",
    "train": "train adapters on a file of questions and answers",
    "evaluate": "measure accuracy, calibration and uncertainty on a file of questions",
    "calibrate": "fit a temperature on labelled questions, and keep it in the run",
    "threshold": "choose the confidence above which no human needs to look",
    "predict": "answer one question, or a file of texts, with probabilities and an uncertainty",
    "serve": "answer texts over HTTP, with the run's temperature and threshold",
    "posterior": "make a posterior (subspace, laplace, tfb, swag, ensemble) from trained runs",
    "generate": "continue a text, with the uncertainty of each new token",
    "export": "write a run as a PEFT adapter or as a merged model",
    "import": "make a run from a PEFT adapter or from weights of the official code",
    "count": "count the parameters of a model and of its adapters",
    "plan": "estimate memory and time of a training step",
    "verify": "check this installation against the equations",
    "conformance": "write test vectors for ports, or check a port's results",
    "study": "tune several methods alike and compare them on one task",
    "info": "show versions, and whether the native core is used",
}

NOTHING_RANDOM = ("count", "plan", "verify", "conformance", "study", "info")  # these have no --seed


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = argparse.Namespace(process=0)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may have no letter for a choice
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _parsed(sys.argv[1:] if arguments is None else arguments)
        if isinstance(getattr(args, "model", None), Path):
            args.model = model_folder(args.model)  # so that a run keeps a folder, not a name
            if not args.model.exists():
                raise InputError(f"{args.model}: no such folder: --model takes a folder, or "
                                 "OWNER/NAME on the Hugging Face Hub")  # fmt: skip
        result = args.run_command(args)
        if args.json and not args.process:
            print(json_text(result, indent=2))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output ended, as `| head` does
        sys.stderr.close()
        return 141
    except (Exception, KeyboardInterrupt) as error:
        code_and_line = ending(error, f" on rank {args.process}" if args.process else "")
        if code_and_line is None:
            raise
        print(code_and_line[1], file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # no room for it: Python would try once more at its end, and say so
            with suppress(OSError):
                sys.stdout.close()
        return code_and_line[0]
    return int(result.get("exit_code", 0))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Prints an option's default unless it is None, False or empty, which tell a reader nothing.

    Keeps a description's paragraphs, and the lines of those that are indented.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip("\n").split("\n\n")
        return "\n\n".join(
            part if part.startswith("    ") else super(_Help, self)._fill_text(part, width, indent)
            for part in parts
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def _parsed(arguments: list[str]) -> argparse.Namespace:
    chosen = next((argument for argument in arguments if argument in COMMANDS), "")
    args, rest = _parser(chosen).parse_known_args(arguments)
    if rest:
        raise InputError(f"unexpected argument {rest[0][:60]!r}: a text with spaces needs quotes")
    args.typed = ["scalabl", *arguments]
    return args


def _parser(chosen: str) -> Parser:
    """All commands by name, with the arguments of `chosen`: the only one whose module is loaded."""
    parser = Parser(
        prog="scalabl",
        description="Bayesian low-rank adaptation of Llama models: probabilities with an "
        "uncertainty. `scalabl COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"scalabl_ref {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=_Help)
        if name == chosen:
            module = importlib.import_module("." + {"import": "import_"}.get(name, name), __name__)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run_command=module.run)
        add = command.add_argument
        add("--json", action="store_true", help="print the result as JSON on standard output")
        if name not in NOTHING_RANDOM:
            add("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
        add("--device", default="cpu", help="where to compute: cpu, cuda or cuda:N")
        command.set_defaults(process=0)
    return parser
