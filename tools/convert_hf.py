"""Models from Hugging Face's layout, Meta's or llama2.c's into this package's, and back.

    python tools/convert_hf.py SRC DST                 SRC a folder of Hugging Face's layout, a name
                                                       on the Hub (owner/model, needs the extra hf),
                                                       Meta's folder of consolidated.*.pth (say
                                                       which --family), or a llama2.c file
    python tools/convert_hf.py SRC DST --to-hf         SRC of another layout than Hugging Face's
    python tools/convert_hf.py SRC DST --to-llama2c    the same; DST a file
    python tools/convert_hf.py SRC DST --quantize nf4  (or int8) SRC any of these, converted or not:
                                                       the blocks' weights become codes, from which
                                                       there is no way back (docs/large.md)

Without --dtype every tensor keeps its bytes both ways; the original config.json travels along, and
so do the tokenizer's files. One tensor at a time is in memory. DST must not exist: it appears
whole, or not at all. manifest.json in it has the SHA-256 of every file read and written; a folder
that has one is checked against it when it is a SRC. HF_HUB_OFFLINE=1 keeps off the network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scalabl_ref  # before torch, whose warning about a missing NumPy it keeps away

# isort: split
import torch

from scalabl_ref.data.tokenizer import companion_files, tokenizer_files
from scalabl_ref.fast.quantize import KINDS, Kind
from scalabl_ref.model.config import LlamaConfig
from scalabl_ref.model.llama import Llama
from scalabl_ref.model.weights import as_stored, check_model
from scalabl_ref.support.errors import InputError, ending
from scalabl_ref.support.files import (
    atomic_write_text,
    make_folder,
    new_folder,
    read_json,
    refuse_pointer,
    sha256,
)
from scalabl_ref.support.folders import FORMAT, ours_to_hf, stored_weights, with_dtype, write_model
from scalabl_ref.support.hub import hub_name, model_folder
from scalabl_ref.support.progress import progress_bar
from scalabl_ref.support.tensors import Stored

sys.path.insert(0, str(Path(__file__).resolve().parent))
from llama2c import read_llama2c, write_llama2c
from meta_pth import FAMILIES, is_meta, read_meta
from packing import packed

DTYPES = ("keep", "float32", "bfloat16", "float16")
MANIFEST = "manifest.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="model folder, name on the Hub, or .bin file")
    add("target", type=Path, metavar="DST", help="folder (or file) to write")
    back = parser.add_mutually_exclusive_group()
    back.add_argument("--to-hf", action="store_true", help="back to Hugging Face's layout")
    back.add_argument("--to-llama2c", action="store_true", help="to a llama2.c file, in float32")
    add("--dtype", choices=DTYPES, default="keep", help="of the weights written (default: keep)")
    add("--quantize", choices=KINDS, help="the blocks' weights to 8 or 4 bits, once and for all")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer file to add")
    add("--family", choices=tuple(FAMILIES), help="of a Meta folder: what its files do not say")
    add("--positions", type=int, metavar="N", help="keep only so many, as for a sliding window")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--verify", action="store_true", help="compare the logits with transformers'")
    args = vars(parser.parse_args(arguments))
    args["dtype"] = getattr(torch, args["dtype"], None)
    try:
        convert(**args)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        said = ending(error)
        if said is None:
            raise
        print(said[1], file=sys.stderr)
        return said[0]
    print(f"written: {args['target']}")
    return 0


@dataclass(frozen=True)
class Source:
    """A model to convert.

    layout: "hf", "ours", "meta" or "llama2c". read: the files that say what it is, beside
    `files`, the companions that travel along, by name. hf_config: its config.json of Hugging
    Face's layout, None if it never had one. quantized: the kind of codes that its blocks hold.
    """

    layout: str
    name: str
    config: LlamaConfig
    tensors: dict[str, Stored]  # by our names
    read: list[Path]
    files: dict[str, Path] = field(default_factory=dict)
    hf_config: dict[str, Any] | None = None
    quantized: str | None = None


def convert(
    source: Path | str,
    target: Path,
    to_hf: bool = False,
    tokenizer: Path | None = None,
    *,
    to_llama2c: bool = False,
    dtype: torch.dtype | None = None,
    quantize: Kind | None = None,
    family: str | None = None,
    positions: int | None = None,
    revision: str | None = None,
    verify: bool = False,
) -> None:
    """Write the model at `source` to the new `target`, in our layout or as `to_` says.

    quantize: write the codes that `Llama.from_pretrained` would make of the source's weights.

    Raises InputError for anything that `Llama.from_pretrained` would refuse in the result, for what
    the target's layout cannot say, for a source that is not as its manifest says, and with `verify`
    if logits are not transformers'.
    """
    if quantize and (to_hf or to_llama2c or verify):
        raise InputError(
            "no other layout has these codes, nor has transformers their logits: --quantize goes "
            "with none of --to-hf, --to-llama2c and --verify"
        )
    if verify:
        _import_transformers()
    if to_llama2c and (dtype not in (None, torch.float32) or verify or tokenizer):
        raise InputError("a llama2.c file has no dtype but float32, no tokenizer, and no --verify")
    model = _open(source, family, positions, revision)
    layout = "hf" if to_hf else "llama2c" if to_llama2c else "ours"
    if model.quantized and (quantize or layout != "ours"):
        raise InputError(
            f"{source}: is quantised already, to {model.quantized}: codes are no weights to convert"
        )
    if model.layout == layout and not quantize:
        raise InputError(f"{source}: is {_LAYOUTS[layout]} already")
    if tokenizer is not None:
        if not tokenizer.is_file():
            raise InputError(f"{tokenizer}: no such file")
        name = "tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"
        model.files[name] = tokenizer
    if to_llama2c:
        _write_llama2c(model, target)
    else:
        if quantize:
            tensors = packed(model.tensors, model.config, quantize)
            model = dataclasses.replace(model, tensors=tensors, quantized=quantize)
        _write_folder(model, target, to_hf, dtype, verify)


def _write_folder(
    model: Source, target: Path, to_hf: bool, dtype: torch.dtype | None, verify: bool
) -> None:
    hf_config = with_dtype(model.hf_config, dtype) if model.hf_config else None
    tensors = model.tensors
    if to_hf:
        try:
            values = hf_config or model.config.to_hf()
        except InputError as error:
            raise InputError(f"{model.name}: {error}") from None
        tensors = {ours_to_hf(name): tensor for name, tensor in tensors.items()}
    else:
        values = {**model.config.to_dict(), **({"hf_config": hf_config} if hf_config else {})}
        values["quantize"] = model.quantized
    hashes = _hashes(model)
    with new_folder(target) as folder:
        with progress_bar(_size(model, dtype), "write", "B") as bar:
            write_model(folder, values, tensors, model.files, dtype, bar.update)
        check_model(folder, model.config)  # everything there, in shape, and finite
        if verify:
            with _in_hf_layout(model, folder, to_hf) as theirs:
                _verify(folder, theirs, dtype)
        _write_manifest(folder / MANIFEST, model, dtype, hashes, sorted(folder.iterdir()))


def _write_llama2c(model: Source, target: Path) -> None:
    manifest = target.with_name(f"{target.name}.{MANIFEST}")
    for path in (target, manifest):
        if path.exists():
            raise InputError(f"{path}: exists already")
    hashes = _hashes(model)
    make_folder(target.parent)
    with progress_bar(_size(model, torch.float32), "write", "B") as bar:
        write_llama2c(target, model.config, model.tensors, bar.update)
    _write_manifest(manifest, model, torch.float32, hashes, [target])


def _size(model: Source, dtype: torch.dtype | None) -> int:
    """Bytes of the model's tensors in `dtype`."""
    return sum(tensor.nbytes(dtype) for tensor in model.tensors.values())


# --- sources -----------------------------------------------------------------------------------

_LAYOUTS = {
    "hf": "in Hugging Face's layout",
    "ours": "converted",
    "llama2c": "a llama2.c file",
}


def _open(
    source: Path | str, family: str | None, positions: int | None, revision: str | None
) -> Source:
    path = Path(source)
    if path.is_file():
        refuse_pointer(path)
        config, tensors = read_llama2c(path)
        config = _cut(config, positions)
        return Source("llama2c", path.name, config, tensors, [path])
    if path.is_dir() and is_meta(path):
        config, tensors, read = read_meta(path, family)
        config = _cut(config, positions)
        return Source("meta", path.name, config, tensors, read, tokenizer_files(path))
    folder = model_folder(source, revision)
    name = path.name
    if folder != path:
        name = f"{hub_name(folder)}@{folder.name}"  # a snapshot's folder is called by its commit
    return _open_folder(folder, name, positions)


def _open_folder(path: Path, name: str, positions: int | None) -> Source:
    """A folder of Hugging Face's layout, or a converted one."""
    values = read_json(path / "config.json")
    converted = values.get("format") == FORMAT
    try:
        if positions is None:
            config = LlamaConfig.from_dict(values)
        else:  # a sliding window may not matter within so few
            given = values.get("max_position_embeddings", positions)
            config = LlamaConfig.from_dict({**values, "max_position_embeddings": positions})
            config = _cut(dataclasses.replace(config, max_position_embeddings=given), positions)
    except InputError as error:
        raise InputError(f"{path / 'config.json'}: {error}") from None
    weights, tensors = stored_weights(path)
    config = as_stored(config, tensors, lambda tensor: tensor.read())
    return Source(
        layout="ours" if converted else "hf",
        name=name,
        config=config,
        tensors=tensors,
        read=[path / "config.json", *weights.files],
        files=companion_files(path),
        hf_config=values.get("hf_config") if converted else values,
        quantized=values.get("quantize") if converted else None,
    )


def _cut(config: LlamaConfig, positions: int | None) -> LlamaConfig:
    """The same model with fewer positions."""
    if positions is None:
        return config
    if not 0 < positions <= config.max_position_embeddings:
        raise InputError(
            f"--positions must be in [1, {config.max_position_embeddings}], and is {positions}"
        )
    return dataclasses.replace(config, max_position_embeddings=positions)


# --- manifest ----------------------------------------------------------------------------------


def _hashes(model: Source) -> dict[str, str]:
    """SHA-256 of every file read. Raises InputError for one that its manifest says is another."""
    paths = [*model.read, *model.files.values()]
    with progress_bar(sum(path.stat().st_size for path in paths), "check", "B") as bar:
        hashes = {path: sha256(path, bar.update) for path in paths}
    manifest = model.read[0].parent / MANIFEST
    if model.read[0].name == "config.json" and manifest.exists():
        written = read_json(manifest).get("written")
        for path, value in hashes.items():
            known = written.get(path.name) if isinstance(written, dict) else None
            if path.parent == manifest.parent and known not in (None, value):
                raise InputError(
                    f"{path}: is not the file of {manifest.name}: its SHA-256 is {value}, "
                    f"expected {known}"
                )
    return {path.name: value for path, value in hashes.items()}


def _write_manifest(
    path: Path,
    model: Source,
    dtype: torch.dtype | None,
    read: dict[str, str],
    written: list[Path],
) -> None:
    with progress_bar(sum(file.stat().st_size for file in written), "check", "B") as bar:
        hashes = {file.name: sha256(file, bar.update) for file in written}
    record = {
        "made_by": f"scalabl_ref {scalabl_ref.__version__}, convert_hf.py",
        "source": model.name,
        "dtype": "keep" if dtype is None else str(dtype).removeprefix("torch."),
        "quantize": model.quantized,
        "read": read,
        "written": hashes,
    }
    atomic_write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


# --- against transformers ------------------------------------------------------------------------


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError(
            "--verify needs the transformers package, which is not installed here: it brings "
            "NumPy, so install it in an environment of its own"
        ) from None
    return transformers


@contextmanager
def _in_hf_layout(model: Source, folder: Path, to_hf: bool) -> Iterator[Path]:
    """A folder that transformers can read: the source, the target, or one made for the purpose."""
    if to_hf:
        yield folder
    elif model.layout == "hf":
        yield model.read[0].parent
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".tmp") as name:
            convert(folder, Path(name) / "hf", to_hf=True)
            yield Path(name) / "hf"


@torch.no_grad()
def _verify(ours: Path, theirs: Path, dtype: torch.dtype | None) -> None:
    """Compare the float32 logits of both programs on random tokens; one model at a time.

    The bound is that of rounding: sums of as many terms as a block has, in every block, whose
    errors add up like a random walk; eight for two sides and the largest of many logits.
    """
    transformers = _import_transformers()
    model = Llama.from_pretrained(ours, dtype=torch.float32)
    c = model.config
    generator = torch.Generator().manual_seed(0)
    length = min(64, c.max_position_embeddings)
    tokens = torch.randint(0, c.vocab_size, (2, length), generator=generator)
    logits = model(tokens)
    del model
    reference = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=dtype or "float32")
    expected = reference.float().eval()(tokens).logits
    terms = (c.num_hidden_layers + 1) * (3 * c.hidden_size + c.head_dim + c.intermediate_size)
    largest = expected.abs().max().item()
    bound = 8 * terms**0.5 * torch.finfo(torch.float32).eps * largest
    difference = (logits - expected).abs().max().item()
    report = f"logits differ from transformers' by {difference:.2g} at most, of {largest:.4g}"
    if not difference <= bound:
        raise InputError(f"{theirs}: {report}; rounding allows {bound:.2g}")
    print(f"verified: {report}; rounding allows {bound:.2g}")


def run(arguments: list[str] | None = None) -> None:
    """`main` as a program: SIGTERM ends it as ctrl-C does, with nothing left behind."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main(arguments))


if __name__ == "__main__":
    run()
