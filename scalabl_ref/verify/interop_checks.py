"""Checks of adapters that come from other programs or go there: PEFT, merged weights, the official
code's state, models that are not ours; and of the files below them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import SubspaceAdapter, adapters
from ..core.config import AdapterConfig
from ..core.layer import SAMPLING
from ..core.noise import FIRST_TRAINING_DRAW, Noise
from ..core.objective import Batch, class_logits, complexity
from ..interop import hf
from ..interop.exporting import Trained, export
from ..interop.importing import import_adapter, read_run, start_from
from ..interop.peft import read_peft
from ..methods import Ensemble, Swag
from ..model.attach import add_adapters
from ..model.config import LlamaConfig
from ..model.llama import Llama
from ..support import fields, files
from ..support.tensors import load_pickle, load_tensors, save_tensors
from ..training.runs import load_run, run_facts, save_run
from . import reference
from .check import Check, Errors, Op, exact, ratio, refused
from .file_checks import in_hugging_face, write_byte_tokenizer
from .method_checks import EPS, EPS_32, NEAR, draws, fill, normals
from .use_checks import SHAPE

SMALL = replace(SHAPE, num_hidden_layers=1)
WIDE = replace(SMALL, vocab_size=256)

# --- PEFT's settings ------------------------------------------------------------------------------

Q0, Q1 = (f"layers.{i}.attn.q_proj" for i in range(2))
UP1 = "layers.1.mlp.up_proj"
RANKS = {Q0: 2, Q1: 2, UP1: 4}
PLAIN_LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6,
              "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 4},
              "bias": "none"}  # fmt: skip
THIRD = {Q0: 3.0, Q1: 3.0, UP1: 1.5}
# Changes of adapter_config.json, the scaling of each layer, and similar layers that are left out.
PEFTS: list[tuple[dict[str, Any], dict[str, float], list[str]]] = [
    ({}, THIRD, []),
    ({"use_rslora": True}, {Q0: 6 / math.sqrt(2), Q1: 6 / math.sqrt(2), UP1: 3.0}, []),
    ({"alpha_pattern": {"layers.1.self_attn.q_proj": 10, "q_proj": 1}},
     {Q0: 0.5, Q1: 5.0, UP1: 1.5}, []),
    ({"alpha_pattern": {"proj": 1, "layers.1": 1, "down_proj|up_proj": 2.5}},
     {Q0: 3.0, Q1: 3.0, UP1: 0.625}, []),
    ({"target_modules": r".*\.(q|up)_proj"}, THIRD, []),
    ({"target_modules": "all-linear"}, THIRD, []),
    ({"layers_to_transform": [1]}, {Q1: 3.0, UP1: 1.5}, [Q0, "layers.0.mlp.up_proj"]),
    ({"layers_to_transform": 1, "layers_pattern": "layers"}, {Q1: 3.0, UP1: 1.5},
     [Q0, "layers.0.mlp.up_proj"]),
    ({"exclude_modules": ["layers.0.mlp.up_proj"]}, THIRD, ["layers.0.mlp.up_proj"]),
    ({"r": None, "lora_alpha": None, "rank_pattern": {}}, {UP1: 1.0}, []),
]  # fmt: skip
NO_PEFT: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora is set"), ({"bias": "all"}, "bias is 'all'"),
    ({"peft_type": "IA3"}, "peft_type"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"), ({"r": 3}, "expected (3, 8)"),
    ({"lora_alpha": 0}, "number above 0"), ({"target_modules": ["up_proj"]}, "does not choose"),
    ({"target_modules": r".*\.(q|up)_"}, "does not choose"),
    ({"rank_pattern": {"(": 4}}, "not a regular expression"), ({"r": 2.0}, "a whole number"),
]  # fmt: skip


def peft_settings(_: Op, device: torch.device) -> Errors:
    """Rank and scaling of each layer by patterns, rank-stabilised or not; layers chosen."""
    model = Llama(SHAPE, device=device).init_random_()

    def read(
        changes: dict[str, Any], layers: dict[str, int], more: dict[str, Tensor] | None = None
    ) -> Any:
        values = {k: v for k, v in {**PLAIN_LORA, **changes}.items() if v is not None}
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "adapter_config.json").write_text(json.dumps(values))
            tensors = {f"base_model.model.{in_hugging_face(n)}.lora_{side}.weight": value
                       for n, pair in lora_of(model, layers).items()
                       for side, value in zip("AB", pair, strict=True)}  # fmt: skip
            tensors |= {f"base_model.model.{n}": value for n, value in (more or {}).items()}
            save_tensors(Path(name) / "adapter_model.safetensors", tensors.items())
            return read_peft(Path(name), model)

    for changes, scalings, left_out in PEFTS:
        ranks = {name: RANKS[name] if changes.get("r", 2) else 8 for name in scalings}
        _file, found, without = read(changes, ranks)
        got = {name: adapter.config.scaling for name, adapter in found.items()}
        near = got.keys() == scalings.keys() and all(
            abs(got[n] - c) <= 4 * EPS * c for n, c in scalings.items()
        )
        yield exact(near and without == left_out, f"{changes}: {got}, without {without}")
        for name, (A, B) in lora_of(model, ranks).items():
            same = torch.equal(found[name].A.cpu(), A) and torch.equal(found[name].B.cpu(), B)
            yield exact(same, f"{changes}: values of {name}")
    for changes, words in NO_PEFT:
        yield refused(partial(read, changes, RANKS), words)
    rows = model.embed_tokens.weight
    name = "model.embed_tokens.weight"
    yield exact(len(read({}, RANKS, {name: rows})[1]) == 3, "the base's own embedding")
    wrong = (({name: rows + 1}, "trained as well"), ({name: rows[:9]}, "a vocabulary of 9"),
             ({"model.x": rows}, "is not of a LoRA"))  # fmt: skip
    for more, words in wrong:
        yield refused(partial(read, {}, RANKS, more), words)


def lora_of(model: Llama, ranks: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of layers, normals in float32."""
    found = {}
    for i, (name, rank) in enumerate(ranks.items()):
        d_out, d_in = cast(Tensor, model.get_submodule(name).weight).shape
        found[name] = draws(70 + i, rank, d_in).float(), draws(80 + i, d_out, rank).float()
    return found


# --- Exports --------------------------------------------------------------------------------------


def base_folder(folder: Path, config: LlamaConfig, device: torch.device) -> Llama:
    """A random base, and its folder as other programs write it."""
    folder.mkdir()
    model = Llama(config, device=device).init_random_(std=0.6)
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "float32"}))
    own = [(in_hugging_face(n), p) for n, p in model.named_parameters()]
    save_tensors(folder / "model.safetensors", own)
    write_byte_tokenizer(folder)
    return model


def asked(device: torch.device, classes: tuple[int, ...]) -> Batch:
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 0]])
    ids = torch.tensor([0, 1])
    return Batch(tokens, torch.tensor([4, 3]), ids, ids, torch.tensor(classes)).to(device)


def exports(_: Op, device: torch.device) -> Errors:
    """Means, draws, members and SWAG's draws, merged into weights: the logits of the run itself."""
    classes = (9, 3, 5)
    cases: list[tuple[bool, bool, dict[str, Any]]] = [
        (False, True, {}), (True, True, {"method": "mle"}), (True, False, {"method": "blob"}),
    ]  # fmt: skip
    for tied, cut, config in cases:
        with tempfile.TemporaryDirectory() as name:
            base = Path(name) / "base"
            model = base_folder(base, replace(SMALL, tie_word_embeddings=tied), device)
            whole = copy.deepcopy(model)
            model = model.trim_head(classes) if cut else model
            targets = ("q_proj", "up_proj", "lm_head")
            given = AdapterConfig(rank=2, alpha=3.0, targets=targets, sampling="batch", **config)
            add_adapters(model, given)
            fill(adapters(model).values(), 6)
            info = {"posterior": "swag", "train": {}}
            run = Trained(Path(name), model, info, None, base)
            noises: list[Noise | None] = [None]
            if config.get("method") != "mle":
                noises += [Noise(4, 0), Noise(4, 1)]
            yield exact(export(run, Path(name) / "mean", "hf") == ["."], "the folder of a mean")
            folders = [Path(name) / "mean"]
            if len(noises) > 1:
                names = export(run, Path(name) / "drawn", "hf", samples=2, seed=4)
                yield exact(names == ["sample-0", "sample-1"], f"folders of draws: {names}")
                folders += [Path(name) / "drawn" / n for n in names]
            batch = asked(device, classes)
            with torch.no_grad():
                for noise, folder in zip(noises, folders, strict=True):
                    merged = Llama.from_pretrained(folder, device=device)
                    got, right = (class_logits(m, batch, n) for m, n in
                                  ((merged, None), (model, noise)))  # fmt: skip
                    case = f"tied {tied}, cut {cut}, {config}, {noise}"
                    yield ratio(got, right, right.abs().max().expand_as(right), NEAR, case)
                    rest = [i for i in range(11) if not cut or i not in classes]
                    head = merged.lm_head.weight[rest], whole.lm_head.weight[rest]
                    yield exact(torch.equal(*head) == cut, f"other rows of the head, {case}")
                    stated = json.loads((folder / "config.json").read_text())
                    yield exact(not stated["tie_word_embeddings"], f"tied still, {case}")
            yield from halves(run, Path(name) / "half", folders[0]) if not tied else ()
            yield from posteriors_out(run, batch)


def halves(run: Trained, half: Path, mean: Path) -> Errors:
    """Merged weights that are rounded to bfloat16 once. mean: the folder of those in float32."""
    export(run, half, "hf", dtype=torch.bfloat16)
    exact_weights, _facts = load_tensors(mean / "model.safetensors")
    rounded, _facts = load_tensors(half / "model.safetensors")
    for n, value in rounded.items():
        off = (value.float() - exact_weights[n]).abs() <= exact_weights[n].abs() / 256
        yield exact(value.dtype == torch.bfloat16 and bool(off.all()), f"{n} in bfloat16")
    stated = json.loads((half / "config.json").read_text())["dtype"]
    yield exact(stated == "bfloat16", f"dtype stated: {stated}")
    yield refused(partial(export, run, half, "hf"), "exists already")


def posteriors_out(run: Trained, batch: Batch) -> Errors:
    """Members of an ensemble, and SWAG's mean and draws, as LoRAs: A' and B by hand."""
    states, swag = [], Swag()
    for seed in (11, 12, 13):
        fill(adapters(run.model).values(), seed)
        states.append({f"{n}.{k}": p.detach().clone() for n, a in adapters(run.model).items()
                       for k, p in a.named_parameters()})  # fmt: skip
        swag.collect(run.model)
    random = run.config.method != "mle"
    made = replace(run, posterior=Ensemble(states)).loras(5 if random else 3, 4)
    averaged = replace(run, posterior=swag)
    members = [(states[i % 3], Noise(4, i) if random else None) for i in range(len(made))]
    drawn = [(swag.mean, None), *((swag.draw(Noise(4, i)), None) for i in range(2))]
    makers = [*made, *averaged.loras(0, 4), *averaged.loras(2, 4)]
    for make, (state, noise) in zip(makers, [*members, *drawn], strict=True):
        lora = {name: (A.clone(), B.clone()) for name, (A, B) in make().items()}
        for name, adapter in adapters(run.model).items():
            for key, p in adapter.named_parameters():
                p.data = state[f"{name}.{key}"].to(p)
            same = torch.equal(lora[name][0], adapter.lora_A(noise).detach().float().cpu())
            yield exact(same, f"{run.config.method}: A' of {name}")
            rows = run.model.config.head_tokens if name == "lm_head" else None
            B = lora[name][1] if rows is None else lora[name][1][list(rows)]
            yield exact(torch.equal(B, adapter.B.detach().cpu()), f"B of {name}")


def there_and_back(_: Op, device: torch.device) -> Errors:
    """A run to PEFT and to a run again: the same mean, from a plain LoRA's singular values."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        model = base_folder(base, SHAPE, device)
        config = AdapterConfig(rank=3, alpha=4.5, targets=("v_proj", "down_proj"), sampling="batch")
        add_adapters(model, config)
        fill(adapters(model).values(), 6)
        info = {"train": {"kl": "forward", "lr": 0.25, "seed": 3}, "data": "/x/t.csv"}
        run = Trained(Path(name), model, info, None, base, "someone/base")
        export(run, Path(name) / "peft", "peft")
        page = (Path(name) / "peft" / "README.md").read_text()
        nats = f"{float(complexity(model).detach()):.6g} nats"
        facts = ("base_model: \"someone/base\"", "- rank, alpha: 3, 4.5\n", "- lr: 0.25\n",
                 f"- KL: forward, {nats}\n", "- targets: v_proj down_proj\n", "- data: t.csv\n",
                 "base_model_relation: adapter", "- seed: 3\n", "the mean of a scalabl run",
                 "prior: fixed, standard deviation 1\n", "without its uncertainty")  # fmt: skip
        for fact in facts:
            yield exact(fact in page, f"README.md lacks {fact!r}")
        for method in ("scalabl", "mle", "blob"):
            target = Path(name) / method
            told = import_adapter("peft", Path(name) / "peft", base, target, {"method": method},
                                  {"model": str(base)}, device=device)  # fmt: skip
            back, facts_back = load_run(target, device=device)
            own = facts_back.adapter
            right = (method, 3, 4.5, ["v_proj", "down_proj"])
            got = tuple(own[k] for k in ("method", "rank", "alpha")) + (list(own["targets"]),)
            yield exact(got == right and told["layers"] == 4, f"{method}: {own}")
            yield exact(facts_back.train["kl"] is None, f"{method}: {facts_back.train}")
            batch = asked(device, (9, 3, 5))
            with torch.no_grad():
                one, other = (class_logits(m, batch, None) for m in (back, model))
            size = other.abs().max().expand_as(other)
            yield ratio(one, other, size, 4 * NEAR, f"{method}: logits")
        yield refused(lambda: import_adapter("peft", Path(name) / "peft", base, target, {}, {}),
                      "exists already")  # fmt: skip
        yield from started(Path(name), model, device)


def started(folder: Path, model: Llama, device: torch.device) -> Errors:
    """A run as the start of another: all its values, or its mean; rows of a whole head."""
    base = partial(Llama, SHAPE, device=device)
    whole = base().init_random_(std=0.6)
    targets = ("q_proj", "lm_head")
    add_adapters(whole, AdapterConfig(rank=2, alpha=3.0, targets=targets))
    fill(adapters(whole).values(), 8)
    save_run(folder / "whole", whole, {"model": "the base"})
    about = json.dumps(SHAPE.to_dict(), sort_keys=True)
    own = dict(whole.named_parameters())
    first = [whole.norm.weight, *(own[f"layers.{i}.attn.q_proj.weight"][0] for i in range(2))]
    text = about + "".join(json.dumps(part.double().tolist()) for part in first)
    digest = hashlib.sha256(text.encode()).hexdigest()
    run = load_run(folder / "whole", model=base().init_random_(std=0.6))
    yield exact(run.facts.fingerprint == digest, "the base's digest")
    yield exact(not run.model.training, "in training mode")
    for classes in (None, (9, 3, 5)):
        for changes in ({}, {"rank": 3}, {"alpha": 5.0}, {"method": "mle"}):
            new = base().init_random_(std=0.6)
            new = new.trim_head(classes) if classes else new
            given: dict[str, Any] = {"rank": 2, "alpha": 3.0, "targets": targets, **changes}
            add_adapters(new, AdapterConfig(**given))
            start_from(new, read_run(folder / "whole", new), "whole")
            batch = asked(device, classes or (9, 3, 5))
            with torch.no_grad():
                for noise in (None, Noise(1, 2)) if not changes else (None,):
                    got, right = (class_logits(m, batch, noise) for m in (new, whole))
                    size = right.abs().max().expand_as(right)
                    yield ratio(got, right, size, 4 * NEAR, f"{classes}, {changes}, {noise}")
    other = Llama(replace(SHAPE, rms_norm_eps=1e-3), device=device).init_random_(std=0.6)
    yield refused(lambda: read_run(folder / "whole", other), "another base model")
    yield refused(lambda: load_run(folder / "whole", model=other), "is another model")


def official_states(_: Op, device: torch.device) -> Errors:
    """state_dict.pt of the official code: alpha 2 r, its names, the answers' rows of the head."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        base_folder(base, WIDE, device)
        forms: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
            "scalabl": ("lora_A.default.Vh", {"log_s": (2,), "log_s_sigma": (2,)}),
            "blob": ("lora_A.default.weight", {"lora_A_rho": (2, 8)}),
            "mle": ("lora_A.default.weight", {}),
        }
        ours = {"log_s_sigma": "log_sigma", "lora_A_rho": "G"}
        for method, (A, more) in forms.items():
            state, parts = dict[str, Tensor](), {}
            for i, (place, d_out) in enumerate((("model.layers.0.self_attn.v_proj", 4),
                                                ("lm_head", 3))):  # fmt: skip
                start = f"base_model.model.{place}"
                own = {"A": draws(10 + i, 2, 8).float(), "B": draws(20 + i, d_out, 2).float()}
                state |= {f"{start}.{A}": own["A"], f"{start}.lora_B.default.weight": own["B"]}
                for j, (part, shape) in enumerate(more.items()):
                    value = draws(30 + 10 * i + j, *shape).float()
                    state[f"{start}.lora_A.default.{part}"] = value
                    own[ours.get(part, part)] = value
                state[f"{start}.lora_A.default.log_p_mu"] = torch.zeros(2)
                parts["lm_head" if i else "layers.0.attn.v_proj"] = own
            file, target = Path(name) / f"{method}.pt", Path(name) / method
            torch.save(state, file)
            import_adapter("bayesadapt", file, base, target, {}, {"model": str(base)},
                           labels=["X", "b", "?"], device=device)  # fmt: skip
            facts = run_facts(target)
            made = "scalabl" if method == "mle" else method
            kl = {"scalabl": "official", "blob": "forward", "mle": None}[method]
            yield exact(facts.adapter["method"] == made, f"{method}: {facts.adapter}")
            yield exact(facts.train["kl"] == kl, f"{method}: {facts.train}")
            model, _facts = load_run(target, device=device)
            found = adapters(model)
            alphabet = {c: i for i, c in enumerate(letters_of_bytes())}
            tokens = [alphabet[c] for c in "Xb?"]
            yield exact(facts.head_tokens == tokens, f"{method}: tokens {facts.head_tokens}")
            yield exact(found.keys() == parts.keys(), f"{method}: layers {[*found]}")
            for place, own in parts.items():
                adapter = found[place]
                yield exact(adapter.config.scaling == 2.0, f"{method}: c of {place}")
                if method == "mle":
                    mean = (adapter.B.double() @ adapter.lora_A().double()).detach().cpu()
                    right = own["B"] @ own["A"]
                    size = own["B"].abs() @ own["A"].abs()
                    yield ratio(mean, right, size, 64 * EPS_32, f"B A of {place}")
                    continue
                for part, value in adapter.named_parameters():
                    same = torch.equal(value.detach().cpu(), own[part])
                    yield exact(same, f"{method}: {place}, {part}")
        yield refused(lambda: import_adapter("bayesadapt", file, base, Path(name) / "x", {}, {},
                                             labels=["X", "b"]), "3 answers")  # fmt: skip


def letters_of_bytes() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


# --- Models that are not ours ---------------------------------------------------------------------


class Two(nn.Module):
    """tokens (B, T) -> logits (B, T, 9), by two linear layers with biases and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.first, self.v_proj = nn.Linear(6, 5), nn.Linear(5, 4)
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.double()
        fill([self], 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = torch.tanh(self.first(self.embed(input_ids)))
        x = self.v_proj(x.flatten(0, 1)).unflatten(0, input_ids.shape)  # as in layers of experts
        return SimpleNamespace(logits=self.lm_head(x))


IDS = {"first": 2**30, "v_proj": 2, "lm_head": 7}  # of the layers' noise
TOKENS = torch.tensor([[3, 1, 4], [1, 5, 8]])


def by_hand(
    model: nn.Module, tokens: Tensor, noise: Noise | None, groups: Tensor, sampling: str, span: int
) -> Tensor:
    """Its logits, row by row: W x + b + c B diag(s + sigma eps) A x."""
    found = {name.removesuffix(".adapter"): a for name, a in adapters(model).items()}

    def layer(name: str, x: Tensor, group: int) -> Tensor:
        own = cast(nn.Linear, model.get_submodule(name))
        y = own.weight.double() @ x + (0 if own.bias is None else own.bias.double())
        if name not in found:
            return y
        a = cast(SubspaceAdapter, found[name])
        s, sigma = a.log_s.double().exp(), a.log_sigma.double().exp()
        eps = 0 if noise is None else normals(noise, IDS[name], group, len(s))
        return y + a.config.scaling * a.B.double() @ ((s + sigma * eps) * (a.A.double() @ x))

    rows = []
    for row, ids in enumerate(tokens.tolist()):
        for t, token in enumerate(ids):
            group = {"batch": 0, "example": int(groups[row])}.get(
                sampling, int(groups[row]) * span + t
            )
            x = cast(nn.Embedding, model.get_submodule("embed")).weight[token]
            x = torch.tanh(layer("first", x, group))
            rows.append(layer("lm_head", layer("v_proj", x, group), group))
    return torch.stack(rows).view(*tokens.shape, -1)


@torch.no_grad()
def other_models(_: Op, device: torch.device) -> Errors:
    """Adapters on any nn.Linear: draws row by row, cut heads, predictions; saved and loaded."""
    ids = hf.layer_ids(Two())
    yield exact(ids == IDS, f"noise ids {ids}")
    every = hf.attach(Two(), AdapterConfig(rank=2), targets="all-linear")
    yield exact(every.targets == ("first", "v_proj"), f"all linear layers: {every.targets}")
    few = hf.attach(Two(), AdapterConfig(rank=4), targets=["lm_head"], classes=(1, 2))
    yield exact(adapters(few.model)["lm_head"].B.shape == (2, 4), "rank 4 for two classes")
    yield from draws_of_a_trainer()
    groups = torch.tensor([7, 2])
    for sampling in SAMPLING:
        for classes in (None, (4, 0, 5)):
            config = AdapterConfig(rank=2, alpha=3.0, sampling=sampling)
            attached = hf.attach(Two(), config, targets=["first", "v_proj", "lm_head"],
                                 classes=classes)  # fmt: skip
            case, model = f"{sampling}, {classes}", attached.model
            right = Two().lm_head.weight[list(classes or range(9))]
            head = cast(Tensor, model.get_submodule("lm_head").weight)
            yield exact(torch.equal(head, right.to(head)), f"{case}: rows of the head")
            fill(adapters(model).values(), 9)
            near = 1e-5 if classes else 1e-12  # adapters and cut heads are float32
            for noise in (None, Noise(8, 3)):
                got = attached(TOKENS, noise=noise, groups=groups).logits.double()
                right = by_hand(model, TOKENS, noise, groups, sampling, 2**16)
                size = right.abs().max().expand_as(right)
                yield ratio(got, right, size, near + 1e-6, f"{case}, {noise}")
            plain = attached(TOKENS, noise=Noise(8, 3)).logits
            given = attached(TOKENS, noise=Noise(8, 3), groups=torch.arange(2)).logits
            yield exact(torch.equal(plain, given), f"{case}: ids by row")
            padded, seen = F.pad(TOKENS[:1], (2, 0)), torch.tensor([[0, 0, 1, 1, 1]])
            alone = attached(TOKENS[:1], noise=Noise(8, 3), groups=groups[:1]).logits
            got = attached(padded, attention_mask=seen, noise=Noise(8, 3), groups=groups[:1])
            size = alone.abs().max().expand_as(alone)
            yield ratio(got.logits[:, 2:], alone, size, 1e-6, f"{case}: padded on the left")
            own = [a.scale() for a in adapters(model).values() if isinstance(a, SubspaceAdapter)]
            divergence = sum(reference.kl_forward(s, sigma, 1.0) for s, sigma in own)
            yield abs(float(hf.kl(attached)) - divergence) / (1e-6 * divergence)
            mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
            asked_for = {} if classes else {"classes": [4, 0, 5]}
            found = hf.predict(attached, {"input_ids": TOKENS, "attention_mask": mask}, 3, 8,
                               groups, **asked_for)  # fmt: skip
            each = [by_hand(model, TOKENS, Noise(8, i), groups, sampling, 2**16) for i in range(3)]
            last = torch.stack([logits[[0, 1], [2, 1]] for logits in each])
            last = last if classes else last[..., [4, 0, 5]]
            mean = torch.tensor(reference.predictive(last)["probs"], dtype=torch.float64)
            yield ratio(found.probs, mean, torch.ones_like(mean), 1e-5, f"{case}: predicted")
            yield from objective_of(attached, divergence, case)
            with tempfile.TemporaryDirectory() as name:
                hf.save(attached, name)
                back = hf.load(Two(), name)
                same = [m(TOKENS, noise=Noise(8, 3)).logits for m in (back, attached)]
                yield exact(torch.equal(*same), f"{case}: saved and loaded")
                other = Two()
                other.first.weight.data *= 1.1
                yield refused(partial(hf.load, other, name), "another base model")


def draws_of_a_trainer() -> Errors:
    """A draw of its own for each batch of each process: two batches a step, process 1 of 3."""
    run: Any = hf._Draws()
    run.args = SimpleNamespace(gradient_accumulation_steps=2, world_size=3, process_index=1)
    found = []
    for step in (0, 0, 1, 1, 2):
        run.state = SimpleNamespace(global_step=step)
        found.append(run._draw() - FIRST_TRAINING_DRAW)
    yield exact(found == [1, 4, 7, 10, 13], f"draws of a trainer: {found}")


def objective_of(attached: hf.Attached, divergence: float, case: str) -> Errors:
    """NLL per label + beta KL / N of labels that are shifted by one; the inputs of a batch."""
    classes = attached.classes or (4, 0, 5)
    batch = Batch(TOKENS, torch.tensor([3, 2]), torch.tensor([2, 0]), torch.arange(2),
                  torch.tensor(classes))  # fmt: skip
    made = hf.inputs(attached, batch)
    answers = [2, 0] if attached.classes else [5, 4]
    labels = [[-100] * 3 + answers[:1], [-100] * 2 + answers[1:] + [-100]]
    yield exact(made["labels"].tolist() == labels, f"{case}: labels {made['labels']}")
    yield exact(made["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]], f"{case}: mask")
    outputs = attached(made["input_ids"])
    log_p = outputs.logits.double().log_softmax(-1)
    nll = -float(log_p[0, 2, answers[0]] + log_p[1, 1, answers[1]])
    loss = hf.Objective(attached, 50, beta=0.5)
    for training, items in ((True, None), (True, 8), (False, None)):
        attached.model.train(training)
        right = nll + (2 * 0.5 * divergence / 50 if training else 0)
        right /= items or 2
        got = float(loss(outputs, made["labels"], items))
        yield abs(got - right) / (1e-5 * right)
    attached.model.eval()


# --- Files ----------------------------------------------------------------------------------------

TYPES = {"n": int, "x": float | None, "t": str, "some": list[float], "kind": Literal["a", "b"],
         "facts": dict[str, int], "yes": bool, "any": Any}  # fmt: skip
GOOD: dict[str, Any] = {"n": 3, "x": 2, "t": "a", "some": [1, 2.5], "kind": "b",
                        "facts": {"k": 1}, "yes": False, "any": [None]}  # fmt: skip
BAD: list[tuple[str, Any]] = [
    ("n", True), ("n", 2.0), ("n", 2**63), ("x", math.inf), ("x", "2"), ("x", True), ("t", None),
    ("some", [1, "2"]), ("some", 3), ("kind", "c"), ("facts", {"k": 1.5}), ("yes", 1),
    ("new", 1),
]  # fmt: skip


def files_and_fields(_: Op, device: torch.device) -> Errors:
    """Fields of JSON by their types; files that are whole or not there; safe pickles."""
    fields.check(GOOD, TYPES)
    fields.check({"x": None}, TYPES)
    for name, value in BAD:
        words = f"in: {'unknown field ' if name == 'new' else ''}"
        yield refused(partial(fields.check, {name: value}, TYPES, "in: "), words)
    value = {"a": [1.5, math.nan, (math.inf, "\u00fc")], "b": {"c": -math.inf, "d": 0}}
    text = fields.json_text(value)
    right = {"a": [1.5, None, [None, "\u00fc"]], "b": {"c": None, "d": 0}}
    yield exact(json.loads(text) == right, f"as JSON: {text}")
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), bytes(range(256)) * 5000
        path = folder / "a.json"
        path.write_bytes(data)
        sizes = list[int]()
        same = files.sha256(path, sizes.append) == hashlib.sha256(data).hexdigest()
        yield exact(same and sum(sizes) == len(data), "SHA-256")
        files.copy_file(path, folder / "b")
        yield exact((folder / "b").read_bytes() == data, "a copy")
        path.write_bytes(b'\xef\xbb\xbf{"k": 1}')
        yield exact(files.read_json(path) == {"k": 1}, "a byte order mark")
        with suppress(KeyError), files.atomic_write(path) as file:
            file.write(b"half")
            raise KeyError
        yield exact(path.read_bytes() == b'\xef\xbb\xbf{"k": 1}', "half of a file")
        files.atomic_write_texts({path: "\u00fc\n", folder / "c": "d"})
        yield exact(path.read_bytes() == b"\xc3\xbc\n", "text as UTF-8")
        with files.open_log(folder / "log") as log, files.open_log(folder / "log") as second:
            log.write("one\n")
            second.write("two\n")
            yield exact((folder / "log").read_bytes() == b"one\ntwo\n", "lines are written at once")
        with suppress(KeyError), files.new_folder(folder / "new") as made:
            (made / "x").touch()
            raise KeyError
        left = sorted(p.name for p in folder.iterdir())
        yield exact(left == ["a.json", "b", "c", "log"], f"files left: {left}")
        for content, words in ((b"[1]", "found list"), (b"{", "not JSON"), (b"\xff", "not JSON")):
            path.write_bytes(content)
            yield refused(lambda: files.read_json(path), words)
        torch.save({"t": Path("x")}, path)
        yield refused(lambda: load_pickle(path), "only tensors and plain containers")
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        yield refused(lambda: files.read_json(path), "git lfs pull")


INTEROP_CHECKS = [
    Check("PEFT's settings", "rank and scaling by patterns; layers chosen", peft_settings),
    Check("exports", "means, draws, members, merged: the run's logits", exports),
    Check("there and back", "a run as PEFT's folder, and as a start", there_and_back),
    Check("official states", "state_dict.pt: names, alpha = 2 r, the head", official_states),
    Check("other models", "(1), (8) adapters on any nn.Linear, row by row", other_models),
    Check("files and fields", "types of JSON, whole files, safe pickles", files_and_fields),
]
