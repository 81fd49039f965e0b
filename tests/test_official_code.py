"""This package's column of the table "What the official code does differently" in docs/method.md.

`tests/peer/test_bayesadapt.py` computes the official code's columns, by running it.
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

S, SIGMA = torch.tensor([0.3, -0.4]).double().exp(), torch.tensor([0.05, 0.2]).double()
STEPS, N = 5000, 640  # of the published schedules: steps of batch 4, Winogrande-S
BLOCKS = [3584] * (2 * 28 + 1)  # inputs of Qwen2.5-7B's q_proj, v_proj and lm_head
COLUMNS = ("ef51e8a", "3843000", "here")


def start(layer: int, d_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log_s and log_sigma of a layer of rank 8, as training begins."""
    matrix, uniform = initial_matrix(0, layer, 8, d_in)
    _, singular, Vh = torch.linalg.svd(matrix, full_matrices=False)
    values = initial_values(singular, Vh, uniform, 0.05)
    return values["log_s"], values["log_sigma"]


def direction() -> list[str]:
    """KL(q || p) at one point."""
    return [f"{float(kl_forward(S, SIGMA, 1.0)):.4f}"]


def width() -> list[str]:
    """Mean sigma after the steps of the KL alone, without data: KL(p || q), KL(q || p)."""
    out, period = [], kl_period(N, 4)
    for kl in (kl_official, kl_forward):
        values = [value.clone().requires_grad_() for value in start(0, 256)]
        for step in range(STEPS):
            rate = 0.2 * warmup_linear(step, STEPS, 0.06) * kl_weight(step, period)
            if rate > 1e-9:  # all but the last thirty or so of each round
                divergence = kl(values[0].exp(), values[1].exp(), 1.0)
                gradients = torch.autograd.grad(divergence, values)
                with torch.no_grad():
                    for value, gradient in zip(values, gradients, strict=True):
                        value -= rate * gradient
        out.append(f"{values[1].exp().mean().item():.2f}")
    return out


def layer() -> tuple:
    """Arguments of a layer for two equal rows."""
    g = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*n, generator=g) for n in ((3, 4), (2, 4), (3, 2)))
    return torch.ones(2, 4), W, None, A, B, S.float(), SIGMA.float(), 2.0


def shared_draw() -> list[str]:
    """Largest difference between the outputs of two equal rows of a batch."""
    y = subspace_lora_linear(*layer(), Noise(0, 0))
    return [f"{float((y[0] - y[1]).abs().max()):.2f}"]


def mean_model() -> list[str]:
    """Largest standard deviation of an output over ten passes of the mean model."""
    still = torch.stack([subspace_lora_linear(*layer(), None) for _ in range(10)])
    return [f"{float(still.std(0).max()):.2f}"]


def logged() -> list[str]:
    """KL(q || p) of Qwen2.5-7B's layers at the start, and the share of it in the loss."""
    values = [start(layer, d_in) for layer, d_in in enumerate(BLOCKS)]
    total = sum(float(kl_forward(s.exp(), sigma.exp(), 1.0)) for s, sigma in values)
    return [f"{total:,.0f}", f"{total / N:.2f}"]


def first_rate() -> list[str]:
    """Factors on the rates of the NLL's and the KL's first step; the latter without pi."""
    return [f"{warmup_linear(0, STEPS, 0.06):.4f}"] * 2


def overflow() -> list[str]:
    """KL(p || q) at s = 1, log sigma = -44.5."""
    sigma = torch.tensor([-44.5]).double().exp()
    return [f"{float(kl_official(torch.tensor([1.0]), sigma, 1.0)):.1e}"]


def half_logits() -> list[str]:
    """P(first) of the logits 8.03 and 8.00."""
    return [f"{float(torch.tensor([8.03, 8.0]).softmax(0)[0]):.4f}"]


def some_answers(rows: int = 3268) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two classes, in bfloat16, and labels drawn from their softmax.

    As many as the whole batches of 4 of BoolQ's validation set.
    """
    g = torch.Generator().manual_seed(0)
    margin = 3 * torch.randn(rows, generator=g)
    labels = (torch.rand(rows, generator=g) < margin.sigmoid()).long()
    return torch.stack((torch.zeros(rows), margin), 1).bfloat16(), labels


def scores() -> list[str]:
    """NLL and ECE of `some_answers`."""
    logits, labels = some_answers()
    probs = logits.double().softmax(1)
    return [f"{score(probs, labels):.4f}" for score in (metrics.nll, metrics.ece)]


def last_batch() -> list[str]:
    """Examples scored of 10, in batches of 4."""
    encoded = Encoded([[1]] * 10, [0] * 10, [1, 2])
    return [str(sum(len(b.labels) for b in evaluation_batches(encoded, 4)))]


def scale() -> list[str]:
    """KL(q || p) of (s, sigma) and of (s, sigma) / 2."""
    return [f"{float(kl_forward(S / k, SIGMA / k, 1.0)):.4f}" for k in (1, 2)]


POINTS = {
    "KL direction": direction,
    "width": width,
    "shared draw": shared_draw,
    "mean model": mean_model,
    "logged loss": logged,
    "first step": first_rate,
    "overflow": overflow,
    "logits": half_logits,
    "scores": scores,
    "last batch": last_batch,
    "scale": scale,
}


def numbers() -> dict[str, dict[str, list[str]]]:
    """Point of the table -> column -> what is bold there."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    section = text.split("## What the official code does differently")[1].split("\n### ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(cells[0][2:]) == COLUMNS
    return {
        row[0]: {
            column: re.findall(r"\*\*(.+?)\*\*", cell)
            for column, cell in zip(COLUMNS, row[2:], strict=True)
        }
        for row in cells[1:]
    }


@pytest.mark.parametrize("point", POINTS)
def test_the_number_in_the_documents_is_this_one(point):
    assert numbers()[point]["here"] == POINTS[point]()


def test_no_other_number_is_claimed_here():
    assert {point for point, row in numbers().items() if row["here"]} == set(POINTS)
