"""tools/packing.py: folders of codes, which are what `from_pretrained` makes of the weights."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_ref import InputError, Llama
from scalabl_ref.app import cli
from scalabl_ref.fast.quantize import KINDS
from scalabl_ref.model.config import LlamaConfig
from scalabl_ref.support.tensors import FLOATS, load_tensors, save_tensors

from ..models import TINY, questions_file, tiny_folder
from ..tools.test_convert import LLAMA2, convert_hf, hf_folder, llama2c_file, meta_folder


def assert_same(ours: Llama, theirs: Llama) -> None:
    """Every tensor to the bit, and what they compute."""
    assert ours.config == theirs.config and ours.quantized == theirs.quantized
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
    tokens = torch.arange(5)[None] % ours.config.vocab_size
    assert torch.equal(ours(tokens), theirs(tokens))


def shape(hidden: int, inner: int, kv: int, size: int, **features) -> LlamaConfig:
    return LlamaConfig(7, hidden, inner, 2, 2 * kv, kv, 2 * size, **features)


WIDTHS = st.sampled_from([1, 2, 63, 64, 65, 130])
FEATURES = st.sampled_from(
    [{}, {"tie_word_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True},
     {"qkv_bias": True, "output_bias": True, "mlp_bias": True}]
)  # fmt: skip
SHAPES = st.builds(
    lambda features, *sizes: shape(*sizes, **features),
    FEATURES, WIDTHS, WIDTHS, st.integers(1, 2), st.integers(1, 9),
)  # fmt: skip


@settings(max_examples=25)
@given(
    SHAPES,
    st.sampled_from(KINDS),
    st.sampled_from(FLOATS),
    st.sampled_from([None, *FLOATS]),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_folder_of_codes_is_the_model_quantised(
    tmp_path_factory, config, kind, stored, dtype, shards, converted
):
    """Widths around multiples of 64, every block's features, dtypes and shards; either layout.

    What is no weight of a block gets the dtype that was asked for, and scales keep theirs.
    """
    folder = tmp_path_factory.mktemp("packed")
    source = wide = hf_folder(folder / "hf", config, dtype=stored, shards=shards)
    if converted:
        convert_hf.convert(source, folder / "ours")
        source = folder / "ours"
    convert_hf.convert(source, folder / "codes", quantize=kind, dtype=dtype)
    ours = Llama.from_pretrained(folder / "codes")
    assert ours.quantized == kind
    assert_same(ours, Llama.from_pretrained(wide, dtype, quantize=kind))


def test_meta_s_and_llama2c_s_files_are_packed(tmp_path):
    model = Llama(LLAMA2).init_random_(0, std=0.3)
    for kind, source, family in (
        ("nf4", meta_folder(tmp_path / "m", model, 2, llama3=False), "llama-2"),
        ("int8", llama2c_file(tmp_path / "m.bin", model), None),
    ):
        convert_hf.convert(source, tmp_path / kind, family=family, quantize=kind)
        convert_hf.convert(source, tmp_path / f"{kind}-wide", family=family)
        wide = Llama.from_pretrained(tmp_path / f"{kind}-wide", quantize=kind)
        assert_same(Llama.from_pretrained(tmp_path / kind), wide)


def test_the_manifest_says_what_was_packed(tmp_path):
    source = hf_folder(tmp_path / "hf", TINY)
    command = [str(source), str(tmp_path / "codes"), "--quantize", "int8"]
    assert convert_hf.main(command) == 0
    manifest = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    assert (manifest["quantize"], manifest["dtype"]) == ("int8", "keep")
    for part, folder in (("read", source), ("written", tmp_path / "codes")):
        names = {file.name for file in folder.iterdir()} - {"manifest.json"}
        assert manifest[part] == {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names
        }


def test_each_weight_is_read_once(tmp_path, monkeypatch):
    """Codes and scale are of one computation, though they lie apart in the file."""
    import packing

    packings: list[tuple[int, ...]] = []
    quantize = packing.quantize

    def counted(weight, kind):
        packings.extend([] if weight.is_meta else [tuple(weight.shape)])
        return quantize(weight, kind)

    monkeypatch.setattr(packing, "quantize", counted)
    source = hf_folder(tmp_path / "hf", TINY)
    convert_hf.convert(source, tmp_path / "codes", quantize="nf4")
    assert len(packings) == 7 * TINY.num_hidden_layers


def test_what_cannot_be_is_refused(tmp_path, capsys):
    source, codes = hf_folder(tmp_path / "hf", TINY), tmp_path / "codes"
    convert_hf.convert(source, codes, quantize="nf4")

    def refused(folder, *options) -> str:
        capsys.readouterr()
        command = [str(folder), str(tmp_path / "x"), *options]
        assert convert_hf.main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    for option in ("--to-hf", "--to-llama2c", "--verify"):
        assert "--quantize goes with none of" in refused(source, "--quantize", "nf4", option)
    for options in (["--to-hf"], ["--to-llama2c"], ["--quantize", "nf4"], ["--quantize", "int8"]):
        assert "codes: is quantised already, to nf4: codes are no weights" in refused(
            codes, *options
        )
    assert "is converted already" in refused(codes)
    with pytest.raises(InputError, match="quantize must be one of int8, nf4, not 'int3'"):
        convert_hf.convert(source, tmp_path / "x", quantize="int3")

    tensors, _ = load_tensors(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    up, inside = tensors[name], "tensor layers.1.mlp.up_proj"
    for change, message in (
        ({name: up.to(torch.int8)}, rf"{inside}.weight is torch.int8, expected floats"),
        ({name: up.to(torch.float8_e5m2)}, rf"{inside}.weight is torch.float8_e5m2, expected"),
        ({name: up[0]}, rf"{inside}.weight has shape \(16,\), expected \(24, 16\)"),
        ({name: up.index_fill(1, torch.tensor([3]), float("nan"))}, f"{inside}.weight has NaN"),
        ({name: up.double() * 1e300}, rf"{inside}.scale has NaN or infinite values"),
        ({name.replace("weight", "scale"): up}, rf"{inside}.scale is not part of this model"),
        (
            {name.replace("weight", "qweight"): up.int()},
            r"up_proj.qweight is of weights that were quantised elsewhere, by GPTQ or AWQ",
        ),
        ({name: up[:, :7]}, r"up_proj.weight has shape \(24, 7\), expected \(24, 16\)"),
    ):
        save_tensors(source / "model.safetensors", {**tensors, **change}.items())
        with pytest.raises(InputError, match=message):
            convert_hf.convert(source, tmp_path / "x", quantize="nf4")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "codes"}


def test_a_run_is_the_same_on_codes_and_on_weights_that_become_them(tmp_path, monkeypatch, capsys):
    """To the bit; either base serves the other's run, and no third does."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "wide")
    questions_file(tmp_path / "train.jsonl")
    convert_hf.convert("wide", tmp_path / "codes", quantize="nf4")

    def command(text: str, code: int = 0) -> str:
        capsys.readouterr()
        assert cli.main(text.split()) == code
        return capsys.readouterr().err

    train = "train --data train.jsonl --steps 3 --batch 4 --rank 2"
    command(f"{train} --model wide --quantize nf4 --out a")
    command(f"{train} --model codes --out b")
    command(f"{train} --model codes --quantize nf4 --out c")
    runs = [tmp_path / name for name in "abc"]
    kinds = [json.loads((run / "run.json").read_text())["quantize"] for run in runs]
    assert kinds == ["nf4", None, "nf4"]
    for run, base in zip("abc", ("codes", "codes", "wide"), strict=True):
        command(f"evaluate --run {run} --model {base} --data train.jsonl --samples 2")
    for file in ("adapter.safetensors", "predictions.jsonl"):
        assert len({(run / file).read_bytes() for run in runs}) == 1
    command("predict --run b --prompt a --choices b c --samples 2")
    convert_hf.convert("wide", tmp_path / "other", quantize="int8")
    for base in ("wide", "other"):
        err = command(f"evaluate --run b --model {base} --data train.jsonl --samples 2", 2)
        assert f"b: was trained on {tmp_path / 'codes'}; {base} is another model" in err
    assert "would not be those of its nf4 base" in command("export --run b --to hf --out hf", 2)
    command("export --run b --to peft --out peft")
