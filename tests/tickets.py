"""Support tickets and the queue each belongs to: made-up sentences, five long labels."""

from __future__ import annotations

import json
import random
from pathlib import Path

# Queue: what goes wrong, and with what.
QUEUES = {
    "Hardware fault or replacement of a device": (
        ("makes a grinding noise", "does not turn on", "has a cracked screen", "gets too hot",
         "shuts down after a minute", "shows only half of the picture"),
        ("laptop", "monitor", "docking station", "keyboard", "desk phone", "webcam"),
    ),
    "Software installation and licence requests": (
        ("asks for a licence key", "cannot be installed", "is out of date", "needs an upgrade",
         "is not on my list of programs", "says that the trial has ended"),
        ("spreadsheet program", "photo editor", "compiler", "drawing tool", "mail client",
         "statistics package"),
    ),
    "Access rights, accounts and passwords": (
        ("says my password is wrong", "has locked me out", "does not let me sign in",
         "sends no code for the second factor", "tells me that I have no permission",
         "wants a password that I never had"),
        ("payroll portal", "shared drive", "wiki", "ticket system", "time sheet", "test server"),
    ),
    "Invoices, payments and refunds": (
        ("was charged twice", "shows the wrong amount", "has not been paid", "lacks our tax number",
         "should be refunded", "arrived after the due date"),
        ("invoice for March", "yearly subscription", "credit note", "last order", "card payment",
         "travel expense"),
    ),
    "Network, Wi-Fi and remote connections": (
        ("drops every few minutes", "is very slow", "does not reach the third floor",
         "gives me no address", "times out from home", "only works with the cable"),
        ("wireless network", "VPN", "connection to the branch", "video call line", "guest network",
         "remote desktop"),
    ),
}  # fmt: skip
FRAMES = (
    "Hello, the {thing} {fault}. Can you help?",
    "Since Monday our {thing} {fault}.",
    "{name} here. My {thing} {fault}, and I have a deadline today.",
    "The {thing} {fault}. I restarted everything twice.",
    "Please have a look: the {thing} {fault}. Thanks, {name}",
    "Nobody in our team can work, as the {thing} {fault}.",
)
NAMES = ("Ana", "Bo", "Chen", "Dina", "Emre", "Femi")


def tickets(count: int, seed: int) -> list[dict[str, object]]:
    """Rows of a jsonl file, a pure function of the seed; one in ten is in a wrong queue."""
    source = random.Random(seed)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        queue = source.choice(list(QUEUES))
        faults, things = QUEUES[queue]
        words = {"thing": source.choice(things), "fault": source.choice(faults)}
        text = source.choice(FRAMES).format(**words, name=source.choice(NAMES))
        if source.random() < 0.1:
            queue = source.choice(list(QUEUES))
        rows.append({"prompt": text, "choices": list(QUEUES), "label": list(QUEUES).index(queue)})
    return rows


def write_tickets(path: Path, count: int, seed: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in tickets(count, seed)))
    return path
