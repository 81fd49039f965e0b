"""The card beside exported weights, word by word."""

from __future__ import annotations

import dataclasses

import torch

import scalabl_ref
from scalabl_ref import AdapterConfig
from scalabl_ref.core.noise import NOISE_VERSION
from scalabl_ref.interop.card import Card

METRICS = {
    "data": "test.jsonl", "n": 24, "acc": 0.5, "ece": 0.125, "nll": None, "brier": 0.75,
    "temperature": {"n": 24, "acc": 0.5, "ece": 0.0625, "nll": 1.0, "brier": 0.7},
    "ood": {"auroc": 0.5}, "samples": 10, "seed": 3, "bins": 15,
}  # fmt: skip
INFO = {
    "data": "/home/somebody/train.jsonl", "data_sha256": "0f", "examples": 18,
    "train": {"objective": "elbo", "beta": 1.0, "steps": 2, "batch": 6, "lr": 0.01, "seed": 11},
}  # fmt: skip
MEAN = f"""---
library_name: peft
base_model: "owner/model"
base_model_relation: adapter
pipeline_tag: text-generation
tags:
- scalabl_ref
- scalabl
- lora
- bayesian
---

# out: the mean of a scalabl run on owner/model

A LoRA adapter: the mean of a scalabl run of scalabl_ref. It answers as the run does without \
draws: without its uncertainty. The head was adapted only for the tokens 'A' (32), 'B' (33): \
compare their logits with each other; the logits of other tokens are the base's.

## Load

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("owner/model")
model = PeftModel.from_pretrained(base, "out")
```

## Training

- method: scalabl
- rank, alpha: 3, 4.5
- targets: q_proj lm_head
- covariance: diagonal
- prior: fixed, standard deviation 2
- KL: forward, 7.1 nats
- objective: elbo
- beta: 1.0
- steps: 2
- batch: 6
- lr: 0.01
- seed: 11
- data: train.jsonl
- SHA-256 of the data: 0f
- examples trained on: 18

## Metrics

These are metrics of the whole run, not of this file: 10 draws, seed 3, 15 bins.

| data | n | ACC | ECE | NLL | Brier |
|---|---|---|---|---|---|
| test.jsonl | 24 | 0.5000 | 0.1250 | inf | 0.7500 |
| test.jsonl, temperature | 24 | 0.5000 | 0.0625 | 1.0000 | 0.7000 |

## Versions

- scalabl_ref: {scalabl_ref.__version__}
- torch: {torch.__version__}
- noise: {NOISE_VERSION}
"""


def card(method: str, **info) -> Card:
    config = AdapterConfig(method, rank=3, alpha=4.5, targets=("q_proj", "lm_head"), prior_std=2.0)
    return Card("owner/model", config, INFO | info, None, None, [])


def test_the_mean_of_a_run():
    config = card("scalabl").config
    kept = Card("owner/model", config, INFO, "forward, 7.1 nats", METRICS, ["'A' (32)", "'B' (33)"])
    assert kept.text("peft", "the mean", "out") == MEAN


def test_only_a_mean_that_stands_for_draws_lacks_uncertainty():
    without, average = "without its uncertainty", "probabilities averaged over all its draws"
    for method in ("scalabl", "blob", "dropout", "mle", "map", "point"):
        mean, draw = (
            card(method).text("hf", what, "x") for what in ("the mean", "draw 1 of seed 8")
        )
        assert (without in mean) == (method in ("scalabl", "blob", "dropout")), method
        assert without not in draw and average in draw and average not in mean
        assert ("- prior: " in mean) == (method not in ("mle", "dropout"))
        assert ("- covariance: " in mean) == (method == "scalabl")
    for text in (mean, draw):
        assert "## Metrics" not in text and "- KL:" not in text and "was adapted only" not in text


def test_a_merged_draw_of_a_posterior():
    text = card("mle", posterior="laplace", trained_as="mle").text("hf", "draw 1 of seed 8", "m")
    front, title = text.split("---\n")[1].splitlines(), "# m: draw 1 of seed 8 of a laplace run on "
    assert front[0] == "library_name: transformers" and front[2] == "base_model_relation: finetune"
    assert "- laplace" in front and title in text and "- posterior: laplace\n" in text
    assert "\n\nA model with a LoRA merged into its weights: draw 1 of seed 8 of a laplace" in text
    loader = text.split("```python\n")[1].split("```")[0]
    assert loader.endswith('\n\nmodel = AutoModelForCausalLM.from_pretrained("m")\n')


def test_optional_facts_are_on_the_card():
    """Where a run comes from, as JSON, and its scores on other data."""
    more = {"prompt_template": "Frage: \u00e4 {prompt}", "init": {"run": "first", "seed": None}}
    made = card("mle", posterior="subspace", trained_as="map", imported={"from": "peft"}, **more)
    ood = {"n": 5, "acc": 0.25, "ece": 0.5, "nll": 2.0, "brier": 1.5, "auroc": 0.5}
    text = dataclasses.replace(made, metrics={**METRICS, "data": None, "ood": ood}).text(
        "peft", "the mean", "out"
    )
    for line in (
        "- method: map", "- posterior: subspace", '- prompt template: "Frage: \u00e4 {prompt}"',
        '- started from: {"run": "first", "seed": null}', '- imported: {"from": "peft"}',
        "| test | 24 | 0.5000 | 0.1250 | inf | 0.7500 |",
        "| test, temperature | 24 | 0.5000 | 0.0625 | 1.0000 | 0.7000 |",
        "| other data | 5 | 0.2500 | 0.5000 | 2.0000 | 1.5000 |",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    bare = dataclasses.replace(made, info={"train": None}, metrics={"n": 1, "temperature": None})
    assert "- steps" not in bare.text("hf", "the mean", "out")
