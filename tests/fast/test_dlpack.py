"""add_update and update_gradients of the native core: arrays of any library, through DLPack.

docs/examples/update_numpy.py has NumPy's, JAX's and most refusals, in an environment without
PyTorch. Here: all dtypes, and capsules that no library at hand makes.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from scalabl_ref import InputError, Noise, native_status
from scalabl_ref.fast import native

ROWS, D_IN, D_OUT, RANK, PER_GROUP = 10, 33, 17, 5, 4
NOISE = (2**63 + 1, 3, 9)
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.fixture
def core():
    if native.core() is None:
        pytest.skip(f"native core: {native_status()['reason']}")
    return native.core()


def operands(dtype=torch.float32, own=torch.float32):
    """y, x, A, B, s, sigma."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, to):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(to)

    return [
        draw(ROWS, D_OUT, to=dtype),
        draw(ROWS, D_IN, to=dtype).flip(0)[:, : D_IN - 1],
        draw(RANK, D_IN + 1, to=own)[:, 1:D_IN],  # parts of wider arrays
        draw(D_OUT, RANK + 2, to=own)[:, :RANK],
        draw(RANK, to=own),
        draw(RANK, to=own),
    ]


@pytest.mark.parametrize(("dtype", "own"), PAIRS, ids=str)
def test_agrees_with_the_formula(core, dtype, own):
    t = operands(dtype, own)
    wide = [value.to(torch.float64, copy=True).requires_grad_() for value in t]
    groups, draws = torch.tensor([8, 2**32 - 1, 8]), torch.tensor([1, 0, 2])
    seed, first, layer = NOISE
    rows = [
        Noise(seed, first + int(draw)).normal(layer, groups[g : g + 1], RANK)
        for g, draw in enumerate(draws)
    ]
    eps = torch.cat(rows).repeat_interleave(PER_GROUP, 0)[:ROWS]
    y, x, A, B, s, sigma = wide
    expected = y + 0.5 * ((x @ A.T) * (s + sigma * eps.double())) @ B.T
    grad_y = torch.ones_like(t[0])
    gradients = torch.autograd.grad(expected.sum(), wide[1:])

    options = {"noise": NOISE, "groups": groups, "draws": draws}
    options |= {"rows_per_group": PER_GROUP, "threads": 2}
    core.add_update(*t, 0.5, **options)
    names = ["grad_x", "grad_A", "grad_B", "grad_s", "grad_sigma"]
    out = {name: torch.zeros_like(p) for name, p in zip(names, t[1:], strict=True)}
    core.update_gradients(grad_y, *t[1:], 0.5, **options, **out)
    for value, want in zip([t[0], *out.values()], [expected, *gradients], strict=True):
        error = (value.double() - want).abs().max() / want.abs().max()
        assert error <= 16 * torch.finfo(min(value.dtype, dtype, key=bits)).eps


@pytest.mark.parametrize("place", range(5))
def test_a_gradient_alone_is_the_one_among_all(core, place):
    grad_y, *t = operands()
    like = dict(zip(OUTPUTS, t, strict=True))
    among = {name: torch.zeros_like(value) for name, value in like.items()}
    core.update_gradients(grad_y, *t, 0.5, noise=NOISE, **among)
    name = OUTPUTS[place]
    alone = torch.zeros_like(like[name])
    core.update_gradients(grad_y, *t, 0.5, noise=NOISE, **{name: alone})
    assert torch.equal(alone, among[name]) and alone.any()


def bits(dtype):
    return torch.finfo(dtype).bits


def test_bad_input_is_the_package_s_error(core):
    t = operands()
    with pytest.raises(InputError, match=r"^s: shape \(4,\), expected \(5,\)"):
        core.add_update(*t[:4], t[4][1:], t[5], 0.5)
    with pytest.raises(InputError, match="group id"):
        core.add_update(*t, 0.5, noise=NOISE, groups=torch.full((ROWS,), -1))
    with pytest.raises(InputError, match="below 2\\^32"):
        core.add_update(*t, 0.5, noise=NOISE, draws=torch.full((ROWS,), 2**32 - 3))
    with pytest.raises(InputError, match=r"^draws: shape \(1,\), expected \(10,\)"):
        core.add_update(*t, 0.5, noise=NOISE, draws=torch.zeros(1, dtype=torch.int64))


NAMES = ("y", "x", "A", "B", "s", "sigma")
OUTPUTS = ("grad_x", "grad_A", "grad_B", "grad_s", "grad_sigma")


@pytest.mark.parametrize("name", NAMES)
def test_every_array_has_its_shape_and_dtype(core, name):
    """A longer array, one of more dimensions and one of wider numbers are refused by name."""
    right = operands()
    # The rows, the inputs and the rank are those of x and A: another array is then at fault.
    named = {"x": "y|A", "A": "A|B"}.get(name, name)
    place = NAMES.index(name)
    for wrong, message in (
        (torch.zeros([size + 1 for size in right[place].shape]), "shape"),
        (right[place][None], "dimension"),
        (right[place].double(), "dtype"),
    ):
        given = [*right[:place], wrong, *right[place + 1 :]]
        at_fault = name if message == "dimension" else named
        for first in ("y", "grad_y"):
            with pytest.raises(InputError, match=f"^({at_fault.replace('y', first)}): .*{message}"):
                if first == "y":
                    core.add_update(*given, 0.5)
                else:
                    core.update_gradients(*given, 0.5)


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_gradient_has_its_shape_and_dtype(core, name):
    t = operands()
    like = t[1 + OUTPUTS.index(name)]
    for wrong, message in (
        (torch.zeros([size + 1 for size in like.shape]), "shape"),
        (torch.zeros(like.shape, dtype=torch.float64), "dtype"),
    ):
        with pytest.raises(InputError, match=f"^{name}: .*{message}"):
            core.update_gradients(*t, 0.5, **{name: wrong})


@pytest.mark.parametrize("name", ["groups", "draws"])
def test_groups_and_draws_are_int64(core, name):
    with pytest.raises(InputError, match=f"^{name}: dtype must be int64"):
        core.add_update(
            *operands(), 0.5, noise=NOISE, **{name: torch.zeros(ROWS, dtype=torch.int32)}
        )


# --- Capsules made by hand ------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _Tensor),
    ]  # fmt: skip


_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR]


class Foreign:
    """A float32 array of a library of its own: without strides, at a byte offset; counts releases.

    version: the DLPack version of its capsules, None: before there were versions.
    """

    def __init__(self, values, version, device=1, flags=0, lanes=1):
        self.values = values.contiguous()
        self.version, self.device, self.given, self.released = version, device, 0, 0
        shape = (ctypes.c_int64 * values.ndim)(*values.shape)
        tensor = _Tensor(
            self.values.data_ptr() - 8, device, 0, values.ndim, 2, 32, lanes, shape, None, 8
        )
        if version is None:
            self.managed, self.name = _Managed(tensor, None, None), b"dltensor"
        else:
            self.managed = _Versioned(version, 0, None, None, flags, tensor)
            self.name = b"dltensor_versioned"
        self.destructor = _DESTRUCTOR(self._release)

    def _release(self, capsule):
        self.released += 1

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, **options):
        if self.version is None and options:
            raise TypeError("no such argument")
        self.given += 1
        return _new(ctypes.addressof(self.managed), self.name, self.destructor)


@pytest.mark.parametrize("version", [None, 1])
def test_other_libraries(core, version):
    t = operands()
    expected = t[0].clone()
    core.add_update(expected, *t[1:], 0.5)
    sources = [Foreign(value, version) for value in t[1:]]
    y = Foreign(t[0], 1)
    core.add_update(y, *sources, 0.5)
    assert torch.equal(y.values, expected)
    assert all(source.given == source.released == 1 for source in [y, *sources])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": None}, "before 1.0"),
        ({"version": 2}, "DLPack 1"),
        ({"version": 1, "flags": 1}, "read-only"),
        ({"version": 1, "device": 2}, "CPU"),
        ({"version": 1, "lanes": 2}, "elements"),
    ],
)
def test_refused_capsules(core, options, message):
    t = operands()
    y = Foreign(t[0], **options)
    before = y.values.clone()
    with pytest.raises(InputError, match=f"^y: .*{message}"):
        core.add_update(y, *t[1:], 0.5)
    assert torch.equal(y.values, before)
    assert y.given == y.released
