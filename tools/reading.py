"""Count what one reads to follow the method through the code: files and lines, by running it.

PYTHONPATH=TREE python tools/reading.py [--files] [--json]      TREE: whose scalabl_ref is counted

Three ways are run on a tiny model, and every Python function of the package that runs is noted:

    layer   Noise(seed, draw), the forward pass of one adapted layer, and back to sigma's gradient
    noise   the same, and the functions on the way there from the call of the model: those that
            have the noise, or its seed, in a variable
    elbo    a batch to its ELBO, and back to the gradients of all adapters

A file is on the way if one of its functions runs, or if it defines the class of an argument. If the
native core runs, all files of its CPU build are on the way too: the sources that CMakeLists.txt
names and the headers that they include, except third_party. The functions that run in them are not
known. SCALABL_PLAIN=1 counts the plain bodies. Lines are all lines, with comments and blank ones.
The sitting is the part of the code that is meant to be read from top to bottom.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import scalabl_ref as sr
from scalabl_ref.core.objective import Batch

import torch  # isort: skip  after the package, which keeps it from warning that NumPy is missing

PACKAGE = Path(sr.__file__).resolve().parent
TREE = PACKAGE.parent
NATIVE = "scalabl_ref._native"
SEED = 0x5EED0F7415000001  # unlike any other number in the program, so that it can be followed

SITTING = (
    "scalabl_ref/core/*.py",
    "scalabl_ref/model/llama.py",
    "scalabl_ref/model/attach.py",
    "csrc/philox.h",
    "csrc/normal.h",
    "csrc/subspace_lora.h",
    "csrc/plain.cpp",
)


class Trace:
    """The package's functions that ran in the `with` block, and whether the native core did.

    way: "elbo" notes every function; "layer" those that run while `inside` is set; "noise" these
    and those that have the noise in a variable.
    """

    def __init__(self, way: str) -> None:
        self.way, self.inside, self.native = way, False, False
        self.codes: set[CodeType] = set()

    def __enter__(self) -> Trace:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            self.native |= getattr(called, "__module__", None) == NATIVE
        elif event == "return" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            held = frame.f_locals.values()
            self.native |= any(type(value).__module__ == NATIVE for value in held)
            noise = self.way == "noise" and any(map(holds_noise, held))
            if self.way == "elbo" or self.inside or noise:
                self.codes.add(frame.f_code)


def forget() -> None:
    """Empty the caches of the package's functions, which hide calls of an earlier way."""
    for name in [name for name in sys.modules if name.startswith("scalabl_ref")]:
        for value in list(vars(sys.modules[name]).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def holds_noise(value: Any, depth: int = 2) -> bool:
    """Whether a value is the noise or its seed, or a record that has one of them in it."""
    if isinstance(value, int):
        return bool(value == SEED)
    if isinstance(value, sr.Noise):
        return True
    if depth and isinstance(value, tuple):
        return any(holds_noise(part, depth - 1) for part in value)
    if depth and type(value).__module__.startswith("scalabl_ref"):
        return any(holds_noise(part, depth - 1) for part in getattr(value, "__dict__", {}).values())
    return False


def tiny_model(*targets: str) -> sr.Llama:
    """A random Llama of one block, whose adapters do something."""
    config = sr.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    model = sr.Llama(config).init_random_(0, std=0.3).trim_head([5, 7, 11])
    sr.add_adapters(model, sr.AdapterConfig(rank=3, targets=targets))
    for adapter in sr.adapters(model).values():
        torch.nn.init.normal_(adapter.B)
    return model


def run_layer(way: str) -> tuple[Trace, list[Any]]:
    """One pass with the head adapted alone: no other layer has a backward pass then."""
    trace, model = Trace(way), tiny_model("lm_head")
    ((name, adapter),) = sr.adapters(model).items()
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda *_: setattr(trace, "inside", True))
    layer.register_forward_hook(lambda *_: setattr(trace, "inside", False))
    with trace:
        trace.inside = True
        noise = sr.Noise(SEED, 0)
        trace.inside = False
        y = model(torch.ones(2, 5, dtype=torch.int64), noise=noise)
        trace.inside = True
        y.square().sum().backward()
    if any(p.grad is None or not p.grad.any() for p in adapter.parameters()):
        raise SystemExit("reading: the adapted layer was given no gradients")
    return trace, [noise, adapter]


def run_elbo(way: str) -> tuple[Trace, list[Any]]:
    model, rows = tiny_model("q_proj", "v_proj", "lm_head"), torch.arange(2)
    lengths, classes = torch.tensor([5, 3]), torch.tensor([5, 7, 11])
    batch = Batch(torch.ones(2, 5, dtype=torch.int64), lengths, rows, rows, classes)
    trace = Trace(way)
    with trace:
        noise = sr.Noise(SEED, 0)
        sr.elbo(model, batch, noise, beta=1.0, num_examples=2).loss.backward()
    return trace, [noise, batch, model, *sr.adapters(model).values()]


def native_files() -> set[Path]:
    """Sources of the core's CPU build, by CMakeLists.txt, and the headers that they include."""
    named = re.findall(r"csrc/[\w/]+\.cpp", (TREE / "CMakeLists.txt").read_text())
    todo = [TREE / name for name in named if "/tests/" not in name]
    found: set[Path] = set()
    while todo:
        file = todo.pop()
        if file in found or "third_party" in file.parts:
            continue
        found.add(file)
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            places = (file.parent / name, TREE / "csrc" / name)
            todo.append(next(place.resolve() for place in places if place.is_file()))
    return found


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def count(way: str) -> dict[str, Any]:
    """Files on the way and their lines; the Python functions on it, and theirs."""
    run = run_elbo if way == "elbo" else run_layer
    forget()
    trace, arguments = run(way)
    native = run(way)[0].native  # the second time it is not loaded, only used
    ran: dict[Path, set[int]] = {}
    for code in trace.codes:
        source, first = inspect.getsourcelines(code)
        ran.setdefault(Path(code.co_filename), set()).update(range(first, first + len(source)))
    files = set(ran) | {Path(inspect.getfile(type(argument))) for argument in arguments}
    files |= native_files() if native else set()
    return {
        "native": native,
        "files": len(files),
        "lines": sum(map(lines_of, files)),
        "python_files": sum(file.suffix == ".py" for file in files),
        "functions": len(trace.codes),
        "function_lines": sum(map(len, ran.values())),
        "each": {
            str(file.relative_to(TREE)): [lines_of(file), len(ran.get(file, ()))]
            for file in sorted(files)
        },
    }


def sitting() -> dict[str, int]:
    """Lines of each file of the sitting that the tree has."""
    files = [file for pattern in SITTING for file in sorted(TREE.glob(pattern))]
    return {str(file.relative_to(TREE)): lines_of(file) for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", action="store_true", help="list the files of each way")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    ways = {way: count(way) for way in ("layer", "noise", "elbo")}
    read = sitting()
    if options.json:
        print(json.dumps({"tree": str(TREE), "ways": ways, "sitting": read}, indent=2))
        return
    for way, counted in ways.items():
        print(
            f"{way:6} {counted['files']:3} files, {counted['lines']:5,} lines; on the way "
            f"{counted['functions']:3} Python functions of {counted['function_lines']:4} lines"
            f"{', and the native core' if counted['native'] else ''}"
        )
        for file, (whole, ran) in counted["each"].items() if options.files else ():
            print(f"    {file:40} {whole:5} {ran or '':>5}")
    print(f"sitting {sum(read.values()):,} lines")
    for file, number in read.items() if options.files else ():
        print(f"    {file:40} {number:5}")


if __name__ == "__main__":
    main()
