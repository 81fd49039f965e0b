"""A model's answers to a whole data set: predictive distributions, row by row, on all ranks.

The noise of a row is keyed by its prompt's tokens (`text_keys`), not by its place in the file. So
an answer depends on the text, the seed and the draws alone: the same text has the same draws in any
file, in any order and in any batch, and rows with equal prompts have equal answers. Between batches
of another size the products may round differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..core.adapter import adapters, random_adapters
from ..core.noise import Noise
from ..core.objective import Batch
from ..core.philox import WORD
from ..core.predictive import Prediction, predictive
from ..data import Encoded, Example, Wording, encode, evaluation_batches
from ..data.tokenizer import Tokenizer
from ..methods import Ensemble, Posterior, Subspace
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.progress import progress_bar
from ..training import ranks as distributed
from .decisions import most_probable
from .predict import Draws, pass_log_probs, predict
from .quadrature import predict_exact
from .sequential import Auto, predict_auto

Samples = int | Auto | Literal["exact"]


@dataclass(frozen=True)
class Answers:
    """A data set, and the model's predictive distribution for each row."""

    examples: list[Example]
    labels: Tensor  # (N,) int64
    prediction: Prediction
    samples: Samples  # draws of each row: 0 for deterministic models; see also `draws_taken`
    draws: Tensor | None = None  # (N,) int64, draws of each row, where rows differ
    settled: Tensor | None = None  # (N,) bool, with `draws`: whether more draws are not needed
    encoded: Encoded | None = None  # the prompts as tokens


def encode_for(
    model: Llama,
    tokenizer: Tokenizer,
    examples: list[Example],
    wording: Wording | None = None,
    answerable: bool = True,
) -> Encoded:
    """`data.encode` with the classes of the model's head and the longest prompt that it takes.

    Raises InputError as `data.encode` does, or if the head is of another tokenizer's classes.
    """
    head = model.config.head_tokens
    encoded = encode(
        examples,
        tokenizer,
        classes=None if head is None else len(head),
        max_length=model.config.max_position_embeddings,
        answerable=answerable,
        wording=wording,
    )
    if head is not None and tuple(encoded.classes) != head:
        raise InputError(
            f"the tokenizer gives the class tokens {encoded.classes}, but the head was cut down to "
            f"{list(head)}"
        )
    return encoded


def text_keys(model: Llama, tokens: Sequence[Sequence[int]]) -> Tensor:
    """The noise group of each prompt, (N,) int64: the first 64 bits of a SHA-256, modulo 2^32.

    The digest is of the token ids in decimal, with commas between them. Under token sampling the
    modulus is 2^32 over the model's positions, since each token then has a group of its own.
    """
    by_token = any(adapter.config.sampling == "token" for adapter in adapters(model).values())
    room = WORD // model.config.max_position_embeddings if by_token else WORD
    texts = (",".join(map(str, row)).encode() for row in tokens)
    digests = (hashlib.sha256(text).digest()[:8] for text in texts)
    return torch.tensor([int.from_bytes(digest, "big") % room for digest in digests])


def answer_encoded(
    model: Llama,
    encoded: Encoded,
    samples: Samples,
    seed: int,
    batch: int = 32,
    title: str = "evaluate",
    posterior: Posterior | None = None,
    design: str = "independent",
) -> Answers:
    """Predict every example with `samples` draws (0: the mean model); no example is dropped.

    The ranks share the work, and all of them get all answers. With a number of `samples`, the ranks
    share the passes of each batch. Otherwise, and with a posterior, they share the batches; but of
    a sharded base, every rank predicts all batches.

    samples: a number, or an `Auto` (`sequential.predict_auto`: as many as each example needs), or
    "exact" (`quadrature.predict_exact`). title: of the progress bar; "" shows none. posterior: the
    distribution to draw from, if it is not the adapters' own. design: as in `predict`.

    Raises InputError for a combination that does not exist.
    """
    _check_samples(samples, posterior, design)
    rows = len(encoded.labels)
    keys = text_keys(model, encoded.tokens)
    found = list(evaluation_batches(encoded, batch))
    places = [b.ids for b in found]  # in the data set; the noise is keyed by the text
    batches = [replace(b, ids=keys[b.ids]) for b in found]
    by_draws = isinstance(samples, int) and posterior is None
    spread = not by_draws and not distributed.sharded(model)  # else all ranks have all batches
    own = slice(distributed.rank(), None, distributed.world()) if spread else slice(None)
    mine, places = batches[own], places[own]
    if isinstance(samples, int) and posterior is None:
        parts = _share_draws(model, mine, samples, seed, design)
    else:
        parts = (_whole_batch(model, b, samples, seed, posterior, design) for b in mine)
    probs = torch.zeros(rows, len(encoded.classes), dtype=torch.float64)
    prediction = Prediction(probs, *(torch.zeros(rows, dtype=torch.float64) for _ in range(3)))
    counts = torch.zeros(2, rows, dtype=torch.int64)  # of each row: its draws; 1 if it is settled
    with progress_bar(sum(map(len, places)), title, "row") as bar:
        for ids, (part, counted) in zip(places, parts, strict=True):
            for column, values in zip(prediction, part, strict=True):
                column[ids] = values.cpu()
            counts[:, ids] = counted
            bar.update(len(ids))
    if spread:
        for column in (*prediction, counts):
            distributed.sum_(column)  # each row is of one rank, and zero on the others
    labels, number = torch.tensor(encoded.labels), draws_taken(model, samples, posterior)
    draws, settled = (counts[0], counts[1].bool()) if isinstance(samples, Auto) else (None, None)
    return Answers(encoded.examples, labels, prediction, number, draws, settled, encoded)


def _check_samples(samples: Samples, posterior: Posterior | None, design: str) -> None:
    """Raise InputError for a combination that does not exist."""
    if not isinstance(samples, int) and design != "independent":
        raise InputError(f"samples auto and exact need independent draws, not design {design!r}")
    integrated = samples == "exact" and isinstance(posterior, Subspace)
    if not isinstance(samples, int) and posterior is not None and not integrated:
        raise InputError(_not_of(posterior, samples))


def _not_of(posterior: Posterior, samples: Auto | str) -> str:
    """Why these samples cannot be had of a posterior."""
    name = type(posterior).__name__
    if samples == "exact":
        return f"samples exact needs the adapters' own draws or a Subspace, not a {name}"
    instead = "a number or exact" if isinstance(posterior, Subspace) else "a number"
    return f"samples auto needs the adapters' own draws, not a {name}: give {instead}"


def draws_taken(model: Llama, samples: Samples, posterior: Posterior | None) -> Samples:
    """How many draws an answer really takes when `samples` are asked for.

    Of an ensemble's members without draws, their number.
    """
    if not isinstance(samples, int) or samples == 0:
        return samples
    if isinstance(posterior, Ensemble):
        return posterior.draws(model, samples) or len(posterior.members)
    return samples if posterior is not None or random_adapters(model) else 0


def chosen(answers: Answers) -> tuple[Tensor, Tensor]:
    """The most probable of each row's own choices, its index (N,) int64, and its probability (N,).

    A row may have fewer choices than the model has classes. Of a tie it is the first choice.
    """
    probs = answers.prediction.probs
    counts = torch.tensor([len(example.choices) for example in answers.examples])
    own = probs.masked_fill(torch.arange(probs.shape[1]) >= counts[:, None], -1.0)
    confidence, place = most_probable(own)
    return place, confidence


# Of a batch: its predictions, and `counts` of `answer_encoded`, where rows differ in them.
Part = tuple[Prediction, Tensor | int]


@torch.no_grad()
def _share_draws(
    model: Llama, batches: list[Batch], samples: int, seed: int, design: str
) -> Iterator[Part]:
    """`predict` of each batch on all ranks; each pass is done by one of them.

    Passes of as many batches as there are ranks are dealt out at a time, those of most draws first.
    All ranks make equally many passes, since the ranks of a sharded base must.
    """
    ranks = distributed.world()
    for group in (batches[start : start + ranks] for start in range(0, len(batches), ranks)):
        work: list[tuple[int, slice, Noise | None]] = []
        tables = []  # (S, B, C) of each batch
        for i, batch in enumerate(group):
            done = 0
            for noise, draws in Draws(samples, seed, design).passes_over(model, batch):
                work.append((i, slice(done, done + draws), noise))
                done += draws
            size = done, len(batch.ids), len(batch.classes)
            tables.append(torch.zeros(size, dtype=torch.float64))
        work.sort(key=lambda item: item[1].start - item[1].stop)
        mine, counted = distributed.share(work)
        there = {i: group[i].to(model.device) for i, _, _ in mine}
        for at, (i, part, noise) in enumerate(mine):
            found = pass_log_probs(model, there[i], noise, part.stop - part.start)
            if at < counted:
                tables[i][part] = found.cpu()
        for table in tables:
            distributed.sum_(table)  # each draw is of one rank, and zero on the others
            yield predictive(table), 0


def _whole_batch(
    model: Llama,
    batch: Batch,
    samples: Samples,
    seed: int,
    posterior: Posterior | None,
    design: str,
) -> Part:
    batch = batch.to(model.device)
    if isinstance(samples, Auto):
        prediction, taken, settled = predict_auto(model, batch, samples, seed)
        return prediction, torch.stack((taken, settled.long()))
    if isinstance(samples, str):
        assert posterior is None or isinstance(posterior, Subspace)  # see `_check_samples`
        return predict_exact(model, batch, posterior), 0
    return predict(model, batch, samples, seed, posterior, design), 0
