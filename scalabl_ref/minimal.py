"""The whole method in one listing, to be read from top to bottom.

Bracketed numbers are equations of docs/method.md; steps are those of docs/conformance.md. Tests
hold every part equal to the package. `python -m scalabl_ref.minimal` trains a small network.
"""

import math

import torch
from torch import Tensor, nn

WORD = 2**32
Noise = tuple[int, int] | None  # (seed, draw), or None for the mean model


def philox4x32(counter: tuple, key: tuple[int, int], rounds: int = 10) -> list[int]:
    """Step 1: four 32-bit words, a function of four counter words and two key words."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (q // WORD) ^ c1 ^ k0, q % WORD, (p // WORD) ^ c3 ^ k1, p % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def normal(seed: int, draw: int, layer: int, groups: list[int], rank: int) -> Tensor:
    """Standard normals eps (G, rank) float32, each within (1/2 + 2^-25) ulp of the exact value."""
    eps: list[float] = []
    for group in groups:
        for j in range((rank + 3) // 4):
            w = philox4x32((j, group, layer, draw), (seed % WORD, seed // WORD))
            for a, b in (w[:2], w[2:]):
                radius = math.sqrt(-2 * math.log((a + 0.5) / WORD))  # step 2
                quarter = (b + 2**29) // 2**30  # step 3: the nearest quarter turn
                x = (b - quarter * 2**30) * math.pi / 2**31
                c, s = math.cos(x), math.sin(x)  # step 4
                cos, sin = ((c, s), (-s, c), (-c, -s), (s, -c))[quarter % 4]
                eps += [radius * cos, radius * sin]
    return torch.tensor(eps, dtype=torch.float32).view(len(groups), -1)[:, :rank]  # step 5


class Adapted(nn.Module):
    """A frozen nn.Linear with an adapter; `layer` is its number in the noise, c = alpha / rank."""

    def __init__(self, base: nn.Linear, layer: int, rank: int, c: float = 2.0, seed: int = 0):
        super().__init__()
        self.base, self.layer, self.c = base.requires_grad_(False), layer, c
        d_in, words = base.in_features, []
        for j in range((rank * d_in + rank + 3) // 4):
            words += philox4x32((j, layer, WORD - 1, 2**30), (seed % WORD, seed // WORD))
        u = (torch.tensor(words, dtype=torch.float64) + 0.5) / WORD
        start, widths = u[: rank * d_in].view(rank, d_in), u[rank * d_in :][:rank]
        _, S, Vh = torch.linalg.svd((2 * start - 1) / math.sqrt(d_in), full_matrices=False)
        sigma = 0.05 * (0.5**0.5 + (1 - 0.5**0.5) * widths)
        self.A = nn.Parameter(Vh.float())  # (r, d_in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))  # (d_out, r)
        self.log_s, self.log_sigma = (nn.Parameter(v.log().float()) for v in (S, sigma))  # (r,)

    def forward(self, x: Tensor, noise: Noise, groups: list[int]) -> Tensor:
        """x (N, d_in) -> (N, d_out); rows with the same group have the same draw."""
        drawn = self.log_s.exp()  # (2): s~ = s + sigma eps
        if noise is not None:
            eps = normal(*noise, self.layer, groups, len(drawn)).to(x)  # (N, r)
            drawn = drawn + self.log_sigma.exp() * eps
        return self.base(x) + self.c * (x @ self.A.T * drawn) @ self.B.T  # (1)


def network(layers: list[Adapted], x: Tensor, noise: Noise, groups: list[int]) -> Tensor:
    return layers[1](layers[0](x, noise, groups).tanh(), noise, groups)  # logits (N, C)


def kl_forward(s: Tensor, sigma: Tensor, p: float = 1.0) -> Tensor:  # (5): KL(q || p)
    return ((p / sigma).log() + (sigma**2 + s**2) / (2 * p**2) - 0.5).sum()


def kl_official(s: Tensor, sigma: Tensor, p: float = 1.0) -> Tensor:  # (6): KL(p || q)
    return ((sigma / p).log() + (p**2 + s**2) / (2 * sigma**2) - 0.5).sum()


def training_step(
    layers: list[Adapted], optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor,
    ids: list[int], noise: Noise, N: int, beta: float = 1.0, official: bool = False,
) -> float:  # fmt: skip
    """One step on rows x, the examples `ids` of N. Draws from 2^31 on are for training."""
    kl = kl_official if official else kl_forward
    nll = nn.functional.cross_entropy(network(layers, x, noise, ids), labels)
    gaussians = [(a.log_s.double().exp(), a.log_sigma.double().exp()) for a in layers]
    loss = nll + beta * sum(kl(s, sigma) for s, sigma in gaussians) / N  # (4)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for a in layers:
        a.log_sigma.data.clamp_(min=-20)
    return loss.item()


@torch.no_grad()
def predict(layers: list[Adapted], x: Tensor, ids: list[int], S: int, seed: int) -> tuple:
    """Probabilities (N, C), entropy, expected entropy and mutual information (N,), in nats."""
    logits = torch.stack([network(layers, x, (seed, draw), ids) for draw in range(S)])  # (S, N, C)
    each = logits.double().softmax(-1)
    probs = each.mean(0)  # (8)
    entropy, expected = (torch.special.entr(p).sum(-1) for p in (probs, each))  # -sum p ln p
    return probs, entropy, expected.mean(0), (entropy - expected.mean(0)).clamp(min=0)  # (9)


if __name__ == "__main__":  # does a point lie within a circle?
    torch.manual_seed(0)
    x, new = 2 * torch.randn(2, 400, 2)
    label, truth = ((points.norm(dim=1) > 2).long() for points in (x, new))
    layers = [Adapted(nn.Linear(2, 64), 0, rank=2), Adapted(nn.Linear(64, 2), 1, rank=2)]
    slow = {"params": [p for a in layers for p in (a.A, a.B)], "lr": 0.02}
    fast = {"params": [p for a in layers for p in (a.log_s, a.log_sigma)], "lr": 0.08}
    optimizer = torch.optim.AdamW([slow, fast], eps=1e-6, weight_decay=0.0)
    for step in range(300):
        ids = torch.randint(len(x), (16,)).tolist()
        training_step(layers, optimizer, x[ids], label[ids], ids, (0, 2**31 + step), len(x))
    probs, _, _, information = predict(layers, new, list(range(400)), S=10, seed=0)
    right = (probs.argmax(1) == truth).double().mean()
    print(f"accuracy {right:.3f}, mutual information {information.mean():.4f} nats")
