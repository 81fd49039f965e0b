"""tools/convert_gguf.py, on files that the gguf package itself writes."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.llama import RopeConfig
from scalabl_ref.tokenizer import import_sentencepiece, load_tokenizer

from ..models import TINY
from ..test_convert import interleave
from ..test_fuzz import check, outcome

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
gguf = pytest.importorskip("gguf")
numpy = pytest.importorskip("numpy")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import convert_gguf  # noqa: E402

# Quantised blocks hold 32 numbers: every matrix needs rows of that length.
SHAPE = dataclasses.replace(
    TINY, hidden_size=32, intermediate_size=64, head_dim=8, rms_norm_eps=1e-5, vocab_size=300
)
THEIRS = {ours: theirs for theirs, ours in convert_gguf.NAMES.items()}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{THEIRS['.'.join(parts[2:])]}.{kind}"
    return f"{THEIRS[stem]}.{kind}"


def write(path, model: Llama, kind=None, vocabulary=None, factors=None, **change) -> Path:
    """A llama GGUF with these weights, matrices quantised to `kind`, q and k rows interleaved."""
    c = model.config
    writer = gguf.GGUFWriter(str(path), change.pop("architecture", "llama"))
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_rope_dimension_count(c.head_dim)
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        writer.add_key_length(c.head_dim)
    if c.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope.factor)
    (vocabulary or sentencepiece_vocabulary)(writer, c.vocab_size)
    for key, value in change.items():
        edit(writer, key.replace("__", "."), value)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if c.tie_word_embeddings and name == "lm_head.weight":
            continue
        rotated = heads.get(name.split(".")[-2])
        array = (interleave(tensor, rotated) if rotated else tensor).numpy()
        if kind is None or array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def edit(writer, key: str, value) -> None:
    """Put `value` under `key` whatever was there; None takes the key away."""
    writer.kv_data[0].pop(key, None)
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_array(key, value)


def sentencepiece_vocabulary(writer, size: int) -> None:
    """<unk> <s> </s>, the 256 bytes, and pieces of "hello" and "world", all as llama has them."""
    words = ["\u2581", *"helowrd", "he", "ll", "llo", "hello", "\u2581hello", "wor", "ld", "world"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    tokens += [f"filler{i}" for i in range(size - len(tokens))]
    kinds += [1] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def byte_level_vocabulary(pre: str):
    def write_vocabulary(writer, size: int) -> None:
        from tokenizers import pre_tokenizers

        tokens = [
            "<end>",
            *sorted(pre_tokenizers.ByteLevel.alphabet()),
            "he",
            "ll",
            "hell",
            "hello",
        ]
        tokens += [f"filler{i}" for i in range(size - len(tokens))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
        writer.add_token_types([3] + [1] * (size - 1))
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)

    return write_vocabulary


def random_model(**change) -> Llama:
    return Llama(dataclasses.replace(SHAPE, **change)).init_random_(0, std=0.3)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope": RopeConfig("linear", 500.0, 4.0)},
        {"head_dim": 4},
    ],
)
def test_float32_files_give_the_same_model(tmp_path, change):
    model = random_model(**change)
    convert_gguf.convert(write(tmp_path / "m.gguf", model), tmp_path / "out")
    loaded = Llama.from_pretrained(tmp_path / "out")
    expected = dataclasses.replace(model.config, bos_token_id=1, eos_token_id=2)
    assert loaded.config == expected
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())


def test_a_file_can_become_codes(tmp_path):
    """Those of the weights that it becomes without."""
    source = write(tmp_path / "m.gguf", random_model())
    options = ["--dtype", "bfloat16"]
    assert convert_gguf.main([str(source), str(tmp_path / "wide"), *options]) == 0
    options += ["--quantize", "nf4"]
    assert convert_gguf.main([str(source), str(tmp_path / "codes"), *options]) == 0
    ours = Llama.from_pretrained(tmp_path / "codes")
    expected = Llama.from_pretrained(tmp_path / "wide", quantize="nf4")
    assert ours.quantized == "nf4" and ours.config == expected.config
    theirs = expected.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_give_the_expanded_numbers(tmp_path, kind):
    """Each number to the step of its block's format."""
    kind = getattr(gguf.GGMLQuantizationType, kind)
    model = random_model()
    convert_gguf.convert(write(tmp_path / "m.gguf", model, kind), tmp_path / "out")
    loaded = Llama.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            assert torch.equal(loaded[name], tensor)
            continue
        blocks = tensor.view(-1, 32)
        span = blocks.max(1).values - blocks.min(1).values
        largest = blocks.abs().max(1).values
        bits = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5}.get(kind.name)
        if bits is None:
            step = largest * (2**-10 if kind.name == "F16" else 2**-7)
        elif kind.name.endswith("_1"):
            step = span / (2**bits - 1)
        else:
            step = largest / (2 ** (bits - 1) - (1 if bits == 8 else 0))
        # Symmetric formats cut off at one end: there the error is up to a whole step.
        error = (loaded[name].view(-1, 32) - blocks).abs().max(1).values
        assert (error <= 1.02 * step + largest * 2**-10).all(), name
        assert not torch.equal(loaded[name], tensor)


def test_llama3_rope_is_found_again(tmp_path):
    rope = RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192)
    plain = RopeConfig(theta=rope.theta)
    model = random_model(rope=rope, head_dim=8)
    divisors = plain.inverse_frequencies(8) / rope.inverse_frequencies(8)
    convert_gguf.convert(write(tmp_path / "m.gguf", model, factors=divisors), tmp_path / "out")
    assert Llama.from_pretrained(tmp_path / "out").config.rope == rope
    path = write(tmp_path / "odd.gguf", model, factors=divisors * torch.tensor([1, 2, 1, 1]))
    with pytest.raises(InputError, match="is not the scaling of Llama 3.1"):
        convert_gguf.convert(path, tmp_path / "odd")


def test_sentencepiece_vocabularies_are_read_back(tmp_path):
    convert_gguf.convert(write(tmp_path / "m.gguf", random_model()), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 1, 2)
    ids = tokenizer.encode("hello world\u00e9")
    assert ids[0] == 1 and tokenizer.decode(ids) == "hello world\u00e9"
    pieces = import_sentencepiece().SentencePieceProcessor(
        model_file=str(tmp_path / "out" / "tokenizer.model")
    )
    assert pieces.id_to_piece(ids[1]) == "\u2581hello" and pieces.is_byte(3)


@pytest.mark.parametrize("pre", list(convert_gguf.PRE_TOKENIZERS))
def test_byte_level_vocabularies_are_read_back(tmp_path, pre):
    vocabulary = byte_level_vocabulary(pre)
    path = write(tmp_path / "m.gguf", random_model(), vocabulary=vocabulary)
    convert_gguf.convert(path, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    text = "hello 2024 w\u00f6rld's\n\n end"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("hello", bos=False)) == 1
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<end>"
    assert tokenizer.bos_id == tokenizer.eos_id == 0


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_texts_begin_with_bos_where_llama_cpp_has_it(tmp_path, pre, stated):
    """The file's word, else llama.cpp's default; Llama 3's files seldom say that theirs do."""
    change = {} if stated is None else {"tokenizer__ggml__add_bos_token": stated}
    path = write(
        tmp_path / "m.gguf", random_model(), vocabulary=byte_level_vocabulary(pre), **change
    )
    convert_gguf.convert(path, tmp_path / "out")
    expected = pre == "llama-bpe" if stated is None else stated
    ids = load_tokenizer(tmp_path / "out").encode("hello")
    assert (ids[0] == 0) == expected and len(ids) == 1 + expected
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is expected


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["I", "'ll", " DON", "'", "T", " x", "1", "2", "3", "4", "!", "\n\n", " end"]),
        ("llama-bpe", ["I", "'ll", " DON", "'T", " x", "123", "4", "!\n\n", " end"]),
        ("qwen2", ["I", "'ll", " DON", "'T", " x", "1", "2", "3", "4", "!\n\n", " end"]),
        ("gpt-2", ["I", "'ll", " DON", "'", "T", " x", "1234", "!", "\n\n", " end"]),
    ],
)
def test_text_is_split_as_the_vocabulary_was_made(tmp_path, pre, pieces):
    """By hand from the patterns that each model's own tokenizer.json has."""
    from tokenizers import Tokenizer

    path = write(tmp_path / "m.gguf", random_model(), vocabulary=byte_level_vocabulary(pre))
    convert_gguf.convert(path, tmp_path / "out")
    splitter = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).pre_tokenizer
    got = splitter.pre_tokenize_str("I'll DON'T x1234!\n\n end")
    assert [piece.replace("\u0120", " ").replace("\u010a", "\n") for piece, _ in got] == pieces


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"llama__rope__scaling__factor": 4.0}, RopeConfig("linear", factor=4.0)),
        ({"llama__rope__scale_linear": 2.0}, RopeConfig("linear", factor=2.0)),
        ({"llama__rope__scaling__factor": 0.0}, RopeConfig()),
        (
            {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0},
            RopeConfig(),
        ),
    ],
)
def test_a_factor_without_a_type_scales_linearly(tmp_path, change, expected):
    convert_gguf.convert(write(tmp_path / "m.gguf", random_model(), **change), tmp_path / "out")
    assert Llama.from_pretrained(tmp_path / "out").config.rope == expected


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")]
)
def test_the_dtype_can_be_kept(tmp_path, kind, dtype):
    path = write(tmp_path / "m.gguf", random_model(), getattr(gguf.GGMLQuantizationType, kind))
    assert convert_gguf.main([str(path), str(tmp_path / "out"), "--dtype", "keep"]) == 0
    kept = Llama.from_pretrained(tmp_path / "out").state_dict()
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in kept.values())
    convert_gguf.convert(path, tmp_path / "wide")
    wide = Llama.from_pretrained(tmp_path / "wide").state_dict()
    assert all(torch.equal(kept[name].float(), wide[name]) for name in kept if "norm" not in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2' is not known"),
        ({"vocabulary": byte_level_vocabulary("odd")}, "pre-tokenizer 'odd' is not known"),
        ({"llama__rope__scaling__type": "yarn"}, "RoPE scaling 'yarn' is not known"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, message):
    path = write(tmp_path / "m.gguf", random_model(), **change)
    with pytest.raises(InputError, match=message):
        convert_gguf.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.head_count", None, "is missing"),
        ("llama.attention.head_count", [4, 4], "must be a whole number"),
        ("llama.attention.head_count", 0, "must be above 0"),
        ("llama.attention.head_count", 3, "tensor blk.0.attn_q.weight: 32 rows for 3 heads"),
        ("llama.attention.head_count_kv", "2", "must be a whole number"),
        ("llama.block_count", 1_000_000, "is 1000000, tensors say 2"),
        ("llama.embedding_length", "x", "must be a whole number"),
        ("llama.attention.layer_norm_rms_epsilon", "x", "must be a number"),
        ("llama.rope.freq_base", [1.0], "must be a number"),
        ("llama.rope.dimension_count", 4, "part of each head"),
        ("tokenizer.ggml.tokens", 3, "must be a list"),
        ("tokenizer.ggml.tokens", [1, 2], "must be a text"),
        ("tokenizer.ggml.token_type", [1, 2], "has 2 entries, and there are 300 tokens"),
        ("tokenizer.ggml.bos_token_id", 300, "is 300, and there are 300 tokens"),
        ("tokenizer.ggml.eos_token_id", "x", "must be a whole number"),
        ("tokenizer.ggml.add_bos_token", 3, "must be a bool"),
        ("tokenizer.ggml.pre", None, "is missing"),
        ("tokenizer.ggml.merges", ["he"], "is not two parts"),
        ("tokenizer.ggml.merges", ["h Z9"], "merges: "),
    ],
)
def test_fields_that_cannot_be_are_named(tmp_path, capsys, key, value, message):
    """In a file that is whole otherwise: one line, exit code 2, and nothing written."""
    vocabulary = byte_level_vocabulary("llama-bpe")
    change = {key.replace(".", "__"): value}
    path = write(tmp_path / "m.gguf", random_model(), vocabulary=vocabulary, **change)
    assert convert_gguf.main([str(path), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert (key in err or "tensor" in err or "RoPE" in err) and message in err
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("scores", [None, "x", [1.0]])
def test_scores_that_cannot_be_are_named(tmp_path, scores):
    path = write(tmp_path / "m.gguf", random_model(), tokenizer__ggml__scores=scores)
    with pytest.raises(InputError, match=r"key tokenizer\.ggml\.scores "):
        convert_gguf.convert(path, tmp_path / "out")


def test_damaged_files_are_named(tmp_path, capsys):
    path = write(tmp_path / "m.gguf", random_model())
    data = path.read_bytes()
    for broken in (b"", data[:3], data[:50], data[:3000], data[:-100], b"GGUF" + b"\xff" * 100):
        path.write_bytes(broken)
        assert convert_gguf.main([str(path), str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert "m.gguf: not a valid GGUF file" in err and "Traceback" not in err
    assert convert_gguf.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_damaged_files_by_the_thousand(tmp_path):
    write(tmp_path / "base.gguf", random_model())
    check(outcome("gguf", 1000, 2, tmp_path), 1000)


@pytest.mark.parametrize("count", [2**63, 2**32, 20_000])
def test_lists_longer_than_the_file_are_refused(tmp_path, count):
    """The package alone would read a long way past the end, for minutes and in gigabytes."""
    path = write(tmp_path / "m.gguf", random_model(), odd=["a"])
    data, start = path.read_bytes(), len("odd") + struct.calcsize("<II")
    at = data.index(b"odd") + start
    assert data[at - 4 : at + 8] == struct.pack("<IQ", 8, 1)  # texts, one
    path.write_bytes(data[:at] + struct.pack("<Q", count) + data[at + 8 :])
    with pytest.raises(InputError, match=f"not a valid GGUF file: a list of {count} entries"):
        convert_gguf.convert(path, tmp_path / "out")


def test_text_that_is_not_utf_8_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", random_model())
    path.write_bytes(path.read_bytes().replace(b"hello", b"\xffello", 1))
    with pytest.raises(InputError, match=r"key tokenizer\.ggml\.tokens is not text in UTF-8"):
        convert_gguf.convert(path, tmp_path / "out")


def test_norm_eps_is_the_decimal_that_was_meant(tmp_path):
    for eps in (1e-5, 1e-6):
        convert_gguf.convert(
            write(tmp_path / f"{eps}.gguf", random_model(rms_norm_eps=eps)), tmp_path / f"{eps}"
        )
        assert Llama.from_pretrained(tmp_path / f"{eps}").config.rms_norm_eps == eps
