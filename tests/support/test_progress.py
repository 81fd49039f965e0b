"""Progress: words for a time, and lines where there is no terminal."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from scalabl_ref.support import progress
from scalabl_ref.support.progress import duration, progress_bar

DAY = 86400


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 seconds"), (0.25, "0.25 seconds"), (1, "1 second"), (89, "89 seconds"),
        (90, "1.5 minutes"), (3599, "60 minutes"), (5400, "1.5 hours"), (35 * 3600, "35 hours"),
        (1.5 * DAY, "1.5 days"), (3.02 * DAY, "3 days"), (9.96 * DAY, "10 days"),
        (400 * DAY, "400 days"), (6.2e11, "19,647 years"),
    ],
)  # fmt: skip
def test_a_duration_is_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("exponent", range(-2, 12))
def test_a_duration_is_right_within_five_percent(exponent):
    sizes = {"second": 1, "minute": 60, "hour": 3600, "day": DAY, "year": 365.25 * DAY}
    for digit in range(100, 1000, 7):
        seconds = digit / 100 * 10.0**exponent
        count, unit = duration(seconds).split()
        assert "e" not in count
        said = float(count.replace(",", "")) * sizes[unit.removesuffix("s")]
        assert abs(said / seconds - 1) <= 0.0501


def test_without_a_terminal_a_line_comes_every_thirty_seconds(capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with progress_bar(1000, "train", "step", done=200) as bar:
        for step in range(201, 1001):
            clock.now += 0.25
            bar.set_postfix({"nll": f"{step / 1000:.3f}"}, refresh=False)
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "train: step 320 of 1,000, nll 0.320, about 2.8 minutes left",
        "train: step 440 of 1,000, nll 0.440, about 2.3 minutes left",
        "train: step 560 of 1,000, nll 0.560, about 1.8 minutes left",
        "train: step 680 of 1,000, nll 0.680, about 80 seconds left",
        "train: step 800 of 1,000, nll 0.800, about 50 seconds left",
        "train: step 920 of 1,000, nll 0.920, about 20 seconds left",
    ]


def test_the_end_is_no_line(capsys, monkeypatch):
    """However long the last step took: the command prints its result."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    bar = progress_bar(2, "train", "step")
    for said in ("train: step 1 of 2, about 40 seconds left\n", ""):
        clock.now += 40
        bar.update()
        assert capsys.readouterr() == ("", said)
    bar.write("a line")
    bar.write("a warning", file=sys.stderr)
    assert capsys.readouterr() == ("a line\n", "a warning\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_title_nothing_is_shown(capsys, monkeypatch, terminal):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar(3, "", "step") as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_other_ranks_show_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setenv("RANK", "1")
    with progress_bar(3, "train", "step") as bar:
        bar.update()
    monkeypatch.setenv("RANK", "0")
    assert capsys.readouterr().err == ""
    with progress_bar(3, "train", "step") as bar:
        bar.update()
    assert capsys.readouterr().err.startswith("train: step 1 of 3, about ")


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # some versions of tqdm take their width from it
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(5, "train", "step", done=2) as bar:
        bar.update(2)
    first, *_, last = capsys.readouterr().err.split("\r")[1:]
    assert first.startswith("train:  40%|") and "| 2/5 [00:00<?, ?step/s]" in first
    assert last.strip() == "", "the line is free again"
    progress_bar(3_000_000, "copy", "B").close()
    assert "| 0.00/3.00M [00:00<?, ?B/s]" in capsys.readouterr().err
