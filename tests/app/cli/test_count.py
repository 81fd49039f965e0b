"""`scalabl count`."""

from __future__ import annotations

import pytest

from scalabl_ref import AdapterConfig, Llama, adapters, add_adapters
from scalabl_ref.app.configs import count_parameters, find_config

from ..commands import ok, run


def test_counts(capsys):
    count = ok("count --config llama-2-7b", capsys)
    assert count["scalabl"] - count["lora"] == 1040
    assert count["adapted_layers"] == 65
    command = "count --config smollm2-135m --rank 4 --targets q_proj"
    lora = 30 * 2 * 576 * 4
    counts = {"lora": lora, "scalabl": lora + 30 * 2 * 4, "blob": lora + 30 * 576 * 4}
    assert ok(command, capsys).items() >= {"adapted_layers": 30, **counts}.items()
    code, out, _ = run(command, capsys)
    assert code == 0 and out.splitlines() == [
        "smollm2-135m, rank 4, q_proj",
        "base            134,515,008  (0.25 GiB in bfloat16)",
        "adapted layers           30",
        "lora                138,240  (0.53 MiB in float32)",
        "scalabl             138,480  (0.53 MiB in float32)  (+240)",
        "blob                207,360  (0.79 MiB in float32)  (+69,120)",
    ]


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
