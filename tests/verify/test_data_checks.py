"""The checks of questions: each passes, and notices faults in what it is for."""

from __future__ import annotations

import pytest

from scalabl_ref.verify.data_checks import DATA_CHECKS

from .noticing import is_noticed

CHECKS = {check.name: check for check in DATA_CHECKS}


# Fault: the function, its text, the text instead, and the check that must notice.
FAULTS = {
    "labels and texts of choices exchanged": (
        "data.formats:_arc", 'for key in ("label", "text")', 'for key in ("text", "label")',
        "public sets"),
    "labels beside are not read": (
        "data.formats:_with_labels_beside", 'row.setdefault("answer", label)',
        'row.get("answer", label)', "public sets"),
    "no for yes": (
        "data.formats:_boolq", '("false", "true")', '("true", "false")', "public sets"),
    "answers counted from 1": (
        "data.formats:_mmlu", '"0", "1", "2", "3")', '"1", "2", "3", "4")', "public sets"),
    "the header is a row": (
        "data.formats:_mmlu_records", "if i or record[1] != MMLU_HEADER", "", "public sets"),
    "types in the Hub's order": (
        "data.formats:_trec", "TREC_CLASSES.index(TREC_HUB[place % len(TREC_HUB)])",
        "place % len(TREC_HUB)", "public sets"),
    "a missing label is taken": (
        "data.formats:_answer", '(None, "", -1, "-1")', "(None,)", "public sets"),
    "texts of a list joined": (
        "data.rows:_as_json", '", " if found["next"]', '"" if found["next"]', "public sets"),
    "escapes in tens": (
        "data.rows:_unescaped", "int(code, 16)", "int(code, 10)", "public sets"),
    "ids counted from 1": (
        "data.formats:texts", "str(number)", "str(number + 1)", "tables and lines"),
    "labels of the first rows alone": (
        "data.formats:_own", "_names(path, rows(), keys[1], format)",
        "_names(path, iter(list(rows())[:2]), keys[1], format)", "tables and lines"),
    "numbers ordered as texts": (
        "data.formats:_names", "names.sort(key=float)", "names.sort()", "tables and lines"),
    "a name of two choices": (
        "data.formats:_place", "choices.count(label) == 1", "choices.count(label)",
        "tables and lines"),
    "no semicolons": (
        "data.rows:table_of", 'max(",", "\\t", ";", key=first.count)',
        'max(",", "\\t", key=first.count)', "tables and lines"),
    "no quotes between tabs": (
        "data.rows:table_of", 'delimiter != "\\t" or _quotes_pair(lines())', 'delimiter != "\\t"',
        "tables and lines"),
    "blank rows count": (
        "data.rows:records", 'len(cells) > 1 or "".join(cells).strip()', "True",
        "tables and lines"),
    "a byte order mark stays": (
        "data.text:lines_of", '"utf-8-sig" if number == 1 else "utf-8"', '"utf-8"',
        "tables and lines"),
    "the end of an array is not looked for": (
        "data.rows:json_rows", 'if array and text[at:].rstrip() != "]"', "if False",
        "tables and lines"),
    "letters from B on": (
        "data.prompts:_filled", "zip(LETTERS, choices", "zip(LETTERS[1:], choices", "prompts"),
    "as long as the limit": (
        "data.batches:_rows", "len(row) > limit", "len(row) >= limit", "answers"),
    "BOS is not counted": (
        "data.batches:_rows", "limit - start", "limit", "tokens"),
    "no Latin-1": (
        "data.formats:_reader", "other is text_rows", "False", "public sets"),
    "given names for a row's own": (
        "data.formats:_jsonl", 'and "choices" not in row', "", "tables and lines"),
    "a token with the prompt's end": (
        "data.answers:_first_tokens", "if tokens[: len(before)] != before or", "if", "answers"),
    "choices listed with words": (
        "data.prompts:Wording._text", 'template.replace("{choices}\\n", "")', "template",
        "prompts"),
    "an older run's labels are guessed": (
        "data.prompts:Wording.of_run", 'info.get("labels") or "letters"',
        'info.get("labels") or "auto"', "prompts"),
    "an unknown label is the first": (
        "data.prompts:Wording.word", "else len(names)", "else 0", "prompts"),
    "words for public rows": (
        "data.prompts:Wording.could_be_words", "e.format in _OWN_DATA and ", "", "prompts"),
    "letters asked for in words": (
        "data.prompts:Wording._text", '_CHAT_TEMPLATES["letters" if names is None else "words"]',
        '_CHAT_TEMPLATES["letters"]', "chats"),
    "no settings for a template": (
        "data.prompts:Wording.word", ", **FIXED)", ")", "chats"),
    "another template": (
        "data.chat:ChatTemplate.load", '["default"]', '["tools"]', "chats"),
    "BOS twice": (
        "data.batches:_rows", 'wording.style == "plain"', "True", "chats"),
    "bare before space": (
        "data.answers:answer_tokens", 'else ["space", "bare"]', 'else ["bare", "space"]',
        "answers"),
    "one line break is enough": (
        "data.answers:answer_tokens", "if all(end", "if any(end", "answers"),
    "two labels of one token": (
        "data.answers:_distinct", "if other is not answer", "if False", "answers"),
    "the larger of two limits": (
        "data.batches:_rows", "min(limits, default=None)", "max(limits, default=None)", "answers"),
    "labels of rows left out": (
        "data.batches:encode", "[example.label for example in kept]",
        "[example.label for example in asked.examples]", "answers"),
    "ends in another order": (
        "data.tokenizer:_read_settings", "(own, generation, model)", "(own, model, generation)",
        "tokens"),
    "an end by number first": (
        "data.tokenizer:Tokenizer._find_ends",
        "[*([] if own is None else [own]), *settings.ids[end]]",
        "[*settings.ids[end], *([] if own is None else [own])]", "tokens"),
    "the first end alone": (
        "data.tokenizer:_read_settings", "(value if isinstance(value, list) else [value])",
        "(value[:1] if isinstance(value, list) else [value])", "tokens"),
    "one token fewer": (
        "data.tokenizer:_HuggingFace._read", "1 + max(", "max(", "tokens"),
    "a space behind every token": (
        "data.tokenizer:_SentencePiece._encode", "if begins or self._legacy else self._inner",
        "if begins else self._inner", "sentencepieces"),
    "two spaces as one": (
        "data.tokenizer:_SentencePiece._encode", 'start == 0 and text[0] not in " \\u2581"',
        "start == 0", "sentencepieces"),
    "a space is lost": (
        "data.tokenizer:_SentencePiece._decode", "(self._inner if text else self._model)",
        "self._model", "sentencepieces"),
    "BOS against the settings": (
        "data.tokenizer:_SentencePiece.__init__", "or not settings.add_bos", "", "sentencepieces"),
    "the last rows are held out": (
        "data.batches:hold_out", "seed, _SPLIT)[:count]", "seed, _SPLIT)[-count:]", "splits"),
    "a share rounded down": (
        "data.batches:split", "round(fraction", "int(fraction", "splits"),
    "wider windows": (
        "data.batches:TrainingOrder._batches", "self.steps_per_epoch // 4",
        "self.steps_per_epoch // 2", "splits"),
    "the longest first": (
        "data.batches:TrainingOrder._batches", "key=self.lengths.__getitem__",
        "key=lambda i: -self.lengths[i]", "splits"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    is_noticed(monkeypatch, CHECKS, *FAULTS[fault])
