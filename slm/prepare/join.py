"""The corpora of a preparation: written from its parts, or at once where there is one unit.

One process does it, when all parts are there; the others wait for report.json. The bytes are those
of one process that read everything in order. Parts stay until then, so the disk holds the tokens
twice at most; a kill while they are joined costs the joining alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace

from slm.console import progress
from slm.prepare.overlap import Excluded
from slm.prepare.parts import Part
from slm.prepare.proof import encoder_name
from slm.prepare.report import SIDES, finish_side, show_progress
from slm.prepare.settings import corpus_plan
from slm.prepare.shard_writer import ShardWriter
from slm.prepare.units import read_unit
from slm.prepare.vocabulary import save_tokenizer
from slm.prepare.work import Work, remove_corpora, remove_parts, when_free
from slm.prepare.workers import Result, Tally, group_blocks, worker_pool
from slm.store.files import Json, atomic_file, read_json, write_record
from slm.store.shards import adopt_plan
from slm.store.tokenizer import tokenizer_sha256


class Corpora:
    """Both sides as they are written, excluded.jsonl, and what was counted."""

    def __init__(self, work: Work, stack: ExitStack):
        self.work, self.tally = work, Tally(work.job.sources)
        config, job = work.config, work.job
        shape = (config.seq_len, config.shard_tokens, job.encoder, job.by_need)
        self.writers = {
            side: stack.enter_context(ShardWriter(work.out / SIDES[side], *shape))
            for side in work.sides
        }
        self.file = None
        if work.exclusion is not None:
            self.file = stack.enter_context(atomic_file(work.out / "excluded.jsonl"))
        self.num_records: Counter[tuple[int, int]] = Counter()  # of (source, copy), so far
        self.encoders: set[str] = set()

    def add(self, result: Result) -> None:
        for side, writer in self.writers.items():
            writer.add(*result.of_side(side))
        self.exclude(result.excluded)
        self.tally.add(result)

    def add_part(self, part: Part, advance: Callable[[int], None]) -> None:
        """Records are numbered on from those of the parts before."""
        copies = {piece.source: piece.copy for piece in self.work.units[part.index]}
        before = {source: self.num_records[source, copy] for source, copy in copies.items()}
        for side, writer in self.writers.items():
            for columns, documents in part.pieces(side):
                for source in copies:
                    documents[documents[:, 1] == source, 2] += before[source]
                writer.add(columns, documents)
                advance(len(columns["tokens"]))
        self.exclude(
            row._replace(record=row.record + before[row.source]) for row in part.excluded()
        )
        self.tally.add_json(part.record["tally"])
        self.encoders.add(part.record["encoder"])
        for source, copy in copies.items():
            self.num_records[source, copy] += part.record["records"][str(source)]

    def exclude(self, rows: Iterable[Excluded]) -> None:
        exclusion = self.work.exclusion
        if exclusion is not None and self.file is not None:
            names = [source.name for source in self.work.job.sources]
            self.file.writelines(exclusion.line(row, names[row.source]) for row in rows)

    def finish(self) -> dict[int, tuple[int, int]]:
        """Tokens dropped at the end and number of shards, by side."""
        return {side: (writer.finish(), writer.num_shards) for side, writer in self.writers.items()}


def write_corpora(work: Work) -> Json:
    """Returns the report, this process's or another's."""
    with when_free(work.parts / "join.claim") as mine:
        if (work.out / "report.json").exists():
            return read_json(work.out / "report.json")
        remove_corpora(work.out)
        start_sides(work)
        with ExitStack() as stack:
            corpora = Corpora(work, stack)
            (write_at_once if len(work.units) == 1 else join_parts)(work, corpora)
            written = corpora.finish()
        report = make_report(work, corpora, written)
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


def write_at_once(work: Work, corpora: Corpora) -> None:
    """The one unit needs no part."""
    job = replace(work.job, encoder=work.chosen_encoder())
    blocks = read_unit(work.units[0], job.sources, job.max_bytes, Counter())
    with show_progress(work.num_bytes) as speed, worker_pool(job, work.num_proc) as run:
        for result in run(group_blocks(blocks)):
            corpora.add(result)
            speed.add(result)
    corpora.encoders.add(encoder_name(job.encoder))


def join_parts(work: Work, corpora: Corpora) -> None:
    def read_parts() -> Iterator[Part]:
        return (Part.read(work.parts, index) for index in range(len(work.units)))

    total = sum(part.num_tokens for part in read_parts())
    with progress("joining", total, "tokens") as advance:
        for part in read_parts():
            corpora.add_part(part, advance)


def make_report(work: Work, corpora: Corpora, written: dict[int, tuple[int, int]]) -> Json:
    report: Json = {
        "bad_records": corpora.tally.of_faults(),
        "excluded": {} if work.exclusion is None else work.exclusion.report(),
        "encoder": ", ".join(sorted(corpora.encoders)),
    }
    has_prompts = any(source.has_prompts for source in work.job.sources)
    for side, (dropped, num_shards) in written.items():
        counts = corpora.tally.of_side(side) | {"dropped_tail_tokens": dropped}
        made = (work.out / SIDES[side], counts, num_shards, has_prompts)
        report[SIDES[side]] = finish_side(work.config, *made)
    return report
