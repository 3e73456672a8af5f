#!/usr/bin/env bash
# One would guess that a tokenizer.json decides how a text is cut: it did in transformers 4, and the engines that serve
# a model (the tokenizers library itself) read it so. In transformers 5 the class that tokenizer_config.json names
# (GPT2Tokenizer, as that of many models with byte-level BPE) is made anew of the file's vocabulary and merges, with a
# pre-tokenizer of its own. A file with digits one by one loses them: 2024 is one token for the trainer and four for the model that was
# pretrained, without a word. A config.json of another model type beside it changes nothing. Who is hurt: whoever
# trains, scores or evaluates a model on text that AutoTokenizer has cut, and compares with ids that were made before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
)
bpe.train_from_iterator(["year 2024 and 2025"] * 9, trainer)
bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), bpe.pre_tokenizer]
)
found = {"tokenizers": bpe.encode("year 2024").tokens}
for name in ("GPT2Tokenizer", "PreTrainedTokenizerFast"):
    folder = Path(name)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, "eos_token": "<eos>"})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found[f"AutoTokenizer, tokenizer_class {name}"] = AutoTokenizer.from_pretrained(folder).tokenize("year 2024")
path = Path("GPT2Tokenizer")
found["PreTrainedTokenizerFast of that folder"] = PreTrainedTokenizerFast.from_pretrained(path).tokenize("year 2024")
for how, tokens in found.items():
    print(f"{how}: {tokens}")
by_file = ["year", "\u0120", "2", "0", "2", "4"]
lost = found.pop("AutoTokenizer, tokenizer_class GPT2Tokenizer")
assert lost == ["year", "\u01202024"], lost
assert all(tokens == by_file for tokens in found.values()), found
PY
