"""A run behind HTTP: texts in; answers, uncertainties and decisions out, as JSON.

    POST /predict {"text": "Where is my parcel?"}      -> the answer, as `_told` has it
    POST /predict {"texts": ["...", "..."]}            -> {"answers": [...]}, in their order
    GET  /health                                       -> {"status": "ok", "waiting": 0}

"choices" beside the text gives the answers to choose from, for a run whose questions differ in
theirs. A request that cannot be answered has {"error": "..."} and a status from 400 on: 503 if too
many texts wait.

One thread owns the model. Texts that arrive while it works wait; it then takes as many requests as
make a batch. `application` is an ASGI application; `scalabl serve` runs it with uvicorn.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..data import Example
from ..evaluation.classifier import Classifier, Decision
from ..support.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    body: bytes of a request. characters: of one text. waiting: texts that wait for an answer or
    are being answered, and so of one request as well. seconds: in which a body must arrive.
    """

    body: int = 1 << 20
    characters: int = 20_000
    waiting: int = 256
    seconds: float = 10.0


class Queue:
    """The texts that wait for the model, and the thread that answers them."""

    def __init__(self, clf: Classifier, most: int) -> None:
        self.waiting = 0  # texts, with those that are being answered
        self.accepted = self.answered = 0  # requests
        self._clf, self._most = clf, most
        self._requests: asyncio.Queue[tuple[list[Example], asyncio.Future[Any]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "model")

    async def answer(self, examples: list[Example]) -> list[Decision]:
        """The answers to one request. Raises what the classifier raises; 503 if too many wait."""
        if self.waiting + len(examples) > self._most:
            raise HTTPException(503, f"{self.waiting} texts wait: try again later",
                                {"Retry-After": "1"})  # fmt: skip
        future: asyncio.Future[list[Decision]] = asyncio.get_running_loop().create_future()
        self.waiting += len(examples)
        self.accepted += 1
        try:
            self._requests.put_nowait((examples, future))
            return await future
        finally:
            self.answered += future.done()
            self.waiting -= len(examples)

    async def work(self) -> None:
        """Answer requests, a batch at a time, until this is cancelled."""
        while True:
            taken = [await self._requests.get()]
            while sum(len(texts) for texts, _ in taken) < self._clf.batch:
                if self._requests.empty():
                    break
                taken.append(self._requests.get_nowait())
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._thread, self._answers, [t for t, _ in taken])
            for (_, future), result in zip(taken, results, strict=True):
                if future.done():  # cancelled with its request
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _answers(self, requests: Sequence[list[Example]]) -> list[list[Decision] | Exception]:
        """The answers to each request. If one cannot be answered, each is asked by itself."""
        try:
            decisions = iter(self._clf.decisions([e for request in requests for e in request]))
            return [[next(decisions) for _ in request] for request in requests]
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [self._answers([request])[0] for request in requests]


def application(clf: Classifier, limits: Limits | None = None) -> Starlette:
    """The ASGI application that answers with `clf`. Its state.queue counts the requests."""
    limits = limits or Limits()
    queue = Queue(clf, limits.waiting)

    async def predict(request: Request) -> Response:
        asked = _asked(await _body(request, limits), limits)
        examples = clf.examples(asked.texts, asked.choices)
        decisions = await queue.answer(examples)
        found = [_told(examples[0].choices, decision) for decision in decisions]
        return JSONResponse({"answers": found} if asked.many else found[0])

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": queue.waiting})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(queue.work())
        yield
        worker.cancel()  # the server has waited for all requests
        with suppress(asyncio.CancelledError):
            await worker

    app = Starlette(
        routes=[Route("/predict", predict, methods=["POST"]), Route("/health", health)],
        lifespan=lifespan,
        exception_handlers={HTTPException: _refusal, InputError: _refusal, Exception: _failure},
    )
    app.state.queue = queue
    return app


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of a request, unless it is too long or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of a web page cannot send this without asking first
        raise HTTPException(415, "expected the header Content-Type: application/json")
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > limits.body:
                raise HTTPException(413, f"the body has more than {limits.body:,} bytes")

    try:
        await asyncio.wait_for(read(), limits.seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body took more than {limits.seconds:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended within the body") from None
    return bytes(body)


class _Asked(NamedTuple):
    """A request. many: whether it is a list of texts, which gets a list of answers."""

    texts: list[str]
    choices: list[str] | None
    many: bool


def _asked(body: bytes, limits: Limits) -> _Asked:
    """The request in a body, which has text or texts, and perhaps choices."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON, or too deep
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(asked, dict) or ("text" in asked) == ("texts" in asked):
        raise HTTPException(400, 'expected an object with "text" or "texts"')
    if unknown := sorted(set(asked) - {"text", "texts", "choices"}):
        raise HTTPException(400, f"unknown field {unknown[0][:60]!r}")
    texts, choices = asked.get("texts", [asked.get("text")]), asked.get("choices")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise HTTPException(400, '"text" must be a string, and "texts" a list of strings')
    if choices is not None and not (
        isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    ):
        raise HTTPException(400, '"choices" must be a list of strings')
    if not 1 <= len(texts) <= limits.waiting:
        raise HTTPException(413 if texts else 400, f"expected 1 to {limits.waiting} texts")
    if max(map(len, [*texts, *(choices or [])])) > limits.characters:
        raise HTTPException(413, f"a text has more than {limits.characters:,} characters")
    return _Asked(texts, choices, "texts" in asked)


def _told(choices: Sequence[str], decision: Decision) -> dict[str, Any]:
    """A decision as JSON: the fields of `Decision`, and the choices in the order of `probs`."""
    told = {"choices": choices, **decision._asdict()}
    if decision.decision is None:  # the run has no threshold
        del told["decision"]
    return told


async def _refusal(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": str(error)}, 422)


async def _failure(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return JSONResponse({"error": "the server failed; its log says why"}, 500)
