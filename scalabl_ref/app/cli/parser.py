"""argparse's parser with one-line errors that suggest the option the user probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ...support.errors import InputError, expected

# Our options by their names in other programs.
_ELSEWHERE = {
    "--num-epochs": "--epochs",
    "--learning-rate": "--lr",
    "--batch-size": "--batch",
    "--output": "--out",
    "--output-dir": "--out",
    "--dataset": "--data",
    "--max-seq-length": "--max-length",
}
_KINDS = {int: "a whole number", float: "a number"}


class Parser(argparse.ArgumentParser):
    """Raises InputError instead of printing the usage and exiting."""

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Like argparse's, but reports an unknown option before a missing one."""
        if self._subparsers is None:
            for argument in args:
                if argument == "--":
                    break
                self._check_known(argument.partition("=")[0])
        return super().parse_known_args(args, namespace)

    def _check_known(self, name: str) -> None:
        known = self._option_string_actions
        if not name.startswith("-") or " " in name or re.match(r"-(\.?\d|$)", name):
            return  # a value
        if any(option.startswith(name) for option in known):
            return
        meant = _ELSEWHERE.get(name, "")
        if meant.partition(" ")[0] not in known:
            words = [option.lstrip("-") for option in known]
            near = difflib.get_close_matches(name.lstrip("-"), words, n=1)
            meant = f"--{near[0]}" if near else ""
        hint = f"did you mean {meant}? " if meant else ""
        raise InputError(f"{self.prog} has no option {name[:40]}: {hint}{self.short_usage()}")

    def short_usage(self) -> str:
        """One line: what the command needs; its other options stand for themselves."""
        needed = []
        for action in self._actions:
            name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
            if action.choices is not None and action.metavar is None:
                name = "|".join(map(str, action.choices))
            if not action.option_strings:
                needed.append(f"[{name}]" if action.nargs == "?" else name)
            elif action.required:
                more = " ..." if action.nargs == "+" else ""
                needed.append(f"{action.option_strings[0]} {name}{more}")
        return " ".join(["usage:", self.prog, *needed, "[options]; --help lists them"])

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            kind = _KINDS.get(action.type, "of another kind")  # type: ignore[call-overload]
            raise InputError(f"{_name(action)} must be {kind}, not {text[:60]!r}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        if self._subparsers is not None:
            raise InputError(f"no command {value[:40]!r}{expected(value, names)}")
        near = difflib.get_close_matches(value, names, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise InputError(
            f"{_name(action)} must be one of {', '.join(names)}, not {value[:40]!r}{hint}"
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}: {self.short_usage()}")


def _name(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or action.metavar or action.dest  # type: ignore[return-value]
