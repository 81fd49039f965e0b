"""Files of tensors: what was written is read, and damage is named."""

from __future__ import annotations

import zipfile
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl_ref import InputError
from scalabl_ref.support.tensors import (
    PIECE,
    Stored,
    check_names,
    check_tensor,
    load_pickle,
    load_tensors,
    save_tensors,
    write_tensors,
)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 not whole", b"\x80\x02."])
def test_other_broken_pickles_are_named(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.bin: "):
        load_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("read", "name", "message"),
    [(load_pickle, "a.pth", "Is a directory"), (load_tensors, "a.safetensors", "is a folder, exp")],
)
def test_what_is_no_file_is_named(tmp_path, read, name, message):
    with pytest.raises(InputError, match=f"/{name}: no such file"):
        read(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"/{name}: .*{message}"):
        read(tmp_path / name)


@pytest.mark.parametrize("how", ["compressed", "one member many times"])
def test_a_pickle_that_would_grow_in_memory_is_refused(tmp_path, how):
    path, packed = tmp_path / "a.pth", how == "compressed"
    torch.save({"a": torch.zeros(99)}, path)
    with zipfile.ZipFile(path) as file:
        members = {member.filename: file.read(member) for member in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as new:
        for name, data in members.items():
            new.writestr(name, data)
    if not packed:
        assert load_pickle(path)["a"].shape == (99,)
        with zipfile.ZipFile(path, "a") as new:
            new.filelist += new.filelist * 9
            new.writestr("last", "")
    with pytest.raises(InputError, match=r"a\.pth: refused: torch\.save never compresses"):
        load_pickle(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors_survive_a_file(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(3, 4, generator=generator).to(dtype),
        "transposed": torch.randn(3, 4, generator=generator).to(dtype).T,
        "scalar": torch.tensor(2.5, dtype=dtype),
        "nothing": torch.empty(0, 3, dtype=dtype),
    }
    save_tensors(tmp_path / "x.safetensors", tensors.items(), {"key": "value"})
    loaded, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"key": "value"} and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor)
    save_tensors(tmp_path / "x.safetensors", tensors.items())
    assert load_tensors(tmp_path / "x.safetensors")[1] == {}


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = st.sampled_from([*FLOATS, torch.int8, torch.uint8])
shapes = st.lists(st.integers(0, 5), max_size=3)
kinds = st.tuples(dtypes, shapes, st.booleans())


@given(
    st.dictionaries(st.text('aé."0', max_size=4), kinds, min_size=1),
    st.sampled_from([None, *FLOATS]),
)
def test_tensor_by_tensor_gives_the_same_file(tmp_path_factory, kinds, dtype):
    """As the library, which has them all in memory: names, dtypes, shapes and order; bytes.

    What is packed, as integers are here, keeps its dtype.
    """
    folder = tmp_path_factory.mktemp("both")
    whole, pieces = {}, {}
    for name, (own, shape, packed) in kinds.items():
        packed = packed or not own.is_floating_point
        tensor = torch.randn(shape).mul(20).abs().to(own)
        whole[name] = tensor if packed or dtype is None else tensor.to(dtype)
        pieces[name] = Stored(own, tuple(shape), partial(tensor.clone), packed)
    save_tensors(folder / "whole", whole.items(), {"format": "pt"})
    told: list[int] = []
    write_tensors(folder / "pieces", pieces, dtype, told.append)
    assert (folder / "pieces").read_bytes() == (folder / "whole").read_bytes()
    assert sum(told) == sum(stored.nbytes(dtype) for stored in pieces.values())


def test_what_can_take_the_place_of_a_tensor():
    """Floats of 16 bits or more for others, or the very integers; finite, in a dtype if given."""
    floats, integers = (torch.empty(2, dtype=dtype, device="meta") for dtype in (None, torch.int64))
    large = torch.tensor([0.0, 1e6])
    for tensor in (large, large.double(), large.bfloat16()):
        check_tensor("file", "a", tensor, floats)
        check_tensor("file", "a", tensor, floats, torch.bfloat16)
    check_tensor("file", "a", large.long(), integers)
    check_tensor("file", "a", torch.empty(0), torch.empty(0))
    for tensor, like, dtype, said in (
        (large[:1], floats, None, r"has shape \(1,\), expected \(2,\)"),
        (large, floats, torch.float16, "has NaN or infinite values"),
        (-large / 0, floats, None, "has NaN or infinite values"),
        (large.log(), floats, None, "has NaN or infinite values"),  # -inf and a number
        (large.long(), floats, None, "is torch.int64, expected floats of 16 bits or more"),
        (large.to(torch.float8_e5m2), floats, None, "is torch.float8_e5m2, expected floats of 16"),
        (large.int(), integers, None, "is torch.int32, expected torch.int64"),
    ):
        with pytest.raises(InputError, match=f"^file: tensor a {said}"):
            check_tensor("file", "a", tensor, like, dtype)


def test_names_that_are_missing_or_unexpected():
    check_names("file", ["b", "a"], ["a", "b"])
    with pytest.raises(InputError, match="^file: tensor b is missing$"):
        check_names("file", ["a", "c"], ["a", "b"])
    with pytest.raises(InputError, match="^file: tensor c is unexpected$"):
        check_names("file", ["a", "c"], ["a"])


def test_tensors_are_read_in_the_order_given(tmp_path):
    """Wherever their places in the file are: what is read together is kept for so long alone."""
    read: list[str] = []

    def reader(name: str, dtype: torch.dtype):
        def values() -> torch.Tensor:
            read.append(name)
            return torch.ones(3).to(dtype)

        return Stored(dtype, (3,), values)

    given = {"c": torch.bfloat16, "a": torch.float32, "b": torch.float64}
    write_tensors(tmp_path / "x.safetensors", {n: reader(n, dtype) for n, dtype in given.items()})
    assert read == list(given)
    found = load_tensors(tmp_path / "x.safetensors")[0]
    assert all(torch.equal(found[n], torch.ones(3).to(dtype)) for n, dtype in given.items())


def test_a_tensor_of_several_pieces(tmp_path):
    """Longer than what is written at a time, and not contiguous; values checked up to the last."""
    tensor = torch.arange(PIECE + 6.0).view(2, -1).T
    told: list[int] = []
    write_tensors(tmp_path / "x", {"a": Stored.held(tensor)}, progress=told.append)
    assert told == [4 * PIECE, 24]
    (tmp_path / "x").rename(tmp_path / "x.safetensors")
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")[0]["a"], tensor)
    tensor[-1, -1] = float("inf")
    with pytest.raises(InputError, match="tensor a has NaN or infinite values as torch.float32"):
        write_tensors(tmp_path / "y", {"a": Stored.held(tensor)})
    with pytest.raises(InputError, match="tensor a is torch.int8, expected floats"):
        write_tensors(tmp_path / "y", {"a": Stored.held(tensor.to(torch.int8))})
    with pytest.raises(InputError, match="tensor a is torch.int32, expected floats"):
        stored = Stored(torch.int32, (1,), lambda: torch.ones(1, dtype=torch.int32), packed=True)
        write_tensors(tmp_path / "y", {"a": stored})
    assert not (tmp_path / "y").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    import safetensors

    path = tmp_path / "x.safetensors"
    save_tensors(path, [("a", torch.ones(2))])

    def half(specs, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "serialize_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(path, [("a", torch.zeros(2))])
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(2))


def test_a_pickle_that_asks_for_more_memory_than_it_has_is_damaged(tmp_path, monkeypatch):
    """It is a fault of the file, unless memory is short for the file itself."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(InputError, match="not a file written by torch.save: MemoryError"):
        load_pickle(tmp_path / "a.pth")
    monkeypatch.setattr("scalabl_ref.support.tensors._fits", lambda path: False)
    with pytest.raises(MemoryError):
        load_pickle(tmp_path / "a.pth")
