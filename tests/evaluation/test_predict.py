"""The predictive distribution, its uncertainties, and generation with them."""

from __future__ import annotations

import importlib
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import InputError, Noise, adapters, predict, subspace_lora_linear
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.core.config import TARGETS
from scalabl_ref.core.objective import class_logits
from scalabl_ref.core.predictive import predictive
from scalabl_ref.evaluation.generate import generate
from scalabl_ref.evaluation.predict import Draws, predict_all
from scalabl_ref.evaluation.sequential import predict_auto
from scalabl_ref.methods import Ensemble, Swag
from scalabl_ref.verify import reference

from ..models import tiny_batch, tiny_model
from ..stats import ZTest
from ..tolerances import rounding

predict_module = importlib.import_module("scalabl_ref.evaluation.predict")


def test_probabilities_are_averaged_and_not_logits():
    """Draws of (.9, .1, .1) have the mean .3667; the softmax of their mean logits is .3247."""
    p = torch.tensor([0.9, 0.1, 0.1], dtype=torch.float64)
    result = predictive(torch.stack((p, 1 - p), -1).log()[:, None])
    assert abs(float(result.probs[0, 0]) - 1.1 / 3) <= rounding(torch.float64, 16)


def test_impossible_classes_have_no_entropy():
    result = predictive(torch.tensor([[[0.0, -math.inf]], [[0.0, -math.inf]]]))
    assert {column.dtype for column in result} == {torch.float64}
    for column in result[1:]:
        assert column.tolist() == [0.0] and not column.signbit().any()  # prints as 0, not as -0


def test_rounding_makes_no_entropy_negative():
    """A probability that is rounded to above 1 has a logarithm above 0."""
    above = torch.tensor([[[torch.finfo(torch.float64).eps, -math.inf]]], dtype=torch.float64)
    assert [column.tolist() for column in predictive(above)[1:]] == [[0.0]] * 3


def test_prediction_is_normalised_and_information_non_negative():
    result = predict(tiny_model(), tiny_batch(), samples=7)
    assert all(t.dtype == torch.float64 for t in result)
    assert (result.probs.sum(-1) - 1).abs().max() <= rounding(torch.float64, 16)
    assert (result.mutual_information > 0).all()


def test_without_width_the_draws_agree():
    model = tiny_model()
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.log_sigma.fill_(-200.0)
    sampled, mean = (predict(model, tiny_batch(), samples=s) for s in (5, 0))
    assert (sampled.probs - mean.probs).abs().max() <= rounding(torch.float32, 256)
    assert sampled.mutual_information.max() <= rounding(torch.float32, 256) ** 2
    assert (mean.mutual_information == 0).all()


@pytest.mark.eq_8
@pytest.mark.eq_9
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_predictive_equals_the_reference(seed, draws, rows, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(draws, rows, classes, generator=generator).double()
    expected = reference.predictive(logits)
    result = predictive(torch.log_softmax(logits, -1))
    for name, value in result._asdict().items():
        slow = torch.tensor(expected[name], dtype=torch.float64)
        assert (value - slow).abs().max() <= rounding(torch.float64, 64), name


def test_an_example_does_not_depend_on_its_batch():
    """Any batching, any order: predict_all puts rows back and their draws follow them."""
    model, batch = tiny_model(init_sigma=1.0), tiny_batch(rows=6)
    others = Ensemble([adapter_state(tiny_model(seed)) for seed in (0, 1)])
    parts = [batch.rows(torch.tensor(rows)) for rows in ([5, 2], [0], [4, 1, 3])]
    for more in ({"design": "latin"}, {"posterior": others}):
        told: list[int] = []
        whole = predict(model, batch, samples=3, seed=2, **more)
        pieces = predict_all(model, parts, samples=3, seed=2, progress=told.append, **more)
        assert told == [2, 1, 3]
        for a, b in zip(whole, pieces, strict=True):
            assert (a - b).abs().max() <= rounding(torch.float32, 256)


def test_there_are_ten_independent_draws_of_seed_0_unless_others_are_asked_for():
    model, batch = tiny_model(init_sigma=1.0), tiny_batch()
    noises = [Noise(0, i) for i in range(10)]
    logits = torch.stack([class_logits(model, batch, noise).double() for noise in noises])
    expected = predictive(logits.log_softmax(-1)).probs
    for found in (predict(model, batch), predict_all(model, [batch])):
        assert (found.probs - expected).abs().max() <= rounding(torch.float32, 200)


def test_a_draw_of_twice_the_weight_is_the_draw_twice():
    g = torch.Generator().manual_seed(0)
    logs = torch.randn(3, 4, 5, dtype=torch.float64, generator=g).log_softmax(-1)
    weights = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    found, right = predictive(logs, weights), predictive(logs[[0, 1, 2, 2]])
    for name, one, other in zip(found._fields, found, right, strict=True):
        assert (one - other).abs().max() <= rounding(torch.float64, 32) * other.abs().max(), name


@pytest.mark.parametrize("design", predict_module.DESIGNS)
def test_draws_of_a_design_are_those_of_its_noise(design, monkeypatch):
    """One by one, all in one pass, and so few tokens at once that there are several passes."""
    model, batch = tiny_model(init_sigma=1.0), tiny_batch()
    draws = Draws(6, 5, design)
    each = [class_logits(model, batch, draws.noise(i)).double() for i in range(6)]
    expected = predictive(torch.stack(each).log_softmax(-1)).probs
    for tokens in (predict_module.TOKENS_AT_ONCE, 2 * int(batch.lengths.sum())):
        monkeypatch.setattr(predict_module, "TOKENS_AT_ONCE", tokens)
        got = predict(model, batch, samples=6, seed=5, design=design).probs
        assert (got - expected).abs().max() <= rounding(torch.float32, 200)


def test_antithetic_draws_of_the_head_average_to_its_mean():
    """What is linear in the noise is averaged exactly by a pair."""
    model, batch = tiny_model(targets=("lm_head",), init_sigma=1.0), tiny_batch()
    draws = Draws(2, 0, "antithetic")
    pair = predict_module.log_probs(model, batch, draws)
    logits = [class_logits(model, batch, n) for n in (draws.noise(0), draws.noise(1), None)]
    assert (pair[0] - pair[1]).abs().max() > 0.1
    assert ((logits[0] + logits[1]) / 2 - logits[2]).abs().max() <= rounding(torch.float32, 50)


def test_where_only_the_head_draws_one_pass_serves_very_many(monkeypatch):
    batch, passes = tiny_batch(), []

    def counted(model, batch, noise, draws):
        passes.append(draws)
        return class_logits(model, batch, noise, draws)

    monkeypatch.setattr(predict_module, "class_logits", counted)
    few = predict_module.TOKENS_AT_ONCE // len(batch.labels)
    predict(tiny_model(targets=("lm_head",)), batch, few + 1)
    predict(tiny_model(), batch, few)
    assert passes[:2] == [few, 1] and len(passes[2:]) > 1


def test_the_mean_model_takes_one_pass_and_one_draw_is_of_no_design():
    for model, samples in ((tiny_model(), 0), (tiny_model(method="mle"), 5)):
        assert predict_module.log_probs(model, tiny_batch(), Draws(samples)).shape == (1, 4, 3)
    model, batch = tiny_model(init_sigma=1.0), tiny_batch()
    one = [predict_module.log_probs(model, batch, Draws(1, 5, d)) for d in ("latin", "independent")]
    assert torch.equal(*one)


def test_a_wrong_design_is_refused():
    model, batch = tiny_model(), tiny_batch()
    with pytest.raises(InputError, match="design must be one of"):
        predict(model, batch, design="sobol")
    with pytest.raises(InputError, match="independent, not latin"):
        predict(model, batch, posterior=Swag(), design="latin")


def test_too_many_or_negative_samples_are_refused():
    model, batch = tiny_model(method="mle"), tiny_batch()
    swag = Swag()
    swag.collect(model)
    for posterior in (None, swag, Ensemble([swag.mean])):
        with pytest.raises(InputError, match="samples must not be negative"):
            predict(model, batch, samples=-1, posterior=posterior)
        with pytest.raises(InputError, match="samples must be at most 100,000, and is 100,001"):
            predict(model, batch, samples=100_001, posterior=posterior)
    predict_module.check_samples(100_000)


@pytest.mark.parametrize("targets", [TARGETS, ("lm_head",)])
def test_no_examples_have_no_predictions(targets):
    model, batch = tiny_model(targets=targets), tiny_batch()
    parts = (batch.tokens, batch.lengths, batch.labels, batch.ids)
    empty = type(batch)(*(part[:0] for part in parts), batch.classes)
    for result in (predict(model, empty), predict(model, empty, 0), predict_auto(model, empty)[0]):
        assert [tuple(tensor.shape) for tensor in result] == [(0, 3), (0,), (0,), (0,)]


@pytest.mark.parametrize("sampling", ["batch", "example", "token"])
def test_generation_equals_uncached_decoding(sampling):
    model = tiny_model(trim=False, sampling=sampling)
    prompt, tokens = [3, 1, 4], []
    for token in generate(model, prompt, 8, samples=3, seed=5):
        inputs = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logits = [model(inputs, noise=Noise(5, i))[:, -1] for i in range(3)]
        expected = predictive(torch.log_softmax(torch.stack(logits).double(), -1))
        assert token.id == int(expected.probs.argmax())
        for name in ("entropy", "mutual_information"):
            difference = getattr(token, name) - float(getattr(expected, name))
            assert abs(difference) <= rounding(torch.float32, 256)
        assert token.mutual_information > 0
        tokens.append(token.id)
    assert len(tokens) == 8


def test_generation_stops():
    model = tiny_model(trim=False)
    first = next(iter(generate(model, [1], 5))).id
    assert list(generate(model, [1], 5, stop=(first,))) == []
    written = [token.id for token in generate(model, [1], 12)]
    other = next(i for i in written if i != first)
    assert [t.id for t in generate(model, [1], 12, stop=(other, first + 99))] == (
        written[: written.index(other)]
    )
    assert list(generate(model, [1], 12, stop=(other, first))) == []
    assert list(generate(model, [1], 0)) == []
    limit = model.config.max_position_embeddings
    assert len(list(generate(model, [1] * (limit - 2), 50))) == 3
    with pytest.raises(InputError, match="prompt is empty"):
        list(generate(model, [], 5))
    with pytest.raises(InputError, match="cut down to class tokens"):
        list(generate(tiny_model(), [1], 5))
    assert len(list(generate(model, [1] * limit, 5))) == 1
    with pytest.raises(InputError, match=f"has {limit + 1} tokens, .* at most {limit}$"):
        list(generate(model, [1] * (limit + 1), 5))
    with pytest.raises(InputError, match="max_new_tokens must not be negative"):
        generate(model, [1], -1)  # when it is called, not at the first token


# --- convergence: errors fall as 1 / sqrt S -----------------------------------------------------

DRAWS = (1, 4, 16, 64)


@cache
def drawn_head():
    """A layer of rank 2, an input, and moments of the first class' probability under one draw.

    Returns (x, W, A, B, s, sigma), the mean, and the second to fourth central moments.
    """
    g = torch.Generator().manual_seed(5)
    x, W, A, B = (
        torch.randn(*shape, generator=g).double() for shape in ((1, 4), (3, 4), (2, 4), (3, 2))
    )
    s, sigma = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.5, 0.8]).double()
    nodes, weights = reference.gauss_hermite(48)
    eps = torch.cartesian_prod(nodes, nodes)
    weight = torch.cartesian_prod(weights, weights).prod(1)
    logits = x @ W.T + 1.5 * ((x @ A.T) * (s + sigma * eps)) @ B.T
    p = logits.softmax(-1)[:, 0]
    mean = float(weight @ p)
    return (x, W, A, B, s, sigma), mean, [float(weight @ (p - mean) ** k) for k in (2, 3, 4)]


def squared_errors(seed: int, n: int) -> torch.Tensor:
    """For each S: mean over n predictions of S (error)^2 / variance, less 1, over its sd."""
    (x, W, A, B, s, sigma), mean, moments = drawn_head()
    out = []
    for index, draws in enumerate(DRAWS):
        rows = x.expand(draws * n, 4)
        logits = subspace_lora_linear(
            rows, W, None, A, B, s, sigma, 1.5, Noise(seed, index), 0, "token"
        )
        result = predictive(logits.log_softmax(-1).view(draws, n, 3))
        error = result.probs[:, 0] - mean
        out.append(((draws * error**2 / moments[0]).mean() - 1) / deviation(draws))
    return torch.stack(out)


def deviation(draws: int) -> float:
    """Standard deviation of S (error)^2 / variance: 2 and the kurtosis' excess over S."""
    variance, _, fourth = drawn_head()[2]
    return (2 + (fourth / variance**2 - 3) / draws) ** 0.5


CONVERGENCE = ZTest(
    "predictive: variance 1 / S", squared_errors, n=4000, count=len(DRAWS), skew=8**0.5,
    replay=250, exact=False,
)  # fmt: skip


def test_the_predictive_converges_as_one_over_the_root_of_the_draws():
    CONVERGENCE.check(seed=4)
