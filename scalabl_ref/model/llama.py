"""Llama from scratch, dense, in one file: RMSNorm, RoPE, attention, SwiGLU, the model.

Covers the family that shares Llama's block: Llama 1 to 3.x, SmolLM, Qwen2/2.5 (bias on q, k, v) and
Qwen3 (RMSNorm on q and k). Logits equal transformers' to float32 rounding. Shapes are written as

    B batch   T new tokens   S cached + new tokens   D hidden   H heads   K kv heads   h head_dim

The package sets four hooks, `Llama.run`, `Llama.block`, `MLP.activation` and `RMSNorm.forward`, to
versions in fast/ that compute the same with less work. This file needs none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import random_adapters
from ..core.noise import Keys, Noise, token_groups
from ..support.errors import InputError
from .attach import Device, Linear
from .config import LlamaConfig
from .inputs import Inputs, KVCache


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
    """The values that all blocks need besides hidden states, computed once per forward pass."""

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
        self.layer, self.heads, self.kv_heads = layer, c.num_attention_heads, c.num_key_value_heads
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

    activation: ClassVar[Callable[..., Tensor]] = staticmethod(swiglu)  # hook

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

    `Llama.from_pretrained(folder)` loads a model; `init_random_` fills a new one at random.
    recompute: whether training stores only each block's input and computes the rest again in the
    backward pass (fast/rows.py). quantized: the kind of the blocks' codes, see fast/quantize.py.

    Example:

    >>> import torch
    >>> from scalabl_ref import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig(32, 8, 16, 1, 2, 1, 4)).init_random_(seed=0)
    >>> model(torch.tensor([[3, 1, 4]])).shape  # logits of the next token
    torch.Size([1, 3, 32])
    """

    recompute = False
    computes_on: torch.device | None = None  # None: where its weights are
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

        `Inputs` describes the arguments. Positions count real tokens. Logits at padding are
        meaningless. Raises the errors of `Inputs.check`, and InputError for a group id that is
        too large for token sampling.
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
        """The blocks' context for these rows; draws: (B,), added to the noise's draw, or None."""
        positions = inputs.positions()  # (B or 1, T)
        cos, sin = self.cos_sin(positions)
        keys = self.row_keys(inputs, positions, draws)
        return Context(cos, sin, inputs.attention_mask(), keys, inputs.cache)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at positions (...,): (..., 1, h), in the hidden states' dtype.

        Frequencies are always float32; angles are float32 or wider.
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
        """The device that computes. Tokens must be on it."""
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

        Logits then are (..., len(token_ids)), computed in float32 whatever the base's dtype. Call
        it before `add_adapters`. Raises InputError for an id outside the vocabulary, or if the
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
        """Load a model from a folder, or by its name on the Hub: see `weights.load_model`."""
        from .weights import load_model  # which imports this module

        return load_model(folder, dtype, device, quantize)
