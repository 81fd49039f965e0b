"""`scalabl generate`."""

from __future__ import annotations

import json

from ..commands import TRAIN, ok, refused, run


def test_generation(work, capsys):
    ok(TRAIN + " --head full --lr 0.02 --init-sigma 1", capsys)
    generate = "generate --run run --prompt hello --max-new-tokens 5"
    result = ok(f"{generate} --samples 3", capsys)
    assert len(result["tokens"]) == 5 and result["text"].startswith("hello")
    draws = [[token["mutual_information"] for token in ok(f"{generate} {more}", capsys)["tokens"]]
             for more in ("--samples 3", "--samples 3 --seed 1", "--samples 4", "")]  # fmt: skip
    assert len({each[0] for each in draws}) == 4 and draws[0][0] > 0 and set(draws[3]) == {0}
    means = (sum(token[name] for token in result["tokens"]) / 5
             for name in ("entropy", "mutual_information"))  # fmt: skip
    code, out, _ = run(f"{generate} --samples 3", capsys)
    assert code == 0 and out.splitlines()[-1] == (
        "mean per token: entropy {:.4f}, mutual information {:.4f} nats".format(*means)
    )
    plain = ok("generate --model model --prompt hello --max-new-tokens 5", capsys)
    assert all(token["mutual_information"] == 0 for token in plain["tokens"])
    ids = [token["id"] for token in plain["tokens"]]
    config = {"eos_token_id": [next(i for i in range(256) if i not in ids), ids[-1]]}
    (work / "model" / "generation_config.json").write_text(json.dumps(config))
    stopped = ok("generate --model model --prompt hello --max-new-tokens 5", capsys)
    assert [token["id"] for token in stopped["tokens"]] == ids[: ids.index(ids[-1])]
    assert len(stopped["tokens"]) < 5
    config["eos_token_id"].append(ids[0])
    (work / "model" / "generation_config.json").write_text(json.dumps(config))
    at_once = ok("generate --model model --prompt hello --max-new-tokens 5", capsys)
    assert at_once["tokens"] == [] and at_once["text"] == "hello"


def test_drawn_text_is_a_function_of_the_seed(work, capsys):
    command = "generate --model model --prompt hello --max-new-tokens 9 --temperature 1.5"
    texts = [ok(f"{command} {more}", capsys)["text"]
             for more in ("", "--seed 0", "--seed 1", "--top-p 0.5")]  # fmt: skip
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert "top_p needs a temperature" in refused("generate --model model --top-p 0.5", capsys)


def test_text_comes_as_it_is_written(work, capsys):
    """What is printed is the whole text, each part before the next token is computed."""
    code, out, err = run("generate --model model --prompt hello --max-new-tokens 5", capsys)
    whole = ok("generate --model model --prompt hello --max-new-tokens 5", capsys)["text"]
    assert code == 0 and out.startswith(whole + "\nmean per token: entropy")
