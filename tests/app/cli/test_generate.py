"""`scalabl generate`."""

from __future__ import annotations

import json

from ..commands import TRAIN, ok


def test_generation(work, capsys):
    ok(TRAIN + " --head full", capsys)
    result = ok("generate --run run --prompt hello --max-new-tokens 5 --samples 3", capsys)
    assert len(result["tokens"]) == 5 and result["text"].startswith("hello")
    plain = ok("generate --model model --prompt hello --max-new-tokens 5", capsys)
    assert all(token["mutual_information"] == 0 for token in plain["tokens"])
    ids = [token["id"] for token in plain["tokens"]]
    config = {"eos_token_id": [next(i for i in range(256) if i not in ids), ids[-1]]}
    (work / "model" / "generation_config.json").write_text(json.dumps(config))
    stopped = ok("generate --model model --prompt hello --max-new-tokens 5", capsys)
    assert [token["id"] for token in stopped["tokens"]] == ids[: ids.index(ids[-1])]
    assert len(stopped["tokens"]) < 5
