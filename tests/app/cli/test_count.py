"""`scalabl count`."""

from __future__ import annotations

import pytest

from scalabl_ref import AdapterConfig, Llama, adapters, add_adapters
from scalabl_ref.app.configs import count_parameters, find_config

from ..commands import ok, run


def test_counts(capsys):
    count = ok("count --config llama-2-7b", capsys)
    assert count["scalabl"] - count["lora"] == 1040
    code, out, _ = run("count --config smollm2-135m --rank 4 --targets q_proj", capsys)
    assert code == 0 and "134,515,008" in out


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-7b"])
def test_a_count_is_that_of_a_models_parameters(name):
    """Of models built anew for each method; down_proj has another width on either side."""
    targets = ("q_proj", "down_proj", "lm_head")
    found = count_parameters(find_config(name), 5, targets)
    for key, method in (("lora", "mle"), ("scalabl", "scalabl"), ("blob", "blob")):
        model = Llama(find_config(name), device="meta")
        assert found["base_parameters"] == sum(p.numel() for p in model.parameters())
        add_adapters(model, AdapterConfig(method=method, rank=5, targets=targets))
        own = adapters(model).values()
        assert found["adapted_layers"] == len(own) == 2 * len(model.layers) + 1
        assert found[key] == sum(p.numel() for a in own for p in a.parameters()), method
