"""A finished run as a classifier of texts: one path for Python, the commands and a server.

`load` opens a run. The classifier asks as the run was trained: with its prompts, its answers and
its posterior. An answer is a function of the text, the seed and the draws; see `answering` on the
noise. With `batch` = 1, the default, each text goes through the model by itself, and its answer is
the same to the bit whatever else is asked. A larger batch is faster, above all on a GPU, and equal
to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.predictive import Prediction
from ..data import Encoded, Example, Wording, question
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..methods import Posterior, load_posterior
from ..model.attach import Device
from ..model.llama import Llama
from ..support.errors import InputError
from ..support.hub import model_folder
from ..training.runs import RunFacts, base_of, load_run, run_facts
from . import metrics
from .answering import Answers, Samples, answer_encoded, chosen, encode_for
from .rule import Rule, decided, read_rule, ruled, samples_of


class Opened(NamedTuple):
    """A run in memory: what `open_run` reads."""

    model: Llama
    tokenizer: Tokenizer
    facts: RunFacts
    posterior: Posterior | None


def open_run(
    run: Path | str,
    base: Path | str | None = None,
    device: Device = None,
    shard: Callable[[Llama], None] | None = None,
) -> Opened:
    """The model of a run with its adapters, tokenizer, facts and posterior.

    base: folder of the base model, if it is not where run.json says. shard: splits the base over
    ranks; it is then loaded on the CPU. Raises InputError as `load_run` does, or if a posterior
    does not work with a split base.
    """
    facts = run_facts(run)
    folder = base or base_of(run, facts)
    dtype = getattr(torch, facts.dtype) if facts.dtype else None
    where = "cpu" if shard else device
    model = Llama.from_pretrained(folder, dtype, where, facts.quantize)
    model, _ = load_run(run, model, base=folder)
    posterior = load_posterior(run, facts)
    if shard:
        if posterior is not None:
            raise InputError(f"{run}: posterior {facts.posterior} does not work with --shard")
        shard(model)
    return Opened(model, load_tokenizer(folder), facts, posterior)


def default_samples(info: Mapping[str, Any]) -> int:
    """How many draws a run's answers average, for the facts of its run.json.

    Draws of a Gaussian over logits cost no pass through the model.
    """
    linear = info.get("posterior") == "subspace" and info.get("predicts") != "sampled"
    return 1000 if linear or info.get("posterior") == "laplace" else 10


class Decision(NamedTuple):
    """The answer to one text.

    answer: the most probable choice. confidence: its probability. entropy: the total uncertainty,
    in nats, of the probabilities as they are given here. expected_entropy, mutual_information: of
    the draws, before a temperature; the second is their disagreement. probs: of each choice, in
    the order of the choices; where there are fewer choices than the run has answers, the rest of
    the probability belongs to the others. decision: "answer" or "human" by the run's threshold;
    None without one.
    """

    answer: str
    confidence: float
    entropy: float
    expected_entropy: float
    mutual_information: float
    probs: tuple[float, ...]
    decision: str | None = None


@dataclass(frozen=True)
class Classifier:
    """A run that answers texts. `load` makes one.

    run: its folder, for errors. samples, seed, design: of the draws, as in `predict`. batch: texts
    that go through the model at once. temperature: divides the log of the averaged probabilities;
    None leaves them. threshold: the least confidence of an answer that no human sees; infinite if
    none kept its promise; None decides nothing. weights_sha256: of the run's weights, if `ruled`
    took it.

    Its methods raise InputError for a text that is empty or too long, and for choices that the run
    cannot answer.
    """

    model: Llama
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    posterior: Posterior | None
    wording: Wording
    samples: Samples
    seed: int = 0
    design: str = "independent"
    batch: int = 1
    temperature: float | None = None
    threshold: float | None = None
    run: Path | str = "this run"
    weights_sha256: str = ""

    @property
    def classes_(self) -> list[str]:
        """The answers, in the order of the probabilities.

        Raises InputError if the run was trained on questions with different choices.
        """
        return self.choices(None)

    def __call__(self, text: str, choices: Sequence[str] | None = None) -> Decision:
        """The answer to one text. choices: as in `predict_proba`."""
        if not isinstance(text, str):
            raise InputError(f"expected one text, not {type(text).__name__}: for several texts "
                             "call clf.decide(texts)")  # fmt: skip
        return self.decide([text], choices)[0]

    def predict_proba(self, texts: Iterable[str], choices: Sequence[str] | None = None) -> Tensor:
        """The probability of each choice, (N, C) float64 on the CPU.

        choices: the answers to all these texts, needed if the run was trained on questions with
        different choices. A run whose answers are words has them in the order of `classes_`.
        """
        decisions = self.decide(texts, choices)
        rows = [decision.probs for decision in decisions]
        return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(self.choices(choices)))

    def predict(self, texts: Iterable[str], choices: Sequence[str] | None = None) -> list[str]:
        """The most probable choice of each text. choices: as in `predict_proba`."""
        return [decision.answer for decision in self.decide(texts, choices)]

    def decide(self, texts: Iterable[str], choices: Sequence[str] | None = None) -> list[Decision]:
        """Answer, uncertainty and decision of each text. choices: as in `predict_proba`."""
        examples = self.examples(texts, choices)
        return self.decisions(examples) if examples else []

    def examples(self, texts: Iterable[str], choices: Sequence[str] | None = None) -> list[Example]:
        """The texts as questions of this run, numbered from 0."""
        if isinstance(texts, str):
            raise InputError("expected a list of texts, not one text: put it in a list, or call "
                             "clf(text)")  # fmt: skip
        names, texts, found = self.choices(choices), list(texts), []
        for i, text in enumerate(texts):
            try:
                found.append(question(text, names, self.facts["format"], id=str(i)))
            except InputError as error:
                where = f"text {i}: " if len(texts) > 1 else ""
                raise InputError(f"{where}{error}") from None
        return found

    def encode(self, examples: list[Example]) -> Encoded:
        """The examples as tokens, all of them. Raises InputError for one that cannot be asked."""
        for example in examples:
            self.choices(example.choices)
        limit, wording = self.wording.max_length, self.wording
        if wording.drop_long:
            wording = replace(wording, drop_long=False, max_length=None)
        encoded = encode_for(self.model, self.tokenizer, examples, wording)
        for example, row in zip(examples, encoded.tokens, strict=True):
            if limit is not None and len(row) > limit:
                raise InputError(
                    f"row {example.id}: its prompt has {len(row)} tokens, and the run leaves out "
                    f"those of more than {limit} (--drop-long): shorten it"
                )
        return encoded

    def decisions(self, examples: list[Example], title: str = "") -> list[Decision]:
        """The answers to questions, whose choices may differ. title: of a progress bar.

        `decide` takes texts.
        """
        if not all(isinstance(example, Example) for example in examples):
            raise InputError("decisions takes questions (scalabl_ref.data.Example): for texts call "
                             "clf.decide(texts)")  # fmt: skip
        answers = self._answers(self.encode(examples), title)
        place, confidence = chosen(answers)
        p = answers.prediction
        columns = (confidence, p.entropy, p.expected_entropy, p.mutual_information)
        rows = zip(examples, place.tolist(), *(c.tolist() for c in columns), p.probs.tolist(),
                   strict=True)  # fmt: skip
        found = []
        for example, index, sure, entropy, expected, information, probs in rows:
            names = self.wording.words or example.choices
            found.append(Decision(
                names[index], sure, entropy, expected, information, tuple(probs[: len(names)]),
                decided(sure, self.threshold),
            ))  # fmt: skip
        return found

    def ask(self, examples: list[Example], title: str = "", answerable: bool = True) -> Answers:
        """The predictive distribution of labelled questions, less those that the run leaves out.

        answerable: as in `data.encode`.
        """
        encoded = encode_for(self.model, self.tokenizer, examples, self.wording, answerable)
        return self._answers(encoded, title)

    def _answers(self, encoded: Encoded, title: str) -> Answers:
        answers = answer_encoded(
            self.model, encoded, self.samples, self.seed, self.batch, title, self.posterior,
            self.design,
        )  # fmt: skip
        if self.temperature is None:
            return answers
        return replace(answers, prediction=cooled(answers.prediction, self.temperature))

    def choices(self, choices: Sequence[str] | None) -> list[str]:
        """The answers to a text, in the order of the classes. Raises InputError if there are none,
        or if the run cannot answer them."""
        if isinstance(choices, str):
            raise InputError(f"choices must be a list of texts, not the text {choices[:60]!r}")
        names = list(choices or self.wording.names or ())
        if not names:
            raise InputError(
                f"{self.run}: was trained on questions with different choices: give --choices "
                "(choices=[...] in Python)"
            )
        head = self.model.config.head_tokens
        if head is not None and len(head) < len(names):
            raise InputError(f"{self.run}: can answer {len(head)} choices, not {len(names)}")
        words = self.wording.words
        if words is None:
            return names
        if sorted(names) != sorted(words):
            known = " ".join(map(repr, words))
            raise InputError(f"{self.run}: leave --choices out, or give the run's labels: {known}")
        return list(words)


def load(
    run: Path | str,
    model: Path | str | None = None,
    *,
    samples: Samples | None = None,
    seed: int | None = None,
    design: str | None = None,
    batch: int = 1,
    device: Device = None,
    raw: bool = False,
) -> Classifier:
    """The classifier of a run folder that `scalabl train`, `posterior` or `import` wrote.

    It has the temperature and the threshold that `scalabl calibrate` and `threshold` kept in the
    run; raw: without them. model: folder of its base model, or a name on the Hugging Face Hub, if
    it is not where the run says. samples, seed, design: of the draws; None takes those that the
    temperature and the threshold were fitted with, or `default_samples`, 0 and "independent".
    batch, device: as in `Classifier` and `Llama.from_pretrained`. Raises InputError if a file is
    missing or broken, or if temperature and threshold are of other draws.

    Example, with a run of `scalabl train --data tickets.csv --out run`:

        clf = scalabl_ref.load("run")
        clf("Where is my parcel?")            # Decision(answer='delivery', confidence=0.93, ...)
        clf.predict_proba(["Hello", "..."])   # (2, C), columns as clf.classes_
    """
    theirs = {} if raw else read_rule(run).get("how", {})
    seed = theirs.get("seed", 0) if seed is None else seed
    design = design or theirs.get("design", "independent")
    opened = open_run(run, model and model_folder(model), device)
    return classifier(opened, run, samples, seed, design, batch, raw=raw)


def classifier(
    opened: Opened,
    run: Path | str,
    samples: Samples | None = None,
    seed: int = 0,
    design: str = "independent",
    batch: int = 1,
    wording: Wording | None = None,
    raw: bool = False,
    rule: Rule | None = None,
) -> Classifier:
    """`load` of a run that is open. wording, rule: in place of the run's."""
    model, tokenizer, facts, posterior = opened
    if rule is None:
        rule = {} if raw else read_rule(run)
    own = Wording.of_run(facts)
    clf = Classifier(
        model, tokenizer, facts, posterior, wording or own, draws_of(facts, rule, samples), seed,
        design, batch, run=run,
    )  # fmt: skip
    return ruled(clf, rule, wording in (None, own))


def draws_of(facts: Mapping[str, Any], rule: Rule, samples: Samples | None) -> Samples:
    """`samples` if they are given, else those of the rule, else the default."""
    if samples is None:
        samples = samples_of(rule)
    return default_samples(facts) if samples is None else samples


def cooled(prediction: Prediction, temperature: float) -> Prediction:
    """The prediction with softmax(log(probs) / temperature), and the entropy of that.

    The temperature is applied to the averaged probabilities. So expected entropy and mutual
    information, which are of the draws, stay as they are, and no longer sum to the entropy.
    """
    probs = metrics.apply_temperature(prediction.probs, temperature)
    return prediction._replace(probs=probs, entropy=metrics.entropy(probs))
