"""Monte Carlo dropout: the share that it keeps, and plain LoRA on what is kept."""

from __future__ import annotations

import torch

from scalabl_ref import AdapterConfig, Noise
from scalabl_ref.core.noise import Keys
from scalabl_ref.model.attach import Linear, add_adapters

from ..models import linear_layer
from ..stats import ZTest
from ..tolerances import rounding


def kept_inputs(seed: int, n: int) -> float:
    """Share of inputs that pass a layer which copies them, less 1 - p; by 30 columns a row."""
    model = torch.nn.ModuleDict({"q_proj": Linear(30, 30)})
    model["q_proj"].weight.data = torch.zeros(30, 30)
    config = AdapterConfig("dropout", rank=30, alpha=30.0, targets=("q_proj",), dropout=0.3)
    adapter = add_adapters(model, config)["q_proj"].adapter
    adapter.A.data = adapter.B.data = torch.eye(30)
    y = model["q_proj"](torch.ones(n // 30, 30), Keys(Noise(seed, 0)))
    scaled = torch.unique(y.detach())
    assert len(scaled) == 2 and scaled[0] == 0 and abs(scaled[1] * 0.7 - 1) < 1e-6
    return float((y > 0).double().mean()) - 0.7


KEPT = ZTest(
    "dropout: share kept", kept_inputs, n=120_000, sd=0.21**0.5, skew=-0.4 / 0.21**0.5, replay=3000
)


def test_dropout_keeps_the_share_it_should():
    KEPT.check(seed=1)


def test_dropout_is_plain_lora_on_thinned_inputs():
    linear, _ = linear_layer(2, method="dropout", dropout=0.4)
    plain, _ = linear_layer(2, method="mle")
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).double()
    ids = torch.tensor([8, 1])
    z = Noise(3, 4).normal(linear.adapter.layer, ids, 6).double()
    mask = (torch.special.ndtr(z) >= 0.4).double() / 0.6  # (2, 6): for all tokens of an example
    update = plain(x * mask[:, None], None) - (x * mask[:, None]) @ plain.weight.T
    expected = x @ linear.weight.T + update
    assert (linear(x, Keys(Noise(3, 4), ids)) - expected).abs().max() <= rounding(
        torch.float64, 200
    )
    assert torch.equal(linear(x, None), plain(x, None))
