"""Kinds of files that come with a model: a tokenizer.json, PEFT's folders and chat templates.

make_* makes a damaged file, read_* reads it; see tests/fuzz.py.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from scalabl_ref import InputError, Llama
from scalabl_ref.data import ChatTemplate
from scalabl_ref.data.chat import FIXED
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.interop.importing import import_adapter
from scalabl_ref.interop.peft import PEFT_WEIGHTS, read_peft
from scalabl_ref.support import limited
from scalabl_ref.support.tensors import save_tensors

from .conftest import ROOT
from .damage import damaged_bytes, damaged_value, written

TINY = ROOT / "scalabl_ref" / "assets" / "tiny"

# --- tokenizer.json -------------------------------------------------------------------------------

# Parts of a tokenizer.json that cost time or memory, or that its other parts do not fit.
_PARTS: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"},
                                              "content": "aa"}] * 12},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Prepend", "prepend": ""},
        {"type": "Lowercase"},
    ],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "(.*)*$"}, "behavior": "Removed", "invert": True},
        {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        {"type": "FixedLength", "length": 0},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True},
        {"type": "Whitespace"},
    ],
    "post_processor": [
        {"type": "RobertaProcessing", "sep": ["</s>", 2**31], "cls": ["<s>", 0],
         "trim_offsets": True, "add_prefix_space": True},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
         "pair": [], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 1]},
    ],
    "truncation": [
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0},
        {"direction": "Left", "max_length": 2, "strategy": "OnlySecond", "stride": 9},
    ],
    "padding": [
        {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None,
         "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    ],
    "decoder": [
        {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True},
    ],
    "model": [
        {"type": "BPE", "vocab": {"a": 0, "b": 2**32 - 1}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 0, "ab": 1}, "merges": ["a b"]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
        {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]], "byte_fallback": True},
        {"type": "Unigram", "unk_id": None, "vocab": []},
        {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]",
         "continuing_subword_prefix": "", "max_input_chars_per_word": 0},
    ],
    "added_tokens": [
        [{"id": i, "content": text, "single_word": False, "lstrip": True, "rstrip": True,
          "normalized": False, "special": special}]
        for i, text, special in [(0, "", True), (2**32 - 1, "x", True), (7, "a", False)]
    ],
}  # fmt: skip

_SETTINGS = {
    "add_bos_token": True, "bos_token": "<s>", "legacy": None,
    "eos_token": {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False},
    "additional_special_tokens": ["<x>"], "tokenizer_class": "LlamaTokenizer",
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>"}},
}  # fmt: skip


@lru_cache(maxsize=1)
def tokenizers() -> list[dict[str, Any]]:
    """Small ones of all models, as the package `tokenizers` writes them."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(alphabet | {"ab": 256, "the": 257}, [("a", "b")]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens(["<s>", "</s>"])
    bytes_.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 258)])
    words = {word: i for i, word in enumerate(["[UNK]", "<s>", "a", "##b", "the"])}
    pieces = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    pieces.normalizer, pieces.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.enable_truncation(8, stride=2)
    pieces.enable_padding(length=8)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], 0, False))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")])
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return [json.loads(each.to_str()) for each in (bytes_, pieces, unigram)]


def make_tokenizer(rng: Random, large: bool, folder: Path) -> bytes:
    """A tokenizer.json, now and then with a damaged tokenizer_config.json beside it."""
    value: Any = dict(rng.choice(tokenizers()))
    beside = folder / "tokenizer_config.json"
    beside.unlink(missing_ok=True)
    if rng.random() < 0.3:
        beside.write_bytes(written(rng, damaged_value(rng, _SETTINGS)))
        if rng.random() < 0.5:
            return written(rng, value)
    if large:
        vocab = {f"w{i}": i for i in range(50_000)}
        value["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    kind = rng.random()
    if kind < 0.4:
        part = rng.choice(sorted(_PARTS))
        value[part] = rng.choice(_PARTS[part])
        if rng.random() < 0.4:
            value[part] = damaged_value(rng, value[part])
        return written(rng, value)
    if kind < 0.8:
        return written(rng, damaged_value(rng, value))
    return damaged_bytes(rng, written(rng, value))


_SAID = ("", "a b the ab", "A\n<s>é漢🙂</s>", "a" * 64, " \t\r\n" * 8)


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path.parent)
    for text in _SAID:
        tokenizer.decode(tokenizer.encode(text))
    tokenizer.decode([0, tokenizer.vocab_size - 1, tokenizer.vocab_size, 2**40])
    with suppress(InputError):  # of the letters, and names no file
        tokenizer.class_token_ids(3, "Answer:")


# --- sentencepiece models -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def large_model() -> bytes:
    """Llama 2's, half a megabyte, if it is there."""
    folder = Path(os.environ.get("SCALABL_ASSETS", ROOT.parent / "shared" / "assets"))
    file = folder / "tokenizers" / "llama2_tokenizer.model"
    if not file.exists():
        print(f"skipped: no {file}; SCALABL_ASSETS names another folder", file=sys.stderr)
        return (TINY / "tokenizer.model").read_bytes()
    return file.read_bytes()


def make_sentencepiece(rng: Random, large: bool, folder: Path) -> bytes:
    beside = folder / "tokenizer_config.json"
    beside.unlink(missing_ok=True)
    if rng.random() < 0.2:
        beside.write_bytes(written(rng, damaged_value(rng, _SETTINGS)))
    whole = large_model() if large else (TINY / "tokenizer.model").read_bytes()
    if rng.random() < 0.5:
        return damaged_bytes(rng, whole)
    out = bytearray(whole)  # other pieces or scores in a message whose lengths are right
    for at in rng.sample(range(len(out)), rng.randint(1, 3)):
        out[at] ^= rng.choice((1, 2, 4)) * (chr(out[at]).isalpha() or rng.random() < 0.2)
    return bytes(out)


# --- PEFT's folders -------------------------------------------------------------------------------

_PEFT = {  # as PEFT 0.21 writes it
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": "base", "bias": "none",
    "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 5,
    "lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 3,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip
_PATTERNS = (
    ".*", r".*\.(q|v)_proj", "(a", "[", "a{99999999999}", "(" * 5000 + ")" * 5000, r"(.)\1{3}",
    "(?i)Q_PROJ", "(?i)Q_PROJ$", "\ud800", "", "all-linear", "q_proj", "(.+)", "(a)?", "\n",
)  # fmt: skip
_SLOW = ("(.+)+!", "(.*)*!", "(.|..)+!", ".*" * 30 + "!", ".?" * 60 + "!", "(.?){50}!")
_CHOOSING = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern",
             "alpha_pattern", "layers_to_transform", "r", "lora_alpha")  # fmt: skip


@lru_cache(maxsize=1)
def base() -> Llama:
    return Llama.from_pretrained(TINY)


@lru_cache(maxsize=2)
def _lora(large: bool) -> bytes:
    """A file of weights, of rank 3."""
    rank, g = 3, torch.Generator().manual_seed(0)
    found = {}
    for name, module in base().named_modules():
        if name.endswith(("q_proj", "v_proj")):
            theirs = f"base_model.model.model.{name.replace('attn', 'self_attn')}"
            d_out, d_in = module.weight.shape
            found[f"{theirs}.lora_A.weight"] = torch.randn(rank, d_in, generator=g)
            found[f"{theirs}.lora_B.weight"] = torch.randn(d_out, rank, generator=g)
    if large:
        found["base_model.model.more"] = torch.zeros(1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "x", found.items())
        return (Path(folder) / "x").read_bytes()


def _chosen_badly(rng: Random, values: dict[str, Any]) -> dict[str, Any]:
    """The settings with layers, ranks or scalings chosen in another way."""
    key = rng.choice(_CHOOSING)
    pattern = rng.choice(_SLOW if rng.random() < 0.02 else _PATTERNS)
    new: Any = rng.choice((pattern, [pattern], [pattern, 3], [0, 1], 3, -1, None, 1e300, True))
    if key in ("rank_pattern", "alpha_pattern"):
        new = {pattern: rng.choice((3, 0, -1, 4.5, "3", None, 10**30, 2**31))}
    if key == "layers_pattern":
        values = {**values, "layers_to_transform": [0, 1, 2, 3]}
    return {**values, key: new}


def make_peft(rng: Random, large: bool, folder: Path) -> bytes:
    weights = folder / PEFT_WEIGHTS[0]
    whole = _lora(large)
    weights.write_bytes(whole)
    kind = rng.random()
    if kind < 0.4:
        return written(rng, _chosen_badly(rng, _PEFT))
    if kind < 0.6:
        return written(rng, damaged_value(rng, _PEFT))
    if kind < 0.7:
        return damaged_bytes(rng, written(rng, _PEFT))
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    damaged = written(rng, damaged_value(rng, header))
    if kind < 0.9:
        whole = struct.pack("<Q", len(damaged)) + damaged + whole[8 + length :]
    else:
        whole = damaged_bytes(rng, whole)
    weights.write_bytes(whole)
    return json.dumps(_PEFT).encode()


def read_peft_folder(path: Path) -> None:
    """By the reader alone, and one of 256 as `scalabl import` reads it."""
    limited.MATCHING = 0.02
    if sum(path.read_bytes()) % 256 == 0:
        import_adapter("peft", path.parent, TINY, path.parent / "out", {}, {"model": "tiny"})
    else:
        read_peft(path.parent, base())


# --- chat templates -------------------------------------------------------------------------------

_TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{{ bos_token }}{% set ns = namespace(x=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.x = ns.x + 1 %}{% else %}[Q] {{ m.content }} [/Q]"
    "{% endif %}{% endfor %}{{ ns.x }}{{ raise_exception('no') if ns.x > 1 }}",
    "{% macro say(m) %}{{ m.role }}: {{ m | tojson }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{{ strftime_now('%d %b %Y') }}{% generation %}x{% endgeneration %}",
)
_TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ 7 * 7 }} é"}]
_ATOMS = (
    "messages", "messages[0].content", "bos_token", "'ab'", "7", "-1", "1.5", "none", "true", "[]",
    "{}", "(1, 2)", "range(9)", "dict(a=1)", "namespace(x=1)", "cycler(1, 2)", "joiner('x')",
    "lipsum", "self", "loop", "caller", "varargs", "nothing", "raise_exception", "strftime_now",
    "'%s%d'", "'{0.__class__}'", "'{0[__class__].__mro__}'",
)  # fmt: skip
_AFTER = (
    ".__class__", ".__init__.__globals__", "['__class__']", "|attr('__class__')", ".mro()",
    ".__subclasses__()", "|map(attribute='__class__')|list", ".format(messages, self)",
    ".format_map(messages)", ".gi_frame.f_back", ".__func__", "|map('attr', '__globals__')|list",
    "|format(1)", "()", "(1)", "[0]", "[1:]", "[::-1]", "|list", "|join", "|string", "|int",
    "|tojson", "|pprint", "|sort", "|unique|list", "|length", "|first", "|upper", "|items|list",
    "|replace('', 'ab')", "|wordwrap(1)", "|urlize", "|xmlattr", "|batch(2)|list", "|sum",
    "|groupby('role')|list", "|filesizeformat", "|escape", "|random", ".split('')", ".items()",
    ".append(1)", ".encode('idna')", ".encode('utf-16')", ".zfill(9)", "|selectattr('role')|list",
    "|map('upper')|join", "|indent(9)", "|truncate(3)", "|round(2)", "|dictsort", "|striptags",
)  # fmt: skip
_BETWEEN = ("+", "-", "*", "~", "%", "//", "/", "**", "in", "and", "or", "==", "<", "is", "not in")
_COSTLY = (
    "'a' * 10**9", "[[]] * 10**9", "(10 ** 99999) ** 99999", "'%999999999d' % 1", "1e308 * 10",
    "'{:999999999}'.format(1)", "'a'|center(10**9)", "lipsum(n=10**8)", "'a\n'|indent(10**9)",
    "messages|tojson(indent=10**9)", "strftime_now('%999999999d')", "'a'.zfill(10**9)",
    "('ab' * 99999)|replace('', 'x' * 9999)", "range(99999)|batch(1)|list * 999", "7 ** 10**7",
    "range(10**9)", "('a ' * 10**6)|wordwrap(1)", "'x'.join(range(99999)|map('string')) * 9999",
)  # fmt: skip
_STATEMENTS = (
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% block b %}{{ self.b() }}{% endblock %}", "{% include 'input' %}", "{% import 'os' as os %}",
    "{% extends messages %}", "{% filter upper %}{{ E }}{% endfilter %}", "{% set x = E %}{{ x }}",
    "{% if E %}{{ E }}{% endif %}", "{% for a in E %}{{ a }}{% else %}{{ E }}{% endfor %}",
    "{% set x, y = E %}", "{% call(x) raise_exception(1) %}{{ E }}{% endcall %}",
    "{% set n = namespace(x=E) %}{% set n.x = n.x + n.x %}{{ n.x }}",
    "{% with x = E %}{{ x }}{% endwith %}",
    "{% macro f(x=E) %}{{ caller() }}{% endmacro %}{% call f() %}{{ E }}{% endcall %}",
    "{% raw %}", "{#", "{% continue %}", "{% set messages = E %}", "{{ E if E else E }}", "{{ E }}",
)  # fmt: skip
_LONG = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 50 + "{{ x }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "not " * 50_000 + "1 }}",
    "{{ " + "1 + " * 20_000 + "1 }}", "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "{% for i in messages %}" * 30 + "{% endfor %}" * 30, "{{ x" + ".x" * 20_000 + " }}",
)  # fmt: skip


def _expression(rng: Random, deep: int = 3) -> str:
    kind = rng.random()
    if deep == 0 or kind < 0.3:
        return rng.choice(_ATOMS)
    if kind < 0.7:
        return f"{_expression(rng, deep - 1)}{rng.choice(_AFTER)}"
    if kind < 0.95:
        one, other = _expression(rng, deep - 1), _expression(rng, deep - 1)
        return f"({one}) {rng.choice(_BETWEEN)} ({other})"
    return f"[{_expression(rng, deep - 1)}, {_expression(rng, deep - 1)}]"


def make_chat(rng: Random, large: bool, folder: Path) -> bytes:
    """A chat_template.jinja, or a tokenizer_config.json with it. Every 200th costs much."""
    source = rng.choice(_TEMPLATES)
    if large and rng.random() < 0.5:
        source = rng.choice((*_LONG, *(f"{{{{ {costly} }}}}" for costly in _COSTLY)))
    elif rng.random() < 0.6:
        at = rng.choice([i for i, c in enumerate(source) if source[i : i + 2] in ("{{", "{%")])
        new = rng.choice(_STATEMENTS)
        while "E" in new:
            new = new.replace("E", _expression(rng), 1)
        source = source[:at] + new + source[at:]
    elif rng.random() < 0.6:
        source = damaged_bytes(rng, source.encode()).decode("utf-8", "replace")
    if rng.random() < 0.3:
        listed = [{"name": "default", "template": source}]
        config = {"chat_template": rng.choice((source, listed)), "eos_token": "</s>"}
        return written(rng, damaged_value(rng, config) if rng.random() < 0.5 else config)
    data = source.encode("utf-8", "surrogatepass")
    return damaged_bytes(rng, data) if rng.random() < 0.1 else data


def read_chat(path: Path) -> None:
    """Fails, too, if the text shows that the template reached a part of Python's."""
    limited.SECONDS, limited.MEMORY = 0.1, 64 << 20
    is_json = path.read_bytes()[:2] in (b'{"', b"[[")
    name = "tokenizer_config.json" if is_json else "chat_template.jinja"
    template = ChatTemplate.load({name: path}, {"bos_token": "<s>", "eos_token": "</s>"})
    if template:
        text = template.render(_TALK, **FIXED)
        reached = [word for word in ("<module '", "<frame at", "<code object") if word in text]
        assert not reached, f"the template reached {reached}"
        assert len(text) <= limited.LONGEST
