#!/usr/bin/env bash
# One would guess that AutoConfig.from_pretrained(folder, rope_theta=...), or config.rope_theta = ... before the model is
# loaded, gives a model of that rotary base: both did in transformers 4, and config fields are documented to be overridden so. In
# transformers 5 the base is read from config.rope_parameters alone: both are without effect and without a word, and what
# was assigned is even saved into config.json, beside the rope_parameters that rule. Who is hurt: whoever raises the base to
# go on with longer windows: the run and its config look right, and the old positions are trained.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained("model")
ids = torch.arange(48)[None]


def logits(config):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained("model", config=config)(ids).logits


assigned, in_parameters = (AutoConfig.from_pretrained("model") for _ in range(2))
assigned.rope_theta = 100.0
in_parameters.rope_parameters["rope_theta"] = 100.0
ways = {
    "AutoConfig.from_pretrained(folder, rope_theta=100)": AutoConfig.from_pretrained("model", rope_theta=100.0),
    "config.rope_theta = 100": assigned,
    "config.rope_parameters['rope_theta'] = 100": in_parameters,
}
plain = logits(AutoConfig.from_pretrained("model"))
changes = {name: not torch.equal(plain, logits(config)) for name, config in ways.items()}
for name, changed in changes.items():
    print(f"{name}: the logits change: {changed}")
assigned.save_pretrained("again")
saved = json.loads(Path("again/config.json").read_text())
print("config.json then says rope_theta:", saved["rope_theta"], "and rope_parameters:", saved["rope_parameters"])
raise SystemExit(list(changes.values()) != [False, False, True])
PY
