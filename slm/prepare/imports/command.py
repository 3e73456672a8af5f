"""Token files of other trainers to token shards: `slm import format=megatron path=... out=...`.

A reader a format (`FORMATS`) maps the files and says where documents end; here they are checked
against the tokenizer and written as `slm prepare` writes its own, as one side: <out>/train. The
folder is made beside its place and renamed at the end, so a run that fails or is killed leaves
nothing. Tokens stay as they are, in their order; what is left out at the end fills no window.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict

import numpy as np

from slm.command_keys import IMPORT
from slm.console import progress
from slm.errors import UserError
from slm.prepare.encoder import encoder_state
from slm.prepare.imports.link import LinkWriter
from slm.prepare.imports.parts import Options, Part
from slm.prepare.imports.stream import COUNTS, Stream
from slm.prepare.report import finish_side, say_sides
from slm.prepare.settings import corpus_plan
from slm.prepare.shard_writer import ShardWriter
from slm.stage import Folder, stage
from slm.store.claims import process_name, remove_temporaries
from slm.store.files import Json, naming, sync_folder, write_record
from slm.store.shards import FORMAT, Corpus, adopt_plan
from slm.store.tokenizer import load_tokenizer, tokenizer_sha256

log = logging.getLogger("slm.prepare")
SAMPLE = 64  # tokens that are decoded and shown
FORMATS = {  # and the module that reads it
    "nanogpt": "flat",
    "llmc": "flat",
    "npy": "flat",
    "megatron": "megatron",
    "olmo": "olmo",
    "datatrove": "datatrove",
    "mds": "mds",
    "litdata": "litdata",
    "datasets": "datasets",
}


READ_BY = {  # the formats that look at a key
    "dtype": ("nanogpt", "olmo", "datatrove", "mds"),
    "column": ("mds",),
    "masks": ("olmo", "mds"),
}


class TokenizerKeys(TypedDict, total=False):
    path: Folder | None
    eos: str | None


TOKENIZER: TokenizerKeys = {"path": None, "eos": None}


@stage(IMPORT)
def import_corpus(
    format: str,
    path: Folder | Sequence[Folder],
    out: Folder,
    *,
    tokenizer: TokenizerKeys = TOKENIZER,
    seq_len: int = 1024,
    packing: str = "concat",
    documents: str = "index",
    add_eos: bool = False,
    dtype: str | None = None,
    column: str | None = None,
    masks: str | None = None,
    shard_tokens: int = 33554432,
    link: bool = False,
) -> Corpus:
    """Token files of another trainer to <out>/train, a corpus of the same tokens.

    Args:
        format: what wrote the files: nanogpt, llmc, npy, megatron, olmo, datatrove, mds, litdata
            or datasets.
        path: a file, folder or glob, or several: a source each, in this order.
        out: folder to write, which must not exist: train/ and report.json.
        tokenizer: "path": the folder or hub name of the one that made the ids; "eos": the token
            that ends documents, where it is not the tokenizer's own.
        seq_len: targets in a window.
        packing: "concat": attention runs across documents; "documents": it restarts at each.
        documents: "index": as the format's index or rows say, where it has them; "eos": a document
            ends at each EOS, whatever they say (rows that are blocks of one stream).
        add_eos: put EOS behind documents of an index that end without.
        dtype: of tokens in files that do not say it; by default the smallest for the vocabulary.
        column: mds: the column of the tokens, by default tokens or input_ids.
        masks: what says which tokens are targets: a column (mds) or files (olmo).
        shard_tokens: most tokens of a shard.
        link: leave the tokens where they are and refer to them (plain files alone): the corpus is
            small, made at the speed of reading, and whole as long as the files stay as they are;
            its fingerprint is another than that of a copy.

    Returns:
        The corpus.

    Raises:
        UserError: a file is damaged or of another format or tokenizer; `out` exists.
    """
    settings = SimpleNamespace(**locals())
    settings.tokenizer = SimpleNamespace(**tokenizer)
    folder = Path(out).expanduser()
    say_sides(folder, write_folder(settings, folder))
    return Corpus.open(folder / "train")


def write_folder(config: Any, out: Path) -> Json:
    """Everything into a new folder; returns its report."""
    for key, formats in READ_BY.items():
        if vars(config)[key] is not None and config.format not in formats:
            raise UserError(
                f"{key} is {vars(config)[key]!r}, and format={config.format} has no such thing: "
                f"{', '.join(formats)} {'has' if len(formats) == 1 else 'have'}"
            )
    if config.link and config.add_eos:
        raise UserError("link=true leaves files as they are, and add_eos=true adds to them")
    if config.shard_tokens <= config.seq_len:
        raise UserError(
            f"shard_tokens is {config.shard_tokens}, it must be more than seq_len, {config.seq_len}"
        )
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eos)
    paths = [config.path] if isinstance(config.path, str) else config.path
    with new_folder(out) as made:
        plan: Json = {"format": FORMAT, "kind": "import", "tokenizer": tokenizer_sha256(tokenizer)}
        keys = ("seq_len", "packing", "documents", "add_eos", "dtype", "column", "masks")
        write_record(made / "plan.json", plan | {key: vars(config)[key] for key in keys})
        counts = write_corpus(config, paths, made / "train", tokenizer)
        report = {"bad_records": {"skipped": 0, "sources": {}, "first": []}, "excluded": {}}
        report["train"] = counts
        write_record(made / "report.json", report)
    return report


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end, and goes where that fails."""
    if out.exists():
        raise UserError(f"out={out} exists; choose another output folder")
    temporary = out.with_name(f".{out.name}.{process_name()}.tmp")
    with naming(out, temporary):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(out.parent, out.name)
        temporary.mkdir()
        yield temporary
        os.rename(temporary, out)
    sync_folder(out.parent)


def write_corpus(config: Any, paths: list[str], folder: Path, tokenizer: Any) -> Json:
    """The corpus of one side; returns what the report says of it."""
    state, names = encoder_state(tokenizer), source_names(paths)
    plan = corpus_plan(config, state, tokenizer_sha256(tokenizer), "train", names)
    adopt_plan(folder, plan)
    tokenizer.save_pretrained(folder / "tokenizer")
    by_eos = config.documents == "eos"
    streams = [Stream(state, number, by_eos, config.add_eos) for number in range(len(paths))]
    parts = all_parts(config, paths, streams)
    first = next(parts, None)
    if first is None:
        raise UserError(f"{', '.join(paths)}: there are no tokens in it")
    sample = np.asarray(first[0].tokens[:SAMPLE])
    by_need, shape = {*first[0].by_need}, (config.seq_len, config.shard_tokens, state)
    made = LinkWriter(folder, *shape) if config.link else ShardWriter(folder, *shape, by_need)
    with made as writer, progress("importing", None, "tokens") as advance:
        for part, stream in chain([first], parts):
            add_part(writer, part, stream, advance)
        dropped = writer.finish()
    counts = summed(names, streams, "masks" in by_need) | {"dropped_tail_tokens": dropped}
    if config.link:  # no token was looked up
        for found in (counts, *counts["sources"].values()):
            del found["bytes"]
    if writer.num_shards == 0:
        raise UserError(
            f"{', '.join(paths)}: its {counts['tokens']} tokens are fewer than the "
            f"{config.seq_len + 1} of one window (seq_len={config.seq_len})"
        )
    # Ids of another tokenizer are often in range: only a reader sees that the text is none.
    log.info("%s begins with %r", paths[0], tokenizer.decode(sample.tolist()))
    return finish_side(config, folder, counts, writer.num_shards)


def source_names(paths: list[str]) -> list[str]:
    """The stem of each, where that tells them apart."""
    names = [Path(path).name.partition(".")[0] for path in paths]
    return names if all(names) and len(set(names)) == len(names) else [*paths]


def add_part(
    writer: LinkWriter | ShardWriter, part: Part, stream: Stream, advance: Callable[[int], Any]
) -> None:
    if isinstance(writer, LinkWriter):
        writer.add(part, stream, advance)
        return
    for block in stream.blocks(part):
        writer.add(*block)
        advance(len(block.columns["tokens"]))


def all_parts(
    config: Any, paths: list[str], streams: list[Stream]
) -> Iterator[tuple[Part, Stream]]:
    """Of every source, in order."""
    module = import_module(f"slm.prepare.imports.{FORMATS[config.format]}")
    read = vars(module)[f"read_{config.format}"]
    options = Options(streams[0].state.vocab_size, config.dtype, config.column, config.masks)
    has = None
    for path, stream in zip(paths, streams, strict=True):
        for part in read(path, options):
            found = {*part.by_need}
            for name in found ^ (found if has is None else has):
                raise UserError(
                    f"{part.place} has {'' if name in found else 'no '}{name}, others have"
                )
            has = found
            if len(part.tokens):
                yield part, stream
        say_end(path, stream)


def say_end(path: str, stream: Stream) -> None:
    """What a user may not expect of the documents."""
    counts, eos_id = stream.counts, stream.state.eos_id
    if stream.is_open and counts["documents"] == 1:
        log.warning("%s is one document: none of its tokens is EOS, %d", path, eos_id)
    elif stream.is_open:
        log.info("%s ends within a document: its last token is not EOS, %d", path, eos_id)
    if counts["eos_added"]:
        log.info("%s: EOS was put behind %d documents", path, counts["eos_added"])
    if counts["eos_inside"]:
        log.warning("%s: %d EOS stand within documents", path, counts["eos_inside"])


def summed(names: list[str], streams: list[Stream], has_masks: bool) -> Json:
    """As the report of a preparation has them."""
    kept = [name for name in COUNTS if has_masks or name != "targets"]
    sources = {
        name: {key: int(stream.counts[key]) for key in kept}
        for name, stream in zip(names, streams, strict=True)
    }
    total = {key: sum(counts[key] for counts in sources.values()) for key in kept}
    return total | {"sources": sources}


def run(**settings: Any) -> None:
    import_corpus(**settings)
