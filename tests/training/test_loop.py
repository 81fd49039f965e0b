"""The loop: resuming to the bit, signals, damaged logs."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.support.errors import Interrupted
from scalabl_ref.training import savepoints
from scalabl_ref.training.loop import fit
from scalabl_ref.training.trainer import TrainConfig

from ..models import tiny_data, trainer


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
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match=f"SIGTERM after {stop} steps"):
        fit(trainer(objective=objective), tmp_path / "parts", on_step=interrupt)
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
        fit(trainer(), tmp_path / "parts", on_step=die)
    assert len(log_of(tmp_path / "parts")) == 8
    again = trainer()
    fit(again, tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_what_begins_anew_never_goes_on_from_an_older_run(tmp_path):
    with pytest.raises(MemoryError):
        fit(trainer(), tmp_path, on_step=die)  # it leaves a checkpoint of 5 steps
    with pytest.raises(ZeroDivisionError):
        fit(trainer(), tmp_path, on_step=lambda record: 1 / 0)
    done = []
    fit(trainer(), tmp_path, resume=True, on_start=done.append)
    assert done == [0]


DAMAGE = b"\xff\x00 \r \xe2\x80\xa8 \x85"  # no UTF-8, and to some the ends of lines


@pytest.mark.parametrize("end, kept", [(b"\n1\n2\n3\n4\n5", b"\n1\n2\n3\n"), (b"", b"\n")])
def test_a_damaged_log_does_not_stop_a_run(tmp_path, end, kept):
    """Its lines up to the checkpoint, here 5, stay as they are; a last one without end gets it."""
    with pytest.raises(MemoryError):
        fit(trainer(), tmp_path, on_step=die)
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
        fit(trainer(), tmp_path, on_step=lambda record: signal.raise_signal(signal.SIGINT))
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
        fit(trainer(), tmp_path / "parts", on_step=die_early)
    (tmp_path / "parts" / "checkpoint" / ".00000005.tmp").mkdir(parents=True)
    assert len(log_of(tmp_path / "parts")) == 4
    fit(trainer(), tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "new") == log_of(tmp_path / "parts")


@pytest.mark.parametrize("steps", [1, 12])
def test_a_run_ends_when_its_checkpoint_is_on_disk(tmp_path, monkeypatch, steps):
    """Written beside the training, at its end or after a signal in its first step."""
    write, result, waited, written = savepoints.save_tensors, Future.result, threading.Event(), []

    def slow(*arguments):
        waited.wait(1)  # a run that does not wait has ended by then
        write(*arguments)
        written.append(1)

    def wait(future):
        waited.set()
        return result(future)

    def stop(record):
        if steps > 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(savepoints, "save_tensors", slow)
    monkeypatch.setattr(Future, "result", wait)
    with pytest.raises(Interrupted) if steps > 1 else nullcontext():
        fit(trainer(steps=steps), tmp_path, on_step=stop, beside=True)
    assert written and savepoints.load(tmp_path).done == 1


def test_a_resumed_run_may_change_settings_that_leave_its_results_alone(tmp_path):
    """Those alone: a checkpoint keeps all others, and a resumed run must have them."""
    fit(trainer(steps=1), tmp_path)
    free = {"checkpoint_every": 3, "micro_batch": 2, "recompute": True,
            "offload_activations": True, "compile": True}  # fmt: skip
    kept = json.loads(next(tmp_path.glob("checkpoint/*/manifest.json")).read_text())["identity"]
    assert {*kept["train"]} == {f.name for f in fields(TrainConfig)} - {*free} | {"dtype", "init"}
    for name, value in free.items():
        made, done = trainer(steps=1), []
        made.config = replace(made.config, **{name: value})
        fit(made, tmp_path, resume=True, on_start=done.append)
        assert done == [1], name


@pytest.mark.parametrize("beside", [False, True])
def test_checkpoints_are_written_beside_the_training_if_asked(tmp_path, monkeypatch, beside):
    write, threads = savepoints.save_tensors, []

    def noted(*arguments):
        threads.append(threading.current_thread())
        write(*arguments)

    monkeypatch.setattr(savepoints, "save_tensors", noted)
    fit(trainer(steps=1), tmp_path, beside=beside)
    assert [thread is threading.main_thread() for thread in threads] == [not beside]


def test_resuming_something_else_is_refused(tmp_path):
    fit(trainer(), tmp_path)
    data = tiny_data()
    for change, message in (
        ({"lr": 0.5}, r"train.lr was 0.01 and now is 0.5"),
        ({"steps": 13}, r"train.steps was 12 and now is 13"),
        ({"model": {"rank": 2}}, r"adapter.rank was 3 and now is 2"),
        ({"model": {"seed": 1}}, "model differs"),
        ({"data": tiny_data(seed=1)}, "data differs"),
        ({"data": replace(data, tokens=data.tokens[::-1])}, "data differs"),
        ({"data": replace(data, labels=data.labels[::-1])}, "data differs"),
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
