#!/usr/bin/env bash
# Guess: Trainer on an IterableDataset whose batches are no multiple of gradient_accumulation_steps
# either steps on the last short group, or leaves it out.
# Seen: it does neither. The short group is divided by its own tokens, its gradients stay, and the next
# pass's first group is added to them: that step's gradient is the sum of two means, about twice as long,
# and so is the loss that is logged for it. It comes back once a pass. A list of the same rows is right:
# its length is known, and the last group is a step.
# Hurt: whoever trains on a stream for more than one pass with accumulation.
# Exits non-zero if this changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import os
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
import transformers
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
rows = [dict(input_ids=ids, labels=ids) for ids in torch.randint(50, (3, 16))]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows)


def train(dataset):
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=1, learning_rate=0.0,
        gradient_accumulation_steps=2, logging_steps=1, max_grad_norm=1e9, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # rate 0: the same weights in both steps
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.train()
    return [one for one in trainer.state.log_history if "grad_norm" in one]


def gradient(chosen):  # of the mean over all their tokens; every row has the same number
    model.zero_grad()
    for row in chosen:
        inputs = {name: value[None] for name, value in row.items()}
        (model(**inputs, use_cache=False).loss / len(chosen)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


first, second = train(Stream())
found = float(second["grad_norm"])
sum_of_two = (gradient(rows[2:]) + gradient(rows[:2])).norm().item()
mean_of_three = gradient(rows).norm().item()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
for step, one in enumerate((first, second), 1):
    print(f"step {step}: loss {one['loss']}, gradient norm {one['grad_norm']}")
print(f"gradient of row 3 + mean gradient of rows 1, 2: norm {sum_of_two:.3f}")
print(f"mean gradient of rows 3, 1, 2: norm {mean_of_three:.3f}")
twice = 1.9 < float(second["loss"]) / float(first["loss"]) < 2.1
raise SystemExit(not (twice and abs(found - sum_of_two) < 2e-3 < abs(found - mean_of_three)))
PYTHON
