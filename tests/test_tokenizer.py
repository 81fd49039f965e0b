"""Tokenizers: ids as the packages give them, BOS once, letters that are one token, bad files."""

import io
import json
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scalabl_ref.errors import InputError
from scalabl_ref.tokenizer import LETTERS, import_sentencepiece, load_tokenizer

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
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
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
    assert model.encode("") == [1] and model.encode("", bos=False) == []


def as_tokenizer_json(model_file):
    """The same tokenizer in the layout of Meta's published tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
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
    "config, eos",
    [
        ({"eos_token": "</s>"}, 2),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, 2),
        ({"eos_token_id": 7}, 7),
        ({"eos_token_id": [5, 6]}, 5),
        ({"eos_token": None, "eos_token_id": None}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_eos(tmp_path, config, eos, name):
    (tmp_path / "tokenizer.json").write_text(byte_level())
    (tmp_path / name).write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_id == eos


@pytest.mark.parametrize("named, eos", [({"bos_token": "<s>"}, 7), ({"eos_token": "</s>"}, 2)])
def test_eos_from_several_files(tmp_path, named, eos):
    """A name in the tokenizer's own configuration goes before an id in the model's."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(folder(tmp_path, byte_level(), **named)).eos_id == eos


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


def test_without_the_extra(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"tokenizer\.json.*pip install 'scalabl_ref\[hf\]'"):
        load_tokenizer(tmp_path)


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_prefers_sentencepiece_and_names_its_files(tmp_path, model_file):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    folder(tmp_path, byte_level())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(CORPUS[0]) == load_tokenizer(model_file).encode(CORPUS[0])
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


def test_add_bos_token_false(tmp_path, model_file):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("x") == load_tokenizer(model_file).encode("x", bos=False)


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
        (["A", "yes please"], "Answer:", "choice 'yes please' is not one token"),
        (2, "Answer: ", "choice 'A' is not one token"),  # the space and the letter become one
        (["A", "B", "A"], "Answer:", "choices 'A' and 'A' are the same token"),
        (["A", "", "B"], "Answer:", "choice '' is not one token"),
        (27, "Answer:", "27 answer classes: there are letters for 26"),
        (0, "Answer:", "0 answer classes"),
    ],
)
def test_class_tokens_that_cannot_be(model, classes, context, message):
    with pytest.raises(InputError, match=message):
        model.class_token_ids(classes, context)


def test_unknown_letters_that_share_a_token(tmp_path):
    """Without byte fallback every unknown character is the same <unk>: not a choice."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    vocab = {"<unk>": 0, "Answer:": 1}
    bpe = tokenizers.models.WordLevel(vocab, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(":", "merged_with_previous")
    tokenizer = load_tokenizer(folder(tmp_path, tokenizer.to_str()))
    with pytest.raises(InputError, match="choices 'é' and '漢' are the same token"):
        tokenizer.class_token_ids(["é", "漢"], "Answer:")


def test_a_letter_that_changes_the_token_before_it(tmp_path):
    """ "xyA" is two tokens and "xy" one, but "y" has gone over to the letter: not a choice."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    vocab = {piece: i for i, piece in enumerate(["x", "y", "A", "yA", "xy"])}
    bpe = tokenizers.models.BPE(vocab, [("y", "A"), ("x", "y")])
    tokenizer = load_tokenizer(folder(tmp_path, tokenizers.Tokenizer(bpe).to_str()))
    assert tokenizer.encode("xy") == [4] and tokenizer.encode("xyA") == [0, 3]
    with pytest.raises(InputError, match="choice 'A' is not one token"):
        tokenizer.class_token_ids(["A"], "xy")


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 10, 0.3, 0.9, 0.999])
def test_truncated_sentencepiece(tmp_path, model_file, keep):
    data = model_file.read_bytes()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(InputError, match=r"tokenizer\.model: .*sentencepiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", b"{", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.json", b"[]", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', r"tokenizer\.json: not a tokenizer\.js"),
        ("tokenizer.json", b"\xff\xfe", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.model", b"IQ== 0\n", r"tokenizer\.model: not a sentencepiece model"),
        ("tokenizer_config.json", b"{", r"no tokenizer: expected tokenizer\.model or"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_bad_configuration(tmp_path, model_file, content):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: (not JSON|expected a JSON obj)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["absent", "absent.json", "absent.model"])
def test_absent(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: no such file"):
        load_tokenizer(tmp_path / name)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"notes\.txt: expected a sentencepiece model or"):
        load_tokenizer(tmp_path / "notes.txt")


@pytest.mark.parametrize("fixture", ["model", "without_bos"])
def test_bad_text_and_ids(request, fixture):
    tokenizer = request.getfixturevalue(fixture)
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tokenizer.encode("\ud800")
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=f"token id {i} is outside the tokenizer's"):
            tokenizer.decode([i])


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
