"""Likely mistakes, as a user types them, and the one line that each is answered with."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from scalabl_ref.app import cli

from ...models import questions_file, tiny_folder

USUAL = {
    "train": "train --model model --data train.jsonl --out new --steps 4 --batch 4 --rank 2",
    "evaluate": "evaluate --run run --data test.jsonl --out new",
}

USAGE = {
    "train": "usage: scalabl train --model MODEL --data FILE --out RUN [options]; --help lists "
    "them",
    "evaluate": "usage: scalabl evaluate --data FILE [options]; --help lists them",
    "predict": "usage: scalabl predict --run RUN --prompt PROMPT [options]; --help lists them",
    "posterior": "usage: scalabl posterior subspace|laplace|tfb|swag|ensemble --run RUN ... --out "
    "NEW [options]; --help lists them",
    "import": "usage: scalabl import SRC --from peft|bayesadapt --model MODEL --out RUN [options]; "
    "--help lists them",
}

GO_ON = f"`scalabl {USUAL['train']} --out half --checkpoint-every 2 --resume`"

# The command, "..." being the usual options above, and its line behind "error: ".
MISTAKES = [
    # wrong paths
    ("train ... --model absent",
     "absent: no such folder: --model takes a folder, or OWNER/NAME on the Hugging Face Hub"),
    ("train ... --model model/model.safetensors",
     "model/model.safetensors: is a file: give the folder of config.json and the weights"),
    ("train ... --model model.gguf",
     "model.gguf: is a GGUF file: tools/convert_gguf.py makes a folder of it"),
    ("train ... --model peft",
     "peft: is a PEFT adapter, not a model: `scalabl import --from peft` makes it a run"),
    ("train ... --model run", "run: is a run, not a model: give it as --run"),
    ("train ... --model gemma",
     "gemma/config.json: model_type 'gemma3' is not known: expected llama, mistral, qwen2, "
     "qwen3"),
    ("train ... --model shards", "shards/model-00001-of-00002.safetensors: shard is missing"),
    ("train ... --model noweights",
     "noweights: no weights: expected model.safetensors, pytorch_model.bin, or the index.json "
     "of their shards"),
    ("train ... --model notok", "notok: no tokenizer: expected tokenizer.model or tokenizer.json"),
    ("train ... --data absent.jsonl", "absent.jsonl: no such file"),
    ("train ... --data folder", "folder: cannot be read: Is a directory"),
    ("train ... --out run", "run: holds a finished run: give another --out"),
    ("train ... --out train.jsonl", "train.jsonl: cannot be made a folder: File exists"),
    ("train ... --init absent",
     "absent: no such folder: expected a run, which `scalabl train` writes"),
    ("train ... --init model",
     "model: is a model and no run: give it as --model alone (a trained adapter becomes a run "
     "by `scalabl import`)"),
    ("train ... --prompt-template absent.txt", "absent.txt: no such file"),
    ("train ... --prompt-template folder", "folder: cannot be read: Is a directory"),
    ("train ... --prompt-template nothing.txt",
     "nothing.txt: a template has {question} and may have {choices}: there is no {question}"),
    ("train ... --prompt-template misspelt.txt",
     "misspelt.txt: a template has {question} and may have {choices}: {choice} is neither: "
     "did you mean {choices}?"),
    ("train ... --prompt-template vague.txt",
     "vague.txt: a template has {question} and may have {choices}: {text} is neither"),
    ("evaluate ... --ood absent.jsonl", "absent.jsonl: no such file"),
    ("evaluate ... --ood sst2.txt",
     "sst2.txt, line 1: expected a JSON object, found 0: is --format right?"),
    ("evaluate ... --calibrate absent.jsonl", "absent.jsonl: no such file"),
    ("evaluate ... --temperature", "run: was trained without --holdout: give --calibrate"),
    ("evaluate ... --run absent",
     "absent: no such folder: expected a run, which `scalabl train` writes"),
    ("evaluate ... --run model",
     "model: is a model and no run: give it as --model alone (a trained adapter becomes a run "
     "by `scalabl import`)"),
    ("evaluate ... --run peft",
     "peft: is a PEFT adapter and no run: `scalabl import --from peft` makes it one"),
    ("evaluate ... --run half",
     f"half: training is unfinished, at step 2 of 4: go on with {GO_ON}"),
    ("evaluate ... --run train.jsonl",
     "train.jsonl: no such folder: expected a run, which `scalabl train` writes"),
    ("evaluate ... --out train.jsonl", "train.jsonl: cannot be made a folder: File exists"),
    ("evaluate --run run --data train.jsonl --out run/test",
     "run/test: holds results of another data file: give --force or --out DIR"),
    ("evaluate --data test.jsonl", "give --run, or --model to evaluate a model without adapters"),
    ("evaluate --run run",
     "scalabl evaluate: the following arguments are required: --data: " + USAGE["evaluate"]),
    ("evaluate --model peft --data test.jsonl",
     "peft: is a PEFT adapter, not a model: `scalabl import --from peft` makes it a run"),
    ("evaluate --model run --data test.jsonl", "run: is a run, not a model: give it as --run"),
    # files of questions
    ("train ... --data train.jsonl --format csv",
     "train.jsonl: holds JSON, not a table: give --format jsonl"),
    ("train ... --data train.jsonl --format arc",
     "train.jsonl, line 1: key 'id' is missing: there are ['prompt', 'choices', 'label']"),
    ("train ... --data train.jsonl --format sst2",
     "train.jsonl, line 1: key 'text' is missing: there are ['prompt', 'choices', 'label']"),
    ("train ... --data table.csv --format jsonl",
     "table.csv, line 1: not JSON: Expecting value: line 1 column 1 (char 0): is --format "
     "right?"),
    ("train ... --data table.csv --format mmlu", "table.csv, line 1: expected 6 columns, found 2"),
    ("train ... --data sst2.txt",
     "sst2.txt, line 1: expected a JSON object, found 0: is --format right?"),
    ("train ... --data sst2.txt --format trec",
     "sst2.txt, line 1: the type before the question must be one of ABBR, DESC, ENTY, HUM, "
     "LOC, NUM, not '0'"),
    ("train ... --data key.jsonl",
     "key.jsonl, line 1: key 'prompt' is missing (--text-column names another): there are "
     "['promt', 'choices', 'label']"),
    ("train ... --data nolabel.jsonl",
     "nolabel.jsonl, line 1: key 'label' is missing (--label-column names another): there are "
     "['prompt', 'choices']"),
    ("train ... --data range.jsonl",
     "range.jsonl, line 2: label must be the place in choices, from 0 (here 0 to 2), or one "
     "of their names, not 3"),
    ("train ... --data negative.jsonl",
     "negative.jsonl, line 2: label must be the place in choices, from 0 (here 0 to 2), or "
     "one of their names, not -1"),
    ("train ... --data name.jsonl",
     "name.jsonl, line 2: label must be the place in choices, from 0 (here 1), or one of "
     "their names, not 'positve': did you mean 'positive'?"),
    ("train ... --data text.jsonl",
     "text.jsonl, line 2: label must be the place in choices, from 0 (here 1), or one of "
     "their names, not '1'"),
    ("train ... --data letter.jsonl",
     "letter.jsonl, line 1: label must be the place in choices, from 0 (here 0 to 2), or one "
     "of their names, not 'A'"),
    ("train ... --data null.jsonl",
     "null.jsonl, line 1: label must be the place in choices, from 0 (here 0 to 2), or one of "
     "their names, not None"),
    ("train ... --data mixed.jsonl --labels words",
     "labels as words need the same choices in every row: row 1 has 'a', 'b', row 0 has 'no "
     "0', 'no 1', 'no 2'"),
    ("train ... --data same.jsonl --labels words",
     "labels 'no cat' and 'no dog' begin with the same token, 'n': rename one, or use "
     "--labels letters"),
    ("train ... --data long.jsonl",
     "example 1 (id 1): its prompt has 332 tokens, but the model takes at most 128: "
     "--max-length 128 cuts it, or leaves it out with --drop-long"),
    ("train ... --data long.jsonl --drop-long",
     "drop_long needs a max_length (--drop-long needs --max-length)"),
    ("train ... --data onechoice.jsonl",
     "onechoice.jsonl, line 1: expected 2 to 26 choices, found 1"),
    ("train ... --data manychoices.jsonl",
     "manychoices.jsonl, line 1: expected 2 to 26 choices, found 30"),
    ("train ... --data choicestext.jsonl",
     "choicestext.jsonl, line 1: 'choices' must be a list, not 'a,b'"),
    ("train ... --data emptyprompt.jsonl", "emptyprompt.jsonl, line 1: 'prompt' is empty"),
    ("train ... --data onelabel.jsonl",
     "onelabel.jsonl: expected 2 to 26 different labels in 'label', as no row has 'choices', "
     "found 1: ['a']"),
    ("train ... --data nolabel.csv",
     "nolabel.csv: no column is called label, labels, class, category, target: give "
     "--label-column one of ['sort']"),
    ("train ... --data textonly.csv",
     "textonly.csv: has no column of labels: there are ['id', 'text']"),
    ("train ... --data table.csv --text-column body",
     "table.csv: no column is called 'body': give --text-column one of ['text', 'label']"),
    ("train ... --data comma.csv",
     "comma.csv, line 2: expected 2 columns, found 3: a text with a comma must be in quotes"),
    ("train ... --data notjson.jsonl",
     "notjson.jsonl, line 2: not JSON: Expecting property name enclosed in double quotes: "
     "line 2..."),
    ("train ... --data utf16.csv", "utf16.csv: is UTF-16 text: save it as UTF-8"),
    ("train ... --data latin.jsonl", "latin.jsonl, line 1: expected UTF-8 text"),
    ("train ... --data empty.jsonl", "empty.jsonl: holds no examples"),
    ("train ... --data model.gguf",
     "model.gguf, line 1: not JSON: Expecting value: line 1 column 1 (char 0): is --format "
     "right?"),
    ("train ... --answer-tokens space",
     "choice ' A' is not a single token after 'no 1\\nC. no 2\\nAnswer:': use "
     "--answer-tokens bare"),
    ("train ... --prompt-style chat", "this model has no chat template: use --prompt-style plain"),
    ("train ... --max-length 0", "max_length must be at least 1 token, and is 0"),
    ("train ... --limit 0", "the limit must be at least 1 example, and is 0"),
    ("train ... --holdout 1", "--holdout must be in [0, 1), not 1.0"),
    # options
    ("evalute --run run", "no command 'evalute': did you mean evaluate?"),
    ("lora",
     "no command 'lora': expected demo, train, evaluate, calibrate, threshold, predict, serve, "
     "posterior, generate, export, import, count, plan, ..."),
    ("train ... --num-epochs 3",
     "scalabl train has no option --num-epochs: did you mean --epochs? " + USAGE["train"]),
    ("train ... --learning-rate 1e-3",
     "scalabl train has no option --learning-rate: did you mean --lr? " + USAGE["train"]),
    ("train ... --batch-size 4",
     "scalabl train has no option --batch-size: did you mean --batch? " + USAGE["train"]),
    ("train ... --output-dir new",
     "scalabl train has no option --output-dir: did you mean --out? " + USAGE["train"]),
    ("train ... --dataset train.jsonl",
     "scalabl train has no option --dataset: did you mean --data? " + USAGE["train"]),
    ("train ... --max-seq-length 9",
     "scalabl train has no option --max-seq-length: did you mean --max-length? " + USAGE["train"]),
    ("train ... --bach 4",
     "scalabl train has no option --bach: did you mean --batch? " + USAGE["train"]),
    ("train ... -steps 4",
     "scalabl train has no option -steps: did you mean --steps? " + USAGE["train"]),
    ("train ... --foo 4", "scalabl train has no option --foo: " + USAGE["train"]),
    ("train --modle model",
     "scalabl train has no option --modle: did you mean --model? " + USAGE["train"]),
    ("train ... --r 4",
     "scalabl train: ambiguous option: --r could match --resume, --rank, --recompute: "
     + USAGE["train"]),
    ("train ... --lr", "scalabl train: argument --lr: expected one argument: " + USAGE["train"]),
    ("train ... --seed x", "--seed must be a whole number, not 'x'"),
    ("train ... --seed -1", "seed must be in [0, 18446744073709551616), not -1"),
    ("train ... --method scalable",
     "--method must be one of scalabl, mle, map, blob, dropout, point, not 'scalable': did you "
     "mean scalabl?"),
    ("train ... --method laplace",
     "--method must be one of scalabl, mle, map, blob, dropout, point, not 'laplace'"),
    ("train ... --kl reverse", "--kl must be one of forward, official, not 'reverse'"),
    ("train ... --format jsno",
     "--format must be one of jsonl, arc, obqa, winogrande, boolq, mmlu, sst2, trec, csv, "
     "not 'jsno': did you mean jsonl?"),
    ("train ... --device cuda", "this PyTorch is CPU-only: install a CUDA build or drop --device"),
    ("train ... --device cuda:9",
     "this PyTorch is CPU-only: install a CUDA build or drop --device"),
    ("train ... --device gpu", "device 'gpu' cannot be used: did you mean cuda?"),
    ("train ... --device mps",
     "device 'mps' cannot be used: Apple GPUs are not supported: use cpu"),
    ("train ... --device meta", "device 'meta' cannot be used: expected cpu, cuda or cuda:1"),
    ("train ... --dtype float16",
     "--dtype must be one of float32, bfloat16, not 'float16': did you mean bfloat16?"),
    ("train ... --dtype fp32", "--dtype must be one of float32, bfloat16, not 'fp32'"),
    ("train ... --quantize int4",
     "--quantize must be one of int8, nf4, not 'int4': did you mean int8?"),
    ("train ... --rank 0", "rank must be at least 1, not 0"),
    ("train ... --rank 99", "rank 99 is larger than a dimension of layers.0.attn.q_proj (16, 16)"),
    ("train ... --alpha 0", "alpha must be positive and finite, not 0.0"),
    ("train ... --targets q_porj", "unknown target 'q_porj': did you mean q_proj?"),
    ("train ... --targets q_proj,v_proj",
     "unknown target 'q_proj,v_proj': put spaces between names"),
    ("train ... --targets all",
     "unknown target 'all': expected q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
     "down_proj, lm_head"),
    ("train ... --steps 0", "steps must be at least 1, not 0"),
    ("train ... --steps 1e3", "--steps must be a whole number, not '1e3'"),
    ("train ... --lr -1", "lr must be finite and not negative, and is -1.0"),
    ("train ... --lr nan", "lr must be finite and not negative, and is nan"),
    ("train ... --batch 0", "batch must be at least 1, not 0"),
    ("train ... --warmup 2", "warmup must lie between 0 and 1, and is 2.0"),
    ("train ... --shard",
     "sharding and offloading weights need ranks: start them with torchrun, a single one with "
     "torchrun --nproc-per-node 1"),
    ("train ... --out half --resume --lr 0.5",
     "half/checkpoint: is of a run with other settings: train.lr was 0.001 and now is 0.5"),
    ("train ... --out half",
     f"half: holds a run already: go on with {GO_ON}, or give another --out"),
    ("evaluate ... --samples many", "--samples must be a number, auto or exact, not 'many'"),
    ("evaluate ... --samples -1", "samples must not be negative, and is -1"),
    ("evaluate ... --samples 2000000000", "samples must be at most 100,000, and is 2,000,000,000"),
    ("evaluate ... --samples exact",
     "exact prediction needs lm_head alone to be adapted, by scalabl"),
    ("evaluate ... --samples auto --tolerance 2", "tolerance must lie between 0 and 1, and is 2.0"),
    ("evaluate ... --limit 0", "the limit must be at least 1 example, and is 0"),
    ("evaluate ... --bins 0", "bins must be at least 1, and is 0"),
    ("evaluate ... --batch 0", "batch must be at least 1, and is 0"),
    ("evaluate ... --labels words",
     "labels 'no 0' and 'no 1' begin with the same token, 'n': rename one, or use --labels "
     "letters"),
    ("evaluate ... --seed -1", "seed must be in [0, 18446744073709551616), not -1"),
    # other commands
    ("predict --run run --prompt x --choices a b c d", "run: can answer 3 choices, not 4"),
    ("predict --run run --prompt x --choices a", "expected 2 to 26 choices, found 1"),
    ("predict --run run --prompt how are you --choices a b c",
     "unexpected argument 'are': a text with spaces needs quotes"),
    ("predict --run run --prompt '' --choices a b c", "the question is empty"),
    ("predict --run run --choices a b c",
     "give --prompt TEXT, or --data FILE with --out FILE"),
    ("predict --run run --prompt x --model absent",
     "absent: no such folder: --model takes a folder, or OWNER/NAME on the Hugging Face Hub"),
    ("predict --run run --out new.csv",
     "give --prompt TEXT, or --data FILE with --out FILE"),
    ("calibrate --run run", "run: was trained without --holdout: give --data"),
    ("calibrate --run absent --data test.jsonl",
     "absent: no such folder: expected a run, which `scalabl train` writes"),
    ("threshold --run run", "run: was trained without --holdout: give --data"),
    ("threshold --run run --data absent.jsonl", "absent.jsonl: no such file"),
    ("threshold --run run --data test.jsonl --accuracy 1",
     "accuracy must be between 0 and 1, and is 1.0"),
    ("generate --run run --prompt x",
     "the head was cut down to class tokens: it can answer; to write text train with --head "
     "full"),
    ("generate --run laplace --prompt x",
     "laplace: its posterior answers questions, it cannot write text"),
    ("generate --prompt x", "give --run or --model"),
    ("generate --model absent --prompt x",
     "absent: no such folder: --model takes a folder, or OWNER/NAME on the Hugging Face Hub"),
    ("posterior laplace --run run --out new",
     "run: laplace needs a run of method mle or map, not scalabl"),
    ("posterior bayes --run mle --out new",
     "method must be one of subspace, laplace, tfb, swag, ensemble, not 'bayes'"),
    ("posterior laplace --run mle",
     "scalabl posterior: the following arguments are required: --out: " + USAGE["posterior"]),
    ("posterior ensemble --run mle --out new",
     "posterior ensemble takes two runs or more in --run, not 1"),
    ("posterior swag --run mle --out new",
     "mle: has no swag.safetensors, which `train --swag` writes"),
    ("posterior laplace --run mle --out run", "run: exists already"),
    ("posterior laplace --run mle mle --out new",
     "posterior laplace takes one run in --run, not 2"),
    ("posterior laplace --run laplace --out new", "laplace: already has a posterior: laplace"),
    ("posterior subspace --run laplace --out new", "laplace: already has a posterior: laplace"),
    ("posterior subspace --run run mle --out new",
     "posterior subspace takes one run in --run, not 2"),
    ("posterior subspace --run run --out new --precision -1",
     "--precision must be a number above 0, evidence or validation, not '-1'"),
    ("posterior subspace --run run --out new --precision validation",
     "run: was trained without --holdout: give --validation"),
    ("posterior subspace --run run --out new --directions 0",
     "directions must be at least 1, not 0"),
    ("evaluate --run laplace --data test.jsonl --samples exact",
     "samples exact needs the adapters' own draws or a Subspace, not a Laplace"),
    ("evaluate --run subspace --data test.jsonl --samples auto",
     "samples auto needs the adapters' own draws, not a Subspace: give a number or exact"),
    ("study absent.json --out new", "absent.json: no such file"),
    ("study study.json --out new", "study.json: unknown field 'method': did you mean methods?"),
    ("study paper --out new", "study paper needs --model and --data"),
    ("study paper --model model --out new", "study paper needs --model and --data"),
    ("study paper --model model --data folder --plugin x.py --out new",
     "--plugin needs a study's FILE, and not the word paper"),
    ("study study.json",
     "scalabl study: the following arguments are required: --out: usage: scalabl study [FILE] "
     "--out FOLDER [options]; --help lists them"),
    ("conformance check folder", "conformance check needs DIR OUTPUTS"),
    ("conformance compare step-three", "conformance compare needs CASE VALUES"),
    ("conformance export new file", "conformance export needs DIR alone, and not file too"),
    ("conformance check absent theirs.safetensors", "absent/manifest.json: no such file"),
    ("export --run mle --to peft --out new --samples 3",
     "mle: method mle has no draws: leave --samples out"),
    ("export --run mle --to gguf --out new", "--to must be one of peft, hf, not 'gguf'"),
    ("export --run run --to peft --out run", "run: exists already"),
    ("import model --from peft --model model --out new", "model/adapter_config.json: no such file"),
    ("import peft --from bayesadapt --model model --out new", "peft/state_dict.pt: no such file"),
    ("import peft --model model --out new",
     "scalabl import: the following arguments are required: --from: " + USAGE["import"]),
    ("count --config llama-7b",
     "'llama-7b' is neither a file nor a known model: did you mean llama-2-7b?"),
    ("count --config absent/config.json",
     "'absent/config.json' is neither a file nor a known model: expected llama-2-7b, "
     "llama-2-13b, llama-2-70b, llama-3.1-8b, llama-3.1-70b, qwen2.5-0.5b, qwen2.5-1.5b, "
     "qwen2.5-3b, ..."),
    ("plan --config llama-2-7b --memory 16GB", "--memory must be a number, not '16GB'"),
    ("plan --config llama-2-7b --memory 16 --rate 5",
     "give both --rate and --bandwidth, or neither"),
    ("plan --config llama-2-7b --memory 16 --gpus -1 --rate 5 --bandwidth 5",
     "--gpus must not be negative, and other numbers must be above 0"),
    ("plan --config llama-2-7b --memory 0",
     "--gpus must not be negative, and other numbers must be above 0"),
]  # fmt: skip

ONE = {"prompt": "x", "choices": ["no 0", "no 1", "no 2"], "label": 0}
ROWS = {  # files of questions with a mistake, each by its rows
    "key": [{"promt": "x", "choices": ["a", "b"], "label": 0}],
    "nolabel": [{"prompt": "x", "choices": ["a", "b"]}],
    "range": [ONE, {**ONE, "label": 3}],
    "negative": [ONE, {**ONE, "label": -1}],
    "name": [ONE, {**ONE, "choices": ["negative", "positive"], "label": "positve"}],
    "text": [ONE, {**ONE, "label": "1"}],
    "letter": [{**ONE, "label": "A"}],
    "null": [{**ONE, "label": None}],
    "mixed": [ONE, {**ONE, "choices": ["a", "b"]}],
    "same": [{"prompt": f"p{i}", "choices": ["no cat", "no dog"], "label": i} for i in range(2)],
    "long": [ONE, {**ONE, "prompt": "x" * 300}],
    "onechoice": [{**ONE, "choices": ["a"]}],
    "manychoices": [{**ONE, "choices": [str(i) for i in range(30)]}],
    "choicestext": [{**ONE, "choices": "a,b"}],
    "emptyprompt": [{**ONE, "prompt": " "}],
    "onelabel": [{"prompt": "x", "label": "a"}, {"prompt": "y", "label": "a"}],
}
FILES: dict[str, str | bytes] = {
    "table.csv": "text,label\nt0,a\nt1,b\n",
    "nolabel.csv": "text,sort\na,b\nc,d\n",
    "textonly.csv": "id,text\n1,b\n2,d\n",
    "comma.csv": "text,label\nhello, you,b\nc,d\n",
    "notjson.jsonl": json.dumps(ONE) + "\n{'prompt': 1}\n",
    "utf16.csv": "text,label\na,b\n".encode("utf-16"),
    "latin.jsonl": b'{"prompt": "caf\xe9", "label": "a"}\n',
    "empty.jsonl": "",
    "sst2.txt": "0 bad\n1 good\n",
    "nothing.txt": "Hello\n",
    "misspelt.txt": "{question} {choice}\n",
    "vague.txt": "{text} {choices}",
    "model.gguf": b"GGUF" + bytes(100),
    "study.json": json.dumps(
        {"model": "model", "train": "train.jsonl", "test": "test.jsonl", "method": ["mle"]}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, files with mistakes, and runs: finished ones, an unfinished one, a posterior."""
    work = tmp_path_factory.mktemp("mistakes")
    tiny_folder(work / "model")
    questions_file(work / "train.jsonl")
    questions_file(work / "test.jsonl", rows=9)
    for name, rows in ROWS.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, data in FILES.items():
        (work / name).write_bytes(data.encode() if isinstance(data, str) else data)
    (work / "folder").mkdir()
    (work / "gemma").mkdir()
    (work / "gemma" / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    for name, absent in (("shards", "model.safetensors"), ("noweights", "model.safetensors"),
                         ("notok", "tokenizer.json")):  # fmt: skip
        shutil.copytree(work / "model", work / name)
        (work / name / absent).unlink()
    index = {"weight_map": {"embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (work / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for command in (
            "train ... --out run",
            "train ... --out mle --method mle",
            "train ... --out half --checkpoint-every 2",
            "posterior laplace --run mle --out laplace",
            "posterior subspace --run run --out subspace",
            "export --run mle --to peft --out peft",
            "evaluate --run run --data test.jsonl --samples 2",
        ):
            assert cli.main(split(command)) == 0, command
    (work / "half" / "run.json").unlink()
    shutil.rmtree(work / "half" / "checkpoint" / "00000004")
    return work


def split(command: str) -> list[str]:
    first = command.split()[0]
    return shlex.split(command.replace(f"{first} ...", USUAL.get(first, "")))


def listing(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def answer(command: str, folder: Path, monkeypatch, capsys) -> str:
    """The one line behind "error: "; exit code 2, and nothing printed, written or left behind."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    before = listing(folder)
    code = cli.main(split(command))
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    line = err.replace(f"{folder}{os.sep}", "")
    assert line.startswith("error: ") and line.endswith("\n") and line.count("\n") == 1, line
    assert len(line) <= 201, line  # with its line break
    assert listing(folder) == before
    return line.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(("command", "line"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_answered_in_one_line(folder, monkeypatch, capsys, command, line):
    if "--device cuda" in command and torch.backends.cuda.is_built():
        pytest.skip("this PyTorch has CUDA")
    assert answer(command, folder, monkeypatch, capsys) == line


def test_a_name_on_the_hub(folder, monkeypatch, capsys):
    """Without the package, and without a network, whose error may be long."""
    command = "train ... --model owner/name"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert answer(command, folder, monkeypatch, capsys) == (
        "owner/name: no such folder, and the Hub needs a package: pip install -e '.[hf]' "
        "in the clone"
    )

    def snapshot_download(*args, **options):
        raise OSError("Name or service not known.\n" * 20)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    said = answer(command, folder, monkeypatch, capsys)
    assert said.startswith("owner/name: no such folder, and the Hub download failed: Name or serv")


def test_there_are_fifty_mistakes_at_least_and_no_two_the_same():
    assert len({command for command, _ in MISTAKES}) == len(MISTAKES) >= 50
