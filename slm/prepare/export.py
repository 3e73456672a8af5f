"""A corpus as token files of other trainers, what `slm export format=...` writes.

The inverse of `slm import` (slm.prepare.imports): the tokens of all shards end to end, where the
format has them documents and masks, and the tokenizer beside them. What a corpus dropped at its end
is not there, so the last document may be cut: it ends without EOS.
"""

import gzip
import logging
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from slm.prepare.export_rows import (
    columns,
    document_ends,
    lengths,
    write_datasets,
    write_datatrove,
    write_litdata,
    write_mds,
)
from slm.prepare.imports.command import new_folder
from slm.prepare.imports.flat import HEADER, TOKENS_OF
from slm.prepare.imports.megatron import DTYPES, MAGIC
from slm.stage import Folder
from slm.store.files import atomic_file, write_record
from slm.store.shards import Corpus

log = logging.getLogger("slm.prepare")
VERSIONS = {"uint16": 1, "uint32": 7}  # of llm.c's header
WITH_MASKS = ("olmo", "datatrove", "mds", "datasets")
WITH_WEIGHTS = ("mds", "datasets")
BY_EOS = ("nanogpt", "llmc", "litdata")  # who reads them knows documents by nothing else
MEGATRON_UINT16 = 65500  # entries of a vocabulary up to which Megatron takes uint16


def export_files(corpus: Folder, format: str, out: Folder, check: str = "size") -> Path:
    """The tokens of a corpus as files that another trainer reads.

    Args:
        corpus: folder of shards: corpus/train.
        format: nanogpt, llmc, megatron, olmo, datatrove, mds, litdata or datasets (Parquet).
        out: folder to write, which must not exist: the files, tokenizer/ and export.json.
        check: "full" compares the hash of every file first.

    Returns:
        `out`.

    Raises:
        UserError: the corpus is damaged or unfinished; `out` exists.
    """
    store, folder = Corpus.open(corpus, check), Path(out).expanduser()
    has_masks = store.has_masks and format in WITH_MASKS
    if store.has_masks and not has_masks:
        log.warning("%s: format=%s has no place for its masks, they are left out", corpus, format)
    has_weights = store.has_weights and format in WITH_WEIGHTS
    if store.has_weights and not has_weights:
        log.warning("%s: format=%s has no place for its weights, they are left out", corpus, format)
    if store.manifest["packing"] == "documents" and format in BY_EOS:
        log.warning("%s: format=%s knows documents by their EOS alone", corpus, format)
    with new_folder(folder) as made:
        WRITERS[format](store, made)
        shutil.copytree(store.tokenizer_folder, made / "tokenizer")
        record = {"format": format, "corpus": store.fingerprint, "masks": has_masks}
        record |= {"weights": True} if has_weights else {}
        write_record(made / "export.json", record | {"tokens": sum(lengths(store))})
    log.info("%s: %d tokens of %s as format=%s", folder, sum(lengths(store)), corpus, format)
    return folder


def write_column(corpus: Corpus, name: str, file: BinaryIO) -> None:
    for column in columns(corpus, name):
        file.write(np.ascontiguousarray(column).data)


def write_nanogpt(corpus: Corpus, folder: Path) -> None:
    with atomic_file(folder / f"{corpus.manifest['split']}.bin") as file:
        write_column(corpus, "tokens", file)


def write_llmc(corpus: Corpus, folder: Path) -> None:
    """A file for each shard: their header counts in int32."""
    for index, tokens in enumerate(columns(corpus, "tokens")):
        header = np.zeros(HEADER, "<i4")
        magic = next(magic for magic, kind in TOKENS_OF.items() if kind == tokens.dtype.name)
        header[:3] = magic, VERSIONS[tokens.dtype.name], len(tokens)
        path = folder / f"{corpus.manifest['split']}_{index:06d}.bin"
        with atomic_file(path) as file:
            file.write(header.data)
            file.write(np.ascontiguousarray(tokens).data)


def write_megatron(corpus: Corpus, folder: Path) -> None:
    """A sequence for each document."""
    kind = "uint16" if corpus.vocab_size < MEGATRON_UINT16 else "int32"
    code = next(code for code, name in DTYPES.items() if name == kind)
    ends = document_ends(corpus)
    sizes, count = np.diff(ends, prepend=0), len(ends)
    with atomic_file(folder / f"{corpus.manifest['split']}.bin") as file:
        for tokens in columns(corpus, "tokens"):
            file.write(np.ascontiguousarray(tokens, kind).data)
    with atomic_file(folder / f"{corpus.manifest['split']}.idx") as file:
        file.write(MAGIC + (1).to_bytes(8, "little") + bytes([code]))
        file.write(np.array([count, count + 1], "<u8").data)
        file.write(sizes.astype("<i4").data)
        file.write(((ends - sizes) * np.dtype(kind).itemsize).astype("<i8").data)
        file.write(np.arange(count + 1, dtype="<i8").data)


def write_olmo(corpus: Corpus, folder: Path) -> None:
    with atomic_file(folder / "part-00000.npy") as file:
        write_column(corpus, "tokens", file)
    if corpus.has_masks:
        with atomic_file(folder / "label_mask-00000.npy") as file:
            write_column(corpus, "masks", file)
    ends = document_ends(corpus)
    with atomic_file(folder / "part-00000.csv.gz") as raw:
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            for begin, end in zip(ends - np.diff(ends, prepend=0), ends, strict=True):
                file.write(f"{begin},{end}\n".encode())


WRITERS = {
    "nanogpt": write_nanogpt,
    "llmc": write_llmc,
    "megatron": write_megatron,
    "olmo": write_olmo,
    "datatrove": write_datatrove,
    "mds": write_mds,
    "litdata": write_litdata,
    "datasets": write_datasets,
}
