"""The forward pass of model/llama.py with less work, equal to it to rounding.

- Packed rows: padding is not computed. Layers see (N, D), the N real tokens end to end.
- Last tokens: with `last_only`, the last block computes each row's last token alone, (B, D).
- Joint draws: the blocks before the first adapter that draws are computed once for all draws.
- Recomputing: training stores only each block's input and computes the rest again.

torch.compile of the whole model gets whole rows: shapes must not depend on values.
Shapes below begin with "...": (B, T), (N,) for packed rows, or (B,) for last tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.adapter import random_adapters
from ..core.noise import Keys, token_groups
from ..model.inputs import Inputs, KVCache, repeated
from ..model.llama import Attention, Block, Llama
from .ahead import Ahead
from .attention import causal_attention
from .blocks import rotate


@dataclass(frozen=True)
class Rows:
    """The tokens whose hidden states are computed: all (B, T), or N of them end to end.

    index: (N,) places among the B * T, None for all.
    """

    B: int
    T: int
    index: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, *) -> (..., *)."""
        # index_select takes a fifth of the time of x[index].
        return x if self.index is None else x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """(..., *) -> (B, T, *), zeros where nothing was computed. Autograd does not save x."""
        if self.index is None:
            return x
        whole = x.new_zeros(self.B * self.T, *x.shape[1:]).index_put((self.index,), x)
        return whole.view(self.B, self.T, *x.shape[1:])


@dataclass(frozen=True)
class PackedContext:
    """The values that blocks need besides hidden states (..., D), computed once per pass."""

    rows: Rows
    cos: Tensor  # (..., 1, h), of which B may be 1
    sin: Tensor  # the same
    mask: Tensor | None  # (B or 1, 1, T, S), True where a query sees a key; None: all before it
    ends: Tensor | None  # (B,) the place of each row's last real token; None: T - 1
    keys: Keys | None
    cache: KVCache | None
    past: int  # number of cached tokens, S - T
    last: LastTokens | None = None  # in the last block alone: its queries

    def for_each_draw(self, draws: int) -> PackedContext:
        """The same for all rows under one draw, then under the next, and so on."""
        if draws == 1:
            return self
        B, T, index = self.rows.B, self.rows.T, self.rows.index
        number = torch.arange(draws, device=self.cos.device)
        if index is not None:
            index = (number[:, None] * (B * T) + index).flatten()
        packed = index is not None
        cos, sin = self.cos, self.sin
        if packed or len(cos) == B:  # else one row of positions serves all
            cos, sin = repeated(cos, draws), repeated(sin, draws)
        mask = self.mask
        if mask is not None and len(mask) == B:
            mask = repeated(mask, draws)
        ends = None if self.ends is None else repeated(self.ends, draws)
        rows, keys = Rows(draws * B, T, index), keys_for_each_draw(self.keys, draws)
        return dataclasses.replace(
            self, rows=rows, cos=cos, sin=sin, mask=mask, ends=ends, keys=keys
        )

    def last_tokens(self) -> LastTokens:
        """Each row's last real token, as the only query."""
        B, T, device = self.rows.B, self.rows.T, self.cos.device
        each, mask, packed = torch.arange(B, device=device), None, self.rows.index is not None
        ends = torch.full((B,), T - 1, device=device) if self.ends is None else self.ends
        if self.mask is not None and len(self.mask) == B and self.ends is not None:
            mask = self.mask[each, :, ends][:, :, None]  # (B, 1, 1, S)
        elif self.ends is not None:
            places = torch.arange(self.past + T, device=device)
            mask = (places <= self.past + ends[:, None])[:, None, None]  # (B, 1, 1, S)
        chosen = ((ends + 1).cumsum(0) - 1,) if packed else (each, ends)

        def of_these(x: Tensor) -> Tensor:
            return (x if packed else x.expand(B, *x.shape[1:]))[chosen]

        keys = self.keys
        if keys is not None and keys.groups is not None and keys.groups.dim() == self.cos.dim() - 2:
            draws = None if keys.draws is None else keys.draws[chosen]
            keys = keys._replace(groups=keys.groups[chosen], draws=draws)  # of the last tokens
        return LastTokens(chosen, of_these(self.cos), of_these(self.sin), mask, keys)


@dataclass(frozen=True)
class LastTokens:
    """The last real token of every row: its place among the hidden states, and its own values."""

    chosen: tuple[Tensor, ...]
    cos: Tensor  # (B, 1, h)
    sin: Tensor  # (B, 1, h)
    mask: Tensor | None  # (B, 1, 1, S)
    keys: Keys | None


def turned(x: Tensor, ctx: PackedContext) -> Tensor:
    """x (..., heads, h) after RoPE, unpacked: (B, T, heads, h), zeros at padding."""
    rows = ctx.rows
    if rows.index is None:
        return rotate(x, ctx.cos, ctx.sin)
    whole = rotate(x, ctx.cos, ctx.sin, rows.index, rows.B * rows.T)
    return whole.view(rows.B, rows.T, *x.shape[1:])


class PackedAttention(Attention):
    """`Attention` on packed rows; with `ctx.last`, for the rows' last tokens alone, (B, D)."""

    def forward(self, x: Tensor, ctx: PackedContext) -> Tensor:  # type: ignore[override]
        rows, last = ctx.rows, ctx.last
        of_queries: PackedContext | LastTokens = ctx if last is None else last
        queries = x if last is None else x[last.chosen]  # (..., D)
        q = self.q_proj(queries, of_queries.keys).unflatten(-1, (self.heads, -1))  # (..., H, h)
        k = self.k_proj(x, ctx.keys).unflatten(-1, (self.kv_heads, -1))  # (..., K, h)
        v = self.v_proj(x, ctx.keys).unflatten(-1, (self.kv_heads, -1))  # (..., K, h)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if last is not None:
            q = rotate(q, last.cos, last.sin)[:, :, None]  # (B, H, 1, h)
        else:
            q = turned(q, ctx).transpose(1, 2)  # (B, H, T, h)
        k, v = turned(k, ctx).transpose(1, 2), rows.unpack(v).transpose(1, 2)  # (B, K, T, h)
        if ctx.cache is not None:
            k, v = ctx.cache.append(self.layer, k, v)  # (B, K, S, h)
        if of_queries.mask is None and last is None and not ctx.past:
            y = causal_attention(q, k, v)  # (B, H, T, h)
        else:
            y = F.scaled_dot_product_attention(q, k, v, of_queries.mask, enable_gqa=True)
        y = y[:, :, 0].flatten(1) if last is not None else rows.pack(y.transpose(1, 2).flatten(2))
        return self.o_proj(y, of_queries.keys)  # (..., D)


class PackedBlock(Block):
    """`Block` on packed rows; with `ctx.last`, for the rows' last tokens alone."""

    attention = PackedAttention

    def forward(self, x: Tensor, ctx: PackedContext) -> Tensor:  # type: ignore[override]
        y = self.attn(self.attn_norm(x), ctx)  # (..., D)
        keys: PackedContext | LastTokens = ctx
        if ctx.last is not None:
            x, keys = x[ctx.last.chosen], ctx.last
        x = x + y
        return x + self.mlp(self.mlp_norm(x), keys)


def run(model: Llama, inputs: Inputs) -> Tensor:
    """The fast version of `Llama.run`."""
    whole = inputs.padded or torch.compiler.is_compiling()
    B, T = inputs.tokens.shape
    rows = Rows(B, T)
    if inputs.lengths is not None and not whole:
        rows = real_tokens(inputs.lengths, B, T)
    ctx = packed_context(model, inputs, rows)
    x = model.embed_tokens(rows.pack(inputs.tokens))  # (..., D)
    compute = calling(model, inputs)
    shared = shared_blocks(model) if inputs.draws > 1 else 0
    ahead = Ahead(model)
    for i, block in enumerate(model.layers):
        ahead.ask(i + 1)
        if i == shared:
            x, ctx = repeated(x, inputs.draws), ctx.for_each_draw(inputs.draws)
        if inputs.last_only and not whole and i == len(model.layers) - 1:
            ctx = dataclasses.replace(ctx, last=ctx.last_tokens())
        x = compute(block, x, ctx)
        ahead.ask_in_backward(x, i - 1)
    keys = ctx.keys
    if inputs.last_only:
        last = ctx.last or ctx.last_tokens()
        x, keys = x if ctx.last is not None else x[last.chosen], last.keys  # (B, D)
    if shared == len(model.layers):  # only the head draws
        x, ctx = repeated(x, inputs.draws), ctx.for_each_draw(inputs.draws)
        keys = keys_for_each_draw(keys, inputs.draws)
    logits: Tensor = model.lm_head(model.norm(x).to(model.lm_head.weight.dtype), keys)
    return logits if inputs.last_only else ctx.rows.unpack(logits)


def packed_context(model: Llama, inputs: Inputs, rows: Rows) -> PackedContext:
    """The context of these rows under the first draw."""
    positions, ends = inputs.positions(), None  # (B or 1, T)
    if inputs.lengths is not None or inputs.mask is not None:
        ends = inputs.ends()
    if rows.index is not None:
        positions = rows.pack(positions.expand(rows.B, -1))  # (N,)
    cos, sin = model.cos_sin(positions)
    keys = model.row_keys(inputs, positions, None) if rows.index is None else None
    if rows.index is not None and inputs.noise is not None:
        ids = rows.pack(inputs.row_groups()[:, None].expand(-1, rows.T))  # (N,)
        if model.samples_per_token():
            ids = token_groups(ids, positions, model.config.max_position_embeddings)
        keys = Keys(inputs.noise, ids)
    mask, past = inputs.attention_mask(), inputs.past
    return PackedContext(rows, cos, sin, mask, ends, keys, inputs.cache, past)


def keys_for_each_draw(keys: Keys | None, draws: int) -> Keys | None:
    """Keys of all rows under one draw, then under the next, and so on."""
    if keys is None or keys.groups is None:
        return keys
    groups = repeated(keys.groups, draws)
    number = torch.arange(draws, device=groups.device).repeat_interleave(len(keys.groups))
    number = number.view(-1, *[1] * (groups.dim() - 1)).expand(groups.shape)
    return keys._replace(groups=groups, draws=number)


def real_tokens(lengths: Tensor, B: int, T: int) -> Rows:
    """The first lengths[b] tokens of each row b."""
    real = torch.arange(T, device=lengths.device) < lengths[:, None]  # (B, T)
    return Rows(B, T) if bool(real.all()) else Rows(B, T, real.flatten().nonzero()[:, 0])


def shared_blocks(model: Llama) -> int:
    """How many of the first blocks have the same output under every draw."""
    random = [bool(random_adapters(block)) for block in model.layers]
    return random.index(True) if True in random else len(random)


def calling(model: Llama, inputs: Inputs) -> Callable[..., Tensor]:
    """The function that calls a block: directly, or with recomputation in the backward pass."""
    if model.recompute and torch.is_grad_enabled() and inputs.cache is None:
        return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return lambda block, *arguments: block(*arguments)


def compile_blocks(model: Llama, backend: str | Callable[..., Any] = "inductor") -> Llama:
    """Compile every block with torch.compile, from the same few programs; returns the model.

    The first passes take a minute or two. Packed rows and keyed noise still work.
    """
    # Sizes and layer ids of adapters are arguments of a program: otherwise every block would need
    # its own. The scaling of an adapter is a constant of the program.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    torch._dynamo.config.specialize_float = True
    for block in model.layers:
        block.compile(backend=backend, dynamic=True)
    return model
