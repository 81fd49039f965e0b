"""Folders in which commands run."""

from __future__ import annotations

import pytest

from ..models import questions_file, tiny_folder
from ..tickets import write_tickets


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a model and two data files in it, as the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    questions_file(tmp_path / "train.jsonl")
    questions_file(tmp_path / "test.jsonl", rows=9)
    return tmp_path


@pytest.fixture
def tickets(work):
    """The same, with two files of tickets, whose labels are words."""
    write_tickets(work / "tickets.jsonl", 24, 0)
    write_tickets(work / "others.jsonl", 9, 1)
    return work
