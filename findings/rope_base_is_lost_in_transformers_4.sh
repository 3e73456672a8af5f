#!/usr/bin/env bash
# One would guess that a model folder that transformers 5 saves is read by transformers 4 as the same model, or refused:
# class, weights and fields are those of the same format. transformers 5 writes the rotary base into rope_parameters alone;
# transformers 4 keeps that as a field that nothing reads, takes the base for the class's default (10,000), and loads without a
# word. Who is hurt: whoever trains with another base (for longer windows) and serves or evaluates with what is pinned below
# transformers 5: the model answers, a little worse at short range and much worse at long. A rope_theta beside it is read by both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.57.3; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "transformers==$version" torch==2.13.0
done
cd "$folder"
cat > save.py <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
rope = {"rope_type": "default", "rope_theta": 250.0}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, rope_parameters=rope, **sizes)).eval()
model.save_pretrained("plain")
model.config.rope_theta = 250.0
model.save_pretrained("named_twice")
with torch.no_grad():
    torch.save(model(torch.arange(48)[None]).logits, "logits.pt")
PY
cat > load.py <<'PY'
import torch
import transformers
from transformers import AutoModelForCausalLM

print("transformers", transformers.__version__)
saved, same = torch.load("logits.pt"), {}
for name in ("plain", "named_twice"):
    model = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        same[name] = torch.equal(model(torch.arange(48)[None]).logits, saved)
    print(f"{name}: the logits are those that were saved: {same[name]}")
is_old = transformers.__version__.startswith("4")
raise SystemExit(same != {"plain": not is_old, "named_twice": True})
PY
5.23.0/bin/python save.py
5.23.0/bin/python load.py
4.57.3/bin/python load.py
