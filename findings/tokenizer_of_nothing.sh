#!/usr/bin/env bash
# One would guess: AutoTokenizer of a folder without any tokenizer file is an error. It is one for some model types
# (llama, mistral); for others (gpt2, qwen2, gpt_neox) it is a tokenizer of special tokens alone, without a warning,
# to which every text is no token. Hurt: whoever saved a model without its tokenizer, and trains or scores on nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import json, sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer

print("transformers", transformers.__version__)
expected = {"gpt2": [], "qwen2": [], "gpt_neox": [], "llama": "ValueError", "mistral": "ValueError"}
found = {}
for name in expected:
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": name}))
    try:
        found[name] = AutoTokenizer.from_pretrained(folder)("hello world")["input_ids"]
    except ValueError as error:
        found[name] = type(error).__name__
    print(f"{name}: {found[name]}")
sys.exit(found != expected)
PY
