"""`scalabl serve` as a process with sockets: load, its end, and requests that are no HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("uvicorn")

import scalabl_ref
from scalabl_ref.app import cli

from ..commands import ok, refused

TRAIN = "train --model model --data tickets.jsonl --out run --steps 6 --batch 4 --rank 2"
HEADERS = {"Content-Type": "application/json"}


class Server:
    """A running `scalabl serve`. end: stop it by SIGTERM; returns its counts."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "scalabl_ref", "serve", "--run", "run", "--port", "0",
                   "--json", *(options or ("--samples", "2"))]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        line = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/predict", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])

    def ask(self, text: str | list[str]) -> tuple[int, dict]:
        body = {"text" if isinstance(text, str) else "texts": text}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", "/predict", json.dumps(body), HEADERS)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def raw(self, data: bytes) -> bytes:
        """The first line of the answer to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as wire:
            wire.sendall(data)
            with wire.makefile("rb") as answer:
                return answer.readline()

    def end(self) -> dict:
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        told = json.loads(out)
        counts = f"ended: {told['accepted']:,} requests accepted, {told['answered']:,} answered\n"
        assert err.endswith(counts)
        return told


@contextmanager
def serving(*options: str):
    server = Server(*options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


@pytest.fixture
def trained(tickets, capsys):
    ok(TRAIN, capsys)


def test_nothing_is_lost_at_its_end(trained):
    """32 clients ask without a pause while SIGTERM comes: each accepted request is answered."""
    wanted = scalabl_ref.load("run", samples=300)("ticket 7")
    answers, others = [], []
    with serving("--batch", "1", "--samples", "300") as server:

        def client() -> None:
            try:
                while True:
                    answers.append(server.ask("ticket 7"))
            except OSError as error:  # refused, or not accepted before the end
                others.append(error)

        clients = [threading.Thread(target=client) for _ in range(32)]
        for each in clients:
            each.start()
        while len(answers) < 64:
            assert server.process.poll() is None and not others
            time.sleep(0.01)
        told = server.end()
        for each in clients:
            each.join(60)
    assert told["accepted"] == told["answered"] == len(answers) >= 64 and len(others) == 32
    for status, answer in answers:
        assert status == 200 and tuple(answer["probs"]) == wanted.probs


def malformed(rng: Random) -> bytes:
    """A request that a server must refuse: its line, a header, length, parts or body."""
    body = rng.choice((b"{", b"[]", b'{"text": 1}', b'{"text": ""}', b"\xff", b"{}", b"null"))
    good = b'{"text": "a"}'
    line, host, kind = b"POST /predict HTTP/1.1", b"Host: x", b"Content-Type: application/json"
    length = b"Content-Length: "
    chunked = [line, host, kind, b"Transfer-Encoding: chunked"]
    junk = bytes(rng.choice(b"\x01\x02{}<>@,;\x7f\xc3") for _ in range(rng.randint(1, 40)))
    head, rest = rng.choice((
        ([line, host, kind, length + b"%d" % len(body)], body),
        ([junk + b" / HTTP/1.1", host], b""),
        ([b"POST /predict HTTP/" + rng.choice((b"9", b"x.1", b"", b"1.1.1")), host], b""),
        ([b"POST  /predict HTTP/1.1" + junk, host], b""),
        ([line, kind, length + b"13"], good),  # no host
        ([line, host, host, kind, length + b"13"], good),
        ([line, host, junk], b""),
        ([line, host, kind, length + rng.choice((b"-1", b"1x", b"", b"1, 2", b"0x5"))], good),
        ([line, host, kind, length + b"13", length + b"14"], good),
        (chunked, rng.choice((b"zz\r\n", b"-5\r\n", b"5 5\r\n", b"\r\n\r\n")) + good),
        ([line, host, b"Content-Type: text/plain", length + b"13"], good),
        ([line, host, b"X: " + b"y" * 400_000, kind, length + b"13"], good),
        ([rng.choice((b"GET", b"PUT", b"DELETE")) + b" /predict HTTP/1.1", host], b""),
        ([b"POST /" + bytes(rng.choice(b"abc%/.") for _ in range(9)) + b" HTTP/1.1", host], b""),
    ))  # fmt: skip
    return b"\r\n".join(head) + b"\r\n\r\n" + rest


def test_malformed_requests_are_refused(trained):
    """2,000 of them; then the server still answers, and has counted none of them."""
    rng, seen = Random(0), {}
    with serving() as server:
        for _ in range(2000):
            data = malformed(rng)
            answer = server.raw(data)
            found = re.match(rb"HTTP/1\.1 (4\d\d) ", answer)
            assert found, (data[:300], answer)
            seen[found[1]] = seen.get(found[1], 0) + 1
        assert server.ask("ticket 7")[0] == 200
        assert server.end()["accepted"] == 1
    assert set(seen) == {b"400", b"404", b"405", b"415", b"422"}, seen


def test_the_runs_temperature_is_applied(trained, capsys):
    """And --raw leaves it out; seed, design, base and limits are those of the options."""
    draws = "--samples 2 --seed 5 --design latin"
    ok(f"calibrate --run run --data others.jsonl {draws}", capsys)
    with serving(*draws.split()) as server:
        answer = server.ask("ticket 7")[1]
    assert tuple(answer["probs"]) == scalabl_ref.load("run")("ticket 7").probs
    Path("model").rename("moved")
    options = f"{draws} --raw --model moved --max-characters 20 --max-waiting 3"
    with serving(*options.split()) as server:
        answer = server.ask("ticket 7")[1]
        assert server.ask("x" * 20)[0] == 200 and server.ask("x" * 21)[0] == 413
        assert server.ask(["a", "b", "c"])[0] == 200 and server.ask([*"abcd"])[0] == 413
        told = server.end()
    assert (told["accepted"], told["answered"]) == (3, 3)
    assert told["address"] == f"127.0.0.1:{server.port}"
    clf = scalabl_ref.load("run", "moved", samples=2, seed=5, design="latin", raw=True)
    assert tuple(answer["probs"]) == clf("ticket 7").probs


def test_what_cannot_be_served_is_refused(trained, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = f"serve --run run --port {port}"
        assert f"cannot listen at 127.0.0.1, port {port}" in refused(taken, capsys)
        there = f"cannot listen at a..b, port {port}"  # a name of no host
        assert there in refused(f"{taken} --host a..b", capsys)
        for option in ("--batch", "--max-waiting", "--max-characters"):
            assert f"{option} must be at least 1" in refused(f"{taken} {option} 0", capsys)
    assert "between 0 and 65535" in refused("serve --run run --port 99999", capsys)
    assert "no such folder" in refused("serve --run nowhere --port 0", capsys)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install -e '.[serve]' in the clone" in refused("serve --run run --port 0", capsys)
    assert cli.COMMANDS["serve"]
