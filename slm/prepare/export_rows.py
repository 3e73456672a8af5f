"""The formats of `slm export` whose unit is a row: datatrove, MosaicML's MDS, LitData, Parquet.

A row is a document, or a block of seq_len tokens of the stream where packing=concat and the reader
would otherwise cut what is longer than its windows (`blocks`).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from slm.prepare.imports.litdata import ARRAYS
from slm.store.documents import Documents
from slm.store.files import Json, atomic_file, write_json
from slm.store.shards import WEIGHT, Corpus

CHUNK_BYTES = 1 << 26  # of a file of rows, as both libraries' own default; their offsets are uint32
ROWS_AT_ONCE = 1024
IGNORED = -100  # a label of Hugging Face's: no target
Columns = dict[str, np.ndarray]  # tokens and, where the corpus has them, masks and weights


def lengths(corpus: Corpus) -> list[int]:
    """Tokens of each shard."""
    return [shard.num_tokens for shard in corpus.shards]


def columns(corpus: Corpus, name: str) -> Iterator[np.ndarray]:
    """One column of shard after shard, mapped."""
    return (corpus.column(name, index) for index in range(len(corpus.shards)))


def document_ends(corpus: Corpus) -> np.ndarray:  # (d,) int64, in the tokens of all shards
    return Documents(corpus).bounds[1:]


def row_ends(corpus: Corpus) -> np.ndarray:  # (r,) int64, likewise
    """Of documents where they are kept apart; of blocks of seq_len tokens, the last one shorter."""
    if corpus.manifest["packing"] == "documents":
        return document_ends(corpus)
    total = sum(lengths(corpus))
    return np.append(np.arange(corpus.seq_len, total, corpus.seq_len), total)


def rows(corpus: Corpus, ends: np.ndarray) -> Iterator[Columns]:
    """Of each row, which may lie in several shards."""
    names = ["tokens", *["masks"] * corpus.has_masks, *["weights"] * corpus.has_weights]
    waiting: list[Columns] = []
    offset = 0
    for index, length in enumerate(lengths(corpus)):
        found, start = {name: corpus.column(name, index) for name in names}, 0
        inner = slice(*np.searchsorted(ends, [offset, offset + length], side="right"))
        for stop in (ends[inner] - offset).tolist():
            parts = [*waiting, {name: column[start:stop] for name, column in found.items()}]
            yield {name: np.concatenate([part[name] for part in parts]) for name in names}
            waiting, start = [], stop
        if start < length:
            waiting.append({name: column[start:] for name, column in found.items()})
        offset += length


def chunks(items: Iterator[Columns]) -> Iterator[list[Columns]]:
    """Rows of about CHUNK_BYTES."""
    chunk, size = [], 0
    for row in items:
        chunk.append(row)
        size += sum(column.nbytes for column in row.values())
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def packed(count: int, sizes: list[int], head: bytes = b"") -> bytes:
    """What MDS and LitData begin with: number of rows, where each starts and the last one ends."""
    offsets = np.cumsum([4 * (count + 2) + len(head), *sizes])
    return np.array([count, *offsets], "<u4").tobytes() + head


def write_datatrove(corpus: Corpus, folder: Path) -> None:
    """As its DocumentTokenizer does: one file, shuffled by nobody."""
    path, ends = folder / f"{corpus.manifest['split']}.ds", document_ends(corpus)
    for name, suffix in (("tokens", ""), ("masks", ".loss")):
        if name == "tokens" or corpus.has_masks:
            with atomic_file(Path(f"{path}{suffix}")) as file:
                for column in columns(corpus, name):
                    file.write(np.ascontiguousarray(column).data)
    with atomic_file(Path(f"{path}.index")) as file:
        file.write(ends.astype("<u8").data)
    size, total = np.dtype(corpus.shards[0].dtype["tokens"]).itemsize, sum(lengths(corpus))
    with atomic_file(Path(f"{path}.metadata")) as file:
        file.write(f"tokenizer/tokenizer.json|{size}\n{total}\n{shortened(total)}".encode())


def shortened(count: float) -> str:
    """datatrove's third line: 40.0 T, 1.2 MT"""
    for unit in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:.1f} {unit}T"
        count /= 1000
    return f"{count:.1f} TT"


def write_mds(corpus: Corpus, folder: Path) -> None:
    """tokens and by need mask (1: a target) and token_weight, arrays of one axis that say their
    length."""
    kind = corpus.shards[0].dtype["tokens"]
    names = {"mask": "ndarray:uint8"} if corpus.has_masks else {}
    names |= {WEIGHT: "ndarray:float32"} if corpus.has_weights else {}
    names["tokens"] = f"ndarray:{kind}"  # in the order of their names, as MDSWriter sorts them
    config: Json = {
        "column_encodings": list(names.values()),
        "column_names": list(names),
        "column_sizes": [None] * len(names),
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": CHUNK_BYTES,
        "version": 2,
    }
    head, shards = json.dumps(config, sort_keys=True).encode(), []
    for number, chunk in enumerate(chunks(rows(corpus, row_ends(corpus)))):
        samples = [b"".join(mds_sample(row)) for row in chunk]
        name = f"shard.{number:05d}.mds"
        start = packed(len(samples), [len(sample) for sample in samples], head)
        with atomic_file(folder / name) as file:
            file.write(start)
            file.writelines(samples)
        raw = {"basename": name, "bytes": len(start) + sum(map(len, samples)), "hashes": {}}
        shards.append(config | {"raw_data": raw, "samples": len(samples), "zip_data": None})
    write_json(folder / "index.json", {"shards": shards, "version": 2})


def mds_sample(row: Columns) -> Iterator[bytes]:
    """Sizes of the columns, then each: a byte for one axis and its type, its length, the values."""
    count = len(row["tokens"])
    width = next(code for code in range(4) if count < 1 << (8 << code))
    shape = bytes([1 << 2 | width]) + count.to_bytes(1 << width, "little")
    values = [row[name].tobytes() for name in ("masks", "weights", "tokens") if name in row]
    yield np.array([len(shape) + len(value) for value in values], "<u4").tobytes()
    for value in values:
        yield shape + value


def write_litdata(corpus: Corpus, folder: Path) -> None:
    """For TokensLoader: an item a document. Its blocks do not cross the end of a chunk."""
    kind, found = corpus.shards[0].dtype["tokens"], []
    for number, chunk in enumerate(chunks(rows(corpus, document_ends(corpus)))):
        name, tokens = f"chunk-0-{number}.bin", [row["tokens"].tobytes() for row in chunk]
        with atomic_file(folder / name) as file:
            file.write(packed(len(tokens), [len(item) for item in tokens]))
            file.writelines(tokens)
        size = sum(map(len, tokens))
        dim = size // np.dtype(kind).itemsize
        found.append({"chunk_bytes": size, "chunk_size": len(tokens), "dim": dim, "filename": name})
    tree = [1, {"type": None, "context": None, "children_spec": []}]
    unused = ("chunk_size", "compression", "compression_batch_size", "compression_level")
    unused += ("encryption", "ipc_compression")
    config: Json = dict.fromkeys(unused)
    config |= {"chunk_bytes": CHUNK_BYTES, "data_format": [f"no_header_numpy:{ARRAYS.index(kind)}"]}
    config |= {"data_spec": json.dumps(tree), "item_loader": "TokensLoader", "types": "json"}
    write_json(folder / "index.json", {"chunks": found, "config": config, "updated_at": "0"})


def write_datasets(corpus: Corpus, folder: Path) -> None:
    """input_ids and by need labels (the token, or -100) and token_weight, in Parquet that
    `datasets` loads."""
    fields = [("input_ids", pa.list_(pa.int32()))]
    if corpus.has_masks:
        fields.append(("labels", pa.list_(pa.int32())))
    if corpus.has_weights:
        fields.append((WEIGHT, pa.list_(pa.float32())))
    schema, waiting = pa.schema(fields), []
    path = folder / f"{corpus.manifest['split']}.parquet"
    with atomic_file(path) as file, ParquetWriter(file, schema) as writer:
        for row in rows(corpus, row_ends(corpus)):
            waiting.append(row)
            if len(waiting) == ROWS_AT_ONCE:
                writer.write_table(as_table(waiting, schema))
                waiting = []
        if waiting:
            writer.write_table(as_table(waiting, schema))


def as_table(waiting: list[Columns], schema: pa.Schema) -> pa.Table:
    made = {"input_ids": [row["tokens"].astype(np.int32) for row in waiting]}
    if "labels" in schema.names:
        live = [row["masks"] for row in waiting]
        pairs = zip(live, made["input_ids"], strict=True)
        made["labels"] = [np.where(targets, ids, IGNORED) for targets, ids in pairs]
    if WEIGHT in schema.names:
        made[WEIGHT] = [row["weights"] for row in waiting]
    return pa.table(made, schema)
