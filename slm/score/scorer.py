"""Writes the shards of a reference store from a source of scores: the unit of work is a shard.

Any number of processes write one folder: each takes shards that nobody has claimed, and whoever
finds all of them done writes the manifest. A shard's columns come first, then what they cost, and
its sidecar last, which says that it is done.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from slm.errors import UserError
from slm.score.cost import write_cost
from slm.store.claims import Claim, ClaimLost, claim, owner_of, remove_temporaries
from slm.store.columns import COLUMNS, DTYPE, LOGPROBS, Column
from slm.store.files import Json, Publish, check_hash, map_array, read_json, write_array
from slm.store.shards import SCORED, Corpus, References, write_manifest
from slm.store.sidecars import Shard, read_shard, shard_path, write_sidecar
from slm.store.windows import Windows

log = logging.getLogger("slm.score")
Arrays = dict[str, np.ndarray]  # by the name of a column
Write = Callable[[Publish], None]  # of a shard that has been scored
POLL_S = 1.0


class Source(Protocol):
    """Where the columns of windows come from: a model here, or a server's responses."""

    columns: tuple[Column, ...]

    def scores(self, numbers: np.ndarray) -> Arrays: ...

    def stream(self, batches: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, Arrays]]:
        """Of one batch after the other, in their order."""
        for numbers in batches:
            yield numbers, self.scores(numbers)

    def cost(self, seconds: float, tokens: int) -> Json | None: ...


class Writer:
    """A thread that writes one shard while the next is scored; no more wait in memory."""

    def __enter__(self) -> "Writer":
        self.thread, self.last = ThreadPoolExecutor(1), None
        return self

    def __exit__(self, *failed: object) -> None:
        self.thread.shutdown()

    def submit(self, write: Write, mine: Claim, claims: ExitStack) -> Future[bool]:
        with claims:  # where the one before failed, this one is not written
            if self.last is not None:
                self.last.result()
            self.last = self.thread.submit(write_claimed, write, mine, claims.pop_all())
        return self.last


def write_claimed(write: Write, mine: Claim, claims: ExitStack) -> bool:
    """`mine` publishes: a process that wakes up too late overwrites nothing."""
    with claims:
        try:
            mine.check()
            write(mine.publish)
        except ClaimLost as error:
            log.warning("%s; going on with another shard", error)
            return False
    return True


class Scorer:
    """Scores shards of one corpus into one folder.

    max_tokens:  None for all of it; else whole batches from all over the corpus until there are so
                 many tokens, in one order: more of them are these and others, so that a store that
                 grows ends with the bytes of one that was made at once
    """

    def __init__(
        self,
        source: Source,
        corpus: Corpus,
        out: Path,
        batch_size: int,
        dtype: str,
        max_tokens: int | None = None,
    ):
        self.source, self.corpus, self.out = source, corpus, out
        self.batch_size, self.dtype = batch_size, dtype
        self.first_window = Windows(corpus).first_window
        counts = np.diff(self.first_window)
        self.first_batch = np.concatenate([[0], np.cumsum(-(-counts // batch_size))])
        self.wanted = None if max_tokens is None else self.first_batches(max_tokens)

    def first_batches(self, max_tokens: int) -> np.ndarray:  # (batches,) bool
        """By the golden ratio: the first of them, however many, lie evenly over the corpus."""
        count = int(self.first_batch[-1])
        sizes = np.full(count, self.batch_size)  # windows; the last of a shard has what is left
        room = np.diff(self.first_batch) * self.batch_size - np.diff(self.first_window)
        np.subtract.at(sizes, self.first_batch[1:] - 1, room)
        order = np.argsort(np.arange(count) * (math.sqrt(5) - 1) / 2 % 1)
        enough = np.searchsorted(np.cumsum(sizes[order]) * self.corpus.seq_len, max_tokens) + 1
        wanted = np.zeros(count, bool)
        wanted[order[:enough]] = True
        return wanted

    def wants(self, shard: Shard) -> np.ndarray:  # (windows of the shard,) bool
        mine = self.of_shard(shard)
        if self.wanted is None:
            return np.ones(mine.stop - mine.start, bool)
        batches = self.wanted[slice(*map(int, self.first_batch[shard.index : shard.index + 2]))]
        return np.repeat(batches, self.batch_size)[: mine.stop - mine.start]

    def of_shard(self, shard: Shard) -> slice:
        """Its windows among all."""
        return slice(*map(int, self.first_window[shard.index : shard.index + 2]))

    def path(self, shard: Shard, suffix: str, column: str = LOGPROBS.name) -> Path:
        """A shard's sidecar and claim have the name of what every store has."""
        return shard_path(self.out, column, shard.index, suffix)

    def scored(self, shard: Shard) -> np.ndarray:  # (windows of the shard,) bool
        """Which of them a finished shard has; none where it is not there."""
        mine = self.of_shard(shard)
        count, sidecar = mine.stop - mine.start, self.path(shard, ".json")
        if not sidecar.exists():
            return np.zeros(count, bool)
        done = read_shard(sidecar, read_json(sidecar))
        files = [self.path(shard, ".npy", column.name) for column in self.source.columns]
        if SCORED in done.sha256 and done.sha256.keys() == {SCORED}:
            files = []
        if not all(path.exists() for path in files):
            return np.zeros(count, bool)
        if SCORED not in done.sha256:
            return np.ones(count, bool)
        return np.array(map_array(done.path(self.out, SCORED), "bool", count))

    def is_done(self, shard: Shard) -> bool:
        there = self.path(shard, ".json").exists()
        return there and bool(self.scored(shard)[self.wants(shard)].all())

    def missing(self) -> list[Shard]:
        return [shard for shard in self.corpus.shards if not self.is_done(shard)]

    def all_batches(self, shard: Shard) -> Iterator[np.ndarray]:
        """The numbers of the shard's windows, batch by batch."""
        mine = self.of_shard(shard)
        for start in range(mine.start, mine.stop, self.batch_size):
            yield np.arange(start, min(start + self.batch_size, mine.stop))

    def batches(self, shard: Shard) -> Iterator[np.ndarray]:
        """Those that lack a window that is wanted."""
        lacks, first = self.wants(shard) & ~self.scored(shard), self.of_shard(shard).start
        for numbers in self.all_batches(shard):
            if lacks[numbers - first].any():
                yield numbers

    def num_tokens(self, shards: list[Shard]) -> int:
        """To be scored."""
        sizes = (numbers.size for shard in shards for numbers in self.batches(shard))
        return sum(sizes) * self.corpus.seq_len

    def score_shard(self, shard: Shard, advance: Callable[[int], None]) -> Write:
        """Computes; what it gives writes."""
        start, length, tokens = time.perf_counter(), self.corpus.seq_len, 0
        scored, first = self.scored(shard), self.of_shard(shard).start
        scores = self.arrays(shard, bool(scored.any()))
        for numbers, found in self.source.stream(self.batches(shard)):
            places = numbers - first
            # The shard's first token has no score.
            target = slice(1 + int(places[0]) * length, 1 + (int(places[-1]) + 1) * length)
            for name, values in scores.items():
                values[target] = found[name].reshape(-1)
            scored[places] = True
            tokens += numbers.size * length
            advance(numbers.size * length)
        cost = self.source.cost(time.perf_counter() - start, tokens)
        return partial(self.write, shard, scores, scored, cost)

    def arrays(self, shard: Shard, goes_on: bool) -> Arrays:
        """What the shard has of each column, else NaN."""
        found = {}
        for column in self.source.columns:
            found[column.name] = np.full(shard.num_tokens, np.nan, DTYPE)
            if goes_on:
                sidecar = self.path(shard, ".json")
                done = read_shard(sidecar, read_json(sidecar))
                path = done.path(self.out, column.name)
                check_hash(path, done.sha256[column.name], sidecar.name)
                found[column.name][:] = map_array(path, self.dtype, shard.num_tokens)
        return found

    def write(
        self,
        shard: Shard,
        scores: Arrays,
        scored: np.ndarray,
        cost: Json | None,
        publish: Publish,
    ) -> None:
        """The sidecar last, and that of fewer windows goes first."""
        arrays = {column: stored(column, values, self.dtype) for column, values in scores.items()}
        if not scored.any():
            arrays = {}
        if not scored.all():
            arrays[SCORED] = scored
        before = self.path(shard, ".json").exists()
        for path in (self.path(shard, ".json"), self.path(shard, ".npy", SCORED)):
            path.unlink(missing_ok=True)
        hashes = {}
        for column, array in arrays.items():
            hashes[column] = write_array(self.path(shard, ".npy", column), array, publish)
        if cost is not None:
            write_cost(self.out, shard.index, cost, adds=before)
        dtypes = {column: str(array.dtype) for column, array in arrays.items()}
        rows = {column: len(array) for column, array in arrays.items()}
        done = Shard(shard.index, shard.num_tokens, hashes, dtypes, rows)
        write_sidecar(self.out, LOGPROBS.name, done, publish)

    def take(
        self, shard: Shard, advance: Callable[[int], None], writer: "Writer"
    ) -> Future[bool] | None:
        """Score a shard unless somebody else has done it or is at it: None. Else whether it was
        written, while this process goes on: the claim ends then."""
        if self.is_done(shard):
            return None
        with ExitStack() as claims:
            mine = claims.enter_context(claim(self.path(shard, ".claim")))
            if mine is None or self.is_done(shard):
                return None
            write = self.score_shard(shard, advance)
            return writer.submit(write, mine, claims.pop_all())

    def take_all(self, shards: list[Shard], advance: Callable[[int], None]) -> set[int]:
        """The numbers of those that were scored here, when all of them are written."""
        with Writer() as writer:
            written = {shard.index: self.take(shard, advance, writer) for shard in shards}
        return {index for index, future in written.items() if future and future.result()}

    def run(self, advance: Callable[[int], None]) -> int:
        """Score until the whole store is there; returns the number of tokens scored here.

        What others finish meanwhile counts as progress too. The claim of a dead one is taken over.
        """
        own, missing, said = 0, self.missing(), ""
        tokens = {shard.index: self.num_tokens([shard]) for shard in missing}
        if missing:  # what it says of fewer windows would be wrong as soon as one more is there
            (self.out / "manifest.json").unlink(missing_ok=True)
        while missing:
            mine = self.take_all(missing, advance)
            own += sum(tokens[index] for index in mine)
            before, missing = missing, self.missing()
            left = mine | {shard.index for shard in missing}
            if theirs := [shard for shard in before if shard.index not in left]:
                advance(sum(tokens[shard.index] for shard in theirs))
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


def stored(column: str, scores: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = scores.astype(dtype, copy=False)
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


def store_bytes(scorer: Scorer, shards: Sequence[Shard]) -> int:
    """Of the columns of those in which something is to be scored."""
    count = sum(shard.num_tokens for shard in shards if any(True for _ in scorer.batches(shard)))
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
