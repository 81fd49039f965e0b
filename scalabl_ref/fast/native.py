"""The compiled core: whether it was built, whether it fits the sources, and whether it is used.

A binary of other sources than those beside it (in an editable install that was not rebuilt) is
reported and not used. Everything then runs on the PyTorch path, as without a binary.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # the repository, in an editable install
SOURCES = (".h", ".cpp", ".cu")
SETTLED: list[ModuleType | None] = []  # `core`'s result: torch.compile cannot trace @cache
REBUILD = "build it with: pip install -e ."


def source_digest(root: Path) -> str | None:
    """The digest that CMakeLists.txt compiles in, of the sources under `root`; None without them.

    sha256 of the lines "<sha256 of the file>  <its path>" over CMakeLists.txt and csrc's headers
    and sources without the tests, ordered by path.
    """
    files = [root / "CMakeLists.txt"]
    for folder in ("csrc", "csrc/fast", "csrc/third_party"):
        files += [file for file in (root / folder).glob("*.*") if file.suffix in SOURCES]
    if len(files) == 1 or not files[0].is_file():
        return None
    digests = {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
    lines = "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


@cache
def native_status() -> dict[str, Any]:
    """Whether the core was built, and whether it is used.

    built, stale, used: bool; reason: why it is not used, else ""; isa, the instruction set that its
    kernels use, compiler, digest: str or None.
    The environment variable SCALABL_NATIVE=0 switches the core off. Decided once per
    process.
    """
    module, problem = _import()
    built = module is not None
    sources = source_digest(ROOT)
    stale = module is not None and sources not in (None, module.digest)
    reason = problem
    if stale:
        reason = f"built from other sources than those in {ROOT / 'csrc'}; {REBUILD}"
    elif built and os.environ.get("SCALABL_NATIVE") == "0":
        reason = "switched off by SCALABL_NATIVE=0"
    return {
        "built": built,
        "stale": stale,
        "used": not reason,
        "reason": reason,
        "isa": module.isa() if module else None,
        "compiler": module.compiler if module else None,
        "digest": module.digest if module else None,
    }


def core() -> Any:
    """The extension module if it is to be used, else None."""
    if not SETTLED:
        SETTLED.append(_import()[0] if native_status()["used"] else None)
    return SETTLED[0]


def _import() -> tuple[ModuleType | None, str]:
    try:
        return import_module("scalabl_ref._native"), ""
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, f"not built; {REBUILD}" if missing else f"cannot be loaded: {error}"
