"""The process of limited.py, which says why. It is a program by itself, and starts quickly.

It reads a line of JSON for each request and answers with a line, {"answer": ...} or {"error": ...}.
Requests are {"source": of a chat template} to check it, the same with "given", its variables, to
render it, and {"pattern", "text", "whole"} to match. The process ends with its input.
"""

from __future__ import annotations

import codecs
import json
import re
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def serve(seconds: float, matching: float, memory: int, longest: int) -> None:
    """Answer requests, within the limits that limited.py names.

    A program that takes too long ends the process by SIGPROF, even within one step of Python's.
    """
    environment = _environment()
    _limit(memory)

    @lru_cache(maxsize=1)
    def template(source: str) -> Template:
        return environment.from_string(source)

    def answer(request: dict[str, Any]) -> Any:
        if "pattern" in request:
            signal.setitimer(signal.ITIMER_PROF, matching)
            matcher = re.fullmatch if request["whole"] else re.match
            found = matcher(request["pattern"], request["text"])
            return found and [found[0], *found.groups()]
        compiled, given = template(request["source"]), request.get("given")
        return None if given is None else _text(compiled, given, longest)

    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            said = _line({"answer": answer(json.loads(line))})
        except MemoryError:
            said = _line({"error": f"it needs more than {memory >> 20} MiB"})
        except Exception as error:  # a template can make Python raise anything
            reason = " ".join(str(error)[:1000].split())
            said = _line({"error": reason[:120] or type(error).__name__})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(said)
        sys.stdout.buffer.flush()


def _limit(memory: int) -> None:
    """From here on this process has so much address space, and opens no file and no connection."""
    import pprint  # noqa: F401

    import jinja2.constants  # noqa: F401  jinja2 would import these when it needs them
    import jinja2.debug  # noqa: F401

    datetime.now().astimezone()  # reads the time zone
    codecs.lookup("unicode_escape")  # of the texts in templates
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent's
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # standard input, output and error


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _text(template: Template, given: dict[str, Any], longest: int) -> str:
    parts, length = [], 0
    for part in template.generate(given):
        parts.append(part)
        length += len(part)
        if length > longest:
            raise ValueError(f"it writes more than {longest:,} characters")
    return "".join(parts)


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja2 with the settings and functions that transformers has for templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which only mark a model's text."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's is for HTML

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


if __name__ == "__main__":
    _path, *_limits = json.loads(sys.argv[1])
    sys.path[:] = _path  # the parent's: -I leaves out what PYTHONPATH names
    serve(*_limits)
