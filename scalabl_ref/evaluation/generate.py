"""Text from the predictive mixture, with the uncertainty of every token."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.noise import Noise, philox_words
from ..core.philox import WORD
from ..core.predictive import predictive
from ..data.tokenizer import Tokenizer
from ..model.inputs import KVCache
from ..model.llama import Llama
from ..support.errors import InputError
from .predict import Draws

TEXT_STREAM = 2**61  # of `philox_words`: word i decides token i of a text


class Token(NamedTuple):
    """One generated token: its id, the mixture's probability of it, and uncertainty in nats.

    Neither temperature nor top_p change these numbers.
    """

    id: int
    probability: float
    entropy: float
    mutual_information: float


def generate(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    samples: int = 0,
    seed: int = 0,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[Token]:
    """Decoding from the predictive mixture of `samples` draws (0: the mean model).

    Yields tokens until an id of `stop` (not yielded), the model's last position, or
    `max_new_tokens`. Draw i is Noise(seed, i) with a cache of its own, so that each draw is one
    function from the first token to the last. The next token is the argmax of the averaged
    probabilities if `temperature` is 0; otherwise `choose` draws it from what `warped` makes of
    them. Token i then depends on word i of stream TEXT_STREAM of `seed`, and on no generator.

    Raises InputError, when it is called, if the prompt is empty or longer than the model's
    positions, if `max_new_tokens` is negative, if the head was cut down to class tokens, and as
    `check_warping`.
    """
    count = min(max_new_tokens, _room(model, prompt, max_new_tokens))
    check_warping(temperature, top_p)
    words = philox_words(seed, TEXT_STREAM, count if temperature else 0)
    drawn = [
        (noise, draws, KVCache(model.config.num_hidden_layers))
        for noise, draws in Draws(samples, seed).passes(model, len(prompt))
    ]

    def next_of(probs: Tensor, i: int) -> int:
        if temperature:
            return int(choose(warped(probs, temperature, top_p), words[i]))
        return int(probs.argmax())

    return _tokens(model, prompt, count, drawn, next_of, stop)


@torch.no_grad()
def _tokens(
    model: Llama,
    prompt: list[int],
    count: int,
    drawn: list[tuple[Noise | None, int, KVCache]],
    next_of: Callable[[Tensor, int], int],
    stop: Collection[int],
) -> Iterator[Token]:
    tokens = torch.tensor([prompt], device=model.device)
    for i in range(count):
        logits = [
            model(tokens, noise=noise, draws=draws, cache=cache, last_only=True)
            for noise, draws, cache in drawn
        ]  # (draws, V) each
        mixture = predictive(torch.log_softmax(torch.cat(logits).double(), dim=-1)[:, None])
        probs = mixture.probs[0].cpu()  # (V,)
        chosen = next_of(probs, i)
        if chosen in stop:
            return
        yield Token(
            chosen,
            float(probs[chosen]),
            float(mixture.entropy[0]),
            float(mixture.mutual_information[0]),
        )
        tokens = torch.tensor([[chosen]], device=model.device)


def _room(model: Llama, prompt: list[int], max_new_tokens: int) -> int:
    """How many tokens the model can write after the prompt. Raises as `generate` does."""
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
    return room + 1


def check_warping(temperature: float, top_p: float) -> None:
    """Raise InputError unless 0 <= temperature < inf and 0 < top_p <= 1.

    Also for top_p below 1 at temperature 0, where it would change nothing.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be finite and not negative, and is {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, and is {top_p}")
    if top_p < 1 and not temperature:
        raise InputError("top_p needs a temperature above 0: at 0 the text is greedy")


def warped(probs: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Probabilities (V,) float64 to draw from, made of `probs` (V,) float64.

    First p^(1 / temperature), normalised: for one model that is softmax(logits / temperature).
    Then the smallest set of tokens whose mass reaches top_p, normalised: the most probable tokens,
    of equally probable ones those with lower ids (Holtzman et al. 2020, nucleus sampling).

    >>> import torch
    >>> warped(torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64), 1.0, top_p=0.75)
    tensor([0.0000, 0.6667, 0.3333, 0.0000], dtype=torch.float64)
    """
    if temperature != 1:
        logs = probs.log()
        probs = torch.softmax((logs - logs.max()) / temperature, 0)
    if top_p == 1:
        return probs
    ordered, ids = probs.sort(descending=True, stable=True)
    before = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)[:-1]))  # mass of the tokens before
    kept = torch.zeros_like(probs).index_fill_(0, ids[before < top_p], 1.0) * probs
    return kept / kept.sum()


def choose(probs: Tensor, words: Tensor) -> Tensor:
    """Token ids by inversion: the first id whose cumulative probability exceeds u.

    probs: (V,) float64. words: int64 of any shape, uniform in [0, 2^32); u = (word + 1/2) / 2^32.
    """
    cumulative = probs.cumsum(0)
    u = (words.double() + 0.5) / WORD * cumulative[-1]
    return torch.searchsorted(cumulative, u, right=True)


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: Iterable[int]) -> Iterator[str]:
    """The text of `prompt`, then that of `ids` as it grows: together the text of all.

    A piece comes as soon as it is certain: a token may end within a character, whose text is
    U+FFFD until the next tokens complete it.
    """
    read: list[int] = []
    sent = text = ""
    for new in itertools.chain([prompt], ([id] for id in ids)):
        read += new
        text = tokenizer.decode(read)
        if text.startswith(sent) and text != sent and not text.endswith("\ufffd"):
            yield text[len(sent) :]
            sent = text
    if text != sent:  # it ends within a character
        yield text[len(os.path.commonprefix([sent, text])) :]
