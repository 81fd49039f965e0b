"""Write docs/one_step.md: every number of one training step, from tokens to AdamW's update.

    python tools/one_step.py [FILE]

`walk` computes the numbers in plain Python, with the noise of the slow reference. The words and the
equations stand in one_step_template.md. tests/test_one_step.py compares the numbers with a step of
the package's Trainer, and the page with the tool's output.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scalabl_ref import Noise, reference  # noqa: E402

PAGE = ROOT / "docs" / "one_step.md"
TEMPLATE = ROOT / "tools" / "one_step_template.md"

# A Llama without blocks: embedding, norm, and the adapted lm_head with the rows of three classes.
TOKENS, LENGTHS, LABELS, IDS = [[3, 1], [2, 0]], [2, 1], [2, 0], [7, 4]
EMBEDDING = [[0.0, 0.0, 0.0], [0.9, -0.4, 0.2], [-0.3, 0.8, 0.5], [0.1, 0.6, -0.7]]
NORM, RMS_EPS = [1.0, 0.9, 1.1], 1e-5
W = [[0.4, -0.2, 0.1], [0.0, 0.3, -0.5], [-0.6, 0.2, 0.3]]
TRAINED: dict[str, Any] = {
    "A": [[0.6, -0.3, 0.2], [-0.1, 0.5, 0.7]],
    "B": [[0.2, -0.4], [0.5, 0.1], [-0.3, 0.6]],
    "log_s": [-0.2, 0.3],
    "log_sigma": [-1.6, -0.9],
}
SEED, LAYER, STEP, STEPS = 2024, 7, 1, 4  # 7 is lm_head's number in the noise
DRAW, SCALING, PRIOR, BETA, N = 2**31 + STEP, 2.0, 1.0, 1.0, 10
LR = {"A": 0.01, "B": 0.01, "log_s": 0.04, "log_sigma": 0.04}
BETA1, BETA2, ADAM_EPS, DECAY = 0.9, 0.999, 1e-6, 0.1
M, V = 0.01, 0.0004  # AdamW's moments of every number, as an earlier step left them


def walk() -> dict[str, Any]:
    """Every number of the step by its symbol: floats, and lists of them, row by row."""
    n = forward()
    n.update(backward(n))
    for name, value in TRAINED.items():
        rate = LR[name] * n["factor"]
        n[f"m {name}"], n[f"v {name}"], n[f"new {name}"] = adamw(value, n[f"grad {name}"], rate)
    return n


def forward() -> dict[str, Any]:
    """Tokens to the loss."""
    rows, ranks = range(len(IDS)), range(len(TRAINED["log_s"]))
    e = [EMBEDDING[TOKENS[i][LENGTHS[i] - 1]] for i in rows]
    rms = [math.sqrt(dot(e[i], e[i]) / len(e[i]) + RMS_EPS) for i in rows]
    x = [[v / rms[i] * w for v, w in zip(e[i], NORM, strict=True)] for i in rows]
    key = [SEED % 2**32, SEED // 2**32]
    blocks = [reference.philox4x32([0, id, LAYER, DRAW], key) for id in IDS]
    words = [[f"{word:08x}" for word in block[:2]] for block in blocks]
    eps = [reference.eps_of_group(Noise(SEED, DRAW), LAYER, id, len(ranks)) for id in IDS]
    s, sigma = ([math.exp(v) for v in TRAINED[name]] for name in ("log_s", "log_sigma"))
    drawn = [[s[k] + sigma[k] * eps[i][k] for k in ranks] for i in rows]
    h = [[dot(TRAINED["A"][k], x[i]) for k in ranks] for i in rows]
    f = [[SCALING * drawn[i][k] for k in ranks] for i in rows]
    u = [[f[i][k] * h[i][k] for k in ranks] for i in rows]
    y = [[dot(w, x[i]) + dot(b, u[i]) for w, b in zip(W, TRAINED["B"], strict=True)] for i in rows]
    p = [[math.exp(v) / sum(map(math.exp, y[i])) for v in y[i]] for i in rows]
    each = [-math.log(p[i][LABELS[i]]) for i in rows]
    terms = [math.log(PRIOR / sigma[k]) + (sigma[k] ** 2 + s[k] ** 2) / (2 * PRIOR**2) - 0.5
             for k in ranks]  # fmt: skip
    nll, kl = sum(each) / len(each), sum(terms)
    return {"e": e, "rms": rms, "x": x, "words": words, "eps": eps, "s": s, "sigma": sigma,
            "drawn": drawn, "h": h, "f": f, "u": u, "y": y, "p": p, "each": each, "nll": nll,
            "terms": terms, "kl": kl, "loss": nll + BETA * kl / N}  # fmt: skip


def backward(n: dict[str, Any]) -> dict[str, Any]:
    """The gradients of the loss, from the logits back."""
    rows, ranks, classes = range(len(IDS)), range(len(n["s"])), range(len(W))
    A, B, s, sigma = TRAINED["A"], TRAINED["B"], n["s"], n["sigma"]
    g = [[(n["p"][i][c] - (c == LABELS[i])) / len(IDS) for c in classes] for i in rows]
    d = [[dot(column(B, k), g[i]) for k in ranks] for i in rows]
    dh = [[n["f"][i][k] * d[i][k] for k in ranks] for i in rows]
    ds = [[SCALING * n["h"][i][k] * d[i][k] for k in ranks] for i in rows]
    to_x = [[dot(column(W, j), g[i]) + dot(column(A, j), dh[i]) for j in range(len(W[0]))]
            for i in rows]  # fmt: skip
    to_s = [sum(ds[i][k] for i in rows) for k in ranks]
    to_sigma = [sum(ds[i][k] * n["eps"][i][k] for i in rows) for k in ranks]
    share = BETA / N
    return {
        "g": g, "d": d, "dh": dh, "ds": ds, "grad x": to_x, "grad s": to_s, "grad sigma": to_sigma,
        "grad A": [[sum(dh[i][k] * n["x"][i][j] for i in rows) for j in range(len(A[k]))]
                   for k in ranks],
        "grad B": [[sum(g[i][c] * n["u"][i][k] for i in rows) for k in ranks] for c in classes],
        "grad log_s": [s[k] * to_s[k] + share * s[k] ** 2 / PRIOR**2 for k in ranks],
        "grad log_sigma": [sigma[k] * to_sigma[k] + share * (sigma[k] ** 2 / PRIOR**2 - 1)
                           for k in ranks],
        "factor": (STEPS - STEP) / STEPS,
    }  # fmt: skip


def adamw(value: Any, gradient: Any, rate: float) -> tuple[Any, Any, Any]:
    """The new moments and the new value, number by number."""
    if isinstance(value, list):
        parts = [adamw(p, g, rate) for p, g in zip(value, gradient, strict=True)]
        m, v, after = (list(column) for column in zip(*parts, strict=True))
        return m, v, after
    m, v, t = BETA1 * M + (1 - BETA1) * gradient, BETA2 * V + (1 - BETA2) * gradient**2, STEP + 1
    corrected = (m / (1 - BETA1**t)) / (math.sqrt(v / (1 - BETA2**t)) + ADAM_EPS)
    return m, v, value * (1 - rate * DECAY) - rate * corrected


def dot(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def column(matrix: list[list[float]], j: int) -> list[float]:
    return [row[j] for row in matrix]


# --- The page ---------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A number with six digits, or a list of them; a text as it is."""
    if isinstance(value, list):
        return "(" + ", ".join(map(text, value)) + ")"
    return value if isinstance(value, str) else f"{value:.6g}"


def page() -> str:
    """The template with the numbers in it: <<h 0>> is the row 0 of h."""
    numbers = {**given(), **walk()}

    def value(match: re.Match) -> str:
        name, _, row = match[1].rpartition(" ")
        return text(numbers[name][int(row)] if row.isdigit() else numbers[match[1]])

    return re.sub(r"<<(.+?)>>", value, TEMPLATE.read_text(encoding="utf-8"))


def given() -> dict[str, Any]:
    tokens = [row[:length] for row, length in zip(TOKENS, LENGTHS, strict=True)]
    return {**TRAINED, "E": EMBEDDING, "w": NORM, "W": W, "c": SCALING, "prior": PRIOR,
            "beta": BETA, "N": N, "lr": LR["A"], "variational lr": LR["log_s"], "beta1": BETA1,
            "beta2": BETA2, "decay": DECAY, "m0": M, "v0": V, "seed": SEED, "layer": LAYER,
            "step": STEP, "steps": STEPS, "t": STEP + 1, "tokens": tokens, "id": IDS,
            "label": LABELS}  # fmt: skip


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
