"""From blocks of text to token arrays: worker processes encode.

`with worker_pool(job, num_proc) as run: run(batches)` yields the results of the batches in their
order, whatever the number of processes: a worker parses, fills templates, hashes, looks for
evaluation text and tokenizes.

A few batches of 0.5 MB a worker are in flight, or the longest document (some 30 bytes for each byte
of it, 150 where `slm.prepare.encoder` cannot cut it). Workers import neither torch nor
transformers.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.errors import UserError
from slm.prepare.chat import ChatFormat
from slm.prepare.documents import Block, Text
from slm.prepare.encode import encode_documents
from slm.prepare.encoder import Encoder, EncoderState
from slm.prepare.keep import Keep
from slm.prepare.labels import label_tokens
from slm.prepare.overlap import Excluded, Overlap
from slm.prepare.readers import BLOCK_BYTES, out_of_memory, read_source
from slm.prepare.records import read_texts
from slm.prepare.scan import BadText
from slm.prepare.sources import Source
from slm.store.claims import process_name, remove_temporaries
from slm.store.files import naming

BATCHES_PER_WORKER = 3  # in flight
LOOK_S = 1.0  # where no result comes, whether all workers are there


# ---- a worker: blocks -> token arrays -----------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, sent to it once."""

    sources: list[Source]
    encoder: EncoderState
    overlap: Overlap | None
    heldout_ratio: float
    stop_on_bad: bool
    max_bytes: int
    chat: ChatFormat | None = None
    keep: Keep | None = None

    @property
    def by_need(self) -> set[str]:
        """The columns that some source asks for."""
        return set().union(*(source.by_need for source in self.sources))


class Result(NamedTuple):
    """One batch of blocks, encoded."""

    columns: dict[str, np.ndarray]  # (n,) each: tokens, bytes and others by need
    # (d, 8) int64: number of tokens, source, record, side, bytes; targets, tokens of signal, noise
    documents: np.ndarray
    excluded: list[Excluded]
    judged: list[tuple[int, bool]]  # source and whether it stays, of documents of the first reading
    short: list[int]  # the source of each document of the first reading below its min_tokens
    faults: list[tuple[int, str]]  # source, sentence
    num_input_bytes: int

    def of_side(self, side: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What `ShardWriter.add` takes."""
        mine = self.documents[:, 3] == side
        if mine.all():
            return self.columns, self.documents[:, :3]
        tokens = np.repeat(mine, self.documents[:, 0])
        return {name: c[tokens] for name, c in self.columns.items()}, self.documents[mine, :3]


Run = Callable[[Iterable[list[Block]]], Iterator[Result]]


def bad_record(fault: str) -> BadText:
    return BadText(f"{fault} (on_bad_record=skip counts such records and goes on)")


def check_first_records(sources: list[Source], max_bytes: int) -> None:
    """A field that no record has is said before a file is hashed or a tokenizer trained."""
    for source in sources:
        blocks = read_source(source, max_bytes)
        texts = (text for block in blocks for text in read_texts(block, source, max_bytes))
        first = next(texts, None)
        if first is not None and first.fault is not None:
            raise bad_record(first.fault)


def side_of(digest: bytes, heldout_ratio: float) -> int:
    """0 train, 1 heldout: a pure function of the text, whatever surrounds it."""
    return int(int.from_bytes(digest[:8], "big") < round(heldout_ratio * 2**64))


def is_kept(digest: bytes, share: float) -> bool:
    """A part of the documents, independent of their side."""
    return int.from_bytes(digest[8:], "big") < round(share * 2**64)


class Worker:
    """Runs in each process."""

    def __init__(self, job: Job):
        # The workers are the parallelism; threads of `tokenizers` would compete with them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.job, self.encoder = job, Encoder(job.encoder)

    def run(self, blocks: list[Block]) -> Result:
        """Every kept document of the blocks, in order; raises UserError at the first bad record."""
        try:
            return self.encode_blocks(blocks)
        except MemoryError:
            longest = max(blocks, key=lambda block: block.size)
            raise out_of_memory(f"{longest.file}, {longest.unit} {longest.line + 1}") from None

    def encode_blocks(self, blocks: list[Block]) -> Result:
        texts, rows, excluded, judged, faults = [], [], [], [], []
        for block in blocks:
            source = self.job.sources[block.source]
            for text in read_texts(block, source, self.job.max_bytes, self.job.chat):
                if text.fault is not None:
                    self.complain(block, text.fault, faults)
                    continue
                side = self.choose_side(block, text)
                if side is None or not self.judge(block, text, judged):
                    continue
                shared = None if self.job.overlap is None else self.job.overlap.find(text.origin)
                if shared is None:
                    texts.append(text)
                    rows.append((block, side))
                elif block.copy == 0:
                    excluded.append(Excluded(block.source, text.where, text.record, *shared))
        size = sum(block.size for block in blocks)
        columns, documents, short = self.encode(texts, rows, faults)
        return Result(columns, documents, excluded, judged, short, faults, size)

    def complain(self, block: Block, fault: str, faults: list[tuple[int, str]]) -> None:
        if self.job.stop_on_bad:
            raise bad_record(fault)
        if block.copy == 0:
            faults.append((block.source, fault))

    def choose_side(self, block: Block, text: Text) -> int | None:
        """0, 1, or None where the weight leaves this copy out; a copy more is for training only.

        A weight that depends on the length is asked again in `left_out`.
        """
        digest = text.digest
        side = side_of(digest, self.job.heldout_ratio)
        share = self.job.sources[block.source].largest_weight - block.copy
        dropped = (side == 1 and block.copy > 0) or not is_kept(digest, share)
        return None if dropped else side

    def judge(self, block: Block, text: Text, judged: list[tuple[int, bool]]) -> bool:
        """Does it stay, by its quality?"""
        if self.job.keep is None:
            return True
        stays = self.job.keep.keeps(text)
        if block.copy == 0:
            judged.append((block.source, stays))
        return stays

    def left_out(
        self, texts: list[Text], rows: list[tuple[Block, int]], lengths: np.ndarray
    ) -> tuple[set[int], list[int]]:
        """By number of tokens: too short, or of a weight that has no such copy; of the first
        reading's short ones also the source."""
        gone, short = set(), []
        for i, ((block, _), length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            source = self.job.sources[block.source]
            if length < source.min_tokens:
                gone.add(i)
                short += [block.source] * (block.copy == 0)
            elif source.weight_long is not None:
                if not is_kept(texts[i].digest, source.weight_of(length) - block.copy):
                    gone.add(i)
        return gone, short

    def encode(
        self, texts: list[Text], rows: list[tuple[Block, int]], faults: list[tuple[int, str]]
    ) -> tuple[dict[str, np.ndarray], np.ndarray, list[int]]:  # columns, documents, short of Result
        if not texts:
            return {}, np.empty((0, 8), np.int64), []
        encoded = encode_documents(self.encoder, texts)
        given = [
            (block.source, text.record, side)
            for text, (block, side) in zip(texts, rows, strict=True)
        ]
        labels, labelled = label_tokens(texts, encoded.sizes, encoded.lengths)
        counts = [encoded.num_bytes, encoded.num_targets, *labelled]
        documents = np.column_stack([encoded.lengths, given, *counts])
        for i, fault in sorted(encoded.faults.items()):
            self.complain(rows[i][0], f"{texts[i].where}: {fault}", faults)
        weights = np.repeat(np.array([text.weight for text in texts], "f4"), encoded.lengths)
        by_need = {"masks": encoded.masks, "signal": labels, "weights": weights}
        columns = {"tokens": encoded.tokens, "bytes": encoded.sizes}
        columns |= {name: by_need[name] for name in self.job.by_need}
        gone, short = self.left_out(texts, rows, encoded.lengths)
        return *without(columns, documents, gone | encoded.faults.keys()), short


def without(
    columns: dict[str, np.ndarray], documents: np.ndarray, gone: set[int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    if not gone:
        return columns, documents
    good = np.ones(len(documents), dtype=bool)
    good[list(gone)] = False
    tokens = np.repeat(good, documents[:, 0])
    return {name: column[tokens] for name, column in columns.items()}, documents[good]


# ---- the pool -----------------------------------------------------------------------------------


@contextmanager
def undisturbed() -> Iterator[None]:
    """An interrupt waits: a worker that is half started would be waited for for ever.

    Then it is heard as ever, which may be not at all: a shell's job in the background ignores it.
    What is started here hears none, not while it imports either: the mask is inherited. In this
    process another thread may be told of it, and Python's handler runs in the main one anyway.
    """
    if threading.current_thread() is not threading.main_thread():  # no interrupt arrives there
        yield
        return
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if heard:
        signal.raise_signal(signal.SIGINT)


_worker: Worker


def start_worker(job: str) -> None:
    """job: the file with it"""
    global _worker
    threading.Thread(target=die_with_parent, daemon=True).start()
    _worker = Worker(pickle.loads(Path(job).read_bytes()))


@contextmanager
def written(job: Job) -> Iterator[str]:
    """Where workers read their job.

    As an argument of a process it is more than a pipe holds, and multiprocessing keeps the reading
    end open as it writes: a worker that died before it had read would be waited for for ever.
    """
    with suppress(OSError):  # of a process that was killed; another user's stays
        remove_temporaries(Path(tempfile.gettempdir()), "slm-job")
    with tempfile.NamedTemporaryFile(prefix=".slm-job.", suffix=f".{process_name()}.tmp") as file:
        with naming(Path(file.name)):
            pickle.dump(job, file)
            file.flush()
        yield file.name


def die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def run_in_worker(blocks: list[Block]) -> Result:
    return _worker.run(blocks)


@contextmanager
def worker_pool(job: Job, num_proc: int) -> Iterator[Run]:
    """Yields what runs batches, one call after the other."""
    if num_proc == 1:
        yield partial(map, Worker(job).run)
        return
    context = multiprocessing.get_context("spawn")
    with written(job) as file:
        pool = ProcessPoolExecutor(num_proc, context, start_worker, (file,))
        with ending(pool):
            yield partial(run_batches, pool, num_proc)


@contextmanager
def ending(pool: ProcessPoolExecutor) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        end_workers(pool)
        raise UserError(
            "a worker process died (out of memory? fewer workers need less, num_proc, and shorter "
            "documents, max_document_mb)"
        ) from None
    except BaseException:
        end_workers(pool)  # nobody wants the rest
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_batches(
    pool: ProcessPoolExecutor, num_proc: int, batches: Iterable[list[Block]]
) -> Iterator[Result]:
    """Results in the order of the batches, a bounded number of them in flight."""
    pending: deque[Future[Result]] = deque()
    for batch in batches:
        with undisturbed():  # a call may start a worker
            pending.append(pool.submit(run_in_worker, batch))
        if len(pending) >= BATCHES_PER_WORKER * num_proc:
            yield result_of(pending.popleft(), pool)
    while pending:
        yield result_of(pending.popleft(), pool)


def result_of(future: Future[Result], pool: ProcessPoolExecutor) -> Result:
    """The pool itself waits for ever for the rest of a result whose worker died as it sent it."""
    while True:
        try:
            return future.result(LOOK_S)
        except TimeoutError:
            if future.done():
                continue
            if not all(process.is_alive() for process in [*(pool._processes or {}).values()]):
                raise BrokenProcessPool from None


def end_workers(pool: Any) -> None:
    """A second Ctrl-C must find none to wait for; and what waits for one of them must end."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool._result_queue._writer.close()  # of a result that was begun comes no end
    if sys.version_info < (3, 11, 5):  # a write that nobody reads is waited for (gh-94777)
        pool._call_queue._reader.close()


def group_blocks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Batches of about BLOCK_BYTES: small files and rows travel together."""
    batch, size = [], 0
    for block in blocks:
        batch.append(block)
        size += block.size
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
