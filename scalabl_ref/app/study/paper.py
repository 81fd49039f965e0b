"""The published comparison as studies, for readers with a 7B model and a GPU.

Settings are those of the official code, SRI-CSL/BayesAdapt: rank 8 on q, v and the head, 5000 steps
of 4 rows at a learning rate of 1e-4 with 6 % warm-up, a bfloat16 base, 10 draws. Two things are
added: three seeds, and a validation set, on which every method has four trials of its settings
other than the learning rate. The test sets are those of its commit 3843000: the published ones, or
development sets where test labels are not public (Winogrande, BoolQ). The first release, ef51e8a,
scores development sets.
"""

from __future__ import annotations

from pathlib import Path

from ...support.errors import InputError
from .config import Study

# Files as published, under one folder: training set, test set, format.
TASKS = {
    "winogrande_s": ("winogrande/train_s.jsonl", "winogrande/dev.jsonl", "winogrande"),
    "winogrande_m": ("winogrande/train_m.jsonl", "winogrande/dev.jsonl", "winogrande"),
    "arc_challenge": ("arc/ARC-Challenge-Train.jsonl", "arc/ARC-Challenge-Test.jsonl", "arc"),
    "arc_easy": ("arc/ARC-Easy-Train.jsonl", "arc/ARC-Easy-Test.jsonl", "arc"),
    "openbookqa": ("openbookqa/train.jsonl", "openbookqa/test.jsonl", "obqa"),
    "boolq": ("boolq/train.jsonl", "boolq/dev.jsonl", "boolq"),
}
# Sets out of distribution for a model that was trained on OpenBookQA.
OUT_OF_DISTRIBUTION = {
    "arc_challenge": ("arc/ARC-Challenge-Test.jsonl", "arc"),
    "arc_easy": ("arc/ARC-Easy-Test.jsonl", "arc"),
    "college_chemistry": ("mmlu/college_chemistry_test.csv", "mmlu"),
    "college_physics": ("mmlu/college_physics_test.csv", "mmlu"),
    "conceptual_physics": ("mmlu/conceptual_physics_test.csv", "mmlu"),
    "high_school_chemistry": ("mmlu/high_school_chemistry_test.csv", "mmlu"),
    "high_school_physics": ("mmlu/high_school_physics_test.csv", "mmlu"),
}
METHODS = ("mle", "map", "dropout", "ensemble", "laplace", "blob", "tfb", "scalabl",
           "scalabl as published")  # fmt: skip


def studies(
    model: Path | str, data: Path | str, tasks: tuple[str, ...] = tuple(TASKS)
) -> dict[str, Study]:
    """The studies by task. model: folder of the base model. data: folder of all data files.

    Raises InputError for an unknown task or a missing file.
    """
    data, found = Path(data), {}
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}: expected {', '.join(TASKS)}")
        train, test, format = TASKS[task]
        foreign = OUT_OF_DISTRIBUTION if task == "openbookqa" else {}
        for file in (train, test, *(file for file, _ in foreign.values())):
            if not (data / file).exists():
                raise InputError(f"{data / file}: no such file: task {task} needs it")
        found[task] = Study(
            model=str(model),
            train=str(data / train),
            test=str(data / test),
            format=format,
            ood={
                name: {"path": str(data / f), "format": kind} for name, (f, kind) in foreign.items()
            },
            dtype="bfloat16",
            methods=METHODS,
            ranges={"lr": [1e-4, 1e-4]},
            settings={"steps": 5000, "batch": 4, "rank": 8},
        )
    return found
