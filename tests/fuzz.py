"""Structure-aware fuzzing of everything that reads files: `python -m tests.fuzz KIND COUNT [SEED]`.

An input is a small valid file, damaged where its format has meaning: lengths, shapes, offsets,
types, names, opcodes, members, columns; or anywhere. A reader has to accept it or to raise an
InputError of one line that names a file. A fault is anything else: another exception, more than
SECONDS of the processor's, more memory than twice the file's size (RATIO has exceptions) and SLACK,
a file made or removed elsewhere, a process or a connection. The result is one line of JSON; a crash
of this process names its input in FOLDER/now, and every faulty input is kept beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickletools
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from scalabl_ref import InputError
from scalabl_ref.data import FORMATS, load, texts
from scalabl_ref.support import limited_process
from scalabl_ref.support.tensors import buffer, load_pickle, load_tensors, save_tensors

from .damage import INTEGERS, damaged_bytes, damaged_value, written
from .fuzz_models import (
    make_chat,
    make_peft,
    make_sentencepiece,
    make_tokenizer,
    read_chat,
    read_peft_folder,
    read_tokenizer,
)

SECONDS = 10.0
SLACK = 24 << 20  # bytes: what an allocator and an import may take by themselves
# How much memory a file may take, in units of its size. Examples become Python objects, some twenty
# for a short row: no attack, but more than their text.
RATIO = {"examples": 16, "rows": 16}
WARM = 20  # inputs before the first that is judged: what readers import takes memory too
SPACE = 3 << 30  # bytes of address space beyond what is there before the first input


# --- Kinds of file: how one is made and damaged, and what reads it --------------------------------


def _tensors(large: bool) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    size = 1 << 20 if large else 40
    return {
        "layers.0.A": torch.randn(4, size, generator=g),
        "layers.0.B": torch.randn(3, 5, generator=g).bfloat16(),
        "ids": torch.arange(6),
        "empty": torch.empty(0, 3),
    }


def make_safetensors(rng: Random, large: bool, folder: Path) -> bytes:
    save_tensors(folder / "base", _tensors(large).items(), {"about": "x"})
    whole = (folder / "base").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = whole[8 : 8 + length], whole[8 + length :]
    kind = rng.random()
    if kind < 0.6:
        header = written(rng, damaged_value(rng, json.loads(header)))
        told = len(header) if kind < 0.5 else rng.choice(INTEGERS) % 2**64
        body = damaged_bytes(rng, body) if rng.random() < 0.2 else body
        return struct.pack("<Q", told) + header + body
    return damaged_bytes(rng, whole)


def read_safetensors(path: Path) -> None:
    tensors, _ = load_tensors(path)
    for tensor in tensors.values():
        tensor.double().sum() if tensor.numel() < 1000 else tensor.sum()


def make_pth(rng: Random, large: bool, folder: Path) -> bytes:
    buffer = io.BytesIO()
    modern = rng.random() < 0.8
    value = {"state": _tensors(large), "step": 3, "names": ["a", "b"]}
    torch.save(value, buffer, _use_new_zipfile_serialization=modern)
    whole = buffer.getvalue()
    if rng.random() < 0.3:
        return damaged_bytes(rng, whole)
    if not modern:
        return _damaged_pickle(rng, whole)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            data, packed = old.read(name), zipfile.ZIP_STORED
            if name == chosen or name.endswith("data.pkl") and rng.random() < 0.5:
                kind = rng.random()
                if kind < 0.1:
                    continue
                if kind < 0.2:
                    name = rng.choice(("../../escape", "/escape", "archive/data/9", name + "x"))
                elif kind < 0.3:
                    data, packed = bytes(32 << 20), zipfile.ZIP_DEFLATED
                elif name.endswith("data.pkl"):
                    data = _damaged_pickle(rng, data)
                else:
                    data = damaged_bytes(rng, data)
            new.writestr(zipfile.ZipInfo(name), data, packed, compresslevel=1)
    return out.getvalue()


def _damaged_pickle(rng: Random, data: bytes) -> bytes:
    """An opcode's argument changed, an opcode put in, or a global named that runs code."""
    try:
        places = [at for _, _, at in pickletools.genops(data) if at is not None]
    except Exception:
        places = [0]
    at = rng.choice(places)
    kind = rng.random()
    if kind < 0.3:
        evil = rng.choice((b"cos\nsystem\n", b"cbuiltins\neval\n", b"csubprocess\nPopen\n"))
        return data[:2] + evil + b"(X\x04\x00\x00\x00exittR" + data[2:]
    if kind < 0.6:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind < 0.8:
        huge = rng.choice(
            (
                b"\x8a\xff",
                b"J\xff\xff\xff\x7f",
                b"X\xff\xff\xff\x7f",
                b"2" * 50,
                b"r\xff\xff\xff\x7f",
            )
        )
        return data[:at] + huge + data[at:]
    return damaged_bytes(rng, data)


def read_pth(path: Path) -> None:
    load_pickle(path)


def make_llama2c(rng: Random, large: bool, folder: Path) -> bytes:
    dim, hidden, layers, heads, kv, vocab, length = 8, 12, 2, 2, 1, 16, 10
    if large:
        vocab = 1 << 16
    sizes = [vocab * dim, layers * dim, layers * dim * dim, 2 * layers * dim * dim // 2]
    sizes += [layers * dim * dim, layers * dim, 3 * layers * dim * hidden, dim, length * dim // 2]
    g = torch.Generator().manual_seed(0)
    values = torch.randn(sum(sizes), generator=g)
    head = [dim, hidden, layers, heads, kv, vocab, length]
    body = bytes(buffer(values))
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(7)
            number = rng.choice(INTEGERS) if rng.random() < 0.7 else head[at] * rng.choice((2, -1))
            head[at] = (number + 2**31) % 2**32 - 2**31
        return struct.pack("<7i", *head) + body
    return damaged_bytes(rng, struct.pack("<7i", *head) + body)


def read_llama2c(path: Path) -> None:
    from llama2c import read_llama2c as read

    _, tensors = read(path)
    for stored in tensors.values():
        stored.read().sum()


_ARC = {"id": "q", "answerKey": "B", "question": {"stem": "Why?", "choices": [
    {"text": "this", "label": "A"}, {"text": "that", "label": "B"}]}}  # fmt: skip
_LISTS = {"text": ["this", "that"], "label": ["A", "B"]}
_ROWS: dict[str, list[Any]] = {  # as published, and as the Hub has them
    "jsonl": [
        {"prompt": "Why?", "choices": ["this", "that"], "label": 1},
        {"prompt": "Why?", "choices": ["this", "that"], "label": "that"},
    ],
    "arc": [_ARC, {"id": "q", "question": "Why?", "choices": _LISTS, "answerKey": "B"}],
    "obqa": [_ARC, {"id": "q", "question_stem": "Why?", "choices": _LISTS, "answerKey": "B"}],
    "winogrande": [
        {"qID": "q", "sentence": "A _ b.", "option1": "x", "option2": "y", "answer": "2"}
    ],
    "boolq": [
        {"question": "is it", "passage": "It is.", "answer": True},
        {"question": "is it", "passage": "It is.", "idx": 0, "label": 1},
    ],
    "mmlu": [
        {"question": "Why?", "subject": "maths", "choices": ["a", "b", "c", "d"], "answer": 2}
    ],
    "sst2": [{"idx": 0, "sentence": "a fine film ", "label": 1}],
    "trec": [{"text": "What is it ?", "coarse_label": 1, "fine_label": 2}],
}
_TEXTS = {
    "jsonl": [b'{"prompt": "a", "label": "x"}\n{"prompt": "b", "label": "y"}\n'],
    "arc": [
        b"id,question,choices,answerKey\n"
        b"q,Why?,\"{'text': array(['this', 'that'], dtype=object),\n"
        b" 'label': array(['A', 'B'], dtype=object)}\",B\n"
    ],
    "mmlu": [
        b'question,choice0,choice1,choice2,choice3,answer\n"Why, so?",a,b,c,d,2\nHow?,a,b,c,d,0\n',
        b"question,subject,choices,answer\nWhy?,maths,\"['a' 'b'\n 'c' 'd']\",2\n",
    ],
    "sst2": [
        b"1 a fine film\n0 a poor one\n",
        b"sentence\tlabel\na fine film \t1\na poor one \t0\n",
    ],
    "trec": [
        b"ABBR:exp What is it ?\nNUM:count How many ?\n",
        b"text,coarse_label,fine_label\nWhat is it ?,1,2\n",
    ],
    "csv": [
        b'text,label\n"a, ""b""",x\n"c\nd",y\n',
        b"id\tsentence\tclass\n1\ta b\t1\n2\tc d\t0\n",
        b"text;target\na;x\nb;y\n",
    ],
}


def make_examples(rng: Random, large: bool, folder: Path) -> bytes:
    """Rows of the format that the first byte of the file's seed chooses: see read_examples."""
    format = FORMATS[rng.randrange(len(FORMATS))]
    (folder / "format").write_text(format)
    if format not in _ROWS or format in _TEXTS and rng.random() < 0.5:
        text = rng.choice(_TEXTS[format])
        return damaged_bytes(rng, text) + text * (50_000 if large else 1)
    row = rng.choice(_ROWS[format])
    lines = [json.dumps(row).encode()] * rng.randint(0, 3)
    lines.insert(rng.randint(0, len(lines)), written(rng, damaged_value(rng, row)))
    if large:
        lines += [json.dumps(row).encode()] * 50_000
    data = b"\n".join(lines) + rng.choice((b"\n", b"", b"\r\n"))
    if rng.random() < 0.3:
        data = b"[" + b",\n".join(lines) + b"]"
    return data if rng.random() < 0.7 else damaged_bytes(rng, data)


def read_examples(path: Path) -> None:
    load(path, (path.parent / "format").read_text())


_SENTENCES = ("The crab was near the boat, and slept.", "We saw the cow by the barn; it ate hay.")
_ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "latin-1", "cp1252", "utf-7", "utf-16-le")
_CELLS = ("", " ", '"', '""', '"a', 'a"b', "a,b", "a\tb", "a;b", "a\rb", "a\nb", "\x00", "\ufeff",
          "\u2028", "\x85", "x" * 140_000, "é漢🙂", "nan", "-inf", "1e999", "9" * 5000, "[" * 9999,
          "{'a': 1}", "array(['x'])", "=1+1", "\ud800", "\\", "'")  # fmt: skip


def make_rows(rng: Random, large: bool, folder: Path) -> bytes:
    """A table or JSON lines with a text and a label in each row, or texts alone."""
    format = rng.choice(("csv", "jsonl"))
    (folder / "format").write_text(format)
    cells = [[rng.choice(_SENTENCES), rng.choice(("x", "y"))] for _ in range(rng.randint(2, 5))]
    cells += [list(rng.choice(cells)) for _ in range(20_000 if large else 0)]
    for _ in range(rng.randint(0, 2)):
        rng.choice(cells)[rng.randrange(2)] = rng.choice(_CELLS)
    if format == "jsonl":
        lines = [json.dumps({"prompt": text, "label": label}) for text, label in cells]
        if rng.random() < 0.6:
            row = rng.choice((_ROWS["jsonl"][0], {"prompt": "a", "label": "x", "id": 3}))
            bad = written(rng, damaged_value(rng, row)).decode("utf-8", "surrogateescape")
            lines[rng.randrange(len(lines))] = rng.choice((bad, '{"prompt": "a", "prompt": NaN}'))
    else:
        mark = rng.choice(",\t;")
        quoted = rng.random() < 0.7
        rows = [["text", "label"], *cells]
        lines = [mark.join(f'"{c}"' if quoted else c for c in row) for row in rows]
    text = rng.choice(("\n", "\n", "\r\n", "\r", "\n\n", "\x00\n")).join(lines)
    if rng.random() < 0.2:
        return text.encode(rng.choice(_ENCODINGS), "ignore")
    data = text.encode("utf-8", "surrogatepass" if rng.random() < 0.1 else "replace")
    return damaged_bytes(rng, data) if rng.random() < 0.3 else data


def _read_texts(path: Path, format: str) -> None:
    for _ in texts(path, format, names=("x", "y")):
        pass


def read_rows(path: Path) -> None:
    """With labels, and as texts alone, which are read line by line. Either may refuse it."""
    format, refusals = (path.parent / "format").read_text(), []
    for read in (load, _read_texts):
        try:
            read(path, format)
        except InputError as error:
            refusals.append(error)
            if "\n" in str(error) or str(path) not in str(error):
                raise
    if len(refusals) == 2:
        raise refusals[0]


def make_gguf(rng: Random, large: bool, folder: Path) -> bytes:
    """Damage to a file that tests/peer/test_gguf.py writes: counts, kinds and lengths, or bytes."""
    whole = (folder / "base.gguf").read_bytes()
    out = bytearray(whole)
    if rng.random() < 0.6:
        for _ in range(rng.randint(1, 3)):  # the part before the tensors' data
            at = rng.randrange(4, min(len(out) - 8, 12_000))
            size = rng.choice((4, 8))
            number = rng.choice(INTEGERS) % 2 ** (8 * size)
            out[at : at + size] = number.to_bytes(size, "little")
        return bytes(out)
    return damaged_bytes(rng, whole)


def read_gguf(path: Path) -> None:
    from convert_gguf import convert

    convert(path, path.parent / "out")


KINDS: dict[str, tuple[Callable[[Random, bool, Path], bytes], Callable[[Path], None]]] = {
    "safetensors": (make_safetensors, read_safetensors),
    "pth": (make_pth, read_pth),
    "llama2c": (make_llama2c, read_llama2c),
    "examples": (make_examples, read_examples),
    "gguf": (make_gguf, read_gguf),
    "rows": (make_rows, read_rows),
    "tokenizer": (make_tokenizer, read_tokenizer),
    "sentencepiece": (make_sentencepiece, read_tokenizer),
    "peft": (make_peft, read_peft_folder),
    "chat": (make_chat, read_chat),
}
NAMES = {  # of the file that is read
    "tokenizer": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
    "peft": "adapter_config.json",
}


# --- Watching -------------------------------------------------------------------------------------


class TooLong(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file's."""


class Watch:
    """What a reader does beside reading, noted by Python's audit events."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._event)

    def _event(self, name: str, arguments: tuple) -> None:
        if not self.on:
            return
        if name == "subprocess.Popen" and limited_process.__file__ in arguments[1]:
            return  # templates and patterns run there, with limits of the system
        if name in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
            self.seen.append(name)
        changes = name in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink")
        if name == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and isinstance(arguments[0], str | bytes | os.PathLike):
            place = arguments[-1] if name in ("os.remove", "os.rmdir") else -1  # dir_fd
            base = os.getcwd() if place == -1 else os.readlink(f"/proc/self/fd/{place}")
            path = os.path.realpath(os.path.join(base, os.fsdecode(arguments[0])))
            if not (path + os.sep).startswith(self.folder + os.sep) and path != "/dev/null":
                self.seen.append(f"{name} {path}")


def _memory(key: str) -> int:
    """Bytes of this process's VmRSS or VmHWM; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def attempt(
    read: Callable[[Path], None], path: Path, watch: Watch, ratio: int = 2
) -> tuple[str, str]:
    """("accepted" | "refused" | "fault", what was said)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    watch.seen, watch.on = [], True
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)  # of a reader that waits, too
    verdict, words = "accepted", ""
    try:
        read(path)
    except InputError as error:
        verdict, words = "refused", str(error)
        if "\n" in words or str(path.parent) not in words:
            verdict, words = "fault", f"not one line that names the file: {words!r}"
    except TooLong:
        verdict, words = "fault", f"took more than {SECONDS} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        verdict, words = "fault", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.on = False
    grown = _memory("VmHWM") - before
    if grown > ratio * path.stat().st_size + SLACK:
        return "fault", f"{grown >> 20} MiB for a file of {path.stat().st_size} bytes"
    if watch.seen:
        return "fault", f"did {watch.seen[0]}"
    return verdict, words


def fuzz(kind: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Try `count` inputs; every 100th is of some megabytes."""
    make, read = KINDS[kind]
    watch = Watch(folder)

    def late(signum: int, frame: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    space = _memory("VmSize") + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    counts = {"accepted": 0, "refused": 0, "fault": 0}
    said: set[str] = set()
    faults: list[str] = []
    path = folder / NAMES.get(kind, "input")
    for i in range(-WARM, count):
        name = f"{kind}-{seed}-{i}"
        path.write_bytes(make(Random(name), i % 100 == 99, folder))
        (folder / "now").write_text(name)
        verdict, words = attempt(read, path, watch, RATIO.get(kind, 2))
        shutil.rmtree(folder / "out", ignore_errors=True)
        if i < 0:
            continue
        counts[verdict] += 1
        said.add(words.replace(str(folder), "")[:60])
        if verdict == "fault":
            faults.append(f"{name}: {words[:300]}")
            path.rename(folder / name)
    (folder / "now").unlink(missing_ok=True)
    return {"kind": kind, **counts, "messages": len(said), "faults": faults[:20]}


def main(arguments: list[str]) -> None:
    kind, count, seed = arguments[0], int(arguments[1]), int((arguments[2:] or ["0"])[0])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
    folder = Path(arguments[3] if len(arguments) > 3 else tempfile.mkdtemp(prefix="fuzz-"))
    print(json.dumps(fuzz(kind, count, seed, folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
