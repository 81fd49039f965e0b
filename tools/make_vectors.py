"""Write tests/vectors, the conformance vectors that are kept in the repository; nothing else does.

    python tools/make_vectors.py

Run it when a case is added, and look at what `git diff` says of the manifest before committing:
an expected value that changes is a change of the specification.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import scalabl_ref  # noqa: F401  before torch, whose warning about a missing NumPy it keeps away
from scalabl_ref.verify.conformance import export

VECTORS = Path(__file__).resolve().parent.parent / "tests" / "vectors"


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    if VECTORS.exists():
        shutil.rmtree(VECTORS)
    print(f"written: {export(VECTORS)} cases to {VECTORS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
