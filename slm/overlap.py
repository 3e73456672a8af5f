"""Evaluation text in the corpus: documents that share 13 words in a row with it are left out.

`read_exclusion` reads the `exclude` files once, in the parent; its `overlap` goes to the workers,
whose `find` looks at every document, and `note` counts what they found. Every process holds the
words and 8 bytes for each different 13-gram of the files, the parent 24 more for each place of one.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np

from slm.errors import UserError
from slm.readers import read_blocks
from slm.records import Text, read_texts
from slm.shards import Json
from slm.sources import Source

NGRAM = 13
WORD = re.compile(r"\w+")


@dataclass
class Overlap:
    """The 13-grams of the `exclude` files; a word is a run of letters, digits and _ in lower case.

    Words are numbered, an n-gram is a 64-bit hash of its numbers. A text without 13 words in a row
    that the files know is done once its words are looked up.
    """

    words: dict[str, int]
    keys: np.ndarray  # (n,) uint64, sorted, unique

    def find(self, text: str) -> tuple[str, np.ndarray] | None:
        """The first shared n-gram and the indices of all shared ones in `keys`."""
        words = WORD.findall(text.lower())
        ids = np.fromiter(map(self.words.get, words, repeat(-1)), np.int64, len(words))
        known = np.concatenate([[0], np.cumsum(ids >= 0)])
        if len(ids) < NGRAM or not np.any(known[NGRAM:] - known[:-NGRAM] == NGRAM):
            return None
        keys = np.where(known[NGRAM:] - known[:-NGRAM] == NGRAM, ngram_keys(ids), 0)
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        shared = np.flatnonzero((self.keys[at] == keys) & (keys != 0))
        if len(shared) == 0:
            return None
        return " ".join(words[shared[0] : shared[0] + NGRAM]), np.unique(at[shared])


def ngram_keys(ids: np.ndarray) -> np.ndarray:  # (n,) -> (n - 12,)
    """64-bit hashes of the windows of 13 word numbers."""
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    keys = np.zeros(len(ids) - NGRAM + 1, dtype=np.uint64)
    for i in range(NGRAM):
        keys = keys * np.uint64(0xD1342543DE82EF95) + mixed[i : i + len(keys)]
    return keys


class Excluded(NamedTuple):
    """A document that a worker left out."""

    source: int
    where: str
    record: int
    ngram: str
    shared: np.ndarray  # indices in Overlap.keys


@dataclass
class Exclusion:
    """The `exclude` files: what to look for, and which of their records were found."""

    names: list[str]  # of the files' sources
    overlap: Overlap
    owners: np.ndarray  # (m, 3): index in overlap.keys, file, record; sorted
    num_records: list[int]
    num_short: list[int]  # records of fewer than 13 words, which nothing can share
    found: list[set[int]]
    num_documents: list[int]

    def note(self, shared: np.ndarray) -> list[int]:
        """Count a dropped document; returns the files that it shares with."""
        first, last = np.searchsorted(self.owners[:, 0], [shared, shared + 1])
        rows = np.concatenate(
            [self.owners[a:b, 1:] for a, b in zip(first, last, strict=True)], axis=0
        )
        files = np.unique(rows[:, 0]).tolist()
        for file in files:
            self.num_documents[file] += 1
            self.found[file].update(rows[rows[:, 0] == file, 1].tolist())
        return files

    def line(self, excluded: Excluded, source: str) -> bytes:
        """Count it; returns its line of excluded.jsonl."""
        row = {
            "source": source,
            "where": excluded.where,
            "record": excluded.record,
            "ngram": excluded.ngram,
            "found_in": [self.names[file] for file in self.note(excluded.shared)],
        }
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()

    def report(self) -> Json:
        return {
            name: {
                "records": self.num_records[i],
                "records_found": len(self.found[i]),
                "records_too_short": self.num_short[i],
                "documents_dropped": self.num_documents[i],
            }
            for i, name in enumerate(self.names)
        }


def read_exclusion(sources: list[Source], max_bytes: int) -> Exclusion:
    words: dict[str, int] = {}
    keys, owners = [], []
    num_records, num_short = [0] * len(sources), [0] * len(sources)
    for file, text in read_all(sources, max_bytes):
        found = WORD.findall(text.text.lower())
        ids = np.array([words.setdefault(word, len(words)) for word in found], dtype=np.int64)
        num_records[file] += 1
        num_short[file] += len(ids) < NGRAM
        if len(ids) >= NGRAM:
            keys.append(ngram_keys(ids))
            owners.append(np.full((len(keys[-1]), 2), (file, text.record)))
    if not keys:
        raise UserError(f"exclude: no record has {NGRAM} words, nothing could be found")
    unique, index = np.unique(np.concatenate(keys), return_inverse=True)
    table = np.concatenate([index[:, None], np.concatenate(owners)], axis=1)
    table = table[np.argsort(index, kind="stable")]
    names, found_in = [source.name for source in sources], [set() for _ in sources]
    overlap, num_documents = Overlap(words, unique), [0] * len(sources)
    return Exclusion(names, overlap, table, num_records, num_short, found_in, num_documents)


def read_all(sources: list[Source], max_bytes: int) -> Iterator[tuple[int, Text]]:
    """(source, text) of every record; raises UserError at the first bad one."""
    for block in read_blocks(sources, max_bytes):
        for text in read_texts(block, sources[block.source], max_bytes):
            if text.fault is not None:
                raise UserError(text.fault)
            yield block.source, text
