"""Held-out rows during training: their score, the best step, and both after an interruption."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.core.noise import FIRST_TRAINING_DRAW, Noise
from scalabl_ref.core.objective import class_logits
from scalabl_ref.data import collate
from scalabl_ref.support.errors import Interrupted
from scalabl_ref.training import ranks as distributed
from scalabl_ref.training import savepoints
from scalabl_ref.training.loop import fit
from scalabl_ref.training.watch import Watch, interval, mean_model_score

from ..models import tiny_data, tiny_model, trainer
from ..ranks import on_ranks
from ..tolerances import rounding

HELD = tiny_data(7, seed=3)
FAST = {"lr": 0.3}  # so fast that the best step is not the last
CPU = torch.device("cpu")


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "train.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_score_is_that_of_the_mean_model_row_by_row():
    model = tiny_model()
    nll = right = 0.0
    for i, label in enumerate(HELD.labels):
        with torch.no_grad():
            logits = class_logits(model, collate(HELD, [i]), None)[0].double()
        nll -= torch.log_softmax(logits, 0)[label].item()
        right += logits.argmax().item() == label
    for batch in (1, 3, 32):
        score = mean_model_score(model, HELD, batch)
        assert abs(score.nll - nll / 7) <= rounding(torch.float32, 512) * nll / 7
        assert score.accuracy == pytest.approx(right / 7)
    assert 0 < right < 7, "of no use if all rows are alike"


def test_a_record_has_the_accuracy_of_the_steps_rows_before_the_step():
    t = trainer()
    for step in range(3):
        batch = collate(t.data, t.order.indices(step))
        with torch.no_grad():
            logits = class_logits(t.model, batch, Noise(0, FIRST_TRAINING_DRAW + step))
        right = (logits.argmax(1) == batch.labels).double().mean().item()
        assert t.step()["accuracy"] == pytest.approx(right)


def test_the_hook_gets_what_the_log_gets(tmp_path):
    records: list[dict[str, float]] = []
    begun: list[int] = []
    watch = Watch(HELD, every=5)
    started = time.perf_counter()
    fit(trainer(), tmp_path, on_step=records.append, watch=watch, on_start=begun.append)
    seconds = [record["seconds"] for record in records]
    assert min(seconds) > 0 and sum(seconds) < time.perf_counter() - started
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert records == [json.loads(line) for line in lines] and begun == [0]
    assert [r["step"] for r in records if "heldout_nll" in r] == [4, 9, 11]
    scores = [(r["heldout_nll"], r["heldout_accuracy"]) for r in records if "heldout_nll" in r]
    assert watch.nll == min(nll for nll, _ in scores) and watch.best == {}
    other = Watch(HELD, every=3)  # which keeps nothing
    fit(trainer(), tmp_path, resume=True, watch=other, on_start=begun.append)
    assert begun == [0, 12]


def kept(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The adapters at the end of an uninterrupted run with `keep`, and those after each step."""
    made, states = trainer(**FAST), []
    fit(made, folder, on_step=lambda _: states.append(
        {k: v.clone() for k, v in adapter_state(made.model).items()}
    ), watch=Watch(HELD, 2, keep=True))  # fmt: skip
    return adapter_state(made.model), states


def test_the_model_ends_with_its_best_step(tmp_path):
    end, states = kept(tmp_path)
    scores = {int(r["step"]): r["heldout_nll"] for r in log_of(tmp_path) if "heldout_nll" in r}
    assert list(scores) == [1, 3, 5, 7, 9, 11]
    best = min(scores, key=lambda step: scores[step])
    assert best not in (1, 11), "of no use at an end"
    assert same(end, states[best]) and not same(end, states[-1])


def test_of_equal_steps_the_first_is_the_best():
    model, watch = tiny_model(), Watch(HELD, 1, keep=True)
    assert watch.look(model, 2) == watch.look(model, 3)
    assert watch.step == 2


@pytest.mark.parametrize("stop", [1, 3, 8, 11])
def test_the_best_step_survives_an_interruption(tmp_path, stop):
    """Whether it was before or after the interruption: the same log and adapters to the bit."""
    end, _ = kept(tmp_path / "whole")

    def interrupt(record):
        if record["step"] == stop - 1:
            signal.raise_signal(signal.SIGTERM)

    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        fit(trainer(**FAST), parts, on_step=interrupt, watch=Watch(HELD, 2, keep=True))
    made, watch = trainer(**FAST), Watch(HELD, 2, keep=True)
    fit(made, parts, resume=True, watch=watch)
    assert log_of(parts) == log_of(tmp_path / "whole")
    assert same(adapter_state(made.model), end)
    again, other = trainer(**FAST), Watch(HELD, 2, keep=True)
    fit(again, parts, resume=True, watch=other)  # with nothing left to do
    assert same(adapter_state(again.model), end)
    assert (other.step, other.nll) == (watch.step, watch.nll)


def test_the_best_of_other_rows_is_not_resumed(tmp_path):
    fit(trainer(), tmp_path, watch=Watch(HELD, 2, keep=True))
    for watch in (Watch(tiny_data(7, seed=4), 2, keep=True), Watch(HELD, 3, keep=True)):
        with pytest.raises(InputError, match="settings: keep"):
            fit(trainer(), tmp_path, resume=True, watch=watch)
    for name in ("tokens", "labels"):
        watch = Watch(replace(HELD, **{name: getattr(HELD, name)[::-1]}), 2, keep=True)
        with pytest.raises(InputError, match="settings: keep.rows was '.*' and now is"):
            fit(trainer(), tmp_path, resume=True, watch=watch)
    made = trainer()
    fit(made, tmp_path, resume=True)  # the last step is there as well
    last = savepoints.load(tmp_path).tensors
    state = {f"adapters.{name}": value for name, value in adapter_state(made.model).items()}
    assert same(state, {name: last[name] for name in state})


def job(folder: Path, shard: bool) -> None:
    with distributed.joined(CPU, timeout=60):
        made, watch = trainer(**FAST), Watch(HELD, 2, keep=True)
        if shard:
            distributed.shard(made.model)
        fit(made, folder, watch=watch)
        name = folder / f"best{distributed.rank()}"
        torch.save((watch.step, watch.nll, adapter_state(made.model)), name)


@pytest.mark.parametrize("shard", [False, True])
def test_ranks_watch_together(tmp_path, shard):
    """All keep the same step, with the NLL of one process."""
    alone = Watch(HELD, 2, keep=True)
    fit(trainer(**FAST), tmp_path / "alone", watch=alone)
    assert on_ranks(2, job, tmp_path / "two", shard) == [0, 0]
    found = [torch.load(tmp_path / "two" / f"best{rank}") for rank in (0, 1)]
    assert found[0][:2] == found[1][:2] and same(found[0][2], found[1][2])
    assert found[0][0] == alone.step
    first = [next(r for r in log_of(tmp_path / name) if "heldout_nll" in r)["heldout_nll"]
             for name in ("alone", "two")]  # fmt: skip
    assert abs(first[0] - first[1]) <= rounding(torch.float32, 4096) * first[0]


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("epoch", [1, 30, 5000])
def test_there_are_four_to_twenty_looks(steps, epoch):
    looks = steps / interval(steps, epoch)
    assert min(4, steps) <= math.ceil(looks) <= 20
    if steps / 20 <= epoch <= steps / 4:
        assert interval(steps, epoch) == epoch


def test_a_look_is_an_epoch_within_those_limits():
    assert [interval(2000, epoch) for epoch in (10, 300, 900)] == [100, 300, 500]
    assert [interval(1, 1), interval(3, 7), interval(2001, 10)] == [1, 1, 101]


def test_nothing_to_watch_is_refused():
    for held, every in ((HELD, 0), (tiny_data(0), 1)):
        with pytest.raises(InputError, match="held-out rows"):
            Watch(held, every)
