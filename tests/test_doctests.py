"""The examples in the docstrings of the public names: each has one, and it does what it shows."""

from __future__ import annotations

import doctest
import inspect

import pytest

import scalabl_ref as sr

NAMES = [
    "AdapterConfig", "Llama", "LlamaConfig", "Noise", "adapters", "add_adapters", "elbo",
    "kl_forward", "kl_official", "load_run", "philox4x32", "predict", "save_run",
    "subspace_lora_linear",
]  # fmt: skip
METRICS = [
    "accuracy", "apply_temperature", "auroc", "bootstrap_interval", "bootstrap_intervals", "brier",
    "ece", "entropy", "fit_temperature", "nll", "per_question", "reliability", "risk_coverage",
]  # fmt: skip
# Without an example yet. One that has it must leave: the marks are strict.
WAITING: set[str] = set()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.xfail(reason="no example yet", strict=True)]
            if name in WAITING
            else [],
        )
        for name in (*NAMES, *(f"metrics.{name}" for name in METRICS))
    ],
)
def test_the_example_of_a_public_name_holds(name):
    """It imports all that it needs, as a reader who pastes it must."""
    value = sr
    for part in name.split("."):
        value = getattr(value, part)
    text = inspect.getdoc(value) or ""
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert examples.examples, "no example"
    said: list[str] = []
    doctest.DocTestRunner().run(examples, out=said.append)
    assert not said, "".join(said)


def test_the_names_are_public():
    assert set(NAMES) <= set(sr.__all__)
