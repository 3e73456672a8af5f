"""What of some token sequences stands in a corpus, word for word: the longest runs of each.

    Sequences(list of ids, 8).mark(corpus, advance)

A corpus is read once, in order, at the cost of a hash for each of its tokens. A run is extended
from where 8 tokens are those of a sequence, and compared token by token. Memory is a chunk and what
is found in it. A run ends with a shard of the corpus.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slm.prepare.overlap import ngram_keys
from slm.store.files import Advance, nothing
from slm.store.shards import Corpus

CHUNK_TOKENS = 2**20
BITS = 20  # of a hash that a first look compares


class Copied(NamedTuple):
    """Of one sequence."""

    num_tokens: int  # within runs that stand in the corpus
    start: int  # of the longest run
    length: int  # 0: there is none


class Sequences:
    """Token ids of all sequences with -1 around each, and how far each place is shared.

    size: tokens of the shortest run that counts
    """

    def __init__(self, sequences: Sequence[np.ndarray], size: int):
        self.size = size
        self.starts = np.cumsum([1, *(len(ids) + 1 for ids in sequences)])  # (n + 1,)
        self.flat = np.full(self.starts[-1], -1, np.int64)
        for start, ids in zip(self.starts[:-1], sequences, strict=True):
            self.flat[start : start + len(ids)] = ids
        self.reach = np.zeros(len(self.flat), np.int64)  # of the run that begins here
        whole = np.convolve(self.flat >= 0, np.ones(size, int), "valid") == size
        places = np.flatnonzero(whole) if len(self.flat) >= size else whole[:0].nonzero()[0]
        keys = ngram_keys(self.flat, size)[places] if len(places) else np.zeros(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        self.keys, self.places = keys[order], places[order]  # sorted by key
        self.seen = np.zeros(2**BITS, bool)
        self.seen[self.short(self.keys)] = True

    @staticmethod
    def short(keys: np.ndarray) -> np.ndarray:  # (n,) uint64 -> (n,) int64
        return (keys >> np.uint64(64 - BITS)).astype(np.int64)

    def mark(self, corpus: Corpus, advance: Advance = nothing) -> None:
        """Look for the runs in all of a corpus."""
        for index in range(len(corpus.shards)):
            tokens = corpus.column("tokens", index)
            for first in range(0, len(tokens), CHUNK_TOKENS):
                self.mark_chunk(tokens, first)
                advance(min(CHUNK_TOKENS, len(tokens) - first))

    def mark_chunk(self, tokens: np.ndarray, first: int) -> None:
        """The runs that begin in a chunk of a shard; they may reach out of it."""
        ids = np.asarray(tokens[first : first + CHUNK_TOKENS + self.size - 1], np.int64)
        if len(ids) < self.size:
            return
        keys = ngram_keys(ids, self.size)
        found = np.flatnonzero(self.seen[self.short(keys)])
        low = np.searchsorted(self.keys, keys[found], "left")
        counts = np.searchsorted(self.keys, keys[found], "right") - low
        there = np.repeat(found + first, counts)
        within = np.arange(len(there)) - np.repeat(np.cumsum(counts) - counts, counts)
        here = self.places[np.repeat(low, counts) + within]
        before = np.where(there > 0, tokens[np.maximum(there - 1, 0)].astype(np.int64), -2)
        begins = before != self.flat[here - 1]
        self.extend(tokens, there[begins], here[begins])

    def extend(self, tokens: np.ndarray, there: np.ndarray, here: np.ndarray) -> None:
        """Note how far the shard from `there` is the sequence from `here`."""
        length = np.zeros(len(here), np.int64)
        going = np.arange(len(here))
        while len(going):
            at = there[going] + length[going]
            inside = at < len(tokens)
            same = tokens[np.where(inside, at, 0)] == self.flat[here[going] + length[going]]
            going = going[inside & same]
            length[going] += 1
        enough = length >= self.size  # or the hashes alone were equal
        np.maximum.at(self.reach, here[enough], length[enough])

    def copied(self) -> list[Copied]:
        """Of each sequence, in their order."""
        ends = self.reach + np.arange(len(self.reach))
        covered = np.maximum.accumulate(ends) > np.arange(len(ends))
        return [
            self.of_span(covered, first, last - 1)
            for first, last in zip(self.starts[:-1], self.starts[1:], strict=True)
        ]

    def of_span(self, covered: np.ndarray, first: int, last: int) -> Copied:
        if first == last:
            return Copied(0, 0, 0)
        start = int(self.reach[first:last].argmax())
        return Copied(int(covered[first:last].sum()), start, int(self.reach[first + start]))
