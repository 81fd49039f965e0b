"""The README.md beside exported weights: a model card whose front matter the Hub understands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.config import AdapterConfig
from ..core.noise import NOISE_VERSION

# A layout's library, its relation to the base, and its description.
_LAYOUTS = {
    "peft": ("peft", "adapter", "A LoRA adapter"),
    "hf": ("transformers", "finetune", "A model with a LoRA merged into its weights"),
}
_LOADERS = {
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {place})
""",
    "hf": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({place})
""",
}


@dataclass(frozen=True)
class Card:
    """The facts of a run that are the same for all its draws.

    base: the base model's name. info: the facts of run.json. kl: its direction and value in words,
    None if there is no KL. metrics: the object in metrics.json. answers: the tokens of a head that
    was cut down.
    """

    base: str
    config: AdapterConfig
    info: Mapping[str, Any]
    kl: str | None
    metrics: Mapping[str, Any] | None
    answers: list[str]

    @property
    def method(self) -> str:
        return self.info.get("posterior") or self.config.method

    def text(self, to: str, what: str, place: str) -> str:
        """README.md. to: "peft" or "hf". what: "the mean" or a draw. place: the folder."""
        loader = _LOADERS[to].format(base=json.dumps(self.base), place=json.dumps(place))
        parts = [
            self._front(to),
            f"# {place}: {what} of a {self.method} run on {self.base}\n",
            self._about(to, what),
            f"## Load\n\n```python\n{loader}```\n",
            "## Training\n\n" + _bullets(self._training()),
            self._metrics(),
            "## Versions\n\n" + _bullets(_versions()),
        ]
        return "\n".join(part for part in parts if part)

    def _front(self, to: str) -> str:
        library, relation, _ = _LAYOUTS[to]
        lines = [
            f"library_name: {library}",
            f"base_model: {json.dumps(self.base)}",
            f"base_model_relation: {relation}",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {tag}" for tag in ("scalabl_ref", self.method, "lora", "bayesian")),
        ]
        return "\n".join(["---", *lines, "---", ""])

    def _about(self, to: str, what: str) -> str:
        lines = [f"{_LAYOUTS[to][2]}: {what} of a {self.method} run of scalabl_ref."]
        if what == "the mean" and self.method not in ("mle", "map", "point"):
            lines.append("It answers as the run does without draws: without its uncertainty.")
        if what != "the mean":
            lines.append("The run's answers are probabilities averaged over all its draws.")
        if self.answers:
            lines.append(
                f"The head was adapted only for the tokens {', '.join(self.answers)}: compare "
                "their logits with each other; the logits of other tokens are the base's."
            )
        return " ".join(lines) + "\n"

    def _training(self) -> dict[str, Any]:
        info, config = self.info, self.config
        train = info.get("train") or {}
        method = info.get("trained_as") or config.method
        has_prior = method not in ("mle", "dropout")
        data = info.get("data")
        return {
            "method": method,
            "posterior": info.get("posterior"),
            "rank, alpha": f"{config.rank}, {config.scaling * config.rank:g}",
            "targets": " ".join(config.targets),
            "covariance": config.covariance if config.method == "scalabl" else None,
            "prior": f"{config.prior}, standard deviation {config.prior_std:g}"
            if has_prior
            else None,
            "KL": self.kl,
            **{key: train.get(key) for key in ("objective", "beta", "steps", "batch", "lr")},
            "seed": train.get("seed"),
            "data": Path(data).name if data else None,
            "SHA-256 of the data": info.get("data_sha256"),
            "examples trained on": info.get("examples"),
            "prompt template": _json(info.get("prompt_template")),
            "started from": _json(info.get("init")),
            "imported": _json(info.get("imported")),
        }

    def _metrics(self) -> str:
        if self.metrics is None:
            return ""
        m = self.metrics
        data = m.get("data") or "test"
        sets = {data: m, f"{data}, temperature": m.get("temperature"), "other data": m.get("ood")}
        rows = [
            f"| {name} | {of['n']} | "
            + "".join(f"{_value(of[key])} | " for key in ("acc", "ece", "nll", "brier")).rstrip()
            for name, of in sets.items()
            if of and "acc" in of
        ]
        how = f"{m.get('samples')} draws, seed {m.get('seed')}, {m.get('bins')} bins"
        table = ["| data | n | ACC | ECE | NLL | Brier |", "|---|---|---|---|---|---|", *rows, ""]
        about = f"These are metrics of the whole run, not of this file: {how}."
        return f"## Metrics\n\n{about}\n\n" + "\n".join(table)


def _value(number: float | None) -> str:
    """A metric of metrics.json, in which null means infinity."""
    return "inf" if number is None else f"{number:.4f}"


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _bullets(facts: Mapping[str, Any]) -> str:
    return "".join(f"- {key}: {value}\n" for key, value in facts.items() if value is not None)


def _versions() -> dict[str, Any]:
    from .. import __version__

    return {"scalabl_ref": __version__, "torch": torch.__version__, "noise": NOISE_VERSION}
