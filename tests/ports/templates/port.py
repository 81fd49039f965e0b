"""A port begins here: reads the cases, computes the level philox, and stores the results.

    python port.py VECTORS_DIR RESULTS.safetensors

Python's standard library alone. Add a function for each level to LEVELS.
"""

import json
import math
import struct
import sys
from pathlib import Path

CODES = {"F64": "d", "F32": "f", "I64": "q"}


def read_tensors(path):
    """{name: (shape, flat values in row-major order)} of a safetensors file."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            layout = f"<{math.prod(entry['shape'])}{CODES[entry['dtype']]}"
            first = start + entry["data_offsets"][0]
            tensors[name] = entry["shape"], struct.unpack_from(layout, data, first)
    return tensors


def write_tensors(path, tensors):
    """The same, as I64 where the first value is an integer, else as F64."""
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        dtype = "I64" if isinstance(values[0], int) else "F64"
        part = struct.pack(f"<{len(values)}{CODES[dtype]}", *values)
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def philox4x32(counter, key, rounds):
    """Step 1 of docs/conformance.md."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = q >> 32 ^ c1 ^ k0, q % 2**32, p >> 32 ^ c3 ^ k1, p % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def philox(parameters, inputs):
    """A level: parameters and {input: (shape, values)} to {output: (shape, values)}."""
    (shape, counters), (_, keys) = inputs["counter"], inputs["key"]
    words = []
    for i in range(shape[0]):
        counter, key = counters[4 * i : 4 * i + 4], keys[2 * i : 2 * i + 2]
        words += philox4x32(counter, key, parameters["rounds"])
    return {"words": (shape, words)}


LEVELS = {"philox": philox}


def main(folder, out):
    tensors, results = read_tensors(f"{folder}/vectors.safetensors"), {}
    for case in json.loads(Path(folder, "manifest.json").read_text())["cases"]:
        if case["level"] in LEVELS:
            inputs = {name: tensors[stored] for name, stored in case["inputs"].items()}
            outputs = LEVELS[case["level"]](case["parameters"], inputs)
            for name, result in outputs.items():
                results[case["outputs"][name]["tensor"]] = result
    write_tensors(out, results)


main(*sys.argv[1:])
