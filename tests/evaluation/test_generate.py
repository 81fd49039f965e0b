"""Text drawn from the mixture: the distribution, its tail, its noise; and text that streams."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import InputError, Noise
from scalabl_ref.core.noise import philox_words
from scalabl_ref.core.predictive import predictive
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation.generate import TEXT_STREAM, choose, generate, pieces, warped

from ..models import tiny_folder, tiny_model
from ..stats import ChiSquare
from ..tolerances import rounding

PROMPT = [3, 1, 4]
LOGITS = torch.tensor([-1.5, 1.0, -0.5, 0.7, 0.0, 0.1, -0.2, 1.2], dtype=torch.float64)


def softmax(logits: torch.Tensor, temperature: float) -> list[float]:
    weights = [math.exp(v / temperature) for v in logits.tolist()]
    return [w / math.fsum(weights) for w in weights]


def frequencies(temperature: float) -> ChiSquare:
    """Eight tokens: the most even cells have the smaller probability, as ChiSquare wants it."""
    return ChiSquare(
        f"tokens at temperature {temperature:g}",
        lambda seed, n: choose(
            warped(LOGITS.softmax(0), temperature), philox_words(seed, TEXT_STREAM, n)
        )[None],
        n=2**18,
        replay=2**14,
        cells=8,
        shares=tuple(softmax(LOGITS, temperature)),
    )


FREQUENCIES = [frequencies(0.7), frequencies(1.3)]


@pytest.mark.parametrize("assertion", FREQUENCIES, ids=lambda a: a.name)
def test_frequencies_are_those_of_the_softmax(assertion):
    assertion.check(seed=3)


def test_each_token_has_a_word_of_its_own():
    """The text is what the mixtures, without a cache, and the stream's words make."""
    model, tokens = tiny_model(trim=False), []
    words = philox_words(5, 2**61, 8)  # the stream of texts, in all versions
    for i, token in enumerate(generate(model, PROMPT, 8, 3, 5, temperature=1.5, top_p=0.9)):
        inputs = torch.tensor([PROMPT + tokens])
        with torch.no_grad():
            logits = [model(inputs, noise=Noise(5, draw))[:, -1] for draw in range(3)]
        expected = predictive(torch.log_softmax(torch.stack(logits).double(), -1))
        assert token.id == int(choose(warped(expected.probs[0], 1.5, 0.9), words[i]))
        difference = token.probability - float(expected.probs[0, token.id])
        assert abs(difference) <= rounding(torch.float32, 256)
        tokens.append(token.id)
    greedy = [token.id for token in generate(model, PROMPT, 8, 3, 5)]
    assert len(tokens) == 8 and tokens != greedy


def test_temperature_0_is_the_limit_of_low_temperatures():
    model = tiny_model(trim=False)
    texts = [[t.id for t in generate(model, PROMPT, 12, 2, temperature=t)]
             for t in (0.0, 1e-9, 1e-300, 5e-324)]  # fmt: skip
    assert all(text == texts[0] for text in texts) and len(set(texts[0])) > 1


@pytest.mark.parametrize(
    ("temperature", "top_p", "message"),
    [(-1.0, 1.0, "temperature must be finite"), (math.nan, 1.0, "temperature must be finite"),
     (math.inf, 1.0, "temperature must be finite"), (1.0, 0.0, "top_p must be above 0"),
     (1.0, 1.5, "top_p must be above 0"), (0.0, 0.5, "top_p needs a temperature")],
)  # fmt: skip
def test_what_cannot_be_is_an_error(temperature, top_p, message):
    with pytest.raises(InputError, match=message):
        list(generate(tiny_model(trim=False), PROMPT, 1, temperature=temperature, top_p=top_p))


# Of eighths, so that sums are exact and ties are frequent; some tokens have none.
EIGHTHS = st.lists(st.integers(0, 7), min_size=0, max_size=7).map(
    lambda cuts: (
        torch.tensor(
            [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 8], strict=True)]
        ).double()
        / 8
    )
)


@given(EIGHTHS, st.integers(1, 8))
def test_top_p_keeps_the_smallest_set_that_reaches_p(probs, eighths):
    kept = warped(probs, 1.0, eighths / 8)
    chosen = kept > 0
    mass = float(probs[chosen].sum())
    assert mass >= eighths / 8 and mass - float(probs[chosen].min()) < eighths / 8
    assert (kept - probs * chosen / mass).abs().max() <= rounding(torch.float64, 32)
    for i in torch.nonzero(chosen).flatten().tolist():
        for j in torch.nonzero(~chosen).flatten().tolist():
            assert (probs[i], -i) > (probs[j], -j)  # of equal ones the lower ids


@given(EIGHTHS)
def test_the_ends_of_top_p(probs):
    assert (warped(probs, 1.0, 1.0) - probs).abs().max() <= rounding(torch.float64, 16)
    alone = torch.zeros_like(probs)
    alone[probs.argmax()] = 1.0
    assert torch.equal(warped(probs, 1.0, 1e-300), alone)


@given(EIGHTHS)
def test_inversion(probs):
    """Words at the ends of each token's interval; a token without probability is never chosen."""
    ends, ids = probs.cumsum(0), [i for i, p in enumerate(probs.tolist()) if p]
    above = (ends * 2**32).long()[ids]
    assert choose(probs, above - 1).tolist() == ids
    assert choose(probs, torch.cat((torch.zeros(1).long(), above[:-1]))).tolist() == ids


def test_a_cumulative_probability_of_u_does_not_exceed_it():
    probs = torch.tensor([2**-33, 1 - 2**-33], dtype=torch.float64)
    assert choose(probs, torch.tensor([0, 1])).tolist() == [1, 1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token for each byte."""
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("bytes") / "model"))


@given(st.text(min_size=1), st.text())
def test_pieces_join_to_the_text_a_character_at_a_time(tokenizer, prompt, text):
    """Each piece is one character, however many bytes it has."""
    found = list(pieces(tokenizer, tokenizer.encode(prompt), tokenizer.encode(text)))
    assert "".join(found) == prompt + text
    if "\ufffd" not in prompt + text:
        assert found == [prompt, *text]


@given(st.lists(st.integers(0, 255)), st.lists(st.integers(0, 255)))
def test_pieces_of_bytes_that_are_no_text_join_too(tokenizer, prompt, ids):
    found = list(pieces(tokenizer, prompt, ids))
    assert "".join(found) == tokenizer.decode(prompt + ids)


def test_a_piece_comes_before_the_next_token_is_asked(tokenizer):
    asked = []

    def ids():
        for id in tokenizer.encode("a€b"):
            asked.append(id)
            yield id

    seen = [(piece, len(asked)) for piece in pieces(tokenizer, tokenizer.encode("x"), ids())]
    assert seen == [("x", 0), ("a", 1), ("€", 4), ("b", 5)]
