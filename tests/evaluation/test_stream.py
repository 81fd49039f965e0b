"""A file of texts, answered row by row: its bytes, and what may go on where it was stopped."""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest

from scalabl_ref import InputError, Llama
from scalabl_ref.data import Columns, Wording
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation import stream
from scalabl_ref.evaluation.classifier import Classifier, Decision
from scalabl_ref.evaluation.stream import Texts, predict_file

from ..models import tiny_folder

NAMES = ("no 0", "no 1", "no 2")
ROWS = [{"prompt": f"{i} x", "body": "y", "id": id, "label": 0}
        for i, id in enumerate(["a", 'b,"c"', "é", "d", "e", "f", "g", "h", "i"])]  # fmt: skip


@pytest.fixture(scope="module")
def clf(tmp_path_factory) -> Classifier:
    """Of a model without adapters."""
    folder = tiny_folder(tmp_path_factory.mktemp("base") / "model")
    wording = Wording(labels="letters", answer_tokens="bare", names=NAMES)
    model, tokenizer = Llama.from_pretrained(folder), load_tokenizer(folder)
    return Classifier(model, tokenizer, {"format": "jsonl"}, None, wording, 0, weights_sha256="w")


@pytest.fixture
def source(tmp_path) -> Texts:
    return Texts(written(tmp_path / "texts.jsonl", ROWS), "jsonl", Columns(), NAMES)


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Stop(BaseException):
    """In place of kill -9."""


def interrupted(clf: Classifier, source: Texts, out: Path, monkeypatch) -> None:
    """Four rows are done, and of the fifth there is a part."""
    real, calls = Classifier.decisions, []

    def stopped(self, examples, title=""):
        calls.append(examples)
        if len(calls) == 2:
            raise Stop
        return real(self, examples, title)

    monkeypatch.setattr(stream, "CHUNK", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "decisions", stopped)
        with pytest.raises(Stop):
            predict_file(clf, source, out)
    with out.with_name(f"{out.name}.partial").open("a") as file:
        file.write("e,no")


def test_the_bytes_of_a_file(clf, source, tmp_path):
    """In a folder that is made for it, with ids that CSV must quote, and over what a kill left."""
    clf, out = replace(clf, threshold=0.5), tmp_path / "new" / "folder" / "out.csv"
    expected = clf.decide([row["prompt"] for row in ROWS])
    lines = [
        "id,answer,confidence,entropy,mutual_information,decision,prob:no 0,prob:no 1,prob:no 2"
    ]
    for id, d in zip(["a", '"b,""c"""', "é", *"defghi"], expected, strict=True):
        numbers = [f"{n:.6g}" for n in (d.confidence, d.entropy, d.mutual_information)]
        lines.append(",".join([id, d.answer, *numbers, d.decision, *(f"{p:.6g}" for p in d.probs)]))
    assert predict_file(clf, source, out, probs=True) == 9
    assert out.read_bytes() == ("\n".join(lines) + "\n").encode("utf-8")
    out.rename(out.with_name("out.csv.partial"))
    assert predict_file(clf, source, out, probs=True) == 9
    assert out.read_bytes() == ("\n".join(lines) + "\n").encode("utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["out.csv"]
    assert predict_file(clf, source, tmp_path / "out.jsonl") == 9
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    for row, line, d in zip(ROWS, text.splitlines(), expected, strict=True):
        record = {"id": row["id"], "answer": d.answer, "confidence": d.confidence,
                  "entropy": d.entropy, "mutual_information": d.mutual_information,
                  "decision": d.decision}  # fmt: skip
        assert line == json.dumps(record)


def test_without_a_threshold_a_decision_is_empty(clf, source, tmp_path):
    source = replace(source, limit=1)
    for name in ("out.csv", "out.jsonl"):
        assert predict_file(clf, source, tmp_path / name) == 1
    header, row = (tmp_path / "out.csv").read_text().splitlines()
    assert header == "id,answer,confidence,entropy,mutual_information,decision" and row[-1] == ","
    assert json.loads((tmp_path / "out.jsonl").read_text())["decision"] is None


def test_rows_with_choices_of_their_own(clf, tmp_path):
    """Their probabilities stand in .jsonl, beside the choices, but not in .csv."""
    choices = [["one", "two", "three"], ["four", "five"]]
    rows = [{"prompt": "x", "choices": names} for names in choices]
    source = Texts(written(tmp_path / "own.jsonl", rows), "jsonl", Columns())
    clf = replace(clf, wording=replace(clf.wording, names=None))
    for name in ("out.csv", "out.CSV"):
        with pytest.raises(InputError, match="--probs in a .csv file needs the same choices in"):
            predict_file(clf, source, tmp_path / name, probs=True)
    with pytest.raises(InputError, match="out.json: must end in .csv or .jsonl"):
        predict_file(clf, source, tmp_path / "out.json")
    assert predict_file(clf, source, tmp_path / "out.csv") == 2
    assert predict_file(clf, source, tmp_path / "out.jsonl", probs=True) == 2
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["choices"] for row in found] == choices
    assert [len(row["probs"]) for row in found] == [3, 2]
    assert all(row["answer"] in names for row, names in zip(found, choices, strict=True))


def test_a_file_goes_on_only_as_it_was_begun(clf, source, tmp_path, monkeypatch):
    """All that decides its bytes is the same, and the error names what is not."""
    out = tmp_path / "out.csv"
    interrupted(clf, source, out, monkeypatch)
    wording = replace(clf.wording, max_length=50)
    for key, other in {
        "weights_sha256": replace(clf, weights_sha256="v"), "samples": replace(clf, samples=2),
        "seed": replace(clf, seed=1), "design": replace(clf, design="latin"),
        "temperature": replace(clf, temperature=2.0), "threshold": replace(clf, threshold=0.5),
        "batch": replace(clf, batch=2), "max_length": replace(clf, wording=wording),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"out.csv.partial: was begun with another {key}: "):
            predict_file(other, source, out)
    names = Texts(source.path, "jsonl", Columns(), (*NAMES[:2], "other"))
    for key, changed in {
        "limit": replace(source, limit=8), "choices": names,
        "text_column": replace(source, columns=Columns("body")),
        "data_sha256": replace(source, path=written(tmp_path / "fewer.jsonl", ROWS[:8])),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"was begun with another {key}: give another --out"):
            predict_file(clf, changed, out)
    with pytest.raises(InputError, match="was begun with another probs: "):
        predict_file(clf, source, out, probs=True)
    said: list[str] = []
    assert predict_file(clf, source, out, say=said.append) == 9
    assert said == ["going on after 4 of 9 rows"]
    assert predict_file(clf, source, tmp_path / "whole.csv", say=said.append) == 9
    assert len(said) == 1 and out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("damage", [{"rows": -1}, {"rows": "4"}, {"bytes": None}, {"bytes": 10**6},
                                    {"settings": []}])  # fmt: skip
def test_a_damaged_note_is_named(clf, source, tmp_path, monkeypatch, damage):
    out, note = tmp_path / "out.csv", tmp_path / "out.csv.partial.json"
    interrupted(clf, source, out, monkeypatch)
    note.write_text(json.dumps({**json.loads(note.read_text()), **damage}))
    message = "was begun with another" if "settings" in damage else f"not fit its note {note.name}"
    with pytest.raises(InputError, match=message) as error:
        predict_file(clf, source, out)
    assert f"`rm {out}.partial {note}`" in str(error.value)


def test_two_processes_do_not_write_one_file(clf, source, tmp_path):
    with (tmp_path / "out.csv.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(InputError, match="out.csv.partial: another process is writing it"):
            predict_file(clf, source, tmp_path / "out.csv")
    assert predict_file(clf, source, tmp_path / "out.csv") == 9


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [64, 64, 2]), (3, [63, 63, 4]), (64, [64, 64, 2]), (100, [100, 30])]
)
def test_a_chunk_has_whole_batches(clf, tmp_path, monkeypatch, batch, sizes):
    rows = [{"prompt": f"{i} x", "label": 0} for i in range(140)]
    source = Texts(written(tmp_path / "many.jsonl", rows), "jsonl", Columns(), NAMES, limit=130)
    seen, answer = [], Decision("no 0", 1.0, 0.0, 0.0, 0.0, (1.0, 0.0, 0.0))

    def counted(self, examples, title=""):
        seen.append(len(examples))
        return [answer] * len(examples)

    monkeypatch.setattr(Classifier, "decisions", counted)
    out = tmp_path / "out.csv"
    assert predict_file(replace(clf, batch=batch), source, out) == 130
    assert seen == sizes and len(out.read_text().splitlines()) == 131


def test_a_bad_row_is_named_in_any_batch(clf, tmp_path):
    rows = [*ROWS[:5], {**ROWS[5], "prompt": "x" * 300}, *ROWS[6:]]
    source = Texts(written(tmp_path / "bad.jsonl", rows), "jsonl", Columns(), NAMES)
    for batch in (1, 4):
        with pytest.raises(InputError, match=r"bad.jsonl, line 6: .*its prompt has \d+ tokens"):
            predict_file(replace(clf, batch=batch), source, tmp_path / "out.csv")
