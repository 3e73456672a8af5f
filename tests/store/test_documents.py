"""Where the documents of a corpus begin and end, across its shards."""

import hashlib

from document_helpers import END, TEXTS, corpus_of
from slm.store.documents import Documents


def test_documents_go_on_over_shards(tmp_path, tokenizer):
    corpus = corpus_of(tmp_path, [TEXTS[0], END, TEXTS[1], END], tokenizer, shard_tokens=20)
    documents = Documents(corpus)
    assert len(corpus.shards) > 4 and len(documents) == 4
    assert [documents.of_shard(i) for i in range(len(corpus.shards))][0][0] == 0
    assert sum(len(documents.of_shard(i)) for i in range(len(corpus.shards))) == 4
    tokens = documents.tokens(1)
    assert tokenizer.decode(tokens[:-1]) == END and tokens[-1] == tokenizer.eos_token_id
    hashes = documents.ids_sha256("uint16")
    assert hashes == [
        hashlib.sha256(documents.tokens(i).astype("<u2").tobytes()).digest() for i in range(4)
    ]
