"""What the official code does differently, each point with a number that shows it.

The numbers stand in docs/method.md, section "What the official code does differently"; the last
test here holds that they are these.
"""

from __future__ import annotations

import re

import pytest
import torch

from scalabl_ref import Noise, kl_forward, kl_official, subspace_lora_linear
from scalabl_ref.core.adapter import initial_matrix, initial_values
from scalabl_ref.data import Encoded, evaluation_batches
from scalabl_ref.evaluation import metrics
from scalabl_ref.training.schedule import kl_period, kl_weight, warmup_linear

from .conftest import ROOT
from .core.test_objective import TwoRows

S, SIGMA = torch.tensor([0.3, -0.4]).double().exp(), torch.tensor([0.05, 0.2]).double()


def direction() -> list[str]:
    """KL(p || q) for KL(q || p), at one point."""
    return [f"{float(kl(S, SIGMA, 1.0)):.4f}" for kl in (kl_official, kl_forward)]


def width() -> list[str]:
    """Mean sigma after the KL's own SGD steps, 5000 of batch 4 on 640 examples, and no data."""
    matrix, uniform = initial_matrix(0, 0, 8, 256)
    _, singular, Vh = torch.linalg.svd(matrix, full_matrices=False)
    start = initial_values(singular, Vh, uniform, 0.05)
    out, period = [], kl_period(640, 4)
    for kl in (kl_official, kl_forward):
        values = [start[name].clone().requires_grad_() for name in ("log_s", "log_sigma")]
        for step in range(5000):
            rate = 0.2 * warmup_linear(step, 5000, 0.06) * kl_weight(step, period)
            if rate > 1e-9:  # all but the last thirty or so of each round
                divergence = kl(values[0].exp(), values[1].exp(), 1.0)
                gradients = torch.autograd.grad(divergence, values)
                with torch.no_grad():
                    for value, gradient in zip(values, gradients, strict=True):
                        value -= rate * gradient
        out.append(f"{values[1].exp().mean().item():.2f}")
    return out


def shared_draw() -> list[str]:
    """Variance of the mean gradient of two like rows: one draw for both, over a draw each."""
    rows = TwoRows()
    rows.x = rows.x[:1].expand(2, 4)
    each = rows.gradients(rows.logits[:, :1].expand(-1, 2, -1))
    rows.mean = rows.weights @ each
    covariance = rows.covariance(each)
    return [f"{float(covariance.sum() / covariance.diagonal().sum()):.2f}"]


def mean_mode() -> list[str]:
    """Spread of ten predictions by "no noise": the official layer always draws."""
    g = torch.Generator().manual_seed(0)
    x, W, A, B = (torch.randn(*n, generator=g) for n in ((1, 4), (3, 4), (2, 4), (3, 2)))
    layer = (x, W, None, A, B, S.float(), SIGMA.float(), 2.0)
    drawn = torch.stack([subspace_lora_linear(*layer, Noise(0, i)) for i in range(10)])
    still = torch.stack([subspace_lora_linear(*layer, None) for _ in range(10)])
    return [f"{float(drawn.std(0).max()):.2f}", f"{float(still.std(0).max()):.2f}"]


def logged() -> list[str]:
    """NLL + KL, as logged, and NLL + KL / N, as optimised: NLL 0.5, 976 scales at the start."""
    total = 976 / 2 * float(kl_forward(torch.tensor([0.577] * 2), torch.tensor([0.043] * 2), 1.0))
    return [f"{0.5 + total:.0f}", f"{0.5 + total / 640:.2f}"]


def overflow() -> list[str]:
    """KL(p || q) at s = 1, log sigma = -44.5, in float32 and here."""
    s, log_sigma = torch.tensor([1.0]), torch.tensor([-44.5])
    single = log_sigma + (1 + s**2) / (2 * log_sigma.exp() ** 2) - 0.5
    return [f"{float(single):.1g}", f"{float(kl_official(s, log_sigma.double().exp(), 1.0)):.1e}"]


def half_logits() -> list[str]:
    """P(first) of the logits 8.03 and 8.00, rounded to bfloat16 and not."""
    logits = torch.tensor([8.03, 8.0])
    return [f"{float(x.float().softmax(0)[0]):.4f}" for x in (logits.bfloat16(), logits)]


def dropped() -> list[str]:
    """Examples scored of 10, in batches of 4: whole batches only, and all."""
    encoded = Encoded([[1]] * 10, [0] * 10, [1, 2])
    return ["8", str(sum(len(b.labels) for b in evaluation_batches(encoded, 4)))]


def confidence_one() -> list[str]:
    """ECE of three rows sure of themselves, one of them wrong: half-open bins, and ours."""
    probs, labels = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 1])
    confidence, edges = probs.amax(1), torch.linspace(0, 1, 16)
    inside = [(confidence >= a) & (confidence < b) for a, b in zip(edges, edges[1:], strict=False)]
    lost = sum(float(i.sum()) for i in inside) * 0.333
    return [f"{lost:.3f}", f"{metrics.ece(probs, labels):.3f}"]


def scale() -> list[str]:
    """(s, sigma) / 2 with 2 B is the same function; its KL is not the same."""
    return [f"{float(kl_forward(S / k, SIGMA / k, 1.0)):.4f}" for k in (1, 2)]


POINTS = {
    "KL direction": direction,
    "width": width,
    "shared draw": shared_draw,
    "mean model": mean_mode,
    "logged loss": logged,
    "overflow": overflow,
    "logits": half_logits,
    "last batch": dropped,
    "confidence 1": confidence_one,
    "scale": scale,
}


def rows() -> dict[str, list[str]]:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    section = text.split("## What the official code does differently")[1]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: re.findall(r"\*\*(.+?)\*\*", row[-1]) for row in cells}


@pytest.mark.parametrize("point", POINTS)
def test_the_number_in_the_documents_is_this_one(point):
    assert rows()[point] == POINTS[point]()


def test_every_point_has_a_number_or_says_where_it_is_tested():
    for point, numbers in rows().items():
        assert point in POINTS or not numbers, point
    assert set(POINTS) <= set(rows())
