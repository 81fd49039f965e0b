"""Adapters attached to modules of nn.Linear layers; tests/peer/test_hf.py has transformers'."""

from __future__ import annotations

import copy
import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalabl_ref import AdapterConfig, InputError, Noise, adapters
from scalabl_ref.core.adapter import MIN_LOG_SIGMA
from scalabl_ref.core.config import TARGETS
from scalabl_ref.core.noise import FIRST_TRAINING_DRAW
from scalabl_ref.core.objective import Batch, complexity
from scalabl_ref.fast.ops import subspace_lora_linear
from scalabl_ref.interop import hf
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ..models import fill
from ..tolerances import rounding

D, H, V = 8, 12, 20
CLASSES = (5, 7, 11)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.mix, self.down_proj = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, D)

    def forward(self, x):
        y = torch.tanh(self.mix(torch.tanh(self.q_proj(x))))
        return x + self.down_proj(y.flatten(0, 1)).view(x.shape)  # rows flattened, as OPT does


class Net(nn.Module):
    """What `hf` needs of a transformers model: arguments, a head that can be set, .logits."""

    again = None  # how to checkpoint the blocks

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(D, V, bias=False)
        self.config = SimpleNamespace(max_position_embeddings=32, tie_word_embeddings=True)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x) if self.again is None else self.again(block, x)
        return SimpleNamespace(logits=self.lm_head(x[:, -logits_to_keep:]))


def net(seed: int = 0, kind: type = Net, **config) -> hf.Attached:
    """A small Net with adapters that do something, in evaluation mode."""
    attach = {key: config.pop(key) for key in ("targets", "classes") if key in config}
    torch.manual_seed(seed)
    model = kind().eval()
    config = AdapterConfig(**{"rank": 3, "targets": ("q_proj", "down_proj", "lm_head"), **config})
    return wake(hf.attach(model, config, seed, **attach), seed)


def wake(attached: hf.Attached, seed: int = 0) -> hf.Attached:
    fill(attached.model, seed)
    return attached


TOKENS = torch.arange(12).view(3, 4) % V
NOISE = Noise(3, 5)


def logits(attached, tokens=TOKENS, **options):
    return attached(tokens, **options).logits


def close(a, b, terms: int = D) -> bool:
    """To the rounding of sums of so many terms about 1, in another order or precision."""
    return bool((a - b).abs().max() <= rounding(torch.float32, terms))


def test_a_draw_is_that_of_the_op_layer_by_layer():
    """Every layer by hand: the op with its own id, and groups by row."""
    attached = net()
    model, ids = attached.model, hf.layer_ids(attached.model)

    def layer(name, x):
        module = model.get_submodule(name)
        a = module.adapter
        if a is None:
            return F.linear(x, module.weight, module.bias)
        s, sigma = a.scale()
        return subspace_lora_linear(
            x, module.weight, module.bias, a.A, a.B, s, sigma, 2.0, NOISE, ids[name]
        )

    for module in (block.mix for block in model.blocks):
        module.adapter = None  # so that one function serves all layers
    x = model.embed(TOKENS)
    for i in range(2):
        y = torch.tanh(layer(f"blocks.{i}.q_proj", x))
        y = torch.tanh(F.linear(y, model.blocks[i].mix.weight, model.blocks[i].mix.bias))
        x = x + layer(f"blocks.{i}.down_proj", y)
    expected = layer("lm_head", x)
    bound = rounding(torch.float32, 3 * (D + H)) * expected.abs().max()
    assert (logits(attached, noise=NOISE) - expected).abs().max() <= bound
    assert not torch.allclose(logits(attached), expected)


@pytest.mark.parametrize("method", ["scalabl", "blob", "dropout", "mle", "map"])
@pytest.mark.parametrize("sampling", ["batch", "example", "token"])
def test_a_row_keeps_its_draw_wherever_it_stands(method, sampling):
    """By its id, with other rows beside it, padded on the left, flattened, or cut off."""
    attached = net(method=method, sampling=sampling)
    ids = torch.tensor([4, 1, 9])
    full = logits(attached, noise=NOISE, groups=ids)
    if sampling != "batch":
        turned = logits(attached, TOKENS.flip(0), noise=NOISE, groups=ids.flip(0)).flip(0)
        assert close(full, turned)
    padded, mask = F.pad(TOKENS, (2, 0)), F.pad(torch.ones_like(TOKENS), (2, 0))
    left = logits(attached, padded, attention_mask=mask, noise=NOISE, groups=ids)[:, 2:]
    assert close(full, left)
    last = logits(attached, noise=NOISE, groups=ids, logits_to_keep=1)
    assert close(full[:, -1:], last)
    mean = logits(attached)
    assert torch.allclose(full, mean) == (method in ("mle", "map"))


def test_full_covariances_have_the_draws_too():
    attached = net(covariance="full")
    assert not torch.allclose(logits(attached, noise=NOISE), logits(attached))


def test_groups_are_rows_by_default_and_tokens_can_have_their_own():
    attached = net()
    by_row = logits(attached, noise=NOISE)
    assert torch.equal(by_row, logits(attached, noise=NOISE, groups=torch.arange(3)))
    every = torch.arange(3)[:, None].expand(3, 4)
    assert close(by_row, logits(attached, noise=NOISE, groups=every))
    one = TOKENS[:1].expand(3, -1)
    alike = logits(attached, one, noise=NOISE, groups=torch.zeros(3, dtype=torch.int64))
    assert close(alike[0], alike[2])
    assert not torch.allclose(logits(attached, one, noise=NOISE)[2], alike[2])


def test_token_draws_are_numbered_by_row_and_position():
    attached = net(sampling="token")
    rows, positions = torch.arange(3)[:, None] * 32, torch.arange(4)
    by_hand = logits(net(), noise=NOISE, groups=rows + positions)
    assert close(logits(attached, noise=NOISE), by_hand)
    later = logits(attached, TOKENS[:, 2:], position_ids=positions[None, 2:], noise=NOISE)
    assert close(later, by_hand[:, 2:])
    with pytest.raises(InputError, match="group ids must be below 134217728 with 32 positions"):
        logits(attached, noise=NOISE, groups=torch.tensor([0, 1, 2**27]))
    with pytest.raises(InputError, match="33 tokens, but the model has only 32 positions"):
        logits(attached, torch.zeros(1, 33, dtype=torch.int64), noise=NOISE)


class Continued(Net):
    """With the arguments of a model that has a cache, or is given embeddings."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None,
        cache=None,
    ):  # fmt: skip
        if inputs_embeds is not None:
            self.embed.forward = lambda _: inputs_embeds
        return super().forward(input_ids)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_token_draws_go_on_behind_what_is_cached(name):
    """A mask, if given, is that of the whole rows; row 0 begins with two tokens of padding."""
    attached = net(kind=Continued, sampling="token")
    whole, rest = logits(attached, noise=NOISE), TOKENS[:, 2:]
    cached = {name: SimpleNamespace(get_seq_length=lambda: 2), "noise": NOISE}
    assert close(logits(attached, rest, **cached), whole[:, 2:])
    mask = torch.ones_like(TOKENS)
    assert close(logits(attached, rest, attention_mask=mask, **cached), whole[:, 2:])
    mask[0, :2] = 0
    padded = logits(attached, rest, attention_mask=mask, **cached)
    assert close(padded[0], logits(attached, rest, noise=NOISE)[0])
    assert close(padded, logits(attached, attention_mask=mask, noise=NOISE)[:, 2:])
    assert close(padded[1:], whole[1:, 2:])
    cached[name] = SimpleNamespace(get_seq_length=lambda: 29)
    with pytest.raises(InputError, match="33 tokens, but the model has only 32 positions"):
        logits(attached, TOKENS, **cached)
    logits(attached, TOKENS[:, :3], **cached)


@pytest.mark.parametrize("sampling", ["example", "token"])
def test_rows_can_be_given_as_embeddings(sampling):
    attached = net(kind=Continued, sampling=sampling)
    expected = logits(attached, noise=NOISE)
    given = {"inputs_embeds": attached.model.embed(TOKENS), "noise": NOISE}
    for mask in (None, torch.ones(3, 1, 4, 4, dtype=torch.bool)):
        assert close(attached(attention_mask=mask, **given).logits, expected)
    with pytest.raises(InputError, match="the model was called without a tensor"):
        attached(noise=NOISE)


def test_a_model_that_says_nothing_of_positions_has_room_for_many():
    class Silent(Net):
        def __init__(self):
            super().__init__()
            del self.config

    rows, positions = torch.arange(3)[:, None] * hf.POSITIONS, torch.arange(4)
    by_hand = logits(net(), noise=NOISE, groups=rows + positions)
    assert close(logits(net(kind=Silent, sampling="token"), noise=NOISE), by_hand)


def test_no_draw_is_left_behind():
    attached = net()
    mean = logits(attached)
    with hf.drawing(NOISE):
        drawn = attached.model(TOKENS).logits
        assert torch.equal(logits(attached), mean)  # noise=None is the mean model, in here too
    assert torch.equal(drawn, logits(attached, noise=NOISE))
    assert torch.equal(attached.model(TOKENS).logits, mean)
    for error in (ValueError, KeyboardInterrupt):

        def stop(*_, error=error):
            raise error

        hook = attached.model.blocks[1].register_forward_hook(stop)
        with pytest.raises(error):
            logits(attached, noise=NOISE)
        hook.remove()
        assert torch.equal(attached.model(TOKENS).logits, mean)
        assert torch.equal(attached.model.lm_head(torch.ones(2, D)),
                           attached.model.lm_head(torch.ones(2, D)))  # fmt: skip
        assert hf._CALL.get() is None


def test_threads_have_draws_of_their_own():
    """Each in the midst of a call of its own before any of them reaches an adapter."""
    attached, count = net(), 3
    expected = [logits(attached, noise=Noise(0, i)) for i in range(count)]
    results, together = [None] * count, threading.Barrier(count, timeout=60)

    def meet(*_):
        together.wait()

    attached.model.embed.register_forward_hook(meet)

    def work(i):
        results[i] = logits(attached, noise=Noise(0, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


@torch.no_grad()  # else the compiler warns of itself
def test_compiled_models_draw_the_same():
    """torch.compile breaks its graph at every layer, and takes no draw for a constant."""
    torch._dynamo.reset()
    attached = net()
    run = torch.compile(attached.model, backend="eager")
    for noise in (NOISE, Noise(3, 6), None, NOISE):
        with hf.drawing(noise):
            got = run(TOKENS).logits
        assert torch.equal(got, logits(attached, noise=noise))


# --- gradient checkpointing ----------------------------------------------------------------------


def gradients(attached, noise):
    attached.model.zero_grad()
    first = logits(attached, noise=noise).square().sum()
    second = logits(attached, noise=Noise(8, 8)).square().sum()  # before the first one's backward
    (first + 2 * second).backward()
    return [p.grad.clone() for a in adapters(attached.model).values() for p in a.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("noise", [NOISE, None])
def test_checkpointed_gradients_are_the_same(reentrant, noise):
    """The function carried by hand, and as transformers does it: a function on the module."""
    attached = net()
    expected = gradients(attached, noise)
    model = attached.model.train()
    model.embed.register_forward_hook(lambda m, i, out: out.requires_grad_())
    model.again = lambda block, x: checkpoint(hf.carrying(block), x, use_reentrant=reentrant)
    for got, wanted in zip(gradients(attached, noise), expected, strict=True):
        assert torch.equal(got, wanted)
    model._gradient_checkpointing_func = lambda f, x: checkpoint(f, x, use_reentrant=reentrant)
    model.again = lambda block, x: model._gradient_checkpointing_func(block, x)
    for _ in range(2):
        for got, wanted in zip(gradients(attached, noise), expected, strict=True):
            assert torch.equal(got, wanted)
    assert model._gradient_checkpointing_func.func is hf._checkpoint
    inner = model._gradient_checkpointing_func.args[0]
    assert getattr(inner, "func", None) is not hf._checkpoint  # wrapped once


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_would_lose_the_draw_is_refused(reentrant):
    attached = net()
    attached.model.embed.register_forward_hook(lambda m, i, out: out.requires_grad_())
    attached.model.again = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    loss = logits(attached, noise=NOISE).sum()
    with pytest.raises(InputError, match=r"layer blocks.1.q_proj is run again in the backward"):
        loss.backward()


def test_the_whole_call_can_be_checkpointed():
    attached = net()
    expected = gradients(attached, NOISE)
    attached.model.zero_grad()
    run = lambda t, n: logits(attached, t, noise=n)  # noqa: E731
    first = checkpoint(run, TOKENS, NOISE, use_reentrant=False).square().sum()
    second = checkpoint(run, TOKENS, Noise(8, 8), use_reentrant=False).square().sum()
    (first + 2 * second).backward()
    got = [p.grad for a in adapters(attached.model).values() for p in a.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- attaching -----------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_but_what_trains():
    torch.manual_seed(0)
    model = Net()
    before, names = model(TOKENS).logits, set(model.state_dict())
    attached = hf.attach(model, AdapterConfig(rank=3, targets=("q_proj",)), 0)
    assert torch.equal(logits(attached, noise=NOISE), before)
    assert names <= set(model.state_dict())  # the base's tensors keep their names
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = ("A", "B", "log_s", "log_sigma")
    assert trained == {f"blocks.{i}.q_proj.adapter.{p}" for i in range(2) for p in parts}
    assert isinstance(model.blocks[0].q_proj, nn.Linear)


def test_the_seed_decides_the_start():
    starts = []
    for seed in ({}, {"seed": 0}, {"seed": 1}):
        torch.manual_seed(0)
        starts.append(adapters(hf.attach(Net(), net().config, **seed).model)["lm_head"].A)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


def test_a_head_that_was_cut_is_untied_and_may_have_fewer_rows_than_the_rank():
    attached = net(classes=CLASSES, rank=5)
    assert not attached.model.config.tie_word_embeddings
    assert adapters(attached.model)["lm_head"].B.shape == (3, 5)
    assert net().model.config.tie_word_embeddings


def test_weights_and_layers_that_are_shared_stay_shared():
    """A head tied to the embedding, and one layer in two places."""
    torch.manual_seed(0)
    model = Net().eval()
    model.lm_head.weight = model.embed.weight
    model.blocks[1].q_proj = model.blocks[0].q_proj
    expected = model(TOKENS).logits
    attached = hf.attach(model, AdapterConfig(rank=3, targets=("q_proj", "lm_head")))
    assert list(adapters(model)) == ["blocks.0.q_proj", "lm_head"]
    assert model.lm_head.weight is model.embed.weight
    assert model.blocks[1].q_proj is model.blocks[0].q_proj
    assert torch.equal(logits(attached, noise=NOISE), expected)
    assert not any(module.training for module in model.modules())


def test_a_model_of_one_layer_is_refused():
    with pytest.raises(InputError, match="the model is one nn.Linear: put it into a module"):
        hf.attach(nn.Linear(D, H), AdapterConfig(rank=3), targets="all-linear")
    inside = nn.Sequential(nn.Linear(D, H))
    assert list(adapters(hf.attach(inside, AdapterConfig(rank=3), targets="all-linear").model))


def test_names_are_matched_by_their_last_parts():
    chosen = adapters(net(targets=("mix", "1.q_proj")).model)
    assert list(chosen) == ["blocks.0.mix", "blocks.1.q_proj", "blocks.1.mix"]


def test_layer_ids_are_a_llamas_or_a_place_of_their_own():
    ids = hf.layer_ids(Net())
    assert ids == {
        "blocks.0.q_proj": 0, "blocks.0.mix": hf.ELSEWHERE + 1, "blocks.0.down_proj": 6,
        "blocks.1.q_proj": 8, "blocks.1.mix": hf.ELSEWHERE + 4, "blocks.1.down_proj": 14,
        "lm_head": 7,
    }  # fmt: skip
    pair = nn.ModuleDict({"encoder": Net(1), "decoder": Net(1)})
    assert len(set(hf.layer_ids(pair).values())) == 8
    attached = net(targets=("mix",))
    got = {name: adapter.layer for name, adapter in adapters(attached.model).items()}
    assert got == {"blocks.0.mix": hf.ELSEWHERE + 1, "blocks.1.mix": hf.ELSEWHERE + 4}


class Conv1D(nn.Module):
    """As GPT-2's: a linear layer with its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D, D))


class Quantised(nn.Linear):
    pass


def replaced(model):
    model.blocks[1].mix.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: m.add_module("c_attn", Conv1D()), {"targets": ("c_attn",)},
         "layer c_attn is a Conv1D, expected a plain nn.Linear"),
        (lambda m: m.blocks[1].add_module("mix", Quantised(H, H)), {"targets": ("mix",)},
         "layer blocks.1.mix is a Quantised, expected"),
        (replaced, {"targets": ("mix",)}, "mix is a Linear whose forward was replaced"),
        (lambda m: m.blocks[1].mix.register_forward_hook(print), {"targets": ("mix",)},
         "mix is a Linear with hooks, which are for after attaching, expected a plain"),
        (lambda m: m.blocks[1].mix.register_forward_pre_hook(print), {"targets": ("mix",)},
         "mix is a Linear with hooks"),
        (None, {"targets": ("mix", "c_fc", "ix")}, "the model has no layer named c_fc or ix"),
        (None, {"targets": ("ix",)}, "the model has no layer named ix"),
        (None, {"targets": "mix"}, "a list of names, or \"all-linear\", not 'mix'"),
        (lambda m: m.blocks[1].add_module("mix", Quantised(H, H)), {"targets": "all-linear"},
         "layer blocks.1.mix is a Quantised, expected"),
        (None, {"targets": ("mix",), "rank": 13}, r"rank 13 is larger .* blocks.0.mix \(12, 12\)"),
        (None, {"classes": [5, 20]}, "id 20 is outside the head's 20 ids"),
        (None, {"classes": [5, -1]}, "id -1 is outside the head's 20 ids"),
        (None, {"classes": []}, "there are no classes, of the head's 20 ids"),
        (lambda m: m.add_module("lm_head", None), {"targets": ("mix",), "classes": [1]},
         "head is a NoneType, expected an nn.Linear"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_named_and_left_as_it_was(change, options, message):
    model = Net()
    if change:
        change(model)
    given = {"targets": ("mix",), **options}
    config = AdapterConfig(rank=given.pop("rank", 3))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(InputError, match=message):
        hf.attach(model, config, **given)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_all_linear_layers_but_the_head(tmp_path):
    """And they come back from a folder."""
    torch.manual_seed(0)
    model = Net()
    again = copy.deepcopy(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    attached = hf.attach(model, AdapterConfig(rank=3), targets="all-linear")
    assert list(attached.targets) == list(adapters(model)) == linear and len(linear) > 2
    hf.save(attached, tmp_path)
    assert list(adapters(hf.load(again, tmp_path).model)) == linear


def test_attaching_twice_is_an_error():
    attached = net()
    with pytest.raises(InputError, match="already has adapters"):
        hf.attach(attached.model, attached.config)


def test_rows_that_cannot_be_told_apart_are_refused():
    attached = net()
    x = torch.ones(5, D)
    with hf.drawing(NOISE), pytest.raises(InputError, match="layer lm_head has an input of shape"):
        attached.model(TOKENS)
        attached.model.lm_head(x)
    with pytest.raises(InputError, match=r"groups of shape \(2,\) for 3 sequences of 4 tokens"):
        logits(attached, noise=NOISE, groups=torch.arange(2))
    with pytest.raises(InputError, match=r"groups of shape \(3, 5\) .* \(3,\) or \(3, 4\)"):
        logits(attached, noise=NOISE, groups=torch.zeros(3, 5, dtype=torch.int64))
    replica = attached.model._replicate_for_data_parallel()
    with pytest.raises(InputError, match="one process for each device"):
        replica(TOKENS)


def test_copies_and_dtypes_move_with_the_model():
    attached = net()
    other = copy.deepcopy(attached.model)
    with hf.drawing(NOISE):
        assert torch.equal(other(TOKENS).logits, attached.model(TOKENS).logits)
    attached.model.double()
    wide = logits(attached, noise=NOISE)
    assert wide.dtype == torch.float64
    with hf.drawing(NOISE):
        assert close(wide.float(), other(TOKENS).logits, 3 * (D + H))


def test_a_bfloat16_base_has_float32_adapters_and_class_logits():
    model = Net().bfloat16().eval()
    attached = wake(hf.attach(model, AdapterConfig(rank=3), targets=("mix",), classes=CLASSES))
    assert all(p.dtype == torch.float32 for a in adapters(model).values() for p in a.parameters())
    got = logits(attached, noise=NOISE)
    assert got.dtype == torch.float32 and got.shape == (3, 4, 3)
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda m, x: hidden.append(x[0]))
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(attached, noise=NOISE)
    assert got.dtype == torch.float32
    assert torch.equal(got, F.linear(hidden[0].float(), model.lm_head.weight))


# --- objective and predictive --------------------------------------------------------------------


def batch() -> Batch:
    """Three prompts of 4, 2 and 3 tokens, with labels."""
    lengths, labels = torch.tensor([4, 2, 3]), torch.tensor([2, 0, 1])
    tokens = TOKENS.masked_fill(torch.arange(4) >= lengths[:, None], 0)
    return Batch(tokens, lengths, labels, torch.tensor([6, 2, 8]), torch.tensor(CLASSES))


def test_no_batch_of_a_trainers_run_shares_a_draw():
    """Of three processes, four steps and two batches a step, in whatever order they are seen."""
    seen = []
    for process in range(3):
        made = hf._Draws()
        made.args = SimpleNamespace(
            gradient_accumulation_steps=2, world_size=3, process_index=process
        )
        for step in range(4):
            made.state = SimpleNamespace(global_step=step)
            seen += [made._draw(), made._draw()]
    assert sorted(seen) == list(range(FIRST_TRAINING_DRAW, FIRST_TRAINING_DRAW + 24))


@pytest.mark.parametrize("classes", [CLASSES, None])
def test_the_objective_is_nll_plus_beta_kl_over_n(classes):
    """Row by row, of class indices or of the classes' tokens."""
    attached, b = net(classes=classes), batch()
    attached.model.train()
    given = hf.inputs(attached, b)
    out = attached(**{k: v for k, v in given.items() if k != "labels"}, noise=NOISE, groups=b.ids)
    expected = 0.0
    for row in range(3):
        n, label = b.lengths[row], b.labels[row]
        target = label if classes else CLASSES[label]
        expected -= torch.log_softmax(out.logits[row, n - 1].double(), -1)[target] / 3
    beta_kl = 0.5 * complexity(attached.model) / 40
    loss = hf.Objective(attached, 40, beta=0.5)
    bound = rounding(torch.float32, 2 * V) * (expected + beta_kl)
    assert (loss(out, given["labels"]) - expected - beta_kl).abs() <= bound
    usual = hf.Objective(attached, 40)(out, given["labels"])
    assert (usual - expected - 2 * beta_kl).abs() <= 2 * bound
    other = hf.Objective(attached, 40, 0.5, "official")(out, given["labels"])
    kl = complexity(attached.model, "official")
    assert (other - expected - 0.5 * kl / 40).abs() <= bound * (1 + kl / 40)
    half = SimpleNamespace(logits=out.logits.bfloat16())
    rounded = SimpleNamespace(logits=half.logits.float())
    assert torch.equal(loss(half, given["labels"]), loss(rounded, given["labels"]))
    # In two batches of one step, each with its share of the KL.
    parts = [
        loss(SimpleNamespace(logits=out.logits[rows]), given["labels"][rows], torch.tensor(3))
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert (sum(parts) - expected - beta_kl).abs() <= bound
    attached.model.eval()
    assert (loss(out, given["labels"]) - expected).abs() <= bound
    assert torch.equal(hf.kl(attached), complexity(attached.model))
    assert torch.equal(hf.kl(attached, "official"), complexity(attached.model, "official"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_examples": 0}, "num_examples must be at least 1"),
        *(({"beta": beta}, f"and is {beta}") for beta in (-1.0, float("nan"), float("inf"))),
    ],
)
def test_bad_objectives_are_named(change, message):
    with pytest.raises(InputError, match=message):
        hf.Objective(**{"attached": net(), "num_examples": 3, **change})
    with pytest.raises(InputError, match="has no labels"):
        hf.Objective(net(), 3)(SimpleNamespace(logits=None), None)


@pytest.mark.parametrize("sampling", ["batch", "example", "token"])
@pytest.mark.parametrize("classes", [CLASSES, None])
def test_the_predictive_is_the_average_at_the_last_real_token(sampling, classes):
    """On either side's padding, draw by draw and row by row without any."""
    attached, b = net(sampling=sampling, classes=classes), batch()
    attached.model.train()
    attached.model.blocks[0].eval()
    modes = [module.training for module in attached.model.modules()]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for row, n in enumerate(b.lengths):
        for draw in range(4):
            out = logits(attached, b.tokens[row : row + 1, :n], noise=Noise(9, draw),
                         groups=b.ids[row : row + 1])[0, -1]  # fmt: skip
            chosen = out if classes else out[list(CLASSES)]
            expected[row] += torch.softmax(chosen.double(), -1) / 4
    right = hf.inputs(attached, b)
    turn = (torch.arange(5) + right["attention_mask"].sum(1, keepdim=True)) % 5
    left = {name: right[name].gather(1, turn) for name in ("input_ids", "attention_mask")}
    assert left["attention_mask"][:, -1].all()
    for given in (right, left):
        got = hf.predict(attached, given, 4, 9, b.ids, None if classes else CLASSES)
        assert (got.probs.sum(1) - 1).abs().max() <= rounding(torch.float64, 16)
        assert (got.probs - expected).abs().max() <= rounding(torch.float32, 4 * (D + H))
    assert [module.training for module in attached.model.modules()] == modes
    mean = hf.predict(attached, right, 0, classes=None if classes else CLASSES)
    assert (mean.mutual_information == 0).all() and (got.mutual_information > 0).all()


def test_predictions_are_of_ten_draws_of_all_tokens_by_default():
    attached = net(classes=CLASSES)
    mask = torch.ones_like(TOKENS)
    expected = hf.predict(attached, {"input_ids": TOKENS, "attention_mask": mask}, 10, 0)
    assert torch.equal(hf.predict(attached, {"input_ids": TOKENS}).probs, expected.probs)


def test_a_model_is_asked_only_for_what_it_knows():
    class Plain(Net):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    given = {
        "input_ids": TOKENS,
        "attention_mask": torch.tensor([[1] * 4, [0, 1, 1, 0], [0, 0, 1, 1]]),
    }
    seen, attached = [], net(classes=CLASSES)
    attached.model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    expected = hf.predict(attached, given, 2)
    found = hf.predict(net(classes=CLASSES, kind=Plain), given, 2)
    assert close(found.probs, expected.probs)
    positions = [[0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert all(call["position_ids"].tolist() == positions for call in seen)
    assert [call["logits_to_keep"] for call in seen] == [2] * len(seen)


def test_predictions_need_classes_once_and_tokens():
    given = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    with pytest.raises(InputError, match="no classes were given"):
        hf.predict(net(), given)
    with pytest.raises(InputError, match="the head was cut down, and has them"):
        hf.predict(net(classes=CLASSES), given, classes=CLASSES)
    given["attention_mask"][1] = 0
    with pytest.raises(InputError, match="row 1 of the batch has no token"):
        hf.predict(net(classes=CLASSES), given)


class Stub:
    """What `hf.trainer` needs of a transformers Trainer."""

    optimizer = None

    def __init__(self, model, compute_loss_func, args) -> None:
        self.model, self.compute_loss_func, self.args = model, compute_loss_func, args
        self.state = SimpleNamespace(global_step=0)

    def compute_loss(self, model, inputs):
        given = {name: value for name, value in inputs.items() if name != "labels"}
        return self.compute_loss_func(model(**given), inputs["labels"])

    def get_optimizer_cls_and_kwargs(self, args, model):
        return torch.optim.AdamW, {"eps": args.adam_epsilon}


@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_trainer_has_noise_for_each_step_two_rates_and_bounded_widths(monkeypatch, rate):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(Trainer=Stub))
    attached = net(classes=CLASSES)
    args = SimpleNamespace(learning_rate=0.1, weight_decay=0.3, adam_epsilon=1e-3, world_size=1,
                           gradient_accumulation_steps=2, process_index=0)  # fmt: skip
    made = hf.trainer(attached, 40, 0.5, 7, "official", rate, args=args)
    assert isinstance(made, Stub)
    loss, given = hf.Objective(attached, 40, 0.5, "official"), hf.inputs(attached, batch())
    model, tokens = attached.model, {n: value for n, value in given.items() if n != "labels"}
    for training in (True, False):
        model.train(training)
        for draw in (FIRST_TRAINING_DRAW, FIRST_TRAINING_DRAW + 1):
            noise = Noise(7, draw) if training else None
            expected = loss(attached(**tokens, noise=noise), given["labels"])
            assert torch.equal(made.compute_loss(model, given), expected)
    optimizer = made.create_optimizer()
    assert made.create_optimizer() is optimizer
    found = [(g["lr"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups]
    assert found == [(0.1, 0.3, 1e-3), (0.4 if rate is None else rate, 0.3, 1e-3)]
    width = adapters(model)["lm_head"].log_sigma
    width.data.fill_(-1e4)
    optimizer.step()
    assert (width == MIN_LOG_SIGMA).all()
    assert type(hf.trainer(attached, 40, base=Other, args=args)).__mro__[2] is Other


class Other(Stub):
    pass


# --- on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"classes": CLASSES}, {"method": "blob", "alpha": 3.0}])
def test_what_was_saved_gives_the_same_logits(tmp_path, options):
    attached = net(targets=("mix", "lm_head"), **options)
    hf.save(attached, tmp_path / "out")
    torch.manual_seed(0)
    back = hf.load(Net(), tmp_path / "out")
    assert torch.equal(logits(back, noise=NOISE), logits(attached, noise=NOISE))
    assert (back.config, back.targets, back.classes) == (
        attached.config, attached.targets, attached.classes
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter.json", "adapter.safetensors"
    ]  # fmt: skip


def test_broken_folders_are_named(tmp_path):
    hf.save(net(), tmp_path)
    with pytest.raises(InputError, match="was trained on another base model"):
        hf.load(Net(), tmp_path)
    path = tmp_path / "adapter.json"
    record = json.loads(path.read_text())
    for change, message in (
        ({"adapter": {"radius": 1}}, "adapter.json: .*radius"),
        ({"targets": ["q"]}, "adapter.json: the model has no layer named q"),
        ({"targets": 3}, "adapter.json: "),
        ({"classes": ["A"]}, "adapter.json: "),
    ):
        path.write_text(json.dumps({**record, **change}))
        torch.manual_seed(0)
        with pytest.raises(InputError, match=message):
            hf.load(Net(), tmp_path)
    for key in record:
        path.write_text(json.dumps({k: value for k, value in record.items() if k != key}))
        with pytest.raises(InputError, match=f"adapter.json: key '{key}' is missing"):
            hf.load(Net(), tmp_path)
    path.write_text(json.dumps(record))
    tensors, _ = load_tensors(file := tmp_path / "adapter.safetensors")
    del tensors["lm_head.base"]
    save_tensors(file, tensors.items())
    with pytest.raises(InputError, match="adapter.safetensors: tensor lm_head.base is missing"):
        hf.load(Net(), tmp_path)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def base_in(dtype, published=torch.float32, factor=1.0) -> Net:
    """A Net loaded in `dtype`, with weights down to 1e-9 times the usual."""
    torch.manual_seed(0)
    model = Net().eval()
    for block in model.blocks:
        block.q_proj.weight.data *= factor * torch.logspace(0, -9, D)
    return model.to(published).to(dtype)


@pytest.mark.parametrize("published", DTYPES)
@pytest.mark.parametrize("then", DTYPES)
@pytest.mark.parametrize("now", DTYPES)
def test_a_base_is_known_in_whatever_dtype_it_is_loaded(tmp_path, published, then, now):
    attached = hf.attach(base_in(then, published), AdapterConfig(rank=3, targets=("q_proj",)))
    wake(attached)
    hf.save(attached, tmp_path)
    back = hf.load(base_in(now, published), tmp_path)
    for name, adapter in adapters(back.model).items():
        assert torch.equal(adapter.B, adapters(attached.model)[name].B)
    with pytest.raises(InputError, match="was trained on another base model"):
        hf.load(base_in(now, published, factor=1.02), tmp_path)


def test_targets_of_a_llama_are_the_defaults():
    assert set(AdapterConfig().targets) <= set(TARGETS)
    with pytest.raises(InputError, match="the model has no layer named v_proj"):
        hf.attach(Net(), AdapterConfig(rank=3))
