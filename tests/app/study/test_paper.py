"""The published comparison."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from scalabl_ref import InputError, Llama
from scalabl_ref.app import cli
from scalabl_ref.app.study import paper

from ...models import tiny_folder
from .studies import FEW, arc_file


def test_the_papers_protocol(tmp_path, capsys, monkeypatch):
    model = tiny_folder(tmp_path / "model")
    arc_file(tmp_path / "data/arc/ARC-Easy-Train.jsonl", 20)
    arc_file(tmp_path / "data/arc/ARC-Easy-Test.jsonl", 9)
    command = ["study", "paper", "--model", str(model), "--data", str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "out"), "--json"]
    assert cli.main([*command, "--tasks", "arc_easy", "--cost"]) == 0
    told = json.loads(capsys.readouterr().out)["cost"][str(tmp_path / "out" / "arc_easy")]
    assert told["steps"] > 20 * 5000 and told["bytes"] == 2 * sum(
        p.numel() for p in Llama.from_pretrained(model).parameters()
    )
    assert not (tmp_path / "out").exists()
    assert cli.main(command) == 2
    assert "winogrande/train_s.jsonl: no such file: task winogrande_s" in capsys.readouterr().err
    # And it runs, with its steps cut down.
    full = paper.studies

    def short(*arguments):
        return {
            task: dataclasses.replace(
                study,
                settings={**FEW, "steps": 2},
                seeds=(0,),
                samples=2,
                ranges={**study.ranges, "tolerance": [1e-12, 1e-12]},
                trials=1,
            )
            for task, study in full(*arguments).items()
        }

    monkeypatch.setattr(paper, "studies", short)
    with pytest.warns(UserWarning, match="tfb: no sigma in .* satisfies the tolerance: mle-"):
        assert cli.main([*command, "--tasks", "arc_easy"]) == 0
    results = json.loads(capsys.readouterr().out)["results"][str(tmp_path / "out" / "arc_easy")]
    assert set(paper.METHODS) < set(results["methods"])
    assert results["study"]["dtype"] == "bfloat16"


def test_openbookqa_is_tested_on_seven_other_sets(tmp_path):
    for file in ("openbookqa/train.jsonl", "openbookqa/test.jsonl"):
        arc_file(tmp_path / file, 4)
    with pytest.raises(InputError, match="ARC-Challenge-Test.jsonl: no such file"):
        paper.studies("model", tmp_path, ("openbookqa",))
    for file, _ in paper.OUT_OF_DISTRIBUTION.values():
        arc_file(tmp_path / file, 4)
    studies = paper.studies("model", tmp_path, ("openbookqa",))
    assert set(studies["openbookqa"].ood) == set(paper.OUT_OF_DISTRIBUTION)
    study = studies["openbookqa"]
    assert study.settings == {"steps": 5000, "batch": 4, "rank": 8}
    assert study.ranges == {"lr": [1e-4, 1e-4]} and study.methods == paper.METHODS
    assert (study.model, study.dtype, study.samples) == ("model", "bfloat16", 10)
    assert (study.seeds, study.trials, study.limit) == ((0, 1, 2), 4, None)
    for name, about in study.ood.items():
        kind, path = about["format"], about["path"]
        assert path.endswith("Test.jsonl" if kind == "arc" else f"mmlu/{name}_test.csv"), name
        assert (kind == "arc") == name.startswith("arc"), name
    with pytest.raises(InputError, match="unknown task 'chess'"):
        paper.studies("model", tmp_path, ("chess",))


def test_every_task_has_its_own_files(tmp_path):
    """Where test labels are not public, the development set is the test set."""
    tests = {"winogrande": "dev", "boolq": "dev", "arc": "Test", "openbookqa": "test"}
    for parts in (*paper.TASKS.values(), *paper.OUT_OF_DISTRIBUTION.values()):
        for file in parts[:-1]:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
    studies = paper.studies("model", tmp_path)
    assert list(studies) == list(paper.TASKS) and len({s.train for s in studies.values()}) == 6
    for task, study in studies.items():
        train, test = (Path(path).relative_to(tmp_path) for path in (study.train, study.test))
        folder = test.parent.name
        assert train.parent == test.parent and tests[folder] in test.stem, task
        assert "train" in train.stem.lower() and task.startswith(folder), task
        assert study.format == {"openbookqa": "obqa"}.get(folder, folder), task
        assert (study.ood != {}) == (task == "openbookqa"), task
        if task != folder:  # winogrande_s, arc_easy
            assert task.split("_")[1] in train.stem.lower(), task
