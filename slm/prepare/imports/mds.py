"""MosaicML's MDS: samples of named columns in shards: tokens, by need masks and `token_weight`."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from slm.errors import UserError
from slm.prepare.imports.parts import Options, Part, listed_bytes, read_listing, same_length
from slm.store.fields import INDEX, OBJECT, TEXT, list_of, one_of, optional
from slm.store.files import Json
from slm.store.shards import BY_NEED, WEIGHT

SAMPLES_AT_ONCE = 512
NAMES = ("tokens", "input_ids")  # of the column, where none is given
DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32"}
DTYPES |= {33: "int32", 34: "float32", 64: "uint64", 65: "int64", 66: "float64"}  # of an ndarray
LISTS = {"column_names": TEXT, "column_encodings": TEXT, "column_sizes": optional(INDEX)}
SHARD = {"format": one_of("mds"), "samples": INDEX, "raw_data": OBJECT}
SHARD |= {"zip_data": optional(OBJECT)} | {name: list_of(kind) for name, kind in LISTS.items()}


def read_mds(given: str, options: Options) -> Iterator[Part]:
    """masks: the column that says which tokens are targets."""
    index = Path(given).expanduser() / "index.json"
    for shard in read_listing(index, "shards", SHARD):
        known, files = shard["column_names"], [shard["raw_data"], shard["zip_data"]]
        path, data = listed_bytes(index, *files)
        own = options.column or next((n for n in NAMES if n in known), " or ".join(NAMES))
        names = {"masks": options.masks, "weights": WEIGHT if WEIGHT in known else None}
        samples = split(path, data, shard["samples"])
        while some := list(islice(samples, SAMPLES_AT_ONCE)):
            tokens, ends = read(path, shard, own, options.dtype or "int64", some)
            found: dict[str, np.ndarray] = {}
            for role, name in names.items():
                if name is not None:
                    values = read(path, shard, name, BY_NEED[role], some)[0].astype(BY_NEED[role])
                    found[role] = same_length(path, values, tokens)
            yield Part(str(path), tokens, ends, **found)


def split(path: Path, data: np.ndarray, count: int) -> Iterator[np.ndarray]:  # (b,) uint8 each
    head = np.resize(data[: 4 * (count + 2)], 4 * (count + 2)).view("<u4").tolist()
    if head[0] != count or head[-1] != len(data):
        said = f"{count} samples by index.json; its header says {head[-1]} and {head[0]}"
        raise UserError(f"{path} has {len(data)} bytes and {said}")
    yield from (data[begin:end] for begin, end in zip(head[1:-1], head[2:], strict=True))


def read(
    path: Path, shard: Json, column: str, dtype: str, samples: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The entries of a column, and where each sample's end; dtype: of `bytes`, as llm-foundry's."""
    known, fixed = shard["column_names"], shard["column_sizes"]
    if column not in known:
        raise UserError(f"{path} has no column {column}, it has {', '.join(known)}")
    at, start, found = known.index(column), 4 * fixed.count(None), []
    kind, *rest = shard["column_encodings"][at].split(":")
    for sample in samples:  # sizes come first, of columns without a fixed one
        told = iter(sample[:start].view("<u4").tolist())
        ends = np.cumsum([start, *(next(told) if size is None else size for size in fixed)])
        value, name = sample[slice(*ends[at : at + 2])], (*rest, dtype)[0]
        if kind == "ndarray" and not rest:
            name, value = DTYPES.get(int(value[0]), "none"), value[1:]
        if kind == "ndarray" and len(rest) < 2:  # a byte for the number of axes and their type
            value = value[1 + (int(value[0]) >> 2) * (1 << (int(value[0]) & 3)) :]
        readable = kind in ("bytes", "ndarray") and name in (*DTYPES.values(), "bool")
        if not readable or len(value) % np.dtype(name).itemsize:
            raise UserError(f"{path}: {len(value)} bytes of {kind} are no numbers ({name})")
        found.append(value.view(np.dtype(name).newbyteorder("<")))
    return np.concatenate(found), np.cumsum([len(values) for values in found])
