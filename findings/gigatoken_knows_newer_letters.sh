#!/usr/bin/env bash
# One would guess that a tokenizer that reads the same tokenizer.json gives the same ids, whatever the text: gigatoken is
# made as a faster drop-in, and on ordinary text it gives them. Its patterns \p{L} and \p{N} are of a newer release of Unicode than
# those of Hugging Face's tokenizers, so a letter that was assigned in between belongs to the word before it for one and
# not for the other, and GPT-2's pattern cuts elsewhere. Who is hurt: whoever encodes a corpus with the one and serves or
# scores the model with the other: texts in young scripts get ids that the model has never seen in this place, silently.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gigatoken==0.10.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

from gigatoken import Tokenizer as Fast
from tokenizers import Tokenizer, models, pre_tokenizers

print(*(f"{name} {version(name)}" for name in ("gigatoken", "tokenizers")))
kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in kept]
signs = {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}
# Bytes, and "a" with the first byte of any longer character: one token where the two are of one word.
merges = [("a", signs[lead]) for lead in range(0xC2, 0xF5)]
words = [*signs.values(), *("".join(pair) for pair in merges)]
slow = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
slow.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
fast = Fast.from_json(json.dumps(json.loads(slow.to_str()) | {"added_tokens": []}))
other = [
    point
    for point in range(0x80, 0x110000)
    if not 0xD800 <= point < 0xE000
    and list(fast.encode(f"a{chr(point)}")) != slow.encode(f"a{chr(point)}").ids
]
print(f"other ids for {len(other)} code points, the first ones:", *(f"U+{point:04X}" for point in other[:8]))
for point in (0xE9, *other[:1]):
    text = f"a{chr(point)}"
    print(f"a and U+{point:04X}: tokenizers {slow.encode(text).ids}, gigatoken {fast.encode(text).tolist()}")
raise SystemExit(not other)
PY
