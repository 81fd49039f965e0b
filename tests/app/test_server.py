"""The server as an ASGI application: its answers, its queue and its limits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random

import pytest
import torch

pytest.importorskip("starlette")

import scalabl_ref
from scalabl_ref import InputError
from scalabl_ref.app.server import Limits, application
from scalabl_ref.evaluation.classifier import Classifier

from ..damage import TEXTS, damaged_bytes, damaged_value, written
from ..tolerances import rounding
from .commands import ok

JSON = (b"content-type", b"application/json")


@pytest.fixture
def clf(tickets, capsys):
    ok("train --model model --data tickets.jsonl --out run --steps 6 --batch 4 --rank 2", capsys)
    return scalabl_ref.load("run", samples=2)


@pytest.fixture
def mixed(work, capsys):
    """A classifier of questions with different choices."""
    ok("train --model model --data train.jsonl --out run --steps 2 --batch 4 --rank 2 "
       "--labels letters", capsys)  # fmt: skip
    clf = scalabl_ref.load("run", samples=2)
    return replace(clf, wording=replace(clf.wording, names=None))


async def call(app, body: bytes, path="/predict", method="POST", headers=(JSON,), parts=None):
    """The status, headers and JSON of the answer to one request. parts: seconds before each."""
    chunks = [(0.0, body)] if parts is None else list(parts)
    sent: list[dict] = []

    async def receive() -> dict:
        if not chunks:
            return {"type": "http.disconnect"}
        seconds, chunk = chunks.pop(0)
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
             "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
             "root_path": "", "headers": list(headers), "client": None, "server": None}  # fmt: skip
    with_error = None
    try:
        await app(scope, receive, send)
    except Exception as error:  # Starlette answers with 500, and raises it for the server's log
        with_error = error
    start = next(m for m in sent if m["type"] == "http.response.start")
    text = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    assert (with_error is not None) == (start["status"] == 500), with_error
    return start["status"], dict(start["headers"]), json.loads(text)


def served(clf, use: Callable[..., Awaitable], limits: Limits | None = None):
    """What `use(app)` returns, inside the application's life."""

    async def life():
        app = application(clf, limits)
        async with app.router.lifespan_context(app):
            return await use(app)

    return asyncio.run(life())


def ask(**fields) -> bytes:
    return json.dumps(fields).encode()


def test_an_answer_is_the_classifiers(clf):
    """To the bit: alone, in a list, and with the choices given."""
    texts = ["Where is my parcel?", "I want my money back."]
    charset = ((b"content-type", b"Application/JSON ; charset=utf-8"),)

    async def use(app):
        return [
            await call(app, ask(texts=texts)),
            await call(app, ask(text=texts[1])),
            await call(app, ask(text=texts[1], choices=clf.classes_[::-1])),
            await call(app, ask(texts=texts[1:])),
            await call(app, ask(text=texts[1]), headers=charset),
        ]

    answers = served(replace(clf, threshold=0.3), use)
    many, one, turned, list_of_one, with_charset = (told for _, _, told in answers)
    decisions = replace(clf, threshold=0.3).decide(texts)
    assert [status for status, _, _ in answers] == [200] * 5
    assert many["answers"][1] == one == turned == with_charset
    assert list_of_one == {"answers": [one]}
    for told, decision in zip(many["answers"], decisions, strict=True):
        assert told.pop("choices") == clf.classes_
        assert told == json.loads(json.dumps(decision._asdict()))
    assert one["decision"] in ("answer", "human")


def test_limits_are_those_of_the_guide():
    assert Limits() == Limits(body=2**20, characters=20_000, waiting=256, seconds=10.0)


class Slow(Classifier):
    """Waits, before each batch, until `go`; remembers the size of each."""

    def decisions(self, examples, title=""):
        self.sizes.append(len(examples))
        assert self.go.wait(60)
        if self.broken:
            raise MemoryError("no memory")
        return super().decisions(examples, title)


def slow(clf: Classifier, batch: int) -> Slow:
    found = Slow(**{**vars(clf), "batch": batch})
    vars(found).update(sizes=[], go=threading.Event(), broken=False)
    return found


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited a minute in vain")


def test_waiting_requests_are_answered_together(clf):
    """While the first is answered, seven wait; four make a batch, and a bad one hurts nobody."""
    texts = [f"ticket {i}" for i in range(8)]
    gate = slow(clf, 4)

    async def use(app):
        calls = [asyncio.create_task(call(app, ask(text=texts[0])))]
        await until(lambda: gate.sizes == [1])
        for text in [*texts[1:], "long " * 3000]:
            calls.append(asyncio.create_task(call(app, ask(text=text))))
        await until(lambda: app.state.queue.waiting == 9)
        gate.go.set()
        return [await each for each in calls]

    answers = served(gate, use)
    # The last batch is 3 texts and one that is too long: each of them is then asked by itself.
    assert gate.sizes == [1, 4, 4, 1, 1, 1, 1]
    *good, (status, _, refused) = answers
    assert status == 422 and "tokens" in refused["error"]
    for text, (status, _, told) in zip(texts, good, strict=True):
        alone = clf(text)
        for got, want in zip(told["probs"], alone.probs, strict=True):
            assert status == 200 and abs(got - want) <= rounding(torch.float32, 64)


def test_a_batch_is_counted_in_texts_not_requests(clf):
    """Three texts are fewer than a batch of four, so the next request's two join them."""
    gate = slow(clf, 4)

    async def use(app):
        calls = []
        for count, waiting in ((1, 1), (3, 4), (2, 6), (1, 7)):
            calls.append(asyncio.create_task(call(app, ask(texts=["a"] * count))))
            await until(lambda: app.state.queue.waiting == waiting)  # noqa: B023
            await until(lambda: gate.sizes == [1])
        gate.go.set()
        return [(await each)[0] for each in calls]

    assert served(gate, use) == [200] * 4 and gate.sizes == [1, 5, 1]


def test_nothing_waits_once_all_is_answered(clf):
    """Whatever a request asks: one text, several, or one that is too long."""

    async def use(app):
        texts = (["one"], ["one", "two", "three"], ["one", "long " * 3000])
        answers = [await call(app, ask(texts=each)) for each in texts]
        return [status for status, _, _ in answers], app.state.queue.waiting

    assert served(clf, use) == ([200, 200, 422], 0)


def test_a_request_that_is_given_up_hurts_nobody_of_its_batch(clf):
    gate = slow(clf, 4)

    async def use(app):
        calls = [asyncio.create_task(call(app, ask(text=f"ticket {i}"))) for i in range(4)]
        await until(lambda: app.state.queue.waiting == 4)
        calls[1].cancel()
        await asyncio.wait(calls[1:2])
        gate.go.set()
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)

    first, given_up, *others = served(gate, use)
    assert isinstance(given_up, asyncio.CancelledError)
    assert [status for status, _, _ in (first, *others)] == [200] * 3


def test_a_full_queue_refuses(clf):
    gate = slow(clf, 1)

    async def use(app):
        first = asyncio.create_task(call(app, ask(texts=["a", "b"])))
        await until(lambda: gate.sizes == [2])
        health = await call(app, b"", "/health", "GET")
        full = await call(app, ask(texts=["c", "d"]))
        last = asyncio.create_task(call(app, ask(text="c")))
        await until(lambda: app.state.queue.waiting == 3)
        gate.go.set()
        queue = app.state.queue
        return health, full, await first, await last, (queue.accepted, queue.answered)

    health, full, first, last, counts = served(gate, use, Limits(waiting=3))
    assert health[2] == {"status": "ok", "waiting": 2}
    assert full[0] == 503 and full[1][b"retry-after"] == b"1" and "wait" in full[2]["error"]
    assert first[0] == last[0] == 200 and counts == (2, 2)


def test_a_failure_is_answered_and_the_server_goes_on(clf, caplog):
    gate = slow(clf, 1)
    gate.go.set()

    async def use(app):
        vars(gate)["broken"] = True
        failed = await call(app, ask(text="a"))
        vars(gate)["broken"] = False
        return failed, await call(app, ask(text="a"))

    failed, again = served(gate, use)
    assert failed[0] == 500 and "no memory" not in failed[2]["error"]
    assert "no memory" in caplog.text and again[0] == 200
    assert {record.name for record in caplog.records} == {"scalabl_ref.app.server"}


REFUSED = {
    "no JSON": (b"{", 400),
    "no text of UTF-8": (b'{"text": "\xff"}', 400),
    "too deep": (b"[" * 200_000, 400),
    "no object": (b"[1]", 400),
    "neither field": (b"{}", 400),
    "both fields": (ask(text="a", texts=["a"]), 400),
    "unknown field": (ask(text="a", seed=1), 400),
    "no string": (ask(text=1), 400),
    "no list": (ask(texts="abc"), 400),
    "a list of others": (ask(texts=["a", None]), 400),
    "choices of another kind": (ask(text="a", choices="ab"), 400),
    "choices of others": (ask(text="a", choices=["b", 1]), 400),
    "no texts": (ask(texts=[]), 400),
    "too many texts": (ask(texts=["a"] * 4), 413),
    "a long text": (ask(text="a" * 101), 413),
    "a long choice": (ask(text="a", choices=["b", "c" * 101]), 413),
    "a long body": (b" " * 300_000 + ask(text="a"), 413),
    "an empty text": (ask(text=""), 422),
    "half a pair": (ask(text="\ud800"), 422),
    "other choices": (ask(text="a", choices=["yes", "no"]), 422),
}


def test_bad_requests_are_refused_with_a_reason(clf):
    limits = Limits(body=300_000, characters=100, waiting=3, seconds=0.5)

    async def use(app):
        found = {name: await call(app, body) for name, (body, _) in REFUSED.items()}
        plain = ((b"content-type", b"text/plain"),)
        found["kind"] = await call(app, ask(text="a"), headers=plain)
        found["no kind"] = await call(app, ask(text="a"), headers=())
        found["slow"] = await call(app, b"", parts=[(0, b"{"), (1, b"}")])
        found["cut"] = await call(app, b"", parts=[])
        found["path"] = await call(app, ask(text="a"), "/nowhere")
        found["method"] = await call(app, b"", method="GET")
        return found

    found = served(clf, use, limits)
    wanted = {name: status for name, (_, status) in REFUSED.items()}
    wanted |= {"kind": 415, "no kind": 415, "slow": 408, "cut": 400, "path": 404, "method": 405}
    assert {name: status for name, (status, _, _) in found.items()} == wanted
    assert all(isinstance(told["error"], str) and told["error"] for _, _, told in found.values())
    said = {
        "unknown field": "unknown field 'seed'",
        "no texts": "expected 1 to 3 texts",
        "too many texts": "expected 1 to 3 texts",
        "a long choice": "a text has more than 100 characters",
        "a long body": "the body has more than 300,000 bytes",
        "slow": "the body took more than 0.5 s",
        "cut": "the connection ended within the body",
    }
    assert {name: found[name][2]["error"] for name in said} == said


def test_a_limit_itself_is_allowed_and_no_threshold_gives_no_decision(clf):
    limits = Limits(body=300_000, characters=100, waiting=3)
    body = ask(text="x" * 100)

    async def use(app):
        whole = body + b" " * (300_000 - len(body))
        return [await call(app, data) for data in (whole, ask(texts=["a"] * 3), whole + b" ")]

    one, several, more = served(clf, use, limits)
    assert (one[0], several[0], more[0]) == (200, 200, 413)
    assert len(several[2]["answers"]) == 3 and "decision" not in one[2]


def body(rng: Random) -> bytes:
    """The body of a request, damaged or with odd texts in it."""
    texts = [rng.choice(TEXTS[:-1]) for _ in range(rng.randint(1, 3))]
    value = {"text": texts[0]} if rng.random() < 0.4 else {"texts": texts}
    if rng.random() < 0.4:
        value["choices"] = rng.sample(TEXTS, rng.randint(0, 4))
    if rng.random() < 0.6:
        value = damaged_value(rng, value)
    data = written(rng, value)
    return damaged_bytes(rng, data) if rng.random() < 0.2 else data


def check_bodies(clf, count: int, seed: int) -> None:
    """Each is answered with 200 or refused with 400, 413 or 422, and a reason."""

    async def use(app):
        rng, seen = Random(seed), {}
        for _ in range(count):
            data = body(rng)
            status, _, told = await call(app, data)
            assert status in (200, 400, 413, 422), (data, told)
            assert status == 200 or told["error"], data
            seen[status] = seen.get(status, 0) + 1
        return seen

    seen = served(replace(clf, samples=0), use, Limits(characters=4000))
    assert min(seen[status] for status in (200, 400, 413, 422)) >= count // 100, seen


def test_a_few_damaged_bodies(clf):
    check_bodies(clf, 300, 1)


def test_a_few_damaged_bodies_for_questions_with_their_own_choices(mixed):
    check_bodies(mixed, 300, 2)


@pytest.mark.slow
def test_many_damaged_bodies(mixed):
    check_bodies(mixed, 20_000, 0)


def test_without_choices_a_run_of_mixed_questions_says_so(mixed):
    with pytest.raises(InputError, match="--choices"):
        mixed.choices(None)
    status, _, told = served(mixed, lambda app: call(app, ask(text="a")))
    assert status == 422 and "--choices" in told["error"]
