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
from scalabl_ref.data.tokenizer import import_sentencepiece, load_tokenizer
from scalabl_ref.model.config import RopeConfig

from ..models import TINY
from ..test_fuzz import check, outcome
from ..tools.test_convert import interleave

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
    """A GGUF with these weights, matrices quantised to `kind`, q and k of llama interleaved."""
    c, embedding = model.config, change.pop("embedding", None)
    architecture = change.pop("architecture", "llama")
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=change.pop("parts_of", 0))
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
    heads = heads if architecture in ("llama", "mistral") else {}
    for name, tensor in model.state_dict().items():
        if c.tie_word_embeddings and name == "lm_head.weight":
            continue
        rotated = heads.get(name.split(".")[-2])
        if rotated:
            tensor = interleave(tensor.view(len(tensor), -1), rotated).view_as(tensor)
        array = tensor.numpy()
        if embedding is not None and name == "embed_tokens.weight":
            embedding(writer, gguf_name(name))
        elif kind is None or array.ndim == 1:
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
        {"architecture": "mistral"},
        {"qkv_bias": True},
        {"qkv_bias": True, "architecture": "qwen2"},
        {"qk_norm": True, "head_dim": 16, "architecture": "qwen3"},
    ],
)
def test_float32_files_give_the_same_model(tmp_path, change):
    """Of every architecture, biases and norms with values of their own."""
    change = dict(change)
    architecture = change.pop("architecture", "llama")
    model = random_model(**change)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.arange(len(parameter)) / 8 + len(name))
    path = write(tmp_path / "m.gguf", model, architecture=architecture)
    convert_gguf.convert(path, tmp_path / "out")
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


def dequantize(data, kind):
    """What the package makes of these bytes, None if it cannot expand that type."""
    try:
        with numpy.errstate(all="ignore"):
            return torch.from_numpy(gguf.dequantize(data, kind).astype(numpy.float32))
    except NotImplementedError:
        return None


def random_rows(kind, rows: int, columns: int):
    """Bytes of a matrix of that type, at random, whose numbers are finite and below 1e30."""
    numbers = numpy.random.default_rng(0)
    if kind.name in ("F32", "F16", "BF16"):
        return gguf.quantize(numbers.standard_normal((rows, columns), numpy.float32), kind)
    size = gguf.quants.quant_shape_to_byte_shape((rows, columns), kind)
    data = numbers.integers(0, 256, size, numpy.uint8)
    while (expanded := dequantize(data, kind)) is not None:
        wrong = ~(expanded.abs() < 1e30).all(1).numpy()
        if not wrong.any():
            break
        data[wrong] = numbers.integers(0, 256, (wrong.sum(), size[1]), numpy.uint8)
    return data


PLAIN = {"F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType), ids=lambda kind: kind.name)
def test_every_type_is_expanded_as_the_package_does_or_named(tmp_path, capsys, kind):
    model = random_model(hidden_size=256)
    path, rows = tmp_path / "m.gguf", SHAPE.vocab_size
    if kind.name in PLAIN:
        data = numpy.ones((rows, 256), PLAIN[kind.name])
    else:
        data = random_rows(kind, rows, 256)
    raw = None if kind.name in PLAIN else kind
    write(path, model, embedding=lambda writer, name: writer.add_tensor(name, data, raw_dtype=raw))
    expected = dequantize(data, kind)
    assert convert_gguf.main([str(path), str(tmp_path / "out")]) == (2 if expected is None else 0)
    if expected is None:
        err = capsys.readouterr().err
        assert "tensor token_embd.weight: cannot be expanded: " in err and kind.name in err
        assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    else:
        ours = Llama.from_pretrained(tmp_path / "out").embed_tokens.weight
        assert torch.equal(ours, expected) and len(expected.unique()) > 1


def test_a_type_that_the_package_does_not_know_is_named(tmp_path, capsys):
    path = write(tmp_path / "m.gguf", random_model())
    name = b"blk.0.attn_q.weight" + struct.pack("<IQQ", 2, 32, 32)
    data = path.read_bytes()
    at = data.index(name) + len(name)
    path.write_bytes(data[:at] + struct.pack("<I", 99) + data[at + 4 :])
    assert convert_gguf.main([str(path), str(tmp_path / "out")]) == 2
    assert (
        "the gguf package that is installed knows no tensors of type 99" in capsys.readouterr().err
    )


def split(tmp_path, model) -> list[Path]:
    """A GGUF in several parts; beside them stands whole.gguf."""
    write(tmp_path / "whole.gguf", model)
    write(tmp_path / "m.gguf", model, parts_of=9)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_a_split_file_is_read_by_any_of_its_parts(tmp_path):
    parts = split(tmp_path, random_model())
    assert [p.name for p in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    convert_gguf.convert(tmp_path / "whole.gguf", tmp_path / "whole")
    for part in parts:
        convert_gguf.convert(part, tmp_path / part.stem)
        for name in ("model.safetensors", "config.json", "tokenizer.model"):
            assert (tmp_path / part.stem / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes()


def test_parts_that_are_missing_or_another_are_named(tmp_path, capsys):
    parts = split(tmp_path, random_model())

    def refused(source, message):
        assert convert_gguf.main([str(source), str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
        assert not (tmp_path / "out").exists()

    other = parts[1].rename(tmp_path / "other.gguf")
    refused(parts[0], f"part 2 of 3 is missing: {parts[1].name}")
    refused(parts[2], f"part 2 of 3 is missing: {parts[1].name}")
    refused(other, "is part 2 of 3, and is not named so: expected a name that ends in -00002-of-")
    parts[1].write_bytes(parts[2].read_bytes())
    refused(parts[0], f"{parts[1]}: says that it is another part than its name says")
    parts[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(parts[0], f"{parts[1]}: is a git-lfs pointer: fetch the file itself with git lfs pull")


def test_tensors_that_are_missing_or_misshapen_have_the_files_names(tmp_path):
    model = random_model()
    wide = dataclasses.replace(SHAPE, intermediate_size=96)
    path = write(tmp_path / "m.gguf", Llama(wide).init_random_(0), llama__feed_forward_length=64)
    with pytest.raises(
        InputError, match=r"tensor blk\.0\.ffn_gate\.weight has shape \(96, 32\), ex"
    ):
        convert_gguf.convert(path, tmp_path / "out")
    model.layers[1].attn_norm = torch.nn.Identity()
    with pytest.raises(InputError, match=r"tensor blk\.1\.attn_norm\.weight is missing"):
        convert_gguf.convert(write(tmp_path / "less.gguf", model), tmp_path / "out")


def test_rows_of_the_embedding_beyond_the_tokens_are_kept(tmp_path):
    def fewer(writer, size):
        sentencepiece_vocabulary(writer, size - 4)

    model = random_model()
    convert_gguf.convert(write(tmp_path / "m.gguf", model, vocabulary=fewer), tmp_path / "out")
    assert Llama.from_pretrained(tmp_path / "out").config.vocab_size == 300
    assert load_tokenizer(tmp_path / "out").vocab_size == 296
    small = random_model(vocab_size=290)

    def more(writer, size):
        sentencepiece_vocabulary(writer, 300)

    path = write(tmp_path / "small.gguf", small, vocabulary=more)
    with pytest.raises(InputError, match=r"token_embd\.weight has 290 rows, and there are 300 tok"):
        convert_gguf.convert(path, tmp_path / "small")


def test_template_and_ends_of_a_turn_come_along(tmp_path):
    """The file's eos first, then its eot, then control tokens of a known name, others not."""

    def vocabulary(writer, size):
        byte_level_vocabulary("qwen2")(writer, size)
        tokens, kinds = (
            writer.kv_data[0][f"tokenizer.ggml.{key}"].value for key in ("tokens", "token_type")
        )
        for i, (token, kind) in enumerate([("<|im_end|>", 3), ("<|eot_id|>", 1), ("<tool>", 4)]):
            tokens[size - 1 - i], kinds[size - 1 - i] = token, kind
        writer.add_eot_token_id(270)
        writer.add_chat_template("{{ messages }}\r\né")

    convert_gguf.convert(
        write(tmp_path / "m.gguf", random_model(), vocabulary=vocabulary), tmp_path / "out"
    )
    template = (tmp_path / "out" / "chat_template.jinja").read_bytes()
    assert template.decode() == "{{ messages }}\r\né"
    values = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert values == {"bos_token_id": 0, "eos_token_id": [0, 270, 299]}
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.encode("<tool><|im_end|>") == [297, 299]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # as Qwen's own composes them


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
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "tekken", "qwen2"])
def test_texts_begin_with_bos_where_llama_cpp_has_it(tmp_path, pre, stated):
    """The file's word, else llama.cpp's default; Llama 3's files seldom say that theirs do."""
    change = {} if stated is None else {"tokenizer__ggml__add_bos_token": stated}
    path = write(
        tmp_path / "m.gguf", random_model(), vocabulary=byte_level_vocabulary(pre), **change
    )
    convert_gguf.convert(path, tmp_path / "out")
    expected = pre in ("llama-bpe", "tekken") if stated is None else stated
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
        ("tekken", ["I", "'ll", " DON", "'T", " x", "1", "2", "3", "4", "!\n\n", " end"]),
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
        ({"llama__expert_count": 8}, "a mixture of experts is not implemented"),
        ({"llama__attention__value_length": 4}, "heads whose values have another length"),
        ({"llama__attention__sliding_window": 3}, r"sliding-window attention \(3 tokens\)"),
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
