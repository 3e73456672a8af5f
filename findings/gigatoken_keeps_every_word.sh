#!/usr/bin/env bash
# One would guess that an encoder's memory is that of its vocabulary: Hugging Face's tokenizers keep the ids of 10,000
# words and no more. gigatoken keeps those of every word that it has met, for as long as the object lives, some 100 bytes
# each; on ordinary text, whose words are soon all known, it does not show. Who is hurt: whoever encodes gigabytes with one object
# in one process. Text of ever new words (code, hashes, names, several languages) takes 100 MB a million of them,
# and nothing in its interface empties or bounds it; a new object does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gigatoken==0.10.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import random
import resource
from importlib.metadata import version
from string import ascii_lowercase

from gigatoken import Tokenizer as Fast
from tokenizers import Tokenizer, models, pre_tokenizers

print(*(f"{name} {version(name)}" for name in ("gigatoken", "tokenizers")))
signs = pre_tokenizers.ByteLevel.alphabet()
slow = Tokenizer(models.BPE({sign: i for i, sign in enumerate(sorted(signs))}, []))
slow.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
fast = Fast.from_json(json.dumps(json.loads(slow.to_str()) | {"added_tokens": []}))
rng = random.Random(0)


def words(count: int) -> str:
    return " ".join("".join(rng.choices(ascii_lowercase, k=9)) for _ in range(count))


def grown_mb(encode, texts) -> float:
    """Of the largest that the process was; the text that is encoded is as long every time."""
    encode(words(100_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in texts:
        encode(text)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def slowly(text: str) -> list[int]:
    return slow.encode_batch_fast([text])[0].ids


same = words(100_000)
found = {
    "tokenizers, the same words 20 times": grown_mb(slowly, (same for _ in range(20))),
    "tokenizers, 2,000,000 new words": grown_mb(slowly, (words(100_000) for _ in range(20))),
    "gigatoken, the same words 20 times": grown_mb(fast.encode, (same for _ in range(20))),
    "gigatoken, 2,000,000 new words": grown_mb(fast.encode, (words(100_000) for _ in range(20))),
}
for name, size in found.items():
    print(f"{name}: {size:.0f} MB more")
raise SystemExit(found["gigatoken, 2,000,000 new words"] < 50)
PY
