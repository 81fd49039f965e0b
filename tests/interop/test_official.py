"""The official code's states come in with all their values, or are refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from scalabl_ref import InputError, Llama, adapters
from scalabl_ref.support.files import read_json

from .samples import LETTERS, Q0, TOKENS, Evil, bound, bring, official_state


@pytest.mark.parametrize("method", ["scalabl", "blob", "mle"])
@pytest.mark.parametrize("where", ["file", "folder"])
@torch.no_grad()
def test_an_official_state_comes_in_with_all_its_values(base, tmp_path, method, where):
    state = official_state(base, method)
    folder = tmp_path / "arc"
    folder.mkdir()
    torch.save(state, folder / "state_dict.pt")
    source = folder if where == "folder" else folder / "state_dict.pt"
    model = bring(base, source, tmp_path / "run", "bayesadapt", {"sampling": "batch"})
    assert model.config.head_tokens == tuple(LETTERS)
    expected = Llama.from_pretrained(base).trim_head(LETTERS).double()
    for name, adapter in adapters(model).items():
        hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
        part = f"base_model.model.{hf}.lora_{{}}.default.{{}}".format
        B = state[part("B", "weight")]
        if method == "scalabl":
            A = state[part("A", "log_s")].double().exp()[:, None] * state[part("A", "Vh")]
            assert torch.equal(adapter.log_sigma, state[part("A", "log_s_sigma")])
            assert torch.equal(adapter.A, state[part("A", "Vh")])
        else:
            A = state[part("A", "weight")].double()
        if method == "blob":
            assert torch.equal(adapter.G, state[part("A", "lora_A_rho")])
        expected.get_submodule(name).weight += 2 * B.double() @ A
    logits = model(TOKENS)
    assert (logits - expected(TOKENS)).abs().max() <= bound(model, logits)
    config, info = next(iter(adapters(model).values())).config, read_json(
        tmp_path / "run/run.json")  # fmt: skip
    assert config.method == ("scalabl" if method == "mle" else method)
    assert config.prior_std == (0.2 if method == "blob" else 1.0)
    kl = {"scalabl": "official", "blob": "forward", "mle": None}[method]
    objective = None if kl is None else "official"
    assert info["train"] == {"kl": kl, "objective": objective, "seed": None}
    assert info["imported"]["method"] == method


@pytest.mark.parametrize("method", ["scalabl", "blob"])
def test_the_kl_of_another_distribution_is_not_known(base, tmp_path, method):
    """The KL is recorded only if SRC was trained with this distribution."""
    torch.save(official_state(base, method), tmp_path / "state_dict.pt")
    options = {"method": "scalabl", "covariance": "full"}
    bring(base, tmp_path, tmp_path / "run", "bayesadapt", options)
    train = read_json(tmp_path / "run/run.json")["train"]
    assert train == {"kl": None, "objective": None, "seed": None}


def test_the_answers_are_entries_of_the_vocabulary(base, tmp_path):
    """Whatever text precedes them: a token for an answer behind a space is another one."""
    values = read_json(base / "tokenizer.json")
    values["model"]["vocab"]["\u0120A"] = values["model"]["vocab"].pop("~")
    values["model"]["merges"] = [["\u0120", "A"]]
    (base / "tokenizer.json").write_text(json.dumps(values))
    torch.save(official_state(base, rows=1), tmp_path / "state_dict.pt")
    model = bring(base, tmp_path, tmp_path / "run", "bayesadapt")
    assert model.config.head_tokens == (LETTERS[0],)


@torch.no_grad()
def test_an_official_state_with_other_labels_alpha_rank_or_a_whole_head(base, tmp_path):
    torch.save(official_state(base), tmp_path / "state_dict.pt")
    options = {"labels": ["y", "n", "?"], "alpha": 1.0}
    model = bring(base, tmp_path, tmp_path / "run", "bayesadapt", **options)
    assert model.config.head_tokens == tuple(ord(letter) - 33 for letter in "yn?")
    assert adapters(model)["lm_head"].config.scaling == 0.5
    torch.save(official_state(base, rows=256), tmp_path / "state_dict.pt")
    model = bring(base, tmp_path, tmp_path / "whole", "bayesadapt")
    assert model.config.head_tokens is None and adapters(model)["lm_head"].B.shape == (256, 2)
    torch.save(official_state(base, rank=1), tmp_path / "state_dict.pt")
    model = bring(base, tmp_path, tmp_path / "one", "bayesadapt")
    assert {adapter.config.rank for adapter in adapters(model).values()} == {1}


def _first(state, end):
    return next(name for name in state if name.endswith(end))


OFFICIAL = {
    "no B": (lambda s: s.pop(_first(s, "q_proj.lora_B.default.weight")),
             "tensor lora_B.weight of model.layers.0.self_attn.q_proj is missing"),
    "no Vh": (lambda s: s.pop(_first(s, "Vh")), "tensor lora_A.Vh of .* is missing"),
    "shape": (lambda s: s.update({_first(s, "log_s"): torch.ones(5)}),
              r"log_s has shape \(5,\), expected \(2,\)"),
    "a scalar head": (lambda s: s.update({_first(s, "lm_head.lora_B.default.weight"):
                                          torch.tensor(1.0)}),
                      r"lm_head.lora_B.default.weight has shape \(\), expected"),
    "NaN": (lambda s: s[_first(s, "Vh")].fill_(float("nan")), "Vh has NaN or infinite values"),
    "rank 0": (lambda s: s.update({_first(s, "q_proj.lora_A.default.Vh"): torch.ones(0, 16)}),
               "has an adapter of rank 0"),
    "another method": (lambda s: s.update({Q0 + ".lora_A.default.members": torch.ones(2)}),
                       "lora_A.default.members is unexpected"),
    "not a LoRA": (lambda s: s.update({n: torch.ones(2) for n in ("z", "model.norm.weight", "x")}),
                   "tensor model.norm.weight is not of a LoRA"),
    "many answers": (lambda s: s.update({_first(s, "lm_head.lora_B.default.weight"):
                                         torch.ones(27, 2)}),
                     "the 27 rows of its head: 27 answer classes: there are letters for 26"),
    "empty": (lambda s: s.clear(), "holds no LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("what", OFFICIAL)
def test_a_hostile_official_state_is_refused_by_name(base, tmp_path, what):
    change, words = OFFICIAL[what]
    state = official_state(base)
    change(state)
    torch.save(state, tmp_path / "state_dict.pt")
    with pytest.raises(InputError, match=words) as caught:
        bring(base, tmp_path / "state_dict.pt", tmp_path / "run", "bayesadapt")
    assert "\n" not in str(caught.value) and "state_dict.pt: " in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_official_pickle_that_runs_code_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "state_dict.pt")
    with pytest.raises(InputError, match="refused: a pickle may hold only"):
        bring(base, tmp_path, tmp_path / "run", "bayesadapt")
    assert not (tmp_path / "ran").exists()
