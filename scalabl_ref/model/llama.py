"""Llama from scratch, dense, in one file: RMSNorm, RoPE, attention, SwiGLU, the model.

Covers the family that shares Llama's block: Llama 1 to 3.x, SmolLM, Qwen2/2.5 (bias on q, k, v) and
Qwen3 (RMSNorm on q and k). Logits equal transformers' to float32 rounding. Shapes are written as

    B batch   T new tokens   S cached + new tokens   D hidden   H heads   K kv heads   h head_dim

The package sets three hooks, `Llama.run`, `Llama.block` and `MLP.activation`, to bodies in fast/
that compute the same with less work. This file needs none of them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import random_adapters
from ..core.noise import Keys, Noise, token_groups
from ..support.errors import InputError
from ..support.files import read_json
from ..support.hub import model_folder
from ..support.tensors import FLOATS, is_finite
from .folder import FORMAT, Weights, hf_to_ours

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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # (..., D)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)  # (..., D)
        return self.weight * wide.to(x.dtype)  # (..., D)


@dataclasses.dataclass(frozen=True)
class Context:
    """The values that all blocks need beside the hidden states, computed once a forward pass."""

    cos: Tensor  # (B or 1, T, 1, h)
    sin: Tensor  # (B or 1, T, 1, h)
    mask: Tensor | None  # (B or 1, 1, T, S), True where a query sees a key; None: all before it
    keys: Keys | None  # of the adapters' noise; None: the mean model
    cache: KVCache | None = None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (..., heads, h): pairs are (i, i + h/2), Hugging Face's half-split order."""
    first, second = x.chunk(2, dim=-1)  # (..., heads, h/2) each
    return x * cos + torch.cat((-second, first), dim=-1) * sin  # (..., heads, h)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: query head i reads kv head i // (H / K)."""

    def __init__(self, c: LlamaConfig, layer: int, **options: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.layer = layer
        q_size, kv_size = self.heads * c.head_dim, self.kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_size, c.qkv_bias, **options)
        self.k_proj = Linear(c.hidden_size, kv_size, c.qkv_bias, **options)
        self.v_proj = Linear(c.hidden_size, kv_size, c.qkv_bias, **options)
        self.o_proj = Linear(q_size, c.hidden_size, c.output_bias, **options)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, **options) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, **options) if c.qk_norm else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q = self.q_proj(x, ctx.keys).unflatten(-1, (self.heads, -1))  # (B, T, H, h)
        k = self.k_proj(x, ctx.keys).unflatten(-1, (self.kv_heads, -1))  # (B, T, K, h)
        v = self.v_proj(x, ctx.keys).unflatten(-1, (self.kv_heads, -1))  # (B, T, K, h)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, h)
        if ctx.cache is not None:
            k, v = ctx.cache.append(self.layer, k, v)  # (B, K, S, h)
        causal = ctx.mask is None and q.shape[2] == k.shape[2]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=ctx.mask, is_causal=causal, enable_gqa=True
        )  # (B, H, T, h)
        return self.o_proj(y.transpose(1, 2).flatten(2), ctx.keys)  # (B, T, D)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    activation: ClassVar[staticmethod[[Tensor, Tensor], Tensor]] = staticmethod(swiglu)  # hook

    def __init__(self, c: LlamaConfig, **options: Any) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias, **options)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias, **options)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias, **options)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        gate, up = self.gate_proj(x, ctx.keys), self.up_proj(x, ctx.keys)  # (..., inner)
        return self.down_proj(self.activation(gate, up), ctx.keys)  # (..., D)


class Block(nn.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    attention: ClassVar[type[Attention]] = Attention

    def __init__(self, c: LlamaConfig, layer: int, **options: Any) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **options)
        self.attn = self.attention(c, layer, **options)
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **options)
        self.mlp = MLP(c, **options)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.attn(self.attn_norm(x), ctx)  # (B, T, D)
        return x + self.mlp(self.mlp_norm(x), ctx)  # (B, T, D)


class Llama(nn.Module):
    """The model: token ids in, logits out. Parameters are uninitialised until weights are loaded.

    `Llama.from_pretrained(folder)` is the usual way in; `init_random_` fills a fresh model.
    recompute: whether training stores only each block's input and computes the rest again in the
    backward pass (fast/rows.py). quantized: the kind of the blocks' codes, see fast/quantize.py.
    """

    recompute = False
    computes_on: torch.device | None = None  # if that is not where its weights are kept
    quantized: str | None = None
    block: ClassVar[type[Block]] = Block  # hook

    def __init__(
        self, config: LlamaConfig, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__()
        self.config = c = config
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        # Not nn.Embedding(...), which draws values: on the meta device that imports torch._dynamo.
        empty = torch.empty(c.vocab_size, c.hidden_size, **options)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        blocks = (self.block(c, layer, **options) for layer in range(c.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, **options)
        rows = c.vocab_size if c.head_tokens is None else len(c.head_tokens)
        self.lm_head = Linear(c.hidden_size, rows, **options)
        if self.tied:
            self.tie_head()

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

        noise: the draw that the adapters use; None is the mean model.
        groups: (B,) int64 id of each row's draw; None means 0 .. B-1. Under token sampling the
            group of a token is id * max_position_embeddings + position, so that a draw depends
            neither on padding nor on the cache.
        lengths: (B,) int64 >= 1, the ends of right-padded rows (`last_only` reads there).
        mask: (B, S) bool, True on real tokens, for any other padding; S counts cached tokens too.
        cache: holds the tokens before these; filled in place. Give it the same `draws` every time,
            and `mask` with all tokens after padding: it keeps neither `lengths` nor `mask`.
        draws: S gives (S B, T, V) or (S B, V): rows 0 .. B-1 under `noise`, then under the S - 1
            draws after it.
        padded: compute the hidden states of padding too, as (B, T, D), for hooks into layers. The
            body in fast/ otherwise leaves out padding and, with `last_only`, the last block's other
            tokens.

        Positions count real tokens. Logits at padding are meaningless. Raises ValueError if both
        `lengths` and `mask` are given, and InputError past max_position_embeddings, without `mask`
        where the cache holds padding, or for a group id so large that under token sampling there is
        no room for its tokens.
        """
        inputs = Inputs(tokens, noise, groups, lengths, mask, cache, draws, last_only, padded)
        inputs.check(self.config.max_position_embeddings)
        return self.run(inputs)

    def run(self, inputs: Inputs) -> Tensor:
        """The dense forward pass: every token of every row goes through every layer. A hook."""
        inputs, draws = inputs.for_each_draw()
        ctx = self.context(inputs, draws)
        x = self.embed_tokens(inputs.tokens)  # (B, T, D)
        for block in self.layers:
            x = block(x, ctx)  # (B, T, D)
        keys = ctx.keys
        if inputs.last_only:
            last = torch.arange(len(x), device=x.device), inputs.ends()  # (B,) rows, (B,) places
            x = x[last]  # (B, D)
            if keys is not None and keys.groups is not None and keys.groups.dim() == 2:
                keys = keys._replace(groups=keys.groups[last])  # (B,)
        logits: Tensor = self.lm_head(self.norm(x).to(self.lm_head.weight.dtype), keys)
        return logits  # (B, T, V) or (B, V)

    def context(self, inputs: Inputs, draws: Tensor | None) -> Context:
        """What blocks need for these rows; draws: (B,) added to the noise's, or None."""
        positions = inputs.positions()  # (B or 1, T)
        cos, sin = self.cos_sin(positions)
        keys = self.row_keys(inputs, positions, draws)
        return Context(cos, sin, inputs.attention_mask(), keys, inputs.cache)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at positions (...,): (..., 1, h), in the hidden states' dtype.

        Frequencies are float32 numbers whatever that is; angles are of float32 or wider.
        """
        dtype = self.embed_tokens.weight.dtype
        inverse = self.config.rope.inverse_frequencies(self.config.head_dim, positions.device)
        wide = torch.promote_types(dtype, torch.float32)
        angles = positions[..., None, None].to(wide) * inverse  # (..., 1, h/2)
        angles = torch.cat((angles, angles), dim=-1)  # (..., 1, h)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def row_keys(self, inputs: Inputs, positions: Tensor, draws: Tensor | None) -> Keys | None:
        """The keys of the rows' noise: groups (B,), or (B, T) under token sampling."""
        if inputs.noise is None:
            return None
        groups = inputs.row_groups()  # (B,)
        if self.samples_per_token():
            span = self.config.max_position_embeddings
            groups = token_groups(groups[:, None], positions, span)  # (B, T)
        return Keys(inputs.noise, groups, draws)

    def samples_per_token(self) -> bool:
        """Whether every token has a draw of its own."""
        return any(adapter.config.sampling == "token" for adapter in random_adapters(self))

    @property
    def device(self) -> torch.device:
        """The device that computes, where tokens belong."""
        return self.computes_on or self.embed_tokens.weight.device

    @property
    def tied(self) -> bool:
        """Whether the head's weight is that of the embedding."""
        return self.config.tie_word_embeddings and self.config.head_tokens is None

    def tie_head(self) -> None:
        """Make the head's weight the embedding's."""
        self.lm_head.register_parameter("weight", self.embed_tokens.get_parameter("weight"))

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

    @staticmethod
    def from_pretrained(
        folder: Path | str,
        dtype: torch.dtype | None = None,
        device: Device = None,
        quantize: str | None = None,
    ) -> Llama:
        """The model in a folder, or of a name on the Hub: see `weights.load_model`."""
        from .weights import load_model  # which imports this module

        return load_model(folder, dtype, device, quantize)
