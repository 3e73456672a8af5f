"""Evaluation text in the corpus: documents that share 13 words in a row with it are left out.

`read_exclusion` reads the `exclude` files once, in the parent; its `overlap` goes to the workers,
whose `find` looks at every document, and `note` counts what they found. Every process holds the
words and 8 bytes for each different 13-gram of the files, the parent 24 more for each place of one.
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.documents import Text
from slm.prepare.readers import read_blocks
from slm.prepare.records import read_texts
from slm.prepare.sources import Source
from slm.store.files import Json

NGRAM = 13
# Scripts that put no space between words: each of their characters counts as a word.
NO_SPACES = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u1049\u1050-\u109f\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17d3\u17d7\u17dc-\u17e9"  # Khmer
    "\u1950-\u19df\u1a20-\u1a99\uaa80-\uaadf"  # Tai
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana above, Chinese
)
WORD = re.compile(f"[{NO_SPACES}]|[^\\W{NO_SPACES}]+")
# A word has some five letters, with the signs around it; a file with more of them to a word than
# this is in another script without spaces, or it is no text.
CHARACTERS_A_WORD = 20

log = logging.getLogger(__name__)


@dataclass
class Overlap:
    """The 13-grams of the `exclude` files, in lower case.

    A word is a run of letters, digits and _, or one character of a script without spaces.

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


def ngram_keys(ids: np.ndarray, size: int = NGRAM) -> np.ndarray:  # (n,) -> (n - size + 1,)
    """64-bit hashes of the windows of `size` word numbers."""
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    keys = np.zeros(len(ids) - size + 1, dtype=np.uint64)
    for i in range(size):
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
    num_wordless = [0] * len(sources)
    for file, text in read_all(sources, max_bytes):
        found = WORD.findall(text.text.lower())
        ids = np.array([words.setdefault(word, len(words)) for word in found], dtype=np.int64)
        num_records[file] += 1
        num_short[file] += len(ids) < NGRAM
        num_wordless[file] += is_wordless(text.text, len(ids))
        if len(ids) >= NGRAM:
            keys.append(ngram_keys(ids))
            owners.append(np.full((len(keys[-1]), 2), (file, text.record)))
    warn_of_wordless(sources, num_wordless, num_records)
    if not keys:
        raise UserError(f"exclude: no record has {NGRAM} words, nothing could be found")
    unique, index = np.unique(np.concatenate(keys), return_inverse=True)
    table = np.concatenate([index[:, None], np.concatenate(owners)], axis=1)
    table = table[np.argsort(index, kind="stable")]
    names, found_in = [source.name for source in sources], [set() for _ in sources]
    overlap, num_documents = Overlap(words, unique), [0] * len(sources)
    return Exclusion(names, overlap, table, num_records, num_short, found_in, num_documents)


def is_wordless(text: str, num_words: int) -> bool:
    """Has a text that could hold 13 words nearly none?"""
    length = sum(map(len, text.split()))
    return length > CHARACTERS_A_WORD * max(num_words, NGRAM)


def warn_of_wordless(sources: list[Source], num_wordless: list[int], totals: list[int]) -> None:
    for source, wordless, total in zip(sources, num_wordless, totals, strict=True):
        if wordless:
            log.warning(
                f"exclude {source.name}: {wordless} of {total} records have less than one word in "
                f"{CHARACTERS_A_WORD} characters, they are hardly found in the text"
            )


def read_all(sources: list[Source], max_bytes: int) -> Iterator[tuple[int, Text]]:
    """(source, text) of every record; raises UserError at the first bad one."""
    for block in read_blocks(sources, max_bytes):
        for text in read_texts(block, sources[block.source], max_bytes):
            if text.fault is not None:
                raise UserError(text.fault)
            yield block.source, text
