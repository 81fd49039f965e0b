"""The token of each answer, by one rule for a whole set of prompts.

"space"  " A", the answer behind a space, if it is a single token after every prompt:
         encode(prompt + " A") == encode(prompt) + [id]
"bare"   "A", without a space, if it is a single token after every prompt
"alone"  the vocabulary's entry "A", whatever the tokenizer makes of it after a prompt; the official
         code (commit 3843000) takes this one (convert_tokens_to_ids)

"auto" takes the first rule that holds. If every prompt ends in a line break or a space, as in a
chat, "bare" comes before "space", because a model goes on without a space there. If "bare" is asked
for and does not hold, "alone" is taken with a notice.

An answer in words may have several tokens. Its first token stands for it, and must differ from the
first tokens of the other answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..support.errors import InputError
from .prompts import AnswerTokens
from .tokenizer import Tokenizer


class Answers(NamedTuple):
    """ids: token of each class, in order. kind: "space", "bare" or "alone". notice: a warning."""

    ids: list[int]
    kind: AnswerTokens
    notice: str | None = None


def answer_tokens(
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    answers: Sequence[str],
    kind: AnswerTokens = "auto",
    words: bool = False,
) -> Answers:
    """The token of each answer after these prompts, as the module's docstring says.

    answers: letters, or with `words` labels of any length. Raises InputError naming the answer and
    the end of a prompt if an answer has no token, or if two answers have the same.
    """
    ends = _ends(prompts)
    if kind != "auto":
        order: list[AnswerTokens] = [kind]
    else:
        order = ["bare", "space"] if all(end[-1:].isspace() for end in ends) else ["space", "bare"]
    problem: InputError | None = None
    for each in order:
        if each == "alone":
            continue
        try:
            return Answers(_after_all(tokenizer, ends, answers, each, words), each)
        except InputError as error:
            problem = problem or error
    if kind == "space":
        raise InputError(f"{problem}: use --answer-tokens bare")
    ids = [_alone(tokenizer, answer, words) for answer in answers]
    notice = f"{problem}: the token of {answers[0]!r} alone stands for it" if problem else None
    return Answers(_distinct(tokenizer, ids, answers), "alone", notice)


def _ends(prompts: Iterable[str]) -> list[str]:
    """One prompt for each ending of the prompts: the last word and the white space behind it."""
    ends: dict[tuple[str, str], str] = {}
    for prompt in prompts:
        stripped = prompt.rstrip()
        word = "".join(stripped[-40:].split()[-1:])
        ends.setdefault((word, prompt[len(stripped) :]), prompt)
    return list(ends.values())


def _after_all(
    tokenizer: Tokenizer, ends: list[str], answers: Sequence[str], kind: str, words: bool
) -> list[int]:
    """The tokens that the answers add to each of the prompts. Raises InputError if they differ."""
    texts = [f" {answer}" if kind == "space" else answer for answer in answers]
    found: list[int] = []
    for end in ends:
        if words:
            ids = _first_tokens(tokenizer, texts, end)
        else:
            ids = tokenizer.class_token_ids(texts, end)
        if found and ids != found:
            raise InputError(f"{texts[0]!r} is another token after {end[-20:]!r} than elsewhere")
        found = ids
    return found


def _first_tokens(tokenizer: Tokenizer, texts: Sequence[str], context: str) -> list[int]:
    before, ids = tokenizer.encode(context), []
    for text in texts:
        tokens = tokenizer.encode(context + text)
        if tokens[: len(before)] != before or len(tokens) == len(before):
            raise InputError(f"label {text!r} does not begin with a token after {context[-20:]!r}")
        ids.append(tokens[len(before)])
    return _distinct(tokenizer, ids, texts)


def _alone(tokenizer: Tokenizer, answer: str, words: bool) -> int:
    """The vocabulary's entry of an answer, or of its first token."""
    id = tokenizer.token_id(answer)
    if id is None and words:
        id = next(iter(tokenizer.encode(answer, bos=False)), None)
    if id is None:
        raise InputError(f"the tokenizer has no token {answer!r}: use another one of the labels")
    return id


def _distinct(tokenizer: Tokenizer, ids: list[int], answers: Sequence[str]) -> list[int]:
    first: dict[int, str] = {}
    for id, answer in zip(ids, answers, strict=True):
        other = first.setdefault(id, answer)
        if other is not answer:
            raise InputError(
                f"labels {other!r} and {answer!r} begin with the same token, "
                f"{tokenizer.decode([id])!r}: rename one, or use --labels letters"
            )
    return ids
