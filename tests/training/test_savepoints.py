"""Checkpoints: any number of ranks goes on from any other's, and a fault costs little.

Each fault is done to a run of nine steps with a checkpoint every three, which then is resumed: the
curve must be the one without the fault, and the steps done twice at most those since the last
checkpoint that was whole.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scalabl_ref import InputError
from scalabl_ref.methods import Swag
from scalabl_ref.support.errors import Interrupted, RankLost
from scalabl_ref.training import ranks as distributed
from scalabl_ref.training import savepoints
from scalabl_ref.training.loop import fit
from scalabl_ref.training.trainer import Trainer

from ..models import questions_file, tiny_folder
from ..ranks import on_ranks
from .test_ranks import CPU, STEPS, alone, assert_same_curve, curve, trainer

FAULTY_STEP, EVERY = 5, 3  # the step in which faults happen, counted from 0: one checkpoint before
OK, BAD_INPUT, LOST, KILLED = 0, 2, 3, -signal.SIGKILL  # the codes of the command line


def job(
    folder: Path, fault: str = "", where: int = 0, resume: bool = False, beside: bool = False,
    timeout: float = 60, shard: bool = False,
) -> int:  # fmt: skip
    """What each rank does; `fault` happens to rank `where`. Returns the command line's code."""
    try:
        with distributed.joined(CPU, timeout):
            swag = Swag()
            made = trainer(swag, swag=0.5)
            if shard:
                distributed.shard(made.model)
            if fault and distributed.rank() == where:
                FAULTS[fault](made)
            fit(made, folder, resume, beside=beside)
            if distributed.rank() == 0:
                torch.save(vars(swag), folder / "swag")
    except (InputError, RankLost) as error:
        print(f"error: {error}")
        return BAD_INPUT if isinstance(error, InputError) else LOST
    except Interrupted as error:
        return 128 + error.signum
    return OK


# --- faults ------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_the_step(made: Trainer, happen: Callable[[], None]) -> Callable[..., None]:
    return lambda *_: happen() if made.done == FAULTY_STEP else None


def killed_forward(made: Trainer) -> None:
    made.model.layers[1].register_forward_pre_hook(at_the_step(made, die))


def killed_backward(made: Trainer) -> None:
    made.adapters[0].B.register_hook(at_the_step(made, die))


def killed_before_the_exchange(made: Trainer) -> None:
    exchange, happen = distributed.add_up, at_the_step(made, die)
    distributed.add_up = lambda *a: (happen(), exchange(*a))[1]


def killed_while_writing(made: Trainer) -> None:
    write = savepoints.save_tensors

    def half(path: Path, tensors: list) -> None:
        write(path, tensors)
        if made.done > FAULTY_STEP:
            os.truncate(path, path.stat().st_size // 2)
            die()

    savepoints.save_tensors = half


def killed_before_the_manifest(made: Trainer) -> None:
    write = savepoints.atomic_write_text
    savepoints.atomic_write_text = lambda *a: die() if made.done > FAULTY_STEP else write(*a)


def silent(made: Trainer) -> None:
    made.model.layers[1].register_forward_pre_hook(at_the_step(made, lambda: time.sleep(12)))


def disk_full(made: Trainer) -> None:
    """No file may have more than 2000 bytes: the log has fewer, a checkpoint's part has more."""
    limit = (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    full = at_the_step(made, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    made.model.layers[1].register_forward_pre_hook(full)


def terminated(made: Trainer) -> None:
    happen = at_the_step(made, lambda: os.kill(os.getpid(), signal.SIGTERM))
    made.model.layers[1].register_forward_pre_hook(happen)


FAULTS = {fault.__name__: fault for fault in (
    killed_forward, killed_backward, killed_before_the_exchange, killed_while_writing,
    killed_before_the_manifest, silent, disk_full, terminated,
)}  # fmt: skip


def resumed(folder: Path, ranks: int, most: int, **options) -> None:
    """Resume on so many ranks: the curve without the fault, and at most so many steps twice."""
    logged = len(curve(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = savepoints.load(folder).done
    assert logged - done <= most, (logged, done)
    assert on_ranks(ranks, job, folder, "", 0, True) == [OK] * ranks
    assert_same_curve(folder, swag=0.5)
    assert not list(folder.glob("checkpoint/.*")), "something unfinished is left"
    for whole in savepoints._newest_first(folder / "checkpoint"):
        savepoints._read(whole)


@pytest.mark.parametrize(
    ("fault", "where", "shard"),
    [
        ("killed_forward", 0, False),
        ("killed_forward", 1, False),
        ("killed_forward", 1, True),
        ("killed_backward", 1, False),
        ("killed_backward", 0, True),
        ("killed_before_the_exchange", 1, False),
        ("killed_while_writing", 0, False),
        ("killed_while_writing", 1, False),
        ("killed_before_the_manifest", 0, False),
    ],
)
def test_a_rank_that_is_killed_ends_the_job_and_costs_little(tmp_path, fault, where, shard):
    """The other one ends by itself, saying why, with the code of a lost rank."""
    codes = on_ranks(2, job, tmp_path, fault, where, False, False, 60, shard, out=tmp_path)
    assert codes[where] == KILLED and codes[1 - where] == LOST
    assert "error: another rank ended" in (tmp_path / f"out{1 - where}").read_text()
    resumed(tmp_path, 1 if "writing" in fault else 2, most=EVERY)  # 1: what two left is in the way


@pytest.mark.slow
def test_a_rank_that_is_silent_ends_the_job(tmp_path):
    codes = on_ranks(2, job, tmp_path, "silent", 1, False, False, 5.0, out=tmp_path)
    assert codes == [LOST, LOST]
    assert "did not answer within 5 s" in (tmp_path / "out0").read_text()
    resumed(tmp_path, 2, most=EVERY)


@pytest.mark.parametrize(("ranks", "where"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_ends_the_run_and_costs_little(tmp_path, ranks, where, beside):
    codes = on_ranks(ranks, job, tmp_path, "disk_full", where, False, beside, out=tmp_path)
    assert codes == [BAD_INPUT] * ranks
    for rank in range(ranks):
        why = "File too large" if rank == where else "another rank could not write"
        said = (tmp_path / f"out{rank}").read_text()
        assert "checkpoint: the checkpoint cannot be written: " in said and why in said
        assert ".tmp" not in said, "nobody knows that name"
    assert not list(tmp_path.glob("checkpoint/.*")), "the disk is still full"
    resumed(tmp_path, ranks, most=2 * EVERY if beside else EVERY)


# --- damage ------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 8)


def flip(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_a_file(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 30)


def move_a_file_out(folder: Path) -> None:
    """The manifest names it where it is now, outside of the checkpoint."""
    path = max(folder.glob("*.safetensors"))
    outside = path.rename(folder.with_suffix(".safetensors"))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(path.name, f"../{outside.name}"))


def put(name: str, value: object) -> Callable[[Path], None]:
    """The manifest with another value, of a kind that it cannot have."""

    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    damage.__name__ = f"put_{name}"
    return damage


MANIFESTS = [put("done", None), put("done", 7), put("identity", []), put("files", {})]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two ranks that went to its end."""
    folder = tmp_path_factory.mktemp("finished")
    assert on_ranks(2, job, folder) == [OK, OK]
    return folder


@pytest.mark.parametrize(
    "damage",
    [cut, flip, lose_a_file, move_a_file_out, lose_the_manifest, cut_the_manifest, *MANIFESTS],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_serves(tmp_path, finished, damage):
    shutil.copytree(finished, tmp_path / "run")
    newest = savepoints._newest_first(tmp_path / "run" / "checkpoint")
    assert [path.name for path in newest] == ["00000009", "00000006"]
    damage(newest[0])
    with pytest.warns(UserWarning, match="00000009/.*: going back to 00000006"):
        savepoints.load(tmp_path / "run")
    resumed(tmp_path / "run", 1, most=EVERY)
    for folder in savepoints._newest_first(tmp_path / "run" / "checkpoint"):
        damage(folder)
    with pytest.raises(InputError, match="00000009/"):
        savepoints.load(tmp_path / "run")


# --- other numbers of ranks --------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (1, 2)])
def test_other_ranks_go_on_with_the_same_curve(tmp_path, before, after):
    """From a signal to one rank, which ends the step on all of them; SWAG's averages included."""
    where = before - 1
    codes = on_ranks(before, job, tmp_path, "terminated", where, False, True)
    assert codes == [128 + signal.SIGTERM] * before
    assert len(list(tmp_path.glob("checkpoint/00000006/*.safetensors"))) == before
    resumed(tmp_path, after, most=0)
    swag = torch.load(tmp_path / "swag")
    expected = Swag()
    whole = trainer(expected, swag=0.5)
    for _ in range(STEPS):
        whole.step()
    assert swag["count"] == expected.count == 5
    bound = alone(swag=0.5)[1]  # of the loss; Adam moves weights by the rate at most
    for name, value in expected.mean.items():
        assert (swag["mean"][name] - value).abs().max() <= bound + 1e-3, name


def test_ranks_that_find_nothing_begin(tmp_path):
    assert on_ranks(2, job, tmp_path, "", 0, True) == [OK, OK]
    assert_same_curve(tmp_path, swag=0.5)


def test_pytorchs_own_checkpoints_read_ours(finished):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    storage = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    tensors = savepoints.load(finished).tensors
    ours = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of being alone
        reader = storage.HuggingFaceStorageReader(str(finished / "checkpoint" / "00000009"))
        dcp.load(ours, storage_reader=reader)
    assert len(ours) > 20 and all(torch.equal(ours[name], tensors[name]) for name in tensors)


def test_a_checkpoint_of_one_process_is_one_file_and_a_manifest(tmp_path):
    with pytest.raises(InputError, match="checkpoint: no checkpoint to resume from"):
        savepoints.load(tmp_path)
    for step in (9, 10, 100):
        savepoints.Saver(tmp_path).save(step, {"b": torch.ones(2), "a": torch.zeros(1)}, {"x": 1})
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"00000010", "00000100"}
    files = {path.name for path in (tmp_path / "checkpoint" / "00000100").iterdir()}
    assert files == {"model-00001-of-00001.safetensors", "manifest.json"}
    tensors, done, identity = savepoints.load(tmp_path)
    assert (sorted(tensors), done, identity) == (["a", "b"], 100, {"x": 1})


def test_a_checkpoint_beside_the_training_is_of_its_own_step(tmp_path):
    """Not of what the tensors are when it is written."""
    tensors = {"a": torch.zeros(3)}
    saver = savepoints.Saver(tmp_path, beside=True)
    write, saver._write = saver._write, lambda *a: (time.sleep(0.2), write(*a))[1]
    saver.save(1, tensors, {})
    tensors["a"] += 1
    saver.wait()
    assert torch.equal(savepoints.load(tmp_path).tensors["a"], torch.zeros(3))


# --- torchrun itself ---------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed_and_resumes(tmp_path):
    """As a user has it: real processes, and a real SIGKILL from outside."""
    model, data = tiny_folder(tmp_path / "model"), questions_file(tmp_path / "data.jsonl")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    arguments = f"train --model {model} --data {data} --rank 2 --batch 4 --checkpoint-every 5"
    launch += ["-m", "scalabl_ref", "--"]  # or torchrun would read options meant for us
    train = [*launch, *arguments.split(), "--steps", "200"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen:
        with open(tmp_path / "err", "w") as err:
            return subprocess.Popen([*train, *more], env=environment, stderr=err)

    assert start("--out", str(tmp_path / "whole")).wait(180) == 0
    broken = start("--out", str(tmp_path / "run"))
    log = tmp_path / "run" / "train.jsonl"
    while not log.exists() or log.read_text().count("\n") < 12:
        assert broken.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{broken.pid}/task/{broken.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks[next(v for v in variables if v.startswith(b"RANK="))] = int(child)
    os.kill(ranks[b"RANK=1"], signal.SIGKILL)
    assert broken.wait(60) == 1
    # torchrun ends rank 0 as soon as it sees that rank 1 is dead: often before rank 0 can say so
    assert "SIGKILL" in (tmp_path / "err").read_text()
    assert start("--out", str(tmp_path / "run"), "--resume").wait(180) == 0
    for ours, theirs in zip(curve(tmp_path / "run"), curve(tmp_path / "whole"), strict=True):
        assert ours == theirs  # the same ranks add up in the same order
    evaluate = [*launch, "evaluate", "--run", str(tmp_path / "run"), "--data", str(data)]
    assert subprocess.run(evaluate, env=environment, timeout=180).returncode == 0
    assert (tmp_path / "run" / "metrics.json").exists()


def test_the_newest_checkpoint_is_that_of_the_highest_number(tmp_path):
    """Not that of the last name: steps can have more than eight digits."""
    for step in (99_999_998, 99_999_999, 100_000_000):
        savepoints.Saver(tmp_path).save(step, {"a": torch.zeros(1)}, {})
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"99999999", "100000000"}
    assert savepoints.load(tmp_path).done == 100_000_000


def test_what_is_not_a_checkpoint_stays_where_it_is(tmp_path):
    folder = tmp_path / "checkpoint"
    for name in ("best", "123", ".00000007.tmp", "00000007", "00000005", "00000003"):
        (folder / name).mkdir(parents=True)
    savepoints.Saver(tmp_path).forget_after(5)
    assert {path.name for path in folder.iterdir()} == {"best", "123", "00000003", "00000005"}
