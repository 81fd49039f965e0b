"""What a study's file may say, and what identifies its data and its base model."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from scalabl_ref import InputError
from scalabl_ref.app.study import Study
from scalabl_ref.app.study.config import digest
from scalabl_ref.app.study.sets import encoded_sets
from scalabl_ref.support.files import sha256
from scalabl_ref.support.tensors import load_tensors, save_tensors

from ...models import questions_file
from .studies import config, quick


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metods": []}, "unknown field 'metods'"),
        ({"methods": ["magic"]}, "unknown method 'magic'"),
        ({"methods": []}, "methods must have values"),
        ({"methods": "mle"}, "methods must be a list (each a text), not 'mle'"),
        ({"model": 3}, "model must be a text, not 3"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16"),
        ({"format": "xml"}, "format must be one of jsonl, arc"),
        ({"seeds": 3}, "seeds must be a list (each a whole number), not 3"),
        ({"seeds": []}, "seeds must have values"),
        ({"seeds": [1, 1]}, "seeds must have values, each only once"),
        ({"seeds": [-1]}, "seeds must not be negative"),
        ({"seeds": [True]}, "seeds must be a list (each a whole number), not [True]"),
        ({"tuning_seeds": [3, -1]}, "seeds must not be negative, and one is -1"),
        ({"tuning_seeds": [1, 1]}, "tuning_seeds must have values, each only once"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"finalists": 0}, "finalists must be at least 1"),
        ({"ranges": {"lr": 0.001}}, "ranges must be an object (each a list (each a finite num"),
        ({"ranges": {"lr": []}}, "ranges: lr must be two positive numbers, the lower first"),
        ({"ranges": {"lr": [1, 2, 3]}}, "ranges: lr must be two positive numbers"),
        ({"ranges": {"lr": [-1, 1]}}, "ranges: lr must be two positive numbers"),
        ({"ranges": {"lr": [2, 1]}}, "ranges: lr must be two positive numbers"),
        ({"ranges": {"lr": [1, 10**400]}}, "ranges must be an object (each a list"),
        ({"ranges": {"lrs": [1, 2]}}, "ranges: no method tunes 'lrs': did you mean lr?"),
        ({"held_out": 3}, "held_out and passes need a limit"),
        ({"passes": 3}, "held_out and passes need a limit"),
        ({"held_out": -1}, "held_out must be at least 1"),
        ({"variants": {"x": {"rnk": 1}}}, "variants: x: unknown field 'rnk': did you mean rank?"),
        ({"variants": {"x": {"seed": 1}}}, "settings: seed has no effect"),
        ({"limit": 9, "passes": 1}, "settings: steps has no effect"),
        ({"limit": 9, "passes": 0, "settings": {}}, "passes must be above 0, and is 0"),
        ({"limit": "5"}, "limit must be a whole number or null, not '5'"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"test_limit": -1}, "test_limit must be at least 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 10**9}, "samples must be at most 100,000"),
        ({"bins": 10**9}, "bins must be at most 10,000"),
        ({"bins": 0}, "bins must be at least 1"),
        ({"validation": 0}, "validation must be a fraction or a number of rows, and is 0"),
        ({"validation": 1.5}, "validation must be a fraction or a number of rows"),
        ({"validation": math.nan}, "validation must be a finite number"),
        ({"ood": ["x"]}, "ood must be an object"),
        ({"ood": {"x": "y"}}, "ood must be an object"),
        ({"ood": {"x": {"file": "y"}}}, "ood: x: unknown field 'file': expected path, format"),
        ({"ood": {"x": {"limit": 3}}}, "ood: x: field 'path' is missing"),
        ({"ood": {"x": {"path": 3}}}, "ood: x: path must be a text"),
        ({"ood": {"x": {"path": "y", "limit": 0}}}, "ood: x: limit must be at least 1"),
        ({"ood": {"x": {"path": "y", "format": "z"}}}, "ood: x: format must be one of"),
        ({"ood": {"../x": {"path": "y"}}}, "ood: '../x' cannot be the name of a set"),
        ({"ood": {"validation": {"path": "y"}}}, "ood: 'validation' cannot be the name of a set"),
        ({"ood": {"shifted": {"path": "y"}}}, "ood: 'shifted' cannot be the name of a set"),
        ({"methods": ["mle stopped early"], "ranges": {"share_of_steps": [2, 3]}},
         "share_of_steps must be in (0, 1], and is 2."),
        ({"settings": {"step": 4}}, "settings: unknown field 'step': did you mean steps?"),
        ({"settings": {"steps": "4"}}, "settings: steps must be a whole number, not '4'"),
        ({"settings": {"steps": 10**20}}, "settings: steps must be a whole number"),
        ({"settings": {"steps": 0}}, "steps must be at least 1"),
        ({"settings": {"rank": 0}}, "rank must be at least 1"),
        ({"settings": {"targets": "lm_head"}}, "settings: targets must be a list (each a text)"),
        ({"settings": {"recompute": 1}}, "settings: recompute must be true or false"),
        ({"settings": {"micro_batch": 1.5}}, "micro_batch must be a whole number or null"),
        ({"settings": {"kl": "backward"}}, "settings: kl must be forward or official"),
        ({"settings": {"lr": 0.1}}, "settings: lr has no effect: every method here has its own"),
        ({"settings": {"seed": 1}}, "settings: seed has no effect"),
        ({"settings": {"method": "map"}}, "settings: method has no effect"),
        ({"methods": ["scalabl"], "settings": {"beta": 2.0}}, "settings: beta has no effect"),
    ],
)  # fmt: skip
def test_what_no_study_can_have_is_named_before_any_of_it(tmp_path, changes, message):
    path = config(tmp_path, **changes)
    with pytest.raises(InputError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        Study.read(path)


def test_a_setting_that_some_methods_heed_is_theirs(tmp_path):
    """beta is a knob of scalabl alone; a number may be whole, and null is a default."""
    settings = {"beta": 2, "alpha": None, "sampling": "token"}
    study = Study.read(config(tmp_path, methods=["scalabl", "map", "dropout"], settings=settings))
    trials = {name: study.tried(name)[0] for name in study.methods}
    beta = {name: study.configs(name, trial, 0)[1].beta for name, trial in trials.items()}
    assert beta == {"scalabl": trials["scalabl"]["beta"], "map": 2, "dropout": 2}


def test_settings_come_from_trial_then_method_then_variant_then_study(tmp_path):
    methods = ["mle", "dropout", "mle stopped early", "scalabl", "ensemble of scalabl"]
    settings = {"rank": 3, "sampling": "batch", "steps": 6, "batch": 4}
    variants = {"a": {"rank": 1, "sampling": "example"}, "b": {}}
    study = Study.read(config(tmp_path, methods=methods, settings=settings, variants=variants))

    def found(arm, seed=7, **trial):
        adapter, train = study.configs(arm, trial, seed)
        return adapter.rank, adapter.sampling, train

    assert found("mle, b", lr=0.5)[:2] == (3, "batch")
    assert found("mle, a", lr=0.5)[:2] == (1, "example")
    assert found("dropout, a", lr=0.5)[:2] == (1, "token")  # the method's own
    train = found("mle stopped early, b", lr=0.5, share_of_steps=0.3)[2]
    assert (train.lr, train.seed, train.batch, train.steps) == (0.5, 7, 4, 2)
    train = found("scalabl, a", lr=0.5, variational_ratio=3.0, beta=2.0)[2]
    assert (train.variational_lr, train.beta, train.steps) == (1.5, 2.0, 6)
    assert study.like("ensemble of scalabl, a") == "scalabl, a" and study.like("mle, a") is None


def test_passes_are_over_the_rows_that_train(tmp_path):
    """Of 10 rows, 2 or 4 are for tuning."""
    few = {"limit": 10, "passes": 2, "settings": {"rank": 2, "batch": 4}}

    def steps(**changes):
        return quick(tmp_path, **{**few, **changes}).configs("mle", {"lr": 0.1}, 0)[1].steps

    assert steps() == 4 and steps(validation=4) == 3 and steps(passes=0.01) == 1
    assert steps(settings={}) == 2  # of 8 rows


def test_sets_have_as_many_rows_as_their_limits_say(tmp_path):
    limits = {"limit": 10, "test_limit": 4}

    def rows(study):
        return {name: len(d.labels) for name, d in encoded_sets(study, study.sets).items()}

    first = {"train": 8, "validation": 2, "test": 4, "other": 5}
    assert rows(quick(tmp_path, **limits)) == first
    assert rows(quick(tmp_path, **limits, validation=1)) == {**first, "train": 9, "validation": 1}
    held = quick(tmp_path, **{**limits, "held_out": 6})  # the other 10 rows are not limited
    assert rows(held) == {"train": 10, "validation": 4, "test": 6, "shifted": 4, "other": 5}


def test_too_few_rows_are_refused_and_the_file_is_named(tmp_path):
    for few in ({"validation": 20}, {"validation": 21}, {"limit": 4, "held_out": 13}):
        with pytest.raises(InputError, match="train.jsonl: 20 rows are too few for the study's s"):
            encoded_sets(quick(tmp_path, **few), [])
    assert encoded_sets(quick(tmp_path, limit=4, held_out=12), [])


def test_column_options_apply_to_training_and_test_files(tmp_path):
    """Other sets keep the default columns."""
    other = questions_file(tmp_path / "plain.jsonl", rows=6)
    columns = {"text_column": "question", "label_column": "answer"}
    study = quick(tmp_path, **columns, ood={"other": {"path": str(other)}})
    for name in ("train", "test"):
        path = tmp_path / f"{name}.jsonl"
        text = path.read_text().replace('"prompt"', '"question"').replace('"label"', '"answer"')
        path.write_text(text)
    found = encoded_sets(study, study.sets)
    assert [len(data.labels) for data in found.values()] == [16, 4, 9, 6]
    assert found["test"].examples[:6] == found["other"].examples


def test_labels_are_those_of_the_training_file(tmp_path):
    """A test set may have only one; a set out of distribution may have others."""
    study = quick(tmp_path)
    words = {"train": "cabcab" * 3, "test": "cc", "other": "cbx"}
    for name, labels in words.items():
        lines = "".join(f"ticket {i},{label}\n" for i, label in enumerate(labels))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + lines)
    train, test, other = (str(tmp_path / f"{name}.csv") for name in words)
    ood = {"other": {"path": other, "format": "csv"}}
    study = dataclasses.replace(study, train=train, test=test, format="csv", ood=ood)
    found = encoded_sets(study, ["test", "other"])
    assert list(found["test"].labels) == [2, 2] and list(found["other"].labels)[:2] == [2, 1]
    assert found["other"].labels[2] >= 3 and found["train"].wording.names == ("a", "b", "c")


def test_a_bad_validation_row_is_named_by_its_training_file(tmp_path):
    """Validation rows come from that file."""
    study, path = quick(tmp_path), tmp_path / "train.jsonl"
    prompt = encoded_sets(study, ["validation"])["validation"].examples[0].prompt
    row = next(
        line for line in path.read_text().splitlines() if json.loads(line)["prompt"] in prompt
    )
    question = json.loads(row)["prompt"]
    path.write_text(path.read_text().replace(f'"{question}"', f'"{128 * "?"}"'))
    with pytest.raises(InputError, match=r"train.jsonl: example \d+ .*its prompt has 1\d\d tokens"):
        encoded_sets(dataclasses.replace(study), ["validation"])


@pytest.mark.parametrize("name", ["model", "train", "test"])
def test_a_required_field_that_is_missing_is_named(tmp_path, name):
    path = config(tmp_path)
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"study.json: field '{name}' is missing"):
        Study.read(path)


def test_a_digest_is_as_ever():
    """Folders of finished studies have it in their names; the order of keys does not count."""
    assert digest({"b": 1, "a": [1.5, None]}) == digest({"a": [1.5, None], "b": 1}) == "ad3879169f"


def test_winograndes_labels_are_contents(tmp_path):
    train, labels = tmp_path / "train.jsonl", tmp_path / "train-labels.lst"
    plain = quick(tmp_path)
    labels.write_text("1\n")
    assert dataclasses.replace(plain).contents == plain.contents
    found = []
    for text in ("1\n", "2\n"):
        labels.write_text(text)
        found.append(dataclasses.replace(plain, format="winogrande").contents["train"])
    assert found[0][0] == found[1][0] == sha256(train) and found[0][1] != found[1][1]


def test_a_base_is_known_by_what_is_in_its_folder(tmp_path):
    """Every tensor, the configuration, the tokenizer: a change of any makes another."""
    base, folder = quick(tmp_path).base, tmp_path / "model"
    assert dataclasses.replace(quick(tmp_path), model=str(folder)).base == base
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    tensors, _ = load_tensors(folder / "model.safetensors")

    def changed():
        found = Study.read(tmp_path / "study.json").base != base
        for name, data in kept.items():
            (folder / name).write_bytes(data)
        return found

    assert not changed()
    for name in tensors:
        other = {**tensors, name: 1.5 * tensors[name]}
        save_tensors(folder / "model.safetensors", other.items())
        assert changed(), name
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes(kept[name] + b"\n")
        assert changed(), name
    (folder / "tokenizer_config.json").write_text("{}")
    assert changed()
