#!/usr/bin/env bash
# datatrove's DocumentTokenizer with save_loss_metadata: characters in `no_loss_ranges` are tokens without a loss. One would guess that
# their tokens are written, with False in the .loss file, wherever they stand. Where a range reaches the end of its document, they are
# written nowhere, and the document's end-of-text token, which no range names, goes with them: in the .ds, which is what trainers
# read, its text runs into the next document's. The index and the metadata agree with the shorter file, and nothing is said.
# Hurt: who masks a signature, a license or a last turn at the end of documents and packs them by EOS.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-$work/venv/bin/python}
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/venv"
    "$python" -m pip install -q datatrove==0.10.1 tokenizers==0.23.3 numpy==2.4.6 multiprocess dill rich
fi
cd "$work"
"$python" - 2>log <<'END' || { cat log; exit 1; }
import importlib.metadata, sys
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False))
tokenizer.save("tokenizer.json")

def written(masked):
    texts = ["one two [ad]", "three"]
    step = DocumentTokenizer(masked, tokenizer_name_or_path="tokenizer.json", eos_token="<|endoftext|>",
                             shuffle_documents=False, save_loss_metadata=True)
    start = {"end": 8, "middle": 4}[masked]
    step.run(iter([Document(texts[0], "0", metadata={"no_loss_ranges": [(start, start + 4)]}), Document(texts[1], "1")]), 0, 1)
    ids = np.fromfile(f"{masked}/00000_unshuffled.ds", np.uint16)
    loss = np.fromfile(f"{masked}/00000_unshuffled.ds.loss", bool)
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False), int((~loss).sum())

print("datatrove", importlib.metadata.version("datatrove"))
found = {masked: written(masked) for masked in ("middle", "end")}
for masked, (text, count) in found.items():
    print(f"four characters of the first document masked at its {masked}: {text!r}, {count} tokens without loss")
sys.exit(found != {"middle": ("one two [ad]<|endoftext|>three<|endoftext|>", 4), "end": ("one two three<|endoftext|>", 0)})
END
