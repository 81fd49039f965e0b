"""Methods of one's own: the page's code in a study, in processes too, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re

import pytest
import torch

from scalabl_ref import InputError, Noise
from scalabl_ref.app import cli
from scalabl_ref.app.study import METHODS, Job, Study, plugins, run_study
from scalabl_ref.core.config import ADAPTERS
from scalabl_ref.methods import POSTERIORS

from ...conftest import ROOT
from ...tolerances import rounding
from .studies import config

BOTH = ["mle", "gaussian dropout", "jitter"]
ADD = "from scalabl_ref.app.study import METHODS, Method\n"


@pytest.fixture(autouse=True)
def unload(monkeypatch):
    """Leave the registries as they were."""
    for name in ("_LOADED", "_ADDED"):
        monkeypatch.setattr(plugins, name, type(getattr(plugins, name))())
    for registry in (METHODS, ADAPTERS, POSTERIORS):
        for name in registry:
            monkeypatch.setitem(registry, name, registry[name])
    before = [dict(registry) for registry in (METHODS, ADAPTERS, POSTERIORS)]
    yield
    for registry, names in zip((METHODS, ADAPTERS, POSTERIORS), before, strict=True):
        for name in [name for name in registry if name not in names]:
            del registry[name]


@pytest.fixture
def plugin(tmp_path):
    """The code of docs/own_method.md, in one file."""
    text = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")
    parts = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    counts = [sum(bool(line.strip()) for line in part.splitlines()) for part in parts]
    assert len(parts) == 2 and max(counts) <= 40
    path = tmp_path / "mymethod.py"
    path.write_text("\n\n".join(parts))
    return path


def test_the_methods_of_the_page_are_studied_in_processes(tmp_path, plugin, capsys):
    path, out = config(tmp_path, methods=BOTH, trials=1), tmp_path / "out"
    command = ["study", str(path), "--plugin", str(plugin), "--out", str(out), "--jobs", "2"]
    assert cli.main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(BOTH) <= set(results["methods"]) and results["failed"] == {}
    nll = {name: results["methods"][name]["nll"] for name in BOTH}
    assert len(set(nll.values())) == 3  # each differs from plain LoRA
    assert results["methods"]["gaussian dropout"]["draws"] == 2
    rivals = {e["rival"] for e in results["verdict"] if e["family"] == "all"}
    assert rivals == {"mle", "mle + temperature"}  # the two methods are ours
    study = Study.read(path, [plugin])
    job = Job(study, "jitter", results["methods"]["jitter"]["trial"], 0, study.sets, out)
    assert job.done and POSTERIORS["jitter"].__name__ == "Jitter"


def test_the_page_keeps_the_rules_of_adapters_and_posteriors(tmp_path, plugin):
    """A draw as plain LoRA is the layer under that draw; a saved posterior answers the same."""
    study = Study.read(config(tmp_path, methods=BOTH), [plugin])
    cls = ADAPTERS["gaussian"]
    settings = study.configs("gaussian dropout", {"lr": 0.1, "dropout": 0.3}, 0)[0]
    layer = cls(6, 5, settings, 3, 0, torch.device("cpu"))
    torch.nn.init.ones_(layer.B)
    drawn = layer.lora_A(Noise(1, 2))
    eps = Noise(1, 2).normal(3, 1, settings.rank)[0].double()
    expected = layer.A.double() * (1 + (0.3 / 0.7) ** 0.5 * eps)[:, None]
    assert torch.allclose(drawn, expected, rtol=rounding(torch.float64, 8), atol=0)
    assert torch.equal(layer.lora_A(), layer.A.double())
    jitter = POSTERIORS["jitter"]({"a": torch.arange(4.0), "b": torch.ones(2, 3)}, 0.5)
    jitter.save(tmp_path)
    again = POSTERIORS["jitter"].load(tmp_path)
    one, other = jitter.draw(Noise(0, 1)), again.draw(Noise(0, 1))
    assert all(torch.equal(one[name], other[name]) for name in ("a", "b"))
    assert not torch.equal(one["a"], jitter.draw(Noise(0, 2))["a"])


def test_the_study_of_the_page_is_one(tmp_path, plugin):
    """Its JSON, and the fields of its table."""
    text = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")
    path = tmp_path / "study.json"
    path.write_text(re.findall(r"```json\n(.+?)```", text, re.DOTALL)[0])
    assert "gaussian dropout" in Study.read(path, [plugin]).methods
    rows = re.findall(r"^\| (`.+?`) \| .+ \| (.+) \|$", text, re.MULTILINE)
    defaults = {field.name: field.default for field in dataclasses.fields(Study)}
    for names, default in rows:
        for name in re.findall(r"`(\w+)`", names):
            if re.match(r"\d", default):
                value = defaults[name]
                value = value if isinstance(value, tuple) else (value,)
                assert default == ", ".join(map(str, value)), name
            assert name in defaults
    assert len(rows) >= 10


def test_a_plugin_changes_the_names_of_what_it_defines_alone(tmp_path, plugin):
    path = config(tmp_path, methods=BOTH)

    def folders(study: Study) -> dict[str, tuple[str, str]]:
        trial = {"lr": 0.01, "dropout": 0.2, "width": 0.1}
        jobs = {arm: Job(study, arm, trial, 0, study.sets, tmp_path) for arm in study.arms}
        return {a: (job.fits()[0].folder.name, job.folder.name) for a, job in jobs.items()}

    plain = folders(Study.read(config(tmp_path, methods=["mle"])))
    config(tmp_path, methods=BOTH)
    first = folders(Study.read(path, [plugin]))
    other = tmp_path / "other.py"
    other.write_text(plugin.read_text() + "\n# changed\n")
    for registry in (METHODS, ADAPTERS, POSTERIORS):
        for name in ("gaussian dropout", "jitter", "gaussian"):
            registry.pop(name, None)
    plugins._LOADED.clear()
    second = folders(Study.read(path, [other]))
    assert first["mle"] == second["mle"] == plain["mle"]
    assert first["gaussian dropout"][0] != second["gaussian dropout"][0]  # the run
    assert first["jitter"][0] == second["jitter"][0]  # plain LoRA's run
    assert first["jitter"][1] != second["jitter"][1]  # the answers


def test_a_plugin_that_changed_is_refused(tmp_path, plugin):
    study = Study.read(config(tmp_path, methods=BOTH), [plugin])
    sent = pickle.dumps(study)
    assert pickle.loads(sent) == study
    plugin.write_text(plugin.read_text() + "\n# changed\n")
    for again in (lambda: pickle.loads(sent), lambda: plugins.load_plugins([plugin])):
        with pytest.raises(InputError, match="has changed since it was loaded"):
            again()
    plugins._LOADED.clear()  # as in a process that starts later
    for registry in (METHODS, ADAPTERS, POSTERIORS):
        for name in ("gaussian dropout", "jitter", "gaussian"):
            registry.pop(name, None)
    with pytest.raises(InputError, match="has changed while the study ran"):
        pickle.loads(sent)


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = (", r"mymethod.py:1: SyntaxError"),
        ("\n1 / 0", r"mymethod.py:2: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", r"mymethod.py:1: SystemExit: 3"),
        ("import no_such_module", r"mymethod.py:1: ModuleNotFoundError"),
        ("x = 1", r"adds no method"),
        (ADD + "METHODS['mle'] = Method({'method': 'mle'})", r"replaces the method 'mle'"),
        (ADD + "del METHODS['mle']", r"replaces the method 'mle'"),
        (ADD + "METHODS['a, b'] = Method({'method': 'mle'})", r"name without commas"),
        (ADD + "METHODS['a + temperature'] = Method({'method': 'mle'})", r"has 'a \+ temperature'"),
        (ADD + "METHODS[''] = Method({'method': 'mle'})", r"a method needs a name .* has ''"),
        (ADD + "METHODS['a'] = 3", r"METHODS\['a'\] must be a Method"),
        (ADD + "METHODS['a'] = Method({'method': 'b'})", r"need 'method', one of"),
        (ADD + "from scalabl_ref.core.config import ADAPTERS\nADAPTERS['a'] = int", r"subclass of"),
    ],
)
def test_a_bad_plugin_is_one_line_and_adds_nothing(tmp_path, capsys, text, said):
    path = tmp_path / "mymethod.py"
    path.write_text(text)
    before = [dict(registry) for registry in (METHODS, ADAPTERS, POSTERIORS)]
    study = config(tmp_path)
    command = ["study", str(study), "--plugin", str(path), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
    assert [dict(registry) for registry in (METHODS, ADAPTERS, POSTERIORS)] == before


def test_a_file_of_data_names_no_code(tmp_path, plugin):
    path = config(tmp_path, plugins=[str(plugin)])
    with pytest.raises(InputError, match=r"study.json: plugins cannot stand in a file"):
        Study.read(path)
    assert not plugins._LOADED
    with pytest.raises(InputError, match="no such file: --plugin needs a Python file"):
        Study.read(path, [tmp_path / "none.py"])
    (tmp_path / "method.txt").write_text(plugin.read_text())
    with pytest.raises(InputError, match="method.txt: is not a Python file: its name must end in"):
        Study.read(path, [tmp_path / "method.txt"])


def test_a_study_without_plugins_has_the_same_folders_as_ever(tmp_path):
    """The field `plugins` adds nothing to a name: finished studies are continued."""
    study = Study.read(config(tmp_path, methods=["mle"], trials=1, seeds=[0]))
    assert study.code(method="mle", adapter="mle") == []
    run_study(study, tmp_path / "out")
    assert Job(study, "mle", study.tried("mle")[0], 0, study.sets, tmp_path / "out").done
