"""`scalabl predict`: choices, the run's labels, and the answers of every method to a file."""

from __future__ import annotations

import json

import pytest
import torch

import scalabl_ref
from scalabl_ref.app import cli
from scalabl_ref.core.config import ADAPTERS
from scalabl_ref.evaluation import rule
from scalabl_ref.methods import POSTERIORS

from ...models import questions_file
from ...tolerances import rounding
from ..commands import TRAIN, ok, refused, run

LAPLACE, SUBSPACE = "mle | posterior laplace", "scalabl | posterior subspace"
RUNS = {  # options of `train`, and of the `posterior` of one run
    **{name: f"{name}" for name in ADAPTERS if ADAPTERS[name].trained},
    "dropout, half": "dropout --dropout 0.5",
    "official KL": "scalabl --kl official",
    "official objective": "scalabl --objective official",
    "full covariance": "scalabl --covariance full",
    "fitted prior": "scalabl --prior layer",
    "draws of tokens": "scalabl --sampling token",
    "draws of batches": "scalabl --sampling batch",
    "whole head": "scalabl --head full",
    "8 bits": "scalabl --quantize int8",
    "subspace": SUBSPACE,
    "subspace, sampled": f"{SUBSPACE} --predicts sampled",
    "subspace, by target": f"{SUBSPACE} --groups target",
    "subspace, few directions": f"{SUBSPACE} --directions 2",
    "subspace of mle": "mle | posterior subspace",
    "laplace": LAPLACE,
    "laplace, last token": f"{LAPLACE} --curvature last",
    "laplace, exact": f"{LAPLACE} --curvature exact",
    "laplace, last layer": f"{LAPLACE} --layers last --kron-rank 2",
    "tfb": "mle | posterior tfb --tolerance 0.05",
    "swag": "mle --swag 0.5 | posterior swag",
}  # fmt: skip
ENSEMBLES = ("mle", "scalabl", "laplace", "swag", "subspace", "subspace, sampled")
EVERY = [*RUNS, *(f"ensemble of {name}" for name in ENSEMBLES)]
DRAWS = ("--samples", "4", "--seed", "3")
TRAINED = f"{TRAIN} --lr 0.02 --labels letters"


def test_more_choices_and_fewer_than_the_head_has(work, capsys):
    """A run of three: a fourth has no probability, and of two the rest is given."""
    ok(TRAIN, capsys)
    predict = "predict --run run --prompt hello --samples 3 --choices"
    assert "can answer 3 choices, not 4" in refused(f"{predict} a b c d", capsys)
    two, three = (ok(f"{predict} {choices}", capsys) for choices in ("A B", "A B C"))
    assert "others" not in three and two["probs"] == three["probs"][:2]
    assert two["others"] == three["probs"][2] > 0
    assert (two["choices"], two["samples"]) == (["A", "B"], 3) and "settled" not in two
    _, out, _ = run(f"{predict} A B", capsys)
    assert out.splitlines() == [
        f"{two['probs'][0]:.4f}  A",
        f"{two['probs'][1]:.4f}  B",
        f"{two['others']:.4f}  all other answers of the run",
        f"entropy: {two['entropy']:.4f} nats",
        f"expected entropy: {two['expected_entropy']:.4f} nats",
        f"mutual information: {two['mutual_information']:.4f} nats",
    ]
    _, out, _ = run(f"{predict} A B C --samples auto --most 4", capsys)
    assert "\nopen after 4 draws: more could change the answer\n" in out
    (work / "texts.jsonl").write_text('{"text": "hello"}\n{"text": "you"}\n')
    ok(
        f"{predict} x y z --data texts.jsonl --out o.jsonl --probs".replace("--prompt hello ", ""),
        capsys,
    )
    found = [json.loads(line) for line in (work / "o.jsonl").read_text().splitlines()]
    assert [row["choices"] for row in found] == [["x", "y", "z"]] * 2
    assert {row["answer"] for row in found} <= {"x", "y", "z"}


# --- every method ---------------------------------------------------------------------------------


def made(name: str, capsys, seed: int = 0, out: str = "made") -> str:
    """The folder of a run of EVERY."""
    kind, _, inner = name.partition("ensemble of ")
    if not kind:
        members = [made(inner, capsys, s, f"member{s}") for s in (0, 1)]
        ok(f"posterior ensemble --run {' '.join(members)} --out {out}", capsys)
        return out
    train, _, posterior = RUNS[name].partition(" | ")
    run = f"{out}-run" if posterior else out
    ok(f"{TRAINED.replace('--out run', '')} --method {train} --seed {seed} --out {run}", capsys)
    if posterior:
        ok(f"{posterior} --run {run} --out {out}", capsys)
    return out


def answered(run: str, data: str, capsys, batch: int = 1) -> list[dict]:
    """The rows of --out."""
    more = f"--batch {batch} {' '.join(DRAWS)}"
    ok(f"predict --run {run} --data {data} --probs --out out.jsonl {more}", capsys)
    with open("out.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def asked(run: str, text: str, capsys) -> dict:
    assert cli.main(["predict", "--run", run, "--prompt", text, "--json", *DRAWS]) == 0
    return json.loads(capsys.readouterr().out)


def texts(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def same(row: dict, one: dict) -> bool:
    """Whether a file's row is the answer to its text, to the bit."""
    place = max(range(3), key=one["probs"].__getitem__)
    own = {"answer": one["choices"][place], "confidence": one["probs"][place]}
    own |= {"decision": one.get("decision")}
    keys = ("choices", "probs", "entropy", "mutual_information")
    return all(row[key] == value for key, value in {**own, **{k: one[k] for k in keys}}.items())


def test_every_method_is_among_them():
    kinds = {RUNS[name].split()[0] for name in RUNS}
    assert kinds | {"tfb"} == set(ADAPTERS)
    later = {words.partition("posterior ")[2].split(" ")[0] for words in RUNS.values()} - {""}
    assert later | {"ensemble"} == {*POSTERIORS, "tfb"}


def rule_for(run: str) -> None:
    """A temperature and a threshold, of 4 draws of seed 3."""
    fit = {"n": 1, "data": "", "data_sha256": "", "rows": "", "value": 2.0}
    found = {**dict.fromkeys(("accuracy", "level", "coverage", "bound"), 0.9), "value": 0.5}
    how = rule.how(scalabl_ref.load(run, samples=4, seed=3))
    rule.write_rule(run, {"how": how, "temperature": {**fit, "nll": [1.0], "ece": [0.1]},
                          "threshold": {**fit, "answered": 1, "right": 1, **found}})  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_a_file_has_the_answers_of_its_texts(work, capsys, name):
    """To the bit, with the temperature and the threshold of the run."""
    run = made(name, capsys)
    rule_for(run)
    rows = answered(run, "test.jsonl", capsys)
    assert len({row["confidence"] for row in rows}) == 9
    assert (rows[0]["mutual_information"] > 0) == (name not in ("mle", "map", "point"))
    assert {row["decision"] for row in rows} <= {"answer", "human"}
    for row, text in list(zip(rows, texts("test.jsonl"), strict=True))[::4]:
        assert same(row, asked(run, text, capsys))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_thousand_rows(work, capsys, name):
    """In batches, all rows are there in their order, equal to single answers but for rounding."""
    run = made(name, capsys)
    questions_file(work / "many.jsonl", rows=1000)
    rows = answered(run, "many.jsonl", capsys, 32)
    assert [row["id"] for row in rows] == [str(i) for i in range(1000)]
    clf = scalabl_ref.load(run, samples=4, seed=3)
    places = range(0, 1000, 97)
    probs = clf.predict_proba([texts("many.jsonl")[i] for i in places])
    found = torch.tensor([rows[i]["probs"] for i in places], dtype=torch.float64)
    assert (found - probs).abs().max() <= rounding(torch.float32, 256)
