"""`scalabl import`: its options, and what it says."""

from __future__ import annotations

import torch

from ...interop.samples import official_state, peft_folder
from ..commands import facts, ok, run


def test_an_official_adapter_has_the_scaling_and_the_answers_that_are_given(work, capsys):
    torch.save(official_state("model"), "state_dict.pt")
    (work / "own.txt").write_text("{question} Well:")
    (work / "model/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    command = "import --from bayesadapt . --model model --out"
    plain, given = (
        ok(f"{command} {out}", capsys)
        for out in ("plain", "given --alpha 3 --labels x y z --prior-std 2 --format csv "
                    "--prompt-template own.txt --prompt-style chat")
    )  # fmt: skip
    assert [told["adapter"]["alpha"] for told in (plain, given)] == [None, 3]
    assert [told["adapter"]["prior_std"] for told in (plain, given)] == [1, 2]
    assert (given["run"], given["from"], given["layers"]) == ("given", "bayesadapt", 5)
    keys = ("labels", "answer_tokens", "label_names", "format", "prompt_template", "prompt_style")
    found = [[facts(work / out)[key] for key in keys] for out in ("plain", "given")]
    assert found == [
        ["letters", "alone", None, "jsonl", None, "plain"],
        ["words", "alone", ["x", "y", "z"], "csv", "{question} Well:", "chat"],
    ]
    assert ok("predict --run given --prompt hello", capsys)["choices"] == ["x", "y", "z"]


def test_the_seed_sets_the_first_widths_and_dtype_the_base(work, capsys):
    peft_folder(work / "peft", "model")
    command = "import peft --from peft --model model"
    for out, more in (("a", ""), ("b", " --seed 0"), ("c", " --seed 1"), ("d", " --method mle")):
        code, said, _ = run(f"{command} --out {out}{more}", capsys)
        assert code == 0 and said == f"written: {out}, 9 layers of mle\n"
    a, b, c = ((work / out / "adapter.safetensors").read_bytes() for out in "abc")
    assert a == b != c
    assert [facts(work / out)["adapter"]["method"] for out in "ad"] == ["scalabl", "mle"]
    ok(f"{command} --out half --dtype bfloat16", capsys)
    assert facts(work / "half")["dtype"] == "bfloat16"
    ok("predict --run half --prompt hello --choices a b", capsys)  # on the base that it names
