"""Llama from scratch, in one file: configuration, RoPE, attention, SwiGLU, cache, loading.

Covers the family that shares Llama's block: Llama 1 to 3.x, SmolLM, Qwen2/2.5 (bias on q, k, v) and
Qwen3 (RMSNorm on q and k). Logits equal transformers' to float32 rounding. Shapes are written as

    B batch   T new tokens   S cached + new tokens   D hidden   H heads   K kv heads   h head_dim
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.adapter import Device, Linear, random_adapters
from ..core.noise import Noise, later, token_groups
from ..fast.quantize import Kind
from ..fast.quantize import quantize as pack
from ..support.errors import InputError
from ..support.hub import model_folder
from ..support.tensors import FLOATS, FORMAT, Weights, hf_to_ours, is_finite, read_json

Item = TypeVar("Item")

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is "default", "linear" or "llama3".

    theta: base of the frequencies. factor: context extension of "linear" and "llama3". The other
    three belong to "llama3" alone; original_max_position_embeddings is in tokens.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items())[1:]:
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InputError(f"RoPE's {name} must be a number above 0, not {value!r}")

    def inverse_frequencies(self, head_dim: int, device: Device = None) -> Tensor:
        """Angle per token of each rotated pair, (h / 2,) float32, in radians."""
        exponent = torch.arange(0, head_dim, 2, device=device).float() / head_dim
        inverse = 1.0 / self.theta**exponent
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        return inverse

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Long wavelengths slowed by `factor`, short ones kept, a ramp between (Llama 3.1)."""
        turns = self.original_max_position_embeddings * inverse / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = ((turns - self.low_freq_factor) / span).clamp(0, 1)  # 1: short wavelength
        return keep * inverse + (1 - keep) * inverse / self.factor

    def to_hf(self) -> dict[str, Any] | None:
        """The value of rope_scaling in a Hugging Face config.json."""
        if self.kind == "default":
            return None
        values = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                values[name] = getattr(self, name)
        return values

    @staticmethod
    def from_hf(config: dict[str, Any]) -> RopeConfig:
        """From a Hugging Face config: rope_theta and rope_scaling, or the newer rope_parameters.

        As transformers 5 reads them: of both, rope_scaling counts. Raises InputError naming the key
        for another kind of scaling, and for a value that is missing or has another type.
        """
        key, given = _rope_values(config)
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise InputError(
                f"RoPE scaling {kind!r} is not known: expected default, linear, llama3"
            )
        if given.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
            raise InputError("RoPE on a part of each head is not implemented")
        theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
        if kind == "default":
            return RopeConfig(theta=theta)
        needed, original = ["factor"], "original_max_position_embeddings"
        if kind == "llama3":
            needed += ["low_freq_factor", "high_freq_factor"]
            length = config.get(
                original, given.get(original, config.get("max_position_embeddings"))
            )
            given = {**given, original: 2048 if length is None else length}
            needed += [original]
        for name in needed:
            if name not in given:
                raise InputError(f"{key}: {name} is missing, which RoPE scaling {kind!r} needs")
        return RopeConfig(kind, theta, **{name: given[name] for name in needed})


def _rope_values(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a config.json says of RoPE, and under which key."""
    found = {key: config.get(key) for key in ("rope_scaling", "rope_parameters")}
    for key, value in found.items():
        if not isinstance(value, dict | None):
            raise InputError(f"{key} must be an object or null, not {value!r:.40}")
        if any(isinstance(inner, dict) for inner in (value or {}).values()):
            raise InputError(f"{key}: RoPE that differs from layer to layer is not implemented")
    key = "rope_scaling" if found["rope_scaling"] else "rope_parameters"
    given, newer = found[key] or {}, found["rope_parameters"] or {}
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    if newer.get("rope_theta", theta) != theta:  # transformers 5 takes the default
        raise InputError(
            f"rope_parameters has rope_theta {newer['rope_theta']}, and rope_scaling, which counts "
            "where both are there, has none: put rope_theta there"
        )
    return key, given


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a model; field names are those of Hugging Face's config.json.

    qkv_bias, output_bias, mlp_bias: biases on q/k/v, on o, on gate/up/down.
    qk_norm: RMSNorm over each head of q and k, before RoPE (Qwen3).
    head_tokens: token ids of the rows that the head was cut down to; None is the whole vocabulary.

    Raises InputError for a value outside its range.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    head_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:8]:
            _check_size(field.name, getattr(self, field.name))
        if not isinstance(self.rms_norm_eps, (int, float)) or not self.rms_norm_eps >= 0:
            raise InputError(f"rms_norm_eps must be a number, not {self.rms_norm_eps!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for RoPE, not {self.head_dim}")

    @staticmethod
    def from_hf(config: dict[str, Any]) -> LlamaConfig:
        """From the dictionary in a Hugging Face config.json.

        Raises InputError for a missing key, another architecture, or a feature not implemented.
        """
        kind = config.get("model_type", "llama")
        if kind not in MODEL_TYPES:
            raise InputError(f"model_type {kind!r} is not known: expected {', '.join(MODEL_TYPES)}")
        _refuse_codes(config)
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"hidden_act {config['hidden_act']!r} is not known: expected 'silu'")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for key in (*sizes, "num_attention_heads"):
            if key not in config:
                raise InputError(f"key {key!r} is missing")
            _check_size(key, config[key])
        heads = config["num_attention_heads"]
        positions = config.get("max_position_embeddings", 2048)
        _check_size("max_position_embeddings", positions)
        window = _sliding_window(kind, config)
        if window is not None and window < positions:
            raise InputError(
                f"sliding-window attention ({window} tokens) is not implemented: it would matter "
                f"within the model's {positions} positions"
            )
        bias = bool(config.get("attention_bias", False))
        eos = config.get("eos_token_id")  # Llama 3 lists several; the first ends a text
        return LlamaConfig(
            **{key: config[key] for key in sizes},
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=positions,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bias,
            output_bias=kind != "qwen2" and bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=next(iter(eos), None) if isinstance(eos, list) else eos,
        )

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LlamaConfig:
        """From either kind of config.json: Hugging Face's, or the converted layout's."""
        if values.get("format") != FORMAT:
            return LlamaConfig.from_hf(values)
        known = {field.name for field in dataclasses.fields(LlamaConfig)}
        fields = {key: value for key, value in values.items() if key in known}
        head_tokens = fields.get("head_tokens")
        try:
            fields["rope"] = RopeConfig(**fields.get("rope", {}))
            fields["head_tokens"] = None if head_tokens is None else tuple(head_tokens)
            return LlamaConfig(**fields)
        except TypeError as error:
            raise InputError(str(error).replace("__init__()", "configuration")) from None

    def to_hf(self) -> dict[str, Any]:
        """A Hugging Face config.json that `from_hf` reads back as this configuration.

        Raises InputError for what that layout cannot say, such as a head cut down to class tokens.
        """
        if self.head_tokens is not None:
            raise InputError("the head was cut down to class tokens: there is no such layout")
        kind = "qwen3" if self.qk_norm else "llama"
        if self.qkv_bias and not self.output_bias:
            kind = "qwen2"
        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
        ours = {"rope", "qkv_bias", "output_bias", "mlp_bias", "qk_norm", "head_tokens"}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ours}
        values = {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": kind,
            "hidden_act": "silu",
            **fields,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_hf(),
        }
        if kind != "qwen2":
            values["attention_bias"] = self.qkv_bias
        if kind == "llama":
            values["mlp_bias"] = self.mlp_bias
        if LlamaConfig.from_hf(values) != self:
            raise InputError(
                "no Hugging Face architecture has this combination of biases and norms"
            )
        return values

    def to_dict(self) -> dict[str, Any]:
        """The converted layout's config.json; `from_dict` reads it back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def _refuse_codes(config: dict[str, Any]) -> None:
    """Raise InputError if a config.json says that the weights were quantised, and by what."""
    for key in ("quantization_config", "compression_config", "quantization"):
        values = config.get(key)
        if not values:
            continue
        values = values if isinstance(values, dict) else {}
        method = (
            values.get("quant_method")
            or {
                "quantization_config": "bitsandbytes",  # whose old files do not say
                "compression_config": "compressed-tensors",
                "quantization": "MLX",
            }[key]
        )
        raise InputError(
            f"{key}: the weights were quantised elsewhere, by {method!s:.40}: take the same model "
            "in 16 bits or more"
        )


def _sliding_window(kind: str, config: dict[str, Any]) -> int | None:
    """How many tokens, itself included, a query of some layer sees; None: all before it.

    The keys and their defaults are transformers'.
    """
    slides = {"mistral": True, "llama": False}.get(kind, bool(config.get("use_sliding_window")))
    window = config.get("sliding_window", 4096)
    if not slides or window is None:
        return None
    _check_size("sliding_window", window)
    return window


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive whole number, not {value!r}")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 or wider."""

    def __init__(
        self, size: int, eps: float, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, K, S, h) tensors a layer.

    padded: whether some of these tokens are padding, which only a mask can tell from the others.
    """

    padded = False

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def __len__(self) -> int:
        """Number of tokens held, S."""
        return 0 if self.keys[0] is None else self.keys[0].shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v, (B, K, T, h), to a layer; returns all of them, (B, K, S, h)."""
        old_k, old_v = self.keys[layer], self.values[layer]
        if old_k is not None and old_v is not None:
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.keys[layer], self.values[layer] = k, v
        return k, v


@dataclass(frozen=True)
class Rows:
    """The tokens whose hidden states are computed: all (B, T), or N of them end to end.

    index: (N,) places among the B * T, None for all. Shapes below begin with "...": (B, T) or (N,).
    """

    B: int
    T: int
    index: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, *) -> (..., *)."""
        return x if self.index is None else x.flatten(0, 1)[self.index]

    def unpack(self, x: Tensor) -> Tensor:
        """(..., *) -> (B, T, *), zeros where nothing was computed."""
        if self.index is None:
            return x
        whole = x.new_zeros(self.B * self.T, *x.shape[1:]).index_put((self.index,), x)  # keeps no x
        return whole.view(self.B, self.T, *x.shape[1:])


@dataclass(frozen=True)
class Context:
    """What a block needs beside hidden states (..., D), computed once per forward pass."""

    rows: Rows
    cos: Tensor  # (..., 1, h), of which B may be 1
    sin: Tensor  # the same
    attend: Tensor | None = None  # (B or 1, 1, T, S) True where a query sees a key; None: it sees
    # those before it and itself, or for T = 1 all
    ends: Tensor | None = None  # (B,) which of the T is each row's last real token; None: T - 1
    noise: Noise | None = None
    groups: Tensor | None = None  # (B,) or (...,) group ids
    cache: KVCache | None = None
    past: int = 0  # keys before these, S - T
    chosen: tuple[Tensor, ...] = ()  # of the last tokens alone: where they are among all

    def repeat(self, draws: int) -> Context:
        """The same for all rows under one draw, then under the next, and so on."""
        if draws == 1:
            return self
        B, T, index = self.rows.B, self.rows.T, self.rows.index
        number = torch.arange(draws, device=self.cos.device)
        if index is not None:
            index = (number[:, None] * (B * T) + index).flatten()

        def each(x: Tensor) -> Tensor:
            """One draw's after the other's; what all rows share stays as it is."""
            return x if len(x) == 1 != B else repeated(x, draws)

        groups = self.groups
        if groups is not None:
            number = number.repeat_interleave(len(groups))
            groups = later(each(groups), number.view(-1, *[1] * (groups.dim() - 1)))
        return dataclasses.replace(
            self, rows=Rows(draws * B, T, index), cos=each(self.cos), sin=each(self.sin),
            attend=None if self.attend is None else each(self.attend),
            ends=None if self.ends is None else each(self.ends), groups=groups,
        )  # fmt: skip

    def last(self) -> Context:
        """That of each row's last real token alone, whose hidden states are (B, D)."""
        B, T, device = self.rows.B, self.rows.T, self.cos.device
        each, attend, packed = torch.arange(B, device=device), None, self.rows.index is not None
        ends = torch.full((B,), T - 1, device=device) if self.ends is None else self.ends
        if self.attend is not None and len(self.attend) == B and self.ends is not None:
            attend = self.attend[each, :, ends][:, :, None]
        elif self.ends is not None:
            keys = torch.arange(self.past + T, device=device)
            attend = (keys <= self.past + ends[:, None])[:, None, None]  # (B, 1, 1, S)
        chosen = ((ends + 1).cumsum(0) - 1,) if packed else (each, ends)

        def of_these(x: Tensor) -> Tensor:
            return (x if packed else x.expand(B, *x.shape[1:]))[chosen]

        groups = self.groups
        if groups is not None and groups.dim() == self.cos.dim() - 2:  # one for each token
            groups = groups[chosen]
        return dataclasses.replace(
            self, rows=Rows(B, 1, each), cos=of_these(self.cos), sin=of_these(self.sin),
            attend=attend, ends=None, groups=groups, chosen=chosen,
        )  # fmt: skip


def repeated(x: Tensor, draws: int) -> Tensor:
    """x (n, *) so many times, one after the other: (draws n, *)."""
    return x.repeat(draws, *[1] * (x.dim() - 1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (..., heads, h): pairs are (i, i + h/2), Hugging Face's half-split order."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped queries: query head i reads kv head i // (H / K)."""

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        c = config
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.heads, self.kv_heads, self.head_dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        self.layer = layer
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(c.hidden_size, q_size, c.qkv_bias, **options)
        self.k_proj = Linear(c.hidden_size, kv_size, c.qkv_bias, **options)
        self.v_proj = Linear(c.hidden_size, kv_size, c.qkv_bias, **options)
        self.o_proj = Linear(q_size, c.hidden_size, c.output_bias, **options)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, **options) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, **options) if c.qk_norm else None

    def forward(self, x: Tensor, ctx: Context, last: Context | None = None) -> Tensor:
        """x (..., D) -> (..., D), or (B, D) for the rows' last tokens, which then alone ask."""
        asking, queries = (ctx, x) if last is None else (last, x[last.chosen])
        q = self.q_proj(queries, asking.noise, asking.groups).unflatten(-1, (self.heads, -1))
        k = self.k_proj(x, ctx.noise, ctx.groups).unflatten(-1, (self.kv_heads, -1))
        v = self.v_proj(x, ctx.noise, ctx.groups).unflatten(-1, (self.kv_heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, asking.cos, asking.sin), rotate(k, ctx.cos, ctx.sin)
        q = asking.rows.unpack(q).transpose(1, 2)  # (B, H, T, h)
        k, v = (ctx.rows.unpack(t).transpose(1, 2) for t in (k, v))  # (B, K, T, h)
        if ctx.cache is not None:
            k, v = ctx.cache.append(self.layer, k, v)  # (B, K, S, h)
        causal = asking.attend is None and last is None and not ctx.past
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=asking.attend, is_causal=causal, enable_gqa=True
        )
        y = asking.rows.pack(y.transpose(1, 2).flatten(2))  # (..., H h)
        return self.o_proj(y, asking.noise, asking.groups)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps these two alone for its backward pass, and not silu(gate)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # this is to be differentiated once more
            p = torch.sigmoid(gate)
            slope = p * (1 + gate * (1 - p))
            return grad * up * slope, grad * F.silu(gate)
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: LlamaConfig, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias, dtype, device)
        self.up_proj = Linear(hidden, inner, bias, dtype, device)
        self.down_proj = Linear(inner, hidden, bias, dtype, device)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        gate = self.gate_proj(x, ctx.noise, ctx.groups)
        up = self.up_proj(x, ctx.noise, ctx.groups)
        swiglu = SwiGLU.apply if torch.is_grad_enabled() else SwiGLU.forward  # half the overhead
        return self.down_proj(swiglu(gate, up), ctx.noise, ctx.groups)


class Block(nn.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.attn = Attention(config, layer, dtype, device)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(self, x: Tensor, ctx: Context, last: Context | None = None) -> Tensor:
        """x (..., D) -> (..., D), or (B, D) for the rows' last tokens alone."""
        y = self.attn(self.attn_norm(x), ctx, last)
        if last is not None:
            x, ctx = x[last.chosen], last
        x = x + y
        return x + self.mlp(self.mlp_norm(x), ctx)


class Llama(nn.Module):
    """The model: token ids in, logits out. Parameters are uninitialised until weights are loaded.

    `Llama.from_pretrained(folder)` is the usual way in; `init_random_` fills a fresh model.
    `recompute`: of each block, training keeps its input alone, and its backward pass computes the
    rest again; noise is an argument, so that it comes out the same.
    """

    recompute = False
    computes_on: torch.device | None = None  # if that is not where its weights are kept
    quantized: Kind | None = None  # what `quantize_` made of the blocks

    def __init__(
        self, config: LlamaConfig, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__()
        self.config = config
        c = config
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        # Not nn.Embedding(...), which draws values: on the meta device that imports torch._dynamo.
        empty = torch.empty(c.vocab_size, c.hidden_size, **options)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(c, i, dtype, device) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **options)
        rows = c.vocab_size if c.head_tokens is None else len(c.head_tokens)
        self.lm_head = Linear(c.hidden_size, rows, **options)
        if self.tied:
            self._tie_head()

    @property
    def device(self) -> torch.device:
        """Where it computes, and wants its tokens."""
        return self.computes_on or self.embed_tokens.weight.device

    @property
    def tied(self) -> bool:
        """Whether the head's weight is that of the embedding."""
        return self.config.tie_word_embeddings and self.config.head_tokens is None

    def _tie_head(self) -> None:
        self.lm_head.register_parameter("weight", self.embed_tokens.get_parameter("weight"))

    def forward(
        self,
        tokens: Tensor,
        *,
        noise: Noise | None = None,
        groups: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        draws: int = 1,
        last_only: bool = False,
        padded: bool = False,
    ) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V), or (B, V) with `last_only`.

        With `draws` S the result is (S B, T, V) or (S B, V): rows 0 .. B-1 under `noise`, then
        under the S - 1 draws after it. Every weight is read once for all of them, and what comes
        before the first adapter that draws is computed once.

        Padding that `lengths` tells of is not computed, nor, with `last_only`, what the last block
        makes of other tokens: layers see (N, D) for the N real tokens, end to end, and the last
        block's see (B, D) where they can. `padded` computes all of it, as (B, T, D), for those who
        hook into layers; so does torch.compile, for whose sake shapes must not depend on values.

        noise: None for the mean model, else the draw that the adapters use.
        groups: (B,) int64 id of each row's draw; None means 0 .. B-1. Under token sampling the
            group of a token is id * max_position_embeddings + position, so that a draw depends
            neither on padding nor on the cache.
        lengths: (B,) int64 >= 1, for right-padded rows: where each ends (`last_only` reads there).
        mask: (B, S) bool, True on real tokens, for any other padding; S counts cached tokens too.
        cache: holds the tokens before these; filled in place. Give it the same `draws` every time,
            and `mask` with all that comes after padding: it keeps neither `lengths` nor `mask`.

        Positions count real tokens. Logits at padding are meaningless. Raises ValueError if both
        `lengths` and `mask` are given, and InputError past max_position_embeddings, without `mask`
        where the cache holds padding, or for a group id so large that under token sampling there is
        no room for its tokens.
        """
        if lengths is not None and mask is not None:
            raise ValueError("give lengths (right padding) or mask (any padding), not both")
        B, T = tokens.shape
        past = len(cache) if cache is not None else 0
        if past + T > self.config.max_position_embeddings:
            raise InputError(
                f"{past + T} tokens, but the model has only "
                f"{self.config.max_position_embeddings} positions"
            )
        if cache is not None:
            if cache.padded and mask is None:
                raise InputError("the cache holds padding: what comes after it needs a mask")
            cache.padded = _has_padding(T, lengths, mask)
        whole = padded or torch.compiler.is_compiling()
        rows = Rows(B, T) if lengths is None or whole else _real_tokens(lengths, B, T)
        ctx = self._context(rows, past, noise, groups, lengths, mask, cache)
        x = self.embed_tokens(rows.pack(tokens))  # (..., D)
        again = self.recompute and torch.is_grad_enabled() and cache is None
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if again else _call
        shared = self.shared_blocks() if draws > 1 else 0
        for i, block in enumerate(self.layers):
            if i == shared:
                x, ctx = repeated(x, draws), ctx.repeat(draws)
            if last_only and i == len(self.layers) - 1:
                last = ctx.last()
                x = run(block, x, ctx)[last.chosen] if whole else run(block, x, ctx, last)  # (B, D)
                ctx = last
            else:
                x = run(block, x, ctx)
        if shared == len(self.layers):
            x, ctx = repeated(x, draws), ctx.repeat(draws)
        logits: Tensor = self.lm_head(self.norm(x).to(self.lm_head.weight.dtype), noise, ctx.groups)
        return logits if last_only else ctx.rows.unpack(logits)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> Llama:
        """Compile every block with torch.compile, from the same few programs; returns the model.

        The first passes take a minute or two. Packed rows and keyed noise stay as they are.
        """
        # Sizes and the layer ids of adapters are arguments of a program, or there would be one for
        # every block; the scaling of an adapter is not.
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
        torch._dynamo.config.specialize_float = True
        for block in self.layers:
            block.compile(backend=backend, dynamic=True)
        return self

    def shared_blocks(self) -> int:
        """How many of the first blocks give the same under every draw."""
        random = [bool(random_adapters(block)) for block in self.layers]
        return random.index(True) if True in random else len(random)

    def _context(
        self,
        rows: Rows,
        past: int = 0,
        noise: Noise | None = None,
        groups: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Context:
        device, S = self.device, past + rows.T
        positions = torch.arange(past, S, device=device)[None]  # (1, T)
        attend, ends = None, None if lengths is None else lengths.to(device) - 1
        if mask is not None:
            ends = torch.where(mask[:, past:], torch.arange(rows.T, device=device), 0).amax(1)
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
        if mask is not None or (past > 0 and rows.T > 1):
            query, key = torch.arange(past, S, device=device), torch.arange(S, device=device)
            attend = (key[None] <= query[:, None])[None, None]  # (1, 1, T, S)
            if mask is not None:
                # A padding query still sees itself: a row of the softmax must not be empty.
                itself = (key[None] == query[:, None])[None, None]
                attend = (attend & mask[:, None, None, :]) | itself
        if rows.index is not None:
            positions = rows.pack(positions.expand(rows.B, -1))  # (N,)
        groups = None if noise is None else self._groups(rows, positions, groups, device)
        cos, sin = self._rope(positions)
        return Context(rows, cos, sin, attend, ends, noise, groups, cache, past)

    def _groups(
        self, rows: Rows, positions: Tensor, groups: Tensor | None, device: torch.device
    ) -> Tensor:
        """Group ids (B,) of rows, or (...,) where tokens need their own or rows are packed."""
        ids = torch.arange(rows.B, device=device) if groups is None else groups.to(device)
        by_token = self._samples_per_token()
        if rows.index is None and not by_token:
            return ids
        ids = rows.pack(ids[:, None].expand(-1, rows.T))  # (...,)
        if not by_token:
            return ids
        return token_groups(ids, positions, self.config.max_position_embeddings)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at positions (...,): (..., 1, h), in the hidden states' dtype.

        Frequencies are float32 numbers whatever that is; angles are of float32 or wider.
        """
        dtype = self.embed_tokens.weight.dtype
        inverse = self.config.rope.inverse_frequencies(self.config.head_dim, positions.device)
        wide = torch.promote_types(dtype, torch.float32)
        angles = positions[..., None, None].to(wide) * inverse  # (..., 1, h/2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _samples_per_token(self) -> bool:
        linears = (module for module in self.modules() if isinstance(module, Linear))
        return any(m.adapter is not None and m.adapter.config.sampling == "token" for m in linears)

    def trim_head(self, token_ids: list[int] | tuple[int, ...]) -> Llama:
        """Keep only these rows of the head, in this order, in float32; returns the model.

        Logits then are (..., len(token_ids)), computed in float32 whatever the base's dtype. To be
        called before `add_adapters`. Raises InputError for an id outside the vocabulary, or if the
        head was cut or adapted already.
        """
        if self.config.head_tokens is not None:
            raise InputError("the head is already cut down to class tokens")
        if self.lm_head.adapter is not None:
            raise InputError("the head is adapted already: trim_head comes before add_adapters")
        outside = [i for i in token_ids if not 0 <= i < self.config.vocab_size]
        if outside:
            raise InputError(f"token id {outside[0]} is outside the {self.config.vocab_size} ids")
        rows = self.lm_head.weight.detach()[list(token_ids)].float()
        self.lm_head = Linear(self.config.hidden_size, len(token_ids), device="meta")
        self.lm_head.weight = nn.Parameter(rows.clone(), requires_grad=False)
        self.config = dataclasses.replace(self.config, head_tokens=tuple(token_ids))
        return self

    @torch.no_grad()
    def init_random_(self, seed: int = 0, std: float = 0.02) -> Llama:
        """Fill all weights: N(0, std^2), norms 1, biases 0; returns the model."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    def quantize_(self, kind: Kind) -> Llama:
        """Every linear layer of the blocks in 8 or 4 bits, see `quantize`; returns the model.

        Embedding, head, norms and biases stay as they are. Raises InputError for another kind, or
        if the model is quantised already.
        """
        if self.quantized:
            raise InputError(f"the base is quantised already, to {self.quantized}")
        for _, linear in self.block_linears():
            linear.quantize_(kind)
        self.quantized = kind
        return self

    def block_linears(self) -> list[tuple[str, Linear]]:
        """The linear layers of the blocks by name, as 0.attn.q_proj."""
        return [(n, m) for n, m in self.layers.named_modules() if isinstance(m, Linear)]

    @staticmethod
    def from_pretrained(
        folder: Path | str,
        dtype: torch.dtype | None = None,
        device: Device = None,
        quantize: Kind | None = None,
    ) -> Llama:
        """The model in a folder of Hugging Face's layout or of the converted one.

        folder: or a model's name on the Hub, OWNER/NAME, see `hub.model_folder`.

        dtype: of the loaded weights, but for scales of codes; None keeps what the file has, and its
        weights are then mapped, not copied: their pages are read when they are first used, and may
        be dropped and read again where memory is short. Weights of several dtypes become those of
        the one that config.json says (dtype or torch_dtype), else of the embedding's. quantize: as
        in `quantize_`, tensor by tensor as they are read; a folder whose config.json says
        "quantize" is read as it is. A head that differs from the embedding counts, whatever
        tie_word_embeddings says. Returns the model frozen, in evaluation mode. Raises InputError
        naming the file or tensor for anything missing, misshapen, unexpected or not finite.
        """
        folder = model_folder(folder)
        model, tensors = _open_model(folder)
        if quantize == model.quantized:
            quantize = None
        if quantize and model.quantized:
            raise InputError(f"{folder}: is quantised already, to {model.quantized}")
        linears = {f"layers.{name}.weight" for name, _ in model.block_linears()}
        state = {}
        for name, tensor in tensors:
            if quantize and name in linears:
                packed = pack(tensor, quantize)
                state[name] = packed.codes.to(device)
                state[name.removesuffix("weight") + "scale"] = packed.scale.to(device)
            else:
                cast = tensor.is_floating_point() and not name.endswith(".scale")
                state[name] = tensor.to(dtype=dtype if cast else None, device=device)
        if quantize:
            model.quantize_(quantize)
        _to_one_dtype(folder, state)
        if model.tied:
            state["lm_head.weight"] = state["embed_tokens.weight"]
        model.load_state_dict(state, assign=True)
        if model.tied:
            model._tie_head()
        return model.requires_grad_(False).eval()


def _to_one_dtype(folder: Path, state: dict[str, Tensor]) -> None:
    """Cast weights of several dtypes to the one that config.json says, else the embedding's.

    Raises InputError for a tensor that has a value too large for it.
    """
    floats = [n for n, t in state.items() if t.is_floating_point() and not n.endswith(".scale")]
    if len({state[name].dtype for name in floats}) < 2:
        return
    values = read_json(folder / "config.json")
    values = values.get("hf_config") or values
    stated = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    names = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    dtype = names.get(stated, state["embed_tokens.weight"].dtype)
    for name in floats:
        if state[name].dtype != dtype:
            state[name] = state[name].to(dtype)
            if not is_finite(state[name]):
                raise InputError(f"{folder}: tensor {name} has values too large for {dtype}")


def as_stored(
    config: LlamaConfig, tensors: dict[str, Item], read: Callable[[Item], Tensor]
) -> LlamaConfig:
    """The configuration that the tensors, by our names, have: is their head the embedding?

    As in transformers 5, a head that differs from the embedding is the model's, whatever
    tie_word_embeddings says. A tied head that is there alone is the embedding, and gets its name.
    """
    head, embedding = "lm_head.weight", "embed_tokens.weight"
    if not config.tie_word_embeddings or config.head_tokens is not None or head not in tensors:
        return config
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        return config
    ours, theirs = read(tensors[embedding]), read(tensors[head])
    if ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.dtype)):
        return config
    return dataclasses.replace(config, tie_word_embeddings=False)


def _call(block: nn.Module, *arguments: Any) -> Any:
    return block(*arguments)


def check_model(folder: Path | str, config: LlamaConfig | None = None) -> None:
    """Raise InputError for all that `Llama.from_pretrained` refuses, one tensor in memory.

    config: what the model is, where its config.json says more than we can do with it.
    """
    _, tensors = _open_model(folder, config)
    for pair in tensors:
        del pair  # before the next is read


def read_config(path: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """A config.json of either layout, and the JSON object it holds.

    Raises InputError naming the file if it is absent, not JSON, or no model that is known here.
    """
    values = read_json(path)
    try:
        return LlamaConfig.from_dict(values), values
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _has_padding(T: int, lengths: Tensor | None, mask: Tensor | None) -> bool:
    if mask is not None:
        return not bool(mask.all())
    return lengths is not None and bool((lengths < T).any())


def _real_tokens(lengths: Tensor, B: int, T: int) -> Rows:
    """The first lengths[b] tokens of each row b."""
    real = torch.arange(T, device=lengths.device) < lengths[:, None]  # (B, T)
    return Rows(B, T) if bool(real.all()) else Rows(B, T, real.flatten().nonzero()[:, 0])


def _refuse_what_is_no_model(path: Path) -> None:
    """Raise InputError for what is easily taken for a model's folder: says what it is."""
    if path.suffix == ".gguf" and path.is_file():
        raise InputError(f"{path}: is a GGUF file: tools/convert_gguf.py makes a folder of it")
    if path.is_file():
        raise InputError(f"{path}: is a file: give the folder of config.json and the weights")
    if (path / "adapter_config.json").exists():
        raise InputError(
            f"{path}: is a PEFT adapter and no model: `scalabl import --from peft` makes it a run"
        )
    if (path / "run.json").exists():
        raise InputError(f"{path}: is a run and no model: give it as --run")


def _open_model(
    folder: Path | str, config: LlamaConfig | None = None
) -> tuple[Llama, Iterator[tuple[str, Tensor]]]:
    """The model in a folder without its weights, and these, by our names, one in memory at a time.

    A tied head is not among them. config: as in `check_model`. Raises InputError, at once or on
    the way through the weights, as `Llama.from_pretrained` says.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        _refuse_what_is_no_model(Path(folder))
    values = read_json(path)
    converted = values.get("format") == FORMAT
    config = config or read_config(path)[0]
    weights = Weights(folder, once=True)
    names = {(name if converted else hf_to_ours(name)): name for name in weights}
    layers = len({name.split(".")[1] for name in names if name.startswith("layers.")})
    if layers < config.num_hidden_layers:  # before building as many as a wrong file asks for
        raise InputError(
            f"{weights.folder}: has tensors of {layers} layers, expected {config.num_hidden_layers}"
        )
    model = Llama(as_stored(config, names, weights.__getitem__), device="meta")
    if converted and values.get("quantize") is not None:
        model.quantize_(values["quantize"])
    return model, _checked(model, weights, names)


def _checked(model: Llama, weights: Weights, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `model` read from `weights`, every one checked on the way.

    names: our tensor name -> the file's.
    """
    expected = model.state_dict()
    if model.tied:
        del expected["lm_head.weight"]
    for name, empty in expected.items():
        if name not in names:
            raise InputError(f"{weights.folder}: tensor {name} is missing")
        tensor = weights[names[name]]
        if tensor.shape != empty.shape:
            raise InputError(
                f"{weights.folder}: tensor {names[name]} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(empty.shape)}"
            )
        floats = empty.is_floating_point()
        if tensor.dtype not in (FLOATS if floats else (empty.dtype,)):
            wanted = "floats of 16 bits or more" if floats else empty.dtype
            raise InputError(
                f"{weights.folder}: tensor {names[name]} is {tensor.dtype}, expected {wanted}"
            )
        if not is_finite(tensor):
            raise InputError(f"{weights.folder}: tensor {names[name]} has NaN or infinite values")
        del tensor  # and with it the pages that were read
        yield name, weights[names[name]]
    # Old checkpoints store RoPE's frequencies, which we compute; a tied head may be stored twice.
    ignored = ("rotary_emb.inv_freq", *(["lm_head.weight"] if model.tied else []))
    for name, original in names.items():
        if name not in expected and not name.endswith(ignored):
            raise InputError(f"{weights.folder}: tensor {original} is not part of this model")
