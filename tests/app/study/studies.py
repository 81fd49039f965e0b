"""Small studies that the tests share."""

from __future__ import annotations

import json

import torch

from scalabl_ref.app.study import Study

from ...models import questions_file, tiny_folder
from ...tolerances import rounding

ROUNDING = rounding(torch.float64, 16)  # of means and deviations over two seeds


FEW = {"steps": 3, "batch": 4, "rank": 2, "targets": ["q_proj", "lm_head"]}


LONG = {**FEW, "steps": 40_000, "checkpoint_every": 40_000}  # a minute, but for what ends it


def config(tmp_path, **changes):
    folder = tiny_folder(tmp_path / "model")
    train = questions_file(tmp_path / "train.jsonl", rows=20)
    test = questions_file(tmp_path / "test.jsonl", rows=9)
    values = {
        "model": str(folder), "train": str(train), "test": str(test),
        "ood": {"other": {"path": str(test), "limit": 5}},
        "seeds": [0, 1], "samples": 2, "trials": 2, "ranges": {"lr": [0.01, 0.02]}, "settings": FEW,
        "methods": ["mle", "scalabl"], **changes,
    }  # fmt: skip
    path = tmp_path / "study.json"
    path.write_text(json.dumps(values))
    return path


def quick(tmp_path, **changes):
    """A study of one run, and of its answers."""
    small = {"methods": ["mle"], "trials": 1, "seeds": [0]}
    return Study.read(config(tmp_path, **{**small, **changes}))


def relabel(path):
    """Another answer to each question, in a file of the same size."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["label"] = (row["label"] + 1) % 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arc_file(path, rows):
    choices = [{"text": f"no {label}", "label": label} for label in "ABCD"]
    lines = [
        {
            "id": str(i),
            "question": {"stem": f"{i}?", "choices": choices},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(rows)
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
