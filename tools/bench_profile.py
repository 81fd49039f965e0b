"""Where the time of a training step goes, by part of the model, for `bench.py profile`.

The forward pass of every module is a named range of PyTorch's profiler. An operation of the
backward pass carries the number of the forward operation that made it, and so belongs to the range
of that one. Seconds are those of an operation without the operations that it calls. The profiler
adds some microseconds to each operation: read shares, and differences of large parts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

# The end of a module's name, in our model and in transformers with peft, and its part. A module
# that is not named belongs to the one around it; what a self-attention does itself is RoPE, but for
# the attention, and what an MLP does itself is SwiGLU.
MODULES = {
    r"(q|k|v)_proj$": "q, k, v",
    r"o_proj$": "o",
    r"(gate|up)_proj$": "gate, up",
    r"down_proj$": "down",
    r"lm_head$": "head",
    r"norm$": "RMSNorm",
    r"layers\.\d+\.(attn|self_attn)$": "RoPE and packing",
    r"layers\.\d+\.mlp$": "SwiGLU",
    r"rotary_emb$": "RoPE and packing",
}
OPERATIONS = {
    "scaled_dot_product": "attention",
    "Causal": "attention",
    "Rotation": "RoPE and packing",
}
RANGE = "part: "


def part_of(name: str) -> str | None:
    return next((part for end, part in MODULES.items() if re.search(end, name)), None)


def profiled(torch: Any, model: Any, steps: int, step: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a step by part: {part: [forward, backward]}, means over `steps`."""
    handles = []
    for name, module in model.named_modules():
        part = part_of(name)
        if part is not None:
            handles += _ranges(torch, module, part)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
    for handle in handles:
        handle.remove()
    return _by_part(profile.events(), steps)


def _ranges(torch: Any, module: Any, part: str) -> list[Any]:
    open_: list[Any] = []

    def enter(*_: Any) -> None:
        open_.append(torch.profiler.record_function(RANGE + part))
        open_[-1].__enter__()

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _by_part(events: Any, steps: int) -> dict[str, list[float]]:
    made: dict[int, str] = {}  # the number of a forward operation, and its part
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    late = []
    for event in events:
        chain = list(_ancestors(event))
        if any(e.name.startswith("autograd::engine") for e in chain):
            late.append((event, chain))
            continue
        part = _part(chain)
        if event.sequence_nr >= 0:
            made.setdefault(event.sequence_nr, part)
        if not event.name.startswith(RANGE):
            found[part][0] += event.self_cpu_time_total
    for event, chain in late:
        node = next(e for e in chain if e.name.startswith("autograd::engine"))
        part = _operation(chain) or made.get(node.sequence_nr, "everything else")
        found[part][1] += event.self_cpu_time_total
    return {part: [t / 1e3 / steps for t in times] for part, times in found.items()}


def _ancestors(event: Any) -> Any:
    while event is not None:
        yield event
        event = event.cpu_parent


def _operation(chain: list[Any]) -> str | None:
    return next(
        (part for event in chain for key, part in OPERATIONS.items() if key in event.name), None
    )


def _part(chain: list[Any]) -> str:
    ranges = (e.name.removeprefix(RANGE) for e in chain if e.name.startswith(RANGE))
    return _operation(chain) or next(ranges, "everything else")
