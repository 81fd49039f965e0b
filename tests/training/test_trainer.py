"""Schedules, the two objectives, resuming to the bit, and runs on disk."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import InputError, Llama, Noise, adapters, load_run, save_run
from scalabl_ref.core.adapter import MIN_LOG_SIGMA, SubspaceAdapter, adapter_state
from scalabl_ref.core.noise import FIRST_TRAINING_DRAW
from scalabl_ref.core.objective import complexity
from scalabl_ref.data import Encoded
from scalabl_ref.fast.rows import compile_blocks
from scalabl_ref.support.errors import Interrupted
from scalabl_ref.training.trainer import (
    TrainConfig,
    Trainer,
    fit,
    kl_period,
    kl_weight,
    run_facts,
    warmup_linear,
)

from ..models import CLASSES, TINY, tiny_model
from ..tolerances import rounding


def tiny_data(rows: int = 10, seed: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (rows,), generator=generator).tolist()
    tokens = [torch.randint(1, 40, (n,), generator=generator).tolist() for n in lengths]
    labels = torch.randint(0, len(CLASSES), (rows,), generator=generator).tolist()
    return Encoded(tokens, labels, list(CLASSES))


def trainer(data: Encoded | None = None, model: dict | None = None, **config) -> Trainer:
    settings = {"steps": 12, "batch": 4, "lr": 1e-2, "checkpoint_every": 5, **config}
    return Trainer(
        tiny_model(wake=False, **(model or {})), data or tiny_data(), TrainConfig(**settings)
    )


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.eq_7
def test_periods_of_the_official_schedule():
    """METHOD, section 3: M at batch 4 for each data set's number of training examples."""
    sizes = {
        "winogrande-xs": (160, 183),
        "winogrande-s": (640, 316),
        "winogrande-m": (2558, 544),
        "winogrande-l": (10234, 939),
        "arc-c": (1119, 393),
        "arc-e": (2251, 518),
        "obqa": (4957, 706),
        "boolq": (9427, 909),
    }
    for name, (examples, period) in sizes.items():
        assert kl_period(examples, 4) == period, name


@given(st.integers(1, 60))
def test_kl_weights_are_the_geometric_round_of_the_official_code(period):
    for step in range(2 * period):
        i = step % period + 1
        literal = 2**i / (2 ** (period + 1) - 1)
        assert abs(kl_weight(step, period) - literal) <= rounding(torch.float64, 8) * literal


def test_kl_weight_does_not_overflow():
    assert 0.0 <= kl_weight(0, 2000) < kl_weight(1999, 2000) <= 0.5 * (1 + 1e-15)


def test_warmup_rises_then_falls_to_zero():
    factors = [warmup_linear(step, 100, 0.06) for step in range(101)]
    assert factors[0] == 0.0 and factors[6] == 1.0 and factors[100] == 0.0
    assert factors[3] == 0.5 and factors[53] == 0.5
    assert all(a < b for a, b in zip(factors[:6], factors[1:7], strict=True))
    assert all(a > b for a, b in zip(factors[6:-1], factors[7:], strict=True))
    assert warmup_linear(0, 10, 0.0) == 1.0


# --- one step ----------------------------------------------------------------------------------


def test_gradient_accumulation_does_not_change_the_gradient():
    whole, pieces = trainer(), trainer(micro_batch=1)
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
def test_compiled_blocks_train_alike(monkeypatch):
    """Few programs for all blocks, draws and shapes, no break in a graph, the same losses."""
    monkeypatch.setattr(torch._dynamo.config, "allow_unspec_int_on_nn_module", False)
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
    from torch.nn.functional import cross_entropy

    from scalabl_ref.core.objective import class_logits
    from scalabl_ref.data import collate

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


def test_noise_of_a_step_is_its_own(monkeypatch):
    """No two steps share a draw, and prediction's draws are never training's."""
    drawn = []
    t = trainer()
    original = SubspaceAdapter.op

    def spy(*arguments):
        noise, layer, _, groups, _ = arguments[8:]
        drawn.extend((noise.seed, noise.draw, layer, g) for g in set(groups.tolist()))
        return original(*arguments)

    monkeypatch.setattr(SubspaceAdapter, "op", staticmethod(spy))
    for _ in range(8):
        t.step()
    assert len(drawn) == len(set(drawn)) > 100
    assert min(draw for _, draw, _, _ in drawn) >= FIRST_TRAINING_DRAW


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
        ({"beta": float("nan")}, "beta must be finite"),
        ({"kl": "reverse"}, "kl must be one of forward, official"),
        ({"objective": "sgd"}, "objective must be one of elbo, official"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**change)


# --- runs on disk ------------------------------------------------------------------------------


def log_of(folder):
    keep = ("step", "loss", "nll", "kl", "sigma", "lr")
    lines = (folder / "train.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in keep} for line in lines]


@pytest.mark.parametrize("objective", ["elbo", "official"])
@pytest.mark.parametrize("stop", [3, 5, 11])
def test_resuming_repeats_the_uninterrupted_run_to_the_bit(tmp_path, objective, stop):
    whole = trainer(objective=objective)
    fit(whole, tmp_path / "whole")

    def interrupt(record):
        if record["step"] == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=f"SIGTERM after {stop} steps"):
        fit(trainer(objective=objective), tmp_path / "parts", progress=interrupt)
    second = trainer(objective=objective)
    fit(second, tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    for a, b in zip(
        adapter_state(whole.model).values(), adapter_state(second.model).values(), strict=True
    ):
        assert torch.equal(a, b)


def die(record):
    """Stop a run of checkpoints every 5 steps after 8, as losing the machine would."""
    if record["step"] == 7:
        raise MemoryError


def test_a_run_killed_outright_resumes_from_its_last_checkpoint(tmp_path):
    """Nothing could be saved at the end: steps after the checkpoint are done again."""

    whole = trainer()
    fit(whole, tmp_path / "whole")
    with pytest.raises(MemoryError):
        fit(trainer(), tmp_path / "parts", progress=die)
    assert len(log_of(tmp_path / "parts")) == 8
    again = trainer()
    fit(again, tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


DAMAGE = b"\xff\x00 \r \xe2\x80\xa8 \x85"  # no UTF-8, and to some the ends of lines


@pytest.mark.parametrize("end, kept", [(b"\n1\n2\n3\n4\n5", b"\n1\n2\n3\n"), (b"", b"\n")])
def test_a_damaged_log_does_not_stop_a_run(tmp_path, end, kept):
    """Its lines up to the checkpoint, here 5, stay as they are; a last one without end gets it."""
    with pytest.raises(MemoryError):
        fit(trainer(), tmp_path, progress=die)
    log = tmp_path / "train.jsonl"
    log.write_bytes(b"0\n" + DAMAGE + end)
    fit(trainer(), tmp_path, resume=True)
    kept = b"0\n" + DAMAGE + kept
    before, after = log.read_bytes()[: len(kept)], log.read_bytes()[len(kept) :]
    assert before == kept
    steps = [json.loads(line)["step"] for line in after.splitlines()]
    assert steps == list(range(5, 12))


def test_ctrl_c_checkpoints_too(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # ignored, where the suite runs in the background
    with pytest.raises(Interrupted) as caught:
        fit(trainer(), tmp_path, progress=lambda record: os.kill(os.getpid(), signal.SIGINT))
    assert caught.value.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert (
        len(log_of(tmp_path)) == 1
        and (tmp_path / "checkpoint" / "00000001" / "manifest.json").exists()
    )


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    """One that has not begun, and one killed before its first checkpoint, whatever it logged."""

    def die_early(record):
        if record["step"] == 3:
            raise MemoryError

    fit(trainer(), tmp_path / "whole")
    fit(trainer(), tmp_path / "new", resume=True)
    with pytest.raises(MemoryError):
        fit(trainer(), tmp_path / "parts", progress=die_early)
    (tmp_path / "parts" / "checkpoint" / ".00000005.tmp").mkdir(parents=True)
    assert len(log_of(tmp_path / "parts")) == 4
    fit(trainer(), tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "new") == log_of(tmp_path / "parts")


@pytest.mark.parametrize(
    "model", [{"method": "blob"}, {"prior": "layer"}, {"covariance": "full"}, {"method": "tfb"}]
)
def test_what_cannot_be_trained_is_refused_before_a_step(model):
    with pytest.raises(InputError, match="KL|not trained"):
        trainer(model=model, kl="official")


def test_resuming_something_else_is_refused(tmp_path):
    fit(trainer(), tmp_path)
    for change, message in (
        ({"lr": 0.5}, r"train.lr was 0.01 and now is 0.5"),
        ({"model": {"rank": 2}}, r"adapter.rank was 3 and now is 2"),
        ({"data": tiny_data(seed=1)}, "data differs"),
    ):
        with pytest.raises(InputError, match=message):
            fit(trainer(**change), tmp_path, resume=True)
    for manifest in tmp_path.glob("checkpoint/*/manifest.json"):
        manifest.write_text("not a checkpoint")
    with pytest.raises(InputError, match=r"00000012/manifest\.json: not JSON"):
        fit(trainer(), tmp_path, resume=True)
    for manifest in tmp_path.glob("checkpoint/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(InputError, match=r"00000012/manifest\.json: no such file"):
        fit(trainer(), tmp_path, resume=True)


def saved_run(tmp_path):
    base = Llama(TINY).init_random_(0, std=0.3)
    model = tiny_model()
    save_run(tmp_path, model, {"model": "base", "note": 1})
    return base, model


def test_a_run_comes_back_as_it_was(tmp_path):
    base, model = saved_run(tmp_path)
    loaded, info = load_run(tmp_path, base)
    assert info["note"] == 1
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(loaded(tokens, noise=Noise(1, 1)), model(tokens, noise=Noise(1, 1)))


def test_another_base_is_refused(tmp_path):
    saved_run(tmp_path)
    other = Llama(TINY).init_random_(1, std=0.3)
    for folder, words in (
        (None, "was trained on base; the model given is another model"),
        ("other", "was trained on base; other is another model"),
        ("./base", "was trained on another base model than base is now"),
    ):
        with pytest.raises(InputError, match=words):
            load_run(tmp_path, other, base=folder)


def test_broken_runs_are_named(tmp_path):
    base, model = saved_run(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    for key in ("adapter", "fingerprint"):
        rest = {name: value for name, value in record.items() if name != key}
        (tmp_path / "run.json").write_text(json.dumps(rest))
        with pytest.raises(InputError, match=f"key '{key}' is missing"):
            load_run(tmp_path, Llama(TINY).init_random_(0, std=0.3))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="run.json: not JSON"):
        load_run(tmp_path, Llama(TINY).init_random_(0, std=0.3))
    with pytest.raises(InputError, match="absent: no such folder: expected a run"):
        load_run(tmp_path / "absent", base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 5}, "model must be a text, not 5"),
        ({"model": None}, "model must be a text, not None"),
        ({"fingerprint": []}, "fingerprint must be a text, not []"),
        ({"head_tokens": "abc"}, "head_tokens must be a list (each a whole number) or null, not"),
        ({"head_tokens": [5, 7, 1.5]}, "head_tokens must be a list (each a whole number) or null"),
        ({"dtype": "float99"}, "dtype must be float32 or bfloat16 or null, not 'float99'"),
        ({"quantize": True}, "quantize must be int8 or nf4 or null, not True"),
        ({"format": None}, "format must be a text, not None"),
        ({"format": "xml"}, "format must be jsonl or arc or"),
        ({"limit": "3"}, "limit must be a whole number or null, not '3'"),
        ({"holdout": [0.5]}, "holdout must be a finite number, not [0.5]"),
        ({"train": "long"}, "train must be an object"),
        ({"train": {"kl": "sideways"}}, "train: kl must be forward or official or null, not"),
        ({"train": {"seed": 0.5}}, "train: seed must be a whole number or null, not 0.5"),
        ({"adapter": []}, "adapter must be an object"),
        ({"adapter": {"method": "mle", "rank": 2.5}}, "adapter: rank must be a whole number, not"),
        ({"adapter": {"method": "mle", "rank": 3, "size": 1}}, "adapter: unknown field 'size'"),
        ({"adapter": {"method": "magic", "rank": 3}}, "method must be one of scalabl, mle"),
        (
            {"adapter": {"method": "mle", "rank": 3, "targets": 4}},
            "adapter: targets must be a list",
        ),
    ],
)
def test_facts_that_cannot_be_are_named(tmp_path, change, message):
    base, _ = saved_run(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=re.escape(f"run.json: {message}")):
        load_run(tmp_path, base)


def test_facts_that_nobody_told_are_the_usual_ones(tmp_path):
    """And those of a part of a run's record are completed, with the rest kept."""
    saved_run(tmp_path)
    info = run_facts(tmp_path)
    assert (info["format"], info["holdout"], info["note"]) == ("jsonl", 0, 1)
    for key in ("data", "data_sha256", "dtype", "limit", "posterior", "prompt_template"):
        assert info[key] is None, key
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**info, "train": {"kl": "official", "lr": 0.5}}))
    assert run_facts(tmp_path)["train"] == {
        "kl": "official", "lr": 0.5, "objective": None, "seed": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("lm_head.A"), "tensor lm_head.A is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is unexpected"),
        (lambda t: t.update({"lm_head.B": torch.zeros(2, 2)}), r"lm_head.B has shape \(2, 2\)"),
        (lambda t: t["lm_head.B"].fill_(float("nan")), "lm_head.B has NaN"),
    ],
)
def test_broken_adapters_are_named(tmp_path, spoil, message):
    from scalabl_ref.support.tensors import save_tensors

    base, model = saved_run(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    spoil(tensors)
    save_tensors(tmp_path / "adapter.safetensors", tensors.items())
    with pytest.raises(InputError, match=message):
        load_run(tmp_path, base)
