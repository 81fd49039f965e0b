"""State dictionaries of the official code, SRI-CSL/BayesAdapt, as its commit 3843000 saves them."""

from __future__ import annotations

from pathlib import Path

from ..core.adapter import Adapter
from ..core.config import AdapterConfig
from ..data.answers import answer_tokens
from ..data.tokenizer import letters, load_tokenizer
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.tensors import open_tensors
from .layers import FORMS, LORA, THEIRS, by_layer, read_theirs

OFFICIAL_FILE = "state_dict.pt"
_PRIOR = (".lora_A.default.log_p_mu", ".lora_A.default.log_p_sigma")  # of the official ScalaBL


def read_official(
    source: Path,
    model: Llama,
    base: Path | str,
    alpha: float | None = None,
    labels: list[str] | None = None,
) -> tuple[Path, dict[str, Adapter]]:
    """The official code's state_dict.pt, and adapters of its method by layer.

    The file has PEFT's names for the parameters of ScalaBL (Vh, log_s, log_s_sigma, B), of BLoB (A,
    its root rho, B) or of plain LoRA (A, B). alpha is 2 r. The head has only the answers' rows, and
    is never tied; the head of `model` is cut down to these rows. The prior is not read: in the
    official code log_p_mu and log_p_sigma share memory with the starting widths sigma_0, so that
    the prior is N(sigma_0, (1 + sigma_0)^2) instead of N(0, 1).
    """
    file = source / OFFICIAL_FILE if source.is_dir() else source
    tensors = {n: t for n, t in open_tensors(file).items() if not n.endswith(_PRIOR)}
    layers = by_layer(tensors, THEIRS)
    unknown = tensors.keys() - {name for parts in layers.values() for name in parts.values()}
    if unknown:
        raise InputError(f"{file}: tensor {min(unknown)} is not of a LoRA")
    extra = {part for names in layers.values() for part in names} - LORA.keys()
    method = next((name for name, form in FORMS.items() if form.keys() & extra), "mle")
    A = next(theirs for theirs, ours in FORMS[method].items() if ours == "A")
    head = layers.get("lm_head", {}).get("lora_B.weight")
    if head is not None and tensors[head]().dim() == 2:  # another shape is refused below
        _cut_head(file, model, len(tensors[head]()), base, labels)

    def config_of(layer: str) -> AdapterConfig:
        rank = tensors[layers[layer][A]]().shape[:1].numel()
        if rank < 1:
            raise InputError(f"{file}: {layer} has an adapter of rank 0")
        return AdapterConfig(method, rank, alpha)

    return file, read_theirs(file, tensors, model, method, config_of)


def _cut_head(
    file: Path, model: Llama, rows: int, base: Path | str, labels: list[str] | None
) -> None:
    if labels is not None and len(labels) != rows:
        raise InputError(f"{file}: its head has {rows} answers, and there are {len(labels)} labels")
    if rows == model.config.vocab_size:
        return
    try:
        names = labels or letters(rows)
        # The official code takes the vocabulary's own entries, whatever text precedes them.
        model.trim_head(answer_tokens(load_tokenizer(base), [], names, "alone").ids)
    except InputError as error:
        raise InputError(f"{file}: the {rows} rows of its head: {error}") from None
