"""The documents of a corpus: where each begins, and its tokens, across shards."""

from hashlib import sha256
from itertools import pairwise

import numpy as np

from slm.store.files import Recent
from slm.store.shards import Corpus


class Documents:
    """The documents of a corpus in order, each from its start to the next one's, across shards."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.before = np.cumsum([0, *corpus.shards.num_tokens])
        rows = [self.begun_in(shard) for shard in range(len(corpus.shards))]
        begun = np.concatenate([*rows, np.empty((0, 3), np.int64)])
        ends = np.append(begun[1:, 0], self.before[-1])
        self.rows = begun[ends > begun[:, 0]]  # (d, 3): first token in the corpus, source, record
        self.bounds = np.append(self.rows[:, 0], self.before[-1])
        self._columns = Recent()

    def __len__(self) -> int:
        return len(self.rows)

    def begun_in(self, shard: int) -> np.ndarray:  # (documents, 3)
        rows = np.asarray(self.corpus.column("documents", shard))
        if shard > 0:  # a negative start is that of a document of the shard before
            rows = rows[rows[:, 0] >= 0]
        starts = np.maximum(rows[:, 0], 0) + self.before[shard]
        return np.column_stack([starts, rows[:, 1:3]])

    def of_shard(self, shard: int) -> range:
        """Those that begin in it."""
        first, last = np.searchsorted(self.rows[:, 0], self.before[shard : shard + 2])
        return range(int(first), int(last))

    def shard_column(self, name: str, shard: int) -> np.ndarray:  # (tokens of the shard,)
        """Mapped."""
        return self._columns.get((name, shard), lambda: self.corpus.column(name, shard))

    def column(self, name: str, document: int) -> np.ndarray:  # (n,)
        start, end = self.bounds[document : document + 2]
        shard = int(np.searchsorted(self.before, start, side="right")) - 1
        pieces = []
        while start < end:
            offset, stop = self.before[shard], min(end, self.before[shard + 1])
            pieces.append(self.shard_column(name, shard)[start - offset : stop - offset])
            start, shard = stop, shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def tokens(self, document: int) -> np.ndarray:  # (n,)
        return self.column("tokens", document)

    def name(self, document: int) -> str:
        """For messages."""
        _, source, record = self.rows[document].tolist()
        sources = self.corpus.manifest["sources"]
        where = sources[source] if source < len(sources) else f"source {source}"
        return f"{self.corpus.folder}: document {document} (record {record} of {where})"

    def ids_sha256(self, dtype: str) -> list[bytes]:
        """Of the tokens of each document; dtype: that of the tokenizer's corpora."""
        found: list[bytes] = []
        for shard in range(len(self.corpus.shards)):
            mine = self.of_shard(shard)
            whole = np.ascontiguousarray(self.shard_column("tokens", shard), dtype)
            edges = self.bounds[mine.start : mine.stop + 1] - self.before[shard]
            places, view = (edges * whole.itemsize).tolist(), whole.data.cast("B")
            found += [sha256(view[start:end]).digest() for start, end in pairwise(places)]
            if len(mine) and edges[-1] > len(whole):  # the last goes on in the next shard
                found[-1] = sha256(self.tokens(mine[-1]).astype(dtype).tobytes()).digest()
        return found
