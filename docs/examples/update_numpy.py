"""The native core on NumPy arrays, and on a JAX array where JAX is installed; without PyTorch.

    python update_numpy.py FOLDER

FOLDER holds the extension module that CMake builds, _native. The exit status is 0 only if the core
agrees with the formula y += c B ((A x) * (s + sigma eps)) and its gradients, written in NumPy, and
refuses bad arrays.
"""

from __future__ import annotations

import sys

import numpy as np

sys.path.insert(0, sys.argv[1])
import _native  # noqa: E402

try:
    import jax.numpy as jnp
except ImportError:
    jnp = None

ROWS, D_IN, D_OUT, RANK, ROWS_PER_GROUP = 6, 40, 24, 4, 3
SEED, DRAW, LAYER = NOISE = (20250706123456789, 3, 9)
GROUPS = np.array([7, 40], dtype=np.int64)
SCALING = 0.5

wrong = 0


def compare(what: str, value: object, expected: np.ndarray) -> None:
    """Prints the largest error, relative to the largest number of `expected`."""
    global wrong
    value = np.asarray(value)
    error = float(np.abs(value - expected).max() / np.abs(expected).max())
    good = error <= 64 * np.finfo(value.dtype).eps  # False for NaN
    wrong += not good
    print(f"{what}: relative error {error:.1e} {'ok' if good else 'WRONG'}")


def refused(what: str, function, *arguments, **options) -> None:
    """Prints the ValueError that a bad call must give; its sentence begins with the argument."""
    global wrong
    try:
        function(*arguments, **options)
    except ValueError as error:
        print(f"refused: {error}")
        wrong += not str(error).startswith(f"{what}: ")
    else:
        print(f"accepted, WRONG: bad {what}")
        wrong += 1


def normals() -> np.ndarray:
    """eps (ROWS, RANK) of the noise, a row for each row of x."""
    eps = np.empty((len(GROUPS), RANK), np.float32)
    _native.normals(*NOISE, GROUPS.ctypes.data, 0, len(GROUPS), RANK, eps.ctypes.data)
    return eps.repeat(ROWS_PER_GROUP, axis=0)


def arrays(dtype: type) -> dict[str, np.ndarray]:
    """Random operands of one dtype, the rows of x apart in memory."""
    random = np.random.default_rng(1)
    shapes = {
        "y": (ROWS, D_OUT), "x": (ROWS, D_IN + 3), "A": (RANK, D_IN), "B": (D_OUT, RANK),
        "s": (RANK,), "sigma": (RANK,),
    }  # fmt: skip
    out = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    out["x"] = out["x"][:, :D_IN]
    return out


def check(dtype: type, jax: bool) -> None:
    """The update and its gradients in one dtype, with x in NumPy or in JAX."""
    t = arrays(dtype)
    y, x, A, B, s, sigma = (t[name].astype(np.float64) for name in t)
    grad_y = t["y"].copy()
    if jax:
        t["x"] = jnp.asarray(np.ascontiguousarray(t["x"]))
    options = {"noise": NOISE, "groups": GROUPS, "rows_per_group": ROWS_PER_GROUP, "threads": 2}
    label = f"{np.dtype(dtype)}, x of {'JAX' if jax else 'NumPy'}"

    eps = normals()
    h, scale = x @ A.T, SCALING * (s + sigma * eps)
    _native.add_update(*t.values(), SCALING, **options)
    compare(f"{label}: y", t["y"], y + (h * scale) @ B.T)

    d = grad_y.astype(np.float64) @ B
    expected = {
        "grad_x": 1 + (d * scale) @ A,
        "grad_A": (d * scale).T @ x,
        "grad_B": grad_y.astype(np.float64).T @ (h * scale),
        "grad_s": SCALING * (h * d).sum(0),
        "grad_sigma": SCALING * (h * d * eps).sum(0),
    }
    out = {name: np.ones(value.shape, dtype) for name, value in expected.items()}
    inputs = list(t.values())[1:]
    _native.update_gradients(grad_y, *inputs, SCALING, **options, **out)
    for name, value in expected.items():
        compare(f"{label}: {name}", out[name], value)

    before = t["y"].copy()
    _native.add_update(*t.values(), SCALING)  # the mean model
    compare(f"{label}: mean", t["y"], before + SCALING * (h * s) @ B.T)


def check_refusals() -> None:
    """Each bad argument gives a ValueError and leaves y as it was."""
    t = arrays(np.float32)
    frozen = t["y"].copy()
    frozen.flags.writeable = False
    unaligned = np.zeros(ROWS * D_OUT * 4 + 1, np.uint8)[1:].view(np.float32)
    bad = {
        "y": [
            frozen, t["y"][:-1], t["y"].astype(np.float64), t["y"][0], [[1.0]],
            np.zeros((D_OUT, ROWS), np.float32).T, unaligned.reshape(ROWS, D_OUT),
            np.lib.stride_tricks.as_strided(t["y"], strides=(4, 4)),
        ],
        "x": [t["x"][:, ::2], t["x"].astype(np.int32), None],
        "A": [t["A"][:, 1:], t["A"].astype(np.float64), np.zeros((257, D_IN), np.float32)],
        "B": [t["B"].T, t["B"].astype(np.float16)],
        "s": [t["s"][1:], t["s"][:, None]],
        "sigma": [t["sigma"].repeat(2)[::2]],
    }  # fmt: skip
    if jnp is not None:
        bad["y"].append(jnp.asarray(t["y"]))  # what is JAX's must not be changed
    before = t["y"].copy()
    for name, values in bad.items():
        for value in values:
            refused(name, _native.add_update, *(t | {name: value}).values(), SCALING)
    call = (_native.add_update, *t.values(), SCALING)
    for groups in (np.array([1], np.int64), np.arange(ROWS, dtype=np.int32)):
        refused("groups", *call, noise=NOISE, groups=groups)
        refused("draws", *call, noise=NOISE, draws=groups)
    refused("rows_per_group", *call, noise=NOISE, rows_per_group=0)
    for noise in ((-1, 0, 0), (1, 2), (1, 2**32, 3), "noise"):
        refused("noise", *call, noise=noise)
    call = (_native.update_gradients, *t.values(), SCALING)
    refused("grad_A", *call, grad_A=np.zeros((RANK, 2 * D_IN), np.float32)[:, :D_IN])
    refused("grad_s", *call, grad_s=frozen[0, :RANK])
    refused("grad_x", *call, grad_x=np.zeros((ROWS, D_IN)))
    compare("y after the refusals", t["y"], before)


for dtype in (np.float32, np.float64, np.float16):
    check(dtype, jax=False)
if jnp is not None:
    check(np.float32, jax=True)
check_refusals()
if "torch" in sys.modules or "scalabl_ref" in sys.modules:
    print("PyTorch was loaded, WRONG")
    wrong += 1
print("all agree" if not wrong else f"{wrong} WRONG")
sys.exit(wrong != 0)
