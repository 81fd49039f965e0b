"""Several ranks: the same curve, the same adapters and the same metrics as one process."""

from __future__ import annotations

import dataclasses
import json
import os
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch

from scalabl_ref import AdapterConfig, InputError, Llama, Noise, add_adapters
from scalabl_ref.app import cli
from scalabl_ref.core.adapter import adapter_state
from scalabl_ref.evaluation import answering
from scalabl_ref.fast.quantize import quantize_model
from scalabl_ref.methods import Swag
from scalabl_ref.support.errors import RankLost
from scalabl_ref.training import ranks as distributed
from scalabl_ref.training.loop import fit
from scalabl_ref.training.runs import fingerprint, load_run
from scalabl_ref.training.trainer import TrainConfig, Trainer

from ..conftest import ROOT
from ..models import TINY, questions_file, steps_and_bound, tiny_data, tiny_folder, tiny_model
from ..ranks import on_ranks
from ..tolerances import logits_bound

CPU = torch.device("cpu")
STEPS, RATE = 9, 1e-2


@pytest.fixture(autouse=True)
def _as_many_threads_as_a_rank(threads):
    """One: how products are shared out over threads decides, on some processors, their rounding."""
    threads(1)


def trainer(collector=None, **config) -> Trainer:
    """Of ten examples in batches of 4, 4 and 2: four ranks cannot share the last one evenly."""
    settings = {"steps": STEPS, "batch": 4, "lr": RATE, "checkpoint_every": 3, **config}
    return Trainer(
        tiny_model(wake=False), tiny_data(), TrainConfig(**settings), collector=collector
    )


def train(
    folder: Path, config: dict, resume: bool = False, shard: str = "", base: str = ""
) -> None:
    """What each rank does: a whole run in FOLDER, and its own adapters to a file there.

    shard: "parts" of the base on each rank, or "offloaded". base: what it is quantised to.
    """
    with distributed.joined(CPU, timeout=60):
        made = trainer(**config)
        if base:
            quantize_model(made.model, base)
        if shard:
            distributed.shard(made.model, offload=shard == "offloaded")
        fit(made, folder, resume)
        torch.save(adapter_state(made.model), folder / f"adapters{distributed.rank()}")


def curve(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "train.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@cache
def alone(objective: str = "elbo", swag: float = 0.0) -> tuple[list[dict[str, float]], float]:
    """The curve of one process that computes a batch at once, and how far another may be off."""
    made = trainer(Swag() if swag else None, objective=objective, swag=swag)
    return steps_and_bound(made, STEPS, RATE)


def assert_same_curve(folder: Path, objective: str = "elbo", swag: float = 0.0) -> None:
    expected, bound = alone(objective, swag)
    found = curve(folder)
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "nll"):
            assert abs(ours[key] - theirs[key]) <= bound, (key, ours, theirs)


def assert_replicas(folder: Path, ranks: int) -> None:
    first = torch.load(folder / "adapters0")
    for rank in range(1, ranks):
        other = torch.load(folder / f"adapters{rank}")
        assert all(torch.equal(first[name], other[name]) for name in first)


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "objective"),
    [(1, None, "elbo"), (1, 3, "elbo"), (2, 1, "elbo"), (2, None, "official"), (3, 1, "elbo"),
     (4, None, "elbo")],
)  # fmt: skip
def test_the_curve_does_not_depend_on_the_ranks(tmp_path, ranks, micro_batch, objective):
    """Nor on what is accumulated on each; and the ranks' adapters are the same to the bit."""
    config = {"micro_batch": micro_batch, "objective": objective}
    assert on_ranks(ranks, train, tmp_path, config) == [0] * ranks
    assert_same_curve(tmp_path, objective)
    assert_replicas(tmp_path, ranks)


def test_accumulation_alone_keeps_within_the_same_bound(tmp_path):
    fit(trainer(micro_batch=1), tmp_path)
    assert_same_curve(tmp_path)


def shares(folder: Path, count: int) -> None:
    with distributed.joined(CPU, timeout=60):
        part, own = distributed.share(range(count))
        (folder / f"share{distributed.rank()}").write_text(json.dumps([part, own]))


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_shares_are_equally_long_and_count_everything_once(tmp_path, count):
    assert on_ranks(3, shares, tmp_path, count) == [0, 0, 0]
    found = [json.loads((tmp_path / f"share{rank}").read_text()) for rank in range(3)]
    assert len({len(part) for part, _ in found}) == 1
    counted = sorted(item for part, own in found for item in part[:own])
    assert counted == list(range(count))


def test_without_torchrun_there_is_one_rank():
    with distributed.joined(CPU):
        assert (distributed.rank(), distributed.world()) == (0, 1)
        assert distributed.share([5, 6]) == ([5, 6], 2)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1000001.0])
def test_a_timeout_out_of_range_is_refused(timeout):
    words = f"timeout must be above 0 s and at most 1e6 s, and is {timeout}"
    with pytest.raises(InputError, match=words), distributed.joined(CPU, timeout):
        pass
    with distributed.joined(CPU, 1e6):
        pass


@pytest.fixture
def joining(monkeypatch):
    """The calls to PyTorch, recorded and not made."""
    calls = []

    def note(owner, name):
        monkeypatch.setattr(owner, name, lambda *a, **k: calls.append((name, *a, *k.values())))

    for name in ("init_process_group", "barrier", "destroy_process_group"):
        note(torch.distributed, name)
    note(torch.cuda, "set_device")
    monkeypatch.setattr(distributed, "_timeout", None)
    monkeypatch.setenv("RANK", "0")
    return calls


def test_ranks_join_through_gloo_and_on_gpus_through_nccl(joining):
    gpu, timeout = torch.device("cuda", 1), timedelta(seconds=5)
    end = [("barrier",), ("destroy_process_group",)]
    with distributed.joined(CPU, 5):
        pass
    assert joining == [("init_process_group", "gloo", timeout), *end]
    joining.clear()
    with distributed.joined(gpu, 5):
        pass
    start = [("set_device", gpu), ("init_process_group", "cpu:gloo,cuda:nccl", timeout)]
    assert joining == [*start, *end]


def test_only_an_error_of_the_exchange_is_a_lost_rank(joining):
    for error in (RuntimeError("of gloo"), torch.distributed.DistError("other")):
        with pytest.raises(RankLost, match="within 5 s"), distributed.joined(CPU, 5):
            raise error
    with pytest.raises(RuntimeError, match="^mine$"), distributed.joined(CPU, 5):
        raise RuntimeError("mine")
    assert joining == [("init_process_group", "gloo", timedelta(seconds=5))] * 3


def test_ranks_wait_as_long_as_is_documented():
    text = (ROOT / "docs" / "scale.md").read_text()
    assert f"`--timeout` ({distributed.TIMEOUT:g} s)" in text


def test_each_rank_has_a_gpu_of_its_machine(monkeypatch):
    """Unless a GPU is named, or torchrun did not start it."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    gpu, named = torch.device("cuda"), torch.device("cuda", 1)
    assert distributed.own_device(gpu) == gpu
    monkeypatch.setenv("LOCAL_RANK", "3")
    found = [distributed.own_device(device) for device in (gpu, named, CPU)]
    assert found == [torch.device("cuda", 3), named, CPU]


# --- a sharded base ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "shard", "base"),
    [(2, 1, "parts", ""), (4, None, "parts", "nf4"), (2, None, "offloaded", "int8")],
)
def test_sharding_the_base_changes_nothing(tmp_path, ranks, micro_batch, shard, base):
    """To the bit, since a block computes with the same plain tensors, or codes and scales."""
    config = {"micro_batch": micro_batch, "steps": 4}
    for how in ("", shard):
        folder = tmp_path / (how or "whole")
        assert on_ranks(ranks, train, folder, config, False, how, base) == [0] * ranks
        assert_replicas(folder, ranks)
    assert curve(tmp_path / shard) == curve(tmp_path / "whole")


def parts(folder: Path, tied: bool) -> None:
    """Per weight: how much of it is here, how much there is; and logits before and after."""
    with distributed.joined(CPU, timeout=60):
        shape = dataclasses.replace(TINY, tie_word_embeddings=tied)
        model = add_adapters(Llama(shape).init_random_(0, std=0.3), AdapterConfig(rank=3))
        tokens, before = torch.arange(1, 9)[None], fingerprint(model)
        expected = model(tokens, noise=Noise(0, 0), draws=2)
        distributed.shard(model)
        assert torch.equal(model(tokens, noise=Noise(0, 0), draws=2), expected)
        assert fingerprint(model) == before and distributed.sharded(model)
        model.reshard()
        sizes = {
            name: [getattr(p, "_local_tensor", p).numel(), p.numel()]
            for name, p in model.named_parameters()
        }
        (folder / f"parts{distributed.rank()}").write_text(json.dumps(sizes))


@pytest.mark.parametrize("tied", [False, True])
def test_each_rank_keeps_its_part_of_the_base(tmp_path, tied):
    assert on_ranks(2, parts, tmp_path, tied) == [0, 0]
    first, second = (json.loads((tmp_path / f"parts{rank}").read_text()) for rank in (0, 1))
    assert any("adapter" in name for name in first) and ("lm_head.weight" in first) != tied
    for name, (size, whole) in first.items():
        if "adapter" in name:
            assert (size, second[name][0]) == (whole, whole), name
        else:
            assert size + second[name][0] == whole and 0 < 2 * size <= whole + 16, name


def test_a_sharded_base_is_computed_again_alike(tmp_path):
    """Activation checkpointing gathers a block's weights once more, and changes no bit."""
    for how in ("", "parts"):
        config = {"recompute": bool(how)}
        assert on_ranks(2, train, tmp_path / (how or "whole"), config, False, how) == [0, 0]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def asked(folder: Path) -> None:
    """What FSDP is asked for, of a base that stays in the CPU's memory and one that does not."""
    import torch.distributed.fsdp as fsdp

    calls: list[str] = []

    def fully_shard(part, **options):
        calls.append(f"{type(part).__name__} {type(options['offload_policy']).__name__}")
        part.set_unshard_in_backward = lambda again: calls.append(str(again))

    fsdp.fully_shard = fully_shard
    with distributed.joined(CPU, timeout=60):
        for offload in (False, True):
            distributed.shard(tiny_model(layers=1), offload=offload)
    (folder / "asked").write_text(json.dumps(calls))


def test_parts_stay_in_the_cpus_memory_if_asked(tmp_path):
    """On a CPU that is where they are anyway: of this the call is all that can be seen."""
    assert on_ranks(1, asked, tmp_path) == [0]
    units = ("PackedBlock", "Embedding", "Llama")
    policies = ("OffloadPolicy", "CPUOffloadPolicy")
    expected = [[*(f"{unit} {policy}" for unit in units), "False"] for policy in policies]
    assert json.loads((tmp_path / "asked").read_text()) == sum(expected, [])


def test_sharding_needs_ranks():
    with pytest.raises(InputError, match="start them with torchrun"):
        distributed.shard(tiny_model())


# --- the command -------------------------------------------------------------------------------


def command(text: str) -> int:
    return cli.main(text.split())


def test_a_sharded_half_precision_base_from_the_command_line(tmp_path):
    """A head of float32 beside a base of bfloat16; evaluated whole, it gives the same metrics."""
    model, data = tiny_folder(tmp_path / "model"), questions_file(tmp_path / "data.jsonl")
    run = f"train --model {model} --data {data} --steps 3 --rank 2 --dtype bfloat16 --out "
    assert on_ranks(2, command, f"{run} {tmp_path / 'parts'} --shard") == [0, 0]
    assert on_ranks(2, command, f"{run} {tmp_path / 'whole'}") == [0, 0]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    evaluate = f"evaluate --run {tmp_path / 'parts'} --data {data} --samples 3"
    written = tmp_path / "parts" / "predictions.jsonl"
    assert on_ranks(2, command, f"{evaluate} --shard") == [0, 0]
    sharded = written.read_text()
    assert command(evaluate) == 0 and written.read_text() == sharded


def test_the_commands_on_ranks_write_what_one_process_does(tmp_path):
    """Metrics and predictions to the bit; results are printed once."""
    model, data = tiny_folder(tmp_path / "model"), questions_file(tmp_path / "data.jsonl")
    run = f"train --model {model} --data {data} --steps 3 --rank 2 --out {tmp_path / 'run'}"
    assert on_ranks(2, command, run, out=tmp_path) == [0, 0]
    assert "trained 3 steps on 24 examples" in (tmp_path / "out0").read_text()
    assert (tmp_path / "out1").read_text() == ""
    evaluate = f"evaluate --run {tmp_path / 'run'} --data {data} --samples 3 --batch 10"
    written = [tmp_path / "run" / name for name in ("metrics.json", "predictions.jsonl")]
    assert command(evaluate) == 0
    expected = [path.read_text() for path in written]
    for ranks in (2, 4):  # there are three batches: one of four ranks has none
        for path in written:
            path.unlink()
        assert on_ranks(ranks, command, evaluate, out=tmp_path) == [0] * ranks
        assert [path.read_text() for path in written] == expected
        assert "metrics.json" in (tmp_path / "out0").read_text()
        assert (tmp_path / "out1").read_text() == ""


def counted(folder: Path, text: str) -> int:
    """The command, and a file with the number of draws of each pass that this rank made."""
    made, real = [], answering.pass_log_probs

    def one(*arguments):
        made.append(arguments[-1])
        return real(*arguments)

    answering.pass_log_probs = one
    code = command(text)
    answering.pass_log_probs = real
    (folder / f"passes{os.environ.get('RANK', '')}").write_text(str(made))
    return code


def passes(folder: Path) -> list[list[int]]:
    """What `counted` wrote, of each rank; the files are gone then."""
    paths = sorted(folder.glob("passes*"))
    found = [json.loads(path.read_text()) for path in paths]
    for path in paths:
        path.unlink()
    return found


def test_the_draws_of_one_batch_are_spread_over_the_ranks(tmp_path):
    """Pass by pass, also with a sharded base, whose ranks all make as many; to the bit."""
    model, data = tiny_folder(tmp_path / "model"), questions_file(tmp_path / "data.jsonl")
    train = f"train --model {model} --data {data} --steps 3 --rank 2 --out {tmp_path / 'run'}"
    assert command(train) == 0
    text = f"evaluate --run {tmp_path / 'run'} --data {data} --samples 9 --batch 24"
    written = tmp_path / "run" / "predictions.jsonl"
    assert counted(tmp_path, text) == 0
    expected, [alone] = written.read_text(), passes(tmp_path)
    assert sum(alone) == 9 and len(alone) % 2 == 1, alone  # two ranks cannot share them evenly
    for more in ("", " --shard"):
        written.unlink()
        assert on_ranks(2, counted, tmp_path, text + more) == [0, 0]
        assert written.read_text() == expected
        assert passes(tmp_path) == [alone[::2], [*alone[1::2], alone[0]]]


def test_ranks_have_equally_many_draws(tmp_path):
    """Where the short last passes of all batches would be one rank's, taken as they come."""
    model, data = tiny_folder(tmp_path / "model"), questions_file(tmp_path / "data.jsonl")
    train = f"train --model {model} --data {data} --steps 3 --rank 2 --out {tmp_path / 'run'}"
    assert command(train) == 0
    text = f"evaluate --run {tmp_path / 'run'} --data {data} --samples 10 --batch 6"
    assert counted(tmp_path, text) == 0
    [alone] = passes(tmp_path)
    assert sum(alone[::2]) != sum(alone[1::2]), alone
    assert on_ranks(2, counted, tmp_path, text) == [0, 0]
    first, second = passes(tmp_path)
    assert sum(first) == sum(second) == sum(alone) / 2, (first, second)


def answers(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


def test_other_numbers_of_samples_with_a_sharded_base(tmp_path):
    """auto and exact go by batches: shared out, or in step; the predictions are the same.

    auto's last open row goes alone through a sharded base, whose weights lie elsewhere in memory:
    to rounding then, as kernels for a single row depend on that.
    """
    model, data = tiny_folder(tmp_path / "model"), questions_file(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    train = f"train --model {model} --data {data} --steps 3 --rank 2 --targets lm_head --out {run}"
    assert command(train) == 0
    trained, _ = load_run(run)
    size = trained(torch.arange(1, 33)[None]).abs().max().item()
    rounded = logits_bound(trained.config, size)  # a probability moves less than its logit
    for samples in ("auto", "exact"):
        text = f"evaluate --run {run} --data {data} --samples {samples} --batch 10"
        assert command(text) == 0
        expected = answers(run)
        for more in ("", " --shard", " --offload-weights"):
            (run / "predictions.jsonl").unlink()
            assert on_ranks(2, command, text + more) == [0, 0]
            bound = rounded if samples == "auto" and more else 0.0
            for ours, theirs in zip(answers(run), expected, strict=True):
                for name in ("draws", "settled"):
                    assert ours.get(name) == theirs.get(name)
                for one, other in zip(ours["probs"], theirs["probs"], strict=True):
                    assert abs(one - other) <= bound, (samples, more, ours, theirs)


def observed(folder: Path, text: str) -> int:
    """The command, and a file of what it asked of `shard` and of `KeptOnCpu`."""
    from scalabl_ref.training import trainer as module

    calls, shard = [], distributed.shard

    def sharding(model, device, offload):
        calls.append(["shard", str(device), offload])
        shard(model, device, offload)

    class Keeping(module.KeptOnCpu):
        def __init__(self, device):
            calls.append(["keep", str(device)])
            super().__init__(device)

    distributed.shard, module.KeptOnCpu = sharding, Keeping
    code = command(text)
    (folder / "calls").write_text(json.dumps(calls))
    return code


def test_the_commands_offload_what_they_are_told_to(tmp_path):
    """And what cannot be done at once is refused, on ranks as well."""
    model, data = tiny_folder(tmp_path / "model"), questions_file(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    train = f"train --model {model} --data {data} --steps 2 --rank 2 --out {run}"
    both = f"{train} --offload-weights --offload-activations"
    assert on_ranks(1, command, f"{train} --offload-weights --compile", out=tmp_path) == [2]
    assert "give one" in (tmp_path / "out0").read_text()
    seen = tmp_path / "calls"
    assert on_ranks(1, observed, tmp_path, both) == [0]
    kept = [["keep", "cpu"]] * 2
    assert json.loads(seen.read_text()) == [["shard", "cpu", True], *kept]
    evaluate = f"evaluate --run {run} --data {data} --samples 2"
    for more, expected in (("--offload-weights", True), ("--shard", False)):
        assert on_ranks(1, observed, tmp_path, f"{evaluate} {more}") == [0]
        assert json.loads(seen.read_text()) == [["shard", "cpu", expected]]
