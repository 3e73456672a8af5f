"""`pieces.py corpus out.jsonl`: its documents as pieces of 64 tokens, in another order."""

import json
import random
import sys

from slm.store.documents import Documents
from slm.store.shards import Corpus
from slm.store.tokenizer import load_corpus_tokenizer

PIECE_TOKENS = 64


def main(folder: str, out: str) -> None:
    corpus = Corpus.open(folder)
    documents, tokenizer = Documents(corpus), load_corpus_tokenizer(corpus)
    pieces: list[str] = []
    for number in range(len(documents)):
        ids = [i for i in documents.tokens(number).tolist() if i != corpus.manifest["eos_id"]]
        pieces += (
            str(tokenizer.decode(ids[at : at + PIECE_TOKENS]))
            for at in range(0, len(ids), PIECE_TOKENS)
        )
    random.Random(0).shuffle(pieces)
    with open(out, "w") as file:
        file.writelines(json.dumps({"text": piece}) + "\n" for piece in pieces if piece.strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
