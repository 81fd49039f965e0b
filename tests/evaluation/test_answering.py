"""The answers to a whole data set: each row's own, wherever it stands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.data import Example, Wording, collate
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation.answering import (
    Samples,
    answer_encoded,
    draws_taken,
    encode_for,
    text_keys,
)
from scalabl_ref.evaluation.predict import predict
from scalabl_ref.evaluation.quadrature import predict_exact
from scalabl_ref.evaluation.sequential import Auto, predict_auto
from scalabl_ref.methods import Ensemble, Subspace, Swag

from ..models import tiny_data, tiny_folder, tiny_model
from ..tolerances import rounding

AUTO = Auto(0.05, 0.05, most=20)


def swag(model: Llama) -> Swag:
    found = Swag()
    found.collect(model)
    return found


@pytest.mark.parametrize("samples", [0, 3, AUTO, "exact"])
def test_each_row_has_its_own_answer(samples: Samples):
    """In the order of the data and in any batch; its noise is that of its text."""
    model, data = tiny_model(targets=("lm_head",), init_sigma=1.0), tiny_data(7)
    batch = collate(data, range(7))
    batch = replace(batch, ids=text_keys(model, data.tokens))
    draws = settled = None
    if isinstance(samples, Auto):
        expected, draws, settled = predict_auto(model, batch, samples, seed=5)
    elif samples == "exact":
        expected = predict_exact(model, batch)
    else:
        expected = predict(model, batch, samples, seed=5)
    for size in (3, 32):
        found = answer_encoded(model, data, samples, 5, size, title="")
        assert found.samples == samples and found.encoded is data
        assert found.labels.tolist() == data.labels
        for got, right in zip(found.prediction, expected, strict=True):
            assert (got - right).abs().max() <= rounding(torch.float32, 256)
        if draws is None:
            assert found.draws is None and found.settled is None
        else:
            assert len(set(draws.tolist())) > 1 and len(set(settled.tolist())) == 2
            assert found.draws.equal(draws) and found.settled.tolist() == settled.tolist()
            assert found.settled.dtype == torch.bool  # true and false in predictions.jsonl


def test_a_design_and_a_posterior_are_handed_on():
    model, data = tiny_model(init_sigma=1.0), tiny_data(5)
    batch = replace(collate(data, range(5)), ids=text_keys(model, data.tokens))
    latin = answer_encoded(model, data, 4, 1, title="", design="latin").prediction.probs
    assert (latin - predict(model, batch, 4, 1, design="latin").probs).abs().max() <= 1e-5
    assert (latin - predict(model, batch, 4, 1).probs).abs().max() > 1e-3
    two = Ensemble([adapter_state(tiny_model(seed, init_sigma=1.0)) for seed in (0, 1)])
    found = answer_encoded(model, data, 5, 1, title="", posterior=two)
    right = predict(model, batch, 5, 1, posterior=two)
    assert (found.prediction.probs - right.probs).abs().max() <= 1e-5 and found.samples == 6


def test_draws_that_are_taken():
    drawn, plain = tiny_model(), tiny_model(method="mle")
    two, swags = [adapter_state(plain)] * 2, [swag(plain)] * 2
    for model, posterior, taken in (
        (drawn, None, 5), (plain, None, 0), (plain, swag(plain), 5), (plain, Ensemble(two), 2),
        (plain, Ensemble(two, swags), 6), (drawn, Ensemble([adapter_state(drawn)] * 2), 6),
    ):  # fmt: skip
        assert draws_taken(model, 5, posterior) == taken
        assert draws_taken(model, 0, posterior) == 0
    assert draws_taken(drawn, AUTO, None) == AUTO and draws_taken(drawn, "exact", None) == "exact"


def test_samples_that_a_posterior_or_a_design_cannot_give_are_refused():
    model, data = tiny_model(), tiny_data(2)
    subspace = object.__new__(Subspace)
    for samples, design, posterior, message in (
        ("exact", "independent", Swag(), "the adapters' own draws or a Subspace, not a Swag$"),
        (AUTO, "independent", Swag(), "the adapters' own draws, not a Swag: give a number$"),
        (AUTO, "independent", subspace, "not a Subspace: give a number or exact$"),
        (AUTO, "latin", None, "auto and exact need independent draws, not design 'latin'"),
        ("exact", "antithetic", None, "need independent draws, not design 'antithetic'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            answer_encoded(model, data, samples, 0, title="", posterior=posterior, design=design)


def test_questions_are_encoded_for_the_models_head_and_positions(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    model, tokenizer = Llama.from_pretrained(folder), load_tokenizer(folder)
    examples = [Example("Q", label, str(label), ("a", "b", "c")) for label in (0, 2)]
    assert len(encode_for(model, tokenizer, examples).classes) == 3
    two = encode_for(model, tokenizer, examples[:1]).classes[:2]
    model.trim_head(two)
    assert encode_for(model, tokenizer, examples[:1]).classes == two
    with pytest.raises(InputError, match=r"\(id 2\): its answer is C, but there are 2 classes"):
        encode_for(model, tokenizer, examples)
    wording = Wording(labels="letters", max_length=100)
    found = encode_for(model, tokenizer, examples, wording, answerable=False)
    assert found.labels == [0, 2] and found.classes == two and found.wording.max_length == 100
    with pytest.raises(InputError, match=r"has 201 tokens, but the model takes at most 128"):
        encode_for(model, tokenizer, [replace(examples[0], prompt="x" * 201)])
    other = Llama.from_pretrained(folder).trim_head([3, 4])
    with pytest.raises(InputError, match=r"class tokens .*, but the head was cut .* \[3, 4\]"):
        encode_for(other, tokenizer, examples[:1])
