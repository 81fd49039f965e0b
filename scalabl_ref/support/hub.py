"""Models by their names on the Hugging Face Hub: OWNER/NAME, or OWNER/NAME@REVISION."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import InputError, to_install

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*?)(?:@([\w./-]+))?")
_FILES = (".json", ".model", ".bin", ".gguf", ".pth", ".pt", ".safetensors")


def model_folder(model: Path | str, revision: str | None = None) -> Path:
    """`model` as a path, or the folder of its files from the Hub if it is a name there.

    A path that exists is never looked up on the Hub. revision: branch, tag or commit; the name may
    give it after an @. The files go to the Hub's own cache, safetensors if the model has them.
    HF_HUB_OFFLINE=1 uses only the cache. Raises InputError if there is no such model.
    """
    path, name = Path(model), str(model)
    match = _NAME.fullmatch(name)
    if match is None or path.exists() or name.endswith(_FILES):
        return path
    return _download(match[1], revision or match[2])


def hub_name(folder: Path) -> str | None:
    """The name of the model in a folder of the Hub's cache; None for other folders."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def _download(name: str, revision: str | None) -> Path:
    """Folder of a model's files from the Hub, in its cache; safetensors if it has them."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{name}: no such folder, and the Hub needs a package: {to_install('hf')}"
        ) from None
    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "*.jinja", "*.txt", "tokenizer.model", weights]
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"
                )
            )
            if any(folder.glob(weights)):
                break
    except Exception as error:  # the package and its transport raise many kinds
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 100 else f"{reason[:100]}..."
        raise InputError(f"{name}: no such folder, and the Hub download failed: {reason}") from None
    return folder
