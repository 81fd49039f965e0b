"""One step of training: the two objectives, micro-batches, recomputing, compiling."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from scalabl_ref import InputError, Llama, Noise, adapters
from scalabl_ref.core.adapter import MIN_LOG_SIGMA, adapter_state
from scalabl_ref.core.noise import FIRST_TRAINING_DRAW
from scalabl_ref.core.objective import Batch, class_logits, complexity
from scalabl_ref.data import collate
from scalabl_ref.fast.rows import compile_blocks
from scalabl_ref.training import trainer as trainer_module
from scalabl_ref.training.schedule import kl_period
from scalabl_ref.training.trainer import TrainConfig, Trainer

from ..models import fill, tiny_data, tiny_model, trainer
from ..tolerances import rounding


@pytest.mark.parametrize("micro_batch", [1, 3])  # 3: the last of a batch of 4 is shorter
def test_gradient_accumulation_does_not_change_the_gradient(micro_batch):
    whole, pieces = trainer(), trainer(micro_batch=micro_batch)
    assert whole.config.batch == 4
    for t in (whole, pieces):
        t.step()
        t.step()
    for a, b in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        if a.grad is not None and b.grad is not None:
            scale = a.grad.abs().max().clamp(min=1e-3)
            assert (a.grad - b.grad).abs().max() <= rounding(torch.float32, 512) * scale


# What torch.compile's tracer warns of in its own doings.
DYNAMO = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@pytest.mark.parametrize("method", ["scalabl", "blob", "dropout"])
def test_blocks_computed_again_give_the_same_gradients(method):
    """Of a block its input is kept and nothing else: fewer bytes, the same numbers."""
    kept, again = (trainer(model={"method": method}, recompute=r) for r in (False, True))
    sizes = []
    for t in (kept, again):
        bytes_of: dict[int, int] = {}

        def pack(x, bytes_of=bytes_of):
            bytes_of[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            t.step()
        sizes.append(sum(bytes_of.values()))
    for a, b in zip(kept.model.parameters(), again.model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    assert sizes[1] < sizes[0]


def test_compiled_blocks_do_not_offload():
    with pytest.raises(InputError, match="offload_activations"):
        TrainConfig(compile=True, offload_activations=True)


@DYNAMO
@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False)
def test_compiled_blocks_train_alike():
    """Few programs for all blocks, draws and shapes, no break in a graph, the same losses."""
    torch._dynamo.reset()
    more = torch._dynamo.config.recompile_limit + 2  # blocks than there may be programs of one
    plain, compiled = (
        Trainer(tiny_model(layers=more), tiny_data(), TrainConfig(steps=4, batch=4))
        for _ in range(2)
    )
    programs = []

    def compiled_by(graph, inputs):
        programs.append(graph)
        return graph.forward

    compile_blocks(compiled.model, compiled_by)
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    for _ in range(4):
        loss = plain.step()["loss"]
        assert abs(compiled.step()["loss"] - loss) <= rounding(torch.float32, 512) * loss
    assert not breaks and 0 < len(programs) <= 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
@DYNAMO
def test_blocks_compiled_by_inductor_train_alike():
    torch._dynamo.reset()
    plain, compiled = trainer(steps=3), trainer(steps=3, compile=True)
    for _ in range(3):
        loss = plain.step()["loss"]
        assert abs(compiled.step()["loss"] - loss) <= rounding(torch.float32, 512) * loss


def test_one_objective_step_is_adamw_on_nll_plus_beta_kl_over_n():
    ours = trainer(beta=3.0, warmup=0.0, kl="official")
    twin = trainer(beta=3.0, warmup=0.0, kl="official")
    ours.step()
    batch = collate(twin.data, twin.order.indices(0))
    nll = cross_entropy(
        class_logits(twin.model, batch, Noise(0, FIRST_TRAINING_DRAW)), batch.labels
    )
    (nll + 3.0 * complexity(twin.model, "official") / 10).backward()
    groups = [
        {"params": [p for n, p in twin.model.named_parameters() if n[-2:] in (".A", ".B")]},
        {"params": twin.variational, "lr": 4e-2},
    ]
    torch.optim.AdamW(groups, lr=1e-2, eps=1e-6, weight_decay=0).step()
    moved = 0.0
    gradients = zip(ours.model.named_parameters(), twin.model.parameters(), strict=True)
    for (name, a), b in gradients:  # Adam's first step does not see how large they are
        if a.requires_grad:
            size = b.grad.abs().max()
            assert (a.grad - b.grad).abs().max() <= rounding(torch.float32, 512) * size, name
    for (name, a), b in zip(
        adapter_state(ours.model).items(), adapter_state(twin.model).values(), strict=True
    ):
        # Adam's first step is lr * g / (|g| + eps): a rounding of g near eps moves it by lr / 2.
        assert (a - b).abs().max() <= 1e-4 * 4e-2, name
        moved = max(moved, float((a - adapter_state(trainer().model)[name]).abs().max()))
    assert moved > 1e-2 / 2


@pytest.mark.parametrize("batch", [4, 5, 20])
@pytest.mark.parametrize("method", ["map", "scalabl"])
def test_the_gradients_of_an_epoch_add_up_to_that_of_the_objective(method, batch):
    """Ten examples in batches of 4, 4 and 2: N / batch times the gradient of (4) on all of them."""
    still = {"lr": 0.0, "variational_lr": 0.0, "beta": 3.0, "steps": 9}
    ours, whole = (trainer(model={"method": method}, batch=batch, **still) for _ in range(2))
    steps = ours.order.steps_per_epoch
    assert [len(ours.order.indices(step)) for step in range(steps)].count(2) == (batch == 4)
    sums: dict[str, torch.Tensor] = {}
    for step in range(steps):
        record = ours.step()
        rows = collate(whole.data, whole.order.indices(step))
        logits = class_logits(whole.model, rows, Noise(0, FIRST_TRAINING_DRAW + step))
        nll = cross_entropy(logits, rows.labels, reduction="sum")
        (nll / 10).backward()
        mean = nll.item() / len(rows.labels)
        assert abs(record["nll"] - mean) <= rounding(torch.float32, 512) * mean
        for name, p in ours.model.named_parameters():
            if p.grad is not None:
                sums[name] = sums.get(name, torch.zeros_like(p)) + p.grad
    (3.0 * complexity(whole.model) / 10).backward()
    for name, p in whole.model.named_parameters():
        assert (p.grad is None) == (name not in sums)
        if p.grad is not None:
            wanted = p.grad * 10 / min(batch, 10)
            bound = rounding(torch.float32, 1024) * wanted.abs().max()
            assert (sums[name] - wanted).abs().max() <= bound, name
    assert sums


def test_a_step_follows_the_schedule():
    """The first of a warm-up has the rate 0, and the next a half of it all."""
    ours = trainer(warmup=2 / 12, beta=0.0)
    start = {n: p.clone() for n, p in adapter_state(ours.model).items()}
    assert ours.step()["lr"] == 0.0
    assert all(torch.equal(p, start[n]) for n, p in adapter_state(ours.model).items())
    assert ours.step()["lr"] == 5e-3
    moved = max(float((p - start[n]).abs().max()) for n, p in adapter_state(ours.model).items())
    # AdamW moves by a rate at most: half of 4e-2, that of the variational parameters.
    assert 0 < moved <= 4e-2 / 2 * (1 + rounding(torch.float32, 8))


def test_weight_decay_is_decoupled():
    """One step more or less of it differs by rate * decay * the value."""
    with_, without = trainer(weight_decay=0.5, warmup=0.0), trainer(warmup=0.0)
    start = {n: p.clone() for n, p in adapter_state(without.model).items()}
    with_.step()
    without.step()
    for (name, a), b in zip(
        adapter_state(with_.model).items(), adapter_state(without.model).values(), strict=True
    ):
        shrunk = start[name] * 0.5 * (4e-2 if ".log_" in name else 1e-2)
        assert (b - a - shrunk).abs().max() <= rounding(torch.float32, 4) * start[name].abs().max()


def test_the_official_loss_is_the_nll():
    t = trainer(objective="official", kl="official")
    record = t.step()
    assert record["loss"] == record["nll"] and record["kl"] > 0


def test_official_objective_steps_the_kl_apart():
    """With lr = 0 only the SGD step is left: sigma moves by kl_lr * pi * gradient of the KL.

    The last step but one of a round of 61: pi is 1/4 there, and 2^-61 at the start.
    """
    ours = trainer(
        steps=80, lr=0.0, variational_lr=0.0, warmup=0.0, objective="official", kl="official"
    )
    ours.done = 59
    before = {n: (a.log_s.clone(), a.log_sigma.clone()) for n, a in adapters(ours.model).items()}
    ours.step()
    assert kl_period(10, 4) == 61
    rate = 0.2 * (80 - 59) / 80 * 2.0**60 / (2.0**62 - 1)
    for name, adapter in adapters(ours.model).items():
        log_s, log_sigma = (t.detach().double() for t in before[name])
        s, sigma = log_s.exp(), log_sigma.exp()
        slope_s = s**2 / sigma**2  # d KL(p || q) / d log s
        slope_sigma = 1 - (1 + s**2) / sigma**2
        for new, old, slope in (
            (adapter.log_s, log_s, slope_s),
            (adapter.log_sigma, log_sigma, slope_sigma),
        ):
            step = (rate * slope).abs()
            bound = rounding(torch.float32, 8) * (step + old.abs())
            assert ((new.detach().double() - (old - rate * slope)).abs() <= bound).all()


@pytest.mark.parametrize("objective", ["elbo", "official"])
def test_a_step_keeps_sigma_above_its_bound(objective):
    t = trainer(objective=objective, kl="forward")
    own = adapters(t.model).values()
    with torch.no_grad():
        for adapter in own:
            adapter.log_sigma.fill_(MIN_LOG_SIGMA - 5)
    t.step()
    assert all((adapter.log_sigma >= MIN_LOG_SIGMA).all() for adapter in own)


@pytest.mark.parametrize("objective", ["elbo", "official"])
def test_a_step_leaves_sigma_alone_above_its_bound(objective):
    """With rates of 0 no step moves it: it has no bound from above, and s has none."""
    t = trainer(objective=objective, lr=0.0, variational_lr=0.0, kl_lr=0.0)
    own = adapters(t.model).values()
    with torch.no_grad():
        for adapter in own:
            adapter.log_sigma.fill_(1.0)
            adapter.log_s.fill_(MIN_LOG_SIGMA - 5)
    t.step()
    for adapter in own:
        assert (adapter.log_sigma == 1.0).all() and (adapter.log_s == MIN_LOG_SIGMA - 5).all()


def test_noise_of_a_step_is_its_own():
    """With weights that stay, step i has the loss of draw FIRST_TRAINING_DRAW + i and of no other:
    neither another step's, nor one that a prediction makes."""
    t = trainer(lr=0.0, beta=0.0)
    fill(t.model)

    def nll(batch: Batch, draw: int) -> float:
        with torch.no_grad():
            logits = class_logits(t.model, batch, Noise(0, draw))
        return cross_entropy(logits, batch.labels).item()

    for step in range(6):
        batch = collate(t.data, t.order.indices(step))
        own = nll(batch, FIRST_TRAINING_DRAW + step)
        others = [nll(batch, FIRST_TRAINING_DRAW + i) for i in range(6) if i != step]
        others += [nll(batch, i) for i in range(6)]
        found, bound = t.step()["nll"], rounding(torch.float32, 512) * own
        assert abs(found - own) <= bound < min(abs(found - other) for other in others)


class Seen:
    """A collector that notes after which steps it is called."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.last: torch.Tensor | None = None

    def collect(self, model: Llama) -> None:
        self.steps.append(len(self.steps))
        self.last = adapter_state(model)["lm_head.A"].clone()

    def state(self) -> dict[str, torch.Tensor]:
        return {"count": torch.tensor(len(self.steps))}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.steps = list(range(int(state["count"])))


def test_a_collector_sees_the_weights_after_each_of_the_last_steps():
    seen = Seen()
    t = trainer(collector=seen, swag=0.25)
    counts = []
    for _ in range(12):
        t.step()
        counts.append(len(seen.steps))
    assert counts == [0] * 9 + [1, 2, 3]
    assert seen.last is not None and torch.equal(seen.last, adapter_state(t.model)["lm_head.A"])
    again = trainer(collector=Seen(), swag=0.25)
    again.restore(t.state(), 12)
    assert again.collector.steps == seen.steps


@pytest.mark.parametrize("swag_lr", [None, 0.04])
def test_rates_are_constant_while_weights_are_collected(swag_lr):
    """Those of the first collected step, or swag_lr; without SWAG they fall as ever."""
    seen = Seen()
    with_swag, without = trainer(collector=seen, swag=0.25, swag_lr=swag_lr), trainer()
    expected = [without.step()["lr"] for _ in range(12)]
    for step in range(12):
        before = len(seen.steps)
        rate = with_swag.step()["lr"]
        collected = len(seen.steps) > before
        assert collected == (step >= 9)
        want = expected[min(step, 9)] if swag_lr is None or not collected else swag_lr
        assert abs(rate - want) <= rounding(torch.float64, 4) * want
        groups = [group["lr"] for group in with_swag.optimizer.param_groups]
        ratio = with_swag.rates[1] / with_swag.rates[0]
        assert abs(groups[0] - want) + abs(groups[1] - ratio * want) <= 1e-15
    assert expected[11] < expected[9] > 0


@pytest.mark.parametrize(("collector", "swag"), [(None, 0.25), (Seen(), 0.0)])
def test_a_collector_without_its_steps_is_refused_and_the_other_way_round(collector, swag):
    with pytest.raises(InputError, match="a collector is needed if it is above 0, else none"):
        trainer(collector=collector, swag=swag)


def test_training_learns():
    t = trainer(steps=60, lr=3e-2, beta=0.01)
    losses = [t.step()["nll"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_mle_has_no_kl():
    t = trainer(model={"method": "mle"})
    record = t.step()
    assert record["kl"] == 0.0 and record["loss"] == record["nll"] and record["sigma"] == 0.0


def test_a_loss_that_is_not_finite_ends_the_run():
    t = trainer()
    with torch.no_grad():
        adapters(t.model)["lm_head"].A.fill_(float("inf"))
    with pytest.raises(InputError, match="the loss is nan at step 0"):
        t.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"lr": -1.0}, "lr must be finite and not negative"),
        ({"variational_lr": -0.05}, "variational_lr must be finite and not negative"),
        ({"adam_eps": float("inf")}, "adam_eps must be finite"),
        ({"warmup": 5}, "warmup must lie between 0 and 1"),
        ({"swag": -0.1}, "swag must lie between 0 and 1"),
        ({"swag": 0.5, "swag_lr": -1.0}, "swag_lr must be finite and not negative"),
        ({"kl_gamma": 0.0}, "kl_gamma must be positive"),
        ({"swag_lr": 0.1}, "swag_lr needs swag and lr above 0"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"kl": "reverse"}, "kl must be one of forward, official"),
        ({"objective": "sgd"}, "objective must be one of elbo, official"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**change)


def test_a_restored_trainer_goes_on_to_the_bit():
    first, second = (
        Trainer(tiny_model(), tiny_data(), TrainConfig(steps=4, batch=4)) for _ in range(2)
    )
    for _ in range(2):
        first.step()
    second.restore({name: t.clone() for name, t in first.state().items()}, 2)
    for _ in range(2):
        assert first.step() == second.step()
    for name, value in adapter_state(first.model).items():
        assert torch.equal(value, adapter_state(second.model)[name]), name


def test_the_smallest_settings_are_taken():
    TrainConfig(steps=1, batch=1, micro_batch=1, checkpoint_every=1)


def test_defaults_are_those_of_the_page():
    """docs/method.md, and eq. (7)'s 8."""
    c = TrainConfig()
    assert (c.steps, c.batch, c.micro_batch, c.lr, c.variational_lr) == (1000, 8, None, 1e-3, None)
    assert (c.warmup, c.adam_eps, c.weight_decay, c.objective) == (0.06, 1e-6, 0.0, "elbo")
    assert (c.kl, c.beta, c.kl_lr, c.kl_gamma, c.swag) == ("forward", 1.0, 0.2, 8.0, 0.0)
    assert (c.swag_lr, c.seed, c.checkpoint_every) == (None, 0, 200)
    assert not (c.recompute or c.offload_activations or c.compile)


def test_blocks_are_compiled_iff_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(trainer_module, "compile_blocks", seen.append)
    model = tiny_model()
    Trainer(model, tiny_data(), TrainConfig(steps=1))
    assert not seen
    Trainer(model, tiny_data(), TrainConfig(steps=1, compile=True))
    assert seen == [model]


@pytest.mark.parametrize(
    "model", [{"method": "blob"}, {"prior": "layer"}, {"covariance": "full"}, {"method": "tfb"}]
)
def test_what_cannot_be_trained_is_refused_before_a_step(model):
    with pytest.raises(InputError, match="KL|not trained"):
        trainer(model=model, kl="official")
