"""The load that `scalabl serve` bears, and whether it loses a request when it ends.

    python tools/load_test.py --run RUN --data FILE --format F [--clients 32] [--seconds 20]
        [-- further options of `scalabl serve`]

Each client has one connection and asks text after text. The time of a request is the client's own.
The clients are threads of this process, on the same machine as the server. At the end the server
gets SIGTERM while all of them ask: exit code 1 if it has accepted a request whose answer no client
has, or if an answer had another status than 200.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from bench import machine

from scalabl_ref.data import load

HEADERS = {"Content-Type": "application/json"}


@dataclass
class Seen:
    """What the clients have seen: seconds of each answer, their statuses, and the clients' ends."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)


def client(port: int, texts: itertools.cycle[str], seen: Seen, stop: threading.Event) -> None:
    """Ask until `stop`, or until the server is gone."""
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            while not stop.is_set():
                body = json.dumps({"text": next(texts)})
                start = time.perf_counter()
                connection.request("POST", "/predict", body, HEADERS)
                response = connection.getresponse()
                response.read()
                seen.statuses[response.status] += 1
                seen.seconds.append(time.perf_counter() - start)
    except (OSError, http.client.HTTPException) as error:
        seen.ends[type(error).__name__] += 1


def asked(port: int, texts: itertools.cycle[str], clients: int, seconds: float) -> Seen:
    """`clients` at once, for this long."""
    seen, stop = Seen(), threading.Event()
    threads = [
        threading.Thread(target=client, args=(port, texts, seen, stop)) for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--format", default="csv")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    args, further = parser.parse_known_args()
    texts = itertools.cycle([example.question for example in load(args.data, args.format)])
    command = [sys.executable, "-m", "scalabl_ref", "serve", "--run", str(args.run), "--port", "0",
               "--json", *(option for option in further if option != "--")]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = server.stderr.readline()
    found = re.search(r":(\d+)/predict", line)
    if not found:
        sys.exit(line + server.stderr.read())
    port = int(found[1])
    warm = asked(port, texts, 1, 2)
    one = asked(port, texts, 1, args.seconds / 4)
    many = asked(port, texts, args.clients, args.seconds)
    threading.Timer(2, lambda: server.send_signal(signal.SIGTERM)).start()
    last = asked(port, texts, args.clients, 4)
    told = json.loads(server.communicate(timeout=120)[0])
    print(", ".join(f"{key} {value}" for key, value in machine().items()), end="\n\n")
    print("| clients | requests/s | median ms | p99 ms |\n|---|---|---|---|")
    for clients, seen, seconds in ((1, one, args.seconds / 4), (args.clients, many, args.seconds)):
        cuts = statistics.quantiles(seen.seconds, n=100)
        print(f"| {clients} | {len(seen.seconds) / seconds:.1f} | {cuts[49] * 1e3:.1f} "
              f"| {cuts[98] * 1e3:.1f} |")  # fmt: skip
    answers = sum((warm.statuses, one.statuses, many.statuses, last.statuses), Counter())
    ends = ", ".join(f"{count} {name}" for name, count in last.ends.items())
    print(f"\nSIGTERM under load: {told['accepted']} accepted, {told['answered']} answered; "
          f"answers that clients have, by status: {dict(answers)}; ends: {ends}")  # fmt: skip
    return int(not told["accepted"] == told["answered"] == answers[200] == answers.total())


if __name__ == "__main__":
    sys.exit(main())
