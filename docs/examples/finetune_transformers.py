"""Fine-tune a transformers model on lettered questions, and say how sure it is of each answer.

python finetune_transformers.py MODEL TRAIN.jsonl TEST.jsonl OUT [options of transformers' Trainer]
"""

import sys

from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

from scalabl_ref import AdapterConfig, hf
from scalabl_ref.data import collate, encode, load
from scalabl_ref.data.tokenizer import LETTERS, load_tokenizer

folder, train, test, out, *options = sys.argv[1:]
options = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
    ["--output_dir", out, "--save_strategy", "no", "--learning_rate", "1e-3", *options]
)
tokenizer = load_tokenizer(folder)
data = encode(load(train, "jsonl"), tokenizer)
model = AutoModelForCausalLM.from_pretrained(folder)
attached = hf.attach(model, AdapterConfig(rank=8), classes=data.classes)
hf.trainer(
    attached,
    num_examples=len(data.labels),
    args=options[0],
    train_dataset=range(len(data.labels)),
    data_collator=lambda rows: hf.inputs(attached, collate(data, rows)),
).train()
hf.save(attached, out)

data = encode(
    load(test, "jsonl"), tokenizer, classes=len(data.classes), wording=data.wording
)  # the same answers as in training
for row, label in enumerate(data.labels):
    batch = collate(data, [row]).to(model.device)
    answer = hf.predict(attached, hf.inputs(attached, batch), groups=batch.ids)
    p, chosen = (float(x) for x in answer.probs[0].max(0))
    verdict = "right" if chosen == label else "wrong"
    print(LETTERS[int(chosen)], verdict, f"{p:.3f}", f"{float(answer.mutual_information):.4f}")
