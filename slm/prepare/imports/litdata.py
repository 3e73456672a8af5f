"""LitData's chunks of tokens, as `optimize(..., item_loader=TokensLoader())` writes them.

Items are what the writing function yielded, a document or a block; TokensLoader knows no borders.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm.errors import UserError, shown
from slm.prepare.imports.parts import Options, Part, check_ends, map_numbers, read_listing
from slm.store.fields import FILE, OBJECT, SIZE, check_fields
from slm.store.files import read_json

TENSORS = {11: "uint8", 12: "int8", 13: "int16", 14: "int16", 15: "int32", 16: "int32"}
TENSORS |= {17: "int64", 18: "int64", 20: "uint16"}
ARRAYS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
KINDS = {f"no_header_tensor:{code}": name for code, name in TENSORS.items()}
KINDS |= {f"no_header_numpy:{code}": name for code, name in enumerate(ARRAYS)}
CHUNK = {"filename": FILE, "chunk_size": SIZE}


def read_litdata(given: str, options: Options) -> Iterator[Part]:
    folder = Path(given).expanduser()
    chunks = read_listing(folder / "index.json", "chunks", CHUNK)
    dtype = read_dtype(folder / "index.json")
    for chunk in chunks:
        yield read_chunk(folder / chunk["filename"], chunk["chunk_size"], dtype)


def read_dtype(path: Path) -> str:
    """Of the tokens, by index.json."""
    index = read_json(path)
    check_fields(path, index, {"config": OBJECT})
    kinds = index["config"].get("data_format")
    for key in ("compression", "encryption"):
        if found := index["config"].get(key):
            raise UserError(f"{path}: {key} is {shown(found)}, and only plain chunks are read")
    if not isinstance(kinds, list) or len(kinds) != 1 or kinds[0] not in KINDS:
        raise UserError(
            f"{path}: data_format is {kinds}, one of {', '.join(KINDS)} is read: what `optimize` "
            "writes with item_loader=TokensLoader()"
        )
    return KINDS[kinds[0]]


def read_chunk(path: Path, num_items: int, dtype: str) -> Part:
    header = map_numbers(path, "uint32", 0, num_items + 2).astype(np.int64)
    if header[0] != num_items:
        raise UserError(f"{path} has {header[0]} items, index.json says {num_items}")
    tokens = map_numbers(path, dtype, int(header[1]))
    ends, rest = np.divmod(header[2:] - header[1], np.dtype(dtype).itemsize)
    if rest.any():
        raise UserError(f"{path}: item {rest.argmax()} is no whole number of {dtype}")
    return Part(str(path), tokens, check_ends(path, ends, len(tokens)))
