"""Checks of a finished run that answers texts: from its files, draw by draw, in plain Python."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor

from ..core.adapter import adapter_state, adapters
from ..core.config import AdapterConfig
from ..core.noise import Noise
from ..core.objective import Batch, class_logits
from ..core.predictive import Prediction
from ..data import Columns, Encoded, Example, Wording, collate, question
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..evaluation import metrics
from ..evaluation.answering import Answers, Samples, answer_encoded, chosen, draws_taken
from ..evaluation.classifier import (
    Classifier,
    Decision,
    Opened,
    classifier,
    default_samples,
    load,
)
from ..evaluation.evaluate import check_results, results_folder, score
from ..evaluation.generate import generate, pieces
from ..evaluation.predict import predict
from ..evaluation.quadrature import predict_exact
from ..evaluation.report import document
from ..evaluation.rule import (
    answered,
    calibrated,
    clear_rule,
    how,
    promises,
    read_rule,
    row_digests,
    seen_in,
    thresholded,
    weights_sha256,
    write_rule,
)
from ..evaluation.sequential import Auto, predict_auto
from ..evaluation.stream import Texts, predict_file
from ..methods import Ensemble
from ..model.attach import add_adapters
from ..model.config import LlamaConfig
from ..model.llama import Llama
from ..support.tensors import save_tensors
from ..training.runs import run_facts, save_run
from . import reference
from .check import Check, Errors, Op, exact, ratio, refused
from .file_checks import in_hugging_face, write_byte_tokenizer
from .method_checks import CLASSES, EPS, NEAR, NETWORK, draws, fill, small_model
from .score_checks import at_most, near_sum

SHAPE = LlamaConfig(vocab_size=256, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                    max_position_embeddings=64)  # fmt: skip
WORDS = Wording("{question}:", labels="words", answer_tokens="bare", names=("no", "yes", "maybe"))
LETTERS = Wording("{question}\n{choices}\nIt is", labels="letters", answer_tokens="bare")
TEXTS = ["a", "what is it", "\u00fc, so", "what is"]
# One pass of this model in float32, its logits and the scores made of them.


class Run(NamedTuple):
    folder: Path
    model: Llama
    tokenizer: Tokenizer
    wording: Wording


@contextmanager
def a_run(device: torch.device, wording: Wording, **config: Any) -> Iterator[Run]:
    """A run on disk with its base, as other programs and `save_run` write them."""
    with tempfile.TemporaryDirectory() as name:
        base, folder = Path(name) / "base", Path(name) / "run"
        base.mkdir()
        model = Llama(SHAPE, device=device).init_random_(std=0.6)
        (base / "config.json").write_text(json.dumps(SHAPE.to_hf()))
        own = [(in_hugging_face(n), p) for n, p in model.named_parameters()]
        save_tensors(base / "model.safetensors", own)
        write_byte_tokenizer(base)
        tokenizer = load_tokenizer(base)
        first = "nym" if wording.names else "ABC"
        model.trim_head([tokenizer.encode(letter)[0] for letter in first])
        add_adapters(model, AdapterConfig(rank=2, targets=("q_proj", "lm_head"), **config))
        fill(adapters(model).values(), 3)
        facts = {"model": str(base), "format": "csv", **wording.facts()}
        save_run(folder, model, facts)
        yield Run(folder, model, tokenizer, wording)


def prompt_of(wording: Wording, text: str, choices: Sequence[str]) -> str:
    """By hand, as the templates of this file say."""
    if wording.names:
        return f"{text}:"
    listed = "".join(f"{letter}. {c}\n" for letter, c in zip("ABC", choices, strict=False))
    return f"{text}\n{listed}It is"


@torch.no_grad()
def expected(run: Run, text: str, choices: Sequence[str], samples: int, seed: int) -> dict:
    """The mixture of a text's draws, whose noise is keyed by the digest of its tokens."""
    row = run.tokenizer.encode(prompt_of(run.wording, text, choices))
    digest = hashlib.sha256(",".join(str(i) for i in row).encode()).digest()
    by_token = next(iter(adapters(run.model).values())).config.sampling == "token"
    key = int(digest.hex()[:16], 16) % (2**32 // 64 if by_token else 2**32)
    one = torch.tensor([0])
    classes = torch.tensor(run.model.config.head_tokens)
    batch = Batch(torch.tensor([row]), torch.tensor([len(row)]), one, one + key, classes)
    batch = batch.to(run.model.device)
    noises: list[Noise | None] = [Noise(seed, i) for i in range(samples)]
    logits = [class_logits(run.model, batch, noise).double().cpu() for noise in noises or [None]]
    found = reference.predictive(torch.stack(logits))
    return {name: values[0] for name, values in found.items()}


def same_decision(
    got: Decision, right: dict, names: Sequence[str], temperature: float, case: str
) -> Errors:
    powers = [p ** (1 / temperature) for p in right["probs"]]
    probs = [power / sum(powers) for power in powers]
    own = probs[: len(names)]
    place = own.index(max(own))
    entropy = -sum(p * math.log(p) for p in probs)
    yield exact(got.answer == names[place] and len(got.probs) == len(own), f"{case}: {got}")
    numbers = (*got.probs, got.confidence, got.entropy, got.expected_entropy,
               got.mutual_information)  # fmt: skip
    values = (*own, own[place], entropy, right["expected_entropy"], right["mutual_information"])
    one, other = (torch.tensor(t, dtype=torch.float64) for t in (numbers, values))
    yield ratio(one, other, torch.ones_like(other), NEAR, case)


def texts_answered(_: Op, device: torch.device) -> Errors:
    """Texts to decisions, alone and in batches: words, letters, fewer choices, a temperature."""
    some: list[tuple[Wording, dict[str, Any], list[str]]] = [
        (WORDS, {"method": "blob"}, ["no", "yes", "maybe"]),
        (WORDS, {"sampling": "token"}, ["no", "yes", "maybe"]),
        (LETTERS, {"sampling": "batch"}, ["A", "B"]),
    ]  # fmt: skip
    for wording, config, names in some:
        with a_run(device, wording, **config) as run:
            given = None if wording.names else names
            for samples, batch, temperature in ((2, 1, 1.0), (0, 1, 1.0), (2, 3, 2.5)):
                clf = load(run.folder, samples=samples, seed=6, batch=batch, device=device)
                clf = clf if temperature == 1 else replace(clf, temperature=temperature)
                case = f"{names}, {config}, {samples} draws, {batch} at once"
                found = clf.decide(TEXTS, given)
                for text, got in zip(TEXTS, found, strict=True):
                    right = expected(run, text, names, samples, 6)
                    yield from same_decision(got, right, names, temperature, f"{case}, {text!r}")
                yield exact(all(d.decision is None for d in found), f"{case}: decides")
                table = clf.predict_proba(TEXTS, given)
                yield exact(table.tolist() == [list(d.probs) for d in found], f"{case}: probs")
                turned = [question(TEXTS[1], names[1:] + names[:1], "csv")]
                if wording.names:
                    same = clf.decisions(turned)[0].answer == found[1].answer
                    yield exact(same, f"{case}: choices in another order")
                yield exact(
                    clf.predict(TEXTS, given) == [d.answer for d in found], f"{case}: names"
                )
            yield from texts_refused(clf, wording)


def texts_refused(clf: Classifier, wording: Wording) -> Errors:
    yield refused(lambda: clf.decide("one text"), "expected a list of texts")
    yield refused(lambda: clf.decide(["fine", "x" * 70], ["no", "yes", "maybe"]), "at most 64")
    yield refused(lambda: clf(" ", ["no", "yes", "maybe"]), "is empty")
    if wording.names:
        yield exact(clf.classes_ == ["no", "yes", "maybe"], f"classes {clf.classes_}")
        yield refused(lambda: clf(TEXTS[0], ["no", "yes"]), "the run's labels")
        other = clf.choices(["maybe", "no", "yes"])
        yield exact(other == ["no", "yes", "maybe"], f"in the order of the classes: {other}")
        short = replace(clf, wording=replace(wording, max_length=5, drop_long=True))
        yield refused(lambda: short.decide(TEXTS[1:2]), "leaves out those of more than 5")
        cut = replace(clf, wording=replace(wording, max_length=5))
        yield exact(cut("so, what is it").probs == clf("s it").probs, "cut on the left")
        yield exact(len(clf.decide([])) == 0, "no texts")
    else:
        yield refused(lambda: clf(TEXTS[0]), "different choices")
        yield refused(lambda: clf(TEXTS[0], list("abcd")), "can answer 3 choices")


def whole_sets(_: Op, device: torch.device) -> Errors:
    """A set of prompts with numbers of draws, draws as needed, and none: each row by itself.

    Also members of an ensemble; under an id that is the digest of its tokens.
    """
    tokens = [[3, 1, 4, 1], [5], [9, 2, 6], [5, 3], [5]]
    data = Encoded(tokens, [0, 1, 2, 0, 1], list(CLASSES))
    cases: list[tuple[tuple[str, ...], bool, tuple[Samples, ...]]] = [
        (("q_proj", "lm_head"), False, (0, 3, Auto(0.2, 0.1, 20))),
        (("lm_head",), False, ("exact",)), (("q_proj",), True, (3, 0)),
    ]  # fmt: skip
    for targets, posterior, some in cases:
        model = small_model(device, targets=targets, method="scalabl")
        ensemble = None
        if posterior:
            states = []
            for seed in (4, 5):
                fill(adapters(model).values(), seed)
                states.append({n: v.clone() for n, v in adapter_state(model).items()})
            ensemble = Ensemble(states)
        for samples in some:
            found = answer_encoded(model, data, samples, 7, 2, "", ensemble)
            for i, row in enumerate(tokens):
                digest = hashlib.sha256(",".join(str(t) for t in row).encode()).hexdigest()
                ids = torch.tensor([int(digest[:16], 16) % 2**32])
                one = replace(collate(data, [i]), ids=ids).to(device)
                if isinstance(samples, Auto):
                    right, taken, settled = predict_auto(model, one, samples, 7)
                    counts = [int(cast(Tensor, t)[i]) for t in (found.draws, found.settled)]
                    yield exact(counts == [int(taken), int(settled)], f"draws of row {i}: {counts}")
                elif isinstance(samples, str):
                    right = predict_exact(model, one)
                else:
                    right = predict(model, one, samples, 7, ensemble)
                for name, value in right._asdict().items():
                    got = getattr(found.prediction, name)[i : i + 1]
                    near = torch.ones_like(value.cpu())
                    case = f"{samples}, row {i}: {name}"
                    yield ratio(got, value.cpu(), near, 16 * NETWORK * EPS, case)
            yield exact(found.samples == samples or posterior, f"{samples}: {found.samples}")
            yield exact(found.labels.tolist() == data.labels, f"{samples}: labels")
    auto = partial(answer_encoded, model, data, Auto(), 7, 2, "", ensemble)
    yield refused(auto, "give a number")
    latin = partial(answer_encoded, model, data, "exact", 7, 2, "", None, "latin")
    yield refused(latin, "need independent draws")


# --- The rule -------------------------------------------------------------------------------------


def some_answers(rows: int = 40) -> Answers:
    """Answers to questions, every third of which has two choices out of three classes."""
    probs = torch.softmax(2 * draws(5 + rows, rows, 3), -1)
    probs[5] = torch.tensor([0.3, 0.25, 0.45])  # a class that the row has not is the largest
    place = probs[:, :2].argmax(1).tolist()
    examples = [question(f"row {i}", "xyz"[: 2 if i % 3 == 2 else 3], "jsonl",
                         place[i] if i % 4 else 0, str(i)) for i in range(rows)]  # fmt: skip
    labels = torch.tensor([e.label for e in examples])
    entropy = metrics.entropy(probs)
    return Answers(examples, labels, Prediction(probs, entropy, 0.75 * entropy, 0.25 * entropy), 10)


def choices_by_hand(answers: Answers) -> list[tuple[float, int, bool]]:
    """Of each row: confidence and place of its most probable choice, and whether it is right."""
    found = []
    for example, probs in zip(answers.examples, answers.prediction.probs.tolist(), strict=True):
        own = probs[: len(example.choices)]
        found.append((max(own), own.index(max(own)), own.index(max(own)) == example.label))
    return found


def rules(_: Op, device: torch.device) -> Errors:
    """Temperature and threshold: fitted, kept, read, applied; refused for another way to answer."""
    answers = some_answers()
    rows = choices_by_hand(answers)
    place, confidence = chosen(answers)
    yield exact(place.tolist() == [r[1] for r in rows], "places among a row's own choices")
    yield exact(confidence.tolist() == [r[0] for r in rows], "their confidence")
    probs, labels = answers.prediction.probs, answers.labels
    fitted = calibrated(answers, 7)
    warm = torch.tensor([[p ** (1 / fitted["value"]) for p in row] for row in probs.tolist()])
    warm = warm.double() / warm.double().sum(1, keepdim=True)
    for i, table in enumerate((probs, warm)):
        right = reference.scores(table, labels)["nll"], reference.ece(table, labels, 7)
        for name, value in zip(("nll", "ece"), right, strict=True):
            yield abs(fitted[name][i] - value) / 1e-6
    best = metrics.nll(metrics.apply_temperature(probs, fitted["value"]), labels)
    for other in (0.98, 1.02):
        moved = metrics.apply_temperature(probs, other * fitted["value"])
        yield exact(metrics.nll(moved, labels) > best, f"the temperature times {other}")
    yield exact(fitted["n"] == 40, "rows of the fit")
    for least in (0.2, rows[7][0], 0.8, 1.0):
        kept = [r[2] for r in rows if r[0] >= least]
        acc = sum(kept) / len(kept) if kept else None
        right_facts = {"threshold": least, "coverage": len(kept) / 40, "answered": len(kept),
                       "right": sum(kept), "acc": acc}  # fmt: skip
        yield exact(answered(answers, least) == right_facts, f"answered from {least} on")
    none = thresholded(answers, 0.999, 0.95)
    yield exact(none["value"] == math.inf and none["answered"] == 0, f"no threshold: {none}")
    own = thresholded(answers, 0.3, 0.9)
    kept = [r[2] for r in rows if r[0] >= own["value"]]
    facts = own["answered"], own["right"], own["n"], own["accuracy"], own["level"]
    yield exact(facts == (len(kept), sum(kept), 40, 0.3, 0.9), f"threshold: {own}")
    tail = at_most(len(kept), len(kept) - sum(kept), 1 - own["bound"])
    yield near_sum(tail, 0.1, "the bound of the threshold")
    targets = [p[0] for p in promises(answers, 0.3, 0.9)]
    yield exact(targets == sorted({0.3, *targets}) and len(targets) > 1, f"promises of {targets}")
    yield from digests()
    yield from rules_on_disk(device, fitted, own)


def digests() -> Errors:
    one = question("Why?", ("b", "a"), "csv", 1)
    same, other = question("Why?", ("a", "b"), "csv"), question("Why", ("a", "b"), "csv")
    right = hashlib.sha256(b'["Why?", "a", "b"]').hexdigest()[:16]
    yield exact(row_digests([one, same]) == f"{right} {right}", "digests of rows")
    seen = seen_in(row_digests([one, other, one]), row_digests([same]))
    yield exact(seen == 2, f"{seen} rows seen")
    chosen_draws = [default_samples(facts) for facts in (
        {}, {"posterior": "laplace"}, {"posterior": "subspace"}, {"posterior": "swag"},
        {"posterior": "subspace", "predicts": "sampled"})]  # fmt: skip
    yield exact(chosen_draws == [10, 1000, 1000, 10, 10], f"draws by default: {chosen_draws}")


def rules_on_disk(device: torch.device, fitted: dict, own: dict) -> Errors:
    file = {"data": "d.csv", "data_sha256": "0", "rows": ""}
    with a_run(device, WORDS) as run:
        names = list(WORDS.names or ())
        plain = load(run.folder, samples=4, seed=9, device=device)
        digest = hashlib.sha256((run.folder / "adapter.safetensors").read_bytes()).hexdigest()
        digest = hashlib.sha256(f"adapter.safetensors {digest}\n".encode()).hexdigest()
        yield exact(weights_sha256(run.folder) == digest, "digest of the weights")
        facts = {"weights_sha256": digest, "samples": 4, "seed": 9, "design": "independent"}
        yield exact(how(plain) == facts, f"how it answers: {how(plain)}")
        for least in (0.0, 0.5, math.inf):
            threshold = {**own, **file, "value": least}
            rule = {"how": facts, "temperature": {**fitted, **file}, "threshold": threshold}
            write_rule(run.folder, rule)
            text = json.loads((run.folder / "rule.json").read_text())["threshold"]["value"]
            yield exact(text == (None if least == math.inf else least), f"{least} in the file")
            yield exact(read_rule(run.folder) == rule, f"{least} read back")
            clf = load(run.folder, device=device)
            yield exact((clf.samples, clf.seed, clf.threshold) == (4, 9, least), "the rule's draws")
            for text, got in zip(TEXTS, clf.decide(TEXTS), strict=True):
                right = expected(run, text, names, 4, 9)
                yield from same_decision(got, right, names, fitted["value"], f"{text!r} by rule")
                word = "answer" if got.confidence >= least else "human"
                yield exact(got.decision == word, f"{got.decision} from {least} on: {got}")
        sure = clf(TEXTS[0]).confidence
        just = [replace(clf, threshold=least)(TEXTS[0]).decision
                for least in (sure, math.nextafter(sure, 2))]  # fmt: skip
        yield exact(just == ["answer", "human"], f"at the threshold, and just below: {just}")
        for options in ({"samples": 5}, {"seed": 8}, {"samples": 4, "design": "antithetic"}):
            yield refused(partial(load, run.folder, **options), "of other draws")
        raw = load(run.folder, raw=True, device=device)
        drawn = raw.samples, raw.seed, raw.temperature, raw.threshold
        yield exact(drawn == (10, 0, None, None), f"raw: {drawn}")
        auto = {"tolerance": 0.1, "error": 0.05, "most": 40}
        write_rule(run.folder, {"how": {**facts, "samples": auto}, "threshold": threshold})
        clf = load(run.folder, device=device)
        yield exact(clf.samples == Auto(0.1, 0.05, 40) and clf.temperature is None, "auto draws")
        opened = Opened(run.model, run.tokenizer, run_facts(run.folder), None)
        other_words = partial(classifier, opened, run.folder, 4, 9, wording=LETTERS)
        yield refused(other_words, "of the run's own prompts")
        write_rule(run.folder, {"how": {k: v for k, v in facts.items() if k != "seed"}})
        yield refused(lambda: read_rule(run.folder), "must have the keys")
        write_rule(run.folder, {**rule, "how": {**facts, "weights_sha256": "0"}})
        yield refused(lambda: load(run.folder), "is of other weights")
        write_rule(run.folder, rule)
        yield exact(clear_rule(run.folder, "threshold"), "no threshold to remove")
        yield exact(read_rule(run.folder) == {k: rule[k] for k in ("how", "temperature")}, "kept")
        yield exact(not clear_rule(run.folder, "threshold") and clear_rule(run.folder), "all")
        yield exact(read_rule(run.folder) == {} and not clear_rule(run.folder), "removed")


# --- Files of answers -----------------------------------------------------------------------------


def files_of_answers(_: Op, device: torch.device) -> Errors:
    """Rows answered into .csv and .jsonl, in one go and after an interruption: the same bytes."""
    asked = [f"text {7 * i % 31}, {i % 3}" for i in range(70)]
    with a_run(device, WORDS) as run, tempfile.TemporaryDirectory() as name:
        clf = replace(load(run.folder, samples=2, seed=1, batch=32, device=device), threshold=0.4)
        data = Path(name) / "t.csv"
        data.write_text("id,text\n" + "".join(f'r{i},"{t}"\n' for i, t in enumerate(asked)))
        source = Texts(data, "csv", Columns(), tuple(WORDS.names or ()))
        found = clf.decide(asked)
        for suffix in ("csv", "jsonl"):
            one, other = (Path(name) / f"{part}.{suffix}" for part in ("one", "two"))
            yield exact(predict_file(clf, source, one, probs=True) == 70, "rows")
            yield from went_on(clf, source, other)
            yield exact(one.read_bytes() == other.read_bytes(), f"{suffix}: bytes")
            left = [p.name for p in Path(name).iterdir() if "partial" in p.name]
            yield exact(not left, f"left: {left}")
            yield from rows_written(one, found)
        yield refused(lambda: predict_file(clf, source, one), "exists already")
        yield refused(lambda: predict_file(clf, source, Path(name) / "x.txt"), "must end in")


def went_on(clf: Classifier, source: Texts, out: Path) -> Errors:
    """Interrupted in the second chunk, in the middle of a line; then the same call again."""
    told, count = list[str](), []
    first: Callable[..., Any] = Classifier.decisions

    def stops(self: Classifier, examples: list[Example], title: str = "") -> Any:
        count.append(len(examples))
        if len(count) == 2:
            raise KeyboardInterrupt
        return first(self, examples, title)

    with suppress(KeyboardInterrupt), mock.patch.object(Classifier, "decisions", stops):
        predict_file(clf, source, out, probs=True)
    with open(out.with_name(out.name + ".partial"), "ab") as file:
        file.write(b"half a li")
    yield refused(lambda: predict_file(replace(clf, seed=2), source, out, True), "another seed")
    predict_file(clf, source, out, probs=True, say=told.append)
    yield exact(told == ["going on after 64 of 70 rows"], f"{told}")


def rows_written(path: Path, found: list[Decision]) -> Errors:
    table = path.suffix == ".csv"
    with open(path, newline="", encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [*(csv.DictReader(lines) if table else map(json.loads, lines))]
    for i, (row, d) in enumerate(zip(rows, found, strict=True)):
        probs = row.get("probs") or [row[f"prob:{n}"] for n in WORDS.names or ()]
        texts = row["id"], row["answer"], row["decision"]
        yield exact(texts == (f"r{i}", d.answer, d.decision), f"{path.name}, row {i}: {row}")
        names = ("confidence", "entropy", "mutual_information")
        numbers = [float(v) for v in (*(row[n] for n in names), *probs)]
        right = [*(getattr(d, n) for n in names), *d.probs]
        digits = 5.1e-6 if table else 0.0  # half a unit of the sixth
        close = all(abs(a - b) <= digits * b for a, b in zip(numbers, right, strict=True))
        yield exact(close, f"{path.name}, row {i}: {numbers}, expected {right}")


def results(_: Op, device: torch.device) -> Errors:
    """metrics.json, predictions.jsonl and the report of answers, from loops over their rows."""
    inside, held = some_answers(), some_answers(25)
    outside = replace(held, labels=held.labels + 2)
    info = {"model": "/a/base", "data": "/b/test.csv", "adapter": {"method": "scalabl"},
            "train": {"kl": "forward", "objective": "elbo"}, "prompt_template": None}  # fmt: skip
    settings = {"data_sha256": "d", "adapter_sha256": "a", "model": "m", "limit": 40}
    rule = {"how": {}, "temperature": {"value": 1.5},
            "threshold": {"value": 0.6, "accuracy": 0.3, "level": 0.9}}  # fmt: skip
    found = score(info, inside, seed=4, bins=6, calibration=held, ood=outside, settings=settings,
                  run="run", rule=rule)  # fmt: skip
    p, m = inside.prediction, found.metrics
    facts = {"data": "test.csv", "data_sha256": "d", "limit": 40, "method": "scalabl", "n": 40,
             "kl": "forward", "objective": "elbo", "samples": 10, "design": "independent",
             "seed": 4, "bins": 6, "stored_temperature": 1.5, "settings": settings}  # fmt: skip
    yield exact({key: m.get(key) for key in facts} == facts, f"facts {m}")
    one = calibrated(held)["value"]
    warm = metrics.apply_temperature(p.probs, one)
    for table, values in ((p.probs, m), (warm, m["temperature"])):
        right = reference.scores(table, inside.labels)
        right["ece"] = reference.ece(table, inside.labels, 6)
        right["aurc"] = metrics.risk_coverage(table, inside.labels).area
        for key, value in right.items():
            yield near_sum(values[key], value, key)
    yield exact((m["temperature"]["value"], m["temperature"]["n_fit"]) == (one, 25), "temperature")
    yield exact(m["decision"] == answered(inside, 0.6), "decision")
    known = [i for i, label in enumerate(outside.labels.tolist()) if label < 3]
    yield exact((m["ood"]["n"], m["ood"]["n_scored"]) == (25, len(known)), "rows out of it")
    right = reference.scores(outside.prediction.probs[known], outside.labels[known])
    yield near_sum(m["ood"]["acc"], right["acc"], "accuracy out of it")
    both = torch.cat([p.entropy, outside.prediction.entropy])
    foreign = torch.arange(65) >= 40
    yield near_sum(m["ood"]["auroc_entropy"], reference.auroc(both, foreign.long()), "AUROC")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found.write(folder)
        yield from predictions_of(folder / "predictions.jsonl", inside)
        kept = json.loads((folder / "metrics.json").read_text())
        yield exact(kept == json.loads(json.dumps(m)), "metrics.json")
        page = (folder / "report.html").read_text(encoding="utf-8")
        for value in (m["acc"], m["nll"], m["temperature"]["nll"]):
            shown = f"{value:.4f}".lstrip("0"), f"{value:.3f}".lstrip("0")
            yield exact(any(text in page for text in shown), f"{value} is not in the report")
        check_results(folder, settings)
        for key in ("data_sha256", "adapter_sha256", "model"):
            yield refused(partial(check_results, folder, {**settings, key: "x"}), "of another")
    taken = torch.arange(40)
    auto = replace(inside, samples=Auto(0.1, 0.2, 50), draws=taken, settled=taken < 30)
    m = score(info, auto, seed=4).metrics
    right_auto = {"tolerance": 0.1, "error": 0.2, "most": 50, "mean_draws": 19.5, "open": 10}
    yield exact(m["auto"] == right_auto and m["samples"] == "auto", f"draws as needed: {m}")
    yield exact("design" not in m and m["bins"] == 15, "a design of draws as needed")
    places = {"a b.csv": "a_b", "checkpoint.csv": "checkpoint_data", "\u00fc-1.x.csv": "\u00fc-1_x"}
    for data, place in places.items():
        got = results_folder("run", data)
        yield exact(got == Path("run") / place, f"folder of {data}: {got}")


class Cells(HTMLParser):
    """The words of every row of a page's tables."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = [[]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.rows[-1].append(data.strip())


def pages(_: Op, device: torch.device) -> Errors:
    """The report's tables: scores, confusion, each label, thresholds, errors, calibration."""
    names, answers = ("left", "right", "up"), some_answers()
    probs, labels = answers.prediction.probs, answers.labels
    values = {**metrics.scores(probs, labels, 5), "aurc": metrics.risk_coverage(probs, labels).area}
    ids = [f"id{i}" for i in range(40)]
    rows = {"ids": ids, "texts": [f"text {i}" for i in range(40)], "choices": [names] * 40}
    intervals = {name: (0.0, 1.0) for name in values}
    model = {"name": "m", "probs": probs, "labels": labels, "metrics": values,
             "intervals": intervals}  # fmt: skip
    page = Cells()
    page.feed(document({"title": "t", "about": {"bins": 5}, "models": [model], "rows": rows}))
    found = [" ".join(row) for row in page.rows]
    by_row = [
        (max(p), p.index(max(p)), int(y)) for p, y in zip(probs.tolist(), labels, strict=True)
    ]
    for c, name in enumerate(names):
        counts = [sum(r[1:] == (a, c) for r in by_row) for a in range(3)]
        line = " ".join([name, *(str(n or "\u00b7") for n in counts)])
        yield exact(any(f.startswith(line) for f in found), f"confusion: {line}")
        hits, given = counts[c], sum(r[1] == c for r in by_row)
        numbers = [hits / n if n else math.nan for n in (given, sum(counts), 0)][:2]
        numbers.append(2 * hits / (given + sum(counts)))
        shown = ["\u2013" if math.isnan(v) else f"{v:.3f}" for v in numbers]
        line = " ".join([name, *shown, str(sum(counts))])
        yield exact(line in found, f"scores of a label: {line}")
    for accuracy in (90, 95, 99):
        for least in sorted(r[0] for r in by_row):  # as many rows as are so often right
            own = [r[1] == r[2] for r in by_row if r[0] >= least]
            if 100 * sum(own) >= accuracy * len(own):
                break
        shares = 100 * len(own) / 40, 100 * sum(own) / len(own)
        line = "{}\xa0% {:.3f} {} {:.1f}\xa0% {:.1f}\xa0% {}".format(
            accuracy, math.floor(1000 * least) / 1000, len(own), *shares, own.count(False)
        )
        yield exact(any(f.startswith(line) for f in found), f"threshold: {line}")
    wrong = [i for i in range(40) if by_row[i][1] != by_row[i][2]]
    sure = sum(by_row[i][0] >= 0.9 for i in wrong)
    line = f"{sure} of the 40 rows ({sure / 0.4:.1f}"
    yield exact(any(line in f.replace("\xa0", " ") for f in found), f"sentence: {line}")
    for i in sorted(wrong, key=lambda i: -by_row[i][0])[:10]:
        confidence, answer, label = by_row[i]
        line = f"id{i} text {i} {names[label]} {names[answer]} {confidence:.3f}"
        yield exact(any(f.startswith(line) for f in found), f"error: {line}")
    for b in range(5):
        own = [r for r in by_row if b / 5 <= r[0] < (b + 1) / 5]
        if own:
            mean, hits = sum(r[0] for r in own) / len(own), sum(r[1] == r[2] for r in own)
            line = f"{len(own)} {mean:.3f} {hits / len(own):.3f}"
            yield exact(any(line in f for f in found), f"bin {b}: {line}")
    scores = [f"{values[key]:.3f}" for key in ("acc", "ece", "nll", "brier", "aurc")]
    whole = " ".join(f for f in found)
    places = [whole.find(s) for s in scores]
    yield exact(-1 not in places and places == sorted(places), f"scores {scores} at {places}")


def predictions_of(path: Path, answers: Answers) -> Errors:
    p, by_hand = answers.prediction, choices_by_hand(answers)
    for i, line in enumerate(path.read_text().splitlines()):
        row, probs = json.loads(line), p.probs[i].tolist()
        numbers = [float(column[i]) for column in p[1:]]
        right = {
            "id": str(i), "label": int(answers.labels[i]), "prediction": probs.index(max(probs)),
            "probs": probs, **dict(zip(p._fields[1:], numbers, strict=True)),
            "decision": "answer" if by_hand[i][0] >= 0.6 else "human",
        }  # fmt: skip
        yield exact(row == right, f"row {i}: {row}, expected {right}")
    yield exact(i == len(answers.examples) - 1, f"{i + 1} rows")


def text_in_pieces(_: Op, device: torch.device) -> Errors:
    """The pieces of a text are those of its whole characters; together they are the text."""
    with tempfile.TemporaryDirectory() as name:
        write_byte_tokenizer(Path(name))
        tokenizer = load_tokenizer(name)
    ids = tokenizer.encode("a\u00fc\U0001f600b")
    got = list(pieces(tokenizer, ids[:1], ids[1:]))
    yield exact(got == ["a", "\u00fc", "\U0001f600", "b"], f"pieces {got}")
    got = list(pieces(tokenizer, ids[:2], ids[2:5]))
    yield exact("".join(got) == "a\u00fc\ufffd", f"begins and ends in a character: {got}")
    model = Llama(SHAPE, device=device).init_random_()
    yield exact(len(list(generate(model, [1] * 64, 5))) == 1, "a prompt as long as the model")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": [1] * 65}, "at most 64"), ({"prompt": []}, "is empty"),
        ({"top_p": 0.5}, "top_p"), ({"max_new_tokens": -1}, "max_new"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"), ({"samples": -1}, "samples"),
    ]  # fmt: skip
    for changes, words in wrong:
        given = {"prompt": [1], "max_new_tokens": 5, **changes}
        yield refused(partial(generate, model, **given), words)
    counts = {method: draws_taken(small_model(device, method=method), 5, None)
              for method in ("mle", "scalabl", "blob")}  # fmt: skip
    yield exact(counts == {"mle": 0, "scalabl": 5, "blob": 5}, f"draws that are taken: {counts}")


ANSWER_CHECKS = [
    Check("texts answered", "a run's files to decisions, draw by draw", texts_answered),
    Check("whole sets", "numbers of draws, as needed, exact: row by row", whole_sets),
    Check("rules", "temperature, threshold: fitted, kept, refused", rules),
    Check("files of answers", "rows of .csv and .jsonl; interrupted, resumed", files_of_answers),
    Check("results", "metrics.json, predictions.jsonl, by loops", results),
    Check("pages", "a report's tables, by loops over the rows", pages),
    Check("text in pieces", "whole characters, together the text; limits", text_in_pieces),
]
