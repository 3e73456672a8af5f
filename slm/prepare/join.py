"""The corpora of a preparation: written from its parts, or at once where there is one unit.

A shard is a pure function of the parts: every process takes shards that nobody has, and when all
are there one of them writes what was counted, manifests and report.json; the others wait for it.
The bytes are those of one process that read everything in order. Parts stay until then, so the disk
holds the tokens twice at most; a kill while they are joined costs the shards that were begun.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from slm.console import progress
from slm.prepare.overlap import Excluded
from slm.prepare.parts import Part, say_waiting
from slm.prepare.proof import encoder_name
from slm.prepare.report import SIDES, finish_side, show_progress
from slm.prepare.settings import corpus_plan
from slm.prepare.shard_writer import ShardWriter
from slm.prepare.tally import Tally
from slm.prepare.units import read_unit
from slm.prepare.vocabulary import save_tokenizer
from slm.prepare.work import POLL_S, Work, remove_corpora, remove_parts, when_free
from slm.prepare.workers import Result, group_blocks, worker_pool
from slm.store.claims import claim
from slm.store.files import Json, atomic_file, read_json, write_record
from slm.store.shards import adopt_plan
from slm.store.sidecars import shard_path
from slm.store.tokenizer import tokenizer_sha256

log = logging.getLogger("slm.prepare")
Shards = set[tuple[int, int]]  # (side, number)


def shard_writer(work: Work, side: int) -> ShardWriter:
    config, job = work.config, work.job
    shape = (config.seq_len, config.shard_tokens, job.encoder, job.by_need)
    return ShardWriter(work.out / SIDES[side], *shape)


# ---- what was counted ---------------------------------------------------------------------------


class Books:
    """Of all results, or of all parts; excluded.jsonl."""

    def __init__(self, work: Work, stack: ExitStack):
        self.work, self.tally = work, Tally(work.job.sources)
        self.file = None
        if work.exclusion is not None:
            self.file = stack.enter_context(atomic_file(work.out / "excluded.jsonl"))
        self.encoders: set[str] = set()

    def add(self, result: Result) -> None:
        self.exclude(result.excluded)
        self.tally.add(result)

    def add_part(self, part: Part, before: Counter[int]) -> None:
        """before: number of records of each source in the parts before"""
        self.exclude(
            row._replace(record=row.record + before[row.source]) for row in part.excluded()
        )
        self.tally.add_json(part.record["tally"])
        self.encoders.add(part.record["encoder"])

    def exclude(self, rows: Iterable[Excluded]) -> None:
        exclusion = self.work.exclusion
        if exclusion is not None and self.file is not None:
            names = [source.name for source in self.work.job.sources]
            self.file.writelines(exclusion.line(row, names[row.source]) for row in rows)


# ---- parts -> shards ----------------------------------------------------------------------------


class Joined:
    """All parts, end to end, and the shards that they are cut into."""

    def __init__(self, work: Work):
        self.work = work
        self.parts = [Part.read(work.parts, index) for index in range(len(work.units))]
        self.capacity = shard_writer(work, 0).capacity
        lengths = [[part.num_tokens(side) for part in self.parts] for side in range(2)]
        self.bounds = np.array([np.cumsum([0, *of_side]) for of_side in lengths])  # (2, p + 1)

    @cached_property
    def before(self) -> list[Counter[int]]:
        """Of each part: the records of its sources, of the same copy, in the parts before."""
        found, so_far = [], Counter()
        for part in self.parts:
            copies = {piece.source: piece.copy for piece in self.work.units[part.index]}
            counts = {source: so_far[source, copy] for source, copy in copies.items()}
            found.append(Counter(counts))
            for source, copy in copies.items():
                so_far[source, copy] += part.record["records"][str(source)]
        return found

    def sizes(self, side: int) -> list[int]:
        """Tokens of each shard: full ones, and a last one of whole windows."""
        full, rest = divmod(int(self.bounds[side, -1]), self.capacity)
        windows = max(0, rest - 1) // self.work.config.seq_len
        return [self.capacity] * full + [windows * self.work.config.seq_len + 1] * (windows > 0)

    def written(self) -> dict[int, tuple[int, int]]:
        """Tokens dropped at the end and number of shards, by side."""
        sizes = {side: self.sizes(side) for side in self.work.sides}
        return {s: (int(self.bounds[s, -1]) - sum(own), len(own)) for s, own in sizes.items()}

    def is_there(self, side: int, number: int) -> bool:
        return shard_path(self.work.out / SIDES[side], "tokens", number, ".json").exists()

    def missing(self) -> Shards:
        return {
            (side, number)
            for side in self.work.sides
            for number in range(len(self.sizes(side)))
            if not self.is_there(side, number)
        }

    def num_tokens(self, shards: Shards) -> int:
        return sum(self.sizes(side)[number] for side, number in shards)

    def write_shard(self, side: int, number: int, advance: Callable[[int], None]) -> None:
        """As the writer of the whole side would have it there."""
        start = number * self.capacity
        index = int(np.searchsorted(self.bounds[side], start, side="right")) - 1
        with shard_writer(self.work, side) as writer:
            writer.begin_at(number, start)
            while writer.num_shards == number and index < len(self.parts):
                offset = int(self.bounds[side, index])
                self.add_part(writer, side, index, max(0, start - offset), advance)
                index += 1
            writer.finish()

    def add_part(
        self,
        writer: ShardWriter,
        side: int,
        index: int,
        first: int,
        advance: Callable[[int], None],
    ) -> None:
        """The tokens of a part from `first` on, until the shard is full."""
        part, number = self.parts[index], writer.num_shards
        for columns, documents, carried in part.pieces(side, first):
            for source, count in self.before[index].items():
                documents[documents[:, 1] == source, 2] += count
            before = writer.position
            writer.add(columns, documents, carried)
            advance(writer.position - before)
            if writer.num_shards > number:
                return


def write_shards(joined: Joined) -> None:
    """Until all are there, whoever writes them."""
    work, missing = joined.work, joined.missing()
    with progress("joining", joined.num_tokens(missing), "tokens") as advance:
        said = ""
        while missing:
            mine = {shard for shard in sorted(missing) if take(joined, *shard, advance)}
            before, missing = missing, joined.missing()
            advance(joined.num_tokens(before - mine - missing))
            if missing and not mine:
                claims = [claim_path(work, *shard) for shard in sorted(missing)]
                said = say_waiting(work, claims, said)
                time.sleep(POLL_S)


def claim_path(work: Work, side: int, number: int) -> Path:
    return shard_path(work.parts, SIDES[side], number, ".claim")


def take(joined: Joined, side: int, number: int, advance: Callable[[int], None]) -> bool:
    """Write a shard unless somebody else has written it or is at it."""
    if joined.is_there(side, number):
        return False
    with claim(claim_path(joined.work, side, number)) as mine:
        if mine is None or joined.is_there(side, number):
            return False
        joined.write_shard(side, number, advance)
    return True


# ---- the corpora --------------------------------------------------------------------------------


def write_corpora(work: Work) -> Json:
    """Returns the report, this process's or another's."""
    joined = None
    if len(work.units) > 1:
        with when_free(work.parts / "join.claim"):
            if (work.out / "report.json").exists():
                return read_json(work.out / "report.json")
            start_sides(work)
        joined = Joined(work)
        write_shards(joined)
    with when_free(work.parts / "join.claim") as mine:
        if (work.out / "report.json").exists():
            return read_json(work.out / "report.json")
        with ExitStack() as stack:
            books = Books(work, stack)
            if joined is None:
                remove_corpora(work.out)
                start_sides(work)
                written = write_at_once(work, books, stack)
            else:
                written = joined.written()
                for part, before in zip(joined.parts, joined.before, strict=True):
                    books.add_part(part, before)
        report = make_report(work, books, written)
        mine.check()
        write_record(work.out / "report.json", report)
    remove_parts(work.out)
    return report


def start_sides(work: Work) -> None:
    sha256 = tokenizer_sha256(work.tokenizer)
    names = [source.name for source in work.job.sources]
    for side in work.sides:
        folder = work.out / SIDES[side]
        plan = corpus_plan(work.config, work.job.encoder, sha256, SIDES[side], names)
        adopt_plan(folder, plan)
        save_tokenizer(work.tokenizer, work.parts, folder / "tokenizer")


def write_at_once(work: Work, books: Books, stack: ExitStack) -> dict[int, tuple[int, int]]:
    """The one unit needs no part."""
    job = replace(work.job, encoder=work.chosen_encoder())
    writers = {side: stack.enter_context(shard_writer(work, side)) for side in work.sides}
    blocks = read_unit(work.units[0], job.sources, job.max_bytes, Counter())
    with show_progress(work.num_bytes) as speed, worker_pool(job, work.num_proc) as run:
        for result in run(group_blocks(blocks)):
            for side, writer in writers.items():
                writer.add(*result.of_side(side))
            books.add(result)
            speed.add(result)
    books.encoders.add(encoder_name(job.encoder))
    return {side: (writer.finish(), writer.num_shards) for side, writer in writers.items()}


def make_report(work: Work, books: Books, written: dict[int, tuple[int, int]]) -> Json:
    report: Json = {
        "bad_records": books.tally.of_faults(),
        "short_documents": books.tally.of_short(),
        "kept": books.tally.of_kept(),
        "excluded": {} if work.exclusion is None else work.exclusion.report(),
        "encoder": ", ".join(sorted(books.encoders)),
    }
    has_prompts = any(source.has_prompts for source in work.job.sources)
    for side, (dropped, num_shards) in written.items():
        counts = books.tally.of_side(side) | {"dropped_tail_tokens": dropped}
        made = (work.out / SIDES[side], counts, num_shards, has_prompts)
        report[SIDES[side]] = finish_side(work.config, *made, books.tally.of_left_out())
    return report
