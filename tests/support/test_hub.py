"""Models by their names on the Hub: where they are looked for, and what a run keeps of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch

from scalabl_ref import InputError, Llama
from scalabl_ref.data.tokenizer import load_tokenizer
from scalabl_ref.support.hub import hub_name, model_folder

from ..conftest import ROOT
from ..models import questions_file, tiny_folder

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """In the place of the package: one that has some/model, and what it was asked for."""
    folder, asked = tiny_folder(tmp_path / "cache"), []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        if name != "some/model":
            raise OSError("404\n  no such thing")
        return str(folder)

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(folder=folder, asked=asked)


def test_a_name_becomes_a_folder(hub):
    model = Llama.from_pretrained("some/model")
    expected = Llama.from_pretrained(hub.folder).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert load_tokenizer("some/model@v1.0").encode("a") == load_tokenizer(hub.folder).encode("a")
    assert set(hub.asked) == {("some/model", None), ("some/model", "v1.0")}
    with pytest.raises(
        InputError,
        match="some/other: no such folder, and the Hub download failed.*: 404 no such",
    ):
        model_folder("some/other")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    """As an argument, which goes before that of the name, or behind an @."""
    assert model_folder("some/model@refs/pr/1") == hub.folder
    model_folder("some/model", "v2")
    model_folder("some/model@v1", "v2")
    assert [revision for _, revision in hub.asked] == ["refs/pr/1", "v2", "v2"]


SMALL = ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.model"]
OTHERS = ["README.md", "consolidated.safetensors", "onnx/model.safetensors", "original/params.json"]
SHARD, PICKLE = "model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"


@pytest.mark.parametrize(
    ("weights", "fetched"), [([SHARD, PICKLE], [SHARD]), ([SHARD], [SHARD]), ([PICKLE], [PICKLE])]
)
def test_only_what_a_model_needs_is_fetched(tmp_path, monkeypatch, weights, fetched):
    """Its safetensors or, where there are none, its pickles; nothing in folders."""

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        for file in (*SMALL, *OTHERS, *weights):
            allowed = any(fnmatch(file, pattern) for pattern in allow_patterns)
            if allowed and not (ignore_patterns and fnmatch(file, ignore_patterns)):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert model_folder("some/model") == tmp_path
    assert sorted(os.listdir(tmp_path)) == sorted([*SMALL, *fetched])


def test_what_is_here_or_is_no_name_is_not_looked_for_there(hub, tmp_path):
    (tmp_path / "some" / "model").mkdir(parents=True)
    endings = ("json", "model", "bin", "gguf", "pth", "pt", "safetensors")
    files = [f"some/file.{end}" for end in endings]
    for path in ("some/model", "model", "/some/other", "a/b/c", "./model", *files):
        assert str(model_folder(path)) == path.removeprefix("./")
    assert hub.asked == []


def test_without_the_package_it_says_what_to_do(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[hf\]' in the clone"):
        Llama.from_pretrained("some/model")


def test_a_folder_of_the_cache_knows_its_name(tmp_path):
    folder = tmp_path / "models--some--model--x" / "snapshots" / COMMIT
    assert hub_name(folder) == "some/model--x"
    assert hub_name(folder.parent) is None and hub_name(tmp_path) is None
    assert hub_name(tmp_path / "other--some--model" / "snapshots" / COMMIT) is None


def test_commands_take_a_name_and_a_run_keeps_the_folder(tmp_path):
    """The real package, offline, on a cache laid out by hand."""
    pytest.importorskip("huggingface_hub", reason="needs the extra hf")
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = tiny_folder(repository / "snapshots" / COMMIT)
    data = questions_file(tmp_path / "data.jsonl")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}

    def scalabl(*arguments):
        command = [sys.executable, "-m", "scalabl_ref", *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    run = tmp_path / "run"
    trained = ["--data", data, "--out", run, "--steps", 1, "--batch", 2]
    done = scalabl("train", "--model", "some/model", *trained)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "run.json").read_text())["model"] == str(snapshot.resolve())
    done = scalabl("evaluate", "--run", run, "--data", data, "--samples", 1)
    assert done.returncode == 0, done.stderr
    done = scalabl("export", "--run", run, "--to", "peft", "--out", tmp_path / "peft")
    assert done.returncode == 0, done.stderr
    adapter = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "some/model"
    done = scalabl("generate", "--model", "some/other", "--prompt", "a")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "error: some/other: no such folder, and the Hub download failed: "
    )
