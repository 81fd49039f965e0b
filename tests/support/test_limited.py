"""The process of programs from other people's files: its limits, its end and its beginning."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from scalabl_ref.support import limited, limited_process
from scalabl_ref.support.limited import Failed, ask, match

TALK = [{"role": "user", "content": "Is 2 even?"}]


def render(source, messages=TALK):
    return ask({"source": source, "given": {"messages": messages}})


@pytest.fixture
def limits(monkeypatch):
    """Tighter ones, for the templates' process that the test starts."""
    limited._at_exit()
    monkeypatch.setattr(limited, "SECONDS", 0.5)
    monkeypatch.setattr(limited, "MEMORY", 96 << 20)
    yield
    limited._at_exit()


DOUBLED = (
    "{% set n = namespace(x=['a', 'b']) %}"
    "{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ 'a' * 10**9 }}", "needs more than 96 MiB"),
        ("{{ [[]] * 10**9 }}", "needs more than 96 MiB"),
        ("{{ '%999999999d' % 1 }}", "needs more than 96 MiB"),
        ("{{ '{:999999999}'.format(1) }}", "needs more than 96 MiB"),
        ("{{ 'a' | center(10**9) }}", "needs more than 96 MiB"),
        ("{{ messages | tojson(indent=10**9) }}", "needs more than 96 MiB"),
        ("{% set x = 'ab' %}" + "{% set x = x + x %}" * 60 + "{{ x }}", "needs more than 96 MiB"),
        (DOUBLED + "{{ n.x == n.x[:] ~ '' }}", "needs more than 96 MiB|runs for too long"),
        ("{{ (10 ** 99999) ** 99999 }}", "runs for too long"),
        ("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, "runs for too long"),
        ("{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = n.x * n.x + 1 %}"
         "{% set n.x = n.x * n.x * n.x + 1 %}{% endfor %}", "runs for too long"),
        ("{{ '" + "(" * 5000 + "' }}{{ " + "(" * 5000, "recursion"),
        ("{{ " + "-" * 50_000 + "1 }}", "recursion"),
    ],
)  # fmt: skip
def test_time_and_memory_are_bounded(limits, source, message):
    with pytest.raises(Failed, match=message):
        render(source)
    assert render("{{ 1 + 1 }}") == "2"  # whether the process ended or not


@pytest.mark.parametrize("pattern", ["(.+)+!", "(.?){50}!", "(.|..)+!", ".*" * 30 + "!"])
def test_a_regular_expression_takes_no_longer_than_it_may(pattern):
    limited._at_exit()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(Failed, match="it runs for too long"):
        match(pattern, "model.layers.0.self_attn.q_proj")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # and 0.1 s for it, less than 1 to start
    assert after.ru_utime - before.ru_utime < 2 < limited.SECONDS
    assert match("a(b)?(c)", "acd") == ["ac", None, "c"]
    assert match("a", "ab", whole=True) is None and match("(?i)A", "a", whole=True) == ["a"]


def test_half_of_a_surrogate_pair_comes_back():
    """Whoever encodes the text refuses it, and names it."""
    assert render("{{ '\\ud800' }}x{{ messages[0].content }}", [{"content": "\udfffé"}]) == (
        "\ud800x\udfffé"
    )


def test_a_process_that_was_ended_starts_anew():
    assert render("{{ messages | length }}") == "1"
    process = limited._processes[os.getpid()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert render("x") == "x" and limited._processes[os.getpid()] is not process
    assert process.stdin.closed and process.stdout.closed


def test_an_interrupted_request_does_not_answer_the_next(limits):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            render("{% for i in range(9999) %}{{ messages }}{% endfor %}", TALK * 100)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert render("quick") == "quick"


def test_a_fork_has_a_process_of_its_own(monkeypatch):
    assert render("one") == "one"
    theirs = limited._processes[os.getpid()]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert render("two") == "two" and limited._processes[-1] is not theirs
    limited._at_exit()
    monkeypatch.undo()
    assert render("three") == "three" and limited._processes[os.getpid()] is theirs


def test_the_process_opens_nothing():
    script = (
        "import socket, sys; sys.path.insert(0, sys.argv[1]); import limited_process\n"
        "limited_process._limit(256 << 20)\n"
        "for attempt in (lambda: open('/dev/null'), socket.socket):\n"
        "    try: attempt(); print('opened')\n"
        "    except OSError as error: print(error.strerror)"
    )
    folder = os.path.dirname(limited_process.__file__)
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["Too many open files"] * 2, done.stderr


def test_the_process_leaves_no_trace():
    """No warning at the end of the process that asked, and no process behind it."""
    script = (
        "from scalabl_ref.support import limited; print(limited.match('x', 'x')[0])\n"
        "print(*(process.pid for process in limited._processes.values()))"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    text, pid = done.stdout.split()
    assert text == "x" and done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
