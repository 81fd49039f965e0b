"""`scalabl export` writes what its options ask for."""

from __future__ import annotations

import torch

from scalabl_ref.support.tensors import load_tensors

from ..commands import TRAIN, ok, run


def test_each_draw_of_a_seed_gets_its_own_folder(work, capsys):
    ok(f"{TRAIN} --lr 0.02 --init-sigma 1", capsys)
    export = "export --run run --to peft --samples 2 --out"
    told = ok(f"{export} five --seed 5", capsys)
    assert told == {"to": "peft", "folders": ["five/sample-0", "five/sample-1"]}
    assert run(f"{export} nil", capsys)[1] == "written: nil/sample-0 nil/sample-1\n"
    written = [work / out / f"sample-{i}" for out in ("nil", "five") for i in (0, 1)]
    assert len({(folder / "adapter_model.safetensors").read_bytes() for folder in written}) == 4
    for folder, words in ((written[1], "draw 1 of seed 0"), (written[2], "draw 0 of seed 5")):
        assert words in (folder / "README.md").read_text()
    assert ok("export --run run --to peft --out mean", capsys)["folders"] == ["mean"]


def test_merged_weights_have_the_dtype_that_is_asked_for(work, capsys):
    ok(TRAIN + " --steps 1", capsys)
    for option, dtype in (("", "float32"), (" --dtype bfloat16", "bfloat16")):
        ok(f"export --run run --to hf --out {dtype}{option}", capsys)
        tensors, _ = load_tensors(work / dtype / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
