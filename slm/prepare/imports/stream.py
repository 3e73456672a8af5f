"""Parts of token files -> blocks as `ShardWriter` takes them: checked, with their documents."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.encoder import EncoderState
from slm.prepare.imports.parts import Part
from slm.store.shards import WEIGHT

TOKENS_AT_ONCE = 1 << 20
Columns = dict[str, np.ndarray]  # (n,) each, by need: masks, weights
COUNTS = ("documents", "tokens", "bytes", "targets", "eos_added", "eos_inside")


class Block(NamedTuple):
    columns: dict[str, np.ndarray]  # (n,) each: tokens, bytes, masks and weights by need
    documents: np.ndarray  # (d, 3) of those that begin in it: number of its tokens, source, record
    carried: int  # tokens of a document that began before


@dataclass
class Stream:
    """The parts of one source after the other; remembers whether a document goes on."""

    state: EncoderState
    source: int
    by_eos: bool  # documents end at EOS, whatever an index says
    add_eos: bool  # a document of an index that ends otherwise gets one; else it is refused
    is_open: bool = False
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))

    def blocks(self, part: Part) -> Iterator[Block]:
        """The tokens of a part in their order; nothing but EOS is ever added."""
        for ids, others, ends in self.pieces(part):
            block = self.block(ids, others, ends)
            sizes = self.state.bytes_table[ids].astype(self.state.bytes_dtype)
            self.counts["bytes"] += int(sizes.sum(dtype=np.int64))
            tokens = ids.astype(self.state.token_dtype)
            yield block._replace(columns={"tokens": tokens, "bytes": sizes} | others)

    def documents(self, part: Part) -> Iterator[tuple[Block, int, int]]:
        """The same without the columns; of each block, the part's tokens that it is of."""
        first = 0
        for ids, others, ends in self.pieces(part):
            yield self.block(ids, others, ends), first, first + len(ids)
            first += len(ids)

    def pieces(self, part: Part) -> Iterator[tuple[np.ndarray, Columns, np.ndarray]]:
        """Some tokens, checked, their other columns, and the places after the ends of documents."""
        for first in range(0, len(part.tokens), TOKENS_AT_ONCE):
            ids = np.asarray(part.tokens[first : first + TOKENS_AT_ONCE])
            self.check_ids(part, first, ids)
            others = {name: c[first : first + len(ids)] for name, c in part.by_need.items()}
            if "weights" in others:
                check_weights(part, first, others["weights"])
            yield self.find_ends(part, first, ids, others)

    def check_ids(self, part: Part, first: int, ids: np.ndarray) -> None:
        size = self.state.vocab_size
        if ids.dtype.kind not in "iu":
            raise UserError(f"{part.place}: its tokens are {ids.dtype.name}, no whole numbers")
        negative = ids.dtype.kind == "i" and ids.min() < 0
        if negative or ids.max() >= size:
            at = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
            raise UserError(
                f"{part.place}: token {first + at} is {ids[at]}, the tokenizer has {size} ids: "
                f"another tokenizer made the file, or its dtype is not {ids.dtype.name}"
            )

    def find_ends(
        self, part: Part, first: int, ids: np.ndarray, others: Columns
    ) -> tuple[np.ndarray, Columns, np.ndarray]:
        """ids and other columns, with what EOS are added, and the places after documents' ends."""
        if self.by_eos or part.ends is None:
            return ids, others, np.flatnonzero(ids == self.state.eos_id) + 1
        span = np.searchsorted(part.ends, [first, first + len(ids)], side="right")
        ends = np.unique(part.ends[slice(*span)]) - first  # of no tokens: none
        missing = ends[ids[ends - 1] != self.state.eos_id]
        if len(missing) and not self.add_eos:
            end = missing[0]
            raise UserError(
                f"{part.place}: the document that ends before token {first + end} ends with "
                f"{ids[end - 1]}, EOS of the tokenizer is {self.state.eos_id}: name the right one "
                "(tokenizer.eos), or add_eos=true puts it there, or documents=eos takes the index "
                "for no documents"
            )
        self.counts["eos_added"] += len(missing)
        inside = int(np.count_nonzero(ids == self.state.eos_id)) - (len(ends) - len(missing))
        self.counts["eos_inside"] += inside
        if len(missing):
            others = {name: np.insert(c, missing, c[missing - 1]) for name, c in others.items()}
            ids = np.insert(ids, missing, self.state.eos_id)
        return ids, others, ends + np.searchsorted(missing, ends, side="right")

    def block(self, ids: np.ndarray, others: Columns, ends: np.ndarray) -> Block:
        count = len(ids)
        starts = ends[ends < count] if self.is_open else np.append(0, ends[ends < count])
        lengths = np.diff(np.append(starts, count))
        records = self.counts["documents"] + np.arange(len(starts))
        self.is_open = len(ends) == 0 or ends[-1] < count
        self.counts["documents"] += len(starts)
        self.counts["tokens"] += count
        self.counts["targets"] += (
            int(np.count_nonzero(others["masks"])) if "masks" in others else count
        )
        documents = np.column_stack([lengths, np.full(len(starts), self.source), records])
        return Block({}, documents, int(starts[0]) if len(starts) else count)


def check_weights(part: Part, first: int, weights: np.ndarray) -> None:
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise UserError(
            f"{part.place}: {WEIGHT} of token {first + wrong[0]} is {weights[wrong[0]]}, a finite "
            "number of at least 0 is needed"
        )
