#!/usr/bin/env bash
# Guess: a causal LM of transformers that is given `position_ids` which begin again (documents packed
# into a row) keeps the documents apart, as its masking code does for packed rows.
# Seen: only with use_cache=False and no attention_mask. The default is use_cache=True, in train() too,
# and then the restart changes the rotary positions alone: every document attends to those before it,
# without a word. An attention_mask of ones does the same.
# Hurt: whoever packs documents and trains or scores in a loop of his own; the loss looks plausible.
# Exits non-zero if this changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, initializer_range=0.5, **sizes)).double().train()
ids = torch.randint(100, (1, 24))
packed = dict(input_ids=ids, position_ids=torch.cat([torch.arange(10), torch.arange(14)])[None])
apart = torch.cat([model(ids[:, :10]).logits, model(ids[:, 10:]).logits], 1)


def away(**options):
    return (model(**packed, **options).logits - apart).abs().max().item()


seen = {
    "default (use_cache=True)": away(),
    "use_cache=False": away(use_cache=False),
    "use_cache=False, attention_mask of ones": away(
        use_cache=False, attention_mask=torch.ones_like(ids)
    ),
}
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"logits of two packed documents against each alone (largest {apart.abs().max():.3g}):")
for call, difference in seen.items():
    print(f"  {call:42} {difference:.3g}")
default, right, masked = seen.values()
raise SystemExit(not (default > 1 and right < 1e-9 and masked > 1))
PYTHON
