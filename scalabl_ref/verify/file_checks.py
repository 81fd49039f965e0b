"""Checks of files: tensors, models, runs and LoRAs, and questions; written, and read back."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ..core.adapter import adapters
from ..core.config import AdapterConfig
from ..core.noise import Noise
from ..core.objective import class_logits, complexity
from ..data import encode
from ..data.formats import load
from ..data.prompts import Wording
from ..data.tokenizer import load_tokenizer
from ..interop.exporting import Trained
from ..interop.importing import start_from
from ..interop.peft import read_peft, write_peft
from ..model.attach import Linear, add_adapters
from ..model.config import LlamaConfig, RopeConfig
from ..model.llama import Llama
from ..support.tensors import load_tensors, open_tensors, save_tensors
from ..training.runs import load_run, save_run
from .check import Check, Errors, Op, exact, ratio, refused
from .method_checks import CLASSES, EPS_32, NETWORK, draws, fill, prompts
from .use_checks import SHAPE

# --- Weights --------------------------------------------------------------------------------------


def tensors_on_disk(_: Op, device: torch.device) -> Errors:
    """A file of safetensors by its own bytes, and as it is read back."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16,
             "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}  # fmt: skip
    own = {name: (20 * draws(1, 3, 5)).abs().to(device, kind) for name, kind in kinds.items()}
    own |= {"none": torch.empty(0, 4), "one": torch.tensor(2.5), "view": draws(2, 6, 4).T[1:]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.safetensors"
        save_tensors(path, own.items(), {"of": "verify"})
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        header, body = json.loads(path.read_bytes()[8 : 8 + size]), path.read_bytes()[8 + size :]
        read, facts = load_tensors(path)
        later = {name: tensor() for name, tensor in open_tensors(path).items()}
    yield exact(facts == header.pop("__metadata__", None) == {"of": "verify"}, "metadata")
    yield exact(set(read) == set(later) == set(header) == set(own), f"names: {sorted(read)}")
    for name, tensor in own.items():
        start, end = header[name]["data_offsets"]
        raw = tensor.cpu().contiguous().flatten().view(torch.uint8).tolist()
        yield exact(list(body[start:end]) == raw, f"{name}: bytes")
        if name in kinds:
            yield exact(header[name]["dtype"] == name, f"{name}: dtype")
        yield exact(header[name]["shape"] == list(tensor.shape), f"{name}: shape")
        for got in (read[name], later[name]):
            yield exact(got.dtype == tensor.dtype and torch.equal(got, tensor.cpu()), name)


def base_model(device: torch.device) -> Llama:
    return Llama(SHAPE, device=device).init_random_(std=0.6)


def adapted_model(device: torch.device, cut: bool, **config: Any) -> Llama:
    """Five adapted layers of the base, with parameters that are not the initial ones."""
    model = base_model(device).trim_head([*CLASSES]) if cut else base_model(device)
    targets = ("q_proj", "up_proj", "lm_head")
    add_adapters(model, AdapterConfig(rank=2, alpha=3.0, targets=targets, **config))
    fill(adapters(model).values(), 4)
    return model


METHODS: list[dict[str, Any]] = [
    {}, {"method": "mle"}, {"method": "blob"}, {"covariance": "full"},
    {"method": "map", "prior_std": 0.3}, {"prior_std": 0.7, "init_sigma": 0.2},
]  # fmt: skip


def runs_on_disk(_: Op, device: torch.device) -> Errors:
    """A run that is written and read: the same model, draws, objective and facts."""
    batch = prompts(device, 3, 4)
    for i, config in enumerate(METHODS):
        model = adapted_model(device, cut=i % 2 == 0, **config)
        with tempfile.TemporaryDirectory() as folder:
            save_run(folder, model, {"model": "the base", "train": {"seed": 3}})
            back, facts = load_run(folder, model=base_model(device))
        with torch.no_grad():
            for noise in (None, Noise(1, 2)):
                got, right = (class_logits(m, batch, noise) for m in (back, model))
                yield exact(torch.equal(got, right), f"{config}: {noise}")
            yield exact(bool(complexity(back) == complexity(model)), f"{config}: KL")
        yield exact(facts["train"]["seed"] == 3 and facts["adapter"]["rank"] == 2, "facts")


def loras_of_peft(_: Op, device: torch.device) -> Errors:
    """A run's mean and its draws, as folders of PEFT: plain LoRAs that compute the same.

    The files are merged by hand: W + (lora_alpha / r) B A.
    """
    batch = prompts(device, 3, 4)
    for i, config in enumerate(METHODS):
        model = adapted_model(device, cut=i % 2 == 0, sampling="batch", **config)
        own = list(adapters(model).values())
        run = Trained(Path(), model, {}, None, Path())
        noises: list[Noise | None] = [Noise(9, 0), Noise(9, 1)] if own[0].random else []
        made = run.loras(0, 9) + (run.loras(2, 9) if noises else [])
        for noise, lora in zip([None, *noises], made, strict=True):
            plain = base_model(device)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                write_peft(Path(folder), lora(), own[0].config, "the base")
                facts = json.loads((Path(folder) / "adapter_config.json").read_text())
                tensors, _facts = load_tensors(Path(folder) / "adapter_model.safetensors")
                back = read_peft(Path(folder), base_model(device))[1]
            yield exact(len(tensors) == 2 * len(back) == 2 * len(own), f"{config}: tensors")
            scaling = facts["lora_alpha"] / facts["r"]
            for place, adapter in back.items():
                name = f"base_model.model.{in_hugging_face(place)}.lora_"
                A, B = (tensors[f"{name}{part}.weight"].to(device) for part in "AB")
                same = torch.equal(adapter.A.to(device), A) and torch.equal(adapter.B.to(device), B)
                yield exact(same and adapter.config.scaling == scaling, f"{config}: {place}")
                weight = cast(Linear, plain.get_submodule(place)).weight
                weight.data = weight.data + scaling * B @ A
            with torch.no_grad():
                got, right = (class_logits(m, batch, noise) for m in (plain, model))
            yield ratio(got, right, right.abs().max(), NETWORK * EPS_32, f"{config}: {noise}")
        part = dict(list(back.items())[1:])
        yield refused(partial(start_from, model, part, "a part"), "has no adapter of")


# Contents of config.json, and the configuration that each describes.
LLAMA3 = {
    "model_type": "llama", "hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 11,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu",
}  # fmt: skip
QWEN = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 11,
        "num_hidden_layers": 1, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "use_sliding_window": False, "eos_token_id": 4}  # fmt: skip
FAR = RopeConfig("default", 1e6)
IN_HF: list[tuple[dict[str, Any], LlamaConfig]] = [
    (LLAMA3, LlamaConfig(
        11, 12, 16, 2, 4, 2, 6, 64, 1e-5, RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 16),
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)),
    ({"model_type": "qwen2", "num_key_value_heads": 1, **QWEN},
     LlamaConfig(11, 8, 12, 1, 2, 1, 4, 32, rope=FAR, qkv_bias=True, eos_token_id=4)),
    ({"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 6, **QWEN},
     LlamaConfig(11, 8, 12, 1, 2, 2, 6, 32, rope=FAR, qk_norm=True, eos_token_id=4)),
]  # fmt: skip
NAMES_IN_HF = {"attn": "self_attn", "attn_norm": "input_layernorm",
               "mlp_norm": "post_attention_layernorm"}  # fmt: skip


def folders_of_hugging_face(_: Op, device: torch.device) -> Errors:
    """Llama 3, Qwen2.5 and Qwen3: config.json and two files of weights; the same model."""
    for values, config in IN_HF:
        kind = values["model_type"]
        read = LlamaConfig.from_hf(values)
        yield exact(read == config, f"{kind}: {read}")
        if rope := dict(values.get("rope_scaling", ())):  # an older version's name of the kind
            rope["type"] = rope.pop("rope_type")
            older = LlamaConfig.from_hf({**values, "rope_scaling": rope})
            yield exact(older == config, f"{kind}: rope_scaling with a type")
        if read != config:
            continue
        written = config.to_hf()
        for key in values.keys() - {"eos_token_id", "use_sliding_window"}:
            yield exact(written.get(key) == values[key], f"{kind}: {key} on the way back")
        model = Llama(config, device=device)
        fill([model], 3)
        own = {in_hugging_face(n): p for n, p in model.named_parameters()}  # a tied head: once
        with tempfile.TemporaryDirectory() as name:
            folder, places = Path(name), dict[str, str]()
            (folder / "config.json").write_text(json.dumps(values))
            for i, names in enumerate((list(own)[::2], list(own)[1::2])):
                file = f"model-{i + 1:05}-of-00002.safetensors"
                save_tensors(folder / file, [(n, own[n]) for n in names])
                places |= dict.fromkeys(names, file)
            index = {"metadata": {}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            back = Llama.from_pretrained(folder, torch.float32, device)
        tokens = torch.tensor([[3, 1, 4, 1, 5]], device=device)
        with torch.no_grad():
            yield exact(torch.equal(back(tokens), model(tokens)), f"{kind}: logits")


def in_hugging_face(name: str) -> str:
    parts = ".".join(NAMES_IN_HF.get(part, part) for part in name.split("."))
    return parts if parts.startswith("lm_head") else f"model.{parts}"


# --- Files of questions ---------------------------------------------------------------------------

TEXTS = ['one, "two"', "a line\nand another", "ü \U0001f600", " spaces  kept", "a {question}"]
NAMES = ("no", "yes", "maybe")


def questions_read(_: Op, device: torch.device) -> Errors:
    """The same rows from a table and from lines of JSON; their prompts and tokens."""
    rows = [(text, NAMES[2 * i % 3]) for i, text in enumerate(TEXTS)]
    quoted = [(text.replace('"', '""'), label) for text, label in rows]
    table = "Text,LABEL\r\n" + "".join(f'"{text}",{label}\r\n' for text, label in quoted)
    lines = "".join(json.dumps({"prompt": t, "label": n}) + "\n" for t, n in rows)
    with tempfile.TemporaryDirectory() as name:
        found = []
        for format, suffix, text in (("csv", "csv", "\ufeff" + table), ("jsonl", "jsonl", lines)):
            path = Path(name) / f"rows.{suffix}"
            path.write_bytes(text.encode())
            found.append(load(path, format))
            limited = load(path, format, limit=2, names=NAMES[::-1])
            yield exact([e.choices for e in limited] == [NAMES[::-1]] * 2, f"{format}: names given")
            labels = [e.choices[e.label] for e in limited]
            yield exact(labels == [n for _t, n in rows[:2]], f"{format}: labels by these names")
        write_byte_tokenizer(Path(name))
        tokenizer = load_tokenizer(name)
    for format, examples in zip(("csv", "jsonl"), found, strict=True):
        yield exact([e.question for e in examples] == TEXTS, f"{format}: texts")
        answers = [e.choices[e.label] for e in examples]
        yield exact(answers == [n for _t, n in rows], f"{format}: labels {answers}")
        yield exact(examples[0].choices == tuple(sorted(NAMES)), f"{format}: choices")
    examples = found[0]
    data = encode(examples, tokenizer, wording=Wording("Q: {question}\nA:", labels="words"))
    names = [n for _t, n in rows]
    for row, label, text, name in zip(data.tokens, data.labels, TEXTS, names, strict=True):
        yield exact(tokenizer.decode(row) == f"Q: {text}\nA:", f"prompt of {text!r}")
        # With a leading space, all answers would begin with the same token.
        first = tokenizer.decode([data.classes[label]])
        yield exact(first == name[0], f"token of {name!r}: {first!r}")
    cut = encode(examples, tokenizer, wording=Wording("{question}", "plain", "letters", "bare",
                                                      max_length=4))  # fmt: skip
    for short, text in zip(cut.tokens, TEXTS, strict=True):
        yield exact(short == tokenizer.encode(text)[-4:], f"{text!r} cut on the left")
    yield exact(cut.cut == 5 and cut.left_out == 0, "prompts that were cut")


def write_byte_tokenizer(
    folder: Path, merges: Sequence[tuple[str, str]] = (), bos: str | None = None
) -> None:
    """tokenizer.json as other tools write it: a token for each byte, ids 0 to 255; then for each of
    `merges`; then `bos`, which begins every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    made = Tokenizer(models.BPE(ids, [*merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.add_special_tokens([bos])
        special = [(bos, len(vocabulary))]
        made.post_processor = processors.TemplateProcessing(f"{bos} $A", None, special)
    made.save(str(folder / "tokenizer.json"))


FILE_CHECKS = [
    Check("tensors on disk", "safetensors, byte by byte", tensors_on_disk),
    Check(
        "folders of models",
        "Llama 3, Qwen2.5, Qwen3: config.json and shards",
        folders_of_hugging_face,
    ),
    Check("runs on disk", "a run written and read is the same model", runs_on_disk),
    Check("LoRAs of PEFT", "means and draws, as PEFT's folders", loras_of_peft),
    Check("questions", "tables and lines of JSON, prompts, tokens", questions_read),
]
