"""Tables of several models: which differences they call real."""

from __future__ import annotations

import math

import torch

from scalabl_ref.evaluation import comparison, metrics


def test_the_verdict_is_the_paired_interval():
    """Ours better by a lot, and worse by a lot: the words and the interval say so."""
    results = {"verdict": [
        {"ours": "a", "rival": "b", "difference": [-2.0, -1.0], "no_worse": True},
        {"ours": "a", "rival": "b", "difference": [-1.0, 1.0], "no_worse": True},
        {"ours": "a", "rival": "b", "difference": [1.0, 2.0], "no_worse": False},
    ]}  # fmt: skip
    words = comparison.sentences(results)[1:]
    for sentence, expected in zip(
        words, ("better than", "no worse than", "worse than"), strict=True
    ):
        assert f"is {expected} b" in sentence


def test_bold_is_only_what_the_bootstrap_tells_apart():
    """Two rows that differ by a lot, and two that do not differ at all."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200,), generator=g)
    right = torch.full((200, 2), 0.2).scatter(1, labels[:, None], 0.8)
    even = torch.full((200, 2), 0.5)
    rows = {"good": {"nll": 0.223}, "bad": {"nll": 0.693}}
    best = comparison._best("nll", rows, {"good": [right], "bad": [even]}, labels, 15)
    assert best["name"] == "good" and best["significant"] and best["difference"][1] < 0
    noise = (right.log() + 0.1 * torch.randn(200, 2, generator=g)).softmax(1)
    rows = {"a": {"nll": metrics.nll(right, labels)}, "b": {"nll": metrics.nll(noise, labels)}}
    best = comparison._best("nll", rows, {"a": [right], "b": [noise]}, labels, 15)
    assert not best["significant"]
    never = torch.zeros_like(even)  # two that are infinitely bad have no difference
    never[torch.arange(len(labels)), 1 - labels] = 1
    rows = {"a": {"nll": math.inf}, "b": {"nll": math.inf}}
    best = comparison._best("nll", rows, {"a": [never], "b": [never]}, labels, 15)
    assert not best["significant"] and math.isnan(best["difference"][0])
