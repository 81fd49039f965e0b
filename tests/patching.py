"""A fault in the package: a name of a module, or of a class in it, stands for something else."""

from __future__ import annotations

import importlib


def replace(monkeypatch, target, value):
    """target: "module:attribute", of the package; the attribute may be that of a class."""
    module, _, path = target.partition(":")
    *owners, attribute = path.split(".")
    owner = importlib.import_module(f"scalabl_ref.{module}")
    for part in owners:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, attribute, value)
