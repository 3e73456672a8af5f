#!/usr/bin/env bash
# TRL's DPOTrainer on preference pairs that are tokenized already (prompt_ids, chosen_ids, rejected_ids: the columns that its own
# collator reads and its own evaluate() says it leaves alone). One would guess that they are trained on as they stand.
# Seen: where the texts stand beside them, the ids are overwritten without a word by those of the texts, each with an EOS behind it,
# so that a pair of single tokens (pivotal tokens) teaches to end after them; pairs of ids alone are a KeyError.
# Hurt: who trains on pairs of tokens, or of parts of responses: p(EOS | token) is half of what is trained.
# Exits non-zero if this changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python=${PYTHON:-$work/venv/bin/python}
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/venv"
    "$python" -m pip install -q torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 numpy
fi
cd "$work"
"$python" - 2>log <<'PYTHON' || { tail -20 log; exit 1; }
import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {"<pad>": 0, "</s>": 1, "one": 2, "plus": 3, "two": 4, "three": 5}
backend = Tokenizer(models.WordLevel(words, "<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model, other = (LlamaForCausalLM(LlamaConfig(vocab_size=6, **sizes)) for _ in range(2))
ids = {"prompt_ids": [2, 3], "chosen_ids": [4], "rejected_ids": [5]}
texts = {"prompt": "one plus ", "chosen": "two", "rejected": "three"}


def trained_on(row):
    arguments = trl.DPOConfig("out", bf16=False, report_to="none", use_cpu=True)
    given = {"train_dataset": Dataset.from_list([row]), "processing_class": tokenizer}
    try:
        trainer = trl.DPOTrainer(model, other, arguments, **given)
    except KeyError as error:
        return f"KeyError {error}"
    return [trainer.train_dataset[0][name] for name in ids]


print("trl", trl.__version__)
found = trained_on(ids | texts), trained_on(ids)
print("ids as given:        ", list(ids.values()))
print("ids beside the texts:", found[0])
print("ids alone:           ", found[1])
sys.exit(found != ([[2, 3], [4, 1], [5, 1]], "KeyError 'chosen'"))
PYTHON
