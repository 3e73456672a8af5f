"""Text to token shards: `slm prepare out=corpus 'sources=[a.jsonl]' tokenizer.vocab_size=4096`.

The input is cut into units (`slm.prepare.units`), each becomes a part (`slm.prepare.parts`), and
the parts are joined (`slm.prepare.join`); input of one unit, up to 128 MB, becomes the corpora at
once. In a process one reads blocks of text in order, workers encode them, and it writes the token
arrays in order (`slm.prepare.workers`). A document's hash alone decides on which side (train,
heldout) it falls, so neither the order nor the number of processes or machines matters. Memory is a
few blocks of 0.5 MB a worker, or the longest document (20 to 30 bytes per byte of it, 150 where
`slm.prepare.encoder` cannot cut it).

An interrupted run goes on with the next part when it is run again, and ends with the same bytes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from slm.command_keys import PREPARE
from slm.errors import UserError
from slm.prepare.chat import chat_format
from slm.prepare.encoder import encoder_state
from slm.prepare.join import write_corpora
from slm.prepare.keep import Keep, open_keep
from slm.prepare.overlap import read_exclusion
from slm.prepare.parts import make_parts
from slm.prepare.readers import out_of_memory
from slm.prepare.report import SIDES, say_report
from slm.prepare.scan import BadText
from slm.prepare.settings import TOKENIZER, TokenizerKeys, chat_template, check_config, run_plan
from slm.prepare.shared_scans import SCANS, share_scans
from slm.prepare.sources import Source, parse_sources
from slm.prepare.units import list_units
from slm.prepare.vocabulary import shared_tokenizer
from slm.prepare.work import (
    PARTS,
    Work,
    adopt_inputs,
    is_alone,
    present,
    remove_corpora,
    remove_parts,
    when_free,
)
from slm.prepare.workers import Job, check_first_records
from slm.stage import Folder, stage
from slm.store.claims import remove_temporaries
from slm.store.files import Json, cannot_write, hash_json, read_json, write_error
from slm.store.shards import Corpus, adopt_plan
from slm.store.sidecars import read_sidecars
from slm.store.tokenizer import load_tokenizer, tokenizer_sha256

log = logging.getLogger("slm.prepare")

LOCK = ".prepare.lock"


# ---- the folder ---------------------------------------------------------------------------------


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """`out` exists and holds nothing foreign."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out={out} is a file or lies in one; it must be a folder") from None
    try:
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others and "plan.json" not in others:
            raise UserError(f"{out} holds other files ({others[0]}); choose another output folder")
        yield
    finally:
        for folder in (out / SCANS, out):
            with suppress(OSError):
                folder.rmdir()  # only succeeds if nothing was written


def begin(out: Path, plan: Json, sources: list[Source]) -> Json | None:
    """Write or adopt the plan, one process at a time; the report where all is done."""
    with when_free(out / LOCK):
        if not (out / "plan.json").exists():
            remove_parts(out, [PARTS])  # of nobody knows what; the hashes are of files
        elif (out / PARTS).exists():
            adopt_inputs(out / PARTS, sources)  # it names the file that has changed
        adopt_plan(out, plan)
        if not (out / "report.json").exists():
            adopt_inputs(out / PARTS, sources)
            return None
        remove_parts(out)
        fault = damage(out)
        if fault is None:
            log.info("%s is finished: the same run made it before, nothing to do", out)
            return read_json(out / "report.json")
        log.warning("%s is made again: %s", out, fault)
        (out / "report.json").unlink()
        remove_corpora(out)
        adopt_inputs(out / PARTS, sources)
        return None


def give_up(out: Path, error: BaseException) -> None:
    """Leave the folder as it was found, unless others are at work or some parts are worth it."""
    if not out.exists():
        return
    with when_free(out / LOCK):
        if not is_alone(out / PARTS):
            return
        remove_corpora(out)
        remove_temporaries(out)
        if isinstance(error, BadText) or not any((out / PARTS).glob("part-*.json")):
            remove_parts(out)
            (out / "plan.json").unlink(missing_ok=True)


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
    keep: Mapping[str, Any] | None = None,
) -> Prepared:
    """Text to token shards: tokenize, end documents with EOS, hold some out by hash.

    A preparation that was interrupted goes on; a finished one is left alone. Several processes, on
    several machines, that prepare the same into one folder share the work.

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
        keep: {"by": ..., "over": 3}: documents stay whose score is at least that; by a classifier
            on hashed features, or scores (folders of `slm quality`), or "{field}" of the records.

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
        by_length = source.min_tokens or source.weight_long is not None
        if source.by_need - {"masks"} or source.mask is not None or by_length:
            words = "signal, noise, mask, token_weight, min_tokens or weight_long"
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
    keep = None
    if config.keep is not None:
        keep, sources = open_keep(config.keep, sources)
    out = Path(config.out).expanduser()
    if not (out / "report.json").exists():  # else it is finished, and its text may be gone
        if config.on_bad_record == "stop":  # who skips bad records will count this one too
            check_first_records([*sources, *exclude], int(config.max_document_mb * 2**20))
    with own_folder(out):
        share_scans(out, [*sources, *exclude])
        plan = run_plan(config, sources, exclude, identity, {} if keep is None else keep.plan())
        report = begin(out, plan, sources)
        if report is not None:
            return report
        try:
            with present(out / PARTS):
                work = plan_work(config, out, sources, exclude, tokenizer, template, keep)
                if len(work.units) > 1:
                    make_parts(work)
                report = write_corpora(work)
        except (UserError, OSError, MemoryError) as error:
            if (out / "report.json").exists():
                log.info("%s is finished: another process joined the parts", out)
                return read_json(out / "report.json")
            give_up(out, error)
            if (cause := write_error(error, out)) is not None:
                raise cannot_write(out, cause) from error
            if isinstance(error, MemoryError):
                raise out_of_memory(str(out)) from None
            raise
    say_report(out, report)
    return report


def plan_work(
    config: Any,
    out: Path,
    sources: list[Source],
    exclude: list[Source],
    tokenizer: Any,
    template: str | None,
    keep: Keep | None,
) -> Work:
    max_bytes = int(config.max_document_mb * 2**20)
    exclusion = read_exclusion(exclude, max_bytes) if exclude else None
    overlap = None if exclusion is None else exclusion.overlap
    if tokenizer is None:
        given = (sources, overlap, keep, max_bytes, template)
        tokenizer = shared_tokenizer(config, out / PARTS, *given)
    chat = None
    if template is not None:
        tokenizer.chat_template = template  # saved beside the corpus and, with it, the model
        chat = chat_format(tokenizer)
    stop, ratio = config.on_bad_record == "stop", float(config.heldout_ratio)
    job = Job(sources, encoder_state(tokenizer), overlap, ratio, stop, max_bytes, chat, keep)
    return Work(config, out, job, list_units(sources), exclusion, tokenizer)


def run(**settings: Any) -> None:
    prepare(**settings)
