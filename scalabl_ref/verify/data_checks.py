"""Checks of questions: rows of every format, prompts, answers, tokens, and splits, by hand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core import philox
from ..data import (
    Columns,
    Example,
    TrainingOrder,
    Wording,
    encode,
    files,
    format_of,
    hold_out,
    load,
    question,
    read_template,
    split,
    texts,
)
from ..data.answers import answer_tokens
from ..data.rows import nested
from ..data.tokenizer import import_sentencepiece, load_tokenizer
from .check import Check, Errors, Op, exact, refused
from .file_checks import write_byte_tokenizer

Row = tuple[str, str, str]  # text, answer, id
ASSETS = Path(__file__).parents[1] / "assets" / "tiny"


@contextmanager
def file_of(name: str, text: str | bytes) -> Iterator[Path]:
    """A file in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        yield path


def lines(*objects: Any) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


def rows_of(examples: Sequence[Example]) -> list[Row]:
    return [(e.question, e.choices[e.label], e.id) for e in examples]


# --- Public sets ----------------------------------------------------------------------------------

STEM = {"id": "q7", "question": "Why?", "choices": {"text": ["it", "so", "no"]}}
ARC = {"id": "q7", "answerKey": "C", "question": {"stem": "Why?", "choices": [
    {"label": "A", "text": "it"}, {"label": "B", "text": "so"},
    {"label": "C", "text": "no"}]}}  # fmt: skip
PANDAS = """{'text': array(["it's", 'a "b"\\n', 'no'], dtype=object), 'label': ['A' 'B' 'C']}"""
WHO = {"qID": "w1", "sentence": "_ won.", "option1": "Ann", "option2": "Bo"}
MMLU = {"question": "2 + 2?", "choices": ["1", "4", "3", "7"]}
NO_ID = "0", "1", "2"
# Format, name of the file, its content, and the rows.
SETS: list[tuple[str, str, str, list[Row]]] = [
    ("arc", "a.jsonl", lines(ARC), [("Why?", "no", "q7")]),
    ("arc", "a.jsonl",
     lines({**STEM, "choices": {"text": ["it", "so", "no"], "label": ["1", "2", "3"]},
            "answerKey": "2"}), [("Why?", "so", "q7")]),
    ("arc", "a.csv", 'id,question,choices,answerKey\nq7,Why?,"' + PANDAS.replace('"', '""')
     + '",B\n', [("Why?", 'a "b"\n', "q7")]),
    ("obqa", "o.json", json.dumps(
        [{"id": "o1", "question_stem": "The sun", "answerKey": "D",
          "choices": {"text": list("wxyz"), "label": list("ABCD")}}]), [("The sun", "z", "o1")]),
    ("winogrande", "w.jsonl", lines({**WHO, "answer": "2"}, {**WHO, "qID": "w2", "answer": 1}),
     [("_ won.", "Bo", "w1"), ("_ won.", "Ann", "w2")]),
    ("boolq", "b.jsonl",
     lines({"question": "is it", "passage": "It is.", "answer": True},
           {"question": "is it", "passage": "It is.", "answer": False}),
     [("It is.\nis it?", "Yes", "0"), ("It is.\nis it?", "No", "1")]),
    ("boolq", "b.jsonl", lines({"question": "q", "passage": "p", "label": 1, "idx": 3}),
     [("p\nq?", "Yes", "0")]),
    ("boolq", "b.csv", "question,passage,answer\nq,p,True\nq,p,FALSE\n",
     [("p\nq?", "Yes", "0"), ("p\nq?", "No", "1")]),
    ("mmlu", "m.csv", '"2 + 2?",1,4,3,7,B\n"a, b?",w,x,y,z,D\n',
     [("2 + 2?", "4", "0"), ("a, b?", "z", "1")]),
    ("mmlu", "m.csv", "question,choice0,choice1,choice2,choice3,answer\n2 + 2?,1,4,3,7,2\n",
     [("2 + 2?", "3", "0")]),
    ("mmlu", "m.jsonl", lines({**MMLU, "answer": 0}, {**MMLU, "answer": "C"}),
     [("2 + 2?", "1", "0"), ("2 + 2?", "3", "1")]),
    ("mmlu", "m.csv", "question,choices,answer\n2 + 2?,\"['1' '4' '3' '7']\",3\n",
     [("2 + 2?", "7", "0")]),
    ("sst2", "s.txt", "1 so good\n0 a bore \n\n", [("so good", "positive", "0"),
                                                   ("a bore", "negative", "1")]),
    ("sst2", "s.tsv", 'sentence\tlabel\n"so good\t1\nno "\t0\n',
     [('"so good', "positive", "0"), ('no "', "negative", "1")]),
    ("sst2", "s.jsonl", lines({"text": " dull ", "label": 0}), [("dull", "negative", "0")]),
    ("trec", "t.txt", "ENTY:animal What runs ?\nDESC:def What is it ?\nNUM:count How many ?\n",
     [("What runs ?", "entity", "0"), ("What is it ?", "description", "1"),
      ("How many ?", "number", "2")]),
    ("trec", "t.jsonl", lines(*({"text": "What ?", "coarse_label": i} for i in (0, 1, 2)),
                              {"text": "Who ?", "coarse_label": "HUM"}),
     [("What ?", "abbreviation", "0"), ("What ?", "entity", "1"), ("What ?", "description", "2"),
      ("Who ?", "human", "3")]),
]  # fmt: skip


def public_sets(_: Op, device: torch.device) -> Errors:
    """Each set as published, as the Hub has it, and as a table; refused without a known answer."""
    for format, name, text, rows in SETS:
        with file_of(name, text) as path:
            got = rows_of(load(path, format))
            yield exact(got == rows, f"{format}, {name}: {got}, expected {rows}")
            streamed = [(e.question, e.id) for _place, e in texts(path, format)]
            yield exact(streamed == [(t, id) for t, _a, id in rows], f"{format}: {streamed}")
            yield exact(len(load(path, format, limit=1)) == 1, f"{format}: limit")
    with file_of("s.txt", "1 caf\u00e9\n\n5 bad\n".encode("latin-1")) as path:
        first = load(path, "sst2", limit=1)[0]
        yield exact(first.question == "caf\u00e9", f"Latin-1: {first.question}")
        yield refused(lambda: load(path, "sst2"), "line 3: the label before the text")
    with file_of("w.jsonl", lines(WHO, {**WHO, "qID": "w2"})) as path:
        beside = path.with_name("w-labels.lst")
        beside.write_text("2\n1\n")
        yield exact(files(path, "winogrande") == [path, beside], "the file of labels")
        named = [e.choices[e.label] for e in load(path, "winogrande")]
        yield exact(named == ["Bo", "Ann"], f"labels beside: {named}")
        beside.write_text("2\n")
        yield refused(lambda: load(path, "winogrande"), "1 labels for the 2 rows")
    wrong = (
        ("arc", {**ARC, "answerKey": "E"}, "must be one of A, B, C"),
        ("arc", {**STEM, "choices": {"text": ["a"], "label": ["A", "B"]}}, "2 labels for 1 texts"),
        ("boolq", {"question": "q", "passage": "p", "label": -1}, "no labels"),
        ("mmlu", {**MMLU, "choices": ["1", "2"], "answer": 1}, "expected 4 choices"),
        ("winogrande", {**WHO, "answer": "3"}, "must be one of 1, 2"),
        ("winogrande", {**WHO, "answer": ""}, "no labels"),
    )
    for format, row, words in wrong:
        with file_of("x.jsonl", lines(row)) as path:
            yield refused(partial(load, path, format), words)
    cells = {"['a' 'b']": ["a", "b"], '["a", 1]': ["a", 1], "no list": "no list",
             "{'text': 'it\\'s \\x41'}": {"text": "it's A"}}  # fmt: skip
    for cell, value in cells.items():
        yield exact(nested(cell) == value, f"cell {cell}: {nested(cell)}")


# --- The user's own rows --------------------------------------------------------------------------

PLAIN: list[Row] = [("one", "b", "0"), ("two, 2", "a", "1"), ("three", "b", "2")]
# Name of the file, content, columns, and the rows.
TABLES: list[tuple[str, str, Columns, list[Row]]] = [
    ("t.csv", 'text,label\none,b\n\n"two, 2",a\r\nthree,b', Columns(), PLAIN),
    ("t.csv", "label;text\nb;one\na;two, 2\nb;three\n", Columns(), PLAIN),
    ("t.csv", "Sentence\tCATEGORY\none\tb\ntwo, 2\ta\nthree\tb\n", Columns(), PLAIN),
    ("t.tsv", "prompt\ttarget\tx,y,z,w\none\tb\t\ntwo, 2\ta\t\nthree\tb\t\n", Columns(), PLAIN),
    ("t.csv", "\ufeff text , label \none, b\n\"two, 2\",a \nthree,b\n", Columns(), PLAIN),
    ("t.csv", 'a,text,label\n9,one,b\n8,"two, 2",a\n7,three,b\n', Columns(label="a"),
     [("one", "9", "0"), ("two, 2", "8", "1"), ("three", "7", "2")]),
    ("t.csv", "id,q,c\nx,one,b\ny,\"two, 2\",a\nz,three,b\n", Columns("q", "c"),
     [("one", "b", "x"), ("two, 2", "a", "y"), ("three", "b", "z")]),
    ("t.csv", 'text,label\n"a ""q""\nnext",no\nb,yes\n', Columns(),
     [('a "q"\nnext', "no", "0"), ("b", "yes", "1")]),
    ("t.tsv", 'text\tlabel\n"a\tno\nb"\tyes\n', Columns(), [('"a', "no", "0"), ('b"', "yes", "1")]),
    ("t.tsv", 'text\tlabel\n"a ""q"""\tno\nb\tyes\n', Columns(),
     [('a "q"', "no", "0"), ("b", "yes", "1")]),
    ("j.jsonl", lines({"prompt": "one", "label": "b"}, {"prompt": "two, 2", "label": "a "},
                      {"prompt": "three", "label": "b"}), Columns(), PLAIN),
    ("j.jsonl", "\ufeff" + json.dumps([{"t": t, "l": a} for t, a, _id in PLAIN], indent=1),
     Columns("t", "l"), PLAIN),
    ("j.jsonl", lines({"prompt": "one", "label": 10, "id": 5}, {"prompt": "p", "label": 9}),
     Columns(), [("one", "10", "5"), ("p", "9", "1")]),
    ("j.jsonl", lines({"prompt": "p", "choices": ["x", "y", "z"], "label": 1},
                      {"prompt": "q", "choices": ["u", "v"], "label": "u"}),
     Columns(), [("p", "y", "0"), ("q", "u", "1")]),
    ("j.jsonl", '{"prompt":\n "p", "label": "m"}\n{"prompt": "q", "label": "n"}', Columns(),
     [("p", "m", "0"), ("q", "n", "1")]),
]  # fmt: skip


def own_rows(_: Op, device: torch.device) -> Errors:
    """Separators, quotes, headers, blank lines, byte order marks, ids, kinds of labels."""
    for name, text, columns, rows in TABLES:
        with file_of(name, text) as path:
            format = format_of(path)
            got = load(path, format, columns=columns)
            yield exact(rows_of(got) == rows, f"{text!r:.60}: {rows_of(got)}")
            each = texts(path, format, columns, ("a", "b"))
            streamed = [(e.question, e.id) for _place, e in each]
            yield exact(streamed == [(t, id) for t, _a, id in rows], f"{text!r:.60}: {streamed}")
    orders = (("10", "9", "+2"), ("+2", "9", "10")), (("b", "10", "9"), ("10", "9", "b"))
    for labels, order in orders:
        with file_of("t.csv", "text,label\n" + "".join(f"q,{n}\n" for n in labels)) as path:
            found = load(path, "csv")
            yield exact(found[0].choices == order, f"choices {found[0].choices}")
            yield exact([e.choices[e.label] for e in found] == [*labels], f"labels of {order}")
            yield exact(load(path, "csv", limit=1)[0].choices == order, "choices of the first row")
            yield refused(partial(load, path, "csv", names=["9", "b"]), "is not one of")
    with file_of("l.jsonl", lines({"text": "p"}, {"prompt": "q", "text": "r"})) as path:
        plain = [e.question for _place, e in texts(path, "jsonl", names=("a", "b"))]
        yield exact(plain == ["p", "q"], f"texts without labels: {plain}")
    with file_of("t.csv", "text\na\n\nb\n") as path:
        one = [e.question for _place, e in texts(path, "csv", names=("x", "y"))]
        yield exact(one == ["a", "b"], f"a column of texts: {one}")
    with file_of("c.jsonl", lines({"prompt": "p", "choices": ["x", "y"], "label": 1})) as path:
        own = load(path, "jsonl", names=["a", "b"])[0]
        yield exact((own.choices, own.label) == (("x", "y"), 1), f"a row's own choices: {own}")
    wrong: list[tuple[str, str | bytes, str]] = [
        ("j.jsonl", "\n", "holds no examples"),
        ("t.csv", "text,label\n", "holds no examples"),
        ("j.jsonl", '[{"prompt": "p", "label": "a"}, {"label": "b"}]', "entry 2: key 'prompt'"),
        ("t.csv", "text,label\na,b,c\nd,e\n", "line 2: expected 2 columns, found 3"),
        ("t.csv", "text,prompt,label\na,b,c\n", "2 columns are called"),
        ("t.csv", "text,label\n\n\na,b\n", "2 to 26 different labels"),
        ("t.csv", "text,label\na,1.5\nb,2\n", "whole numbers"),
        ("t.csv", "text,label\n ,x\nb,y\n", "line 2: 'text' is empty"),
        ("t.csv", '{"prompt": 1}', "holds JSON"),
        ("t.csv", "text,label\na,x\nb,y\n".encode("utf-16"), "is UTF-16"),
        ("t.csv", b"text,label\na,x\nb\xff,y\n", "line 3: expected UTF-8"),
        ("j.jsonl", lines({"prompt": "p", "choices": ["x", "y"], "label": 2}), "0 to 1"),
        ("j.jsonl", lines({"prompt": "p", "choices": ["x", "y"], "label": True}), "place in"),
        ("j.jsonl", lines({"prompt": "p", "choices": ["x", "x"], "label": "x"}), "place in"),
        ("j.jsonl", '{"prompt": "p", "label": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("j.jsonl", '[{"prompt": "p", "label": "a"}', "expected , or ]"),
    ]
    for name, content, words in wrong:
        with file_of(name, content) as path:
            yield refused(partial(load, path, format_of(path)), words)


# --- Prompts and answers --------------------------------------------------------------------------

PICK = [question("Why?", ("it", "so"), "jsonl", 1, "x"), question("How?", ("so", "it"), "jsonl", 1)]
LETTERED = "Why?\nA. it\nB. so\nAnswer:"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% if enable_thinking is false %}-{% endif %}{% endif %}"
)


def prompts_by_hand(_: Op, device: torch.device) -> Errors:
    """The text of each format's prompts: letters, words, templates, chats; what a run keeps."""
    sets = {"jsonl": LETTERED, "arc": LETTERED, "obqa": LETTERED, "winogrande": LETTERED,
            "mmlu": LETTERED, "csv": LETTERED, "sst2": "Why?\nSentiment:",
            "boolq": LETTERED}  # fmt: skip
    for format, prompt in sets.items():
        got = question("Why?", ("it", "so"), format).prompt
        yield exact(got == prompt, f"{format}: {got!r}")
    got = question("What?", tuple("abcdef"), "trec").prompt
    yield exact(got == "What?\nType:", f"trec: {got!r}")
    yield exact(question("Say A", ("A", "B"), "jsonl").prompt == "Say A", "letters as choices")
    got = question("Say A", ("A", "B"), "csv").prompt
    yield exact(got == "Say A\nA. A\nB. B\nAnswer:", f"letters as choices of a table: {got!r}")
    got = question("{choices} {x}", ("it", "so"), "csv", template="<{question}|{choices}>").prompt
    yield exact(got == "<{choices} {x}|A. it\nB. so>", f"braces: {got!r}")
    settings = (
        (Wording(labels="letters"), LETTERED, 1),
        (Wording(labels="words", names=("it", "so")), "Why?\nAnswer:", 1),
        (Wording(labels="words", names=("so", "it")), "Why?\nAnswer:", 0),
        (Wording(labels="words", names=("it", "no")), "Why?\nAnswer:", 2),
        (Wording("{question} of {choices}:", labels="words", names=("it", "so")),
         "Why? of it, so:", 1),
        (Wording("{question} of {choices}:", labels="letters"), "Why? of A. it\nB. so:", 1),
    )  # fmt: skip
    for wording, prompt, label in settings:
        asked = wording.word(PICK[0], None)
        yield exact((asked.prompt, asked.label) == (prompt, label), f"{wording}: {asked}")
        yield exact(Wording.of_run(wording.facts()) == wording, f"facts of {wording}")
    words = Wording().in_words(PICK)
    yield exact([words.word(e, None).label for e in PICK] == [1, 0], "labels in another order")
    yield exact(Wording().could_be_words(PICK), "words for rows of one's own")
    public = [question("Why?", ("it", "so"), "arc")]
    yield exact(not Wording().could_be_words(public), "letters for public rows")
    old = Wording.of_run({"label_names": ["a", "b"], "max_length": 7, "drop_long": True})
    kept = Wording(None, "plain", "letters", "bare", ("a", "b"), 7, True)
    yield exact(old == kept, f"an older run: {old}")
    with file_of("t.txt", "\ufeff{question} {{x}}?\r\n") as path:
        yield refused(lambda: read_template(path), "{x} is neither")
        path.write_bytes(b"\xef\xbb\xbf{question} {1 2}\n\r\n")
        yield exact(read_template(path) == "{question} {1 2}\n", "one line break is cut")
    yield refused(lambda: Wording(style="chat", max_length=9), "cannot be cut")
    yield refused(lambda: Wording(max_length=0), "at least 1 token")
    yield exact(Wording(max_length=1).max_length == 1, "one token")
    yield refused(lambda: Wording(drop_long=True), "needs a max_length")
    mixed = [*PICK, question("q", ("it", "no"), "csv")]
    yield refused(lambda: Wording().in_words(mixed), "the same choices in every row")
    yield refused(lambda: Wording().in_words([question("q", ("A", "B"), "jsonl")]), "are letters")
    yield refused(lambda: Wording(style="chat").word(PICK[0], None), "has no chat template")
    yield refused(lambda: question("q", ("one",), "csv"), "2 to 26 choices")


def chats(_: Op, device: torch.device) -> Errors:
    """A question in a model's chat template: its variables, and no second BOS."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_byte_tokenizer(folder, bos="<s>")
        config = {"bos_token": "<s>", "chat_template": [
            {"name": "tools", "template": "no"},
            {"name": "default", "template": CHAT}]}  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        found = load_tokenizer(folder)
        data = encode(PICK[:1], found, wording=Wording(style="chat", labels="letters"))
        asked = "Why?\nA. it\nB. so\nAnswer with the letter of the right choice alone."
        yield exact(data.examples[0].prompt == f"<s><user>{asked}<bot>-", data.examples[0].prompt)
        plain = found.encode(f"<user>{asked}<bot>-", bos=False)
        yield exact(data.tokens[0] == [256, *plain], f"tokens {data.tokens[0][:4]}")
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
        both = Wording(style="chat", labels="words")
        data = encode(PICK, load_tokenizer(folder), wording=both)
        right = ["Why?\nAnswer with one of: it, so.!", "How?\nAnswer with one of: it, so.!"]
        yield exact([e.prompt for e in data.examples] == right, f"{data.examples[0].prompt!r}")
        yield exact(data.labels == [1, 0], f"labels {data.labels}")


def answers_by_rule(_: Op, device: torch.device) -> Errors:
    """Which token answers: behind a space, bare, or alone; for letters and for words."""
    A, B, SPACE = "\u0120A", "\u0120B", "\u0120"
    merges = [(SPACE, "A"), (SPACE, "B"), ("n", "o"), (SPACE, "no"), ("y", "e"), (":", "C")]
    with tempfile.TemporaryDirectory() as name:
        write_byte_tokenizer(Path(name), merges)
        found = load_tokenizer(name)
    by = {piece: found.token_id(piece) for piece in (A, B, "A", "B", "C", "no", SPACE + "no", "ye")}
    cases: list[tuple[list[str], Sequence[str], Any, bool, str, list[str]]] = [
        (["Q:"], "AB", "auto", False, "space", [A, B]),
        (["Q:\n", "R \n"], "AB", "auto", False, "bare", ["A", "B"]),
        (["Q:\n", "R:"], "AB", "auto", False, "space", [A, B]),
        (["Q:"], "AB", "bare", False, "bare", ["A", "B"]),
        (["Q:"], "AB", "alone", False, "alone", ["A", "B"]),
        (["Q:"], "AC", "auto", False, "alone", ["A", "C"]),  # " C" are two tokens, ":C" is one
        (["Q:", "R"], "AC", "bare", False, "alone", ["A", "C"]),
        (["Q:"], ["Cat", "no"], "bare", True, "alone", ["C", "no"]),
        (["Q:"], ["no", "yes"], "bare", True, "bare", ["no", "ye"]),
        (["Q:"], ["no", "A bit"], "auto", True, "space", [SPACE + "no", A]),
    ]
    for prompts, answers, kind, words, right, pieces in cases:
        got = answer_tokens(found, prompts, answers, kind, words)
        case = f"{answers} of {prompts}, {kind}: {got}"
        yield exact(got.kind == right and got.ids == [by[piece] for piece in pieces], case)
        tried = right == "alone" and kind != "alone"
        yield exact((got.notice is not None) == tried, f"notice, {case}")
    yield refused(lambda: answer_tokens(found, ["Q"], ["yes", "yet"], "bare", True), "same token")
    yield refused(lambda: answer_tokens(found, ["Q"], ["A", "C"], "space"), "not a single token")
    yield refused(lambda: answer_tokens(found, ["Q"], ["A", "no, no"], "alone"), "no token")
    examples = [question("Q", ("no", "yes"), "csv", 1), question("R", ("no", "yes"), "csv", 0)]
    for labels, classes in (("auto", [SPACE + "no", SPACE]), ("letters", [A, B])):
        data = encode(examples, found, wording=Wording(labels=labels))  # type: ignore[arg-type]
        ids = [found.token_id(piece) for piece in classes]
        yield exact(data.classes == ids and data.labels == [1, 0], f"{labels}: {data.classes}")
        yield exact(data.wording.names == ("no", "yes"), f"{labels}: {data.wording}")
    same = [question("Q", ("yes", "yet"), "csv", 1)]
    data = encode(same, found, wording=Wording())
    yield exact(data.wording.labels == "letters" and "same token" in (data.notice or ""), "auto")
    data = encode(PICK, found, classes=2, max_length=20, truncate=True)
    yield exact(data.tokens[0] == found.encode(LETTERED)[-20:] and data.cut == 2, "cut to 20")
    whole = len(found.encode(LETTERED))
    data = encode(PICK[:1], found, classes=2, max_length=whole)
    yield exact(len(data.tokens[0]) == whole and data.cut == 0, "as long as the limit")
    for most, given in ((30, 20), (20, 30)):
        data = encode(PICK, found, max_length=most, truncate=True,
                      wording=Wording(labels="letters", max_length=given))  # fmt: skip
        yield exact([len(row) for row in data.tokens] == [20, 20], f"cut to {most} and {given}")
    long = [question("Q" * 50, ("no", "yes"), "csv", id="long"), *PICK]
    data = encode(long, found, wording=Wording(labels="letters", max_length=30, drop_long=True))
    yield exact((data.left_out, data.labels, data.cut) == (1, [1, 1], 0), "prompts left out")
    yield refused(lambda: encode(PICK, found, max_length=20), "at most 20")
    yield refused(lambda: encode(PICK, found, classes=1), "its answer is B")


# --- Tokens ---------------------------------------------------------------------------------------


def tokens_and_texts(_: Op, device: torch.device) -> Errors:
    """tokenizer.json: BOS once, added tokens, ids that end a text, special tokens left out."""
    config = {"eos_token": {"content": "<end>", "lstrip": False}, "pad_token": "<pad>",
              "additional_special_tokens": ["<x>"]}  # fmt: skip
    ends = {"eos_token_id": [12, 13, 258]}, {"eos_token_id": 7, "bos_token_id": 3}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_byte_tokenizer(folder, bos="<s>")
        plain = load_tokenizer(folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "added_tokens.json").write_text('{"<b>": 258, "<a>": 257}')
        for file, values in zip(("generation_config.json", "config.json"), ends, strict=True):
            (folder / file).write_text(json.dumps(values))
        found = load_tokenizer(folder)
    a, b = plain.encode("ab", bos=False)
    yield exact(plain.encode("ab") == [256, a, b], f"BOS: {plain.encode('ab')}")
    yield exact((plain.bos_id, plain.eos_id, plain.vocab_size) == (256, None, 257), "one file")
    data = encode(PICK, plain, classes=2, max_length=9, truncate=True)
    right = [256, *plain.encode(LETTERED, bos=False)[-8:]]
    yield exact(data.tokens[0] == right, f"cut behind BOS: {data.tokens[0]}")
    names = {"<a>": 257, "<b>": 258, "<end>": 259, "<pad>": 260, "<x>": 261}
    own = {piece: found.token_id(piece) for piece in names}
    yield exact(own == names, f"ids of added tokens: {own}")
    yield exact(found.eos_ids == (259, 12, 13, 258, 7), f"ends: {found.eos_ids}")
    yield exact((found.bos_id, found.eos_id, found.vocab_size) == (256, 259, 262), "ends of a text")
    got = found.encode("a<end>b<a>")
    yield exact(got == [256, a, 259, b, 257], f"tokens in a text: {got}")
    text = found.decode([256, a, 259, b, 257, 262, 900])
    yield exact(text == "ab<a>", f"decoded: {text}")
    roles = {"eos_token": "<end>", "pad_token": "<pad>"}
    yield exact(found.special == roles, f"roles: {found.special}")
    yield exact(found.class_token_ids(2, "Q") == found.encode("AB", bos=False), "letters")
    yield refused(lambda: found.class_token_ids("AA", "Q"), "are the same token")
    yield refused(lambda: found.class_token_ids(27, "Q"), "letters for 26")
    yield refused(lambda: found.decode([-1]), "is negative")
    yield refused(lambda: found.encode("\ud800"), "surrogate")


def sentencepieces(_: Op, device: torch.device) -> Errors:
    """tokenizer.model: the ids of sentencepiece itself, with BOS, between added tokens, decoded."""
    theirs = import_sentencepiece().SentencePieceProcessor()
    theirs.LoadFromSerializedProto((ASSETS / "tokenizer.model").read_bytes())
    ours, size = load_tokenizer(ASSETS), theirs.vocab_size()
    for text in ("big", " big  cat", "a \U0001f600 b", ""):
        right = [theirs.bos_id(), *theirs.encode(text)]
        yield exact(ours.encode(text) == right, f"{text!r}: {ours.encode(text)}, not {right}")
        yield exact(ours.decode(right) == theirs.decode(right[1:]), f"{right} decoded")
    end = theirs.id_to_piece(theirs.eos_id())
    yield exact(ours.eos_ids == (theirs.eos_id(),) and ours.vocab_size == size, "ends of a text")
    added = {"added_tokens_decoder": {str(size + 1): {"content": "<x>", "special": True},
                                      str(size): {"content": "<y>"}}}  # fmt: skip
    first, inner = [theirs.piece_to_id("\u2581b")], [theirs.piece_to_id("b")]
    settings: list[tuple[dict[str, bool], bool, bool]] = [
        ({}, True, True), ({"legacy": False}, False, True),
        ({"legacy": True, "add_bos_token": False}, True, False),
    ]  # fmt: skip
    for config, spaced, bos in settings:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "tokenizer.model").write_bytes((ASSETS / "tokenizer.model").read_bytes())
            (folder / "tokenizer_config.json").write_text(json.dumps({**added, **config}))
            (folder / "config.json").write_text('{"model_type": "qwen2"}')
            found = load_tokenizer(folder)
        start = [theirs.bos_id()] if bos else []
        right = [*start, *first, size + 1, *(first if spaced else inner), size, theirs.eos_id()]
        got = found.encode(f"b<x>b<y>{end}")
        yield exact(got == right, f"{config}: {got}, not {right}")
        yield exact(found.vocab_size == size + 2, f"{config}: {found.vocab_size} tokens")
        yield exact(found.decode([size + 1, *first, size]) == "b<y>", f"{config}: decoded")
        yield exact(found.decode([size, *first]) == "<y> b", f"{config}: a space in the text")
        two = [theirs.piece_to_id("\u2581"), *first] if not spaced else theirs.encode("  b")
        yield exact(found.encode("  b") == [*start, *two], f"{config}: {found.encode('  b')}")


# --- Splits and orders ----------------------------------------------------------------------------


def permutation(n: int, seed: int, stream: int) -> list[int]:
    """0 to n - 1 by the words of plain Python's Philox."""
    words = philox.word_stream(seed, stream, 2**32 - 1, n)
    return sorted(range(n), key=words.__getitem__)


def splits(_: Op, device: torch.device) -> Errors:
    """Rows held out, and the batches of epochs, from the words of plain Python."""
    rows = [question(f"row {i}", ("a", "b"), "csv") for i in range(23)]
    for seed, fraction, count in ((1, 0.2, 5), (2**40, 0.5, 12), (3, 0.0, 0)):
        held = sorted(permutation(23, seed, 3 << 48)[:count])
        rest, out = split(rows, fraction, seed)
        yield exact(out == [rows[i] for i in held], f"{fraction} held out with seed {seed}")
        yield exact(rest == [e for i, e in enumerate(rows) if i not in held], "the rest")
        yield exact(hold_out(rows, count, seed) == (rest, out), f"{count} held out")
    yield refused(lambda: split(rows, 0.01, 1), "does not split")
    yield refused(lambda: hold_out(rows, 24, 1), "too few")
    for n, batch, seed in ((23, 4, 9), (70, 2, 2**50), (5, 9, 0), (6, 1, 4)):
        lengths, steps = [3 + 5 * i % 7 for i in range(n)], -(-n // batch)
        window = max(1, min(16, steps // 4)) * batch
        for epoch in (0, 2):
            order, sorted_by_length = permutation(n, seed, (1 << 48) + epoch), list[int]()
            for start in range(0, n, window):
                part = order[start : start + window]
                sorted_by_length += sorted(part, key=lambda i: lengths[i])
            places = permutation(steps, seed, (2 << 48) + epoch)
            right = [sorted_by_length[p * batch : (p + 1) * batch] for p in places]
            made = TrainingOrder(lengths, batch, seed)
            got = [made.indices(epoch * steps + i) for i in range(steps)]
            yield exact(got == right, f"{n} rows in batches of {batch}, epoch {epoch}")


DATA_CHECKS = [
    Check("public sets", "ARC to TREC: as published, the Hub's, tables", public_sets),
    Check("tables and lines", "separators, quotes, headers, ids, labels", own_rows),
    Check("prompts", "letters, words, templates; what a run keeps", prompts_by_hand),
    Check("chats", "a model's chat template and its tokens", chats),
    Check("answers", "the token of each answer: space, bare, alone", answers_by_rule),
    Check("tokens", "BOS, added tokens, ends: tokenizer.json", tokens_and_texts),
    Check("sentencepieces", "BOS, added tokens: tokenizer.model", sentencepieces),
    Check("splits", "rows held out, batches: words of plain Python", splits),
]
