"""Write the API pages of the package's modules with pdoc; a warning of pdoc is an error.

python tools/api.py [FOLDER]        the folder is docs/api unless named
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import scalabl_ref

# After the package, which keeps PyTorch from warning that NumPy is missing.
import pdoc  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("scalabl_ref.app", "scalabl_ref.assets", "scalabl_ref._")  # and what is in them


def modules() -> list[str]:
    """Names of the package and of its modules, but for the application and private ones."""
    found = pkgutil.walk_packages(scalabl_ref.__path__, "scalabl_ref.")
    return ["scalabl_ref", *(m.name for m in found if not m.name.startswith(LEFT_OUT))]


def name_modules(names: list[str]) -> None:
    """Say of every NamedTuple's constructor where it is from: pdoc looks up its types there."""
    for name in names:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and hasattr(value, "_fields"):
                value.__new__.__module__ = value.__module__


def main(folder: Path = ROOT / "docs" / "api") -> None:
    """Write a page for each module into the folder."""
    names = modules()
    name_modules(names)
    warnings.simplefilter("error")
    # pdoc adds the modules of a package, and then meets them a second time.
    warnings.filterwarnings("ignore", "The module specification .* already been added")
    pdoc.render.configure(docformat="markdown")
    pdoc.pdoc(*names, output_directory=folder)
    print(f"{folder}: {len(names)} pages")


if __name__ == "__main__":
    main(*(Path(name) for name in sys.argv[1:2]))
