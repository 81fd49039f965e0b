"""Builds the native core with CMake and Ninja; everything else is in pyproject.toml.

SCALABL_NATIVE=0 leaves the core out: the package then runs on PyTorch alone. CUDA is compiled where
nvcc is found; SCALABL_CUDA=1 makes that an error if it is not, SCALABL_CUDA=0 leaves it out, and
CUDAARCHS="80;90" names the architectures.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA = {"0": "OFF", "1": "ON"}.get(os.environ.get("SCALABL_CUDA", ""), "AUTO")


class CMakeBuild(build_ext):
    """Configure and build CMakeLists.txt, with the module put where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a requirement of the build, not of setup.py's other commands

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        try:
            self._run(
                "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                f"-DSCALABL_CUDA={CUDA}",
            )  # fmt: skip
            self._run("cmake", "--build", str(build))
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"error: the native core was not built ({error}); it needs a C++17 compiler. "
                "SCALABL_NATIVE=0 installs without it."
            ) from None

    def _run(self, *command: str) -> None:
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


native = os.environ.get("SCALABL_NATIVE") != "0"
setup(
    ext_modules=[Extension("scalabl_ref._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
