"""The model: against explicit loops, with cache, padding, sampling, and half precision."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_ref import InputError, Llama, LlamaConfig, Noise, adapters
from scalabl_ref.core.adapter import SubspaceAdapter
from scalabl_ref.core.objective import class_logits
from scalabl_ref.fast.blocks import SwiGLU
from scalabl_ref.fast.rows import PackedAttention, PackedContext, Rows
from scalabl_ref.model.config import RopeConfig
from scalabl_ref.model.inputs import KVCache
from scalabl_ref.model.llama import Attention, Context, RMSNorm, rotate
from scalabl_ref.verify import formulas, vectors

from ..models import CLASSES, TINY, tiny_batch, tiny_model
from ..tolerances import rounding


@st.composite
def configs(draw) -> LlamaConfig:
    kv_heads, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return dataclasses.replace(
        TINY,
        hidden_size=draw(st.sampled_from([12, 16])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=kv_heads * repeats,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        rope=draw(
            st.sampled_from(
                [RopeConfig(), RopeConfig("linear", 500.0, 4.0), RopeConfig("llama3", 1e4, 8.0)]
            )
        ),
    )


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, TINY.vocab_size, (rows, length), generator=generator)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to float32 rounding through a few layers, relative to the largest value."""
    return bool((a - b).abs().max() <= rounding(torch.float32, 256) * b.abs().max().clamp(min=1))


# --- parts against explicit loops --------------------------------------------------------------


def test_rope_turns_each_pair_by_its_angle():
    head_dim, inverse = 6, RopeConfig(theta=100.0).inverse_frequencies(6)
    x = torch.randn(1, 1, 5, head_dim, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(5.0)[:, None] * torch.cat((inverse, inverse))
    turned = rotate(x, angles.cos(), angles.sin())
    for position in range(5):
        for i in range(3):
            angle = position / 100.0 ** (2 * i / head_dim)
            a, b = x[0, 0, position, i].item(), x[0, 0, position, i + 3].item()
            expected = complex(a, b) * complex(math.cos(angle), math.sin(angle))
            got = complex(turned[0, 0, position, i].item(), turned[0, 0, position, i + 3].item())
            assert abs(got - expected) <= rounding(torch.float32, 16) * max(1, abs(expected))


def test_rope_scalings_equal_their_formulas():
    plain = RopeConfig(theta=500000.0).inverse_frequencies(128)
    linear = RopeConfig("linear", 500000.0, 4.0).inverse_frequencies(128)
    assert torch.equal(linear, plain / 4)
    scaled = RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192).inverse_frequencies(128)
    for old, new in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / old
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        expected = (1 - smooth) * old / 8 + smooth * old
        if wavelength > 8192 / 1.0:
            expected = old / 8
        elif wavelength < 8192 / 4.0:
            expected = old
        assert abs(new - expected) <= rounding(torch.float32, 8) * expected
    assert scaled[0] == plain[0] and scaled[-1] < plain[-1]


@pytest.mark.usefixtures("bodies")
def test_rmsnorm_equals_its_formula():
    norm = RMSNorm(5, eps=0.1)
    norm.weight.data = torch.arange(1.0, 6.0)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for row, out in zip(x.tolist(), norm(x).tolist(), strict=True):
        root = math.sqrt(sum(v * v for v in row) / 5 + 0.1)
        for i in range(5):
            assert abs(out[i] - (i + 1) * row[i] / root) <= rounding(torch.float32, 32)


@pytest.mark.parametrize("kind", [Attention, PackedAttention])
@given(configs())
@settings(max_examples=20)
def test_attention_equals_explicit_loops(kind, config):
    """Grouped queries, causal softmax and RoPE, one query at a time in float64."""
    layer = kind(config, 0).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double() / 2
    T, h = 4, config.head_dim
    x = torch.randn(1, T, config.hidden_size, generator=generator).double()
    inverse = config.rope.inverse_frequencies(h).double()
    angles = torch.arange(T)[:, None] * torch.cat((inverse, inverse))
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    ctx = Context(cos, sin, None, None)
    if kind is PackedAttention:
        ctx = PackedContext(Rows(1, T), cos, sin, None, None, None, None, 0)
    got = layer(x, ctx)[0]

    def heads(linear, count):
        rows = x[0] @ linear.weight.T + (linear.bias if linear.bias is not None else 0)
        return rows.view(T, count, h)

    def turn(v, position, norm):
        if norm is not None:
            v = v / (v.pow(2).mean() + norm.eps).sqrt() * norm.weight
        a, b = v[: h // 2], v[h // 2 :]
        cos, sin = (position * inverse).cos(), (position * inverse).sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin))

    q = heads(layer.q_proj, config.num_attention_heads)
    k, v = (heads(p, config.num_key_value_heads) for p in (layer.k_proj, layer.v_proj))
    for t in range(T):
        parts = []
        for head in range(config.num_attention_heads):
            kv = head // (config.num_attention_heads // config.num_key_value_heads)
            query = turn(q[t, head], t, layer.q_norm)
            keys = [turn(k[s, kv], s, layer.k_norm) for s in range(t + 1)]
            weights = torch.stack([query @ key for key in keys]).div(math.sqrt(h)).softmax(0)
            parts.append(sum(w * v[s, kv] for s, w in enumerate(weights)))
        expected = layer.o_proj.weight @ torch.cat(parts)
        if layer.o_proj.bias is not None:
            expected = expected + layer.o_proj.bias
        size = expected.abs().max().clamp(min=1)
        assert (got[t] - expected).abs().max() <= rounding(torch.float64, 512) * size


# --- the whole model ---------------------------------------------------------------------------


@pytest.mark.usefixtures("bodies")
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True}])
@torch.no_grad()
def test_the_model_equals_its_formulas(options):
    """Every norm with weights of its own: none can stand in for another."""
    config, weights = vectors._tiny_weights(1, **options)
    model = Llama(config).double()
    model.load_state_dict(weights)
    tokens = random_tokens(2, 6) % config.vocab_size
    expected = formulas.llama(weights, config, tokens) @ weights["lm_head.weight"].T
    assert (model(tokens) - expected).abs().max() <= rounding(torch.float64, 256)


@given(configs(), st.integers(0, 1000))
@settings(max_examples=25)
@torch.no_grad()
def test_cached_decoding_equals_uncached(config, seed):
    model, tokens = Llama(config).init_random_(seed, std=0.3), random_tokens(2, 9, seed)
    whole = model(tokens)
    cache = KVCache(config.num_hidden_layers)
    pieces = [model(part, cache=cache) for part in tokens.split([4, 1, 3, 1], dim=1)]
    assert len(cache) == 9
    assert close(torch.cat(pieces, dim=1), whole)


@given(configs(), st.integers(0, 1000))
@settings(max_examples=25)
@torch.no_grad()
def test_padded_rows_equal_unpadded_ones(config, seed):
    model = Llama(config).init_random_(seed, std=0.3)
    rows = [random_tokens(1, n, seed + n)[0] for n in (3, 7, 5)]
    alone = [model(row[None])[0] for row in rows]
    right, left = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for i, row in enumerate(rows):
        right[i, : len(row)] = row
        left[i, 7 - len(row) :] = row
        mask[i, 7 - len(row) :] = True
    lengths = torch.tensor([len(row) for row in rows])
    by_lengths, by_mask = model(right, lengths=lengths), model(left, mask=mask)
    last_right = model(right, lengths=lengths, last_only=True)
    last_left = model(left, mask=mask, last_only=True)
    for i, expected in enumerate(alone):
        assert close(by_lengths[i, : len(expected)], expected)
        assert close(by_mask[i, 7 - len(expected) :], expected)
        assert close(last_right[i], expected[-1]) and close(last_left[i], expected[-1])


@torch.no_grad()
def test_a_mask_may_pad_on_the_right_or_in_the_middle():
    model, tokens = Llama(TINY).init_random_(0, std=0.3), random_tokens(1, 5)
    expected = model(tokens)[0]
    for gaps in ([0, 1, 2, 3, 4], [0, 2, 3, 5, 6]):
        spread, mask = torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 7, dtype=torch.bool)
        spread[0, gaps], mask[0, gaps] = tokens[0], True
        assert close(model(spread, mask=mask)[0, gaps], expected)
        assert close(model(spread, mask=mask, last_only=True)[0], expected[-1])


@pytest.mark.parametrize("by", ["lengths", "mask"])
@torch.no_grad()
def test_what_comes_after_padding_in_a_cache_needs_a_mask(by):
    """With it, rows go on as they would alone; without it, they would see the padding."""
    model, rows = Llama(TINY).init_random_(0, std=0.3), [random_tokens(1, n + 2) for n in (5, 3)]
    first, lengths = torch.zeros(2, 5, dtype=torch.long), torch.tensor([5, 3])
    for i, row in enumerate(rows):
        first[i, : lengths[i]] = row[0, :-2]
    mask = torch.arange(5) < lengths[:, None]
    cache, more = KVCache(2), torch.cat([row[:, -2:] for row in rows])
    model(first, cache=cache, **{by: {"lengths": lengths, "mask": mask}[by]})
    with pytest.raises(InputError, match="the cache holds padding"):
        model(more[:, :1], cache=cache)
    for i in range(2):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.bool)), dim=1)
        got = model(more[:, i : i + 1], cache=cache, mask=mask)
        for b, row in enumerate(rows):
            assert close(got[b, 0], model(row)[0, i - 2])
        with pytest.raises(InputError, match="the cache holds padding"):
            model(more[:, :1], cache=cache, lengths=torch.tensor([1, 1]))
    none, full = {"lengths": torch.tensor([5, 5]), "mask": torch.ones(2, 5).bool()}, KVCache(2)
    model(first, cache=full, **{by: none[by]})
    assert close(model(more, cache=full), model(torch.cat((first, more), dim=1))[:, 5:])


@pytest.mark.parametrize("sampling", ["batch", "example", "token"])
@torch.no_grad()
def test_a_draw_does_not_see_cache_or_padding(sampling):
    """One draw is one function: the same logits however the tokens arrive."""
    model, tokens, noise = tiny_model(sampling=sampling), random_tokens(2, 6), Noise(1, 2)
    groups = torch.tensor([5, 9])
    whole = model(tokens, noise=noise, groups=groups)
    cache = KVCache(2)
    parts = [
        model(t, noise=noise, groups=groups, cache=cache) for t in tokens.split([2, 3, 1], dim=1)
    ]
    assert close(torch.cat(parts, dim=1), whole)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), tokens), dim=1)
    mask = padded.ne(0)
    left = model(padded, noise=noise, groups=groups, mask=mask)
    assert close(left[:, 3:], whole)
    last = model(padded, noise=noise, groups=groups, mask=mask, last_only=True)
    assert close(last, whole[:, -1])
    swapped = model(tokens.flip(0), noise=noise, groups=groups.flip(0))
    assert close(swapped.flip(0), whole)


@pytest.mark.parametrize("sampling", ["batch", "example", "token"])
@pytest.mark.parametrize("adapted", ["all blocks", "the last block", "the head"])
@torch.no_grad()
def test_draws_together_equal_draws_apart(sampling, adapted):
    """One pass for three draws; with padding and without, all tokens and the last alone."""
    model, noise = tiny_model(sampling=sampling, trim=False), Noise(1, 2)
    for name, layer in model.named_modules():
        if adapted != "all blocks" and name.startswith("layers.0"):
            layer.adapter = None
        if adapted == "the head" and name.startswith("layers"):
            layer.adapter = None
    tokens, groups, lengths = random_tokens(3, 6), torch.tensor([5, 2, 9]), torch.tensor([6, 2, 4])
    mask = torch.arange(6) >= 6 - lengths[:, None]
    for padding in ({}, {"lengths": lengths}, {"mask": mask}):
        for last_only in (False, True):
            options = {"groups": groups, "last_only": last_only, **padding}
            together = model(tokens, noise=noise, draws=3, **options).unflatten(0, (3, 3))
            real = torch.ones(3, 6, dtype=torch.bool) if last_only or not padding else (
                mask if "mask" in padding else mask.flip(1)
            )  # fmt: skip
            for i, got in enumerate(together):
                expected = model(tokens, noise=Noise(1, 2 + i), **options)
                same = got - expected if last_only else (got - expected)[real]
                assert same.abs().max() <= rounding(torch.float32, 256) * expected.abs().max()
        assert (together[0] - together[1]).abs().max() > 1e-3


def test_group_ids_leave_room_for_their_tokens():
    """Under token sampling: what spilled over would be another draw."""
    model, tokens = tiny_model(sampling="token"), random_tokens(1, 3)
    model(tokens, noise=Noise(1, 2), groups=torch.tensor([2**26 - 1]))
    with pytest.raises(InputError, match="group ids must be below 67108864 with 64 positions"):
        model(tokens, noise=Noise(1, 2), groups=torch.tensor([2**26]))


@torch.no_grad()
def test_padding_and_other_tokens_are_not_computed():
    """What layers see: the real tokens, and in the last block, but for keys and values, B rows."""
    model, batch, seen = tiny_model(), tiny_batch(), {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update(
                    {name: tuple(inputs[0].shape[:-1])}
                )
            )
    B, T, N = *batch.tokens.shape, int(batch.lengths.sum())
    assert N < B * T
    class_logits(model, batch, Noise(0, 0))
    late = ("attn.k_proj", "attn.v_proj")
    assert seen == {n: (N,) if n[9:] in late or n[7] == "0" else (B,) for n in seen}
    class_logits(model, batch, Noise(0, 0), padded=True)
    assert set(seen.values()) == {(B, T)}


def test_what_is_not_computed_changes_nothing():
    """Logits and gradients, against all of it."""
    results = []
    for padded in (False, True):
        model, batch = tiny_model(), tiny_batch()
        logits = class_logits(model, batch, Noise(0, 0), padded=padded)
        loss = logits.log_softmax(-1)[torch.arange(len(logits)), batch.labels].sum()
        loss.backward()
        grads = [p.grad for a in adapters(model).values() for p in a.parameters()]
        results.append((logits.detach(), *grads))
    for ours, whole in zip(*results, strict=True):
        assert (ours - whole).abs().max() <= rounding(torch.float32, 512) * whole.abs().max()


@torch.no_grad()
def test_no_two_tokens_share_a_group_under_token_sampling(monkeypatch):
    """Neighbouring examples either: their ids are a whole context apart."""
    seen, original = {}, SubspaceAdapter.op

    def spy(*arguments):
        layer, _, groups, _ = arguments[9:]
        seen.setdefault(layer, []).extend(groups.flatten().tolist())
        return original(*arguments)

    monkeypatch.setattr(SubspaceAdapter, "op", staticmethod(spy))
    tiny_model(sampling="token")(random_tokens(3, 6), noise=Noise(0, 0))
    assert all(len(ids) == len(set(ids)) == 18 for ids in seen.values()) and len(seen) == 5


def test_a_random_model_is_a_function_of_its_seed():
    """Every tensor can be trained; norms are 1 and biases 0."""
    config = dataclasses.replace(TINY, qkv_bias=True)
    one, same, other = (Llama(config).init_random_(seed, std=0.5) for seed in (3, 3, 4))
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        if name.endswith(("norm.weight", "bias")):
            assert torch.equal(value, torch.full_like(value, not name.endswith("bias")))
        else:
            assert not torch.equal(value, other.state_dict()[name]) and 0.3 < value.std() < 0.7
    assert all(p.requires_grad for p in one.parameters())
    assert one.device == torch.device("cpu")
    assert Llama(TINY, device="meta").device == torch.device("meta")


@torch.no_grad()
def test_trimmed_head_is_rows_of_the_full_one():
    order = CLASSES[::-1]  # labels in words have tokens that do not rise
    assert list(order) != sorted(order)
    for tied in (False, True):
        config = dataclasses.replace(TINY, tie_word_embeddings=tied)
        model, tokens = Llama(config).init_random_(0, std=0.3), random_tokens(2, 4)
        full = model(tokens)
        model.trim_head(order)
        assert model.config.head_tokens == order
        assert close(model(tokens), full[..., list(order)])
        with pytest.raises(InputError, match="already cut down"):
            model.trim_head(CLASSES)
    with pytest.raises(InputError, match="token id 40 is outside the 40 ids"):
        Llama(TINY).init_random_().trim_head([1, 40])
    adapted = tiny_model(trim=False)
    with pytest.raises(InputError, match="trim_head comes before add_adapters"):
        adapted.trim_head(CLASSES)
    assert "lm_head" in adapters(adapted)
    tiny_model(trim=False, targets=("q_proj",)).trim_head(CLASSES)  # which takes nothing away


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_far_positions_have_their_own_angles_in_every_dtype(dtype):
    """Beyond 256 not every position is a bfloat16: the cosines are rounded, the positions are not.

    An angle in float32 is off by at most its last place for each of two roundings.
    """
    model = Llama(TINY).init_random_().to(dtype)
    positions = torch.tensor([[0, 255, 257, 301, 1023, 4097, 30_001]])
    inverse = TINY.rope.inverse_frequencies(TINY.head_dim, torch.device("cpu")).double()
    angles = positions[..., None, None].double() * inverse
    angles = torch.cat((angles, angles), -1)
    allowed = rounding(torch.float32, 2) * angles + rounding(dtype, 1)
    for got, truth in zip(model.cos_sin(positions), (angles.cos(), angles.sin()), strict=True):
        assert got.dtype == dtype
        assert ((got.double() - truth).abs() <= allowed).all()


def test_bfloat16_stays_near_float32():
    """bfloat16 keeps 8 bits: logits agree to a few per cent of their size after two layers."""
    model, batch = tiny_model(), tiny_batch()
    wide = model(batch.tokens, lengths=batch.lengths, last_only=True)
    base = Llama(TINY).init_random_(0, std=0.3).bfloat16().trim_head(CLASSES)
    narrow = base(batch.tokens, lengths=batch.lengths, last_only=True)
    assert narrow.dtype == torch.float32 and base.embed_tokens.weight.dtype == torch.bfloat16
    plain = tiny_model(wake=False)(batch.tokens, lengths=batch.lengths, last_only=True)
    assert (narrow - plain).abs().max() <= rounding(torch.bfloat16, 16) * plain.abs().max()
    assert not torch.equal(wide, plain)


def test_what_cannot_be_is_refused():
    model = Llama(TINY).init_random_()
    with pytest.raises(InputError, match="65 tokens, but the model has only 64 positions"):
        model(random_tokens(1, 65))
    with pytest.raises(ValueError, match="not both"):
        model(
            random_tokens(1, 2),
            lengths=torch.tensor([2]),
            mask=torch.ones(1, 2, dtype=torch.bool),
        )


# --- configurations ----------------------------------------------------------------------------

HF = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@given(configs())
def test_configurations_survive_both_layouts(config):
    assert LlamaConfig.from_dict(config.to_dict()) == config
    q, o, mlp, norm = config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm
    llama, qwen2 = q == o and not norm, q and not (o or mlp or norm)
    qwen3 = q == o and norm and not mlp
    if llama or qwen2 or qwen3:
        assert LlamaConfig.from_dict(config.to_hf()) == config
    else:
        with pytest.raises(InputError, match="no Hugging Face architecture"):
            config.to_hf()


def test_defaults_of_old_and_new_files():
    old = LlamaConfig.from_hf(HF)
    assert (old.num_key_value_heads, old.head_dim, old.rope) == (4, 4, RopeConfig())
    scaling = {**LLAMA3, "rope_theta": 5e5}
    new = LlamaConfig.from_hf({**HF, "rope_parameters": scaling, "eos_token_id": [7, 8]})
    assert (new.rope.kind, new.rope.theta, new.rope.factor) == ("llama3", 5e5, 8.0)
    assert new.eos_token_id == 7
    assert LlamaConfig.from_hf({**HF, "model_type": "qwen2"}).qkv_bias
    assert LlamaConfig.from_hf({**HF, "model_type": "qwen3"}).qk_norm


LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


WHOLE = {"rope_scaling": {**LINEAR, "partial_rotary_factor": None}}, RopeConfig("linear", 1e4, 4.0)
ROPES_IN_FILES = [
    (
        {
            "rope_scaling": LINEAR,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        RopeConfig("linear", 1e4, 4.0),
    ),
    (
        {"rope_scaling": {**LINEAR, "rope_theta": 5.0}, "rope_parameters": {"rope_theta": 5.0}},
        RopeConfig("linear", 5.0, 4.0),
    ),
    ({"rope_scaling": {}, "rope_parameters": LINEAR}, RopeConfig("linear", 1e4, 4.0)),
    ({"rope_scaling": LLAMA3}, RopeConfig("llama3", 1e4, 8.0, 1.0, 4.0, 512)),
    ({"rope_scaling": {**LLAMA3, ORIGINAL: 64}}, RopeConfig("llama3", 1e4, 8.0, 1.0, 4.0, 64)),
    (
        {"rope_scaling": {**LLAMA3, ORIGINAL: 64}, ORIGINAL: 32},
        RopeConfig("llama3", 1e4, 8.0, 1.0, 4.0, 32),
    ),
    ({"partial_rotary_factor": None}, RopeConfig()),
    ({"partial_rotary_factor": 1.0}, RopeConfig()),
]


@pytest.mark.parametrize(("change", "expected"), [*ROPES_IN_FILES, WHOLE])
def test_rope_is_read_as_transformers_reads_it(change, expected):
    """tests/peer/test_transformers.py compares the same files with transformers itself."""
    assert LlamaConfig.from_hf({**HF, "max_position_embeddings": 512, **change}).rope == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": 4.0}, "rope_scaling must be an object or null, not 4.0"),
        ({"rope_parameters": [LINEAR]}, "rope_parameters must be an object or null, not "),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling: factor is missing: RoPE scaling",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
            "rope_parameters: low_freq_factor is missing: RoPE scaling 'llama3' needs it",
        ),
        ({"rope_scaling": {**LLAMA3, ORIGINAL: "x"}}, f"{ORIGINAL} must be a number above 0"),
        ({"rope_theta": None}, "RoPE's theta must be a number above 0, not None"),
        ({"partial_rotary_factor": 0.5}, "RoPE on a part of each head is not implemented"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters: RoPE that differs from layer to layer is not implemented",
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta 1000000.0 is in rope_parameters, but only rope_scaling counts",
        ),
        *(
            (
                {"rope_scaling": {"rope_type": kind, "factor": 2}},
                f"RoPE scaling '{kind}' is not known",
            )
            for kind in ("dynamic", "longrope", "yarn", "proportional")
        ),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not known"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number, not None"),
        ({"vocab_size": -3}, "vocab_size must be a positive whole number, not -3"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be a positive whole number"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "RoPE scaling 'yarn' is not known"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor must be a number above 0"),
        ({"model_type": "mistral", "sliding_window": 512}, "sliding-window attention"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a positive whole number"),
    ],
)
def test_configurations_that_cannot_be_are_named(change, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_hf({**HF, **change})
    with pytest.raises(InputError, match="key 'vocab_size' is missing"):
        LlamaConfig.from_hf({k: v for k, v in HF.items() if k != "vocab_size"})


def test_a_window_as_long_as_the_model_is_no_window():
    config = {**HF, "model_type": "mistral", "max_position_embeddings": 512}
    found = LlamaConfig.from_hf({**config, "sliding_window": 512})
    assert found == LlamaConfig.from_hf({**config, "sliding_window": None})
    with pytest.raises(InputError, match="sliding-window attention"):
        LlamaConfig.from_hf({**config, "sliding_window": 511})


# --- real weights ------------------------------------------------------------------------------


def test_stories260k_tells_its_story(assets, tmp_path):
    from scalabl_ref.data.tokenizer import load_tokenizer
    from scalabl_ref.evaluation.generate import generate
    from tools.convert_hf import convert

    source = assets / "stories260K"
    convert(source / "stories260K.bin", tmp_path / "m", tokenizer=source / "tok512.model")
    model, tokenizer = Llama.from_pretrained(tmp_path / "m"), load_tokenizer(tmp_path / "m")
    tokens = [token.id for token in generate(model, tokenizer.encode(""), 40)]
    text = tokenizer.decode(tokens)
    assert text.startswith("Once upon a time, there was a little girl named Lily"), text


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    """Without NumPy; tests/peer/test_smollm2.py makes the folder by itself, where gguf is."""
    from scalabl_ref.data.tokenizer import load_tokenizer
    from scalabl_ref.evaluation.generate import generate

    folder = os.environ.get("SCALABL_SMOLLM2")
    if not folder:
        pytest.skip("SCALABL_SMOLLM2 names no folder with SmolLM2, made by tools/convert_gguf.py")
    model, tokenizer = Llama.from_pretrained(folder), load_tokenizer(folder)
    first = next(iter(generate(model, tokenizer.encode("The capital of France is"), 1)))
    assert tokenizer.decode([first.id]) == " Paris"


def test_swiglu_keeps_two_matrices_and_has_its_derivatives():
    """First and second, by finite differences; silu(gate) is computed again."""
    gate, up = (torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))
    assert torch.autograd.gradgradcheck(SwiGLU.apply, (gate, up))
    once, twice = (
        torch.autograd.grad(SwiGLU.apply(gate, up).sum(), (gate, up), create_graph=graph)
        for graph in (False, True)
    )
    for a, b in zip(once, twice, strict=True):
        assert (a - b).abs().max() <= rounding(torch.float64, 64)
    assert torch.equal(SwiGLU.apply(gate, up), torch.nn.functional.silu(gate) * up)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SwiGLU.apply(gate, up)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}
