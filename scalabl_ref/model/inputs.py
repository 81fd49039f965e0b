"""The arguments of a forward pass: tokens, padding, cache, draws; and their positions and masks.

Shapes are written as in llama.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..core.noise import Noise
from ..support.errors import InputError


class KVCache:
    """Keys and values of the tokens seen so far, a pair of (B, K, S, h) tensors per layer.

    padded: whether some of these tokens are padding; a mask must then mark the real ones.
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


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of `Llama.forward`.

    tokens: (B, T) int64. noise: the draw that the adapters use; None is the mean model.
    groups: (B,) int64 id of each row's draw; None means 0 .. B-1. Under token sampling the group
        of a token is id * max_position_embeddings + position, so that a draw depends neither on
        padding nor on the cache.
    lengths: (B,) int64 >= 1, real tokens in each right-padded row; `last_only` reads the last.
    mask: (B, S) bool, True on real tokens, for any other padding; S counts cached tokens too.
    cache: holds the tokens before these; filled in place. Give the same `draws` every time and,
        after padding, a `mask` of all tokens: the cache keeps neither `lengths` nor `mask`.
    draws: n gives n B rows: rows 0 .. B-1 under `noise`, then under each of the n - 1 next draws.
    last_only: logits of each row's last token alone.
    padded: compute the hidden states of padding too, as (B, T, D), for hooks on layers. The
        version in fast/ otherwise skips padding and, with `last_only`, all tokens of the last
        block but the last ones.
    """

    tokens: Tensor
    noise: Noise | None = None
    groups: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    cache: KVCache | None = None
    draws: int = 1
    last_only: bool = False
    padded: bool = False

    @property
    def past(self) -> int:
        """Number of cached tokens, S - T."""
        return 0 if self.cache is None else len(self.cache)

    def check(self, limit: int) -> None:
        """Check the arguments, and tell the cache whether it will hold padding.

        Raises ValueError if both `lengths` and `mask` are given, and InputError for more than
        `limit` positions, or if the cache holds padding and `mask` is missing.
        """
        if self.lengths is not None and self.mask is not None:
            raise ValueError("give lengths (right padding) or mask (any padding), not both")
        T, cache = self.tokens.shape[1], self.cache
        if self.past + T > limit:
            raise InputError(f"{self.past + T} tokens, but the model has only {limit} positions")
        if cache is not None:
            if cache.padded and self.mask is None:
                raise InputError("the cache holds padding: tokens after it need a mask")
            cache.padded = self.lengths is not None and bool((self.lengths < T).any())
            if self.mask is not None:
                cache.padded = not bool(self.mask.all())

    def row_groups(self) -> Tensor:
        """Ids (B,) of the rows' draws."""
        device = self.tokens.device
        if self.groups is None:
            return torch.arange(len(self.tokens), device=device)
        return self.groups.to(device)

    def for_each_draw(self) -> tuple[Inputs, Tensor | None]:
        """All rows under one draw, then under the next, and so on; and the draw of each row."""
        if self.draws == 1:
            return self, None
        rows = dataclasses.replace(
            self,
            tokens=repeated(self.tokens, self.draws),
            groups=repeated(self.row_groups(), self.draws),
            lengths=None if self.lengths is None else repeated(self.lengths, self.draws),
            mask=None if self.mask is None else repeated(self.mask, self.draws),
        )
        draws = torch.arange(self.draws, device=self.tokens.device)
        return rows, draws.repeat_interleave(len(self.tokens))

    def positions(self) -> Tensor:
        """The place of every new token among its row's real tokens, (B or 1, T)."""
        if self.mask is not None:
            return (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, self.past :]  # (B, T)
        T, device = self.tokens.shape[1], self.tokens.device
        return torch.arange(self.past, self.past + T, device=device)[None]  # (1, T)

    def attention_mask(self) -> Tensor | None:
        """(B or 1, 1, T, S), True where a query sees a key; None: it sees all keys before it."""
        T, device = self.tokens.shape[1], self.tokens.device
        if self.mask is None and (self.past == 0 or T == 1):
            return None
        key = torch.arange(self.past + T, device=device)[None]  # (1, S)
        query = torch.arange(self.past, self.past + T, device=device)[:, None]  # (T, 1)
        before = (key <= query)[None, None]  # (1, 1, T, S)
        if self.mask is None:
            return before
        # A padding query still sees itself: a row of the softmax must not be empty.
        return (before & self.mask[:, None, None]) | (key == query)  # (B, 1, T, S)

    def ends(self) -> Tensor:
        """The place of each row's last real token among the T new ones, (B,)."""
        B, T = self.tokens.shape
        device = self.tokens.device
        if self.lengths is not None:
            return self.lengths.to(device) - 1
        if self.mask is None:
            return torch.full((B,), T - 1, device=device)
        return torch.where(self.mask[:, self.past :], torch.arange(T, device=device), 0).amax(1)


def repeated(x: Tensor, times: int) -> Tensor:
    """Copies of x (n, *), `times` of them, end to end: (times * n, *)."""
    return x.repeat(times, *[1] * (x.dim() - 1))
