"""A fault in the package: a name of a module, or of a class in it, stands for something else."""

from __future__ import annotations

import importlib
import inspect
import textwrap


def replace(monkeypatch, target, value):
    """target: "module:attribute", of the package; the attribute may be that of a class."""
    module, _, path = target.partition(":")
    *owners, attribute = path.split(".")
    owner = importlib.import_module(f"scalabl_ref.{module}")
    for part in owners:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, attribute, value)


def rewrite(monkeypatch, target, old, new):
    """A fault in the text of a function, for all who have imported it.

    target: as in `replace`. old: text that the function has once.
    """
    module, _, path = target.partition(":")
    found = importlib.import_module(f"scalabl_ref.{module}")
    names = vars(found)
    for part in path.split("."):
        found = getattr(found, part)
    function = _plain(found)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, (target, old, source.count(old))
    made: dict = {}
    exec("from __future__ import annotations\n" + source.replace(old, new), dict(names), made)
    changed = _plain(made[function.__name__])
    monkeypatch.setattr(function, "__code__", changed.__code__)


def _plain(found):
    """The function of a method or a property, without its decorators."""
    function = inspect.unwrap(getattr(found, "fget", found))
    return getattr(function, "__func__", function)
