"""Token ids against transformers, on a thousand strings of every kind of trouble."""

from __future__ import annotations

import random

import pytest

from scalabl_ref.tokenizer import load_tokenizer

from ..test_tokenizer import (
    as_tokenizer_json,
    byte_level,
    folder,
    model_file,  # noqa: F401  a fixture
)

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")

CONTROL = ("<s>", "</s>", "<unk>")
WORDS = (
    *(
        "Once upon a time",
        " there",
        "Answer:",
        " A",
        "\nB.",
        "1234.5",
        "def f(x):",
        "don't",
        "[INST]",
    ),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\u2028"),  # whitespace
    *("é", "e\u0301", "ß", "漢字", "日本", "العربية", "🙂", "👩\u200d🚀", "ﬁ", "Ａ"),  # unicode
    *("<0x41>", "<0x0A>", "<", "|", "<|x|>", "▁", "\U00012000", "\ue000"),  # like bytes; rare
)


def strings(control: tuple[str, ...], count: int = 1000) -> list[str]:
    """Random strings, always the same: of WORDS and `control`, and every third of any characters.

    U+0000 is left out: a sentencepiece model's text ends there.
    """
    draw = random.Random(0)
    pool = [*WORDS, *control * 4]
    made = [""]
    while len(made) < count:
        if len(made) % 3:
            made.append("".join(draw.choices(pool, k=draw.randint(1, 12))))
        else:
            blocks = ((1, 0x7F), (0x80, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0x1FFFF))
            ranges = draw.choices(blocks, k=draw.randint(1, 12))
            made.append("".join(chr(draw.randint(*block)) for block in ranges))
    return made


def assert_same(ours, theirs, texts) -> None:
    """`ours` and `theirs` are functions from a text to ids."""
    different = [(text, ours(text), theirs(text)) for text in texts if ours(text) != theirs(text)]
    assert different == [], (len(different), min(different, key=lambda case: len(case[0])))


SENTENCEPIECE = ("tokenizers/llama2_tokenizer.model", "stories260K/tok512.model", "built")


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_models(request, model_file, name):  # noqa: F811
    """transformers' class that runs sentencepiece itself; it leaves BOS to others."""
    path = model_file if name == "built" else request.getfixturevalue("assets") / name
    backend = pytest.importorskip("transformers.tokenization_utils_sentencepiece")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = backend.SentencePieceBackend(vocab_file=str(path), legacy=True, **special)
    ours = load_tokenizer(path)

    def without_bos(text):
        return ours.encode(text, bos=False)

    def of_backend(text):
        return theirs.encode(text, add_special_tokens=False)

    assert_same(without_bos, of_backend, strings(CONTROL))


@pytest.mark.parametrize("name", ["tokenizers/llama2_tokenizer.model", "built"])
def test_sentencepiece_models_as_published_in_a_tokenizer_json(
    request,
    tmp_path,
    model_file,  # noqa: F811
    name,
):
    """The same model in the layout of Meta's own tokenizer.json, BOS and all, by `tokenizers`.

    (tok512 normalises its text, which that layout has no room for.)
    """
    path = model_file if name == "built" else request.getfixturevalue("assets") / name
    folder(tmp_path, as_tokenizer_json(path), tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(load_tokenizer(path).encode, theirs.encode, strings(CONTROL))
    assert_same(load_tokenizer(tmp_path).encode, theirs.encode, strings(CONTROL))


def test_llama_2_by_its_class(assets, tmp_path):
    """LlamaTokenizer, made from tokenizer.model, on a thousand strings that it reads as its model.

    It puts no "\u2581" before a text that begins with a space, where sentencepiece and Meta's
    tokenizer.json do, and takes two spaces together before a letter, where these leave the second
    to the letter; and so do we.
    """
    path = assets / "tokenizers" / "llama2_tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'
    )
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [text.replace("\u2581", "_") for text in strings((), 2000)]
    texts = [text for text in texts if not text.startswith(" ") and "  " not in text]
    assert len(texts) >= 1000
    assert_same(ours.encode, theirs.encode, texts)
    assert theirs.encode(" a") == [1, 263] and ours.encode(" a") == [1, 29871, 263]
    assert theirs.encode("é  |")[-2:] == [259, 29989] and ours.encode("é  |")[-2:] == [29871, 891]


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_byte_level_models(tmp_path, bos):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    ours = load_tokenizer(folder(tmp_path, byte_level(bos), **config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(ours.encode, theirs.encode, strings(CONTROL))
