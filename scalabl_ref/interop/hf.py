"""The project's adapters on a model of transformers, or on any module made of nn.Linear layers.

    attached = attach(model, AdapterConfig(rank=8))
    logits = attached(input_ids=ids, attention_mask=mask, noise=Noise(seed=0, draw=0)).logits

Such a model has no argument for a draw. The draw reaches the layers in a context variable that
`drawing` sets for one block and one thread, so that nothing of it stays in the model. Gradient
checkpointing runs layers again in the backward pass, after that block: a function that is run again
must carry its draw (`carrying`), else it is an error.

Only `trainer` imports transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, adapter_state, adapters
from ..core.config import TARGETS, AdapterConfig
from ..core.noise import FIRST_TRAINING_DRAW, Keys, Noise, token_groups
from ..core.objective import KL, complexity
from ..core.predictive import Prediction, predictive
from ..evaluation.predict import Draws
from ..model.attach import Linear as Adapted
from ..model.attach import layer_id, new_adapter
from ..support.errors import InputError
from ..support.files import atomic_write_text, make_folder, read_json
from ..support.tensors import check_names, load_tensors, save_tensors
from ..training.runs import load_adapter_state
from ..training.trainer import parameter_groups

if TYPE_CHECKING:
    from ..core.objective import Batch

__all__ = [
    "Attached",
    "Objective",
    "attach",
    "carrying",
    "drawing",
    "inputs",
    "kl",
    "layer_ids",
    "load",
    "predict",
    "save",
    "trainer",
]

# Noise ids of layers that a Llama does not have: this plus their place among the nn.Linear layers.
ELSEWHERE = 2**30
# Room for positions in a token's group id, where the model does not say how many it has.
POSITIONS = 2**16


# --- from the call to the layers: the draw --------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """The draw of one call of the model.

    given: the caller's group ids. ids: the ids of this call's rows, (B,) or (B, T); None: 0 .. B-1
    by row. B, T: its sequences and tokens. kept: how many tokens the head sees, 0 for all.
    """

    noise: Noise | None
    given: Tensor | None = None
    ids: Tensor | None = None
    B: int = 0
    T: int = 0
    kept: int = 0

    def groups(self, x: Tensor, layer: str) -> Tensor | None:
        """Group ids for the rows of a layer's input x (..., d_in); None: 0, 1, ... by row.

        x is (B, ...), or sequences and tokens are flattened, (B T, ...). Raises InputError naming
        the layer if it is neither.
        """
        ids, shape = self.ids, x.shape[:-1]
        if shape[:1] == (self.B,):
            if ids is None or ids.dim() == 1 or shape[:2] == (self.B, self.T):
                return ids
            if shape[1:2] == (self.kept,):
                return ids[:, -self.kept :]
        if shape[:1] == (self.B * self.T,):
            if ids is None:
                ids = torch.arange(self.B, device=x.device)
            return ids.reshape(-1) if ids.dim() == 2 else ids.repeat_interleave(self.T)
        raise InputError(
            f"layer {layer} has an input of shape {tuple(x.shape)}: its rows are not those "
            f'of {self.B} sequences of {self.T} tokens; sampling "batch" does not need them'
        )


_MEAN = _Call(None)
_CALL: ContextVar[_Call | None] = ContextVar("scalabl_ref.interop.hf.call", default=None)


@contextmanager
def _within(call: _Call) -> Iterator[None]:
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


@contextmanager
def drawing(noise: Noise | None, groups: Tensor | None = None) -> Iterator[None]:
    """Within the block, in its thread, attached models run under this draw.

    noise: None is the mean model, as outside of any such block. groups: int64 ids of the rows'
    draws, (B,), or of the tokens' draws, (B, T); None is 0 .. B-1 by row. For functions without an
    argument `noise`; with beam search, give all rows of an example the same id.
    """
    with _within(_Call(noise, groups)):
        yield


def carrying(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under the current draw, whenever and wherever it is called.

    Functions that transformers checkpoints become so by themselves. A model that calls torch's
    `checkpoint` must write checkpoint(hf.carrying(block), x).
    """
    return partial(_run, _CALL.get() or _MEAN, function)


def _run(call: _Call, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _within(call):
        return function(*args, **kwargs)


def _checkpoint(original: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    return original(carrying(function), *args, **kwargs)


def _carry_through_checkpoints(model: nn.Module) -> None:
    """Make the functions that a model of transformers checkpoints carry their draw."""
    for module in model.modules():
        found = vars(module).get("_gradient_checkpointing_func")
        if found and getattr(found, "func", None) is not _checkpoint:
            vars(module)["_gradient_checkpointing_func"] = partial(_checkpoint, found)


def _begin(sampling: str, span: int, model: nn.Module, args: Any, kwargs: Any) -> None:
    """Before the model's forward pass: complete the current draw by the ids of the call's rows.

    span: the number of positions in the group ids of token sampling.
    """
    if getattr(model, "_is_replica", False):
        raise InputError(
            "an attached model does not run under nn.DataParallel, whose threads have no draw: "
            "start one process for each device"
        )
    if model.training:
        _carry_through_checkpoints(model)
    call = _CALL.get()
    if call is None or call.noise is None or sampling == "batch":
        return
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    first = [given.get("input_ids"), given.get("inputs_embeds"), *given.values()]
    rows = next((t for t in first if isinstance(t, Tensor)), None)
    if rows is None:
        raise InputError("the model was called without a tensor: its rows are unknown")
    shape = rows.shape[:-1] if rows.is_floating_point() else rows.shape
    B, T = shape[0], shape[1:].numel()
    ids = call.given if call.given is None else call.given.to(rows.device)
    if ids is not None and tuple(ids.shape) not in ((B,), (B, T)):
        raise InputError(
            f"groups of shape {tuple(ids.shape)} for {B} sequences of {T} tokens: expected "
            f"{(B,)} or {(B, T)}"
        )
    if sampling == "token" and (ids is None or ids.dim() == 1):
        ids = torch.arange(B, device=rows.device) if ids is None else ids
        positions = _positions(given, T, rows.device, span).to(rows.device)
        ids = token_groups(ids[:, None], positions, span).expand(B, T)
    kept = given.get("logits_to_keep", 0)
    _CALL.set(replace(call, ids=ids, B=B, T=T, kept=kept if isinstance(kept, int) else 0))


def _positions(given: Mapping[str, Any], T: int, device: torch.device, span: int) -> Tensor:
    """Each token's position among its row's real tokens, cached ones included, (B or 1, T).

    Raises InputError if there may be more than `span` positions.
    """
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    cache = given.get("past_key_values", given.get("cache"))
    past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if past + T > span:
        raise InputError(f"{past + T} tokens, but the model has only {span} positions")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return ((mask != 0).long().cumsum(1) - 1).clamp(min=0)[:, -T:]
    if isinstance(positions, Tensor) and positions.dim() == 2:
        return positions[:, -T:]
    return torch.arange(past, past + T, device=device)[None]


def _in_backward() -> bool:
    """Whether autograd is calling, as it does when a checkpoint runs a function again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# --- layers --------------------------------------------------------------------------------------


class Linear(Adapted, nn.Linear):  # type: ignore[misc]  # one says Parameter, one Tensor
    """An nn.Linear with an adapter, under the draw of the call that it runs in.

    It takes the place of a layer and has the layer's own weight (d_out, d_in) and bias, so that
    tied weights stay tied.
    """

    label = ""  # the layer's name in its model

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        d_out, d_in = weight.shape
        nn.Linear.__init__(self, d_in, d_out, bias is not None, "meta")
        self.weight, self.bias = weight, bias  # type: ignore[assignment]  # both are Parameters
        self.adapter = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (..., d_in) -> (..., d_out). Raises InputError as `_Call.groups` does, or if run again
        by a checkpoint that does not carry the draw."""
        adapter, call = self.adapter, _CALL.get()
        if adapter is None or not adapter.random:
            return super().forward(x)
        if call is None and _in_backward():
            raise InputError(
                f"layer {self.label} is run again in the backward pass, where its draw is unknown: "
                "give checkpoint hf.carrying(function), not function"
            )
        call = call or _MEAN
        if call.noise is None:
            return super().forward(x)
        if adapter.config.sampling == "batch":
            return super().forward(x, Keys(call.noise))
        return super().forward(x, Keys(call.noise, call.groups(x, self.label)))


class Head(Linear):
    """An output layer cut down to a few rows: float32, whatever the base's dtype or autocast."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def layer_ids(model: nn.Module) -> dict[str, int]:
    """The noise id of each nn.Linear layer by name, whichever of them are adapted.

    A layer with one of Llama's names has the id that it has in this project's Llama. A layer with
    another name, or with an id that is taken, has ELSEWHERE plus its place among these layers.
    """
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    ids: dict[str, int] = {}
    taken = set()
    for place, name in enumerate(linears):
        target = name.rpartition(".")[2]
        layer = layer_id(name, target) if target in TARGETS else ELSEWHERE + place
        ids[name] = ELSEWHERE + place if layer in taken else layer
        taken.add(layer)
    return ids


def _chosen(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers to adapt, by name. Raises InputError as `attach` does."""
    chosen: dict[str, nn.Linear] = {}
    found = set()
    for name, module in model.named_modules():
        target = next((t for t in targets if name == t or name.endswith(f".{t}")), None)
        if target is None:
            continue
        if module is model:
            raise InputError("the model is one nn.Linear: put it into a module, as nn.Sequential")
        changed = ""
        if type(module) is nn.Linear and "forward" in vars(module):
            changed = " whose forward was replaced"
        elif any(value for key, value in vars(module).items() if key.endswith("_hooks")):
            changed = " with hooks, which are for after attaching"
        if type(module) is not nn.Linear or changed:
            raise InputError(
                f"layer {name} is a {type(module).__name__}{changed}, expected a plain nn.Linear"
            )
        chosen[name] = module
        found.add(target)
    missing = [target for target in targets if target not in found]
    if missing:
        raise InputError(f"the model has no layer named {' or '.join(missing)}")
    return chosen


# --- attaching -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Attached:
    """A model with adapters in its layers: the model that was given, changed in place.

    targets: names of the adapted layers. classes: token ids of the rows left in its head; None if
    the head is whole.
    """

    model: nn.Module
    config: AdapterConfig
    targets: tuple[str, ...]
    classes: tuple[int, ...] | None

    def __call__(
        self, *args: Any, noise: Noise | None = None, groups: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """What the model returns under the draw `noise`, as `drawing` says."""
        with drawing(noise, groups):
            return self.model(*args, **kwargs)

    def generate(
        self, *args: Any, noise: Noise | None = None, groups: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The model's `generate`, all tokens under one draw, as `drawing` says."""
        with drawing(noise, groups):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]


def attach(
    model: nn.Module,
    config: AdapterConfig,
    seed: int = 0,
    targets: Sequence[str] | Literal["all-linear"] | None = None,
    classes: Sequence[int] | None = None,
) -> Attached:
    """Freeze `model` and put a layer with an adapter in the place of each target, an nn.Linear.

    targets: layers' names, or the last parts of dotted names; None is config.targets.
        "all-linear" is every nn.Linear but the head.
    classes: token ids of the answers; the head is cut down to their rows, in this order, and gives
        their logits in float32. None leaves it whole.

    Parameters are on their layers' devices, and move with the model. Their initial values are a
    function of (seed, layer's id), see `layer_ids`; draws depend on the layer's id as well.

    Raises InputError, and leaves the model as it was, if it has adapters already, if a target is no
    plain nn.Linear (a Conv1D, a quantised layer, one with hooks), if none has its name, if the rank
    is larger than a dimension of a layer, or if a class is no row of the head.
    """
    if adapters(model):
        raise InputError("the model already has adapters")
    wanted = _names(model, config.targets if targets is None else targets)
    layers = _chosen(model, wanted)
    head, ids = _head(model), layer_ids(model)
    new: dict[nn.Module | None, Linear] = {}  # by the layers whose places they take
    if classes is not None:
        new[head] = _cut(head, classes)
    for name, module in layers.items():
        layer = new.setdefault(module, Linear(module.weight, module.bias))
        layer.label = name
        (d_out, d_in), place = layer.weight.shape, (ids[name], seed, module is head)
        layer.adapter = new_adapter(name, (d_out, d_in), config, *place, layer.weight.device)
        layer.train(module.training)
    model.requires_grad_(False)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])
    if classes is not None and hasattr(model, "config"):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    settings = getattr(model, "config", None)
    span = getattr(settings, "max_position_embeddings", None) or POSITIONS
    begin = partial(_begin, config.sampling, span)
    model.register_forward_pre_hook(begin, with_kwargs=True)
    return Attached(model, config, wanted, None if classes is None else tuple(classes))


def _names(model: nn.Module, targets: Sequence[str] | str) -> tuple[str, ...]:
    if targets == "all-linear":  # as PEFT has it
        head = _head(model)
        linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
        return tuple(linear)
    if isinstance(targets, str):
        raise InputError(f'targets must be a list of names, or "all-linear", not {targets!r}')
    return tuple(targets)


def _head(model: nn.Module) -> nn.Module | None:
    """The output layer of a model of transformers, else None."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def _cut(whole: nn.Module | None, classes: Sequence[int]) -> Head:
    """A head of the rows `classes` of another, in float32."""
    if type(whole) is not nn.Linear:
        raise InputError(f"the model's head is a {type(whole).__name__}, expected an nn.Linear")
    outside = [i for i in classes if not 0 <= i < len(whole.weight)]
    if outside or not classes:
        wrong = f"id {outside[0]} is outside" if outside else "there are no classes, of"
        raise InputError(f"{wrong} the head's {len(whole.weight)} ids")
    rows = list(classes)
    parts = (None if p is None else p.detach()[rows].float() for p in (whole.weight, whole.bias))
    return Head(*(None if p is None else nn.Parameter(p, requires_grad=False) for p in parts))


# --- objective and predictive --------------------------------------------------------------------


def kl(attached: Attached, kl: KL = "forward") -> Tensor:
    """The KL of all adapters, a float64 scalar in nats: `objective.complexity`."""
    return complexity(attached.model, kl)


@dataclass(frozen=True)
class Objective:
    """The project's objective on causal language modelling: NLL per label + beta * KL / N.

    Labels are those of transformers, (B, T): the label at t is the target of the logits at t - 1,
    and -100 means no label. num_examples: N, the number of labels in the training set. If each row
    has one label, as from `inputs`, N is the number of rows; with beta = 1 and the forward KL, -N
    times the objective is then the bound on the evidence.
    """

    attached: Attached
    num_examples: int
    beta: float = 1.0
    kl: KL = "forward"

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise InputError(f"num_examples must be at least 1, not {self.num_examples}")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise InputError(f"beta must be finite and not negative, and is {self.beta}")

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a batch, for compute_loss_func of a transformers Trainer; in evaluation mode
        only the NLL.

        num_items_in_batch: the number of labels in all batches of one optimiser step; None: in this
        batch. A batch's share of the KL is its share of the labels. Raises InputError without
        labels.
        """
        if labels is None:
            raise InputError("the batch has no labels")
        targets = labels[:, 1:].to(outputs.logits.device)
        logits = outputs.logits[:, : targets.shape[1]].float()
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        count = (targets != -100).sum()
        items = count if num_items_in_batch is None else num_items_in_batch
        if self.attached.model.training:
            divergence = complexity(self.attached.model, self.kl).to(nll)
            nll = nll + count * self.beta * divergence / self.num_examples
        return nll / items


def inputs(attached: Attached, batch: Batch) -> dict[str, Tensor]:
    """The arguments of a transformers model for a `data.Batch`, with labels.

    They are one column longer than the prompts: a row's label, the index of its class or, if the
    head is whole, its token id, is behind its last token. `predict` leaves the labels out.
    """
    tokens = F.pad(batch.tokens, (0, 1))
    mask = torch.arange(tokens.shape[1], device=tokens.device) < batch.lengths[:, None]
    labels = torch.full_like(tokens, -100)
    answers = batch.labels if attached.classes is not None else batch.classes[batch.labels]
    labels.scatter_(1, batch.lengths[:, None], answers[:, None])
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


@torch.no_grad()
def predict(
    attached: Attached,
    batch: Mapping[str, Tensor],
    samples: int = 10,
    seed: int = 0,
    groups: Tensor | None = None,
    classes: Sequence[int] | None = None,
) -> Prediction:
    """Predictive distribution over the answer classes at each row's last real token.

    batch: the model's arguments, such as a tokenizer gives. attention_mask may be 0 on either side;
    without it all tokens count. Draw i is Noise(seed, i), of a row by its id in `groups`; samples =
    0 is the mean model. classes: the answers' token ids, if the head is whole. The model predicts
    in evaluation mode and then returns to its mode.

    Raises InputError for negative `samples`, without classes, or if a row has no token.
    """
    if (classes is None) == (attached.classes is None):
        has = "no classes were given" if classes is None else "the head was cut down, and has them"
        raise InputError(f"predict needs the classes' token ids once: {has}")
    given: dict[str, Any] = {name: t for name, t in batch.items() if name != "labels"}
    B, T = given["input_ids"].shape
    accepted = inspect.signature(attached.model.forward).parameters
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"])) != 0
    last = torch.where(mask, torch.arange(T, device=mask.device), -1).amax(1)
    if bool((last < 0).any()):
        raise InputError(f"row {int(last.argmin())} of the batch has no token")
    if "position_ids" in accepted:
        given.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
    if "logits_to_keep" in accepted:
        given["logits_to_keep"] = T - int(last.min())
    parts = []
    with _evaluating(attached.model):
        for noise, _ in Draws(samples, seed).passes(attached.model):
            logits = attached(**given, noise=noise, groups=groups).logits
            chosen = logits[torch.arange(B, device=logits.device), last - T]  # from the end
            chosen = chosen if classes is None else chosen[:, list(classes)]
            parts.append(torch.log_softmax(chosen.double(), dim=-1))
    return predictive(torch.stack(parts))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; then every module returns to its mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- training ------------------------------------------------------------------------------------


def trainer(
    attached: Attached,
    num_examples: int,
    beta: float = 1.0,
    seed: int = 0,
    kl: KL = "forward",
    variational_lr: float | None = None,
    base: type | None = None,
    **options: Any,
) -> Any:
    """A transformers Trainer of `Objective(attached, num_examples, beta, kl)`.

    Every batch has its own draw, a function of `seed`, the step, the batch's place in that step,
    and the process. Evaluation uses the mean model. Widths are kept in bounds. variational_lr: as
    in TrainConfig; the other rate is args.learning_rate. base: the class to extend, by default
    transformers.Trainer. options: its other arguments.
    """
    import transformers

    loss = Objective(attached, num_examples, beta, kl)
    kind: Any = type("Trainer", (_Draws, base or transformers.Trainer), {})
    made = kind(model=attached.model, compute_loss_func=loss, **options)
    made.layers = list(adapters(attached.model).values())
    made.seed, made.variational_lr = seed, variational_lr
    return made


class _Draws:
    """Draws, two learning rates and bounds, for a transformers Trainer: its first base class.

    layers: the adapters. seed, variational_lr: as in `trainer`.
    """

    args: Any
    model: Any
    state: Any
    optimizer: Any
    layers: list[Adapter]
    seed: int
    variational_lr: float | None
    _at = (-1, -1)  # the current step, and the place of its latest batch

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        noise = Noise(self.seed, self._draw()) if model.training else None
        with drawing(noise):
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _draw(self) -> int:
        step, place = self.state.global_step, self._at[1] + 1
        self._at = step, place if step == self._at[0] else 0
        batch = step * self.args.gradient_accumulation_steps + self._at[1]
        return FIRST_TRAINING_DRAW + batch * self.args.world_size + self.args.process_index

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            kind, how = self.get_optimizer_cls_and_kwargs(  # type: ignore[attr-defined]
                self.args, self.model
            )
            groups = parameter_groups(self.layers, self.args.learning_rate, self.variational_lr)
            decay = {"weight_decay": self.args.weight_decay}
            self.optimizer = kind([{**group, **decay} for group in groups], **how)
        self.optimizer.register_step_post_hook(self._bound)
        return self.optimizer

    def _bound(self, *_: Any) -> None:
        for adapter in self.layers:
            adapter.bound_()


# --- on disk -------------------------------------------------------------------------------------


def save(attached: Attached, folder: Path | str) -> None:
    """Write the adapters, FOLDER/adapter.safetensors, and their settings, FOLDER/adapter.json.

    Each adapter is saved with the first row of the weight that it adapts: `load` knows the base by
    these rows.
    """
    folder = Path(folder)
    make_folder(folder)
    rows = {f"{name}.base": row.float() for name, row in _rows(attached.model).items()}
    tensors = {**adapter_state(attached.model), **rows}
    save_tensors(folder / "adapter.safetensors", tensors.items())
    record = {
        "adapter": dataclasses.asdict(attached.config),
        "targets": attached.targets,
        "classes": attached.classes,
    }
    atomic_write_text(folder / "adapter.json", json.dumps(record, indent=2) + "\n")


def load(model: nn.Module, folder: Path | str) -> Attached:
    """Attach the adapters that `save` wrote to `model`, the base.

    The base may be loaded in float32, bfloat16 or float16, now and when it was saved.

    Raises InputError if a file is missing or broken, or if the base is another one; `model` may
    have been changed then.
    """
    path = Path(folder) / "adapter.json"
    record = read_json(path)
    file = Path(folder) / "adapter.safetensors"
    tensors, _ = load_tensors(file)
    for key in ("adapter", "targets", "classes"):
        if key not in record:
            raise InputError(f"{path}: key {key!r} is missing")
    try:
        config = AdapterConfig(**record["adapter"])
        attached = attach(model, config, 0, record["targets"], record["classes"])
    except (TypeError, InputError) as error:
        raise InputError(f"{path}: {error}") from None
    rows = {f"{name}.base": row for name, row in _rows(model).items()}
    check_names(file, tensors, [*rows, *adapter_state(model)])
    if not all(_same(row, tensors.pop(name)) for name, row in rows.items()):
        raise InputError(f"{folder}: was trained on another base model")
    load_adapter_state(model, tensors, file)
    return attached


def _rows(model: nn.Module) -> dict[str, Tensor]:
    """The first row of every adapted layer's frozen weight, (d_in,), by the layer's name."""
    return {
        name: model.get_submodule(name).get_parameter("weight")[0].detach()
        for name in adapters(model)
    }


def _same(row: Tensor, saved: Tensor) -> bool:
    """Whether two rows can be the same one, each rounded to float32, bfloat16 or float16.

    bfloat16 rounds a value by at most half its eps, float16 also by half its smallest number. The
    tolerance is twice that.
    """
    half = torch.finfo(torch.float16)
    least, eps = half.smallest_normal * half.eps, torch.finfo(torch.bfloat16).eps
    row = row.float().cpu()
    return row.shape == saved.shape and torch.allclose(row, saved.float(), eps, least)
