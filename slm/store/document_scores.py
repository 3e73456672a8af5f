"""Log-probs of documents by the hash of their text: a store that outlives its corpora.

A store is a folder of parts, one for each corpus that was scored into it, each whole by itself::

    scores/3f0c.../  plan.json                 the reference model, its context and stride; `after`:
                                               parts that were there: it leaves their documents out
                     documents-00000.npy       int64 (d, 2): first token in the shard, bytes of text
                     texts-00000.npy           uint8 (d, 32): sha256 of the UTF-8 text
                     ids-00000.npy             uint8 (d, 32): sha256 of the tokens, EOS included
                     logprobs-00000.npy        of every token of the reference's tokenizer given
                                               those before it in its document
                     bytes-00000.npy           uint16: UTF-8 bytes of each token, EOS 0
                     checks-00000.npy          uint8: a hash of the text up to each token's end
                     logprobs-00000.json       the sidecar
                     manifest.json             there: whole

Two stores of one reference are merged by moving their parts into one folder. A text is in the hash
as it is; a special token within it (chats) is its name between two bytes 0xFF, which no UTF-8 has,
and a document that was cut before its EOS ends with one. No text is in a store.
"""

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from slm.errors import UserError
from slm.store.columns import LOGPROBS
from slm.store.fields import of_what
from slm.store.files import Json, Recent
from slm.store.shards import Store

SPECIAL = CUT = b"\xff"
KEY = "S32"  # a sha256, compared byte by byte
KEYS = ("texts", "ids")
COLUMNS = {  # dtype
    "documents": "int64",
    "texts": "uint8",
    "ids": "uint8",
    "logprobs": None,  # store_dtype
    "bytes": "uint16",
    "checks": "uint8",
}
SAME = ("model_sha256", "tokenizer_sha256", "seq_len")  # in all parts of a store,
SAME_SCORING = ("stride", "first_token")  # or scores of one text would differ
MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)  # MurmurHash3's finalizer
FACTOR = 0x9E3779B97F4A7C15
LEAST_CHECKS = 5  # of 8 bits, or a document that was cut may be taken for another


class DocumentScores(Store):
    """One part: the scores of documents, in the order of the corpus that they were scored from."""

    KIND = "document_scores"
    LEAST_TOKENS = 0  # where all of a shard's documents were there already

    def check_documents(self, index: int) -> None:
        """Documents follow one another, their bytes are those of their tokens, scores are <= 0."""
        rows, path = (
            self.column("documents", index),
            self.shards[index].path(self.folder, "documents"),
        )
        count = self.shards[index].num_tokens
        edges = np.append(rows[:, 0], count)
        if len(rows) and (edges[0] != 0 or (np.diff(edges) <= 0).any()):
            raise UserError(f"{path}: its documents do not follow one another to token {count}")
        sizes = np.append(0, np.cumsum(self.column("bytes", index), dtype=np.int64))
        wrong = np.flatnonzero(np.diff(sizes[edges]) > rows[:, 1])
        if len(wrong):
            size, tokens = rows[wrong[0], 1], np.diff(sizes[edges])[wrong[0]]
            raise UserError(
                f"{path}: document {wrong[0]} has {size} bytes, its tokens have {tokens}"
            )
        scores = self.column(LOGPROBS.name, index)
        if (bad := LOGPROBS.is_wrong(scores)).any():
            at = int(bad.argmax())
            path = self.shards[index].path(self.folder, LOGPROBS.name)
            raise UserError(f"{path}: entry {at} has {LOGPROBS.refusal(scores[at])}")


def open_parts(folders: Sequence[str], check: str = "size") -> list[DocumentScores]:
    """The finished parts of stores of one reference."""
    found = [DocumentScores.open(part, check) for folder in folders for part in parts_in(folder)]
    for part in found[1:]:
        check_same_reference(found[0], part.folder, part.manifest)
    return found


def parts_in(folder: str | Path) -> list[Path]:
    """A store's, or the part itself."""
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        return [folder]
    parts = [path.parent for path in sorted(folder.glob("*/manifest.json"))]
    if not parts:
        raise UserError(
            f"{folder} holds no scores of documents: `slm score layout=documents out={folder}` "
            "makes them"
        )
    return parts


def check_same_reference(part: DocumentScores, other: Path, plan: Json) -> None:
    ours, theirs = part.manifest, plan
    pairs = [(name, ours[name], theirs[name]) for name in SAME]
    pairs += [(name, ours["scoring"][name], theirs["scoring"][name]) for name in SAME_SCORING]
    for name, here, there in pairs:
        if here != there:
            raise UserError(
                f"{part.folder} and {other} are scores of two references: {name} is {here!r} and "
                f"{there!r}{of_what(name, here, there)}; keep them in two stores"
            )


# ---- a document by its text ---------------------------------------------------------------------


def keys_of(digests: Sequence[bytes]) -> np.ndarray:  # (d,) KEY
    return np.array(digests, KEY)


def prefix_checks(text: bytes) -> np.ndarray:  # (bytes + 1,) uint8
    """A byte of a hash of the text's first i bytes, for all i: it knows a beginning of any length.

    Two texts of which one does not begin the other agree at one of 256 places after they part.
    """
    powers = np.cumprod(np.full(len(text), FACTOR, np.uint64))
    terms = (np.frombuffer(text, np.uint8).astype(np.uint64) + np.uint64(1)) * powers
    state = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
    for factor in MIX:
        state = (state ^ (state >> np.uint64(33))) * np.uint64(factor)
    return (state >> np.uint64(56)).astype(np.uint8)


def numbers_of(keys: np.ndarray) -> np.ndarray:  # (d,) KEY -> (d,) uint64, in the same order
    return keys.view(">u8")[:: keys.itemsize // 8].astype(np.uint64)


def search(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:  # (n,), none: behind the end
    return np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)


class DocumentIndex:
    """The documents of several parts by their hashes. Costs 100 bytes of memory a document."""

    def __init__(self, parts: Sequence[DocumentScores]):
        self._columns = Recent()
        self.shards = [(part, shard.index) for part in parts for shard in part.shards]
        columns = [np.array(part.column("documents", index)) for part, index in self.shards]
        counts = [part.shards[index].num_tokens for part, index in self.shards]
        ends = [
            np.append(rows[1:, 0], count)[: len(rows)]
            for rows, count in zip(columns, counts, strict=True)
        ]
        self.shard = np.repeat(np.arange(len(columns)), [len(rows) for rows in columns])
        rows = np.concatenate([*columns, np.empty((0, 2), np.int64)])
        self.first, self.num_bytes = rows[:, 0], rows[:, 1]
        self.count = np.concatenate([*ends, np.empty(0, np.int64)]) - self.first

    def __len__(self) -> int:
        return len(self.first)

    def keys(self, column: str) -> np.ndarray:  # (d,) KEY
        found = [np.array(part.column(column, index)) for part, index in self.shards]
        return np.concatenate([*found, np.empty((0, 32), np.uint8)]).view(KEY).ravel()

    @cached_property
    def order(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        sorts = {column: np.argsort(self.keys(column), kind="stable") for column in KEYS}
        return {column: (self.keys(column)[order], order) for column, order in sorts.items()}

    def find(self, column: str, keys: np.ndarray) -> np.ndarray:  # (n,) KEY -> (n,) int64
        """The first document with each key; -1 where there is none."""
        ascending, order = self.order[column]
        if not len(ascending):
            return np.full(len(keys), -1)
        # By numbers, which takes a fifth of the time; then by all bytes what begins as another.
        at = search(numbers_of(ascending), numbers_of(keys))
        alike = numbers_of(ascending[at]) == numbers_of(keys)
        left = np.flatnonzero(alike & (ascending[at] != keys))
        at[left] = search(ascending, keys[left])
        return np.where(ascending[at] == keys, order[at], -1)

    def shard_column(self, name: str, shard: int) -> np.ndarray:  # (tokens of the shard,)
        """Mapped once: to map one takes longer than to copy a document."""
        part, index = self.shards[shard]
        return self._columns.get((name, shard), lambda: np.asarray(part.column(name, index)))

    def column(self, name: str, document: int) -> np.ndarray:  # (tokens,)
        first, count = self.first[document], self.count[document]
        return self.shard_column(name, self.shard[document])[first : first + count]

    def find_beginning(self, text: bytes, sizes: np.ndarray | None) -> int:
        """A document whose text begins with this one (without CUT); -1 where none is sure to.

        sizes: (n,) bytes that its first tokens must have
        """
        checks = prefix_checks(text)
        candidates = self.same_first_checks(checks)
        for document in candidates.tolist():
            found = self.column("bytes", document)
            if sizes is not None and not np.array_equal(found[: len(sizes)], sizes):
                continue
            ends = np.cumsum(found, dtype=np.int64)
            ends = ends[ends <= len(text)]
            too_short = self.num_bytes[document] < max(1, len(text))  # or known by its tokens alone
            if too_short or len(ends) < LEAST_CHECKS:
                continue
            if np.array_equal(self.column("checks", document)[: len(ends)], checks[ends]):
                return document
        return -1

    def same_first_checks(self, checks: np.ndarray) -> np.ndarray:
        """The documents of more than LEAST_CHECKS tokens of which the first three fit."""
        left = np.flatnonzero(self.count > LEAST_CHECKS)
        ends = np.zeros(len(left), np.int64)
        for token in range(3):
            sizes, found = (self.gather(name, left, token) for name in ("bytes", "checks"))
            ends = ends + sizes
            fits = (ends < len(checks)) & (checks[np.minimum(ends, len(checks) - 1)] == found)
            left, ends = left[fits], ends[fits]
        return left

    def gather(self, column: str, documents: np.ndarray, token: int | np.ndarray) -> np.ndarray:
        """The value of the n-th token of each of these documents."""
        found, places = np.empty(len(documents), np.int64), self.first[documents] + token
        for shard in np.unique(self.shard[documents]):
            mine = self.shard[documents] == shard
            found[mine] = self.shard_column(column, shard)[places[mine]]
        return found

    @cached_property
    def cut(self) -> list[tuple[int, bytes]]:
        """Bytes and hash of the documents without an EOS, that the end of their corpus has cut."""
        last = self.gather("bytes", np.arange(len(self)), self.count - 1)
        found = np.flatnonzero(last > 0)
        return [*zip(self.num_bytes[found].tolist(), self.keys("texts")[found], strict=True)]

    def has_beginning(self, text: bytes) -> bool:
        """Is one of those that were cut a beginning of this text, or all of it but EOS?"""
        return any(
            size <= len(text) and sha256(text[:size] + CUT).digest().rstrip(b"\0") == key
            for size, key in self.cut
        )
