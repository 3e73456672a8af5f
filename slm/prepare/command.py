"""Text to token shards: `slm prepare out=corpus 'sources=[a.jsonl]' tokenizer.vocab_size=4096`.

The parent process reads blocks of text in order (`slm.prepare.readers`), workers encode them, and
it packs the token arrays in order (`slm.prepare.workers`). A document's hash alone decides on which
side (train, heldout) it falls, so neither the order nor the number of processes matters. Memory is
a few blocks of 0.5 MB a worker, or the longest document (20 to 30 bytes per byte of it, 150 where
`slm.prepare.encoder` cannot cut it). Speed is the tokenizer's: reading, packing and hashing cost a
few percent of it.

An interrupted run starts over when it is run again, and ends with the same bytes.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from slm.command_keys import PREPARE
from slm.errors import UserError
from slm.prepare.chat import chat_format
from slm.prepare.encoder import encoder_state
from slm.prepare.overlap import Exclusion, Overlap, read_exclusion
from slm.prepare.proof import choose_encoder, encoder_name
from slm.prepare.readers import out_of_memory, read_blocks, read_source
from slm.prepare.records import read_texts
from slm.prepare.report import SIDES, finish_side, say_report, show_progress
from slm.prepare.settings import (
    TOKENIZER,
    TokenizerKeys,
    chat_template,
    check_config,
    corpus_plan,
    count_workers,
    input_bytes,
    run_plan,
)
from slm.prepare.shard_writer import ShardWriter
from slm.prepare.sources import Source, parse_sources
from slm.prepare.workers import (
    COUNTS,
    Job,
    Tally,
    bad_record,
    check_first_records,
    group_blocks,
    run_batches,
    side_of,
)
from slm.stage import Folder, stage
from slm.store.claims import Claim, claim, owner_of, remove_temporaries
from slm.store.files import (
    Json,
    atomic_file,
    cannot_write,
    hash_json,
    naming,
    read_json,
    write_error,
    write_record,
)
from slm.store.shards import Corpus, adopt_plan, read_sidecars
from slm.store.tokenizer import load_tokenizer, tokenizer_sha256, train_tokenizer

log = logging.getLogger("slm.prepare")


# ---- the folder ---------------------------------------------------------------------------------


@contextmanager
def own_folder(out: Path) -> Iterator[Claim]:
    """`out` exists, holds nothing foreign, and is no other process's until we leave."""
    lock = out / ".prepare.lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out={out} is a file or lies in one; it must be a folder") from None
    try:
        with claim(lock) as owned:
            if owned is None:
                raise UserError(
                    f"{out} is being written by another `slm prepare` ({owner_of(lock)}; {lock})"
                )
            others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
            if others and "plan.json" not in others:
                raise UserError(
                    f"{out} holds other files ({others[0]}); choose another output folder"
                )
            yield owned
    finally:
        with suppress(OSError):
            out.rmdir()  # only succeeds if nothing was written


# ---- the run ------------------------------------------------------------------------------------


def sample_texts(
    sources: list[Source], config: Any, overlap: Overlap | None, max_bytes: int
) -> Iterator[str]:
    """For training a tokenizer: the first train documents of every source, train_mb in all."""
    budget = config.tokenizer.train_mb * 1e6
    for i, source in enumerate(sources):
        share, spent = budget / (len(sources) - i), 0
        texts = (
            text
            for block in read_source(source, max_bytes)
            for text in read_texts(block, source, max_bytes)
        )
        for text in texts:
            if text.fault is not None and config.on_bad_record == "stop":
                raise bad_record(text.fault)
            if text.fault is not None:
                continue  # the main pass counts it
            if side_of(text.digest, config.heldout_ratio) == 1:
                continue
            if overlap is None or overlap.find(text.origin) is None:
                spent += len(text.data)
                yield text.text
            if spent >= share:
                break
        budget -= spent


def clear(out: Path) -> None:
    """Remove what an interrupted or failed run has left."""
    for side in SIDES:
        shutil.rmtree(out / side, ignore_errors=True)
    (out / "excluded.jsonl").unlink(missing_ok=True)
    remove_temporaries(out)


def write_corpus(
    config: Any,
    out: Path,
    sources: list[Source],
    exclude: list[Source],
    tokenizer: Any,
    template: str | None,
) -> Json:
    """The run itself, into an empty folder; returns the report."""
    max_bytes = int(config.max_document_mb * 2**20)
    exclusion = read_exclusion(exclude, max_bytes) if exclude else None
    overlap = None if exclusion is None else exclusion.overlap
    if tokenizer is None:
        log.info("training a tokenizer of %s entries", config.tokenizer.vocab_size)
        texts = sample_texts(sources, config, overlap, max_bytes)
        tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
    state, ratio = encoder_state(tokenizer), float(config.heldout_ratio)
    state = choose_encoder(
        config.tokenizer.encoder, state, sources, max_bytes, input_bytes(sources)
    )
    stop = config.on_bad_record == "stop"
    chat = None
    if template is not None:
        tokenizer.chat_template = template  # saved beside the corpus and, with it, the model
        chat = chat_format(tokenizer)
    job = Job(sources, state, overlap, ratio, stop, max_bytes, chat)
    sides = [side for side, share in enumerate((1 - ratio, ratio)) if share > 0]
    sha256 = tokenizer_sha256(tokenizer)
    for side in sides:
        folder = out / SIDES[side]
        names = [source.name for source in job.sources]
        adopt_plan(folder, corpus_plan(config, state, sha256, SIDES[side], names))
        with naming(folder / "tokenizer"):
            tokenizer.save_pretrained(folder / "tokenizer")
    tally = Tally(sources, np.zeros((2, len(sources), len(COUNTS)), dtype=np.int64))
    written = encode_corpus(config, out, job, sides, exclusion, tally)
    excluded = {} if exclusion is None else exclusion.report()
    report: Json = {
        "bad_records": tally.of_faults(),
        "excluded": excluded,
        "encoder": encoder_name(state),
    }
    for side, (dropped, num_shards) in written.items():
        counts = tally.of_side(side) | {"dropped_tail_tokens": dropped}
        report[SIDES[side]] = finish_side(config, out / SIDES[side], counts, num_shards)
    return report


def encode_corpus(
    config: Any, out: Path, job: Job, sides: list[int], exclusion: Exclusion | None, tally: Tally
) -> dict[int, tuple[int, int]]:
    """Write the shards and excluded.jsonl; returns dropped tokens and number of shards by side."""
    num_proc = count_workers(job.sources) if config.num_proc is None else config.num_proc
    batches = group_blocks(read_blocks(job.sources, job.max_bytes))
    with ExitStack() as stack:
        speed = stack.enter_context(show_progress(input_bytes(job.sources)))
        shape = (config.seq_len, config.shard_tokens, job.encoder, job.by_need)
        writers = {
            side: stack.enter_context(ShardWriter(out / SIDES[side], *shape)) for side in sides
        }
        file = stack.enter_context(atomic_file(out / "excluded.jsonl")) if exclusion else None
        for result in stack.enter_context(closing(run_batches(job, batches, num_proc))):
            for side, writer in writers.items():
                writer.add(*result.of_side(side))
            if exclusion is not None and file is not None:
                names = (job.sources[excluded.source].name for excluded in result.excluded)
                file.writelines(map(exclusion.line, result.excluded, names))
            tally.add(result)
            speed.add(result)
        return {side: (writer.finish(), writer.num_shards) for side, writer in writers.items()}


def damage(out: Path) -> str | None:
    """What is missing or has another size; contents are for `slm verify`."""
    report = read_json(out / "report.json")
    try:
        for side in SIDES:
            if side in report:
                Corpus.open(out / side)
                if len(read_sidecars(out / side, "tokens")) != report[side]["shards"]:
                    return f"{out / side} lacks a shard's JSON file"
    except UserError as error:
        return str(error)
    return None


class Prepared(NamedTuple):
    """What a preparation has made."""

    train: Corpus | None  # None: heldout_ratio=1
    heldout: Corpus | None  # None: heldout_ratio=0
    report: Json


@stage(PREPARE)
def prepare(
    sources: Sequence[Folder | Mapping[str, Any]],
    out: Folder,
    *,
    tokenizer: TokenizerKeys = TOKENIZER,
    seq_len: int = 1024,
    packing: str = "concat",
    heldout_ratio: float = 0.01,
    exclude: Sequence[Folder | Mapping[str, Any]] = (),
    on_bad_record: str = "stop",
    max_document_mb: float = 16,
    shard_tokens: int = 33554432,
    num_proc: int | None = None,
) -> Prepared:
    """Text to token shards: tokenize, end documents with EOS, hold some out by hash.

    A preparation that was interrupted starts over; a finished one is left alone.

    Args:
        sources: what to read, in this order: paths, or {"path": ..., "text": "{question}", ...}
            with the keys that conf/prepare.yaml explains.
        out: folder to write: train/, heldout/ and report.json.
        tokenizer: exactly one of "path" (a folder or a name on the hub) and "vocab_size" (train
            one here, on "train_mb" of the text); "eos": what ends documents, if not its own token;
            "chat_template": a file with one for `messages`; "encoder": "tokenizers", "gigatoken"
            (the same ids, faster; an extra), or "auto".
        seq_len: targets in a window.
        packing: "concat": attention runs across documents; "documents": it restarts at each.
        heldout_ratio: share of the documents that is held out, by hash of the text.
        exclude: evaluation sets; a document that shares 13 words in a row with them is dropped.
        on_bad_record: "stop" at the first, or "skip" and count them.
        max_document_mb: a longer record is a bad record.
        shard_tokens: most tokens of a shard.
        num_proc: worker processes, by default the usable cores. The output does not depend on it.

    Returns:
        The two corpora and what was counted.

    Raises:
        UserError: a file or record cannot be read, `out` holds something else; a setting is wrong.
    """
    settings = SimpleNamespace(**locals())
    settings.tokenizer = SimpleNamespace(**tokenizer)
    report = write_or_confirm(settings)
    folder = Path(out).expanduser()
    train, heldout = (Corpus.open(folder / side) if side in report else None for side in SIDES)
    return Prepared(train, heldout, report)


def write_or_confirm(config: Any) -> Json:
    """Run or confirm a preparation; returns its report."""
    check_config(config)
    sources = parse_sources(config.sources, "sources")
    if not sources:
        raise UserError("sources is empty: there is nothing to prepare")
    exclude = parse_sources(config.exclude, "exclude")
    for i, source in enumerate(exclude):
        if source.by_need - {"masks"} or source.mask is not None:
            words = "signal, noise, mask or token_weight"
            raise UserError(f"exclude[{i}] has {words}: no token of it is written")
    if config.tokenizer.path is None:
        tokenizer = None
        identity = {key: vars(config.tokenizer)[key] for key in ("vocab_size", "train_mb")}
    else:
        tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eos)
        identity = {"sha256": tokenizer_sha256(tokenizer)}
    template = chat_template(config, sources, tokenizer)
    if template is not None:
        identity["chat_template_sha256"] = hash_json(template)
    out = Path(config.out).expanduser()
    if not (out / "report.json").exists():  # else it is finished, and its text may be gone
        if config.on_bad_record == "stop":  # who skips bad records will count this one too
            check_first_records([*sources, *exclude], int(config.max_document_mb * 2**20))
    with own_folder(out) as mine:
        adopt_plan(out, run_plan(config, sources, exclude, identity))
        if (out / "report.json").exists():
            fault = damage(out)
            if fault is None:
                log.info("%s is finished: the same run made it before, nothing to do", out)
                return read_json(out / "report.json")
            log.warning("%s is made again: %s", out, fault)
            (out / "report.json").unlink()
        try:
            clear(out)
            report = write_corpus(config, out, sources, exclude, tokenizer, template)
            mine.check()
            write_record(out / "report.json", report)
        except (UserError, OSError, MemoryError) as error:
            mine.check()  # else it would be another's files that are removed
            clear(out)
            (out / "plan.json").unlink()
            if (cause := write_error(error, out)) is not None:
                raise cannot_write(out, cause) from error
            if isinstance(error, MemoryError):
                raise out_of_memory(str(out)) from None
            raise
    say_report(out, report)
    return report


def run(**settings: Any) -> None:
    prepare(**settings)
