"""A GGUF of architecture llama, mistral, qwen2 or qwen3 into this package's layout.

The tokenizer and the chat template in it come along.

    python tools/convert_gguf.py FILE.gguf DST [--dtype float32|bfloat16|float16|keep]
                                               [--quantize int8|nf4]

Tensors may be F32, F16, BF16, or any quantised type that the `gguf` package can expand. It is in
the extra `gguf` and brings NumPy, which nothing else here needs: use an environment of its own.
Of a split file, name any part: all of them are read.
--quantize packs the expanded weights of the blocks anew (docs/large.md). DST must not exist: it
appears whole, or not at all.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import scalabl_ref  # noqa: F401  before torch, whose warning about a missing NumPy it keeps away

# isort: split
import torch
from torch import Tensor

from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.fast.quantize import KINDS as CODES
from scalabl_ref.fast.quantize import Kind
from scalabl_ref.model.config import LlamaConfig, RopeConfig
from scalabl_ref.model.llama import Llama
from scalabl_ref.model.weights import check_model
from scalabl_ref.support.errors import InputError, ending
from scalabl_ref.support.files import atomic_write, atomic_write_text, new_folder, refuse_pointer
from scalabl_ref.support.folders import write_model
from scalabl_ref.support.tensors import Stored

sys.path.insert(0, str(Path(__file__).resolve().parent))
from llama2c import half_split
from packing import packed

# Architectures, and whether the rows of q and k are stored for interleaved RoPE pairs. (No file of
# llama.cpp says mistral: Mistral's say llama. One that does is taken for the same layout.)
ARCHITECTURES = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}
DTYPES = ("float32", "bfloat16", "float16", "keep")

# Parts of a tensor's name in a GGUF and in ours.
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "attn_norm",
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_output": "attn.o_proj",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

# How a byte-level BPE vocabulary splits text before merging, by tokenizer.ggml.pre: a pattern, or
# "digits" for single digits before GPT-2's own pattern.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"\p{Lu}\p{Lt}", r"\p{Ll}"
_BOTH = r"\p{Lm}\p{Lo}\p{M}"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _START + r"\p{L}+|\p{N}{1,3}" + _REST
_TEKKEN = (
    f"{_START}[{_UPPER}{_BOTH}]*[{_LOWER}{_BOTH}]+|{_START}[{_UPPER}{_BOTH}]+[{_LOWER}{_BOTH}]*"
    r"|\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*")
)
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
PRE_TOKENIZERS = {
    "smollm": "digits",
    **dict.fromkeys(LLAMA3_NAMES, _LLAMA3),
    **dict.fromkeys(QWEN2_NAMES, _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
    "tekken": _TEKKEN,
    "gpt-2": "",
}
# Those whose merges do not reach all of their tokens, which are taken whole; their texts begin with
# BOS unless the file says otherwise.
WHOLE_NAMES = (*LLAMA3_NAMES, "tekken")
# Control tokens that end a text or a turn beside the file's eos, by name, as in llama.cpp.
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
CONTROL, USER_DEFINED = 3, 4  # types of tokens, sentencepiece's own


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="FILE.gguf")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights written; keep: F16 or BF16 if all matrices are, else float32",
    )
    parser.add_argument("--quantize", choices=CODES, help="the blocks' weights to 8 or 4 bits")
    args = parser.parse_args(arguments)
    try:
        convert(args.source, args.target, getattr(torch, args.dtype, None), args.quantize)
    except (Exception, KeyboardInterrupt) as error:
        said = ending(error)
        if said is None:
            raise
        print(said[1], file=sys.stderr)
        return said[0]
    print(f"written: {args.target}")
    return 0


def convert(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = torch.float32,
    quantize: Kind | None = None,
) -> None:
    """Write the model in a GGUF to the new folder `target`; dtype None is the file's own.

    quantize: write the codes that `Llama.from_pretrained` would make of those weights.
    Raises InputError naming the file, and the key or tensor, for anything missing or not supported.
    """
    parts = _parts(source)
    try:
        fields = dict(_contents(parts[0]))
        tensors = {tensor.name: tensor for part in parts for tensor in part.tensors}
        architecture = _architecture(fields)
        dtype = dtype or _stored_dtype(tensors)
        weights = dict(_weights(tensors, architecture, fields, dtype))
        config = _config(architecture, fields, weights, tensors.get(ROPE_FACTORS))
        _check_shapes(config, weights)
        with new_folder(target) as folder:
            if quantize:
                weights = packed(weights, config, quantize)
            write_model(folder, {**config.to_dict(), "quantize": quantize}, weights, {})
            _write_tokenizer(folder, fields)
            check_model(folder)  # everything there, in shape, and finite
            load_tokenizer(folder)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _parts(source: Path) -> list[Any]:
    """The readers of a file, or of all parts of the one that `source` is a part of, in order."""
    reader = _open(source)
    number, count = _part_of(source, reader)
    if count == 1:
        return [reader]
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", source.name)
    if match is None or (int(match[2]), int(match[3])) != (number, count):
        raise InputError(
            f"{source}: is part {number} of {count}, and is not named so: expected a name that "
            f"ends in -{number:05d}-of-{count:05d}.gguf"
        )
    readers = []
    for i in range(1, count + 1):
        path = source.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf")
        if not path.exists():
            raise InputError(f"{source}: part {i} of {count} is missing: {path.name}")
        readers.append(reader if i == number else _open(path))
        if _part_of(path, readers[-1]) != (i, count):
            raise InputError(f"{path}: says that it is another part than its name says")
    return readers


def _part_of(source: Path, reader: Any) -> tuple[int, int]:
    """Which part a file is, from 1, and of how many: 1 of 1 if it is not split."""
    fields = {key: f.contents() for key, f in reader.fields.items() if key.startswith("split.")}
    try:
        count = _get(fields, "split.count", int, 1)
        number = _get(fields, "split.no", int, 0) + 1
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    if count < 2:  # llama.cpp writes 0, too
        return 1, 1
    if not 1 <= number <= count:
        raise InputError(f"{source}: key split.no is {number - 1}, and split.count {count}")
    return number, count


def _open(source: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            "reading a GGUF needs the gguf package: pip install -e '.[gguf]' in the clone"
        ) from None
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    try:
        _check_lengths(source)
        return GGUFReader(source)
    except Exception as error:  # the package raises many kinds for a damaged file
        refuse_pointer(source)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", reason):
            reason = f"the gguf package that is installed knows no tensors of type {unknown[1]}"
        raise InputError(f"{source}: not a valid GGUF file: {reason}") from None


# Bytes of the kinds of value in a header, by their number; 8 is a text and 9 a list.
_TEXT, _LIST = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _check_lengths(source: Path) -> None:
    """That what the header counts is there: the package would go on for ever, or fill the memory.

    Raises ValueError. What the counted things are, the package checks.
    """
    with source.open("rb") as file:
        end = source.stat().st_size

        def number(size: int) -> int:
            return int.from_bytes(file.read(size), "little")

        def skip(size: int) -> None:
            if size > end - file.tell():
                raise ValueError(f"it ends within the header, at byte {file.tell()} + {size}")
            file.seek(size, 1)

        def value(kind: int, depth: int = 0) -> None:
            if kind == _TEXT:
                skip(number(8))
            elif kind == _LIST:
                inner, count = number(4), number(8)
                if inner in _SIZES:
                    skip(count * _SIZES[inner])
                    return
                if count > (end - file.tell()) // 8 or depth > 1:
                    raise ValueError(f"a list of {count} entries in a file of {end} bytes")
                for _ in range(count):
                    value(inner, depth + 1)
            elif kind in _SIZES:
                skip(_SIZES[kind])
            else:
                raise ValueError(f"a value of unknown kind {kind}")

        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        file.seek(4, 1)  # the version
        tensors, fields = number(8), number(8)
        if tensors + fields > end // 12:
            raise ValueError(f"{tensors} tensors and {fields} keys in a file of {end} bytes")
        for _ in range(fields):
            skip(number(8))
            value(number(4))


def _contents(reader: Any) -> Iterator[tuple[str, Any]]:
    for name, field in reader.fields.items():
        try:
            yield name, field.contents()
        except UnicodeDecodeError:
            raise InputError(f"key {name} is not text in UTF-8") from None


KINDS = {int: "a whole number", float: "a number", str: "a text", list: "a list", bool: "a bool"}


def _get(fields: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """The value under `key`, of a type in KINDS. Raises InputError if absent or of another type."""
    value = fields.get(key, default)
    if value is None:
        raise InputError(f"key {key} is missing")
    return _of_kind(value, kind, f"key {key}")


def _of_kind(value: Any, kind: type, where: str) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where} must be {KINDS[kind]}, not {str(value)[:40]!r}")
    return value


def _size(fields: dict[str, Any], key: str, default: int | None = None) -> int:
    value = _get(fields, key, int, default)
    if value < 1:
        raise InputError(f"key {key} must be above 0, not {value}")
    return value


def _tokens(fields: dict[str, Any]) -> list[str]:
    key = "tokenizer.ggml.tokens"
    return [_of_kind(token, str, f"an entry of {key}") for token in _get(fields, key, list)]


def _per_token(fields: dict[str, Any], key: str, kind: type) -> list[Any]:
    """A list with one entry of type `kind` for each token."""
    values, expected = _get(fields, key, list), len(_tokens(fields))
    if len(values) != expected:
        raise InputError(f"key {key} has {len(values)} entries, and there are {expected} tokens")
    return [_of_kind(value, kind, f"an entry of {key}") for value in values]


def _token_id(fields: dict[str, Any], name: str) -> int | None:
    """Id of the special token `name`, None if the file has none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in fields:
        return None
    index, count = _get(fields, key, int), len(_tokens(fields))
    if not 0 <= index < count:
        raise InputError(f"key {key} is {index}, and there are {count} tokens")
    return index


# --- weights -----------------------------------------------------------------------------------


def _architecture(fields: dict[str, Any]) -> str:
    architecture: str = _get(fields, "general.architecture", str)
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"architecture {architecture!r} is not known: expected one of {known}")
    if _get(fields, f"{architecture}.expert_count", int, 0):
        raise InputError("a mixture of experts is not implemented")
    return architecture


def _config(
    architecture: str, fields: dict[str, Any], weights: dict[str, Stored], factors: Any
) -> LlamaConfig:
    def size(key: str, default: int | None = None) -> int:
        return _size(fields, f"{architecture}.{key}", default)

    heads, hidden, layers = size("attention.head_count"), size("embedding_length"), _layers(weights)
    head_dim = size("attention.key_length", max(1, hidden // heads))
    if size("attention.value_length", head_dim) != head_dim:
        raise InputError("heads whose values have another length than their keys")
    if size("rope.dimension_count", head_dim) != head_dim:
        raise InputError("RoPE on a part of each head is not implemented")
    if size("block_count") != layers:
        raise InputError(
            f"key {architecture}.block_count is {size('block_count')}, tensors say {layers}"
        )
    positions = size("context_length")
    window = size("attention.sliding_window", positions)
    if window < positions:
        raise InputError(
            f"sliding-window attention ({window} tokens) is not implemented: it would matter "
            f"within the model's {positions} positions"
        )
    eps = _get(fields, f"{architecture}.attention.layer_norm_rms_epsilon", float)
    return LlamaConfig(
        vocab_size=_vocab_size(fields, weights),
        hidden_size=hidden,
        intermediate_size=size("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=float(f"{eps:.6g}"),  # stored as a float32: 1e-5 and not 9.99999974e-06
        rope=_rope(architecture, fields, None if factors is None else _expanded(factors), head_dim),
        tie_word_embeddings="lm_head.weight" not in weights,
        qkv_bias="layers.0.attn.q_proj.bias" in weights,
        output_bias="layers.0.attn.o_proj.bias" in weights,
        mlp_bias="layers.0.mlp.up_proj.bias" in weights,
        qk_norm="layers.0.attn.q_norm.weight" in weights,
        bos_token_id=_token_id(fields, "bos"),
        eos_token_id=_token_id(fields, "eos"),
    )


def _layers(weights: dict[str, Stored]) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith("layers.")})


def _vocab_size(fields: dict[str, Any], weights: dict[str, Stored]) -> int:
    """Rows of the embedding: at least as many as tokens; more are padding."""
    tokens = len(_tokens(fields))
    if "embed_tokens.weight" not in weights:
        raise InputError("tensor token_embd.weight is missing")
    rows = weights["embed_tokens.weight"].shape[0]
    if rows < tokens:
        raise InputError(f"tensor token_embd.weight has {rows} rows, and there are {tokens} tokens")
    return rows


def _rope(
    architecture: str, fields: dict[str, Any], factors: Tensor | None, head_dim: int
) -> RopeConfig:
    """llama.cpp's rules: a factor without a type scales linearly, and 0 means none."""
    rope = f"{architecture}.rope"
    theta = float(_get(fields, f"{rope}.freq_base", float, 10000.0))
    kind = _get(fields, f"{rope}.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise InputError(f"RoPE scaling {kind!r} is not known: expected none or linear")
    old = _get(fields, f"{rope}.scale_linear", float, 1.0)
    factor = float(_get(fields, f"{rope}.scaling.factor", float, old))
    if kind == "linear" and factor not in (0.0, 1.0):
        if factors is not None:
            raise InputError(f"RoPE scaled both linearly and by tensor {ROPE_FACTORS}")
        return RopeConfig("linear", theta, factor)
    if factors is None:
        return RopeConfig(theta=theta)
    # Llama 3.1's scaling is stored by its effect, a divisor for each frequency: find it again.
    plain = RopeConfig(theta=theta)
    guess = RopeConfig("llama3", theta, float(factors.max()), 1.0, 4.0, 8192)
    frequencies = (config.inverse_frequencies(head_dim) for config in (plain, guess))
    divisors = next(frequencies) / next(frequencies)
    # Both sides were rounded to float32 a few times.
    if divisors.shape != factors.shape or ((divisors / factors - 1).abs() > 1e-5).any():
        raise InputError(f"tensor {ROPE_FACTORS}: is not the scaling of Llama 3.1")
    return guess


def _stored_dtype(tensors: dict[str, Any]) -> torch.dtype:
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    half = {"F16": torch.float16, "BF16": torch.bfloat16}
    return half.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _expanded(tensor: Any, rows: int | None = None) -> Tensor:
    """A tensor of the file, or its first rows alone, in float32."""
    import numpy
    from gguf import dequantize

    try:
        with numpy.errstate(all="ignore"):  # a NaN is refused later, by its tensor's name
            values = dequantize(tensor.data[:rows], tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"tensor {tensor.name}: cannot be expanded: {error}") from None
    expanded = torch.from_numpy(numpy.array(values, numpy.float32))
    return expanded if rows else expanded.view(_shape(tensor))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _weights(
    tensors: dict[str, Any], architecture: str, fields: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Stored]]:
    """Our name of each tensor, and the tensor, which is expanded when it is read."""
    interleaved = ARCHITECTURES[architecture]
    heads = {"attn_q": _size(fields, f"{architecture}.attention.head_count")}
    heads["attn_k"] = _size(fields, f"{architecture}.attention.head_count_kv", heads["attn_q"])
    for name, tensor in tensors.items():
        if name == ROPE_FACTORS:
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in NAMES:
            raise InputError(f"tensor {name} is not part of a {architecture} model")
        block, part, kind = match.groups()
        prefix = "" if block is None else f"layers.{block}."
        shape, rotated = _shape(tensor), heads.get(part, 0)
        if rotated and shape[0] % (2 * rotated):
            raise InputError(f"tensor {name}: {shape[0]} rows for {rotated} heads")
        _expanded(tensor, 1)  # that it can be, before anything is written
        read = partial(_read, tensor, rotated if interleaved else 0, dtype)
        yield f"{prefix}{NAMES[part]}.{kind}", Stored(dtype, shape, read)


def _check_shapes(config: LlamaConfig, weights: dict[str, Stored]) -> None:
    """Raise InputError, which has the GGUF's name, for a tensor that is missing or misshapen."""
    theirs = {ours: name for name, ours in NAMES.items()}
    for name, empty in Llama(config, device="meta").state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, kind = name.removeprefix("layers.").rpartition(".")
        block, _, part = stem.partition(".") if name.startswith("layers.") else ("", "", stem)
        tensor = f"blk.{block}.{theirs[part]}.{kind}" if block else f"{theirs[part]}.{kind}"
        if name not in weights:
            raise InputError(f"tensor {tensor} is missing")
        if weights[name].shape != empty.shape:
            raise InputError(
                f"tensor {tensor} has shape {weights[name].shape}, expected {tuple(empty.shape)}"
            )


def _read(tensor: Any, heads: int, dtype: torch.dtype) -> Tensor:
    """A tensor expanded; with `heads`, its interleaved rows back in half-split order."""
    weight = _expanded(tensor)
    if heads:
        matrix = weight if weight.dim() > 1 else weight[:, None]
        weight = half_split(matrix, heads).view(weight.shape)
    return weight.to(dtype)


# --- tokenizer ---------------------------------------------------------------------------------


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    kind = _get(fields, "tokenizer.ggml.model", str)
    if kind == "llama":
        with atomic_write(folder / "tokenizer.model") as file:
            file.write(_sentencepiece(fields))
    elif kind == "gpt2":
        _byte_level_bpe(fields).save(str(folder / "tokenizer.json"))
    else:
        raise InputError(f"tokenizer {kind!r} is not known: expected 'llama' or 'gpt2'")
    tokens = _tokens(fields)
    config: dict[str, Any] = {"add_bos_token": _adds_bos(fields)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = _token_id(fields, key)
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    if kind == "gpt2":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(folder / "tokenizer_config.json", config)
    ends = _ends(fields)
    if len(ends) > 1:
        begin = _token_id(fields, "bos")
        _write_json(
            folder / "generation_config.json", {"bos_token_id": begin, "eos_token_id": ends}
        )
    if "tokenizer.chat_template" in fields:
        template = _get(fields, "tokenizer.chat_template", str)
        atomic_write_text(folder / "chat_template.jinja", template)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(values, ensure_ascii=False) + "\n")


def _ends(fields: dict[str, Any]) -> list[int]:
    """Ids of the tokens that end a text or a turn, the file's eos first."""
    stated = [_token_id(fields, name) for name in ("eos", "eot", "eom")]
    tokens, key = _tokens(fields), "tokenizer.ggml.token_type"
    kinds = _per_token(fields, key, int) if key in fields else []
    named = [i for i, kind in enumerate(kinds) if kind == CONTROL and tokens[i] in ENDS]
    return list(dict.fromkeys(i for i in (*stated, *named) if i is not None))


def _adds_bos(fields: dict[str, Any]) -> bool:
    """Whether texts begin with BOS; by llama.cpp's default those of Llama and Mistral do."""
    is_sentencepiece = _get(fields, "tokenizer.ggml.model", str) == "llama"
    default = is_sentencepiece or fields.get("tokenizer.ggml.pre") in WHOLE_NAMES
    return _get(fields, "tokenizer.ggml.add_bos_token", bool, default)


def _byte_level_bpe(fields: dict[str, Any]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _get(fields, "tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"pre-tokenizer {pre!r} is not known: expected one of {known}")
    pattern = PRE_TOKENIZERS[pre]
    tokens = _tokens(fields)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    key = "tokenizer.ggml.merges"
    merges = [_of_kind(m, str, f"an entry of {key}").split(" ", 1) for m in _get(fields, key, list)]
    if any(len(pair) != 2 for pair in merges):
        raise InputError(f"an entry of {key} is not two parts with a space between")
    try:
        bpe = models.BPE(vocabulary, [(a, b) for a, b in merges], ignore_merges=pre in WHOLE_NAMES)
    except Exception as error:  # the package raises nothing narrower
        raise InputError(f"key {key}: {error}") from None
    tokenizer = Tokenizer(bpe)
    if pre in QWEN2_NAMES:
        tokenizer.normalizer = normalizers.NFC()
    plain = pattern in ("", "digits")
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain)]
    if pattern == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pattern:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, fields)
    return tokenizer


def _add_tokens(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Tokens that are never spelled by others, and BOS before every text."""
    from tokenizers import AddedToken, processors

    tokens = _tokens(fields)
    kinds = _per_token(fields, "tokenizer.ggml.token_type", int)
    added = {
        wanted: [
            AddedToken(tokens[i], normalized=False)
            for i, kind in enumerate(kinds)
            if kind == wanted
        ]
        for wanted in (CONTROL, USER_DEFINED)
    }
    tokenizer.add_special_tokens(added[CONTROL])
    tokenizer.add_tokens(added[USER_DEFINED])
    if _adds_bos(fields):
        index = _token_id(fields, "bos")
        if index is None:
            raise InputError("key tokenizer.ggml.bos_token_id is missing, and texts begin with BOS")
        bos = tokens[index]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, index)]
        )


def _sentencepiece(fields: dict[str, Any]) -> bytes:
    """A sentencepiece model, as the protocol buffer that the package reads.

    ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec (sentencepiece_model.proto). A GGUF's
    token types are sentencepiece's own.
    """
    scores = _per_token(fields, "tokenizer.ggml.scores", float)
    kinds = _per_token(fields, "tokenizer.ggml.token_type", int)
    pieces = b""
    for token, score, kind in zip(_tokens(fields), scores, kinds, strict=True):
        pieces += _bytes_field(
            1,
            _bytes_field(1, token.encode())
            + _varint(2 << 3 | 5)
            + struct.pack("<f", score)
            + _int_field(3, kind),
        )
    ids = {40: "unknown", 41: "bos", 42: "eos"}
    trainer = _int_field(3, 2)  # model_type BPE
    trainer += _int_field(35, 1)  # byte_fallback
    for number, name in ids.items():
        index = _token_id(fields, name)
        trainer += _int_field(number, -1 if index is None else index)
    add_prefix = int(_get(fields, "tokenizer.ggml.add_space_prefix", bool, True))
    # 3 add_dummy_prefix, 4 remove_extra_whitespaces (llama's models do not)
    normalizer = _bytes_field(1, b"identity") + _int_field(3, add_prefix) + _int_field(4, 0)
    return pieces + _bytes_field(2, trainer) + _bytes_field(3, normalizer)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative number is its 64-bit two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


if __name__ == "__main__":
    sys.exit(main())
