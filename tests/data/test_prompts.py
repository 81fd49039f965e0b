"""Questions as prompts, and templates for them."""

from __future__ import annotations

import pytest

from scalabl_ref.data import (
    label_names,
    load,
    num_classes,
    question,
    read_template,
)
from scalabl_ref.support.errors import InputError


def test_label_names_of_examples_with_choices_of_their_own():
    assert label_names([question("q", "xyz"[:n], "arc") for n in (2, 3)]) is None
    assert label_names([question("q", "xy", "arc")] * 2) == ("x", "y")


def test_question():
    assert question("Why?", ["x", "y"], "arc").prompt == "Why?\nA. x\nB. y\nAnswer:"
    assert question("whole prompt", ["A", "B"], "arc").prompt == "whole prompt"
    assert question("who ?", ["a"] * 6, "trec").prompt == "who ?\nType:"
    for count in (2, 5, 7):
        with pytest.raises(InputError, match=f"format trec has 6 choices, not {count}"):
            question("who ?", ["x"] * count, "trec")
    with pytest.raises(InputError, match="the question is empty"):
        question("", ["A", "B"], "arc")
    with pytest.raises(InputError, match="the format must be one of"):
        question("Why?", ["x", "y"], "squad")


def test_a_prompt_template(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text('Q {"a": {}}: {question}|{choices}|{question}\n\r\n', newline="")
    template = read_template(path)
    assert template == 'Q {"a": {}}: {question}|{choices}|{question}\n'
    # What a row says is not looked at for places a second time.
    example = question("{choices}", ["{question}", "y"], "arc", template=template)
    assert example.prompt == 'Q {"a": {}}: {choices}|A. {question}\nB. y|{choices}\n'
    whole = question("whole prompt", ["A", "B"], "arc", template=template)
    assert whole.prompt == "whole prompt"
    (tmp_path / "set").write_text("1 a gem .\n")
    (found,) = load(tmp_path / "set", "sst2", template="{question} {choices} =>")
    assert found.prompt == "a gem . A. negative\nB. positive =>"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{choices}", r"own\.txt: .* there is no \{question\}"),
        (b"{question} {text}", r"own\.txt: .* \{text\} is neither"),
        (b"{question} \xff", r"own\.txt, line 1: expected UTF-8"),
        (None, r"own\.txt: no such file"),
    ],
)
def test_templates_that_cannot_be(tmp_path, content, message):
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_template(tmp_path / "own.txt")


def test_num_classes():
    examples = [question("q", "xyzuv"[:n], "arc") for n in (2, 5, 3)]
    assert num_classes(examples) == 5 and num_classes([]) == 0
