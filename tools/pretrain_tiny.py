"""Pre-train the demo's model from nothing: corpus, sentencepiece model, weights.

    python tools/pretrain_tiny.py [--out DIR] [--steps N] [--seed N]

About two minutes on one core. On one machine the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import sys
from pathlib import Path

import scalabl_ref  # noqa: F401  before torch, whose warning about a missing NumPy it keeps away

# isort: split
import torch
import torch.nn.functional as F

from scalabl_ref.app.demo import LETTERS, story
from scalabl_ref.data.tokenizer import Tokenizer, import_sentencepiece, load_tokenizer
from scalabl_ref.model.config import LlamaConfig
from scalabl_ref.model.llama import Llama
from scalabl_ref.support.errors import InputError
from scalabl_ref.support.files import new_folder
from scalabl_ref.support.folders import write_model
from scalabl_ref.support.progress import progress_bar
from scalabl_ref.support.tensors import Stored

VOCABULARY, LENGTH, BATCH, STORIES = 384, 48, 32, 20_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tiny"), help="folder to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        with new_folder(args.out) as folder:
            loss = pretrain(folder, args.steps, args.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"loss {loss:.4f} nats per token; written: {args.out}")
    return 0


def pretrain(folder: Path, steps: int, seed: int) -> float:
    """Fill `folder` with the model; returns the mean loss of the last tenth of the steps."""
    source = random.Random(seed)
    stories = [story(source) for _ in range(STORIES)]
    (folder / "tokenizer.model").write_bytes(_train_tokenizer(stories))
    tokenizer = load_tokenizer(folder)
    rows = _rows(stories, tokenizer)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = Llama(config).init_random_(seed, std=0.06)
    losses = _optimise(model, rows, steps, seed)
    state = {
        name: Stored.held(tensor)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    write_model(folder, config.to_dict(), state, {})
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def _train_tokenizer(stories: list[str]) -> bytes:
    sentencepiece = import_sentencepiece()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories[:5000]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        required_chars="".join(LETTERS) + ":\n",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _rows(stories: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    """All stories end to end, each begun by BOS, cut into rows of LENGTH + 1 tokens."""
    ids = [token for text in stories for token in tokenizer.encode(text)]
    count = len(ids) // (LENGTH + 1)
    return torch.tensor(ids[: count * (LENGTH + 1)]).view(count, LENGTH + 1)


def _optimise(model: Llama, rows: torch.Tensor, steps: int, seed: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with progress_bar(steps, "pre-train", "step") as bar:
        for step in range(steps):
            rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = 3e-3 * rate
            batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.update()
    return losses


if __name__ == "__main__":
    sys.exit(main())
