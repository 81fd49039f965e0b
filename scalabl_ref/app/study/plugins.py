"""Methods of one's own: Python files that add to METHODS, ADAPTERS and POSTERIORS.

A file is run as a module when a study that names it is made, also in the processes of the study. It
may only add. The contents of a study's plugins are part of the folder names of what they define.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...core.adapter import Adapter
from ...core.config import ADAPTERS
from ...evaluation.comparison import SCALED
from ...methods import POSTERIORS
from ...support.errors import InputError
from ...support.files import sha256
from .methods import METHODS, Method

_REGISTRIES: dict[str, dict[str, Any]] = {
    "method": METHODS, "adapter": ADAPTERS, "posterior": POSTERIORS
}  # fmt: skip
_LOADED: dict[Path, str] = {}  # SHA-256 of each file
_ADDED: set[tuple[str, str]] = set()  # such as ("adapter", NAME)


def load_plugins(paths: Iterable[Path | str]) -> dict[str, str]:
    """Run these files, each once. Returns the SHA-256 of each by its absolute path.

    Raises InputError, naming the file, if it is missing, fails, replaces what is there, adds what a
    study cannot use, or has changed since it was run.
    """
    return {str(path): _load(path) for path in (Path(path).resolve() for path in paths)}


def is_added(kind: str, name: str) -> bool:
    """Whether a plugin has added the "method", "adapter" or "posterior" of that name."""
    return (kind, name) in _ADDED


def _load(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file: --plugin needs a Python file")
    digest = sha256(path)
    if path in _LOADED:
        if _LOADED[path] != digest:
            raise InputError(f"{path}: has changed since it was loaded: start the study again")
        return digest
    before = {kind: dict(registry) for kind, registry in _REGISTRIES.items()}
    try:
        _run(path, f"scalabl_plugin_{digest[:10]}")
        _check(path, before)
    except BaseException:
        for kind, registry in _REGISTRIES.items():
            registry.clear()
            registry.update(before[kind])
        raise
    _ADDED.update(
        (kind, name) for kind, r in _REGISTRIES.items() for name in r if name not in before[kind]
    )
    _LOADED[path] = digest
    return digest


def _run(path: Path, name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: is not a Python file: its name must end in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)
                 if f.filename == str(path)]  # fmt: skip
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}:{line}" if line else str(path)
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


def _check(path: Path, before: dict[str, dict[str, Any]]) -> None:
    """Raise InputError unless the file has only added, and what a study can use."""
    added = 0
    for kind, registry in _REGISTRIES.items():
        for name, old in before[kind].items():
            if registry.get(name) is not old:
                raise InputError(f"{path}: replaces the {kind} {name!r}: choose another name")
        for name, new in registry.items():
            if name not in before[kind]:
                added += 1
                _check_added(path, kind, name, new)
    if not added:
        raise InputError(f"{path}: adds no method: METHODS['name'] = Method(...) does")


def _check_added(path: Path, kind: str, name: Any, new: Any) -> None:
    if not isinstance(name, str) or not name or "," in name or name.endswith(SCALED):
        raise InputError(f"{path}: a {kind} needs a name without commas, and has {name!r:.60}")
    if kind == "adapter" and not (isinstance(new, type) and issubclass(new, Adapter)):
        raise InputError(f"{path}: the adapter {name!r} must be a subclass of Adapter")
    if kind == "method":
        if not isinstance(new, Method):
            raise InputError(f"{path}: METHODS[{name!r}] must be a Method")
        if new.settings.get("method") not in ADAPTERS:
            raise InputError(
                f"{path}: the settings of METHODS[{name!r}] need 'method', one of "
                f"{', '.join(ADAPTERS)}"
            )
