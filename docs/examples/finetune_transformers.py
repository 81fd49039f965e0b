"""Fine-tune a transformers model on lettered questions, and say how sure it is of each answer.

python finetune_transformers.py MODEL TRAIN.jsonl TEST.jsonl OUT [STEPS]
"""

import sys

from transformers import AutoModelForCausalLM, TrainingArguments

from scalabl_ref import AdapterConfig, hf
from scalabl_ref.data import collate, encode, load
from scalabl_ref.tokenizer import LETTERS, load_tokenizer

folder, train, test, out = sys.argv[1:5]
tokenizer = load_tokenizer(folder)
data = encode(load(train, "jsonl"), tokenizer)
model = AutoModelForCausalLM.from_pretrained(folder)
attached = hf.attach(model, AdapterConfig(rank=8), classes=data.classes)
trainer = hf.trainer(
    attached,
    num_examples=len(data.labels),
    args=TrainingArguments(out, max_steps=int((sys.argv[5:] or [500])[0]), learning_rate=1e-3),
    train_dataset=range(len(data.labels)),
    data_collator=lambda rows: hf.inputs(attached, collate(data, rows)),
)
trainer.train()
hf.save(attached, out)

data = encode(load(test, "jsonl"), tokenizer, classes=len(data.classes))
for row, label in enumerate(data.labels):
    batch = collate(data, [row]).to(model.device)
    answer = hf.predict(attached, hf.inputs(attached, batch), groups=batch.ids)
    p, chosen = (float(x) for x in answer.probs[0].max(0))
    verdict = "right" if chosen == label else "wrong"
    print(LETTERS[int(chosen)], verdict, f"{p:.3f}", f"{float(answer.mutual_information):.4f}")
