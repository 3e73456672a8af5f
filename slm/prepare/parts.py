"""Parts: what each unit of the input becomes, made by any number of processes in one folder.

A part is a pure function of its unit: tokens and documents of each side beside a JSON file with
all that was counted. Records are numbered from the first of their reading in the unit; what lies
before is known when parts are joined. A part is claimed while it is made; a dead process's claim is
taken over.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import BufferedRandom
from pathlib import Path

import numpy as np

from slm.prepare.encoder import EncoderState
from slm.prepare.overlap import Excluded
from slm.prepare.proof import encoder_name
from slm.prepare.report import SIDES, Speed, show_progress
from slm.prepare.shard_writer import column_dtypes
from slm.prepare.tally import Tally
from slm.prepare.units import read_unit
from slm.prepare.work import POLL_S, Work
from slm.prepare.workers import Result, Run, group_blocks, worker_pool
from slm.store.claims import Claim, ClaimLost, claim, owner_of
from slm.store.files import (
    ArrayWriter,
    Json,
    atomic_file,
    map_array,
    read_json,
    release,
    write_record,
)

TOKENS_AT_ONCE = 2**21
Columns = dict[str, np.ndarray]

log = logging.getLogger("slm.prepare")


def part_path(parts: Path, index: int, suffix: str, column: str = "part") -> Path:
    return parts / f"{column}-{index:05d}{suffix}"


# ---- one part -----------------------------------------------------------------------------------


class PartWriter:
    """The arrays of a unit as they come; `finish` names them in a JSON file."""

    def __init__(self, work: Work, index: int, mine: Claim, stack: ExitStack):
        self.work, self.index, self.tally = work, index, Tally(work.job.sources)
        self.excluded: list[Excluded] = []
        self.dtypes = column_dtypes(work.job.encoder, work.job.by_need) | {"documents": "int64"}

        def open_array(side: int, column: str) -> ArrayWriter:
            path = part_path(work.parts, index, ".npy", f"{SIDES[side]}-{column}")
            file: BufferedRandom = stack.enter_context(atomic_file(path, publish=mine.publish))
            return ArrayWriter(file, self.dtypes[column], 3 if column == "documents" else None)

        self.writers = {s: {c: open_array(s, c) for c in self.dtypes} for s in work.sides}

    def add(self, result: Result) -> None:
        for side, writers in self.writers.items():
            columns, documents = result.of_side(side)
            writers["documents"].append(documents)
            for name, column in columns.items():
                writers[name].append(column)
        self.excluded += result.excluded
        self.tally.add(result)

    def close(self) -> Json:
        """The lengths of the arrays, by side."""
        rows: Json = {}
        for side, writers in self.writers.items():
            for writer in writers.values():
                writer.end()
            rows[SIDES[side]] = {name: writer.length for name, writer in writers.items()}
        return rows

    def record(self, rows: Json, records: Counter[int], encoder: EncoderState) -> Json:
        excluded = [[*row[:-1], row.shared.tolist()] for row in self.excluded]
        named = {"rows": rows, "dtypes": self.dtypes, "encoder": encoder_name(encoder)}
        named["records"] = {str(source): number for source, number in records.items()}
        return named | {"excluded": excluded, "tally": self.tally.to_json()}


def write_part(
    work: Work, index: int, run: Run, tell: Callable[[Result], None], mine: Claim
) -> None:
    """`mine` publishes: a process that wakes up too late overwrites nothing."""
    records: Counter[int] = Counter()
    blocks = read_unit(work.units[index], work.job.sources, work.job.max_bytes, records)
    with ExitStack() as stack:
        writer = PartWriter(work, index, mine, stack)
        for result in run(group_blocks(blocks)):
            writer.add(result)
            tell(result)
        rows = writer.close()
    record = writer.record(rows, records, work.job.encoder)
    write_record(part_path(work.parts, index, ".json"), record, mine.publish)


@dataclass
class Part:
    """A part that was made."""

    parts: Path
    index: int
    record: Json

    @classmethod
    def read(cls, parts: Path, index: int) -> "Part":
        return cls(parts, index, read_json(part_path(parts, index, ".json")))

    def num_tokens(self, side: int) -> int:
        rows = self.record["rows"]
        return rows[SIDES[side]]["tokens"] if SIDES[side] in rows else 0

    def pieces(self, side: int, start: int = 0) -> Iterator[tuple[Columns, np.ndarray, int]]:
        """Columns, documents (d, 3) and tokens that are carried, as `ShardWriter.add` takes them, a
        few MB at once: from the token `start` on, and the document that it is of."""
        rows, arrays = self.record["rows"][SIDES[side]], {}
        for column, dtype in self.record["dtypes"].items():
            path = part_path(self.parts, self.index, ".npy", f"{SIDES[side]}-{column}")
            if rows[column]:
                arrays[column] = map_array(path, dtype, rows[column])
        if "documents" not in arrays:
            return
        documents = np.array(arrays.pop("documents"))
        ends = np.cumsum(documents[:, 0])
        first = int(np.searchsorted(ends, start, side="right"))
        while first < len(documents):
            last = max(first + 1, int(np.searchsorted(ends, start + TOKENS_AT_ONCE)))
            end = int(ends[last - 1])
            begun = ends[first] - documents[first, 0]  # before the piece, where it is the first
            yield (
                {c: a[start:end] for c, a in arrays.items()},
                documents[first:last],
                int(begun) - start,
            )
            for array in arrays.values():
                release(array, start, end)
            first, start = last, end

    def excluded(self) -> list[Excluded]:
        return [
            Excluded(source, where, record, ngram, np.array(shared, np.int64))
            for source, where, record, ngram, shared in self.record["excluded"]
        ]


# ---- all parts ----------------------------------------------------------------------------------


def missing_parts(work: Work) -> set[int]:
    made = {path.name for path in work.parts.glob("part-*.json")}
    everything = range(len(work.units))
    return {i for i in everything if part_path(work.parts, i, ".json").name not in made}


def unit_bytes(work: Work, indices: set[int]) -> int:
    return sum(piece.size for index in indices for piece in work.units[index])


def make_parts(work: Work) -> None:
    """Until all are there. What others finish meanwhile counts as progress too."""
    missing = missing_parts(work)
    if not missing:
        return
    work = replace(work, job=replace(work.job, encoder=work.chosen_encoder()))
    done = 0 if work.num_bytes is None else work.num_bytes - unit_bytes(work, missing)
    said = ""
    with show_progress(work.num_bytes, done) as speed, worker_pool(work.job, work.num_proc) as run:
        while missing:
            mine = {index for index in sorted(missing) if take(work, index, run, speed)}
            before, missing = missing, missing_parts(work)
            speed.show(unit_bytes(work, before - mine - missing), str(speed))
            if missing and not mine:
                claims = [part_path(work.parts, index, ".claim") for index in sorted(missing)]
                said = say_waiting(work, claims, said)
                time.sleep(POLL_S)


def take(work: Work, index: int, run: Run, speed: Speed) -> bool:
    """Make a part unless somebody else has made it or is at it."""
    path = part_path(work.parts, index, ".json")
    if path.exists():
        return False
    with claim(part_path(work.parts, index, ".claim")) as mine:
        if mine is None or path.exists():
            return False
        try:
            write_part(work, index, run, speed.add, mine)
        except ClaimLost as error:
            log.warning("%s; going on with another part", error)
            return False
    return True


def say_waiting(work: Work, claims: list[Path], said: str) -> str:
    """Once, and again where it is another."""
    now = ", ".join(f"{path.stem} ({owner_of(path)})" for path in claims if path.exists())
    if now and now != said:
        log.info("%s: waiting for %s", work.out, now)
    return now or said
