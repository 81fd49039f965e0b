"""Answer texts over HTTP, as JSON: POST /predict {"text": "..."} or {"texts": ["...", "..."]}, with
"choices" if the run's questions differ in theirs. GET /health tells whether the server is up. The
run's temperature and threshold are applied. Texts that arrive together are answered together.
SIGTERM or ctrl-C ends the server once it has answered the requests that it accepted. There is no
encryption and no password: other machines should reach it through a proxy that has both."""

from __future__ import annotations

import argparse
import signal
import socket
from typing import TYPE_CHECKING

from ...evaluation.classifier import Classifier, classifier
from ...support.errors import InputError, to_install
from . import options, runs
from .output import Result, say

if TYPE_CHECKING:
    from starlette.applications import Starlette


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_run(parser)
    add("--host", default="127.0.0.1",
        help="address to listen at: 127.0.0.1 is for this machine alone, 0.0.0.0 for "
        "others as well")  # fmt: skip
    add("--port", type=int, default=8000, help="port to listen at; 0: any that is free")
    add("--batch", type=int, default=8,
        help="texts that go through the model at once, if so many wait; with 1 an answer does not "
        "depend on the other texts, to the bit")  # fmt: skip
    add("--max-waiting", type=int, default=256, metavar="TEXTS",
        help="texts that may wait, of all requests; more are refused with status 503")  # fmt: skip
    add("--max-characters", type=int, default=20_000, metavar="N",
        help="longest text; a longer one is refused with status 413")  # fmt: skip
    options.add_samples(parser)
    options.add_raw(parser)


def run(args: argparse.Namespace) -> Result:
    try:
        import uvicorn  # noqa: F401

        from ..server import Limits, application
    except ImportError:
        raise InputError(f"serve needs a web server: {to_install('serve')}") from None
    for name in ("batch", "max_waiting", "max_characters"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    samples = options.samples(args)
    with _bound(args.host, args.port) as listening:
        clf = classifier(
            runs.open_run(args), args.run, samples, args.seed, args.design, args.batch, raw=args.raw
        )
        app = application(clf, Limits(characters=args.max_characters, waiting=args.max_waiting))
        address = _serve(args, clf, app, listening)
    queue = app.state.queue
    say(args, f"ended: {queue.accepted:,} requests accepted, {queue.answered:,} answered")
    return {"address": address, "accepted": queue.accepted, "answered": queue.answered}


def _serve(
    args: argparse.Namespace, clf: Classifier, app: Starlette, listening: socket.socket
) -> str:
    """Serve until SIGTERM or ctrl-C; returns the address."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, http="h11",
        limit_concurrency=args.max_waiting + 64, timeout_keep_alive=30,
    )  # fmt: skip
    host, port = listening.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listening.listen(2048)  # who is told the address may connect at once
    say(args, f"{args.run} answers at http://{address}/predict; ctrl-C ends it")
    runs.say_rule(args, clf)
    # uvicorn ends gracefully and then raises the signal again, which would end us with its code.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return address


def _bound(host: str, port: int) -> socket.socket:
    """A socket at this address, before the model is loaded. It does not listen yet."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo 2^16
        raise InputError(f"--port must be between 0 and 65535, and is {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:  # a host that IDNA cannot write
        raise InputError(f"cannot listen at {host}, port {port}: {error}") from None
    return found
