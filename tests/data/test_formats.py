"""Files of every format: their examples, and what is said of malformed ones."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter

import pytest

from scalabl_ref.data import (
    FORMATS,
    Columns,
    Example,
    encode,
    files,
    format_of,
    label_names,
    load,
    num_classes,
    texts,
)
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.support.errors import InputError


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def arc_row(key, names, texts=None, id="q1"):
    texts = texts or [f"text {name}" for name in names]
    choices = [{"text": t, "label": n} for t, n in zip(texts, names, strict=True)]
    return {"id": id, "question": {"stem": "Why?", "choices": choices}, "answerKey": key}


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


GAP = {"qID": "w-1", "sentence": "The _ is big.", "option1": "cup", "option2": "tree"}
TYPES = ("abbreviation", "description", "entity", "human", "location", "number")
HEADER = "question,choice0,choice1,choice2,choice3,answer\n"
# format, content of the file, its examples
FIXTURES = [
    (
        "jsonl",
        "\ufeff"  # as some editors begin a file
        + lines(
            {"prompt": "1 + 1?", "choices": ["2", "3\u2028"], "label": 0, "id": "sum"},
            {"prompt": "Q\nAnswer:", "choices": ["A", "B", "C"], "label": 2},
            {"prompt": "größe", "choices": ["{x}", "B", "C"], "label": 1, "id": 7},
        ),
        [
            Example("1 + 1?\nA. 2\nB. 3\u2028\nAnswer:", 0, "sum", ("2", "3\u2028")),
            Example("Q\nAnswer:", 2, "1", ("A", "B", "C")),
            Example("größe\nA. {x}\nB. B\nC. C\nAnswer:", 1, "7", ("{x}", "B", "C")),
        ],
    ),
    (
        "arc",
        lines(arc_row("D", "ABCDE")) + "\n" + lines(arc_row("3", "123")),
        [
            Example(
                "Why?\nA. text A\nB. text B\nC. text C\nD. text D\nE. text E\nAnswer:",
                3,
                "q1",
                ("text A", "text B", "text C", "text D", "text E"),
            ),
            Example(
                "Why?\nA. text 1\nB. text 2\nC. text 3\nAnswer:",
                2,
                "q1",
                ("text 1", "text 2", "text 3"),
            ),
        ],
    ),
    (
        "obqa",
        lines(arc_row("B", "AB", ["u", "v"], id="8-1")),
        [Example("Why?\nA. u\nB. v\nAnswer:", 1, "8-1", ("u", "v"))],
    ),
    (
        "winogrande",
        lines(GAP | {"answer": "2"}),
        [Example("The _ is big.\nA. cup\nB. tree\nAnswer:", 1, "w-1", ("cup", "tree"))],
    ),
    (
        "boolq",
        lines({"question": "is it so", "title": "T", "answer": True, "passage": "It is."}),
        [Example("It is.\nis it so?\nA. No\nB. Yes\nAnswer:", 1, "0", ("No", "Yes"))],
    ),
    (
        "mmlu",
        HEADER + '"Which,\nof ""these""?",a,b,"c, d",e,2\r\nNext?,1,2,3,4,0\n',
        [
            Example(
                'Which,\nof "these"?\nA. a\nB. b\nC. c, d\nD. e\nAnswer:',
                2,
                "0",
                ("a", "b", "c, d", "e"),
            ),
            Example("Next?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", 0, "1", ("1", "2", "3", "4")),
        ],
    ),
    (
        "mmlu",  # as its authors publish it
        '"Which, of these?",a,b,c,d,D\nNext?,1,2,3,4,A\n',
        [
            Example("Which, of these?\nA. a\nB. b\nC. c\nD. d\nAnswer:", 3, "0", (*"abcd",)),
            Example("Next?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", 0, "1", (*"1234",)),
        ],
    ),
    (
        "sst2",
        "0 crème brûlée .\r\n1 a gem .\n",
        [
            Example("crème brûlée .\nSentiment:", 0, "0", ("negative", "positive")),
            Example("a gem .\nSentiment:", 1, "1", ("negative", "positive")),
        ],
    ),
    (
        "trec",
        "".join(f"{c}:x Who ?\n" for c in ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
        [Example("Who ?\nType:", label, str(label), TYPES) for label in range(6)],
    ),
    (
        "csv",
        '\ufeffid,Text,note, label\r\nr1,"a, ""b""\r\nc",,pos\r\n\r\n,d,x, neg \r\n',
        [
            Example('a, "b"\r\nc\nA. neg\nB. pos\nAnswer:', 1, "r1", ("neg", "pos")),
            Example("d\nA. neg\nB. pos\nAnswer:", 0, "1", ("neg", "pos")),
        ],
    ),
]


@pytest.mark.parametrize("format, content, expected", FIXTURES, ids=[f[0] for f in FIXTURES])
def test_format(tmp_path, format, content, expected):
    path = tmp_path / "file"
    path.write_bytes(content.encode())
    assert load(path, format) == expected
    assert load(path, format, limit=1) == expected[:1]
    assert load(path, format, limit=10**9) == expected


def test_every_format_has_a_fixture():
    assert list(dict.fromkeys(fixture[0] for fixture in FIXTURES)) == list(FORMATS)


def numpy_text(value):
    """A column's value as pandas' to_csv writes it: lists are NumPy's arrays there."""
    if isinstance(value, dict):
        arrays = (
            f"{k!r}: array([{', '.join(map(repr, v))}], dtype=object)" for k, v in value.items()
        )
        return "{" + ", ".join(arrays).replace("', '", "',\n       '") + "}"
    return "[" + "\n ".join(map(repr, value)) + "]" if isinstance(value, list) else value


def written(rows, how):
    """The rows as the Hub's library writes them: to_json, to_csv; or otherwise, as people do."""
    if how == "lines":
        return lines(*rows)
    if how in ("array", "indented"):
        return json.dumps(rows, indent=None if how == "array" else 2, ensure_ascii=False)
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, rows[0], delimiter={"csv": ",", "tsv": "\t"}[how])
    table.writeheader()
    table.writerows({k: numpy_text(v) for k, v in row.items()} for row in rows)
    return out.getvalue()


TWO_LISTS = {"text": ["it's \\ hot", "süß"], "label": ["A", "B"]}
FOUR = ("1", 'a "b"', "it's", "4")
HUB_GAP = without(GAP, "qID")
# format, a row as the Hub has it, its example
HUB = [
    (
        "arc",
        {"id": "q", "question": "Why?", "choices": TWO_LISTS, "answerKey": "B"},
        Example("Why?\nA. it's \\ hot\nB. süß\nAnswer:", 1, "q", ("it's \\ hot", "süß")),
    ),
    (
        "obqa",
        {"id": "q", "question_stem": "The", "choices": TWO_LISTS, "answerKey": "A"},
        Example("The\nA. it's \\ hot\nB. süß\nAnswer:", 0, "q", ("it's \\ hot", "süß")),
    ),
    (
        "winogrande",
        HUB_GAP | {"answer": "2"},
        Example("The _ is big.\nA. cup\nB. tree\nAnswer:", 1, "0", ("cup", "tree")),
    ),
    (
        "mmlu",
        {"question": "1+1?", "subject": "maths", "choices": [*FOUR], "answer": 2},
        Example('1+1?\nA. 1\nB. a "b"\nC. it\'s\nD. 4\nAnswer:', 2, "0", FOUR),
    ),
    (
        "boolq",
        {"question": "is it", "passage": "It\nis.", "answer": True},
        Example("It\nis.\nis it?\nA. No\nB. Yes\nAnswer:", 1, "0", ("No", "Yes")),
    ),
    (
        "boolq",  # as SuperGLUE has it
        {"question": "is it", "passage": "It is.", "idx": 5, "label": 0},
        Example("It is.\nis it?\nA. No\nB. Yes\nAnswer:", 0, "0", ("No", "Yes")),
    ),
    (
        "sst2",
        {"idx": 0, "sentence": "a , fine film ", "label": 1},
        Example("a , fine film\nSentiment:", 1, "0", ("negative", "positive")),
    ),
    (
        "sst2",
        {"text": "a , fine film ", "label": 0},
        Example("a , fine film\nSentiment:", 0, "0", ("negative", "positive")),
    ),
    (
        "trec",
        {"text": "Who ? ", "coarse_label": 1, "fine_label": 7},
        Example("Who ?\nType:", 2, "0", TYPES),
    ),
]


@pytest.mark.parametrize("how", ["lines", "array", "indented", "csv", "tsv"])
@pytest.mark.parametrize("format, row, example", HUB, ids=[f[0] for f in HUB])
def test_the_hubs_columns(tmp_path, format, row, example, how):
    path = tmp_path / f"file.{how}"
    path.write_text(written([row, row], how), newline="", encoding="utf-8")
    first, second = load(path, format)
    assert first == example and second.prompt == example.prompt and second.label == example.label
    key = list(row)[-1 if format != "trec" else 1]
    path.write_text(written([row | {key: "" if key == "answerKey" else -1}], how), newline="")
    with pytest.raises(InputError, match=rf"[1-4]: {key!r} is .*: this split has no labels"):
        load(path, format)


def test_the_hubs_order_of_question_types(tmp_path):
    """It counts ABBR, ENTY, DESC, HUM, LOC, NUM, where the published names are sorted here."""
    path = tmp_path / "file"
    path.write_text(lines(*({"text": "Who ?", "coarse_label": i} for i in (*range(6), "ENTY"))))
    assert [e.label for e in load(path, "trec")] == [0, 2, 1, 3, 4, 5, 2]


def test_true_and_false_as_spreadsheets_write_them(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("passage,question,answer\np,q,TRUE\np,q,FALSE\np,q,True\np,q,false\n")
    assert [e.label for e in load(path, "boolq")] == [1, 0, 1, 0]


def test_glue_s_own_files(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\n"a , fine film \t1\nso "bad" \t0\na " b"\t1\n')
    assert [(e.prompt, e.label) for e in load(path, "sst2")] == [
        ('"a , fine film\nSentiment:', 1),
        ('so "bad"\nSentiment:', 0),
        ('a " b"\nSentiment:', 1),
    ]
    path.write_text("index\tsentence\n0\ta fine film\n")
    with pytest.raises(InputError, match=r"line 2: key 'label' is missing: .*'index', 'sentence'"):
        load(path, "sst2")


@pytest.mark.parametrize(
    "format, row", [("sst2", "1 caf\xe9 \x85 ."), ("trec", "LOC:x caf\xe9 \x85 ?")]
)
def test_latin_1(tmp_path, format, row):
    """Files that are not UTF-8 are Latin-1, whose U+0085 is no line break."""
    (tmp_path / "file").write_bytes((row + "\n" + row).encode("latin-1"))
    first, second = load(tmp_path / "file", format)
    assert first.prompt == second.prompt and first.prompt.startswith("caf\xe9 \x85")


def test_winogrande_labels_beside_the_file(tmp_path):
    rows = [{**GAP, "qID": str(i)} for i in range(3)]
    (tmp_path / "train.jsonl").write_text(lines(*rows))
    (tmp_path / "train-labels.lst").write_text("2\n1\n2\n")
    both = [tmp_path / "train.jsonl", tmp_path / "train-labels.lst"]
    assert files(both[0], "winogrande") == both and files(both[0], "jsonl") == both[:1]
    assert files(tmp_path / "dev.jsonl", "winogrande") == [tmp_path / "dev.jsonl"]
    assert [e.label for e in load(tmp_path / "train.jsonl", "winogrande")] == [1, 0, 1]
    assert [e.label for e in load(tmp_path / "train.jsonl", "winogrande", 2)] == [1, 0]


@pytest.mark.parametrize(
    "labels, row, message",
    [
        ("\n", GAP, r"set-labels\.lst: 0 labels for the 1 rows of .*set\.jsonl"),
        ("2\n1\n", GAP, r"set-labels\.lst: 2 labels for the 1 rows of .*set\.jsonl"),
        ("2\n", GAP | {"answer": "1"}, r"set\.jsonl, line 1: set-labels\.lst gives another answer"),
        ("3\n", GAP, r"set\.jsonl, line 1: 'answer' must be one of 1, 2, not '3'"),
        (None, GAP, r"set\.jsonl, line 1: key 'answer' is missing"),
    ],
)
def test_winogrande_labels_that_do_not_fit(tmp_path, labels, row, message):
    (tmp_path / "set.jsonl").write_text(lines(row))
    if labels is not None:
        (tmp_path / "set-labels.lst").write_text(labels)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "set.jsonl", "winogrande")


# file under the assets, format, rows as counted there, classes
REAL = [
    ("arc/ARC-Easy-Train.jsonl", "arc", 2251, 5),
    ("arc/ARC-Easy-Dev.jsonl", "arc", 570, 5),
    ("arc/ARC-Easy-Test.jsonl", "arc", 2376, 5),
    ("arc/ARC-Challenge-Train.jsonl", "arc", 1119, 5),
    ("arc/ARC-Challenge-Dev.jsonl", "arc", 299, 5),
    ("arc/ARC-Challenge-Test.jsonl", "arc", 1172, 5),
    ("openbookqa/train.jsonl", "obqa", 4957, 4),
    ("openbookqa/dev.jsonl", "obqa", 500, 4),
    ("openbookqa/test.jsonl", "obqa", 500, 4),
    ("winogrande/train_xs.jsonl", "winogrande", 160, 2),
    ("winogrande/train_s.jsonl", "winogrande", 640, 2),
    ("winogrande/dev.jsonl", "winogrande", 1267, 2),
    ("boolq/dev.jsonl", "boolq", 3270, 2),
    ("mmlu/college_chemistry_test.csv", "mmlu", 100, 4),
    ("mmlu/college_physics_test.csv", "mmlu", 102, 4),
    ("mmlu/conceptual_physics_test.csv", "mmlu", 235, 4),
    ("mmlu/high_school_chemistry_test.csv", "mmlu", 203, 4),
    ("mmlu/high_school_physics_test.csv", "mmlu", 151, 4),
    ("sst2/stsa.binary.train", "sst2", 6920, 2),
    ("sst2/stsa.binary.dev", "sst2", 872, 2),
    ("sst2/stsa.binary.test", "sst2", 1821, 2),
    ("trec/TREC.train", "trec", 5452, 6),
    ("trec/TREC.test", "trec", 500, 6),
]


@pytest.mark.parametrize("name, format, rows, classes", REAL, ids=[r[0] for r in REAL])
def test_real_files(assets, name, format, rows, classes):
    """Row counts, and every letter one token after every prompt of two very unlike tokenizers."""
    examples = load(assets / "data" / name, format)
    assert len(examples) == rows and num_classes(examples) == classes
    assert all(0 <= e.label < len(e.choices) and e.prompt[-1] == ":" for e in examples)
    for model in ("stories260K/tok512.model", "tokenizers/llama2_tokenizer.model"):
        encoded = encode(examples, load_tokenizer(assets / model))
        assert len(encoded.tokens) == rows and len(set(encoded.classes)) == classes


def as_on_the_hub(path, format):
    """The rows of a published file in the Hub's columns."""
    text = path.read_bytes().decode("utf-8" if format != "trec" else "latin-1")
    rows = [line for line in text.split("\n") if line.strip()]
    if format == "mmlu":
        for row in csv.DictReader(io.StringIO(text, newline="")):
            choices = [row[f"choice{i}"] for i in range(4)]
            yield {"question": row["question"], "choices": choices, "answer": int(row["answer"])}
    elif format == "sst2":
        for row in rows:
            yield {"sentence": row[2:].strip() + " ", "label": int(row[0])}
    elif format == "trec":
        order = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
        for row in rows:
            kind, text = row.split(" ", 1)
            yield {"text": text.strip(), "coarse_label": order.index(kind.split(":")[0])}
    elif format == "winogrande":
        labels = path.with_name(f"{path.stem}-labels.lst").read_text().split()
        for row, answer in zip(map(json.loads, rows), labels, strict=True):
            yield without(row, "qID") | {"answer": answer}
    elif format == "boolq":
        for row in map(json.loads, rows):
            kept = {key: row[key] for key in ("question", "passage")}
            yield kept | {"label": int(row["answer"])}
    else:
        stem = "question" if format == "arc" else "question_stem"
        for row in map(json.loads, rows):
            of = row["question"]
            lists = {key: [choice[key] for choice in of["choices"]] for key in ("text", "label")}
            yield {"id": row["id"], stem: of["stem"], "choices": lists,
                   "answerKey": row["answerKey"]}  # fmt: skip


@pytest.mark.parametrize("how", ["lines", "array", "csv", "tsv"])
@pytest.mark.parametrize("name, format", [r[:2] for r in REAL], ids=[r[0] for r in REAL])
def test_real_rows_in_the_hubs_columns(assets, tmp_path, name, format, how):
    """The same questions and answers come out of either layout."""
    published = load(assets / "data" / name, format)
    path = tmp_path / f"file.{how}"
    rows = list(as_on_the_hub(assets / "data" / name, format))
    path.write_text(written(rows, how), newline="", encoding="utf-8")
    found = load(path, format)
    assert [(e.prompt, e.label, e.choices) for e in found] == [
        (e.prompt, e.label, e.choices) for e in published
    ]


def test_real_text_is_decoded_right(assets):
    sst2 = load(assets / "data/sst2/stsa.binary.test", "sst2", 2)
    assert "crème brûlée" in sst2[1].prompt
    trec = load(assets / "data/trec/TREC.train", "trec", 66)
    assert "sister\xf0city" in trec[65].prompt


def test_majority_classes(assets):
    """Two counts taken by other means (cut, sort, uniq): the label order is the documented one."""
    trec = Counter(e.label for e in load(assets / "data/trec/TREC.train", "trec"))
    assert [trec[i] for i in range(6)] == [86, 1162, 1250, 1223, 835, 896]
    boolq = Counter(e.label for e in load(assets / "data/boolq/dev.jsonl", "boolq"))
    assert boolq == {0: 1237, 1: 2033}


ROW = {"prompt": "p", "choices": ["x", "y"], "label": 1}
PLACE = r"label must be the place in choices, from 0 \(here {}\), or one of their names"
LONE = without(ROW, "choices")
HUB_ROW = {"id": "q", "question": "Why?", "choices": TWO_LISTS, "answerKey": "A"}
SCORES = "text,label\n" + "".join(f"a,{i}\n" for i in range(27))
# format, a whole file, what the message must say after the file's name
MALFORMED = [
    ("jsonl", b"", ": holds no examples"),
    ("jsonl", b"\n \n", ": holds no examples"),
    ("jsonl", lines(ROW) + "{", ", line 2: not JSON"),
    ("jsonl", lines(ROW) + "\n[1]\n", ", line 3: expected a JSON object, found .1"),
    ("jsonl", "[" * 100_000, ", entry 1: not JSON"),
    ("jsonl", '{"label": ' + "1" * 5000 + "}", "(, line 1: not JSON|different labels)"),
    ("jsonl", lines(ROW).encode() + b'{"prompt": "\xff"}', ", line 2: expected UTF-8 text"),
    ("jsonl", lines(without(ROW, "prompt")), ", line 1: key 'prompt' is missing"),
    (
        "jsonl",
        lines(without(ROW, "choices")),
        ": expected 2 to 26 different labels in 'label', as no row has 'choices', found 1: .'1'",
    ),
    ("jsonl", lines(without(ROW, "label")), ", line 1: key 'label' is missing"),
    ("jsonl", lines(ROW | {"prompt": 3}), ", line 1: 'prompt' must be a text, not 3"),
    ("jsonl", lines(ROW | {"prompt": " "}), ", line 1: 'prompt' is empty"),
    ("jsonl", '{"prompt": "\\ud800", "choices": ["x", "y"], "label": 0}', "half of a surrogate"),
    ("jsonl", lines(ROW | {"choices": "xy"}), ", line 1: 'choices' must be a list, not 'xy'"),
    ("jsonl", lines(ROW | {"choices": ["x", 1]}), ", line 1: a choice must be a text, not 1"),
    ("jsonl", lines(ROW | {"choices": ["x", ""]}), ", line 1: a choice is empty"),
    ("jsonl", lines(ROW | {"choices": ["x"], "label": 0}), "expected 2 to 26 choices, found 1"),
    ("jsonl", lines(ROW | {"choices": [], "label": 0}), ", line 1: 'choices' is empty"),
    ("jsonl", lines(ROW | {"choices": ["x"] * 27}), ", line 1: expected 2 to 26 choices, found 27"),
    ("jsonl", lines(ROW | {"label": 2}), f", line 1: {PLACE.format('0 to 1')}, not 2$"),
    ("jsonl", lines(ROW | {"label": -1}), f", line 1: {PLACE.format('0 to 1')}, not -1$"),
    ("jsonl", lines(ROW | {"label": "1"}), f", line 1: {PLACE.format('1')}, not '1'$"),
    ("jsonl", lines(ROW | {"label": "2"}), f", line 1: {PLACE.format('0 to 1')}, not '2'$"),
    ("jsonl", lines(ROW | {"label": 1.0}), f", line 1: {PLACE.format('0 to 1')}, not 1.0$"),
    ("jsonl", lines(ROW | {"label": True}), f", line 1: {PLACE.format('0 to 1')}, not True$"),
    ("jsonl", lines(ROW | {"label": "Y"}), rf"{PLACE.format('1')}, not 'Y': did you mean 'y'\?$"),
    ("jsonl", lines(ROW | {"choices": ["x", "x"], "label": "x"}), "choices, .*, not 'x'$"),
    (
        "jsonl",
        lines(ROW | {"prompt": ["x" * 999]}),
        "'prompt' must be a text, not .'x{50,60}[.]{3}$",
    ),
    ("jsonl", lines(ROW | {"id": [1]}), r", line 1: 'id' must be a text or a number, not \[1\]"),
    ("arc", lines(arc_row("F", "ABCD")), "'answerKey' must be one of A, B, C, D, not 'F'"),
    ("arc", lines(arc_row("A", "ABA")), "'answerKey' must be one of A, B, A, not 'A'"),
    ("arc", lines(arc_row("A", "A")), ", line 1: expected 2 to 26 choices, found 1"),
    ("arc", lines(arc_row(1, "AB")), ", line 1: 'answerKey' must be one of A, B, not 1"),
    ("arc", lines({"id": "1", "question": "Why?"}), "key 'choices' is missing: there are ."),
    ("arc", lines(arc_row("A", "AB", ["", "v"])), ", line 1: 'text' is empty"),
    (
        "obqa",
        lines({"id": "1", "question": {"stem": "?", "choices": ["u", "v"]}, "answerKey": "A"}),
        ", line 1: expected an object with the key 'label', found 'u'",
    ),
    ("winogrande", lines(without(GAP, "option2") | {"answer": "1"}), "key 'option2' is missing"),
    ("winogrande", lines(GAP | {"answer": "0"}), "'answer' must be one of 1, 2, not '0'"),
    (
        "boolq",
        lines({"question": "q", "answer": "yes", "passage": "p"}),
        "must be one of false, true",
    ),
    (
        "boolq",
        lines({"question": "q", "answer": 1, "passage": "p"}),
        "must be one of false, true, not 1",
    ),
    ("mmlu", "a,b\n", ", line 1: expected 6 columns, found 2"),
    ("mmlu", "", ": holds no examples"),
    ("mmlu", "q,a,b,c,d,A\n" + HEADER, ", line 2: 'answer' must be one of A, .*not 'answer'"),
    ("mmlu", HEADER, ": holds no examples"),
    ("mmlu", HEADER + "q,a,b,c,d,1\nq,a,b,c,1\n", ", line 3: expected 6 columns, found 5"),
    ("mmlu", HEADER + "q,a,b,c,d,E\n", ", line 2: 'answer' must be one of A, B, .* not 'E'"),
    ("mmlu", HEADER + " ,a,b,c,d,1\n", ", line 2: 'question' is empty"),
    ("mmlu", HEADER + 'q,a,b,"c,d,1\n', ", line 2: not CSV: unexpected end of data"),
    ("sst2", "2 text\n", ", line 1: the label before the text must be one of 0, 1, not '2'"),
    ("sst2", "1 text\n \n0\n", ", line 3: the text is empty"),
    ("trec", "HUM:ind Who ?\nWho ?\n", ", line 2: the type before the question must be one of"),
    ("trec", "HUM:ind\n", ", line 1: the question is empty"),
    ("jsonl", lines(ROW).encode("utf-16"), ": is UTF-16 text: save it as UTF-8$"),
    ("jsonl", "[]", ": holds no examples"),
    ("jsonl", json.dumps([ROW, ROW, 3]), ", entry 3: expected a JSON object, found 3"),
    ("jsonl", json.dumps([ROW, ROW | {"label": 3}], indent=2), ", entry 2: label must be"),
    ("jsonl", json.dumps([ROW])[:-1], ": not JSON: expected , or . and no more after entry 1"),
    ("jsonl", json.dumps([ROW]) + "{}", ": not JSON: expected , or . and no more after entry 1"),
    ("jsonl", json.dumps([ROW])[:-1] + " x", ": not JSON: expected , or . .* after entry 1"),
    ("jsonl", json.dumps([ROW])[:-1] + ",]", ", entry 2: not JSON"),
    ("jsonl", lines(ROW) + json.dumps(ROW, indent=2)[:-2], ", line 2: not JSON"),
    ("jsonl", json.dumps(ROW, indent=2) + "\n\n{}", ", line 10: key 'prompt' is missing"),
    (
        "jsonl",
        lines({"question": "p", "choices": ["x", "y"], "answer": 1}),
        r", line 1: key 'prompt' is missing \(--text-column names another\): there are .'question'",
    ),
    (
        "jsonl",
        lines(without(ROW, "label") | {"answer": 1}),
        r"key 'label' is missing \(--label-column names another\): .*'choices', 'answer'",
    ),
    ("jsonl", lines(LONE, ROW), ", line 2: has 'choices', and the rows before have none"),
    ("jsonl", lines(ROW, LONE), ", line 2: key 'choices' is missing"),
    ("jsonl", lines(LONE, LONE | {"label": 0.5}), ", line 2: 'label' must be a text, not 0.5"),
    ("jsonl", lines(LONE, LONE | {"label": True}), ", line 2: 'label' must be a text, not True"),
    ("arc", lines(HUB_ROW | {"choices": {"text": ["u"], "label": [*"AB"]}}), "has 2 labels for 1"),
    ("arc", lines(HUB_ROW | {"choices": ["u", "v"]}), "'choices' must be an object, not .'u'"),
    ("arc", lines(HUB_ROW | {"choices": {"text": [1, "v"], "label": [*"AB"]}}), "must be a text"),
    ("arc", "id,question,choices,answerKey\nq,Why?,\"['u' 'v\",A\n", ", line 2: 'choices' must be"),
    ("arc", "id,question,answerKey\nq,Why?,A\n", ", line 2: key 'choices' is missing"),
    (
        "mmlu",
        lines({"question": "?", "choices": [*"abc"], "answer": 1}),
        "expected 4 choices, found",
    ),
    (
        "mmlu",
        lines({"question": "?", "choices": [*"abcd"], "answer": 4}),
        "'answer' must be one of",
    ),
    ("mmlu", lines({"question": "?", "choices": [*"abcd"], "answer": 1.0}), "'answer' must be one"),
    ("sst2", lines({"sentence": "a", "label": True}), "'label' must be one of 0, 1, not True"),
    ("sst2", "sentence\tlabel\na\t2\n", ", line 2: 'label' must be one of 0, 1, not '2'"),
    (
        "trec",
        lines({"text": "Who ?", "coarse_label": 6}),
        "'coarse_label' must be one of ABBR, ENTY",
    ),
    ("winogrande", lines(GAP | {"answer": ""}), "'answer' is '': this split has no labels"),
    ("winogrande", lines(GAP | {"answer": None}), "'answer' is None: this split has no labels"),
    ("csv", "", ": holds no examples"),
    ("csv", "text,label\n", ": holds no examples"),
    ("csv", "text,label\na,x\nb,\n", ", line 3: 'label' is empty"),
    ("csv", 'text,label\n"a\nb",x\n ,y\n', ", line 4: 'text' is empty"),
    (
        "csv",
        "text,label\na,x\nb, c,y\n",
        ", line 3: expected 2 columns, found 3: a text with a com",
    ),
    ("csv", "text;label\na;x\nb\n", ", line 3: expected 2 columns, found 1$"),
    ("csv", 'text,label\na,x\n"b,y\nc,x\n', ", line 3: not CSV: unexpected end of data"),
    ("csv", "body,label\na,x\n", ": no column is called text, .*: give --text-column one of .'bod"),
    ("csv", "text,y\na,x\n", ": no column is called label, labels, class, .*: give --label-column"),
    ("csv", "id,text,y\n1,a,x\n", ": no column is called label, .*--label-column one of .'y'.$"),
    ("csv", "id,text\n1,a\n", ": has no column of labels: there are .'id', 'text'.$"),
    (
        "csv",
        "text,Sentence,label\na,b,x\n",
        ": 2 columns are called text, sentence, .*--text-column",
    ),
    ("csv", "text,label,label\na,x,y\n", ": 2 columns are called label, .*'label', 'label'"),
    (
        "csv",
        "text,label\na,x\nb,x\n",
        ": expected 2 to 26 different labels in 'label', found 1: .'x'",
    ),
    (
        "csv",
        SCORES,
        ": expected 2 to 26 different labels in 'label', found 27: .'0', '1', '2', '3'.",
    ),
    ("csv", "text,label\na,0.25\nb,1e0\n", ": 'label' must have names or whole numbers, not 0.25"),
    ("csv", b"text,label\ncaf\xe9,x\n", ", line 2: expected UTF-8 text"),
    ("csv", lines(LONE), ": holds JSON, not a table: give --format jsonl$"),
    ("boolq", b'{"passage": "\xe9", "question": "q", "answer": true}', ", line 1: expected UTF-8"),
]


@pytest.mark.parametrize("format, content, message", MALFORMED)
def test_malformed(tmp_path, format, content, message):
    path = tmp_path / "file.x"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(InputError, match=message) as caught:
        load(path, format)
    assert str(caught.value).startswith(str(path))


def test_a_field_too_long_for_csv(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text(HEADER + "x" * (csv.field_size_limit() + 1) + ",a,b,c,d,1\n")
    with pytest.raises(InputError, match=r"file\.csv, line 2: not CSV: field larger than"):
        load(path, "mmlu")


@pytest.mark.parametrize(
    "text", ["[" + lines(ROW, ROW).replace("}\n{", "},{") + "]", json.dumps(ROW, indent=2) * 2]
)
def test_json_over_several_lines(tmp_path, text):
    (tmp_path / "file").write_text("\ufeff\n" + text + "\n")
    assert [e.id for e in load(tmp_path / "file", "jsonl")] == ["0", "1"]
    assert len(load(tmp_path / "file", "jsonl", limit=1)) == 1


def test_a_label_by_name(tmp_path):
    """A name that looks like a place is still a name; a place is a number."""
    rows = [{"prompt": "p", "choices": ["2", "0", "y"], "label": k} for k in ("0", "y", "2", 0)]
    (tmp_path / "file").write_text(lines(*rows))
    assert [e.label for e in load(tmp_path / "file", "jsonl")] == [1, 2, 0, 0]


def labels(path, format="csv", **options):
    """Labels and choices, which all examples share."""
    examples = load(path, format, **options)
    assert [label_names(examples)] == list({e.choices for e in examples})
    return [e.label for e in examples], label_names(examples)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "text,label\nu,b\nv,a\nw,b\n"),
        ("a.tsv", "text\tlabel\nu\tb\nv\ta\nw\tb\n"),
        ("a.txt", "text\tlabel\nu\tb\nv\ta\nw\tb\n"),
        ("a.csv", "text;label\nu;b\nv;a\nw;b\n"),
        ("a.csv", ",Target,n,Sentence\r\n0,b,,u\r\n1,a,,v\r\n2,b,,w\r\n"),
        ("a.jsonl", lines(*({"prompt": t, "label": k} for t, k in ("ub", "va", "wb")))),
    ],
)
def test_labels_of_the_file_are_the_choices(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, newline="")
    format = "jsonl" if name == "a.jsonl" else "csv"
    assert labels(path, format) == ([1, 0, 1], ("a", "b"))
    assert [e.prompt for e in load(path, format, limit=1)] == ["u\nA. a\nB. b\nAnswer:"]
    # What a model was trained on: other labels, in another order.
    assert labels(path, format, names=["b", "c", "a"]) == ([0, 2, 0], ("b", "c", "a"))
    with pytest.raises(
        InputError, match=f"{name}, line [23]: label 'a' is not one of .'b', 'aa'.: "
    ):
        load(path, format, names=["b", "aa"])


def test_the_usual_columns_are_found_by_their_names(tmp_path):
    path = tmp_path / "file.csv"
    for text in ("text", "sentence", "prompt", "question"):
        for label in ("label", "labels", "class", "category", "target"):
            path.write_text(f"{text.upper()},{label.title()},n\nu,b,1\nv,a,2\n")
            assert labels(path) == ([1, 0], ("a", "b")), (text, label)


def test_there_may_be_as_many_labels_as_letters(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("text,label\n" + "".join(f"a,{i}\n" for i in range(26)))
    assert labels(path) == ([*range(26)], tuple(map(str, range(26))))
    assert load(path, "csv")[0].prompt.endswith("\nZ. 25\nAnswer:")


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("text,label\na,10\nb,9\nc,-1\n")
    assert labels(path) == ([2, 1, 0], ("-1", "9", "10"))
    path.write_text(lines(*({"prompt": "p", "label": i} for i in (10, 9, -1))))
    assert labels(path, "jsonl") == ([2, 1, 0], ("-1", "9", "10"))


def test_labels_that_are_letters_are_choices(tmp_path):
    (tmp_path / "grades.csv").write_text("text,label\nessay,A\nother,B\n")
    prompts = [e.prompt for e in load(tmp_path / "grades.csv", "csv")]
    assert prompts == [f"{text}\nA. A\nB. B\nAnswer:" for text in ("essay", "other")]


def test_an_unknown_label_is_named_with_a_near_one(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("text,label\na,Sports\nb,Sport\n")
    message = "line 3: label 'Sport' is not one of .'News', 'Sports'.: did you mean 'Sports'"
    with pytest.raises(InputError, match=message):
        load(path, "csv", names=["News", "Sports"])


def test_columns_by_name(tmp_path):
    path = tmp_path / "file"
    path.write_text("text,body,label,sort\nu,x,1,b\nu,y,1,a\n")
    assert labels(path, columns=Columns("body", "sort")) == ([1, 0], ("a", "b"))
    assert load(path, "csv", columns=Columns("body", "sort"))[1].prompt.startswith("y\n")
    for columns, option in ((Columns("Body"), "--text-"), (Columns("body", "x"), "--label-")):
        with pytest.raises(
            InputError, match=f"file: no column is called '.*': give {option}column"
        ):
            load(path, "csv", columns=columns)
    path.write_text(lines({"text": "u", "sort": "b", "choices": ["a", "b"]}))
    (example,) = load(path, "jsonl", columns=Columns("text", "sort"))
    assert example.prompt.startswith("u\n") and example.label == 1
    with pytest.raises(InputError, match="are for formats csv and jsonl, not for arc"):
        load(path, "arc", columns=Columns("text"))
    with pytest.raises(InputError, match="are for formats csv and jsonl, not for sst2"):
        load(path, "sst2", columns=Columns(label="sort"))


def test_a_tsv_file_with_lone_quotes(tmp_path):
    """A quote that begins a cell could close rows later, and the rows between would be lost."""
    path = tmp_path / "file.tsv"
    path.write_text('text\tlabel\n"u\tx\nv\ty\nw"\tx\n')
    assert labels(path) == ([0, 1, 0], ("x", "y"))
    path.write_text('text\tlabel\n"u ""1""\n2"\tx\nv\ty\n')
    assert load(path, "csv")[0].prompt.startswith('u "1"\n2\nA. x')
    path.write_text('text\tlabel\n"u\tw"\tx\nv\ty\n')
    assert load(path, "csv")[0].question == "u\tw"


def test_the_format_follows_from_the_name():
    names = ("a.csv", "b/a.TSV", "a.json", "a.jsonl", "a", "csv")
    assert [format_of(name) for name in names] == ["csv", "csv", *["jsonl"] * 4]


def test_arguments(tmp_path):
    with pytest.raises(InputError, match="format must be one of jsonl, arc, obqa.*, not 'squad'"):
        load(tmp_path / "x", "squad")
    with pytest.raises(InputError, match="x: no such file"):
        load(tmp_path / "x", "jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path, "jsonl")
    with pytest.raises(InputError, match="limit must be at least 1"):
        load(tmp_path / "x", "jsonl", limit=0)


# --- texts without labels -------------------------------------------------------------------------

UNLABELLED = [
    ("arc", '{"id": "x", "question": {"stem": "why", "choices": '
            '[{"label": "A", "text": "a"}, {"label": "B", "text": "b"}]}}'),
    ("obqa", '{"id": "x", "question_stem": "why", "choices": '
             '{"label": ["A", "B"], "text": ["a", "b"]}, "answerKey": ""}'),
    ("winogrande", '{"sentence": "why", "option1": "a", "option2": "b"}'),
    ("boolq", '{"passage": "it", "question": "why"}'),
    ("mmlu", '{"question": "why", "choices": ["a", "b", "c", "d"], "answer": -1}'),
    ("sst2", "why is it"),
    ("trec", "why is it"),
    ("csv", "text,other\nwhy,1"),
    ("jsonl", '{"prompt": "why"}'),
    ("jsonl", '[{"text": "why", "id": 7}]'),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text"), UNLABELLED, ids=[name for name, _ in UNLABELLED])
def test_rows_need_no_label_to_be_answered(tmp_path, format, text):
    path = tmp_path / "file"
    path.write_text(text + "\n")
    [(place, example)] = texts(path, format, names=("yes", "no"))
    assert "why" in example.question and example.label == 0 and place in ("line 1", "line 2",
                                                                          "entry 1")  # fmt: skip
    if format not in ("csv", "jsonl"):
        with pytest.raises(InputError):
            load(path, format)


def test_a_text_has_its_rows_own_choices_and_id(tmp_path):
    path = tmp_path / "file"
    path.write_text(lines({"prompt": "p", "text": "t", "choices": [*"uv"], "id": 7}, {"text": "q"}))
    rows = [(e.question, e.choices, e.id) for _, e in texts(path, "jsonl", names=("x", "y"))]
    assert rows == [("p", ("u", "v"), "7"), ("q", ("x", "y"), "1")]
    for format, content in (("csv", "id,text,body\nr,t,p\n,t,q\n"),
                            ("jsonl", lines({"id": "r", "text": "t", "body": "p"},
                                            {"text": "t", "body": "q"}))):  # fmt: skip
        path.write_text(content)
        found = [e for _, e in texts(path, format, Columns("body"), ("x", "y"))]
        assert [(e.question, e.id) for e in found] == [("p", "r"), ("q", "1")]


@pytest.mark.parametrize(
    "format, content, message",
    [
        ("squad", "p", "the format must be one of jsonl, arc, .*, not 'squad'"),
        ("csv", lines({"text": "p"}), "file: holds JSON, not a table: give --format jsonl"),
        ("csv", "", "file: holds no texts"),
        ("csv", "text\n", "file: holds no texts"),
        ("csv", "id,body\n1,p\n", "file: no column is called text, .*: give --text-column one"),
        ("csv", "text,n\np,1\n ,2\n", "file, line 3: 'text' is empty"),
        ("jsonl", lines({"prompt": "p"}, {"body": "p"}), "file, line 2: key 'prompt' is missing"),
        ("trec", "\n", "file: holds no texts"),
        ("boolq", lines({"passage": "p", "question": ""}), "file, line 1: 'question' is empty"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tmp_path, format, content, message):
    (tmp_path / "file").write_text(content)
    with pytest.raises(InputError, match=message):
        list(texts(tmp_path / "file", format, names=("x", "y")))


def test_a_text_without_choices_is_refused(tmp_path):
    (tmp_path / "file").write_text(lines({"prompt": "p"}))
    with pytest.raises(InputError, match="file, line 1: key 'choices' is missing"):
        list(texts(tmp_path / "file", "jsonl"))


def test_labels_are_not_part_of_a_text(tmp_path):
    """With them the texts are those that `load` reads."""
    path = tmp_path / "file"
    for format, content in (("trec", "HUM:ind Who?\nNUM:x How many?\n"),
                            ("sst2", "1 good\n0 bad\n"),
                            ("csv", 'text,label\n"a\nb",x\r\nc,y\n'),
                            ("jsonl", '{"prompt": "a", "label": "x"}\n\n{"prompt": "b", '
                                      '"label": "y"}\n')):  # fmt: skip
        path.write_bytes(content.encode())
        labelled = load(path, format)
        found = [example for _, example in texts(path, format, names=labelled[0].choices)]
        assert [e.question for e in found] == [e.question for e in labelled]
        assert [e.id for e in found] == ["0", "1"]


def test_texts_are_read_as_they_are_asked_for(tmp_path):
    """A broken row is an error when it is reached, and names its line."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n')
    rows = texts(path, "jsonl", names=("x", "y"))
    assert [next(rows)[0], next(rows)[0]] == ["line 1", "line 2"]
    with pytest.raises(InputError, match="a.jsonl, line 3: not JSON"):
        next(rows)
    path.write_text('{"prompt": "a"}\n{\n"prompt": "b"}\n')
    assert [place for place, _ in texts(path, "jsonl", names=("x", "y"))] == ["line 1", "line 2"]
    path.write_bytes(b'{"prompt": "a"}\n\xff\n')
    with pytest.raises(InputError, match="a.jsonl, line 2: expected UTF-8 text"):
        list(texts(path, "jsonl", names=("x", "y")))
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no texts"):
        list(texts(path, "jsonl", names=("x", "y")))


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_a_label_is_no_text_of_pages(tmp_path, format):
    """Each row's prompt lists all labels: a long one would be there as often as there are rows."""
    rows = [("a", "x"), ("b", "y" * 1000)]

    def write(extra):
        named = [(text, label + extra * (text == "b")) for text, label in rows]
        if format == "csv":
            return "text,label\n" + "".join(f"{text},{label}\n" for text, label in named)
        return "".join(json.dumps({"prompt": t, "label": label}) + "\n" for t, label in named)

    path = tmp_path / "rows"
    path.write_text(write(""))
    assert len(load(path, format)) == 2
    path.write_text(write("y"))
    line = 3 if format == "csv" else 2
    with pytest.raises(InputError, match=f"line {line}: 'label' has 1,001 characters"):
        load(path, format)
