"""Tokenizers: ids as the packages give them, BOS once, letters that are one token, bad files."""

import io
import json

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from scalabl_ref.data.tokenizer import (
    LETTERS,
    companion_files,
    import_sentencepiece,
    load_tokenizer,
    tokenizer_files,
)
from scalabl_ref.support.errors import InputError

CORPUS = [
    "Once upon a time there was a little girl named Lily, and she had a red ball.",
    "What is it? Answer: A or B or C or D. Which type of question is this?",
    "Type: A Type: B Sentiment: A Sentiment: B\nAnswer: C\nAnswer: D",
] * 5

# Any text but lone surrogates, and but the two characters that sentencepiece gives a meaning of
# their own: U+2581 stands for a space, and U+0000 ends a piece.
texts = st.text(
    st.one_of(
        st.sampled_from("ABCDE abcde.,:?\n\t  éß漢字🙂\u0301"),
        st.characters(blacklist_categories=["Cs"], blacklist_characters="\u2581\0"),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A sentencepiece BPE model with byte fallback, as Llama's: no normalisation, dummy prefix."""
    proto = io.BytesIO()
    import_sentencepiece().SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=proto,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        required_chars=LETTERS,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(proto.getvalue())
    return path


@pytest.fixture(scope="module")
def model(model_file):
    return load_tokenizer(model_file)


def byte_level(bos=None):
    """A byte-level BPE as SmolLM2's or, with BOS from its post-processor, Llama 3's; as JSON."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


def folder(path, tokenizer_json, **config):
    (path / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


# --- sentencepiece -----------------------------------------------------------------------------


@given(text=texts)
@example(text="  two  spaces ")
def test_sentencepiece_text_comes_back(model, text):
    ids = model.encode(text)
    assert ids[0] == model.bos_id and ids[1:] == model.encode(text, bos=False)
    assert all(0 <= i < model.vocab_size for i in ids)
    assert model.decode(ids) == text


def test_sentencepiece_ids(model):
    assert (model.bos_id, model.eos_id) == (1, 2)
    assert model.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert model.encode("") == [1] and model.encode("", bos=False) == []


def as_tokenizer_json(model_file):
    """The same tokenizer in the layout of Meta's published tokenizer.json."""
    model = import_sentencepiece().SentencePieceProcessor(model_file=str(model_file))
    score = {model.id_to_piece(i): model.get_score(i) for i in range(model.vocab_size())}
    vocab = {piece: i for i, piece in enumerate(score)}
    bare = [i for i in vocab.values() if model.is_control(i) or model.is_byte(i)]
    whole = {model.id_to_piece(i) for i in [*bare, model.unk_id()]}  # what no merge makes
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(score, key=lambda piece: -score[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score and piece not in whole
    ]
    bpe = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def twin(model_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("twin")
    return load_tokenizer(folder(path, as_tokenizer_json(model_file), eos_token="</s>"))


@given(text=texts)
@example(text=" a")
@example(text="a  b")
def test_both_kinds_of_file_give_the_same_ids(model, twin, text):
    """Two packages, one tokenizer: ids of a sentencepiece model and of its tokenizer.json."""
    assert twin.encode(text) == model.encode(text)
    assert twin.decode(twin.encode(text)) == text
    assert (twin.bos_id, twin.eos_id, twin.vocab_size) == (1, 2, model.vocab_size)


@given(parts=st.lists(st.one_of(texts, st.sampled_from(["<s>", "</s>", "<unk>", "<0x41>"]))))
def test_names_of_control_tokens_are_these_tokens(model, twin, parts):
    """As where a tokenizer.json is read; byte tokens have no name that text could say."""
    ids = model.encode("".join(parts))
    assert ids == twin.encode("".join(parts))
    names = {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert [i for i in ids[1:] if i < 3] == [names[part] for part in parts if part in names]


def test_llama_2_from_either_kind_of_file(assets, tmp_path):
    path = assets / "tokenizers/llama2_tokenizer.model"
    ours, twin = load_tokenizer(path), load_tokenizer(folder(tmp_path, as_tokenizer_json(path)))
    lines = (assets / "data/trec/TREC.train").read_text("latin-1").splitlines()[:300]
    for text in [*lines, " a", "a  b", "x\n    y", "漢字🙂", "e\u0301\r\n\t."]:
        assert ours.encode(text) == twin.encode(text)


def test_llama_2(assets):
    tokenizer = load_tokenizer(assets / "tokenizers/llama2_tokenizer.model")
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)


# --- tokenizer.json ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory):
    path = tmp_path_factory.mktemp("json")
    return load_tokenizer(folder(path, byte_level(), bos_token="<s>", eos_token="</s>"))


@given(text=texts)
def test_byte_level_text_comes_back(without_bos, text):
    assert without_bos.decode(without_bos.encode(text)) == text


def test_bos_comes_from_the_post_processor_and_once(tmp_path, without_bos):
    plain = without_bos.encode("Answer", bos=False)
    assert without_bos.encode("Answer") == plain
    with_bos = load_tokenizer(folder(tmp_path, byte_level(bos="<s>"), add_bos_token=False))
    assert with_bos.encode("Answer") == [1, *plain]
    assert with_bos.encode("Answer", bos=False) == plain
    assert with_bos.bos_id == without_bos.bos_id == 1


@pytest.mark.parametrize(
    "name, config, eos",
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}, (2,)),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>", "lstrip": False}}, (2,)),
        ("special_tokens_map.json", {"eos_token": {"content": "</s>", "lstrip": False}}, (2,)),
        ("tokenizer_config.json", {"eos_token": None, "eos_token_id": None}, ()),
        ("tokenizer_config.json", {}, ()),
        ("config.json", {"eos_token_id": 7}, (7,)),
        ("config.json", {"eos_token_id": [5, 6, 5]}, (5, 6)),
        ("config.json", {"eos_token_id": 5, "hf_config": {"eos_token_id": [5, 6]}}, (5, 6)),
        ("generation_config.json", {"eos_token_id": [5, 6]}, (5, 6)),
    ],
)
def test_eos(tmp_path, name, config, eos):
    (tmp_path / "tokenizer.json").write_text(byte_level())
    (tmp_path / name).write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == eos and tokenizer.eos_id == next(iter(eos), None)


@pytest.mark.parametrize("name", ["tokenizer_config", "generation_config", "config"])
def test_bos_by_its_id(tmp_path, name):
    """A name counts more than an id. Texts begin with it only if the post-processor says so."""
    (tmp_path / "tokenizer.json").write_text(byte_level())
    (tmp_path / f"{name}.json").write_text('{"bos_token_id": 2}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == 2 and tokenizer.encode("") == []
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    assert load_tokenizer(tmp_path).bos_id == 1


@pytest.mark.parametrize(
    "named, eos", [({"bos_token": "<s>"}, (8, 7)), ({"eos_token": "</s>"}, (2, 8, 7))]
)
@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_eos_from_several_files(tmp_path, model_file, kind, named, eos):
    """A name in the tokenizer's own configuration goes before ids, and any of them ends a text.

    (A sentencepiece model has a name for its own, </s>.)
    """
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 7]}')
    if kind == "tokenizer.json":
        tokenizer = load_tokenizer(folder(tmp_path, byte_level(), **named))
    else:
        tokenizer = load_tokenizer(added_folder(tmp_path, model_file, {"tokenizer_config": named}))
        eos = (2, 8, 7)
    assert tokenizer.eos_ids == eos


def test_truncation_and_padding_stored_in_the_file_are_off(tmp_path, without_bos):
    stored = json.loads(byte_level())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    stored["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    tokenizer = load_tokenizer(folder(tmp_path, json.dumps(stored)))
    assert tokenizer.encode(CORPUS[0]) == without_bos.encode(CORPUS[0])


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_prefers_the_json_and_names_its_files(tmp_path, model_file, without_bos):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    folder(tmp_path, byte_level())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(CORPUS[0]) == without_bos.encode(CORPUS[0])
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
    assert tokenizer.files == {name: tmp_path / name for name in names}


def test_a_folder_whose_model_is_tiktoken_uses_the_json(tmp_path, without_bos):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    folder(tmp_path, byte_level())
    assert load_tokenizer(tmp_path).encode(CORPUS[0]) == without_bos.encode(CORPUS[0])


def test_one_file_is_named_as_in_a_folder(tmp_path, model_file):
    (tmp_path / "any.model").write_bytes(model_file.read_bytes())
    tokenizer = load_tokenizer(tmp_path / "any.model")
    assert tokenizer.files == {"tokenizer.model": tmp_path / "any.model"}
    (tmp_path / "any.json").write_text(byte_level())
    tokenizer = load_tokenizer(tmp_path / "any.json")
    assert tokenizer.files == {"tokenizer.json": tmp_path / "any.json"}


def test_files_that_go_with_a_model(tmp_path):
    names = [
        *["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
        *["added_tokens.json", "chat_template.jinja"],
    ]
    others = ["generation_config.json", "vocab.json", "merges.txt"]
    for name in (*names, *others, "config.json", "model.safetensors", "README.md"):
        (tmp_path / name).touch()
    assert tokenizer_files(tmp_path) == {name: tmp_path / name for name in names}
    assert companion_files(tmp_path) == {name: tmp_path / name for name in (*names, *others)}
    for name in (*names, *others):
        (tmp_path / name).unlink()
    assert tokenizer_files(tmp_path) == companion_files(tmp_path) == {}


def test_add_bos_token_false(tmp_path, model_file):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("x") == load_tokenizer(model_file).encode("x", bos=False)


# --- added tokens ------------------------------------------------------------------------------


def added(content, **flags):
    """An added token as transformers writes it."""
    off = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **off, **flags}


def added_folder(path, model_file, files):
    """A sentencepiece model, and JSON files beside it; those of `files` by name."""
    (path / "tokenizer.model").write_bytes(model_file.read_bytes())
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


# The same two tokens, special <|end|> and plain <note>, as each file says it.
LISTED = {"400": added("<|end|>", special=True), "401": added("<note>")}
BY = {
    "tokenizer_config": {
        "tokenizer_config": {"eos_token": "<|end|>", "legacy": True, "added_tokens_decoder": LISTED}
    },
    "added_tokens": {
        "added_tokens": {"<note>": 401, "<|end|>": 400},
        "special_tokens_map": {"eos_token": added("<|end|>")},
    },
    "special_tokens_map": {  # which gives no ids: they follow the model's
        "special_tokens_map": {"eos_token": "<|end|>", "additional_special_tokens": ["<note>"]}
    },
}


@pytest.mark.parametrize("by", BY)
def test_added_tokens_are_one_id_each(tmp_path, model_file, model, by):
    tokenizer = load_tokenizer(added_folder(tmp_path, model_file, BY[by]))

    def plain(text):
        return model.encode(text, bos=False)

    assert model.vocab_size == 400
    assert tokenizer.encode("A red ball<|end|>Type<note><note> C") == [
        *[1, *plain("A red ball"), 400, *plain("Type"), 401, 401, *plain(" C")]
    ]
    assert tokenizer.vocab_size == 402
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 400, (400,))
    assert tokenizer.special.items() >= {("bos_token", "<s>"), ("eos_token", "<|end|>")}
    ids = tokenizer.encode("A<note>B<|end|>")
    assert tokenizer.decode(ids) == ("A B" if by == "special_tokens_map" else "A<note> B")


def test_added_tokens_of_a_file_that_lists_them_all(tmp_path, model_file):
    """What tokenizer_config.json lists is all: older files beside it do not count."""
    older = {"added_tokens": {"<old>": 450}, "special_tokens_map": {"eos_token": "<old>"}}
    tokenizer = load_tokenizer(added_folder(tmp_path, model_file, BY["tokenizer_config"] | older))
    assert tokenizer.token_id("<old>") is None and tokenizer.eos_id == 400


@pytest.mark.parametrize(
    "flags, text, parts",
    [
        ({}, "a <x> b", ["a ", 400, " b"]),
        ({"lstrip": True}, "a  <x> b", ["a", 400, " b"]),
        ({"rstrip": True}, "a <x>  b", ["a ", 400, "b"]),
        ({"single_word": True}, "a<x>b", ["a<x>b"]),
        ({"single_word": True}, "a <x> b", ["a ", 400, " b"]),
        ({"normalized": True}, "a<x>b", ["a", 400, "b"]),
        ({"__type": "AddedToken", "of a later version": 1}, "a<x>b", ["a", 400, "b"]),
    ],
)
def test_flags_of_added_tokens(tmp_path, model_file, model, capfd, flags, text, parts):
    config = {"added_tokens_decoder": {"400": added("<x>", **flags)}}
    tokenizer = load_tokenizer(added_folder(tmp_path, model_file, {"tokenizer_config": config}))
    expected = [[p] if isinstance(p, int) else model.encode(p, bos=False) for p in parts]
    assert tokenizer.encode(text, bos=False) == sum(expected, [])
    assert capfd.readouterr() == ("", "")  # what --json writes is JSON


@pytest.mark.parametrize(
    "config, model_type, legacy",
    [
        ({}, "llama", True),
        ({"legacy": True, "tokenizer_class": "LlamaTokenizer"}, "llama", True),
        ({"legacy": False}, "llama", False),
        ({"tokenizer_class": "LlamaTokenizer"}, "llama", False),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "llama", False),
        ({"tokenizer_class": "LlamaTokenizer"}, "mistral", True),
    ],
)
def test_the_space_behind_an_added_token(tmp_path, model_file, model, config, model_type, legacy):
    """Sentencepiece puts a space before a text: before every part of it, or before the first."""
    config = {"added_tokens_decoder": LISTED, **config}
    files = {"tokenizer_config": config, "config": {"model_type": model_type}}
    tokenizer = load_tokenizer(added_folder(tmp_path, model_file, files))
    word, bare = model.token_id("▁Type"), model.token_id("Type")
    assert model.encode("Type", bos=False) == [word]
    assert tokenizer.encode("Type<note>", bos=False) == [word, 401]
    behind = tokenizer.encode("<note>Type", bos=False)[1:]
    assert (behind == [word]) is legacy
    assert tokenizer.encode(" Type", bos=False)[-1] == word
    assert (len(tokenizer.encode(" Type", bos=False)) == 1) is not legacy
    if not legacy:
        assert "".join(model._model.id_to_piece(i) for i in behind) == "Type" and bare is None
    for text in ("Type<note> Type", "<note>Type"):
        # Only the space that was put there is taken away again.
        once = tokenizer.decode(tokenizer.encode(text))
        assert once == (text.replace(">", "> ") if legacy else text)


def test_tokens_listed_again_do_not_change_the_vocabulary_size(tmp_path, model_file):
    listed = {"tokenizer_config": {"added_tokens_decoder": {"1": added("<s>", special=True)}}}
    assert load_tokenizer(added_folder(tmp_path, model_file, listed)).vocab_size == 400
    named = {"tokenizer_config": {"additional_special_tokens": ["<note>", "▁Type"]}}
    assert load_tokenizer(added_folder(tmp_path, model_file, named)).vocab_size == 401


def test_the_class_of_a_tokenizer_may_be_in_the_models_configuration(tmp_path, model_file, model):
    files = {
        "tokenizer_config": {"added_tokens_decoder": LISTED},
        "config": {"tokenizer_class": "LlamaTokenizer"},
    }
    tokenizer = load_tokenizer(added_folder(tmp_path, model_file, files))
    assert tokenizer.encode("<note>Type", bos=False)[1:] != [model.token_id("▁Type")]


@pytest.mark.parametrize("normalized", [True, False])
def test_an_added_token_is_looked_for_in_the_text_or_in_the_normalised_one(tmp_path, normalized):
    file = tokenizers.Tokenizer.from_str(byte_level())
    file.normalizer = tokenizers.normalizers.Lowercase()
    i = file.get_vocab_size()
    listed = {str(i): added("<x>", normalized=normalized)}
    tokenizer = load_tokenizer(folder(tmp_path, file.to_str(), added_tokens_decoder=listed))
    assert tokenizer.encode("<x>") == [i] and (tokenizer.encode("<X>") == [i]) is normalized


def test_flags_of_the_models_own_tokens_and_of_ends(tmp_path, model_file, model):
    """The list has flags for control tokens too; what ends a text is special, listed so or not."""
    listed = {"1": added("<s>", rstrip=True, special=True), "400": added("<|end|>")}
    config = {"eos_token": "<|end|>", "added_tokens_decoder": listed}
    tokenizer = load_tokenizer(added_folder(tmp_path, model_file, {"tokenizer_config": config}))
    ids = tokenizer.encode("<s>  Type<|end|>", bos=False)
    assert ids == [1, model.token_id("▁Type"), 400]
    assert tokenizer.decode(ids) == "Type"


def test_tokens_that_a_folder_adds_to_a_tokenizer_json(tmp_path, without_bos):
    """Named roles and the list in tokenizer_config.json count where the file itself lacks them."""
    first = without_bos.vocab_size
    listed = {"1": added("<s>", special=True), str(first): added("<|end|>", special=True)}
    config = {"added_tokens_decoder": listed, "eos_token": "<|end|>", "pad_token": "<pad>"}
    tokenizer = load_tokenizer(folder(tmp_path, byte_level(), **config))
    ids = tokenizer.encode("A<|end|><pad>B")
    assert ids == [*without_bos.encode("A"), first, first + 1, *without_bos.encode("B")]
    assert tokenizer.eos_ids == (first,) and tokenizer.vocab_size == first + 2
    assert tokenizer.decode(ids) == "AB"
    assert tokenizer.special == {"eos_token": "<|end|>", "pad_token": "<pad>"}


def test_added_tokens_get_ids_in_the_order_of_their_numbers(tmp_path):
    """Not of their digits, nor of the file."""
    bpe = tokenizers.models.BPE({"a": 0}, [])
    listed = {str(i): added(f"<{i}>") for i in reversed(range(1, 12))}
    whole = tokenizers.Tokenizer(bpe).to_str()
    tokenizer = load_tokenizer(folder(tmp_path, whole, added_tokens_decoder=listed))
    for i in range(1, 12):
        assert tokenizer.encode(f"a<{i}>") == [0, i] and tokenizer.token_id(f"<{i}>") == i
    (tmp_path / "tokenizer_config.json").unlink()
    ids = {text["content"]: int(i) for i, text in listed.items()}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    assert load_tokenizer(tmp_path).encode("<2><10>") == [2, 10]


@pytest.mark.parametrize(
    "key, extra, special",
    [
        ("additional_special_tokens", ["<a>", {"content": "<b>"}], {}),
        ("extra_special_tokens", ["<a>", "<b>"], {}),
        ("extra_special_tokens", {"image": "<a>", "x": "<b>"}, {"image": "<a>", "x": "<b>"}),
    ],
)
def test_more_special_tokens(tmp_path, without_bos, key, extra, special):
    """Under the key of transformers before its version 5, or since then."""
    tokenizer = load_tokenizer(folder(tmp_path, byte_level(), **{key: extra}))
    first = without_bos.vocab_size
    ids = tokenizer.encode("<b>A<a>")
    assert ids == [first + 1, *without_bos.encode("A"), first]
    assert tokenizer.decode(ids) == "A" and tokenizer.special == special


def test_what_says_the_flags_of_a_token(tmp_path):
    """A tokenizer.json, unless tokenizer_config.json lists all tokens; a name alone has none."""
    file = tokenizers.Tokenizer.from_str(byte_level())
    file.add_tokens([tokenizers.AddedToken("<x>", lstrip=True, normalized=False)])
    i = file.token_to_id("<x>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": i}))
    tokenizer = load_tokenizer(folder(tmp_path, file.to_str(), eos_token="<x>"))
    assert tokenizer.encode("  <x>") == [i] and tokenizer.eos_id == i
    listed = {str(i): added("<x>")}
    folder(tmp_path, file.to_str(), eos_token="<x>", added_tokens_decoder=listed)
    assert len(load_tokenizer(tmp_path).encode("  <x>")) > 1


def test_ids_without_text(tmp_path, model_file, without_bos):
    """Rows of the embedding that no token has, behind the vocabulary or within it, are no text."""
    config = {"added_tokens_decoder": {"410": added("<x>")}}
    spaced = load_tokenizer(added_folder(tmp_path, model_file, {"tokenizer_config": config}))
    for tokenizer in (spaced, without_bos):
        ids = tokenizer.encode("A red")
        assert tokenizer.decode([*ids, 405, 5000, 10**12]) == "A red"
    assert spaced.decode([410, 405]) == "<x>"


@pytest.mark.parametrize("fixture", ["model", "twin"])
def test_token_id_is_of_exactly_this_entry(request, fixture):
    tokenizer = request.getfixturevalue(fixture)
    within, begins = tokenizer.token_id("A"), tokenizer.token_id("▁A")
    assert tokenizer.encode("A", bos=False) == [begins] != [within]
    assert tokenizer.encode("(A", bos=False)[-1] == within
    assert [tokenizer.token_id(piece) for piece in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.token_id(" A") is tokenizer.token_id("") is tokenizer.token_id("日本") is None


# --- class tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["model", "without_bos"])
def test_class_tokens_extend_the_prompt_by_one_token(request, fixture):
    tokenizer = request.getfixturevalue(fixture)
    context = "What is it?\nAnswer:"
    ids = tokenizer.class_token_ids(4, context)
    assert len(set(ids)) == 4 and ids == tokenizer.class_token_ids("ABCD", context)
    for letter, i in zip("ABCD", ids, strict=True):
        assert tokenizer.encode(context + letter) == [*tokenizer.encode(context), i]


@pytest.mark.parametrize(
    "classes, context, message",
    [
        (["A", "yes please"], "Answer:", "choice 'yes please' is not a single token"),
        (2, "Answer: ", "choice 'A' is not a single token"),  # the space and the letter become one
        (["A", "B", "A"], "Answer:", "choices 'A' and 'A' are the same token"),
        (["A", "", "B"], "Answer:", "choice '' is not a single token"),
        (27, "Answer:", "27 answer classes: there are letters for 26"),
        (0, "Answer:", "0 answer classes"),
    ],
)
def test_class_tokens_that_cannot_be(model, classes, context, message):
    with pytest.raises(InputError, match=message):
        model.class_token_ids(classes, context)


def test_unknown_letters_that_share_a_token(tmp_path):
    """Without byte fallback every unknown character is the same <unk>: not a choice."""
    vocab = {"<unk>": 0, "Answer:": 1}
    bpe = tokenizers.models.WordLevel(vocab, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(":", "merged_with_previous")
    tokenizer = load_tokenizer(folder(tmp_path, tokenizer.to_str()))
    with pytest.raises(InputError, match="choices 'é' and '漢' are the same token"):
        tokenizer.class_token_ids(["é", "漢"], "Answer:")


def test_a_letter_that_changes_the_token_before_it(tmp_path):
    """ "xyA" is two tokens and "xy" one, but "y" has gone over to the letter: not a choice."""
    vocab = {piece: i for i, piece in enumerate(["x", "y", "A", "yA", "xy"])}
    bpe = tokenizers.models.BPE(vocab, [("y", "A"), ("x", "y")])
    tokenizer = load_tokenizer(folder(tmp_path, tokenizers.Tokenizer(bpe).to_str()))
    assert tokenizer.encode("xy") == [4] and tokenizer.encode("xyA") == [0, 3]
    with pytest.raises(InputError, match="choice 'A' is not a single token"):
        tokenizer.class_token_ids(["A"], "xy")


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 10, 0.3, 0.9, 0.999])
def test_truncated_sentencepiece(tmp_path, model_file, keep):
    data = model_file.read_bytes()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(InputError, match=r"tokenizer\.model: .*sentencepiece"):
        load_tokenizer(tmp_path)


# A post-processor with a token that it does not define: Rust panics, which is no Exception.
PANICS = b"""{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x",
"type_id": 0}}], "pair": [], "special_tokens": {}}, "decoder": null,
"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"""


def grows(times, pattern="a", content="aa", part="normalizer"):
    """A tokenizer.json that makes a text 2 ** times as long: gigabytes, with some more."""
    kind = "Regex" if pattern == "" else "String"
    replace = {"type": "Replace", "pattern": {kind: pattern}, "content": content}
    whole = json.loads(PANICS) | {"post_processor": None}
    return json.dumps(whole | {part: {"type": "Sequence", f"{part}s": [replace] * times}}).encode()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", b"{", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.json", b"[]", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', r"tokenizer\.json: not a tokenizer\.js"),
        ("tokenizer.json", b"\xff\xfe", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.json", PANICS, r"tokenizer\.json: not a tokenizer\.json: no entry found"),
        ("tokenizer.json", grows(8), r"tokenizer\.json: could make a text 256 times as long"),
        ("tokenizer.json", grows(7, "", "a"), r"tokenizer\.json: could make a text 128 times"),
        ("tokenizer.model", b"IQ== 0\n", r"tokenizer\.model: not a sentencepiece model"),
        ("tokenizer_config.json", b"{", r"no tokenizer: expected tokenizer\.model or"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_bad_configuration(tmp_path, model_file, content):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: (not JSON|expected a JSON obj)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokenizer_config", {"added_tokens_decoder": ["<x>"]}),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<x>"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"400": "<x>"}}),
        ("tokenizer_config", {"added_tokens_decoder": {"400": {"lstrip": True}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"-1": {"content": "<x>"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"400": {"content": 3}}}),
        ("added_tokens", {"<x>": "four hundred"}),
        ("added_tokens", {"<x>": None}),
    ],
)
def test_bad_added_tokens(tmp_path, model_file, name, value):
    with pytest.raises(InputError, match=rf"{name}\.json: expected added tokens as pairs"):
        load_tokenizer(added_folder(tmp_path, model_file, {name: value}))


@pytest.mark.parametrize("name", ["absent", "absent.json", "absent.model"])
def test_absent(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: no such file"):
        load_tokenizer(tmp_path / name)


def test_a_text_may_become_somewhat_longer(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(grows(6))
    assert load_tokenizer(tmp_path).encode("a") == [0]
    (tmp_path / "tokenizer.json").write_bytes(grows(9, part="decoder"))
    with pytest.raises(InputError, match="could make a text 512 times as long"):
        load_tokenizer(tmp_path)


def test_a_model_without_a_piece_for_the_unknown(tmp_path, model_file):
    unknown = b"<unk>\x15\x00\x00\x00\x00\x18\x02"  # the last byte is the piece's type
    data = model_file.read_bytes()
    assert unknown in data
    (tmp_path / "tokenizer.model").write_bytes(data.replace(unknown, unknown[:-1] + b"\x00"))
    assert load_tokenizer(tmp_path / "tokenizer.model").token_id("no such piece") is None


def test_a_tokenizer_that_gives_no_ids(tmp_path):
    whole = json.loads(PANICS) | {"post_processor": None}
    whole["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="choice 'A' is not a single token"):
        load_tokenizer(tmp_path).class_token_ids(2, "Answer:")


@pytest.mark.parametrize("extra", [3, "<x>", True])
def test_additional_tokens_that_are_no_list(tmp_path, extra):
    folder(tmp_path, byte_level(), additional_special_tokens=extra)
    with pytest.raises(InputError, match="additional_special_tokens must be a list"):
        load_tokenizer(tmp_path)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"notes\.txt: expected a sentencepiece model or"):
        load_tokenizer(tmp_path / "notes.txt")


@pytest.mark.parametrize("fixture", ["model", "without_bos"])
def test_bad_text_and_ids(request, fixture):
    tokenizer = request.getfixturevalue(fixture)
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tokenizer.encode("\ud800")
    for i in (-1, -3):
        with pytest.raises(InputError, match=f"token id {i} is negative"):
            tokenizer.decode([5, i])


# --- against transformers ------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize(
    "bos, config",
    [
        (None, {"bos_token": "<s>"}),  # SmolLM2
        (None, {"bos_token": None, "add_bos_token": False}),  # Qwen2.5
        ("<s>", {"bos_token": "<s>"}),  # Llama 3
        ("<s>", {"bos_token": "<s>", "add_bos_token": False}),  # the file wins over its config
    ],
)
def test_ids_equal_transformers(tmp_path, bos, config):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    ours = load_tokenizer(folder(tmp_path, byte_level(bos), **config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    @given(text=texts)
    def same(text):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True
        )

    same()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
