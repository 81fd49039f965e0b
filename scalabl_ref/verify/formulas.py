"""A Llama, a training step and a prediction in plain formulas: float64 and autograd, no more.

The expected values of the conformance kit's larger levels come from here. It shares no line with
the model and the trainer of the package, but for the RoPE's angles: they are the config's, in
float32, and an input of these levels. `frequencies` computes them for the level of RoPE. `faults`
puts a wrong function in the place of a right one, so the functions here call each other by their
names in this module and in `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.noise import Noise
from ..model.config import LlamaConfig, RopeConfig
from . import reference

Weights = dict[str, Tensor]
Parameters = dict[str, Any]  # of a case, as the manifest has them
MIN_LOG_SIGMA = -20.0


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- The model --------------------------------------------------------------------------------


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    bias = w.get(f"{name}.bias")
    return x @ w[f"{name}.weight"].T + (0.0 if bias is None else bias)


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def head_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """q_norm and k_norm, of every head (..., h)."""
    return norm(w, name, x, eps)


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """x (B, T, heads, h), rotated as complex numbers x_i + i x_(i + h/2)."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * frequencies.double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, h / 2)
    z = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
    return torch.cat((z.real, z.imag), -1)


def kv_head(head: int, heads: int, kv_heads: int) -> int:
    """The head of k and v that a head of q reads."""
    return head * kv_heads // heads


def log_softmax(x: Tensor, partial: bool = False) -> Tensor:
    """partial: with the derivative of a constant normaliser.

    That derivative is the larger term of the true one, from which the other is subtracted. So it
    has the size of a gradient's rounding errors, where the gradient itself may cancel to nothing.
    """
    normaliser = x.logsumexp(-1, keepdim=True)
    return x - (normaliser.detach() if partial else normaliser)


def attention(
    q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor, partial: bool = False
) -> Tensor:  # (B, T, H, h), (B, T, K, h) twice, (h / 2,) -> (B, T, H h)
    """Head by head and query by query. partial: see `log_softmax`."""
    B, T, heads, size = q.shape
    q, k = rotate(q, frequencies), rotate(k, frequencies)
    rows = []
    for t in range(T):
        for head in range(heads):
            read = kv_head(head, heads, k.shape[2])
            keys, values = (x[:, : t + 1, read] for x in (k, v))  # (B, t + 1, h)
            scores = (keys @ q[:, t, head, :, None])[..., 0] / math.sqrt(size)
            rows.append((log_softmax(scores, partial).exp()[:, None] @ values)[:, 0])
    return torch.stack(rows, 1).reshape(B, T, heads * size)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def llama(
    w: Weights,
    config: LlamaConfig,
    tokens: Tensor,
    linear: Callable[[Weights, str, Tensor], Tensor] = linear,
    partial: bool = False,
) -> Tensor:
    """tokens (B, T) -> normed hidden states (B, T, D). linear: the function of a layer."""
    frequencies, eps = config.rope.inverse_frequencies(config.head_dim), config.rms_norm_eps
    x = w["embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        normed = norm(w, f"{attn}_norm", x, eps)
        q, k, v = (
            linear(w, f"{attn}.{part}_proj", normed).unflatten(-1, (-1, config.head_dim))
            for part in "qkv"
        )
        if config.qk_norm:
            q, k = head_norm(w, f"{attn}.q_norm", q, eps), head_norm(w, f"{attn}.k_norm", k, eps)
        x = x + linear(w, f"{attn}.o_proj", attention(q, k, v, frequencies, partial))
        normed = norm(w, f"{mlp}_norm", x, eps)
        inner = swiglu(*(linear(w, f"{mlp}.{part}_proj", normed) for part in ("gate", "up")))
        x = x + linear(w, f"{mlp}.down_proj", inner)
    return norm(w, "norm", x, eps)


def frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """The angle per token of each pair, (head_dim / 2,), pair by pair."""
    return tensor([frequency(pair, head_dim, rope) for pair in range(head_dim // 2)])


def frequency(pair: int, head_dim: int, rope: RopeConfig) -> float:
    found = rope.theta ** (-2 * pair / head_dim)
    if rope.kind == "linear":
        return found / rope.factor
    if rope.kind == "default":
        return found
    turns = rope.original_max_position_embeddings * found / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = min(1.0, max(0.0, (turns - low) / (high - low)))
    return keep * found + (1 - keep) * found / rope.factor


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """V^T (r, d_in) and the singular values (r,) of a matrix, which start an adapter."""
    _, singular, A = torch.linalg.svd(matrix, full_matrices=False)
    return A, singular


# --- The adapted model ------------------------------------------------------------------------


def class_logits(
    w: Weights,
    config: LlamaConfig,
    batch: Weights,
    leaves: Weights,
    scales: Weights,
    scaling: float,
    partial: bool = False,
    seen: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Logits (B, C) of a batch; (1) for the layers that `scales` has, s~ (B, r) by rows.

    The matrix of each row of the batch is written out. seen: gets x and y of every linear layer.
    """

    def adapted(w: Weights, name: str, x: Tensor) -> Tensor:
        y = linear(w, name, x)
        if name in scales:
            A, B = leaves[f"{name}.A"], leaves[f"{name}.B"]
            y = y + torch.stack(
                [x[b] @ (scaling * B @ torch.diag(scales[name][b]) @ A).T for b in range(len(x))]
            )
        if seen is not None:
            seen[name] = x, y
        return y

    hidden = llama(w, config, batch["tokens"], adapted, partial)
    last = torch.stack([hidden[b, n] for b, n in enumerate(last_places(batch))])
    return adapted(w, "lm_head", last[:, None])[:, 0]


def last_places(batch: Weights) -> list[int]:
    """The places of the last real tokens."""
    return [n - 1 for n in batch["lengths"].tolist()]


def group_ids(batch: Weights) -> list[int]:
    """The group of each row of the batch in the noise."""
    return batch["ids"].tolist()


def positive(log_value: Tensor) -> Tensor:
    """s of log_s, sigma of log_sigma."""
    return log_value.exp()


def drawn_scales(values: Weights, batch: Weights, noise: Noise | None, p: Parameters) -> Weights:
    """s~ = s + sigma eps of every adapted layer, (B, r) by rows."""
    out = {}
    for name, layer in p["layers"].items():
        ids = group_ids(batch)
        eps = tensor([reference.eps_of_group(noise, layer, id, p["rank"]) for id in ids])
        s, sigma = (positive(values[f"{name}.log_{part}"]) for part in ("s", "sigma"))
        out[name] = s + sigma * eps
    return out


# --- The training step ------------------------------------------------------------------------


def nll_and_gradients(
    config: LlamaConfig, w: Weights, batch: Weights, values: Weights, p: Parameters
) -> tuple[Tensor, Weights, Weights, float]:
    """The mean NLL, its gradient by every value, `partial` gradients, and the largest logit."""
    labels, places = batch["labels"], torch.arange(len(batch["labels"]))
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    scales = drawn_scales(leaves, batch, Noise(int(p["seed"]), p["draw"]), p)
    found = []
    for partial in (True, False):
        logits = class_logits(w, config, batch, leaves, scales, p["scaling"], partial)
        nll = mean_of_rows(-log_softmax(logits, partial)[places, labels])
        gradients = torch.autograd.grad(nll, list(leaves.values()), retain_graph=True)
        found.append(dict(zip(values, gradients, strict=True)))
    return nll.detach(), found[1], found[0], largest(logits.detach())


def mean_of_rows(nll: Tensor) -> Tensor:
    return nll.mean()


def divergence(values: Weights, p: Parameters) -> float:
    """The KL of all adapted layers."""
    slow = {"forward": reference.kl_forward, "official": reference.kl_official}[p["kl"]]
    pairs = [(values[f"{n}.log_s"].exp(), values[f"{n}.log_sigma"].exp()) for n in p["layers"]]
    return sum(slow(s, sigma, p["prior_std"]) for s, sigma in pairs)


def kl_gradients(values: Weights, kl: str, prior_std: float) -> Weights:
    """Derivatives of (5) or (6) by log_s and log_sigma, adapter by adapter, in closed form."""
    out, p2 = {}, prior_std**2
    for name in values:
        if name.endswith(".log_s"):
            width = name.replace("log_s", "log_sigma")
            s2, v2 = ((2 * values[n]).exp() for n in (name, width))
            out[name] = s2 / p2 if kl == "forward" else s2 / v2
            out[width] = v2 / p2 - 1 if kl == "forward" else 1 - (p2 + s2) / v2
    return out


def kl_share(p: Parameters) -> float:
    """The weight of the KL in the loss."""
    return p["beta"] / p["num_examples"] if p["objective"] == "elbo" else 0.0


def rate_of(name: str, p: Parameters) -> float:
    """AdamW's rate of a value at a step."""
    factor = reference.warmup(p["step"], p["steps"], p["warmup"])
    return factor * (p["variational_lr"] if ".log_" in name else p["lr"])


def adamw(
    value: Tensor, m: Tensor, v: Tensor, g: Tensor, rate: float, p: Parameters
) -> tuple[Tensor, Tensor, Tensor]:
    """The value and its moments after AdamW's step."""
    t, beta1, beta2 = p["step"] + 1, p["beta1"], p["beta2"]
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    denominator = (v / (1 - beta2**t)).sqrt() + p["adam_eps"]
    return value * (1 - rate * p["weight_decay"]) - rate * (m / (1 - beta1**t)) / denominator, m, v


def kl_move(values: Weights, p: Parameters, rows: int) -> Weights:
    """What the official objective's second step takes off the values."""
    if p["objective"] != "official":
        return {}
    factor = reference.warmup(p["step"], p["steps"], p["warmup"])
    weight = reference.kl_weight(p["step"], reference.kl_period(p["num_examples"], rows))
    gradients = kl_gradients(values, p["kl"], p["prior_std"])
    return {name: p["kl_lr"] * factor * weight * g for name, g in gradients.items()}


def bounded(values: Weights, p: Parameters) -> Weights:
    """log sigma is at least -20."""
    low = MIN_LOG_SIGMA
    return {n: v.clamp(min=low) if n.endswith("log_sigma") else v for n, v in values.items()}


def finish(values: Weights, p: Parameters, rows: int) -> Weights:
    """What follows AdamW's step: the official objective's second step, then the bound."""
    move = kl_move(values, p, rows)
    return bounded({n: v - move.get(n, 0.0) for n, v in values.items()}, p)


def next_step(p: Parameters) -> Parameters:
    return {**p, "step": p["step"] + 1, "draw": p["draw"] + 1}


def largest(t: Tensor) -> float:
    return float(t.abs().max())


def training_step(
    config: LlamaConfig, w: Weights, batch: Weights, state: Weights, p: Parameters
) -> tuple[dict[str, tuple[Tensor, Any]], Weights]:
    """One step: its outputs with the magnitudes behind them, and the values and moments after it.

    state: every value under its name, its moments under exp_avg.NAME and exp_avg_sq.NAME.
    """
    values = {n: v for n, v in state.items() if not n.startswith("exp_avg")}
    nll, gradients, partial, logits_size = nll_and_gradients(config, w, batch, values, p)
    kl, share = divergence(values, p), kl_share(p)
    of_kl = kl_gradients(values, p["kl"], p["prior_std"]) if share else {}
    gradients = {n: g + share * of_kl[n] if n in of_kl else g for n, g in gradients.items()}
    out: dict[str, tuple[Tensor, Any]] = {
        "nll": (nll, logits_size),
        "kl": (tensor(kl), kl),
        "loss": (nll + share * kl, 1 + share * kl),
    }
    after, moments = {}, {}
    for name, g in gradients.items():
        one, two = f"exp_avg.{name}", f"exp_avg_sq.{name}"
        after[name], moments[one], moments[two] = adamw(
            values[name], state[one], state[two], g, rate_of(name, p), p
        )
    final = finish(after, p, len(batch["ids"]))
    for name, g in gradients.items():
        one, two = f"exp_avg.{name}", f"exp_avg_sq.{name}"
        size, rate, v = max(map(largest, (g, partial[name]))), rate_of(name, p), moments[two]
        root = (v / (1 - p["beta2"] ** (p["step"] + 1))).sqrt() + p["adam_eps"]
        out[f"gradient.{name}"] = (g, size)
        moved = (final[name] - after[name]).abs()
        out[f"after.{name}"] = (final[name], final[name].abs() / 64 + rate * size / root + moved)
        out[f"after.{one}"] = (moments[one], moments[one].abs() + (1 - p["beta1"]) * size)
        out[f"after.{two}"] = (v, v + 2 * (1 - p["beta2"]) * size * g.abs())
    return out, {**final, **moments}


# --- Prediction -------------------------------------------------------------------------------


def draws_of(p: Parameters) -> list[Noise | None]:
    """Draws 0 to S - 1; no noise for S = 0."""
    return [Noise(int(p["seed"]), i) for i in range(p["samples"])] or [None]


def predicted_logits(
    config: LlamaConfig, w: Weights, batch: Weights, values: Weights, p: Parameters
) -> list[Tensor]:
    """Class logits (B, C) of every draw."""
    found = []
    for noise in draws_of(p):
        scales = drawn_scales(values, batch, noise, p)
        found.append(class_logits(w, config, batch, values, scales, p["scaling"]))
    return found


# --- Laplace in the subspace, (24) to (27), in dense algebra ----------------------------------


def kept_scales(values: Weights, layers: list[str] | Parameters) -> Tensor:
    """Which scales have an effect, in the order of the layers: their column of B is not 0."""
    return torch.cat([(values[f"{name}.B"] != 0).any(0) for name in layers])


def logits_under(
    scales: Tensor, config: LlamaConfig, w: Weights, batch: Weights, values: Weights, p: Parameters
) -> Tensor:
    """Class logits (B, C) with these scales of each example, (B, r layers)."""
    by_layer = dict(zip(p["layers"], scales.split(p["rank"], 1), strict=True))
    return class_logits(w, config, batch, values, by_layer, p["scaling"])


def jacobian(logits_of: Callable[[Tensor], Tensor], s: Tensor, rows: int) -> Tensor:
    """(B, C, r layers): derivatives of each example's logits by the scales."""
    found = torch.autograd.functional.jacobian(lambda s: logits_of(s.expand(rows, -1)), s)
    assert isinstance(found, Tensor)
    return found


def centred(J: Tensor) -> Tensor:
    """Without the mean over the classes."""
    return J - J.mean(1, keepdim=True)


def prior_std(precision: Tensor) -> Tensor:
    return precision.rsqrt()


def whitened(H: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) and eigenvectors (D, D) of Lambda^-1/2 H Lambda^-1/2, smallest first."""
    std = prior_std(precision)
    values, vectors = torch.linalg.eigh(std[:, None] * H * std)
    return values.clamp(min=0), vectors


def posterior_root(H: Tensor, precision: Tensor) -> Tensor:
    """R of (25): Lambda^-1/2 (I + Lambda^-1/2 H Lambda^-1/2)^-1/2, (D, D)."""
    found, U = whitened(H, precision)
    return prior_std(precision)[:, None] * ((U / (1 + found).sqrt()) @ U.T)


def normals(p: Parameters, ids: list[int], width: int) -> Tensor:
    """(S, B, width), of the groups `ids` in the layer of the parameters."""
    noises = [Noise(int(p["seed"]), draw) for draw in range(p["samples"])]
    return tensor(
        [[reference.eps_of_group(n, p["layer"], id, width) for id in ids] for n in noises]
    )


def moved_scales(s: Tensor, offset: Tensor) -> Tensor:
    """Drawn scales. They may be negative."""
    return s + offset


def curvature_of(probs: Tensor) -> Tensor:
    """(N, C, C): minus the second derivatives of the log-likelihood by the logits."""
    return torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]


def curvature(logits: Tensor, J: Tensor, labels: Tensor) -> Tensor:
    """H (D, D) of (24). The labels have no use in it."""
    return torch.einsum("nci,nck,nkj->ij", J, curvature_of(logits.softmax(-1)), J)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()


def penalty(scales: Tensor, precision: Tensor) -> Tensor:
    """What the prior takes off the log evidence, twice."""
    return (precision * scales.square()).sum()


def volume(H: Tensor, precision: Tensor) -> Tensor:
    """ln det(I + Lambda^-1/2 H Lambda^-1/2)."""
    return torch.logdet(torch.diag(precision) + H) - precision.log().sum()


def log_evidence(fit: float, H: Tensor, scales: Tensor, precision: Tensor) -> Tensor:
    """(26)."""
    return fit - (penalty(scales, precision) + volume(H, precision)) / 2


def free_shares(H: Tensor, precision: Tensor) -> Tensor:
    """(D, D): (I + Lambda^-1 H)^-1. Its diagonal has the share of a scale that data leave free."""
    return torch.linalg.inv(torch.eye(len(H)) + H / precision)


def best_precision(H: Tensor, scales: Tensor, one_hot: Tensor) -> Tensor:
    """lambda (G,) where the evidence is largest. one_hot (D, G): the group of each scale.

    MacKay's fixed point: lambda |s|^2 is the number of scales of the group that data determine.
    """
    squares, best = scales.square() @ one_hot, torch.ones(one_hot.shape[1]).double()
    for _ in range(10_000):
        found = (1 - free_shares(H, one_hot @ best).diagonal()) @ one_hot / squares
        moved, best = (found / best - 1).abs().max(), found
        if moved <= 4 * torch.finfo(torch.float64).eps:
            break
    return best


def logit_covariance(H: Tensor, precision: Tensor, J: Tensor, directions: int) -> Tensor:
    """J Sigma J^T (B, C, C), with the leading directions of H; the others have the prior's."""
    values, U = whitened(H, precision)
    values, U = values[-directions:], U[:, -directions:]
    inner = torch.eye(len(H)).double() - (U * (values / (1 + values))) @ U.T
    std = prior_std(precision)
    return J @ (std[:, None] * inner * std) @ J.mT


def symmetric_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.sqrt()[:, None]) @ vectors.mT


def drawn_logits(mean: Tensor, covariance: Tensor, eps: Tensor) -> Tensor:
    """(S, B, C): draws of the Gaussian logits."""
    return mean + torch.einsum("bcd,sbd->sbc", symmetric_root(covariance), eps)
