"""Text from the predictive mixture, with the uncertainty of every token."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch

from ..core.predictive import predictive
from ..model.inputs import KVCache
from ..model.llama import Llama
from ..support.errors import InputError
from .predict import Draws


class Token(NamedTuple):
    """One generated token: its id, the mixture's probability of it, and uncertainty in nats."""

    id: int
    probability: float
    entropy: float
    mutual_information: float


@torch.no_grad()
def generate(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    samples: int = 0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterable[Token]:
    """Greedy decoding from the predictive mixture of `samples` draws (0: the mean model).

    Yields tokens until an id of `stop` (not yielded), the model's last position, or
    `max_new_tokens`. Draw i is Noise(seed, i) with a cache of its own, so that each draw is one
    function from the first token to the last; the next token is the argmax of the averaged
    probabilities.

    Raises InputError if the prompt is empty or longer than the model's positions, if
    `max_new_tokens` is negative, or if the head was cut down to class tokens.
    """
    if model.config.head_tokens is not None:
        raise InputError(
            "the head was cut down to class tokens: it can answer; to write text train with "
            "--head full"
        )
    if not prompt:
        raise InputError("the prompt is empty")
    room = model.config.max_position_embeddings - len(prompt)
    if room < 0:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and the model takes at most {len(prompt) + room}"
        )
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must not be negative, and is {max_new_tokens}")
    device = model.device
    drawn = [
        (noise, draws, KVCache(model.config.num_hidden_layers))
        for noise, draws in Draws(samples, seed).passes(model, len(prompt))
    ]
    tokens = torch.tensor([prompt], device=device)
    for _ in range(min(max_new_tokens, room + 1)):
        logits = [
            model(tokens, noise=noise, draws=draws, cache=cache, last_only=True)
            for noise, draws, cache in drawn
        ]  # (draws, V) each
        mixture = predictive(torch.log_softmax(torch.cat(logits).double(), dim=-1)[:, None])
        chosen = int(mixture.probs[0].argmax())
        if chosen in stop:
            return
        yield Token(
            chosen,
            float(mixture.probs[0, chosen]),
            float(mixture.entropy[0]),
            float(mixture.mutual_information[0]),
        )
        tokens = torch.tensor([[chosen]], device=device)
