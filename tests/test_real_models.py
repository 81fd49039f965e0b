"""Real weights on real data, through the commands; a minute or two."""

from __future__ import annotations

import json

import pytest

from scalabl_ref.app import cli
from scalabl_ref.core.config import TARGETS

from .tools.test_convert import convert_hf

pytestmark = pytest.mark.slow


def test_stories260k_learns_trec(assets, tmp_path, capsys):
    """Plain LoRA on all 5452 questions reaches an accuracy of .83 on the 500 of the test.

    The seed is fixed. Seen: .872, with all linear layers adapted; 500 answers alone give that a
    standard error of .015. With the default targets it is .824 to .836 (docs/earlier_results.md).
    """
    source = assets / "stories260K"
    model, run = tmp_path / "model", tmp_path / "run"
    convert_hf.convert(source / "stories260K.bin", model, tokenizer=source / "tok512.model")
    data = "--format trec --data " + str(assets / "data" / "trec")
    train = f"train --model {model} --out {run} --method mle {data}/TREC.train"
    options = f"--steps 1000 --batch 32 --lr 3e-3 --targets {' '.join(TARGETS)}"
    assert cli.main(f"{train} {options}".split()) == 0
    assert cli.main(f"evaluate --run {run} {data}/TREC.test --json".split()) == 0
    out = capsys.readouterr().out
    metrics = json.loads(out[out.index("{") :])
    assert metrics["n"] == 500 and metrics["acc"] >= 0.83
