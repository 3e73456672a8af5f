"""Writes the shards of a reference store from a source of scores: the unit of work is a shard.

Any number of processes write one folder: each takes shards that nobody has claimed, and whoever
finds all of them done writes the manifest. A shard's columns come first, then what they cost, and
its sidecar last, which says that it is done.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from slm.errors import UserError
from slm.score.cost import write_cost
from slm.store.claims import ClaimLost, claim, owner_of, remove_temporaries
from slm.store.columns import COLUMNS, DTYPE, LOGPROBS, Column
from slm.store.files import Json, write_array
from slm.store.shards import Corpus, References, Shard, shard_path, write_manifest, write_sidecar
from slm.store.windows import Windows

log = logging.getLogger("slm.score")
Arrays = dict[str, np.ndarray]  # by the name of a column
POLL_S = 1.0


class Source(Protocol):
    """Where the columns of windows come from: a model here, or a server's responses."""

    @property
    def columns(self) -> tuple[Column, ...]: ...

    def scores(self, numbers: np.ndarray) -> Arrays: ...
    def cost(self, seconds: float, tokens: int) -> Json | None: ...


class Scorer:
    """Scores shards of one corpus into one folder."""

    def __init__(self, source: Source, corpus: Corpus, out: Path, batch_size: int, dtype: str):
        self.source, self.corpus, self.out = source, corpus, out
        self.batch_size, self.dtype = batch_size, dtype
        self.first_window = Windows(corpus).first_window

    def path(self, shard: Shard, suffix: str, column: str = LOGPROBS.name) -> Path:
        """A shard's sidecar and claim have the name of what every store has."""
        return shard_path(self.out, column, shard.index, suffix)

    def is_done(self, shard: Shard) -> bool:
        files = [self.path(shard, ".npy", column.name) for column in self.source.columns]
        return all(path.exists() for path in [self.path(shard, ".json"), *files])

    def missing(self) -> list[Shard]:
        return [shard for shard in self.corpus.shards if not self.is_done(shard)]

    def batches(self, shard: Shard) -> Iterator[np.ndarray]:
        """The numbers of the shard's windows, batch by batch."""
        first = int(self.first_window[shard.index])
        last = int(self.first_window[shard.index + 1])
        for start in range(first, last, self.batch_size):
            yield np.arange(start, min(start + self.batch_size, last))

    def score_shard(
        self, shard: Shard, advance: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        """`check` is asked before anything is written."""
        start, offset = time.perf_counter(), 1  # the shard's first token has no score
        names = [column.name for column in self.source.columns]
        scores = {name: np.full(shard.num_tokens, np.nan, DTYPE) for name in names}
        for numbers in self.batches(shard):
            found = self.source.scores(numbers)
            size = numbers.size * self.corpus.seq_len
            for name, values in scores.items():
                values[offset : offset + size] = found[name].reshape(-1)
            offset += size
            advance(size)
        cost = self.source.cost(time.perf_counter() - start, num_targets([shard]))
        check()
        self.write(shard, scores, cost)

    def write(self, shard: Shard, scores: Arrays, cost: Json | None) -> None:
        arrays = {column: stored(column, values, self.dtype) for column, values in scores.items()}
        hashes = {}
        for column, array in arrays.items():
            hashes[column] = write_array(self.path(shard, ".npy", column), array)
        if cost is not None:
            write_cost(self.out, shard.index, cost)
        dtypes = {column: self.dtype for column in arrays}
        rows = {column: len(array) for column, array in arrays.items()}
        done = Shard(shard.index, shard.num_tokens, hashes, dtypes, rows)
        write_sidecar(self.out, LOGPROBS.name, done)

    def take(self, shard: Shard, advance: Callable[[int], None]) -> bool:
        """Score a shard unless somebody else has done it or is at it."""
        if self.is_done(shard):
            return False
        with claim(self.path(shard, ".claim")) as mine:
            if mine is None or self.is_done(shard):
                return False
            try:
                self.score_shard(shard, advance, mine.check)
            except ClaimLost as error:
                log.warning("%s; going on with another shard", error)
                return False
        return True

    def run(self, advance: Callable[[int], None]) -> int:
        """Score until the whole store is there; returns the number of tokens scored here.

        What others finish meanwhile counts as progress too. The claim of a dead one is taken over.
        """
        own, missing, said = 0, self.missing(), ""
        while missing:
            mine = {shard.index for shard in missing if self.take(shard, advance)}
            own += num_targets([shard for shard in missing if shard.index in mine])
            before, missing = missing, self.missing()
            left = mine | {shard.index for shard in missing}
            if theirs := [shard for shard in before if shard.index not in left]:
                advance(num_targets(theirs))
            if missing and not mine:
                said = self.say_what_is_waited_for(missing, said)
                time.sleep(POLL_S)
        return own

    def say_what_is_waited_for(self, missing: list[Shard], said: str) -> str:
        """Once, and again where it is another."""
        claims = {shard.index: self.path(shard, ".claim") for shard in missing}
        waits = [
            f"shard {index} ({owner_of(path)}, {path.name})"
            for index, path in claims.items()
            if path.exists()
        ]
        now = ", ".join(waits)
        if now and now != said:
            log.info("%s: waiting for %s", self.out, now)
        return now or said


def num_targets(shards: list[Shard]) -> int:
    return sum(shard.num_tokens - 1 for shard in shards)


def stored(column: str, scores: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = scores.astype(dtype)
    if (lost := np.isinf(cast)).any():
        noun, value = COLUMNS[column].noun, scores[lost][0]
        raise UserError(f"store_dtype {dtype} cannot hold {noun} {value}; use store_dtype=float32")
    return cast


def check_space(folder: Path, needed: int) -> int:
    """The bytes that are free where `needed` of them will be written."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {needed:,} bytes are needed, the disk has {free:,} free")
    return free


def store_bytes(scorer: Scorer, count: int) -> int:
    return count * np.dtype(scorer.dtype).itemsize * len(scorer.source.columns)


def remove_leftovers(out: Path) -> None:
    """Claims and temporary files of processes that were killed."""
    for path in out.glob(f"{LOGPROBS.name}-*.claim"):
        with claim(path):  # whoever may have it gives it back
            pass
    remove_temporaries(out)


def is_finished(scorer: Scorer) -> bool:
    if scorer.missing() or not (scorer.out / "manifest.json").exists():
        return False
    remove_leftovers(scorer.out)  # of one that was killed while another finished
    log.info(f"{scorer.out} is finished already, nothing to do")
    return True


def finish(scorer: Scorer) -> References:
    write_manifest(scorer.out, LOGPROBS.name, len(scorer.corpus.shards))
    references = References.open(scorer.out)
    remove_leftovers(scorer.out)
    return references
