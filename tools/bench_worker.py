"""One side of a model benchmark: `bench.py` starts two of these and lets them work in turn.

    python tools/bench_worker.py {ours,peer} FOLDER [--official DIR] [--threads N] [--dtype D]
        [--device cuda]

The first line on standard output says what this side is. Then every line of JSON on standard input
is a task, {"do": name, ...}, answered by one line: {"seconds": ..., "bytes": ..., "value": ...}.
bytes is the growth of the peak of resident memory while the task ran, on a GPU that of PyTorch's
memory. Every task ends with a number on the CPU, and so waits for the GPU. `peer` is transformers
with peft, and with the official wrapper from a checkout of SRI-CSL/BayesAdapt if DIR is given; it
needs an environment of its own, with NumPy, and knows nothing of this package.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

Task = dict[str, Any]
RANK, LR = 8, 1e-4
TARGETS = ["q_proj", "v_proj", "lm_head"]
EXAMPLES = 640  # N, which scales the KL


def memory(key: str) -> int:
    """Bytes of VmRSS, VmHWM or the like, 0 where the system does not tell."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def timed(torch: Any, device: str, step: Callable[[], Any]) -> dict[str, Any]:
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, start = torch.cuda.memory_allocated(), time.perf_counter()
        value = step()
        seconds = time.perf_counter() - start
        grown = torch.cuda.max_memory_allocated() - held
        return {"seconds": seconds, "bytes": grown, "value": value}
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak starts anew
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    before, start = memory("VmRSS"), time.perf_counter()
    value = step()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory("VmHWM") - before, "value": value}


def measured(side: Any, model: Any, task: Task, step: Callable[[], float]) -> dict[str, Any]:
    """Seconds and bytes of a step; its parts, if the task has a number of steps to profile."""
    if "profile" not in task:
        return timed(side.torch, side.device, step)
    from bench_profile import profiled

    return {"parts": profiled(side.torch, model, task["profile"], step)}


# --- Ours -----------------------------------------------------------------------------------------


class Ours:
    def __init__(self, folder: Path, official: Path | None, dtype: str, device: str) -> None:
        import scalabl_ref

        # isort: split
        import torch

        self.torch, self.lib, self.folder = torch, scalabl_ref, folder
        self.dtype, self.device = getattr(torch, dtype), device
        self.models: dict[str, Any] = {}

    def versions(self) -> dict[str, Any]:
        from bench import machine

        return machine(self.device)

    def timed(self, step: Callable[[], Any]) -> dict[str, Any]:
        return timed(self.torch, self.device, step)

    def model(
        self, kind: str, classes: list[int] | None, layers: int | None = None, rank: int = RANK
    ) -> Any:
        """plain, or with adapters (kind is the method); the last two are kept."""
        key = f"{kind} {classes} {layers} {rank}"
        if key not in self.models:
            while len(self.models) > 1:
                self.models.pop(next(iter(self.models)))
            model = self.lib.Llama.from_pretrained(self.folder, self.dtype, self.device)
            if layers is not None:
                model.layers = model.layers[:layers]
            if classes:
                model.trim_head(classes)
            if kind != "plain":
                config = self.lib.AdapterConfig(method=kind, rank=rank, targets=tuple(TARGETS))
                self.lib.add_adapters(model, config)
                with self.torch.no_grad():
                    for adapter in self.lib.adapters(model).values():
                        adapter.B.normal_(std=0.01)
                model.optimiser = self.torch.optim.AdamW(
                    [p for p in model.parameters() if p.requires_grad], lr=LR
                )
            self.models[key] = model
        return self.models[key]

    def batch(self, rows: list[list[int]], classes: list[int]) -> Any:
        from scalabl_ref.core.objective import Batch

        torch = self.torch
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        labels = torch.arange(len(rows)) % len(classes)
        batch = Batch(tokens, lengths, labels, torch.arange(len(rows)), torch.tensor(classes))
        return batch.to(self.device)

    def forward(self, task: Task) -> dict[str, Any]:
        model = self.model("plain", None)
        tokens = self.torch.tensor(task["rows"], device=self.device)
        with self.torch.no_grad():
            return self.timed(lambda: float(model(tokens).abs().max()))

    def generate(self, task: Task) -> dict[str, Any]:
        from scalabl_ref.evaluation.generate import generate

        model = self.model("plain", None)
        return self.timed(lambda: [t.id for t in generate(model, task["rows"][0], task["count"])])

    def train(self, task: Task) -> dict[str, Any]:
        """One step of what `task["method"]` names, on the batch."""
        model = self.model(
            task["method"], task["classes"], task.get("layers"), task.get("rank", RANK)
        )
        batch = self.batch(task["rows"], task["classes"])

        def step() -> float:
            noise = self.lib.Noise(0, task["number"])
            result = self.lib.elbo(model, batch, noise, 1.0, EXAMPLES)
            result.loss.backward()
            model.optimiser.step()
            model.optimiser.zero_grad()
            return result.loss.item()

        return measured(self, model, task, step)

    def predict(self, task: Task) -> dict[str, Any]:
        model = self.model("scalabl", task["classes"], task.get("layers"), task.get("rank", RANK))
        batch = self.batch(task["rows"], task["classes"])
        return self.timed(
            lambda: self.lib.predict(model, batch, task["samples"]).probs.sum().item()
        )

    def subspace(self, task: Task) -> dict[str, Any]:
        """The linearised prediction of the subspace posterior of rank 8, from 1,000 draws."""
        from scalabl_ref.methods.point import to_points
        from scalabl_ref.methods.subspace import Subspace

        model = self.model("dropout", task["classes"])  # no other task uses this one
        batch = self.batch(task["rows"], task["classes"])
        if not hasattr(model, "posterior"):
            to_points(model)
            model.posterior = Subspace.fit(model, [batch], precision=1.0)

        def step() -> float:
            found = self.lib.predict(model, batch, 1000, posterior=model.posterior)
            return float(found.probs.sum())

        return self.timed(step)


# --- What people would use instead ----------------------------------------------------------------


class Peer:
    def __init__(self, folder: Path, official: Path | None, dtype: str, device: str) -> None:
        import peft
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, self.peft, self.transformers = torch, peft, transformers
        self.folder, self.official = folder, official
        self.dtype, self.device = getattr(torch, dtype), device
        self.models: dict[str, Any] = {}

    def versions(self) -> dict[str, Any]:
        found = {m.__name__: m.__version__ for m in (self.torch, self.transformers, self.peft)}
        return {**found, "threads": self.torch.get_num_threads()}

    def timed(self, step: Callable[[], Any]) -> dict[str, Any]:
        return timed(self.torch, self.device, step)

    def wrappers(self) -> Any:
        """The official wrappers' modules, without what the rest of their package imports."""
        if self.official is None:
            raise SystemExit("the official wrapper needs --official DIR")
        package = types.ModuleType("lorawrappers")
        package.__path__ = [str(self.official / "bayesadapt" / "lorawrappers")]
        sys.modules["lorawrappers"] = package
        return importlib.import_module("lorawrappers.scalabl").ScalablLoraWrapper

    def model(self, kind: str, classes: list[int] | None) -> Any:
        key = f"{kind} {classes}"
        if key in self.models:
            return self.models[key]
        self.models.clear()
        torch = self.torch
        model = self.transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.dtype, attn_implementation="sdpa"
        ).eval()
        if classes:  # as the official code does it
            size = model.config.hidden_size
            head = torch.nn.Linear(size, len(classes), bias=False, dtype=self.dtype)
            head.weight.data = model.lm_head.weight.detach()[classes].clone()
            model.config.tie_word_embeddings = False
            model.lm_head = head
        if kind != "plain":
            config = self.peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=0.0, bias="none"
            )
            model = self.peft.get_peft_model(model, config).train()
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.01)
        if kind == "scalabl":
            wrapper = self.wrappers()
            for name, module in list(model.named_modules()):
                if isinstance(module, self.peft.tuners.lora.LoraLayer):
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, wrapper(module))
        model.to(self.device)
        if kind != "plain":
            own = [p for p in model.parameters() if p.requires_grad]
            model.optimiser = torch.optim.AdamW(own, lr=LR)
            model.kl_optimiser = torch.optim.SGD(own, lr=1e-6)
        self.models[key] = model
        return model

    def inputs(self, rows: list[list[int]]) -> dict[str, Any]:
        """Padded on the left, as the official collator does."""
        width = max(map(len, rows))
        tokens = [[0] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        found = {"input_ids": self.torch.tensor(tokens), "attention_mask": self.torch.tensor(mask)}
        return {name: value.to(self.device) for name, value in found.items()}

    def logits(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Of the classes at the last token: body, then head, as the official trainer does it."""
        causal = model.base_model.model
        hidden = causal.model(**inputs, use_cache=False).last_hidden_state[:, -1]
        return causal.lm_head(hidden)

    def forward(self, task: Task) -> dict[str, Any]:
        model = self.model("plain", None)
        tokens = self.torch.tensor(task["rows"], device=self.device)
        with self.torch.no_grad():
            return self.timed(lambda: float(model(tokens, use_cache=False).logits.abs().max()))

    def generate(self, task: Task) -> dict[str, Any]:
        model = self.model("plain", None)
        tokens = self.torch.tensor(task["rows"], device=self.device)
        count = task["count"]
        model.generation_config.eos_token_id = None  # it may write it, and goes on

        def step() -> list[int]:
            out = model.generate(
                tokens, attention_mask=self.torch.ones_like(tokens), do_sample=False,
                max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
            return out[0, tokens.shape[1] :].tolist()

        return self.timed(step)

    def train(self, task: Task) -> dict[str, Any]:
        torch, classes = self.torch, task["classes"]
        model, inputs = self.model(task["method"], classes), self.inputs(task["rows"])
        labels = torch.arange(len(task["rows"]), device=self.device) % len(classes)

        def step() -> float:
            model.optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.logits(model, inputs), labels)
            loss.backward()
            model.optimiser.step()
            if task["method"] == "scalabl":
                model.kl_optimiser.zero_grad()
                parts = [
                    m.kl_div
                    for m in model.modules()
                    if hasattr(m, "sample") and hasattr(m, "base_layer")
                ]
                torch.stack(parts).sum().backward()
                model.kl_optimiser.step()
            return loss.item()

        return measured(self, model, task, step)

    def predict(self, task: Task) -> dict[str, Any]:
        """So many passes; the official wrapper draws in each, plain LoRA of peft repeats itself."""
        torch = self.torch
        model, inputs = self.model(task["method"], task["classes"]), self.inputs(task["rows"])
        model.eval()

        def step() -> float:
            with torch.inference_mode():
                each = [self.logits(model, inputs) for _ in range(task["samples"])]
                return torch.stack(each).softmax(-1).mean(0).sum().item()

        return self.timed(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "peer"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    side = {"ours": Ours, "peer": Peer}[args.side](
        args.folder, args.official, args.dtype, args.device
    )
    side.torch.set_num_threads(args.threads)
    print(json.dumps(side.versions()), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(getattr(side, task["do"])(task)), flush=True)


if __name__ == "__main__":
    main()
