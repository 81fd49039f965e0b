"""Evaluation of a trained run: probabilities to metrics.json, predictions.jsonl and report.html."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.adapter import random_adapters
from ..core.config import ADAPTERS
from ..core.noise import Noise
from ..core.objective import Batch
from ..core.predictive import Prediction, predictive
from ..data import Encoded, Example, Wording, encode, evaluation_batches
from ..data.tokenizer import Tokenizer
from ..methods import Ensemble, Posterior
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.fields import json_text
from ..support.files import atomic_write_texts, read_json
from ..support.progress import progress_bar
from ..training import ranks as distributed
from ..training import savepoints
from . import metrics
from .predict import Draws, pass_log_probs, predict
from .quadrature import predict_exact
from .report import document
from .sequential import Auto, predict_auto

Samples = int | Auto | Literal["exact"]
BASE = "base"  # the method of a model without adapters


@dataclass(frozen=True)
class Answers:
    """A data set with the model's predictive distribution over it, row by row."""

    examples: list[Example]
    labels: Tensor  # (N,) int64
    prediction: Prediction
    samples: Samples  # how many each took: 0 of what does not draw, an ensemble's members
    draws: Tensor | None = None  # (N,) int64, how many each took, where that differs
    encoded: Encoded | None = None  # what the model read


def encode_for(
    model: Llama,
    tokenizer: Tokenizer,
    examples: list[Example],
    wording: Wording | None = None,
    answerable: bool = True,
) -> Encoded:
    """The examples as `model` takes them: `data.encode` with its classes and its longest prompt.

    Raises InputError as that does, or for another tokenizer's classes.
    """
    head = model.config.head_tokens
    encoded = encode(
        examples,
        tokenizer,
        classes=None if head is None else len(head),
        max_length=model.config.max_position_embeddings,
        answerable=answerable,
        wording=wording,
    )
    if head is not None and tuple(encoded.classes) != head:
        raise InputError(
            f"the tokenizer gives the class tokens {encoded.classes}, but the head was cut down to "
            f"{list(head)}"
        )
    return encoded


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    examples: list[Example],
    samples: Samples,
    seed: int,
    batch: int = 32,
    title: str = "evaluate",
    posterior: Posterior | None = None,
    design: str = "independent",
    answerable: bool = True,
    wording: Wording | None = None,
) -> Answers:
    """Predict every example with `samples` draws (0: the mean model); nothing is dropped.

    On several ranks each makes some of the passes, and all get the whole. Where `samples` is not a
    number, or with a posterior, each predicts some of the batches; with a sharded base all predict
    all of them then. samples: or as many as each example needs, see
    `sequential.predict_auto`, or their limit, see `quadrature.predict_exact`. posterior: what is
    drawn, if it is not what the adapters themselves have. design: as in `predict`. answerable: the
    head must have every label, see `data.encode`. wording: as there.

    Raises InputError for a combination that cannot be had, or as `encode_for` does.
    """
    if not isinstance(samples, int) and design != "independent":
        raise InputError(f"samples auto and exact know independent draws, not design {design!r}")
    if not isinstance(samples, int) and posterior is not None:
        name = type(posterior).__name__
        raise InputError(f"samples auto and exact are of the adapters' own draws, not of a {name}")
    encoded = encode_for(model, tokenizer, examples, wording, answerable)
    batches = list(evaluation_batches(encoded, batch))
    table = torch.zeros(len(encoded.labels), len(encoded.classes) + 4, dtype=torch.float64)
    by_draws = isinstance(samples, int) and posterior is None
    spread = not by_draws and not distributed.sharded(model)  # else all ranks have all batches
    mine = batches[distributed.rank() :: distributed.world()] if spread else batches
    with progress_bar(sum(len(b.ids) for b in mine), title, "row") as bar:
        if isinstance(samples, int) and posterior is None:
            for ids, p in _share_draws(model, mine, samples, seed, design):
                table[ids, :-1] = torch.column_stack(p)
                bar.update(len(ids))
        else:
            for b in mine:
                table[b.ids] = _whole_batch(model, b, samples, seed, posterior, design)
                bar.update(len(b.ids))
    if spread:
        distributed.sum_(table)  # of rows that each are of one rank, zeros on the others
    prediction = Prediction(table[:, :-4].contiguous(), *table[:, -4:-1].T.contiguous())
    draws = table[:, -1].long() if isinstance(samples, Auto) else None
    labels, taken = torch.tensor(encoded.labels), _taken(model, samples, posterior)
    return Answers(encoded.examples, labels, prediction, taken, draws, encoded)


def _taken(model: Llama, samples: Samples, posterior: Posterior | None) -> Samples:
    """How many of `samples` there are to be had."""
    if not isinstance(samples, int) or samples == 0:
        return samples
    if isinstance(posterior, Ensemble):
        return len(posterior.members)
    return samples if posterior is not None or random_adapters(model) else 0


@torch.no_grad()
def _share_draws(
    model: Llama, batches: list[Batch], samples: int, seed: int, design: str
) -> Iterator[tuple[Tensor, Prediction]]:
    """`predict` of each batch, with its ids, on all ranks; each pass is done by one of them.

    Passes of as many batches as there are ranks are dealt out at a time, those of most draws first.
    All ranks make equally many, since those of a sharded base must.
    """
    ranks = distributed.world()
    for group in (batches[start : start + ranks] for start in range(0, len(batches), ranks)):
        work: list[tuple[int, slice, Noise | None]] = []
        tables = []  # (S, B, C) of each batch
        for i, batch in enumerate(group):
            done = 0
            for noise, draws in Draws(samples, seed, design).passes_over(model, batch):
                work.append((i, slice(done, done + draws), noise))
                done += draws
            size = done, len(batch.ids), len(batch.classes)
            tables.append(torch.zeros(size, dtype=torch.float64))
        work.sort(key=lambda item: item[1].start - item[1].stop)
        mine, counted = distributed.share(work)
        there = {i: group[i].to(model.device) for i, _, _ in mine}
        for at, (i, part, noise) in enumerate(mine):
            found = pass_log_probs(model, there[i], noise, part.stop - part.start)
            if at < counted:
                tables[i][part] = found.cpu()
        for batch, table in zip(group, tables, strict=True):
            distributed.sum_(table)  # of draws that each are of one rank, zeros on the others
            yield batch.ids, predictive(table)


def _whole_batch(
    model: Llama,
    batch: Batch,
    samples: Samples,
    seed: int,
    posterior: Posterior | None,
    design: str,
) -> Tensor:
    """Probabilities, the three numbers beside them, and draws where those differ: (B, C + 4)."""
    taken = torch.zeros(len(batch.ids))
    batch = batch.to(model.device)
    if isinstance(samples, Auto):
        p, taken = predict_auto(model, batch, samples, seed)
    elif isinstance(samples, str):
        p = predict_exact(model, batch)
    else:
        p = predict(model, batch, samples, seed, posterior, design)
    return torch.column_stack([column.cpu() for column in (*p, taken)])


def summarise(probs: Tensor, labels: Tensor, bins: int) -> dict[str, Any]:
    """n, acc, ece, nll, brier, each with its 95 % bootstrap interval under "intervals"."""
    values = {
        "acc": metrics.accuracy(probs, labels),
        "ece": metrics.ece(probs, labels, bins),
        "nll": metrics.nll(probs, labels),
        "brier": metrics.brier(probs, labels),
    }
    intervals = metrics.bootstrap_intervals(probs, labels, bins=bins)
    _, _, area = metrics.risk_coverage(probs, labels)
    return {"n": len(labels), **values, "aurc": area, "intervals": intervals}


def results_folder(run: Path | str, data: Path | str) -> Path:
    """RUN/NAME, for the results of a run on one data set: NAME is that of the file."""
    name = re.sub(r"[^\w-]+", "_", Path(data).resolve().stem).strip("_") or "data"
    return Path(run) / (name if name != savepoints.FOLDER else f"{name}_data")


def check_results(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if FOLDER has results of another data file, or of another model.

    settings: what decides the results, as `evaluate` keeps it. Those of the same model on the same
    file, however it was asked, may be written over.
    """
    path = folder / "metrics.json"
    if not path.exists():
        return
    theirs = read_json(path).get("settings")
    theirs = theirs if isinstance(theirs, dict) else {}
    for key, whose in _WHOSE.items():
        if theirs.get(key) != settings[key]:
            raise InputError(
                f"{folder}: holds results of another {whose}: give --force or --out DIR"
            )


# What results are of: two that differ in it are not each other's.
_WHOSE = {"data_sha256": "data file", "adapter_sha256": "run", "model": "model"}


def evaluate(
    folder: Path,
    info: Mapping[str, Any],
    answers: Answers,
    *,
    seed: int,
    design: str = "independent",
    bins: int = 15,
    calibration: Answers | None = None,
    ood: Answers | None = None,
    settings: Mapping[str, Any] | None = None,
    latest: Path | None = None,
) -> dict[str, Any]:
    """Write FOLDER/metrics.json, FOLDER/predictions.jsonl and FOLDER/report.html, all or none.

    Returns the metrics. Of several ranks the first writes.
    info: facts of the run, as of `run_facts`, with the data's file as "data". design: that of
    `answers`, kept where the adapters drew. calibration: held-out answers on which a temperature is
    fitted; "temperature" in the result then holds it and the metrics after scaling. ood: answers on
    another data set, scored for how well entropy and mutual information tell it apart; its accuracy
    and the like are given over the rows whose label the head has ("n_scored" of "n"). settings:
    what decides the results, kept for `check_results`. latest: a folder for copies of the files.
    """
    probs, labels, samples = answers.prediction.probs, answers.labels, answers.samples
    settings = dict(settings or {})
    method, posterior = info["adapter"]["method"], info.get("posterior")
    variational = method != BASE and ADAPTERS[method].variational
    drawn = isinstance(samples, int) and samples > 0 and not posterior
    wording = answers.encoded.wording.facts() if answers.encoded else {}
    result: dict[str, Any] = {
        "data": Path(info["data"] or "").name,
        "data_sha256": settings.get("data_sha256"),
        "limit": settings.get("limit"),
        "method": posterior or method,
        "kl": info["train"]["kl"] if variational else None,
        "objective": info["train"]["objective"],
        "prompt_template": info.get("prompt_template"),
        **wording,
        "samples": "auto" if isinstance(samples, Auto) else samples,
        **({"design": design} if drawn else {}),
        "seed": seed,
        "bins": bins,
        **summarise(probs, labels, bins),
    }
    if isinstance(samples, Auto) and answers.draws is not None:
        result["auto"] = {
            **dataclasses.asdict(samples),
            "mean_draws": answers.draws.double().mean().item(),
            "stopped_at_most": int((answers.draws == samples.most).sum()),
        }
    models = [_report_model(result["method"], probs, labels, result)]
    if calibration is not None:
        models.append(_calibrated(answers, calibration, result, bins))
    if ood is not None:
        models[0]["ood"] = _compared(answers, ood, result, bins)
    result["settings"] = settings
    if distributed.rank() == 0:
        _write([folder] if latest is None else [folder, latest], info, answers, result, models)
    return result


def _write(
    folders: list[Path],
    info: Mapping[str, Any],
    answers: Answers,
    result: dict[str, Any],
    models: list[dict[str, Any]],
) -> None:
    about = {
        "model": Path(info["model"]).name,
        **{key: result[key] for key in ("data", "method", "kl", "samples", "bins", "seed", "n")},
    }
    report = {"title": "Evaluation of a fine-tuned Llama", "about": about, "models": models}
    texts = {  # where the first one is, which is written last, the others are
        "metrics.json": json_text(result, indent=2) + "\n",
        "predictions.jsonl": "".join(_rows(answers)),
        "report.html": document(report),
    }
    atomic_write_texts({f / name: text for name, text in texts.items() for f in folders})


def _calibrated(
    answers: Answers, held_out: Answers, result: dict[str, Any], bins: int
) -> dict[str, Any]:
    """A temperature's results, put into `result` as well, for the report."""
    temperature = metrics.fit_temperature(held_out.prediction.probs.log(), held_out.labels)
    scaled = metrics.apply_temperature(answers.prediction.probs, temperature)
    after = {"value": temperature, "n_fit": len(held_out.labels)}
    result["temperature"] = {**after, **summarise(scaled, answers.labels, bins)}
    name = f"{result['method']}, temperature {temperature:.3f}"
    return _report_model(name, scaled, answers.labels, result["temperature"])


def _compared(answers: Answers, ood: Answers, result: dict[str, Any], bins: int) -> dict[str, Any]:
    """Results on data out of distribution, put into `result` as well, for the report."""
    result["ood"] = _out_of_distribution(answers, ood, result, bins)
    scores = {
        name: (getattr(answers.prediction, name), getattr(ood.prediction, name))
        for name in ("entropy", "mutual_information")
    }
    return {"name": "out of distribution", "metrics": result["ood"], "scores": scores}


def _report_model(
    name: str, probs: Tensor, labels: Tensor, values: dict[str, Any]
) -> dict[str, Any]:
    keys = ("acc", "ece", "nll", "brier", "aurc")
    return {
        "name": name,
        "probs": probs,
        "labels": labels,
        "metrics": {key: values[key] for key in keys},
        "intervals": values["intervals"],
    }


def _out_of_distribution(
    inside: Answers, outside: Answers, result: dict[str, Any], bins: int
) -> dict[str, Any]:
    answerable = outside.labels < outside.prediction.probs.shape[1]
    values: dict[str, Any] = {key: result[key] for key in ("method", "kl", "samples", "bins")}
    values["n"] = len(outside.labels)
    values["n_scored"] = int(answerable.sum())
    if answerable.any():
        scored = summarise(outside.prediction.probs[answerable], outside.labels[answerable], bins)
        values.update({key: value for key, value in scored.items() if key != "n"})
    is_outside = torch.cat(
        (torch.zeros(len(inside.labels)), torch.ones(len(outside.labels)))
    ).long()
    for name in ("entropy", "mutual_information"):
        scores = torch.cat((getattr(inside.prediction, name), getattr(outside.prediction, name)))
        values[f"auroc_{name}"] = metrics.auroc(scores, is_outside)
    return values


def _rows(answers: Answers) -> Iterator[str]:
    """One JSON line per example, in the data set's order."""
    p = answers.prediction
    columns = (p.probs, p.entropy, p.expected_entropy, p.mutual_information, answers.labels)
    draws = [None] * len(answers.examples) if answers.draws is None else answers.draws.tolist()
    lists = [c.tolist() for c in columns]
    for example, taken, *row in zip(answers.examples, draws, *lists, strict=True):
        probs, entropy, expected, information, label = row
        record = {
            "id": example.id,
            "label": label,
            "prediction": max(range(len(probs)), key=probs.__getitem__),
            "probs": probs,
            "entropy": entropy,
            "expected_entropy": expected,
            "mutual_information": information,
            **({} if taken is None else {"draws": taken}),
        }
        yield json_text(record) + "\n"
