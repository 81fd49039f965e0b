"""Initial values, targets, the mean model, and the parameter counts of the paper's models."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from scalabl_ref import AdapterConfig, Llama, adapters, add_adapters, philox4x32
from scalabl_ref.app.configs import CONFIGS, count_parameters, find_config
from scalabl_ref.core.adapter import MIN_LOG_SIGMA
from scalabl_ref.core.config import ADAPTERS, TARGETS
from scalabl_ref.model.attach import Linear
from scalabl_ref.support.errors import InputError

from ..models import TINY, tiny_model
from ..stats import ZTest
from ..tolerances import rounding


@pytest.mark.eq_2
@pytest.mark.eq_3
def test_initialisation_is_the_thin_svd_of_a_kaiming_matrix():
    for adapter in adapters(tiny_model(wake=False)).values():
        s, sigma = adapter.scale()
        rank, d_in = adapter.A.shape
        gram = adapter.A @ adapter.A.T
        assert (gram - torch.eye(rank)).abs().max() <= rounding(torch.float32, d_in)
        assert not adapter.B.any()
        assert (sigma >= 0.05 / math.sqrt(2) * (1 - 1e-6)).all()
        assert (sigma <= 0.05 * (1 + 1e-6)).all()
        # Entries uniform in +-1/sqrt(d_in): the sum of squares, sum(s^2), is at most rank.
        assert 0 < (s**2).sum() < rank


def test_initial_values_are_those_of_the_words():
    """Word by word, in loops: entries 2u - 1 over the root of the fan-in, then the widths."""
    seed, layer, rank, d_in = 2**40 + 3, 21, 3, 5
    stream, key = 2**62 + layer, (seed % 2**32, seed // 2**32)
    words = [w for j in range(5)
             for w in philox4x32((j, stream % 2**32, 2**32 - 1, stream // 2**32), key)]  # fmt: skip
    uniform = [(word + 0.5) / 2**32 for word in words]
    config = AdapterConfig(method="mle", rank=rank)
    plain, drawn = (
        ADAPTERS[c.method](d_in, 4, c, layer, seed, torch.device("cpu"))
        for c in (config, replace(config, method="scalabl", init_sigma=0.5))
    )
    for got, u in zip(plain.A.flatten().tolist(), uniform, strict=False):
        assert abs(got - (2 * u - 1) / math.sqrt(d_in)) <= rounding(torch.float32, 1)
    low = 0.5 / math.sqrt(2)
    for got, u in zip(drawn.scale()[1].tolist(), uniform[rank * d_in :], strict=False):
        assert abs(got - (low + (0.5 - low) * u)) <= rounding(torch.float32, 4)


def test_scaling_is_alpha_over_rank():
    assert AdapterConfig(rank=4).scaling == 2.0 and AdapterConfig(rank=4, alpha=2.0).scaling == 0.5


def kaiming_variance(seed: int, n: int) -> float:
    """d_in times the mean square of n entries U(-1, 1) / sqrt(d_in), less 1/3.

    The squares' sum is sum(s^2). A bound wrong by 3 % is seen.
    """
    model = torch.nn.ModuleDict({"q_proj": Linear(n // 8, 64)})
    add_adapters(model, AdapterConfig(targets=("q_proj",)), seed)
    s, _ = adapters(model)["q_proj"].scale()
    return float((s.detach().double() ** 2).sum()) / 8 - 1 / 3


KAIMING = ZTest(
    "variance of initial values", kaiming_variance, 2**15, replay=2**12, sd=(4 / 45) ** 0.5
)


def test_kaiming_entries_have_the_uniform_variance():
    KAIMING.check(seed=0)


def test_initial_values_are_a_pure_function_of_seed_and_layer():
    def values(seed, **config):
        return {n: a.A for n, a in adapters(tiny_model(wake=False, seed=seed, **config)).items()}

    first, again, other = values(1), values(1), values(2)
    only_v = values(1, targets=("v_proj",))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(not torch.equal(first[n], other[n]) for n in first)
    assert all(torch.equal(first[n], only_v[n]) for n in only_v)
    assert len({tuple(a.flatten().tolist()) for a in first.values()}) == len(first)


def test_layer_ids_are_distinct_and_do_not_depend_on_the_targets():
    every = adapters(tiny_model(targets=TARGETS))
    ids = {name: adapter.layer for name, adapter in every.items()}
    assert len(set(ids.values())) == len(ids) == 2 * 7 + 1
    assert ids["layers.1.attn.v_proj"] == 8 + 2 and ids["lm_head"] == 7
    for name, adapter in adapters(tiny_model()).items():
        assert adapter.layer == ids[name]


@pytest.mark.parametrize("method", ["scalabl", "mle"])
def test_only_adapters_train(method):
    model = tiny_model(method=method)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"A", "B"} if method == "mle" else {"A", "B", "log_s", "log_sigma"})


def test_log_sigma_is_bounded_below():
    model = tiny_model()
    adapter = next(iter(adapters(model).values()))
    with torch.no_grad():
        adapter.log_sigma.fill_(-100.0)
    adapter.bound_()
    assert (adapter.log_sigma == MIN_LOG_SIGMA).all()
    assert (adapter.scale()[1] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("q_porj",)}, "unknown target 'q_porj'"),
        ({"targets": ()}, "targets is empty"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 9}, r"rank 9 is larger than a dimension of layers.0.attn.v_proj \(8, 16\)"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"prior_std": 0.0}, "prior_std must be positive"),
        ({"prior_std": float("nan")}, "prior_std must be positive"),
        ({"sampling": "row"}, "sampling must be one of"),
        ({"method": "mpa"}, "method must be one of"),
        ({"method": "blob", "prior": "layer"}, "prior 'layer' needs method scalabl"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        tiny_model(**change)


def test_adapting_twice_or_nothing_is_an_error():
    with pytest.raises(InputError, match="already has adapters"):
        add_adapters(tiny_model(), AdapterConfig(rank=2))
    with pytest.raises(InputError, match="no layer named k_proj"):
        add_adapters(
            torch.nn.ModuleDict({"q_proj": Linear(4, 4)}),
            AdapterConfig(rank=2, targets=("q_proj", "k_proj")),
        )


@pytest.mark.parametrize(
    ("name", "layers", "lora", "scalabl", "blob"),
    [
        ("qwen2.5-7b", 57, 3_768_320, 3_769_232, 5_402_624),
        ("qwen2.5-32b", 129, 9_646_080, 9_648_144, 14_929_920),
        ("llama-2-7b", 65, 4_483_072, 4_484_112, 6_612_992),
    ],
)
def test_counts_of_the_papers_models(name, layers, lora, scalabl, blob):
    """METHOD, section 1: r = 8 on q_proj, v_proj and the full lm_head."""
    count = count_parameters(find_config(name), 8, ("q_proj", "v_proj", "lm_head"))
    del count["base_parameters"]
    expected = {"adapted_layers": layers, "lora": lora, "scalabl": scalabl, "blob": blob}
    assert count == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen2.5-72b", 72_706_203_648),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_base_sizes_are_the_published_ones(name, parameters):
    model = Llama(CONFIGS[name], device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_config_file_or_its_folder_counts_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    assert find_config(str(tmp_path)) == find_config(str(tmp_path / "config.json")) == TINY
    with pytest.raises(InputError, match="neither a file nor a known model: expected llama-2-7b"):
        find_config("qwen9")
