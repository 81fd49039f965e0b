"""Checks of the package in use: training, prediction, text, quantised weights.

The same result is computed in another way: step by step, draw by draw, code by code, or without a
cache.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import Adapter, SubspaceAdapter, adapter_state, adapters
from ..core.config import AdapterConfig
from ..core.layer import SAMPLING
from ..core.noise import FIRST_TRAINING_DRAW, Noise, philox_words, token_groups
from ..core.objective import Batch, class_logits
from ..data import Encoded, TrainingOrder, collate, evaluation_batches
from ..evaluation.generate import TEXT_STREAM, choose, generate, warped
from ..evaluation.predict import predict, predict_all
from ..fast import quantize as quantize_module
from ..fast.quantize import AT_ONCE, KINDS, LEVELS, QuantizedLinear, quantize, quantize_model, whole
from ..methods import Swag
from ..model.attach import Linear, add_adapters
from ..model.config import LlamaConfig
from ..model.llama import Llama
from ..model.weights import block_linears
from ..training import savepoints
from ..training.trainer import TrainConfig, Trainer
from ..training.watch import Watch
from . import reference
from .check import Check, Errors, Op, exact, near, ratio, refused
from .method_checks import (
    CLASSES,
    EPS,
    EPS_32,
    NETWORK,
    draws,
    fill,
    layers,
    mixed,
    prompts,
    small_model,
)  # fmt: skip

SHAPE = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                    max_position_embeddings=8)  # fmt: skip


# --- Training -------------------------------------------------------------------------------------


def encoded(batch: Batch) -> Encoded:
    """Its rows without their padding."""
    rows = [row[:n] for row, n in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)]
    return Encoded(rows, batch.labels.tolist(), list(CLASSES))


def new_trainer(device: torch.device, method: str, **settings: Any) -> Trainer:
    """Of 7 rows of three or four tokens, in batches of 3 and micro-batches of 2."""
    data = encoded(prompts(torch.device("cpu"), 7, 4))
    config = TrainConfig(batch=3, micro_batch=2, lr=0.02, seed=5, warmup=0.3, **settings)
    model = small_model(device, method=method)
    return Trainer(model, data, config, collector=Swag() if config.swag else None)


def continued(_: Op, device: torch.device) -> Errors:
    """Seven steps, and the same with a checkpoint on disk after four: equal to the bit."""
    for method, settings in (("scalabl", {}), ("scalabl", {"objective": "official"}),
                             ("blob", {"weight_decay": 0.1}), ("mle", {"swag": 0.5})):  # fmt: skip
        whole, first, second = (new_trainer(device, method, steps=7, **settings) for _ in range(3))
        log = [whole.step() for _ in range(7)]
        parts = [first.step() for _ in range(4)]
        with tempfile.TemporaryDirectory() as folder:
            savepoints.Saver(Path(folder)).save(first.done, first.state(), {"of": method})
            found = savepoints.load(Path(folder))
        yield exact(found.done == 4 and found.identity == {"of": method}, "what was saved")
        second.restore(found.tensors, found.done)
        parts += [second.step() for _ in range(3)]
        for step, (one, other) in enumerate(zip(log, parts, strict=True)):
            yield exact(one == other, f"{method}: record of step {step}")
        for name, value in whole.state().items():
            yield exact(torch.equal(second.state()[name], value), f"{method}: {name}")


def steps_told(_: Op, device: torch.device) -> Errors:
    """The record of a step: NLL and accuracy row by row, KL, rate, of the model before the step."""
    run = new_trainer(device, "scalabl", steps=9)
    for step in range(9):
        at = run.order.indices(step)
        labels = torch.tensor([run.data.labels[i] for i in at])
        noise = Noise(5, FIRST_TRAINING_DRAW + step)
        with torch.no_grad():
            alone = [collate(run.data, [i]).to(device) for i in at]
            rows = [class_logits(run.model, one, noise) for one in alone]
        log_p = torch.log_softmax(torch.cat(rows).cpu(), -1)
        nll = -log_p[torch.arange(len(at)), labels].mean()
        accuracy = float((log_p.argmax(1) == labels).double().mean())
        scales = [a.scale() for a in run.adapters if isinstance(a, SubspaceAdapter)]
        kl = sum(reference.kl_forward(s.cpu(), sigma.cpu(), 1.0) for s, sigma in scales)
        record = run.step()
        got = torch.tensor(record["nll"], dtype=torch.float64)
        yield ratio(got, nll, log_p.abs().max(), NETWORK * EPS, f"step {step}: nll")
        loss, rate = record["nll"] + kl / 7, 0.02 * reference.warmup(step, 9, 0.3)
        right = {"accuracy": accuracy, "kl": kl, "lr": rate, "loss": loss}
        for name, value in right.items():  # sums of a few numbers in float64: 16 roundings
            got, expected = torch.tensor([record[name], value], dtype=torch.float64)
            yield ratio(got, expected, expected.abs(), 16 * EPS, f"step {step}: {name}")


def best_step(_: Op, device: torch.device) -> Errors:
    """Scores of held-out rows by hand; the adapters of the step with the lowest NLL come back."""
    run = new_trainer(device, "scalabl", steps=6)
    held = prompts(torch.device("cpu"), 5, 4, first=30)
    watch = Watch(encoded(held), every=1, keep=True)
    told, states = [], []
    for step in range(7):
        if step == 6:  # far from every other
            fill(run.adapters, 7)
        else:
            run.step()
        log_p = torch.log_softmax(mean_logits(run.model, held.to(device)), -1)
        told.append(-float(log_p[torch.arange(5), held.labels].mean()))
        states.append({n: value.clone() for n, value in adapter_state(run.model).items()})
        score = watch.look(run.model, step + 1)
        yield exact(abs(score.nll - told[-1]) <= NETWORK * EPS * abs(told[-1]), f"step {step}: nll")
        right = float((log_p.argmax(1) == held.labels).double().mean())
        yield exact(score.accuracy == right, f"step {step}: accuracy")
    watch.give_back(run.model)
    best = told.index(min(told))
    same = [torch.equal(value, states[best][n]) for n, value in adapter_state(run.model).items()]
    yield exact(watch.step == best + 1 and all(same), f"step {best + 1} of {told}")


def order_of_data(_: Op, device: torch.device) -> Errors:
    """Each epoch has every row once, in batches of which one is short, in an order of its own."""
    lengths, seen = [3 + 5 * i % 7 for i in range(23)], set()
    for seed in (1, 2**63):
        for epoch in range(3):
            order = TrainingOrder(lengths, 4, seed)
            steps = [order.indices(6 * epoch + i) for i in range(6)]
            rows = [i for step in steps for i in step]
            yield exact(sorted(rows) == list(range(23)), f"epoch {epoch}: {rows}")
            yield exact(sorted(map(len, steps)) == [3, 4, 4, 4, 4, 4], f"epoch {epoch}: {steps}")
            seen.add(frozenset(tuple(sorted(step)) for step in steps))
    yield exact(len(seen) == 6, "two epochs, or two seeds, have the same batches")
    used, new = TrainingOrder(lengths, 4, 9), TrainingOrder(lengths, 4, 9)
    before = used.indices(12), used.indices(0)
    again = new.indices(7) == used.indices(7) and before == (new.indices(12), new.indices(0))
    yield exact(again, "the order depends on the steps that were asked for before")
    data = Encoded([[1] * n for n in lengths], [0] * 23, list(CLASSES))
    batches = list(evaluation_batches(data, 4))
    yield exact(sorted(i for b in batches for i in b.ids.tolist()) == list(range(23)), "evaluation")
    for batch in batches:
        sizes = [lengths[i] for i in batch.ids.tolist()]
        yield exact(batch.lengths.tolist() == sizes, "lengths")
        yield exact(batch.tokens.sum(1).tolist() == sizes, "padding that is not 0")


# --- Prediction -----------------------------------------------------------------------------------


def draw_by_draw(_: Op, device: torch.device) -> Errors:
    """A prediction of five draws is the mean of five passes; a row alone has the same."""
    batch = prompts(device, 4, 4, first=3)
    tokens = token_groups(torch.arange(3)[:, None], torch.arange(5), 5).flatten().tolist()
    yield exact(tokens == list(range(15)), "ids of the tokens of three rows")
    for method in ("scalabl", "blob", "dropout"):
        for sampling in SAMPLING:
            settings: dict[str, Any] = {"dropout": 0.3} if method == "dropout" else {}
            model = small_model(device, method=method, sampling=sampling, **settings)
            found = predict(model, batch, samples=5, seed=7)
            yield agree(found.probs, by_draws(model, batch, 5, 7), f"{method}, {sampling}")
            for i in range(4):
                one = predict(model, row_of(batch, i), samples=5, seed=7).probs
                yield agree(one, found.probs[i : i + 1], f"{method}, {sampling}, row {i} alone")
        whole = predict(model, batch, samples=0)
        yield agree(whole.probs, mixed([mean_logits(model, batch)]), f"{method}, mean")
    counted = replace(batch, ids=batch.ids - 3)
    model, order = small_model(device, method="scalabl"), [2, 0, 3, 1]
    parts = [row_of(counted, i) for i in order]
    found = predict_all(model, parts, samples=5, seed=7)
    for name, value in predict(model, counted, samples=5, seed=7)._asdict().items():
        yield agree(getattr(found, name), value, f"{name} of rows in another order")


def row_of(batch: Batch, i: int) -> Batch:
    """Row i alone, without its padding."""
    n = int(batch.lengths[i])
    cut = {name: getattr(batch, name)[i : i + 1] for name in ("lengths", "labels", "ids")}
    return replace(batch, tokens=batch.tokens[i : i + 1, :n], **cut)


@torch.no_grad()
def by_draws(model: Llama, batch: Batch, samples: int, seed: int) -> Tensor:
    return mixed([class_logits(model, batch, Noise(seed, i)).cpu() for i in range(samples)])


@torch.no_grad()
def mean_logits(model: Llama, batch: Batch) -> Tensor:
    return class_logits(model, batch, None).cpu()


def agree(got: Tensor, expected: Tensor, case: str) -> float:
    """Probabilities or entropies of two passes in float64, of size 1.

    A second block doubles the errors that it inherits, as in `checks.same_model`.
    """
    got, expected = got.cpu(), expected.cpu()
    return ratio(got, expected, torch.ones_like(expected), 4 * NETWORK * EPS, case)


def full_model(device: torch.device) -> Llama:
    """Two blocks with a whole head, and adapters of ScalaBL, in float64."""
    model = Llama(SHAPE).init_random_(std=0.6)
    add_adapters(model, AdapterConfig(rank=2, targets=("q_proj", "down_proj"))).double()
    fill(adapters(model).values(), 1)
    return model.to(device)


def text_without_a_cache(_: Op, device: torch.device) -> Errors:
    """Each token from whole passes of each draw; greedy, and by the cumulative probabilities."""
    model, prompt = full_model(device), [3, 1, 4]
    for samples, temperature, top_p in ((0, 0.0, 1.0), (3, 0.0, 1.0), (3, 0.8, 1.0), (3, 1.7, 0.7)):
        words = philox_words(6, TEXT_STREAM, 8).tolist()
        tokens = list(prompt)
        found = list(generate(model, prompt, 9, samples, 6, (), temperature, top_p))
        yield exact(len(found) == 6, f"{len(found)} tokens, of a model that has room for 6")
        for i, token in enumerate(found):
            right = next_token(model, tokens, samples)
            probs, case = right["probs"][0], f"token {i} of {samples} draws at {temperature}"
            chosen = probs.index(max(probs))
            if temperature:
                chosen = drawn_token(probs, temperature, top_p, (words[i] + 0.5) / 2**32)
            yield exact(token.id == chosen, f"{case}: {token.id}, expected {chosen}")
            numbers = token.probability, token.entropy, token.mutual_information
            expected = probs[chosen], right["entropy"][0], right["mutual_information"][0]
            one, other = (torch.tensor(t, dtype=torch.float64) for t in (numbers, expected))
            yield agree(one, other, case)
            tokens.append(token.id)
    first = found[0].id
    yield exact(list(generate(model, prompt, 9, 3, 6, (first,), 1.7, 0.7)) == [], "stop is ignored")
    some = torch.softmax(draws(8, 11), 0)
    for temperature, top_p in ((0.5, 1.0), (1.0, 0.6), (2.0, 0.9)):
        to = warped(some, temperature, top_p)
        for word in philox_words(7, 0, 50):
            u = (int(word) + 0.5) / 2**32
            chosen = drawn_token(some.tolist(), temperature, top_p, u)
            yield exact(int(choose(to, word)) == chosen, f"{temperature}, {top_p}, u = {u}")


@torch.no_grad()
def next_token(model: Llama, tokens: list[int], samples: int) -> dict[str, list]:
    noises: list[Noise | None] = [Noise(6, i) for i in range(samples)]
    row = torch.tensor([tokens], device=model.device)
    logits = [model(row, noise=noise)[:, -1].double().cpu() for noise in noises or [None]]
    return reference.predictive(torch.stack(logits))


def drawn_token(probs: list[float], temperature: float, top_p: float, u: float) -> int:
    """By loops: keep the most probable tokens until their mass of p^(1 / T) reaches top_p, then
    invert the sum."""
    powers = [p ** (1 / temperature) for p in probs]
    order = sorted(range(len(probs)), key=lambda i: (-powers[i], i))
    kept, mass = set[int](), 0.0
    for i in order:
        if mass >= top_p * sum(powers):
            break
        kept.add(i)
        mass += powers[i]
    below = 0.0
    for i, power in enumerate(powers):
        below += power if i in kept else 0.0
        if below > u * mass:
            return i
    return len(probs) - 1


# --- Weights --------------------------------------------------------------------------------------


def codes_by_hand(_: Op, device: torch.device) -> Errors:
    """8 and 4 bits: scales, nearest codes, and products, which are those of the decoded weight."""
    for columns, kind in itertools.product((130, 4161), KINDS):
        case, weight = f"{kind}, {columns} columns", draws(1, 5, columns).float()
        codes, scale = quantize(weight.to(device), kind)
        values, scales, choices = decoded(codes.cpu(), scale.cpu(), columns)
        top = F.pad(weight, (0, -columns % 64)).view(5, -1, 64).abs().amax(-1)
        top = top if kind == "nf4" else top.amax(-1, keepdim=True) / 127
        yield exact(torch.equal(scale.cpu(), top.bfloat16()), f"{case}: scales")
        wide = weight.double()
        nearest = (wide[..., None] - scales[..., None] * choices).abs().amin(-1)
        # w / scale is rounded to float32: of two nearly equal distances either will do.
        size = scales * choices.max()
        yield ratio((values - wide).abs(), nearest, size, 2 * EPS_32, f"{case}: codes")
        x, u, bias = (draws(i, *n).float() for i, n in ((2, (3, columns)), (3, (3, 5)), (4, (5,))))
        like = Linear(columns, 5, bias=True, device=device)
        like.get_parameter("bias").data = bias.to(device)
        layer, leaf = QuantizedLinear(like, codes, scale), x.to(device, copy=True).requires_grad_()
        right, back = x.double() @ values.T + bias.double(), u.double() @ values
        results = []
        for at_once in (AT_ONCE, 2 * columns):  # a weight whole, and in parts
            with mock.patch.object(quantize_module, "AT_ONCE", at_once):
                y = layer(leaf)
                results.append((torch.autograd.grad(y, leaf, u.to(device))[0], back, 5))
                with torch.no_grad():
                    results += [(y, right, columns), (layer(leaf), right, columns)]
        for got, expected, terms in results:
            # sums of so many terms, whose errors are of random sign, times 8
            size = expected.square().mean().sqrt()
            yield ratio(got.detach().cpu(), expected, size, 8 * terms**0.5 * EPS_32, case)


def decoded(codes: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of codes, the scale of each weight, and what a code can be worth, in float64."""
    if codes.dtype == torch.int8:
        wide = scale.double().expand(-1, columns)
        return codes.double() * wide, wide, torch.arange(-127, 128).double()
    rows = [[LEVELS[half] for byte in row for half in (byte % 16, byte // 16)]
            for row in codes.tolist()]  # fmt: skip
    wide = scale.double().repeat_interleave(64, 1)[:, :columns]
    levels = torch.tensor(rows, dtype=torch.float64)[:, :columns]
    return levels * wide, wide, torch.tensor(LEVELS, dtype=torch.float64)


def published_levels(_: Op, device: torch.device) -> Errors:
    """The levels of nf4: quantiles of a normal, of 8 shares on one side and 9 on the other.

    QLoRA's code: the shares go in equal steps from 0.9677083 to a half, and the largest is 1.
    """
    bell, most = NormalDist(), 0.9677083
    above = [bell.inv_cdf(most - (most - 0.5) * i / 8) for i in range(8)]
    below = [-bell.inv_cdf(most - (most - 0.5) * i / 7) for i in range(7)]
    right = [value / above[0] for value in sorted([*above, 0.0, *below])]
    for level, value in zip(LEVELS, right, strict=True):
        yield near(level, value, 3e-7, "a level of nf4")  # of numbers in float32
    codes, scale = quantize(torch.zeros(2, 70, device=device), "nf4")
    yield exact(not whole(codes, scale, 70, torch.float32).any(), "a weight of zeros")
    for kind in KINDS:
        made, of = (
            quantize(torch.empty(5, 130, device="meta"), kind),
            quantize(draws(1, 5, 130), kind),
        )
        same = [(a.shape, a.dtype) for a in made] == [(a.shape, a.dtype) for a in of]
        yield exact(same and made.codes.is_meta, f"{kind} of a weight without values")
        yield refused(
            partial(whole, *of, 131 if kind == "int8" else 200, torch.float32), "do not fit"
        )
    yield refused(lambda: quantize(draws(1, 5, 6), "int4"), "int4")


def quantised_model(_: Op, device: torch.device) -> Errors:
    """Layers of the blocks alone, with adapters, in several dtypes.

    The model has the logits, and its adapters the gradients, of the one with the decoded weights.
    """
    batch = prompts(device, 3, 4)
    for kind, dtype in itertools.product(KINDS, (torch.float64, torch.float32)):
        model = full_model(device).to(dtype)
        plain = copy.deepcopy(model)
        for _name, linear in block_linears(plain):
            codes, scale = quantize(linear.weight.detach(), kind)
            values, _scales, _levels = decoded(codes.cpu(), scale.cpu(), linear.d_in)
            linear.weight.data = values.to(device, dtype)
        quantize_model(model, kind)
        changed = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
        linears = [n for n, m in plain.layers.named_modules() if isinstance(m, Linear)]
        right = [f"layers.{n}" for n in linears]
        yield exact(changed == right and model.quantized == kind, f"{changed}")
        yield refused(partial(quantize_model, model, kind), "already")
        truth = logits_and_slopes(plain, batch)
        size = max(t.abs().max() for t in truth)
        for got, expected in zip(logits_and_slopes(model, batch), truth, strict=True):
            yield ratio(
                got, expected, size, 4 * NETWORK * torch.finfo(dtype).eps, f"{kind}, {dtype}"
            )
    weight = draws(1, 7, 130).float()
    for kind, dtype in itertools.product(KINDS, (torch.bfloat16, torch.float16, torch.float32)):
        codes, scale = quantize(weight, kind)
        values, scales, _choices = decoded(codes, scale, 130)
        factor = scales.to(dtype).double()
        rounded = ((values / scales).to(dtype).double() * factor).to(dtype)
        got = whole(codes.to(device), scale.to(device), 130, dtype).cpu()
        yield exact(torch.equal(got, rounded), f"{kind} in {dtype}")
        like = Linear(130, 7, device=device)
        layer = QuantizedLinear(like, codes.to(device), scale.to(device))
        yield refused(partial(layer, torch.zeros(2, 129, device=device)), "columns")
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(draws(2, 3, 130).float().to(device))
        yield exact(y.dtype == torch.bfloat16, f"autocast to {y.dtype}")


def logits_and_slopes(model: Llama, batch: Batch) -> list[Tensor]:
    """Logits with and without a graph, and the slopes of the adapters."""
    with torch.no_grad():
        quick = class_logits(model, batch, Noise(1, 2))
    logits = class_logits(model, batch, Noise(1, 2))
    leaves = [p for a in adapters(model).values() for p in a.parameters()]
    slopes = torch.autograd.grad(logits, leaves, draws(9, *logits.shape).to(logits))
    return [t.detach().cpu() for t in (quick, logits, *slopes)]


def cut_heads(_: Op, device: torch.device) -> Errors:
    """A head cut down to three tokens has their logits, in float32 or wider, tied or not.

    The tokens are in an order that does not rise, as those of labels in words may be.
    """
    order = CLASSES[1:] + CLASSES[:1]
    batch = replace(prompts(device, 3, 4), classes=torch.tensor(order, device=device))
    for tied in (False, True):
        # A float32 product of 8 terms; the whole head rounds its logits to its own dtype.
        for dtype, stored in ((torch.float64, 0), (torch.float32, 0), (torch.bfloat16, 2**-8)):
            shape = replace(SHAPE, tie_word_embeddings=tied)
            model = Llama(shape, dtype, device).init_random_(std=0.3)
            with torch.no_grad():
                full = class_logits(model, batch, None)
                cut = class_logits(model.trim_head(order), batch, None)
            yield exact(model.lm_head.weight.dtype == torch.float32, f"a head in {cut.dtype}")
            size = full.abs().max().expand_as(full)
            yield ratio(cut, full, size, 2 * 16 * EPS_32 + stored, f"{dtype}, tied: {tied}")
    # Its rank may be above the number of tokens.
    wide = add_adapters(model, AdapterConfig(rank=4, targets=("lm_head",)))
    yield exact(adapters(wide)["lm_head"].B.shape == (3, 4), "an adapter of rank 4")


def set_means(_: Op, device: torch.device) -> Errors:
    """An adapter that takes over the mean c B A of another scaling, or of a smaller rank."""
    x = draws(1, 4, 6).to(device)
    for config in ({}, {"method": "mle"}, {"method": "blob"}, {"covariance": "full"},
                   {"method": "dropout", "dropout": 0.2}):  # fmt: skip
        for rank, scaling in ((3, 0.4), (2, 3.0)):
            linear = cast(Linear, layers(device, **config)["q_proj"])
            A, B = draws(3, rank, 6).to(device), draws(4, 5, rank).to(device)
            cast(Adapter, linear.adapter).set_lora_(A, B, scaling)
            W, bias = linear.weight.detach(), linear.get_parameter("bias").detach()
            with torch.no_grad():
                y = linear(x)
            right = x @ (W + scaling * B @ A).T + bias
            size = x.abs() @ (W.abs() + scaling * B.abs() @ A.abs()).T + bias.abs()
            # Sums of 6 and of 3 terms, and a few factors, on both sides.
            yield ratio(y, right, size, 2 * (6 + 3 + 8) * EPS, f"{config}, rank {rank}")


USE_CHECKS = [
    Check("continued training", "a run stopped and resumed has the bits of a whole one", continued),
    Check("records of steps", "(4), (5) NLL row by row, accuracy, KL, rate", steps_told),
    Check("best step", "the lowest NLL of held-out rows under the mean", best_step),
    Check("order of data", "each epoch has every row once", order_of_data),
    Check("draw by draw", "(8), (9) draws together, rows together, or alone", draw_by_draw),
    Check("text", "(8) decoding from the mixture, without a cache", text_without_a_cache),
    Check("quantised weights", "int8 and nf4: codes, products, gradients", codes_by_hand),
    Check("nf4's levels", "quantiles of a normal; shapes; what does not fit", published_levels),
    Check("quantised model", "the logits and slopes of the decoded weights", quantised_model),
    Check("cut heads", "the logits of the classes' tokens", cut_heads),
    Check("means taken over", "c B A of another scaling or rank", set_means),
]
