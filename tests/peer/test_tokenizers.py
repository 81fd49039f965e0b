"""Token ids against transformers, on a thousand strings of every kind of trouble."""

from __future__ import annotations

import random

import pytest
import tokenizers

from scalabl_ref.data.tokenizer import import_sentencepiece, load_tokenizer

from ..data.test_tokenizer import (
    added,
    added_folder,
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

    Whatever "legacy" is, it puts no "\u2581" before a text that begins with a space, where
    sentencepiece and Meta's tokenizer.json do, and takes two spaces together before a letter, where
    these leave the second to the letter; and so do we.
    """
    path = assets / "tokenizers" / "llama2_tokenizer.model"
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    added_folder(tmp_path, path, {"tokenizer_config": config})
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [text.replace("\u2581", "_") for text in strings((), 2000)]
    texts = [text for text in texts if not text.startswith(" ") and "  " not in text]
    assert len(texts) >= 1000
    assert_same(ours.encode, theirs.encode, texts)
    assert theirs.encode(" a") == [1, 263] and ours.encode(" a") == [1, 29871, 263]
    assert theirs.encode("é  |")[-2:] == [259, 29989] and ours.encode("é  |")[-2:] == [29871, 891]


# Tokens that a fine-tuning added: special or plain, and every flag.
ADDED = [
    added("<|im_end|>", special=True),
    added("<|im_start|>", special=True),
    added("<|left|>", lstrip=True),
    added("<|right|>", rstrip=True, special=True),
    added("qxz", single_word=True),
    added("<note>"),
]
NAMES = (*CONTROL, *(token["content"] for token in ADDED), " <|left|>", "<|right|> ", "qxzs")


def saved_by_4(path, model, legacy, layout="complete"):
    """A sentencepiece model with ADDED, in the files that transformers 4 writes.

    layout: "complete", "older" (before 4.34: without the list in tokenizer_config.json), or either
    with a tokenizer.json, "json" and "older json".
    """
    first = import_sentencepiece().SentencePieceProcessor(model_file=str(model)).vocab_size()
    control = [added(name, special=True) for name in ("<unk>", "<s>", "</s>")]
    ids = dict(enumerate(control)) | dict(enumerate(ADDED, first))
    roles = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    config = {**roles, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy}
    special = [t["content"] for t in ADDED if t["special"]]
    if layout.startswith("older"):
        files = {"tokenizer_config": config}
    else:
        files = {"tokenizer_config": {**config, "added_tokens_decoder": ids}}
    files["special_tokens_map"] = {**roles, "additional_special_tokens": special}
    files["added_tokens"] = {token["content"]: i for i, token in ids.items() if i >= first}
    files["config"] = {"model_type": "llama", "eos_token_id": 2}
    path.mkdir()
    added_folder(path, model, files)
    if layout.endswith("json"):
        twin = tokenizers.Tokenizer.from_str(as_tokenizer_json(model))
        twin.add_tokens([tokenizers.AddedToken(**token) for token in ADDED])
        twin.save(str(path / "tokenizer.json"))
    return path


def assert_same_tokenizer(folder, theirs, texts, decoded=True) -> None:
    """Ids and texts of `texts` and of every special and added token; what ends a text."""
    ours = load_tokenizer(folder)
    names = dict.fromkeys([*theirs.all_special_tokens, *theirs.get_added_vocab()])
    texts = [*texts, *names]
    assert_same(ours.encode, theirs.encode, texts)
    assert {name: ours.token_id(name) for name in names} == {
        name: theirs.convert_tokens_to_ids(name) for name in names
    }
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special == theirs.special_tokens_map
    if decoded:
        ids = [ours.encode(text) for text in texts]
        assert [ours.decode(i) for i in ids] == theirs.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["tokenizers/llama2_tokenizer.model", "built"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("layout", ["complete", "older", "json", "older json"])
def test_folders_that_transformers_4_saved(request, tmp_path, model_file, name, legacy, layout):  # noqa: F811
    """As transformers' class for any tokenizer reads them, which follows the files; see above.

    (In "older" files it misses that <|right|> and <|im_start|> are special, which tells in decoding
    alone; transformers 4 did not.)
    """
    path = model_file if name == "built" else request.getfixturevalue("assets") / name
    folder = saved_by_4(tmp_path / "saved", path, legacy, layout)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert_same_tokenizer(folder, theirs, strings(NAMES), decoded=layout != "older")


@pytest.mark.parametrize("name", ["tokenizers/llama2_tokenizer.model", "built"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("beside", [False, True])
def test_folders_that_transformers_5_saves(request, tmp_path, model_file, name, legacy, beside):  # noqa: F811
    """By LlamaTokenizer: its own tokenizer.json has its ids; tokenizer.model beside it or not."""
    path = model_file if name == "built" else request.getfixturevalue("assets") / name
    source = saved_by_4(tmp_path / "source", path, legacy)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    assert type(theirs).__name__ == "LlamaTokenizer"
    theirs.save_pretrained(tmp_path / "saved")
    if beside:
        (tmp_path / "saved" / "tokenizer.model").write_bytes(path.read_bytes())
    assert_same_tokenizer(tmp_path / "saved", theirs, strings(NAMES))


def test_a_sentencepiece_fine_tune_by_its_class(model_file, tmp_path):  # noqa: F811
    """LlamaTokenizer on a folder that does not say "legacy", where the two do not depart."""
    folder = saved_by_4(tmp_path / "saved", model_file, None)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == "LlamaTokenizer"
    texts = [text.replace("\u2581", "_") for text in strings(NAMES, 2000)]
    texts = [text for text in texts if "  " not in text]
    assert len(texts) >= 1000
    assert_same_tokenizer(folder, theirs, texts)


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_byte_level_models(tmp_path, bos):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    ours = load_tokenizer(folder(tmp_path, byte_level(bos), **config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(ours.encode, theirs.encode, strings(CONTROL))
