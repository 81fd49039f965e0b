"""`scalabl count`."""

from __future__ import annotations

import pytest

from scalabl_ref import AdapterConfig, InputError, Llama, adapters, add_adapters
from scalabl_ref.app.configs import CONFIGS, count_parameters, find_config

from ...models import tiny_folder
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


PUBLISHED = {  # parameters, positions, base of RoPE, epsilon of the norms, a tied head
    "llama-2-7b": (6_738_415_616, 4096, 1e4, 1e-5, False),
    "llama-2-13b": (13_015_864_320, 4096, 1e4, 1e-5, False),
    "llama-2-70b": (68_976_648_192, 4096, 1e4, 1e-5, False),
    "llama-3.1-8b": (8_030_261_248, 131072, 5e5, 1e-5, False),
    "llama-3.1-70b": (70_553_706_496, 131072, 5e5, 1e-5, False),
    "qwen2.5-0.5b": (494_032_768, 32768, 1e6, 1e-6, True),
    "qwen2.5-1.5b": (1_543_714_304, 32768, 1e6, 1e-6, True),
    "qwen2.5-3b": (3_085_938_688, 32768, 1e6, 1e-6, True),
    "qwen2.5-7b": (7_615_616_512, 131072, 1e6, 1e-6, False),
    "qwen2.5-14b": (14_770_033_664, 131072, 1e6, 1e-6, False),
    "qwen2.5-32b": (32_763_876_352, 131072, 1e6, 1e-6, False),
    "qwen2.5-72b": (72_706_203_648, 131072, 1e6, 1e-6, False),
    "smollm2-135m": (134_515_008, 8192, 1e5, 1e-5, True),
}


def test_the_known_models_are_those_published():
    assert list(CONFIGS) == list(PUBLISHED)
    for name, (parameters, positions, theta, epsilon, tied) in PUBLISHED.items():
        c = CONFIGS[name]
        found = sum(p.numel() for p in Llama(c, device="meta").parameters())
        assert found == parameters, name
        assert c.head_dim == (64 if name in ("qwen2.5-0.5b", "smollm2-135m") else 128), name
        facts = c.max_position_embeddings, c.rope.theta, c.rms_norm_eps, c.tie_word_embeddings
        assert facts == (positions, theta, epsilon, tied), name
        assert (c.rope.kind == "llama3") == name.startswith("llama-3.1"), name
    rope = CONFIGS["llama-3.1-8b"].rope
    assert rope == type(rope)("llama3", 5e5, 8.0, 1.0, 4.0, 8192) == CONFIGS["llama-3.1-70b"].rope


def test_a_model_is_found_by_its_name_its_folder_or_its_file(tmp_path):
    tiny_folder(tmp_path / "model")
    assert find_config("Qwen2.5-7B") is CONFIGS["qwen2.5-7b"]
    found = find_config(str(tmp_path / "model"))
    assert found.vocab_size == 256 and found == find_config(str(tmp_path / "model/config.json"))
    with pytest.raises(InputError, match="'llama-2-8b' is neither a file .*: did you mean llama-2"):
        find_config("llama-2-8b")
