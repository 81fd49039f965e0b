"""Answers' tokens and the wording of prompts, on tokenizers that join and that do not."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Builder

from scalabl_ref.app.demo import ASSETS
from scalabl_ref.data import Example, Wording, encode, load, question
from scalabl_ref.data.answers import answer_tokens
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.support.errors import InputError

from ..tickets import QUEUES, tickets

# What Qwen's and Llama 3's pre-tokenizers do: one character that is neither letter nor digit goes
# with the letters behind it, so that ":A" is cut out of "Answer:A" as one piece.
JOINING = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_tokenizer(folder, merges=(), joining=True, chat=None):
    """A byte-level tokenizer of single bytes and of these merges, read from a folder."""
    folder.mkdir(exist_ok=True)
    vocabulary = {b: i for i, b in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    builder = Builder(models.BPE(vocabulary, list(merges)))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if joining:
        steps.insert(0, pre_tokenizers.Split(Regex(JOINING), "isolated"))
    builder.pre_tokenizer = pre_tokenizers.Sequence(steps)
    builder.decoder = decoders.ByteLevel()
    builder.save(str(folder / "tokenizer.json"))
    config = {} if chat is None else {"chat_template": chat}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


SPACED = [("Ġ", letter) for letter in "ABC"]  # Ġ is a space as byte-level models write it
JOINED = [(":", letter) for letter in "ABC"]


@pytest.fixture
def qwen_like(tmp_path):
    """ ":A" is one token and so is " A", as with the tokenizers of Qwen and Llama 3."""
    return byte_tokenizer(tmp_path / "qwen", [*SPACED, *JOINED], chat=CHAT)


@pytest.fixture
def plain(tmp_path):
    """One token a byte."""
    return byte_tokenizer(tmp_path / "plain", joining=False)


def ids(tokenizer, *pieces):
    return [tokenizer.token_id(piece) for piece in pieces]


def test_a_letter_behind_a_space_goes_before_a_bare_one(qwen_like):
    found = answer_tokens(qwen_like, ["What?\nAnswer:"], "AB")
    assert found == (ids(qwen_like, "ĠA", "ĠB"), "space", None)
    for letter, id in zip("AB", found.ids, strict=True):
        before = qwen_like.encode("What?\nAnswer:")
        assert qwen_like.encode(f"What?\nAnswer: {letter}") == [*before, id]


def test_bare_letters_where_a_space_does_not_go(plain):
    """ " A" is two tokens here, and "A" continues the prompt."""
    assert answer_tokens(plain, ["Answer:"], "AB") == (ids(plain, "A", "B"), "bare", None)


def test_the_vocabularys_own_letters_where_nothing_goes(tmp_path):
    tokenizer = byte_tokenizer(tmp_path / "joined", JOINED)
    found = answer_tokens(tokenizer, ["Answer:"], "AB")
    assert found[:2] == (ids(tokenizer, "A", "B"), "alone")
    assert "choice ' A' is not a single token after 'Answer:'" in found.notice
    assert answer_tokens(tokenizer, [], "AB", "alone") == (found.ids, "alone", None)


def test_bare_letters_asked_for_and_joined_are_taken_alone(qwen_like):
    found = answer_tokens(qwen_like, ["Answer:"], "AB", "bare")
    assert found[:2] == (ids(qwen_like, "A", "B"), "alone")
    alone = "choice 'A' is not a single token after 'Answer:': the token of 'A' alone stands for it"
    assert found.notice == alone
    row, wording = question("Q", "xy", "arc"), Wording("{question}\nAnswer:", answer_tokens="bare")
    encoded = encode([row], qwen_like, wording=wording)
    assert encoded.classes == found.ids and encoded.wording.answer_tokens == "alone"
    assert encoded.notice == alone.replace("'Answer:'", repr("Q\nAnswer:"))


def test_after_a_line_break_the_bare_letter_goes_first(qwen_like):
    prompts = ["Answer:\n", "<|assistant|>\n"]
    assert answer_tokens(qwen_like, prompts, "AB") == (ids(qwen_like, "A", "B"), "bare", None)
    assert answer_tokens(qwen_like, prompts, "AB", "space").ids == ids(qwen_like, "ĠA", "ĠB")


def test_one_prompt_that_ends_otherwise_is_enough_for_a_space(tmp_path):
    tokenizer = byte_tokenizer(tmp_path / "both", SPACED, joining=False)  # either kind holds
    assert answer_tokens(tokenizer, ["Answer:\n", "Answer:\t"], "AB").kind == "bare"
    assert answer_tokens(tokenizer, ["Answer:\n", "Answer:"], "AB").kind == "space"


def test_every_kind_of_end_is_looked_at(plain, tmp_path):
    """The letter must be the same token after all; else the vocabulary's own is taken."""
    joins_after_b = byte_tokenizer(tmp_path / "b", [("b", "A")], joining=False)
    assert answer_tokens(joins_after_b, ["a", "c"], "AB").kind == "bare"
    assert answer_tokens(joins_after_b, ["a", "b", "c"], "AB").kind == "alone"
    assert answer_tokens(joins_after_b, ["x a", "x b"], "AB").kind == "alone"
    with pytest.raises(InputError, match="choice ' A' is not a single token.*--answer-tokens bare"):
        answer_tokens(plain, ["Answer:"], "AB", "space")


def test_a_letter_that_is_another_token_elsewhere_is_none(plain, monkeypatch):
    encode_text = plain._encode
    monkeypatch.setattr(plain, "_encode", lambda text: encode_text(text.replace("!A", "!Z")))
    assert answer_tokens(plain, ["a", "b"], "AB", "bare").kind == "bare"
    found = answer_tokens(plain, ["a", "b!"], "AB", "bare")
    assert (
        found.kind == "alone" and "'A' is another token after 'b!' than elsewhere" in found.notice
    )


def test_an_answer_that_has_no_token(tmp_path):
    builder = Builder(models.WordLevel({"<unk>": 0, "A": 1}, unk_token="<unk>"))
    builder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tokenizer.json").write_text(builder.to_str())
    with pytest.raises(InputError, match="no token 'B'"):
        answer_tokens(load_tokenizer(tmp_path), [], "AB", "alone")


# --- words ---------------------------------------------------------------------------------------


def test_words_are_known_by_their_first_token(plain):
    found = answer_tokens(plain, ["Queue:\n"], ["billing", "network"], "bare", words=True)
    assert found == (ids(plain, "b", "n"), "bare", None)
    with pytest.raises(InputError, match="'billing' and 'bugs' begin with the same token, 'b'"):
        answer_tokens(plain, ["Queue:\n"], ["billing", "bugs"], "bare", words=True)


def test_a_word_that_merges_with_the_prompts_end_is_taken_alone(tmp_path):
    tokenizer = byte_tokenizer(tmp_path / "joined", JOINED)
    found = answer_tokens(tokenizer, ["Queue:"], ["Apps", "Billing"], "bare", words=True)
    assert found[:2] == (ids(tokenizer, "A", "B"), "alone")
    assert "label 'Apps' does not begin with a token after 'Queue:'" in found.notice


def test_words_alone_are_their_first_tokens_behind_no_bos():
    """Of the tokenizer in the package, which begins every text with a token of its own."""
    tokenizer = load_tokenizer(ASSETS)
    words = ["billing", "network"]
    first = [tokenizer.encode(word, bos=False)[0] for word in words]
    assert tokenizer.encode("billing")[1] == first[0] != tokenizer.encode("billing")[0]
    found = answer_tokens(tokenizer, ["Queue:"], words, "alone", words=True)
    assert (found.ids, found.kind) == (first, "alone")
    entry = tokenizer.token_id("a")  # inside words; preferred to the first token of " a"
    assert [entry] != tokenizer.encode("a", bos=False)
    found = answer_tokens(tokenizer, ["Queue:"], ["a", *words], "alone", words=True)
    assert found.ids == [entry, *first]


def examples(rows=40, format="jsonl"):
    return [
        question(row["prompt"], row["choices"], format, row["label"], str(i))
        for i, row in enumerate(tickets(rows, 0))
    ]


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_labels_are_words_where_every_row_has_the_same(plain, format):
    encoded = encode(examples(format=format), plain, wording=Wording(answer_tokens="bare"))
    assert encoded.wording.labels == "words" and encoded.wording.names == tuple(QUEUES)
    assert encoded.classes == ids(plain, *"HSAIN") and encoded.notice is None
    row = tickets(1, 0)[0]
    assert encoded.examples[0].prompt == f"{row['prompt']}\nAnswer:", "the labels are not listed"
    listed = Wording("{question} [{choices}]", answer_tokens="bare")
    prompt = encode(examples(), plain, wording=listed).examples[0].prompt
    assert prompt == f"{row['prompt']} [{', '.join(QUEUES)}]"


@pytest.mark.parametrize(
    "rows, kind, notice",
    [
        (["one", "two", "six"], "words", None),
        (["one", "two", "three"], "letters", "'two' and 'three' begin with the same token, 't'"),
    ],
)
def test_letters_where_words_cannot_be_told_apart(plain, rows, kind, notice):
    some = [question("q", rows, "jsonl", i % 3) for i in range(6)]
    encoded = encode(some, plain, wording=Wording(answer_tokens="bare"))
    assert encoded.wording.labels == kind
    assert notice is None if encoded.notice is None else notice in encoded.notice
    assert encoded.wording.names == tuple(rows), "kept, for `predict` and for other files"
    others = [question("q", ["x", "y"], "jsonl")]
    kept = encode(others, plain, wording=encoded.wording, answerable=False).wording
    assert kept == encoded.wording


def test_letters_where_rows_have_choices_of_their_own_or_are_published_sets(plain):
    other = [*examples(3), question("q", ["x", "y"], "jsonl")]
    assert encode(other, plain, wording=Wording()).wording.labels == "letters"
    with pytest.raises(InputError, match="same choices in every row: row  has 'x', 'y', row 0 has"):
        encode(other, plain, wording=Wording(labels="words"))
    boolq = [question("q", ["No", "Yes"], "boolq")] * 2
    assert encode(boolq, plain, wording=Wording()).wording.labels == "letters"
    sst2 = [question("a gem .", ["negative", "positive"], "sst2")]
    assert encode(sst2, plain, wording=Wording()).examples[0].prompt == "a gem .\nSentiment:"
    words = encode(boolq, plain, wording=Wording(labels="words", answer_tokens="bare"))
    assert words.classes == ids(plain, "N", "Y") and words.examples[0].prompt == "q\nAnswer:"
    whole = [question("whole prompt:", "AB", "jsonl")] * 2
    encoded = encode(whole, plain, wording=Wording())
    assert encoded.examples[0].prompt == "whole prompt:" and encoded.wording.names is None
    assert encoded.notice is None, "nobody asked for words"
    with pytest.raises(InputError, match="the choices are letters"):
        encode(whole, plain, wording=Wording(labels="words"))


def test_another_order_of_the_same_labels_is_read_by_name(plain):
    wording = encode(examples(), plain, wording=Wording(answer_tokens="bare")).wording
    turned = question("q", list(QUEUES)[::-1], "jsonl", 0)
    assert encode([turned], plain, wording=wording).labels == [4]
    both = [question("q", names, "csv", 0) for names in (["x", "y"], ["y", "x"])]
    encoded = encode(both, plain, wording=Wording())
    assert encoded.labels == [0, 1] and encoded.wording.words == ("x", "y")
    foreign = question("q", ["x", "y"], "jsonl", 1, "f")
    with pytest.raises(InputError, match=r"\(id f\): its answer is 'y', but there are 5 classes"):
        encode([foreign], plain, wording=wording)
    assert encode([foreign], plain, wording=wording, answerable=False).labels == [5]


# --- chats, runs, lengths ------------------------------------------------------------------------


def test_a_chat(qwen_like, plain):
    row = question("Why?", ["x", "y"], "arc", 1)
    encoded = encode([row], qwen_like, wording=Wording(style="chat"))
    assert encoded.examples[0].prompt == (
        "<|user|>\nWhy?\nA. x\nB. y\nAnswer with the letter of the right choice alone.\n"
        "<|assistant|>\n"
    )
    assert encoded.wording.answer_tokens == "bare" and encoded.classes == ids(qwen_like, "A", "B")
    row = question("Why?", ["x", "y"], "jsonl", 1)
    words = encode([row], qwen_like, wording=Wording(style="chat"))
    assert words.wording.labels == "words" and words.examples[0].prompt == (
        "<|user|>\nWhy?\nAnswer with one of: x, y.\n<|assistant|>\n"
    )
    own = Wording("{question}!", style="chat")
    assert "<|user|>\nWhy?!\n" in encode([row], qwen_like, wording=own).examples[0].prompt
    with pytest.raises(InputError, match="has no chat template: use --prompt-style plain"):
        encode([row], plain, wording=Wording(style="chat"))


def test_a_chat_begins_with_what_its_template_writes(tmp_path):
    """BOS is the template's to write, and is not put before it a second time."""
    tokenizer = byte_tokenizer(tmp_path / "bos", chat="~" + CHAT)
    tokenizer._prefix = tokenizer.encode("~")
    row = question("Why?", ["x", "y"], "arc")
    (chat,) = encode([row], tokenizer, wording=Wording(style="chat")).tokens
    (plain,) = encode([row], tokenizer, wording=Wording()).tokens
    assert chat[:2] == tokenizer.encode("~<", bos=False) and plain[:2] == tokenizer.encode("W")


def test_a_chat_template_gets_the_tokenizers_names_and_asks_for_no_draft(tmp_path):
    source = "{{ eos_token }} {{ enable_thinking }} {{ date_string }}: {{ messages[0].content }}"
    tokenizer = byte_tokenizer(tmp_path / "names", chat=source)
    tokenizer.special["eos_token"] = "</s>"
    row = question("Why?", "AB", "jsonl")
    (found,) = encode([row], tokenizer, wording=Wording(style="chat")).examples
    assert found.prompt == "</s> False 26 Jul 2024: Why?"


def test_an_example_that_is_a_whole_prompt_stays_as_it_is(plain):
    example = Example("Is it so?\nSay x or y:", 1, "i", ("x", "y"))
    (found,) = encode([example], plain, wording=Wording("{question}!", labels="letters")).examples
    assert found == example


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"style": "Chat"}, "the prompt style must be one of plain, chat, not 'Chat'"),
        ({"labels": "word"}, "the kind of labels must be one of auto, letters, words, not"),
        ({"answer_tokens": "any"}, "the answer tokens must be one of auto, space, bare, alone, "),
    ],
)
def test_a_wording_has_settings_of_known_kinds(setting, message):
    with pytest.raises(InputError, match=message):
        Wording(**setting)


@pytest.mark.parametrize(
    "wording",
    [
        Wording(),
        Wording("{question}", "chat", "words", "space", ("a", "b"), 9, True),
        Wording(labels="letters", answer_tokens="alone"),
    ],
)
def test_a_run_keeps_its_wording(wording):
    assert Wording.of_run(json.loads(json.dumps(wording.facts()))) == wording


def test_a_run_from_before_has_bare_letters():
    old = Wording.of_run({"prompt_template": "{question}"})
    assert old == Wording("{question}", "plain", "letters", "bare")


def test_long_prompts_are_cut_or_left_out(plain):
    texts = ["a" * 4, "b" * 40, "c" * 5]
    some = [question(f"{text}:", "AB", "jsonl", i % 2, text[0]) for i, text in enumerate(texts)]
    cut = encode(some, plain, max_length=100, wording=Wording(max_length=6))
    assert [len(row) for row in cut.tokens] == [5, 6, 6] and (cut.cut, cut.left_out) == (1, 0)
    assert cut.tokens[1] == plain.encode("bbbbb:"), "cut on the left"
    left = encode(some, plain, max_length=100, wording=Wording(max_length=6, drop_long=True))
    assert [e.id for e in left.examples] == ["a", "c"] and left.labels == [0, 0]
    assert (left.cut, left.left_out) == (0, 1) and len(left.tokens) == 2
    small = encode(some, plain, max_length=5, wording=Wording(max_length=6))
    assert max(map(len, small.tokens)) == 5, "the model's own length counts too"
    with pytest.raises(InputError, match="all 3 prompts are longer than 2 tokens"):
        encode(some, plain, wording=Wording(max_length=2, drop_long=True))
    with pytest.raises(InputError, match="--drop-long needs --max-length"):
        Wording(drop_long=True)
    with pytest.raises(InputError, match="in a chat template cannot be cut.*--drop-long"):
        Wording(style="chat", max_length=6)
    with pytest.raises(InputError, match="max_length must be at least 1"):
        Wording(max_length=0)
    assert encode(some, plain, wording=Wording(max_length=1)).tokens[0] == plain.encode(":")


def test_a_template_keeps_its_second_last_line_break(tmp_path, qwen_like):
    """An editor ends a file with one line break; one more is the template's own."""
    from scalabl_ref.data import read_template

    (tmp_path / "t.txt").write_text("{question}\nAnswer:\n\n")
    template = read_template(tmp_path / "t.txt")
    assert template == "{question}\nAnswer:\n"
    (tmp_path / "set.csv").write_text("text,label\nq,x\nr,y\n")
    rows = load(tmp_path / "set.csv", "csv")
    encoded = encode(rows, qwen_like, wording=Wording(template))
    assert encoded.examples[0].prompt == "q\nAnswer:\n" and encoded.wording.answer_tokens == "bare"
